"""Maximum likelihood in one call: ``fit(flow, x)``."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from pyroflows.distributions import Dequantized, Flow
from pyroflows.distributions.support import Support
from pyroflows.errors import ContextError, DataError, NonFiniteLoss, OptionError, TooFewRows
from pyroflows.training.data import check_context, check_rows, check_spread, check_support, entry

__all__ = ["FitResult", "fit"]

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
BAD_STEPS = 10
"""How many steps in a row may have a loss or gradient that is not finite."""


@dataclass
class FitResult:
    """What a fit did. The flow itself holds the best weights.

    Attributes:
        flow: the fitted flow.
        history: a list for each of ``"epoch"``, ``"train"`` and ``"validation"`` (mean log-likelihood in nats a
            row, in the data's units), ``"grad_norm"``, ``"lr"``, ``"skipped"`` (steps that were not finite) and
            ``"seconds"``; the first entry is for the starting weights, epoch 0.
        best_epoch: the epoch whose weights were kept.
        stopped: why it ended: ``"patience"``, ``"epochs"``, ``"interrupted"`` or ``"non-finite"``.
        seconds: how long it took.
    """

    flow: Flow | Dequantized
    history: dict[str, list[float]] = field(repr=False)
    best_epoch: int
    stopped: str
    seconds: float

    @property
    def train(self) -> float:
        """Mean log-likelihood of the training rows during the best epoch, in nats a row; NaN for epoch 0."""
        return self.history["train"][self.best_epoch]

    @property
    def validation(self) -> float:
        """Mean log-likelihood of the validation rows at the best weights, in nats a row."""
        return self.history["validation"][self.best_epoch]

    def __str__(self) -> str:
        train = f" (train {self.train:.4f})" if self.best_epoch else ""
        return (
            f"validation log-likelihood {self.validation:.4f} nats a row{train} at epoch {self.best_epoch} of "
            f"{len(self.history['epoch']) - 1}, stopped by {self.stopped} after {self.seconds:.1f} s"
        )


def fit(
    flow: Flow | Dequantized,
    x: Any,
    context: Any = None,
    *,
    validation: float | Any = 0.1,
    max_epochs: int = 500,
    patience: int = 30,
    batch_size: int = 256,
    lr: float = 1e-3,
    optimizer: MakeOptimizer | None = None,
    clip_norm: float | None = 5.0,
    standardize: Literal["auto", "robust"] | None = "auto",
    support: Support | None = None,
    on_nonfinite: Literal["rollback", "skip", "raise"] = "rollback",
    progress: bool = True,
    seed: int | None = None,
) -> FitResult:
    r"""Fits a flow to rows by maximum likelihood: :math:`\max_\theta \frac1n \sum_i \log p_\theta(x_i | c_i)`.

    Rows are split into training and validation, the data are standardised inside of the flow, and training
    stops when the validation likelihood has not risen for ``patience`` epochs; the best weights are kept. The
    learning rate is halved each time a third of the patience has passed without a rise. Ctrl-C stops and
    keeps the best weights too.

    Args:
        flow: the flow to fit, in place; training continues from its present weights. Of a `Dequantized` flow the
            lower bound of the likelihood is what rises, and ``x`` are images of whole numbers.
        x: rows ``[n, input_dim]``: a tensor, array, data frame or nested list of numbers. For a flow whose points have
            another shape, as images and matrices have, ``[n, *flow.data_shape]``.
        context: ``[n, context_dim]``, if the flow reads one.
        validation: the share of rows held out, in (0, 1); or the validation rows themselves, a pair
            ``(x, context)`` for a flow that reads a context.
        max_epochs: the most passes over the training rows.
        patience: how many epochs without a rise of the validation likelihood end the fit.
        batch_size: rows a step.
        lr: the learning rate of Adam.
        optimizer: from parameters to a ``torch.optim`` optimizer, in place of Adam with ``lr``.
        clip_norm: the largest norm of the whole gradient; ``None`` for no bound.
        standardize: ``"auto"`` by mean and standard deviation, ``"robust"`` by median and interquartile range,
            ``None`` leaves the flow's standardiser as it is. It is part of the flow, so ``log_prob`` stays in
            the data's units. Standardises the context likewise. Angles and other points of a manifold stay as they
            are.
        support: where the data live (``"positive"``, ``constraints.interval(0, 1)``, one for each column); they
            are mapped to the real line by ``biject_to`` inside of the flow. Default what the flow declares.
        on_nonfinite: a step with a NaN or infinite loss or gradient is never taken. ``"skip"`` goes on,
            ``"rollback"`` restores the best weights after 10 in a row and ends the fit with a warning,
            ``"raise"`` restores them and raises at once.
        progress: whether to show a progress bar.
        seed: for the split and the order of rows; default drawn from torch's generator.

    Returns:
        A `FitResult`; ``result.history`` can be plotted as it is.

    Raises:
        DataError: the rows cannot be used; the subclass and the message say why and where.
        ContextError: a context is missing or unexpected.
        OptionError: an option has a value that it cannot take.
        NonFiniteLoss: under ``on_nonfinite="raise"``.

    Example:
        >>> import pyroflows as pf
        >>> flow = pf.flow("nsf", input_dim=2, transforms=2, hidden_dims=(16,))
        >>> rows = torch.randn(200, 2) * torch.tensor([1.0, 100.0])
        >>> result = pf.fit(flow, rows, max_epochs=2, progress=False, seed=0)
        >>> result.history["epoch"]
        [0.0, 1.0, 2.0]
    """
    _check_options(flow, max_epochs, patience, batch_size, lr, clip_norm, standardize, on_nonfinite)
    like = next(iter(flow.parameters()))
    declared = flow.declared_support
    try:
        if support is not None:
            flow.constrain(support)
        (x, context), (held_x, held_context) = _split(flow, x, context, validation, like, seed)
    except Exception:
        flow.constrain(declared)
        raise
    if standardize is not None:
        _standardize(flow, x, context, standardize)
    some = slice(_rows_of(flow, 2**20, at_most=10_000))
    flow.initialize(x[some], None if context is None else context[some])

    parameters = [p for p in flow.parameters() if p.requires_grad]
    adam = optimizer(parameters) if optimizer is not None else torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        adam, mode="max", factor=0.5, patience=max(1, patience // 3), threshold=1e-4, threshold_mode="abs"
    )
    run = _Run(flow, parameters, adam, clip_norm, on_nonfinite)
    shuffle = torch.Generator().manual_seed(_seed(seed))
    was_training = flow.training
    stopped, started = "epochs", time.perf_counter()
    bar = tqdm(total=max_epochs, disable=not progress, desc="fit", unit="epoch", mininterval=0.5)
    try:
        run.record(0.0, held_x, held_context, adam, started)  # the starting weights may be the best
        for epoch in range(1, max_epochs + 1):
            order = torch.randperm(len(x), generator=shuffle).to(x.device)
            flow.train()
            train = run.epoch(x, context, order.split(batch_size))
            value = run.record(train, held_x, held_context, adam, started)
            schedule.step(value if math.isfinite(value) else -math.inf)
            bar.update()
            bar.set_postfix(validation=f"{value:.4f}", best=f"{run.best:.4f}", refresh=False)
            if run.gave_up:
                stopped = "non-finite"
                break
            if epoch - run.best_epoch >= patience:
                stopped = "patience"
                break
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        bar.close()
        run.restore()
        flow.train(was_training)
    if stopped == "non-finite":
        warnings.warn(
            f"the loss or its gradient was not finite in {BAD_STEPS} steps in a row, so the fit ended; the best "
            f"weights (epoch {run.best_epoch}) were restored. Try a lower lr, a smaller clip_norm, or "
            "standardize='robust'.",
            stacklevel=2,
        )
    return FitResult(flow, run.history, run.best_epoch, stopped, time.perf_counter() - started)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**31, ()).item()) if seed is None else seed


def _check_options(
    flow: object,
    max_epochs: int,
    patience: int,
    batch_size: int,
    lr: float,
    clip_norm: float | None,
    standardize: str | None,
    on_nonfinite: str,
) -> None:
    if not isinstance(flow, Flow | Dequantized):
        raise OptionError(
            f"fit trains a pyroflows.Flow, such as pf.flow('nsf', input_dim=2); got {type(flow).__name__}. "
            "Train a guide with pyro.infer.SVI."
        )
    for name, number in (("max_epochs", max_epochs), ("patience", patience), ("batch_size", batch_size)):
        if not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} must be a positive integer, got {number!r}.")
    for name, value in (("lr", lr), ("clip_norm", clip_norm)):
        if value is not None and not value > 0:
            raise OptionError(f"{name} must be positive, got {value!r}.")
    if standardize not in ("auto", "robust", None):
        raise OptionError(f'standardize must be "auto", "robust" or None, got {standardize!r}.')
    if on_nonfinite not in ("rollback", "skip", "raise"):
        raise OptionError(f'on_nonfinite must be "rollback", "skip" or "raise", got {on_nonfinite!r}.')
    if not any(p.requires_grad for p in flow.parameters()):
        raise OptionError("the flow has no trainable parameters.")


_Rows = tuple[Tensor, Tensor | None]


def _split(
    flow: Flow | Dequantized, x: Any, context: Any, validation: Any, like: Tensor, seed: int | None
) -> tuple[_Rows, _Rows]:
    """Training and validation rows, checked."""
    if (context is None) != (flow.context_dim == 0):
        expected = f"[rows, {flow.context_dim}]" if flow.context_dim else "none"
        raise ContextError(f"expected a context of shape {expected}, got {'none' if context is None else 'one'}.")
    shape = flow.data_shape

    def checked(x: Any, context: Any, what: str, min_rows: int | None = None) -> _Rows:
        rows = check_rows(x, shape, like, min_rows=min_rows, what=what)
        with torch.no_grad():
            unconstrained = check_support(rows, flow.support, flow.unconstrained)
            if len(shape) > 1 and min_rows is None:
                check_spread(unconstrained)
        if context is None:
            return rows, None
        return rows, check_context(context, flow.context_dim, len(rows), like)

    x, context = checked(x, context, "x")
    if not isinstance(validation, float | int):
        pair = validation if flow.context_dim else (validation, None)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise DataError("validation of a flow that reads a context must be a pair (x, context).")
        return (x, context), checked(pair[0], pair[1], "validation", min_rows=1)
    if not 0 < validation < 1:
        raise OptionError(f"validation must be a share in (0, 1) or rows, got {validation!r}.")
    held = max(1, round(validation * len(x)))
    if len(x) - held < 2:
        raise TooFewRows(f"x has {len(x)} rows; too few to hold out {held} and train on the rest.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_seed(seed))).to(x.device)
    keep, out = order[held:], order[:held]
    return (x[keep], None if context is None else context[keep]), (
        x[out],
        None if context is None else context[out],
    )


def _rows_of(flow: Flow | Dequantized, numbers: int, *, at_most: int) -> int:
    """How many points have so many numbers, so that images take no more memory than vectors."""
    return max(2, min(at_most, numbers // max(1, flow.input_dim)))


def _location_and_scale(rows: Tensor, how: str) -> tuple[Tensor, Tensor]:
    if how == "auto":
        return rows.mean(0), rows.std(0)
    some = rows[: max(2, 2**24 // max(1, rows[0].numel()))].double()  # torch.quantile takes no more
    low, middle, high = torch.quantile(some, some.new_tensor([0.25, 0.5, 0.75]), dim=0)
    spread = (high - low) / 1.349  # the interquartile range of a standard normal
    spread = torch.where(spread > 0, spread, rows.double().std(0))
    return middle.to(rows.dtype), spread.to(rows.dtype)


def _standardize(flow: Flow | Dequantized, x: Tensor, context: Tensor | None, how: str) -> None:
    with torch.no_grad():
        rows = flow.unconstrained(x)
        if flow.standardize is not None:
            loc, scale = _location_and_scale(rows, how)
            flow.standardize.set(loc, torch.where(scale > 0, scale, torch.ones_like(scale)))
        if flow.standardize is not None and how == "auto":
            far = ((rows - loc) / scale).abs().amax(0).flatten()
            worst = int(far.argmax())
            if float(far[worst]) > 100:
                warnings.warn(
                    f"column {entry(worst, rows.shape[1:])} has a value {float(far[worst]):.0f} standard deviations "
                    "from its mean, so the rest of the column is squeezed; consider standardize='robust'.",
                    stacklevel=3,
                )
        if context is not None:
            loc, scale = _location_and_scale(context, how)
            flow.context_loc.copy_(loc)
            flow.context_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))


class _Run:
    """The state of one fit: the best weights so far and the history."""

    def __init__(
        self,
        flow: Flow | Dequantized,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        clip_norm: float | None,
        on_nonfinite: str,
    ) -> None:
        self.flow, self.parameters, self.optimizer = flow, parameters, optimizer
        self.clip_norm, self.on_nonfinite = math.inf if clip_norm is None else clip_norm, on_nonfinite
        self.best, self.best_epoch, self.weights = -math.inf, 0, self._weights()
        self.bad_in_a_row, self.skipped, self.grad_norm = 0, 0, 0.0
        names = ("epoch", "train", "validation", "grad_norm", "lr", "skipped", "seconds")
        self.history: dict[str, list[float]] = {name: [] for name in names}

    @property
    def gave_up(self) -> bool:
        return self.bad_in_a_row >= BAD_STEPS and self.on_nonfinite == "rollback"

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.flow.state_dict().items()}

    def restore(self) -> None:
        self.flow.load_state_dict(self.weights)

    def epoch(self, x: Tensor, context: Tensor | None, batches: Sequence[Tensor]) -> float:
        """One pass over the rows in batches of their numbers; returns their mean log-likelihood meanwhile."""
        total, count, self.skipped = 0.0, 0, 0
        norms = []
        for batch in batches:
            rows = x[batch]
            loss, norm = self._step(rows, None if context is None else context[batch])
            if math.isfinite(loss) and math.isfinite(norm):
                total, count = total - loss * len(rows), count + len(rows)
                norms.append(norm)
            if self.gave_up:
                break
        self.grad_norm = sum(norms) / len(norms) if norms else math.nan
        return total / count if count else math.nan

    def _step(self, rows: Tensor, context: Tensor | None) -> tuple[float, float]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = -self.flow(context).log_prob(rows).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        loss_value, norm_value = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.optimizer.step()
            self.bad_in_a_row = 0
            return loss_value, norm_value
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.on_nonfinite == "raise":
            raise NonFiniteLoss(
                f"the loss was {loss_value} and the norm of its gradient {norm_value} in epoch "
                f"{len(self.history['epoch'])}; the best weights (epoch {self.best_epoch}) were restored. Try a "
                "lower lr, a smaller clip_norm, or standardize='robust'."
            )
        return loss_value, norm_value

    def record(self, train: float, x: Tensor, context: Tensor | None, optimizer: Optimizer, started: float) -> float:
        """Scores the validation rows, keeps the weights if they are the best, and writes the history."""
        self.flow.eval()
        with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(0)  # a bound is estimated with the same noise in every epoch, so that epochs compare
            total, size = 0.0, _rows_of(self.flow, 2**18, at_most=4096)
            for start in range(0, len(x), size):
                part = None if context is None else context[start : start + size]
                total += float(self.flow(part).log_prob(x[start : start + size]).double().sum())
        value = total / len(x)
        epoch = len(self.history["epoch"])
        if value > self.best:
            self.best, self.best_epoch, self.weights = value, epoch, self._weights()
        row = {
            "epoch": float(epoch),
            "train": train if epoch else math.nan,
            "validation": value,
            "grad_norm": self.grad_norm,
            "lr": float(optimizer.param_groups[0]["lr"]),
            "skipped": float(self.skipped),
            "seconds": time.perf_counter() - started,
        }
        for name, number in row.items():
            self.history[name].append(number)
        return value
