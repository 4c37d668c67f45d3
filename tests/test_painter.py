"""Painter against the authors' code on made-up weights, converted, saved, and as a frozen model."""

import json
import sys
import zlib

import datasets
import numpy as np
import pytest
import torch
from answers import photos, plain, tiny_seggpt
from conftest import ROOT
from datasets import Dataset, Features
from PIL import Image
from safetensors.torch import load_file
from scenes import make_pool, tiny_encoder
from transformers import AutoModel, SegGptForImageSegmentation
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_effdl import (
    ExamplePool,
    PainterInContext,
    SegGptInContext,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
)
from hf_effdl.vicl.remote_code.images import pixels


sys.path.insert(0, str(ROOT / "examples"))
from convert_painter import convert, main  # noqa: E402


MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
BLOCK = {
    "norm1": 32,
    "norm2": 32,
    "attn.qkv": (96, 32),
    "attn.proj": (32, 32),
    "mlp.fc1": (128, 32),
    "mlp.fc2": (32, 128),
}
LAYERS = {f"blocks.{i}.{name}": shape for i in range(24) for name, shape in BLOCK.items()}
LAYERS |= {"patch_embed.proj": (32, 3, 8, 8), "norm": 32, "decoder_embed": (512, 128), "decoder_pred.1": 8}
LAYERS |= {"decoder_pred.0": (8, 8, 3, 3), "decoder_pred.3": (3, 8, 1, 1)}
TOKENS = {"mask_token": (1, 1, 1, 32), "segment_token_x": (1, 1, 1, 32), "segment_token_y": (1, 1, 1, 32)}
TOKENS |= {"pos_embed": (1, 17, 32)}
TOKENS |= {f"blocks.{i}.attn.rel_pos_{axis}": (n, 16) for i in range(24) for axis, n in (("h", 15), ("w", 7))}


def drawn(name, shape):
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        values = 0.2 * values + (name.endswith("weight"))  # of norms
    elif not ("token" in name or "pos" in name):
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def tensors():
    """Of a checkpoint, by the authors' names."""
    shapes = {f"{name}.weight": np.atleast_1d(shape) for name, shape in LAYERS.items()}
    shapes |= {f"{name}.bias": np.atleast_1d(shape)[:1] for name, shape in LAYERS.items()}
    return {name: drawn(name, tuple(map(int, shape))) for name, shape in (shapes | TOKENS).items()}


@pytest.fixture(scope="module")
def model():
    return convert(tensors())


@pytest.fixture(scope="module")
def prompt():
    return [torch.from_numpy(part) for part in np.random.default_rng(0).random((3, 2, 3, 32, 32)).astype(np.float32)]


@pytest.fixture(scope="module")
def painted():
    return load_file(ROOT / "tests" / "fixtures" / "painter" / "expected.safetensors")["painted"]


def test_it_answers_as_the_authors_code(model, prompt, painted):
    queries, images, labels = ((part - MEAN) / STD for part in prompt)
    with torch.no_grad():
        own = model(pixel_values=queries, prompt_pixel_values=images, prompt_masks=labels).pred_masks
    assert len(tensors()) == 352 and painted.std() > 0.5
    torch.testing.assert_close(own, painted, atol=1e-5, rtol=0)
    answer = PainterInContext(model)(prompt[0], prompt[1][:, None], prompt[2][:, None])
    torch.testing.assert_close(answer, (painted[:, :, 32:] * STD + MEAN).clamp(0, 1), atol=1e-5, rtol=0)


