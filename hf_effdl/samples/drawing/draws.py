"""Drawing rows with unequal probabilities: which rows, and with which probability. All functions are pure."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from hf_effdl.samples.drawing.checks import check_rows, check_scores, check_seed
from hf_effdl.samples.drawing.hashing import check_once, hashed_uniform, integer_ids, ranked
from hf_effdl.samples.drawing.probabilities import ROOM, read_scores, relative
from hf_effdl.samples.scores.numbers import as_numbers


def draw(
    probabilities: Tensor, *, seed: int = 0, row_ids: Tensor | Sequence[int | str] | None = None
) -> tuple[Tensor, Tensor]:
    """Poisson sampling: row i is in if `hash(seed, id_i) < pi_i`, whatever happens to the other rows.

    Args:
        probabilities: `(N,)` in [0, 1].
        seed: of the hash.
        row_ids: `(N,)` integers or texts that name the rows; default: their positions.

    Returns:
        positions, ascending, and weights `1 / pi`. Their number is random with mean `sum pi`; larger probabilities
        give a superset.

    Example:
        >>> draw(torch.tensor([1.0, 0.0, 1.0]))
        (tensor([0, 2]), tensor([1., 1.], dtype=torch.float64))
    """
    probabilities = as_numbers(probabilities, "probabilities").double()
    if probabilities.ndim != 1 or not ((probabilities >= 0) & (probabilities <= 1)).all():
        missing = probabilities.isnan().flatten().nonzero()
        first = f" ({len(missing)} are NaN, the first at row {missing[0].item()})" if len(missing) else ""
        raise ValueError(
            f"probabilities of shape {tuple(probabilities.shape)} are not one number in [0, 1] a row{first}; "
            "make them with inclusion_probabilities(scores, budget)"
        )
    inside = hashed_uniform(seed, integer_ids(row_ids, len(probabilities))) < probabilities
    positions = inside.nonzero().flatten()
    return positions, 1 / probabilities[positions]


def priority_sample(
    scores: Tensor,
    budget: int,
    *,
    seed: int = 0,
    row_ids: Tensor | Sequence[int | str] | None = None,
    log_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exactly `budget` rows: those with the largest keys `s_i / U_i`, `U = hash(seed, id)`.

    With tau the next key, `pi_i = min(1, s_i / tau)`, and weights `1 / pi` make weighted sums unbiased. A larger
    budget gives a superset. `PrioritySampler` does the same over shards.

    Args:
        scores: `(N,)` non-negative; only ratios matter, whatever their size.
        budget: number of rows, `1 <= budget <= N`.
        seed: of the hash.
        row_ids: `(N,)` integers or texts that name the rows, each another; default: their positions.
        log_scores: `scores` are natural logarithms, as of importance weights that no float holds.

    Returns:
        positions, ascending, and weights `1 / pi` (all one if `budget` is N).

    Example:
        >>> positions, weights = priority_sample(torch.ones(100), 10)
        >>> len(positions), 70 < weights.sum() < 130  # an estimate of the 100 rows
        (10, tensor(True))

    Source: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums", JACM 2007.
    """
    scores = read_scores(scores, log_scores)
    ids = integer_ids(row_ids, len(scores))
    budget = check_rows(budget, len(scores))
    if budget == len(scores):
        return torch.arange(budget), torch.ones(budget, dtype=torch.float64)
    keys = priority_keys(scores, seed, ids)
    top = keys.topk(budget + 1)
    positions = top.indices[:budget].sort().values
    return positions, 1 / priority_chances(scores[positions], top.values[budget].item())


def priority_keys(scores: Tensor, seed: int, row_ids: Tensor | Sequence[int | str]) -> Tensor:
    """`s_i / U_i` of `relative` scores, float64; `-U_i` for a score of zero, which is below all others."""
    uniform = hashed_uniform(seed, row_ids)
    return torch.where(scores > 0, (relative(scores) / uniform).clamp(max=torch.finfo(torch.float64).max), -uniform)


def priority_chances(scores: Tensor, tau: float) -> Tensor:
    """Inclusion probabilities of the rows whose `priority_keys` are above tau."""
    if tau < 0:  # all rows with a score are in; of those without, the ones whose uniform number is below -tau
        return torch.where(scores > 0, 1.0, min(1.0, -tau)).double()
    return (relative(scores) / tau).clamp(max=1)


