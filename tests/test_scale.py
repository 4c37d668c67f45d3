"""Scores of shards and draws from streams equal those in memory, whatever the cut, the processes and interruptions."""

import json
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scale_run
import sft_score_run
import torch
from accelerate import PartialState
from compare import assert_close
from datasets import ClassLabel, Dataset
from forked import Script
from scale_run import COUNTS, Lengths, drawn, shards

from hf_effdl import (
    LinearProbes,
    ProbeScorer,
    UncertaintySelector,
    join_shards,
    plan_shards,
    priority_sample,
    score_shards,
    select_stream,
)
from hf_effdl.samples.scale import score_shards as module


CPU = {"ACCELERATE_USE_CPU": "true"}
TOTAL = sum(COUNTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("rows"))


def read(folder: Path, pattern: str = "scores-*.parquet") -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(Path(folder).glob(pattern))])


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in Path(folder).glob("scores-*.parquet")}


@pytest.fixture(scope="module")
def scored(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return folder, score_shards(source, folder, Lengths(), batch_rows=64)


def test_every_shard_has_its_scores_in_order(source, scored):
    folder, manifest = scored
    rows, table = pa.concat_tables([pq.read_table(file) for file in source]), read(folder)
    assert table["row_id"].equals(rows["row_id"])
    assert table["size"].to_pylist() == [len(text) for text in rows["text"].to_pylist()]
    assert table["embedding"][5].as_py() == [table["size"][5].as_py(), -table["size"][5].as_py()]
    assert [one["rows"] for one in manifest["outputs"]] == list(COUNTS) == [one["rows"] for one in manifest["inputs"]]
    assert (
        len({str(pq.read_schema(file).remove_metadata()) for file in folder.glob("scores-*")}) == 1
    )  # the empty one's too


def test_scores_go_into_a_plan_and_back_to_the_rows(source, scored, tmp_path):
    files = sorted(scored[0].glob("scores-*.parquet"))
    plan_shards(files, tmp_path / "plan", 100)
    joined = join_shards(source, sorted((tmp_path / "plan").glob("plan-*.parquet")), tmp_path / "joined")
    rows = pa.concat_tables([pq.read_table(file) for file in joined]).to_pydict()
    table, plan = read(scored[0]).to_pydict(), read(tmp_path / "plan", "plan-*").to_pydict()
    texts = {name: size for name, size in zip(table["row_id"], table["size"], strict=True)}
    assert rows["row_id"] == plan["row_id"] and rows["weight"] == plan["weight"]
    assert [len(text) for text in rows["text"]] == [texts[name] for name in rows["row_id"]]
    whole = join_shards(source, files, tmp_path / "whole")
    assert [pq.read_metadata(file).num_rows for file in whole] == list(COUNTS)
    with pytest.raises(ValueError, match="does not have there"):
        join_shards(source[::-1], files, tmp_path / "wrong")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_leave_the_same_files_and_draw_the_same_rows(processes, source, scored, tmp_path):
    Script("scale_run.py", Path(source[0]).parent, tmp_path, processes=processes, env=CPU).finish()
    for file in scored[0].glob("*scores*"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    alone = drawn(source, PartialState())
    assert json.loads((tmp_path / "drawn.json").read_text()) == alone[:]


def test_a_killed_run_goes_on_and_leaves_the_same_files(source, scored, tmp_path):
    script = Script("scale_run.py", Path(source[0]).parent, tmp_path, 0.1, env=CPU)
    script.wait_for(lambda: stamps(tmp_path))
    assert script.kill()
    finished = stamps(tmp_path)
    assert 0 < len(finished) < len(COUNTS) and not (tmp_path / module.MANIFEST).exists()
    score_shards(source, tmp_path, Lengths(), batch_rows=64)
    assert finished.items() <= stamps(tmp_path).items()
    for file in scored[0].glob("*scores*"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert not [file for file in tmp_path.iterdir() if "scores" not in file.name]  # nothing left beside them


def test_two_calls_for_one_folder_share_the_shards(source, scored, tmp_path):
    both = [Script("scale_run.py", Path(source[0]).parent, tmp_path, 0.02, env=CPU) for _ in range(2)]
    for script in both:
        script.finish()
    for file in scored[0].glob("*scores*"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_an_error_keeps_the_shards_before_it_and_names_the_row(tmp_path):
    files = shards(tmp_path / "rows", (10, 10, 10))
    table = pq.read_table(files[1]).set_column(0, "text", pa.array(["x"] * 7 + [""] + ["x"] * 2))
    pq.write_table(table, files[1])
    with pytest.raises(ValueError, match="row 7 of .*rows-1.parquet has no text"):
        score_shards(files, tmp_path / "out", Lengths())
    assert list(stamps(tmp_path / "out")) == ["scores-00000-of-00003.parquet"]


def test_finished_shards_are_kept_and_damaged_ones_scored_again(source, scored, tmp_path):
    score_shards(source, tmp_path, Lengths(), batch_rows=64)
    before = stamps(tmp_path)
    score_shards(source, tmp_path, Lengths(), batch_rows=64)
    assert stamps(tmp_path) == before
    victim, other = sorted(tmp_path.glob("scores-*"))[0], sorted(tmp_path.glob("scores-*"))[3]
    content = bytearray(victim.read_bytes())
    content[200] ^= 1
    victim.write_bytes(content)
    other.write_bytes(other.read_bytes()[:100])
    score_shards(source, tmp_path, Lengths(), batch_rows=64)
    assert {name for name, stamp in stamps(tmp_path).items() if stamp != before[name]} == {victim.name, other.name}
    assert victim.read_bytes() == (scored[0] / victim.name).read_bytes()


def test_shards_are_read_from_other_file_systems(source, scored, tmp_path):
    memory = fsspec.filesystem("memory")
    for file in source:
        memory.pipe(f"/pool/{Path(file).name}", Path(file).read_bytes())
    score_shards([f"memory://pool/{Path(file).name}" for file in source], tmp_path, Lengths(), batch_rows=64)
    assert read(tmp_path).equals(read(scored[0]))


def test_without_ids_rows_are_numbered_through_all_files(tmp_path):
    score_shards(shards(tmp_path / "rows", (5, 3), ids=False), tmp_path / "out", Lengths(), batch_rows=2)
    assert read(tmp_path / "out")["row_id"].to_pylist() == list(range(8))


class Another(Lengths):
    key = "another"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scorer": Another()}, "scores of another scorer"),
        ({"batch_rows": 3}, "scores of another settings"),
        ({"files": lambda files, folder: shards(folder, (4, 4, 4))}, "another .*number of shards|another shards"),
        ({"files": lambda files, folder: []}, "one file or more"),
        ({"id_column": "name"}, "has no column 'name'"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"truncated": True}, "is not a whole Parquet file"),
        ({"changed": True}, "scores of another"),
        ({"files": lambda files, folder: [files[0], f"{folder}/./rows-0.parquet"]}, "each of them once"),
        ({"output_dir": "s3://bucket/scores"}, "is a URL; pass a folder"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message, tmp_path):
    files = shards(tmp_path / "rows", (4, 4))
    score_shards(files, tmp_path / "out", Lengths())
    before, options = stamps(tmp_path / "out"), {"batch_rows": 1024} | change
    if options.pop("truncated", False):
        Path(files[1]).write_bytes(Path(files[1]).read_bytes()[:-20])
    if options.pop("changed", False):
        pq.write_table(pq.read_table(files[0]).slice(1), files[0])
    files = options.pop("files", lambda files, folder: files)(files, tmp_path / "rows")
    with pytest.raises(ValueError, match=message):
        score_shards(files, options.pop("output_dir", tmp_path / "out"), options.pop("scorer", Lengths()), **options)
    assert stamps(tmp_path / "out") == before


def made_by(change) -> Lengths:
    """A scorer that gives what `change` makes of the scores."""
    scorer = Lengths()
    plain = scorer.score_rows
    scorer.score_rows = lambda *given, **options: change(plain(*given, **options))
    return scorer


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table | {"row_id": table["size"]}, "gives .*'row_id'.*it must give scores, by names but"),
        (lambda table: {}, r"gives \[\] for rows 0 to 3 of .*rows-0.parquet"),
        (lambda table: {"a": table["size"][1:]}, r"'a' of shape \(3,\) .*one number, or one vector, for each of 4"),
        (lambda table: {"a": torch.ones(4, 2, 2)}, r"'a' of shape \(4, 2, 2\)"),
        (lambda table: {"a": ["big"] * 4}, "'a' of the scorer are no numbers"),
        (lambda table: [1.0] * 4, "score_rows returned is a list"),
    ],
)
def test_what_a_scorer_must_not_give_is_refused(change, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        score_shards(shards(tmp_path / "rows", (4,)), tmp_path / "out", made_by(change))


def test_arrays_and_lists_of_a_scorer_count_as_tensors(tmp_path):
    files = shards(tmp_path / "rows", (4,))
    score_shards(files, tmp_path / "plain", Lengths())
    kinds = {
        "u_x": lambda x: x.numpy(),
        "size": lambda x: x.tolist(),
        "embedding": lambda x: x.clone().requires_grad_(),
    }
    scorer = made_by(lambda table: {name: kinds[name](values) for name, values in table.items()})
    score_shards(files, tmp_path / "out", scorer)
    assert read(tmp_path / "out").equals(read(tmp_path / "plain"))


@pytest.mark.parametrize(
    "ids, error, message",
    [
        (pa.array([1.5, 2, 3]), TypeError, "column 'row_id' is of type double; cast it to integers or texts"),
        (pa.array([[1], [2], [3]]), TypeError, "column 'row_id' is of type list"),
        (pa.array(["a", "b", "c"]), TypeError, "'row_id' is of type string, in .* of int64; make them alike"),
        (pa.array([1, None, 3]), ValueError, "rows without 'row_id'"),
    ],
)
def test_ids_that_name_no_rows_are_refused(ids, error, message, tmp_path):
    first, other = tmp_path / "0.parquet", tmp_path / "1.parquet"
    for file, names in ((first, pa.array([7, 8, 9])), (other, ids)):
        pq.write_table(pa.table({"text": ["a", "bb", "c"], "row_id": names}), file)
    with pytest.raises(error, match=message):
        score_shards([first, other], tmp_path / "out", Lengths())
    assert len(stamps(tmp_path / "out")) == (error is ValueError)  # a missing one is seen when it is read


def test_columns_that_data_sets_do_not_know_are_left_aside(tmp_path):
    columns = {"text": ["a", "bb"], "tags": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int32()))}
    columns |= {"kind": pa.array(["x", "y"]).dictionary_encode(), "none": pa.nulls(2)}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    score_shards([tmp_path / "0.parquet"], tmp_path / "out", Lengths())
    assert read(tmp_path / "out")["size"].to_pylist() == [1, 2]


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"outputs": 3}', '{"outputs": [{}]}'])
def test_a_damaged_manifest_is_written_anew(manifest, source, scored, tmp_path):
    score_shards(source, tmp_path, Lengths(), batch_rows=64)
    before = stamps(tmp_path)
    (tmp_path / module.MANIFEST).write_text(manifest)
    assert score_shards(source, tmp_path, Lengths(), batch_rows=64) == scored[1] and stamps(tmp_path) == before


