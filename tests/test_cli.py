"""The command line: every verb from end to end on tiny models, its help, its errors, and what a dry run leaves."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import chat
import pyarrow.parquet as pq
import pytest
import scenes
from conftest import ROOT
from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk
from datasets.exceptions import DatasetGenerationError
from hub import LoopbackHub
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors import SafetensorError
from test_examples import TWO, config, run, texts  # noqa: F401 - fixtures: pictures and texts, each with a model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_effdl import ExamplePool, SparsePath, Ticket, VisualInContextPipeline, load_selection, rewind
from hf_effdl.cli import fit, options, pool, prompt, select, sparsify
from hf_effdl.cli.__main__ import VERBS, is_of_the_user, main
from hf_effdl.cli.arguments import TRAINING, names_of, parse_arguments, resolved
from hf_effdl.cli.score import ScoreOptions
from hf_effdl.cli.select import SelectOptions
from hf_effdl.cli.work import fitting, prompts
from hf_effdl.cli.work.cost import in_words
from hf_effdl.cli.work.data import with_classes
from hf_effdl.structure.calibration.compensate import SCORES
from hf_effdl.vicl.remote_code.cascade import HEADS
from hf_effdl.vicl.remote_code.ranker_selector import SCHEDULES
from hf_effdl.vicl.remote_code.visual_tasks import TASKS


PEFT = "ignore:`is_gradient_checkpointing`:FutureWarning"  # peft asks for it by its old name
QUIET = "--use_cpu --report_to none --disable_tqdm true".split()


@pytest.fixture
def cli(capsys):
    """Runs a verb that is to succeed, and gives what it printed."""

    def call(*argv) -> str:
        code = main([str(part) for part in argv])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Scenes with masks as a data set, a folder of photos, and a tiny encoder."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.rows(12).save_to_disk(folder / "data")
    scenes.rows(3, 50).save_to_disk(folder / "more")
    scenes.tiny_vit().save_pretrained(folder / "vit")
    (folder / "photos").mkdir()
    for number in (100, 101):
        scenes.scene(number)[0].save(folder / "photos" / f"{number}.png")
    line = f"pool build --dataset_name {folder}/data --encoder {folder}/vit --label_column mask --foreground 1"
    assert main([*line.split(), "--output_dir", str(folder / "pool")]) == 0
    return folder


# ---- structure


@pytest.fixture(scope="module")
def sparse(config, tmp_path_factory):  # noqa: F811
    """A run of `sparsify` on pictures, and what its checkpoint is made of."""
    out = tmp_path_factory.mktemp("sparse") / "run"
    line = f"sparsify --config {config} --output_dir {out} --max_steps 3 --finetune_epochs 0 --save_strategy no"
    assert main([*line.split(), *QUIET]) == 0
    return out


def test_a_checkpoint_with_a_path_is_slimmed_to_another_budget_by_it(sparse, config, tmp_path, cli):  # noqa: F811
    assert ResNetForImageClassification.from_pretrained(sparse / "slim").config.effdl_report["macs"]["ratio"] <= 0.6
    rows = f"--calibration {config.parent / 'data'} --batch_size 8"
    for name, more, budget in (("a", "", "macs"), ("b", rows, "params")):
        out = tmp_path / name
        printed = cli("slim", "--model_name_or_path", sparse, f"--{budget}", 0.4, "--output_dir", out, *more.split())
        assert "loading it needs nothing but transformers" in printed
        report = ResNetForImageClassification.from_pretrained(out).config.effdl_report
        assert report[budget]["ratio"] <= 0.4 and ("calibration" in report) == bool(more)
    counted = [
        ResNetForImageClassification.from_pretrained(f).config.effdl_report["macs"]["before"]
        for f in (sparse / "slim", tmp_path / "a")
    ]
    assert counted[0] == counted[1]  # at the size of the processor's pictures
    kept = SparsePath.load(sparse).select(macs=0.4)
    one = ResNetForImageClassification.from_pretrained(tmp_path / "a")
    assert one.config.embedding_size == len(kept["resnet.embedder.embedder.convolution"])


def test_a_ticket_is_found_and_its_small_net_has_the_weights_of_its_step(config, tmp_path, cli):  # noqa: F811
    line = f"ticket --config {tmp_path / 'run.yaml'} --output_dir {tmp_path / 'ticket'} --max_steps 10 --within 0.5"
    (tmp_path / "run.yaml").write_text(config.read_text().replace("macs: 0.6\n", "keep: 0.5\n"))
    printed = cli(*line.split(), "--at_epoch", "0.5", *QUIET)
    ticket = Ticket.from_pretrained(tmp_path / "ticket")
    assert f"found at step {ticket.step} of 10" in printed and ticket.step <= 5
    small = ResNetForImageClassification.from_pretrained(tmp_path / "ticket" / "small")
    again = rewind(ResNetForImageClassification.from_pretrained(config.parent / "model"), ticket, ticket.step)
    assert all(p.equal(q) for p, q in zip(small.parameters(), again.parameters(), strict=True))
    assert "A ticket" in cli("card", "--folder", tmp_path / "ticket")


def test_a_small_net_is_trained_in_one_go_from_new_weights(config, tmp_path, cli, caplog):  # noqa: F811
    line = f"ticket --config {config} --output_dir {tmp_path / 'out'} --max_steps 6 --train"
    assert "small net in" in cli(*line.split(), *QUIET)
    assert "weights from" not in caplog.text and "base_model" not in (tmp_path / "out" / "README.md").read_text()
    small = ResNetForImageClassification.from_pretrained(tmp_path / "out")
    assert small.config.effdl_report["macs"]["ratio"] <= 0.6


@pytest.mark.filterwarnings(PEFT)
def test_lora_ranks_leave_an_adapter_that_peft_loads(texts, tmp_path, cli):  # noqa: F811
    folder, out = texts.parent, tmp_path / "adapter"
    line = f"lora-ranks --model_name_or_path {folder / 'model'} --dataset_name {folder / 'data'} --label_column topic"
    line += f" --output_dir {out} --rank 4 --budget 0.5 --max_steps 3 --max_length 8 --finetune_epochs 1"
    assert "| all ranks |" in cli(*line.split(), "--save_strategy", "steps", *QUIET)
    assert (out / "finetune" / "checkpoint-3").is_dir() and "| epochs | 3" in (out / "README.md").read_text()
    assert not PeftConfig.from_pretrained(out / "checkpoint-3").rank_pattern  # the path's own, which is resumed from
    assert main([*line.split(), *QUIET]) == 1  # the fine-tuning is not taken for another's
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    assert 0 < PeftModel.from_pretrained(base, out).get_nb_trainable_parameters()[1]
    assert (out / "README.md").is_file()


@pytest.mark.parametrize(
    "line, dies, gone",
    [
        ("select {rows} --budget 20", "samples.filled_beside", "rows/state.json"),
        ("ticket {images} --within 0.5", "structure.filled_beside", "small/model.safetensors"),
        pytest.param(
            *("sparsify {images}", "structure.SplitLBITrainer.save_slim", "slim/model.safetensors"),
            marks=pytest.mark.slow,
        ),
        ("fit ranker {scenes} --lengths 3 --num_train_epochs 1", "fitting.train_ranker", "report.json"),
    ],
)
def test_outputs_are_of_one_run(line, dies, gone, config, texts, photos, tmp_path, monkeypatch):  # noqa: F811
    """A run that is killed between two of them leaves none of the second, which would be of the run before."""
    stale, text = tmp_path / "out" / gone, texts.parent
    stale.parent.mkdir(parents=True)
    stale.touch()
    known = {
        "rows": f"--model_name_or_path {text}/model --dataset_name {text}/data --label_column topic",
        "images": f"--config {config} --max_steps 4 --save_strategy no",
        "scenes": f"--dataset_name {photos}/data --label_column mask --model {photos}/vit --candidates 4",
    }
    argv = [*line.format(**known).split(), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(f"hf_effdl.cli.work.{dies}", Mock(side_effect=KeyboardInterrupt))
    assert main([*argv, *QUIET]) == 130
    assert not stale.exists()


@pytest.fixture(scope="module")
def llama(texts, tmp_path_factory):  # noqa: F811
    """A language model that knows the words of the texts, as it comes from the Hub: without a token to pad with."""
    folder = tmp_path_factory.mktemp("llama")
    words = {word: number for number, word in enumerate(["<s>", "<unk>", "cat", "dog", "bus", "van"])}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    chat.llama(vocab_size=len(words), pad_token_id=None, eos_token_id=0).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings(PEFT)
def test_a_language_model_is_slimmed_given_ranks_and_scored_with(llama, texts, tmp_path, cli):  # noqa: F811
    data = texts.parent / "data"
    line = f"slim --model_name_or_path {llama} --keep 0.5 --calibration {data} --split train --column text"
    printed = cli(*line.split(), "--output_dir", tmp_path / "half", "--batch_size", 8)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    whole = AutoModelForCausalLM.from_pretrained(llama)
    assert small.config.intermediate_size == whole.config.intermediate_size // 2 and "held-out rows" in printed
    tokens = AutoTokenizer.from_pretrained(tmp_path / "half")("cat dog", return_tensors="pt")
    assert small(**tokens).logits.shape == whole(**tokens).logits.shape

    rows = f"--model_name_or_path {llama} --dataset_name {data} --label_column topic"
    line = f"lora-ranks {rows} --output_dir {tmp_path / 'adapter'} --rank 4 --budget 0.5 --max_steps 3 --max_length 8"
    assert "| all ranks |" in cli(*line.split(), *QUIET)
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
    assert 0 < PeftModel.from_pretrained(base, tmp_path / "adapter").get_nb_trainable_parameters()[1]

    cli(*f"score {rows} --probe_rows 40 --num_probes 3 --output_dir {tmp_path}".split())
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert len(scores) == 80 and all(value is not None and value >= 0 for value in scores["u_x"].to_pylist())


# ---- samples


def test_a_selection_is_saved_as_a_data_set_of_its_rows(texts, tmp_path, cli):  # noqa: F811
    folder = texts.parent
    line = f"select --model_name_or_path {folder / 'model'} --dataset_name {folder / 'data'} --label_column topic"
    printed = cli(*line.split(), "--budget", 20, "--output_dir", tmp_path / "out", *QUIET)
    assert "22 rows train the probes, 86 are scored" in printed and "20 of 86 rows selected" in printed
    assert not (tmp_path / "out" / "selected").exists()
    assert str(folder) not in (tmp_path / "out" / "selection" / "README.md").read_text()
    (tmp_path / "out" / "selection" / "README.md").unlink()
    assert "- data-selection\n" in cli("card", "--folder", tmp_path / "out" / "selection", "--write")
    rows = load_from_disk(folder / "data")["train"].class_encode_column("topic")
    rows = rows.train_test_split(test_size=0.1, seed=42)["train"]
    pool_rows = rows.train_test_split(test_size=0.2, seed=42, stratify_by_column="topic")["train"]
    chosen = load_selection(tmp_path / "out" / "selection", pool_rows)
    assert len(chosen) == 20 and chosen["weight"][0] > 0
    assert load_from_disk(tmp_path / "out" / "rows").to_dict() == chosen.to_dict()


def test_rows_of_a_split_and_of_shards_get_the_same_scores(texts, tmp_path, cli):  # noqa: F811
    folder = texts.parent
    line = f"score --model_name_or_path {folder / 'model'} --dataset_name {folder / 'data'} --label_column topic"
    line += f" --probe_rows 40 --num_probes 3 --output_dir {tmp_path}/"
    cli(*f"{line}one".split())
    one = pq.read_table(tmp_path / "one" / "scores.parquet")
    rows = load_from_disk(folder / "data")["train"].class_encode_column("topic")
    for part in range(2):
        mine = rows.add_column("row_id", range(len(rows))).select(one["row_id"].to_pylist()[part::2])
        mine.to_parquet(tmp_path / f"rows-{part}.parquet")
    files = [tmp_path / f"rows-{part}.parquet" for part in range(2)]
    assert f"scores of {len(one)} rows in 2 tables" in cli(*f"{line}two --files".split(), *files)
    many = [pq.read_table(file) for file in sorted((tmp_path / "two").glob("*.parquet"))]
    of = {row["row_id"]: row["u_x"] for table in many for row in table.to_pylist()}
    assert len(one) == 80 and of == pytest.approx({row["row_id"]: row["u_x"] for row in one.to_pylist()}, rel=1e-4)


# ---- prompts


def test_a_pool_is_built_changed_described_and_asked(photos, tmp_path, cli, capsys):
    folder, columns = tmp_path / "pool", "--label_column mask --id_column name --keep_grids --foreground 1"
    line = f"pool build --dataset_name {photos / 'data'} --encoder {photos / 'vit'} --output_dir {folder} {columns}"
    assert "| rows | 12 |" in cli(*line.split()) and not (folder / "half").exists()
    cli("pool", "add", "--pool", folder, "--dataset_name", photos / "more", "--encoder", photos / "vit")
    cli("pool", "remove", "--pool", folder, "--ids", "scene 3", "scene 51")
    assert "| rows | 13 |" in cli("pool", "info", "--pool", folder)
    ids = ExamplePool.from_pretrained(folder).ids
    assert "scene 50" in ids and "scene 3" not in ids
    line = f"prompt --images {photos / 'photos'} --pool {folder} --model {photos / 'vit'} --strategy dense"
    line += f" --num_examples 2 --output_dir {tmp_path / 'out'}"
    assert "| confidence |" in cli(*line.split())
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [answer["prediction"] for answer in answers] == ["100.png", "101.png"]
    for answer in answers:
        photo, mask = Image.open(answer["image"]), Image.open(tmp_path / "out" / answer["prediction"])
        assert mask.size == photo.size and set(mask.tobytes()) <= {0, 255}
        assert len(answer["example_ids"]) == len(answer["scores"]) == 2 and set(answer["example_ids"]) <= set(ids)
    assert (tmp_path / "out" / "panel.png").is_file()
    (tmp_path / "cut.png").write_bytes((photos / "photos" / "100.png").read_bytes()[:200])
    more = ["--images", photos / "photos", tmp_path / "cut.png", "--batch_size", 2, "--output_dir", tmp_path / "half"]
    assert main([*line.split(), *map(str, more)]) == 1  # what was answered before it stays
    assert {file.name for file in (tmp_path / "half").iterdir()} == {"100.png", "101.png"}
    assert "answering:  67%" in capsys.readouterr().err


def test_scores_are_of_the_object_that_is_named_however_it_is_named(photos, tmp_path):
    """Masks of zeros and ones, as they are and with their object named."""
    rows, found = load_from_disk(photos / "data"), []
    for foreground in (None, [1]):
        given = ["--dataset_name", "d", "--model", str(photos / "vit"), "--label_column", "mask", "--candidates", "6"]
        given += ["--foreground", "1"] if foreground else []
        (asked,) = parse_arguments(given, options.PoolOptions, description=None)
        model = prompts.load_frozen(asked)
        made = prompts.make_pool(asked, rows, model, tmp_path / str(foreground), keep_grids=True, progress=False)
        pipe, others = VisualInContextPipeline(model, pool=made), scenes.rows(3, 60)
        found.append(
            [prompts.score_strategy(pipe, others, asked, name, name == "oracle") for name in ("nearest", "oracle")]
        )
    assert found[0] == found[1] and 0 < sum(found[0][0]) < 3 and sum(found[0][0]) <= sum(found[0][1])


def test_a_card_is_made_again_from_the_files(sparse, tmp_path, cli):
    shutil.copytree(ROOT / "model_cards" / "tiny-cascade-digits", tmp_path / "pipe")
    says = {sparse / "slim": "# slim\n", tmp_path / "pipe": "# Visual in-context segmentation\n"}
    for folder, title in (says | {tmp_path / "pipe" / "pool": "# pool\n"}).items():
        (folder / "README.md").unlink(missing_ok=True)
        assert main(["card", "--folder", str(folder)]) == 1
        assert title in cli("card", folder, "--write") and (folder / "README.md").is_file()


CODE = """
from hf_effdl.cli.__main__ import main
line = "pool build --dataset_name {data} --encoder {vit} --label_column mask --output_dir pool"
assert main([*line.split(), "--push_to_hub", "tester/pool"]) == 0
assert main("pool info --pool tester/pool".split()) == 0
assert main("slim --model_name_or_path {vit} --keep 0.5 --output_dir half --push_to_hub tester/half".split()) == 0
assert main("pool info --pool tester/nothing".split()) == 1
"""


@pytest.mark.slow
def test_what_is_pushed_is_on_the_hub(photos, tmp_path):
    with LoopbackHub() as hub:
        code = CODE.format(data=photos / "data", vit=photos / "vit")
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=hub.env(tmp_path / "home"), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "pool.json" in hub.repos["dataset", "tester/pool"].head.tree
        assert {"README.md", "model.safetensors"} <= hub.repos["model", "tester/half"].head.tree.keys()
    assert "Traceback" not in done.stderr and "hf-effdl: error: " in done.stderr


@pytest.mark.slow
def test_two_processes_share_the_shards_and_report_once(texts, tmp_path):  # noqa: F811
    folder = texts.parent
    for part in range(3):
        Dataset.from_dict({"text": ["cat dog", "bus van"] * 5}).to_parquet(tmp_path / f"{part}.parquet")
    line = f"-m hf_effdl.cli score --model_name_or_path {folder / 'model'} --dataset_name {folder / 'data'}"
    line += (
        " --label_column topic --labelled false --probe_rows 40 --output_dir out --files 0.parquet 1.parquet 2.parquet"
    )
    printed = run(*TWO[:-1], *line.split(), cwd=tmp_path)
    assert printed.count("scores of 30 rows in 3 tables") == 1 and len(list((tmp_path / "out").glob("*.parquet"))) == 3


# ---- help


HELP = """
import sys, time
from hf_effdl.cli.__main__ import VERBS, main
def helped(*argv):
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code
assert helped("sparsify", "--help") == 0
spent = time.process_time()
codes = [helped(verb, "--help") for verb in VERBS] + [helped("--help"), helped("fit", "ranker", "--help")]
print(spent, codes == [0] * len(codes), "torch" in sys.modules)
"""


@pytest.mark.alone
def test_help_comes_without_torch_in_less_than_a_second():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, cwd=ROOT)
    spent, right, torch = done.stdout.splitlines()[-1].split()
    assert float(spent) < 1 and (right, torch) == ("True", "False")
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", ["sparsify", "ticket", "grow", "lora-ranks", "select", "fit ranker"])
def test_own_options_come_first_and_a_trainers_are_named_in_short(verb, capsys):
    shown = []
    for ask in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main([*verb.split(), ask])
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    short, whole = shown
    assert len(short.splitlines()) < 110 < 500 < len(whole.splitlines())
    own = re.findall(r"(?m)^  --(\w+)", short)
    assert [name for name in re.findall(r"(?m)^  --(\w+)", whole) if name in own][: len(own)] == own[:-1] + own[-1:]
    assert whole.index(f"  --{own[-2]}") < whole.index("  --per_device_train_batch_size")
    assert own[:2] == ["config", "dry_run"] and "--per_device_train_batch_size," in short


def choices(kind: type, name: str) -> list[str]:
    return list(kind.__dataclass_fields__[name].metadata["choices"])


def test_choices_are_those_of_the_package():
    assert set(options.SCORES) == {"path", *SCORES}
    for kind in (options.PoolOptions, pool.BuildOptions):
        assert choices(kind, "task") == list(TASKS)
    assert choices(fit.CascadeOptions, "head") == list(HEADS)
    assert choices(fit.RankerOptions, "schedule") == list(SCHEDULES)
    assert {"dense", "cascade", "ranker", "auto"} < set(choices(prompt.PromptOptions, "strategy"))


def commands() -> list[str]:
    """Every command line of ours in the texts and in the verbs' help, with its lines joined."""
    files = [
        ROOT / "README.md",
        ROOT / "SKILL.md",
        *(ROOT / "docs").rglob("*.md"),
        *Path(fit.__file__).parent.glob("*.py"),
    ]
    text = "\n".join(re.sub(r"\\{1,2}\n +", "", file.read_text(encoding="utf-8")) for file in files)
    found = re.findall(r"(?m)(?:^    (?:.*-m )?|`)(?:hf-effdl|hf_effdl\.cli) (\w[^`#\n]* --[^`#\n]*)", text)
    return sorted({line.strip() for line in found if "VERB" not in line})


