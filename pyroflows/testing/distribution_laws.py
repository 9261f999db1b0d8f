"""The laws of a flow and of the Pyro distributions that it makes; those of its transform are checked as well."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.testing.memo_laws import EDITS, count_calls, never_stale
from pyroflows.testing.trial import LOG_DET, MANY, Law, Trial, held_tensors, is_real

__all__ = ["DISTRIBUTION_LAWS", "FlowTrial"]

DRAWS = 4096
GRID = {1: 4097, 2: 257}
"""Points an axis of the quadrature; odd, so that every other one is a grid too."""
UNRESOLVED = 5e-3
"""If a grid and every other point of it disagree by more, the density is too narrow for the grid."""
KOLMOGOROV = 2.2
"""Above this, root n times the distance, one run in ten thousand of a right sampler lies."""


class FlowTrial(Trial):
    """A trial of a flow."""

    @cached_property
    def flow(self) -> Any:
        """The flow, in ``eval()``; laws that change it take `fresh` ones."""
        return self.fresh().eval()

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one point of the data."""
        return tuple(self.original.event_shape) if self._plain else tuple(self._distribution.event_shape)

    @property
    def _plain(self) -> bool:
        return is_real(self.flow.support)

    @cached_property
    def _distribution(self) -> Any:
        return self.make(self.flow, self.contexts())

    @property
    def draws(self) -> tuple[str, ...]:
        """The ways to sample: ``rsample`` is not among them where a distribution says that it has none."""
        return ("sample", "rsample") if self._distribution.has_rsample else ("sample",)

    def contexts(self, *batch: int) -> Any:
        """Random contexts ``[*batch, context_dim]``, or ``None`` without one."""
        width = self.original.context_dim
        return self.random(*batch, width) if width else None

    @staticmethod
    def make(flow: Any, context: Tensor | None) -> Any:
        """The distribution at a context, or without one."""
        return flow() if context is None else flow(context)

    def data(self, *batch: int) -> Tensor:
        """Points of the support that are no samples of the flow's."""
        shape = torch.Size((*batch, *self.event_shape))
        if self._plain:
            return self.random(*shape) * 2
        to_support = biject_to(self.flow.support)
        return to_support(self.random(*to_support.inverse_shape(shape)))

    @cached_property
    def quadrature(self) -> tuple[Any, Any, Tensor, _Grid] | None:
        """The distribution, its map to the support, samples, and the density on a grid if there can be one."""
        to_support = biject_to(self.flow.support)
        with torch.no_grad():
            d = self.make(self.flow, self.contexts())
            sample = d.sample((DRAWS,))
            flat = to_support.inv(sample)[0].numel()
            return (d, to_support, sample, _quadrature(d, to_support, sample)) if flat in GRID else None

    def same_density(self, what: str, one: Any, other: Any) -> None:
        """The law is broken unless two flows give the very same densities and samples."""
        context, data = self.contexts(5), self.data(5)
        a, b = self.make(one, context), self.make(other, context)
        self.equal(f"log_prob of {what}", a.log_prob(data), b.log_prob(data))
        draws = []
        for d in (a, b):
            torch.manual_seed(0)
            draws.append(d.sample((2,)))
        self.equal(f"samples of {what}", draws[0], draws[1])


# --- shapes ----------------------------------------------------------------------------------------------


