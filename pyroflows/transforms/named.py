"""Layers by the names that Pyro gives their helpers, in Pyro's argument order.

A script that used ``pyro.distributions.transforms`` changes its import. The same functions are what the registry
builds: ``pf.transform("spline_coupling", input_dim=3, context_dim=2)``. Their twins with a context are in
``conditional.py``, and Pyro's classes, which take the caller's network, in ``dropin.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from pyroflows.errors import OptionError
from pyroflows.transforms.base import FlowTransform, with_variants
from pyroflows.transforms.block import BlockAutoregressive
from pyroflows.transforms.compose import Reshaped
from pyroflows.transforms.dropin import ClippedAffine, Spline
from pyroflows.transforms.dropin_coupling import SplineCoupling
from pyroflows.transforms.lemma import Planar, Radial, Sylvester
from pyroflows.transforms.maps import Additive, Affine
from pyroflows.transforms.matrix import Householder, MatrixExponential
from pyroflows.transforms.normalisation import BatchNorm
from pyroflows.transforms.permutation import Permutation, as_permutation
from pyroflows.transforms.splines import RationalSpline
from pyroflows.transforms.structures import Autoregressive, Coupling, Elementwise

__all__ = [
    "additive_coupling",
    "affine",
    "affine_autoregressive",
    "affine_coupling",
    "batchnorm",
    "block_autoregressive",
    "householder",
    "matrix_exponential",
    "permute",
    "planar",
    "radial",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
    "sylvester",
]


def _first(input_dim: int, split_dim: int | None) -> list[bool]:
    split = input_dim // 2 if split_dim is None else split_dim
    if not 0 <= split < input_dim:
        raise OptionError(f"split_dim must be in 0 .. {input_dim - 1}, got {split}.")
    return [i < split for i in range(input_dim)]


def _affine_options(options: dict[str, Any], stable: bool = False) -> Affine:
    """The affine map that the options ask for, taken out of them: Pyro's, unless there are some of `Affine`."""
    own, pyros = ("scale", "max_log_scale", "floor"), ("log_scale_min_clip", "log_scale_max_clip", "sigmoid_bias")
    ours = {key: options.pop(key) for key in own if key in options}
    theirs = {key: options.pop(key) for key in pyros if key in options}
    if ours and (theirs or stable):
        raise OptionError(
            f"{sorted(ours)} and {sorted(theirs) or 'stable'} are options of two different maps; give one."
        )
    return Affine(**ours) if ours else ClippedAffine(**theirs, stable=stable)


@with_variants({"scale": "softplus"})
def affine(input_dim: int, *, context_dim: int = 0, **options: Any) -> Elementwise:
    """A shift and scale of each coordinate: `Elementwise` with `Affine`.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        **options: of `Affine` and `Elementwise`.

    Example:
        >>> affine(2)(torch.ones(2))
        tensor([1., 1.], grad_fn=<...>)
    """
    map = Affine(**{key: options.pop(key) for key in ("scale", "max_log_scale", "floor") if key in options})
    return Elementwise(map, input_dim, context_dim=context_dim, **options)


