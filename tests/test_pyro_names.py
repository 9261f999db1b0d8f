"""Pyro's helper names: Pyro's argument order, its defaults, and typed refusals."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyroflows import errors
from pyroflows import transforms as T


def unit(shape):
    return dist.Normal(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


def test_event_dimensions_above_one():
    for t in (T.affine_coupling([4, 3], dim=-2), T.permute((4, 3), dim=-2)):
        assert t.domain.event_dim == 2
        q = dist.TransformedDistribution(unit((5, 4, 3)), [t.double()])
        assert q.batch_shape == (5,)
        x = q.sample()
        assert q.log_prob(x).shape == (5,)
        assert torch.allclose(t(t.inv(x.clone())), x)
    swapped = T.permute((4, 3), torch.tensor([3, 2, 1, 0]), dim=-2)
    x = torch.randn(2, 4, 3)
    assert torch.equal(swapped(x), x.flip(-2))
    c = T.conditional_affine_coupling([4, 3], 2, dim=-2).condition(torch.randn(6, 2))
    assert dist.TransformedDistribution(unit((4, 3)).to_event(2), [c.double()]).batch_shape == (6,)


def test_argument_order_is_pyros():
    assert T.affine_autoregressive(3, [7]).net.layers[0].bias.shape == (7,)
    assert T.affine_autoregressive(3).net.layers[0].bias.shape == (10,)
    assert T.affine_coupling(4, [7], 1).kept.tolist() == [0]
    assert T.spline_coupling(4, 3, [7], 5, 2.0).map.bins == 5
    assert T.spline_autoregressive(4, [7], 5, 2.0).map.bound == 2.0
    assert T.spline(2, count_bins=4, bound=1.0, order="quadratic").map.order == "quadratic"
    assert T.conditional_spline(2, 3, [7], 4, 1.0, "quadratic").context_dim == 3
    assert T.permute(3, torch.tensor([2, 0, 1]))(torch.tensor([1.0, 2.0, 3.0])).tolist() == [3.0, 1.0, 2.0]


def test_signs_and_cdf():
    assert T.permute(3, [1, 0, 2]).sign == -1
    assert T.permute(3, [1, 2, 0]).sign == 1
    assert T.Compose([T.permute(3, [1, 0, 2]), T.affine(3)]).inv.sign == -1
    q = dist.TransformedDistribution(unit((2,)), [T.spline(2).double()])
    x = q.sample((5,))
    assert torch.allclose(q.icdf(q.cdf(x)), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.permute(3, [0, 0, 1]),
        lambda: T.permute(3, [0, 1]),
        lambda: T.affine_coupling(3, split_dim=3),
        lambda: T.affine_coupling(3, dim=-2),
        lambda: T.spline(2, count_bins=1),
        lambda: T.spline(2, bound=0.0),
        lambda: T.spline(2, order="cubic"),
        lambda: T.affine(2, scale="exp"),
        lambda: T.affine_autoregressive(3, order=[0, 0, 1]),
        lambda: T.affine_autoregressive(3, [0]),
        lambda: T.affine_autoregressive(3, 16),
        lambda: T.affine_autoregressive(3, [8, 4], residual=True),
        lambda: T.affine_autoregressive(3, activation="rulu"),
        lambda: T.Compose([]),
        lambda: T.Compose([T.affine(2, context_dim=1), T.affine(2, context_dim=2)]),
        lambda: T.Wrapped(torch.distributions.transforms.AbsTransform()),
        lambda: T.Coupling(T.Affine(), 2, mask=[True, True]),
        lambda: T.Elementwise(T.Affine(), 2, event_dim=2),
        lambda: T.ActNorm(2, max_log_scale=0.0),
        lambda: T.affine(2, context_dim=-1),
    ],
)
def test_bad_options_are_typed(make):
    with pytest.raises(errors.OptionError):
        make()


def test_wrong_width_is_typed():
    for t in (T.affine(2), T.affine_coupling(2), T.affine_autoregressive(2), T.LULinear(2), T.permute(2)):
        for call in (t, t.inv):
            with pytest.raises(errors.ShapeError, match="2"):
                call(torch.zeros(4, 3))


def test_spline_values_against_a_second_derivation():
    """The rational-quadratic spline of one bin pair, computed from its interpolation conditions."""
    layer = T.spline(1, count_bins=2, bound=1.0, order="quadratic").double()
    with torch.no_grad():
        layer.raw.copy_(torch.tensor([[0.3, -0.2, -0.5, 0.4, 0.7]], dtype=torch.float64))
    share = [0.001 + 0.998 * math.exp(0.3) / (math.exp(0.3) + math.exp(-0.2))]
    height = [0.001 + 0.998 * math.exp(-0.5) / (math.exp(-0.5) + math.exp(0.4))]
    knot_x, knot_y = 2 * share[0] - 1, 2 * height[0] - 1
    slope = math.exp(math.log(1e3) * math.tanh(0.7 / math.log(1e3)))

    def value(x):
        left = x < knot_x
        x0, x1 = (-1.0, knot_x) if left else (knot_x, 1.0)
        y0, y1 = (-1.0, knot_y) if left else (knot_y, 1.0)
        d0, d1 = (1.0, slope) if left else (slope, 1.0)
        s, t = (y1 - y0) / (x1 - x0), (x - x0) / (x1 - x0)
        over = (y1 - y0) * (s * t * t + d0 * t * (1 - t))
        return y0 + over / (s + (d1 + d0 - 2 * s) * t * (1 - t))

    for x in (-0.99, -0.5, knot_x, 0.1, 0.8):
        assert layer(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(value(x), abs=1e-12)
    assert layer(torch.tensor([knot_x], dtype=torch.float64)).item() == pytest.approx(knot_y, abs=1e-12)
