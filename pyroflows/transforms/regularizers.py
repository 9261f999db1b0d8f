r"""What keeps the way of a continuous-time transform straight: integrals along it, for a loss to count.

Finlay, Jacobsen, Nurbekyan, Oberman (2020), *How to train your neural ODE*, arXiv:2002.02798; Kelly, Bettencourt,
Johnson, Duvenaud (2020), *Learning differential equations that are easy to solve*, arXiv:2007.04504; Onken, Wu Fung,
Li, Ruthotto (2021), *OT-Flow*, arXiv:2006.00104.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets import Velocity
from pyroflows.numerics import Trace, sum_last, total_derivative

__all__ = ["checked_weights", "gathered", "integrand", "is_number"]

NAMES = ("kinetic", "jacobian", "acceleration", "hjb")


def checked_weights(weights: Mapping[str, float], velocity: Velocity) -> dict[str, float]:
    """The weights of regularisers as numbers.

    Raises:
        OptionError: a name is unknown or not for this velocity, or a weight is negative or not finite.
    """
    if not isinstance(weights, Mapping):
        raise OptionError(f"regularize must give weights by name, such as {{'kinetic': 0.01}}, got {weights!r}.")
    for name, weight in weights.items():
        if name not in NAMES:
            raise OptionError(f"no regulariser {name!r}. Known names: {', '.join(NAMES)}.")
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise OptionError(f"the weight of a regulariser must be finite and not negative, got {name}={weight!r}.")
    if "hjb" in weights and not hasattr(velocity, "potential_by_time"):
        raise OptionError(f"hjb needs the gradient of a potential, got a {type(velocity).__name__}. Take kinetic.")
    return {name: float(weight) for name, weight in weights.items()}


def is_number(value: object) -> bool:
    """Whether it is a real number, which a truth value is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def gathered(each: Tensor | None, directions: int) -> Tensor:
    """Independent estimates from a number for each probe, ``[n, rows]``; the directions of Hutch++ count in all."""
    assert each is not None  # an estimate always has them
    known, guessed = each.tensor_split([directions])
    return known.sum(0) + guessed


def integrand(
    name: str,
    trace: Trace,
    directions: int,
    velocity: Velocity,
    t: Tensor | float,
    x: Tensor,
    context: Tensor | None,
) -> Tensor:
    """What is integrated over time for a regulariser, ``[rows]``.

    Args:
        name: of the regulariser.
        trace: the velocity and the trace of its Jacobian there.
        directions: how many of the trace's products are with directions of Hutch++.
        velocity: the field.
        t: the time, ``[rows, 1]``.
        x: the state, ``[rows, D]``.
        context: ``[rows, C]``.
    """
    if name == "kinetic":
        return _squared_length(trace.value)
    if name == "jacobian":
        if trace.samples is None:
            return trace.squared_norm
        assert trace.products is not None  # an estimate always has them
        return gathered(_squared_length(trace.products), directions).mean(0)
    if name == "hjb":
        by_time: Tensor = velocity.potential_by_time(t, x, context)  # type: ignore[operator]
        return (by_time - _squared_length(trace.value) / 2).abs()
    time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return _squared_length(total_derivative(lambda t, x: velocity(t, x, context).to(x.dtype), time, x)[1])


def _squared_length(vectors: Tensor) -> Tensor:
    return sum_last(vectors.to(torch.promote_types(vectors.dtype, torch.float32)).square())
