r"""Densities of points that a flow sees beside coordinates of noise, in which its paths have room to pass each other.

Dupont, Doucet, Teh (2019), *Augmented neural ODEs*, arXiv:1904.01681; Huang, Dinh, Courville (2020), *Augmented
normalizing flows*, arXiv:2002.07101; Burda, Grosse, Salakhutdinov (2015), *Importance weighted autoencoders*,
arXiv:1509.00519 (the bound from several samples).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.distributions.bounded import Bounded
from pyroflows.distributions.flow import Flow, FlowDistribution, Standardize, real_points
from pyroflows.distributions.support import Support
from pyroflows.errors import OptionError, ShapeError

__all__ = ["Augmented", "AugmentedDistribution"]


class AugmentedDistribution(dist.TorchDistribution):
    r"""What an `Augmented` flow gives: the marginal of :math:`x` under a density of :math:`(x, e)`.

    Samples are exact. The density is an integral over :math:`e`, so ``log_prob`` is a lower bound of its logarithm,
    estimated with noise of density :math:`q`:

    .. math:: \log p(x) \ge E_q\Big[\log \frac1n \sum_{i=1}^n \frac{p(x, e_i)}{q(e_i | x)}\Big].

    Two calls differ; the mean of many is the bound, and training by its gradient is sound. It is below
    :math:`\log p(x)` by :math:`\mathrm{KL}(q(e | x) \,|\, p(e | x))` for one sample; more make it tighter, and cost as
    many passes.

    Args:
        density: the distribution of ``[*batch, D + extra]``.
        extra: how many of the last coordinates are noise.
        noise: gives the distribution of the noise, ``[*batch, extra]``, of points ``[*batch, D]``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, density: FlowDistribution, extra: int, noise: Callable[[Tensor], FlowDistribution]) -> None:
        self.density, self.extra, self.noise = density, extra, noise
        super().__init__(density.batch_shape, torch.Size([density.event_shape[0] - extra]), validate_args=None)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> AugmentedDistribution:
        """The same distribution with another batch shape."""
        return AugmentedDistribution(self.density.expand(torch.Size(batch_shape)), self.extra, self.noise)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Exact, differentiable samples ``[*sample_shape, *batch, D]``: those of the density without their noise."""
        return self.density.rsample(torch.Size(sample_shape))[..., : self.event_shape[0]]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Exact samples ``[*sample_shape, *batch, D]``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_with_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        r"""Differentiable samples, and random upper bounds of their log-densities.

        A sample is scored with its own noise, :math:`\log p(x, e) - \log q(e | x)`, on average above :math:`\log p(x)`.
        So an ELBO stays a lower bound if it is made of them, as that of `pyroflows.fit` is. That of Pyro, which scores
        samples by ``log_prob``, would not.

        Args:
            sample_shape: how many samples, in which shape.
        """
        points, log_p = self.density.rsample_with_log_prob(sample_shape)
        value, noise = points.split([self.event_shape[0], self.extra], -1)
        return value, log_p - self.noise(value).log_prob(noise)

    def bound(self, value: Tensor, samples: int = 1) -> Tensor:
        """A lower bound of the log-density ``[*sample, *batch]`` in nats, random.

        Args:
            value: points ``[*sample, *batch, D]``.
            samples: how many draws of the noise the bound takes, :math:`n`.

        Raises:
            OptionError: ``samples`` is not positive.
            ShapeError: ``value`` holds no points of this distribution.
            DtypeError: ``value`` is no tensor of real numbers, or has more digits than the flow.
        """
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise OptionError(f"samples must be a positive integer, got {samples!r}.")
        value = real_points(value)
        if value.shape[-1:] != self.event_shape:
            raise ShapeError(f"expected points [*batch, {self.event_shape[0]}], got shape {tuple(value.shape)}.")
        if self._validate_args and value.numel():
            self._validate_sample(value)
        value = value.expand(*torch.broadcast_shapes(value.shape[:-1], self.batch_shape), -1)
        q = self.noise(value)
        noise = q.rsample((samples,))
        points = torch.cat([value.expand(samples, *value.shape), noise], -1)
        return torch.logsumexp(self.density.log_prob(points) - q.log_prob(noise), 0) - math.log(samples)

    def log_prob(self, value: Tensor) -> Tensor:
        """The `bound` from one draw of the noise: random, and below the log-density on average."""
        return self.bound(value)


class Augmented(Bounded):
    r"""A flow of :math:`(x, e)` as a distribution of :math:`x`; its call gives an `AugmentedDistribution`.

    Paths of a continuous-time flow do not cross, so it cannot tear a density apart; with coordinates to spare, they
    pass each other there. Any other flow gains too.

    Args:
        flow: a flow of vectors ``[D + extra]``, on all real vectors.
        extra: how many of its last coordinates are noise.
        noise: the noise's distribution :math:`q(e | x)`: ``None`` for standard normal numbers, or a flow of vectors
            ``[extra]`` that reads the point and the context, ``context_dim = D + flow.context_dim``. It is trained
            along and makes the bound tighter.

    Raises:
        OptionError: ``extra`` is not positive or leaves no coordinate, the flow's points are no real vectors, or the
            noise has other widths.

    Example:
        >>> import pyroflows as pf
        >>> model = Augmented(pf.flow("ffjord", input_dim=3, hidden_dims=(8, 8)), extra=1)
        >>> x = model().sample((5,))
        >>> x.shape, model().bound(x, samples=10).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, flow: Flow, extra: int, noise: Flow | None = None) -> None:
        if not isinstance(flow, Flow):
            raise OptionError(f"expected a Flow, such as pf.flow('ffjord', input_dim=3), got {type(flow).__name__}.")
        super().__init__(flow)
        if len(flow.event_shape) != 1 or not flow.standardizes or flow.declared_support is not None:
            raise OptionError(f"expected a flow of vectors without a support, got points on {flow.support}.")
        if isinstance(extra, bool) or not isinstance(extra, int) or not 0 < extra < flow.input_dim:
            raise OptionError(f"extra must be a positive integer below {flow.input_dim}, got {extra!r}.")
        dim = flow.input_dim - extra
        if not isinstance(noise, Flow | None):
            raise OptionError(f"the noise must be None or a Flow, got {type(noise).__name__}.")
        if noise is not None and (noise.event_shape, noise.context_dim) != ((extra,), dim + flow.context_dim):
            raise OptionError(
                f"the noise must be a flow of vectors ({extra},) with context_dim={dim + flow.context_dim}, got "
                f"{tuple(noise.event_shape)} and {noise.context_dim}."
            )
        self.extra, self.noise = extra, noise

    def forward(self, context: Tensor | None = None) -> AugmentedDistribution:
        """The distribution, with the context's batch shape.

        Args:
            context: ``[*batch, context_dim]`` if the flow reads one.

        Raises:
            ContextError: a context is missing, unexpected, or of the wrong width.
        """
        return AugmentedDistribution(self.flow(context), self.extra, partial(self._noise_at, context=context))

    def _noise_at(self, x: Tensor, context: Tensor | None = None) -> FlowDistribution:
        """The distribution of the noise of points ``[*batch, D]``."""
        if self.noise is None:
            zero = x.new_zeros(*x.shape[:-1], self.extra)
            # As a flow that changes nothing, because torch's own distributions cannot score an empty batch.
            return FlowDistribution(
                dist.Normal(zero, torch.ones_like(zero)).to_event(1), [Standardize((self.extra,)).to(x)]
            )
        standardize = self.standardize
        assert standardize is not None  # checked when it was built
        seen = (x - standardize.loc[: self.input_dim]) / standardize.scale[: self.input_dim]
        scaled = self.flow.read_context(context)
        if scaled is not None:
            seen = torch.cat([seen, scaled.expand(*x.shape[:-1], -1)], -1)
        return self.noise(seen)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Sets the starting values of layers that take them from data, from rows ``x`` ``[n, D]``."""
        with torch.no_grad():
            noise = self._noise_at(x, context).sample()
        self.flow.initialize(torch.cat([x, noise], -1), context)

    @property
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    @property
    def input_dim(self) -> int:
        """The number of coordinates of a point, without the noise."""
        return self.flow.input_dim - self.extra

    @property
    def data_shape(self) -> torch.Size:
        """The shape of a point, without the noise."""
        return torch.Size([self.input_dim])

    def constrain(self, support: Support | None) -> None:
        """Refuses a support.

        Raises:
            OptionError: one was given.
        """
        if support is not None:
            raise OptionError("an augmented flow lives on all real vectors: map the data there first.")

    def unconstrained(self, x: Tensor) -> Tensor:
        """Points with standard normal noise: what is standardised."""
        return torch.cat([x, torch.randn(*x.shape[:-1], self.extra, dtype=x.dtype, device=x.device)], -1)
