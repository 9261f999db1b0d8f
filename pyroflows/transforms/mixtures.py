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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.numerics import (
    bounded_log_scale,
    elu_mean,
    leaky_relu_mean,
    logistic_mean,
    monotone_root,
    normal_mean,
    positive,
)
from pyroflows.transforms.maps import NumericMap

__all__ = ["DeepSigmoid", "Gaussianization", "LogisticMixture"]


class _Scale(NamedTuple):
    """A mean, and how far apart its terms are at parameters that are all zero."""

    mean: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    spread: float
    variance: float = math.inf  # of the distribution function that psi is
    unit: float = 1.0  # psi is the mean's own function of unit times c


LOGISTIC = _Scale(logistic_mean, spread=1.0, variance=math.pi**2 / 3)
NORMAL = _Scale(normal_mean, spread=0.55, variance=1.0)
SCALES = {
    "sigmoid": LOGISTIC,
    "tanh": _Scale(logistic_mean, spread=0.5, variance=math.pi**2 / 12, unit=2.0),
    "ELU": _Scale(elu_mean, spread=0.5),
    "LeakyReLU": _Scale(leaky_relu_mean, spread=0.1),
}


class _Mean(NumericMap):
    """A mean of ``terms`` affine functions, or ``depth`` such means one after the other.

    Terms that were all equal would get equal gradients for ever, so they start spread about zero, with a slope that
    gives the mixture the variance of one term: near the identity.
    """

    def __init__(self, scale: _Scale, terms: int, depth: int = 1) -> None:
        if not isinstance(terms, int) or terms < 1 or not isinstance(depth, int) or depth < 1:
            raise OptionError(f"expected positive numbers of terms and layers, got {terms!r} and {depth!r}.")
        self.scale, self.terms, self.depth = scale, terms, depth
        self.params = 3 * terms * depth
        spread = scale.spread
        self.slope = 1 / math.sqrt(1 - spread**2 * (1 - 1 / terms**2) / (3 * scale.variance))
        self.offsets = [self.slope * spread * ((2 * h + 1) / terms - 1) for h in range(terms)]

    def _layers(self, params: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Slopes, offsets and log-weights ``[..., terms]`` of each mean."""
        offsets, layers = params.new_tensor(self.offsets), []
        for layer in params.split(3 * self.terms, -1):
            raw, shift, logits = layer.chunk(3, -1)
            layers.append((self.slope * positive(raw), offsets + shift, logits.log_softmax(-1)))
        return layers

    def _apply(self, x: Tensor, a: Tensor, b: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        unit, largest = self.scale.unit, torch.finfo(x.dtype).max
        terms = (torch.addcmul(b, a, x.unsqueeze(-1)) * unit).clamp(-largest, largest)
        y, log_slope = self.scale.mean(terms, log_w, torch.log(a))
        return y / unit, log_slope

    def _search(self, y: Tensor, a: Tensor, b: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            largest = torch.finfo(y.dtype).max
            each = ((y.unsqueeze(-1) - b) / a).clamp(-largest, largest)
            bracket = each.amin(-1), each.amax(-1)
            start = (torch.exp(log_w) * each).sum(-1)
        root = monotone_root(lambda x: self._apply(x, a, b, log_w), y, start=start, bracket=bracket)
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
        self.activation = activation


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
        return [(a, params.new_tensor(self.offsets) - a * means, logits.log_softmax(-1))]

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
