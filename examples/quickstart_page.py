"""The page that `quickstart.py` leaves: tables and pictures in plain HTML, with links relative to its folder."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .9rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; display: block; margin: 1rem 0; }
"""


class Page:
    """`index.html` of a folder, written anew with every section.

    Args:
        folder: of the page and of all it shows.
        title: its heading.
        text: its first paragraph.
    """

    def __init__(self, folder: Path, title: str, text: str) -> None:
        self.folder, self.title, self.parts = folder, title, [f"<p>{html.escape(text)}</p>"]

    def add(
        self,
        heading: str,
        text: str,
        rows: Sequence[Mapping[str, Any]] = (),
        columns: Mapping[str, str] | None = None,
        pictures: Mapping[str, str] | None = None,
        links: Mapping[str, str] | None = None,
    ) -> None:
        """A section: text, a table of some keys of `rows`, then pictures and links: what they show, and their file."""
        self.parts += [f"<h2>{html.escape(heading)}</h2>", f"<p>{html.escape(text)}</p>"]
        if columns:
            self.parts.append(table(rows, columns))
        for shows, file in (pictures or {}).items():
            shows = html.escape(shows)
            self.parts.append(f'<p>{shows}</p>\n<a href="{file}"><img src="{file}" alt="{shows}"></a>')
        if links:
            items = [f'<li><a href="{file}">{file}</a>: {html.escape(shows)}</li>' for shows, file in links.items()]
            self.parts += ["<ul>", *items, "</ul>"]
        self.save()

    def save(self) -> Path:
        head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(self.title)}</title>'
        body = "\n".join([f"<h1>{html.escape(self.title)}</h1>", *self.parts])
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "index.html"
        file.write_text(f"{head}\n<style>{STYLE}</style>\n{body}\n</html>\n", encoding="utf-8")
        return file


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns.values())
    lines = ("".join(cell(row.get(key)) for key in columns) for row in rows)
    return "<table>\n<tr>" + head + "</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{'' if value is None else html.escape(str(value))}</td>"
    return f'<td class="number">{value:,}</td>' if isinstance(value, int) else f'<td class="number">{value:.3f}</td>'
