r"""Monotone splines of polynomials on :math:`[-B, B]` with straight tails, both directions to the last digits.

Linear and quadratic: Müller, McWilliams, Rousselle, Gross, Novák (2019), *Neural importance sampling*,
arXiv:1808.03856. Cubic: Durkan, Bekasov, Murray, Papamakarios (2019), *Cubic-spline flows*, arXiv:1906.02145, with
the slopes of Steffen (1990), *A simple method for monotonic interpolation in one dimension*.

As in `pyroflows.numerics.splines`, a bin is written in its own coordinates, the offset :math:`\xi` across, the share
:math:`\eta` up, :math:`\bar\xi = 1 - \xi`, and as sums of positive terms, so that nothing cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyroflows.numerics.scales import bounded_log_scale

__all__ = ["piecewise_cubic", "piecewise_linear", "piecewise_quadratic"]

MIN_BIN = 1e-3
"""The smallest bin width and height, as a share of the box."""
MAX_LOG_SLOPE = math.log(1e3)
"""Raw slopes are bounded to between a thousandth and a thousand, before they are normalised."""
NEWTON_STEPS = 3
"""From a start that is within a hundredth of the root of every cubic that can occur, enough for float64."""

Ends = tuple[Tensor, Tensor]
"""The log-slopes of the left and the right tail."""


def _shares(raw: Tensor) -> Tensor:
    """Positive numbers that sum to one, none below `MIN_BIN`."""
    bins = int(raw.shape[-1])  # torch.jit traces a size as a tensor
    return MIN_BIN + (1 - MIN_BIN * bins) * raw.softmax(-1)


def _starts(shares: Tensor, bound: float) -> Tensor:
    """Where the bins begin, from their sizes as shares of the box."""
    return bound * (2 * pad(shares[..., :-1].cumsum(-1), (1, 0)) - 1)


def _bin_of(value: Tensor, starts: Tensor) -> Tensor:
    return (value.unsqueeze(-1) >= starts[..., 1:]).sum(-1, keepdim=True)


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """The entry ``index`` ``[..., 1]`` of the last dimension of a table that broadcasts with it."""
    shape = torch.broadcast_shapes(index.shape[:-1], table.shape[:-1])
    return table.expand(*shape, table.shape[-1]).gather(-1, index.expand(*shape, 1)).squeeze(-1)


def _with_tails(
    value: Tensor, inner: Tensor, log_slope: Tensor, bound: float, ends: Ends | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The spline in the box, straight lines outside of it that leave its corners with the given slopes."""
    inside = (value > -bound) & (value < bound)
    if ends is None:
        return torch.where(inside, inner, value), torch.where(inside, log_slope, torch.zeros_like(log_slope))
    edge = value.clamp(-bound, bound)
    outer_log_slope = torch.where(value < 0, *ends)
    outer_log_slope = -outer_log_slope if inverse else outer_log_slope
    outer = edge + (value - edge) * torch.exp(outer_log_slope)
    return torch.where(inside, inner, outer), torch.where(inside, log_slope, outer_log_slope)


