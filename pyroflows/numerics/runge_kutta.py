"""Explicit Runge-Kutta steps of many rows at a time, with a step size of each row's own.

Every row of the state is a differential equation by itself: it has its own time and step, and leaves the batch when
it is done, so no row's result depends on its batch mates. Time runs as a fraction s from 0 to 1 of the way from t0 to
t1; step sizes carry no gradient.

Dormand and Prince 1980, doi:10.1016/0771-050X(80)90013-3; Bogacki and Shampine 1989,
doi:10.1016/0893-9659(89)90079-7; Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4;
Gustafsson 1991, doi:10.1145/210232.210242 (the control of steps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import ODESolveError

__all__ = ["TABLEAUS", "Control", "Round", "Tableau", "adapt", "failure", "march", "take_step"]

LEAST = 1e-2
"""What a step's error counts at least, as a part of the tolerance, for the size of the next step but one."""

Velocity = Callable[..., Tensor]
"""``(t [rows, 1], state [rows, width], *carried) -> d state / dt [rows, width]``."""


class Tableau(NamedTuple):
    """The numbers of an explicit Runge-Kutta method.

    Attributes:
        nodes: where in the step each stage after the first lies.
        matrix: how much of each earlier stage goes into the argument of a stage after the first.
        weights: how much of each stage goes into the step.
        error: how much of each stage goes into the estimate of the step's error; empty where there is none. With an
            estimate, the last stage is the velocity at the end of the step, the first of the next.
        order: the order of the method.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...]
    order: int


_DOPRI5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_BOSH3 = (2 / 9, 1 / 3, 4 / 9)

TABLEAUS = {
    "dopri5": Tableau(
        (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            _DOPRI5,
        ),
        _DOPRI5,
        (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
        5,
    ),
    "bosh3": Tableau(
        (1 / 2, 3 / 4, 1.0), ((1 / 2,), (0.0, 3 / 4), _BOSH3), _BOSH3, (-5 / 72, 1 / 12, 1 / 9, -1 / 8), 3
    ),
    "euler": Tableau((), (), (1.0,), (), 1),
    "midpoint": Tableau((1 / 2,), ((1 / 2,),), (0.0, 1.0), (), 2),
    "rk4": Tableau((1 / 2, 1 / 2, 1.0), ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (), 4),
}


class Control(NamedTuple):
    """What an adaptive method may do.

    Attributes:
        rtol: allowed error of a step in an entry, relative to the entry.
        atol: allowed error of a step in an entry, in the entry's unit.
        max_nfe: how many evaluations of the field before a row gives up.
        width: the state is made of blocks of so many columns.
        columns: the columns of every block that steer the steps.
    """

    rtol: float
    atol: float
    max_nfe: int
    width: int
    columns: slice

    def largest(self, ratio: Tensor) -> Tensor:
        """The largest entry of each row that steers, ``[rows, 1]``."""
        if self.columns != slice(None):
            ratio = ratio.unflatten(1, (-1, self.width))[..., self.columns].flatten(1)
        return ratio.abs().amax(1, keepdim=True)


class Round(NamedTuple):
    """One attempted step of all rows that are under way, as a watcher sees it.

    Attributes:
        rows: the number of each row, ``[rows]``.
        taken: which rows took the step, ``[rows, 1]``.
        fractions: where each row's step begins and ends, of the way from t0 to t1, ``[rows, 1]`` each.
        state: where the step begins, ``[rows, width]``.
        step: its length in time, ``[rows, 1]``.
    """

    rows: Tensor
    taken: Tensor
    fractions: tuple[Tensor, Tensor]
    state: Tensor
    step: Tensor


def _mix(weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    mixed: Tensor | None = None
    for weight, stage in zip(weights, stages, strict=False):
        if weight != 0:
            mixed = stage * weight if mixed is None else torch.add(mixed, stage, alpha=weight)
    assert mixed is not None
    return mixed


def take_step(
    velocity: Velocity,
    tableau: Tableau,
    span: tuple[Tensor, Tensor],
    state: Tensor,
    step: Tensor,
    carried: Sequence[Tensor] = (),
    first: Tensor | None = None,
    estimate: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """One step of a method from each row's time.

    Args:
        velocity: the field.
        tableau: the method.
        span: when the step begins and ends, ``[rows, 1]`` each.
        state: where it begins, ``[rows, width]``.
        step: its length, ``[rows, 1]``.
        carried: tensors of as many rows that the field takes after the state.
        first: the velocity at the beginning, if known.
        estimate: whether to evaluate the stage that only the error's estimate needs.

    Returns:
        The state at the end, and the stages.
    """
    start, end = span
    stages = [velocity(start, state, *carried) if first is None else first]
    shared = bool(tableau.error)
    for number, (node, row) in enumerate(zip(tableau.nodes, tableau.matrix, strict=True), 1):
        argument = torch.addcmul(state, step, _mix(row, stages))
        if shared and number == len(tableau.nodes):
            if estimate:
                stages.append(velocity(end, argument, *carried))
            return argument, stages
        # The end itself, not start + step, which may lie an ulp behind the end of all time.
        stages.append(velocity(end if node == 1 else torch.add(start, step, alpha=node), argument, *carried))
    return torch.addcmul(state, step, _mix(tableau.weights, stages)), stages


def march(
    velocity: Velocity,
    tableau: Tableau,
    state: Tensor,
    t0: Tensor,
    t1: Tensor,
    carried: Sequence[Tensor],
    steps: int,
    watch: Callable[[Round], None] | None = None,
) -> Tensor:
    """The state at t1 by equal steps."""
    rows = state.shape[0]  # which a trace follows, so that it holds for other numbers of rows
    times = torch.lerp(t0, t1, torch.linspace(0, 1, steps + 1, dtype=state.dtype, device=state.device))
    step = ((t1 - t0) / steps).expand(rows, 1)
    for number in range(steps):
        start, end = times[number].expand(rows, 1), times[number + 1].expand(rows, 1)
        before = state
        state, _ = take_step(velocity, tableau, (start, end), state, step, carried, estimate=False)
        if watch is not None:
            index = torch.arange(rows, device=state.device)
            fractions = state.new_full((rows, 1), number / steps), state.new_full((rows, 1), (number + 1) / steps)
            watch(Round(index, torch.ones_like(fractions[0], dtype=torch.bool), fractions, before, step))
    return state


def adapt(
    velocity: Velocity,
    tableau: Tableau,
    state: Tensor,
    t0: Tensor,
    t1: Tensor,
    carried: Sequence[Tensor],
    control: Control,
    watch: Callable[[Round], None] | None = None,
    afresh: bool = False,
) -> Tensor:
    """The state at t1 by steps that keep each row's error of a step within the tolerances.

    Args:
        velocity: the field.
        tableau: a method with an estimate of its error.
        state: finite, ``[rows, width]``, at least one row.
        t0: the time of ``state``.
        t1: the time to reach.
        carried: tensors of as many rows that the field takes after the state.
        control: tolerances and limits.
        watch: called after every attempt, before rows leave.
        afresh: evaluate the first stage in every attempt, so that the watcher sees every stage of it, and let no row
            advance in an attempt in which some row's velocity is not finite.

    Raises:
        ODESolveError: some row met a velocity that is not finite, needed steps too small to tell its times apart, or
            more evaluations than allowed. All other rows are solved first, so that the message can count.
    """
    eps = torch.finfo(state.dtype).eps
    # Backward through a graph that holds a row's infinite velocity would spread NaN to all rows.
    whole = afresh or torch.is_grad_enabled()
    rows, evaluations = len(state), 2
    index = torch.arange(rows, device=state.device)
    s = state.new_zeros(rows, 1)
    first = velocity(t0.expand(rows, 1), state, *carried)
    with torch.no_grad():
        ds = _short(_first_step(velocity, state, first, t0, t1, carried, control, tableau.order))
        last = torch.full_like(s, LEAST)
    done: list[tuple[Tensor, Tensor]] = []
    failed: list[_Failure] = []
    while len(index):
        if evaluations + len(tableau.nodes) > control.max_nfe:
            failed.append(_Failure(index, s, ds, state.detach(), "max_nfe"))
            break
        with torch.no_grad():
            s_end = torch.where(s + 1.01 * ds >= 1, 1.0, s + ds)
            fraction = s_end - s
        span = torch.lerp(t0, t1, s), torch.lerp(t0, t1, s_end)
        step = fraction * (t1 - t0)
        end, stages = take_step(velocity, tableau, span, state, step, carried, None if afresh else first)
        evaluations += len(tableau.nodes) + afresh
        with torch.no_grad():
            scale = torch.maximum(state.abs(), end.abs()).mul_(control.rtol).add_(control.atol)
            ratio = control.largest(_mix(tableau.error, stages).mul_(step).div_(scale))
            finite = torch.isfinite(ratio) & torch.isfinite(end).all(1, keepdim=True)
            taken = (ratio <= 1) & finite
            # With the last step's error, steps are neither too bold nor often refused.
            factor = (0.9 * (last**0.4 / ratio**0.7) ** (1 / tableau.order)).clamp_(0.2, 10)
            ds_next = _short(torch.where(finite, factor, 0.2) * fraction)
            arrived = taken & (s_end >= 1)
            stuck = ~arrived & (ds_next <= 16 * eps * (s + eps))
            leaving = stuck | arrived
            all_taken, any_leaving, all_finite = torch.stack((taken.all(), leaving.any(), finite.all())).tolist()
            if whole and not all_finite:
                taken = torch.zeros_like(taken)
                ds_next = torch.where(finite, ds, ds_next)
                leaving = stuck = stuck & ~finite
                all_taken, any_leaving = False, bool(leaving.any())
        if watch is not None:
            watch(Round(index, taken, (s, s_end), state, step))
        if all_taken:
            state, first, s = end, stages[-1], s_end
        elif all_finite or not whole:
            state, first = torch.where(taken, end, state), torch.where(taken, stages[-1], first)
            s = torch.where(taken, s_end, s)
        ds, last = ds_next, torch.where(taken, ratio.clamp(min=LEAST), last)
        if not any_leaving:
            continue
        for mask, why in ((stuck & finite, "step"), (stuck & ~finite, "velocity")):
            lost = _rows_of(mask)
            if len(lost):
                numbers, at, size, values = (x.detach().index_select(0, lost) for x in (index, s, ds, state))
                failed.append(_Failure(numbers, at, size, values, why))
        there, stay = _rows_of(leaving & ~stuck), _rows_of(~leaving)
        done.append((index.index_select(0, there), state.index_select(0, there)))
        index, s, ds, last, state, first = (x.index_select(0, stay) for x in (index, s, ds, last, state, first))
        carried = tuple(x.index_select(0, stay) for x in carried)
    if failed:
        raise _error(failed, rows, t0, t1, evaluations)
    return torch.cat([x for _, x in done]).index_select(0, torch.cat([x for x, _ in done]).argsort())


def _rows_of(mask: Tensor) -> Tensor:
    return mask.squeeze(1).nonzero().squeeze(1)


def _short(size: Tensor) -> Tensor:
    """Positive sizes, rounded down to nine binary digits.

    Step sizes follow from errors, whose last digits are rounding. Cut off here, they do not grow from step to step
    into different results on another machine or in another batch.
    """
    if size.dtype == torch.float64:
        return torch.bitwise_and(size.view(torch.int64), -(1 << 44)).view(torch.float64)
    return torch.bitwise_and(size.view(torch.int32), -(1 << 15)).view(torch.float32)


def _first_step(
    velocity: Velocity,
    state: Tensor,
    first: Tensor,
    t0: Tensor,
    t1: Tensor,
    carried: Sequence[Tensor],
    control: Control,
    order: int,
) -> Tensor:
    """Hairer's first step of each row, as a fraction of the way; all of it where nothing moves, 0 where not finite."""
    span = t1 - t0
    scale = control.atol + control.rtol * state.abs()
    speed = control.largest(first * span / scale)
    # A step that moves the state by a hundredth of itself, or of its tolerance.
    small = (0.01 * control.largest(state / scale).clamp(min=1) / speed).clamp(max=1)
    small = torch.where(torch.isfinite(first).all(1, keepdim=True), small, 0.0)
    time = torch.lerp(t0, t1, small)
    bend = velocity(time, torch.addcmul(state, small * span, first), *carried) - first
    bend = control.largest(bend * span / scale) / small
    # Where the field's second value is not finite, the first alone decides.
    guess = (0.01 / torch.maximum(speed, bend.nan_to_num(0.0, 0.0))).pow(1 / order)
    return torch.minimum(100 * small, guess).clamp(max=1).nan_to_num(0.0)


