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

"""Which channels to keep on CIFAR-10: the path beside the baselines, at equal epochs and equal MACs.

ResNet-18 for 32x32 images (11.2 M parameters, 0.56 GMACs) or VGG16-BN with one linear layer on top (14.7 M, 0.31 G).
Arms, budgets and fairness are those of `structure_mnist.py`, whose loop runs here: each arm trains once (SGD lr 0.1,
constant for 60 %, then linear to 0, weight decay 5e-4), removes channels physically down to 50, 25 and 10 % of the
MACs, re-estimates batch norm on training images and fine-tunes; early arms stop where the rate would fall and give
the rest to the small net. Images stay on the device as tensors; each batch is cropped (padding 4, the mean colour) and
flipped there. On CUDA forward passes run in bfloat16, channels last; on the CPU in float32.

    python examples/benchmarks/structure_cifar10.py                    # ResNet-18, 30 + 10 epochs, 3 seeds, all arms
    python examples/benchmarks/structure_cifar10.py --net vgg16
    python examples/benchmarks/structure_cifar10.py --plan 2.5         # what fits, at 2.5 s per epoch; runs nothing
    python examples/benchmarks/structure_cifar10.py --width 16 --classes 2 --rows 2000 --epochs 6 --tune 3 --seeds 1 \\
        --set batch=32 lasso=0.004                                     # a laptop, in minutes; supports no claim
    python examples/benchmarks/structure_cifar10.py --table

Every training prints its seconds per epoch to stderr. Rows go to `--out` as one JSON line per finished (net, arm,
seed), nets that several arms share to `--cache`; a killed run goes on with what is not there. The table keeps settings
apart and names a winner only for 10 classes, 50,000 rows, 30 epochs and 3 seeds of the whole net.

CIFAR-10 is read from `--data`: `data_batch_1.webp` to `data_batch_5.webp` and `test_batch.webp`, each a mosaic of
32x32 tiles, row by row in the official order, and `labels_filenames.tsv.gz`, one line per image that starts with its
label. At WebP quality 98 the pictures are near-lossless; results on them say so.
"""

import argparse
import gzip
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rows import RowFile, parser_of, read_rows
from structure_mnist import ARMS, BUDGETS, DATA, EARLY, OURS, Task, arms_table, one_row, paired
from torch import Tensor, nn


PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4
# how wrong labels are told in names and in the file of CIFAR-10N
NOISE = {"worse": "worse_label", "random1": "random_label1", "aggregate": "aggre_label", "clean": "clean_label"}
# lasso: the penalty of the whole net is about that of the MNIST net; neither it nor group_norm was tuned on CIFAR-10,
# `--validate` and `--set` are there to do it
SETTINGS = {"weight_decay": 5e-4, "lr": 0.1, "batch": 128, "lasso": 1e-3, "group_norm": 1e-4}
# what runs first: the arms that a first answer needs, then those that share one net, then the others
STAGES = (
    (OURS, "group lasso, same unit, early", "global L2, early"),
    ("scratch, widths of path", "random", "global L2", "BN weight"),
    ("path, late", "ridge only", "paper preset", "group lasso, same unit", "Torch-Pruning GroupNorm"),
)
# rows that differ in one of these never share a table
KEYS = ("net", "width", "classes", "rows", "epochs", "tune", "settings", "held_out", "device", "precision")
WIDTH, CLASSES, ROWS, EPOCHS, SEEDS = 64, 10, 50_000, 30, 3  # what a claim needs
SMALL = 0.7  # seconds of an epoch of a small net over those of the whole one; a guess for a GPU


# ---- data


