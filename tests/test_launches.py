"""Two processes are two processes or a refusal: every script and verb that trains or scores, under real launchers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import scenes
from chat import conversations, llama, tokenizer
from conftest import ROOT
from datasets import Dataset, DatasetDict
from test_evaluate_vicl import MODEL, voc  # noqa: F401 - a fixture
from test_example_scripts import SCRIPTS
from test_examples import BIN, TWO, config, texts  # noqa: F401 - fixtures: pictures and texts, each with a model
from test_examples_cascade import SMALL as CASCADE
from test_examples_ranker import SMALL as RANKER

from hf_effdl import launched as launched_file
from hf_effdl.launched import count_asked


FOLDER = ROOT / "examples"
VERB = "-m hf_effdl.cli "
ONE = "is the work of one: start it by itself"
# what is started -> its arguments, and what the first process alone prints, or every process refuses by
LAUNCHES = {
    "sparsify_image_classifier": ("--config {pictures} --max_steps 2 --output_dir out --use_cpu", "slim model in"),
    "sparsify_text_classifier": ("{labelled} --max_steps 2 --macs 0.9 --use_cpu", "slim model in"),
    "sparsify_causal_lm": ("{language} --max_length 6 --max_steps 2 --macs 0.9 --use_cpu", "slim model in"),
    "lora_ranks": ("{labelled} --rank 4 --max_steps 2 --use_cpu", "adapter in out"),
    "grow_image_classifier": ("{seed} --max_steps 8 --use_cpu", "grown model in out"),
    "select_then_train": ("--config {texts} --output_dir out --report_to none", "26 of 86 rows selected"),
    "select_then_sft": ("{chat} --use_cpu", "chosen: "),
    "fit_cascade": (f"{' '.join(CASCADE)} --output_dir out", "| cascade |"),
    "train_ranker": (f"{' '.join(RANKER)} --output_dir out", "| ranker |"),
    "vicl_seggpt": ("{scenes} --output_dir out", "| dense |"),
    "evaluate_vicl": ("{voc} --strategies nearest --folds 1 --output_dir out", "| nearest |"),
    f"{VERB}ticket": ("{images} --max_steps 6 --within 0.5 --keep 0.5 --at_epoch 0.2 --use_cpu", "ticket in out"),
    f"{VERB}ticket ": ("{images} --max_steps 6 --within 0.5 --keep 0.5 --train --use_cpu", "small net in out"),
    f"{VERB}select": ("{labelled} --budget 20 --use_cpu", "20 of 86 rows selected"),
    f"{VERB}score": ("{labelled} --probe_rows 40 --num_probes 3", "scores of 80 rows"),
    f"{VERB}pool build": ("{rows} --encoder {vit} --label_column mask --output_dir out", "| rows | 12 |"),
    f"{VERB}slim": ("--model_name_or_path {vit} --output_dir out", f"slimming a checkpoint {ONE}"),
    f"{VERB}prompt": ("--images . --model {vit} --output_dir out", f"prompting {ONE}"),
    f"{VERB}card": ("--folder .", f"writing a card {ONE}"),
    "slim_pretrained": (
        "--model_name_or_path {vit} --output_dir out --dataset_name d",
        f"slimming a checkpoint {ONE}",
    ),
    "quickstart": ("", f"the demo {ONE}"),
    "three_pillars": ("", f"this comparison {ONE}"),
    "active_learning": ("", f"labelling in rounds {ONE}"),
    "train_tiny_seggpt": ("--output_dir out", f"this training {ONE}"),
    "convert_mae_vqgan": ("--mae a --out out", f"converting files {ONE}"),
    "convert_painter": ("--painter a --out out", f"converting files {ONE}"),
}
NO_WORK = {"digit_scenes", "voc_folds"}  # data that others read


@pytest.fixture(scope="module")
def named(config, texts, voc, tmp_path_factory) -> dict[str, object]:  # noqa: F811
    """What the arguments name: tiny models and rows on disk."""
    folder = tmp_path_factory.mktemp("launched")
    scenes.rows(12).save_to_disk(folder / "rows")
    scenes.tiny_vit().save_pretrained(folder / "vit")
    for name in ("language", "chat"):
        llama().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    (folder / "texts.txt").write_text("w1 w2 w3\n\nw4 w5\n" * 60)
    DatasetDict(train=Dataset.from_dict(conversations(40))).save_to_disk(folder / "talks")
    quiet = "--output_dir out --report_to none --disable_tqdm true"
    model = f"--model_name_or_path {texts.parent / 'model'} --dataset_name {texts.parent / 'data'}"
    chat = f"--model_name_or_path {folder / 'chat'} --dataset_name {folder / 'talks'} --eval_rows 5 --seed_rows 10"
    chat += " --num_probes 2 --probe_steps 2 --budget 300 --max_steps 2 --bf16 False --activation_checkpointing False"
    images = f"--model_name_or_path {config.parent / 'model'} --dataset_name {config.parent / 'data'}"
    return {
        "pictures": config,
        "texts": texts,
        "vit": folder / "vit",
        "labelled": f"{model} --label_column topic --max_length 8 {quiet}",
        "language": f"--model_name_or_path {folder / 'language'} --dataset_name {folder / 'texts.txt'} {quiet}",
        "chat": f"{chat} {quiet} --save_strategy no",
        "images": f"{images} --from_scratch {quiet}",
        "seed": f"{images} --growth_rounds 1 --growth_until 0.5 {quiet}",
        "rows": f"--dataset_name {folder / 'rows'}",
        "scenes": f"--dataset_name {folder / 'rows'} --label_column mask --model {folder / 'vit'} --candidates 4",
        "voc": f"--benchmark pascal5i --folder {voc} --lists {voc} --model {MODEL} --candidates 6",
    }


def launched(launcher: tuple[str, ...], what: str, named: dict, cwd: Path) -> subprocess.CompletedProcess:
    """One real launch, with nothing set but what its command line says."""
    script = what.split() if what.startswith("-m") else [str(FOLDER / f"{what}.py")]
    arguments = LAUNCHES[what][0].format(**named).split()
    if what in (f"{VERB}score", f"{VERB}select"):  # they have other words for it, or none
        arguments = [word for word in arguments if word not in ("--max_length", "8")]
    if what == f"{VERB}score":
        arguments = [word for word in arguments if word not in ("--report_to", "none", "--disable_tqdm", "true")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [*launcher, *script, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", LAUNCHES)
def test_two_processes_share_the_work_or_are_refused(what, named, tmp_path):
    said = LAUNCHES[what][1]
    done = launched(TWO[:-1] if what.startswith("-m") else TWO, what, named, tmp_path)
    if ONE in said:
        assert done.returncode != 0 and said in done.stderr and not list(tmp_path.iterdir())
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert (done.stdout + done.stderr).count(said) == 1 and (tmp_path / "out").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("what", LAUNCHES)
def test_a_second_process_that_accelerate_does_not_start_is_told_of(what, named, tmp_path):
    done = launched((str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2"), what, named, tmp_path)
    assert done.returncode != 0 and "asked for --num_processes 2 and started one" in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_verb_under_accelerate_is_told_of_the_process_that_is_not_there(tmp_path):
    line = "launch --cpu --num_processes 2 -m hf_effdl.cli select --model_name_or_path m --dataset_name d"
    command = [str(BIN / "accelerate"), *line.split(), "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert "hf-effdl: error: accelerate launch was asked for --num_processes 2 and started one" in done.stderr


def test_every_script_is_launched():
    scripts = {file.stem for file in SCRIPTS if file.parent == FOLDER}
    assert scripts == ({what for what in LAUNCHES if not what.startswith("-m")} | NO_WORK)


# a launcher's command line -> what it was asked for
ASKED = {
    "launch --cpu --num_processes 2 script.py": 2,
    "launch --num-processes=4 script.py": 4,
    "launch --num_processes 1 script.py --num_processes 3": 1,
    "launch --cpu script.py": 1,
    "launch --num_processes many script.py": 1,
    "--num_processes 2": 1,
}
PARENT = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)"
CHILD = (
    f"import runpy, sys; sys.exit(runpy.run_path({launched_file.__file__!r})['count_asked']())"  # without the package
)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")
@pytest.mark.parametrize("line", ASKED)
def test_what_was_asked_for_stands_on_the_launchers_line(line, monkeypatch):
    env = os.environ | {"ACCELERATE_USE_CPU": "True"}
    command = [sys.executable, "-c", PARENT.format(code=CHILD), *line.split()]
    assert subprocess.run(command, env=env).returncode == ASKED[line]
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert count_asked() == 1