def event_shapes(trial: FlowTrial) -> None:
    """Samples and scores have the shapes that Pyro promises; ``expand``, ``to_event`` and ``mask`` compose."""
    event, flow = trial.event_shape, trial.flow

    def expect(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
        trial.require(tuple(value.shape) == shape, f"{what} has shape {tuple(value.shape)}, not {shape}")

    batches: tuple[tuple[int, ...], ...] = ((), (6,), (2, 3)) if flow.context_dim else ((),)
    for batch in batches:
        d = trial.make(flow, trial.contexts(*batch))
        trial.require(isinstance(d, TorchDistributionMixin), f"flow() is a {type(d).__name__}, no Pyro distribution")
        trial.require(tuple(d.batch_shape) == batch, f"batch_shape is {tuple(d.batch_shape)}, not {batch}")
        trial.require(tuple(d.event_shape) == event, f"event_shape is {tuple(d.event_shape)}, not {event}")
        trial.require(d.support.event_dim == len(event), f"support is {d.support}")
        for sample_shape in ((), (1,), (4,), (2, 4), (0,)):
            for draw in trial.draws:
                value = getattr(d, draw)(sample_shape)
                expect(f"{draw}({sample_shape}) at batch {batch}", value, (*sample_shape, *batch, *event))
                expect(f"log_prob of {draw}({sample_shape})", d.log_prob(value), (*sample_shape, *batch))
                inside = not value.numel() or bool(d.support.check(value).all())
                trial.require(inside, f"{draw} leaves the support")
        wide = d.expand((5, *batch))
        if d.has_rsample:
            value, score = d.rsample_with_log_prob((4,))
            expect("the value of rsample_with_log_prob", value, (4, *batch, *event))
            expect("the score of rsample_with_log_prob", score, (4, *batch))
        else:
            for view in (d, wide):
                for method in (view.rsample, view.rsample_with_log_prob):
                    trial.require(_is_none(method), "has_rsample is False, and yet there is an rsample")
        value = getattr(wide, trial.draws[-1])((3,))
        expect("a sample of expand", value, (3, 5, *batch, *event))
        expect("log_prob of expand", wide.log_prob(value), (3, 5, *batch))
        want = d.log_prob(value.clone())
        _close_scores(trial, "log_prob of expand and of the original", wide.log_prob(value.clone()), want)
        trial.close(
            "log_prob of a sample of expand, by what the transform remembers and anew",
            wide.log_prob(value).flatten(),
            want.flatten(),
            LOG_DET[trial.dtype],
            _sensitivity(trial, d, value),
        )
        one = d.expand_by((5,)).to_event(1)
        expect("log_prob of to_event(1)", one.log_prob(one.sample()), (5, *batch)[:-1])
        expect("log_prob of mask", d.mask(False).log_prob(d.sample()), batch)
        trial.require(bool((d.mask(False).log_prob(d.sample()) == 0).all()), "mask(False) leaves a density")


def _is_none(method: Callable[[], Any]) -> bool:
    """Whether a method says that there is no such thing."""
    try:
        method()
    except NotImplementedError:
        return True
    return False


def _close_scores(trial: FlowTrial, what: str, got: Tensor, want: Tensor, moves: Tensor | None = None) -> None:
    """Two computations of the same scores, whose sums may be in another order; a score of a million has few digits.

    Where a product of a batch is summed otherwise than that of one row, ``moves`` is the `_sensitivity` to that.
    """
    trial.require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    amplification = 1e3 + want.flatten().abs() + (0.0 if moves is None else moves)
    trial.close(what, got.flatten(), want.flatten(), LOG_DET[trial.dtype], amplification)


def plates(trial: FlowTrial) -> None:
    """In nested plates, under vectorized particles and as an observation, rows are independent draws."""
    flow, event = trial.flow, trial.event_shape
    context, data = trial.contexts(6), trial.data(4, 6)

    def model(observed: Tensor | None = None) -> Any:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 6, dim=-1):
            return pyro.sample("z", trial.make(flow, context), obs=observed)

    for observed in (None, data):
        trace = poutine.trace(model).get_trace(observed)
        trace.compute_log_prob()
        site: Any = trace.nodes["z"]
        trial.require(
            tuple(site["value"].shape) == (4, 6, *event), f"a sample in plates has shape {tuple(site['value'].shape)}"
        )
        trial.require(
            tuple(site["log_prob"].shape) == (4, 6), f"its log_prob has shape {tuple(site['log_prob'].shape)}"
        )
        if observed is None:
            rows = site["value"].reshape(24, -1)
            different = trial.dtype == torch.float32 or len(rows.unique(dim=0)) == 24  # flat slopes in float32
            trial.require(different, "rows of a plate share their noise")
        else:
            each = torch.stack([trial.make(flow, context).log_prob(row) for row in data])
            moves = _sensitivity(trial, trial.make(flow, context), data)
            _close_scores(trial, "log_prob in nested plates and row by row", site["log_prob"], each, moves)
    if trial._plain:
        zero = torch.zeros(event, dtype=trial.dtype, device=trial.device)

        def prior() -> None:
            with pyro.plate("inner", 6, dim=-1):
                pyro.sample("z", dist.Normal(zero, 1.0).to_event(len(event)))

        def guide() -> None:
            with pyro.plate("inner", 6, dim=-1):
                pyro.sample("z", trial.make(flow, context))

        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.differentiable_loss(prior, guide)
        trial.require(bool(torch.isfinite(loss)), f"the loss under vectorized particles is {float(loss.detach())}")


