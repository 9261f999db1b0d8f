"""Fitting: what it restores, what it refuses, what it leaves alone."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import errors


def small(**options):
    torch.manual_seed(0)
    options = {"input_dim": 2, "transforms": 2, "hidden_dims": (16,), "bins": 4, **options}
    return pf.flow("nsf", **options)


def rows(n=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    return torch.stack([x[:, 0] * 3 + 10, x[:, 0] ** 2 + 0.3 * x[:, 1]], -1)


def fit(flow, *args, **options):
    return pf.fit(flow, *args, **{"progress": False, "seed": 0, "max_epochs": 5, **options})


def test_fit_raises_the_held_out_likelihood():
    flow = small()
    result = fit(flow, rows(), max_epochs=60, lr=5e-3)
    start, best = result.history["validation"][0], result.validation
    assert best > start + 0.3
    test = rows(2000, seed=1)
    gaussian = torch.distributions.MultivariateNormal(rows().mean(0), torch.cov(rows().T)).log_prob(test).mean()
    assert flow().log_prob(test).mean() > gaussian


def test_best_weights_are_restored():
    flow = small()
    x = rows()
    result = fit(flow, x, max_epochs=30, lr=0.5, clip_norm=None, validation=x[:50])  # far too large a step
    with torch.no_grad():
        assert flow().log_prob(x[:50]).double().mean().item() == pytest.approx(result.validation, abs=1e-5)
    assert result.validation == max(v for v in result.history["validation"] if not math.isnan(v))


def test_patience_stops():
    result = fit(small(), rows(), max_epochs=500, patience=3, lr=0.1)
    assert result.stopped == "patience"
    assert result.history["epoch"][-1] == result.best_epoch + 3


def test_same_seed_same_fit():
    a, b = small(), small()
    fit(a, rows())
    torch.rand(3)
    fit(b, rows())
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("how", ["auto", "robust"])
def test_log_prob_stays_in_the_units_of_the_data(how):
    unit, metres = small(), small()
    x = rows()
    a = fit(unit, x, standardize=how).validation
    b = fit(metres, x * 1000 - 5, standardize=how).validation
    assert a - b == pytest.approx(2 * math.log(1000), abs=2e-3)


def test_standardize_none_leaves_the_standardiser():
    flow = small()
    fit(flow, rows(), standardize=None)
    assert torch.equal(flow.standardize.scale, torch.ones(2))


def test_fit_with_context():
    flow = small(context_dim=1)
    context = torch.rand(400, 1) * 1000
    x = torch.randn(400, 2) * 0.1 + context / 500
    fit(flow, x, context, max_epochs=60, lr=5e-3)
    low, high = (flow(torch.tensor([c])).sample((500,)).mean().item() for c in (100.0, 900.0))
    assert low == pytest.approx(0.2, abs=0.3)
    assert high == pytest.approx(1.8, abs=0.3)


@pytest.mark.parametrize(
    ("support", "inside"),
    [
        ("positive", lambda x: x.exp()),
        (constraints.interval(-1.0, 3.0), lambda x: 4 * torch.sigmoid(x) - 1),
        (["real", "positive"], lambda x: torch.stack([x[:, 0], x[:, 1].exp()], -1)),
        ("simplex", lambda x: torch.softmax(torch.nn.functional.pad(x, (0, 1)), -1)),
    ],
)
def test_support(support, inside):
    x = inside(torch.randn(300, 2))
    flow = small(support=support)
    fit(flow, x)
    samples = flow().sample((1000,))
    assert flow.support.check(samples).all()
    assert torch.isfinite(flow().log_prob(samples)).all()


def test_support_given_to_fit_is_the_flows_own():
    flow = small()
    fit(flow, rows().abs(), support="positive")
    assert (flow().sample((500,)) > 0).all()
    with pytest.raises(ValueError, match="support"):
        flow().log_prob(torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: pd.DataFrame(x.numpy(), columns=["a", "b"]),
        lambda x: x.double(),
        lambda x: (x * 10).round().int(),
    ],
    ids=["numpy", "lists", "pandas", "float64", "int"],
)
def test_accepts(convert):
    assert math.isfinite(fit(small(), convert(rows()), max_epochs=1).validation)


def test_one_column_may_be_a_vector():
    assert math.isfinite(fit(small(input_dim=1), np.random.default_rng(0).normal(size=100), max_epochs=1).validation)


def test_N1_nan_rows_are_named():
    x = rows()
    x[17, 1] = float("nan")
    x[40, 0] = float("inf")
    with pytest.raises(
        errors.NonFiniteData, match=r"2 rows .*rows 17, 40; columns 0, 1; first nan at row 17, column 1"
    ) as e:
        fit(small(), x)
    assert e.value.rows == (17, 40)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda x: x[:, :1], errors.DataError, r"expected x of shape \[rows, 2\], got \[300, 1\]"),
        (lambda x: x[0], errors.DataError, r"got \[2\]"),
        (lambda x: x[:2], errors.TooFewRows, "2 rows for 2 columns"),
        (lambda x: x * torch.tensor([1.0, 0.0]), errors.ConstantColumn, "column 1 of x is constant"),
        (lambda x: [["a", 1.0], ["b", 2.0], ["c", 3.0], ["d", 1.0]], errors.NotNumeric, "str 'a' at row 0, column 0"),
        (lambda x: [[1.0, 2.0], [3.0, "heavy"], [1.0, 4.0]], errors.NotNumeric, "str 'heavy' at row 1, column 1"),
        (lambda x: [[1.0, 2.0], [3.0]], errors.DataError, "ragged"),
        (lambda x: x.to(torch.complex64), errors.NotNumeric, "complex"),
        (lambda x: x.double() * 1e300, errors.NonFiniteData, "overflows torch.float32 at row 0"),
        (
            lambda x: pd.DataFrame({"mass": x[:, 0].numpy(), "island": ["Dream"] * 300}),
            errors.NotNumeric,
            "column 'island' of x",
        ),
        (
            lambda x: pd.DataFrame({"mass": x[:, 0].numpy(), "year": [2007] * 300}),
            errors.ConstantColumn,
            "column 'year' of x is constant",
        ),
    ],
)
def test_bad_rows_are_named(bad, error, message):
    flow = small()
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises(error, match=message):
        fit(flow, bad(rows()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), flow.state_dict().values(), strict=True))


def test_rows_outside_of_the_support_are_named():
    with pytest.raises(errors.OutsideSupport, match="rows"):
        fit(small(), rows(), support="positive")
    x = rows().abs()
    x[5, 0] = 0.0  # on the edge
    with pytest.raises(errors.OutsideSupport, match="row 5 is"):
        fit(small(), x, support="nonnegative")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"lr": -1.0}, "lr"),
        ({"standardize": "z"}, "standardize"),
        ({"validation": 1.5}, "validation"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
        ({"support": "positif"}, "no support named 'positif'"),
        ({"support": 3}, "one for each column; got 3"),
        ({"support": "interval"}, r"write constraints.interval\(\.\.\.\)"),
        ({"support": ["positive"] * 3}, "names 3 columns and the flow has 2"),
        ({"support": constraints.interval(2.0, 1.0)}, "not below"),
        ({"support": constraints.greater_than(float("nan"))}, "finite"),
        ({"support": constraints.boolean}, "no bijection"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(errors.OptionError, match=message):
        fit(small(), rows(), **options)


def test_context_must_fit():
    with pytest.raises(errors.ContextError, match="none"):
        fit(small(), rows(), torch.zeros(300, 1))
    with pytest.raises(errors.ContextError, match=r"\[rows, 3\]"):
        fit(small(context_dim=3), rows())
    with pytest.raises(errors.DataError, match="300 rows and context has 299"):
        fit(small(context_dim=1), rows(), torch.zeros(299, 1))


def test_a_guide_is_not_a_flow():
    with pytest.raises(errors.OptionError, match="SVI"):
        fit(torch.nn.Linear(2, 2), rows())


def test_N32_a_rate_that_destroys_the_weights_ends_in_a_rollback():
    def explode(parameters):
        return torch.optim.SGD(parameters, lr=1e30)

    flow = small()
    with pytest.warns(UserWarning, match="not finite"):
        result = fit(flow, rows(), max_epochs=50, optimizer=explode, clip_norm=None, batch_size=16)
    assert result.stopped == "non-finite"
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert torch.isfinite(flow().log_prob(rows())).all()
    with pytest.raises(errors.NonFiniteLoss, match="restored"):
        fit(small(), rows(), max_epochs=50, optimizer=explode, clip_norm=None, on_nonfinite="raise")


def test_N35_an_outlier_warns_and_robust_does_not():
    x = rows(20_000)
    x[3, 0] = 1e6
    with pytest.warns(UserWarning, match="column 0 .*robust"):
        fit(small(), x, max_epochs=1, batch_size=5000)
    fit(small(), x, max_epochs=1, batch_size=5000, standardize="robust")


def test_interrupt_keeps_the_best_weights():
    steps = iter(range(1000))

    class Interrupting(torch.optim.Adam):
        def step(self, closure=None):
            if next(steps) == 5:
                raise KeyboardInterrupt
            return super().step(closure)

    flow = small()
    result = fit(flow, rows(), optimizer=Interrupting)
    assert result.stopped == "interrupted"
    assert torch.isfinite(flow().log_prob(rows())).all()


def test_fit_leaves_the_global_generator_and_mode_alone():
    flow = small().eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fit(flow, rows())
    assert torch.equal(torch.rand(1), expected)
    assert not flow.training


def test_progress_bar_has_an_off_switch(capsys):
    fit(small(), rows(), max_epochs=2, progress=True)
    assert "validation" in capsys.readouterr().err
    fit(small(), rows(), max_epochs=2, progress=False)
    assert capsys.readouterr().err == ""


def test_float64_flow():
    flow = small().double()
    fit(flow, rows())
    assert flow().sample((3,)).dtype == torch.float64


def test_actnorm_starts_from_the_data():
    from pyroflows.distributions import standard_normal
    from pyroflows.transforms import ActNorm, Compose, affine_coupling

    flow = pf.Flow(Compose([affine_coupling(2), ActNorm(2)]), standard_normal(2))
    flow.initialize(rows())
    x, _ = flow.transform[0][1].inverse_and_log_det(rows())
    assert x.detach().mean(0) == pytest.approx([0, 0], abs=1e-4)
    assert x.detach().std(0) == pytest.approx([1, 1], abs=1e-4)


def test_bounds_of_a_support_may_be_vectors():
    low, high = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0])
    flow = small(support=constraints.interval(low, high)).double()
    x = flow().sample((500,))
    assert ((x > low) & (x < high)).all()
    assert x.dtype == torch.float64
    assert flow.support_description == [
        "unit_interval",
        {"interval": {"lower_bound": -1.0, "upper_bound": 3.0}},
    ]
    assert copy.deepcopy(small(support="positive")).support_description == "positive"
