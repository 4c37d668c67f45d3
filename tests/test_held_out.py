"""Held-out images: near duplicates as brute force finds them, splits that do not overlap, files that are whole."""

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_effdl.vicl import held_out
from hf_effdl.vicl.held_out import Split, near_duplicates, read_splits, split_pool, write_splits


FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


# ---- near duplicates


def brute_force(vectors, others, threshold, but=()):
    return [
        i
        for i, one in enumerate(vectors.double())
        if i not in but and any(torch.cosine_similarity(one, other, dim=0) >= threshold for other in others.double())
    ]


@pytest.mark.parametrize("rows,others", [(2**13, 2**10), (7, 3), (1, 1), (40, 5)])
def test_near_duplicates_are_those_of_brute_force_wherever_blocks_begin(monkeypatch, rows, others):
    monkeypatch.setattr(held_out, "ROWS", rows)
    monkeypatch.setattr(held_out, "OTHERS", others)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 3, generator=generator) * torch.rand(40, 1, generator=generator).add(0.1)
    asked = [31, 2, 17, 18, 39]
    for threshold in (0.5, 0.9, 0.98):
        expected = brute_force(vectors, vectors[asked], threshold, but=asked)
        assert expected
        for of in (asked, torch.tensor(asked), torch.tensor(asked, dtype=torch.int32), np.array(asked)):
            found = near_duplicates(vectors, of, threshold)
            assert found.dtype == torch.int64 and found.tolist() == expected
        assert near_duplicates(vectors, vectors[asked], threshold).tolist() == sorted({*expected, *asked})
    elsewhere = torch.randn(6, 3, generator=generator)
    assert near_duplicates(vectors, elsewhere, 0.9).tolist() == brute_force(vectors, elsewhere, 0.9)


def test_a_copy_is_found_at_any_threshold_and_other_directions_are_not():
    vectors = torch.randn(500, 1280, generator=torch.Generator().manual_seed(1))
    vectors = torch.cat([vectors, 3 * vectors, -vectors, torch.zeros(1, 1280)])
    assert near_duplicates(vectors, range(500), 1.0).tolist() == list(range(500, 1000))
    assert near_duplicates(vectors.half(), [7], 1.0).tolist() == [507]
    assert near_duplicates(vectors, [1500], 0.01).tolist() == []  # nothing points where zero does
    assert near_duplicates(vectors, []).tolist() == near_duplicates(vectors, torch.empty(0, 1280)).tolist() == []


def test_no_more_than_a_block_of_similarities_is_in_memory(monkeypatch):
    sizes, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: (sizes.append((len(a), b.shape[1])), product(a, b))[1]
    )
    near_duplicates(torch.ones(20_000, 2), range(3000))
    assert sum(n * m for n, m in sizes) == 20_000 * 3000
    assert max(n * m for n, m in sizes) == held_out.ROWS * held_out.OTHERS < 20_000 * 3000 / 5


def test_what_near_duplicates_cannot_be_looked_for_in_is_refused():
    vectors = torch.eye(3)
    for wrong, message in (
        ((vectors[0], [0]), r"vectors is torch.float32 of shape \(3,\): pass \(n, d\)"),
        ((vectors.long(), [0]), "vectors is torch.int64"),
        ((vectors, [3]), "of holds rows 3 to 3: there are 3 vectors"),
        ((vectors, [-1, 2]), "of holds rows -1 to 2"),
        ((vectors, torch.eye(2)), r"of is torch.float32 of shape \(2, 2\): pass rows.*vectors \(m, 3\)"),
        ((vectors, torch.ones(3)), "of is torch.float32"),
        ((vectors, [True, False, True]), "of is torch.bool"),
        ((vectors, torch.eye(3).long()), "of is torch.int64"),
        ((vectors, [0], 0.0), "threshold=0.0: it is a cosine"),
        ((vectors, [0], 1.5), "threshold=1.5"),
        ((vectors, [0], float("nan")), "threshold=nan"),
        ((vectors / 0, [0]), "vectors holds NaN"),
        ((vectors, vectors / 0), "of holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            near_duplicates(*wrong)


# ---- splits


def test_images_are_drawn_by_seed_and_every_one_has_one_place():
    ids = [f"photo {number}" for number in range(50)]
    one, again, other = (split_pool(ids, 12, seed=seed) for seed in (0, 0, 1))
    assert one == again and set(one.queries) != set(other.queries)
    for split in (one, other):
        assert len(split.queries) == 12 and len(split.pool) == 38 and split.dropped == ()
        assert {*split.queries, *split.pool} == set(ids) and list(split.pool) == sorted(split.pool)
    drawn = sum(ids.index(id) for seed in range(40) for id in split_pool(ids, 12, seed=seed).queries) / 480
    assert drawn == pytest.approx(24.5, abs=3 * 50 / 12**0.5 / 480**0.5)
    assert len(split_pool(ids + [f"more {number}" for number in range(60)]).queries) == 100
    assert len(split_pool(ids, np.int64(3)).queries) == 3


def test_near_duplicates_of_queries_are_dropped_from_the_pool():
    ids, vectors = list("edcba"), torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0, 2], [1, 1]])
    split = split_pool(ids, ["d", "e"], vectors=vectors)
    assert split == Split(("d", "e"), ("a",), ("b", "c"))
    assert split_pool(ids, ["d", "e"], vectors=vectors, threshold=0.999).dropped == ("b",)
    assert split_pool(ids, ["d", "e"]).pool == ("a", "b", "c")
    # a query is a query, also where another one is its near duplicate
    assert split_pool(ids, ["d", "b"], vectors=vectors) == Split(("d", "b"), ("a", "c", "e"))


