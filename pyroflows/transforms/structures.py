"""Three ways to give a univariate map its parameters: elementwise, by coupling, autoregressively."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.nets import MADE, MLP, Activation
from pyroflows.numerics import apart, gradients_with_graph, is_differentiated, is_plainly_eager, sum_last, together
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.maps import UnivariateMap
from pyroflows.transforms.replaced import call_with

__all__ = ["Autoregressive", "Coupling", "Elementwise", "coupling_mask"]


def coupling_mask(mask: str | Sequence[bool] | None, input_dim: int, *, flip: bool = False) -> list[bool]:
    """Which coordinates steer a coupling, one boolean each.

    Args:
        mask: ``"split"``: the first half; ``"checkerboard"``: every other one, from the first; or one boolean a
            coordinate. ``None`` is ``"split"``.
        input_dim: the number of coordinates.
        flip: whether those that would be moved steer instead. By a word, a lone coordinate is always moved.

    Raises:
        OptionError: there is no such word, or the mask has another length, or leaves nothing to be moved.

    Example:
        >>> coupling_mask("checkerboard", 5, flip=True)
        [False, True, False, True, False]
    """
    if isinstance(mask, Iterable) and not isinstance(mask, str):
        steers = [bool(steer) for steer in mask]
    elif mask in (None, "split", "checkerboard"):
        steers = [i % 2 == 0 if mask == "checkerboard" else i < input_dim // 2 for i in range(input_dim)]
        if input_dim == 1:
            return [False]
    else:
        raise OptionError(f'mask must be "split", "checkerboard" or {input_dim} booleans, got {mask!r}.')
    steers = [steer != flip for steer in steers]
    if len(steers) != input_dim or all(steers):
        raise OptionError(f"mask must hold {input_dim} booleans, at least one of them False, got {steers}.")
    return steers


class _Mapped(FlowTransform):
    """A layer made of a univariate map."""

    sign = 1  # of a triangular Jacobian with a positive diagonal

    def __init__(self, map: UnivariateMap, input_dim: int, context_dim: int) -> None:
        super().__init__(context_dim)
        self.map, self.input_dim = map, input_dim
        self.inverse, self.vmaps, self.compiles = map.inverse, map.vmaps, map.compiles
        self.sequential = False, map.inverse == "numeric"

    def extra_repr(self) -> str:
        """The map and the width."""
        return f"{type(self.map).__name__}, input_dim={self.input_dim}, context_dim={self.context_dim}"


class Elementwise(_Mapped):
    r"""Each coordinate through its own map: :math:`y_i = g(x_i; \theta_i(c))`.

    Args:
        map: the univariate map :math:`g`.
        input_dim: the number of coordinates.
        context_dim: the width of the context; with one, a network gives the parameters.
        hidden_dims: the hidden widths of that network.
        activation: its activation.
        event_dim: 1 for a density on vectors; 0 keeps the coordinates apart, as Pyro's ``Spline`` does, so
            that the log-det has the shape of ``x``.

    Raises:
        OptionError: ``event_dim`` is neither 0 nor 1.

    Example:
        >>> from pyroflows.transforms import Affine
        >>> Elementwise(Affine(), 2).forward_and_log_det(torch.ones(5, 2))[1].shape
        torch.Size([5])
    """

    def __init__(
        self,
        map: UnivariateMap,
        input_dim: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        event_dim: int = 1,
    ) -> None:
        super().__init__(map, input_dim, context_dim)
        if event_dim not in (0, 1):
            raise OptionError(f"event_dim must be 0 or 1, got {event_dim!r}.")
        if event_dim == 0:
            self.domain = self.codomain = constraints.real
        self.declare_parameters(hidden_dims=hidden_dims, activation=activation, raw=torch.zeros(input_dim, map.params))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map of each coordinate."""
        self.check_width(x, self.input_dim)
        y, log_slope = self.map.forward(x, self.parameters_of(context)["raw"])
        return y, sum_last(log_slope, self.domain.event_dim)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse map of each coordinate."""
        self.check_width(y, self.input_dim)
        x, log_slope = self.map.backward(y, self.parameters_of(context)["raw"])
        return x, sum_last(log_slope, self.domain.event_dim)


class Coupling(_Mapped):
    r"""Some coordinates steer the others: :math:`y_a = x_a`, :math:`y_b = g(x_b; \theta(x_a, c))`.

    Both directions are one pass of the network. With one coordinate only the context steers.

    Args:
        map: the univariate map :math:`g`.
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        mask: which coordinates steer: ``"split"``, the first half, ``"checkerboard"``, every other one, or one boolean
            a coordinate, true for those that do; default ``"split"``.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether the network's hidden layers have skip connections.
        net: a network of the caller's in place of that one: ``net(kept, context)`` ``[*batch, moved * map.params]``,
            with ``None`` for what is not there.

    Raises:
        OptionError: there is no such mask, or it has another length, or leaves nothing to be moved.

    Example:
        >>> from pyroflows.transforms import Affine
        >>> layer = Coupling(Affine(), 3, mask=[True, False, True])
        >>> layer(torch.tensor([1.0, 2.0, 3.0]))[0::2].detach()
        tensor([1., 3.])
    """

    def __init__(
        self,
        map: UnivariateMap,
        input_dim: int,
        *,
        context_dim: int = 0,
        mask: str | Sequence[bool] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        residual: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(map, input_dim, context_dim)
        steers = coupling_mask(mask, input_dim)
        kept = [i for i, steer in enumerate(steers) if steer]
        moved = [i for i, steer in enumerate(steers) if not steer]
        self.register_buffer("kept", torch.tensor(kept, dtype=torch.long))
        self.register_buffer("moved", torch.tensor(moved, dtype=torch.long))
        self.register_buffer("back", torch.tensor(sorted(range(input_dim), key=(kept + moved).__getitem__)))
        self.net = net or MLP(
            len(kept),
            len(moved) * map.params,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
        )
        if net is None:
            self.net.columns = map.columns  # type: ignore[assignment]

    kept: Tensor
    moved: Tensor
    back: Tensor

    def _apply_map(self, value: Tensor, context: Tensor | None, direction: Any) -> tuple[Tensor, Tensor]:
        self.check_width(value, self.input_dim)
        self.check_context(context)
        kept, moved = apart(value, self.kept, self.moved, self.back)
        params = self.net(kept if kept.shape[-1] else None, context if self.context_dim else None)
        params = params.to(value.dtype)  # under autocast the network's output has another
        result, log_slope = direction(moved, params.unflatten(-1, (-1, self.map.params)))
        kept = kept.expand(*result.shape[:-1], -1)  # a context may have more batch dimensions
        return together(kept, result, self.kept, self.moved, self.back), sum_last(log_slope)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map of the coordinates that are moved."""
        return self._apply_map(x, context, self.map.forward)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse map of the coordinates that are moved."""
        return self._apply_map(y, context, self.map.backward)


class Autoregressive(_Mapped):
    r"""Each coordinate steered by those before it: :math:`y_i = g(x_i; \theta_i(x_{<i}, c))`.

    Forward is one pass of a masked network; the inverse finds one coordinate after another. So this layer samples
    fast (an inverse autoregressive flow: Kingma et al. 2016, arXiv:1606.04934) and its ``.inv`` scores fast (a
    masked autoregressive flow: Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).

    Args:
        map: the univariate map :math:`g`.
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        order: the rank of each coordinate, a permutation of ``0 .. input_dim - 1``; default as they come.
        adjacency: ``adjacency[i][j]`` says whether :math:`x_j` steers coordinate :math:`i`, in place of an order: any
            directed graph without circles, such as that of a known factorisation of the density.
        hidden_dims: the hidden widths of the network.
        activation: its activation.
        residual: whether the network's hidden layers have skip connections.
        net: a network of the caller's in place of that one: ``net(x, context)`` ``[*batch, input_dim, map.params]``,
            whose output for a coordinate must depend on those of lower rank alone.

    Raises:
        OptionError: ``order`` is not a permutation, ``adjacency`` has a circle, or the map is a joint one.

    Example:
        >>> from pyroflows.transforms import Affine
        >>> layer = Autoregressive(Affine(), 3, order=[2, 1, 0])
        >>> layer.inv(layer(torch.ones(3)))
        tensor([1., 1., 1.])
    """

    autoregressive = True

    def __init__(
        self,
        map: UnivariateMap,
        input_dim: int,
        *,
        context_dim: int = 0,
        order: Sequence[int] | None = None,
        adjacency: Sequence[Sequence[bool]] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        residual: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        if map.joint:
            raise OptionError(
                f"{type(map).__name__} reads the parameters of all coordinates together, and an autoregressive layer "
                "finds them one at a time; use Coupling or Elementwise."
            )
        super().__init__(map, input_dim, context_dim)
        self.sequential = False, True
        self.net = net or MADE(
            input_dim,
            map.params,
            order=order,
            adjacency=adjacency,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
        )
        if net is None:
            self.net.columns = map.columns  # type: ignore[assignment]
        ranks = range(input_dim) if order is None else order
        turn = torch.tensor(sorted(range(input_dim), key=ranks.__getitem__))
        self.register_buffer("turn", self.net.turn if isinstance(self.net, MADE) else turn)

    turn: Tensor  # which coordinate comes when

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass of the network."""
        self.check_width(x, self.input_dim)
        self.check_context(context)
        return self._pass(x, context if self.context_dim else None)

    def _pass(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, log_slope = self.map.forward(x, self.net(x, context).to(x.dtype))
        return y, sum_last(log_slope)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One coordinate after another, with the work of about one pass if the network is a `MADE`.

        The gradient is that of the implicit function theorem: its memory does not grow with the number of coordinates.
        """
        self.check_width(y, self.input_dim)
        self.check_context(context)
        context = context if self.context_dim else None
        if not (is_plainly_eager() and isinstance(self.net, MADE) and self.net.unrolls):
            return self._by_passes(y, context)
        tensors = self.net.tensors()
        wanted = any(t is not None and t.requires_grad for t in (y, context, *tensors))
        if not (wanted and torch.is_grad_enabled()):
            return self._unroll(y, context)
        if not all(isinstance(t, nn.Parameter) for t in tensors):
            return self._by_passes(y, context)  # what stands in for a parameter may be gone when gradients are due
        x, log_det = self._unroll(y, context)
        x = _Implicit.apply(self, x, y, context, *tensors)
        _, opposite = self._pass(x, context)
        return x, log_det - (opposite - opposite.detach())  # the same number with a gradient as without

    def _rows(self, context: Tensor | None, *values: Tensor) -> tuple[torch.Size, Tensor | None, list[Tensor]]:
        """The joint batch shape, and everything as rows of it."""
        batches = [values[0].shape[:-1]] if context is None else [values[0].shape[:-1], context.shape[:-1]]
        batch = torch.broadcast_shapes(*batches)
        rows = [value.expand(*batch, *value.shape[-1:]).reshape(-1, value.shape[-1]) for value in values]
        if context is not None:
            context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
        return batch, context, rows

    @torch.no_grad()
    def _unroll(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, context, [rows] = self._rows(context, y)
        columns = rows.mT.contiguous()
        log_slopes = []

        def find(coordinates: Tensor, params: Tensor) -> Tensor:
            found, log_slope = self.map.backward(columns.index_select(0, coordinates).mT, params)
            log_slopes.append(log_slope)
            return found

        x = self.net.unroll(find, rows, context)  # type: ignore[operator]
        return x.reshape(*batch, self.input_dim), sum_last(torch.cat(log_slopes, -1)).reshape(batch)

    def _solve_back(self, x: Tensor, context: Tensor | None, gradient: Tensor) -> Tensor:
        r""":math:`J^{-\top} g`, the gradient with respect to ``y`` given the one with respect to ``x = f^-1(y)``."""
        batch, context, [points, gradient] = self._rows(context, x, gradient)
        with torch.enable_grad():
            params = self.net(points, context).to(x.dtype).detach().requires_grad_()
            image, log_slope = self.map.forward(points, params)
            (by_params,) = torch.autograd.grad(image.sum(), params)
        slope = torch.exp(log_slope.detach()).to(x.dtype)
        # Where the map is flat to the last digit, x does not follow y by any number that can be held.
        slope = torch.where(slope < torch.finfo(x.dtype).tiny ** 0.5, torch.inf, slope)
        solved = self.net.unroll_back(points, gradient, slope, by_params, context)  # type: ignore[operator]
        return solved.reshape(*batch, self.input_dim)

    def _by_passes(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Whole passes of any network, differentiable as they are."""
        x = torch.zeros_like(y)
        log_slopes = []
        coordinates = torch.arange(self.input_dim, device=y.device)
        for turn in self.turn.split(1):
            params = self.net(x, context).index_select(-2, turn).to(y.dtype)
            found, log_slope = self.map.backward(y.index_select(-1, turn), params)
            x = torch.where(coordinates == turn, found, x)
            log_slopes.append(log_slope)
        return x, sum_last(torch.cat(log_slopes, -1))


class _Implicit(torch.autograd.Function):
    r"""The root :math:`x` of :math:`y = f(x; \theta)`, with the gradients of the implicit function theorem.

    For a gradient :math:`g`, :math:`y` gets :math:`v = J^{-\top} g`, and the context and the network what the image
    :math:`f(x; \theta)` at the fixed root gives them for :math:`-v`.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: Autoregressive, x: Tensor, y: Tensor, context: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        ctx.layer, ctx.tensors = layer, tensors
        ctx.save_for_backward(x, y, context, *tensors)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, context, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        # A second derivative, a batch of gradients, or a network whose tensors were others in the forward pass.
        replaced = any(a is not b for a, b in zip(ctx.tensors, ctx.layer.net.tensors(), strict=True))
        if is_differentiated(gradient) or replaced:
            layer = ctx.layer
            name_of = {id(parameter): name for name, parameter in layer.named_parameters()}
            names = [name_of[id(tensor)] for tensor in layer.net.tensors()]

            def by_passes(y: Tensor, context: Tensor | None, *tensors: Tensor) -> Tensor:
                found, _ = call_with(layer, dict(zip(names, tensors, strict=True)), layer._by_passes, y, context)
                return found

            return None, None, *gradients_with_graph(by_passes, (y, context, *tensors), needed, gradient)
        solved = ctx.layer._solve_back(x, context, gradient)
        by_rest: list[Tensor | None] = [None] * (len(needed) - 1)
        # What was frozen since the forward pass gets none, as with plain operations.
        wanted = [i for i, t in enumerate((context, *tensors)) if needed[1 + i] and t is not None and t.requires_grad]
        if wanted:
            context = None if context is None else context.detach().requires_grad_()
            with torch.enable_grad():
                image, _ = ctx.layer._pass(x, context)
            leaves: list[Any] = [(context, *tensors)[i] for i in wanted]
            found = torch.autograd.grad(image, leaves, -solved, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                by_rest[i] = gradient
        return None, None, solved.sum_to_size(y.shape), *by_rest
