"""Differential equations: values against closed forms, gradients three ways, and what happens when a row breaks."""

import math
import time
import warnings

import pytest
import torch
from torch import nn

from pyroflows.errors import ODESolveError, OptionError, ShapeError
from pyroflows.numerics import Fallback, ode_solvers, solve

GRADIENTS = ("direct", "checkpoint", "adjoint")
OWN = ("dopri5", "bosh3", "euler", "midpoint", "rk4")
DOUBLE = torch.float64


def pairs(*solvers):
    """Each solver with each gradient that it has."""
    return [(s, g) for s in solvers for g in GRADIENTS if s in OWN or g != "checkpoint"]


def every_pair(*solvers):
    return pytest.mark.parametrize(("solver", "gradient"), pairs(*solvers))


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


def stiff(rate):
    return lambda t, y: -rate * (y - torch.cos(t))


# --- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "dopri8", "adaptive_heun"])
def test_linear_field_is_the_matrix_exponential(solver):
    a = torch.randn(3, 3, dtype=DOUBLE)
    y = torch.randn(20, 3, dtype=DOUBLE)
    tol = {"dopri5": 1e-12, "dopri8": 1e-12, "bosh3": 1e-8, "adaptive_heun": 1e-5}[solver]
    out = solve(lambda t, y: y @ a.T, y, 0.0, 1.5, solver=solver, rtol=tol, atol=tol, max_nfe=10**6).state
    exact = y @ torch.linalg.matrix_exp(1.5 * a).T
    assert (out - exact).abs().max() <= 1e3 * tol * (1 + exact.abs().max())


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
def test_oscillator_and_time_dependent_field_within_tolerance(tol):
    y = tensor([1.0, 0.0], [0.0, 2.0], [-3.0, 0.5])
    turned = solve(lambda t, y: torch.stack((y[:, 1], -y[:, 0]), 1), y, 0.0, 2 * math.pi, rtol=tol, atol=tol).state
    assert (turned - y).abs().max() < 30 * tol
    # y' = 2 t y, y = exp(t^2)
    grown = solve(lambda t, y: 2 * t * y, y[:, :1], -1.0, 1.5, rtol=tol, atol=tol).state
    assert (grown / y[:, :1] - math.exp(1.25)).abs()[[0, 2]].max() < 30 * tol * math.exp(1.25)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_fixed_steps_converge_at_their_order(solver, order):
    y = tensor([0.3], [1.0])

    def error(steps):
        out = solve(lambda t, y: torch.sin(y) + t, y, 0.0, 1.0, solver=solver, steps=steps).state
        exact = solve(lambda t, y: torch.sin(y) + t, y, 0.0, 1.0, rtol=1e-13, atol=1e-13).state
        return float((out - exact).abs().max())

    assert math.log2(error(16) / error(32)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "order"), [("dopri5", 5), ("bosh3", 3)])
def test_adaptive_steps_converge_at_their_order(solver, order):
    """Work rises as tolerance to the power -1/order, and the error falls with the tolerance."""
    y = tensor([0.3, -1.0])

    def nfe(tol):
        sol = solve(lambda t, y: torch.sin(4 * y) + t, y, 0.0, 6.0, solver=solver, rtol=tol, atol=tol, max_nfe=10**6)
        return sol.nfe

    fine = 1e-9 if order == 5 else 1e-6
    assert math.log(nfe(fine) / nfe(1e3 * fine)) / math.log(1e3) == pytest.approx(1 / order, rel=0.2)


def test_a_tableau_takes_its_error_from_a_method_one_order_below():
    """Steps of size h: the result's error falls as h^(p + 1), its estimate as h^p."""
    from pyroflows.numerics.runge_kutta import TABLEAUS, take_step

    for name, order in (("dopri5", 5), ("bosh3", 3)):
        tableau, y = TABLEAUS[name], tensor([0.7])
        errors, estimates = [], []
        for h in (0.2, 0.1):
            step = tensor([h])
            end, stages = take_step(lambda t, y: y * torch.cos(t), tableau, (tensor([0.0]), step), y, step)
            errors.append(float((end - 0.7 * math.exp(math.sin(h))).abs()))
            estimates.append(float(sum(w * k for w, k in zip(tableau.error, stages, strict=True)).abs() * h))
        assert math.log2(errors[0] / errors[1]) > order + 0.6
        assert order - 0.4 < math.log2(estimates[0] / estimates[1]) < order + 1.4


