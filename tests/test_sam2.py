"""SAM 2 by its memory, against sessions of transformers' model that are put together by hand."""

import json
import sys

import pytest
import torch
from answers import photos, plain
from scenes import make_pool, tiny_encoder
from tiny_sam2 import SIDE, tiny_sam2
from torch.nn import functional as F
from transformers import Sam2VideoInferenceSession
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_effdl import Sam2InContext, VisualInContextModel, VisualInContextPipeline


MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


@pytest.fixture(scope="module")
def frozen():
    return Sam2InContext(tiny_sam2())


def prompts(b=2, m=3, seed=1):
    """Images, and labels with one rectangle each."""
    generator = torch.Generator().manual_seed(seed)
    queries, images = (torch.rand(shape, generator=generator) for shape in ((b, 3, SIDE, SIDE), (b, m, 3, SIDE, SIDE)))
    labels = torch.zeros(b, m, 3, SIDE, SIDE)
    for i in range(b):
        for j in range(m):
            y, x = (int(torch.randint(0, 30, (), generator=generator)) for _ in range(2))
            labels[i, j, :, y : y + 15 + 5 * j, x : x + 20 + i] = 1
    return queries, images, labels


def by_hand(model, query, images, labels):
    """The mask of a video whose frames are the examples, the first one last, and the query."""
    video = (torch.cat([images.flip(0), query[None]]) - MEAN) / STD
    session = Sam2VideoInferenceSession(video=video, video_height=SIDE, video_width=SIDE, dtype=torch.float32)
    for frame, label in enumerate(labels.flip(0)):
        number = session.obj_id_to_idx(7)
        session.add_mask_inputs(number, frame, label[None, :1])
        session.obj_with_new_inputs = [7]
        model(session, frame_idx=frame)
    logits = model(session, frame_idx=len(labels)).pred_masks
    return F.interpolate(logits, (SIDE, SIDE), mode="bilinear").sigmoid()[0].expand(3, -1, -1)


@pytest.mark.parametrize("m", [1, 3])
def test_answers_are_those_of_a_video(frozen, m):
    queries, images, labels = prompts(m=m)
    answers = frozen(queries, images, labels)
    for answer, *example in zip(answers, queries, images, labels):
        torch.testing.assert_close(answer, by_hand(frozen.model, *example), atol=1e-5, rtol=0)
    assert answers.std() > 0.05 and not frozen.model.training
    # every part of the prompt counts
    others = frozen(queries.flip(0), images, labels), frozen(queries, images.flip(0), labels)
    for other in (*others, frozen(queries, images, labels.flip(0)), frozen(queries, images, 1 - labels)):
        assert (other - answers).abs().max() > 1e-3
    if m > 1:
        assert (frozen(queries, images[:, :1], labels[:, :1]) - answers).abs().max() > 1e-3


def test_what_was_seen_may_be_kept_and_a_batch_is_its_queries_one_by_one(frozen, monkeypatch):
    queries, images, labels = prompts(b=3)
    together, kept = frozen(queries, images, labels), frozen.encode(images)
    assert kept.shape == (3, 3, frozen.encode(queries).shape[1])
    seen, encode = [], frozen.model.get_image_features
    monkeypatch.setattr(
        frozen.model, "get_image_features", lambda pixels, **more: seen.append(len(pixels)) or encode(pixels, **more)
    )
    for i in range(3):
        one = frozen.predict(frozen.encode(queries[[i]]), kept[[i]], labels[[i]])
        torch.testing.assert_close(one, together[[i]], atol=1e-5, rtol=0)
    assert sum(seen) == 3  # of the queries alone
    fresh = Sam2InContext(frozen.model)  # that has encoded nothing itself
    torch.testing.assert_close(fresh.predict(frozen.encode(queries), kept, labels), together, atol=1e-5, rtol=0)


def test_half_precision_runs_and_is_near(frozen):
    queries, images, labels = prompts()
    half = Sam2InContext(tiny_sam2().to(torch.bfloat16))
    answers = half(queries, images, labels)
    assert answers.dtype == torch.float32 and half.encode(queries).dtype == torch.bfloat16
    assert (answers - frozen(queries, images, labels)).abs().mean() < 0.1


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_it_answers_the_same_where_this_package_cannot_be_imported(frozen, tmp_path, monkeypatch, named):
    frozen.model.save_pretrained(tmp_path / "sam2")
    pool = make_pool(tmp_path)
    pipe = VisualInContextPipeline(str(tmp_path / "sam2"), pool=pool)  # its name is enough
    assert type(pipe.model.frozen) is Sam2InContext and pipe.model.encoder is pool.encoder_module
    if named:  # a folder is embedded; a repository would be named like this
        pipe.model.config.frozen_model["backbone"] = {"id": str(tmp_path / "sam2"), "revision": None}
    options = {"num_examples": 2, "fusion": "model"}
    expected = [plain(one) for one in pipe(photos(), **options)]
    pipe.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "config.json").read_text())["frozen_model"]
    assert kept["kind"] == "sam2" and ("id" in kept["backbone"]) == named
    monkeypatch.setitem(sys.modules, "hf_effdl", None)
    travelled = get_class_from_dynamic_module("pipeline_visual_in_context.VisualInContextPipeline", tmp_path / "saved")
    assert [plain(one) for one in travelled(str(tmp_path / "saved"))(photos(), **options)] == expected


def test_what_does_not_fit_is_refused(frozen, tmp_path):
    queries, images, labels = prompts()
    seen, kept = frozen.encode(queries), frozen.encode(images)
    frozen.model.save_pretrained(tmp_path)
    for call, error, text in (
        (lambda: Sam2InContext(torch.nn.Linear(1, 1)), TypeError, "model is a Linear: pass a Sam2VideoModel"),
        (lambda: frozen(queries, images, labels, 1), ValueError, "arrangement=1: SAM 2 has no canvas"),
        (lambda: frozen(queries[..., :9], images, labels), ValueError, r"images is \(2, 3, 64, 9\)"),
        (lambda: frozen.predict(seen, kept[:1], labels), ValueError, r"pass \(B, d\) and \(B, m, d\)"),
        (lambda: frozen.predict(seen, kept, labels[:, :2]), ValueError, r"labels is \(2, 2, 3, 64, 64\)"),
        (lambda: frozen.predict(seen, kept, labels + 1), ValueError, "labels has values outside"),
        (lambda: frozen.predict(seen, kept[:, :0], labels[:, :0]), ValueError, "labels"),
        (
            lambda: Sam2InContext.from_pretrained(str(tmp_path), task="image-to-image"),
            ValueError,
            "task='image-to-image': a SAM 2 finds an object",
        ),
        (lambda: VisualInContextModel.from_parts(frozen), ValueError, "Sam2InContext has no encoder of its own"),
        (
            lambda: VisualInContextModel.from_parts(frozen, tiny_encoder(), task="colourisation"),
            ValueError,
            "paints no colours",
        ),
    ):
        with pytest.raises(error, match=text):
            call()
