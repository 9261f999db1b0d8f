"""First derivatives that can themselves be differentiated, for functions whose own are written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["gradients_with_graph"]


def gradients_with_graph(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    outer: Tensor | tuple[Tensor, ...],
) -> list[Tensor | None]:
    """What ``backward`` of a function returns where its result is to be differentiated again.

    One input may have been computed from another, such as parameters that a network gives for a point. That path is
    not the function's, so each input gets a name of its own here, and no gradient goes past it.

    Args:
        function: the function as plain operations.
        inputs: its arguments; ``None`` is passed on.
        needed: which of them get a gradient.
        outer: the gradients with respect to its results.

    Returns:
        A gradient for each argument that needs one.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> by_first, by_second = gradients_with_graph(torch.mul, (x, 2 * x), (True, True), torch.tensor(1.0))
        >>> by_first.item(), by_second.item()
        (6.0, 3.0)
    """
    again = torch.is_grad_enabled()  # else there is no graph, and the gradients come as a batch or are plain ones
    with torch.enable_grad():
        inputs = [None if value is None else value.view_as(value) for value in inputs]
        # What was frozen since the function was called gets none, as with plain operations.
        leaves = {i: x for i, x in enumerate(inputs) if needed[i] and x is not None and x.requires_grad}
        if not leaves:
            return [None] * len(inputs)
        found = torch.autograd.grad(function(*inputs), [*leaves.values()], outer, create_graph=again, allow_unused=True)
    by = dict(zip(leaves, found, strict=True))
    return [by.get(i) for i in range(len(inputs))]
