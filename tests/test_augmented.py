"""Augmented flows: the bound against marginals that are known, samples, use as a density."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.distributions import Augmented, Flow, standard_normal
from pyroflows.errors import ContextError, DtypeError, OptionError, ShapeError
from pyroflows.transforms import FlowTransform, continuous

FACTOR = torch.tensor([[1.2, 0.0, 0.0], [0.5, 0.8, 0.0], [0.9, -0.7, 0.6]], dtype=torch.float64)


class Mixed(FlowTransform):
    """``(x, e) = L z``, so that all marginals and conditionals are normal."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", FACTOR)

    def forward_and_log_det(self, x, context=None):
        return x @ self.factor.mT, self.factor.diagonal().log().sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        return y @ torch.linalg.inv(self.factor).mT, -self.factor.diagonal().log().sum().expand(y.shape[:-1])


class Posterior(FlowTransform):
    """``e = m + A x + s z``, the conditional of the last coordinate, off by a shift."""

    context_dim = 2

    def __init__(self, shift=0.0):
        super().__init__(2)
        cov = FACTOR @ FACTOR.mT
        self.gain, self.shift = cov[2:, :2] @ torch.linalg.inv(cov[:2, :2]), shift
        self.scale = (cov[2:, 2:] - self.gain @ cov[:2, 2:]).sqrt()[0]

    def forward_and_log_det(self, x, context=None):
        y = context @ self.gain.mT + self.shift + self.scale * x
        return y, self.scale.log().sum().expand(y.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        x = (y - self.shift - context @ self.gain.mT) / self.scale
        return x, -self.scale.log().sum().expand(x.shape[:-1])


def normal_flow(transform, dim):
    return Flow(transform, standard_normal(dim).double())


def marginal():
    return dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), scale_tril=FACTOR[:2, :2])


def test_the_bound_is_below_by_the_divergence_of_the_noise():
    model, x = Augmented(normal_flow(Mixed(), 3), extra=1), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    posterior = Posterior()
    mean, scale = float(posterior.gain @ x[0]), float(posterior.scale)
    gap = math.log(scale) + (1 + mean**2) / (2 * scale**2) - 0.5  # KL(N(0, 1) | N(mean, scale^2))
    draws = model().bound(x.expand(20000, 2))
    error = float(draws.std()) / 20000**0.5
    assert abs(float(draws.mean()) - (float(marginal().log_prob(x)) - gap)) < 4 * error < 0.1 * gap


def test_more_samples_make_the_bound_tighter():
    model, x = Augmented(normal_flow(Mixed(), 3), extra=1), marginal().sample((2000,))
    want = float(marginal().log_prob(x).mean())
    found = [float(model().bound(x, samples=n).mean()) for n in (1, 4, 16, 256)]
    assert found[0] + 0.3 < found[1] < found[2] - 0.05 < found[3]
    assert found[3] == pytest.approx(want, abs=0.05)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_right_noise_makes_it_exact_and_another_does_not(shift):
    noise = normal_flow(Posterior(shift), 1)
    model, x = Augmented(normal_flow(Mixed(), 3), 1, noise), marginal().sample((500,))
    bound, want = model().log_prob(x), marginal().log_prob(x)
    if shift == 0:
        torch.testing.assert_close(bound, want, rtol=1e-10, atol=1e-10)
    else:
        gap = shift**2 / (2 * float(Posterior().scale) ** 2)
        assert float((want - bound).mean()) == pytest.approx(gap, rel=0.2)


