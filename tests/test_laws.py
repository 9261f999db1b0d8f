"""The laws hold for everything that is registered, and find each of the faults that are put before them."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from faulty import FLOWS, TRANSFORMS, Elementwise, Sound, SoundEstimate
from torch import nn

import pyroflows as pf
from pyroflows import errors, testing
from pyroflows.guides import AutoFlow
from pyroflows.testing import check, check_distribution, check_guide, check_transform
from pyroflows.testing.laws import DISTRIBUTION_LAWS, GUIDE_LAWS, TRANSFORM_LAWS
from pyroflows.testing.suite import cases
from pyroflows.transforms import Compose, FlowTransform, affine, permute

BUILT_IN = cases(everything=True)
EVERYDAY = {"input_dims": (1, 5), "scales": (0.5, 2.0)}
CHECKS = {
    "pyroflows.transforms": check_transform,
    "pyroflows.distributions": check_distribution,
    "pyroflows.guides": check_guide,
}


def variants(case):
    return getattr(pf.get(case.group, case.name), "variants", ({},))


# --- everything that is registered -----------------------------------------------------------------------


BRISK = ("iaf", "maf", "nice", "nsf", "radial", "realnvp")
"""The flows without a search and without convolutions; the others take minutes."""


def dear(case):
    return case.group == "pyroflows.distributions" and case.name not in BRISK


def searches(case):
    """Whether a layer's inverse is a search, with which every law takes ten times as long."""
    if case.group != "pyroflows.transforms":
        return False
    factory = pf.get(case.group, case.name)
    dim = getattr(factory, "input_dims", (2,))[0]
    return pf.transform(case.name, input_dim=dim, **variants(case)[case.variant]).inverse == "numeric"


SOLVES = ("continuous", "ffjord", "flow_matching", "otflow", "rnode")
"""Where both directions solve a differential equation, so that one draw takes as long as ten searches. Those of the
everyday tests are in test_continuous.py."""
TRAINED_OTHERWISE = ("flow_matching", "rnode")
"""Flows that are an ffjord but for how they are trained."""


def marks(case):
    second = case.group == "pyroflows.distributions" and case.variant > 0
    slow = second or dear(case) or case.name in SOLVES
    return pytest.param(case, id=case.label, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("case", [marks(case) for case in BUILT_IN])
def test_registered(case):
    sizes = {} if case.group == "pyroflows.guides" else EVERYDAY
    if case.group == "pyroflows.distributions":  # a density is integrated in one and in two dimensions
        sizes = {"input_dims": (2,), "scales": (0.5,)} if dear(case) else {**EVERYDAY, "input_dims": (1, 2)}
    elif searches(case):
        sizes = {"input_dims": (1, 3), "scales": (1.0,)}
    if case.name in SOLVES:
        sizes = {"input_dims": (2,), "context_dims": (3,), "scales": (0.5,)}
    if case.name in TRAINED_OTHERWISE:
        sizes["laws"] = ("start", "round_trip", "log_det", "joint", "flow_copies", "training_step")
    report = CHECKS[case.group](case.name, variants=(variants(case)[case.variant],), **sizes)
    assert report.ok
    assert not report.understated


LAYERS = [case for case in BUILT_IN if case.group == "pyroflows.transforms"]


def known_to_break(case):
    """A field of a potential with biases of 200 is too stiff for 5000 evaluations, which is a typed error."""
    stiff = case.name == "continuous" and variants(case)[case.variant].get("velocity") == "potential"
    mark = pytest.mark.xfail(strict=True, raises=errors.LawViolation, reason="extreme_parameters: max_nfe is reached")
    return pytest.param(case, id=case.label, marks=mark if stiff else ())


@pytest.mark.slow
@pytest.mark.parametrize("case", [known_to_break(case) for case in LAYERS])
def test_registered_at_the_other_sizes_and_scales(case):
    if case.name in SOLVES:
        laws = ("round_trip", "log_det", "gradients", "rows", "extreme_inputs", "extreme_parameters")
        sizes = {"input_dims": (3,), "context_dims": (0,), "scales": (1.0,), "laws": laws}
    elif searches(case):
        sizes = {"input_dims": (5,), "scales": (1.0, 2.0)}
    else:
        sizes = {"input_dims": (2, 3, 8), "scales": (0.1, 1.0)}
    check_transform(case.name, variants=(variants(case)[case.variant],), seed=1, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in BUILT_IN if case.name in BRISK and case not in LAYERS], ids=lambda c: c.label
)
def test_registered_flows_of_five_coordinates(case):
    check_distribution(case.name, variants=(variants(case)[case.variant],), input_dims=(5,), scales=(0.5,), seed=1)


