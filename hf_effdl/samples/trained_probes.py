"""Whole models as probes, trained with the Trainer."""

import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from hf_effdl.samples.inputs import Inputs, check_dataset, label_names, label_tensor
from hf_effdl.samples.probes import LEAST_PROBES, Probes, ProbeSet, bootstrap_counts
from hf_effdl.weighting import WeightedTrainer


class TrainedProbes(Probes):
    """Probes that `train_probes` made; they know how one more is trained."""

    def __init__(self, models: Sequence[nn.Module], train: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__(models, **options)
        self._train = train

    def fit(self, rows: Dataset, labels: Tensor, weights: Tensor, seed: int) -> nn.Module:
        return self._train(rows, labels, seed, weights)


def train_probes(
    model_init: Callable[[], nn.Module],
    args: TrainingArguments,
    rows: Dataset,
    label_column: str = "label",
    *,
    num_probes: int = 8,
    bootstrap: bool = True,
    processing_class: Any = None,
    input_column: str | Sequence[str] | None = None,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
    seed: int = 0,
) -> Probes:
    """Train M models with the Trainer, each from its own seed and on its own bootstrap sample.

    A finished probe is kept under `args.output_dir/probe-m` and not trained again, so that a run that was cut off goes
    on where it was.

    Args:
        model_init: makes a fresh model; the random state is seeded before each call.
        args: `TrainingArguments` of every probe.
        rows: labelled rows S', which the final model should not be trained on.
        label_column: of `rows`.
        num_probes: M.
        bootstrap: False trains all probes on all rows, with seeds as the only difference (the released code).
        processing_class, input_column, data_collator: see `Probes`.
        seed: of the bootstrap; probe m trains with seed `seed + m`.

    Returns:
        `Probes`, to hand to `UncertaintySelector`.

    Example:
        >>> probes = train_probes(new_model, TrainingArguments("probes"), labelled)  # doctest: +SKIP
        >>> subset = UncertaintySelector(probes).select(pool, 0.2)                   # doctest: +SKIP
    """
    check_dataset(rows, [label_column], "the probe set")
    if num_probes < LEAST_PROBES:
        raise ValueError(f"num_probes={num_probes}: the spread of one probe is unknown; use 2 or more, better 8")
    labels = label_tensor(rows, label_column, label_names(rows, label_column))
    counts = bootstrap_counts(len(rows), num_probes, seed, bootstrap)
    inputs = Inputs(processing_class, input_column, data_collator)

    def train(data: Dataset, labels: Tensor, seed: int, weights: Tensor | None = None, folder: str = "trial") -> Any:
        set_seed(seed)
        model = model_init()
        target = Path(args.output_dir) / folder
        weights = torch.ones(len(labels)) if weights is None else weights
        trainer = WeightedTrainer(
            model, _replaced(args, output_dir=str(target), seed=seed, remove_unused_columns=False),
            train_dataset=_Labelled(data, labels, weights), data_collator=_Collator(inputs.bind(data, model), model),
        )  # fmt: skip
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        if folder == "trial" and trainer.is_world_process_zero():
            shutil.rmtree(target, ignore_errors=True)
        return model.eval()

    models = []
    for m, seen in enumerate(counts):
        done = Path(args.output_dir) / f"probe-{m}" / "probe.safetensors"
        models.append(_probe(done, lambda m=m, seen=seen: train(
            rows.select(torch.arange(len(rows)).repeat_interleave(seen).tolist()), labels.repeat_interleave(seen),
            seed + m, folder=f"probe-{m}",
        ), model_init))  # fmt: skip
    return TrainedProbes(
        models, train, processing_class=processing_class, input_column=input_column, data_collator=data_collator,
        names=label_names(rows, label_column), probe_set=ProbeSet(rows, labels, counts),
    )  # fmt: skip


def _probe(file: Path, train: Callable[[], nn.Module], model_init: Callable[[], nn.Module]) -> nn.Module:
    """The probe saved in a file; trained and saved if it is not there."""
    accelerator = Accelerator()
    if file.is_file():
        model = model_init()
        load_model(model, file)
        return model.eval()
    model = train()
    if accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".tmp")
        save_model(model, str(part))
        os.replace(part, file)
    accelerator.wait_for_everyone()
    return model


def _replaced(args: Any, **changes: Any) -> Any:
    args = copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


class _Labelled(torch.utils.data.Dataset):
    """Rows with their class and weight beside them."""

    column_names = ("row", "labels", "weight")

    def __init__(self, data: Dataset, labels: Tensor, weights: Tensor) -> None:
        self.data, self.labels, self.weights = data, labels, weights

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"row": self.data[int(i)], "labels": int(self.labels[i]), "weight": float(self.weights[i])}


class _Collator:
    def __init__(self, inputs: Inputs, model: nn.Module) -> None:
        self.inputs = inputs
        self.first = next(iter(inspect.signature(model.forward).parameters))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inputs([row["row"] for row in rows])
        batch = {self.first: batch} if isinstance(batch, Tensor) else dict(batch)
        weights = {"weight": torch.tensor([row["weight"] for row in rows])} if "weight" in rows[0] else {}
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])} | weights