def test_several_examples_are_shown_one_by_one_unless_asked_otherwise(model, prompt):
    queries, images, labels = prompt
    both, answers = torch.stack([images, labels], 1), torch.stack([labels, images], 1)
    f = PainterInContext(model)
    for arrangement in (0, 1):
        alone = [f(queries, both[:, [i]], answers[:, [i]], arrangement) for i in (0, 1)]
        together = f(queries, both, answers, arrangement)
        whole = torch.stack([(one > 0) & (one < 1) for one in alone]).all(0)  # not cut off at black or white
        mean = (alone[0] + alone[1]) / 2
        torch.testing.assert_close(together[whole], mean[whole], atol=1e-5, rtol=0)
        assert whole.float().mean() > 0.5
        same = [f(queries[[i]], both[[i]], answers[[i]], arrangement) for i in (0, 1)]
        torch.testing.assert_close(together, torch.cat(same), atol=1e-5, rtol=0)
    joined = PainterInContext(model, ensemble="original")(queries, both, answers)
    torch.testing.assert_close(joined, SegGptInContext(model)(queries, both, answers), atol=0, rtol=0)
    assert (joined - f(queries, both, answers)).abs().max() > 1e-3
    assert not any(weight.requires_grad for weight in f.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(prompt, painted, dtype):
    f = PainterInContext(convert(tensors()).to(dtype))
    answer = f(prompt[0], prompt[1][:, None], prompt[2][:, None])
    exact = (painted[:, :, 32:] * STD + MEAN).clamp(0, 1)
    assert answer.dtype == torch.float32 and (answer - exact).abs().mean() < 0.02


def noisy_rows(count=8):
    """Photos, and beside them what each is to become: the photo in negative."""
    images = photos(range(count))
    clean = [Image.fromarray(255 - np.asarray(image)) for image in images]
    kinds = Features({"image": datasets.Image(), "clean": datasets.Image()})
    return Dataset.from_dict({"image": images, "clean": clean}, features=kinds)


def test_photos_become_pictures_by_example(model, tmp_path):
    data = noisy_rows()
    options = {"encoder": tiny_encoder(), "cache_dir": tmp_path, "progress": False, "task": "image-to-image"}
    pool = ExamplePool.from_dataset(data, label_column="clean", **options)
    again = ExamplePool.from_pretrained(pool.save_pretrained(tmp_path / "copy"))
    for row in (0, 7):
        assert np.array_equal(np.asarray(again.label(row)), np.asarray(data[row]["clean"]))
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "what each is to become" in card and "`label.png`" in card and "image-to-image" in card
    frozen = PainterInContext(model)
    measured = VisualInContextModel.from_parts(frozen, pool.encoder_module, task="image-to-image")
    measure_examples(measured, pool, candidates=3, progress=False)
    pipe, image = VisualInContextPipeline(measured, "oracle", pool), photos()[0]
    truth = Image.fromarray(255 - np.asarray(image))
    out = pipe(image, labels=truth, soft_map=True)
    assert out["prediction"].size == image.size and out["confidence"] is None
    assert np.abs(out["soft_map"] - np.asarray(out["prediction"]).mean(2) / 255).mean() < 0.02  # two ways of resizing
    cells = [pixels([one], (32, 32)) for one in (image, pool.image(0), pool.label(0))]
    worth = pipe.visual_task.score(frozen(cells[0], *(cell[:, None] for cell in cells[1:])), pixels([truth], (32, 32)))
    scores = pipe(image, labels=truth, num_examples=8)
    assert scores["scores"][scores["example_ids"].index("0")] == pytest.approx(-float(worth), abs=1e-4)
    assert pipe.plot(image, labels=truth).size[1] > 0
    with pytest.raises(ValueError, match="PainterInContext paints one picture"):
        pipe(image, instances=True)
    without = Dataset.from_dict({"image": data["image"][:2], "clean": [None, data["clean"][1]]}, data.features)
    with pytest.raises(ValueError, match="row 0, id '0'.*no picture as its label"):
        ExamplePool.from_dataset(without, label_column="clean", **options)


# ---- the converter


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.update(type_token_cls=torch.zeros(1)), "such as type_token_cls; this is a SegGPT"),
        (lambda t: t.update({"blocks.3.residual.conv1.weight": t["norm.bias"]}), "no place in a Painter, such as blo"),
        (lambda t: t.pop("norm.weight"), "1 tensors are missing, such as model.encoder.layernorm.weight"),
        (lambda t: t.pop("blocks.0.attn.rel_pos_h"), "no tensor for 'model.encoder.layers.0.attention.rel_pos_h'"),
        (lambda t: t.clear(), "no tensor for 'model.embeddings.patch_embeddings.projection.weight'"),
        (lambda t: t.update({"blocks.0.attn.rel_pos_h": torch.zeros(27, 16)}), "14 x 4 patches: a canvas is two"),
        (lambda t: t.update({"blocks.9.attn.rel_pos_w": torch.zeros(9, 16)}), r"w is \(9, 16\) and should be \(7, 16"),
        (lambda t: t.update({"blocks.24.norm1.bias": torch.zeros(32)}), "there are 25 blocks"),
        (lambda t: t.update({"blocks.99.norm1.bias": t.pop("blocks.5.norm1.bias")}), "25 blocks"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(change, text):
    changed = tensors()
    change(changed)
    with pytest.raises(ValueError, match=text):
        convert(changed)


def test_a_file_is_converted_and_its_name_is_enough(tmp_path, model, capsys):
    torch.save({"model": tensors(), "epoch": 14}, tmp_path / "painter.pth")
    main(["--painter", str(tmp_path / "painter.pth"), "--out", str(tmp_path / "painter")])
    assert f"{sum(weight.numel() for weight in model.parameters()):,} weights in" in capsys.readouterr().out
    pool = make_pool(tmp_path, "colourisation")
    for given in (
        str(tmp_path / "painter"),
        SegGptForImageSegmentation.from_pretrained(tmp_path / "painter"),
        PainterInContext.from_pretrained(str(tmp_path / "painter")),
    ):
        pipe = VisualInContextPipeline(given, pool=pool)
        assert type(pipe.model.frozen) is PainterInContext
        assert pipe(photos()[0])["prediction"].size == photos()[0].size
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        PainterInContext.from_pretrained(str(tmp_path / "nothing"))
    ours = VisualInContextModel.from_backbone(str(tmp_path / "painter"), ensemble="original")
    assert ours.frozen.ensemble == "original" and ours.encoder.fingerprint == ours.frozen.own_encoder().fingerprint


def test_another_model_is_refused_and_a_seggpt_stays_one(tmp_path):
    with pytest.raises(ValueError, match="in_context_model=None: this is a SegGPT and no converted Painter"):
        PainterInContext(tiny_seggpt())
    with pytest.raises(TypeError, match="model is a Linear"):
        PainterInContext(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="ensemble='mean': it must be one of"):
        PainterInContext(convert(tensors()), ensemble="mean")
    pipe = VisualInContextPipeline(tiny_seggpt(), pool=make_pool(tmp_path))
    assert type(pipe.model.frozen) is SegGptInContext


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_it_answers_the_same_where_this_package_cannot_be_imported(model, tmp_path, monkeypatch, named):
    whole = VisualInContextModel.from_parts(PainterInContext(model, ensemble="original"), tiny_encoder())
    if named:
        model.save_pretrained(tmp_path / "painter")
        whole.config.frozen_model["backbone"] = {"id": str(tmp_path / "painter"), "revision": None}
    pipe, image = VisualInContextPipeline(whole, pool=make_pool(tmp_path)), photos()[0]
    expected = plain(pipe(image, num_examples=2, fusion="model"))
    pipe.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "config.json").read_text())["frozen_model"]
    assert (kept["kind"], kept["ensemble"], "id" in kept["backbone"]) == ("painter", "original", named)
    assert type(AutoModel.from_pretrained(tmp_path / "saved").frozen) is PainterInContext
    monkeypatch.setitem(sys.modules, "hf_effdl", None)
    travelled = get_class_from_dynamic_module("pipeline_visual_in_context.VisualInContextPipeline", tmp_path / "saved")
    assert plain(travelled(str(tmp_path / "saved"))(image, num_examples=2, fusion="model")) == expected
