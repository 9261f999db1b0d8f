r"""Linear layers: what they share, rotations of three kinds, and exponentials.

Householder products: Tomczak, Welling (2016), *Improving variational auto-encoders using Householder flow*,
arXiv:1611.09630. Exponentials: Hoogeboom, Satorras, Tomczak, Welling (2020), *The convolution exponential and
generalized Sylvester flows*, arXiv:2006.01910. Cayley transforms and exponentials of skew matrices: Lezcano-Casado,
Martínez-Rubio (2019), *Cheap orthogonal constraints in neural networks*, arXiv:1901.08428.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.numerics import matvec, sum_last
from pyroflows.transforms.base import FlowTransform, with_variants

__all__ = [
    "Factor",
    "Householder",
    "Linear",
    "MatrixExponential",
    "Orthogonal",
    "normals_of_identity",
    "reflected",
    "rotation",
]


class Factor(NamedTuple):
    """A matrix, or one a row, by what it does.

    Attributes:
        times: the product with vectors ``[*batch, D]``.
        solve: the product of its inverse with them.
        log_det: the log of its absolute determinant, ``[]`` or one a matrix.
    """

    times: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor], Tensor]
    log_det: Tensor


class Linear(FlowTransform):
    r"""A linear layer by its factors, :math:`y = F_1 F_2 \cdots F_n x + b`; a subclass says which.

    With ``shift_first`` it is :math:`y = F_1 F_2 \cdots F_n (x + b)`.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        initial: the starting value of each parameter of the factors.
        context_dim: the width of the context; with one, a network gives all parameters.
        bias: whether :math:`b` is learned; zero otherwise.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.
    """

    def __init__(
        self,
        input_dim: int,
        initial: Mapping[str, Tensor],
        *,
        context_dim: int = 0,
        bias: bool = True,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        self.input_dim = input_dim
        shift = {"bias": torch.zeros(input_dim)} if bias else {}
        self.declare_parameters(hidden_dims=hidden_dims, activation=activation, **initial, **shift)

    dense = True  # whether one matrix for all rows is better multiplied out than applied factor by factor
    shift_first = False  # whether the bias is added before the factors are applied, and not after

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """The factors from the left to the right, from the declared parameters in at least float32."""
        raise NotImplementedError

    def _shifts(self, raw: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """What is added before the factors are applied, and what after."""
        bias = raw.get("bias", 0.0)
        return (bias, 0.0) if self.shift_first else (0.0, bias)

    def _product(self, value: Tensor, raw: Mapping[str, Tensor], back: bool) -> tuple[Tensor, Tensor]:
        """The product with ``F_1 .. F_n``, or with its inverse, and the log of its determinant."""
        one = self.dense and self.context_dim == 0
        # A triangle that is solved for, and a small matrix, lose few digits in float64 and cost little there.
        dtype = torch.float64 if one or back else torch.promote_types(value.dtype, torch.float32)
        factors = self.factors({name: tensor.to(dtype) for name, tensor in raw.items()})
        rows = torch.eye(self.input_dim, dtype=dtype, device=value.device) if one else value.to(dtype)
        for factor in factors if back else reversed(factors):
            rows = factor.solve(rows) if back else factor.times(rows)
        log_det: Any = sum(factor.log_det for factor in factors)
        if one:
            small = 2.0**-20  # so that no term overflows where the sum does not
            rows = (value @ (rows * small).to(value.dtype)) / small
        return rows.to(value.dtype), log_det.to(torch.promote_types(value.dtype, torch.float32))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The product with each factor, the last one first, and the sum of their log-dets."""
        self.check_width(x, self.input_dim)
        raw = self.parameters_of(context)
        before, after = self._shifts(raw)
        y, log_det = self._product(x + before, raw, back=False)
        y = y + after
        return y, log_det.expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Each factor solved for, the first one first, and minus the sum of their log-dets."""
        self.check_width(y, self.input_dim)
        raw = self.parameters_of(context)
        before, after = self._shifts(raw)
        x, log_det = self._product(y - after, raw, back=True)
        x = x - before
        return x, -log_det.expand(x.shape[:-1])


# --- rotations -------------------------------------------------------------------------------------------


def reflected(columns: Tensor, normals: Tensor) -> Tensor:
    r"""Columns after one reflection :math:`I - 2 v v^\top / v^\top v` after another; a zero normal reflects nothing.

    Args:
        columns: ``[*batch, D, M]``.
        normals: the vectors :math:`v`, ``[*batch, K, D]``.

    Returns:
        ``[*batch, D, M]``.

    Example:
        >>> reflected(torch.eye(2), torch.tensor([[1.0, 0.0]]))
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """
    for v in normals.unbind(-2):
        v = v / v.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        square = v.square().sum(-1, keepdim=True)
        twice = torch.where(square > 0, 2 * v / torch.where(square > 0, square, torch.ones_like(square)), v)
        columns = columns - twice.unsqueeze(-1) * (v.unsqueeze(-2) @ columns)
    return columns


def normals_of_identity(input_dim: int, reflections: int | None) -> Tensor:
    """Random normals ``[K, D]`` in equal pairs, whose reflections undo each other; ``K`` at least ``D`` by default.

    Raises:
        OptionError: the number of reflections is not positive and even.
    """
    count = input_dim + input_dim % 2 if reflections is None else reflections
    if not isinstance(count, int) or count < 2 or count % 2:
        raise OptionError(f"reflections must be a positive even number, got {count!r}.")
    return torch.randn(count // 2, input_dim).repeat_interleave(2, 0) / math.sqrt(input_dim)


def rotation(matrix: Tensor) -> Factor:
    """An orthogonal matrix ``[*batch, D, D]`` as a factor: its inverse is its transpose."""
    zero = matrix.new_zeros(matrix.shape[:-2])
    return Factor(lambda x: matvec(matrix, x), lambda y: matvec(matrix.mT, y), zero)


def _skew(raw: Tensor) -> Tensor:
    """A skew matrix from the lower triangle, in float64: what is made of it loses digits, and it is small."""
    lower = raw.double().tril(-1)
    return lower - lower.mT


@with_variants({"kind": "exponential"}, {"kind": "householder"})
class Orthogonal(Linear):
    r"""A rotation, :math:`y = Q x`, log-det zero; it starts at the identity.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        kind: how :math:`Q` is made. With a skew matrix :math:`A`, ``"cayley"``: :math:`(I + A)^{-1} (I - A)`, every
            rotation without the eigenvalue -1; ``"exponential"``: :math:`e^A`, every rotation; ``"householder"``: a
            product of reflections, every rotation if there are :math:`D` of them.
        reflections: how many reflections a Householder product has, an even number; default ``input_dim`` or one more.
        context_dim: the width of the context; with one, a network gives the parameters.
        bias: whether a shift is learned as well.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: ``kind`` is none of these, or the number of reflections is odd.

    Example:
        >>> layer = Orthogonal(3)
        >>> layer(torch.tensor([1.0, 2.0, 3.0])).detach()
        tensor([1., 2., 3.])
    """

    volume_preserving = True
    identity: Tensor

    def __init__(
        self,
        input_dim: int,
        kind: Literal["cayley", "exponential", "householder"] = "cayley",
        *,
        reflections: int | None = None,
        context_dim: int = 0,
        bias: bool = False,
        **network: Any,
    ) -> None:
        if kind not in ("cayley", "exponential", "householder"):
            raise OptionError(f'kind must be "cayley", "exponential" or "householder", got {kind!r}.')
        if kind == "householder":
            initial = {"normals": self._first_normals(input_dim, reflections)}
        else:
            initial = {"raw": torch.zeros(input_dim, input_dim)}
        super().__init__(input_dim, initial, context_dim=context_dim, bias=bias, **network)
        self.kind = kind
        self.register_buffer("identity", torch.eye(input_dim))

    def _first_normals(self, input_dim: int, reflections: int | None) -> Tensor:
        return normals_of_identity(input_dim, reflections)

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return 1

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """The rotation."""
        if self.kind == "householder":
            return (rotation(reflected(self.identity.to(raw["normals"].dtype), raw["normals"])),)
        skew = _skew(raw["raw"])
        if self.kind == "exponential":
            matrix = torch.linalg.matrix_exp(skew)
        else:
            identity = self.identity.double()
            matrix = torch.linalg.solve(identity + skew, identity - skew)  # I + A has no eigenvalue below 1
        return (rotation(matrix.to(raw["raw"].dtype)),)


@with_variants({"count_transforms": 3})
class Householder(Orthogonal):
    r"""A product of reflections, :math:`y = H_K \cdots H_1 x`, log-det zero, by Pyro's name.

    `Orthogonal` of kind ``"householder"`` with any number of reflections, which starts anywhere.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        count_transforms: the number of reflections :math:`K`; :math:`D` of them make every orthogonal matrix whose
            determinant has their sign.
        context_dim: the width of the context; with one, a network gives the reflections.
        hidden_dims: the hidden widths of that network.
        activation: its activation.

    Raises:
        OptionError: ``count_transforms`` is not positive.

    Example:
        >>> layer = Householder(3, 2)
        >>> x = torch.ones(3)
        >>> torch.allclose(layer(x).norm(), x.norm())
        True
    """

    def __init__(self, input_dim: int, count_transforms: int = 1, *, context_dim: int = 0, **network: Any) -> None:
        super().__init__(input_dim, "householder", reflections=count_transforms, context_dim=context_dim, **network)
        self.count_transforms = count_transforms

    def _first_normals(self, input_dim: int, reflections: int | None) -> Tensor:
        if not isinstance(reflections, int) or reflections < 1:
            raise OptionError(f"count_transforms must be a positive integer, got {reflections!r}.")
        return torch.randn(reflections, input_dim) / math.sqrt(input_dim)

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant, one flip a reflection."""
        return (-1) ** self.count_transforms