def test_splits_that_cannot_be_are_refused():
    for call, error, message in (
        (lambda: split_pool(["a", "b", "a"], 1), ValueError, "1 of the ids occur twice"),
        (lambda: split_pool(["a", "b"], 0), ValueError, "queries=0 of 2 images"),
        (lambda: split_pool(["a", "b"], 2), ValueError, "queries=2 of 2 images"),
        (lambda: split_pool(["a", "b"], ["c"]), ValueError, r"queries holds 'c', which is not in ids \(1 such\)"),
        (lambda: split_pool(["a", "b"], ["a", "a"]), ValueError, "id 'a' is twice in queries"),
        (lambda: split_pool(["a", "b"], []), ValueError, "queries is empty"),
        (lambda: split_pool(["a", "b"], ["b", "a"]), ValueError, "2 queries and 0 near duplicates are all of the 2"),
        (lambda: split_pool(["a", "b"], ["a"], 0, torch.ones(2, 1)), ValueError, "1 queries and 1 near duplicates"),
        (lambda: split_pool(["a", "b"], ["a"], 0, torch.ones(3, 1)), ValueError, "3 vectors for 2 ids"),
        (lambda: Split(["a", "b"], ["c", "b"]), ValueError, "id 'b' is in queries and in pool: an image may have one"),
        (lambda: Split(["a"], ["c"], ["c"]), ValueError, "id 'c' is in pool and in dropped"),
        (lambda: Split(["a"], []), ValueError, "pool is empty"),
        (lambda: Split(["a"], [3]), TypeError, "pool holds 3, a int: ids are texts"),
    ):
        with pytest.raises(error, match=message):
            call()


# ---- files


FOLDS = {
    "one": Split(["f", "ä"], ["c", "b"], ["e"]),
    "two": Split(["c"], ["f", "ä", "e"]),
    "three": Split(["x y"], ["c"]),
}


def test_what_is_written_is_read_and_stands_there_once(tmp_path):
    file = tmp_path / "new" / "splits.json"
    write_splits(file, FOLDS)
    assert read_splits(file) == FOLDS and list(read_splits(str(file))) == list(FOLDS)
    assert read_splits(file)["one"].queries == ("f", "ä")  # their order is kept
    text = file.read_text(encoding="utf-8")
    assert all(text.count(json.dumps(id, ensure_ascii=False)) == 1 for id in ("f", "ä", "c", "b", "e", "x y"))
    content = json.loads(text)
    digest = hashlib.sha256(json.dumps({k: v for k, v in content.items() if k != "sha256"}, sort_keys=True).encode())
    assert content["sha256"] == digest.hexdigest() and content["format"] == 1
    write_splits(file, {"other": FOLDS["two"]})
    assert read_splits(file) == {"other": FOLDS["two"]} and [path.name for path in file.parent.iterdir()] == [
        file.name
    ]
    with pytest.raises(ValueError, match="splits is empty"):
        write_splits(file, {})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "splits.json"
    write_splits(file, FOLDS)

    def no_room(*given):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_room)
        with pytest.raises(OSError, match="no space left"):
            write_splits(file, {"one": FOLDS["one"]})
    assert read_splits(file) == FOLDS


def test_files_that_were_changed_or_are_something_else_are_refused(tmp_path):
    file = tmp_path / "splits.json"
    write_splits(file, FOLDS)
    text = file.read_text()
    for change in (("x y", "x z"), ('"queries":[', '"queries":[0,'), ('"two"', '"2"')):
        assert change[0] in text
        file.write_text(text.replace(*change, 1))
        with pytest.raises(ValueError, match="splits.json was changed after it was written: its SHA-256"):
            read_splits(file)
    file.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2 and this version of hf_effdl reads 1: upgrade"):
        read_splits(file)
    for wrong in ("", text[:-30], "[]", "{}", "3"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="is not a file of splits.*write_splits"):
            read_splits(file)
    with pytest.raises(FileNotFoundError):
        read_splits(tmp_path / "none.json")


# ---- the benchmark's own


# looked at as pictures: one photo twice, as another file or crop, or the next of a series
COPIES = {
    ("Abyssinian", pair)
    for pair in ((122, 172), (11, 177), (5, 87), (24, 56), (151, 99), (66, 82), (24, 80), (56, 80), (40, 63))
} | {("Bengal", (83, 85))}
PAIRS = [tuple(f"{breed}_{number}.jpg" for number in pair) for breed, pair in sorted(COPIES)]


@pytest.fixture(scope="module")
def make_splits():
    before, threads = list(sys.path), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("make_splits")
    sys.path[:] = before
    torch.set_num_threads(threads)


def test_the_script_writes_the_files_as_they_are(make_splits, tmp_path, monkeypatch, capsys):
    """With vectors that are alike for the copies and for no others."""
    stored = {name: read_splits(FOLDER / "splits" / f"{name}.json") for name in make_splits.FILES}

    def photos_of(task):
        name = next(name for name, of in make_splits.FILES.items() if of == task)
        split = {id for split in stored[name].values() for id in (*split.queries, *split.pool, *split.dropped)}
        names = sorted(split)
        vectors = torch.eye(len(names))
        for one, other in PAIRS:
            if {one, other} <= split:
                vectors[names.index(other)] = vectors[names.index(one)]
        return names, vectors

    monkeypatch.setattr(make_splits, "photos_of", photos_of)
    make_splits.main(["--out", str(tmp_path)])
    assert "18 splits of 600 photos, 0 to 5 near duplicates taken out of a pool, 46 in all" in capsys.readouterr().err
    for name in stored:
        file = f"{name}.json"
        assert (tmp_path / file).read_text() == (FOLDER / "splits" / file).read_text()
    make_splits.main(["--pairs", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 2
