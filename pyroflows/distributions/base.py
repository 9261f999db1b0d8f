"""Base distributions as modules, so that they follow ``.to(device)`` and ``state_dict``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError

__all__ = ["Base", "standard_normal"]


class Base(nn.Module):
    """A fixed distribution whose parameters are buffers; calling it gives the Pyro distribution.

    Args:
        distribution: a class or function from tensors to a Pyro distribution.
        event_dim: how many trailing batch dimensions become event dimensions.
        **parameters: its tensors, kept as buffers.

    Raises:
        OptionError: no tensor was given, so there is nothing that a device or dtype could be read from.
        ValueError: a parameter lies outside of its constraint.

    Example:
        >>> base = Base(dist.StudentT, df=torch.tensor(3.0), loc=torch.zeros(2), scale=torch.ones(2))
        >>> base().event_shape
        torch.Size([2])
    """

    def __init__(self, distribution: Callable[..., Any], event_dim: int = 1, **parameters: Tensor) -> None:
        super().__init__()
        if not parameters:
            raise OptionError("Base needs the distribution's parameters, as tensors by name.")
        distribution(**parameters)  # checks them, once
        quiet = "validate_args" in inspect.signature(distribution).parameters
        self.options: dict[str, Any] = {"validate_args": False} if quiet else {}
        self.distribution, self.event_dim, self.names = distribution, event_dim, tuple(parameters)
        for name, value in parameters.items():
            self.register_buffer(name, value)

    def forward(self) -> dist.TorchDistribution:
        """The distribution."""
        base = self.distribution(**{name: getattr(self, name) for name in self.names}, **self.options)
        return base.to_event(self.event_dim)

    def extra_repr(self) -> str:
        """The distribution's name."""
        return str(getattr(self.distribution, "__name__", self.distribution))


def standard_normal(input_dim: int) -> Base:
    """The standard normal on vectors of ``input_dim`` numbers.

    Example:
        >>> standard_normal(3)().event_shape
        torch.Size([3])
    """
    return Base(dist.Normal, loc=torch.zeros(input_dim), scale=torch.ones(input_dim))
