"""The circle, the torus and the sphere: continuity across the ends, known densities, samples against densities."""

import copy
import io
import math
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

import pyroflows as pf
from pyroflows.distributions import ncsf, sphere, uniform_angles, von_mises_angles
from pyroflows.errors import OptionError, OutsideSupport, ShapeError
from pyroflows.transforms import (
    SPHERE,
    TORUS,
    CircularAutoregressive,
    CircularCoupling,
    CircularSpline,
    EqualArea,
    Moebius,
    wrap_angle,
)

PI = math.pi
circle_maps = pytest.mark.parametrize("map", [CircularSpline(6), Moebius(4), Moebius(1)], ids=["spline", "four", "one"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def perturbed(module, scale, seed=0):
    """A copy with normal noise on each parameter, weights of networks by the root of their width."""
    torch.manual_seed(seed)
    module = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p) / (math.sqrt(p.shape[-1]) if p.dim() > 1 else 1))
    return module.double()


def distance(a, b):
    """Along the circle."""
    return wrap_angle(a - b).abs()


# --- angles ----------------------------------------------------------------------------------------------


@dtypes
def test_wrap_angle(dtype):
    angle = torch.linspace(-30, 30, 1001, dtype=dtype)
    wrapped = wrap_angle(angle)
    assert bool(TORUS.base_constraint.check(wrapped).all())
    assert torch.allclose(torch.cos(wrapped), torch.cos(angle), atol=1e-5)
    assert torch.allclose(torch.sin(wrapped), torch.sin(angle), atol=1e-5)
    inside = torch.linspace(-3.14, 3.14, 101, dtype=dtype)
    assert torch.equal(wrap_angle(inside), inside)
    edge = torch.tensor([PI, -PI], dtype=dtype)
    assert torch.equal(wrap_angle(edge)[1], edge[1])
    assert float(distance(wrap_angle(edge), edge).max()) < 1e-6
    assert bool(wrap_angle(torch.tensor([torch.nan, 1e30], dtype=dtype)).isnan().eq(torch.tensor([True, False])).all())


@circle_maps
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_maps_of_the_circle_go_round_once(map, scale):
    """Increasing, onto, with the log-slope of autograd and equal slopes at both ends."""
    torch.manual_seed(1)
    raw = (scale * torch.randn(map.params, dtype=torch.float64)).expand(4001, -1)
    x = torch.linspace(-PI, PI, 4001, dtype=torch.float64, requires_grad=True)
    y, log_slope = map.forward(x, raw)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope.log(), log_slope, atol=1e-8)
    steps = wrap_angle(y.diff())
    assert bool((steps > 0).all())
    assert abs(float(steps.detach().sum()) - 2 * PI) < 1e-9  # once round
    assert float((log_slope[0] - log_slope[-1]).detach().abs()) < 1e-8
    back, log_back = map.backward(y.detach(), raw)
    assert float(distance(back, x.detach()).max()) < 1e-8
    if isinstance(map, Moebius) or scale < 2:
        assert torch.allclose(log_back, -log_slope, atol=1e-6)
    if scale == 0:
        # The centres of a mixture start apart, so it is near the identity only.
        assert float(distance(y, x).detach().max()) < (1e-12 if map.params != 13 else 0.01)


@circle_maps
@dtypes
def test_N3_at_the_ends_and_knots_of_the_circle(map, dtype):
    torch.manual_seed(2)
    raw = torch.randn(map.params, dtype=dtype)
    grid = torch.linspace(-PI, PI, 7, dtype=dtype)
    up, down = torch.full_like(grid, torch.inf), torch.full_like(grid, -torch.inf)
    for points in (grid, torch.nextafter(grid, up), torch.nextafter(grid, down)):
        for there, back in ((map.forward, map.backward), (map.backward, map.forward)):
            x, leaf = points.clone().requires_grad_(), raw.expand(7, -1).clone().requires_grad_()
            y, log_slope = there(x, leaf)
            assert bool((y.isfinite() & log_slope.isfinite()).all())
            assert bool((y.abs() <= torch.tensor(PI, dtype=dtype)).all())
            grads = torch.autograd.grad(y.sum() + log_slope.sum(), (x, leaf))
            assert all(bool(grad.isfinite().all()) for grad in grads)
            again = back(y.detach(), leaf)[0]
            slack = (1e-12 if dtype == torch.float64 else 1e-5) * (1 + (-log_slope).exp())
            assert bool((distance(again, x) <= slack).all())


