"""Running the laws: over a registered name, a factory, a class, or a user's own object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any

import torch

from pyroflows import plugins
from pyroflows.distributions import Flow
from pyroflows.errors import ContextError, LawViolation, OptionError, ShapeError
from pyroflows.testing.distribution_laws import DISTRIBUTION_LAWS, FlowTrial
from pyroflows.testing.guide_laws import GUIDE_LAWS, GuideTrial
from pyroflows.testing.report import Report
from pyroflows.testing.transform_laws import TRANSFORM_LAWS
from pyroflows.testing.trial import MANY, Broken, Case, Law, TransformTrial, Trial, is_real, isolated, perturb
from pyroflows.transforms import FlowTransform

__all__ = [
    "DISTRIBUTION_LAWS",
    "GUIDE_LAWS",
    "TRANSFORM_LAWS",
    "check",
    "check_distribution",
    "check_guide",
    "check_transform",
]

FLOW_LAWS = (*DISTRIBUTION_LAWS, *(law for law in TRANSFORM_LAWS if law.name != "memo"))
"""The laws of a flow: its own, and those of its transform but the one that `fresh_scores` is the twin of."""
Dim = int | tuple[int, ...]
Trials = Callable[[Case, Any, Callable[[], Any] | None, Report], list[Trial]]
DTYPES = (torch.float32, torch.float64)
DECLINES = (OptionError, ShapeError, ContextError)
SHARE = 0.5
"""The share of the numbers of a law that must have digits left, over a whole run."""

UNCOUNTED = ("extreme_parameters",)
"""Laws made for maps that may be too ill-conditioned to compare anything."""
MODERATE = 0.2
"""The largest scale at which a density is put on a grid; beyond, it soon is too narrow for any."""


def check_transform(
    transform: Any,
    *,
    input_dims: Sequence[Dim] = (1, 2, 3, 5, 8),
    context_dims: Sequence[int] = (0, 3),
    scales: Sequence[float] = (0.1, 0.5, 1.0, 2.0),
    dtypes: Sequence[torch.dtype] = DTYPES,
    seed: int = 0,
    laws: Sequence[str] | None = None,
    variants: Sequence[Mapping[str, Any]] | None = None,
) -> Report:
    """Checks every law of a transform at random parameters.

    Args:
        transform: a registered name, a factory ``(input_dim, *, context_dim=0, **options)``, or a built
            transform, which is checked at its own size and on copies.
        input_dims: the numbers of coordinates, or shapes of a point; what the factory refuses with a typed
            error is noted in the report. The sizes that a factory names by `with_input_dims` replace numbers.
        context_dims: the context widths.
        scales: standard deviations of what is added to the parameters.
        dtypes: float32, float64 or both.
        seed: of all random numbers.
        laws: the names of the laws to check, all by default.
        variants: option sets; the factory's own ``variants`` by default.

    Returns:
        What was checked, and how close it came.

    Raises:
        LawViolation: a law is broken. The message lists the violations and how to see each again.
        OptionError: there is no such law.

    Example:
        >>> check_transform("affine", input_dims=(2,), scales=(1.0,), laws=("round_trip", "log_det")).ok
        True
    """
    source = _source("transforms", "check_transform", transform, variants)
    return _run(source, TRANSFORM_LAWS, laws, input_dims, context_dims, scales, dtypes, seed)


def check_distribution(
    flow: Any,
    *,
    input_dims: Sequence[Dim] = (1, 2, 3, 5),
    context_dims: Sequence[int] = (0, 3),
    scales: Sequence[float] = (0.1, 0.5, 1.0, 2.0),
    dtypes: Sequence[torch.dtype] = DTYPES,
    seed: int = 0,
    laws: Sequence[str] | None = None,
    variants: Sequence[Mapping[str, Any]] | None = None,
) -> Report:
    """Checks every law of a flow, and those of its transform, at random parameters.

    Args:
        flow: a registered name, a factory ``(input_dim, *, context_dim=0, **options)``, or a built
            `pyroflows.distributions.Flow`, which is checked at its own size and on copies.
        input_dims: as for `check_transform`, as are all the others.
        context_dims: the context widths.
        scales: standard deviations of what is added to the parameters.
        dtypes: float32, float64 or both.
        seed: of all random numbers.
        laws: the names of the laws to check, all by default.
        variants: option sets; the factory's own ``variants`` by default.

    Returns:
        What was checked, and how close it came.

    Raises:
        LawViolation: a law is broken. The message lists the violations and how to see each again.
        OptionError: there is no such law.

    Example:
        >>> check_distribution("maf", input_dims=(2,), scales=(0.5,), laws=("normalised",)).ok
        True
    """
    source = _source("distributions", "check_distribution", flow, variants)
    return _run(source, FLOW_LAWS, laws, input_dims, context_dims, scales, dtypes, seed)


def check_guide(
    guide: Any,
    *,
    seed: int = 0,
    laws: Sequence[str] | None = None,
    variants: Sequence[Mapping[str, Any]] | None = None,
) -> Report:
    """Checks every law of a guide, over small models.

    Args:
        guide: a registered name, or a class or function ``(model, **options)``.
        seed: of all random numbers.
        laws: the names of the laws to check, all by default.
        variants: option sets; the guide's own ``variants`` by default.

    Returns:
        What was checked.

    Raises:
        LawViolation: a law is broken. The message lists the violations and how to see each again.
        OptionError: there is no such law.
    """
    label, factory = guide, guide
    own: Sequence[Mapping[str, Any]] = ({},)
    if isinstance(guide, str):
        factory, own = partial(plugins.guide, guide), getattr(plugins.get("guides", guide), "variants", own)
    else:
        label, own = getattr(guide, "__name__", type(guide).__name__), getattr(guide, "variants", own)
    wanted = _select(GUIDE_LAWS, laws)
    report = Report(str(label), seed)
    with isolated():
        for options in own if variants is None else variants:
            case = Case("check_guide", str(label), options, seed=seed)
            trial = GuideTrial(case, partial(factory, **options), report)
            report.draws += 1
            for law in wanted:
                _try(law, trial)
        return _verdict(report)


def check(
    obj: Any,
    *,
    input_dim: Dim | None = None,
    seed: int = 0,
    laws: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Report:
    """Checks the laws on a transform, flow or guide of your own, at its present parameters and near them.

    Everything happens on copies: the object, the random state, the default dtype and the validation settings
    are afterwards what they were. ``print(check(flow))`` shows a table.

    Args:
        obj: a `FlowTransform`, a `Flow`, or a guide class.
        input_dim: the number of coordinates of a transform, or the shape of its points such as ``(3, 8, 8)``, where it
            takes several or does not tell: a layer built without a name.
        seed: of all random numbers.
        laws: the names of the laws to check, all by default.
        dtypes: float32, float64 or both; the parameters are rounded to float32 first.

    Returns:
        What was checked, and how close it came.

    Raises:
        LawViolation: a law is broken. The message lists every violation.
        OptionError: the object is none of these, or there is no such law, or nobody knows the shape of its points.

    Example:
        >>> import pyroflows as pf
        >>> check(pf.transform("affine", input_dim=2), laws=["log_det"]).draws
        3
    """
    options: dict[str, Any] = {"seed": seed, "laws": laws}
    if input_dim is not None and not isinstance(obj, FlowTransform):
        raise OptionError(f"input_dim goes with a transform; a {type(obj).__name__} knows its own.")
    if isinstance(obj, FlowTransform | Flow):
        known = TRANSFORM_LAWS if isinstance(obj, FlowTransform) else FLOW_LAWS
        group = "transforms" if isinstance(obj, FlowTransform) else "distributions"
        sizes = () if input_dim is None else (input_dim,)
        return _run(_source(group, "check", obj, None), known, laws, sizes, (), (0.0, 0.1, 0.5), dtypes, seed)
    if isinstance(obj, type) or callable(getattr(obj, "setup", None)):
        return check_guide(obj if isinstance(obj, type) else type(obj), **options)
    raise OptionError(f"expected a FlowTransform, a Flow or a guide, got {type(obj).__name__}.")


# --- what is checked, and where it comes from ------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """What is to be checked: how it is built, in which variants, and at which sizes if it has its own."""

    check: str
    label: str
    group: str
    build: Callable[..., Any]
    variants: tuple[Mapping[str, Any], ...] = ({},)
    built: Any = None
    input_dims: tuple[Dim, ...] = ()

    def anew(self, options: Mapping[str, Any], input_dim: Dim, context_dim: int) -> Callable[[], Any] | None:
        """What builds another one; ``None`` for an object that was not built by name."""
        if self.built is None:
            return partial(self.build, input_dim, context_dim=context_dim, **options)
        if self.built.config is None:
            return None
        config = self.built.config
        return partial(
            plugins.build,
            config.group,
            config.address,
            config.input_dim,
            context_dim=config.context_dim,
            **config.options,
        )


def _source(group: str, check: str, thing: Any, variants: Sequence[Mapping[str, Any]] | None) -> _Source:
    kind = FlowTransform if group == "transforms" else Flow
    if isinstance(thing, kind):
        copied = copy.deepcopy(thing).float()
        label = thing.config.name if thing.config is not None else type(thing).__name__
        return _Source(check, label, group, copy.deepcopy, built=copied)
    if isinstance(thing, str):
        factory, label = plugins.get(group, thing), thing
        build: Callable[..., Any] = partial(plugins.build, group, thing)
    elif callable(thing):
        factory = build = thing
        label = getattr(thing, "__name__", type(thing).__name__)
    else:
        raise OptionError(f"expected a registered name, a factory or a built {kind.__name__}, got {thing!r}.")
    own = getattr(factory, "variants", ({},)) if variants is None else variants
    return _Source(check, label, group, build, tuple(own), input_dims=tuple(getattr(factory, "input_dims", ())))


def _takes(transform: FlowTransform, shape: tuple[int, ...]) -> bool:
    context = torch.zeros(transform.context_dim) if transform.context_dim else None
    try:
        image, _ = transform.forward_and_log_det(torch.full(shape, 0.5), context)
        return image.shape == transform.forward_shape(shape)
    except Exception:
        return False


def _own_shape(transform: FlowTransform) -> tuple[int, ...]:
    """The shape of one point of a built transform, as it was built or found by trying."""
    if transform.config is not None:
        dim = transform.config.input_dim
        return (dim,) if isinstance(dim, int) else tuple(dim)
    shapes: list[tuple[int, ...]] = []
    for module in transform.modules():
        if isinstance(shape := getattr(module, "event_shape", None), torch.Size):
            shapes.append(tuple(shape))
            if isinstance(module, FlowTransform):  # the inverse of a layer that says it takes its images
                shapes.append(tuple(module.forward_shape(shape)))
    shapes += [(width,) for width in range(1, 257)]
    shapes += [(i, j) for i in range(1, 9) for j in range(1, 9)]
    shapes += [(channels, side, side) for side in (4, 8) for channels in range(1, 17)]
    for shape in shapes:
        if _takes(transform, shape):
            return shape
    raise OptionError(
        f"cannot tell what the points of this {type(transform).__name__} are: say pf.check(..., input_dim=5), or their "
        "shape, as in input_dim=(3, 8, 8)."
    )


def _said_shape(transform: FlowTransform, input_dim: Dim) -> tuple[int, ...]:
    """The shape of one point as the caller has said it."""
    shape = (input_dim,) if isinstance(input_dim, int) else tuple(input_dim)
    if not _takes(transform, shape):
        raise OptionError(f"this {type(transform).__name__} takes no points of shape {shape}, which input_dim says.")
    return shape


def _trials(group: str, dtypes: Sequence[torch.dtype]) -> Trials:
    """From a draw to its trials, one a dtype; those of a flow and of its transform."""

    def of_transform(case: Case, subject: Any, rebuild: Callable[[], Any] | None, report: Report) -> list[Trial]:
        shape = (case.input_dim,) if isinstance(case.input_dim, int) else case.input_dim
        shared: dict[str, Any] = {}
        return [
            TransformTrial(case, subject, rebuild, dtype, report, event_shape=shape, shared=shared) for dtype in dtypes
        ]

    def of_flow(case: Case, subject: Any, rebuild: Callable[[], Any] | None, report: Report) -> list[Trial]:
        # The map to a support is torch's; what was learned stays in the unconstrained space.
        part = "transform" if is_real(subject.support) else "learned"
        anew = None if rebuild is None else lambda: getattr(rebuild(), part)
        shape, shared = tuple(subject.base().event_shape), {}  # type: ignore[var-annotated]
        parts: list[Trial] = [
            TransformTrial(case, getattr(subject, part), anew, dtype, report, event_shape=shape, shared=shared)
            for dtype in dtypes
        ]
        return [FlowTrial(case, subject, rebuild, dtype, report) for dtype in dtypes] + parts

    return of_transform if group == "transforms" else of_flow


# --- the run ---------------------------------------------------------------------------------------------


def _run(
    source: _Source,
    known: Sequence[Law],
    laws: Sequence[str] | None,
    input_dims: Sequence[Dim],
    context_dims: Sequence[int],
    scales: Sequence[float],
    dtypes: Sequence[torch.dtype],
    seed: int,
) -> Report:
    wanted = _select(known, laws)
    report = Report(source.label, seed)
    make = _trials(source.group, dtypes)
    with isolated():
        for options in source.variants:
            sizes = list(_sizes(source, options, input_dims, context_dims, report, seed))
            middle = sizes[len(sizes) // 2][1] if sizes else 0
            for subject, input_dim, context_dim in sizes:
                rebuild = source.anew(options, input_dim, context_dim)
                for extent, scale in _draws(scales, input_dim == middle, source.built is None):
                    due = [law for law in wanted if law.extent in extent]
                    if not due:
                        continue
                    report.draws += 1
                    case = Case(source.check, source.label, options, input_dim, context_dim, scale, seed)
                    drawn = copy.deepcopy(subject)
                    perturb(drawn, scale, case.generator("parameters"))
                    for trial in make(case, drawn, rebuild, report):
                        own = TRANSFORM_LAWS if isinstance(trial, TransformTrial) else DISTRIBUTION_LAWS
                        for law in due:
                            alone = law.extent in ("layer", "moderate") and trial.dtype != dtypes[-1]
                            if law in own and not alone:
                                _try(law, trial)
        return _verdict(report)


def _draws(scales: Sequence[float], whole: bool, new: bool) -> Iterator[tuple[tuple[str, ...], float]]:
    """Each scale with the extents of the laws that are due there."""
    if new:
        yield ("start",), 0.0
    typical = min(scales, key=lambda scale: abs(log(scale)) if scale else -1.0)
    yield ("moderate",), min(MODERATE, *scales)
    for scale in scales:
        extents = {"draw": True, "shape": scale == typical, "layer": scale == typical and whole}
        yield tuple(name for name, due in extents.items() if due), scale


def _sizes(
    source: _Source,
    options: Mapping[str, Any],
    input_dims: Sequence[Dim],
    context_dims: Sequence[int],
    report: Report,
    seed: int,
) -> Iterator[tuple[Any, Dim, int]]:
    """A new object of every size that the factory accepts."""
    if source.built is not None:
        if source.group != "transforms":
            shape = tuple(source.built.event_shape)
        elif source.check == "check" and input_dims:
            shape = _said_shape(source.built, input_dims[0])
        else:
            shape = _own_shape(source.built)
        yield source.built, shape[0] if len(shape) == 1 else shape, source.built.context_dim
        return
    # A factory that names its own sizes, those of images, takes none that is a number.
    numbers = all(isinstance(input_dim, int) for input_dim in input_dims)
    for input_dim in source.input_dims if source.input_dims and numbers else input_dims:
        for context_dim in context_dims:
            torch.manual_seed(seed)
            try:
                built = source.build(input_dim, context_dim=context_dim, **options)
            except DECLINES as refusal:
                text = f"{dict(options) or ''} input_dim={input_dim}, context_dim={context_dim}: {refusal}"
                report.note(report.declined, f"{type(refusal).__name__} at {text.strip()}")
                continue
            yield built.float(), input_dim, context_dim


def _try(law: Law, trial: Trial) -> None:
    trial.begin(law.name)
    try:
        law.check(trial)
    except Broken as broken:
        found = str(broken)
    except Exception as error:  # whatever a layer raises where it should not is a violation
        found = f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        return
    where, again = trial.case.where(trial.dtype), trial.case.call(law.name, trial.dtype)
    trial.report.violate(law.name, f"  {law.name}: {found}\n    {where}\n    {again}")


def _verdict(report: Report) -> Report:
    for name, tally in report.tallies.items():
        total = tally.checked + tally.skipped
        # At pre-activations of 200 a stack of layers is finite, which is always checked, and rarely has digits left.
        if total >= MANY and tally.checked < SHARE * total and name not in UNCOUNTED:
            text = f"only {tally.checked} of {total} numbers have any digit left to compare"
            report.violate(name, f"  {name}: {text}")
    if not report.draws:
        refusals = "; ".join(report.declined) or "no size was asked for"
        report.violate("sizes", f"  sizes: nothing could be built: {refusals}")
    if not report.ok:
        raise LawViolation(report.complaint)
    return report


def _select(known: Sequence[Law], names: Sequence[str] | None) -> list[Law]:
    for name in names or ():
        if name not in [law.name for law in known]:
            raise OptionError(f"no law {name!r}; the laws are {', '.join(law.name for law in known)}.")
    return [law for law in known if names is None or law.name in names]
