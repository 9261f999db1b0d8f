r"""Univariate maps made to increase by a positive slope, and the affine map that keeps volumes.

Unconstrained monotonic: Wehenkel, Louppe (2019), *Unconstrained monotonic neural networks*, arXiv:1908.05164. Sums of
squares: Jaini, Selby, Yu (2019), *Sum-of-squares polynomial flow*, arXiv:1905.02325. Bernstein polynomials: Ramasinghe
et al. (2021), *Robust normalizing flows using Bernstein-type polynomials*, arXiv:2102.03509, and Sick et al. (2020),
arXiv:2004.00464. Volume preserving: Sorrenson, Rother, Köthe (2020), *Disentanglement by nonlinear ICA with general
incompressible-flow networks (GIN)*, arXiv:2001.04872.

The first three are free on :math:`[-B, B]` and go on outside as straight lines with the slope that they have at the
bound. So each maps the real line onto the real line, and nothing overflows that is not itself out of range.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.numerics import bounded_log_scale, gauss_legendre, monotone_root, positive, powers
from pyroflows.transforms.maps import NumericMap, UnivariateMap

__all__ = ["Bernstein", "SumOfSquares", "UnconstrainedMonotonic", "VolumePreserving"]

MIN_SLOPE = 1e-3
"""The smallest slope of a polynomial map: part of the map, so that its log-slope is exact."""


def _rule(nodes: int) -> tuple[list[float], list[float]]:
    """A quadrature rule whose last node, of no weight, is the end itself: the slope comes with the integral."""
    where, weights = gauss_legendre(nodes)
    return [*where, 1.0], weights


class _OnInterval(NumericMap):
    """A map that is free on ``[-bound, bound]`` and has straight tails; slope and value are continuous."""

    def __init__(self, bound: float) -> None:
        if not bound > 0 or not math.isfinite(bound):
            raise OptionError(f"bound must be positive and finite, got {bound}.")
        self.bound = float(bound)

    @abstractmethod
    def _inside(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log-slope ``[...]`` for ``x`` ``[...]`` in ``[-bound, bound]``."""

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The map and its log-slope."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        nearest = wide.clamp(-self.bound, self.bound)
        y, log_slope = self._inside(nearest, params.to(dtype))
        return (y + (wide - nearest) * torch.exp(log_slope)).to(x.dtype), log_slope

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The root: searched for between the bounds, and on a tail that of a straight line.

        Raises:
            InverseNotConverged: a parameter is NaN.
        """
        dtype = torch.promote_types(y.dtype, torch.float32)
        wide = y.to(dtype).expand(torch.broadcast_shapes(y.shape, params.shape[:-1]))
        params = params.to(dtype)
        with torch.no_grad():
            largest = torch.finfo(dtype).max
            end = torch.full_like(wide, self.bound)
            (low, log_below), (high, log_above) = self._inside(-end, params), self._inside(end, params)
            below = -self.bound + (wide - low).clamp(max=0) * torch.exp(-log_below)
            above = (wide - high).clamp(min=0) * torch.exp(-log_above)
            start = below + above + 2 * self.bound * ((wide - low) / (high - low)).clamp(0, 1)
        root = monotone_root(lambda x: self.forward(x, params), wide, start=start.clamp(-largest, largest))
        return root.x.to(y.dtype), -root.log_slope


class UnconstrainedMonotonic(_OnInterval):
    r"""The integral of a positive network: :math:`y = t + \int_0^x e^{s(u)} du` (arXiv:1908.05164).

    The integrand is a small network of each dimension's own,
    :math:`s(u) = r + \sum_h v_h \tanh(a_h u + b_h)` with :math:`|a_h| < 1.5`, :math:`\sum_h |v_h| < 4` and
    :math:`|r| < 3` at every parameter value. These limits make it analytic in a strip around the real line of known
    width, so that a Gauss-Legendre rule of fixed size has an error that is known too: for a bound of 5 that of the
    value is below 1e-11 in float64 (56 nodes) and below 1e-6, its rounding, in float32 (40 nodes). Outside
    of ``[-bound, bound]`` it goes on straight.

    Args:
        hidden_units: the width :math:`H` of the integrand's network; ``3 H + 2`` parameters a dimension.
        bound: where the straight tails begin, at most 5.

    Raises:
        OptionError: ``hidden_units`` is not a positive integer, or the bound is out of range.

    Example:
        >>> from pyroflows.transforms import Elementwise
        >>> Elementwise(UnconstrainedMonotonic(), 2)(torch.tensor([0.5, -7.0])).detach()
        tensor([ 0.5000, -7.0000])
    """

    steepest, amplitude, max_log_slope = 1.5, 4.0, 3.0

    def __init__(self, hidden_units: int = 8, bound: float = 5.0) -> None:
        super().__init__(bound)
        if not isinstance(hidden_units, int) or hidden_units < 1 or bound > 5:
            raise OptionError(f"expected hidden_units >= 1 and bound <= 5, got {hidden_units!r} and {bound}.")
        self.hidden_units = hidden_units
        self.params = 3 * hidden_units + 2
        self.offsets = [3 * ((2 * h + 1) / hidden_units - 1) for h in range(hidden_units)]
        self.rules = _rule(40), _rule(56)

    def _inside(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        units = self.hidden_units
        slopes, offsets, heights, rest = params.split([units, units, units, 2], -1)
        shift, raw_scale = rest.unbind(-1)
        a = self.steepest * torch.tanh((slopes + 1) / self.steepest)
        b = offsets + params.new_tensor(self.offsets)
        size = 1 + units / self.amplitude**2 * heights.square().sum(-1, keepdim=True)
        v = heights * torch.rsqrt(size)  # sum |v| <= sqrt(units) |v| < amplitude
        nodes, weights = (x.new_tensor(part) for part in self.rules[x.dtype == torch.float64])
        hidden = torch.tanh((a * x.unsqueeze(-1)).unsqueeze(-1) * nodes + b.unsqueeze(-1))
        log_g = (v.unsqueeze(-2) @ hidden).squeeze(-2) + bounded_log_scale(raw_scale, self.max_log_slope).unsqueeze(-1)
        return shift + x * (torch.exp(log_g[..., :-1]) @ weights), log_g[..., -1]


class SumOfSquares(_OnInterval):
    r"""The integral of a sum of squared polynomials (arXiv:1905.02325):
    :math:`y = t + \int_0^x (f + \sum_{k=1}^K q_k(u / B)^2) du` with polynomials :math:`q_k` of degree :math:`r`.

    The integral is exact: a Gauss-Legendre rule of :math:`r + 1` nodes. The floor :math:`f` = 1/1000 is part of the
    map, in place of an epsilon in its log-slope. Outside of ``[-bound, bound]``, where a polynomial of degree
    :math:`2 r + 1` would leave the range of floating-point numbers, the map goes on straight.

    Args:
        degree: the degree :math:`r` of the polynomials that are squared, at most 16.
        sums: how many squares are added, :math:`K`; ``K (r + 1) + 1`` parameters a dimension.
        bound: where the straight tails begin, :math:`B`.

    Raises:
        OptionError: a number is out of range.

    Example:
        >>> SumOfSquares(degree=4, sums=3).params
        16
    """

    def __init__(self, degree: int = 4, sums: int = 3, bound: float = 5.0) -> None:
        super().__init__(bound)
        if not isinstance(degree, int) or not isinstance(sums, int) or not 0 <= degree <= 16 or sums < 1:
            raise OptionError(f"expected integers 0 <= degree <= 16 and sums >= 1, got {degree!r} and {sums!r}.")
        self.degree, self.sums = degree, sums
        self.params = sums * (degree + 1) + 1
        self.rule = _rule(degree + 1)
        # One square is the constant; a trace of another power in each other one gives each a gradient of its own.
        start = [[0.0] * (degree + 1) for _ in range(sums)]
        start[0][0] = math.sqrt(1 - MIN_SLOPE)
        for k in range(1, sums):
            start[k][k % (degree + 1)] = 0.1 * k / sums
        self.start = [value for row in start for value in row]

    def _inside(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, coefficients = params[..., 0], params[..., 1:] + params.new_tensor(self.start)
        nodes, weights = (x.new_tensor(part) for part in self.rule)
        terms = coefficients.unflatten(-1, (self.sums, -1)) * powers(x / self.bound, self.degree).unsqueeze(-2)
        slopes = MIN_SLOPE + (terms @ powers(nodes, self.degree).mT).square().sum(-2)
        return shift + x * (slopes[..., :-1] @ weights), torch.log(slopes[..., -1])


class Bernstein(_OnInterval):
    r"""An increasing Bernstein polynomial on :math:`[-B, B]` (arXiv:2004.00464):
    :math:`y = \sum_{k=0}^n \theta_k \binom{n}{k} z^k (1 - z)^{n-k}`, :math:`z = (x + B) / 2 B`,
    with :math:`\theta_k` a shift plus the running sum of positive steps.

    Outside it goes on straight. No step is below :math:`2 B / 1000 n`, so no slope is below 1/1000.

    Args:
        degree: the degree :math:`n`, at most 100; ``n + 1`` parameters a dimension.
        bound: where the straight tails begin, :math:`B`.

    Raises:
        OptionError: a number is out of range.

    Example:
        >>> from pyroflows.transforms import Elementwise
        >>> Elementwise(Bernstein(), 2)(torch.tensor([0.5, -7.0])).detach()
        tensor([ 0.5000, -7.0000])
    """

    def __init__(self, degree: int = 16, bound: float = 5.0) -> None:
        super().__init__(bound)
        if not isinstance(degree, int) or not 1 <= degree <= 100:
            raise OptionError(f"degree must be an integer in 1 .. 100, got {degree!r}.")
        self.degree = degree
        self.params = degree + 1

    def _inside(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        n, width = self.degree, 2 * self.bound
        left, right = powers((x + self.bound) / width, n), powers((self.bound - x) / width, n)
        steps = width / n * positive(params[..., 1:], MIN_SLOPE)
        half = steps.sum(-1, keepdim=True) / 2
        knots = params[..., :1] + torch.cat([-half, steps.cumsum(-1) - half], -1)
        value_basis = left * right.flip(-1) * x.new_tensor([float(math.comb(n, k)) for k in range(n + 1)])
        slope_basis = left[..., :-1] * right[..., :-1].flip(-1)
        slope_basis = slope_basis * x.new_tensor([float(math.comb(n - 1, k)) for k in range(n)])
        return (value_basis * knots).sum(-1), torch.log((slope_basis * steps).sum(-1) * (n / width))


class VolumePreserving(UnivariateMap):
    r"""An affine map whose log-scales sum to zero over the coordinates that it moves (GIN, arXiv:2001.04872):
    :math:`y_i = e^{s_i - \bar s} x_i + t_i`.

    It reads the parameters of all its coordinates together, so `Coupling` and `Elementwise` take it and
    `Autoregressive`, which finds one coordinate at a time, does not. A single coordinate is only shifted.

    Args:
        max_log_scale: the bound of each :math:`|s_i|`.

    Raises:
        OptionError: the bound is not positive.

    Example:
        >>> from pyroflows.transforms import Coupling
        >>> log_det = Coupling(VolumePreserving(), 6).forward_and_log_det(torch.randn(4, 6))[1]
        >>> bool(log_det.abs().max() < 1e-6)
        True
    """

    params = 2
    joint = True

    def __init__(self, max_log_scale: float = 3.0) -> None:
        if not max_log_scale > 0:
            raise OptionError(f"max_log_scale must be positive, got {max_log_scale}.")
        self.max_log_scale = max_log_scale

    def _shift_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        log_scale = bounded_log_scale(raw, self.max_log_scale)
        return shift, log_scale - log_scale.mean(-1, keepdim=True)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled and shifted, and the log-scales."""
        shift, log_scale = self._shift_and_log_scale(params)
        y = x * torch.exp(log_scale) + shift
        return y, log_scale.expand_as(y)

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Shifted back and unscaled, and minus the log-scales."""
        shift, log_scale = self._shift_and_log_scale(params)
        x = (y - shift) * torch.exp(-log_scale)
        return x, -log_scale.expand_as(x)
