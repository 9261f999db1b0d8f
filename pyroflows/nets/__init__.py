"""Conditioner networks: plain modules from tensors to tensors, no densities."""

from pyroflows.nets.mlp import MLP, Activation
from pyroflows.nets.made import MADE

__all__ = ["MADE", "MLP", "Activation"]
