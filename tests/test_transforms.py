"""What is special to single layers: Pyro's names and shapes, the memo, orders, masks, events, long stacks."""

import copy
import gc
import pickle
import threading
import warnings

import numpy as np
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.optim.clipped_adam import ClippedAdam
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform

import pyroflows as pf
from pyroflows import transforms as T
from pyroflows.errors import ContextError, OptionError, ShapeError

few = settings(max_examples=25, deadline=None, derandomize=True)

HELPERS = {
    "affine_autoregressive": (T.affine_autoregressive, T.conditional_affine_autoregressive),
    "affine_coupling": (T.affine_coupling, T.conditional_affine_coupling),
    "spline": (T.spline, T.conditional_spline),
    "spline_autoregressive": (T.spline_autoregressive, T.conditional_spline_autoregressive),
    "spline_coupling": (T.spline_coupling, T.conditional_spline_coupling),
}


def shaken(layer, scale=0.5):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(scale * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return layer


def made(name, input_dim, context_dim=0, scale=0.5):
    plain, conditional = HELPERS[name]
    layer = conditional(input_dim, context_dim) if context_dim else plain(input_dim)
    return shaken(layer, scale).double()


def at(layer, batch=()):
    if not layer.context_dim:
        return layer
    return layer.condition(torch.randn(*batch, layer.context_dim, dtype=torch.float64))


every = [
    pytest.mark.parametrize("name", HELPERS),
    pytest.mark.parametrize("context_dim", [0, 3]),
    pytest.mark.parametrize("input_dim", [2, 3, 7]),
]


def matrix(test):
    for mark in every:
        test = mark(test)
    return test


# --- the questions that Pyro asks of its transforms -------------------------------------------------------


@matrix
def test_inverse(name, input_dim, context_dim):
    layer = at(made(name, input_dim, context_dim))
    x = torch.randn(20, input_dim, dtype=torch.float64) * 2
    y = layer(x)
    layer.clear_cache()
    assert torch.allclose(layer.inv(y.clone()), x, atol=1e-9)
    z = torch.randn(20, input_dim, dtype=torch.float64) * 2
    assert torch.allclose(layer(layer.inv(z).clone()), z, atol=1e-9)


@matrix
def test_jacobian_by_finite_differences(name, input_dim, context_dim):
    layer = at(made(name, input_dim, context_dim))
    x, step = torch.randn(input_dim, dtype=torch.float64), 1e-6
    columns = [(layer(x + step * e) - layer(x - step * e)) / (2 * step) for e in torch.eye(input_dim).double()]
    log_det = layer.log_abs_det_jacobian(x, layer(x))
    log_det = log_det.sum() if layer.domain.event_dim == 0 else log_det
    assert torch.allclose(torch.stack(columns, -1).slogdet()[1], log_det, atol=1e-5)


@matrix
def test_jacobian_by_autograd(name, input_dim, context_dim):
    layer = at(made(name, input_dim, context_dim))
    x = torch.randn(input_dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    log_det = layer.log_abs_det_jacobian(x, layer(x)).sum()
    assert torch.allclose(jacobian.slogdet()[1], log_det, atol=1e-9)
    reverse = torch.func.jacfwd(layer)(x)
    assert torch.allclose(jacobian, reverse, atol=1e-9)


@matrix
def test_shapes(name, input_dim, context_dim):
    layer = made(name, input_dim, context_dim)
    for shape in ((), (1,), (4,), (4, 3), (2, 1, 3)):
        base = dist.Normal(torch.zeros(input_dim).double(), 1.0).expand((*shape, input_dim)).to_event(1)
        d = dist.TransformedDistribution(base, [at(layer, shape)])
        sample = d.rsample()
        assert sample.shape == (*shape, input_dim)
        torch_d = dist.TransformedDistribution(base, [at(layer, shape)], validate_args=False)
        assert torch_d.log_prob(sample).shape == shape
    if context_dim:
        base = dist.Normal(torch.zeros(input_dim).double(), 1.0).to_event(1)
        d = dist.TransformedDistribution(base, [at(layer, (6,))])
        assert d.batch_shape == (6,)
        assert d.sample((7,)).shape == (7, 6, input_dim)


@matrix
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(name, input_dim, context_dim):
    layer = at(made(name, input_dim, context_dim)).requires_grad_(False)
    x, other = torch.randn(4, input_dim).double(), torch.randn(4, input_dim).double()
    for function in (lambda x: layer(x), lambda x: layer.inv(x), lambda x: layer.forward_and_log_det(x)[1]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(function, x, check_trace=False)
        assert torch.allclose(traced(other), function(other), atol=1e-10)


@pytest.mark.parametrize("name", HELPERS)
def test_positional_arguments_are_pyros(name):
    """A script that calls Pyro's helper positionally gets the layer it asked for."""
    ours, theirs = HELPERS[name][0], getattr(pyro_transforms, name)
    import inspect

    expected = list(inspect.signature(theirs).parameters)
    found = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    shared = [p for p in expected if p != "kwargs"]
    assert found[: len(shared)] == shared[: len(found)]


@pytest.mark.parametrize("name", [name for name in HELPERS if hasattr(pyro_transforms, f"conditional_{name}")])
def test_positional_arguments_of_conditional_helpers_are_pyros(name):
    import inspect

    theirs = list(inspect.signature(getattr(pyro_transforms, f"conditional_{name}")).parameters)
    ours = inspect.signature(HELPERS[name][1]).parameters.values()
    found = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    shared = [p for p in theirs if p != "kwargs"]
    assert found[: len(shared)] == shared[: len(found)]


def test_conditional_twins_in_pyros_distributions():
    flow = [T.conditional_affine_coupling(3, 2), T.permute(3), T.conditional_spline_autoregressive(3, 2)]
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    d = dist.ConditionalTransformedDistribution(base, flow)
    context = torch.randn(5, 2)
    x = torch.randn(5, 3)
    assert d.condition(context).log_prob(x).shape == (5,)
    stack = ConditionalComposeTransformModule(flow)
    assert torch.allclose(
        dist.ConditionalTransformedDistribution(base, [stack]).condition(context).log_prob(x),
        d.condition(context).log_prob(x),
    )
    assert len(list(stack.parameters())) == sum(len(list(t.parameters())) for t in flow)


def test_iterated():
    stack = pyro_transforms.iterated(3, T.affine_autoregressive, 4, [8])
    assert len(list(stack.parameters())) == 3 * len(list(T.affine_autoregressive(4, [8]).parameters()))
    x = torch.randn(5, 4)
    assert torch.allclose(stack.inv(stack(x).clone()), x, atol=1e-5)


# --- orders, masks and events ----------------------------------------------------------------------------


def jacobian(layer, x):
    return torch.stack([torch.autograd.functional.jacobian(layer, row) for row in x])


@given(order=st.integers(1, 5).flatmap(lambda n: st.permutations(range(n))), width=st.integers(1, 12))
@few
def test_N34_autoregressive_is_triangular_in_its_order(order, width):
    n = len(order)
    layer = T.Autoregressive(T.Affine(), n, order=order, hidden_dims=(width,), activation="tanh").double()
    found = jacobian(shaken(layer, 2.0), torch.randn(5, n).double())
    later = torch.tensor([[order[j] > order[i] for j in range(n)] for i in range(n)])
    assert bool((found[:, later] == 0).all())
    assert bool((found.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert torch.allclose(layer.inv(layer(torch.ones(n).double()).clone()), torch.ones(n).double())


@given(mask=st.lists(st.booleans(), min_size=1, max_size=6).filter(lambda m: not all(m)))
@few
def test_coupling_moves_what_the_mask_leaves(mask):
    layer = shaken(T.Coupling(T.Affine(), len(mask), mask=mask, hidden_dims=(8,)), 2.0).double()
    x = torch.randn(7, len(mask)).double()
    kept = torch.tensor(mask)
    y = layer(x)
    assert torch.equal(y[:, kept], x[:, kept])
    assert bool((y != x)[:, ~kept].all())
    found = jacobian(layer, x[:3])
    assert bool((found[:, kept][:, :, ~kept] == 0).all())
    assert torch.allclose(layer.inv(y.clone()), x)


@pytest.mark.parametrize(
    ("mask", "flip", "steers"),
    [
        (None, False, [1, 1, 0, 0, 0]),
        ("split", False, [1, 1, 0, 0, 0]),
        ("split", True, [0, 0, 1, 1, 1]),
        ("checkerboard", False, [1, 0, 1, 0, 1]),
        ("checkerboard", True, [0, 1, 0, 1, 0]),
        (torch.tensor([True, False, False, False, False]), False, [1, 0, 0, 0, 0]),
        (np.array([1, 0, 0, 0, 0]), True, [0, 1, 1, 1, 1]),
    ],
)
def test_masks_by_word(mask, flip, steers):
    assert T.coupling_mask(mask, 5, flip=flip) == [bool(steer) for steer in steers]
    if not flip:
        for layer in (T.Coupling(T.Affine(), 5, mask=mask), T.coupling(5, mask=mask), T.CircularCoupling(5, mask=mask)):
            assert layer.kept.tolist() == [i for i, steer in enumerate(steers) if steer]


@pytest.mark.parametrize("name", ["realnvp", "nsf", "nice"])
def test_flows_turn_their_masks_round(name):
    for mask, first, second in (("split", [0, 1], [2, 3, 4]), ("checkerboard", [0, 2, 4], [1, 3])):
        layers = [t for t in pf.flow(name, input_dim=5, transforms=2, mask=mask).modules() if isinstance(t, T.Coupling)]
        assert [layer.kept.tolist() for layer in layers] == [first, second]
        pf.flow(name, input_dim=1, mask=mask)().rsample((2,))
    with pytest.raises(OptionError, match='"split", "checkerboard"'):
        pf.flow(name, input_dim=5, mask="halves")


def test_coupling_refuses_masks_that_move_nothing():
    with pytest.raises(OptionError, match="at least one of them False"):
        T.Coupling(T.Affine(), 2, mask=[True, True])
    with pytest.raises(OptionError, match="booleans, got 3"):
        T.coupling_mask(3, 2)
    with pytest.raises(OptionError, match="2 booleans"):
        T.Coupling(T.Affine(), 2, mask=[True])
    with pytest.raises(OptionError, match=r"split_dim must be in 0 \.\. 2"):
        T.affine_coupling(3, split_dim=3)


@given(order=st.integers(1, 7).flatmap(lambda n: st.permutations(range(n))))
@few
def test_permute_is_its_list(order):
    layer = T.permute(len(order), order)
    x = torch.randn(3, len(order))
    assert torch.equal(layer(x), x[:, list(order)])
    assert torch.equal(layer.inv(layer(x)), x)
    assert "permutation" in layer.state_dict()


def test_events_of_two_dimensions():
    x = torch.randn(5, 4, 3)
    shuffle = T.permute(4, [3, 1, 0, 2], -2)
    assert torch.equal(shuffle(x), x[:, [3, 1, 0, 2]])
    assert shuffle.forward_and_log_det(x)[1].shape == (5,)
    layer = T.affine_coupling([4, 3], [8], 2, -2)
    y = shaken(layer)(x)
    assert torch.equal(y[:, :2], x[:, :2])
    assert torch.allclose(layer.inv(y.clone()), x, atol=1e-5)
    base = dist.Normal(torch.zeros(4, 3), 1.0).to_event(2)
    d = dist.TransformedDistribution(base, [shuffle, layer])
    assert d.event_shape == (4, 3)
    assert d.log_prob(x).shape == (5,)
    conditional = shaken(T.conditional_affine_coupling([4, 3], 2, [8], 2, -2))
    d = dist.TransformedDistribution(base, [conditional.condition(torch.randn(6, 2))])
    assert d.batch_shape == (6,)
    assert d.sample((7,)).shape == (7, 6, 4, 3)
    pf.check(T.Compose([shuffle, layer]), laws=["round_trip", "log_det", "shapes", "rows", "protocol", "memo"])


@pytest.mark.parametrize("context_dim", [0, 2])
def test_event_dim_zero_keeps_coordinates_apart(context_dim):
    layer = shaken(T.spline(3, context_dim=context_dim))
    x = torch.randn(5, 3)
    at_context = layer if not context_dim else layer.condition(torch.randn(5, 2))
    assert at_context.log_abs_det_jacobian(x, at_context(x)).shape == (5, 3)
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(5, 3), 1.0), [at_context])
    assert d.batch_shape == (5, 3)
    assert d.event_shape == ()
    together = T.Compose([layer, shaken(T.affine(3, context_dim=context_dim))])
    assert together.domain.event_dim == 1
    pf.check(together, laws=["log_det", "round_trip", "shapes", "protocol"])


@pytest.mark.parametrize(
    ("transform", "domain"),
    [
        (ExpTransform(), constraints.real),
        (SigmoidTransform(), constraints.real),
        (AffineTransform(2.0, 3.0), constraints.real),
    ],
)
def test_wrapped_transforms_of_torch(transform, domain):
    layer = T.Wrapped(transform)
    assert layer.domain is domain
    x = torch.randn(5, 2)
    assert torch.equal(layer(x), transform(x))
    assert torch.equal(layer.forward_and_log_det(x)[1], transform.log_abs_det_jacobian(x, transform(x)))
    stack = T.Compose([T.affine(2), transform])
    assert stack.forward_and_log_det(x)[1].shape == (5,)
    pf.check(T.Compose([shaken(T.affine(2)), transform]), laws=["round_trip", "log_det", "shapes", "rows", "algebra"])


def test_wrapped_needs_a_bijection():
    with pytest.raises(OptionError, match="not bijective"):
        T.Wrapped(torch.distributions.transforms.AbsTransform())


# --- context ---------------------------------------------------------------------------------------------


def test_context_errors_say_what_to_do():
    layer = T.affine_coupling(3, context_dim=2)
    with pytest.raises(ContextError, match=r"got no context. Call .condition"):
        layer(torch.zeros(3))
    with pytest.raises(ContextError, match=r"expected a context of shape \[\*batch, 2\], got \(5,\)"):
        layer.condition(torch.zeros(5))
    with pytest.raises(ShapeError, match=r"input_dim=3 and got shape \(5,\)"):
        layer.condition(torch.zeros(2))(torch.zeros(5))
    with pytest.raises(OptionError, match="context_dim"):
        T.affine_coupling(3, context_dim=-1)
    with pytest.raises(OptionError, match="different widths"):
        T.Compose([T.affine(3, context_dim=2), T.affine(3, context_dim=1)])


def test_without_context_a_layer_conditions_to_itself():
    layer = T.spline_coupling(3)
    assert layer.condition(torch.zeros(7, 2)) is layer
    mixed = T.Compose([T.affine(3, context_dim=2), T.permute(3), T.spline_coupling(3)])
    assert mixed.context_dim == 2
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [mixed.condition(torch.zeros(6, 2))])
    assert d.batch_shape == (6,)


def test_gradients_reach_the_network_that_made_the_context():
    encoder = torch.nn.Linear(4, 2)
    layer = shaken(T.spline_autoregressive(3, context_dim=2))
    context = encoder(torch.randn(5, 4))
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [layer.condition(context)])
    y = d.rsample()
    d.log_prob(y).sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) for p in (*encoder.parameters(), *layer.parameters())
    )
    assert bool((encoder.weight.grad != 0).any())


