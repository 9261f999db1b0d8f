"""The solvers of torchdiffeq, with failures told as ours; all rows share the steps that the caller's norm dictates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import ODESolveError
from pyroflows.numerics.runge_kutta import Control, failure

__all__ = ["borrowed_solve", "borrowed_solvers"]


def borrowed_solvers() -> Mapping[str, Any]:
    """What the installed torchdiffeq has, by name."""
    from torchdiffeq._impl.odeint import SOLVERS  # at first use: it imports scipy

    solvers: Mapping[str, Any] = SOLVERS
    return solvers


def borrowed_solve(
    solver: str,
    velocity: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    t0: Tensor,
    t1: Tensor,
    control: Control,
    steps: int,
    options: Mapping[str, Any],
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The state at t1, from ``dy/ds = (t1 - t0) f(t, y)`` for s from 0 to 1.

    Args:
        solver: a name in ``borrowed_solvers()``.
        velocity: ``(t [], state) -> velocity``.
        state: at t0, any shape.
        t0: the time of ``state``; a scalar, as is t1. Both may need gradients.
        t1: the time to reach.
        control: tolerances and the largest number of evaluations.
        steps: for solvers without step control.
        options: for the solver.
        norm: of error over tolerance, both of the state's shape.

    Raises:
        ODESolveError: a velocity is not finite, steps became too small, or ``max_nfe`` was reached.
    """
    from torchdiffeq import odeint
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
    from torchdiffeq._impl.solvers import FixedGridODESolver

    span = float(t0.detach()), float(t1.detach())
    nfe, last_t, last_norm = 0, span[0], math.nan

    def broken(why: str) -> ODESolveError:
        # The steps are common to all rows, so all rows stop.
        rows = range(len(state)) if state.ndim == 2 else ()
        return failure(why, total=len(state), t=last_t, dt=math.nan, nfe=nfe, norm=last_norm, span=span, rows=rows)

    def right(s: Tensor, y: Tensor) -> Tensor:
        nonlocal nfe, last_t, last_norm
        t = torch.lerp(t0, t1, s.to(y.dtype))
        last_t, last_norm = float(t.detach()), float(y.detach().abs().max())
        if nfe >= control.max_nfe:
            raise broken("max_nfe")
        nfe += 1
        value = velocity(t, y) * (t1 - t0)
        # torchdiffeq would shrink its step to NaN and call that an underflow.
        if not bool(torch.isfinite(value).all()):
            raise broken("velocity")
        return value

    chosen, kind = {"norm": norm, **options}, borrowed_solvers()[solver]
    ends = torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
    if issubclass(kind, FixedGridODESolver) and "step_size" not in options:
        grid = torch.linspace(0, 1, steps + 1, dtype=state.dtype, device=state.device)
        chosen.setdefault("grid_constructor", lambda f, y, t: grid)
    elif issubclass(kind, RKAdaptiveStepsizeODESolver):
        # Else it steps over the end, where the field may not exist, and interpolates at a lower order.
        chosen.setdefault("step_t", ends[1:])
    try:
        path = odeint(right, state, ends, rtol=control.rtol, atol=control.atol, method=solver, options=chosen)
    except AssertionError as error:
        raise broken("step") from error
    out: Tensor = path[-1]
    if out.shape != state.shape or not bool(torch.isfinite(out).all()):
        raise broken("state")
    return out