@with_variants({"scale": "softplus", "residual": True, "hidden_dims": (16, 16), "activation": "silu"}, {"stable": True})
def affine_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    context_dim: int = 0,
    stable: bool = False,
    **options: Any,
) -> Autoregressive:
    """An affine autoregressive layer: one pass samples, its ``.inv`` scores in one pass.

    Args:
        input_dim: the number of coordinates.
        hidden_dims: the hidden widths; default one of ``3 input_dim + 1``.
        context_dim: the width of the context.
        stable: the contracting form of `ClippedAffine`.
        **options: of `ClippedAffine` (Pyro's: ``log_scale_min_clip``, ``log_scale_max_clip``, ``sigmoid_bias``), or of
            `Affine` in its place; and of `Autoregressive`.

    Raises:
        OptionError: options of both maps.

    Example:
        >>> affine_autoregressive(3, [16])(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    hidden_dims = [3 * input_dim + 1] if hidden_dims is None else hidden_dims
    map = _affine_options(options, stable)
    return Autoregressive(map, input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def affine_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    dim: int = -1,
    *,
    context_dim: int = 0,
    **options: Any,
) -> FlowTransform:
    """An affine coupling layer: the first part of the coordinates shifts and scales the rest.

    Args:
        input_dim: the number of coordinates, or the shape of the last ``-dim`` dimensions.
        hidden_dims: the hidden widths; default one of ``10 input_dim``.
        split_dim: how many coordinates along ``dim`` steer; default half of them.
        dim: the dimension that is split, negative; all from it on belong to one point.
        context_dim: the width of the context.
        **options: of `ClippedAffine` (Pyro's: ``log_scale_min_clip``, ``log_scale_max_clip``), or of `Affine` in its
            place; and of `Coupling`.

    Raises:
        OptionError: ``split_dim`` leaves nothing to be moved, or ``input_dim`` and ``dim`` do not fit.

    Example:
        >>> affine_coupling([4, 3], dim=-2)(torch.zeros(5, 4, 3)).shape
        torch.Size([5, 4, 3])
    """
    shape = (input_dim,) if isinstance(input_dim, int) else tuple(input_dim)
    if len(shape) != -dim:
        raise OptionError(f"dim={dim} needs an input_dim of {-dim} numbers, got {input_dim}.")
    size, rest = prod(shape), prod(shape[1:])
    mask = [steer for steer in _first(shape[0], split_dim) for _ in range(rest)]
    hidden_dims = [10 * size] if hidden_dims is None else hidden_dims
    map = _affine_options(options)
    layer = Coupling(map, size, context_dim=context_dim, mask=mask, hidden_dims=hidden_dims, **options)
    return layer if len(shape) == 1 else Reshaped(layer, shape)


def additive_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    *,
    context_dim: int = 0,
    **options: Any,
) -> Coupling:
    """An additive coupling layer, volume-preserving: the first coordinates shift the rest.

    Args:
        input_dim: the number of coordinates.
        hidden_dims: the hidden widths; default one of ``10 input_dim``.
        split_dim: how many coordinates steer; default half of them.
        context_dim: the width of the context.
        **options: of `Coupling`.

    Example:
        >>> additive_coupling(4).forward_and_log_det(torch.zeros(4))[1]
        tensor(0.)
    """
    hidden_dims = [10 * input_dim] if hidden_dims is None else hidden_dims
    mask = _first(input_dim, split_dim)
    return Coupling(Additive(), input_dim, context_dim=context_dim, mask=mask, hidden_dims=hidden_dims, **options)


@with_variants({"order": "quadratic"}, {"event_dim": 1})
def spline(
    input_dim: int,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "linear",
    *,
    context_dim: int = 0,
    event_dim: int = 0,
    **options: Any,
) -> Spline:
    """A rational spline of each coordinate, with ``event_dim == 0`` as in Pyro.

    Args:
        input_dim: the number of coordinates.
        count_bins: the number of bins.
        bound: half the side of the box outside of which the spline is the identity.
        order: ``"linear"`` or ``"quadratic"``.
        context_dim: the width of the context.
        event_dim: 0 keeps the coordinates apart; 1 makes a layer on vectors.
        **options: of `Elementwise`.

    Example:
        >>> spline(2).forward_and_log_det(torch.ones(5, 2))[1].shape
        torch.Size([5, 2])
    """
    return Spline(input_dim, count_bins, bound, order, context_dim=context_dim, event_dim=event_dim, **options)


@with_variants({"order": "quadratic"})
def spline_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "linear",
    *,
    context_dim: int = 0,
    **options: Any,
) -> Autoregressive:
    """An autoregressive layer of rational splines: one pass samples, its ``.inv`` scores in one pass.

    Args:
        input_dim: the number of coordinates.
        hidden_dims: the hidden widths; default two of ``10 input_dim``.
        count_bins: the number of bins.
        bound: half the side of the box outside of which the splines are the identity.
        order: ``"linear"`` or ``"quadratic"``.
        context_dim: the width of the context.
        **options: of `Autoregressive`.

    Example:
        >>> spline_autoregressive(3, order="quadratic")(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    map = RationalSpline(count_bins, bound, order)  # type: ignore[arg-type]
    return Autoregressive(map, input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


@with_variants({"order": "quadratic"})
def spline_coupling(
    input_dim: int,
    split_dim: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "linear",
    identity: bool = False,
    *,
    context_dim: int = 0,
    **options: Any,
) -> SplineCoupling:
    """A coupling layer of rational splines: the first coordinates steer the splines of the rest.

    Args:
        input_dim: the number of coordinates.
        split_dim: how many coordinates steer; default half of them.
        hidden_dims: the hidden widths; default two of ``10 input_dim``.
        count_bins: the number of bins.
        bound: half the side of the box outside of which the splines are the identity.
        order: ``"linear"`` or ``"quadratic"``.
        identity: whether the first coordinates are left as they are; otherwise each has a spline of its own.
        context_dim: the width of the context.
        **options: of `Coupling`.

    Raises:
        OptionError: ``split_dim`` leaves nothing to be moved.

    Example:
        >>> spline_coupling(3, 1)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    split_dim = input_dim // 2 if split_dim is None else split_dim
    options["hidden_dims"] = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    return SplineCoupling(
        input_dim, split_dim, None, count_bins, bound, order, identity, context_dim=context_dim, **options
    )


def permute(
    input_dim: int | Sequence[int],
    permutation: torch.Tensor | Sequence[int] | str | None = None,
    dim: int = -1,
    *,
    context_dim: int = 0,
) -> Permutation:
    """A fixed permutation along one dimension; it ignores a context.

    Args:
        input_dim: the number of entries along ``dim``, or the shape of the last ``-dim`` dimensions.
        permutation: which entry goes where, or ``"reverse"``, or ``"random"``, the default: drawn by torch's
            generator.
        dim: the dimension, negative; all from it on belong to one point.
        context_dim: accepted and ignored, as every registered layer accepts one.

    Raises:
        OptionError: ``permutation`` is not one of ``input_dim`` entries.

    Example:
        >>> permute(3, [2, 1, 0])(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
    """
    size = input_dim if isinstance(input_dim, int) else input_dim[0]
    order = as_permutation("random" if permutation is None else permutation, size)
    return Permutation(order, dim=dim)


def batchnorm(input_dim: int, **options: Any) -> BatchNorm:
    """Normalisation by the batch's or running mean and variance: `BatchNorm`, by Pyro's name.

    Example:
        >>> batchnorm(2).forward_and_log_det(torch.ones(5, 2))[1].shape
        torch.Size([5, 2])
    """
    return BatchNorm(input_dim, **options)


def householder(input_dim: int, count_transforms: int | None = None, **options: Any) -> Householder:
    """A product of ``input_dim // 2 + 1`` reflections by default: `Householder`, by Pyro's name.

    Example:
        >>> householder(5).count_transforms
        3
    """
    count_transforms = input_dim // 2 + 1 if count_transforms is None else count_transforms
    return Householder(input_dim, count_transforms, **options)


def matrix_exponential(
    input_dim: int, iterations: int = 8, normalization: str = "none", bound: float | None = None, **options: Any
) -> MatrixExponential:
    """The exponential of a matrix, exact whatever the number of iterations: `MatrixExponential`, by Pyro's name.

    Example:
        >>> matrix_exponential(2)(torch.ones(2)).shape
        torch.Size([2])
    """
    return MatrixExponential(input_dim, iterations, normalization, bound, **options)


def planar(input_dim: int, **options: Any) -> Planar:
    """A ridge added along one direction, both ways: `Planar`, by Pyro's name.

    Example:
        >>> planar(2).inv(torch.ones(2)).shape
        torch.Size([2])
    """
    return Planar(input_dim, **options)


def radial(input_dim: int, **options: Any) -> Radial:
    """A contraction or expansion about one point, both ways: `Radial`, by Pyro's name.

    Example:
        >>> radial(2).inv(torch.ones(2)).shape
        torch.Size([2])
    """
    return Radial(input_dim, **options)


@with_variants({"factor": "orthogonal", "width": 1}, {"factor": "triangular", "nonlinearity": "arctan"})
def sylvester(input_dim: int, count_transforms: int | None = None, **options: Any) -> Sylvester:
    """A one-layer residual network of few units, both ways: `Sylvester`, by Pyro's name.

    Args:
        input_dim: the number of coordinates.
        count_transforms: the number of Householder reflections; default ``input_dim // 2 + 1``.
        **options: of `Sylvester`.

    Example:
        >>> sylvester(2).inv(torch.ones(2)).shape
        torch.Size([2])
    """
    count_transforms = input_dim // 2 + 1 if count_transforms is None else count_transforms
    return Sylvester(input_dim, count_transforms, **options)


def block_autoregressive(input_dim: int, **options: Any) -> BlockAutoregressive:
    """A monotone network for each coordinate, both ways: `BlockAutoregressive`, by Pyro's name.

    Example:
        >>> block_autoregressive(2, activation="ELU").inv(torch.ones(2)).shape
        torch.Size([2])
    """
    return BlockAutoregressive(input_dim, **options)
