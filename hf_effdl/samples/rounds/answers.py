"""Who labels the rows that are asked about."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_effdl.checks import instance, path
from hf_effdl.files import digest, locked, write_whole
from hf_effdl.samples.probes.inputs import check_dataset
from hf_effdl.samples.probes.row_marks import row_marks


PLACE = "row"


class ColumnAnswers:
    """Labels that the pool has already, for trying strategies out.

    Args:
        column: of the pool.
    """

    def __init__(self, column: str = "label") -> None:
        self.column = instance("column", column, str, "the name of a column")

    def __call__(self, rows: Dataset, places: Sequence[int], number: int) -> list[Any]:
        check_dataset(rows, [self.column], "the pool", "ColumnAnswers(column)")
        return rows.with_format(None)[self.column][:]


class CsvAnswers:
    """Labels from a person: a CSV file a round, to be filled in with any spreadsheet.

    `asked-0003.csv` has the columns `row`, those of the pool that are texts or numbers, and an empty `label`. As long
    as a label is empty the learner waits: `run` returns False, and goes on when it is called again. Rows may be sorted
    and columns added meanwhile, but `row` must stay.

    Args:
        folder: for the files.
        columns: of the pool, to be shown; default: all texts and numbers but `label_column`.
        label_column: name of the column to fill in.
    """

    def __init__(
        self, folder: str | os.PathLike, columns: Sequence[str] | None = None, label_column: str = "label"
    ) -> None:
        for name in instance(
            "columns", () if columns is None else columns, (list, tuple), "a list of names of columns"
        ):
            instance("columns", name, str, "a list of names of columns")
        self.folder, self.columns = path("folder", folder), columns
        self.label_column = instance("label_column", label_column, str, "the name of a column")

    def __call__(self, rows: Dataset, places: Sequence[int], number: int) -> list[str] | None:
        file = self.folder / f"asked-{number:04d}.csv"
        with locked(self.folder):  # a file that someone has begun to fill in is never written over
            self._ask(file, rows, places)
        answers = self._read(file, places)
        missing = [place for place in places if not answers[place]]
        if missing:
            print(f"{len(missing)} of {len(places)} labels are missing in {file}; fill in {self.label_column!r}")
            return None
        return [answers[place] for place in places]

    def _ask(self, file: Path, rows: Dataset, places: Sequence[int]) -> None:
        """Write the file unless it is there; the mark beside it tells rows of one place in two pools apart."""
        shown = [name for name in rows.column_names if name != self.label_column]
        mark, about = file.with_name(f".{file.name}.sha256"), digest(row_marks(rows, shown).numpy().tobytes())
        if not file.exists():
            write_whole(mark, about)
            self._write(file, rows, places)
        if mark.is_file() and mark.read_text() != about:  # files of earlier versions have none
            raise ValueError(
                f"{file} asks about rows of another pool, or of this one before it was changed: pass a folder of its "
                "own for every pool, or remove the file to ask again"
            )

    def _write(self, file: Path, rows: Dataset, places: Sequence[int]) -> None:
        columns = self.columns
        if columns is None:
            kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items()}
            columns = [name for name, kind in kinds.items() if kind in ("string", "large_string") or "int" in kind]
            columns = [name for name in columns if name != self.label_column]
        check_dataset(rows, columns, "the pool", "CsvAnswers(columns)")
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow([PLACE, *columns, self.label_column])
        shown = [rows[name][:] for name in columns]
        writer.writerows([place, *values, ""] for place, *values in zip(places, *shown, strict=True))
        write_whole(file, "\ufeff" + text.getvalue())  # by this mark spreadsheets know UTF-8

    def _table(self, file: Path) -> list[dict[str, str]]:
        """The rows of a CSV file, whichever comma and encoding the spreadsheet of a country writes."""
        content = file.read_bytes()
        try:
            text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error}); save it as 'CSV UTF-8'") from error
        for comma in (",", ";", "\t"):
            try:
                rows = list(csv.DictReader(io.StringIO(text, newline=""), restval="", delimiter=comma))
            except csv.Error as error:
                raise ValueError(f"{file} is no table ({error}); remove it to ask again") from error
            if rows and {PLACE, self.label_column} <= set(rows[0]):
                return rows
        raise ValueError(f"{file} must have the columns {PLACE!r} and {self.label_column!r}; remove it to ask again")

    def _read(self, file: Path, places: Sequence[int]) -> dict[int, str]:
        rows = self._table(file)
        found = {row[PLACE].strip(): (row[self.label_column] or "").strip() for row in rows}
        if len(found) < len(rows) or set(found) != {str(place) for place in places}:
            raise ValueError(
                f"{file} does not have the {len(places)} rows that were asked about, each once, in column {PLACE!r}; "
                "put them back, or remove it to ask again"
            )
        return {int(place): label for place, label in found.items()}


def checked_labels(labels: Any, count: int, before: Sequence[Any] = ()) -> list[Any]:
    """Labels as plain values: whole numbers, texts, or lists of whole numbers, all of one kind.

    Args:
        labels: what was answered.
        count: rows that were asked about.
        before: a label of an earlier round, if there is one.

    Raises:
        ValueError, TypeError: for anything else.
    """
    if isinstance(labels, str | bytes | Mapping) or not isinstance(labels, Iterable):
        raise TypeError(f"answers gave a {type(labels).__name__}; give a list with a label for each row, or None")
    labels = [label.tolist() if hasattr(label, "tolist") else label for label in labels]
    if len(labels) != count or any(label is None for label in labels):
        raise ValueError(f"answers gave {len(labels)} labels for {count} rows; give one for each, or None")
    kinds = {_kind(label) for label in [*before, *labels]}
    if None in kinds or len(kinds) > 1:
        shown = next((label for label in labels if _kind(label) is None), labels[0])
        raise TypeError(
            f"answers gave {shown!r} among the labels; give classes that are all whole numbers or all texts, as in "
            "the rounds before, or a list of whole numbers for each row"
        )
    return labels


def _kind(label: Any) -> type | None:
    """What a label is; None for what cannot be one."""
    if isinstance(label, list):
        return list if all(isinstance(one, int | float) and one % 1 == 0 for one in label) else None
    return int if isinstance(label, int) else str if isinstance(label, str) else None
