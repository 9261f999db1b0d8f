"""Image layers and flows, and distributions of pixels, in what is special to them."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.func import jacrev

import pyroflows as pf
from pyroflows.distributions import Base, Dequantized, Flow, bits_per_dim, dequantizer, glow, logit_interval
from pyroflows.errors import ContextError, LawViolation, OptionError, ShapeError
from pyroflows.nets import CNN
from pyroflows.testing import check, check_transform
from pyroflows.transforms import (
    Affine,
    Compose,
    FactorOut,
    GeneralizedChannelPermute,
    Haar,
    ImageCoupling,
    InvertibleConv1x1,
    LULinear,
    Pixelwise,
    Squeeze,
    affine,
    channel_actnorm,
    conditional_generalized_channel_permute,
    generalized_channel_permute,
    image_coupling,
    largest_levels,
    multi_scale,
    with_input_dims,
)


def shaken(module, scale=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            parameter.add_(noise * scale / math.sqrt(fan_in))
    return module


def slogdet(function, x):
    size = x.numel()
    return torch.linalg.slogdet(jacrev(function)(x).reshape(size, size))[1]


# --- squeezes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_squeeze_is_pixel_unshuffle(factor):
    x = torch.randn(5, 4, 2, 6, 12)
    layer = Squeeze((2, 6, 12), factor=factor)
    y, log_det = layer.forward_and_log_det(x)
    assert torch.equal(y, torch.nn.functional.pixel_unshuffle(x, factor))
    assert torch.equal(layer.inv(y), x)
    assert torch.equal(log_det, torch.zeros(5, 4))


def test_squeeze_of_oblong_blocks():
    layer = Squeeze((1, 2, 6), factor=(2, 3))
    x = torch.arange(12.0).reshape(1, 2, 6)
    y = layer(x)
    assert y.shape == layer.forward_shape(x.shape) == (6, 1, 2)
    assert y[:, 0, 0].tolist() == [0, 1, 2, 6, 7, 8]
    assert layer.inverse_shape(y.shape) == x.shape
    assert torch.equal(layer.inv(y), x)


def test_haar_keeps_lengths_and_averages_first():
    x = torch.randn(7, 3, 4, 6, dtype=torch.float64)
    layer = Haar((3, 4, 6))
    y = layer(x)
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    torch.testing.assert_close(y[:, :3], 2 * torch.nn.functional.avg_pool2d(x, 2))
    torch.testing.assert_close(layer.inv(y.clone()), x)
    flat = layer(torch.full((3, 4, 6), 1.5, dtype=torch.float64))
    assert torch.equal(flat[3:], torch.zeros_like(flat[3:]))


@pytest.mark.parametrize("layer", [Squeeze, Haar])
def test_laws_of_the_squeezes(layer):
    there_and_back = Compose([layer((2, 4, 4)), layer((2, 4, 4)).inv])
    there_and_back.event_shape = torch.Size((2, 4, 4))
    check(there_and_back, dtypes=(torch.float64,))
    same_shape = {
        "pure",
        "shapes",
        "round_trip",
        "log_det",
        "rows",
        "extreme_inputs",
        "copies",
        "dtype",
        "meta",
        "algebra",
    }
    check_transform(layer, context_dims=(0,), scales=(0.5,), laws=sorted(same_shape | {"vmap", "compile", "gradients"}))


def test_haar_does_not_overflow_where_the_result_fits():
    x = torch.full((1, 2, 2), 1.5e38)
    y = Haar((1, 2, 2))(x)
    assert y.flatten().tolist()[1:] == [0, 0, 0]
    assert float(y.flatten()[0]) == pytest.approx(3e38, rel=1e-6)


# --- 1x1 convolutions, by Glow's name and by Pyro's ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 32, 32), (2, 5, 3, 64, 64)])
def test_generalized_channel_permute_of_pyro(shape):
    torch.manual_seed(0)
    channels = shape[-3]
    context = torch.rand(3, dtype=torch.float64)
    layers = [
        generalized_channel_permute(channels=channels).double(),
        conditional_generalized_channel_permute(context_dim=3, channels=channels).double().condition(context),
    ]
    for layer in layers:
        x = torch.randn(shape, dtype=torch.float64)
        y = layer(x)
        assert y.shape == x.shape == layer.forward_shape(x.shape)
        layer.clear_cache()
        torch.testing.assert_close(layer.inv(y.clone()), x, atol=1e-6, rtol=0)
        assert layer.log_abs_det_jacobian(x, y).shape == shape[:-3]


@pytest.mark.parametrize("context_dim", [0, 3])
def test_channel_permute_log_det_by_differences(context_dim):
    layer = shaken(InvertibleConv1x1(3, context_dim=context_dim, hidden_dims=(8,)).double())
    at = layer.condition(torch.rand(3, dtype=torch.float64)) if context_dim else layer
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    found = at.log_abs_det_jacobian(x, at(x))
    columns = []
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[i] = 1e-5
        ahead, behind = (at.forward_and_log_det(x + sign * step.reshape(x.shape))[0] for sign in (1, -1))
        columns.append((ahead - behind).flatten() / 2e-5)
    torch.testing.assert_close(found, torch.linalg.slogdet(torch.stack(columns, -1))[1], atol=1e-6, rtol=0)


def test_batched_context_of_the_channel_permute():
    """D9: Pyro's takes one context only, as it reads the diagonal of a batch of matrices."""
    layer = shaken(conditional_generalized_channel_permute(3, channels=4).double(), 1.0)
    x, context = torch.randn(6, 4, 5, 7, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    at = layer.condition(context)
    y = at(x)
    alone = torch.stack([layer.condition(c)(row) for c, row in zip(context, x, strict=True)])
    torch.testing.assert_close(y, alone)
    torch.testing.assert_close(at.inv(y.clone()), x)
    scores = torch.stack([slogdet(layer.condition(c), row) for c, row in zip(context, x, strict=True)])
    torch.testing.assert_close(at.log_abs_det_jacobian(x, y), scores)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(4, 5, 7).double(), 1.0).to_event(3), [at])
    assert flow.sample((2,)).shape == (2, 6, 4, 5, 7)


