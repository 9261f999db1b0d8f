"""Networks: plain modules from tensors to tensors, no densities."""

from pyroflows.nets.cnn import CNN
from pyroflows.nets.made import MADE
from pyroflows.nets.mlp import MLP, Activation
from pyroflows.nets.potential import PotentialGradient
from pyroflows.nets.velocity import UserVelocity, Velocity, VelocityMLP, as_velocity

__all__ = [
    "CNN",
    "MADE",
    "MLP",
    "Activation",
    "PotentialGradient",
    "UserVelocity",
    "Velocity",
    "VelocityMLP",
    "as_velocity",
]