def test_the_noise_sees_standardised_points():
    """As if the data had another unit: the bound is the same but for the unit's own log."""
    noise = normal_flow(Posterior(), 1)
    model, x = Augmented(normal_flow(Mixed(), 3), 1, noise), marginal().sample((5,))
    want = model().log_prob(x)
    model.standardize.set(torch.tensor([5.0, -5.0, 0.0]), torch.tensor([10.0, 100.0, 1.0]))
    unit = torch.tensor([10.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(model().log_prob(torch.tensor([5.0, -5.0]) + unit * x), want - math.log(1000))


def test_samples_are_those_of_the_marginal():
    x = Augmented(normal_flow(Mixed(), 3), 1)().sample((20000,))
    assert x.shape == (20000, 2)
    torch.testing.assert_close(x.T.cov(), FACTOR[:2, :2] @ FACTOR[:2, :2].mT, rtol=0.06, atol=0.03)
    drawn = Augmented(Flow(continuous(3, hidden_dims=(8, 8)), standard_normal(3)), 1)().rsample((4,))
    assert drawn.requires_grad


def test_shapes_contexts_and_expansion():
    flow = Flow(continuous(3, context_dim=4, hidden_dims=(8, 8)), standard_normal(3))
    noise = Flow(continuous(1, context_dim=6, hidden_dims=(8, 8)), standard_normal(1))
    for model in (Augmented(flow, 1), Augmented(flow, 1, noise)):
        given = model(torch.zeros(5, 4))
        assert (given.batch_shape, given.event_shape) == ((5,), (2,))
        assert given.sample((7,)).shape == (7, 5, 2)
        assert given.log_prob(torch.zeros(7, 5, 2)).shape == (7, 5)
        assert given.bound(torch.zeros(2), samples=3).shape == (5,)
        assert model(torch.zeros(4)).expand((6,)).log_prob(torch.zeros(6, 2)).shape == (6,)
        assert given.log_prob(torch.zeros(0, 5, 2)).shape == (0, 5)
        with pytest.raises(ContextError):
            model()
    with pyro.plate("rows", 5):
        pyro.sample("x", given, obs=torch.zeros(5, 2))


def test_what_cannot_be_is_refused():
    flow = Flow(continuous(3, hidden_dims=(8, 8)), standard_normal(3))
    for extra in (0, 3, 1.0, True):
        with pytest.raises(OptionError, match="below 3"):
            Augmented(flow, extra)
    with pytest.raises(OptionError, match="context_dim=2"):
        Augmented(flow, 1, Flow(continuous(1, hidden_dims=(8, 8)), standard_normal(1)))
    with pytest.raises(OptionError, match="without a support"):
        Augmented(pf.flow("maf", input_dim=3, support=torch.distributions.constraints.positive), 1)
    for other in (torch.nn.Linear(3, 3), Augmented(flow, 1)):
        with pytest.raises(OptionError, match="expected a Flow"):
            Augmented(other, 1)
    with pytest.raises(OptionError, match="None or a Flow"):
        Augmented(flow, 1, noise=torch.nn.Linear(2, 1))
    for samples in (0, True):
        with pytest.raises(OptionError, match="samples"):
            Augmented(flow, 1)().bound(torch.zeros(2), samples=samples)
    with pytest.raises(ShapeError, match="points"):
        Augmented(flow, 1)().log_prob(torch.zeros(3))
    for value, remedy in (
        ([0.0, 0.0], "as_tensor"),
        (torch.zeros(2).bool(), "float"),
        (torch.zeros(2).double(), "float"),
    ):
        with pytest.raises(DtypeError, match=remedy):
            Augmented(flow, 1)().log_prob(value)


def test_whole_numbers_are_points_too():
    density = Augmented(Flow(continuous(3, hidden_dims=(8, 8)), standard_normal(3)), 1)()
    points = torch.tensor([[1, -2], [0, 3]])
    torch.manual_seed(0)
    found = density.log_prob(points)
    torch.manual_seed(0)
    assert torch.equal(found, density.log_prob(points.float()))


def test_a_flow_that_cannot_leave_its_shape_does_with_room_beside():
    """Affine maps of one coordinate stay normal; beside a second one they make two humps."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(300, 1) * 0.3 - 2, torch.randn(300, 1) * 0.3 + 2])
    alone = float(dist.Normal(x.mean(), x.std()).log_prob(x).mean())
    flow = pf.flow("realnvp", input_dim=2, transforms=4, hidden_dims=(32,))
    noise = pf.flow("maf", input_dim=1, context_dim=1, transforms=1, hidden_dims=(32,))
    model = Augmented(flow, 1, noise)
    result = pf.fit(model, x, max_epochs=40, lr=1e-2, batch_size=100, progress=False, seed=0)
    assert result.validation > alone + 0.4
    with torch.no_grad():
        assert float(model().bound(x, samples=20).mean()) > alone + 0.6  # the optimum is 1.2 above
        assert float((model().sample((2000,)).abs() > 1).float().mean()) > 0.85


def test_samples_are_scored_from_above():
    """The mean of a density's estimates from above and from below close in on the entropy."""
    model = Augmented(normal_flow(Mixed(), 3), extra=1)
    x, above = model().rsample_with_log_prob((5000,))
    want = marginal().log_prob(x)
    error = float((above - want).std()) / 5000**0.5
    assert float((above - want).mean()) > 4 * error  # by KL(p(e | x) | q(e | x))
    right = Augmented(normal_flow(Mixed(), 3), 1, normal_flow(Posterior(), 1))
    x, above = right().rsample_with_log_prob((50,))
    torch.testing.assert_close(above, marginal().log_prob(x), rtol=1e-10, atol=1e-10)


def test_fit_reads_contexts_and_an_elbo():
    flow = Flow(continuous(2, context_dim=1, hidden_dims=(8, 8), solver="rk4", steps=4), standard_normal(2))
    noise = pf.flow("maf", input_dim=1, context_dim=2, transforms=1, hidden_dims=(8,))
    model, c = Augmented(flow, 1, noise), torch.randn(200, 1)
    result = pf.fit(model, 3 + c + 0.5 * torch.randn(200, 1), c, max_epochs=12, lr=2e-2, progress=False, seed=0)
    assert result.validation > -1.2  # the optimum is -0.73, and without the context -1.53
    assert float(model.context_scale) != 1
    model = Augmented(pf.flow("realnvp", input_dim=2, hidden_dims=(8,)), 1)
    target = dist.Normal(2.0, 0.5)
    elbo = pf.training.ELBO(lambda z: target.log_prob(z).squeeze(-1), samples=512)
    result = pf.fit(model, objective=elbo, max_epochs=30, lr=2e-2, progress=False, seed=0)
    assert -0.3 < result.validation < 0.05  # the log of the normaliser is 0


@pytest.mark.parametrize("standardize", ["auto", None])
def test_same_seed_same_fit_and_the_global_generator_is_left_alone(standardize):
    found = []
    for start in (1, 2):
        torch.manual_seed(0)
        model, rows = Augmented(pf.flow("ffjord", input_dim=2, hidden_dims=(8, 8)), 1), torch.randn(50, 1)
        torch.manual_seed(start)
        state = torch.get_rng_state()
        result = pf.fit(model, rows, seed=3, max_epochs=1, standardize=standardize, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(result.history["validation"])
    assert found[0] == found[1]


def test_a_distribution_can_be_pickled():
    model = Augmented(pf.flow("ffjord", input_dim=2, context_dim=1, hidden_dims=(8, 8)), 1)
    density = model(torch.ones(5, 1))
    again = pickle.loads(pickle.dumps(density))
    torch.manual_seed(0)
    expected = density.log_prob(torch.zeros(5, 1))
    torch.manual_seed(0)
    assert torch.equal(again.log_prob(torch.zeros(5, 1)), expected)
