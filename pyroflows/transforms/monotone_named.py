"""Neural autoregressive and sum-of-squares layers by the names and with the argument order of Pyro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pyroflows.transforms.base import with_variants
from pyroflows.transforms.mixtures import DeepSigmoid
from pyroflows.transforms.monotone import SumOfSquares
from pyroflows.transforms.structures import Autoregressive

__all__ = [
    "conditional_neural_autoregressive",
    "conditional_polynomial",
    "neural_autoregressive",
    "polynomial",
]

_Squash = Literal["sigmoid", "tanh", "ELU", "LeakyReLU"]


@with_variants({"activation": "ELU"}, {"activation": "LeakyReLU"})
def neural_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    activation: _Squash = "sigmoid",
    width: int = 16,
    *,
    context_dim: int = 0,
    depth: int = 1,
    **options: Any,
) -> Autoregressive:
    """A neural autoregressive layer, that of `DeepSigmoid` maps; it samples and scores.

    Args:
        input_dim: the number of coordinates.
        hidden_dims: the hidden widths of the network; default one of ``3 input_dim + 1``.
        activation: of the maps: ``"sigmoid"``, ``"tanh"``, ``"ELU"`` or ``"LeakyReLU"``; that of the network is a relu.
        width: the number of units of a map.
        context_dim: the width of the context.
        depth: how many means a map applies one after the other.
        **options: of `Autoregressive`.

    Raises:
        OptionError: an unknown activation, or a number that is not a positive integer.

    Example:
        >>> import torch
        >>> neural_autoregressive(3).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    hidden_dims = [3 * input_dim + 1] if hidden_dims is None else hidden_dims
    map = DeepSigmoid(width, activation, depth)
    return Autoregressive(map, input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def polynomial(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    count_degree: int = 4,
    count_sum: int = 3,
    bound: float = 5.0,
    context_dim: int = 0,
    **options: Any,
) -> Autoregressive:
    """An autoregressive layer of sums of squared polynomials, `SumOfSquares`; it samples and scores.

    Args:
        input_dim: the number of coordinates.
        hidden_dims: the hidden widths of the network; default one of ``10 input_dim``.
        count_degree: the degree of the polynomials that are squared.
        count_sum: how many squares are added.
        bound: where the straight tails begin.
        context_dim: the width of the context.
        **options: of `Autoregressive`.

    Raises:
        OptionError: a number is out of range.

    Example:
        >>> import torch
        >>> polynomial(3).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    hidden_dims = [10 * input_dim] if hidden_dims is None else hidden_dims
    map = SumOfSquares(count_degree, count_sum, bound)
    return Autoregressive(map, input_dim, context_dim=context_dim, hidden_dims=hidden_dims, **options)


def conditional_neural_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    activation: _Squash = "sigmoid",
    width: int = 16,
    **options: Any,
) -> Autoregressive:
    """`neural_autoregressive` with a context."""
    return neural_autoregressive(input_dim, hidden_dims, activation, width, context_dim=context_dim, **options)


def conditional_polynomial(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Autoregressive:
    """`polynomial` with a context, which Pyro lacks."""
    return polynomial(input_dim, hidden_dims, context_dim=context_dim, **options)
