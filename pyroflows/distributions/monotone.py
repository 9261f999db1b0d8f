"""Named flows of monotone maps: neural autoregressive, unconstrained monotonic, polynomial, Gaussianization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pyroflows.distributions.base import BaseName
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.stack import autoregressions, directed, stack
from pyroflows.distributions.support import Support
from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.transforms import (
    Bernstein,
    Compose,
    DeepSigmoid,
    DenseSigmoid,
    Elementwise,
    FlowTransform,
    Gaussianization,
    Orthogonal,
    SumOfSquares,
    UnconstrainedMonotonic,
    UnivariateMap,
)

__all__ = ["bpf", "gaussianization", "naf", "sospf", "unaf"]


def _autoregressive(
    map: UnivariateMap,
    input_dim: int,
    context_dim: int,
    transforms: int,
    direction: Literal["score", "sample"],
    hidden_dims: Sequence[int],
    activation: Activation,
    residual: bool,
    linear: bool,
    base: BaseName,
    support: Support | None,
) -> Flow:
    network = {"context_dim": context_dim, "hidden_dims": hidden_dims, "activation": activation, "residual": residual}
    layer = autoregressions(map, input_dim, **network)
    return stack(directed(layer, direction), input_dim, transforms, linear, support, base=base)


def naf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 3,
    hidden_units: int = 16,
    unit: Literal["sigmoid", "tanh", "ELU", "LeakyReLU"] = "sigmoid",
    depth: int = 1,
    dense: bool = False,
    direction: Literal["score", "sample"] = "score",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Neural autoregressive flow of deep sigmoids, or of dense ones (arXiv:1804.00779).

    The other direction than the fast one is found by a search of each coordinate, to the last digits.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers; the order of the coordinates turns round from one to the next.
        hidden_units: the number of units of each map.
        unit: their activation, see `DeepSigmoid`.
        depth: how many means of units each map applies one after the other.
        dense: connect ``depth`` layers of ``hidden_units`` means each, see `DenseSigmoid`; of sigmoids only.
        direction: which direction takes one pass: scoring data, or sampling.
        hidden_dims: the hidden widths of each layer's network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> naf(3)().sample((4,)).shape
        torch.Size([4, 3])
    """
    if dense and unit != "sigmoid":
        raise OptionError(f"dense maps are of sigmoids, got unit={unit!r}.")
    map = DenseSigmoid(hidden_units, depth) if dense else DeepSigmoid(hidden_units, unit, depth)
    network = (hidden_dims, activation, residual)
    return _autoregressive(map, input_dim, context_dim, transforms, direction, *network, linear, base, support)


def unaf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 3,
    hidden_units: int = 8,
    bound: float = 5.0,
    direction: Literal["score", "sample"] = "score",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Unconstrained monotonic autoregressive flow: integrals of positive networks (arXiv:1908.05164).

    The other direction than the fast one is found by a search of each coordinate, to the last digits.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers; the order of the coordinates turns round from one to the next.
        hidden_units: the width of each integrand's network.
        bound: where the straight tails begin, at most 5.
        direction: which direction takes one pass: scoring data, or sampling.
        hidden_dims: the hidden widths of each layer's network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> unaf(3)().sample((4,)).shape
        torch.Size([4, 3])
    """
    map = UnconstrainedMonotonic(hidden_units, bound)
    network = (hidden_dims, activation, residual)
    return _autoregressive(map, input_dim, context_dim, transforms, direction, *network, linear, base, support)


def sospf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 3,
    degree: int = 4,
    sums: int = 3,
    bound: float = 5.0,
    direction: Literal["score", "sample"] = "score",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Sum-of-squares polynomial flow (arXiv:1905.02325).

    The other direction than the fast one is found by a search of each coordinate, to the last digits.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers; the order of the coordinates turns round from one to the next.
        degree: the degree of the polynomials that are squared.
        sums: how many squares are added.
        bound: where the straight tails begin.
        direction: which direction takes one pass: scoring data, or sampling.
        hidden_dims: the hidden widths of each layer's network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> sospf(3)().sample((4,)).shape
        torch.Size([4, 3])
    """
    map = SumOfSquares(degree, sums, bound)
    network = (hidden_dims, activation, residual)
    return _autoregressive(map, input_dim, context_dim, transforms, direction, *network, linear, base, support)


def bpf(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 3,
    degree: int = 16,
    bound: float = 5.0,
    direction: Literal["score", "sample"] = "score",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    residual: bool = False,
    linear: bool = False,
    base: BaseName = "normal",
    support: Support | None = None,
) -> Flow:
    """Bernstein polynomial flow (arXiv:2004.00464).

    The other direction than the fast one is found by a search of each coordinate, to the last digits.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of layers; the order of the coordinates turns round from one to the next.
        degree: the degree of the polynomials.
        bound: where the straight tails begin.
        direction: which direction takes one pass: scoring data, or sampling.
        hidden_dims: the hidden widths of each layer's network.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        linear: put an `LULinear` layer before each.
        base: ``"normal"``, or ``"student_t"`` for heavy tails, see `LearnedStudentT`.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> bpf(3)().sample((4,)).shape
        torch.Size([4, 3])
    """
    map = Bernstein(degree, bound)
    network = (hidden_dims, activation, residual)
    return _autoregressive(map, input_dim, context_dim, transforms, direction, *network, linear, base, support)


def gaussianization(
    input_dim: int,
    *,
    context_dim: int = 0,
    transforms: int = 3,
    components: int = 8,
    direction: Literal["score", "sample"] = "score",
    hidden_dims: Sequence[int] = (128, 128),
    activation: Activation = "relu",
    linear: bool = False,
    support: Support | None = None,
) -> Flow:
    """Gaussianization flow: each coordinate's mixture of normals made normal, with learned rotations in between
    (arXiv:2003.01941).

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        transforms: the number of pairs of a rotation and `Gaussianization` maps.
        components: the number of normals in each mixture.
        direction: which direction is a formula: scoring data, or sampling. The other one is a search of all
            coordinates at once, to the last digits.
        hidden_dims: the hidden widths of the networks that read the context, if there is one.
        activation: their activation.
        linear: put an `LULinear` layer before each pair.
        support: where the data live, if not on all real vectors.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> gaussianization(3)().sample((4,)).shape
        torch.Size([4, 3])
    """
    map = Gaussianization(components)

    def layer(i: int) -> FlowTransform:
        rotation = Orthogonal(input_dim, context_dim=context_dim, hidden_dims=hidden_dims, activation=activation)
        mixtures = Elementwise(map, input_dim, context_dim=context_dim, hidden_dims=hidden_dims, activation=activation)
        return Compose([rotation, mixtures])

    return stack(directed(layer, direction), input_dim, transforms, linear, support)
