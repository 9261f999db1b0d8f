"""Milliseconds of a maximum-likelihood step beside zuko's, alternating in one process.

    pip install -c constraints.txt -e ".[bench]"
    python tests/benchmarks/training_step.py [--rounds 15]

Both sides have five layers, networks of two hidden layers of 128, and splines of eight bins on [-5, 5]; the
number of parameters is printed for each. Read the ratio of medians: absolute times depend on the machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import zuko

import pyroflows as pf

CASES: dict[str, tuple[Callable[[int], torch.nn.Module], Callable[[int], torch.nn.Module]]] = {
    "nsf, autoregressive": (
        lambda d: pf.flow("nsf", input_dim=d, structure="autoregressive"),
        lambda d: zuko.flows.NSF(d, transforms=5, hidden_features=(128, 128), bins=8),
    ),
    "nsf, coupling": (
        lambda d: pf.flow("nsf", input_dim=d),
        lambda d: zuko.flows.NSF(d, transforms=5, hidden_features=(128, 128), bins=8, passes=2),
    ),
    "maf": (
        lambda d: pf.flow("maf", input_dim=d),
        lambda d: zuko.flows.MAF(d, transforms=5, hidden_features=(128, 128)),
    ),
    "realnvp": (
        lambda d: pf.flow("realnvp", input_dim=d),
        lambda d: zuko.flows.RealNVP(d, transforms=5, hidden_features=(128, 128)),
    ),
}


def stepper(flow: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """One step of Adam on the mean log-likelihood."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        (-flow().log_prob(x).mean()).backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'flow':<22}{'D':>4}{'batch':>7}{'ours ms':>10}{'zuko ms':>10}{'ratio':>8}{'params':>18}")
    for name, (ours, theirs) in CASES.items():
        for dim in (2, 8, 43):
            for batch in (256, 4096):
                torch.manual_seed(0)
                x = torch.randn(batch, dim)
                flows = ours(dim), theirs(dim)
                steps = [stepper(flow, x) for flow in flows]
                for step in steps:
                    step()
                times = [[milliseconds(step) for step in steps] for _ in range(rounds)]
                ratio = statistics.median(a / b for a, b in times)
                a, b = (statistics.median(column) for column in zip(*times, strict=True))
                sizes = "/".join(f"{sum(p.numel() for p in flow.parameters()) / 1e3:.0f}k" for flow in flows)
                print(f"{name:<22}{dim:>4}{batch:>7}{a:>10.1f}{b:>10.1f}{ratio:>8.2f}{sizes:>18}", flush=True)


if __name__ == "__main__":
    main()
