"""`score_shards`: Parquet shards in, their scores as Parquet shards out."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from hf_effdl.checks import instance, whole_number
from hf_effdl.files import digest, locked, sweep, write_json, write_whole
from hf_effdl.processes import is_first, refuse_lone_processes, same_fate, together
from hf_effdl.samples.scale.scorers import RowScorer, as_scorer


MANIFEST = "_scores.json"  # readers of Parquet folders pass over names that begin with _
MADE_OF = b"hf_effdl"  # in an output's metadata: what it was made of


def score_shards(
    files: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    scorer: RowScorer,
    *,
    id_column: str | None = "row_id",
    batch_rows: int = 1024,
) -> dict[str, Any]:
    """Score rows that lie in Parquet files, without holding more than a batch of them.

    Input shard k gives `scores-k-of-n.parquet` with the column `row_id` and one column a score, in the order of the
    input; it comes into being whole, by a rename. All processes of `accelerate launch` or `torchrun` share the shards,
    and the table is the same however many they are. After a kill or an error, the same call goes on with the shards
    that are not finished. Of two calls for one folder one waits for the other at each shard. `_scores.json` comes last
    and says what the scores were made of. The files go into `plan_shards`, and with `join_shards` beside the rows.

    Args:
        files: Parquet files, as paths or as URLs that fsspec knows (`hf://datasets/...`, `s3://...`).
        output_dir: a folder on this machine, the same for all processes.
        scorer: `SFTScorer`, `ProbeScorer`, or any object with their `key` and `score_rows`.
        id_column: column that names the rows. None, or no column `"row_id"`: the row's number, counted through all
            files in the order given.
        batch_rows: rows that are read, scored and written together. They are also those among which `SFTScorer` looks
            for other prompts.

    Returns:
        what `_scores.json` holds: `scorer` (its key), `settings`, `inputs` (file, rows, size, mark) and `outputs`
        (file, rows, sha256).

    Raises:
        ValueError: for no files, files twice, files that are no or damaged Parquet, or a missing column; for a folder
            with scores of another scorer, other files or settings; and what the scorer raises. Finished shards stay.
        TypeError: for a scorer that is none.

    Example:
        >>> score_shards(["a.parquet", "b.parquet"], "scores", ProbeScorer(probes))  # doctest: +SKIP
    """
    scorer, state = as_scorer(scorer), PartialState()
    refuse_lone_processes()
    batch_rows = whole_number("batch_rows", batch_rows, 1)
    with same_fate():
        shards = [Shard.open(file) for file in _checked(files)]
        id_column = None if id_column == "row_id" and not any("row_id" in one.columns for one in shards) else id_column
        for shard in shards:
            shard.check_column(id_column)
        settings = {"id_column": id_column, "batch_rows": batch_rows}
        causes = {"scorer": scorer.key, "settings": settings, "shards": len(shards)}
        work = _Work(Path(output_dir), shards, scorer, causes)
        work.check_others()
    with same_fate():  # a process that fails leaves the others to finish their shards
        for k in range(state.process_index, len(shards), state.num_processes):
            work.finish(k)
    if is_first():
        work.write_manifest()
    together()
    return work.manifest()


@dataclass(frozen=True)
class Shard:
    """A Parquet file, anywhere that fsspec can read."""

    file: str
    rows: int
    columns: tuple[str, ...]
    size: int
    mark: str

    @classmethod
    def open(cls, file: str | os.PathLike) -> "Shard":
        import pyarrow as pa

        name = os.fspath(instance("a file", file, (str, os.PathLike), "paths of Parquet files"))
        size, mark = _stamp(name)
        try:
            with reader(name) as opened:
                return cls(name, opened.metadata.num_rows, tuple(opened.schema_arrow.names), size, mark)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name} is not a whole Parquet file: {error}") from error

    def check_column(self, name: str | None) -> None:
        if name is not None and name not in self.columns:
            raise ValueError(f"{self.file} has no column {name!r}, only {list(self.columns)}; change id_column=")

    def batches(self, rows: int) -> Iterator[Any]:
        """The file's record batches, of so many rows; the last may have fewer."""
        import pyarrow as pa

        try:
            with reader(self.file) as opened:
                yield from opened.iter_batches(rows)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.file} is damaged: {error}; get it again") from error


def reader(file: str) -> Any:
    """A Parquet file, opened; of a URL only what is read of it comes here."""
    import pyarrow.parquet as pq

    if "://" not in file:
        return pq.ParquetFile(file)
    import fsspec

    return pq.ParquetFile(fsspec.open(file, "rb").open())


def _stamp(file: str) -> tuple[int, str]:
    """A file's size, and what changes when it does."""
    if "://" not in file:
        found = os.stat(file)
        return found.st_size, str(found.st_mtime_ns)
    import fsspec

    system, path = fsspec.core.url_to_fs(file)
    info = system.info(path)
    known = {name: str(info[name]) for name in ("ETag", "etag", "blob_id", "mtime", "LastModified") if name in info}
    return int(info["size"]), json.dumps(known, sort_keys=True)


