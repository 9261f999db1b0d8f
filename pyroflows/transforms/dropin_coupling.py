"""Pyro's coupling classes, which take the caller's network, with Pyro's arguments.

What ``dropin.py`` says of its classes holds for these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.errors import OptionError, ShapeError
from pyroflows.numerics import sum_last
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.dropin import ClippedAffine, Net, PerCoordinate, by_coordinate, outputs, width_of_context
from pyroflows.transforms.splines import RationalSpline
from pyroflows.transforms.structures import Coupling, Elementwise

__all__ = ["AffineCoupling", "ConditionalAffineCoupling", "SplineCoupling"]


class AffineCoupling(FlowTransform):
    """Pyro's class: the first entries along one dimension shift and scale the others.

    Args:
        split_dim: how many entries steer.
        hypernet: such as ``DenseNN(split_dim, hidden_dims, [D - split_dim, D - split_dim])``, which gives means and
            log-scales.
        dim: the dimension that is split, negative; all from it on belong to one point.
        log_scale_min_clip: the lower bound of the log-scale, approached smoothly, see `ClippedAffine`.
        log_scale_max_clip: the upper bound.

    Raises:
        OptionError: ``dim`` is not negative, or zero is not between the bounds.

    Example:
        >>> from pyro.nn import DenseNN
        >>> AffineCoupling(1, DenseNN(1, [16], [2, 2])).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    sign = 1

    def __init__(
        self,
        split_dim: int,
        hypernet: Net,
        *,
        dim: int = -1,
        log_scale_min_clip: float = -5.0,
        log_scale_max_clip: float = 3.0,
        context_dim: int = 0,
    ) -> None:
        super().__init__(context_dim)
        if dim >= 0:
            raise OptionError(f"dim must be negative, got {dim}.")
        self.split_dim, self.nn, self.dim = split_dim, hypernet, dim
        self.map = ClippedAffine(log_scale_min_clip, log_scale_max_clip)
        self.domain = self.codomain = constraints.independent(constraints.real, -dim)

    def _apply_map(self, value: Tensor, context: Tensor | None, direction: Any) -> tuple[Tensor, Tensor]:
        self.check_context(context)
        if value.dim() < -self.dim or value.shape[self.dim] <= self.split_dim:
            raise ShapeError(
                f"expected more than split_dim={self.split_dim} entries along dim={self.dim}, got {tuple(value.shape)}."
            )
        kept, moved = value.split([self.split_dim, value.shape[self.dim] - self.split_dim], self.dim)
        steering, flat = kept.flatten(self.dim), moved.flatten(self.dim)
        batch_dims = steering.dim() - 1 if context is None else max(steering.dim(), context.dim()) - 1
        parts = outputs(self.nn, steering, context=context if self.context_dim else None)
        params = by_coordinate(parts, flat.shape[-1], batch_dims).to(value.dtype)
        result, log_slope = direction(flat, params)
        kept = kept.expand(*result.shape[:-1], *kept.shape[self.dim :])  # a context may have more batch dimensions
        result = result.unflatten(-1, moved.shape[self.dim :])
        return torch.cat([kept, result], self.dim), sum_last(log_slope)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map of the entries that are moved."""
        return self._apply_map(x, context, self.map.forward)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse map of the entries that are moved."""
        return self._apply_map(y, context, self.map.backward)


class ConditionalAffineCoupling(AffineCoupling):
    """`AffineCoupling` with a network that reads a context too, such as ``ConditionalDenseNN``."""

    def __init__(self, split_dim: int, hypernet: Net, *, context_dim: int | None = None, **kwargs: Any) -> None:
        others = getattr(hypernet, "input_dim", split_dim)
        context_dim = width_of_context(hypernet, context_dim, others)
        super().__init__(split_dim, hypernet, context_dim=context_dim, **kwargs)


class SplineCoupling(Coupling):
    """Pyro's class: the first coordinates steer the splines of the others, and pass through splines of their own.

    Args:
        input_dim: the number of coordinates.
        split_dim: how many of them steer.
        hypernet: such as ``DenseNN(split_dim, hidden_dims, [M * K, M * K, M * (K - 1), M * K])`` with
            ``M = input_dim - split_dim``, without the last for ``order="quadratic"``; ``None`` builds one.
        count_bins: the number of bins, K.
        bound: half the side of the box.
        order: ``"linear"`` or ``"quadratic"``.
        identity: whether the first coordinates are left as they are.
        context_dim: the width of the context; the network must read it as well.
        **network: options of `Coupling` for the network that is built.

    Example:
        >>> SplineCoupling(3, 1, None).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        input_dim: int,
        split_dim: int,
        hypernet: Net | None,
        count_bins: int = 8,
        bound: float = 3.0,
        order: str = "linear",
        identity: bool = False,
        *,
        context_dim: int = 0,
        **network: Any,
    ) -> None:
        map = RationalSpline(count_bins, bound, order)  # type: ignore[arg-type]
        if not 0 <= split_dim < input_dim:
            raise OptionError(f"split_dim must be in 0 .. {input_dim - 1}, got {split_dim}.")
        if hypernet is not None:
            network["net"] = PerCoordinate(hypernet, input_dim - split_dim, flat=True)
        mask = [i < split_dim for i in range(input_dim)]
        super().__init__(map, input_dim, context_dim=context_dim, mask=mask, **network)
        self.split_dim, self.identity = split_dim, identity or split_dim == 0
        options = {key: network[key] for key in ("hidden_dims", "activation") if key in network}
        self.lower = None if self.identity else Elementwise(map, split_dim, context_dim=context_dim, **options)

    def _with_lower(self, value: Tensor, context: Tensor | None, change: Any) -> tuple[Tensor, Tensor]:
        first, rest = value.split([self.split_dim, self.input_dim - self.split_dim], -1)
        first, log_det = change(first, context)
        return torch.cat([first, rest.expand(*first.shape[:-1], -1)], -1), log_det

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The splines of the others, then those of the first coordinates."""
        y, log_det = super().forward_and_log_det(x, context)
        if self.lower is None:
            return y, log_det
        y, lower = self._with_lower(y, context, self.lower.forward_and_log_det)
        return y, log_det + lower

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same backwards."""
        self.check_width(y, self.input_dim)
        if self.lower is None:
            return super().inverse_and_log_det(y, context)
        y, lower = self._with_lower(y, context, self.lower.inverse_and_log_det)
        x, log_det = super().inverse_and_log_det(y, context)
        return x, log_det + lower
