"""Everything that is registered, on a GPU: same numbers as on the CPU, nothing left behind."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyroflows as pf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def size_of(group, name, usual):
    """How many coordinates a factory takes: the usual number, or the last of those that it names."""
    sizes = getattr(pf.get(group, name), "input_dims", ())
    return sizes[-1] if sizes and usual not in sizes else usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", pf.available("transforms"))
def test_layers(name, context_dim, dtype):
    torch.manual_seed(0)
    size = size_of("transforms", name, 4)
    layer = pf.transform(name, input_dim=size, context_dim=context_dim).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.2)
    there = copy.deepcopy(layer).to("cuda")
    assert {t.device.type for t in tensors(there)} <= {"cuda"}
    x = torch.randn(50, *((size,) if isinstance(size, int) else size), dtype=dtype)
    context = torch.randn(50, 3, dtype=dtype) if context_dim else None
    on_gpu = None if context is None else context.cuda()
    tol = 1e-4 if dtype == torch.float32 else 1e-10
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        a = getattr(layer, method)(x, context)
        b = getattr(there, method)(x.cuda(), on_gpu)
        for here, far in zip(a, b, strict=True):
            assert far.device.type == "cuda"
            assert torch.allclose(here, far.cpu(), atol=tol, rtol=tol)
        x = a[0].detach()


@pytest.mark.parametrize("name", pf.available("distributions"))
def test_flows(name, tmp_path):
    flow = pf.flow(name, input_dim=size_of("distributions", name, 3), context_dim=2).to("cuda")
    q = flow(torch.randn(5, 2, device="cuda"))
    y = q((7,))  # rsample, where there is one
    (q.log_prob(y).sum() + q.log_prob(y.detach().clone()).sum()).backward()
    assert all(p.grad is not None and p.grad.device.type == "cuda" for p in flow.parameters())
    pf.save(flow, tmp_path / "flow.safetensors")
    same = pf.load(tmp_path / "flow.safetensors", device="cuda")
    at, point = torch.zeros(5, 2, device="cuda"), y.detach()[0]
    assert torch.equal(same(at).log_prob(point), flow(at).log_prob(point))


def test_fit():
    flow = pf.flow("nsf", input_dim=2).to("cuda")
    result = pf.fit(flow, torch.randn(1000, 2) * 5, max_epochs=5, progress=False, support=None)
    assert next(flow.parameters()).device.type == "cuda"
    assert result.validation > -7


def test_guide():
    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3, device="cuda"), 1.0).to_event(1))
        pyro.sample(
            "y", dist.Normal(loc.sum(-1), torch.tensor(1.0, device="cuda")), obs=torch.tensor(1.0, device="cuda")
        )

    guide = pf.AutoFlow(model, flow="iaf").setup()
    assert {t.device.type for t in tensors(guide)} == {"cuda"}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(3):
        svi.step()
    assert guide.median()["loc"].device.type == "cuda"
    summary = pf.diagnostics.importance_summary(model, guide, num_samples=500, max_plate_nesting=1)
    assert summary.ess > 1


def test_a_sample_is_scored_without_an_inverse_and_never_stale():
    flow = pf.flow("iaf", input_dim=3).to("cuda")
    y = flow().rsample((4,))
    kept = flow().log_prob(y)
    adam = torch.optim.Adam(flow.parameters(), lr=0.1, fused=True)
    kept.sum().backward()
    adam.step()
    with torch.no_grad():
        assert torch.allclose(flow().log_prob(y), flow().log_prob(y.clone()), atol=1e-3)
        assert not torch.allclose(flow().log_prob(y), kept, atol=1e-3)