def test_tables_of_others_are_not_written_over_nor_read_with(source, tmp_path):
    out, precious = tmp_path / "out", pa.table({"precious": [1, 2]})
    out.mkdir()
    pq.write_table(precious, out / f"scores-00000-of-{len(COUNTS):05d}.parquet")
    with pytest.raises(ValueError, match="was not written by score_shards"):
        score_shards(source, out, Lengths())
    assert read(out).equals(precious)


def test_joined_files_are_not_written_over_their_sources_nor_beside_others(source, scored, tmp_path):
    tables = sorted(scored[0].glob("scores-*.parquet"))
    first = join_shards(source, tables, tmp_path)
    whole, few = [file.read_bytes() for file in first], tmp_path / "few.parquet"
    pq.write_table(read(scored[0]).slice(0, 5), few)
    with pytest.raises(ValueError, match="does not have there"):
        join_shards(source, [few, *tables[1:-1], few], tmp_path)
    assert [file.read_bytes() for file in first] == whole  # none is replaced without the others
    ids = [Path(scored[0]) / "ids.parquet"]
    pq.write_table(read(scored[0]).select(["row_id"]).slice(0, COUNTS[0]), ids[0])
    with pytest.raises(ValueError, match="joined-00000-of-00005.parquet is of another number of files"):
        join_shards(source[:1], tables[:1], tmp_path)
    alone = join_shards(source[:1], tables[:1], tmp_path / "alone")
    before = alone[0].read_bytes()
    with pytest.raises(ValueError, match="is read and would be overwritten"):
        join_shards(alone, ids, tmp_path / "alone")
    assert alone[0].read_bytes() == before and len(first) == len(COUNTS)
    ids[0].unlink()


