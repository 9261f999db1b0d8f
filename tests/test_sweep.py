"""Autoregressive layers are inverted in one sweep: as whole passes would, with all derivatives, for any graph."""

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows import errors
from pyroflows import transforms as T
from pyroflows.nets import MADE

DIAMOND = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]
LAYERS = {
    "plain": {},
    "residual": {"residual": True},
    "no hidden layer": {"hidden_dims": ()},
    "one narrow layer": {"hidden_dims": (3,)},
    "context": {"context_dim": 3},
    "context and no hidden layer": {"context_dim": 3, "hidden_dims": ()},
    "order": {"order": [2, 0, 1, 4, 3]},
    "graph": {"adjacency": DIAMOND},
    "three residual layers": {"activation": "tanh", "hidden_dims": (20, 20, 20), "residual": True, "context_dim": 2},
}


def layer(map="rational_spline", dim=5, scale=0.5, **options):
    torch.manual_seed(0)
    built = T.autoregressive(dim, map, **{"hidden_dims": (16, 16), **options}).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, scale)
    return built


def inputs(t):
    y = torch.randn(2, 7, t.input_dim, dtype=torch.float64, requires_grad=True)
    context = torch.randn(7, t.context_dim, dtype=torch.float64, requires_grad=True) if t.context_dim else None
    return y, context


@pytest.mark.parametrize("map", ["affine", "rational_spline"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_sweep_is_what_passes_are_with_first_and_second_derivatives(name, map):
    t = layer(map, **LAYERS[name])
    y, context = inputs(t)
    leaves = [y, *t.parameters(), *([] if context is None else [context])]
    weights = torch.randn(2, 7, 5, dtype=torch.float64)

    def derivatives(x, log_det, again):
        loss = (x * weights).sum() + log_det.square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=again, retain_graph=True, allow_unused=True)
        first = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(first, leaves, strict=True)]
        if not again:
            return first
        total = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(second, leaves, strict=True)]

    swept, passed = t.inverse_and_log_det(y, context), t._by_passes(y, context)
    for found, expected in zip(swept, passed, strict=True):
        assert torch.allclose(found, expected, atol=1e-10)
    for again in (False, True):
        for found, expected in zip(derivatives(*swept, again), derivatives(*passed, again), strict=True):
            assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8 * (1 + expected.abs().max()))


def test_a_sweep_computes_no_unit_twice():
    t = layer("affine", dim=8, hidden_dims=(32, 32))
    seen = []
    t.net.activation.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    y = torch.randn(11, 8, dtype=torch.float64)
    with torch.no_grad():
        t.inverse_and_log_det(y)
    assert sum(seen) == 64  # [units, rows], both layers together


def test_memory_of_the_gradient_does_not_grow_with_the_coordinates():
    def saved(dim):
        t = T.autoregressive(dim, "affine", hidden_dims=(64,))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            t.inverse_and_log_det(torch.randn(100, dim))
        return sum(kept)

    assert saved(32) < 4 * saved(8)


class Doubler(nn.Module):
    """Not elementwise: every number is divided by the mean of its row."""

    def forward(self, x):
        return x / (1 + x.abs().mean(-1, keepdim=True))


def test_an_activation_that_reads_a_whole_row_goes_by_passes():
    assert not MADE(3, 2, activation=Doubler).unrolls
    assert not MADE(3, 2, activation=nn.Dropout(0.5), hidden_dims=(8,)).unrolls
    assert MADE(3, 2, activation="silu").unrolls
    assert MADE(3, 2, activation=nn.PReLU()).unrolls
    many = T.Autoregressive(T.Affine(), 3, activation=nn.PReLU(8), hidden_dims=(8,))
    assert not many.net.unrolls
    x = torch.randn(4, 3)
    assert torch.allclose(many.inverse_and_log_det(many.forward_and_log_det(x)[0])[0], x, atol=1e-5)


