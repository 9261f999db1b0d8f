"""Roots of increasing functions, and the layers that invert by them."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyroflows as pf
from pyroflows import errors
from pyroflows.numerics import monotone_root
from pyroflows.transforms import Autoregressive, Coupling, Elementwise, NumericMap


def bent(x, a=5.0):
    """``x + a tanh x``: no formula inverts it."""
    t = torch.tanh(x)
    return x + a * t, torch.log1p(a * (1 - t * t))


FUNCTIONS = {
    "bent": bent,
    "cubic": lambda x: (x**3, torch.log(3 * x**2)),  # a flat point
    "asinh": lambda x: (torch.asinh(x), -0.5 * torch.log1p(x * x)),  # nearly flat far out
    "steep": lambda x: bent(x, 1e6),
    "far": lambda x: (x - 1e6, torch.zeros_like(x)),  # the root is far from the start
    "kinked": lambda x: (torch.where(x > 0, 10 * x, 0.1 * x), torch.where(x > 0, 2.302585, -2.302585).to(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_finds_roots_anywhere(name, dtype):
    f = FUNCTIONS[name]
    x = torch.tensor([0.0, 1e-8, -0.3, 1.0, -7.0, 40.0, -1e3, 1e6], dtype=dtype)
    y, _ = f(x)
    root = monotone_root(f, y)
    eps = torch.finfo(dtype).eps
    assert (root.residual <= 64 * eps * (1e6 * (name == "far") + y.abs()) + 1e-30).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=1, max_size=5),
    st.floats(0.0, 1e4),
)
def test_no_value_saturates(values, a):
    y = torch.tensor(values, dtype=torch.float64)
    root = monotone_root(lambda x: bent(x, a), y)
    assert (bent(root.x, a)[0] - y).abs().max() <= 1e-12 * (1 + y.abs().max())


def test_start_does_not_matter():
    y = torch.linspace(-20, 20, 9, dtype=torch.float64)
    roots = [monotone_root(bent, y, start=torch.tensor(s, dtype=torch.float64)).x for s in (0.0, 1e4, -1e8)]
    assert torch.allclose(roots[0], roots[1], atol=1e-12)
    assert torch.allclose(roots[0], roots[2], atol=1e-12)


def test_first_and_second_derivatives():
    y = torch.tensor([-3.0, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for what in ("x", "log_slope"):

        def find(y, a, what=what):
            return getattr(monotone_root(lambda x: bent(x, a), y), what)

        assert torch.autograd.gradcheck(find, (y, a))
        assert torch.autograd.gradgradcheck(find, (y, a))


def test_non_finite_entries_pass_and_harm_nobody():
    y = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -2.0])
    x = monotone_root(bent, y).x
    assert torch.equal(x[[0, 4]], monotone_root(bent, y[[0, 4]]).x)
    assert torch.isnan(x[1])
    assert x[2] == float("inf")


@pytest.mark.parametrize(
    ("f", "count"),
    [
        (lambda x: (torch.tanh(x), torch.log1p(-(torch.tanh(x) ** 2))), 1),  # 2 is out of reach
        (lambda x: (-x, torch.zeros_like(x)), 2),  # decreasing
        (lambda x: (x * float("nan"), torch.zeros_like(x)), 2),
    ],
)
def test_not_converged_says_how_far_it_got(f, count):
    with pytest.raises(errors.InverseNotConverged, match=f"{count} of 2 roots") as caught:
        monotone_root(f, torch.tensor([0.5, 2.0]))
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.count == count
    assert error.steps == 200
    assert error.residual > 0.5


class Bent(NumericMap):
    """``x + softplus(a) tanh x``."""

    params = 1

    def forward(self, x, params):
        return bent(x, torch.nn.functional.softplus(params[..., 0]))


@pytest.mark.parametrize("structure", [Elementwise, Coupling, Autoregressive])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_layers_of_a_numeric_map(structure, context_dim):
    torch.manual_seed(0)
    options = {"hidden_dims": (8,), "activation": "silu"}
    layer = structure(Bent(), 3, context_dim=context_dim, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.7)
    assert layer.inverse == "numeric"
    context = torch.randn(5, 2, dtype=torch.float64) if context_dim else None
    y = 30 * torch.randn(5, 3, dtype=torch.float64)
    x, log_det = layer.inverse_and_log_det(y, context)
    again, back = layer.forward_and_log_det(x, context)
    assert torch.allclose(again, y, atol=1e-8)
    assert torch.allclose(log_det, -back, atol=1e-8)
    assert layer.inverse_residual(y, context).max() < 1e-8
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda row, i=i: layer.inverse_and_log_det(row, None if context is None else context[i])[0], y[i]
            )
            for i in range(5)
        ]
    )
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], log_det, atol=1e-7)

    def log_prob(y, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        x, log_det = torch.func.functional_call(
            _Method(layer), {f"layer.{n}": p for n, p in zip(names, parameters, strict=True)}, (y, context)
        )
        return log_det - 0.5 * x.square().sum(-1)

    class _Method(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, y, context):
            return self.layer.inverse_and_log_det(y, context)

    inputs = (y[:2].requires_grad_(), *[p.detach().requires_grad_() for p in layer.parameters()])
    context = None if context is None else context[:2]
    assert torch.autograd.gradcheck(log_prob, inputs, atol=1e-5, rtol=1e-4)


def test_a_numeric_layer_trains_as_a_flow():
    from pyroflows.distributions import standard_normal

    torch.manual_seed(0)
    flow = pf.Flow(Autoregressive(Bent(), 2, hidden_dims=(8,)), standard_normal(2))
    result = pf.fit(flow, torch.randn(200, 2) ** 3, max_epochs=3, progress=False, seed=0)
    assert result.history["validation"][-1] > result.history["validation"][0]
    q = flow()
    y = q.rsample((10,))
    assert torch.allclose(q.log_prob(y), q.log_prob(y.detach().clone()), atol=1e-3)