def test_convolution_starts_as_a_rotation_or_as_the_permutation_given():
    torch.manual_seed(3)
    x = torch.randn(5, 6, 2, 2, dtype=torch.float64)
    y, log_det = InvertibleConv1x1(6).double().forward_and_log_det(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), atol=1e-5, rtol=0)  # it was rotated in float32
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), atol=1e-5, rtol=0)
    order = [2, 0, 3, 5, 1, 4]
    assert torch.allclose(GeneralizedChannelPermute(6, order).double()(x), x[:, order], atol=1e-7)


def test_convolution_is_the_dense_one():
    layer = shaken(InvertibleConv1x1(4).double())
    matrix = layer(torch.eye(4, dtype=torch.float64).reshape(4, 4, 1, 1)).reshape(4, 4).T
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, matrix[..., None, None]))
    torch.testing.assert_close(log_det, (30 * torch.linalg.slogdet(matrix)[1]).expand(3))


def test_convolution_inverts_half_precision():
    layer = InvertibleConv1x1(3).bfloat16()
    x = torch.randn(4, 3, 5, 5).bfloat16()
    back = layer.inv(layer(x).clone())
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back, x, atol=0.1, rtol=0.1)


# --- a layer at every pixel ----------------------------------------------------------------------------------


def test_pixelwise_is_the_layer_at_each_pixel():
    inner = shaken(LULinear(3, context_dim=2, hidden_dims=(8,)).double())
    layer = Pixelwise(inner)
    x, context = torch.randn(4, 3, 2, 5).double(), torch.randn(4, 2).double()
    y, log_det = layer.forward_and_log_det(x, context)
    total = 0
    for h, w in itertools.product(range(2), range(5)):
        pixel, one = inner.forward_and_log_det(x[:, :, h, w], context)
        torch.testing.assert_close(y[:, :, h, w], pixel)
        total = total + one
    torch.testing.assert_close(log_det, total)
    torch.testing.assert_close(layer.inverse_and_log_det(y, context)[0], x)


def test_channel_actnorm_starts_from_data():
    layer = channel_actnorm((3, 4, 4))
    scale = torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    data = torch.randn(50, 3, 4, 4) * scale + torch.tensor([5.0, 0.0, -7.0])[:, None, None]
    layer.initialize(data)
    z, log_det = layer.inverse_and_log_det(data)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    expected = -16 * torch.log(data.transpose(0, 1).flatten(1).std(1)).sum()
    torch.testing.assert_close(log_det, expected.expand(50), atol=1e-3, rtol=0)


