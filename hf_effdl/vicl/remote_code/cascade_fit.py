"""Fit both stages of a cascade on what was measured of a pool, without letting an image see its own answers."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .cascade_consensus import Answers, small
from .cascade_lists import MeasuredLists
from .cascade_precedents import Precedents
from .cascade_stages import (
    ROWS,
    SOFTNESS,
    TURNS,
    Columns,
    FirstStage,
    Tried,
    Turn,
    best_temperature,
    first_columns,
    gathered,
    joined,
)
from .confidence import certainty, learn_confidence
from .examples import Examples
from .visual_tasks import PICTURES


BATCH = 8  # images encoded, and answered for, at once
LEAST = 10  # labelled images that a fit takes
LEARNT = 1000  # of the labelled images, which stage 2 learns on
CHECKED = 50  # of these, on which plain consensus is tried


@dataclass
class Fitted:
    """What a fit leaves: both stages, temperatures of every turn and of a fusion, and what the choices are worth."""

    first: FirstStage
    turns: tuple[Turn, ...]
    temperatures: Tensor
    report: dict[str, float]
    confidence: list[float] | None = None


def fit(
    examples: Examples, lists: MeasuredLists, precedents: Precedents, *, passes: int, seed: int | None, progress: bool
) -> Fitted:
    """Learn both stages.

    Args:
        examples: the pool as the model sees it.
        lists, precedents: what was measured of it.
        passes: candidates that the frozen model is shown; 1: there is no second stage.
        seed: of list-wise networks; None: none are trained.
        progress: show bars on the first process.
    """
    known = lists.known
    unit = lists.target[known].square().mean().sqrt()
    temperatures = torch.stack([SOFTNESS * unit, *[2 * SOFTNESS * unit] * TURNS])
    columns = columns_of(examples, lists, precedents)
    first, scores = FirstStage.fit(columns, precedents, lists, seed, tries=passes > 1)
    learnt = len(lists.images[:LEARNT])
    report = {
        "images": len(lists.images),
        "nearest": float(lists.performance[:learnt, 0].mean()),
        "stage 1": lists.mean_of(scores[:learnt]),
        "best": lists.pick(torch.arange(lists.rows.shape[1]).expand(learnt, -1)).mean_best(),
    }
    if passes == 1:
        return Fitted(first, (), temperatures, report)
    top = torch.cat(
        [
            first.shortlist(precedents.relations, scores[part], lists.rows[part], lists.images[part], passes)
            for part in torch.arange(learnt).split(ROWS)
        ]
    )
    tried = lists.pick(top)
    columns = gathered({name: part[:learnt] for name, part in columns.items()}, top)
    answered = _Answered(examples, tried, columns, _answers(examples, tried, progress, "fitting"))
    turns, scores = _fit_turns(answered, scores[:learnt].gather(1, top), temperatures, seed)
    report |= {"best tried": tried.mean_best(), "stage 2": tried.mean_of(scores)}
    report |= _plain_consensus(examples, lists, passes, progress)
    return Fitted(first, turns, temperatures, report, _confidence(answered, scores))


def _confidence(answered: "_Answered", scores: Tensor) -> list[float] | None:
    """What the worth of the chosen answer can be told from; scores are from folds without the image."""
    if answered.examples.task.name in PICTURES:  # which has no certainty of its own
        return None
    lists = answered.lists
    at = scores.masked_fill(~lists.known, -torch.inf).argmax(1)
    places = torch.arange(len(at))
    return learn_confidence(certainty(answered.painted[places, at]), scores[places, at], lists.performance[places, at])


def columns_of(examples: Examples, lists: MeasuredLists, precedents: Precedents) -> Columns:
    """What stage 1 knows of all candidates of all lists."""
    parts = torch.arange(len(lists.images)).split(BATCH)
    return joined(
        [
            first_columns(
                _views(examples, lists.images[part]),
                examples,
                precedents,
                lists.similarity[part],
                lists.rows[part],
                lists.images[part],
            )
            for part in parts
        ]
    )


class _Answered:
    """What was tried on the images of all lists, and the frozen model's answers `(L, m, c, h, w)`."""

    def __init__(self, examples: Examples, lists: MeasuredLists, columns: Columns, painted: Tensor) -> None:
        self.examples, self.lists, self.columns, self.painted = examples, lists, columns, painted
        self.parts: Sequence[Tensor] = torch.arange(len(lists.images)).split(BATCH)
        self.truth = torch.cat([examples.small_labels(lists.images[part]).cpu() for part in self.parts])

    def tried(self, part: Tensor) -> Tried:
        """On some of the images."""
        grid = _views(self.examples, self.lists.images[part])["grid"].cpu()
        columns = {name: column[part] for name, column in self.columns.items()}
        return Tried(Answers(self.examples.task, self.painted[part], grid, self.lists.known[part]), columns)


