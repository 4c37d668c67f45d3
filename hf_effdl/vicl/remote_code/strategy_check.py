"""Which strategy suits a pool: each is tried on images of the pool, whose labels are known, and the best is taken."""

import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .examples import Examples, MetricError, Queries
from .images import pixels
from .pool_rows import fellows
from .strategies import STRATEGIES


logger = logging.get_logger(__name__)

EACH = 4  # images of one call of the frozen model
SLOW = 10.0  # seconds from which it is said how long it will take
LOOKED_UP, RUN = 100, 32  # pool images that are asked about where their examples were measured, and where not


@torch.no_grad()
def check_strategies(examples: Examples, candidates: int, selector: Any = None) -> dict[str, Any]:
    """Try "nearest", "dense", and, where performance was measured, "transfer", on images of the pool.

    An image is no example for itself, nor are others of its group or of another class. What was measured is looked
    up; else the frozen model is run on 32 images with each choice. A fitted cascade is taken at what it found itself,
    by folds without the image. A strategy has to be ahead of the nearest by more than a standard error of the paired
    difference.

    Args:
        examples: the pool as the model sees it.
        candidates: K.
        selector: that the model keeps.

    Images on which the metric is no finite number for one of the strategies are left out of all, with a warning; where
    it raises, nothing is tried, with a warning that says what.

    Returns:
        `{"strategy", "images", "performance", "ahead"}`: the best one's name; how many images; of each its mean
        performance, larger is better, and by how much that is more than the nearest's, with the standard error.
        Where no image has another one that it may be shown, that is the nearest, of 0 images.
    """
    model, pool = examples.model, examples.pool
    table = _table(model, pool)
    images = torch.arange(len(pool)) if table is None else (table[0] >= 0).any(1).nonzero()[:, 0]
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = images[drawn][: RUN if table is None else LOOKED_UP]
    allowed = fellows(images, pool.groups, pool.classes)
    if allowed is not None:  # one that is alone cannot be asked about
        allowed[torch.arange(len(images)), images] = False
        images, allowed = images[allowed.any(1)], allowed[allowed.any(1)]
    nothing = {"strategy": "nearest", "images": 0, "performance": {}, "ahead": {}}
    if len(pool) < 2 or not len(images):  # no image has another one to be shown
        return nothing
    queries = _queries(examples, images, allowed, labelled=table is None)
    found: dict[str, Tensor] = {}
    try:
        for name in ("nearest", "dense", *(() if table is None else ("transfer",))):
            rows = STRATEGIES[name](queries, examples, 1, candidates)[1]
            found[name] = _performance(examples, queries, images, rows, table)
    except MetricError as error:  # predictions need no metric
        warnings.warn(f"choices cannot be tried on images of the pool, and it is 'nearest': {error}", stacklevel=2)
        return nothing
    found = _defined(found)
    if not (count := len(found["nearest"])):
        return nothing
    performance = {name: float(values.mean()) for name, values in found.items()}
    ahead = {name: _ahead(values, found["nearest"]) for name, values in found.items() if name != "nearest"}
    if getattr(selector, "kind", None) == "cascade" and selector.pool_fingerprint == pool.fingerprint:
        report = selector.report
        gain = report.get("stage 2", report["stage 1"]) - report["nearest"]
        ahead["cascade"], performance["cascade"] = [gain, 0.0], performance["nearest"] + gain
    better = {name: gain for name, (gain, error) in ahead.items() if gain > error}
    strategy = max(better, key=better.__getitem__) if better else "nearest"
    return {"strategy": strategy, "images": count, "performance": performance, "ahead": ahead}


def _table(model: Any, pool: Any) -> tuple[Tensor, Tensor] | None:
    """What was measured of this pool."""
    if model.config.performance is None or model.config.pool_fingerprint != pool.fingerprint:
        return None
    return model.measured_candidates.long().cpu(), model.measured_performance.float().cpu()


def _queries(examples: Examples, rows: Tensor, allowed: Tensor | None, labelled: bool) -> Queries:
    """Images of the pool as queries; with cells and labels where the frozen model will be run."""
    pool, model, task = examples.pool, examples.model, examples.task
    views = {
        "vector": F.normalize(pool.vectors[rows].float(), dim=1),
        "tokens": pool.tokens(rows),
        "grid": examples.grids(rows).unflatten(1, tuple(model.encoder.grid_size)),
    }
    cells, truth = torch.empty(len(rows), 0), None
    if labelled:
        images = [pool.image(row) for row in rows.tolist()]
        seen = [task.query(image) for image in images]
        cells = pixels(seen, model.image_size, model.resample).to(model.device)
        truth = task.labels([pool.label(row) for row in rows.tolist()], images, model.image_size).to(model.device)
    return Queries(cells, views, truth, exclude=rows, allowed=allowed)


def _performance(
    examples: Examples, queries: Queries, images: Tensor, rows: Tensor, table: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Of the chosen examples `rows (B, 1)`; of one that was not measured on the image, the mean of those that were."""
    if table is None:
        return _run(examples, queries, rows)
    candidates, performance = table[0][images], table[1][images]
    known = candidates >= 0
    mean = (performance * known).sum(1) / known.sum(1)
    same = candidates == rows
    return torch.where(same.any(1), (performance * same).sum(1), mean)


def _run(examples: Examples, queries: Queries, rows: Tensor) -> Tensor:
    """Of the chosen examples, by the frozen model; says how long that will take where it is slow."""
    parts, start = [], time.perf_counter()
    for place in torch.arange(len(queries)).split(EACH):
        here = place.to(queries.cells.device)
        some = Queries(queries.cells[here], {}, queries.truth[here])
        parts.append(examples.measure(some, rows[place])[:, 0])
        whole = (time.perf_counter() - start) / len(parts) * len(queries) / EACH
        if len(parts) == 1 and whole > SLOW:
            logger.warning(
                "how examples are chosen is tried on %d images of the pool, once for each way: about %.0f s a way; "
                "selector='nearest' or 'dense' is taken as it is",
                len(queries),
                whole,
            )
    return torch.cat(parts)


def _defined(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the images on which one of them is no finite number."""
    defined = torch.stack([*found.values()]).isfinite().all(0)
    if not defined.all():
        warnings.warn(
            f"the metric is no finite number on {int((~defined).sum())} of the {len(defined)} images of the pool "
            "on which choices were tried: they are left out, and of none it is 'nearest'; a metric has to be "
            "defined for every prediction, also for an empty one",
            stacklevel=2,
        )
    return {name: values[defined] for name, values in found.items()}


def _ahead(values: Tensor, others: Tensor) -> list[float]:
    difference = values - others
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else float("inf")
    return [float(difference.mean()), error]
