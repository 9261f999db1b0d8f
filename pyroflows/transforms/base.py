"""The contract of every layer: two methods, from which Pyro's whole transform protocol follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import ContextError, OptionError, ShapeError
from pyroflows.nets import MLP, Activation
from pyroflows.numerics import is_plainly_eager
from pyroflows.transforms.compiled import Compiled
from pyroflows.transforms.memo import Memo

__all__ = ["Conditioned", "FlowTransform", "Inverse", "with_variants"]

F = TypeVar("F", bound=Callable[..., Any])


def with_variants(*options: Mapping[str, Any]) -> Callable[[F], F]:
    """Names the option sets of a registered factory that the laws are to be checked for, beside the defaults.

    Example:
        >>> @with_variants({"floor": 0.1})
        ... def layer(input_dim, *, context_dim=0, floor=0.0): ...
        >>> layer.variants
        ({}, {'floor': 0.1})
    """

    def attach(factory: F) -> F:
        factory.variants = ({}, *options)  # type: ignore[attr-defined]
        return factory

    return attach


class FlowTransform(TransformModule, ConditionalTransform):
    r"""A bijection with parameters and, if ``context_dim > 0``, a context.

    An author writes ``forward_and_log_det`` and ``inverse_and_log_det``, pure functions of their arguments and
    of the parameters. Everything that Pyro and torch expect of a transform follows: call, ``.inv``,
    ``log_abs_det_jacobian(x, y)``, ``condition(context)``, caching, shapes. Forward is base to data.

    The last pair is remembered (until ``clear_cache()``), so that scoring a sample costs no inverse: what one
    direction gave is mapped back for free, and its log-det is known. The memory answers only for those very
    tensors, and only while they and every parameter and buffer still have the values that it was computed
    from. So a stale number is never returned, whatever optimizer changed the parameters, and a tensor of the
    caller's (data) is never a key. As with any cached transform of torch, the ``x`` that comes back for a
    sample ``y`` is the tensor that ``y`` was computed from; for a gradient with respect to ``y``, score
    ``y.detach().requires_grad_()``.

    Args:
        context_dim: the width of the context, 0 for an unconditional transform.

    Attributes:
        inverse: ``"closed"`` if the inverse is a formula, ``"numeric"`` if it is a search.
        log_det: ``"exact"``, or ``"estimate"`` if it is random in training mode.
        vmaps: whether ``torch.func.vmap`` over either direction works.
        compiles: whether ``torch.compile(fullgraph=True)`` of either direction works.
        twice_differentiable: whether second derivatives of both directions exist.
        sequential: whether forward, and whether inverse, takes one step after another, as a search does. `compile`
            leaves such a direction as it is.
        config: how the registry built this transform, or ``None``.
    """

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    bijective = True
    context_dim: int = 0
    inverse: Literal["closed", "numeric"] = "closed"
    log_det: Literal["exact", "estimate"] = "exact"
    vmaps: bool = True
    compiles: bool = True
    twice_differentiable: bool = True
    sequential: tuple[bool, bool] = (False, False)
    config: Any = None

    def __init__(self, context_dim: int = 0) -> None:
        # torch's own cache stays off: ours is consulted in its place.
        super().__init__(cache_size=0)
        if not isinstance(context_dim, int) or context_dim < 0:
            raise OptionError(f"context_dim must be a non-negative integer, got {context_dim!r}.")
        self.context_dim = context_dim
        self._memo: Memo | None = None
        self._compile_options: dict[str, Any] | None = None

    # --- the two methods of an author -------------------------------------------------------------------

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y`` ``[*batch, *event]`` and ``log|det dy/dx|`` ``[*batch]``."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x`` ``[*batch, *event]`` and ``log|det dx/dy|`` ``[*batch]``."""
        raise NotImplementedError

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Sets starting values from a batch of data on the ``y`` side; most layers have nothing to set."""

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far either direction may be off by its own doing, relative to what it maps; 0 for rounding alone.

        A layer that approximates, as one that solves a differential equation does, says here how well. The laws hold
        it to that.
        """
        return 0.0

    def inverse_residual(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """How far ``forward(inverse(y))`` is from ``y``: the largest absolute difference, ``[*batch]``."""
        with torch.no_grad():
            x, _ = self.inverse_and_log_det(y, context)
            gap = (self.forward_and_log_det(x, context)[0] - y).abs()
            event_dim = self.codomain.event_dim
            return gap.flatten(-event_dim).amax(-1) if event_dim else gap

    # --- named parameters, with or without a context ----------------------------------------------------

    def declare_parameters(
        self,
        *,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
        **initial: Tensor,
    ) -> None:
        """Declares named tensors: trainable as they are, or the output of a network that reads the context.

        Args:
            hidden_dims: the hidden widths of that network, used if ``context_dim > 0``.
            activation: its activation.
            **initial: the starting value of each tensor; the network starts close to it too.
        """
        self._shapes = {name: value.shape for name, value in initial.items()}
        if self.context_dim == 0:
            for name, value in initial.items():
                self.register_parameter(name, nn.Parameter(value.clone()))
            return
        size = sum(shape.numel() for shape in self._shapes.values())
        self.conditioner = MLP(0, size, hidden_dims=hidden_dims, context_dim=self.context_dim, activation=activation)
        self.start_from(**initial)

    def start_from(self, **values: Tensor) -> None:
        """Sets every declared tensor, or the last bias of the network that gives them."""
        with torch.no_grad():
            if self.context_dim == 0:
                for name, value in values.items():
                    getattr(self, name).copy_(value)
            else:
                bias = dict(self.conditioner.layers[-1].named_parameters())["bias"]
                bias.copy_(torch.cat([values[name].flatten() for name in self._shapes]))

    def parameters_of(self, context: Tensor | None = None) -> dict[str, Tensor]:
        """The declared tensors by name: ``shape`` each, or ``[*context_batch, *shape]`` under a context."""
        self.check_context(context)
        if self.context_dim == 0:
            return {name: getattr(self, name) for name in self._shapes}
        like = next(self.conditioner.parameters())  # under autocast the network's output has another dtype
        output = self.conditioner(None, context).to(like.dtype)
        flat = output.split([shape.numel() for shape in self._shapes.values()], -1)
        return {
            name: part.unflatten(-1, shape) if len(shape) != 1 else part
            for part, (name, shape) in zip(flat, self._shapes.items(), strict=True)
        }

    def check_context(self, context: Tensor | None) -> None:
        """Raises `ContextError` unless the context is what this transform was built for."""
        if self.context_dim == 0:
            return
        name = type(self).__name__
        if context is None:
            raise ContextError(
                f"{name} was built with context_dim={self.context_dim} and got no context. "
                "Call .condition(context) first, or flow(context) for a flow."
            )
        if not isinstance(context, Tensor):
            raise ContextError(
                f"{name} expected a tensor as its context, got {type(context).__name__}: give torch.as_tensor(context)."
            )
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ContextError(
                f"{name} expected a context of shape [*batch, {self.context_dim}], got {tuple(context.shape)}."
            )

    def check_width(self, value: Tensor, width: int) -> None:
        """Raises `ShapeError` unless ``value`` is a tensor whose last dimension has the given width."""
        if not isinstance(value, Tensor):
            raise ShapeError(
                f"{type(self).__name__} expected a tensor of shape [*batch, {width}], got {type(value).__name__}: "
                "give torch.as_tensor(x)."
            )
        if value.dim() == 0 or value.shape[-1] != width:
            raise ShapeError(
                f"{type(self).__name__} was built with input_dim={width} and got shape {tuple(value.shape)}."
            )

    def _claim_as(self, *parts: FlowTransform) -> None:
        """What holds for a combination is what holds for each part."""
        self.inverse = "numeric" if any(part.inverse == "numeric" for part in parts) else "closed"
        self.log_det = "estimate" if any(part.log_det == "estimate" for part in parts) else "exact"
        self.vmaps = all(part.vmaps for part in parts)
        self.compiles = all(part.compiles for part in parts)
        self.twice_differentiable = all(part.twice_differentiable for part in parts)
        self.sequential = any(part.sequential[0] for part in parts), any(part.sequential[1] for part in parts)

    # --- Pyro's and torch's protocol, derived -----------------------------------------------------------

    def condition(self, context: Tensor) -> FlowTransform:
        """This transform at a context ``[*batch, context_dim]``; itself, if it reads none."""
        return self if self.context_dim == 0 else Conditioned(self, context)

    @property
    def inv(self) -> FlowTransform:
        """The inverse transform, a module that holds the same parameters; ``t.inv.inv is t``."""
        if self._inv is None:
            self.__dict__["_inv"] = Inverse(self)  # not a submodule: the inverse contains this one
        return self._inv  # type: ignore[return-value]

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant, where a layer says it."""
        # Not NotImplementedError, as in torch: torch.jit asks every module hasattr(module, "sign").
        raise AttributeError(f"{type(self).__name__} does not say the sign of its Jacobian determinant.")

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of ``y`` for an ``x`` of the given shape."""
        return torch.Size(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of ``x`` for a ``y`` of the given shape."""
        return torch.Size(shape)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """This transform: its memory of the last pair is always safe, so there is none without."""
        return self

    def clear_cache(self) -> None:
        """Forgets the last pair, and with it the memory that it holds."""
        self._memo = None

    def __call__(self, x: Tensor) -> Tensor:
        memo = self._recall(x=x)
        if memo is not None:
            return memo.y
        y, log_det = self.forward_and_log_det(x)
        self._remember(x, y, log_det, by_forward=True)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        memo = self._recall(y=y)
        if memo is not None:
            return memo.x
        x, log_det = self.inverse_and_log_det(y)
        self._remember(x, y, -log_det, by_forward=False)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` ``[*batch]``; free if the pair is the last one."""
        memo = self._recall(x=x, y=y)
        return self.forward_and_log_det(x)[1] if memo is None else memo.log_det

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``inverse_and_log_det(y)``, free if ``y`` is what the last call gave; remembers nothing."""
        memo = self._recall(y=y)
        return self.inverse_and_log_det(y) if memo is None else (memo.x, -memo.log_det)

    def compile(self, **options: Any) -> FlowTransform:  # type: ignore[override]
        """Has ``torch.compile`` work on both directions from now on, except on one that is `sequential`.

        Results stay the same up to rounding. The first call compiles, which takes tens of seconds. Compiled functions
        have no second derivatives. A copy or pickle compiles anew.

        Args:
            **options: of ``torch.compile``.

        Returns:
            This transform.
        """
        for name, sequential in zip(("forward_and_log_det", "inverse_and_log_det"), self.sequential, strict=True):
            self.__dict__.pop(name, None)
            if not sequential:
                self.__dict__[name] = Compiled(getattr(self, name), **options)
        self._compile_options = options
        return self

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_log_det(y)[0]

    # --- the memo ---------------------------------------------------------------------------------------

    def _remember(self, x: Tensor, y: Tensor, log_det: Tensor, *, by_forward: bool) -> None:
        if is_plainly_eager() and not y.is_meta:
            self._memo = Memo.of(self, x, y, log_det, by_forward=by_forward)

    def _recall(self, *, x: Tensor | None = None, y: Tensor | None = None) -> Memo | None:
        memo = self._memo
        return memo if memo is not None and memo.answers(self, x, y) else None

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_memo": None, "_inv": None}
        if self._compile_options is not None:
            state.pop("forward_and_log_det", None)
            state.pop("inverse_and_log_det", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._compile_options is not None:
            self.compile(**self._compile_options)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


class Inverse(FlowTransform):
    """A transform run backwards: :math:`y = f^{-1}(x)`, with the parameters of :math:`f`.

    Example:
        >>> from pyroflows.transforms import affine
        >>> layer = affine(3)
        >>> layer.inv.inv is layer
        True
    """

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.context_dim)
        self.transform = transform
        self.domain, self.codomain = transform.codomain, transform.domain
        self._claim_as(transform)
        self.sequential = transform.sequential[::-1]

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return self.transform.sign

    @property
    def inv(self) -> FlowTransform:
        """The transform itself."""
        if self.transform._inv is None:
            self.transform.__dict__["_inv"] = self
        return self.transform

    # One memo serves both: the transform's.

    def __call__(self, x: Tensor) -> Tensor:
        return self.transform._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` ``[*batch]``; free if the pair is the last one."""
        return -self.transform.log_abs_det_jacobian(y, x)

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``inverse_and_log_det(y)``, free if ``y`` is what the last call gave."""
        memo = self.transform._recall(x=y)
        return self.inverse_and_log_det(y) if memo is None else (memo.y, memo.log_det)

    def clear_cache(self) -> None:
        """Forgets the last pair."""
        self.transform.clear_cache()

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of the transform."""
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The forward direction of the transform."""
        return self.transform.forward_and_log_det(y, context)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape that the transform maps from."""
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape that the transform maps to."""
        return self.transform.forward_shape(shape)


class Conditioned(FlowTransform):
    """A transform at a fixed context, so that its distribution has the context's batch shape.

    A copy or pickle holds the context's value, cut off from the graph that made it.

    Args:
        transform: a transform with ``context_dim > 0``.
        context: ``[*batch, context_dim]``.

    Raises:
        ContextError: the context has another width.
    """

    context: Tensor

    def __init__(self, transform: FlowTransform, context: Tensor) -> None:
        transform.check_context(context)
        super().__init__()
        self.transform = transform
        self.register_buffer("context", context, persistent=False)
        self.domain, self.codomain = transform.domain, transform.codomain
        self._claim_as(transform)

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return self.transform.sign

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The transform at the fixed context."""
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of the transform at the fixed context."""
        return self.transform.inverse_and_log_det(y, self.context)

    def _broadcast(self, shape: Sequence[int], event_dim: int) -> torch.Size:
        # An entry is a point of a layer with no event dimension, but the context belongs to the row it is in.
        return torch.broadcast_shapes(shape, (*self.context.shape[:-1], *(1,) * max(1, event_dim)))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The transform's own, broadcast with the context's batch shape."""
        return self._broadcast(self.transform.forward_shape(shape), self.codomain.event_dim)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The transform's own, broadcast with the context's batch shape."""
        return self._broadcast(self.transform.inverse_shape(shape), self.domain.event_dim)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_buffers"] = {name: buffer.detach() for name, buffer in self._buffers.items()}  # type: ignore[union-attr]
        return state
