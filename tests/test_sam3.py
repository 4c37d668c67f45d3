"""SAM 3 shown examples on a canvas, against calls of transformers' model that are put together by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from answers import photos, plain
from safetensors.torch import save_file
from scenes import make_model, make_pool, tiny_encoder
from tiny_sam3 import SIDE, tiny_sam3, tiny_tokenizer, torchvision_or_its_place
from torch.nn import functional as F
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_effdl import Sam3InContext, VisualInContextModel, VisualInContextPipeline
from hf_effdl.vicl.remote_code.frozen_sam3 import layout


CELL = (19, SIDE)  # 60 % of the height
TOKENS = {"input_ids": [1, 3, 2] + 29 * [0], "attention_mask": [1, 1, 1] + 29 * [0]}


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    with torchvision_or_its_place():
        yield


def frozen(kind="sam3", seed=0, **options):
    return Sam3InContext(tiny_sam3(kind, seed), **{"tokens": TOKENS, "threshold": 0.01} | options)


def prompts(b=2, m=3, seed=1):
    """Images, and labels with one rectangle each."""
    generator = torch.Generator().manual_seed(seed)
    queries, images = (torch.rand(shape, generator=generator) for shape in ((b, 3, *CELL), (b, m, 3, *CELL)))
    labels = torch.zeros(b, m, 3, *CELL)
    for i in range(b):
        for j in range(m):
            y, x = (int(torch.randint(0, 8, (), generator=generator)) for _ in range(2))
            labels[i, j, :, y : y + 5 + j, x : x + 9 + i] = 1
    return queries, images, labels


def resized(cells, size):
    return F.interpolate(cells[None], size, mode="bilinear", antialias=True)[0]


@torch.no_grad()
def by_hand(model, query, images, labels, places, boxes=None):
    """Scores, boxes and masks of all object queries on one canvas, and the query's rectangle."""
    *shown, asked = places
    canvas, prompted = torch.zeros(3, SIDE, SIDE), []
    for cells, label, (y0, x0, y1, x1) in zip([*images, query], [*labels, None], places):
        canvas[:, y0:y1, x0:x1] = resized(cells, (y1 - y0, x1 - x0))
        if label is not None:
            rows, columns = label[0].nonzero().T
            top, bottom = (y0 + value / CELL[0] * (y1 - y0) for value in (int(rows.min()), int(rows.max()) + 1))
            left, right = (x0 + value / CELL[1] * (x1 - x0) for value in (int(columns.min()), int(columns.max()) + 1))
            prompted.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    output = model(
        pixel_values=2 * canvas[None] - 1,
        **{name: torch.tensor([values]) for name, values in TOKENS.items()},
        input_boxes=torch.tensor([prompted]) / SIDE,
        input_boxes_labels=torch.ones(1, len(prompted), dtype=torch.long),
    )
    scores = output.pred_logits[0].sigmoid() * output.presence_logits[0].sigmoid()
    masks = F.interpolate(output.pred_masks.sigmoid(), (SIDE, SIDE), mode="bilinear")[0]
    y0, x0, y1, x1 = asked
    return (
        scores,
        output.pred_boxes[0] * SIDE,
        torch.stack([resized(mask[None, y0:y1, x0:x1], CELL)[0] for mask in masks]),
    )


# ---- the canvas


@pytest.mark.parametrize("upside_down", [False, True])
@pytest.mark.parametrize("side", [32, 1008])
def test_the_canvas_is_covered_once_and_the_examples_of_an_l_are_about_equally_many(side, upside_down):
    for m in range(1, 8):
        places, covered = layout(side, m, upside_down), np.zeros((side, side), int)
        for y0, x0, y1, x1 in places:
            covered[y0:y1, x0:x1] += 1
        assert len(places) == m + 1 and (covered == 1).all()
        asked = places[-1]
        assert (asked[0] == 0) == upside_down and asked[3] == side
    assert layout(1008, 1)[0] == (0, 0, 604, 1008) and layout(1008, 1, True)[0] == (404, 0, 1008, 1008)
    assert layout(1008, 5)[-1] == (302, 302, 1008, 1008) and sum(place[1] == 0 for place in layout(1008, 5)) == 3


