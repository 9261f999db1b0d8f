"""Fitting in one call: ``fit(flow, x)`` by maximum likelihood, ``fit(flow, x, objective=...)`` otherwise."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from pyroflows.distributions import Bounded, Flow
from pyroflows.distributions.support import Support
from pyroflows.errors import ContextError, DataError, OptionError, TooFewRows
from pyroflows.training.data import check_context, check_rows, check_spread, check_support, entry
from pyroflows.training.objectives import Objective, as_objectives
from pyroflows.training.run import BAD_STEPS, Run, rows_of, seeded
from pyroflows.transforms.regularizers import is_number

__all__ = ["FitResult", "fit"]

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


@dataclass
class FitResult:
    """What a fit did. The flow itself holds the best weights.

    Attributes:
        flow: the fitted flow.
        history: a list for each of the following; the first entry is for the starting weights, epoch 0, and NaN stands
            for what was not computed.

            - ``"epoch"``;
            - ``"train"`` and ``"validation"``: mean log-likelihood in nats a row, in the data's units; of an `ELBO`
              the bound. During flow matching they are not computed, but ``"validation"`` is for the best weights;
            - ``"loss"`` and ``"validation_loss"``: the mean of the objective, the first with the penalties of solves;
              the second selects the weights. Compare them among epochs of one objective only;
            - ``"grad_norm"``, ``"lr"``, ``"skipped"`` (steps that were not finite) and ``"seconds"``;
            - ``"nfe_forward"`` and ``"nfe_backward"``, of flows that solve differential equations: evaluations of
              the velocity, for solutions and for their gradients, mean over steps;
            - ``"penalty_..."``: the mean of each penalty of such solves, without its weight.
        best_epoch: the epoch whose weights were kept.
        stopped: why it ended: ``"patience"``, ``"epochs"``, ``"interrupted"`` or ``"non-finite"``.
        seconds: how long it took.
        score: what ``"train"`` and ``"validation"`` are, ``"log-likelihood"`` or ``"ELBO"``.
    """

    flow: Flow | Bounded
    history: dict[str, list[float]] = field(repr=False)
    best_epoch: int
    stopped: str
    seconds: float
    score: str = "log-likelihood"

    @property
    def train(self) -> float:
        """Mean log-likelihood of the training rows during the best epoch, in nats a row; NaN if not computed."""
        return self.history["train"][self.best_epoch]

    @property
    def validation(self) -> float:
        """Mean log-likelihood of the validation rows at the best weights, in nats a row; of an `ELBO` the bound."""
        return self.history["validation"][self.best_epoch]

    def __str__(self) -> str:
        train = "" if math.isnan(self.train) else f" (train {self.train:.4f})"
        return (
            f"validation {self.score} {self.validation:.4f} nats a row{train} at epoch {self.best_epoch} of "
            f"{len(self.history['epoch']) - 1}, stopped by {self.stopped} after {self.seconds:.1f} s"
        )


def fit(
    flow: Flow | Bounded,
    x: Any = None,
    context: Any = None,
    *,
    objective: str | Objective | Sequence[str | Objective] | None = None,
    validation: float | Any = 0.1,
    max_epochs: int | Sequence[int] = 500,
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
    r"""Fits a flow to rows by maximum likelihood, :math:`\max_\theta \frac1n \sum_i \log p_\theta(x_i | c_i)`, or
    another objective.

    Rows are split into training and validation, the data are standardised inside of the flow, and training
    stops when the score of the validation rows has not risen for ``patience`` epochs; the best weights are kept. The
    score is minus the mean loss of the objective, so the validation likelihood by default. The learning rate is halved
    each time a third of the patience has passed without a rise. Ctrl-C stops and keeps the best weights too.

    Several objectives follow one another, each with a fresh optimizer from the best weights of the one before. After
    flow matching the held-out log-likelihood is computed, and a likelihood that follows keeps the weights that it
    started from unless it finds better ones.

    Args:
        flow: the flow to fit, in place; training continues from its present weights. Of a `Dequantized` or
            `Augmented` flow the lower bound of the likelihood is what rises.
        x: rows ``[n, input_dim]``: a tensor, array, data frame or nested list of numbers. For a flow whose points have
            another shape, as images and matrices have, ``[n, *flow.data_shape]``.
            Leave it out for an `ELBO`, which reads none.
        context: ``[n, context_dim]``, if the flow reads one.
        objective: what to minimise: ``"likelihood"``; ``"flow_matching"``, which trains a velocity field without
            solving its differential equation; ``"mixture"``, flow matching and then likelihood; a `Likelihood`,
            `FlowMatching`, `ELBO` or other `Objective`; or a sequence of these. Default ``flow.objective``, the
            likelihood unless a recipe says otherwise.
        validation: the share of rows held out, in (0, 1); or the validation rows themselves, a pair
            ``(x, context)`` for a flow that reads a context.
        max_epochs: the most passes over the training rows; of several objectives for each, or one number for each.
        patience: how many epochs without a rise of the validation score end the fit, or lead to the next objective.
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
        on_nonfinite: a step with a NaN or infinite loss or gradient, or whose differential equation was not solved, is
            never taken. ``"skip"`` goes on,
            ``"rollback"`` restores the best weights after 10 in a row and ends the fit with a warning,
            ``"raise"`` restores them and raises at once.
        progress: whether to show a progress bar.
        seed: for the split, the order of rows and all random numbers of the loss; default drawn from torch's generator,
            which is otherwise left as it was.

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
    objective = getattr(flow, "objective", "likelihood") if objective is None else objective
    objectives = as_objectives(objective)
    limits = list(max_epochs) if isinstance(max_epochs, Sequence) else [max_epochs] * len(objectives)
    _check_options(flow, objectives, limits, patience, batch_size, lr, clip_norm, standardize, on_nonfinite)
    reads = any(one.reads_rows for one in objectives)
    if reads != (x is not None):
        needed = "needs rows x" if reads else "reads no rows; leave out x"
        raise OptionError(f"objective={objective!r} {needed}.")
    seed = _seed(seed)
    like = next(iter(flow.parameters()))
    declared = flow.declared_support
    try:
        if support is not None:
            flow.constrain(support)
        for one in objectives:
            one.check(flow)
        draws = max(one.samples for one in objectives)
        with seeded(seed, like.device):  # points of a bounded flow have noise
            (x, context), (held_x, held_context) = _split(flow, x, context, validation, like, seed, draws)
    except Exception:
        flow.constrain(declared)
        raise
    with seeded(seed, like.device):
        if standardize is not None:
            _standardize(flow, x if reads else None, context, standardize)
        if reads:
            some = slice(rows_of(flow, 2**20, at_most=10_000))
            flow.initialize(x[some], None if context is None else context[some])

    parameters = [p for p in flow.parameters() if p.requires_grad]
    run = Run(flow, parameters, held_x, held_context, clip_norm, on_nonfinite)
    was_training = flow.training
    bar = tqdm(total=sum(limits), disable=not progress, desc="fit", unit="epoch", mininterval=0.5)
    stopped = "epochs"
    try:
        with seeded(seed, like.device):
            for one, limit in zip(objectives, limits, strict=True):
                fresh = torch.optim.Adam(parameters, lr=lr, fused=True) if optimizer is None else optimizer(parameters)
                stopped = run.pursue(one, fresh, x, context, limit, patience, batch_size, bar)
                if stopped in ("interrupted", "non-finite"):
                    break
        run.settle()
    finally:
        bar.close()
        flow.train(was_training)
    if stopped == "non-finite":
        warnings.warn(
            f"the loss or its gradient was not finite in {BAD_STEPS} steps in a row, so the fit ended; the best "
            f"weights (epoch {run.best_epoch}) were restored. Try a lower lr, a smaller clip_norm, or "
            f"standardize='robust'.{run.last_error}",
            stacklevel=2,
        )
    return FitResult(flow, run.history, run.best_epoch, stopped, run.seconds, run.objective.score)


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(2**31, ()).item())
    try:
        return operator.index(seed)
    except TypeError as error:
        raise OptionError(f"seed must be an integer or None, got {seed!r}.") from error


