"""Milliseconds of a training step of monotone flows beside Pyro's and zuko's, and how well UNAFs integrate.

    pip install -c constraints.txt -e ".[bench]"
    python tests/benchmarks/monotone.py [--rounds 7] [--batches 256 4096] [--only naf]

NAF: five autoregressive layers of 16 deep-sigmoid units with networks of two hidden layers of 128, ours and
``pyro.distributions.transforms.neural_autoregressive``; a step samples and scores, the one direction that Pyro's has.
UNAF: five layers, networks alike, ours and ``zuko.flows.UNAF``; a step scores data. Both integrate by Gauss-Legendre
rules, each with its own number of nodes, of integrands of their own: ours a network of 8 units whose weights the
conditioner gives, zuko's one of two layers of 64 that reads 16 numbers of the conditioner's.
Steps alternate in one process. Processor time on one thread; read the ratios of medians.

Quadrature error: both are trained for a while on the same data, or (``wild``) moved by half a standard deviation of
each network's initial weights. Then held-out points go through the whole flow in float64, with the rule of the timed
steps and with one of four times as many nodes; the error is by how much the two differ, at most and at the median.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
import zuko

import pyroflows as pf
from pyroflows.transforms.monotone import UnconstrainedMonotonic, _rule

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


def bananas(count: int, d: int) -> torch.Tensor:
    x = torch.randn(count, d)
    for i in range(1, d):
        x[:, i] = 0.5 * x[:, i] + x[:, i - 1] ** 2 / math.sqrt(2) - 1 / math.sqrt(2)
        x[:, i] /= x[:, i].std()
    return x


def _latents_ours(flow: pf.distributions.Flow, x: torch.Tensor, times: int) -> torch.Tensor:
    flow = copy.deepcopy(flow)
    maps = {layer.map for layer in flow.modules() if isinstance(getattr(layer, "map", None), UnconstrainedMonotonic)}
    for each in maps:  # one for all layers
        nodes = len(each.rules[0][1]) * times  # of float32, which the steps are timed in
        each.rules = (_rule(nodes), _rule(nodes))
    return flow.double().transform.inverse_and_log_det(x)[0]


def _latents_zuko(flow: torch.nn.Module, x: torch.Tensor, times: int) -> torch.Tensor:
    integral = zuko.transforms.gauss_legendre
    zuko.transforms.gauss_legendre = lambda f, a, b, n, phi: integral(f, a, b, n=n * times, phi=phi)
    try:
        return copy.deepcopy(flow).double()().transform(x)
    finally:
        zuko.transforms.gauss_legendre = integral


def quadrature_errors(d: int, steps: int) -> None:
    flows = {
        "ours": pf.flow("unaf", input_dim=d, transforms=5),
        "zuko": zuko.flows.UNAF(d, transforms=5, hidden_features=(128, 128)),
    }
    latents = {"ours": _latents_ours, "zuko": _latents_zuko}
    points = bananas(500, d)
    for name, flow in flows.items():
        wild = copy.deepcopy(flow)
        with torch.no_grad():
            for p in wild.parameters():
                p.add_(0.5 * torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0))
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            (-flow().log_prob(bananas(256, d)).mean()).backward()
            optimizer.step()
        for state, candidate in ((f"after {steps} steps", flow), ("wild", wild)):
            with torch.no_grad():
                rough, fine = (latents[name](candidate, points.double(), times) for times in (1, 4))
            error = (rough - fine).abs().flatten()
            most, median = float(error.max()), float(error.median())
            print(f"quadrature d={d} {name} {state}: at most {most:.1e}, median {median:.1e}", flush=True)


def milliseconds(step: Step) -> float:
    started = time.process_time()
    step()
    return 1e3 * (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--only", choices=["naf", "unaf", "quadrature"])
    parser.add_argument("--training", type=int, default=300, help="steps before the quadrature is looked at")
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
    for d in options.dims if options.only in (None, "quadrature") else ():
        quadrature_errors(d, options.training)


if __name__ == "__main__":
    main()
