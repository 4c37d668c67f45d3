"""Model and data set cards, filled from the run."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard

from hf_effdl.files import write_whole
from hf_effdl.version import INSTALL


TEMPLATES = Path(__file__).parent / "templates"


def markdown_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; `columns` maps keys to headings, and a value that is missing is left blank."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) else ("" if value is None else str(value))

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_card(folder: str | os.PathLike[str], template: str, data: CardData, **fields: Any) -> Path:
    """Render a template of this package into `folder/README.md`, atomically; `install` in it is how to get us."""
    kind = DatasetCard if isinstance(data, DatasetCardData) else ModelCard
    card = kind.from_template(data, template_path=str(TEMPLATES / template), install=INSTALL, **fields)
    return write_whole(Path(folder) / "README.md", str(card))
