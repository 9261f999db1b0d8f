"""The helpers that Pyro calls ``conditional_``: a layer with a context, in Pyro's argument order.

Each is its twin in ``named.py`` with ``context_dim``, and the hidden widths that Pyro gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.block import BlockAutoregressive
from pyroflows.transforms.dropin import Spline
from pyroflows.transforms.dropin_coupling import SplineCoupling
from pyroflows.transforms.lemma import Planar, Radial, Sylvester
from pyroflows.transforms.matrix import Householder, MatrixExponential
from pyroflows.transforms.named import (
    affine_autoregressive,
    affine_coupling,
    block_autoregressive,
    householder,
    matrix_exponential,
    planar,
    radial,
    spline,
    spline_autoregressive,
    spline_coupling,
    sylvester,
)
from pyroflows.transforms.structures import Autoregressive

__all__ = [
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_block_autoregressive",
    "conditional_householder",
    "conditional_matrix_exponential",
    "conditional_planar",
    "conditional_radial",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "conditional_sylvester",
]


def _wide(input_dim: int, hidden_dims: Sequence[int] | None) -> Sequence[int]:
    """Two hidden layers of ``10 input_dim``, unless others are asked for."""
    return [10 * input_dim] * 2 if hidden_dims is None else hidden_dims


def conditional_affine_autoregressive(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Autoregressive:
    """`affine_autoregressive` with a context; the hidden layer is ``10 input_dim`` wide by default."""
    hidden_dims = [10 * input_dim] if hidden_dims is None else hidden_dims
    return affine_autoregressive(input_dim, hidden_dims, context_dim=context_dim, **options)


def conditional_affine_coupling(
    input_dim: int | Sequence[int],
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    dim: int = -1,
    **options: Any,
) -> FlowTransform:
    """`affine_coupling` with a context."""
    return affine_coupling(input_dim, hidden_dims, split_dim, dim, context_dim=context_dim, **options)


def conditional_spline(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "linear",
    **options: Any,
) -> Spline:
    """`spline` with parameters that a network reads off a context; two hidden layers of ``10 input_dim``."""
    hidden_dims = _wide(input_dim, hidden_dims)
    return spline(input_dim, count_bins, bound, order, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_spline_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "linear",
    **options: Any,
) -> Autoregressive:
    """`spline_autoregressive` with a context."""
    return spline_autoregressive(input_dim, hidden_dims, count_bins, bound, order, context_dim=context_dim, **options)


def conditional_spline_coupling(
    input_dim: int,
    context_dim: int,
    split_dim: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "linear",
    **options: Any,
) -> SplineCoupling:
    """`spline_coupling` with a context, which Pyro lacks."""
    return spline_coupling(
        input_dim, split_dim, hidden_dims, count_bins, bound, order, context_dim=context_dim, **options
    )


def conditional_householder(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_transforms: int = 1,
    **options: Any,
) -> Householder:
    """`householder` with a context; two hidden layers of ``10 input_dim``, one reflection by default."""
    hidden_dims = _wide(input_dim, hidden_dims)
    return householder(input_dim, count_transforms, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_matrix_exponential(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    iterations: int = 8,
    normalization: str = "none",
    bound: float | None = None,
    **options: Any,
) -> MatrixExponential:
    """`matrix_exponential` with a context; two hidden layers of ``10 input_dim``."""
    hidden_dims = _wide(input_dim, hidden_dims)
    return matrix_exponential(
        input_dim, iterations, normalization, bound, context_dim=context_dim, hidden_dims=hidden_dims, **options
    )


def conditional_planar(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Planar:
    """`planar` with a context; two hidden layers of ``10 input_dim``."""
    hidden_dims = _wide(input_dim, hidden_dims)
    return planar(input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_radial(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Radial:
    """`radial` with a context; two hidden layers of ``10 input_dim``."""
    hidden_dims = _wide(input_dim, hidden_dims)
    return radial(input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_sylvester(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_transforms: int | None = None,
    **options: Any,
) -> Sylvester:
    """`sylvester` with a context, which Pyro lacks; two hidden layers of ``10 input_dim``."""
    hidden_dims = _wide(input_dim, hidden_dims)
    return sylvester(input_dim, count_transforms, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_block_autoregressive(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> BlockAutoregressive:
    """`block_autoregressive` with a context, which Pyro lacks; two hidden layers of ``10 input_dim``."""
    hidden_dims = _wide(input_dim, hidden_dims)
    return block_autoregressive(input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)
