"""Mixtures of flows: the density is the sum, samples follow it, and all that a flow does works, save ``rsample``."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyroflows as pf
from pyroflows.distributions import Mixture, MixtureDistribution, mixture
from pyroflows.errors import ContextError, LawViolation, NotReparametrized, OptionError

SMALL = {"flow": "maf", "transforms": 1, "hidden_dims": (8,)}


def small(context_dim=0, **options):
    torch.manual_seed(0)
    return mixture(2, context_dim=context_dim, **{**SMALL, **options}).double()


@pytest.mark.parametrize("context_dim", [0, 3])
def test_the_density_is_the_weighted_sum(context_dim):
    flow = small(context_dim)
    context = torch.randn(5, 3).double() if context_dim else None
    x = torch.randn(5, 2).double()
    if context_dim:
        parts = [part(context).log_prob(x).exp() for part in flow.components]
        weights = torch.softmax(flow.base.weigh(None, context), -1)
    else:
        with torch.no_grad():
            flow.base.logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
        parts = [part().log_prob(x).exp() for part in flow.components]
        weights = torch.softmax(torch.tensor([0.0, 1.0, -2.0]).double(), -1)
    joint = torch.stack(parts, -1) * weights
    d = flow(context) if context_dim else flow()
    torch.testing.assert_close(d.log_prob(x).exp(), joint.sum(-1))
    torch.testing.assert_close(flow.responsibilities(x, context), joint / joint.sum(-1, keepdim=True))


def test_it_integrates_to_one_and_samples_follow_it():
    torch.manual_seed(0)
    flow = mixture(1, **SMALL)
    with torch.no_grad():
        flow.base.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        grid = torch.linspace(-15, 15, 6001)[:, None]
        density = flow().log_prob(grid).exp()
        assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-3)
        cumulative = torch.cumulative_trapezoid(density, grid[:, 0])
        sample = flow().sample((4000,))[:, 0].sort().values
    theirs = cumulative[torch.searchsorted(grid[1:, 0].contiguous(), sample).clamp(max=5999)]
    assert (theirs - torch.arange(4000) / 4000).abs().max() < 2.2 / 4000**0.5


@pytest.mark.parametrize("context_dim", [0, 3])
def test_shapes(context_dim):
    flow = small(context_dim)
    for batch in ((), (6,), (2, 3)) if context_dim else ((),):
        d = flow(torch.randn(*batch, 3).double()) if context_dim else flow()
        assert (d.batch_shape, d.event_shape, d.has_rsample) == (batch, (2,), False)
        for shape in ((), (1,), (2, 4), (0,)):
            x = d.sample(shape)
            assert x.shape == (*shape, *batch, 2)
            assert d.log_prob(x).shape == (*shape, *batch)
        wide = d.expand((5, *batch))
        x = wide.sample((3,))
        assert x.shape == (3, 5, *batch, 2)
        torch.testing.assert_close(wide.log_prob(x), d.log_prob(x.clone()))
        assert d.expand_by((5,)).to_event(1).log_prob(d.sample((5,))).shape == (5, *batch)[:-1]
        assert (d.mask(False).log_prob(d.sample()) == 0).all()


def test_rows_have_noise_of_their_own():
    flow = small(3)
    rows = flow(torch.zeros(6, 3).double()).sample((10,)).reshape(60, 2)
    assert len(rows.unique(dim=0)) == 60


def test_rsample_says_why_not():
    d = small()()
    for call in (d.rsample, d.rsample_with_log_prob):
        with pytest.raises(NotReparametrized, match="score"):
            call()
    with pytest.raises(NotImplementedError):
        d.base_dist.rsample()


def test_scores_are_those_of_the_present_weights():
    flow = small(3)
    d, x = flow(torch.ones(3).double()), torch.zeros(2).double()
    before = d.log_prob(x)
    with torch.no_grad():
        for parameter in flow.base.weigh.parameters():
            parameter.add_(0.3)
    fresh = flow(torch.ones(3).double()).log_prob(x)
    assert torch.equal(d.log_prob(x), fresh)
    assert not torch.equal(before, fresh)


def test_copies_and_state():
    flow, x = small(3), torch.zeros(2).double()
    d = flow(torch.ones(3).double())
    other = small(3, components=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(flow.state_dict())
    for clone in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), other):
        assert torch.equal(clone(torch.ones(3).double()).log_prob(x), d.log_prob(x))
    for clone in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert torch.equal(clone.log_prob(x), d.log_prob(x))


def test_fit_finds_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[-20.0, 0.0], [20.0, 5.0], [0.0, 60.0]])
    x = centres[torch.randint(3, (600,))] + torch.randn(600, 2)
    flow = mixture(2, **SMALL)
    pf.fit(flow, x, max_epochs=40, batch_size=200, lr=0.02, seed=0, progress=False)
    truth = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(centres, 1.0).to_event(1))
    assert (truth.log_prob(x).mean() - flow().log_prob(x).mean()).item() < 0.15
    hard = flow.responsibilities(x).max(-1).values
    assert hard.mean() > 0.99


def test_as_a_guide():
    """The score function stands in for the derivative that there is none of."""
    torch.manual_seed(0)
    flow = mixture(1, **SMALL)

    def model():
        pyro.sample("z", dist.Normal(torch.tensor([1.0]), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    Trace_ELBO(num_particles=3).differentiable_loss(model, guide).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert flow.base.logits.grad.abs().max() > 0
    assert SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step() > -100


def test_in_plates_and_on_a_support():
    flow = mixture(2, context_dim=3, support="positive", **SMALL)
    with pyro.plate("rows", 6):
        x = pyro.sample("x", flow(torch.randn(6, 3)))
    assert x.shape == (6, 2)
    assert (x > 0).all()


def test_components_of_different_kinds():
    flow = Mixture([pf.flow("maf", input_dim=2, transforms=1), pf.flow("planar", input_dim=2, transforms=1)])
    assert flow().log_prob(torch.zeros(4, 2)).shape == (4,)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mixture([]),
        lambda: Mixture([pf.flow("maf", input_dim=2), pf.flow("maf", input_dim=3)]),
        lambda: Mixture([pf.flow("maf", input_dim=2), pf.flow("maf", input_dim=2, context_dim=1)]),
        lambda: Mixture([pf.flow("maf", input_dim=2, support="positive")]),
        lambda: mixture(2, components=0),
    ],
)
def test_options_that_mean_nothing(build):
    with pytest.raises(OptionError):
        build()


def test_a_context_that_does_not_fit():
    for call in (lambda: small(3)(), lambda: small()(torch.zeros(3)), lambda: small(3)(torch.zeros(2).double())):
        with pytest.raises(ContextError):
            call()


def test_a_mixture_of_distributions():
    parts = [dist.Normal(torch.tensor(mean), 1.0).expand((4,)) for mean in (-3.0, 3.0)]
    d = MixtureDistribution(torch.tensor([0.0, 1.0]), parts)
    want = dist.MixtureSameFamily(
        dist.Categorical(logits=torch.tensor([0.0, 1.0])), dist.Normal(torch.tensor([-3.0, 3.0]), 1.0)
    )
    torch.testing.assert_close(d.log_prob(torch.zeros(4)), want.log_prob(torch.zeros(4)))
    assert d.sample((5,)).shape == (5, 4)


# --- by its name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, 2])
def test_by_name_it_fits_is_saved_and_loaded(context_dim, tmp_path):
    torch.manual_seed(0)
    flow = pf.flow("mixture", input_dim=2, context_dim=context_dim, components=2, support="positive", **SMALL)
    assert flow.config.name == "mixture"
    assert flow.context_dim == context_dim
    x, context = torch.rand(100, 2) + 0.1, torch.randn(100, context_dim) if context_dim else None
    start = pf.fit(flow, x, context, max_epochs=3, seed=0, progress=False)
    assert start.best_epoch > 0
    pf.save(flow, tmp_path / "flow.safetensors")
    other = pf.load(tmp_path / "flow.safetensors")
    assert isinstance(other, Mixture)
    at = (context,) if context_dim else ()
    assert torch.equal(other(*at).log_prob(x), flow(*at).log_prob(x))


def test_inner_flows_that_cannot_be_mixed():
    for inner in ("mixture", "ncsf", "sphere"):
        with pytest.raises(OptionError, match="single flows of real vectors"):
            pf.flow("mixture", input_dim=2, flow=inner)
    with pytest.raises(OptionError, match='no option "bns"'):
        pf.flow("mixture", input_dim=2, bns=4)


def test_as_a_prior_and_as_a_likelihood():
    torch.manual_seed(0)
    prior = pf.flow("mixture", input_dim=2, **SMALL)
    likelihood = pf.flow("mixture", input_dim=3, context_dim=2, **SMALL)
    data = torch.randn(5, 3)

    def model():
        pyro.module("likelihood", likelihood)
        with pyro.plate("rows", 5):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=data)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (5, 2)
    z = trace.nodes["z"]["value"]
    want = torch.stack([likelihood(a).log_prob(b) for a, b in zip(z, data, strict=True)])
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], want)
    guide = pyro.infer.autoguide.AutoNormal(model)
    assert SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step() > -1e3
    assert all(p.grad is not None for p in likelihood.parameters())


def test_a_guide_of_its_own_finds_the_posterior():
    torch.manual_seed(0)
    flow = pf.flow("mixture", input_dim=1, components=2, **SMALL)

    def model():
        pyro.sample("z", dist.Normal(torch.tensor([2.0]), 0.5).to_event(1))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(250)]
    assert losses[0] > 2
    assert sum(losses[-20:]) / 20 < 0.2  # the evidence is 0


def test_an_automatic_guide_of_one_is_refused():
    """Pyro's score function takes no account of an auxiliary site, so training would go astray."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = pf.AutoFlow(model, flow="mixture")
    for _ in range(2):
        with pytest.raises(NotReparametrized, match="single flow"):
            guide.setup()


def test_compiling_reaches_the_components():
    flow = pf.flow("mixture", input_dim=2, compile=False, components=2, **SMALL)
    x = torch.randn(4, 2)
    before = flow().log_prob(x)
    assert flow.compile(backend="eager") is flow
    assert all(
        "forward_and_log_det" in vars(part.transform) or part.transform.sequential[0] for part in flow.components
    )
    torch.testing.assert_close(flow().log_prob(x), before)


def test_the_laws_hold_it_to_its_word():
    """A distribution that says it has no rsample has none."""
    flow = pf.flow("mixture", input_dim=1, components=2, **SMALL)
    laws = ["event_shapes", "joint", "fresh_scores", "flow_copies", "training_step"]
    assert pf.check(flow, laws=laws).ok

    class Modest(MixtureDistribution):
        def rsample(self, sample_shape=()):
            return self.sample(sample_shape)

    def modest(self, context=None):
        d = type(self).forward(self, context)
        d.base_dist.__class__ = Modest
        return d

    flow.forward = modest.__get__(flow)
    with pytest.raises(LawViolation, match="has_rsample is False"):
        pf.check(flow, laws=["event_shapes"])
