"""The benchmarks of example selection: rows, skipping, table, and that what is looked up is what the pipeline does."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answers import tiny_seggpt
from scenes import SIZE, tiny_encoder
from tiny_sam2 import tiny_sam2

from hf_effdl import FeatureMatching, Sam2InContext, SegGptInContext
from hf_effdl.vicl.remote_code.visual_tasks import Segmentation


FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks():
    """The scripts, imported by name as `python examples/benchmarks/...` would import what they share."""
    before, threads = list(sys.path), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path[:] = before
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def arms(benchmarks):
    return benchmarks("vicl_arms")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def runs_twice(main, arguments: list[str], file: Path, capsys) -> tuple[list[dict], str]:
    """The rows of a first run, and the table, which a second run and `--table` print alone."""
    main(arguments)
    found, (table, said) = rows(file), capsys.readouterr()
    assert "arms" in said
    main(arguments)
    assert rows(file) == found
    again, said = capsys.readouterr()
    assert again == table and "arms" not in said
    main([*arguments, "--table"])
    assert capsys.readouterr().out == table
    return found, table


@pytest.mark.slow
def test_pets_small(benchmarks, arms, data_folder, tmp_path, capsys, monkeypatch):
    pets = benchmarks("vicl_pets")
    compared = []
    compare = pets.compare_with_pipeline
    monkeypatch.setattr(pets, "compare_with_pipeline", lambda *given: compared.append(compare(*given)))
    monkeypatch.setattr(pets, "CHECKED", 2)
    arguments = "--tasks segmentation --frozen soft --seeds 1 --photos 30 --folds 1 --rankers 0".split()
    file = tmp_path / "rows.jsonl"
    arguments += ["--out", str(file), "--cache", str(tmp_path / "cache")]
    found, table = runs_twice(pets.main, arguments, file, capsys)
    assert compared == [None]  # it raises where lookup and pipeline differ
    of = {row["arm"]: row["folds"][0] for row in found}
    assert [row["arm"] for row in found] == [arm for arm in arms.ARMS if arm in of]
    assert all(len(row["folds"]) == 1 and row["date"] and row["torch"] for row in found)
    assert of["oracle of the 50"] >= max(of[arm] for arm in of if arms.ARMS[arm] == 1 and "random" not in arm)
    assert of["random"] == pytest.approx(of["mean of the 50"], abs=1e-4)  # the 25 others are all candidates
    lines = table.splitlines()
    assert lines[0].startswith("measured on ")
    for arm in of:
        assert sum(line.startswith(f"| {arm} |") for line in lines) == 1
    assert "| oracle of the 50 | 50 |" in table
    assert {"cascade", "cascade, one pass", "cascade 10, weighted", "medoid of dense 10"} <= set(of)
    assert "| soft | cascade |" in table  # and how far it is ahead


@pytest.mark.slow
def test_digits_small(benchmarks, arms, tmp_path, capsys):
    digits = benchmarks("vicl_digits")
    file = tmp_path / "rows.jsonl"
    arguments = ["--seeds", "1", "--queries", "6", "--pool", "14", "--tasks", "segmentation", "--out", str(file)]
    found, table = runs_twice(digits.main, arguments, file, capsys)
    of = {row["arm"]: row["folds"][0] for row in found}
    assert [row["arm"] for row in found] == [arm for arm in arms.ARMS if arm in of]
    assert of["nearest"] <= of["oracle of the 50"] and "nearest, two arrangements" in of
    assert f"oracle less nearest: {of['oracle of the 50'] - of['nearest']:.3f}" in table


def test_gap_and_error_are_of_paired_differences(arms):
    of = {"nearest": {0: [0.5, 0.6]}, "oracle of the 50": {0: [0.9, 1.0]}, "dense": {0: [0.6, 0.8]}}
    assert arms.summary(of, "dense") == pytest.approx((0.7, 0.375, 0.05 / 0.4))
    single = {arm: {seed: [value] for seed, value in enumerate(values[0])} for arm, values in of.items()}
    assert arms.summary(single, "dense") == pytest.approx((0.7, 0.375, 0.05 / 0.4))
    assert arms.ahead(of | {"cascade": {0: [0.7, 0.8]}}, "cascade", "dense") == pytest.approx((0.05 / 0.4, 0.05 / 0.4))


def test_weighted_means_and_ten_pass_arms_are_what_they_say(arms):
    from hf_effdl.vicl.remote_code.visual_tasks import find_task

    task, generator = find_task("segmentation"), torch.Generator().manual_seed(0)
    painted = torch.rand(12, 1, 6, 6, generator=generator).expand(-1, 3, -1, -1).clone()
    truth = (torch.rand(1, 6, 6, generator=generator) > 0.5).float().expand(3, -1, -1)
    places, weights = torch.tensor([3, 1]), torch.tensor([0.9, 0.1])
    order = torch.arange(12)
    of = arms.arms_of_query(task, painted, truth, {"dense": order, "nearest": order}, {"cascade": (places, weights)})
    assert of["cascade"] == pytest.approx(float(task.score(0.9 * painted[3] + 0.1 * painted[1], truth)))
    assert of["dense 10, mean"] == pytest.approx(float(task.score(painted[:10].mean(0), truth)))
    best = arms.agreement(task, painted[:10]).argmax()
    assert of["medoid of dense 10"] == pytest.approx(float(task.score(painted[best], truth)))


@pytest.mark.slow
def test_cutouts_small(benchmarks, data_folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = ["--categories", "cat", "--frozen", "soft", "--scenes", "40"]
    arguments += ["--out", str(file), "--cache", str(tmp_path / "cache")]
    found, table = runs_twice(benchmarks("vicl_cutouts").main, arguments, file, capsys)
    of = {row["arm"]: row["folds"] for row in found}
    assert all(len(folds) == 4 for folds in of.values()) and "| auto, without a cascade | 1 |" in table
    for fold, value in enumerate(of["auto, without a cascade"]):
        assert value in [of[arm][fold] for arm in ("nearest", "dense", "transfer")]


def test_a_cutout_is_the_other_picture_inside_the_mask_and_nothing_else(benchmarks):
    module = benchmarks("vicl_cutouts")
    for seed in range(5):
        thing, behind = np.full((32, 32, 3), 200, np.uint8), np.full((32, 32, 3), 20, np.uint8)
        picture, mask = map(np.asarray, module.scene(thing, behind, np.random.RandomState(seed)))
        assert set(np.unique(mask)) == {0, 1} and 0.02 < mask.mean() < 0.5
        assert (picture[mask == 1] == 200).all() and (picture[mask == 0] == 20).all()


def test_queries_and_their_near_duplicates_are_not_in_a_pool(benchmarks, monkeypatch):
    pets = benchmarks("vicl_pets")
    split = pets.read_splits(pets.SPLITS / "pets.json")["seed 0, fold 0"]
    names = sorted({*split.queries, *split.pool, *split.dropped})
    assert len(names) == 600 and split.dropped

    photos = SimpleNamespace(names=names, task=pets.TASKS["segmentation"])
    queries, members = pets.splits("segmentation", 600, 0, 1)[0]
    kept = {photos.names[row] for row in pets.without_copies(photos, queries, members, 0, 0)}
    assert kept == set(split.pool) and not kept & {*split.queries, *split.dropped}
    with pytest.raises(AssertionError, match="not those of the split file"):
        pets.without_copies(photos, members[:100], members, 0, 0)


def test_leads_of_feature_matching_are_paired_and_maps_that_are_kept_answer_as_pictures_do(benchmarks, monkeypatch):
    module = benchmarks("vicl_matching")
    for name, value in (("ENCODERS", (None, (0, None), 2)), ("PETS", (3, 8, 1)), ("DIGITS", (3, 8))):
        monkeypatch.setitem(getattr(module, name), "tiny", value)
    monkeypatch.setattr(module, "CANDIDATES", 4)
    encoder, images = tiny_encoder(), torch.rand(11, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    labels = (
        (torch.rand(11, 1, 56, 56, generator=torch.Generator().manual_seed(1)) > 0.4).float().expand(-1, 3, -1, -1)
    )
    maps = encoder.maps(images, module.kept_layers("tiny"))
    data = SimpleNamespace(vectors=encoder(images)["vector"], labels=labels, maps=maps)
    rows = module.rows_of(data, encoder, {"data": "pets", "encoder": "tiny", "seed": 0})
    assert [row["arm"] for row in rows] == list(module.ARMS) and rows[0]["oracle ahead"] == [0, 0]
    for row in rows:
        for name in ("nearest", "oracle", "random"):
            assert row[f"{name} ahead"][0] == pytest.approx(row[name] - rows[0][name], abs=2e-5)
    queries, pool = module.split("pets", "tiny", 0)
    shown = pool[(data.vectors[queries] @ data.vectors[pool].T).argmax(1)]
    model = FeatureMatching(encoder, "mutual", layers=(0, None), positions=2)
    painted = model(images[queries], images[shown][:, None], labels[shown][:, None])
    assert rows[-1]["nearest"] == pytest.approx(float(Segmentation().score(painted, labels[queries]).mean()), abs=1e-4)


def test_the_pool_of_small_classes_has_14_to_23_rows_of_each(benchmarks):
    scenes = benchmarks("vicl_classes").pool_scenes(0)
    assert [sum(scene.label == digit for scene in scenes) for digit in range(10)] == list(range(14, 24))


def test_rates_are_of_calls_what_is_kept_changes_no_answer_and_costs_follow(benchmarks, tmp_path, capsys, monkeypatch):
    speed, file = benchmarks("vicl_throughput"), tmp_path / "rows.jsonl"
    tiny = {"one canvas": lambda: SegGptInContext(tiny_seggpt()), "by itself": lambda: Sam2InContext(tiny_sam2())}
    made = []
    monkeypatch.setattr(speed, "BUILD", {name: lambda name=name: made.append(name) or tiny[name]() for name in tiny})
    arguments = ["--models", *tiny, "--batch", "2", "--examples", "3", "--out", str(file)]
    speed.main(arguments)
    found, (printed, _) = rows(file), capsys.readouterr()
    assert made == list(tiny)
    assert [(row["model"], row["queries"], row["examples"], row["kept"]) for row in found] == [
        ("one canvas", 2, 1, False),
        ("by itself", 2, 1, False),
        ("by itself", 1, 3, False),
        ("by itself", 1, 3, True),
    ]
    assert found[-1]["apart"] < 1e-5 and all(row["seconds"] > 0 and row["date"] for row in found)
    assert f"3 examples: {found[2]['seconds'] / found[3]['seconds']:.2f} times as fast" in printed
    hours = 45_400_000 / (2 / found[0]["seconds"]) / 3600
    assert "| one canvas, cpu, float32 | " in printed and f" {hours:,.1f} |" in printed
    speed.main(arguments)
    assert rows(file) == found and capsys.readouterr().out == printed
