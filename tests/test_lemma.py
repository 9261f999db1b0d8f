"""Planar, radial and Sylvester layers and matrix exponentials: what is special to them beside the laws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyroflows as pf
from pyroflows import errors
from pyroflows import transforms as T

FACTORS = ("householder", "orthogonal", "triangular")


def jacobian_log_det(layer, x):
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: layer.forward_and_log_det(row)[0]))(x)
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert (sign > 0).all()
    return log_det


def test_n17_a_planar_layer_without_direction_is_a_shift():
    layer = T.planar(3).double()
    with torch.no_grad():
        layer.w.zero_()
        layer.u.fill_(2.0)
        layer.bias.fill_(0.7)
    x = torch.randn(5, 3, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    shift = 2.0 / (1 + 1.01 * math.log(2)) * math.tanh(0.7)
    assert torch.allclose(y, x + shift, atol=1e-12)
    assert torch.equal(log_det, torch.zeros(5, dtype=torch.float64))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("push", [-1e6, -200.0, 200.0])
def test_n18_a_planar_layer_of_extreme_parameters_is_invertible(push):
    layer = T.planar(2)
    with torch.no_grad():
        layer.w.copy_(torch.tensor([1.0, 0.0]))
        layer.u.copy_(torch.tensor([push, 0.0]))
    x = torch.tensor([[0.0, 1.0], [1e-3, 1.0], [0.5, 1.0], [-4.0, 1.0]])
    y, log_det = layer.forward_and_log_det(x)
    assert log_det.isfinite().all()
    assert (y[:, 0].sort().indices == x[:, 0].sort().indices).all()
    found, back = layer.inverse_and_log_det(y)
    assert torch.allclose(found, x, atol=1e-4)
    assert torch.allclose(back, -log_det, atol=1e-3)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
def test_d1_the_log_det_of_a_sylvester_layer_is_that_of_its_jacobian(factor, width, scale):
    torch.manual_seed(0)
    for nonlinearity in ("tanh", "arctan", "sigmoid"):
        layer = T.sylvester(5, factor=factor, width=width, nonlinearity=nonlinearity).double()
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(0, scale)
        x = torch.randn(20, 5, dtype=torch.float64)
        y, log_det = layer.forward_and_log_det(x)
        assert torch.allclose(log_det, jacobian_log_det(layer, x), atol=1e-8)
        assert torch.allclose(layer.inverse_and_log_det(y)[0], x, atol=1e-8)


def test_a_radial_layer_is_inverted_by_a_formula_far_out_and_at_its_centre():
    torch.manual_seed(0)
    layer = T.radial(3).double()
    for strength in (-200.0, -3.0, 3.0, 200.0):
        with torch.no_grad():
            layer.strength.fill_(strength)
        far = torch.randn(20, 3, dtype=torch.float64) * torch.logspace(-12, 12, 20, dtype=torch.float64)[:, None]
        x = torch.cat([far + layer.centre.detach(), layer.centre.detach()[None]])
        y, log_det = layer.forward_and_log_det(x)
        found, back = layer.inverse_and_log_det(y)
        assert torch.allclose(found, x, rtol=1e-12, atol=1e-12)
        assert torch.allclose(back, -log_det, rtol=1e-9, atol=1e-9)
        assert torch.allclose(log_det, jacobian_log_det(layer, x), atol=1e-7)
        assert layer.inverse == "closed"


def test_names_and_argument_order_are_those_of_pyro():
    assert T.sylvester(5).frame.shape == (3, 5)  # input_dim // 2 + 1 reflections
    assert T.sylvester(5, 2).frame.shape == (2, 5)
    for helper in (T.conditional_planar, T.conditional_radial, T.conditional_sylvester):
        layer = helper(3, 4, [16])
        assert layer.conditioner.layers[0].bias.shape == (16,)
        density = dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), [layer.condition(torch.randn(6, 4))]
        )
        assert density.batch_shape == (6,)
        assert density.log_prob(density.sample((10,))).shape == (10, 6)


def test_d7_a_matrix_exponential_is_exact():
    torch.manual_seed(0)
    layer = T.matrix_exponential(4).double()
    with torch.no_grad():
        layer.raw.normal_()
    x = torch.randn(6, 4, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    assert log_det.shape == (6,)
    assert torch.allclose(log_det, jacobian_log_det(layer, x), atol=1e-12)
    assert torch.allclose(layer.inverse_and_log_det(y)[0], x, atol=1e-12)


def test_options_that_cannot_be():
    with pytest.raises(errors.OptionError, match="nonlinearity"):
        T.planar(2, nonlinearity="relu")
    with pytest.raises(errors.OptionError, match="factor"):
        T.sylvester(2, factor="qr")
    with pytest.raises(errors.OptionError, match="width"):
        T.sylvester(2, width=3)
    with pytest.raises(errors.OptionError, match="permutation"):
        T.sylvester(2, factor="triangular", permutation=[0, 0])
    with pytest.raises(errors.OptionError, match="direction"):
        pf.flow("planar", input_dim=2, direction="both")


FLOWS = [("planar", {}), ("radial", {}), *(("sylvester", {"factor": factor}) for factor in FACTORS)]


@pytest.mark.parametrize("direction", ["sample", "score"])
@pytest.mark.parametrize(("name", "options"), FLOWS)
def test_they_learn_a_density_and_sample_from_it(name, options, direction):
    torch.manual_seed(0)
    sides = torch.randint(0, 2, (500,)) * 4.0 - 2.0
    data = torch.stack([sides + 0.5 * torch.randn(500), torch.randn(500)], -1)
    flow = pf.flow(name, input_dim=2, direction=direction, transforms=6, **options)
    before = flow().log_prob(data).mean()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -flow().log_prob(data).mean()
        loss.backward()
        optimizer.step()
    assert -loss > before + 0.3
    with torch.no_grad():  # samples agree with the density: E[-log q] of samples is the entropy on a grid
        value = flow().sample((4000,))
        found = -flow().log_prob(value.clone()).mean()
        axis = torch.linspace(-12, 12, 300)
        grid = torch.cartesian_prod(axis, axis)
        log_q = flow().log_prob(grid)
        cell = float(axis[1] - axis[0]) ** 2
        assert abs(float(log_q.exp().sum()) * cell - 1) < 5e-3
        assert abs(float(-(log_q.exp() * log_q).sum()) * cell - float(found)) < 0.1


@pytest.mark.parametrize(("name", "options"), FLOWS)
def test_they_guide(name, options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] * z[..., 1], 0.2), obs=torch.tensor(1.0))

    guide = pf.AutoFlow(model, flow=name, transforms=4, **options).setup()
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=16, vectorize_particles=True))
    losses = [svi.step() for _ in range(150)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-20:]) / 20 < losses[0] - 1.0
