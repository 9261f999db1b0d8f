r"""Flows on the torus and on the sphere, and the bases that they start from.

Rezende, Papamakarios, Racanière, Albergo, Kanwar, Shanahan, Cranmer (2020), *Normalizing flows on tori and
spheres*, arXiv:2002.02428.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.distributions.base import Base
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.stack import directed, turned
from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.transforms import (
    CIRCLE_MAPS,
    CircularAutoregressive,
    CircularCoupling,
    CircularSpline,
    Compose,
    EqualArea,
    FlowTransform,
    RationalSpline,
    coupling_mask,
    with_input_dims,
    with_variants,
)

__all__ = ["ncsf", "sphere", "uniform_angles", "von_mises_angles"]


class _UniformAngle(dist.Uniform):
    """Uniform on an interval whose two ends are one point: the density is the same at both."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The constant, and NaN where the value is."""
        return 0 * value - torch.log(self.high - self.low)


class _VonMises(dist.VonMises):
    """A von Mises distribution that is a base: nothing is trained in it, so its samples have no gradient to carry."""

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A sample."""
        return self.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """As torch's, with the Bessel function to the last digits."""
        half = torch.sin((value - self.loc) / 2)
        return -2 * self.concentration * half.square() - torch.log(2 * math.pi * torch.special.i0e(self.concentration))


def uniform_angles(input_dim: int) -> Base:
    r"""The uniform distribution on :math:`[-\pi, \pi]^D`.

    Example:
        >>> bool((uniform_angles(2)().sample((100,)).abs() <= math.pi).all())
        True
    """
    edge = torch.full((input_dim,), math.pi)
    return Base(_UniformAngle, low=-edge, high=edge)


def von_mises_angles(input_dim: int, concentration: float = 1.0) -> Base:
    """Independent von Mises distributions about the angle 0.

    Args:
        input_dim: the number of angles.
        concentration: how narrow they are.

    Example:
        >>> von_mises_angles(2)().log_prob(torch.zeros(2))
        tensor(-2.1476)
    """
    return Base(_VonMises, loc=torch.zeros(input_dim), concentration=torch.full((input_dim,), float(concentration)))


@with_variants(
    {"structure": "autoregressive", "base": "von_mises", "transforms": 2},
    {"map": "moebius", "bins": 4, "transforms": 2, "hidden_dims": (32,)},
)
def ncsf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_dims: Sequence[int] = (128, 128),
    bins: int = 8,
    map: Literal["spline", "moebius"] = "spline",
    structure: Literal["coupling", "autoregressive"] = "coupling",
    direction: Literal["score", "sample"] = "score",
    base: Literal["uniform", "von_mises"] = "uniform",
    activation: Activation = "relu",
    residual: bool = False,
) -> Flow:
    r"""Neural circular spline flow: a density of angles, on the torus (arXiv:2002.02428).

    Angles are in radians, in :math:`[-\pi, \pi]`; `pyroflows.transforms.wrap_angle` brings others there. The density is
    continuous where the two ends meet. The support is that interval for each angle, so in a model that NUTS samples,
    ``biject_to`` maps the line onto it: a chain does not step across the ends.

    Args:
        input_dim: the number of angles.
        context_dim: the width of the context.
        transforms: the number of layers.
        hidden_dims: the hidden widths of each layer's network, which reads cosines and sines.
        bins: the number of bins of a spline, or of centres of a Möbius mixture.
        map: the maps of the circle, `CircularSpline` or `Moebius`; the inverse of the latter is searched for.
        structure: ``"coupling"``: both directions take one pass; ``"autoregressive"``: one of them finds one angle
            after another.
        direction: which direction of an autoregressive flow is the fast one.
        base: ``"uniform"``, or ``"von_mises"`` with concentration 1.
        activation: the activation of the networks.
        residual: whether their hidden layers have skip connections.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> flow = ncsf(2, transforms=2)
        >>> ends = torch.tensor([[math.pi, 1.0], [-math.pi, 1.0]])
        >>> bool(torch.isclose(*flow().log_prob(ends), atol=1e-5))
        True
    """
    if map not in CIRCLE_MAPS or structure not in ("coupling", "autoregressive") or base not in _BASES:
        raise OptionError(
            'map must be "spline" or "moebius", structure "coupling" or "autoregressive", and base "uniform" or '
            f'"von_mises"; got {map!r}, {structure!r} and {base!r}.'
        )
    network: dict[str, Any] = {
        "context_dim": context_dim,
        "hidden_dims": hidden_dims,
        "activation": activation,
        "residual": residual,
    }

    def layer(i: int) -> FlowTransform:
        built = CIRCLE_MAPS[map](bins)
        if structure == "coupling":
            mask = coupling_mask("checkerboard", input_dim, flip=i % 2 == 1)
            return CircularCoupling(input_dim, built, mask=mask, **network)
        return CircularAutoregressive(input_dim, built, order=turned(input_dim, i), **network)

    each = layer if structure == "coupling" and direction == "score" else directed(layer, direction)
    return Flow(_layers(each, transforms), _BASES[base](input_dim))


_BASES = {"uniform": uniform_angles, "von_mises": von_mises_angles}


def _layers(layer: Any, transforms: int) -> Compose:
    if not isinstance(transforms, int) or transforms < 1:
        raise OptionError(f"transforms must be a positive integer, got {transforms!r}.")
    return Compose([layer(i) for i in range(transforms)])


@with_input_dims(1, 2)
def sphere(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_dims: Sequence[int] = (128, 128),
    bins: int = 8,
    activation: Activation = "relu",
    residual: bool = False,
) -> Flow:
    r"""A density of unit vectors, on the circle or a sphere, with respect to arc length or area (arXiv:2002.02428).

    Couplings in cylinder coordinates: the heights steer a spline of the longitude, a circle, and then splines of every
    other height, an interval, are steered by the rest; then `EqualArea`. It starts near the uniform density.

    Args:
        input_dim: the dimension: 1 for the circle, points of 2 numbers; 2 for the sphere, points of 3; up to 8.
        context_dim: the width of the context.
        transforms: the number of layers; on the sphere, one turns about the axis and the next moves along it, and from
            three dimensions on heights move in two layers.
        hidden_dims: the hidden widths of each layer's network.
        bins: the number of bins of a spline.
        activation: the activation of the networks.
        residual: whether their hidden layers have skip connections.

    Raises:
        OptionError: another dimension, or an option has a value that it cannot take.

    Example:
        >>> flow = sphere(2)
        >>> flow().log_prob(torch.tensor([0.0, 0.6, 0.8])), -math.log(4 * math.pi)
        (tensor(-2.5..., grad_fn=<...>), -2.53...)
    """
    chart = EqualArea(input_dim)
    network: dict[str, Any] = {
        "context_dim": context_dim,
        "hidden_dims": hidden_dims,
        "activation": activation,
        "residual": residual,
    }

    heights = range(1, input_dim)
    turns = [moved for moved in ([0], heights[::2], heights[1::2]) if moved]

    def layer(i: int) -> FlowTransform:
        moved = turns[i % len(turns)]
        map = CircularSpline(bins) if 0 in moved else RationalSpline(bins, math.pi)
        mask = [j not in moved for j in range(input_dim)]
        angles = [j == 0 for j in range(input_dim)]
        return CircularCoupling(input_dim, map, mask=mask, angles=angles, **network)

    return Flow(_layers(layer, transforms), uniform_angles(input_dim), chart=chart)
