"""Models, pipelines and pools as files: whole or refused, from anybody, saved again and again, changed by several."""

import copy
import io
import json
import operator
import os
import random
import shutil
import socket
import sys
import threading
import time
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import photos, plain
from datasets import Dataset, Image
from PIL import Image as Picture
from pool_run import Encoder, encoded, picture
from pool_run import rows as pool_rows
from safetensors.torch import load_file, save_file
from scenes import make_model, make_pool, scene, tiny_vit
from torch.nn import functional as F
from transformers import AutoModel, DINOv3ConvNextConfig, DINOv3ConvNextModel, ViTConfig, ViTModel, pipeline

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    FeatureMatching,
    ListwiseRanker,
    ListwiseRankerConfig,
    SegGptInContext,
    Ticket,
    VisionEncoder,
    VisualInContextModel,
    VisualInContextPipeline,
    files,
    load_selection,
    measure_examples,
)
from hf_effdl.vicl.remote_code import writing
from hf_effdl.vicl.remote_code.images import MOST, opened
from hf_effdl.vicl.remote_code.pool_reader import PoolReader, file_digest


# ---- models


def without(folder, *prefixes):
    file = Path(folder, "model.safetensors")
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith(prefixes)}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["selector.", "measured_", "frozen."])
def test_a_model_file_that_lacks_tensors_is_refused_by_name(tmp_path, prefix):
    model = make_model()
    model.set_performance(torch.zeros(40, 5, dtype=torch.long), torch.ones(40, 5), "0" * 64)
    cascade = CascadeSelector()
    cascade.pool_fingerprint = "0" * 64
    model.set_selector(cascade).save_pretrained(tmp_path)
    VisualInContextModel.from_pretrained(tmp_path)
    without(tmp_path, prefix)
    with pytest.raises(ValueError, match=rf"the model's file lacks \d+ tensors that its config names \({prefix}"):
        VisualInContextModel.from_pretrained(tmp_path)


def test_a_ranker_or_an_encoder_that_lacks_weights_is_refused(tmp_path):
    ListwiseRanker(ListwiseRankerConfig(hidden_size=8, num_attention_heads=2)).save_pretrained(tmp_path / "ranker")
    without(tmp_path / "ranker", "trunk.0")
    with pytest.raises(ValueError, match="lacks .* tensors"):
        ListwiseRanker.from_pretrained(tmp_path / "ranker")
    tiny_vit().save_pretrained(tmp_path / "vit")
    VisionEncoder.from_pretrained(tmp_path / "vit")
    without(tmp_path / "vit", "layernorm")
    with pytest.raises(ValueError, match=r"lacks 2 tensors .*layernorm.bias"):
        VisionEncoder.from_pretrained(tmp_path / "vit")


