r"""Block neural autoregressive flows: one network of all coordinates, increasing in each, with a true inverse.

De Cao, Titov, Aziz (2019), *Block neural autoregressive flow*, arXiv:1904.04676.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, softplus

from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.nets.made import check_order
from pyroflows.numerics import monotone_root, positive, sum_last
from pyroflows.transforms.base import FlowTransform

__all__ = ["BlockAutoregressive"]

LEAK = 0.01
"""The smallest slope of an activation, torch's for ``LeakyReLU``: so no unit saturates, and the range is the line."""

FLOOR = 0.1
"""The smallest gain, and weight within a block, beside 1 at the start: two flat layers in turn still fit float32."""

_SMALL = 2.0**-20  # sums of products are taken of numbers this much smaller, so that they cannot overflow


def _activate(name: str, s: Tensor) -> tuple[Tensor, Tensor]:
    """The activation with its leak, and its slope, which lies in ``[LEAK, 1]``."""
    if name == "tanh":
        h = torch.tanh(s)
        slope = (1 - h) * (1 + h)
    elif name == "sigmoid":
        h = torch.sigmoid(s)
        slope = h * torch.sigmoid(-s)
    else:
        left = s.clamp_max(0)
        bent = torch.expm1(left) if name == "ELU" else torch.zeros_like(s)
        h = s.clamp_min(0) + bent
        slope = torch.where(s > 0, torch.ones_like(s), torch.exp(left) if name == "ELU" else torch.zeros_like(s))
    return (1 - LEAK) * h + LEAK * s, (1 - LEAK) * slope + LEAK


class _Layer(NamedTuple):
    """One layer of the network: ``gain * (own and earlier units, weighed) + bias``, for ``K`` blocks."""

    own: Tensor  # [K, out, in], positive
    earlier: Tensor  # [K * out, K * in], zero unless the unit below belongs to an earlier coordinate
    gain: Tensor  # [*batch, K, out], positive
    bias: Tensor  # [*batch, K, out]