@circle_maps
@pytest.mark.parametrize("factor", [3.0, 10.0, 30.0])
def test_N4_large_parameters_on_the_circle_in_float32(map, factor):
    torch.manual_seed(3)
    raw = factor * torch.randn(64, 1, map.params)
    x = torch.linspace(-3.1, 3.1, 40).expand(64, -1)
    y, log_slope = map.forward(x, raw)
    back, log_back = map.backward(y, raw)
    for value in (y, log_slope, back, log_back):
        assert bool(value.isfinite().all())
    again, _ = map.forward(back, raw)
    assert bool((distance(again, y) <= 1e-4 * (1 + log_slope.exp() + (-log_back).exp())).all())


@circle_maps
def test_N6_one_bad_angle_spoils_no_gradient_of_another(map):
    torch.manual_seed(4)
    raw = torch.randn(3, map.params, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.3, PI, -2.0], dtype=torch.float64, requires_grad=True)
    y, log_slope = map.forward(x, raw)
    grads = torch.autograd.grad(y.sum() + log_slope.sum(), (x, raw))
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_one_moebius_transformation_is_that_of_the_complex_plane():
    """z -> (z - w) / (1 - conj(w) z), turned; and uniform angles become wrapped Cauchy ones."""
    torch.manual_seed(5)
    raw = torch.randn(4, dtype=torch.float64)
    spread = raw[1:3] * 0.99 / torch.sqrt(1 + raw[1:3].square().sum())
    centre = torch.complex(*spread)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    z = torch.polar(torch.ones_like(x), x)
    want = torch.angle((z - centre) / (1 - centre.conj() * z)) + raw[3]
    y, log_slope = Moebius(1).forward(x, raw.expand(50, -1))
    assert float(distance(y, want).max()) < 1e-12
    r, phi = centre.abs(), centre.angle()
    cauchy = (1 - r**2) / (1 + r**2 - 2 * r * torch.cos(x - phi))
    assert torch.allclose(log_slope.exp(), cauchy, rtol=1e-12)


# --- the torus -------------------------------------------------------------------------------------------

