"""Sums that keep enough digits, and products with one matrix or many."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["matvec", "sum_last"]


def matvec(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` over the last dimensions, with one matrix for all rows or one a row.

    Args:
        matrix: ``[M, D]`` or ``[*batch, M, D]``.
        x: ``[*batch, D]``.

    Returns:
        ``[*batch, M]``.

    Example:
        >>> matvec(torch.eye(3)[:2], torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[1., 2.]])
    """
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


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
