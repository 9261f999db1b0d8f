"""The last pair of a transform, and whether it still holds: what makes scoring a sample free, and never stale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyroflows.numerics import is_plainly_eager

__all__ = ["Memo"]


class Memo(NamedTuple):
    """The last ``(x, y, log_det)``, with the values of everything that it depends on.

    Attributes:
        x: the point.
        y: its image.
        log_det: ``log|det dy/dx|``.
        by_forward: whether ``y`` was computed from ``x``, and not ``x`` from ``y``.
        with_grad: whether gradients were on.
        values: what the pair depends on, as it was: whether it required a gradient, and its value.
    """

    x: Tensor
    y: Tensor
    log_det: Tensor
    by_forward: bool
    with_grad: bool
    values: tuple[tuple[bool, Tensor], ...]

    @classmethod
    def of(cls, module: nn.Module, x: Tensor, y: Tensor, log_det: Tensor, *, by_forward: bool) -> Memo:
        """The memo of a pair that the module has just computed."""
        values = tuple((grad, value.clone()) for grad, value in _depends_on(module, x, y))
        return cls(x, y, log_det, by_forward, torch.is_grad_enabled(), values)

    def answers(self, module: nn.Module, x: Tensor | None, y: Tensor | None) -> bool:
        """Whether it is the pair of this ``x``, this ``y``, or both, and nothing that it depends on has changed."""
        if not (x is None or self.x is x) or not (y is None or self.y is y) or not is_plainly_eager():
            return False
        if (x is None or y is None) and self.by_forward != (x is None):
            return False  # only a result of ours is mapped back, never a tensor of the caller's
        if torch.is_grad_enabled() and not self.with_grad:
            return False  # it was computed without a graph, and one is wanted now
        now = tuple(_depends_on(module, self.x, self.y))
        return len(now) == len(self.values) and all(map(_same, now, self.values))


def _depends_on(module: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[bool, Tensor]]:
    """All that a pair depends on, the pair itself included: its owner may write into it."""
    yield from ((t.requires_grad, t.detach()) for t in (x, y))
    for part in module.modules():
        for t in itertools.chain(part._parameters.values(), part._buffers.values()):
            if t is not None:
                yield t.requires_grad, t.detach()


def _same(now: tuple[bool, Tensor], then: tuple[bool, Tensor]) -> bool:
    (grad_now, a), (grad_then, b) = now, then
    alike = grad_now == grad_then and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.equal(a, b)
