"""Splines as maps: rational and polynomial ones, their tails, against independent derivations and at their edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows.errors import OptionError
from pyroflows.numerics import piecewise_cubic, piecewise_linear, piecewise_quadratic, rational_quadratic
from pyroflows.numerics.piecewise import _cubic, _cubic_root
from pyroflows.transforms import CircularSpline, PolynomialSpline, RationalSpline, coupling, elementwise, univariate_map

BINS, BOUND = 6, 3.1  # no float32 holds this bound
few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
MAPS = {
    f"{kind.__name__}-{order}-{tails}": kind(BINS, BOUND, order, tails)
    for kind, orders in (
        (RationalSpline, ("quadratic", "linear")),
        (PolynomialSpline, ("linear", "quadratic", "cubic")),
    )
    for order in orders
    for tails in ("identity", "linear")
}
every = pytest.mark.parametrize("spline", MAPS.values(), ids=MAPS)
straight = pytest.mark.parametrize("spline", [m for n, m in MAPS.items() if n.endswith("-linear")])
polynomial = pytest.mark.parametrize("order", ["linear", "quadratic", "cubic"])


def raw(spline, rows, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, 1, spline.params, generator=generator)).to(dtype)


def knots_of(spline, params):
    """The positions of the knots on both sides: where a bisection finds the slope's kinks would be circular, so from
    the definition of the shares.
    """
    parts = [part.double().numpy() for part in params.split(spline.sizes, -1)]

    def edges(logits):
        share = np.exp(logits - logits.max())
        share = 1e-3 + (1 - 1e-3 * BINS) * share / share.sum()
        return BOUND * (2 * np.concatenate([[0.0], share.cumsum()]) - 1)

    return edges, parts


# --- what all of them are --------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_the_identity(spline, dtype):
    x = torch.linspace(-2 * BOUND, 2 * BOUND, 101, dtype=dtype)
    for direction in (spline.forward, spline.backward):
        y, log_slope = direction(x, torch.zeros(101, spline.params, dtype=dtype))
        assert y.dtype == log_slope.dtype == dtype
        assert float((y - x).abs().max()) < 20 * torch.finfo(dtype).eps
        assert float(log_slope.abs().max()) < 20 * torch.finfo(dtype).eps


@every
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 2.0]))
@few
def test_round_trip_and_slope(spline, seed, scale):
    """1e-8 both ways at two standard deviations, as the laws ask, and the log-slope is that of autograd."""
    params = raw(spline, 4, scale, seed)
    x = torch.linspace(-4.01, 3.97, 203, dtype=torch.float64).expand(4, -1).clone().requires_grad_()  # off the knots
    y, log_slope = spline.forward(x, params)
    assert bool((y.diff(dim=-1) > 0).all())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope.log(), log_slope, atol=1e-8 if slope.min() > 1e-5 else 1e-6)
    back, log_back = spline.backward(y.detach(), params)
    assert bool(((back - x).abs() <= 1e-8).all())
    assert bool(((log_back + log_slope).abs() <= 1e-8 + 1e-13 * (1 + (-log_slope).exp()) ** 2).all())
    found, _ = spline.backward(x.detach(), params)
    assert bool(((spline.forward(found, params)[0] - x).abs() <= 1e-8).all())


@every
def test_the_inverse_is_differentiable_twice(spline):
    params = raw(spline, 5, 1.0).requires_grad_()
    y = torch.tensor([[-3.7], [-1.1], [0.3], [2.2], [4.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spline.backward, (y, params), fast_mode=True)
    assert torch.autograd.gradgradcheck(spline.backward, (y, params), fast_mode=True)


# --- against independent derivations ---------------------------------------------------------------------


def test_linear_spline_is_the_interpolation_of_its_knots():
    spline = PolynomialSpline(BINS, BOUND, "linear", "linear")
    params = raw(spline, 1)[0, 0]
    edges, (heights, ends) = knots_of(spline, params)
    at, to = np.linspace(-BOUND, BOUND, BINS + 1), edges(heights)
    x = torch.linspace(-BOUND, BOUND, 1001, dtype=torch.float64)
    y, log_slope = spline.forward(x, params)
    np.testing.assert_allclose(y, np.interp(x, at, to), atol=1e-13)
    inside = log_slope[torch.searchsorted(torch.tensor(at), x).diff().nonzero()[:, 0]]
    assert len(inside.unique()) == BINS  # one slope a bin
    tail, log_tail = spline.forward(torch.tensor([-5.0, 7.0], dtype=torch.float64), params)
    slopes = np.exp(math.log(1e3) * np.tanh(ends / math.log(1e3)))
    np.testing.assert_allclose(tail, [-BOUND - (5 - BOUND) * slopes[0], BOUND + (7 - BOUND) * slopes[1]], rtol=1e-14)
    np.testing.assert_allclose(log_tail.exp(), slopes, rtol=1e-14)


@pytest.mark.parametrize("tails", ["identity", "linear"])
def test_quadratic_spline_is_the_integral_of_its_slopes(tails):
    spline = PolynomialSpline(BINS, BOUND, "quadratic", tails)
    params = raw(spline, 1, seed=3)[0, 0]
    edges, (widths, slopes) = knots_of(spline, params)
    at = edges(widths)
    slopes = np.exp(math.log(1e3) * np.tanh(slopes / math.log(1e3)))
    if tails == "identity":
        # One number scales the inner slopes such that the integral over the box is its height.
        fixed, free = np.zeros(BINS + 1), np.zeros(BINS + 1)
        fixed[[0, -1]], free[1:-1] = 1, slopes
        slopes = fixed + free * (2 * BOUND - np.trapezoid(fixed, at)) / np.trapezoid(free, at)
    else:
        slopes = slopes * 2 * BOUND / np.trapezoid(slopes, at)
    x = np.sort(np.concatenate([at, np.linspace(-BOUND, BOUND, 1001)]))  # the trapezoid rule is exact on these
    density = np.interp(x, at, slopes)
    integral = -BOUND + np.concatenate([[0], np.cumsum(np.diff(x) * (density[1:] + density[:-1]) / 2)])
    y, log_slope = spline.forward(torch.tensor(x), params)
    np.testing.assert_allclose(y, integral, atol=1e-12)
    np.testing.assert_allclose(log_slope[1:-1].exp(), density[1:-1], rtol=1e-11)
    tail, log_tail = spline.forward(torch.tensor([-5.0, 7.0], dtype=torch.float64), params)
    np.testing.assert_allclose(tail, [-BOUND - (5 - BOUND) * slopes[0], BOUND + (7 - BOUND) * slopes[-1]], rtol=1e-12)
    np.testing.assert_allclose(log_tail.exp(), slopes[[0, -1]], rtol=1e-12)


@pytest.mark.parametrize("tails", ["identity", "linear"])
@pytest.mark.parametrize("seed", range(5))
def test_cubic_spline_has_the_slopes_of_steffen(tails, seed):
    """Hermite's cubic with slopes after Steffen (1990), equation 11, knot by knot."""
    spline = PolynomialSpline(BINS, BOUND, "cubic", tails)
    params = raw(spline, 1, seed=seed)[0, 0]
    edges, (widths, heights, *ends) = knots_of(spline, params)
    x, y = edges(widths), edges(heights)
    h, s = np.diff(x), np.diff(y) / np.diff(x)
    slope = np.empty(BINS + 1)
    for i in range(1, BINS):
        p = (s[i - 1] * h[i] + s[i] * h[i - 1]) / (h[i - 1] + h[i])
        slope[i] = (np.sign(s[i - 1]) + np.sign(s[i])) * min(abs(s[i - 1]), abs(s[i]), abs(p) / 2)
    if tails == "identity":
        slope[0], slope[-1] = min(1, 2 * s[0]), min(1, 2 * s[-1])
    else:
        odds = np.exp(math.log(1e3) * np.tanh(ends[0] / math.log(1e3)))
        slope[0], slope[-1] = np.array([s[0], s[-1]]) * 2 * odds / (1 + odds)
    for k in range(BINS):
        # In powers of x - x_k, as the paper writes it.
        a = (slope[k] + slope[k + 1] - 2 * s[k]) / h[k] ** 2
        b = (3 * s[k] - 2 * slope[k] - slope[k + 1]) / h[k]
        t = np.linspace(0.01, 0.99, 21) * h[k]
        got, log_slope = spline.forward(torch.tensor(x[k] + t), params)
        np.testing.assert_allclose(got, y[k] + t * (slope[k] + t * (b + t * a)), atol=1e-12)
        np.testing.assert_allclose(log_slope.exp(), slope[k] + t * (2 * b + 3 * t * a), rtol=1e-9)


