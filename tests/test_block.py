"""Block neural autoregressive layers: onto the line, inverted truly, the formula as the paper writes it."""

import math

import pytest
import torch

import pyroflows as pf
from pyroflows import errors
from pyroflows import transforms as T

ACTIVATIONS = ("tanh", "sigmoid", "ELU", "LeakyReLU")
RESIDUALS = (None, "normal", "gated")


def layer(activation="tanh", residual=None, scale=0.7, dim=3, **options):
    torch.manual_seed(0)
    t = T.BlockAutoregressive(dim, (4, 5), activation, residual, **options).double()
    with torch.no_grad():
        for p in t.parameters():
            p.add_(scale * torch.randn_like(p))
    return t


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_n22_every_point_has_an_inverse(activation, residual):
    t = layer(activation, residual)
    y = torch.cat([torch.randn(20, 3), 1e3 * torch.randn(20, 3), 1e9 * torch.randn(5, 3)]).double()
    x, log_det = t.inverse_and_log_det(y)
    again, forward = t.forward_and_log_det(x)
    assert ((again - y).abs() / (1 + y.abs().amax(-1, keepdim=True))).max() < 1e-10
    assert torch.allclose(log_det, -forward)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_starts_near_the_identity(activation, residual):
    torch.manual_seed(0)
    t, x = T.BlockAutoregressive(4, activation=activation, residual=residual), torch.randn(500, 4)
    y, log_det = t.forward_and_log_det(x)
    assert log_det.abs().mean() / 4 < 0.3
    assert (y - x).abs().mean() < 0.5


def test_the_formula_of_the_paper():
    """One dense pass with the whole weight matrices, and the slope as a product of the diagonal blocks."""
    t = layer(order=[2, 0, 1])
    x = torch.randn(3).double()
    z, slopes = x[t.turn], None
    for n in range(3):
        own, earlier = t.own[n], t.earlier[n]
        above, below = own.shape[1:]
        positive = 0.1 + torch.nn.functional.softplus(own + math.log(math.expm1(1 - 0.1)))
        dense = earlier.clone()
        for i in range(3):
            for j in range(3):
                rows, columns = slice(i * above, (i + 1) * above), slice(j * below, (j + 1) * below)
                if j == i:
                    dense[rows, columns] = positive[i] / below
                else:
                    dense[rows, columns] = earlier[rows, columns] / math.sqrt(3 * below) if j < i else 0
        gain = 0.1 + torch.nn.functional.softplus(getattr(t, f"gain{n}") + math.log(math.expm1(1 - 0.1)))
        weight = t.scales[n] * gain[:, None] * dense
        z = weight @ z + getattr(t, f"bias{n}")
        blocks = torch.stack([weight[i * above : (i + 1) * above, i * below : (i + 1) * below] for i in range(3)])
        slopes = blocks if slopes is None else blocks @ slopes
        if n < 2:
            slopes = (0.99 * (1 - torch.tanh(z) ** 2) + 0.01).reshape(3, above, 1) * slopes
            z = 0.99 * torch.tanh(z) + 0.01 * z
    y, log_det = t.forward_and_log_det(x)
    assert torch.allclose(y, z[t.back])
    assert torch.allclose(log_det, slopes.flatten().log().sum())


def test_leaky_relu_is_torchs():
    t = T.BlockAutoregressive(1, (1,), "LeakyReLU").double()
    x = torch.linspace(-9, 9, 7).double().unsqueeze(-1)
    first = t.scales[0] * x + t.bias0
    expected = t.scales[1] * torch.nn.functional.leaky_relu(first) + t.bias1
    with torch.no_grad():
        for p in t.own:
            p.zero_()
    assert torch.allclose(t.forward_and_log_det(x)[0], expected)


def test_d12_the_log_det_has_no_epsilon_where_slopes_are_small():
    t = layer(scale=2.0, dim=2)
    x = 30 * torch.randn(50, 2).double()  # every unit is as flat as it gets
    log_det = t.forward_and_log_det(x)[1]
    jacobians = torch.stack([torch.autograd.functional.jacobian(t._call, row) for row in x])
    diagonal = torch.diagonal(jacobians, dim1=-2, dim2=-1)
    assert diagonal.min() < 3e-3
    assert torch.allclose(log_det, diagonal.log().sum(-1), rtol=1e-12, atol=1e-12)


def test_gate_shut_and_open():
    t = layer(residual="gated", scale=0.3)
    x = torch.randn(5, 3).double()
    with torch.no_grad():
        t.gate.fill_(200.0)
        y, log_det = t.forward_and_log_det(x)
        assert torch.allclose(y, x)
        assert log_det.abs().max() < 1e-12
        t.gate.fill_(-200.0)
        y, log_det = t.forward_and_log_det(x)
    assert torch.isfinite(log_det).all()
    assert torch.allclose(t.inverse_and_log_det(y)[0], x)


def test_gradients_of_the_inverse():
    t = layer(dim=2, context_dim=1, hidden_dims=(4,), scale=0.3)
    y, c = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(t.inverse_and_log_det, (y, c), atol=1e-6)


def test_context_changes_shape_not_only_place():
    t = layer(dim=1, context_dim=1, scale=0.5)
    x = torch.linspace(-2, 2, 9).double().unsqueeze(-1)
    a, b = (t.condition(torch.tensor([c]).double()).forward_and_log_det(x)[1] for c in (-2.0, 2.0))
    assert (a - b).std() > 1e-3


def test_orders_turn_round_in_the_flow():
    flow = pf.flow("bnaf", input_dim=3, transforms=2)
    turns = [
        part.transform.turn.tolist()
        for part in flow.transform.modules()
        if hasattr(part, "transform") and isinstance(part.transform, T.BlockAutoregressive)
    ]
    assert [0, 1, 2] in turns
    assert [2, 1, 0] in turns


def test_fits_two_moons_better_than_a_normal():
    torch.manual_seed(0)
    angle = math.pi * torch.rand(400)
    upper = torch.rand(400) < 0.5
    across, up = torch.where(upper, angle.cos(), 1 - angle.cos()), torch.where(upper, angle.sin(), 0.5 - angle.sin())
    x = torch.stack([across, up], -1) + 0.1 * torch.randn(400, 2)
    normal = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    flow = pf.flow("bnaf", input_dim=2, transforms=1)
    adam = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(200):
        adam.zero_grad()
        loss = -flow().log_prob(x).mean()
        loss.backward()
        adam.step()
    assert -loss > normal + 0.4
    samples = flow().sample((200,))
    assert torch.isfinite(samples).all()
    assert samples.abs().max() < 10


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_factors": (0,)},
        {"hidden_factors": (2.5,)},
        {"activation": "relu"},
        {"residual": "skip"},
        {"order": [0, 0, 1]},
    ],
)
def test_bad_options_are_typed(options):
    with pytest.raises(errors.OptionError):
        T.BlockAutoregressive(3, **options)