def context_rows(trial: FlowTrial) -> None:
    """``flow(context[6]).sample((10,))`` is ``[10, 6, D]`` with noise of its own in each row, and each row scores
    as under its own context alone.
    """
    flow = trial.flow
    if not flow.context_dim:
        return
    context, data = trial.contexts(6), trial.data(6)
    d = flow(context)
    sample = d.sample((10,))
    trial.require(tuple(sample.shape) == (10, 6, *trial.event_shape), f"sample((10,)) has shape {tuple(sample.shape)}")
    equal = flow(context[:1].expand(6, -1)).sample((10,)).reshape(60, -1)
    different = trial.dtype == torch.float32 or len(equal.unique(dim=0)) == 60
    trial.require(different, "rows of equal context share their noise")
    alone = torch.stack([flow(row).log_prob(point) for row, point in zip(context, data, strict=True)])
    moves = _sensitivity(trial, d, data)
    _close_scores(trial, "log_prob of a batch of contexts and one by one", d.log_prob(data), alone, moves)
    trial.require(tuple(d.log_prob(data[0]).shape) == (6,), "one point does not broadcast with six contexts")
    grid = flow(context[:, None]).log_prob(data)
    trial.require(tuple(grid.shape) == (6, 6), f"six points under six contexts [6, 1, C] score as {tuple(grid.shape)}")
    _close_scores(trial, "the diagonal of all points under all contexts", grid.diagonal(), alone, moves)


# --- the density -----------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    """A density on a grid of the unconstrained plane: coordinates, log-density in the data's units, and mass."""

    axes: list[Tensor]
    log_prob: Tensor
    mass: Tensor
    total: float
    doubt: float


def _quadrature(d: Any, to_support: Any, sample: Tensor) -> _Grid:
    """The mass of each cell of a grid that is dense where the samples are and reaches far beyond them."""
    flat = to_support.inv(sample).reshape(len(sample), -1)
    axes, weights = [], []
    for column in flat.unbind(-1):
        low, middle, high = column.quantile(column.new_tensor([0.25, 0.5, 0.75]))
        spread = (high - low) / 1.35 + 1e-6
        reach = torch.asinh(1.5 * (column - middle).abs().max() / spread + 8)
        u = torch.linspace(-1, 1, GRID[flat.shape[1]], dtype=column.dtype) * reach
        axes.append(middle + spread * torch.sinh(u))
        weights.append(spread * torch.cosh(u) * (u[1] - u[0]))
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, flat.shape[1])
    points = points.reshape(-1, *sample.shape[1:]) if flat.shape[1] == sample[0].numel() else points
    value = to_support(points)
    jacobian = to_support.log_abs_det_jacobian(points, value).reshape(len(points), -1).sum(-1)
    log_prob = torch.cat([d.log_prob(part) for part in value.split(1 << 14)])
    cells = weights[0] if len(weights) == 1 else weights[0][:, None] * weights[1]
    mass = (log_prob + jacobian).exp().reshape(cells.shape) * cells
    total, coarse = float(mass.sum()), float(mass[(slice(None, None, 2),) * len(axes)].sum()) * 2 ** len(axes)
    return _Grid(axes, log_prob, mass, total, abs(total - coarse))


