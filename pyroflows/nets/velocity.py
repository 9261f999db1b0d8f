r"""Velocity fields :math:`v(t, x, c)` whose divergence is a closed form, and any other module as one.

The divergence of a network with two hidden layers is a bilinear form in the slopes of its units, so it costs as much
as an estimate, in any dimension. Ways for time to enter: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud (2019),
*FFJORD*, arXiv:1810.01367; Perez, Strub, de Vries, Dumoulin, Courville (2018), *FiLM*, arXiv:1709.07871.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, linear

from pyroflows.errors import ContextError, OptionError, ShapeError
from pyroflows.nets.mlp import Activation, check_widths, within_reach
from pyroflows.nets.smooth import Smooth
from pyroflows.numerics import Trace, exact_divergence, hutchinson, sum_last

__all__ = ["UserVelocity", "Velocity", "VelocityMLP", "as_velocity"]

REACH = 1e20
"""A coordinate beyond counts as this: every unit is saturated there, so that the Jacobian is that of the field."""
GAIN = 3.0
"""How much larger than torch's usual the weights of hidden layers start, so that the arguments of units of tanh spread
by about one in every layer. Without, a velocity is too smooth at first and learns fine structure late."""


class Velocity(nn.Module):
    r"""A velocity :math:`v(t, x, c)`: what a continuous-time flow follows. A subclass writes ``forward``.

    A subclass that knows its divergence in closed form writes `with_divergence` too; without, it is found by one
    product with the Jacobian a dimension.

    Args:
        input_dim: the number of coordinates of the state, :math:`D`.
        context_dim: the width of the context, 0 for none.

    Raises:
        OptionError: a width is not a number that counts.

    Example:
        >>> class Decay(Velocity):
        ...     def forward(self, t, x, context=None):
        ...         return -t * x
        >>> Decay(2).with_divergence(torch.tensor(3.0), torch.ones(5, 2))[1]
        tensor([-6., -6., -6., -6., -6.])
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        for name, width, least in (("input_dim", input_dim, 1), ("context_dim", context_dim, 0)):
            if not isinstance(width, int) or width < least:
                raise OptionError(f"{name} must be an integer of at least {least}, got {width!r}.")
        self.input_dim, self.context_dim = input_dim, context_dim

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity ``[*batch, D]``.

        Args:
            t: the time, ``[]`` for all rows or ``[*batch, 1]``.
            x: the state, ``[*batch, D]``.
            context: ``[*batch, C]``, broadcastable with the state's batch.

        Raises:
            ShapeError: the time or the state has another shape.
            ContextError: the context is missing, unexpected, or of another width.
        """
        raise NotImplementedError

    def with_divergence(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The velocity ``[*batch, D]`` and its divergence :math:`\sum_d \partial v_d / \partial x_d`, ``[*batch]``."""
        return self._by_products(t, x, context)[:2]

    def trace(self, t: Tensor | float, x: Tensor, context: Tensor | None = None, probes: Tensor | None = None) -> Trace:
        r"""The velocity, its exact divergence, and what the Frobenius norm of its Jacobian needs.

        Args:
            t: as in ``forward``.
            x: as in ``forward``.
            context: as in ``forward``.
            probes: random vectors ``[n, *batch, D]`` for an estimate of the norm. Without, the norm is known only where
                the divergence has no closed form, and then exactly.
        """
        if type(self).with_divergence is Velocity.with_divergence:
            return self._by_products(t, x, context)
        value, divergence = self.with_divergence(t, x, context)
        if probes is None:
            return Trace(value, divergence)
        x = x.expand(value.shape)
        estimate = hutchinson(lambda x: self(t, x, context).to(x.dtype), x, probes)
        return Trace(value, divergence, None, estimate.products, estimate.share)

    def _by_products(self, t: Tensor | float, x: Tensor, context: Tensor | None) -> Trace:
        self._check(t, x, context)
        batch = x.shape[:-1]
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
        if isinstance(t, Tensor) and t.dim():
            batch = torch.broadcast_shapes(batch, t.shape[:-1])
        # Under autocast the velocity has another dtype than the state.
        return exact_divergence(lambda x: self(t, x, context).to(x.dtype), x.expand(*batch, x.shape[-1]))

    def _check(self, t: Tensor | float, x: Tensor, context: Tensor | None) -> None:
        if x.dim() < 1 or x.shape[-1] != self.input_dim:
            raise ShapeError(f"expected a state [*batch, {self.input_dim}], got shape {tuple(x.shape)}.")
        if isinstance(t, Tensor) and t.dim() and t.shape[-1] != 1:
            raise ShapeError(f"expected a time of shape [] or [*batch, 1], got {tuple(t.shape)}.")
        if (0 if context is None else context.shape[-1]) != self.context_dim:
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ContextError(f"expected a context of width {self.context_dim}, got {got}.")


