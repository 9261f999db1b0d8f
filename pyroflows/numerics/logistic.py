r"""The logit of a mixture of logistic distribution functions, :math:`\operatorname{logit}(\sum_h w_h \sigma(c_h))`.

What deep sigmoidal flows (Huang, Krueger, Lacoste, Courville 2018, arXiv:1804.00779) and Flow++ (Ho et al. 2019,
arXiv:1902.00275) are made of. Where a compiler or a second derivative watches the operations, and in half precision,
they are sums of logarithms. Otherwise first derivatives are written out, and the terms are probabilities, with one
logarithm a mixture. So that these do not vanish, a mixture all of whose :math:`|c_h|` are large is computed that much
nearer to zero: there :math:`\sigma(-|c|) = e^{-|c|}` to the last digit, and the distance is a factor common to all
terms.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus, threshold

from pyroflows.numerics.derivatives import gradients_with_graph
from pyroflows.numerics.modes import is_differentiated, is_plainly_eager

__all__ = ["deep_sigmoid", "logistic_mean", "mixture_parameters", "mixture_weights"]

FAR = {torch.float32: 40.0, torch.float64: 80.0}
"""Beyond this 1 + exp(-c) is 1, and exp(-c) is nothing beside the least weight."""
LEAST_WEIGHT = 1e-6
"""The share of a mixture that is the same for all its terms: no weight underflows."""
LEAST_SLOPE = 1e-3
"""The smallest slope of a term, where that of a raw zero is one."""
UNIT_SLOPE = math.log(math.expm1(1 - LEAST_SLOPE))
"""Added to a raw slope, so that zero gives one."""


def _within(c: Tensor) -> Tensor:
    """Infinite values as the largest number: beyond the range nothing is asked for but not to be NaN."""
    largest = torch.finfo(c.dtype).max
    return c.clamp(-largest, largest)


def _by_logarithms(c: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All from the logarithm of the smaller tail; the other one is near 1, and log1p is exact there."""
    c, log_w = _within(c), torch.log(w)
    with torch.no_grad():
        upper = (w * torch.sigmoid(c)).sum(-1, keepdim=True) > 0.5
        sign = torch.where(upper, -torch.ones_like(c[..., :1]), 1.0)
    z = sign * c
    log_s = logsigmoid(z)
    terms = log_w + log_s
    log_tail = torch.logsumexp(terms, -1)
    log_rest = torch.log1p(-torch.exp(log_tail))
    slopes = terms - log_tail.unsqueeze(-1) + (log_s - z) + torch.log(v)
    return sign.squeeze(-1) * (log_tail - log_rest), torch.logsumexp(slopes, -1) - log_rest


class _Sums(NamedTuple):
    """One number a mixture."""

    lower: Tensor  # of w sigma(c) over the terms, like all sums with the values moved towards zero
    upper: Tensor  # of w sigma(-c)
    slope: Tensor  # of w v sigma(c) sigma(-c)


# In place wherever a tensor is our own: fresh memory costs more than what is done with it. The terms of a mixture lie
# along ``dim``; sums along the last dimension but one are several times as fast as sums along the last.


def _by_sums(c: Tensor, w: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, _Sums]:
    """The mean, its log-slope, and what their derivatives are made of: sigma(c) and sigma(-c), and sums.

    Args:
        c: values, which are overwritten.
        w: weights, of the same shape.
        v: slopes, of the same shape.
        dim: that of the terms.
    """
    largest, far = torch.finfo(c.dtype).max, FAR[c.dtype]
    size = c.clamp_(-largest, largest).abs()
    least = size.amin(dim, keepdim=True)
    near = least.clamp(max=far)
    above = torch.copysign(size.sub_(least).add_(near), c, out=c)
    below = torch.neg(above, out=size)
    above.sigmoid_()
    below.sigmoid_()
    parts = w * above
    lower = parts.sum(dim, keepdim=True)
    slope = parts.mul_(below).mul_(v).sum(dim, keepdim=True)
    upper = torch.mul(w, below, out=parts).sum(dim, keepdim=True)
    log_lower, log_upper, moved = torch.log(lower), torch.log(upper), least.sub_(near)
    ratio = log_lower - log_upper
    # With all on one side the smaller tail has been moved too: it is below exp(-far), else not below the least weight.
    aside = moved * (ratio.abs() > 0.85 * far)
    log_slope = torch.log(slope).sub_(log_lower.add_(log_upper)).squeeze(dim) - moved.sub_(aside).squeeze(dim)
    y = aside.copysign_(ratio).squeeze(dim) + ratio.squeeze(dim)  # no view: who gets it may write into it
    return y, log_slope, above, below, _Sums(lower, upper, slope)


