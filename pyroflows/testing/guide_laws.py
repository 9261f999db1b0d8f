"""The laws of a guide, over a small model with latents of several shapes and supports."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import PyroflowsError
from pyroflows.testing.report import Report
from pyroflows.testing.trial import Case, Law, Trial, perturb
from pyroflows.transforms import FlowTransform

__all__ = ["GUIDE_LAWS", "GuideTrial"]

ROWS = 12
SITES: dict[str, tuple[tuple[int, ...], constraints.Constraint]] = {
    "loc": ((), constraints.real),
    "scale": ((), constraints.positive),
    "weights": ((3,), constraints.real),
    "shares": ((3,), constraints.simplex),
}
"""The latents of the model: shape and support."""


def model(x: Tensor) -> None:
    """A scalar, a positive scalar, three numbers in a plate and a point of the simplex."""
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 3.0))
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("three", 3):
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(()), 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(x.new_ones(3)))
    mean = loc + (weights * shares).sum(-1)
    with pyro.plate("data", len(x)):
        pyro.sample(
            "x", dist.Normal(mean[..., None], scale[..., None]) if mean.dim() else dist.Normal(mean, scale), obs=x
        )


class GuideTrial(Trial):
    """A trial of a guide.

    Args:
        case: the draw.
        factory: from a model to a new guide.
        report: where findings go.
    """

    def __init__(self, case: Case, factory: Callable[[Any], Any], report: Report) -> None:
        super().__init__(case, nn.Module(), None, torch.float32, report)
        self.factory = factory

    @property
    def x(self) -> Tensor:
        """The data."""
        return torch.linspace(-1, 2, ROWS)

    def guide(self, scale: float = 0.3) -> Any:
        """A new guide that is set up, with its parameters moved."""
        guide = self.factory(model)
        guide.setup(self.x)
        perturb(guide, scale, self.generator)
        return guide

    def trains(self, guide: Any, what: str, steps: int = 2, **options: Any) -> None:
        """The law is broken unless steps of SVI change the parameters at a finite loss."""
        before = [p.detach().clone() for p in guide.parameters()]
        svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-2}), Trace_ELBO(**options))
        losses = [svi.step(self.x) for _ in range(steps)]
        self.require(all(loss == loss for loss in losses), f"the loss of {what} is NaN")
        moved = [not torch.equal(p, old) for p, old in zip(guide.parameters(), before, strict=True)]
        self.require(any(moved), f"SVI does not change the parameters of {what}")


def guide_parameters(trial: GuideTrial) -> None:
    """Parameters exist after ``setup``, which returns the guide, and one loss gives each a finite gradient."""
    guide = trial.factory(model)
    trial.require(guide.setup(trial.x) is guide, "setup does not return the guide")
    named = dict(guide.named_parameters())
    trial.require(len(named) > 0, "there are no parameters after setup")
    guide.setup(trial.x)
    same = all(value is named[name] for name, value in guide.named_parameters())
    trial.require(same, "a second setup replaces the parameters")
    perturb(guide, 0.3, trial.generator)
    Trace_ELBO(num_particles=4).differentiable_loss(model, guide, trial.x).backward()
    for name, parameter in named.items():
        trial.require(parameter.grad is not None, f"{name} gets no gradient")
        trial.require(bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite")


def guide_state(trial: GuideTrial) -> None:
    """``state_dict`` of one guide, loaded into another that is set up, gives the same posterior."""
    guide, other = trial.guide(), trial.guide(1.0)
    other.load_state_dict(guide.state_dict())
    z = trial.random(7, guide.latent_dim)
    trial.equal("log_prob of a loaded guide", other.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))


def guide_copies(trial: GuideTrial) -> None:
    """Copies by deepcopy and pickle give the same posterior and leave the original able to train."""
    guide = trial.guide()
    guide(trial.x)
    z = trial.random(7, guide.latent_dim)
    want = guide.get_posterior().log_prob(z)
    for name, clone in (("deepcopy", copy.deepcopy), ("pickle", lambda g: pickle.loads(pickle.dumps(g)))):
        other = clone(guide)
        trial.equal(f"log_prob of a {name}", other.get_posterior().log_prob(z), want)
        perturb(other, 1.0, trial.generator)
        trial.equal(f"the original after its {name} was changed", guide.get_posterior().log_prob(z), want)
    trial.trains(guide, "a guide that was copied")


def guide_quantiles(trial: GuideTrial) -> None:
    """``median`` and ``quantiles`` have the sites' shapes, lie in the supports, rise, and are the same each time."""
    guide = trial.guide()
    median, levels = guide.median(trial.x), guide.quantiles([0.1, 0.5, 0.9], trial.x)
    for found, lead in ((median, ()), (levels, (3,))):
        trial.require(set(found) == set(SITES), f"the sites are {sorted(found)}, not {sorted(SITES)}")
        for name, (shape, support) in SITES.items():
            value = torch.stack(list(found[name])) if isinstance(found[name], list) else found[name]
            trial.require(tuple(value.shape) == (*lead, *shape), f"{name} has shape {tuple(value.shape)}")
            trial.require(bool(support.check(value).all()), f"{name} leaves its support")
            if lead and support is not constraints.simplex:
                trial.require(bool((value.diff(dim=0) >= 0).all()), f"the quantiles of {name} do not rise")
    again = guide.median(trial.x)
    for name, value in median.items():
        trial.equal(f"two medians of {name}", again[name], value)