LAYERS = {
    "coupling": lambda **o: CircularCoupling(3, hidden_dims=(16,), **o),
    "autoregressive": lambda **o: CircularAutoregressive(3, hidden_dims=(16, 16), **o),
    "turned": lambda **o: CircularAutoregressive(3, order=[1, 2, 0], hidden_dims=(16, 16), residual=True, **o),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("map", ["spline", "moebius"])
def test_layers_are_continuous_on_the_torus(make, map):
    """A turn of any coordinate by 2 pi changes nothing: neither the point nor the log-det, either way."""
    layer = perturbed(make(map=map), 1.0)
    assert repr(layer.domain) == repr(layer.codomain) == repr(TORUS)
    x = 2 * PI * torch.rand(20, 3, dtype=torch.float64) - PI
    for i in range(3):
        low, high = x.clone(), x.clone()
        low[:, i], high[:, i] = -PI + 1e-11, PI - 1e-11
        for direction in (layer.forward_and_log_det, layer.inverse_and_log_det):
            (y, log_det), (z, other) = direction(low), direction(high)
            assert float(distance(y, z).detach().max()) < 1e-6
            assert float((log_det - other).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("hidden_dims", [(), (1,), (5, 7)])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_N34_angles_are_steered_by_those_before_them_alone(order, hidden_dims, context_dim):
    options = {"hidden_dims": hidden_dims, "context_dim": context_dim, "activation": "tanh"}
    layer = perturbed(CircularAutoregressive(4, order=order, **options), 1.0)
    x = torch.rand(4, dtype=torch.float64)
    context = torch.ones(2, dtype=torch.float64) if context_dim else None
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.net(x, context).sum(-1), x)
    for i in range(4):
        for j in range(4):
            if order[j] >= order[i]:
                assert float(jacobian[i, j]) == 0
            elif len(hidden_dims) == 0 or min(hidden_dims) >= 4:
                assert float(jacobian[i, j]) != 0


@pytest.mark.parametrize("hidden_dims", [(), (9, 9)])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("map", ["spline", "moebius"])
def test_angles_are_found_in_one_sweep_as_by_passes(map, context_dim, hidden_dims):
    """Values and gradients; the network reads two numbers of each angle, and the gradient goes through both."""
    options = {"hidden_dims": hidden_dims, "residual": True, "activation": "tanh", "context_dim": context_dim}
    layer = perturbed(CircularAutoregressive(5, map, order=[3, 0, 2, 1, 4], **options), 0.7)
    y = ((2 * torch.rand(3, 5, dtype=torch.float64) - 1) * 3).requires_grad_()
    context = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True) if context_dim else None
    leaves = [y, *layer.parameters(), *([] if context is None else [context])]
    results = []
    for x, log_det in (layer.inverse_and_log_det(y, context), layer._by_passes(y, context)):
        weights = torch.arange(5, dtype=torch.float64) - 2
        loss = (weights * torch.sin(x)).sum() + log_det.square().sum()
        results.append([x, log_det, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    assert layer.net.unrolls
    for swept, passed in zip(*results, strict=True):
        torch.testing.assert_close(swept, passed, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"structure": "autoregressive", "base": "von_mises"}, {"map": "moebius", "bins": 3}]
)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_density_on_the_torus(options, context_dim):
    """It integrates to one over the torus, and samples follow it."""
    flow = perturbed(ncsf(2, transforms=2, hidden_dims=(16,), context_dim=context_dim, **options), 0.4)
    d = flow(torch.ones(2, dtype=torch.float64)) if context_dim else flow()
    n = 120
    angles = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 * PI / n - PI
    grid = torch.stack(torch.meshgrid(angles, angles, indexing="ij"), -1)
    with torch.no_grad():
        mass = d.log_prob(grid).exp() * (2 * PI / n) ** 2
        sample = d.sample((4000,))
    assert abs(float(mass.sum()) - 1) < 2e-3
    assert bool(d.support.check(sample).all())
    counts, _, _ = np.histogram2d(*sample.numpy().T, bins=6, range=[[-PI, PI]] * 2)
    expected = mass.reshape(6, n // 6, 6, n // 6).sum((1, 3)).numpy() * 4000
    assert ((counts - expected) ** 2 / expected.clip(1)).sum() < 35 + 4 * math.sqrt(70)


def test_bases_of_the_torus():
    angles = torch.linspace(-PI, PI, 9)
    truth = torch.distributions.VonMises(torch.tensor(0.0), torch.tensor(2.0)).log_prob(angles)
    base = von_mises_angles(1, 2.0)
    assert torch.allclose(base().log_prob(angles[:, None]), truth, atol=1e-5)
    sample = base().rsample((4000,))
    assert (
        abs(
            float(sample.cos().mean())
            - float(torch.special.i1e(torch.tensor(2.0)) / torch.special.i0e(torch.tensor(2.0)))
        )
        < 0.03
    )
    uniform = uniform_angles(2)
    ends = torch.tensor([[PI, -PI], [0.0, 1.0]])
    assert torch.allclose(uniform().log_prob(ends), torch.full((2,), -2 * math.log(2 * PI)))
    assert uniform.double()().sample().dtype == torch.float64


def test_fit_leaves_angles_as_they_are():
    """A mode that lies across the ends is fitted like any other, to about the true entropy."""
    noise = torch.distributions.VonMises(torch.tensor(0.0), torch.tensor(8.0)).sample((1500, 2))
    rows = wrap_angle(torch.stack([noise[:, 0] + PI, noise[:, 0] + noise[:, 1] + 2.0], -1))
    torch.manual_seed(0)
    flow = ncsf(2, transforms=2, hidden_dims=(16,), bins=6)
    result = pf.fit(flow, rows, max_epochs=15, lr=2e-2, progress=False, seed=0)
    assert flow.standardize is None
    kappa = torch.tensor(8.0)
    entropy = torch.log(2 * PI * torch.special.i0e(kappa)) + kappa * (
        1 - torch.special.i1e(kappa) / torch.special.i0e(kappa)
    )
    assert abs(result.validation + 2 * float(entropy)) < 0.25
    assert result.validation > -2 * math.log(2 * PI) + 1.5  # the uniform density
    with torch.no_grad():
        ends = flow().log_prob(torch.tensor([[-PI, 1.0], [PI, 1.0]]))
    assert abs(float(ends[0] - ends[1])) < 1e-4
    with pytest.raises(OutsideSupport):
        pf.fit(flow, rows + PI, progress=False)


def test_a_flow_of_angles_takes_no_other_support():
    with pytest.raises(OptionError, match="takes no support"):
        ncsf(2).constrain("positive")
    with pytest.raises(OptionError, match="takes no support"):
        pf.fit(sphere(2), torch.eye(3), support="positive", progress=False)


def test_save_and_load(tmp_path):
    for name, options in (("ncsf", {"base": "von_mises"}), ("sphere", {})):
        flow = pf.flow(name, input_dim=2, transforms=2, hidden_dims=(8,), **options)
        pf.save(flow, tmp_path / "flow.safetensors")
        loaded = pf.load(tmp_path / "flow.safetensors")
        point = flow().sample((3,))
        assert torch.equal(loaded().log_prob(point), flow().log_prob(point))
        assert loaded.support == flow.support or isinstance(loaded.support, type(flow.support))


# --- the sphere ------------------------------------------------------------------------------------------


@dtypes
def test_equal_area_is_a_chart(dtype):
    """Unit vectors, whose area element by autograd is the log-det; back again; finite at the poles."""
    layer = EqualArea(2)
    x = (torch.rand(50, 2, dtype=dtype) * 2 - 1) * PI
    y, log_det = layer.forward_and_log_det(x)
    assert bool(SPHERE[2].check(y).all())
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: layer.forward_and_log_det(x)[0]))(x.double())
    area = torch.linalg.cross(jacobian[..., 0], jacobian[..., 1]).norm(dim=-1)
    assert torch.allclose(area.log(), log_det.double(), atol=1e-6)
    back, log_back = layer.inverse_and_log_det(y)
    assert torch.allclose(back, x, atol=1e-4 if dtype == torch.float32 else 1e-10)
    assert torch.equal(log_back, -log_det)
    for direction, edge in (
        (layer.forward_and_log_det, torch.tensor([[0.0, PI], [1.0, -PI], [PI, 0.0]], dtype=dtype)),
        (layer.inverse_and_log_det, torch.tensor([[0, 0, 1.0], [0, 0, -1.0], [-1.0, 0, 0]], dtype=dtype)),
    ):
        edge.requires_grad_()
        value, _ = direction(edge)
        (grad,) = torch.autograd.grad(value.sum(), edge)
        assert bool(value.isfinite().all())
        assert bool(grad.isfinite().all())
    assert layer.inverse_shape(layer.forward_shape((5, 2))) == (5, 2)


