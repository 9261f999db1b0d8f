"""Compositions whose parts work on points of different dimensions."""

import pytest
import torch
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform, ReshapeTransform, TanhTransform

import pyroflows as pf
from pyroflows.transforms import Affine, Compose, Elementwise, VectorToCholesky, affine


def layers(width):
    """Vectors to lower triangles: a matrix has more dimensions than what it is made of."""
    torch.manual_seed(0)
    start = affine(width).double()
    start.start_from(raw=torch.randn(width, 2))
    return start, VectorToCholesky()


COMPOSITIONS = {
    "vectors, then matrices": (lambda: Compose([*layers(3)]), (3,), (1, 2)),
    "matrices, then vectors": (lambda: Compose([*layers(3)]).inv, (2, 2), (2, 1)),
    "there and back": (lambda: Compose([*layers(3), VectorToCholesky().inv, affine(3).double()]), (3,), (1, 1)),
    "one in another": (lambda: Compose([affine(3).double(), Compose([*layers(3)])]), (3,), (1, 2)),
    "numbers in the middle": (
        lambda: Compose([*layers(6)[:1], ReshapeTransform((6,), (2, 3)), TanhTransform(), ExpTransform()]),
        (6,),
        (1, 2),
    ),
    "numbers first": (lambda: Compose([Elementwise(Affine(), 3, event_dim=0).double(), *layers(3)]), (3,), (1, 2)),
    "numbers alone": (lambda: Compose([TanhTransform(), ExpTransform()]), (), (0, 0)),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_log_det_is_summed_over_the_right_dimensions(name):
    build, shape, event_dims = COMPOSITIONS[name]
    t = build()
    assert (t.domain.event_dim, t.codomain.event_dim) == event_dims
    x = torch.rand(4, *shape).double() + 0.1
    if len(shape) == 2:
        x = torch.tril(x)
    y, log_det = t.forward_and_log_det(x)
    back, minus = t.inverse_and_log_det(y)
    assert log_det.shape == (4,)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -log_det)
    flat = [value[0].detach().flatten() != 0 for value in (x, y)]  # a triangle has entries that never move
    jacobian = torch.autograd.functional.jacobian(lambda x: t.forward_and_log_det(x)[0], x[0])
    square = jacobian.reshape(flat[1].numel(), flat[0].numel())[flat[1]][:, flat[0]]
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(square)[1])


def test_torch_composes_to_the_same_event_dims():
    for build, _, event_dims in COMPOSITIONS.values():
        t = build()
        torchs = torch.distributions.ComposeTransform(list(t) if isinstance(t, Compose) else [t])
        assert (torchs.domain.event_dim, torchs.codomain.event_dim) == event_dims


def test_a_context_is_no_dimension_of_the_matrix():
    flow = pf.flow("maf", input_dim=3, context_dim=2, support=constraints.positive_definite)
    at = flow.transform.condition(torch.zeros(6, 2))
    assert (at.forward_shape((3,)), at.inverse_shape((2, 2))) == ((6, 2, 2), (6, 3))
    d = flow(torch.zeros(6, 2))
    assert (d.batch_shape, d.event_shape) == ((6,), (2, 2))
    x = d.expand((5, 6)).sample((4,))
    assert d.log_prob(x).shape == x.shape[:3] == (4, 5, 6)
