"""The card of scores of instruction data, or of the rows chosen by them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData
from torch import Tensor

from hf_effdl.hub.cards import markdown_table, write_card
from hf_effdl.samples.drawing.plan import Plan
from hf_effdl.version import __version__


QUANTILES = (0.05, 0.5, 0.95)


def write_language_card(
    folder: str | os.PathLike[str],
    table: Mapping[str, Tensor],
    plan: Plan | None,
    facts: Mapping[str, Any],
    left_out: Mapping[str, int] | None = None,
    *,
    repo_id: str | None = None,
    source: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> Path:
    """`README.md` of a data set of scores, or of chosen rows.

    Args:
        folder: gets the card.
        table: scores of the whole pool, `(N,)` each.
        plan: what was chosen; None: a card of the scores alone.
        facts: settings and probes, shown as they are.
        left_out: rows by what looked damaged in them.
        repo_id, source, license, tags: see `SFTScorer.write_card`.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.resolve().name
    data = {"tags": ["hf_effdl", "data-selection", "instruction-tuning", *tags]}
    data |= {"source_datasets": [source]} if source else {}
    counts = ", ".join(f"{count:,} {what}" for what, count in (left_out or {}).items() if count)
    return write_card(
        folder,
        "language_card.md",
        DatasetCardData(**data | ({"license": license} if license else {})),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        source=f"[{source}](https://huggingface.co/datasets/{source})" if source else "a data set that is not named",
        pool={"rows": len(table["tokens"])},
        chosen=None if plan is None else {"rows": len(plan), "how": _how(table, plan)},
        scores=_score_table(table, plan),
        recipe=dict(facts) | ({} if plan is None else _plan_facts(table, plan)),
        left_out=counts,
        version=__version__,
    )


def _how(table: Mapping[str, Tensor], plan: Plan) -> str:
    return f"method `{plan.settings['method']}`, {_chosen(table, plan):,} of {int(table['tokens'].sum()):,} tokens"


def _plan_facts(table: Mapping[str, Tensor], plan: Plan) -> dict[str, Any]:
    settings = plan.settings
    return {
        "method": f"`{settings['method']}`",
        "budget": f"{settings['budget']:,} {settings['unit']}",
        "chosen": f"{len(plan):,} rows, {_chosen(table, plan):,} tokens",
        "seed": settings["seed"],
    }


def _chosen(table: Mapping[str, Tensor], plan: Plan) -> int:
    """Tokens of the chosen rows."""
    return int(table["tokens"][plan.positions].sum())


def _score_table(table: Mapping[str, Tensor], plan: Plan | None) -> str:
    """5 %, 50 % and 95 % quantiles of every score, of all rows and of the chosen ones."""
    columns = {"score": "score", "all": "all rows: 5 %, median, 95 %"}
    columns |= {} if plan is None else {"chosen": "chosen rows"}
    rows = []
    for name, values in table.items():
        if values.ndim == 1:
            parts = {"all": values} | ({} if plan is None else {"chosen": values[plan.positions]})
            rows.append({"score": f"`{name}`"} | {key: _quantiles(part) for key, part in parts.items()})
    return markdown_table(rows, columns)


def _quantiles(values: Tensor) -> str:
    places = [min(len(values) - 1, round(q * (len(values) - 1))) for q in QUANTILES]
    ordered = values.double().sort().values
    return ", ".join(f"{ordered[place].item():.4g}" for place in places)