def cifar10(split: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 32, 32, 3) and labels int64 (n,), in the order of the files."""
    files = {part: folder / f"{part}.webp" for parts in PARTS.values() for part in parts}
    missing = [file.name for file in [*files.values(), folder / "labels_filenames.tsv.gz"] if not file.is_file()]
    if missing:
        raise SystemExit(f"no CIFAR-10 in {folder}: {', '.join(missing)} missing; pass --data or set HF_EFFDL_DATA")
    labels = [int(line.split("\t")[0]) for line in gzip.open(folder / "labels_filenames.tsv.gz", "rt") if line.strip()]
    images, chosen, start = [], [], 0
    for part, file in files.items():
        with Image.open(file) as mosaic:
            columns, lines = mosaic.width // 32, mosaic.height // 32
            if part in PARTS[split]:
                tiles = np.array(mosaic.convert("RGB")).reshape(lines, 32, columns, 32, 3).swapaxes(1, 2)
                images.append(tiles.reshape(-1, 32, 32, 3))
                chosen += labels[start : start + lines * columns]
        start += lines * columns
    if start != len(labels):
        raise SystemExit(f"{folder} has {start} images and {len(labels)} labels; are all files of one copy?")
    return np.concatenate(images), np.array(chosen, np.int64)


def people(folder: Path, rows: int) -> dict[str, Tensor]:
    """CIFAR-10N: the sets of labels that people gave to the first training images."""
    arrays = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Int64DType]
    old = (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")  # the name that the file knows
    with torch.serialization.safe_globals([*arrays, old]):
        found = torch.load(folder / "CIFAR-10_human.pt", weights_only=True)
    return {name: torch.from_numpy(found[column])[:rows] for name, column in NOISE.items()}


def on_device(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalised float32 (n, 3, 32, 32), channels last in memory, and labels, both on the device."""
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    pixels = torch.from_numpy(images).to(device).float().div_(255).sub_(mean).div_(std)
    return pixels.permute(0, 3, 1, 2), torch.from_numpy(labels).to(device)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of the padded image and a mirror image half of the time, drawn for every row of a batch."""
    n, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * PADDING + 1, (2, n, 1), generator=generator, device=device)
    mirrored = torch.rand((n, 1), generator=generator, device=device) < 0.5
    lines, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    lines, columns = top + lines, left + torch.where(mirrored, width - 1 - columns, columns)
    padded = F.pad(images, [PADDING] * 4).permute(0, 2, 3, 1)
    rows = torch.arange(n, device=device)[:, None, None]
    return padded[rows, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# ---- nets, with torch's default initialisation


def conv_bn(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """The basic block of He et al., arXiv 1512.03385, with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *conv_bn(outputs, outputs))
        self.shortcut = nn.Sequential(*(conv_bn(inputs, outputs, 1, stride) if stride > 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def resnet18(width: int, classes: int) -> nn.Sequential:
    """For 32x32 images: a 3x3 stem and no max pooling."""
    layers = [*conv_bn(3, width), nn.ReLU()]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def vgg16(width: int, classes: int) -> nn.Sequential:
    """The 13 convolutions of Simonyan and Zisserman, arXiv 1409.1556, with batch norm, and one linear layer."""
    layers, inputs = [], 3
    for factor, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(convolutions):
            layers += [*conv_bn(inputs, factor * width), nn.ReLU()]
            inputs = factor * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))


NETS = {"resnet18": resnet18, "vgg16": vgg16}


