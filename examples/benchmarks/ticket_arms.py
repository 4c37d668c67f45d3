"""Tickets beside the baselines: what `tickets_mnist.py` and `tickets_cifar10.py` share.

For every seed: the dense net with plain SGD; a search with `find_ticket`, which stops by itself; and for every budget
of MACs small nets that all train for as many epochs as the dense one, on the same schedule and batches:

- path ticket: its units, rewound to the initial weights (init) or to those of the step found (late);
- random ticket: as many units of every layer, drawn at random, from the same weights;
- fresh init: the same widths, new weights;
- one-shot magnitude: rows of largest norm of the trained dense net, initial weights;
- iterative magnitude: three rounds of a third of the epochs each, weights of a tenth of a round as starting point.

Training MACs are counted in those of the dense net's whole training: search and small net together.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rows import mean_and_error
from structure_mnist import Task, accuracy, path_of, rates, sgd, train
from torch import Tensor
from trainer_rows import Classifier, Rows, collate

from hf_effdl import SplitLBIArguments, SplitLBITrainer, find_groups, find_ticket, rewind, slim, transfer


ARMS = (
    "dense",
    "path ticket, init",
    "path ticket, late",
    "random ticket, init",
    "random ticket, late",
    "fresh init, same widths",
    "one-shot magnitude, init",
    "iterative magnitude, late",
)
ROUNDS = 3
Data = tuple[Tensor, Tensor]


@dataclass
class Setting:
    """A net, its data and its training."""

    net: str
    task: Task
    data: Data
    test: Data
    epochs: int
    lr: float
    weight_decay: float
    budgets: tuple[float, ...] = (0.25, 0.1)
    config: dict = field(default_factory=dict)  # what tells these rows from others

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.data[0]) // self.task.batch)

    def build(self, seed: int) -> Classifier:
        torch.manual_seed(seed)
        return Classifier(self.task.build(self.net))

    def fit(self, model: Classifier, seed: int, lrs: list[float] | None = None, data: Data | None = None) -> None:
        lrs = rates(self.net, self.steps, self.lr) if lrs is None else lrs
        net = self.task.place(model.net)
        train(net, sgd(net, self.weight_decay), lrs, data or self.data, 2000 + seed, task=self.task)

    def accuracy(self, model: Classifier, test: Data | None = None) -> float:
        return accuracy(model.net, *(test or self.test), self.task)


def search(setting: Setting, seed: int, budget: float, data: Data | None = None, model: Classifier | None = None):
    """A ticket, found by `find_ticket` in at most a fifth of the dense run, and the seconds it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = SplitLBIArguments(
            folder,
            num_train_epochs=setting.epochs,
            per_device_train_batch_size=setting.task.batch,
            learning_rate=setting.lr,
            weight_decay=setting.weight_decay,
            lr_scheduler_type="constant",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_drop_last=True,
            bf16=setting.config.get("precision") == "bfloat16",
            use_cpu=setting.data[0].device.type == "cpu",
        )
        data = data or setting.data
        trainer = SplitLBITrainer(
            model or setting.build(seed),
            args,
            data_collator=collate,
            train_dataset=Rows(*(part.cpu() for part in data), setting.config.get("augment") and setting.task.augment),
        )
        return find_ticket(trainer, macs=budget), time.perf_counter() - start


def magnitude(setting: Setting, model: Classifier, share: float) -> dict[str, Tensor]:
    """The units whose rows have the largest norm, down to a share of the model's MACs."""
    groups = find_groups(model, setting.data[0][:1].cpu())
    path, order = path_of("l2", {"model": model, "groups": groups, "optimizer": None}, 0)
    return path.select(macs=share, order=order)