def test_actnorms_of_a_glow_start_from_data_at_every_scale():
    torch.manual_seed(0)
    flow = glow((1, 8, 8), levels=3, steps=2, hidden_channels=8)
    data = 3 + 5 * torch.randn(200, 1, 8, 8)
    flow.initialize(data)
    with torch.no_grad():
        z, _ = flow.transform.inverse_and_log_det(data)
    assert float(z.mean().abs()) < 0.05
    assert float(z.std() - 1) == pytest.approx(0, abs=0.05)
    shifts = [p for name, p in flow.named_parameters() if name.endswith("shift")]
    assert len(shifts) == 6
    assert all(bool((shift != 0).any()) for shift in shifts)


# --- couplings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mask", ["split", "checkerboard"])
def test_what_steers_stays_and_moves_the_rest(mask, flip):
    layer = shaken(image_coupling((3, 4, 5), mask=mask, flip=flip, hidden_channels=8).double(), 1.0)
    x = torch.randn(2, 3, 4, 5).double()
    y = layer(x)
    if mask == "split":
        steers = (torch.arange(3) < 1)[:, None, None].expand(3, 4, 5)
    else:
        steers = ((torch.arange(4)[:, None] + torch.arange(5)) % 2 == 0).expand(3, 4, 5)
    steers = ~steers if flip else steers
    assert torch.equal((y == x).all(0), steers)
    jacobian = jacrev(layer)(x[0]).reshape(60, 60)
    moved = ~steers.flatten()
    block = jacobian[moved][:, moved]
    assert torch.equal(block, torch.diag(block.diagonal()))
    assert bool((jacobian[moved][:, ~moved] != 0).any())


def test_two_flips_of_an_uneven_split_reach_every_channel():
    layers = [shaken(image_coupling((5, 2, 2), flip=flip, hidden_channels=4)) for flip in (False, True)]
    x = torch.randn(5, 2, 2)
    y = Compose(layers)(x)
    assert bool((y != x).all())


@pytest.mark.parametrize("map", ["affine", "additive", "rational_spline"])
def test_maps_and_contexts_of_a_coupling(map):
    layer = shaken(image_coupling((2, 4, 4), map, context_dim=3, hidden_channels=8).double())
    x, context = torch.randn(5, 2, 4, 4).double(), torch.randn(6, 1, 3).double()
    y, log_det = layer.forward_and_log_det(x, context)
    assert y.shape == (6, 5, 2, 4, 4)
    assert log_det.shape == (6, 5)
    assert not torch.equal(y[0], y[1])
    torch.testing.assert_close(layer.inverse_and_log_det(y, context)[0], x.expand_as(y))
    at = layer.condition(context[2, 0])
    torch.testing.assert_close(log_det[2, 3], slogdet(at, x[3]))


def test_an_image_as_context_steers_where_it_is():
    layer = ImageCoupling(Affine(), (1, 8, 8), context_dim=64, image_context=True, hidden_channels=8)
    shaken(layer, 1.0)
    image, x = torch.zeros(1, 8, 8), torch.randn(1, 8, 8)
    other = image.clone()
    other[0, 0, 0] = 1.0
    change = layer.condition(image.flatten())(x) != layer.condition(other.flatten())(x)
    assert bool(change.any())
    assert not bool(change[:, 3:].any())
    assert not bool(change[:, :, 3:].any())  # two kernels of three reach two pixels


def test_the_map_of_what_steers_does_no_harm():
    layer = image_coupling((1, 2, 2), mask="checkerboard", hidden_channels=4)
    x = torch.tensor([[[3e38, 0.5], [0.25, -3e38]]], requires_grad=True)
    y, log_det = layer.forward_and_log_det(x)
    (y[0, 0, 1] + log_det).backward()
    assert bool(y.isfinite().all())
    assert bool(x.grad.isfinite().all())


def test_the_network_takes_any_size_and_starts_near_zero():
    net = CNN(2, 6, kernel_sizes=(5, 3, 3), context_dim=3, residual=True)
    for batch, size in (((), (1, 1)), ((0,), (4, 4)), ((2, 3), (5, 4)), ((3, 0), (2, 2))):
        assert net(torch.randn(*batch, 2, *size), torch.randn(3)).shape == (*batch, 6, *size)
    assert float(net(torch.randn(5, 2, 8, 8), torch.randn(5, 3)).detach().abs().max()) < 0.1


# --- scales --------------------------------------------------------------------------------------------------


