"""Linear layers: permutations, a general matrix by its LU factors, and activation normalisation.

Kingma, Dhariwal (2018), *Glow*, arXiv:1807.03039; Oliva et al. (2018), *Transformation autoregressive
networks*, arXiv:1801.09819.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.numerics import bounded_log_scale, positive, sum_last
from pyroflows.transforms.base import FlowTransform

__all__ = ["ActNorm", "LULinear", "Permutation"]


class Permutation(FlowTransform):
    r"""The same numbers in another order along one dimension: :math:`y_i = x_{p_i}`, log-det zero.

    Args:
        permutation: which entry goes where, a permutation of ``0 .. n - 1``.
        dim: the dimension that is permuted, negative; all from it on belong to one point.

    Raises:
        OptionError: ``permutation`` is none, or ``dim`` is not negative.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    volume_preserving = True
    permutation: Tensor
    back: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor, *, dim: int = -1) -> None:
        super().__init__()
        if dim >= 0:
            raise OptionError(f"dim must be negative, got {dim}.")
        self.dim = dim
        self.domain = self.codomain = constraints.independent(constraints.real, -dim)
        order = torch.as_tensor(permutation, dtype=torch.long)
        if order.dim() != 1 or (not order.is_meta and sorted(order.tolist()) != list(range(len(order)))):
            raise OptionError(f"expected a permutation of 0 .. {len(order) - 1}, got {order.tolist()}.")
        self.register_buffer("permutation", order.clone())
        self.register_buffer("back", torch.argsort(order))

    @property
    def sign(self) -> int:
        """Whether the permutation is even (1) or odd (-1)."""
        order, sign = self.permutation.tolist(), 1
        for i in range(len(order)):
            while order[i] != i:  # each swap puts one entry where it belongs
                j = order[i]
                order[i], order[j] = order[j], order[i]
                sign = -sign
        return sign

    def _permute(self, value: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        if value.dim() < -self.dim or value.shape[self.dim] != len(order):
            self.check_width(value, len(order))
        dtype = torch.promote_types(value.dtype, torch.float32)
        return value.index_select(self.dim, order), value.new_zeros(value.shape[: self.dim], dtype=dtype)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x`` permuted, and zero."""
        return self._permute(x, self.permutation)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y`` permuted back, and zero."""
        return self._permute(y, self.back)


class LULinear(FlowTransform):
    r"""A linear map with a triangular factorisation: :math:`y = L U x + b`, starting at the identity.

    :math:`L` is unit lower triangular, :math:`U` upper triangular with a positive diagonal, and entries off the
    diagonals are scaled by :math:`1 / \sqrt{D}`. Every matrix with positive leading minors is of this form.

    Args:
        input_dim: the number of coordinates, :math:`D`.
        context_dim: the width of the context.
        bias: whether :math:`b` is learned; zero otherwise.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Example:
        >>> LULinear(2)(torch.tensor([1.0, 2.0])).detach().round(decimals=5)
        tensor([1., 2.])
    """

    sign = 1

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        bias: bool = True,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        self.input_dim = input_dim
        initial = {
            "lower": torch.zeros(input_dim, input_dim),
            "upper": torch.zeros(input_dim, input_dim),
            "diagonal": torch.zeros(input_dim),
        }
        if bias:
            initial["bias"] = torch.zeros(input_dim)
        self.declare_parameters(hidden_dims=hidden_dims, activation=activation, **initial)

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        raw = self.parameters_of(context)
        size = math.sqrt(self.input_dim)
        diagonal = positive(raw["diagonal"])
        lower = raw["lower"].tril(-1) / size + torch.eye(self.input_dim, device=diagonal.device, dtype=diagonal.dtype)
        upper = raw["upper"].triu(1) / size + torch.diag_embed(diagonal)
        return lower, upper, sum_last(torch.log(diagonal)), raw.get("bias", 0.0)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``L U x + b`` and the sum of the diagonal's logs."""
        self.check_width(x, self.input_dim)
        lower, upper, log_det, bias = self._factors(context)
        if lower.dim() == 2:
            y = x @ upper.mT @ lower.mT + bias
        else:
            y = (lower @ (upper @ x.unsqueeze(-1))).squeeze(-1) + bias
        return y, log_det.expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two triangular solves."""
        self.check_width(y, self.input_dim)
        lower, upper, log_det, bias = self._factors(context)
        x = y - bias
        solve = torch.linalg.solve_triangular
        if lower.dim() == 2:  # one matrix for all rows
            rows = x.reshape(-1, self.input_dim)
            rows = solve(lower.mT, rows, upper=True, left=False, unitriangular=True)
            x = solve(upper.mT, rows, upper=False, left=False).reshape(x.shape)
        else:
            column = solve(lower, x.unsqueeze(-1), upper=False, unitriangular=True)
            x = solve(upper, column, upper=True).squeeze(-1)
        return x, -log_det.expand(x.shape[:-1])


class ActNorm(FlowTransform):
    r"""A learned shift and scale of each coordinate, :math:`y = e^s x + t`, that can start from data.

    ``initialize(y)`` sets both so that the inverse of the given batch has mean zero and standard deviation
    one; ``pyroflows.fit`` calls it on the training data.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        max_log_scale: the log scale stays in ``(-max_log_scale, max_log_scale)``.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Example:
        >>> layer = ActNorm(1)
        >>> layer.initialize(torch.tensor([[3.0], [5.0], [7.0]]))
        >>> layer.inv(torch.tensor([[5.0]]))
        tensor([[0.]], grad_fn=<...>)
    """

    sign = 1

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        max_log_scale: float = 10.0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        if not max_log_scale > 0:
            raise OptionError(f"max_log_scale must be positive, got {max_log_scale}.")
        self.input_dim, self.max_log_scale = input_dim, max_log_scale
        self.declare_parameters(
            hidden_dims=hidden_dims,
            activation=activation,
            shift=torch.zeros(input_dim),
            raw_log_scale=torch.zeros(input_dim),
        )

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Sets shift and scale to the mean and standard deviation of ``y``, over all but the last dimension."""
        rows = y.detach().reshape(-1, self.input_dim)
        if len(rows) < 2:
            return
        with torch.no_grad():
            shift, scale = rows.mean(0), rows.std(0)
            inside = (torch.log(scale.clamp_min(1e-30)) / self.max_log_scale).clamp(-0.999, 0.999)
            raw = self.max_log_scale * torch.atanh(inside)
            self.start_from(shift=shift, raw_log_scale=raw)

    def _shift_and_log_scale(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw = self.parameters_of(context)
        return raw["shift"], bounded_log_scale(raw["raw_log_scale"], self.max_log_scale)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``e^s x + t`` and the sum of ``s``."""
        self.check_width(x, self.input_dim)
        shift, log_scale = self._shift_and_log_scale(context)
        y = x * torch.exp(log_scale) + shift
        return y, sum_last(log_scale).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y - t) e^-s`` and minus the sum of ``s``."""
        self.check_width(y, self.input_dim)
        shift, log_scale = self._shift_and_log_scale(context)
        x = (y - shift) * torch.exp(-log_scale)
        return x, -sum_last(log_scale).expand(x.shape[:-1])
