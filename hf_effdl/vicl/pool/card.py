"""A pool as a data set repository: its card, and the commit that puts it there."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from hf_effdl.hub.cards import write_card
from hf_effdl.hub.repos import own_dataset_repo
from hf_effdl.version import __version__
from hf_effdl.vicl.pool.writer import masks_of
from hf_effdl.vicl.remote_code.masks import told
from hf_effdl.vicl.remote_code.pool_reader import MANIFEST, NAME


CATEGORIES = {"segmentation": "image-segmentation", "detection": "object-detection", "colourisation": "image-to-image"}
CATEGORIES["image-to-image"] = "image-to-image"
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.tar"}]}]


def write_pool_card(
    folder: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> Path:
    """The card of a pool, with which `load_dataset` reads its images and labels; metadata that are there are kept.

    Args:
        folder: gets `README.md`.
        manifest: of the pool.
        repo_id: repository named in the snippets; default: the folder's name.
        license, tags: added to the metadata.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.name
    return write_card(
        folder,
        "pool_card.md",
        _metadata(folder / "README.md", manifest, license, tags),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        task=manifest["task"],
        rows={name: value for name, value in _facts(manifest).items() if value not in (None, "")},
        encoder=manifest["encoder"].get("id"),
        formats=_formats(manifest),
        version=__version__,
    )


def _metadata(card: Path, manifest: Mapping[str, Any], license: str | None, tags: Iterable[str]) -> DatasetCardData:
    known = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
    if license:
        known["license"] = license
    joined = {
        name: list(dict.fromkeys([*(known.get(name) or []), *ours]))
        for name, ours in (
            ("tags", ["hf_effdl", "visual-in-context-learning", *tags]),
            ("task_categories", [CATEGORIES[manifest["task"]]]),
        )
    }
    splits = [{"name": "train", "num_examples": manifest["rows"]}]
    info = {"features": _features(manifest), "splits": splits}
    return DatasetCardData(**(known | joined | {"configs": CONFIGS, "dataset_info": info}))


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the card tells of the pool; None or empty where there is nothing to tell."""
    encoder, shards = manifest["encoder"], manifest["shards"]
    size = sum(entry["tar_bytes"] + entry["index_bytes"] for entry in shards)
    blank = sum(len(set(entry["blank"]) - set(entry["dropped"])) for entry in shards)
    foreground, masks = manifest["settings"].get("foreground"), masks_of(shards)
    foreground = [foreground] if isinstance(foreground, str) else foreground
    return {
        "task": manifest["task"],
        "rows": f"{manifest['rows']:,}",
        "of them without an object": f"{blank:,}" if blank else None,
        "rows that could not be used": f"{sum(len(entry['skipped']) for entry in shards):,}",
        "mask values that are the object": foreground and ", ".join(map(str, foreground)),
        "what the masks were taken for": told(masks) if masks["masks"] else None,
        "encoder": f"`{encoder['id']}`" if encoder.get("id") else "not named",
        "its revision": encoder.get("revision"),
        "its layer": encoder.get("layer"),
        "its image size": " x ".join(map(str, encoder.get("image_size") or ())),
        "its fingerprint": f"`{encoder['fingerprint']}`",
        "width of the features": manifest["dim"],
        "feature maps": " x ".join(map(str, manifest["grid"])) if manifest["grid"] else "not kept",
        "size": f"{size / 1e6:,.1f} MB in {2 * len(shards)} files",
        "fingerprint of the pool": f"`{manifest['fingerprint'][:16]}`",
        "hf_effdl": manifest["hf_effdl"],
    }


def _formats(manifest: Mapping[str, Any]) -> list[str]:
    return sorted({kind for entry in manifest["shards"] for kind in entry["formats"]})


def _features(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns as `datasets` names them: said here, as it would guess them from the first five rows."""
    said = [{"name": "id", "dtype": "string"}]
    if manifest["task"] == "detection":
        said.append({"name": "box", "list": "float64"})
    images = [f"image.{kind}" for kind in _formats(manifest)]
    images += ["label.png"] if manifest["task"] in ("segmentation", "image-to-image") else []
    return [
        *({"name": name, "dtype": "image"} for name in images),
        {"name": "json", "struct": said},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def without_paths(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest that may leave this machine: a folder here names nothing to others."""
    encoder = dict(manifest["encoder"])
    if os.path.exists(os.path.expanduser(encoder.get("id") or "")) or os.path.isabs(encoder.get("id") or ""):
        encoder["id"] = None
    return dict(manifest) | {"encoder": encoder}


def push_pool(
    pool: Any, repo_id: str, private: bool | None, token: str | bool | None, commit_message: str | None, **card: Any
) -> str:
    """Commit the files of a pool at once, and the removal of those of an older one."""
    api = HfApi(token=token)
    head, files = own_dataset_repo(api, repo_id, private, lambda name: name == MANIFEST, "pool")
    repo_id = head.id
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = pool.folder
        if any(entry["dropped"] for entry in pool.manifest["shards"]):
            source = pool.copied_to(folder)
        if "README.md" in files:
            api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=head.sha, local_dir=folder)
        manifest = without_paths(json.loads((source / MANIFEST).read_text(encoding="utf-8")))
        readme = write_pool_card(folder, manifest, repo_id=repo_id, **card)
        names = [f"data/{entry['name']}.{kind}" for entry in manifest["shards"] for kind in ("tar", "safetensors")]
        operations = [CommitOperationAdd(name, source / name) for name in names]
        operations.append(CommitOperationAdd(MANIFEST, json.dumps(manifest, indent=1).encode()))
        operations.append(CommitOperationAdd("README.md", readme))
        old = {name for name in files if re.fullmatch(rf"data/{NAME}\.(tar|safetensors)", name)}
        operations += [CommitOperationDelete(name) for name in sorted(old - set(names))]
        return str(
            api.create_commit(
                repo_id,
                operations,
                repo_type="dataset",
                parent_commit=head.sha,
                commit_message=commit_message or f"Pool of {len(pool):,} examples for {pool.task}",
            )
        )
