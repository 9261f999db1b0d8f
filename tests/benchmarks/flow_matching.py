"""Held-out log-likelihood against training time: one velocity field by likelihood and by flow matching.

    python tests/benchmarks/flow_matching.py [--sets moons gaussians circles] [--lr 0.01] [--quick]

Every line is a run of its own from the same start, with a learning rate that falls to 0 along a cosine, so that each
shows what its time is worth at best. Data are fresh rows of a set of the tests. Times are of this process on the
processor; read the ratios. The last column is the number of evaluations that the sampler takes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import pyroflows as pf
from pyroflows.distributions import standard_normal
from pyroflows.training import FlowMatching, Likelihood
from pyroflows.transforms import continuous

sys.path.append(str(Path(__file__).parents[1]))
from test_plane import SETS

RUNS = [
    ("likelihood", [(Likelihood(), 256, 50)]),
    ("likelihood", [(Likelihood(), 256, 100)]),
    ("likelihood", [(Likelihood(), 256, 200)]),
    ("flow matching", [(FlowMatching(), 2048, 250)]),
    ("flow matching", [(FlowMatching(), 2048, 500)]),
    ("flow matching", [(FlowMatching(), 2048, 1000)]),
    ("flow matching", [(FlowMatching(), 2048, 2000)]),
    ("optimal coupling", [(FlowMatching(coupling="optimal_transport"), 1024, 125)]),
    ("optimal coupling", [(FlowMatching(coupling="optimal_transport"), 1024, 250)]),
    ("optimal coupling", [(FlowMatching(coupling="optimal_transport"), 1024, 500)]),
    ("optimal coupling", [(FlowMatching(coupling="optimal_transport"), 1024, 1000)]),
    ("mixture", [(FlowMatching(coupling="optimal_transport"), 1024, 250), (Likelihood(), 256, 25)]),
]


def run(draw, phases, lr):
    """Held-out log-likelihood, seconds, and evaluations of the sampler."""
    torch.manual_seed(0)
    flow = pf.Flow(continuous(2, hidden_dims=(64, 64)), standard_normal(2))
    rows = draw(20_000)
    flow.standardize.set(rows.mean(0), rows.std(0))
    held, z = draw(4000), torch.randn(1000, 2)
    parameters, seconds = list(flow.parameters()), 0.0
    for number, (objective, batch, steps) in enumerate(phases):
        optimizer = torch.optim.Adam(parameters, lr=lr / 4**number, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = draw(batch)
            started = time.process_time()
            optimizer.zero_grad()
            objective(flow, rows).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            seconds += time.process_time() - started
    with torch.no_grad():
        return float(flow().log_prob(held).mean()), seconds, flow.learned.eval().flow(z).nfe


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["moons", "gaussians", "circles"])
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: a look, not a result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets:
        for label, phases in RUNS:
            if arguments.quick:
                phases = [(objective, batch, max(2, steps // 10)) for objective, batch, steps in phases]
            score, seconds, nfe = run(SETS[name], phases, arguments.lr)
            steps = "+".join(str(steps) for _, _, steps in phases)
            print(f"{name:10} {label:17} {steps:>8} steps  {seconds:6.1f} s  {score:8.4f} nats  {nfe:4d}", flush=True)


if __name__ == "__main__":
    main()
