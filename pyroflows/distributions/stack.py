"""What named flows are made of: layers in turn on a base, with the coordinates turned round in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyroflows.distributions.base import BaseName, base_by_name
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.support import Support
from pyroflows.errors import OptionError
from pyroflows.transforms import (
    Autoregressive,
    Compose,
    Coupling,
    FlowTransform,
    LULinear,
    UnivariateMap,
    coupling_mask,
)

__all__ = ["autoregressions", "couplings", "directed", "stack", "turned"]


def stack(
    layer: Callable[[int], FlowTransform],
    input_dim: int,
    transforms: int,
    linear: bool,
    support: Support | None,
    last: FlowTransform | None = None,
    base: BaseName = "normal",
) -> Flow:
    """``transforms`` layers on a base, a linear layer before each if asked.

    Raises:
        OptionError: ``transforms`` is not a positive integer, or there is no such base.
    """
    if not isinstance(transforms, int) or transforms < 1:
        raise OptionError(f"transforms must be a positive integer, got {transforms!r}.")
    layers: list[FlowTransform] = []
    for i in range(transforms):
        if linear:
            layers.append(LULinear(input_dim))
        layers.append(layer(i))
    if last is not None:
        layers.append(last)
    return Flow(Compose(layers), base_by_name(base, input_dim), support=support)


def turned(input_dim: int, i: int) -> Sequence[int]:
    """The order of the coordinates in layer ``i``: as they come, then from the last, and so on."""
    return range(input_dim) if i % 2 == 0 else range(input_dim)[::-1]


def couplings(
    map: UnivariateMap, input_dim: int, mask: str | Sequence[bool] = "checkerboard", **network: Any
) -> Callable[[int], FlowTransform]:
    """What makes the couplings of a flow, each steered by the coordinates that the last one moved."""
    return lambda i: Coupling(map, input_dim, mask=coupling_mask(mask, input_dim, flip=i % 2 == 1), **network)


def autoregressions(map: UnivariateMap, input_dim: int, **network: Any) -> Callable[[int], FlowTransform]:
    """What makes the autoregressive layers of a flow, whose order turns round from one to the next."""
    return lambda i: Autoregressive(map, input_dim, order=turned(input_dim, i), **network)


def directed(layer: Callable[[int], FlowTransform], direction: str) -> Callable[[int], FlowTransform]:
    """The layers as they are, whose formula samples, or their inverses, whose formula scores.

    Raises:
        OptionError: ``direction`` is neither ``"sample"`` nor ``"score"``.
    """
    if direction not in ("score", "sample"):
        raise OptionError(f'direction must be "score" or "sample", got {direction!r}.')
    return layer if direction == "sample" else lambda i: layer(i).inv
