"""Velocity fields and traces of Jacobians: exact, estimated, differentiated."""

import copy
import io
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from pyroflows.errors import ContextError, OptionError, ShapeError
from pyroflows.nets import PotentialGradient, UserVelocity, Velocity, VelocityMLP, as_velocity
from pyroflows.numerics import (
    draw_probes,
    exact_divergence,
    hutch_plus_plus,
    hutchinson,
    sum_last,
    total_derivative,
)

f64 = torch.float64


def shaken(net, scale=2.0):
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, scale)
    return net


def jacobians(velocity, t, x, context=None):
    """One row at a time, by autograd: [B, D, D]."""

    def row(i):
        time = t[i] if t.dim() else t
        given = None if context is None else context[i]
        return torch.autograd.functional.jacobian(lambda r: velocity(time, r, given), x[i], create_graph=True)

    return torch.stack([row(i) for i in range(len(x))])


def closely(got, expected, scale):
    return bool(((got - expected).abs() <= 1e-10 * max(1.0, torch.as_tensor(scale).detach().item())).all())


MLPS = list(itertools.product(["concat", "concatsquash", "film"], [False, True], [1, 2, 3, 4], [0, 2]))
SMOOTH = ["tanh", "sigmoid", "softplus", "silu", "gelu", "elu", nn.LogSigmoid, nn.Softplus(beta=2.0)]


def fields():
    """How to build one of every kind, by name."""
    for conditioning, residual, layers, context_dim in MLPS:
        options = {"context_dim": context_dim, "hidden_dims": (7,) * layers}
        build = partial(VelocityMLP, 3, conditioning=conditioning, residual=residual, **options)
        yield f"{conditioning}-{residual}-{layers}-{context_dim}", build
    for layers, context_dim in itertools.product([1, 2, 4], [0, 2]):
        build = partial(PotentialGradient, 3, context_dim=context_dim, hidden_dims=(7,) * layers)
        yield f"potential-{layers}-{context_dim}", build


FIELDS = dict(fields())


def points(velocity, rows=4, dtype=f64):
    context = torch.randn(rows, velocity.context_dim, dtype=dtype) if velocity.context_dim else None
    return torch.randn(rows, velocity.input_dim, dtype=dtype), context


