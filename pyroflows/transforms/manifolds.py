r"""Layers on the circle, the torus and the sphere: maps of angles, and couplings that see angles as points of a circle.

Rezende, Papamakarios, Racanière, Albergo, Kanwar, Shanahan, Cranmer (2020), *Normalizing flows on tori and
spheres*, arXiv:2002.02428.

An angle is a number in :math:`[-\pi, \pi)`, whose two ends are one point. Every layer here maps the box
:math:`[-\pi, \pi]^D` onto itself, so Jacobians are square and log-dets are the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor, nn
from torch.distributions import ComposeTransform, biject_to, constraints, transform_to

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import MADE, MLP, Activation
from pyroflows.numerics import bounded_log_scale, monotone_root, rational_quadratic
from pyroflows.transforms.base import FlowTransform, with_variants
from pyroflows.transforms.maps import NumericMap, UnivariateMap
from pyroflows.transforms.splines import SplineMap
from pyroflows.transforms.structures import Autoregressive, Coupling, coupling_mask

__all__ = [
    "CIRCLE_MAPS",
    "SPHERE",
    "TORUS",
    "CircularAutoregressive",
    "CircularCoupling",
    "CircularSpline",
    "EqualArea",
    "Moebius",
    "wrap_angle",
]

TORUS = constraints.independent(constraints.interval(-math.pi, math.pi), 1)
"""Vectors of angles in ``[-pi, pi]``."""


def wrap_angle(angle: Tensor) -> Tensor:
    r"""The same angle in :math:`[-\pi, \pi)`; one that lies there already comes back to the last digit.

    Args:
        angle: angles in radians, any shape.

    Example:
        >>> wrap_angle(torch.tensor([0.5, 4.0, -7.0]))
        tensor([ 0.5000, -2.2832, -0.7168])
    """
    inside = (angle >= -math.pi) & (angle < math.pi)
    return torch.where(inside, angle, torch.remainder(angle + math.pi, 2 * math.pi) - math.pi)


# --- maps of the circle ----------------------------------------------------------------------------------


MAX_LOG_RATIO = 3.0
"""The bound of the raw numbers of a circular spline."""


class CircularSpline(SplineMap):
    r"""A rational-quadratic spline of the circle, turned by an angle: :math:`y = g(x) + t` modulo :math:`2\pi`.

    The spline :math:`g` maps :math:`[-\pi, \pi]` onto itself with the same slope at both ends, so the density is
    continuous where they meet. The raw numbers are bounded: slopes at knots lie between 1/20 and 20, bins differ by a
    factor of 400 at most, and the turn goes at most once round. What a layer loses to rounding, the next ones of a
    bounded space would scatter over all of it.

    Args:
        bins: the number of bins, 2 to 500.

    Raises:
        OptionError: ``bins`` is out of range.

    Example:
        >>> CircularSpline(bins=4).params
        13
    """

    def __init__(self, bins: int = 8) -> None:
        super().__init__(bins, math.pi, [bins, bins, bins, 1])

    def spline(self, value: Tensor, *raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The spline after the turn back, or before the turn."""
        widths, heights, slopes = (bounded_log_scale(part, MAX_LOG_RATIO) for part in raw[:3])
        turn = raw[3]
        slopes = torch.cat([slopes, slopes[..., :1]], -1)
        turn = wrap_angle(bounded_log_scale(turn[..., 0], 2 * math.pi))
        value = wrap_angle(value - turn if inverse else value)
        result, log_slope = rational_quadratic(value, widths, heights, slopes, bound=math.pi, inverse=inverse)
        return wrap_angle(result if inverse else result + turn), log_slope


