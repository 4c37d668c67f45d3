"""Drawing rows with unequal probabilities: which rows, with which probability, with which weight in the loss.

All functions are pure. Randomness is a hash of (seed, row id), so a draw does not depend on the order of the rows, on
how they are split over files or processes, or on how many of them there are.
"""

import hashlib
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


WEIGHTS = ("p_label", "damped", "exact", "none")
# A score of zero counts as this much: such a row is drawn only when nothing else is left, then uniformly.
LEAST_SCORE = torch.finfo(torch.float32).tiny


# ---- randomness


def hashed_uniform(seed: int, row_ids: Tensor | Sequence[int | str], salt: int = 0) -> Tensor:
    """A uniform number in (0, 1) for each row, a pure function of (seed, row id), float64.

    Two rounds of the splitmix64 finaliser over the id mixed with the seed; text ids are hashed to 64 bits (blake2b)
    first. `salt` gives an independent number for another use.

    Example:
        >>> hashed_uniform(0, [3, 1, 2])[1] == hashed_uniform(0, [1])[0]
        tensor(True)
    """
    ids = _as_int64(row_ids)
    key = _splitmix64(torch.tensor([_signed(int(seed) * 2 + 1), _signed(int(salt) + 0x9E3779B97F4A7C15)]))
    mixed = _splitmix64(_splitmix64(ids + key[0].to(ids.device)) ^ key[1].to(ids.device))
    # 52 bits, as the half that keeps zero out would round the largest 53-bit number up to one
    return ((mixed >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)


def _splitmix64(x: Tensor) -> Tensor:
    # Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014; int64 wraps around as uint64 does
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _as_int64(row_ids: Tensor | Sequence[int | str]) -> Tensor:
    if len(row_ids) and isinstance(row_ids[0], str):
        digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in row_ids)
        return torch.frombuffer(bytearray(digests), dtype=torch.int64)
    ids = torch.as_tensor(row_ids)
    if ids.is_floating_point() or ids.ndim != 1:
        raise TypeError(f"row_ids are {ids.dtype} of shape {tuple(ids.shape)}; pass one integer or text a row")
    return ids.long()


def _ids(row_ids: Tensor | Sequence[int | str] | None, rows: int) -> Tensor:
    if row_ids is None:
        return torch.arange(rows)
    if len(row_ids) != rows:
        raise ValueError(f"{len(row_ids)} row_ids for {rows} rows; pass one a row")
    return _as_int64(row_ids)


# ---- scores into probabilities


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


def inclusion_probabilities(scores: Tensor, budget: float) -> Tensor:
    """Probabilities in proportion to the scores that add up to the budget, capped at one.

    `pi_i = min(1, s_i / t)` with the `t` for which `sum pi = budget`: what the capped rows cannot take is spread over
    the others (water-filling).

    Args:
        scores: `(N,)` non-negative; only ratios matter.
        budget: expected number of rows, `0 < budget <= N`.

    Returns:
        `(N,)` float64 in (0, 1].

    Raises:
        ValueError: for NaN, infinite or negative scores, or a budget out of range.

    Example:
        >>> inclusion_probabilities(torch.tensor([8.0, 1, 1, 2]), 2)
        tensor([1.0000, 0.2500, 0.2500, 0.5000], dtype=torch.float64)

    Source: arXiv 2309.02476, the minimiser of the excess loss under `sum pi = r`.
    """
    scores = check_scores(scores).double().clamp(min=LEAST_SCORE)
    budget = check_budget(budget, len(scores))
    ordered = scores.sort(descending=True).values
    # with the k largest at one, the rest share budget - k; k is the first that leaves no one above one
    rest = ordered.flip(0).cumsum(0).flip(0)
    left = budget - torch.arange(len(ordered), dtype=torch.float64)
    full = int((ordered * left > rest).sum()) if budget < len(ordered) else len(ordered)
    if full == len(ordered):
        return torch.ones_like(scores)
    return (scores * (left[full] / rest[full])).clamp(max=1.0)