def _fit_turns(
    answered: _Answered, scores: Tensor, temperatures: Tensor, seed: int | None
) -> tuple[tuple[Turn, ...], Tensor]:
    """Every turn on the scores of the one before, from folds without the image; fills `temperatures` in."""
    lists, unit, turns = answered.lists, temperatures[0] / SOFTNESS, []
    for number in range(TURNS):
        last = number == TURNS - 1
        turn, scores = Turn.fit(
            float(temperatures[number]),
            answered.tried,
            answered.parts,
            answered.truth,
            lists,
            scores,
            seed if last else None,
        )
        turns.append(turn)
        temperatures[number + 1] = best_temperature(
            answered.examples.task, answered.painted, answered.truth, scores, lists.known, unit
        )
    return tuple(turns), scores


def _plain_consensus(examples: Examples, lists: MeasuredLists, passes: int, progress: bool) -> dict[str, float]:
    """What the answer most like the plain mean of the nearest examples' answers is worth, with no learning."""
    some = min(CHECKED, LEARNT, len(lists.images))
    near = torch.arange(min(passes, lists.rows.shape[1])).expand(some, -1)
    lists = lists.pick(near)
    answered = _Answered(examples, lists, {}, _answers(examples, lists, progress, "checking"))
    chosen = []
    for part in answered.parts:
        even = torch.zeros(len(part), near.shape[1])
        chosen.append(answered.tried(part).consensus(even, 1.0).medoid())
    picked = lists.performance.gather(1, torch.cat(chosen)[:, None])
    return {"plain consensus": float(picked.mean()), "nearest, of the same": float(lists.performance[:, 0].mean())}


