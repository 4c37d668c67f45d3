"""What was measured of a pool, in the forms that candidates of a new query are judged by."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cascade_features import MATCHES, standardised
from .cascade_lists import MeasuredLists
from .cascade_rows import MATCHED, RowModel, quarters_of
from .cascade_shortlist import Relations


CLASS = "class"  # the one column of numbers that mean nothing by their size


@dataclass(frozen=True)
class Precedents:
    """How examples did on the pool's images, and which of them do well and badly together.

    Args:
        rows: predicts how the candidates will do on a query.
        relations: says how much candidates have in common.
        classes: `(n,)` a number for the class of each row of the pool, -1 for none; None: it is not to count.
    """

    rows: RowModel
    relations: Relations
    classes: Tensor | None = None

    @classmethod
    def of(
        cls,
        pool: Any,
        measured: tuple[Tensor, Tensor],
        lists: MeasuredLists,
        groups: Tensor,
        classes: Tensor | None = None,
    ) -> "Precedents":
        """Of candidates and performance `(n, K)`, the lists that a cascade makes of them, groups, classes `(n,)`."""
        quarters = torch.cat([quarters_of(pool.tokens(rows)) for rows in torch.arange(len(pool)).split(4096)])
        return cls(
            RowModel(pool.vectors.float(), quarters, *measured, groups),
            Relations(lists.images, lists.rows, lists.target, groups),
            classes,
        )

    def without(self, images: Tensor) -> "Precedents":
        """The same as if nothing had been measured on these rows of the pool; relations stay."""
        return Precedents(self.rows.without(images), self.relations, self.classes)

    def columns(
        self, vectors: Tensor, quarters: Tensor, matches: Tensor, rows: Tensor, own: Tensor | None
    ) -> dict[str, Tensor]:
        """What is known of each candidate from what was measured, `(B, K, f)` by name.

        Args:
            vectors, quarters: of the queries, see `RowModel.predict`.
            matches: `(B, K, 8)`, see `dense_matches`.
            rows: `(B, K)` candidates, -1 where there is none.
            own: `(B,)` rows of the pool that the queries themselves are, -1 for none.
        """
        alike = matches[..., [MATCHES.index(name) for name in MATCHED]]
        alike = standardised(alike, rows >= 0)[0][..., : len(MATCHED)]
        known = {"rows": self.rows.predict(vectors, quarters, rows, own), "among": self.rows.among(alike, rows, own)}
        if self.classes is not None:
            known[CLASS] = torch.where(rows >= 0, self.classes[rows.clamp(min=0)], -1)[..., None]
        return known
