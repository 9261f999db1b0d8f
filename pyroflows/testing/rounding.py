r"""How far rounding alone can carry the results of a map, from the float64 Jacobian of the very same map.

A layer is expected to compute each direction as well as a careful program can: as if its argument and its result
had each been off by one relative rounding :math:`u`. In first order such errors travel along a chain of layers
:math:`z_k = f_k(z_{k-1})` by products of Jacobians :math:`J_k`. With :math:`s_k = 1 + |z_k|`,

.. math::
    w_k = s_k + |J_k| s_{k-1}, \qquad v_{k-1} = s_{k-1} + |J_k^{-1}| s_k

are the errors that layer :math:`k` adds going forth and coming back, in units of :math:`u`; what reaches an end
is the sum over :math:`k` of :math:`|J_n \cdots J_{k+1}|` or :math:`|J_1^{-1} \cdots J_k^{-1}|` times these, and a
log-det is off by its gradient times them. No matrix of absolute values is multiplied with another, so a chain
that undoes itself is not charged twice.

The first order knows only the slope at the point. Where that changes within the rounding error itself, as at the
edge of a nearly flat bin, `widen` adds what happens when every intermediate result, and the context, is disturbed by as
much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyroflows.transforms import Compose, Conditioned, FlowTransform, Inverse

__all__ = ["Rounding", "links", "measure", "widen"]


@dataclass
class Rounding:
    """A batch of points of a map in float64, and the amplification of rounding there, ``[n]`` each.

    Attributes:
        x: the points ``[n, *event]``.
        y: their images ``[n, *event]``.
        log_det: ``log|det dy/dx|`` as the layer says.
        true_log_det: ``slogdet`` of the autograd Jacobian.
        of_image: of ``y``.
        of_return: of ``x``, found again from ``y``.
        of_log_det: of the log-det.
        of_return_log_det: of the log-det of the way back.
        of_true_log_det: of ``true_log_det`` itself, computed in float64.
    """

    x: Tensor
    y: Tensor
    log_det: Tensor
    true_log_det: Tensor
    of_image: Tensor
    of_return: Tensor
    of_log_det: Tensor
    of_return_log_det: Tensor
    of_true_log_det: Tensor


def links(transform: FlowTransform) -> list[FlowTransform]:
    """The layers that a composition, its inverse or its conditioned form applies in turn."""
    if isinstance(transform, Compose):
        return [link for part in transform for link in links(part)]
    if isinstance(transform, Inverse):
        return [link.inv for link in reversed(links(transform.transform))]
    if isinstance(transform, Conditioned):
        return [link.condition(transform.context) for link in links(transform.transform)]
    return [transform]


def _link(link: FlowTransform, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The image, the log-det ``[n]``, the Jacobian ``[n, D, D]`` and the gradient of the log-det ``[n, D]``."""
    z = z.detach().requires_grad_()
    image, log_det = link.forward_and_log_det(z, context)
    log_det = log_det.reshape(len(z), -1).sum(-1)
    flat = image.flatten(1)[:, : z[0].numel()]  # the last entry of a point of the simplex is not free
    rows = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0].flatten(1) for column in flat.unbind(1)]
    slope = torch.zeros_like(z)
    if log_det.requires_grad:
        (found,) = torch.autograd.grad(log_det.sum(), z, allow_unused=True)
        slope = slope if found is None else found
    return image.detach(), log_det.detach(), torch.stack(rows, 1), slope.flatten(1)


def _carry(matrix: Tensor, size: Tensor) -> Tensor:
    return (matrix.abs() @ size.unsqueeze(-1)).squeeze(-1)