def piecewise_linear(
    value: Tensor, heights: Tensor, ends: Tensor | None = None, *, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""A chain of :math:`K` straight pieces over bins of equal width, :math:`\eta = \xi`.

    The slope of piece :math:`k` is :math:`K h_k` with :math:`h` a softmax, so the log-slope is constant in a bin and
    jumps at the knots.

    Args:
        value: inputs ``[...]`` (outputs, if ``inverse``).
        heights: raw bin heights ``[..., K]``; all zero gives the identity.
        ends: raw slopes of the two tails ``[..., 2]``, zero is the slope 1; ``None`` for tails that are the identity.
        bound: half the side of the box, :math:`B`.
        inverse: map back instead of forth.

    Returns:
        The mapped values ``[...]`` and the log-derivative of *this* direction ``[...]``.

    Example:
        >>> piecewise_linear(torch.tensor([0.3, 7.0]), torch.zeros(2, 8), bound=5.0)[0]
        tensor([0.3000, 7.0000])
    """
    bins = int(heights.shape[-1])
    share = _shares(heights)
    bottom = _starts(share, bound)
    left = torch.arange(bins, dtype=value.dtype, device=value.device) * (2 * bound / bins) - bound
    box = value.clamp(-bound, bound)
    index = _bin_of(box, bottom if inverse else left)
    slope, left, bottom = bins * _pick(share, index), _pick(left, index), _pick(bottom, index)
    tails = None if ends is None else _log_slopes(ends)
    if inverse:
        return _with_tails(value, left + (box - bottom) / slope, -torch.log(slope), bound, tails, inverse)
    return _with_tails(value, bottom + (box - left) * slope, torch.log(slope), bound, tails, inverse)


def _log_slopes(raw: Tensor) -> Ends:
    left, right = bounded_log_scale(raw, MAX_LOG_SLOPE).unbind(-1)
    return left, right


def piecewise_quadratic(
    value: Tensor, widths: Tensor, slopes: Tensor, *, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""A spline whose slope is a continuous chain of straight pieces.

    With slopes :math:`v_0, v_1` at the ends of a bin and :math:`s = (v_0 + v_1) / 2`,

    .. math::
        \eta = \frac{\xi (v_0 (1 + \bar\xi) + v_1 \xi)}{2 s}, \qquad \frac{dy}{dx} = v_0 \bar\xi + v_1 \xi
        = \sqrt{v_0^2 \bar\eta + v_1^2 \eta} =: v, \qquad \xi = \frac{2 s \eta}{v_0 + v}.

    The slopes are the exponentials of the raw ones times one number, such that the spline ends in the corner.

    Args:
        value: inputs ``[...]`` (outputs, if ``inverse``).
        widths: raw bin widths ``[..., K]``; all zero gives equal bins.
        slopes: raw slopes at the inner knots ``[..., K - 1]``, for the slope 1 at the outer ones and tails that are the
            identity; or at all knots ``[..., K + 1]``, for tails that go on with the outer slopes.
        bound: half the side of the box, :math:`B`.
        inverse: map back instead of forth.

    Returns:
        The mapped values ``[...]`` and the log-derivative of *this* direction ``[...]``.

    Example:
        >>> x, raw = torch.tensor([0.3, 7.0]), torch.zeros(2, 8)
        >>> piecewise_quadratic(x, raw, raw[:, 1:], bound=5.0)[0]
        tensor([0.3000, 7.0000])
    """
    width = _shares(widths)
    slope = torch.exp(bounded_log_scale(slopes, MAX_LOG_SLOPE))
    fixed = slopes.shape[-1] < width.shape[-1]
    middle = (width[..., 1:] + width[..., :-1]) / 2  # what an inner knot's slope adds to the height
    outer = (width[..., :1] + width[..., -1:]) / 2
    if fixed:
        slope = slope * ((1 - outer) / (slope * middle).sum(-1, keepdim=True))
        slope = pad(slope, (1, 1), value=1.0)
    else:
        added = torch.cat([width[..., :1] / 2, middle, width[..., -1:] / 2], -1)
        slope = slope / (slope * added).sum(-1, keepdim=True)
    height = width * (slope[..., 1:] + slope[..., :-1]) / 2
    left, bottom = _starts(width, bound), _starts(height, bound)

    box = value.clamp(-bound, bound)
    index = _bin_of(box, bottom if inverse else left)
    ends = None if fixed else (torch.log(slope[..., 0]), torch.log(slope[..., -1]))
    v0, v1 = _pick(slope, index), _pick(slope, index + 1)
    width, height = 2 * bound * _pick(width, index), 2 * bound * _pick(height, index)
    left, bottom = _pick(left, index), _pick(bottom, index)
    if inverse:
        eta = ((box - bottom) / height).clamp(0, 1)  # rounding alone can lead out of the bin
        v = torch.sqrt(v0.square() * (1 - eta) + v1.square() * eta)
        return _with_tails(value, left + width * (v0 + v1) * eta / (v0 + v), -torch.log(v), bound, ends, inverse)
    xi = ((box - left) / width).clamp(0, 1)
    eta = xi * (v0 * (2 - xi) + v1 * xi) / (v0 + v1)
    return _with_tails(value, bottom + height * eta, torch.log(v0 * (1 - xi) + v1 * xi), bound, ends, inverse)


def piecewise_cubic(
    value: Tensor,
    widths: Tensor,
    heights: Tensor,
    ends: Tensor | None = None,
    *,
    bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A monotone cubic spline through knots that are learned.

    In a bin of mean slope :math:`s`, with slopes :math:`\alpha s, \beta s` at its ends,

    .. math::
        \eta = \xi (\alpha \bar\xi^2 + (3 - \beta) \xi \bar\xi + \xi^2), \qquad
        \frac{d\eta}{d\xi} = \alpha \bar\xi^2 + 2 (3 - \alpha - \beta) \xi \bar\xi + \beta \xi^2.

    The slope at an inner knot is Steffen's, the least of twice each neighbour's mean slope and that of the parabola
    through three knots; so :math:`0 < \alpha, \beta \le 2`, and the spline increases. At an outer knot it is 1, or
    twice the bin's mean slope where that is less, if the tails are the identity; and else at most twice that slope.
    The inverse is Newton's, from that of the rational-quadratic spline of the same knots and slopes, which is so close
    that a fixed, small number of steps reaches the last digit.

    Args:
        value: inputs ``[...]`` (outputs, if ``inverse``).
        widths: raw bin widths ``[..., K]``; all zero gives equal bins.
        heights: raw bin heights ``[..., K]``.
        ends: raw slopes at the outer knots ``[..., 2]``, with which the tails go on; zero is the slope of the bin
            beside. ``None`` for tails that are the identity.
        bound: half the side of the box, :math:`B`.
        inverse: map back instead of forth.

    Returns:
        The mapped values ``[...]`` and the log-derivative of *this* direction ``[...]``.

    Example:
        >>> x, raw = torch.tensor([0.3, 7.0]), torch.zeros(2, 8)
        >>> piecewise_cubic(x, raw, raw, bound=5.0)[0]
        tensor([0.3000, 7.0000])
    """
    width, height = _shares(widths), _shares(heights)
    mean = height / width
    before, after, w0, w1 = mean[..., :-1], mean[..., 1:], width[..., :-1], width[..., 1:]
    parabola = (before * w1 + after * w0) / (w0 + w1)
    inner = torch.minimum(parabola, 2 * torch.minimum(before, after))
    corners = torch.stack([mean[..., 0], mean[..., -1]], -1)
    if ends is None:
        outer = (2 * corners).clamp(max=1)
    else:
        outer = corners * 2 * torch.sigmoid(bounded_log_scale(ends, MAX_LOG_SLOPE))
    slope = torch.cat([outer[..., :1], inner, outer[..., 1:]], -1)
    left, bottom = _starts(width, bound), _starts(height, bound)

    box = value.clamp(-bound, bound)
    index = _bin_of(box, bottom if inverse else left)
    tails = None if ends is None else (torch.log(slope[..., 0]), torch.log(slope[..., -1]))
    s = _pick(mean, index)
    a, b = _pick(slope, index) / s, _pick(slope, index + 1) / s
    width, height = 2 * bound * _pick(width, index), 2 * bound * _pick(height, index)
    left, bottom = _pick(left, index), _pick(bottom, index)
    if inverse:
        xi, slope_there = _cubic_root(((box - bottom) / height).clamp(0, 1), a, b)
        return _with_tails(value, left + width * xi, -torch.log(s * slope_there), bound, tails, inverse)
    eta, slope_there = _cubic(((box - left) / width).clamp(0, 1), a, b)
    return _with_tails(value, bottom + height * eta, torch.log(s * slope_there), bound, tails, inverse)


def _cubic(xi: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The cubic of the unit square with slopes ``a`` and ``b`` at its corners, and its slope."""
    xi_bar = 1 - xi
    eta = xi * (a * xi_bar.square() + (3 - b) * xi * xi_bar + xi.square())
    return eta, a * xi_bar.square() + 2 * (3 - a - b) * xi * xi_bar + b * xi.square()


def _cubic_root(eta: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cubic of the unit square is ``eta``, and its slope there; differentiable to second order."""
    # Seen from the corner that is nearer in eta, the root keeps its relative precision.
    from_left = eta <= 0.5
    eta = torch.where(from_left, eta, 1 - eta)
    a, b = torch.where(from_left, a, b), torch.where(from_left, b, a)
    goal, alpha, beta = eta.detach(), a.detach(), b.detach()
    m = alpha * (1 - goal) - beta * goal
    q = m.abs() + torch.sqrt(m.square() + 4 * goal * (1 - goal))
    xi = torch.where(m >= 0, 2 * goal / (q + 2 * goal), q / (q + 2 * (1 - goal)))
    for _ in range(NEWTON_STEPS):
        reached, slope = _cubic(xi, alpha, beta)
        xi = xi + (goal - reached) / slope
    # Two more steps change no digit, and carry the first and second derivative by the implicit function theorem.
    for _ in range(2):
        reached, slope = _cubic(xi, a, b)
        xi = xi + (eta - reached) / slope
    return torch.where(from_left, xi, 1 - xi), _cubic(xi, a, b)[1]
