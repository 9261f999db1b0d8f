"""Milliseconds of a training step of monotone flows beside Pyro's and zuko's, alternating in one process.

    pip install -c constraints.txt -e ".[bench]"
    python tests/benchmarks/monotone.py [--rounds 7] [--batches 256 4096]

NAF: five autoregressive layers of 16 deep-sigmoid units with networks of two hidden layers of 128, ours and
``pyro.distributions.transforms.neural_autoregressive``; a step samples and scores, the one direction that Pyro's has.
UNAF: five layers, networks alike, ours and ``zuko.flows.UNAF``; a step scores data. Both integrate by Gauss-Legendre
rules, each with its own number of nodes. Processor time on one thread; read the ratios of medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
import zuko

import pyroflows as pf

Step = Callable[[], None]


def _stepper(parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> Step:
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def naf_ours(d: int, batch: int) -> Step:
    flow = pf.flow("naf", input_dim=d, transforms=5, direction="sample")

    def loss() -> torch.Tensor:
        y, log_prob = flow().rsample_with_log_prob((batch,))
        return (log_prob + y.square().sum(-1)).mean()

    return _stepper(list(flow.parameters()), loss)


def naf_pyro(d: int, batch: int) -> Step:
    layers = [pyro_transforms.neural_autoregressive(d, hidden_dims=[128, 128], width=16) for _ in range(5)]
    modules = torch.nn.ModuleList(layers)
    base = dist.Normal(torch.zeros(d), torch.ones(d)).to_event(1)

    def loss() -> torch.Tensor:
        x = base.rsample((batch,))
        log_prob = base.log_prob(x)
        for layer in layers:
            y = layer(x)
            log_prob = log_prob - layer.log_abs_det_jacobian(x, y)
            x = y
        return (log_prob + x.square().sum(-1)).mean()

    return _stepper(list(modules.parameters()), loss)


def unaf_ours(d: int, batch: int) -> Step:
    flow, x = pf.flow("unaf", input_dim=d, transforms=5), torch.randn(batch, d)
    return _stepper(list(flow.parameters()), lambda: -flow().log_prob(x).mean())


def unaf_zuko(d: int, batch: int) -> Step:
    flow, x = zuko.flows.UNAF(d, transforms=5, hidden_features=(128, 128)), torch.randn(batch, d)
    return _stepper(list(flow.parameters()), lambda: -flow().log_prob(x).mean())


def milliseconds(step: Step) -> float:
    started = time.process_time()
    step()
    return 1e3 * (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--only", choices=["naf", "unaf"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {"naf": ("pyro", naf_ours, naf_pyro), "unaf": ("zuko", unaf_ours, unaf_zuko)}
    for name, (peer, ours, theirs) in cases.items():
        if options.only not in (None, name):
            continue
        for d in options.dims:
            for batch in options.batches:
                steps = ours(d, batch), theirs(d, batch)
                times: tuple[list[float], list[float]] = ([], [])
                for round in range(options.rounds + 1):
                    for step, taken in zip(steps, times, strict=True):
                        taken.append(milliseconds(step))
                        if not round:
                            taken.clear()  # the first one warms up
                mine, other = (statistics.median(taken) for taken in times)
                print(
                    f"{name:5} d={d} batch={batch:5}: ours {mine:8.1f} ms, {peer} {other:8.1f} ms, "
                    f"{peer} / ours {other / mine:5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
