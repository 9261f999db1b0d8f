r"""Initial value problems, many rows at a time, with gradients by backpropagation, by checkpoints or by the adjoint.

Chen et al. 2018, arXiv:1806.07366 (the adjoint); Zhuang et al. 2020, arXiv:2006.02493 (checkpoints at accepted
steps); Kidger, Chen and Lyons 2021, arXiv:2009.09457 (the parameters' gradient does not steer the steps).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import ODESolveError, OptionError, ShapeError
from pyroflows.numerics.modes import is_plainly_eager
from pyroflows.numerics.runge_kutta import TABLEAUS, Control, Round, Tableau, Velocity, adapt, failure, march, take_step

__all__ = ["Solution", "Work", "ode_solvers", "solve"]

GRADIENTS = ("adjoint", "checkpoint", "direct")


@dataclass
class Work:
    """How many times a field was evaluated.

    Attributes:
        forward: for the solution.
        backward: for its gradient, each time with a vector-Jacobian product; 0 before ``backward()`` has run, and
            with ``gradient="direct"``, which evaluates nothing again.
    """

    forward: int = 0
    backward: int = 0


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
    return (*TABLEAUS, *(name for name in _torchdiffeq_solvers() if name not in TABLEAUS))


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
    gradient: str = "adjoint",
    parameters: Sequence[Tensor] = (),
    carried: Sequence[Tensor] = (),
    controlled: int | slice = slice(None),
    options: Mapping[str, Any] | None = None,
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

    Raises:
        ODESolveError: a velocity is not finite, steps became too small, or ``max_nfe`` was reached.
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
    if not range(state.shape[1])[columns] and state.shape[1]:
        raise OptionError(f"No column steers the steps: expected controlled within {state.shape[1]} columns.")
    given = state.dtype
    # Steps are added up in float32 at least; the field keeps its own precision.
    dtype = torch.promote_types(given, torch.float32)
    tableau = _find_solver(solver, gradient, steps, options)
    control = Control(*_tolerances(rtol, atol, given), max_nfe, state.shape[1], columns)
    work = Work()
    problem = _Problem(field, solver, tableau, control, steps or 20, dict(options or {}), given, work, _autocast(state))
    state, carried = state.to(dtype), tuple(carried)
    t0, t1 = (torch.as_tensor(t, dtype=dtype, device=state.device).reshape(()) for t in (t0, t1))
    eager = is_plainly_eager()
    if not eager and _under_vmap():
        if problem.adaptive:
            raise OptionError(
                f"solver={solver!r} chooses its steps by looking at the state, which vmap hides; expected a batch as "
                "rows of the state, or a solver of fixed steps: 'euler', 'midpoint', 'rk4'."
            )
        out = problem.run(problem.counted("forward"), state, t0, t1, carried)
        return Solution(out.to(given), work.forward, work)
    start, end = float(t0.detach()), float(t1.detach())
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
    if bool(finite.all()):
        out = _differentiable(problem, gradient if eager else "direct", state, t0, t1, carried, parameters)
    else:
        rows = finite.nonzero().squeeze(1)
        out = torch.full_like(state, math.nan)
        if len(rows):
            with _numbered(rows):
                some = tuple(tensor.index_select(0, rows) for tensor in carried)
                part = state.index_select(0, rows)
                part = _differentiable(problem, gradient if eager else "direct", part, t0, t1, some, parameters)
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
    if steps is not None and steps < 1:
        raise OptionError(f"Expected at least one step, got steps={steps}.")
    if tableau is not None:
        if options:
            raise OptionError(f"solver={solver!r} takes no options, got {sorted(options)}.")
        if tableau.error and steps is not None:
            raise OptionError(f"solver={solver!r} chooses its steps itself; leave out steps, or take 'rk4'.")
        return tableau
    if solver not in _torchdiffeq_solvers():
        raise OptionError(f"Expected solver to be one of {', '.join(ode_solvers())}, got {solver!r}.")
    if gradient == "checkpoint":
        raise OptionError(f"gradient='checkpoint' needs one of {', '.join(TABLEAUS)}, got solver={solver!r}.")
    if options and "min_step" in options:
        raise OptionError("min_step would accept steps whose error is above the tolerances; loosen rtol and atol.")
    return None


def _tolerances(rtol: float | None, atol: float | None, dtype: torch.dtype) -> tuple[float, float]:
    floor = 8 * torch.finfo(dtype).eps
    default = max(floor, 1e-9 if dtype == torch.float64 else 1e-5)
    found = []
    for name, value in (("rtol", rtol), ("atol", atol)):
        value = default if value is None else float(value)
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


def _under_vmap() -> bool:
    functorch = torch._C._functorch
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ())


@contextmanager
def _numbered(rows: Tensor) -> Iterator[None]:
    """Errors from inside name rows of the whole batch."""
    try:
        yield
    except ODESolveError as error:
        error.rows = tuple(rows[list(error.rows)].tolist())
        raise


@dataclass
class _Problem:
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
            return _by_torchdiffeq(self, velocity, state, t0, t1, carried)
        if self.tableau.error:
            return adapt(velocity, self.tableau, state, t0, t1, carried, self.control, watch, afresh)
        out = march(velocity, self.tableau, state, t0, t1, carried, self.steps, watch)
        if is_plainly_eager() and not bool(torch.isfinite(out).all()):
            raise self._where_it_broke(velocity, state, t0, t1, carried, out)
        return out

    def _where_it_broke(
        self, velocity: Velocity, state: Tensor, t0: Tensor, t1: Tensor, carried: Sequence[Tensor], out: Tensor
    ) -> ODESolveError:
        """Takes the steps again to find the first one that led to a state that is not finite."""
        assert self.tableau is not None
        nfe, good = self.work.forward, []

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
            count=len(lost),
            total=len(state),
            t=start + fraction * (end - start),
            dt=(end - start) / self.steps,
            nfe=nfe,
            norm=norm,
            span=(start, end),
            rows=lost,
        )


# --- gradients -------------------------------------------------------------------------------------------


def _differentiable(
    problem: _Problem,
    gradient: str,
    state: Tensor,
    t0: Tensor,
    t1: Tensor,
    carried: tuple[Tensor, ...],
    parameters: Sequence[Tensor],
) -> Tensor:
    velocity = problem.counted("forward")
    if not torch.is_grad_enabled():
        return problem.run(velocity, state, t0, t1, carried)
    if gradient == "direct":
        if problem.solver == "scipy_solver":
            raise OptionError("scipy_solver cannot be backpropagated through; expected gradient='adjoint'.")
        return problem.run(velocity, state, t0, t1, carried)
    # A tensor that the field uses but the caller forgot would silently get no gradient: look for such.
    sample = velocity(t0.detach().expand(1, 1), state[:1].detach(), *(tensor[:1].detach() for tensor in carried))
    listed = [tensor for tensor in parameters if tensor.requires_grad]
    leaves = _leaves(sample, listed)
    tensors = list({id(tensor): tensor for tensor in (*listed, *leaves)}.values())
    if _entangled(tensors):
        # One of them was computed from another, and a gradient of steps could not tell the two ways apart.
        return problem.run(velocity, state, t0, t1, carried)
    out: Tensor = _Solve.apply(problem, gradient, len(carried), state, t0, t1, *carried, *tensors)
    return out


def _leaves(value: Tensor, stops: Sequence[Tensor] = (), nodes: set[Any] | None = None) -> list[Tensor]:
    """The leaf tensors that a value was computed from, other than through some tensors."""
    edges = {(tensor.grad_fn, tensor.output_nr) for tensor in stops if tensor.grad_fn is not None}
    seen = set() if nodes is None else nodes
    found, stack = [], [(value.grad_fn, value.output_nr)]
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or node in seen or edge in edges:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(node.next_functions)
    return found


def _entangled(tensors: Sequence[Tensor]) -> bool:
    computed = [tensor for tensor in tensors if tensor.grad_fn is not None]
    given = {id(tensor) for tensor in tensors}
    for tensor in computed:
        nodes: set[Any] = set()
        if any(id(leaf) in given for leaf in _leaves(tensor, (), nodes)):
            return True
        if any(other.grad_fn in nodes for other in computed if other is not tensor):
            return True
    return False


class _Totals:
    """Sums of gradients, one for each tensor, of which some are needed."""

    def __init__(self, tensors: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.tensors = tensors
        self.places = [number for number, need in enumerate(needed) if need]
        self.sums: list[Tensor | None] = [None] * len(tensors)

    def wanted(self, sources: Sequence[Tensor] | None = None) -> list[Tensor]:
        return [(self.tensors if sources is None else sources)[number] for number in self.places]

    def add(self, gradients: Sequence[Tensor | None], index: Tensor | None = None) -> None:
        """Adds to the sums, or to their rows ``index``."""
        for number, gradient in zip(self.places, gradients, strict=True):
            total = self.sums[number]
            if gradient is None:
                continue
            if index is not None:
                total = torch.zeros_like(self.tensors[number]) if total is None else total
                self.sums[number] = total.index_add_(0, index, gradient)
            else:
                self.sums[number] = gradient if total is None else total + gradient


class _Solve(torch.autograd.Function):
    """The state at t1, whose gradient is computed from checkpoints or by the adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: _Problem,
        gradient: str,
        count: int,
        state: Tensor,
        t0: Tensor,
        t1: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        rounds: list[Round] | None = [] if gradient == "checkpoint" else None
        watch = None if rounds is None else rounds.append
        out = problem.run(problem.counted("forward"), state, t0, t1, tensors[:count], watch)
        ctx.problem, ctx.rounds, ctx.count = problem, rounds, count
        ctx.save_for_backward(state, t0, t1, out, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, t0, t1, out, *tensors = ctx.saved_tensors
        problem, count = ctx.problem, ctx.count
        needed = ctx.needs_input_grad[3:]
        velocity = problem.counted("backward")
        with problem.autocast():
            if torch.is_grad_enabled():
                again = problem.run(velocity, state, t0, t1, tensors[:count])
                inputs = [x for x, need in zip((state, t0, t1, *tensors), needed, strict=True) if need]
                found = iter(torch.autograd.grad(again, inputs, grad, create_graph=True, allow_unused=True))
                return (None, None, None, *(next(found) if need else None for need in needed))
            rows = _Totals(tensors[:count], needed[3 : 3 + count])
            shared = _Totals(tensors[count:], needed[3 + count :])
            if ctx.rounds is not None:
                first = _by_checkpoints(problem, velocity, ctx.rounds, grad, (t0, t1), needed[1:3], rows, shared)
            else:
                first = _by_adjoint(problem, velocity, grad, state, out, (t0, t1), needed[1:3], rows, shared)
        return (None, None, None, first[0] if needed[0] else None, *first[1:], *rows.sums, *shared.sums)


def _by_checkpoints(
    problem: _Problem,
    velocity: Velocity,
    rounds: Sequence[Round],
    grad: Tensor,
    span: tuple[Tensor, Tensor],
    needed: Sequence[bool],
    rows: _Totals,
    shared: _Totals,
) -> tuple[Tensor | None, ...]:
    """Takes the recorded steps again, last first, and backpropagates through each."""
    assert problem.tableau is not None
    times = _Totals(span, needed)
    grad = grad.clone()
    for seen in reversed(rounds):
        taken = seen.taken.squeeze(1).nonzero().squeeze(1)
        if not len(taken):
            continue
        index = seen.rows.index_select(0, taken)
        begin, finish = (fraction.index_select(0, taken) for fraction in seen.fractions)
        with torch.enable_grad():
            before = seen.state.index_select(0, taken).detach().requires_grad_()
            carried = _as_leaves([tensor.index_select(0, index) for tensor in rows.tensors], rows)
            t0, t1 = _as_leaves(span, times)
            ends = torch.lerp(t0, t1, begin), torch.lerp(t0, t1, finish)
            step = (finish - begin) * (t1 - t0)
            after, _ = take_step(velocity, problem.tableau, ends, before, step, carried, estimate=False)
        sources = [before, *times.wanted((t0, t1)), *rows.wanted(carried), *shared.wanted()]
        pulled = _pull([after], sources, [grad.index_select(0, index)])
        grad.index_copy_(0, index, torch.zeros_like(before) if pulled[0] is None else pulled[0])
        one, two = 1 + len(times.places), 1 + len(times.places) + len(rows.places)
        times.add(pulled[1:one])
        rows.add(pulled[one:two], index)
        shared.add(pulled[two:])
    return grad, *times.sums


def _by_adjoint(
    problem: _Problem,
    velocity: Velocity,
    grad: Tensor,
    state: Tensor,
    out: Tensor,
    span: tuple[Tensor, Tensor],
    needed: Sequence[bool],
    rows: _Totals,
    shared: _Totals,
) -> tuple[Tensor | None, ...]:
    r"""Solves :math:`da/dt = -a\,\partial f/\partial y` backwards from :math:`a(t_1)`, beside the state."""
    t0, t1 = span
    # The adjoint is linear: each row's is solved in its own unit, so that tolerances mean the same for a sum as for
    # a mean of losses. A row without gradient has nothing to solve.
    unit = grad.abs().amax(1, keepdim=True)
    live = ((unit > 0) & torch.isfinite(unit)).squeeze(1).nonzero().squeeze(1)
    start = torch.where(torch.isfinite(unit), grad, math.nan)
    if len(live):
        unit = unit.index_select(0, live)
        both = torch.cat((out.index_select(0, live), grad.index_select(0, live) / unit), 1)
        carried = tuple(tensor.index_select(0, live) for tensor in rows.tensors)
        try:
            with _numbered(live):
                if problem.tableau is None:
                    both = _adjoint_by_torchdiffeq(problem, velocity, both, t1, t0, carried, live, unit, rows, shared)
                else:
                    system = _Adjoint(problem.tableau, velocity, state.shape[1], live, unit, rows, shared)
                    both = problem.run(system, both, t1, t0, carried, system.collect, afresh=True)
        except ODESolveError as error:
            error.add_note("This was the adjoint, solved backwards for the gradient; gradient='checkpoint' needs none.")
            raise
        start = start.index_copy(0, live, both[:, state.shape[1] :] * unit)
    lost = (~torch.isfinite(start).all(1)).nonzero().squeeze(1)
    value = math.nan if len(lost) else 0.0
    if len(lost) or not len(live):
        rows.add([x.index_select(0, lost).fill_(value) for x in rows.wanted()], lost)
        shared.add([torch.full_like(x, value) for x in shared.wanted()])
    edges: list[Tensor | None] = []
    for need, t, y, a, sign in zip(needed, span, (state, out), (start, grad), (-1, 1), strict=True):
        edges.append((sign * a * velocity(t.expand(len(y), 1), y, *rows.tensors)).sum() if need else None)
    return start, *edges


class _Adjoint:
    """The field beside its adjoint, as a field; and the gradients of all it depends on, step by step.

    Those are integrals along the solution, summed up by the weights of the method over the stages of accepted steps.
    """

    def __init__(
        self,
        tableau: Tableau,
        velocity: Velocity,
        width: int,
        live: Tensor,
        unit: Tensor,
        rows: _Totals,
        shared: _Totals,
    ) -> None:
        self.tableau, self.velocity, self.width = tableau, velocity, width
        self.live, self.unit, self.rows, self.shared = live, unit, rows, shared
        self.source: tuple[Tensor, ...] = ()
        self.leaves: tuple[Tensor, ...] = ()
        self.stages: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor, both: Tensor, *carried: Tensor) -> Tensor:
        state, adjoint = both.split(self.width, 1)
        if len(self.source) != len(carried) or any(x is not y for x, y in zip(self.source, carried, strict=True)):
            self.source, self.leaves = carried, _as_leaves(carried, self.rows)
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            value = self.velocity(t, state, *self.leaves)
        (pulled,) = _pull([value], [state], [adjoint])
        self.stages.append((value, adjoint))
        return torch.cat((value.detach(), torch.zeros_like(adjoint) if pulled is None else -pulled), 1)

    def collect(self, seen: Round) -> None:
        """Adds an attempt's accepted steps to the gradients."""
        stages = self.stages[-1 - len(self.tableau.nodes) :] if self.tableau.error else self.stages
        live = self.live.index_select(0, seen.rows)
        factor = -torch.where(seen.taken, seen.step, 0.0) * self.unit.index_select(0, seen.rows)
        used = [(v, w * factor * a) for w, (v, a) in zip(self.tableau.weights, stages, strict=False) if w != 0]
        if bool(seen.taken.any()):
            sources = [*self.rows.wanted(self.leaves), *self.shared.wanted()]
            pulled = _pull([value for value, _ in used], sources, [weight for _, weight in used])
            self.rows.add(pulled[: len(self.rows.places)], live)
            self.shared.add(pulled[len(self.rows.places) :])
        self.stages.clear()


