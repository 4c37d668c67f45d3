"""What tests of the pipeline share: queries, what an answer has to be, and frozen models beside feature matching."""

import numpy as np
import torch
from PIL import Image as Picture
from pytest import approx
from scenes import SIZE, scene
from transformers import SegGptConfig, SegGptForImageSegmentation

from hf_effdl.vicl.remote_code.frozen_canvas import CanvasModel


QUERIES = list(range(100, 105))


class Mirror(CanvasModel):
    """Paints the query's mirror image, and some of the example's label, so that every arrangement matters."""

    def paint(self, canvas, mask):
        return (0.5 * canvas.flip(3) + 0.5 * canvas.flip(2)).clamp(0, 1)


def tiny_seggpt():
    torch.manual_seed(0)
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "decoder_hidden_size": 8,
        "image_size": (2 * SIZE, SIZE),
        "patch_size": 8,
        "pretrain_image_size": 16,
        "merge_index": 0,
        "intermediate_hidden_state_indices": (1, 2),
        "initializer_range": 0.2,
    }
    return SegGptForImageSegmentation(SegGptConfig(**values))


def photos(numbers=QUERIES):
    return [scene(number)[0] for number in numbers]


def plain(output):
    """Something that == compares, for each kind of prediction."""
    prediction = output["prediction"]
    if prediction is not None and not isinstance(prediction, list):
        prediction = np.asarray(prediction).tolist()
    return prediction, output["example_ids"], output["scores"]


def same(one, other):
    """Two answers but for rounding, which may also turn single pixels over."""
    assert one["example_ids"] == other["example_ids"]
    assert one["scores"] == approx(other["scores"], abs=1e-5)
    pair = [out["prediction"] for out in (one, other)]
    assert (pair[0] is None) == (pair[1] is None)
    if pair[0] is not None:
        apart = np.abs(np.subtract(*(np.asarray(value, dtype=int) for value in pair)))
        assert apart.max() <= 1 and apart.mean() < 0.01


def all_same(outputs, others):
    for one, other in zip(outputs, others, strict=True):
        same(one, other)


def check_contract(task, output, image, m, ids):
    assert set(output) == {"prediction", "example_ids", "scores", "confidence"}
    assert output["confidence"] is None if task == "colourisation" else 0 <= output["confidence"] <= 1
    names, scores, prediction = output["example_ids"], output["scores"], output["prediction"]
    assert isinstance(names, list) and isinstance(scores, list) and len(names) == len(scores) == m
    assert all(isinstance(name, str) and name in ids for name in names) and len(set(names)) == m
    assert all(isinstance(score, float) for score in scores) and scores == sorted(scores, reverse=True)
    width, height = image.size
    if task == "segmentation":
        assert isinstance(prediction, np.ndarray) and prediction.dtype == np.uint8
        assert prediction.shape == (height, width) and set(np.unique(prediction)) <= {0, 1}
    elif task == "detection":
        if prediction is not None:
            x0, y0, x1, y1 = prediction
            assert all(type(value) is int for value in prediction)
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    else:
        assert isinstance(prediction, Picture.Image) and prediction.mode == "RGB" and prediction.size == image.size