def test_a_copied_condition_is_cut_off_from_its_graph():
    context = torch.nn.Linear(4, 2)(torch.randn(5, 4))
    layer = T.affine_coupling(3, context_dim=2).condition(context)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not clone.context.requires_grad
        assert torch.equal(clone.context, context)


# --- the memo --------------------------------------------------------------------------------------------


def density(layer):
    return dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [layer])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: ClippedAdam(p, lr=0.1),
    ],
)
def test_N28_full_batch_maximum_likelihood_on_one_tensor(optimizer):
    """The same data tensor at every step: the loss is that of the present parameters, and falls."""
    layer = shaken(T.affine_coupling(3, [16]))
    data = torch.randn(200, 3) * 0.3 + 2
    steps = optimizer(list(layer.parameters()))
    losses = []
    for _ in range(60):
        steps.zero_grad()
        loss = -density(layer).log_prob(data).mean()
        assert torch.equal(loss, -density(copy.deepcopy(layer)).log_prob(data.clone()).mean())
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_N28_shuffled_in_place_through_numpy():
    layer = shaken(T.affine_coupling(3))
    d = density(layer)
    with torch.no_grad():
        y = d.sample((50,))
        np.random.default_rng(0).shuffle(y.numpy())
        assert torch.allclose(d.log_prob(y), d.log_prob(y.clone()), atol=1e-5)


