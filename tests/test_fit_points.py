"""Fitting flows whose points are no vectors: images and matrices."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows import errors
from pyroflows.distributions import Dequantized, dequantizer, logit_interval


def fit(flow, *args, **options):
    return pf.fit(flow, *args, **{"progress": False, "seed": 0, "max_epochs": 5, "batch_size": 64, **options})


def images(n=200, seed=0):
    """Images whose rows are alike, brighter at the right and ten times as bright in the second channel."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(n, 1, 1, 1, generator=generator)
    x = level + torch.arange(4.0) + 0.3 * torch.randn(n, 2, 4, 4, generator=generator)
    return x * torch.tensor([1.0, 10.0]).reshape(2, 1, 1)


SCALE = torch.tensor([[1.0, 0.6], [0.6, 2.0]])


def wishart(n, seed=0):
    """Matrices of Wishart's distribution with 6 degrees of freedom."""
    z = torch.randn(n, 6, 2, generator=torch.Generator().manual_seed(seed)) @ torch.linalg.cholesky(SCALE).mT
    return z.mT @ z


def glow(**options):
    torch.manual_seed(0)
    return pf.flow("glow", input_dim=(2, 4, 4), steps=1, hidden_channels=16, **options)


def test_images():
    flow, x = glow(), images()
    result = fit(flow, x, max_epochs=30, lr=5e-3)
    torch.testing.assert_close(flow.standardize.scale.mean((1, 2)), x.std(0).mean((1, 2)), rtol=0.1, atol=0.0)
    assert result.validation > result.history["validation"][0] + 3
    alone = dist.Normal(x.mean(0), x.std(0)).to_event(3).log_prob(images(seed=1)).mean()
    assert flow().log_prob(images(seed=1)).mean() > alone + 5  # pixels of an image go together
    assert flow().sample((3,)).shape == (3, 2, 4, 4)


def test_images_with_a_context_and_given_validation_rows():
    flow, x = glow(context_dim=1), images()
    context = x.mean((1, 2, 3))[:, None]
    result = fit(flow, x, context, validation=(x[:40], context[:40]), max_epochs=3)
    score = flow(context[:40]).log_prob(x[:40]).double().mean().item()
    assert score == pytest.approx(result.validation, abs=1e-4)
    with pytest.raises(errors.DataError, match="one context a row"):
        fit(flow, x, context[:50])
    assert fit(glow(), x.numpy().tolist(), max_epochs=1).history["epoch"] == [0.0, 1.0]


def test_every_image_is_seen_in_an_epoch_and_in_another_order():
    flow, x = glow(), images()
    seen = []
    x[:, 0, 0, 0] = torch.arange(200.0)
    original = flow.forward

    def watched(context=None):
        d = original(context)
        score = d.log_prob
        d.log_prob = lambda value: (flow.training and seen.append(value[:, 0, 0, 0].clone()), score(value))[1]
        return d

    flow.forward = watched
    fit(flow, x, max_epochs=2, validation=x[:20])
    one, two = (torch.cat(seen[i : i + 4]) for i in (0, 4))
    assert [len(batch) for batch in seen] == [64, 64, 64, 8] * 2
    assert torch.equal(one.sort().values, torch.arange(200.0))
    assert torch.equal(two.sort().values, torch.arange(200.0))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("how", ["auto", "robust", None])
def test_matrices(how):
    torch.manual_seed(0)
    truth, x = torch.distributions.Wishart(torch.tensor(6.0), SCALE), wishart(1500)
    flow = pf.flow("realnvp", input_dim=3, transforms=3, hidden_dims=(32,), support="positive_definite")
    result = fit(flow, x, max_epochs=40, lr=5e-3, batch_size=256, standardize=how)
    test = wishart(2000, seed=1)
    gap = truth.log_prob(test).mean() - flow().log_prob(test).mean()
    assert 0 < gap < 0.15
    assert result.validation > result.history["validation"][0]
    assert (torch.linalg.eigvalsh(flow().sample((50,))) > 0).all()


def test_a_support_of_fit_and_constants_that_belong_to_it():
    """A correlation matrix has ones on its diagonal, and a triangle zeros above."""
    torch.manual_seed(0)
    x = dist.LKJCholesky(3, torch.tensor(2.0)).sample((100,))
    flow = pf.flow("maf", input_dim=3, transforms=1, hidden_dims=(8,))
    fit(flow, x, support="corr_cholesky", max_epochs=2)
    assert flow.data_shape == (3, 3)
    assert flow().log_prob(x).isfinite().all()


