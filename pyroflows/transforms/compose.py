"""Layers of other transforms: one after another, of torch or Pyro, and on points of another shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyroflows.errors import OptionError, ShapeError
from pyroflows.numerics import sum_last
from pyroflows.transforms.base import FlowTransform

__all__ = ["Compose", "Reshaped", "Wrapped"]


class Wrapped(FlowTransform):
    """A transform of torch or Pyro as a layer.

    Args:
        transform: a bijective ``torch.distributions.Transform``.
        codomain: where it leads, if the transform says less than that (as most of ``biject_to``'s do).

    Raises:
        OptionError: the transform is not bijective.
        ShapeError: of both directions, for points that it does not map.

    Example:
        >>> from torch.distributions.transforms import ExpTransform
        >>> Wrapped(ExpTransform()).forward_and_log_det(torch.zeros(2))[0]
        tensor([1., 1.])
    """

    def __init__(self, transform: Transform, codomain: constraints.Constraint | None = None) -> None:
        super().__init__()
        if not transform.bijective:
            raise OptionError(f"{transform!r} is not bijective, so it has no density.")
        self.transform = transform  # a submodule, if it is a module
        self.domain = transform.domain
        self.codomain = transform.codomain if codomain is None else codomain
        self.compiles = False

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return self.transform.sign

    def _check(self, value: Tensor, of: constraints.Constraint, shape: Callable[[torch.Size], Any]) -> None:
        try:
            shape(value.shape)  # torch's transforms refuse here what they do not map
        except ValueError as error:
            raise ShapeError(
                f"the map to {self.codomain} takes no points of shape {tuple(value.shape)}: {error}"
            ) from error
        if value.dim() < of.event_dim:
            raise ShapeError(
                f"the map to {self.codomain} expected points of {of.event_dim} dimensions, got {value.dim()}."
            )

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The transform and its ``log_abs_det_jacobian``."""
        self._check(x, self.domain, self.transform.forward_shape)
        y = self.transform(x)
        return y, sum_last(self.transform.log_abs_det_jacobian(x, y), 0)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of the transform, and minus its ``log_abs_det_jacobian``."""
        self._check(y, self.codomain, self.transform.inverse_shape)
        x = self.transform.inv(y)
        return x, -sum_last(self.transform.log_abs_det_jacobian(x, y), 0)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The transform's own."""
        return torch.Size(self.transform.forward_shape(shape))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The transform's own."""
        return torch.Size(self.transform.inverse_shape(shape))


class Reshaped(FlowTransform):
    """A layer on vectors, applied to points of any shape by flattening them.

    Args:
        transform: a layer on vectors.
        event_shape: the shape of one point, with as many entries as the layer has coordinates.

    Example:
        >>> from pyroflows.transforms import affine
        >>> Reshaped(affine(6), (2, 3)).forward_and_log_det(torch.zeros(5, 2, 3))[1].shape
        torch.Size([5])
    """

    def __init__(self, transform: FlowTransform, event_shape: Sequence[int]) -> None:
        super().__init__(transform.context_dim)
        self.transform, self.event_shape = transform, torch.Size(event_shape)
        self.domain = _raised(constraints.real, len(self.event_shape))
        self.codomain = self.domain
        self._claim_as(transform)

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return self.transform.sign

    def _flat(self, value: Tensor) -> Tensor:
        if value.shape[-len(self.event_shape) :] != self.event_shape:
            raise ShapeError(f"expected points of shape {tuple(self.event_shape)}, got {tuple(value.shape)}.")
        return value.flatten(-len(self.event_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer on flattened points."""
        y, log_det = self.transform.forward_and_log_det(self._flat(x), context)
        return y.unflatten(-1, self.event_shape), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's inverse on flattened points."""
        x, log_det = self.transform.inverse_and_log_det(self._flat(y), context)
        return x.unflatten(-1, self.event_shape), log_det


def _raised(constraint: constraints.Constraint, event_dim: int) -> constraints.Constraint:
    missing = event_dim - constraint.event_dim
    return constraints.independent(constraint, missing) if missing > 0 else constraint


class Compose(FlowTransform):
    r"""One transform after another: :math:`y = f_n(\ldots f_1(x))`, itself a transform.

    The log-det of a part that works on fewer dimensions than a point has is summed over the others.

    Args:
        transforms: the parts, first to last. A transform of torch or Pyro is wrapped; parts that read a
            context must agree on its width, the others ignore it.

    Raises:
        OptionError: no parts, or two different context widths.

    Example:
        >>> from pyroflows.transforms import affine, permute
        >>> Compose([affine(2), permute(2, torch.tensor([1, 0]))])(torch.tensor([1.0, 2.0]))
        tensor([2., 1.], grad_fn=<...>)
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        parts = [part if isinstance(part, FlowTransform) else Wrapped(part) for part in transforms]
        widths = {part.context_dim for part in parts} - {0}
        if not parts or len(widths) > 1:
            raise OptionError(
                "Compose needs at least one transform."
                if not parts
                else f"the transforms read contexts of different widths: {sorted(widths)}."
            )
        super().__init__(max(widths, default=0))
        self.transforms = nn.ModuleList(parts)
        # A part may lead from vectors to matrices: how many dimensions a point has gained before each, and in all.
        *before, gained = itertools.accumulate((p.codomain.event_dim - p.domain.event_dim for p in parts), initial=0)
        own = [part.domain.event_dim - gain for part, gain in zip(parts, before, strict=True)]
        self._surplus = [max(own) - dims for dims in own]  # the dimensions of a point that a part takes for a batch
        self.domain = _raised(parts[0].domain, max(own))
        self.codomain = _raised(parts[-1].codomain, max(own) + gained)
        self._claim_as(*parts)

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return prod(part.sign for part in self)

    def __len__(self) -> int:
        return len(self.transforms)

    def __iter__(self) -> Iterator[FlowTransform]:
        return iter(self.transforms)  # type: ignore[arg-type]

    def __reversed__(self) -> Iterator[FlowTransform]:
        return reversed(list(self))

    def __getitem__(self, index: int) -> FlowTransform:
        return self.transforms[index]  # type: ignore[return-value]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The parts in turn, their log-dets added."""
        self.check_context(context)
        terms = []
        for part, surplus in zip(self, self._surplus, strict=True):
            x, log_det = part.forward_and_log_det(x, context)
            terms.append(sum_last(log_det, surplus))
        return x, sum(terms[1:], start=terms[0])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The parts' inverses in reverse, their log-dets added."""
        self.check_context(context)
        terms = []
        for part, surplus in zip(reversed(self), reversed(self._surplus), strict=True):
            y, log_det = part.inverse_and_log_det(y, context)
            terms.append(sum_last(log_det, surplus))
        return y, sum(terms[1:], start=terms[0])

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initializes each part with the data as they reach it."""
        first, *later = self
        with torch.no_grad():
            for part in reversed(later):
                part.initialize(y, context)
                y, _ = part.inverse_and_log_det(y, context)
            first.initialize(y, context)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The parts' shapes in turn."""
        for part in self:
            shape = part.forward_shape(shape)
        return torch.Size(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The parts' shapes in reverse."""
        for part in reversed(self):
            shape = part.inverse_shape(shape)
        return torch.Size(shape)
