"""The card of a ticket."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_effdl.hub.cards import markdown_table, write_card
from hf_effdl.structure.training.card import CITATION
from hf_effdl.version import __version__


CARD = "README.md"


def write_ticket_card(ticket: Any, folder: Path, repo_id: str, steps: list[int]) -> None:
    """Write the card of a ticket whose weights of some steps are stored beside it."""
    report = ticket.report()
    units = [{"group": f"`{name}`", **sizes} for name, sizes in report["units"].items()]
    write_card(
        folder,
        "ticket_card.md",
        ModelCardData(library_name="hf_effdl", tags=["hf_effdl", "split-lbi", "ticket"]),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        ticket=ticket,
        steps=steps,
        report=report,
        units=markdown_table(units, {"group": "group", "before": "units", "after": "kept"}),
        citation=CITATION,
        last=next((row for row in reversed(ticket.distances) if row["distance"] is not None), None),
        version=__version__,
    )