class Steering(nn.Module):
    """An affine function of time and context, one vector for each of several layers."""

    def __init__(self, sizes: Sequence[int], context_dim: int, fan_ins: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        total = sum(sizes)
        self.bias = nn.Parameter(torch.empty(total))
        self.time_weight = nn.Parameter(torch.empty(total))
        self.context_weight = nn.Parameter(torch.empty(total, context_dim)) if context_dim else None
        for parameter in self.parameters():
            for part, fan_in in zip(parameter.split(self.sizes), fan_ins, strict=True):
                uniform(part, fan_in, GAIN)

    def forward(self, t: Tensor | float, context: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        bias, time_weight = self.bias.to(dtype), self.time_weight.to(dtype)
        if isinstance(t, Tensor) and t.dim():
            out = torch.addcmul(bias, time_weight, t.to(dtype))
        else:  # a number, which may be on another device
            out = bias + t * time_weight
        if context is not None and self.context_weight is not None:
            weight, context = self.context_weight.to(dtype), within_reach(context.to(dtype))
            # Where all rows have one time, adding its part costs nothing.
            out = linear(context, weight, out) if out.dim() == 1 else linear(context, weight) + out
        return out.split(self.sizes, -1)


class _Pass(NamedTuple):
    """What one pass through the network leaves for its derivatives; gates that all rows share are in the weights."""

    value: Tensor
    weights: list[Tensor]
    gates: list[Tensor | None]
    slopes: list[Tensor]


class VelocityMLP(Velocity):
    r"""A multilayer perceptron with :math:`h_k = \phi(\gamma_k * W_k h_{k-1} + \beta_k)`, where time and context steer
    the layers, and a last layer :math:`v = W h + \beta`.

    The shifts :math:`\beta` are affine in :math:`(t, c)`. The gates :math:`\gamma` are 1 for ``conditioning="concat"``
    (what appending time and context to every layer's input comes to), :math:`\sigma(G (t, c) + g)` for
    ``"concatsquash"`` and :math:`1 + 2 \tanh(\frac{1}{2} (G (t, c) + g))` for ``"film"``. The last layer has a shift
    and no gate, so that the divergence stays a bilinear form in the slopes :math:`s_k = \gamma_k * \phi'_k`: with two
    hidden layers

    .. math:: \operatorname{tr} J = s_2^\top (W_2 * (W_1 W)^\top) s_1

    which one product of the network's own size evaluates. With one hidden layer it is linear in :math:`s_1`, and with
    three or more it takes a product for each dimension.

    The last layer starts at a hundredth of its usual size, so that a flow starts close to the identity. Units are held
    below 1e8.

    Args:
        input_dim: the number of coordinates of the state, :math:`D`.
        context_dim: the width of the context, 0 for none.
        hidden_dims: the widths of the hidden layers, one at least.
        activation: a smooth one: ``"tanh"``, ``"sigmoid"``, ``"softplus"``, ``"silu"``, ``"gelu"`` or ``"elu"``, or a
            module that acts on every number alone.
        conditioning: how time and context enter.
        residual: whether each hidden layer between the first and the last adds what it read, before the activation;
            all widths must then be equal.

    Raises:
        OptionError: a width is not positive, there is no hidden layer, the activation has a kink, the conditioning is
            unknown, or ``residual`` with unequal widths.

    Example:
        >>> velocity = VelocityMLP(2, context_dim=3, hidden_dims=(8, 8))
        >>> v, divergence = velocity.with_divergence(torch.tensor(0.5), torch.zeros(5, 2), torch.zeros(5, 3))
        >>> v.shape, divergence.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "tanh",
        conditioning: Literal["concat", "concatsquash", "film"] = "concat",
        residual: bool = False,
    ) -> None:
        super().__init__(input_dim, context_dim)
        hidden_dims = check_widths(hidden_dims)
        if not hidden_dims:
            raise OptionError("hidden_dims must name one hidden layer at least, got none.")
        if residual and len(set(hidden_dims)) > 1:
            raise OptionError(f"residual=True needs equal hidden_dims, got {hidden_dims}.")
        if conditioning not in ("concat", "concatsquash", "film"):
            raise OptionError(f"no conditioning {conditioning!r}. Known names: concat, concatsquash, film.")
        self.conditioning, self.residual = conditioning, residual
        self.activation = Smooth(activation)
        inputs, outputs = (input_dim, *hidden_dims), (*hidden_dims, input_dim)
        self.weights = nn.ParameterList(torch.empty(m, n) for m, n in zip(outputs, inputs, strict=True))
        fan_ins = [n + 1 + context_dim for n in inputs]
        for weight, fan_in in zip(self.weights, fan_ins, strict=True):
            uniform(weight, fan_in, GAIN)
        gated = conditioning != "concat"
        self.steering = Steering(
            (*outputs, *(sum(hidden_dims),) * gated), context_dim, (*fan_ins, *(1 + context_dim,) * gated)
        )
        with torch.no_grad():
            self.weights[-1].mul_(0.01 / GAIN)
            for name, parameter in self.steering.named_parameters():
                parameter.split(self.steering.sizes)[len(hidden_dims)].mul_(0.0 if name == "bias" else 0.01 / GAIN)

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, x, context, slopes=False).value.to(x.dtype)

    def with_divergence(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = self._run(t, x, context, slopes=True)
        return run.value.to(x.dtype), self._divergence(run)

    def trace(self, t: Tensor | float, x: Tensor, context: Tensor | None = None, probes: Tensor | None = None) -> Trace:
        run = self._run(t, x, context, slopes=True)
        value, divergence = run.value.to(x.dtype), self._divergence(run)
        if probes is None:
            return Trace(value, divergence)
        return Trace(value, divergence, None, self._pulled(run, probes), 1 / len(probes))

    def _run(self, t: Tensor | float, x: Tensor, context: Tensor | None, *, slopes: bool) -> _Pass:
        self._check(t, x, context)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = [weight.to(dtype) for weight in self.weights]
        layers = len(weights) - 1
        *shifts, last_shift = self.steering(t, context, dtype)
        gates: list[Tensor | None] = [None] * layers
        if self.conditioning != "concat":
            raw, last_shift = last_shift, shifts.pop()
            squashed = torch.sigmoid(raw) if self.conditioning == "concatsquash" else 1 + 2 * torch.tanh(raw / 2)
            for k, gate in enumerate(squashed.split([len(weight) for weight in weights[:-1]], -1)):
                if gate.dim() == 1:
                    weights[k] = gate.unsqueeze(-1) * weights[k]
                else:
                    gates[k] = gate
        run = _Pass(x, weights, gates, [])
        hidden = hardtanh(x.to(dtype), -REACH, REACH)
        before = None
        for k in range(layers):
            before = _layer(hidden, weights[k], gates[k], shifts[k], before if self.residual else None)
            if slopes:
                hidden, slope = self.activation.with_slope(before)
                run.slopes.append(slope)
            else:
                hidden = self.activation(before)
        return run._replace(value=_layer(hidden, weights[-1], None, last_shift, None))

    def _divergence(self, run: _Pass) -> Tensor:
        first, *middle, last = run.weights
        slopes, gates = run.slopes, run.gates
        if not middle:
            return sum_last(_times(slopes[0], gates[0]) * (first * last.mT).sum(-1))
        if len(middle) == 1:
            around = (first @ last).mT
            straight = around.diagonal() if self.residual else None
            if gates[0] is None and gates[1] is None:
                return sum_last(linear(slopes[0], middle[0] * around, straight) * slopes[1])
            inner = _times(linear(_times(slopes[0], gates[0]), middle[0] * around), gates[1])
            return sum_last((inner if straight is None else inner + _times(straight, gates[0])) * slopes[1])
        # Row d: how the hidden layer, before its activation, moves with coordinate d.
        moves = _times(first.mT, None if gates[0] is None else gates[0].unsqueeze(-2))
        for weight, slope, gate in zip(middle, slopes, gates[1:], strict=False):
            moved = linear(moves * slope.unsqueeze(-2), weight)
            moved = _times(moved, None if gate is None else gate.unsqueeze(-2))
            moves = moves + moved if self.residual else moved
        return sum_last((moves * last).sum(-2) * slopes[-1])

    def _pulled(self, run: _Pass, probes: Tensor) -> Tensor:
        """The products of the transposed Jacobian with vectors ``[n, *batch, D]``."""
        first, *middle, last = run.weights
        back = (probes.to(last.dtype) @ last) * run.slopes[-1]
        for k in range(len(middle), 0, -1):
            through = (_times(back, run.gates[k]) @ middle[k - 1]) * run.slopes[k - 1]
            back = back + through if self.residual else through
        return _times(back, run.gates[0]) @ first


class UserVelocity(Velocity):
    r"""Any module ``net(t, x)``, or ``net(t, x, context)``, as a velocity.

    Its divergence is the module's own ``with_divergence``, if it has one with the same arguments, or found by one
    product with the Jacobian a dimension.

    Args:
        net: gives the velocity ``[*batch, D]`` of a time ``[]`` or ``[*batch, 1]`` and a state ``[*batch, D]``, each
            row for itself, and of a context if it has a width.
        input_dim: the number of coordinates of the state, :math:`D`.
        context_dim: the width of the context, 0 for none.

    Raises:
        OptionError: ``net`` is not a module.

    Example:
        >>> class Net(nn.Linear):
        ...     def forward(self, t, x):
        ...         return t * super().forward(x)
        >>> velocity = UserVelocity(Net(2, 2), 2)
        >>> v, divergence = velocity.with_divergence(torch.tensor(3.0), torch.zeros(5, 2))
        >>> torch.allclose(divergence, 3 * velocity.net.weight.trace())
        True
    """

    def __init__(self, net: nn.Module, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        if not isinstance(net, nn.Module):
            raise OptionError(f"a velocity must be an nn.Module, got {type(net).__name__}.")
        self.net = net

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(t, x, context)
        value = self.net(t, x) if context is None else self.net(t, x, context)
        if not isinstance(value, Tensor):
            raise ShapeError(f"expected a velocity [*batch, {self.input_dim}], got {type(value).__name__}.")
        if value.shape[-1:] != x.shape[-1:]:
            raise ShapeError(f"expected a velocity [*batch, {self.input_dim}], got shape {tuple(value.shape)}.")
        return value

    def with_divergence(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        own = getattr(self.net, "with_divergence", None)
        if own is None:
            return super().with_divergence(t, x, context)
        self._check(t, x, context)
        return own(t, x) if context is None else own(t, x, context)

    def trace(self, t: Tensor | float, x: Tensor, context: Tensor | None = None, probes: Tensor | None = None) -> Trace:
        if hasattr(self.net, "with_divergence"):
            return super().trace(t, x, context, probes)
        return self._by_products(t, x, context)


def as_velocity(net: nn.Module, input_dim: int, context_dim: int = 0) -> Velocity:
    """The module itself if it is a velocity of these widths, or what makes it one.

    Args:
        net: a `Velocity`, or a module as `UserVelocity` takes it.
        input_dim: the number of coordinates of the state.
        context_dim: the width of the context, 0 for none.

    Raises:
        OptionError: ``net`` is a velocity of other widths, or no module.

    Example:
        >>> as_velocity(VelocityMLP(3), 3).input_dim
        3
    """
    if not isinstance(net, Velocity):
        return UserVelocity(net, input_dim, context_dim)
    if (net.input_dim, net.context_dim) != (input_dim, context_dim):
        raise OptionError(
            f"expected a velocity with input_dim={input_dim} and context_dim={context_dim}, "
            f"got input_dim={net.input_dim} and context_dim={net.context_dim}."
        )
    return net


def _layer(hidden: Tensor, weight: Tensor, gate: Tensor | None, shift: Tensor, straight: Tensor | None) -> Tensor:
    if gate is not None:
        out = torch.addcmul(shift, gate, linear(hidden, weight))
    elif shift.dim() == 1:
        out = linear(hidden, weight, shift)
    else:
        out = linear(hidden, weight) + shift
    return out if straight is None else out + straight


def _times(value: Tensor, gate: Tensor | None) -> Tensor:
    return value if gate is None else value * gate


def uniform(tensor: Tensor, fan_in: int, gain: float = 1.0) -> Tensor:
    """The tensor, filled with random numbers of mean zero and a standard deviation of ``gain / sqrt(3 fan_in)``."""
    with torch.no_grad():
        return tensor.uniform_(-gain / math.sqrt(fan_in), gain / math.sqrt(fan_in))
