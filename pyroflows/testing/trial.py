"""What a law is given: one object at one draw of its parameters, with points, contexts and a way to say no."""

from __future__ import annotations

import copy
import io
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod, sqrt
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from pyroflows.plugins import Config
from pyroflows.testing.report import Report
from pyroflows.testing.rounding import Rounding, measure, widen
from pyroflows.transforms import FlowTransform

__all__ = [
    "Broken",
    "Case",
    "Law",
    "TransformTrial",
    "Trial",
    "held_tensors",
    "is_real",
    "isolated",
    "perturb",
    "same_function",
]

VALUE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Allowed absolute error of a point, unless rounding alone explains more."""
LOG_DET = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Allowed absolute error of a log-det."""
ROWS = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Allowed change of a row by the rows beside it."""
ROUNDINGS = 50
"""How many machine epsilons one unit of `rounding` stands for: a network is not one operation."""
NO_DIGIT = 0.03
"""If rounding alone may be off by more, the number says nothing and is skipped."""
MANY = 200
"""Below so many numbers, the share of those that were skipped says nothing."""
ROWS_OF_A_PROBE = 16


class Broken(Exception):
    """A law does not hold; ends the law for this draw."""


class Law(NamedTuple):
    """A law: its name, what checks it, and for how much of the matrix it is worth its time.

    Attributes:
        name: the name that reports give it.
        check: a function of a trial whose docstring states the law.
        extent: ``"draw"``: every parameter scale and dtype; ``"shape"``: one draw of each input and context
            width; ``"layer"``: one draw with and one without a context.
        flag: the attribute by which a transform may opt out, if any; a wrong flag is reported.
    """

    name: str
    check: Callable[[Any], None]
    extent: str = "draw"
    flag: str = ""


@dataclass(frozen=True)
class Case:
    """One draw: what was built, how, and from which random numbers.

    Attributes:
        check: the function of `pyroflows.testing` that runs it.
        label: the registered name, or the class.
        options: the variant.
        input_dim: the number of coordinates, or the shape of a point.
        context_dim: the width of the context.
        scale: the standard deviation of what was added to the parameters.
        seed: the seed of the run.
    """

    check: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    input_dim: int | tuple[int, ...] = 0
    context_dim: int = 0
    scale: float = 0.0
    seed: int = 0

    def generator(self, salt: str = "") -> torch.Generator:
        """Random numbers that are the same whenever this case is run."""
        key = f"{self.seed}/{self.options}/{self.input_dim}/{self.context_dim}/{self.scale}/{salt}"
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def where(self, dtype: torch.dtype) -> str:
        """The draw in words."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"{self.label}(input_dim={self.input_dim}, context_dim={self.context_dim}{options}) at "
            f"scale={self.scale}, {str(dtype).removeprefix('torch.')}, seed={self.seed}"
        )

    def call(self, law: str, dtype: torch.dtype) -> str:
        """The call that runs one law at this draw alone."""
        shape = f"variants=({dict(self.options)!r},), input_dims=({self.input_dim},), "
        shape += f"context_dims=({self.context_dim},), scales=({self.scale},), "
        sizes = "" if self.check == "check" else shape
        return f'{self.check}({self.label!r}, {sizes}dtypes=({dtype},), seed={self.seed}, laws=("{law}",))'


@contextmanager
def isolated() -> Iterator[None]:
    """Leaves nothing changed behind: random numbers, default dtype, validation, parameter store, grad mode."""
    dtype = torch.get_default_dtype()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        pyro.settings.context(**pyro.settings.get()),
        pyro.get_param_store().scope(),
    ):
        pyro.enable_validation(True)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def perturb(module: nn.Module, scale: float, generator: torch.Generator) -> None:
    """Adds ``scale`` standard deviations to every parameter.

    A layer's own parameters move by ``scale``; a network's weights by ``scale`` over the root of the fan-in, so
    that its outputs, which are parameters of the layer too, move by about as much.
    """
    with torch.no_grad():
        for owner in module.modules():
            for parameter in owner._parameters.values():
                if parameter is None or not parameter.is_floating_point() or not scale:
                    continue
                network = parameter.dim() > 1 and not isinstance(owner, Transform)
                step = scale / sqrt(parameter[0].numel()) if network and len(parameter) else scale
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=step)


