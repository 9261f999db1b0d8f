r"""Pyro's classes that take the caller's network, with Pyro's arguments: a script changes its import and runs.

The networks are those of ``pyro.nn`` or any others with the same outputs, as Pyro's documentation gives them for each
class. They are used as they are; the layers around them are this package's, so each has its inverse, a log-det that
is exact, a context with a batch shape, any dtype. Three things differ from Pyro, all on purpose:

- a log-scale is not clipped: the bounds ``log_scale_min_clip`` and ``log_scale_max_clip`` are approached smoothly
  (`ClippedAffine`), so that the gradient is that of the function;
- raw spline, planar and other parameters mean what they mean in this package: zeros are the identity;
- ``condition(context)`` has the context's batch shape: ``sample((10,))`` at a context ``[6, C]`` is ``[10, 6, D]``.

A conditional class reads the width of the context off the network: its ``context_dim``, that of a ``DenseNN`` or the
inputs of the first linear layer. For a network that has none of these, say ``context_dim``. The classes whose
network reads nothing but a context are in ``read_off.py``, the couplings in ``dropin_coupling.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyroflows.errors import OptionError
from pyroflows.numerics import bounded_log_scale
from pyroflows.transforms.maps import Affine, UnivariateMap
from pyroflows.transforms.mixtures import DeepSigmoid
from pyroflows.transforms.monotone import SumOfSquares
from pyroflows.transforms.splines import RationalSpline
from pyroflows.transforms.structures import Autoregressive, Elementwise

__all__ = [
    "AffineAutoregressive",
    "ClippedAffine",
    "ConditionalAffineAutoregressive",
    "ConditionalNeuralAutoregressive",
    "ConditionalSplineAutoregressive",
    "NeuralAutoregressive",
    "PerCoordinate",
    "Polynomial",
    "Spline",
    "SplineAutoregressive",
    "by_coordinate",
    "outputs",
    "width_of_context",
]

Net = Callable[..., Any]


# --- the networks of pyro.nn ----------------------------------------------------------------------------


def outputs(net: Net, *inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
    """What the network gives, as a tuple."""
    if context is None:
        out = net(*inputs)
    else:
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in (*inputs, context)))
        out = net(*(value.expand(*batch, -1) for value in inputs), context=context)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def by_coordinate(parts: Sequence[Tensor], size: int, batch_dims: int) -> Tensor:
    """Parts ``[*batch, size]``, ``[*batch, size * p]`` or ``[*batch, p, size]``, as ``[*batch, size, sum of p]``."""
    return torch.cat([part.mT if part.dim() > batch_dims + 1 else part.unflatten(-1, (size, -1)) for part in parts], -1)


class PerCoordinate(nn.Module):
    """A network of ``pyro.nn`` as the structures of this package call one: ``[*batch, size, params]``.

    Args:
        net: the network.
        size: how many coordinates it steers; those of its input by default.
        flat: flatten the result to ``[*batch, size * params]``.
        order: which of the network's outputs comes when; default as they come.
    """

    def __init__(self, net: Net, size: int | None = None, flat: bool = False, order: Sequence[int] = ()) -> None:
        super().__init__()
        self.net, self.size, self.flat, self.order = net, size, flat, tuple(order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parts = outputs(self.net, x, context=context)
        parts = tuple(parts[i] for i in self.order) if self.order else parts
        batch_dims = x.dim() - 1 if context is None else max(x.dim(), context.dim()) - 1
        params = by_coordinate(parts, self.size or x.shape[-1], batch_dims)
        return params.flatten(-2) if self.flat else params


def _first_width(net: Net) -> int | None:
    layers = net.modules() if isinstance(net, nn.Module) else ()
    return next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), None)


def width_of_context(net: Net, context_dim: int | None, others: int | None = None) -> int:
    """How wide a context the network reads: what is said, or its ``context_dim``, or its inputs less the others."""
    if context_dim is not None:
        return context_dim
    if getattr(net, "context_dim", 0):
        return net.context_dim  # type: ignore[attr-defined]
    width = _first_width(net) if others is None else None
    width = getattr(net, "input_dim", width) if others is None else _first_width(net)
    if width is None or width <= (others or 0):
        raise OptionError(f"{type(net).__name__} does not say how wide a context it reads; give context_dim=.")
    return int(width) - (others or 0)


# --- autoregressive layers ------------------------------------------------------------------------------


class ClippedAffine(Affine):
    r"""An affine map whose log-scale stays between two bounds, as a smooth function: Pyro's options.

    :math:`\log a = B \tanh(r / B)`, with the upper bound as :math:`B` for :math:`r > 0` and the lower one for
    :math:`r < 0`; the slope at zero is 1 and the second derivative continuous. The ``stable`` form is
    :math:`y = \sigma x + (1 - \sigma) t` with :math:`\sigma = 1 / (1 + e^{-g})`, :math:`g = b + 6 \tanh(r / 6)`.

    Args:
        log_scale_min_clip: the lower bound, negative.
        log_scale_max_clip: the upper bound, positive.
        sigmoid_bias: :math:`b`.
        stable: which form.

    Raises:
        OptionError: zero is not between the bounds.

    Example:
        >>> ClippedAffine().forward(torch.ones(2), torch.tensor([[0.0, 200.0], [0.0, -200.0]]))[1]
        tensor([ 3., -5.])
    """

    def __init__(
        self,
        log_scale_min_clip: float = -5.0,
        log_scale_max_clip: float = 3.0,
        sigmoid_bias: float = 2.0,
        stable: bool = False,
    ) -> None:
        if not log_scale_min_clip < 0 < log_scale_max_clip:
            raise OptionError(
                "expected log_scale_min_clip < 0 < log_scale_max_clip, "
                f"got {log_scale_min_clip} and {log_scale_max_clip}."
            )
        super().__init__("gated", log_scale_max_clip)
        self.scale = "gated" if stable else "clipped"
        self.min_log_scale, self.sigmoid_bias = float(log_scale_min_clip), float(sigmoid_bias)

    def _shift_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        if self.scale == "gated":
            gate = self.sigmoid_bias + bounded_log_scale(raw, 6.0)
            return shift * torch.sigmoid(-gate), logsigmoid(gate)
        up, down = bounded_log_scale(raw, self.max_log_scale), bounded_log_scale(raw, self.min_log_scale)
        return shift, torch.where(raw > 0, up, down)


class _ByNetwork(Autoregressive):
    """An autoregressive layer around an autoregressive network of ``pyro.nn``."""

    def __init__(
        self, map: UnivariateMap, arn: Net, input_dim: int | None, context_dim: int = 0, outputs: Sequence[int] = ()
    ) -> None:
        turn = getattr(arn, "permutation", None)
        width = getattr(arn, "input_dim", None) if turn is None else len(turn)
        input_dim = width if input_dim is None else input_dim
        if input_dim is None:
            raise OptionError(f"{type(arn).__name__} has neither a permutation nor an input_dim; give one of them.")
        order = None if turn is None else torch.argsort(turn).tolist()  # Pyro says which comes when, not its rank
        net = PerCoordinate(arn, order=outputs)
        super().__init__(map, input_dim, context_dim=context_dim, order=order, net=net)

    @property
    def arn(self) -> Any:
        """The network."""
        return self.net.net

    nn = arn


class AffineAutoregressive(_ByNetwork):
    """Pyro's class: `Autoregressive` with `ClippedAffine`, steered by a network that gives means and log-scales.

    Args:
        autoregressive_nn: such as ``AutoRegressiveNN(D, hidden_dims)``.
        log_scale_min_clip: the lower bound of the log-scale, approached smoothly.
        log_scale_max_clip: the upper bound.
        sigmoid_bias: what is added to the gate of the stable form.
        stable: the contracting form, see `ClippedAffine`.

    Raises:
        OptionError: the network does not say how many coordinates it steers.

    Example:
        >>> from pyro.nn import AutoRegressiveNN
        >>> AffineAutoregressive(AutoRegressiveNN(3, [16])).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        autoregressive_nn: Net,
        log_scale_min_clip: float = -5.0,
        log_scale_max_clip: float = 3.0,
        sigmoid_bias: float = 2.0,
        stable: bool = False,
        *,
        context_dim: int = 0,
    ) -> None:
        map = ClippedAffine(log_scale_min_clip, log_scale_max_clip, sigmoid_bias, stable)
        super().__init__(map, autoregressive_nn, None, context_dim)