def _check_options(
    flow: object,
    objectives: Sequence[Objective],
    limits: Sequence[int],
    patience: int,
    batch_size: int,
    lr: float,
    clip_norm: float | None,
    standardize: str | None,
    on_nonfinite: str,
) -> None:
    if not isinstance(flow, Flow | Bounded):
        raise OptionError(
            f"fit trains a pyroflows.Flow, such as pf.flow('nsf', input_dim=2); got {type(flow).__name__}. "
            "Train a guide with pyro.infer.SVI."
        )
    if len(limits) != len(objectives):
        raise OptionError(f"max_epochs has {len(limits)} numbers for {len(objectives)} objectives; give one for each.")
    counts = [("patience", patience), ("batch_size", batch_size), *(("max_epochs", limit) for limit in limits)]
    for name, number in counts:
        if not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} must be a positive integer, got {number!r}.")
    for name, value in (("lr", lr), ("clip_norm", clip_norm)):
        if value is not None and not (is_number(value) and value > 0):
            raise OptionError(f"{name} must be positive, got {value!r}.")
    if standardize not in ("auto", "robust", None):
        raise OptionError(f'standardize must be "auto", "robust" or None, got {standardize!r}.')
    if on_nonfinite not in ("rollback", "skip", "raise"):
        raise OptionError(f'on_nonfinite must be "rollback", "skip" or "raise", got {on_nonfinite!r}.')
    if not any(p.requires_grad for p in flow.parameters()):
        raise OptionError("the flow has no trainable parameters.")


