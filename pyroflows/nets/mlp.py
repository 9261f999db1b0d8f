"""A multilayer perceptron that may read a context, skip, and have some of its weights masked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, linear

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets.masked import Block, Link, affine, blocks_of, chain

__all__ = ["MLP", "Activation", "activation_module"]

Activation = str | Callable[[], nn.Module] | nn.Module
"""A name (``"relu"``, ``"silu"``, ``"tanh"``, ...), a module class such as ``nn.SiLU``, or a module."""

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation_module(activation: Activation) -> nn.Module:
    """The module of an activation given by name, class or instance.

    Raises:
        OptionError: the name is unknown, or it is no class, or calling the class gave no module.

    Example:
        >>> activation_module("silu")
        SiLU()
    """
    if isinstance(activation, nn.Module):
        return activation
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            near = difflib.get_close_matches(activation, _ACTIVATIONS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"no activation {activation!r}.{hint} Known names: {', '.join(_ACTIVATIONS)}.")
        return _ACTIVATIONS[activation]()
    module = activation() if callable(activation) else activation
    if not isinstance(module, nn.Module):
        raise OptionError(f"expected an activation that makes an nn.Module, got {type(module).__name__}.")
    return module


def within_reach(x: Tensor) -> Tensor:
    """The input, held at 1e8 (float16 at 255) so that no weight of ordinary size can overflow."""
    bound = 255.0 if x.dtype == torch.float16 else 1e8
    return hardtanh(x, -bound, bound)  # a clamp whose gradient is one operation


def check_widths(hidden_dims: Sequence[int]) -> tuple[int, ...]:
    """The hidden widths as a tuple.

    Raises:
        OptionError: they are not a sequence of positive integers.
    """
    if isinstance(hidden_dims, int) or not isinstance(hidden_dims, Iterable):
        example = hidden_dims if isinstance(hidden_dims, int) else 128
        raise OptionError(f"hidden_dims must be a sequence of widths, such as ({example},), got {hidden_dims!r}.")
    if any(not isinstance(width, int) or width < 1 for width in hidden_dims):
        raise OptionError(f"hidden_dims must be positive integers, got {tuple(hidden_dims)}.")
    return tuple(hidden_dims)


class _Linear(nn.Module):
    """An affine map of the input, of the context, or of both; masked where a mask is given."""

    mask: Tensor | None
    _blocks: tuple[list[Block], list[Block]]

    def __init__(self, inputs: int, outputs: int, context_dim: int = 0, mask: Tensor | None = None) -> None:
        super().__init__()
        fan_in = max(1, inputs + context_dim)
        self.weight = nn.Parameter(torch.empty(outputs, inputs)) if inputs else None
        self.context_weight = nn.Parameter(torch.empty(outputs, context_dim)) if context_dim else None
        self.bias = nn.Parameter(torch.empty(outputs))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        mask = None if mask is None or not inputs or bool(mask.all()) else mask
        self._blocks = ([], []) if mask is None else (blocks_of(mask), blocks_of(mask.mT))
        # A product with numbers is many times as fast as a choice by booleans.
        self.register_buffer("mask", None if mask is None else mask.to(self.bias), persistent=False)

    def link(self) -> Link:
        """What it does with its input."""
        return Link(self.weight, self.mask, self.bias, self._blocks)  # type: ignore[arg-type]

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.bias
        if x is not None:
            out = out.expand(*x.shape[:-1], -1) if self.weight is None else affine(x, self.link())
        if context is not None and self.context_weight is not None:
            out = out + linear(context, self.context_weight)
        return out


def _unwatched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call does what its class says, and nobody has asked to be told of it."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks)


class MLP(nn.Module):
    r"""A multilayer perceptron :math:`(x, c) \mapsto W_n \phi(\ldots \phi(W_1 x + C c + b_1)) + b_n`.

    An input beyond 1e8 counts as 1e8, so that the output stays finite for every finite input.

    The last layer starts at a hundredth of its usual size with no bias, so that a layer that is the identity
    for parameters of zero starts close to it.

    Args:
        in_features: the width of ``x``; 0 reads the context alone.
        out_features: the width of the output.
        hidden_dims: the widths of the hidden layers; empty is an affine map.
        context_dim: the width of the context, 0 for none.
        activation: a name, a module class or a module.
        residual: add each hidden layer's input to its output; all hidden widths must then be equal.
        masks: which weights exist, one boolean ``[out, in]`` tensor a layer; default all.

    Attributes:
        columns: whether the rows of one output may lie side by side in memory, for a reader who works faster on these.

    Raises:
        OptionError: a width is not positive, or ``residual`` with unequal hidden widths.

    Example:
        >>> MLP(2, 6, hidden_dims=(8,), context_dim=3)(torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 6])
    """

    columns = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_dims: Sequence[int] = (128, 128),
        context_dim: int = 0,
        activation: Activation = "relu",
        residual: bool = False,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        hidden_dims = check_widths(hidden_dims)
        if residual and len(set(hidden_dims)) > 1:
            raise OptionError(f"residual=True needs equal hidden_dims, got {hidden_dims}.")
        self.in_features, self.out_features, self.context_dim = in_features, out_features, context_dim
        self.residual = residual
        self.activation = activation_module(activation)
        widths = (in_features, *hidden_dims, out_features)
        self.layers = nn.ModuleList(
            _Linear(
                widths[i],
                widths[i + 1],
                context_dim if i == 0 else 0,
                None if masks is None else masks[i],
            )
            for i in range(len(widths) - 1)
        )
        with torch.no_grad():
            for name, parameter in self.layers[-1].named_parameters():
                parameter.mul_(0.0 if name == "bias" else 0.01)

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        """The output ``[*batch, out_features]`` for ``x`` ``[*batch, in_features]`` and a broadcastable context.

        Raises:
            ShapeError: ``x`` or the context has another width than was declared, or is missing.
        """
        for name, tensor, width in (("x", x, self.in_features), ("context", context, self.context_dim)):
            if (0 if tensor is None else tensor.shape[-1]) != width:
                got = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ShapeError(f"expected {name} of width {width}, got {got}.")
        x, context = (None if value is None else within_reach(value) for value in (x, context))
        alike = context is None or (x is not None and x.dim() == 2 and context.shape[:-1] == x.shape[:-1])
        if x is not None and alike and self._rectifies():
            links = [layer.link() for layer in self.layers]  # type: ignore[operator]
            if context is not None:
                first = self.layers[0]
                links[0] = links[0]._replace(bias=linear(context, first.context_weight, first.bias))  # type: ignore[arg-type]
            return chain(x, links, self.columns)
        first, *others = self.layers
        hidden = first(x, context)
        for layer in others:
            new = layer(self.activation(hidden))
            hidden = hidden + new if self.residual and layer is not others[-1] else new
        return hidden

    def _rectifies(self) -> bool:
        """Whether the layers are affine maps with nothing but a relu between them."""
        bare = _unwatched(self.activation, nn.ReLU) and all(_unwatched(layer, _Linear) for layer in self.layers)
        return bare and not self.residual