class SplineAutoregressive(_ByNetwork):
    """Pyro's class: `Autoregressive` with `RationalSpline`.

    Args:
        input_dim: the number of coordinates.
        autoregressive_nn: such as ``AutoRegressiveNN(D, hidden_dims, param_dims=[K, K, K - 1, K])``, without the last
            for ``order="quadratic"``.
        count_bins: the number of bins, K.
        bound: half the side of the box.
        order: ``"linear"`` or ``"quadratic"``.

    Example:
        >>> from pyro.nn import AutoRegressiveNN
        >>> arn = AutoRegressiveNN(3, [16], param_dims=[8, 8, 7, 8])
        >>> SplineAutoregressive(3, arn).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        input_dim: int,
        autoregressive_nn: Net,
        count_bins: int = 8,
        bound: float = 3.0,
        order: str = "linear",
        *,
        context_dim: int = 0,
    ) -> None:
        super().__init__(RationalSpline(count_bins, bound, order), autoregressive_nn, input_dim, context_dim)  # type: ignore[arg-type]


class NeuralAutoregressive(_ByNetwork):
    """Pyro's class, with an inverse: `Autoregressive` with `DeepSigmoid`.

    Args:
        autoregressive_nn: such as ``AutoRegressiveNN(D, hidden_dims, param_dims=[16] * 3)``.
        hidden_units: how many units a coordinate has.
        activation: ``"sigmoid"``, ``"tanh"``, ``"ELU"`` or ``"LeakyReLU"``.

    Example:
        >>> from pyro.nn import AutoRegressiveNN
        >>> NeuralAutoregressive(AutoRegressiveNN(3, [16], param_dims=[16] * 3)).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, autoregressive_nn: Net, hidden_units: int = 16, activation: str = "sigmoid", *, context_dim: int = 0
    ) -> None:
        map = DeepSigmoid(hidden_units, activation)  # type: ignore[arg-type]
        super().__init__(map, autoregressive_nn, None, context_dim, outputs=(0, 2, 1))  # Pyro: slopes, weights, offsets