def test_cubic_root_to_the_last_digit():
    """Relative to the distance from the nearer corner, for all slopes that can occur and some that cannot."""
    ends = torch.cat([torch.logspace(-7, 0.3, 25, dtype=torch.float64), torch.tensor([1.0, 1.5, 2.0]).double()])
    eta = torch.cat([torch.logspace(-30, -0.302, 80), torch.linspace(0.001, 0.5, 80)]).double()
    a, b, eta = (part.flatten() for part in torch.meshgrid(ends, ends, eta, indexing="ij"))
    xi, slope = _cubic_root(eta, a, b)
    reached, there = _cubic(xi, a, b)
    assert float(((reached - eta) / eta).abs().max()) < 1e-14
    assert torch.equal(slope, there)
    short, _ = _cubic_root(eta.float(), a.float(), b.float())
    assert float(((short - xi) / xi).abs().max()) < 1e-6


# --- tails -----------------------------------------------------------------------------------------------


@every
@given(seed=seeds)
@few
def test_the_tails_join(spline, seed):
    """The value is continuous at both corners, and so is the slope where the docstring says so."""
    params = raw(spline, 1, 1.0, seed)[0]
    corners = torch.tensor([-BOUND, BOUND], dtype=torch.float64)
    inner, outer = corners * (1 - 1e-12), corners * (1 + 1e-12)
    for direction in (spline.forward, spline.backward):
        (y, log_slope), (beyond, log_beyond), (at, _) = (direction(p, params) for p in (inner, outer, corners))
        assert float((y - corners).abs().max()) < 1e-7
        assert float((beyond - corners).abs().max()) < 1e-8
        assert float((at - corners).abs().max()) < 1e-13
        smooth = not (isinstance(spline, PolynomialSpline) and spline.order == "linear")
        if isinstance(spline, PolynomialSpline) and spline.order == "cubic" and spline.tails == "identity":
            smooth = bool((spline.forward(inner, params)[1] > -1e-3).all())  # starts below a half otherwise
        if smooth:
            assert float((log_slope - log_beyond).abs().max()) < 1e-4


