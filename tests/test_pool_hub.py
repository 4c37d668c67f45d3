"""A pool on a Hub over HTTP: pushed, read by `load_dataset`, loaded in fresh processes, replaced."""

import json
import re

import pytest
from hub import LoopbackHub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


PUSH = """
    import json
    import os
    from pathlib import Path

    import numpy as np
    from datasets import Dataset, Image, load_dataset
    from huggingface_hub import DatasetCard, HfApi
    from PIL import Image as PILImage
    from pool_run import Encoder, encoded, picture, rows
    from hf_effdl.vicl.pool.pool import ExamplePool
    from hf_effdl.vicl.remote_code.pool_reader import PoolReader

    api, out = HfApi(), {"errors": []}
    options = {"encoder": Encoder(), "foreground": "any", "cache_dir": "cache", "rows_per_shard": 4, "progress": False}

    def refused(call):
        try:
            call()
        except Exception as error:
            out["errors"].append(f"{type(error).__name__}: {error}")
        else:
            out["errors"].append("none")

    def same(pool, other):
        assert (pool.ids, pool.fingerprint, pool.encoder) == (other.ids, other.fingerprint, other.encoder)
        assert pool.vectors.equal(other.vectors) and pool.tokens([3, 0]).equal(other.tokens([3, 0]))
        assert [pool.files(row) for row in range(len(pool))] == [other.files(row) for row in range(len(pool))]

    ds = rows(10)
    pool = ExamplePool.from_dataset(ds, id_column="name", keep_grids=True, **options)
    out["first"] = pool.push_to_hub("tester/pool", license="cc0-1.0", tags=["mine"])

    loaded = load_dataset("tester/pool", split="train")
    assert loaded.column_names == ["image.jpg", "label.png", "json", "__key__", "__url__"], loaded.column_names
    assert len(loaded) == 10
    for row, (mine, theirs) in enumerate(zip(ds, loaded)):
        assert np.array_equal(np.array(mine["image"]), np.array(theirs["image.jpg"]))
        assert np.array_equal(np.array(pool.label(row)), np.array(theirs["label.png"]))
        assert theirs["json"] == {"id": mine["name"]}
    streamed = list(load_dataset("tester/pool", split="train", streaming=True))
    assert [row["json"] for row in streamed] == loaded["json"][:]
    assert streamed[0]["image.jpg"].size == (20, 14)

    again = ExamplePool.from_pretrained("tester/pool")
    assert isinstance(again, ExamplePool) and again.has_grids and again.commit == api.dataset_info("tester/pool").sha
    same(again, pool)
    same(PoolReader.from_pretrained("tester/pool", revision=again.commit), pool)
    again.verify()
    refused(lambda: again.add(rows(3, seed=1), encoder=Encoder()))
    refused(lambda: again.remove([ds[0]["name"]]))

    # somebody writes on the card, and the pool moves on
    card = DatasetCard.load("tester/pool")
    card.data.language = "en"
    edited = {"path_or_fileobj": str(card).encode(), "path_in_repo": "README.md"}
    api.upload_file(**edited, repo_id="tester/pool", repo_type="dataset")
    again.save_pretrained("mine")
    pool = ExamplePool.from_pretrained("mine").add(rows(5, seed=1), encoder=Encoder(), progress=False)
    pool.remove([ds[i]["name"] for i in (1, 4, 5, 6, 7)])
    out["second"] = pool.push_to_hub("tester/pool", commit_message="Fewer and more")
    moved = ExamplePool.from_pretrained("tester/pool")
    same(moved, pool)
    assert moved.commit != again.commit and len(moved) == 10
    assert [row["id"] for row in load_dataset("tester/pool", split="train")["json"]] == pool.ids
    same(ExamplePool.from_pretrained("tester/pool", revision=again.commit), again)

    # two formats, no labels
    image = picture(np.random.default_rng(0))
    mixed = Dataset.from_dict({"image": [encoded(image, kind) for kind in ("PNG", "JPEG", "PNG", "WEBP")]})
    options["foreground"] = None
    ExamplePool.from_dataset(mixed, task="colourisation", **options).push_to_hub("tester/mixed", private=True)
    found = load_dataset("tester/mixed", split="train")
    kinds = ("image.jpg", "image.png", "image.webp")
    out["mixed"] = [[kind for kind in kinds if row[kind] is not None] for row in found]
    assert found.features["image.png"] == Image() and found["json"][1] == {"id": "1"}

    # boxes, one absent
    boxes = [[0, 0, 9, 9], None, [1, 2, 3.5, 4], [1, 2, 3, 4]]
    labelled = ds.select(range(4)).remove_columns("box").add_column("box", boxes)
    found = ExamplePool.from_dataset(labelled, label_column="box", task="detection", **options)
    found.push_to_hub("tester/boxes")
    found = load_dataset("tester/boxes", split="train")["json"][:]
    assert [row["box"] for row in found] == boxes, found

    api.create_repo("tester/other", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="data/pool.csv", repo_id="tester/other", repo_type="dataset")
    refused(lambda: pool.push_to_hub("tester/other"))
    refused(lambda: pool.push_to_hub("tester/pool", private=True))
    refused(lambda: ExamplePool.from_pretrained("tester/other"))
    refused(lambda: ExamplePool.from_pretrained("tester/absent"))
    print(json.dumps(out))
"""

