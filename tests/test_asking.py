"""Which examples a query may be shown, what may be asked with, how sure the answer is, and many askers at once."""

import io
import threading

import numpy as np
import pytest
import torch
from answers import all_same, photos, plain, same, tiny_seggpt
from datasets import Image
from PIL import Image as Picture
from scenes import label_of, make_model, rows, scene, tiny_encoder
from transformers.pipelines.pt_utils import KeyDataset

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    FeatureMatching,
    RankingLists,
    SegGptInContext,
    VisualInContextPipeline,
    measure_examples,
)
from hf_effdl.vicl.remote_code.confidence import certainty, expected_performance, learn_confidence


COUNT = 12
VIDEOS = [str(i // 3) for i in range(COUNT)]
KINDS = ["cat" if i % 2 else "dog" for i in range(COUNT)]


def build(folder, count=COUNT, **options):
    data = rows(count).add_column("video", [i // 3 for i in range(count)])
    data = data.add_column("kind", ["cat" if i % 2 else "dog" for i in range(count)])
    options = {"id_column": "name", "group_column": "video", "class_column": "kind", "rows_per_shard": 5} | options
    return ExamplePool.from_dataset(
        data, "image", "mask", encoder=tiny_encoder(), cache_dir=folder, progress=False, **options
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def pipe(pool):
    return VisualInContextPipeline(make_model(), "nearest", pool)


def shown(outputs):
    return [output["example_ids"] for output in outputs]


# ---- what a query may be shown


def test_groups_and_classes_are_kept_with_the_rows(pool, tmp_path):
    assert pool.groups == VIDEOS and pool.classes == KINDS
    copy = ExamplePool.from_pretrained(pool.save_pretrained(tmp_path / "copy"))
    copy.remove(["scene 1", "scene 7"])
    left = [i for i in range(COUNT) if i not in (1, 7)]
    assert copy.groups == [VIDEOS[i] for i in left]
    again = ExamplePool.from_pretrained(copy.save_pretrained(tmp_path / "again"))
    assert again.classes == [KINDS[i] for i in left]
    assert all(entry["dropped"] == [] for entry in again.manifest["shards"])
    assert build(tmp_path, group_column=None, class_column=None).groups is None


@pytest.mark.parametrize("strategy", ["nearest", "random", "dense", "static", "transfer", "oracle", "cascade"])
def test_no_strategy_shows_what_is_ruled_out(pool, strategy, recwarn):
    model = make_model()
    measure_examples(model, pool, progress=False)
    if strategy == "cascade":
        model.set_selector(CascadeSelector(model, passes=3).fit(pool, progress=False))
    pipe = VisualInContextPipeline(model, strategy, pool)
    images, labels = photos(), [label_of("segmentation", number) for number in range(100, 105)]
    free = pipe(images, num_examples=2, labels=labels)
    for name, options, right in (
        ("groups", {"groups": [0, 1, 2, 3, None]}, lambda i, row: i == 4 or VIDEOS[row] != str(i)),
        ("classes", {"classes": ["cat", "dog", "cat", None, "dog"]}, None),
        ("where", {"candidates_where": {"class": "cat"}}, lambda i, row: KINDS[row] == "cat"),
        ("exclude", {"exclude": [ids["example_ids"] for ids in free]}, None),
    ):
        found = pipe(images, num_examples=2, labels=labels, **options)
        for i, ids in enumerate(shown(found)):
            assert len(ids) == 2, name
            if right is not None:
                assert all(right(i, pool.position(id)) for id in ids)
            elif name == "classes":
                assert options["classes"][i] in (None, *{KINDS[pool.position(id)] for id in ids})
                assert options["classes"][i] is None or len({KINDS[pool.position(id)] for id in ids}) == 1
            else:
                assert not set(ids) & set(free[i]["example_ids"])


def test_the_nearest_of_those_that_are_left_in_their_order(pipe, pool):
    image = scene(100)[0]
    every = shown(pipe([image], num_examples=COUNT))[0]
    out = [every[0], every[3]]
    assert pipe(image, exclude=out, num_examples=3)["example_ids"] == [id for id in every if id not in out][:3]
    assert pipe(image, exclude=every[0])["example_ids"] == [every[1]]
    left = pipe(image, exclude=every[2:], num_examples=9)["example_ids"]
    assert left == every[:2]  # all there are
    together = shown(pipe([image, image, image], exclude=[every[2:], None, out], num_examples=4))
    assert together == [every[:2], every[:4], [id for id in every if id not in out][:4]]


def test_what_cannot_be_ruled_out_is_named(pipe, tmp_path):
    image = scene(100)[0]
    for options, text in (
        ({"exclude": ["scene 77"]}, "exclude: id 'scene 77' is not in this pool"),
        ({"exclude": [3]}, "exclude: id 3 is not in this pool.*numbers are ids, too"),
        ({"exclude": [f"scene {i}" for i in range(COUNT)]}, "image 0 of the batch may be shown no example"),
        ({"classes": "bird"}, "may be shown no example"),
        ({"candidates_where": {"size": 3}}, "pass a dict of 'group' or 'class'"),
    ):
        with pytest.raises(ValueError, match=text):
            pipe(image, **options)
    with pytest.raises(ValueError, match="2 groups for 1 images"):
        pipe([image], groups=[1, 2])
    bare = VisualInContextPipeline(make_model(), pool=build(tmp_path, group_column=None))
    with pytest.raises(ValueError, match="keeps no group of its rows: make it with .*group_column="):
        bare(image, groups=1)
    pipe.selector = lambda queries, examples, count, candidates: (torch.zeros(1, 1), torch.tensor([[2]]))
    with pytest.raises(ValueError, match="the selector chose an example that exclude=.* rules out"):
        pipe(image, exclude="scene 2")
    for wrong, error in (
        (lambda *_: None, TypeError),
        (lambda *_: (torch.zeros(1, 1), torch.tensor([[99]])), ValueError),
    ):
        pipe.selector = wrong
        with pytest.raises(error, match="the selector gave"):
            pipe(image)


def test_nothing_is_measured_or_ranked_on_its_own_group(pool):
    model = make_model()
    free = {"classes": [None] * COUNT, "progress": False}
    candidates, performance = measure_examples(model, pool, **free)
    for row, others in enumerate(candidates.tolist()):
        assert {VIDEOS[other] for other in others if other >= 0} == set(VIDEOS) - {VIDEOS[row]}
    assert performance.isfinite().all() and (candidates >= 0).sum() == COUNT * (COUNT - 3)
    every = measure_examples(make_model(), pool, groups=[None] * COUNT, **free)[0]
    assert (every >= 0).all()
    lists = RankingLists(pool, every, torch.rand(every.shape), k=4, duplicates=None, labels=False)
    belongs = torch.tensor([int(video) for video in VIDEOS])
    assert (belongs[lists.lists] != belongs[lists.queries][:, None]).all()


# ---- what may be asked with


def test_images_come_as_torch_has_them(pipe):
    data, expected = rows(4, 100), pipe(photos()[:4])
    all_same(pipe(KeyDataset(data, "image")), expected)
    array = np.array(photos()[0])
    for tensor in (torch.tensor(array).permute(2, 0, 1), torch.tensor(array / 255).permute(2, 0, 1)):
        same(pipe(tensor), expected[0])
    clear = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    same(pipe(Picture.fromarray(clear)), expected[0])


def test_labels_are_read_as_those_of_the_pools_data_set(tmp_path):
    drawn = [np.asarray(scene(number)[1]) > 0 for number in range(COUNT)]
    maps = [np.where(mask, 1, np.where(np.roll(mask, 3, 1), 2, 0)).astype(np.uint8) for mask in drawn]
    data = rows(COUNT).remove_columns("mask")
    data = data.add_column("mask", [encoded_png(one) for one in maps]).cast_column("mask", Image())
    pool = ExamplePool.from_dataset(
        data, "image", "mask", encoder=tiny_encoder(), foreground=1, cache_dir=tmp_path, progress=False
    )
    pipe = VisualInContextPipeline(make_model(), "oracle", pool)
    image = scene(0)[0]
    expected = pipe(image, labels=drawn[0])["scores"]
    assert pipe(image, labels=maps[0])["scores"] == expected == pipe(image, labels=pool.label(0))["scores"]
    assert expected != pipe(image, labels=maps[0] > 0)["scores"]
    with pytest.warns(UserWarning, match="nothing but 0 and 255, and foreground=.* names neither"):
        pipe(image, labels=drawn[0].astype(np.uint8) * 255)


def encoded_png(array):
    stream = io.BytesIO()
    Picture.fromarray(array).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def test_boxes_of_coco_are_stored_as_corners_and_asked_with_as_they_were(tmp_path):
    data = rows(COUNT)
    boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in data["box"]]
    other = data.remove_columns("box").add_column("box", boxes)
    options = {"encoder": tiny_encoder(), "cache_dir": tmp_path, "progress": False}
    pool = ExamplePool.from_dataset(other, "image", "box", task="detection", boxes="xywh", **options)
    assert [pool.label(row) for row in range(COUNT)] == data["box"][:]
    with pytest.raises(ValueError, match="boxes= goes with task='detection'"):
        ExamplePool.from_dataset(other, "image", "mask", boxes="xywh", **options)
    pipe = VisualInContextPipeline(make_model("detection"), "oracle", pool)
    plain_pool = ExamplePool.from_dataset(data, "image", "box", task="detection", **options)
    same = VisualInContextPipeline(make_model("detection"), "oracle", plain_pool)
    assert pipe(scene(0)[0], labels=boxes[0])["scores"] == same(scene(0)[0], labels=data[0]["box"])["scores"]


# ---- how sure


def test_the_soft_map_is_what_the_prediction_was_cut_from(pipe):
    for image, output in zip(photos(), pipe(photos(), soft_map=True)):
        soft = output["soft_map"]
        assert soft.dtype == np.float32 and soft.shape == image.size[::-1] and 0 <= soft.min() <= soft.max() <= 1
        assert np.array_equal(soft >= 0.5, output["prediction"] == 1)
    assert "soft_map" not in pipe(photos()[0])


def test_certainty_and_what_is_learnt_from_it():
    painted = torch.tensor([[1.0, 0.75, 0.0], [0.25, 0.0, 0.0]])[:, None, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(certainty(painted), torch.tensor([0.75, (0.5 + 1 + 1) / 3]))
    generator = torch.Generator().manual_seed(0)
    sure, scores = torch.rand(400, generator=generator), torch.randn(400, generator=generator) / 10
    worth = (0.2 + 0.5 * sure + scores + 0.01 * torch.randn(400, generator=generator)).clamp(0, 1)
    weights = learn_confidence(sure, scores, worth)
    assert (expected_performance(weights, sure, scores) - worth).abs().mean() < 0.05
    assert expected_performance(weights, torch.tensor([9.0]), torch.zeros(1)) == worth.max()


# ---- many at once


def at_once(*calls, turns=8):
    """What each call gave, again and again beside the others."""
    found, failed = [[] for _ in calls], []

    def repeat(place):
        try:
            found[place] += [calls[place]() for _ in range(turns)]
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=repeat, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return found


@pytest.mark.parametrize("kind", ["seggpt", "matching"])
def test_a_frozen_model_answers_threads_as_it_answers_one(kind):
    frozen = SegGptInContext(tiny_seggpt()) if kind == "seggpt" else FeatureMatching(tiny_encoder())
    h, w = frozen.image_size
    several = torch.rand(1, 3, h, w), torch.rand(1, 2, 3, h, w), torch.rand(1, 2, 3, h, w)
    single = torch.rand(4, 3, h, w), torch.rand(4, 1, 3, h, w), torch.rand(4, 1, 3, h, w)
    calls = [lambda given=given: frozen(*given) for given in (several, single, several)]
    alone = [call() for call in calls]
    for expected, found in zip(alone, at_once(*calls)):
        assert all(torch.equal(one, expected) for one in found)


def test_pipelines_that_share_a_selector_and_a_model_answer_threads_as_one(tmp_path, pool, recwarn):
    other = build(tmp_path, 9)
    model, second = make_model(), make_model()
    for one, of in ((model, pool), (second, other)):
        measure_examples(one, of, progress=False)
    model.set_selector(CascadeSelector(model, passes=3).fit(pool, progress=False))
    pipes = [VisualInContextPipeline(model, pool=pool), VisualInContextPipeline(second, "dense", other)]
    pipes.append(VisualInContextPipeline(model, "transfer", pool))
    calls = [lambda pipe=pipe: [plain(one) for one in pipe(photos())] for pipe in pipes]
    alone = [call() for call in calls]
    for expected, found in zip(alone, at_once(*calls, turns=3)):
        assert all(one == expected for one in found)
