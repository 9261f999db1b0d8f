"""Layers on images: squeezes, wavelets, 1x1 convolutions, and any layer on vectors at every pixel.

A point is an image ``[C, H, W]``, with any number of batch dimensions before it.

Dinh, Sohl-Dickstein, Bengio (2016), *Density estimation using Real NVP*, arXiv:1605.08803; Kingma, Dhariwal
(2018), *Glow*, arXiv:1807.03039.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import Activation
from pyroflows.numerics import positive, sum_last
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.normalisation import ActNorm

__all__ = [
    "GeneralizedChannelPermute",
    "Haar",
    "ImageTransform",
    "InvertibleConv1x1",
    "Pixelwise",
    "Squeeze",
    "channel_actnorm",
    "conditional_generalized_channel_permute",
    "generalized_channel_permute",
    "image_shape",
    "invertible_conv1x1",
    "with_input_dims",
]

F = TypeVar("F", bound=Callable[..., Any])
Shape = int | Sequence[int]


def with_input_dims(*input_dims: int | tuple[int, ...]) -> Callable[[F], F]:
    """Names the sizes at which the laws build a registered factory that takes no number for ``input_dim``.

    Example:
        >>> @with_input_dims((1, 4, 4))
        ... def layer(input_dim, *, context_dim=0): ...
        >>> layer.input_dims
        ((1, 4, 4),)
    """

    def attach(factory: F) -> F:
        factory.input_dims = input_dims  # type: ignore[attr-defined]
        return factory

    return attach


def image_shape(input_dim: Shape) -> torch.Size:
    """The shape ``(C, H, W)`` of an image.

    Raises:
        OptionError: it is not three positive integers.

    Example:
        >>> image_shape((1, 8, 8))
        torch.Size([1, 8, 8])
    """
    shape = (input_dim,) if isinstance(input_dim, int) else tuple(input_dim)
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise OptionError(f"expected the shape (C, H, W) of an image as input_dim, got {input_dim!r}.")
    return torch.Size(shape)


class ImageTransform(FlowTransform):
    """A layer whose points are images ``[C, H, W]``: what the layers on images derive from."""

    domain = codomain = constraints.independent(constraints.real, 3)

    def check_image(self, value: Tensor, channels: int | None = None, shape: Sequence[int] | None = None) -> None:
        """Raises `ShapeError` unless the last dimensions are an image of that shape or number of channels."""
        expected = ["C" if channels is None else channels, "H", "W"] if shape is None else list(shape)
        found = list(value.shape[-3:])
        if len(found) < 3 or any(isinstance(e, int) and e != f for e, f in zip(expected, found, strict=True)):
            wanted = ", ".join(map(str, expected))
            raise ShapeError(f"{type(self).__name__} expected images [*batch, {wanted}], got {tuple(value.shape)}.")


class _Rearranged(ImageTransform):
    """Blocks of pixels become channels: what `Squeeze` and `Haar` share."""

    volume_preserving = True

    def __init__(self, input_dim: Shape, factor: int | tuple[int, int]) -> None:
        super().__init__()
        self.event_shape = image_shape(input_dim)
        sides = (factor, factor) if isinstance(factor, int) else tuple(factor)
        if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
            raise OptionError(f"factor must be a positive integer or a pair of them, got {factor!r}.")
        self.factor = sides
        channels, height, width = self.event_shape
        if height % sides[0] or width % sides[1]:
            raise OptionError(f"an image {height} x {width} cannot be cut into blocks of {sides[0]} x {sides[1]}.")
        self.output_shape = torch.Size((channels * sides[0] * sides[1], height // sides[0], width // sides[1]))

    def _blocks(self, image: Tensor) -> Tensor:
        """The pixels of each block side by side: ``[*batch, C, f * f, H / f, W / f]``."""
        self.check_image(image, shape=self.event_shape)
        blocks = image.unflatten(-1, (-1, self.factor[1])).unflatten(-3, (-1, self.factor[0]))
        return blocks.movedim((-3, -1), (-4, -3)).flatten(-4, -3)

    def _image(self, blocks: Tensor) -> Tensor:
        split = blocks.unflatten(-3, self.factor).movedim((-4, -3), (-3, -1))
        return split.flatten(-2).flatten(-3, -2)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """More channels, fewer pixels."""
        return torch.Size((*shape[:-3], *self.output_shape))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Fewer channels, more pixels."""
        return torch.Size((*shape[:-3], *self.event_shape))


