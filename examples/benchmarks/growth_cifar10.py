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

"""Growing on CIFAR-10: VGG16-BN and ResNet-18 from 16 filters in every layer, beside the dense net.

The dense nets are those of `structure_cifar10.py`; arms and costs are those of `growth_arms.py`. Batches are cropped
and flipped as there; on CUDA forward passes run in bfloat16.

    python examples/benchmarks/growth_cifar10.py                       # ResNet-18, 30 epochs, 3 seeds
    python examples/benchmarks/growth_cifar10.py --net vgg16 --set growth_rounds=5 growth_until=0.3
    python examples/benchmarks/growth_cifar10.py --seeds 1 --arms dense grown "final from scratch"  # a part of it
    python examples/benchmarks/growth_cifar10.py --width 16 --seed-width 8 --classes 2 --rows 2000 --epochs 4 --seeds 1
    python examples/benchmarks/growth_cifar10.py --table --picture growth.png

Rows go to `--out` as one JSON line per finished (net, arm, seed); rows already there are skipped. The table keeps
settings apart and says what the goals come to only for 10 classes, 50,000 rows, 30 epochs and 3 seeds of the net of
width 64 from 16 filters.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from growth_arms import ARMS, Setting, paired, run, save_picture
from growth_arms import table as arms_table
from rows import read_rows
from structure_cifar10 import SETTINGS, augment, conv_bn
from structure_cifar10 import Block as EqualBlock
from tickets_cifar10 import KEYS as SHARED
from tickets_cifar10 import by_settings, config_of, device_of, load, no_claim, parser_of, said, title_of
from torch import nn


# rows that differ in one of these never share a table
KEYS = (*SHARED, "seed_width", "share", "settings")
SEED_WIDTH = 16
CONVOLUTIONS = (2, 2, 3, 3, 3)  # of VGG16, between its poolings


# ---- nets of a list of widths, with the draws of those of `structure_cifar10.py` where the widths are theirs


class Block(EqualBlock):
    """A basic block whose two convolutions need not have the same width."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        nn.Module.__init__(self)
        self.branch = nn.Sequential(*conv_bn(inputs, inner, 3, stride), nn.ReLU(), *conv_bn(inner, outputs))
        self.shortcut = nn.Sequential(*(conv_bn(inputs, outputs, 1, stride) if stride > 1 else []))


def resnet18(widths: Sequence[int], classes: int) -> nn.Sequential:
    """One width per group, in the order of `find_groups`.

    The first stage: its stream with the stem, then the inside of its two blocks; every other stage: the inside of its
    first block, its stream, the inside of its second.
    """
    stream, *rest = widths
    layers: list[nn.Module] = [*conv_bn(3, stream), nn.ReLU()]
    stages = [(rest[0], stream, rest[1]), *(rest[i : i + 3] for i in range(2, len(rest), 3))]
    for i, (first, outputs, second) in enumerate(stages):
        layers += [Block(stream, first, outputs, 2 if i else 1), Block(outputs, second, outputs, 1)]
        stream = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stream, classes))


def vgg16(widths: Sequence[int], classes: int) -> nn.Sequential:
    """One width per convolution."""
    layers: list[nn.Module] = []
    inputs, rest = 3, iter(widths)
    for convolutions in CONVOLUTIONS:
        for _ in range(convolutions):
            outputs = next(rest)
            layers += [*conv_bn(inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))


NETS = {"resnet18": resnet18, "vgg16": vgg16}
FACTORS = {
    "resnet18": [1] * 3 + [2] * 3 + [4] * 3 + [8] * 3,
    "vgg16": [f for f, n in zip((1, 2, 4, 8, 8), CONVOLUTIONS, strict=True) for _ in range(n)],
}


def dense_widths(net: str, width: int) -> list[int]:
    return [factor * width for factor in FACTORS[net]]


# ---- rows and table


def verdict(rows: list[dict]) -> list[str]:
    """What rows of equal settings support of the goals, one line each, or none of them."""
    of = {(row["arm"], row["seed"]): row for row in rows}
    arms = ("dense", "grown", "final from scratch")
    seeds = [seed for seed in sorted({seed for _, seed in of}) if all((arm, seed) in of for arm in arms)]
    if lines := no_claim(rows[0], len(seeds), "dense, grown and from-scratch arms"):
        return lines
    if rows[0]["seed_width"] != SEED_WIDTH:
        return [f"a seed of {rows[0]['seed_width']} filters supports no claim (that takes {SEED_WIDTH})"]
    cost = statistics.mean(of["grown", s]["training_macs"] / of["dense", s]["training_macs"] for s in seeds)
    beside, error, n = paired(of, "grown", "dense")
    ahead, other_error, m = paired(of, "grown", "final from scratch")
    return [
        f"grown {beside:+.2f} (SE {error:.2f}, {n} seeds) beside dense at {cost:.0%} of its training MACs; "
        f"goal, within 0.3 points at 50 %: {said(beside >= -0.3 and cost <= 0.5)}",
        f"grown {ahead:+.2f} (SE {other_error:.2f}, {m} seeds) beside its final widths from scratch; "
        f"goal, not below by more than two standard errors: {said(ahead >= -2 * other_error)}",
    ]


def table(rows: list[dict]) -> None:
    for mine in by_settings(rows, KEYS):
        first = mine[0]
        title = (
            f"{title_of(first)}; from {first['seed_width']} filters in every layer to at most {first['share']:.0%} of "
            "the dense net's MACs"
        )
        if not any(row["arm"] == "dense" for row in mine):
            print(f"\n{title}: {len(mine)} rows, none of dense to compare with")
            continue
        arms_table(mine, title)
        print("\n" + "\n".join(verdict(mine)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "growth_cifar10")
    parser.add_argument("--seed-width", type=int, default=SEED_WIDTH, help="filters of every layer to begin with")
    parser.add_argument(
        "--share", type=float, default=Setting.share, help="of the dense net's MACs that growth may reach"
    )
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of GrowingArguments, for tuning")
    parser.add_argument("--picture", type=Path, default=None, help="also draw the first seed's growth")
    options = parser.parse_args(argv)
    rows = read_rows(options.out)
    if not options.table:
        cuda = device_of(parser, options).type == "cuda"
        data, test = load(parser, options, torch.device("cpu"))  # Trainer moves every batch
        pairs = (text.split("=") for text in options.set)
        growth = {name: float(value) if "." in value else int(value) for name, value in pairs}
        config = config_of(options, len(data[0]), cuda)
        config |= {name: getattr(options, name) for name in ("seed_width", "share")}
        config["settings"] = " ".join(sorted(options.set))
        dense = dense_widths(options.net, options.width)
        setting = Setting(
            options.net,
            lambda widths: NETS[options.net](widths, options.classes),
            dense,
            [options.seed_width] * len(dense),
            data,
            test,
            options.epochs,
            options.batch,
            SETTINGS["lr"],
            SETTINGS["weight_decay"],
            augment,
            config["precision"] == "bfloat16",
            growth,
            options.share,
            config=config,
        )
        rows = run(setting, options.arms, options.seeds, options.out)
    table(rows)
    if options.picture:
        names = ("net", "width", "classes", "epochs", "batch", "seed_width", "share")
        asked = {name: getattr(options, name) for name in names}
        asked |= {"settings": " ".join(sorted(options.set))} | ({"rows": options.rows} if options.rows else {})
        mine = [row for row in rows if all(row[key] == value for key, value in asked.items())]
        steps = options.epochs * (mine[0]["rows"] // options.batch)
        save_picture(mine, options.seeds[0], options.picture, steps)


if __name__ == "__main__":
    main()
