"""What Pyro asks of its own transforms, asked of every layer here that has a name of Pyro's, in float64."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, ConditionalDenseNN, DenseNN

from pyroflows import errors
from pyroflows import transforms as T

CONTEXT = 3
ACTIVATIONS = ("tanh", "sigmoid", "ELU", "LeakyReLU")
ORDERS = ("linear", "quadratic")

# Helpers of Pyro's that make a layer on vectors from the number of coordinates.
VECTOR = {
    "affine_autoregressive": T.affine_autoregressive,
    "affine_autoregressive stable": partial(T.affine_autoregressive, stable=True),
    "affine_coupling": T.affine_coupling,
    "householder": partial(T.householder, count_transforms=2),
    "matrix_exponential": T.matrix_exponential,
    "permute": T.permute,
    "planar": T.planar,
    "polynomial": T.polynomial,
    "radial": T.radial,
    "sylvester": T.sylvester,
    **{f"spline_autoregressive {order}": partial(T.spline_autoregressive, order=order) for order in ORDERS},
    **{f"spline_coupling {order}": partial(T.spline_coupling, order=order) for order in ORDERS},
    **{f"neural_autoregressive {a}": partial(T.neural_autoregressive, activation=a) for a in ACTIVATIONS},
    **{f"block_autoregressive {a}": partial(T.block_autoregressive, activation=a) for a in ACTIVATIONS},
    "block_autoregressive normal": partial(T.block_autoregressive, residual="normal"),
    "block_autoregressive gated": partial(T.block_autoregressive, residual="gated"),
}
# Those that keep coordinates apart.
SCALAR = {
    "batchnorm": lambda dim: T.batchnorm(dim).eval(),
    "elu": lambda dim: T.elu(),
    "leaky_relu": lambda dim: T.leaky_relu(),
    **{f"spline {order}": partial(T.spline, order=order) for order in ORDERS},
}
# Those that read a context.
CONDITIONAL = {
    name: getattr(T, name)
    for name in (
        "conditional_affine_autoregressive",
        "conditional_affine_coupling",
        "conditional_block_autoregressive",
        "conditional_householder",
        "conditional_matrix_exponential",
        "conditional_neural_autoregressive",
        "conditional_planar",
        "conditional_polynomial",
        "conditional_radial",
        "conditional_spline",
        "conditional_spline_autoregressive",
        "conditional_spline_coupling",
        "conditional_sylvester",
    )
}
K = 4
DENSE = [K, K, K - 1, K]  # outputs a coordinate of a network for linear splines


def sizes(dim, order="linear"):
    return [dim * k for k in DENSE[: 4 if order == "linear" else 3]]


# Pyro's classes, each with a network of pyro.nn.
CLASSES = {
    "AffineAutoregressive": lambda d: T.AffineAutoregressive(AutoRegressiveNN(d, [4 * d])),
    "AffineAutoregressive stable": lambda d: T.AffineAutoregressive(AutoRegressiveNN(d, [4 * d]), stable=True),
    "AffineCoupling": lambda d: T.AffineCoupling(d // 2, DenseNN(d // 2, [8], [d - d // 2, d - d // 2])),
    "BlockAutoregressive": T.BlockAutoregressive,
    "Householder": partial(T.Householder, count_transforms=2),
    "MatrixExponential": T.MatrixExponential,
    "NeuralAutoregressive": lambda d: T.NeuralAutoregressive(AutoRegressiveNN(d, [4 * d], [6] * 3), hidden_units=6),
    "Planar": T.Planar,
    "Polynomial": lambda d: T.Polynomial(AutoRegressiveNN(d, [4 * d], [15]), d, 4, 3),
    "Radial": T.Radial,
    "Sylvester": lambda d: T.Sylvester(d, 2),
    **{
        f"SplineAutoregressive {order}": lambda d, order=order: T.SplineAutoregressive(
            d, AutoRegressiveNN(d, [4 * d], DENSE[: 4 if order == "linear" else 3]), K, order=order
        )
        for order in ORDERS
    },
    **{
        f"SplineCoupling {order}": lambda d, order=order: T.SplineCoupling(
            d, d // 2, DenseNN(d // 2, [8], sizes(d - d // 2, order)), K, order=order
        )
        for order in ORDERS
    },
    "SplineCoupling identity": lambda d: T.SplineCoupling(
        d, d // 2, DenseNN(d // 2, [8], sizes(d - d // 2)), K, identity=True
    ),
}
CONDITIONAL_CLASSES = {
    "ConditionalAffineAutoregressive": lambda d, c: T.ConditionalAffineAutoregressive(
        ConditionalAutoRegressiveNN(d, c, [4 * d])
    ),
    "ConditionalAffineCoupling": lambda d, c: T.ConditionalAffineCoupling(
        d // 2, ConditionalDenseNN(d // 2, c, [8], [d - d // 2, d - d // 2])
    ),
    "ConditionalHouseholder": lambda d, c: T.ConditionalHouseholder(d, DenseNN(c, [8], [d, d]), 2),
    "ConditionalMatrixExponential": lambda d, c: T.ConditionalMatrixExponential(d, DenseNN(c, [8], [d * d])),
    "ConditionalNeuralAutoregressive": lambda d, c: T.ConditionalNeuralAutoregressive(
        ConditionalAutoRegressiveNN(d, c, [4 * d], [6] * 3), hidden_units=6
    ),
    "ConditionalPlanar": lambda d, c: T.ConditionalPlanar(DenseNN(c, [8], [1, d, d])),
    "ConditionalRadial": lambda d, c: T.ConditionalRadial(DenseNN(c, [8], [d, 1, 1])),
    **{
        f"ConditionalSpline {order}": lambda d, c, order=order: T.ConditionalSpline(
            DenseNN(c, [8], sizes(d, order)), d, K, order=order
        )
        for order in ORDERS
    },
    "ConditionalSplineAutoregressive": lambda d, c: T.ConditionalSplineAutoregressive(
        d, ConditionalAutoRegressiveNN(d, c, [4 * d], DENSE), count_bins=K
    ),
}


class Flattened(dist.transforms.Transform):
    """A layer on points of a shape, as one on vectors, through the methods that Pyro's own tests use."""

    def __init__(self, transform, shape):
        super().__init__()
        self.transform, self.shape = transform, shape
        self.domain = self.codomain = dist.constraints.real_vector
        self.bijective = True
        assert transform.event_dim == len(shape)

    def _call(self, x):
        return self.transform._call(x.unflatten(-1, self.shape)).flatten(-len(self.shape))

    def _inverse(self, y):
        return self.transform._inverse(y.unflatten(-1, self.shape)).flatten(-len(self.shape))

    def log_abs_det_jacobian(self, x, y):
        x, y = (value.unflatten(-1, self.shape) for value in (x, y))
        return self.transform.log_abs_det_jacobian(x, y)

    def parameters(self):
        return getattr(self.transform, "parameters", list)()  # transforms of torch have none


