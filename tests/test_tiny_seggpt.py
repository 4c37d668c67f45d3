"""The tiny SegGPT in model_cards paints what its example shows; its scenes and its script do what they say."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import SegGptForImageSegmentation, SegGptImageProcessorPil


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "model_cards" / "tiny-seggpt-digits"


@pytest.fixture(scope="module")
def modules():
    """The two example files, imported by name as `python examples/...` would import them."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("digit_scenes"), importlib.import_module("train_tiny_seggpt")
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def scenes(modules):
    return modules[0]


@pytest.fixture(scope="module")
def script(modules):
    return modules[1]


@pytest.fixture(scope="module")
def model():
    return SegGptForImageSegmentation.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def boards(modules, model):
    """Of 24 fixed test pairs a task: the queries' images and labels, painted by the right and by another example."""
    scenes, script = modules
    result = {}
    for task in scenes.TASKS:
        triples = zip(*script.test_triples(24, task, seed=7))
        right, queries, other = ([scene.painting(task) for scene in part] for part in triples)
        images, labels = [image for image, _ in queries], np.stack([label for _, label in queries])
        result[task] = {
            "shown": right,
            "images": images,
            "labels": labels,
            "right": script.paint(model, right, images),
            "other": script.paint(model, other, images),
        }
    return result


def test_the_weights_are_small_and_load_in_single_precision(model):
    assert (FOLDER / "model.safetensors").stat().st_size < 2_500_000
    assert model.dtype is torch.float32


def test_segments_what_the_example_shows(script, boards):
    task = boards["segmentation"]
    right, other = (script.iou(task[name], task["labels"]).mean() for name in ("right", "other"))
    assert right > 0.78
    assert other < 0.10


def test_segments_with_the_example_below_the_query_too(script, model, boards):
    task = boards["segmentation"]
    below = script.paint(model, task["shown"], task["images"], below=True)
    assert script.iou(below, task["labels"]).mean() > 0.78
    assert not np.allclose(below, task["right"])


def test_detection_beats_the_examples_box_and_the_middle_of_the_picture(scenes, script, boards):
    task = boards["detection"]
    score = script.iou(task["right"], task["labels"]).mean()
    copied = np.stack([label for _, label in task["shown"]])
    middle = np.repeat(scenes.fill_box([12, 12, 36, 36])[None, ..., None], 24, 0).repeat(3, -1)
    assert score > 0.74
    assert score > 2 * max(script.iou(copied, task["labels"]).mean(), script.iou(middle, task["labels"]).mean())
    assert script.iou(task["other"], task["labels"]).mean() < score / 3


def test_colourisation_beats_grey_and_takes_its_tints_from_the_example(script, model, boards):
    task = boards["colourisation"]
    error = script.squared_error(task["right"], task["labels"]).mean()
    assert error < 0.5 * script.squared_error(np.stack(task["images"]), task["labels"]).mean()
    foreign = script.paint(model, task["shown"][1:] + task["shown"][:1], task["images"])
    assert error < 0.3 * script.squared_error(foreign, task["labels"]).mean()