class BlockAutoregressive(FlowTransform):
    r"""A network with a block of units for each coordinate: :math:`y = W_n\, \sigma(\cdots \sigma(W_1 x + b_1)) + b_n`.

    The block of :math:`x_i` reads the blocks of :math:`x_{<i}` with any weights and itself with positive ones, so
    :math:`y_i` increases in :math:`x_i`, with the slope
    :math:`(W_n)_{ii} \operatorname{diag}(\sigma') \cdots (W_1)_{ii}`, a product of positive matrices that is kept
    scaled, so that its logarithm never underflows.

    A bounded :math:`\sigma` would bound :math:`y`, and no point outside would have an inverse. So each activation
    leaks: :math:`\sigma(s) = (1 - \epsilon)\, h(s) + \epsilon s` with :math:`\epsilon = 0.01`, which maps onto the
    whole line and, for :math:`h = \max(0, \cdot)`, is ``LeakyReLU`` itself. The inverse finds one coordinate after
    another, each the root of one increasing equation; only the units of that coordinate are computed again.

    With a context, a network gives the gain and the bias of every unit. It starts near the identity.

    Args:
        input_dim: the number of coordinates.
        hidden_factors: how many units a coordinate has in each hidden layer.
        activation: :math:`h`: ``"tanh"``, ``"sigmoid"``, ``"ELU"`` or ``"LeakyReLU"``.
        residual: ``None``: :math:`y = f(x)`, the network; ``"normal"``: :math:`y = x + f(x)`; ``"gated"``:
            :math:`y = g x + (1 - g) f(x)` with a learned :math:`g \in (0, 1)`.
        context_dim: the width of the context.
        order: the rank of each coordinate, a permutation of ``0 .. input_dim - 1``; default as they come.
        hidden_dims: the hidden widths of the network that reads the context.
        context_activation: its activation.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> layer = BlockAutoregressive(3)
        >>> layer.inv(torch.tensor([10.0, -20.0, 30.0])).shape
        torch.Size([3])
    """

    sign = 1
    autoregressive = True
    inverse = "numeric"
    sequential = (False, True)
    vmaps = False
    compiles = False
    turn: Tensor
    back: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_factors: Sequence[int] = (8, 8),
        activation: str = "tanh",
        residual: Literal["normal", "gated"] | None = None,
        *,
        context_dim: int = 0,
        order: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        context_activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        ranks = check_order(order, input_dim)
        if any(not isinstance(width, int) or width < 1 for width in hidden_factors):
            raise OptionError(f"hidden_factors must be positive integers, got {tuple(hidden_factors)}.")
        if activation not in ("tanh", "sigmoid", "ELU", "LeakyReLU"):
            raise OptionError(f'activation must be "tanh", "sigmoid", "ELU" or "LeakyReLU", got {activation!r}.')
        if residual not in (None, "normal", "gated"):
            raise OptionError(f'residual must be None, "normal" or "gated", got {residual!r}.')
        self.input_dim, self.activation, self.residual = input_dim, activation, residual
        self.register_buffer("turn", torch.tensor(sorted(range(input_dim), key=ranks.__getitem__)))
        self.register_buffer("back", torch.tensor(ranks))
        self.widths = (1, *hidden_factors, 1)
        self.own, self.earlier = nn.ParameterList(), nn.ParameterList()
        for n, (below, above) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            self.own.append(nn.Parameter(0.3 * torch.randn(input_dim, above, below)))
            self.earlier.append(nn.Parameter(torch.zeros(input_dim * above, input_dim * below)))
            block = torch.arange(input_dim)
            mask = block.repeat_interleave(above)[:, None] > block.repeat_interleave(below)
            self.register_buffer(f"mask{n}", mask.to(self.earlier[-1]), persistent=False)
        self.scales, biases = self._starting_point()
        gains = {f"gain{n}": torch.zeros(input_dim * width) for n, width in enumerate(self.widths[1:])}
        gate = {"gate": torch.zeros(1)} if residual == "gated" else {}
        self.declare_parameters(hidden_dims=hidden_dims, activation=context_activation, **gains, **biases, **gate)

    def _starting_point(self) -> tuple[list[float], dict[str, Tensor]]:
        """Gains and biases that spread the units over [-3, 3] and make their mean about the identity."""
        reach = 3.0 if self.activation == "sigmoid" else 1.5
        centre, slope = 0.0, 1.0  # what a layer receives is about centre + slope * x
        scales, biases = [], {}
        for n, width in enumerate(self.widths[1:-1]):
            spread = reach * (torch.arange(width) * 2 + 1 - width) / width
            if self.activation in ("ELU", "LeakyReLU"):
                spread = spread + reach  # most units on the side where they are not flat
            scales.append(reach / 3 / slope)
            biases[f"bias{n}"] = (spread - scales[-1] * centre).repeat(self.input_dim)
            low, high = (float(_activate(self.activation, spread + s)[0].mean()) for s in (-reach / 3, reach / 3))
            centre, slope = (low + high) / 2, (high - low) / 2
        scales.append((0.1 if self.residual == "normal" else 1.0) / slope)
        biases[f"bias{len(scales) - 1}"] = torch.full((self.input_dim,), -scales[-1] * centre)
        return scales, biases

    def extra_repr(self) -> str:
        """The sizes and options."""
        options = f"hidden_factors={self.widths[1:-1]}, activation={self.activation!r}, residual={self.residual!r}"
        return f"input_dim={self.input_dim}, {options}, context_dim={self.context_dim}"

    def _layers(self, context: Tensor | None, dtype: torch.dtype) -> tuple[list[_Layer], Tensor | None]:
        raw = {name: value.to(dtype) for name, value in self.parameters_of(context).items()}
        layers = []
        for n, below in enumerate(self.widths[:-1]):
            own, earlier = self.own[n].to(dtype), self.earlier[n].to(dtype)
            layers.append(
                _Layer(
                    positive(own, FLOOR) / below,
                    earlier * self.get_buffer(f"mask{n}") / (below * self.input_dim) ** 0.5,
                    (self.scales[n] * positive(raw[f"gain{n}"], FLOOR)).unflatten(-1, (self.input_dim, -1)),
                    raw[f"bias{n}"].unflatten(-1, (self.input_dim, -1)),
                )
            )
        return layers, raw.get("gate")

    def _rise(
        self, x: Tensor, layers: list[_Layer], gate: Tensor | None, steer: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The blocks of ``K`` coordinates: ``y`` and ``log dy/dx`` ``[*batch, K]``, and what every layer read.

        ``steer`` gives what the earlier coordinates add to a layer ``[*batch, K, out]``, in units of ``1 / _SMALL``.
        """
        largest = torch.finfo(x.dtype).max
        z = x.unsqueeze(-1)
        slope, log_scale = torch.ones_like(z), torch.zeros_like(x)  # the slope of z is slope * exp(log_scale)
        read = []
        for n, layer in enumerate(layers):
            read.append(z)
            small = z * _SMALL
            both = torch.einsum("koi,...kit->...kot", layer.own, torch.stack((small, slope), -1))
            s = torch.addcmul(layer.bias, layer.gain, both[..., 0] + steer(n, small), value=1 / _SMALL)
            z = s.clamp(-largest, largest)  # an infinite pre-activation is as good as the largest number
            slope = layer.gain * both[..., 1]
            if n < len(layers) - 1:
                z, rise = _activate(self.activation, z)
                slope = slope * rise
            if 0 < n < len(layers) - 1:
                top = slope.detach().amax(-1, keepdim=True)
                slope, log_scale = slope / top, log_scale + torch.log(top).squeeze(-1)
        y, log_slope = self._past(x, z.squeeze(-1), log_scale + torch.log(slope).squeeze(-1), gate)
        return y, log_slope, read

    def _past(self, x: Tensor, y: Tensor, log_slope: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's value and log-slope after the residual connection."""
        if self.residual == "normal":
            return x + y, softplus(log_slope)
        if gate is None:
            return y, log_slope
        slope = torch.logaddexp(logsigmoid(gate).expand_as(log_slope), logsigmoid(-gate) + log_slope)
        return torch.sigmoid(gate) * x + torch.sigmoid(-gate) * y, slope

    def _bracket(self, y: Tensor, at_zero: Tensor, layers: list[_Layer], gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the root must lie: an activation's slope is in ``[LEAK, 1]``, so that of the network has bounds."""
        steepest = torch.ones_like(layers[0].gain[..., :1])
        log_scale = torch.zeros_like(y)
        for layer in layers:
            steepest = layer.gain * torch.einsum("koi,...ki->...ko", layer.own, steepest)
            top = steepest.amax(-1, keepdim=True)
            steepest, log_scale = steepest / top, log_scale + torch.log(top).squeeze(-1)
        flattest = log_scale + (len(layers) - 1) * math.log(LEAK)
        gap = y - at_zero
        ends = [gap * torch.exp(-self._past(y, y, slope, gate)[1]) for slope in (log_scale, flattest)]
        return (
            torch.minimum(*ends).nan_to_num(-torch.inf, torch.inf, -torch.inf),
            torch.maximum(*ends).nan_to_num(torch.inf, torch.inf, -torch.inf),
        )

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass of the network."""
        self.check_width(x, self.input_dim)
        dtype = torch.promote_types(x.dtype, torch.float32)
        layers, gate = self._layers(context, dtype)

        def steer(n: int, small: Tensor) -> Tensor:
            return linear(small.flatten(-2), layers[n].earlier).unflatten(-1, (self.input_dim, -1))

        y, log_slope, _ = self._rise(x.to(dtype).index_select(-1, self.turn), layers, gate, steer)
        return y.index_select(-1, self.back).to(x.dtype), sum_last(log_slope)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One root after another, differentiable.

        Raises:
            InverseNotConverged: a parameter is NaN.
        """
        self.check_width(y, self.input_dim)
        dtype = torch.promote_types(y.dtype, torch.float32)
        layers, gate = self._layers(context, dtype)
        batch = torch.broadcast_shapes(y.shape[:-1], layers[0].gain.shape[:-2])
        targets = y.to(dtype).expand(*batch, -1).index_select(-1, self.turn)
        known = [targets.new_zeros(*batch, 0) for _ in layers]  # what each layer read of the coordinates found so far
        found, log_slopes = [], []
        for i, target in enumerate(targets.split(1, -1)):
            blocks, steering = [], []
            for (own, earlier, gain, bias), z in zip(layers, known, strict=True):
                out = own.shape[1]
                rows = earlier[i * out : (i + 1) * out, : z.shape[-1]]
                blocks.append(_Layer(own[i : i + 1], rows, gain[..., i : i + 1, :], bias[..., i : i + 1, :]))
                steering.append(linear(z * _SMALL, rows).unsqueeze(-2))

            def along(
                x: Tensor, blocks: list[_Layer] = blocks, steering: list[Tensor] = steering
            ) -> tuple[Tensor, Tensor]:
                return self._rise(x, blocks, gate, lambda n, _: steering[n])[:2]

            with torch.no_grad():
                low, high = self._bracket(target, along(torch.zeros_like(target))[0], blocks, gate)
            # Terms of the order of one are added up, so a value has no digits below some eps (1 + |y|).
            start = torch.minimum(torch.maximum(target, low), high)
            tol = 32 * torch.finfo(dtype).eps
            root = monotone_root(along, target, start=start, bracket=(low, high), tol=tol)
            found.append(root.x)
            log_slopes.append(root.log_slope)
            _, _, read = self._rise(root.x, blocks, gate, lambda n, _, steering=steering: steering[n])  # type: ignore[misc]
            known = [torch.cat((z, new.squeeze(-2)), -1) for z, new in zip(known, read, strict=True)]
        x = torch.cat(found, -1).index_select(-1, self.back)
        return x.to(y.dtype), -sum_last(torch.cat(log_slopes, -1))
