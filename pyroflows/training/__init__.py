"""Fitting a flow to data by maximum likelihood, with the checks and the bookkeeping that it takes."""

from pyroflows.training.data import check_context, check_rows
from pyroflows.training.fit import FitResult, fit

__all__ = ["FitResult", "check_context", "check_rows", "fit"]
