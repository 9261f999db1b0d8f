"""Flows of images by name.

Kingma, Dhariwal (2018), *Glow*, arXiv:1807.03039; Dinh, Sohl-Dickstein, Bengio (2016), *Density estimation using
Real NVP*, arXiv:1605.08803; Ho et al. (2019), *Flow++*, arXiv:1902.00275.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch.distributions import constraints

from pyroflows.distributions.base import Base
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.support import Support
from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.transforms import (
    Affine,
    Compose,
    FlowTransform,
    ImageCoupling,
    InvertibleConv1x1,
    UnivariateMap,
    channel_actnorm,
    image_shape,
    largest_levels,
    multi_scale,
    univariate_map,
    with_input_dims,
    with_variants,
)

__all__ = ["dequantizer", "glow", "realnvp_image"]

Shape = int | Sequence[int]


def _standard_normal_image(shape: torch.Size) -> Base:
    return Base(dist.Normal, 3, loc=torch.zeros(shape), scale=torch.ones(shape))


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} must be a positive integer, got {number!r}.")


def _coupling_map(map: str | UnivariateMap, options: dict[str, Any]) -> UnivariateMap:
    """The map by name; an affine one scales by at most e, so that dozens of couplings stay well conditioned."""
    return univariate_map(map, **({"max_log_scale": 1.0, **options} if map == "affine" else options))


@with_input_dims((1, 4, 4))
@with_variants({"levels": 2, "steps": 1, "map": "rational_spline", "squeeze": "haar"})
def glow(
    input_dim: Shape,
    *,
    context_dim: int = 0,
    levels: int | None = None,
    steps: int = 3,
    map: str | UnivariateMap = "affine",
    hidden_channels: int = 64,
    kernel_sizes: Sequence[int] = (3, 1, 3),
    squeeze: Literal["space", "haar"] = "space",
    activation: Activation = "relu",
    support: Support | None = None,
    **options: Any,
) -> Flow:
    """Glow: at several scales, steps of a normalisation, a 1x1 convolution and a coupling (arXiv:1807.03039).

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        context_dim: the width of the context, which steers the couplings.
        levels: how often the image is halved; default as often as it can be, at most three times.
        steps: the number of steps of a scale.
        map: the univariate map of the couplings, by name; an affine one scales by at most e unless told otherwise.
        hidden_channels: the channels of each coupling's network.
        kernel_sizes: the widths of its kernels.
        squeeze: how a scale makes channels of pixels, ``"space"`` or ``"haar"``.
        activation: the activation of the networks.
        support: where the data live; `logit_interval` for pixels divided by their number of levels.
        **options: of the map.

    Raises:
        OptionError: ``input_dim`` is no shape, or an option has a value that it cannot take.

    Example:
        >>> glow((1, 8, 8))().sample((4,)).shape
        torch.Size([4, 1, 8, 8])
    """
    shape = image_shape(input_dim)
    _positive(steps=steps)
    g = _coupling_map(map, options)

    def step(shape: torch.Size, i: int) -> list[FlowTransform]:
        coupling = ImageCoupling(
            g,
            shape,
            context_dim=context_dim,
            flip=i % 2 == 1,
            hidden_channels=hidden_channels,
            kernel_sizes=kernel_sizes,
            activation=activation,
        )
        return [coupling, InvertibleConv1x1(shape[0]).inv, channel_actnorm(shape)]  # its inverse scores by a product

    transform = multi_scale(
        shape,
        lambda shape: [layer for i in range(steps) for layer in step(shape, i)],
        levels=largest_levels(shape) if levels is None else levels,
        squeeze=squeeze,
    )
    return Flow(transform, _standard_normal_image(shape), support=support)


@with_input_dims((1, 2, 4))
def realnvp_image(
    input_dim: Shape,
    *,
    context_dim: int = 0,
    levels: int | None = None,
    steps: int = 2,
    map: str | UnivariateMap = "affine",
    hidden_channels: int = 64,
    kernel_sizes: Sequence[int] = (3, 3, 3),
    activation: Activation = "relu",
    support: Support | None = None,
    **options: Any,
) -> Flow:
    """Real NVP: couplings of checkerboards, a squeeze, couplings of channels, at several scales (arXiv:1605.08803).

    The couplings of a kind are followed by a normalisation that starts from data, in place of the paper's batch
    normalisation.

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        context_dim: the width of the context, which steers the couplings.
        levels: how often the image is halved; default as often as it can be, at most three times.
        steps: the number of couplings of each kind at a scale.
        map: the univariate map of the couplings, by name; an affine one scales by at most e unless told otherwise.
        hidden_channels: the channels of each coupling's residual network.
        kernel_sizes: the widths of its kernels.
        activation: the activation of the networks.
        support: where the data live; `logit_interval` for pixels divided by their number of levels.
        **options: of the map.

    Raises:
        OptionError: ``input_dim`` is no shape, or an option has a value that it cannot take.

    Example:
        >>> realnvp_image((1, 8, 8))().log_prob(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4])
    """
    shape = image_shape(input_dim)
    _positive(steps=steps)
    g = _coupling_map(map, options)

    def couplings(shape: torch.Size, mask: Literal["split", "checkerboard"] | None) -> list[FlowTransform]:
        layers: list[FlowTransform] = []
        for i in range(steps):
            coupling = ImageCoupling(
                g,
                shape,
                context_dim=context_dim,
                mask=mask,
                flip=i % 2 == 1,
                hidden_channels=hidden_channels,
                kernel_sizes=kernel_sizes,
                activation=activation,
                residual=True,
            )
            layers.append(coupling)
        return [*layers, channel_actnorm(shape)]

    transform = multi_scale(
        shape,
        lambda shape: couplings(shape, None),
        levels=largest_levels(shape) if levels is None else levels,
        before=lambda shape: couplings(shape, "checkerboard"),
    )
    return Flow(transform, _standard_normal_image(shape), support=support)


def dequantizer(
    input_dim: Shape,
    *,
    transforms: int = 4,
    hidden_channels: int = 32,
    kernel_sizes: Sequence[int] = (3, 1, 3),
    activation: Activation = "relu",
) -> Flow:
    """Learned noise for `Dequantized`: a flow on the unit interval for each pixel, given the image (arXiv:1902.00275).

    Args:
        input_dim: the shape ``(C, H, W)`` of an image.
        transforms: the number of couplings, on checkerboards that take turns.
        hidden_channels: the channels of each coupling's network, which reads the image too.
        kernel_sizes: the widths of its kernels.
        activation: its activation.

    Raises:
        OptionError: ``input_dim`` is no shape, or an option has a value that it cannot take.

    Example:
        >>> dequantizer((1, 4, 4))(torch.zeros(5, 16)).sample().shape
        torch.Size([5, 1, 4, 4])
    """
    shape = image_shape(input_dim)
    _positive(transforms=transforms)
    layers = [
        ImageCoupling(
            Affine(),
            shape,
            context_dim=shape.numel(),
            mask="checkerboard",
            flip=i % 2 == 1,
            hidden_channels=hidden_channels,
            kernel_sizes=kernel_sizes,
            activation=activation,
            image_context=True,
        )
        for i in range(transforms)
    ]
    return Flow(Compose(layers), _standard_normal_image(shape), support=constraints.unit_interval)
