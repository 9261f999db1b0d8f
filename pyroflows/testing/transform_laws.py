"""The laws of a transform. Each function is one law, its docstring says which; `laws.py` runs them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from math import isfinite, log
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import ComposeTransform
from torch.distributions.transforms import AffineTransform

from pyroflows.errors import InverseNotConverged, PyroflowsError
from pyroflows.testing.memo_laws import memo
from pyroflows.testing.rounding import measure
from pyroflows.testing.trial import (
    LOG_DET,
    VALUE,
    Broken,
    Law,
    TransformTrial,
    held_tensors,
    is_real,
    perturb,
    same_function,
    size,
)
from pyroflows.transforms import Compose, FlowTransform

__all__ = ["TRANSFORM_LAWS"]

BATCHES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (3, 5), (0,), (2, 0))
HUGE = 2e20
LARGE = (1e20, -1e20, 1e38, -1e38)
SMALL = (0.0, -0.0, 1e-45, -1e-40, 1.5e-38)
DIRECTIONS = (("forward_and_log_det", "x"), ("inverse_and_log_det", "y"))
STEP = 1e-5
Pair = tuple[Tensor, Tensor]


# --- values ----------------------------------------------------------------------------------------------


def round_trip(trial: TransformTrial) -> None:
    """Inverse undoes forward and forward undoes inverse, and float32 agrees with float64."""
    x, y, context, there, back = trial.probe
    t, tol = trial.transform, VALUE[trial.dtype]
    image, found = t.forward_and_log_det(x, context)[0], t.inverse_and_log_det(y, context)[0]
    trial.close("forward(x) and its float64 value", image, there.y, tol, there.of_image)
    trial.close("inverse(y) and its float64 value", found, back.y, tol, back.of_image)
    again, returned = t.inverse_and_log_det(image, context)[0], t.forward_and_log_det(found, context)[0]
    trial.close("inverse(forward(x)) and x", again, x, tol, there.of_return)
    trial.close("forward(inverse(y)) and y", returned, y, tol, back.of_return)


def log_det(trial: TransformTrial) -> None:
    """The log-det is ``slogdet`` of the autograd Jacobian; that of the inverse is its opposite."""
    x, y, context, there, back = trial.probe
    t, tol, n = trial.transform, LOG_DET[trial.dtype], len(x)
    double = torch.finfo(torch.float64).eps / torch.finfo(trial.dtype).eps
    forward, inverse = (
        getattr(t, method)(x if side == "x" else y, context)[1].reshape(n, -1).sum(-1) for method, side in DIRECTIONS
    )
    for name, found, at in (("forward", forward, there), ("inverse", inverse, back)):
        flat = at.true_log_det.isinf() & (found > -300)
        trial.require(not bool(flat.any()), f"the {name} Jacobian is singular where the log-det says otherwise")
        scale = at.of_log_det + double * at.of_true_log_det
        trial.close(f"{name} log-det and slogdet of the Jacobian", found, at.true_log_det, tol, scale)
    image = there.y.to(trial.dtype)
    opposite = t.inverse_and_log_det(image, context)[1].reshape(n, -1).sum(-1)
    scale = there.of_log_det + there.of_return_log_det
    trial.close("inverse log-det at forward(x) and minus the forward log-det", -opposite, forward, tol, scale)
    conditioned = t if context is None else t.condition(context)
    image = conditioned(x)
    trial.close(
        "log_abs_det_jacobian and the forward log-det",
        conditioned.log_abs_det_jacobian(x, image).reshape(n, -1).sum(-1),
        forward,
        tol,
        there.of_log_det,
    )


def _difference(loss: Callable[[], Any], leaves: list[Tensor], ways: list[Tensor]) -> tuple[float, float]:
    """The derivative of ``loss`` along ``ways`` by central differences, and how far off that may be."""

    def at(step: float) -> float:
        with torch.no_grad():
            for leaf, way in zip(leaves, ways, strict=True):
                leaf.add_(way, alpha=step)
        value = float(loss())
        with torch.no_grad():
            for leaf, way in zip(leaves, ways, strict=True):
                leaf.add_(way, alpha=-step)
        return value

    fine = (at(STEP) - at(-STEP)) / (2 * STEP)
    coarse = (at(2 * STEP) - at(-2 * STEP)) / (4 * STEP)
    return (4 * fine - coarse) / 3, abs(fine - coarse)


def _along(loss: Callable[[], Tensor], leaves: list[Tensor], ways: list[Tensor], *, graph: bool) -> Tensor:
    """The derivative of ``loss`` along ``ways`` by autograd."""
    grads = torch.autograd.grad(loss(), leaves, create_graph=graph, allow_unused=True)
    terms = [(grad * way).sum() for grad, way in zip(grads, ways, strict=True) if grad is not None]
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=leaves[0].dtype)


def _compare(
    trial: TransformTrial, what: str, loss: Callable[[], Tensor], leaves: list[Tensor], *, twice: bool
) -> str | None:
    """Autograd against finite differences along a random direction of length one.

    Returns:
        Nothing if they agree, what is wrong if they do not, and ``""`` if the differences are of no use.
    """
    ways = [trial.random(*leaf.shape) for leaf in leaves]
    length = torch.cat([way.flatten() for way in ways]).norm()
    ways = [way / length for way in ways]
    function = loss
    if twice:
        function = functools.partial(_along, loss, leaves, ways, graph=True)
        if not function().requires_grad:
            return None  # linear: there is nothing left to derive
    analytic = float(_along(function, leaves, ways, graph=False))
    trial.require(isfinite(analytic), f"{what} is {analytic}")
    numeric, doubt = _difference(lambda: function().detach(), leaves, ways)
    tally = trial.report.tally(trial.law)
    unit = 1 + abs(analytic) + float(function().detach().abs())
    if doubt > 1e-3 * unit:
        tally.skipped += 1
        return ""
    tally.checked += 1
    error, allowed = abs(analytic - numeric), max(1e-7 * unit, 10 * doubt)
    if error <= allowed:
        tally.worst = max(tally.worst, error / allowed)
        return None
    return f"{what}: autograd {analytic:.6g}, finite differences {numeric:.6g}, allowed {allowed:.3g}"


def _derivatives(trial: TransformTrial, *, twice: bool) -> None:
    """Each derivative at up to three batches of points: a kink spoils the differences at one, a bug at all."""
    if trial.dtype != torch.float64:
        return
    kind = "second derivative" if twice else "derivative"
    for method, side in DIRECTIONS:
        for group in ("the input", "the parameters", "the context"):
            complaint: str | None = ""
            for batch in range(3):
                loss, leaves = _loss(trial, method, side, group, slice(4 * batch, 4 * batch + 4))
                if not leaves:
                    break
                what = f"{kind} of {method} with respect to {group}"
                found = _compare(trial, what, loss, leaves, twice=twice)
                if found is None:
                    complaint = None
                    break
                complaint = found or complaint
            if complaint:
                raise Broken(complaint)


def _loss(
    trial: TransformTrial, method: str, side: str, group: str, rows: slice
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A random linear function of a direction's results, and the tensors of a group that it depends on."""
    t = trial.fresh().eval()
    x, y, context, _, _ = trial.probe
    point = (x if side == "x" else y)[rows].clone()
    at = None if context is None else context[rows].clone()
    with torch.no_grad():
        weights = [trial.random(*part.shape) for part in getattr(t, method)(point, at)]
    groups = {
        "the input": [point],
        "the parameters": list(t.parameters()),
        "the context": [] if at is None else [at],
    }

    def loss() -> Tensor:
        image, log_det = getattr(t, method)(point, at)
        return (image * weights[0]).sum() + (log_det * weights[1]).sum()

    return loss, [leaf.requires_grad_() for leaf in groups[group]]