class Moebius(NumericMap):
    r"""A weighted mean of Möbius transformations of the circle, turned by an angle.

    A Möbius transformation :math:`z \mapsto (z - \omega) / (1 - \bar\omega z)` maps the unit circle to itself. With
    :math:`z = e^{i x}` it takes the angle :math:`x` to :math:`x - 2 \arg(1 - \bar\omega z)`, so the mean is

    .. math::
        y = x + t - 2 \sum_k \rho_k \arg(1 - \bar\omega_k z), \qquad
        \frac{dy}{dx} = \sum_k \rho_k \frac{1 - |\omega_k|^2}{|z - \omega_k|^2}

    with weights :math:`\rho_k` that sum to one and centres :math:`|\omega_k| < 0.99` in the unit disc. It is smooth on
    the circle, and its slope is a mixture of wrapped Cauchy densities. The centres start on a small circle, where they
    nearly cancel. The inverse is searched for.

    Args:
        centres: how many transformations are mixed.

    Raises:
        OptionError: ``centres`` is not a positive integer.

    Example:
        >>> Moebius(centres=3).params
        10
    """

    def __init__(self, centres: int = 8) -> None:
        if not isinstance(centres, int) or centres < 1:
            raise OptionError(f"centres must be a positive integer, got {centres!r}.")
        self.centres, self.params = centres, 3 * centres + 1

    def _lifted(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The map of the line that goes round the circle once each time ``x`` does, and its log-slope."""
        weight, across, up = params[..., :-1].unflatten(-1, (3, -1)).unbind(-2)
        weight = weight.softmax(-1)
        place = torch.arange(self.centres, dtype=x.dtype, device=x.device) * (2 * math.pi / self.centres)
        spread = 0.0 if self.centres == 1 else 0.1  # centres that start in one place would stay in one place
        across, up = across + spread * torch.cos(place), up + spread * torch.sin(place)
        shrink = 0.99 / torch.sqrt(1 + across.square() + up.square())
        across, up = across * shrink, up * shrink
        cos, sin = torch.cos(x).unsqueeze(-1), torch.sin(x).unsqueeze(-1)
        turned = 2 * torch.atan2(across * sin - up * cos, 1 - across * cos - up * sin)
        inside = 1 - across.square() - up.square()
        slope = inside / ((cos - across).square() + (sin - up).square())
        return x + wrap_angle(params[..., -1]) + (weight * turned).sum(-1), torch.log((weight * slope).sum(-1))

    def _wide(self, value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(value.dtype, torch.float32)
        return value.to(dtype), params.to(dtype)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the transformations, turned, and its log-slope."""
        y, log_slope = self._lifted(*self._wide(x, params))
        return wrap_angle(y).to(x.dtype), log_slope

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The root, and minus the log-slope there."""
        goal, raw = self._wide(y, params)
        shape = torch.broadcast_shapes(goal.shape, raw.shape[:-1])
        root = monotone_root(lambda x: self._lifted(x, raw), goal.expand(shape))
        return wrap_angle(root.x).to(y.dtype), -root.log_slope


CIRCLE_MAPS: dict[str, Callable[..., UnivariateMap]] = {"moebius": Moebius, "spline": CircularSpline}
"""Maps of the circle by name."""


def _circle_map(map: str | UnivariateMap, **options: Any) -> UnivariateMap:
    if isinstance(map, str) and map not in CIRCLE_MAPS:
        raise OptionError(f"no map of the circle {map!r}. Known maps: {', '.join(sorted(CIRCLE_MAPS))}.")
    try:
        return CIRCLE_MAPS[map](**options) if isinstance(map, str) else map
    except TypeError as error:
        raise OptionError(f"the map {map!r} does not take these options: {error}") from error


# --- layers on the torus ---------------------------------------------------------------------------------


class _SeesAngles(nn.Module):
    """A network that is given the cosine and sine of each angle, and other coordinates as they are."""

    angles: Tensor
    others: Tensor

    def __init__(self, angles: Sequence[bool], outputs: int, **network: Any) -> None:
        super().__init__()
        self.register_buffer("angles", torch.tensor([i for i, a in enumerate(angles) if a], dtype=torch.long))
        self.register_buffer("others", torch.tensor([i for i, a in enumerate(angles) if not a], dtype=torch.long))
        self.network = MLP(len(angles) + sum(angles), outputs, **network)

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        """The outputs ``[*batch, outputs]``."""
        if x is not None:
            angles, others = x.index_select(-1, self.angles), x.index_select(-1, self.others)
            x = torch.cat([torch.cos(angles), torch.sin(angles), others], -1)
        out: Tensor = self.network(x, context)
        return out


@with_variants({"map": "moebius", "centres": 4, "hidden_dims": (32,)})
class CircularCoupling(Coupling):
    r"""Some angles steer the maps of the others, through their cosines and sines: a layer of the torus.

    Args:
        input_dim: the number of coordinates, in :math:`[-\pi, \pi]`.
        map: ``"spline"``, ``"moebius"``, or a map of the circle; of an interval for coordinates that are no angles.
        context_dim: the width of the context.
        mask: which coordinates steer: ``"split"``, ``"checkerboard"`` or booleans, see `Coupling`.
        angles: one boolean a coordinate, false for those that are positions in an interval and no angles; default all
            true. Those that are moved must be of one kind.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        **options: of the map.

    Raises:
        OptionError: there is no such mask, or it has another length, leaves nothing to be moved, or mixes two kinds;
            or the map's name is unknown.

    Example:
        >>> layer = CircularCoupling(2, bins=4)
        >>> y = layer(torch.tensor([[3.0, -math.pi], [3.0, math.pi]]))  # one point of the torus
        >>> bool(torch.isclose(y[0], y[1]).all())
        True
    """

    def __init__(
        self,
        input_dim: int,
        map: str | UnivariateMap = "spline",
        *,
        context_dim: int = 0,
        mask: str | Sequence[bool] | None = None,
        angles: Sequence[bool] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        residual: bool = False,
        **options: Any,
    ) -> None:
        steers = coupling_mask(mask, input_dim)
        periodic = [True] * input_dim if angles is None else list(angles)
        if len(periodic) != input_dim:
            raise OptionError(f"angles must hold {input_dim} booleans, got {angles}.")
        kinds = {angle for angle, steer in zip(periodic, steers, strict=True) if not steer}
        if len(kinds) > 1:
            raise OptionError("a coupling moves angles or other coordinates, not both; choose another mask.")
        built = _circle_map(map, **options)
        net = _SeesAngles(
            [angle for angle, steer in zip(periodic, steers, strict=True) if steer],
            (input_dim - sum(steers)) * built.params,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
        )
        super().__init__(built, input_dim, context_dim=context_dim, mask=steers, net=net)
        self.domain = self.codomain = TORUS


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([torch.cos(angle), torch.sin(angle)], -1)


class CircularAutoregressive(Autoregressive):
    r"""The map of each angle steered by the angles before it, through their cosines and sines.

    Args:
        input_dim: the number of angles.
        map: ``"spline"``, ``"moebius"``, or a map of the circle.
        context_dim: the width of the context.
        order: the rank of each angle, a permutation of ``0 .. input_dim - 1``; default as they come.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        **options: of the map.

    Raises:
        OptionError: ``order`` is not a permutation, or the map's name is unknown.

    Example:
        >>> layer = CircularAutoregressive(3, bins=4)
        >>> torch.allclose(layer.inv(layer(torch.ones(3))), torch.ones(3))
        True
    """

    def __init__(
        self,
        input_dim: int,
        map: str | UnivariateMap = "spline",
        *,
        context_dim: int = 0,
        order: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        residual: bool = False,
        **options: Any,
    ) -> None:
        built = _circle_map(map, **options)
        net = MADE(
            input_dim,
            built.params,
            order=order,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
            features=_on_circle,
        )
        super().__init__(built, input_dim, context_dim=context_dim, net=net)
        self.domain = self.codomain = TORUS


# --- the circle and the sphere as sets of unit vectors ---------------------------------------------------


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