_Rows = tuple[Tensor, Tensor | None]


def _split(
    flow: Flow | Bounded, x: Any, context: Any, validation: Any, like: Tensor, seed: int, draws: int
) -> tuple[_Rows, _Rows]:
    """Training and validation rows, checked; without rows x something to count, of as many contexts or draws."""
    if (context is None) != (flow.context_dim == 0):
        expected = f"[rows, {flow.context_dim}]" if flow.context_dim else "none"
        raise ContextError(f"expected a context of shape {expected}, got {'none' if context is None else 'one'}.")
    shape = flow.data_shape

    def checked(x: Any, context: Any, what: str, min_rows: int | None = None) -> _Rows:
        if x is None:
            if context is None:
                return like.new_empty(draws, 0), None
            context = check_context(context, flow.context_dim, len(context), like)
            return like.new_empty(len(context), 0), context
        rows = check_rows(x, shape, like, min_rows=min_rows, what=what)
        with torch.no_grad():
            unconstrained = check_support(rows, flow.support, flow.unconstrained)
            if len(shape) > 1 and min_rows is None:
                check_spread(unconstrained)
        if context is None:
            return rows, None
        return rows, check_context(context, flow.context_dim, len(rows), like)

    without = x is None
    x, context = checked(x, context, "x")
    if not isinstance(validation, float | int):
        if without:
            raise OptionError(f"validation must be a share in (0, 1) where there are no rows x, got {validation!r}.")
        pair = validation if flow.context_dim else (validation, None)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise DataError("validation of a flow that reads a context must be a pair (x, context).")
        return (x, context), checked(pair[0], pair[1], "validation", min_rows=1)
    if not 0 < validation < 1:
        raise OptionError(f"validation must be a share in (0, 1) or rows, got {validation!r}.")
    held = max(1, round(validation * len(x)))
    if len(x) - held < 2:
        raise TooFewRows(f"x has {len(x)} rows; too few to hold out {held} and train on the rest.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    keep, out = order[held:], order[:held]
    return (x[keep], None if context is None else context[keep]), (
        x[out],
        None if context is None else context[out],
    )


def _location_and_scale(rows: Tensor, how: str) -> tuple[Tensor, Tensor]:
    if how == "auto":
        return rows.mean(0), rows.std(0)
    some = rows[: max(2, 2**24 // max(1, rows[0].numel()))].double()  # torch.quantile takes no more
    low, middle, high = torch.quantile(some, some.new_tensor([0.25, 0.5, 0.75]), dim=0)
    spread = (high - low) / 1.349  # the interquartile range of a standard normal
    spread = torch.where(spread > 0, spread, rows.double().std(0))
    return middle.to(rows.dtype), spread.to(rows.dtype)


def _standardize(flow: Flow | Bounded, x: Tensor | None, context: Tensor | None, how: str) -> None:
    with torch.no_grad():
        if x is not None and flow.standardize is not None:
            rows = flow.unconstrained(x)
            loc, scale = _location_and_scale(rows, how)
            flow.standardize.set(loc, torch.where(scale > 0, scale, torch.ones_like(scale)))
            if how == "auto":
                far = ((rows - loc) / scale).abs().amax(0).flatten()
                worst = int(far.argmax())
                if float(far[worst]) > 100:
                    warnings.warn(
                        f"column {entry(worst, rows.shape[1:])} has a value {float(far[worst]):.0f} standard "
                        "deviations from its mean, so the rest of the column is squeezed; consider "
                        "standardize='robust'.",
                        stacklevel=3,
                    )
        if context is not None:
            loc, scale = _location_and_scale(context, how)
            flow.context_loc.copy_(loc)
            flow.context_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))