def test_channels_that_leave_are_left_alone():
    layer = FactorOut(shaken(image_coupling((2, 4, 4), hidden_channels=4).double(), 1.0), channels=2)
    x = torch.randn(3, 5, 4, 4).double()
    y, log_det = layer.forward_and_log_det(x)
    assert torch.equal(y[:, 2:], x[:, 2:])
    inner = layer.transform.forward_and_log_det(x[:, :2])
    assert torch.equal(y[:, :2], inner[0])
    assert torch.equal(log_det, inner[1])


def test_each_scale_has_half_of_what_the_last_one_had():
    shapes = []
    multi_scale((3, 8, 16), lambda shape: shapes.append(tuple(shape)) or [channel_actnorm(shape)], levels=3)
    assert sorted(shapes) == [(12, 4, 8), (24, 2, 4), (48, 1, 2)]


@pytest.mark.parametrize("squeeze", ["space", "haar"])
def test_log_det_through_three_scales(squeeze):
    flow = shaken(glow((1, 8, 8), levels=3, steps=2, hidden_channels=4, squeeze=squeeze).double())
    x = torch.randn(1, 8, 8).double()
    y, log_det = flow.transform.forward_and_log_det(x)
    torch.testing.assert_close(log_det, slogdet(flow.transform, x), atol=1e-8, rtol=0)
    back, inverse_log_det = flow.transform.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["glow", "realnvp_image"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 7), (3, 5, 2), (2, 6, 4), (1, 28, 28)])
def test_recipes_at_any_shape(name, shape):
    torch.manual_seed(0)
    flow = pf.flow(name, input_dim=shape, context_dim=2, hidden_channels=4)
    with torch.no_grad():
        x = flow(torch.randn(3, 2)).sample((2,))
    assert x.shape == (2, 3, *shape)
    assert flow(torch.randn(3, 2)).log_prob(x).shape == (2, 3)
    assert flow(torch.randn(2)).log_prob(x[:0]).shape == (0, 3)


def test_recipes_save_and_load(tmp_path):
    flow = shaken(pf.flow("glow", input_dim=(1, 4, 4), steps=1, hidden_channels=4, support=logit_interval(0.1)))
    path = tmp_path / "glow.safetensors"
    pf.save(flow, path)
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(pf.load(path)().log_prob(x), flow().log_prob(x))


# --- pixels --------------------------------------------------------------------------------------------------


def uniform(shape):
    """The uniform density on the unit interval, for each pixel."""
    base = Base(dist.Uniform, 3, low=torch.zeros(shape), high=torch.ones(shape))
    return Flow(InvertibleConv1x1(shape[0], permutation=range(shape[0])), base)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_density_takes_the_bits_of_its_levels(levels):
    model = Dequantized(uniform((3, 4, 4)), levels)
    x = torch.randint(levels, (6, 3, 4, 4))
    for samples in (1, 5):
        bits = model().bits_per_dim(x, samples)
        torch.testing.assert_close(bits, torch.full((6,), math.log2(levels)), atol=1e-5, rtol=0)
    assert float(bits_per_dim(torch.tensor(-48 * math.log(levels)), (3, 4, 4))) == pytest.approx(math.log2(levels))


def sloped():
    """A density on (0, 1) that is not constant in a cell: one pixel, sigmoid(2 z + 1)."""
    flow = Flow(Pixelwise(affine(1)), Base(dist.Normal, 3, loc=torch.zeros(1, 1, 1), scale=torch.ones(1, 1, 1)))
    flow.constrain("unit_interval")
    flow.standardize.set(torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0))
    return flow.double()


def exact_log_probs(levels):
    edges = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    cdf = dist.Normal(1.0, 2.0).cdf(torch.logit(edges))
    return cdf.diff().log()


def test_the_bound_is_below_and_closes_with_samples():
    torch.manual_seed(0)
    exact, x = exact_log_probs(4), torch.arange(4.0, dtype=torch.float64).reshape(4, 1, 1, 1)
    d = Dequantized(sloped(), 4)()
    repeats = x.expand(20000, 4, 1, 1, 1)
    with torch.no_grad():
        gaps = [(exact - d.log_prob(repeats, samples).mean(0)) for samples in (1, 4, 64)]
    assert all(bool((gap > 0).all()) for gap in gaps)
    assert bool((gaps[0] > gaps[1]).all())
    assert bool((gaps[1] > gaps[2]).all())
    assert float(gaps[2].max()) < 0.005


