"""Flows as members of Pyro: priors, likelihoods, guides, reparameterisers."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalizingFlow
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import errors
from pyroflows import transforms as T

OTHER_SHAPES = {"glow": (1, 4, 4), "realnvp_image": (1, 4, 4), "sphere": 2}
RECIPES = [name for name in pf.available("distributions") if name not in OTHER_SHAPES]


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def small(name="nsf", input_dim=2, **options):
    extra = {"bins": 4} if name == "nsf" else {}
    return pf.flow(name, input_dim=input_dim, transforms=2, hidden_dims=(8,), **extra, **options)


def perturbed(flow, scale=0.3):
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p))
    return flow


@pytest.mark.parametrize("name", RECIPES)
def test_prior_under_autonormal(name):
    flow = perturbed(small(name)).requires_grad_(False).eval()

    def model(y):
        x = pyro.sample("x", flow())
        pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(torch.tensor([0.5, -0.2])) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert guide.median()["x"].sub(torch.tensor([0.5, -0.2])).abs().max() < 0.2


def test_prior_under_nuts():
    flow = perturbed(small()).requires_grad_(False)

    def model(y):
        x = pyro.sample("x", flow())
        pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)

    mcmc = MCMC(NUTS(model), num_samples=60, warmup_steps=60, disable_progbar=True)
    mcmc.run(torch.tensor([0.5, -0.2]))
    assert mcmc.get_samples()["x"].mean(0).sub(torch.tensor([0.5, -0.2])).abs().max() < 0.2


def test_prior_with_a_support_under_nuts():
    flow = perturbed(small(support=["positive", "unit_interval"])).requires_grad_(False)

    def model():
        pyro.sample("x", flow())

    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    assert flow.support.check(mcmc.get_samples()["x"]).all()


def test_likelihood_with_trainable_parameters():
    flow = small(context_dim=1)

    def model(x):
        pyro.module("flow", flow)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(scale.expand(len(x), 1)), obs=x)

    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = [p.clone() for p in flow.parameters()]
    for _ in range(2):
        svi.step(torch.randn(20, 2))
    assert all(not torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True))


def test_expand_mask_to_event_and_plates():
    q = perturbed(small())()
    assert q.expand((3, 4)).batch_shape == (3, 4)
    assert q.expand((3, 4)).sample().shape == (3, 4, 2)
    x = q.sample((3, 4))
    assert torch.allclose(q.expand((3, 4)).to_event(1).log_prob(x), q.log_prob(x).sum(-1), atol=1e-5)
    assert (q.mask(False).log_prob(x) == 0).all()
    assert q.expand((3, 1)).rsample().unique().numel() == 6  # distinct draws
    with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
        assert pyro.sample("x", q).shape == (3, 4, 2)
    assert type(q.expand((3,))) is pf.FlowDistribution


def test_context_has_batch_shape():
    flow = perturbed(small(context_dim=3))
    context = torch.randn(5, 6, 3)
    q = flow(context)
    assert q.batch_shape == (5, 6)
    assert q.sample((10,)).shape == (10, 5, 6, 2)
    same = flow(torch.zeros(6, 3)).sample()
    assert same.unique().numel() == 12  # rows of equal context do not share noise
    x = torch.randn(5, 6, 2)
    rows = torch.stack([flow(context[i, j]).log_prob(x[i, j]) for i in range(5) for j in range(6)])
    assert torch.allclose(q.log_prob(x).flatten(), rows, atol=1e-5)
    assert flow(context[0]).log_prob(torch.randn(10, 1, 2)).shape == (10, 6)


def test_context_errors():
    with pytest.raises(errors.ContextError, match="call flow\\(context\\)"):
        small(context_dim=3)()
    with pytest.raises(errors.ContextError, match="without a context"):
        small()(torch.zeros(3))
    with pytest.raises(errors.ContextError, match="expected a context of shape \\[\\*batch, 3\\], got \\(2,\\)"):
        small(context_dim=3)(torch.zeros(2))
    with pytest.raises(errors.ContextError, match="condition"):
        T.affine(2, context_dim=3)(torch.zeros(2))


@pytest.mark.parametrize("name", ["affine_autoregressive", "spline_coupling", "affine", "lu_linear", "permute"])
def test_conditional_transformed_distribution(name):
    layer = pf.transform(name, input_dim=3, context_dim=2)
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    for transform in (layer, layer.inv):
        q = dist.ConditionalTransformedDistribution(base, [transform]).condition(torch.randn(6, 2))
        y = q.rsample((4,)) if layer.context_dim else q.rsample((4, 6))
        assert y.shape == (4, 6, 3)
        assert q.log_prob(y).shape == (4, 6)


def test_conditional_compose_of_pyro():
    stack = dist.conditional.ConditionalComposeTransformModule(
        [T.conditional_spline_coupling(3, 2), T.permute(3), T.conditional_affine_coupling(3, 2)], cache_size=1
    )
    q = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [stack])
    q = q.condition(torch.randn(6, 2))
    y = q.rsample()
    assert torch.allclose(q.log_prob(y), q.log_prob(y.detach().clone()), atol=1e-5)


def model():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("n", 3):
        pyro.sample("theta", dist.Normal(mu, tau))


@pytest.mark.parametrize(
    "helper",
    [
        partial(T.spline_coupling, hidden_dims=[8]),
        partial(T.affine_autoregressive, hidden_dims=[8]),
        lambda d: T.affine_autoregressive(d, [8]).inv,
        lambda d: T.Compose([T.affine_coupling(d), T.permute(d), T.spline(d, event_dim=1)]),
    ],
)
def test_autonormalizingflow_of_pyro(helper):
    guide = AutoNormalizingFlow(model, partial(iterated, 2, helper))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    before = [p.clone() for p in guide.parameters()]
    assert before
    svi.step()
    assert any(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True))


def test_neutra():
    guide = pf.AutoFlow(model, flow="nsf", transforms=2, hidden_dims=(8,)).setup()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(5):
        svi.step()
    guide.requires_grad_(False).eval()
    neutra = NeuTraReparam(guide)
    warped = poutine.reparam(model, config=lambda _: neutra)
    mcmc = MCMC(NUTS(warped), num_samples=10, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    (latent,) = mcmc.get_samples().values()
    samples = neutra.transform_sample(latent.unsqueeze(-2))
    assert samples["theta"].shape == (10, 3)
    assert (samples["tau"] > 0).all()


def test_predictive():
    guide = pf.AutoFlow(model, flow="nsf", transforms=2, hidden_dims=(8,)).setup()
    for parallel in (True, False):
        samples = Predictive(model, guide=guide, num_samples=7, parallel=parallel, return_sites=["tau", "theta"])()
        assert samples["theta"].shape == (7, 3)
    flow = small()
    prior = Predictive(lambda: pyro.sample("x", flow()), num_samples=9)()
    assert prior["x"].shape == (9, 2)


def test_mixed_stack_in_a_plain_transformed_distribution():
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    parts = [
        T.affine_coupling(2),
        dist.transforms.AffineTransform(1.0, 2.0),
        T.spline(2),
        dist.transforms.ExpTransform(),
    ]
    for q in (dist.TransformedDistribution(base, parts), pf.FlowDistribution(base, [T.Compose(parts)])):
        x = q.sample((5,))
        assert (x > 0).all()
        assert q.log_prob(x).shape == (5,)
    x = x.clone()
    a = dist.TransformedDistribution(base, parts).log_prob(x)
    assert torch.allclose(a, pf.FlowDistribution(base, [T.Compose(parts)]).log_prob(x), atol=1e-5)


def test_spline_keeps_pyros_event_dim():
    layer = T.spline(2)
    assert layer.domain is constraints.real
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(2), torch.ones(2)), [layer])
    assert q.batch_shape == (2,)
    assert q.log_prob(q.sample((5,))).shape == (5, 2)


def test_base_and_transform_must_agree():
    from pyroflows.distributions import Base

    with pytest.raises(errors.OptionError, match="to_event"):
        pf.Flow(T.affine(2), Base(dist.Normal, event_dim=0, loc=torch.zeros(2), scale=torch.ones(2)))


@pytest.mark.parametrize("name", [*RECIPES, *OTHER_SHAPES])
def test_N30_autocast_and_half_precision(name):
    context = torch.randn(20, 2)
    if name in OTHER_SHAPES:
        flow = pf.flow(name, input_dim=OTHER_SHAPES[name], context_dim=2)
        x = flow(context).sample()
    else:
        flow = small(name, input_dim=3, context_dim=2)
        x = torch.randn(20, 3) if name != "ncsf" else torch.rand(20, 3) * 6 - 3
    exact = flow(context).log_prob(x)
    more = x[0].numel() / 3  # tolerances are for three coordinates
    with torch.autocast("cpu", torch.bfloat16):
        q = flow(context)
        scores, y = q.log_prob(x), q.sample()
        y, log_q = q.rsample_with_log_prob() if q.has_rsample else (y, q.log_prob(y))
    assert scores.dtype == y.dtype == log_q.dtype == torch.float32
    assert torch.allclose(scores, exact, atol=0.1 * more)
    for dtype in (torch.bfloat16, torch.float16):
        q = flow.to(dtype)(context.to(dtype))
        assert q.sample().dtype == dtype
        log_prob = q.log_prob(x.to(dtype))
        assert log_prob.dtype == torch.float32  # log-dets are summed in at least float32
        assert torch.allclose(log_prob, exact, atol=0.3 * more)