# --- exponentials ----------------------------------------------------------------------------------------


class MatrixExponential(Linear):
    r"""A linear map by an exponential, :math:`y = e^W x + b`, with log-det :math:`\operatorname{tr} W`.

    The inverse is :math:`e^{-W} (y - b)`. :math:`W = A / \sqrt{1 + |A|^2 / m^2}` stays below :math:`m` in the
    Frobenius norm, so the condition number stays below :math:`e^{2m}`. It starts at the identity. For a rotation by
    an exponential, see `Orthogonal`.

    Args:
        input_dim: the number of coordinates.
        iterations: accepted for Pyro's sake and without effect: no series is cut off here.
        normalization: ``"none"``; Pyro names two others and has neither.
        bound: the bound :math:`m`; default 3.
        context_dim: the width of the context; with one, a network gives :math:`A` and :math:`b`.
        bias: whether :math:`b` is learned; zero otherwise.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Raises:
        OptionError: ``bound`` or ``iterations`` is not positive, or there is a ``normalization``.

    Example:
        >>> MatrixExponential(2)(torch.tensor([1.0, 2.0])).detach()
        tensor([1., 2.])
    """

    sign = 1

    def __init__(
        self,
        input_dim: int,
        iterations: int = 8,
        normalization: str = "none",
        bound: float | None = None,
        *,
        context_dim: int = 0,
        bias: bool = True,
        **network: Any,
    ) -> None:
        if normalization != "none":
            raise OptionError(f'normalization must be "none", got {normalization!r}; bound={bound} holds without one.')
        bound = 3.0 if bound is None else float(bound)
        if not bound > 0 or not iterations > 0:
            raise OptionError(f"expected bound > 0 and iterations > 0, got {bound} and {iterations}.")
        initial = {"raw": torch.zeros(input_dim, input_dim)}
        super().__init__(input_dim, initial, context_dim=context_dim, bias=bias, **network)
        self.bound = bound

    def factors(self, raw: Mapping[str, Tensor]) -> Sequence[Factor]:
        """The exponential."""
        free, dtype = raw["raw"].double(), raw["raw"].dtype  # squaring loses digits, and the matrix is small
        square = (free / self.bound).square().sum((-2, -1), keepdim=True)
        weight = free / torch.sqrt(1 + square)
        return (
            Factor(
                lambda x: matvec(torch.linalg.matrix_exp(weight).to(dtype), x),
                lambda y: matvec(torch.linalg.matrix_exp(-weight).to(dtype), y),
                sum_last(torch.diagonal(weight, dim1=-2, dim2=-1)),
            ),
        )
