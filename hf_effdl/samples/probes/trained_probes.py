"""Whole models as probes, trained with the Trainer."""

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from hf_effdl.files import digest, read_sealed, sealed, write_whole
from hf_effdl.processes import agreed, is_first, refuse_lone_processes, together
from hf_effdl.random_state import random_state_kept
from hf_effdl.samples.probes.inputs import Inputs, check_classes, check_dataset, label_names, label_tensor
from hf_effdl.samples.probes.probes import LEAST_PROBES, Probes, ProbeSet, bootstrap_counts, weights_hash
from hf_effdl.samples.probes.scoring import fed_marks, reading_causes
from hf_effdl.weighting import WeightedTrainer


# number of probes, bootstrap
PRESETS = {"default": (8, True), "paper": (10, False)}


@dataclass(frozen=True)
class _Recipe:
    """How one probe is trained."""

    model_init: Callable[[], nn.Module]
    args: TrainingArguments
    inputs: Inputs

    def probe(self, m: int, rows: Dataset, labels: Tensor, places: Tensor, seed: int) -> nn.Module:
        """Probe m, trained on these places of the rows, or loaded where it was before."""
        with random_state_kept():
            model = self._fresh(seed)
            file = Path(self.args.output_dir) / f"probe-{m}" / "probe.safetensors"
            key = _key(self, rows, labels, places, seed, model)
            if not _load(model, file, key):
                model = self._trained(model, rows.select(places.tolist()), labels[places], seed, f"probe-{m}")
                _save(model, file, key)
        return model.eval()

    def trial(self, rows: Dataset, labels: Tensor, weights: Tensor, seed: int) -> nn.Module:
        """A model trained on weighted rows, of which nothing is kept on the disk."""
        with random_state_kept():
            model = self._trained(self._fresh(seed), rows, labels, seed, "trial", weights)
        shutil.rmtree(f"{self.args.output_dir}/trial", ignore_errors=True)
        return model

    def _fresh(self, seed: int) -> nn.Module:
        set_seed(seed)
        model = self.model_init()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model_init() returned {_kind(model)}; it must make a model")
        return model

    def _trained(
        self, model: nn.Module, rows: Dataset, labels: Tensor, seed: int, folder: str, weights: Tensor | None = None
    ) -> nn.Module:
        changes = {"output_dir": f"{self.args.output_dir}/{folder}", "seed": seed, "remove_unused_columns": False}
        trainer = WeightedTrainer(
            model,
            _replaced(self.args, **changes),
            data_collator=_Collator(self.inputs.bind(rows, model), model),
            train_dataset=_Labelled(rows, labels, torch.ones(len(labels)) if weights is None else weights),
        )
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model).eval()


def check_training(model_init: Any, args: Any) -> None:
    """Refuse what is no function that makes a model, such as a model, and what are no arguments of a Trainer."""
    if not callable(model_init) or isinstance(model_init, nn.Module):
        raise TypeError(f"model_init={_kind(model_init)}: pass a function that makes a fresh model")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args={_kind(args)}: pass the TrainingArguments of every probe")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


class TrainedProbes(Probes):
    """Probes that `train_probes` made; they know how one more is trained."""

    def __init__(self, models: Sequence[nn.Module], recipe: _Recipe, **options: Any) -> None:
        super().__init__(models, **options)
        self._recipe = recipe

    def fit(self, rows: Dataset, labels: Tensor, weights: Tensor, seed: int) -> nn.Module:
        return self._recipe.trial(rows, labels, weights, seed)