@pytest.mark.parametrize("solver", ode_solvers())
def test_every_solver_solves_and_counts(solver):
    calls = []

    def field(t, y):
        calls.append(len(y))
        assert t.shape == (len(y), 1)
        return torch.cos(t) * y

    y = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    steps = None if solver not in ("euler", "midpoint", "rk4", "heun2", "heun3") else 400
    with torch.no_grad():
        sol = solve(field, y, 0.0, 2.0, solver=solver, rtol=1e-5, atol=1e-5, steps=steps)
    assert torch.allclose(sol.state, y * math.exp(math.sin(2.0)), rtol=2e-2 if solver == "euler" else 2e-3)
    assert sol.nfe == sol.work.forward == len(calls)


def test_work_is_less_where_the_field_is_easier_or_the_tolerance_looser():
    y = torch.randn(16, 2, dtype=DOUBLE)

    def nfe(rate, tol):
        return solve(lambda t, y: torch.sin(rate * t) * y, y, 0.0, 1.0, rtol=tol, atol=tol).nfe

    assert nfe(0.0, 1e-6) <= 9  # nothing moves: one step
    assert nfe(1.0, 1e-3) < nfe(1.0, 1e-8) < nfe(30.0, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_dtype_is_kept(dtype):
    y = torch.ones(3, 2, dtype=dtype, requires_grad=True)

    def field(t, y):
        assert t.dtype == y.dtype == dtype
        return -y

    out = solve(field, y, 0, 1).state
    assert out.dtype == dtype
    assert torch.allclose(out.double(), torch.full((3, 2), math.exp(-1.0), dtype=DOUBLE), rtol=2e-2)
    out.sum().backward()
    assert y.grad.dtype == dtype


def test_columns_that_do_not_steer_cost_nothing():
    def field(t, y):
        return torch.cat((torch.ones_like(t), torch.sin(50 * t)), 1)

    y = torch.zeros(4, 2, dtype=DOUBLE)
    assert solve(field, y, 0.0, 1.0, controlled=1).nfe < solve(field, y, 0.0, 1.0).nfe / 5
    assert solve(field, y, 0.0, 1.0, controlled=slice(1, 2)).nfe > solve(field, y, 0.0, 1.0).nfe / 2


# --- rows ------------------------------------------------------------------------------------------------


def test_N14_a_rows_result_does_not_depend_on_its_batch_mates():
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).double()

    def field(t, y, hardness):
        return net(torch.cat((y, t), 1)) + torch.sin(hardness * t) * y

    y = torch.randn(64, 2, dtype=DOUBLE)
    hardness = torch.ones(64, 1, dtype=DOUBLE)
    hardness[13] = 300.0
    options = {"rtol": 1e-3, "atol": 1e-3}
    with torch.no_grad():
        together = solve(field, y, 0.0, 1.0, carried=[hardness], **options)
        backwards = solve(field, y.flip(0), 0.0, 1.0, carried=[hardness.flip(0)], **options).state.flip(0)
        alone = torch.cat([solve(field, y[[i]], 0.0, 1.0, carried=[hardness[[i]]], **options).state for i in range(64)])
    assert (together.state - alone).abs().max() < 1e-10
    assert (together.state - backwards).abs().max() < 1e-10


def test_N14_only_the_hard_row_pays():
    rows = []

    def field(t, y, hardness):
        rows.append(len(y))
        return torch.cos(hardness * t) * y

    hardness = torch.ones(64, 1, dtype=DOUBLE)
    hardness[0] = 200.0
    sol = solve(field, torch.ones(64, 1, dtype=DOUBLE), 0.0, 1.0, carried=[hardness])
    assert sol.nfe > 300
    assert sum(rows) < 64 * 120 + sol.nfe
    exact = torch.exp(torch.sin(hardness) / hardness)
    assert (sol.state - exact).abs().max() < 1e-7


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_N14_gradients_of_rows_do_not_depend_on_batch_mates(gradient):
    y = torch.randn(8, 2, dtype=DOUBLE)
    hardness = tensor(*[[1.0]] * 7, [20.0])

    def pulled(rows):
        start, c = y[rows].requires_grad_(), hardness[rows].requires_grad_()
        out = solve(lambda t, y, c: torch.sin(c * t + y), start, 0.0, 1.0, carried=[c], gradient=gradient).state
        return torch.cat(torch.autograd.grad(out.pow(2).sum(), (start, c)), 1)

    alone = torch.cat([pulled([i]) for i in range(8)])
    assert (pulled(list(range(8))) - alone).abs().max() < 1e-10


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_rows_that_are_not_finite_come_back_as_nan_and_harm_nobody(gradient):
    y = tensor([1.0], [math.nan], [2.0], [math.inf], [3.0]).requires_grad_()
    c = tensor([1.0], [1.0], [1.0], [1.0], [math.nan])
    rate = tensor(0.5).requires_grad_()
    out = solve(lambda t, y, c: -rate * c * y, y, 0.0, 1.0, carried=[c], gradient=gradient, parameters=[rate]).state
    assert out.isnan().squeeze(1).tolist() == [False, True, False, True, True]
    assert torch.allclose(out[[0, 2]], y[[0, 2]] * math.exp(-0.5), atol=1e-7)
    out[[0, 2]].sum().backward()
    assert torch.allclose(rate.grad, tensor(-3 * math.exp(-0.5)), atol=1e-7)
    assert torch.allclose(y.grad[[0, 2]], tensor([math.exp(-0.5)], [math.exp(-0.5)]), atol=1e-7)
    assert (y.grad[[1, 3, 4]] == 0).all()


