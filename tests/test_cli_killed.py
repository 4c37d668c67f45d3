"""Long verbs that are killed from outside: the same command ends as if nothing had happened."""

from pathlib import Path

import pytest
import scenes
from datasets import Dataset
from forked import Script
from test_cli import QUIET, photos  # noqa: F401 - a fixture
from test_examples import config, texts  # noqa: F401 - fixtures

from hf_effdl.structure.training import checkpoints


# verb -> its command, what it leaves, and where it is killed
VERBS = {
    "sparsify": (
        "sparsify --config {config} --num_train_epochs 2 --save_steps 4 --save_strategy steps --finetune_epochs 1",
        "slim/model.safetensors",
        ("checkpoint-8/sparse_path.safetensors",),
    ),
    "slim": (
        "slim --model_name_or_path {texts}/model --keep 0.5 --calibration {texts}/data --split train --column text",
        "*.safetensors",
        ("/tokenizer.json", "/config.json"),
    ),
    "select": ("select {rows} --budget 20", "selection/**/*.parquet", ("selection/default/selection.json",)),
    "score": ("score {rows} --probe_rows 40 --num_probes 3", "*.parquet", ("scores.parquet",)),
    "score shards": (
        "score {rows} --probe_rows 40 --num_probes 3 --labelled false --files {shards}",
        "*.parquet",
        ("scores-00001-of-00003.parquet",),
    ),
    "pool": (
        "pool build --dataset_name {photos}/data --encoder {photos}/vit --label_column mask --foreground 1",
        "data/*",
        (".tar", "out/pool.json"),
    ),
    "fit cascade": (
        "fit cascade --dataset_name {scenes} --label_column mask --model {photos}/vit --candidates 4 --passes 2",
        "model/**/*.safetensors",
        ("report.json",),
    ),
    "fit ranker": (
        "fit ranker --dataset_name {scenes} --label_column mask --model {photos}/vit --candidates 4 --lengths 3 "
        "--num_train_epochs 1",
        "ranker-3/model.safetensors",
        ("trainer_state.json", "report.json"),
    ),
}
TRAINED = ("sparsify", "select", "fit ranker")  # by a Trainer
POINTS = [(verb, where) for verb, (_, _, points) in VERBS.items() for where in points]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(config, texts, photos, tmp_path_factory):  # noqa: F811
    """From a verb and a folder to the arguments."""
    folder = tmp_path_factory.mktemp("shards")
    for part in range(3):
        Dataset.from_dict({"text": ["cat dog", "bus van"] * 5}).to_parquet(folder / f"{part}.parquet")
    scenes.rows(24).save_to_disk(folder / "scenes")
    rows = f"--model_name_or_path {texts.parent}/model --dataset_name {texts.parent}/data --label_column topic"
    shards = " ".join(str(file) for file in sorted(folder.glob("*.parquet")))
    known = {
        "config": config,
        "scenes": folder / "scenes",
        "texts": texts.parent,
        "photos": photos,
        "rows": rows,
        "shards": shards,
    }

    def line(verb: str, out: Path) -> list[str]:
        return [*VERBS[verb][0].format(**known).split(), "--output_dir", str(out), *(QUIET if verb in TRAINED else ())]

    return line


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """What a verb leaves, by its name; run once."""
    known: dict[str, dict[str, bytes]] = {}

    def left(verb: str) -> dict[str, bytes]:
        if verb not in known:
            folder = tmp_path_factory.mktemp("whole")
            Script("cli_run.py", folder / "held", "", *command(verb, folder / "out"), cwd=folder).finish()
            known[verb] = contents(folder / "out", verb)
        return known[verb]

    return left


def contents(out: Path, verb: str) -> dict[str, bytes]:
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in sorted(out.glob(VERBS[verb][1]))}


def killed(tmp_path: Path, where: str, argv: list[str]) -> None:
    script = Script("cli_run.py", tmp_path / "held", where, *argv, cwd=tmp_path)
    script.wait_for((tmp_path / "held").exists)
    assert script.kill()


@pytest.mark.parametrize(("verb", "where"), POINTS)
def test_a_verb_that_was_killed_ends_the_second_time_as_one_that_was_not(
    verb, where, command, uninterrupted, tmp_path
):
    argv = command(verb, tmp_path / "out")
    killed(tmp_path, where, argv)
    Script("cli_run.py", tmp_path / "held", "", *argv, cwd=tmp_path).finish()
    assert contents(tmp_path / "out", verb) == uninterrupted(verb) != {}
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_dir()]  # what the first time was half done


@pytest.mark.parametrize(
    "where",
    [
        "checkpoint-8/sparse_path.safetensors",
        "finetune/checkpoint-4/trainer_state.json",
        "slim/sparse_path.safetensors",
    ],
)
def test_a_killed_training_goes_on_where_it_is_told_to(where, command, uninterrupted, tmp_path):
    argv = command("sparsify", tmp_path / "out")
    killed(tmp_path, where, argv)
    begun = checkpoints.newest(tmp_path / "out")
    written = Path(begun, "model.safetensors").stat().st_mtime_ns
    more = ["--resume_from_checkpoint", "True"]
    Script("cli_run.py", tmp_path / "held", "", *argv, *more, cwd=tmp_path).finish()
    assert contents(tmp_path / "out", "sparsify") == uninterrupted("sparsify")
    assert Path(begun, "model.safetensors").stat().st_mtime_ns == written  # it is not made again


def test_a_fine_tuning_that_was_cut_off_is_not_taken_for_another(command, tmp_path):
    argv = command("sparsify", tmp_path / "out")
    killed(tmp_path, "finetune/checkpoint-4/trainer_state.json", argv)
    script = Script("cli_run.py", tmp_path / "held", "", *argv, cwd=tmp_path)
    assert script.wait() == [1]
    assert "finetune has checkpoints of an earlier run: " in script.output
