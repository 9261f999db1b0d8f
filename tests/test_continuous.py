"""Continuous-time transforms: closed forms, three gradients, estimates of the log-det, faults, use in Pyro."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyroflows as pf
from pyroflows.distributions import Flow, standard_normal
from pyroflows.errors import DtypeError, ODESolveError, OptionError, ShapeError
from pyroflows.nets import MLP, VelocityMLP
from pyroflows.numerics import Fallback
from pyroflows.transforms import ContinuousTransform, continuous


class Linear(nn.Module):
    """``dz/dt = A z``."""

    def __init__(self, dim):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(dim, dim))

    def forward(self, t, x):
        return x @ self.matrix.mT


def shaken(layer, scale=0.5):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, scale)
    return layer


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "direct"])
def test_a_linear_field_is_the_exponential_of_its_matrix(gradient):
    torch.manual_seed(0)
    layer = ContinuousTransform(Linear(4), 4, gradient=gradient).double()
    matrix = layer.velocity.net.matrix
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    want = x @ torch.linalg.matrix_exp(matrix).mT
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(y, want, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(log_det, matrix.trace().expand(6), rtol=1e-8, atol=1e-8)
    back, opposite = layer.inverse_and_log_det(want.detach())
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(opposite, -log_det, rtol=1e-7, atol=1e-7)
    for got, truth in zip(
        torch.autograd.grad(y.sin().sum() + log_det.sum(), [x, matrix]),
        torch.autograd.grad(want.sin().sum() + 6 * matrix.trace(), [x, matrix]),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
@pytest.mark.parametrize("training", [True, False])
def test_N13_three_gradients_of_everything_are_the_same(dtype, tolerance, training):
    torch.manual_seed(0)
    outer = nn.Linear(5, 3).to(dtype)
    x, given = torch.randn(4, 2, dtype=dtype, requires_grad=True), torch.randn(4, 5, dtype=dtype)
    layer = shaken(continuous(2, context_dim=3, hidden_dims=(8, 8), learn_end_time=True).to(dtype))
    layer.train(training)
    leaves = [x, *layer.parameters(), *outer.parameters()]
    found = []
    for gradient in ("direct", "checkpoint", "adjoint"):
        layer.settings["gradient"] = gradient
        y, log_det = layer.inverse_and_log_det(x, outer(given))
        found.append(torch.autograd.grad(y.sin().sum() + log_det.square().sum(), leaves))
    assert all(bool((g != 0).any()) for g in found[0])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * (1 + float(want.abs().max())))


def test_N12_no_time_is_the_identity():
    layer = shaken(continuous(3, hidden_dims=(8, 8), end_time=0.0))
    x = torch.randn(5, 3)
    y, log_det = layer.forward_and_log_det(x)
    assert torch.equal(x, y)
    assert torch.equal(log_det, torch.zeros(5))


def test_the_start_is_near_the_identity():
    y, log_det = continuous(3).forward_and_log_det(torch.ones(5, 3))
    assert float((y - 1).abs().max().detach()) < 0.1
    assert float(log_det.abs().max().detach()) < 0.1


def test_N14_a_row_is_what_it_is_alone():
    torch.manual_seed(0)
    layer = shaken(continuous(2, hidden_dims=(16, 16)), 1.5).double()
    x = torch.randn(64, 2, dtype=torch.float64)
    x[0] *= 30  # a hard row
    y, log_det = layer.forward_and_log_det(x)
    for row in (0, 5, 63):
        alone, its = layer.forward_and_log_det(x[row : row + 1])
        torch.testing.assert_close(alone[0], y[row], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(its[0], log_det[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimate", [{"divergence": "hutchinson"}, {"divergence": "hutch++", "probes": 4}])
def test_N15_N16_an_estimate_is_unbiased_and_one_draw_a_solve(estimate):
    torch.manual_seed(0)
    layer = shaken(continuous(4, hidden_dims=(16, 16), **estimate))
    assert layer.log_det == "estimate"
    x = torch.randn(1, 4)
    exact = copy.deepcopy(layer).eval()
    y, want = exact.forward_and_log_det(x)
    assert torch.equal(exact.forward_and_log_det(x)[1], want)
    assert float(exact.flow(x).standard_error) == 0
    with torch.no_grad():
        many = layer.flow(x.expand(4096, 4))
    torch.testing.assert_close(many.value, y.detach().expand(4096, 4), rtol=1e-3, atol=1e-3)
    error = float(many.log_det.std()) / 64
    assert 0 < error < 0.1
    assert abs(float(many.log_det.mean()) - float(want.detach())) < 4 * error
    # New noise at every evaluation would leave nothing smooth to step along.
    assert layer.flow(x).nfe < 3 * exact.flow(x).nfe


def test_N16_probes_are_averaged():
    torch.manual_seed(0)
    layer = shaken(continuous(4, hidden_dims=(16, 16), divergence="hutchinson", probes=16))
    with torch.no_grad():
        found = layer.flow(torch.ones(512, 4))
    spread = float(found.log_det.std())
    assert float(found.standard_error.mean()) == pytest.approx(spread, rel=0.15)


def test_beyond_what_is_affordable_evaluation_uses_the_same_probes():
    torch.manual_seed(0)
    layer = shaken(continuous(300, hidden_dims=(8, 8), divergence="hutchinson", probes=2), 0.1).eval()
    x = torch.randn(3, 300)
    found = layer.flow(x)
    assert torch.equal(found.log_det, layer.flow(x).log_det)
    assert bool((found.standard_error > 0).all())
    torch.testing.assert_close(layer.flow(x[1:2]).log_det, found.log_det[1:2])


def test_N7_N8_N9_faults_are_typed_and_end_soon():
    class Stiff(nn.Module):
        def forward(self, t, x):
            return -1e5 * (x - torch.cos(t))

    class Broken(nn.Module):
        def forward(self, t, x):
            return torch.where(t > 0.5, torch.nan, x)

    class Explosion(nn.Module):
        def forward(self, t, x):
            return x.square()

    for velocity, words in ((Stiff(), "max_nfe"), (Broken(), "non-finite"), (Explosion(), "t=")):
        layer = ContinuousTransform(velocity, 1, max_nfe=400)
        with pytest.raises(ODESolveError, match=words) as caught:
            layer(torch.full((3, 1), 2.0))
        assert caught.value.nfe <= 450


def test_options_are_checked():
    for options, words in (
        ({"divergence": "approximate"}, "hutchinson"),
        ({"divergence": "hutch++", "probes": 2}, "at least 3"),
        ({"solver": "dopri6"}, "dopri5"),
        ({"gradient": "forward"}, "adjoint"),
        ({"end_time": -1.0}, "end_time"),
        ({"end_time": None}, "end_time"),
        ({"end_time": True}, "end_time"),
        ({"rtol": "small"}, "rtol to be a number"),
        ({"eval_rtol": -1.0}, "rtol >= 0"),
        ({"eval_atol": "small"}, "atol to be a number"),
        ({"max_nfe": 0}, "max_nfe to be a positive integer"),
        ({"max_nfe": None}, "max_nfe to be a positive integer"),
        ({"solver": "rk4", "steps": 2.5}, "at least one step"),
        ({"noise": "uniform"}, "rademacher, gaussian"),
        ({"fallback": 3}, "fallback"),
        ({"solver_options": 3}, "options by name"),
        ({"velocity": Linear(2), "hidden_dims": (8,)}, "no option hidden_dims"),
        ({"velocity": "resnet"}, "mlp, potential"),
        ({"velocity": VelocityMLP(3)}, "input_dim=2"),
    ):
        with pytest.raises(OptionError, match=words):
            continuous(2, **options)
    with pytest.raises(ShapeError, match="input_dim=2"):
        continuous(2)(torch.zeros(5, 3))


@pytest.mark.parametrize("solver", ["bosh3", "rk4", "dopri8"])
def test_other_solvers(solver):
    torch.manual_seed(0)
    layer = shaken(continuous(2, hidden_dims=(8, 8), solver=solver).double())
    x = torch.randn(5, 2, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    exact = copy.deepcopy(layer)
    exact.settings["solver"] = "dopri5"
    want, true = exact.forward_and_log_det(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, true, rtol=1e-5, atol=1e-5)


def test_a_density_is_learned_and_integrates_to_one():
    torch.manual_seed(0)
    flow = Flow(continuous(2, hidden_dims=(32, 32), rtol=1e-3, atol=1e-3, gradient="direct"), standard_normal(2))
    z = torch.randn(1500, 2)
    x = torch.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], -1)
    result = pf.fit(flow, x, max_epochs=8, lr=1e-2, batch_size=250, progress=False, seed=0)
    assert result.validation > -2.2  # a Gaussian's is -2.63, the optimum -1.634
    flow.learned.tolerances = {True: (1e-5, 1e-5), False: (1e-5, 1e-5)}
    axis = torch.linspace(-6, 12, 160)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = flow().log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
        sample = flow().sample((400,))
        held = flow().log_prob(x)
    assert float(mass) == pytest.approx(1, abs=2e-2)
    assert abs(float(flow().log_prob(sample).mean().detach()) - float(held.mean())) < 0.25


def test_it_is_a_prior_and_a_guide_in_pyro():
    pyro.clear_param_store()
    torch.manual_seed(0)
    prior = Flow(continuous(2, hidden_dims=(8, 8)), standard_normal(2)).requires_grad_(False)
    guide = Flow(continuous(2, context_dim=3, hidden_dims=(8, 8)), standard_normal(2))
    summary = MLP(2, 3, hidden_dims=(8,))
    y = torch.tensor([[0.5, -0.5], [1.0, 2.0]])

    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", prior())
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    def family():
        pyro.module("guide", guide)
        pyro.module("summary", summary)
        with pyro.plate("rows", 2):
            pyro.sample("z", guide(summary(y)))

    svi = SVI(
        model, family, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1)
    )
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(parameter.grad is not None or not parameter.requires_grad for parameter in summary.parameters())


@pytest.mark.parametrize(
    ("options", "laws"),
    [
        ({}, ("round_trip", "log_det", "gradients", "shapes", "rows", "extreme_inputs", "dtype", "protocol")),
        ({"gradient": "checkpoint"}, ("pure", "memo", "copies", "state_dict", "algebra")),
        ({"conditioning": "film", "residual": True}, ("round_trip", "log_det")),
    ],
)
def test_laws(options, laws):
    def layer(input_dim, *, context_dim=0):
        return continuous(input_dim, context_dim=context_dim, hidden_dims=(8, 8), **options)

    report = pf.testing.check_transform(layer, input_dims=(2,), scales=(0.5,), laws=laws, context_dims=(3,))
    assert not report.understated


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_second_derivatives_of_two_layers_that_share_a_context(gradient):
    torch.manual_seed(0)
    layers = [
        shaken(continuous(2, context_dim=1, hidden_dims=(4, 4), solver="rk4", steps=40, gradient=gradient).double())
        for _ in range(2)
    ]
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    leaves = [x, context, *layers[0].parameters(), *layers[1].parameters()]

    def second(first_layer, second_layer):
        y, first = first_layer.forward_and_log_det(x, context)
        y, then = second_layer.forward_and_log_det(y.flip(-1), context)
        loss = y.square().sum() + (first + then).square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in grads if g is not None)
        return torch.autograd.grad(penalty, leaves, allow_unused=True)

    found = second(*layers)
    with pytest.raises(OptionError, match="direct"):
        second(layers[0], layers[0])
    for layer in layers:
        layer.settings["gradient"] = "direct"
    for got, want in zip(found, second(*layers), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("kind", [nn.Parameter, lambda t: (2 * t).requires_grad_()])
def test_gradients_are_those_of_the_tensors_of_the_forward_pass(gradient, kind):
    torch.manual_seed(0)
    layer = shaken(continuous(2, hidden_dims=(8, 8)).double())
    other = {name: kind(t.detach() + 0.5 * torch.randn_like(t)) for name, t in layer.named_parameters()}
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for way in (gradient, "direct"):
        layer.settings["gradient"] = way
        y = torch.func.functional_call(layer, other, (x,))
        found.append(torch.autograd.grad(y.sin().sum(), [x, *other.values()], allow_unused=True))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_a_parameter_that_only_later_times_reach_gets_its_gradient():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.3))

        def forward(self, t, x):
            return x * torch.where(t < 0.5, self.early, self.late) if bool((t >= 0.5).any()) else x * self.early

    layer = ContinuousTransform(Switch(), 1).double()
    layer(torch.ones(3, 1, dtype=torch.float64)).sum().backward()
    assert float(layer.velocity.net.late.grad) == pytest.approx(1.5 * float(torch.tensor(0.4).exp()), rel=1e-4)


@pytest.mark.parametrize("steps", [0, 2.5, "many"])
def test_a_fallback_takes_a_step_at_least(steps):
    with pytest.raises(OptionError, match="at least one step"):
        Fallback("rk4", steps)


def test_complex_numbers_are_no_points():
    with pytest.raises(DtypeError, match="real"):
        continuous(2, hidden_dims=(8, 8))(torch.zeros(3, 2, dtype=torch.complex64))


def test_integers_are_points_too():
    layer = shaken(continuous(2, hidden_dims=(8, 8)))
    y, _ = layer.forward_and_log_det(torch.ones(3, 2, dtype=torch.long))
    torch.testing.assert_close(y, layer.forward_and_log_det(torch.ones(3, 2))[0])


def test_weights_that_pyro_samples_are_differentiated_as_they_were():
    torch.manual_seed(0)
    linear = pyro.nn.PyroModule[nn.Linear](2, 2)
    linear.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))

    class Sampled(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, t, x):
            return self.linear(x)

    layer = ContinuousTransform(Sampled(), 2, solver="rk4")
    assert not layer._as_it_is_now()[2]


def test_N7_a_fallback_warns_once_a_layer_and_bounds_the_work():
    class Stiff(nn.Module):
        def forward(self, t, x):
            return -300 * (x - torch.cos(t))

    x = torch.ones(3, 1)
    layer = ContinuousTransform(Stiff(), 1, max_nfe=100, fallback=Fallback("rk4", 300))
    with pytest.warns(UserWarning, match="fixed steps"):
        y, log_det = layer.forward_and_log_det(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.forward_and_log_det(x)
    settled = (300**2 * torch.cos(x) + 300 * torch.sin(x)) / (300**2 + 1)
    torch.testing.assert_close(y, settled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, torch.full((3,), -300.0), rtol=1e-4, atol=0)
    with pytest.warns(UserWarning, match="fixed steps"):
        ContinuousTransform(Stiff(), 1, max_nfe=100, fallback=Fallback("rk4", 300))(x)
    with pytest.raises(OptionError, match="rk4"):
        continuous(2, fallback="dopri5")


def test_N10_min_step_is_refused():
    with pytest.raises(OptionError, match="min_step"):
        continuous(2, solver="dopri8", solver_options={"min_step": 1e-3})


def test_N11_tolerances_below_the_dtype_are_raised_with_a_warning():
    layer = shaken(continuous(2, hidden_dims=(8, 8), rtol=1e-12, atol=1e-12))
    x = torch.randn(5, 2)
    with pytest.warns(UserWarning, match="below what torch.float32 can hold"):
        found = layer.flow(x)
    assert found.nfe < 400
    torch.testing.assert_close(found.value, layer.double()(x.double()).float(), rtol=1e-5, atol=1e-5)


def test_N12_reversed_time_and_data_of_another_dtype():
    layer = shaken(continuous(2, hidden_dims=(8, 8), learn_end_time=True))
    y = layer(torch.ones(5, 2))
    assert layer.double()(torch.ones(5, 2)).dtype == torch.float32  # the points' own
    torch.testing.assert_close(layer.float().inv(y), torch.ones(5, 2), rtol=1e-4, atol=1e-4)


def test_a_jacobian_is_had_by_batches_of_gradients():
    torch.manual_seed(0)
    layer = shaken(continuous(2, hidden_dims=(8, 8))).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    found = [
        torch.autograd.functional.jacobian(lambda x: layer.forward_and_log_det(x)[0], x, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)
    blocks = found[0].diagonal(dim1=0, dim2=2).movedim(-1, 0)
    torch.testing.assert_close(torch.linalg.slogdet(blocks)[1], layer.forward_and_log_det(x)[1], rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_and_the_meta_device_need_fixed_steps():
    layer = shaken(continuous(2, hidden_dims=(8, 8)))
    with pytest.raises(OptionError, match=r"torch\.jit\.trace would freeze"):
        torch.jit.trace(layer, torch.ones(3, 2))
    x = torch.randn(5, 2)  # other rows than those that are traced, and more
    fixed = shaken(continuous(2, hidden_dims=(8, 8), solver="rk4", steps=3))
    torch.testing.assert_close(torch.jit.trace(fixed, torch.ones(3, 2))(x), fixed(x))
    with torch.device("meta"):
        empty = continuous(2, hidden_dims=(8, 8), learn_end_time=True)
        with pytest.raises(OptionError, match="meta device"):
            empty(torch.ones(3, 2))
    assert fixed.to("meta")(torch.ones(3, 2, device="meta")).shape == (3, 2)