def _checked(files: Any) -> list[str]:
    files = [os.fspath(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    if not files or len(set(files)) < len(files):
        raise ValueError(f"files={files}: pass one file or more, and each of them once")
    return files


class _Work:
    """Shards, where their scores go, and what these follow from."""

    def __init__(self, folder: Path, shards: list[Shard], scorer: RowScorer, causes: dict[str, Any]) -> None:
        self.folder, self.shards, self.scorer, self.causes = folder, shards, scorer, causes
        folder.mkdir(parents=True, exist_ok=True)

    def output(self, k: int) -> Path:
        return self.folder / f"scores-{k:05d}-of-{len(self.shards):05d}.parquet"

    def made_of(self, k: int) -> dict[str, Any]:
        shard = self.shards[k]
        return self.causes | {"file": shard.file, "rows": shard.rows, "size": shard.size, "mark": shard.mark}

    def check_others(self) -> None:
        """Refuse a folder with scores that are not these."""
        for file in sorted(self.folder.glob("scores-*.parquet")):
            found = _read_causes(file)
            k = next((k for k in range(len(self.shards)) if self.output(k) == file), None)
            if found is None or (k is not None and found == self.made_of(k)):
                continue  # damaged ones are made again
            expected = self.causes | ({} if k is None else self.made_of(k))
            other = [name for name in expected if found.get(name) != expected[name]]
            raise ValueError(
                f"{file} holds scores of another {' and '.join(other) or 'number of shards'}; choose another "
                "output_dir, or remove it to score anew"
            )

    def finish(self, k: int) -> None:
        """Write the scores of shard k, unless they are there."""
        output = self.output(k)
        with locked(self.folder, f".lock-{k}"):
            if not self._is_whole(k):
                sweep(self.folder, output.name)
                write_whole(output, lambda part: self._write(k, part))

    def _is_whole(self, k: int) -> bool:
        """Whether the scores of shard k are there, and what was written."""
        output = self.output(k)
        if _read_causes(output) != self.made_of(k):
            return False
        if not (self.folder / MANIFEST).is_file():
            return True
        known = {one["file"]: one["sha256"] for one in self.manifest()["outputs"]}
        return known.get(output.name, digest(output)) == digest(output)

    def _write(self, k: int, path: Path) -> None:
        import pyarrow.parquet as pq

        rows = self.causes["settings"]["batch_rows"]
        tables = self._scored(k, rows)
        first = next(tables, None)
        if first is None:  # a shard without rows has the columns of one that has some
            other = next((k for k, one in enumerate(self.shards) if one.rows), None)
            if other is None:
                raise ValueError("files hold no rows at all; pass shards with rows")
            first = next(self._scored(other, 1)).slice(0, 0)
        notes = {MADE_OF: json.dumps(self.made_of(k), sort_keys=True)}
        with pq.ParquetWriter(path, first.schema.with_metadata(notes), use_dictionary=False) as writer:
            for table in chain([first], tables):
                writer.write_table(table.replace_schema_metadata(writer.schema.metadata))

    def _scored(self, k: int, rows: int) -> Iterator[Any]:
        """Ids and scores of shard k, so many rows at a time."""
        import pyarrow as pa

        name, shard, row = self.causes["settings"]["id_column"], self.shards[k], 0
        start = sum(one.rows for one in self.shards[:k])
        for batch in shard.batches(rows):
            here = range(start + row, start + row + len(batch))
            ids = pa.array(here, pa.int64()) if name is None else batch.column(name)
            if ids.null_count:
                raise ValueError(f"{shard.file} has rows without {name!r}; give each one, or set id_column=None")
            scores = self.scorer.score_rows(Dataset(_memory(batch)), where=shard.file, first=row)
            yield pa.table({"row_id": ids} | {name: arrow_column(values) for name, values in scores.items()})
            row += len(batch)

    def write_manifest(self) -> None:
        outputs = [{"file": self.output(k).name, "rows": one.rows} for k, one in enumerate(self.shards)]
        outputs = [one | {"sha256": digest(self.folder / one["file"])} for one in outputs]
        inputs = [
            {name: self.made_of(k)[name] for name in ("file", "rows", "size", "mark")} for k in range(len(outputs))
        ]
        write_json(self.folder / MANIFEST, self.causes | {"inputs": inputs, "outputs": outputs})

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))


def _read_causes(file: Path) -> dict[str, Any] | None:
    """What a table of scores was made of; None where there is none, or it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads(pq.read_schema(file).metadata[MADE_OF])
    except (FileNotFoundError, pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return None


def _memory(batch: Any) -> Any:
    import pyarrow as pa
    from datasets.table import InMemoryTable

    return InMemoryTable(pa.Table.from_batches([batch]))


def arrow_column(values: Tensor) -> Any:
    """A tensor of one number, or of one vector, a row as an Arrow array."""
    import pyarrow as pa

    values = values.detach().cpu()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if values.ndim == 1:
        return pa.array(values.numpy())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), values.shape[1])
