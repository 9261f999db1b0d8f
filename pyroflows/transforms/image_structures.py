"""Couplings of images by convolutional networks, and flows of images at several scales.

Dinh, Sohl-Dickstein, Bengio (2016), *Density estimation using Real NVP*, arXiv:1605.08803; Kingma, Dhariwal
(2018), *Glow*, arXiv:1807.03039.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets import CNN, Activation
from pyroflows.numerics import sum_last
from pyroflows.transforms.base import FlowTransform, with_variants
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.images import Haar, ImageTransform, Shape, Squeeze, image_shape, with_input_dims
from pyroflows.transforms.maps import UnivariateMap
from pyroflows.transforms.products import univariate_map

__all__ = ["FactorOut", "ImageCoupling", "image_coupling", "largest_levels", "multi_scale"]


class ImageCoupling(ImageTransform):
    r"""Some numbers of an image steer the others, :math:`y_a = x_a`, :math:`y_b = g(x_b; \theta(x_a, c))`, by a `CNN`.

    Both directions are one pass of the network.

    Args:
        map: the univariate map :math:`g`.
        input_dim: the shape ``(C, H, W)`` of an image.
        context_dim: the width of the context.
        mask: what steers: ``"split"``, the first half of the channels, or ``"checkerboard"``, every other pixel.
            Default ``"split"`` if there are two channels.
        flip: whether those that would be moved steer instead.
        hidden_channels: the channels of the network.
        kernel_sizes: the widths of its kernels.
        activation: its activation.
        residual: whether its hidden layers have skip connections.
        image_context: whether the context is an image of the same height and width, flattened: the network then
            reads it as further channels.

    Raises:
        OptionError: an option has a value that it cannot take, or one channel is to be split.

    Example:
        >>> from pyroflows.transforms import Affine
        >>> ImageCoupling(Affine(), (2, 4, 4)).forward_and_log_det(torch.zeros(5, 2, 4, 4))[1].shape
        torch.Size([5])
    """

    sign = 1
    steers: Tensor  # of a checkerboard: which pixels steer, [H, W]

    def __init__(
        self,
        map: UnivariateMap,
        input_dim: Shape,
        *,
        context_dim: int = 0,
        mask: Literal["split", "checkerboard"] | None = None,
        flip: bool = False,
        hidden_channels: int = 64,
        kernel_sizes: Sequence[int] = (3, 1, 3),
        activation: Activation = "relu",
        residual: bool = False,
        image_context: bool = False,
    ) -> None:
        super().__init__(context_dim)
        self.map, self.event_shape, self.flip = map, image_shape(input_dim), flip
        self.inverse, self.vmaps, self.compiles = map.inverse, map.vmaps, map.compiles
        self.sequential = False, map.inverse == "numeric"
        channels, height, width = self.event_shape
        self.mask = mask or ("split" if channels > 1 else "checkerboard")
        if self.mask not in ("split", "checkerboard"):
            raise OptionError(f'mask must be "split" or "checkerboard", got {mask!r}.')
        if self.mask == "split" and channels < 2:
            raise OptionError('one channel cannot be split; use mask="checkerboard".')
        if image_context and (context_dim == 0 or context_dim % (height * width)):
            raise OptionError(f"a context that is an image {height} x {width} cannot have {context_dim} numbers.")
        if self.mask == "split":
            self.sizes = [channels // 2, channels - channels // 2]
            inputs, outputs = reversed(self.sizes) if flip else self.sizes
        else:
            pixel = torch.arange(height)[:, None] + torch.arange(width)
            self.register_buffer("steers", ((pixel + flip) % 2 == 0) & (height * width > 1))  # a lone one is moved
            inputs = outputs = channels
        self.net = CNN(
            inputs,
            outputs * map.params,
            hidden_channels=hidden_channels,
            kernel_sizes=kernel_sizes,
            context_dim=context_dim,
            context_channels=context_dim // (height * width) if image_context else 0,
            activation=activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        """The map and the sizes."""
        return f"{type(self.map).__name__}, {tuple(self.event_shape)}, mask={self.mask!r}, flip={self.flip}"

    def _params(self, kept: Tensor, context: Tensor | None) -> Tensor:
        params = self.net(kept, context if self.context_dim else None).to(kept.dtype)  # autocast has another
        return params.unflatten(-3, (self.map.params, -1)).movedim(-4, -1)

    def _apply_map(self, value: Tensor, context: Tensor | None, direction: Any) -> tuple[Tensor, Tensor]:
        self.check_image(value, shape=self.event_shape)
        self.check_context(context)
        if self.mask == "checkerboard":
            params = self._params(torch.where(self.steers, value, 0), context)
            # What steers is kept out of the map, whose slope there may be beyond the dtype's range.
            result, log_slope = direction(torch.where(self.steers, 0, value), params)
            return torch.where(self.steers, value, result), sum_last(torch.where(self.steers, 0, log_slope), 3)
        first, second = value.split(self.sizes, -3)
        kept, moved = (second, first) if self.flip else (first, second)
        result, log_slope = direction(moved, self._params(kept, context))
        kept = kept.expand(*result.shape[:-3], *kept.shape[-3:])  # a context may have more batch dimensions
        return torch.cat([result, kept] if self.flip else [kept, result], -3), sum_last(log_slope, 3)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map of the numbers that are moved."""
        return self._apply_map(x, context, self.map.forward)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse map of the numbers that are moved."""
        return self._apply_map(y, context, self.map.backward)


_NETWORK = ("mask", "flip", "hidden_channels", "kernel_sizes", "activation", "residual", "image_context")


@with_input_dims((2, 2, 4), (1, 3, 2))
@with_variants(
    {"map": "rational_spline", "mask": "checkerboard", "flip": True, "residual": True, "hidden_channels": 16}
)
def image_coupling(
    input_dim: Shape, map: str | UnivariateMap = "affine", *, context_dim: int = 0, **options: Any
) -> ImageCoupling:
    """Some numbers of an image steer the univariate maps of the others: `ImageCoupling` with any map of `MAPS`.

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        map: the map's name, or a map.
        context_dim: the width of the context.
        **options: of `ImageCoupling` and of the map.

    Raises:
        OptionError: there is no such map, or it has no such option, or ``input_dim`` is no shape.

    Example:
        >>> image_coupling((1, 4, 4), "rational_spline", bins=4)(torch.zeros(5, 1, 4, 4)).shape
        torch.Size([5, 1, 4, 4])
    """
    network = {name: options.pop(name) for name in _NETWORK if name in options}
    return ImageCoupling(univariate_map(map, **options), input_dim, context_dim=context_dim, **network)


class FactorOut(ImageTransform):
    r"""Some channels go on through another layer, the others are done: :math:`y_a = f(x_a; c)`, :math:`y_b = x_b`.

    The factoring out of Dinh et al.: with deeper scales as :math:`f`, the last channels are latents of this scale.

    Args:
        transform: the layer :math:`f` on images, whose results have the shape of its arguments.
        channels: how many of the first channels go on.

    Raises:
        OptionError: the layer's points are no images, or ``channels`` is not positive.

    Example:
        >>> layer = FactorOut(image_coupling((2, 4, 4)), channels=2)
        >>> layer(torch.zeros(5, 3, 4, 4)).shape
        torch.Size([5, 3, 4, 4])
    """

    def __init__(self, transform: FlowTransform, channels: int) -> None:
        super().__init__(transform.context_dim)
        if transform.domain.event_dim != 3 or not isinstance(channels, int) or channels < 1:
            raise OptionError(f"expected a layer on images and a number of channels, got {channels!r}.")
        self.transform, self.channels = transform, channels
        self._claim_as(transform)

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant."""
        return self.transform.sign

    def _apply_layer(self, image: Tensor, context: Tensor | None, direction: Any) -> tuple[Tensor, Tensor]:
        self.check_image(image)
        moved, kept = image[..., : self.channels, :, :], image[..., self.channels :, :, :]
        result, log_det = direction(moved, context)
        kept = kept.expand(*result.shape[:-3], *kept.shape[-3:])  # a context may have more batch dimensions
        return torch.cat([result, kept], -3), log_det

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer on the first channels."""
        return self._apply_layer(x, context, self.transform.forward_and_log_det)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's inverse on the first channels."""
        return self._apply_layer(y, context, self.transform.inverse_and_log_det)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initializes the layer with the first channels."""
        self.check_image(y)
        self.transform.initialize(y[..., : self.channels, :, :], context)


def largest_levels(input_dim: Shape) -> int:
    """How often an image can be halved, at most three times, with two pixels a side left unless it has no more.

    Example:
        >>> [largest_levels((1, side, side)) for side in (2, 7, 8, 28, 32)]
        [1, 0, 2, 2, 3]
    """
    _, height, width = image_shape(input_dim)
    levels = 0
    while levels < 3 and height % 2 == 0 and width % 2 == 0 and (levels == 0 or min(height, width) > 2):
        height, width, levels = height // 2, width // 2, levels + 1
    return levels


def multi_scale(
    input_dim: Shape,
    steps: Callable[[torch.Size], Sequence[FlowTransform]],
    *,
    levels: int,
    before: Callable[[torch.Size], Sequence[FlowTransform]] = lambda shape: (),
    squeeze: Literal["space", "haar"] = "space",
) -> Compose:
    r"""A transform of images at several scales, each with half as many channels that go on (arXiv:1605.08803).

    From image to latent, a scale squeezes, takes its steps, hands the first half of the channels to the next one and is
    done with the others. All latents keep their place in the image, so both sides have the shape
    ``[C, H, W]`` and the base may be a standard normal of that shape.

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        steps: from a shape to the layers of a scale, from latent to image.
        levels: how many scales; with 0 the steps are taken without a squeeze.
        before: likewise, the layers before the squeeze of each scale.
        squeeze: ``"space"`` (`Squeeze`) or ``"haar"`` (`Haar`, whose averages come first).

    Raises:
        OptionError: an image of this shape cannot be halved so often, or there is no such squeeze.

    Example:
        >>> glow_like = multi_scale((1, 8, 8), lambda shape: [image_coupling(shape)], levels=2)
        >>> glow_like(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """
    shape = image_shape(input_dim)
    if not isinstance(levels, int) or levels < 0 or squeeze not in ("space", "haar"):
        raise OptionError(f'expected levels >= 0 and squeeze "space" or "haar", got {levels!r} and {squeeze!r}.')
    if levels == 0:
        return Compose([*steps(shape), *before(shape)])
    halve: Callable[[torch.Size], FlowTransform] = Squeeze if squeeze == "space" else Haar
    layers = [halve(shape)]
    channels, height, width = halved = layers[0].forward_shape(shape)
    if levels > 1:
        half = (channels // 2, height, width)
        deeper = multi_scale(half, steps, levels=levels - 1, before=before, squeeze=squeeze)
        layers.append(FactorOut(deeper, channels // 2))
    return Compose([*layers, *steps(halved), halve(shape).inv, *before(shape)])
