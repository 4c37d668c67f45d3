"""What a growing run did: one row per round and group, the training cost so far, a table and a picture."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


CLOCKS = ("runtime", "per_second", "preparation_time")
BACKWARD = 3  # a training step costs about three forward passes
NOT_METRICS = ("round", "step", "group", "from", "to", "support", "macs", "params", "training_macs")

Row = dict[str, Any]


def by_round(history: Iterable[Row]) -> list[list[Row]]:
    """The rows of every round, in order."""
    rounds: dict[int, list[Row]] = {}
    for row in history:
        rounds.setdefault(row["round"], []).append(row)
    return [rounds[number] for number in sorted(rounds)]


def grew(rows: Iterable[Row]) -> dict[str, int]:
    """New units by group in one round; groups that stayed are left out."""
    return {row["group"]: row["to"] - row["from"] for row in rows if row["to"] > row["from"]}


def rounds_without_growth(history: Iterable[Row]) -> int:
    """How many of the last rounds went by without growth."""
    count = 0
    for rows in reversed(by_round(history)):
        if grew(rows):
            break
        count += 1
    return count


def metrics_at(log: Iterable[Mapping[str, Any]], step: int) -> dict[str, float]:
    """What the evaluation at a step found, without its clocks: `eval_loss` as `loss`."""
    found = {}
    for entry in log:
        if entry.get("step") == step:
            found |= {
                key.removeprefix("eval_"): value
                for key, value in entry.items()
                if key.startswith("eval_") and not any(clock in key for clock in CLOCKS)
            }
    return found


def training_macs(history: Sequence[Row], step: int, seed_macs: int, rows_seen: Callable[[int], int]) -> int:
    """Multiply-accumulates of all training up to a step, `sum(3 MACs of the net at the time x rows)`.

    Args:
        history: rows of rounds before or at the step count.
        step: optimizer steps taken.
        seed_macs: of one input row, before any growth.
        rows_seen: rows that training went through in so many steps.
    """
    total, macs, seen = 0, seed_macs, 0
    for row in (rows[0] for rows in by_round(history) if rows[0]["step"] <= step):
        total, macs, seen = row["training_macs"], row["macs"], rows_seen(row["step"])
    return total + BACKWARD * macs * (rows_seen(step) - seen)


def growth_curve(
    history: Sequence[Row], log: Iterable[Mapping[str, Any]], seed_macs: int, rows_seen: Callable[[int], int]
) -> list[dict[str, float]]:
    """Every evaluation of a run with what training had cost by then: `{"step", "training_macs", "loss", ...}`."""
    log = list(log)
    steps = dict.fromkeys(entry["step"] for entry in log if any(key.startswith("eval_") for key in entry))
    return [
        {"step": step, "training_macs": training_macs(history, step, seed_macs, rows_seen), **metrics_at(log, step)}
        for step in steps
    ]


def growth_table(history: Sequence[Row]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One line per round for a card, and the headings of its columns."""
    lines = []
    for rows in by_round(history):
        first = rows[0]
        names = {row["group"]: row for row in rows if row["to"] > row["from"]}
        widths = ", ".join(
            f"`{name}` {row['from']} → {row['to']}"
            + (f" ({row['support']:.0%})" if row["support"] is not None else "")
            for name, row in names.items()
        )
        lines.append(
            {key: value for key, value in first.items() if key not in ("group", "from", "to", "support")}
            | {"growth": widths or "none"}
        )
    metrics = dict.fromkeys(key for line in lines for key in line if key not in (*NOT_METRICS, "growth"))
    columns = {
        "round": "round",
        "step": "step",
        "growth": "units (support before)",
        "macs": "MACs",
        "params": "parameters",
        "training_macs": "training MACs so far",
    }
    return lines, columns | {name: name for name in metrics}


def plot_growth(
    history: Sequence[Row], curve: Sequence[Mapping[str, float]] = (), dense: Sequence[Mapping[str, float]] = ()
) -> Any:
    """Left: units of every group over the steps. Right: accuracy against cumulative training MACs.

    Args:
        history: `trainer.history`.
        curve: `trainer.growth_curve`: points with `"training_macs"` and `"accuracy"` (else `"sparse_accuracy"`, else
            `"loss"`); default: the evaluations in the history.
        dense: points of the dense net, trained from the start, in the same form.

    Returns:
        A matplotlib Figure; needs `pip install hf_effdl[plot]`.

    Raises:
        ValueError: for an empty history.

    Example:
        >>> plot_growth(trainer.history, trainer.growth_curve).savefig("growth.png")  # doctest: +SKIP
    """
    if not history:
        raise ValueError("the growth history is empty: the run has had no growth round yet, so there is no picture")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting growth needs matplotlib: pip install hf_effdl[plot]") from error
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_widths(left, history, max((point["step"] for point in curve if "step" in point), default=0))
    points = list(curve) or [dict(rows[0]) for rows in by_round(history)]
    metric = next(
        (name for name in ("accuracy", "sparse_accuracy", "loss") if any(name in point for point in points)), None
    )
    for name, values, style in (("growing", points, "o-"), ("dense from the start", dense, "s--")):
        pairs = [(point["training_macs"], point[metric]) for point in values if metric in point]
        if pairs:
            right.plot(
                *zip(*pairs, strict=True), style, ms=3.5, label=name, color={"o-": "#d1495b"}.get(style, "#2b4c7e")
            )
    right.set_xlabel("multiply-accumulates of training so far (3 per forward MAC and row)")
    title = "No evaluation in this run" if metric is None else f"{metric.replace('_', ' ').capitalize()} against cost"
    right.set_title(title, loc="left", fontsize=11)
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    for axis in (left, right):
        for spine in ("top", "right"):
            axis.spines[spine].set_visible(False)
    return figure


def _plot_widths(axis: Any, history: Sequence[Row], end: int) -> None:
    """Units over steps; groups of the same history share a line."""
    rounds = by_round(history)
    end = max(end, round(1.05 * rounds[-1][0]["step"]))
    lines: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for row in rounds[0]:
        steps = [(0, row["from"])]
        steps += [(r["step"], r["to"]) for rows in rounds for r in rows if r["group"] == row["group"]]
        lines.setdefault((*steps, (end, steps[-1][1])), []).append(row["group"])
    for steps, names in lines.items():
        label = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        axis.step(*zip(*steps, strict=True), where="post", label=label)
    axis.set_xlim(0, end)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("optimizer step")
    axis.set_title("Units per group", loc="left", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right")