class Understood(Exception):
    """The options were read."""


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_texts_is_understood(line, monkeypatch):
    verb, *argv = shlex.split(line)
    module = import_module(f"hf_effdl.cli.{verb.replace('-', '_')}")
    reader = sparsify if verb == "ticket" else module

    def read(argv, *kinds, **more):
        if "--config" in argv:  # a file of the reader's
            assert not {name.lstrip("-").replace("-", "_") for name in argv if name.startswith("--")} - names_of(
                [resolved(kind) for kind in kinds]
            )
        else:
            parse_arguments(argv, *kinds, **more)
        raise Understood

    monkeypatch.setattr(reader, "parse_arguments", read)
    monkeypatch.setattr(sparsify, "task_of", lambda argv: "image-classification")
    with pytest.raises(Understood):
        module.main(argv)


# ---- options and errors


def test_the_line_wins_over_the_file_and_dashes_are_underscores(tmp_path):
    (tmp_path / "run.yaml").write_text("output-dir: there\nencoder: dino\nkeep_grids: true\ndataset_name: data\n")
    (found,) = parse_arguments(
        ["--config", str(tmp_path / "run.yaml"), "--encoder", "vit"], pool.BuildOptions, description=None
    )
    assert (found.output_dir, found.encoder, found.keep_grids) == ("there", "vit", True)


