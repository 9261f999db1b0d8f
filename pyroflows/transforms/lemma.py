r"""Layers :math:`y = x + f(x)` whose determinant is small by the matrix determinant lemma, inverted exactly.

Planar and radial: Rezende, Mohamed (2015), *Variational inference with normalizing flows*, arXiv:1505.05770.
Sylvester: van den Berg, Hasenclever, Tomczak, Welling (2018), *Sylvester normalizing flows for variational
inference*, arXiv:1803.05649.

Each is increasing at every value of its parameters: a raw product :math:`a` that has to stay above -1 enters as
:math:`a / (1 + 1.01 \log(1 + e^{-a}))`, which is :math:`a` far above zero and never below -1/1.01.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.numerics import matvec, monotone_root, positive, sum_last
from pyroflows.transforms.base import FlowTransform, with_variants
from pyroflows.transforms.matrix import reflected

__all__ = ["Planar", "Radial", "Sylvester"]

_Increasing = Literal["tanh", "arctan", "sigmoid"]
MARGIN = 0.01
"""How far the smallest slope of a layer stays above zero, about."""


def _activate(name: _Increasing, s: Tensor) -> tuple[Tensor, Tensor]:
    """A bounded increasing function and its slope, which lies in [0, 1]."""
    largest = torch.finfo(s.dtype).max
    s = s.clamp(-largest, largest)  # an infinite pre-activation is as saturated as a large one
    if name == "tanh":
        h = torch.tanh(s)
        return h, (1 - h) * (1 + h)
    if name == "sigmoid":
        h = torch.sigmoid(s)
        return h, h * torch.sigmoid(-s)
    return torch.atan(s), 1 / (1 + s.square())


def _check_activation(name: str) -> None:
    if name not in ("tanh", "arctan", "sigmoid"):
        raise OptionError(f'nonlinearity must be "tanh", "arctan" or "sigmoid", got {name!r}.')


def _shrink(a: Tensor) -> Tensor:
    """The factor ``k`` in ``(0, 1)`` with which ``k a > -1``."""
    return 1 / (1 + (1 + MARGIN) * softplus(-a))


def _dot(weights: Tensor, x: Tensor) -> Tensor:
    """``weights @ x``, where ``x`` may be huge: infinite at the worst, never NaN."""
    small = 2.0**-20
    return matvec(weights, x * small) / small


@with_variants({"nonlinearity": "arctan"})
class Planar(FlowTransform):
    r"""A push along one direction: :math:`y = x + \hat u\, h(w^\top x + b)`.

    With :math:`a = w^\top \hat u > -1` at every parameter value, :math:`\log|\det| = \log(1 + a\, h'(w^\top x + b))`.
    The inverse solves :math:`s + a\, h(s) = w^\top y + b`, one increasing equation in one unknown. It starts at
    the identity, :math:`u = 0`.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context; with one, a network gives :math:`u, w, b`.
        nonlinearity: :math:`h`: ``"tanh"``, ``"arctan"`` or ``"sigmoid"``.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: the nonlinearity is none of these.

    Example:
        >>> layer = Planar(3)
        >>> layer.inv(layer(torch.ones(5, 3))).shape
        torch.Size([5, 3])
    """

    sign = 1
    inverse = "numeric"
    sequential = (False, True)
    vmaps = False
    compiles = False

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        nonlinearity: _Increasing = "tanh",
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        _check_activation(nonlinearity)
        self.input_dim, self.nonlinearity = input_dim, nonlinearity
        self.declare_parameters(
            hidden_dims=hidden_dims,
            activation=activation,
            u=torch.zeros(input_dim),
            w=torch.randn(input_dim) / math.sqrt(input_dim),
            bias=torch.zeros(1),
        )

    def _direction(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raw = self.parameters_of(context)
        product = (raw["w"] * raw["u"]).sum(-1)
        shrink = _shrink(product)
        return raw["u"] * shrink.unsqueeze(-1), raw["w"], raw["bias"], product * shrink

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formula."""
        self.check_width(x, self.input_dim)
        u, w, bias, a = self._direction(context)
        h, slope = _activate(self.nonlinearity, _dot(w.unsqueeze(-2), x) + bias)
        y = x + u * h
        return y, sum_last(torch.log1p(a.unsqueeze(-1) * slope))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The root of one increasing equation, differentiable.

        Raises:
            InverseNotConverged: a parameter is NaN.
        """
        self.check_width(y, self.input_dim)
        u, w, bias, a = self._direction(context)
        reached = (_dot(w.unsqueeze(-2), y) + bias).squeeze(-1)

        def along(s: Tensor) -> tuple[Tensor, Tensor]:
            h, slope = _activate(self.nonlinearity, s)
            return s + a * h, torch.log1p(a * slope)

        root = monotone_root(along, reached)
        h, _ = _activate(self.nonlinearity, root.x)
        return y - u * h.unsqueeze(-1), -sum_last(root.log_slope, 0)


class Radial(FlowTransform):
    r"""Around a centre, points are pushed out or pulled in: :math:`y = x + \kappa (x - c) / (1 + \rho)`.

    Here :math:`\rho = |x - c| / \alpha` and :math:`\kappa = \beta / \alpha > -1`, so that

    .. math::
        \log|\det| = (D - 1) \log\Bigl(1 + \frac{\kappa}{1 + \rho}\Bigr)
        + \log\Bigl(1 + \frac{\kappa}{(1 + \rho)^2}\Bigr).

    The inverse is a formula: with :math:`P = |y - c| / \alpha`, :math:`\rho` is the positive root of
    :math:`\rho^2 + (1 + \kappa - P) \rho - P = 0`. It starts at the identity, :math:`\kappa = 0`.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        context_dim: the width of the context; with one, a network gives :math:`c, \alpha, \kappa`.
        hidden_dims: the hidden widths of that network.
        activation: its activation.

    Example:
        >>> layer = Radial(3)
        >>> layer.inv(layer(torch.ones(5, 3))).shape
        torch.Size([5, 3])
    """

    sign = 1

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        self.input_dim = input_dim
        self.declare_parameters(
            hidden_dims=hidden_dims,
            activation=activation,
            centre=torch.randn(input_dim),
            reach=torch.zeros(1),
            strength=torch.zeros(1),
        )

    def _from_centre(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The way from the centre ``[..., D]``, its length over alpha, and kappa, ``[..., 1]`` each."""
        self.check_width(value, self.input_dim)
        raw = self.parameters_of(context)
        way = value - raw["centre"]
        # Measured in units of the largest entry, so that no square overflows or vanishes.
        unit = way.detach().abs().amax(-1, keepdim=True)
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        square = (way / unit).square().sum(-1, keepdim=True)
        length = unit * torch.where(square > 0, square, torch.ones_like(square)).sqrt()
        length = torch.where(square > 0, length, torch.zeros_like(length))
        rho = (length / positive(raw["reach"])).clamp_max(torch.finfo(length.dtype).max / 8)
        return way, rho, positive(raw["strength"], MARGIN) - 1

    def _log_det(self, rho: Tensor, kappa: Tensor) -> Tensor:
        around = torch.log1p(kappa / (1 + rho))
        along = torch.log1p(kappa / (1 + rho) / (1 + rho))
        return (self.input_dim - 1) * sum_last(around) + sum_last(along)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formula."""
        way, rho, kappa = self._from_centre(x, context)
        return x + kappa * (way / (1 + rho)), self._log_det(rho, kappa)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formula backwards."""
        way, reached, kappa = self._from_centre(y, context)
        b = 1 + kappa - reached
        unit = b.detach().abs().clamp_min(1)
        root = unit * ((b / unit).square() + 4 * (reached / unit) / unit).sqrt()
        left = b > 0
        rho = torch.where(left, 2 * reached / torch.where(left, b + root, root), (root - b) / 2)
        return y - kappa * (way / (1 + rho + kappa)), -self._log_det(rho, kappa)


