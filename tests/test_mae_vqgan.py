"""MAE-VQGAN against the authors' code on made-up weights, converted, saved, and on canvases."""

import json
import sys
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from answers import photos, plain
from conftest import ROOT
from safetensors.torch import load_file
from scenes import make_pool, tiny_encoder
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_effdl import (
    MaeVqganConfig,
    MaeVqganForImageInpainting,
    MaeVqganInContext,
    VisualInContextModel,
    VisualInContextPipeline,
)
from hf_effdl.vicl.remote_code.frozen_canvas import arrange, unarrange


sys.path.insert(0, str(ROOT / "examples"))
from convert_mae_vqgan import convert, main, read, sizes_of  # noqa: E402


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 2,
    "code_size": 12,
    "latent_channels": 8,
    "level_channels": [32, 32, 32, 64, 64],
    "blocks": 2,
}
HEADS = SIZES["num_attention_heads"], SIZES["decoder_num_attention_heads"]
HIDDEN = torch.zeros(14, 14, dtype=torch.bool).index_fill(0, torch.arange(7, 14), True)
HIDDEN[:, :7] = False


def drawn(name, shape):
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        values = 0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0)
    elif not ("token" in name or "embedding" in name):
        values = 1.5 * values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


@cache
def tensors():
    """Of a checkpoint, with what it has beside the model."""
    empty = MaeVqganForImageInpainting(MaeVqganConfig(**SIZES)).state_dict()
    own = {name: value if "pos_embed" in name else drawn(name, tuple(value.shape)) for name, value in empty.items()}
    return own | {"vae.encoder.conv_in.weight": torch.zeros(1), "vae.quant_conv.bias": torch.zeros(1)}


def split():
    """The two files' tensors."""
    vqgan = {name[4:]: value for name, value in tensors().items() if name.startswith("vae.")}
    return {name: value for name, value in tensors().items() if not name.startswith("vae.")}, vqgan


@pytest.fixture(scope="module")
def model():
    return convert(*split(), *HEADS)


# ---- the authors' numbers


