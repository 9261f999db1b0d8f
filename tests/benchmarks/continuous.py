"""A maximum-likelihood step of a continuous-time flow beside the peers', each as accurate as the others.

    pip install -c constraints.txt -e ".[bench]"
    python tests/benchmarks/continuous.py step [--dims 2 43] [--batches 256] [--error 2e-3] [--rounds 5]
    python tests/benchmarks/continuous.py overhead
    python tests/benchmarks/continuous.py memory

``step``: a tolerance does not mean the same thing to two solvers, so every flow takes the loosest of its settings at
which the log-density of its worst row among 512 is within ``--error`` nats of a solve in float64 at tolerances of 1e-9.
Networks have two hidden layers of 128, and the log-determinant is exact. They are first fitted by flow matching, so
that a solve costs what it costs in training. "ffjord" is torchdiffeq's adjoint with one vector-Jacobian product a
dimension, "torchdiffeq" its solve without an adjoint and with batched products; both have our field's weights. zuko's
has a field of its own, fitted the same way.

``overhead``: what a solver takes for an evaluation beyond the field itself, of a state of points and log-determinants.

``memory``: what autograd keeps of one solve, counted by hooks, and the peak of a process of its own (Linux only).

Times are of this process on the processor; read the ratios.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pyroflows.nets import VelocityMLP
from pyroflows.numerics import solve
from pyroflows.transforms import ContinuousTransform

LogProb = Callable[[Tensor], Tensor]
HIDDEN = (128, 128)
ROWS = 512
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


def log_normal(x: Tensor) -> Tensor:
    return -0.5 * (x * x + 1.8378770664093453).sum(-1)


# --- fields and flows -------------------------------------------------------------------------------------


class Concat(nn.Module):
    """FFJORD's network: the time is one more input of every layer."""

    def __init__(self, velocity: VelocityMLP) -> None:
        super().__init__()
        shifts = zip(
            velocity.steering.time_weight.split(velocity.steering.sizes),
            velocity.steering.bias.split(velocity.steering.sizes),
            strict=True,
        )
        self.layers = nn.ModuleList()
        for weight, (of_time, bias) in zip(velocity.weights, shifts, strict=True):
            layer = nn.Linear(weight.shape[1] + 1, weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(torch.cat([of_time[:, None], weight], 1))
                layer.bias.copy_(bias)
            self.layers.append(layer)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.tanh(x) if number else x
            x = layer(torch.cat([t.expand(len(x), 1), x], 1))
        return x


class Peer(nn.Module):
    """A continuous-time flow as one writes it with torchdiffeq."""

    def __init__(self, net: nn.Module, rtol: float, adjoint: bool) -> None:
        super().__init__()
        self.net, self.rtol, self.adjoint = net, rtol, adjoint

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            v = self.net(t, x)
            columns = v.sum(0)
            if self.adjoint:
                rows = [torch.autograd.grad(columns[d], x, create_graph=True)[0][:, d] for d in range(x.shape[1])]
                divergence = torch.stack(rows).sum(0)
            else:
                eye = torch.eye(x.shape[1], dtype=x.dtype)
                (jacobian,) = torch.autograd.grad(columns, x, eye, create_graph=recording, is_grads_batched=True)
                divergence = torch.einsum("ibi->b", jacobian)
        return v, divergence

    def log_prob(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint, odeint_adjoint

        times = x.new_tensor([1.0, 0.0])
        solver = odeint_adjoint if self.adjoint else odeint
        z, log_det = solver(self, (x, x.new_zeros(len(x))), times, rtol=self.rtol, atol=self.rtol, method="dopri5")
        return log_normal(z[-1]) + log_det[-1]


class Flow(Protocol):
    """What is timed: the log-density at a setting, of which there are some, loose ones first."""

    solver: str
    settings: Sequence[float]

    def at(self, setting: Any) -> LogProb: ...

    def net(self) -> nn.Module: ...

    def parameters(self) -> list[nn.Parameter]: ...


class Ours:
    def __init__(self, velocity: VelocityMLP, solver: str, gradient: str) -> None:
        self.velocity, self.solver, self.gradient = velocity, solver, gradient
        self.adaptive = solver in ("dopri5", "bosh3")
        self.settings = TOLERANCES if self.adaptive else STEPS

    def at(self, setting: Any) -> LogProb:
        options: dict[str, Any] = {"rtol": setting} if self.adaptive else {"steps": setting}
        options |= {"solver": self.solver, "gradient": self.gradient}
        layer = ContinuousTransform(self.velocity, self.velocity.input_dim, **options)

        def log_prob(x: Tensor) -> Tensor:
            z, log_det = layer.inverse_and_log_det(x)
            return log_normal(z) + log_det

        return log_prob

    def net(self) -> nn.Module:
        return self.velocity

    def parameters(self) -> list[nn.Parameter]:
        return list(self.velocity.parameters())


class Theirs:
    solver, settings = "torchdiffeq", TOLERANCES

    def __init__(self, velocity: VelocityMLP, adjoint: bool) -> None:
        self.velocity, self.concat, self.adjoint = velocity, Concat(velocity), adjoint

    def at(self, setting: Any) -> LogProb:
        return Peer(self.concat, setting, self.adjoint).log_prob

    def net(self) -> nn.Module:
        return self.velocity

    def parameters(self) -> list[nn.Parameter]:
        return list(self.concat.parameters())


class Reversed(nn.Module):
    """zuko's field as one from base to data."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.part.f(1 - t.squeeze(-1), x)


class Zukos:
    solver, settings = "zuko", TOLERANCES

    def __init__(self, cnf: nn.Module) -> None:
        self.cnf = cnf

    def at(self, setting: Any) -> LogProb:
        def log_prob(x: Tensor) -> Tensor:
            self.cnf.transform.rtol = self.cnf.transform.atol = setting
            return self.cnf().log_prob(x)

        return log_prob

    def net(self) -> nn.Module:
        return Reversed(self.cnf.transform)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.cnf.parameters())


def data(dim: int, rows: int, seed: int) -> Tensor:
    """Eight clusters."""
    centres = 1.5 * torch.randn(8, dim, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (rows,), generator=generator)
    return centres[which] + 0.5 * torch.randn(rows, dim, generator=generator)


def matched(field: Callable[[Tensor, Tensor], Tensor], parameters: Any, dim: int, to_data: bool, steps: int) -> None:
    """Fits a field to straight ways between noise and data."""
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for step in range(steps):
        x = data(dim, 256, 100 + step)
        z, t = torch.randn_like(x), torch.rand(len(x), 1)
        start, end = (z, x) if to_data else (x, z)
        optimizer.zero_grad()
        (field(t, torch.lerp(start, end, t)) - (end - start)).square().mean().backward()
        optimizer.step()


def flows(dim: int, steps: int, libraries: list[str]) -> dict[str, Flow]:
    """Flows by name, their fields fitted."""
    torch.manual_seed(0)
    velocity = VelocityMLP(dim, hidden_dims=HIDDEN)
    matched(velocity, velocity.parameters(), dim, True, steps)
    found: dict[str, Flow] = {}
    for name in libraries:
        if name == "zuko":
            import zuko

            cnf = zuko.flows.CNF(dim, hidden_features=HIDDEN, activation=nn.Tanh, exact=True)
            part = cnf.transform
            matched(lambda t, x, part=part: part.f(t.squeeze(-1), x), cnf.parameters(), dim, False, steps)
            found[name] = Zukos(cnf)
        elif name in ("ffjord", "torchdiffeq"):
            found[name] = Theirs(velocity, adjoint=name == "ffjord")
        else:
            found[name] = Ours(velocity, *name.split("/"))
    return found


# --- a step -----------------------------------------------------------------------------------------------


def exact(net: nn.Module, dim: int, x: Tensor) -> Tensor:
    """The log-density of a field in float64."""
    layer = ContinuousTransform(copy.deepcopy(net).double(), dim, rtol=1e-9, max_nfe=100_000)
    with torch.no_grad():
        z, log_det = layer.inverse_and_log_det(x.double())
    return log_normal(z) + log_det


def loosest(flow: Flow, x: Tensor, right: Tensor, allowed: float) -> tuple[Any, float]:
    """The first setting whose worst row is right, and how far off that is; else the last."""
    setting, worst = None, float("inf")
    for setting in flow.settings:
        with torch.no_grad():
            worst = float((flow.at(setting)(x) - right).abs().max())
        if worst <= allowed:
            break
    return setting, worst


def stepper(log_prob: LogProb, parameters: list[nn.Parameter], x: Tensor) -> Callable[[], None]:
    """One step of Adam, of length zero, so that the field stays what it is."""
    optimizer = torch.optim.Adam(parameters, lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(x).mean()).backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], Any], repeats: int = 1) -> float:
    started = time.process_time()
    for _ in range(repeats):
        step()
    return 1e3 * (time.process_time() - started) / repeats


def steps(dim: int, batches: list[int], libraries: list[str], allowed: float, rounds: int, fitting: int) -> None:
    found = flows(dim, fitting, libraries)
    rows = data(dim, ROWS, seed=1)
    right: dict[int, Tensor] = {}
    chosen: dict[tuple[int, Any], tuple[Any, float]] = {}
    steppers: dict[str, tuple[Any, float]] = {}
    for name, flow in found.items():
        net = flow.net()
        field = id(flow.parameters()[0]) if isinstance(flow, Zukos) else 0
        if field not in right:
            right[field] = exact(net, dim, rows)
        solver = field, flow.solver
        if solver not in chosen:
            chosen[solver] = loosest(flow, rows, right[field], allowed)
        steppers[name] = chosen[solver]
    for batch in batches:
        x = data(dim, batch, seed=2)
        run = {name: stepper(flow.at(steppers[name][0]), flow.parameters(), x) for name, flow in found.items()}
        if rounds > 1:
            for step in run.values():
                step()
        table = [{name: milliseconds(step) for name, step in run.items()} for _ in range(rounds)]
        first = next(iter(run))
        for name, flow in found.items():
            middle = statistics.median(row[name] for row in table)
            ratio = statistics.median(row[name] / row[first] for row in table)
            count = sum(p.numel() for p in flow.parameters()) / 1e3
            setting, worst = steppers[name]
            print(
                f"{dim:>4}{batch:>6}   {name:<18}{setting:>8g}   off by {worst:.1e}   {count:.1f}k   "
                f"{middle:>9.1f} ms   x{ratio:.2f}",
                flush=True,
            )


# --- overhead ---------------------------------------------------------------------------------------------


class Watched:
    """A field that counts its evaluations and their time; rows that are done leave some solvers' batch."""

    def __init__(self, velocity: VelocityMLP) -> None:
        self.velocity, self.count, self.seconds = velocity, 0, 0.0

    def __call__(self, t: Tensor, state: Any) -> Any:
        started = time.process_time()
        x = state[:, :2] if isinstance(state, Tensor) else state[0]
        v, divergence = self.velocity.with_divergence(t, x)
        out = torch.cat([v, divergence[:, None]], 1) if isinstance(state, Tensor) else (v, divergence)
        self.count += 1
        self.seconds += time.process_time() - started
        return out


def overhead(batch: int, rounds: int) -> None:
    """Microseconds of an evaluation beyond the field's own, without gradients."""
    from torchdiffeq import odeint

    velocity = VelocityMLP(2, hidden_dims=HIDDEN)
    matched(velocity, velocity.parameters(), 2, True, 500)
    x = data(2, batch, seed=1)
    pair, flat = (x, x.new_zeros(batch)), torch.cat([x, x.new_zeros(batch, 1)], 1)
    back = x.new_tensor([1.0, 0.0])
    tolerances: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    fixed: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.05}}
    runs: dict[str, Callable[[Any], Any]] = {
        "ours, dopri5": lambda field: solve(field, flat, 1.0, 0.0, **tolerances),
        "torchdiffeq, dopri5, tuple": lambda field: odeint(field, pair, back, method="dopri5", **tolerances),
        "torchdiffeq, dopri5": lambda field: odeint(field, flat, back, method="dopri5", **tolerances),
        "ours, rk4": lambda field: solve(field, flat, 1.0, 0.0, solver="rk4", steps=20),
        "torchdiffeq, rk4, tuple": lambda field: odeint(field, pair, back, **fixed),
        "torchdiffeq, rk4": lambda field: odeint(field, flat, back, **fixed),
    }
    beyond: dict[str, list[float]] = {name: [] for name in runs}
    fields: dict[str, list[float]] = {name: [] for name in runs}
    counts = {}
    with torch.no_grad():
        for _ in range(rounds):
            for name, run in runs.items():
                field = Watched(velocity)
                started = time.process_time()
                run(field)
                total = time.process_time() - started
                counts[name] = field.count
                beyond[name].append(1e6 * (total - field.seconds) / field.count)
                fields[name].append(1e6 * field.seconds / field.count)
    for name in runs:
        print(
            f"{name:<28}{counts[name]:>4} evaluations of {statistics.median(fields[name]):>5.0f} us   "
            f"{statistics.median(beyond[name]):>5.0f} us beyond each",
            flush=True,
        )


