r"""Monotone rational splines on :math:`[-B, B]` with identity tails, both directions in closed form.

Rational-quadratic: Durkan, Bekasov, Murray, Papamakarios (2019), *Neural spline flows*, arXiv:1906.04032.
Linear-rational: Dolatabadi, Erfani, Leckie (2020), *Invertible generative modeling using linear rational
splines*, arXiv:2001.05168.

Both are written in the coordinates of one bin, with slopes :math:`d_0, d_1` at its two knots and mean slope
:math:`s` in between, as sums of positive terms: nothing cancels, no discriminant can be negative, and no
value needs clamping. Positions are measured from the nearer end of a bin where that matters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyroflows.numerics.scales import bounded_log_scale

__all__ = ["linear_rational", "rational_quadratic"]

MIN_BIN = 1e-3
"""The smallest bin width and height, as a share of the box."""
MAX_LOG_SLOPE = math.log(1e3)
"""The slope at a knot lies between its inverse exponential and its exponential, a thousandth and a thousand."""


class _Bin(NamedTuple):
    """The bin that each input fell into; every tensor has the input's shape."""

    inside: Tensor
    offset: Tensor  # position of the input in its bin, in [0, 1]
    start: Tensor  # where the bin begins on the output side
    size: Tensor  # how long the bin is on the output side
    mean_slope: Tensor
    slope_0: Tensor
    slope_1: Tensor
    number: Tensor  # which bin, [..., 1]


def _knots(logits: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Bin sizes and left edges, ``[..., K]`` each."""
    bins = int(logits.shape[-1])  # torch.jit traces a size as a tensor, and would multiply in float32
    share = MIN_BIN + (1 - MIN_BIN * bins) * logits.softmax(-1)
    edges = pad(share[..., :-1].cumsum(-1), (1, 0))
    return 2 * bound * share, bound * (2 * edges - 1)


def _find_bin(value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, inverse: bool) -> _Bin:
    width, left = _knots(widths, bound)
    height, bottom = _knots(heights, bound)
    inside = (value > -bound) & (value < bound)
    value = value.clamp(-bound, bound)
    edges = bottom if inverse else left
    index = (value.unsqueeze(-1) >= edges[..., 1:]).sum(-1, keepdim=True)

    shape = torch.broadcast_shapes(index.shape[:-1], width.shape[:-1])
    index = index.expand(*shape, 1)

    def at(table: Tensor, where: Tensor) -> Tensor:
        return table.expand(*shape, table.shape[-1]).gather(-1, where).squeeze(-1)

    width, left, height, bottom = (at(table, index) for table in (width, left, height, bottom))
    padded = pad(slopes, (1, 1))  # a raw slope of 0 is the slope 1 of the tails
    slope_0 = torch.exp(bounded_log_scale(at(padded, index), MAX_LOG_SLOPE))
    slope_1 = torch.exp(bounded_log_scale(at(padded, index + 1), MAX_LOG_SLOPE))
    if inverse:
        offset, start, size = (value - bottom) / height, left, width
    else:
        offset, start, size = (value - left) / width, bottom, height
    offset = offset.clamp(0, 1)  # rounding alone can lead out of the bin
    return _Bin(inside, offset, start, size, height / width, slope_0, slope_1, index)


def _with_tails(value: Tensor, bin: _Bin, position: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.where(bin.inside, bin.start + bin.size * position, value)
    return result, torch.where(bin.inside, log_slope, torch.zeros_like(log_slope))


def rational_quadratic(
    value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""A rational-quadratic spline with :math:`K` bins, identity outside :math:`[-B, B]`.

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
        slopes: raw slopes at the inner knots ``[..., K - 1]``; zero is the slope 1.
        bound: half the side of the box, :math:`B`.
        inverse: map back instead of forth.

    Returns:
        The mapped values ``[...]`` and the log-derivative of *this* direction ``[...]``.

    Example:
        >>> x, raw = torch.tensor([0.3, 7.0]), torch.zeros(2, 8)
        >>> rational_quadratic(x, raw, raw, raw[:, 1:], bound=5.0)[0]
        tensor([0.3000, 7.0000])
    """
    bin = _find_bin(value, widths, heights, slopes, bound, inverse)
    s, d0, d1 = bin.mean_slope, bin.slope_0, bin.slope_1
    if inverse:
        eta, eta_bar = bin.offset, 1 - bin.offset
        m = d0 * eta_bar - d1 * eta
        q = m.abs() + torch.sqrt(m.square() + 4 * s.square() * eta * eta_bar)
        from_left, from_right = 2 * s * eta, 2 * s * eta_bar
        total = q + torch.where(m >= 0, from_left, from_right)
        xi = torch.where(m >= 0, from_left, q) / total
        xi_bar = torch.where(m >= 0, q, from_right) / total
    else:
        xi, xi_bar = bin.offset, 1 - bin.offset
    product = xi * xi_bar
    below = s * (xi.square() + xi_bar.square()) + (d0 + d1) * product
    above = d1 * xi.square() + 2 * s * product + d0 * xi_bar.square()
    log_slope = 2 * (torch.log(s) - torch.log(below)) + torch.log(above)
    if inverse:
        return _with_tails(value, bin, xi, -log_slope)
    return _with_tails(value, bin, xi * (s * xi + d0 * xi_bar) / below, log_slope)


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
    r"""A linear-rational spline with :math:`K` bins, identity outside :math:`[-B, B]`.

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
        slopes: raw slopes at the inner knots ``[..., K - 1]``; zero is the slope 1.
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
    bin = _find_bin(value, widths, heights, slopes, bound, inverse)
    root_0, root_1 = bin.slope_0.sqrt(), bin.slope_1.sqrt()
    cut = splits.expand(*bin.number.shape[:-1], splits.shape[-1]).gather(-1, bin.number).squeeze(-1)
    cut = 0.025 + 0.95 * torch.sigmoid(cut)
    left_part, right_part = cut * root_0, (1 - cut) * root_1
    total = left_part + right_part
    weight = root_0 * root_1 * total / bin.mean_slope

    on_left = bin.offset * total <= left_part if inverse else bin.offset <= cut
    near = torch.where(on_left, bin.offset, 1 - bin.offset)
    share = torch.where(on_left, cut, 1 - cut)
    end_weight = torch.where(on_left, root_1, root_0)
    height = torch.where(on_left, left_part, right_part) / total
    if inverse:
        position = end_weight * share * near / (weight * (height - near) + end_weight * near)
    else:
        position = near
    below = end_weight * (share - position) + weight * position
    log_slope = torch.log(bin.mean_slope * end_weight * weight * share * height) - 2 * torch.log(below)
    if inverse:
        return _with_tails(value, bin, torch.where(on_left, position, 1 - position), -log_slope)
    mapped = weight * height * near / below
    return _with_tails(value, bin, torch.where(on_left, mapped, 1 - mapped), log_slope)