def test_N29_two_backwards_through_one_sample():
    layer = shaken(T.affine_coupling(3))
    d = density(layer)
    y = d.rsample((4,)).detach()
    for _ in range(2):
        d.log_prob(y).sum().backward()
    y = d.rsample((4,))
    d.log_prob(y).sum().backward(retain_graph=True)
    d.log_prob(y).sum().backward()


def test_memo_is_not_kept_where_it_must_not_be():
    layer = shaken(T.affine_coupling(3))
    torch.func.vmap(layer)(torch.randn(4, 3))
    assert layer._memo is None
    layer(torch.randn(2, 3))
    assert layer._memo is not None
    assert copy.deepcopy(layer)._memo is None
    assert pickle.loads(pickle.dumps(layer))._memo is None
    assert not any("memo" in name for name in layer.state_dict())
    layer.clear_cache()
    assert layer._memo is None


def test_freezing_and_thawing_parameters():
    layer = shaken(T.affine_coupling(3))
    d = density(layer)
    layer.requires_grad_(False)
    y = d.sample()
    assert not d.log_prob(y).requires_grad
    layer.requires_grad_(True)
    assert d.log_prob(y).requires_grad


def test_a_discarded_layer_is_freed():
    """The memo and the inverse hold no reference that outlives the layer for long."""
    import weakref

    layer = shaken(T.affine_coupling(3))
    d = density(layer)
    d.log_prob(d.rsample())
    ghost = weakref.ref(layer)
    del layer, d
    gc.collect()
    assert ghost() is None