def gradients(trial: TransformTrial) -> None:
    """Gradients with respect to input, parameters and context agree with finite differences; all are finite."""
    _derivatives(trial, twice=False)
    t = trial.fresh().eval()
    x, y, context, _, _ = trial.probe
    for method, side in DIRECTIONS:
        t.zero_grad(set_to_none=True)
        image, log_det = getattr(t, method)(x if side == "x" else y, context)
        total = image.sum() + log_det.sum()
        if total.requires_grad:
            total.backward()
        for name, parameter in t.named_parameters():
            if parameter.requires_grad:
                trial.require(parameter.grad is not None, f"{method} gives {name} no gradient")
                trial.require(
                    bool(parameter.grad.isfinite().all()), f"{method} gives {name} a gradient that is not finite"
                )


def second_derivatives(trial: TransformTrial) -> None:
    """Second derivatives exist and agree with finite differences of the first."""
    _claimed(trial, "twice_differentiable", lambda: _derivatives(trial, twice=True))


def _claimed(trial: TransformTrial, flag: str, check: Callable[[], None]) -> None:
    """A claim must hold; a modest one that need not be is noted."""
    if getattr(trial.original, flag):
        check()
        return
    try:
        check()
    except Exception as error:  # as it says
        trial.report.exempt.setdefault(trial.law, f"{flag}=False ({type(error).__name__})")
    else:
        trial.understate(flag)


# --- batches ---------------------------------------------------------------------------------------------


