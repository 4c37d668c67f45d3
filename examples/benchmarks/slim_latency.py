# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""What a slim model's latency is: beside its MACs, beside a stock model of its widths, and beside what was asked.

Nets at batch 32 and 1: transformers' ResNet-18 in its stock config (7x7 stem with stride 2, pooling, basic blocks of
64, 128, 256 and 512 channels) at 32x32; not in the default run, because they take longer: the same at 224x224
(`resnet18-224`), and with the 3x3 stem without pooling that CIFAR nets have, at 32x32 (`resnet18-cifar`); LeNet
(6-16-84) at 28x28. The path is that of twelve steps on random data: only widths matter here. Stage widths are those
that one number of the config sets (`widths="stock"`); LeNet has no config, so only free ones. "x16" means
`round_to=16`.

Ratios are medians over rounds in which both models run in turns (`measure_latency`). The landing of a latency budget
is measured anew after the model was chosen, once for every seed.

    python examples/benchmarks/slim_latency.py
    python examples/benchmarks/slim_latency.py --nets resnet18-224 --arms "25% MACs, stage widths"
    python examples/benchmarks/slim_latency.py --device cuda --out runs/benchmarks/slim_latency_cuda.jsonl
    python examples/benchmarks/slim_latency.py --table

Rows go to `--out` as one JSON line per finished (net, arm, seed); rows already there are skipped.
"""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rows import RowFile, parser_of
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_effdl import SparsePath, SplitLBI, derive_path, find_groups, param_groups, slim
from hf_effdl.structure.groups.ties import config_ties
from hf_effdl.structure.slim.latency import measure_latency
from hf_effdl.structure.slim.slim import cut_copy


IMAGES = {"resnet18": (3, 32, 32), "resnet18-cifar": (3, 32, 32), "resnet18-224": (3, 224, 224), "lenet": (1, 28, 28)}
BUDGETS = (0.5, 0.25, 0.1)
# arm -> arguments of `select`
ARMS = {
    f"{share:.0%} MACs, {text}": {"macs": share, **options}
    for text, options in {
        "stage widths": {"widths": "stock"},
        "stage widths x16": {"widths": "stock", "round_to": 16},
        "free widths": {"widths": "free"},
        "free widths x16": {"widths": "free", "round_to": 16},
    }.items()
    for share in BUDGETS
} | {
    "50% latency, stage widths": {"latency": 0.5, "widths": "stock"},
    "50% latency, free widths": {"latency": 0.5, "widths": "free"},
}
BATCHES = (32, 1)
STEPS = 12


def build(net: str, widths: tuple[int, ...] | None = None) -> nn.Module:
    """A net, with its usual widths or others: those of LeNet's groups, or the config's stem and stages."""
    if net == "lenet":
        a, b, c = widths or (6, 16, 84)
        return nn.Sequential(
            nn.Conv2d(1, a, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(a, b, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(25 * b, c),
            nn.ReLU(),
            nn.Linear(c, 10),
        )
    stem, *stages = widths or (64, 64, 128, 256, 512)
    config = ResNetConfig(
        embedding_size=stem, hidden_sizes=stages, depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config)
    if net == "resnet18-cifar":
        model.resnet.embedder.embedder.convolution = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        model.resnet.embedder.pooler = nn.Identity()
    return model


def path_of(net: str, seed: int, device: str) -> tuple[nn.Module, SparsePath]:
    torch.manual_seed(seed)
    model = build(net).to(device)
    groups = find_groups(model, torch.zeros(1, *IMAGES[net], device=device))
    optimizer = SplitLBI(param_groups(model, groups), lr=0.05, **derive_path(0.05 * STEPS))
    for _ in range(STEPS):
        x, y = torch.randn(8, *IMAGES[net], device=device), torch.randint(10, (8,), device=device)
        output = model(x)
        optimizer.zero_grad()
        F.cross_entropy(output if isinstance(output, torch.Tensor) else output.logits, y).backward()
        optimizer.step()
    return model.eval(), SparsePath.from_optimizer(optimizer, groups, config_ties(model, groups))


def of_same_widths(net: str, small: nn.Module, device: str) -> nn.Module | None:
    """A new model of the widths that a slim one has; None where the class cannot build it."""
    if net == "lenet":
        return build(net, (small[0].out_channels, small[3].out_channels, small[7].out_features)).to(device).eval()
    config = small.config
    if getattr(config, "quantization_config", None) is not None and net != "resnet18-cifar":
        return None
    # the config does not say the CIFAR stem, but its widths may still be one per stage
    stages = [stage.layers[-1].layer[-1].convolution.out_channels for stage in small.resnet.encoder.stages]
    stock = build(net, (small.resnet.embedder.embedder.convolution.out_channels, *stages))
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (small, stock)]
    return stock.to(device).eval() if shapes[0] == shapes[1] else None


def one_row(net: str, arm: str, seed: int, device: str) -> dict:
    model, path = path_of(net, seed, device)
    inputs = {batch: torch.randn(batch, *IMAGES[net], device=device) for batch in BATCHES}
    looks = 0
    rounds = max(5, min(15, int(300 / measure_latency([model], inputs[32], repeats=3)[0])))

    def measure(kept):
        nonlocal looks
        looks += 1
        times = measure_latency([model, cut_copy(model, path.groups, kept)], inputs[32], repeats=rounds, seconds=0.002)
        return times[1] / times[0]

    options = ARMS[arm]
    row: dict = {"net": net, "arm": arm, "seed": seed, "device": device, "torch": torch.__version__}
    start = time.perf_counter()
    try:
        kept = path.select(**options, measure=measure)
    except ValueError as error:
        return row | {"error": str(error)}
    row |= {"seconds": time.perf_counter() - start, "looks": looks}
    small = slim(model, path.groups, kept)
    network = path.groups[0].network
    row["units"] = {name: len(index) for name, index in kept.items()}
    row["macs"] = network.count(path.groups, row["units"])["macs"] / network.count()["macs"]
    stock = of_same_widths(net, small, device)
    for batch, x in inputs.items():
        times = measure_latency([model, small], x, repeats=15)
        row[f"latency {batch}"] = times[1] / times[0]
        if stock is not None:  # apart from the whole model, after which the caches are cold for whoever comes first
            times = measure_latency([stock, small], x, repeats=15)
            row[f"beside stock {batch}"] = times[1] / times[0]
    if "latency" in options:
        row["landing"] = row["latency 32"] / options["latency"]
    return row


def table(rows: list[dict]) -> None:
    for net in dict.fromkeys(row["net"] for row in rows):
        print(f"\n{net}: medians over seeds; in brackets the worst seed")
        print(
            "| arm | seeds | MACs | latency, 32 | latency / MACs, 32 | beside stock, 32 | latency, 1 | "
            "latency / MACs, 1 | beside stock, 1 | landing, 32 |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for arm in ARMS:
            mine = [row for row in rows if (row["net"], row["arm"]) == (net, arm)]
            done = [row for row in mine if "error" not in row]
            if not done:
                if mine:
                    print(f"| {arm} | {len(mine)} | {mine[0]['error'].partition(' (')[0]} |")
                continue

            def cell(values: list[float], worst=max) -> str:
                return f"{statistics.median(values):.2f} ({worst(values):.2f})" if values else ""

            cells = [cell([row["macs"] for row in done])]
            for batch in BATCHES:
                cells += [
                    cell([row[f"latency {batch}"] for row in done]),
                    cell([row[f"latency {batch}"] / row["macs"] for row in done]),
                    cell([row[key] for row in done if (key := f"beside stock {batch}") in row]),
                ]
            landed = [row["landing"] for row in done if "landing" in row]
            cells.append(cell(landed, lambda values: max(values, key=lambda value: abs(value - 1))))
            print(f"| {arm} | {len(done)} | {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "slim_latency")
    parser.add_argument("--nets", nargs="*", choices=sorted(IMAGES), default=["resnet18", "lenet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=None, help="only these arms")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("net", "arm", "seed"))
    if options.table:
        return table(file.rows)
    for seed in range(1, options.seeds + 1):
        for net in options.nets:
            for arm in options.arms or [arm for arm in ARMS if net != "lenet" or "free" in arm]:
                if (net, arm, seed) not in file:
                    file.add(one_row(net, arm, seed, options.device), hide=("units",))
    table(file.rows)


if __name__ == "__main__":
    main()
