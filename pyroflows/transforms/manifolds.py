r"""Layers on the circle and the torus: maps of angles, and couplings that see angles as points of a circle.

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
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.nets import MADE, MLP, Activation
from pyroflows.numerics import bounded_log_scale, monotone_root, rational_quadratic
from pyroflows.transforms.base import with_variants
from pyroflows.transforms.maps import NumericMap, UnivariateMap
from pyroflows.transforms.splines import SplineMap
from pyroflows.transforms.structures import Autoregressive, Coupling, coupling_mask

__all__ = [
    "CIRCLE_MAPS",
    "TORUS",
    "CircularAutoregressive",
    "CircularCoupling",
    "CircularSpline",
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