@pytest.mark.parametrize("arrangement", [0, 1])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("kind", ["sam3", "sam3_lite_text"])
def test_objects_and_pictures_are_those_of_the_model(kind, m, arrangement):
    model, (queries, images, labels) = frozen(kind), prompts(m=m)
    found = model.instances(queries, images, labels, arrangement)
    union = model.predict(queries, images, labels, arrangement)
    places = layout(SIDE, m, arrangement == 1)
    y0, x0, y1, x1 = places[-1]
    for one, picture, *example in zip(found, union, queries, images, labels):
        scores, boxes, masks = by_hand(model.model, *example, places)
        low, size = torch.tensor([x0, y0, x0, y0]), torch.tensor([x1 - x0, y1 - y0] * 2)
        boxes = ((boxes - low) / size).clamp(0, 1)
        counts = (scores > 0.01) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        order = [i for i in scores.argsort(descending=True).tolist() if counts[i]]
        assert order and len(order) == len(one["scores"])
        torch.testing.assert_close(one["scores"], scores[order], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one["boxes"], boxes[order], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one["masks"], masks[order], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(picture, masks[order].amax(0).expand(3, -1, -1), atol=1e-4, rtol=1e-4)
    assert union.std() > 0.01


def test_more_canvases_than_one_call_takes_and_the_rest_of_a_batch_do_not_matter():
    model, (queries, images, labels) = frozen(), prompts(b=6, m=2)
    together = model(queries, images, labels)
    for i in (0, 3, 5):
        torch.testing.assert_close(together[i : i + 1], model(queries[i, None], images[i, None], labels[i, None]))


def test_an_example_without_the_object_is_only_a_picture_and_without_any_nothing_is_found(monkeypatch):
    boxes_of = Sam3InContext._boxes
    model, (queries, images, labels) = frozen(), prompts(b=1, m=2)
    labels[:, 1] = 0
    found = model.instances(queries, images, labels)[0]
    with monkeypatch.context() as patch:  # one box is all that is asked with, and both pictures are there
        patch.setattr(Sam3InContext, "_boxes", lambda *given: tuple(part[:, :1] for part in boxes_of(*given)))
        alone = model.instances(queries, images, labels)[0]
    for name in ("scores", "boxes", "masks"):
        torch.testing.assert_close(found[name], alone[name], atol=1e-5, rtol=1e-4)
    nothing = torch.zeros_like(labels)
    assert model.predict(queries, images, nothing).abs().max() == 0
    assert len(model.instances(queries, images, nothing)[0]["scores"]) == 0


def test_what_is_painted():
    queries, images, labels = prompts(b=1, m=1)
    found = frozen().instances(queries, images, labels)[0]
    assert len(found["scores"]) > 1
    best, box = (frozen(paint=paint)(queries, images, labels)[0, 0] for paint in ("best", "box"))
    torch.testing.assert_close(best, found["masks"][0])
    x0, y0, x1, y1 = (found["boxes"][0] * torch.tensor([CELL[1], CELL[0]] * 2)).round().int().tolist()
    assert set(box.unique().tolist()) <= {0.0, 1.0} and box[y0:y1, x0:x1].all()
    assert int(box.sum()) == max(1, x1 - x0) * max(1, y1 - y0)
    strict = frozen(threshold=0.999)
    assert strict(queries, images, labels).max() == 0 and strict.arrangements == 2


def test_half_precision_runs_and_is_near():
    queries, images, labels = prompts()
    full, half = frozen(), frozen()
    half.model.to(torch.bfloat16)
    one, other = full(queries, images, labels), half(queries, images, labels)
    assert other.dtype == queries.dtype and (one - other).abs().mean() < 0.1


# ---- with a pool, saved and loaded


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    return {task: make_pool(folder, task) for task in ("segmentation", "detection")}


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_pipeline_gives_all_objects(pools, task):
    model = VisualInContextModel.from_parts(frozen(), tiny_encoder(), task=task)
    pipe = VisualInContextPipeline(model, pool=pools[task])
    outputs = pipe(photos(), instances=True, num_examples=2, fusion="model")
    assert [one["example_ids"] for one in outputs] == [one["example_ids"] for one in pipe(photos(), num_examples=2)]
    for image, output, same in zip(photos(), outputs, pipe(photos(), num_examples=2, fusion="model")):
        np.testing.assert_array_equal(output["prediction"], same["prediction"])
        scores = [one["score"] for one in output["instances"]]
        assert scores == sorted(scores, reverse=True) and min(scores) > 0.01
        for one in output["instances"]:
            x0, y0, x1, y1 = one["box"]
            assert 0 <= x0 <= x1 <= image.width and 0 <= y0 <= y1 <= image.height
            assert ("mask" in one) == (task == "segmentation")
            if task == "segmentation":
                assert one["mask"].shape == image.size[::-1] and one["mask"].dtype == np.uint8


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_it_answers_the_same_where_this_package_cannot_be_imported(pools, tmp_path, monkeypatch, named):
    pool, backbone = pools["segmentation"], tiny_sam3()
    if named:
        backbone.save_pretrained(tmp_path / "sam3")
        tiny_tokenizer().save_pretrained(tmp_path / "sam3")
        made = Sam3InContext.from_pretrained(str(tmp_path / "sam3"), text="cat", threshold=0.01)
    else:
        made = Sam3InContext(backbone, tiny_tokenizer(), text="cat", threshold=0.01)
    assert made.tokens["input_ids"][0] == 4 and sum(made.tokens["attention_mask"]) == 1 and made.text == "cat"
    model = VisualInContextModel.from_parts(made, tiny_encoder())
    if named:  # a folder is embedded; a repository would be named like this
        model.config.frozen_model["backbone"] = {"id": str(tmp_path / "sam3"), "revision": None}
    pipe = VisualInContextPipeline(model, pool=pool)
    expected = [plain(one) for one in pipe(photos())]
    pipe.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["frozen_model"]
    assert config["kind"] == "sam3" and config["tokens"] == made.tokens and ("id" in config["backbone"]) == named
    assert [plain(one) for one in VisualInContextPipeline(tmp_path / "saved")(photos())] == expected
    monkeypatch.setitem(sys.modules, "hf_effdl", None)
    travelled = get_class_from_dynamic_module("pipeline_visual_in_context.VisualInContextPipeline", tmp_path / "saved")
    loaded = travelled(str(tmp_path / "saved"))
    assert type(loaded.model.frozen).__module__.startswith("transformers_modules")
    assert [plain(one) for one in loaded(photos())] == expected


def test_a_checkpoint_for_videos_is_read_and_known_by_its_name(tmp_path):
    """As the published one is: the images' model inside, under a prefix, beside a tracker."""
    model = tiny_sam3()
    tiny_tokenizer().save_pretrained(tmp_path)
    values = {
        "model_type": "sam3_video",
        "architectures": ["Sam3VideoModel"],
        "detector_config": model.config.to_dict(),
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = {f"detector_model.{name}": value for name, value in model.state_dict().items()}
    save_file(tensors | {"tracker_model.x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Sam3InContext.from_pretrained(str(tmp_path), threshold=0.01)
    assert found.id == str(tmp_path) and found.image_size == CELL
    queries, images, labels = prompts(m=1)
    expected = frozen(tokens=found.tokens)(queries, images, labels)
    torch.testing.assert_close(found(queries, images, labels), expected)


def test_a_name_is_enough_where_the_pool_brings_its_encoder(pools, tmp_path):
    tiny_sam3().save_pretrained(tmp_path / "sam3")
    tiny_tokenizer().save_pretrained(tmp_path / "sam3")
    with pytest.raises(ValueError, match="Sam3InContext has no encoder of its own: pass encoder="):
        VisualInContextModel.from_backbone(str(tmp_path / "sam3"))
    pipe = VisualInContextPipeline(str(tmp_path / "sam3"), pool=pools["detection"])
    assert pipe.model.frozen.paint == "box" and pipe.model.frozen.text == "visual"
    bare = AutoModel.from_pretrained(tmp_path / "sam3")  # what is inside is joined, too
    assert VisualInContextPipeline(bare, pool=pools["detection"]).model.frozen.tokens == pipe.model.frozen.tokens
    with pytest.raises(ValueError, match="finds objects and paints no colours"):
        Sam3InContext.from_pretrained(str(tmp_path / "sam3"), task="colourisation")
    with pytest.raises(ValueError, match="finds objects and paints no colours"):
        VisualInContextModel.from_parts(frozen(), tiny_encoder(), task="colourisation")


def test_what_does_not_fit_is_refused(pools):
    model, (queries, images, labels) = frozen(), prompts()
    pool = pools["segmentation"]
    joined = VisualInContextModel.from_parts(model, tiny_encoder())
    for call, error, text in (
        (
            lambda: Sam3InContext(torch.nn.Linear(1, 1), tokens=TOKENS),
            TypeError,
            "model is a Linear: pass a Sam3Model",
        ),
        (lambda: Sam3InContext(tiny_sam3()), ValueError, "pass tokenizer="),
        (lambda: frozen(paint="all"), ValueError, "paint='all': choose one of"),
        (lambda: frozen(threshold=1), ValueError, "threshold=1"),
        (lambda: model(queries, images, labels, 2), ValueError, "arrangement=2"),
        (lambda: model(queries[..., :9], images, labels), ValueError, "queries"),
        (
            lambda: VisualInContextPipeline(make_model(), pool=pool)(photos(), instances=True),
            ValueError,
            "no objects apart",
        ),
        (
            lambda: VisualInContextPipeline(joined, pool=pool)(photos(), instances=True, num_examples=2),
            ValueError,
            "'model'",
        ),
        (
            lambda: VisualInContextPipeline(joined, pool=pool)(photos(), instances=True, vote=True),
            ValueError,
            "leave vote",
        ),
    ):
        with pytest.raises(error, match=text):
            call()
