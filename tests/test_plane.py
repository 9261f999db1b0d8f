"""Planar, radial and Sylvester flows on eight densities of the plane and as guides of four more.

Energies: Rezende, Mohamed (2015), *Variational inference with normalizing flows*, arXiv:1505.05770, table 1.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyroflows as pf
from pyroflows.diagnostics import importance_summary

FLOWS = {
    "planar": ("planar", 8, {}),
    "radial": ("radial", 8, {}),
    "orthogonal": ("sylvester", 4, {"factor": "orthogonal"}),
    "householder": ("sylvester", 4, {"factor": "householder"}),
    "triangular": ("sylvester", 4, {"factor": "triangular"}),
}
"""By kind: the flow's name, its number of layers at depth 1, and its options."""


# --- eight densities --------------------------------------------------------------------------------------


def at(radius, angle):
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def gaussians(n):
    return at(torch.tensor(2.8), torch.randint(8, (n,)) * math.pi / 4) + 0.35 * torch.randn(n, 2)


def checkerboard(n):
    column, row = torch.randint(4, (n,)), torch.randint(2, (n,))
    return 2 * (torch.stack([column, 2 * row + column % 2], -1) + torch.rand(n, 2)) - 4


def circles(n):
    return at(1.5 * torch.randint(1, 3, (n,)), 2 * math.pi * torch.rand(n)) + 0.24 * torch.randn(n, 2)


def rings(n):
    return at(0.75 * torch.randint(1, 5, (n,)), 2 * math.pi * torch.rand(n)) + 0.08 * torch.randn(n, 2)


def moons(n):
    arc, upper = at(torch.tensor(2.0), math.pi * torch.rand(n)), torch.rand(n, 1) < 0.5
    return torch.where(upper, arc, torch.tensor([2.0, 1.0]) - arc) - torch.tensor([1.0, 0.2]) + 0.2 * torch.randn(n, 2)


def swissroll(n):
    turn = 1.5 * math.pi * (1 + 2 * torch.rand(n))
    return at(turn / 5, turn) + 0.2 * torch.randn(n, 2)


def spirals(n):
    turn, arm = 3 * math.pi * torch.rand(n).sqrt(), torch.randint(2, (n,)) * math.pi
    return at(turn / 3, turn + arm) + 0.15 * torch.randn(n, 2)


def pinwheel(n):
    along, across, arm = 1 + 0.3 * torch.randn(n), 0.1 * torch.randn(n), torch.randint(5, (n,))
    return 2 * at(torch.hypot(along, across), torch.atan2(across, along) - 0.4 * math.pi * arm - 0.25 * along.exp())


SETS = {f.__name__: f for f in (gaussians, checkerboard, circles, rings, moons, swissroll, spirals, pinwheel)}


# --- density and samples ----------------------------------------------------------------------------------


def fitted(kind, depth, rows, held_out, lr=1e-2):
    name, transforms, own = FLOWS[kind]
    torch.manual_seed(0)
    flow = pf.flow(name, input_dim=2, transforms=depth * transforms, direction="score", **own)
    pf.fit(flow, rows, validation=held_out, max_epochs=25, lr=lr, progress=False, seed=0)
    return flow


def gain_over_a_gaussian(flow, rows, held_out):
    """How many nats a row the flow scores new rows above a Gaussian of the mean and covariance of the old ones."""
    gaussian = dist.MultivariateNormal(rows.mean(0), torch.cov(rows.T))
    with torch.no_grad():
        return float((flow().log_prob(held_out) - gaussian.log_prob(held_out)).mean())


