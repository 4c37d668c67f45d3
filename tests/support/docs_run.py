"""Runs the Python of README and docs, as a script: `python docs_run.py OUT PAGE... < START`, in the folder to work in.

A page's blocks run one after the other, and then every row of a table `| you want | call |` in what the first block
left. A page of the README's kind (`START` maps it to itself) has blocks that each begin from nothing; another begins
with what the first block of the page that `START` names left. OUT gets `{page: [[line, seconds, error], ...]}`.
"""

import json
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from transformers import set_seed


NAME = "your-name/"  # what docs call the reader on the Hub; the user of the loopback Hub is tester
TABLE = "| you want | call |"
ROW = re.compile(r"\| [^|]+ \| `([^`]+)` \|")


def rows(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of every row of the tables of calls, without their heads."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if inside and line.startswith("|") and not line.startswith("|---"):
            yield number, line
        inside = line == TABLE or (inside and line.startswith("|"))


class Page:
    """The examples of one page, and what its first block left."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8").replace(NAME, "tester/")
        local = Path("pages", *path.parts[-2:])
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_text(self.text, encoding="utf-8")
        self.document = Sybil(parsers=[PythonCodeBlockParser()]).parse(local)
        self.first: dict | None = None

    def blocks(self, alone: bool) -> Iterator[tuple[int, object]]:
        for example in self.document.examples():
            if alone:
                self.document.namespace.clear()
            yield example.line, example.evaluate
            if self.first is None:
                self.first = dict(self.document.namespace)

    def rows(self) -> Iterator[tuple[int, object]]:
        for number, line in rows(self.text):
            call, start = ROW.fullmatch(line)[1], self.document.namespace if self.first is None else self.first
            yield number, lambda code=call, start=start: exec(compile(code, "row", "exec"), dict(start))


def outcome(run: object) -> tuple[float, str | None]:
    start = time.process_time()
    try:
        run()
    except Exception:  # noqa: BLE001 - every example is to be run and reported
        return time.process_time() - start, traceback.format_exc(limit=-6)
    return time.process_time() - start, None


def main() -> None:
    torch.set_num_threads(1)
    matplotlib.use("agg")
    out, *names = sys.argv[1:]
    starts, pages, results = json.load(sys.stdin), {}, {}
    for name in names:
        page, start = Page(Path(name)), starts.get(name)
        if start not in (None, name):
            page.document.namespace.update(pages[start].first)
        pages[name], results[name] = page, []
        set_seed(0)
        for examples in (page.blocks(alone=start == name), page.rows()):
            results[name] += [[line, *outcome(run)] for line, run in examples]
    Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
