"""Gauss-Legendre quadrature from zero to a point, and powers of a number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["gauss_legendre", "powers"]


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    r"""Nodes :math:`\xi_i` and weights :math:`\omega_i` with :math:`\int_0^x g \approx x \sum_i \omega_i g(x \xi_i)`.

    Exact for polynomials of degree ``2 nodes - 1``.

    Args:
        nodes: how many nodes.

    Returns:
        Nodes in (0, 1) and weights, as plain numbers: a layer computes them once.

    Example:
        >>> xi, omega = map(torch.tensor, gauss_legendre(2))
        >>> 2.0 * (omega * (2.0 * xi) ** 3).sum().round(decimals=4)  # x^4 / 4 at 2
        tensor(4.)
    """
    where, weights = np.polynomial.legendre.leggauss(nodes)
    return ((where + 1) / 2).tolist(), (weights / 2).tolist()


def powers(x: Tensor, highest: int) -> Tensor:
    """``1, x, x^2, ...`` along a new last dimension, without a logarithm or a division.

    Args:
        x: ``[...]``.
        highest: the last exponent.

    Returns:
        ``[..., highest + 1]``.

    Example:
        >>> powers(torch.tensor([0.0, 2.0]), 3)
        tensor([[1., 0., 0., 0.],
                [1., 2., 4., 8.]])
    """
    x = x.unsqueeze(-1)
    table = torch.ones_like(x)
    while table.shape[-1] <= highest:
        table = torch.cat([table, table * (table[..., -1:] * x)], -1)
    return table[..., : highest + 1]
