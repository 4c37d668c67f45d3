"""The rows of a data set as a pool takes them: ids, files of images and labels, and what decides their content."""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from hf_effdl.files import digest
from hf_effdl.vicl.remote_code.images import BICUBIC, pixels, to_rgb
from hf_effdl.vicl.remote_code.masks import Reading
from hf_effdl.vicl.remote_code.pool_rows import name_of
from hf_effdl.vicl.remote_code.visual_tasks import task_of


# formats whose files go into the pool as they are; MPO is the JPEG of many phones
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
SHOWN = 5
# of the way labels are read: raised where the same file comes to mean something else
READING = 3
# seconds after which a file that was not finished is removed
LITTER = 86_400
TIMEOUT = 60  # seconds without a word from a server


@dataclass
class Row:
    """A row on its way into the pool: the files it will be, and its cell for the encoder, or what is wrong with it."""

    number: int
    key: str
    id: str
    error: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    blank: bool = False
    mask: Reading | None = None
    columns: dict[str, str | None] = field(default_factory=dict)
    pixels: Tensor | None = None


class Rows(torch.utils.data.Dataset):
    """The rows of a data set, checked and read one by one.

    Args:
        ds: the data set.
        manifest: its `task` and `settings` say how to read it.
        encoder: says to what size, and how, images are resized.
        first: number of the first row in the pool.
    """

    def __init__(self, ds: Dataset, manifest: Mapping[str, Any], encoder: Any, first: int) -> None:
        settings = manifest["settings"]
        self.image, self.label = settings["image_column"], settings["label_column"]
        named = [name for name in dict.fromkeys((self.image, self.label)) if name is not None]
        said = {name: settings.get(f"{name}_column") for name in ("group", "class")}
        _check_columns(ds, [*named, settings["id_column"], *said.values()])
        self.columns = {name: _texts(ds, column) for name, column in said.items() if column is not None}
        self.fingerprint, self.first = ds._fingerprint, first
        self.image_size, self.resample = tuple(encoder.image_size), getattr(encoder, "resample", BICUBIC)
        self.task = task_of(manifest["task"], settings)
        self.ids = _ids(ds, settings["id_column"], first)
        ds = ds.with_format(None).select_columns(named)
        for name in ds.column_names:
            if isinstance(ds.features[name], datasets.Image):
                ds = ds.cast_column(name, datasets.Image(decode=False))
        self.data = ds

    def key(self, manifest: Mapping[str, Any], on_bad_row: str) -> str:
        """A hash of all that decides the shards of these rows."""
        given = [manifest[name] for name in ("format", "task", "settings", "encoder")]
        given += [self.fingerprint, len(self), self.first, on_bad_row, READING, _state_of_files(self.data)]
        return digest(json.dumps(given, sort_keys=True))[:12]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Row:
        row = Row(number, f"{self.first + number:08d}", self.ids[number])
        row.columns = {name: values[number] for name, values in self.columns.items()}
        try:
            self._read(row)
        except Exception as error:  # decoders raise errors of many kinds on damaged files
            row.error = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return row

    def _read(self, row: Row) -> None:
        values = {name: _local(value) for name, value in self.data[row.number].items()}
        content = _content(values[self.image])
        image = to_rgb(content)
        with Image.open(io.BytesIO(content)) as opened:
            moves = opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1
            kind = None if moves else KEPT.get(opened.format)
        row.files = {f"image.{kind}": content} if kind else {"image.png": _png(image)}
        said = {"id": row.id}
        if self.task.name == "segmentation":
            if values[self.label] is None:
                raise ValueError("it has no mask; draw one that is all 0 where there is no object")
            row.mask = self.task.read(values[self.label], image)
            row.files["label.png"], row.blank = _png(row.mask.picture()), not row.mask.white.any()
        elif self.task.name == "image-to-image":
            row.files["label.png"] = _png(self.task.label(values[self.label], image))
        elif self.task.name == "detection":
            self.task.label(values[self.label], image)  # for its checks
            box = self.task.corners(values[self.label])
            said["box"], row.blank = None if box is None else np.asarray(box).tolist(), box is None
        row.files["json"] = json.dumps(said).encode()
        row.pixels = pixels([self.task.query(image)], self.image_size, self.resample)[0]


def _check_columns(ds: Dataset, columns: Sequence[str | None]) -> None:
    if not isinstance(ds, Dataset):
        raise TypeError(f"got a {type(ds).__name__}; pass a datasets.Dataset, such as one split of a DatasetDict")
    if not len(ds):
        raise ValueError("the data set has no rows; a pool needs one or more")
    if missing := [name for name in columns if name is not None and name not in ds.column_names]:
        raise ValueError(
            f"the data set has no column {', '.join(map(repr, missing))}; it has {ds.column_names}: "
            "set image_column=, label_column= and id_column="
        )


def _ids(ds: Dataset, column: str | None, first: int) -> list[str]:
    if column is None:
        return [str(first + i) for i in range(len(ds))]
    values = ds.with_format(None)[column][:]
    kinds = {type(value) for value in values}
    if kinds not in ({int}, {str}):
        raise TypeError(
            f"id_column={column!r} holds {sorted(kind.__name__ for kind in kinds)}; ids are all texts or all integers"
        )
    ids, seen = [str(value) for value in values], {}
    for row, id in enumerate(ids):
        if seen.setdefault(id, row) != row:
            raise ValueError(
                f"id_column={column!r}: rows {seen[id]} and {row} are both named {id!r}; ids must be unique"
            )
    return ids


def _texts(ds: Dataset, column: str) -> list[str | None]:
    """Values of a column as texts; of a `ClassLabel` the names."""
    feature, values = ds.features[column], ds.with_format(None)[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None else feature.int2str(value) for value in values]
    return [name_of(value, f"column {column!r}") for value in values]


def _state_of_files(ds: Dataset) -> str:
    """A digest of the size and time of every file that rows only name: what is in it is not the data set's."""
    states = hashlib.sha256()
    for name in ds.column_names:
        for table in ds.with_format("arrow").select_columns([name]).iter(batch_size=1000):
            for path in _paths(table[name].combine_chunks()):
                states.update(f"{path}{_state_of(path)}\n".encode(errors="surrogatepass"))
    return states.hexdigest()


def _paths(column: pa.Array) -> list[str | None]:
    """What may be paths in a column: its texts, or, of files with `bytes` and `path`, those that have no bytes."""
    kind = column.type
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        column = column.field("path").filter(column.field("bytes").is_null())
        kind = column.type
    return column.to_pylist() if str(kind) in ("string", "large_string", "string_view") else []


def _state_of(path: str | None) -> tuple[int, int] | None:
    try:
        stat = os.stat(path or "")
    except (OSError, ValueError):  # no file: a text, or one that will be missed when it is read
        return None
    return stat.st_size, stat.st_mtime_ns


def _local(value: Any) -> Any:
    """A value of a row; of one that is on the web, its bytes."""
    url = value["path"] if isinstance(value, dict) and value.get("bytes") is None and "path" in value else value
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return value
    # some servers refuse the library's own name
    with urlopen(Request(url, headers={"User-Agent": "hf_effdl"}), timeout=TIMEOUT) as answer:
        return answer.read()


def _content(value: Any) -> bytes:
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        return Path(value).read_bytes()
    if not isinstance(value, bytes):
        raise TypeError(
            f"the image is {type(value).__name__}, not a file; cast the column: ds.cast_column(name, datasets.Image())"
        )
    return value


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
