"""The ranker's example as a user would run it: alone, on two processes, and its settings."""

import json
import sys

import pytest
import torch
from test_examples import ROOT, TWO, run


SCRIPT = ROOT / "examples" / "train_ranker.py"
sys.path.insert(0, str(ROOT / "examples"))

import train_ranker  # noqa: E402

from hf_effdl.cli.work import fitting  # noqa: E402
from hf_effdl.vicl.auto import ListwiseRanker  # noqa: E402


SMALL = "--max_pool 16 --max_queries 4 --candidates 7 --label_budget 8 --lengths 3 5 --hidden_size 32".split()
SMALL += "--num_train_epochs 1 --use_cpu --disable_tqdm true".split()


def check(printed: str, out) -> dict:
    """One table; a ranker for each length; scores of every query."""
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    scores = {row[1].strip(): float(row[3]) for row in rows[2:]}
    assert set(scores) == {"nearest", "ranker", "oracle"} and len(rows) == 5
    assert scores["oracle"] >= max(scores.values())
    report = json.loads((out / "report.json").read_text())
    assert [len(each) for each in report["scores"].values()] == [4, 4, 4]
    for k in (3, 5):
        ranker = ListwiseRanker.from_pretrained(out / f"ranker-{k}")
        assert ranker.config.list_length == k and ranker.config.hidden_size == 32
        assert 0 <= report[f"ranker-{k}"]["eval_list_accuracy"] <= 1
    return report


@pytest.mark.slow
def test_it_trains_rankers_alone_and_on_two_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_ranker.main([*SMALL, "--output_dir", "one"])
    one = check(capsys.readouterr().out, tmp_path / "one")
    printed = run(*TWO, str(SCRIPT), *SMALL, "--output_dir", "two", cwd=tmp_path)
    two = check(printed, tmp_path / "two")
    assert one["scores"]["nearest"] == pytest.approx(two["scores"]["nearest"])
    assert one["scores"]["oracle"] == pytest.approx(two["scores"]["oracle"])


def test_what_looks_like_a_query_is_neither_measured_on_nor_shown(tmp_path, capsys, monkeypatch):
    tables, measure, copies = [], fitting.measure_examples, [2, 11]
    monkeypatch.setattr(fitting, "find_copies", lambda *given: copies)
    monkeypatch.setattr(fitting, "measure_examples", lambda *a, **k: tables.append(measure(*a, **k)) or tables[0])
    train_ranker.main([*SMALL, "--label_budget", "16", "--output_dir", str(tmp_path / "out")])
    check(capsys.readouterr().out, tmp_path / "out")
    candidates, _ = tables[0]
    measured = (candidates >= 0).any(1)
    assert (
        measured.sum() == 14 and not measured[copies].any() and not torch.isin(candidates, torch.tensor(copies)).any()
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["excluded"] == 2


def test_queries_to_evaluate_on_are_not_trained_on():
    model = torch.nn.Module()
    model.measured_candidates = torch.full((40, 3), -1)
    model.measured_candidates[::2, 1] = 5
    train, other = fitting.split_queries(model, 0)
    assert sorted(train + other) == list(range(0, 40, 2)) and len(other) == 2
    assert fitting.split_queries(model, 1)[1] != other
