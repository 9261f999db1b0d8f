"""A method of a module, with other tensors in place of the module's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call_with"]


class _Method(nn.Module):
    """What ``torch.func.functional_call`` can call."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any) -> Any:
        return self.method(*arguments)


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], method: Callable[..., Any], *arguments: Any) -> Any:
    """``method(*arguments)`` of a module, while its tensors of these names are replaced.

    Args:
        module: the module that the method belongs to.
        tensors: by the names that ``module.named_parameters()`` and ``named_buffers()`` use.
        method: a bound method of the module.
        *arguments: of the method.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> call_with(line, {"weight": torch.tensor([[2.0]]), "bias": torch.ones(1)}, line.forward, torch.ones(1))
        tensor([3.])
    """
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return torch.func.functional_call(_Method(module, method), named, arguments)