def iterative(setting: Setting, seed: int, budget: float) -> tuple[Classifier, float]:
    """Units by three rounds of magnitude pruning, with late weights; and the rounds' training MACs."""
    steps = setting.steps // ROUNDS
    lrs = rates(setting.net, steps, setting.lr)
    late = setting.build(seed)
    setting.fit(late, seed, lrs[: steps // 10])
    late = late.cpu()
    groups = find_groups(late, setting.data[0][:1].cpu())
    whole = groups[0].network.count()["macs"]
    kept = {group.name: torch.arange(group.units) for group in groups}
    cost = 0.0
    for number in range(1, ROUNDS + 1):
        model = slim(late, groups, kept)
        now = groups[0].network.count(groups, {name: len(index) for name, index in kept.items()})["macs"]
        cost += now / whole / ROUNDS
        setting.fit(model, seed, lrs)
        left = magnitude(setting, model.cpu(), min(1.0, budget ** (number / ROUNDS) * whole / now))
        kept = {name: kept[name][left[name]] for name in kept}
    return slim(late, groups, kept), cost


def rows_of_seed(setting: Setting, seed: int, done: set, cache: Path) -> Iterator[dict]:
    """Every row of a seed that is not there yet."""
    steps, common = setting.steps, setting.config | {"net": setting.net, "seed": seed}
    file = cache / f"{setting.net}-{seed}.pt"
    dense = setting.build(seed)
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        dense.load_state_dict(saved["model"])
    else:
        start = time.perf_counter()
        setting.fit(dense, seed)
        saved = {"accuracy": setting.accuracy(dense), "seconds": time.perf_counter() - start}
        dense = dense.cpu()
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(saved | {"model": dense.state_dict()}, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
    if ("dense", seed, 1.0) not in done:
        yield common | {
            "arm": "dense",
            "budget": 1.0,
            "macs": 1.0,
            "cost": 1.0,
            "accuracy": saved["accuracy"],
            "seconds": saved["seconds"],
        }
    generator = torch.Generator().manual_seed(seed)
    for budget in setting.budgets:
        if all((arm, seed, budget) in done for arm in ARMS[1:]):
            continue
        ticket, seconds = search(setting, seed, budget)
        report, found = ticket.report(), ticket.step / steps
        units = {group.name: group.units for group in ticket.groups}
        drawn = {
            name: torch.randperm(units[name], generator=generator)[: len(index)].sort().values
            for name, index in ticket.kept.items()
        }
        others = {"random": replace(ticket, kept=drawn)}
        for arm in ARMS[1:]:
            if (arm, seed, budget) in done:
                continue
            cost, macs = 0.0, report["macs"]["ratio"]
            start = time.perf_counter()
            if arm.startswith("path"):
                cost, to = found, "init" if arm.endswith("init") else ticket.step
                small = rewind(dense, ticket, to)
            elif arm.startswith("random"):
                to = "init" if arm.endswith("init") else ticket.step
                cost = 0.0 if to == "init" else found
                small = rewind(dense, others["random"], to)
            elif arm.startswith("fresh"):
                small = rewind(dense, ticket)
                torch.manual_seed(1000 + seed)
                for module in small.modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
            elif arm.startswith("one-shot"):
                other = replace(ticket, kept=magnitude(setting, dense, budget))
                cost, macs, small = 1.0, other.report()["macs"]["ratio"], rewind(dense, other)
            else:
                small, cost = iterative(setting, seed, budget)
                macs = macs_of(small, setting) / macs_of(dense, setting)
            setting.fit(small, seed)
            row = {"arm": arm, "budget": budget, "macs": macs, "cost": cost + macs}
            row |= {"accuracy": setting.accuracy(small), "seconds": time.perf_counter() - start}
            yield common | row | {"found": found, "settled": ticket.settled, "search_seconds": seconds}


def macs_of(model: Classifier, setting: Setting) -> int:
    return find_groups(model, setting.data[0][:1].cpu())[0].network.count()["macs"]


def transfer_rows(
    setting: Setting,
    seed: int,
    source: Data,
    model: Classifier,
    target: Data,
    target_test: Data,
    other: Callable[[], Classifier],
    budget: float,
    steps: int,
) -> Iterator[dict]:
    """A ticket found on one task, trained on another: other classes, another number of input channels."""
    ticket, _ = search(setting, seed, budget, source, model)
    generator = torch.Generator().manual_seed(seed)
    everything = {group.name: torch.arange(group.units) for group in ticket.groups}
    drawn = {
        name: torch.randperm(len(everything[name]), generator=generator)[: len(index)].sort().values
        for name, index in ticket.kept.items()
    }
    fresh = transfer(ticket, other())
    torch.manual_seed(1000 + seed)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    nets = {
        "path ticket, late": transfer(ticket, other()),
        "path ticket, init": transfer(ticket, other(), to="init"),
        "random ticket, late": transfer(replace(ticket, kept=drawn), other()),
        "fresh init, same widths": fresh,
        "dense, weights of the search": transfer(replace(ticket, kept=everything), other()),
        "dense, fresh init": other(),
    }
    for arm, net in nets.items():
        setting.fit(net, seed, rates(setting.net, steps, setting.lr), target)
        yield setting.config | {
            "net": setting.net,
            "seed": seed,
            "arm": arm,
            "budget": budget,
            "transfer": True,
            "accuracy": setting.accuracy(net, target_test),
            "found": ticket.step / setting.steps,
        }


# ---- table


def paired(of: dict, ours: str, arm: str, budget: float, arm_budget: float) -> tuple[float, float, int]:
    """How far one arm is ahead of another: mean over the seeds that both have, standard error, seeds."""
    seeds = sorted({seed for a, seed, b in of if (a, b) == (ours, budget) and (arm, seed, arm_budget) in of})
    ahead = [of[ours, seed, budget]["accuracy"] - of[arm, seed, arm_budget]["accuracy"] for seed in seeds]
    return *mean_and_error(ahead), len(ahead)


def table(rows: list[dict]) -> None:
    """One table per net and setting, then what the goals ask for."""
    apart: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["net"], *(str(row.get(name)) for name in ("classes", "rows", "epochs", "device")))
        apart.setdefault(key, []).append(row)
    for (net, classes, count, epochs, device), mine in apart.items():
        main = [row for row in mine if not row.get("transfer")]
        of = {(row["arm"], row["seed"], row["budget"]): row for row in main}
        print(f"\n{net}: {count} rows, {classes} classes, {epochs} epochs, {device}; accuracy %, mean over the seeds")
        print(
            "| arm | budget | MACs | training MACs | accuracy | beside dense (SE) | path ticket, late, ahead (SE) |"
            "\n|---|---|---|---|---|---|---|"
        )
        for budget in sorted({row["budget"] for row in main}, reverse=True):
            for arm in ARMS:
                part = [row for row in main if (row["arm"], row["budget"]) == (arm, budget)]
                if not part:
                    continue
                mean = {name: statistics.mean(row[name] for row in part) for name in ("macs", "cost", "accuracy")}
                beside, error, _ = paired(of, arm, "dense", budget, 1.0)
                ahead, other_error, seeds = paired(of, "path ticket, late", arm, budget, budget)
                last = f"{ahead:+.2f} ({other_error:.2f})" if seeds and arm != "path ticket, late" else ""
                print(
                    f"| {arm} ({len(part)} seeds) | {budget:.0%} | {mean['macs']:.2f} | {mean['cost']:.2f} | "
                    f"{mean['accuracy']:.2f} | {beside:+.2f} ({error:.2f}) | {last} |"
                )
        found = {(row["seed"], row["budget"]): row for row in main if row["arm"].startswith("path")}
        if found:
            shares = [row["found"] for row in found.values()]
            settled = sum(row["settled"] for row in found.values())
            print(
                f"tickets found after {min(shares):.1%} to {max(shares):.1%} of the dense epochs, "
                f"{settled} of {len(found)} settled by themselves"
            )
            for start in ("init", "late"):
                for budget in sorted({budget for _, budget in found}, reverse=True):
                    arm = f"path ticket, {start}"
                    line = f"{arm}, {budget:.0%} MACs: "
                    for other, at in (("dense", 1.0), (f"random ticket, {start}", budget)):
                        ahead, error, seeds = paired(of, arm, other, budget, at)
                        line += f"{ahead:+.2f} (SE {error:.2f}, {seeds} seeds) beside {other}; "
                    print(line.removesuffix("; "))
        moved = [row for row in mine if row.get("transfer")]
        if moved:
            print("\n| transferred | accuracy, mean (SD) | path ticket, late, ahead (SE) |\n|---|---|---|")
        of = {(row["arm"], row["seed"], row["budget"]): row for row in moved}
        for arm in dict.fromkeys(row["arm"] for row in moved):
            values = [row["accuracy"] for row in moved if row["arm"] == arm]
            ahead, error, _ = paired(of, "path ticket, late", arm, moved[0]["budget"], moved[0]["budget"])
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            last = "" if arm == "path ticket, late" else f"{ahead:+.2f} ({error:.2f})"
            print(f"| {arm} ({len(values)} seeds) | {statistics.mean(values):.2f} ({spread:.2f}) | {last} |")
