"""Training data of a list-wise ranker: short lists of a query's candidates with their measured performance."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_effdl.checks import instance
from hf_effdl.vicl.held_out import near_duplicates
from hf_effdl.vicl.remote_code.counts import counted
from hf_effdl.vicl.remote_code.modeling_visual_in_context import VisualInContextModel
from hf_effdl.vicl.remote_code.pool_reader import PoolReader
from hf_effdl.vicl.remote_code.pool_rows import group_numbers, groups_of, rows_checked, rows_of_ids
from hf_effdl.vicl.remote_code.ranker_selector import pool_label_tokens
from hf_effdl.vicl.remote_code.visual_tasks import find_task


# of an (queries x lists x K) draw at once
CELLS = 2**24


class RankingLists(Dataset):
    """Lists of k candidates each, drawn at random from what was measured; what a `RankerTrainer` trains on.

    For every pool image that performance was measured on, `lists_per_query` random k-subsets of its candidates, drawn
    once, with their performance as the target. Tokens are read from the pool when they are asked for.

    Args:
        pool: the examples; made with the encoder whose tokens the ranker is to know.
        candidates: `(n, K)` rows of the pool, -1 where not measured, as `measure_examples` gives them.
        performance: `(n, K)`, larger is better.
        k: length of a list, at most K.
        lists_per_query: k-subsets of each query's candidates.
        queries: ids of the pool images to learn from, to keep some for evaluation; default: all that were measured.
        exclude: ids of those that occur neither as query nor as candidate, such as queries of a later test. Nor do
            their near duplicates.
        rows, exclude_rows: the same by place in the pool.
        groups: what each row of the pool belongs to, None for nothing: no candidate is of its query's own group.
            Default: the groups that the pool keeps.
        duplicates: cosine from which a row counts as one; None: only the rows themselves are left out.
        labels: whether items come with the candidates' `label_tokens`; every label is read once, here.
        task: draws the labels; default: that of the pool.
        seed: of the subsets.

    Attributes:
        queries: `(N,)` row of each list's query.
        lists: `(N, k)` rows of the candidates.
        metric: `(N, k)` their performance.
        skipped: queries that have fewer than k candidates left.
        encoder_fingerprint, pool_fingerprint: of the pool.

    Raises:
        ValueError: for k above what was measured, performance that is NaN or the same throughout, rows that the pool
            does not have, a table of another size, or no query that is left.

    Example:
        ```python
        candidates, performance = measure_examples(model, pool)
        train = RankingLists(pool, candidates, performance, k=5, exclude=held_out_ids)
        ```

    Source: arXiv 2405.15279, section 4 (20 lists of 5 and of 10 for each image).
    """

    def __init__(
        self,
        pool: PoolReader,
        candidates: Tensor,
        performance: Tensor,
        k: int = 5,
        *,
        lists_per_query: int = 20,
        queries: Sequence[int | str] | None = None,
        exclude: Sequence[int | str] | None = None,
        rows: Sequence[int] | Tensor | None = None,
        exclude_rows: Sequence[int] | Tensor | None = None,
        groups: Sequence[int | str | None] | None = None,
        duplicates: float | None = 0.98,
        labels: bool = True,
        task: Any = None,
        seed: int = 0,
    ) -> None:
        instance("pool", pool, PoolReader, "an ExamplePool")
        for name, table in (("candidates", candidates), ("performance", performance)):
            instance(name, table, (Tensor, np.ndarray, list), "a table of measure_examples, (n, K)")
        candidates, performance = (torch.as_tensor(table).cpu() for table in (candidates, performance))
        _check_table(pool, candidates, performance, k, lists_per_query)
        measured_mask = candidates >= 0
        left_out = _named(pool, exclude, exclude_rows, "exclude")
        if duplicates is not None and len(left_out):
            left_out = torch.cat([left_out, near_duplicates(pool.vectors, left_out, threshold=duplicates)])
        usable = torch.ones(len(pool), dtype=torch.bool)
        usable[left_out] = False
        measured_mask &= usable[candidates.clamp(min=0)] & _of_others(pool, candidates, groups)
        is_query = usable & (candidates >= 0).any(1)
        if queries is not None or rows is not None:
            wanted = torch.zeros(len(pool), dtype=torch.bool)
            wanted[_named(pool, queries, rows, "queries")] = True
            is_query &= wanted
        enough = measured_mask.sum(1) >= k
        self.skipped = int((is_query & ~enough).sum())
        used = (is_query & enough).nonzero()[:, 0]
        if not len(used):
            raise ValueError(
                f"no list of k={k} is left: of {int(is_query.sum())} queries none has k measured candidates outside "
                "exclude=; measure more candidates, take a smaller k, or exclude less"
            )
        values = performance[used][measured_mask[used]]
        if values.min() == values.max():
            raise ValueError(
                f"performance is {float(values[0]):g} for every example on every query: there is nothing "
                "to learn; look at the task's metric and at what the frozen model answers"
            )
        places = _subsets(measured_mask[used], k, lists_per_query, torch.Generator().manual_seed(seed))
        self.pool, self.k = pool, k
        self.queries = used.repeat_interleave(lists_per_query)
        self.lists = candidates[self.queries].gather(1, places).long()
        self.metric = performance[self.queries].gather(1, places).float()
        self.encoder_fingerprint, self.pool_fingerprint = pool.encoder["fingerprint"], pool.fingerprint
        self._labels: Tensor | None = None
        if labels:
            task = find_task(pool.task if task is None else task)
            occurring, self._places = self.lists.unique(return_inverse=True)
            self._labels = pool_label_tokens(pool, occurring.tolist(), task)

    @classmethod
    def from_model(cls, model: VisualInContextModel, pool: PoolReader, k: int = 5, **options: Any) -> "RankingLists":
        """Lists from the table that `measure_examples` has set on a model.

        Args:
            model: whose performance was measured on this pool.
            pool, k, options: see the class.

        Raises:
            ValueError: where nothing was measured, or on another pool.
        """
        if model.config.performance is None:
            raise ValueError("nothing was measured on this model: run hf_effdl.measure_examples(model, pool) first")
        if model.config.pool_fingerprint != pool.fingerprint:
            raise ValueError(
                f"performance was measured on the pool {model.config.pool_fingerprint}, but this is "
                f"{pool.fingerprint}: pass that pool, or run measure_examples(model, pool) again"
            )
        return cls(pool, model.measured_candidates, model.measured_performance, k, **options)

    @property
    def has_labels(self) -> bool:
        """Whether items come with labels."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        return (
            f"RankingLists({len(self):,} lists of {self.k}, {len(self.queries.unique()):,} queries, "
            f"{self.skipped:,} skipped)"
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A list as keyword arguments of `ListwiseRanker`, without the batch axis."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several lists, whose tokens are read together; this is what a `DataLoader` calls."""
        indices = torch.as_tensor(indices)
        tokens = self.pool.tokens(torch.cat([self.queries[indices][:, None], self.lists[indices]], 1))
        batch = {"query_tokens": tokens[:, 0], "candidate_tokens": tokens[:, 1:], "metric": self.metric[indices]}
        if self._labels is not None:
            batch["candidate_labels"] = self._labels[self._places[indices]]
        return [dict(zip(batch, values)) for values in zip(*batch.values())]