def test_it_answers_as_the_authors_code(model):
    expected = load_file(ROOT / "tests" / "fixtures" / "mae_vqgan" / "expected.safetensors")
    pixels = torch.from_numpy(np.random.default_rng(0).random((2, 3, 224, 224)).astype(np.float32))
    hidden = HIDDEN.flatten().expand(2, -1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        logits = model((pixels - mean) / std, hidden).logits
    torch.testing.assert_close(model.pos_embed[:, ::20], expected["pos_embed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits[:, ::7, ::64], expected["logits"], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits.argmax(2).short(), expected["codes"])
    torch.testing.assert_close(model.paint(pixels, hidden)[:, :, 3::16, 5::16], expected["painted"], atol=1e-4, rtol=0)


def test_hidden_patches_are_not_looked_at(model):
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    other = pixels.clone()
    other[..., 112:, 112:] = 1
    hidden = HIDDEN.flatten()[None]
    torch.testing.assert_close(model(pixels, hidden).logits, model(other, hidden).logits)
    assert not torch.equal(model(pixels, hidden).logits, model(pixels, hidden.flip(1)).logits)
    with pytest.raises(ValueError, match=r"hides \[49, 48\] patches"):
        fewer = hidden.clone()
        fewer[0, -1] = False
        model(pixels.repeat(2, 1, 1, 1), torch.cat([hidden, fewer]))
    with pytest.raises(ValueError, match=r"must be \(N, 3, 224, 224\) and \(N, 196\)"):
        model(pixels[..., :200], hidden)


# ---- the converter


def test_sizes_are_those_of_the_tensors_and_the_vqgan_may_lie_in_either_file(model):
    assert sizes_of(tensors(), *HEADS).items() >= (SIZES | {"image_size": 224, "attention_levels": [4]}).items()
    whole = convert({name: value for name, value in tensors().items()}, None, *HEADS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda mae, vqgan: mae.pop("norm.weight"), "no tensor 'norm.weight', of the masked autoencoder"),
        (lambda mae, vqgan: vqgan.clear(), "of the VQGAN: pass --vqgan"),
        (lambda mae, vqgan: mae.pop("blocks.1.mlp.fc2.bias"), "1 tensors are missing, such as blocks.1.mlp.fc2.bias"),
        (lambda mae, vqgan: mae.update(head=torch.zeros(1)), "1 tensors have no place in the model, such as head"),
        (lambda mae, vqgan: mae.update(cls_token=torch.zeros(1, 1, 8)), r"cls_token is \(1, 1, 8\) and should be"),
        (lambda mae, vqgan: vqgan.update({"quantize.embedding.weight": torch.zeros(9, 12)}), r"is \(9, 12\)"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(change, text):
    mae, vqgan = split()
    change(mae, vqgan)
    with pytest.raises(ValueError, match=text):
        convert(mae, vqgan, *HEADS)


def test_files_are_converted_and_nothing_is_unpickled(tmp_path, model, capsys):
    mae, vqgan = split()
    torch.save({"model": mae, "epoch": 1000}, tmp_path / "mae.pth")
    torch.save({"state_dict": vqgan}, tmp_path / "last.ckpt")
    heads = ["--heads", "4", "--decoder_heads", "2"]
    main(
        [
            "--mae",
            str(tmp_path / "mae.pth"),
            "--vqgan",
            str(tmp_path / "last.ckpt"),
            "--out",
            str(tmp_path / "o"),
            *heads,
        ]
    )
    assert "weights in" in capsys.readouterr().out
    for loaded in (
        MaeVqganForImageInpainting.from_pretrained(tmp_path / "o"),
        AutoModel.from_pretrained(tmp_path / "o"),
    ):
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    torch.save({"model": mae, "callbacks": [Stranger()]}, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors and plain values"):
        read(tmp_path / "pickled.pth", "model")
    assert not Stranger.woken
    with pytest.raises(ValueError, match="holds no tensors under 'model'"):
        read(tmp_path / "last.ckpt", "model")


class Stranger:
    woken = False

    def __setstate__(self, state):
        Stranger.woken = True

    def __getstate__(self):
        return {"a": 1}


# ---- on canvases


@pytest.mark.parametrize("arrangement", [0, 3])
def test_the_answer_is_the_painted_quarter(model, arrangement):
    generator = torch.Generator().manual_seed(1)
    queries, images, labels = (
        torch.rand(shape, generator=generator) for shape in ((2, 3, 111, 111), *2 * [(2, 1, 3, 111, 111)])
    )
    canvas, mask = arrange(images[:, 0], labels[:, 0], queries, arrangement)
    expected = unarrange(model.paint(canvas, mask.flatten(1)), arrangement)
    frozen = MaeVqganInContext(model)
    torch.testing.assert_close(frozen(queries, images, labels, arrangement), expected)
    assert expected.std() > 0.05 and frozen.arrangements == 8
    half = MaeVqganInContext(convert(*split(), *HEADS).to(torch.bfloat16))
    assert (half(queries, images, labels, arrangement) - expected).abs().mean() < 0.2


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_it_answers_the_same_where_this_package_cannot_be_imported(model, tmp_path, monkeypatch, named):
    pool, made = make_pool(tmp_path), MaeVqganInContext(model)
    if named:
        model.save_pretrained(tmp_path / "mae")
        made = MaeVqganInContext.from_pretrained(str(tmp_path / "mae"))
    whole = VisualInContextModel.from_parts(made, tiny_encoder())
    if named:  # a folder is embedded; a repository would be named like this
        whole.config.frozen_model["backbone"] = {"id": str(tmp_path / "mae"), "revision": None}
    pipe = VisualInContextPipeline(whole, pool=pool)
    image = photos()[0]
    expected = plain(pipe(image))
    pipe.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "config.json").read_text())["frozen_model"]
    assert kept["kind"] == "mae-vqgan" and ("id" in kept["backbone"]) == named
    assert plain(VisualInContextPipeline(tmp_path / "saved")(image)) == expected
    monkeypatch.setitem(sys.modules, "hf_effdl", None)
    travelled = get_class_from_dynamic_module("pipeline_visual_in_context.VisualInContextPipeline", tmp_path / "saved")
    assert plain(travelled(str(tmp_path / "saved"))(image)) == expected


def test_the_name_of_a_converted_checkpoint_is_enough(model, tmp_path):
    model.save_pretrained(tmp_path / "mae")
    pipe = VisualInContextPipeline(str(tmp_path / "mae"), pool=make_pool(tmp_path, "detection"))
    assert isinstance(pipe.model.frozen, MaeVqganInContext) and pipe.model.encoder is pipe.pool.encoder_module
    assert pipe(photos()[0]).keys() >= {"prediction", "example_ids"}


def test_canvases_of_another_geometry_are_refused():
    small = SIZES | {"image_size": 64, "patch_size": 8, "level_channels": [32] * 4, "attention_levels": []}
    for call, error, text in (
        (lambda: MaeVqganInContext(MaeVqganForImageInpainting(MaeVqganConfig(**small))), ValueError, "of 64 pixels"),
        (lambda: MaeVqganInContext(torch.nn.Linear(1, 1)), TypeError, "model is a Linear"),
        (lambda: MaeVqganConfig(patch_size=0), ValueError, "patch_size=0: it is a whole number"),
        (lambda: MaeVqganConfig(blocks=10**7), ValueError, "blocks=10000000: it is a whole number from 1 to 1000"),
        (lambda: MaeVqganConfig(hidden_size=18), ValueError, "hidden_size=18 is no multiple of 4"),
        (lambda: MaeVqganConfig(image_size=100), ValueError, "not made of whole patches"),
        (lambda: MaeVqganConfig(level_channels=(32, 32)), ValueError, "2 levels paint 2 pixels"),
        (lambda: MaeVqganConfig(level_channels=(32, 32, 32, 32, 40)), ValueError, "norms are of 32 groups"),
        (lambda: MaeVqganForImageInpainting(MaeVqganConfig(num_attention_heads=7)), ValueError, "7 attention heads"),
    ):
        with pytest.raises(error, match=text):
            call()
