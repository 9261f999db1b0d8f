r"""Univariate maps: increasing functions of one real variable with a handful of parameters.

A map says how many parameters it needs a dimension and maps numbers forth and back with the log of its slope.
The structures `Elementwise`, `Coupling` and `Autoregressive` say where the parameters come from, so each map
is three layers. All parameters zero is the identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyroflows.errors import OptionError
from pyroflows.numerics import bounded_affine, bounded_log_scale, monotone_root, positive

__all__ = ["Additive", "Affine", "NumericMap", "UnivariateMap"]


class UnivariateMap(ABC):
    """An increasing map of the real line, applied to each number with its own parameters.

    Attributes:
        params: how many parameters one dimension needs.
        inverse: ``"closed"``, or ``"numeric"`` for a map that derives from `NumericMap`.
        joint: whether a coordinate's image depends on the parameters of the others too; `Autoregressive`, which finds
            one coordinate at a time, refuses such a map.
        columns: whether it is faster where the rows of one parameter lie side by side in memory.
    """

    params: int
    inverse: Literal["closed", "numeric"] = "closed"
    joint: bool = False
    columns: bool = False
    vmaps: bool = True
    compiles: bool = True

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and ``log dy/dx``, both ``[...]``, for ``x`` ``[...]`` and parameters ``[..., self.params]``."""

    @abstractmethod
    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log dx/dy``, both ``[...]``, for ``y`` ``[...]`` and parameters ``[..., self.params]``."""


class NumericMap(UnivariateMap):
    """A map whose inverse is no formula: it is searched for, to the last digits, and differentiable."""

    inverse = "numeric"
    vmaps = False
    compiles = False

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log dx/dy``, by `monotone_root`.

        Raises:
            InverseNotConverged: some root was not found.
        """
        root = monotone_root(lambda x: self.forward(x, params), y)
        return root.x, -root.log_slope


class Additive(UnivariateMap):
    """A shift: ``y = x + t``. Volume-preserving (Dinh, Krueger, Bengio 2014, *NICE*, arXiv:1410.8516)."""

    params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``x + t`` and zero."""
        y = x + params[..., 0]
        return y, torch.zeros_like(y)

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``y - t`` and zero."""
        x = y - params[..., 0]
        return x, torch.zeros_like(x)


class Affine(UnivariateMap):
    r"""A shift and a scale, :math:`y = a x + t` with :math:`a > 0` (Dinh, Sohl-Dickstein, Bengio 2016,
    *Density estimation using Real NVP*, arXiv:1605.08803).

    Args:
        scale: ``"bounded"``: :math:`\log a = b \tanh(r / b)`, so the scale stays in :math:`(e^{-b}, e^b)`;
            ``"softplus"``: :math:`a = f + \log(1 + e^{r + c})`, unbounded above;
            ``"gated"``: :math:`y = a x + (1 - a) t` with :math:`a = 1 / (1 + e^{-g})`, :math:`g = 2 + 6 \tanh(r / 6)`,
            the contracting step of inverse autoregressive flows (Kingma et al. 2016, arXiv:1606.04934), which is
            not the identity at zero.
        max_log_scale: the bound :math:`b`.
        floor: the floor :math:`f` of the softplus scale.

    Raises:
        OptionError: ``scale`` is none of these.
    """

    params = 2

    def __init__(
        self,
        scale: Literal["bounded", "softplus", "gated"] = "bounded",
        max_log_scale: float = 3.0,
        floor: float = 1e-3,
    ) -> None:
        if scale not in ("bounded", "softplus", "gated"):
            raise OptionError(f'scale must be "bounded", "softplus" or "gated", got {scale!r}.')
        if not max_log_scale > 0 or not 0 < floor < 1:
            raise OptionError(f"expected max_log_scale > 0 and 0 < floor < 1, got {max_log_scale} and {floor}.")
        self.scale: str = scale
        self.max_log_scale, self.floor = max_log_scale, floor

    def _shift_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        if self.scale == "gated":
            gate = 2 + bounded_log_scale(raw, 6.0)
            return shift * torch.sigmoid(-gate), logsigmoid(gate)
        return shift, torch.log(positive(raw, self.floor))

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``a x + t`` and ``log a``."""
        if self.scale == "bounded":
            return bounded_affine(x, params, self.max_log_scale)
        shift, log_scale = self._shift_and_log_scale(params)
        y = x * torch.exp(log_scale) + shift
        return y, log_scale.expand_as(y)

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``(y - t) / a`` and ``-log a``."""
        if self.scale == "bounded":
            return bounded_affine(y, params, self.max_log_scale, inverse=True)
        shift, log_scale = self._shift_and_log_scale(params)
        x = (y - shift) * torch.exp(-log_scale)
        return x, -log_scale.expand_as(x)
