"""Files of samples that are damaged or forged: refused in a sentence of ours, made anew, or without effect."""

import copy
import json
import random
from pathlib import Path

import dynamics_run
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import selection_run
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments

from hf_effdl import LinearProbes, Probes, Selection, UncertaintySelector, load_dynamics, train_probes
from hf_effdl.samples.drawing.shards import plan_shards
from hf_effdl.samples.probes.scoring import score_rows
from hf_effdl.samples.selection import files


def plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return plain(vars(value)) if hasattr(value, "__dict__") else value


# ---- bits: what writes files into a folder, and how they are read


def selection(folder):
    probes = LinearProbes.train(None, selection_run.rows(60, 1), input_column="x", steps=5)
    selector = UncertaintySelector(probes, trial=False)
    selector.select(selection_run.rows(50, 2), 15)
    selector.selection.save(folder)
    return lambda: Selection.load(folder)


def dynamics(folder):
    dynamics_run.trainer(folder, num_train_epochs=1).train()
    return lambda: load_dynamics(folder)


def scores(folder):
    models = [nn.Linear(6, 3) for _ in range(3)]
    pool = selection_run.rows(50, 2)
    return lambda: score_rows(Probes(models, input_column="x"), pool, cache_dir=folder, progress=False)[0]


class Net(nn.Linear):
    def forward(self, x, labels=None):
        z = super().forward(x)
        return {"loss": nn.functional.cross_entropy(z, labels) if labels is not None else None, "logits": z}


def probes(folder):
    options = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(str(folder), max_steps=1, use_cpu=True, **options)
    pool = selection_run.rows(12, 1)
    made = {"num_probes": 2, "input_column": "x"}
    return lambda: {
        m: model.state_dict() for m, model in enumerate(train_probes(lambda: Net(6, 3), args, pool, **made).models)
    }


def shards(folder):
    rng, given = np.random.default_rng(0), folder / "given.parquet"
    pq.write_table(pa.table({"row_id": range(40), "u_x": rng.random(40), "p_label": rng.random(40)}), given)

    def read():
        summary = plan_shards([given], folder / "plan", 9)
        return summary | {
            "rows": [pq.read_table(folder / "plan" / one["file"]).to_pydict() for one in summary["outputs"]]
        }

    return read


KINDS = {make.__name__: make for make in (selection, dynamics, scores, probes, shards)}


@pytest.mark.parametrize("flips", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_is_used(kind, flips, tmp_path):
    read, draw = KINDS[kind](tmp_path), random.Random(flips)
    right = plain(read())
    kept = [file for file in sorted(tmp_path.rglob("*")) if file.is_file() and file.name != "given.parquet"]
    assert kept
    for file in kept:
        whole = file.read_bytes()
        for _ in range(-(-flips // len(kept))):
            content = bytearray(whole)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            try:
                assert plain(read()) == right, file.name
            except (ValueError, FileNotFoundError) as error:
                assert str(tmp_path) in str(error), error
            file.write_bytes(whole)


# ---- forgeries, with all digests made anew or of a version that had none

FORGED = {
    "a row that is none of the pool's": {"row_id": lambda ids: [*ids[:-1], 10**12]},
    "a row twice": {"row_id": lambda ids: [*ids[:-1], ids[0]]},
    "a negative weight": {"weight": lambda values: [-1.0, *values[1:]]},
    "no number": {"weight": lambda values: [float("nan"), *values[1:]]},
    "weights of nothing": {"weight": lambda values: [0.0] * len(values)},
    "a probability of 2": {"inclusion_probability": lambda values: [2.0, *values[1:]]},
    "a probability of 0": {"inclusion_probability": lambda values: [0.0, *values[1:]]},
}


@pytest.mark.parametrize("case", [*FORGED, "rows"])
def test_forged_selections_are_refused_as_damaged(case, tmp_path):
    selection(tmp_path)
    folder = tmp_path / "default"
    record = json.loads((folder / "selection.json").read_text())
    chosen = Dataset(pq.read_table(folder / "selection.parquet"))
    columns = {name: chosen[name][:] for name in chosen.column_names}
    for name, change in FORGED.get(case, {}).items():
        columns[name] = change(columns[name])
    forged = Dataset.from_dict(columns, features=chosen.features)
    forged.to_parquet(folder / "selection.parquet")
    record |= {"digest": files.digest(forged)} | ({"rows": 10**12} if case == "rows" else {})
    (folder / "selection.json").write_text(json.dumps({name: record[name] for name in files.EARLIER}))
    with pytest.raises(ValueError, match="the selection is damaged .*save or push it again"):
        Selection.load(tmp_path)


NASTY = (None, True, -1, 1.5, 10**12, 10**400, "x", "", [], {}, [[]], {"a": {"b": [1]}}, "../../elsewhere")


def places(record, path=()):
    """Where values stand in a record."""
    for key, value in record.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def test_records_of_anything_are_refused_or_read(tmp_path):
    selection(tmp_path)
    file, pool = tmp_path / "default" / "selection.json", selection_run.rows(50, 2)
    whole = json.loads(file.read_text())
    whole = {name: whole[name] for name in files.EARLIER}
    draw = random.Random(0)
    for path in places(whole):
        for value in draw.sample(NASTY, 4):
            record = copy.deepcopy(whole)
            inside = record
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = value
            file.write_text(json.dumps(record))
            try:
                Selection.load(tmp_path).apply(pool)
            except (ValueError, TypeError, FileNotFoundError) as error:
                assert len(str(error)) > 20, (path, value)


@pytest.mark.parametrize(
    "values",
    [
        {"p_label": torch.zeros(4), "margin": torch.zeros(4)},
        {name: torch.tensor(0.0) for name in ("p_label", "margin", "el2n")},
        {name: torch.zeros(4, dtype=torch.int64) for name in ("p_label", "margin", "el2n")},
        {name: torch.zeros(k) for k, name in enumerate(("p_label", "margin", "el2n"))},
    ],
)
def test_forged_records_of_dynamics_are_refused(values, tmp_path):
    save_file(values, Path(tmp_path) / "epoch-0001.safetensors")
    with pytest.raises(ValueError, match="epoch-0001.safetensors is damaged"):
        load_dynamics(tmp_path)