# --- closed forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_divergence_is_the_trace_of_autograds_jacobian(name, scale):
    velocity = shaken(FIELDS[name]().double(), scale)
    x, context = points(velocity)
    for t in (torch.rand((), dtype=f64), torch.rand(4, 1, dtype=f64)):
        matrix = jacobians(velocity, t, x, context)
        largest = matrix.abs().max()
        value, divergence = velocity.with_divergence(t, x, context)
        assert closely(value, velocity(t, x, context), value.abs().max())
        assert closely(divergence, matrix.diagonal(0, 1, 2).sum(-1), largest)
        # The products that the Jacobian's norm is estimated from, and what they say with a probe a dimension.
        basis = torch.eye(3, dtype=f64).unsqueeze(1).expand(3, 4, 3)
        trace = velocity.trace(t, x, context, basis)
        assert closely(trace.products, matrix.movedim(1, 0), largest)
        assert closely(3 * trace.squared_norm, matrix.square().sum((-2, -1)), largest**2)
        assert bool((trace.standard_error == 0).all())


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_activation_knows_its_slope(activation, layers):
    velocity = shaken(VelocityMLP(3, hidden_dims=(7,) * layers, activation=activation).double())
    x, t = 3 * torch.randn(5, 3, dtype=f64), torch.rand((), dtype=f64)
    matrix = jacobians(velocity, t, x)
    divergence = velocity.with_divergence(t, x)[1]
    assert closely(divergence, matrix.diagonal(0, 1, 2).sum(-1), matrix.abs().max())
    leaves = list(velocity.parameters())
    got = torch.autograd.grad(divergence.sum(), leaves, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(matrix.diagonal(0, 1, 2).sum(), leaves, allow_unused=True, materialize_grads=True)
    largest = max(g.abs().max() for g in expected)
    assert all(closely(a, b, largest) for a, b in zip(got, expected, strict=True))


def test_unequal_widths_and_one_dimension():
    for widths in [(5, 9), (9, 4, 6), (3,)]:
        velocity = shaken(VelocityMLP(1, hidden_dims=widths).double())
        x = torch.randn(6, 1, dtype=f64)
        matrix = jacobians(velocity, torch.tensor(0.3, dtype=f64), x)
        divergence = velocity.with_divergence(torch.tensor(0.3, dtype=f64), x)[1]
        assert closely(divergence, matrix[:, 0, 0], matrix.abs().max())


@pytest.mark.parametrize(
    "velocity",
    [
        VelocityMLP(2, context_dim=1, hidden_dims=(4, 4), conditioning="film", residual=True),
        VelocityMLP(2, context_dim=1, hidden_dims=(4, 4), conditioning="concatsquash", activation="silu"),
        VelocityMLP(2, context_dim=1, hidden_dims=(3, 3, 3), activation="gelu"),
        PotentialGradient(2, context_dim=1, hidden_dims=(4, 4)),
    ],
    ids=["film", "squash", "deep", "potential"],
)
def test_the_divergence_has_first_and_second_derivatives(velocity):
    velocity = shaken(copy.deepcopy(velocity).double(), 1.0)
    names = [name for name, _ in velocity.named_parameters()]

    def both(t, x, context, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(
            _Both(velocity), {f"velocity.{k}": v for k, v in given.items()}, (t, x, context)
        )

    inputs = (torch.rand((), dtype=f64), torch.randn(2, 2, dtype=f64), torch.randn(2, 1, dtype=f64))
    inputs = tuple(i.requires_grad_() for i in (*inputs, *(p.detach().clone() for p in velocity.parameters())))
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(lambda t, x: both(t, x, *inputs[2:]), inputs[:2])


class _Both(nn.Module):
    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, t, x, context):
        return self.velocity.with_divergence(t, x, context)


def test_a_potentials_jacobian_is_symmetric_and_its_quadratic_part_known():
    velocity = shaken(PotentialGradient(3, context_dim=2, hidden_dims=(6, 6, 6)).double())
    x, context = points(velocity)
    matrix = jacobians(velocity, torch.tensor(0.7, dtype=f64), x, context)
    assert closely(matrix, matrix.mT, matrix.abs().max())
    with torch.no_grad():
        velocity.readout.zero_()
        velocity.slant.zero_()
        velocity.steering.bias.zero_()
        velocity.steering.context_weight.zero_()
    square = velocity.quadratic.detach()
    square = square / (1 + square.square().sum() / 8).sqrt()
    value, divergence = velocity.with_divergence(0.0, x, context)
    assert torch.allclose(value, -x @ square.mT @ square, atol=1e-12)
    assert torch.allclose(divergence, -square.square().sum().expand(4), atol=1e-12)


@pytest.mark.parametrize("name", FIELDS)
def test_the_field_starts_near_zero_and_with_gradients(name):
    torch.manual_seed(1)
    velocity = FIELDS[name]()
    x, context = points(velocity, 64, torch.float32)
    value, divergence = velocity.with_divergence(torch.tensor(0.5), x, context)
    assert value.abs().max() < 0.2
    assert divergence.abs().mean() / 3 < 0.1
    grads = torch.autograd.grad(value.square().sum() + divergence.sum(), list(velocity.parameters()), allow_unused=True)
    assert all(g is not None and bool(g.isfinite().all()) and bool((g != 0).any()) for g in grads)


@pytest.mark.parametrize("conditioning", ["concat", "concatsquash", "film"])
def test_parameters_of_zero_are_no_motion(conditioning):
    velocity = shaken(VelocityMLP(3, context_dim=2, conditioning=conditioning), 0.0)
    x, context = points(velocity, 5, torch.float32)
    value, divergence = velocity.with_divergence(torch.tensor(0.5), x, context)
    assert bool((value == 0).all())
    assert bool((divergence == 0).all())


def test_time_and_context_reach_every_layer_and_gates_matter():
    for conditioning in ("concat", "concatsquash", "film"):
        velocity = shaken(VelocityMLP(2, context_dim=3, hidden_dims=(5, 5), conditioning=conditioning).double(), 1.0)
        x, context = points(velocity)
        t = torch.rand(4, 1, dtype=f64)
        t.requires_grad_()
        context.requires_grad_()
        value, divergence = velocity.with_divergence(t, x, context)
        for out in (value.sum(), divergence.sum()):
            grads = torch.autograd.grad(out, [t, context], retain_graph=True)
            assert all(bool((g.abs() > 1e-12).all()) for g in grads)


# --- shapes, dtypes, numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["film-True-2-2", "concat-False-3-2", "concatsquash-False-1-2", "potential-2-2"])
def test_batches_broadcast_and_rows_stay_apart(name):
    velocity = shaken(FIELDS[name]().double())
    x, context = torch.randn(4, 5, 3, dtype=f64), torch.randn(4, 5, 2, dtype=f64)
    t = torch.rand(4, 5, 1, dtype=f64)
    value, divergence = velocity.with_divergence(t, x, context)
    assert (value.shape, divergence.shape) == ((4, 5, 3), (4, 5))
    one = velocity.with_divergence(t[2, 3], x[2, 3], context[2, 3])
    assert torch.allclose(one[0], value[2, 3], rtol=1e-12, atol=1e-12)
    assert torch.allclose(one[1], divergence[2, 3], rtol=1e-12, atol=1e-10)
    # A context, or a time, with more rows than the state.
    for time in (0.3, torch.tensor(0.3, dtype=f64), torch.rand(5, 1, dtype=f64)):
        for state, given in [(x[0, 0], context[0]), (x, context[0, 0]), (x, context[:, :1]), (x[0, :1], context)]:
            value, divergence = velocity.with_divergence(time, state, given)
            times = time.shape[:-1] if isinstance(time, torch.Tensor) and time.dim() else ()
            batch = torch.broadcast_shapes(state.shape[:-1], given.shape[:-1], times)
            assert (value.shape, divergence.shape) == ((*batch, 3), batch)
            generic = Velocity.with_divergence(velocity, time, state, given)
            assert torch.allclose(generic[1], divergence, rtol=1e-10, atol=1e-10)
    for rows in (0, 1):
        value, divergence = velocity.with_divergence(torch.tensor(0.1, dtype=f64), x[0, :rows], context[0, :rows])
        assert (value.shape, divergence.shape) == ((rows, 3), (rows,))


BIG = [0.0, 1e-40, -7.0, 1e4, 1e8, 1e20, -1e20, 1e38, -3e38]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softplus", "silu", "gelu", "elu"])
@pytest.mark.parametrize("conditioning", ["concat", "concatsquash", "film"])
def test_finite_inputs_have_finite_values_and_gradients(activation, conditioning):
    x = torch.tensor(list(itertools.product(BIG, repeat=3))[::5])
    for layers, residual, scale in [(1, False, 1.0), (2, False, 30.0), (2, True, 1.0), (3, True, 30.0)]:
        build = partial(VelocityMLP, 3, context_dim=1, activation=activation, conditioning=conditioning)
        _all_finite(shaken(build(hidden_dims=(6,) * layers, residual=residual), scale), x)


def test_finite_inputs_have_finite_values_and_gradients_under_a_potential():
    for layers, scale in itertools.product([1, 2, 3], [1.0, 30.0]):
        _all_finite(
            shaken(PotentialGradient(3, context_dim=1, hidden_dims=(6,) * layers), scale),
            torch.tensor(list(itertools.product(BIG, repeat=3))[::5]),
        )


def _all_finite(velocity, x):
    x.requires_grad_()
    for size in (1.0, -1e20):
        value, divergence = velocity.with_divergence(torch.tensor(0.5), x, torch.full((len(x), 1), size))
        leaves = [x, *velocity.parameters()]
        first = torch.autograd.grad(value.sum() + divergence.sum(), leaves, create_graph=True)
        (second,) = torch.autograd.grad(first[0].sum(), [x], allow_unused=True, materialize_grads=True)
        assert all(bool(out.isfinite().all()) for out in (value, divergence, *first, second))


def test_the_divergence_is_right_at_large_states_too():
    for activation, size in itertools.product(["tanh", "silu", "gelu"], [1e6, 1e12, 1e25]):
        velocity = shaken(VelocityMLP(3, hidden_dims=(6, 6), activation=activation).double(), 1.0)
        x = size * torch.randn(8, 3, dtype=f64)
        matrix = jacobians(velocity, torch.tensor(0.5, dtype=f64), x)
        divergence = velocity.with_divergence(torch.tensor(0.5, dtype=f64), x)[1]
        assert closely(divergence, matrix.diagonal(0, 1, 2).sum(-1), matrix.abs().max())
    potential = shaken(PotentialGradient(3, hidden_dims=(6, 6)).double(), 1.0)
    x = torch.tensor([[1e7, 1.0, -1e9], [1e12, -1e12, 1e12]], dtype=f64)
    matrix = jacobians(potential, torch.tensor(0.5, dtype=f64), x)
    assert closely(potential.with_divergence(0.5, x)[1], matrix.diagonal(0, 1, 2).sum(-1), matrix.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_single(dtype):
    velocity = shaken(VelocityMLP(3, hidden_dims=(8, 8)), 0.7)
    x = torch.randn(20, 3).to(dtype)
    halved = copy.deepcopy(velocity).to(dtype)
    value, divergence = halved.with_divergence(torch.tensor(0.5, dtype=dtype), x)
    assert (value.dtype, divergence.dtype) == (dtype, torch.float32)
    exact = copy.deepcopy(halved).float().with_divergence(0.5, x.float())
    assert torch.allclose(divergence, exact[1], atol=1e-5)
    assert torch.equal(value, exact[0].to(dtype))
    # A state with more digits than the parameters keeps them.
    assert halved(0.5, x.double()).dtype == f64


def test_one_row_of_nan_harms_no_other():
    for velocity in (shaken(VelocityMLP(3, hidden_dims=(5, 5))), shaken(PotentialGradient(3))):
        x = torch.randn(4, 3)
        expected = velocity.with_divergence(0.5, x)
        x[1] = math.nan
        got = velocity.with_divergence(0.5, x)
        keep = [0, 2, 3]
        assert torch.equal(got[0][keep], expected[0][keep])
        assert torch.equal(got[1][keep], expected[1][keep])
        assert bool(got[1][1].isnan())


@pytest.mark.parametrize("name", ["film-True-2-2", "concat-False-3-0", "potential-2-2"])
def test_velocities_copy_save_vmap_compile_and_move(name):
    velocity = shaken(FIELDS[name](), 1.0)
    x, context = points(velocity, 5, torch.float32)
    expected = velocity.with_divergence(0.5, x, context)
    buffer = io.BytesIO()
    pickle.dump(velocity, buffer)
    again = pickle.loads(buffer.getvalue())
    for other in (again, copy.deepcopy(velocity)):
        assert all(map(torch.equal, other.with_divergence(0.5, x, context), expected))
    compiled = torch.compile(velocity.with_divergence, backend="eager", fullgraph=True)(0.5, x, context)
    assert all(map(torch.allclose, compiled, expected))
    dims = (0, None if context is None else 0)
    rows = torch.func.vmap(lambda r, c: velocity.with_divergence(0.5, r, c), dims)(x, context)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rows, expected, strict=True))
    velocity.to("meta")
    assert all(p.is_meta for p in velocity.state_dict().values())