@every_pair("dopri5", "rk4", "dopri8")
def test_no_rows_and_one_row(solver, gradient):
    rate = torch.tensor(1.0, requires_grad=True)
    for rows in (0, 1):
        y = torch.ones(rows, 3, requires_grad=True)
        out = solve(lambda t, y: -rate * y, y, 0.0, 1.0, solver=solver, gradient=gradient).state
        assert out.shape == (rows, 3)
        (slope,) = torch.autograd.grad(out.sum(), rate)
        assert torch.allclose(slope, torch.tensor(-3 * rows * math.exp(-1.0)), atol=1e-4)


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "dopri8"])
def test_N12_times_equal_reversed_and_of_another_dtype(solver):
    y = torch.randn(5, 2, requires_grad=True)

    def field(t, y):
        return torch.cos(t) * y

    same = solve(field, y, 0.7, 0.7, solver=solver)
    assert torch.equal(same.state, y)
    assert same.state is not y
    there = solve(field, y, 0.0, torch.tensor(1.0, dtype=DOUBLE), solver=solver).state
    back = solve(field, there, torch.tensor(1), 0, solver=solver).state
    assert there.dtype == torch.float32
    assert torch.allclose(there, y * math.exp(math.sin(1.0)), atol=1e-4)
    assert torch.allclose(back, y, atol=1e-4)


def test_N12_end_time_learns_where_it_starts_at_t0():
    t1 = torch.tensor(0.5, requires_grad=True)
    out = solve(lambda t, y: (1 + t) * y, torch.ones(2, 1), 0.5, t1).state
    assert torch.autograd.grad(out.sum(), t1)[0] == 3.0


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "rk4", "dopri8"])
@pytest.mark.parametrize("t1", [0.1, 0.3, 0.7, 1.1])
def test_field_is_never_asked_beyond_the_end(t1, solver):
    """A step that rounds past t1 would make this root NaN."""
    end = torch.tensor(t1)
    out = solve(lambda t, y: torch.sqrt(end - t) * torch.ones_like(y), torch.zeros(3, 1), 0.0, end, solver=solver)
    assert torch.allclose(out.state, torch.full((3, 1), 2 / 3 * t1**1.5), atol=1e-3)


# --- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@every_pair("dopri5", "bosh3", "midpoint", "rk4", "dopri8", "heun3")
def test_gradients_match_the_closed_form(solver, gradient, dtype):
    """y' = k c y cos t: y1 = y0 exp(k c (sin t1 - sin t0))."""
    y = torch.tensor([[1.0, -0.5], [0.3, 2.0], [1.5, 0.1]], dtype=dtype, requires_grad=True)
    c = torch.tensor([[0.5], [1.0], [-1.0]], dtype=dtype, requires_grad=True)
    k, t0, t1 = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (1.2, 0.1, 1.4))
    inputs = (y, c, k, t0, t1)
    exact = y * torch.exp(k * c * (torch.sin(t1) - torch.sin(t0)))
    tol = None if dtype == torch.float32 else 1e-10 if solver in ("dopri5", "dopri8") else 1e-9
    steps = {"midpoint": 300, "rk4": 60, "heun3": 200}.get(solver)
    out = solve(
        lambda t, y, c: k * c * y * torch.cos(t),
        y,
        t0,
        t1,
        solver=solver,
        gradient=gradient,
        carried=[c],
        steps=steps,
        rtol=tol,
        atol=tol,
    ).state
    weights = torch.tensor([1.0, 0.3], dtype=dtype)
    got = torch.autograd.grad((out * weights).sum(), inputs)
    want = torch.autograd.grad((exact * weights).sum(), inputs)
    bound = 1e-4 if dtype == torch.float32 else 1e-4 if solver == "midpoint" else 1e-6 if solver == "heun3" else 1e-7
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < bound * (1 + b.abs().max())


