"""Shares of the budget: for classes, for strata of a score, and for all but the hardest rows."""

import torch
from torch import Tensor

from hf_effdl.samples.drawing.checks import check_rows, check_scores
from hf_effdl.samples.drawing.hashing import hashed_uniform
from hf_effdl.samples.drawing.probabilities import LEAST_SCORE


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
    counts = torch.as_tensor(counts).long()
    budget = check_rows(budget, int(counts.sum()))
    if budget < (present := int((counts > 0).sum())):
        raise ValueError(
            f"budget={budget} is below the {present} classes that have rows, so quotas would leave "
            f"classes out; raise the budget to {present} or more, or set quotas='none'"
        )
    return even_shares(counts, budget, hashed_uniform(seed, torch.arange(len(counts)), salt=1))


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
    scores = check_scores(scores, signed=True).double()
    low, high = scores.min(), scores.max()
    return ((scores - low) / (high - low).clamp(min=LEAST_SCORE) * bins).long().clamp(0, bins - 1)


def without_hardest(scores: Tensor, share: float) -> Tensor:
    """Mask of the rows that stay when the `share` with the largest scores is left out (wrong labels, mostly).

    Example:
        >>> without_hardest(torch.tensor([3.0, 1.0, 2.0, 9.0]), 0.25)
        tensor([ True,  True,  True, False])
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: the part left out must be in [0, 1)")
    scores = check_scores(scores, signed=True)
    order = scores.sort(descending=True, stable=True).indices
    stays = torch.ones(len(scores), dtype=torch.bool)
    stays[order[: int(share * len(scores) + 1e-9)]] = False  # 0.29 * 100 is 28.999...
    return stays
