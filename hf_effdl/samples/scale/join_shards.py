"""Scores, or a plan, beside the rows they belong to, shard by shard."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_effdl.checks import instance
from hf_effdl.files import filled_beside, locked
from hf_effdl.samples.scale.score_shards import read_causes
from hf_effdl.samples.scale.sources import Shard, check_ids, check_whole, local_folder, reader, same_file


BATCH = 4096


def join_shards(
    files: Sequence[str | os.PathLike],
    tables: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    id_column: str | None = "row_id",
) -> list[Path]:
    """Write rows with the columns that a table has for them: scores of all rows, or weights of those that a plan took.

    Source k meets table k. The rows of a table are some or all of the source's, in its order, as `score_shards` and
    `plan_shards` leave them; source rows that the table lacks are left out. A batch of both is held at a time.

    Args:
        files: the Parquet files of rows, as they were scored.
        tables: as many files with a column `row_id`, such as `sorted(Path(plan).glob("plan-*.parquet"))`.
        output_dir: gets `joined-k-of-n.parquet`, all of them or none; of two calls one comes after the other.
        id_column: of the rows; None, or no column `"row_id"`: their number, counted through all files.

    Returns:
        the files written.

    Raises:
        ValueError: for files that are no Parquet or not as many as tables, tables that are not what the manifest
            beside them says was written, columns that both have, rows of a table that its source does not have in
            this order, rows that are known by their number in another file or in one that was changed since, an
            `output_dir` with joined files of another number, or one that is read from.
        TypeError: for ids that are neither integers nor texts.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pyarrow as pa, pyarrow.parquet as pq
        >>> with TemporaryDirectory() as folder:
        ...     pq.write_table(pa.table({"text": ["a", "b", "c"]}), f"{folder}/rows.parquet")
        ...     pq.write_table(pa.table({"row_id": [0, 2], "weight": [1.0, 1.0]}), f"{folder}/plan.parquet")
        ...     files = join_shards([f"{folder}/rows.parquet"], [f"{folder}/plan.parquet"], f"{folder}/joined")
        ...     pq.read_table(files[0]).to_pydict()
        {'text': ['a', 'c'], 'row_id': [0, 2], 'weight': [1.0, 1.0]}
    """
    for name, given in (("files", files), ("tables", tables)):
        instance(name, given, (list, tuple), "a list of Parquet files")
    sources, others = ([Shard.open(file) for file in group] for group in (files, tables))
    if len(sources) != len(others) or not sources:
        raise ValueError(f"{len(sources)} files and {len(others)} tables; pass a table for each file, in order")
    id_column, folder = check_ids(sources, id_column), local_folder("output_dir", output_dir)
    for source, other in zip(sources, others, strict=True):
        check_whole(other.file)
        other.check_column("row_id")
        if both := sorted((set(source.columns) & set(other.columns)) - {id_column, "row_id"}):
            raise ValueError(f"{source.file} and {other.file} both have the columns {both}; rename them in one")
        _check_made_of(other.file, source, [one.file for one in sources], id_column)
    outputs = [folder / f"joined-{k:05d}-of-{len(sources):05d}.parquet" for k in range(len(sources))]
    _check_folder(folder, outputs, [one.file for one in (*sources, *others)])
    start = 0
    with locked(folder), filled_beside(folder) as scratch:  # all of them or none
        for source, other, output in zip(sources, others, outputs, strict=True):
            _Pair(source, other, id_column, start).write(scratch / output.name)
            start += source.rows
    return outputs


def _check_made_of(table: str, source: Shard, sources: Sequence[str], id_column: str | None) -> None:
    """Refuse a table whose scores say that they are of rows known otherwise, or of another file."""
    made = read_causes(Path(table)) or {}
    if not isinstance(settings := made.get("settings"), dict) or not isinstance(made.get("file"), str):
        return
    by = settings.get("id_column")
    if (by is None) != (id_column is None):
        known = "their number" if by is None else f"the column {by!r}"
        raise ValueError(f"{table} knows rows by {known}, as they were scored; pass id_column={by!r}")
    if by is not None:
        return
    scored, here = same_file(made["file"]), same_file(source.file)
    is_another = scored != here and scored in map(same_file, sources)
    is_changed = scored == here and (made.get("size"), made.get("mark")) != (source.size, source.mark)
    if is_another or is_changed or made.get("rows") != source.rows:
        how = ", which was changed since" if is_changed else ""
        raise ValueError(
            f"{table} knows rows by their number in {made['file']}, and meets {source.file}{how}: pass files as they "
            "were scored, in the same order, or score them anew with an id_column"
        )


def _check_folder(folder: Path, outputs: Sequence[Path], inputs: Sequence[str]) -> None:
    """Refuse to write over what is read, and beside joined files that are not written over."""
    if lost := {same_file(str(file)) for file in outputs} & {same_file(file) for file in inputs}:
        raise ValueError(f"{sorted(lost)[0]} is read and would be overwritten; choose another output_dir")
    if left := sorted(set(folder.glob("joined-*-of-*.parquet")) - set(outputs)):
        raise ValueError(
            f"{left[0]} is of another number of files, and would be read together with these; choose another "
            "output_dir, or remove it"
        )


class _Pair:
    """A shard of rows and the table that goes with it."""

    def __init__(self, source: Shard, other: Shard, id_column: str | None, start: int) -> None:
        self.source, self.other, self.id_column, self.start = source, other, id_column, start

    def write(self, path: Path) -> None:
        import pyarrow.parquet as pq

        with reader(self.source.file) as source, reader(self.other.file) as other:
            self.empty, rows = other.schema_arrow.empty_table(), source.schema_arrow.empty_table()
        with pq.ParquetWriter(path, _beside(rows, self.empty).schema) as writer:
            for table in self._joined():
                writer.write_table(table)

    def _joined(self) -> Iterator[Any]:
        """The rows that the table has, a batch of the source at a time."""
        import pyarrow as pa

        table = self._rows_of_table()
        waiting = next(table, None)
        for batch, ids in self._batches():
            taken, found = [], []
            for place, row_id in enumerate(ids):
                if waiting is not None and waiting[0] == row_id:
                    taken.append(place)
                    found.append(waiting[1])
                    waiting = next(table, None)
            rows = pa.Table.from_batches([batch]).take(pa.array(taken, pa.int64()))
            yield _beside(rows, pa.concat_tables(found) if found else self.empty)
        if waiting is not None:
            raise ValueError(
                f"{self.other.file} has the row {waiting[0]!r}, which {self.source.file} does not have there; pass "
                "the files that were scored, in the same order"
            )

    def _batches(self) -> Iterator[tuple[Any, list]]:
        row = self.start
        for batch in self.source.batches(BATCH):
            numbers = list(range(row, row + len(batch)))
            yield batch, numbers if self.id_column is None else batch.column(self.id_column).to_pylist()
            row += len(batch)

    def _rows_of_table(self) -> Iterator[tuple[Any, Any]]:
        import pyarrow as pa

        for batch in self.other.batches(BATCH):
            table = pa.Table.from_batches([batch])
            for i, row_id in enumerate(batch.column("row_id").to_pylist()):
                yield row_id, table.slice(i, 1)


def _beside(rows: Any, others: Any) -> Any:
    """A table with the columns of another that it lacks."""
    for name in others.column_names:
        if name not in rows.column_names:
            rows = rows.append_column(others.schema.field(name), others.column(name))
    return rows
