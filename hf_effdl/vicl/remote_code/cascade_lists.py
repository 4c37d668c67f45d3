"""What was measured of a pool, as the lists that a cascade learns from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


FOLDS = 5
DENSE = 2**22  # entries of a table up to which it is kept dense: 16 MiB, and several times as fast to look up


def table_of(places: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values at places `(2, N)` of a table that has few; dense where that takes little."""
    table = torch.sparse_coo_tensor(places, values, shape, check_invariants=False).coalesce()
    return table.to_dense() if table.numel() <= DENSE else table


def rows_of_table(table: Tensor, rows: Tensor) -> Tensor:
    """`(*rows, columns)` of a table, dense or sparse."""
    if not table.is_sparse:
        return table[rows]
    some, place = rows.unique(return_inverse=True)
    return table.index_select(0, some).to_dense()[place]


def own_images(groups: Tensor, own: Tensor, images: Tensor) -> Tensor:
    """`(B, L)` bool: images that tell of a query what it should not be told, itself and those of its group.

    Args:
        groups: `(n,)` of the pool's rows, see `group_numbers`.
        own: `(B,)` rows of the pool that the queries themselves are, -1 for none.
        images: `(L,)` rows of the pool.
    """
    own = torch.as_tensor(own).cpu()
    return (own >= 0)[:, None] & (groups[own.clamp(min=0)][:, None] == groups[images])


def folds_of(groups: Tensor) -> Tensor:
    """`(L,)` a fold, 0 to 4, for each image: those of a group share one, and folds are about equally large."""
    _, at, sizes = groups.unique(return_inverse=True, return_counts=True)
    first = torch.full_like(sizes, len(groups)).scatter_reduce_(0, at, torch.arange(len(at)), "amin")
    fold, held = torch.zeros_like(sizes), [0] * FOLDS
    for group in sorted(range(len(sizes)), key=lambda group: (-int(sizes[group]), int(first[group]))):
        fold[group] = held.index(min(held))
        held[int(fold[group])] += int(sizes[group])
    return fold[at]


@dataclass
class MeasuredLists:
    """The measured candidates of the labelled images, the nearest first."""

    images: Tensor  # (L,) rows of the pool
    rows: Tensor  # (L, K), -1 where there is none
    performance: Tensor  # (L, K)
    similarity: Tensor  # (L, K)
    fold: Tensor  # (L,) 0 to 4: what is learnt for an image is learnt from other folds

    @classmethod
    def read(cls, pool: Any, measured: tuple[Tensor, Tensor], most: int, groups: Tensor) -> "MeasuredLists":
        """From candidates and performance `(n, K)`, at most `most` candidates of an image, and groups `(n,)`."""
        candidates, performance = measured[0].cpu().long(), measured[1].cpu().float()
        images = (candidates >= 0).any(1).nonzero()[:, 0]
        # in an order that says nothing of the images, since folds and checks go by it
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        rows, performance = candidates[images], performance[images]
        similarity = torch.cat(
            [
                torch.einsum("lkd,ld->lk", pool.vectors[some.clamp(min=0)].float(), pool.vectors[own].float())
                for some, own in zip(rows.split(64), images.split(64), strict=True)
            ]
        ).masked_fill(rows < 0, -torch.inf)
        order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :most]
        return cls(
            images, *(part.gather(1, order) for part in (rows, performance, similarity)), folds_of(groups[images])
        )

    @property
    def known(self) -> Tensor:
        return self.rows >= 0

    @property
    def target(self) -> Tensor:
        """Performance less the mean of the list."""
        mean = (self.performance * self.known).sum(1) / self.known.sum(1).clamp(min=1)
        return torch.where(self.known, self.performance - mean[:, None], 0.0)

    def pick(self, top: Tensor) -> "MeasuredLists":
        """Of every list the places `top (L', m)`, of the first L' images."""
        parts = (part[: len(top)].gather(1, top) for part in (self.rows, self.performance, self.similarity))
        return MeasuredLists(self.images[: len(top)], *parts, self.fold[: len(top)])

    def mean_of(self, scores: Tensor) -> float:
        """Mean performance of what scores `(L', K)` put first."""
        at = scores.masked_fill(~self.known[: len(scores)], -torch.inf).argmax(1, keepdim=True)
        return float(self.performance[: len(scores)].gather(1, at).mean())

    def mean_best(self) -> float:
        """Mean performance of the best of each list."""
        return float(self.performance.masked_fill(~self.known, -torch.inf).amax(1).mean())
