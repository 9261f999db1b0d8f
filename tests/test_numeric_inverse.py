"""Layers whose inverse is a search: the laws hold for them, and a search that fails says so."""

import pytest
import torch

from pyroflows.errors import InverseNotConverged
from pyroflows.numerics import positive
from pyroflows.testing import check_transform
from pyroflows.transforms import Affine, Autoregressive, Compose, Coupling, Elementwise, NumericMap


class Bumps(NumericMap):
    """y = a x + b tanh(c x + d), with a, b > 0: no formula for its inverse."""

    params = 4

    def forward(self, x, params):
        a, b, c, d = params.unbind(-1)
        a, b = positive(a, 0.1), positive(b - 3)
        c = positive(c)
        bend = torch.tanh(c * x + d)
        slope = a + b * c * (1 - bend) * (1 + bend)
        return a * x + b * (bend - torch.tanh(d)), torch.log(slope)


class Wall(NumericMap):
    """Reaches (-1, 1) only, and does not say so."""

    params = 1

    def forward(self, x, params):
        y = torch.tanh(x) + 0 * params[..., 0]
        return y, torch.log1p(-y * y)


def elementwise(input_dim, *, context_dim=0):
    return Elementwise(Bumps(), input_dim, context_dim=context_dim, hidden_dims=(8,))


def coupling(input_dim, *, context_dim=0):
    return Coupling(Bumps(), input_dim, context_dim=context_dim, hidden_dims=(8,), activation="silu")


def autoregressive(input_dim, *, context_dim=0):
    return Autoregressive(Bumps(), input_dim, context_dim=context_dim, hidden_dims=(8,), activation="silu")


def stack(input_dim, *, context_dim=0):
    return Compose([autoregressive(input_dim, context_dim=context_dim).inv, Elementwise(Affine(), input_dim)])


@pytest.mark.slow
@pytest.mark.parametrize("factory", [elementwise, coupling, autoregressive, stack])
def test_laws(factory):
    report = check_transform(factory, input_dims=(1, 3), scales=(0.5, 2.0))
    assert report.ok
    assert factory(2).inverse == "numeric"


@pytest.mark.parametrize("factory", [elementwise, autoregressive])
def test_N22_samples_reach_the_far_tails(factory):
    layer = factory(2).double()
    for reach in (1.0, 1e3, 1e6, 1e12):
        y = reach * torch.randn(64, 2, dtype=torch.float64)
        x = layer.inv(y.clone())
        assert bool(((layer(x.clone()) - y).abs() <= 1e-12 * (1 + y.abs())).all())


def test_gradients_are_implicit():
    layer = elementwise(2).double()
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    raw = layer.raw

    def inverse(y, raw):
        return layer.map.backward(y, raw)

    assert torch.autograd.gradcheck(inverse, (y, raw))
    assert torch.autograd.gradgradcheck(lambda y, raw: inverse(y, raw)[0], (y, raw))


def test_what_cannot_be_reached_is_an_error():
    layer = Elementwise(Wall(), 2)
    with pytest.raises(InverseNotConverged, match="2 of 4 roots") as caught:
        layer.inv(torch.tensor([[0.5, 3.0], [-7.0, 0.0]]))
    assert caught.value.count == 2
    assert caught.value.residual > 1


def test_one_row_that_cannot_be_reached_names_itself_among_many():
    layer = Elementwise(Wall(), 1)
    y = torch.linspace(-0.9, 0.9, 19).unsqueeze(-1)
    good = layer.inv(y.clone())
    assert bool(good.isfinite().all())
    with pytest.raises(InverseNotConverged, match="1 of 20"):
        layer.inv(torch.cat([y, torch.full((1, 1), 1.5)]))


def test_residual_is_measured():
    layer = elementwise(3)
    y = torch.randn(7, 3)
    assert layer.inverse_residual(y).shape == (7,)
    assert float(layer.inverse_residual(y).max()) < 1e-5


def test_nan_rows_stay_nan_alone():
    layer = elementwise(2)
    y = torch.tensor([[0.5, 1.0], [torch.nan, 1.0]])
    x = layer.inv(y)
    assert bool(x[0].isfinite().all())
    assert bool(x[1, 0].isnan())
    assert torch.allclose(x[0], layer.inv(y[:1])[0])