def shapes(trial: TransformTrial) -> None:
    """Any number of leading dimensions, 0 and 1 rows, broadcast contexts; the log-det has the batch shape."""
    t, event_dim = trial.transform, trial.transform.domain.event_dim
    for method, side in DIRECTIONS:
        event = trial.event_shape if side == "x" else trial.y_event_shape
        out_event = trial.y_event_shape if side == "x" else trial.event_shape
        kept = event[: len(event) - event_dim]
        for batch in BATCHES:
            point, context = trial.points(*batch, side=side), trial.contexts(*batch)
            image, log_det = getattr(t, method)(point, context)
            for what, got, want in (("result", image, (*batch, *out_event)), ("log-det", log_det, (*batch, *kept))):
                trial.require(
                    tuple(got.shape) == tuple(want),
                    f"{what} of {method} for batch {batch}: shape {tuple(got.shape)}, not {tuple(want)}",
                )
        if not trial.context_dim:
            continue
        for batch, context_batch in (((7,), ()), ((3, 5), (5,)), ((5,), (3, 1)), ((), (4,)), ((3, 1), (5,))):
            point, context = trial.points(*batch, side=side), trial.contexts(*context_batch)
            joint = torch.broadcast_shapes(batch, context_batch)
            got = getattr(t, method)(point, context)
            want = getattr(t, method)(point.expand(*joint, *event), context.expand(*joint, -1))
            for what, one, other in zip(("result", "log-det"), got, want, strict=True):
                name = f"{what} of {method} for batch {batch} and context batch {context_batch}"
                trial.require(one.shape == other.shape, f"{name}: shape {tuple(one.shape)}, not {tuple(other.shape)}")
                trial.close(name, one.flatten(), other.flatten(), VALUE[trial.dtype], 300 * (1 + other.abs().flatten()))


def rows(trial: TransformTrial) -> None:
    """Other rows never change a row's result: its mates, their order, how many they are."""
    x, y, context, there, back = trial.probe
    t, n = trial.transform, len(trial.probe[0])
    order = torch.randperm(n, generator=trial.generator).to(trial.device)
    stretch = torch.where(torch.arange(n, device=trial.device) % 2 == 0, 1.0, 1e3).to(trial.dtype)
    for method, side in DIRECTIONS:
        point = x if side == "x" else y
        scales = (there.of_image, there.of_log_det) if side == "x" else (back.of_image, back.of_log_det)
        run: Callable[[Tensor, Tensor | None], Pair] = getattr(t, method)
        together = run(point, context)
        few = list(range(0, n, 4))
        alone = [run(point[i : i + 1], None if context is None else context[i : i + 1]) for i in few]
        shuffled = run(point[order], None if context is None else context[order])
        crowd = torch.cat([point, trial.points(37, side=side)])
        crowded = run(crowd, None if context is None else torch.cat([context, trial.contexts(37)]))
        for part, (what, scale) in enumerate(zip(("result", "log-det"), scales, strict=True)):
            whole = together[part]
            trial.close_rows(
                f"{what} of {method} of a row alone and among others",
                torch.cat([a[part] for a in alone]),
                whole[few],
                scale[few],
            )
            trial.close_rows(f"{what} of {method} of shuffled rows", shuffled[part], whole[order], scale[order])
            trial.close_rows(f"{what} of {method} with more rows", crowded[part][:n], whole, scale)
        if trial.transform.domain.event_dim and side == "x":
            far = run(point * stretch.reshape(-1, *(1,) * (point.dim() - 1)), context)
            even = slice(0, None, 2)
            for part, (what, scale) in enumerate(zip(("result", "log-det"), scales, strict=True)):
                trial.close_rows(
                    f"{what} of {method} with far mates", far[part][even], together[part][even], scale[even]
                )


def extreme_inputs(trial: TransformTrial) -> None:
    """Huge, tiny, NaN and infinite inputs, integers and their neighbours: no NaN from a finite input, finite
    gradients, and no harm to the rows beside.
    """
    x, y, context, there, back = trial.probe
    for method, side in DIRECTIONS:
        t = trial.fresh().eval()
        good, (scale, log_scale) = (
            (x, (there.of_image, there.of_log_det)) if side == "x" else (y, (back.of_image, back.of_log_det))
        )
        constraint = t.domain if side == "x" else t.codomain
        edges = torch.tensor([float(i) for i in range(-11, 12)], dtype=trial.dtype, device=trial.device)
        up, down = torch.full_like(edges, torch.inf), torch.full_like(edges, -torch.inf)
        values = torch.cat(
            [
                torch.tensor([*LARGE, *SMALL, torch.finfo(trial.dtype).tiny], dtype=trial.dtype, device=trial.device),
                edges,
                torch.nextafter(edges, up),
                torch.nextafter(edges, down),
            ]
        )
        event = trial.event_shape if side == "x" else trial.y_event_shape
        column = values.reshape(-1, *(1,) * len(event))
        everywhere = column.expand(-1, *event)
        base = good[:1].expand(len(values), *event)
        first = torch.arange(size(event), device=trial.device).reshape(event) == 0
        bad = torch.cat([everywhere, torch.where(first, column, base)])
        legal = constraint.check(bad).reshape(len(bad), -1).all(-1)
        bad = bad[legal]
        ill = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=trial.dtype, device=trial.device)
        ill = torch.where(first, ill.reshape(-1, *(1,) * len(event)), good[:1].expand(3, *event))
        try:
            _mixed(trial, t, method, good, bad, ill, context, (scale, log_scale))
        except InverseNotConverged:  # a search may refuse what lies beyond the dtype's range, and nothing else
            bad = bad[bad.flatten(1).abs().amax(-1) <= HUGE]
            _mixed(trial, t, method, good, bad, ill, context, (scale, log_scale))


