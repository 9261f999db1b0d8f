"""The demo, with a few steps of everything."""

import json

import pytest
import torch

import pyroflows as pf
from pyroflows import demo
from pyroflows.demo.density import load_penguins
from pyroflows.demo.posterior import EFFECT, SPREAD, eight_schools


def test_penguins_are_whole():
    penguins = load_penguins()
    assert penguins.x.shape == (342, 4)
    assert penguins.species.sum(0).tolist() == [151, 68, 123]


def test_quick_demo_leaves_everything_behind(tmp_path, capsys):
    summary = demo.run(tmp_path / "out", quick=True, progress=False)
    names = {"penguins.png", "penguins.safetensors", "posterior.png", "posterior.nc", "summary.json"}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    printed = capsys.readouterr().out
    assert "AutoMultivariateNormal" in printed
    assert "kernel density" in printed
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["guides"][0]["guide"] == "AutoNormal"
    assert len(summary["densities"]) == 5
    flow = pf.load(tmp_path / "out" / "penguins.safetensors")
    assert torch.isfinite(flow().log_prob(torch.as_tensor(load_penguins().x, dtype=torch.float32))).all()


def test_the_model_has_the_density_that_its_evidence_belongs_to():
    import pyro.distributions as dist
    from pyro import poutine

    values = {"mu": torch.tensor(1.0), "tau": torch.tensor(2.0), "theta": torch.arange(8.0)}
    trace = poutine.trace(poutine.condition(eight_schools, values)).get_trace(EFFECT, SPREAD)
    theta = values["theta"]
    by_hand = (
        dist.Normal(0.0, 5.0).log_prob(values["mu"])
        + dist.HalfCauchy(5.0).log_prob(values["tau"])
        + dist.Normal(1.0, 2.0).log_prob(theta).sum()
        + dist.Normal(theta, SPREAD).log_prob(EFFECT).sum()
    )
    assert float(trace.log_prob_sum()) == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.slow
def test_full_demo_reaches_what_it_promises(tmp_path):
    summary = demo.run(tmp_path, progress=False)
    density = {row["model"]: row["held-out log-likelihood"] for row in summary["densities"]}
    assert density["NSF"] > density["Gaussian, full covariance"]
    assert density["NSF"] > density["kernel density (Scott)"]
    gaps = {row["guide"]: row["gap to log evidence"] for row in summary["guides"]}
    assert gaps["AutoFlow(flow='nsf')"] < 0.5
    assert gaps["AutoFlow(flow='iaf')"] < 0.5
    assert min(gaps, key=gaps.__getitem__).startswith("AutoFlow")
