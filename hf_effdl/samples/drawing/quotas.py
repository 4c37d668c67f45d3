"""Shares of the budget: for classes, for strata of a score, and for all but the hardest rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_effdl.samples.drawing.checks import check_rows, check_scores
from hf_effdl.samples.drawing.hashing import hashed_uniform, ranked
from hf_effdl.samples.scores.numbers import as_numbers


def class_quotas(counts: Tensor, budget: int, *, seed: int = 0) -> Tensor:
    """Rows for each class: equal shares, what a small class cannot fill going to the others evenly.

    Rows that do not divide go to classes in the order of a hash of (seed, class).

    Args:
        counts: `(C,)` rows at hand in each class.
        budget: rows in all.

    Raises:
        ValueError: for a budget below the number of classes that have rows, or above the rows there are.

    Example:
        >>> class_quotas(torch.tensor([100, 3, 100]), 31)
        tensor([14,  3, 14])
    """
    counts = as_numbers(counts, "counts").long()
    if counts.ndim != 1 or (counts < 0).any():
        raise ValueError(f"counts={counts.tolist()}: pass one number of rows a class, 0 or more")
    budget = check_rows(budget, int(counts.sum()))
    check_quotas(counts, budget)
    return even_shares(counts, budget, class_turns(seed, torch.arange(len(counts))))


def class_turns(seed: int, classes: Tensor) -> Tensor:
    """A number for each class, by whose order it gets a row that does not divide."""
    return hashed_uniform(seed, classes, salt=1)


def check_quotas(counts: Tensor, budget: int) -> None:
    """Raise a `ValueError` for a budget below the number of classes that have rows."""
    if budget < (present := int((counts > 0).sum())):
        raise ValueError(
            f"budget={budget} is below the {present} classes that have rows, so quotas would leave "
            f"classes out; raise the budget to {present} or more, or set quotas='none'"
        )


def even_shares(counts: Tensor, budget: int, turns: Tensor) -> Tensor:
    """Even shares of the budget, none above its count; the remainder goes by ascending `turns`."""
    quotas = torch.zeros_like(counts)
    while (left := budget - int(quotas.sum())) > 0:
        open_ = (quotas < counts).nonzero().flatten()
        share, extra = divmod(left, len(open_))
        if share == 0:
            quotas[open_[turns[open_].argsort()[:extra]]] += 1
        else:
            quotas[open_] = torch.minimum(quotas[open_] + share, counts[open_])
    return quotas


def strata(scores: Tensor, bins: int = 50) -> Tensor:
    """The equal-width bin of each score, `(N,)` in `[0, bins)`.

    With equal shares of the budget for every bin that has rows (`class_quotas` of these bins), this is coverage-
    centric selection: the sparse hard tail and the dense easy mass get the same attention.

    Source: Zheng et al., "Coverage-centric coreset selection for high pruning rates", arXiv 2210.15809.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: it must be 1 or more")
    # halves, as the range of scores may be twice the largest float
    scores = check_scores(scores, signed=True).double() / 2
    low, high = scores.min(), scores.max()
    if high == low:
        return torch.zeros(len(scores), dtype=torch.long)
    return ((scores - low) / (high - low) * bins).long().clamp(0, bins - 1)


def without_hardest(
    scores: Tensor, share: float, *, seed: int = 0, row_ids: Tensor | Sequence[int | str] | None = None
) -> Tensor:
    """Mask of the rows that stay when the `share` with the largest scores is left out (wrong labels, mostly).

    Equal scores at the edge: see `top_k`.

    Example:
        >>> without_hardest(torch.tensor([3.0, 1.0, 2.0, 9.0]), 0.25)
        tensor([ True,  True,  True, False])
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: the part left out must be in [0, 1)")
    scores = check_scores(scores, signed=True)
    order = ranked(scores, seed, row_ids)
    stays = torch.ones(len(scores), dtype=torch.bool)
    stays[order[: int(share * len(scores) + 1e-9)]] = False  # 0.29 * 100 is 28.999...
    return stays
