# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""What one optimizer step costs: SplitLBI fused and in plain operations beside torch's AdamW and SGD.

The tensors of an ImageNet ResNet-18 (11.69 M parameters), or a stack of 4096-wide linear layers (1 B, `--size 1b`, for
a GPU): group penalty on the rows of all convolutions (linear layers), l1 on the classifier, the rest not lifted. Arms
take their steps in turns; the ratio of minima to AdamW's is what is reported. The textbook arm is the four lines of
the paper per tensor, with copies, as the released code does it.

    python examples/benchmarks/optimizer_step.py                       # one thread, float32
    python examples/benchmarks/optimizer_step.py --device cuda --dtype bfloat16 --size 1b

One JSON line per finished run goes to `--out`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from rows import append_rows

from hf_effdl import SplitLBI


HYPER = {"lr": 1e-4, "nu": 10.0, "momentum": 0.9}  # a small lr: the time does not depend on it, the numbers stay tame


def resnet18() -> list[tuple[str, tuple[int, ...]]]:
    """Kind and shape of every parameter of an ImageNet ResNet-18."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def conv(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([("conv", (outputs, inputs, kernel, kernel)), ("norm", (outputs,)), ("norm", (outputs,))])

    conv(3, 64, 7)
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            conv(inputs, width, 3)
            conv(width, width, 3)
            if block == 0 and inputs != width:
                conv(inputs, width, 1)
            inputs = width
    return [*shapes, ("classifier", (1000, 512)), ("norm", (1000,))]


def linear_stack() -> list[tuple[str, tuple[int, ...]]]:
    """Sixty linear layers of width 4096, 1.0 B parameters."""
    return [("conv", (4096, 4096))] * 60 + [("classifier", (1000, 4096))]


def parameters(shapes, device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    result = []
    for _, shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.05)
        p.grad = torch.randn(shape, device=device, dtype=dtype) * 0.01
        result.append(p)
    return result


def split_lbi(shapes, params, fused: bool | None) -> SplitLBI:
    groups: list[dict] = []
    rest = []
    for i, ((kind, _), p) in enumerate(zip(shapes, params, strict=True)):
        if kind == "conv":
            groups.append({"params": [p], "penalty": "group", "name": f"layer{i}"})
        elif kind == "classifier":
            groups.append({"params": [p], "penalty": "l1", "name": "classifier"})
        else:
            rest.append(p)
    return SplitLBI([*groups, {"params": rest}], **HYPER, fused=fused)


class Textbook:
    """The four lines of the paper, tensor by tensor, with momentum; Gamma is stored and W copied, as released."""

    def __init__(self, shapes, params) -> None:
        self.kinds, self.params = [kind for kind, _ in shapes], params
        self.buffer, self.dual, self.gamma = ([torch.zeros_like(p) for p in params] for _ in range(3))

    @torch.no_grad()
    def step(self) -> None:
        lr, nu = HYPER["lr"], HYPER["nu"]
        for i, p in enumerate(self.params):
            self.buffer[i] = HYPER["momentum"] * self.buffer[i] + p.grad
            old = p.clone()
            new = old - lr * self.buffer[i]
            if self.kinds[i] != "norm":
                coupling = (old - self.gamma[i]) / nu
                new = new - lr * coupling
                self.dual[i] = dual = self.dual[i] + lr * coupling
                if self.kinds[i] == "classifier":
                    self.gamma[i] = torch.sign(dual) * torch.clamp(dual.abs() - 1, min=0)
                else:
                    norm = dual.flatten(1).norm(dim=1).view(-1, *[1] * (p.ndim - 1))
                    self.gamma[i] = torch.clamp(1 - 1 / norm, min=0) * dual
            p.copy_(new)


def arms(shapes, params) -> dict[str, Callable[[], None]]:
    """What is timed, by name; all arms move the same parameters."""
    return {
        "AdamW(fused=True)": torch.optim.AdamW(params, lr=1e-6, fused=True).step,
        "SGD(foreach=True)": torch.optim.SGD(params, lr=1e-6, momentum=0.9, foreach=True).step,
        "SplitLBI(fused=True)": split_lbi(shapes, params, True).step,
        "SplitLBI(fused=None)": split_lbi(shapes, params, None).step,
        "textbook loop": Textbook(shapes, params).step,
    }


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every step, the arms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for turn in range(rounds + 2):  # two to warm up
        order = list(steps)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:  # who went before matters
            step = steps[name]
            wait()
            start = time.perf_counter()
            step()
            wait()
            if turn > 1:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def state_bytes(shapes, device: str, dtype: torch.dtype) -> float:
    """State of SplitLBI beyond that of SGD with momentum, in tensors the size of the lifted weights (float32)."""
    params = parameters(shapes, device, dtype)
    opt = split_lbi(shapes, params, None)
    opt.step()
    lifted = [p for group in opt.param_groups if group["penalty"] for p in group["params"]]
    extra = sum(
        value.numel() * value.element_size()
        for p in params
        for name, value in opt.state[p].items()
        if name != "momentum_buffer"
    )
    return extra / sum(4 * p.numel() for p in lifted)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--size", default="resnet18", choices=("resnet18", "1b"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3, help="the whole measurement, as often")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/optimizer_step.jsonl"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    shapes = resnet18() if options.size == "resnet18" else linear_stack()
    minima: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        params = parameters(shapes, options.device, dtype)
        times = measure(arms(shapes, params), options.rounds, options.device)
        for name, values in times.items():
            minima.setdefault(name, []).append(min(values))
        del params
    ratios = {
        name: [v / a for v, a in zip(values, minima["AdamW(fused=True)"], strict=True)]
        for name, values in minima.items()
    }
    textbook = [t / f for t, f in zip(minima["textbook loop"], minima["SplitLBI(fused=True)"], strict=True)]
    small = [shape for shape in shapes if options.size == "resnet18"]
    row = {
        "date": date.today().isoformat(),
        "device": options.device,
        "dtype": options.dtype,
        "size": options.size,
        "threads": options.threads,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "minimum_ms": minima,
        "ratio_to_adamw": ratios,
        "textbook_over_fused": textbook,
    }
    if small:
        row["extra_state"] = state_bytes(shapes, options.device, dtype)
    append_rows(options.out, [row])
    count = sum(torch.Size(shape).numel() for _, shape in shapes)
    print(f"{count / 1e6:.2f} M parameters, {options.dtype}, {options.device}, {options.threads} threads")
    print("| step | ratio to AdamW(fused=True), median (range) |\n|---|---|")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")
    print(f"textbook loop / fused: {statistics.median(textbook):.1f}")
    if small:
        print(
            f"state beyond SGD with momentum: {row['extra_state']:.4f} float32 tensors the size of the lifted weights"
        )


if __name__ == "__main__":
    main()