def test_compositions_of_registered_layers():
    parts = [pf.transform(name, input_dim=3, context_dim=2) for name in ("spline_coupling", "affine_autoregressive")]
    stack = Compose([parts[0], permute(3, [2, 0, 1]), parts[1].inv, affine(3)])
    check_transform(stack, scales=(0.5,))
    check_transform(stack.inv, scales=(0.5,), laws=["round_trip", "log_det", "rows", "memo", "algebra"])
    check_transform(stack.condition(torch.randn(2)), scales=(0.5,), laws=["round_trip", "log_det", "memo"])


# --- faults ----------------------------------------------------------------------------------------------


def broken_laws(violation):
    first = str(violation).splitlines()[0]
    return re.findall(r"(\w+) \(\d+x\)", first)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_fault_in_a_transform(name):
    factory, law, options = TRANSFORMS[name]
    sizes = {"input_dims": (3,), "context_dims": (0,), "scales": (1.0,), **options}
    with pytest.raises(errors.LawViolation) as caught:
        check_transform(factory, **sizes)
    assert law in broken_laws(caught.value), caught.value
    with pytest.raises(errors.LawViolation, match=f"{law}: "):
        check_transform(factory, laws=[law], **sizes)


@pytest.mark.parametrize("name", sorted(FLOWS))
def test_fault_in_a_flow(name):
    factory, law, _ = FLOWS[name]
    with pytest.raises(errors.LawViolation) as caught:
        check_distribution(factory, input_dims=(2,), context_dims=(3,), scales=(0.5,), laws=[law])
    assert broken_laws(caught.value) == [law], caught.value


@pytest.mark.parametrize("factory", [Sound, Elementwise, SoundEstimate])
def test_sound_layers_pass(factory):
    report = check_transform(factory, input_dims=(1, 3), scales=(0.5, 1.0))
    assert report.ok
    assert set(report.tallies) == {law.name for law in TRANSFORM_LAWS}


def test_every_law_finds_a_fault():
    found = {law for _, law, _ in (*TRANSFORMS.values(), *FLOWS.values())}
    known = {law.name for law in (*TRANSFORM_LAWS, *DISTRIBUTION_LAWS)}
    assert known - found <= {"plates", "fresh_scores", "flow_dtype"}  # of the same code as laws that are shown


class LazyGuide(AutoFlow):
    def setup(self, *args, **kwargs):
        return self


class RandomMedian(AutoFlow):
    def median(self, *args, **kwargs):
        return {name: value + torch.rand(()) * 1e-3 for name, value in super().median(*args, **kwargs).items()}


class OneState(AutoFlow):
    def state_dict(self, *args, **kwargs):
        return {k: v * 1.5 for k, v in super().state_dict(*args, **kwargs).items()}


@pytest.mark.parametrize(
    ("guide", "law"), [(LazyGuide, "guide_parameters"), (RandomMedian, "guide_quantiles"), (OneState, "guide_state")]
)
def test_fault_in_a_guide(guide, law):
    with pytest.raises(errors.LawViolation) as caught:
        check_guide(guide, laws=[law])
    assert broken_laws(caught.value) == [law]


# --- rounding does not excuse a wrong map -----------------------------------------------------------------


