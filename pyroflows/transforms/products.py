"""The products of maps and structures by name: any univariate map, elementwise, by coupling, or autoregressively."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.transforms.base import with_variants
from pyroflows.transforms.maps import Additive, Affine, UnivariateMap
from pyroflows.transforms.mixtures import DeepSigmoid, DenseSigmoid, Gaussianization, LogisticMixture
from pyroflows.transforms.monotone import Bernstein, SumOfSquares, UnconstrainedMonotonic, VolumePreserving
from pyroflows.transforms.splines import PolynomialSpline, RationalSpline
from pyroflows.transforms.structures import Autoregressive, Coupling, Elementwise
from pyroflows.transforms.tails import SinhArcsinh, SoftLog, TailTransform

__all__ = ["MAPS", "autoregressive", "coupling", "elementwise", "univariate_map"]

MAPS: dict[str, Callable[..., UnivariateMap]] = {
    "additive": Additive,
    "affine": Affine,
    "bernstein": Bernstein,
    "deep_sigmoid": DeepSigmoid,
    "dense_sigmoid": DenseSigmoid,
    "gaussianization": Gaussianization,
    "logistic_mixture": LogisticMixture,
    "polynomial_spline": PolynomialSpline,
    "rational_spline": RationalSpline,
    "sinh_arcsinh": SinhArcsinh,
    "soft_log": SoftLog,
    "sum_of_squares": SumOfSquares,
    "tail": TailTransform,
    "unconstrained_monotonic": UnconstrainedMonotonic,
    "volume_preserving": VolumePreserving,
}
"""Univariate maps by name; a new one is a line here."""


def univariate_map(map: str | UnivariateMap, **options: Any) -> UnivariateMap:
    """A univariate map by name, with its options; one that is built already comes back as it is.

    Args:
        map: a name in `MAPS`, or a map.
        **options: of the map's class.

    Raises:
        OptionError: there is no such map, or it has no such option.

    Example:
        >>> univariate_map("rational_spline", bins=4).params
        11
    """
    if isinstance(map, UnivariateMap):
        if options:
            raise OptionError(f"{type(map).__name__} is built already and takes no options, got {sorted(options)}.")
        return map
    if map not in MAPS:
        near = difflib.get_close_matches(str(map), MAPS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"no univariate map {map!r}.{hint} Known maps: {', '.join(sorted(MAPS))}.")
    try:
        return MAPS[map](**options)
    except TypeError as error:
        raise OptionError(f"the map {map!r} does not take these options: {error}") from error


@with_variants(
    {"map": "dense_sigmoid", "hidden_units": 4},
    {"map": "gaussianization"},
    {"map": "sinh_arcsinh"},
    {"map": "tail"},
    {"map": "soft_log"},
    {"map": "rational_spline", "tails": "linear"},
    {"map": "polynomial_spline", "order": "linear", "tails": "linear"},
)
def elementwise(
    input_dim: int,
    map: str | UnivariateMap = "affine",
    *,
    context_dim: int = 0,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    event_dim: int = 1,
    **options: Any,
) -> Elementwise:
    """Each coordinate through its own univariate map: `Elementwise` with any map of `MAPS`.

    Args:
        input_dim: the number of coordinates.
        map: the map's name, or a map.
        context_dim: the width of the context; with one, a network gives the parameters.
        hidden_dims: the hidden widths of that network.
        activation: its activation.
        event_dim: 1 for a density on vectors; 0 keeps the coordinates apart.
        **options: of the map.

    Raises:
        OptionError: there is no such map, or it has no such option.

    Example:
        >>> import torch
        >>> elementwise(2, "rational_spline", bins=4)(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """
    network: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation}
    return Elementwise(univariate_map(map, **options), input_dim, event_dim=event_dim, **network)


@with_variants(
    {"map": "logistic_mixture"},
    {"map": "volume_preserving"},
    {"map": "polynomial_spline", "order": "quadratic", "tails": "linear"},
)
def coupling(
    input_dim: int,
    map: str | UnivariateMap = "affine",
    *,
    context_dim: int = 0,
    mask: str | Sequence[bool] | None = None,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    **options: Any,
) -> Coupling:
    """Some coordinates steer the univariate maps of the others: `Coupling` with any map of `MAPS`.

    Args:
        input_dim: the number of coordinates.
        map: the map's name, or a map.
        context_dim: the width of the context.
        mask: which coordinates steer: ``"split"``, ``"checkerboard"`` or booleans, see `Coupling`.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        **options: of the map.

    Raises:
        OptionError: there is no such map, or it has no such option.

    Example:
        >>> import torch
        >>> coupling(4, "additive")(torch.zeros(5, 4)).shape
        torch.Size([5, 4])
    """
    network: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation}
    return Coupling(univariate_map(map, **options), input_dim, mask=mask, residual=residual, **network)


@with_variants(
    {"map": "unconstrained_monotonic"},
    {"map": "bernstein"},
    {"map": "polynomial_spline", "order": "cubic"},
)
def autoregressive(
    input_dim: int,
    map: str | UnivariateMap = "affine",
    *,
    context_dim: int = 0,
    order: Sequence[int] | str | None = None,
    adjacency: Sequence[Sequence[bool]] | None = None,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    **options: Any,
) -> Autoregressive:
    """Each coordinate's univariate map steered by those before it: `Autoregressive` with any map of `MAPS`.

    Args:
        input_dim: the number of coordinates.
        map: the map's name, or a map.
        context_dim: the width of the context.
        order: the rank of each coordinate, see `Autoregressive`; a word is the option ``order`` of the map.
        adjacency: which coordinate steers which, see `Autoregressive`.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        **options: of the map.

    Raises:
        OptionError: there is no such map, or it has no such option.

    Example:
        >>> import torch
        >>> autoregressive(4, "rational_spline")(torch.zeros(5, 4)).shape
        torch.Size([5, 4])
    """
    if isinstance(order, str):
        options["order"], order = order, None
    network: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation}
    return Autoregressive(
        univariate_map(map, **options), input_dim, order=order, adjacency=adjacency, residual=residual, **network
    )
