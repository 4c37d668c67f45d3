"""`score_shards`: Parquet shards in, their scores as Parquet shards out."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Features
from torch import Tensor

from hf_effdl.checks import instance, whole_number
from hf_effdl.files import digest, locked, parsed, read_json, sweep, write_json, write_whole
from hf_effdl.processes import is_first, refuse_lone_processes, same_fate, together
from hf_effdl.samples.drawing.shard_files import MADE_OF
from hf_effdl.samples.scale.scorers import RowScorer, as_scorer
from hf_effdl.samples.scale.sources import Shard, check_ids, local_folder, same_file
from hf_effdl.samples.scores.numbers import as_numbers


MANIFEST = "_scores.json"  # readers of Parquet folders pass over names that begin with _


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
            that is a URL, or has scores of another scorer, other files or settings, or tables of others; for scores
            that are not one number or vector a row; and what the scorer raises. Finished shards stay.
        TypeError: for a scorer that is none, or ids that are neither integers nor texts.

    Example:
        >>> score_shards(["a.parquet", "b.parquet"], "scores", ProbeScorer(probes))  # doctest: +SKIP
    """
    scorer, state = as_scorer(scorer), PartialState()
    refuse_lone_processes()
    with same_fate():
        work = shard_work(files, output_dir, scorer, id_column, batch_rows)
    with same_fate():  # a process that fails leaves the others to finish their shards
        for k in range(state.process_index, len(work.shards), state.num_processes):
            work.finish(k)
    if is_first():
        work.write_manifest()
    together()
    return work.manifest()


def shard_work(
    files: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    scorer: RowScorer,
    id_column: str | None,
    batch_rows: int,
) -> "ShardWork":
    """All that `score_shards` is told, checked; whoever has it can finish any of the shards."""
    batch_rows = whole_number("batch_rows", batch_rows, 1)
    shards = [Shard.open(file) for file in _checked(files)]
    settings = {"id_column": check_ids(shards, id_column), "batch_rows": batch_rows}
    causes = {"scorer": scorer.key, "settings": settings, "shards": len(shards)}
    work = ShardWork(local_folder("output_dir", output_dir), shards, scorer, causes)
    work.check_others()
    return work


def _checked(files: Any) -> list[str]:
    given = [files] if isinstance(files, str | os.PathLike) else instance("files", files, Iterable, "a list of paths")
    files = [os.fspath(instance("a file", file, (str, os.PathLike), "paths of Parquet files")) for file in given]
    if not files or len({same_file(file) for file in files}) < len(files):
        raise ValueError(f"files={files}: pass one file or more, and each of them once")
    return files


class ShardWork:
    """Shards, where their scores go, and what these follow from."""

    def __init__(self, folder: Path, shards: list[Shard], scorer: RowScorer, causes: dict[str, Any]) -> None:
        self.folder, self.shards, self.scorer, self.causes = folder, shards, scorer, causes

    def output(self, k: int) -> Path:
        return self.folder / f"scores-{k:05d}-of-{len(self.shards):05d}.parquet"

    def made_of(self, k: int) -> dict[str, Any]:
        shard = self.shards[k]
        return self.causes | {"file": shard.file, "rows": shard.rows, "size": shard.size, "mark": shard.mark}

    def check_others(self) -> None:
        """Refuse a folder with scores that are not these, or with files that are no scores and would be lost."""
        for file in sorted(self.folder.glob("scores-*.parquet")):
            found = read_causes(file)
            if found is None and _is_of_others(file):
                raise ValueError(
                    f"{file} was not written by score_shards, and would be taken for scores or overwritten; choose "
                    "another output_dir"
                )
            k = next((k for k in range(len(self.shards)) if self.output(k) == file), None)
            if found is None or (k is not None and found == self.made_of(k)):
                continue  # damaged ones are made again
            expected = self.causes | ({} if k is None else self.made_of(k))
            other = [name for name in expected if found.get(name) != expected[name]]
            changed = " (the file has changed since)" if other == ["mark"] else ""
            raise ValueError(
                f"{file} holds scores of another {' and '.join(other) or 'number of shards'}{changed}; choose another "
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
        if read_causes(output) != self.made_of(k):
            return False
        known = self._known().get(output.name)
        return known is None or known == digest(output)

    def _known(self) -> dict[str, str]:
        """The digests that the manifest holds; none where there is none, or it is damaged, as it is written anew."""
        try:
            return {one["file"]: one["sha256"] for one in self.manifest()["outputs"]}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return {}

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
        options = {"use_dictionary": False, "write_page_checksum": True}
        with pq.ParquetWriter(path, first.schema.with_metadata(notes), **options) as writer:
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
            scores = self.scorer.score_rows(as_dataset(batch), where=shard.file, first=row)
            scores = checked_scores(scores, len(batch), f"rows {row} to {row + len(batch) - 1} of {shard.file}")
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
        return read_json(self.folder / MANIFEST)


def read_causes(file: Path) -> dict[str, Any] | None:
    """What a table of scores was made of; None where there is none, or it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        causes = parsed(pq.read_schema(file).metadata[MADE_OF])
    except (FileNotFoundError, pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return None
    return causes if isinstance(causes, dict) else None


def _is_of_others(file: Path) -> bool:
    """Whether it is a table that was not written here; what is no table at all is a damaged one of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return MADE_OF not in (pq.read_metadata(file).metadata or {})
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return False


def as_dataset(batch: Any) -> Dataset:
    """A record batch as a data set, without columns of types that data sets do not know."""
    import pyarrow as pa
    from datasets.table import InMemoryTable

    known = [field.name for field in batch.schema if _is_known(field)]
    table = pa.Table.from_batches([batch])
    return Dataset(InMemoryTable(table if len(known) == batch.num_columns else table.select(known)))


def _is_known(field: Any) -> bool:
    import pyarrow as pa

    try:
        Features.from_arrow_schema(pa.schema([field]))
    except ValueError:
        return False
    return True


def checked_scores(scores: Any, rows: int, where: str) -> dict[str, Tensor]:
    """What a scorer gave for so many rows, as tensors; raises where it is not one number or vector a row."""
    instance("what score_rows returned", scores, Mapping, "scores by name, as tensors")
    if not scores or "row_id" in scores:
        raise ValueError(f"the scorer gives {sorted(scores)} for {where}; it must give scores, by names but 'row_id'")
    found = {name: as_numbers(values, f"{name!r} of the scorer") for name, values in scores.items()}
    for name, values in found.items():
        if values.ndim not in (1, 2) or len(values) != rows:
            raise ValueError(
                f"the scorer gives {name!r} of shape {tuple(values.shape)} for {where}; it must give one number, or "
                f"one vector, for each of {rows} rows"
            )
    return found


def arrow_column(values: Tensor) -> Any:
    """A tensor of one number, or of one vector, a row as an Arrow array."""
    import pyarrow as pa

    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if values.ndim == 1:
        return pa.array(values.numpy())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), values.shape[1])
