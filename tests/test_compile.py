"""``compile=True`` changes no result, falls back with one message, and leaves Pyro's checks on."""

import copy
import pickle
import warnings

import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows import errors

OPTIONS = {"transforms": 2, "hidden_dims": (8,)}


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(name, **options):
    flows = []
    for compiled in (False, True):
        torch.manual_seed(0)
        flow = pf.flow(name, input_dim=3, **OPTIONS, **options)
        flows.append(flow.compile(backend="eager") if compiled else flow)
    return flows


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "realnvp", "naf"])
def test_results_and_gradients_are_the_same(name):
    plain, compiled = pair(name)
    x = torch.randn(5, 3)
    scores = [flow().log_prob(x) for flow in (plain, compiled)]
    assert torch.allclose(*scores, rtol=1e-6, atol=1e-6)
    for flow, score in zip((plain, compiled), scores, strict=True):
        score.mean().backward()
        torch.manual_seed(1)
        flow.drawn = flow().rsample((4,))
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose(plain.drawn, compiled.drawn, rtol=1e-5, atol=1e-6)


def test_what_takes_one_step_after_another_is_left_alone():
    flow = pf.flow("maf", input_dim=3, **OPTIONS).compile(backend="eager")
    assert "inverse_and_log_det" in vars(flow.transform)  # scores in one pass
    assert "forward_and_log_det" not in vars(flow.transform)
    assert pf.transform("planar", input_dim=2).sequential == (False, True)
    assert pf.transform("planar", input_dim=2).inv.sequential == (True, False)
    assert pf.transform("spline_coupling", input_dim=2).sequential == (False, False)
    assert pf.transform("neural_autoregressive", input_dim=2).sequential == (False, True)


@pytest.mark.slow
def test_the_real_compiler():
    torch.manual_seed(0)
    plain = pf.flow("nsf", input_dim=3, **OPTIONS)
    torch.manual_seed(0)
    compiled = pf.flow("nsf", input_dim=3, **OPTIONS, compile=True)
    assert compiled.config == plain.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        for rows in (5, 9):
            x = torch.randn(rows, 3)
            assert torch.allclose(compiled().log_prob(x), plain().log_prob(x), rtol=1e-6, atol=1e-6)
            assert torch.allclose(compiled.transform(x), plain.transform(x), rtol=1e-6, atol=1e-6)


def broken(graph, inputs):
    raise RuntimeError("no working C++ compiler was found")


def test_without_a_compiler_one_message_and_the_same_results():
    plain, compiled = pair("nsf")
    compiled.compile(backend=broken)
    x = torch.randn(5, 3)
    with pytest.warns(RuntimeWarning, match="runs uncompiled") as caught:
        first = compiled().log_prob(x)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = compiled().log_prob(x)
    assert torch.equal(first, again)
    assert torch.allclose(first, plain().log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # what the tracer looks at after an error
def test_an_error_of_the_layer_is_raised_as_ever():
    compiled = pf.transform("spline_coupling", input_dim=3).compile(backend="eager")
    with pytest.raises(errors.ShapeError, match="input_dim=3"):
        compiled.inverse_and_log_det(torch.zeros(4, 2))
    assert compiled.inverse_and_log_det(torch.zeros(4, 3))[0].shape == (4, 3)  # and no warning


def test_pyros_checks_stay_on():
    from torch._dynamo.eval_frame import TorchPatcher

    TorchPatcher.patch.cache_clear()  # as in a new process
    _, compiled = pair("maf")
    compiled().log_prob(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, torch.tensor(-1.0))
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, torch.tensor(-1.0))


def test_copies_pickles_supports_and_contexts():
    plain, compiled = pair("realnvp", context_dim=2)
    x, context = torch.rand(5, 3), torch.randn(5, 2)
    for flow in (compiled, copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert "forward_and_log_det" in vars(flow.transform)
        assert torch.allclose(flow(context).log_prob(x), plain(context).log_prob(x), rtol=1e-6, atol=1e-6)
    for flow in (plain, compiled):
        flow.constrain("positive")
    assert torch.allclose(compiled(context).log_prob(x), plain(context).log_prob(x), rtol=1e-6, atol=1e-6)
