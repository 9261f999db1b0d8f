"""A flow: a module that holds a base and a transform, and whose call is a Pyro distribution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.distributions.base import Base
from pyroflows.distributions.support import Support, as_constraint, describe, is_real, onto, restore
from pyroflows.errors import ContextError, DtypeError, OptionError, PyroflowsError, ShapeError
from pyroflows.numerics import sum_last
from pyroflows.transforms import Compose, FlowTransform

__all__ = ["Flow", "FlowDistribution", "Standardize"]


def _check_points(value: Tensor, shape: torch.Size) -> None:
    """Raises `ShapeError` unless the trailing dimensions are those of a point."""
    if value.shape[value.dim() - len(shape) :] != shape:
        expected = ", ".join(["*batch", *map(str, shape)])
        hint = "x.unsqueeze(-1) makes points of numbers." if shape == (1,) else "Batch dimensions go in front."
        raise ShapeError(f"expected points of shape [{expected}], got {tuple(value.shape)}. {hint}")


def _check_dtype(value: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raises `DtypeError` if a tensor has more digits than a flow of this dtype."""
    if value.dtype != dtype and torch.promote_types(value.dtype, dtype) != dtype:
        raise _dtype_error(value, dtype, what)


def _dtype_error(value: Tensor, dtype: torch.dtype, what: str) -> DtypeError:
    have, want = (str(t).removeprefix("torch.") for t in (value.dtype, dtype))
    casts = {"float32": "float()", "float64": "double()"}
    there = f", or flow.{casts.get(have, f'to(torch.{have})')}" if value.is_floating_point() else ""
    return DtypeError(f"the flow is {want} and {what} is {have}: {what}.{casts.get(want, f'to(torch.{want})')}{there}.")


def real_points(value: Tensor) -> Tensor:
    """Points as floating-point numbers; whole numbers are converted.

    Raises:
        DtypeError: they are no tensor of real numbers.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(f"expected a tensor, got {type(value).__name__}: give torch.as_tensor(x).")
    if value.is_complex() or value.dtype == torch.bool:
        name = str(value.dtype).removeprefix("torch.")
        raise DtypeError(f"expected real numbers, got {name}: give x.{'real' if value.is_complex() else 'float()'}.")
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


class FlowDistribution(dist.TransformedDistribution):
    """What ``flow()`` returns: a Pyro distribution that samples and scores.

    It is a ``pyro.distributions.TransformedDistribution``, so it has ``support``, ``expand``, ``mask``,
    ``to_event``, works in plates, as a prior or likelihood, and under NUTS. ``log_prob`` of one of its own
    samples costs no inverse. A NaN is outside of the support, so with Pyro's validation on (the default)
    ``log_prob`` raises ``ValueError`` for it; with ``validate_args=False`` only the NaN row is NaN.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density ``[*sample, *batch]`` in nats of ``value`` ``[*sample, *batch, *event]``.

        Raises:
            ShapeError: ``value`` holds no points of this distribution, or their batch is another one.
            DtypeError: ``value`` has more digits than the flow, or is no tensor of real numbers.
        """
        value = real_points(value)
        self._check(value)
        if self._validate_args and value.numel():  # torch's constraints cannot look at an empty batch
            self._validate_sample(value)
        transform = self._transform
        try:
            x, log_det = transform.invert(value)
        except (PyroflowsError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            tensors = itertools.chain(transform.parameters(), transform.buffers())
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), value.dtype)
            if dtype == value.dtype:
                raise
            raise _dtype_error(value, dtype, "x") from error
        return self._score(x, log_det)

    def _check(self, value: Tensor) -> None:
        _check_points(value, self.event_shape)
        if self.batch_shape:
            batch = value.shape[: value.dim() - len(self.event_shape)]
            pairs = zip(reversed(batch), reversed(self.batch_shape), strict=False)
            if any(a != b and a != 1 and b != 1 for a, b in pairs):
                raise ShapeError(
                    f"points of batch shape {tuple(batch)} do not go with a distribution of batch shape "
                    f"{tuple(self.batch_shape)}: expected a point for each context. Contexts [n, 1, context_dim] "
                    "score all points under each."
                )

    def rsample_with_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Differentiable samples and their log-densities, in one pass and without a memo.

        Args:
            sample_shape: how many samples, in which shape.

        Returns:
            Samples ``[*sample_shape, *batch, *event]`` and log-densities ``[*sample_shape, *batch]``.
        """
        x = self.base_dist.rsample(torch.Size(sample_shape))
        value, log_det = self._transform.forward_and_log_det(x)
        return value, self._score(x, -log_det)

    @property
    def _transform(self) -> FlowTransform:
        return self.transforms[0] if len(self.transforms) == 1 else Compose(self.transforms)

    def _score(self, x: Tensor, log_det: Tensor) -> Tensor:
        transform = self._transform  # a matrix has one dimension more than the vector that it is made of
        event_dim = len(self.event_shape) + transform.domain.event_dim - transform.codomain.event_dim
        base_dim = len(self.base_dist.event_shape)
        base = self.base_dist.log_prob(x) if x.numel() else sum_last(x, base_dim)  # Independent needs a row
        log_prob = sum_last(base, event_dim - base_dim)
        return log_prob + sum_last(log_det, event_dim - transform.domain.event_dim)