def _on_a_grid(trial: FlowTrial, law: str) -> tuple[Any, Any, Tensor, _Grid] | None:
    """The distribution, its samples and its density on a grid, unless it is too wide or too narrow for one."""
    found = trial.quadrature
    if found is None:
        return None
    tally, resolved = trial.report.tally(law), found[3].doubt <= UNRESOLVED
    tally.checked, tally.skipped = tally.checked + MANY * resolved, tally.skipped + MANY * (not resolved)
    return found if resolved else None


def normalised(trial: FlowTrial) -> None:
    """The density integrates to one, by quadrature in one and two dimensions."""
    found = _on_a_grid(trial, trial.law)
    if found is None:
        return
    grid = found[3]
    error, allowed = abs(grid.total - 1), max(1e-3, 3 * grid.doubt)
    tally = trial.report.tally(trial.law)
    tally.worst = max(tally.worst, error / allowed)
    trial.require(error <= allowed, f"the density integrates to {grid.total:.5f}, allowed error {allowed:.2g}")


def samples(trial: FlowTrial) -> None:
    """Samples follow the density: Kolmogorov-Smirnov of each coordinate and of the log-density, against quadrature."""
    found = _on_a_grid(trial, trial.law)
    if found is None:
        return
    d, to_support, sample, grid = found
    mass = grid.mass / grid.mass.sum()
    flat = to_support.inv(sample).reshape(DRAWS, -1)
    with torch.no_grad():
        scores = d.log_prob(sample)
    order = grid.log_prob.argsort()
    tests = {"log_prob": (scores, grid.log_prob[order], mass.flatten()[order].cumsum(0))}
    for i, axis in enumerate(grid.axes):
        marginal = mass.sum([j for j in range(mass.dim()) if j != i]) if mass.dim() > 1 else mass
        tests[f"coordinate {i}"] = (flat[:, i], axis, marginal.cumsum(0) - marginal / 2)
    tally = trial.report.tally(trial.law)
    for name, (value, knots, cumulative) in tests.items():
        theirs = _interpolate(value.sort().values.contiguous(), knots.contiguous(), cumulative)
        ours = (torch.arange(DRAWS, dtype=theirs.dtype) + 0.5) / DRAWS
        distance, allowed = float((theirs - ours).abs().max()), KOLMOGOROV / DRAWS**0.5 + 2e-3
        tally.worst = max(tally.worst, distance / allowed)
        trial.require(
            distance <= allowed,
            f"samples and density disagree about {name}: distance {distance:.3g}, allowed {allowed:.3g}",
        )


