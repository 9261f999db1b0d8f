"""Roots of increasing scalar functions, many at a time, differentiable to second order.

The search brackets, then bisects and takes Newton steps inside the bracket. Derivatives come from the implicit
function theorem in its shortest form: two Newton steps from the root change no digit of it but carry its first
and second derivatives, for every tensor that the function depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import InverseNotConverged

__all__ = ["Root", "monotone_root"]

Increasing = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``x -> (f(x), log f'(x))``, elementwise."""


class Root(NamedTuple):
    """What a search found.

    Attributes:
        x: the roots, differentiable to second order.
        log_slope: ``log f'(x)``, differentiable to first order at least.
        residual: ``|f(x) - y|`` at the roots, without gradient.
        steps: how many times the function was evaluated.
    """

    x: Tensor
    log_slope: Tensor
    residual: Tensor
    steps: int


def monotone_root(
    f: Increasing,
    y: Tensor,
    *,
    start: Tensor | None = None,
    bracket: tuple[Tensor, Tensor] | None = None,
    max_steps: int = 200,
    tol: float | None = None,
) -> Root:
    r"""Solves :math:`f(x) = y` for an increasing :math:`f`, entry by entry, wherever on the real line x lies.

    Args:
        f: ``x -> (f(x), log f'(x))``, elementwise and increasing. May depend on tensors that need gradients.
        y: the values to reach, any shape. A NaN or infinite entry is returned as it is.
        start: where to begin, broadcastable to ``y``; default ``y`` itself.
        bracket: numbers that are surely not above and not below the root, broadcastable to ``y``, if such are known;
            an infinite one says nothing.
        max_steps: how many evaluations before giving up.
        tol: accepted ``|f(x) - y| / (1 + |y|)``; default to the last digits, ``|f(x) - y| <= 4 eps |y|``. An entry
            whose bracket has shrunk to neighbouring floating-point numbers, whose Newton step is below the last
            digit, or whose Newton steps no longer lead closer than the rounding of ``f`` is converged as well: no
            better root can be told.

    Returns:
        A `Root`.

    Raises:
        InverseNotConverged: some entry did not converge, because ``f`` does not reach ``y``, is not
            increasing, or is not finite; the message names how many and the largest residual.

    Example:
        >>> root = monotone_root(lambda x: (x + torch.tanh(x), torch.log1p(1 - torch.tanh(x) ** 2)),
        ...                      torch.tensor([0.0, 3.0, -1e6]))
        >>> root.x
        tensor([ 0.0000e+00,  2.0337e+00, -1.0000e+06])
    """
    with torch.no_grad():
        x, residual, steps, failed = _search(f, y.detach(), start, bracket, max_steps, tol)
        if failed.any():
            worst = float(residual[failed].nan_to_num(torch.inf).max())
            count = int(failed.sum())
            raise InverseNotConverged(
                f"{count} of {failed.numel()} roots were not found in {steps} steps (largest residual "
                f"{worst:.3g}). Expected a continuous increasing function that reaches every given value; "
                "check that the values lie in the codomain and that no parameter is NaN.",
                residual=worst,
                count=count,
                steps=steps,
            )
    for _ in range(2 if torch.is_grad_enabled() else 0):
        value, log_slope = f(x)
        step = (y - value) * torch.exp(-log_slope)
        moved = step - step.detach()
        x = x + torch.where(torch.isfinite(moved), moved, torch.zeros_like(moved))
    return Root(x, f(x)[1], residual, steps)


def _search(
    f: Increasing,
    y: Tensor,
    start: Tensor | None,
    bracket: tuple[Tensor, Tensor] | None,
    max_steps: int,
    tol: float | None,
) -> tuple[Tensor, Tensor, int, Tensor]:
    eps = torch.finfo(y.dtype).eps
    accepted = 4 * eps * y.abs() + torch.finfo(y.dtype).tiny if tol is None else tol * (1 + y.abs())
    noise = 1e3 * eps * (1 + y.abs())
    given = torch.isfinite(y)
    target = torch.where(given, y, torch.zeros_like(y))
    low = torch.full_like(y, -torch.inf)
    high = torch.full_like(y, torch.inf)
    if bracket is not None:
        low, high = (
            torch.where(given, end.expand_as(y).to(y.dtype), open_end)
            for end, open_end in zip(bracket, (low, high), strict=True)
        )
    x = target if start is None else torch.where(given, start.expand_as(y).to(y.dtype), target)
    reach = 1 + 0.1 * x.abs()
    best, best_gap = x, torch.full_like(y, torch.inf)
    last_move = torch.full_like(y, torch.inf)
    done = ~given
    steps = 0
    while steps < max_steps:
        steps += 1
        value, log_slope = f(x)
        gap = target - value
        stuck = (gap.abs() > 0.5 * best_gap) & (best_gap <= noise)
        better = gap.abs() < best_gap
        best, best_gap = torch.where(better, x, best), torch.where(better, gap.abs(), best_gap)
        low = torch.where(gap >= 0, torch.maximum(low, x), low)
        high = torch.where(gap <= 0, torch.minimum(high, x), high)
        width = high - low
        closed = torch.isfinite(width)
        tight = closed & (width <= 2 * eps * torch.maximum(low.abs(), high.abs()))
        step = gap * torch.exp(-log_slope)
        still = (step.abs() <= eps * x.abs()) & (gap.abs() <= eps**0.5 * (1 + y.abs()))
        # Newton's steps halve the gap until nothing is left of it but the rounding of f.
        settled = stuck & (step.abs() <= eps**0.75 * (1 + x.abs()))
        done = done | (best_gap <= accepted) | still | settled | tight
        if bool(done.all()):
            break
        # Newton inside the bracket; where that is slow, the middle; where a side is open, twice as far.
        newton = x + step
        slow = step.abs() > 0.5 * last_move
        middle = low + 0.5 * width
        # A bracket that spans orders of magnitude is halved in the exponent.
        wide = (low * high > 0) & (torch.maximum(low.abs(), high.abs()) > 4 * torch.minimum(low.abs(), high.abs()))
        middle = torch.where(wide, torch.sign(low) * torch.sqrt(low.abs()) * torch.sqrt(high.abs()), middle)
        good = (newton > low) & (newton < high) & ~(slow & closed)
        outward = x + torch.sign(gap) * reach
        far = ~closed & ((newton - x).abs() > reach)
        reach = torch.where(closed, reach, 2 * reach)
        there = torch.where(good & ~far, newton, torch.where(closed, middle, outward))
        there = there.clamp(torch.finfo(y.dtype).min, torch.finfo(y.dtype).max)
        x, last_move = there, (there - x).abs()
    return torch.where(given, best, y), torch.where(given, best_gap, torch.zeros_like(y)), steps, ~done
