"""What is watching the computation: a compiler, a tracer, a function transform, or nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_differentiated", "is_plainly_eager"]


def is_plainly_eager() -> bool:
    """Whether operations run one by one as written, recorded by reverse-mode autograd at the most.

    False under ``torch.compile``, ``torch.jit.trace``, the transforms of ``torch.func`` and forward-mode automatic
    differentiation. There a shortcut that works on concrete tensors would be lost or refused.

    Example:
        >>> is_plainly_eager()
        True
    """
    if torch.compiler.is_compiling():
        return False
    tracing = torch._C._get_tracing_state() is not None
    return not (tracing or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def is_differentiated(*gradients: Tensor) -> bool:
    """In a ``backward``: whether autograd has to follow it, for a second derivative or for a batch of gradients.

    Then first derivatives that are written out in place give way to the plain formula's.

    Example:
        >>> is_differentiated(torch.ones(2))
        True
        >>> with torch.no_grad():
        ...     is_differentiated(torch.ones(2))
        False
    """
    return torch.is_grad_enabled() or any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))
