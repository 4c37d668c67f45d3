"""The reliable part of a pool: examples that do well where they are similar, leaving out those that do not."""

import math
from numbers import Real

import torch
from torch import Tensor


METHODS = ("kl", "spearman")
# what is added to scaled values, so that none is zero
SMALL = 1e-6


def conformity(performance: Tensor, similarity: Tensor, known: Tensor | None = None, method: str = "kl") -> Tensor:
    """How well each example's performance follows its similarity: larger is more reliable.

    For example i with performance Q_ij and similarity S_ij on the images j that it was measured on, both scaled to
    [0, 1] over j, raised by 1e-6 and divided by their sum (values that are all equal become uniform),

        kl         -KL(Q_i || S_i) = -sum_j Q_ij log(Q_ij / S_ij), at most 0
        spearman   correlation of the ranks of Q_ij and S_ij over j, ties by their mean rank; 0 where one of the two
                   is constant

    Args:
        performance: `(n, M)`, larger is better, of n examples.
        similarity: `(n, M)` of the same pairs, such as cosines.
        known: `(n, M)` bool, the pairs that were measured; None: all.
        method: "kl" or "spearman".

    Returns:
        `(n,)` in float64; NaN for an example with fewer than two measured pairs, of which nothing is known.

    Raises:
        ValueError: for NaN or infinite values where known, and shapes that differ.

    Example:
        >>> similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
        >>> performance = torch.tensor([[0.8, 0.4, 0.0], [0.0, 0.4, 0.8]])
        >>> conformity(performance, similarity, method="spearman")
        tensor([ 1., -1.], dtype=torch.float64)

    Source: RH-Partial2Global (arXiv 2509.25989), conformity functions; negative KL is its choice.
    """
    if performance.dim() != 2 or performance.shape != similarity.shape:
        raise ValueError(
            f"performance {tuple(performance.shape)} and similarity {tuple(similarity.shape)}: pass both "
            "as (n, M), one row an example"
        )
    if known is None:
        known = torch.ones_like(performance, dtype=torch.bool)
    if known.shape != performance.shape or known.dtype != torch.bool:
        raise ValueError(
            f"known {tuple(known.shape)} of {known.dtype}: pass a bool tensor of the shape of "
            f"performance, {tuple(performance.shape)}"
        )
    example = known.nonzero()[:, 0]
    return _conformity(example, performance[known], similarity[known], len(performance), method)


def reliable_rows(
    candidates: Tensor, performance: Tensor, similarity: Tensor, drop: float = 0.15, method: str = "kl"
) -> Tensor:
    """The rows of a pool without the floor(drop * n) examples whose conformity is lowest.

    The whole table of the paper's jackknife is that of `measure_examples` with candidates = n - 1 and all queries:
    n (n - 1) runs of the frozen model. Fewer queries (each example is then judged on a random part of the pool), or
    the 50 nearest candidates, approximate it; the number of pairs that examples are judged on then differs.

    Args:
        candidates: `(n, K)` rows of the pool: candidates[j, k] was shown as the example for pool image j; -1 where
            nothing was measured. A pair of an image with itself does not count.
        performance: `(n, K)` of these pairs, larger is better.
        similarity: `(n, K)` of the same pairs, such as cosines of the pool's vectors.
        drop: share of the pool to leave out, in [0, 1); the paper's alpha is 1 - drop. 0 keeps all.
        method: see `conformity`.

    Returns:
        LongTensor of rows that are kept, ascending. Examples with fewer than two measured pairs are always among them,
        since nothing is known of them: where they are many, fewer than floor(drop * n) are left out. Of equal
        conformities, the smaller row is left out first. The result does not depend on any query.

    Raises:
        ValueError: for values that are not finite, a table in which all performances are equal, a drop outside
            [0, 1), rows outside the pool, and shapes that differ.

    Example:
        >>> candidates = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
        >>> similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.6, 0.3], [0.5, 0.6, 0.8], [0.1, 0.3, 0.8]])
        >>> performance = similarity.clone()
        >>> performance[[0, 1, 3], [1, 1, 2]] = torch.tensor([0.1, 0.9, 0.2])  # of example 2
        >>> reliable_rows(candidates, performance, similarity, drop=0.25)
        tensor([0, 1, 3])

    Source: RH-Partial2Global (arXiv 2509.25989), the reliable set, with alpha = 0.85.
    """
    tables = {"candidates": candidates, "performance": performance, "similarity": similarity}
    for name, table in tables.items():
        if not isinstance(table, Tensor) or table.is_complex() or table.is_meta:
            raise TypeError(f"{name} is a {type(table).__name__}: pass a tensor (n, K) of real numbers")
    if not isinstance(drop, Real) or isinstance(drop, bool) or not 0 <= drop < 1:
        raise ValueError(f"drop={drop!r}: pass the share of the pool to leave out, at least 0 and below 1")
    if candidates.dim() != 2 or not candidates.shape == performance.shape == similarity.shape:
        raise ValueError(
            f"candidates {tuple(candidates.shape)}, performance {tuple(performance.shape)} and similarity "
            f"{tuple(similarity.shape)}: pass all three as (n, K), of the same pairs"
        )
    if candidates.is_floating_point() or candidates.dtype == torch.bool:
        raise TypeError(f"candidates of {candidates.dtype}: pass rows of the pool as whole numbers")
    n = len(candidates)
    if candidates.numel() and not -1 <= int(candidates.min()) <= int(candidates.max()) < n:
        raise ValueError(
            f"candidates from {int(candidates.min())} to {int(candidates.max())}: the table has {n} "
            f"rows, so that they have to be 0..{n - 1}, or -1 where nothing was measured"
        )
    known = (candidates >= 0) & (candidates != torch.arange(n, device=candidates.device)[:, None])
    measured = performance[known]
    conformities = _conformity(candidates[known].long(), measured, similarity[known], n, method)
    if not len(measured) or measured.min() == measured.max():
        raise ValueError(
            f"the {len(measured)} measured performances are all equal: nothing can be learned from them; "
            "check the metric, and that the table was measured"
        )
    # a share such as 0.29 of 100 is 29, whatever binary fractions make of it
    count = min(math.floor(drop * n + 1e-9), int((~conformities.isnan()).sum()))
    order = conformities.nan_to_num(nan=math.inf).argsort(stable=True)
    return order[count:].sort().values


