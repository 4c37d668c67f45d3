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

"""Winning tickets on CIFAR-10: found early by `find_ticket`, beside the baselines of `ticket_arms.py`.

Nets, augmentation, schedule and precision are those of `structure_cifar10.py`: ResNet-18 or VGG16-BN, SGD at rate 0.1,
on CUDA in bfloat16. Transfer: a ticket found on the first half of the classes, trained on 1,000 rows of the second.

    python examples/benchmarks/tickets_cifar10.py                      # ResNet-18, 30 epochs, 3 seeds
    python examples/benchmarks/tickets_cifar10.py --net vgg16
    python examples/benchmarks/tickets_cifar10.py --seeds 1 --budgets 0.1 --arms "path ticket, late"  # a part of it
    python examples/benchmarks/tickets_cifar10.py --width 16 --classes 4 --rows 2000 --epochs 4 --seeds 1  # no claim
    python examples/benchmarks/tickets_cifar10.py --table

Rows go to `--out` as one JSON line per finished (net, arm, budget, seed), dense nets to `cache/` beside it; a killed
run goes on with what is not there. The table keeps settings apart and says what the goals come to only for 10 classes,
50,000 rows, 30 epochs and 3 seeds of the net of width 64.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import RowFile, read_rows
from rows import parser_of as rows_parser
from structure_cifar10 import CLASSES, DATA, EPOCHS, NETS, ROWS, SEEDS, SETTINGS, WIDTH, cifar10, cifar_task, on_device
from ticket_arms import ARMS, Data, Setting, paired, rows_of_seed, transfer_rows
from ticket_arms import table as arms_table
from trainer_rows import Classifier


# rows that differ in one of these never share a table
KEYS = ("net", "width", "classes", "rows", "epochs", "batch", "device", "precision", "torch")
BUDGETS = (0.25, 0.1)
TRANSFER_ROWS = 1000


# ---- what both CIFAR-10 scripts are told


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    parser = rows_parser(description, name)
    parser.add_argument("--net", choices=sorted(NETS), default="resnet18")
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the dense net's first layer")
    parser.add_argument("--classes", type=int, default=CLASSES, help="only the first classes")
    parser.add_argument("--rows", type=int, default=None, help="training rows of these classes (default: all)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch", type=int, default=SETTINGS["batch"])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(1, SEEDS + 1)))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 on CUDA")
    parser.add_argument("--data", type=Path, default=DATA / "cifar10-travel")
    return parser


def device_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        parser.error("--device cuda: torch sees none")
    if options.device == "cpu" and there:
        parser.error("--device cpu: Trainer would take the CUDA device that it sees; set CUDA_VISIBLE_DEVICES= too")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if there else "cpu")


def load(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> tuple[Data, Data]:
    """Training rows and the whole test set, both of the first classes."""

    def part(split: str, limit: int | None) -> Data:
        images, labels = cifar10(split, options.data)
        inside = labels < options.classes
        return on_device(images[inside][:limit], labels[inside][:limit], device)

    data = part("train", options.rows)
    if options.rows and len(data[0]) < options.rows:
        parser.error(f"--rows {options.rows}: {options.classes} classes have {len(data[0])} training rows")
    if len(data[0]) < options.batch:
        parser.error(f"{len(data[0])} training rows are less than a batch of {options.batch}")
    return data, part("test", None)


def config_of(options: argparse.Namespace, rows: int, cuda: bool) -> dict[str, Any]:
    return {
        "width": options.width,
        "classes": options.classes,
        "rows": rows,
        "epochs": options.epochs,
        "batch": options.batch,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precision": "bfloat16" if cuda and not options.float32 else "float32",
        "torch": torch.__version__,
    }


def title_of(row: dict) -> str:
    return (
        f"{row['net']}, width {row['width']}, {row['classes']} classes, {row['rows']:,} rows, {row['epochs']} epochs, "
        f"batch {row['batch']}{', ' + row['settings'] if row.get('settings') else ''}; WebP images; {row['device']}, "
        f"{row['precision']}, torch {row['torch']}"
    )


def by_settings(rows: list[dict], keys: Sequence[str]) -> list[list[dict]]:
    apart: dict[str, list[dict]] = {}
    for row in rows:
        apart.setdefault(str([row[key] for key in keys]), []).append(row)
    return [apart[key] for key in sorted(apart)]


def no_claim(row: dict, seeds: int, arms: str) -> list[str]:
    """Why rows of these settings, with so many seeds of the arms that a goal compares, support no claim, if so."""
    whole = (row["width"], row["classes"], row["rows"]) == (WIDTH, CLASSES, ROWS)
    if whole and row["epochs"] >= EPOCHS and seeds >= SEEDS:
        return []
    return [
        f"{row['classes']} classes, {row['rows']:,} rows, {row['epochs']} epochs, {seeds} seeds, supports no claim "
        f"(that takes {CLASSES} classes, {ROWS:,} rows, {EPOCHS} epochs, {SEEDS} seeds of {arms}, width {WIDTH})"
    ]


# ---- tickets


def verdict(rows: list[dict]) -> list[str]:
    """What rows of equal settings support of the goals, one line each, or none of them."""
    of = {(row["arm"], row["seed"], row["budget"]): row for row in rows if not row.get("transfer")}
    late, one_shot, small = "path ticket, late", "one-shot magnitude, init", min(BUDGETS)
    needed = [("dense", 1.0), *((arm, small) for arm in (late, "random ticket, late", one_shot))]
    seeds = [seed for seed in sorted({seed for _, seed, _ in of}) if all((a, seed, b) in of for a, b in needed)]
    if lines := no_claim(rows[0], len(seeds), "dense, path, random and one-shot arms"):
        return lines
    shares = [row["found"] for (arm, _, _), row in of.items() if arm == late]
    lines = [f"Found after at most {max(shares):.1%} of the dense epochs; goal, 20 %: {said(max(shares) <= 0.2)}"]
    for start in ("init", "late"):
        arm, other = f"path ticket, {start}", f"random ticket, {start}"
        ahead, error, n = paired(of, arm, other, small, small)
        lines.append(
            f"{small:.0%} MACs: {arm} {ahead:+.2f} (SE {error:.2f}, {n} seeds) beside {other}; "
            f"goal, ahead by two standard errors: {said(n >= SEEDS and ahead > 2 * error)}"
        )
    for budget in BUDGETS:
        both = [[row["cost"] for (a, _, b), row in of.items() if (a, b) == (arm, budget)] for arm in (late, one_shot)]
        if all(both):
            ours, other = map(statistics.mean, both)
            lines.append(
                f"{budget:.0%} MACs: training MACs {ours:.2f} of the dense net's, one-shot magnitude's "
                f"{other:.2f}; goal, not more: {said(ours <= other)}"
            )
        beside, error, n = paired(of, late, "dense", budget, 1.0)
        if n:
            lines.append(f"{budget:.0%} MACs: {late} {beside:+.2f} (SE {error:.2f}, {n} seeds) beside dense")
    return lines


def said(met: bool) -> str:
    return "met" if met else "not met"


def table(rows: list[dict]) -> None:
    for mine in by_settings(rows, KEYS):
        print(f"\n{title_of(mine[0])}")
        arms_table(mine)
        print("\n" + "\n".join(verdict(mine)))


def transferred(setting: Setting, options: argparse.Namespace, seed: int) -> list[dict]:
    """Rows of a ticket of the first half of the classes, trained on few rows of the second."""
    half = options.classes // 2
    second = setting.data[1] >= half, setting.test[1] >= half
    source = tuple(part[~second[0]] for part in setting.data)
    target = setting.data[0][second[0]][:TRANSFER_ROWS], setting.data[1][second[0]][:TRANSFER_ROWS] - half
    target_test = setting.test[0][second[1]], setting.test[1][second[1]] - half

    def build(classes: int, seed: int) -> Classifier:
        torch.manual_seed(seed)
        return Classifier(NETS[options.net](options.width, classes))

    steps = options.transfer_epochs * max(1, len(target[0]) // options.batch)
    return list(
        transfer_rows(
            replace(setting, data=source),
            seed,
            source,
            build(half, seed),
            target,
            target_test,
            lambda: build(options.classes - half, 500 + seed),
            max(BUDGETS),
            steps,
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "tickets_cifar10")
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS), help="shares of the MACs")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--transfer-epochs", type=int, default=100, help="of the few rows; 0 leaves transfer out")
    options = parser.parse_args(argv)
    if options.table:
        return table(read_rows(options.out))
    device = device_of(parser, options)
    data, test = load(parser, options, device)
    config = config_of(options, len(data[0]), device.type == "cuda")
    bf16 = config["precision"] == "bfloat16"
    task = cifar_task(device, bf16, options.width, options.classes, options.batch, len(data[0]))
    # rounds of a run this short may have no steps to say the speed of
    task = replace(task, trained=lambda steps, start, said=task.trained: said(steps, start) if steps else None)
    setting = Setting(
        options.net,
        task,
        data,
        test,
        options.epochs,
        SETTINGS["lr"],
        SETTINGS["weight_decay"],
        tuple(options.budgets),
        config | {"augment": "crop, flip"},
    )
    same = {"net": options.net, **config}
    file = RowFile(options.out, ("arm", "seed", "budget", "transfer"), {key: same[key] for key in KEYS})
    done = {(arm, seed, budget) for arm, seed, budget, transfer in file.done if not transfer}
    moved = {seed for _, seed, _, transfer in file.done if transfer}
    left_out = {
        (arm, seed, budget)
        for arm in ARMS
        if arm not in options.arms
        for seed in options.seeds
        for budget in (1.0, *options.budgets)
    }
    apart = "-".join(str(config[key]).replace(" ", "_").replace("/", "_") for key in KEYS[1:])
    cache = options.out.parent / "cache" / f"tickets_cifar10-{apart}"
    moves = options.transfer_epochs > 0
    if moves and options.classes < 4:
        print(f"left out: transfer, {options.classes} classes are not two tasks", file=sys.stderr)
        moves = False
    for seed in options.seeds:
        print(f"{options.net}, seed {seed}", file=sys.stderr, flush=True)
        for row in rows_of_seed(setting, seed, done | left_out, cache):
            file.add(row, hide=())
    for seed in options.seeds if moves else ():
        if seed in moved:
            continue
        print(f"{options.net}, transfer, seed {seed}", file=sys.stderr, flush=True)
        file.add(*transferred(setting, options, seed), hide=())
    table(file.rows)


if __name__ == "__main__":
    main()
