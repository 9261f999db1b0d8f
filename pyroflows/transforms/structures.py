"""Three ways to give a univariate map its parameters: elementwise, by coupling, autoregressively."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.nets import MADE, MLP, Activation
from pyroflows.numerics import sum_last
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.maps import UnivariateMap

__all__ = ["Autoregressive", "Coupling", "Elementwise"]


class _Mapped(FlowTransform):
    """A layer made of a univariate map."""

    sign = 1  # of a triangular Jacobian with a positive diagonal

    def __init__(self, map: UnivariateMap, input_dim: int, context_dim: int) -> None:
        super().__init__(context_dim)
        self.map, self.input_dim = map, input_dim
        self.inverse, self.vmaps, self.compiles = map.inverse, map.vmaps, map.compiles

    def extra_repr(self) -> str:
        """The map and the width."""
        return f"{type(self.map).__name__}, input_dim={self.input_dim}, context_dim={self.context_dim}"


class Elementwise(_Mapped):
    r"""Each coordinate through its own map: :math:`y_i = g(x_i; \theta_i(c))`.

    Args:
        map: the univariate map :math:`g`.
        input_dim: the number of coordinates.
        context_dim: the width of the context; with one, a network gives the parameters.
        hidden_dims: the hidden widths of that network.
        activation: its activation.
        event_dim: 1 for a density on vectors; 0 keeps the coordinates apart, as Pyro's ``Spline`` does, so
            that the log-det has the shape of ``x``.

    Raises:
        OptionError: ``event_dim`` is neither 0 nor 1.

    Example:
        >>> from pyroflows.transforms import Affine
        >>> Elementwise(Affine(), 2).forward_and_log_det(torch.ones(5, 2))[1].shape
        torch.Size([5])
    """

    def __init__(
        self,
        map: UnivariateMap,
        input_dim: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        event_dim: int = 1,
    ) -> None:
        super().__init__(map, input_dim, context_dim)
        if event_dim not in (0, 1):
            raise OptionError(f"event_dim must be 0 or 1, got {event_dim!r}.")
        if event_dim == 0:
            self.domain = self.codomain = constraints.real
        self.declare_parameters(hidden_dims=hidden_dims, activation=activation, raw=torch.zeros(input_dim, map.params))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map of each coordinate."""
        self.check_width(x, self.input_dim)
        y, log_slope = self.map.forward(x, self.parameters_of(context)["raw"])
        return y, sum_last(log_slope, self.domain.event_dim)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse map of each coordinate."""
        self.check_width(y, self.input_dim)
        x, log_slope = self.map.backward(y, self.parameters_of(context)["raw"])
        return x, sum_last(log_slope, self.domain.event_dim)


class Coupling(_Mapped):
    r"""Some coordinates steer the others: :math:`y_a = x_a`, :math:`y_b = g(x_b; \theta(x_a, c))`.

    Both directions are one pass of the network. With one coordinate only the context steers.

    Args:
        map: the univariate map :math:`g`.
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        mask: one boolean a coordinate, true for those that steer; default the first half.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether the network's hidden layers have skip connections.
        net: a network of the caller's in place of that one: ``net(kept, context)`` ``[*batch, moved * map.params]``,
            with ``None`` for what is not there.

    Raises:
        OptionError: the mask has another length, or leaves nothing to be moved.

    Example:
        >>> from pyroflows.transforms import Affine
        >>> layer = Coupling(Affine(), 3, mask=[True, False, True])
        >>> layer(torch.tensor([1.0, 2.0, 3.0]))[0::2].detach()
        tensor([1., 3.])
    """

    def __init__(
        self,
        map: UnivariateMap,
        input_dim: int,
        *,
        context_dim: int = 0,
        mask: Sequence[bool] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        residual: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(map, input_dim, context_dim)
        steers = [i < input_dim // 2 for i in range(input_dim)] if mask is None else [bool(m) for m in mask]
        if len(steers) != input_dim or all(steers):
            raise OptionError(f"mask must hold {input_dim} booleans, at least one of them False, got {steers}.")
        kept = [i for i, steer in enumerate(steers) if steer]
        moved = [i for i, steer in enumerate(steers) if not steer]
        self.register_buffer("kept", torch.tensor(kept, dtype=torch.long))
        self.register_buffer("moved", torch.tensor(moved, dtype=torch.long))
        self.register_buffer("back", torch.tensor(sorted(range(input_dim), key=(kept + moved).__getitem__)))
        self.net = net or MLP(
            len(kept),
            len(moved) * map.params,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
        )

    kept: Tensor
    moved: Tensor
    back: Tensor

    def _apply_map(self, value: Tensor, context: Tensor | None, direction: Any) -> tuple[Tensor, Tensor]:
        self.check_width(value, self.input_dim)
        self.check_context(context)
        kept, moved = value.index_select(-1, self.kept), value.index_select(-1, self.moved)
        params = self.net(kept if kept.shape[-1] else None, context if self.context_dim else None)
        params = params.to(value.dtype)  # under autocast the network's output has another
        result, log_slope = direction(moved, params.unflatten(-1, (-1, self.map.params)))
        kept = kept.expand(*result.shape[:-1], -1)  # a context may have more batch dimensions
        return torch.cat([kept, result], -1).index_select(-1, self.back), sum_last(log_slope)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map of the coordinates that are moved."""
        return self._apply_map(x, context, self.map.forward)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse map of the coordinates that are moved."""
        return self._apply_map(y, context, self.map.backward)


class Autoregressive(_Mapped):
    r"""Each coordinate steered by those before it: :math:`y_i = g(x_i; \theta_i(x_{<i}, c))`.

    Forward is one pass of a masked network; the inverse finds one coordinate a pass. So this layer samples
    fast (an inverse autoregressive flow: Kingma et al. 2016, arXiv:1606.04934) and its ``.inv`` scores fast (a
    masked autoregressive flow: Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).

    Args:
        map: the univariate map :math:`g`.
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        order: the rank of each coordinate, a permutation of ``0 .. input_dim - 1``; default as they come.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether the network's hidden layers have skip connections.
        net: a network of the caller's in place of that one: ``net(x, context)`` ``[*batch, input_dim, map.params]``,
            whose output for a coordinate must depend on those of lower rank alone.

    Raises:
        OptionError: ``order`` is not a permutation.

    Example:
        >>> from pyroflows.transforms import Affine
        >>> layer = Autoregressive(Affine(), 3, order=[2, 1, 0])
        >>> layer.inv(layer(torch.ones(3)))
        tensor([1., 1., 1.])
    """

    autoregressive = True

    def __init__(
        self,
        map: UnivariateMap,
        input_dim: int,
        *,
        context_dim: int = 0,
        order: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        residual: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(map, input_dim, context_dim)
        ranks = list(range(input_dim)) if order is None else [int(rank) for rank in order]
        self.net = net or MADE(
            input_dim,
            map.params,
            order=ranks,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
        )
        self.register_buffer("turn", torch.tensor(sorted(range(input_dim), key=ranks.__getitem__)))

    turn: Tensor  # which coordinate comes when

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass of the network."""
        self.check_width(x, self.input_dim)
        self.check_context(context)
        params = self.net(x, context if self.context_dim else None).to(x.dtype)
        y, log_slope = self.map.forward(x, params)
        return y, sum_last(log_slope)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``input_dim`` passes of the network, each of which finds one coordinate."""
        self.check_width(y, self.input_dim)
        self.check_context(context)
        context = context if self.context_dim else None
        x = torch.zeros_like(y)
        log_slopes = []
        coordinates = torch.arange(self.input_dim, device=y.device)
        for turn in self.turn.split(1):
            params = self.net(x, context).index_select(-2, turn).to(y.dtype)
            found, log_slope = self.map.backward(y.index_select(-1, turn), params)
            x = torch.where(coordinates == turn, found, x)
            log_slopes.append(log_slope)
        return x, sum_last(torch.cat(log_slopes, -1))