def refine(rows: Tensor, reliable: Tensor, fill: Tensor | None = None) -> Tensor:
    """Each query's candidates that are in the reliable set, in their order.

    Args:
        rows: `(B, K)` candidates of B queries, best first, -1 where there is none.
        reliable: rows that are reliable, as from `reliable_rows`.
        fill: `(B, K2)` longer lists of candidates, whose next reliable ones fill a list up to K again. Those that
            are in `rows` too are not taken twice, so that it may be the same search with a larger K.

    Returns:
        `(B, K)`, padded with -1 at the end. A query of which nothing would be left keeps its candidates as they are.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> rows, reliable = torch.tensor([[4, 2, 7], [5, 5, 5]]), torch.tensor([2, 3, 4, 9])
        >>> refine(rows, reliable)
        tensor([[ 4,  2, -1],
                [ 5,  5,  5]])
        >>> refine(rows[:1], reliable, fill=torch.tensor([[4, 2, 7, 8, 9, 3]]))
        tensor([[4, 2, 9]])

    Source: RH-Partial2Global (arXiv 2509.25989), Y*_q, and S_fill of its ablation.
    """
    if rows.dim() != 2 or reliable.dim() != 1:
        raise ValueError(f"rows {tuple(rows.shape)} and reliable {tuple(reliable.shape)}: pass (B, K) and (r,)")
    wide = rows
    if fill is not None:
        if fill.dim() != 2 or len(fill) != len(rows):
            raise ValueError(f"fill {tuple(fill.shape)}: pass (B, K2) candidates of the same {len(rows)} queries")
        listed = (fill[:, :, None] == rows[:, None]).any(2)
        wide = torch.cat([rows, fill.masked_fill(listed, -1)], 1)
    keep = (wide >= 0) & torch.isin(wide, reliable.to(wide))
    front = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : rows.shape[1]]
    found = wide.gather(1, front).masked_fill(~keep.gather(1, front), -1)
    return torch.where(keep.any(1, keepdim=True), found, rows)


def _conformity(example: Tensor, performance: Tensor, similarity: Tensor, n: int, method: str) -> Tensor:
    """Of pairs in any order: `(P,)` examples, performances and similarities to `(n,)`."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {METHODS}")
    for name, values in (("performance", performance), ("similarity", similarity)):
        bad = int((~values.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{name} is not finite in {bad} of {len(values)} measured pairs: leave them out (-1 in "
                "candidates, False in known), or use a metric that is defined for them"
            )
    performance, similarity = performance.double(), similarity.double()
    pairs = torch.zeros(n, dtype=torch.float64, device=example.device)
    pairs.index_add_(0, example, torch.ones_like(performance))
    if method == "kl":
        q, s = _distribution(example, performance, n), _distribution(example, similarity, n)
        found = torch.zeros_like(pairs).index_add_(0, example, -q * (q / s).log())
    else:
        q, s = (_centred_ranks(example, values, pairs) for values in (performance, similarity))
        products = [torch.zeros_like(pairs).index_add_(0, example, one) for one in (q * s, q * q, s * s)]
        found = products[0] / (products[1] * products[2]).sqrt()
        found = found.masked_fill((products[1] == 0) | (products[2] == 0), 0)
    return found.masked_fill(pairs < 2, torch.nan)


def _distribution(example: Tensor, values: Tensor, n: int) -> Tensor:
    start = values.new_zeros(n)
    low = start.scatter_reduce(0, example, values, "amin", include_self=False)[example]
    high = start.scatter_reduce(0, example, values, "amax", include_self=False)[example]
    raised = torch.where(high > low, (values - low) / (high - low), 0) + SMALL
    return raised / start.index_add(0, example, raised)[example]


def _centred_ranks(example: Tensor, values: Tensor, pairs: Tensor) -> Tensor:
    """Ranks of the values of each example less their mean; ties share their mean rank."""
    order = values.argsort(stable=True)
    order = order[example[order].argsort(stable=True)]
    sorted_example, sorted_values = example[order], values[order]
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = (sorted_example[1:] != sorted_example[:-1]) | (sorted_values[1:] != sorted_values[:-1])
    group = first.cumsum(0) - 1
    place = torch.arange(len(order), dtype=torch.float64, device=values.device)
    size = torch.zeros_like(place).index_add_(0, group, torch.ones_like(place))
    shared = torch.zeros_like(place).index_add_(0, group, place) / size.clamp(min=1)
    starts = pairs.cumsum(0) - pairs
    ranks = torch.empty_like(place)
    ranks[order] = shared[group] - starts[sorted_example] - (pairs[sorted_example] - 1) / 2
    return ranks
