"""Penguins: the density of four body measurements, alone and given the species."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import pyroflows as pf

__all__ = ["MEASUREMENTS", "Penguins", "compare_densities", "load_penguins"]

MEASUREMENTS = {"bill_length_mm": 0.1, "bill_depth_mm": 0.1, "flipper_length_mm": 1.0, "body_mass_g": 25.0}
"""The columns, each with the precision that it was rounded to."""
SPECIES = ("Adelie", "Chinstrap", "Gentoo")
Array = NDArray[np.float64]


class Penguins(NamedTuple):
    """Complete rows: measurements ``[n, 4]`` and species, one-hot ``[n, 3]``."""

    x: Array
    species: Array


def load_penguins(seed: int = 0) -> Penguins:
    """The penguins that ship with the package, rounding undone by uniform noise of its own width."""
    with files("pyroflows.demo").joinpath("penguins.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] not in ("", "NA") for name in MEASUREMENTS)]
    x = np.array([[float(row[name]) for name in MEASUREMENTS] for row in rows])
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, x.shape)
    species = np.array([[float(row["species"] == name) for name in SPECIES] for row in rows])
    return Penguins(x + noise * np.array(list(MEASUREMENTS.values())), species)


def _split(penguins: Penguins, seed: int = 0) -> tuple[Penguins, Penguins]:
    """Four fifths to fit, one fifth held out."""
    order = np.random.default_rng(seed).permutation(len(penguins.x))
    held = len(order) // 5
    fit, test = order[held:], order[:held]
    return Penguins(penguins.x[fit], penguins.species[fit]), Penguins(penguins.x[test], penguins.species[test])


def _baselines(fit: Penguins, test: Penguins) -> Iterator[tuple[str, Array]]:
    from scipy.stats import gaussian_kde, multivariate_normal

    def gaussian(rows: Array, at: Array) -> Array:
        return np.atleast_1d(multivariate_normal(rows.mean(0), np.cov(rows.T)).logpdf(at))

    yield "Gaussian, full covariance", gaussian(fit.x, test.x)
    yield "kernel density (Scott)", gaussian_kde(fit.x.T).logpdf(test.x.T)
    scores = np.empty(len(test.x))
    for k in range(len(SPECIES)):
        mine = test.species[:, k] == 1
        scores[mine] = gaussian(fit.x[fit.species[:, k] == 1], test.x[mine])
    yield "Gaussian of each species", scores


def compare_densities(output: Path, *, max_epochs: int = 500, progress: bool = True) -> list[dict[str, Any]]:
    """Fits flows and baselines to the same rows and scores the same held-out rows.

    Writes ``penguins.png``, a corner plot of data beside samples, and ``penguins.safetensors``, the flow.

    Returns:
        A row for each model: its name, what it is given, the mean held-out log-likelihood in nats, the standard
        error of its difference to the first row, and seconds.
    """
    penguins = load_penguins()
    fit, test = _split(penguins)
    scores = {
        name: (given, score, 0.0)
        for given, (name, score) in zip(("-", "-", "species"), _baselines(fit, test), strict=True)
    }
    flows = {}
    for name, given, context in (("NSF", "-", None), ("conditional NSF", "species", fit.species)):
        torch.manual_seed(0)
        flow = pf.flow(
            "nsf",
            input_dim=len(MEASUREMENTS),
            context_dim=0 if context is None else len(SPECIES),
            transforms=3,
            hidden_dims=(32, 32),
            bins=4,
            linear=True,
        )
        result = pf.fit(
            flow,
            fit.x,
            context,
            validation=0.2,
            batch_size=64,
            lr=3e-3,
            max_epochs=max_epochs,
            progress=progress,
            seed=0,
        )
        with torch.no_grad():
            at = None if context is None else torch.as_tensor(test.species, dtype=torch.float32)
            score = flow(at).log_prob(torch.as_tensor(test.x, dtype=torch.float32)).double().numpy()
        scores[name] = (given, score, result.seconds)
        flows[name] = flow
    pf.save(flows["NSF"], output / "penguins.safetensors")
    _corner_plot(penguins, flows["conditional NSF"], output / "penguins.png")
    first = next(iter(scores.values()))[1]
    return [
        {
            "model": name,
            "given": given,
            "held-out log-likelihood": float(score.mean()),
            "gain": float((score - first).mean()),
            "se of gain": float((score - first).std(ddof=1) / np.sqrt(len(score))),
            "seconds": seconds,
        }
        for name, (given, score, seconds) in scores.items()
    ]


def _corner_plot(penguins: Penguins, flow: pf.Flow, path: Path) -> None:
    """Data on the left, samples of the conditional flow for the same species on the right."""
    from matplotlib.figure import Figure

    torch.manual_seed(1)
    with torch.no_grad():
        samples = flow(torch.as_tensor(penguins.species, dtype=torch.float32)).sample().double().numpy()
    labels = [name.replace("_", " ") for name in MEASUREMENTS]
    size = len(labels)
    figure = Figure(figsize=(17, 8.5), layout="constrained")
    parts: Any = figure.subfigures(1, 2)
    for side, (part, x) in enumerate(zip(parts, (penguins.x, samples), strict=True)):
        part.suptitle(("penguins, measured", "penguins, drawn from the conditional NSF")[side], fontsize=15)
        axes = part.subplots(size, size)
        for i in range(size):
            low, high = penguins.x[:, i].min(), penguins.x[:, i].max()
            margin = 0.08 * (high - low)
            for j in range(size):
                axis = axes[i, j]
                if j > i:
                    axis.set_visible(False)
                    continue
                across = penguins.x[:, j]
                pad = 0.08 * (across.max() - across.min())
                axis.set_xlim(across.min() - pad, across.max() + pad)
                for k, species in enumerate(SPECIES):
                    mine, colour = penguins.species[:, k] == 1, f"C{k}"
                    if i == j:
                        bins = np.linspace(low - margin, high + margin, 25)
                        axis.hist(x[mine, i], bins=bins, color=colour, alpha=0.6, density=True, label=species)
                    else:
                        axis.set_ylim(low - margin, high + margin)
                        axis.scatter(x[mine, j], x[mine, i], s=5, color=colour, alpha=0.6, linewidths=0)
                axis.set_xlabel(labels[j] if i == size - 1 else "")
                axis.set_ylabel(labels[i] if j == 0 and i > 0 else "")
                if i == j:
                    axis.set_yticks([])
        legend = axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.05, 1.0), frameon=False)
        legend.set_in_layout(False)
    figure.savefig(path, dpi=110)
