"""Pyro's conditional classes whose parameters the caller's network reads off the context, with Pyro's arguments.

What ``dropin.py`` says of its classes holds for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import ContextError
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.dropin import Net, Spline, by_coordinate, outputs, width_of_context
from pyroflows.transforms.images import InvertibleConv1x1
from pyroflows.transforms.lemma import Planar, Radial
from pyroflows.transforms.matrix import Householder, MatrixExponential

__all__ = [
    "ConditionalGeneralizedChannelPermute",
    "ConditionalHouseholder",
    "ConditionalMatrixExponential",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ConditionalSpline",
]


def _widths(net: Net, context_dim: int) -> list[int]:
    """How wide each output of the network is: what it says, or what it gives."""
    if hasattr(net, "param_dims"):
        return list(net.param_dims)
    like = next(net.parameters(), torch.zeros(())) if isinstance(net, nn.Module) else torch.zeros(())
    with torch.no_grad():
        return [part.shape[-1] for part in outputs(net, like.new_zeros(1, context_dim))]


class _ReadOff(FlowTransform):
    """A layer whose named tensors a network of the caller's reads off the context."""

    nn: Any

    def declare_parameters(self, **unused: Any) -> None:
        """Nothing to declare: the network gives them."""

    def _named(self, *parts: Tensor) -> dict[str, Tensor]:
        """The network's outputs by the names of the layer."""
        raise NotImplementedError

    def parameters_of(self, context: Tensor | None = None) -> dict[str, Tensor]:
        """What the network reads off the context, by name."""
        self.check_context(context)
        if context is None:
            raise ContextError(f"{type(self).__name__} got no context. Call .condition(context) first.")
        return self._named(*outputs(self.nn, context))


class ConditionalSpline(_ReadOff, Spline):
    """`Spline` with parameters that a network reads off a context.

    Args:
        nn: such as ``DenseNN(C, hidden_dims, [D * K, D * K, D * (K - 1), D * K])``, without the last for
            ``order="quadratic"``.
        input_dim: the number of coordinates, D.
        count_bins: the number of bins, K.
        bound: half the side of the box.
        order: ``"linear"`` or ``"quadratic"``.
        context_dim: the width of the context, if the network does not say it.
    """

    def __init__(
        self,
        nn: Net,
        input_dim: int,
        count_bins: int,
        bound: float = 3.0,
        order: str = "linear",
        *,
        context_dim: int | None = None,
    ) -> None:
        super().__init__(input_dim, count_bins, bound, order, context_dim=width_of_context(nn, context_dim))
        self.nn = nn

    def parameters_of(self, context: Tensor | None = None) -> dict[str, Tensor]:
        """The parameters of each coordinate's spline."""
        self.check_context(context)
        if context is None:
            raise ContextError("ConditionalSpline got no context. Call .condition(context) first.")
        return {"raw": by_coordinate(outputs(self.nn, context), self.input_dim, context.dim() - 1)}


class ConditionalPlanar(_ReadOff, Planar):
    """`Planar` with parameters that a network reads off a context.

    Args:
        nn: such as ``DenseNN(C, hidden_dims, [1, D, D])``, which gives a bias, :math:`u` and :math:`w`.
        context_dim: the width of the context, if the network does not say it.

    Example:
        >>> from pyro.nn import DenseNN
        >>> layer = ConditionalPlanar(DenseNN(2, [16], [1, 3, 3]))
        >>> layer.condition(torch.zeros(5, 2))(torch.zeros(3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, nn: Net, *, context_dim: int | None = None) -> None:
        context_dim = width_of_context(nn, context_dim)
        super().__init__(_widths(nn, context_dim)[1], context_dim=context_dim)
        self.nn = nn

    def _named(self, bias: Tensor, u: Tensor, w: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"bias": bias, "u": u, "w": w}


class ConditionalRadial(_ReadOff, Radial):
    """`Radial` with parameters that a network reads off a context.

    Args:
        nn: such as ``DenseNN(C, hidden_dims, [D, 1, 1])``, which gives the centre, the reach and the strength.
        context_dim: the width of the context, if the network does not say it.
    """

    def __init__(self, nn: Net, *, context_dim: int | None = None) -> None:
        context_dim = width_of_context(nn, context_dim)
        super().__init__(_widths(nn, context_dim)[0], context_dim=context_dim)
        self.nn = nn

    def _named(self, centre: Tensor, reach: Tensor, strength: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"centre": centre, "reach": reach, "strength": strength}


class ConditionalHouseholder(_ReadOff, Householder):
    """`Householder` with reflections that a network reads off a context.

    Args:
        input_dim: the number of coordinates, D.
        nn: such as ``DenseNN(C, hidden_dims, [D] * count_transforms)``.
        count_transforms: the number of reflections.
        context_dim: the width of the context, if the network does not say it.
    """

    def __init__(self, input_dim: int, nn: Net, count_transforms: int = 1, *, context_dim: int | None = None) -> None:
        super().__init__(input_dim, count_transforms, context_dim=width_of_context(nn, context_dim))
        self.nn = nn

    def _named(self, *parts: Tensor) -> dict[str, Tensor]:
        return {"normals": torch.cat(parts, -1).unflatten(-1, (self.count_transforms, self.input_dim))}


class ConditionalMatrixExponential(_ReadOff, MatrixExponential):
    """`MatrixExponential`, without a bias, with a matrix that a network reads off a context.

    Args:
        input_dim: the number of coordinates, D.
        nn: such as ``DenseNN(C, hidden_dims, [D * D])``.
        iterations: accepted and without effect.
        normalization: ``"none"``.
        bound: the bound of the norm; default 3.
        context_dim: the width of the context, if the network does not say it.
    """

    def __init__(
        self,
        input_dim: int,
        nn: Net,
        iterations: int = 8,
        normalization: str = "none",
        bound: float | None = None,
        *,
        context_dim: int | None = None,
    ) -> None:
        context_dim = width_of_context(nn, context_dim)
        super().__init__(input_dim, iterations, normalization, bound, context_dim=context_dim, bias=False)
        self.nn = nn

    def _named(self, raw: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"raw": raw.unflatten(-1, (self.input_dim, self.input_dim))}


class ConditionalGeneralizedChannelPermute(_ReadOff, InvertibleConv1x1):
    """`InvertibleConv1x1` with triangular factors that a network reads off a context, in one matrix.

    Args:
        nn: such as ``DenseNN(C, hidden_dims, [channels * channels])``.
        channels: the number of channels.
        permutation: the rows of the fixed permutation; default a random one.
        context_dim: the width of the context, if the network does not say it.
    """

    def __init__(
        self,
        nn: Net,
        channels: int = 3,
        permutation: Sequence[int] | Tensor | None = None,
        *,
        context_dim: int | None = None,
    ) -> None:
        permutation = torch.randperm(channels) if permutation is None else permutation
        super().__init__(channels, permutation, context_dim=width_of_context(nn, context_dim))
        self.nn = nn

    def _named(self, matrix: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        matrix = matrix.unflatten(-1, (self.channels, self.channels))
        return {"lower": matrix, "upper": matrix, "diagonal": torch.diagonal(matrix, dim1=-2, dim2=-1)}