@pytest.mark.parametrize("dim", [3, 4, 8])
@dtypes
def test_equal_area_in_higher_dimension(dim, dtype):
    """The area element by autograd is the log-det, and all of it is that of the sphere; finite at poles and ends."""
    layer, exact = EqualArea(dim), torch.float64
    torch.manual_seed(0)
    x = (torch.rand(50, dim, dtype=dtype) * 2 - 1) * PI
    y, log_det = layer.forward_and_log_det(x)
    assert bool(SPHERE[dim].check(y).all())
    jacobian = torch.stack([torch.autograd.functional.jacobian(layer._call, point.to(exact)) for point in x[:9]])
    area = 0.5 * torch.linalg.slogdet(jacobian.mT @ jacobian)[1]
    assert torch.allclose(area, log_det[:9].to(exact), atol=1e-6 if dtype == torch.float32 else 1e-10)
    whole = 2 * PI ** ((dim + 1) / 2) / math.gamma((dim + 1) / 2)
    assert float(log_det[0].exp()) * (2 * PI) ** dim == pytest.approx(whole, rel=1e-5)
    back, log_back = layer.inverse_and_log_det(y)
    assert torch.allclose(back, x, atol=1e-5 if dtype == torch.float32 else 1e-10)
    assert torch.equal(log_back, -log_det)
    for direction, edge in (
        (layer.forward_and_log_det, torch.stack([torch.full((dim,), end, dtype=dtype) for end in (PI, -PI, 0.0)])),
        (layer.inverse_and_log_det, torch.cat([torch.eye(dim + 1, dtype=dtype), -torch.eye(dim + 1, dtype=dtype)])),
    ):
        edge.requires_grad_()
        value, _ = direction(edge)
        (grad,) = torch.autograd.grad(value.sum(), edge)
        assert bool(value.isfinite().all())
        assert bool(grad.isfinite().all())


