"""Flows along a velocity field, by the names of the papers that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pyroflows.distributions.base import BaseName
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.stack import stack
from pyroflows.distributions.support import Support
from pyroflows.nets import Activation
from pyroflows.transforms import continuous, with_variants

__all__ = ["ffjord"]


@with_variants({"divergence": "hutchinson"})
def ffjord(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 1,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "tanh",
    conditioning: Literal["concat", "concatsquash", "film"] = "concat",
    residual: bool = False,
    divergence: Literal["exact", "hutchinson", "hutch++"] = "exact",
    base: BaseName = "normal",
    support: Support | None = None,
    **options: Any,
) -> Flow:
    """Continuous normalizing flow: both directions are one solve of a differential equation (arXiv:1810.01367).

    The paper estimates the divergence of its velocity. With up to two hidden layers, the exact one costs as much and is
    the default.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers, each a `ContinuousTransform` with a velocity of its own.
        hidden_dims: the hidden widths of each velocity's network.
        activation: its activation, which has to be smooth.
        conditioning: how time and context enter, see `VelocityMLP`.
        residual: whether its hidden layers have skip connections.
        divergence: ``"exact"``, or an estimate in training mode, see `ContinuousTransform`.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.
        **options: of `ContinuousTransform`, such as ``solver``, ``rtol`` and ``gradient``.

    Raises:
        OptionError: an option is unknown or has a value that it cannot take.

    Example:
        >>> import torch
        >>> ffjord(3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    network = {"hidden_dims": hidden_dims, "activation": activation, "conditioning": conditioning, "residual": residual}
    options = {"context_dim": context_dim, "divergence": divergence, **network, **options}
    return stack(lambda _: continuous(input_dim, **options), input_dim, transforms, False, support, base=base)
