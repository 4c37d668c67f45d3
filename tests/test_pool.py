"""The pool of examples: what goes in comes out, whoever writes it and however often it is interrupted."""

import json
import os
import pickle
import shutil
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image, Value, concatenate_datasets
from forked import Script
from PIL import Image as PILImage
from pool_run import Encoder, encoded, picture, rows

from hf_effdl.vicl.pool import index as pool_index
from hf_effdl.vicl.pool.pool import ExamplePool
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.pool_reader import PoolReader
from hf_effdl.vicl.remote_code.pool_search import exact_search
from hf_effdl.vicl.remote_code.visual_tasks import Segmentation, find_task


@pytest.fixture
def make(tmp_path):
    def from_dataset(ds, **options):
        options = {
            "encoder": Encoder(),
            "cache_dir": tmp_path / "cache",
            "rows_per_shard": 5,
            "batch_size": 3,
            "progress": False,
        } | options
        if options.get("task", "segmentation") == "segmentation":  # the masks of `rows` have three classes and void
            options = {"foreground": "any"} | options
        return ExamplePool.from_dataset(ds, **options)

    return from_dataset


def files_of(pool) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (pool.folder / "data").iterdir()}


def same(pool, other) -> None:
    """Two pools hold the same, whatever their shards."""
    assert pool.ids == other.ids and pool.fingerprint == other.fingerprint
    assert pool.encoder == other.encoder and pool.task == other.task and len(pool) == len(other)
    torch.testing.assert_close(pool.vectors, other.vectors)
    torch.testing.assert_close(pool.tokens(range(len(pool))), other.tokens(range(len(pool))), atol=1e-3, rtol=1e-3)
    for row in range(len(pool)):
        assert pool.files(row) == other.files(row)


# ---- what goes in


@pytest.mark.parametrize("task", ["segmentation", "detection", "colourisation"])
def test_every_row_comes_back_as_it_was(make, task):
    ds = rows(13)
    pool = make(
        ds, task=task, label_column="box" if task == "detection" else "label", id_column="name", keep_grids=True
    )
    assert (len(pool), pool.ids, pool.task) == (13, ds["name"][:], task)
    assert [entry["rows"] for entry in pool.manifest["shards"]] == [5, 5, 3]
    raw = ds.cast_column("image", Image(decode=False))["image"]
    for row in range(13):
        assert pool.position(ds[row]["name"]) == row
        assert pool.files(row)[0] == raw[row]["bytes"]  # the very file
        assert pool.image(row).mode == "RGB" and pool.image(row).size == (20, 14)
        if task == "segmentation":
            mask = np.array(ds[row]["label"])
            assert np.array_equal(np.array(pool.label(row)), 255 * np.isin(mask, (1, 2, 3)))
        else:
            assert pool.label(row) == (ds[row]["box"] if task == "detection" else None)
    # features are of what the frozen model sees of an image, grey where it is to be coloured
    views = Encoder()(pixels([find_task(task).query(image) for image in ds["image"][:]], (8, 8)))
    torch.testing.assert_close(pool.vectors, views["vector"])
    for name, stored in (("tokens", pool.tokens(range(13))), ("grid", pool.grids(range(13)))):
        assert stored.dtype == torch.float32
        torch.testing.assert_close(stored, views[name], atol=1e-3, rtol=1e-3)
    assert (pool.dim, pool.encoder, pool.commit) == (12, Encoder().describe(), None)