def test_rows_known_by_their_number_are_joined_with_the_files_that_were_scored(tmp_path):
    files = shards(tmp_path / "rows", (6, 6))  # which have a row_id of their own
    score_shards(files, tmp_path / "out", Lengths(), id_column=None)
    tables = sorted((tmp_path / "out").glob("scores-*"))
    plan_shards(tables, tmp_path / "plan", 8)
    for given in (tables, sorted((tmp_path / "plan").glob("plan-*"))):
        join_shards(files, given, tmp_path / "joined", id_column=None)
        with pytest.raises(ValueError, match="knows rows by their number, .*; pass id_column=None"):
            join_shards(files, given, tmp_path / "joined")
        with pytest.raises(ValueError, match="in the same order"):
            join_shards(files[::-1], given, tmp_path / "joined", id_column=None)
    os.utime(files[0], (1, 1))
    with pytest.raises(ValueError, match="which was changed since: pass files as"):
        join_shards(files, tables, tmp_path / "joined", id_column=None)


def test_no_flipped_bit_of_a_table_is_joined(tmp_path):
    files = shards(tmp_path / "rows", (9,))
    score_shards(files, tmp_path / "out", Lengths())
    table = next((tmp_path / "out").glob("scores-*"))
    content = table.read_bytes()
    for i in range(0, len(content), 11):
        changed = bytearray(content)
        changed[i] ^= 1 << (i % 8)
        table.write_bytes(changed)
        with pytest.raises(ValueError, match="scores-00000-of-00001.parquet"):
            join_shards(files, [table], tmp_path / "joined")


