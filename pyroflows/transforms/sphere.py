r"""The circle and the sphere as sets of unit vectors, and the chart that leads there from angles.

Rezende, Papamakarios, Racanière, Albergo, Kanwar, Shanahan, Cranmer (2020), *Normalizing flows on tori and
spheres*, arXiv:2002.02428.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import ComposeTransform, biject_to, transform_to

from pyroflows.errors import OptionError, ShapeError
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.manifolds import TORUS

__all__ = ["SPHERE", "EqualArea"]


class _Sphere(type(pyro_constraints.sphere)):  # type: ignore[misc]
    """Unit vectors of a known number of coordinates, so that `EqualArea` is a chart."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def check(self, value: Tensor) -> Tensor:
        """Whether the last dimension holds vectors of length one, up to rounding."""
        if value.shape[-1] != self.dim + 1:
            return torch.zeros(value.shape[:-1], dtype=torch.bool, device=value.device)
        found: Tensor = super().check(value)
        return found

    def __repr__(self) -> str:
        return f"Sphere(dim={self.dim})"


SPHERE = {1: _Sphere(1), 2: _Sphere(2)}
"""The circle and the sphere, by dimension, as sets of unit vectors ``[*batch, dim + 1]``."""


class EqualArea(FlowTransform):
    r"""Angles to the circle, or cylinder coordinates to the sphere, without a change of area but for a constant.

    The circle is :math:`y = (\cos\varphi, \sin\varphi)`. On the sphere :math:`\varphi` is the longitude and
    :math:`h = u / \pi` the height (Archimedes):

    .. math::
        y = (\sqrt{1 - h^2} \cos\varphi,\ \sqrt{1 - h^2} \sin\varphi,\ h), \qquad dA = \frac{1}{\pi}\, d\varphi\, du.

    The log-det is with respect to arc length or area. At the poles the longitude is arbitrary, so a density that
    depends on it there is not continuous at these two points.

    Args:
        input_dim: 1 for the circle, 2 for the sphere.

    Raises:
        OptionError: ``input_dim`` is neither.

    Example:
        >>> EqualArea(2)(torch.tensor([0.0, math.pi / 2]))
        tensor([0.8660, 0.0000, 0.5000])
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        if input_dim not in SPHERE:
            raise OptionError(f"expected input_dim 1 (the circle) or 2 (the sphere), got {input_dim!r}.")
        self.input_dim = input_dim
        self.domain, self.codomain = TORUS, SPHERE[input_dim]

    def _log_det(self, value: Tensor, sign: int) -> Tensor:
        dtype = torch.promote_types(value.dtype, torch.float32)
        return value.new_full(value.shape[:-1], -sign * (self.input_dim - 1) * math.log(math.pi), dtype=dtype)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit vectors ``[*batch, input_dim + 1]``, and the constant."""
        self.check_width(x, self.input_dim)
        y = torch.stack([torch.cos(x[..., 0]), torch.sin(x[..., 0])], -1)
        if self.input_dim == 2:
            height = x[..., 1:] / math.pi
            square = (1 - height) * (1 + height)
            pole = square <= 0  # where the root has no derivative
            radius = torch.where(pole, 0.0, torch.sqrt(torch.where(pole, 1.0, square)))
            y = torch.cat([y * radius, height], -1)
        return y, self._log_det(x, 1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates ``[*batch, input_dim]``, and minus the constant."""
        if y.dim() == 0 or y.shape[-1] != self.input_dim + 1:
            raise ShapeError(f"expected unit vectors of {self.input_dim + 1} numbers, got shape {tuple(y.shape)}.")
        pole = (y[..., :1] == 0) & (y[..., 1:2] == 0)  # any longitude will do, and none has a derivative
        longitude = torch.atan2(y[..., 1:2], torch.where(pole, 1.0, y[..., :1]))
        return torch.cat([longitude, math.pi * y[..., 2:]], -1), self._log_det(y, -1)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """One number more."""
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """One number less."""
        return torch.Size((*shape[:-1], shape[-1] - 1))


def _to_sphere(sphere: _Sphere) -> ComposeTransform:
    return ComposeTransform([biject_to(TORUS), EqualArea(sphere.dim)])


biject_to.register(_Sphere, _to_sphere)
transform_to.register(_Sphere, _to_sphere)