def test_tensors_that_stand_in_for_parameters_get_their_gradients():
    t = layer("affine", dim=3)
    y = torch.randn(4, 3, dtype=torch.float64)
    stand_ins = {name: (2 * p.detach()).requires_grad_() for name, p in t.named_parameters()}

    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = t

        def forward(self, y):
            return self.t.inverse_and_log_det(y)[0]

    back = torch.func.functional_call(Back(), {f"t.{name}": value for name, value in stand_ins.items()}, (y,))
    grads = torch.autograd.grad(back.sum(), list(stand_ins.values()))
    assert all(g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


def test_the_graph_is_the_dependence():
    t = layer("affine", adjacency=DIAMOND, hidden_dims=(64, 64))
    x = torch.randn(5, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: t.forward_and_log_det(x)[0])(x)
    depends = torch.tensor(DIAMOND, dtype=torch.bool) | torch.eye(5, dtype=torch.bool)
    assert torch.equal(jacobian != 0, depends)
    assert t.net.passes == 3


@pytest.mark.parametrize(
    ("adjacency", "order", "message"),
    [
        ([[0, 1], [1, 0]], None, "circle among the coordinates"),
        ([[0, 1, 0], [0, 0, 0]], None, "2 rows of 2"),
        ([[0, 0], [1, 0]], [1, 0], "give one of them"),
    ],
)
def test_graphs_that_cannot_be(adjacency, order, message):
    with pytest.raises(errors.OptionError, match=message):
        T.autoregressive(2, adjacency=adjacency, order=order)


def test_n34_any_order_and_any_width_is_strictly_triangular():
    for width in (1, 2, 7):
        t = layer("affine", order=[3, 0, 4, 1, 2], hidden_dims=(width, width))
        x = torch.randn(5, dtype=torch.float64)
        jacobian = torch.func.jacrev(lambda x, t=t: t.forward_and_log_det(x)[0])(x)
        turned = jacobian[t.turn][:, t.turn]
        assert (turned.triu(1) == 0).all()
        assert (turned.diagonal() > 0).all()


def test_a_graph_survives_saving(tmp_path):
    t = pf.transform("autoregressive", input_dim=5, adjacency=DIAMOND)
    pf.save(t, tmp_path / "t.safetensors")
    same = pf.load(tmp_path / "t.safetensors")
    x = torch.randn(3, 5)
    assert torch.equal(same(x), t(x))


def test_a_loaded_flow_sweeps(tmp_path):
    pf.save(pf.flow("maf", input_dim=3), tmp_path / "f.safetensors")
    same = pf.load(tmp_path / "f.safetensors")
    assert all(module.unrolls for module in same.modules() if isinstance(module, MADE))


def test_second_derivatives_where_the_point_itself_depends_on_context_and_parameters():
    t = layer("rational_spline", 3, context_dim=2, hidden_dims=(8,))
    y, context = inputs(t)
    leaves = [y, context, *t.parameters()]

    def second(inverse):
        x, first = inverse(y, context)
        x, then = inverse(x.flip(-1), context)  # the same layer twice
        grads = torch.autograd.grad(x.square().sum() + (first + then).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for found, expected in zip(second(t.inverse_and_log_det), second(t._by_passes), strict=True):
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8 * (1 + expected.abs().max()))


def test_gradients_of_an_inverse_are_those_of_the_tensors_of_the_forward_pass():
    class Backwards(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, y):
            return self.layer.inverse_and_log_det(y)[0]

    t = layer("affine", 3, hidden_dims=(8,))
    other = {name: torch.nn.Parameter(p.detach() + 0.3) for name, p in Backwards(t).named_parameters()}
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    got = torch.func.functional_call(Backwards(t), other, (y,))
    got = torch.autograd.grad(got.sum(), [y, *other.values()])
    with torch.no_grad():
        for name, p in Backwards(t).named_parameters():
            p.copy_(other[name])
    want = torch.autograd.grad(t._by_passes(y, None)[0].sum(), [y, *t.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tied_tensor_has_one_gradient():
    t = layer("affine", 3, hidden_dims=(8, 8))
    t.net.layers[1].bias = t.net.layers[0].bias
    y = torch.randn(4, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(t.inverse_and_log_det(y)[0].sum(), t.net.layers[0].bias)
    (want,) = torch.autograd.grad(t._by_passes(y, None)[0].sum(), t.net.layers[0].bias)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("map", ["affine", "rational_spline", "deep_sigmoid"])
def test_gradients_may_come_as_a_batch(map):
    t = layer(map, 3, hidden_dims=(8,))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for direction in (t.forward_and_log_det, t.inverse_and_log_det):
        rows = torch.eye(3, dtype=torch.float64).unsqueeze(1).expand(3, 4, 3)
        y, _ = direction(x)
        (got,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
        want = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_a_map_that_is_flat_to_the_last_digit_has_finite_gradients():
    t = layer("deep_sigmoid", 5, scale=2.0, hidden_dims=(16, 16)).float()
    y = torch.randn(200, 5)
    y[:, 0] = 1e20 * y[:, 0].sign()  # what the network reads of it puts the units of the map far apart
    y.requires_grad_()
    x, log_det = t.inverse_and_log_det(y)
    assert float(log_det.detach().max()) > 1e4  # slopes that no number holds
    for gradient in torch.autograd.grad(x.sum(), [y, *t.parameters()]):
        assert bool(gradient.isfinite().all())