def measure(transform: FlowTransform, x: Tensor, context: Tensor | None = None) -> Rounding:
    """The amplification of rounding at ``x`` ``[n, *event]`` of a transform in float64.

    Raises:
        ValueError: the transform changes the number of coordinates, other than to the simplex.
    """
    z, sizes, jacobians, inverses, log_dets, slopes = x, [1 + x.abs().flatten(1)], [], [], [], []
    for link in links(transform):
        z, log_det, jacobian, slope = _link(link, z, context)
        if jacobian.shape[-2] != jacobian.shape[-1]:
            raise ValueError(f"{type(link).__name__} maps to fewer coordinates than it maps from")
        sizes.append(1 + z.abs().flatten(1)[:, : jacobian.shape[-1]])
        jacobians.append(jacobian)
        inverses.append(torch.linalg.inv_ex(jacobian)[0])
        log_dets.append(log_det)
        slopes.append(slope)

    count = len(jacobians)
    forth = [sizes[k + 1] + _carry(jacobians[k], sizes[k]) for k in range(count)]
    back = [sizes[k] + _carry(inverses[k], sizes[k + 1]) for k in range(count)]
    one = torch.eye(sizes[0].shape[-1], dtype=x.dtype, device=x.device).expand_as(jacobians[0])
    # A log-det is computed from the argument or from the result, whichever: either is off by a rounding.
    own = torch.zeros_like(log_dets[0])
    for k, slope in enumerate(slopes):
        from_result = (inverses[k].mT @ slope.unsqueeze(-1)).squeeze(-1).abs()
        own = own + 1 + log_dets[k].abs() + (slope.abs() * sizes[k] + from_result * sizes[k + 1]).sum(-1)

    # From the last link to the first: products of Jacobians, and the gradient of the log-dets still to come.
    of_image, of_log_det = torch.zeros_like(forth[-1]), own
    product, ahead = one, torch.zeros_like(slopes[-1])
    for k in reversed(range(count)):
        of_image = of_image + _carry(product, forth[k])
        of_log_det = of_log_det + (ahead.abs() * forth[k]).sum(-1)
        ahead = slopes[k] + (jacobians[k].mT @ ahead.unsqueeze(-1)).squeeze(-1)
        product = product @ jacobians[k]
    # From the first to the last: products of inverses, for the way back.
    of_return, of_return_log_det = torch.zeros_like(back[0]), own
    product, behind = one, torch.zeros_like(slopes[0])
    for k in range(count):
        of_return = of_return + _carry(product, back[k])
        of_return_log_det = of_return_log_det + (behind.abs() * back[k]).sum(-1)
        behind = (inverses[k].mT @ (behind + slopes[k]).unsqueeze(-1)).squeeze(-1)
        product = product @ inverses[k]
        of_return = of_return + _carry(product, forth[k])
    of_return_log_det = of_return_log_det + (behind.abs() * sizes[-1]).sum(-1)
    # What it does to a log-determinant that each entry of its matrix is off by a rounding of 1 + itself.
    pairs = zip(jacobians, inverses, strict=True)
    doubts = [(inverse.abs() * (1 + jacobian.abs().mT)).sum((-1, -2)) for jacobian, inverse in pairs]
    return Rounding(
        x=x,
        y=z,
        log_det=sum(log_dets, torch.zeros_like(log_dets[0])),
        true_log_det=torch.stack([torch.linalg.slogdet(jacobian)[1] for jacobian in jacobians]).sum(0),
        of_image=of_image.amax(-1),
        of_return=of_return.amax(-1),
        of_log_det=of_log_det,
        of_return_log_det=of_return_log_det,
        of_true_log_det=torch.stack(doubts).sum(0),
    )


TRIES = 32
"""How many disturbances of each row are tried."""


def _off(value: Tensor, unit: float, generator: torch.Generator) -> Tensor:
    share = torch.rand(value.shape, generator=generator).to(value) * 2 - 1
    return value + unit * share * (1 + value.abs())


def _disturbed(
    chain: list[FlowTransform], z: Tensor, context: Tensor | None, unit: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The image and the log-det when every intermediate result is off by up to ``unit``."""
    z, total = _off(z, unit, generator), torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for link in chain:
        z, log_det = link.forward_and_log_det(z, context)
        z, total = _off(z, unit, generator), total + log_det.reshape(len(z), -1).sum(-1)
    return z, total


def _there_and_back(
    forth: list[FlowTransform],
    back: list[FlowTransform],
    x: Tensor,
    context: Tensor | None,
    unit: float,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    image, log_det = _disturbed(forth, x, context, unit, generator)
    found, undone = _disturbed(back, image, context, unit, generator)
    return image, log_det, found, undone


def widen(transform: FlowTransform, context: Tensor | None, known: Rounding, unit: float) -> Rounding:
    """The rounding, at least what intermediate results and a context that are off by ``unit`` do.

    Args:
        transform: the transform in float64.
        context: ``[n, context_dim]``.
        known: what `measure` says.
        unit: the relative error of one computation.
    """
    generator = torch.Generator().manual_seed(0)
    forth, back = links(transform), links(transform.inv)
    many, at = known.x.repeat(TRIES, *(1,) * (known.x.dim() - 1)), None
    if context is not None:
        # An argument like the point: what a network makes of it is off by as much, and may lie close to zero.
        at = _off(context.repeat(TRIES, 1), unit, generator)
    # Against the same computations undisturbed, and not against the truth: an error must not excuse itself.
    with torch.no_grad():
        moved = _there_and_back(forth, back, many, at, unit, generator)
        still = _there_and_back(forth, back, known.x, context, 0.0, generator)
    first_order = (known.of_image, known.of_log_det, known.of_return, known.of_return_log_det)
    worst = []
    for known_to_move, there, here in zip(first_order, moved, still, strict=True):
        size = (there.reshape(TRIES, len(here), -1) - here.reshape(1, len(here), -1)).abs()
        worst.append(torch.maximum(known_to_move, size.nan_to_num(torch.inf).amax((0, -1)) / unit))
    return replace(known, of_image=worst[0], of_log_det=worst[1], of_return=worst[2], of_return_log_det=worst[3])