class Conditioned(nn.Module):
    """A velocity that depends on its own weights and on what an outer network made of a context."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Linear(2, 4)
        self.inner = nn.Sequential(nn.Linear(3 + 1 + 4, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, y, context, shared, **options):
        every = torch.tanh(self.outer(context))
        bias = torch.exp(shared)

        def field(t, y, c):
            return self.inner(torch.cat((y, t, c), 1)) * bias

        return solve(field, y, 0.0, 1.0, carried=[every], parameters=[*self.inner.parameters(), bias], **options).state


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_N13_all_parameters_and_contexts_get_the_same_gradients(dtype, mode):
    net = getattr(Conditioned().to(dtype), mode)()
    y, context = torch.randn(9, 3, dtype=dtype), torch.randn(9, 2, dtype=dtype, requires_grad=True)
    shared = torch.zeros(3, dtype=dtype, requires_grad=True)
    found = {}
    for gradient in GRADIENTS:
        out = net(y, context, shared, gradient=gradient)
        found[gradient] = torch.autograd.grad(out.pow(2).sum(), [context, shared, *net.parameters()])
    bound = 1e-4 if dtype == torch.float32 else 1e-7
    for a, b, c in zip(*(found[g] for g in GRADIENTS), strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() < 1e-3 * bound + 1e-5 * bound * a.abs().max() or dtype == torch.float32
        assert (a - b).abs().max() < bound * (1 + a.abs().max())
        assert (a - c).abs().max() < bound * (1 + a.abs().max())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_N13_a_parameter_that_was_not_listed_is_found(gradient):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    raw = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    scale = torch.exp(raw)  # not a leaf, not listed: its leaf is found, and the way there kept
    out = solve(lambda t, y: net(y) * scale, torch.randn(4, 2, dtype=DOUBLE), 0.0, 1.0, gradient=gradient).state
    found = torch.autograd.grad(out.sum(), [raw, *net.parameters()])
    assert all(g.abs().max() > 1e-3 for g in found)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_N13_a_parameter_that_another_was_computed_from_counts_once(gradient):
    w = tensor(0.7).requires_grad_()
    twice = 2 * w
    y = torch.ones(3, 1, dtype=DOUBLE)
    out = solve(lambda t, y: -(w + twice) * y, y, 0.0, 1.0, gradient=gradient, parameters=[w, twice]).state
    (slope,) = torch.autograd.grad(out.sum(), w)
    assert torch.allclose(slope, tensor(-9 * math.exp(-2.1)), atol=1e-7)


@pytest.mark.parametrize("solver", ["dopri5", "euler"])
def test_checkpoints_give_the_discrete_gradient_to_the_last_digits(solver):
    """Coarse steps: far from the exact solution's gradient, yet the same as backpropagation's."""
    y = torch.randn(6, 2, dtype=DOUBLE, requires_grad=True)
    k = tensor(3.0).requires_grad_()
    options = {"rtol": 1e-2, "atol": 1e-2} if solver == "dopri5" else {"steps": 5}
    found = []
    for gradient in ("direct", "checkpoint"):
        out = solve(lambda t, y: torch.sin(k * y + 5 * t), y, 0.0, 2.0, solver=solver, gradient=gradient, **options)
        found.append(torch.autograd.grad(out.state.pow(3).sum(), (y, k)))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-12 * (1 + a.abs().max())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_only_what_needs_a_gradient_is_differentiated(gradient):
    y, k, c, t1 = torch.randn(3, 2), torch.tensor(0.5), torch.ones(3, 1), torch.tensor(1.0)
    everything = {"y": y, "k": k, "c": c, "t1": t1}
    for name, one in everything.items():
        given = {n: v.clone().requires_grad_(n == name) for n, v in everything.items()}
        out = solve(
            lambda t, y, c, k=given["k"]: -k * c * y,
            given["y"],
            0.0,
            given["t1"],
            carried=[given["c"]],
            parameters=[given["k"]],
            gradient=gradient,
        ).state
        (slope,) = torch.autograd.grad(out.sum(), given[name])
        assert slope.shape == one.shape
        assert slope.abs().max() > 0
    with torch.no_grad():
        still = solve(lambda t, y: -k * y, given["y"], 0.0, given["t1"], gradient=gradient).state
    assert not still.requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("field", [lambda t, y: torch.ones_like(y), lambda t, y: torch.cos(t).expand_as(y)])
def test_fields_that_do_not_depend_on_the_state(field, gradient):
    y = torch.zeros(3, 2, requires_grad=True)
    out = solve(field, y, 0.0, 1.0, gradient=gradient).state
    (slope,) = torch.autograd.grad(out.sum(), y)
    assert torch.equal(slope, torch.ones(3, 2))


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_second_derivatives_exist(gradient, solver):
    raw = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)

    def run(y, c, t1, raw):
        k = torch.exp(raw)
        return solve(
            lambda t, y, c: torch.sin(k * y + c * t),
            y,
            0.0,
            t1,
            solver=solver,
            carried=[c],
            parameters=[k],
            gradient=gradient,
            rtol=1e-10,
            atol=1e-10,
        ).state

    inputs = (tensor([0.3]), tensor([-1.0]), tensor(0.3))
    inputs = (*(x.requires_grad_() for x in inputs), raw)
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_runs_twice_on_a_retained_graph(gradient):
    y = torch.randn(3, 2, requires_grad=True)
    out = solve(lambda t, y: torch.sin(y), y, 0.0, 1.0, gradient=gradient).state.sum()
    first = torch.autograd.grad(out, y, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, y)[0])


def test_adjoint_resolves_a_gradient_of_any_size():
    """A mean over many rows makes each row's adjoint small against atol; its relative accuracy stays."""
    y = torch.randn(5, 1, dtype=DOUBLE, requires_grad=True)
    found = []
    for size in (1.0, 1e-12):
        out = solve(lambda t, y: torch.sin(3 * y + t), y, 0.0, 2.0, rtol=1e-6, atol=1e-6).state
        found.append(torch.autograd.grad(size * out.sum(), y)[0] / size)
    assert torch.allclose(found[0], found[1], rtol=1e-9)