class Standardize(FlowTransform):
    r"""A fixed shift and scale of each entry: :math:`y = \mathrm{loc} + \mathrm{scale} \cdot x`.

    Args:
        shape: the shape of one point.

    Raises:
        ShapeError: of both directions, for points of another shape.
        DtypeError: of both directions, for points with more digits than the shift and scale.

    Example:
        >>> layer = Standardize((2,))
        >>> layer.set(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        >>> layer(torch.ones(2))
        tensor([4., 6.])
    """

    sign = 1
    loc: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.domain = self.codomain = constraints.independent(constraints.real, len(shape))
        self.register_buffer("loc", torch.zeros(tuple(shape)))
        self.register_buffer("scale", torch.ones(tuple(shape)))

    def set(self, loc: Tensor, scale: Tensor) -> None:
        """Sets shift and scale, each of the shape of one point."""
        with torch.no_grad():
            self.loc.copy_(loc)
            self.scale.copy_(scale)

    def _check(self, value: Tensor) -> None:
        _check_points(value, self.loc.shape)
        _check_dtype(value, self.loc.dtype, "x")

    def _log_det(self, value: Tensor) -> Tensor:
        return sum_last(torch.log(self.scale), self.loc.dim()).expand(value.shape[: value.dim() - self.loc.dim()])

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``loc + scale x``."""
        self._check(x)
        y = self.loc + self.scale * x
        return y, self._log_det(y)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y - loc) / scale``."""
        self._check(y)
        x = (y - self.loc) / self.scale
        return x, -self._log_det(x)


