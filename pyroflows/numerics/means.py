r"""Quasi-arithmetic means :math:`y = \psi^{-1}(\sum_h w_h \psi(c_h))` of increasing functions, stable at any size.

With :math:`\psi` a distribution function this is a mixture's distribution function put back on the real line: deep
sigmoidal flows (Huang, Krueger, Lacoste, Courville 2018, arXiv:1804.00779), Flow++ (Ho et al. 2019,
arXiv:1902.00275) and Gaussianization (Meng et al. 2020, arXiv:2003.01941) are such means of affine functions. The
mean lies between the smallest and the largest :math:`c_h`, wherever on the real line those are: probabilities
enter by the logarithms of both tails, and a slope is a sum of positive terms in which no two large numbers cancel.

Each function takes ``c`` ``[..., H]``, the logarithms of weights that sum to one and the logarithms of the slopes
:math:`dc_h/dx`, both broadcastable to it, and returns ``y`` and ``log dy/dx``, ``[...]`` each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import elu, log_softmax, logsigmoid

__all__ = ["elu_mean", "leaky_relu_mean", "logistic_mean", "normal_mean"]

LEAK = 0.01
"""The slope of the leaky rectifier below zero."""


def logistic_mean(c: Tensor, log_w: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi = 1 / (1 + e^{-c})`: the logit of a mixture of logistic distribution functions.

    With the shares :math:`p_h \propto w_h \sigma(c_h)` and :math:`q_h \propto w_h \sigma(-c_h)` the slope is
    :math:`\sum_h a_h (p_h \sigma(-c_h) + q_h \sigma(c_h))`.

    Args:
        c: the values ``[..., H]``.
        log_w: logarithms of weights.
        log_a: logarithms of slopes.

    Example:
        >>> c = torch.tensor([1e20, 2e20])
        >>> logistic_mean(c, torch.full((2,), -0.6931), torch.zeros(2))[0]
        tensor(1.0000e+20)
    """
    both = logsigmoid(torch.stack([c, -c]))  # of one tail and of the other
    terms = log_w + both
    tails = torch.logsumexp(terms, -1)
    log_slope = torch.logsumexp(log_a + log_softmax(terms, -1) + both.flip(0), (0, -1))
    return tails[0] - tails[1], log_slope


def elu_mean(c: Tensor, log_w: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi(c) = c` above zero and :math:`e^c - 1` below.

    Args:
        c: the values ``[..., H]``.
        log_w: logarithms of weights.
        log_a: logarithms of slopes.

    Example:
        >>> elu_mean(torch.tensor([2.0, 4.0]), torch.full((2,), -0.6931472), torch.zeros(2))[0]
        tensor(3.)
    """
    below = c.clamp(max=0)
    log_shifted = torch.where(c > 0, torch.log1p(c.clamp(min=0)), below)  # log(1 + psi)
    terms = log_w + log_shifted
    mean = (torch.exp(log_w) * elu(c)).sum(-1)
    y = torch.where(mean > 0, mean, torch.logsumexp(terms, -1))
    above_zero = torch.logsumexp(log_a + log_w + below, -1)
    below_zero = torch.logsumexp(log_a + log_softmax(terms, -1) + (below - log_shifted), -1)
    return y, torch.where(mean > 0, above_zero, below_zero)


def leaky_relu_mean(c: Tensor, log_w: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi(c) = c` above zero and :math:`c / 100` below.

    Args:
        c: the values ``[..., H]``.
        log_w: logarithms of weights.
        log_a: logarithms of slopes.

    Example:
        >>> leaky_relu_mean(torch.tensor([-2.0, -4.0]), torch.full((2,), -0.6931472), torch.zeros(2))[0]
        tensor(-3.)
    """
    log_slopes = torch.where(c > 0, torch.zeros_like(c), torch.full_like(c, math.log(LEAK)))
    mean = (torch.exp(log_w) * torch.where(c > 0, c, LEAK * c)).sum(-1)
    log_slope = torch.logsumexp(log_a + log_w + log_slopes, -1)
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


def normal_mean(c: Tensor, log_w: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi = \Phi`: the normal quantile of a mixture of normal distribution functions.

    Whichever tail is the smaller one is used. It is computed in float64 for every dtype, as the log-probabilities
    of a tail are squares: those of 1e20 do not fit into float32.

    Args:
        c: the values ``[..., H]``.
        log_w: logarithms of weights.
        log_a: logarithms of slopes.

    Example:
        >>> normal_mean(torch.tensor([-1e20, -2e20]), torch.full((2,), -0.6931), torch.zeros(2))[0]
        tensor(-1.0000e+20)
    """
    dtype, c, log_w, log_a = c.dtype, c.double(), log_w.double(), log_a.double()
    with torch.no_grad():
        upper = (torch.exp(log_w) * torch.special.ndtr(c)).sum(-1) > 0.5
    z = torch.where(upper.unsqueeze(-1), -c, c)
    terms = log_w + _log_ndtr(z)
    y = _normal_quantile(torch.logsumexp(terms, -1))
    log_slope = torch.logsumexp(log_a + log_softmax(terms, -1) + _log_hazard(z), -1) - _log_hazard(y)
    return torch.where(upper, -y, y).to(dtype), log_slope.to(dtype)
