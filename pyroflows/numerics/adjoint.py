r"""Gradients of solutions of differential equations: by checkpoints at accepted steps, or by the adjoint.

Chen et al. 2018, arXiv:1806.07366 (the adjoint); Zhuang et al. 2020, arXiv:2006.02493 (checkpoints); Kidger, Chen and
Lyons 2021, arXiv:2009.09457 (the parameters' gradient does not steer the steps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows.errors import ODESolveError, OptionError
from pyroflows.numerics.fallback import in_parts, numbered
from pyroflows.numerics.modes import is_differentiated
from pyroflows.numerics.runge_kutta import Round, Tableau, Velocity, take_step

if TYPE_CHECKING:
    from pyroflows.numerics.ode import Problem

__all__ = ["differentiable_solution"]


def differentiable_solution(
    problem: Problem,
    gradient: str,
    state: Tensor,
    t0: Tensor,
    t1: Tensor,
    carried: tuple[Tensor, ...],
    parameters: Sequence[Tensor],
) -> Tensor:
    """The solution of a problem, with one of its three gradients where any is to be recorded."""
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


def _reach(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether any of the values was computed from any of the tensors."""
    nodes: set[Any] = set()
    leaves = {id(leaf) for value in values for leaf in ([value] if value.is_leaf else _leaves(value, (), nodes))}
    return any(id(tensor) in leaves if tensor.is_leaf else tensor.grad_fn in nodes for tensor in tensors)


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
        problem: Problem,
        gradient: str,
        count: int,
        state: Tensor,
        t0: Tensor,
        t1: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        rounds: list[Round] = []
        watch = rounds.append if gradient == "checkpoint" else None
        out = problem.run(problem.counted("forward"), state, t0, t1, tensors[:count], watch)
        ctx.problem, ctx.gradient, ctx.sizes = problem, gradient, (count, len(tensors))
        kept = [x for seen in rounds for x in (seen.rows, seen.taken, *seen.fractions, seen.state)]
        ctx.save_for_backward(state, t0, t1, out, *tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem, (count, size) = ctx.problem, ctx.sizes
        state, t0, t1, out, *saved = ctx.saved_tensors
        tensors, kept = saved[:size], saved[size:]
        # What was frozen since the solve gets none, as with plain operations.
        given = (state, t0, t1, *tensors)
        needed = [need and x.requires_grad for need, x in zip(ctx.needs_input_grad[3:], given, strict=True)]
        velocity = problem.counted("backward")
        with problem.autocast():
            if is_differentiated(grad):
                steps = _by_steps(problem, velocity, grad, given[: 3 + count], tensors[count:], needed)
                return (None, None, None, *steps)
            rows = _Totals(tensors[:count], needed[3 : 3 + count])
            shared = _Totals(tensors[count:], needed[3 + count :])
            if ctx.gradient == "checkpoint":
                rounds = [kept[start : start + 5] for start in range(0, len(kept), 5)]
                first = _by_checkpoints(problem, velocity, rounds, grad, (t0, t1), needed[1:3], rows, shared)
            else:
                first = _by_adjoint(problem, velocity, grad, state, out, (t0, t1), needed[1:3], rows, shared)
        return (None, None, None, first[0] if needed[0] else None, *first[1:], *rows.sums, *shared.sums)


def _by_steps(
    problem: Problem,
    velocity: Velocity,
    grad: Tensor,
    given: tuple[Tensor, ...],
    shared: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Takes all steps again by "direct", for a second derivative or for a batch of gradients."""
    twice = torch.is_grad_enabled()
    if twice and _reach(given, shared):
        raise OptionError(
            "Only gradient='direct' has second derivatives where the field depends on what the state does."
        )
    with torch.enable_grad():
        # One of them may have been computed from another.
        given = tuple(x.view_as(x) if twice else x.detach().requires_grad_(x.requires_grad) for x in given)
        state, t0, t1, *carried = given
        again = problem.run(velocity, state, t0, t1, carried)
    inputs = [x for x, need in zip((*given, *shared), needed, strict=True) if need]
    found = iter(torch.autograd.grad(again, inputs, grad, create_graph=twice, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _by_checkpoints(
    problem: Problem,
    velocity: Velocity,
    rounds: Sequence[Sequence[Tensor]],
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
    for numbers, mask, begin, finish, start in reversed(rounds):
        taken = mask.squeeze(1).nonzero().squeeze(1)
        if not len(taken):
            continue
        index, begin, finish = (x.index_select(0, taken) for x in (numbers, begin, finish))
        with torch.enable_grad():
            before = start.index_select(0, taken).detach().requires_grad_()
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
    problem: Problem,
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

    def pulled(problem: Problem, live: Tensor) -> Tensor:
        before = [*rows.sums], [*shared.sums]
        its = unit.index_select(0, live)
        both = torch.cat((out.index_select(0, live), grad.index_select(0, live) / its), 1)
        carried = tuple(tensor.index_select(0, live) for tensor in rows.tensors)
        try:
            with numbered(live):
                if problem.tableau is None:
                    both = _adjoint_by_torchdiffeq(problem, velocity, both, t1, t0, carried, live, its, rows, shared)
                else:
                    system = _Adjoint(problem.tableau, velocity, state.shape[1], live, its, rows, shared)
                    both = problem.run(system, both, t1, t0, carried, system.collect, afresh=True)
        except ODESolveError as error:
            rows.sums, shared.sums = before  # what it had come to so far
            error.add_note("This was the adjoint, solved backwards for the gradient; gradient='checkpoint' needs none.")
            raise
        return both[:, state.shape[1] :] * its

    for part, solution in in_parts(problem, live, pulled):
        start = start.index_copy(0, part, solution)
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


def _adjoint_by_torchdiffeq(
    problem: Problem,
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
    largest = problem.control.largest
    long = problem.borrow(right, long, t1, t0, lambda error: largest(error[:count].view_as(both)).max())
    both, *parts = (
        part.view_as(like)
        for part, like in zip(long.split([count, *(x.numel() for x in sources)]), (both, *sources), strict=True)
    )
    rows.add(parts[: len(rows.places)], live)
    shared.add(parts[len(rows.places) :])
    return both