def test_adjoint_solves_only_rows_that_have_a_gradient():
    rows = []

    def field(t, y):
        rows.append(len(y))
        return torch.sin(y)

    y = torch.randn(50, 2, requires_grad=True)
    out = solve(field, y, 0.0, 1.0, gradient="adjoint").state
    rows.clear()
    out[3].sum().backward()
    assert max(rows) == 1
    assert (y.grad.abs().sum(1) > 0).nonzero().tolist() == [[3]]


def saved_numbers(gradient, steps):
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    k = torch.ones(2, requires_grad=True)
    y = torch.ones(10, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        solve(lambda t, y: torch.sin(k * y), y, 0.0, 1.0, solver="rk4", steps=steps, gradient=gradient)
    return sum(kept)


def test_memory_of_the_adjoint_does_not_grow_with_steps_and_checkpoints_keep_one_state_a_step():
    assert saved_numbers("adjoint", 5) == saved_numbers("adjoint", 200)
    assert saved_numbers("checkpoint", 200) - saved_numbers("checkpoint", 100) == 100 * 10 * (2 + 4)  # and times
    assert saved_numbers("direct", 200) - saved_numbers("direct", 100) > 4 * 100 * 10 * 2


def test_adjoint_backward_keeps_no_more_graphs_than_one_step_has():
    alive, most = [], [0]
    k = torch.ones(2, requires_grad=True)

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(1)
            most[0] = max(most[0], len(alive))
            ctx.held = Handle()
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Handle:
        def __del__(self):
            alive.pop()

    counts = []
    for steps in (5, 60):
        out = solve(lambda t, y: torch.sin(Watched.apply(k * y)), torch.ones(3, 2), 0.0, 1.0, solver="rk4", steps=steps)
        most[0] = 0
        out.state.sum().backward()
        counts.append(most[0])
    assert counts[0] == counts[1] <= 8


def test_work_of_both_passes_is_counted():
    calls = [0]

    def field(t, y):
        calls[0] += 1
        return -y

    for gradient in GRADIENTS:
        calls[0] = 0
        sol = solve(field, torch.ones(3, 1, requires_grad=True), 0.0, 1.0, gradient=gradient)
        assert sol.nfe == sol.work.forward == calls[0]
        sol.state.sum().backward()
        assert sol.work.forward + sol.work.backward == calls[0]
        assert (sol.work.backward == 0) == (gradient == "direct")


def test_backward_sees_the_precision_of_forward():
    net = nn.Linear(2, 2)
    seen = []

    def field(t, y):
        value = net(y)
        seen.append(value.dtype)
        return value

    for gradient in ("checkpoint", "adjoint"):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            out = solve(field, torch.randn(4, 2), 0.0, 1.0, gradient=gradient, rtol=1e-2, atol=1e-2).state
        assert out.dtype == torch.float32
        out.sum().backward()
        assert set(seen) == {torch.bfloat16}


# --- rows that break -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "dopri8"])
@pytest.mark.parametrize("rate", [1e5, 1e9])
def test_N7_a_stiff_field_stops_at_max_nfe_in_bounded_time(rate, solver):
    start = time.process_time()
    with pytest.raises(ODESolveError, match=r"max_nfe was reached at t=.*stiff") as caught:
        solve(stiff(rate), torch.zeros(4, 1, dtype=DOUBLE), 0.0, 10.0, solver=solver, max_nfe=600)
    assert time.process_time() - start < 2
    error = caught.value
    assert 590 <= error.nfe <= 600
    assert 0 < error.t < 10
    assert error.rows == (0, 1, 2, 3)


def test_N7_a_moderately_stiff_field_is_solved():
    out = solve(stiff(1e3), torch.zeros(2, 1, dtype=DOUBLE), 0.0, 1.0, rtol=1e-6, atol=1e-6).state
    assert (out - math.cos(1.0)).abs().max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@every_pair("dopri5", "rk4", "dopri8", "heun3")
def test_N8_a_velocity_that_is_not_finite_says_so_and_when(solver, gradient, dtype):
    def field(t, y, late):
        return torch.where((t > 0.5) & (late > 0), torch.nan, y)

    y = torch.ones(5, 2, dtype=dtype, requires_grad=True)
    late = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0]], dtype=dtype)
    with pytest.raises(ODESolveError, match="non-finite velocity at t=0") as caught:
        solve(field, y, 0.0, 1.0, solver=solver, gradient=gradient, carried=[late])
    assert 0.4 < caught.value.t < 0.7
    if solver == "dopri5":
        assert "2 of 5 rows" in str(caught.value)
        assert caught.value.t == pytest.approx(0.5, abs=1e-5)
    if solver in OWN:
        assert caught.value.rows == (1, 3)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_N8_a_trial_step_into_the_void_does_not_spoil_values_or_gradients(gradient):
    """The field is NaN where no solution goes, but where a first long step tries it."""
    seen = []

    def field(t, y):
        value = -20 * torch.sqrt(y)  # NaN below 0; y = (1 - 10 t)^2
        seen.append(bool(value.isnan().any()))
        return value

    y = tensor([1.0], [4.0]).requires_grad_()
    out = solve(field, y, 0.0, 0.099, gradient=gradient, rtol=1e-3, atol=1e-3).state
    assert any(seen)
    exact = (y.sqrt() - 0.99) ** 2
    assert (out - exact).abs().max() < 1e-3
    got, want = (torch.autograd.grad(x.sum(), y)[0] for x in (out, exact))
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() < 0.1