# ---- the scorers of the package


def test_language_scores_of_shards_are_those_in_memory(tmp_path):
    rows, made = sft_score_run.ROWS, sft_score_run.scorer()
    for k in range(2):
        pq.write_table(
            rows.select(range(12 * k, min(20, 12 * k + 12))).with_format("arrow")[:], tmp_path / f"{k}.parquet"
        )
    score_shards([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "out", made, batch_rows=6)
    table, whole = read(tmp_path / "out"), made.table(made.score(rows))
    for name, values in whole.items():
        assert table[name].to_pylist() == values.tolist(), name


def test_probe_scores_of_shards_are_those_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(160, 4, generator=generator), torch.arange(160) % 3
    x[:, 0] += y
    data = Dataset.from_dict({"features": x.tolist(), "label": y.tolist()}).cast_column("label", ClassLabel(3))
    probes = LinearProbes.train(None, data.select(range(60)), input_column="features")
    pool = data.select(range(60, 160))
    pq.write_table(pool.with_format("arrow")[:], tmp_path / "0.parquet")
    score_shards([tmp_path / "0.parquet"], tmp_path / "out", ProbeScorer(probes), batch_rows=40)
    table, whole = read(tmp_path / "out"), UncertaintySelector(probes).score(pool)
    assert set(table.column_names) == (set(whole.column_names) - {*pool.column_names, "p_clean", "score_key"}) | {
        "row_id"
    }
    for name in set(table.column_names) - {"row_id"}:
        assert_close(torch.tensor(table[name].to_pylist()), torch.tensor(whole[name]), 1e-6)
    pool.cast_column("label", ClassLabel(names=["2", "1", "0"])).to_parquet(tmp_path / "1.parquet")
    with pytest.raises(ValueError, match="the data set's classes and the probes' differ: in another order"):
        score_shards([tmp_path / "1.parquet"], tmp_path / "other", ProbeScorer(probes))


# ---- streams


def rows_of(source) -> list[dict]:
    return pa.concat_tables([pq.read_table(file) for file in source]).to_pylist()


@pytest.mark.parametrize("budget", [1, 50, TOTAL])
def test_a_draw_from_a_stream_is_the_draw_in_memory(source, budget):
    rows = rows_of(source)
    sizes, ids = (
        torch.tensor([len(row["text"]) for row in rows]).double() / 3,
        torch.tensor([row["row_id"] for row in rows]),
    )
    positions, weights = priority_sample(sizes, budget, row_ids=ids, seed=4)
    expected = {int(ids[i]): weight for i, weight in zip(positions.tolist(), weights.tolist(), strict=True)}
    for order in (1, -1):
        chosen = select_stream(iter(rows[::order]), budget, Lengths(), id_column="row_id", seed=4, batch_rows=100)
        assert chosen["row_id"] == sorted(expected)
        assert [1 / p for p in chosen["inclusion_probability"]] == pytest.approx(
            [expected[i] for i in chosen["row_id"]]
        )
        assert sum(chosen["weight"]) / budget == pytest.approx(1)


def test_a_stream_may_bring_its_scores_and_its_numbers():
    rows = [{"text": "a" * i, "hard": float(i)} for i in range(1, 101)]
    chosen = select_stream(rows, 10, score="hard", weights="none")
    assert chosen["weight"] == [1.0] * 10 and len(set(chosen["text"])) == 10
    assert chosen["text"] == select_stream(rows, 10, score="hard", batch_rows=7)["text"]
    assert len(select_stream(iter(rows), 20, score="uniform")) == 20


@pytest.mark.parametrize(
    "rows, changes, message",
    [
        ([{"text": "a", "u_x": -1.0}], {}, "'u_x' is -1.0 in row 0"),
        ([{"text": "a", "u_x": None}], {}, "'u_x' is nan in row 0"),
        ([{"text": "a"}], {}, "but no 'u_x'"),
        ([{"text": "a", "u_x": 1.0, "id": 3}] * 3, {"id_column": "id"}, "share their id"),
        ([{"text": "a", "u_x": 1.0}], {"id_column": "id"}, "row 0 of the stream has no 'id'"),
        ([{"text": "a", "u_x": 1.0}], {"budget": 2}, "2"),
        ([{"text": "a", "u_x": 1.0}], {"weights": "best"}, "weights='best'"),
        ([{"u_x": "big"}], {}, "'u_x' in a row of the stream='big'"),
        (["a", "b"], {}, "row 0 of the stream is a str: pass rows as dicts"),
        ([{"u_x": 1.0}], {"weights": "p_label"}, "weights='p_label' needs 'p_label', which row 0"),
        (
            [{"u_x": 1.0}, {"e": 1.0}],
            {"score": "e", "weights": "damped"},
            "'e' is nan in row 0|needs 'u_x', which row 1",
        ),
        ([{"u_x": 1.0, "weight": 2.0}], {}, r"the columns \['weight'\] already"),
        ([{"text": "a", "u_x": 1.0, "size": 3}], {"scorer": Lengths()}, r"the columns \['size', 'u_x'\] already"),
        (
            [{"text": "a"}],
            {"scorer": made_by(lambda table: {"u_x": torch.ones(3)})},
            r"'u_x' of shape \(3,\) for rows 0",
        ),
        ([{"u_x": 1.0, "id": 1.5}] * 2, {"id_column": "id"}, "integers or texts|one integer or text"),
    ],
)
def test_streams_that_cannot_be_drawn_from_are_refused(rows, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        select_stream(rows, **{"budget": 1} | changes)


def test_rows_keep_columns_that_only_some_have():
    chosen = select_stream([{"u_x": 1.0}, *({"u_x": 1.0, "note": i} for i in range(3))], 4)
    assert chosen["note"] == [None, 0, 1, 2]


def test_memory_of_a_stream_does_not_grow_with_it(monkeypatch):
    from hf_effdl.samples.scale import streams

    most = []
    extend = streams._Best._extend
    monkeypatch.setattr(streams._Best, "_extend", lambda self, *new: extend(self, *new) or most.append(len(self.rows)))
    select_stream(({"u_x": 1.0} for _ in range(20_000)), 100)
    assert max(most) <= 2 * 100 + 256
    assert scale_run.COUNTS == COUNTS
