"""Elementwise maps, tails and supports: values derived another way, limits, and listed defects that are absent."""

import math

import pyro.distributions.transforms as theirs
import pytest
import scipy.stats
import torch
from pyro.distributions import constraints
from scipy.special import erfc
from torch.autograd.functional import jacobian

import pyroflows as pf
import pyroflows.transforms as T
from pyroflows.distributions.support import as_constraint, describe, restore
from pyroflows.errors import OptionError, ShapeError


def numbers(*shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- what Pyro and torch have ----------------------------------------------------------------------------


def test_every_parameter_free_transform_of_pyro_is_here():
    for name in theirs.__all__:
        if name.endswith("Transform") or name in ("LowerCholeskyAffine", "Normalize", "Permute", "identity_transform"):
            assert hasattr(T, name), name


TRANSFORMS = {
    "elu": lambda d: T.elu(),
    "leaky_relu": lambda d: T.leaky_relu(),
    "tanh": lambda d: T.tanh(),
    "discrete_cosine": lambda d: T.DiscreteCosineTransform(),
    "discrete_cosine_smooth": lambda d: T.DiscreteCosineTransform(smooth=1.0),
    "haar": lambda d: T.HaarTransform(),
    "haar_flip": lambda d: T.HaarTransform(flip=True),
    "cholesky_affine": lambda d: T.LowerCholeskyAffine(numbers(d), numbers(d, d).tril(-1) + 2 * torch.eye(d).double()),
    "ordered": lambda d: T.OrderedTransform(),
    "power": lambda d: T.PositivePowerTransform(torch.tensor(1.7).double()),
}


@pytest.mark.parametrize("d", [2, 5, 8])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_pyro_tests_them(name, d):
    t, x = TRANSFORMS[name](d), numbers(d)
    y = t._call(x)
    torch.testing.assert_close(t._inverse(y), x, rtol=1e-9, atol=1e-9)
    found = t.log_abs_det_jacobian(x, y)
    want = torch.linalg.slogdet(jacobian(t._call, x))[1]
    torch.testing.assert_close(found.sum(), want, rtol=1e-9, atol=1e-9)
    assert t.with_cache(1)(x).shape == t.forward_shape((d,))


def test_normalize_leads_to_the_sphere():
    assert not T.Normalize().bijective
    torch.testing.assert_close(T.Normalize(p=1)(numbers(4, 3)).abs().sum(-1), torch.ones(4).double())


def test_d24_elu_has_its_codomain_and_no_epsilon():
    t, x = T.elu(), torch.tensor([-15.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    y = t(x)
    assert t.codomain.check(y).all()
    assert not t.codomain.check(torch.tensor(-1.5))
    torch.testing.assert_close(t.inv(y), x, rtol=1e-8, atol=1e-12)
    assert (theirs.ELUTransform().inv(y) - x).abs().max() > 1e-3  # what an epsilon of 1e-8 does there


def test_d24_a_batch_of_matrices():
    scale = numbers(6, 3, 3).tril(-1) + 2 * torch.eye(3).double()
    t, x = T.LowerCholeskyAffine(numbers(6, 3), scale), numbers(4, 1, 3)
    y = t(x)
    assert y.shape == t.forward_shape(x.shape) == (4, 6, 3)
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), torch.linalg.slogdet(scale)[1].expand(4, 6))
    torch.testing.assert_close(t.inv(y), x.expand(4, 6, 3))
    with pytest.raises(ShapeError):
        T.LowerCholeskyAffine(torch.zeros(2), torch.eye(3))


def test_d24_simplex_to_ordered_with_an_anchor():
    t, free = T.SimplexToOrderedTransform(torch.tensor(1.5).double()), numbers(2)
    x = torch.softmax(torch.cat([free, torch.zeros(1).double()]), -1)
    y = t(x)
    assert t.bijective
    torch.testing.assert_close(t.inv(y), x)
    square = jacobian(lambda head: t(torch.cat([head, 1 - head.sum(-1, keepdim=True)])), x[:-1])
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), torch.linalg.slogdet(square)[1])
    assert T.SimplexToOrderedTransform() == T.SimplexToOrderedTransform()


def test_a_cosine_transform_follows_the_dtype():
    t = T.DiscreteCosineTransform(smooth=1.0)
    t(torch.ones(5))
    x = numbers(5)
    assert torch.linalg.slogdet(jacobian(t._call, x))[1].abs() < 1e-12


