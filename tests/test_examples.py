"""The examples run as a user would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# two processes, which may leave no thread of gloo's behind
TWO = (str(BIN / "torchrun"), "--nproc_per_node", "2", str(ROOT / "tests" / "support" / "threads_left.py"))
SCRIPT = ROOT / "examples" / "sparsify_image_classifier.py"


def run(*command: str, cwd: Path) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_EFFDL_DATA": str(DATA)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A data set and a model as they would lie on disk, and a YAML file that names them."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    pictures = [Picture.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)) for _ in range(40)]
    features = Features({"image": Image(), "label": ClassLabel(names=["left", "right"])})
    data = Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(40)]}, features=features)
    DatasetDict(train=data).save_to_disk(folder / "data")
    net = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(net).save_pretrained(folder / "model")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder / "model")
    file = folder / "run.yaml"
    file.write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset_name: {folder / 'data'}\nuse_cpu: true\n"
        "per_device_train_batch_size: 4\ndisable_tqdm: true\nmacs: 0.6\neval_strategy: epoch\n"
    )
    return file


def check(folder: Path) -> None:
    report = json.loads((folder / "slim" / "config.json").read_text())["effdl_report"]
    assert report["macs"]["ratio"] <= 0.6
    assert (folder / "sparse_path.safetensors").is_file() and (folder / "README.md").is_file()
    ResNetForImageClassification.from_pretrained(folder / "slim")


def test_the_classifier_example_runs_under_accelerate_launch(config, tmp_path):
    out = run(
        str(BIN / "accelerate"),
        "launch",
        "--cpu",
        str(SCRIPT),
        "--config",
        str(config),
        "--max_steps",
        "2",
        "--output_dir",
        "out",
        cwd=tmp_path,
    )
    assert "median unit" in out
    check(tmp_path / "out")


def test_the_classifier_example_runs_on_two_processes_and_reports_once(config, tmp_path):
    out = run(
        *TWO,
        str(SCRIPT),
        "--config",
        str(config),
        "--max_steps",
        "2",
        "--output_dir",
        "out",
        "--widths",
        "free",
        cwd=tmp_path,
    )
    assert out.count("median unit") == 1 and out.count("slim model in") == 1
    import hf_effdl  # noqa: F401 - knows the free widths

    check(tmp_path / "out")


SELECT = ROOT / "examples" / "select_then_train.py"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of two topics and a model for them on disk, and a YAML file that names them."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = [["cat", "dog", "cow"], ["car", "bus", "van"]]
    rows = {
        "text": [" ".join(rng.choice(words[i % 2], 4)) for i in range(120)],
        "topic": [["animal", "vehicle"][i % 2] for i in range(120)],
    }
    DatasetDict(train=Dataset.from_dict(rows)).save_to_disk(folder / "data")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words[0], *words[1]]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "model")
    net = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForSequenceClassification(net).save_pretrained(folder / "model")
    file = folder / "run.yaml"
    file.write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset_name: {folder / 'data'}\nlabel_column: topic\n"
        "use_cpu: true\nbudget: 0.3\ndisable_tqdm: true\nmax_steps: 2\ncompare: true\nlearning_rate: 0.02\n"
    )
    return file


def check_selection(out: str, folder: Path) -> None:
    assert out.count("26 of 86 rows selected") == 1 and out.count("selected rows: accuracy") == 1
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["selected"] == 26 and (folder / "report" / "selection.png").stat().st_size > 1000
    for name in ("selected", "random"):
        BertForSequenceClassification.from_pretrained(folder / name)


def test_the_selection_example_runs_under_accelerate_launch(texts, tmp_path):
    out = run(
        str(BIN / "accelerate"),
        "launch",
        "--cpu",
        str(SELECT),
        "--config",
        str(texts),
        "--output_dir",
        "out",
        cwd=tmp_path,
    )
    check_selection(out, tmp_path / "out")


def test_the_selection_example_trains_probes_on_two_processes(texts, tmp_path):
    out = run(
        *TWO,
        str(SELECT),
        "--config",
        str(texts),
        "--output_dir",
        "out",
        "--probes",
        "trained",
        "--num_probes",
        "2",
        cwd=tmp_path,
    )
    check_selection(out, tmp_path / "out")
    assert len(list((tmp_path / "out" / "probes").glob("probe-*/probe.safetensors"))) == 2


def test_a_yaml_file_with_an_unknown_name_is_refused(config, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(config.read_text() + "learning_rat: 0.1\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(bad), "--output_dir", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode != 0 and "learning_rat" in done.stderr


def test_the_quickstart_runs_and_leaves_its_pictures_and_cards(tmp_path):
    out = run(
        sys.executable,
        str(ROOT / "examples" / "quickstart.py"),
        "--epochs",
        "1",
        "--tune-epochs",
        "1",
        "--select-epochs",
        "1",
        "--queries",
        "6",
        "--scenes",
        "24",
        "--out",
        "quick",
        cwd=tmp_path,
    )
    assert "| slim, fine-tuned |" in out and "a stock config" in out and "| chosen, 227 rows |" in out
    assert "| grown" in out
    scores = {row.split("|")[1].strip(): row.split("|")[2] for row in out.splitlines() if row.startswith("|")}
    assert float(scores["oracle"]) >= max(float(scores[name]) for name in ("random", "nearest", "dense"))
    for file in (
        "prompts/prompts.png",
        "prompts/model/README.md",
        "prompts/model/model.safetensors",
        "prompts/model/config.json",
        "selection/selection.png",
        "selection/examples.png",
        "selection/report.json",
        "slim/README.md",
        "slim/sparse_path.png",
        "slim/model.safetensors",
        "growth.png",
        "README.md",
        "sparse_path.safetensors",
    ):
        assert (tmp_path / "quick" / file).stat().st_size > 1000, file


def test_the_benchmark_writes_a_row_per_arm_and_seed_and_skips_those_it_has(data_folder, tmp_path):
    command = (
        sys.executable,
        str(ROOT / "examples" / "benchmarks" / "structure_mnist.py"),
        "--net",
        "lenet",
        "--seeds",
        "1",
        "--rows",
        "1024",
        "--set",
        "epochs=1",
        "tune=1",
        "--out",
        "rows.jsonl",
        "--arms",
    )
    table = run(*command, "path, early", cwd=tmp_path)
    assert "| path, early |" in table
    table = run(*command, "path, early", "global L2", cwd=tmp_path)
    assert "| path, early |" in table and "| global L2 |" in table
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["path, early", "global L2"]
    for row in rows:
        for budget, result in row["budgets"].items():
            assert result["macs"] <= float(budget) and 0 <= result["after"] <= 100 and result["latency"] > 0
