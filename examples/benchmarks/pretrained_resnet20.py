# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "torch-pruning==1.6.1",
#     "torch>=2.9",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""A trained ResNet-20 on CIFAR-10 made smaller without a training step, at 50 and 25 % of the MACs.

The net of He et al. (arXiv 1512.03385) with shortcuts that pad, so that only the channels inside its nine blocks can
go; every block keeps the same share of them. They stay by chance, norm, activation, Fisher's score or OBS; the same
channels stand once with the next convolutions as they are and once with them refitted by least squares on training
images (`slim(..., calibration=)`). Batch norms are re-estimated on the same images in both.

    python examples/benchmarks/pretrained_resnet20.py --weights resnet20-12fca82f.th
    python examples/benchmarks/pretrained_resnet20.py --table

Weights: a state dict, also under `state_dict` and with names that begin `module.`, of the layers `conv1`, `bn1`,
`layer1` to `layer3` and `linear`. CIFAR-10 is read as in `structure_cifar10.py`. Rows go to `--out` as one JSON line
per (budget, arm, refit, rows, seed); rows already there are skipped. A seed draws the calibration images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretrained_arms import REFITS, SCORES, cell, smaller
from rows import RowFile, machine, parser_of
from structure_cifar10 import DATA, cifar10
from torch import Tensor, nn

from hf_effdl import find_groups, recalibrate_batch_norm


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # that the weights were trained with
BUDGETS = (0.5, 0.25)
BATCH = 128


class Block(nn.Module):
    """Two convolutions beside a shortcut that takes every other pixel and pads new channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.new, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new:
            half = self.new // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new - half))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """For 32x32 images; says a loss where it is given labels, as transformers models do."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        for number, (inputs, outputs, stride) in enumerate(sizes, 1):
            blocks = [Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(2))]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        logits = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return ({} if labels is None else {"loss": F.cross_entropy(logits, labels)}) | {"logits": logits}


def trained(file: Path) -> ResNet20:
    state = torch.load(file, weights_only=True, map_location="cpu")
    state = state.get("state_dict", state)
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


@dataclass(frozen=True)
class Images:
    """Batches as the model takes them."""

    calibration: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]


def batches(images: Any, labels: Any) -> list[dict[str, Tensor]]:
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    pixels = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    parts = zip(pixels.split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True)
    return [{"pixel_values": part, "labels": told} for part, told in parts]


def read(data: Path, rows: int, test: int, seed: int) -> Images:
    images, labels = cifar10("train", data)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:rows].numpy()
    held_out = cifar10("test", data)
    return Images(batches(images[chosen], labels[chosen]), batches(*(part[:test] for part in held_out)))


@torch.no_grad()
def accuracy(model: nn.Module, test: Sequence[dict[str, Tensor]]) -> float:
    right = [(model(batch["pixel_values"])["logits"].argmax(1) == batch["labels"]).double() for batch in test]
    return 100 * torch.cat(right).mean().item()


def share_for(groups: Sequence[Any], budget: float) -> tuple[float, float]:
    """The largest share of every block's channels that holds a budget of MACs, and the MACs that it leaves."""
    network = groups[0].network
    whole = network.count()["macs"]
    for share in (step / 64 for step in range(64, 0, -1)):
        sizes = {group.name: max(1, round(share * group.units)) for group in groups}
        macs = network.count(groups, sizes)["macs"] / whole
        if macs <= budget:
            return share, macs
    raise SystemExit(f"the channels inside the blocks cannot go down to {budget:.0%} of the MACs")


def run(options, seed: int, file: RowFile) -> None:
    """All rows of one seed that are missing."""
    key = {"rows": options.rows, "test": options.test, "seed": seed}
    missing = [
        (budget, score)
        for budget in options.budgets
        for score in options.arms
        if any((budget, score, refit, *key.values()) not in file for refit in REFITS)
    ]
    if not missing:
        return
    model = trained(options.weights)
    images = read(options.data, options.rows, options.test, seed)
    groups = find_groups(model, {"pixel_values": images.test[0]["pixel_values"][:1]})
    if (1.0, "whole", None, *key.values()) not in file:
        whole = {"budget": 1.0, "arm": "whole", "refit": None, "accuracy": accuracy(model, images.test)}
        file.add(key | whole | machine(), hide=("platform",))
    for budget, score in missing:
        share, macs = share_for(groups, budget)
        start = time.process_time()
        for small in smaller(model, groups, share, score, images.calibration, seed):
            recalibrate_batch_norm(small.model, [batch["pixel_values"] for batch in images.calibration])
            row = key | {"budget": budget, "arm": score, "refit": small.refit, "share": share, "macs": macs}
            row["accuracy"] = accuracy(small.model, images.test)
            if file.key_of(row) not in file:
                file.add(row | small.facts | {"seconds": round(time.process_time() - start, 1)}, hide=("ridges",))


def table(rows: list[dict]) -> None:
    """Means over seeds."""
    whole = sorted({row["accuracy"] for row in rows if row["arm"] == "whole"})
    print(f"whole net: {', '.join(f'{value:.2f}' for value in whole)} %; means ± standard error over seeds\n")
    print("| MACs | channels by | refitted | accuracy % | seeds |\n|---|---|---|---|---|")
    keys = dict.fromkeys((row["budget"], row["arm"], row["refit"]) for row in rows if row["arm"] != "whole")
    for key in sorted(keys, key=lambda key: (-key[0], SCORES.index(key[1]), key[2])):
        mine = [row for row in rows if (row["budget"], row["arm"], row["refit"]) == key]
        told = f"{mine[0]['macs']:.1%} | {key[1]} | {'yes' if key[2] else 'no'}"
        print(f"| {told} | {cell([row['accuracy'] for row in mine])} | {len(mine)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "pretrained_resnet20")
    parser.add_argument("--weights", type=Path, default=DATA / "weights" / "resnet20-12fca82f.th")
    parser.add_argument("--data", type=Path, default=DATA / "cifar10-travel")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--arms", nargs="+", choices=SCORES, default=SCORES)
    parser.add_argument("--rows", type=int, default=512, help="calibration images")
    parser.add_argument("--test", type=int, default=4000, help="test images, the first ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("budget", "arm", "refit", "rows", "test", "seed"))
    if options.table:
        return table(file.rows)
    for seed in options.seeds:
        run(options, seed, file)
    table(file.rows)


if __name__ == "__main__":
    main()
