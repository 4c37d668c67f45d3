"""What was measured of a pool, as the lists that a cascade learns from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


FOLDS = 5


@dataclass
class MeasuredLists:
    """The measured candidates of the labelled images, the nearest first."""

    images: Tensor  # (L,) rows of the pool
    rows: Tensor  # (L, K), -1 where there is none
    performance: Tensor  # (L, K)
    similarity: Tensor  # (L, K)

    @classmethod
    def read(cls, pool: Any, measured: tuple[Tensor, Tensor], most: int) -> "MeasuredLists":
        """From candidates and performance `(n, K)`, at most `most` candidates of an image."""
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
        return cls(images, *(part.gather(1, order) for part in (rows, performance, similarity)))

    @property
    def known(self) -> Tensor:
        return self.rows >= 0

    @property
    def target(self) -> Tensor:
        """Performance less the mean of the list."""
        mean = (self.performance * self.known).sum(1) / self.known.sum(1).clamp(min=1)
        return torch.where(self.known, self.performance - mean[:, None], 0.0)

    @property
    def fold(self) -> Tensor:
        return torch.arange(len(self.images)) % FOLDS

    def pick(self, top: Tensor) -> "MeasuredLists":
        """Of every list the places `top (L', m)`, of the first L' images."""
        parts = (part[: len(top)].gather(1, top) for part in (self.rows, self.performance, self.similarity))
        return MeasuredLists(self.images[: len(top)], *parts)

    def mean_of(self, scores: Tensor) -> float:
        """Mean performance of what scores `(L', K)` put first."""
        at = scores.masked_fill(~self.known[: len(scores)], -torch.inf).argmax(1, keepdim=True)
        return float(self.performance[: len(scores)].gather(1, at).mean())

    def mean_best(self) -> float:
        """Mean performance of the best of each list."""
        return float(self.performance.masked_fill(~self.known, -torch.inf).amax(1).mean())
