r"""Monotone rational splines on :math:`[-B, B]` with straight tails, both directions in closed form.

Rational-quadratic: Durkan, Bekasov, Murray, Papamakarios (2019), *Neural spline flows*, arXiv:1906.04032.
Linear-rational: Dolatabadi, Erfani, Leckie (2020), *Invertible generative modeling using linear rational
splines*, arXiv:2001.05168.

Both are written in the coordinates of one bin, with slopes :math:`d_0, d_1` at its two knots and mean slope
:math:`s` in between, as sums of positive terms: nothing cancels, no discriminant can be negative, and no
value needs clamping. Positions are measured from the nearer end of a bin where that matters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyroflows.numerics.derivatives import gradients_with_graph
from pyroflows.numerics.modes import is_differentiated, is_plainly_eager
from pyroflows.numerics.scales import bounded_log_scale

__all__ = ["linear_rational", "rational_quadratic"]

MIN_BIN = 1e-3
"""The smallest bin width and height, as a share of the box."""
MAX_LOG_SLOPE = math.log(1e3)
"""The slope at a knot lies between its inverse exponential and its exponential, a thousandth and a thousand."""


class _Bin(NamedTuple):
    """The bin that each input fell into; every tensor has the input's shape but for those that say otherwise."""

    value: Tensor  # the input, in the box
    left: Tensor
    bottom: Tensor
    width: Tensor
    height: Tensor
    slope_0: Tensor
    slope_1: Tensor
    log_slopes: Tensor  # both, [..., 2]
    weights: Tensor  # exp of the raw sizes, [..., 2, K]
    totals: Tensor  # their sums, [..., 2]
    number: Tensor  # which bin, [..., 1]

    def offset(self, inverse: bool) -> Tensor:
        """The position of the input in its bin, in [0, 1]."""
        start, size = (self.bottom, self.height) if inverse else (self.left, self.width)
        return ((self.value - start) / size).clamp(0, 1)  # rounding alone can lead out of the bin


def _find_bin(value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, inverse: bool) -> _Bin:
    """The bin of each input.

    Sizes are shares of the box, a softmax of raw numbers; of it only what the bin needs is computed.
    """
    bins = int(widths.shape[-1])  # torch.jit traces a size as a tensor, and would multiply in float32
    box, least = 2 * bound * (1 - MIN_BIN * bins), 2 * bound * MIN_BIN
    raw = torch.stack([widths, heights], -2)
    weights = raw.sub_(raw.detach().amax(-1, keepdim=True)).exp_()  # in place: memory is what they cost
    sums = weights.cumsum(-1)
    totals = sums[..., -1].clone()  # not the memory of all sums, kept for the gradient
    scale = box / totals

    side = 1 if inverse else 0
    knots = sums[..., side, :-1] * scale[..., side, None]
    knots = knots + torch.arange(1, bins, dtype=value.dtype, device=value.device) * least - bound
    number = (value.unsqueeze(-1) >= knots).sum(-1, keepdim=True)

    shape = number.shape[:-1]  # that of the inputs and the parameters together
    pair = number.unsqueeze(-2).expand(*shape, 2, 1)
    weight = weights.expand(*shape, 2, bins).gather(-1, pair).squeeze(-1)
    before = sums.expand(*shape, 2, bins).gather(-1, pair).squeeze(-1) - weight
    width, height = (weight * scale + least).unbind(-1)
    left, bottom = (before * scale + (number.to(value.dtype) * least - bound)).unbind(-1)
    slopes = _knot_slopes(slopes, bins).expand(*shape, bins + 1)
    log_slopes = bounded_log_scale(slopes.gather(-1, _ends(number)), MAX_LOG_SLOPE)
    slope_0, slope_1 = torch.exp(log_slopes).unbind(-1)
    return _Bin(value, left, bottom, width, height, slope_0, slope_1, log_slopes, weights, totals, number)


