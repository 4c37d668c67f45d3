"""Parquet shards as they come in: checked before anything is read, and read batch by batch."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Self

import torch
from torch import Tensor

from hf_effdl.checks import path
from hf_effdl.samples.drawing.weights import weight_column


MADE_OF = b"hf_effdl"  # in a table's metadata: what its scores were made of


@dataclass(frozen=True)
class Shards:
    """Score tables in Parquet files, read batch by batch.

    Attributes:
        inputs: of each file `file`, `rows`, `size` and `mtime_ns`.
        score, id_column, weighed_by: columns that are read; the last two may be None.
        batch_rows, workers: see `plan_shards`.
    """

    inputs: list[dict[str, Any]]
    score: str
    id_column: str | None
    weighed_by: str | None
    batch_rows: int
    workers: int | None

    @classmethod
    def open(
        cls,
        files: Sequence[str | os.PathLike] | str | os.PathLike,
        score: str,
        id_column: str | None,
        weights: str,
        batch_rows: int,
        workers: int | None,
    ) -> Self:
        """The files, if they have the columns; see `plan_shards` for what is raised."""
        files = [files] if isinstance(files, (str, os.PathLike)) or not isinstance(files, Iterable) else files
        files = [os.fspath(path("files", file)) for file in files]
        if not files or len({os.path.realpath(file) for file in files}) < len(files):
            raise ValueError(f"files={files}: pass one file or more, and each of them once")
        inputs, schemas = zip(*map(_look_into, files), strict=True)
        if id_column == "row_id" and not any("row_id" in schema.names for schema in schemas):
            id_column = None
        weighed_by = weight_column(weights, score, schemas[0].names)
        columns = {"score": score, "id_column": id_column, "weights": weighed_by}
        for argument, name in columns.items():
            for file, schema in zip(files, schemas, strict=True) if name else ():
                _check_column(file, schema, argument, name)
        if id_column is not None:
            check_id_types(files, [schema.field(id_column).type for schema in schemas], id_column)
        return cls(list(inputs), score, id_column, weighed_by, batch_rows, workers)

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.inputs)

    def changed(self) -> bool:
        """Whether a file is another one than when it was opened."""
        return any(shard != shard | _stamp(shard["file"]) for shard in self.inputs)

    def id_type(self, k: int) -> Any:
        """The Arrow type of the row ids."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.id_column is None:
            return pa.int64()
        return pq.read_schema(self.inputs[k]["file"]).field(self.id_column).type

    def notes(self, k: int) -> dict[bytes, bytes] | None:
        """What the scores say they were made of, where the rows that come out are known by the same ids."""
        import pyarrow.parquet as pq

        known = pq.read_schema(self.inputs[k]["file"]).metadata or {}
        return {MADE_OF: known[MADE_OF]} if MADE_OF in known and self.id_column == "row_id" else None

    def batches(
        self, k: int, weighing: bool = False
    ) -> Iterator[tuple[Any, Tensor | list[str], Tensor, Tensor | None]]:
        """Of every batch: row ids as an Arrow array and as the hash takes them, scores, what weights are made of."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file, row = self.inputs[k]["file"], 0
        first = sum(shard["rows"] for shard in self.inputs[:k])
        extra = self.weighed_by if weighing else None
        columns = list(dict.fromkeys(name for name in (self.score, self.id_column, extra) if name is not None))
        with pq.ParquetFile(file, pre_buffer=False) as reader:
            for batch in reader.iter_batches(self.batch_rows, columns=columns, use_threads=False):
                scores = _numbers(batch, self.score, file, row)
                if self.id_column is None:
                    ids = pa.array(torch.arange(first + row, first + row + len(batch)).numpy())
                else:
                    ids = batch.column(self.id_column)
                names = _names(ids, self.id_column, file, row)
                yield ids, names, scores, None if extra is None else _numbers(batch, extra, file, row)
                row += len(batch)

    def each(self, reading: Callable[[int], Any]) -> list[Any]:
        """A reading of all shards, in threads, as Arrow and torch release the interpreter's lock."""
        threads = torch.get_num_threads()
        workers = self.workers or min(len(self.inputs), threads)
        # a shard is a thread's work; torch would divide each of its small steps once more and wait for the parts
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(workers) as pool:
                futures = [pool.submit(reading, k) for k in range(len(self.inputs))]
                try:
                    return [future.result() for future in futures]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(threads)


def _look_into(file: str) -> tuple[dict[str, Any], Any]:
    """What a plan remembers of a file, and its Arrow schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stamp = _stamp(file)
        with pq.ParquetFile(file) as reader:
            return {"file": file, "rows": reader.metadata.num_rows} | stamp, reader.schema_arrow
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file: {error}; get it again, or leave it out") from error


def _check_column(file: str, schema: Any, argument: str, name: str) -> None:
    """Raise where a file lacks the column, or where it holds no numbers; see `check_id_types` for ids."""
    from pyarrow import types

    if name not in schema.names:
        near = get_close_matches(name, schema.names, 3, 0.4)
        raise ValueError(
            f"{file} has no column {name!r}; its columns are {schema.names}"
            + (f", near ones {near}" if near else "")
            + f"; change {argument}="
        )
    kind = schema.field(name).type
    if argument != "id_column" and not (types.is_integer(kind) or types.is_floating(kind)):
        raise TypeError(f"{file}: column {name!r} is of type {kind}; cast it to numbers, or change {argument}=")


def check_id_types(files: Sequence[str], kinds: Sequence[Any], name: str) -> None:
    """Raise where a column of ids holds neither integers nor texts, or is of several types."""
    from pyarrow import types

    for file, kind in zip(files, kinds, strict=True):
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            raise TypeError(
                f"{file}: column {name!r} is of type {kind}; cast it to integers or texts, or change id_column="
            )
        if kind != kinds[0]:
            raise TypeError(f"{file}: column {name!r} is of type {kind}, in {files[0]} of {kinds[0]}; make them alike")


def _stamp(file: str) -> dict[str, int]:
    stat = os.stat(file)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _numbers(batch: Any, name: str, file: str, row: int) -> Tensor:
    """A column as a tensor of non-negative numbers."""
    values = torch.tensor(batch.column(name).to_numpy(zero_copy_only=False))  # nothing becomes NaN
    values = values if values.is_floating_point() else values.double()
    low, high = values.aminmax()
    if not (low >= 0 and high < math.inf):
        bad = int((~(values.isfinite() & (values >= 0))).nonzero()[0])
        raise ValueError(
            f"{file}: column {name!r} is {values[bad].item()} at row {row + bad} (missing counts as "
            "NaN); score such rows again so that they are finite and not negative, or leave them out"
        )
    return values


def _names(ids: Any, name: str | None, file: str, row: int) -> Tensor | list[str]:
    """Row ids as the hash takes them."""
    import pyarrow as pa

    if ids.null_count:
        bad = ids.is_null().index(True).as_py()
        raise ValueError(
            f"{file}: column {name!r} is missing at row {row + bad}; give every row an id, or set id_column=None"
        )
    return torch.tensor(ids.to_numpy()) if pa.types.is_integer(ids.type) else ids.to_pylist()
