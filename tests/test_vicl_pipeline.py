"""The pipeline as its users meet it: any image, any number of them, three tasks, three kinds of frozen models."""

import json
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import QUERIES, Mirror, all_same, check_contract, photos, plain, same, tiny_seggpt
from datasets import Dataset, Image
from PIL import Image as Picture
from scenes import SIZE, TASKS, label_of, make_model, make_pool, rows, scene, tiny_encoder, tiny_vit
from transformers import pipeline

import hf_effdl
from hf_effdl import (
    ExamplePool,
    SegGptInContext,
    VisionEncoder,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
)
from hf_effdl.vicl.remote_code import pipeline_visual_in_context as pipeline_module
from hf_effdl.vicl.remote_code.frozen_canvas import vote
from hf_effdl.vicl.remote_code.frozen_model import FrozenModel
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.modeling_visual_in_context import FROZEN
from hf_effdl.vicl.remote_code.pipeline_picture import CAPTION, GAP, LEGEND, Answer, Shown, draw_panels
from hf_effdl.vicl.remote_code.pool_reader import PoolReader


COUNT = 12


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    return {task: make_pool(folder, task, COUNT) for task in TASKS}


@pytest.fixture
def pipes(pools):
    def make(task="segmentation", selector=None, pool=None, **options):
        return VisualInContextPipeline(make_model(task), selector, pool or pools[task], **options)

    return make


# ---- what comes out


