"""Linear layers and normalisation: the matrices that they claim to be, their extremes, and what moves statistics."""

import os
import socket

import pyro.distributions as dist
import pytest
import torch

import pyroflows.transforms as T
from pyroflows.errors import OptionError

D = 4
LAYERS = {
    "lu": lambda **o: T.LULinear(D, **o),
    "plu": lambda **o: T.LULinear(D, permutation="random", **o),
    "qr": lambda **o: T.QRLinear(D, **o),
    "svd": lambda **o: T.SVDLinear(D, **o),
    "lower": lambda **o: T.TriangularLinear(D, **o),
    "upper": lambda **o: T.TriangularLinear(D, "upper", **o),
    "low_rank": lambda **o: T.LowRankLinear(D, 2, **o),
    "cayley": lambda **o: T.Orthogonal(D, **o),
    "exponential": lambda **o: T.Orthogonal(D, "exponential", **o),
    "householder": lambda **o: T.Orthogonal(D, "householder", **o),
    "matrix_exponential": lambda **o: T.MatrixExponential(D, **o),
}
ROTATIONS = ("cayley", "exponential", "householder")


def drawn(layer, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def matrix_of(layer):
    """The columns are the images of the unit vectors."""
    zero = layer(torch.zeros(D, dtype=torch.float64))
    return (layer(torch.eye(D, dtype=torch.float64)) - zero).mT.detach()


@pytest.mark.parametrize("name", LAYERS)
def test_d22_every_linear_layer_is_inverted_as_its_matrix_is(name):
    layer = drawn(LAYERS[name]())
    matrix, y = matrix_of(layer), torch.randn(7, D, dtype=torch.float64)
    shift = layer(torch.zeros(D, dtype=torch.float64))
    want = torch.linalg.solve(matrix, (y - shift).mT).mT
    x, log_det = layer.inverse_and_log_det(y)
    torch.testing.assert_close(x, want, rtol=1e-9, atol=1e-9)
    sign, log_abs = torch.linalg.slogdet(matrix)
    torch.testing.assert_close(log_det, -log_abs.expand(7), rtol=1e-9, atol=1e-9)
    assert sign == layer.sign


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_of_each_row_is_that_of_its_context(name):
    layer = drawn(LAYERS[name](context_dim=2, hidden_dims=(8,)), 0.5)
    x, context = torch.randn(5, D, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x, context)
    for i in range(5):
        at = layer.condition(context[i])
        torch.testing.assert_close(matrix_of(at) @ x[i] + at(torch.zeros_like(x[i])), y[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.linalg.slogdet(matrix_of(at))[1], log_det[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "plu"])
def test_a_new_layer_is_the_identity(name):
    torch.testing.assert_close(matrix_of(LAYERS[name]().double()), torch.eye(D, dtype=torch.float64))


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_orthogonal(name):
    matrix = matrix_of(drawn(LAYERS[name](), 3.0))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(D, dtype=torch.float64))
    assert torch.linalg.det(matrix) > 0


def test_rotation_of_the_plane():
    """Both of a skew matrix: the exponential turns by its entry a, Cayley's transform by 2 arctan a."""
    for kind, angle in (("exponential", 0.7), ("cayley", 2 * torch.atan(torch.tensor(0.7)).item())):
        layer = T.Orthogonal(2, kind).double()
        with torch.no_grad():
            layer.raw[1, 0] = 0.7 if kind == "exponential" else -0.7
        y = layer(torch.tensor([1.0, 0.0], dtype=torch.float64))
        want = torch.tensor([angle], dtype=torch.float64)
        torch.testing.assert_close(y, torch.cat([want.cos(), want.sin()]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [200.0, -200.0])
def test_n20_n27_extreme_parameters_leave_an_inverse(name, value):
    """Near-singular factors: the log-det is finite, and so are both directions and their gradients."""
    layer = LAYERS[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    x = torch.randn(5, D, dtype=torch.float64)
    for run in (layer.forward_and_log_det, layer.inverse_and_log_det):
        image, log_det = run(x)
        assert image.isfinite().all()
        assert log_det.isfinite().all()
        grads = torch.autograd.grad(image.sum() + log_det.sum(), list(layer.parameters()), allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)


def test_n27_the_log_det_of_a_tiny_pivot_is_exact():
    layer = T.LULinear(D).double()
    with torch.no_grad():
        layer.diagonal.fill_(-200.0)  # the floor of a thousandth
    want = D * torch.tensor(1e-3, dtype=torch.float64).log()
    torch.testing.assert_close(layer.forward_and_log_det(torch.zeros(D, dtype=torch.float64))[1], want)
    x = torch.randn(3, D, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse_and_log_det(layer.forward_and_log_det(x)[0])[0], x)


def test_the_shift_of_an_lu_layer_comes_first_so_a_large_one_is_not_solved_for():
    """Solving for y - b would multiply the rounding of a large b by the inverse of the matrix, here 300."""
    layer = T.LULinear(D)
    with torch.no_grad():
        layer.diagonal.fill_(-6.0)
        layer.bias.fill_(1000.0)
    y = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    exact = T.LULinear(D).double()
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(exact(torch.zeros(D, dtype=torch.float64)), (matrix_of(exact) @ exact.bias).detach())
    off = (layer.inverse_and_log_det(y)[0].double() - exact.inverse_and_log_det(y.double())[0]).abs().max()
    assert off < 4e-4  # half a unit in the last place of 2000 and of a solve, and not 300 times as much


def test_low_rank_is_a_diagonal_and_a_low_rank():
    layer = drawn(T.LowRankLinear(6, 2))
    zero = torch.zeros(6, dtype=torch.float64)
    matrix = (layer(torch.eye(6, dtype=torch.float64)) - layer(zero)).mT.detach()
    diagonal = 1e-3 + torch.nn.functional.softplus(layer.diagonal + torch.tensor(1 - 1e-3).double().expm1().log())
    assert torch.linalg.matrix_rank(matrix / diagonal.detach()[:, None] - torch.eye(6), atol=1e-6) == 2


@pytest.mark.parametrize("u", [-1e4, -1.0, 1.0, 1e4])
def test_a_step_of_rank_one_is_never_singular(u):
    layer = T.LowRankLinear(D).double()
    with torch.no_grad():
        layer.u.fill_(u)
        layer.v.fill_(3.0)
    x = torch.randn(5, D, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(layer.inverse_and_log_det(y)[0], x)
    assert (log_det > -5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for name in LAYERS:
        layer = LAYERS[name]().to(dtype)
        y, log_det = layer.forward_and_log_det(torch.ones(2, D, dtype=dtype))
        x, _ = layer.inverse_and_log_det(y)
        assert y.dtype == x.dtype == dtype
        assert log_det.dtype == torch.float32
        torch.testing.assert_close(x, torch.ones_like(x), rtol=2e-2, atol=2e-2)


def test_permutations():
    x = torch.arange(5.0)
    assert T.permute(5, "reverse")(x).tolist() == [4, 3, 2, 1, 0]
    torch.manual_seed(1)
    order = torch.randperm(5)
    torch.manual_seed(1)
    assert torch.equal(T.permute(5, "random").permutation, order)
    turn = T.Permute(torch.tensor([2, 0, 1]), dim=-2)
    assert turn.with_cache(1).dim == -2  # D24: Pyro's forgets it
    assert "permutation" in turn.state_dict()  # D24: Pyro's is no buffer
    assert torch.equal(turn.inv_permutation, torch.tensor([1, 2, 0]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: T.Orthogonal(3, "lie"),
        lambda: T.Orthogonal(3, "householder", reflections=3),
        lambda: T.QRLinear(3, reflections=0),
        lambda: T.TriangularLinear(3, "left"),
        lambda: T.LowRankLinear(3, 0),
        lambda: T.LULinear(3, permutation="backwards"),
        lambda: T.LULinear(3, permutation=[0, 0, 1]),
        lambda: T.permute(3, [0, 1]),
        lambda: T.Permutation([0, 1], dim=0),
        lambda: T.BatchNorm(3, momentum=2.0),
        lambda: T.BatchNorm(3, epsilon=0.0),
        lambda: T.ActNorm(3, max_log_scale=0.0),
    ],
)
def test_options_that_mean_nothing(build):
    with pytest.raises(OptionError):
        build()


# --- normalisation ---------------------------------------------------------------------------------------


def test_batchnorm_as_pyro_tests_it():
    for d in (2, 5):
        layer = T.batchnorm(d)
        layer._inverse(torch.normal(torch.arange(0.0, d), torch.arange(1.0, 1.0 + d) / d))
        layer.eval()
        layer = layer.double()
        x = torch.randn(6, d, dtype=torch.float64)
        y = layer._call(x)
        torch.testing.assert_close(layer._inverse(y), x)
        jacobian = torch.autograd.functional.jacobian(layer._call, x[0])
        torch.testing.assert_close(layer.log_abs_det_jacobian(x[0], y[0]), torch.diagonal(jacobian).log())
        assert layer.log_abs_det_jacobian(x, y).shape == (6, d)


def test_batchnorm_normalises_and_only_its_doors_move_it():
    torch.manual_seed(0)
    layer, y = T.BatchNorm(2), 3 + 2 * torch.randn(500, 2)
    layer.initialize(y)
    x, _ = layer.inverse_and_log_det(y)
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(2), atol=1e-4, rtol=0)
    before = layer.moving_mean.clone()
    layer.train()
    layer.inverse_and_log_det(y + 9)
    layer.forward_and_log_det(y)
    layer(y)
    assert torch.equal(layer.moving_mean, before)
    layer.eval()
    layer.inv(y + 9)
    assert torch.equal(layer.moving_mean, before)
    layer.train()
    layer.inv(y + 9)
    torch.testing.assert_close(layer.moving_mean, before + 0.1 * 9)
    before = layer.moving_mean.clone()
    layer.inv(layer(x))  # a sample of its own teaches it nothing
    assert torch.equal(layer.moving_mean, before)
    layer.inv(y[:1])  # one row has no variance
    assert torch.equal(layer.moving_mean, before)


def test_batchnorm_in_training_is_a_density_all_the_same():
    """What Pyro's is not: the training log_prob integrates to one, and other rows do not matter."""
    layer = T.BatchNorm(1)
    layer.initialize(torch.tensor([[-1.0], [0.0], [4.0]]))
    layer.momentum = 0.0
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(1), 1.0), [layer])
    grid = torch.linspace(-30, 30, 4001)[:, None]
    layer.train()
    assert torch.trapezoid(d.log_prob(grid).exp()[:, 0], grid[:, 0]).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(d.log_prob(grid[:7]), d.log_prob(grid)[:7])


def test_batchnorm_learns_the_moments_under_pyros_distribution():
    torch.manual_seed(0)
    layer = T.BatchNorm(2).train()
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [layer])
    for _ in range(100):
        d.log_prob(torch.tensor([5.0, -2.0]) + 3 * torch.randn(200, 2))
    torch.testing.assert_close(layer.moving_mean, torch.tensor([5.0, -2.0]), atol=0.3, rtol=0)
    torch.testing.assert_close(layer.moving_variance, torch.full((2,), 9.0), atol=1.0, rtol=0)


def _rank(rank, port, rows, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    layers = T.ActNorm(2), T.BatchNorm(2)
    for layer in layers:
        layer.initialize(rows[rank])
    results[rank] = [value for layer in layers for value in layer.state_dict().values()]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_statistics_of_all_ranks():
    """Two processes with different rows, one of them with a single one, start as one process with all of them."""
    torch.manual_seed(0)
    rows = [5 + torch.randn(40, 2), torch.randn(1, 2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (port, rows, results), nprocs=2)
        layers = T.ActNorm(2), T.BatchNorm(2)
        for layer in layers:
            layer.initialize(torch.cat(rows))
        for rank in range(2):
            want = [value for layer in layers for value in layer.state_dict().values()]
            torch.testing.assert_close(results[rank], want)