def test_threads_do_not_mix_their_samples():
    layer = shaken(T.affine_coupling(3)).requires_grad_(False)
    errors = []

    def work(seed):
        d, generator = density(layer), torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(8, 3, generator=generator)
            y = layer(x)
            if not torch.allclose(layer.inv(y), x, atol=1e-4) or not torch.allclose(
                d.log_prob(y), d.log_prob(y.clone()), atol=1e-4
            ):
                errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_inverse_of_an_inverse_is_the_layer():
    layer = T.affine_coupling(3)
    assert layer.inv is layer.inv
    assert layer.inv.inv is layer
    again = copy.deepcopy(layer.inv)
    assert again.inv.inv is again
    assert again.transform is not layer
    assert pickle.loads(pickle.dumps(layer)).inv.inv is not layer
    assert set(map(id, layer.inv.parameters())) == set(map(id, layer.parameters()))


def test_N8_a_guide_made_of_an_inverse_trains():
    """Pyro's AutoNormalizingFlow with `affine_autoregressive(d).inv` trains nothing there; here it does."""
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormalizingFlow
    from pyro.optim import Adam

    def model():
        import pyro

        pyro.sample("z", dist.Normal(torch.full((3,), 3.0), 0.5).to_event(1))

    guide = AutoNormalizingFlow(model, lambda n: T.affine_autoregressive(n).inv)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(100)]
    assert len(list(guide.parameters())) > 0
    assert sum(losses[-10:]) < sum(losses[:10])