def test_power_at_zero():
    for exponent, want in ((1.0, 0.0), (2.0, -math.inf), (0.5, math.inf)):
        t = T.PositivePowerTransform(exponent)
        assert t.log_abs_det_jacobian(torch.zeros(1), torch.zeros(1)).item() == want


def test_iterated_is_a_layer_that_trains_on_one_tensor():
    """D3: in Pyro, a second backward on the same data raises."""
    stack = T.iterated(3, T.affine_autoregressive, 2)
    d = torch.distributions.TransformedDistribution(torch.distributions.Normal(torch.zeros(2), 1.0), [stack])
    data = torch.randn(20, 2)
    for _ in range(3):
        d.log_prob(data).sum().backward()
    assert len(list(stack.parameters())) == 3 * len(list(stack[0].parameters()))
    with pytest.raises(OptionError):
        T.iterated(0, T.planar, 2)


def test_vector_to_cholesky():
    t, x = T.VectorToCholesky(), numbers(5, 6)
    y = t(x)
    assert constraints.lower_cholesky.check(y).all()
    torch.testing.assert_close(t.inv(y), x)
    rows, columns = torch.tril_indices(3, 3)
    full = jacobian(lambda v: t(v)[rows, columns], x[0])
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y)[0], torch.linalg.slogdet(full)[1])
    for bad in (torch.zeros(4), torch.zeros(5)):
        with pytest.raises(ShapeError):
            t(bad)


# --- tails -----------------------------------------------------------------------------------------------

MAPS = {"sinh_arcsinh": T.SinhArcsinh(), "tail": T.TailTransform(), "soft_log": T.SoftLog()}


def test_sinh_arcsinh_is_jones_and_pewseys():
    """Values by the math module, and the density that follows from Phi(sinh((arcsinh y - eps) / delta))."""
    map, raw = T.SinhArcsinh(), torch.tensor([0.6, -0.4], dtype=torch.float64)
    x = numbers(50)
    y, log_slope = map.forward(x, raw.expand(50, 2))
    skew, power = 4 * math.tanh(0.6 / 4), math.exp(1.5 * math.tanh(-0.4 / 1.5))
    torch.testing.assert_close(torch.tensor([math.sinh(power * math.asinh(v) + skew) for v in x.tolist()]).double(), y)
    density = scipy.stats.norm.logpdf(x.numpy()) - log_slope.numpy()
    u = (torch.asinh(y).numpy() - skew) / power
    want = scipy.stats.norm.logpdf(torch.sinh(torch.tensor(u)).numpy())
    slope = torch.cosh(torch.tensor(u)) / power / torch.sqrt(1 + y**2)
    torch.testing.assert_close(torch.tensor(density), torch.tensor(want) + slope.log())


def test_tail_transform_without_a_threshold_is_that_of_the_paper():
    map, weight = T.TailTransform(threshold=0.0), 0.1
    z = torch.tensor([-6.0, -1.0, 0.5, 3.0, 7.0], dtype=torch.float64)
    y, _ = map.forward(z, torch.zeros(5, 2).double())
    tail = torch.from_numpy(erfc(z.abs().numpy() / math.sqrt(2)))
    size = math.sqrt(math.pi / 2) * (tail.pow(-weight) - 1) / weight
    torch.testing.assert_close(y, z.sign() * size)


def test_tail_transform_makes_pareto_tails():
    """P(Y > y) is generalised Pareto beyond the threshold, on each side with its own weight."""
    raw = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([1e6, 1e8, -100.0, -1000.0], dtype=torch.float64)
    x, _ = T.TailTransform().backward(y, raw.expand(4, 2))
    log_tail = scipy.stats.norm.logsf(x.abs().numpy())
    hazard = scipy.stats.norm.pdf(2) / scipy.stats.norm.sf(2)
    for part, parameter in ((slice(0, 2), 2.0), (slice(2, 4), -1.0)):
        weight = 0.1 * math.exp(3 * math.tanh(parameter / 3))
        want = scipy.stats.genpareto.logsf(y[part].abs().numpy() - 2, weight, scale=1 / hazard)
        assert log_tail[part] - scipy.stats.norm.logsf(2) == pytest.approx(want, rel=1e-9)


