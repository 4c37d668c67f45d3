"""The tiny SegGPT in model_cards paints what its example shows; its scenes and its script do what they say."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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


def test_it_paints_what_the_example_shows_and_not_what_another_does(scenes, script, model, boards):
    assert (FOLDER / "model.safetensors").stat().st_size < 2_500_000 and model.dtype is torch.float32
    task = boards["segmentation"]
    below = script.paint(model, task["shown"], task["images"], below=True)
    right, other, under = (script.iou(part, task["labels"]).mean() for part in (task["right"], task["other"], below))
    assert min(right, under) > 0.78 and other < 0.10 and not np.allclose(below, task["right"])
    task = boards["detection"]
    copied = np.stack([label for _, label in task["shown"]])
    middle = np.repeat(scenes.fill_box([12, 12, 36, 36])[None, ..., None], 24, 0).repeat(3, -1)
    right, other, *naive = (
        script.iou(part, task["labels"]).mean() for part in (task["right"], task["other"], copied, middle)
    )
    assert right > 0.74 and right > 2 * max(naive) and other < right / 3
    task = boards["colourisation"]
    foreign = script.paint(model, task["shown"][1:] + task["shown"][:1], task["images"])
    error, grey, other = (
        script.squared_error(part, task["labels"]).mean()
        for part in (task["right"], np.stack(task["images"]), foreign)
    )
    assert error < 0.5 * grey and error < 0.3 * other


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
