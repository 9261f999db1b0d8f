"""Affine maps one after another, whose weights exist only where a mask says so: what perceptrons are made of.

Where nothing watches the operations, the chain is one step of autograd: numbers are rectified in place, and blocks of
a mask without any weight cost no work. Fresh memory costs a small network more than what is computed in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from pyroflows.numerics import gradients_with_graph, is_differentiated, is_plainly_eager

__all__ = ["Block", "Link", "affine", "blocks_of", "chain"]

WIDTH, MOST = 64, 8
"""About how many rows a block has at least, and how many blocks there are at most."""
WORTH = 2**22
"""How many products a call must save for blocks to be faster than one product with many zeros."""
MANY = 1024
"""From so many rows, writing over numbers saves more time than it costs to write a step of autograd in Python."""


class Block(NamedTuple):
    """Rows ``[start, stop)`` of a matrix, which have weights in columns ``[first, last)`` alone."""

    start: int
    stop: int
    first: int
    last: int


class Link(NamedTuple):
    """An affine map: ``weight`` and ``mask`` ``[outputs, inputs]``, ``bias`` ``[outputs]`` or ``[rows, outputs]``."""

    weight: Tensor
    mask: Tensor | None
    bias: Tensor
    blocks: Sequence[list[Block]] = ([], [])  # of the mask and of its transpose

    @property
    def masked(self) -> Tensor:
        """The weight, zero where the mask is."""
        return self.weight if self.mask is None else self.weight * self.mask


def blocks_of(mask: Tensor) -> list[Block]:
    """Blocks of rows with the columns in which they have weights; empty where one product is as well.

    Args:
        mask: which weights exist, ``[rows, columns]``.

    Example:
        >>> blocks_of(torch.ones(128, 128).tril())[:2]
        [Block(start=0, stop=64, first=0, last=64), Block(start=64, stop=128, first=0, last=128)]
    """
    rows, columns = mask.shape
    if mask.is_meta or not mask.numel():
        return []
    exists, at = mask.bool().cpu(), torch.arange(columns, device="cpu")
    first = torch.where(exists, at, columns).amin(-1).tolist()
    last = torch.where(exists, at + 1, 0).amax(-1).tolist()
    blocks, start, width = [], 0, rows // min(MOST, round(rows / WIDTH) or 1)
    for stop in range(1, rows + 1):
        changes = stop == rows or (first[stop], last[stop]) != (first[stop - 1], last[stop - 1])
        if stop == rows or (changes and stop - start >= width):
            end = max(last[start:stop])
            blocks.append(Block(start, stop, min(*first[start:stop], end), end))
            start = stop
    return blocks if _work(blocks) < 0.8 * rows * columns else []


def _work(blocks: list[Block]) -> int:
    return sum((block.stop - block.start) * (block.last - block.first) for block in blocks)


def chain(x: Tensor, links: Sequence[Link], columns: bool = False) -> Tensor:
    """``x @ (weight * mask).T + bias`` for each link, with a relu between one and the next.

    Args:
        x: ``[*batch, inputs]``.
        links: the affine maps, first to last.
        columns: have the rows of one output side by side in memory, where that costs nothing.

    Returns:
        ``[*batch, outputs]``.

    Example:
        >>> link = Link(torch.ones(2, 2), torch.ones(2, 2).tril(), torch.zeros(2))
        >>> chain(torch.ones(5, 2), [link, link])[0]
        tensor([1., 3.])
    """
    count = x[..., 0].numel()
    worth = columns or count >= MANY or any(_by_blocks(count, link.weight, link.blocks[0]) for link in links)
    if worth and is_plainly_eager() and not x.is_meta and not torch.is_autocast_enabled(x.device.type):
        tensors = [t for link in links for t in (link.weight, link.bias)]
        if all(t.dtype == x.dtype for t in tensors):
            rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            out: Tensor = _Chain.apply(rows, [(link.mask, link.blocks) for link in links], columns, *tensors)
            out = out.mT if columns else out
            return out if x.dim() == 2 else out.reshape(*x.shape[:-1], len(links[-1].weight))
    return _plainly(x, links)


def affine(x: Tensor, link: Link) -> Tensor:
    """``x @ (weight * mask).T + bias``.

    Args:
        x: ``[*batch, inputs]``.
        link: the weight, mask and bias.

    Returns:
        ``[*batch, outputs]``.

    Example:
        >>> affine(torch.ones(5, 2), Link(torch.ones(3, 2), None, torch.zeros(3))).shape
        torch.Size([5, 3])
    """
    return chain(x, [link]) if any(link.blocks) else _plainly(x, [link])


def _plainly(x: Tensor, links: Sequence[Link]) -> Tensor:
    for number, link in enumerate(links):
        x = relu(x) if number else x
        x = linear(x, link.masked, link.bias) if link.bias.dim() == 1 else linear(x, link.masked) + link.bias
    return x


def _by_blocks(rows: int, weight: Tensor, blocks: list[Block]) -> bool:
    """Whether blocks are faster than one product."""
    return bool(blocks) and rows * (weight.numel() - _work(blocks)) >= WORTH


def _product(x: Tensor, weight: Tensor, bias: Tensor, blocks: list[Block], columns: bool) -> Tensor:
    """``x @ weight.T + bias`` ``[rows, outputs]``, or its transpose."""
    bias = bias.unsqueeze(0) if bias.dim() == 1 else bias
    if not _by_blocks(len(x), weight, blocks):
        return torch.addmm(bias.mT, weight, x.mT) if columns else torch.addmm(bias, x, weight.mT)
    out = x.new_empty(len(weight), len(x)) if columns else x.new_empty(len(x), len(weight))
    for start, stop, first, last in blocks:
        some, read, part = bias[:, start:stop], x[:, first:last], weight[start:stop, first:last]
        if columns:
            torch.addmm(some.mT, part, read.mT, out=out[start:stop])
        else:
            torch.addmm(some, read, part.mT, out=out[:, start:stop])
    return out


class _Chain(torch.autograd.Function):
    """`chain` of rows, with written-out first derivatives; second ones go through the plain operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, masks: list[Any], columns: bool, *tensors: Tensor) -> Tensor:
        weights, biases = tensors[::2], tensors[1::2]
        masked = [weight if mask is None else weight * mask for weight, (mask, _) in zip(weights, masks, strict=True)]
        units = [x]
        for number, (weight, bias, (_, [blocks, _])) in enumerate(zip(masked, biases, masks, strict=True)):
            below = units[-1].relu_() if number else x
            units.append(_product(below, weight, bias, blocks, columns and number == len(masks) - 1))
        ctx.masks, ctx.columns = masks, columns
        ctx.save_for_backward(*units[:-1], *masked, *tensors)
        return units[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.mT if ctx.columns else gradient
        count, saved, needed = len(ctx.masks), ctx.saved_tensors, ctx.needs_input_grad
        units, masked, tensors = saved[:count], saved[count : 2 * count], saved[2 * count :]
        if is_differentiated(gradient):

            def plainly(x: Tensor, *tensors: Tensor) -> Tensor:
                pairs = zip(ctx.masks, tensors[::2], tensors[1::2], strict=True)
                return _plainly(x, [Link(weight, mask, bias) for (mask, _), weight, bias in pairs])

            by_x, *others = gradients_with_graph(plainly, (units[0], *tensors), (needed[0], *needed[3:]), gradient)
            return by_x, None, None, *others
        by: list[Tensor | None] = [None] * (2 * count)
        for number in reversed(range(count)):
            below, weight, (mask, [blocks, columns]) = units[number], masked[number], ctx.masks[number]
            if needed[4 + 2 * number]:
                by[2 * number + 1] = gradient.sum(0) if tensors[2 * number + 1].dim() == 1 else gradient
            if needed[3 + 2 * number]:
                if _by_blocks(len(gradient), weight, blocks):
                    by_weight = torch.zeros_like(weight)
                    for start, stop, first, last in blocks:
                        part = by_weight[start:stop, first:last]
                        torch.mm(gradient[:, start:stop].mT, below[:, first:last], out=part)
                else:
                    by_weight = gradient.mT @ below
                by[2 * number] = by_weight if mask is None else by_weight.mul_(mask)
            if not any(needed[: 3 + 2 * number]):
                return None, None, None, *by
            if _by_blocks(len(gradient), weight, columns):
                into = torch.empty_like(below)
                for start, stop, first, last in columns:
                    torch.mm(gradient[:, first:last], weight[first:last, start:stop], out=into[:, start:stop])
            else:
                into = gradient @ weight
            gradient = _rectified(into, below) if number else into
        return gradient, None, None, *by


def _rectified(gradient: Tensor, below: Tensor) -> Tensor:
    """The gradient that a relu lets through, written over the one it got."""
    torch.ops.aten.threshold_backward.grad_input(gradient, below, 0, grad_input=gradient)
    return gradient
