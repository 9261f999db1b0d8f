r"""Initial value problems, many rows at a time, with gradients by backpropagation, by checkpoints or by the adjoint.

Chen et al. 2018, arXiv:1806.07366 (the adjoint); Zhuang et al. 2020, arXiv:2006.02493 (checkpoints at accepted
steps); Kidger, Chen and Lyons 2021, arXiv:2009.09457 (the parameters' gradient does not steer the steps).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import ODESolveError, OptionError, ShapeError
from pyroflows.numerics.adjoint import differentiable_solution
from pyroflows.numerics.borrowed import borrowed_solve, borrowed_solvers
from pyroflows.numerics.fallback import Fallback, in_parts, numbered
from pyroflows.numerics.modes import is_plainly_eager
from pyroflows.numerics.record import Work, open_records
from pyroflows.numerics.runge_kutta import TABLEAUS, Control, Round, Tableau, Velocity, adapt, failure, march

__all__ = ["Solution", "ode_solvers", "ode_tolerances", "solve"]

GRADIENTS = ("adjoint", "checkpoint", "direct")


class Solution(NamedTuple):
    """What a solve gives.

    Attributes:
        state: the state at t1, ``[rows, width]``.
        nfe: how many times the field was evaluated for it.
        work: the same, and what the backward pass adds.
    """

    state: Tensor
    nfe: int
    work: Work


def ode_solvers() -> tuple[str, ...]:
    """The names that ``solve`` takes: the solvers of this module, then those of the installed torchdiffeq.

    Example:
        >>> ode_solvers()[:5]
        ('dopri5', 'bosh3', 'euler', 'midpoint', 'rk4')
    """
    return (*TABLEAUS, *(name for name in borrowed_solvers() if name not in TABLEAUS))


def solve(
    field: Velocity,
    state: Tensor,
    t0: float | Tensor,
    t1: float | Tensor,
    *,
    solver: str = "dopri5",
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    max_nfe: int = 5000,
    gradient: str = "direct",
    parameters: Sequence[Tensor] = (),
    carried: Sequence[Tensor] = (),
    controlled: int | slice = slice(None),
    options: Mapping[str, Any] | None = None,
    fallback: str | Fallback | None = None,
) -> Solution:
    r"""Solves :math:`dy/dt = f(t, y)` from :math:`y(t_0)` to :math:`y(t_1)`, for every row of the state by itself.

    Tolerances bound the estimated error of each step in every entry: :math:`|e| \le \text{atol} + \text{rtol}\,|y|`.
    Errors of steps add up and are carried along by the field, so the error at t1 can be a few times larger. The
    adaptive solvers of this module, "dopri5" and "bosh3", choose each row's steps by that row alone: its result does
    not depend on its batch mates. torchdiffeq's share one step, which the worst row dictates.

    Args:
        field: ``(t, state, *carried) -> velocity``, with t of shape ``[rows, 1]``. Rows that are done leave the
            batch, so whatever the field needs of each row has to come through ``carried``.
        state: ``[rows, width]``. A row that holds NaN or an infinite value comes back as NaN.
        t0: the time of ``state``.
        t1: the time to reach, before or after t0. Both may need gradients.
        solver: one of ``ode_solvers()``.
        rtol: relative tolerance; default 1e-5, in float64 1e-9.
        atol: absolute tolerance; default as ``rtol``.
        steps: how many steps a solver without step control takes; default 20.
        max_nfe: how many evaluations of the field before giving up, forward and backward each.
        gradient: how to differentiate. "direct" keeps all that was computed. "checkpoint" keeps the state at each
            accepted step and computes each step again: the same gradient. "adjoint" keeps nothing and solves
            backwards: the gradient of the exact solution, within the tolerances. With ``create_graph=True`` the last
            two take the steps again by "direct". torchdiffeq's solvers have no "checkpoint".
        parameters: tensors that the field depends on and that need gradients. Leaf tensors that an evaluation at t0
            reaches are found without being listed; list tensors that other networks computed, such as a context
            that all rows share.
        carried: tensors of as many rows as the state that the field takes after it, such as a context or noise. They
            get gradients too.
        controlled: the columns that steer the steps, or how many of the first; default all.
        options: passed on to a solver of torchdiffeq.
        fallback: how to solve rows that a solver with step control gives up, in both passes: ``"rk4"``, another solver
            of fixed steps, or a `Fallback`. By default they are an error. The other rows are solved again without them.

    Raises:
        ODESolveError: a velocity is not finite, or without a fallback, steps became too small or ``max_nfe`` was
            reached.
        OptionError: an option has a value that it cannot take.
        ShapeError: the state is no matrix, or the velocity or a carried tensor does not fit it.

    Example:
        >>> decay = torch.tensor(2.0, requires_grad=True)
        >>> y = solve(lambda t, y: -decay * y, torch.tensor([[1.0], [3.0]]), 0.0, 1.0).state
        >>> y.detach() * math.exp(2.0)
        tensor([[1.0000],
                [3.0000]])
        >>> y.sum().backward()  # d/dk (1 + 3) exp(-k)
        >>> round(float(decay.grad), 3), round(-4 * math.exp(-2.0), 3)
        (-0.541, -0.541)
    """
    _check_shapes(state, carried)
    columns = slice(controlled) if isinstance(controlled, int) else controlled
    if not range(state.shape[1])[columns]:
        raise OptionError(f"No column steers the steps: expected controlled within {state.shape[1]} columns.")
    given = state.dtype
    # Steps are added up in float32 at least; the field keeps its own precision.
    dtype = torch.promote_types(given, torch.float32)
    tableau = _find_solver(solver, gradient, steps, options)
    if not isinstance(max_nfe, int) or max_nfe < 1:
        raise OptionError(f"Expected max_nfe to be a positive integer, got {max_nfe!r}.")
    control = Control(*ode_tolerances(rtol, atol, given), max_nfe, state.shape[1], columns)
    work = Work()
    for record in open_records():
        if len(state):
            record.count(work)
    if isinstance(fallback, str):
        fallback = Fallback(fallback)
    if not isinstance(fallback, Fallback | None):
        raise OptionError(
            f"Expected fallback to be the name of a solver of fixed steps or a Fallback, got {fallback!r}."
        )
    problem = Problem(
        field, solver, tableau, control, steps or 20, dict(options or {}), given, work, _autocast(state), fallback
    )
    state, carried = state.to(dtype), tuple(carried)
    if problem.adaptive:
        if len(state) and (hidden := _what_hides_values(state)):
            raise OptionError(
                f"solver={solver!r} chooses its steps by looking at the state, which {hidden}; expected "
                "a solver of fixed steps: 'euler', 'midpoint', 'rk4'."
            )
        gradient = gradient if is_plainly_eager() else "direct"
    given_times = t0, t1
    t0, t1 = (torch.as_tensor(t, dtype=dtype, device=state.device).reshape(()) for t in (t0, t1))
    if not problem.adaptive and (not is_plainly_eager() or state.is_meta):
        # Fixed steps look at no value, so compilers and transforms see them through.
        out = problem.run(problem.counted("forward"), state, t0, t1, carried)
        return Solution(out.to(given), work.forward, work)
    start, end = (float(t.detach()) if isinstance(t, Tensor) else float(t) for t in given_times)
    if not (math.isfinite(start) and math.isfinite(end)):
        raise OptionError(f"Expected finite times, got t0={start}, t1={end}.")
    if start == end or not len(state):
        if t0.requires_grad or t1.requires_grad or not len(state):
            state = state + (t1 - t0) * problem.counted("forward")(t0.expand(len(state), 1), state, *carried)
        return Solution(state.to(given, copy=True), work.forward, work)
    finite = torch.isfinite(state).all(1)
    for tensor in carried:
        if tensor.is_floating_point():
            finite = finite & torch.isfinite(tensor.flatten(1)).all(1)

    def some(problem: Problem, rows: Tensor) -> Tensor:
        with numbered(rows):
            part, *beside = (tensor.index_select(0, rows) for tensor in (state, *carried))
            return differentiable_solution(problem, gradient, part, t0, t1, tuple(beside), parameters)

    if bool(finite.all()) and not fallback:
        out = differentiable_solution(problem, gradient, state, t0, t1, carried, parameters)
    else:
        out = torch.full_like(state, math.nan)
        for rows, part in in_parts(problem, finite.nonzero().squeeze(1), some):
            out = out.index_copy(0, rows, part)
    return Solution(out.to(given), work.forward, work)


# --- what was asked for ----------------------------------------------------------------------------------


def _check_shapes(state: Tensor, carried: Sequence[Tensor]) -> None:
    if state.ndim != 2 or not state.is_floating_point():
        raise ShapeError(
            f"Expected a state of shape [rows, width] of floating-point numbers, got {tuple(state.shape)} of "
            f"{state.dtype}; flatten the batch dimensions."
        )
    for tensor in carried:
        if tensor.ndim < 1 or len(tensor) != len(state):
            raise ShapeError(
                f"Expected carried tensors of {len(state)} rows, as the state has, got shape {tuple(tensor.shape)}; "
                "what all rows share belongs into the field itself."
            )


def _find_solver(solver: str, gradient: str, steps: int | None, options: Mapping[str, Any] | None) -> Tableau | None:
    tableau = TABLEAUS.get(solver)
    if gradient not in GRADIENTS:
        raise OptionError(f"Expected gradient to be one of {', '.join(GRADIENTS)}, got {gradient!r}.")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise OptionError(f"Expected at least one step, got steps={steps!r}.")
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"Expected options by name, such as {{'first_step': 0.1}}, got {options!r}.")
    if tableau is not None:
        if options:
            raise OptionError(f"solver={solver!r} takes no options, got {sorted(options)}.")
        if tableau.error and steps is not None:
            raise OptionError(f"solver={solver!r} chooses its steps itself; leave out steps, or take 'rk4'.")
        return tableau
    if solver not in borrowed_solvers():
        raise OptionError(f"Expected solver to be one of {', '.join(ode_solvers())}, got {solver!r}.")
    if gradient == "checkpoint":
        raise OptionError(f"gradient='checkpoint' needs one of {', '.join(TABLEAUS)}, got solver={solver!r}.")
    if options and "min_step" in options:
        raise OptionError("min_step would accept steps whose error is above the tolerances; loosen rtol and atol.")
    return None


def ode_tolerances(rtol: float | None, atol: float | None, dtype: torch.dtype) -> tuple[float, float]:
    """What ``solve`` makes of these tolerances for states of a dtype: defaults filled in, none below 8 epsilons.

    Raises:
        OptionError: one of them is negative or no number.

    Example:
        >>> ode_tolerances(None, 1e-3, torch.float32)
        (1e-05, 0.001)
    """
    floor = 8 * torch.finfo(dtype).eps
    default = max(floor, 1e-9 if dtype == torch.float64 else 1e-5)
    found = []
    for name, value in (("rtol", rtol), ("atol", atol)):
        try:
            value = default if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise OptionError(f"Expected {name} to be a number or None, got {value!r}.") from error
        if not value >= 0:
            raise OptionError(f"Expected {name} >= 0, got {value}.")
        if value < floor:
            warnings.warn(f"{name}={value:g} is below what {dtype} can hold: raised to {floor:.2g}.", stacklevel=4)
        found.append(max(value, floor))
    return found[0], found[1]


def _autocast(state: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the backward pass see the field in the precision that the forward pass saw."""
    device = state.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype)