class Scaled(FlowTransform):
    """y = s x, ill-conditioned by choice; off by a factor 1 + fault one way."""

    def __init__(self, input_dim, *, context_dim=0, spread=1e3, fault=0.0):
        super().__init__(context_dim)
        self.spread, self.fault = spread, fault
        self.a = nn.Parameter(torch.zeros(input_dim))

    def _scale(self):
        ratio = torch.linspace(-1, 1, len(self.a), dtype=self.a.dtype, device=self.a.device)
        return self.spread**ratio * (1 + 0.1 * torch.tanh(self.a))

    def forward_and_log_det(self, x, context=None):
        s = self._scale()
        return x * s, s.log().sum(-1).expand(x.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        s = self._scale()
        return y / s * (1 + self.fault), -s.log().sum(-1).expand(y.shape[:-1])


def test_a_scale_alone_is_no_excuse():
    sizes = {"input_dims": (3,), "context_dims": (0,), "laws": ["round_trip", "log_det"]}
    report = check_transform(Scaled, **sizes)
    assert report.tallies["log_det"].skipped == 0
    for fault, dtype in ((1e-3, torch.float32), (1e-9, torch.float64)):
        with pytest.raises(errors.LawViolation, match="round_trip"):
            check_transform(Scaled, variants=({"fault": fault},), dtypes=(dtype,), **sizes)


@pytest.mark.parametrize(("name", "seed"), [("lu_linear", 36), ("qr_linear", 49), ("qr_linear", 52)])
def test_what_rounding_of_a_context_does_is_excused(name, seed):
    """A matrix that a network reads off in float32 is off by as much, and its inverse amplifies that."""
    check_transform(
        name, input_dims=(2,), context_dims=(3,), scales=(2.0,), seed=seed, dtypes=(torch.float32,), laws=["round_trip"]
    )


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_what_rounding_of_a_point_does_to_its_score_is_excused(seed):
    """Far from where the flow lives a score falls by millions, and steeply."""
    sizes = {"input_dims": (8,), "context_dims": (0,), "scales": (1.0,), "dtypes": (torch.float64,)}
    check_distribution("realnvp", variants=({},), seed=seed, laws=["plates"], **sizes)


def test_too_many_skipped_numbers_are_a_violation():
    with pytest.raises(errors.LawViolation, match="numbers have any digit left"):
        check_transform(
            Scaled, variants=({"spread": 1e9},), input_dims=(8,), dtypes=(torch.float32,), laws=["round_trip"]
        )


@pytest.mark.parametrize("name", ["nsf", "maf", "spline_coupling", "affine_autoregressive"])
def test_a_wrong_log_det_is_seen_at_every_scale(name):
    """Whatever the conditioning of random networks forgives, it is not an error of a thousandth."""
    group = "distributions" if name in pf.available("distributions") else "transforms"
    honest = pf.get(group, name)

    def lying(input_dim, *, context_dim=0):
        built = honest(input_dim, context_dim=context_dim)
        layer = built.learned if group == "distributions" else built
        inner = layer.forward_and_log_det
        layer.forward_and_log_det = Off(inner)
        return built

    run = check_distribution if group == "distributions" else check_transform
    for scale in (0.1, 0.5, 1.0, 2.0):
        with pytest.raises(errors.LawViolation, match="forward log-det"):
            run(lying, input_dims=(3,), context_dims=(0,), scales=(scale,), laws=["log_det"])


class Off:
    """A bound method whose log-det is off by 2e-3; survives deepcopy."""

    def __init__(self, method):
        self.method = method

    def __call__(self, x, context=None):
        y, log_det = self.method(x, context)
        return y, log_det + 2e-3


# --- claims ----------------------------------------------------------------------------------------------


class Modest(Elementwise):
    vmaps = compiles = twice_differentiable = False


def test_understated_claims_are_remarks():
    report = check_transform(Modest, input_dims=(2,), context_dims=(0,), scales=(1.0,))
    assert report.ok
    assert len(report.understated) == 3
    assert "vmaps=False of Modest, yet it works" in report.understated
    assert "understated: vmaps" in str(report)


def test_honest_claims_are_exempt():
    class Branching(Elementwise):
        vmaps = compiles = False

        def go(self, x, a):
            return super().go(x if bool((x == x).all()) else x * 1.0, a)

        def back(self, y, a):
            return super().back(y if bool((y == y).all()) else y * 1.0, a)

    sizes = {"input_dims": (2,), "context_dims": (0,), "scales": (1.0,)}
    report = check_transform(Branching, laws=["vmap", "compile"], **sizes)
    assert set(report.exempt) == {"vmap", "compile"}
    assert not report.understated


# --- how a run is called, and what it leaves behind -------------------------------------------------------


def test_a_violation_can_be_seen_again():
    factory = TRANSFORMS["RowsForColumns"][0]
    with pytest.raises(errors.LawViolation) as caught:
        check_transform(factory, input_dims=(2, 3), scales=(0.5, 1.0), seed=3)
    text = str(caught.value)
    found = re.search(r"log_det: (.*)\n.*seed=3\n\s+(check_transform\(.*\))", text)
    assert found is not None, text
    call = found[2].replace("'RowsForColumns'", "factory")
    with pytest.raises(errors.LawViolation) as again:
        eval(call, {"check_transform": check_transform, "factory": factory, "torch": torch})
    assert found[1] in str(again.value)


def test_report_is_a_table():
    report = check_transform("affine", input_dims=(2,), scales=(1.0,), laws=["round_trip", "log_det"])
    assert isinstance(report, testing.Report)
    lines = str(report).splitlines()
    assert lines[0] == "affine: 4 draws, seed 0"
    assert [line.split()[0] for line in lines[1:]] == ["law", "round_trip", "log_det"]


def test_unknown_law_and_unfit_sizes():
    with pytest.raises(errors.OptionError, match="no law 'logdet'"):
        check_transform("affine", laws=["logdet"])

    def picky(input_dim, *, context_dim=0):
        raise errors.OptionError("never")

    with pytest.raises(errors.LawViolation, match=r"nothing could be built.*never"):
        check_transform(picky)
    with pytest.raises(errors.OptionError, match="expected a registered name"):
        check_transform(3)
    with pytest.raises(errors.UnknownPlugin):
        check_transform("affin")


def test_sizes_that_a_factory_declines_are_noted():
    def even(input_dim, *, context_dim=0):
        if input_dim % 2:
            raise errors.OptionError(f"input_dim must be even, got {input_dim}")
        if context_dim:
            raise errors.ContextError("takes no context")
        return Sound(input_dim)

    report = check_transform(even, input_dims=(1, 2), scales=(1.0,), laws=["round_trip"])
    assert len(report.declined) == 3
    assert "declined: ContextError" in str(report)


SUBJECTS = {
    "layer": lambda: pf.transform("spline_coupling", input_dim=3, context_dim=2),
    "flow": lambda: pf.flow("realnvp", input_dim=2, transforms=2, hidden_dims=(8,)),
    "composition": lambda: Compose([affine(3), permute(3)]),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_check_changes_nothing(subject):
    obj = SUBJECTS[subject]()
    with torch.no_grad():
        for parameter in obj.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    state, rng = copy.deepcopy(obj.state_dict()), torch.get_rng_state()
    pyro.param("mine", torch.ones(()))
    torch.set_default_dtype(torch.float64)
    settings = pyro.settings.get()
    with torch.no_grad():
        report = check(obj)
        assert not torch.is_grad_enabled()
    assert report.ok
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float64
    assert pyro.settings.get() == settings
    assert list(pyro.get_param_store()) == ["mine"]
    for name, value in obj.state_dict().items():
        assert torch.equal(value, state[name])
    assert obj.training
    assert all(p.grad is None for p in obj.parameters())


def test_check_is_checked_at_the_present_parameters():
    layer = TRANSFORMS["RowsForColumns"][0](3)
    with torch.no_grad():
        layer.mix.fill_(1.0)
    with pytest.raises(errors.LawViolation, match=r"scale=0\.0"):
        check(layer, laws=["log_det"])


def test_check_lists_every_violation():
    class Twice(TRANSFORMS["OneSignLost"][0]):
        def forward_and_log_det(self, x, context=None):
            y, log_det = super().forward_and_log_det(x, context)
            return y + 1e-5, log_det

    with pytest.raises(errors.LawViolation) as caught:
        check(Twice(3))
    assert {"log_det", "round_trip"} <= set(broken_laws(caught.value))


def test_check_takes_guides_and_refuses_the_rest():
    assert check(AutoFlow, laws=["guide_state"]).ok
    with pytest.raises(errors.OptionError, match="expected a FlowTransform"):
        check(nn.Linear(2, 2))


def test_compile_law_restores_validation():
    assert torch.distributions.Distribution._validate_args
    check_transform("affine", input_dims=(2,), context_dims=(0,), scales=(1.0,), laws=["compile"])
    assert torch.distributions.Distribution._validate_args


def test_laws_are_documented():
    page = (Path(__file__).parent.parent / "docs" / "laws.md").read_text()
    for law in (*TRANSFORM_LAWS, *DISTRIBUTION_LAWS, *GUIDE_LAWS):
        assert law.check.__doc__, law.name
        assert f"`{law.name}`" in page, law.name


def test_pytest_plugin(tmp_path):
    arguments = ["--pyargs", "pyroflows.testing.suite", "--pyroflows-names", "permute", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


class Flipped(FlowTransform):
    """A layer on images of any size, which no attribute tells."""

    domain = codomain = torch.distributions.constraints.independent(torch.distributions.constraints.real, 3)

    def forward_and_log_det(self, x, context=None):
        if x.dim() < 3 or x.shape[-1] != 2 * x.shape[-2]:
            raise errors.ShapeError("expected images twice as wide as high")
        return x.flip(-1), x.new_zeros(x.shape[:-3])

    inverse_and_log_det = forward_and_log_det


def test_the_caller_says_the_shape_of_a_point():
    with pytest.raises(errors.OptionError, match=r"input_dim=\(3, 8, 8\)"):
        pf.check(Flipped())
    report = pf.check(Flipped(), input_dim=(2, 3, 6), laws=["round_trip", "log_det", "shapes"])
    assert report.ok
    with pytest.raises(errors.OptionError, match=r"takes no points of shape \(2, 3, 5\)"):
        pf.check(Flipped(), input_dim=(2, 3, 5))
    with pytest.raises(errors.OptionError, match="knows its own"):
        pf.check(pf.flow("maf", input_dim=2), input_dim=2)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_layer_that_says_its_shape_is_asked(backwards):
    layer = pf.transforms.Squeeze((1, 2, 6))
    assert pf.check(layer.inv if backwards else layer, laws=["round_trip", "log_det"]).ok
