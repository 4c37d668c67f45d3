"""Who labels the rows that are asked about."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_effdl.checks import path
from hf_effdl.files import write_whole


PLACE = "row"


class ColumnAnswers:
    """Labels that the pool has already, for trying strategies out.

    Args:
        column: of the pool.
    """

    def __init__(self, column: str = "label") -> None:
        self.column = column

    def __call__(self, rows: Dataset, places: Sequence[int], number: int) -> list[Any]:
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
        self.folder, self.columns, self.label_column = path("folder", folder), columns, label_column

    def __call__(self, rows: Dataset, places: Sequence[int], number: int) -> list[str] | None:
        file = self.folder / f"asked-{number:04d}.csv"
        if not file.exists():
            self._write(file, rows, places)
        answers = self._read(file, places)
        missing = [place for place in places if not answers[place]]
        if missing:
            print(f"{len(missing)} of {len(places)} labels are missing in {file}; fill in {self.label_column!r}")
            return None
        return [answers[place] for place in places]

    def _write(self, file: Path, rows: Dataset, places: Sequence[int]) -> None:
        columns = self.columns
        if columns is None:
            kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items()}
            columns = [name for name, kind in kinds.items() if kind in ("string", "large_string") or "int" in kind]
            columns = [name for name in columns if name != self.label_column]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow([PLACE, *columns, self.label_column])
        for place, row in zip(places, rows.select_columns(list(columns)), strict=True):
            writer.writerow([place, *(row[name] for name in columns), ""])
        write_whole(file, "\ufeff" + text.getvalue())  # by this mark spreadsheets know UTF-8

    def _read(self, file: Path, places: Sequence[int]) -> dict[int, str]:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened, restval=""))
        if not rows or not {PLACE, self.label_column} <= set(rows[0]):
            raise ValueError(
                f"{file} must have the columns {PLACE!r} and {self.label_column!r}; remove it to ask again"
            )
        found = {row[PLACE].strip(): (row[self.label_column] or "").strip() for row in rows}
        if len(found) < len(rows) or set(found) != {str(place) for place in places}:
            raise ValueError(
                f"{file} does not have the {len(places)} rows that were asked about, each once, in column {PLACE!r}; "
                "put them back, or remove it to ask again"
            )
        return {int(place): label for place, label in found.items()}