def _mixed(
    trial: TransformTrial,
    t: Any,
    method: str,
    good: Tensor,
    bad: Tensor,
    ill: Tensor,
    context: Tensor | None,
    scales: Pair,
) -> None:
    run: Callable[[Tensor, Tensor | None], Pair] = getattr(t, method)
    n, m = len(good), len(bad)

    def contexts(count: int) -> Tensor | None:
        return None if context is None else torch.cat([context, context[:1].expand(count, -1)])

    want = run(good, context)
    finite = torch.cat([good, bad])
    got = run(finite, contexts(m))
    moderate = finite.flatten(1).abs().amax(-1) <= HUGE
    true = want if trial.dtype == torch.float64 else _in_float64(trial, method, finite, contexts(m))
    # Where the true result is beyond the dtype's range, no finite number would be right.
    fits = torch.ones_like(moderate)
    if trial.dtype != torch.float64:
        limit = torch.finfo(trial.dtype).max / 8
        fits = torch.stack([(part.reshape(n + m, -1).abs() < limit).all(-1) for part in true]).all(0)
    # A gradient may be larger than its result by what the parameters do: room is left for that.
    usable = moderate & (got[0].detach().reshape(n + m, -1).abs() < torch.finfo(trial.dtype).max / 1e8).all(-1)
    for part, what in enumerate(("result", "log-det")):
        trial.close_rows(f"{what} of {method} beside extreme rows", got[part][:n], want[part], scales[part])
        flat = got[part].detach().reshape(n + m, -1)
        for fault, which in (
            ("NaN", flat.isnan().any(-1) & fits),
            ("infinite", flat.isinf().any(-1) & fits & moderate),
        ):
            rows = finite[which][:2].tolist()
            trial.require(
                not rows, f"{what} of {method} is {fault} for {int(which.sum())} finite inputs, such as {rows}"
            )
        usable &= flat.isfinite().all(-1)
    _finite_gradients(trial, t, method, finite[usable], contexts(m), usable)
    try:
        spoilt = run(torch.cat([good, ill]), contexts(len(ill)))
    except PyroflowsError:  # refused by a typed error
        return
    for part, what in enumerate(("result", "log-det")):
        trial.close_rows(
            f"{what} of {method} beside rows that are NaN or infinite", spoilt[part][:n], want[part], scales[part]
        )


def _finite_gradients(
    trial: TransformTrial, t: Any, method: str, point: Tensor, context: Tensor | None, rows: Tensor
) -> None:
    point = point.requires_grad_()
    image, log_det = getattr(t, method)(point, None if context is None else context[rows])
    total = image.sum() + log_det.sum()
    if not total.requires_grad:
        return
    grads = torch.autograd.grad(total, [point, *t.parameters()], allow_unused=True)
    for name, grad in zip(["the input", *(name for name, _ in t.named_parameters())], grads, strict=True):
        finite = grad is None or bool(grad.isfinite().all())
        trial.require(finite, f"the gradient of {method} with respect to {name} is not finite for huge inputs")


def _in_float64(trial: TransformTrial, method: str, point: Tensor, context: Tensor | None) -> Pair:
    with torch.no_grad():
        wide = None if context is None else context.double()
        return getattr(trial.exact, method)(point.detach().double(), wide)


def extreme_parameters(trial: TransformTrial) -> None:
    """Pre-activations of +-200: everything stays finite that the dtype can hold, and the map invertible."""
    for sign in (1.0, -1.0, 0.0):
        t = trial.fresh().eval()
        with torch.no_grad():
            for owner in t.modules():
                for parameter in owner._parameters.values():
                    if parameter is not None and (parameter.dim() < 2 or isinstance(owner, FlowTransform)):
                        signs = sign or torch.sign(trial.random(*parameter.shape))
                        parameter.copy_(torch.as_tensor(200.0 * signs, dtype=parameter.dtype).expand(parameter.shape))
        x, y, context, _, _ = trial.probe
        at = f"pre-activations {'of random signs' if sign == 0 else f'{200 * sign:+g}'}"
        for method, side in DIRECTIONS:
            point = (x if side == "x" else y).clone().requires_grad_()
            parts = getattr(t, method)(point, context)
            fits = _representable(trial, t, method, point, context)
            for what, value in zip(("result", "log-det"), parts, strict=True):
                finite = value.isfinite().reshape(len(x), -1).all(-1) | ~fits
                trial.require(bool(finite.all()), f"{what} of {method} is not finite at {at}")
            if bool(fits.all()):
                total = parts[0].sum() + parts[1].sum()
                grads = torch.autograd.grad(total, [point, *t.parameters()], allow_unused=True)
                finite = [grad is None or bool(grad.isfinite().all()) for grad in grads]
                trial.require(all(finite), f"a gradient of {method} is not finite at {at}")
        if trial.dtype == torch.float64:
            _still_invertible(trial, t, x, context)


