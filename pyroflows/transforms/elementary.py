r"""The parameter-free transforms of torch and Pyro under their own names, with what was wrong in them put right.

Most are re-exported as they are. Those that are defined here derive from Pyro's and differ where it says so: a
codomain, an epsilon, a batch of matrices, a shape, a log-det.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions.transforms as theirs
import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import (
    ConditionalTransform,
    ConditionalTransformModule,
    ConstantConditionalTransform,
)
from pyro.distributions.torch_transform import ComposeTransformModule, TransformModule
from pyro.distributions.transforms import (
    CholeskyTransform,
    CorrCholeskyTransform,
    CorrLCholeskyTransform,
    CorrMatrixCholeskyTransform,
    HaarTransform,
    LeakyReLUTransform,
    Normalize,
    OrderedTransform,
    SoftplusLowerCholeskyTransform,
    SoftplusTransform,
)
from pyro.distributions.transforms.unit_cholesky import UnitLowerCholeskyTransform
from torch import Tensor
from torch.distributions.transforms import (
    AbsTransform,
    AffineTransform,
    CatTransform,
    ComposeTransform,
    CumulativeDistributionTransform,
    ExpTransform,
    IndependentTransform,
    LowerCholeskyTransform,
    PositiveDefiniteTransform,
    PowerTransform,
    ReshapeTransform,
    SigmoidTransform,
    SoftmaxTransform,
    StackTransform,
    StickBreakingTransform,
    TanhTransform,
    Transform,
    identity_transform,
)

from pyroflows.errors import OptionError, ShapeError
from pyroflows.transforms.compose import Compose

__all__ = [
    "AbsTransform",
    "AffineTransform",
    "CatTransform",
    "CholeskyTransform",
    "ComposeTransform",
    "ComposeTransformModule",
    "ConditionalTransform",
    "ConditionalTransformModule",
    "ConstantConditionalTransform",
    "CorrCholeskyTransform",
    "CorrLCholeskyTransform",
    "CorrMatrixCholeskyTransform",
    "CumulativeDistributionTransform",
    "DiscreteCosineTransform",
    "ELUTransform",
    "ExpTransform",
    "HaarTransform",
    "IndependentTransform",
    "LeakyReLUTransform",
    "LowerCholeskyAffine",
    "LowerCholeskyTransform",
    "Normalize",
    "OrderedTransform",
    "PositiveDefiniteTransform",
    "PositivePowerTransform",
    "PowerTransform",
    "ReshapeTransform",
    "SigmoidTransform",
    "SimplexToOrderedTransform",
    "SoftmaxTransform",
    "SoftplusLowerCholeskyTransform",
    "SoftplusTransform",
    "StackTransform",
    "StickBreakingTransform",
    "TanhTransform",
    "Transform",
    "TransformModule",
    "UnitLowerCholeskyTransform",
    "VectorToCholesky",
    "elu",
    "identity_transform",
    "iterated",
    "leaky_relu",
    "tanh",
]


class ELUTransform(theirs.ELUTransform):
    r"""The exponential linear unit, :math:`x` above zero and :math:`e^x - 1` below.

    Pyro's has the positive numbers for a codomain, where it is :math:`(-1, \infty)`, and an inverse that is off by an
    epsilon.

    Example:
        >>> t = ELUTransform()
        >>> t.inv(t(torch.tensor([-2.0, 3.0])))
        tensor([-2.0000,  3.0000])
    """

    codomain = constraints.greater_than(-1.0)

    def _inverse(self, y: Tensor, eps: float = 0.0) -> Tensor:
        return torch.where(y > 0, y, torch.log1p(y.clamp(max=0) + eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``min(x, 0)``."""
        return x.clamp(max=0)


class LowerCholeskyAffine(theirs.LowerCholeskyAffine):
    r"""A fixed triangular map, :math:`y = L x + r`, for one matrix or a batch of them.

    Pyro's takes the log-det of one matrix only.

    Args:
        loc: :math:`r`, ``[*batch, D]``.
        scale_tril: :math:`L`, lower triangular, ``[*batch, D, D]``.
        cache_size: as for every transform of torch.

    Raises:
        ShapeError: the last dimensions do not fit.

    Example:
        >>> t = LowerCholeskyAffine(torch.zeros(2), torch.eye(2).expand(5, 2, 2) * 2)
        >>> t.log_abs_det_jacobian(torch.ones(2), torch.ones(2)).shape
        torch.Size([5])
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, cache_size: int = 0) -> None:
        if not loc.shape[-1:] == scale_tril.shape[-1:] == scale_tril.shape[-2:-1]:
            raise ShapeError(
                f"expected loc [*batch, D] and scale_tril [*batch, D, D], got {tuple(loc.shape)} and "
                f"{tuple(scale_tril.shape)}."
            )
        super().__init__(loc, scale_tril, cache_size=cache_size)

    def _inverse(self, y: Tensor) -> Tensor:
        column = (y - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, column, upper=False).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the logs of the diagonal."""
        log_det = torch.diagonal(self.scale_tril, dim1=-2, dim2=-1).abs().log().sum(-1)
        return log_det.expand(torch.broadcast_shapes(x.shape[:-1], log_det.shape))

    def with_cache(self, cache_size: int = 1) -> LowerCholeskyAffine:
        """The same with another cache."""
        return type(self)(self.loc, self.scale_tril, cache_size=cache_size)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Broadcast with the batch of matrices."""
        batch = torch.broadcast_shapes(shape[:-1], self.loc.shape[:-1], self.scale_tril.shape[:-2])
        return torch.Size((*batch, *shape[-1:]))

    inverse_shape = forward_shape


class PositivePowerTransform(theirs.PositivePowerTransform):
    r"""A signed power, :math:`y = \operatorname{sgn}(x) |x|^p`.

    Pyro's log-det is NaN at zero; here it is the limit.

    Args:
        exponent: :math:`p > 0`.

    Example:
        >>> t = PositivePowerTransform(1.0)
        >>> t.log_abs_det_jacobian(torch.zeros(1), torch.zeros(1))
        tensor([0.])
    """

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log p + (p - 1) log |x|``."""
        return torch.log(self.exponent) + torch.xlogy(self.exponent - 1, x.abs())

    def with_cache(self, cache_size: int = 1) -> PositivePowerTransform:
        """The same with another cache."""
        return type(self)(self.exponent, cache_size=cache_size)


