"""A convolutional network on images of any size that may read a context, as numbers or as an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets.mlp import Activation, activation_module, within_reach

__all__ = ["CNN"]


class CNN(nn.Module):
    r"""Convolutions in turn with an activation in between; the images keep their height and width.

    A context is added to the hidden channels of every pixel: :math:`h_k = W_k * \phi(h_{k-1}) + b_k + C_k c`. A
    context that is an image itself, flattened, is read as further input channels.

    An input beyond 1e8 counts as 1e8, so that the output stays finite for every finite input. The last convolution
    starts at a hundredth of its usual size with no bias, so that a layer that is the identity for parameters of
    zero starts close to it.

    Args:
        in_channels: the channels of the input.
        out_channels: the channels of the output.
        hidden_channels: the channels in between.
        kernel_sizes: the odd width of each convolution's square kernel; two convolutions at least.
        context_dim: the width of the context, 0 for none.
        context_channels: if the context is an image of the input's height and width, its number of channels.
        activation: a name, a module class or a module.
        residual: add the input of each convolution between the first and the last to its output.

    Raises:
        OptionError: a number is not positive, a kernel is even, or there are fewer than two.

    Example:
        >>> CNN(1, 6, context_dim=3)(torch.zeros(5, 1, 8, 8), torch.zeros(5, 3)).shape
        torch.Size([5, 6, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 64,
        kernel_sizes: Sequence[int] = (3, 1, 3),
        context_dim: int = 0,
        context_channels: int = 0,
        activation: Activation = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        for name, number in (("in_channels", in_channels), ("hidden_channels", hidden_channels)):
            if not isinstance(number, int) or number < 1:
                raise OptionError(f"{name} must be a positive integer, got {number!r}.")
        if isinstance(kernel_sizes, int) or len(kernel_sizes) < 2 or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise OptionError(f"kernel_sizes must be at least two odd numbers, such as (3, 1, 3), got {kernel_sizes}.")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_dim, self.context_channels, self.residual = context_dim, context_channels, residual
        self.activation = activation_module(activation)
        hidden = [hidden_channels] * (len(kernel_sizes) - 1)
        widths = [in_channels + context_channels, *hidden, out_channels]
        self.layers = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], size, padding=size // 2) for i, size in enumerate(kernel_sizes)
        )
        steered = context_dim and not context_channels
        self.context_layer = nn.Linear(context_dim, sum(hidden), bias=False) if steered else None
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.01)  # type: ignore[operator]
            self.layers[-1].bias.zero_()  # type: ignore[operator]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output ``[*batch, out_channels, H, W]``.

        Args:
            x: ``[*batch, in_channels, H, W]``.
            context: ``[*batch, context_dim]``, broadcastable with the batch of ``x``.

        Raises:
            ShapeError: ``x`` or the context has another shape than was declared, or is missing.
        """
        if x.dim() < 3 or x.shape[-3] != self.in_channels:
            raise ShapeError(f"expected images [*batch, {self.in_channels}, H, W], got shape {tuple(x.shape)}.")
        image = x.shape[-2:]
        width = self.context_channels * image.numel() or self.context_dim
        if (0 if context is None else context.shape[-1]) != width:
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ShapeError(f"expected a context of width {width}, got {got}.")
        batch = x.shape[:-3]
        steer: Sequence[Tensor] = ()
        hidden = within_reach(x)
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
            context = within_reach(context)
            hidden = hidden.expand(*batch, *x.shape[-3:])
            if self.context_layer is None:
                channels = context.unflatten(-1, (self.context_channels, *image)).expand(*batch, -1, -1, -1)
                hidden = torch.cat([hidden, channels], -3)
            else:
                added = self.context_layer(context).expand(*batch, -1)
                steer = added.reshape(-1, added.shape[-1], 1, 1).chunk(len(self.layers) - 1, -3)
        # A convolution takes one batch dimension. Flattened in between, so that an image of one pixel has the strides
        # of an image: under vmap the convolution's derivative takes no others.
        hidden = hidden.flatten(-3).reshape(-1, *hidden.shape[-3:])
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            out = layer(self.activation(hidden) if number else hidden)
            if steer and number < last:
                out = out + steer[number]
            hidden = hidden + out if self.residual and 0 < number < last else out
        return hidden.reshape(*batch, *hidden.shape[-3:])
