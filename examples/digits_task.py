"""What the examples on scikit-learn's digits share: rows, a pool with wrong labels, a small net, a progress bar.

from digits_task import digits, new_model
train, test = digits()
"""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture
from sklearn.datasets import load_digits
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_effdl.hub.cards import markdown_table


SHARED = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 512,
    "learning_rate": 0.1,
    "report_to": "none",
    "max_grad_norm": 0.0,
    "dataloader_pin_memory": False,
    "logging_strategy": "epoch",
    "eval_strategy": "epoch",
    "disable_tqdm": True,  # `Bar` instead
    "remove_unused_columns": False,  # `augment` reads columns that the model does not know
}


class Bar(TrainerCallback):
    """One progress bar for a training, with the last accuracy, instead of a line of numbers per epoch."""

    def __init__(self, name: str) -> None:
        self.name, self.bar = name, None

    def on_train_begin(self, args, state, control, **others) -> None:
        if self.bar is None:  # growth trains in stages
            self.bar = tqdm(total=state.max_steps, desc=f"  {self.name}", unit=" steps", mininterval=2, leave=True)

    def on_step_end(self, args, state, control, **others) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args, state, control, metrics=None, **others) -> None:
        if self.bar is not None and "eval_accuracy" in (metrics or {}):
            self.bar.set_postfix(accuracy=f"{metrics['eval_accuracy']:.3f}")

    def close(self) -> None:
        self.bar.refresh()
        self.bar.close()
        self.bar = None


def train_with_bar(trainer: Trainer, name: str) -> None:
    """What the callbacks print goes to `training.txt` in the trainer's folder."""
    bar = Bar(name)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(bar)
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "training.txt", "w", encoding="utf-8") as log, redirect_stdout(log):
        trainer.train()
    bar.close()
    trainer.remove_callback(bar)


def show(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    print(f"\n{markdown_table(rows, columns)}\n", flush=True)


@cache
def pictures() -> torch.Tensor:
    """All 1,797 digits as 32x32 pixels, `(1797, 1, 32, 32)`: rows of data sets name theirs by its place here."""
    images = torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]
    images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    return (images - images.mean()) / images.std()


def digits(seed: int = 0) -> tuple[Dataset, list[dict[str, torch.Tensor]]]:
    """1,437 training and 360 test rows, `pixel_values` of 32x32 pixels and `labels`."""
    target = load_digits().target
    order = np.random.default_rng(seed).permutation(len(target))
    train = Dataset.from_dict({"row": order[360:], "labels": target[order[360:]]})
    test = [{"pixel_values": pictures()[row], "labels": torch.tensor(target[row])} for row in order[:360].tolist()]
    return train.with_transform(augment), test


def augment(rows: dict[str, list]) -> dict[str, torch.Tensor]:
    """Shift images by up to three pixels and add noise; without it the net knows all digits after two epochs."""
    images = pictures()[rows["row"]]
    shifts = torch.randint(-3, 4, (len(images), 2)).tolist()
    images = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])
    kept = {name: torch.tensor(rows[name]) for name in ("labels", "weight") if name in rows}
    return {"pixel_values": images + 0.3 * torch.randn_like(images), **kept}


def to_train(rows: Dataset) -> Dataset:
    """Rows of the pool as a `WeightedTrainer` takes them."""
    return rows.select_columns(["row", "labels", "weight"]).with_transform(augment)


def pool_with_wrong_labels(share: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """300 rows for the probes and a pool of 1,137, with a share of the labels wrong in both; none of the test rows."""
    data, rng = load_digits(), np.random.default_rng(seed)
    rows = rng.permutation(len(data.images))[360:]
    wrong = rng.random(len(rows)) < share
    labels = np.where(wrong, (data.target[rows] + rng.integers(1, 10, len(rows))) % 10, data.target[rows])
    columns = {
        "image": [Picture.fromarray((16 - data.images[i]).astype(np.uint8) * 15).resize((64, 64)) for i in rows],
        "pixels": (data.images[rows] / 16).reshape(len(rows), -1),
        "row": rows,
        "labels": labels,
    }
    names = [str(i) for i in range(10)]
    kinds = {
        "image": Image(),
        "pixels": List(Value("float32")),
        "row": Value("int64"),
        "labels": ClassLabel(names=names),
    }
    pool = Dataset.from_dict(columns, features=Features(kinds))
    return pool.select(range(300)), pool.select(range(300, len(pool)))


def new_model(width: int = 16) -> ResNetForImageClassification:
    set_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=width,
            hidden_sizes=[width, 2 * width, 4 * width],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label={i: str(i) for i in range(10)},
            label2id={str(i): i for i in range(10)},
        )
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
