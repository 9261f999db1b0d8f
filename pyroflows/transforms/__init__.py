"""Layers: bijections with parameters, real Pyro transforms, one file a family."""

from pyroflows.transforms.base import (
    Compose,
    Conditioned,
    FlowTransform,
    Inverse,
    Reshaped,
    Wrapped,
    with_variants,
)
from pyroflows.transforms.linear import ActNorm, LULinear, Permutation
from pyroflows.transforms.maps import Additive, Affine, NumericMap, Spline, UnivariateMap
from pyroflows.transforms.named import (
    additive_coupling,
    affine,
    affine_autoregressive,
    affine_coupling,
    conditional_affine_autoregressive,
    conditional_affine_coupling,
    conditional_spline,
    conditional_spline_autoregressive,
    conditional_spline_coupling,
    permute,
    spline,
    spline_autoregressive,
    spline_coupling,
)
from pyroflows.transforms.structures import Autoregressive, Coupling, Elementwise

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "Compose",
    "Conditioned",
    "Coupling",
    "Elementwise",
    "FlowTransform",
    "Inverse",
    "LULinear",
    "NumericMap",
    "Permutation",
    "Reshaped",
    "Spline",
    "UnivariateMap",
    "Wrapped",
    "additive_coupling",
    "affine",
    "affine_autoregressive",
    "affine_coupling",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "permute",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
    "with_variants",
]
