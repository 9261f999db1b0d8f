"""Conditioner networks: plain modules from tensors to tensors, no densities."""

from pyroflows.nets.cnn import CNN
from pyroflows.nets.made import MADE
from pyroflows.nets.mlp import MLP, Activation

__all__ = ["CNN", "MADE", "MLP", "Activation"]
