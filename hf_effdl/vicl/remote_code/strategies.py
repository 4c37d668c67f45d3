"""Which example to show: six strategies, from a random one to the one that looks at the answer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .examples import Examples, Queries
from .images import image_seed


def nearest(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The most similar examples: cosine of the encoder's vectors (UnsupPR, arXiv 2301.13670)."""
    return examples.nearest(queries, count)


def random(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Examples drawn from the whole pool; the same for the same image and seed, whatever else is in the batch."""
    scores = []
    for i in range(len(queries)):
        generator = torch.Generator().manual_seed(image_seed(queries.cells[i], queries.seed))
        scores.append(torch.rand(len(examples.pool), generator=generator))
    return _best_of_all(torch.stack(scores), queries, count)


def static(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The examples that did best on average over the pool, the same for every query; needs measured performance."""
    return _best_of_all(_quality(examples).expand(len(queries), -1), queries, count)


def dense(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The candidates that show what the query shows: mean over the query's cells of the largest cosine with a cell.

    s(q, c) = 1/Q sum_i max_j <q_i, c_j>, on unit features, inside the K nearest.
    """
    _, rows = nearest(queries, examples, candidates, candidates)
    asked = F.normalize(queries.views["grid"].flatten(1, 2).float(), dim=2)
    matched = [(examples.grids(row.clamp(min=0)) @ one.T).amax(1).mean(1).cpu() for one, row in zip(asked, rows)]
    return best(torch.stack(matched).masked_fill(rows < 0, -torch.inf), rows, count)


def transfer(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The candidates that did best on the pool images most like the query; needs measured performance.

    With R[j, c] the performance of example c on pool image j less the mean of what was measured on j, and the 40
    nearest neighbours j of the query,

        s(q, c) = sum_j w_j R[j, c],    w_j = softmax_j(cos(q, j) / temperature);

    where c was not measured on j, as for j = c, the mean of R[., c] stands for it. What was measured on a query that
    is of the pool is left out.
    """
    similarity, rows = nearest(queries, examples, max(candidates, NEIGHBOURS), candidates)
    near, weight = rows[:, :NEIGHBOURS], (similarity[:, :NEIGHBOURS] / TEMPERATURE).softmax(1)
    rows = rows[:, :candidates]
    measured, residual = _residuals(examples)
    scores = _mean_of(measured, residual, rows, queries.exclude)
    for i in range(len(queries)):
        known = near[i][near[i] >= 0]
        hit = measured[known].flatten()[None] == rows[i][:, None]  # (K, neighbours x measured)
        above_mean = residual[known].flatten() - scores[i][:, None]
        each = weight[i][: len(known), None].expand(-1, measured.shape[1]).flatten()
        scores[i] += (hit * each * above_mean).sum(1)
    return best(scores.masked_fill(rows < 0, -torch.inf), rows, count)


def oracle(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The candidates that do best on the query itself: all K are tried, against the label of the query."""
    _, rows = nearest(queries, examples, candidates, candidates)
    performance = examples.measure(queries, rows)
    if performance.isnan().any():
        row = int(rows[performance.isnan()][0])
        raise ValueError(
            f"the metric is not a number where example {examples.pool.ids[row]!r} was shown: a metric "
            "has to be defined for every prediction, also for an empty one"
        )
    return best(performance, rows, count)


AUTO = "auto"  # the best of them on images of the pool
STRATEGIES = {
    "random": random,
    "nearest": nearest,
    "static": static,
    "dense": dense,
    "transfer": transfer,
    "oracle": oracle,
}
NEIGHBOURS, TEMPERATURE = 40, 0.05


def find_strategy(selector: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """A strategy by name, or anything called as one: `(queries, examples, count, candidates) -> (scores, rows)`."""
    if isinstance(selector, str):
        if selector not in STRATEGIES:
            raise ValueError(f"strategy={selector!r}: it must be one of {[*STRATEGIES, AUTO]}")
        return STRATEGIES[selector]
    if not callable(selector):
        raise TypeError(
            f"selector is a {type(selector).__name__}: pass one of {list(STRATEGIES)}, or a callable "
            "(queries, examples, count, candidates) -> (scores, rows)"
        )
    return selector


def best(scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of `scores (B, K)` with their rows; among equals the one that stands first."""
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return scores.gather(1, top), rows.gather(1, top)


def _best_of_all(scores: Tensor, queries: Queries, count: int) -> tuple[Tensor, Tensor]:
    """The best of the whole pool, `scores (B, n)`, without the query's own row and what it may not be shown."""
    rows = scores.sort(dim=1, descending=True, stable=True).indices
    left = rows.shape[1] - (queries.exclude is not None)
    if queries.exclude is not None or queries.allowed is not None:
        # moved to the end, since a score of -inf may be another's too
        wrong = torch.zeros_like(rows, dtype=torch.bool)
        if queries.allowed is not None:
            wrong |= ~queries.allowed.cpu().gather(1, rows)
        if queries.exclude is not None:
            wrong |= rows == torch.as_tensor(queries.exclude).cpu()[:, None]
        order = wrong.int().sort(dim=1, stable=True).indices
        rows = rows.gather(1, order)
        left = min(left, int((~wrong).sum(1).min()))
    rows = rows[:, : min(count, left)]
    return scores.gather(1, rows), rows


def _table(examples: Examples) -> tuple[Tensor, Tensor]:
    model, pool = examples.model, examples.pool
    if model.config.performance is None:
        raise ValueError(
            "this strategy needs the performance of the pool's examples on each other: run "
            "hf_effdl.measure_examples(model, pool) first, or choose 'nearest' or 'dense'"
        )
    if model.config.pool_fingerprint != pool.fingerprint:
        raise ValueError(
            f"the performance was measured on the pool {model.config.pool_fingerprint}, but this is "
            f"{pool.fingerprint}: the pool was changed since; run measure_examples(model, pool) "
            "again"
        )
    return model.measured_candidates.long().cpu(), model.measured_performance.float().cpu()


def _residuals(examples: Examples) -> tuple[Tensor, Tensor]:
    """Which examples were measured on each image, and their performance less the image's mean; (n, K) each."""
    measured, values = _table(examples)
    known = measured >= 0
    centre = (values * known).sum(1) / known.sum(1).clamp(min=1)
    return measured, torch.where(known, values - centre[:, None], 0.0)


def _quality(examples: Examples) -> Tensor:
    """Mean residual of each example, (n,); -inf for one that was never measured."""
    total, count = _totals(*_residuals(examples))
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)


def _totals(measured: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of residuals of each example, and how many there are, (n,)."""
    known = measured >= 0
    total, count = torch.zeros(len(measured)), torch.zeros(len(measured))
    total.index_add_(0, measured[known], residual[known])
    count.index_add_(0, measured[known], torch.ones(int(known.sum())))
    return total, count


def _mean_of(measured: Tensor, residual: Tensor, rows: Tensor, own: Tensor | None) -> Tensor:
    """Mean residual of examples `rows (B, K)`, without what was measured on the pool's rows `own (B,)`; 0 for none."""
    total, count = (part[rows.clamp(min=0)] for part in _totals(measured, residual))
    if own is not None:
        own = torch.as_tensor(own).cpu()
        here = (measured[own.clamp(min=0)][:, None] == rows[:, :, None]) & (own >= 0)[:, None, None]
        total = total - (here * residual[own.clamp(min=0)][:, None]).sum(2)
        count = count - here.sum(2)
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)
