"""JSON in files of every kind, from anybody: of another kind or nested without end, it is refused in words of ours."""

import copy
import json
import random
import traceback
from functools import reduce
from operator import getitem

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scale_run
import torch
from active_run import learner
from lora_run import adapted, bert
from models import resnet
from safetensors.torch import save
from test_lora import path_of

from hf_effdl import (
    choose,
    find_groups,
    load_dynamics,
    plan_shards,
    read_splits,
    score_shards,
    select_lora_ranks,
    slim,
    split_pool,
    write_splits,
)
from hf_effdl.cli.arguments import read_config
from hf_effdl.cli.work.cards import write_slim_card
from hf_effdl.files import SEALED, digest, read_sealed, sealed
from hf_effdl.samples.scale.score_shards import MADE_OF
from hf_effdl.structure.slim.family import FILE_NAME
from hf_effdl.structure.training import start
from hf_effdl.vicl.pool.index import open_index
from hf_effdl.weighted_sft import turn_ends


NASTY = (None, True, -1, 1.5, 10**12, 10**400, float("nan"), "x", [], {}, [[]], {"a": {"b": [1]}}, "../../x")


def noted(name, tensors, read):
    def door(folder, text):
        (folder / name).write_bytes(save(tensors, {SEALED: text}))
        return read(folder)

    return door


def written(name, read):
    return lambda folder, text: ((folder / name).write_text(text), read(folder))[1]


class Silent:
    def apply_chat_template(self, messages, **options):
        return {"input_ids": []}


def facts(folder, text):
    (folder / start.FILE_NAME).write_bytes(sealed({"dense|a": torch.ones(1)}, {"facts": text}))
    return start.Start.load(folder)


def plan(folder, text):
    pq.write_table(pa.table({"row_id": range(40), "u_x": np.linspace(0.1, 1, 40)}), folder / "given.parquet")
    (folder / "_plan.json").write_text(text)
    return plan_shards([folder / "given.parquet"], folder, 9)


def scores(folder, text):
    files = scale_run.shards(folder / "rows", (5,))
    pq.write_table(pa.table({"row_id": [1]}, metadata={MADE_OF: text}), folder / "scores-00000-of-00001.parquet")
    return score_shards(files, folder, scale_run.Lengths())


DOORS = {
    "sealed": noted("a", {"a": torch.ones(2)}, lambda folder: read_sealed(folder / "a")),
    "dynamics": noted(
        "epoch-0001.safetensors", {name: torch.ones(2) for name in ("p_label", "margin", "el2n")}, load_dynamics
    ),
    "start of a small net": facts,
    "tools of a conversation": lambda folder, text: turn_ends(
        {"messages": [{}], "tools": text, "input_ids": []}, Silent()
    ),
    "plan": plan,
    "scores": scores,
    "splits": written("a.json", lambda folder: read_splits(folder / "a.json")),
    "index": written("a.json", lambda folder: open_index(folder / "a.faiss", "x", 3, 4)),
    "family": written(FILE_NAME, lambda folder: choose(folder, macs=1)),
    "card": written("config.json", write_slim_card),
    "settings": written("a.yaml", lambda folder: read_config(["--config", str(folder / "a.yaml")])),
    "round": written("round-0000.json", lambda folder: learner(folder, "random")),
}


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "[" * 5_000, "1" * 5_000, "null", "[]", "7", '{"a": 1}'])
@pytest.mark.parametrize("door", DOORS)
def test_json_that_no_one_wrote_is_refused_in_words_of_ours_or_made_anew(door, text, tmp_path):
    try:
        DOORS[door](tmp_path, text)
    except ValueError as error:
        assert "hf_effdl" in traceback.extract_tb(error.__traceback__)[-1].filename, error


# peft asks transformers for a name that is deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_file_that_is_none_is_named(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"[" * 16)
    net = adapted(bert(), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged .*save the adapter before training"):
        select_lora_ranks(net, path_of(net, torch.Generator()), 0.4, initial=tmp_path)


def test_a_tensor_of_no_known_part_is_no_start(tmp_path):
    (tmp_path / start.FILE_NAME).write_bytes(sealed({"a": torch.ones(1)}, {"facts": "{}"}))
    with pytest.raises(ValueError, match="is damaged .*remove the folder"):
        start.Start.load(tmp_path)


# ---- entries of another kind, with digests made anew


def places(value, at=()):
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield (*at, key)
        yield from places(inner, (*at, key))


def forgeries(record, count):
    """Copies of a record, each with something else at one place."""
    every = [(at, bad) for at in places(record) for bad in NASTY]
    for at, bad in random.Random(0).sample(every, min(count, len(every))):
        forged = copy.deepcopy(record)
        reduce(getitem, at[:-1], forged)[at[-1]] = bad
        yield forged


def sealing(record):
    return digest(json.dumps(record, sort_keys=True))


def taken(read):
    """Whether a file is read and not refused in words of ours."""
    try:
        read()
    except ValueError as error:
        assert "hf_effdl" in traceback.extract_tb(error.__traceback__)[-1].filename and len(str(error)) > 20, error
        return False
    return True


def test_forged_splits_name_only_ids_that_are_there(tmp_path):
    file = tmp_path / "splits.json"
    write_splits(file, {"a": split_pool(list("abcdef"), 2)})
    record = json.loads(file.read_text())
    del record["sha256"]
    for forged in [*forgeries(record, 60), record | {"splits": {"a": {"queries": [-1], "dropped": [], "absent": []}}}]:
        file.write_text(json.dumps(forged | {"sha256": sealing(forged)}))
        refused = not taken(lambda: read_splits(file))
    assert refused


def test_a_forged_plan_removes_no_file_of_others(tmp_path):
    plan(tmp_path, "{}")
    file, own = tmp_path / "_plan.json", tmp_path / "mine.txt"
    own.write_text("mine")
    record = json.loads(file.read_text())
    del record["sha256"]
    named = record | {"rows": 3, "outputs": [{"file": "mine.txt"}]}
    for forged in [*forgeries(record, 40), named, record | {"outputs": record["outputs"] * 2}]:
        taken(lambda forged=forged: plan(tmp_path, json.dumps(forged | {"sha256": sealing(forged)})))
    assert own.read_text() == "mine"


def test_a_forged_report_in_a_config_is_refused(tmp_path):
    model, x = resnet(), torch.rand(8, 3, 32, 32)
    groups = find_groups(model, x)
    slim(model, groups, 0.5, example_inputs=x, calibration=[x]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    read = [
        (file.write_text(json.dumps(config | forged)), taken(lambda: write_slim_card(tmp_path)))[1]
        for forged in forgeries({"effdl_report": config["effdl_report"]}, 40)
    ]
    assert 5 < sum(read) < 35
