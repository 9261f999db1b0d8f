"""Fitting a flow to data, or to a density known up to a factor, with the checks and the bookkeeping that it takes."""

from pyroflows.training.data import check_context, check_rows
from pyroflows.training.fit import FitResult, fit
from pyroflows.training.objectives import ELBO, FlowMatching, Likelihood, Objective

__all__ = ["ELBO", "FitResult", "FlowMatching", "Likelihood", "Objective", "check_context", "check_rows", "fit"]
