"""Maps that increase by their making: their values from elsewhere, the whole line, second derivatives, options."""

import numpy as np
import pytest
import torch
from scipy import integrate, interpolate, stats

import pyroflows as pf
from pyroflows.errors import OptionError
from pyroflows.numerics import (
    elu_mean,
    gauss_legendre,
    leaky_relu_mean,
    logistic_mean,
    monotone_root,
    normal_mean,
    powers,
)
from pyroflows.transforms import (
    Autoregressive,
    Bernstein,
    Coupling,
    DeepSigmoid,
    DenseSigmoid,
    Elementwise,
    Gaussianization,
    LogisticMixture,
    SumOfSquares,
    UnconstrainedMonotonic,
    VolumePreserving,
    conditional_neural_autoregressive,
    conditional_polynomial,
    neural_autoregressive,
    polynomial,
    univariate_map,
)

MAPS = {
    "sigmoid": DeepSigmoid(6),
    "tanh": DeepSigmoid(6, "tanh"),
    "ELU": DeepSigmoid(6, "ELU"),
    "LeakyReLU": DeepSigmoid(6, "LeakyReLU"),
    "two layers": DeepSigmoid(4, depth=2),
    "dense": DenseSigmoid(3, depth=3),
    "logistic_mixture": LogisticMixture(4),
    "gaussianization": Gaussianization(4),
    "unconstrained_monotonic": UnconstrainedMonotonic(4),
    "sum_of_squares": SumOfSquares(3, 2),
    "bernstein": Bernstein(7),
    "volume_preserving": VolumePreserving(),
}
SMOOTH = sorted(set(MAPS) - {"ELU", "LeakyReLU"})  # a kink has no second derivative
every_map = pytest.mark.parametrize("name", sorted(MAPS))