def test_N9_a_blow_up_in_finite_time_says_when():
    y = tensor([1.0], [2.0], [0.5])  # y' = y^2 leaves at t = 1 / y0
    with pytest.raises(ODESolveError) as caught:
        solve(lambda t, y: y * y, y, 0.0, 0.9)
    error = caught.value
    assert error.t == pytest.approx(0.5, abs=1e-6)
    assert error.norm > 1e6
    assert error.rows == (1,)
    assert "1 of 3 rows" in str(error)
    assert "finite time" in str(error)


def test_N10_min_step_is_refused():
    with pytest.raises(OptionError, match="min_step"):
        solve(stiff(1e3), torch.zeros(1, 1), 0.0, 1.0, solver="dopri8", options={"min_step": 0.1})


def test_N11_tolerances_below_the_dtype_are_raised_with_a_warning():
    y = torch.ones(3, 2)
    with pytest.warns(UserWarning, match="below what torch.float32 can hold"):
        sol = solve(lambda t, y: -y, y, 0.0, 1.0, rtol=1e-12, atol=1e-12)
    assert sol.nfe < 100
    assert torch.allclose(sol.state, y * math.exp(-1.0), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(lambda t, y: -y, y.double(), 0.0, 1.0, rtol=1e-12, atol=1e-12)


def test_errors_of_the_adjoint_reach_the_caller_of_backward():
    y = torch.ones(2, 1, dtype=DOUBLE, requires_grad=True)

    def run(max_nfe):
        return solve(lambda t, y: torch.sin(9 * y), y, 0.0, 1.0, max_nfe=max_nfe, gradient="adjoint")

    free = run(5000)
    free.state.sum().backward()
    assert free.work.backward > free.work.forward + 10
    short = run(free.work.forward + 5)
    with pytest.raises(ODESolveError, match="from t=1 to t=0: max_nfe") as caught:
        short.state.sum().backward()
    assert any("adjoint" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
@pytest.mark.parametrize("value", [1e20, 1e38, 1e-42])
def test_extreme_states(value, solver, gradient):
    y = torch.tensor([[value, -value], [1.0, 2.0]], requires_grad=True)
    out = solve(lambda t, y: torch.tanh(y), y, 0.0, 1.0, solver=solver, gradient=gradient).state
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), y)[0]).all()


