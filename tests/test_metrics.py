"""The metrics as `evaluate` loads them from their folders, without the network."""

import socket
from importlib.resources import files

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from hf_effdl.vicl.remote_code.visual_tasks import TASKS


@pytest.fixture
def load(tmp_path, monkeypatch):
    def no_network(*args):
        raise AssertionError("a metric was loaded over the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    return lambda name: evaluate.load(str(files("hf_effdl.metrics") / name), cache_dir=str(tmp_path))


STD = np.array([0.229, 0.224, 0.225])
# a pair of each metric: prediction, reference, value, the value's name
PAIRS = {
    "foreground_iou": ([[1, 1, 0]], [[1, 0, 0]], 0.5, "iou"),
    "box_iou": ([0, 0, 2, 2], [1, 0, 3, 2], 1 / 3, "iou"),
    "colour_mse": (np.zeros((1, 1, 3)), np.full((1, 1, 3), 0.2), np.mean((0.2 / STD) ** 2), "mse"),
}
every = pytest.mark.parametrize("name", PAIRS)


@every
def test_all_ways_of_feeding_give_the_same_means(load, name):
    prediction, reference, value, short = PAIRS[name]
    expected = {f"mean_{short}": value, f"mean_{short}_1000": value}
    metric = load(name)
    assert metric.name == name
    for _ in range(2):  # compute starts over
        assert metric.compute(predictions=[prediction] * 3, references=[reference] * 3) == pytest.approx(expected)
    for _ in range(3):
        metric.add(prediction=prediction, reference=reference)
    metric.add_batch(predictions=[prediction] * 2, references=[reference] * 2)
    result = metric.compute(per_item=True)
    assert result.pop(short) == pytest.approx([value] * 5) and result == pytest.approx(expected)
    assert "2405.15279" in metric.citation and "per_item" in metric.inputs_description and "1000" in metric.description


@pytest.mark.parametrize(
    "name, n, often, front",
    [("box_iou", 346, 3, 308), ("box_iou", 451, 3, 98), ("box_iou", 725, 2, 275), ("box_iou", 1000, 1, 1000)]
    + [(name, 70, 15, 20) for name in PAIRS],
)
def test_the_loop_of_a_thousand_positions_counts_the_front_once_more(load, name, n, often, front):
    prediction, reference, value, short = PAIRS[name]
    same = (reference, reference)  # worth 1 where larger is better, else 0
    metric, perfect = load(name), 0.0 if short == "mse" else 1.0

    def mean(ones):
        pairs = [same if one else (prediction, reference) for one in ones]
        got = metric.compute(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])
        assert got[f"mean_{short}"] == pytest.approx(np.mean([perfect if one else value for one in ones]))
        return (got[f"mean_{short}_1000"] - value) / (perfect - value) * 1000  # how often the perfect items counted

    assert mean([True] * n) == pytest.approx(1000)
    assert mean([i < front for i in range(n)]) == pytest.approx(often * front)
    assert mean([i == front - 1 for i in range(n)]) == pytest.approx(often)
    if front < n:
        assert mean([i == front for i in range(n)]) == pytest.approx(often - 1)


@every
def test_of_more_than_a_thousand_the_first_thousand_count(load, name):
    prediction, reference, value, short = PAIRS[name]
    got = load(name).compute(predictions=[prediction] * 1000 + [reference] * 250, references=[reference] * 1250)
    perfect = 0 if short == "mse" else 1
    assert got[f"mean_{short}_1000"] == pytest.approx(value)
    assert got[f"mean_{short}"] == pytest.approx(0.8 * value + 0.2 * perfect)