# --- declared parameters, starting values, long stacks ------------------------------------------------------


def test_declared_parameters_do_not_share_memory():
    class Two(T.FlowTransform):
        def __init__(self):
            super().__init__()
            zero = torch.zeros(2)
            self.declare_parameters(a=zero, b=zero)

    layer = Two()
    with torch.no_grad():
        layer.a.add_(1.0)
    assert layer.b.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("context_dim", [0, 2])
def test_declared_parameters_start_at_their_values(context_dim):
    layer = T.ActNorm(3, context_dim=context_dim)
    data = torch.randn(500, 3) * torch.tensor([0.1, 1.0, 30.0]) + torch.tensor([5.0, 0.0, -100.0])
    context = torch.zeros(500, context_dim) if context_dim else None
    layer.initialize(data, context)
    x, _ = layer.inverse_and_log_det(data, context)
    assert torch.allclose(x.mean(0), torch.zeros(3), atol=0.05)
    assert torch.allclose(x.std(0), torch.ones(3), atol=0.05)


def test_actnorm_of_constant_or_single_rows():
    layer = T.ActNorm(2)
    layer.initialize(torch.ones(1, 2))
    assert torch.equal(layer(torch.ones(2)), torch.ones(2))
    layer.initialize(torch.ones(5, 2))
    y, log_det = layer.inverse_and_log_det(torch.ones(3, 2))
    assert bool(y.isfinite().all())
    assert bool(log_det.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_N21_a_stack_of_32_couplings_under_heavy_tails(dtype):
    layers = []
    for _ in range(32):
        layers += [T.affine_coupling(4, [16]), T.permute(4, torch.randperm(4))]
        shaken(layers[-2], 0.3)
    stack = T.Compose(layers).to(dtype)
    x = dist.StudentT(1.0).sample((512, 4)).to(dtype)
    for run in (stack.forward_and_log_det, stack.inverse_and_log_det):
        point = x.clone().requires_grad_()
        value, log_det = run(point)
        assert bool(log_det.isfinite().all())
        assert bool(value.isfinite().all())
        grads = torch.autograd.grad(log_det.mean(), [point, *stack.parameters()], allow_unused=True)
        assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("name", [*HELPERS, "lu_linear", "actnorm", "affine"])
def test_N31_one_coordinate(name):
    layer = shaken(pf.transform(name, input_dim=1))
    x = torch.randn(6, 1)
    assert torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)


