r"""Permutations: the same numbers in another order, and orders by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.transforms.base import FlowTransform

__all__ = ["Permutation", "as_permutation", "sign_of"]


def as_permutation(permutation: str | Sequence[int] | Tensor, size: int) -> Tensor:
    """A permutation of ``0 .. size - 1``: ``"identity"``, ``"reverse"``, ``"random"`` (torch's generator), or given.

    Raises:
        OptionError: there is no such name, or what is given is no permutation of so many entries.

    Example:
        >>> as_permutation("reverse", 3)
        tensor([2, 1, 0])
    """
    if isinstance(permutation, str):
        if permutation == "random":
            return torch.randperm(size)
        if permutation in ("identity", "reverse"):
            return torch.arange(size) if permutation == "identity" else torch.arange(size).flip(0)
        raise OptionError(f'expected "identity", "reverse", "random" or a sequence, got {permutation!r}.')
    order = torch.as_tensor(permutation, dtype=torch.long)
    if order.dim() != 1 or len(order) != size or (not order.is_meta and sorted(order.tolist()) != list(range(size))):
        raise OptionError(f"expected a permutation of 0 .. {size - 1}, got {order.tolist()}.")
    return order.clone()


def sign_of(permutation: Tensor) -> int:
    """Whether a permutation is even (1) or odd (-1)."""
    order, sign = permutation.tolist(), 1
    for i in range(len(order)):
        while order[i] != i:  # each swap puts one entry where it belongs
            j = order[i]
            order[i], order[j] = order[j], order[i]
            sign = -sign
    return sign


class Permutation(FlowTransform):
    r"""The same numbers in another order along one dimension: :math:`y_i = x_{p_i}`, log-det zero.

    Args:
        permutation: which entry goes where, a permutation of ``0 .. n - 1``.
        dim: the dimension that is permuted, negative; all from it on belong to one point.
        cache_size: accepted for Pyro's sake and without effect: the memory of a layer is always safe.

    Raises:
        OptionError: ``permutation`` is none, or ``dim`` is not negative.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    volume_preserving = True
    permutation: Tensor
    back: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor, *, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__()
        if dim >= 0:
            raise OptionError(f"dim must be negative, got {dim}.")
        self.dim = dim
        self.domain = self.codomain = constraints.independent(constraints.real, -dim)
        order = as_permutation(permutation, len(permutation))
        self.register_buffer("permutation", order)
        self.register_buffer("back", torch.argsort(order))

    @property
    def sign(self) -> int:
        """Whether the permutation is even (1) or odd (-1)."""
        return sign_of(self.permutation)

    @property
    def inv_permutation(self) -> Tensor:
        """The permutation that undoes this one."""
        return self.back

    def _permute(self, value: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        if value.dim() < -self.dim or value.shape[self.dim] != len(order):
            self.check_width(value, len(order))
        dtype = torch.promote_types(value.dtype, torch.float32)
        return value.index_select(self.dim, order), value.new_zeros(value.shape[: self.dim], dtype=dtype)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x`` permuted, and zero."""
        return self._permute(x, self.permutation)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y`` permuted back, and zero."""
        return self._permute(y, self.back)
