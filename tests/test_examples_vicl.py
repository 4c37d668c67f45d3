"""The visual in-context example runs as a user would run it: alone, under accelerate, on two processes."""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from test_examples import ROOT, TWO, run


SCRIPT = ROOT / "examples" / "vicl_seggpt.py"
sys.path.insert(0, str(ROOT / "examples"))

import vicl_seggpt  # noqa: E402
from digit_scenes import make_scenes  # noqa: E402


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Digit scenes as they would lie on disk, and a YAML file that names them and the tiny SegGPT."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = make_scenes(32, split="test", task="segmentation", seed=0)
    data = DatasetDict(train=Dataset.from_list(rows[:24]), test=Dataset.from_list(rows[24:]))
    data.save_to_disk(folder / "data")
    file = folder / "run.yaml"
    file.write_text(
        f"dataset_name: {folder / 'data'}\nlabel_column: mask\nmodel: {ROOT / 'model_cards' / 'tiny-seggpt-digits'}\n"
        "candidates: 8\nlabel_budget: 6\ncompare: [random, oracle]\nbatch_size: 3\n"
    )
    return file


def scores(printed: str) -> dict[str, float]:
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    return {row[1].strip(): float(row[3]) for row in rows[2:]}


def test_it_measures_the_pool_and_compares_strategies(config, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--strategy", "transfer", "--num_examples", "2"]
    vicl_seggpt.main(["--config", str(config), "--output_dir", str(out), *given])
    of = scores(capsys.readouterr().out)
    assert set(of) == {"transfer", "random", "oracle"} and of["oracle"] >= of["random"]
    assert len(list((out / "performance").rglob("*.safetensors"))) == 1  # six images are one part
    rows = json.loads((out / "examples.json").read_text())
    assert [row["query"] for row in rows] == list(range(8))
    assert all(len(row["example_ids"]) == len(row["scores"]) == 2 for row in rows)
    assert (out / "examples.png").stat().st_size > 1000


@pytest.mark.slow
def test_one_process_and_two_choose_the_same_examples(config, tmp_path):
    arguments = (str(SCRIPT), "--config", str(config), "--strategy", "dense", "--output_dir")
    alone = run(sys.executable, *arguments, "one", cwd=tmp_path)
    two = run(*TWO, *arguments, "two", cwd=tmp_path)
    assert scores(alone) == scores(two) and set(scores(alone)) == {"dense", "random", "oracle"}
    assert two.count("| dense |") == 1  # the first process alone reports
    assert scores(alone)["oracle"] >= max(scores(alone)["dense"], scores(alone)["random"])
    chosen = [json.loads((tmp_path / name / "examples.json").read_text()) for name in ("one", "two")]
    assert [row["example_ids"] for row in chosen[0]] == [row["example_ids"] for row in chosen[1]]
    assert [row["query"] for row in chosen[0]] == list(range(8))
    assert (tmp_path / "one" / "examples.png").stat().st_size > 1000


def test_what_is_not_there_is_named(config, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"has splits \['train', 'test'\], not --pool_split 'pool'"):
        vicl_seggpt.main(["--config", str(config), "--pool_split", "pool", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        vicl_seggpt.parse(["--config", str(config), "--strategy", "cascade"])
    assert "invalid choice: 'cascade'" in capsys.readouterr().err