def test_files_that_browsers_show_are_kept_and_others_become_png(make):
    image = picture(np.random.default_rng(0))
    moving = {"save_all": True, "append_images": [image.rotate(90)]}
    turned = PILImage.Exif()
    turned[0x0112] = 6
    contents = {
        "jpg": encoded(image, "JPEG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "webp": encoded(image, "WEBP"),
        "16 bit": encoded(PILImage.fromarray(np.arange(280, dtype=np.uint16).reshape(14, 20) * 200)),
        "palette": encoded(image.quantize(7)),
        "turned": encoded(image, "JPEG", exif=turned),
        "bmp": encoded(image, "BMP"),
        "gif": encoded(image, "GIF"),
        "tiff": encoded(image, "TIFF"),
        "moving": encoded(image, "WEBP", **moving),
        "moving png": encoded(image, "PNG", **moving),
    }
    ds = Dataset.from_dict({"image": list(contents.values()), "name": list(contents)})
    pool = make(ds, task="colourisation", id_column="name")
    kept = [id for row, id in enumerate(pool.ids) if pool.files(row)[0] == contents[id]]
    assert kept == ["jpg", "cmyk", "webp", "16 bit", "palette", "turned"]
    assert pool.image(pool.position("turned")).size == (14, 20)
    assert np.array_equal(np.array(pool.image(pool.position("bmp"))), np.array(image))
    names = []
    for entry in pool.manifest["shards"]:
        with tarfile.open(pool.folder / "data" / f"{entry['name']}.tar") as tar:
            names += tar.getnames()
    assert names[:2] == ["00000000.image.jpg", "00000000.json"] and names[4] == "00000002.image.webp"
    assert {name.split(".", 1)[1] for name in names[12:]} == {"image.png", "json"}
    assert {kind for entry in pool.manifest["shards"] for kind in entry["formats"]} == {"jpg", "png", "webp"}


def test_foreground_is_applied_once_and_for_all(make):
    ds = rows(4)
    for options, values in (
        ({"foreground": 2}, [2]),
        ({"foreground": [1, 3]}, [1, 3]),
        ({"task": Segmentation("any", void=None)}, [1, 2, 3, 255]),
    ):
        pool = make(ds, **options)
        for row in range(4):
            expected = 255 * np.isin(np.array(ds[row]["label"]), values)
            assert pool.label(row).mode == "L" and np.array_equal(np.array(pool.label(row)), expected)
            # the default task reads what is stored as it was meant
            assert np.array_equal(np.array(Segmentation().label(pool.label(row), pool.image(row)))[:, :, 0], expected)


def test_a_format_or_transform_of_the_data_set_does_not_matter(make):
    ds = rows(4)
    same(make(ds), make(ds.with_format("torch"), cache_dir=None or make(ds).cache_dir / "other"))
    shuffled = make(ds.select([2, 0]), id_column="name")
    assert shuffled.ids == [ds[2]["name"], ds[0]["name"]]


@pytest.mark.parametrize(
    "column, value, text",
    [
        ("image", lambda good: good | {"bytes": good["bytes"][: len(good["bytes"]) // 2]}, "[Tt]runcated"),
        ("image", lambda good: {"bytes": b"no image", "path": None}, "image"),
        ("image", lambda good: {"bytes": None, "path": "/absent/image.jpg"}, "/absent/image.jpg"),
        ("image", lambda good: None, "image"),
        ("label", lambda good: {"bytes": encoded(PILImage.new("L", (14, 20))), "path": None}, "20 x 14|14 x 20"),
        ("label", lambda good: None, "no mask"),
        ("box", lambda good: [5, 5, 30, 9], "width and height"),
        ("box", lambda good: [9, 5, 3, 9], "x0 < x1"),
    ],
)
def test_a_bad_row_is_named_or_skipped(make, column, value, text):
    good = rows(7).cast_column("image", Image(decode=False)).cast_column("label", Image(decode=False)).to_dict()
    good[column][3] = value(good[column][3])
    ds = Dataset.from_dict(good).cast_column("image", Image()).cast_column("label", Image())
    options = {"task": "detection", "label_column": "box"} if column == "box" else {"label_column": "label"}
    options["id_column"] = "name"
    with pytest.raises(ValueError, match=rf"row 3, id '0/image 3.jpg': .*({text}).*on_bad_row='skip'"):
        make(ds, **options)
    with pytest.warns(UserWarning, match=rf"1 of 7 rows were skipped: '0/image 3.jpg': .*({text})"):
        pool = make(ds, on_bad_row="skip", **options)
    assert pool.ids == [name for i, name in enumerate(ds["name"]) if i != 3]
    assert pool.manifest["shards"][0]["skipped"][0][0] == "0/image 3.jpg"


def test_labels_that_mark_nothing_are_counted(make):
    ds = rows(3)
    with pytest.warns(UserWarning, match="1 of 3 labels mark nothing"):
        pool = make(
            ds.remove_columns("box").add_column("box", [[0, 0, 5, 5], None, [1, 1, 3, 3]]),
            task="detection",
            label_column="box",
        )
    assert [pool.label(row) for row in range(3)] == [[0, 0, 5, 5], None, [1, 1, 3, 3]]
    with pytest.warns(UserWarning, match="3 of 3 labels mark nothing"):
        pool = make(ds, foreground=9)
    assert pool.manifest["shards"][0]["blank"] == [0, 1, 2] and pool.label(0).getextrema() == (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(ds)


def spoilt(change):
    encoder = Encoder()
    change(encoder)
    return {"encoder": encoder}


def test_wrong_arguments_are_named(make):
    ds = rows(3)
    wide = lambda pixels: {"vector": torch.ones(3, 4), "tokens": torch.ones(3, 5, 4)}  # noqa: E731
    for data, options, error, text in (
        (ds, {"label_column": "mask"}, ValueError, r"no column 'mask'; it has \['image', 'label'"),
        (ds, {"image_column": "x"}, ValueError, "no column 'x'"),
        (ds, {"id_column": "x"}, ValueError, "no column 'x'"),
        (ds, {"task": "depth"}, ValueError, "task='depth'"),
        (ds, {"on_bad_row": "x"}, ValueError, "on_bad_row='x'"),
        (ds, {"rows_per_shard": 0}, ValueError, "rows_per_shard=0"),
        (ds, {"batch_size": 0}, ValueError, "batch_size=0"),
        (ds, {"task": "detection", "foreground": 1}, ValueError, "foreground="),
        (ds, {"id_column": "box"}, TypeError, r"\['list'\]"),
        (ds, {"encoder": 3}, TypeError, "encoder=int"),
        (ds, spoilt(lambda encoder: encoder.weight.fill_(torch.nan)), ValueError, "row 0, id '0'.*NaN"),
        (ds, spoilt(lambda encoder: setattr(encoder, "forward", wide)), ValueError, "must have norm 1"),
        (ds.select([]), {}, ValueError, "no rows"),
        (
            concatenate_datasets([ds, ds.select([1])]),
            {"id_column": "number"},
            ValueError,
            "rows 1 and 3 are both named '1'",
        ),
        (DatasetDict(train=ds), {}, TypeError, "DatasetDict.*one split"),
        (Dataset.from_dict({"image": [[1, 2]]}), {"task": "colourisation"}, ValueError, "row 0, id '0'.*cast_column"),
        (
            Dataset.from_dict({"image": [b"x"]}),
            {"task": "colourisation", "on_bad_row": "skip"},
            ValueError,
            "none of the 1",
        ),
    ):
        with pytest.raises(error, match=text):
            make(data, **options)


def test_processes_that_read_ahead_change_nothing(make, tmp_path):
    ds = rows(9)
    assert files_of(make(ds)) == files_of(make(ds, num_workers=2, cache_dir=tmp_path / "other"))


# ---- the search


def brute_force(vectors, queries, k, exclude=None):
    similarity = queries.double() @ vectors.double().T
    if exclude is not None:
        similarity[torch.arange(len(queries)), exclude] = -torch.inf
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarity.gather(1, order).float(), order


def test_search_is_brute_force(make):
    pool = make(rows(23))
    queries = torch.nn.functional.normalize(torch.randn(300, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    own = torch.arange(300) % 23
    for k in (1, 7, 22, 23, 99):
        for exclude in (None, own):
            found, wanted = pool.search(queries, k, exclude), brute_force(pool.vectors, queries, k, exclude)
            count = min(k, 23 - (exclude is not None))
            torch.testing.assert_close(found[0], wanted[0][:, :count])
            assert torch.equal(found[1], wanted[1][:, :count]) and found[1].shape == (300, count)
    assert torch.equal(pool.search(pool.vectors, 1)[1][:, 0], torch.arange(23))
    assert torch.equal(pool.search(pool.vectors, 23, -torch.ones(23))[1], pool.search(pool.vectors, 23)[1][:, :22])
    assert pool.search(queries[:0], 3)[1].shape == (0, 3)


def test_equal_similarities_come_in_the_order_of_rows_wherever_blocks_end():
    generator = torch.Generator().manual_seed(0)
    # few values, which floats hold exactly: most similarities occur many times, zeros of both signs among them
    vectors = torch.randint(-1, 2, (40_000, 3), generator=generator).float()
    queries = torch.randint(-2, 3, (5, 3), generator=generator).float()
    wanted = brute_force(vectors, queries, 500)
    for blocks in (
        [vectors],
        vectors.split(7000),
        vectors.split(20_000),
        [(part, None) for part in vectors.split(999)],
    ):
        found = exact_search(blocks, queries, 500)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    kept = torch.rand(40_000, generator=generator) < 0.7
    blocks = [
        (part, some.nonzero()[:, 0]) for part, some in zip(vectors.split(17_000), kept.split(17_000), strict=True)
    ]
    assert torch.equal(exact_search(blocks, queries, 500)[1], brute_force(vectors[kept], queries, 500)[1])


def test_a_pool_of_one_row_finds_itself_or_nothing(make):
    pool = make(rows(1))
    assert pool.search(pool.vectors, 5)[1].tolist() == [[0]]
    assert pool.search(pool.vectors, 5, torch.tensor([0]))[1].shape == (1, 0)


def test_wrong_queries_and_rows_are_refused(make):
    pool = make(rows(6))
    for call, error, text in (
        (lambda: pool.search(torch.ones(12), 1), ValueError, r"\(12,\); pass \(B, 12\)"),
        (lambda: pool.search(torch.ones(1, 5), 1), ValueError, r"\(1, 5\)"),
        (lambda: pool.search(torch.ones(1, 12), 0), ValueError, "k=0"),
        (lambda: pool.search(torch.full((1, 12), torch.nan), 1), ValueError, "NaN"),
        (lambda: pool.search(torch.ones(2, 12), 1, torch.tensor([1])), ValueError, "one row for each"),
        (lambda: pool.grids([0]), ValueError, "keep_grids=True"),
        (lambda: pool.tokens([6]), IndexError, "of a pool of 6"),
        (lambda: pool.tokens([-1]), IndexError, "of a pool of 6"),
        (lambda: pool.tokens(torch.tensor([[0, 1], [2, 9]])), IndexError, "of a pool of 6"),
        (lambda: pool.image(6), IndexError, None),
        (lambda: pool.position("nobody"), KeyError, "'nobody' is not in this pool of 6 rows"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_features_are_gathered_in_any_order_and_shape(make):
    pool = make(rows(12), keep_grids=True)
    every = pool.tokens(range(12))
    index = torch.tensor([[11, 0, 5], [5, 4, 9]])
    assert torch.equal(pool.tokens(index), every[index]) and pool.tokens([]).shape == (0, 5, 12)
    assert pool.grids(index).shape == (2, 3, 4, 4, 12) and pool.has_grids


def test_nothing_is_copied_into_memory(make):
    pool = make(rows(12))
    pool.search(torch.ones(1, 12), 3)
    assert pool._vectors is None
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert pool.manifest["shards"][0]["name"] + ".safetensors" in maps.read_text()


# ---- other processes


def test_what_is_pickled_is_small(make):
    pool = make(rows(30), rows_per_shard=30)
    content = pickle.dumps(pool)
    assert len(content) < 2000
    same(pickle.loads(content), pool)


def run(cache: Path, out: Path, seconds: float = 0, processes: int = 1) -> Script:
    return Script("pool_run.py", cache, out, seconds, processes=processes, env={"ACCELERATE_USE_CPU": "true"})


def test_two_processes_make_what_one_makes(make, tmp_path):
    both = run(tmp_path / "two", tmp_path / "two.json", processes=2)
    one = make(rows(37), cache_dir=tmp_path / "one", batch_size=2)
    both.finish()
    said = [json.loads((tmp_path / f"two.json.{rank}").read_text()) for rank in range(2)]
    assert said[0]["manifest"] == said[1]["manifest"] == one.manifest
    assert [process["encoded"] for process in said] == [20, 17]  # 8 shards of 5 rows, the last of 2
    two = PoolReader.from_pretrained(said[0]["folder"])
    assert (two.folder / "pool.json").read_bytes() == (one.folder / "pool.json").read_bytes()
    assert files_of(two) == files_of(one)
    same(two, one)


def test_a_run_that_was_cut_off_goes_on_from_its_finished_shards(make):
    class Breaking(Encoder):
        def forward(self, pixels):
            if self.rows >= 12:
                raise RuntimeError("power cut")
            return super().forward(pixels)

    whole = make(rows(37))
    with pytest.raises(RuntimeError, match="power cut"):
        make(rows(37), encoder=Breaking(), cache_dir=whole.cache_dir / "cut")
    [folder] = (whole.cache_dir / "cut").iterdir()
    (folder / "data" / ".pool-00000-abc.tar.1").touch()  # of a process that was killed, long ago
    os.utime(folder / "data" / ".pool-00000-abc.tar.1", (0, 0))
    with pytest.raises(FileNotFoundError, match="no pool.json"):
        PoolReader.from_pretrained(folder)
    encoder = Encoder()
    pool = make(rows(37), encoder=encoder, cache_dir=whole.cache_dir / "cut")
    assert pool.folder == folder and encoder.rows == 37 - 10  # two shards of 5 were whole
    same(pool, whole)
    assert not list((folder / "data").glob(".*"))


def test_the_same_call_encodes_nothing_and_any_other_call_everything(make):
    ds, encoder = rows(7), Encoder()
    pool = make(ds, encoder=encoder)
    same(make(ds, encoder=encoder, batch_size=1), pool)
    assert encoder.rows == 7
    folders, fingerprints = {pool.folder}, {pool.fingerprint}
    for other, options, content in (
        (ds, {"encoder": Encoder(1)}, True),
        (ds.select(range(6)), {}, True),
        (ds.select([1, 0, 2, 3, 4, 5, 6]), {}, True),
        (rows(7, seed=1), {}, True),
        (ds, {"foreground": 1}, True),
        (ds, {"id_column": "name"}, True),
        (ds, {"task": "detection", "label_column": "box"}, True),
        (ds, {"task": "colourisation"}, True),
        (ds, {"keep_grids": True}, False),
        (ds, {"rows_per_shard": 4}, False),
    ):
        encoder = options.setdefault("encoder", Encoder())
        found = make(other, **options)
        assert encoder.rows == len(other) and found.folder not in folders
        assert (found.fingerprint not in fingerprints) == content
        folders.add(found.folder)
        fingerprints.add(found.fingerprint)


@pytest.mark.parametrize("kind", ["image", "file", "text", "large text", "label"])
def test_a_file_that_was_edited_behind_its_path_is_encoded_again(make, tmp_path, kind):
    ds = rows(3)
    column = "label" if kind == "label" else "image"
    plain = ds.cast_column(column, Image(decode=False))[:][column]
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path, value in zip(paths, plain):
        Path(path).write_bytes(value["bytes"])
    named = {
        "text": (paths, Value("string")),
        "large text": (paths, Value("large_string")),
        "file": ([{"bytes": None, "path": path} for path in paths], None),
    }
    values, feature = named.get(kind, (paths, Image()))
    ds = ds.remove_columns(column).add_column(column, values)
    ds = ds if feature is None else ds.cast_column(column, feature)
    pool = make(ds)
    assert make(ds).folder == pool.folder
    Path(paths[1]).write_bytes(plain[0]["bytes"])
    os.utime(paths[1], (1, 1))  # the size may be what it was
    edited = make(ds)
    assert edited.folder != pool.folder and edited.files(1) != pool.files(1)


# ---- changes


def test_adding_and_removing_is_as_good_as_starting_over(make, tmp_path):
    first, second, third = rows(8), rows(7, seed=1), rows(3, seed=2)
    whole = make(concatenate_datasets([first, second, third]))
    pool = make(first).add(second, progress=False).add(third, progress=False)
    same(pool, whole)
    assert pool.ids == [str(i) for i in range(18)]
    gone = [0, 5, 6, 7, 9, 17]
    kept = [i for i in range(18) if i not in gone]
    before = files_of(pool)
    assert pool.remove(gone[:2]).remove(map(str, gone[2:])) is pool
    assert files_of(pool) == before
    assert pool.ids == [str(i) for i in kept] and torch.equal(pool.vectors, whole.vectors[kept])
    assert torch.equal(pool.tokens(range(12)), whole.tokens(kept))
    for row, i in enumerate(kept):
        assert pool.files(row) == whole.files(i) and pool.position(i) == row
    wanted = brute_force(whole.vectors[kept], whole.vectors, 12)
    assert torch.equal(pool.search(whole.vectors, 12)[1], wanted[1])
    names = concatenate_datasets([first, second, third]).select(kept).add_column("id", [str(i) for i in kept])
    same(pool, make(names, id_column="id"))
    # numbers are not given twice
    assert pool.add(third, progress=False).ids[-3:] == ["18", "19", "20"]
    same(PoolReader.from_pretrained(pool.folder), pool)

    saved = pool.save_pretrained(tmp_path / "saved")
    again = ExamplePool.from_pretrained(saved)
    same(again, pool)
    assert all(not entry["dropped"] for entry in again.manifest["shards"])
    assert again.manifest["rows"] == 15 and sum(entry["rows"] for entry in again.manifest["shards"]) == 15
    assert len(files_of(again)) == 2 * len(again.manifest["shards"]) == 10  # the shard of 5, 6 and 7 has nothing left
    again.verify()
    # in place
    pool.save_pretrained(pool.folder)
    same(pool, again)
    assert files_of(pool) == files_of(again)
    # and the first call gives what it gave
    same(make(first), PoolReader.from_pretrained(make(first, cache_dir=tmp_path / "fresh").folder))


def test_a_save_that_is_cut_off_leaves_the_old_pool(make, tmp_path, monkeypatch):
    old = make(rows(4))
    old.save_pretrained(tmp_path / "saved")
    new = make(rows(13, seed=1))
    monkeypatch.setattr("hf_effdl.vicl.pool.pool.write_manifest", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new.save_pretrained(tmp_path / "saved")
    same(PoolReader.from_pretrained(tmp_path / "saved"), old)


def test_blank_and_removed_rows_are_counted_after_a_copy(make, tmp_path):
    ds = rows(5)
    blank = {"bytes": encoded(PILImage.new("L", (20, 14))), "path": None}
    table = ds.cast_column("label", Image(decode=False)).to_dict()
    table["label"][1] = table["label"][3] = blank
    ds = Dataset.from_dict(table).cast_column("image", Image()).cast_column("label", Image())
    with pytest.warns(UserWarning, match="2 of 5"):
        pool = make(ds)
    pool.remove(["0", "1"]).save_pretrained(tmp_path / "saved")
    assert PoolReader(tmp_path / "saved").manifest["shards"][0]["blank"] == [1]
    assert "| of them without an object | 1 |" in (tmp_path / "saved" / "README.md").read_text()


def test_changes_that_cannot_be_are_refused(make, tmp_path):
    ds = rows(6)
    pool = make(ds, id_column="name")
    for call, error, text in (
        (lambda: pool.remove(["nobody", ds[0]["name"]]), KeyError, "nobody"),
        (lambda: pool.remove(ds["name"]), ValueError, "all 6 rows"),
        (lambda: pool.add(rows(3, seed=1), encoder=Encoder(1)), ValueError, "fingerprint '0000000000000001'"),
        (lambda: pool.add(ds.select([2])), ValueError, "1 ids are in the pool already, such as '0/image 2.jpg'"),
        (lambda: pool.add(rows(3, seed=1).remove_columns("name")), ValueError, "no column 'name'"),
        (lambda: ExamplePool.from_pretrained(pool.folder).add(rows(3, seed=1)), ValueError, "encoder='tests/enc"),
    ):
        with pytest.raises(error, match=text):
            call()
        assert PoolReader.from_pretrained(pool.folder).ids == pool.ids == ds["name"][:]
    pool.remove(ds[2]["name"]).add(ds.select([2]), progress=False)
    assert pool.ids[-1] == ds[2]["name"] and len(pool) == 6
    reopened = ExamplePool.from_pretrained(pool.folder).add(rows(3, seed=1), encoder=Encoder(), progress=False)
    assert len(reopened) == 9


# ---- damage


def test_damaged_files_are_named(make, tmp_path):
    pool = make(rows(12))
    shards = pool.manifest["shards"]
    name = shards[1]["name"]
    content = (pool.folder / "data" / f"{name}.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    vector = header + json.loads(content[8:header])["vectors"]["data_offsets"][0]

    def damaged(kind, change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(pool.folder, tmp_path / "copy")
        file = tmp_path / "copy" / ("pool.json" if kind == "json" else f"data/{name}.{kind}")
        content = change(file.read_bytes())
        file.unlink()  # not in place: faiss maps the file, and reading what was cut off kills the process
        if content is not None:
            file.write_bytes(content)
        return tmp_path / "copy"

    def flip(place):
        return lambda content: content[:place] + bytes([content[place] ^ 1]) + content[place:][1:]

    def edit(**changes):
        return lambda content: json.dumps(json.loads(content) | changes).encode()

    for kind, change, error, text in (
        ("tar", lambda content: content[:-512], ValueError, rf"{name}.tar has .* cut off"),
        ("safetensors", lambda content: content[:-9], ValueError, rf"{name}.safetensors has"),
        ("safetensors", lambda content: None, FileNotFoundError, rf"{name}.safetensors is missing"),
        ("safetensors", flip(len(content) - 7), ValueError, rf"{name}.safetensors is damaged"),
        ("safetensors", flip(vector), ValueError, rf"{name}.safetensors is damaged: its SHA-256"),
        ("safetensors", flip(0), ValueError, rf"{name}.safetensors is damaged"),
        ("json", edit(format=2), ValueError, "format is 2.*newer"),
        ("json", edit(fingerprint="x"), ValueError, "not belong together"),
        ("json", edit(shards=[shards[1], shards[0], shards[2]]), ValueError, "not belong together"),
        ("json", edit(shards=[]), ValueError, "no shards"),
        ("json", lambda content: b"{", ValueError, "pool.json cannot be read"),
        ("json", lambda content: b"[" * 10**5, ValueError, "cannot be read as a pool's manifest"),
        ("json", lambda content: None, FileNotFoundError, "holds no pool"),
    ):
        with pytest.raises(error, match=text):
            PoolReader.from_pretrained(damaged(kind, change))
    # a tar is as large as it was: its rows tell
    reader = PoolReader(damaged("tar", flip(pool._shards[1].spans[2, 0, 0].item() + 300)))
    assert reader.image(6).size == (20, 14)
    with pytest.raises(ValueError, match=rf"{name}.tar is damaged: row 7, id '7'"):
        reader.image(7)
    with pytest.raises(ValueError, match=rf"{name}.tar is damaged: its SHA-256"):
        reader.verify()
    pool.verify()


def test_a_shard_that_was_lost_is_written_again(make):
    pool = make(rows(12))
    before = files_of(pool)
    lost = pool.folder / "data" / f"{pool.manifest['shards'][1]['name']}.tar"
    lost.unlink()
    lost.write_bytes(b"cut off")
    encoder = Encoder()
    assert files_of(make(rows(12), encoder=encoder)) == before and encoder.rows == 5


# ---- the index


def clusters(count: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(60, dim, generator=torch.Generator().manual_seed(9))
    points = centres[torch.randint(60, (count,), generator=generator)] + 0.4 * torch.randn(
        count, dim, generator=generator
    )
    return torch.nn.functional.normalize(points, dim=1)


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss", reason="faiss is an extra: pip install faiss-cpu")


def test_the_index_finds_what_it_promises(faiss, tmp_path):
    vectors, queries = clusters(6000), clusters(100, seed=1)
    kept = (torch.arange(2000) % 3 > 0).nonzero()[:, 0]
    blocks = [(vectors[:3000], None), (vectors[3000:5000], kept), (vectors[5000:], None)]
    everything = torch.cat([vectors[:3000], vectors[3000:5000][kept], vectors[5000:]])
    index = pool_index.build_index(blocks, tmp_path / "a.faiss", "abc", progress=False)
    record = index.record
    assert (record["rows"], record["recall"] >= 0.95, 1 <= record["probes"] < record["lists"]) == (
        len(everything),
        True,
        True,
    )
    assert record["lists"] == len(everything) // 39  # fewer rows a list are too few for faiss to fit lists to
    similarity, found = index.search(queries, 50)
    assert pool_index.share_found(found, exact_search(blocks, queries, 50)[1]) >= 0.93
    torch.testing.assert_close(similarity, (queries[:, None] * everything[found]).sum(2))
    assert (similarity.diff(dim=1) <= 0).all()
    own = torch.arange(0, 5000, 50)
    found = index.search(everything[own], 50, own)[1]
    assert not (found == own[:, None]).any() and found.shape == (100, 50)
    opened = pool_index.open_index(tmp_path / "a.faiss", "abc", len(everything), 16)
    assert torch.equal(opened.search(queries, 50)[1], index.search(queries, 50)[1])
    assert opened.record == record
    for other in (("x", len(everything), 16), ("abc", 17, 16), ("abc", len(everything), 8)):
        assert pool_index.open_index(tmp_path / "a.faiss", *other) is None
    assert pool_index.open_index(tmp_path / "b.faiss", "abc", len(everything), 16) is None
    content = (tmp_path / "a.faiss").read_bytes()
    for damaged in (content[:1000], content[:-1] + bytes([content[-1] ^ 1])):
        (tmp_path / "a.faiss").unlink()  # which is mapped
        (tmp_path / "a.faiss").write_bytes(damaged)
        assert pool_index.open_index(tmp_path / "a.faiss", "abc", len(everything), 16) is None
    with pytest.raises(ValueError, match="recall=2"):
        pool_index.build_index(blocks, tmp_path / "a.faiss", "abc", recall=2)
    all_lists = pool_index.build_index(blocks, tmp_path / "c.faiss", "abc", recall=1.0, progress=False)
    assert all_lists.record["recall"] == 1.0


def test_a_large_pool_is_searched_by_its_own_index(make, faiss, monkeypatch):
    pool = make(rows(200), rows_per_shard=64)
    exact = pool.search(pool.vectors, 10, torch.arange(200))
    monkeypatch.setattr(pool_index, "LEAST_ROWS", 100)
    similarity, found = pool.search(pool.vectors, 10, torch.arange(200))
    assert pool._index.record["fingerprint"] == pool.fingerprint
    assert pool_index.share_found(found, exact[1]) > 0.9 and found.min() >= 0
    assert torch.equal(pool.search(pool.vectors, 10, torch.arange(200), exact=True)[1], exact[1])
    # more than the lists hold
    assert torch.equal(
        pool.search(pool.vectors, 199, torch.arange(200))[1].sort().values[:, 0], (torch.arange(200) == 0).long()
    )
    built = []
    build = pool_index.build_index
    monkeypatch.setattr(pool_index, "build_index", lambda *args, **options: built.append(1) or build(*args, **options))
    again = ExamplePool.from_pretrained(pool.folder)
    again.cache_dir = pool.cache_dir
    assert torch.equal(again.search(pool.vectors, 10, torch.arange(200))[1], found) and not built
    assert (
        torch.equal(pickle.loads(pickle.dumps(pool)).search(pool.vectors, 10, torch.arange(200))[1], found)
        and not built
    )
    pool.remove(["3"])
    assert torch.equal(pool.search(pool.vectors, 1)[1][:, 0], torch.arange(199)) and built == [1]
    assert (
        PoolReader.search(pool, pool.vectors, 10)[1].shape == (199, 10)
        and pool.build_index(progress=False)["rows"] == 199
    )


def test_without_faiss_a_large_pool_is_searched_exactly_and_says_so_once(make, monkeypatch):
    pool = make(rows(20))
    wanted = pool.search(pool.vectors, 5)[1]
    monkeypatch.setattr(pool_index, "LEAST_ROWS", 10)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.warns(UserWarning, match="faiss-cpu>=1.9") as said:
        for _ in range(3):
            assert torch.equal(pool.search(pool.vectors, 5)[1], wanted)
    assert len(said) == 1
    with pytest.raises(ImportError, match="faiss-cpu>=1.9"):
        pool.build_index()
