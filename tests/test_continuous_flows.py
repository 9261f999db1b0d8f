"""Flows along a velocity field by their names: what each adds to the layer, and a guide on a posterior."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyroflows as pf
from pyroflows.demo.posterior import EFFECT, SPREAD, eight_schools
from pyroflows.errors import OptionError
from pyroflows.nets import PotentialGradient, VelocityMLP

NAMES = ("ffjord", "flow_matching", "otflow", "rnode")
SMALL = {"hidden_dims": (8, 8)}


def layers(flow):
    return [part for part in flow.modules() if isinstance(part, pf.transforms.ContinuousTransform)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context_dim", [0, 3])
def test_both_directions_agree(name, context_dim):
    torch.manual_seed(0)
    flow = pf.flow(name, input_dim=2, context_dim=context_dim, **SMALL).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    d = flow(torch.randn(5, 3, dtype=torch.float64)) if context_dim else flow().expand((5,))
    value, score = d.rsample_with_log_prob((4,))
    assert value.shape == (4, 5, 2)
    torch.testing.assert_close(d.log_prob(value.detach().clone()), score, rtol=1e-7, atol=1e-7)
    assert all(g is not None for g in torch.autograd.grad(score.sum(), list(flow.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    ("name", "penalties"),
    [("ffjord", []), ("flow_matching", []), ("rnode", ["jacobian", "kinetic"]), ("otflow", ["hjb", "kinetic"])],
)
def test_penalties_of_a_training_step(name, penalties):
    flow = pf.flow(name, input_dim=2, transforms=2, **SMALL) if name != "flow_matching" else pf.flow(name, input_dim=2)
    with pf.recorded() as record:
        flow().log_prob(torch.randn(7, 2))
    assert sorted(record.penalties) == penalties
    assert all(value > 0 for value in record.penalties.values())
    with pf.recorded() as record:
        flow.eval()().log_prob(torch.randn(7, 2))
    assert record.penalties == {}


def test_weights_of_penalties():
    with pf.recorded() as record:
        pf.flow("rnode", input_dim=2, kinetic=0.5, jacobian=0.25, **SMALL)().log_prob(torch.randn(7, 2))
    found = record.penalties
    assert float(record.penalty().detach()) == pytest.approx(0.5 * found["kinetic"] + 0.25 * found["jacobian"])


def test_velocities_and_options():
    assert isinstance(layers(pf.flow("ffjord", input_dim=3))[0].velocity, VelocityMLP)
    assert isinstance(layers(pf.flow("otflow", input_dim=3, rank=2))[0].velocity, PotentialGradient)
    assert len(layers(pf.flow("ffjord", input_dim=3, transforms=3))) == 3
    layer = layers(pf.flow("rnode", input_dim=3, solver="rk4", steps=4))[0]
    assert (layer.settings["solver"], layer.settings["steps"]) == ("rk4", 4)
    for name in NAMES:
        with pytest.raises(OptionError, match="speed"):
            pf.flow(name, input_dim=2, speed=3)
    assert pf.flow("flow_matching", input_dim=2, transforms=2).objective == "likelihood"
    with pytest.raises(OptionError, match="hutchinson"):
        pf.flow("ffjord", input_dim=2, divergence="guess")


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_flow_comes_back(name, tmp_path):
    flow = pf.flow(name, input_dim=2, context_dim=1, support="positive", **SMALL)
    pf.save(flow, tmp_path / "flow.safetensors")
    again = pf.load(tmp_path / "flow.safetensors")
    x, context = torch.rand(4, 2) + 0.1, torch.randn(4, 1)
    assert torch.equal(again(context).log_prob(x), flow(context).log_prob(x))
    assert again.objective == flow.objective


@pytest.mark.slow
def test_ffjord_is_a_guide_of_eight_schools():
    """The log evidence of the centred model is -31.31. A guide trained so leaves out the wide end of its funnel."""
    pyro.set_rng_seed(0)
    steps = 2000
    options = {"hidden_dims": (64, 64), "conditioning": "concatsquash", "solver": "rk4", "steps": 4}
    guide = pf.AutoFlow(eight_schools, flow="ffjord", **options)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.05 ** (1 / steps), "clip_norm": 10.0})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(eight_schools, guide, optimizer, elbo)
    losses = [svi.step(EFFECT, SPREAD) for _ in range(steps)]
    assert sum(losses[-100:]) / 100 < 32.0
    draws = Predictive(eight_schools, guide=guide, num_samples=2000, parallel=True)(EFFECT, SPREAD)
    assert 3.0 < float(draws["mu"].mean()) < 5.5
