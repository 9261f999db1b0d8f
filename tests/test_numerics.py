"""The tensor functions: splines, roots, scales and sums, at their edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows.errors import InverseNotConverged
from pyroflows.numerics import (
    bounded_affine,
    bounded_log_scale,
    linear_rational,
    monotone_root,
    positive,
    rational_quadratic,
    sum_last,
)
from pyroflows.numerics.affine import _plainly

BINS, BOUND = 6, 3.0
few = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def spline(order, rows, scale=1.0, seed=0, dtype=torch.float64):
    """A function of ``(values, inverse)`` with random parameters of its own for each row."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (BINS, BINS, BINS - 1) if order == "quadratic" else (BINS, BINS, BINS - 1, BINS)
    raw = [scale * torch.randn(rows, 1, size, generator=generator).to(dtype) for size in sizes]
    function = rational_quadratic if order == "quadratic" else linear_rational
    return lambda value, inverse=False: function(value, *raw, bound=BOUND, inverse=inverse)


def knots(order, seed=0):
    """The inner knots of one spline with equal parameters for both axes, and the ends."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BINS, generator=generator, dtype=torch.float64)
    share = 1e-3 + (1 - 1e-3 * BINS) * logits.softmax(-1)
    edges = BOUND * (2 * torch.cat([share.new_zeros(1), share.cumsum(-1)]) - 1)
    zero = torch.zeros(BINS - 1, dtype=torch.float64)
    raw = (logits, logits, zero) if order == "quadratic" else (logits, logits, zero, torch.zeros_like(logits))
    function = rational_quadratic if order == "quadratic" else linear_rational
    return edges, lambda value, inverse=False: function(value, *raw, bound=BOUND, inverse=inverse)


orders = pytest.mark.parametrize("order", ["quadratic", "linear"])


# --- splines ---------------------------------------------------------------------------------------------


@orders
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 2.0]))
@few
def test_spline_increases_and_its_slope_is_the_derivative(order, seed, scale):
    f = spline(order, 4, scale, seed)
    x = torch.linspace(-4, 4, 301, dtype=torch.float64).expand(4, -1).clone().requires_grad_()
    y, log_slope = f(x)
    assert bool((y.diff(dim=-1) > 0).all())
    (slope,) = torch.autograd.grad(y.sum(), x)
    doubt = 1e-13 / slope.min()
    assert bool(((slope.log() - log_slope).abs() <= 1e-9 + doubt).all())


@orders
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 3.0]))
@few
def test_spline_round_trip(order, seed, scale):
    f = spline(order, 4, scale, seed)
    x = torch.linspace(-4, 4, 203, dtype=torch.float64).expand(4, -1)
    y, log_slope = f(x)
    back, log_back = f(y, inverse=True)
    allowed = 1e-13 * (1 + torch.exp(-log_slope)) * 100
    assert bool(((back - x).abs() <= allowed).all())
    again, _ = f(back)
    assert bool(((again - y).abs() <= 1e-12 * (1 + torch.exp(log_slope))).all())
    assert log_back.shape == x.shape


@orders
def test_N3_at_knots_and_bounds(order):
    edges, f = knots(order)
    infinity = torch.full_like(edges, torch.inf)
    for points in (edges, torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity)):
        for inverse in (False, True):
            points = points.detach().requires_grad_()
            y, log_slope = f(points, inverse)
            # The same knots on both axes, slope 1 at each: the spline meets the identity there.
            assert bool(((y - points).abs() < 1e-12).all())
            assert bool((log_slope.abs() < 1e-9).all())
            grads = torch.autograd.grad(y.sum() + log_slope.sum(), points)
            assert bool(grads[0].isfinite().all())


@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_N3_tails_are_the_identity(order, dtype):
    f = spline(order, 3, 2.0, dtype=dtype)
    up = torch.nextafter(torch.tensor(BOUND, dtype=dtype), torch.tensor(torch.inf, dtype=dtype))
    tail = torch.stack([torch.tensor(BOUND, dtype=dtype), up, up * 10, up * 1e30])
    for x in (tail, -tail):
        x = x.expand(3, -1).clone().requires_grad_()
        for inverse in (False, True):
            y, log_slope = f(x, inverse)
            assert torch.equal(y, x)
            assert torch.equal(log_slope, torch.zeros_like(x))
            (grad,) = torch.autograd.grad(y.sum() + log_slope.sum(), x)
            assert bool((grad == 1).all())


@orders
@given(seed=seeds, factor=st.sampled_from([3.0, 10.0, 30.0]))
@few
def test_N4_large_parameters_in_float32(order, seed, factor):
    """No assertion, nothing that is not finite; the round trip holds as far as the slope allows."""
    f, exact = spline(order, 8, factor, seed, torch.float32), spline(order, 8, factor, seed)
    x = torch.linspace(-3.5, 3.5, 64).expand(8, -1)
    y, log_slope = f(x)
    back, log_back = f(y, inverse=True)
    again, _ = f(back)
    for value in (y, log_slope, back, log_back):
        assert bool(value.isfinite().all())
    assert bool((y.diff(dim=-1) >= -4 * BOUND * torch.finfo(torch.float32).eps).all())
    assert bool(((again - y).abs() <= 1e-4 * (1 + log_slope.clamp_min(0).exp())).all())
    assert bool(((y - exact(x.double())[0]).abs() <= 1e-4 * (1 + log_slope.clamp_min(0).exp())).all())


@orders
def test_N5_vanishing_discriminant(order):
    """A bin that is a straight line, and values at its ends, where the quadratic formula has a double root."""
    zeros = [torch.zeros(2, size, dtype=torch.float64) for size in (2, 2, 1, 2)]
    function = rational_quadratic if order == "quadratic" else linear_rational
    raw = zeros[:3] if order == "quadratic" else zeros
    y = torch.tensor([-3.0, 0.0], dtype=torch.float64, requires_grad=True)
    x, log_slope = function(y, *raw, bound=BOUND, inverse=True)
    assert torch.allclose(x, y)
    (grad,) = torch.autograd.grad(x.sum() + log_slope.sum(), y)
    assert bool(grad.isfinite().all())


@orders
def test_N6_masked_rows_do_not_poison_gradients(order):
    raw = [torch.randn(5, size, dtype=torch.float64, requires_grad=True) for size in (BINS, BINS, BINS - 1, BINS)]
    raw = raw[:3] if order == "quadratic" else raw
    function = rational_quadratic if order == "quadratic" else linear_rational
    x = torch.tensor([0.5, 1e20, -1e38, 1e300, 2.9], dtype=torch.float64, requires_grad=True)
    for inverse in (False, True):
        y, log_slope = function(x, *raw, bound=BOUND, inverse=inverse)
        grads = torch.autograd.grad(y.sum() + log_slope.sum(), [x, *raw])
        assert all(bool(grad.isfinite().all()) for grad in grads)


@orders
def test_spline_rows_broadcast(order):
    f = spline(order, 1)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    y, log_slope = f(x)
    assert y.shape == log_slope.shape == x.shape
    assert torch.equal(f(x[2, 1:2])[0], y[2, 1:2])


@orders
def test_nan_stays_in_its_place(order):
    f = spline(order, 1)
    x = torch.tensor([[0.1, torch.nan, 0.2, torch.inf, -torch.inf]], dtype=torch.float64)
    y, _ = f(x)
    good = torch.tensor([0, 2])
    assert torch.equal(y[:, good], f(x[:, good])[0])
    assert bool(y[0, 1].isnan())


# --- scales and sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_N20_scales_stay_finite_and_positive(dtype):
    raw = torch.tensor([-1e30, -200.0, -1.0, 0.0, 1.0, 200.0, 1e30], dtype=dtype, requires_grad=True)
    scale, log_scale = positive(raw), bounded_log_scale(raw, 3.0)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    assert bool((log_scale.abs() <= 3).all())
    assert scale[3].item() == pytest.approx(1.0)
    assert log_scale[3] == 0
    assert bool((scale.diff() >= 0).all())
    (grad,) = torch.autograd.grad(scale.log().sum() + log_scale.sum(), raw)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_N30_sums_keep_their_digits(dtype):
    value = torch.full((4, 4096), 0.5, dtype=dtype)
    assert sum_last(value).dtype == torch.float32
    assert bool((sum_last(value) == 2048).all())
    assert sum_last(value, 0).dtype == torch.float32
    assert sum_last(value.double(), 2).shape == ()


# --- roots -----------------------------------------------------------------------------------------------


def tanh_mix(slope=1.0):
    def f(x):
        y = slope * x + torch.tanh(3 * x) + 0.5 * torch.tanh(x - 4)
        d = slope + 3 / torch.cosh(3 * x).square() + 0.5 / torch.cosh(x - 4).square()
        return y, d.log()

    return f


def cubic(x):
    return x + x**3, torch.log1p(3 * x**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", [tanh_mix(), cubic, lambda x: (torch.asinh(x), -0.5 * torch.log1p(x * x))])
def test_N22_roots_in_the_far_tails(f, dtype):
    reach = 60.0 if f(torch.tensor(1e6))[0] < 100 else 1e8
    x = torch.cat([torch.logspace(-6, math.log10(reach), 40), torch.zeros(1)]).to(dtype)
    if reach == 60.0:
        x = torch.sinh(torch.linspace(-20, 20, 41)).to(dtype)
    x = torch.cat([x, -x])
    y, log_slope = f(x)
    root = monotone_root(f, y)
    eps = torch.finfo(dtype).eps
    allowed = 64 * eps * (x.abs() + (1 + y.abs()) * torch.exp(-log_slope))
    assert bool(((root.x - x).abs() <= allowed).all())
    assert bool(((root.log_slope - f(root.x)[1]).abs() < 1e-6).all())


@given(seed=seeds)
@few
def test_root_of_random_increasing_functions(seed):
    generator = torch.Generator().manual_seed(seed)
    weight, shift = torch.rand(5, generator=generator).double(), 10 * torch.randn(5, generator=generator).double()
    steep = torch.exp(2 * torch.randn(5, generator=generator)).double()

    def f(x):
        inner = steep * (x.unsqueeze(-1) - shift)
        y = 1e-3 * x + (weight * torch.tanh(inner)).sum(-1)
        return y, torch.log(1e-3 + (weight * steep / torch.cosh(inner.clamp(-300, 300)).square()).sum(-1))

    y = 30 * torch.randn(50, generator=generator).double()
    root = monotone_root(f, y)
    assert bool(((f(root.x)[0] - y).abs() <= 1e-13 * (1 + y.abs() + root.log_slope.exp() * root.x.abs())).all())


def test_root_has_first_and_second_derivatives():
    a = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([-3.0, 0.1, 40.0], dtype=torch.float64, requires_grad=True)

    def solve(a, y):
        root = monotone_root(lambda x: (a * x + torch.sinh(x) / 5, torch.log(a + torch.cosh(x) / 5)), y)
        return root.x, root.log_slope

    assert torch.autograd.gradcheck(solve, (a, y))
    assert torch.autograd.gradgradcheck(lambda a, y: solve(a, y)[0], (a, y))


def test_root_passes_what_is_not_finite():
    root = monotone_root(cubic, torch.tensor([torch.nan, 2.0, torch.inf, -torch.inf]))
    assert root.x[0].isnan()
    assert root.x[1] == pytest.approx(1.0)
    assert root.x[2:].tolist() == [torch.inf, -torch.inf]
    assert monotone_root(cubic, torch.empty(0)).x.shape == (0,)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (torch.tanh(x), torch.log1p(-(torch.tanh(x) ** 2))),  # does not reach 2
        lambda x: (-x, torch.zeros_like(x)),  # decreases
        lambda x: (x * torch.nan, x),
    ],
)
def test_a_root_that_is_not_there(f):
    with pytest.raises(InverseNotConverged, match="of 2 roots were not found") as caught:
        monotone_root(f, torch.tensor([2.0, 3.0]))
    assert caught.value.count >= 1
    assert caught.value.steps <= 200


def test_root_of_a_step_is_its_place():
    def step(x):
        return torch.where(x < 1.5, x - 10, x + 10), torch.zeros_like(x)

    assert monotone_root(step, torch.zeros(1)).x.item() == pytest.approx(1.5)


def test_one_hard_row_does_not_change_the_others():
    y = torch.linspace(-5, 5, 20, dtype=torch.float64)
    alone = monotone_root(tanh_mix(), y).x
    together = monotone_root(tanh_mix(), torch.cat([y, torch.tensor([1e12, -1e-12], dtype=torch.float64)])).x[:20]
    assert bool(((alone - together).abs() <= 1e-14 * (1 + alone.abs())).all())


@pytest.mark.parametrize("inverse", [False, True])
def test_an_affine_map_in_one_step_is_that_of_its_operations(inverse):
    value = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    params = (3 * torch.randn(5, 3, 2, dtype=torch.float64)).requires_grad_()
    found = []
    for function in (bounded_affine, _plainly):
        image, log_slope = function(value, params, 2.0, inverse=inverse)
        loss = image.sin().sum() + log_slope.cos().sum()
        first = torch.autograd.grad(loss, (value, params), create_graph=True)
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), (value, params))
        image, log_slope = function(value, params, 2.0, inverse=inverse)
        plain = torch.autograd.grad(image.sin().sum() + log_slope.cos().sum(), (value, params))
        found.append([image, log_slope, *first, *second, *plain])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    back, opposite = bounded_affine(image, params, 2.0, inverse=not inverse)
    torch.testing.assert_close(back, value)
    torch.testing.assert_close(opposite, -log_slope)