def _as_leaves(tensors: Sequence[Tensor], totals: _Totals) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_(number in totals.places) for number, x in enumerate(tensors))


def _pull(values: Sequence[Tensor], sources: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Vector-Jacobian products; None for what the values do not depend on."""
    kept = [(value, weight) for value, weight in zip(values, weights, strict=True) if value.requires_grad]
    if not kept or not sources:
        return [None] * len(sources)
    # The graph is kept because part of it may belong to the caller: a context that another network computed.
    return list(
        torch.autograd.grad([v for v, _ in kept], sources, [w for _, w in kept], retain_graph=True, allow_unused=True)
    )


# --- torchdiffeq -----------------------------------------------------------------------------------------


def _torchdiffeq_solvers() -> Mapping[str, Any]:
    from torchdiffeq._impl.odeint import SOLVERS  # at first use: it imports scipy

    solvers: Mapping[str, Any] = SOLVERS
    return solvers


def _odeint(
    problem: _Problem,
    right: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    t0: Tensor,
    t1: Tensor,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The solution by torchdiffeq of ``dy/ds = (t1 - t0) f(t, y)`` at s = 1, with its failures told as ours."""
    from torchdiffeq import odeint
    from torchdiffeq._impl.solvers import FixedGridODESolver

    control, span = problem.control, (float(t0.detach()), float(t1.detach()))
    last = [span[0], math.nan]
    side = [0]

    def describe(why: str, t: Tensor | None = None, y: Tensor | None = None) -> ODESolveError:
        return failure(
            why,
            count=len(state) if state.ndim == 2 else 1,
            total=len(state) if state.ndim == 2 else 1,
            t=last[0] if t is None else float(t.detach()),
            dt=math.nan,
            nfe=side[0],
            norm=last[1] if y is None else float(y.detach().abs().max()),
            span=span,
        )

    def scaled(s: Tensor, y: Tensor) -> Tensor:
        t = torch.lerp(t0, t1, s.to(y.dtype))
        if side[0] >= control.max_nfe:
            raise describe("max_nfe", t, y)
        side[0] += 1
        value = right(t, y)
        last[:] = float(t.detach()), float(y.detach().abs().max())
        if not bool(torch.isfinite(value).all()):
            raise describe("velocity", t, y)
        return value * (t1 - t0)

    options = {"norm": norm, **problem.options}
    if issubclass(_torchdiffeq_solvers()[problem.solver], FixedGridODESolver) and "step_size" not in options:
        grid = torch.linspace(0, 1, problem.steps + 1, dtype=state.dtype, device=state.device)
        options.setdefault("grid_constructor", lambda f, y, t: grid)
    ends = torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
    try:
        out: Tensor = odeint(
            scaled, state, ends, rtol=control.rtol, atol=control.atol, method=problem.solver, options=options
        )[-1]
    except AssertionError as error:
        raise describe("step") from error
    if out.shape != state.shape or not bool(torch.isfinite(out).all()):
        raise describe("velocity")
    return out


def _by_torchdiffeq(
    problem: _Problem, velocity: Velocity, state: Tensor, t0: Tensor, t1: Tensor, carried: Sequence[Tensor]
) -> Tensor:
    return _odeint(
        problem,
        lambda t, y: velocity(t.expand(len(y), 1), y, *carried),
        state,
        t0,
        t1,
        lambda ratio: problem.control.largest(ratio).max(),
    )


def _adjoint_by_torchdiffeq(
    problem: _Problem,
    velocity: Velocity,
    both: Tensor,
    t1: Tensor,
    t0: Tensor,
    carried: Sequence[Tensor],
    live: Tensor,
    unit: Tensor,
    rows: _Totals,
    shared: _Totals,
) -> Tensor:
    """State, adjoint and every gradient as one long state, of which the first two steer the steps."""
    count = both.numel()
    leaves = _as_leaves(carried, rows)
    sources = [*rows.wanted(leaves), *shared.wanted()]

    def right(t: Tensor, long: Tensor) -> Tensor:
        state, adjoint = long[:count].view_as(both).split(problem.control.width, 1)
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            value = velocity(t.expand(len(state), 1), state, *leaves)
        pulled = _pull([value], [state, *sources], [adjoint])
        weighted = _pull([value], sources, [adjoint * unit])
        change = torch.zeros_like(adjoint) if pulled[0] is None else -pulled[0]
        rest = [torch.zeros_like(x) if g is None else -g for x, g in zip(sources, weighted, strict=True)]
        return torch.cat([torch.cat((value.detach(), change), 1).flatten(), *(x.flatten().to(long) for x in rest)])

    long = torch.cat([both.flatten(), both.new_zeros(sum(x.numel() for x in sources))])
    long = _odeint(
        problem, right, long, t1, t0, lambda ratio: problem.control.largest(ratio[:count].view_as(both)).max()
    )
    both, *parts = (
        part.view_as(like)
        for part, like in zip(long.split([count, *(x.numel() for x in sources)]), (both, *sources), strict=True)
    )
    rows.add(parts[: len(rows.places)], live)
    shared.add(parts[len(rows.places) :])
    return both
