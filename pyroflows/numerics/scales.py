"""Maps from any real number to a scale that stays finite and positive, one at zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["bounded_log_scale", "positive"]


def bounded_log_scale(raw: Tensor, bound: float) -> Tensor:
    r"""The logarithm of a scale, kept in :math:`(-b, b)` without a kink: :math:`b \tanh(r / b)`.

    Args:
        raw: any real numbers, any shape.
        bound: the largest absolute log scale :math:`b`.

    Example:
        >>> bounded_log_scale(torch.tensor([0.0, 200.0, -200.0]), bound=3.0)
        tensor([ 0.,  3., -3.])
    """
    return bound * torch.tanh(raw / bound)


def positive(raw: Tensor, floor: float = 1e-3) -> Tensor:
    r"""A positive number, one at zero: :math:`f + \log(1 + e^{r + c})` with :math:`c` such that 0 gives 1.

    Grows linearly where the exponential would overflow, and never falls below the floor :math:`f`.

    Args:
        raw: any real numbers, any shape.
        floor: the smallest value, in ``(0, 1)``.

    Example:
        >>> positive(torch.tensor([0.0, 200.0, -200.0]))
        tensor([1.0000e+00, 2.0054e+02, 1.0000e-03])
    """
    return floor + softplus(raw + math.log(math.expm1(1.0 - floor)))