def _interpolate(at: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    right = torch.searchsorted(knots, at).clamp(1, len(knots) - 1)
    width = (knots[right] - knots[right - 1]).clamp_min(1e-300)
    share = ((at - knots[right - 1]) / width).clamp(0, 1)
    return values[right - 1] + share * (values[right] - values[right - 1])


def joint(trial: FlowTrial) -> None:
    """``rsample_with_log_prob`` scores as ``log_prob`` does, with all gradients; without it, so do samples."""
    flow, context = trial.flow, trial.contexts(5)
    for d in (trial.make(flow, context), trial.make(flow, context).expand((3, *((5,) if flow.context_dim else ())))):
        if d.has_rsample:
            value, score = d.rsample_with_log_prob((7,))
        else:
            value = d.sample((7,))
            score = d.log_prob(value)  # by what the transform remembers
        truth = d.log_prob(value.detach().clone())
        trial.close(
            "rsample_with_log_prob and log_prob",
            score.flatten(),
            truth.flatten(),
            LOG_DET[trial.dtype],
            _sensitivity(trial, d, value),
        )
        again = d.log_prob(value.detach())
        trial.close(
            "log_prob of a detached sample",
            again.flatten(),
            truth.flatten(),
            LOG_DET[trial.dtype],
            _sensitivity(trial, d, value),
        )
        if value.requires_grad:
            grads = torch.autograd.grad(value.sum() + score.sum(), list(flow.parameters()), allow_unused=True)
            trial.require(
                all(g is None or bool(g.isfinite().all()) for g in grads),
                "a gradient through rsample_with_log_prob is not finite",
            )


def _sensitivity(trial: FlowTrial, d: Any, value: Tensor) -> Tensor:
    """How much the score may move when the point is off by rounding."""
    point = value.detach().clone().requires_grad_()
    score = d.log_prob(point)
    (slope,) = torch.autograd.grad(score.sum(), point, allow_unused=True)
    slope = torch.zeros_like(point) if slope is None else slope
    event = tuple(range(score.dim(), point.dim()))
    return (10 + score.detach().abs() + 10 * (slope.abs() * (1 + point.detach().abs())).sum(event)).double().flatten()


def fresh_scores(trial: FlowTrial) -> None:
    """After any change of parameters or points a score is the new one; sampling then scoring costs no inverse."""
    if trial.dtype != torch.float64:
        return
    context = trial.contexts(5)
    edits = EDITS if trial._plain else {name: edit for name, edit in EDITS.items() if "shuffling" in name}
    never_stale(trial, trial.flow, partial(trial.make, context=context), trial.data(5), edits)
    flow = trial.fresh().eval()
    counts = {method: count_calls(flow.transform, method) for method in ("forward_and_log_det", "inverse_and_log_det")}
    d = trial.make(flow, context)
    for view in (d, d.expand((3, *d.batch_shape)), d.mask(True)):
        for draw in trial.draws:
            for calls in counts.values():
                calls[0] = 0
            with torch.set_grad_enabled(draw == "rsample"):
                view.log_prob(getattr(view, draw)())
            used = {method: calls[0] for method, calls in counts.items()}
            trial.require(sum(used.values()) == 1, f"{draw} and log_prob took {used}, not one call")


# --- use -------------------------------------------------------------------------------------------------


def flow_copies(trial: FlowTrial) -> None:
    """deepcopy, pickle, ``state_dict`` into one built anew, ``.to("meta")``: the same density, nothing left behind."""
    flow = trial.flow
    d = trial.make(flow, trial.contexts(5))
    d.log_prob(getattr(d, trial.draws[-1])())
    for name, other in (("deepcopy", copy.deepcopy(flow)), ("pickle", pickle.loads(pickle.dumps(flow)))):
        trial.same_density(f"a {name}", other, flow)
        trial.require(repr(other.config) == repr(flow.config), f"a {name} loses its config")
    for name, clone in (("deepcopy", copy.deepcopy(d)), ("pickle", pickle.loads(pickle.dumps(d)))):
        data = trial.data(5)
        trial.equal(f"log_prob of a {name} of the distribution", clone.log_prob(data), d.log_prob(data))
    if trial.rebuild is not None:
        other = trial.stranger().eval()
        other.load_state_dict(flow.state_dict())
        trial.same_density("a loaded flow", other, flow)
    for held in held_tensors(trial.fresh().to("meta")):
        trial.require(held.is_meta, f'a tensor {tuple(held.shape)} stays on {held.device} after .to("meta")')


def flow_dtype(trial: FlowTrial) -> None:
    """Samples and scores have the flow's dtype, whatever the default dtype is."""
    for held in held_tensors(trial.flow):
        trial.require(
            not held.is_floating_point() or held.dtype == trial.dtype,
            f"a {held.dtype} tensor {tuple(held.shape)} stays behind on .to({trial.dtype})",
        )
    context, data = trial.contexts(5), trial.data(5)
    scores = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            d = trial.make(trial.flow, context)
            value = d.sample((2,))
            scores.append(d.log_prob(data))
        finally:
            torch.set_default_dtype(torch.float32)
        trial.require(value.dtype == trial.dtype, f"samples are {value.dtype} in a {trial.dtype} flow")
        trial.require(scores[-1].dtype == trial.dtype, f"scores are {scores[-1].dtype} in a {trial.dtype} flow")
    trial.equal("log_prob under two default dtypes", scores[0], scores[1])


def training_step(trial: FlowTrial) -> None:
    """One step of ``SVI``, as a density and as a guide, gives every parameter a finite gradient."""
    data, context, event = trial.data(6), trial.contexts(6), trial.event_shape

    def nothing(flow: Any) -> None:
        pass

    def density(flow: Any) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", 6):
            pyro.sample("x", trial.make(flow, context), obs=data)

    def prior(flow: Any) -> None:
        zero = torch.zeros(event, dtype=trial.dtype, device=trial.device)
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(zero, 0.5).to_event(len(event)))

    def guide(flow: Any) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", 6):
            pyro.sample("z", trial.make(flow, context))

    pairs: list[tuple[str, Callable[..., None], Callable[..., None]]] = [("density", density, nothing)]
    if trial._plain:
        pairs.append(("guide", prior, guide))
    for role, model, other in pairs:
        flow = trial.fresh().train()
        Trace_ELBO().differentiable_loss(model, other, flow).backward()
        for name, parameter in flow.named_parameters():
            trial.require(parameter.grad is not None, f"as a {role}, {name} gets no gradient")
            trial.require(bool(parameter.grad.isfinite().all()), f"as a {role}, the gradient of {name} is not finite")
        before = {name: p.detach().clone() for name, p in flow.named_parameters()}
        pyro.clear_param_store()
        loss = SVI(model, other, PyroOptim(torch.optim.Adam, {"lr": 1e-3}), Trace_ELBO()).step(flow)
        moved = any(not torch.equal(p, before[name]) for name, p in flow.named_parameters())
        trial.require(
            loss == loss and (moved or not before), f"a step of SVI as a {role} changed nothing, or its loss is NaN"
        )


