"""Both parts of the demo, their tables on the terminal and their results in a folder."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["run", "table"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text, numbers with as many digits as they are worth.

    Example:
        >>> print(table([{"model": "a", "score": 1.23456}, {"model": "bc", "score": -10.0}]))
        model   score
        a       1.235
        bc    -10.000
    """
    text = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    names = list(rows[0])
    widths = [max(len(line[i]) for line in [names, *text]) for i in range(len(names))]
    left = [isinstance(value, str) for value in rows[0].values()]
    lines = (
        "  ".join(
            cell.ljust(width) if flush else cell.rjust(width)
            for cell, width, flush in zip(line, widths, left, strict=True)
        )
        for line in [names, *text]
    )
    return "\n".join(line.rstrip() for line in lines)


def run(output: Path = Path("demo-output"), quick: bool = False, progress: bool = True) -> dict[str, Any]:
    """Runs the demo.

    Args:
        output: the folder for pictures, files and ``summary.json``; made if it is missing.
        quick: a few steps of everything, to see that it runs.
        progress: whether to show progress bars.

    Returns:
        What ``summary.json`` holds: the rows of both tables and the seconds taken.

    Raises:
        ModuleNotFoundError: matplotlib is missing; it comes with ``pip install 'pyroflows[demo]'``.
    """
    for needed in ("matplotlib", "scipy"):
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(f"the demo needs {needed}: pip install 'pyroflows[demo]'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on two
    try:
        return _run(Path(output), quick, progress)
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, quick: bool, progress: bool) -> dict[str, Any]:
    from pyroflows.demo.density import compare_densities
    from pyroflows.demo.posterior import LOG_EVIDENCE, compare_guides

    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    print("1. The density of 342 penguins (bill, flipper, mass): a fifth of the rows is held out.", flush=True)
    densities = compare_densities(output, max_epochs=3 if quick else 500, progress=progress)
    print(f"\n{table(densities)}\n\nMean log-likelihood of the held-out rows in nats; gain over the first row.\n")
    print("2. The posterior of centred eight schools: every guide takes the same number of steps.", flush=True)
    guides = compare_guides(output, steps=20 if quick else 2000, progress=progress)
    print(f"\n{table(guides)}\n\nLog evidence {LOG_EVIDENCE} nats. Weights can be trusted where k-hat < 0.7.\n")
    seconds = time.perf_counter() - started
    summary = {"densities": densities, "guides": guides, "log_evidence": LOG_EVIDENCE, "seconds": seconds}
    (output / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(f"Results in {output.resolve()} after {seconds:.0f} s:")
    print("  penguins.png  penguins.safetensors  posterior.png  posterior.nc  summary.json")
    return summary