def _representable(trial: TransformTrial, t: Any, method: str, point: Tensor, context: Tensor | None) -> Tensor:
    """The rows whose true result, computed in float64, the dtype can hold with room for its gradient."""
    if trial.dtype == torch.float64:
        return torch.ones(len(point), dtype=torch.bool, device=point.device)
    with torch.no_grad():
        wide = None if context is None else context.double()
        parts = getattr(copy.deepcopy(t).double(), method)(point.detach().double(), wide)
    limit = torch.finfo(trial.dtype).max / 1e8
    return torch.stack([(part.abs() < limit).reshape(len(point), -1).all(-1) for part in parts]).all(0)


def _still_invertible(trial: TransformTrial, t: Any, x: Tensor, context: Tensor | None) -> None:
    there = measure(t, x, context)
    back = t.inverse_and_log_det(there.y, context)[0]
    trial.require(bool(there.log_det.isfinite().all()), "the log-det is not finite at extreme parameters")
    trial.close("inverse(forward(x)) and x at extreme parameters", back, x, VALUE[trial.dtype], there.of_return)


# --- purity, copies and dtypes ---------------------------------------------------------------------------


def pure(trial: TransformTrial) -> None:
    """A call changes no input, no parameter, no buffer and no random state, and two calls agree, in ``train()``
    as in ``eval()``, with or without gradients. A log-det that is an estimate is one in ``train()`` alone.
    """
    x, y, context, _, _ = trial.probe
    t = trial.fresh()
    for method, side in DIRECTIONS:
        run = getattr(t, method)
        point = (x if side == "x" else y).clone()
        kept, before = point.clone(), copy.deepcopy(dict(t.state_dict(keep_vars=False)))
        rng = torch.get_rng_state()
        results = {}
        for mode in (False, True):
            t.train(mode)
            if mode and trial.estimates:
                continue
            results[f"train({mode})"] = run(point, context)
            with torch.no_grad():
                results[f"train({mode}) under no_grad"] = run(point, context)
            with torch.inference_mode():
                results[f"train({mode}) in inference mode"] = tuple(r.clone() for r in run(point, context))
        trial.require(bool(torch.equal(rng, torch.get_rng_state())), f"{method} draws random numbers")
        trial.equal(f"the input after {method}", point, kept)
        for name, value in t.state_dict().items():
            trial.equal(f"{name} after {method}", value, before[name])
        want = results["train(False)"]
        for name, got in results.items():
            trial.equal(f"result of {method} in {name}", got[0], want[0])
            trial.equal(f"log-det of {method} in {name}", got[1], want[1])
        strided = torch.stack([point, point], -1)[..., 0]
        trial.close(
            f"result of {method} of a strided input",
            run(strided, context)[0],
            want[0],
            VALUE[trial.dtype],
            10 * (1 + float(want[0].detach().abs().max())),
        )


def start(trial: TransformTrial) -> None:
    """A freshly built layer is near the identity: a stack of twenty starts sane."""
    x, _, context, _, _ = trial.probe
    _, log_det = trial.transform.forward_and_log_det(x, context)
    each = float(log_det.detach().abs().reshape(len(x), -1).sum(-1).mean()) / size(trial.event_shape)
    trial.require(each < 0.5, f"mean |log-det| a dimension is {each:.3g} in a new layer, expected below 0.5")


def copies(trial: TransformTrial) -> None:
    """Deepcopy and pickle of a layer in use give the same function, independent of the original."""
    t = trial.transform
    x, y, context, _, _ = trial.probe
    used = t if context is None else t.condition(context)
    used(x)
    used.inv(y)
    _ = t.inv
    for name, clone in (("deepcopy", copy.deepcopy), ("pickle", lambda value: pickle.loads(pickle.dumps(value)))):
        other = clone(t)
        same_function(trial, name, other, t)
        trial.require(other.inv.inv is other, f"inv.inv of a {name} is not itself")
        trial.require(
            not {id(p) for p in other.parameters()} & {id(p) for p in t.parameters()}, f"a {name} shares parameters"
        )
        image = t.forward_and_log_det(x, context)[0]
        perturb(other, 1.0, trial.generator)
        trial.equal(f"the original after its {name} was changed", t.forward_and_log_det(x, context)[0], image)
        at_context = clone(used)
        trial.equal(f"{name} of the conditioned layer", at_context(x), image)


def state_dict(trial: TransformTrial) -> None:
    """``state_dict`` of one layer, loaded into one built from other random numbers, gives the same function."""
    if trial.rebuild is None:
        trial.report.exempt.setdefault(trial.law, "the object was not built by name, so it cannot be built anew")
        return
    t, other = trial.fresh().eval(), trial.stranger().eval()
    state = t.state_dict()
    for name, value in state.items():
        trial.require(isinstance(value, Tensor), f"the state holds {name}, which is a {type(value).__name__}")
    other.load_state_dict(state)
    same_function(trial, "a loaded layer", other, t)


