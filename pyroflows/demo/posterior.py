"""Eight schools, centred: a posterior with a funnel, approximated by flow guides and by Pyro's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from tqdm import tqdm

import pyroflows as pf
from pyroflows.diagnostics import from_guide, importance_summary

__all__ = ["LOG_EVIDENCE", "compare_guides", "eight_schools"]

LOG_EVIDENCE = -31.31
"""The log evidence of the model, by importance sampling against long reference runs (posteriordb)."""
SCHOOLS = tuple("ABCDEFGH")
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SPREAD = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(effect: Tensor, spread: Tensor) -> None:
    """Coaching effects in eight schools (Rubin 1981), with the effects themselves as latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, spread), obs=effect)


def _flow_guide(flow: str) -> Callable[[], Any]:
    options: dict[str, Any] = {"linear": True, "activation": "silu", "hidden_dims": (64, 64)}
    return lambda: pf.AutoFlow(eight_schools, flow=flow, init_scale=1.0, **options).setup(EFFECT, SPREAD)


LEARNING_RATES = {"AutoNormal": 0.1, "AutoMultivariateNormal": 0.1}
"""The Gaussian guides take, and need, larger steps than flows (0.01) to converge in as many."""
GUIDES: dict[str, Callable[[], Any]] = {
    "AutoNormal": lambda: AutoNormal(eight_schools, init_scale=1.0),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(eight_schools, init_scale=1.0),
    "AutoIAFNormal (3 layers)": lambda: AutoIAFNormal(eight_schools, hidden_dim=[64, 64], num_transforms=3),
    "AutoFlow(flow='nsf')": _flow_guide("nsf"),
    "AutoFlow(flow='iaf')": _flow_guide("iaf"),
}


def _train(guide: Any, name: str, steps: int, progress: bool) -> float:
    decay = {"lr": LEARNING_RATES.get(name, 0.01), "lrd": 0.1 ** (1 / steps), "clip_norm": 10.0}
    loss = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(eight_schools, guide, pyro.optim.ClippedAdam(decay), loss)
    started = time.perf_counter()
    with tqdm(total=steps, desc=name, unit="step", mininterval=0.5, disable=not progress) as bar:
        for step in range(steps):
            value = svi.step(EFFECT, SPREAD)
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(elbo=f"{-float(value):.2f}", refresh=False)
    return time.perf_counter() - started


def compare_guides(output: Path, *, steps: int = 2000, progress: bool = True) -> list[dict[str, Any]]:
    """Trains each guide for the same number of steps and judges it by the importance weights of its draws.

    Writes ``posterior.nc``, draws of the guide with the highest ELBO among ours as an ArviZ file, and
    ``posterior.png``, a forest plot of them beside AutoNormal's.

    Returns:
        A row for each guide: name, ELBO, gap to the log evidence, k-hat, effective draws and seconds.
    """
    rows: list[dict[str, Any]] = []
    guides = {}
    for name, make in GUIDES.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make()
        seconds = _train(guide, name, steps, progress)
        summary = importance_summary(eight_schools, guide, EFFECT, SPREAD, num_samples=20_000, max_plate_nesting=1)
        rows.append(
            {
                "guide": name,
                "ELBO": summary.elbo,
                "gap to log evidence": LOG_EVIDENCE - summary.elbo,
                "k-hat": summary.khat,
                "ESS of 20000": summary.ess,
                "seconds": seconds,
            }
        )
        draws = from_guide(
            eight_schools, guide, EFFECT, SPREAD, num_samples=4000, max_plate_nesting=1, coords={"school": SCHOOLS}
        )
        guides[name] = draws
    ours = max((row for row in rows if row["guide"].startswith("AutoFlow")), key=lambda row: float(row["ELBO"]))
    best = ours["guide"]
    guides[best].to_netcdf(str(output / "posterior.nc"))
    _forest_plot({"AutoNormal": guides["AutoNormal"], best: guides[best]}, output / "posterior.png")
    return rows


def _forest_plot(draws: dict[str, Any], path: Path) -> None:
    """Medians with 50 % and 94 % intervals of each latent, one colour a guide."""
    from matplotlib.figure import Figure

    labels = ["mu", "tau", *(f"theta[{school}]" for school in SCHOOLS)]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for k, (name, data) in enumerate(draws.items()):
        posterior = data.posterior
        columns = [posterior["mu"].values.ravel(), posterior["tau"].values.ravel()]
        columns += list(posterior["theta"].values.reshape(-1, len(SCHOOLS)).T)
        for i, values in enumerate(columns):
            low, quarter, middle, three, high = torch.quantile(
                torch.as_tensor(values).double(), torch.tensor([0.03, 0.25, 0.5, 0.75, 0.97]).double()
            ).tolist()
            at = -i - 0.15 + 0.3 * (k == 0)
            axis.plot([low, high], [at, at], color=f"C{k}", linewidth=1.5, label=name if i == 0 else None)
            axis.plot([quarter, three], [at, at], color=f"C{k}", linewidth=4.5)
            axis.plot([middle], [at], "o", color="white", markeredgecolor=f"C{k}", markersize=5)
    axis.set_yticks([-i for i in range(len(labels))], labels)
    axis.axvline(0.0, color="0.8", zorder=0)
    axis.set_xlabel("coaching effect (points): median, 50 % and 94 % intervals")
    axis.set_title("eight schools, centred")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
