# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "scikit-learn>=1.6",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""When a search says that its selection has settled: how early, and whether it was right.

Small nets on four tasks travel their whole path in the first fifth of a run, as `find_ticket` has them do, and are
looked at every two-hundredth of the run. A row keeps the selection of every look, so that the table can ask any rule
where it would have stopped, also one that looks less often. A rule is wrong where it says "settled" before the path's
end and the selection of that look differs from the one at the end in more than `THRESHOLD` of the units; it is silent
where it never says so. Rules: what `find_ticket` does, and the one before it, three selections no two of which differ
in more than that, at two looks in a row.

    python examples/benchmarks/tickets_settling.py --task digits
    python examples/benchmarks/tickets_settling.py --table

Rows go to `--out` as one JSON line per finished (task, budget, seed); rows already there are skipped.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from rows import RowFile, machine, parser_of, read_rows
from structure_cifar10 import DATA, cifar10
from structure_mnist import BATCH, build, mnist, rates, train
from torch import Tensor, nn
from trainer_rows import Classifier

from hf_effdl import SplitLBI, derive_path, find_groups
from hf_effdl.structure.path.settling import Settling, pack, unpack
from hf_effdl.structure.training.settled import SettledCallback


WITHIN, LOOKS = 0.2, 200  # the path's share of the run, and how often a run is looked at
EVERY = (4, 2, 1)  # what the table takes of the looks; the first is what `find_ticket` looks at
BUDGETS = (None, 0.5, 0.25, 0.1)  # of the MACs; None: the support
THRESHOLD = SettledCallback.DEFAULTS["threshold"]
KEYS = ("task", "budget", "seed")


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[:1500], torch.tensor(labels)[:1500]


def mnist_of(net: str) -> tuple[Tensor, Tensor]:
    return tuple(part[:10_000] for part in mnist("train", net))


def cifar10_small() -> tuple[Tensor, Tensor]:
    """10,000 images shrunk to 16x16."""
    images, labels = (torch.from_numpy(part[:10_000]) for part in cifar10("train", DATA / "cifar10-travel"))
    return F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255 - 0.5, 2), labels.long()


def colour_net() -> nn.Sequential:
    net = build("bn14")
    net[0] = nn.Conv2d(3, 16, 3, 2, 1)
    return net


@dataclass
class Task:
    """Data, net and schedule of a run."""

    data: Callable[[], tuple[Tensor, Tensor]]
    net: Callable[[], nn.Sequential]
    epochs: int
    lr: float
    weight_decay: float = 5e-4
    schedule: str = "bn14"


TASKS = {
    "digits": Task(digits, partial(build, "bn14"), 40, 0.1),
    "MNIST": Task(partial(mnist_of, "bn14"), partial(build, "bn14"), 11, 0.1),
    "MNIST, LeNet": Task(partial(mnist_of, "lenet"), partial(build, "lenet"), 14, 0.05, 0.0, "lenet"),
    "CIFAR-10": Task(cifar10_small, colour_net, 11, 0.1),
}


