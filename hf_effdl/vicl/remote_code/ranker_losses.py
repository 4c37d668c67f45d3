"""What a list-wise ranker is trained with: a differentiable NDCG, a margin on pairs, and the ranks both start from."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


ROUNDS, TOLERANCE = 50, 1e-6


def ranks(metric: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Place of every item in its list: 0 for the worst, k - 1 for the best.

    ranks = argsort(argsort(metric)); one argsort alone is the inverse of it.

    Args:
        metric: `(B, k)`, larger is better; of equal values the one that stands first is the worse.
        mask: `(B, k)` bool, False where a shorter list was padded; default: all count.

    Returns:
        `(B, k)` int64, -1 where the mask is False.

    Raises:
        ValueError: for NaN, or another shape.

    Example:
        >>> ranks(torch.tensor([[0.5, 0.9, 0.2]]))
        tensor([[1, 2, 0]])

    Source: the relevance of Partial2Global's sorting loss (arXiv 2405.15279, section 3.2).
    """
    mask = _checked("metric", metric, mask)
    order = metric.argsort(dim=1, stable=True)
    if mask is not None:  # padding last, whatever its values
        order = order.gather(1, (~mask).gather(1, order).byte().argsort(dim=1, stable=True))
    places = order.argsort(dim=1)
    return places if mask is None else places.masked_fill(~mask, -1)


