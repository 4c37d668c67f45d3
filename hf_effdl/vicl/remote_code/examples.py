"""A batch of queries and a pool of examples, as strategies and the frozen model see them."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .cascade_consensus import small
from .cascade_features import label_statistics, matches_of
from .cascade_rows import quarters_of
from .images import pixels
from .pool_reader import PoolReader
from .pool_search import exact_search


# images, labels and features of the pool that are kept between calls
CACHE_BYTES = 2**30
# cells of one frozen model call where many examples are tried
CHUNK = 64
# rows that are ruled out up to which a search over all of the pool is the cheaper one
FEW = 1000
# of what all `Examples` keep, for the moments in which it is looked up and put there; not while it is made
KEEPING = Lock()


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
        allowed: `(B, n)` bool: rows of the pool that each may be shown; None: all. `Examples.nearest` heeds it, and a
            strategy of yours that looks elsewhere must.
    """

    cells: Tensor
    views: dict[str, Tensor]
    truth: Tensor | None = None
    exclude: Tensor | None = None
    seed: int = 0
    allowed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cells)


class MetricError(ValueError):
    """What the user's metric raised, with its name."""


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
        self._kept: dict[str, OrderedDict[int, Tensor]] = defaultdict(OrderedDict)
        self._bytes, self._fingerprint = 0, pool.fingerprint

    def encoded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen model takes of examples: encodings `(*rows, ...)` and labels `(*rows, 3, h, w)`."""
        return self._gather("encoded", rows, self._encode), self._gather("labels", rows, self._draw)

    def nearest(self, queries: Queries, count: int) -> tuple[Tensor, Tensor]:
        """The most similar examples that each query may be shown: similarities and rows `(B, count)`, best first.

        Fewer where the pool has fewer; -inf and -1 at the end of a query's list that is shorter than another's.
        """
        vectors, allowed = queries.views["vector"].cpu(), queries.allowed
        if allowed is None:
            return self.pool.search(vectors, count, exclude=queries.exclude)
        allowed = allowed.clone().cpu()
        if queries.exclude is not None:
            own = torch.as_tensor(queries.exclude).cpu()
            allowed[(own >= 0).nonzero()[:, 0], own[own >= 0]] = False
        least, most = int(allowed.sum(1).min()), int(allowed.sum(1).max())
        if len(self.pool) - least <= FEW:  # what is ruled out is found, too, and taken away
            similarity, rows = self.pool.search(vectors, count + len(self.pool) - least)
            wrong = ~allowed.gather(1, rows)
            order = wrong.int().sort(dim=1, stable=True).indices
            similarity, rows = similarity.masked_fill(wrong, -torch.inf), rows.masked_fill(wrong, -1)
            count = min(count, most)
            return similarity.gather(1, order)[:, :count], rows.gather(1, order)[:, :count]
        count = min(count, most)
        similarity, rows = torch.full((len(vectors), count), -torch.inf), torch.full((len(vectors), count), -1)
        for i, mine in enumerate(allowed):
            some = mine.nonzero()[:, 0]
            k = min(count, len(some))
            if k:
                values, places = exact_search([self.pool.vectors[some]], vectors[i : i + 1].float(), k)
                similarity[i, :k], rows[i, :k] = values[0], some[places[0]]
        return similarity, rows

    def grids(self, rows: Tensor) -> Tensor:
        """Unit features of every cell of the grid, `(*rows, gh gw, d)`; computed where the pool has not kept them."""
        return self._gather("grids", rows, self._features)

    def small_labels(self, rows: Tensor) -> Tensor:
        """Labels of at most 56 pixels a side, `(*rows, 3, h, w)`."""
        return self._gather("small", rows, lambda part: small(self._draw(part)))

    def statistics(self, rows: Tensor) -> Tensor:
        """`label_statistics` of the small labels, `(*rows, 10)`."""
        return self._gather("statistics", rows, lambda part: label_statistics(self.small_labels(torch.tensor(part))))

    def quarters(self, rows: Tensor) -> Tensor:
        """Unit vectors of the four quarters of each image, `(*rows, 4 d)`."""
        return self._gather("quarters", rows, lambda part: quarters_of(self.pool.tokens(torch.tensor(part))))

    def shares(self, rows: Tensor, sides: tuple[int, int]) -> Tensor:
        """How white the label is in each cell of a grid of such sides, `(*rows, gh gw)`."""

        def make(part: Sequence[int]) -> Tensor:
            white = self.small_labels(torch.tensor(part)).mean(1, keepdim=True)
            return F.adaptive_avg_pool2d(white, sides).flatten(1)

        return self._gather(f"shares of {sides}", rows, make)

    @torch.no_grad()
    def matches(self, views: dict[str, Tensor], rows: Tensor) -> Tensor:
        """`dense_matches` of queries with each of `rows (B, K)`: `(B, K, 8)`."""
        grid = views["grid"]
        shares = self.shares(rows, tuple(grid.shape[1:3]))
        asked = F.normalize(grid.flatten(1, 2).float(), dim=2)
        # all are made together, so that an answer does not depend on who asked before
        cells, count = self._values("grids", rows, self._features), rows.shape[1]
        each = [cells[start : start + count] for start in range(0, len(cells), count)]
        return torch.stack([matches_of(*one) for one in zip(asked, each, shares.to(asked.device), strict=True)])

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
        try:
            values = [self._judged(one, other) for one, other in pairs]
        except Exception as error:  # noqa: BLE001 - it is the user's, and may raise anything
            raise MetricError(
                f"the metric {getattr(self.metric, 'name', None) or getattr(self.metric, '__name__', self.metric)!r} "
                f"raised {type(error).__name__}: {error}; pass one that is called with predictions=[...] and "
                f"references=[...], of one {self.task.name} each as the task decodes it, and gives a number"
            ) from error
        return torch.tensor(values) * (1 if self.greater_is_better else -1)

    def _judged(self, prediction: Any, reference: Any) -> float:
        value = getattr(self.metric, "compute", self.metric)(predictions=[prediction], references=[reference])
        return float(next(iter(value.values())) if isinstance(value, dict) else value)

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

    def _gather(self, kind: str, rows: Tensor, make: Callable[[Sequence[int]], Tensor]) -> Tensor:
        return torch.stack(self._values(kind, rows, make)).unflatten(0, rows.shape)

    @torch.no_grad()
    def _values(self, kind: str, rows: Tensor, make: Callable[[Sequence[int]], Tensor]) -> list[Tensor]:
        """Of each row, in their order, what is kept, or made now."""
        wanted, fingerprint = rows.flatten().tolist(), self.pool.fingerprint
        with KEEPING:
            self._forget_another_pool(fingerprint)
            values = {row: self._kept[kind][row] for row in wanted if row in self._kept[kind]}
        missing, made = [row for row in dict.fromkeys(wanted) if row not in values], {}
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            made |= {row: value.clone() for row, value in zip(part, make(part))}
        with KEEPING:
            if fingerprint == self._fingerprint:  # else another thread has seen the pool change
                self._keep(kind, values, made)
        values |= made
        return [values[row] for row in wanted]

    def _keep(self, kind: str, used: Iterable[int], made: dict[int, Tensor]) -> None:
        kept = self._kept[kind]
        for row in used:
            if row in kept:
                kept.move_to_end(row)
        for row, value in made.items():
            if row not in kept:
                self._bytes += value.numel() * value.element_size()
            kept[row] = value
        self._forget_the_oldest()

    def _forget_another_pool(self, fingerprint: str) -> None:
        if fingerprint != self._fingerprint:  # rows have other numbers now
            self._bytes, self._fingerprint = 0, fingerprint
            for kept in self._kept.values():
                kept.clear()

    def _forget_the_oldest(self) -> None:
        while self._bytes > CACHE_BYTES:  # of the largest kind first
            largest = max(self._kept.values(), key=len)
            _, value = largest.popitem(last=False)
            self._bytes -= value.numel() * value.element_size()
