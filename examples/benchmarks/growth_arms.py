"""Growing beside the baselines: what `growth_mnist.py` and `growth_cifar10.py` share.

Every arm trains in a `Trainer` with the same batch size, learning rate and linear schedule over its own steps:

- dense: plain SGD on the net of full width, all epochs; its training MACs are the unit of every cost;
- grown: `GrowingTrainer` from a narrow seed, all epochs, MACs of a row bounded by a share of the dense net's; the same
  begun anew after the last round (`growth_restart`), and with new units that are split, zero-out, GradMax or fresh
  (as in the authors' released growth: not function-preserving);
- final from scratch: the widths that growth ended with, new weights, plain SGD for as many training MACs in all as
  growth took (so fewer steps);
- uniform from scratch: the dense net's widths times one factor, of the same MACs, for as many training MACs.

Growth decides from training data alone; test accuracy is read once per epoch and used for nothing.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rows import RowFile, mean_and_error
from torch import Tensor, nn
from trainer_rows import Classifier, Rows, collate
from transformers import Trainer, TrainingArguments

from hf_effdl import GrowingArguments, GrowingTrainer
from hf_effdl.structure.groups.counting import trace_network


ARMS = (
    "dense",
    "grown",
    "grown, begun anew",
    "grown, split",
    "grown, zero-out",
    "grown, GradMax",
    "grown, fresh",
    "final from scratch",
    "uniform from scratch",
)
# what arms of growth set
GROWN: dict[str, dict[str, Any]] = {
    "grown": {},
    "grown, begun anew": {"growth_restart": True},
    "grown, split": {"growth_init": "split"},
    "grown, zero-out": {"growth_init": "zero-out"},
    "grown, GradMax": {"growth_init": "gradmax"},
    "grown, fresh": {"growth_init": "fresh"},
}
Data = tuple[Tensor, Tensor]


@dataclass
class Setting:
    """Nets by width, data and training."""

    net: str
    build: Callable[[Sequence[int]], nn.Module]
    dense: Sequence[int]
    seed_widths: Sequence[int]
    data: Data
    test: Data
    epochs: int
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    augment: Any = None
    bf16: bool = False
    growth: dict[str, Any] = field(default_factory=dict)  # for GrowingArguments
    share: float = 0.52  # of the dense net's MACs that growth may reach
    evaluate: int = 1  # epochs from one evaluation to the next
    config: dict[str, Any] = field(default_factory=dict)  # what tells these rows from others

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.data[0]) // self.batch)

    def model(self, widths: Sequence[int], seed: int) -> Classifier:
        torch.manual_seed(seed)
        return Classifier(self.build(widths))

    def macs(self, model: nn.Module) -> int:
        return trace_network(model, {"pixel_values": self.data[0][:1].cpu()}).count()["macs"]


def common(setting: Setting, folder: str, seed: int, steps: int) -> dict[str, Any]:
    """The arguments that all arms share."""
    per_epoch = len(setting.data[0]) // setting.batch
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": setting.batch,
        "seed": seed,
        "per_device_eval_batch_size": math.gcd(len(setting.test[0]), 2000),
        "learning_rate": setting.lr,
        "weight_decay": setting.weight_decay,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": setting.evaluate * per_epoch,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "bf16": setting.bf16,
        "use_cpu": setting.config.get("device") == "cpu",
    }


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(setting: Setting, model: nn.Module, seed: int, steps: int, growth: dict | None = None) -> dict[str, Any]:
    """One arm: plain SGD, or growth where `growth` holds settings of it."""
    start = time.perf_counter()
    rows = {
        "train_dataset": Rows(*setting.data, setting.augment),
        "eval_dataset": Rows(*setting.test),
        "data_collator": collate,
        "compute_metrics": accuracy,
    }
    with tempfile.TemporaryDirectory() as folder:
        options = common(setting, folder, seed, steps)
        row: dict[str, Any] = {}
        if growth is None:
            args = TrainingArguments(optim="sgd", optim_args="momentum=0.9", **options)
            trainer = Trainer(model, args, **rows)
            trainer.train()
            macs = setting.macs(trainer.model.cpu())
            row["training_macs"] = 3 * macs * setting.batch * steps
            row["curve"] = [
                {"training_macs": 3 * macs * setting.batch * entry["step"], "accuracy": entry["eval_accuracy"]}
                for entry in trainer.state.log_history
                if "eval_accuracy" in entry
            ]
        else:
            bound = int(setting.share * setting.macs(setting.model(setting.dense, 0)))
            args = GrowingArguments(**options | setting.growth | growth, max_macs=bound, widths="free")
            trainer = GrowingTrainer(model, args, **rows)
            trainer.train()
            macs = setting.macs(trainer.model.cpu())
            row["history"] = trainer.history
            row["curve"] = [
                {key: point[key] for key in ("training_macs", "accuracy")} for point in trainer.growth_curve
            ]
            row["training_macs"] = row["curve"][-1]["training_macs"]
            row["units"] = {group.name: group.units for group in trainer.groups}
        row |= {
            "accuracy": row["curve"][-1]["accuracy"],
            "macs": macs,
            "seconds": time.perf_counter() - start,
            "params": sum(p.numel() for p in trainer.model.parameters()),
        }
    return row


def uniform_widths(setting: Setting, macs: int) -> list[int]:
    """The dense net's widths times the largest factor that costs at most so many MACs."""
    best = [max(1, width // 100) for width in setting.dense]
    for percent in range(2, 101):
        widths = [max(1, round(width * percent / 100)) for width in setting.dense]
        if setting.macs(setting.model(widths, 0)) > macs:
            break
        best = widths
    return best


def one_row(setting: Setting, arm: str, seed: int, grown: dict[str, Any] | None) -> dict[str, Any]:
    """One arm and seed; `grown` is the row of "grown" for the arms that follow its cost."""
    if arm == "dense":
        return train(setting, setting.model(setting.dense, seed), seed, setting.steps)
    if arm in GROWN:
        return train(setting, setting.model(setting.seed_widths, seed), seed, setting.steps, GROWN[arm])
    widths = list(grown["units"].values()) if arm.startswith("final") else uniform_widths(setting, grown["macs"])
    model = setting.model(widths, 1000 + seed)
    steps = max(1, int(grown["training_macs"] / (3 * setting.macs(model) * setting.batch)))
    return train(setting, model, seed, steps) | {"widths": widths, "steps": steps}


def run(setting: Setting, arms: Sequence[str], seeds: Sequence[int], out: Path) -> list[dict]:
    """All rows that are not there yet, each appended as soon as it is done."""
    config = {"net": setting.net, **setting.config}
    file = RowFile(out, ("arm", "seed"), config)
    for seed in seeds:
        for arm in arms:
            if (arm, seed) in file:
                continue
            grown = next((row for row in file.rows if file.is_ours(row) and file.key_of(row) == ("grown", seed)), None)
            if grown is None and arm.endswith("scratch"):
                print(f"left out: {arm}, seed {seed}: it follows the row of 'grown'", file=sys.stderr)
                continue
            row = config | {"arm": arm, "seed": seed} | one_row(setting, arm, seed, grown)
            file.add(row, hide=("history", "curve"))
    return file.rows


def paired(of: dict, ours: str, other: str, key: str = "accuracy") -> tuple[float, float, int]:
    """How far one arm is ahead of another: mean over the seeds that both have, standard error, seeds."""
    seeds = sorted({seed for arm, seed in of if arm == ours and (other, seed) in of})
    ahead = [of[ours, seed][key] - of[other, seed][key] for seed in seeds]
    return *mean_and_error(ahead), len(ahead)


def table(rows: list[dict], title: str) -> None:
    of = {(row["arm"], row["seed"]): row for row in rows}
    unit = {seed: row["training_macs"] for (arm, seed), row in of.items() if arm == "dense"}
    whole = {seed: row["macs"] for (arm, seed), row in of.items() if arm == "dense"}
    ours = max(
        (*GROWN, *ARMS), key=lambda arm: sum(name == arm for name, _ in of)
    )  # the first of those with most seeds
    print(
        f"\n{title}\n| arm | seeds | accuracy | beside dense (SE) | {ours}, ahead (SE) | parameters | MACs | "
        "training MACs | seconds |\n|---|---|---|---|---|---|---|---|---|"
    )
    for arm in ARMS:
        mine = [of[arm, seed] for seed in unit if (arm, seed) in of]
        if not mine:
            continue
        beside, error, _ = paired(of, arm, "dense")
        ahead, other_error, _ = paired(of, ours, arm)
        mean = {key: statistics.mean(row[key] for row in mine) for key in ("accuracy", "params", "seconds")}
        shares = [(row["macs"] / whole[row["seed"]], row["training_macs"] / unit[row["seed"]]) for row in mine]
        macs, cost = (statistics.mean(values) for values in zip(*shares, strict=True))
        last = "" if arm == ours else f"{ahead:+.2f} ({other_error:.2f})"
        print(
            f"| {arm} | {len(mine)} | {mean['accuracy']:.2f} | {beside:+.2f} ({error:.2f}) | {last} | "
            f"{mean['params']:,.0f} | {macs:.2f} | {cost:.2f} | {mean['seconds']:.0f} |"
        )
    for seed in unit:
        if "history" in of.get((ours, seed), {}):
            history = of[ours, seed]["history"]
            steps = dict.fromkeys(row["step"] for row in history)
            widths = {step: [r["to"] for r in history if r["step"] == step] for step in steps}
            first = [r["from"] for r in history if r["step"] == next(iter(steps))]
            print(f"seed {seed}: {first} " + " ".join(f"-> {value} at {step}" for step, value in widths.items()))


def save_picture(rows: list[dict], seed: int, file: Path, steps: int) -> None:
    """Widths over a run's steps, and accuracy against training MACs beside the dense net's curve, for one seed."""
    from hf_effdl.structure.growing.picture import plot_growth

    of = {row["arm"]: row for row in rows if row["seed"] == seed}
    curve = [*of["grown"]["curve"][:-1], of["grown"]["curve"][-1] | {"step": steps}]
    figure = plot_growth(of["grown"]["history"], curve, of["dense"]["curve"])
    figure.savefig(file, dpi=110)
