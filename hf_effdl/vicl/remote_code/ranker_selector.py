"""The strategy of the list-wise ranker: many short lists of a query's candidates, made into one ranking."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_listwise_ranker import ListwiseRankerConfig
from .examples import Examples, Queries
from .images import image_seed
from .modeling_listwise_ranker import ListwiseRanker, label_tokens
from .pool_reader import PoolReader
from .ranker_aggregation import METHODS, aggregate_rankings
from .ranker_designs import covering_lists, knock_out, partitions, random_lists
from .ranker_reliable import refine
from .strategies import nearest


# what makes one pass: a design; one partition; as many random lists as a partition has; one tournament
SCHEDULES = {"covering": 1, "partitions": 10, "random": 10, "knock-out": 1}
OPTIONS = ("schedule", "passes", "method", "fill", "seed")
# nearest examples among which a refined list of candidates is filled up
FILL = 1500
# labels are drawn so large before their means are taken, for whatever frozen model
LABEL_SIZE, LABELS_AT_ONCE = 64, 64


def pool_label_tokens(pool: PoolReader, rows: Sequence[int], task: object) -> Tensor:
    """`label_tokens` of rows of a pool: `(len(rows), 5, 3)`.

    Args:
        pool: whose labels are drawn.
        rows: of it.
        task: draws them, see `find_task`.
    """
    tokens = torch.zeros(len(rows), 5, 3)
    for start in range(0, len(rows), LABELS_AT_ONCE):
        part = rows[start : start + LABELS_AT_ONCE]
        images, labels = [pool.image(row) for row in part], [pool.label(row) for row in part]
        tokens[start : start + len(part)] = label_tokens(task.labels(labels, images, (LABEL_SIZE, LABEL_SIZE)))
    return tokens


class RankerSelector(nn.Module):
    """Partial2Global as a strategy: nearest K, short lists of them, a ranker on each, one global ranking.

    Pass it as `selector=` (or as `strategy=` of a call) to a `VisualInContextPipeline`. The lists of all queries of a
    batch go through each ranker in one batch (the rounds of a tournament one after the other), with tokens that the
    pool has kept.

    Args:
        rankers: a `ListwiseRanker` or several, for lists of the length that each was trained on
            (`config.list_length`); or `{length: ranker}`.
        schedule: which lists are ranked:
            "covering"    the blocks of a covering design, shuffled: every two candidates meet (RH-Partial2Global)
            "partitions"  shuffled copies of the candidates, cut into lists (Partial2Global)
            "random"      a tournament with the first ranker, and random lists (Partial2Global's released code)
            "knock-out"   the tournament alone, whose winner is chosen; one ranker
        passes: over the design; copies; K / k random lists each. Default: 1 for "covering", else 10.
        method: how lists become one ranking, "hodge" or "borda", see `aggregate_rankings`.
        reliable: `(m,)` rows of the pool, see `reliable_rows`: other candidates are not ranked.
        fill: fill up what `reliable` leaves with the next nearest reliable rows, to K again.
        seed: of the lists. They depend on it and on the query's pixels, so not on what else is in the batch.

    Call:
        `(queries, examples, count, candidates) -> (scores (B, count), rows (B, count))`, best first. Candidates that
        are not reliable come last, by similarity, and score -inf. A query without any reliable candidate keeps them
        all.

    Raises:
        ValueError: for unknown names, K not above a ranker's list length, and a pool made with another encoder than
            the one a ranker was trained on.

    Example:
        >>> from hf_effdl.vicl.remote_code.configuration_listwise_ranker import ListwiseRankerConfig
        >>> rankers = [ListwiseRanker(ListwiseRankerConfig(hidden_size=8, list_length=k)) for k in (5, 10)]
        >>> RankerSelector(rankers, "covering").lengths
        [5, 10]

    Source: arXiv 2405.15279, sections 3.2 and 3.3; arXiv 2509.25989 (covering designs, reliable set).
    """

    kind = "ranker"

    def __init__(
        self,
        rankers: ListwiseRanker | Sequence[ListwiseRanker] | Mapping[int, ListwiseRanker],
        schedule: str = "covering",
        *,
        passes: int | None = None,
        method: str = "hodge",
        reliable: Tensor | None = None,
        fill: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rankers = _by_length(rankers)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: choose one of {list(SCHEDULES)}")
        if schedule == "knock-out" and len(rankers) > 1:
            raise ValueError(
                f"schedule='knock-out' plays with one ranker, and here are those for {list(rankers)}: "
                "pass one, or another schedule"
            )
        if method not in METHODS:
            raise ValueError(f"method={method!r}: choose one of {METHODS}")
        passes = SCHEDULES[schedule] if passes is None else passes
        if isinstance(passes, bool) or not isinstance(passes, Integral) or passes < 1 + (schedule == "partitions"):
            raise ValueError(
                f"passes={passes!r}: pass a whole number of at least 1; of partitions at least 2, since "
                "the lists of one have nothing in common"
            )
        reliable = None if reliable is None else _checked_rows(reliable)
        if fill and reliable is None:
            raise ValueError("fill=True fills up what reliable= leaves: pass reliable=reliable_rows(...)")
        self.rankers = nn.ModuleDict({str(length): ranker for length, ranker in rankers.items()})
        self.schedule, self.passes, self.method, self.fill, self.seed = schedule, int(passes), method, fill, seed
        self.register_buffer("reliable", reliable)
        self._labels: tuple[str | None, dict[int, Tensor]] = (None, {})  # of the pool of this fingerprint

    @property
    def lengths(self) -> list[int]:
        """Lengths of the lists, one for each ranker."""
        return [int(length) for length in self.rankers]

    def settings(self, config: object) -> dict[str, Any]:
        """What is needed to make it again, beside the weights."""
        options = {name: getattr(self, name) for name in OPTIONS}
        reliable = None if self.reliable is None else len(self.reliable)
        rankers = {length: ranker.config.to_diff_dict() for length, ranker in self.rankers.items()}
        return {"kind": self.kind, **options, "reliable": reliable, "rankers": rankers}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "RankerSelector":
        """A selector with room for the weights, which are then loaded."""
        rankers = {
            int(length): ListwiseRanker(ListwiseRankerConfig(**config))
            for length, config in settings["rankers"].items()
        }
        # on the CPU also where a model is made without memory for its weights
        count = settings["reliable"]
        reliable = None if count is None else torch.zeros(count, dtype=torch.long, device="cpu")
        options = {name: settings[name] for name in OPTIONS}
        return cls(rankers, reliable=reliable, **options).eval()

    @torch.no_grad()
    def forward(self, queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, Tensor]:
        """See the class."""
        pool = examples.pool
        for ranker in self.rankers.values():
            ranker.check_tokens(pool.dim, pool.encoder["fingerprint"])
        _, near = nearest(queries, examples, candidates, candidates)
        if near.shape[1] <= max(self.lengths):
            raise ValueError(
                f"K={near.shape[1]} candidates are not above the list length k={max(self.lengths)}: "
                "raise candidates=, take a larger pool, or a ranker of shorter lists"
            )
        if (near < 0).any():
            raise ValueError(
                "the queries of a batch have lists of different lengths: exclude rows so that the same number is "
                "left, or ask for one query at a time"
            )
        rows = self._refined(near, queries, examples)
        sizes = (rows >= 0).sum(1)
        scores = torch.full(rows.shape, -torch.inf)
        generators = [torch.Generator().manual_seed(image_seed(cell, self.seed, "lists")) for cell in queries.cells]
        for size in sizes.unique().tolist():  # one size, unless some rows are not reliable
            part = (sizes == size).nonzero()[:, 0]
            tokens = queries.views["tokens"]
            scores[part, :size] = self.rank(
                tokens[part.to(tokens.device)],
                pool.tokens(rows[part, :size]),
                self._labels_for(rows[part, :size], examples),
                [generators[i] for i in part.tolist()],
            )
        order = scores.sort(dim=1, descending=True, stable=True).indices
        scores, rows = scores.gather(1, order), rows.gather(1, order)
        if count > int(sizes.min()):
            rows, scores = _with_the_rest(rows, scores, near)
        return scores[:, :count], rows[:, :count]

    def _refined(self, near: Tensor, queries: Queries, examples: Examples) -> Tensor:
        if self.reliable is None:
            return near
        if int(self.reliable.max()) >= len(examples.pool):
            raise ValueError(
                f"reliable= names row {int(self.reliable.max())}, but the pool has {len(examples.pool)}: "
                "compute reliable_rows on this pool"
            )
        longer = nearest(queries, examples, max(FILL, near.shape[1]), near.shape[1])[1] if self.fill else None
        return refine(near, self.reliable.cpu(), fill=longer)

    def rank(self, query: Tensor, tokens: Tensor, labels: Tensor | None, generators: list[torch.Generator]) -> Tensor:
        """Global scores `(B, v)` of candidates, from the lists that are drawn of them.

        Args:
            query: `(B, T, d)` tokens.
            tokens: `(B, v, T, d)` of the candidates.
            labels: `(B, v, T, c)` of the candidates, for rankers that look at them.
            generators: of each query, draw its lists.
        """
        b, v = tokens.shape[:2]
        if v == 1:
            return torch.zeros(b, 1)
        ranked: list[Tensor] = []
        for number, (length, ranker) in enumerate(zip(self.lengths, self.rankers.values())):
            looks = ranker.config.label_channels is not None
            rank = _by_score(ranker, query, tokens, labels if looks else None)
            k = min(length, v)
            if self.schedule == "knock-out" or (self.schedule == "random" and not number):
                # a tournament's lists hang together as a tree: its winner is first in whatever ranking of them alone
                ranked.append(knock_out(rank, v, k, batch=b)[1])
            if self.schedule != "knock-out":
                # in the order of similarity, so that of equal scores the nearer one is the better
                ranked.append(rank(self._lists(v, k, generators).sort(dim=2).values))
        widest = max(lists.shape[2] for lists in ranked)
        every = torch.cat([nn.functional.pad(lists, (0, widest - lists.shape[2]), value=-1) for lists in ranked], 1)
        return aggregate_rankings(every, v, self.method).float()

    def _lists(self, v: int, k: int, generators: list[torch.Generator]) -> Tensor:
        if v == k:
            return torch.arange(v).expand(len(generators), 1, v)
        if self.schedule == "covering":
            drawn = [covering_lists(v, k, self.passes, one) for one in generators]
        elif self.schedule == "partitions":
            drawn = [partitions(v, k, self.passes, one) for one in generators]
        else:
            drawn = [random_lists(v, k, self.passes * -(-v // k), one) for one in generators]
        return torch.stack(drawn)

    def _labels_for(self, rows: Tensor, examples: Examples) -> Tensor | None:
        """`label_tokens` of candidates, each drawn once; None where no ranker looks at them."""
        if all(ranker.config.label_channels is None for ranker in self.rankers.values()):
            return None
        pool, labels = self._labels  # another thread may put another pool's there
        if pool != examples.pool.fingerprint:
            pool, labels = self._labels = examples.pool.fingerprint, {}
        wanted = rows.flatten().tolist()
        missing = [row for row in dict.fromkeys(wanted) if row not in labels]
        labels.update(zip(missing, pool_label_tokens(examples.pool, missing, examples.task)))
        return torch.stack([labels[row] for row in wanted]).unflatten(0, rows.shape)


def _by_length(
    rankers: ListwiseRanker | Sequence[ListwiseRanker] | Mapping[int, ListwiseRanker],
) -> Mapping[int, ListwiseRanker]:
    if not isinstance(rankers, Mapping):
        several = [rankers] if isinstance(rankers, nn.Module) or not isinstance(rankers, Iterable) else list(rankers)
        if not all(isinstance(ranker, ListwiseRanker) for ranker in several):
            raise TypeError(f"rankers={rankers!r}: pass a ListwiseRanker, a list of them, or {{length: ranker}}")
        rankers = {ranker.config.list_length: ranker for ranker in several}
        if len(rankers) < len(several):
            raise ValueError(
                f"{len(several)} rankers for lists of {list(rankers)}: pass {{length: ranker}} with different lengths"
            )
    if not all(isinstance(length, int) for length in rankers):
        raise TypeError(f"rankers of lengths {list(rankers)}: lengths are whole numbers")
    if not rankers or min(rankers) < 2:
        raise ValueError(f"rankers for lists of {list(rankers)}: pass one or more, for lists of 2 items or more")
    return rankers


def _checked_rows(reliable: Tensor) -> Tensor:
    reliable = torch.as_tensor(reliable, device="cpu")
    if reliable.dim() != 1 or not len(reliable) or reliable.dtype == torch.bool:
        raise ValueError(
            f"reliable is {reliable.dtype} of shape {tuple(reliable.shape)}: pass rows of the pool, (m,), one or more"
        )
    return reliable.long()


def _by_score(
    ranker: ListwiseRanker, query: Tensor, tokens: Tensor, labels: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """`rank(lists (B, L, k))`: the same lists, best first, -1 at the end."""

    def rank(lists: Tensor) -> Tensor:
        scores = ranker.score_lists(query, tokens, lists, labels)
        if scores.isnan().any():
            raise ValueError(
                "the ranker's scores are NaN: its weights or the pool's tokens hold NaN; train it again, "
                "or run it in float32"
            )
        return lists.gather(2, scores.sort(dim=2, descending=True, stable=True).indices)

    return rank


def _with_the_rest(rows: Tensor, scores: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """What was left unranked of `near`, behind what was ranked."""
    rest = near.masked_fill((near[:, :, None] == rows[:, None, :]).any(2), -1)
    rows, scores = torch.cat([rows, rest], 1), nn.functional.pad(scores, (0, rest.shape[1]), value=-torch.inf)
    order = (rows < 0).byte().sort(dim=1, stable=True).indices
    return rows.gather(1, order), scores.gather(1, order)
