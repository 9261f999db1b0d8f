"""Importance diagnostics and ArviZ export, against known answers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

import pyroflows as pf
from pyroflows import errors
from pyroflows.diagnostics import from_guide, importance_summary, khat


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_of_known_tails(shape):
    torch.manual_seed(0)
    u = torch.rand(40_000, dtype=torch.float64)
    weights = (u**-shape - 1) / shape + 1
    assert khat(torch.log(weights)) == pytest.approx(shape, abs=0.12)


def test_khat_agrees_with_arviz():
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("ArviZ 1.x keeps psislw elsewhere")
    for seed, scale in ((0, 0.5), (1, 1.0), (2, 2.0)):
        log_weights = torch.randn(4000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
        assert khat(log_weights) == pytest.approx(float(arviz.psislw(log_weights.numpy())[1]), abs=1e-6)


def test_khat_of_a_perfect_guide_passes_and_of_nan_does_not():
    assert khat(torch.full((100,), 3.0)) == -math.inf
    assert khat(torch.cat([torch.zeros(99), torch.tensor([math.nan])])) == math.inf
    with pytest.raises(errors.OptionError, match="25"):
        khat(torch.zeros(10))


def normal_model(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def exact_guide(y):
    n = len(y)
    pyro.sample("z", dist.Normal(y.sum() / (n + 1), (n + 1) ** -0.5))


def log_evidence(y):
    n = len(y)
    cov = torch.eye(n, dtype=torch.float64) + 1
    return float(dist.MultivariateNormal(torch.zeros(n, dtype=torch.float64), cov).log_prob(y.double()))


def test_a_perfect_guide_knows_the_evidence():
    y = torch.tensor([0.3, -1.0, 2.0])
    summary = importance_summary(normal_model, exact_guide, y, max_plate_nesting=1)
    assert summary.elbo == pytest.approx(log_evidence(y), abs=1e-4)
    assert summary.log_evidence == pytest.approx(log_evidence(y), abs=1e-4)
    assert summary.khat < 0.7
    assert summary.ess == pytest.approx(4000, rel=0.01)
    assert summary.nonfinite == 0


def test_a_wide_guide_is_corrected():
    y = torch.tensor([0.3, -1.0, 2.0])
    summary = importance_summary(
        normal_model, lambda y: pyro.sample("z", dist.Normal(0.3, 1.5)), y, num_samples=20_000, max_plate_nesting=1
    )
    assert summary.elbo < log_evidence(y) - 0.3
    assert abs(summary.log_evidence - log_evidence(y)) < 4 * summary.log_evidence_se


def test_nonfinite_draws_are_counted():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(z > 0, 0.0, -torch.inf))

    summary = importance_summary(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    assert summary.nonfinite == pytest.approx(0.5, abs=0.05)
    assert summary.log_evidence == pytest.approx(math.log(0.5), abs=0.1)


def hierarchical(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("group", 4, dim=-2):
        a = pyro.sample("a", dist.Normal(mu[..., 0], 1.0))
        with pyro.plate("row", 3, dim=-1):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)


@pytest.mark.parametrize(
    "make", [lambda: pf.AutoFlow(hierarchical, transforms=1), lambda: AutoMultivariateNormal(hierarchical)]
)
def test_arviz_data_has_plates_as_dimensions(make, tmp_path):
    arviz = pytest.importorskip("arviz")
    y = torch.randn(4, 3)
    guide = make()
    guide(y)
    coords = {"group": ["a", "b", "c", "d"]}
    data = from_guide(hierarchical, guide, y, num_samples=50, max_plate_nesting=2, coords=coords)
    assert data.posterior["mu"].shape == (1, 50, 2)
    assert data.posterior["a"].dims == ("chain", "draw", "group")
    assert list(data.posterior["group"].values) == ["a", "b", "c", "d"]
    assert data.observed_data["y"].dims == ("group", "row")
    np.testing.assert_allclose(data.observed_data["y"].values, y.numpy())
    assert data.posterior.attrs["inference_method"] == "svi"
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    back = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    np.testing.assert_array_equal(back.posterior["a"].values, data.posterior["a"].values)


def test_arviz_log_densities_are_those_of_the_draws():
    y = torch.tensor([0.3, -1.0, 2.0])
    data = from_guide(normal_model, exact_guide, y, num_samples=30, max_plate_nesting=1)
    z = torch.as_tensor(data.posterior["z"].values).squeeze(0)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z[:, None], 1.0).log_prob(y).sum(-1)
    np.testing.assert_allclose(data.sample_stats["lp"].values[0], joint.numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        data.sample_stats["lp"].values[0] - data.sample_stats["log_q"].values[0], log_evidence(y), rtol=1e-4
    )
