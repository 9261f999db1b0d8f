"""Sums that keep enough digits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sum_last"]


def sum_last(value: Tensor, dims: int = 1) -> Tensor:
    """The sum over the last ``dims`` dimensions, in at least float32.

    Args:
        value: ``[*batch, *event]``.
        dims: how many trailing dimensions are summed; 0 returns ``value`` in at least float32.

    Returns:
        ``[*batch]``, float32 for half-precision input and the input's dtype otherwise.

    Example:
        >>> sum_last(torch.full((2, 3), 0.5, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    if dims == 0:
        return value.to(dtype)
    return value.sum(dim=tuple(range(-dims, 0)), dtype=dtype)
