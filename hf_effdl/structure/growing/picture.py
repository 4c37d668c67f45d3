"""The picture of a growing run, of plain values. Needs matplotlib (the extra `plot`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_effdl.pictures import CHOSEN, DARK, LINE, bare, figure, shades
from hf_effdl.structure.growing.history import Row, by_round, grew
from hf_effdl.structure.path.picture import short_names


METRICS = ("accuracy", "sparse_accuracy", "loss")
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
Steps = tuple[tuple[int, int], ...]  # optimizer step and units from there on


def plot_growth(
    history: Sequence[Row], curve: Sequence[Mapping[str, float]] = (), dense: Sequence[Mapping[str, float]] = ()
) -> Any:
    """Left: units of every group over the steps. Right: accuracy against cumulative training MACs.

    Rounds in which something grew are dotted lines in both.

    Args:
        history: `trainer.history`.
        curve: `trainer.growth_curve`: points with `"training_macs"` and `"accuracy"` (else `"sparse_accuracy"`, else
            `"loss"`); default: the evaluations in the history.
        dense: points of the dense net, trained from the start, in the same form.

    Returns:
        A matplotlib Figure; needs matplotlib (the extra `plot`).

    Raises:
        ValueError: for an empty history.

    Example:
        >>> plot_growth(trainer.history, trainer.growth_curve).savefig("growth.png")  # doctest: +SKIP
    """
    if not history:
        raise ValueError("the growth history is empty: the run has had no growth round yet, so there is no picture")
    picture = figure(13, 4.6)
    left, right = picture.subplots(1, 2)
    bare(left, right)
    rounds = by_round(history)
    points = list(curve) or [dict(rows[0]) for rows in rounds]
    _plot_widths(left, rounds, max((point["step"] for point in points if "step" in point), default=0))
    _plot_cost(right, rounds, points, dense)
    return picture


def _plot_widths(axis: Any, rounds: Sequence[Sequence[Row]], end: int) -> None:
    """Units over steps; groups of the same history share a line, the widest at the end first in the legend."""
    end = max(end, round(1.05 * rounds[-1][0]["step"]))
    lines: dict[Steps, list[str]] = {}
    for row in rounds[0]:
        sizes = [(r["step"], r["to"]) for rows in rounds for r in rows if r["group"] == row["group"]]
        lines.setdefault(((0, row["from"]), *sizes), []).append(row["group"])
    names = short_names(row["group"] for row in rounds[0])
    order = sorted(lines, key=lambda steps: -steps[-1][1])
    for steps, colour in zip(order, shades(len(order)), strict=True):
        places, sizes = zip(*steps, (end, steps[-1][1]), strict=True)
        label = names[lines[steps][0]] + (f" and {len(lines[steps]) - 1} more" if len(lines[steps]) > 1 else "")
        seen = " → ".join(str(size) for size in dict.fromkeys(sizes))
        axis.step(places, sizes, where="post", color=colour, lw=2, label=f"{label}: {seen}")
    _mark_rounds(axis, rounds, "step")
    axis.set_xlim(0, end)
    axis.set_ylim(0, order[0][-1][1] * (1.1 + 0.07 * len(order)))  # the legend stands above the lines
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("units")
    axis.set_title("Units per group", loc="left", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", framealpha=0.9)


def _plot_cost(
    axis: Any, rounds: Sequence[Sequence[Row]], points: Sequence[Mapping[str, float]], dense: Sequence[Mapping]
) -> None:
    metric = next((name for name in METRICS if any(name in point for point in points)), None)
    size, prefix = _unit_of([point["training_macs"] for point in (*points, *dense)])
    for values, label, style, colour in (
        (points, "growing", "o-", CHOSEN),
        (dense, "dense from the start", "s--", LINE),
    ):
        pairs = [(point["training_macs"] / size, point[metric]) for point in values if metric in point]
        if pairs:
            axis.plot(*zip(*pairs, strict=True), style, ms=3.5, label=label, color=colour)
    _mark_rounds(axis, rounds, "training_macs", size)
    axis.set_xlabel(f"cost of training so far, {prefix}MACs (3 per forward MAC and row)")
    words = "no evaluation in this run" if metric is None else metric.replace("_", " ")
    axis.set_ylabel(words)
    axis.set_title(words.capitalize() + ("" if metric is None else " against cost"), loc="left", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _unit_of(values: Sequence[float]) -> tuple[float, str]:
    """The largest unit that is no larger than the largest value."""
    largest = max(values, default=0)
    return next(((size, prefix) for size, prefix in UNITS if largest >= size), (1, ""))


def _mark_rounds(axis: Any, rounds: Sequence[Sequence[Row]], key: str, size: float = 1) -> None:
    """A dotted line at every round in which something grew."""
    places = [rows[0][key] / size for rows in rounds if grew(rows)]
    for i, place in enumerate(places):
        axis.axvline(place, color=DARK, ls=":", lw=1, label="growth" if i == 0 else None, zorder=1)
