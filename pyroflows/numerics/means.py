r"""Quasi-arithmetic means :math:`y = \psi^{-1}(\sum_h w_h \psi(c_h))` of increasing functions, stable at any size.

With :math:`\psi` a distribution function this is a mixture's distribution function put back on the real line: deep
sigmoidal flows (Huang, Krueger, Lacoste, Courville 2018, arXiv:1804.00779; `logistic_mean` is in a file of its own) and
Gaussianization (Meng et al. 2020, arXiv:2003.01941) are such means of affine functions. The mean lies between the
smallest and the largest :math:`c_h`, wherever on the real line those are: probabilities enter by the logarithms of
both tails, and a slope is a sum of positive terms in which no two large numbers cancel.

Each function takes ``c`` ``[..., H]``, positive weights that sum to one and the slopes :math:`dc_h/dx`, both
broadcastable to it, and returns ``y`` and ``log dy/dx``, ``[...]`` each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import elu, log_softmax

__all__ = ["elu_mean", "leaky_relu_mean", "normal_mean"]

LEAK = 0.01
"""The slope of the leaky rectifier below zero."""


def elu_mean(c: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi(c) = c` above zero and :math:`e^c - 1` below.

    Args:
        c: the values ``[..., H]``.
        w: weights.
        v: slopes.

    Example:
        >>> elu_mean(torch.tensor([2.0, 4.0]), torch.full((2,), 0.5), torch.ones(2))[0]
        tensor(3.)
    """
    below, log_w, log_v = c.clamp(max=0), torch.log(w), torch.log(v)
    log_shifted = torch.where(c > 0, torch.log1p(c.clamp(min=0)), below)  # log(1 + psi)
    terms = log_w + log_shifted
    mean = (w * elu(c)).sum(-1)
    y = torch.where(mean > 0, mean, torch.logsumexp(terms, -1))
    above_zero = torch.logsumexp(log_v + log_w + below, -1)
    below_zero = torch.logsumexp(log_v + log_softmax(terms, -1) + (below - log_shifted), -1)
    return y, torch.where(mean > 0, above_zero, below_zero)


def leaky_relu_mean(c: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi(c) = c` above zero and :math:`c / 100` below.

    Args:
        c: the values ``[..., H]``.
        w: weights.
        v: slopes.

    Example:
        >>> leaky_relu_mean(torch.tensor([-2.0, -4.0]), torch.full((2,), 0.5), torch.ones(2))[0]
        tensor(-3.)
    """
    mean = (w * torch.where(c > 0, c, LEAK * c)).sum(-1)
    log_slope = torch.log((w * v * torch.where(c > 0, torch.ones_like(c), LEAK)).sum(-1))
    above = mean > 0
    return torch.where(above, mean, mean / LEAK), torch.where(above, log_slope, log_slope - math.log(LEAK))


def _log_ndtr(z: Tensor) -> Tensor:
    """The log of the normal distribution function, whose second derivatives are finite too."""
    below, above = z.clamp(max=0), z.clamp(min=0)
    left = torch.log(torch.special.erfcx(-below / math.sqrt(2)) / 2) - below.square() / 2
    return torch.where(z > 0, torch.log1p(-torch.erfc(above / math.sqrt(2)) / 2), left)


def _log_hazard(z: Tensor) -> Tensor:
    """The derivative of `_log_ndtr`, as a logarithm: about ``log |z|`` far below zero, and there nothing cancels."""
    below, above = z.clamp(max=0), z.clamp(min=0)
    left = math.log(2 / math.pi) / 2 - torch.log(torch.special.erfcx(-below / math.sqrt(2)))
    right = -above.square() / 2 - math.log(2 * math.pi) / 2 - _log_ndtr(above)
    return torch.where(z > 0, right, left)


def _normal_quantile(log_p: Tensor) -> Tensor:
    """The normal quantile of a probability up to about one half, given by its logarithm."""
    with torch.no_grad():
        far = (-2 * log_p).clamp(min=16.0)
        far = -torch.sqrt(far - torch.log(2 * math.pi * far))
        z = torch.where(log_p > -8, torch.special.ndtri(torch.exp(log_p.clamp(min=-9.0))), far)
        for _ in range(4):
            z = z + (log_p - _log_ndtr(z)) * torch.exp(-_log_hazard(z))
    for _ in range(2):  # change no digit, but carry the first and second derivatives
        step = (log_p - _log_ndtr(z)) * torch.exp(-_log_hazard(z))
        z = z + (step - step.detach())
    return z


def normal_mean(c: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi = \Phi`: the normal quantile of a mixture of normal distribution functions.

    Whichever tail is the smaller one is used. It is computed in float64 for every dtype, as the log-probabilities
    of a tail are squares: those of 1e20 do not fit into float32.

    Args:
        c: the values ``[..., H]``.
        w: weights.
        v: slopes.

    Example:
        >>> normal_mean(torch.tensor([-1e20, -2e20]), torch.full((2,), 0.5), torch.ones(2))[0]
        tensor(-1.0000e+20)
    """
    dtype, c, w, v = c.dtype, c.double(), w.double(), v.double()
    with torch.no_grad():
        upper = (w * torch.special.ndtr(c)).sum(-1) > 0.5
    z = torch.where(upper.unsqueeze(-1), -c, c)
    terms = torch.log(w) + _log_ndtr(z)
    y = _normal_quantile(torch.logsumexp(terms, -1))
    log_slope = torch.logsumexp(torch.log(v) + log_softmax(terms, -1) + _log_hazard(z), -1) - _log_hazard(y)
    return torch.where(upper, -y, y).to(dtype), log_slope.to(dtype)
