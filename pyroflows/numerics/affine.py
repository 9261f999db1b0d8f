r"""The affine map with a bounded log-scale, :math:`y = e^{b \tanh(r / b)} x + t`, and its inverse.

It is the map of affine autoregressive and coupling layers (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803). Its
networks are small, so what counts is how many operations there are: first derivatives are written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroflows.numerics.derivatives import gradients_with_graph
from pyroflows.numerics.modes import is_differentiated, is_plainly_eager
from pyroflows.numerics.scales import bounded_log_scale

__all__ = ["bounded_affine"]


def bounded_affine(value: Tensor, params: Tensor, bound: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Scaled and shifted, or shifted back and unscaled, and the log-slope of that.

    Args:
        value: ``[...]``.
        params: shifts and raw log-scales ``[..., 2]``, any real numbers.
        bound: the largest absolute log-scale.
        inverse: the other direction.

    Returns:
        The image and the log-slope, ``[...]`` each.

    Example:
        >>> y, _ = bounded_affine(torch.tensor([2.0]), torch.tensor([[1.0, 0.0]]), 3.0)
        >>> y, bounded_affine(y, torch.tensor([[1.0, 0.0]]), 3.0, inverse=True)[0]
        (tensor([3.]), tensor([2.]))
    """
    if is_plainly_eager() and params.shape[:-1] == value.shape and params.dtype == value.dtype:
        return _BoundedAffine.apply(value, params, bound, inverse)
    return _plainly(value, params, bound, inverse=inverse)


def _plainly(value: Tensor, params: Tensor, bound: float, *, inverse: bool) -> tuple[Tensor, Tensor]:
    shift, raw = params.unbind(-1)
    log_scale = bounded_log_scale(raw, bound)
    log_slope = -log_scale if inverse else log_scale
    slope = torch.exp(log_slope)
    image = (value - shift) * slope if inverse else value * slope + shift
    return image, log_slope.expand_as(image)


class _BoundedAffine(torch.autograd.Function):
    """`bounded_affine` of a pair of parameters for each number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        log_slope = torch.div(raw, bound).tanh_().mul_(-bound if inverse else bound)
        slope = torch.exp(log_slope)
        image = torch.sub(value, shift).mul_(slope) if inverse else torch.mul(value, slope).add_(shift)
        ctx.bound, ctx.inverse = bound, inverse
        ctx.save_for_backward(value, params, slope, log_slope, image)
        return image, log_slope

    @staticmethod
    def backward(ctx: Any, by_image: Tensor, by_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        value, params, slope, log_slope, image = ctx.saved_tensors
        if is_differentiated(by_image, by_log_slope):

            def plainly(value: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
                return _plainly(value, params, ctx.bound, inverse=ctx.inverse)

            needed, outer = ctx.needs_input_grad[:2], (by_image, by_log_slope)
            return *gradients_with_graph(plainly, (value, params), needed, outer), None, None
        by_value = by_image * slope
        by_params = torch.empty_like(params)
        to_shift, to_raw = by_params.unbind(-1)
        if ctx.inverse:
            torch.neg(by_value, out=to_shift)
            by_log_scale = torch.addcmul(by_log_slope, by_image, image).neg_()
        else:
            to_shift.copy_(by_image)
            by_log_scale = torch.addcmul(by_log_slope, by_value, value)
        tanh = log_slope / ctx.bound  # or minus that
        torch.addcmul(by_log_scale, by_log_scale, tanh.square_(), value=-1, out=to_raw)
        return by_value, by_params, None, None
