"""Rows of results: one JSON object per line of a file, appended as they come, and what is said of several of them.

A benchmark reads the rows that are there, makes those that are missing, and prints its table from all of them. A run
that is killed while it writes leaves a line without an end; it is left out when rows are read, and the next row starts
on a line of its own.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict]:
    """All rows of a file, none where there is no file; a line that was cut when its run was killed is none."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"left out: a cut line of {len(line)} characters in {file}", file=sys.stderr)
    return rows


def append_rows(file: Path, rows: Iterable[Mapping]) -> None:
    """Adds rows in one write, which is on the disk when this returns; makes the folder."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            text = text if out.read() == b"\n" else b"\n" + text  # the line before was cut
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


class RowFile:
    """The rows of a file, which grow with it; a row is found by the values of some of its keys.

    Args:
        file: may not be there yet.
        keys: names of the values that tell rows apart; a row that lacks one has None there.
        fixed: only rows with these values count as done.
    """

    def __init__(self, file: Path, keys: Sequence[str], fixed: Mapping[str, Any] | None = None) -> None:
        self.file, self.keys, self.fixed = file, tuple(keys), dict(fixed or {})
        self.rows = read_rows(file)
        self.done = {self.key_of(row) for row in self.rows if self.is_ours(row)}

    def is_ours(self, row: Mapping) -> bool:
        return all(row.get(name) == value for name, value in self.fixed.items())

    def key_of(self, row: Mapping) -> tuple:
        return tuple(row.get(name) for name in self.keys)

    def __contains__(self, key: tuple) -> bool:
        return tuple(key) in self.done

    def add(self, *rows: dict, hide: Sequence[str] | None = None) -> None:
        """Appends rows; says each on stderr but for the values in `hide`, or says nothing where that is None."""
        append_rows(self.file, rows)
        self.rows += rows
        self.done |= {self.key_of(row) for row in rows if self.is_ours(row)}
        for row in rows if hide is not None else ():
            shown = {name: value for name, value in row.items() if name not in hide}
            print(json.dumps(shown), file=sys.stderr, flush=True)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; not a number where there are too few values."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return (statistics.mean(values) if values else float("nan")), error


def machine() -> dict[str, Any]:
    """What a row says of where and when it was measured."""
    import torch  # not by those that measure the memory of a process

    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """What every benchmark with rows and a table is told; `name` is that of its file of rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"runs/benchmarks/{name}.jsonl"), help="file of the rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of the rows so far")
    return parser