def test_tail_transform_far_out_in_both_precisions():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        z = torch.tensor([1e-30, 1.999, 2.0, 2.001, 8.0, 12.0], dtype=dtype)
        y, log_slope = T.TailTransform().forward(z, torch.zeros(6, 2, dtype=dtype))
        x, back = T.TailTransform().backward(y, torch.zeros(6, 2, dtype=dtype))
        torch.testing.assert_close(x, z, rtol=tolerance, atol=0)
        torch.testing.assert_close(back, -log_slope, rtol=10 * tolerance, atol=10 * tolerance)


def test_soft_log_values():
    y, log_slope = T.SoftLog().forward(torch.tensor([2.0, -4.0, 1e6]).double(), torch.zeros(3, 2).double())
    torch.testing.assert_close(y, torch.tensor([2.0, -3 - math.log(2), 3 + math.log(1e6 - 2)]).double())
    torch.testing.assert_close(log_slope, -torch.tensor([0.0, math.log(2), math.log(1e6 - 2)]).double())


@pytest.mark.parametrize("name", MAPS)
def test_tails_have_no_kink_and_reach_every_number(name):
    map = MAPS[name]
    raw = numbers(1, 2)
    for edge in (0.0, 2.0, 25.0, float(map._read(raw)[0]) if name == "soft_log" else 1.0):
        near = torch.tensor([edge - 1e-7, edge + 1e-7], dtype=torch.float64)
        y, log_slope = map.forward(near, raw.expand(2, 2))
        assert (log_slope[1] - log_slope[0]).abs() < 1e-4
        assert ((y[1] - y[0]) / 2e-7).log() == pytest.approx(log_slope[0].item(), abs=1e-4)
    far = torch.tensor([1e20, -1e20], dtype=torch.float64)
    for direction in (map.forward, map.backward):
        image, log_slope = direction(far, raw.expand(2, 2))
        assert image.isfinite().all()
        assert log_slope.isfinite().all()


def test_second_derivatives_at_zero():
    for map in MAPS.values():
        for direction in (map.forward, map.backward):
            x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(direction(x, torch.zeros(1, 2).double())[0].sum(), x, create_graph=True)
            torch.testing.assert_close(slope, torch.ones_like(slope))


def test_a_tail_layer_finds_the_tails_of_a_student():
    torch.manual_seed(0)
    x = torch.distributions.StudentT(2.0).sample((4000, 1))
    layer = T.Compose([T.elementwise(1, "tail", threshold=0.0), T.affine(1)])
    base = torch.distributions.Normal(torch.zeros(1), 1.0)
    d = torch.distributions.TransformedDistribution(torch.distributions.Independent(base, 1), [layer])
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -d.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    truth = -torch.distributions.StudentT(2.0).log_prob(x).mean()
    assert loss.item() == pytest.approx(truth.item(), abs=0.03)


def test_soft_clip():
    t, x = T.SoftClip(3, -1.0, 2.0, 0.2).double(), numbers(9, 3)
    y, log_det = t.forward_and_log_det(x)
    s = torch.nn.functional.softplus
    torch.testing.assert_close(y, -1 + 0.2 * (s((x + 1) / 0.2) - s((x - 2) / 0.2)))
    torch.testing.assert_close(t.inverse_and_log_det(y)[0], x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian(t._call, x[0]))[1])
    far = torch.tensor([1e20, -1e20, 0.5], dtype=torch.float64)
    assert t(far)[:2].tolist() == [2.0, -1.0]
    assert t.inverse_and_log_det(torch.tensor([2.0, -1.0, 0.0]).double())[0].isfinite().all()


@pytest.mark.parametrize(
    "build",
    [
        lambda: T.SinhArcsinh(max_skew=0.0),
        lambda: T.TailTransform(start=0.5),
        lambda: T.TailTransform(threshold=-1.0),
        lambda: T.SoftLog(threshold=0.0),
        lambda: T.SoftClip(2, low=1.0, high=1.0),
        lambda: T.SoftClip(2, softness=0.0),
    ],
)
def test_options_that_mean_nothing(build):
    with pytest.raises(OptionError):
        build()


# --- supports --------------------------------------------------------------------------------------------