def drawn(name, *shape, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return scale * torch.randn(*shape, MAPS[name].params, generator=generator, dtype=torch.float64).to(dtype)


def slopes(f, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    return slope


# --- the whole real line ---------------------------------------------------------------------------------


@every_map
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_D15_N22_the_inverse_is_right_however_far_out(name, dtype):
    map, raw = MAPS[name], drawn(name, 16, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for reach in (1.0, 3.0, 30.0, 300.0, 1e6, 1e12, 1e20):
        y = reach * torch.linspace(-1, 1, 16, dtype=dtype)
        x, log_slope = map.backward(y, raw)
        again, back = map.forward(x, raw)
        # What one rounding of x does to y is the slope times x.
        room = 200 * eps * (1 + y.abs() + torch.exp(back) * (1 + x.abs()))
        assert bool(((again - y).abs() <= room).all())
        assert torch.allclose(log_slope, -back, atol=1e-9 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("recipe", ["naf", "unaf", "sospf", "bpf", "gaussianization"])
def test_N22_samples_of_far_base_points_are_finite_and_score_back(recipe):
    flow = pf.flow(recipe, input_dim=2, transforms=2, hidden_dims=(16,)).double()
    transform = flow.transform
    for reach in (1.0, 1e2, 1e6):
        x = reach * torch.tensor([[1.0, -1.0], [-1.0, 0.5], [0.3, 1.0]], dtype=torch.float64)
        y, _ = transform.forward_and_log_det(x)
        assert bool(y.isfinite().all())
        assert torch.allclose(transform.inverse_and_log_det(y)[0], x, rtol=1e-10, atol=1e-10)
        assert float(y.detach().abs().max()) > 0.2 * reach


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "ELU", "LeakyReLU"])
def test_D12_far_out_a_deep_sigmoid_is_a_line_without_an_epsilon(activation):
    map = DeepSigmoid(3, activation)
    raw = torch.zeros(map.params, dtype=torch.float64)
    raw[:3] = torch.tensor([-1.0, 0.0, 1.0])
    x = torch.tensor([-1e38, -1e20, 1e20, 1e38], dtype=torch.float64)
    y, log_slope = map.forward(x, raw)
    a = map._layers(raw)[0][0]
    far = a.mean() if activation in ("LeakyReLU", "ELU") else a.min()
    right = far if activation != "ELU" else a.mean()
    left = a.min() if activation == "ELU" else far
    want = torch.stack([left, left, right, right])
    assert torch.allclose(log_slope, torch.log(want), atol=1e-12)
    assert torch.allclose(y / x, want, rtol=1e-12)


def test_D12_a_tiny_slope_is_not_covered_by_an_epsilon():
    """Two narrow steps far apart: in between the slope is 1e-40 or so, where an epsilon of 1e-8 would say 1e-8."""
    c = torch.tensor([100.0, -100.0], dtype=torch.float64)
    w = torch.tensor([0.5, 0.5], dtype=torch.float64)
    y, log_slope = logistic_mean(c, w, torch.ones(2, dtype=torch.float64))
    assert abs(float(y)) < 1e-14
    assert abs(float(log_slope) - (-100 + np.log(4))) < 1e-10  # F' / (F (1 - F)) = e^-100 / (1 / 4)


@every_map
def test_N20_pre_activations_of_200_leave_a_positive_finite_slope(name):
    map = MAPS[name]
    signs = torch.sign(drawn(name, 32))
    for dtype in (torch.float32, torch.float64):
        for raw in (200.0 * signs, 200.0 * torch.ones_like(signs), -200.0 * torch.ones_like(signs)):
            x = torch.linspace(-3, 3, 32, dtype=dtype)
            y, log_slope = map.forward(x, raw.to(dtype))
            assert bool(y.isfinite().all())
            assert bool(log_slope.isfinite().all())
            assert log_slope.dtype == dtype


@every_map
def test_zero_parameters_are_near_the_identity(name):
    map = MAPS[name]
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    y, log_slope = map.forward(x, torch.zeros(41, map.params, dtype=torch.float64))
    assert float(log_slope.abs().mean()) < 0.25
    assert float((y - x).abs().max()) < 0.5


@every_map
def test_the_log_slope_is_that_of_the_map(name):
    map, raw = MAPS[name], drawn(name, 60)
    x = torch.linspace(-8, 8, 60, dtype=torch.float64)
    slope = slopes(lambda x: map.forward(x, raw)[0], x)
    assert torch.allclose(torch.log(slope), map.forward(x, raw)[1], atol=1e-9)


# --- values from elsewhere -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_logistic_mean_in_half_precision(dtype):
    torch.manual_seed(0)
    c, w, v = torch.randn(20, 5) * 3, torch.softmax(torch.randn(20, 5), -1), torch.rand(20, 5) + 0.5
    halves = [t.to(dtype).requires_grad_() for t in (c, w, v)]
    sum(t.sum() for t in logistic_mean(*halves)).backward()
    exact = [t.detach().double().requires_grad_() for t in halves]
    sum(t.sum() for t in logistic_mean(*exact)).backward()
    for found, expected in (
        *zip(logistic_mean(*halves), logistic_mean(*exact), strict=True),
        (halves[0].grad, exact[0].grad),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=20 * torch.finfo(dtype).eps, atol=0.03)


def test_a_logistic_mean_is_the_logit_of_the_mixture():
    a, b, x = np.array([0.5, 1.0, 3.0]), np.array([-1.0, 0.3, 2.0]), np.linspace(-4, 4, 9)[:, None]
    w = np.array([0.2, 0.5, 0.3])
    mixture = (w / (1 + np.exp(-(a * x + b)))).sum(-1)
    y, log_slope = logistic_mean(torch.tensor(a * x + b), torch.tensor(w), torch.tensor(a))
    assert np.allclose(y, np.log(mixture / (1 - mixture)), atol=1e-12)
    density = (w * a / (1 + np.exp(-(a * x + b))) / (1 + np.exp(a * x + b))).sum(-1)
    assert np.allclose(log_slope, np.log(density / mixture / (1 - mixture)), atol=1e-12)


def test_a_normal_mean_is_the_quantile_of_the_mixture():
    a, b, x = np.array([0.5, 1.0, 3.0]), np.array([-1.0, 0.3, 2.0]), np.linspace(-4, 4, 9)[:, None]
    w = np.array([0.2, 0.5, 0.3])
    lower, upper = (w * stats.norm.cdf(a * x + b)).sum(-1), (w * stats.norm.sf(a * x + b)).sum(-1)
    want = np.where(lower < upper, stats.norm.ppf(lower), stats.norm.isf(upper))
    y, log_slope = normal_mean(torch.tensor(a * x + b), torch.tensor(w), torch.tensor(a))
    assert np.allclose(y, want, atol=1e-12)
    slope = (w * a * stats.norm.pdf(a * x + b)).sum(-1) / stats.norm.pdf(want)
    assert np.allclose(log_slope, np.log(slope), atol=1e-11)


def test_D15_far_out_a_normal_mean_is_its_widest_component():
    w = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for t in (1e3, 1e6, 1e12):
        y, log_slope = normal_mean(torch.tensor([t, 2 * t], dtype=torch.float64), w, torch.ones(2))
        # The tail beyond y is a quarter of the tail beyond t.
        assert float(y) == pytest.approx(np.hypot(t, np.sqrt(-2 * np.log(0.25))), abs=10 / t**3, rel=1e-14)
        assert abs(float(log_slope)) < 2 / t


def test_elu_and_leaky_means_are_what_they_say():
    c, w = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(4, 3), torch.tensor([0.2, 0.5, 0.3]).double()
    psi = (w * torch.nn.functional.elu(c)).sum(-1)
    want = torch.where(psi > 0, psi, torch.log1p(psi.clamp(max=0)))
    assert torch.allclose(elu_mean(c, w, torch.ones(3).double())[0], want, atol=1e-13)
    psi = (w * torch.nn.functional.leaky_relu(c)).sum(-1)
    want = torch.where(psi > 0, psi, 100 * psi)
    assert torch.allclose(leaky_relu_mean(c, w, torch.ones(3).double())[0], want, atol=1e-13)


def test_tanh_is_the_sigmoid_at_twice_the_scale():
    map, raw = MAPS["tanh"], drawn("tanh", 9)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    a, b, w = map._layers(raw)[0]
    want = torch.atanh((w * torch.tanh(a * x.unsqueeze(-1) + b)).sum(-1))
    assert torch.allclose(map.forward(x, raw)[0], want, atol=1e-12)


def test_a_dense_sigmoid_is_its_matrices():
    """The layers by hand, with plain sigmoids and logits, and the slope by autograd."""
    map, raw = DenseSigmoid(3, depth=2), torch.randn(33, generator=torch.Generator().manual_seed(2)).double()
    assert map.params == 33

    def rows(logits):
        return (1 - 1e-6) * torch.softmax(logits, -1) + 1e-6 / logits.shape[-1]

    def steep(raw):
        return map.slope * (1e-3 + torch.nn.functional.softplus(raw + np.log(np.expm1(0.999))))

    def near(raw):
        return 10 * torch.tanh(raw / 10)

    offsets, leans = (torch.tensor(part, dtype=torch.float64) for part in (map.offsets, map.leans))
    a1, b1, w1, a2, b2, u2, w2 = raw.split([3, 3, 9, 3, 3, 9, 3], -1)

    def by_hand(x):
        hidden = torch.logit(rows((w1 + leans).reshape(3, 3)) @ torch.sigmoid(steep(a1) * x + offsets + near(b1)))
        return torch.logit(rows(w2) @ torch.sigmoid(steep(a2) * (rows(u2.reshape(3, 3)) @ hidden) + offsets + near(b2)))

    for x in torch.tensor([-2.0, 0.3, 1.7]).double():
        y, log_slope = map.forward(x, raw)
        assert float((y - by_hand(x)).abs()) < 1e-12
        assert float((log_slope - torch.log(torch.autograd.functional.jacobian(by_hand, x))).abs()) < 1e-12


def test_a_flow_of_dense_sigmoids():
    flow = pf.flow("naf", input_dim=2, transforms=2, hidden_dims=(16,), hidden_units=4, depth=2, dense=True).double()
    assert isinstance(next(layer.map for layer in flow.modules() if hasattr(layer, "map")), DenseSigmoid)
    x = 30 * torch.tensor([[1.0, -1.0], [-0.1, 0.5]], dtype=torch.float64)
    y, log_det = flow.transform.forward_and_log_det(x)
    back, opposite = flow.transform.inverse_and_log_det(y.detach().clone())
    assert torch.allclose(back, x, atol=1e-10)
    assert torch.allclose(opposite, -log_det, atol=1e-10)
    with pytest.raises(OptionError, match="tanh"):
        pf.flow("naf", input_dim=2, unit="tanh", dense=True)


def test_a_dense_sigmoid_of_one_layer_is_a_deep_one():
    raw = drawn("sigmoid", 9)
    x = torch.linspace(-30, 30, 9, dtype=torch.float64)
    raw[:, 6:12] *= 30
    for one, other in zip(DenseSigmoid(6, depth=1).forward(x, raw), DeepSigmoid(6).forward(x, raw), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "dense", "logistic_mixture"])
def test_autocast_changes_no_digit(name):
    map, raw = MAPS[name], drawn(name, 5, dtype=torch.float32)
    x = torch.linspace(-3, 3, 5)
    want = map.forward(x, raw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = map.forward(x, raw)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_far_out_the_fast_formula_is_the_one_of_logarithms():
    """What is recorded for a second derivative is computed by logarithms; both agree at every distance."""
    map = DeepSigmoid(16)
    for dtype, room in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for reach in (1.0, 30.0, 60.0, 90.0, 300.0, 1e6, 1e20):
            raw = torch.randn(200, map.params, generator=torch.Generator().manual_seed(1)).to(dtype)
            x = (reach * torch.linspace(-1, 1, 200)).to(dtype)
            fast = map.forward(x, raw)
            slow = torch.func.vmap(map.forward)(x.double(), raw.double())
            for got, want in zip(fast, slow, strict=True):
                assert bool(((got - want).abs() <= room * (1 + want.abs())).all())


def test_a_single_term_is_affine():
    for map in (DeepSigmoid(1), DeepSigmoid(1, "tanh"), DeepSigmoid(1, "ELU"), Gaussianization(1)):
        x = torch.linspace(-50, 50, 11, dtype=torch.float64)
        y, log_slope = map.forward(x, torch.tensor([0.7, -0.4, 2.0]).double().expand(11, -1))
        assert torch.allclose(y, torch.exp(log_slope) * x - 0.4, atol=1e-11)


def test_the_integral_is_that_of_the_integrand_to_the_stated_error():
    map = MAPS["unconstrained_monotonic"]
    for seed, scale in ((0, 1.0), (1, 3.0), (2, 200.0)):
        raw = scale * torch.randn(map.params, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for x in (-9.0, -5.0, -1.3, 2.2, 5.0, 7.0):

            def g(u, raw=raw):
                return float(torch.exp(map.forward(torch.tensor(u, dtype=torch.float64), raw)[1]))

            points = sorted({0.0, float(np.clip(x, -5, 5))})
            want, doubt = integrate.quad(g, 0.0, x, epsabs=1e-12, epsrel=1e-12, points=points, limit=200)
            zero = map.forward(torch.zeros((), dtype=torch.float64), raw)[0]
            got = map.forward(torch.tensor(x, dtype=torch.float64), raw)[0] - zero
            assert float(got) == pytest.approx(want, rel=2e-10, abs=max(1e-10, doubt))
            single = map.forward(torch.tensor(x), raw.float())[0] - zero.float()
            assert float(single) == pytest.approx(want, rel=2e-5, abs=2e-5)


def test_the_sum_of_squares_is_the_integrated_polynomial():
    map, raw = MAPS["sum_of_squares"], drawn("sum_of_squares", 1)[0]
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    rows = (raw[1:] + torch.tensor(map.start, dtype=torch.float64)).reshape(2, 4).numpy()
    square = sum(np.polynomial.Polynomial(row) ** 2 for row in rows) + 1e-3
    want = 5 * square.integ()(x.numpy() / 5) + float(raw[0])
    y, log_slope = map.forward(x, raw.expand(11, -1))
    assert np.allclose(y, want, atol=1e-12)
    assert np.allclose(log_slope, np.log(square(x.numpy() / 5)), atol=1e-12)


def test_the_bernstein_polynomial_is_scipys():
    map, raw = MAPS["bernstein"], drawn("bernstein", 1)[0]
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    # Read the coefficients off the values: a polynomial of degree 7 through 8 points.
    grid = np.linspace(0, 1, 8)
    basis = np.stack([interpolate.BPoly(np.eye(8)[:, k : k + 1], [0, 1])(grid) for k in range(8)], -1)
    values = map.forward(torch.tensor(10 * grid - 5), raw.expand(8, -1))[0].numpy()
    knots = np.linalg.solve(basis, values)
    assert (np.diff(knots) > 0).all()
    assert np.diff(knots).min() >= 10 / 7 * 1e-3
    assert abs(knots[0] + knots[-1] - 2 * float(raw[0])) < 1e-10  # the shift is in the middle
    curve = interpolate.BPoly(knots[:, None], [-5, 5])
    y, log_slope = map.forward(x, raw.expand(11, -1))
    assert np.allclose(y, curve(x.numpy()), atol=1e-10)
    assert np.allclose(torch.exp(log_slope), curve.derivative()(x.numpy()), atol=1e-10)


def test_gauss_legendre_is_exact_to_its_degree_and_no_further():
    x = torch.tensor(1.7, dtype=torch.float64)
    nodes, weights = (x.new_tensor(part) for part in gauss_legendre(3))
    table = powers(x * nodes, 6)
    integrals = x * (weights.unsqueeze(-1) * table).sum(0)
    want = x ** torch.arange(1, 8) / torch.arange(1, 8)
    assert torch.allclose(integrals[:6], want[:6], rtol=1e-14)
    assert abs(float(integrals[6] - want[6])) > 1e-3


# --- derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_D16_second_derivatives_of_both_directions(name):
    map, raw = MAPS[name], drawn(name, 2, scale=0.7).requires_grad_()
    point = torch.tensor([0.4, -1.7], dtype=torch.float64, requires_grad=True)
    for direction in (map.forward, map.backward):
        assert torch.autograd.gradcheck(direction, (point, raw), atol=1e-6, fast_mode=True)
        # The score of a density: derivatives of derivatives with respect to the point.
        assert torch.autograd.gradgradcheck(direction, (point, raw), atol=1e-5, fast_mode=True)


@every_map
def test_gradients_far_out_are_finite(name):
    map, raw = MAPS[name], drawn(name, 6, dtype=torch.float32).requires_grad_()
    x = torch.tensor([0.0, 1e-40, 1e20, -1e20, 1e30, -1e30], requires_grad=True)
    for part in map.forward(x, raw):
        grads = torch.autograd.grad(part.sum(), (x, raw), retain_graph=True, allow_unused=True)
        assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)


# --- searches --------------------------------------------------------------------------------------------


def test_a_bracket_and_a_start_save_steps():
    y = torch.linspace(-30, 30, 50, dtype=torch.float64)

    def f(x):
        return torch.sinh(x), torch.log(torch.cosh(x))

    free = monotone_root(f, y)
    near = torch.asinh(y)
    tight = monotone_root(f, y, start=near, bracket=(near - 1e-3, near + 1e-3))
    assert torch.allclose(free.x, near, atol=1e-12)
    assert torch.allclose(tight.x, near, atol=1e-12)
    assert tight.steps < free.steps


def test_a_nan_beside_a_bracket_stays_alone():
    layer = Elementwise(DeepSigmoid(4), 2)
    y = torch.tensor([[0.5, 1.0], [torch.nan, 1.0], [torch.inf, -2.0]])
    x = layer.inv(y)
    assert torch.allclose(x[0], layer.inv(y[:1])[0])
    assert bool(x[1, 0].isnan())
    assert bool(x[:, 1].isfinite().all())


# --- options and names -----------------------------------------------------------------------------------


def test_volume_is_preserved_and_order_matters():
    layer = Coupling(VolumePreserving(), 6).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.forward_and_log_det(x)[0], x[0])
    log_det, y = log_det.detach(), y.detach()
    assert float(log_det.abs().max()) < 1e-14
    assert abs(float(torch.linalg.slogdet(jacobian)[1])) < 1e-14
    assert float((y - x).abs().max()) > 1e-3
    with pytest.raises(OptionError, match="one at a time"):
        Autoregressive(VolumePreserving(), 6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deep_sigmoid", {"activation": "relu"}),
        ("deep_sigmoid", {"hidden_units": 0}),
        ("deep_sigmoid", {"depth": 0}),
        ("dense_sigmoid", {"hidden_units": 0}),
        ("dense_sigmoid", {"depth": 1.5}),
        ("logistic_mixture", {"components": 1.5}),
        ("gaussianization", {"components": -1}),
        ("unconstrained_monotonic", {"hidden_units": 0}),
        ("unconstrained_monotonic", {"bound": 6.0}),
        ("unconstrained_monotonic", {"bound": 0.0}),
        ("sum_of_squares", {"degree": -1}),
        ("sum_of_squares", {"sums": 0}),
        ("sum_of_squares", {"bound": float("inf")}),
        ("bernstein", {"degree": 101}),
        ("bernstein", {"bound": -1.0}),
        ("volume_preserving", {"max_log_scale": 0.0}),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options):
    with pytest.raises(OptionError):
        univariate_map(name, **options)


@pytest.mark.parametrize("activation", ["ELU", "LeakyReLU", "sigmoid", "tanh"])
def test_neural_autoregressive_as_pyro_calls_it(activation):
    layer = neural_autoregressive(4, [20], activation, 8).double()
    x = torch.randn(4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x.clone()), x)
    assert bool((jacobian.triu(1) == 0).all())
    assert bool((jacobian.diagonal() > 0).all())
    assert torch.allclose(layer.inv(layer(x).detach().clone()), x, atol=1e-10)
    assert neural_autoregressive(4).net.layers[0].weight.shape[0] == 13


