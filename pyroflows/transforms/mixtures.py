r"""Univariate maps that are means of affine functions on a curved scale: deep sigmoids, mixtures, Gaussianization.

Huang, Krueger, Lacoste, Courville (2018), *Neural autoregressive flows*, arXiv:1804.00779; Ho, Chen, Srinivas, Duan,
Abbeel (2019), *Flow++*, arXiv:1902.00275; Meng, Song, Song, Ermon (2020), *Gaussianization flows*, arXiv:2003.01941.

All are :math:`y = \psi^{-1}(\sum_h w_h \psi(a_h x + b_h))` with positive :math:`a_h` and weights that sum to one. Such
a mean lies between its smallest and largest term, so it maps the real line onto the real line, and the root
:math:`x` of :math:`y` lies between the smallest and the largest :math:`(y - b_h) / a_h`: the search has its bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.numerics import (
    bounded_log_scale,
    deep_sigmoid,
    elu_mean,
    leaky_relu_mean,
    logistic_mean,
    mixture_parameters,
    mixture_weights,
    monotone_root,
    normal_mean,
    positive,
)
from pyroflows.transforms.maps import NumericMap

__all__ = ["DeepSigmoid", "DenseSigmoid", "Gaussianization", "LogisticMixture"]


class _Scale(NamedTuple):
    """A mean, and how far apart its terms are at parameters that are all zero."""

    mean: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    spread: float
    variance: float = math.inf  # of the distribution function that psi is
    unit: float = 1.0  # psi is the mean's own function of unit times c

    def start(self, terms: int) -> tuple[float, list[float]]:
        """The slope and the offsets of the terms at parameters that are all zero.

        Terms that were all equal would get equal gradients for ever, so they start spread about zero, with a slope that
        gives the mixture the variance of one term: near the identity.
        """
        slope = 1 / math.sqrt(1 - self.spread**2 * (1 - 1 / terms**2) / (3 * self.variance))
        return slope, [slope * self.spread * ((2 * h + 1) / terms - 1) for h in range(terms)]


LOGISTIC = _Scale(logistic_mean, spread=1.0, variance=math.pi**2 / 3)
NORMAL = _Scale(normal_mean, spread=0.55, variance=1.0)
SCALES = {
    "sigmoid": LOGISTIC,
    "tanh": _Scale(logistic_mean, spread=0.5, variance=math.pi**2 / 12, unit=2.0),
    "ELU": _Scale(elu_mean, spread=0.5),
    "LeakyReLU": _Scale(leaky_relu_mean, spread=0.1),
}


class _Mean(NumericMap):
    """A mean of ``terms`` affine functions, or ``depth`` such means one after the other."""

    def __init__(self, scale: _Scale, terms: int, depth: int = 1) -> None:
        if not isinstance(terms, int) or terms < 1 or not isinstance(depth, int) or depth < 1:
            raise OptionError(f"expected positive numbers of terms and layers, got {terms!r} and {depth!r}.")
        self.scale, self.terms, self.depth = scale, terms, depth
        self.params = 3 * terms * depth
        self.slope, self.offsets = scale.start(terms)

    def _layers(self, params: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Slopes, offsets and weights ``[..., terms]`` of each mean."""
        offsets = params.new_tensor(self.offsets)
        return [mixture_parameters(raw, self.slope, offsets) for raw in params.split(3 * self.terms, -1)]

    def _apply(self, x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        unit, largest = self.scale.unit, torch.finfo(x.dtype).max
        terms = (torch.addcmul(b, a, x.unsqueeze(-1)) * unit).clamp(-largest, largest)
        y, log_slope = self.scale.mean(terms, w, a)
        return y / unit, log_slope

    def _search(self, y: Tensor, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            largest = torch.finfo(y.dtype).max
            each = ((y.unsqueeze(-1) - b) / a).clamp(-largest, largest)
            bracket = each.amin(-1), each.amax(-1)
            start = (w * each).sum(-1)
        root = monotone_root(lambda x: self._apply(x, a, b, w), y, start=start, bracket=bracket)
        return root.x, -root.log_slope

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and its log-slope."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        y, total = x.to(dtype), torch.zeros((), dtype=dtype, device=x.device)
        for layer in self._layers(params.to(dtype)):
            y, log_slope = self._apply(y, *layer)
            total = total + log_slope
        return y.to(x.dtype), total

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The root between the smallest and the largest term's, layer by layer.

        Raises:
            InverseNotConverged: a value is NaN for a finite parameter, or a parameter is NaN.
        """
        dtype = torch.promote_types(y.dtype, torch.float32)
        x = y.to(dtype).expand(torch.broadcast_shapes(y.shape, params.shape[:-1]))
        total = torch.zeros((), dtype=dtype, device=y.device)
        for layer in reversed(self._layers(params.to(dtype))):
            x, log_slope = self._search(x, *layer)
            total = total + log_slope
        return x.to(y.dtype), total


class DeepSigmoid(_Mean):
    r"""The map of neural autoregressive flows: :math:`y = \psi^{-1}(\sum_h w_h \psi(a_h x + b_h))` (arXiv:1804.00779).

    With the sigmoid as :math:`\psi`, :math:`\psi^{-1}` is the logit. Computed from the logarithms of both tails, so
    it is exact wherever on the real line :math:`x` lies; there is no epsilon.

    Args:
        hidden_units: the number :math:`H` of terms; ``3 H depth`` parameters a dimension.
        activation: :math:`\psi`: ``"sigmoid"``, ``"tanh"``, ``"ELU"`` or ``"LeakyReLU"`` (slope 1/100 below zero); the
            last two have kinks in the slope, or in the map.
        depth: how many such maps are applied one after the other.

    Raises:
        OptionError: an unknown activation, or a number that is not a positive integer.

    Example:
        >>> from pyroflows.transforms import Elementwise
        >>> layer = Elementwise(DeepSigmoid(hidden_units=8), 1).double()
        >>> x = torch.tensor([[-1e6], [0.0], [300.0]], dtype=torch.float64)
        >>> bool((layer.inv(layer(x).clone()) - x).abs().max() < 1e-9)
        True
    """

    def __init__(
        self,
        hidden_units: int = 16,
        activation: Literal["sigmoid", "tanh", "ELU", "LeakyReLU"] = "sigmoid",
        depth: int = 1,
    ) -> None:
        if activation not in SCALES:
            raise OptionError(f"activation must be one of {', '.join(SCALES)}, got {activation!r}.")
        super().__init__(SCALES[activation], hidden_units, depth)
        self.activation, self.columns = activation, activation == "sigmoid"

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and its log-slope."""
        if self.activation != "sigmoid":
            return super().forward(x, params)
        dtype = torch.promote_types(x.dtype, torch.float32)
        y, params, log_slopes = x.to(dtype), params.to(dtype), []
        offsets = params.new_tensor(self.offsets)
        for raw in params.split(3 * self.terms, -1) if self.depth > 1 else [params]:
            y, log_slope = deep_sigmoid(y, raw, self.slope, offsets)
            log_slopes.append(log_slope)
        return y.to(x.dtype), sum(log_slopes[1:], start=log_slopes[0])


class DenseSigmoid(NumericMap):
    r"""The dense map of neural autoregressive flows (arXiv:1804.00779, section 3.2): layers
    :math:`h \mapsto \sigma^{-1}(W \sigma(a \odot (U h) + b))` of several hidden numbers.

    The first layer reads :math:`x` alone and the last one has one output. The rows of :math:`U` and :math:`W` are
    positive and sum to one, so each number increases with :math:`x`; its slope is carried through the layers by its
    logarithm. With one layer it is `DeepSigmoid`, whose offsets have no bound: a steep step at :math:`m` takes
    :math:`b = -a m`. With more, :math:`|b| < 10`: terms that are further apart leave a flat stretch between them, and
    stretches multiply from layer to layer until no number is small enough for a slope.

    Args:
        hidden_units: the number :math:`H` of hidden numbers, and of units, of each layer.
        depth: the number :math:`L` of layers; ``2 L H + 2 (L - 1) H^2 + H`` parameters a dimension.

    Raises:
        OptionError: a number is not a positive integer.

    Example:
        >>> from pyroflows.transforms import Elementwise
        >>> layer = Elementwise(DenseSigmoid(hidden_units=4), 1).double()
        >>> x = torch.tensor([[-1e6], [0.0], [300.0]], dtype=torch.float64)
        >>> bool((layer.inv(layer(x).clone()) - x).abs().max() < 1e-9)
        True
    """

    max_shift = 10.0

    def __init__(self, hidden_units: int = 8, depth: int = 2) -> None:
        if not isinstance(hidden_units, int) or hidden_units < 1 or not isinstance(depth, int) or depth < 1:
            raise OptionError(f"expected positive numbers of units and layers, got {hidden_units!r} and {depth!r}.")
        self.hidden_units, self.depth = hidden_units, depth
        self.slope, self.offsets = LOGISTIC.start(hidden_units)
        widths = [1, *[hidden_units] * (depth - 1), 1]
        self.sizes = [
            (hidden_units, hidden_units, hidden_units * below if number else 0, above * hidden_units)
            for number, (below, above) in enumerate(pairwise(widths))
        ]
        self.params = sum(map(sum, self.sizes))
        # Hidden numbers that were all equal would stay so: each one starts leaning to one side by another measure.
        lean = [(2 * h + 1) / hidden_units - 1 for h in range(hidden_units)]
        self.leans = [i * j for i in lean for j in lean]

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's number and its log-slope."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        params, hidden = params.to(dtype), x.to(dtype).unsqueeze(-1)
        offsets, leans, log_slopes = (
            params.new_tensor(self.offsets),
            params.new_tensor(self.leans),
            torch.zeros_like(hidden),
        )
        for number, raw in enumerate(params.split([sum(size) for size in self.sizes], -1)):
            raw_slopes, shifts, inner, outer = raw.split(self.sizes[number], -1)
            largest = log_slopes.detach().amax(-1, keepdim=True)
            rises = torch.exp(log_slopes - largest)
            if number:
                rows = mixture_weights(inner.unflatten(-1, (self.hidden_units, -1)))
                hidden, rises = ((rows * each.unsqueeze(-2)).sum(-1) for each in (hidden, rises))  # no matmul: autocast
            if number < self.depth - 1:
                outer = outer + leans
            a, rows = self.slope * positive(raw_slopes), mixture_weights(outer.unflatten(-1, (-1, self.hidden_units)))
            shifts = shifts if self.depth == 1 else bounded_log_scale(shifts, self.max_shift)
            values = torch.addcmul(offsets + shifts, a, hidden)
            hidden, log_slopes = logistic_mean(values.unsqueeze(-2), rows, (a * rises).unsqueeze(-2))
            log_slopes = log_slopes + largest
        return hidden.squeeze(-1).to(x.dtype), log_slopes.squeeze(-1)

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The root, from a bracket that is widened until it holds it.

        Raises:
            InverseNotConverged: a parameter is NaN.
        """
        dtype = torch.promote_types(y.dtype, torch.float32)
        wide = y.to(dtype).expand(torch.broadcast_shapes(y.shape, params.shape[:-1]))
        root = monotone_root(lambda x: self.forward(x, params.to(dtype)), wide)
        return root.x.to(y.dtype), -root.log_slope


class LogisticMixture(_Mean):
    r"""The map of Flow++ (arXiv:1902.00275):
    :math:`y = e^s \operatorname{logit}(\sum_k \pi_k \sigma((x - \mu_k) e^{-s_k})) + t`.

    All log-scales lie in (-5, 5).

    Args:
        components: the number of logistic distributions :math:`K`; ``3 K + 2`` parameters a dimension.

    Raises:
        OptionError: ``components`` is not a positive integer.

    Example:
        >>> LogisticMixture(4).params
        14
    """

    def __init__(self, components: int = 8) -> None:
        super().__init__(LOGISTIC, components)
        self.params += 2

    def _layers(self, params: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        raw, means, logits = params.chunk(3, -1)
        a = self.slope * torch.exp(-bounded_log_scale(raw, 5.0))
        return [(a, params.new_tensor(self.offsets) - a * means, mixture_weights(logits))]

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture's logit, scaled and shifted."""
        raw, shift = params[..., -2:].unbind(-1)
        y, log_slope = super().forward(x, params[..., :-2])
        log_scale = bounded_log_scale(raw, 5.0)
        return y * torch.exp(log_scale) + shift, log_slope + log_scale

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled, and the root of the mixture's logit."""
        raw, shift = params[..., -2:].unbind(-1)
        log_scale = bounded_log_scale(raw, 5.0)
        x, log_slope = super().backward((y - shift) * torch.exp(-log_scale), params[..., :-2])
        return x, log_slope - log_scale


class Gaussianization(_Mean):
    r"""A mixture of normals made normal: :math:`y = \Phi^{-1}(\sum_k \pi_k \Phi(a_k x + b_k))` (arXiv:2003.01941).

    Computed from the logarithm of the smaller tail, so it does not saturate: far out it is the straight line of the
    widest component. Uses float64 inside.

    Args:
        components: the number of normals :math:`K`; ``3 K`` parameters a dimension.

    Raises:
        OptionError: ``components`` is not a positive integer.

    Example:
        >>> from pyroflows.transforms import Elementwise
        >>> x = torch.tensor([[-300.0], [0.0], [1e6]])
        >>> layer = Elementwise(Gaussianization(8), 1)
        >>> bool(torch.allclose(layer.inv(layer(x).clone()), x))
        True
    """

    def __init__(self, components: int = 8) -> None:
        super().__init__(NORMAL, components)
