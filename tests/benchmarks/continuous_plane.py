"""How close a flow along a velocity field comes to a density of the plane that is known.

    python tests/benchmarks/continuous_plane.py rings spirals
    python tests/benchmarks/continuous_plane.py checkerboard --steps 12000 --end 0.0009765625

Printed are the time of this process for training, on one thread, and the gap in nats a row between the scores that the
true density and the flow give to new rows, with its standard error. Training sees fresh rows of the set; the sets and
their densities are those of the tests. Beside `VelocityMLP` and `pyroflows.training.FlowMatching` this has a field of
sines that reads the logarithm of the time that is left, more late times, averaged targets and averaged weights.

Once measured, each after 4000 steps: swissroll 0.003, gaussians 0.004, circles 0.005, moons 0.005, pinwheel 0.011,
spirals 0.012, rings 0.036, all within 100 seconds; checkerboard 0.069, and by the second command 0.048 in 270 seconds.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyroflows as pf
from pyroflows.distributions import standard_normal
from pyroflows.nets import Velocity
from pyroflows.transforms import continuous

sys.path.append(str(Path(__file__).parents[1]))
from test_continuous_plane import SETS, TRUE

LATE = 0.6
"""The share of times whose logarithm to the end is uniform; of the others the time is."""


class Waves(Velocity):
    r"""Residual layers :math:`h + \sin((1 + \gamma) * (W h + b) + \beta)` on sines of the point.

    The time sets the gates and shifts. A structure appears at the end of the way, within a time of its own width, and
    so the logarithm of the time that is left enters too.
    """

    def __init__(self, width, depth, end, frequency=2.5):
        super().__init__(2)
        self.end = end
        self.first = nn.Linear(2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 2)
        self.clock = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 2 * width * (depth + 1)))
        with torch.no_grad():
            self.first.weight.normal_(0, frequency)
            self.first.bias.uniform_(-math.pi, math.pi)
            for layer in self.layers:
                layer.weight.uniform_(-1, 1).mul_((6 / width) ** 0.5)
            self.last.weight.mul_(0.1)
            self.clock[2].weight.mul_(0.3)
            self.clock[2].bias.zero_()

    def forward(self, t, x, context=None):
        return self._run(t, x)[0]

    def with_divergence(self, t, x, context=None):
        value, moves = self._run(t, x, divergence=True)
        return value, (moves * self.last.weight).sum((-1, -2))

    def _run(self, t, x, divergence=False):
        """The velocity; and how the last hidden layer moves with each coordinate, ``[*batch, 2, width]``."""
        t = torch.as_tensor(t, dtype=x.dtype)
        t = t if t.dim() else t.unsqueeze(0)
        left = (1 - t + self.end).log() / -math.log(self.end)
        turn = 2 * math.pi * left
        steering = self.clock(torch.cat([t, left, left.square(), turn.sin(), turn.cos()], -1))
        shift, gate, *later = steering.chunk(2 * (len(self.layers) + 1), -1)
        before = (1 + gate) * self.first(x) + shift
        h, moves = before.sin(), None
        if divergence:
            moves = (before.cos() * (1 + gate)).unsqueeze(-2) * self.first.weight.mT
        for layer, shift, gate in zip(self.layers, later[::2], later[1::2], strict=True):
            before = (1 + gate) * layer(h) + shift
            h = h + before.sin()
            if divergence:
                moves = moves + (before.cos() * (1 + gate)).unsqueeze(-2) * linear(moves, layer.weight)
        return self.last(h), moves


def matching(flow, rows):
    """Flow matching's loss, where a target is the mean over all rows of the batch that may lead to the point.

    Given the point and the batch that is the mean of one row's target, so the minimum is the same and the variance
    smaller (Xu, Tong, Jaakkola 2023, *Stable target field*, arXiv:2302.00670).
    """
    n, end = len(rows), flow.learned.velocity.end
    with torch.no_grad():
        data, _ = flow.standardize.inverse_and_log_det(rows)
        u = torch.rand(n, 1)
        left = torch.where(torch.rand(n, 1) < LATE, end**u, u).clamp(end, 1 - end)
        x = (1 - left) * data + left * torch.randn(n, 2)
        away = torch.cdist(x / (1 - left), data, compute_mode="donot_use_mm_for_euclid_dist") * ((1 - left) / left)
        target = ((-0.5 * away.square()).softmax(-1) @ data - x) / left
    return (flow.learned.velocity(1 - left, x) - target).square().mean()


def train(flow, draw, steps, batch, lr):
    """Adam with a rate that falls to 0 along a cosine; the average of the last weights is kept."""
    velocity = flow.learned.velocity
    average = AveragedModel(velocity, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.Adam(velocity.parameters(), lr=lr, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        matching(flow, draw(batch)).backward()
        nn.utils.clip_grad_norm_(velocity.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(velocity)
    velocity.load_state_dict(average.module.state_dict())


def gap(flow, name, rows):
    """Nats a row by which the true density scores new rows above the flow, and its standard error."""
    torch.manual_seed(1)
    fresh = SETS[name](rows)
    with torch.no_grad():
        gaps = TRUE[name](fresh.double()) - flow().log_prob(fresh)
    return float(gaps.mean()), float(gaps.std()) / rows**0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--end", type=float, default=1 / 256, help="the time left, where training has its last times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets:
        torch.manual_seed(0)
        layer = continuous(2, velocity=Waves(arguments.width, arguments.depth, arguments.end), rtol=1e-5, atol=1e-5)
        flow = pf.Flow(layer, standard_normal(2))
        rows = SETS[name](50_000)
        flow.standardize.set(rows.mean(0), rows.std(0))
        started = time.process_time()
        train(flow, SETS[name], arguments.steps, arguments.batch, arguments.lr)
        seconds = time.process_time() - started
        mean, error = gap(flow.eval(), name, 4000)
        print(f"{name:13}{arguments.steps:>6} steps {seconds:7.1f} s   {mean:.4f} +- {error:.4f} nats", flush=True)


if __name__ == "__main__":
    main()
