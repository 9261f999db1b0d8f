r"""Maps that change the tails of a density: heavier, lighter, skewed, or cut off softly.

Jones, Pewsey (2009), *Sinh-arcsinh distributions*, Biometrika 96, 761; Hickling, Prangle (2024), *Flexible tails for
normalizing flows*, arXiv:2406.16971; Andrade (2024), *Stable training of normalizing flows for high-dimensional
variational inference*, arXiv:2402.16408.

No number of a dtype is out of reach: where a map grows or shrinks exponentially it goes on as a straight line beyond
a point that no sample reaches, with the same value and slope there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyroflows.errors import OptionError
from pyroflows.numerics import bounded_log_scale, positive, sum_last
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.maps import UnivariateMap

__all__ = ["SinhArcsinh", "SoftClip", "SoftLog", "TailTransform"]

FARTHEST = 25.0
"""Beyond so many standard deviations a tail transform is straight; a normal number lies there once in 1e137."""
DEEPEST = 40.0
"""How many units a soft log grows logarithmically before it is straight: up to 1e17 times its scale."""


def _side(value: Tensor) -> Tensor:
    """1 or -1: the sign, without a zero that would kill a gradient."""
    return torch.where(value >= 0, 1.0, -1.0).to(value.dtype)


def _in_float32(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(value.dtype, torch.float32)
    return value.to(dtype), params.to(dtype)


class SinhArcsinh(UnivariateMap):
    r"""Skewness and tail weight: :math:`y = \sinh(\delta \operatorname{arcsinh} x + \epsilon)`.

    Of a normal :math:`x` it makes Jones and Pewsey's sinh-arcsinh distribution, with tails like those of
    :math:`|x|^\delta`: heavier for :math:`\delta > 1`, lighter for :math:`\delta < 1`, skewed to the right for
    :math:`\epsilon > 0`. The inverse is of the same form. (Biometrika 96, 761.)

    Args:
        max_log_power: :math:`\log \delta` stays in ``(-max_log_power, max_log_power)``.
        max_skew: :math:`\epsilon` stays in ``(-max_skew, max_skew)``.

    Raises:
        OptionError: a bound is not positive.

    Example:
        >>> SinhArcsinh().forward(torch.tensor([2.0]), torch.zeros(1, 2))[0]
        tensor([2.])
    """

    params = 2

    def __init__(self, max_log_power: float = 1.5, max_skew: float = 4.0) -> None:
        if not max_log_power > 0 or not max_skew > 0:
            raise OptionError(f"expected positive bounds, got {max_log_power} and {max_skew}.")
        self.max_log_power, self.max_skew = max_log_power, max_skew

    def _read(self, params: Tensor) -> tuple[Tensor, Tensor]:
        skew, power = params.unbind(-1)
        return bounded_log_scale(skew, self.max_skew), bounded_log_scale(power, self.max_log_power)

    @staticmethod
    def _bend(value: Tensor, inner: Tensor, log_power: Tensor) -> tuple[Tensor, Tensor]:
        """``sinh(inner)`` and its log-slope, where ``inner`` grows by the power times ``arcsinh(value)``."""
        log_cosh = torch.logaddexp(inner, -inner) - math.log(2)
        return torch.sinh(inner), log_power + log_cosh - 0.5 * _log_one_plus_square(value)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The formula."""
        value, params = _in_float32(x, params)
        skew, log_power = self._read(params)
        y, log_slope = self._bend(value, torch.exp(log_power) * _arcsinh(value) + skew, log_power)
        return y.to(x.dtype), log_slope

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The formula with the power ``1 / delta``."""
        value, params = _in_float32(y, params)
        skew, log_power = self._read(params)
        x, log_slope = self._bend(value, torch.exp(-log_power) * (_arcsinh(value) - skew), -log_power)
        return x.to(y.dtype), log_slope


def _arcsinh(value: Tensor) -> Tensor:
    """``arcsinh`` without a square that overflows."""
    far = value.abs() > 1e4  # there sqrt(1 + v^2) is |v| to 1e-8, and log 2|v| is off by less than 1e-8 / 4
    near = torch.asinh(torch.where(far, torch.ones_like(value), value))
    size = torch.where(far, value.abs(), torch.ones_like(value))
    beyond = math.log(2) + torch.log(size) + 0.25 / size / size
    return torch.where(far, _side(value) * beyond, near)


def _log_one_plus_square(value: Tensor) -> Tensor:
    """``log(1 + v^2)`` without a square that overflows."""
    far = value.abs() > 1
    small = torch.where(far, 1 / torch.where(far, value, torch.ones_like(value)), value)
    size = torch.where(far, value.abs(), torch.ones_like(value))
    return torch.log1p(small.square()) + 2 * torch.log(size)


class TailTransform(UnivariateMap):
    r"""Of normal tails, tails that fall like a power: the identity up to a threshold :math:`\tau`, and beyond it

    .. math::
        y = \operatorname{sgn}(x) \Bigl(\tau + \frac{e^{\lambda (a(|x|) - a(\tau))} - 1}{\lambda\, a'(\tau)}\Bigr),
        \qquad a(z) = -\log \operatorname{erfc}(z / \sqrt 2).

    :math:`\lambda` is the tail weight of that side: what a normal :math:`x` is beyond :math:`\tau` becomes generalised
    Pareto, as far out as a Student's t with :math:`1 / \lambda` degrees of freedom. The slope has no jump. With a
    threshold of zero it is the tail transform of Hickling and Prangle (2024, arXiv:2406.16971). Beyond 25 standard
    deviations it is straight.

    Args:
        start: the tail weight :math:`\lambda` at zero parameters; it stays within a factor of :math:`e^3`.
        threshold: :math:`\tau`.

    Raises:
        OptionError: ``start`` is not in ``(0, 0.1]``, or ``threshold`` not in ``[0, 8]``.

    Example:
        >>> TailTransform().forward(torch.tensor([1.0, 5.0]), torch.zeros(2, 2))[0]
        tensor([ 1.0000, 10.8067])
    """

    params = 2

    def __init__(self, start: float = 0.1, threshold: float = 2.0) -> None:
        if not 0 < start <= 0.1:  # exp(2 a(25)) times 1e20 is a number that float64 can hold
            raise OptionError(f"expected 0 < start <= 0.1, got {start}.")
        if not 0 <= threshold <= 8:
            raise OptionError(f"expected 0 <= threshold <= 8, got {threshold}.")
        self.start, self.threshold = start, float(threshold)

    def _read(self, value: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The side, how far out on it, the tail weight, and the depth and the log-hazard of the threshold."""
        side = _side(value)
        left, right = params.unbind(-1)
        weight = self.start * torch.exp(bounded_log_scale(torch.where(side > 0, right, left), 3.0))
        return side, side * value, weight, *_depth(torch.full_like(weight, self.threshold))

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The formula."""
        value, params = _in_float32(x, params)
        side, z, weight, depth_0, log_hazard_0 = self._read(value, params)
        near = z.clamp(self.threshold, FARTHEST)
        depth, log_hazard = _depth(near)
        grown = weight * (depth - depth_0)
        log_slope = grown + log_hazard - log_hazard_0
        y = z.clamp(max=self.threshold) + torch.expm1(grown) / weight * torch.exp(-log_hazard_0)
        y = y + torch.exp(log_slope) * (z - FARTHEST).clamp(min=0)
        return (side * y).to(x.dtype), log_slope

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's steps for ``a(z)``, from above and so many that they have converged."""
        value, params = _in_float32(y, params)
        side, reached, weight, depth_0, log_hazard_0 = self._read(value, params)
        beyond = (reached - self.threshold).clamp(min=0)
        depth = depth_0 + torch.log1p(weight * torch.exp(log_hazard_0) * beyond) / weight
        deepest, log_hazard = _depth(torch.full_like(depth, FARTHEST))
        inside = torch.minimum(depth, deepest)
        z = _from_depth(inside)
        log_slope = weight * (inside - depth_0) + _depth(z)[1] - log_hazard_0
        x = reached.clamp(max=self.threshold) + (z - self.threshold)
        x = x + torch.expm1(weight * (depth - inside)) / weight * torch.exp(-log_hazard)
        return (side * x).to(y.dtype), -log_slope


def _depth(z: Tensor) -> tuple[Tensor, Tensor]:
    """``-log erfc(z / sqrt 2)`` for ``z >= 0``, convex and increasing, and the log of its slope."""
    log_tail = torch.log(torch.special.erfcx(z / math.sqrt(2)))
    return 0.5 * z.square() - log_tail, 0.5 * math.log(2 / math.pi) - log_tail


def _from_depth(depth: Tensor) -> Tensor:
    with torch.no_grad():  # both bounds lie above the root, from where Newton's steps come down
        z = torch.minimum(torch.sqrt(2 * depth), math.sqrt(math.pi / 2) * depth)
        for _ in range(6):
            found, log_slope = _depth(z)
            z = z + (depth - found) * torch.exp(-log_slope)
    for _ in range(2):  # these two give the first and the second derivative
        found, log_slope = _depth(z)
        z = z + (depth - found) * torch.exp(-log_slope)
    return z


class SoftLog(UnivariateMap):
    r"""The identity up to a threshold, a logarithm beyond it: with :math:`e = \max(|x| - t, 0)`,

    .. math:: y = \operatorname{sgn}(x) \Bigl(\min(|x|, t) + \frac{\log(1 + \beta e)}{\beta}\Bigr).

    Pulls in values that a deep flow has sent far out; its slope has no jump. It is straight where the logarithm
    exceeds 40. (Andrade 2024, arXiv:2402.16408, with :math:`\beta = 1` and :math:`t` fixed.)

    Args:
        threshold: :math:`t` at zero parameters.
        strength: :math:`\beta` at zero parameters.

    Raises:
        OptionError: one of them is not positive.

    Example:
        >>> SoftLog().forward(torch.tensor([2.0, 1e6]), torch.zeros(2, 2))[0]
        tensor([ 2.0000, 16.8155])
    """

    params = 2

    def __init__(self, threshold: float = 3.0, strength: float = 1.0) -> None:
        if not threshold > 0 or not strength > 0:
            raise OptionError(f"expected threshold > 0 and strength > 0, got {threshold} and {strength}.")
        self.threshold, self.strength = threshold, strength

    def _read(self, params: Tensor) -> tuple[Tensor, Tensor]:
        threshold, strength = params.unbind(-1)
        return self.threshold * positive(threshold), self.strength * positive(strength)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The formula."""
        value, params = _in_float32(x, params)
        (threshold, strength), side = self._read(params), _side(value)
        within = torch.minimum(side * value, threshold)
        excess = side * value - within
        near = torch.minimum(excess, math.expm1(DEEPEST) / strength)
        log_slope = -torch.log1p(strength * near)
        y = within - log_slope / strength + (excess - near) * torch.exp(log_slope)
        return (side * y).to(x.dtype), log_slope

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """An exponential beyond the threshold."""
        value, params = _in_float32(y, params)
        (threshold, strength), side = self._read(params), _side(value)
        within = torch.minimum(side * value, threshold)
        excess = side * value - within
        near = torch.minimum(excess, DEEPEST / strength)
        log_slope = strength * near
        x = within + torch.expm1(log_slope) / strength + (excess - near) * torch.exp(log_slope)
        return (side * x).to(y.dtype), log_slope


class SoftClip(FlowTransform):
    r"""Every real number into an interval, nearly unchanged in its middle:

    .. math:: y = l + s \log \frac{1 + e^{(x - l) / s}}{1 + e^{(x - h) / s}}, \qquad
        x = y + s \log \frac{1 - e^{-(y - l) / s}}{1 - e^{-(h - y) / s}}.

    Args:
        input_dim: the number of coordinates.
        low: the lower bound :math:`l`.
        high: the upper bound :math:`h`.
        softness: the width :math:`s` of the bend at each bound.
        context_dim: accepted and ignored, as every registered layer accepts one.

    Raises:
        OptionError: the bounds are out of order, or ``softness`` is not positive.

    Example:
        >>> SoftClip(3, low=-1.0, high=1.0, softness=0.1)(torch.tensor([-50.0, 0.5, 50.0]))
        tensor([-1.0000,  0.4993,  1.0000])
    """

    sign = 1

    def __init__(
        self, input_dim: int, low: float = -5.0, high: float = 5.0, softness: float = 1.0, *, context_dim: int = 0
    ) -> None:
        super().__init__()
        if not low < high or not softness > 0 or not math.isfinite(high - low):
            raise OptionError(f"expected finite low < high and softness > 0, got {low}, {high} and {softness}.")
        self.input_dim, self.low, self.high, self.softness = input_dim, float(low), float(high), float(softness)
        self.codomain = constraints.independent(constraints.interval(self.low, self.high), 1)
        width = (self.high - self.low) / self.softness
        # log(e^w - 1) and log(1 - e^-w)
        self._log_gain = width + math.log(-math.expm1(-width))
        self._log_share = math.log(-math.expm1(-width))

    def _log_slope(self, x: Tensor) -> Tensor:
        s = self.softness
        return logsigmoid((x - self.low) / s) + logsigmoid((self.high - x) / s) + self._log_share

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formula, measured from the nearer bound."""
        self.check_width(x, self.input_dim)
        value = x.to(torch.promote_types(x.dtype, torch.float32))
        upper = value > (self.low + self.high) / 2
        beyond = torch.where(upper, self.low - value, value - self.high) / self.softness
        inward = self.softness * torch.logaddexp(self._log_gain + logsigmoid(beyond), torch.zeros_like(value))
        y = torch.where(upper, self.high - inward, self.low + inward)
        return y.to(x.dtype), sum_last(self._log_slope(value))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formula. A bound itself is no image; what comes back for it is finite."""
        self.check_width(y, self.input_dim)
        value = y.to(torch.promote_types(y.dtype, torch.float32))
        smallest = torch.finfo(value.dtype).tiny

        def log_room(distance: Tensor) -> Tensor:
            return torch.log(-torch.expm1(-(distance / self.softness).clamp_min(smallest)))

        x = value + self.softness * (log_room(value - self.low) - log_room(self.high - value))
        return x.to(y.dtype), -sum_last(self._log_slope(x))