def validation(trial: FlowTrial) -> None:
    """A NaN row is refused under validation; without, it alone is NaN. Other points outside are refused too."""
    context, data = trial.contexts(5), trial.data(5)
    spoilt = data.clone()
    spoilt[2] = torch.nan
    with pyro.validation_enabled(True):
        trial.require(
            _refuses(lambda: trial.make(trial.flow, context).log_prob(spoilt)), "log_prob takes NaN under validation"
        )
        if not trial._plain:
            outside = data.clone()
            outside[2] = -1e3
            trial.require(
                _refuses(lambda: trial.make(trial.flow, context).log_prob(outside)),
                "log_prob takes a point outside of the support",
            )
    with pyro.validation_enabled(False):
        d = trial.make(trial.flow, context)
        good, bad = d.log_prob(data), d.log_prob(spoilt)
        keep = torch.arange(5) != 2
        trial.close("the rows beside a NaN row", bad[keep], good[keep], LOG_DET[trial.dtype], 1e2)
        trial.require(bool(bad[2].isnan()), f"the log_prob of a NaN row is {float(bad[2].detach())}")


def _refuses(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


DISTRIBUTION_LAWS = (
    Law("event_shapes", event_shapes, "shape"),
    Law("plates", plates, "shape"),
    Law("context_rows", context_rows, "shape"),
    Law("normalised", normalised, "moderate"),
    Law("samples", samples, "moderate"),
    Law("joint", joint, "moderate"),
    Law("fresh_scores", fresh_scores, "layer"),
    Law("flow_copies", flow_copies, "shape"),
    Law("flow_dtype", flow_dtype, "shape"),
    Law("training_step", training_step, "shape"),
    Law("validation", validation, "shape"),
)
"""Every law of a flow, in the order in which they run; those of its transform follow."""
