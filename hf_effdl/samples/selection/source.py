"""Where a pool was loaded from, and how it is loaded again."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, ReadInstruction, load_dataset
from huggingface_hub import constants


def source_of(data: Dataset) -> dict[str, Any]:
    """Id, revision, configuration and split on the Hub, as far as the data set's files tell.

    Returns:
        `exact` is True if row i of the data is row i of that split, for sure; else `why` says what speaks against it.
    """
    config, split = data.info.config_name, None if data.split is None else str(data.split)
    files = [Path(file["filename"]) for file in data.cache_files]
    repository = revision = loaded = None
    if len({file.parent for file in files}) == 1 and len(files[0].parts) > 5:
        # load_dataset keeps its files in namespace___name/configuration/version/commit
        folder, loaded, _, commit, _ = files[0].parts[-5:]
        repository = _repository(folder, commit)
        revision = commit if repository else None
    if repository is None:
        why = "it was not loaded from the Hub with load_dataset"
    elif loaded != config:
        why = "it was loaded with data_files, data_dir or other options"
    else:
        why = _why_moved(data, files, split)
    return {
        "id": repository,
        "revision": revision,
        "config": config,
        "split": split,
        "rows": len(data),
        "fingerprint": data._fingerprint,
        "exact": why is None,
        "why": why,
    }


def _why_moved(data: Dataset, files: list[Path], split: str | None) -> str | None:
    """Why row i may not be row i of the split that was loaded; None if it is, for sure."""
    if data._indices is not None or any(file.name.startswith("cache-") for file in files):
        # the file that map, cast or flatten_indices wrote may follow a shuffle, so it proves nothing
        return "its rows were mapped, cast, selected, filtered, sorted or shuffled after loading"
    rows = _rows(data)
    if rows is None:
        return f"it is no split of the source but {split!r}" if split else "it was put together from splits"
    return None if len(data) == rows else f"it has {len(data)} rows, and the split {split!r} has {rows}"


def _repository(folder: str, commit: str) -> str | None:
    """The repository with this commit in the Hub's cache; the folder names it too, but in lower case."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return None
    cached = [path.parts[-3] for path in Path(constants.HF_HUB_CACHE).glob(f"datasets--*/*/{commit}")]
    ids = {name.removeprefix("datasets--").replace("--", "/") for name in cached}
    plain = folder.replace("___", "/").replace("_", "").lower()
    ids = [name for name in ids if name.replace("_", "").lower() == plain]
    return ids[0] if len(ids) == 1 else None


def _rows(data: Dataset) -> int | None:
    """Rows of the split, or of the part of it, that the data set says it is."""
    if data.split is None or not data.info.splits:
        return None
    lengths = {name: split.num_examples for name, split in data.info.splits.items()}
    try:
        parts = ReadInstruction.from_spec(str(data.split)).to_absolute(lengths)
    except ValueError:  # a split of another making, as after train_test_split
        return None
    return sum(part.to - part.from_ for part in parts)


def load_source(info: Mapping[str, Any], token: str | bool | None = None) -> Dataset:
    """Load the pool of a selection from the Hub.

    Raises:
        ValueError: if it is not known what to load, or if rows are known by their places and these may be others.
    """
    source = {"id": None, "split": None, "why": "it is not recorded"} | info.get("source", {})
    config, revision = source.get("config"), source.get("revision")
    name = f"{source['id']} (revision {revision}, {config}, split {source['split']})"
    ask = "pass source=, the data set as it was when it was selected from"
    if source["id"] is None or source["split"] is None:
        raise ValueError(
            "it is not known where the data set that was selected from can be loaded: "
            f"{source['why'] or 'it has no split'}; {ask}"
        )
    if info.get("id_column") is None and not source.get("exact"):
        raise ValueError(
            f"the selected rows are known by their places in a data set that came from {name}, but "
            f"{source['why']}, so the places there may be others; {ask}, or select with id_column="
        )
    if revision is None:
        warnings.warn(
            f"the revision of {source['id']} that was selected from is not known; the newest one is loaded, "
            "whose rows may have changed",
            stacklevel=3,
        )
    try:
        return load_dataset(source["id"], config, split=source["split"], revision=revision, token=token)
    except Exception as error:
        error.add_note(f"while loading the pool of the selection, {name}; or {ask}")
        raise