# Layers on points of more than one dimension, and how they are shaped.
SHAPED = {
    "affine_coupling -2": lambda: (T.affine_coupling([4, 2], dim=-2), (4, 2)),
    "AffineCoupling -2": lambda: (T.AffineCoupling(1, DenseNN(2, [8], [6, 6]), dim=-2), (4, 2)),
    "permute -2": lambda: (T.permute([4, 2], dim=-2), (4, 2)),
    "generalized_channel_permute": lambda: (T.generalized_channel_permute(channels=3), (3, 2, 2)),
    "discrete_cosine": lambda: (T.DiscreteCosineTransform(dim=-2), (4, 2)),
    "lower_cholesky_affine": lambda: (
        T.LowerCholeskyAffine(torch.ones(3), torch.rand(3, 3).tril() + torch.eye(3)),
        (3,),
    ),
    "ordered": lambda: (T.OrderedTransform(), (4,)),
    "haar": lambda: (T.HaarTransform(dim=-2), (4, 2)),
}


def perturbed(layer, scale=0.3):
    """As after training: a layer that has just been made hides most mistakes."""
    if isinstance(layer, torch.nn.Module):
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(scale * torch.randn_like(p) / max(1, p.shape[-1] if p.dim() > 1 else 1) ** 0.5)
    return layer


