"""What `vicl_pets.py` and `vicl_digits.py` share: the arms and the table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl import CascadeSelector
from hf_effdl.vicl.remote_code.examples import Examples, Queries
from hf_effdl.vicl.remote_code.visual_tasks import find_task, largest_boxes


CANDIDATES, FEW, TEN = 50, 5, 10
# every arm with the examples that the frozen model tries on the query before it has answered; in order of the table
ARMS = {
    "random": 1,
    "mean of the 50": 1,
    "nearest": 1,
    "static": 1,
    "quality inside the 50": 1,
    "dense": 1,
    "transfer": 1,
    "transfer, 50 labels each": 1,
    "released ranker, aggregated": 1,
    "list-wise ranker, aggregated": 1,
    "list-wise ranker, knock-out": 1,
    "list-wise ranker + similarities, aggregated": 1,
    "cascade, 100 x 50 labels, one pass": 1,
    "cascade, list-wise heads, one pass": 1,
    "cascade, one pass": 1,
    "auto, without a cascade": 1,
    "medoid of the nearest 10": TEN,
    "medoid of dense 10": TEN,
    "like the mean of dense 10": TEN,
    "cascade, 100 x 50 labels": TEN,
    "cascade, list-wise heads": TEN,
    "cascade, ten highest scores": TEN,
    "cascade": TEN,
    "auto": TEN,
    "medoid of the 50": CANDIDATES,
    "like the mean of the 50": CANDIDATES,
    "oracle of the 50": CANDIDATES,
    "nearest 5, mean": FEW,
    "dense 5, mean": FEW,
    "transfer 5, mean": FEW,
    "transfer 5, 50 labels each, mean": FEW,
    "nearest 10, mean": TEN,
    "dense 10, mean": TEN,
    "cascade 10, 100 x 50 labels, weighted": TEN,
    "cascade 10, list-wise heads, weighted": TEN,
    "cascade 10, weighted": TEN,
    "all 50, mean": CANDIDATES,
    "nearest 5, in one call": FEW,
    "dense 5, in one call": FEW,
    "nearest, two arrangements": 2,
    "dense, two arrangements": 2,
    "nearest 5 in one call, two arrangements": 2 * FEW,
    "grey copy": 0,
}
FROM, TO = "nearest", "oracle of the 50"
# strategies whose first five are shown one by one, and their answers averaged
FUSED = {
    "nearest": "nearest 5, mean",
    "dense": "dense 5, mean",
    "transfer": "transfer 5, mean",
    "transfer, 50 labels each": "transfer 5, 50 labels each, mean",
}
# what needs nothing that was measured of the pool, by kind and F passes: a choice of one example, or a mean
TRAINING_FREE = {
    "cascade, one pass": ("random", "mean of the 50", "nearest", "dense"),
    "cascade": (
        "nearest",
        "dense",
        "medoid of the nearest 10",
        "medoid of dense 10",
        "like the mean of dense 10",
        "nearest, two arrangements",
        "dense, two arrangements",
    ),
    "cascade 10, weighted": (
        "nearest 5, mean",
        "dense 5, mean",
        "nearest 10, mean",
        "dense 10, mean",
        "nearest 5, in one call",
        "dense 5, in one call",
        "nearest 5 in one call, two arrangements",
    ),
}


def agreement(task: Any, painted: Tensor) -> Tensor:
    """How much each answer to one query is like the others: `(K, 3, h, w)` to `(K,)`, sums over all K."""
    if task.name == "colourisation":
        flat = painted.flatten(1)
        return -(flat[:, None] - flat[None]).square().sum((1, 2))
    white = painted.mean(1) >= 0.5
    if task.name == "detection":
        boxes, found = largest_boxes(white)
        y, x = (torch.arange(size).expand(len(boxes), size) for size in white.shape[1:])
        inside_x, inside_y = ((at >= boxes[:, k, None]) & (at < boxes[:, k + 2, None]) for k, at in ((0, x), (1, y)))
        white = inside_x[:, None, :] & inside_y[:, :, None] & found[:, None, None]
    flat = white.flatten(1).float()
    both, area = flat @ flat.T, flat.sum(1)
    either = area[:, None] + area[None] - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).sum(1)


def arms_of_query(
    task: Any,
    painted: Tensor,
    truth: Tensor,
    chosen: Mapping[str, Tensor],
    weighted: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, float]:
    """The score of every arm that shows some of a query's K candidates, whose answers are known.

    Args:
        task: scores.
        painted: `(K, 3, h, w)` answers to one candidate each, the nearest first.
        truth: `(3, h, w)`.
        chosen: strategy -> places among the K, best first: its first is an arm, and the mean of its first five
            another, where `FUSED` has one.
        weighted: arm -> places and weights of a weighted mean.
    """
    values = task.score(painted, truth.expand_as(painted))
    good = values if task.greater_is_better else -values
    mean = painted.mean(0)
    like = task.score(painted, mean.expand_as(painted)) * (1 if task.greater_is_better else -1)
    found = {
        "mean of the 50": values.mean(),
        TO: values[good.argmax()],
        "all 50, mean": task.score(mean, truth),
        "medoid of the 50": values[agreement(task, painted).argmax()],
        "like the mean of the 50": values[like.argmax()],
    }
    for name in ("nearest", "dense"):
        if len(ten := chosen.get(name, ())[:TEN]) == TEN:
            found[f"{name} 10, mean"] = task.score(painted[ten].mean(0), truth)
            of = "the nearest 10" if name == "nearest" else "dense 10"
            found[f"medoid of {of}"] = values[ten[agreement(task, painted[ten]).argmax()]]
    if "dense 10, mean" in found:
        near = painted[chosen["dense"][:TEN]]
        like = task.score(near, near.mean(0).expand_as(near)) * (1 if task.greater_is_better else -1)
        found["like the mean of dense 10"] = values[chosen["dense"][like.argmax()]]
    for name, (places, weights) in (weighted or {}).items():
        found[name] = task.score((painted[places] * weights[:, None, None, None]).sum(0), truth)
    for name, places in chosen.items():
        found[name] = values[places[0]]
        if name in FUSED:
            found[FUSED[name]] = task.score(painted[places[:FEW]].mean(0), truth)
    return {name: float(value) for name, value in found.items()}


def cascade_arms(
    cascade: CascadeSelector, queries: Queries, examples: Examples, labels: str, batch: int
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """What a fitted cascade of ten passes chooses: arm -> rows, best first; arm of a mean -> rows and weights.

    Args:
        cascade: is as it was afterwards.
        queries, examples: as for any strategy.
        labels: part of the arms' names: what it was fitted on, and its heads.
        batch: queries of one call.
    """

    def choose(count: int) -> list[Tensor]:
        parts = []
        for part in torch.arange(len(queries)).split(batch):
            some = Queries(queries.cells[part], {name: view[part] for name, view in queries.views.items()})
            parts.append(cascade(some, examples, count, CANDIDATES)[:2])
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    scores, rows = choose(TEN)
    weighted = {f"cascade 10{labels}, weighted": (rows, (scores / cascade.temperature).softmax(1))}
    cascade.passes = 1  # its stage 1 alone
    first = choose(1)[1]
    cascade.passes = TEN
    return {f"cascade{labels}": rows, f"cascade{labels}, one pass": first}, weighted


def places_of(chosen: Tensor, candidates: Tensor) -> Tensor:
    """Where each of the chosen rows `(B, m)` stands among the candidates `(B, K)`."""
    here = chosen[:, :, None] == candidates[:, None]
    if not here.any(2).all():
        raise ValueError("a strategy chose an example that is not among the candidates")
    return here.long().argmax(2)


# ---- the table


def summary(of: Mapping[str, Mapping[int, Sequence[float]]], arm: str) -> tuple[float, float, float]:
    """Mean score of an arm, share of the gap from nearest to oracle that it closes, and that share's standard error.

    `of` holds the means of every fold by arm and seed. The error is that of the paired differences to nearest: over
    the folds of a seed, averaged over the seeds, which share all photos; of single folds, over the seeds.
    """
    seeds = [seed for seed in of[arm] if seed in of[FROM] and seed in of[TO]]
    score, start, end = (
        statistics.mean(value for seed in seeds for value in of[name][seed]) for name in (arm, FROM, TO)
    )
    paired = [[a - b for a, b in zip(of[arm][seed], of[FROM][seed], strict=True)] for seed in seeds]
    if all(len(fold) > 1 for fold in paired):
        error = math.sqrt(statistics.mean(statistics.variance(fold) / len(fold) for fold in paired))
    elif len(paired) > 1:
        error = statistics.stdev(fold[0] for fold in paired) / math.sqrt(len(paired))
    else:
        error = math.nan
    gap = end - start or math.nan
    return score, (score - start) / gap, error / abs(gap)


def ahead(of: Mapping[str, Mapping[int, Sequence[float]]], arm: str, other: str) -> tuple[float, float]:
    """Share of the gap that `arm` closes more than `other`, with the standard error of the paired difference."""
    moved = {
        FROM: of[other],
        arm: of[arm],
        TO: {
            seed: [
                value + shift
                for value, shift in zip(
                    of[TO][seed], (b - a for a, b in zip(of[FROM][seed], of[other][seed], strict=True)), strict=True
                )
            ]
            for seed in of[TO]
            if seed in of[other]
        },
    }
    _, closed, error = summary(moved, arm)
    return closed, error


def print_tables(rows: list[dict]) -> None:
    """A table for each task: the frozen models side by side, mean score (gap closed +- standard error)."""
    for said in sorted({(row["date"], row["torch"], row["platform"], row["cpus"]) for row in rows}):
        print(f"measured on {said[0]}, torch {said[1]}, {said[2]}, {said[3]} CPUs")
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        models = list(dict.fromkeys(row["frozen"] for row in mine))
        tables: dict[str, dict[str, dict[int, list[float]]]] = {model: {} for model in models}
        for row in mine:
            tables[row["frozen"]].setdefault(row["arm"], {})[row["seed"]] = row["folds"]
        seeds = sorted({row["seed"] for row in mine})
        metric = mine[0]["metric"] + ("" if find_task(task).greater_is_better else ", lower is better")
        folds = f", {len(mine[0]['folds'])} folds each" if len(mine[0]["folds"]) > 1 else ""
        print(
            f"\n{task}: mean {metric}; gap closed in % (paired standard error); seeds "
            f"{', '.join(map(str, seeds))}{folds}\n"
        )
        print(f"| arm | F passes | {' | '.join(f'{model} | gap closed' for model in models)} |")
        print("|---|---" + "|---|---" * len(models) + "|")
        for arm, passes in ARMS.items():
            cells = []
            for model in models:
                of = tables[model]
                if arm not in of or FROM not in of or TO not in of:
                    cells.append("- | -")
                    continue
                score, closed, error = summary(of, arm)
                fixed = {FROM: "0", TO: "100"}.get(arm, f"{100 * closed:.1f} ± {100 * error:.1f}")
                cells.append(f"{score:.4f} | {fixed}")
            if any(cell != "- | -" for cell in cells):
                print(f"| {arm} | {passes} | {' | '.join(cells)} |")
        print_ahead(tables)


def print_ahead(tables: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> None:
    """How far the cascade is ahead of the best arm of its kind that learns nothing, with as many F passes or fewer."""
    lines = []
    for arm, others in TRAINING_FREE.items():
        for model, of in tables.items():
            there = [other for other in others if other in of]
            if arm in of and there:
                best = max(there, key=lambda other: summary(of, other)[1])
                closed, error = ahead(of, arm, best)
                lines.append(f"| {model} | {arm} | {best} | {100 * closed:+.1f} ± {100 * error:.1f} |")
    if lines:
        print("\n| F | arm | best training-free arm | ahead, in % of the gap |\n|---|---|---|---|")
        print("\n".join(lines))
