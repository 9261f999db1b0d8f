"""Conditioner networks: shapes, masks, starting values."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import MADE, MLP, masked

few = settings(max_examples=40, deadline=None, derandomize=True)


def shaken(net, scale=1.0):
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn_like(p))
    return net


def sees(net, input_dim, context_dim=0):
    """Which inputs each coordinate's outputs depend on: [coordinate, input] and [coordinate, context]."""
    x = torch.randn(50, input_dim, dtype=torch.float64, requires_grad=True)
    context = torch.randn(50, context_dim, dtype=torch.float64, requires_grad=True) if context_dim else None
    out = net(x, context)
    inputs, contexts = [], []
    for i in range(input_dim):
        leaves = [x] if context is None else [x, context]
        grads = torch.autograd.grad(out[:, i].square().sum(), leaves, retain_graph=True, allow_unused=True)
        inputs.append((grads[0] != 0).any(0))
        contexts.append((grads[-1] != 0).any(0))
    return torch.stack(inputs), torch.stack(contexts)


@given(
    order=st.integers(1, 6).flatmap(lambda n: st.permutations(range(n))),
    hidden_dims=st.lists(st.integers(1, 9), max_size=3),
    context_dim=st.sampled_from([0, 2]),
    params=st.integers(1, 3),
)
@few
def test_N34_made_sees_what_precedes_and_nothing_else(order, hidden_dims, context_dim, params):
    n = len(order)
    net = shaken(MADE(n, params, order=order, hidden_dims=hidden_dims, context_dim=context_dim, activation="tanh"))
    found, contexts = sees(net.double(), n, context_dim)
    allowed = torch.tensor([[order[j] < order[i] for j in range(n)] for i in range(n)])
    assert not bool((found & ~allowed).any())
    # Only the order and the context enter, and wide layers let all of both through.
    if all(width >= 2 * n for width in hidden_dims):
        assert torch.equal(found, allowed)
        assert bool(contexts.all()) or not context_dim


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_N34_every_order_of_three(order):
    net = shaken(MADE(3, 2, order=order, hidden_dims=(16, 16), activation="silu")).double()
    found, _ = sees(net, 3)
    assert torch.equal(found, torch.tensor([[order[j] < order[i] for j in range(3)] for i in range(3)]))


@pytest.mark.parametrize("hidden_dims", [(), (1,), (1, 1), (3, 1)])
def test_N34_one_hidden_unit(hidden_dims):
    net = shaken(MADE(4, 1, hidden_dims=hidden_dims, context_dim=2, activation="tanh")).double()
    found, contexts = sees(net, 4, 2)
    assert not bool(found.triu().any())
    assert bool(contexts.all())


def test_made_residual_keeps_its_order():
    net = shaken(MADE(4, 2, order=[3, 1, 0, 2], hidden_dims=(12, 12, 12), residual=True)).double()
    order = [3, 1, 0, 2]
    found, _ = sees(net, 4)
    assert not bool((found & torch.tensor([[order[j] >= order[i] for j in range(4)] for i in range(4)])).any())


@pytest.mark.parametrize(("x_dim", "context_dim"), [(3, 0), (3, 2), (0, 2)])
def test_mlp_shapes(x_dim, context_dim):
    net = MLP(x_dim, 4, hidden_dims=(8, 8), context_dim=context_dim, residual=True)
    for batch in ((), (5,), (2, 5), (0,)):
        x = torch.randn(*batch, x_dim) if x_dim else None
        context = torch.randn(*batch, context_dim) if context_dim else None
        assert net(x, context).shape == (*batch, 4)
    if x_dim and context_dim:
        assert net(torch.randn(6, 1, 3), torch.randn(5, 2)).shape == (6, 5, 4)