def held_tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor that a pickle of the module would hold, wherever it hides."""
    found: list[Tensor] = []

    class Finder(pickle.Pickler):
        def persistent_id(self, item: Any) -> str | None:
            if isinstance(item, Tensor):
                found.append(item)
            # How an object was built computes nothing, wherever its tensors are.
            return "left out" if isinstance(item, Tensor | Config) else None

    Finder(io.BytesIO()).dump(module)
    return found


class Trial:
    """One object at one draw, in one dtype, for one law at a time.

    Args:
        case: the draw.
        subject: the object, ``float32`` valued, on which everything is done through copies.
        rebuild: makes the same object anew from other random numbers, if it can be.
        dtype: the dtype of this trial.
        report: where findings go.
    """

    law = ""

    def __init__(
        self,
        case: Case,
        subject: Any,
        rebuild: Callable[[], Any] | None,
        dtype: torch.dtype,
        report: Report,
    ) -> None:
        self.case, self.original, self.rebuild, self.dtype, self.report = case, subject, rebuild, dtype, report
        tensor = next(iter([*subject.parameters(), *subject.buffers()]), torch.empty(0))
        self.device = tensor.device
        self.generator = case.generator()

    # --- what a law calls -------------------------------------------------------------------------------

    def begin(self, law: str) -> None:
        """Starts a law, with random numbers of its own."""
        self.law = law
        self.generator = self.case.generator(law)
        torch.manual_seed(self.generator.initial_seed())
        self.report.tally(law)

    def fresh(self) -> Any:
        """A copy of the object in this trial's dtype."""
        return copy.deepcopy(self.original).to(self.dtype)

    def stranger(self) -> Any:
        """The same object built anew from other random numbers, in this trial's dtype.

        Raises:
            LookupError: the object was not built by name, so nobody knows how.
        """
        if self.rebuild is None:
            raise LookupError("the object was not built by name, so it cannot be built anew")
        torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator)))
        other = self.rebuild().to(self.device)
        perturb(other, max(self.case.scale, 0.1), self.generator)
        return other.to(self.dtype).train(self.original.training)

    def require(self, holds: bool, what: str) -> None:
        """The law is broken unless ``holds``."""
        self.report.tally(self.law).checked += 1
        if not holds:
            raise Broken(what)

    def equal(self, what: str, got: Tensor, want: Tensor) -> None:
        """The law is broken unless both hold the same numbers, NaN included, in the same shape."""
        self.require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
        got, want = got.detach(), want.detach()
        if not bool(((got == want) | (got.isnan() & want.isnan())).all()):
            raise Broken(f"{what}: off by {float((got - want).abs().max()):.3g}, expected the very same numbers")

    @cached_property
    def unit(self) -> float:
        """The relative error of one direction: from rounding, or what a layer states as its tolerance."""
        layers = [module for module in self.original.modules() if isinstance(module, FlowTransform)]
        return max([ROUNDINGS * torch.finfo(self.dtype).eps, *(layer.tolerance(self.dtype) for layer in layers)])

    def close(self, what: str, got: Tensor, want: Tensor, tolerance: float, amplification: Any = 0.0) -> None:
        """The law is broken where the difference is beyond the tolerance and beyond what rounding explains.

        Args:
            what: the two things that are compared.
            got: a tensor ``[n, ...]``.
            want: another of its shape.
            tolerance: the allowed absolute error.
            amplification: of rounding, ``[n]`` or a number; rows without any digit left are skipped.
        """
        self.require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
        got, want = got.detach().double(), want.detach().double()
        units = torch.as_tensor(amplification, dtype=torch.float64).detach()
        rounding = self.unit * units
        rounding = rounding.to(got.device).reshape(-1, *(1,) * (got.dim() - 1)).expand_as(got)
        usable = rounding <= NO_DIGIT
        error = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, (got - want).abs())
        share = torch.where(usable, error / rounding.clamp_min(tolerance), 0.0).nan_to_num(torch.inf, torch.inf)
        tally = self.report.tally(self.law)
        tally.checked += int(usable.sum())
        tally.skipped += int((~usable).sum())
        worst = float(share.max()) if share.numel() else 0.0
        tally.worst = max(tally.worst, worst)
        if worst > 1:
            at = int(share.argmax())
            allowed = float(rounding.clamp_min(tolerance).flatten()[at])
            raise Broken(f"{what}: off by {float(error.flatten()[at]):.3g}, allowed {allowed:.3g}")

    def understate(self, flag: str) -> None:
        """Notes a claim that says no where the answer is yes."""
        options = "".join(f", {name}={value!r}" for name, value in self.case.options.items())
        self.report.note(self.report.understated, f"{flag}=False of {self.case.label}{options}, yet it works")

    def random(self, *shape: int) -> Tensor:
        """Standard normal numbers ``[*shape]``, exact in float32."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)


class TransformTrial(Trial):
    """A trial of a transform.

    Args:
        case: the draw.
        subject: the transform.
        rebuild: makes the same transform anew, if it can be.
        dtype: the dtype of this trial.
        report: where findings go.
        event_shape: the shape of one point on the ``x`` side.
        shared: what trials of the same draw in other dtypes have in common.
    """

    def __init__(
        self,
        case: Case,
        subject: FlowTransform,
        rebuild: Callable[[], nn.Module] | None,
        dtype: torch.dtype,
        report: Report,
        *,
        event_shape: Sequence[int],
        shared: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(case, subject, rebuild, dtype, report)
        self.event_shape = tuple(event_shape)
        self.shared: dict[str, Any] = {} if shared is None else shared

    @cached_property
    def transform(self) -> Any:
        """The transform, in ``eval()``; laws that change it take `fresh` ones."""
        return self.fresh().eval()

    @property
    def context_dim(self) -> int:
        """The width of the context."""
        return int(self.original.context_dim)

    @property
    def estimates(self) -> bool:
        """Whether the log-det is random in training mode."""
        return bool(self.original.log_det == "estimate")

    @cached_property
    def y_event_shape(self) -> tuple[int, ...]:
        """The shape of one point on the ``y`` side."""
        return tuple(self.original.forward_shape(self.event_shape))

    def points(self, *batch: int, side: str = "x", spread: float = 2.0) -> Tensor:
        """Random points ``[*batch, *event]`` of the domain, or with ``side="y"`` of the codomain."""
        constraint = self.transform.domain if side == "x" else self.transform.codomain
        shape = torch.Size((*batch, *(self.event_shape if side == "x" else self.y_event_shape)))
        if is_real(constraint):
            return self.random(*shape) * spread
        to_domain = biject_to(constraint)
        points = to_domain(self.random(*to_domain.inverse_shape(shape)).double() * spread)
        return points.float().to(self.dtype) if constraint.event_dim == 0 else points.to(self.dtype)

    def contexts(self, *batch: int) -> Any:
        """Random contexts ``[*batch, context_dim]``, or ``None`` without one."""
        return self.random(*batch, self.context_dim) if self.context_dim else None

    def close_rows(self, what: str, got: Tensor, want: Tensor, amplification: Any = 0.0) -> None:
        """Two computations of the same rows; they may differ by the order of their sums."""
        self.close(what, got, want, ROWS[self.dtype], amplification)

    @cached_property
    def exact(self) -> Any:
        """The same transform in float64."""
        return copy.deepcopy(self.original).to(torch.float64).eval()

    @property
    def probe(self) -> tuple[Tensor, Tensor, Tensor | None, Rounding, Rounding]:
        """Points ``x`` and ``y`` that have nothing to do with each other, contexts, and the rounding at both."""
        if "points" not in self.shared:
            self.shared["points"] = self._draw_probe()
        x, y, context, there, back = self.shared["points"]
        name = f"rounding in {self.dtype}"
        if name not in self.shared:
            wide = None if context is None else context.double()
            sides = (self.exact, there), (self.exact.inv, back)
            self.shared[name] = [widen(transform, wide, known, self.unit) for transform, known in sides]
        cast = None if context is None else context.to(self.dtype)
        return x.to(self.dtype), y.to(self.dtype), cast, *self.shared[name]

    def _draw_probe(self) -> tuple[Tensor, Tensor, Tensor | None, Rounding, Rounding]:
        draw = TransformTrial(
            self.case, self.original, self.rebuild, torch.float32, self.report, event_shape=self.event_shape
        )
        draw.generator = self.case.generator("probe")
        half = ROWS_OF_A_PROBE // 2
        x, context = draw.points(2 * half), draw.contexts(2 * half)
        wide = None if context is None else context.double()
        # Half of the y lie anywhere, half where the map puts points.
        there = draw.points(half).double(), None if wide is None else wide[half:]
        image = self.exact.forward_and_log_det(*there)[0].detach().float()
        y = torch.cat([draw.points(half, side="y"), image])
        return x, y, context, measure(self.exact, x.double(), wide), measure(self.exact.inv, y.double(), wide)


def is_real(constraint: constraints.Constraint) -> bool:
    """Whether a constraint allows every real number."""
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    return isinstance(base, type(constraints.real))  # a copied constraint is another object


def same_function(trial: TransformTrial, what: str, one: Any, other: Any) -> None:
    """The law is broken unless two transforms map both ways to the very same numbers."""
    x, y, context, _, _ = trial.probe
    for name, side in (("forward", x), ("inverse", y)):
        method = f"{name}_and_log_det"
        got, want = getattr(one, method)(side, context), getattr(other, method)(side, context)
        trial.equal(f"{what}: {name}", got[0], want[0])
        trial.equal(f"{what}: {name} log-det", got[1], want[1])


def size(event_shape: Sequence[int]) -> int:
    """How many numbers a point has."""
    return prod(event_shape)
