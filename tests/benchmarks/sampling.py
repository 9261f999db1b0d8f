"""Seconds to draw 10,000 samples of an autoregressive flow, and milliseconds of the spline alone, beside zuko's.

    pip install -c constraints.txt -e ".[bench]"
    python tests/benchmarks/sampling.py [--rounds 3] [--rows 10000]

Both sides have five layers, networks of two hidden layers of 128, and splines of eight bins on [-5, 5], with parameters
as they are at the start. Read the ratio: absolute times depend on the machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import zuko

import pyroflows as pf
from pyroflows.transforms import RationalSpline

NETWORK = {"transforms": 5, "hidden_features": (128, 128)}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Medians of both, and of their ratio, alternating."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return a, b, statistics.median(b / a for a, b in pairs)


def spline_step(apply: Callable[..., tuple[torch.Tensor, torch.Tensor]], rows: int, dim: int) -> Callable[[], None]:
    torch.manual_seed(0)
    x, raw = torch.randn(rows, dim, requires_grad=True), torch.randn(rows, dim, 23, requires_grad=True)

    def step() -> None:
        x.grad = raw.grad = None
        y, log_slope = apply(x, raw)
        (y.sum() + log_slope.sum()).backward()

    return step


def zukos_spline(x: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return zuko.transforms.MonotonicRQSTransform(*raw.split([8, 8, 7], -1)).call_and_ladj(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for rows, dim in ((256, 8), (4096, 8), (4096, 43)):
        ours, theirs = spline_step(RationalSpline().forward, rows, dim), spline_step(zukos_spline, rows, dim)
        a, b, ratio = compare(ours, theirs, 15)
        print(
            f"spline, step {rows:>6}x{dim:<3} {1e3 * a:8.2f} ms {1e3 * b:8.2f} ms   of its time {1 / ratio:5.2f}",
            flush=True,
        )
    for dim in (8, 43, 64):
        pairs = {
            "maf": (pf.flow("maf", input_dim=dim), zuko.flows.MAF(dim, **NETWORK)),
            "nsf": (pf.flow("nsf", input_dim=dim, structure="autoregressive"), zuko.flows.NSF(dim, bins=8, **NETWORK)),
        }
        for name, (ours, theirs) in pairs.items():
            shape = (options.rows,)
            with torch.no_grad():
                a, b, ratio = compare(
                    lambda flow=ours, shape=shape: flow().sample(shape),
                    lambda flow=theirs, shape=shape: flow().sample(shape),
                    options.rounds,
                )
            print(f"{name}, sample, D={dim:<3} {a:8.3f} s {b:8.3f} s   times faster {ratio:5.1f}", flush=True)


if __name__ == "__main__":
    main()
