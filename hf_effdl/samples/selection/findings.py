"""Readings of a selection that its report, its card and its pictures share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_effdl.samples.drawing.presets import table_noise
from hf_effdl.samples.selection.rows import SelectedRows


# The released code's two constants: below the first all probes are sure, above the second it damps a row.
SURE, DAMPED = 0.005, 0.1
# Classes that a table or a picture shows.
SHOWN_CLASSES = 30
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def mode_of(selection: SelectedRows) -> str:
    """`"coreset"` or `"active"`."""
    return selection.info.get("mode") or ("coreset" if "label" in selection.table else "active")


def class_name(selection: SelectedRows, place: int) -> str:
    """The name of a class, or its number."""
    names = selection.names or []
    return names[place] if 0 <= place < len(names) else str(place)


def row_name(selection: SelectedRows, position: int) -> int | str:
    """The row's id, or its place."""
    return position if selection.row_ids is None else _plain(selection.row_ids[position])


def uncertainty_column(selection: SelectedRows) -> str | None:
    """The kind of uncertainty that the plan drew by; else the one that needs no label."""
    wanted = selection.plan.settings.get("score")
    names = ([wanted] if wanted in ("u_x", "u_y") else []) + ["u_x", "u_y"]
    return next((name for name in names if name in selection.table), None)


def drawing_score(selection: SelectedRows) -> tuple[Tensor | None, str | None]:
    """The column that rows were drawn by, and its name; the uncertainty where the draw was uniform."""
    name = selection.plan.settings.get("score")
    name = name if name in selection.table else uncertainty_column(selection)
    return (None if name is None else selection.table[name].float()), name


def clip_value(selection: SelectedRows) -> float | None:
    """The value at which the drawing score was capped."""
    settings, (scores, name) = selection.plan.settings, drawing_score(selection)
    if scores is None or settings.get("score") != name or settings.get("quotas") == "strata":
        return None
    if settings.get("clip_quantile") is not None:
        return float(np.quantile(scores.numpy(), settings["clip_quantile"]))
    return settings.get("clip")


def kept_by_filter(selection: SelectedRows) -> Tensor | None:
    """`(N,)` mask of the rows that the regime's filter keeps; None if it has none."""
    table, settings = selection.table, selection.plan.settings
    if settings.get("preset") != "default" or mode_of(selection) == "active":
        return None
    if settings.get("regime") == "agreement" and {"label", "predicted"} <= set(table):
        return table["label"] == table["predicted"]
    if settings.get("regime") in ("clipped", "unclipped") and "p_clean" in table:
        return table["p_clean"] >= 0.5
    return None


def capped_share(selection: SelectedRows) -> float | None:
    """See `SelectionReport.capped`."""
    scores, clip = drawing_score(selection)[0], clip_value(selection)
    return None if clip is None else (scores >= clip).double().mean().item()


def refilled_rows(selection: SelectedRows) -> int | None:
    """See `SelectionReport.refilled`."""
    kept = kept_by_filter(selection)
    return None if kept is None else int((~kept[selection.plan.positions]).sum())


def agreement(selection: SelectedRows) -> float | None:
    """See `SelectionReport.agreement`."""
    table = selection.table
    if not {"label", "predicted"} <= set(table):
        return None
    return (table["label"] == table["predicted"]).double().mean().item()


def noise_of(selection: SelectedRows) -> float | None:
    """See `SelectionReport.noise_rate`."""
    noise = selection.plan.settings.get("noise_rate")
    if noise is None and {"label", "predicted", "confidence", "p_clean"} <= set(selection.table):
        return table_noise(selection.table)
    return noise


def suspect_positions(selection: SelectedRows) -> Tensor | None:
    """Rows with `p_clean < 1/2`, the least likely label first; None without labels."""
    if mode_of(selection) == "active" or not {"p_clean", "p_label"} <= set(selection.table):
        return None
    suspects = (selection.table["p_clean"] < 0.5).nonzero().flatten()
    return suspects[selection.table["p_label"][suspects].argsort(stable=True)]


def class_counts(selection: SelectedRows) -> list[dict[str, Any]]:
    """See `SelectionReport.classes`."""
    table, chosen = selection.table, selection.plan.positions
    column = next((table[name].long() for name in ("label", "predicted") if name in table), None)
    if column is None:
        return []
    size = max(len(selection.names or []), int(column.max()) + 1)
    kept = kept_by_filter(selection)
    everything = torch.ones_like(column, dtype=torch.bool)
    inside = torch.zeros_like(everything).index_fill(0, chosen, True)
    # negative classes mark rows without a label
    pool, passed, selected = (
        [None] * size if mask is None else column[mask & (column >= 0)].bincount(minlength=size).tolist()
        for mask in (everything, kept, inside)
    )
    return [
        {
            "class": class_name(selection, c),
            "pool": pool[c],
            "kept": passed[c],
            "selected": selected[c],
            "share": selected[c] / pool[c] if pool[c] else None,
        }
        for c in range(size)
    ]


def most_changed(classes: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Places of the classes whose share of all rows differs most before and after, the largest change first."""
    rows, selected = (sum(row[key] for row in classes) for key in ("pool", "selected"))
    change = [abs(row["selected"] / selected - row["pool"] / rows) for row in classes]
    return sorted(range(len(classes)), key=lambda c: -change[c])[:count]


def describe_row(selection: SelectedRows, position: int) -> dict[str, Any]:
    """See `SelectionReport.suspects`; what is not known is None."""
    table = selection.table
    numbers = {name: table[name][position].item() if name in table else None for name in ("p_label", "p_clean")}
    classes = {
        key: class_name(selection, int(table[name][position])) if name in table else None
        for key, name in (("label", "label"), ("vote", "predicted"))
    }
    return {"row_id": row_name(selection, position), **classes, **numbers}


def describe_rows(selection: SelectedRows, positions: Sequence[int]) -> list[dict[str, Any]]:
    """`describe_row` of several, and whether each was selected."""
    chosen = set(selection.plan.positions.tolist())
    return [describe_row(selection, i) | {"selected": i in chosen} for i in positions]


def spread(selection: SelectedRows) -> dict[str, Any] | None:
    """See `SelectionReport.uncertainty`."""
    name = uncertainty_column(selection)
    if name is None:
        return None
    values = selection.table[name].double().numpy()
    return {
        "column": name,
        f"below_{SURE}": float((values < SURE).mean()),
        f"above_{DAMPED}": float((values > DAMPED).mean()),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)},
    }


def _plain(value: Any) -> int | str:
    return value.item() if hasattr(value, "item") else value
