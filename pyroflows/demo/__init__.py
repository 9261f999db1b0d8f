"""A flow on real data and a flow as a guide, from start to finish: what ``pyroflows demo`` runs."""

from pyroflows.demo.report import run

__all__ = ["run"]
