# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""What split LBI adds to a whole training step: ResNet-18 on 32x32 images, beside the same step with SGD and AdamW.

Forward, backward and optimizer step of a ResNet-18 for small images (11.2 M parameters, 3x3 stem), batch 64. Arms have
a model each and take their steps in turns; reported is the median, over rounds, of each arm's time by that of SGD in
the same round.

    python examples/benchmarks/train_overhead.py                             # CPU, float32
    python examples/benchmarks/train_overhead.py --device cuda --autocast --compile --rounds 200

One JSON line per finished run goes to `--out`.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import append_rows
from structure_cifar10 import resnet18

from hf_effdl import SplitLBI, find_groups, param_groups


def optimizers(model: torch.nn.Module, device: str) -> dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """Every arm's own copy of the model and its optimizer."""
    groups = find_groups(model, torch.zeros(1, 3, 32, 32))

    def arm(make) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        own = deepcopy(model).to(device)
        return own, make(own)

    return {
        "SGD": arm(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)),
        "AdamW(fused=True)": arm(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True)),
        "SplitLBI(fused=True)": arm(
            lambda m: SplitLBI(param_groups(m, groups, weight_decay=5e-4), lr=1e-3, nu=10.0, fused=True)
        ),
        "SplitLBI(fused=None)": arm(lambda m: SplitLBI(param_groups(m, groups, weight_decay=5e-4), lr=1e-3, nu=10.0)),
    }


def measure(arms, images, labels, rounds: int, autocast: bool, compiled: bool) -> dict[str, list[float]]:
    """Seconds of every whole training step, the arms taking turns in changing order."""
    device = images.device.type
    times: dict[str, list[float]] = {name: [] for name in arms}
    calls = {name: torch.compile(model) if compiled else model for name, (model, _) in arms.items()}
    for turn in range(rounds + 2):  # two to warm up
        order = list(arms)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            _, optimizer = arms[name]
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
                loss = F.cross_entropy(calls[name](images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return times


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train_overhead.jsonl"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = resnet18(options.width, 10)
    images = torch.randn(options.batch, 3, 32, 32, device=options.device)
    labels = torch.randint(10, (options.batch,), device=options.device)
    arms = optimizers(model, options.device)
    times = measure(arms, images, labels, options.rounds, options.autocast, options.compile)
    ratios = {name: [v / s for v, s in zip(values, times["SGD"], strict=True)] for name, values in times.items()}
    row = {
        "date": date.today().isoformat(),
        "device": options.device,
        "threads": options.threads,
        "torch": torch.__version__,
        "batch": options.batch,
        "width": options.width,
        "autocast": options.autocast,
        "compile": options.compile,
        "rounds": options.rounds,
        "ratio_to_sgd": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_of_minima": {name: min(values) / min(times["SGD"]) for name, values in times.items()},
        "sgd_ms": 1000 * statistics.median(times["SGD"]),
    }
    append_rows(options.out, [row])
    print(
        f"ResNet-18, width {options.width}, 32x32, batch {options.batch}, {options.device}, {options.threads} threads"
    )
    print(
        "| training step with | ratio to SGD's, median of rounds | middle half | ratio of minima |\n|---|---|---|---|"
    )
    for name, values in ratios.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(
            f"| {name} | {statistics.median(values):.3f} | {low:.3f} to {high:.3f} "
            f"| {row['ratio_of_minima'][name]:.3f} |"
        )


if __name__ == "__main__":
    main()
