"""Activations without a kink, each with its slope."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, gelu, hardtanh, silu, softplus

from pyroflows.errors import OptionError
from pyroflows.nets.mlp import Activation, activation_module
from pyroflows.numerics import hutchinson

__all__ = ["Smooth", "smooth_softplus"]

LIMIT = 1e8
"""An argument beyond counts as this, so that no weight of ordinary size can overflow."""


def smooth_softplus(a: Tensor) -> Tensor:
    r""":math:`\log(1 + e^a)` in every dtype: torch's own is linear from 20 on, which is a jump in float64."""
    return softplus(a, 1.0, 40.0)


def _gelu_slope(a: Tensor, y: Tensor) -> Tensor:
    density = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a * math.sqrt(0.5))) + a * density


def _silu_slope(a: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return torch.addcmul(s, y, 1 - s)


_Curve = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
_BOUNDED: dict[str, _Curve] = {  # name: the function, and its slope at an argument where it has a value
    "tanh": (torch.tanh, lambda a, y: 1 - y * y),
    "sigmoid": (torch.sigmoid, lambda a, y: y * (1 - y)),
}
_GROWING: dict[str, _Curve] = {
    "elu": (elu, lambda a, y: torch.exp(a.clamp(max=0))),
    "gelu": (gelu, _gelu_slope),
    "silu": (silu, _silu_slope),
    "softplus": (smooth_softplus, lambda a, y: torch.sigmoid(a)),
}
_KINKED = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.PReLU, nn.RReLU, nn.Hardsigmoid, nn.Hardswish)


class Smooth(nn.Module):
    """An activation with its slope, constant from `LIMIT` on."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        module = activation_module(activation)
        if isinstance(module, _KINKED):
            raise OptionError(
                f"{type(module).__name__} has a kink, at which a solver loses its order and a divergence jumps. "
                f"Smooth ones: {', '.join(sorted(_BOUNDED | _GROWING))}."
            )
        known = ((name, activation_module(name)) for name in _BOUNDED | _GROWING)
        # A module says its options when it is printed; one with other options than the usual is its own.
        self.name = next(
            (name for name, each in known if repr(each) == repr(module) and type(each) is type(module)), ""
        )
        self.module = None if self.name else module

    def extra_repr(self) -> str:
        return self.name

    def forward(self, a: Tensor) -> Tensor:
        if self.name in _BOUNDED:
            return _BOUNDED[self.name][0](a)
        held = hardtanh(a, -LIMIT, LIMIT)
        return _GROWING[self.name][0](held) if self.module is None else self.module(held)

    def with_slope(self, a: Tensor) -> tuple[Tensor, Tensor]:
        if self.name in _BOUNDED:
            function, slope_of = _BOUNDED[self.name]
            y = function(a)
            return y, slope_of(a, y)
        if self.module is None:
            function, slope_of = _GROWING[self.name]
            held = hardtanh(a, -LIMIT, LIMIT)
            y = function(held)
            return y, slope_of(held, y) * (y < LIMIT)  # flat on the other side by itself
        linearised = hutchinson(self, a, torch.ones_like(a).unsqueeze(0))  # J'1 is the slope where units do not mix
        return linearised.value, linearised.products[0]  # type: ignore[index]