def mix_uniform(probabilities: Tensor, share: float) -> Tensor:
    """`(1 - share) pi + share r / N`: keeps the sum r and bounds the weights 1/pi by `N / (share r)`.

    Example:
        >>> mix_uniform(torch.tensor([1.0, 0.0]), 0.2)
        tensor([0.9000, 0.1000], dtype=torch.float64)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: the uniform part must be in [0, 1]")
    probabilities = probabilities.double()
    return (1 - share) * probabilities + share * probabilities.mean()


# ---- draws


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
    probabilities = torch.as_tensor(probabilities).double()
    if probabilities.ndim != 1 or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            f"probabilities of shape {tuple(probabilities.shape)} are not one number in [0, 1] a row; "
            "make them with inclusion_probabilities(scores, budget)"
        )
    inside = hashed_uniform(seed, _ids(row_ids, len(probabilities))) < probabilities
    positions = inside.nonzero().flatten()
    return positions, 1 / probabilities[positions]


def priority_sample(
    scores: Tensor, budget: int, *, seed: int = 0, row_ids: Tensor | Sequence[int | str] | None = None
) -> tuple[Tensor, Tensor]:
    """Exactly `budget` rows: those with the largest keys `s_i / U_i`, `U = hash(seed, id)`.

    With tau the next key, `pi_i = min(1, s_i / tau)`, and weights `1 / pi` make weighted sums unbiased. A larger
    budget gives a superset. `PrioritySampler` does the same over shards.

    Args:
        scores: `(N,)` non-negative.
        budget: number of rows, `1 <= budget <= N`.
        seed: of the hash.
        row_ids: `(N,)` integers or texts that name the rows; default: their positions.

    Returns:
        positions, ascending, and weights `1 / pi` (all one if `budget` is N).

    Example:
        >>> positions, weights = priority_sample(torch.ones(100), 10)
        >>> len(positions), 70 < weights.sum() < 130  # an estimate of the 100 rows
        (10, tensor(True))

    Source: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums", JACM 2007.
    """
    scores = check_scores(scores)
    ids = _ids(row_ids, len(scores))
    budget = check_rows(budget, len(scores))
    if budget == len(scores):
        return torch.arange(budget), torch.ones(budget, dtype=torch.float64)
    keys = priority_keys(scores, seed, ids)
    top = keys.topk(budget + 1)
    positions = top.indices[:budget].sort().values
    return positions, 1 / (scores[positions].double().clamp(min=LEAST_SCORE) / top.values[budget]).clamp(max=1)


def priority_keys(scores: Tensor, seed: int, row_ids: Tensor) -> Tensor:
    """`s_i / U_i`, float64; a zero score counts as a tiny one."""
    return scores.double().clamp(min=LEAST_SCORE) / hashed_uniform(seed, row_ids)


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
        self.budget, self.seed, self.rows = check_rows(budget), seed, 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._least = 0.0  # keys not above it cannot be in the sample

    def add(self, scores: Tensor, row_ids: Tensor | Sequence[int]) -> None:
        """Offer rows; their order does not matter, and there may be none."""
        if len(scores) == len(row_ids) == 0:
            return
        scores = check_scores(scores)
        ids = _ids(row_ids, len(scores))
        keys = priority_keys(scores, self.seed, ids)
        self.rows += len(keys)
        self._keep(keys, ids, scores)

    def merge(self, other: "PrioritySampler") -> "PrioritySampler":
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
        """tau, the largest key left out; 0 if every row is in."""
        self._compact()
        keys = torch.cat([part[0] for part in self._parts]) if self._parts else torch.empty(0)
        return 0.0 if len(keys) <= self.budget else keys.min().item()

    def result(self) -> tuple[Tensor, Tensor]:
        """Row ids, ascending, and their inclusion probabilities."""
        check_rows(self.budget, self.rows)
        tau = self.threshold()
        keys, ids, scores = (torch.cat(column) for column in zip(*self._parts, strict=True))
        inside = keys > tau
        ids, scores = ids[inside], scores[inside].double().clamp(min=LEAST_SCORE)
        order = ids.argsort()
        return ids[order], (scores[order] / tau).clamp(max=1)

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
    ids = _ids(row_ids, len(scores))
    times = -hashed_uniform(seed, ids).log() / scores.double().clamp(min=LEAST_SCORE)
    return times.topk(check_rows(budget, len(scores)), largest=False).indices.sort().values


def top_k(scores: Tensor, budget: int) -> Tensor:
    """Positions of the `budget` largest scores, ascending; among equal scores the first rows."""
    scores = check_scores(scores)
    order = scores.sort(descending=True, stable=True).indices
    return order[: check_rows(budget, len(scores))].sort().values


# ---- shares of the budget


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
    return _fill(counts, budget, hashed_uniform(seed, torch.arange(len(counts)), salt=1))


def _fill(counts: Tensor, budget: int, turns: Tensor) -> Tensor:
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


# ---- weights in the loss


def loss_weights(
    kind: str,
    *,
    probabilities: Tensor | None = None,
    uncertainty: Tensor | None = None,
    p_label: Tensor | None = None,
    beta: float = 0.1,
    floor: float = 1e-3,
    normalise: bool = True,
) -> Tensor:
    """Weights of the selected rows in the loss, with mean 1.

    Args:
        kind: `"exact"`: `1 / pi`, unbiased and wild. `"damped"`: `1 / max(beta, u)`, the released code's.
            `"p_label"`: `p_y + floor`, the mean probability of the given label: wrong labels fall silent.
            `"none"`: 1.
        probabilities, uncertainty, p_label: `(r,)`, what the kind needs.
        beta: uncertainty, in logits, below which damped weights are equal.
        floor: keeps a set of doubted rows from losing its weight altogether.
        normalise: divide by the mean; False for one part of a selection that comes in parts.

    Returns:
        `(r,)` float64, with mean 1 unless `normalise=False`.

    Example:
        >>> loss_weights("damped", uncertainty=torch.tensor([0.01, 0.3]))
        tensor([1.5000, 0.5000], dtype=torch.float64)
    """
    if kind not in WEIGHTS:
        raise ValueError(f"weights={kind!r}: it must be one of {WEIGHTS}")
    needed = {"exact": "probabilities", "damped": "uncertainty", "p_label": "p_label", "none": None}[kind]
    given = {"probabilities": probabilities, "uncertainty": uncertainty, "p_label": p_label}
    if needed is None:
        values = next((value for value in given.values() if value is not None), None)
        if values is None:
            raise ValueError("weights='none' needs one of probabilities=, uncertainty= or p_label= for the row count")
        return torch.ones(len(values), dtype=torch.float64)
    if (values := given[needed]) is None:
        raise ValueError(f"weights={kind!r} needs {needed}=; score the rows with labels, or choose other weights")
    values = values.double()
    raw = {"exact": lambda v: 1 / v, "damped": lambda v: 1 / v.clamp(min=beta), "p_label": lambda v: v + floor}
    weights = raw[kind](values)
    if not (weights.isfinite() & (weights >= 0)).all() or not weights.sum() > 0:
        raise ValueError(
            f"weights={kind!r} come out infinite, NaN, negative or all zero; check {needed}=, and that "
            f"beta={beta} and floor={floor} are above zero"
        )
    return weights / weights.mean() if normalise else weights


def kish_size(weights: Tensor) -> float:
    """Kish's effective sample size, `(sum w)^2 / sum w^2`: rows of equal weight that would vary as little.

    Example:
        >>> kish_size(torch.tensor([1.0, 1.0, 0.0]))
        2.0
    """
    weights = weights.double()
    return (weights.sum().square() / weights.square().sum()).item()


# ---- checks


def check_scores(scores: Tensor, signed: bool = False) -> Tensor:
    """Scores as a one-dimensional float tensor on the CPU; raises for NaN, infinite or (if not signed) negative."""
    scores = torch.as_tensor(scores)
    scores = (scores if scores.is_floating_point() else scores.double()).detach().cpu()
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; pass one number a row, for one row or more")
    bad = ~scores.isfinite() if signed else ~(scores.isfinite() & (scores >= 0))
    if bad.any():
        rows = bad.nonzero().flatten()
        kinds = "NaN or infinite" if signed else "NaN, infinite or negative"
        raise ValueError(f"{len(rows)} scores are {kinds}, the first is {scores[rows[0]].item()} at row {rows[0]}")
    return scores


def check_budget(budget: float, rows: int) -> float:
    """A budget as a float in (0, rows]."""
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget <= rows:
        raise ValueError(f"budget={budget!r}: it must be a number above 0 and at most the {rows} rows there are")
    return float(budget)


def check_rows(budget: int, rows: int | None = None) -> int:
    """A budget as a number of rows, from 1 to `rows`."""
    # the remainder of infinity and NaN is NaN
    whole = isinstance(budget, Real) and not isinstance(budget, bool) and budget % 1 == 0
    if not whole or budget < 1 or (rows is not None and budget > rows):
        there = "" if rows is None else f" up to the {rows} there are"
        raise ValueError(f"budget={budget!r}: it must be a whole number of rows from 1{there}")
    return int(budget)
