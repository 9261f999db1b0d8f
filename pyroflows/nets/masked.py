"""An affine map whose weights exist only where a mask says so; blocks without any weight cost no work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyroflows.numerics import is_differentiated, is_plainly_eager

__all__ = ["Block", "blocks_of", "masked_linear"]

Block = tuple[int, int, int]
"""Outputs ``[start, stop)`` read the inputs before ``reach``."""

NARROWEST, MOST = 32, 8
"""How many outputs a block has at least, and how many blocks there are at most."""
WORTH = 2**24
"""How many products a call must have for blocks to be faster than one product with many zeros."""


def blocks_of(mask: Tensor) -> list[Block]:
    """Blocks of outputs with what they read; empty where one product is as well.

    Args:
        mask: which weights exist, ``[outputs, inputs]``.

    Example:
        >>> blocks_of(torch.ones(128, 128).tril())[:2]
        [(0, 32, 32), (32, 64, 64)]
    """
    outputs, inputs = mask.shape
    count = min(MOST, outputs // NARROWEST)
    if count < 4 or inputs < 2 * NARROWEST or mask.is_meta:
        return []
    cuts = [outputs * k // count for k in range(count + 1)]
    last = torch.where(mask.bool().cpu(), torch.arange(1, inputs + 1, device="cpu"), 0).amax(-1).tolist()
    blocks = [(start, stop, max(last[start:stop])) for start, stop in pairwise(cuts)]
    work = sum((stop - start) * reach for start, stop, reach in blocks)
    return blocks if work < 0.8 * outputs * inputs else []


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, blocks: list[Block]) -> Tensor:
    """``x @ (weight * mask).T + bias``, by blocks where that is faster.

    Args:
        x: ``[*batch, inputs]``.
        weight: ``[outputs, inputs]``.
        mask: ones and zeros, ``[outputs, inputs]``.
        bias: ``[outputs]``.
        blocks: of `blocks_of`.

    Returns:
        ``[*batch, outputs]``.

    Example:
        >>> masked_linear(torch.ones(5, 2), torch.ones(2, 2), torch.ones(2, 2).tril(), torch.zeros(2), [])[0]
        tensor([1., 2.])
    """
    large = blocks and not x.is_meta and x.shape[:-1].numel() * weight.numel() >= WORTH
    if large and x.dtype == weight.dtype and is_plainly_eager() and not torch.is_autocast_enabled(x.device.type):
        return _ByBlocks.apply(x.reshape(-1, x.shape[-1]), weight, mask, bias, blocks).reshape(*x.shape[:-1], -1)
    return linear(x, weight * mask, bias)


class _ByBlocks(torch.autograd.Function):
    """The product by blocks, forwards and for the gradients; a gradient with a graph is one product again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, blocks: list[Block]) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.blocks = blocks
        masked = weight * mask
        out = x.new_empty(len(x), len(weight))
        for start, stop, reach in blocks:
            torch.addmm(bias[start:stop], x[:, :reach], masked[start:stop, :reach].mT, out=out[:, start:stop])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        by_x = by_weight = None
        masked = weight * mask
        if is_differentiated(gradient):
            return gradient @ masked, (gradient.mT @ x) * mask, None, gradient.sum(0), None
        if ctx.needs_input_grad[0]:
            by_x = torch.zeros_like(x)
            for start, stop, reach in ctx.blocks:
                by_x[:, :reach].addmm_(gradient[:, start:stop], masked[start:stop, :reach])
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight)
            for start, stop, reach in ctx.blocks:
                torch.mm(gradient[:, start:stop].mT, x[:, :reach], out=by_weight[start:stop, :reach])
            by_weight.mul_(mask)
        return by_x, by_weight, None, gradient.sum(0), None
