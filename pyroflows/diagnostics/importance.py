"""A guide judged by the importance weights of its own draws.

Yao, Vehtari, Simpson, Gelman (2018), *Yes, but did it work? Evaluating variational inference*,
arXiv:1802.02538. Vehtari, Simpson, Gelman, Yao, Gabry (2024), *Pareto smoothed importance sampling*,
arXiv:1507.02646.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer.importance import vectorized_importance_weights
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyroflows.errors import OptionError

__all__ = ["ImportanceSummary", "importance_summary", "khat"]


def khat(log_weights: Tensor) -> float:
    r"""The Pareto shape :math:`\hat k` of the largest importance weights.

    Below 0.7 the weights can be trusted. Equal weights, those of a perfect approximation, have no tail and
    score ``-inf``.

    Args:
        log_weights: ``[draws]``, in nats, up to a constant.

    Raises:
        OptionError: fewer than 25 draws, or not one dimension.

    Example:
        >>> khat(torch.zeros(1000))
        -inf
    """
    if log_weights.dim() != 1 or len(log_weights) < 25:
        raise OptionError(f"khat needs at least 25 log weights in one dimension, got {tuple(log_weights.shape)}.")
    weights = log_weights.detach().cpu().double()
    if bool(torch.isnan(weights).any()) or bool((weights == torch.inf).any()):
        return math.inf
    weights = torch.exp(weights - weights.max())
    draws = len(weights)
    count = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    tail = torch.sort(weights).values[-count - 1 :]
    excess = tail[1:] - tail[0]
    if float(excess[-1]) <= 1e-10 * float(tail[-1]):
        return -math.inf
    excess = excess[excess > 0]
    if len(excess) < 5:
        return math.inf
    return float(fit_generalized_pareto(excess)[0])  # which has the prior of Vehtari et al., ten draws at 0.5


class ImportanceSummary(NamedTuple):
    """What the importance weights of a guide's draws say.

    Attributes:
        elbo: the evidence lower bound, in nats.
        elbo_se: its standard error.
        log_evidence: the importance-sampled log evidence, in nats.
        log_evidence_se: its standard error, to first order.
        khat: the Pareto shape of the weights; below 0.7 the other numbers can be trusted.
        ess: the effective number of draws.
        nonfinite: the share of draws whose weight was NaN or infinite; they are left out of the ELBO.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    khat: float
    ess: float
    nonfinite: float


def importance_summary(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    max_plate_nesting: int = 4,
    **kwargs: Any,
) -> ImportanceSummary:
    """Draws from a guide, any of Pyro's or ours, and weighs the draws against the model.

    Args:
        model: a Pyro model whose plates are vectorised.
        guide: its guide.
        *args: the model's arguments.
        num_samples: how many draws, evaluated at once.
        max_plate_nesting: at least the number of nested plates in the model.
        **kwargs: the model's keyword arguments.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> model = lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> summary = importance_summary(model, model)
        >>> summary.elbo, summary.khat
        (0.0, -inf)
    """
    with torch.no_grad():
        log_weights, _, _ = vectorized_importance_weights(
            model,
            guide,
            *args,
            num_samples=num_samples,
            max_plate_nesting=max_plate_nesting,
            normalized=False,
            **kwargs,
        )
    log_weights = torch.as_tensor(log_weights).double().expand(num_samples)
    finite = torch.isfinite(log_weights)
    good = log_weights[finite]
    if len(good) == 0:
        return ImportanceSummary(math.nan, math.nan, math.nan, math.nan, math.inf, 0.0, 1.0)
    scaled = torch.exp(good - good.max())
    mean = scaled.sum() / num_samples
    spread = torch.sqrt(((scaled - scaled.mean()) ** 2).mean() / num_samples)
    return ImportanceSummary(
        elbo=float(good.mean()),
        elbo_se=float(good.std() / math.sqrt(len(good))) if len(good) > 1 else math.nan,
        log_evidence=float(torch.log(mean) + good.max()),
        log_evidence_se=float(spread / mean),
        khat=khat(log_weights.nan_to_num(-math.inf, posinf=math.inf)),
        ess=float(scaled.sum() ** 2 / (scaled**2).sum()),
        nonfinite=float((~finite).double().mean()),
    )