def cifar_task(device: torch.device, bf16: bool, width: int, classes: int, batch: int, rows: int) -> Task:
    """The loop of `structure_mnist.py` with these nets, augmentation, and forward passes in bfloat16 if asked."""

    def place(model: nn.Module) -> nn.Module:
        return model.to(device, memory_format=torch.channels_last)

    def trained(steps: int, start: float) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        epoch = seconds * (rows // batch) / steps
        print(f"  {steps} steps in {seconds:.1f} s, {epoch:.2f} s per epoch", file=sys.stderr, flush=True)

    return Task(
        build=lambda net: NETS[net](width, classes),
        batch=batch,
        place=place,
        augment=augment,
        trained=trained,
        precision=partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext,
    )


# ---- rows and table


def of_seeds(rows: list[dict]) -> tuple[dict, list[int]]:
    of = {(row["arm"], row["seed"]): row for row in rows}
    return of, sorted(seed for arm, seed in of if arm == OURS)


def verdict(rows: list[dict]) -> list[str]:
    """What rows of equal settings support: a comparison with the best other arm that selects from one run, or none."""
    of, seeds = of_seeds(rows)
    first = rows[0]
    rivals = [
        arm
        for stage in STAGES
        for arm in stage
        if arm != OURS and not arm.startswith("scratch") and sum((arm, seed) in of for seed in seeds) >= SEEDS
    ]
    whole = (first["width"], first["classes"], first["rows"], first["held_out"]) == (WIDTH, CLASSES, ROWS, 0)
    if not whole or first["epochs"] < EPOCHS or not rivals:
        size = f"{first['classes']} classes, {first['rows']:,} rows, {first['epochs']} epochs"
        return [
            f"{size}, {len(seeds)} seeds, supports no claim (that takes {CLASSES} classes, {ROWS:,} rows, {EPOCHS} "
            f"epochs, {SEEDS} seeds of two arms, width {WIDTH}, the test set)"
        ]
    lines, met = [], 0
    for budget in BUDGETS:

        def after(arm: str) -> float:
            return -paired(of, arm, seeds, str(budget))[0]  # noqa: B023

        best = max(rivals, key=after)
        difference, error = paired(of, best, seeds, str(budget))
        met += difference >= -2 * error
        lines.append(f"{budget:.0%} MACs: {OURS} {difference:+.2f} (SE {error:.2f}) beside the best other, {best}")
    missing = [arm for stage in STAGES for arm in stage if arm not in (OURS, *rivals) and arm[:7] != "scratch"]
    return [
        *lines,
        f"Goal, within two standard errors of the best arm that selects from one run: met in {met} of {len(BUDGETS)} "
        f"cells, {len(seeds)} seeds" + (f"; not among the arms: {', '.join(missing)}" if missing else ""),
    ]


def table(rows: list[dict]) -> None:
    tables: dict[tuple, list[dict]] = {}
    for row in rows:
        tables.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    for key, mine in sorted(tables.items(), key=lambda item: str(item[0])):
        net, width, classes, count, epochs, tune, settings, held_out, device, precision = key
        versions = ", ".join(sorted({row["torch"] for row in mine}))
        title = (
            f"{net}, width {width}, {classes} classes, {count:,} rows, {epochs} + {tune} epochs"
            f"{', ' + settings if settings else ''}{f', tested on {held_out:,} held-out rows' if held_out else ''}; "
            f"WebP images; {device}, {precision}, torch {versions}"
        )
        if not of_seeds(mine)[1]:
            print(f"\n{title}: {len(mine)} rows, none of {OURS} to compare with")
            continue
        arms_table(title, mine, (epochs, tune))
        print("\n" + "\n".join(verdict(mine)))


# ---- plan


def cost(arms: Sequence[str], epochs: int, tune: int, cached: set[str]) -> tuple[float, float]:
    """Epochs of the whole net and of small ones for one seed; the nets in `cached` are there, and more join them."""
    whole = small = 0.0
    for arm in arms:
        how = ARMS[arm][0]
        share = EARLY if how.endswith(" early") else 1.0
        whole += 0.0 if how in cached else share * epochs
        cached.add(how)
        small += len(BUDGETS) * (tune + (epochs if arm.startswith("scratch") else (1 - share) * epochs))
    return whole, small


def print_plan(parser: argparse.ArgumentParser, options: argparse.Namespace, minutes: float = 9.5) -> None:
    """Commands that each end inside ten minutes; what a killed one had not finished, the next one does."""
    seconds, cached = options.plan, set()
    print(f"# {seconds:g} s per epoch of the whole net; {SMALL * seconds:.1f} s of a small one, a guess")
    names = ("net", "width", "classes", "rows", "epochs", "tune", "seeds", "device", "data", "out", "cache")
    values = {name: getattr(options, name) for name in names}
    given = [f"--{name} {value}" for name, value in values.items() if value != parser.get_default(name)]
    given += ["--float32"] * options.float32 + [f"--set {' '.join(options.set)}"] * bool(options.set)
    for stage in STAGES:
        arms = [arm for arm in stage if arm in options.arms]
        if not arms:
            continue
        whole, small = cost(arms, options.epochs, options.tune, cached)
        total = options.seeds * seconds * (whole + SMALL * small) / 60
        command = ["python", sys.argv[0], *given, "--arms", *(f'"{arm}"' for arm in arms)]
        print(
            f"# {options.seeds} x ({whole:.0f} + {small:.0f} small) epochs: {total:.0f} minutes, "
            f"{math.ceil(total / minutes)} times"
        )
        print(f"timeout {60 * minutes:.0f} {' '.join(command)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "structure_cifar10")
    parser.add_argument("--net", choices=sorted(NETS), default="resnet18")
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the first layer")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--arms", nargs="*", default=[arm for stage in STAGES for arm in stage], metavar="ARM")
    parser.add_argument("--classes", type=int, default=CLASSES, help="only the first classes")
    parser.add_argument("--rows", type=int, default=None, help="training rows of these classes (default: all)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--tune", type=int, default=10, help="epochs of fine-tuning")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 on CUDA")
    parser.add_argument("--data", type=Path, default=DATA / "cifar10-travel")
    parser.add_argument("--cache", type=Path, default=None, help="trained nets (default: cache/ beside --out)")
    parser.add_argument("--plan", type=float, nargs="?", const=4.0, metavar="SECONDS", help="only print commands")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help=f"change one of {SETTINGS}")
    parser.add_argument("--validate", action="store_true", help="hold out a tenth of the rows, not the test set")
    options = parser.parse_args(argv)
    unknown = [arm for arm in options.arms if arm not in ARMS]
    if unknown:
        parser.error(f"no arms {unknown}; there are {list(ARMS)}")
    changed = dict(text.partition("=")[::2] for text in options.set)
    if not changed.keys() <= SETTINGS.keys():
        parser.error(f"--set {' '.join(options.set)}: the settings are {list(SETTINGS)}")
    if options.table:
        return table(read_rows(options.out))
    if options.plan is not None:
        return print_plan(parser, options)
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.benchmark = True
    settings = SETTINGS | {name: float(value) for name, value in changed.items()}
    settings |= {"epochs": options.epochs, "tune": options.tune}

    def load(split: str) -> tuple[Tensor, Tensor]:
        images, labels = cifar10(split, options.data)
        inside = labels < options.classes
        limit = options.rows if split == "train" else None
        return on_device(images[inside][:limit], labels[inside][:limit], device)

    data = load("train")
    if options.rows and len(data[0]) < options.rows:
        parser.error(f"--rows {options.rows}: {options.classes} classes have {len(data[0])} training rows")
    held_out = len(data[0]) // 10 if options.validate else 0
    test = tuple(part[len(part) - held_out :] for part in data) if held_out else load("test")
    data = tuple(part[: len(part) - held_out] for part in data)
    bf16 = cuda and not options.float32
    config = {
        "net": options.net,
        "width": options.width,
        "classes": options.classes,
        "rows": len(data[0]),
        "epochs": options.epochs,
        "tune": options.tune,
        "settings": " ".join(sorted(options.set)),
        "held_out": held_out,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precision": "bfloat16" if bf16 else "float32",
        "torch": torch.__version__,
    }
    if len(data[0]) < settings["batch"]:
        parser.error(f"{len(data[0])} training rows are less than a batch of {settings['batch']}")
    task = cifar_task(device, bf16, options.width, options.classes, int(settings["batch"]), len(data[0]))
    # the files in it are named by net, arm, epochs, rows and seed
    apart = ("width", "classes", "held_out", "settings", "device", "precision")
    cache = (options.cache or options.out.parent / "cache") / "-".join(
        str(config[key]).replace(" ", "_").replace("/", "_") or "default" for key in apart
    )
    file = RowFile(options.out, (*KEYS, "arm", "seed"))
    others = tuple(arm for arm in ARMS if not any(arm in stage for stage in STAGES))
    # seeds inside stages: a run cut short has whole comparisons
    jobs = [(arm, seed) for stage in (*STAGES, others) for seed in range(1, options.seeds + 1) for arm in stage]
    for arm, seed in jobs:
        if arm not in options.arms or (*(config[key] for key in KEYS), arm, seed) in file:
            continue
        print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        row = config | one_row(options.net, arm, seed, data, test, settings, cache, task)
        row["wall"] = time.perf_counter() - start
        file.add(row)
    table(file.rows)


if __name__ == "__main__":
    main()
