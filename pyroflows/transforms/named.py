"""Layers by the names that Pyro gives them, in Pyro's argument order, each with a ``conditional_`` twin.

A script that used ``pyro.distributions.transforms`` changes its import. The same functions are what the
registry builds: ``pf.transform("spline_coupling", input_dim=3, context_dim=2)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.transforms.base import FlowTransform, Reshaped, with_variants
from pyroflows.transforms.lemma import Planar, Radial, Sylvester
from pyroflows.transforms.linear import Permutation, as_permutation
from pyroflows.transforms.maps import Additive, Affine
from pyroflows.transforms.matrix import Householder, MatrixExponential
from pyroflows.transforms.normalisation import BatchNorm
from pyroflows.transforms.splines import RationalSpline
from pyroflows.transforms.structures import Autoregressive, Coupling, Elementwise

__all__ = [
    "additive_coupling",
    "affine",
    "affine_autoregressive",
    "affine_coupling",
    "batchnorm",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_householder",
    "conditional_matrix_exponential",
    "conditional_planar",
    "conditional_radial",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "conditional_sylvester",
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


def _affine_options(options: dict[str, Any]) -> Affine:
    keys = ("scale", "max_log_scale", "floor")
    return Affine(**{key: options.pop(key) for key in keys if key in options})


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
    return Elementwise(_affine_options(options), input_dim, context_dim=context_dim, **options)


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
        stable: the gated scale of `Affine`, Pyro's name for it.
        **options: of `Affine` and `Autoregressive`.

    Example:
        >>> affine_autoregressive(3, [16])(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    hidden_dims = [3 * input_dim + 1] if hidden_dims is None else hidden_dims
    if stable:
        options["scale"] = "gated"
    map = _affine_options(options)
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
        **options: of `Affine` and `Coupling`.

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
) -> Elementwise:
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
    map = RationalSpline(count_bins, bound, order)  # type: ignore[arg-type]
    return Elementwise(map, input_dim, context_dim=context_dim, event_dim=event_dim, **options)


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
    *,
    context_dim: int = 0,
    **options: Any,
) -> Coupling:
    """A coupling layer of rational splines: the first coordinates steer the splines of the rest.

    Args:
        input_dim: the number of coordinates.
        split_dim: how many coordinates steer; default half of them.
        hidden_dims: the hidden widths; default two of ``10 input_dim``.
        count_bins: the number of bins.
        bound: half the side of the box outside of which the splines are the identity.
        order: ``"linear"`` or ``"quadratic"``.
        context_dim: the width of the context.
        **options: of `Coupling`.

    Example:
        >>> spline_coupling(3, 1)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    map, mask = RationalSpline(count_bins, bound, order), _first(input_dim, split_dim)  # type: ignore[arg-type]
    return Coupling(map, input_dim, context_dim=context_dim, mask=mask, hidden_dims=hidden_dims, **options)


def permute(
    input_dim: int | Sequence[int],
    permutation: Tensor | Sequence[int] | str | None = None,
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
    """`BatchNorm`, by Pyro's name.

    Example:
        >>> batchnorm(2).forward_and_log_det(torch.ones(5, 2))[1].shape
        torch.Size([5, 2])
    """
    return BatchNorm(input_dim, **options)


def householder(input_dim: int, count_transforms: int | None = None, **options: Any) -> Householder:
    """`Householder`, by Pyro's name, of ``input_dim // 2 + 1`` reflections by default.

    Example:
        >>> householder(5).count_transforms
        3
    """
    count_transforms = input_dim // 2 + 1 if count_transforms is None else count_transforms
    return Householder(input_dim, count_transforms, **options)


def matrix_exponential(
    input_dim: int, iterations: int = 8, normalization: str = "none", bound: float | None = None, **options: Any
) -> MatrixExponential:
    """`MatrixExponential`, by Pyro's name; its exponential is exact, whatever the number of iterations.

    Example:
        >>> matrix_exponential(2)(torch.ones(2)).shape
        torch.Size([2])
    """
    return MatrixExponential(input_dim, iterations, normalization, bound, **options)


def planar(input_dim: int, **options: Any) -> Planar:
    """`Planar`, by Pyro's name; it samples and scores.

    Example:
        >>> planar(2).inv(torch.ones(2)).shape
        torch.Size([2])
    """
    return Planar(input_dim, **options)


def radial(input_dim: int, **options: Any) -> Radial:
    """`Radial`, by Pyro's name; it samples and scores.

    Example:
        >>> radial(2).inv(torch.ones(2)).shape
        torch.Size([2])
    """
    return Radial(input_dim, **options)


@with_variants({"factor": "orthogonal", "width": 1}, {"factor": "triangular", "nonlinearity": "arctan"})
def sylvester(input_dim: int, count_transforms: int | None = None, **options: Any) -> Sylvester:
    """`Sylvester`, by Pyro's name; it samples and scores.

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
) -> Elementwise:
    """`spline` with parameters that a network reads off a context; two hidden layers of ``10 input_dim``."""
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
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
) -> Coupling:
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
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
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
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    return matrix_exponential(
        input_dim, iterations, normalization, bound, context_dim=context_dim, hidden_dims=hidden_dims, **options
    )


def conditional_planar(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Planar:
    """`planar` with a context; two hidden layers of ``10 input_dim``."""
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    return planar(input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_radial(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Radial:
    """`radial` with a context; two hidden layers of ``10 input_dim``."""
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    return radial(input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_sylvester(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_transforms: int | None = None,
    **options: Any,
) -> Sylvester:
    """`sylvester` with a context, which Pyro lacks; two hidden layers of ``10 input_dim``."""
    hidden_dims = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    return sylvester(input_dim, count_transforms, context_dim=context_dim, hidden_dims=hidden_dims, **options)