def test_conditional_helpers_take_pyros_positions():
    context = torch.randn(5, 2)
    for layer in (
        conditional_neural_autoregressive(3, 2, [20], "tanh", 8),
        conditional_polynomial(3, 2, [20], count_degree=2, count_sum=2),
    ):
        at = layer.condition(context)
        assert at.inv(at(torch.zeros(5, 3)).detach().clone()).abs().max() < 1e-5
    assert polynomial(3, count_degree=2, count_sum=5).map.params == 16


def test_D15_samples_of_a_gaussianization_flow_follow_its_density():
    flow = pf.flow("gaussianization", input_dim=1, transforms=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))
    y = torch.linspace(-100, 100, 200001).unsqueeze(-1)
    with torch.no_grad():
        density = torch.exp(flow().log_prob(y))
        samples = flow().sample((4000,)).squeeze(-1)
    step = float(y[1, 0] - y[0, 0])
    cdf = density.double().cumsum(0) * step
    assert float(cdf[-1]) == pytest.approx(1, abs=1e-3)
    rank = np.interp(samples.numpy(), y.squeeze(-1).numpy(), cdf.numpy())
    assert stats.kstest(rank, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("map", [DeepSigmoid(4), DenseSigmoid(4)])
def test_results_may_be_written_into(map):
    for rows in (5, 1):
        y, log_slope = map.forward(torch.randn(rows, 2, requires_grad=True), torch.randn(rows, 2, map.params))
        y.add_(1.0).sum().backward(retain_graph=True)
        log_slope.add_(1.0).sum().backward()
