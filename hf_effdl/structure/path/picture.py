"""The picture of a path, of plain values. Needs matplotlib (the extra `plot`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_effdl.pictures import CHOSEN, LINE, OTHER, bare, figure


LONGEST = 34  # characters of a group's name


def plot_path(
    units: Mapping[str, Mapping[str, Tensor]],
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    step: int,
    curve: Sequence[Mapping[str, float]],
    words: tuple[str, str],
    start: str = "empty",
) -> Any:
    """See `SparsePath.plot`.

    Args:
        units: see `SparsePath`.
        scores: by group; the unit of the highest is drawn first.
        kept: indices in the first colour by group; groups not named are in it whole.
        step: the last one.
        curve: measured points; none: no right panel.
        words: what the two colours mean.
        start: see `SparsePath`.
    """
    from matplotlib.lines import Line2D

    height = min(14.0, 1.6 + 0.42 * len(scores))
    picture = figure(13 if curve else 9, max(height, 4))
    axes = picture.subplots(1, 2 if curve else 1, width_ratios=[2, 1] if curve else [1], squeeze=False)[0]
    bare(*axes)
    left, names = axes[0], short_names(scores)
    for row, (name, score) in enumerate(scores.items()):
        chosen = set(kept[name].tolist() if name in kept else range(len(score)))
        names[name] += f"  ({len(chosen)}/{len(score)})"
        _draw_group(left, row, units[name], score, chosen, max(step, 1))
    left.set_yticks(range(len(scores)), list(names.values()), fontsize=8)
    left.set_ylim(len(scores) - 0.5, -0.5)
    left.set_xlim(0, max(step, 1) * 1.01)
    left.set_xlabel("optimizer step (a bar is one unit, from its entry to its exit)")
    event = "entered" if start == "empty" else "left"
    left.set_title(f"When each unit {event} the support", loc="left", fontsize=11)
    colours = [Line2D([], [], color=colour, lw=4) for colour in (CHOSEN, OTHER)]
    # above the axes: bars may be anywhere inside
    left.legend(colours, words, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, fontsize=8, frameon=False)
    if curve:
        _plot_curve(axes[1], curve)
    return picture


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names of groups for a picture: without what all begin with, and without "convolution" and "weight"."""
    parts = {name: [part for part in name.split(".") if part not in ("convolution", "weight")] for name in names}
    shared = _shared_start(list(parts.values()))
    return {name: _cut(".".join(path[shared:]) or name) for name, path in parts.items()}


def _shared_start(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths begin with; one is left of every path."""
    shared, most = 0, min(map(len, paths), default=0) - 1
    while shared < most and len({path[shared] for path in paths}) == 1:
        shared += 1
    return shared


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]


def _draw_group(axis: Any, row: int, unit: Mapping[str, Tensor], score: Tensor, chosen: set[int], end: int) -> None:
    """One bar per unit, the best on top; where bars touch, the chosen ones lie over the others."""
    step = 0.84 / len(score)
    entered, left = unit["entered"].tolist(), unit["left"].tolist()
    for place, i in enumerate(score.argsort(descending=True, stable=True).tolist()):
        y = row - 0.42 + step * (place + 0.5)
        if entered[i] >= 0:
            colour, order = (CHOSEN, 3) if i in chosen else (OTHER, 2)
            times = [entered[i], end if left[i] < 0 else left[i]]
            axis.plot(times, [y, y], color=colour, lw=max(0.6, 26 * step), zorder=order, solid_capstyle="butt")
        elif i in chosen:  # kept although it never entered
            axis.plot([end], [y], marker=".", color=CHOSEN, ms=3, zorder=3)


def _plot_curve(axis: Any, curve: Sequence[Mapping[str, float]]) -> None:
    metric = "accuracy" if all("accuracy" in point for point in curve) else "loss"
    for key, label, style in (("macs", "MACs", "o-"), ("params", "parameters", "s--")):
        points = sorted((100 * point[key], point[metric]) for point in curve if key in point)
        axis.plot(*zip(*points, strict=True), style, color=LINE, label=label, ms=4)
    axis.set_xlabel("size, % of the whole model")
    axis.set_ylabel(metric)
    axis.set_title(f"{metric.capitalize()} against size, no fine-tuning", loc="left", fontsize=11)
    axis.set_xlim(0, 103)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