# --- memory -----------------------------------------------------------------------------------------------


def kept(gradient: str, steps: int, batch: int) -> float:
    """MiB that autograd keeps between a solve and its backward pass, each tensor's storage once."""
    velocity = VelocityMLP(2, hidden_dims=HIDDEN)
    layer = ContinuousTransform(velocity, 2, solver="rk4", steps=steps, gradient=gradient)
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        layer.inverse_and_log_det(torch.randn(batch, 2))
    return sum(sizes.values()) / 2**20


def peak(gradient: str, steps: int, batch: int) -> float:
    """MiB that a forward and backward pass take at their peak beyond what was in use before (Linux only)."""

    def status(field: str) -> float:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    velocity = VelocityMLP(2, hidden_dims=HIDDEN)
    layer = ContinuousTransform(velocity, 2, solver="rk4", steps=steps, gradient=gradient)

    def run(x: Tensor) -> None:
        z, log_det = layer.inverse_and_log_det(x)
        (log_normal(z) + log_det).mean().backward()

    run(torch.randn(8, 2))
    x = torch.randn(batch, 2)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    run(x)
    return status("VmHWM") - before


def memory(batch: int) -> None:
    print(f"rk4, batch {batch}; MiB", flush=True)
    for gradient in ("direct", "checkpoint", "adjoint"):
        for count in (5, 10, 20, 40, 80, 160):
            command = [sys.executable, __file__, "peak", gradient, str(count), str(batch)]
            found = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{gradient:<12}{count:>4} steps   kept {kept(gradient, count, batch):>8.2f}   peak {found:>6.0f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step")
    step.add_argument("--dims", nargs="+", type=int, default=[2, 8, 43, 64])
    step.add_argument("--batches", nargs="+", type=int, default=[256, 4096])
    step.add_argument("--flows", nargs="+", default=["dopri5/direct", "rk4/direct", "zuko", "ffjord", "torchdiffeq"])
    step.add_argument("--error", type=float, default=2e-3)
    step.add_argument("--rounds", type=int, default=5, help="with one, nothing is warmed up")
    step.add_argument("--fitting", type=int, default=1500, help="steps of flow matching")
    for name in ("overhead", "memory"):
        command = commands.add_parser(name)
        command.add_argument("--batch", type=int, default=256 if name == "overhead" else 1024)
    commands.choices["overhead"].add_argument("--rounds", type=int, default=15)
    one = commands.add_parser("peak", help="what memory runs in a process of its own")
    one.add_argument("gradient")
    one.add_argument("steps", type=int)
    one.add_argument("batch", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "peak":
        print(peak(options.gradient, options.steps, options.batch))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    if options.command == "step":
        for dim in options.dims:
            steps(dim, options.batches, options.flows, options.error, options.rounds, options.fitting)
    elif options.command == "overhead":
        overhead(options.batch, options.rounds)
    else:
        memory(options.batch)


if __name__ == "__main__":
    main()
