"""The examples that train classifiers, and the quickstart: each once in this process, and as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import DATA
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    ConvNextImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# two processes, which may leave no thread of gloo's behind
TWO = (str(BIN / "torchrun"), "--nproc_per_node", "2", str(ROOT / "tests" / "support" / "threads_left.py"))
SCRIPT = ROOT / "examples" / "sparsify_image_classifier.py"
sys.path.insert(0, str(ROOT / "examples"))

import quickstart  # noqa: E402
import select_then_train  # noqa: E402
import sparsify_causal_lm  # noqa: E402
import sparsify_image_classifier  # noqa: E402
import sparsify_text_classifier  # noqa: E402

from hf_effdl.cli import arguments as command_line  # noqa: E402


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


def test_the_classifier_example_finetunes_what_it_slimmed_of_a_half_precision_checkpoint(config, tmp_path, capsys):
    model = tmp_path / "half"
    ResNetForImageClassification.from_pretrained(config.parent / "model").half().save_pretrained(model)
    ConvNextImageProcessor.from_pretrained(config.parent / "model").save_pretrained(model)
    command = ["--config", str(config), "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="0.1 for pretrained weights.*--learning_rate 0.01 or less"):
        sparsify_image_classifier.main([*command, "--max_steps", "2", "--report_to", "none", "--learning_rate", "0.1"])
    printed = capsys.readouterr().out
    shown = [line for line in printed.splitlines() if line.startswith("accuracy of the model, ")]
    names = [line.removeprefix("accuracy of the model, ").partition(":")[0] for line in shown]
    assert names == ["dense, split LBI", "slim, not fine-tuned", "slim, fine-tuned"]
    assert all(0 <= float(line.rpartition(" ")[2]) <= 1 for line in shown) and "slim model in" in printed
    check(tmp_path / "out")
    assert "| slim, fine-tuned |" in (tmp_path / "out" / "slim" / "README.md").read_text()


def test_a_budget_that_slim_would_refuse_is_refused_before_training():
    with pytest.raises(ValueError, match="--macs 50.0: it must be a share"):
        sparsify_image_classifier.parse(
            ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "out", "--macs", "50"]
        )


def test_processes_that_do_not_know_of_each_other_are_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for script in (sparsify_image_classifier, select_then_train):
        with pytest.raises(ValueError, match="2 processes were started, but each sees only itself.*pass --use_cpu"):
            script.parse(["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "out"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(str(BIN / "accelerate"), "launch", "--cpu"), TWO], ids=["accelerate", "two"])
def test_the_classifier_example_runs_as_it_is_launched_and_reports_once(launcher, config, tmp_path):
    given = f"--config {config} --max_steps 2 --output_dir out --widths free"
    out = run(*launcher, str(SCRIPT), *given.split(), cwd=tmp_path)
    assert out.count("so the path starts dense") == 1 and out.count("slim model in") == 1
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


@pytest.mark.parametrize(("script", "metric"), [(sparsify_text_classifier, "accuracy"), (sparsify_causal_lm, "loss")])
def test_the_examples_on_texts_train_slim_and_teach_a_stock_model(script, metric, texts, tmp_path, capsys):
    folder, line = texts.parent / "model", f"--dataset_name {texts.parent / 'data'} --label_column topic"
    if metric == "loss":
        folder, line = tmp_path / "model", f"--dataset_name {tmp_path / 'texts.txt'}"
        (tmp_path / "texts.txt").write_text("cat dog cow\n\nbus van\n" * 60)
        sizes = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes)).save_pretrained(folder)
        BertTokenizerFast.from_pretrained(texts.parent / "model").save_pretrained(folder)
    line += f" --model_name_or_path {folder} --output_dir {tmp_path / 'out'} --max_steps 2 --max_length 6 --macs 0.9"
    script.main(f"{line} --use_cpu --report_to none --disable_tqdm true".split())
    printed = capsys.readouterr().out
    names = re.findall(rf"(?m)^{metric} of the model, (.*): \d", printed)
    assert names == ["dense, split LBI", "slim, not fine-tuned", "slim, fine-tuned"] and "path starts dense" in printed
    saved = json.loads((tmp_path / "out" / "slim" / "config.json").read_text())
    assert saved["effdl_report"]["macs"]["ratio"] <= 0.9 and "quantization_config" not in saved
    assert saved["effdl_report"]["calibration"]["score"] == "path"
    transformers.AutoModel.from_pretrained(tmp_path / "out" / "slim")


def test_too_little_text_for_two_sequences_is_refused(texts, tmp_path):
    (tmp_path / "texts.txt").write_text("cat dog\n")
    line = f"--model_name_or_path {texts.parent / 'model'} --dataset_name {tmp_path / 'texts.txt'} --output_dir out"
    with pytest.raises(ValueError, match="holds 0 sequences of 128 tokens.*--max_length"):
        sparsify_causal_lm.main([*line.split(), "--use_cpu"])


def check_selection(out: str, folder: Path) -> None:
    assert out.count("26 of 86 rows selected") == 1 and out.count("selected rows: accuracy") == 1
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["selected"] == 26 and (folder / "report" / "selection.png").stat().st_size > 1000
    for name in ("selected", "random"):
        BertForSequenceClassification.from_pretrained(folder / name)


def test_the_selection_example_selects_and_trains(texts, tmp_path, capsys):
    select_then_train.main(["--config", str(texts), "--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    check_selection(capsys.readouterr().out, tmp_path / "out")


@pytest.mark.slow
def test_the_selection_example_trains_probes_on_two_processes(texts, tmp_path):
    given = f"--config {texts} --output_dir out --probes trained --num_probes 2"
    out = run(*TWO, str(SELECT), *given.split(), cwd=tmp_path)
    check_selection(out, tmp_path / "out")
    assert len(list((tmp_path / "out" / "probes").glob("probe-*/probe.safetensors"))) == 2


def test_arguments_come_from_the_line_then_the_file_then_the_script(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        config.read_text().replace("eval_strategy: epoch", "eval_strategy: 'no'")
        + "learning_rate: 1e-3\nlr_scheduler_kwargs: {min_lr: 0.01}\n"
        "eval_split: null\nlr_scheduler_type: cosine_with_min_lr\nlogging_steps: 5\n"
    )
    command = ["--config", str(file), "--output-dir", "out", "--macs", "0.7"]
    script, args = sparsify_image_classifier.parse(command)
    assert (script.macs, args.learning_rate, args.per_device_train_batch_size, args.logging_steps) == (0.7, 1e-3, 4, 5)
    assert args.use_cpu is True and args.lr_scheduler_kwargs == {"min_lr": 0.01} and script.eval_split is None
    assert command_line.is_given(command, "output_dir") and command_line.is_given(command, "learning_rate")
    assert not command_line.is_given(command, "eval_split") and not command_line.is_given(command, "dataset_config")
    for line, error in (("learning_rat: 0.1", ValueError), ("widths: fre", SystemExit)):
        file.write_text(config.read_text() + line)
        with pytest.raises(error, match="learning_rat" if error is ValueError else None):
            sparsify_image_classifier.parse(["--config", str(file), "--output_dir", "out"])


@pytest.fixture
def quiet_restored():
    """The quickstart silences transformers, whose log tells of deprecations."""
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


def test_the_quickstart_runs_and_leaves_a_page_of_its_tables_and_pictures(tmp_path, capsys, quiet_restored):
    folder = tmp_path / "quick"
    small = "--epochs 1 --tune-epochs 1 --select-epochs 1 --queries 6 --scenes 24".split()
    quickstart.main([*small, "--out", str(folder)])
    out = capsys.readouterr().out
    assert "| slim, fine-tuned |" in out and "a stock config" in out and "| chosen, 341 rows |" in out
    assert "| grown" in out and "{'" not in out
    assert all(f"[{number}/8] " in out for number in range(1, 9)) and out.count(" s on a free core") == 8
    scores = {row.split("|")[1].strip(): row.split("|")[2] for row in out.splitlines() if row.startswith("|")}
    assert float(scores["oracle"]) >= max(float(scores[name]) for name in ("random", "nearest", "dense"))
    page = (folder / "index.html").read_text()
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert all((folder / link).stat().st_size > 500 for link in links) and not any(":" in link for link in links)
    pictures = {file.relative_to(folder).as_posix() for file in folder.glob("*/*.png")}
    pictures -= {"dense/sparse_path.png", "grown/sparse_path.png"}  # in cards
    assert pictures == {link for link in links if link.endswith(".png")}
    for name in ("slim, fine-tuned", "the whole pool, 1137 rows", "oracle", "grown", "all three"):
        assert f"<td>{name}</td>" in page
    for file in ("prompts/model/model.safetensors", "selection/report.json", "slim/model.safetensors"):
        assert (folder / file).is_file()
    assert {file.name for file in folder.iterdir() if file.is_file()} == {"index.html"}
    assert not list(folder.rglob("checkpoint-*")) and not list(folder.glob("prompts/pool*"))
