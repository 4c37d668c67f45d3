"""The selection benchmark: rows, skipping and table."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "selection_digits.py"
ENSEMBLE = "the probes' mean prediction"
SMALL = ("--pairs", "1", "--cells", "digits", "--arms", "default", "A uniform by class")


@pytest.fixture(scope="module")
def main():
    before, threads = list(sys.path), torch.get_num_threads()
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("selection_digits").main
    sys.path[:] = before
    torch.set_num_threads(threads)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the script ran as a user would run it."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, str(SCRIPT), "--out", "rows.jsonl", *SMALL]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_it_writes_a_row_per_cell_arm_and_pair(folder):
    found = rows(folder)[:8]
    cells = [f"digits, {kind}, r={r}" for kind in ("clean", "20% flips") for r in (100, 400)]
    assert [(row["cell"], row["arm"], row["pair"]) for row in found] == [
        (cell, arm, 0) for cell in cells for arm in ("default", "A uniform by class")
    ]
    of = {(row["cell"], row["arm"]): row for row in found}
    for cell in cells:
        default = of[cell, "default"]
        assert default["accuracy"] > 0.85
        assert default["regime"] in (("agreement",) if "flips" in cell else ("clipped", "unclipped"))
        assert ("flips" in cell) == (default["trial"] is None) == (default["mix"] > 0.1)
        assert "flips" not in cell or default["accuracy"] > of[cell, "A uniform by class"]["accuracy"] + 0.05


@pytest.mark.slow
def test_rows_already_there_are_skipped_and_the_table_has_all_arms(folder, main, capsys):
    out, before = str(folder / "rows.jsonl"), rows(folder)
    main(["--out", out, *SMALL, ENSEMBLE])
    table = capsys.readouterr().out
    added = rows(folder)[len(before) :]
    assert rows(folder)[: len(before)] == before and [row["arm"] for row in added] == [ENSEMBLE] * 4
    lines = table.splitlines()
    header = next(line for line in lines if line.startswith("| arm |"))
    assert header.count("r=") == 4
    for arm in ("default", "A uniform by class", ENSEMBLE):
        line = next(line for line in lines if line.startswith(f"| {arm} |"))
        assert line.count("|") == header.count("|")
    main(["--out", out, "--table"])
    assert capsys.readouterr().out == table


@pytest.mark.slow
def test_long_tails_are_tested_twice(tmp_path, main, capsys):
    main(["--out", str(tmp_path / "rows.jsonl"), "--pairs", "1", "--cells", "tail", "--arms", "uniform", ENSEMBLE])
    assert all(row["accuracy"] != row["accuracy, pool's shares"] for row in rows(tmp_path))
    assert capsys.readouterr().out.splitlines()[2].count("pool's shares") == 4


def test_an_unknown_arm_is_refused(tmp_path, main, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "rows.jsonl"), "--arms", "AGG"])
    assert "no arms ['AGG']" in capsys.readouterr().err and not any(tmp_path.iterdir())