class Flow(nn.Module):
    """A density on vectors (or images): ``flow()`` or ``flow(context)`` is a Pyro distribution.

    The full transform, ``flow.transform``, is the learned one, then a standardiser that ``pyroflows.fit`` sets,
    then a map to the support. So ``log_prob`` is always in the data's units. Where the learned transform does not lead
    to all real vectors, as on the torus, nothing may be shifted or scaled: there is no standardiser, and the support
    is where it leads.

    Args:
        transform: the learned transform, base to data.
        base: the base distribution as a module.
        support: where the data live, if not on all of the real vectors: a constraint of
            ``torch.distributions.constraints``, or one for each column.
        chart: a fixed map from where the learned transform leads to where the data live, in place of a standardiser
            and a support.

    Attributes:
        objective: what `pyroflows.fit` minimises where it is not told.

    Raises:
        OptionError: the base and the transform disagree about what a point is, or a support was declared for a
            transform that leads to one of its own.

    Example:
        >>> import pyroflows as pf
        >>> flow = pf.flow("nsf", input_dim=2, context_dim=3)
        >>> flow(torch.zeros(5, 3)).sample((10,)).shape
        torch.Size([10, 5, 2])
    """

    transform: Compose
    standardizes: bool
    context_loc: Tensor
    context_scale: Tensor
    objective: str = "likelihood"

    def __init__(
        self,
        transform: FlowTransform,
        base: Base | nn.Module,
        *,
        support: Support | None = None,
        chart: FlowTransform | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.config: Any = None
        self._compile_options: dict[str, Any] | None = None
        base_shape = base().event_shape
        if len(base_shape) != transform.domain.event_dim:
            raise OptionError(
                f"the base has points of shape {tuple(base_shape)} and the transform maps points of "
                f"{transform.domain.event_dim} dimensions; did you mean base.to_event(1)?"
            )
        self.event_shape = transform.forward_shape(base_shape)
        tensors = itertools.chain(base.parameters(), base.buffers(), transform.parameters(), transform.buffers())
        like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        self.standardizes = chart is None and is_real(transform.codomain)
        parts = [transform]
        if self.standardizes:
            parts.append(Standardize(self.event_shape).to(like))  # what is added lives where the parts live
        elif chart is not None:
            parts.append(chart)
        self._own = len(parts)
        self.transform = Compose(parts)
        self._read_contexts(transform.context_dim, like)
        self.constrain(support)

    @property
    def learned(self) -> FlowTransform:
        """The learned transform, the first part of ``transform``."""
        return self.transform[0]

    @property
    def standardize(self) -> Standardize | None:
        """The standardiser, the second part of ``transform``; ``None`` where nothing may be shifted or scaled."""
        return self.transform[1] if self.standardizes else None  # type: ignore[return-value]

    @property
    def input_dim(self) -> int:
        """The number of coordinates of a point."""
        return self.event_shape.numel()

    @property
    def data_shape(self) -> torch.Size:
        """The shape of a point of the data; on a support it may be another than ``event_shape``."""
        return self.transform.forward_shape(self.base().event_shape)

    @property
    def support(self) -> constraints.Constraint:
        """Where the data live."""
        return self._support

    @property
    def declared_support(self) -> constraints.Constraint | None:
        """The constraint that was declared; ``None`` for all real vectors."""
        return self._declared

    @property
    def support_description(self) -> Any:
        """The declared support in terms that JSON can hold."""
        return describe(self._declared)

    def constrain(self, support: Support | None) -> None:
        """Declares where the data live; ``None`` is all of the real vectors.

        Raises:
            OptionError: the constraint has no bijection, or names another number of columns; or the flow's points
                live on a support of their own.
        """
        constraint = as_constraint(support)
        parts = list(self.transform)[: self._own]
        if constraint is not None:
            if not self.standardizes:
                raise OptionError(f"the points of this flow live on {parts[-1].codomain}, so it takes no support.")
            parts.append(onto(constraint, self.event_shape))
        self._declared = constraint
        self.transform = Compose(parts)
        self._support = self.transform.codomain
        if self._compile_options is not None:
            self.transform.compile(**self._compile_options)

    def unconstrained(self, x: Tensor) -> Tensor:
        """Points of the data before the map to their support, ``[*batch, *event_shape]``: what is standardised."""
        for part in reversed(list(self.transform)[self._own :]):
            x, _ = part.inverse_and_log_det(x)
        return x

    def compile(self, **options: Any) -> Flow:  # type: ignore[override]
        """Has ``torch.compile`` work on sampling and scoring from now on, though not on a search.

        Results stay the same up to rounding; where no compiler is found, one warning tells so and nothing changes.
        The first calls compile, which takes tens of seconds, so this is worth it for thousands of small training steps.
        Compiled functions have no second derivatives.

        Args:
            **options: of ``torch.compile``.

        Returns:
            This flow.

        Example:
            >>> import pyroflows as pf
            >>> flow = pf.flow("maf", input_dim=2).compile(backend="eager")
            >>> flow().log_prob(torch.zeros(5, 2)).shape
            torch.Size([5])
        """
        self._compile_options = options
        self.transform.compile(**options)
        return self

    def restore_support(self, description: Any) -> None:
        """Declares the support that ``support_description`` put down; used by ``pyroflows.load``.

        Raises:
            ArchiveCorrupt: the description is not one of ours.
        """
        self.constrain(restore(description))

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution, with the context's batch shape.

        Args:
            context: ``[*batch, context_dim]`` if the flow reads one.

        Raises:
            ContextError: a context is missing, unexpected, or of the wrong width.
            DtypeError: the context has more digits than the flow.
        """
        scaled = self.read_context(context)
        transform = self.transform if scaled is None else self.transform.condition(scaled)
        return FlowDistribution(self.base(), [transform])

    def _read_contexts(self, context_dim: int, like: Tensor) -> None:
        """Has the flow read contexts of this width, which `pyroflows.fit` may standardise."""
        self.context_dim = context_dim
        if context_dim:
            self.register_buffer("context_loc", like.new_zeros(context_dim))
            self.register_buffer("context_scale", like.new_ones(context_dim))

    def read_context(self, context: Tensor | None) -> Tensor | None:
        """The context as the layers read it: checked, shifted and scaled as `pyroflows.fit` set it; `None` for none.

        Raises:
            ContextError: a context is missing, unexpected, or of the wrong width.
            DtypeError: the context has more digits than the flow.
        """
        if context is None:
            if self.context_dim:
                raise ContextError(f"this flow was built with context_dim={self.context_dim}: call flow(context).")
            return None
        if not self.context_dim:
            raise ContextError("this flow was built without a context (context_dim=0): call flow().")
        if not isinstance(context, Tensor):
            raise ContextError(
                f"expected a tensor as the context, got {type(context).__name__}: give torch.as_tensor(context)."
            )
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ContextError(f"expected a context of shape [*batch, {self.context_dim}], got {tuple(context.shape)}.")
        _check_dtype(context, self.context_loc.dtype, "context")
        return (context - self.context_loc) / self.context_scale

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Sets the starting values of layers that take them from data (`ActNorm`), from rows ``x``.

        Raises:
            ShapeError: the rows are not points of this flow.
        """
        _check_points(x, self.data_shape)
        self.transform.initialize(x, self.read_context(context))
