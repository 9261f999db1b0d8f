"""The record of solves; regularisers in the same solve, against closed forms, with three gradients."""

import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyroflows as pf
from pyroflows.distributions import standard_normal
from pyroflows.errors import OptionError
from pyroflows.nets import PotentialGradient, Velocity
from pyroflows.numerics import solve
from pyroflows.transforms import ContinuousTransform, continuous

DOUBLE = torch.float64


# --- the record ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "direct"])
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_a_record_counts_every_evaluation_of_both_passes(gradient, solver):
    calls = [0]

    def field(t, y):
        calls[0] += 1
        return torch.sin(y)

    x = torch.ones(3, 2, requires_grad=True)
    with pf.recorded() as record:
        for _ in range(2):
            x = solve(field, x, 0.0, 1.0, solver=solver, gradient=gradient).state
    assert (record.solves, record.nfe_forward, record.nfe_backward) == (2, calls[0], 0)
    x.sum().backward()
    assert record.nfe_forward + record.nfe_backward == calls[0]
    assert (record.nfe_backward > 0) == (gradient != "direct")
    solve(field, torch.ones(3, 2), 0.0, 1.0)
    assert record.solves == 2


def test_records_nest_and_belong_to_a_thread():
    def one():
        solve(lambda t, y: -y, torch.ones(1, 1), 0.0, 1.0)

    with pf.recorded() as outer:
        one()
        with pf.recorded() as inner:
            one()
            other = threading.Thread(target=one)
            other.start()
            other.join()
        with pytest.raises(RuntimeError, match="stop"), pf.recorded():
            raise RuntimeError("stop")
        one()
    one()
    assert (outer.solves, inner.solves) == (3, 1)
    assert outer.nfe_forward == 3 * inner.nfe_forward


def test_backward_in_another_thread_is_counted():
    with pf.recorded() as record:
        y = torch.ones(1, 1, requires_grad=True)
        out = solve(lambda t, y: -y, y, 0.0, 1.0, gradient="adjoint").state.sum()
    other = threading.Thread(target=out.backward)
    other.start()
    other.join()
    assert record.nfe_backward > 0


def test_a_record_without_solves_is_empty():
    with pf.recorded() as record:
        ContinuousTransform(torch.nn.Identity(), 1)
        continuous(2)(torch.ones(0, 2))
    assert (record.solves, record.nfe_forward, record.penalties) == (0, 0, {})
    assert torch.equal(record.penalty(), torch.zeros(()))


# --- regularisers ----------------------------------------------------------------------------------------


class Turning(torch.nn.Module):
    """``v = A x + t b``."""

    def __init__(self, dim):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(dim, dim) / 2)
        self.slope = torch.nn.Parameter(torch.randn(dim))

    def forward(self, t, x):
        return x @ self.matrix.mT + t * self.slope


def layer_and_path(backwards=False, points=201, **options):
    """A layer in float64, and its solution at Simpson's points: times, weights, states."""
    torch.manual_seed(1)
    layer = ContinuousTransform(Turning(3), 3, end_time=0.8, **options).double()
    x = torch.randn(4, 3, dtype=DOUBLE)
    times = torch.linspace(0, 0.8, points, dtype=DOUBLE)
    weights = torch.full((points,), 2.0, dtype=DOUBLE)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    # The state and the time as one linear system, for the exponential of its matrix.
    net = layer.velocity.net
    system = torch.zeros(5, 5, dtype=DOUBLE)
    system[:3, :3], system[:3, 3], system[3, 4] = net.matrix.detach(), net.slope.detach(), 1.0
    start = torch.cat([x, torch.zeros(4, 1, dtype=DOUBLE), torch.ones(4, 1, dtype=DOUBLE)], 1)
    path = torch.stack([start @ torch.linalg.matrix_exp(time * system).mT for time in times])[..., :3]
    return layer, (path[-1] if backwards else x), times, weights * 0.8 / (points - 1) / 3, path


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "direct"])
@pytest.mark.parametrize("backwards", [False, True])
def test_regularisers_of_a_linear_field_are_their_integrals(gradient, backwards):
    weights = {"kinetic": 0.5, "jacobian": 2.0, "acceleration": 0.25}
    layer, start, times, simpson, path = layer_and_path(backwards, regularize=weights, gradient=gradient)
    net = layer.velocity.net
    with torch.no_grad():
        speed = net(times.reshape(-1, 1, 1), path)
        bend = speed @ net.matrix.mT + net.slope
        want = {
            "kinetic": float((simpson @ speed.square().sum(-1)).mean()),
            "jacobian": float(0.8 * net.matrix.square().sum()),
            "acceleration": float((simpson @ bend.square().sum(-1)).mean()),
        }
    with pf.recorded() as record:
        (layer.inverse_and_log_det if backwards else layer.forward_and_log_det)(start)
    assert record.penalties == {name: pytest.approx(value, rel=1e-7) for name, value in want.items()}
    assert float(record.penalty().detach()) == pytest.approx(sum(weights[n] * want[n] for n in weights), rel=1e-7)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "estimate"),
    [
        (DOUBLE, 1e-7, {}),
        (DOUBLE, 1e-7, {"divergence": "hutch++", "probes": 4}),
        (torch.float32, 1e-4, {"divergence": "hutchinson"}),
    ],
)
def test_gradients_of_a_penalty_are_the_same_by_three_methods(dtype, tolerance, estimate):
    torch.manual_seed(0)
    weights = {"kinetic": 0.5, "jacobian": 2.0, "acceleration": 0.25}
    layer = continuous(3, context_dim=2, hidden_dims=(8, 8), learn_end_time=True, regularize=weights, **estimate)
    layer = layer.to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    x, context = (torch.randn(5, n, dtype=dtype, requires_grad=True) for n in (3, 2))
    leaves, found = [x, context, *layer.parameters()], []
    for gradient in ("direct", "checkpoint", "adjoint"):
        layer.settings["gradient"] = gradient
        torch.manual_seed(5)
        with pf.recorded() as record:
            y, log_det = layer.inverse_and_log_det(x, context)
        found.append(torch.autograd.grad(y.sin().sum() + log_det.sum() + record.penalty(), leaves))
    without = torch.autograd.grad(layer.inverse_and_log_det(x, context)[0].sin().sum(), leaves)
    assert all(bool((a != b).any()) for a, b in zip(found[0], without, strict=True))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * (1 + float(want.abs().max())))


