"""Points taken apart into two kinds of coordinates, and put together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroflows.numerics.modes import is_plainly_eager

__all__ = ["apart", "together"]

MANY = 2**15
"""How many numbers are more work to add to zeros than a step of autograd of our own is."""


def _own_step(numbers: int) -> bool:
    return numbers >= MANY and is_plainly_eager()


def apart(value: Tensor, kept: Tensor, moved: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates that steer a coupling, and those that are moved.

    Args:
        value: ``[..., D]``.
        kept: which coordinates steer.
        moved: the others.
        back: where each coordinate is when those that are moved follow those that steer.

    Example:
        >>> first, second = torch.tensor([0, 2]), torch.tensor([1])
        >>> apart(torch.tensor([3.0, 4.0, 5.0]), first, second, torch.tensor([0, 2, 1]))
        (tensor([3., 5.]), tensor([4.]))
    """
    if _own_step(value.numel()):
        return _Apart.apply(value, kept, moved, back)
    return value.index_select(-1, kept), value.index_select(-1, moved)


def together(a: Tensor, b: Tensor, kept: Tensor, moved: Tensor, back: Tensor) -> Tensor:
    """Both kinds in the order that they were in before `apart`.

    Args:
        a: those that steer, ``[..., K]``.
        b: those that are moved, ``[..., D - K]``.
        kept: as there.
        moved: as there.
        back: as there.

    Example:
        >>> first, second = torch.tensor([0, 2]), torch.tensor([1])
        >>> together(torch.tensor([3.0, 5.0]), torch.tensor([4.0]), first, second, torch.tensor([0, 2, 1]))
        tensor([3., 4., 5.])
    """
    if _own_step(a.numel() + b.numel()):
        return _Together.apply(a, b, kept, moved, back)
    return torch.cat([a, b], -1).index_select(-1, back)


class _Apart(torch.autograd.Function):
    """Autograd would add each part to an array of zeros; but the gradient is the parts put together."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, kept: Tensor, moved: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kept, moved, back)
        return value.index_select(-1, kept), value.index_select(-1, moved)

    @staticmethod
    def backward(ctx: Any, by_kept: Tensor, by_moved: Tensor) -> tuple[Tensor | None, ...]:
        return together(by_kept, by_moved, *ctx.saved_tensors), None, None, None


class _Together(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kept: Tensor, moved: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(kept, moved, back)
        return torch.cat([a, b], -1).index_select(-1, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *apart(gradient, *ctx.saved_tensors), None, None, None
