"""The AutoFlow guide: parameters, copies, names, quantiles, training."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import errors

DATA = torch.tensor([4.9, 5.2, 5.0, 4.7, 5.3])


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def model(data=DATA):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", len(data)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=data)


def mixed(data=DATA):
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("unit", dist.Beta(2.0, 2.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        pyro.sample("local", dist.Normal(torch.zeros(4), 1.0).to_event(1))


def guide_for(model, **options):
    return pf.AutoFlow(model, flow="nsf", transforms=2, hidden_dims=(16,), bins=4, **options)


def train(guide, steps=300, lr=0.02, loss=None, model=model):
    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": lr}), loss or Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1)
    )
    return [svi.step() for _ in range(steps)]


def test_parameters_exist_after_setup():
    guide = guide_for(model)
    assert guide.setup(DATA) is guide
    assert len(list(guide.parameters())) > 4
    names = [name for name, _ in guide.named_parameters()]
    guide()
    assert [name for name, _ in guide.named_parameters()] == names


def test_training_finds_the_posterior():
    guide = guide_for(model, init_scale=0.5).setup()
    losses = train(guide, steps=400) + train(guide, steps=300, lr=0.002)
    assert sum(losses[-50:]) < sum(losses[:50]) - 50
    draws = guide.get_posterior().sample((5000,))
    assert draws.mean(0)[0].item() == pytest.approx(5.0, abs=0.1)
    median = guide.median()
    assert median["mu"].item() == pytest.approx(5.0, abs=0.1)
    assert 0.1 < median["sigma"].item() < 0.6
    low, high = guide.quantiles([0.05, 0.95])["sigma"]
    assert 0 < low < median["sigma"] < high


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(4, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.0, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    ],
)
def test_every_elbo_of_pyro_trains_every_parameter(loss):
    guide = guide_for(model).setup()
    before = {name: p.clone() for name, p in guide.named_parameters()}
    train(guide, steps=2, loss=loss)
    still = [name for name, p in guide.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_torch_optimizer_with_module_local_params():
    with pyro.settings.context(module_local_params=True):
        guide = guide_for(model).setup()
        loss = Trace_ELBO()(model, guide)
        adam = torch.optim.Adam(guide.parameters(), lr=0.01)
        before = [p.clone() for p in guide.parameters()]
        for _ in range(2):
            adam.zero_grad()
            loss().backward()
            adam.step()
    assert all(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True))


def test_state_dict_loads_into_a_fresh_guide():
    guide = guide_for(model).setup()
    train(guide, steps=3)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = guide_for(model).setup()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 2)
    assert torch.equal(guide.get_posterior().log_prob(x), fresh.get_posterior().log_prob(x))


def test_the_first_call_sets_up():
    def grouped():
        with pyro.plate("group", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = guide_for(grouped)
    train(guide, steps=1, loss=Trace_ELBO(), model=grouped)
    assert guide.latent_dim == 3


def test_use_before_setup_says_so():
    with pytest.raises(errors.GuideNotSetUp, match="setup"):
        guide_for(model).load_state_dict({})
    with pytest.raises(errors.GuideNotSetUp, match="setup"):
        guide_for(model).get_posterior()


def test_init_loc_fn_and_init_scale():
    init = init_to_value(values={"mu": torch.tensor(100.0), "sigma": torch.tensor(2.0)})
    guide = guide_for(model, init_loc_fn=init, init_scale=0.01).setup()
    median = guide.median()
    assert median["mu"].item() == pytest.approx(100.0, abs=0.1)
    assert median["sigma"].item() == pytest.approx(2.0, abs=0.1)
    assert guide.get_posterior().sample((2000,)).std(0).tolist() == pytest.approx([0.01, 0.01], rel=0.1)


def test_mixed_supports_shapes_and_plates():
    guide = guide_for(mixed).setup()
    train(guide, steps=2, loss=Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=2), model=mixed)
    sample, median = guide(), guide.median()
    quantiles = guide.quantiles([0.25, 0.5, 0.75])
    shapes = {"real": (), "positive": (), "unit": (), "simplex": (3,), "cholesky": (3, 3), "local": (2, 3, 4)}
    for name, shape in shapes.items():
        assert sample[name].shape == median[name].shape == shape
        assert quantiles[name].shape == (3, *shape)
    for values in (sample, median):
        assert constraints.simplex.check(values["simplex"])
        assert constraints.corr_cholesky.check(values["cholesky"])


def test_median_is_repeatable_and_leaves_the_generator_alone():
    guide = guide_for(model).setup()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a = guide.median()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(guide.median()["mu"], a["mu"])
    with pytest.raises(errors.OptionError, match="between 0 and 1"):
        guide.quantiles([1.5])


@pytest.mark.parametrize("trained", [False, True])
def test_deepcopy_is_independent_and_leaves_the_original_whole(trained):
    guide = guide_for(model).setup()
    if trained:
        train(guide, steps=2)
    twin = copy.deepcopy(guide)
    assert guide.model is not None
    assert twin.model is guide.model
    kept = [p.clone() for p in guide.parameters()]
    start = [p.clone() for p in twin.parameters()]
    train(twin, steps=2)
    assert all(torch.equal(p, q) for p, q in zip(guide.parameters(), kept, strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(twin.parameters(), start, strict=True))
    train(guide, steps=1)
    assert all(not torch.equal(p, q) for p, q in zip(guide.parameters(), kept, strict=True))


def test_pickle_leaves_the_original_whole():
    guide = guide_for(model).setup()
    train(guide, steps=2)
    twin = pickle.loads(pickle.dumps(guide))
    assert guide.model is not None
    assert torch.equal(twin.median()["mu"], guide.median()["mu"])
    assert twin()["mu"].shape == ()


def test_two_guides_of_one_process_both_train():
    first, second = guide_for(model).setup(), guide_for(model).setup()
    for guide in (first, second):
        before = [p.clone() for p in guide.parameters()]
        train(guide, steps=2)
        assert all(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True))
    before = [p.clone() for p in first.parameters()]
    train(first, steps=1)
    assert all(not torch.equal(p, q) for p, q in zip(first.parameters(), before, strict=True))
    third = pf.AutoFlow(model, flow="maf", transforms=1, hidden_dims=(4,)).setup()
    train(third, steps=2)


def test_values_of_a_saved_parameter_store_are_taken_over(tmp_path):
    guide = guide_for(model).setup()
    train(guide, steps=3)
    pyro.get_param_store().save(tmp_path / "store.pt")
    expected, name = guide.median()["mu"], guide._pyro_name
    del guide
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    fresh = guide_for(model).setup()
    assert fresh._pyro_name == name
    assert torch.equal(fresh.median()["mu"], expected)
    before = [p.clone() for p in fresh.parameters()]
    train(fresh, steps=1)
    assert all(not torch.equal(p, q) for p, q in zip(fresh.parameters(), before, strict=True))


def test_clearing_the_parameter_store_after_setup_is_harmless():
    guide = guide_for(model).setup()
    train(guide, steps=1)
    pyro.clear_param_store()
    before = [p.clone() for p in guide.parameters()]
    train(guide, steps=1)
    assert all(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True))


def test_float64_model_gets_a_float64_guide():
    def double():
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    guide = guide_for(double).setup()
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert guide()["x"].dtype == torch.float64


def test_subsampled_latents_are_refused():
    def subsampled():
        with pyro.plate("n", 100, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(errors.SubsampledLatentError, match="'z' lies in plate 'n', which takes 10 of 100"):
        guide_for(subsampled).setup()


def test_subsampled_data_are_fine():
    def subsampled():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(DATA), subsample_size=2) as i:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=DATA[i])

    guide = guide_for(subsampled).setup()
    train(guide, steps=2, model=subsampled, loss=Trace_ELBO())


def test_discrete_latents_are_refused_with_a_hint():
    def discrete():
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="enumerat"):
        guide_for(discrete).setup()


def test_part_of_a_guide_list():
    guide = AutoGuideList(model)
    guide.append(guide_for(pyro.poutine.block(model, expose=["mu"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["sigma"])))
    train(guide, steps=2)
    assert set(guide.median()) == {"mu", "sigma"}


ON_MANIFOLDS = ("ncsf", "sphere")
ON_VECTORS = [
    name
    for name in pf.available("distributions")
    if name not in (*ON_MANIFOLDS, "mixture") and not hasattr(pf.get("distributions", name), "input_dims")
]


@pytest.mark.parametrize("name", ON_MANIFOLDS)
def test_a_flow_of_angles_is_refused(name):
    with pytest.raises(errors.OptionError, match="real numbers"):
        pf.AutoFlow(model, flow=name).setup()


@pytest.mark.parametrize("name", ON_VECTORS)
def test_any_registered_flow(name):
    guide = pf.AutoFlow(model, flow=name, transforms=2, hidden_dims=(8,)).setup()
    train(guide, steps=2)
    assert torch.isfinite(guide.median()["mu"])


def test_a_function_makes_the_flow():
    from pyroflows.transforms import affine_autoregressive

    guide = pf.AutoFlow(model, flow=affine_autoregressive).setup()
    train(guide, steps=2)
    assert pf.guide("autoflow", model, flow="iaf").setup().latent_dim == 2
    with pytest.raises(errors.OptionError, match="your function"):
        pf.AutoFlow(model, flow=affine_autoregressive, transforms=2)
    with pytest.raises(errors.OptionError, match="init_scale"):
        pf.AutoFlow(model, init_scale=-1.0)
    with pytest.raises(errors.UnknownPlugin, match="did you mean"):
        pf.AutoFlow(model, flow="nsff").setup()