@pytest.mark.parametrize(
    "estimate", [{}, {"divergence": "hutchinson", "probes": 2}, {"divergence": "hutch++", "probes": 5}]
)
def test_the_norm_of_the_jacobian_is_estimated_without_bias(estimate):
    class Rotated(Turning):
        def with_divergence(self, t, x):  # a closed form, so that the norm is estimated
            return self(t, x), self.matrix.trace().expand(x.shape[:-1])

    torch.manual_seed(0)
    layer = ContinuousTransform(Rotated(6), 6, regularize={"jacobian": 1.0}, solver="rk4", steps=1, **estimate)
    want = float(layer.velocity.net.matrix.detach().square().sum())
    found = torch.empty(400)
    for i in range(400):
        with torch.no_grad(), pf.recorded() as record:
            layer(torch.zeros(8, 6))
        found[i] = record.penalty()
    error = float(found.std()) / 20
    assert 0 < error < 0.1 * want
    assert abs(float(found.mean()) - want) < 4 * error


def test_hjb_is_zero_on_straight_lines_and_known_elsewhere():
    """``Phi = |x|^2 / (2 (2 - t))`` moves points along straight lines at constant speed; ``|x|^2 / 2`` does not."""

    class Gradient(Velocity):
        def __init__(self, straight):
            super().__init__(2)
            self.straight = straight

        def forward(self, t, x, context=None):
            return -x / (2 - t) if self.straight else -x

        def potential_by_time(self, t, x, context=None):
            slope = 1 / (2 - t) ** 2 if self.straight else 0 * t
            return (slope * x.square()).sum(-1) / 2

    x = torch.tensor([[1.0, 2.0]], dtype=DOUBLE)
    for straight in (True, False):
        weights = {"hjb": 1.0, "acceleration": 1.0}
        layer = ContinuousTransform(Gradient(straight), 2, regularize=weights)
        with pf.recorded() as record:
            layer(x)
        want = 0.0 if straight else 1 - math.exp(-2)
        assert record.penalties["hjb"] == pytest.approx(2.5 * want / 2, abs=1e-8)
        assert record.penalties["acceleration"] == pytest.approx(5 * want / 2, abs=1e-8)


