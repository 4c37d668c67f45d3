"""A batch of queries and a pool of examples, as strategies and the frozen model see them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .cascade_consensus import small
from .cascade_features import dense_matches
from .images import pixels
from .pool_reader import PoolReader


# images, labels and features of the pool that are kept between calls
CACHE_BYTES = 2**30
# cells of one frozen model call where many examples are tried
CHUNK = 64


class InContextModel(Protocol):
    """What is needed of a model here and in strategies; a `VisualInContextModel` offers it."""

    config: Any  # performance, pool_fingerprint and candidates
    device: torch.device
    encoder: Any
    frozen: Any  # encodes images, and paints the label of a query that is shown examples
    image_size: tuple[int, int]
    resample: int
    measured_candidates: Tensor
    measured_performance: Tensor


@dataclass
class Queries:
    """A batch of queries in every form that a strategy may ask for.

    Args:
        cells: `(B, 3, h, w)` in [0, 1] at the frozen model's size.
        views: of the encoder: vector, tokens and grid.
        truth: `(B, 3, h, w)` label images, for the oracle and for measuring; None where they are not known.
        exclude: `(B,)` rows of the pool that the queries themselves are, which are never chosen, -1 for one that is
            not in the pool; None: none are.
        seed: of the random strategy.
    """

    cells: Tensor
    views: dict[str, Tensor]
    truth: Tensor | None = None
    exclude: Tensor | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.cells)


class Examples:
    """A pool as the frozen model sees it: encoded images and label cells by row, and grids; kept up to 1 GiB.

    A pool that grows or shrinks in place is noticed, and what was kept of it is forgotten.

    Args:
        pool: the examples.
        model: whose frozen model and encoder are used.
        task: draws the labels.
        metric: None for the task's own score, which is computed on label images; or any `evaluate` module or callable
            `metric(predictions=[...], references=[...])`, called for one prediction at a time, as the task decodes it
            at the cell's size. It may return a number or a dict, whose first value counts.
        greater_is_better: of `metric`.
    """

    def __init__(
        self, pool: PoolReader, model: InContextModel, task: Any, metric: Any = None, greater_is_better: bool = True
    ) -> None:
        self.pool, self.model, self.task = pool, model, task
        self.metric, self.greater_is_better = metric, greater_is_better
        self._kept: dict[str, OrderedDict[int, Tensor]] = {
            kind: OrderedDict() for kind in ("encoded", "labels", "small", "grids")
        }
        self._bytes, self._fingerprint = 0, pool.fingerprint

    def encoded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen model takes of examples: encodings `(*rows, ...)` and labels `(*rows, 3, h, w)`."""
        return self._gather("encoded", rows, self._encode), self._gather("labels", rows, self._draw)

    def grids(self, rows: Tensor) -> Tensor:
        """Unit features of every cell of the grid, `(*rows, gh gw, d)`; computed where the pool has not kept them."""
        return self._gather("grids", rows, self._features)

    def small_labels(self, rows: Tensor) -> Tensor:
        """Labels of at most 56 pixels a side, `(*rows, 3, h, w)`."""
        return self._gather("small", rows, lambda part: small(self._draw(part)))

    @torch.no_grad()
    def matches(self, views: dict[str, Tensor], rows: Tensor) -> Tensor:
        """`dense_matches` of queries with each of `rows (B, K)`: `(B, K, 8)`."""
        grid = views["grid"]
        shares = F.adaptive_avg_pool2d(self.small_labels(rows).flatten(0, 1).mean(1, keepdim=True), grid.shape[1:3])
        shares = shares.flatten(1).unflatten(0, rows.shape)
        return dense_matches(F.normalize(grid.flatten(1, 2).float(), dim=2), self.grids(rows), shares)

    @torch.no_grad()
    def answers(self, encoded: Tensor, rows: Tensor) -> Tensor:
        """What the frozen model paints for each query when shown each of `rows (B, m)` alone: `(B, m, 3, h, w)`.

        Args:
            encoded: `(B, ...)` queries as the frozen model encodes them.
        """
        places = torch.arange(len(encoded)).repeat_interleave(rows.shape[1])
        parts = []
        for b, flat in zip(places.split(CHUNK), rows.clamp(min=0).flatten().split(CHUNK), strict=True):
            images, labels = self.encoded(flat)
            parts.append(self.model.frozen.predict(encoded[b.to(encoded.device)], images[:, None], labels[:, None]))
        return torch.cat(parts).unflatten(0, rows.shape)

    @torch.no_grad()
    def measure(self, queries: Queries, rows: Tensor) -> Tensor:
        """Performance of every example in `rows (B, K)` on its query: larger is better, `(B, K)`.

        One frozen model call each; rows of -1 give -inf.
        """
        if queries.truth is None:
            raise ValueError(
                "the performance of an example can only be measured where the label of the query is "
                "known: pass labels="
            )
        encoded = self.model.frozen.encode(queries.cells)
        places = (rows >= 0).nonzero()
        performance = torch.full(rows.shape, -torch.inf)
        for part in places.split(CHUNK) if len(places) else ():
            b, k = part.unbind(1)
            images, labels = self.encoded(rows[b, k])
            painted = self.model.frozen.predict(encoded[b], images[:, None], labels[:, None])
            performance[b, k] = self.score(painted, queries.truth[b]).cpu()
        return performance

    def score(self, painted: Tensor, truth: Tensor) -> Tensor:
        """`(N, 3, h, w)` twice to `(N,)`, larger is better."""
        if self.metric is None:
            return self.task.score(painted, truth) * (1 if self.task.greater_is_better else -1)
        size = tuple(painted.shape[-2:])
        pairs = zip(self.task.decode(painted, size), self.task.decode(truth, size))
        compute = getattr(self.metric, "compute", self.metric)
        values = [compute(predictions=[one], references=[other]) for one, other in pairs]
        values = [next(iter(value.values())) if isinstance(value, dict) else value for value in values]
        return torch.tensor([float(value) for value in values]) * (1 if self.greater_is_better else -1)

    # ---- what is kept

    def _encode(self, rows: Sequence[int]) -> Tensor:
        images = [self.task.query(self.pool.image(row)) for row in rows]
        return self.model.frozen.encode(
            pixels(images, self.model.image_size, self.model.resample).to(self.model.device)
        )

    def _draw(self, rows: Sequence[int]) -> Tensor:
        pairs = [(self.pool.label(row), self.pool.image(row)) for row in rows]
        return self.task.labels(*zip(*pairs), self.model.image_size).to(self.model.device)

    def _features(self, rows: Sequence[int]) -> Tensor:
        if self.pool.has_grids:
            grids = self.pool.grids(torch.tensor(rows)).float().to(self.model.device)
        else:
            images = [self.task.query(self.pool.image(row)) for row in rows]
            encoder = self.model.encoder
            grids = encoder(pixels(images, encoder.image_size, encoder.resample).to(self.model.device))["grid"]
        return F.normalize(grids.flatten(1, 2), dim=2)

    @torch.no_grad()
    def _gather(self, kind: str, rows: Tensor, make: Callable[[Sequence[int]], Tensor]) -> Tensor:
        self._forget_another_pool()
        kept, wanted = self._kept[kind], rows.flatten().tolist()
        values = {row: kept[row] for row in wanted if row in kept}
        missing = [row for row in dict.fromkeys(wanted) if row not in values]
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            for row, value in zip(part, make(part)):
                kept[row] = values[row] = value.clone()
                self._bytes += value.numel() * value.element_size()
        for row in values:
            kept.move_to_end(row)
        self._forget_the_oldest()
        return torch.stack([values[row] for row in wanted]).unflatten(0, rows.shape)

    def _forget_another_pool(self) -> None:
        if self.pool.fingerprint != self._fingerprint:  # rows have other numbers now
            self._bytes, self._fingerprint = 0, self.pool.fingerprint
            for kept in self._kept.values():
                kept.clear()

    def _forget_the_oldest(self) -> None:
        while self._bytes > CACHE_BYTES:  # of the largest kind first
            largest = max(self._kept.values(), key=len)
            _, value = largest.popitem(last=False)
            self._bytes -= value.numel() * value.element_size()
