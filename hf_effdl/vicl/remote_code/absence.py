"""Whether what the examples show is in a query at all: learnt on pool images, with a rate of false alarms."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .cascade_features import MATCHES
from .cascade_lists import folds_of
from .confidence import certainty
from .examples import Examples, Queries
from .pipeline_inputs import is_image, walkable
from .pool_rows import column_of, group_numbers


FEATURES = ("similarity", *MATCHES, "certainty", "area")
LEAST, BATCH = 10, 8  # images, of each kind; and at once
PENALTY, STEPS = 1.0, 25


@dataclass(frozen=True)
class Presence:
    """When an object counts as there.

    Args:
        centre, spread, weights: of the features, in the order of `FEATURES`; of the weights the last one is alone.
        threshold: of the regression's score.
        false_alarms: share of absent objects above it that was asked for.
        false_alarm_rate, found_rate: shares of absent and present objects above it, by folds without the image.
        images: that were asked about.
        pool_fingerprint: of the pool.
    """

    centre: list[float]
    spread: list[float]
    weights: list[float]
    threshold: float
    false_alarms: float
    false_alarm_rate: float
    found_rate: float
    images: int
    pool_fingerprint: str

    def of(self, features: list[float]) -> dict[str, Any]:
        """`{"present", "presence"}` of one query."""
        score = float(_scores(torch.tensor([features]), *map(torch.tensor, (self.centre, self.spread, self.weights))))
        return {"present": score > self.threshold, "presence": float(torch.tensor(score).sigmoid())}


@torch.no_grad()
def presence_features(examples: Examples, queries: Queries, rows: Tensor, painted: Tensor) -> Tensor:
    """What tells whether the object of an example is in a query, `(B, f)`.

    Args:
        rows: `(B, 1)` the example that each was shown first.
        painted: `(B, 3, h, w)` the answers.
    """
    vectors = examples.pool.vectors[rows[:, 0].cpu()].float()
    similarity = (F.normalize(vectors, dim=1) * queries.views["vector"].float().cpu()).sum(1, keepdim=True)
    matches = examples.matches(queries.views, rows)[:, 0].float().cpu()
    white = painted.float().mean((1, 2, 3)).cpu()
    return torch.cat([similarity, matches, torch.stack([certainty(painted).cpu(), white], 1)], 1)


def fit_presence(
    features: Tensor, present: Tensor, groups: Tensor, false_alarms: float, pool_fingerprint: str
) -> Presence:
    """A logistic regression with a ridge, and the threshold that so many of the absent are above.

    Args:
        features: `(N, f)`.
        present: `(N,)` bool.
        groups: `(N,)` numbers of what rows belong to: folds do not part them.
        false_alarms: in (0, 1).
        pool_fingerprint: of the pool.
    """
    fold = folds_of(groups)
    held = torch.zeros(len(features))
    for one in fold.unique().tolist():
        held[fold == one] = _scores(features[fold == one], *_logistic(features[fold != one], present[fold != one]))
    above = torch.zeros(len(features), dtype=torch.bool)
    for one in fold.unique().tolist():  # a threshold is judged on images that it was not set on
        above[fold == one] = held[fold == one] > _threshold(held[(fold != one) & ~present], false_alarms)
    centre, spread, weights = _logistic(features, present)
    return Presence(
        centre.tolist(),
        spread.tolist(),
        weights.tolist(),
        _threshold(held[~present], false_alarms),
        false_alarms,
        float(above[~present].float().mean()),
        float(above[present].float().mean()),
        len(features),
        pool_fingerprint,
    )


def _threshold(absent: Tensor, false_alarms: float) -> float:
    """The least value that at most the share of the absent is above."""
    if not len(absent):
        return float("inf")  # nothing is known of those that are absent
    allowed = int(false_alarms * (len(absent) + 1))
    return float(absent.sort(descending=True).values[min(allowed, len(absent) - 1)])


def _logistic(features: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, spread and weights `(f + 1,)`, by Newton's method; both kinds count alike, whatever their numbers."""
    centre, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    rows = torch.cat([(features - centre) / spread, torch.ones(len(features), 1)], 1).double()
    share = present.double().mean().clamp(1e-6, 1 - 1e-6)
    counts = torch.where(present, 0.5 / share, 0.5 / (1 - share))
    penalty = PENALTY * torch.eye(rows.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 1e-6
    weights = torch.zeros(rows.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        chance = (rows @ weights).sigmoid()
        slope = rows.T @ (counts * (chance - present.double())) + penalty @ weights
        curve = (rows * (counts * chance * (1 - chance))[:, None]).T @ rows + penalty
        weights -= torch.linalg.solve(curve, slope)
    return centre, spread, weights.float()


def _scores(features: Tensor, centre: Tensor, spread: Tensor, weights: Tensor) -> Tensor:
    return ((features - centre) / spread) @ weights[:-1] + weights[-1]


# ---- on a pool


def calibrate(
    pipe: Any,
    queries: int,
    false_alarms: float,
    absent: Sequence[Any] | None,
    seed: int,
    progress: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Learn it with a pipeline; see `VisualInContextPipeline.calibrate_absence`."""
    _check_numbers(queries, false_alarms)
    options = pipe.options_of(options)
    pool = pipe.pool
    asked = _asked(pool, queries, absent, seed)
    present = torch.tensor([one.present for one in asked], dtype=torch.bool)
    if min(int(present.sum()), int((~present).sum())) < LEAST:
        raise ValueError(
            f"{int(present.sum())} images with their object and {int((~present).sum())} without: at least {LEAST} of "
            "each are needed; pass a larger queries=, or more absent= (an image that is alone in its class, or of the "
            "only group, cannot be asked about)"
        )
    features = torch.cat(list(_features(pipe, asked, progress, options)))
    numbers = torch.tensor([one.group for one in asked])
    found = asdict(fit_presence(features, present, numbers, false_alarms, pool.fingerprint))
    pipe.model.config.absence = found
    return dict(found)  # what is done to it is not done to the model


def _check_numbers(queries: Any, false_alarms: Any) -> None:
    if isinstance(queries, bool) or not isinstance(queries, Integral) or queries < 1:
        raise ValueError(f"queries={queries!r}: pass a number of pool images, at least 1")
    if not isinstance(false_alarms, Real) or not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms={false_alarms!r}: it is a share of the absent objects, between 0 and 1")


@dataclass(frozen=True)
class Asked:
    """An image, the class that is asked for, and whether that is there."""

    image: Any  # None for one of the pool, which is opened when it is its turn
    row: int  # of the pool, -1 for none
    group: int
    wanted: str | None
    present: bool


def _asked(pool: Any, queries: int, absent: Sequence[Any] | None, seed: int) -> list[Asked]:
    """Images of the pool with their own class and, where no others are given, with another one."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = group_numbers(pool.groups, len(pool)).tolist()
    one_kind = pool.classes is None and absent is not None
    classes = [None] * len(pool) if one_kind else _classes(pool, absent)
    groups_of: dict[str | None, set[int]] = {}
    for name, group in zip(classes, groups):
        groups_of.setdefault(name, set()).add(group)
    if not one_kind:
        groups_of.pop(None, None)

    def can_be_shown(name: str | None, group: int) -> bool:
        known = groups_of.get(name, set())
        return len(known) > (group in known)  # another group has examples of it

    rows = [row for row in order if can_be_shown(classes[row], groups[row])][:queries]
    asked = [Asked(None, row, groups[row], classes[row], True) for row in rows]
    if absent is not None:
        absent = [absent] if is_image(absent) else walkable(absent)
        return asked + [Asked(image, -1, len(pool) + i, None, False) for i, image in enumerate(absent)]
    drawn, names = random.Random(seed), sorted(groups_of)
    for one in list(asked):
        if others := [name for name in names if name != one.wanted and can_be_shown(name, one.group)]:
            asked.append(replace(one, wanted=drawn.choice(others), present=False))
    return asked


def _classes(pool: Any, absent: Sequence[Any] | None) -> list[str | None]:
    classes = column_of(pool, "class", "calibrate_absence asks about other classes").tolist()
    if absent is None and len(set(filter(None, classes))) < 2:
        raise ValueError(
            "the pool is of one class, so none of its images is without the object: pass absent=, images that are"
        )
    return classes


def _features(pipe: Any, asked: list[Asked], progress: bool, options: dict[str, Any]) -> Iterator[Tensor]:
    pool = pipe.pool
    with logging.tqdm(total=len(asked), desc="asking", unit=" images", disable=not progress) as bar:
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            batch = {"images": [pool.image(one.row) if one.row >= 0 else one.image for one in part]}
            batch["exclude"] = [pool.ids[one.row] if one.row >= 0 else None for one in part]
            if pool.groups is not None:
                batch["groups"] = [pool.groups[one.row] if one.row >= 0 else None for one in part]
            if pool.classes is not None:
                batch["classes"] = [one.wanted for one in part]
            answer = pipe.forward(pipe.preprocess(batch), **{**options, "presence": True})
            yield torch.tensor(answer["presence"])
            bar.update(len(part))


def check_calibrated(config: Any, pool: Any) -> None:
    """Refuse to say what was not learnt on this pool."""
    if config.absence is None:
        raise ValueError(
            "presence=True, but when an object is absent was not learnt: run pipe.calibrate_absence() first"
        )
    if not _is_whole(config.absence):
        raise ValueError("config.absence is not what calibrate_absence writes: run pipe.calibrate_absence() again")
    if config.absence["pool_fingerprint"] != pool.fingerprint:
        raise ValueError(
            f"absence was calibrated on the pool {config.absence['pool_fingerprint']}, but this is "
            f"{pool.fingerprint}: another one, or it was changed since; run pipe.calibrate_absence() again"
        )


def _is_whole(absence: Any) -> bool:
    names, sizes = {field.name for field in fields(Presence)}, {"centre": 0, "spread": 0, "weights": 1}
    return (
        isinstance(absence, dict)
        and absence.keys() == names
        and all(
            isinstance(absence[name], list)
            and len(absence[name]) == len(FEATURES) + more
            and all(map(_is_finite, absence[name]))
            for name, more in sizes.items()
        )
        and all(value > 0 for value in absence["spread"])
        and _is_finite(absence["threshold"])
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30 and not math.isnan(value)
