"""Shards scored by actors of Ray Data are those that one process scores."""

import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scale_run import COUNTS, Lengths, shards

from hf_effdl import score_shards, score_shards_on_ray


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    yield
    ray.shutdown()


@pytest.mark.slow
def test_actors_leave_what_one_process_leaves_and_go_on_after_an_error(cluster, tmp_path):
    files = shards(tmp_path / "rows")
    alone = score_shards(files, tmp_path / "alone", Lengths(), batch_rows=64)
    text = pq.read_table(files[2])
    pq.write_table(text.set_column(text.column_names.index("text"), "text", pa.array([""] * len(text))), files[2])
    options = {"batch_rows": 64, "actors": 2, "num_cpus": 0.5}
    with pytest.raises(RuntimeError, match="1 of 5 shards were not scored, .*rows-2.parquet: ValueError: row 0"):
        score_shards_on_ray(files, tmp_path / "out", Lengths(), **options)
    finished = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("scores-*")}
    assert len(finished) == len(COUNTS) - 1 and not (tmp_path / "out" / "_scores.json").exists()
    pq.write_table(text, files[2], row_group_size=100)
    done = score_shards_on_ray(files, tmp_path / "out", Lengths(), **options)
    for one in alone["outputs"]:
        mine, theirs = (pq.read_table(tmp_path / folder / one["file"]) for folder in ("out", "alone"))
        assert mine.equals(theirs) and one["rows"] == len(mine)
        assert finished.get(one["file"], 0) in (0, (tmp_path / "out" / one["file"]).stat().st_mtime_ns)
    assert done["scorer"] == "lengths" and score_shards(files, tmp_path / "out", Lengths(), batch_rows=64) == done


def test_without_ray_the_name_is_there_and_says_what_to_install(monkeypatch, tmp_path):
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'needs Ray: pip install "ray'):
        score_shards_on_ray(shards(tmp_path, (3,)), tmp_path / "out", Lengths())
