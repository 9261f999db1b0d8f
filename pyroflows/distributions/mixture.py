r"""Mixtures of flows: several flows side by side, with weights that are learned or read from the context.

Their density is :math:`p(x) = \sum_k w_k\, p_k(x)`. Where data fall apart into clusters, no single flow from one
normal follows them without bridges in between (Cornish, Caterini, Deligiannidis, Doucet 2020, *Relaxing bijectivity
constraints with continuously indexed normalising flows*, arXiv:1909.13833); a mixture does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflows.distributions.flow import Flow, FlowDistribution
from pyroflows.distributions.support import Support
from pyroflows.errors import NotReparametrized, OptionError
from pyroflows.nets import MLP
from pyroflows.plugins import flow as flow_by_name
from pyroflows.transforms import Compose, Permutation, affine

__all__ = ["Mixture", "MixtureDistribution", "mixture"]


class MixtureDistribution(dist.TorchDistribution):
    r"""Of several distributions one, by its weight: :math:`p(x) = \sum_k w_k\, p_k(x)`.

    There is no ``rsample``: a sample jumps from one component to another when the weights change, so no derivative
    of it exists that would give theirs. Pyro's ``Trace_ELBO`` sees that and takes the score function in its place.

    Args:
        logits: the logs of the weights but for a constant, ``[*batch, K]``, or what gives them when they are needed.
        components: ``K`` distributions of equal batch and event shapes.
        batch_shape: a larger batch shape; default theirs.

    Example:
        >>> parts = [dist.Normal(torch.tensor([mean]), 1.0).to_event(1) for mean in (-3.0, 3.0)]
        >>> d = MixtureDistribution(torch.zeros(2), parts)
        >>> d.log_prob(torch.zeros(1)).exp()
        tensor(0.0044)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        logits: Tensor | Callable[[], Tensor],
        components: Sequence[Any],
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.components = logits, tuple(components)
        batch = torch.broadcast_shapes(batch_shape, *(part.batch_shape for part in self.components))
        if isinstance(logits, Tensor):
            batch = torch.broadcast_shapes(batch, logits.shape[:-1])
        super().__init__(batch, self.components[0].event_shape, validate_args=validate_args)

    @property
    def log_weights(self) -> Tensor:
        """The logs of the weights ``[*batch, K]``."""
        logits = self.logits if isinstance(self.logits, Tensor) else self.logits()
        return torch.log_softmax(logits, -1).expand(*self.batch_shape, -1)

    @property
    def support(self) -> Any:
        """Where the components live."""
        return self.components[0].support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> MixtureDistribution:
        """The same over a larger batch."""
        batch = torch.Size(batch_shape)
        return MixtureDistribution(self.logits, [part.expand(batch) for part in self.components], batch, False)

    def component_log_prob(self, value: Tensor) -> Tensor:
        """``log w_k p_k(x)`` ``[*sample, *batch, K]``; its softmax says which component a point came from."""
        return self.log_weights + torch.stack([part.log_prob(value) for part in self.components], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density ``[*sample, *batch]``."""
        return torch.logsumexp(self.component_log_prob(value), -1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples ``[*sample, *batch, *event]``: of every component, of which one is taken."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            bounds = self.log_weights.exp().cumsum(-1)[..., :-1]
            noise = torch.rand((*shape, *self.batch_shape, 1), dtype=bounds.dtype, device=bounds.device)
            chosen = (noise >= bounds).sum(-1)
            parts = torch.stack([part.expand(self.batch_shape).sample(shape) for part in self.components])
            index = chosen.reshape(1, *chosen.shape, *(1,) * len(self.event_shape)).expand(1, *parts.shape[1:])
            return parts.gather(0, index).squeeze(0)

    def rsample(self, sample_shape: Sequence[int] = ()) -> NoReturn:
        """There is none.

        Raises:
            NotReparametrized: always.
        """
        raise NotReparametrized(
            "a mixture has no rsample: a sample jumps from one component to another when the weights change, so its "
            "derivative does not give theirs. Call sample(), and use an objective of scores, such as maximum "
            "likelihood or pyro.infer.Trace_ELBO."
        )


class _Components(nn.Module):
    """The components and their weights: the base of a `Mixture`."""

    def __init__(self, components: Sequence[Flow], context_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.components, self.context_dim = nn.ModuleList(components), context_dim
        if context_dim:
            self.weigh = MLP(0, len(components), hidden_dims=hidden_dims, context_dim=context_dim)
        else:
            self.logits = nn.Parameter(torch.zeros(len(components)))

    def _logits(self, context: Tensor | None) -> Tensor:
        return self.logits if context is None else self.weigh(None, context)

    def forward(self, context: Tensor | None = None) -> MixtureDistribution:
        """The mixture at a context, by default at zero, which is the mean of the contexts that were fitted."""
        if context is None and self.context_dim:
            context = next(self.parameters()).new_zeros(self.context_dim)
        parts = [part() if context is None else part(context) for part in self.components]
        # Not the weights but what gives them: they may change before they are needed.
        return MixtureDistribution(partial(self._logits, context), parts, validate_args=False)


class Mixture(Flow):
    """A mixture of flows as a flow: ``mixture()`` or ``mixture(context)`` is a Pyro distribution.

    The components share the standardiser and the map to the support. All that a `Flow` does it does, except
    ``rsample``; see `MixtureDistribution`.

    Args:
        components: flows on the same real vectors, all with the same context width.
        support: where the data live, if not on all real vectors.
        hidden_dims: the hidden widths of the network that reads the weights off the context.

    Raises:
        OptionError: there are no components, or they differ in shape, in context, or have a support of their own.

    Example:
        >>> import pyroflows as pf
        >>> flow = Mixture([pf.flow("nsf", input_dim=2), pf.flow("maf", input_dim=2)])
        >>> flow().sample((4,)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self, components: Sequence[Flow], *, support: Support | None = None, hidden_dims: Sequence[int] = (128, 128)
    ) -> None:
        kinds = {(part.event_shape, part.context_dim, part.declared_support is None) for part in components}
        if len(kinds) != 1 or not all(part.standardizes and len(part.event_shape) == 1 for part in components):
            raise OptionError("expected one or more flows of one input_dim and context_dim, without a support.")
        [(shape, context_dim, unbounded)] = kinds
        if not unbounded:
            raise OptionError("a support is declared for the mixture, not for its components.")
        super().__init__(
            Permutation(range(shape[0])), _Components(components, context_dim, hidden_dims), support=support
        )
        self._read_contexts(context_dim, next(self.base.parameters()))

    @property
    def components(self) -> Sequence[Flow]:
        """The flows that are mixed, before the standardiser."""
        return self.base.components  # type: ignore[return-value]

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution, with the context's batch shape.

        Args:
            context: ``[*batch, context_dim]`` if the flow reads one.

        Raises:
            ContextError: a context is missing, unexpected, or of the wrong width.
        """
        return FlowDistribution(self.base(self.read_context(context)), [self.transform])

    def compile(self, **options: Any) -> Mixture:  # type: ignore[override]
        """Has ``torch.compile`` work on the components, as on any flow."""
        for part in self.components:
            part.compile(**options)
        super().compile(**options)
        return self

    def responsibilities(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """How likely each component is for a point, ``[*batch, K]``.

        Args:
            x: points ``[*batch, D]``.
            context: ``[*batch, context_dim]`` if the flow reads one.
        """
        z, _ = self.transform.inverse_and_log_det(x)
        return torch.softmax(self.base(self.read_context(context)).component_log_prob(z), -1)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Moves the components apart: each starts around another row, the rows far from one another."""
        with torch.no_grad():
            z, _ = self.transform.inverse_and_log_det(x)
            centres = z.mean(0, keepdim=True)
            gaps = torch.full_like(z[:, 0], torch.inf)
            for part in self.components:
                gaps = torch.minimum(gaps, (z - centres[-1]).square().sum(-1))
                # A row by its squared distance from the centres so far, so that an outlier is not sure to be one.
                row = z[torch.multinomial(gaps / gaps.sum(), 1)] if float(gaps.sum()) > 0 else centres[-1:]
                centres = torch.cat([centres, row])
                last = part.learned[-1] if isinstance(part.learned, Compose) else None
                if last is not None and hasattr(last, "start_from"):
                    last.start_from(raw=torch.stack([row[0], torch.zeros_like(row[0])], -1))


def mixture(
    input_dim: int,
    *,
    context_dim: int = 0,
    components: int = 3,
    flow: str = "nsf",
    support: Support | None = None,
    **options: Any,
) -> Mixture:
    """A mixture of flows of one kind, each with a shift and scale of its own at its end.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context, which the components and their weights read.
        components: how many flows.
        flow: their registered name.
        support: where the data live, if not on all real vectors.
        **options: of these flows.

    Raises:
        OptionError: ``components`` is not a positive integer, or the flow is no single flow of real vectors.

    It has no ``rsample``, so ``AutoFlow`` refuses it, and where a guide samples a site from it, ``Trace_ELBO`` takes
    the score function, whose gradient is noisy.

    Example:
        >>> mixture(2, flow="maf", transforms=1)().sample((4,)).shape
        torch.Size([4, 2])
    """
    if not isinstance(components, int) or components < 1:
        raise OptionError(f"components must be a positive integer, got {components!r}.")
    parts = []
    for _ in range(components):
        inner = flow_by_name(flow, input_dim=input_dim, context_dim=context_dim, **options)
        if type(inner) is not Flow or not inner.standardizes:
            raise OptionError(f"a mixture takes single flows of real vectors, and {flow!r} is none. Take nsf, or maf.")
        last = affine(input_dim, context_dim=context_dim)
        last.start_from(raw=torch.stack([torch.randn(input_dim), torch.zeros(input_dim)], -1))
        parts.append(Flow(Compose([inner.learned, last]), inner.base))
    return Mixture(parts, support=support)
