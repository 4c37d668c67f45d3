"""The card of a folder: what is there, or made from what the files say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_effdl.files import read_json
from hf_effdl.hub.cards import markdown_table, write_card
from hf_effdl.structure.groups.record import listed, named
from hf_effdl.structure.slim.report import checked_report
from hf_effdl.version import __version__
from hf_effdl.vicl.remote_code.configuration_visual_in_context import VisualInContextConfig


CARD = "README.md"
IN_CONTEXT = VisualInContextConfig.model_type


def write_slim_card(
    folder: str | Path, base_model: str | None = None, dataset: str | None = None, repo_id: str | None = None
) -> Path:
    """The card of a slim model that was made without a trainer, from the report in its config.

    Args:
        folder: of the checkpoint; gets `README.md`.
        base_model: what it was made of.
        dataset: where its calibration rows are from.
        repo_id: for the snippet; default: the folder's name.
    """
    folder = Path(folder)
    config = named(read_json(folder / "config.json"), "config.json")
    report = checked_report(config.get("effdl_report"))
    if report is None:
        raise ValueError(f"{folder / 'config.json'} has no effdl_report, so it is no slim model of this package")
    names = {"params": "parameters", "macs": "multiply-accumulates", "latency_ms": "latency, ms"}
    sizes = [{"what": text, **report[key]} for key, text in names.items() if key in report]
    units = [{"group": f"`{name}`", **size} for name, size in report.get("units", {}).items()]
    hub = base_model if base_model and not Path(base_model).exists() else None
    return write_card(
        folder,
        "slim_card.md",
        ModelCardData(library_name="transformers", tags=["hf_effdl", "slim"], base_model=hub),
        title=(repo_id or folder.name).split("/")[-1],
        repo_id=repo_id or folder.name,
        kind=next(iter(listed(config.get("architectures") or ["model"], "architectures"))),
        base_model=base_model and Path(base_model).name if hub is None else hub,
        dataset=dataset and Path(dataset).name,
        needs_us="quantization_config" in config,
        sizes=markdown_table(sizes, {"what": "", "before": "before", "after": "after", "ratio": "ratio"}),
        units=markdown_table(units, {"group": "group", "before": "units", "after": "kept"}),
        calibration=report.get("calibration"),
        version=__version__,
    )


def _pool(folder: Path) -> None:
    from hf_effdl.vicl.pool.card import write_pool_card
    from hf_effdl.vicl.pool.pool import ExamplePool

    write_pool_card(folder, ExamplePool.from_pretrained(folder).manifest)


def _ticket(folder: Path) -> None:
    from hf_effdl.structure.tickets.card import write_ticket_card
    from hf_effdl.structure.tickets.ticket import Ticket

    ticket = Ticket.from_pretrained(folder)
    write_ticket_card(ticket, folder, folder.name, sorted(ticket.weights))


def _selection(folder: Path) -> None:
    from hf_effdl.samples.selection.selection import Selection

    for file in sorted(folder.glob("*/selection.json")):
        Selection.load(folder, file.parent.name).save(folder, file.parent.name, card=True)


def _pipeline(folder: Path) -> None:
    from hf_effdl.vicl.remote_code.pipeline_card import write_model_card
    from hf_effdl.vicl.remote_code.pipeline_visual_in_context import VisualInContextPipeline

    pipe = VisualInContextPipeline(str(folder))
    write_model_card(folder, pipe.model.config, pipe.pool)


def _is_pipeline(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and named(read_json(file), file.name).get("model_type") == IN_CONTEXT


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "pool": (lambda folder: (folder / "pool.json").is_file(), _pool),
    "ticket": (lambda folder: (folder / "ticket.json").is_file(), _ticket),
    "selection": (lambda folder: any(folder.glob("*/selection.json")), _selection),
    "pipeline": (_is_pipeline, _pipeline),
    "slim model": (lambda folder: (folder / "config.json").is_file(), write_slim_card),
}


def kind_of(folder: Path) -> str | None:
    """What a folder holds, by its files."""
    return next((kind for kind, (is_one, _) in KINDS.items() if is_one(folder)), None)


def show_or_write(folder: Path, write: bool) -> None:
    """Print the card of a folder; made from its files first, where that is asked for."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; set --folder")
    card, kind = folder / CARD, kind_of(folder)
    if write:
        if kind is None:
            raise ValueError(f"{folder} holds nothing of this package: a {', a '.join(KINDS)} would have a card")
        KINDS[kind][1](folder)
    elif not card.is_file():
        more = f"; it holds a {kind}, whose card --write makes" if kind else ", nor anything of this package"
        raise FileNotFoundError(f"{folder} has no {CARD}{more}")
    print(card.read_text(encoding="utf-8"))