class SimplexToOrderedTransform(theirs.SimplexToOrderedTransform):
    r"""Cutpoints of the shares of ordered categories: :math:`y_i = \operatorname{logit}(x_0 + \ldots + x_i) + a`.

    Pyro's does not say that it is bijective, and its log-det leaves out the anchor :math:`a`.

    Args:
        anchor_point: :math:`a`; default zero.

    Example:
        >>> SimplexToOrderedTransform()(torch.tensor([0.5, 0.25, 0.25]))
        tensor([0.0000, 1.0986])
    """

    bijective = True

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus the sum of the log-slopes of the sigmoid."""
        return super().log_abs_det_jacobian(x, y - self.anchor_point.unsqueeze(-1))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and torch.equal(self.anchor_point, other.anchor_point)

    __hash__ = None  # type: ignore[assignment]


class DiscreteCosineTransform(theirs.DiscreteCosineTransform):
    """The discrete cosine transform along one dimension, of determinant one.

    Pyro's keeps its weights in the dtype and on the device of the first tensor that it saw.

    Args:
        dim: the dimension, negative; all from it on belong to one point.
        smooth: weights a frequency by this power of it: 0 is white, 1 Brownian noise.
        cache_size: as for every transform of torch.

    Example:
        >>> t = DiscreteCosineTransform(smooth=1.0)
        >>> t.inv(t(torch.arange(3.0))).round(decimals=4)
        tensor([0., 1., 2.])
    """

    @torch.no_grad()
    def _weight(self, y: Tensor) -> Tensor:
        size = y.shape[-1]
        log_frequency = torch.log(torch.arange(size, dtype=y.dtype, device=y.device) + 0.5)
        return torch.exp(self.smooth * (log_frequency - log_frequency.mean()))

    def with_cache(self, cache_size: int = 1) -> DiscreteCosineTransform:
        """The same with another cache."""
        return type(self)(self.dim, self.smooth, cache_size=cache_size)


class VectorToCholesky(Transform):
    r"""Of :math:`n (n + 1) / 2` numbers, the Cholesky factor of a positive definite matrix, row by row.

    The diagonal is :math:`e^x`. torch's ``LowerCholeskyTransform`` starts from a whole matrix, whose upper half it
    drops, so it has no density.

    Example:
        >>> VectorToCholesky()(torch.tensor([0.0, 2.0, 0.0]))
        tensor([[1., 0.],
                [2., 1.]])
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorToCholesky)

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def _side(entries: int) -> int:
        side = int((2 * entries) ** 0.5)
        if side * (side + 1) != 2 * entries:
            raise ShapeError(f"a triangle has 1, 3, 6, 10, ... entries, got {entries}.")
        return side

    def _call(self, x: Tensor) -> Tensor:
        side = self._side(x.shape[-1])
        # Entry (i, j) of the matrix is number i (i + 1) / 2 + j; those above the diagonal are masked.
        i = torch.arange(side, device=x.device)
        index = (i.unsqueeze(-1) * (i.unsqueeze(-1) + 1) // 2 + i).clamp(max=x.shape[-1] - 1)
        full = x.index_select(-1, index.flatten()).unflatten(-1, (side, side))
        return full.tril(-1) + torch.diag_embed(torch.exp(torch.diagonal(full, dim1=-2, dim2=-1)))

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device).unbind()
        full = y.tril(-1) + torch.diag_embed(torch.log(torch.diagonal(y, dim1=-2, dim2=-1)))
        return full.flatten(-2).index_select(-1, rows * y.shape[-1] + columns)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the logs of the diagonal."""
        return torch.diagonal(y, dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Of a vector, a square."""
        if not shape:
            raise ShapeError("expected a vector, got a number.")
        side = self._side(shape[-1])
        return torch.Size((*shape[:-1], side, side))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Of a square, a vector."""
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ShapeError(f"expected a square matrix, got shape {tuple(shape)}.")
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def elu() -> ELUTransform:
    """`ELUTransform`, by Pyro's name."""
    return ELUTransform()


def leaky_relu() -> LeakyReLUTransform:
    """``LeakyReLUTransform``, by Pyro's name."""
    return LeakyReLUTransform()


def tanh() -> TanhTransform:
    """``TanhTransform``, by the name that Pyro has for it and does not export."""
    return TanhTransform()


def iterated(repeats: int, base_fn: Callable[..., Transform], *args: Any, **kwargs: Any) -> Compose:
    """Several transforms in turn, each built by ``base_fn(*args, **kwargs)``, as one layer.

    Args:
        repeats: how many.
        base_fn: what builds one, such as ``planar``.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Raises:
        OptionError: ``repeats`` is not a positive integer.

    Example:
        >>> from pyroflows.transforms import planar
        >>> len(iterated(3, planar, 2))
        3
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise OptionError(f"repeats must be a positive integer, got {repeats!r}.")
    return Compose([base_fn(*args, **kwargs) for _ in range(repeats)])