def test_a_density_on_the_sphere_of_dimension_three():
    """The mean over uniform points, times the area, is one; so are the moments of samples and of the density."""
    d = perturbed(sphere(3, transforms=4, hidden_dims=(16,)), 0.3)()
    torch.manual_seed(2)
    with torch.no_grad():
        uniform = torch.nn.functional.normalize(torch.randn(40000, 4, dtype=torch.float64), dim=-1)
        weight = d.log_prob(uniform).exp() * 2 * PI**2
        samples = d.sample((40000,))
        assert torch.allclose(d.log_prob(samples), d.log_prob(samples.clone()), atol=1e-6)
    error = float(weight.std()) / 200
    assert error < 0.02
    assert abs(float(weight.mean()) - 1) < 5 * error
    for moment in (lambda y: y, lambda y: y * y.roll(1, -1)):
        expected, found = (weight[:, None] * moment(uniform)), moment(samples)
        noise = (expected.var(0) + found.var(0)).sqrt() / 200
        assert bool(((expected.mean(0) - found.mean(0)).abs() < 5 * noise).all())


def test_the_sphere_as_a_constraint():
    inside = torch.tensor([[0.6, 0.8, 0.0], [0.6, 0.8, 0.1]])
    assert SPHERE[2].check(inside).tolist() == [True, False]
    assert SPHERE[1].check(inside).tolist() == [False, False]
    assert SPHERE[1].check(inside[:, :2]).tolist() == [True, True]
    to_sphere = biject_to(SPHERE[2])
    line = torch.randn(6, 2)
    point = to_sphere(line)
    assert bool(SPHERE[2].check(point).all())
    assert torch.allclose(to_sphere.inv(point), line, atol=1e-4)
    assert to_sphere.log_abs_det_jacobian(line, point).shape == (6,)
    with pytest.raises(NotImplementedError):
        biject_to(dist.constraints.sphere)  # Pyro's own is left alone


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_density_on_the_sphere(context_dim):
    """With respect to area it integrates to one, by quadrature in latitude and longitude; samples follow it."""
    flow = perturbed(sphere(2, transforms=3, hidden_dims=(16,), context_dim=context_dim), 0.3)
    d = flow(torch.ones(2, dtype=torch.float64)) if context_dim else flow()
    n = 240
    nodes, weights = np.polynomial.legendre.leggauss(200)
    colatitude = torch.tensor((nodes + 1) * PI / 2)
    longitude = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 * PI / n - PI
    theta, phi = torch.meshgrid(colatitude, longitude, indexing="ij")
    points = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)
    cell = theta.sin() * torch.tensor(weights)[:, None] * PI / 2 * 2 * PI / n
    with torch.no_grad():
        mass = d.log_prob(points).exp() * cell
        sample = d.sample((4000,))
    assert abs(float(mass.sum()) - 1) < 2e-3
    assert bool(d.support.check(sample).all())
    for f in (
        lambda p: p[..., 0],
        lambda p: p[..., 1],
        lambda p: p[..., 2],
        lambda p: p[..., 0] * p[..., 1],
        lambda p: p[..., 2] ** 2,
        lambda p: (p[..., 0] > 0.5).double(),
    ):
        want, got = (mass * f(points)).sum(), f(sample)
        assert abs(float(got.mean() - want)) < 4.5 * float(got.std()) / math.sqrt(4000) + 2e-3