# --- what is asked for -----------------------------------------------------------------------------------


def test_options_that_cannot_be_are_refused():
    def run(state=None, field=lambda t, y: -y, t1=1.0, **options):
        return solve(field, torch.ones(2, 2) if state is None else state, 0.0, t1, **options)

    with pytest.raises(OptionError, match=r"dopri5, bosh3.*dopri8"):
        run(solver="dopri")
    with pytest.raises(OptionError, match="adjoint, checkpoint, direct"):
        run(gradient="backprop")
    with pytest.raises(OptionError, match="checkpoint"):
        run(gradient="checkpoint", solver="dopri8")
    with pytest.raises(OptionError, match="rk4"):
        run(steps=5)
    with pytest.raises(OptionError, match="at least one step"):
        run(steps=0, solver="rk4")
    with pytest.raises(OptionError, match="no options"):
        run(options={"safety": 0.5})
    with pytest.raises(OptionError, match="rtol"):
        run(rtol=-1.0)
    with pytest.raises(OptionError, match="finite times"):
        run(t1=math.inf)
    with pytest.raises(OptionError, match="steers"):
        run(controlled=0)
    with pytest.raises(OptionError, match="scipy_solver"):
        run(solver="scipy_solver", gradient="direct", state=torch.ones(2, 2, requires_grad=True))
    with pytest.raises(ShapeError, match="rows, width"):
        run(state=torch.ones(3))
    with pytest.raises(ShapeError, match="velocity of shape"):
        run(field=lambda t, y: y.sum(1))
    with pytest.raises(ShapeError, match="2 rows"):
        run(carried=[torch.ones(3, 1)])


def test_function_transforms():
    y = torch.randn(5, 4, 2)

    def fixed(y):
        return solve(lambda t, y: torch.sin(y), y, 0.0, 1.0, solver="rk4").state

    assert torch.allclose(torch.func.vmap(fixed)(y), torch.stack([fixed(x) for x in y]), atol=1e-6)

    def adaptive(y):
        return solve(lambda t, y: torch.sin(y), y, 0.0, 1.0).state

    with pytest.raises(OptionError, match="vmap"):
        torch.func.vmap(adaptive)(y)
    compiled = torch.compile(fixed, backend="eager", fullgraph=True)(y[0])
    assert torch.equal(compiled, fixed(y[0]))
    y0 = y[0].clone().requires_grad_()
    want = torch.autograd.grad(adaptive(y0).sum(), y0)[0]
    assert torch.allclose(torch.func.grad(lambda y: adaptive(y).sum())(y[0]), want, atol=1e-4)
    tangent = torch.func.jvp(adaptive, (y[0],), (torch.ones_like(y[0]),))[1]
    assert torch.allclose(tangent, want, atol=1e-4)


