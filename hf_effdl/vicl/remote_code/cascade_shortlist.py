"""Which few of many candidates to try, when the best of those that were tried will be kept."""

from functools import lru_cache

import torch
from torch import Tensor

from .cascade_lists import own_images, rows_of_table, table_of


DRAWS = 1024
# of a score's value, so that among equal gains the better score goes first
NUDGE = 1e-4


class Relations:
    """How much examples do well and badly on the same pool images.

        rho(c, e) = sum_j R[j, c] R[j, e] / sqrt((sum_j R[j, c]^2 + u) (sum_j R[j, e]^2 + u)),

    R the performance less the mean of the list (0 where not measured), u the mean of R^2: as if there were one image
    more, on which nothing is related.

    Args:
        images: `(L,)` rows of the pool on which examples were measured.
        rows: `(L, K)` the examples, -1 where there is none.
        residual: `(L, K)` R of these.
        groups: `(n,)` of the pool's rows, see `group_numbers`.
    """

    def __init__(self, images: Tensor, rows: Tensor, residual: Tensor, groups: Tensor) -> None:
        known = rows >= 0
        on = torch.arange(len(images))[:, None].expand_as(rows)
        # an example has few entries, and pools may be large
        self.table = table_of(torch.stack([rows[known], on[known]]), residual[known], (len(groups), len(images)))
        self.unit = residual[known].square().mean().clamp(min=1e-12)
        self.images, self.groups = images, groups

    def between(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        """rho of every pair, `(B, K, K)` in [-1, 1], positive semidefinite.

        Args:
            rows: `(B, K)` examples; for -1 the values mean nothing.
            own: `(B,)` rows of the pool that the queries themselves are, -1 for none: what was measured on these and
                on their groups does not count.
        """
        # in float64, so that what follows is positive semidefinite beyond doubt
        columns = rows_of_table(self.table, rows.clamp(min=0)).double()
        if own is not None:
            columns = columns.masked_fill(own_images(self.groups, own, self.images)[:, None], 0)
        columns = columns / (columns.square().sum(2, keepdim=True) + self.unit).sqrt()
        return columns @ columns.transpose(1, 2)


def best_together(scores: Tensor, covariance: Tensor, known: Tensor, count: int) -> Tensor:
    """The candidates of which the best can be expected to be best, greedily.

    Each step adds the candidate that raises the expected maximum most,

        E max_{c in S} f_c,    f ~ N(scores, covariance),

    over 1,024 draws, which are the same at every call and come in pairs of opposite signs. The first is the one of the
    highest score. Where candidates do well and badly together, the others are of other kinds; without covariance only
    scores count.

    Args:
        scores: `(B, K)` expected performance.
        covariance: `(B, K, K)` of performance about the scores, positive semidefinite.
        known: `(B, K)` bool; candidates that exist. Those that do not come last.
        count: how many.

    Returns:
        `(B, min(count, K))` places, in the order in which they were added.

    Example:
        >>> twins = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> best_together(torch.tensor([[0.3, 0.2, 0.0]]), twins, torch.ones(1, 3, dtype=torch.bool), 2)
        tensor([[0, 2]])

    Source: the expected maximum of correlated candidates, Ginsbourger, Le Riche, Carraro 2010 (multi-points expected
    improvement); greedy choice for submodular gains, Nemhauser, Wolsey, Fisher 1978.
    """
    batch, size = scores.shape
    lowest = torch.finfo(torch.float32).min
    mean = scores.float().masked_fill(~known, 0)
    # rounding may leave a covariance a little indefinite
    ridge = 1e-6 * covariance.diagonal(dim1=1, dim2=2).amax(1).double().clamp(min=1e-12)
    root = torch.linalg.cholesky(covariance.double() + ridge[:, None, None] * torch.eye(size).double()).float()
    drawn = mean[:, None] + _normal(size) @ root.transpose(1, 2)
    drawn = drawn.masked_fill(~known[:, None], lowest)
    chosen = [mean.masked_fill(~known, lowest).argmax(1, keepdim=True)]
    best, nudge = torch.full((batch, DRAWS, 1), -torch.inf), (NUDGE * mean).masked_fill(~known, lowest)
    while len(chosen) < min(count, size):
        last = chosen[-1]
        nudge.scatter_(1, last, -torch.inf)
        best = torch.maximum(best, drawn.gather(2, last[:, None].expand(-1, DRAWS, 1)))
        gain = (drawn - best).relu_().mean(1) + nudge
        chosen.append(gain.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


@lru_cache(maxsize=4)
def _normal(size: int) -> Tensor:
    """`(1024, size)` draws in pairs of opposite signs, the same ones always."""
    half = torch.randn(DRAWS // 2, size, generator=torch.Generator().manual_seed(0))
    return torch.cat([half, -half])
