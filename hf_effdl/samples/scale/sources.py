"""Parquet files that are read, wherever they lie, and the folder on this machine that outputs go to."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_effdl.checks import instance, path
from hf_effdl.files import damaged, digest, read_json
from hf_effdl.samples.drawing.shard_files import check_id_types


@dataclass(frozen=True)
class Shard:
    """A Parquet file, anywhere that fsspec can read.

    Attributes:
        file, rows: path or URL, and the number of rows.
        columns: their Arrow types.
        size, mark: of the file; the mark changes when its content does.
    """

    file: str
    rows: int
    columns: Mapping[str, Any]
    size: int
    mark: str

    @classmethod
    def open(cls, file: str | os.PathLike) -> "Shard":
        import pyarrow as pa

        name = os.fspath(instance("a file", file, (str, os.PathLike), "paths of Parquet files"))
        size, mark = _stamp(name)
        try:
            with reader(name) as opened:
                schema = opened.schema_arrow
                columns = dict(zip(schema.names, schema.types, strict=True))
                return cls(name, opened.metadata.num_rows, columns, size, mark)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a whole Parquet file: {error}; get it again") from error

    def check_column(self, name: str | None) -> None:
        if name is not None and name not in self.columns:
            raise ValueError(f"{self.file} has no column {name!r}, only {list(self.columns)}; change id_column=")

    def batches(self, rows: int) -> Iterator[Any]:
        """The file's record batches, of so many rows; the last may have fewer."""
        import pyarrow as pa

        try:
            with reader(self.file) as opened:
                yield from opened.iter_batches(rows)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.file} is damaged: {error}; get it again") from error


def reader(file: str) -> Any:
    """A Parquet file, opened; of a URL only what is read of it comes here. Pages that have checksums are compared."""
    import pyarrow.parquet as pq

    if "://" not in file:
        return pq.ParquetFile(file, page_checksum_verification=True)
    import fsspec

    return pq.ParquetFile(fsspec.open(file, "rb").open(), page_checksum_verification=True)


def check_ids(shards: list[Shard], id_column: str | None) -> str | None:
    """The column that names rows, all integers or all texts; None for `"row_id"` where no file has it."""
    if id_column == "row_id" and not any("row_id" in one.columns for one in shards):
        return None
    if id_column is not None:
        for shard in shards:
            shard.check_column(id_column)
        check_id_types([one.file for one in shards], [one.columns[id_column] for one in shards], id_column)
    return id_column


def check_whole(table: str) -> None:
    """Refuse a table of scores or of a plan that is not what was written, by the manifest beside it."""
    file = Path(table)
    for manifest in ("_scores.json", "_plan.json"):
        try:
            known = {one["file"]: one["sha256"] for one in read_json(file.parent / manifest)["outputs"]}
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
            continue  # a manifest that is damaged itself says nothing
        if known.get(file.name, digest(file)) != digest(file):
            raise damaged(file, f"it is not what {manifest} says was written", "make it again by the call that did")


def local_folder(name: str, value: Any) -> Path:
    """A folder on this machine, made if need be; raises where it is none."""
    folder = path(name, value)
    if "://" in os.fspath(value):
        raise ValueError(f"{name}={os.fspath(value)!r} is a URL; pass a folder on this machine, and copy it then")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name}={os.fspath(value)!r} is a file; pass a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def same_file(file: str) -> str:
    """A name by which a file is known however its path is written."""
    return file if "://" in file else os.path.realpath(file)


def _stamp(file: str) -> tuple[int, str]:
    """A file's size, and what changes when it does."""
    if "://" not in file:
        found = os.stat(file)
        return found.st_size, str(found.st_mtime_ns)
    import fsspec

    system, place = fsspec.core.url_to_fs(file)
    info = system.info(place)
    known = {name: str(info[name]) for name in ("ETag", "etag", "blob_id", "mtime", "LastModified") if name in info}
    return int(info["size"]), json.dumps(known, sort_keys=True)
