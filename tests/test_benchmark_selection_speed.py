"""The benchmark of selection speed: rows, skipping, table, and that the arms which are compared do the same."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_effdl import aggregate_rankings
from hf_effdl.vicl.remote_code.ranker_designs import covering_design


FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
K, WIDTH, POOL = 12, 32, 20


@pytest.fixture(scope="module")
def speed():
    """The script, imported by name as `python examples/benchmarks/...` would import what it shares."""
    before, threads = list(sys.path), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("selection_speed")
    sys.path[:] = before
    torch.set_num_threads(threads)


def arguments(folder: Path, *parts: str) -> list[str]:
    sizes = {
        "candidates": K,
        "width": WIDTH,
        "side": 2,
        "grids": f"2x{WIDTH}",
        "pool": POOL,
        "queries": 6,
        "rounds": 2,
        "edge_list": 3,
        "threads": 1,
        "out": folder / "rows.jsonl",
        "cache": folder / "cache",
    }
    given = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    return [*given, "--answers", "16", "60", "--parts", *parts]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_ranker_beside_a_bare_forward(speed, tmp_path, capsys):
    speed.main(arguments(tmp_path, "ranker"))
    found, said = rows(tmp_path), capsys.readouterr().out
    assert [(row["net"], row["batch"]) for row in found] == [
        (net, batch) for net in ("released", "default") for batch in (1, 8)
    ]
    lists = {k: len(covering_design(K, k)) for k in (5, 10)}
    for row in found:
        assert row["lists"] == {str(k): count for k, count in lists.items()}
        assert row["scores_apart"] < 1e-4 and 0 < row["ratio"] and row["goal_reached"] == (row["ratio"] <= 1.3)
        # a block's six layers of d x d over all tokens but of the last block, whose other tokens only are looked at
        first = sum(count * (k + 1) for k, count in lists.items())
        tokens = 2 * 5 * first * 6 + 5 * first * 2 + first * 4 + (3 * first * 6 if row["net"] == "released" else 0)
        assert 1 < row["gflop_a_query"] / (2 * tokens * WIDTH**2 / 1e9) < 1.25  # attention, labels and the score
        assert row["choice_ms"] <= row["choice_median_ms"] and row["threads"] == 1 and row["date"] and row["load"] > 0
    assert "| released | 8 | float32 |" in said

    speed.main(arguments(tmp_path, "ranker"))
    assert rows(tmp_path) == found
    table = capsys.readouterr().out
    assert said.endswith(table)
    speed.main([*arguments(tmp_path, "ranker"), "--table"])
    assert capsys.readouterr().out == table
    speed.main([*arguments(tmp_path, "ranker"), "--candidates", str(K + 1)])
    assert [row["candidates"] for row in rows(tmp_path)] == [K] * 4 + [K + 1] * 4


def test_what_is_made_of_the_seconds(speed, tmp_path, monkeypatch):
    taken = {"choice": [4.0, 9.0, 2.0, 3.0], "bare": [2.0, 3.0, 2.0, 2.0], "all": [3.0, 1.0, 2.0]}
    monkeypatch.setattr(speed, "take_turns", lambda calls, *options: {name: taken[name] for name in calls})
    monkeypatch.setattr(speed, "NETS", {"default": {}})
    speed.main(arguments(tmp_path, "ranker", "aggregation"))
    one, eight, *others, listed = rows(tmp_path)
    assert one["ratio"] == 1.75 and one["ratio_of_minima"] == 1.0 and not one["goal_reached"]
    assert (one["choice_ms"], one["choice_median_ms"], one["bare_ms"]) == (2000, 3500, 2000)
    assert (eight["choice_ms"], eight["bare_ms"]) == (250, 250)
    assert [row["seconds"] for row in others] == [1.0] * 4 and listed["seconds"] == 2.0  # 3 of 6 queries timed


def test_least_squares_on_an_edge_list(speed):
    drawn = torch.Generator().manual_seed(0)
    lists = torch.stack([torch.randperm(7, generator=drawn)[:4] for _ in range(20)])
    lists[::3, 3] = -1
    torch.testing.assert_close(speed.edge_list(lists, 7), aggregate_rankings(lists, 7))


def test_seconds_of_turns_and_of_stages(speed):
    order, place = [], SimpleNamespace(wait=lambda: time.sleep(0.01))
    calls = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), place.wait())}
    seconds = speed.take_turns(calls, 2, "cpu")
    assert order == ["b", "a", "a", "b", "b", "a"] and [len(of) for of in seconds.values()] == [2, 2]
    assert min(seconds["b"]) >= 0.01 > min(seconds["a"])
    wait = place.wait
    with speed.stopwatches(("wait", place, "wait")) as found:
        place.wait()
        place.wait()
    assert found["wait"] >= 0.02 and place.wait is wait


@pytest.mark.parametrize(
    ("row", "reached"),
    [
        ({"part": "ranker", "ratio": 1.31, "device": "cpu"}, False),
        ({"part": "ranker", "ratio": 9.0, "choice_ms": 2.9, "device": "cuda"}, True),
        ({"part": "cascade", "grid": [14, 14, 96], "total_ms": 20.1}, False),
        ({"part": "cascade", "grid": [14, 14, 96], "total_ms": 19.9}, True),
        ({"part": "aggregation", "way": "one by one", "seconds": 1.1}, False),
    ],
)
def test_goals(speed, row, reached):
    assert speed.goal_reached(row) is reached
