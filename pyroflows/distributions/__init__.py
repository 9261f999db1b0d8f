"""Flows: a base and a transform in one module, whose call is a Pyro distribution; and named recipes for them."""

from pyroflows.distributions.base import Base, standard_normal
from pyroflows.distributions.flow import Flow, FlowDistribution, Standardize
from pyroflows.distributions.recipes import iaf, maf, nice, nsf, planar, radial, realnvp, sylvester

__all__ = [
    "Base",
    "Flow",
    "FlowDistribution",
    "Standardize",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "standard_normal",
    "sylvester",
]