@pytest.mark.parametrize("name", [True, False])
def test_a_saved_pipeline_answers_in_the_precision_asked_for(tmp_path, name):
    backbone = tiny_vit()
    if name:
        backbone.save_pretrained(tmp_path / "vit")
        backbone = ViTModel.from_pretrained(tmp_path / "vit")
    encoder = VisionEncoder(backbone, image_size=32)
    pool = make_pool(tmp_path, encoder=encoder)
    VisualInContextPipeline(FeatureMatching(encoder), pool=pool).save_pretrained(tmp_path / "saved")
    for load in (
        lambda **options: pipeline(model=str(tmp_path / "saved"), trust_remote_code=True, **options),
        lambda **options: VisualInContextPipeline(str(tmp_path / "saved"), **options),
    ):
        pipe = load(dtype=torch.bfloat16)
        assert {weight.dtype for weight in pipe.model.parameters()} == {torch.bfloat16}
        assert pipe(scene(100)[0])["prediction"].shape == scene(100)[0].size[::-1]
        assert {weight.dtype for weight in load().model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype='int8': pass a floating precision"):
        VisualInContextModel.from_pretrained(tmp_path / "saved", dtype="int8")


def test_code_of_a_named_part_is_run_for_nobody_who_did_not_ask(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    backbone = ViTModel(config, add_pooling_layer=False)
    backbone.save_pretrained(tmp_path / "named")
    values = json.loads((tmp_path / "named" / "config.json").read_text())
    values |= {"model_type": "other", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (tmp_path / "named" / "config.json").write_text(json.dumps(values))
    (tmp_path / "named" / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    VisualInContextModel.from_parts(FeatureMatching(VisionEncoder(backbone))).save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values["frozen_model"]["backbone"] = {"id": str(tmp_path / "named"), "revision": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for call in (
        lambda: AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=False),
        lambda: VisualInContextModel.from_pretrained(tmp_path / "model"),
        lambda: VisionEncoder.from_pretrained(tmp_path / "named"),
        lambda: VisualInContextModel.from_backbone(str(tmp_path / "named")),
    ):
        with pytest.raises(ValueError, match="custom code"):
            call()
    assert not mark.exists() and sys.stdin.tell() == 0


def test_saving_what_was_loaded_with_its_code_loads_again_and_again(tmp_path):
    pool = make_pool(tmp_path)
    VisualInContextPipeline(make_model(), pool=pool).save_pretrained(tmp_path / "0")
    expected = plain(VisualInContextPipeline(str(tmp_path / "0"))(photos()[0]))
    for turn in range(2):
        loaded = pipeline(model=str(tmp_path / f"{turn}"), trust_remote_code=True)
        assert plain(loaded(photos()[0])) == expected
        loaded.save_pretrained(tmp_path / f"{turn + 1}")
        files = [{file.name for file in (tmp_path / str(i)).iterdir()} for i in (0, turn + 1)]
        assert files[0] == files[1] and sum(name.endswith(".py") for name in files[0]) > 30


def test_saving_leaves_what_others_wrote_and_an_error_leaves_all(tmp_path, monkeypatch):
    pool = make_pool(tmp_path)
    VisualInContextPipeline(make_model(), pool=pool).save_pretrained(tmp_path / "first")
    own = [tmp_path / "second" / "pool" / "notes.txt", tmp_path / "second" / "pool" / "data" / "mine.tar"]
    for file in own:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("not yours")
    VisualInContextPipeline(make_model(), pool=make_pool(tmp_path, count=5)).save_pretrained(tmp_path / "second")
    read = VisualInContextPipeline(str(tmp_path / "first"))
    assert type(read.pool) is PoolReader
    read.save_pretrained(tmp_path / "second")
    assert all(file.read_text() == "not yours" for file in own)
    assert len(list((tmp_path / "second" / "pool" / "data").glob("pool-*"))) == 2 * len(pool.manifest["shards"])
    before = {file: file.read_bytes() for file in (tmp_path / "second").rglob("*") if file.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = make_model(matching="nearest")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path / "second")
    assert before == {file: file.read_bytes() for file in (tmp_path / "second").rglob("*") if file.is_file()}


def test_a_ranker_or_pipeline_that_is_cut_off_is_that_of_before_or_none(tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("ranker", "same", "other")}
    ranker = ListwiseRanker(ListwiseRankerConfig(hidden_size=8, num_attention_heads=2))
    ranker.save_pretrained(folders["ranker"])
    pipes = {
        name: VisualInContextPipeline(make_model(), pool=make_pool(tmp_path, count=9 + (name == "other")))
        for name in ("same", "other")
    }
    for name in pipes:
        pipes["same"].save_pretrained(folders[name])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *args, **kwargs: 1 / 0)
    for name, folder in folders.items():
        with pytest.raises(ZeroDivisionError):
            (ranker if name == "ranker" else pipes[name]).save_pretrained(folder)
    lost = {file for file in before if not file.is_file()}
    assert folders["other"] / "model.safetensors" in lost and all(folders["other"] in file.parents for file in lost)
    assert all(file.read_bytes() == before[file] for file in before if folders["other"] not in file.parents)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        VisualInContextPipeline(str(folders["other"]))


def test_a_size_that_patches_do_not_divide_is_said(recwarn):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=32)
    VisionEncoder(ViTModel(config), image_size=224)
    assert not [one for one in recwarn if "patches" in str(one.message)]
    with pytest.warns(UserWarning, match=r"do not divide image_size=\(250, 250\).*pass image_size=\(224, 224\)"):
        VisionEncoder(ViTModel(config), image_size=250)
    with pytest.raises(ValueError, match="smaller than a patch"):
        VisionEncoder(ViTModel(config), image_size=16)


def test_a_convolutional_map_that_comes_as_a_list_is_a_grid():
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    backbone = DINOv3ConvNextModel(config)
    encoder = VisionEncoder(backbone, image_size=(64, 96))
    views = encoder(torch.rand(2, 3, 64, 96))
    assert views["grid"].shape == (2, 2, 3, 32) and views["vector"].shape == (2, 32)
    image = torch.rand(1, 3, 64, 96)
    states = backbone((image - 0.5) / 0.5).last_hidden_state[0]
    torch.testing.assert_close(encoder(image)["grid"][0].flatten(0, 1), states[1:])
    torch.testing.assert_close(encoder(image)["vector"][0], F.normalize(states[0], dim=0))


# ---- which folder is meant


DOORS = {
    "pool": ExamplePool.from_pretrained,
    "pipeline": VisualInContextPipeline,
    "pipeline's pool": lambda name: VisualInContextPipeline(make_model(), pool=name),
    "model": VisualInContextModel.from_pretrained,
    "backbone": VisualInContextModel.from_backbone,
    "encoder": VisionEncoder.from_pretrained,
    "SegGPT": SegGptInContext.from_pretrained,
    "ranker": ListwiseRanker.from_pretrained,
    "selection": load_selection,
    "ticket": Ticket.from_pretrained,
}


@pytest.mark.parametrize("door", DOORS)
def test_a_mistyped_folder_is_never_asked_for_at_the_hub(tmp_path, monkeypatch, door):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    Path("runs").mkdir()
    for name in ("runs/nope", "./nope", "../nope", "/nope/nope", "~/nope", "a/b/nope"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder '{name}'"):
            DOORS[door](name)


@pytest.mark.parametrize("check", [files.check_folder, writing.check_folder])
def test_names_of_repositories_and_folders_that_are_there_pass(tmp_path, monkeypatch, check):
    monkeypatch.chdir(tmp_path)
    Path("me/here").mkdir(parents=True)
    for name in ("gpt2", "somebody/model", "me/here", Path("me/here"), "./me"):
        check(name)
    with pytest.raises(TypeError, match="NoneType is no place to load from"):
        check(None)
    check("me/model", "main")  # only repositories have revisions
    for name in ("me/model", Path("somebody/model")):
        with pytest.raises(FileNotFoundError, match="it is taken for a path"):
            check(name)


# ---- pools


def make(folder, count=6, **options):
    options = {"encoder": Encoder(), "foreground": "any", "progress": False} | options
    return ExamplePool.from_dataset(pool_rows(count), cache_dir=folder, **options)


def tensors(change):
    def edit(folder, manifest):
        entry = manifest["shards"][0]
        file = folder / "data" / f"{entry['name']}.safetensors"
        table = load_file(file)
        change(table)
        save_file({name: value.contiguous() for name, value in table.items()}, file)
        entry |= {"index_bytes": file.stat().st_size, "index_sha256": file_digest(file)}

    return edit


def entry(**values):
    return lambda folder, manifest: manifest["shards"][0].update(values)


def whole(**values):
    return lambda folder, manifest: manifest.update(values)


FORGED = {
    "no dropped": lambda folder, manifest: manifest["shards"][0].pop("dropped"),
    "no hash": lambda folder, manifest: manifest["shards"][0].pop("index_sha256"),
    "no settings": lambda folder, manifest: manifest.pop("settings"),
    "dropped far": entry(dropped=[10**9]),
    "dropped below": entry(dropped=[-1]),
    "dropped twice": entry(dropped=[1, 1]),
    "dropped text": entry(dropped="all"),
    "rows": entry(rows=10**12),
    "rows as a float": entry(rows=6.0),
    "bytes": entry(tar_bytes=-1),
    "path": entry(name="../../pool-00000-000000000000"),
    "same shard twice": lambda folder, manifest: manifest["shards"].append(manifest["shards"][0]),
    "task": whole(task="other"),
    "format": whole(format="1"),
    "encoder": whole(encoder=[]),
    "image size": lambda folder, manifest: manifest["encoder"].update(image_size=[10**9, 10**9]),
    "shards": whole(shards={}),
    "dim": whole(dim=2**40),
    "foreground": lambda folder, manifest: manifest["settings"].update(foreground={"a": 1}),
    "vectors large": tensors(lambda table: table["vectors"][2].mul_(1e6)),
    "vectors NaN": tensors(lambda table: table["vectors"][2].fill_(float("nan"))),
    "vectors double": tensors(lambda table: table.update(vectors=table["vectors"].double())),
    "vectors flat": tensors(lambda table: table.update(vectors=table["vectors"].flatten())),
    "tokens infinite": tensors(lambda table: table["tokens"][1].fill_(float("inf"))),
    "tokens of another width": tensors(lambda table: table.update(tokens=table["tokens"][..., :3])),
    "spans below 0": tensors(lambda table: table["spans"].fill_(-5)),
    "spans of 2^62": tensors(lambda table: table["spans"][:, :, 1].fill_(2**62)),
    "spans that overflow": tensors(lambda table: table["spans"].fill_(2**62)),
    "no digests": tensors(lambda table: table.pop("digests")),
    "ids no list": tensors(lambda table: table.update(ids=torch.frombuffer(bytearray(b"7"), dtype=torch.uint8))),
    "ids twice": tensors(lambda table: table.update(ids=torch.tensor(list(b'["0", "0", "2", "3", "4", "5"]')).byte())),
    "vectors fewer": tensors(lambda table: table.update(vectors=table["vectors"][:3])),
    "ids deep": tensors(lambda table: table.update(ids=torch.full((10**5,), ord("["), dtype=torch.uint8))),
    "ids no JSON": tensors(lambda table: table.update(ids=table["ids"].flip(0))),
    "columns": tensors(
        lambda table: table.update(columns=torch.frombuffer(bytearray(b'{"group": [1]}'), dtype=torch.uint8))
    ),
}


BAD = (None, True, -1, 10**12, 1e308, float("nan"), "../../x", [], {}, ["x"] * 3, {"a": 1})


# of an encoder: another one, which will be told from the model's by its fingerprint
NAMES = [("id", None), ("id", "../../x"), ("revision", "../../x"), ("layer", -1), ("image_size", None)]


def places(value, at=()):
    """Of every value in a tree of plain ones, the keys that lead to it; of a list the first one's."""
    for key, one in (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    ):
        yield (*at, key)
        yield from places(one, (*at, key))


def forged(value, at, bad):
    value = copy.deepcopy(value)
    reduce(operator.getitem, at[:-1], value)[at[-1]] = bad
    return value


@pytest.mark.parametrize("share", [slice(25), pytest.param(slice(25, None), marks=pytest.mark.slow)])
def test_a_forged_manifest_is_refused_at_once_or_changes_nothing(good, tmp_path, share):
    manifest, whole = json.loads((good / "pool.json").read_text()), PoolReader(good)
    every = [(at, bad) for at in places(manifest) for bad in BAD]
    random.Random(0).shuffle(every)
    assert len(every) > 400
    (tmp_path / "data").symlink_to(good / "data")
    for at, bad in every[share]:
        (tmp_path / "pool.json").write_text(json.dumps(forged(manifest, at, bad)))
        begun = time.process_time()
        try:
            pool = PoolReader(tmp_path)
        except ValueError as error:
            assert "download the repository again" in str(error) or "install a newer one" in str(error), (at, bad)
        else:
            assert pool.ids == whole.ids and pool.files(5) == whole.files(5) and pool.task == whole.task, (at, bad)
            assert torch.equal(pool.search(pool.vectors, 3)[1], whole.search(whole.vectors, 3)[1]), (at, bad)
            assert pool.encoder == whole.encoder or (at[-1], bad) in NAMES, (at, bad)
        assert time.process_time() - begun < 2, (at, bad)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model, cascade = make_model(), CascadeSelector()
    model.set_performance(torch.zeros(40, 5, dtype=torch.long), torch.ones(40, 5), "0" * 64)
    cascade.pool_fingerprint = "0" * 64
    model.set_selector(cascade).save_pretrained(folder / "model")
    ListwiseRanker(ListwiseRankerConfig(hidden_size=8, num_attention_heads=2)).save_pretrained(folder / "ranker")
    return folder


@pytest.mark.parametrize("share", [slice(5), pytest.param(slice(5, 250), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [VisualInContextModel, ListwiseRanker])
def test_a_forged_config_is_refused_with_an_error_of_ours_or_read(models, tmp_path, kind, share):
    folder = models / {VisualInContextModel: "model", ListwiseRanker: "ranker"}[kind]
    config = json.loads((folder / "config.json").read_text())
    every = [(at, bad) for at in places(config) for bad in BAD if at != ("dtype",)]  # which is upstream's
    random.Random(0).shuffle(every)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    for at, bad in every[share]:
        (tmp_path / "config.json").write_text(json.dumps(forged(config, at, bad)))
        begun = time.process_time()
        try:
            kind.from_pretrained(tmp_path)
        except (ValueError, TypeError, OSError):
            pass
        assert time.process_time() - begun < 2, (at, bad)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make(tmp_path_factory.mktemp("good")).folder


@pytest.mark.parametrize("name", FORGED)
def test_what_no_pool_holds_is_refused_when_it_is_opened(good, tmp_path, name):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / "pool.json").read_text())
    FORGED[name](tmp_path, manifest)
    (tmp_path / "pool.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="download the repository again"):
        PoolReader(tmp_path)


def test_images_are_read_by_few_readers_and_bombs_by_none(tmp_path):
    image = picture(np.random.default_rng(0))
    for kind in ("BMP", "GIF", "TIFF", "PPM"):
        assert opened(encoded(image, kind)).size == image.size
        with pytest.raises(ValueError, match="cannot be read"):
            opened(encoded(image, kind), ("JPEG", "PNG", "WEBP"))
    for kind in ("JPEG", "PNG", "WEBP"):
        assert opened(encoded(image, kind), ("JPEG", "PNG", "WEBP")).size == image.size
    side = int(MOST**0.5) + 10
    bomb = encoded(Picture.new("1", (side, side)))
    assert len(bomb) < 100_000
    with (
        pytest.raises(ValueError, match="more than 134,217,728: shrink it"),
        pytest.warns(Picture.DecompressionBombWarning),
    ):
        opened(bomb)


def test_a_mask_that_was_corrected_on_disk_makes_another_pool(tmp_path):
    image, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Picture.new("RGB", (32, 32), "red").save(image)
    folders = []
    for side in (4, 20, 20):
        drawn = np.zeros((32, 32), np.uint8)
        drawn[:side, :side] = 255
        if len(folders) < 2:
            Picture.fromarray(drawn).save(mask)
        data = Dataset.from_dict({"image": [str(image)], "label": [str(mask)]})
        data = data.cast_column("image", Image()).cast_column("label", Image())
        pool = ExamplePool.from_dataset(data, encoder=Encoder(), cache_dir=tmp_path / "pools", progress=False)
        assert (np.asarray(pool.label(0)) > 0).sum() == side * side
        folders.append(pool.folder)
    assert folders[0] != folders[1] == folders[2]


def test_the_same_call_heals_a_damaged_index_and_a_damaged_note(tmp_path):
    pool = make(tmp_path)
    [index] = (pool.folder / "data").glob("*.safetensors")
    [note] = (pool.folder / "done").glob("*.json")
    for file, place in ((index, -7), (index, 40), (note, 5), (note, -9)):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        again = make(tmp_path)
        assert again.fingerprint == pool.fingerprint
        again.verify()


def test_a_saved_pool_does_not_name_a_folder_of_this_machine(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "alice" / "secret")
    pool = make(tmp_path / "pools", encoder=str(tmp_path / "alice" / "secret"))
    for turn, made in enumerate((pool, pool.remove(["0"]))):
        saved = made.save_pretrained(tmp_path / f"shared {turn}")
        assert not [file for file in saved.rglob("*") if file.is_file() and b"secret" in file.read_bytes()]
    # the encoder is found again behind the backbone that is named
    pipe = VisualInContextPipeline(str(tmp_path / "alice" / "secret"), pool=str(saved))
    assert len(pipe(scene(0)[0])["example_ids"]) == 1


def test_two_who_change_a_pool_do_so_one_after_the_other(tmp_path):
    pool = make(tmp_path, 8)
    gone, more = pool.ids[:2], pool_rows(20, 1)
    entered, errors = threading.Event(), []

    class Slow(Encoder):
        def forward(self, pixels):
            entered.set()
            threading.Event().wait(0.02)
            return super().forward(pixels)

    def change(work):
        try:
            work()
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    def add():
        ExamplePool(pool.folder).add(more, encoder=Slow(), batch_size=2, progress=False)

    def remove():
        entered.wait()
        ExamplePool(pool.folder).remove(gone)

    threads = [threading.Thread(target=change, args=(work,)) for work in (add, remove)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = ExamplePool(pool.folder)
    assert not errors and len(found) == 26 and not set(gone) & set(found.ids)
    assert not list(pool.folder.glob(".lock*"))


def test_a_part_that_was_changed_is_measured_again(tmp_path):
    pool = make_pool(tmp_path / "pools")
    expected = measure_examples(make_model(), pool, cache_dir=tmp_path / "parts", progress=False)[1]
    [file] = (tmp_path / "parts").glob("*/*.safetensors")
    content = file.read_bytes()
    places = range(len(content) - 1, len(content) - 600, -97)
    flips = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in places]
    for damaged in (*flips, content[:-7], b""):
        file.write_bytes(damaged)
        again = measure_examples(make_model(), pool, cache_dir=tmp_path / "parts", progress=False)[1]
        assert torch.equal(again, expected) and file.read_bytes() == content