def conditioned(factory, dim):
    """A layer at a context of batch shape (1,), whose parameters are those of the layer, as Pyro's tests have it."""
    layer = perturbed(factory(dim, CONTEXT))
    at = layer.condition(torch.rand(1, CONTEXT))
    at.parameters = lambda: layer.parameters()
    return at


def built(name, dim):
    torch.manual_seed(1)
    for table in (VECTOR, SCALAR, CLASSES):
        if name in table:
            return perturbed(table[name](dim))
    for table in (CONDITIONAL, CONDITIONAL_CLASSES):
        if name in table:
            return conditioned(table[name], dim)
    return Flattened(*(perturbed(part) for part in SHAPED[name]()))


EVERY = [*VECTOR, *SCALAR, *CLASSES, *CONDITIONAL, *CONDITIONAL_CLASSES, *SHAPED]


def size_of(name, dim):
    return torch.Size(SHAPED[name]()[1]).numel() if name in SHAPED else dim


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def unit(shape):
    return dist.Normal(torch.zeros(shape), torch.ones(shape))


@pytest.mark.parametrize("name", EVERY)
def test_jacobian_round_trip_shapes_and_training(name):
    dim = size_of(name, 4)
    t = built(name, dim)
    x = unit((dim,)).sample((10,))
    y = t._call(x)
    back = t._inverse(y)
    assert (back - x).abs().max() < 1e-6
    log_det = t.log_abs_det_jacobian(x, y)
    assert (log_det - t.log_abs_det_jacobian(back, y)).abs().max() < 1e-6
    assert log_det.shape == x.shape[: x.dim() - t.event_dim]

    step, point = 1e-5, x[:1]
    columns = [(t._call(point + h) - t._call(point - h)) / (2 * step) for h in step * torch.eye(dim)]
    jacobian = torch.cat(columns).detach().T  # [i, j] = dy_i / dx_j
    numeric, exact = torch.linalg.slogdet(jacobian)[1], t.log_abs_det_jacobian(point, t._call(point)).sum()
    assert (numeric - exact).abs() < 1e-5
    if getattr(getattr(t, "transform", t), "autoregressive", False):
        layer = getattr(t, "transform", t)
        turned = jacobian[layer.turn][:, layer.turn]
        assert (turned.triu(1) == 0).all()  # exactly: a later coordinate is never read
        assert (turned.diagonal() > 0).all()

    for batch in ((3,), (3, 4), (3, 4, 5)):
        assert dist.TransformedDistribution(unit((*batch, dim)), [t]).sample().shape == (*batch, dim)

    parameters = list(t.parameters()) if hasattr(t, "parameters") else []
    if not parameters:
        return
    base = dist.Normal(torch.arange(dim).double(), 1.0)  # one that a rotation changes
    q, adam = dist.TransformedDistribution(base, [t]), torch.optim.Adam(parameters, lr=1e-3)
    data, scores = torch.rand(1, dim), []
    for _ in range(3):
        adam.zero_grad()
        loss = -q.log_prob(data).mean()
        loss.backward()
        adam.step()
        scores.append(loss.item())
    assert len(set(scores)) == 3  # never a stale one


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [*VECTOR, *SCALAR])
def test_jit_trace(name):
    t = built(name, 3)
    x, other = torch.randn(4, 3), torch.randn(7, 3)
    forth, back = (t, t.inv) if isinstance(t, torch.nn.Module) else (lambda v: t(v), lambda v: t.inv(v))
    assert torch.allclose(torch.jit.trace(forth, x)(other), t._call(other))
    if getattr(t, "inverse", "closed") == "closed":  # a search looks at its numbers
        image = t._call(other).detach()
        assert torch.allclose(torch.jit.trace(back, t._call(x).detach())(image), other)


def model():
    pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("tau", dist.HalfNormal(1.0))


