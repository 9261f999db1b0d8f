r"""Linear layers by a matrix that is a product of reflections, or an exponential.

Householder products: Tomczak, Welling (2016), *Improving variational auto-encoders using Householder flow*,
arXiv:1611.09630. Exponentials: Hoogeboom, Satorras, Tomczak, Welling (2020), *The convolution exponential and
generalized Sylvester flows*, arXiv:2006.01910.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.numerics import matvec, sum_last
from pyroflows.transforms.base import FlowTransform, with_variants

__all__ = ["Householder", "MatrixExponential", "reflected"]


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


@with_variants({"count_transforms": 3})
class Householder(FlowTransform):
    r"""A product of reflections, :math:`y = H_K \cdots H_1 x`, log-det zero.

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

    volume_preserving = True
    identity: Tensor

    def __init__(
        self,
        input_dim: int,
        count_transforms: int = 1,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        if not isinstance(count_transforms, int) or count_transforms < 1:
            raise OptionError(f"count_transforms must be a positive integer, got {count_transforms!r}.")
        self.input_dim, self.count_transforms = input_dim, count_transforms
        self.register_buffer("identity", torch.eye(input_dim))
        normals = torch.randn(count_transforms, input_dim) / math.sqrt(input_dim)
        self.declare_parameters(hidden_dims=hidden_dims, activation=activation, normals=normals)

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant, one flip a reflection."""
        return (-1) ** self.count_transforms

    def _rotate(self, value: Tensor, context: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
        self.check_width(value, self.input_dim)
        matrix = reflected(self.identity, self.parameters_of(context)["normals"])
        result = matvec(matrix.mT if back else matrix, value)
        return result, torch.zeros_like(sum_last(result))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The reflections, and zero."""
        return self._rotate(x, context, back=False)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The reflections in reverse, and zero."""
        return self._rotate(y, context, back=True)


@with_variants({"skew": True})
class MatrixExponential(FlowTransform):
    r"""A linear map by an exponential, :math:`y = e^W x + b`, with log-det :math:`\operatorname{tr} W`.

    The inverse is :math:`e^{-W} (y - b)`. :math:`W = A / \sqrt{1 + |A|^2 / m^2}` stays below :math:`m` in the
    Frobenius norm, so the condition number stays below :math:`e^{2m}`. It starts at the identity.

    Args:
        input_dim: the number of coordinates.
        iterations: accepted for Pyro's sake and without effect: no series is cut off here.
        normalization: ``"none"``; Pyro names two others and has neither.
        bound: the bound :math:`m`; default 3.
        context_dim: the width of the context; with one, a network gives :math:`A` and :math:`b`.
        skew: make :math:`W` skew-symmetric, so that the map is a rotation and its log-det zero; :math:`W` is then
            not bounded.
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
        skew: bool = False,
        bias: bool = True,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        if normalization != "none":
            raise OptionError(f'normalization must be "none", got {normalization!r}; bound={bound} holds without one.')
        bound = 3.0 if bound is None else float(bound)
        if not bound > 0 or not iterations > 0:
            raise OptionError(f"expected bound > 0 and iterations > 0, got {bound} and {iterations}.")
        self.input_dim, self.skew, self.bound = input_dim, skew, bound
        initial = {"raw": torch.zeros(input_dim, input_dim)}
        if bias:
            initial["bias"] = torch.zeros(input_dim)
        self.declare_parameters(hidden_dims=hidden_dims, activation=activation, **initial)

    def _generator(self, context: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """``W`` ``[*batch, D, D]`` in float64, and the bias."""
        parameters = self.parameters_of(context)
        raw = parameters["raw"].double()  # squaring loses digits, and the matrix is small beside the batch
        if self.skew:
            weight = raw.tril(-1) - raw.tril(-1).mT
        else:
            square = (raw / self.bound).square().sum((-2, -1), keepdim=True)
            weight = raw / torch.sqrt(1 + square)
        return weight, parameters.get("bias", 0.0)

    def _trace(self, weight: Tensor, like: Tensor) -> Tensor:
        trace = torch.diagonal(weight, dim1=-2, dim2=-1).sum(-1)
        return trace.to(torch.promote_types(like.dtype, torch.float32)).expand(like.shape[:-1])

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formula."""
        self.check_width(x, self.input_dim)
        weight, bias = self._generator(context)
        y = matvec(torch.linalg.matrix_exp(weight).to(x.dtype), x) + bias
        return y, self._trace(weight, y)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The exponential of minus the matrix."""
        self.check_width(y, self.input_dim)
        weight, bias = self._generator(context)
        x = matvec(torch.linalg.matrix_exp(-weight).to(y.dtype), y - bias)
        return x, -self._trace(weight, x)