def assert_samples_follow_the_density(flow, samples=10_000, side=360, cells=40, half=9.0):
    """By quadrature: the mass is one, the samples' surprise is the entropy, and each cell has its share of samples."""
    axis = (torch.arange(side) + 0.5) * 2 * half / side - half
    with torch.no_grad():
        log_q = flow().log_prob(torch.cartesian_prod(axis, axis)).double()
        draws = flow().sample((samples,))
        surprise = -flow().log_prob(draws.clone())  # a copy is no sample that the flow remembers
    mass = log_q.exp() * (2 * half / side) ** 2
    assert float(mass.sum()) == pytest.approx(1, abs=2e-3)
    error = float(surprise.std()) / math.sqrt(samples)
    assert float(surprise.mean()) == pytest.approx(-float((mass * log_q).sum()), abs=4 * error)

    expected = samples * mass.reshape(cells, side // cells, cells, side // cells).sum((1, 3)).flatten()
    column, row = ((draws + half) / (2 * half) * cells).floor().long().clamp(0, cells - 1).unbind(-1)
    count = torch.bincount(cells * column + row, minlength=cells**2)
    full = expected > 5
    expected, count = (torch.cat([x[full], x[~full].sum()[None]]) for x in (expected, count))  # the others together
    chi_square, freedom = float(((count - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom > 50
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", FLOWS)
def test_they_learn_eight_gaussians(kind):
    rows, held_out, fresh = gaussians(2000), gaussians(500), gaussians(2000)
    flow = fitted(kind, 1, rows, held_out)
    assert gain_over_a_gaussian(flow, rows, fresh) > 0.3
    assert_samples_follow_the_density(flow, samples=5000)


LEARNED = {
    "gaussians": 0.8,
    "checkerboard": 0.15,
    "circles": 0.08,
    "rings": 0.01,
    "moons": 0.35,
    "swissroll": 0.2,
    "spirals": 0.1,
    "pinwheel": 0.2,
}
"""Nats a row that every kind gains over a Gaussian in a few seconds; four thin rings would take many more layers."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("density", LEARNED)
def test_they_learn_each_density(density, kind):
    draw = SETS[density]
    rows, held_out, fresh = draw(3000), draw(1000), draw(4000)
    flow = fitted(kind, 2, rows, held_out, lr=3e-2 if density == "rings" else 1e-2)
    assert gain_over_a_gaussian(flow, rows, fresh) > LEARNED[density]
    assert_samples_follow_the_density(flow)


# --- guides -----------------------------------------------------------------------------------------------


def wave(z):
    return torch.sin(math.pi * z[..., 0] / 2)


def bump(z, height, centre, width):
    return height * torch.exp(-0.5 * ((z[..., 0] - centre) / width) ** 2)


def two_wells(z):
    sides = torch.stack([-0.5 * ((z[..., 0] - side) / 0.6) ** 2 for side in (2, -2)], -1)
    return 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2 - sides.logsumexp(-1)


def river(z):
    return 0.5 * ((z[..., 1] - wave(z)) / 0.4) ** 2


def fork(z):
    away = z[..., 1] - wave(z)
    return -torch.logaddexp(-0.5 * (away / 0.35) ** 2, -0.5 * ((away + bump(z, 3, 1, 0.6)) / 0.35) ** 2)


def step(z):
    away = z[..., 1] - wave(z)
    other = away + 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    return -torch.logaddexp(-0.5 * (away / 0.4) ** 2, -0.5 * (other / 0.35) ** 2)


ENERGIES = {f.__name__: f for f in (two_wells, river, fork, step)}
PRIOR = 1.5
"""The standard deviation of a normal prior: alone, three of the energies have no finite integral."""


def model(energy):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), PRIOR).to_event(1))
    pyro.factor("energy", -energy(z))


def log_evidence(energy, side=800, half=10.0):
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) * 2 * half / side - half
    z = torch.cartesian_prod(axis, axis)
    log_joint = dist.Normal(0.0, PRIOR).log_prob(z).sum(-1) - energy(z)
    return float(log_joint.logsumexp(0)) + 2 * math.log(2 * half / side)


# The bioassay of Racine, Grieve, Fluehler, Smith (1986): five animals at each of four log doses.
DOSE, DIED = torch.tensor([-0.86, -0.30, -0.05, 0.73]), torch.tensor([0.0, 1.0, 3.0, 5.0])
SLOPE = 10.0


def bioassay():
    alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))  # the slope in units of its prior's standard deviation
    with pyro.plate("group", 4):
        pyro.sample("died", dist.Binomial(5, logits=alpha + SLOPE * beta * DOSE), obs=DIED)


def log_evidence_of_the_bioassay(side=800):
    alpha = torch.linspace(-8, 10, side, dtype=torch.float64)[:, None, None]
    beta = torch.linspace(-2, 6, side, dtype=torch.float64)[:, None]
    likelihood = dist.Binomial(5, logits=alpha + SLOPE * beta * DOSE.double()).log_prob(DIED.double()).sum(-1)
    log_prior = dist.Normal(0.0, 2.0).log_prob(alpha[..., 0]) + dist.Normal(0.0, 1.0).log_prob(beta[..., 0])
    cell = 18 / (side - 1) * 8 / (side - 1)
    return float((log_prior + likelihood).flatten().logsumexp(0)) + math.log(cell)


def trained_guide(model, data, kind, depth, steps, plates=0):
    """The guide's ELBO, and what importance sampling from it makes of the evidence."""
    name, transforms, own = FLOWS[kind]
    guide = pf.AutoFlow(model, flow=name, transforms=depth * transforms, init_scale=1.0, **own).setup(*data)
    optimizer = pyro.optim.ClippedAdam({"lr": 2e-2, "lrd": 0.05 ** (1 / steps), "clip_norm": 10.0})
    svi = SVI(model, guide, optimizer, Trace_ELBO(64, vectorize_particles=True, max_plate_nesting=plates))
    for _ in range(steps):
        svi.step(*data)
    return importance_summary(model, guide, *data, num_samples=20_000, max_plate_nesting=plates)


@pytest.mark.parametrize("kind", FLOWS)
def test_they_guide_between_two_wells(kind):
    exact = log_evidence(two_wells)
    found = trained_guide(model, (two_wells,), kind, depth=1, steps=150)
    assert -0.02 < exact - found.elbo < (2.2 if kind == "radial" else 0.87)  # the best normal guide is 0.87 nats below
    assert found.log_evidence == pytest.approx(exact, abs=0.05)


GAPS = {"river": (0.45, 1.0), "fork": (0.75, 1.1), "step": (0.5, 1.0)}
"""How far below the log evidence a guide may stay, and a radial one; the best normal ones: 0.63, 0.91, 0.56."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("energy", GAPS)
def test_they_guide_with_each_energy(energy, kind):
    exact = log_evidence(ENERGIES[energy])
    found = trained_guide(model, (ENERGIES[energy],), kind, depth=2, steps=250)
    assert -0.02 < exact - found.elbo < GAPS[energy][kind == "radial"]
    assert found.log_evidence == pytest.approx(exact, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLOWS)
def test_they_guide_in_a_bioassay(kind):
    exact = log_evidence_of_the_bioassay()
    found = trained_guide(bioassay, (), kind, depth=1, steps=250, plates=1)
    assert -0.02 < exact - found.elbo < 0.4
    assert found.log_evidence == pytest.approx(exact, abs=0.05)
