"""Scores into inclusion probabilities."""

import torch
from torch import Tensor

from hf_effdl.checks import flag
from hf_effdl.samples.drawing.checks import check_budget, check_scores
from hf_effdl.samples.scores.numbers import as_numbers


# Between the largest score and the largest float there must be room for a score over a uniform number, and for a sum
# of scores. A power of two, so that no digit of a score changes.
ROOM = 2.0**-27


def relative(scores: Tensor) -> Tensor:
    """Scores in float64, times a constant that leaves room above; zero as the least number above zero.

    Only ratios of scores count, from 1e-300 to 1e300. A row of score zero is drawn only when nothing else is left,
    then uniformly.
    """
    return (scores.double() * ROOM).clamp(min=5e-324)


def read_scores(scores: Tensor, log_scores: bool = False) -> Tensor:
    """Scores as `check_scores` takes them, or from their natural logarithms, the largest as e^600.

    Args:
        scores: `(N,)`; `-inf` is a log score of zero.
        log_scores: whether these are logarithms.

    Example:
        >>> read_scores(torch.tensor([-2000.0, -2001.0]), log_scores=True).log().diff()
        tensor([-1.], dtype=torch.float64)
    """
    if not flag("log_scores", log_scores):
        return check_scores(scores)
    logs = as_numbers(scores, "log scores").double()
    zero = logs == float("-inf")
    logs = check_scores(logs.masked_fill(zero, 0.0), signed=True)
    largest = logs.masked_fill(zero, float("-inf")).max()
    return torch.ones_like(logs) if zero.all() else (logs - largest + 600).exp().masked_fill(zero, 0.0)


def clip_scores(scores: Tensor, value: float | None = None, quantile: float | None = None) -> Tensor:
    """`min(score, cap)` with the cap given as a value or as a quantile of the scores.

    Rows above the cap are then drawn alike: outliers and wrong labels do not swallow the budget.

    Example:
        >>> clip_scores(torch.tensor([1.0, 2.0, 9.0]), quantile=0.5)
        tensor([1., 2., 2.])
    """
    scores = check_scores(scores)
    if (value is None) == (quantile is None):
        raise ValueError("clip by value= or by quantile=, and by one of them only")
    if quantile is not None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile={quantile}: it must be in [0, 1]")
        value = _quantile(scores, quantile)
    elif not value > 0:
        raise ValueError(f"value={value}: a cap must be positive")
    return scores.clamp(max=value)


def _quantile(values: Tensor, q: float) -> float:
    # torch.quantile refuses more than 2^24 values
    place = q * (len(values) - 1)
    low, high = (values.kthvalue(int(k) + 1).values.item() for k in (place, min(int(place) + 1, len(values) - 1)))
    return low + (place - int(place)) * (high - low)


def inclusion_probabilities(scores: Tensor, budget: float, *, log_scores: bool = False) -> Tensor:
    """Probabilities in proportion to the scores that add up to the budget, capped at one.

    `pi_i = min(1, s_i / t)` with the `t` for which `sum pi = budget`: what the capped rows cannot take is spread over
    the others (water-filling).

    Args:
        scores: `(N,)` non-negative; only ratios matter, whatever their size.
        budget: expected number of rows, `0 < budget <= N`.
        log_scores: `scores` are natural logarithms, as of importance weights that no float holds.

    Returns:
        `(N,)` float64 in (0, 1].

    Raises:
        ValueError: for NaN, infinite or negative scores, or a budget out of range.

    Example:
        >>> inclusion_probabilities(torch.tensor([8.0, 1, 1, 2]), 2)
        tensor([1.0000, 0.2500, 0.2500, 0.5000], dtype=torch.float64)

    Source: arXiv 2309.02476, the minimiser of the excess loss under `sum pi = r`.
    """
    scores = relative(read_scores(scores, log_scores))
    budget = check_budget(budget, len(scores))
    ordered = scores.sort(descending=True).values
    # with the k largest at one, the rest share budget - k; k is the first that leaves no one above one
    rest = ordered.flip(0).cumsum(0).flip(0)
    left = budget - torch.arange(len(ordered), dtype=torch.float64)
    full = int((ordered * left > rest).sum()) if budget < len(ordered) else len(ordered)
    if full == len(ordered):
        return torch.ones_like(scores)
    # the share of the rest first: a budget over a sum of tiny scores would be infinite
    return (scores / rest[full] * left[full]).clamp(min=torch.finfo(torch.float64).tiny, max=1.0)


def mix_uniform(probabilities: Tensor, share: float) -> Tensor:
    """`(1 - share) pi + share r / N`: keeps the sum r and bounds the weights 1/pi by `N / (share r)`.

    Example:
        >>> mix_uniform(torch.tensor([1.0, 0.0]), 0.2)
        tensor([0.9000, 0.1000], dtype=torch.float64)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: the uniform part must be in [0, 1]")
    probabilities = as_numbers(probabilities, "probabilities").double()
    return (1 - share) * probabilities + share * probabilities.mean()