def _ends(number: Tensor) -> Tensor:
    """The knots at both ends of each bin."""
    return torch.cat([number, number + 1], -1)


def _in_box(bin: _Bin, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rational-quadratic map in a bin: the result, the log-slope from left to right, and the offset there."""
    d0, d1 = bin.slope_0, bin.slope_1
    s = bin.height / bin.width
    if inverse:
        eta = bin.offset(inverse=True)
        eta_bar = 1 - eta
        m = d0 * eta_bar - d1 * eta
        q = m.abs() + torch.sqrt(m.square() + 4 * s.square() * eta * eta_bar)
        from_left, from_right = 2 * s * eta, 2 * s * eta_bar
        total = q + torch.where(m >= 0, from_left, from_right)
        xi = torch.where(m >= 0, from_left, q) / total
        xi_bar = torch.where(m >= 0, q, from_right) / total
    else:
        xi = bin.offset(inverse=False)
        xi_bar = 1 - xi
    above, below = _above_and_below(s, d0, d1, xi, xi_bar)
    log_slope = torch.add(torch.log(above), torch.log(s / below), alpha=2)
    if inverse:
        return torch.addcmul(bin.left, bin.width, xi), log_slope, xi
    share = xi * torch.addcmul(d0 * xi_bar, s, xi) / below
    return torch.addcmul(bin.bottom, bin.height, share), log_slope, xi


def _above_and_below(s: Tensor, d0: Tensor, d1: Tensor, xi: Tensor, xi_bar: Tensor) -> tuple[Tensor, Tensor]:
    """What is above and below the line of the slope, each a sum of positive terms."""
    product = xi * xi_bar
    below = torch.addcmul(s * (1 - 2 * product), d0 + d1, product)
    above = torch.addcmul(d1 * xi.square(), d0, xi_bar.square())
    return torch.addcmul(above, s, product, value=2), below


def _rational_quadratic(
    value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The map as plain formulas, the identity outside of the box."""

    def in_box(value: Tensor) -> tuple[Tensor, Tensor]:
        result, log_slope, _ = _in_box(_find_bin(value, widths, heights, slopes, bound, inverse), inverse)
        return result, -log_slope if inverse else log_slope

    return _with_identity(value, bound, in_box)


class _RationalQuadratic(torch.autograd.Function):
    """The same map with its derivatives written out: a third of the work that autograd would do.

    Every parameter has a row of its own for each input. A second derivative is autograd's, of the plain formula.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        inside = value.abs() < bound
        bin = _find_bin(value.clamp(-bound, bound), widths, heights, slopes, bound, inverse)
        result, log_slope, xi = _in_box(bin, inverse)
        ctx.bound, ctx.inverse = bound, inverse
        ctx.save_for_backward(value, widths, heights, slopes, inside, xi, *bin[1:])
        result, log_slope = torch.where(inside, result, value), torch.where(inside, log_slope, 0.0)
        return result, log_slope.neg_() if inverse else log_slope

    @staticmethod
    def backward(ctx: Any, by_result: Tensor, by_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        value, widths, heights, slopes, inside, xi, *rest = ctx.saved_tensors
        if is_differentiated(by_result, by_log_slope):

            def plainly(value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
                return _rational_quadratic(value, widths, heights, slopes, ctx.bound, ctx.inverse)

            inputs, outer = (value, widths, heights, slopes), (by_result, by_log_slope)
            return *gradients_with_graph(plainly, inputs, ctx.needs_input_grad, outer), None, None
        bin = _Bin(value, *rest)
        by_log_slope, in_box = torch.where(inside, by_log_slope, 0.0), torch.where(inside, by_result, 0.0)
        by_value, by_bin, by_slopes = _derivatives(bin, xi, in_box, by_log_slope, ctx.inverse)
        by_widths, by_heights = _by_raw_sizes(bin, *by_bin, ctx.bound).unbind(-2)
        knots = torch.zeros_like(_knot_slopes(slopes, widths.shape[-1]))
        knots.scatter_(-1, _ends(bin.number), by_slopes)
        by_slopes = knots if knots.shape == slopes.shape else knots[..., 1:-1]
        return torch.where(inside, by_value, by_result), by_widths, by_heights, by_slopes, None, None


def _derivatives(
    bin: _Bin, xi: Tensor, by_result: Tensor, by_log_slope: Tensor, inverse: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    r"""Gradients with respect to the input, to sizes and starts of the bin ``[..., 2]``, and to the raw slopes there.

    With :math:`N = \xi (s \xi + d_0 \bar\xi)` and :math:`A`, :math:`B` above and below the line of the slope,
    :math:`\eta = N / B` and the log-slope is :math:`\log A + 2 \log s - 2 \log B`. The inverse is differentiated
    implicitly, at fixed :math:`y = \mathrm{bottom} + h\, \eta(\xi)`.
    """
    d0, d1, w, h = bin.slope_0, bin.slope_1, bin.width, bin.height
    s, xi_bar = h / w, 1 - xi
    difference, product = xi_bar - xi, xi * xi_bar
    above, below = _above_and_below(s, d0, d1, xi, xi_bar)
    rise = torch.addcmul(d0 * xi_bar, s, xi)
    share, per_below = xi * rise / below, below.reciprocal()
    bend = difference * torch.sub(d0 + d1, s, alpha=2)  # of B, along xi
    if inverse:
        by_log_slope = -by_log_slope
    by_above = by_log_slope / above
    by_below = -2 * by_log_slope * per_below
    by_xi = torch.addcmul(d1 * xi, s, difference).addcmul_(d0, xi_bar, value=-1).mul_(2 * by_above)
    by_xi.addcmul_(by_below, bend)
    if inverse:  # at a fixed y, xi gives way to every other change
        by_share = torch.addcmul(by_xi, by_result, w) * (below.square() / (-s * above))
    else:
        by_share = by_result * h
    by_upper = by_share * per_below  # with respect to N
    by_below = torch.addcmul(by_below, by_upper, share, value=-1)
    by_s = torch.addcmul(by_below, product, by_above - by_below, value=2)
    by_s.addcmul_(xi.square(), by_upper).addcdiv_(by_log_slope, s, value=2)
    by_0 = torch.addcmul(product * (by_below + by_upper), xi_bar.square(), by_above)
    by_1 = torch.addcmul(product * by_below, xi.square(), by_above)
    by_slope = by_s / w
    if inverse:
        by_bottom, by_left = by_share / h, by_result
        by_value, by_width = -by_bottom, by_left * xi
    else:
        by_xi.addcmul_(by_upper, torch.addcmul(rise, xi, s - d0)).addcmul_(by_upper * share, bend, value=-1)
        by_value, by_bottom = by_xi / w, by_result
        by_left = -by_value
        by_width = by_left * xi
    by_width = torch.addcmul(by_width, by_slope, s, value=-1)
    by_height = torch.addcmul(by_slope, by_bottom, share)
    tanh = bin.log_slopes * (1 / MAX_LOG_SLOPE)
    by_slopes = torch.stack([by_0 * d0, by_1 * d1], -1) * (1 - tanh.square())
    return by_value, (torch.stack([by_width, by_height], -1), torch.stack([by_left, by_bottom], -1)), by_slopes


def _by_raw_sizes(bin: _Bin, by_size: Tensor, by_start: Tensor, bound: float) -> Tensor:
    """The gradient with respect to the raw sizes ``[..., 2, K]``, through the softmax and its running sum."""
    bins = bin.weights.shape[-1]
    box, least = 2 * bound * (1 - MIN_BIN * bins), 2 * bound * MIN_BIN
    scale = box / bin.totals
    size = torch.stack([bin.width, bin.height], -1) - least
    start = torch.stack([bin.left, bin.bottom], -1) - (bin.number.to(size.dtype) * least - bound)
    mean = (by_size * size + by_start * start) * (-1 / box)
    by_start, by_size, mean = by_start * scale, by_size * scale, mean * scale
    is_before = (torch.arange(bins, device=size.device) < bin.number.unsqueeze(-2)).to(size.dtype)
    each = torch.addcmul(mean.unsqueeze(-1), by_start.unsqueeze(-1), is_before)
    each.scatter_add_(-1, bin.number.unsqueeze(-2).expand(*size.shape, 1), by_size.unsqueeze(-1))
    return each.mul_(bin.weights)


def _knot_slopes(slopes: Tensor, bins: int) -> Tensor:
    """The raw slopes at all ``K + 1`` knots; where the end knots have none, a raw slope of 0 is the slope 1."""
    return pad(slopes, (1, 1)) if slopes.shape[-1] == bins - 1 else slopes


def _with_identity(value: Tensor, bound: float, in_box: Any) -> tuple[Tensor, Tensor]:
    """A map of the box, continued by the identity."""
    inside = value.abs() < bound
    result, log_slope = in_box(value.clamp(-bound, bound))
    return torch.where(inside, result, value), torch.where(inside, log_slope, torch.zeros_like(log_slope))


def _with_tails(
    mapped: tuple[Tensor, Tensor], value: Tensor, slopes: Tensor, bins: int, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """A map as it is, or continued linearly outside of the box if the end knots have slopes of their own."""
    if slopes.shape[-1] == bins - 1:
        return mapped
    result, log_slope = mapped
    inside = value.abs() < bound
    log_end = bounded_log_scale(torch.where(value > 0, slopes[..., -1], slopes[..., 0]), MAX_LOG_SLOPE)
    if inverse:
        log_end = -log_end
    end = torch.where(value > 0, torch.full_like(value, bound), -bound)  # two plain numbers would make float32
    outside = end + (torch.where(inside, end, value) - end) * torch.exp(log_end)
    return torch.where(inside, result, outside), torch.where(inside, log_slope, log_end)


def rational_quadratic(
    value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""A rational-quadratic spline with :math:`K` bins on :math:`[-B, B]`.

    In a bin with offset :math:`\xi`, :math:`\bar\xi = 1 - \xi`:

    .. math::
        \eta = \frac{\xi (s \xi + d_0 \bar\xi)}{s (\xi^2 + \bar\xi^2) + (d_0 + d_1) \xi \bar\xi}, \qquad
        \frac{d\eta}{d\xi} = s \, \frac{d_1 \xi^2 + 2 s \xi \bar\xi + d_0 \bar\xi^2}
        {(s (\xi^2 + \bar\xi^2) + (d_0 + d_1) \xi \bar\xi)^2}

    and back, with :math:`m = d_0 \bar\eta - d_1 \eta` and :math:`q = |m| + \sqrt{m^2 + 4 s^2 \eta \bar\eta}`,
    :math:`\xi = 2 s \eta / (q + 2 s \eta)` for :math:`m \ge 0` and :math:`q / (q + 2 s \bar\eta)` otherwise.

    Args:
        value: inputs ``[...]`` (outputs, if ``inverse``).
        widths: raw bin widths ``[..., K]``; all zero gives equal bins.
        heights: raw bin heights ``[..., K]``.
        slopes: raw slopes at the inner knots ``[..., K - 1]``, zero is the slope 1, and the identity outside of the
            box; or at all knots ``[..., K + 1]``, with straight lines of the outer slopes outside.
        bound: half the side of the box, :math:`B`.
        inverse: map back instead of forth.

    Returns:
        The mapped values ``[...]`` and the log-derivative of *this* direction ``[...]``.

    Example:
        >>> x, raw = torch.tensor([0.3, 7.0]), torch.zeros(2, 8)
        >>> rational_quadratic(x, raw, raw, raw[:, 1:], bound=5.0)[0]
        tensor([0.3000, 7.0000])
    """
    parameters = (widths, heights, slopes)
    own_rows = all(p.shape[:-1] == value.shape and p.dtype == value.dtype for p in parameters) and is_plainly_eager()
    function = _RationalQuadratic.apply if own_rows else _rational_quadratic
    mapped = function(value, widths, heights, slopes, bound, inverse)
    return _with_tails(mapped, value, slopes, int(widths.shape[-1]), bound, inverse)


def linear_rational(
    value: Tensor,
    widths: Tensor,
    heights: Tensor,
    slopes: Tensor,
    splits: Tensor,
    *,
    bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A linear-rational spline with :math:`K` bins on :math:`[-B, B]`.

    Each bin is cut at the share :math:`\lambda` of its width; the height at the cut is
    :math:`\eta_c = \lambda \sqrt{d_0} / A` with :math:`A = \lambda \sqrt{d_0} + (1 - \lambda) \sqrt{d_1}`. On the
    left piece, with weight :math:`w = \sqrt{d_0 d_1} A / s` and :math:`v = \sqrt{d_1}`,

    .. math::
        \eta = \frac{w \eta_c \xi}{v (\lambda - \xi) + w \xi}, \qquad
        \frac{d\eta}{d\xi} = \frac{v w \lambda \eta_c}{(v (\lambda - \xi) + w \xi)^2}, \qquad
        \xi = \frac{v \lambda \eta}{w (\eta_c - \eta) + v \eta},

    and the right piece is its mirror image.

    Args:
        value: inputs ``[...]`` (outputs, if ``inverse``).
        widths: raw bin widths ``[..., K]``.
        heights: raw bin heights ``[..., K]``.
        slopes: raw slopes at the inner knots ``[..., K - 1]`` or at all ``[..., K + 1]``, as in `rational_quadratic`.
        splits: raw cuts ``[..., K]``; zero cuts a bin in the middle.
        bound: half the side of the box, :math:`B`.
        inverse: map back instead of forth.

    Returns:
        The mapped values ``[...]`` and the log-derivative of *this* direction ``[...]``.

    Example:
        >>> x, raw = torch.tensor([0.3, 7.0]), torch.zeros(2, 8)
        >>> linear_rational(x, raw, raw, raw[:, 1:], raw, bound=5.0)[0]
        tensor([0.3000, 7.0000])
    """

    def in_box(value: Tensor) -> tuple[Tensor, Tensor]:
        bin = _find_bin(value, widths, heights, slopes, bound, inverse)
        offset, mean_slope = bin.offset(inverse), bin.height / bin.width
        root_0, root_1 = bin.slope_0.sqrt(), bin.slope_1.sqrt()
        cut = splits.expand(*bin.number.shape[:-1], splits.shape[-1]).gather(-1, bin.number).squeeze(-1)
        cut = 0.025 + 0.95 * torch.sigmoid(cut)
        left_part, right_part = cut * root_0, (1 - cut) * root_1
        total = left_part + right_part
        weight = root_0 * root_1 * total / mean_slope

        on_left = offset * total <= left_part if inverse else offset <= cut
        near = torch.where(on_left, offset, 1 - offset)
        share = torch.where(on_left, cut, 1 - cut)
        end_weight = torch.where(on_left, root_1, root_0)
        height = torch.where(on_left, left_part, right_part) / total
        if inverse:
            position = end_weight * share * near / (weight * (height - near) + end_weight * near)
        else:
            position = near
        below = end_weight * (share - position) + weight * position
        log_slope = torch.log(mean_slope * end_weight * weight * share * height) - 2 * torch.log(below)
        if inverse:
            return bin.left + bin.width * torch.where(on_left, position, 1 - position), -log_slope
        mapped = weight * height * near / below
        return bin.bottom + bin.height * torch.where(on_left, mapped, 1 - mapped), log_slope

    mapped = _with_identity(value, bound, in_box)
    return _with_tails(mapped, value, slopes, int(widths.shape[-1]), bound, inverse)