@pytest.mark.parametrize("hidden_dims", [(6,), (6, 6, 6)])
def test_a_potential_knows_its_derivative_by_time(hidden_dims):
    """The gradient of the one is the derivative by time of the other; and both keep their values in every shape."""
    torch.manual_seed(0)
    velocity = PotentialGradient(3, context_dim=2, hidden_dims=hidden_dims).double()
    with torch.no_grad():
        for parameter in velocity.parameters():
            parameter.normal_(0, 0.7)
    x, context = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True), torch.randn(5, 2, dtype=DOUBLE)
    t = torch.full((5, 1), 0.3, dtype=DOUBLE)
    by_time = velocity.potential_by_time(t, x, context)
    assert by_time.shape == (5,)
    (got,) = torch.autograd.grad(by_time.sum(), x)
    _, (want) = torch.func.jvp(lambda t: -velocity(t, x, context), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_the_hjb_term_of_a_potential_is_differentiated(gradient):
    torch.manual_seed(0)
    layer = ContinuousTransform(PotentialGradient(2, hidden_dims=(8, 8)), 2, regularize={"hjb": 1.0}).double()
    with torch.no_grad():
        layer.velocity.readout.normal_()
        layer.velocity.steering.time_weight.zero_()  # the integrand is then nowhere zero, where it would have a kink
    x, found = torch.randn(5, 2, dtype=DOUBLE, requires_grad=True), []
    for way in ("direct", gradient):
        layer.settings["gradient"] = way
        with pf.recorded() as record:
            layer(x)
        found.append(torch.autograd.grad(record.penalty(), [x, *layer.parameters()], materialize_grads=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert sum(float(g.abs().sum()) for g in found[0]) > 0.1


def test_regularisers_change_no_density_and_cost_nothing_unasked():
    torch.manual_seed(0)
    weights = dict.fromkeys(("kinetic", "jacobian", "acceleration"), 1.0)
    layer = continuous(2, hidden_dims=(8, 8), regularize=weights)
    calls = []
    layer.velocity.register_forward_hook(lambda *_: calls.append(1))  # only the acceleration calls the module
    x = torch.randn(7, 2)
    y, log_det = layer.forward_and_log_det(x)
    with pf.recorded() as record:
        layer.eval()
        layer(x)
        layer.train()
        layer(torch.zeros(0, 2))
    assert not calls
    assert record.penalties == {}
    with pf.recorded() as outer, pf.recorded() as record:
        again, its = layer.forward_and_log_det(x)
    assert calls
    assert torch.equal(y, again)
    assert torch.equal(log_det, its)
    assert outer.penalties == record.penalties != {}
    assert torch.equal(outer.penalty(), record.penalty())


@pytest.mark.parametrize("solver", ["rk4", "dopri8"])
def test_regularisers_by_other_solvers(solver):
    layer, start, _, _, _ = layer_and_path(regularize={"kinetic": 1.0}, solver=solver)
    exact, *_ = layer_and_path(regularize={"kinetic": 1.0})
    found = []
    for each in (layer, exact):
        with pf.recorded() as record:
            each(start)
        record.penalty().backward()
        found.append((record.penalties["kinetic"], each.velocity.net.matrix.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_a_layer_put_into_eval_before_backward_is_differentiated_as_it_was():
    torch.manual_seed(0)
    layer = continuous(3, hidden_dims=(8, 8), divergence="hutchinson", regularize={"jacobian": 1.0})
    found = []
    for early in (False, True):
        layer.train().zero_grad()
        torch.manual_seed(3)
        with pf.recorded() as record:
            _, log_det = layer.forward_and_log_det(torch.ones(4, 3))
        layer.train(not early)
        (log_det.sum() + record.penalty()).backward()
        found.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_kinetic_energy_straightens_a_flow():
    """The same fit, with less work for its solver and nearly the same likelihood."""
    z = torch.randn(256, 2)
    x = torch.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], -1)
    found = {}
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        layer = continuous(2, hidden_dims=(16, 16), solver="rk4", steps=4, gradient="direct")
        layer.regularize = {"kinetic": weight}
        flow = pf.Flow(layer, standard_normal(2))
        optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
        for _ in range(40):
            optimizer.zero_grad()
            with pf.recorded() as record:
                loss = -flow().log_prob(x).mean()
            (loss + record.penalty()).backward()
            optimizer.step()
        found[weight] = float(loss.detach()), record.penalties["kinetic"]
    assert found[0.1][1] < 0.7 * found[0.0][1]
    assert found[0.1][0] < found[0.0][0] + 0.15


def test_a_guide_is_regularised_by_a_factor():
    torch.manual_seed(0)
    guide = pf.Flow(continuous(2, hidden_dims=(8, 8), regularize={"kinetic": 1e3}), standard_normal(2))

    def model():
        pyro.sample("z", dist.Normal(torch.full((2,), 3.0), 1.0).to_event(1))

    def family():
        pyro.module("guide", guide)
        with pf.recorded() as record:
            pyro.sample("z", guide())
        pyro.factor("path", record.penalty(), has_rsample=True)

    svi = SVI(
        model, family, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=0)
    )
    for _ in range(30):
        svi.step()
    with pf.recorded() as record:
        guide.learned(torch.randn(100, 2))
    assert record.penalties["kinetic"] < 0.01  # else it would be on its way to 18


def test_regularisers_are_checked():
    for options, words in (
        ({"regularize": {"kinetics": 1.0}}, "kinetic, jacobian"),
        ({"regularize": {"kinetic": -1.0}}, "not negative"),
        ({"regularize": {"kinetic": math.nan}}, "finite"),
        ({"regularize": {"kinetic": "much"}}, "finite"),
        ({"regularize": {"kinetic": None}}, "finite"),
        ({"regularize": "kinetic"}, "weights by name"),
        ({"regularize": ["kinetic"]}, "weights by name"),
        ({"regularize": {"hjb": 1.0}}, "gradient of a potential, got a VelocityMLP"),
    ):
        with pytest.raises(OptionError, match=words):
            continuous(2, **options)
