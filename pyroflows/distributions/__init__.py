"""Flows: a base and a transform in one module, whose call is a Pyro distribution; and named recipes for them."""

from pyroflows.distributions.augmented import Augmented, AugmentedDistribution
from pyroflows.distributions.base import Base, LearnedStudentT, standard_normal
from pyroflows.distributions.block import bnaf
from pyroflows.distributions.bounded import Bounded
from pyroflows.distributions.continuous import ffjord, flow_matching, otflow, rnode
from pyroflows.distributions.flow import Flow, FlowDistribution, Standardize
from pyroflows.distributions.images import dequantizer, glow, realnvp_image
from pyroflows.distributions.manifolds import ncsf, sphere, uniform_angles, von_mises_angles
from pyroflows.distributions.mixture import Mixture, MixtureDistribution, mixture
from pyroflows.distributions.monotone import bpf, gaussianization, naf, sospf, unaf
from pyroflows.distributions.pixels import Dequantized, PixelDistribution, bits_per_dim, logit_interval
from pyroflows.distributions.recipes import iaf, maf, nice, nsf, planar, radial, realnvp, sylvester

__all__ = [
    "Augmented",
    "AugmentedDistribution",
    "Base",
    "Bounded",
    "Dequantized",
    "Flow",
    "FlowDistribution",
    "LearnedStudentT",
    "Mixture",
    "MixtureDistribution",
    "PixelDistribution",
    "Standardize",
    "bits_per_dim",
    "bnaf",
    "bpf",
    "dequantizer",
    "ffjord",
    "flow_matching",
    "gaussianization",
    "glow",
    "iaf",
    "logit_interval",
    "maf",
    "mixture",
    "naf",
    "ncsf",
    "nice",
    "nsf",
    "otflow",
    "planar",
    "radial",
    "realnvp",
    "realnvp_image",
    "rnode",
    "sospf",
    "sphere",
    "standard_normal",
    "sylvester",
    "unaf",
    "uniform_angles",
    "von_mises_angles",
]