WRONG = {
    "channels last": (lambda x: x.permute(0, 2, 3, 1), errors.DataError, r"\[rows, 2, 4, 4\], got \[200, 4, 4, 2\]"),
    "flattened": (lambda x: x.flatten(1), errors.DataError, r"\[rows, 2, 4, 4\], got \[200, 32\]"),
    "one image": (lambda x: x[0], errors.DataError, r"got \[2, 4, 4\]"),
    "none": (lambda x: x[:0], errors.TooFewRows, "0 rows for points of shape"),
    "NaN": (lambda x: x.index_put((torch.tensor(7), torch.tensor(1)), torch.tensor(math.nan)), errors.NonFiniteData,
            r"first nan at row 7, column '\(1, 0, 0\)'"),
    "a black corner": (lambda x: x * (torch.arange(4) > 0), errors.ConstantColumn, r"8 of the 32 .*\(0, 0, 0\).*noise"),
    "text": (lambda x: [[["a"]]], errors.NotNumeric, "text|str"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image(name):
    spoil, error, words = WRONG[name]
    flow = glow()
    before = flow.standardize.scale.clone()
    with pytest.raises(error, match=words):
        fit(flow, spoil(images()))
    assert torch.equal(flow.standardize.scale, before)


def test_what_is_no_matrix_of_the_support():
    flow = pf.flow("maf", input_dim=3, transforms=1, support="positive_definite")
    x = wishart(20)
    x[3] = -torch.eye(2)
    with pytest.raises(errors.OutsideSupport, match="row 3") as caught:
        fit(flow, x)
    assert caught.value.rows == (3,)
    with pytest.raises(errors.DataError, match=r"\[rows, 2, 2\], got \[20, 3\]"):
        fit(flow, torch.randn(20, 3))
    with pytest.raises(errors.DataError, match=r"\[rows, 2, 2\], got \[20, 3, 3\]"):
        fit(flow, torch.eye(3).expand(20, 3, 3))


def test_robust_and_far_entries_of_images():
    x = images()
    x[5, 1, 2, 3] = 1e5
    with pytest.warns(UserWarning, match=r"\(1, 2, 3\)"):
        fit(glow(), x.repeat(60, 1, 1, 1)[:12000].index_put((torch.arange(6, 12000),), images(11994)), max_epochs=1)
    flow = glow()
    fit(flow, x, standardize="robust", max_epochs=1)
    assert flow.standardize.scale[1, 2, 3] < 50


def digits(rows=500):
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:rows]).to(torch.uint8)[:, None], torch.tensor(data.target[:rows])[:, None]


def pixels(noise=False, **options):
    torch.manual_seed(0)
    flow = pf.flow(
        "glow", input_dim=(1, 8, 8), levels=1, steps=1, hidden_channels=8, support=logit_interval(), **options
    )
    return Dequantized(flow, 17, dequantizer((1, 8, 8), transforms=2, hidden_channels=4) if noise else None)


@pytest.mark.parametrize("noise", [False, True])
def test_images_of_whole_numbers(noise):
    """The bound rises: 17 levels of equal probability are 4.09 bits a pixel, and most pixels of a digit are black."""
    x, _ = digits()
    model = pixels(noise)
    result = fit(model, x[:400], max_epochs=10, lr=5e-3)
    bits = model().bits_per_dim(x[400:]).mean()
    assert bits < 3.1
    assert -result.validation / (64 * math.log(2)) == pytest.approx(bits.item(), abs=0.2)
    assert not torch.equal(model.flow.standardize.loc, torch.zeros(1, 8, 8))
    if noise:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.noise.parameters())


def test_the_bound_is_estimated_with_the_same_noise_in_every_epoch():
    """So the best epoch is not the luckiest one: without a step all are alike."""
    state = torch.get_rng_state()
    result = fit(pixels(), digits(100)[0], max_epochs=2, lr=1e-30)
    assert len(set(result.history["validation"])) == 1
    assert not torch.equal(torch.get_rng_state(), state)  # and the noise of the steps is new


def test_images_of_whole_numbers_with_a_context():
    x, labels = digits(200)
    model = pixels(context_dim=1)
    result = fit(model, x, labels, max_epochs=3, lr=5e-3)
    assert result.best_epoch > 0
    assert model.flow.context_loc.item() == pytest.approx(4.5, abs=0.5)
    with pytest.raises(errors.ContextError, match="context"):
        fit(model, x)


def test_images_that_are_no_whole_numbers():
    x, _ = digits(100)
    for wrong in (x + 0.5, x.float() - 1, x + 1):
        with pytest.raises(errors.OutsideSupport, match="upper_bound=16"):
            fit(pixels(), wrong)
    with pytest.raises(errors.DataError, match="shape"):
        fit(pixels(), x.flatten(1))
    with pytest.raises(errors.OptionError, match="unit_intervall"):
        fit(pixels(), x, support="unit_intervall")