def test_the_saved_processor_makes_the_same_inputs_and_masks(scenes, script, model):
    processor = SegGptImageProcessorPil.from_pretrained(FOLDER)
    shown, asked = scenes.make_scenes(2, split="test", seed=3)
    inputs = processor(
        images=asked["image"], prompt_images=shown["image"], prompt_masks=shown["mask"], return_tensors="pt"
    )
    example, query = (np.asarray(row["image"], np.float32) / 255 for row in (shown, asked))
    label = np.repeat(np.asarray(shown["mask"], np.float32)[..., None], 3, -1)
    for name, picture in {"pixel_values": query, "prompt_pixel_values": example, "prompt_masks": label}.items():
        torch.testing.assert_close(inputs[name].float(), script.normalise(picture[None]), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        outputs = model(**{name: value.float() for name, value in inputs.items()})
    mask = processor.post_process_semantic_segmentation(outputs, num_labels=1)[0].numpy()
    painted = script.paint(model, [(example, label)], [query])[0]
    assert (mask == (painted.clip(0, 1).mean(-1) > 0.5)).mean() > 0.995


def test_a_seed_draws_the_same_scenes_and_a_longer_list_begins_with_a_shorter(scenes):
    for task in scenes.TASKS:
        first, again = scenes.make_scenes(4, task=task, seed=5), scenes.make_scenes(6, task=task, seed=5)
        assert [np.asarray(row["image"]).tobytes() for row in first] == [
            np.asarray(row["image"]).tobytes() for row in again[:4]
        ]
        other = scenes.make_scenes(1, task=task, seed=6)[0]
        assert np.asarray(other["image"]).tobytes() != np.asarray(first[0]["image"]).tobytes()
    with pytest.raises(ValueError, match="colorization"):
        scenes.make_scenes(1, task="colorization")
    with pytest.raises(ValueError, match="validation"):
        scenes.make_scenes(1, split="validation")


def test_train_and_test_scenes_share_no_digit(scenes):
    split = {name: set(scenes.digits(name)[2].tolist()) for name in ("train", "test")}
    assert not split["train"] & split["test"]
    assert len(split["train"]) + len(split["test"]) == 1797
    for name, rows in split.items():
        for task in scenes.TASKS:
            for scene in scenes.draw_scenes(10, name, task, seed=0):
                assert set(scene.rows) <= rows
                assert scene.label not in scene.others and len(scene.rows) == 1 + len(scene.others) >= 2


def test_rows_make_a_dataset_and_boxes_bound_masks(scenes):
    rows = Dataset.from_list(scenes.make_scenes(10, task="segmentation", seed=1))
    for row in rows:
        assert row["image"].mode == "RGB" and row["mask"].mode == "L" and row["image"].size == row["mask"].size
        assert set(np.unique(row["mask"])) == {0, 1}
    assert set(Dataset.from_list(scenes.make_scenes(2, task="colourisation")).column_names) == {"image", "digit"}
    for row, scene in zip(
        scenes.make_scenes(10, task="detection", seed=1), scenes.draw_scenes(10, "train", "detection", seed=1)
    ):
        x0, y0, x1, y1 = row["box"]
        assert scene.mask[y0:y1, x0:x1].sum() == scene.mask.sum()
        assert all(
            edge.any() for edge in (scene.mask[y0], scene.mask[y1 - 1], scene.mask[:, x0], scene.mask[:, x1 - 1])
        )


def test_colours_have_the_luminance_of_their_grey_picture(scenes):
    rows = scenes.make_scenes(6, task="colourisation", seed=2)
    for row, scene in zip(rows, scenes.draw_scenes(6, "train", "colourisation", seed=2)):
        grey = np.asarray(row["image"].convert("L"), np.float32) / 255
        assert np.abs(grey - scene.grey[..., 0]).max() < 2.5 / 255


def test_the_nearest_example_is_not_the_best(script, model):
    scores = script.retrieval_protocol(model, queries=10, pool=60, candidates=10, seed=1, random_draws=4)
    assert scores["best of 10"] > scores["nearest"] + 0.08
    assert scores["gap"] == pytest.approx(scores["best of 10"] - scores["nearest"])


def test_the_script_trains_saves_and_measures(script, tmp_path):
    few = ["--test_pairs", "2", "--queries", "2", "--pool", "6", "--candidates", "2"]
    metrics = script.main(["--output_dir", str(tmp_path), "--steps", "3", "--workers", "0", *few])
    assert metrics["largest_change_by_half_precision"] < 0.01
    assert SegGptForImageSegmentation.from_pretrained(tmp_path).dtype is torch.float32
    assert SegGptImageProcessorPil.from_pretrained(tmp_path).size == {"height": 48, "width": 48}
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and np.isfinite(lines[-1]["loss"])
    assert json.loads((tmp_path / "metrics.json").read_text())["arguments"]["steps"] == 3
    assert (tmp_path / "scenes.png").is_file()