def _what_hides_values(state: Tensor) -> str:
    """Why a choice by values is impossible or would be wrong; nothing if it is not."""
    if state.is_meta:
        return "has no values on the meta device"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace would freeze at its example's"
    functorch = torch._C._functorch
    if torch._C._are_functorch_transforms_active() and any(
        level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ()
    ):
        return "vmap hides; give it the batch as rows"
    return ""


@dataclass
class Problem:
    """A field and how to solve it."""

    field: Velocity
    solver: str
    tableau: Tableau | None
    control: Control
    steps: int
    options: dict[str, Any]
    dtype: torch.dtype
    work: Work
    autocast: Callable[[], AbstractContextManager[Any]]
    fallback: Fallback | None = None

    def by_fixed_steps(self) -> Problem:
        """The same by the steps of the fallback."""
        assert self.fallback is not None
        solver, steps = self.fallback.solver, self.fallback.steps
        return replace(self, solver=solver, tableau=TABLEAUS[solver], steps=steps, fallback=None)

    @property
    def adaptive(self) -> bool:
        return self.tableau is None or bool(self.tableau.error)

    def counted(self, side: str) -> Velocity:
        """The field, which counts its calls and keeps the solver's precision."""
        low = self.dtype if torch.finfo(self.dtype).bits < 32 else None

        def velocity(t: Tensor, state: Tensor, *carried: Tensor) -> Tensor:
            setattr(self.work, side, getattr(self.work, side) + 1)
            value = self.field(t, state, *carried) if low is None else self.field(t.to(low), state.to(low), *carried)
            if value.shape != state.shape:
                raise ShapeError(f"Expected a velocity of shape {tuple(state.shape)}, got {tuple(value.shape)}.")
            return value if value.dtype == state.dtype else value.to(state.dtype)

        return velocity

    def run(
        self,
        velocity: Velocity,
        state: Tensor,
        t0: Tensor,
        t1: Tensor,
        carried: Sequence[Tensor],
        watch: Callable[[Round], None] | None = None,
        afresh: bool = False,
    ) -> Tensor:
        """The state at t1, differentiable as far as autograd records."""
        if self.tableau is None:
            largest = self.control.largest
            return self.borrow(
                lambda t, y: velocity(t.expand(len(y), 1), y, *carried), state, t0, t1, lambda e: largest(e).max()
            )
        if self.tableau.error:
            return adapt(velocity, self.tableau, state, t0, t1, carried, self.control, watch, afresh)
        out = march(velocity, self.tableau, state, t0, t1, carried, self.steps, watch)
        if is_plainly_eager() and not out.is_meta and not bool(torch.isfinite(out).all()):
            raise self._where_it_broke(velocity, state, t0, t1, carried, out)
        return out

    def borrow(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        state: Tensor,
        t0: Tensor,
        t1: Tensor,
        norm: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The same by torchdiffeq, of a state of any shape and a field that takes a scalar time."""
        return borrowed_solve(self.solver, velocity, state, t0, t1, self.control, self.steps, self.options, norm)

    def _where_it_broke(
        self, velocity: Velocity, state: Tensor, t0: Tensor, t1: Tensor, carried: Sequence[Tensor], out: Tensor
    ) -> ODESolveError:
        """Takes the steps again to find the first one that led to a state that is not finite."""
        assert self.tableau is not None
        good: list[tuple[float, float]] = []

        def look(seen: Round) -> None:
            if bool(torch.isfinite(seen.state).all()):
                good.append((float(seen.fractions[0][0]), float(seen.state.detach().abs().max())))

        with torch.no_grad():
            march(velocity, self.tableau, state, t0, t1, carried, self.steps, look)
        fraction, norm = good[-1]
        start, end = float(t0.detach()), float(t1.detach())
        lost = (~torch.isfinite(out).all(1)).nonzero().squeeze(1).tolist()
        return failure(
            "velocity",
            total=len(state),
            t=start + fraction * (end - start),
            dt=(end - start) / self.steps,
            nfe=self.steps * len(self.tableau.weights),
            norm=norm,
            span=(start, end),
            rows=lost,
        )