class _Shifted(nn.Module):
    """A network of polynomial coefficients with the free constants before them."""

    def __init__(self, net: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.inner, self.c = net, nn.Parameter(shift)

    @property
    def net(self) -> Any:
        return self.inner.net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        params: Tensor = self.inner(x, context)
        return torch.cat([self.c.unsqueeze(-1).expand(*params.shape[:-1], 1), params], -1)


class Polynomial(_ByNetwork):
    """Pyro's class, with an inverse: `Autoregressive` with `SumOfSquares`.

    Args:
        autoregressive_nn: such as ``AutoRegressiveNN(D, hidden_dims, param_dims=[(count_degree + 1) * count_sum])``.
        input_dim: the number of coordinates.
        count_degree: the degree of the polynomials that are squared.
        count_sum: how many squares are added.

    Example:
        >>> from pyro.nn import AutoRegressiveNN
        >>> Polynomial(AutoRegressiveNN(3, [30], [15]), 3, 4, 3).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, autoregressive_nn: Net, input_dim: int, count_degree: int, count_sum: int, *, context_dim: int = 0
    ) -> None:
        super().__init__(SumOfSquares(count_degree, count_sum), autoregressive_nn, input_dim, context_dim)
        self.net = _Shifted(self.net, torch.zeros(input_dim))


class ConditionalAffineAutoregressive(AffineAutoregressive):
    """`AffineAutoregressive` with a network that reads a context too, such as ``ConditionalAutoRegressiveNN``."""

    def __init__(self, autoregressive_nn: Net, *, context_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(autoregressive_nn, context_dim=_of_autoregressive(autoregressive_nn, context_dim), **kwargs)


class ConditionalSplineAutoregressive(SplineAutoregressive):
    """`SplineAutoregressive` with a network that reads a context too, such as ``ConditionalAutoRegressiveNN``."""

    def __init__(
        self, input_dim: int, autoregressive_nn: Net, *, context_dim: int | None = None, **kwargs: Any
    ) -> None:
        context_dim = _of_autoregressive(autoregressive_nn, context_dim)
        super().__init__(input_dim, autoregressive_nn, context_dim=context_dim, **kwargs)


class ConditionalNeuralAutoregressive(NeuralAutoregressive):
    """`NeuralAutoregressive` with a network that reads a context too, such as ``ConditionalAutoRegressiveNN``."""

    def __init__(self, autoregressive_nn: Net, *, context_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(autoregressive_nn, context_dim=_of_autoregressive(autoregressive_nn, context_dim), **kwargs)


def _of_autoregressive(arn: Net, context_dim: int | None) -> int:
    turn = getattr(arn, "permutation", ())
    return width_of_context(arn, context_dim, others=getattr(arn, "input_dim", len(turn)))


# --- elementwise -----------------------------------------------------------------------------------------


class Spline(Elementwise):
    """Pyro's class: a rational spline of each coordinate, which are kept apart (``event_dim`` 0).

    Args:
        input_dim: the number of coordinates.
        count_bins: the number of bins.
        bound: half the side of the box.
        order: ``"linear"`` or ``"quadratic"``.

    Example:
        >>> Spline(2).forward_and_log_det(torch.ones(5, 2))[1].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        input_dim: int,
        count_bins: int = 8,
        bound: float = 3.0,
        order: str = "linear",
        *,
        context_dim: int = 0,
        event_dim: int = 0,
        **network: Any,
    ) -> None:
        map = RationalSpline(count_bins, bound, order)  # type: ignore[arg-type]
        super().__init__(map, input_dim, context_dim=context_dim, event_dim=event_dim, **network)
