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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import elu, log_softmax, logsigmoid

from pyroflows.numerics.modes import is_plainly_eager

__all__ = ["elu_mean", "leaky_relu_mean", "logistic_mean", "normal_mean"]

LEAK = 0.01
"""The slope of the leaky rectifier below zero."""


class _Tail(NamedTuple):
    """A logistic mean, and what its derivatives are made of."""

    y: Tensor
    log_slope: Tensor
    sign: Tensor  # 1 where the lower tail is the smaller one, -1 where the upper is
    tail: Tensor  # the probability of that tail, at most about one half
    share: Tensor  # of each term in it
    slope_share: Tensor  # of each term in the slope
    past: Tensor  # sigma(-z), z being c or, for the upper tail, -c


def _logistic_tail(c: Tensor, log_w: Tensor, log_a: Tensor) -> _Tail:
    # All from the logarithm of the smaller tail; the other one is near 1, and log1p is exact there.
    with torch.no_grad():
        upper = (torch.exp(log_w) * torch.sigmoid(c)).sum(-1, keepdim=True) > 0.5
        sign = torch.where(upper, -torch.ones_like(c[..., :1]), 1.0)
    z = sign * c
    log_s = logsigmoid(z)
    log_past = log_s - z
    terms = log_w + log_s
    largest = terms.detach().amax(-1, keepdim=True)
    terms = terms - largest
    shares = torch.exp(terms)
    total = shares.sum(-1, keepdim=True)
    slopes = terms + log_past + log_a
    steepest = slopes.detach().amax(-1, keepdim=True)
    slopes = torch.exp(slopes - steepest)
    slope = slopes.sum(-1, keepdim=True)
    log_total = torch.log(total)
    log_tail = largest + log_total
    tail = torch.exp(log_tail)
    log_rest = torch.log1p(-tail)
    y = sign * (log_tail - log_rest)
    log_slope = steepest + torch.log(slope) - log_total - log_rest
    return _Tail(y.squeeze(-1), log_slope.squeeze(-1), sign, tail, shares / total, slopes / slope, torch.exp(log_past))


class _LogisticMean(torch.autograd.Function):
    """`logistic_mean` with written-out first derivatives; second ones go through the plain operations."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, log_w: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope, *rest = _logistic_tail(c, log_w, log_a)
        ctx.save_for_backward(c, log_w, log_a, *rest)
        return y, log_slope

    @staticmethod
    def backward(ctx: Any, by_y: Tensor, by_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        c, log_w, log_a, sign, tail, share, slope_share, past = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Aliases: c may itself depend on log_w or log_a, and that way is not ours to follow.
            inputs = [value.view_as(value) for value in (c, log_w, log_a)]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            outputs = _logistic_tail(*inputs)[:2]
            grads = torch.autograd.grad(outputs, [inputs[i] for i in wanted], (by_y, by_log_slope), create_graph=True)
            return tuple(dict(zip(wanted, grads, strict=True)).get(i) for i in range(3))
        by_y, by_log_slope = by_y.unsqueeze(-1), by_log_slope.unsqueeze(-1)
        by_log_tail = (sign * by_y - (1 - 2 * tail) * by_log_slope) / (1 - tail)
        by_share, by_slopes = share * by_log_tail, slope_share * by_log_slope
        by_c = sign * torch.addcmul(-by_slopes, past, by_share + 2 * by_slopes)
        by_log_w = (by_share + by_slopes).sum_to_size(log_w.shape)
        return by_c.sum_to_size(c.shape), by_log_w, by_slopes.sum_to_size(log_a.shape)


def logistic_mean(c: Tensor, log_w: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi = 1 / (1 + e^{-c})`: the logit of a mixture of logistic distribution functions.

    With :math:`P = \sum_h w_h \sigma(z_h)` the smaller tail (:math:`z = c` for the lower, :math:`-c` for the upper),
    :math:`y = \pm \operatorname{logit} P`, and with the shares :math:`p_h = w_h \sigma(z_h) / P` of the terms in it the
    slope is :math:`\sum_h a_h p_h \sigma(-z_h) / (1 - P)`.

    Args:
        c: the values ``[..., H]``.
        log_w: logarithms of weights.
        log_a: logarithms of slopes.

    Example:
        >>> c = torch.tensor([1e20, 2e20])
        >>> logistic_mean(c, torch.full((2,), -0.6931), torch.zeros(2))[0]
        tensor(1.0000e+20)
    """
    if is_plainly_eager():
        return _LogisticMean.apply(c, log_w, log_a)
    return _logistic_tail(c, log_w, log_a)[:2]


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
