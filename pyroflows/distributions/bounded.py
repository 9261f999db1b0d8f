"""What distributions share that see a flow through something unobserved, so that they score by a lower bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.distributions.flow import Flow, Standardize
from pyroflows.distributions.support import Support

__all__ = ["Bounded"]


class Bounded(nn.Module):
    """A flow whose points are observed in part; the ``log_prob`` of what its call gives is a random lower bound.

    `pyroflows.fit` trains the bound. What it asks of a flow is here: that of the inner flow, unless a subclass knows
    better. A subclass writes ``forward(context)`` and what raises ``NotImplementedError`` here.

    Args:
        flow: the inner flow.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.context_dim = flow.context_dim

    @property
    def support(self) -> constraints.Constraint:
        """Where the data live."""
        raise NotImplementedError

    def unconstrained(self, x: Tensor) -> Tensor:
        """Points of the inner flow for data ``x``, before the map to their support: what is standardised."""
        raise NotImplementedError

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Sets the starting values of layers that take them from data ``x``."""
        raise NotImplementedError

    @property
    def input_dim(self) -> int:
        """The number of coordinates of a point."""
        return self.flow.input_dim

    @property
    def data_shape(self) -> torch.Size:
        """The shape of a point of the data."""
        return self.flow.data_shape

    @property
    def declared_support(self) -> Support | None:
        """Where the inner flow says that its points live."""
        return self.flow.declared_support

    def constrain(self, support: Support | None) -> None:
        """Declares where the inner flow's points live."""
        self.flow.constrain(support)

    @property
    def standardize(self) -> Standardize | None:
        """The inner flow's standardiser."""
        return self.flow.standardize

    @property
    def context_loc(self) -> Tensor:
        """The inner flow's shift of contexts."""
        return self.flow.context_loc

    @property
    def context_scale(self) -> Tensor:
        """The inner flow's scale of contexts."""
        return self.flow.context_scale