def dtype(trial: TransformTrial) -> None:
    """Results have the dtype of the layer, log-dets at least float32; no constant is left in another dtype, and
    the default dtype has no say.
    """
    x, y, context, _, _ = trial.probe
    t = trial.transform
    for held in held_tensors(t):
        trial.require(
            not held.is_floating_point() or held.dtype == trial.dtype,
            f"a {held.dtype} tensor {tuple(held.shape)} stays behind on .to({trial.dtype})",
        )
    for method, side in DIRECTIONS:
        point = x if side == "x" else y
        results = []
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            try:
                results.append(getattr(t, method)(point, context))
            finally:
                torch.set_default_dtype(torch.float32)
        for part, what in enumerate(("result", "log-det")):
            got = results[0][part]
            trial.require(got.dtype == trial.dtype, f"{what} of {method} is {got.dtype} in a {trial.dtype} layer")
            trial.equal(f"{what} of {method} under two default dtypes", got, results[1][part])
    small = trial.fresh().to(torch.bfloat16)
    _, half = small.forward_and_log_det(x.bfloat16(), None if context is None else context.bfloat16())
    trial.require(
        half.dtype == torch.float32, f"the log-det of a bfloat16 layer is summed in {half.dtype}, not float32"
    )


def meta(trial: TransformTrial) -> None:
    """``.to("meta")`` leaves no tensor behind, and shapes can be computed there."""
    t = trial.fresh().eval().to("meta")
    for held in held_tensors(t):
        trial.require(held.is_meta, f'a tensor {tuple(held.shape)} stays on {held.device} after .to("meta")')
    x, y, context, _, _ = trial.probe
    cast = None if context is None else context.to("meta")
    if t.inverse == "numeric":
        return  # a search looks at its numbers
    for method, side in DIRECTIONS:
        point = x if side == "x" else y
        for got, want in zip(
            getattr(t, method)(point.to("meta"), cast), getattr(trial.transform, method)(point, context), strict=True
        ):
            trial.require(
                got.is_meta and got.shape == want.shape,
                f"{method} on meta gives {tuple(got.shape)}, not {tuple(want.shape)}",
            )


# --- the algebra and Pyro's protocol ---------------------------------------------------------------------


def algebra(trial: TransformTrial) -> None:
    """``.inv``, ``Compose`` and ``.condition`` are modules that keep every parameter, and mean what they say."""
    x, y, context, there, _ = trial.probe
    t = trial.transform
    parameters = {id(p) for p in t.parameters()}
    buffers = {id(b) for b in t.buffers()}
    at = t if context is None else t.condition(context)
    built = {
        "inv": t.inv,
        "Compose": Compose([t, t.inv]),
        "condition": at,
        "condition(...).inv": at.inv,
        "inv.condition": t.inv if context is None else t.inv.condition(context),
    }
    for name, other in built.items():
        trial.require(
            isinstance(other, nn.Module) and isinstance(other, FlowTransform),
            f"{name} is a {type(other).__name__}, no module",
        )
        trial.require({id(p) for p in other.parameters()} == parameters, f"{name} does not hold the same parameters")
        trial.require(buffers <= {id(b) for b in other.buffers()}, f"{name} loses a buffer")
    trial.require(t.inv.inv is t and t.inv is t.inv, "inv.inv is not the layer itself")
    trial.require(at.inv.inv is at, "inv.inv of the conditioned layer is not itself")
    trial.equal(
        "inv.forward and inverse", t.inv.forward_and_log_det(y, context)[0], t.inverse_and_log_det(y, context)[0]
    )
    trial.equal("condition(c)(x) and forward(x, c)", at(x), t.forward_and_log_det(x, context)[0])
    both = Compose([t, t.inv])
    again, total = both.forward_and_log_det(x, context)
    trial.close("Compose([t, t.inv])(x) and x", again, x, VALUE[trial.dtype], there.of_return)
    zero = torch.zeros_like(total)
    trial.close(
        "the log-det of Compose([t, t.inv]) and 0",
        total,
        zero,
        LOG_DET[trial.dtype],
        there.of_log_det + there.of_return_log_det,
    )
    if tuple(trial.event_shape) == tuple(trial.y_event_shape):
        twice, total = Compose([at, at]).forward_and_log_det(x)
        image, one = at.forward_and_log_det(x)
        other_image, two = at.forward_and_log_det(image)
        trial.equal("Compose([t, t])(x) and t(t(x))", twice, other_image)
        trial.close(
            "the log-det of Compose([t, t]) and the sum of two",
            total,
            one + two,
            LOG_DET[trial.dtype],
            (one.abs() + two.abs()).reshape(len(x), -1).amax(-1),
        )
    for shape in ((7, *trial.event_shape), (3, 5, *trial.event_shape), trial.event_shape):
        trial.require(
            tuple(t.inverse_shape(t.forward_shape(shape))) == tuple(shape),
            f"inverse_shape(forward_shape({shape})) is another shape",
        )


def _base(trial: TransformTrial, t: Any, side: str = "x") -> Any:
    shape = trial.event_shape if side == "x" else trial.y_event_shape
    zero = torch.zeros(shape, dtype=trial.dtype, device=trial.device)
    return dist.Normal(zero, torch.ones_like(zero)).to_event(t.domain.event_dim)