@every
def test_the_metrics_are_the_scores_of_the_tasks(load, name):
    task = next(task for task in TASKS.values() if task.metric == name)
    soft = torch.rand(2, 6, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    if name == "box_iou":
        soft[:] = torch.rand(2, 6, 1, 9, 8, generator=torch.Generator().manual_seed(0)) < 0.15
    predictions, references = (task.decode(each, (9, 8)) for each in soft)
    metric = load(name)
    got = metric.compute(predictions=predictions, references=references, per_item=True)
    # a decoded picture is of 8 bits
    assert got[PAIRS[name][3]] == pytest.approx(task.score(*soft).tolist(), rel=1e-2 if name == "colour_mse" else 1e-6)


def test_masks_of_any_kind_and_size_mix(load):
    metric = load("foreground_iou")
    mask = np.array([[0, 1, 1], [0, 0, 1]])
    kinds = [
        mask,
        mask > 0,
        mask.astype(np.uint8) * 255,
        torch.tensor(mask),
        mask.tolist(),
        mask * 300,
        Image.fromarray(mask.astype(np.uint8)),
        Image.fromarray(mask > 0),
    ]
    assert metric.compute(predictions=kinds, references=kinds[::-1], per_item=True)["iou"] == [1.0] * 8
    assert (
        metric.compute(predictions=np.stack([mask] * 2), references=torch.tensor(np.stack([mask] * 2)))["mean_iou"]
        == 1
    )
    sizes = [(3, 4), (7, 2), (1, 1), (111, 111)]
    rng = np.random.default_rng(0)
    a, b = ([rng.integers(0, 2, size) for size in sizes] for _ in range(2))
    expected = [1.0 if not (x | y).any() else (x & y).sum() / (x | y).sum() for x, y in zip(a, b)]
    assert metric.compute(predictions=a, references=b, per_item=True)["iou"] == pytest.approx(expected)


def test_two_empty_masks_agree_and_void_is_left_out(load):
    metric = load("foreground_iou")
    empty, full = np.zeros((2, 2), int), np.ones((2, 2), int)
    got = metric.compute(predictions=[empty, empty, full], references=[empty, full, empty], per_item=True)
    assert got["iou"] == [1.0, 0.0, 0.0]
    pair = {"predictions": [[[1, 0, 0, 0]]], "references": [[[1, 0, 255, 255]]]}
    assert metric.compute(**pair)["mean_iou"] == pytest.approx(1 / 3)
    assert metric.compute(**pair, ignore_index=255)["mean_iou"] == 1


def test_boxes_and_their_absence(load):
    box, apart = [0.5, 0, 2.5, 2], np.array([5, 5, 6, 6])
    got = load("box_iou").compute(
        predictions=[box, box, None, None, [], box, torch.tensor([0, 0, 4, 4])],
        references=[box, apart, box, None, None, [], (1, 1, 3, 3)],
        per_item=True,
    )
    assert got["iou"] == pytest.approx([1, 0, 0, 1, 1, 0, 0.25])


def test_colours_of_any_kind_and_size_mix(load):
    metric = load("colour_mse")
    bytes_ = np.random.default_rng(0).integers(0, 256, (4, 5, 3))
    kinds = [
        bytes_.astype(np.uint8),
        bytes_ / 255,
        torch.tensor(bytes_ / 255),
        bytes_.tolist(),
        bytes_,
        Image.fromarray(bytes_.astype(np.uint8)),
    ]
    got = metric.compute(predictions=kinds, references=kinds[::-1], per_item=True)
    assert got["mse"] == pytest.approx([0] * 6, abs=1e-12)
    small, large = np.zeros((1, 2, 3)), np.zeros((9, 7, 3))
    assert metric.compute(predictions=[small, large], references=[small, large + 0.25], per_item=True)["mse"][0] == 0
    # floats are not rounded to bytes
    assert 0 < metric.compute(predictions=[small], references=[small + 1e-4])["mean_mse"] < 1e-6


@every
def test_lists_of_two_lengths_and_none_at_all_are_refused(load, name):
    prediction, reference, value, short = PAIRS[name]
    metric = load(name)
    for bad in ({"predictions": [prediction]}, {"predictions": [prediction] * 2, "references": [reference]}):
        with pytest.raises(ValueError, match="lists of one length|inputs are missing"):
            metric.compute(**bad)
    with pytest.raises(ValueError, match="no items"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(TypeError, match="per_itme"):
        metric.compute(predictions=[prediction], references=[reference], per_itme=True)
    # and it works afterwards
    assert metric.compute(predictions=[prediction], references=[reference])[f"mean_{short}"] == pytest.approx(value)


@pytest.mark.parametrize(
    "name, prediction, reference, says",
    [
        ("foreground_iou", [[1, 1]], [[1], [1]], r"prediction is \(1, 2\) and its reference \(2, 1\)"),
        ("foreground_iou", [[0.5, 1]], [[1, 1]], "float64 .* threshold"),
        ("foreground_iou", [1, 1], [1, 1], r"a mask is \(H, W\)"),
        ("foreground_iou", np.zeros((0, 3), int), np.zeros((0, 3), int), r"got int64 \(0, 3\)"),
        ("foreground_iou", Image.new("RGB", (2, 2)), [[1]], r"a mask is \(H, W\)"),
        ("foreground_iou", None, [[1]], r"a mask is \(H, W\)"),
        ("box_iou", [2, 0, 2, 2], None, "x0 < x1"),
        ("box_iou", [0, 3, 2, 2], None, "y0 < y1"),
        ("box_iou", None, [0, 0, 2], "or None for no box"),
        ("box_iou", [0, 0, 2, float("nan")], None, "or None for no box"),
        ("box_iou", [0, 0, 2, float("inf")], None, "or None for no box"),
        ("colour_mse", np.zeros((3, 8, 8)), np.zeros((3, 8, 8)), "channels last"),
        ("colour_mse", np.zeros((8, 8)), np.zeros((8, 8)), "channels last"),
        ("colour_mse", np.zeros((0, 8, 3)), np.zeros((0, 8, 3)), "channels last"),
        ("colour_mse", np.zeros((8, 8, 3)), np.zeros((8, 9, 3)), "prediction is .* and its reference"),
        ("colour_mse", np.full((8, 8, 3), 255.0), np.zeros((8, 8, 3)), r"floats in \[0, 1\]; got float64"),
        ("colour_mse", np.full((8, 8, 3), np.nan), np.zeros((8, 8, 3)), "nan"),
        ("colour_mse", np.full((8, 8, 3), 256), np.zeros((8, 8, 3)), "0..255"),
        ("colour_mse", Image.new("L", (8, 8)), np.zeros((8, 8, 3)), "PIL mode L"),
    ],
)
def test_bad_items_are_refused_when_they_are_added(load, name, prediction, reference, says):
    metric = load(name)
    with pytest.raises(ValueError, match=says):
        metric.add(prediction=prediction, reference=reference)
    with pytest.raises(ValueError, match=says):
        metric.add_batch(predictions=[prediction], references=[reference])
    with pytest.raises(ValueError, match=says):
        metric.compute(predictions=[prediction], references=[reference])