# --- modules of users ------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, context_dim=0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 + context_dim, 9), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, t, x, context=None):
        return t * self.net(x if context is None else torch.cat([x, context.expand(*x.shape[:-1], -1)], -1))


class Own(Plain):
    def with_divergence(self, t, x, context=None):
        return self(t, x, context), torch.full(x.shape[:-1], 42.0)


class OldFunction(torch.autograd.Function):
    """Neither vectorised nor with a forward rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


@pytest.mark.parametrize("context_dim", [0, 2])
def test_any_module_is_a_velocity(context_dim):
    velocity = as_velocity(shaken(Plain(context_dim).double()), 3, context_dim)
    x, context = points(velocity)
    t = torch.tensor(0.7, dtype=f64)
    matrix = jacobians(velocity, t, x, context)
    trace = velocity.trace(t, x, context)
    assert closely(trace.divergence, matrix.diagonal(0, 1, 2).sum(-1), matrix.abs().max())
    assert closely(trace.squared_norm, matrix.square().sum((-2, -1)), matrix.square().max())
    leaves = list(velocity.parameters())
    got = torch.autograd.grad(trace.divergence.sum(), leaves, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(matrix.diagonal(0, 1, 2).sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all(closely(a, b, 100) for a, b in zip(got, expected, strict=True))


def test_a_modules_own_divergence_is_used():
    velocity = as_velocity(Own(), 3)
    assert bool((velocity.with_divergence(0.5, torch.zeros(5, 3))[1] == 42).all())
    trace = velocity.trace(0.5, torch.zeros(5, 3), probes=draw_probes(torch.zeros(5, 3), 4))
    assert bool((trace.divergence == 42).all())
    assert trace.products.shape == (4, 5, 3)


def test_a_velocity_of_these_widths_is_itself():
    velocity = VelocityMLP(3, context_dim=2)
    assert as_velocity(velocity, 3, 2) is velocity
    assert isinstance(as_velocity(Plain(), 3), UserVelocity)


# --- traces ----------------------------------------------------------------------------------------------


def mixing(dim, rank=None):
    """A function with a full Jacobian, or one of a given rank, everywhere different."""
    rank = dim if rank is None else rank
    down, up = torch.randn(dim, rank, dtype=f64) / dim**0.5, torch.randn(rank, dim, dtype=f64)
    return lambda x: torch.sin(x @ down + 1) @ up


def traces_of(function, x):
    return torch.stack([torch.autograd.functional.jacobian(function, row).trace() for row in x])


@pytest.mark.parametrize(("rows", "dim"), [(1, 7), (40, 7), (600, 3), (3, 1)])
def test_exact_divergence_with_few_rows_and_with_many(rows, dim):
    function, x = mixing(dim), torch.randn(rows, dim, dtype=f64)
    trace = exact_divergence(function, x)
    assert torch.allclose(trace.divergence[:20], traces_of(function, x[:20]), atol=1e-12)
    assert torch.allclose(trace.value, function(x))
    shaped = exact_divergence(function, x.reshape(rows, 1, 1, dim))
    assert torch.allclose(shaped.divergence, trace.divergence.reshape(rows, 1, 1))
    assert exact_divergence(function, x[:0]).divergence.shape == (0,)


def test_functions_without_a_vectorised_rule_work():
    x = torch.randn(5, 3, dtype=f64)
    for given in (x, x.clone().requires_grad_()):
        trace = exact_divergence(OldFunction.apply, given)
        assert torch.allclose(trace.divergence, 3 * x.square().sum(-1))
        estimate = hutchinson(OldFunction.apply, given, draw_probes(given, 2))
        assert torch.allclose(estimate.divergence, 3 * x.square().sum(-1))


@pytest.mark.parametrize("mode", ["graph", "no_grad", "inference", "vmap"])
def test_traces_do_not_depend_on_what_is_recorded(mode):
    function, x = mixing(4), torch.randn(6, 4, dtype=f64)
    probes = draw_probes(x, 4)
    time = torch.tensor(0.3, dtype=f64)

    def everything(x, probes):
        return (
            exact_divergence(function, x).divergence,
            hutchinson(function, x, probes).divergence,
            hutch_plus_plus(function, x, probes).divergence,
            *total_derivative(lambda t, x: t * function(x), time, x),
        )

    expected = everything(x.clone().requires_grad_(), probes)
    assert all(out.requires_grad for out in expected)
    if mode == "graph":
        got = everything(x, probes)  # nothing to differentiate, so nothing recorded
    elif mode == "no_grad":
        with torch.no_grad():
            got = everything(x.clone().requires_grad_(), probes)
    elif mode == "inference":
        with torch.inference_mode():
            got = everything(x, probes)
    else:
        got = torch.func.vmap(everything, (0, 1))(x, probes)
    assert not any(out.requires_grad for out in got)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(got, expected, strict=True))


def test_a_closed_over_function_of_the_input_counts_as_constant():
    x = torch.randn(5, 3, dtype=f64, requires_grad=True)
    context = x.sum(-1, keepdim=True)
    assert torch.allclose(exact_divergence(lambda y: y * context, x).divergence, 3 * context.squeeze(-1))
    assert torch.allclose(hutchinson(lambda y: y * context, x, draw_probes(x)).divergence, 3 * context.squeeze(-1))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_says_how_far_off(kind):
    function, x = mixing(5), torch.randn(3, 5, dtype=f64)
    exact = exact_divergence(function, x)
    estimate = hutchinson(function, x, draw_probes(x, 4096, kind))
    assert bool(((estimate.divergence - exact.divergence).abs() < 4 * estimate.standard_error).all())
    assert bool(((estimate.divergence - exact.divergence).abs() > 0).all())
    spread = estimate.samples.std(0)
    assert torch.allclose(estimate.standard_error, spread / 64)
    norms = sum_last(estimate.products.square())
    assert bool(((estimate.squared_norm - exact.squared_norm).abs() < 4 * norms.std(0) / 64 + 1e-9).all())
    # Batches of probes: the variance falls as one over their number.
    few = estimate.samples.reshape(512, 8, 3).mean(1).var(0)
    assert torch.allclose(8 * few, spread**2, rtol=0.25)


def test_N16_several_probes_are_averaged_and_not_added():
    x = torch.randn(6, 4, dtype=f64)
    for count in (1, 2, 7):
        estimate = hutchinson(lambda x: 3 * x, x, draw_probes(x, count))
        assert torch.allclose(estimate.divergence, torch.full((6,), 12.0, dtype=f64))
        assert torch.allclose(estimate.squared_norm, torch.full((6,), 36.0, dtype=f64))
        assert bool((estimate.standard_error == (math.inf if count == 1 else 0)).all())


def test_hutchinson_equals_its_formula_and_so_do_its_gradients():
    velocity = shaken(VelocityMLP(3, hidden_dims=(7, 7)).double(), 1.0)
    x, t = torch.randn(4, 3, dtype=f64, requires_grad=True), torch.tensor(0.5, dtype=f64)
    probes = draw_probes(x, 2, "gaussian")
    estimate = hutchinson(lambda x: velocity(t, x), x, probes)
    matrix = jacobians(velocity, t, x)
    expected = torch.einsum("nbi,bij,nbj->nb", probes, matrix, probes).mean(0)
    assert closely(estimate.divergence, expected, 100)
    leaves = [x, *velocity.parameters()]
    got, wanted = (
        torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (estimate.divergence, expected)
    )
    assert all(closely(a, b, 100) for a, b in zip(got, wanted, strict=True))


def test_hutch_plus_plus_is_exact_for_low_rank_and_unbiased_otherwise():
    x = torch.randn(5, 12, dtype=f64)
    low = mixing(12, rank=3)
    exact = exact_divergence(low, x)
    estimate = hutch_plus_plus(low, x, draw_probes(x, 8, "gaussian"))
    assert torch.allclose(estimate.divergence, exact.divergence, atol=1e-9)
    full = mixing(12)
    exact = exact_divergence(full, x)
    rows = x.expand(2048, 5, 12)
    estimate = hutch_plus_plus(full, rows, draw_probes(rows, 6))
    error = estimate.divergence.std(0) / math.sqrt(2048)
    assert bool(((estimate.divergence.mean(0) - exact.divergence).abs() < 4 * error).all())
    norm_error = estimate.squared_norm.std(0) / math.sqrt(2048)
    assert bool(((estimate.squared_norm.mean(0) - exact.squared_norm).abs() < 4 * norm_error).all())
    # As many directions as dimensions, and more: nothing is left to estimate.
    for function in (full, lambda x: 0 * x):
        every = hutch_plus_plus(function, x, draw_probes(x, 30))
        assert torch.allclose(every.divergence, exact_divergence(function, x).divergence, atol=1e-9)


def test_hutch_plus_plus_has_finite_gradients_where_the_jacobian_has_no_rank():
    weight = torch.zeros(4, 4, requires_grad=True)
    x = torch.randn(5, 4)
    estimate = hutch_plus_plus(lambda x: x @ weight, x, draw_probes(x, 8))
    (grad,) = torch.autograd.grad(estimate.divergence.mean(), weight)
    assert torch.allclose(grad, torch.eye(4), atol=1e-5)


def test_a_linear_field_has_its_trace_everywhere():
    matrix = torch.randn(6, 6, dtype=f64)
    x = torch.randn(7, 6, dtype=f64)
    expected = matrix.trace().expand(7)
    assert torch.allclose(exact_divergence(lambda x: x @ matrix.mT, x).divergence, expected, atol=1e-12)
    assert torch.allclose(exact_divergence(lambda x: x @ matrix.mT, x).squared_norm, matrix.square().sum())
    with torch.no_grad():
        value, derivative = total_derivative(lambda t, x: x @ matrix.mT, torch.tensor(0.0, dtype=f64), x)
    assert torch.allclose(derivative, value @ matrix.mT, atol=1e-12)


def test_the_derivative_along_the_solution_and_its_gradient():
    velocity = shaken(VelocityMLP(3, context_dim=2, hidden_dims=(7, 7), conditioning="film").double(), 1.0)
    x, context = points(velocity)
    for t in (torch.tensor(0.4, dtype=f64), torch.rand(4, 1, dtype=f64)):
        value, derivative = total_derivative(lambda t, x: velocity(t, x, context), t, x)
        step = 1e-5
        ahead, behind = (velocity(t + s, x + s * value, context) for s in (step, -step))
        assert torch.allclose(derivative, (ahead - behind) / (2 * step), atol=1e-6)
        _, expected = torch.func.jvp(lambda t, x: velocity(t, x, context), (t, x), (torch.ones_like(t), value))
        assert closely(derivative, expected, 100)
        leaves = list(velocity.parameters())
        got, wanted = (
            torch.autograd.grad(
                out.square().sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for out in (derivative, expected)
        )
        assert all(closely(a, b, 1e4) for a, b in zip(got, wanted, strict=True))


def test_N15_probes_are_given_so_one_draw_serves_a_solve():
    x = torch.randn(4, 3)
    probes = draw_probes(x, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(probes, draw_probes(x, 2, generator=torch.Generator().manual_seed(3)))
    function = VelocityMLP(3)
    first, second = (hutchinson(lambda x: function(0.5, x), x, probes).divergence for _ in range(2))
    assert torch.equal(first, second)
    normal = draw_probes(torch.zeros(4000, 2, dtype=f64), kind="gaussian")
    assert normal.dtype == f64
    assert abs(float(normal.var()) - 1) < 0.05


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VelocityMLP(0), "input_dim"),
        (lambda: VelocityMLP(2, context_dim=-1), "context_dim"),
        (lambda: VelocityMLP(2, hidden_dims=()), "one hidden layer"),
        (lambda: VelocityMLP(2, hidden_dims=(4, 0)), "positive"),
        (lambda: VelocityMLP(2, activation="relu"), "kink"),
        (lambda: VelocityMLP(2, activation=nn.LeakyReLU), "kink"),
        (lambda: VelocityMLP(2, activation="tahn"), "tanh"),
        (lambda: VelocityMLP(2, conditioning="hyper"), "concatsquash"),
        (lambda: VelocityMLP(2, hidden_dims=(4, 5), residual=True), "equal"),
        (lambda: PotentialGradient(2, hidden_dims=(4, 5)), "equal"),
        (lambda: PotentialGradient(2, hidden_dims=()), "one at least"),
        (lambda: PotentialGradient(2, rank=0), "rank"),
        (lambda: UserVelocity(lambda t, x: x, 2), r"nn\.Module"),
        (lambda: as_velocity(VelocityMLP(3), 2), "input_dim=2"),
        (lambda: draw_probes(torch.zeros(2), 0), "positive"),
        (lambda: draw_probes(torch.zeros(2), 1, "cauchy"), "rademacher"),
        (lambda: VelocityMLP(2).trace(0.0, torch.zeros(2)).squared_norm, "probes"),
    ],
)
def test_options_that_cannot_be(build, message):
    with pytest.raises(OptionError, match=message):
        build()


@pytest.mark.parametrize(
    "build", [VelocityMLP, PotentialGradient, lambda d, context_dim: as_velocity(Plain(), d, context_dim)]
)
def test_shapes_that_cannot_be(build):
    velocity, x = build(3, context_dim=2), torch.zeros(5, 3)
    for t, state, context, error in [
        (0.0, torch.zeros(5, 2), torch.zeros(5, 2), ShapeError),
        (0.0, torch.tensor(0.0), torch.zeros(5, 2), ShapeError),
        (torch.zeros(5), x, torch.zeros(5, 2), ShapeError),
        (0.0, x, None, ContextError),
        (0.0, x, torch.zeros(5, 3), ContextError),
    ]:
        for method in (velocity, velocity.with_divergence):
            with pytest.raises(error, match="expected"):
                method(t, state, context)
    with pytest.raises(ContextError, match="expected"):
        build(3, context_dim=0)(0.0, x, torch.zeros(5, 2))


def test_functions_and_probes_of_the_wrong_shape():
    x = torch.zeros(5, 3)
    for function in (exact_divergence, lambda f, x: hutchinson(f, x, draw_probes(x))):
        for given in (x, x.clone().requires_grad_()):
            with pytest.raises(ShapeError, match="shape of x"):
                function(lambda x: x[..., :2], given)
    with pytest.raises(ShapeError, match="draw_probes"):
        hutchinson(torch.sin, x, torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="2 at least"):
        hutch_plus_plus(torch.sin, x, draw_probes(x))
    with pytest.raises(NotImplementedError):
        Velocity(3)(0.0, x)


def test_an_error_of_the_users_function_comes_through():
    class Broken(nn.Module):
        def forward(self, t, x):
            raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese"):
        as_velocity(Broken(), 2).with_divergence(0.0, torch.zeros(5, 2))


@pytest.mark.parametrize("value", [None, (1.0, 2.0)])
def test_a_module_that_gives_no_tensor_is_named(value):
    class Odd(torch.nn.Module):
        def forward(self, t, x):
            return value

    with pytest.raises(ShapeError, match=type(value).__name__):
        as_velocity(Odd(), 2)(torch.tensor(0.0), torch.zeros(3, 2))
