"""The steps of a fit: random numbers, best weights and history."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyroflows.distributions import Bounded, Flow
from pyroflows.errors import NonFiniteLoss, ODESolveError, ShapeError
from pyroflows.numerics import recorded
from pyroflows.training.objectives import Likelihood, Objective
from pyroflows.transforms import ContinuousTransform

__all__ = ["BAD_STEPS", "Run", "rows_of", "seeded"]

BAD_STEPS = 10
"""How many steps in a row may have a loss or gradient that is not finite."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A block with random numbers of its own, which leaves torch's generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def rows_of(flow: Flow | Bounded, numbers: int, *, at_most: int) -> int:
    """How many points have so many numbers, so that images take no more memory than vectors."""
    return max(2, min(at_most, numbers // max(1, flow.input_dim)))


class Run:
    """The state of one fit: the best weights so far and the history."""

    def __init__(
        self,
        flow: Flow | Bounded,
        parameters: Sequence[Tensor],
        held_x: Tensor,
        held_context: Tensor | None,
        clip_norm: float | None,
        on_nonfinite: str,
    ) -> None:
        self.flow, self.parameters = flow, parameters
        self.held_x, self.held_context = held_x, held_context
        self.clip_norm, self.on_nonfinite = math.inf if clip_norm is None else clip_norm, on_nonfinite
        self.objective: Objective = Likelihood()
        self.started, self.seconds = time.perf_counter(), 0.0
        self.best, self.best_epoch, self.weights = -math.inf, 0, self._weights()
        self.bad_in_a_row, self.trouble = 0, ""
        names = ["epoch", "train", "validation", "loss", "validation_loss", "grad_norm", "lr", "skipped", "seconds"]
        if any(isinstance(layer, ContinuousTransform) for layer in flow.modules()):
            names += ["nfe_forward", "nfe_backward"]
        self.history: dict[str, list[float]] = {name: [] for name in names}

    @property
    def gave_up(self) -> bool:
        return self.bad_in_a_row >= BAD_STEPS and self.on_nonfinite == "rollback"

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.flow.state_dict().items()}

    def pursue(
        self,
        objective: Objective,
        optimizer: Optimizer,
        x: Tensor,
        context: Tensor | None,
        limit: int,
        patience: int,
        batch_size: int,
        bar: Any,
    ) -> str:
        """Minimises one objective from the best weights so far, and leaves the best ones; returns why it stopped."""
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=0.5, patience=max(1, patience // 3), threshold=1e-4, threshold_mode="abs"
        )
        self.optimizer, self.bad_in_a_row = optimizer, 0
        stopped = "epochs"
        try:
            begun = self._begin(objective)
            for epoch in range(begun + 1, begun + limit + 1):
                order = torch.randperm(len(x)).to(x.device)
                self.flow.train()
                value = self._record(self._epoch(x, context, order.split(batch_size)))
                schedule.step(value if math.isfinite(value) else -math.inf)
                bar.update()
                name, sign = ("validation", 1) if objective.in_nats else ("validation_loss", -1)
                bar.set_postfix({name: f"{sign * value:.4f}", "best": f"{sign * self.best:.4f}"}, refresh=False)
                if self.gave_up:
                    stopped = "non-finite"
                    break
                if epoch - max(begun, self.best_epoch) >= patience:
                    stopped = "patience"
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
            if not self.history["epoch"]:
                self._write({}, math.nan)  # the starting weights, whose score was not computed
        finally:
            self.flow.load_state_dict(self.weights)
        return stopped

    def _begin(self, objective: Objective) -> int:
        """The number of the epoch before the first, whose weights may be the best."""
        self.objective = objective
        if not self.history["epoch"]:
            self._record({})
        else:
            score = self._score(objective)
            self.best = -math.inf if math.isnan(score) else score
            if objective.in_nats:
                self.history["validation"][self.best_epoch] = score
        return len(self.history["epoch"]) - 1

    def _epoch(self, x: Tensor, context: Tensor | None, batches: Sequence[Tensor]) -> dict[str, float]:
        """One pass over the rows in batches of their numbers; returns the means of what the steps told."""
        totals: dict[str, float] = {}
        count, skipped = 0, 0
        for batch in batches:
            told = self._step(x[batch], None if context is None else context[batch])
            if told is None:
                skipped += 1
                if self.gave_up:
                    break
                continue
            count += len(batch)
            for name, number in told.items():
                totals[name] = totals.get(name, 0.0) + number * len(batch)
        return {"skipped": float(skipped), **{name: total / count for name, total in totals.items()}}

    def _step(self, rows: Tensor, context: Tensor | None) -> dict[str, float] | None:
        """One step of the optimizer and what there is to tell of it; none if it was not finite, and so not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        loss_value = bare_value = norm_value = math.nan
        try:
            with recorded() as record:
                bare = self._losses(self.objective, rows, context).mean()
                loss = bare + record.penalty().to(bare)
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            loss_value, bare_value, norm_value = torch.stack([loss.detach(), bare.detach(), norm.to(loss)]).tolist()
        except ODESolveError as error:
            self.trouble = str(error)
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.optimizer.step()
            self.bad_in_a_row = 0
            return {
                "loss": loss_value,
                "train": -bare_value if self.objective.in_nats else math.nan,
                "grad_norm": norm_value,
                "nfe_forward": float(record.nfe_forward),
                "nfe_backward": float(record.nfe_backward),
                **{f"penalty_{name}": value for name, value in record.penalties.items()},
            }
        self.bad_in_a_row += 1
        if self.on_nonfinite == "raise":
            raise NonFiniteLoss(
                f"the loss was {loss_value} and the norm of its gradient {norm_value} in epoch "
                f"{len(self.history['epoch'])}; the best weights (epoch {self.best_epoch}) were restored. Try a "
                f"lower lr, a smaller clip_norm, or standardize='robust'.{self.last_error}"
            )
        return None

    def _losses(self, objective: Objective, rows: Tensor, context: Tensor | None) -> Tensor:
        losses = objective(self.flow, rows, context)
        if not isinstance(losses, Tensor) or losses.shape != (len(rows),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ShapeError(
                f"expected {type(objective).__name__} to give a loss for each row, a tensor ({len(rows)},), got {got}."
            )
        return losses

    @property
    def last_error(self) -> str:
        """What a solver last complained of, if it did."""
        return f" The last error was: {self.trouble}" if self.trouble else ""

    def _score(self, objective: Objective) -> float:
        """Minus the mean loss of the held-out rows, with the same random numbers every time."""
        self.flow.eval()
        x, context = self.held_x, self.held_context
        size = rows_of(self.flow, 2**18, at_most=4096)
        if objective.draws:
            again = -(-objective.draws // len(x))
            x = x.repeat(again, *(1 for _ in x.shape[1:]))
            context = None if context is None else context.repeat(again, 1)
        total = 0.0
        try:
            with torch.no_grad(), seeded(0, x.device):
                for start in range(0, len(x), size):
                    part = None if context is None else context[start : start + size]
                    total -= float(self._losses(objective, x[start : start + size], part).double().sum())
        except ODESolveError as error:
            self.trouble = str(error)
            return math.nan
        return total / len(x)

    def _record(self, told: dict[str, float]) -> float:
        """Scores the validation rows, keeps the weights if they are the best, and writes the history."""
        value = self._score(self.objective)
        if value > self.best:
            self.best, self.best_epoch, self.weights = value, len(self.history["epoch"]), self._weights()
        self._write(told, value)
        return value

    def _write(self, told: dict[str, float], value: float) -> None:
        """Adds an epoch to the history."""
        epoch = len(self.history["epoch"])
        row = {
            "skipped": 0.0,
            "grad_norm": math.nan if epoch else 0.0,
            **told,
            "epoch": float(epoch),
            "validation": value if self.objective.in_nats else math.nan,
            "validation_loss": -value,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": time.perf_counter() - self.started,
        }
        for name in row:
            if name.startswith("penalty_") and name not in self.history:
                self.history[name] = [math.nan] * epoch
        for name, numbers in self.history.items():
            numbers.append(row.get(name, math.nan))

    def settle(self) -> None:
        """Computes the likelihood of the best weights if the objective was none."""
        if not self.objective.in_nats and self.history["epoch"]:
            score = self.history["validation"][self.best_epoch] = self._score(Likelihood())
            if math.isnan(score):
                warnings.warn(f"the held-out log-likelihood could not be computed.{self.last_error}", stacklevel=3)
        self.seconds = time.perf_counter() - self.started
