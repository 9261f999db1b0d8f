"""Objectives of a fit: flow matching against closed forms, likelihood after it, divergences from a given density."""

import itertools
import math
import sys
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows import errors
from pyroflows.distributions import Base, standard_normal
from pyroflows.training import ELBO, FlowMatching, Likelihood, Objective
from pyroflows.transforms import Compose, affine, continuous

PATHS = [("optimal_transport", 0.0), ("optimal_transport", 0.2), ("variance_preserving", 0.0)]
PATHS += [("variance_preserving", 0.2), ("schroedinger_bridge", 0.7)]


def velocity_flow(input_dim=2, *, support=None, hidden_dims=(32, 32), **options):
    torch.manual_seed(0)
    layer = continuous(input_dim, hidden_dims=hidden_dims, rtol=1e-4, **options)
    return pf.Flow(layer, standard_normal(input_dim), support=support)


def clusters(n=1000, seed=0):
    """Four round clusters in the plane."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(2, (n, 2), generator=generator) * 4.0
    return corner + 0.7 * torch.randn(n, 2, generator=generator) + 10


def fit(flow, *args, **options):
    return pf.fit(flow, *args, **{"progress": False, "seed": 0, "max_epochs": 5, "lr": 5e-3, **options})


# --- paths -----------------------------------------------------------------------------------------------


def coefficients(path, sigma, s):
    """Those of base, data and noise in a path, and their derivatives."""
    if path == "optimal_transport":
        return (1 - s + sigma * s, s, 0 * s), (sigma - 1 + 0 * s, 1 + 0 * s, 0 * s)
    if path == "variance_preserving":
        angle = math.acos(sigma)
        return (
            (torch.cos(angle * s), torch.sin(angle * s), 0 * s),
            (-angle * torch.sin(angle * s), angle * torch.cos(angle * s), 0 * s),
        )
    root = torch.sqrt(s * (1 - s))
    return (1 - s, s, sigma * root), (-1 + 0 * s, 1 + 0 * s, sigma * (1 - 2 * s) / (2 * root))


@pytest.mark.parametrize(("path", "sigma"), PATHS)
def test_the_velocity_of_a_path_is_its_time_derivative(path, sigma):
    objective = FlowMatching(path, sigma=sigma)
    base, data, noise = torch.randn(3, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s, h = torch.linspace(0.02, 0.98, 50, dtype=torch.float64).unsqueeze(-1), 1e-6
    _, velocity = objective.point(s, base, data, noise)
    after, before = (objective.point(s + d, base, data, noise)[0] for d in (h, -h))
    assert velocity == pytest.approx((after - before) / (2 * h), abs=1e-7)


@pytest.mark.parametrize(("path", "sigma"), PATHS)
def test_paths_lead_from_base_to_data(path, sigma):
    objective = FlowMatching(path, sigma=sigma)
    base, data, noise = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = objective.point(torch.zeros(5, 1, dtype=torch.float64), base, data, noise)[0]
    end = objective.point(torch.ones(5, 1, dtype=torch.float64), base, data, noise)[0]
    assert start == pytest.approx(base, abs=1e-12)
    if path == "optimal_transport":
        data = data + sigma * base
    if path == "variance_preserving":
        data = sigma * base + math.sqrt(1 - sigma**2) * data
    assert end == pytest.approx(data, abs=1e-12)


LOC, SCALE = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.4, 1.5], dtype=torch.float64)


class GaussianVelocity(nn.Module):
    """The velocity E[dx/ds | x] / T of a path from a standard normal to N(LOC, SCALE), and something beside it."""

    def __init__(self, path, sigma, end_time):
        super().__init__()
        self.path, self.sigma, self.end_time = path, sigma, end_time
        self.slope, self.shift = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, t, x):
        s = torch.as_tensor(t, dtype=x.dtype) / self.end_time
        if self.path == "schroedinger_bridge":
            s = s.clamp(1e-12, 1 - 1e-12)
        (a, b, g), (da, db, dg) = coefficients(self.path, self.sigma, s)
        variance = a**2 + b**2 * SCALE**2 + g**2
        slope = (a * da + b * db * SCALE**2 + g * dg) / variance
        return (db * LOC + slope * (x - b * LOC)) / self.end_time + self.slope * x + self.shift


def gaussian_flow(path, sigma, end_time, **options):
    velocity = GaussianVelocity(path, sigma, end_time)
    return pf.Flow(continuous(2, velocity=velocity, end_time=end_time, **options), standard_normal(2)).double()


@pytest.mark.parametrize("end_time", [1.0, 2.5])
@pytest.mark.parametrize(("path", "sigma"), PATHS)
def test_the_least_loss_of_gaussian_data_is_at_the_velocity_known_in_closed_form(path, sigma, end_time):
    flow = gaussian_flow(path, sigma, end_time)
    parameters = list(flow.parameters())
    objective = FlowMatching(path, sigma=sigma, coupling="independent")
    torch.manual_seed(0)

    def gradients(batches=40, n=2000):
        found = []
        for _ in range(batches):
            rows = LOC + SCALE * torch.randn(n, 2, dtype=torch.float64)
            found.append(torch.cat(torch.autograd.grad(objective(flow, rows).mean(), parameters)))
        found = torch.stack(found)
        return found.mean(0), found.std(0) / math.sqrt(batches)

    mean, error = gradients()
    assert (mean.abs() < 4.5 * error).all()
    with torch.no_grad():
        flow.learned.velocity.net.slope.fill_(0.1)
        flow.learned.velocity.net.shift.fill_(-0.1)
    mean, error = gradients()
    assert (mean.abs() > 6 * error).all()


@pytest.mark.parametrize("end_time", [1.0, 2.5])
@pytest.mark.parametrize(("path", "sigma"), PATHS)
def test_the_velocity_of_least_loss_has_the_density_of_the_data(path, sigma, end_time):
    flow = gaussian_flow(path, sigma, end_time)
    x = LOC + SCALE * torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = {"optimal_transport": 1.0, "variance_preserving": math.sqrt(1 - sigma**2)}.get(path, 1.0)
    left = 0.0 if path == "schroedinger_bridge" else sigma
    expected = dist.Normal(kept * LOC, torch.sqrt((kept * SCALE) ** 2 + left**2)).log_prob(x).sum(-1)
    assert flow().log_prob(x).detach() == pytest.approx(expected, abs=1e-7)


def test_times_are_stratified_and_inside():
    from pyroflows.training.objectives import _times

    torch.manual_seed(0)
    s = _times(torch.zeros(1000, 2)).squeeze(-1)
    assert ((s > 0) & (s < 1)).all()
    assert torch.equal(torch.sort((s * 1000).long()).values, torch.arange(1000))
    assert not torch.equal(s, torch.sort(s).values)


# --- couplings -------------------------------------------------------------------------------------------


def test_the_coupling_is_the_cheapest_of_all():
    base, data = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    coupled = FlowMatching(coupling="optimal_transport")._coupled(base, data, None)
    costs = {order: float((base[list(order)] - data).square().sum()) for order in itertools.permutations(range(6))}
    assert torch.equal(coupled, base[list(min(costs, key=costs.get))])


def test_the_coupling_is_within_groups():
    flow = velocity_flow(hidden_dims=(8, 8))
    seen = []

    class Watched(FlowMatching):
        def _coupled(self, base, data, context):
            seen.append(len(data))
            return super()._coupled(base, data, context)

    assert Watched(coupling="optimal_transport", group=8)(flow, clusters(20)).shape == (20,)
    assert seen == [8, 8, 4]


def test_the_coupling_of_bridges_is_entropic():
    from pyroflows.training.objectives import _entropic_plan

    base, data = torch.randn(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost = torch.cdist(data, base).square()
    plan = _entropic_plan(cost, 0.5)
    assert plan.sum(1) == pytest.approx(torch.ones(6), abs=1e-9)
    assert plan.sum(0) == pytest.approx(torch.ones(6), abs=2e-2)
    # Of the form u C v: every two-by-two minor of the plan over the kernel vanishes.
    ratio = plan / torch.exp(-cost / 0.5)
    assert ratio[1:, 1:] * ratio[0, 0] == pytest.approx(ratio[1:, :1] * ratio[:1, 1:], rel=1e-9)
    exact = FlowMatching(coupling="optimal_transport")._coupled(base, data, None)
    assert torch.equal(base[_entropic_plan(cost, 0.01, rounds=2000).argmax(1)], exact)


def test_with_a_context_the_base_stays_independent_of_it():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(2, (400, 1), generator=generator).float()
    data = 6 * label - 3 + 0.5 * torch.randn(400, 1, generator=generator)
    base = torch.randn(400, 1, generator=generator)
    objective = FlowMatching(coupling="optimal_transport")
    blind = objective._coupled(base, data, None)
    aware = objective._coupled(base, data, 2 * label - 1)
    # Blind to the label, the upper half of the base goes with the upper label.
    assert abs(float(blind[label == 1].mean() - blind[label == 0].mean())) > 1.2
    assert abs(float(aware[label == 1].mean() - aware[label == 0].mean())) < 0.25
    assert float((aware - data).square().sum()) < float((base - data).square().sum())


def test_optimal_transport_straightens_paths():
    bends = {}
    for coupling in ("independent", "optimal_transport"):
        flow = velocity_flow()
        fit(flow, clusters(600), objective=FlowMatching(coupling=coupling), max_epochs=20)
        start = x = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
        energy = 0.0
        with torch.no_grad():
            for i in range(50):
                step = flow.learned.velocity((i + 0.5) / 50, x) / 50
                x, energy = x + step, energy + 50 * step.square().sum(-1)
        # What a path costs beyond the straight one between its ends, as a share of that.
        bends[coupling] = float(energy.sum() / (x - start).square().sum()) - 1
    assert 0 <= bends["optimal_transport"] < 0.5 * bends["independent"], bends


# --- fits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["optimal_transport", "variance_preserving", "schroedinger_bridge"])
def test_flow_matching_trains_a_density(path):
    flow, test = velocity_flow(), clusters(1000, seed=1)
    result = fit(flow, clusters(), objective=FlowMatching(path, coupling="independent"), max_epochs=80)
    centres = torch.tensor([[10.0, 10.0], [10.0, 14.0], [14.0, 10.0], [14.0, 14.0]])
    parts = dist.Normal(centres.unsqueeze(1), 0.7).log_prob(test).sum(-1)
    optimum = (torch.logsumexp(parts, 0) - math.log(4)).mean()
    gaussian = torch.distributions.MultivariateNormal(clusters().mean(0), torch.cov(clusters().T)).log_prob(test).mean()
    with torch.no_grad():
        found = flow().log_prob(test).mean()
    assert gaussian + 0.5 * (optimum - gaussian) < found < optimum + 0.01
    assert result.validation == pytest.approx(float(found), abs=0.2)


def test_mixture_finishes_by_likelihood():
    flow = velocity_flow()
    result = fit(flow, clusters(400), objective="mixture", max_epochs=(20, 3), lr=2e-3)
    history = result.history
    assert history["epoch"] == [float(i) for i in range(24)]
    # One log-likelihood of the weights that flow matching chose, then one an epoch.
    known = [i for i, value in enumerate(history["validation"]) if not math.isnan(value)]
    chosen = min(range(21), key=lambda i: history["validation_loss"][i])
    assert known == [chosen, 21, 22, 23]
    assert result.best_epoch > 20
    assert result.validation == max(history["validation"][i] for i in known) > history["validation"][chosen]
    assert history["validation_loss"][-1] == -history["validation"][-1]
    assert math.isnan(history["train"][20])
    assert history["train"][21] == pytest.approx(-history["loss"][21])
    assert "log-likelihood" in str(result)


def test_a_likelihood_keeps_the_weights_of_flow_matching_unless_it_finds_better_ones():
    flow, x = velocity_flow(), clusters(300)
    rates = iter([1e-2, 0.3])  # the second is far too large
    result = fit(
        flow,
        x,
        objective=["flow_matching", Likelihood()],
        validation=x[:50],
        max_epochs=[20, 2],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=next(rates)),
    )
    assert 0 < result.best_epoch <= 20
    with torch.no_grad():
        assert float(flow().log_prob(x[:50]).mean()) == pytest.approx(result.validation, abs=1e-4)


def test_flow_matching_selects_by_its_held_out_loss():
    flow = velocity_flow()
    result = fit(flow, clusters(), objective="flow_matching", max_epochs=15)
    losses = result.history["validation_loss"]
    assert result.best_epoch == losses.index(min(losses))
    assert losses[result.best_epoch] < losses[0]
    known = [i for i, value in enumerate(result.history["validation"]) if not math.isnan(value)]
    assert known == [result.best_epoch]
    assert math.isnan(result.train)
    assert "train" not in str(result)


def test_flow_matching_reads_contexts():
    generator = torch.Generator().manual_seed(0)
    context = 50 + 10 * torch.rand(600, 1, generator=generator)
    x = torch.cat([context, -context], -1) + torch.randn(600, 2, generator=generator)
    for coupling in ("independent", "optimal_transport"):
        flow = velocity_flow(context_dim=1)
        fit(flow, x, context, objective=FlowMatching(coupling=coupling), max_epochs=30)
        with torch.no_grad():
            found = flow(context).log_prob(x).mean()
        assert found == pytest.approx(-math.log(2 * math.pi * math.e), abs=0.25)  # a Gaussian blind to it: -4.26


@pytest.mark.parametrize("options", [{"end_time": 3.0}, {"end_time": 0.5, "learn_end_time": True}])
def test_end_times(options):
    flow = velocity_flow(**options)
    fit(flow, clusters(), objective="flow_matching", max_epochs=50)
    with torch.no_grad():
        assert flow().log_prob(clusters(seed=1)).mean() > -3.8  # a Gaussian comes to -4.37
    assert float(torch.as_tensor(flow.learned.end_time).detach()) == pytest.approx(options["end_time"])


def test_flow_matching_works_behind_a_support_and_a_standardiser():
    results = {}
    for scale in (1.0, 1000.0):
        x = torch.exp(clusters(400) / 10) * scale
        flow = velocity_flow(support="positive")
        results[scale] = fit(flow, x, objective="flow_matching", max_epochs=20).validation
        assert (flow().sample((50,)) > 0).all()
    assert results[1.0] - results[1000.0] == pytest.approx(2 * math.log(1000), abs=5e-2)


def test_flow_matching_finds_its_layer_within_a_composition_and_on_another_base():
    torch.manual_seed(0)
    layer = continuous(2, hidden_dims=(32, 32), rtol=1e-4)
    base = Base(dist.StudentT, df=torch.full((2,), 5.0), loc=torch.ones(2), scale=torch.full((2,), 0.5))
    flow = pf.Flow(Compose([Compose([layer])]), base)
    fit(flow, clusters(), objective="flow_matching", max_epochs=50)
    with torch.no_grad():
        assert flow().log_prob(clusters(seed=1)).mean() > -4.0


def test_flow_matching_in_float64():
    flow = velocity_flow().double()
    fit(flow, clusters(100), objective="flow_matching", max_epochs=1)
    assert flow().sample((3,)).dtype == torch.float64


@pytest.mark.parametrize("objective", ["flow_matching", FlowMatching("schroedinger_bridge")])
def test_same_seed_same_fit_and_the_global_generator_is_left_alone(objective):
    states = []
    for _ in range(2):
        flow = velocity_flow()
        torch.manual_seed(len(states))
        expected = torch.rand(1)
        torch.manual_seed(len(states))
        fit(flow, clusters(100), objective=objective, max_epochs=2)
        assert torch.equal(torch.rand(1), expected)
        states.append(flow.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(states[0].values(), states[1].values(), strict=True))


def test_an_objective_of_ones_own():
    class Weighted(Objective):
        def __call__(self, flow, rows, context=None):
            return -2 * flow(context).log_prob(rows)

    flow = pf.flow("maf", input_dim=2, hidden_dims=(16,))
    result = fit(flow, clusters(200), objective=Weighted())
    assert result.history["loss"][-1] == pytest.approx(-result.history["train"][-1])
    with torch.no_grad():
        assert flow().log_prob(clusters(seed=1)).mean() * 2 == pytest.approx(result.validation, abs=0.5)


def test_a_flow_may_have_an_objective_of_its_own():
    flow = pf.flow("flow_matching", input_dim=2, hidden_dims=(8, 8))
    assert math.isnan(fit(flow, clusters(50), max_epochs=1).train)
    assert math.isfinite(fit(flow, clusters(50), max_epochs=1, objective="likelihood").history["train"][1])
    assert pf.flow("maf", input_dim=2).objective == "likelihood"


# --- elbo ------------------------------------------------------------------------------------------------


def test_elbo_fits_an_unnormalised_density():
    loc = torch.tensor([1.0, -2.0])
    flow = pf.flow("iaf", input_dim=2, transforms=1, hidden_dims=(16,))
    objective = ELBO(lambda z: -0.5 * (z - loc).square().sum(-1) / 0.25 + 3, samples=512)
    result = fit(flow, objective=objective, max_epochs=150, lr=2e-2)
    log_normaliser = 3 + math.log(2 * math.pi * 0.25)
    assert log_normaliser - 0.1 < result.validation < log_normaliser + 1e-3
    assert result.score == "ELBO"
    assert "ELBO" in str(result)
    with torch.no_grad():
        z = flow().sample((2000,))
    assert z.mean(0) == pytest.approx(loc, abs=0.1)
    assert z.std(0) == pytest.approx([0.5, 0.5], abs=0.1)


def test_elbo_given_contexts():
    torch.manual_seed(0)
    flow = pf.flow("iaf", input_dim=1, context_dim=1, transforms=1, hidden_dims=(16,))
    context = torch.linspace(-2, 2, 512).unsqueeze(-1)
    objective = ELBO(lambda z, c: dist.Normal(3 * c, 0.5).log_prob(z).sum(-1))
    result = fit(flow, None, context, objective=objective, max_epochs=60, lr=2e-2)
    assert -0.1 < result.validation < 0.05
    with torch.no_grad():
        assert flow(torch.tensor([[-1.0], [1.0]])).sample((2000,)).mean(0) == pytest.approx(
            torch.tensor([[-3.0], [3.0]]), abs=0.2
        )


def test_elbo_on_a_support():
    flow = pf.flow("nsf", input_dim=1, transforms=1, hidden_dims=(8,), support="positive")
    result = fit(flow, objective=ELBO(lambda z: dist.Gamma(3.0, 2.0).log_prob(z).sum(-1), 512), max_epochs=40, lr=1e-2)
    assert -0.05 < result.validation < 0.01


# --- what a fit tells ------------------------------------------------------------------------------------


def test_the_history_counts_evaluations():
    flow = velocity_flow(hidden_dims=(8, 8), gradient="adjoint")
    history = fit(flow, clusters(100), max_epochs=1, objective=["flow_matching", "likelihood"]).history
    assert history["nfe_forward"][1:2] == history["nfe_backward"][1:2] == [0.0]
    assert history["nfe_forward"][2] >= 6
    assert history["nfe_backward"][2] >= 6
    assert "nfe_forward" not in fit(pf.flow("maf", input_dim=2), clusters(50), max_epochs=1).history


def test_the_penalties_of_solves_are_part_of_the_loss_and_of_nothing_else():
    flow = velocity_flow(hidden_dims=(8, 8), regularize={"kinetic": 0.5})
    history = fit(flow, clusters(100), max_epochs=2, objective=["flow_matching", "likelihood"]).history
    penalties = history["penalty_kinetic"]
    assert [math.isnan(value) for value in penalties] == [True, True, True, False, False]
    assert all(value > 0 for value in penalties[3:])
    for i in (3, 4):
        assert history["loss"][i] == pytest.approx(0.5 * penalties[i] - history["train"][i], abs=1e-5)
        assert history["validation_loss"][i] == -history["validation"][i]


class Breaking(nn.Module):
    """A velocity that is NaN after a few evaluations with gradients."""

    def __init__(self, after):
        super().__init__()
        self.net, self.left = nn.Linear(2, 2), after

    def forward(self, t, x):
        self.left -= self.training
        return self.net(x) * (1.0 if self.left > 0 else math.nan)


@pytest.mark.parametrize("objective", ["likelihood", "flow_matching"])
def test_N11_a_velocity_that_is_not_finite_ends_the_fit_with_the_best_weights(objective):
    flow = pf.Flow(continuous(2, velocity=Breaking(100)), standard_normal(2))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.learned.velocity.net.left = 1 if objective == "flow_matching" else 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(flow, clusters(200), objective=objective, max_epochs=30)
    assert result.stopped == "non-finite"
    assert any("not finite in 10 steps" in str(w.message) for w in caught)
    assert any("velocity" in str(w.message) for w in caught)
    learned = {name: value for name, value in flow.state_dict().items() if name.startswith("transform.transforms.0")}
    assert learned
    assert all(torch.equal(value, before[name]) for name, value in learned.items())


def test_a_velocity_that_is_not_finite_may_raise_or_be_skipped():
    flow = pf.Flow(continuous(2, velocity=Breaking(1)), standard_normal(2))
    with pytest.raises(errors.NonFiniteLoss, match="velocity"):
        fit(flow, clusters(200), on_nonfinite="raise")
    result = fit(flow, clusters(200), on_nonfinite="skip", max_epochs=2, batch_size=90)
    assert result.history["skipped"] == [0.0, 2.0, 2.0]


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("velocity", "objective must be one of 'likelihood', 'flow_matching', 'mixture'"),
        ([], "objective must be one of"),
        (3, "got 3"),
        ("elbo", "ELBO\\(log_density\\)"),
    ],
)
def test_objectives_that_there_are_not(objective, message):
    with pytest.raises(errors.OptionError, match=message):
        fit(velocity_flow(), clusters(50), objective=objective)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatching("straight"), "no path 'straight'"),
        (lambda: FlowMatching(coupling="ot"), "coupling must be"),
        (lambda: FlowMatching(group=1), "group must be an integer of at least 2"),
        (lambda: FlowMatching(sigma="none"), "sigma of the path 'optimal_transport' must be at least 0"),
        (lambda: FlowMatching(context_weight=None), "context_weight"),
        (lambda: FlowMatching(sigma=1.0), "sigma of the path 'optimal_transport' must be at least 0"),
        (lambda: FlowMatching("schroedinger_bridge", sigma=0.0), "must be positive"),
        (lambda: FlowMatching(context_weight=math.inf), "context_weight"),
        (lambda: ELBO(3.0), "log_density must be a function"),
        (lambda: ELBO(lambda z: z, samples=1), "samples must be an integer"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(errors.OptionError, match=message):
        make()


@pytest.mark.parametrize(
    "flow",
    [
        pf.flow("nsf", input_dim=2),
        pf.Flow(Compose([continuous(2), affine(2)]), standard_normal(2)),
        pf.flow("mixture", input_dim=2),
    ],
    ids=["nsf", "two parts", "mixture"],
)
def test_flow_matching_needs_a_velocity(flow):
    with pytest.raises(errors.OptionError, match="whose learned transform is one ContinuousTransform"):
        fit(flow, clusters(50), objective="flow_matching")


def test_flow_matching_needs_time_and_something_to_train():
    with pytest.raises(errors.OptionError, match="end_time is 0"):
        fit(velocity_flow(end_time=0.0), clusters(50), objective="flow_matching")
    flow = velocity_flow(learn_end_time=True)
    flow.learned.velocity.requires_grad_(False)
    with pytest.raises(errors.OptionError, match="no trainable parameters"):
        fit(flow, clusters(50), objective="flow_matching")


def test_without_scipy_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(errors.OptionError, match="pip install scipy"):
        fit(velocity_flow(), clusters(50), objective=FlowMatching(coupling="optimal_transport"))
    fit(velocity_flow(), clusters(50), objective="flow_matching", max_epochs=1)


def test_rows_go_with_objectives_that_read_them():
    objective = ELBO(lambda z: -z.square().sum(-1))
    with pytest.raises(errors.OptionError, match="needs rows x"):
        fit(velocity_flow(), objective="flow_matching")
    with pytest.raises(errors.OptionError, match="leave out x"):
        fit(velocity_flow(), clusters(50), objective=objective)
    with pytest.raises(errors.OptionError, match="validation must be a share"):
        fit(velocity_flow(), objective=objective, validation=clusters(10))
    with pytest.raises(errors.ShapeError, match="one number a point"):
        fit(velocity_flow(), objective=ELBO(lambda z: -z.square()))
    with pytest.raises(errors.NotReparametrized, match="samples that can be differentiated"):
        fit(pf.flow("mixture", input_dim=2), objective=objective)
    with pytest.raises(errors.OptionError, match="3 numbers for 2 objectives"):
        fit(velocity_flow(), clusters(50), objective="mixture", max_epochs=(1, 2, 3))


def test_an_interrupt_before_the_first_score_is_a_result_too():
    class Stopped(Objective):
        def __call__(self, flow, rows, context=None):
            raise KeyboardInterrupt

    flow = velocity_flow()
    before = {name: value.clone() for name, value in flow.named_parameters()}
    result = fit(flow, clusters(50), objective=Stopped(), progress=False)
    assert (result.stopped, result.history["epoch"], result.best_epoch) == ("interrupted", [0.0], 0)
    assert math.isnan(result.validation)
    assert math.isnan(result.train)
    assert "epoch 0 of 0" in str(result)
    assert all(torch.equal(before[name], value) for name, value in flow.named_parameters())


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda flow, rows: -flow().log_prob(rows).mean(), r"got \(\)"),
        (lambda flow, rows: rows * flow().log_prob(rows).unsqueeze(-1), r"got \(\d+, 2\)"),
        (lambda flow, rows: 3.0, "got float"),
    ],
)
def test_an_objective_gives_a_loss_for_each_row(loss, got):
    class Mine(Objective):
        def __call__(self, flow, rows, context=None):
            return loss(flow, rows)

    with pytest.raises(errors.ShapeError, match=f"expected Mine to give a loss for each row.*{got}"):
        fit(velocity_flow(), clusters(50), objective=Mine(), progress=False)


@pytest.mark.parametrize("path", ["optimal_transport", "schroedinger_bridge"])
def test_a_coupling_of_no_rows_has_no_losses(path):
    objective = FlowMatching(path, coupling="optimal_transport")
    assert objective(velocity_flow(), torch.zeros(0, 2)).shape == (0,)


@pytest.mark.parametrize(("option", "value"), [("lr", "small"), ("clip_norm", "small"), ("seed", "one"), ("seed", 1.5)])
def test_numbers_of_a_fit_are_numbers(option, value):
    with pytest.raises(errors.OptionError, match=f"{option} must be"):
        fit(velocity_flow(), clusters(50), **{option: value})