@pytest.mark.parametrize("name", ["spline_coupling", "affine_autoregressive", "lu_linear"])
def test_aot_compilation_of_both_directions(name):
    layer = shaken(pf.transform(name, input_dim=3, context_dim=2, **({"order": "quadratic"} if "spl" in name else {})))
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    saved = torch.distributions.Distribution._validate_args
    try:
        for run in (layer.forward_and_log_det, layer.inverse_and_log_det):
            torch._dynamo.reset()
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, context)
            for got, want in zip(compiled, run(x, context), strict=True):
                assert torch.allclose(got, want, atol=1e-5)
    finally:
        torch._dynamo.reset()
        torch.distributions.Distribution.set_default_validate_args(saved)


def test_scales_refuse_what_cannot_be():
    for options in ({"scale": "exp"}, {"max_log_scale": 0.0}, {"scale": "softplus", "floor": 1.0}):
        with pytest.raises(OptionError):
            T.affine(2, **options)
    for options in ({"count_bins": 1}, {"bound": 0.0}, {"order": "cubic"}, {"count_bins": 501}):
        with pytest.raises(OptionError):
            T.spline(2, **options)


@pytest.mark.parametrize("name", ["affine", "affine_coupling", "spline_autoregressive", "householder"])
def test_a_context_that_is_no_tensor(name):
    layer = pf.transform(name, input_dim=3, context_dim=2)
    with pytest.raises(ContextError, match=r"list: give torch.as_tensor\(context\)"):
        layer.condition([[0.0, 1.0]])
    with pytest.raises(ContextError, match="tuple"):
        layer.forward_and_log_det(torch.zeros(3), (0.0, 1.0))


