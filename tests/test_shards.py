"""Plans over Parquet shards equal the draw in memory, whatever the cut, the order and the interruptions."""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from forked import CONTEXT

from hf_effdl.samples.drawing import shards as module
from hf_effdl.samples.drawing.draws import priority_sample
from hf_effdl.samples.drawing.probabilities import clip_scores
from hf_effdl.samples.drawing.shards import MANIFEST, PROGRESS, plan_shards
from hf_effdl.samples.drawing.weights import kish_size, loss_weights


ROOT = Path(__file__).parents[1]
ROWS, BUDGET = 30_000, 3_000


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Scores with a heavy tail, zeros and ties; ids that are no row numbers."""
    rng = np.random.default_rng(0)
    scores = rng.lognormal(sigma=2, size=ROWS).astype(np.float32)
    scores[:50], scores[50:80] = 0, 3
    return pa.table(
        {
            "row_id": rng.permutation(10 * ROWS)[:ROWS],
            "u_x": scores,
            "u_y": rng.random(ROWS),
            "p_label": rng.random(ROWS),
        }
    )


def cut(table: pa.Table, folder: Path, shards: int, **options) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, len(table), shards + 1).astype(int)
    files = [folder / f"scores-{k}.parquet" for k in range(shards)]
    for file, low, high in zip(files, edges, edges[1:]):
        pq.write_table(table.slice(low, high - low), file, **options)
    return files


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("plan-*.parquet"))])


def column(table: pa.Table, name: str) -> torch.Tensor:
    return torch.tensor(table[name].to_numpy())


def in_memory(table: pa.Table, budget: int = BUDGET, clip: float | None = None, seed: int = 0, ids: bool = True):
    scores = column(table, "u_x")
    scores = scores if clip is None else clip_scores(scores, clip)
    return priority_sample(scores, budget, seed=seed, row_ids=column(table, "row_id") if ids else None)


# ---- equal to the draw in memory


@pytest.mark.parametrize("shards", [1, 3, 16])
@pytest.mark.parametrize("budget", [1, 37, BUDGET, ROWS - 1, ROWS])
def test_a_plan_over_shards_is_the_plan_in_memory(table, tmp_path, shards, budget):
    files = cut(table, tmp_path / "in", shards, row_group_size=777)
    summary = plan_shards(files, tmp_path / "out", budget, batch_rows=500, seed=5)
    positions, inverse = in_memory(table, budget, seed=5)
    found = read(tmp_path / "out")
    assert column(found, "row_id").equal(column(table, "row_id")[positions])
    torch.testing.assert_close(column(found, "inclusion_probability"), 1 / inverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(column(found, "weight"), inverse / inverse.mean(), rtol=1e-12, atol=0)
    assert [output["selected"] for output in summary["outputs"]] == [
        pq.read_metadata(file).num_rows for file in sorted((tmp_path / "out").glob("plan-*.parquet"))
    ]
    assert summary["kish"] == pytest.approx(kish_size(inverse))
    assert summary["max_weight"] == pytest.approx((inverse / inverse.mean()).max().item())
    assert summary.items() < json.loads((tmp_path / "out" / MANIFEST).read_text()).items()
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [MANIFEST, *(output["file"] for output in summary["outputs"])]
    )


def test_order_threads_and_batches_change_nothing_but_the_order_of_the_output(table, tmp_path):
    files = cut(table, tmp_path / "in", 16)
    one = plan_shards(files, tmp_path / "one", BUDGET, workers=1)
    plan_shards(files, tmp_path / "many", BUDGET, workers=8, batch_rows=123)
    assert read(tmp_path / "many")["row_id"].equals(read(tmp_path / "one")["row_id"])
    random.Random(0).shuffle(files)
    shuffled = plan_shards(files, tmp_path / "shuffled", BUDGET)
    assert all(shuffled[key] == one[key] for key in ("tau", "weight_scale", "max_weight", "kish"))
    assert read(tmp_path / "shuffled").sort_by("row_id").equals(read(tmp_path / "one").sort_by("row_id"))


def test_without_an_id_column_rows_are_known_by_their_number(table, tmp_path):
    files = cut(table.drop_columns("row_id"), tmp_path / "in", 3)
    summary = plan_shards(files, tmp_path / "out", BUDGET, batch_rows=700)
    assert summary["settings"]["id_column"] is None
    assert column(read(tmp_path / "out"), "row_id").equal(in_memory(table, ids=False)[0])
    # and so they are if the column is to be ignored
    plan_shards(cut(table, tmp_path / "with", 3), tmp_path / "ignored", BUDGET, id_column=None)
    assert read(tmp_path / "ignored").equals(read(tmp_path / "out"))


KINDS = [pa.float16(), pa.float64(), pa.int32(), pa.uint64()]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_may_be_numbers_of_any_type_ids_texts_and_shards_empty(table, tmp_path, kind):
    part, names = table.slice(0, 2000), [f"row {i}" for i in range(2000)]
    scores = pa.array((part["u_x"].to_numpy() * 10).astype(kind.to_pandas_dtype()))
    part = part.set_column(1, "u_x", scores).set_column(0, "name", pa.array(names))
    files, threads = cut(part, tmp_path / "in", 3), torch.get_num_threads()
    files.insert(1, *cut(part.slice(0, 0), tmp_path / "empty", 1))
    torch.set_num_threads(3)
    try:
        summary = plan_shards(files, tmp_path / "out", 100, id_column="name", clip=7)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    clipped = clip_scores(torch.tensor(scores.to_numpy()).double(), 7)
    positions, inverse = priority_sample(clipped, 100, row_ids=names)
    found = read(tmp_path / "out")
    assert found["row_id"].to_pylist() == [names[i] for i in positions]
    torch.testing.assert_close(column(found, "inclusion_probability"), 1 / inverse, rtol=0, atol=1e-12)
    assert summary["outputs"][1]["selected"] == 0


@pytest.mark.parametrize(
    "weights, score, reads",
    [
        ("none", "u_x", "u_x"),
        ("damped", "u_x", "u_x"),
        ("damped", "p_label", "u_y"),
        ("p_label", "u_x", "p_label"),
        ("exact", "u_y", "u_y"),
    ],
)
def test_every_kind_of_weights_has_mean_one_over_all_shards(table, tmp_path, weights, score, reads):
    files = cut(table, tmp_path / "in", 3)
    summary = plan_shards(files, tmp_path / "out", BUDGET, weights=weights, score=score, beta=0.2, batch_rows=500)
    positions, inverse = priority_sample(column(table, score), BUDGET, row_ids=column(table, "row_id"))
    given = column(table, reads)[positions]
    expected = loss_weights(weights, probabilities=1 / inverse, uncertainty=given, p_label=given, beta=0.2)
    torch.testing.assert_close(column(read(tmp_path / "out"), "weight"), expected, rtol=1e-12, atol=0)
    assert summary["kish"] == pytest.approx(kish_size(expected))


def test_budgets_are_nested_and_estimates_unbiased(table, tmp_path):
    files, wider, totals = cut(table, tmp_path / "in", 3), set(), []
    for budget in (2000, 1000, 500):
        plan_shards(files, tmp_path / str(budget), budget)
        found = set(read(tmp_path / str(budget))["row_id"].to_pylist())
        assert len(found) == budget and (not wider or found < wider)
        wider = found
    for seed in range(30):
        plan_shards(files, tmp_path / f"seed{seed}", 500, clip=1.0, seed=seed)
        totals.append((1 / column(read(tmp_path / f"seed{seed}"), "inclusion_probability")).sum().item())
    assert abs(np.mean(totals) - ROWS) < 4 * np.std(totals) / len(totals) ** 0.5


# ---- files


def test_the_output_folder_opens_as_a_data_set(table, tmp_path):
    for shards in (1, 3):
        plan_shards(cut(table, tmp_path / "in", shards), tmp_path / f"out{shards}", 100)
        data = load_dataset(str(tmp_path / f"out{shards}"), split="train", cache_dir=str(tmp_path / "cache"))
        assert data.column_names == ["row_id", "inclusion_probability", "weight"]
        assert data["row_id"][:] == read(tmp_path / f"out{shards}")["row_id"].to_pylist()
        assert pq.read_table(tmp_path / f"out{shards}").equals(read(tmp_path / f"out{shards}"))


def inodes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in folder.glob("plan-*.parquet")}


def test_a_finished_plan_is_kept_and_another_one_starts_over(table, tmp_path):
    files, out = cut(table, tmp_path / "in", 3), tmp_path / "out"
    first, before = plan_shards(files, out, BUDGET), inodes(out)
    assert plan_shards([str(file) for file in files], out, BUDGET) == first and inodes(out) == before
    (out / "plan-00001-of-00003.parquet").unlink()
    assert plan_shards(files, out, BUDGET) == first
    assert {name for name, inode in inodes(out).items() if before[name] == inode} >= {
        "plan-00000-of-00003.parquet",
        "plan-00002-of-00003.parquet",
    }
    # other settings, other files, another number of files
    plan_shards(files, out, BUDGET, seed=1)
    assert column(read(out), "row_id").equal(column(table, "row_id")[in_memory(table, seed=1)[0]])
    changed = table.set_column(1, "u_x", pa.array(table["u_x"].to_numpy()[::-1]))
    cut(changed, tmp_path / "in", 3)
    plan_shards(files, out, BUDGET, seed=1)
    assert column(read(out), "row_id").equal(column(changed, "row_id")[in_memory(changed, seed=1)[0]])
    plan_shards(files[:2], out, BUDGET)
    assert sorted(inodes(out)) == ["plan-00000-of-00002.parquet", "plan-00001-of-00002.parquet"]


def test_a_killed_plan_goes_on_and_ends_as_an_uninterrupted_one(table, tmp_path):
    files, out = cut(table, tmp_path / "in", 16), tmp_path / "out"
    whole = plan_shards(files, tmp_path / "whole", BUDGET, batch_rows=64)
    moments, seen = random.Random(time.time_ns()), [inodes(out)]
    exits = []
    for _ in range(5):
        child = CONTEXT.Process(target=plan_shards, args=(files, out, BUDGET), kwargs={"batch_rows": 64, "workers": 1})
        child.start()
        enough = len(seen[-1]) + moments.randint(0, 2)
        while child.is_alive() and not ((out / PROGRESS).is_file() and len(inodes(out)) >= enough):
            time.sleep(0.001)
        child.join(moments.uniform(0, 0.03))
        child.kill()
        child.join()
        exits.append(child.exitcode)
        seen.append(inodes(out))
    assert exits.count(-signal.SIGKILL) >= 2 and any(0 < len(finished) < 16 for finished in seen)
    for earlier, later in zip(seen, seen[1:]):
        assert earlier.items() <= later.items(), "a finished shard was written again"
    assert plan_shards(files, out, BUDGET, batch_rows=64) == whole
    assert inodes(out).items() >= seen[-1].items()
    assert read(out).equals(read(tmp_path / "whole"))
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


# ---- bad input


def test_bad_scores_are_named_by_file_and_row(table, tmp_path):
    for value in (float("nan"), float("inf"), -1.0, None):
        scores = table["u_x"].to_pylist()
        scores[12_345] = value
        bad = table.set_column(1, "u_x", pa.array(scores, pa.float32()))
        files = cut(bad, tmp_path / str(value), 3)
        with pytest.raises(ValueError, match=r"scores-1\.parquet: column 'u_x' is \S+ at row 2345 "):
            plan_shards(files, tmp_path / "out", BUDGET, batch_rows=1000)
    ids = table["row_id"].to_pylist()
    ids[25_000] = None
    files = cut(table.set_column(0, "row_id", pa.array(ids)), tmp_path / "ids", 3)
    with pytest.raises(ValueError, match=r"scores-2\.parquet: column 'row_id' is missing at row 5000"):
        plan_shards(files, tmp_path / "out", BUDGET, batch_rows=1000)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": "u_xx"}, r"no column 'u_xx'.*near ones \['u_x', 'u_y'\]; change score="),
        ({"id_column": "rowid"}, r"no column 'rowid'.*near ones \['row_id'\]; change id_column="),
        ({"budget": 0}, "budget=0: it must be a whole number"),
        ({"budget": ROWS + 1}, f"up to the {ROWS} there are"),
        ({"budget": 2.5}, "budget=2.5"),
        ({"clip": 0.0}, "clip=0.0: a cap must be positive"),
        ({"weights": "exactly"}, "weights='exactly': it must be one of"),
        ({"score": "u_y", "weights": "none"}, "depends on the label"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"files": []}, "pass one file or more"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(table, tmp_path, change, message):
    files = cut(table, tmp_path / "in", 2)
    arguments = {"files": files, "output_dir": tmp_path / "out", "budget": BUDGET} | change
    with pytest.raises(ValueError, match=message):
        plan_shards(**arguments)
    assert not (tmp_path / "out").exists()


BAD_FILES = {
    "text": (None, ValueError, "text.parquet is not a Parquet file"),
    "scores in words": (
        lambda t: t.set_column(1, "u_x", t["u_x"].cast(pa.string())),
        TypeError,
        "'u_x' is of type string; cast it to numbers",
    ),
    "other ids": (
        lambda t: t.set_column(0, "row_id", t["row_id"].cast(pa.int32())),
        TypeError,
        "'row_id' is of type int32, in .*scores-0.parquet of int64",
    ),
    "no ids": (lambda t: t.drop_columns("row_id"), ValueError, "no ids.parquet has no column 'row_id'"),
}


def test_bad_files_are_refused(table, tmp_path):
    files, out = cut(table, tmp_path / "in", 2), tmp_path / "out"
    with pytest.raises(ValueError, match="each of them once"):
        plan_shards([files[0], files[0]], out, 10)
    with pytest.raises(FileNotFoundError, match="nothing.parquet"):
        plan_shards([tmp_path / "nothing.parquet"], out, 10)
    for name, (change, error, message) in BAD_FILES.items():
        file = tmp_path / f"{name}.parquet"
        pq.write_table(change(table), file) if change else file.write_text("no Parquet file at all")
        with pytest.raises(error, match=message):
            plan_shards([files[0], file], out, 10)
    assert not out.exists()
    same = tmp_path / "plan-00000-of-00001.parquet"
    pq.write_table(table, same)
    with pytest.raises(ValueError, match="choose another folder"):
        plan_shards([same], tmp_path, 10)


# ---- two writers, ids that repeat, damage


def test_two_calls_for_one_folder_follow_each_other(table, tmp_path):
    files = cut(table, tmp_path / "in", 3)
    budgets = [400, 700]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            told = list(pool.map(lambda budget: plan_shards(files, tmp_path / "out", budget, workers=1), budgets))
            assert [summary["selected"] for summary in told] == budgets
            last = json.loads((tmp_path / "out" / MANIFEST).read_text())
            tables = [pq.read_table(tmp_path / "out" / one["file"]) for one in last["outputs"]]
            assert sum(len(part) for part in tables) == last["settings"]["budget"]
            assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("compared", [200, 10**6])
@pytest.mark.parametrize("names", [int, str])
def test_ids_that_are_counted_anew_in_each_file_are_refused(names, compared, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COMPARED_IDS", compared)
    part = pa.table({"row_id": [names(i) for i in range(2000)], "u_x": torch.rand(2000).numpy()})
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file in files:
        pq.write_table(part, file)
    seen = "[12]..?" if compared == 200 else "4000"  # many rows are compared in part
    with pytest.raises(ValueError, match=f"of {seen} rows share their id with another row.*set id_column=None"):
        plan_shards(files, tmp_path / "out", 100)
    monkeypatch.setattr(module, "COMPARED_IDS", 0)
    same = pa.table({"row_id": [1, 1, 1, 1], "u_x": [1.0, 1.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match="4 rows have the same key .* rows share their id"):
        plan_shards(cut(same, tmp_path / "in", 2), tmp_path / "out2", 2)


def test_scores_far_from_one_are_drawn_as_their_ratios_say(table, tmp_path):
    small = table.slice(0, 2000)
    drawn = []
    for k, factor in enumerate((1.0, 2.0**-900, 2.0**900)):
        scores = torch.tensor(small["u_x"].to_numpy().copy()).double() * factor
        scaled = small.set_column(1, "u_x", pa.array(scores.numpy()))
        plan = plan_shards(cut(scaled, tmp_path / str(k), 2), tmp_path / f"out{k}", 300)
        drawn.append(pa.concat_tables(pq.read_table(tmp_path / f"out{k}" / one["file"]) for one in plan["outputs"]))
    assert drawn[0].equals(drawn[1]) and drawn[0].equals(drawn[2])
