"""Splines as univariate maps: rational ones, and polynomial ones of three orders.

The papers are those of `pyroflows.numerics.splines` and `pyroflows.numerics.piecewise`, which hold the formulas.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.numerics import (
    linear_rational,
    piecewise_cubic,
    piecewise_linear,
    piecewise_quadratic,
    rational_quadratic,
)
from pyroflows.transforms.maps import UnivariateMap

__all__ = ["PolynomialSpline", "RationalSpline", "SplineMap"]

Tails = Literal["identity", "linear"]


class SplineMap(UnivariateMap):
    """A spline with ``bins`` bins on ``[-bound, bound]``: its raw numbers by kind, computed in at least float32.

    Args:
        bins: the number of bins, 2 to 500.
        bound: half the side of the box.
        sizes: how many raw numbers of each kind the spline has.

    Raises:
        OptionError: ``bins`` or ``bound`` is out of range.
    """

    def __init__(self, bins: int, bound: float, sizes: list[int]) -> None:
        if not isinstance(bins, int) or not 2 <= bins <= 500 or not 0 < bound < float("inf"):
            raise OptionError(f"expected an integer 2 <= bins <= 500 and a finite bound > 0, got {bins} and {bound}.")
        self.bins, self.bound, self.sizes = bins, float(bound), sizes
        self.params = sum(sizes)

    @abstractmethod
    def spline(self, value: Tensor, *raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The mapped value and the log-slope of this direction, from raw numbers by kind."""

    def _apply(self, value: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(value.dtype, torch.float32)  # half precision cannot hold squared slopes
        raw = params.to(dtype).split(self.sizes, -1)
        result, log_slope = self.spline(value.to(dtype), *raw, inverse=inverse)
        return result.to(value.dtype), log_slope

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The spline and its log-slope."""
        return self._apply(x, params, inverse=False)

    def backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse spline and its log-slope."""
        return self._apply(y, params, inverse=True)


def _check(order: str, orders: tuple[str, ...], tails: str) -> None:
    if order not in orders:
        raise OptionError(f"order must be one of {', '.join(map(repr, orders))}, got {order!r}.")
    if tails not in ("identity", "linear"):
        raise OptionError(f'tails must be "identity" or "linear", got {tails!r}.')


class RationalSpline(SplineMap):
    r"""A rational spline on :math:`[-B, B]`, and straight lines outside.

    Args:
        bins: the number of bins, 2 to 500.
        bound: half the side of the box, :math:`B`.
        order: ``"quadratic"`` (Durkan et al. 2019, arXiv:1906.04032) or ``"linear"`` (Dolatabadi et al. 2020,
            arXiv:2001.05168).
        tails: ``"identity"`` outside of the box, or ``"linear"``: lines whose slopes are learned, those of the spline
            at the corners, so that the slope is continuous either way.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> RationalSpline(bins=4, tails="linear").forward(torch.tensor([0.5, 9.0]), torch.zeros(2, 13))[0]
        tensor([0.5000, 9.0000])
    """

    def __init__(
        self,
        bins: int = 8,
        bound: float = 5.0,
        order: Literal["quadratic", "linear"] = "quadratic",
        tails: Tails = "identity",
    ) -> None:
        _check(order, ("quadratic", "linear"), tails)
        slopes = bins + 1 if tails == "linear" else bins - 1
        super().__init__(bins, bound, [bins, bins, slopes] if order == "quadratic" else [bins, bins, slopes, bins])
        self.order, self.tails = order, tails

    def spline(self, value: Tensor, *raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """`rational_quadratic` or `linear_rational`."""
        function = rational_quadratic if self.order == "quadratic" else linear_rational
        return function(value, *raw, bound=self.bound, inverse=inverse)


class PolynomialSpline(SplineMap):
    r"""A spline of polynomials on :math:`[-B, B]`, and straight lines outside.

    The ``"linear"`` one has bins of equal width and a log-slope that is constant in each: its density jumps at the
    knots, and its log-det has no gradient with respect to the point. So a likelihood can be fitted where the data run
    forward (a layer's ``.inv`` in a flow), through bins that stay where they are; backward, the gradient does not see
    that data change bins. The slope of the ``"quadratic"`` one is a chain of straight pieces. The ``"cubic"`` one runs
    smoothly through knots that are learned; its slopes follow from them.

    Args:
        bins: the number of bins, 2 to 500.
        bound: half the side of the box, :math:`B`.
        order: ``"linear"`` or ``"quadratic"`` (Müller et al. 2019, arXiv:1808.03856), or ``"cubic"`` (Durkan et al.
            2019, arXiv:1906.02145).
        tails: ``"identity"`` outside of the box, or ``"linear"``: lines from the corners whose slopes are learned.
            The slope jumps at the corners if the order is linear; if it is cubic, the tails are the identity and the
            spline starts with a slope below one half; and otherwise nowhere.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> PolynomialSpline(bins=4, order="cubic").forward(torch.tensor([0.5, 9.0]), torch.zeros(2, 8))[0]
        tensor([0.5000, 9.0000])
    """

    def __init__(
        self,
        bins: int = 8,
        bound: float = 5.0,
        order: Literal["linear", "quadratic", "cubic"] = "quadratic",
        tails: Tails = "identity",
    ) -> None:
        _check(order, ("linear", "quadratic", "cubic"), tails)
        ends = [2] if tails == "linear" else []
        sizes = {
            "linear": [bins, *ends],
            "quadratic": [bins, bins + 1 if ends else bins - 1],
            "cubic": [bins, bins, *ends],
        }
        super().__init__(bins, bound, sizes[order])
        self.order, self.tails = order, tails

    def spline(self, value: Tensor, *raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """`piecewise_linear`, `piecewise_quadratic` or `piecewise_cubic`."""
        functions = {"linear": piecewise_linear, "quadratic": piecewise_quadratic, "cubic": piecewise_cubic}
        return functions[self.order](value, *raw, bound=self.bound, inverse=inverse)  # type: ignore[operator]