class PrioritySampler:
    """`priority_sample` over data that come in parts: one pass, memory of about three budgets, mergeable.

    Args:
        budget: number of rows.
        seed: of the hash.

    Example:
        >>> parts = PrioritySampler(10), PrioritySampler(10)
        >>> for part, ids in zip(parts, torch.arange(100).split(50)):
        ...     part.add(torch.ones(50), ids)
        >>> ids, probabilities = parts[0].merge(parts[1]).result()
        >>> ids.equal(priority_sample(torch.ones(100), 10)[0])
        True
    """

    def __init__(self, budget: int, seed: int = 0) -> None:
        self.budget, self.seed, self.rows = check_rows(budget), check_seed(seed), 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._least = -math.inf  # keys not above it cannot be in the sample

    def add(self, scores: Tensor, row_ids: Tensor | Sequence[int]) -> None:
        """Offer rows; their order does not matter, and there may be none."""
        if len(scores) == len(row_ids) == 0:
            return
        scores = check_scores(scores)
        ids = integer_ids(row_ids, len(scores))
        keys = priority_keys(scores, self.seed, ids)
        self.rows += len(keys)
        self._keep(keys, ids, scores)

    def merge(self, other: Self) -> Self:
        """Take over what another sampler (of the same budget and seed) has seen; returns self."""
        if (self.budget, self.seed) != (other.budget, other.seed):
            raise ValueError(
                f"samplers of budget and seed {(self.budget, self.seed)} and "
                f"{(other.budget, other.seed)} cannot be merged; make them alike"
            )
        self.rows += other.rows
        for part in other._parts:
            self._keep(*part)
        return self

    def threshold(self) -> float:
        """tau, the largest key `s_i / U_i` left out; 0 if every row is in."""
        return max(0.0, self._threshold()) / ROOM

    def _threshold(self) -> float:
        self._compact()
        keys = torch.cat([part[0] for part in self._parts]) if self._parts else torch.empty(0)
        return -math.inf if len(keys) <= self.budget else keys.min().item()

    def result(self) -> tuple[Tensor, Tensor]:
        """Row ids, ascending, and their inclusion probabilities.

        Raises:
            ValueError: for fewer rows than the budget, or an id that came twice.
        """
        check_rows(self.budget, self.rows)
        tau = self._threshold()
        keys, ids, scores = (torch.cat(column) for column in zip(*self._parts, strict=True))
        check_once(ids.sort().values, "row_ids of all parts")
        inside = keys > tau
        ids, scores = ids[inside], scores[inside]
        order = ids.argsort()
        return ids[order], priority_chances(scores[order], tau)

    def _keep(self, keys: Tensor, ids: Tensor, scores: Tensor) -> None:
        inside = keys > self._least
        self._parts.append((keys[inside], ids[inside], scores[inside]))
        if sum(len(part[0]) for part in self._parts) > 2 * self.budget + 2**20:
            self._compact()

    def _compact(self) -> None:
        if sum(len(part[0]) for part in self._parts) <= self.budget + 1:
            return
        keys, ids, scores = (torch.cat(column) for column in zip(*self._parts, strict=True))
        self._parts = []
        # the sample and tau: one row more than the budget
        self._least = keys.kthvalue(len(keys) - self.budget).values.item()
        inside = keys >= self._least
        self._parts = [(keys[inside], ids[inside], scores[inside])]


def sequential_draw(
    scores: Tensor, budget: int, *, seed: int = 0, row_ids: Tensor | Sequence[int | str] | None = None
) -> Tensor:
    """Row after row without replacement, each in proportion to the scores of those left, as the released code draws.

    Done at once: the rows with the smallest `-log(U_i) / s_i` come in this order. The inclusion probabilities have no
    closed form and are *not* those of `inclusion_probabilities`, so there are no exact weights.

    Returns:
        positions, ascending; a larger budget gives a superset.

    Example:
        >>> len(sequential_draw(torch.ones(100), 10))
        10
    """
    scores = check_scores(scores)
    ids = integer_ids(row_ids, len(scores))
    # the logarithm of -log(U) / s, which is infinite for tiny scores
    times = (-hashed_uniform(seed, ids).log()).log() - relative(scores).log()
    return times.topk(check_rows(budget, len(scores)), largest=False).indices.sort().values


def top_k(
    scores: Tensor, budget: int, *, seed: int = 0, row_ids: Tensor | Sequence[int | str] | None = None
) -> Tensor:
    """Positions of the `budget` largest scores, ascending.

    Equal scores come in the order of `hash(seed, id)`, so that no order of the rows matters; without `row_ids` the
    first rows come first.
    """
    scores = check_scores(scores)
    return ranked(scores, seed, row_ids)[: check_rows(budget, len(scores))].sort().values