def test_mlp_starts_small_and_reads_its_context():
    net = MLP(3, 4, context_dim=2)
    out = net(torch.randn(100, 3), torch.randn(100, 2))
    assert 0 < out.abs().max() < 0.1
    shaken(net, 0.1)
    assert not torch.equal(net(torch.ones(3), torch.zeros(2)), net(torch.ones(3), torch.ones(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_N2_huge_inputs_give_finite_outputs_and_gradients(dtype):
    net = MLP(2, 4, context_dim=2).to(dtype)
    x = torch.tensor([[1e38, -1e38], [1e20, 1.0]], dtype=dtype, requires_grad=True)
    out = net(x, x.detach())
    assert bool(out.isfinite().all())
    grads = torch.autograd.grad(out.sum(), [x, *net.parameters()])
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_activations():
    for activation in ("relu", "elu", "gelu", "leaky_relu", "sigmoid", "silu", "softplus", "tanh", nn.Mish, nn.SELU()):
        assert MLP(2, 3, activation=activation)(torch.zeros(2)).shape == (3,)
    with pytest.raises(OptionError, match=r"Did you mean 'silu'\?"):
        MLP(2, 3, activation="silo")
    with pytest.raises(OptionError, match=r"makes an nn\.Module, got int"):
        MLP(2, 3, activation=lambda: 3)


def test_refusals():
    with pytest.raises(OptionError, match=r"makes an nn\.Module, got int"):
        MLP(2, 2, activation=3)
    with pytest.raises(OptionError, match=r"such as \(128,\), got None"):
        MLP(2, 2, hidden_dims=None)
    for order in (3, "abc", [0.5, None, 1]):
        with pytest.raises(OptionError, match=r"permutation of 0 \.\. 2, got"):
            MADE(3, 1, order=order)
    with pytest.raises(OptionError, match="positive integers"):
        MLP(2, 3, hidden_dims=(8, 0))
    with pytest.raises(OptionError, match="equal hidden_dims"):
        MLP(2, 3, hidden_dims=(8, 9), residual=True)
    with pytest.raises(OptionError, match=r"permutation of 0 \.\. 2"):
        MADE(3, 1, order=[0, 0, 2])
    net = MLP(2, 3, context_dim=1)
    for x, context in ((torch.zeros(3), torch.zeros(1)), (torch.zeros(2), None), (None, torch.zeros(1))):
        with pytest.raises(ShapeError, match="expected"):
            net(x, context)


def test_masks_are_buffers():
    net = MADE(3, 2)
    moved = net.to("meta")
    assert all(tensor.is_meta for tensor in (*moved.parameters(), *moved.buffers()))
    assert sum(name.endswith("mask") for name, _ in net.named_buffers()) == 3


def plainly(net):
    """The same network, whose layers somebody listens to, so that they are called one by one."""
    for layer in net.layers:
        layer.register_forward_hook(lambda *_: None)
        layer._blocks = [], []
    return net


def results(net, x, context, leaves):
    """The output, and first and second derivatives, the first ones with and without a graph."""
    out = net(x, context)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)
    plain = torch.autograd.grad(net(x, context).sin().sum(), leaves)
    return [out, *first, *second, *plain]


@pytest.mark.parametrize("order", [None, list(range(40, -1, -1))])
@pytest.mark.parametrize("frozen", ["nothing", "x", "weights"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_large_masked_products_go_by_blocks_and_stay_the_same(order, frozen, activation):
    net = MADE(41, 6, order=order, hidden_dims=(192, 192), activation=activation).double()
    assert [len(layer._blocks[0]) for layer in net.layers] == [3, 3, 4]
    x = torch.randn(3, 200, 41, dtype=torch.float64, requires_grad=frozen != "x")
    net.requires_grad_(frozen != "weights")
    leaves = [t for t in (x, *net.parameters()) if t.requires_grad]
    blocks = masked._by_blocks(600, net.layers[1].weight, net.layers[1]._blocks[0])
    assert blocks
    got = results(net, x, None, leaves)
    for a, b in zip(got, results(plainly(net), x, None, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_chain_of_relus_in_one_step_is_that_of_its_layers(columns, context_dim, monkeypatch):
    monkeypatch.setattr(masked, "MANY", 0)
    net = MADE(3, 4, hidden_dims=(16, 8), context_dim=context_dim).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    net.columns = columns
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(7, 2, dtype=torch.float64, requires_grad=True) if context_dim else None
    leaves = [t for t in (x, context, *net.parameters()) if t is not None]
    got = results(net, x, context, leaves)
    assert (got[0].stride(0) == 1) == columns
    for some in (x, x[:0], x[0], x.expand(2, 7, 3)):
        some_context = context if context is None or (some.dim() > 1 and len(some)) else context[0]
        assert net(some, some_context).shape == (*some.shape, 4)
    for a, b in zip(got, results(plainly(net), x, context, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_layers_that_were_changed_or_are_listened_to_are_called():
    net, x, seen = MLP(2, 3, hidden_dims=(4,)), torch.randn(5, 2), []
    before = net(x)
    handle = net.activation.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(net(x), before)
    assert [out.shape for out in seen] == [(5, 4)]
    handle.remove()
    nn.utils.parametrizations.weight_norm(net.layers[0])
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_large_masked_products_take_batches_of_gradients_and_the_meta_device():
    net = MADE(64, 2, hidden_dims=(256, 256))
    x = torch.randn(300, 64, requires_grad=True)
    out = net(x).sum(-1)
    rows = torch.stack([torch.ones(300, 64), torch.randn(300, 64)])
    (got,) = torch.autograd.grad(out, x, rows, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(got[1], torch.autograd.grad(out, x, rows[1])[0])
    assert net.to("meta")(x.to("meta")).shape == (300, 64, 2)
