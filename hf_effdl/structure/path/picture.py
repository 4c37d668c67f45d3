"""The picture of a path. Needs matplotlib (`pip install hf_effdl[plot]`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_effdl.structure.path.path import SparsePath


INSIDE, OUTSIDE, LINE = "#d1495b", "#c9d1d9", "#2b4c7e"


def plot_path(path: SparsePath, selected: Mapping[str, Tensor] | None, order: str) -> Any:
    """See `SparsePath.plot`."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("plotting a path needs matplotlib: pip install hf_effdl[plot]") from error
    kept = selected or {name: inside.nonzero().flatten() for name, inside in path.support.items()}
    scores = path.scores(order)
    has_curve = bool(path.curve)
    height = min(14.0, 1.6 + 0.42 * len(scores))
    figure = Figure(figsize=(13 if has_curve else 9, max(height, 4)), layout="constrained")
    axes = figure.subplots(1, 2 if has_curve else 1, width_ratios=[2, 1] if has_curve else [1], squeeze=False)[0]
    end = max(path.step, 1)
    left = axes[0]
    for row, (name, score) in enumerate(scores.items()):
        unit, chosen = path.units[name], set(kept.get(name, range(len(score))) if name in kept else range(len(score)))
        chosen = {int(i) for i in chosen}
        best_first = score.argsort(descending=True, stable=True).tolist()
        step = 0.84 / len(best_first)
        for place, i in enumerate(best_first):
            y = row - 0.42 + step * (place + 0.5)
            entered, gone = int(unit["entered"][i]), int(unit["left"][i])
            color, order_z = (INSIDE, 3) if i in chosen else (OUTSIDE, 2)
            if entered >= 0:
                left.plot(
                    [entered, end if gone < 0 else gone],
                    [y, y],
                    color=color,
                    lw=max(0.6, 26 * step),
                    zorder=order_z,
                    solid_capstyle="butt",
                )
            elif i in chosen:  # kept although it never entered
                left.plot([end], [y], marker=".", color=INSIDE, ms=3, zorder=order_z)
    labels = [
        f"{_short(name)}  ({len(kept[name]) if name in kept else len(s)}/{len(s)})" for name, s in scores.items()
    ]
    left.set_yticks(range(len(scores)), labels, fontsize=8)
    left.set_ylim(len(scores) - 0.5, -0.5)
    left.set_xlim(0, end * 1.01)
    left.set_xlabel("optimizer step (a bar is one unit, from its entry to its exit)")
    left.set_title("When each unit entered the support", loc="left", fontsize=11)
    left.legend(
        [Line2D([], [], color=INSIDE, lw=4), Line2D([], [], color=OUTSIDE, lw=4)],
        ["selected" if selected else "in the support", "not selected" if selected else "left again"],
        loc="lower left",
        fontsize=8,
        framealpha=0.9,
    )
    for spine in ("top", "right"):
        for axis in axes:
            axis.spines[spine].set_visible(False)
    if has_curve:
        _plot_curve(axes[1], path.curve)
    return figure


def _short(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("convolution", "weight")]
    return ".".join(parts[-6:])


def _plot_curve(axis: Any, curve: list[dict[str, float]]) -> None:
    metric = "accuracy" if all("accuracy" in point for point in curve) else "loss"
    for key, style in (("macs", "o-"), ("params", "s--")):
        points = sorted((100 * point[key], point[metric]) for point in curve if key in point)
        axis.plot(
            *zip(*points, strict=True), style, color=LINE, label={"macs": "MACs", "params": "parameters"}[key], ms=4
        )
    axis.set_xlabel("size, % of the whole model")
    axis.set_title(f"{metric.capitalize()} against size, no fine-tuning", loc="left", fontsize=11)
    axis.set_xlim(0, 103)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
