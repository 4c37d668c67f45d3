"""Ranks of a LoRA adapter over layers and kinds of modules, and over the steps. Needs matplotlib."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_effdl.checks import instance, whole_number
from hf_effdl.pictures import LINE, bare, figure
from hf_effdl.structure.path.path import SparsePath


NO_LAYER = "-"
POINTS = 200  # on the axis of steps


def place_of(module: str) -> tuple[str, str]:
    """The layer, by the first number in a module's name, and what it is there: `("3", "attention.self.query")`."""
    parts = module.removeprefix("base_model.model.").split(".")  # what peft puts before a model's own names
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (NO_LAYER, ".".join(parts[-2:])) if first is None else (parts[first], ".".join(parts[first + 1 :]))


def rank_table(ranks: Mapping[str, int]) -> tuple[list[str], list[dict[str, Any]]]:
    """Kinds of modules, and one row per layer: `{"layer": "0", "attention.self.query": 4, ...}`."""
    kinds = list(dict.fromkeys(place_of(name)[1] for name in ranks))
    rows: dict[str, dict[str, Any]] = {}
    for name, rank in ranks.items():
        layer, kind = place_of(name)
        row = rows.setdefault(layer, {"layer": layer})
        row[kind] = row.get(kind, 0) + rank
    return kinds, list(rows.values())


def plot_lora_ranks(path: SparsePath, ranks: Mapping[str, int] | None = None) -> Any:
    """Ranks in the support over the steps, by kind of module, and the rank of every module.

    Args:
        path: of a run on a LoRA adapter.
        ranks: by module, as `{name: pair["after"] for name, pair in small.effdl_report["units"].items()}`; default:
            those in the support at the end.

    Returns:
        A matplotlib Figure; needs matplotlib (the extra `plot`).

    Raises:
        TypeError: `path` is no `SparsePath`, or `ranks` no mapping.
        ValueError: `ranks` is empty, names a module that the path does not know, or holds what is no whole number.

    Example:
        >>> plot_lora_ranks(trainer.path).savefig("ranks.png")  # doctest: +SKIP
    """
    instance("path", path, SparsePath, "trainer.path of a run on an adapter")
    if ranks is None:
        ranks = {name: int(inside.sum()) for name, inside in path.support.items()}
    _check_ranks(ranks, path)
    kinds, rows = rank_table(ranks)
    picture = figure(11, max(3.6, 1.4 + 0.3 * len(rows)))
    left, right = picture.subplots(1, 2)
    bare(left)
    _draw_steps(left, path, kinds)
    _draw_modules(right, kinds, rows)
    return picture


def _check_ranks(ranks: Any, path: SparsePath) -> None:
    instance("ranks", ranks, Mapping, "a rank for every module, {name: rank}")
    if not ranks or (unknown := [name for name in ranks if name not in path.units]):
        near = list(path.units)[:3]
        raise ValueError(f"ranks names {unknown if ranks else 'nothing'}; modules of the path are {near} ...")
    for name, rank in ranks.items():
        whole_number(f"ranks[{name!r}]", rank, least=0)


def _draw_steps(axis: Any, path: SparsePath, kinds: Iterable[str]) -> None:
    steps = torch.linspace(0, max(path.step, 1), POINTS)
    for i, kind in enumerate(kinds):
        units = [unit for name, unit in path.units.items() if place_of(name)[1] == kind]
        style = ("-", "--", ":", "-.")[i % 4]
        axis.plot(steps.numpy(), sum(inside_at(unit, steps) for unit in units).numpy(), style, label=kind, lw=1.6)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("ranks in the support")
    axis.set_title("When ranks entered", loc="left", fontsize=11)
    axis.legend(fontsize=7)


def inside_at(unit: Mapping[str, Tensor], steps: Tensor) -> Tensor:
    """How many units are in the support at some steps, `(len(steps),)`."""
    entered, left = unit["entered"][:, None], unit["left"][:, None]
    return ((entered >= 0) & (entered <= steps) & ((left < 0) | (left > steps))).sum(0)


def _draw_modules(axis: Any, kinds: list[str], rows: list[dict[str, Any]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    values = torch.tensor([[float(row.get(kind, "nan")) for kind in kinds] for row in rows])
    shades = LinearSegmentedColormap.from_list("ranks", ["#ffffff", LINE])
    axis.imshow(values.numpy(), cmap=shades, vmin=0, vmax=max(values.nan_to_num().max().item(), 1), aspect="auto")
    middle = values.nan_to_num().max() / 2
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            text = "" if value != value else f"{value:.0f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if value > middle else "black")
    axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(rows)), [row["layer"] for row in rows], fontsize=8)
    axis.set_ylabel("layer")
    axis.set_title("Rank of every module", loc="left", fontsize=11)
