"""Bases: the Student-t numbers whose tail weight is learned, and bases of the user's own."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyroflows as pf
from pyroflows.distributions import Base, Flow, LearnedStudentT
from pyroflows.errors import OptionError
from pyroflows.transforms import affine

SMALL = {"transforms": 2, "hidden_dims": (16,)}


def base_at(*raw):
    base = LearnedStudentT(len(raw)).double()
    with torch.no_grad():
        base.raw.copy_(torch.tensor(raw))
    return base


def test_the_density_is_that_of_scipy():
    base = base_at(-200.0, -2.0, 0.0, 1.0, 200.0)
    torch.testing.assert_close(base.df[[0, -1]], 5 * torch.tensor([-3.0, 3.0]).double().exp())
    x = torch.randn(200, 5).double() * torch.logspace(-4, 8, 200).double()[:, None]
    want = scipy.stats.t.logpdf(x.numpy(), base.df.detach().numpy()).sum(-1)
    torch.testing.assert_close(base().log_prob(x), torch.from_numpy(want), rtol=1e-12, atol=1e-12)


def test_samples_follow_it():
    torch.manual_seed(0)
    base = base_at(-2.0, 0.0, 2.0)
    x = base().sample((20000,))
    for column, df in zip(x.T, base.df, strict=True):
        assert scipy.stats.kstest(column.numpy(), "t", args=(df.item(),)).statistic < 2.2 / 20000**0.5


def test_the_gradient_of_samples():
    """Of E min(|x|, 5) with respect to the logarithm of df, by a difference of integrals."""
    torch.manual_seed(0)
    base = base_at(0.0)
    found = torch.autograd.grad(base().rsample((200000,)).abs().clamp(max=5).mean(), base.raw)[0].item()

    def mean(df):
        return scipy.stats.t(df).expect(lambda x: min(abs(x), 5.0), points=[-5, 0, 5], lb=-1e3, ub=1e3)

    want = (mean(5 * math.exp(0.01)) - mean(5 * math.exp(-0.01))) / 0.02
    assert found == pytest.approx(want, abs=0.01)


def test_far_out_the_score_and_its_gradients_are_finite():
    base = LearnedStudentT(3)
    x = torch.tensor([1e20, -1e38, 0.0], requires_grad=True)
    score = base().log_prob(x)
    score.backward()
    assert score.item() == pytest.approx(scipy.stats.t.logpdf([1e20, 1e38, 0.0], 5).sum(), rel=1e-5)
    assert x.grad.isfinite().all()
    assert base.raw.grad.isfinite().all()


def test_a_distribution_knows_later_weights():
    base = base_at(0.0, 0.0)
    d, x = base(), torch.ones(2).double() * 4
    before = d.log_prob(x)
    with torch.no_grad():
        base.raw.sub_(1.0)
    assert torch.equal(d.log_prob(x), base().log_prob(x))
    assert d.log_prob(x) > before
    for clone in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert torch.equal(clone.log_prob(x), d.log_prob(x))


@pytest.mark.parametrize("name", ["nsf", "maf", "realnvp", "bnaf", "planar", "naf", "mixture"])
def test_named_flows_take_it(name, tmp_path):
    torch.manual_seed(0)
    options = {**SMALL, "base": "student_t"} if name != "mixture" else {**SMALL, "flow": "maf", "base": "student_t"}
    flow = pf.flow(name, input_dim=2, context_dim=1, **options)
    x, context = dist.StudentT(2.0).sample((300, 2)), torch.randn(300, 1)
    result = pf.fit(flow, x, context, max_epochs=2, progress=False, seed=0, standardize="robust")
    assert all(math.isfinite(value) for value in result.history["validation"])
    pf.save(flow, tmp_path / "flow.safetensors")
    other = pf.load(tmp_path / "flow.safetensors")
    assert torch.equal(other(context).log_prob(x), flow(context).log_prob(x))
    flow.double()
    assert flow(context.double()).sample().dtype == torch.float64
    assert flow(context.double()).batch_shape == (300,)


def test_it_learns_heavy_tails():
    torch.manual_seed(0)
    x = dist.StudentT(2.0).sample((4000, 2))
    test = dist.StudentT(2.0).sample((4000, 2))
    scores = {}
    for base in ("normal", "student_t"):
        torch.manual_seed(0)
        flow = pf.flow("realnvp", input_dim=2, base=base, transforms=1, hidden_dims=(8,))
        pf.fit(flow, x, max_epochs=25, lr=2e-2, progress=False, seed=0, standardize="robust")
        scores[base] = flow().log_prob(test).mean().item()
    truth = dist.StudentT(2.0).log_prob(test).sum(-1).mean().item()
    assert truth - scores["student_t"] < 0.03
    assert scores["student_t"] > scores["normal"] + 0.1
    assert (flow.base.df < 3.2).all()  # from 5 towards 2; the couplings stretch the tails a little too


def test_in_a_guide():
    """Each of two guides trains its own degrees of freedom."""

    def model():
        pyro.sample("z", dist.StudentT(2.0, 1.0, 0.3))

    pyro.clear_param_store()
    guides = [pf.AutoFlow(model, flow="realnvp", base="student_t", **SMALL).setup() for _ in range(2)]
    for guide in guides:
        SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step()
    assert all((guide.base.raw != 0).all() for guide in guides)
    assert not torch.equal(guides[0].base.raw, guides[1].base.raw)


def test_a_base_of_ones_own():
    base = Base(dist.StudentT, df=torch.tensor(3.0), loc=torch.zeros(2), scale=torch.ones(2))
    flow = Flow(affine(2, context_dim=1), base)
    x = torch.randn(100, 2)
    pf.fit(flow, x, torch.randn(100, 1), max_epochs=2, progress=False, seed=0)
    assert flow(torch.zeros(5, 1)).rsample((3,)).shape == (3, 5, 2)
    with pytest.raises(pf.errors.NotRebuildable, match="by name"):
        pf.save(flow, "nowhere")


def test_options_that_mean_nothing():
    with pytest.raises(OptionError, match='"normal" or "student_t"'):
        pf.flow("nsf", input_dim=2, base="cauchy")
    for df in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="df"):
            LearnedStudentT(2, df=df)