# --- what to say when a row stops ------------------------------------------------------------------------


class _Failure(NamedTuple):
    rows: Tensor
    s: Tensor
    ds: Tensor
    state: Tensor
    why: str


_WHY = {
    "velocity": (
        "non-finite velocity",
        "The field returned NaN or an infinite value there: check its parameters and its domain; if the state is "
        "large, it exploded before.",
    ),
    "state": (
        "the state overflowed",
        "It is too large for its dtype: scale it, or take float64.",
    ),
    "step": (
        "the step fell below the resolution of time",
        "The solution may leave every bound in finite time, or jump there: bound the field, or end before that time.",
    ),
    "max_nfe": (
        "max_nfe was reached",
        "The field may be stiff, or the state may leave every bound in finite time: loosen rtol and atol, raise "
        "max_nfe, regularise the field, or take fixed steps (solver='rk4', or fallback='rk4' for such rows alone).",
    ),
}


def failure(
    why: str,
    *,
    total: int,
    t: float,
    dt: float,
    nfe: int,
    norm: float,
    span: tuple[float, float],
    rows: Sequence[int],
) -> ODESolveError:
    """The error of rows that stopped, with numbers and a hint."""
    what, hint = _WHY[why]
    return ODESolveError(
        f"{len(rows) or total} of {total} rows were not solved from t={span[0]:.6g} to t={span[1]:.6g}: {what} at "
        f"t={t:.6g} (dt={dt:.3g}, nfe={nfe}, largest entry of the state {norm:.3g}). {hint}",
        t=t,
        dt=dt,
        nfe=nfe,
        norm=norm,
        rows=rows,
        reason=why,
    )


def _error(failed: list[_Failure], total: int, t0: Tensor, t1: Tensor, nfe: int) -> ODESolveError:
    start, end = float(t0.detach()), float(t1.detach())
    worst = next((f for why in ("velocity", "step", "max_nfe") for f in failed if f.why == why), failed[0])
    row = int(worst.s.argmin())
    rows = torch.cat([f.rows for f in failed]).sort().values.tolist()
    return failure(
        worst.why,
        total=total,
        t=start + (end - start) * float(worst.s[row]),
        dt=(end - start) * float(worst.ds[row]),
        nfe=nfe,
        norm=float(worst.state[row].abs().max()),
        span=(start, end),
        rows=rows,
    )