def train_probes(
    model_init: Callable[[], nn.Module],
    args: TrainingArguments,
    rows: Dataset,
    label_column: str = "label",
    *,
    preset: str = "default",
    num_probes: int | None = None,
    bootstrap: bool | None = None,
    processing_class: Any = None,
    input_column: str | Sequence[str] | None = None,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
    seed: int = 0,
) -> Probes:
    """Train M models with the Trainer, each from its own seed and on its own bootstrap sample.

    A finished probe is kept under `args.output_dir/probe-m` and not trained again by a run with the same rows, seed,
    arguments and fresh weights, so that a run that was cut off goes on with the next probe.

    Args:
        model_init: makes a fresh model; the random state is seeded before each call.
        args: `TrainingArguments` of every probe.
        rows: labelled rows S', which the final model should not be trained on.
        label_column: of `rows`.
        preset: `"default"`: 8 probes on bootstrap samples; `"paper"`: 10 probes on all rows, with seeds as the only
            difference, as in the released code.
        num_probes: M; default: the preset's.
        bootstrap: default: the preset's.
        processing_class, input_column, data_collator: see `Probes`.
        seed: of the bootstrap; probe m trains with seed `seed + m`.

    Raises:
        TypeError, ValueError: for arguments of another kind, and rows that nothing can be learned from.

    Returns:
        `Probes`, to hand to `UncertaintySelector`.

    Example:
        >>> probes = train_probes(new_model, TrainingArguments("probes"), labelled)  # doctest: +SKIP
        >>> subset = UncertaintySelector(probes).select(pool, 0.2)                   # doctest: +SKIP
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: it must be one of {tuple(PRESETS)}")
    check_training(model_init, args)
    usual = PRESETS[preset]
    num_probes = usual[0] if num_probes is None else num_probes
    bootstrap = usual[1] if bootstrap is None else bootstrap
    check_dataset(rows, [label_column], "the probe set", "label_column=")
    if isinstance(num_probes, bool) or not isinstance(num_probes, Integral):
        raise TypeError(f"num_probes={num_probes!r}: it must be a whole number, 2 or more")
    if (num_probes := int(num_probes)) < LEAST_PROBES:
        raise ValueError(f"num_probes={num_probes}: the spread of one probe is unknown; use 2 or more, better 8")
    args.device  # joins the other processes, if there are any
    refuse_lone_processes()
    names = label_names(rows, label_column)
    labels = label_tensor(rows, label_column, names)
    check_classes(labels, label_column, names)
    counts = bootstrap_counts(len(rows), num_probes, seed, bootstrap)
    recipe = _Recipe(model_init, args, Inputs(processing_class, input_column, data_collator, [label_column]))
    models = [
        recipe.probe(m, rows, labels, torch.arange(len(rows)).repeat_interleave(times_seen), seed + m)
        for m, times_seen in enumerate(counts)
    ]
    return TrainedProbes(
        models,
        recipe,
        processing_class=processing_class,
        input_column=input_column,
        data_collator=data_collator,
        names=label_names(rows, label_column),
        probe_set=ProbeSet(rows, labels, counts),
    )


def _load(model: nn.Module, file: Path, key: str) -> bool:
    """Load the weights saved under this key; False if there are none, or they are damaged."""
    weights = None
    if is_first() and file.is_file():
        try:
            weights, notes = read_sealed(file)
        except ValueError:
            notes = None
        weights = weights if notes is not None and notes.get("key") == key else None
    weights = agreed(weights)  # also, no process writes before all have looked
    if weights is not None:
        # tied weights are kept once
        model.load_state_dict({name: weights[other] for name, other in _homes(model).items()})
    return weights is not None


def _save(model: nn.Module, file: Path, key: str) -> None:
    if is_first():
        state, homes = model.state_dict(), _homes(model)
        write_whole(file, sealed({name: state[name] for name in set(homes.values())}, {"key": key}))
    together()


def _homes(model: nn.Module) -> dict[str, str]:
    """For each entry of the state the one that it is kept under: the first of those that are one tensor."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((value.data_ptr(), value.stride(), value.shape), name)
        for name, value in model.state_dict().items()
    }


# arguments that do not change what is trained
_ASIDE = ("output_dir", "run_name", "project", "hub_model_id", "hub_token", "disable_tqdm", "report_to", "log_level")


def _key(recipe: _Recipe, rows: Dataset, labels: Tensor, places: Tensor, seed: int, model: nn.Module) -> str:
    """What a probe's weights follow from."""
    inputs = recipe.inputs.bind(rows, model)
    causes = {
        "rows": digest(fed_marks(inputs, rows).numpy().tobytes()),
        "labels": labels.tolist(),
        "places": places.tolist(),
        "seed": seed,
        "settings": {name: value for name, value in recipe.args.to_dict().items() if name not in _ASIDE},
        "processes": recipe.args.world_size,  # of which each step takes a batch
        "fresh": weights_hash([model]),
        "inputs": inputs.describe(),
    } | reading_causes(inputs, rows)
    return agreed(digest(json.dumps(causes, default=str, sort_keys=True))[:16])


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