FILES = {
    "empty values": (b"budget:\n", "says nothing after 'budget'"),
    "a name twice": (b"budget: 0.5\nbudget: 0.7\n", "sets ['budget'] more than once"),
    "a name in two spellings": (b"probe-share: 0.5\nprobe_share: 0.7\n", "sets ['probe_share'] more than once"),
    "no YAML": (b"budget: [1\n b: {", "is no YAML"),
    "two documents": (b"budget: 1\n---\nseed: 1\n", "is no YAML"),
    "an object": (b"dataset_name: !!python/name:os.system\n", "is no YAML"),
    "Latin-1": (b"dataset_name: caf\xe9\n", "is not in UTF-8"),
    "a list": (b"- budget\n", "holds a list"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_wrong_with_a_file_of_options_is_said_with_its_name(case, tmp_path, capsys):
    text, said = FILES[case]
    (tmp_path / "run.yaml").write_bytes(text)
    assert main(["select", *MODEL.split(), "--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run.yaml'} {said}" in error and error.count("\n") == 1


def test_a_file_means_what_its_text_says(tmp_path):
    text = "\ufeffsave_strategy: no\nuse_cpu: yes\ndataset_name: 2026-01-01\nlabel_column: -x\neval_steps:\nseed: 3\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    line = ["--model_name_or_path", "m", "--output_dir", "o", "--config", str(tmp_path / "run.yaml")]
    options, args = select.parse(line)
    assert (args.save_strategy, args.use_cpu, args.eval_steps, args.seed) == ("no", True, None, 3)
    assert (options.dataset_name, options.label_column) == ("2026-01-01", "-x")


MODEL = "--model_name_or_path m --dataset_name d --output_dir o --use_cpu"
WRONG = {
    "nothing": ("", 2, "usage: hf-effdl VERB"),
    "no verb": ("slimm", 2, "no verb 'slimm'; did you mean 'slim'?"),
    "no action": ("pool", 2, "say first what, one of ['build', 'add', 'remove', 'info'], not nothing"),
    "unknown action": ("fit cascades", 2, "not 'cascades'"),
    "two budgets": ("slim --model_name_or_path m --output_dir o --macs 0.5 --keep 0.5", 2, "set one budget"),
    "two endings": ("ticket --task text-generation --keep 0.5 --train --at_epoch 1 " + MODEL, 2, "leave one out"),
    "no path": ("slim --model_name_or_path m --output_dir o --macs 0.5", 2, "is no folder with sparse_path"),
    "no share": ("sparsify --task text-generation --macs 50 " + MODEL, 1, "--macs 50.0: it must be a share"),
    "no rows": ("slim --model_name_or_path m --output_dir o --rows -3", 1, "--rows -3: it is a number from 1 on"),
    "a file": ("slim --model_name_or_path m --output_dir run.yaml", 1, "run.yaml is a file: name a folder"),
    "no config": ("env --config none.yaml", 1, "none.yaml"),
    "unknown key": ("env --config run.yaml", 2, "sets ['macs']"),
    "no folder": ("card none", 1, "none is no folder"),
    "two folders": ("card none --folder other", 2, "'none' and --folder both say the folder: leave one out"),
    "no bound": ("choose run.yaml", 1, "give one bound or more"),
    "no family": ("choose . --macs 5", 1, "family.json"),
    "no card": ("card --folder .", 1, "has no README.md, nor anything of this package"),
    "no model": (f"select {MODEL}", 1, "d"),
    "no pool": ("pool info --pool none/such", 1, "none/such"),
    "no image": ("prompt --images none.jpg --model m --output_dir o", 1, "names none.jpg, which is no file or folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("macs: 0.5\n")
    line, code, said = WRONG[case]
    assert main(line.split()) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert case == "nothing" or (error.startswith("hf-effdl: error: ") and error.count("\n") == 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("slim --keep 0.5 0.75 --output_dir o", "--keep takes one value: 0.75 is too much"),
        (f"select {MODEL} --dataset_name a b c", "--dataset_name takes one value: b c is too much"),
        ("pool build --keep-grids true false", "--keep-grids takes one value: false is too much"),
        ("slim --config run.yaml", "'keep' in the file of --config takes one value, not [0.5, 0.75]"),
    ],
)
def test_a_list_for_an_option_of_one_value_is_said_with_its_name(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("keep: [0.5, 0.75]\n")
    required = {"slim": "--model_name_or_path m --output_dir o", "pool": "--dataset_name d --output_dir o --encoder e"}
    with pytest.raises(SystemExit) as stop:
        main([*line.split(), *required.get(line.split()[0], "").split()])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "trains"), [("slim", False), ("env", False), ("card", False), ("select", True)])
def test_options_of_a_trainer_are_spoken_of_where_there_are_any(verb, trains, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert ("--help-all" in capsys.readouterr().out) == trains


@pytest.mark.parametrize("verb", ["select", "sparsify --task text-classification"])
def test_one_row_is_too_few_and_the_option_for_others_is_named(verb, texts, tmp_path, capsys):  # noqa: F811
    Dataset.from_dict({"text": ["cat"], "label": ["a"]}).save_to_disk(tmp_path / "one")
    line = f"{verb} --model_name_or_path {texts.parent / 'model'} --dataset_name {tmp_path / 'one'}"
    assert main([*line.split(), "--output_dir", str(tmp_path / "out"), *QUIET]) == 1
    assert "1 rows: a tenth of them cannot be set aside; pass more, or set --eval_split" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [SelectOptions, ScoreOptions])
@pytest.mark.parametrize("option", ["--input_column", "--text_column", "--image_column"])
def test_the_column_that_is_fed_has_the_names_of_all_verbs(kind, option):
    needed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", option, "body"]
    more = [] if kind is ScoreOptions else [TRAINING]
    assert parse_arguments(needed, kind, *more, description="")[0].input_column == "body"


def test_of_two_fits_of_one_folder_the_second_waits_and_neither_has_a_report_of_before(tmp_path):
    turns = []

    def fit(_):
        with fitting._to_itself(tmp_path):
            assert not (tmp_path / fitting.REPORT).exists()
            turns.append("in")
            time.sleep(0.05)
            turns.append("out")
            (tmp_path / fitting.REPORT).write_text("{}")

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(fit, range(3)))
    assert turns == ["in", "out"] * 3


def test_a_misspelt_option_is_told_with_the_nearest_as_argparse_tells_it(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["env", "--confg", "x"])
    assert stop.value.code == 2 and "--confg x; did you mean --config?" in capsys.readouterr().err


def test_tracebacks_are_shown_where_they_are_asked_for_or_the_fault_is_ours(monkeypatch, capsys):
    for argv in (["--traceback", "card", "--folder", "none"], ["card", "--folder", "none", "--traceback"]):
        with pytest.raises(FileNotFoundError):
            main(argv)
    monkeypatch.setenv("HF_EFFDL_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["card", "--folder", "none"])
    monkeypatch.delenv("HF_EFFDL_TRACEBACK")
    for error, code in ((KeyboardInterrupt(), 130), (RuntimeError("a bug"), None), (KeyError("a bug"), None)):
        monkeypatch.setattr("hf_effdl.cli.env.main", lambda argv, error=error: (_ for _ in ()).throw(error))
        if code is None:
            with pytest.raises(type(error)):
                main(["env"])
        else:
            assert main(["env"]) == code
    with pytest.raises(TypeError) as ours:
        rewind(lambda: None, "no ticket")
    assert is_of_the_user(ours.value)
    with pytest.raises(TypeError) as torchs:
        sparsify.main(3)
    assert not is_of_the_user(torchs.value)
    for error in (EntryNotFoundError("no such file"), DatasetGenerationError("bad rows"), SafetensorError("cut off")):
        assert is_of_the_user(error)


def test_the_work_of_one_process_is_refused_by_many(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for verb in ("slim --model_name_or_path m --output_dir o", "card --folder o"):
        assert main(verb.split()) == 2
        assert "2 processes were started" in capsys.readouterr().err


def test_the_task_is_that_of_the_checkpoint(config, tmp_path):  # noqa: F811
    name = ["--model_name_or_path", str(tmp_path)]
    for kind, task in (("ResNetForImageClassification", "image-classification"), ("BertModel", None)):
        made = ResNetConfig(architectures=[kind])
        made.save_pretrained(tmp_path)
        if task is None:
            assert main(["sparsify", *name, "--dataset_name", "d"]) == 2
        else:
            assert sparsify.task_of(name) == task
    assert sparsify.task_of([*name, "--task", "text-generation"]) == "text-generation"


# ---- labels


def splits(train: list, **more: list) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict({"y": rows}) for name, rows in {"train": train, **more}.items()})


@pytest.mark.parametrize(
    ("train", "other", "names"),
    [
        (["c", "ä", "b"], ["b", "c"], ["b", "c", "ä"]),  # a split without the first class
        (["b"], ["a", "b"], ["a", "b"]),
        (list(range(12)), [11, 2], [str(number) for number in range(12)]),  # as a classifier numbers its outputs
    ],
)
def test_a_label_has_one_number_in_all_splits(train, other, names):
    found = with_classes(splits(train, eval=other), "data", "y")
    for split, labels in (("train", train), ("eval", other)):
        kind = found[split].features["y"]
        assert kind.names == names and kind.int2str(found[split]["y"][:]) == [str(label) for label in labels]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (splits(["a", None]), "the train split of data has rows without a 'y'"),
        (splits([0, 1], eval=[-1]).cast_column("y", ClassLabel(names=["a", "b"])), "the eval split of data has rows"),
        (splits(["a"], eval=["a"]).rename_column("y", "z"), "the train split of data has columns"),
        (splits([[1, 0]]), "and classes are texts or numbers"),
        (
            DatasetDict(splits([0], eval=[0]), train=splits([0]).cast_column("y", ClassLabel(1))["train"]),
            "other class",
        ),
    ],
)
def test_splits_without_classes_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        with_classes(data, "data", "y")


# ---- dry runs


def everything(*folders: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


DRY = {
    "sparsify": "sparsify --config {images} --num_train_epochs 50",
    "ticket": "ticket --config {images} --num_train_epochs 50",
    "grow": "grow --config {grow} --num_train_epochs 50",
    "lora-ranks": "lora-ranks {texts} --max_steps 2000 --use_cpu",
    "select": "select {texts} --train --compare --use_cpu",
    "score": "score {texts} --files {folder}/rows.parquet",
    "slim": "slim --model_name_or_path {model} --calibration {folder}/data --column text --batch_size 4",
    "pool": "pool build --dataset_name {photos}/data --label_column mask --foreground 1 --encoder {photos}/vit",
    "fit": "fit cascade --dataset_name {photos}/data --label_column mask --model {photos}/vit --candidates 6",
    "fit ranker": "fit ranker --dataset_name {photos}/data --label_column mask --model {photos}/vit --use_cpu",
    "prompt": "prompt --images {photos}/photos --pool {photos}/pool --model {photos}/vit --batch_size 1",
}


@pytest.mark.filterwarnings(PEFT)
@pytest.mark.parametrize("verb", DRY)
def test_a_dry_run_says_what_it_takes_and_writes_nothing(verb, config, texts, photos, tmp_path, monkeypatch, cli):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    folder = texts.parent
    if not (folder / "rows.parquet").exists():
        load_from_disk(folder / "data")["train"].to_parquet(folder / "rows.parquet")
        lines = config.read_text().splitlines()
        (config.parent / "grow.yaml").write_text("\n".join(line for line in lines if not line.startswith("macs")))
    of = {"images": config, "grow": config.parent / "grow.yaml", "folder": folder, "photos": photos}
    of["model"] = folder / "model"
    of["texts"] = f"--model_name_or_path {folder / 'model'} --dataset_name {folder / 'data'} --label_column topic"
    line = DRY[verb].format(**of)
    before = everything(folder, config.parent, photos, tmp_path)
    printed = cli(*line.split(), "--output_dir", "out", "--dry_run")
    assert everything(folder, config.parent, photos, tmp_path) == before
    found = re.search(r"time +(.*) \(.*\d.*\)\nmemory +(\S+) [GM]B.*\ndisk +\S+ [kMG]?B\nnothing was written", printed)
    assert found and float(found[2]) > 0, printed


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "under a second"), (59.6, "1 min 0 s"), (7260, "2 h 1 min")])
def test_times_are_said_in_words(seconds, text):
    assert in_words(seconds) == text


def test_the_console_script_is_where_the_hubs_client_looks_for_extensions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hf-effdl": "hf_effdl.cli.__main__:main"} and project["description"]
