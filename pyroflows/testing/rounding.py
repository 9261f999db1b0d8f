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

The first order knows only the slope at the point. Where the slope changes within the rounding error itself, as at the
edge of a nearly flat bin, `widen` replaces it by how far the exact result moves when the argument does.
"""

from __future__ import annotations

from collections.abc import Callable
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
        to_y: of ``y``, given ``x``.
        to_x: of ``x``, given ``y``.
        round_x: of ``inverse(forward(x)) - x``.
        round_y: of ``forward(inverse(y)) - y``.
        of_log_det: of the forward log-det, given ``x``.
        of_inverse_log_det: of the inverse log-det, given ``y``.
        of_slogdet: of ``true_log_det`` itself, which is computed in float64.
    """

    x: Tensor
    y: Tensor
    log_det: Tensor
    true_log_det: Tensor
    to_y: Tensor
    to_x: Tensor
    round_x: Tensor
    round_y: Tensor
    of_log_det: Tensor
    of_inverse_log_det: Tensor
    of_slogdet: Tensor


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
    own = sum(1 + d.abs() + (g.abs() * s).sum(-1) for d, g, s in zip(log_dets, slopes, sizes, strict=False))

    # From the last link to the first: products of Jacobians, and the gradient of the log-dets still to come.
    to_y, round_y, of_log_det = torch.zeros_like(forth[-1]), torch.zeros_like(forth[-1]), own
    product, ahead = one, torch.zeros_like(slopes[-1])
    for k in reversed(range(count)):
        to_y = to_y + _carry(product, forth[k])
        of_log_det = of_log_det + (ahead.abs() * forth[k]).sum(-1)
        ahead = slopes[k] + (jacobians[k].mT @ ahead.unsqueeze(-1)).squeeze(-1)
        product = product @ jacobians[k]
        round_y = round_y + _carry(product, back[k])
    # From the first to the last: products of inverses.
    to_x, round_x, of_inverse = torch.zeros_like(back[0]), torch.zeros_like(back[0]), own
    undone, behind = one, torch.zeros_like(slopes[0])
    for k in range(count):
        to_x = to_x + _carry(undone, back[k])
        of_inverse = of_inverse + (behind.abs() * back[k]).sum(-1)
        behind = (inverses[k].mT @ (behind + slopes[k]).unsqueeze(-1)).squeeze(-1)
        undone = undone @ inverses[k]
        round_x = round_x + _carry(undone, forth[k])
    of_inverse = of_inverse + (behind.abs() * sizes[-1]).sum(-1)
    # What a relative change of the entries of a Jacobian does to its log-determinant.
    pairs = list(zip(jacobians, inverses, strict=True))
    sensitivity = [(inverse.abs() * jacobian.abs().mT).sum((-1, -2)) for jacobian, inverse in pairs]
    return Rounding(
        x=x,
        y=z,
        log_det=sum(log_dets, torch.zeros_like(log_dets[0])),
        true_log_det=torch.stack([torch.linalg.slogdet(jacobian)[1] for jacobian in jacobians]).sum(0),
        to_y=to_y.amax(-1),
        to_x=to_x.amax(-1),
        round_x=(to_x + round_x).amax(-1),
        round_y=(to_y + round_y).amax(-1),
        of_log_det=of_log_det,
        of_inverse_log_det=of_inverse,
        of_slogdet=torch.stack(sensitivity).sum(0),
    )


Direction = Callable[[Tensor], tuple[Tensor, Tensor]]


def _moved(run: Direction, point: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """How far the result and the log-det move, ``[n, *event]`` and ``[n]``, when the argument moves either way."""
    with torch.no_grad():
        here, log_det = run(point)
        steps, changes = torch.zeros_like(here), torch.zeros_like(log_det.reshape(len(point), -1).sum(-1))
        odd = torch.arange(point[0].numel(), device=point.device).reshape(point.shape[1:]) % 2 == 1
        for way in (by, -by, torch.where(odd, by, -by), torch.where(odd, -by, by)):
            there, changed = run(point + way)
            steps = torch.maximum(steps, (there - here).abs().nan_to_num(torch.inf))
            change = (changed - log_det).reshape(len(point), -1).sum(-1).abs()
            changes = torch.maximum(changes, change.nan_to_num(torch.inf))
    return steps, changes


def widen(
    transform: FlowTransform,
    x: Tensor,
    y: Tensor,
    context: Tensor | None,
    there: Rounding,
    back: Rounding,
    unit: float,
) -> tuple[Rounding, Rounding]:
    """The rounding at ``x`` and at the points that map to ``y``, at least what arguments off by ``unit`` explain.

    Args:
        transform: the transform in float64.
        x: points ``[n, *event]``.
        y: other points on the other side.
        context: ``[n, context_dim]``.
        there: what `measure` says at ``x``.
        back: what it says at the inverse of ``y``.
        unit: the relative error of one computation.
    """
    wide = None if context is None else context.double()
    x, y = x.double(), y.double()

    def forward(point: Tensor) -> tuple[Tensor, Tensor]:
        return transform.forward_and_log_det(point, wide)

    def inverse(point: Tensor) -> tuple[Tensor, Tensor]:
        return transform.inverse_and_log_det(point, wide)

    def most(known: Tensor, moved: Tensor) -> Tensor:
        return torch.maximum(known, moved.reshape(len(known), -1).amax(-1) / unit)

    image_step, log_det_step = _moved(forward, x, unit * (1 + x.abs()))
    round_step, _ = _moved(inverse, there.y, image_step + unit * (1 + there.y.abs()))
    found_step, inverse_step = _moved(inverse, y, unit * (1 + y.abs()))
    away = inverse(y + unit * (1 + y.abs()))[0].detach()
    return_step, _ = _moved(forward, away, unit * (1 + away.abs()))
    return (
        replace(
            there,
            to_y=most(there.to_y, image_step),
            of_log_det=most(there.of_log_det, log_det_step),
            round_x=most(there.round_x, round_step),
        ),
        replace(
            back,
            to_x=most(back.to_x, found_step),
            of_inverse_log_det=most(back.of_inverse_log_det, inverse_step),
            round_y=most(back.round_y, return_step),
        ),
    )