def soft_permutation(scores: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
    """The matrix that sorts a list, made soft: row p says which items stand at place p, the best first.

    P[p, :] = softmax(((k + 1 - 2p) s - A 1) / temperature) with A_ij = |s_i - s_j| (NeuralSort), then columns and rows
    are normalised in turn (Sinkhorn) until all sums are 1 within 1e-6, at most 50 times.

    Args:
        scores: `(B, k)`.
        temperature: the matrix tends to the permutation itself as it goes to 0.
        mask: `(B, k)` bool, False for padding, whose columns, and as many of the last rows, are 0.

    Returns:
        `(B, k, k)`, in float32 or wider.

    Raises:
        ValueError: for NaN, lists of fewer than two items, or a temperature that is not positive.

    Example:
        >>> soft_permutation(torch.tensor([[1.0, 3.0, 2.0]]), temperature=0.01).round().int()
        tensor([[[0, 1, 0],
                 [0, 0, 1],
                 [1, 0, 0]]], dtype=torch.int32)

    Source: Grover et al., arXiv 1903.08850, theorem 1.
    """
    mask = _checked("scores", scores, mask)
    _positive("temperature", temperature)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    k = scores.shape[1]
    cells = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = scores.masked_fill(~cells, 0.0)  # padding may hold -inf
    sizes = cells.sum(1)[:, None]
    place = torch.arange(1, k + 1, device=scores.device)
    apart = ((scores[:, :, None] - scores[:, None, :]).abs() * cells[:, None, :]).sum(2)
    logits = (sizes + 1 - 2 * place)[:, :, None] * scores[:, None, :] - apart[:, None, :]
    soft = (logits / temperature).masked_fill(~cells[:, None, :], -torch.inf).softmax(2)
    if mask is not None:
        soft = soft * (place <= sizes)[:, :, None]
    # a sum is at least 1 / k: at place p the p-th item has the largest share. Only of padding it is 0
    kept, full = cells[:, None, :], (place <= sizes)[:, :, None]
    for _ in range(ROUNDS):
        columns = soft.sum(1, keepdim=True).where(kept, 1.0)
        # rows sum to 1 here, from the softmax or the round before
        if (columns.detach() - 1).abs().max() < TOLERANCE:
            break
        soft = soft / columns
        soft = soft / soft.sum(2, keepdim=True).where(full, 1.0)
    return soft


def neural_ndcg_loss(
    scores: Tensor, relevance: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    """NeuralNDCG with the sign turned: how well the scores sort a list, as a function with a slope.

    -mean over lists of  sum_p (P (2^r - 1))_p / log2(1 + p)  /  sum_p (2^r_(p) - 1) / log2(1 + p),

    P the soft permutation of the scores and r_(1) >= r_(2) >= ... the relevance, sorted.

    Args:
        scores: `(B, k)`, the higher the better.
        relevance: `(B, k)` of at least 0, used as it is: a rank, of `ranks(metric)`, or a grade. Not a metric in
            [0, 1], of which 2^r would make nearly one and the same gain.
        temperature: of the soft permutation.
        mask: `(B, k)` bool, False for padding.

    Returns:
        a number in [-1, 0). A list without any gain, of relevance 0 throughout, counts as sorted: -1 and no slope.

    Raises:
        ValueError: for NaN, shapes that differ, negative relevance or lists of fewer than two items.

    Example:
        >>> metric = torch.tensor([[0.5, 0.9, 0.2]])
        >>> round(float(neural_ndcg_loss(torch.tensor([[2.0, 9.0, -5.0]]), ranks(metric))), 2)
        -1.0

    Source: Pobrotyn & Bialobrzeski, "NeuralNDCG", arXiv 2102.07831; the loss L_sort of arXiv 2405.15279.
    """
    _same_shape(scores, relevance, "relevance")
    mask = _checked("relevance", relevance, mask)
    known = relevance if mask is None else relevance.masked_fill(~mask, 0)
    if bool((known < 0).any()):
        raise ValueError(
            f"relevance goes down to {float(known.min()):g}, and gains 2^r - 1 below 0 have no NDCG: "
            "pass ranks(metric), or grades from 0"
        )
    soft = soft_permutation(scores, temperature, mask=mask)
    relevance = known.to(soft.dtype)
    # gains over 2^largest, which the ratio does not see: 2^r alone overflows
    largest = relevance.amax(1, keepdim=True)
    gains = torch.exp2(relevance - largest) - torch.exp2(-largest)
    discount = 1 / torch.arange(2, scores.shape[1] + 2, device=soft.device, dtype=soft.dtype).log2()
    reached = ((soft @ gains[:, :, None])[:, :, 0] * discount).sum(1)
    ideal = (gains.sort(dim=1, descending=True).values * discount).sum(1)
    ndcg = torch.where(ideal > 0, reached / torch.where(ideal > 0, ideal, 1.0), 1.0)
    return -ndcg.clamp(max=1).mean()  # sums are 1 but for the tolerance


def pairwise_margin_loss(scores: Tensor, metric: Tensor, margin: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
    """A hinge on every pair: the better item's score is to be higher by the margin.

    mean over lists and pairs i < j of  max(0, margin - z_ij (s_i - s_j)),  z_ij = 1 if m_i > m_j, else -1.

    Args:
        scores: `(B, k)`, the higher the better.
        metric: `(B, k)`, larger is better; equal values count as -1.
        margin: that the scores of a pair should be apart.
        mask: `(B, k)` bool, False for padding; every list counts the same, however short.

    Returns:
        a number of at least 0.

    Raises:
        ValueError: for NaN, shapes that differ, or lists of fewer than two items.

    Example:
        >>> pairwise_margin_loss(torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([[0.9, 0.1, 0.4]]))
        tensor(0.)

    Source: the loss of arXiv 2405.15279, section 3.2, with the sign that puts the better one first.
    """
    _same_shape(scores, metric, "metric")
    _positive("margin", margin, -math.inf)
    _checked("scores", scores, mask)
    mask = _checked("metric", metric, mask)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    i, j = torch.triu_indices(*[scores.shape[1]] * 2, offset=1, device=scores.device)
    if mask is None:
        better = torch.where(metric[:, i] > metric[:, j], 1.0, -1.0)
        return (margin - better * (scores[:, i] - scores[:, j])).clamp(min=0).mean()
    scores, pairs = scores.masked_fill(~mask, 0.0), mask[:, i] & mask[:, j]  # padding may hold -inf
    better = torch.where(metric[:, i] > metric[:, j], 1.0, -1.0)
    hinge = (margin - better * (scores[:, i] - scores[:, j])).clamp(min=0)
    return ((hinge * pairs).sum(1) / pairs.sum(1)).mean()


def _is_tensor(name: str, values: Any) -> None:
    if not isinstance(values, Tensor) or values.is_complex() or values.is_meta:
        kind = f"{values.dtype} on {values.device}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} is a {kind}: pass a tensor of real numbers")


def _positive(name: str, value: Any, least: float = 0.0) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not least < value < math.inf:
        raise ValueError(f"{name}={value!r}: it must be a finite number above {least:g}; 1 is usual")


def _same_shape(scores: Tensor, other: Tensor, name: str) -> None:
    _is_tensor("scores", scores)
    _is_tensor(name, other)
    if scores.shape != other.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and {name} {tuple(other.shape)}: both must be (B, k)")


def _checked(name: str, values: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask, after the values were looked at; None where nothing is padded."""
    _is_tensor(name, values)
    if values.dim() != 2 or values.shape[1] < 2 or not len(values):
        raise ValueError(f"{name} of shape {tuple(values.shape)}: pass (B, k), lists of k >= 2 items")
    if mask is not None:
        _is_tensor("mask", mask)
        if mask.shape != values.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}: pass bool {tuple(values.shape)}, True for "
                f"what counts in {name}"
            )
        if bool((mask.sum(1) < 2).any()):
            raise ValueError(
                f"mask leaves list {int((mask.sum(1) < 2).nonzero()[0])} fewer than two items: leave that list out"
            )
    wrong = values.isnan() if mask is None else values.isnan() & mask
    if bool(wrong.any()):
        b, k = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} is NaN at item {k} of list {b}: mask it out, or mend what it was computed from")
    return mask
