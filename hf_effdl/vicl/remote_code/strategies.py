"""Which example to show: six strategies, from a random one to the one that looks at the answer."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cascade_consensus import small
from .cascade_features import dense_matches
from .visual_tasks import pixels


if TYPE_CHECKING:  # the model keeps a selector
    from .modeling_visual_in_context import VisualInContextModel
    from .pool_reader import PoolReader

# images, labels and features of the pool that are kept between calls
CACHE_BYTES = 2**30
# cells of one frozen model call where many examples are tried
CHUNK = 64


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
        self,
        pool: "PoolReader",
        model: "VisualInContextModel",
        task: Any,
        metric: Any = None,
        greater_is_better: bool = True,
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
    def answers(self, asked: Tensor, rows: Tensor) -> Tensor:
        """What the frozen model paints for each query when shown each of `rows (B, m)` alone: `(B, m, 3, h, w)`.

        Args:
            asked: `(B, ...)` queries as the frozen model encodes them.
        """
        places = torch.arange(len(asked)).repeat_interleave(rows.shape[1])
        parts = []
        for b, flat in zip(places.split(CHUNK), rows.clamp(min=0).flatten().split(CHUNK), strict=True):
            images, labels = self.encoded(flat)
            parts.append(self.model.frozen.predict(asked[b.to(asked.device)], images[:, None], labels[:, None]))
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
        asked = self.model.frozen.encode(queries.cells)
        places = (rows >= 0).nonzero()
        found = torch.full(rows.shape, -torch.inf)
        for part in places.split(CHUNK) if len(places) else ():
            b, k = part.unbind(1)
            images, labels = self.encoded(rows[b, k])
            painted = self.model.frozen.predict(asked[b], images[:, None], labels[:, None])
            found[b, k] = self.score(painted, queries.truth[b]).cpu()
        return found

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
            views = encoder(pixels(images, encoder.image_size, encoder.resample).to(self.model.device))
            grids = views["grid"]
        return F.normalize(grids.flatten(1, 2), dim=2)

    @torch.no_grad()
    def _gather(self, kind: str, rows: Tensor, make: Callable[[Sequence[int]], Tensor]) -> Tensor:
        if self.pool.fingerprint != self._fingerprint:  # rows have other numbers now
            self._bytes, self._fingerprint = 0, self.pool.fingerprint
            for kept in self._kept.values():
                kept.clear()
        kept = self._kept[kind]
        wanted = rows.flatten().tolist()
        here = {row: kept[row] for row in wanted if row in kept}
        missing = [row for row in dict.fromkeys(wanted) if row not in here]
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            for row, value in zip(part, make(part)):
                here[row] = value.clone()
                kept[row] = here[row]
                self._bytes += value.numel() * value.element_size()
        for row in here:
            kept.move_to_end(row)
        while self._bytes > CACHE_BYTES:  # the oldest of the largest kind goes first
            oldest = max(self._kept.values(), key=len)
            _, value = oldest.popitem(last=False)
            self._bytes -= value.numel() * value.element_size()
        return torch.stack([here[row] for row in wanted]).unflatten(0, rows.shape)


def nearest(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The most similar examples: cosine of the encoder's vectors (UnsupPR, arXiv 2301.13670)."""
    return examples.pool.search(queries.views["vector"].cpu(), count, exclude=queries.exclude)


def random(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Examples drawn from the whole pool; the same for the same image and seed, whatever else is in the batch."""
    scores = []
    for i in range(len(queries)):
        generator = torch.Generator().manual_seed(_number(queries.cells[i], queries.seed))
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
    scores = torch.stack([(examples.grids(row) @ one.T).amax(1).mean(1).cpu() for one, row in zip(asked, rows)])
    return _best(scores, rows, count)


def transfer(queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The candidates that did best on the pool images most like the query; needs measured performance.

    With R[j, c] the performance of example c on pool image j less the mean of what was measured on j, and the 40
    nearest neighbours j of the query,

        s(q, c) = sum_j w_j R[j, c],    w_j = softmax_j(cos(q, j) / temperature);

    where c was not measured on j, as for j = c, the mean of R[., c] stands for it.
    """
    similarity, rows = nearest(queries, examples, max(candidates, NEIGHBOURS), candidates)
    near, weight = rows[:, :NEIGHBOURS], (similarity[:, :NEIGHBOURS] / TEMPERATURE).softmax(1)
    rows = rows[:, :candidates]
    measured, residual = _residuals(examples)
    mean = _quality(examples).nan_to_num(neginf=0.0)
    scores = mean[rows]
    for i in range(len(queries)):
        hit = measured[near[i]].flatten()[None] == rows[i][:, None]  # (K, neighbours x measured)
        above_mean = residual[near[i]].flatten() - mean[rows[i]][:, None]
        each = weight[i][:, None].expand(-1, measured.shape[1]).flatten()
        scores[i] += (hit * each * above_mean).sum(1)
    return _best(scores, rows, count)


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
    return _best(performance, rows, count)


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
            raise ValueError(f"strategy={selector!r}: it must be one of {list(STRATEGIES)}")
        return STRATEGIES[selector]
    if not callable(selector):
        raise TypeError(
            f"selector is a {type(selector).__name__}: pass one of {list(STRATEGIES)}, or a callable "
            "(queries, examples, count, candidates) -> (scores, rows)"
        )
    return selector


def _best(scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # stable: among equals the nearer one, which stands first
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return scores.gather(1, top), rows.gather(1, top)


def _best_of_all(scores: Tensor, queries: Queries, count: int) -> tuple[Tensor, Tensor]:
    """The best of the whole pool, `scores (B, n)`, without the query's own row."""
    rows = scores.sort(dim=1, descending=True, stable=True).indices
    if queries.exclude is not None:
        # moved to the end, since a score of -inf may be another's too
        own = rows == torch.as_tensor(queries.exclude).cpu()[:, None]
        rows = rows.gather(1, own.sort(dim=1, stable=True).indices)
    rows = rows[:, : min(count, rows.shape[1] - (queries.exclude is not None))]
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
    measured, residual = _residuals(examples)
    known = measured >= 0
    total, count = torch.zeros(len(measured)), torch.zeros(len(measured))
    total.index_add_(0, measured[known], residual[known])
    count.index_add_(0, measured[known], torch.ones(int(known.sum())))
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)


def _number(cell: Tensor, seed: int) -> int:
    """A number from an image's pixels and a seed."""
    digest = hashlib.sha256(f"{seed}:".encode() + cell.cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:7], "big")
