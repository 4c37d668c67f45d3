"""Arms of the benchmarks on pretrained models: which units stay, and whether the layers behind are refitted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rows import mean_and_error
from torch import Tensor, nn

from hf_effdl.structure.calibration.compensate import Wish, compensate, free_wishes
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.slim.slim import cut_copy


SCORES = ("random", "magnitude", "activation", "fisher", "obs")
REFITS = (False, True)


@dataclass(frozen=True)
class Smaller:
    """A smaller model, with what was said of its calibration.

    Args:
        model: with the units gone for good.
        refit: whether the layers behind were refitted; both kinds of an arm lack the same units.
        facts: for its row.
    """

    model: nn.Module
    refit: bool
    facts: dict[str, Any]


def sized(groups: Sequence[Group], units: int) -> list[Group]:
    """Groups of so many units: a transformer's FFNs all have the same number, and so have its attention layers."""
    found = [group for group in groups if group.units == units]
    if not found:
        raise SystemExit(f"no groups of {units} units among those of {sorted({group.units for group in groups})}")
    return found


def wishes(groups: Sequence[Group], share: float, score: str | Mapping[str, Tensor], seed: int) -> dict[str, Wish]:
    """The same number of units of every group; the random arm says which, and so do scores that are there already."""
    found = {}
    for place, group in enumerate(groups):
        size = max(1, round(share * group.units))
        rng = torch.Generator().manual_seed(1000 * seed + place)
        drawn = torch.randperm(group.units, generator=rng)[:size].sort().values if score == "random" else None
        if isinstance(score, Mapping):
            drawn = score[group.name].topk(size).indices.sort().values
        found[group.name] = Wish(size, drawn)
    return found


def smaller(
    model: nn.Module,
    groups: Sequence[Group],
    share: float,
    score: str | Mapping[str, Tensor],
    batches: Sequence[Any],
    seed: int = 0,
    ridge: float | None = None,
    others: Sequence[Group] = (),
    widths: str = "stock",
) -> Iterator[Smaller]:
    """The model without and with refits, of one score (a name, or numbers by group) and share; as `slim` does it.

    The layers behind `others`, which stay whole, make up for what was lost before them. With `widths="free"` a named
    score also says what stays of each group, at the same multiply-accumulates.
    """
    asked = wishes(groups, share, score, seed)
    named = "magnitude" if score == "random" or isinstance(score, Mapping) else score
    if widths == "free":
        asked = free_wishes(model, groups, asked, batches, score=named, ridge=ridge)
    done = compensate(model, [*groups, *others], asked, batches, score=named, ridge=ridge)
    yield Smaller(cut_copy(model, groups, done.kept), False, {"held-out error": done.report["error_without"]})
    yield Smaller(cut_copy(done.model, groups, done.kept), True, facts(done.report))


def facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of a calibration: the error on the rows held out, and the ridges in the layers' order."""
    ridges = [step["ridge"] for step in report["groups"].values()]
    return {"held-out error": report["error"], "ridges": ridges, "refitted": report["refitted"]}


def cell(values: Sequence[float], digits: int = 2) -> str:
    """`mean +- standard error` over seeds, the mean alone where there is one, a dash where there is none."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def cosines(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the rows of two matrices."""
    return nn.functional.cosine_similarity(a.flatten(0, -2), b.flatten(0, -2), dim=-1).mean().item()