GUIDES = [name for name in VECTOR if name != "permute"]


@pytest.mark.parametrize("name", GUIDES)
def test_autonormalizingflow_of_pyro(name):
    guide = AutoNormalizingFlow(model, partial(T.iterated, 2, VECTOR[name]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step() for _ in range(3)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert list(guide.parameters())


@pytest.mark.parametrize("name", [name for name in (*VECTOR, *CLASSES, *SCALAR) if "elu" not in name])
def test_d4_deepcopy_after_a_call(name):
    t = built(name, 3)
    y = t(torch.randn(5, 3))
    y.sum().backward() if y.requires_grad else None
    twin, x = copy.deepcopy(t), torch.randn(4, 3)
    assert torch.equal(twin(x), t(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in t.parameters()}


@pytest.mark.parametrize("stable", [False, True])
def test_d5_affine_autoregressive_inverts_in_float64(stable):
    torch.set_default_dtype(torch.float32)
    t = T.AffineAutoregressive(AutoRegressiveNN(4, [16]), stable=stable).double()
    x = t.inv(torch.ones(2, 4, dtype=torch.float64))
    assert x.dtype == torch.float64
    assert torch.allclose(t._call(x), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("helper", ["spline_autoregressive", "spline_coupling", "spline"])
def test_d6_helpers_take_the_order_of_the_spline(helper):
    for order, params in (("linear", 31), ("quadratic", 23)):
        t = getattr(T, helper)(4, order=order)
        assert t.map.params == params
    t = T.conditional_spline_autoregressive(4, CONTEXT, order="quadratic")
    assert t.map.order == "quadratic"


def test_d7_matrix_exponential_is_exact():
    torch.manual_seed(0)
    t = perturbed(T.MatrixExponential(5, 3), 1.0)  # however few iterations are asked for
    x = torch.randn(6, 5)
    y = t(x)
    assert (t._inverse(y) - x).abs().max() < 1e-12
    jacobian = torch.autograd.functional.jacobian(t._call, x[0])
    log_det = t.log_abs_det_jacobian(x, y)
    assert log_det.shape == (6,)
    assert (log_det[0] - torch.linalg.slogdet(jacobian)[1]).abs() < 1e-12


def test_d8_a_log_det_is_that_of_the_points_asked_for():
    t = built("neural_autoregressive sigmoid", 3)
    x, other = torch.randn(5, 3), torch.randn(5, 3)
    y = t(x)
    expected = t.forward_and_log_det(x)[1]
    t(other)
    assert torch.equal(t.log_abs_det_jacobian(x, y), expected)


@pytest.mark.parametrize("name", [*CONDITIONAL, *CONDITIONAL_CLASSES])
def test_d10_a_context_gives_its_batch_shape(name):
    torch.manual_seed(0)
    layer = perturbed({**CONDITIONAL, **CONDITIONAL_CLASSES}[name](4, CONTEXT))
    context = torch.randn(6, CONTEXT)
    base = unit((4,)).to_event(1)
    q = dist.ConditionalTransformedDistribution(base, [layer]).condition(context)
    y = q.sample((10,))
    assert y.shape == (10, 6, 4)
    assert q.log_prob(y).shape == (10, 6)
    row = dist.ConditionalTransformedDistribution(base, [layer]).condition(context[2])
    assert torch.allclose(row.log_prob(y[:, 2]), q.log_prob(y)[:, 2])
    if "ouseholder" not in name:  # a rotation of a standard normal is one
        other = dist.ConditionalTransformedDistribution(base, [layer]).condition(context + 1)
        assert not torch.allclose(other.log_prob(y), q.log_prob(y))


@pytest.mark.parametrize("name", [*CONDITIONAL, *CONDITIONAL_CLASSES])
def test_conditional_layers_compose_as_pyros_do(name):
    """In Pyro's own composition, forth and back, beside layers of Pyro's and of torch's, and out of a pickle."""
    torch.manual_seed(0)
    factory = {**CONDITIONAL, **CONDITIONAL_CLASSES}[name]
    first, second = (perturbed(factory(4, CONTEXT)) for _ in range(2))
    parts = [first, pyro_transforms.permute(4), pyro_transforms.conditional_affine_coupling(4, CONTEXT), second]
    parts.append(pyro_transforms.AffineTransform(1.0, 2.0))
    stack = dist.conditional.ConditionalComposeTransformModule(parts)
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    assert {id(p) for p in stack.parameters()} == {id(p) for part in modules for p in part.parameters()}
    context, x = torch.randn(6, CONTEXT), torch.randn(5, 6, 4)
    at = stack.condition(context)
    y, expected = at(x), x
    for part in parts:
        expected = (part.condition(context) if hasattr(part, "condition") else part)(expected)
    assert torch.allclose(y, expected)
    assert torch.allclose(at.inv(y), x)
    assert torch.equal(pickle.loads(pickle.dumps(stack)).condition(context)(x), y)
    back = dist.conditional.ConditionalComposeTransformModule([first.inv, second.inv]).condition(context)
    assert torch.allclose(back.inv(back(x).clone()), x)
    q = dist.ConditionalTransformedDistribution(unit((4,)).to_event(1), [stack]).condition(context)
    score = unit((4,)).to_event(1).log_prob(x) - at.log_abs_det_jacobian(x, y)
    assert torch.allclose(q.log_prob(y), score)


def test_normalize():
    t = T.Normalize()
    y = t(torch.randn(5, 4))
    assert torch.allclose(y.norm(dim=-1), torch.ones(5))
    assert torch.equal(t.inv(y), y)
    assert not t.bijective


def test_d9_a_batched_context_of_a_channel_permutation():
    nn = DenseNN(2, [8], param_dims=[9])
    t = T.ConditionalGeneralizedChannelPermute(nn, channels=3).condition(torch.randn(6, 2))
    x = torch.randn(6, 3, 4, 4)
    y, log_det = t.forward_and_log_det(x)
    assert log_det.shape == (6,)
    assert torch.allclose(t._inverse(y), x)
    helper = T.conditional_generalized_channel_permute(2, 3).condition(torch.randn(6, 2))
    assert helper(x).shape == x.shape


def test_d12_no_epsilon_in_a_log_det():
    for name in ("block_autoregressive tanh", "neural_autoregressive sigmoid", "polynomial"):
        t = built(name, 3)
        x = torch.randn(3)
        jacobian = torch.autograd.functional.jacobian(t._call, x)
        exact = t.forward_and_log_det(x)[1]
        assert (exact - torch.linalg.slogdet(jacobian)[1]).abs() < 1e-12


# --- the networks --------------------------------------------------------------------------------------


def test_parameters_come_in_the_order_of_pyros_networks():
    """Values against the formulas, with the outputs of the network written out."""
    given = {}

    class Fixed(torch.nn.Module):
        input_dim = permutation = None

        def forward(self, *inputs, context=None):
            rows = torch.broadcast_shapes(*(v.shape[:-1] for v in (*inputs, *(() if context is None else (context,)))))
            return tuple(p.expand(*rows, *p.shape) for p in given["parts"])

    net = Fixed()
    x = torch.tensor([0.4, -1.0, 2.0])
    given["parts"] = (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.3]))
    y = T.AffineCoupling(1, net)(x)
    scale = torch.exp(3 * torch.tanh(torch.tensor(0.1)))
    assert torch.allclose(y, torch.stack([x[0], x[1] + 1, x[2] * scale + 2]))

    net.permutation = torch.tensor([0, 1, 2])
    given["parts"] = (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, -0.5]))
    y = T.AffineAutoregressive(net)(x)
    low = torch.exp(5 * torch.tanh(torch.tensor(-0.1)))
    assert torch.allclose(y, torch.stack([x[0] + 1, x[1] + 2, x[2] * low + 3]))
    y = T.AffineAutoregressive(net, sigmoid_bias=1.0, stable=True)(x)
    gate = torch.sigmoid(1.0 + 6 * torch.tanh(given["parts"][1] / 6))
    assert torch.allclose(y, gate * x + (1 - gate) * given["parts"][0])

    bias, u, w = torch.tensor([0.2]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    given["parts"] = (bias, u, w)
    y = T.ConditionalPlanar(net, context_dim=2).condition(torch.zeros(2))(x)
    push = (y - x)[1] / torch.tanh(x[0] + 0.2)
    assert torch.allclose(y - x, push * torch.tanh(x[0] + 0.2) * u)
    assert 0 < push < 1

    given["parts"] = (torch.tensor([0.4, -1.0, 2.0]), torch.tensor([0.5]), torch.tensor([1.0]))
    y = T.ConditionalRadial(net, context_dim=2).condition(torch.zeros(2))(x)
    assert torch.allclose(y, x)  # at its centre

    given["parts"] = (torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    y = T.ConditionalHouseholder(3, net, 2, context_dim=2).condition(torch.zeros(2))(x)
    assert torch.allclose(y, x * torch.tensor([-1.0, -1.0, 1.0]))

    spline = T.Spline(3, K, 2.0)
    with torch.no_grad():
        spline.raw.normal_()
    raw = spline.raw.split(DENSE, -1)
    given["parts"] = tuple(part.flatten() for part in raw)
    y = T.ConditionalSpline(net, 3, K, 2.0, context_dim=2).condition(torch.zeros(2))(x)
    assert torch.allclose(y, spline(x))
    given["parts"] = tuple(part.mT for part in raw)  # as an autoregressive network gives them
    y = T.ConditionalSpline(net, 3, K, 2.0, context_dim=2).condition(torch.zeros(2))(x)
    assert torch.allclose(y, spline(x))
    y = T.SplineAutoregressive(3, net, K, 2.0)(x)
    assert torch.allclose(y, spline(x))


def test_networks_are_at_hand():
    arn = AutoRegressiveNN(3, [12])
    t = T.AffineAutoregressive(arn)
    assert t.arn is arn
    assert t.input_dim == 3
    assert t.turn.tolist() == arn.permutation.tolist()
    dense = DenseNN(2, [8], [1, 3, 3])
    assert T.ConditionalPlanar(dense).nn is dense
    assert T.ConditionalPlanar(dense).input_dim == 3


def test_the_width_of_a_context_is_found():
    plain = torch.nn.Sequential(torch.nn.Linear(5, 9))
    assert T.ConditionalMatrixExponential(3, plain).context_dim == 5
    assert T.ConditionalAffineAutoregressive(ConditionalAutoRegressiveNN(3, 2, [9])).context_dim == 2
    assert T.ConditionalMatrixExponential(3, lambda c: c.repeat_interleave(9, -1), context_dim=1).context_dim == 1
    with pytest.raises(errors.OptionError, match="context_dim"):
        T.ConditionalMatrixExponential(3, lambda c: c)
    with pytest.raises(errors.ContextError, match="condition"):
        T.ConditionalMatrixExponential(3, plain)(torch.zeros(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.AffineAutoregressive(AutoRegressiveNN(3, [9]), log_scale_max_clip=-1.0),
        lambda: T.AffineAutoregressive(torch.nn.Linear(3, 6)),
        lambda: T.AffineCoupling(1, DenseNN(1, [8], [2, 2]), dim=0),
        lambda: T.SplineCoupling(3, 3, None),
        lambda: T.MatrixExponential(3, normalization="weight"),
        lambda: T.MatrixExponential(3, bound=0.0),
        lambda: T.Sylvester(3, 0),
        lambda: T.affine_autoregressive(3, scale="softplus", log_scale_min_clip=-1.0),
        lambda: T.affine_autoregressive(3, scale="softplus", stable=True),
    ],
)
def test_bad_options_are_typed(make):
    with pytest.raises(errors.OptionError):
        make()


def test_too_few_entries_are_typed():
    with pytest.raises(errors.ShapeError, match="split_dim"):
        T.AffineCoupling(3, DenseNN(3, [8], [2, 2]))(torch.zeros(5, 3))