@pytest.mark.parametrize("name", ["affine", "affine_coupling", "spline_autoregressive", "householder", "planar"])
def test_a_point_that_is_no_tensor(name):
    layer = pf.transform(name, input_dim=2)
    for direction in (layer.forward_and_log_det, layer.inverse_and_log_det, layer, layer.inv):
        with pytest.raises(ShapeError, match=r"\[\*batch, 2\], got list: give torch.as_tensor\(x\)"):
            direction([0.0, 1.0])


FROZEN = {
    "sweep": lambda: T.autoregressive(3, "affine", context_dim=2, hidden_dims=(8,)),
    "root": lambda: T.autoregressive(3, "deep_sigmoid", context_dim=2, hidden_dims=(8,)),
    "spline": lambda: T.coupling(3, "rational_spline", context_dim=2, hidden_dims=(8,)),
    "adjoint": lambda: T.continuous(3, context_dim=2, hidden_dims=(8, 8)),
    "checkpoint": lambda: T.continuous(3, context_dim=2, hidden_dims=(8, 8), gradient="checkpoint"),
}


@pytest.mark.parametrize(("all_of_it", "twice"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", FROZEN)
def test_parameters_that_are_frozen_before_the_backward_pass_get_no_gradient(name, all_of_it, twice):
    """As with plain operations: the other gradients are what they were."""
    torch.manual_seed(0)
    layer = shaken(FROZEN[name]()).double()
    y, context = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    parameters = list(layer.parameters())
    frozen = parameters if all_of_it else parameters[1::2]

    def gradients(freeze):
        layer.requires_grad_(True)
        leaves = [y.clone().requires_grad_(), context.clone().requires_grad_()]
        x, log_det = layer.inverse_and_log_det(*leaves)
        loss = x.square().sum() + log_det.sum()
        if freeze:
            [p.requires_grad_(False) for p in frozen]
        else:
            leaves += [p for p in parameters if not any(p is f for f in frozen)]
        if freeze and not twice:
            layer.zero_grad()
            loss.backward()
            assert all(p.grad is None for p in frozen)
            leaves += [p for p in parameters if p.requires_grad]
            return [leaf.grad for leaf in leaves]
        if freeze:
            leaves += [p for p in parameters if p.requires_grad]
        first = torch.autograd.grad(loss, leaves, create_graph=twice)
        if not twice:
            return first
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_a_coupling_of_many_numbers_has_the_gradients_of_one_of_few(monkeypatch):
    layer = pf.transform("affine_coupling", input_dim=5).double()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for least in (1, 2**40):
        monkeypatch.setattr("pyroflows.numerics.parts.MANY", least)
        y, log_det = layer.forward_and_log_det(x)
        assert ("_Together" in str(y.grad_fn)) == (least == 1)
        loss = y.sin().sum() + log_det.cos().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append([y, first, *torch.autograd.grad(first.cos().sum(), x)])
        rows = torch.stack([y.detach(), torch.ones_like(y)])
        found[-1] += torch.autograd.grad(layer.forward_and_log_det(x)[0], x, rows, is_grads_batched=True)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