def _derivatives(
    above: Tensor, below: Tensor, sums: _Sums, w: Tensor, v: Tensor, by_y: Tensor, by_log_slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By ``c``, ``log w`` and ``log v``: the result is log L - log U, and its log-slope log S - log L - log U.

    The gradients of these, ``by_y`` and ``by_log_slope``, have the shape of the sums.
    """
    # The terms' shares in the three sums; where one term is all, they are exactly one and their difference is zero.
    in_lower, in_upper = (w * above).div_(sums.lower), (w * below).div_(sums.upper)
    in_slope = (above * below).mul_(w).mul_(v).div_(sums.slope)
    rising = (in_slope - in_lower).mul_(by_log_slope).addcmul_(in_lower, by_y)
    falling = torch.sub(in_upper, in_slope, out=in_lower).mul_(by_log_slope).addcmul_(in_upper, by_y)
    by_log_w = torch.addcmul(rising, in_upper, by_y + by_log_slope, value=-1, out=in_upper)
    # Probabilities that were moved are none in truth, and neither are those beside a derivative of ordinary size.
    least = 1.1 * math.exp(-FAR[w.dtype])
    by_c = rising.mul_(threshold(below, least, 0.0)).addcmul_(falling, threshold(above, least, 0.0))
    return by_c, by_log_w, in_slope.mul_(by_log_slope)


class _LogisticMean(torch.autograd.Function):
    """`logistic_mean` with written-out first derivatives; second ones go through the logarithms."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.broadcast_shapes(c.shape, w.shape, v.shape)
        values = c.expand(shape).clone(memory_format=torch.contiguous_format)
        y, log_slope, above, below, sums = _by_sums(values, w.expand(shape), v.expand(shape), -1)
        ctx.save_for_backward(c, w, v, above, below, *sums)
        return y, log_slope

    @staticmethod
    def backward(ctx: Any, by_y: Tensor, by_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        c, w, v, above, below, *sums = ctx.saved_tensors
        if is_differentiated(by_y, by_log_slope):
            return tuple(gradients_with_graph(_by_logarithms, (c, w, v), ctx.needs_input_grad, (by_y, by_log_slope)))
        terms = w.expand(above.shape), v.expand(above.shape)
        outer = by_y.unsqueeze(-1), by_log_slope.unsqueeze(-1)
        by_c, by_log_w, by_log_v = _derivatives(above, below, _Sums(*sums), *terms, *outer)
        return by_c.sum_to_size(c.shape), by_log_w.sum_to_size(w.shape) / w, by_log_v.sum_to_size(v.shape) / v


def _columns(rows: Tensor) -> Tensor:
    """The same numbers with the first dimension last, and next to each other in memory."""
    return rows.movedim(0, -1).contiguous()


def _rows(columns: Tensor) -> Tensor:
    """The same numbers with the last dimension first again, in memory of their own."""
    return columns.movedim(-1, 0).clone(memory_format=torch.contiguous_format)


class _DeepSigmoid(torch.autograd.Function):
    """`deep_sigmoid` of a row of parameters for each number, likewise.

    All lies in memory as ``[..., parameters, rows]``: what is done to a parameter is done to long stretches of numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, slope: float, offsets: Tensor) -> tuple[Tensor, Tensor]:
        columns, at = _columns(raw), _columns(x).unsqueeze(-2)
        a, b, w = mixture_parameters(columns, slope, offsets.unsqueeze(-1), -2)
        y, log_slope, above, below, sums = _by_sums(b.addcmul_(a, at), w, a, -2)
        ctx.slope = slope
        ctx.save_for_backward(x, raw, offsets, at, columns, a, w, above, below, *sums)
        return _rows(y), _rows(log_slope)

    @staticmethod
    def backward(ctx: Any, by_y: Tensor, by_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        x, raw, offsets, at, columns, a, w, above, below, *sums = ctx.saved_tensors
        if is_differentiated(by_y, by_log_slope):

            def plainly(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
                a, b, w = mixture_parameters(raw, ctx.slope, offsets)
                return _by_logarithms(torch.addcmul(b, a, x.unsqueeze(-1)), w, a)

            return *gradients_with_graph(plainly, (x, raw), ctx.needs_input_grad, (by_y, by_log_slope)), None, None
        outer = _columns(by_y).unsqueeze(-2), _columns(by_log_slope).unsqueeze(-2)
        by_b, by_logits, by_a = _derivatives(above, below, _Sums(*sums), w, a, *outer)
        by_columns = torch.empty_like(columns)
        to_slopes, to_shifts, to_logits = by_columns.chunk(3, -2)
        scratch = torch.mul(by_b, a)
        by_x = scratch.sum(-2)
        # By the raw slopes; softplus has the derivative sigmoid.
        by_a.div_(a).addcmul_(by_b, at)
        torch.mul(by_a, torch.add(columns.chunk(3, -2)[0], UNIT_SLOPE, out=scratch).sigmoid_(), out=to_slopes)
        to_slopes.mul_(ctx.slope)
        to_shifts.copy_(by_b)
        moving = torch.sub(w, LEAST_WEIGHT / w.shape[-2], out=scratch)  # what is not the least weight
        by_logits.div_(w).mul_(moving)
        total = by_logits.sum(-2, keepdim=True).div_(1 - LEAST_WEIGHT)
        torch.addcmul(by_logits, moving, total, value=-1, out=to_logits)
        return by_x.movedim(-1, 0), by_columns.movedim(-1, 0), None, None


def mixture_parameters(raw: Tensor, slope: float, offsets: Tensor, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes, offsets and weights ``[..., H]`` from raw numbers ``[..., 3 H]``.

    Args:
        raw: slopes, offsets and logits of weights, any real numbers.
        slope: the slopes where ``raw`` is zero.
        offsets: the offsets where it is.
        dim: along which dimension they lie.

    Example:
        >>> [part.shape for part in mixture_parameters(torch.zeros(5, 6), 2.0, torch.tensor([-1.0, 1.0]))]
        [torch.Size([5, 2]), torch.Size([5, 2]), torch.Size([5, 2])]
    """
    steepness, shift, logits = raw.chunk(3, dim)
    a = softplus(steepness + UNIT_SLOPE).mul_(slope).add_(LEAST_SLOPE * slope)
    return a, shift + offsets, mixture_weights(logits, dim)


def mixture_weights(logits: Tensor, dim: int = -1) -> Tensor:
    """Weights that sum to one along a dimension: a softmax, and a millionth shared out evenly.

    Args:
        logits: any real numbers, ``[..., H]``.
        dim: along which dimension they lie.

    Example:
        >>> mixture_weights(torch.tensor([0.0, 200.0]))
        tensor([5.0000e-07, 1.0000e+00])
    """
    return torch.softmax(logits, dim).mul(1 - LEAST_WEIGHT).add_(LEAST_WEIGHT / logits.shape[dim])


def logistic_mean(c: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean with :math:`\psi = 1 / (1 + e^{-c})`: the logit of a mixture of logistic distribution functions.

    With the tails :math:`L = \sum_h w_h \sigma(c_h)` and :math:`U = \sum_h w_h \sigma(-c_h)` it is
    :math:`y = \log L - \log U`, and its slope :math:`\sum_h w_h v_h \sigma(c_h) \sigma(-c_h) / L U`.

    Args:
        c: the values ``[..., H]``.
        w: weights that sum to one, none below 1e-12.
        v: slopes :math:`dc_h / dx`, positive.

    Example:
        >>> logistic_mean(torch.tensor([1e20, 2e20]), torch.full((2,), 0.5), torch.ones(2))[0]
        tensor(1.0000e+20)
    """
    if is_plainly_eager() and c.dtype in FAR:
        return _LogisticMean.apply(c, w, v)
    return _by_logarithms(c, w, v)


def deep_sigmoid(x: Tensor, raw: Tensor, slope: float, offsets: Tensor) -> tuple[Tensor, Tensor]:
    r"""The logistic mean of ``a x + b`` with the `mixture_parameters` of ``raw``, in one step.

    Args:
        x: ``[...]``.
        raw: ``[..., 3 H]``.
        slope: as there.
        offsets: as there, ``[H]``.

    Returns:
        The mean and its log-slope, ``[...]`` each.

    Example:
        >>> y, log_slope = deep_sigmoid(torch.tensor([1e20]), torch.zeros(1, 6), 1.0, torch.zeros(2))
        >>> y, log_slope.abs() < 1e-6
        (tensor([1.0000e+20]), tensor([True]))
    """
    if is_plainly_eager() and raw.shape[:-1] == x.shape and x.numel() and x.dim() and x.dtype in FAR:
        if x.dim() < 3:
            return _DeepSigmoid.apply(x, raw, slope, offsets)
        y, log_slope = _DeepSigmoid.apply(x.flatten(0, -2), raw.flatten(0, -3), slope, offsets)
        return y.reshape(x.shape), log_slope.reshape(x.shape)
    a, b, w = mixture_parameters(raw, slope, offsets)
    return logistic_mean(torch.addcmul(b, a, x.unsqueeze(-1)), w, a)