def _check_table(pool: PoolReader, candidates: Tensor, performance: Tensor, k: int, lists_per_query: int) -> None:
    if candidates.dim() != 2 or candidates.shape != performance.shape or len(candidates) != len(pool):
        raise ValueError(
            f"candidates {tuple(candidates.shape)} and performance {tuple(performance.shape)}: both must "
            f"be (n, K) with a row for each of the pool's {len(pool)}; measure this pool"
        )
    if int(candidates.max()) >= len(pool):
        raise ValueError(f"candidates name row {int(candidates.max())} of a pool of {len(pool)}: measure this pool")
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 2:
        raise ValueError(f"k={k!r}: a list has two items or more")
    if k > candidates.shape[1]:
        raise ValueError(
            f"k={k}, but performance was measured on K={candidates.shape[1]} candidates, which is not "
            "above k: measure more candidates, or take a smaller k"
        )
    counted("lists_per_query", lists_per_query)
    if (wrong := ((candidates >= 0) & ~performance.isfinite()).any(1)).any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"performance on pool image {pool.ids[row]!r} is NaN or infinite: measure it again with a "
            "metric that is defined for every prediction"
        )


def _named(pool: PoolReader, ids: Any, rows: Any, name: str) -> Tensor:
    """Rows of the pool that ids name, and rows."""
    named = [] if ids is None else [rows_of_ids(pool, ids, name)]
    named += [] if rows is None else [rows_checked(pool, rows, "rows" if name == "queries" else f"{name}_rows")]
    return torch.cat(named) if named else torch.zeros(0, dtype=torch.long)


def _of_others(pool: PoolReader, candidates: Tensor, groups: Sequence[int | str | None] | None) -> Tensor:
    """`(n, K)` bool: candidates that do not belong to the same group as the image."""
    groups = groups_of(pool, groups)
    if groups is None:
        return torch.ones(candidates.shape, dtype=torch.bool)
    numbers, none = group_numbers(groups, len(pool)), torch.tensor([one is None for one in groups])
    return (numbers[candidates.clamp(min=0)] != numbers[:, None]) | none[:, None]


def _subsets(known: Tensor, k: int, count: int, generator: torch.Generator) -> Tensor:
    """Places `(Q count, k)` in each row of `known (Q, K)`, where it is True: `count` random subsets a row."""
    parts = known.split(max(1, CELLS // (count * known.shape[1])))
    drawn = []
    for part in parts:
        keys = torch.rand(len(part), count, part.shape[1], generator=generator)
        keys.masked_fill_(~part[:, None], 2.0)
        drawn.append(keys.topk(k, dim=2, largest=False).indices.flatten(0, 1))
    return torch.cat(drawn)
