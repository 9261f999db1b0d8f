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

__all__ = ["ffjord", "flow_matching", "otflow", "rnode"]


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
    options = {
        "context_dim": context_dim,
        "hidden_dims": hidden_dims,
        "activation": activation,
        "conditioning": conditioning,
        "residual": residual,
        "divergence": divergence,
        **options,
    }
    return stack(lambda _: continuous(input_dim, **options), input_dim, transforms, False, support, base=base)


def rnode(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 1,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "tanh",
    conditioning: Literal["concat", "concatsquash", "film"] = "concat",
    kinetic: float = 0.01,
    jacobian: float = 0.01,
    base: BaseName = "normal",
    support: Support | None = None,
    **options: Any,
) -> Flow:
    """Regularised continuous flow: an `ffjord` whose points take straight ways that few steps follow
    (arXiv:2002.02798).

    `pyroflows.fit` adds the penalties to its loss; in a loop of your own see `pyroflows.recorded`.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers, each a `ContinuousTransform` with a velocity of its own.
        hidden_dims: the hidden widths of each velocity's network.
        activation: its activation, which has to be smooth.
        conditioning: how time and context enter, see `VelocityMLP`.
        kinetic: the weight of the kinetic energy along the way.
        jacobian: the weight of the squared Frobenius norm of the velocity's Jacobian along the way.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.
        **options: of `VelocityMLP` and `ContinuousTransform`, such as ``solver``, ``rtol`` and ``gradient``.

    Raises:
        OptionError: an option is unknown or has a value that it cannot take.

    Example:
        >>> import torch, pyroflows
        >>> with pyroflows.recorded() as record:
        ...     score = rnode(3)().log_prob(torch.zeros(5, 3))
        >>> sorted(record.penalties)
        ['jacobian', 'kinetic']
    """
    return ffjord(
        input_dim,
        context_dim=context_dim,
        transforms=transforms,
        hidden_dims=hidden_dims,
        activation=activation,
        conditioning=conditioning,
        base=base,
        support=support,
        **{"regularize": {"kinetic": kinetic, "jacobian": jacobian}, **options},
    )


def otflow(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 1,
    hidden_dims: Sequence[int] = (64, 64),
    rank: int | None = None,
    kinetic: float = 0.005,
    hjb: float = 0.05,
    base: BaseName = "normal",
    support: Support | None = None,
    **options: Any,
) -> Flow:
    """Continuous flow along the gradient of a potential, as optimal transport moves (OT-Flow, arXiv:2006.00104).

    `pyroflows.fit` adds the penalties to its loss; in a loop of your own see `pyroflows.recorded`.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers, each a `ContinuousTransform` with a potential of its own.
        hidden_dims: the equal widths of the layers of each potential's network.
        rank: of the potential's quadratic part, see `PotentialGradient`.
        kinetic: the weight of the kinetic energy along the way.
        hjb: the weight of how far the potential is from solving the Hamilton-Jacobi-Bellman equation along the way.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.
        **options: of `ContinuousTransform`, such as ``solver``, ``rtol`` and ``gradient``.

    Raises:
        OptionError: an option is unknown or has a value that it cannot take.

    Example:
        >>> import torch
        >>> otflow(3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    potential = {"velocity": "potential", "hidden_dims": hidden_dims, "rank": rank}
    weights = {"kinetic": kinetic, "hjb": hjb}
    options = {"context_dim": context_dim, "regularize": weights, **potential, **options}
    return stack(lambda _: continuous(input_dim, **options), input_dim, transforms, False, support, base=base)


def flow_matching(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 1,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "tanh",
    conditioning: Literal["concat", "concatsquash", "film"] = "concat",
    residual: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
    **options: Any,
) -> Flow:
    """Continuous flow that `pyroflows.fit` trains without solving its differential equation (arXiv:2210.02747).

    It is an `ffjord` of one layer whose default objective is ``"flow_matching"``. Another is taken as
    ``fit(flow, x, objective="mixture")``; see `pyroflows.training.FlowMatching` for other paths and couplings.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers. Flow matching trains one velocity: with several, the objective is likelihood.
        hidden_dims: the hidden widths of each velocity's network.
        activation: its activation, which has to be smooth.
        conditioning: how time and context enter, see `VelocityMLP`.
        residual: whether its hidden layers have skip connections.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.
        **options: of `ContinuousTransform`, such as ``solver`` and ``rtol``.

    Raises:
        OptionError: an option is unknown or has a value that it cannot take.

    Example:
        >>> flow_matching(3).objective
        'flow_matching'
    """
    flow = ffjord(
        input_dim,
        context_dim=context_dim,
        transforms=transforms,
        hidden_dims=hidden_dims,
        activation=activation,
        conditioning=conditioning,
        residual=residual,
        base=base,
        support=support,
        **options,
    )
    if transforms == 1:
        flow.objective = "flow_matching"
    return flow