@pytest.mark.parametrize("strategy", ["random", "nearest", "static", "dense", "transfer", "oracle"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_as_the_contract_says(pipes, pools, task, strategy):
    pipe = pipes(task)
    measure_examples(pipe.model, pools[task], candidates=4, progress=False)
    labels = [label_of(task, number) for number in QUERIES]
    outputs = pipe(photos(), strategy=strategy, labels=labels, num_examples=2)
    assert isinstance(outputs, list) and len(outputs) == len(QUERIES)
    for image, output in zip(photos(), outputs):
        check_contract(task, output, image, 2, pools[task].ids)
    single = pipe(scene(100)[0], strategy=strategy, labels=labels[0])
    check_contract(task, single, scene(100)[0], 1, pools[task].ids)
    assert single["example_ids"] == outputs[0]["example_ids"][:1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", ["random", "nearest", "dense", "oracle"])
def test_a_batch_is_the_same_as_one_by_one(pipes, task, strategy):
    pipe = pipes(task, strategy)
    labels = [label_of(task, number) for number in QUERIES]
    expected = [pipe(image, labels=label, num_examples=3) for image, label in zip(photos(), labels)]
    for batch_size in (1, 2, 5, 100):
        all_same(pipe(photos(), labels=labels, num_examples=3, batch_size=batch_size), expected)


def test_the_batch_size_of_the_constructor_is_the_default(pipes, monkeypatch):
    pipe, seen = pipes(batch_size=2), []
    preprocess = pipe.preprocess
    monkeypatch.setattr(pipe, "preprocess", lambda inputs: (seen.append(len(inputs["images"])), preprocess(inputs))[1])
    pipe(photos())
    pipe(photos(), batch_size=4)
    assert seen == [2, 2, 1, 4, 1]


def test_a_generator_is_answered_as_it_comes(pipes):
    pipe, taken = pipes(), []

    def come():
        for number in range(100, 200):
            taken.append(number)
            yield scene(number)[0]

    stream = pipe(come(), batch_size=3)
    assert taken == []
    first = [next(stream) for _ in range(3)]
    assert taken == [100, 101, 102]
    next(stream)
    assert len(taken) == 6
    for one, other in zip(first, pipe(photos([100, 101, 102]))):
        assert plain(one) == plain(other)
    labels = (label_of("segmentation", number) for number in QUERIES)
    streamed = list(pipe(iter(photos()), labels=labels, strategy="oracle", batch_size=2))
    assert len(streamed) == 5 and streamed[4]["scores"][0] <= 1


# ---- what goes in


def test_every_form_of_an_image_is_the_same_image(pipes, tmp_path):
    pipe, image = pipes(), scene(100)[0]
    image.save(tmp_path / "photo.png")
    content, array, path = (tmp_path / "photo.png").read_bytes(), np.array(image), str(tmp_path / "photo.png")
    turned = Picture.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    grey = image.convert("L")
    sixteen = Picture.fromarray(np.array(grey).astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    for plainly, forms in (
        (image, [array, array / 255.0, path, tmp_path / "photo.png", content, image.convert("RGBA")]),
        (image, [{"bytes": content, "path": None}, {"bytes": None, "path": path}]),
        (grey.convert("RGB"), [grey, np.array(grey), np.array(grey)[:, :, None], sixteen]),
        (image.quantize(8).convert("RGB"), [image.quantize(8)]),
        (image.rotate(-90, expand=True), [tmp_path / "turned.png"]),
    ):
        expected = pipe(plainly)
        all_same([*map(pipe, forms), *pipe(forms)], [expected] * 2 * len(forms))
    all_same(pipe(np.stack([array, array[::-1]])), pipe([image, image.transpose(Picture.Transpose.FLIP_TOP_BOTTOM)]))


def test_a_data_set_or_a_column_of_one_is_a_batch(pipes):
    pipe, ds = pipes(), rows(5, 100)
    images, stream = ds.select_columns(["image"]), ds.to_iterable_dataset()
    for several in (ds["image"], ds["image"][:], ds.cast_column("image", Image(decode=False))["image"], ds):
        found = pipe(several, labels=ds["mask"])
        assert isinstance(found, list)
        all_same(found, pipe(photos()))
    all_same(pipe(images.rename_column("image", "photo")), pipe(photos()))  # the only column of images
    # what has no length is answered as it comes
    for several, labels in ((stream["image"], ds["mask"]), (stream, stream["mask"])):
        answers = pipe(several, labels=labels, strategy="oracle", batch_size=2)
        assert not isinstance(answers, list)
        all_same(list(answers), pipe(photos(), labels=ds["mask"], strategy="oracle"))


def test_rows_of_which_no_column_is_the_image_are_refused(pipes):
    ds = rows(2).rename_column("image", "photo")  # beside a mask
    for several in (ds, ds.to_iterable_dataset()):
        with pytest.raises(TypeError, match=r"columns \['box', 'mask', 'name', 'photo'\]: pass the column of images"):
            list(pipes()(several))


def test_more_examples_than_there_are_is_said(pipes):
    with pytest.warns(UserWarning, match=f"num_examples=100, but the pool has {COUNT} examples"):
        assert len(pipes()(scene(100)[0], num_examples=100)["example_ids"]) == COUNT


@pytest.fixture
def site(tmp_path):
    """A web server on this machine, and the folder that it shows."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path
        server.shutdown()


def test_images_of_the_web_are_asked_with_and_make_pools(pipes, site, tmp_path_factory):
    (address, folder), pipe = site, pipes()
    for number in range(3):
        scene(number)[0].save(folder / f"{number}.png")
        scene(number)[1].save(folder / f"mask {number}.png")
    urls = [f"{address}/{number}.png" for number in range(3)]
    all_same([pipe(urls[0]), *pipe(urls)], pipe([scene(0)[0], *photos(range(3))]))
    table = {"image": urls, "mask": [f"{address}/mask%20{number}.png" for number in range(3)]}
    for cast in (False, True):  # texts, or a column of images
        data = Dataset.from_dict(table)
        data = data.cast_column("image", Image()).cast_column("mask", Image()) if cast else data
        folder = tmp_path_factory.mktemp("web")
        pool = ExamplePool.from_dataset(
            data, "image", "mask", encoder=tiny_encoder(), cache_dir=folder, progress=False
        )
        for row in range(3):
            assert np.array_equal(pool.image(row), scene(row)[0])
            assert np.array_equal(np.array(pool.label(row)) > 0, np.array(scene(row)[1]) > 0)
    with pytest.raises(ValueError, match="/absent.png cannot be fetched: "):
        pipe(f"{address}/absent.png")


@pytest.mark.parametrize(
    "wrong, error, text",
    [
        (7, TypeError, "got int; pass a PIL image"),
        (torch.ones(3, 8, 8, dtype=torch.int64), TypeError, "got int64"),
        (None, TypeError, "got NoneType"),
        ([3.5], TypeError, "got float"),
        ("absent.png", FileNotFoundError, "absent.png"),
    ],
)
def test_what_is_no_image_is_named(pipes, wrong, error, text):
    with pytest.raises(error, match=text):
        pipes()(wrong)


# ---- how many examples, and how they are fused


def cells(pipe, pool, output, image):
    task = pipe.visual_task
    chosen = [pool.position(id) for id in output["example_ids"]]
    images = pixels([task.query(pool.image(row)) for row in chosen], pipe.model.image_size)
    labels = task.labels([pool.label(r) for r in chosen], [pool.image(r) for r in chosen], pipe.model.image_size)
    return pixels([task.query(image)], pipe.model.image_size), images, labels


@pytest.mark.parametrize("kind", ["matching", "seggpt"])
@pytest.mark.parametrize("task", TASKS)
def test_answers_are_averaged_or_given_in_one_call(pools, task, kind):
    pool = pools[task]
    model = (
        make_model(task)
        if kind == "matching"
        else VisualInContextModel.from_parts(SegGptInContext(tiny_seggpt()), tiny_encoder(), task=task)
    )
    pipe = VisualInContextPipeline(model, pool=pool)
    for image in photos()[:2]:
        for fusion in ("mean", "model"):
            output = pipe(image, num_examples=3, fusion=fusion)
            query, images, labels = cells(pipe, pool, output, image)
            if fusion == "model":
                painted = model(query, images[None], labels[None])
            else:
                each = [model(query, images[None, j : j + 1], labels[None, j : j + 1]) for j in range(3)]
                painted = torch.stack(each).mean(0)
            same(output, output | {"prediction": pipe.visual_task.decode(painted[0], image.size[::-1])})


@pytest.mark.parametrize("kind", ["seggpt", "canvas"])
@pytest.mark.parametrize("task", TASKS)
def test_a_vote_is_over_every_arrangement(pools, task, kind):
    pool = pools[task]
    frozen = Mirror() if kind == "canvas" else SegGptInContext(tiny_seggpt())
    model = VisualInContextModel.from_parts(frozen, tiny_encoder(), task=task)
    assert (model.frozen.arrangements, model.image_size) == ((8, (111, 111)) if kind == "canvas" else (2, (32, 32)))
    pipe, image = VisualInContextPipeline(model, pool=pool), scene(101)[0]
    for fusion in ("mean", "model"):
        output = pipe(image, vote=True, num_examples=2, fusion=fusion)
        query, images, labels = cells(pipe, pool, output, image)
        answers = []
        for layout in range(frozen.arrangements):
            if fusion == "model":
                answers.append(model(query, images[None], labels[None], layout))
            else:
                each = [model(query, images[None, j : j + 1], labels[None, j : j + 1], layout) for j in range(2)]
                answers.append(torch.stack(each).mean(0))
        painted = vote(torch.stack(answers), threshold=task != "colourisation")
        same(output, output | {"prediction": pipe.visual_task.decode(painted[0], image.size[::-1])})
    assert plain(pipe(image, vote=False)) == plain(pipe(image))


# ---- options


def test_the_strategy_of_a_call_goes_before_the_selector_and_that_before_the_config(pools):
    pool, image = pools["segmentation"], scene(100)[0]
    seen = []

    def last(queries, examples, count, candidates):
        seen.append((len(queries), len(examples.pool), count, candidates))
        return torch.zeros(len(queries), 1), torch.full((len(queries), 1), COUNT - 1)

    def first(queries, examples, count, candidates):
        return torch.zeros(len(queries), 1), torch.zeros(len(queries), 1, dtype=torch.long)

    near = VisualInContextPipeline(make_model(), "nearest", pool)(image)["example_ids"]
    dense = VisualInContextPipeline(make_model(), "dense", pool)(image)["scores"]
    assert VisualInContextPipeline(make_model(strategy="dense"), None, pool)(image)["scores"] == dense
    assert VisualInContextPipeline(make_model(strategy="dense"), "nearest", pool)(image)["example_ids"] == near
    pipe = VisualInContextPipeline(make_model(), last, pool)
    assert pipe(image, num_examples=2, candidates=7)["example_ids"] == [f"scene {COUNT - 1}"]
    assert seen == [(1, COUNT, 2, 7)]
    assert pipe(image, strategy=first)["example_ids"] == ["scene 0"]
    assert pipe(image, strategy="nearest")["example_ids"] == near
    assert VisualInContextPipeline(make_model(), last, pool, strategy=first)(image)["example_ids"] == ["scene 0"]


def test_the_seed_is_of_the_random_strategy(pipes):
    pipe = pipes(selector="random", num_examples=4)
    chosen = [tuple(pipe(scene(100)[0], seed=seed)["example_ids"]) for seed in range(5)]
    assert len(set(chosen)) == 5 and pipe(scene(100)[0])["example_ids"] == list(chosen[0])


FIVE = [scene(number)[1] for number in QUERIES]


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"num_examples": 0}, ValueError, "num_examples=0: pass a whole number"),
        ({"num_examples": 1.5}, ValueError, "num_examples=1.5"),
        ({"candidates": 0}, ValueError, "candidates=0: pass a whole number"),
        ({"candidates": -3}, ValueError, "candidates=-3"),
        ({"fusion": "max"}, ValueError, "fusion='max': choose one of"),
        ({"strategy": "best"}, ValueError, "strategy='best': it must be one of"),
        ({"strategy": 3}, TypeError, "selector is a int"),
        ({"vote": True}, ValueError, "FeatureMatching has no canvas.*leave vote out"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"strategy": "oracle"}, ValueError, "pass labels="),
        ({"strategy": "transfer"}, ValueError, "measure_examples"),
        ({"strategy": "static"}, ValueError, "measure_examples"),
        ({"examples": 3}, TypeError, r"unknown options \['examples'\]; there are \['strategy', 'num_examples'"),
        ({"labels": FIVE[:3]}, ValueError, "3 labels for 5 images"),
        ({"labels": [*FIVE, FIVE[0]]}, ValueError, "6 labels for 5 images"),
        ({"labels": iter(FIVE[:3])}, ValueError, "there are fewer labels than images"),
        ({"labels": iter([*FIVE, FIVE[0]])}, ValueError, "there are more labels than images"),
        ({"labels": 3}, ValueError, "one label for each image"),
        ({"labels": [Picture.new("L", (20, 20))] * 5}, ValueError, "the mask is 20 x 20 pixels and its image .* must"),
    ],
)
def test_an_option_that_cannot_be_is_refused(pipes, options, error, text):
    with pytest.raises(error, match=text):
        pipes()(photos(), **options)
    if options in ({"examples": 3}, {"strategy": "best"}):
        with pytest.raises(error, match=text):  # already where the pipeline is made
            pipes(**{"selector" if name == "strategy" else name: value for name, value in options.items()})


def test_the_oracle_goes_by_the_metric_of_the_pipeline(pipes):
    sums = pipes(
        selector="oracle",
        metric=lambda predictions, references: predictions[0].sum(),
        greater_is_better=False,
        num_examples=COUNT,
    )
    output = sums(scene(100)[0], labels=scene(100)[1])
    assert len(output["scores"]) == COUNT and max(output["scores"]) <= 0


# ---- what belongs together


@pytest.mark.parametrize(
    "model, pool, error, text",
    [
        (make_model, "detection", ValueError, "task='detection', the model for task='segmentation'"),
        (lambda: make_model(encoder=tiny_encoder(1)), "segmentation", ValueError, "vectors of two encoders cannot be"),
        (make_model, None, ValueError, "there is no pool: pass pool="),
        (
            lambda: make_model(pool="pool"),
            None,
            ValueError,
            "saved beside the model, but there is no folder .*pool.: p",
        ),
        (make_model, rows(2), TypeError, "pool is a Dataset: pass ExamplePool.from_dataset"),
        (make_model, "tests", FileNotFoundError, "holds no pool"),
        (tiny_vit, "segmentation", TypeError, "model is a ViTModel: pass a VisualInContextModel"),
    ],
)
def test_what_does_not_go_together_is_refused(pools, monkeypatch, model, pool, error, text):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(error, match=text):
        VisualInContextPipeline(model(), pool=pools.get(pool, pool) if isinstance(pool, str) else pool)


def test_a_pool_that_grows_is_used_at_once(tmp_path):
    pool = make_pool(tmp_path, count=5)
    pipe = VisualInContextPipeline(make_model(), pool=pool)
    assert pipe(scene(60)[0])["example_ids"][0] in pool.ids[:5]
    pool.add(rows(1, 60), progress=False)
    pool.remove(["scene 1"])
    assert pipe(scene(60)[0])["example_ids"] == ["scene 60"]
    expected = VisualInContextPipeline(make_model(), pool=pool)(photos(), num_examples=5)
    assert [plain(output) for output in pipe(photos(), num_examples=5)] == [plain(output) for output in expected]


@pytest.mark.parametrize("task", TASKS)
def test_the_name_of_a_backbone_is_enough(tmp_path, task):
    tiny_vit().save_pretrained(tmp_path / "vit")
    encoder = VisionEncoder.from_pretrained(str(tmp_path / "vit"))
    pool = make_pool(tmp_path, task, 5, encoder)
    expected = VisualInContextPipeline(make_model(task, encoder, temperature=0.05), pool=pool)(photos())
    for given in (pool, PoolReader(pool.folder), str(pool.folder), pool.folder):
        pipe = VisualInContextPipeline(str(tmp_path / "vit"), pool=given)
        assert [plain(output) for output in pipe(photos())] == [plain(output) for output in expected]
        assert pipe.model.separate_encoder is None and pipe.model.config.task == task
    # a backbone and, from the pool, another encoder
    tiny_seggpt().save_pretrained(tmp_path / "seggpt")
    pipe = VisualInContextPipeline(str(tmp_path / "seggpt"), pool=str(pool.folder))
    assert isinstance(pipe.model.frozen, SegGptInContext) and pipe.model.encoder.fingerprint == encoder.fingerprint
    of = VisualInContextPipeline(make_model(task, encoder, temperature=0.05), pool=pool)(photos(), strategy="nearest")
    assert pipe(photos(), strategy="nearest")[0]["example_ids"] == of[0]["example_ids"]
    with pytest.raises(ValueError, match="pass pool="):
        VisualInContextPipeline(str(tmp_path / "vit"))


def test_a_pool_keeps_the_encoder_it_was_made_with_for_a_backbone(pools, tmp_path):
    tiny_seggpt().save_pretrained(tmp_path)
    pipe = VisualInContextPipeline(str(tmp_path), pool=pools["segmentation"])  # whose encoder has no name
    check_contract("segmentation", pipe(scene(100)[0]), scene(100)[0], 1, pools["segmentation"].ids)
    with pytest.raises(ValueError, match="an encoder that has no name .*from_parts"):
        VisualInContextPipeline(str(tmp_path), pool=PoolReader(pools["segmentation"].folder))


def test_saving_again_renews_the_card_and_keeps_what_others_wrote_into_its_metadata(pools, tmp_path):
    VisualInContextPipeline(make_model(), "nearest", pools["segmentation"]).save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "| strategy | nearest |" in card.read_text()
    card.write_text(card.read_text().replace("library_name:", "license: mit\nlibrary_name:", 1))
    pipe = VisualInContextPipeline(tmp_path, "dense")  # whose pool is the one that stays
    expected = plain(pipe(scene(100)[0]))
    pipe.save_pretrained(tmp_path)
    text = card.read_text()
    assert "| strategy | dense |" in text and "license: mit" in text and text.count("- hf_effdl") == 1
    assert plain(VisualInContextPipeline(tmp_path)(scene(100)[0])) == expected


def test_a_frozen_model_is_joined_with_the_encoder_of_the_pool(pools):
    pool, seggpt = pools["segmentation"], tiny_seggpt()
    joined = VisualInContextPipeline(
        VisualInContextModel.from_parts(SegGptInContext(seggpt), pool.encoder_module), pool=pool
    )
    for model in (seggpt, SegGptInContext(seggpt)):
        pipe = VisualInContextPipeline(model, pool=pool)
        assert pipe.model.encoder is pool.encoder_module
        for one, other in zip(pipe(photos()), joined(photos())):
            assert one["example_ids"] == other["example_ids"]
            np.testing.assert_array_equal(one["prediction"], other["prediction"])
    matching = make_model().frozen
    assert VisualInContextPipeline(matching, pool=pool).model.encoder is matching.encoder  # the same encoder, its own
    with pytest.raises(ValueError, match="SegGptInContext does not name its pool"):
        VisualInContextPipeline(SegGptInContext(seggpt))
    with pytest.raises(TypeError, match="model is a Linear"):
        VisualInContextPipeline(torch.nn.Linear(1, 1), pool=pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["matching", "seggpt", "canvas"])
def test_half_precision_runs(pools, kind, dtype):
    pool, encoder = pools["segmentation"], tiny_encoder()
    encoder.fingerprint  # noqa: B018  of the weights as the pool knows them
    frozen = {
        "matching": lambda: make_model(encoder=encoder).frozen,
        "seggpt": lambda: SegGptInContext(tiny_seggpt()),
        "canvas": Mirror,
    }[kind]()
    model = VisualInContextModel.from_parts(frozen, encoder)
    measure_examples(model, pool, candidates=4, progress=False)
    full = VisualInContextPipeline(model, pool=pool)(photos())
    pipe = VisualInContextPipeline(model.to(dtype), pool=pool)
    for strategy in ("random", "nearest", "static", "dense", "transfer", "oracle"):
        outputs = pipe(photos(), strategy=strategy, labels=[scene(number)[1] for number in QUERIES], num_examples=2)
        for image, output in zip(photos(), outputs):
            check_contract("segmentation", output, image, 2, pool.ids)
    same = [a["example_ids"] == b["example_ids"] for a, b in zip(full, pipe(photos()))]
    agreement = [np.mean(a["prediction"] == b["prediction"]) for a, b in zip(full, pipe(photos()))]
    assert np.mean(same) >= 0.6 and np.mean(agreement) > 0.8


# ---- saved and loaded


@pytest.mark.parametrize("kind", ["matching", "seggpt", "separate", "alone"])
@pytest.mark.parametrize("task", TASKS)
def test_a_saved_pipeline_is_the_same(pools, tmp_path, task, kind):
    pool = pools[task]
    if kind == "matching":
        model = make_model(task, candidates=9)
    elif kind == "alone":  # SegGPT finds its examples with its own features
        model = VisualInContextModel.from_parts(SegGptInContext(tiny_seggpt()), task=task, candidates=9)
        pool = make_pool(tmp_path, task, encoder=model.encoder)
    else:
        frozen = SegGptInContext(tiny_seggpt()) if kind == "seggpt" else make_model(task, tiny_encoder(1)).frozen
        model = VisualInContextModel.from_parts(frozen, tiny_encoder(), task=task, candidates=9)
    measure_examples(model, pool, progress=False)
    pipe = VisualInContextPipeline(model, "transfer", pool)
    pipe.save_pretrained(tmp_path / "a")
    VisualInContextPipeline(tmp_path / "a").save_pretrained(tmp_path / "b")  # also where it was only read
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    for other in (VisualInContextPipeline(moved), VisualInContextPipeline(tmp_path / "b")):
        assert other.model.config.strategy == "transfer" and other.model.config.candidates == 9
        assert other.pool.ids == pool.ids and other.pool.fingerprint == pool.fingerprint
        assert (other.model.separate_encoder is None) == (kind in ("matching", "alone"))
        for options in ({}, {"strategy": "dense", "num_examples": 3}):
            assert [*map(plain, pipe(photos(), **options))] == [*map(plain, other(photos(), **options))]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["pool"] == "pool" and config["auto_map"]["AutoModel"].endswith("VisualInContextModel")
    assert "visual-in-context-learning" in config["custom_pipelines"]


def test_a_saved_pipeline_has_the_strategy_it_was_made_with(pools, tmp_path):
    pool = pools["segmentation"]
    VisualInContextPipeline(make_model(), pool=pool, strategy="dense", candidates=7).save_pretrained(tmp_path / "a")
    config = VisualInContextPipeline(tmp_path / "a").model.config
    assert (config.strategy, config.candidates) == ("dense", 7)
    pipe = VisualInContextPipeline(make_model(), lambda *_: None, pool)
    with pytest.warns(UserWarning, match="is a function and cannot be saved: the saved one will use 'auto'"):
        pipe.save_pretrained(tmp_path / "b")


def test_another_pool_given_to_a_saved_model_is_the_one_that_is_saved(pools, tmp_path):
    VisualInContextPipeline(make_model(), pool=pools["segmentation"]).save_pretrained(tmp_path / "a")
    other = make_pool(tmp_path, count=3, first=30)
    VisualInContextPipeline(tmp_path / "a", pool=other).save_pretrained(tmp_path / "b")
    assert VisualInContextPipeline(tmp_path / "b").pool.ids == other.ids
    model = make_model(pool="someone/pool", pool_revision="0" * 40)  # of which this is not
    pipe = VisualInContextPipeline(model, pool=other)
    pipe.save_pretrained(tmp_path / "c")
    assert VisualInContextPipeline(tmp_path / "c").pool.ids == other.ids
    pipe.model.config.pool = "me/pushed-by-hand"
    pipe.save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d" / "pool").exists()
    assert json.loads((tmp_path / "d" / "config.json").read_text())["pool"] == "me/pushed-by-hand"


def test_two_encoders_on_one_backbone_can_be_saved(pools, tmp_path):
    backbone = tiny_vit()
    pool = make_pool(tmp_path, count=4, encoder=VisionEncoder(backbone))
    frozen = hf_effdl.FeatureMatching(VisionEncoder(backbone, layer=0))
    pipe = VisualInContextPipeline(VisualInContextModel.from_parts(frozen, VisionEncoder(backbone)), pool=pool)
    pipe.save_pretrained(tmp_path / "saved")
    again = VisualInContextPipeline(tmp_path / "saved")
    assert [plain(a) for a in again(photos())] == [plain(b) for b in pipe(photos())]


def test_the_factory_of_transformers_makes_it_too(pools, tmp_path):
    pipe = VisualInContextPipeline(make_model(), pool=pools["segmentation"])
    expected = plain(pipe(scene(100)[0]))
    made = pipeline(
        "visual-in-context-learning",
        model=pipe.model,
        pool=pools["segmentation"],
        pipeline_class=VisualInContextPipeline,
    )
    assert type(made) is VisualInContextPipeline and plain(made(scene(100)[0])) == expected
    pipe.save_pretrained(tmp_path)
    made = pipeline(
        "visual-in-context-learning", model=str(tmp_path), pipeline_class=VisualInContextPipeline, num_examples=2
    )
    assert made(scene(100)[0])["example_ids"][:1] == expected[1] and made.task == "visual-in-context-learning"


# ---- pictures


def width_of(images, height):
    return sum(max(1, round(image.width * height / image.height)) + GAP for image in images) + GAP


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_has_a_row_for_each_query(pipes, pools, task, tmp_path):
    pipe, images = pipes(task, num_examples=2), photos()[:3]
    outputs, label = pipe(images), label_of(task, QUERIES[0])
    picture = pipe.plot(images, outputs, height=160, path=tmp_path / "panel.png")
    assert picture.mode == "RGB" and picture.height == LEGEND + 3 * (160 + CAPTION + GAP)
    shown = [[pools[task].image(pools[task].position(id)) for id in output["example_ids"]] for output in outputs]
    assert picture.width == max(width_of([*some, image, image], 160) for image, some in zip(images, shown))
    single = pipe.plot(images[0])
    assert single.height == LEGEND + 160 + CAPTION + GAP
    for one, other in (
        (Picture.open(tmp_path / "panel.png"), picture),
        (pipe.plot(images), picture),
        (pipe.plot(images[0], outputs[0]), single),
    ):
        assert np.array_equal(np.array(one), np.array(other))
    assert pipe.plot(images[0], strategy="oracle", labels=label).height == single.height
    assert pipe.plot(iter(images), strategy="oracle", labels=[label_of(task, n) for n in QUERIES[:3]]).height > 400
    assert pipe.plot(Picture.new("RGB", (300, 2), "red"), height=40).height == LEGEND + 40 + CAPTION + GAP
    if task == "detection":
        assert pipe.plot(images[0], outputs[0] | {"prediction": None}).height == single.height
    for wrong in ([], [[images[0]] * 2, [outputs[0]]]):
        with pytest.raises(ValueError):
            pipe.plot(*wrong or [[]])


def test_panels_show_examples_then_the_query_then_the_prediction(pipes):
    pipe, image = pipes(), scene(100)[0]
    output = pipe(image) | {"prediction": np.zeros(image.size[::-1], np.uint8)}
    height = image.height  # so that nothing is resized
    picture = np.array(pipe.plot(image, output, height=height))[LEGEND:]
    shown = pipe.pool.image(pipe.pool.position(output["example_ids"][0]))
    right = width_of([shown, image], height)
    prediction = picture[CAPTION : CAPTION + height, right : right + image.width]
    query = picture[CAPTION : CAPTION + height, right - GAP - image.width : right - GAP]
    assert np.array_equal(query, np.array(image))
    assert np.abs(prediction - 0.6 * np.array(image)).max() <= 1  # nothing was found: all of it is dimmed


def test_captions_do_not_run_into_each_other():
    green = Picture.new("RGB", (50, 40), "green")
    for name in ("n" * 500, "名前" * 50, "línea\nnueva"):
        answer = Answer("nearest", [(name, green, None)] * 2, [0.5, 0.25], None)
        picture = np.array(draw_panels([Shown(green, [answer])], "detection", 40))[LEGEND:]
        ink = (picture[:CAPTION] < 128).all(2).any(0)
        assert ink.any()
        for panel in range(5):  # in the gaps before, between and after there is none
            start = panel * (50 + GAP)
            assert not ink[start : start + GAP].any(), name
        assert (picture[CAPTION:] == [0, 128, 0]).all(2).sum() == 4 * 50 * 40, name


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_shows_the_truth_and_what_other_strategies_would_have_shown(pipes, monkeypatch, task):
    pipe, images, labels = pipes(task), photos()[:2], [label_of(task, number) for number in QUERIES[:2]]
    drawn = []
    monkeypatch.setattr(
        pipeline_module, "draw_panels", lambda rows, *given: (drawn.extend(rows), draw_panels(rows, *given))[1]
    )
    picture = pipe.plot(images, labels=labels, strategy="nearest", beside=("dense", "oracle"))
    assert picture.height == LEGEND + 2 * (160 + CAPTION + GAP)
    answers = {name: pipe(images, strategy=name, labels=labels) for name in ("nearest", "dense", "oracle")}
    for i, row in enumerate(drawn):
        assert [answer.strategy for answer in row.answers] == list(answers)
        for answer in row.answers:
            output = answers[answer.strategy][i]
            assert [id for id, _, _ in answer.examples] == output["example_ids"]
            cells = [
                pipe.visual_task.labels([one], [images[i]], pipe.model.image_size)
                for one in (output["prediction"], labels[i])
            ]
            assert answer.worth == pytest.approx(float(pipe.visual_task.score(*cells)))
    # the marked truth is another picture than the marked prediction
    assert np.array_equal(np.array(picture), np.array(draw_panels(drawn, task, 160)))
    without = [Shown(row.query, row.answers) for row in drawn]
    assert draw_panels(without, task, 160).width < picture.width


# ---- a selector that is set later


class Kept(torch.nn.Module):
    """In the place of a selector that a model keeps."""

    kind = "cascade"


def test_a_selector_that_is_set_later_is_not_silently_unused(pipes):
    pipe = pipes(selector="dense")
    pipe(scene(100)[0])
    pipe.model.selector = Kept()
    message = r"keeps a Kept since set_selector, but selector='dense' of the pipeline chooses.*strategy='cascade'"
    with pytest.warns(UserWarning, match=message):
        pipe(scene(100)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(scene(100)[0])  # it is said once
        pipes(selector="dense")(scene(100)[0])
    with pytest.raises(ValueError, match="here selector='dense' of the pipeline chooses: pass strategy='cascade'"):
        pipe(scene(100)[0], fusion="weighted", num_examples=2)
    pipe.model.selector = Kept()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(scene(100)[0], strategy="nearest")  # this call says who chooses


# ---- a new kind of frozen model


class Mixing(FrozenModel):
    """Paints the mean of the examples' labels, some of the query and a learned grey."""

    kind, image_size = "mixing", (SIZE, SIZE)

    def __init__(self, share=0.5):
        super().__init__()
        self.share, self.grey = share, torch.nn.Parameter(torch.full((3, 1, 1), 0.25))

    def settings(self):
        return {"share": self.share}

    @classmethod
    def from_settings(cls, settings, token=None):
        return cls(settings["share"])

    def predict(self, queries, images, labels, arrangement=0):
        return (self.share * labels.mean(1) + (1 - self.share) * queries + self.grey.detach()).clamp(0, 1)


def test_a_new_frozen_model_is_one_class_and_one_entry(pools, monkeypatch, tmp_path):
    frozen = Mixing(0.75)
    with torch.no_grad():
        frozen.grey += 0.1
    unknown = VisualInContextModel.from_parts(frozen, tiny_encoder())
    with pytest.raises(ValueError, match="a Mixing cannot be saved.*SegGptInContext, .*FeatureMatching can be saved"):
        VisualInContextPipeline(unknown, pool=pools["segmentation"]).save_pretrained(tmp_path / "unknown")
    assert not {"pool", "config.json"} & {file.name for file in (tmp_path / "unknown").glob("*")}
    monkeypatch.setitem(FROZEN, "mixing", Mixing)
    pipe = VisualInContextPipeline(
        VisualInContextModel.from_parts(frozen, tiny_encoder()), "dense", pools["segmentation"]
    )
    expected = pipe(photos(), num_examples=2)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = VisualInContextPipeline(tmp_path / "saved")
    assert isinstance(loaded.model.frozen, Mixing) and loaded.model.frozen.share == 0.75
    assert [plain(one) for one in loaded(photos(), num_examples=2)] == [plain(one) for one in expected]
    with pytest.raises(ValueError, match="Mixing has no encoder of its own: pass encoder="):
        VisualInContextModel.from_parts(frozen)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["frozen_model"] == {"kind": "mixing", "backbone": {"config": None}, "share": 0.75}


def test_nothing_is_warned_of_in_an_ordinary_run(pools):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VisualInContextPipeline(make_model(), "dense", pools["segmentation"])(photos())
