r"""Linear layers: matrices by LU, QR, SVD, one triangle, or a diagonal and a low rank.

Kingma, Dhariwal (2018), *Glow*, arXiv:1807.03039; Oliva et al. (2018), *Transformation autoregressive
networks*, arXiv:1801.09819; Hoogeboom, van den Berg, Welling (2019), *Emerging convolutions for generative
normalizing flows*, arXiv:1901.11137 (QR).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyroflows.errors import OptionError
from pyroflows.numerics import matvec, positive, sum_last
from pyroflows.transforms.base import with_variants
from pyroflows.transforms.matrix import Factor, Linear, normals_of_identity, reflected, rotation
from pyroflows.transforms.permutation import as_permutation, sign_of

__all__ = ["LULinear", "LowRankLinear", "QRLinear", "SVDLinear", "TriangularLinear"]


# --- factors ---------------------------------------------------------------------------------------------


def _triangular(entries: Tensor, diagonal: Tensor | None, *, upper: bool) -> Factor:
    r"""The strict triangle of ``entries / sqrt(D)`` with a positive diagonal, one if there is none."""
    triangle = (entries.triu(1) if upper else entries.tril(-1)) / math.sqrt(entries.shape[-1])
    unit = diagonal is None
    values = torch.ones_like(entries[..., 0]) if diagonal is None else positive(diagonal)
    matrix = triangle + torch.diag_embed(values)

    def solve(y: Tensor) -> Tensor:
        if matrix.dim() == 2:  # one matrix for all rows
            rows = y.reshape(-1, y.shape[-1])
            options = {"upper": not upper, "left": False, "unitriangular": unit}
            return torch.linalg.solve_triangular(matrix.mT, rows, **options).reshape(y.shape)
        column = torch.linalg.solve_triangular(matrix, y.unsqueeze(-1), upper=upper, unitriangular=unit)
        return column.squeeze(-1)

    return Factor(lambda x: matvec(matrix, x), solve, sum_last(torch.log(values)))


def _diagonal(raw: Tensor) -> Factor:
    values = positive(raw)
    return Factor(lambda x: values * x, lambda y: y / values, sum_last(torch.log(values)))


def _rank_one(u: Tensor, v: Tensor) -> Factor:
    r""":math:`I + k u v^\top` by Sherman and Morrison, with :math:`k > 0` such that :math:`k v^\top u > -1` and
    :math:`k |u| |v| < 10`: what one step stretches without bound, the next one could cancel.
    """
    u = u / torch.sqrt(1 + u.square().sum(-1, keepdim=True) * v.square().sum(-1, keepdim=True) / 100)
    product = (u * v).sum(-1, keepdim=True)
    shrink = 1 / (1 + 1.01 * softplus(-product))
    largest = v.detach().abs().amax(-1, keepdim=True) * v.shape[-1]
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))  # so that no product overflows
    u, v, a = u * shrink * unit, v / unit, product * shrink

    def times(x: Tensor) -> Tensor:
        return x + u * (v * x).sum(-1, keepdim=True)

    def solve(y: Tensor) -> Tensor:
        return y - u * ((v * y).sum(-1, keepdim=True) / (1 + a))

    return Factor(times, solve, sum_last(torch.log1p(a)))


# --- layers ----------------------------------------------------------------------------------------------


@with_variants({"permutation": "random"})
class LULinear(Linear):
    r"""A linear map with a triangular factorisation: :math:`y = P L U (x + b)`, starting at :math:`P x`.

    :math:`L` is unit lower triangular, :math:`U` upper triangular with a positive diagonal, and entries off the
    diagonals are scaled by :math:`1 / \sqrt{D}`. :math:`P` is a fixed permutation, a buffer. With the right one
    every invertible matrix is of this form up to the signs of the diagonal. The shift comes first: the inverse then
    solves for :math:`y` itself, and a large shift cannot carry the last digits of :math:`L` and :math:`U` into it.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        context_dim: the width of the context; with one, a network gives :math:`L`, :math:`U` and :math:`b`.
        bias: whether :math:`b` is learned; zero otherwise.
        permutation: :math:`P`: ``"identity"``, ``"reverse"``, ``"random"``, or which entry goes where.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: ``permutation`` is none of these.

    Example:
        >>> LULinear(2)(torch.tensor([1.0, 2.0])).detach().round(decimals=5)
        tensor([1., 2.])
    """

    shift_first = True
    permutation: Tensor
    back: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        bias: bool = True,
        permutation: str | Sequence[int] = "identity",
        **network: Any,
    ) -> None:
        square = torch.zeros(input_dim, input_dim)
        initial = {"lower": square, "upper": square, "diagonal": torch.zeros(input_dim)}
        super().__init__(input_dim, initial, context_dim=context_dim, bias=bias, **network)
        self.permuted = not isinstance(permutation, str) or permutation != "identity"
        if self.permuted:
            self.register_buffer("permutation", as_permutation(permutation, input_dim))
            self.register_buffer("back", torch.argsort(self.permutation))

    @property
    def sign(self) -> int:
        """The sign of the permutation."""
        return sign_of(self.permutation) if self.permuted else 1

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """The permutation, the lower and the upper triangle."""
        upper = _triangular(raw["upper"], raw["diagonal"], upper=True)
        lower = _triangular(raw["lower"], None, upper=False)
        if not self.permuted:
            return lower, upper
        return (
            Factor(
                lambda x: x.index_select(-1, self.permutation),
                lambda y: y.index_select(-1, self.back),
                torch.zeros_like(lower.log_det),
            ),
            lower,
            upper,
        )


class QRLinear(Linear):
    r"""A linear map as a rotation of a triangle: :math:`y = Q R x + b`, starting at the identity.

    :math:`Q` is a product of Householder reflections and :math:`R` upper triangular with a positive diagonal, its
    other entries scaled by :math:`1 / \sqrt{D}`. With :math:`D` reflections every matrix with a positive determinant
    is of this form.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        context_dim: the width of the context; with one, a network gives all parameters.
        reflections: the number of reflections, even; default ``input_dim`` or one more.
        bias: whether :math:`b` is learned; zero otherwise.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: the number of reflections is odd or not positive.

    Example:
        >>> QRLinear(2)(torch.tensor([1.0, 2.0])).detach().round(decimals=5)
        tensor([1., 2.])
    """

    sign = 1
    identity: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        reflections: int | None = None,
        bias: bool = True,
        **network: Any,
    ) -> None:
        initial = {
            "normals": normals_of_identity(input_dim, reflections),
            "upper": torch.zeros(input_dim, input_dim),
            "diagonal": torch.zeros(input_dim),
        }
        super().__init__(input_dim, initial, context_dim=context_dim, bias=bias, **network)
        self.register_buffer("identity", torch.eye(input_dim))

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """The rotation and the triangle."""
        turn = reflected(self.identity.to(raw["normals"].dtype), raw["normals"])
        return rotation(turn), _triangular(raw["upper"], raw["diagonal"], upper=True)


class SVDLinear(Linear):
    r"""A linear map by its singular values: :math:`y = U S V x + b`, starting at the identity.

    :math:`U` and :math:`V` are products of Householder reflections, :math:`S` is a positive diagonal. With :math:`D`
    reflections each, every matrix with a positive determinant is of this form.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        context_dim: the width of the context; with one, a network gives all parameters.
        reflections: the number of reflections of each rotation, even; default ``input_dim`` or one more.
        bias: whether :math:`b` is learned; zero otherwise.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: the number of reflections is odd or not positive.

    Example:
        >>> SVDLinear(2)(torch.tensor([1.0, 2.0])).detach().round(decimals=5)
        tensor([1., 2.])
    """

    sign = 1
    identity: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        reflections: int | None = None,
        bias: bool = True,
        **network: Any,
    ) -> None:
        initial = {
            "left": normals_of_identity(input_dim, reflections),
            "diagonal": torch.zeros(input_dim),
            "right": normals_of_identity(input_dim, reflections),
        }
        super().__init__(input_dim, initial, context_dim=context_dim, bias=bias, **network)
        self.register_buffer("identity", torch.eye(input_dim))

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """A rotation, the singular values, a rotation."""
        identity = self.identity.to(raw["diagonal"].dtype)
        left, right = (rotation(reflected(identity, raw[side])) for side in ("left", "right"))
        return left, _diagonal(raw["diagonal"]), right


@with_variants({"triangle": "upper"})
class TriangularLinear(Linear):
    r"""A triangular linear map, :math:`y = T x + b`, starting at the identity.

    :math:`T` has a positive diagonal, its other entries are scaled by :math:`1 / \sqrt{D}`. On a standard normal it
    makes every multivariate normal.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        triangle: ``"lower"`` or ``"upper"``.
        context_dim: the width of the context; with one, a network gives :math:`T` and :math:`b`.
        bias: whether :math:`b` is learned; zero otherwise.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: ``triangle`` is neither.

    Example:
        >>> TriangularLinear(2)(torch.tensor([1.0, 2.0])).detach().round(decimals=5)
        tensor([1., 2.])
    """

    sign = 1

    def __init__(
        self,
        input_dim: int,
        triangle: Literal["lower", "upper"] = "lower",
        *,
        context_dim: int = 0,
        bias: bool = True,
        **network: Any,
    ) -> None:
        if triangle not in ("lower", "upper"):
            raise OptionError(f'triangle must be "lower" or "upper", got {triangle!r}.')
        initial = {"entries": torch.zeros(input_dim, input_dim), "diagonal": torch.zeros(input_dim)}
        super().__init__(input_dim, initial, context_dim=context_dim, bias=bias, **network)
        self.triangle = triangle

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """The triangle."""
        return (_triangular(raw["entries"], raw["diagonal"], upper=self.triangle == "upper"),)


@with_variants({"rank": 2})
class LowRankLinear(Linear):
    r"""A diagonal plus a low rank: :math:`y = S \prod_{k=1}^{r} (I + u_k v_k^\top) x + b`, starting at the identity.

    The matrix differs from the positive diagonal :math:`S` by a matrix of rank :math:`r`. Each factor is inverted by
    the formula of Sherman and Morrison, and its determinant :math:`1 + v_k^\top u_k` is kept positive, and
    :math:`|u_k| |v_k|` below 10, by shrinking :math:`u_k`. So there is an inverse at every parameter value, and
    both directions cost :math:`O(r D)` a row.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        rank: :math:`r`.
        context_dim: the width of the context; with one, a network gives all parameters.
        bias: whether :math:`b` is learned; zero otherwise.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: ``rank`` is not a positive integer.

    Example:
        >>> LowRankLinear(2)(torch.tensor([1.0, 2.0])).detach().round(decimals=5)
        tensor([1., 2.])
    """

    sign = 1
    dense = False

    def __init__(
        self, input_dim: int, rank: int = 1, *, context_dim: int = 0, bias: bool = True, **network: Any
    ) -> None:
        if not isinstance(rank, int) or rank < 1:
            raise OptionError(f"rank must be a positive integer, got {rank!r}.")
        initial = {
            "diagonal": torch.zeros(input_dim),
            "u": torch.zeros(rank, input_dim),
            "v": torch.randn(rank, input_dim),
        }
        super().__init__(input_dim, initial, context_dim=context_dim, bias=bias, **network)

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """The diagonal, and each step of rank one."""
        size = math.sqrt(self.input_dim)
        pairs = zip((raw["u"] / size).unbind(-2), (raw["v"] / size).unbind(-2), strict=True)
        return (_diagonal(raw["diagonal"]), *(_rank_one(u, v) for u, v in pairs))
