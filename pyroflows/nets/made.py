"""A masked autoencoder: a perceptron whose outputs for one coordinate see only the coordinates before it.

Germain, Gregor, Murray, Larochelle (2015), *MADE: masked autoencoder for distribution estimation*,
arXiv:1502.03509.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets.mlp import MLP, Activation, check_widths

__all__ = ["MADE"]


class MADE(MLP):
    r"""``params`` outputs for each of ``input_dim`` coordinates, those of :math:`x_i` from what precedes it.

    Coordinate :math:`i` has the rank ``order[i]``; its outputs depend on the coordinates of lower rank and on
    the whole context. A hidden unit of degree :math:`m` sees the ranks below :math:`m`.

    Args:
        input_dim: the number of coordinates.
        params: how many outputs each coordinate gets.
        order: the rank of each coordinate, a permutation of ``0 .. input_dim - 1``; default as they come.
        hidden_dims: the widths of the hidden layers.
        context_dim: the width of the context, 0 for none.
        activation: a name, a module class or a module.
        residual: add each hidden layer's input to its output; all hidden widths must then be equal.

    Raises:
        OptionError: ``order`` is not a permutation, or a width is not positive.

    Example:
        >>> MADE(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        input_dim: int,
        params: int,
        *,
        order: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        context_dim: int = 0,
        activation: Activation = "relu",
        residual: bool = False,
    ) -> None:
        hidden_dims = check_widths(hidden_dims)
        ranks = list(range(input_dim)) if order is None else [int(rank) for rank in order]
        if sorted(ranks) != list(range(input_dim)):
            raise OptionError(f"order must be a permutation of 0 .. {input_dim - 1}, got {ranks}.")
        # A unit of degree 0 sees the context alone; without a context it would see nothing.
        lowest = 0 if context_dim else min(1, input_dim - 1)
        degrees = [torch.tensor(ranks) + 1]
        for width in hidden_dims:
            unit = torch.arange(width)
            degrees.append(lowest + unit * (input_dim - lowest) // width)
        masks = [later[:, None] >= earlier for earlier, later in pairwise(degrees)]
        masks.append(torch.tensor(ranks).repeat_interleave(params)[:, None] >= degrees[-1])
        super().__init__(
            input_dim,
            input_dim * params,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
            masks=masks,
        )
        self.params = params

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        """The outputs ``[*batch, input_dim, params]`` for ``x`` ``[*batch, input_dim]``."""
        return super().forward(x, context).unflatten(-1, (-1, self.params))
