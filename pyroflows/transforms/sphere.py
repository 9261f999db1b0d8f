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
from pyroflows.numerics import monotone_root
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


SPHERE = {dim: _Sphere(dim) for dim in range(1, 9)}
"""The circle, the sphere and those of higher dimension, up to 8, as sets of unit vectors ``[*batch, dim + 1]``."""


def _area(power: int, cos: Tensor, sin: Tensor, latitude: Tensor) -> Tensor:
    r""":math:`\int_0^\alpha \cos^m t \, dt`, a sum without cancellation."""
    area = sin if power % 2 else latitude
    for m in range(2 + power % 2, power + 1, 2):
        area = cos ** (m - 1) * sin / m + (m - 1) / m * area
    return area


def _half(power: int) -> float:
    r"""The same up to :math:`\pi / 2`."""
    return math.exp(math.lgamma((power + 1) / 2) - math.lgamma(power / 2 + 1)) * math.sqrt(math.pi) / 2


class EqualArea(FlowTransform):
    r"""Angles to the circle, or cylinder coordinates to a sphere, without a change of area but for a constant.

    The circle is :math:`y = (\cos\varphi, \sin\varphi)`. On the sphere :math:`\varphi` is the longitude and
    :math:`h = u / \pi` the height (Archimedes):

    .. math::
        y = (\sqrt{1 - h^2} \cos\varphi,\ \sqrt{1 - h^2} \sin\varphi,\ h), \qquad dA = \frac{1}{\pi}\, d\varphi\, du.

    In dimension :math:`k` the points of height :math:`h = \sin\alpha` are a sphere of dimension :math:`k - 1` and
    radius :math:`\cos\alpha`, and :math:`u / \pi` is the share of the area between the equator and there:

    .. math::
        y^{(k)} = (\cos\alpha\, y^{(k-1)},\ \sin\alpha), \qquad
        \frac{u_k}{\pi} = \frac{\int_0^\alpha \cos^{k-1} t\, dt}{\int_0^{\pi/2} \cos^{k-1} t\, dt}.

    From the third dimension on the latitude is searched for; the way back is a formula. The log-det is with respect to
    arc length or area. At the poles the other coordinates are arbitrary, so a density that depends on them there is not
    continuous at these two points.

    Args:
        input_dim: the dimension of the sphere: 1 for the circle, 2 for the sphere, up to 8.

    Raises:
        OptionError: ``input_dim`` is none of these.

    Example:
        >>> EqualArea(2)(torch.tensor([0.0, math.pi / 2]))
        tensor([0.8660, 0.0000, 0.5000])
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        if input_dim not in SPHERE:
            raise OptionError(
                f"expected input_dim 1 (the circle), 2 (the sphere) or up to {max(SPHERE)}, got {input_dim!r}."
            )
        self.input_dim = input_dim
        self.domain, self.codomain = TORUS, SPHERE[input_dim]
        searches = input_dim > 2
        self.vmaps = self.compiles = not searches
        self.sequential = searches, False

    def _log_det(self, value: Tensor, sign: int) -> Tensor:
        dtype = torch.promote_types(value.dtype, torch.float32)
        constant = sum(math.log(_half(k - 1) / math.pi) for k in range(2, self.input_dim + 1))
        return value.new_full(value.shape[:-1], sign * constant, dtype=dtype)

    def _height_and_radius(self, share: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        pole = share.abs() >= 1  # where the radius has no derivative
        inside = torch.where(pole, 0.0, share)
        if dim == 2:
            height, radius = inside, torch.sqrt((1 - inside) * (1 + inside))
        else:
            half = _half(dim - 1)

            def up_to(latitude: Tensor) -> tuple[Tensor, Tensor]:
                cos, sin = torch.cos(latitude), torch.sin(latitude)
                return _area(dim - 1, cos, sin, latitude) / half, (dim - 1) * torch.log(cos) - math.log(half)

            edge = torch.full_like(inside, math.pi / 2, dtype=torch.float64)
            latitude = monotone_root(up_to, inside.double(), bracket=(-edge, edge)).x
            height, radius = torch.sin(latitude).to(share.dtype), torch.cos(latitude).to(share.dtype)
        return torch.where(pole, share, height), torch.where(pole, 0.0, radius)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit vectors ``[*batch, input_dim + 1]``, and the constant."""
        self.check_width(x, self.input_dim)
        y = torch.stack([torch.cos(x[..., 0]), torch.sin(x[..., 0])], -1)
        for k in range(2, self.input_dim + 1):
            height, radius = self._height_and_radius(x[..., k - 1 : k] / math.pi, k)
            y = torch.cat([y * radius, height], -1)
        return y, self._log_det(x, 1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates ``[*batch, input_dim]``, and minus the constant."""
        if y.dim() == 0 or y.shape[-1] != self.input_dim + 1:
            raise ShapeError(f"expected unit vectors of {self.input_dim + 1} numbers, got shape {tuple(y.shape)}.")
        pole = (y[..., :1] == 0) & (y[..., 1:2] == 0)  # any longitude will do, and none has a derivative
        found = [torch.atan2(y[..., 1:2], torch.where(pole, 1.0, y[..., :1]))]
        for k in range(2, self.input_dim + 1):
            height = y[..., k : k + 1]
            if self.input_dim > 2:
                below = y[..., :k]
                pole = (below == 0).all(-1, keepdim=True)
                radius = torch.linalg.vector_norm(torch.where(pole, 1.0, below), dim=-1, keepdim=True)
                radius = torch.where(pole, 0.0, radius)
                latitude = torch.atan2(height, torch.where(pole & (height == 0), 1.0, radius))
                height = _area(k - 1, torch.cos(latitude), torch.sin(latitude), latitude) / _half(k - 1)
            found.append(math.pi * height)
        return torch.cat(found, -1), self._log_det(y, -1)

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