@with_input_dims((2, 4, 4), (1, 4, 6))
class Squeeze(_Rearranged):
    r"""Space to depth: each block of :math:`f \times f` pixels becomes :math:`f^2` channels of one; log-det zero.

    Its ``.inv`` is depth to space. What came from one channel stays together, as in ``torch.nn.PixelUnshuffle``.

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        context_dim: accepted and ignored, as every registered layer accepts one.
        factor: the side :math:`f` of a block, or its height and width.

    Raises:
        OptionError: ``input_dim`` is no shape, or cannot be cut into such blocks.

    Example:
        >>> Squeeze((1, 2, 2))(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).flatten()
        tensor([1., 2., 3., 4.])
    """

    def __init__(self, input_dim: Shape, *, context_dim: int = 0, factor: int | tuple[int, int] = 2) -> None:
        super().__init__(input_dim, factor)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Blocks as channels, and zero."""
        y = self._blocks(x).flatten(-4, -3)
        return y, sum_last(x.new_zeros(x.shape[:-3]), 0)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Channels as blocks, and zero."""
        self.check_image(y, shape=self.output_shape)
        x = self._image(y.unflatten(-3, (self.event_shape[0], -1)))
        return x, sum_last(y.new_zeros(y.shape[:-3]), 0)


@with_input_dims((2, 4, 4), (1, 2, 6))
class Haar(_Rearranged):
    r"""The orthonormal 2-D Haar wavelets: a squeeze whose first channels are a picture of half the size.

    Of each block :math:`\begin{pmatrix} a & b \\ c & d \end{pmatrix}` the channels are half of :math:`a + b + c + d`,
    :math:`a - b + c - d`, :math:`a + b - c - d` and :math:`a - b - c + d`; first the first of all channels, then the
    second, and so on. Log-det zero.

    Args:
        input_dim: the shape ``(C, H, W)`` of an image, ``H`` and ``W`` even.
        context_dim: accepted and ignored, as every registered layer accepts one.

    Raises:
        OptionError: ``input_dim`` is no shape, or a side is odd.

    Example:
        >>> Haar((1, 2, 2))(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).flatten()
        tensor([ 5., -1., -2.,  0.])
    """

    def __init__(self, input_dim: Shape, *, context_dim: int = 0) -> None:
        super().__init__(input_dim, 2)

    @staticmethod
    def _waves(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
        # Halved first, so that nothing overflows that need not. The matrix is its own inverse.
        a, b, c, d = a / 2, b / 2, c / 2, d / 2
        return [(a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d)]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The wavelets' coefficients, and zero."""
        y = torch.cat(self._waves(*self._blocks(x).unbind(-3)), -3)
        return y, sum_last(x.new_zeros(x.shape[:-3]), 0)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image with these coefficients, and zero."""
        self.check_image(y, shape=self.output_shape)
        x = self._image(torch.stack(self._waves(*y.chunk(4, -3)), -3))
        return x, sum_last(y.new_zeros(y.shape[:-3]), 0)


class Pixelwise(ImageTransform):
    r"""A layer on vectors of channels, the same at every pixel: :math:`y_{:,h,w} = f(x_{:,h,w}; c)`.

    Images may have any height and width.

    Args:
        transform: a layer on vectors with as many coordinates as the images have channels.

    Raises:
        OptionError: the layer's points are not vectors.

    Example:
        >>> from pyroflows.transforms import LULinear
        >>> Pixelwise(LULinear(3)).forward_and_log_det(torch.zeros(5, 3, 8, 8))[1].shape
        torch.Size([5])
    """

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.context_dim)
        if transform.domain.event_dim != 1 or transform.codomain.event_dim != 1:
            raise OptionError(f"Pixelwise needs a layer on vectors, got {type(transform).__name__}.")
        self.transform = transform
        self._claim_as(transform)

    def _pixels(self, image: Tensor) -> Tensor:
        self.check_image(image)
        return image.movedim(-3, -1)

    def _context(self, context: Tensor | None) -> Tensor | None:
        self.check_context(context)
        return context[..., None, None, :] if self.context_dim and context is not None else None

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer at every pixel, the log-dets added."""
        y, log_det = self.transform.forward_and_log_det(self._pixels(x), self._context(context))
        return y.movedim(-1, -3), sum_last(log_det, 2)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's inverse at every pixel, the log-dets added."""
        x, log_det = self.transform.inverse_and_log_det(self._pixels(y), self._context(context))
        return x.movedim(-1, -3), sum_last(log_det, 2)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initializes the layer with all pixels."""
        self.transform.initialize(self._pixels(y), self._context(context))


@with_input_dims((2, 4, 4), (1, 4, 4))
def channel_actnorm(input_dim: Shape, *, context_dim: int = 0, **options: Any) -> Pixelwise:
    """A learned shift and scale of each channel that can start from data: `Pixelwise` of `ActNorm`.

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        context_dim: the width of the context.
        **options: of `ActNorm`.

    Raises:
        OptionError: ``input_dim`` is no shape.

    Example:
        >>> layer = channel_actnorm((1, 2, 2))
        >>> layer.initialize(torch.tensor([[[[3.0, 5.0], [5.0, 7.0]]]]))
        >>> layer.inv(torch.full((1, 2, 2), 5.0)).flatten().detach()
        tensor([0., 0., 0., 0.])
    """
    return Pixelwise(ActNorm(image_shape(input_dim)[0], context_dim=context_dim, **options))


def _at_every_pixel(matrix: Tensor, image: Tensor) -> Tensor:
    """The product of ``[*batch, C, C]`` with every pixel of ``[*batch, C, H, W]``."""
    batch = torch.broadcast_shapes(matrix.shape[:-2], image.shape[:-3])
    matrices, pixels = (
        t.expand(*batch, -1, -1).flatten(0, -3) if batch else t[None] for t in (matrix, image.flatten(-2))
    )
    # Not matmul, which rounds otherwise where a gradient is wanted.
    return torch.bmm(matrices, pixels).reshape(*batch, *image.shape[-3:])


class InvertibleConv1x1(ImageTransform):
    r"""An invertible 1x1 convolution, :math:`y_{:,h,w} = P L U x_{:,h,w}`; log-det :math:`H W \sum_i \log|u_{ii}|`.

    :math:`P` is a fixed permutation, :math:`L` unit lower and :math:`U` upper triangular, the signs of whose diagonal
    are fixed. Images may have any height and width. Pyro's name is `GeneralizedChannelPermute`.

    Args:
        channels: the number of channels.
        permutation: the rows of :math:`P`, from which the layer starts; default those of a random rotation.
        context_dim: the width of the context; with one, a network gives :math:`L` and :math:`U`.
        hidden_dims: the hidden widths of that network.
        activation: its activation.

    Raises:
        OptionError: ``permutation`` is none of ``0 .. channels - 1``.

    Example:
        >>> layer = InvertibleConv1x1(2, permutation=[1, 0])
        >>> layer(torch.tensor([1.0, 2.0]).reshape(2, 1, 1)).flatten().detach().round(decimals=5)
        tensor([2., 1.])
    """

    permutation: Tensor
    back: Tensor
    start: Tensor

    def __init__(
        self,
        channels: int = 3,
        permutation: Sequence[int] | Tensor | None = None,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        if not isinstance(channels, int) or channels < 1:
            raise OptionError(f"channels must be a positive integer, got {channels!r}.")
        self.channels = channels
        lower = upper = torch.eye(channels)
        if permutation is None:
            rows, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
            order = rows.argmax(-1)
        else:
            order = torch.as_tensor(permutation, dtype=torch.long).clone()
            if sorted(order.tolist()) != list(range(channels)):
                raise OptionError(f"expected a permutation of 0 .. {channels - 1}, got {order.tolist()}.")
        self.register_buffer("permutation", order)
        self.register_buffer("back", torch.argsort(order))
        self.register_buffer("start", upper.diagonal().clone())
        self.declare_parameters(
            hidden_dims=hidden_dims,
            activation=activation,
            lower=lower.tril(-1) * math.sqrt(channels),
            upper=upper.triu(1) * math.sqrt(channels),
            diagonal=torch.zeros(channels),
        )

    def _factors(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``L``, ``U`` and the log-det."""
        self.check_image(value, self.channels)
        raw, size = self.parameters_of(context), math.sqrt(self.channels)
        scale = positive(raw["diagonal"])
        lower = raw["lower"].tril(-1) / size + torch.eye(self.channels, dtype=scale.dtype, device=scale.device)
        upper = raw["upper"].triu(1) / size + torch.diag_embed(self.start * scale)
        log_det = sum_last(torch.log(scale) + torch.log(self.start.abs()))
        return lower, upper, log_det * value.shape[-2:].numel()

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``P L U x`` at every pixel."""
        lower, upper, log_det = self._factors(x, context)
        matrix = (lower @ upper).index_select(-2, self.permutation)
        y = _at_every_pixel(matrix, x)
        return y, log_det.expand(y.shape[:-3])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The product with the inverse matrix, of two triangular solves."""
        lower, upper, log_det = self._factors(y, context)
        dtype = torch.promote_types(y.dtype, torch.float32)  # there is no solve in half precision
        rows = torch.eye(self.channels, dtype=dtype, device=y.device).index_select(-2, self.back)
        matrix = torch.linalg.solve_triangular(lower.to(dtype), rows, upper=False, unitriangular=True)
        matrix = torch.linalg.solve_triangular(upper.to(dtype), matrix, upper=True).to(y.dtype)
        x = _at_every_pixel(matrix, y)
        return x, -log_det.expand(x.shape[:-3])


GeneralizedChannelPermute = InvertibleConv1x1


@with_input_dims((2, 4, 4), (3, 2, 2))
def invertible_conv1x1(input_dim: Shape, *, context_dim: int = 0, **options: Any) -> InvertibleConv1x1:
    """`InvertibleConv1x1` of as many channels as the images have.

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        context_dim: the width of the context.
        **options: of `InvertibleConv1x1`.

    Raises:
        OptionError: ``input_dim`` is no shape.

    Example:
        >>> invertible_conv1x1((2, 4, 4))(torch.ones(5, 2, 4, 4)).shape
        torch.Size([5, 2, 4, 4])
    """
    return InvertibleConv1x1(image_shape(input_dim)[0], context_dim=context_dim, **options)


def generalized_channel_permute(channels: int = 3, **options: Any) -> InvertibleConv1x1:
    """`InvertibleConv1x1`, by Pyro's name.

    Example:
        >>> generalized_channel_permute(channels=3)(torch.ones(3, 16, 16)).shape
        torch.Size([3, 16, 16])
    """
    return InvertibleConv1x1(channels, **options)


def conditional_generalized_channel_permute(
    context_dim: int, channels: int = 3, hidden_dims: Sequence[int] | None = None, **options: Any
) -> InvertibleConv1x1:
    """`generalized_channel_permute` with a context; two hidden layers of ``10 channels`` by default.

    Example:
        >>> layer = conditional_generalized_channel_permute(context_dim=2, channels=3)
        >>> layer.condition(torch.ones(5, 2))(torch.ones(3, 4, 4)).shape
        torch.Size([5, 3, 4, 4])
    """
    hidden_dims = [10 * channels] * 2 if hidden_dims is None else hidden_dims
    return InvertibleConv1x1(channels, context_dim=context_dim, hidden_dims=hidden_dims, **options)
