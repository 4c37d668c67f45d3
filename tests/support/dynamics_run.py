"""Short recorded runs on made-up rows, as a script.

`python dynamics_run.py OUT POINT...` forks one run per point, in OUT/POINT; the imports take far longer than the runs.
At its point a run stops for good and leaves its process id in OUT/POINT/held, for whoever started the script to kill
it. With a point "anywhere" it leaves the id at the start and runs on.
"""

import gc
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from hf_effdl import DynamicsCallback


ROWS, CLASSES, EPOCHS = 37, 3, 4
STEPS = 5  # per epoch: 37 rows in batches of 8
SHARED = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": EPOCHS,
    "learning_rate": 0.02,
    "save_strategy": "no",
    "logging_steps": 2,
    "seed": 3,
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}
# How a run saves that is held before a record, while it is written, after it, or killed anywhere. A checkpoint by
# steps at the end of an epoch is older than that epoch's record, one by epochs is younger. Trainer itself repeats
# noisy rows only where it resumes between epochs.
SAVES = {
    "before": {"save_strategy": "steps", "save_steps": STEPS},
    "during": {"save_strategy": "epoch"},
    "after": {"save_strategy": "epoch"},
    **{f"anywhere-{i}": {"save_strategy": "steps", "save_steps": STEPS} for i in range(3)},
    **{f"anywhere-quiet-{i}": {"save_strategy": "steps", "save_steps": 3} for i in range(3)},
}


class Rows(Dataset):
    """Three overlapping classes; with noise, every look at a row draws from all three generators."""

    def __init__(self, rows: int = ROWS, noise: bool = False, pause: float = 0.0, **columns):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        self.x = torch.randn(rows, 6, generator=generator) + nn.functional.one_hot(self.labels, 6)
        self.noise, self.pause, self.columns = noise, pause, columns

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        time.sleep(self.pause)
        noise = random.random() + np.random.rand() + torch.rand(()) if self.noise else 0.0
        return {"x": self.x[i] + noise, "labels": self.labels[i], **self.columns}


class Net(nn.Module):
    """All that tells training from evaluation: batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)
        )

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def trainer(out, callback=True, rows=None, net=Net, kind=Trainer, **changes):
    """A run with its own copy of everything; `callback` may be one of yours."""
    set_seed(0)
    callbacks = [DynamicsCallback()] if callback is True else [callback] if callback else []
    given = {name: changes.pop(name) for name in ("compute_loss_func", "data_collator") if name in changes}
    args = TrainingArguments(str(out), **{**SHARED, **changes})
    return kind(net(), args, train_dataset=Rows(noise=True) if rows is None else rows, callbacks=callbacks, **given)


def hold(out: Path) -> None:
    (out / "pid").write_text(str(os.getpid()))
    os.replace(out / "pid", out / "held")
    time.sleep(300)


def run_and_hold(out: Path, point: str) -> None:
    record, replace = DynamicsCallback._record, os.replace

    def held_record(self, args, state, epoch, *rest):
        if point == "before" and epoch == 2:
            hold(out)
        record(self, args, state, epoch, *rest)
        if point == "after" and epoch == 2:
            hold(out)

    def held_replace(part, file):
        if point == "during" and str(file).endswith("epoch-0002.safetensors"):
            part.write_bytes(part.read_bytes()[:100])
            hold(out)
        replace(part, file)

    DynamicsCallback._record = held_record
    os.replace = held_replace
    run = trainer(out, rows=Rows(noise="quiet" not in point, pause=0.001), **SAVES[point])
    if point.startswith("anywhere"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "pid").write_text(str(os.getpid()))
        replace(out / "pid", out / "held")
    run.train()


def with_and_without(folder: str) -> None:
    """Runs of all processes of a launch, in folders of their own, with the weights that each process ends with."""
    half = {"rows": Rows(), "per_device_train_batch_size": 4, "save_strategy": "epoch"}
    for name in ("with", "without"):
        # every process keeps the statistics of its own rows to the end
        run = trainer(f"{folder}/{name}", callback=name == "with", **half, ddp_broadcast_buffers=False)
        run.train()
        torch.save(run.model.state_dict(), f"{folder}/{name}/{run.args.process_index}.pt")
    few = half | {"num_train_epochs": 1}
    trainer(f"{folder}/few", callback=DynamicsCallback(dataset=Rows(3)), **few).train()


def files(out) -> dict[str, bytes]:
    """Everything in the folder of records, byte for byte."""
    return {file.name: file.read_bytes() for file in sorted((Path(out) / "dynamics").iterdir())}


def names(*epochs: int) -> list[str]:
    return [f"epoch-{epoch:04d}.safetensors" for epoch in epochs]


def assert_same_tensors(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    folder, *points = sys.argv[1:]
    for name in points:
        child = os.fork()
        if not child:
            run_and_hold(Path(folder) / name, name)
            os._exit(0)
        os.waitpid(child, 0)