def looks_of(task: Task, seed: int) -> list[dict[str, Any]]:
    """One row per look: step, path time, and the selection by budget."""
    data = task.data()
    steps = task.epochs * (len(data[0]) // BATCH)
    lrs = rates(task.schedule, steps, task.lr)[: int(WITHIN * steps)]
    torch.manual_seed(seed)
    model = Classifier(task.net())
    groups = find_groups(model, {"pixel_values": data[0][:1]})
    lifted = [{**group.param_group(), "weight_decay": task.weight_decay} for group in groups if group.lifted]
    owned = {name for group in groups for name in group.lifted}
    rest = [(p, p.ndim > 1) for name, p in model.named_parameters() if name not in owned]
    others = [
        {"params": [p for p, decays in rest if decays == flag], "weight_decay": task.weight_decay * flag}
        for flag in (True, False)
    ]
    optimizer = SplitLBI(lifted + [group for group in others if group["params"]], lr=0.1, **derive_path(sum(lrs)))
    callbacks = {budget: SettledCallback(groups, macs=budget) for budget in BUDGETS}
    every, travelled, found = max(1, round(steps / LOOKS)), [], []

    def look(lr: float) -> None:
        travelled.append(lr)
        if len(travelled) % every == 0 or len(travelled) == len(lrs):
            selections = {budget: pack(callback.select(optimizer)) for budget, callback in callbacks.items()}
            found.append({"step": len(travelled), "path": sum(travelled) / sum(lrs), "selections": selections})

    train(model.net, optimizer, lrs, data, seed, after_step=look)
    return found


# ---- what rules say


@dataclass
class Said:
    """Where a rule stopped a search: path time, and how far the selection there was from the last one."""

    path: float | None
    far: float = 0.0

    @property
    def early(self) -> bool:
        return self.path is not None and self.path < 0.985  # the last look may lie a step before the end


Look = tuple[float, str]  # path time, packed selection


def forecast(looks: Sequence[Look]) -> int | None:
    """The look at which `find_ticket` stops."""
    names = ("threshold", "window", "patience", "min_path")
    settling = Settling(*(SettledCallback.DEFAULTS[name] for name in names))
    return next((k for k, (path, selection) in enumerate(looks) if settling.note(k, path, selection)), None)


def three_in_a_row(looks: Sequence[Look]) -> int | None:
    """The look at which the rule before stopped."""
    masks = [unpack(selection) for _, selection in looks]

    def alike(k: int) -> bool:
        last = masks[k - 2 : k + 1]
        return all(a.any() and b.any() and (a != b).mean() < THRESHOLD for a, b in combinations(last, 2))

    return next((k for k in range(3, len(looks)) if looks[k][0] >= 0.4 and alike(k) and alike(k - 1)), None)


RULES = {"forecast": forecast, "three in a row": three_in_a_row}


def said(rule: Callable[[Sequence[Look]], int | None], row: dict, every: int) -> Said:
    looks = [(path, selection) for _, path, selection in row["looks"]]
    last = looks[-1]
    looks = looks[every - 1 :: every]
    looks += [last] if looks[-1] != last else []
    found = rule(looks)
    if found is None:
        return Said(None)
    path, selection = looks[found]
    return Said(path, float((unpack(selection) != unpack(last[1])).mean()))


def table(rows: list[dict]) -> None:
    seeds = sorted({row["seed"] for row in rows})
    print(
        f"{len(rows)} searches, seeds {seeds}, budgets {', '.join(map(str, BUDGETS))} of the MACs (None: the support)"
    )
    print("\n| task | looks | rule | early | of those wrong | furthest | mean path time | never |")
    print("|---|---|---|---|---|---|---|---|")
    names = list(dict.fromkeys(row["task"] for row in rows))
    for task in [*names, "all"]:
        here = [row for row in rows if task in (row["task"], "all")]
        for every in EVERY if task == "all" else EVERY[:1]:
            for name, rule in RULES.items():
                cells = summary([said(rule, row, every) for row in here])
                print(f"| {task} | 1/{LOOKS // every} | {name} | {' | '.join(cells)} |")
    times = {task: statistics.mean(stays(row) for row in rows if row["task"] == task) for task in names}
    print(f"\nThe selection stays within {THRESHOLD:.0%} of that at the end from this path time on (mean):")
    print("; ".join(f"{task} {time:.2f}" for task, time in times.items()))


def stays(row: dict) -> float:
    """The path time from which the selection stays within the threshold of that at the end."""
    last = unpack(row["looks"][-1][2])
    return next(
        (path for _, path, selection in reversed(row["looks"]) if (unpack(selection) != last).mean() > THRESHOLD), 0.0
    )


def summary(found: Sequence[Said]) -> list[str]:
    """Cells of a row: how many spoke early, how many of them were wrong and by how much, when, and how many never."""
    early = [one for one in found if one.early]
    wrong = sum(one.far > THRESHOLD + 1e-9 for one in early)
    mean = statistics.mean(1.0 if one.path is None else one.path for one in found)
    never = sum(one.path is None for one in found)
    furthest = max((one.far for one in early), default=0.0)
    return [f"{len(early)} of {len(found)}", str(wrong), f"{furthest:.2f}", f"{mean:.2f}", str(never)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "tickets_settling")
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.table:
        return table(read_rows(options.out))
    file = RowFile(options.out, KEYS)
    for seed in options.seeds:
        missing = [budget for budget in BUDGETS if (options.task, budget, seed) not in file]
        looks = looks_of(TASKS[options.task], seed) if missing else []
        for budget in missing:
            row = {"task": options.task, "budget": budget, "seed": seed}
            row["looks"] = [[look["step"], look["path"], look["selections"][budget]] for look in looks]
            file.add(row | machine(), hide=("looks", "platform"))
    table(file.rows)


if __name__ == "__main__":
    main()
