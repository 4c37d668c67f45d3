"""The scripts for instruction data and for labelling in rounds run from end to end."""

import csv
import importlib
import json

import pytest
from chat import conversations, llama, tokenizer
from conftest import ROOT
from datasets import Dataset, DatasetDict


@pytest.fixture
def script(monkeypatch):
    """Loads a script by its name."""

    def load(name: str):
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it by its old name
def test_rows_are_chosen_and_a_model_is_tuned_on_them(script, model, tmp_path, capsys):
    pytest.importorskip("trl")
    DatasetDict(train=Dataset.from_dict(conversations(40))).save_to_disk(tmp_path / "data")
    command = {"model_name_or_path": model, "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}
    command |= {"eval_rows": 5, "seed_rows": 10, "num_probes": 2, "probe_steps": 2, "budget": 300, "max_steps": 2}
    command |= {"report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    argv = [text for name, value in command.items() for text in (f"--{name}", str(value))]
    script("select_then_sft").main([*argv, "--compare", "--disable_tqdm", "true", "--save_strategy", "no"])
    printed = capsys.readouterr().out
    assert "chosen: " in printed and "of 25 rows, held-out loss" in printed and "random: " in printed
    assert (tmp_path / "out" / "chosen" / "adapter_model.safetensors").is_file()


def test_strategies_are_compared_on_digits(script, tmp_path, capsys):
    script("active_learning").main(
        ["--output_dir", str(tmp_path), "--rounds", "2", "--strategies", "default", "random"]
    )
    printed = capsys.readouterr().out
    assert "default     20: 0." in printed and "40: 0." in printed and (tmp_path / "curves.png").is_file()


def test_texts_are_labelled_by_a_person(script, tmp_path, model, capsys):
    text = [f"w{i % 20} w{i % 7}" for i in range(60)]
    Dataset.from_dict({"text": text}).to_csv(tmp_path / "texts.csv")
    command = ["--dataset_name", str(tmp_path / "texts.csv"), "--model_name_or_path", model, "--batch", "8"]
    command += ["--classes", "even", "odd", "--output_dir", str(tmp_path), "--rounds", "2"]
    for number in range(2):
        script("active_learning").main(command)
        assert "8 of 8 labels are missing" in capsys.readouterr().out
        file = tmp_path / f"asked-{number:04d}.csv"
        with open(file, encoding="utf-8-sig", newline="") as opened:
            rows = [row | {"label": ("even", "odd")[len(row["text"]) % 2]} for row in csv.DictReader(opened)]
        with open(file, "w", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    script("active_learning").main(command)
    assert "16 labelled rows" in capsys.readouterr().out
    with open(tmp_path / "labelled.csv", newline="") as opened:
        assert {row["label"] for row in csv.DictReader(opened)} == {"even", "odd"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_benchmark_of_instruction_data_runs_and_goes_on(script, model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    bench = script("selection_sft")
    talk = [
        [(row[0]["content"], row[1]["content"]) for row in conversations(60, kind, 1)["messages"]] for kind in range(4)
    ]
    monkeypatch.setattr(bench, "read", lambda kind: talk[bench.KINDS.index(kind)])
    monkeypatch.setattr(bench, "LEAST", 1)
    command = [
        "--model",
        model,
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "rows.jsonl"),
        "--rows",
        "8",
    ]
    command += ["--seeds", "0", "--damage", "0.4", "--epochs", "1"]
    bench.main([*command, "--arms", "balanced", "clean"])
    bench.main([*command, "--arms", "balanced", "clean", "default", "nearest", "base"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["scores", "balanced", "clean", "default", "nearest", "base"]
    assert rows[2]["spoilt"] == 0 < rows[1]["spoilt"] and rows[1]["tokens"] <= 0.4 * 32 * 20
    assert "| default |" in capsys.readouterr().out


def test_the_benchmark_of_rounds_runs_and_goes_on(script, tmp_path, capsys):
    bench = script("active_rounds")
    command = ["--out", str(tmp_path / "rows.jsonl"), "--seeds", "0", "--rounds", "2"]
    bench.main([*command, "--strategies", "random"])
    bench.main([*command, "--strategies", "random", "typical"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["strategy"] for row in rows] == ["random", "typical"] and len(rows[0]["curve"]) == 2
    assert "| typical |" in capsys.readouterr().out
