"""Named flows: plain functions that stack layers on a base, by default a standard normal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pyroflows.distributions.base import BaseName
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.stack import autoregressions, couplings, directed, stack, turned
from pyroflows.distributions.support import Support
from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.transforms import (
    Additive,
    Affine,
    Elementwise,
    FlowTransform,
    Planar,
    Radial,
    RationalSpline,
    Sylvester,
    with_variants,
)

__all__ = ["iaf", "maf", "nice", "nsf", "planar", "radial", "realnvp", "sylvester"]


def maf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Masked autoregressive flow: scores in one pass, samples one coordinate after another (arXiv:1705.07057).

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers; the order of the coordinates turns round from one to the next.
        hidden_dims: the hidden widths of each layer's network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Example:
        >>> maf(3)().sample((4,)).shape
        torch.Size([4, 3])
    """
    network = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation, "residual": residual}
    layer = autoregressions(Affine(), input_dim, **network)
    return stack(lambda i: layer(i).inv, input_dim, transforms, linear, support, base=base)


def iaf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Inverse autoregressive flow: samples in one pass, scores others' points one coordinate after another
    (arXiv:1606.04934). Made for guides.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers; the order of the coordinates turns round from one to the next.
        hidden_dims: the hidden widths of each layer's network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Example:
        >>> iaf(3)().rsample((4,)).shape
        torch.Size([4, 3])
    """
    network = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation, "residual": residual}
    layer = autoregressions(Affine(), input_dim, **network)
    return stack(layer, input_dim, transforms, linear, support, base=base)


@with_variants({"structure": "autoregressive"}, {"structure": "autoregressive", "direction": "sample"})
def nsf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_dims: Sequence[int] = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    structure: Literal["coupling", "autoregressive"] = "coupling",
    direction: Literal["score", "sample"] = "score",
    mask: str | Sequence[bool] = "checkerboard",
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Neural spline flow of rational-quadratic splines (arXiv:1906.04032).

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers.
        hidden_dims: the hidden widths of each layer's network.
        bins: the number of bins of a spline.
        bound: half the side of the box outside of which the splines are the identity.
        structure: ``"coupling"``: both directions take one pass; ``"autoregressive"``: one of them
            finds one coordinate after another.
        direction: which direction of an autoregressive flow is the fast one.
        mask: which coordinates steer the first coupling: ``"checkerboard"``, every other one, ``"split"``, the first
            half, or booleans; the others steer the next one, and so on.
        activation: the activation of the networks.
        residual: whether their hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> import torch
        >>> nsf(2, structure="autoregressive")().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    if structure not in ("coupling", "autoregressive") or direction not in ("score", "sample"):
        raise OptionError(
            'structure must be "coupling" or "autoregressive" and direction "score" or "sample", '
            f"got {structure!r} and {direction!r}."
        )
    network = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation, "residual": residual}
    if structure == "coupling":
        layer = couplings(RationalSpline(bins, bound), input_dim, mask, **network)
        return stack(layer, input_dim, transforms, linear, support, base=base)
    layer = autoregressions(RationalSpline(bins, bound), input_dim, **network)
    return stack(directed(layer, direction), input_dim, transforms, linear, support, base=base)


@with_variants({"base": "student_t"})
def realnvp(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_dims: Sequence[int] = (128, 128),
    mask: str | Sequence[bool] = "checkerboard",
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Affine coupling flow: both directions take one pass (arXiv:1605.08803).

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers.
        hidden_dims: the hidden widths of each layer's network.
        mask: which coordinates steer the first coupling: ``"checkerboard"``, every other one, ``"split"``, the first
            half, or booleans; the others steer the next one, and so on.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> import torch
        >>> realnvp(3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    network = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation, "residual": residual}
    layer = couplings(Affine(), input_dim, mask, **network)
    return stack(layer, input_dim, transforms, linear, support, base=base)


def nice(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_dims: Sequence[int] = (128, 128),
    mask: str | Sequence[bool] = "checkerboard",
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Additive coupling flow with one scale of each coordinate at its end (arXiv:1410.8516).

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of additive layers.
        hidden_dims: the hidden widths of each layer's network.
        mask: which coordinates steer the first coupling: ``"checkerboard"``, every other one, ``"split"``, the first
            half, or booleans; the others steer the next one, and so on.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> import torch
        >>> nice(3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    network = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation, "residual": residual}
    layer = couplings(Additive(), input_dim, mask, **network)
    scale = Elementwise(Affine(), input_dim, context_dim=context_dim, hidden_dims=hidden_dims)
    return stack(layer, input_dim, transforms, linear, support, last=scale, base=base)


def planar(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 16,
    direction: Literal["sample", "score"] = "sample",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Planar flow: each layer pushes along one direction (arXiv:1505.05770).

    Each layer has ``2 input_dim + 1`` parameters, so it takes many of them.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers.
        direction: which direction is the formula of the layers; the other one is as exact.
        hidden_dims: the hidden widths of the networks that read the context, if there is one.
        activation: their activation.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> planar(3)().rsample((4,)).shape
        torch.Size([4, 3])
    """
    network: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation}

    def layer(i: int) -> FlowTransform:
        return Planar(input_dim, **network)

    return stack(directed(layer, direction), input_dim, transforms, linear, support, base=base)


def radial(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 16,
    direction: Literal["sample", "score"] = "sample",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Radial flow: each layer pushes away from one centre or towards it (arXiv:1505.05770).

    Each layer has ``input_dim + 2`` parameters, so it takes many of them.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers.
        direction: which direction is the formula of the layers; the other one is as exact.
        hidden_dims: the hidden widths of the networks that read the context, if there is one.
        activation: their activation.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> radial(3)().rsample((4,)).shape
        torch.Size([4, 3])
    """
    network: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation}

    def layer(i: int) -> FlowTransform:
        return Radial(input_dim, **network)

    return stack(directed(layer, direction), input_dim, transforms, linear, support, base=base)


def sylvester(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 5,
    width: int | None = None,
    factor: Literal["householder", "orthogonal", "triangular"] = "householder",
    direction: Literal["sample", "score"] = "sample",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Sylvester flow: each layer pushes along several directions at once (arXiv:1803.05649).

    Householder, orthogonal and triangular factors, of any width up to ``input_dim``.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers.
        width: how many directions a layer has; default ``input_dim``.
        factor: how the directions are made, see `Sylvester`; the coordinates of ``"triangular"`` layers turn round.
        direction: which direction is the formula of the layers; the other one is as exact.
        hidden_dims: the hidden widths of the networks that read the context, if there is one.
        activation: their activation.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> sylvester(3)().rsample((4,)).shape
        torch.Size([4, 3])
    """
    network: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation}

    def layer(i: int) -> FlowTransform:
        order = turned(input_dim, i)
        return Sylvester(input_dim, input_dim // 2 + 1, width=width, factor=factor, permutation=order, **network)

    return stack(directed(layer, direction), input_dim, transforms, linear, support, base=base)
