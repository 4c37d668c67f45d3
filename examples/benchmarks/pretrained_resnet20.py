# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""A trained ResNet-20 on CIFAR-10 made smaller, at 50 and 25 % of the MACs, without a training step or with some.

The net of He et al. (arXiv 1512.03385) with shortcuts that pad, so that only the channels inside its nine blocks can
go; every block keeps the same share of them. They stay by chance, norm, activation, Fisher's score or OBS; the same
channels stand once with the next convolutions as they are and once with them refitted by least squares on training
images (`slim(..., calibration=)`). Batch norms are re-estimated on the same images in both.

With `--epochs` every arm first trains the whole net for `--before` epochs on all 50,000 images: plainly (AdamW, rate
warmed up and falling to zero), or so that units are pressed out, by a group lasso or along a path
(`pretrained_training.py`). Then it is cut, refitted, its batch norms are re-estimated, and the smaller net trains for
so many epochs more at half the rate. Images are cropped and flipped, 128 a step; products are in bfloat16.

    python examples/benchmarks/pretrained_resnet20.py --weights resnet20-12fca82f.th
    python examples/benchmarks/pretrained_resnet20.py --epochs 0 2 6     # about half an hour a seed on one core
    python examples/benchmarks/pretrained_resnet20.py --table

Weights: a state dict, also under `state_dict` and with names that begin `module.`, of the layers `conv1`, `bn1`,
`layer1` to `layer3` and `linear`. CIFAR-10 is read as in `structure_cifar10.py`. A seed draws the calibration images
and the order of training. Rows go to `--out` as one JSON line per (budget, arm, refit, rows, before, epochs, seed);
rows already there are skipped.
"""

import os
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretrained_arms import REFITS, SCORES, cell, smaller
from pretrained_training import WAYS, Plain, train
from rows import RowFile, machine, mean_and_error, parser_of
from structure_cifar10 import DATA, augment, cifar10
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_effdl import find_groups, recalibrate_batch_norm


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # that the weights were trained with
BUDGETS = (0.5, 0.25)
BATCH = 128
ARMS = (*SCORES, *WAYS)
BEFORE, RATE = 2, 3e-3  # epochs of the whole net, and their rate (the best of 3e-4, 1e-3, 3e-3 on seed 100)
KEYS = ("budget", "arm", "refit", "rows", "test", "before", "epochs", "seed")


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

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        logits = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


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


class Training:
    """Training images, cropped and flipped anew in every batch."""

    def __init__(self, images: Any, labels: Any, seed: int) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.rng = torch.Generator().manual_seed(seed)

    def batch(self, places: Tensor) -> dict[str, Tensor]:
        pixels = augment(normalised(self.images[places]), self.rng)
        return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last), "labels": self.labels[places]}


def normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def batches(images: Any, labels: Any) -> list[dict[str, Tensor]]:
    pixels = normalised(torch.from_numpy(images))
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


def untrained(options, seed: int, file: RowFile) -> None:
    """All rows without a training step of one seed that are missing."""
    key = {"rows": options.rows, "test": options.test, "seed": seed}
    arms = [arm for arm in options.arms if arm in SCORES]
    missing = [
        (budget, score)
        for budget in options.budgets
        for score in arms
        if any(file.key_of(key | {"budget": budget, "arm": score, "refit": refit}) not in file for refit in REFITS)
    ]
    if not missing:
        return
    model = trained(options.weights)
    images = read(options.data, options.rows, options.test, seed)
    groups = find_groups(model, {"pixel_values": images.test[0]["pixel_values"][:1]})
    whole = key | {"budget": 1.0, "arm": "whole", "refit": None}
    if file.key_of(whole) not in file:
        file.add(whole | {"accuracy": accuracy(model, images.test)} | machine(), hide=("platform",))
    for budget, score in missing:
        share, macs = share_for(groups, budget)
        start = time.process_time()
        for small in smaller(model, groups, share, score, images.calibration, seed):
            recalibrate_batch_norm(small.model, [batch["pixel_values"] for batch in images.calibration])
            row = key | {"budget": budget, "arm": score, "refit": small.refit, "share": share, "macs": macs}
            row["accuracy"] = accuracy(small.model, images.test)
            if file.key_of(row) not in file:
                file.add(row | small.facts | {"seconds": round(time.process_time() - start, 1)}, hide=("ridges",))


# ---- with training


class Run:
    """What all arms of a seed share."""

    def __init__(self, options, seed: int) -> None:
        self.options, self.seed = options, seed
        self.images = read(options.data, options.rows, options.test, seed)
        self.all = tuple(part[: options.train] for part in cifar10("train", options.data))
        model = trained(options.weights)
        self.groups = find_groups(model, {"pixel_values": self.images.test[0]["pixel_values"][:1]})

    def fit(self, model: nn.Module, epochs: int, rate: float, seed: int, way: Plain | None = None) -> nn.Module:
        """Train in place."""
        places = torch.arange(len(self.all[1]))
        options = {"way": way, "size": BATCH, "precision": torch.bfloat16}
        train(model, Training(*self.all, seed), places, epochs, (rate, rate), seed, **options)
        return model.eval()

    def before(self, arm: str) -> tuple[nn.Module, str | dict[str, Tensor]]:
        """The whole net when it is cut, and by what units stay; trained once, then read."""
        name = arm if arm in WAYS else "plain"
        file = self.options.work / f"{name.replace(', ', '-')}-{self.options.before}-{self.seed}.pt"
        model = trained(self.options.weights)
        if not file.is_file():
            kind, settings = WAYS.get(arm, (Plain, {}))
            way = kind(self.groups, self.images.calibration, **settings)
            self.fit(model, self.options.before, self.options.rate, self.seed, way)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state": model.state_dict(), "scores": way.scores()}, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        found = torch.load(file, weights_only=True)
        model.load_state_dict(found["state"])
        return model.eval(), found["scores"] if arm in WAYS else arm

    def rows(self, budget: float, arm: str, epochs: Sequence[int]) -> list[dict]:
        """One of each number of epochs after the cut."""
        (share, macs), (model, score) = share_for(self.groups, budget), self.before(arm)
        *_, small = smaller(model, self.groups, share, score, self.images.calibration, self.seed)
        recalibrate_batch_norm(small.model, [batch["pixel_values"] for batch in self.images.calibration])
        found = {"share": share, "macs": macs, "before the cut": accuracy(model, self.images.test)}
        rows = []
        for count in epochs:
            start, one = time.process_time(), deepcopy(small.model)
            if count:
                self.fit(one, count, self.options.rate / 2, 100 + self.seed)
            seconds = round(time.process_time() - start, 1)
            rows.append({"epochs": count, "accuracy": accuracy(one, self.images.test), "seconds": seconds} | found)
        return rows


def with_training(options, seed: int, file: RowFile) -> None:
    """All rows with training of one seed that are missing."""
    run, key = None, {"rows": options.rows, "test": options.test, "before": options.before, "seed": seed}
    for arm in options.arms:
        for budget in options.budgets:
            row = key | {"budget": budget, "arm": arm, "refit": True}
            left = [count for count in options.epochs if file.key_of(row | {"epochs": count}) not in file]
            if left:
                run = run or Run(options, seed)
                for found in run.rows(budget, arm, left):
                    file.add(row | found | machine(), hide=("platform",))


def table_of_training(rows: list[dict]) -> None:
    """Means over seeds, and how far the path is ahead of each arm, paired by seed."""
    counts, before = sorted({row["epochs"] for row in rows}), sorted({row["before"] for row in rows})
    print(
        f"\nafter {before} epochs of the whole net, and so many more of the smaller one: accuracy % (`path` ahead)\n"
    )
    print(f"| MACs | channels by | {' | '.join(map(str, counts))} | seeds |\n|---|---{'|---' * len(counts)}|---|")
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        for arm in ARMS:
            mine = [row for row in rows if (row["budget"], row["arm"]) == (budget, arm)]
            cells = []
            for count in counts:
                of = {a: accuracies(rows, budget, a, count) for a in (arm, "path")}
                ahead = [of["path"][seed] - value for seed, value in of[arm].items() if seed in of["path"]]
                gap = " ({:+.2f} ± {:.2f})".format(*mean_and_error(ahead)) if len(ahead) > 1 and arm != "path" else ""
                cells.append(cell(list(of[arm].values())) + gap)
            if mine:
                seeds = len({row["seed"] for row in mine})
                print(f"| {mine[0]['macs']:.1%} | {arm} | {' | '.join(cells)} | {seeds} |")


def accuracies(rows: list[dict], budget: float, arm: str, epochs: int) -> dict[int, float]:
    """By seed."""
    wanted = (budget, arm, epochs)
    return {row["seed"]: row["accuracy"] for row in rows if (row["budget"], row["arm"], row["epochs"]) == wanted}


def table(rows: list[dict]) -> None:
    """Means over seeds."""
    later, rows = ([row for row in rows if ("epochs" in row) is there] for there in (True, False))
    if rows:
        table_without(rows)
    if later:
        table_of_training(later)


def table_without(rows: list[dict]) -> None:
    """Of the nets that were cut as they are."""
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
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rows", type=int, default=512, help="calibration images")
    parser.add_argument("--epochs", type=int, nargs="+", default=None, help="of the smaller net; default: no training")
    parser.add_argument("--before", type=int, default=BEFORE, help="epochs of the whole net before it is cut")
    parser.add_argument("--rate", type=float, default=RATE, help="of those epochs; half of it afterwards")
    parser.add_argument("--train", type=int, default=50_000, help="training images, the first ones")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/resnet20"), help="where nets are kept before they are cut"
    )
    parser.add_argument("--test", type=int, default=4000, help="test images, the first ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, KEYS)
    if options.table:
        return table(file.rows)
    for seed in options.seeds:
        (untrained if options.epochs is None else with_training)(options, seed, file)
    table(file.rows)


if __name__ == "__main__":
    main()