@straight
def test_linear_tails_learn_their_slopes(spline):
    x = torch.tensor([-1e3, 1e3], dtype=torch.float64)
    params = raw(spline, 2, 1.0, seed=1)[:, 0].requires_grad_()
    y, log_slope = spline.forward(x, params)
    assert bool((log_slope != 0).all())
    (grad,) = torch.autograd.grad(y.sum(), params)
    assert bool((grad != 0).any(-1).all())
    assert torch.allclose(spline.backward(y, params)[0], x)


# --- edges -----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_N3_at_knots_bounds_and_beyond(spline, dtype):
    """Finite values and gradients at each knot, at the corners and their neighbours, and with all rows outside."""
    params = raw(spline, 1, 1.0, seed=5, dtype=dtype)[0, 0]
    edges, parts = knots_of(spline, params)
    inner = np.concatenate(
        [edges(part) for part in parts if len(part) == BINS] + [np.linspace(-BOUND, BOUND, BINS + 1)]
    )
    at = torch.tensor(inner, dtype=dtype)
    ends = torch.tensor([-BOUND, BOUND], dtype=dtype)
    points = torch.cat([at, ends, ends * (1 + 2**-23), ends * (1 - 2**-23)])
    up, down = torch.full_like(points, torch.inf), torch.full_like(points, -torch.inf)
    outside = torch.tensor([-1e20, -4.0, 3.5, 1e20], dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for x in (points, torch.nextafter(points, up), torch.nextafter(points, down), outside):
        for there, back in ((spline.forward, spline.backward), (spline.backward, spline.forward)):
            x = x.detach().requires_grad_()
            leaf = params.clone().requires_grad_()
            y, log_slope = there(x, leaf)
            assert bool((y.isfinite() & log_slope.isfinite()).all())
            grads = torch.autograd.grad(y.sum() + log_slope.sum(), (x, leaf))
            assert all(bool(grad.isfinite().all()) for grad in grads)
            again = back(y, leaf)[0]
            slack = tolerance * (1 + x.abs()) * (1 + (-log_slope).exp())
            assert bool(((again - x).abs() <= slack).all())
    if spline.tails == "identity":
        for there in (spline.forward, spline.backward):
            y, log_slope = there(outside, params)
            assert torch.equal(y, outside)
            assert torch.equal(log_slope, torch.zeros_like(outside))


@every
@given(seed=seeds, factor=st.sampled_from([3.0, 10.0, 30.0]))
@few
def test_N4_large_parameters_in_float32(spline, seed, factor):
    """No error, nothing that is not finite, increasing; the round trip holds as far as the slope allows."""
    params = raw(spline, 8, factor, seed, torch.float32)
    x = torch.linspace(-3.5, 3.5, 64).expand(8, -1)
    y, log_slope = spline.forward(x, params)
    back, log_back = spline.backward(y, params)
    again, _ = spline.forward(back, params)
    for value in (y, log_slope, back, log_back):
        assert bool(value.isfinite().all())
    scale = 1 + y.abs() + log_slope.clamp_min(0).exp()
    assert bool((y.diff(dim=-1) >= -4 * BOUND * torch.finfo(torch.float32).eps * scale[:, 1:]).all())
    assert bool(((again - y).abs() <= 1e-4 * scale).all())
    exact, _ = spline.forward(x.double(), params.double())
    assert bool(((y - exact).abs() <= 1e-4 * scale).all())


@every
def test_N5_straight_bins_and_their_ends(spline):
    """Where a bin is a straight line the discriminant is a square, and at its ends it vanishes."""
    params = torch.zeros(BINS + 1, spline.params, dtype=torch.float64)
    y = torch.linspace(-BOUND, BOUND, BINS + 1, dtype=torch.float64).requires_grad_()
    x, log_slope = spline.backward(y, params)
    assert torch.allclose(x, y)
    (grad,) = torch.autograd.grad(x.sum() + log_slope.sum(), y)
    assert bool(grad.isfinite().all())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_N6_masked_rows_do_not_poison_gradients(spline, dtype):
    x = torch.tensor([0.5, 1e20, -1e38, -1e20, 2.9, -BOUND], dtype=dtype)
    for direction in (spline.forward, spline.backward):
        point = x.clone().requires_grad_()
        params = raw(spline, 6, 1.0, dtype=dtype)[:, 0].clone().requires_grad_()
        y, log_slope = direction(point, params)
        grads = torch.autograd.grad(log_slope.sum() + y[[0, 4, 5]].sum(), (point, params))
        assert all(bool(grad.isfinite().all()) for grad in grads)
        alone = params.detach()[:1].clone().requires_grad_()
        one, log_one = direction(x[:1], alone)
        (want,) = torch.autograd.grad(log_one.sum() + one.sum(), alone)
        assert torch.allclose(grads[1][:1], want)


@every
def test_half_precision_is_computed_in_float32(spline):
    params = raw(spline, 50, 1.0, dtype=torch.bfloat16)[:, 0]
    x = torch.linspace(-4, 4, 50, dtype=torch.bfloat16)
    y, log_slope = spline.forward(x, params)
    exact, log_exact = spline.forward(x.float(), params.float())
    assert y.dtype == torch.bfloat16
    assert log_slope.dtype == torch.float32
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(log_slope, log_exact)


# --- in use ----------------------------------------------------------------------------------------------


@polynomial
@pytest.mark.parametrize("tails", ["identity", "linear"])
def test_maps_by_name(order, tails):
    layer = coupling(3, "polynomial_spline", bins=4, order=order, tails=tails, hidden_dims=(8,))
    x = torch.randn(5, 3)
    y, log_det = layer.forward_and_log_det(x)
    assert log_det.shape == (5,)
    assert torch.allclose(layer.inv(y.detach()), x, atol=1e-5)


def test_numbers_of_parameters():
    """Those of the papers; the quadratic orders need no number for what the corners decide."""
    counts = {
        ("polynomial_spline", "linear"): (8, 10),
        ("polynomial_spline", "quadratic"): (8 + 7, 8 + 9),
        ("polynomial_spline", "cubic"): (8 + 8, 8 + 8 + 2),
        ("rational_spline", "quadratic"): (8 + 8 + 7, 8 + 8 + 9),
        ("rational_spline", "linear"): (8 + 8 + 7 + 8, 8 + 8 + 9 + 8),
    }
    for (name, order), (identity, linear) in counts.items():
        assert univariate_map(name, order=order).params == identity
        assert univariate_map(name, order=order, tails="linear").params == linear
    assert CircularSpline(8).params == 8 + 8 + 8 + 1


@polynomial
def test_a_spline_learns_the_quantiles_of_a_bimodal_density(order):
    """Against the truth: two narrow normals at -1.5 and 1.5, whose entropy a normal misses by half a nat."""
    noise = torch.randn(2000, 1)
    x = torch.where(torch.rand(2000, 1) < 0.5, -1.5, 1.5) + 0.3 * noise
    bins = 24 if order == "linear" else 12  # a histogram needs more of them
    layer = elementwise(1, "polynomial_spline", bins=bins, bound=4.0, order=order, tails="linear")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    base = torch.distributions.Normal(0.0, 1.0)
    for _ in range(80):
        z, log_det = layer.forward_and_log_det(x)  # the direction in which the linear order can be fitted
        loss = -(base.log_prob(z).sum(-1) + log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e) + math.log(2)
    loss = float(loss.detach())
    assert abs(loss - entropy) < 0.12
    normal = float(x.std().log()) + 0.5 * math.log(2 * math.pi * math.e)
    assert loss < normal - 0.4


@pytest.mark.parametrize(
    "options",
    [
        {"bins": 1},
        {"bins": 501},
        {"bins": 4.0},
        {"bound": 0.0},
        {"bound": math.inf},
        {"bound": math.nan},
        {"order": "rational"},
        {"tails": "zero"},
    ],
)
@pytest.mark.parametrize("kind", [RationalSpline, PolynomialSpline])
def test_options_are_checked(kind, options):
    with pytest.raises(OptionError):
        kind(**options)
    if "order" not in options and "tails" not in options and "bound" not in options:
        with pytest.raises(OptionError):
            CircularSpline(**options)


def test_kernels_broadcast():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    one = torch.randn(8, dtype=torch.float64)
    for f in (
        lambda v: piecewise_linear(v, one, one[:2], bound=2.0),
        lambda v: piecewise_quadratic(v, one, one[1:], bound=2.0),
        lambda v: piecewise_cubic(v, one, one.flip(0), bound=2.0),
    ):
        y, log_slope = f(x)
        assert y.shape == log_slope.shape == x.shape
        assert torch.equal(f(x[2, 1:2])[0], y[2, 1:2])


@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives_where_the_parameters_depend_on_the_point(inverse, monkeypatch):
    torch.manual_seed(0)
    x = (6 * torch.randn(20, dtype=torch.float64)).requires_grad_()
    matrix = torch.randn(1, 23, dtype=torch.float64, requires_grad=True)

    def derivatives():
        raw = torch.tanh(x.unsqueeze(-1) @ matrix)
        y, log_slope = rational_quadratic(x, *raw.split([8, 8, 7], -1), bound=5.0, inverse=inverse)
        first = torch.autograd.grad(y.sin().sum() + log_slope.square().sum(), [x, matrix], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, matrix])]

    written = derivatives()
    monkeypatch.setattr("pyroflows.numerics.splines.is_plainly_eager", lambda: False)
    for found, expected in zip(written, derivatives(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))
