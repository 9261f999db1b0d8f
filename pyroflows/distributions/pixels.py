"""Distributions of images whose pixels are whole numbers, from flows of images.

Theis, van den Oord, Bethge (2015), *A note on the evaluation of generative models*, arXiv:1511.01844; Ho et al.
(2019), *Flow++*, arXiv:1902.00275.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.distributions.bounded import Bounded
from pyroflows.distributions.flow import Flow
from pyroflows.errors import OptionError

__all__ = ["Dequantized", "PixelDistribution", "bits_per_dim", "logit_interval"]


def logit_interval(alpha: float = 0.05) -> constraints.Constraint:
    r"""A support a little wider than the unit interval: ``logit(alpha + (1 - 2 alpha) x)`` of arXiv:1605.08803.

    A flow with this support maps the reals to :math:`(-m, 1 + m)`, :math:`m = \alpha / (1 - 2\alpha)`, so that black
    and white lie where the logit is not steep.

    Args:
        alpha: at least 0 and below a half; 0 is the unit interval.

    Raises:
        OptionError: ``alpha`` is out of range.

    Example:
        >>> logit_interval(0.25)
        Interval(lower_bound=-0.5, upper_bound=1.5)
    """
    if not 0 <= alpha < 0.5:
        raise OptionError(f"alpha must be at least 0 and below 0.5, got {alpha!r}.")
    margin = alpha / (1 - 2 * alpha)
    return constraints.interval(-margin, 1 + margin)


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int]) -> Tensor:
    r"""Nats a point to bits a number: :math:`-\log p / (D \log 2)`, :math:`D` numbers a point.

    Args:
        log_prob: log-probabilities in nats, any shape.
        event_shape: the shape of a point.

    Example:
        >>> bits_per_dim(torch.tensor(-16 * math.log(256.0)), (1, 4, 4))
        tensor(8.)
    """
    return -log_prob / (math.prod(event_shape) * math.log(2))


def _whole_numbers(levels: int, event_shape: torch.Size) -> constraints.Constraint:
    return constraints.independent(constraints.integer_interval(0, levels - 1), len(event_shape))


class PixelDistribution(dist.TorchDistribution):
    r"""What a `Dequantized` flow gives: a distribution of images whose pixels are integers :math:`0 \ldots L - 1`.

    The probability of an image is the integral of the density over its cell. ``log_prob`` is a lower bound of its
    logarithm, estimated with noise :math:`u` in :math:`[0, 1)^D` of density :math:`q`:

    .. math:: \log P(x) \ge E_q\Big[\log \frac1n \sum_{i=1}^n \frac{p((x + u_i) / L)}{L^D q(u_i | x)}\Big].

    Two calls differ; the mean of many is the bound, and training by its gradient is sound. More samples make the bound
    tighter, and cost as many passes.

    Args:
        density: the distribution of the images divided by the number of levels.
        levels: the number of levels :math:`L`.
        noise: the flow of the noise given the image; uniform if there is none.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, density: Any, levels: int, noise: Flow | None = None) -> None:
        self.density, self.levels, self.noise = density, levels, noise
        super().__init__(density.batch_shape, density.event_shape, validate_args=None)

    @property
    def support(self) -> constraints.Constraint:
        """Integers below the number of levels."""
        return _whole_numbers(self.levels, self.event_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PixelDistribution:
        """The same distribution with another batch shape."""
        return PixelDistribution(self.density.expand(batch_shape), self.levels, self.noise)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Images ``[*sample_shape, *batch, C, H, W]`` of whole numbers, as floats; what lies outside is cut off."""
        with torch.no_grad():
            value = self.density.sample(torch.Size(sample_shape))
            return torch.floor(value * self.levels).clamp(0, self.levels - 1)

    def log_prob(self, value: Tensor, samples: int = 1) -> Tensor:
        """A lower bound of the log-probability ``[*sample, *batch]`` in nats, random.

        Args:
            value: images ``[*sample, *batch, C, H, W]`` of whole numbers, of any dtype.
            samples: how many draws of the noise the bound takes, :math:`n`.
        """
        if not isinstance(samples, int) or samples < 1:
            raise OptionError(f"samples must be a positive integer, got {samples!r}.")
        if self._validate_args and value.numel():
            self._validate_sample(value)
        dims, numel = len(self.event_shape), self.event_shape.numel()
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        if self.noise is None:
            u, log_q = torch.rand((samples, *value.shape), dtype=value.dtype, device=value.device), 0.0
        else:
            context = 2 * value.flatten(-dims) / (self.levels - 1) - 1
            u, log_q = self.noise(context).rsample_with_log_prob((samples,))
        log_p = self.density.log_prob((value + u) / self.levels) - log_q - numel * math.log(self.levels)
        return torch.logsumexp(log_p, 0) - math.log(samples)

    def bits_per_dim(self, value: Tensor, samples: int = 1) -> Tensor:
        """An upper bound of the bits a pixel and channel that the image takes, ``[*sample, *batch]``, random.

        Args:
            value: images ``[*sample, *batch, C, H, W]`` of whole numbers.
            samples: how many draws of the noise the bound takes.
        """
        return bits_per_dim(self.log_prob(value, samples), self.event_shape)


class Dequantized(Bounded):
    """A flow of images as a distribution of pixels that are integers; its call gives a `PixelDistribution`.

    Args:
        flow: a flow of images whose pixels were divided by the number of levels, such as
            ``glow((1, 28, 28), support=logit_interval())``.
        levels: the number of levels of a pixel; 256 for bytes.
        noise: what is added to the integers: ``None`` for uniform noise (Theis et al. 2015, arXiv:1511.01844), or a
            flow on the unit interval that reads the image, such as `dequantizer` makes: it is trained along and makes
            the bound tighter (Ho et al. 2019, arXiv:1902.00275).

    Raises:
        OptionError: ``levels`` is below 2, or the noise is not of the flow's images.

    Example:
        >>> import pyroflows as pf
        >>> flow = pf.flow("glow", input_dim=(1, 4, 4), steps=1, support=logit_interval())
        >>> model = Dequantized(flow, levels=17)
        >>> model().sample((5,)).shape
        torch.Size([5, 1, 4, 4])
        >>> model().bits_per_dim(torch.full((5, 1, 4, 4), 3)).shape
        torch.Size([5])
    """

    def __init__(self, flow: Flow, levels: int = 256, noise: Flow | None = None) -> None:
        super().__init__(flow)
        if not isinstance(levels, int) or levels < 2:
            raise OptionError(f"levels must be an integer above 1, got {levels!r}.")
        if noise is not None and (noise.event_shape, noise.context_dim) != (flow.event_shape, flow.input_dim):
            raise OptionError(
                f"the noise must be a flow of images {tuple(flow.event_shape)} with context_dim={flow.input_dim}, got "
                f"{tuple(noise.event_shape)} and {noise.context_dim}. Build it with dequantizer."
            )
        self.levels, self.noise = levels, noise

    def forward(self, context: Tensor | None = None) -> PixelDistribution:
        """The distribution, with the context's batch shape.

        Args:
            context: ``[*batch, context_dim]`` if the flow reads one.

        Raises:
            ContextError: a context is missing, unexpected, or of the wrong width.
        """
        return PixelDistribution(self.flow(context), self.levels, self.noise)

    def dequantize(self, x: Tensor) -> Tensor:
        """Images of whole numbers with uniform noise, divided by the number of levels: points of the flow."""
        x = x.to(next(self.flow.parameters()))
        return (x + torch.rand_like(x)) / self.levels

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Sets the starting values of layers that take them from data, from images ``x`` ``[n, C, H, W]``."""
        self.flow.initialize(self.dequantize(x), context)

    @property
    def support(self) -> constraints.Constraint:
        """Integers below the number of levels."""
        return _whole_numbers(self.levels, self.flow.event_shape)

    def unconstrained(self, x: Tensor) -> Tensor:
        """Noisy images before the map to their support: what is standardised."""
        return self.flow.unconstrained(self.dequantize(x))
