"""A maximum-likelihood step beside the peers': milliseconds, alternating in one process, or peak memory.

    pip install -c constraints.txt -e ".[bench]"
    python tests/benchmarks/training_step.py [--rounds 15] [--dims 2 8 43] [--batches 256 4096] [--compile]
    python tests/benchmarks/training_step.py --memory

Every flow has five layers, networks of two hidden layers of 128, and splines of eight bins on [-5, 5]; the number of
parameters is printed beside each. Times are of this process on the processor, so that other work on the machine counts
less; read the ratios. Peak memory, of a process of its own for each flow, is what a step takes beyond the memory in use
before.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn

import pyroflows as pf

LogProb = Callable[[Tensor], Tensor]
Model = tuple[nn.Module, LogProb]
HIDDEN = [128, 128]
FLOWS = {
    "nsf, autoregressive": ("nsf", {"structure": "autoregressive"}),
    "nsf, coupling": ("nsf", {}),
    "maf": ("maf", {}),
    "realnvp": ("realnvp", {}),
}


def ours(name: str, dim: int) -> Model:
    recipe, options = FLOWS[name]
    flow = pf.flow(recipe, input_dim=dim, **options)
    return flow, lambda x: flow().log_prob(x)


def compiled(name: str, dim: int) -> Model:
    flow, log_prob = ours(name, dim)
    flow.compile()
    return flow, log_prob


def zukos(name: str, dim: int) -> Model:
    import zuko

    size = {"transforms": 5, "hidden_features": HIDDEN}
    spline = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(8,), (8,), (7,)]}
    flow = {
        "nsf, autoregressive": lambda: zuko.flows.NSF(dim, bins=8, **size),
        "nsf, coupling": lambda: zuko.flows.NICE(dim, **spline, **size),
        "maf": lambda: zuko.flows.MAF(dim, **size),
        "realnvp": lambda: zuko.flows.RealNVP(dim, **size),
    }[name]()
    return flow, lambda x: flow().log_prob(x)


def pyros(name: str, dim: int) -> Model:
    """Pyro's layers with a reversal between them, scored in their fast direction."""
    half = dim // 2
    make = {
        "nsf, autoregressive": lambda: pyro_transforms.SplineAutoregressive(
            dim, AutoRegressiveNN(dim, HIDDEN, param_dims=[8, 8, 7]), count_bins=8, bound=5.0, order="quadratic"
        ),
        "maf": lambda: pyro_transforms.AffineAutoregressive(AutoRegressiveNN(dim, HIDDEN)),
        "realnvp": lambda: pyro_transforms.AffineCoupling(half, DenseNN(half, HIDDEN, [dim - half, dim - half])),
    }[name]
    layers = nn.ModuleList(make() for _ in range(5))
    reversal = torch.arange(dim).flip(0)
    base = dist.Normal(torch.zeros(dim), torch.ones(dim))
    parts = [part for layer in layers for part in (layer.inv, pyro_transforms.Permute(reversal))]

    def log_prob(x: Tensor) -> Tensor:  # of a new tensor: Pyro remembers what it did with the old one
        return dist.TransformedDistribution(base, parts).log_prob(x.clone())

    return layers, log_prob


LIBRARIES: dict[str, Callable[[str, int], Model]] = {
    "ours": ours,
    "compiled": compiled,
    "zuko": zukos,
    "pyro": pyros,
}


def stepper(model: Model, x: Tensor) -> Callable[[], None]:
    """One step of Adam on the mean log-likelihood."""
    module, log_prob = model
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(x).mean()).backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None], repeats: int) -> float:
    started = time.process_time()
    for _ in range(repeats):
        step()
    return 1e3 * (time.process_time() - started) / repeats


def times(name: str, dim: int, batch: int, libraries: list[str], rounds: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, dim)
    models = {
        library: LIBRARIES[library](name, dim)
        for library in libraries
        if (library, name) != ("pyro", "nsf, coupling")  # its spline coupling has other networks
    }
    steps = [stepper(model, x) for model in models.values()]
    for step in steps:
        step()
    repeats = max(1, 1024 // batch)
    rows = [[milliseconds(step, repeats) for step in steps] for _ in range(rounds)]
    columns = [f"{name:<20}{dim:>4}{batch:>6}"]
    for column, (library, (module, _)) in enumerate(models.items()):
        ratio = statistics.median(row[column] / row[0] for row in rows)
        count = sum(p.numel() for p in module.parameters()) / 1e3
        middle = statistics.median(row[column] for row in rows)
        columns.append(f"{library} {middle:.1f} ms (x{ratio:.2f}, {count:.0f}k)")
    print("   ".join(columns), flush=True)


def memory(library: str, name: str, dim: int, batch: int) -> None:
    """Prints the MiB that a step takes at its peak beyond what was in use before (Linux only)."""

    def status(field: str) -> float:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    x = torch.randn(batch, dim)
    model = LIBRARIES[library](name, dim)
    stepper(model, x[:8])()  # the optimizer's own memory is not the step's
    step = stepper(model, x)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    for _ in range(3):
        step()
    print(f"{name:<20}{dim:>4}{batch:>6}   {library:<9}{status('VmHWM') - before:>6.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=FLOWS)
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 8, 43])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 4096])
    parser.add_argument("--libraries", nargs="+", default=["ours", "zuko", "pyro"], choices=LIBRARIES)
    parser.add_argument("--compile", action="store_true", help="time our flows compiled too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="peak memory at 43 dimensions and batches of 4096")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        memory(*options.memory_of, dim=43, batch=4096)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; x: time over ours", flush=True)
    if options.memory:
        for name in options.flows:
            for library in ("ours", "zuko"):
                command = [sys.executable, __file__, "--threads", str(options.threads), "--memory-of", library, name]
                subprocess.run(command, check=True)
        return
    libraries = options.libraries + ["compiled"] * options.compile
    for name in options.flows:
        for dim in options.dims:
            for batch in options.batches:
                times(name, dim, batch, libraries, options.rounds)


if __name__ == "__main__":
    main()