def guide_posterior(trial: GuideTrial) -> None:
    """``get_posterior`` is a distribution of ``latent_dim`` numbers, ``get_transform`` what makes it, and a trace of
    the guide has every site in its support.
    """
    guide = trial.guide()
    posterior, transform = guide.get_posterior(trial.x), guide.get_transform(trial.x)
    trial.require(isinstance(transform, FlowTransform), f"get_transform gives a {type(transform).__name__}")
    sample = posterior.rsample((5,))
    trial.require(tuple(sample.shape) == (5, guide.latent_dim), f"a posterior sample has shape {tuple(sample.shape)}")
    base = guide.get_base_dist()
    z, log_det = transform.inverse_and_log_det(sample.detach())
    unit = 10 * (1 + z.abs().amax(-1) ** 2 + log_det.abs())
    trial.close(
        "log_prob of the posterior, and by its parts",
        posterior.log_prob(sample),
        base.log_prob(z) + log_det,
        1e-3,
        unit,
    )
    trace = poutine.trace(guide).get_trace(trial.x)
    trial.require(bool(torch.isfinite(trace.log_prob_sum())), "a trace of the guide has no finite log_prob")
    for name, (shape, support) in SITES.items():
        value = trace.nodes[name]["value"]
        trial.require(tuple(value.shape) == shape and bool(support.check(value).all()), f"{name} is not in its support")
    drawn = Predictive(model, guide=guide, num_samples=4)(trial.x)
    trial.require(len(drawn["loc"]) == 4, "Predictive does not draw from the guide")


def guide_training(trial: GuideTrial) -> None:
    """``SVI`` trains it, with particles one by one and vectorized, beside another guide of the same class."""
    trial.trains(trial.guide(), "a guide")
    trial.trains(trial.guide(), "a guide with 3 particles", num_particles=3)
    vectorized = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    trial.trains(trial.guide(), "a guide with vectorized particles", **vectorized)
    one, other = trial.guide(), trial.guide()
    trial.trains(one, "the first of two guides")
    trial.trains(other, "the second of two guides")
    fresh = trial.factory(model)
    fresh.setup(trial.x)
    svi = SVI(
        model,
        fresh,
        PyroOptim(torch.optim.Adam, {"lr": 1e-2}),
        Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
    )
    losses = [svi.step(trial.x) for _ in range(150)]
    first, last = sum(losses[:15]) / 15, sum(losses[-15:]) / 15
    trial.require(last < first, f"150 steps take the loss from {first:.3g} to {last:.3g}")


def guide_refuses(trial: GuideTrial) -> None:
    """Using a guide before ``setup`` is a typed error, not a wrong answer."""
    guide = trial.factory(model)
    try:
        guide.get_posterior()
    except PyroflowsError:
        return
    trial.require(False, "get_posterior before setup raises nothing")


GUIDE_LAWS = (
    Law("guide_parameters", guide_parameters),
    Law("guide_state", guide_state),
    Law("guide_copies", guide_copies),
    Law("guide_quantiles", guide_quantiles),
    Law("guide_posterior", guide_posterior),
    Law("guide_training", guide_training),
    Law("guide_refuses", guide_refuses),
)
"""Every law of a guide, in the order in which they run."""