class Sylvester(FlowTransform):
    r"""A planar layer of :math:`M` directions at once: :math:`y = x + Q R\, h(\tilde R Q^\top x + b)`.

    :math:`Q` ``[D, M]`` has orthonormal columns, :math:`R` and :math:`\tilde R` ``[M, M]`` are upper triangular with
    :math:`R_{ii} \tilde R_{ii} > -1` at every parameter value, and

    .. math:: \log|\det| = \sum_i \log(1 + R_{ii} \tilde R_{ii}\, h'(s_i)), \qquad s = \tilde R Q^\top x + b.

    The inverse solves :math:`s + \tilde R R\, h(s) = \tilde R Q^\top y + b` from the last entry up: :math:`M`
    increasing equations in one unknown each. It starts at the identity, :math:`R = 0`.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        count_transforms: how many reflections a Householder product has; ``sylvester`` takes ``D // 2 + 1``.
        context_dim: the width of the context; with one, a network gives all parameters.
        width: :math:`M`, at most :math:`D`, which is the default.
        factor: how :math:`Q` is made: ``"householder"``, a product of reflections; ``"orthogonal"``, the orthonormal
            factor of a free matrix; ``"triangular"``, fixed columns of a permutation, the given one.
        permutation: which coordinates the columns of a triangular layer pick; default as they come.
        nonlinearity: :math:`h`: ``"tanh"``, ``"arctan"`` or ``"sigmoid"``.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> layer = Sylvester(3, width=2)
        >>> layer.inv(layer(torch.ones(5, 3))).shape
        torch.Size([5, 3])
    """

    sign = 1
    inverse = "numeric"
    sequential = (False, True)
    vmaps = False
    compiles = False

    def __init__(
        self,
        input_dim: int,
        count_transforms: int = 1,
        *,
        context_dim: int = 0,
        width: int | None = None,
        factor: Literal["householder", "orthogonal", "triangular"] = "householder",
        permutation: Sequence[int] | None = None,
        nonlinearity: _Increasing = "tanh",
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        _check_activation(nonlinearity)
        width = input_dim if width is None else width
        order = list(range(input_dim)) if permutation is None else [int(i) for i in permutation]
        if factor not in ("householder", "orthogonal", "triangular"):
            raise OptionError(f'factor must be "householder", "orthogonal" or "triangular", got {factor!r}.')
        if not 1 <= width <= input_dim or count_transforms < 1:
            raise OptionError(
                f"expected 1 <= width <= {input_dim} and count_transforms >= 1, got {width} and {count_transforms}."
            )
        if sorted(order) != list(range(input_dim)):
            raise OptionError(f"permutation must be one of 0 .. {input_dim - 1}, got {order}.")
        self.input_dim, self.width, self.factor, self.nonlinearity = input_dim, width, factor, nonlinearity
        self.register_buffer("columns", torch.eye(input_dim)[:, order[:width]])
        free = {"householder": (count_transforms, input_dim), "orthogonal": (input_dim, width)}
        frame = {"frame": torch.randn(free[factor]) / math.sqrt(input_dim)} if factor in free else {}
        self.declare_parameters(
            hidden_dims=hidden_dims,
            activation=activation,
            **frame,
            outer=torch.zeros(width, width),
            inner=torch.eye(width) + torch.randn(width, width).triu(1) / math.sqrt(width),
            bias=torch.zeros(width),
        )

    columns: Tensor

    def _orthonormal(self, frame: Tensor | None) -> Tensor:
        """``Q`` ``[*batch, D, M]``."""
        if frame is None:
            return self.columns
        if self.factor == "orthogonal":
            full = torch.promote_types(frame.dtype, torch.float32)  # no QR exists for half precision
            q, r = torch.linalg.qr((self.columns + frame).to(full))
            diagonal = torch.diagonal(r, dim1=-2, dim2=-1).detach()
            return (q * torch.where(diagonal < 0, -1.0, 1.0).to(full).unsqueeze(-2)).to(frame.dtype)
        return reflected(self.columns, frame)

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``Q R`` ``[*batch, D, M]``, ``R~ Q'`` ``[*batch, M, D]``, ``R~ R`` ``[*batch, M, M]`` and the bias."""
        raw = self.parameters_of(context)
        q, outer, inner = self._orthonormal(raw.get("frame")), raw["outer"], raw["inner"]
        diagonal = torch.diagonal(outer, dim1=-2, dim2=-1)
        product = diagonal * torch.diagonal(inner, dim1=-2, dim2=-1)
        outer = outer.triu(1) + torch.diag_embed(diagonal * _shrink(product))
        inner = inner.triu()
        return q @ outer, inner @ q.mT, inner @ outer, raw["bias"]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formula."""
        self.check_width(x, self.input_dim)
        out, into, core, bias = self._factors(context)
        h, slope = _activate(self.nonlinearity, _dot(into, x) + bias)
        y = x + matvec(out, h)
        return y, sum_last(torch.log1p(torch.diagonal(core, dim1=-2, dim2=-1) * slope))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Back-substitution, one root at a time, differentiable.

        Raises:
            InverseNotConverged: a parameter is NaN.
        """
        self.check_width(y, self.input_dim)
        out, into, core, bias = self._factors(context)
        reached = _dot(into, y) + bias
        later: list[Tensor] = []  # h of the entries that are already known, those after the current one
        log_slopes = []
        for i in reversed(range(self.width)):
            target = reached[..., i]
            if later:
                target = target - (core[..., i, i + 1 :] * torch.stack(later[::-1], -1)).sum(-1)
            a = core[..., i, i]

            def along(s: Tensor, a: Tensor = a) -> tuple[Tensor, Tensor]:
                h, slope = _activate(self.nonlinearity, s)
                return s + a * h, torch.log1p(a * slope)

            root = monotone_root(along, target)
            later.append(_activate(self.nonlinearity, root.x)[0])
            log_slopes.append(root.log_slope)
        h = torch.stack(later[::-1], -1)
        return y - matvec(out, h), -sum_last(torch.stack(log_slopes, -1))