# --- what hides values, batches of gradients, fixed steps where others fail ------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("solver", ["dopri5", "dopri8"])
def test_a_solver_that_looks_at_values_says_where_there_are_none(solver):
    def run(y, solver=solver):
        return solve(lambda t, y: torch.sin(y), y, 0.0, 1.0, solver=solver).state

    with pytest.raises(OptionError, match="meta device"):
        run(torch.ones(3, 2, device="meta"))
    with pytest.raises(OptionError, match=r"torch\.jit\.trace would freeze"):
        torch.jit.trace(run, torch.ones(3, 2))
    assert run(torch.ones(3, 2, device="meta"), "rk4").shape == (3, 2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fixed_steps_are_traced():
    def run(y):
        return solve(lambda t, y: torch.sin(y), y, 0.0, 1.0, solver="rk4").state

    y = torch.randn(3, 2)
    assert torch.equal(torch.jit.trace(run, torch.ones(3, 2))(y), run(y))


@every_pair("dopri5", "rk4", "dopri8")
def test_batches_of_gradients(solver, gradient):
    k, c, y = tensor(3.0), torch.randn(3, 1, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    steps = 200 if solver == "rk4" else None

    def run(y, c, k):
        return solve(
            lambda t, y, c: torch.sin(k * y + c * t),
            y,
            0.0,
            1.0,
            solver=solver,
            steps=steps,
            gradient=gradient,
            carried=[c],
            parameters=[k],
        ).state

    inputs = [x.requires_grad_() for x in (y, c, k)]
    out = run(*inputs)
    units = torch.eye(6, dtype=DOUBLE).reshape(6, 3, 2)
    many = torch.autograd.grad(out, inputs, units, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(out, inputs, unit, retain_graph=True) for unit in units), strict=True)
    for got, want in zip(many, one_by_one, strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-7, atol=1e-7)


def hard_rows(**options):
    """Five rows, two of them too stiff for ``max_nfe``; the solution is ``c + exp(-rate t)`` for each."""
    rate = tensor([1.0], [4e4], [2.0], [5e4], [3.0])
    c = tensor([1.0], [2.0], [3.0], [4.0], [5.0]).requires_grad_()
    y = (c + 1).detach().requires_grad_()
    out = solve(lambda t, y, r, c: -r * (y - c), y, 0.0, 0.01, carried=[rate, c], max_nfe=150, **options).state
    return out, c + (y - c) * torch.exp(-rate * 0.01), (y, c)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_N7_a_fallback_takes_only_the_rows_that_fail(gradient):
    with pytest.raises(ODESolveError, match="max_nfe") as caught:
        hard_rows(gradient=gradient)
    assert (caught.value.reason, caught.value.rows) == ("max_nfe", (1, 3))
    steps = Fallback("rk4", steps=400)
    with pytest.warns(UserWarning, match="400 fixed steps of 'rk4'"):
        out, exact, leaves = hard_rows(gradient=gradient, fallback=steps)
    assert (out - exact)[[0, 2, 4]].abs().max() < 1e-9
    assert (out - exact)[[1, 3]].abs().max() < 1e-2
    weights = tensor([1.0], [-2.0], [3.0], [-4.0], [5.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same object does not warn again
        got = torch.autograd.grad((out * weights).sum(), leaves)
        assert torch.equal(hard_rows(gradient=gradient, fallback=steps)[0], out)
    for a, b in zip(got, torch.autograd.grad((exact * weights).sum(), leaves), strict=True):
        assert (a - b)[[0, 2, 4]].abs().max() < 1e-8
        assert (a - b).abs().max() < 5e-2


def test_a_fallback_solves_the_adjoint_where_only_that_fails():
    y = torch.ones(2, 1, dtype=DOUBLE, requires_grad=True)

    def run(**options):
        return solve(lambda t, y: torch.sin(9 * y), y, 0.0, 1.0, gradient="adjoint", **options)

    free = run()
    (want,) = torch.autograd.grad(free.state.sum(), y)
    steps = Fallback("rk4", steps=2000)
    short = run(max_nfe=free.work.forward + 5, fallback=steps)
    assert torch.equal(short.state, free.state)
    with pytest.warns(UserWarning, match="max_nfe"):
        (got,) = torch.autograd.grad(short.state.sum(), y)
    assert torch.allclose(got, want, rtol=1e-6)


def test_a_fallback_is_for_all_rows_of_a_solver_with_common_steps():
    y = torch.zeros(3, 1, dtype=DOUBLE, requires_grad=True)
    with pytest.warns(UserWarning, match="max_nfe"):
        out = solve(stiff(1e3), y, 0.0, 1.0, solver="dopri8", max_nfe=100, fallback=Fallback("rk4", 1000)).state
    assert (out - math.cos(1.0)).abs().max() < 2e-3


def test_N8_N9_a_fallback_is_not_for_a_velocity_that_is_not_finite():
    with pytest.raises(ODESolveError, match="non-finite velocity at t=0") as caught:
        solve(lambda t, y: torch.where(t > 0.5, math.nan, y), torch.ones(2, 1), 0.0, 1.0, fallback="rk4")
    assert caught.value.reason == "velocity"
    with pytest.warns(UserWarning, match="step"), pytest.raises(ODESolveError) as caught:
        solve(lambda t, y: y * y, torch.ones(2, 1, dtype=DOUBLE), 0.0, 2.0, fallback="rk4")
    assert "fallback" in caught.value.__notes__[0]


def test_fallbacks_are_checked():
    for wrong in ("dopri5", "rk5"):
        with pytest.raises(OptionError, match="euler, midpoint, rk4"):
            solve(lambda t, y: y, torch.ones(1, 1), 0.0, 1.0, fallback=wrong)
    with pytest.raises(OptionError, match="one step"):
        Fallback(steps=0)
