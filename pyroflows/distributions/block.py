"""The block neural autoregressive flow (De Cao, Titov, Aziz 2019, arXiv:1904.04676)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pyroflows.distributions.base import BaseName
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.stack import directed, stack, turned
from pyroflows.distributions.support import Support
from pyroflows.nets import Activation
from pyroflows.transforms import BlockAutoregressive, FlowTransform

__all__ = ["bnaf"]


def bnaf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 2,
    hidden_factors: Sequence[int] = (8, 8),
    unit: str = "tanh",
    residual: Literal["normal", "gated"] | None = "gated",
    direction: Literal["score", "sample"] = "score",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Block neural autoregressive flow: scores in one pass, samples by a search of each coordinate
    (arXiv:1904.04676).

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers; the order of the coordinates turns round from one to the next.
        hidden_factors: how many units a coordinate has in each hidden layer of a `BlockAutoregressive`.
        unit: the activation of those units.
        residual: what is added to a layer's network, see `BlockAutoregressive`.
        direction: which direction is the formula of the layers; the other one is as exact.
        hidden_dims: the hidden widths of the networks that read the context, if there is one.
        activation: their activation.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> import torch
        >>> bnaf(3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def layer(i: int) -> FlowTransform:
        return BlockAutoregressive(
            input_dim,
            hidden_factors,
            unit,
            residual,
            context_dim=context_dim,
            order=turned(input_dim, i),
            hidden_dims=hidden_dims,
            context_activation=activation,
        )

    return stack(directed(layer, direction), input_dim, transforms, linear, support, base=base)