def test_the_bound_is_unbiased_for_the_probability_itself():
    torch.manual_seed(0)
    x = torch.arange(4.0, dtype=torch.float64).reshape(4, 1, 1, 1)
    with torch.no_grad():
        draws = Dequantized(sloped(), 4)().log_prob(x.expand(40000, 4, 1, 1, 1)).exp()
    error = 4 * draws.std(0) / 200
    assert bool(((draws.mean(0) - exact_log_probs(4).exp()).abs() < error).all())


def test_the_bound_with_learned_noise_by_quadrature():
    torch.manual_seed(0)
    x = torch.arange(4.0, dtype=torch.float64).reshape(4, 1, 1, 1)
    model = Dequantized(sloped(), 4, shaken(dequantizer((1, 1, 1), hidden_channels=4, transforms=1), 1.0).double())
    u = ((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000).reshape(-1, 1, 1, 1, 1)
    with torch.no_grad():
        log_q = model.noise(2 * x.flatten(1) / 3 - 1).log_prob(u.expand(-1, 4, 1, 1, 1))
        log_p = model.flow().log_prob((x + u) / 4) - math.log(4)
        bound = (log_q.exp() * (log_p - log_q)).mean(0)
        draws = model().log_prob(x.expand(20000, 4, 1, 1, 1))
    assert float(log_q.exp().mean(0).sub(1).abs().max()) < 1e-3
    assert bool(((draws.mean(0) - bound).abs() < 4 * draws.std(0) / math.sqrt(20000) + 1e-4).all())
    assert bool((bound < exact_log_probs(4) - 1e-3).all())


def test_learned_noise_makes_the_bound_tighter():
    torch.manual_seed(0)
    x = torch.arange(4.0, dtype=torch.float64).reshape(4, 1, 1, 1)
    flow = sloped().requires_grad_(False)
    plain, learned = Dequantized(flow, 4), Dequantized(flow, 4, dequantizer((1, 1, 1), hidden_channels=16)).double()
    optimizer = torch.optim.Adam(learned.noise.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (-learned().log_prob(x.expand(32, 4, 1, 1, 1)).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        exact, repeats = exact_log_probs(4).mean(), x.expand(20000, 4, 1, 1, 1)
        gaps = [float(exact - model().log_prob(repeats).mean()) for model in (plain, learned)]
    assert 0 < gaps[1] < gaps[0] / 2


def test_pixels_are_whole_numbers_and_follow_the_probabilities():
    torch.manual_seed(0)
    d = Dequantized(sloped(), 4)()
    x = d.sample((40000,))
    assert x.shape == (40000, 1, 1, 1)
    counts = torch.bincount(x.flatten().long(), minlength=4) / 40000
    torch.testing.assert_close(counts.double(), exact_log_probs(4).exp(), atol=0.01, rtol=0)
    wide = Dequantized(glow((1, 4, 4), steps=1, hidden_channels=4, support=logit_interval(0.3)), 8)
    x = wide().sample((200,))
    assert set(x.unique().tolist()) == set(range(8))
    assert bool(wide().support.check(x).all())


def test_pixels_in_a_pyro_model():
    torch.manual_seed(0)
    pyro.clear_param_store()
    model = Dequantized(glow((1, 4, 4), context_dim=2, steps=1, hidden_channels=4, support=logit_interval()), 17)
    x, context = torch.randint(17, (6, 1, 4, 4)).float(), torch.randn(6, 2)
    model.initialize(x, context)
    assert model(context).batch_shape == (6,)
    assert model(context).expand((3, 6)).sample().shape == (3, 6, 1, 4, 4)
    assert model(context).sample((5,)).shape == (5, 6, 1, 4, 4)

    def observed(x):
        pyro.module("pixels", model)
        with pyro.plate("rows", 6):
            pyro.sample("x", model(context), obs=x)

    svi = SVI(observed, lambda x: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(30)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="support"):
        model(context).log_prob(x + 0.5)
    with pytest.raises(ValueError, match="support"):
        model(context).log_prob(x + 17)


def test_the_margin_of_the_logit():
    alpha = 0.05
    support = logit_interval(alpha)
    x = torch.rand(10, dtype=torch.float64)
    to_support = torch.distributions.biject_to(support)
    torch.testing.assert_close(to_support.inv(x), torch.logit(alpha + (1 - 2 * alpha) * x))


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["channel_actnorm", "image_coupling", "invertible_conv1x1"])
@pytest.mark.parametrize("input_dim", [3, (3,), (2, 4), (1, 2, 4, 4)])
def test_layers_need_the_shape_of_an_image(name, input_dim):
    with pytest.raises(OptionError, match=r"shape \(C, H, W\)"):
        pf.transform(name, input_dim=input_dim)


@pytest.mark.parametrize("name", ["glow", "realnvp_image"])
def test_recipes_need_the_shape_of_an_image(name):
    with pytest.raises(OptionError, match=r"shape \(C, H, W\)"):
        pf.flow(name, input_dim=64)
    for options in ({"steps": 0}, {"levels": 4}, {"levels": -1}, {"map": "afine"}, {"bins": 3}):
        with pytest.raises(OptionError):
            pf.flow(name, input_dim=(1, 8, 8), **options)


REFUSED = {
    "squeeze of an odd side": lambda: Squeeze((1, 4, 5)),
    "haar of an odd side": lambda: Haar((1, 3, 4)),
    "a factor of zero": lambda: Squeeze((1, 4, 4), factor=0),
    "one channel split": lambda: image_coupling((1, 4, 4), mask="split"),
    "an unknown mask": lambda: image_coupling((2, 4, 4), mask="rows"),
    "a context that is no image": lambda: image_coupling((2, 4, 4), context_dim=3, image_context=True),
    "no permutation": lambda: InvertibleConv1x1(3, [0, 0, 1]),
    "no channels": lambda: InvertibleConv1x1(0),
    "a layer on numbers at every pixel": lambda: Pixelwise(affine(2, event_dim=0)),
    "vectors factored out": lambda: FactorOut(affine(2), 1),
    "an even kernel": lambda: CNN(1, 1, kernel_sizes=(2, 3)),
    "one convolution": lambda: CNN(1, 1, kernel_sizes=(3,)),
    "one level": lambda: Dequantized(glow((1, 4, 4), steps=1), 1),
    "noise of other images": lambda: Dequantized(glow((1, 4, 4), steps=1), 8, dequantizer((1, 2, 2))),
    "an alpha of a half": lambda: logit_interval(0.5),
    "no samples": lambda: Dequantized(uniform((1, 2, 2)), 4)().log_prob(torch.zeros(1, 2, 2), samples=0),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_refused(what):
    with pytest.raises(OptionError):
        REFUSED[what]()


def test_images_of_another_shape_are_refused():
    layers = [
        Squeeze((2, 4, 4)),
        Haar((2, 4, 4)),
        image_coupling((2, 4, 4)),
        InvertibleConv1x1(2),
        channel_actnorm((2, 4, 4)),
    ]
    for layer in layers:
        for shape in ((3, 4, 4), (4, 4), (4,), (7, 3, 4, 4)):
            with pytest.raises(ShapeError):
                layer(torch.zeros(shape))
            with pytest.raises(ShapeError):
                layer.inv(torch.zeros(shape))
    with pytest.raises(ShapeError):
        glow((1, 4, 4), steps=1).initialize(torch.zeros(3, 1, 4, 5))
    with pytest.raises(ContextError):
        image_coupling((2, 4, 4), context_dim=3)(torch.zeros(2, 4, 4))


def test_sizes_that_a_factory_names_replace_numbers():
    seen = []

    @with_input_dims((1, 2, 2))
    def layer(input_dim, *, context_dim=0):
        seen.append(input_dim)
        return channel_actnorm(input_dim)

    check_transform(layer, input_dims=(1, 2), context_dims=(0,), scales=(0.5,), laws=["log_det"])
    assert set(seen) == {(1, 2, 2)}
    check_transform(layer, input_dims=((2, 1, 1),), context_dims=(0,), scales=(0.5,), laws=["log_det"])
    assert (2, 1, 1) in seen
    with pytest.raises(LawViolation, match="nothing could be built"):
        check_transform(plain, input_dims=(3,))


def plain(input_dim, *, context_dim=0):
    return channel_actnorm(input_dim)


def test_levels_by_shape():
    assert [largest_levels((1, h, w)) for h, w in ((1, 1), (4, 4), (8, 8), (28, 28), (32, 32), (64, 64), (4, 7))] == [
        0,
        1,
        2,
        2,
        3,
        3,
        0,
    ]