def _answers(examples: Examples, lists: MeasuredLists, progress: bool, what: str) -> Tensor:
    """Small answers `(L, m, c, h, w)`, shared among processes."""
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if many else (0, 1)
    parts = torch.arange(len(lists.images)).split(BATCH)
    mine = []
    for part in logging.tqdm(parts[rank::world], desc=what, unit=" batches", disable=not progress or rank > 0):
        encoded, _ = examples.encoded(lists.images[part])
        answers = small(examples.answers(encoded, lists.rows[part])).cpu()
        mine.append(answers if examples.task.name in PICTURES else answers.mean(2, keepdim=True))
    if not many:
        return torch.cat(mine)
    of_ranks: list[Any] = [None] * world
    torch.distributed.all_gather_object(of_ranks, mine)
    return torch.cat([of_ranks[number % world][number // world] for number in range(len(parts))])


def _views(examples: Examples, images: Tensor) -> dict[str, Tensor]:
    """Of images of the pool, as `Queries` have them; the grid with its two sides."""
    pool, side = examples.pool, tuple(examples.model.encoder.grid_size)
    return {
        "vector": F.normalize(pool.vectors[images].float(), dim=1),
        "tokens": pool.tokens(images),
        "grid": examples.grids(images).unflatten(1, side),
    }


def warn_of(report: dict[str, float]) -> None:
    """Say where a cascade gains nothing, and where agreement is no good sign; to the caller's caller."""
    last = report.get("stage 2", report["stage 1"])
    if last <= report["nearest"]:
        warnings.warn(
            f"on the pool's own images the cascade chooses examples of mean performance {last:.4g}, no "
            f"better than the nearest ({report['nearest']:.4g}): measure on more images, or use "
            "'nearest'",
            stacklevel=3,
        )
    if report.get("plain consensus", 0) < report.get("nearest, of the same", 0):
        warnings.warn(
            f"on the pool's own images the answer that the others agree with most is worse "
            f"({report['plain consensus']:.4g}) than the nearest example's "
            f"({report['nearest, of the same']:.4g}): the frozen model errs the same way with many "
            "examples. The cascade has learnt to weigh that; plain means and votes over examples will not "
            "help",
            stacklevel=3,
        )


# ---- what cannot be learnt from


def check_measured(measured: Any, pool: Any) -> None:
    """Refuse what is not candidates and performance of this pool."""
    pair = isinstance(measured, (tuple, list)) and len(measured) == 2
    if not pair or not all(isinstance(part, Tensor) for part in measured):
        raise TypeError("measured= must be (candidates, performance), as measure_examples returns them")
    candidates, performance = measured
    if candidates.dim() != 2 or candidates.shape != performance.shape:
        raise ValueError(
            f"measured: candidates {tuple(candidates.shape)} and performance {tuple(performance.shape)} "
            "must both be (n, K), as measure_examples returns them"
        )
    largest = int(candidates.max()) if candidates.numel() else -1
    if len(candidates) != len(pool) or largest >= len(pool):
        raise ValueError(
            f"measured on {len(candidates)} images, with candidates up to {largest}, for a pool of "
            f"{len(pool)}: they are of another pool; run measure_examples on this one"
        )
    own = torch.arange(len(pool), device=candidates.device)[:, None]
    if itself := (candidates == own).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"measured= holds row {itself[0]} of the pool as an example for itself, which tells nothing of "
            "other images: set candidates to -1 there"
        )
    if not performance[candidates >= 0].isfinite().all():
        raise ValueError(
            "measured= holds performance that is NaN or infinite: measure these pairs again with a metric "
            "that is defined for every prediction"
        )


def check_model(model: Any, pool: Any) -> None:
    """Refuse a model that holds no performance of this pool."""
    if model.config.performance is None:
        raise ValueError("nothing was measured: pass measured=measure_examples(model, pool), or measure first")
    if model.config.pool_fingerprint != pool.fingerprint:
        raise ValueError(
            f"the model's performance was measured on the pool {model.config.pool_fingerprint}, but this is "
            f"{pool.fingerprint}: another pool, or it was changed since; run measure_examples "
            "again"
        )


def check_enough(measured: tuple[Tensor, Tensor], most: int, passes: int, groups: Tensor) -> None:
    """Refuse performance that nothing can be learnt from.

    Args:
        measured: candidates and performance `(n, K)`.
        most: candidates of an image that are looked at.
        passes: how many are tried.
        groups: `(n,)` of the pool's rows.
    """
    candidates, performance = (part.cpu() for part in measured)
    known = candidates >= 0
    images, values = int(known.any(1).sum()), performance[known]
    if images < LEAST:
        raise ValueError(
            f"{images} pool images were measured on, and a cascade needs {LEAST} or more "
            "(50 to 100 are enough): run measure_examples with more queries="
        )
    if len(groups[known.any(1)].unique()) < 2:
        raise ValueError(
            "the pool images that were measured on are all of one group, and for each of them a cascade learns from "
            "other groups: measure on images of several, or pass groups=[None] * len(pool) to learn from the same"
        )
    if float(values.max()) == float(values.min()):
        raise ValueError(
            f"the measured performance is {float(values[0]):g} everywhere: no example is better than "
            "another, and there is nothing to learn; look at the metric and the labels"
        )
    ranked = min(int(known.sum(1).max()), most)
    if ranked <= passes and passes > 1:
        raise ValueError(
            f"passes={passes}, but at most {ranked} candidates are ranked for an image: the list must be "
            "longer than what is tried of it; measure more candidates= or lower passes="
        )