LOAD = """
    import json
    import sys

    from hf_effdl.vicl.remote_code.pool_reader import PoolReader

    pool = PoolReader.from_pretrained("tester/pool")
    similarity, rows = pool.search(pool.vectors[:2], 3)
    heavy = sorted({"datasets", "faiss", "hf_effdl.vicl.pool.pool"} & set(sys.modules))
    print(json.dumps({"ids": pool.ids, "commit": pool.commit, "rows": rows.tolist(), "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    return json.loads(hub.run(PUSH, tmp_path_factory.mktemp("home")))


def test_a_pool_travels_whole_and_in_one_commit(hub, pushed):
    repo = hub.repos["dataset", "tester/pool"]
    commits = list(repo.commits.values())
    assert [commit.title for commit in commits] == [
        "initial commit",
        "Pool of 10 examples for segmentation",
        commits[2].title,
        "Fewer and more",
    ]
    assert pushed["first"].endswith(commits[1].oid) and pushed["second"].endswith(commits[3].oid)
    for commit, shards in ((commits[1], 3), (commits[3], 4)):
        names = [name for name in commit.tree if name.startswith("data/")]
        manifest = json.loads(commit.tree["pool.json"])
        assert names == sorted(
            f"data/{entry['name']}.{kind}" for entry in manifest["shards"] for kind in ("safetensors", "tar")
        )
        assert len(names) == 2 * shards and {"README.md", "pool.json"} < commit.tree.keys()
        assert not [name for name in commit.tree if name.startswith("done")]
    assert hub.repos["dataset", "tester/mixed"].private


def test_the_reader_needs_little(hub, pushed, tmp_path):
    said = json.loads(hub.run(LOAD, tmp_path))
    assert said["commit"] == hub.repos["dataset", "tester/pool"].head.oid and len(said["ids"]) == 10
    assert [rows[0] for rows in said["rows"]] == [0, 1] and said["heavy"] == []


def test_the_card_says_what_is_in_it(hub, pushed):
    card = hub.repos["dataset", "tester/pool"].head.tree["README.md"].decode()
    for text in (
        "license: cc0-1.0",
        "language: en",
        "- mine",
        "- visual-in-context-learning",
        "- image-segmentation",
        "path: data/*.tar",
        "num_examples: 10",
        "| rows | 10 |",
        "| encoder | `tests/encoder-0` |",
        "| its fingerprint | `0000000000000000` |",
        "| feature maps | 4 x 4 |",
        '"tester/pool"',
        'VisionEncoder.from_pretrained("tests/encoder-0")',
    ):
        assert text in card, text
    assert card.count("image-segmentation") == 1 and re.search(r"\| size \| 0\.\d MB in 8 files \|", card)
    assert "\n\n\n" not in card.split("---", 2)[2]
    assert "filled" in hub.repos["dataset", "tester/mixed"].head.tree["README.md"].decode()
    assert pushed["mixed"] == [["image.png"], ["image.jpg"], ["image.png"], ["image.webp"]]


def test_what_cannot_be_is_refused(pushed):
    for said, text in zip(
        pushed["errors"],
        (
            "ValueError: this pool lies in the cache of the Hub",
            "ValueError: this pool lies in the cache of the Hub",
            "ValueError: tester/other holds other data",
            "ValueError: private=True, but tester/pool exists and is public",
            "FileNotFoundError: the data set repository tester/other holds no pool",
            "RepositoryNotFoundError",
        ),
        strict=True,
    ):
        assert said.startswith(text), said