def test_a_new_sphere_flow_is_nearly_uniform():
    point = torch.nn.functional.normalize(torch.randn(100, 3), dim=-1)
    with torch.no_grad():
        assert float((sphere(2)().log_prob(point) + math.log(4 * PI)).abs().max()) < 0.2
        assert (
            float(
                (sphere(1)().log_prob(torch.nn.functional.normalize(point[:, :2], dim=-1)) + math.log(2 * PI))
                .abs()
                .max()
            )
            < 0.2
        )


def test_fit_on_the_sphere():
    """Two caps of von Mises-Fisher points: far better than uniform, near the truth."""
    kappa, n = 20.0, 1500
    height = 1 + torch.log(torch.rand(n) * (1 - math.exp(-2 * kappa)) + math.exp(-2 * kappa)) / kappa
    turn = 2 * PI * torch.rand(n)
    radius = torch.sqrt(1 - height**2)
    cap = torch.stack([height, radius * turn.cos(), radius * turn.sin()], -1)  # about the x axis
    rows = torch.where(torch.rand(n, 1) < 0.5, cap, cap.flip(-1))  # and about the pole
    torch.manual_seed(0)
    result = pf.fit(sphere(2, hidden_dims=(32,)), rows, max_epochs=15, lr=1e-2, progress=False, seed=0)
    entropy = math.log(2) + math.log(2 * PI / kappa) + 1  # of two caps that do not overlap
    assert result.validation > -entropy - 0.35
    with pytest.raises(OutsideSupport):
        pf.fit(result.flow, rows * 1.01, progress=False)


# --- errors and copies -----------------------------------------------------------------------------------


def test_typed_errors():
    for call in (
        lambda: Moebius(0),
        lambda: Moebius(1.5),
        lambda: CircularSpline(1),
        lambda: CircularCoupling(3, "affine"),
        lambda: CircularCoupling(3, centres=2),
        lambda: CircularCoupling(3, mask=[True, True, True]),
        lambda: CircularCoupling(3, mask=[True]),
        lambda: CircularCoupling(3, angles=[True]),
        lambda: CircularCoupling(3, angles=[True, True, False]),
        lambda: CircularAutoregressive(3, order=[0, 0, 1]),
        lambda: CircularAutoregressive(3, hidden_dims=4),
        lambda: CircularAutoregressive(3, "affine"),
        lambda: EqualArea(0),
        lambda: EqualArea(9),
        lambda: sphere(9),
        lambda: sphere(2, transforms=0),
        lambda: ncsf(2, base="normal"),
        lambda: ncsf(2, structure="none"),
        lambda: ncsf(2, structure="autoregressive", direction="both"),
        lambda: ncsf(2, direction="both"),
        lambda: ncsf(2, map="affine"),
    ):
        with pytest.raises(OptionError):
            call()
    with pytest.raises(ShapeError):
        EqualArea(2).inverse_and_log_det(torch.zeros(4, 2))
    with pytest.raises(ShapeError):
        EqualArea(2).forward_and_log_det(torch.zeros(4, 3))
    with pytest.raises(ShapeError):
        CircularCoupling(2)(torch.zeros(4, 3))


def test_copies_keep_the_support():
    for flow in (ncsf(2, transforms=1), sphere(2, transforms=2)):
        for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            point = flow().sample((3,))
            assert torch.equal(other().log_prob(point), flow().log_prob(point))
        buffer = io.BytesIO()
        torch.save(flow.state_dict(), buffer)
    assert isinstance(ncsf(2)().support, constraints.independent)