def protocol(trial: TransformTrial) -> None:
    """Pyro's and torch's own distributions and compositions take the layer, and agree with it."""
    t = trial.transform
    x, y, context, _, _ = trial.probe
    at = t if context is None else t.condition(context)
    trial.require(
        isinstance(t, ConditionalTransform) and getattr(t, "bijective", False), "not a bijective ConditionalTransform"
    )
    for name, cached in (
        ("with_cache(0)", t.with_cache(0)),
        ("with_cache(1)", t.with_cache(1)),
        ("with_cache()", t.with_cache()),
    ):
        same_function(trial, name, cached, t)
    t.clear_cache()
    if not is_real(t.domain):
        return
    base = _base(trial, t)
    plain = dist.TransformedDistribution(base, [at])
    inverse, log_det = at.inverse_and_log_det(y)
    summed = base.log_prob(inverse) + log_det
    tol = LOG_DET[trial.dtype]
    unit = 10 * (1 + inverse.abs().reshape(len(y), -1).amax(-1) ** 2 + log_det.abs().reshape(len(y), -1).amax(-1))
    trial.require(plain.support.event_dim == t.codomain.event_dim, f"the support is {plain.support}")
    trial.close("log_prob of pyro.distributions.TransformedDistribution", plain.log_prob(y), summed, tol, unit)
    torch_plain = torch.distributions.TransformedDistribution(base, [at], validate_args=False)
    trial.close("log_prob of torch.distributions.TransformedDistribution", torch_plain.log_prob(y), summed, tol, unit)
    # Twice a number is exact, so that the layer is handed the very same points.
    twice, doubling = AffineTransform(0.0, 2.0), size(trial.y_event_shape) * log(2)
    compositions: dict[str, Any] = {
        "ComposeTransformModule": dist.transforms.ComposeTransformModule([at, twice]),
        "ComposeTransform": ComposeTransform([at, twice]),
        "iterated": dist.transforms.iterated(1, lambda: at),
    }
    if t.domain.event_dim == 0:
        doubling = log(2)
    for name, composition in compositions.items():
        through = dist.TransformedDistribution(base, [composition])
        score = through.log_prob(y) if name == "iterated" else through.log_prob(2 * y) + doubling
        trial.close(f"log_prob through {name}", score, summed, tol, unit)
    held = list(compositions["ComposeTransformModule"].parameters())
    trial.require({id(p) for p in held} == {id(p) for p in t.parameters()}, "ComposeTransformModule loses parameters")
    y_base = _base(trial, at.inv, "y")  # other than the base where the event shapes differ
    inverted = dist.TransformedDistribution(y_base, [at.inv])
    image, forward_log_det = at.forward_and_log_det(x)
    unit = 10 * (1 + image.abs().reshape(len(x), -1).amax(-1) ** 2 + forward_log_det.abs().reshape(len(x), -1).amax(-1))
    trial.close("log_prob through .inv", inverted.log_prob(x), y_base.log_prob(image) + forward_log_det, tol, unit)
    conditional = dist.ConditionalTransformedDistribution(base, [t])
    there = conditional.condition(torch.zeros(1, device=trial.device) if context is None else context)
    trial.close("log_prob of ConditionalTransformedDistribution", there.log_prob(y), summed, tol, unit)
    _shapes_under_pyro(trial, t, at, plain)


def _shapes_under_pyro(trial: TransformTrial, t: Any, at: Any, plain: Any) -> None:
    n = len(trial.probe[0])
    event = tuple(trial.y_event_shape)
    batch = (n,) if trial.context_dim else ()
    kept = event[: len(event) - t.codomain.event_dim]
    trial.require(
        tuple(plain.batch_shape) == (*batch, *kept), f"batch_shape is {tuple(plain.batch_shape)}, not {(*batch, *kept)}"
    )
    sample = plain.sample((3,))
    trial.require(
        tuple(sample.shape) == (3, *batch, *event),
        f"sample((3,)) has shape {tuple(sample.shape)}, not {(3, *batch, *event)}",
    )
    trial.require(
        tuple(plain.log_prob(sample).shape) == (3, *batch, *kept),
        f"log_prob has shape {tuple(plain.log_prob(sample).shape)}",
    )
    wide = plain.expand((4, *batch, *kept))
    trial.require(tuple(wide.rsample().shape) == (4, *batch, *event), "expand does not reach the samples")
    flat = sample.reshape(-1, size(event))
    if trial.dtype == torch.float64:  # in float32 a flat slope makes equal rows of different noise
        trial.require(len(flat.unique(dim=0)) == len(flat), "two rows share their noise")


# --- claims ----------------------------------------------------------------------------------------------


def vmap(trial: TransformTrial) -> None:
    """``torch.func.vmap``, ``jacrev`` and per-row gradients of parameters work, and leave nothing in the memo."""
    _claimed(trial, "vmaps", lambda: _vmap(trial))