SUPPORTS = [
    (constraints.positive, 2),
    (constraints.nonnegative, 2),
    (constraints.softplus_positive, 2),
    (constraints.greater_than(2.0), 2),
    (constraints.greater_than_eq(-1.0), 2),
    (constraints.less_than(1.0), 2),
    (constraints.interval(-1.0, 4.0), 2),
    (constraints.half_open_interval(0.0, 2.0), 2),
    (constraints.unit_interval, 2),
    (constraints.independent(constraints.positive, 1), 2),
    (constraints.cat([constraints.positive, constraints.real], dim=-1, lengths=[2, 1]), 3),
    (constraints.stack([constraints.positive, constraints.unit_interval], dim=-1), 2),
    (constraints.simplex, 2),
    (constraints.ordered_vector, 3),
    (constraints.positive_ordered_vector, 3),
    (constraints.lower_cholesky, 6),
    (constraints.positive_definite, 3),
    (constraints.positive_semidefinite, 3),
    (constraints.corr_cholesky, 3),
    (constraints.corr_matrix, 3),
]


@pytest.mark.parametrize(("support", "width"), SUPPORTS, ids=lambda value: str(value)[:30])
def test_a_flow_on_a_support(support, width, tmp_path):
    for context_dim in (0, 2):
        options = {"transforms": 1, "hidden_dims": (8,), "support": support}
        flow = pf.flow("maf", input_dim=width, context_dim=context_dim, **options)
        context = torch.randn(5, 2) if context_dim else None
        d = flow(context)
        batch = (5,) if context_dim else ()
        x, score = d.rsample_with_log_prob((4,))
        assert d.batch_shape == batch
        assert x.shape == (4, *batch, *d.event_shape)
        assert d.support.check(x).shape == score.shape == (4, *batch)
        assert d.support.check(x).all()
        torch.testing.assert_close(d.log_prob(x.detach()), score, rtol=1e-3, atol=1e-3)
        assert d.expand((3, *batch)).log_prob(x[0]).shape == (3, *batch)
        pf.save(flow, tmp_path / "flow.safetensors")
        again = pf.load(tmp_path / "flow.safetensors")(context)
        assert torch.equal(again.log_prob(x.detach()), d.log_prob(x.detach()))
    assert describe(as_constraint(restore(describe(as_constraint(support))))) == describe(as_constraint(support))


@pytest.mark.parametrize(("support", "width"), [(constraints.lower_cholesky, 3), (constraints.positive_definite, 3)])
def test_a_density_of_matrices_integrates_to_one(support, width):
    """Importance sampling over the entries of the triangle, from a density made of numbers alone."""
    torch.manual_seed(0)
    flow = pf.flow("maf", input_dim=width, transforms=1, hidden_dims=(8,), support=support).double()
    free = 1.5 * torch.randn(200_000, 3, dtype=torch.float64)
    log_q = torch.distributions.Normal(0.0, 1.5).log_prob(free).sum(-1)
    a, b, c = free[:, 0].exp(), free[:, 1], free[:, 2].exp()
    zero = torch.zeros_like(a)
    matrix = torch.stack([torch.stack([a, zero], -1), torch.stack([b, c], -1)], -2)
    log_volume = free[:, 0] + free[:, 2]
    if support is constraints.positive_definite:
        matrix = matrix @ matrix.mT  # entries a^2, a b, b^2 + c^2: the determinant of that map is 4 a^2 c
        log_volume = log_volume + torch.log(4 * a**2 * c)
    with torch.no_grad():
        mass = (flow().log_prob(matrix) + log_volume - log_q).exp().mean()
    assert mass.item() == pytest.approx(1, abs=0.02)


def test_a_known_density_on_a_support():
    """An untrained planar flow with u = 0 is a standard normal: on the positive numbers, a log-normal."""
    flow = pf.flow("planar", input_dim=1, transforms=1, support="positive")
    x = torch.tensor([[0.5], [3.0]])
    want = torch.distributions.LogNormal(0.0, 1.0).log_prob(x)[:, 0]
    torch.testing.assert_close(flow().log_prob(x), want)


@pytest.mark.parametrize(
    ("support", "width", "says"),
    [
        (constraints.sphere, 3, "no bijection"),
        (constraints.boolean, 2, "no bijection"),
        (constraints.lower_cholesky, 5, "triangle"),
        (constraints.corr_cholesky, 2, "do not fit"),
        (constraints.cat([constraints.simplex, constraints.real], dim=-1, lengths=[2, 1]), 3, "each column"),
        (constraints.stack([constraints.real, constraints.positive], dim=0), 2, "last dimension"),
        (["positive"], 2, "names 1 columns"),
        ("sphere", 2, "no support named"),
    ],
)
def test_supports_without_a_bijection(support, width, says):
    with pytest.raises(OptionError, match=says):
        pf.flow("maf", input_dim=width, support=support)