def _vmap(trial: TransformTrial) -> None:
    t = copy.deepcopy(trial.transform)
    x, y, context, there, back = trial.probe
    scales = {
        "forward_and_log_det": (there.of_image, there.of_log_det),
        "inverse_and_log_det": (back.of_image, back.of_log_det),
    }
    for method, side in DIRECTIONS:
        point, run = (x if side == "x" else y), getattr(t, method)
        want = run(point, context)
        if context is None:
            got = torch.func.vmap(lambda row, run=run: run(row, None), randomness="different")(point)
        else:
            got = torch.func.vmap(run, randomness="different")(point, context)
        for part, what in enumerate(("result", "log-det")):
            trial.close_rows(f"{what} of {method} under vmap", got[part], want[part], scales[method][part])
    at = t if context is None else t.condition(context[:1])
    one = x[:1]
    torch.func.vmap(at, randomness="different")(x)
    torch.func.vmap(at.inv, randomness="different")(y)
    jacobian = torch.func.jacrev(at)(one)
    trial.require(bool(jacobian.isfinite().all()), "jacrev is not finite")
    for module in (t, at, at.inv):
        entry = [value for value in (getattr(module, "_memo", None) or ()) if isinstance(value, Tensor)]
        dead = any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in entry)
        trial.require(not dead, "a tensor of functorch is left in the memo")
    parameters = {name: p.detach() for name, p in t.named_parameters()}
    if parameters and context is None:

        def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(t, parameters, (row,)).sum()

        rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        trial.require(
            all(len(g) == len(x) and bool(g.isfinite().all()) for g in rows.values()), "per-row gradients fail"
        )
    trial.require(bool(at(one).isfinite().all()) and bool(at.inv(y[:1]).isfinite().all()), "unusable after functorch")


def compile(trial: TransformTrial) -> None:
    """``torch.compile(fullgraph=True)`` of both directions, with gradients."""
    _claimed(trial, "compiles", lambda: _compile(trial))


def _compile(trial: TransformTrial) -> None:
    t = trial.fresh().eval()
    x, y, context, there, back = trial.probe
    scales = ((there.of_image, there.of_log_det), (back.of_image, back.of_log_det))
    for (method, side), scale in zip(DIRECTIONS, scales, strict=True):
        point, run = (x if side == "x" else y), getattr(t, method)
        torch._dynamo.reset()
        try:
            got = torch.compile(run, fullgraph=True, backend="eager")(point, context)
        finally:
            torch._dynamo.reset()
        want = run(point, context)
        for part, what in enumerate(("result", "log-det")):
            trial.close_rows(f"{what} of the compiled {method}", got[part], want[part], scale[part])
        if got[0].requires_grad:
            (got[0].sum() + got[1].sum()).backward()


def estimate(trial: TransformTrial) -> None:
    """A random log-det is unbiased within 4 standard errors over 4096 draws, and exact and fixed in ``eval()``."""
    if not trial.estimates:
        trial.report.exempt.setdefault(trial.law, "the log-det is exact")
        return
    x, _, context, there, _ = trial.probe
    t = trial.fresh().train()
    point = x[:1].expand(64, *x.shape[1:])
    rows = None if context is None else context[:1].expand(64, -1)
    with torch.no_grad():
        runs = [t.forward_and_log_det(point, rows) for _ in range(64)]
    means = torch.stack([log_det.double().reshape(64, -1).sum(-1).mean() for _, log_det in runs])
    error = float((means.mean() - there.true_log_det[0]).abs())
    allowed = 4 * float(means.std()) / 8 + LOG_DET[torch.float32]
    trial.require(error <= allowed, f"the mean estimate is off by {error:.3g}, 4 standard errors are {allowed:.3g}")
    for image, _ in runs[1:]:
        trial.close_rows("the point itself in two estimates", image, runs[0][0], float(there.of_image[0]))
    t.eval()
    trial.equal("two log-dets in eval()", t.forward_and_log_det(x, context)[1], t.forward_and_log_det(x, context)[1])
    t.train()
    at = t if context is None else t.condition(context)
    image = at(x)
    first = at.log_abs_det_jacobian(x, image)
    trial.equal("two readings of one solve's log-det", at.log_abs_det_jacobian(x, image), first)


TRANSFORM_LAWS = (
    Law("pure", pure, "shape"),
    Law("shapes", shapes, "shape"),
    Law("round_trip", round_trip),
    Law("log_det", log_det),
    Law("gradients", gradients),
    Law("second_derivatives", second_derivatives, "shape", "twice_differentiable"),
    Law("rows", rows),
    Law("extreme_inputs", extreme_inputs),
    Law("extreme_parameters", extreme_parameters, "shape"),
    Law("start", start, "start"),
    Law("memo", memo, "layer"),
    Law("copies", copies, "shape"),
    Law("state_dict", state_dict, "shape"),
    Law("dtype", dtype, "shape"),
    Law("meta", meta, "shape"),
    Law("algebra", algebra, "shape"),
    Law("protocol", protocol, "shape"),
    Law("vmap", vmap, "shape", "vmaps"),
    Law("compile", compile, "layer", "compiles"),
    Law("estimate", estimate, "layer", "log_det"),
)
"""Every law of a transform, in the order in which they run."""
