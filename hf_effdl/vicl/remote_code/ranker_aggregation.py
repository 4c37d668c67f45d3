"""From many short rankings to one global ranking: least squares on the graph of comparisons, or win rates."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor


METHODS = ("hodge", "borda")
MOST_ITEMS = 2**15  # of which every two are counted


def aggregate_rankings(lists: Tensor | Sequence[Sequence[int]], num_items: int, method: str = "hodge") -> Tensor:
    """One score for each item from ranked lists of some of them: larger is better.

    With c_ij = how often i stands above j, n_ij = c_ij + c_ji and net wins b_i = sum_j (c_ij - c_ji), the scores are

        hodge   theta = argmin sum over observed (i above j) of (theta_i - theta_j - 1)^2, sum(theta) = 0,
                which is L theta = b with the graph Laplacian L = diag(sum_j n_ij) - n
        borda   b_i / sum_j n_ij, wins less losses by comparisons, in [-1, 1]

    Least squares takes into account against whom an item was compared; where all pairs were compared equally often
    (n_ij = n of K items) it is b / (n K), in the order of win rates. Otherwise it may rank an item that won all of its
    comparisons below one that won more often: consistent lists alone do not give the true order.

    Args:
        lists: items best first. `(L, k)`, padded with -1 at the end of a shorter row, a sequence of lists of any
            lengths, or `(B, L, k)` for B rankings at once; rows of -1 alone count for nothing.
        num_items: K; items are numbered 0..K-1.
        method: "hodge" or "borda".

    Returns:
        scores `(K,)` or `(B, K)` in float64, on the device of the lists.

    Raises:
        ValueError: where some items were never compared with the rest, so that their scores would say nothing; for
            items that do not exist, stand twice in a list or alone in one, padding inside a list, other shapes.
        TypeError: for items that are not whole numbers.

    Example:
        >>> aggregate_rankings([[0, 1, 2], [2, 3], [0, 3]], num_items=4)
        tensor([ 0.7500,  0.2500, -0.2500, -0.7500], dtype=torch.float64)

    Source: Partial2Global (arXiv 2405.15279), the consistency-aware aggregator; HodgeRank (Jiang, Lim, Yao and Ye,
    Statistical ranking and combinatorial Hodge theory, Math. Program. 127, 2011).
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {METHODS}")
    above = comparison_counts(lists, num_items)
    won, lost = above.sum(-1), above.sum(-2)
    compared = above + above.mT
    _check_connected(compared)
    wins, met = won - lost, won + lost
    if method == "borda":
        return wins / met
    # what is added to the Laplacian acts on constants only, which are its null space in a connected graph: the sum is
    # positive definite, with the same solution, since the net wins sum to 0
    laplacian = compared.neg_().add_(met.mean(-1)[..., None, None] / num_items)
    laplacian.diagonal(dim1=-2, dim2=-1).add_(met)
    return torch.cholesky_solve(wins[..., None], torch.linalg.cholesky(laplacian))[..., 0]


def comparison_counts(lists: Tensor | Sequence[Sequence[int]], num_items: int) -> Tensor:
    """How often each item stands above each other one.

    Args:
        lists, num_items: as for `aggregate_rankings`.

    Returns:
        c `(K, K)` or `(B, K, K)` in float64: c_ij = lists in which i stands above j.

    Raises:
        ValueError, TypeError: for malformed lists, as `aggregate_rankings`.

    Example:
        >>> comparison_counts([[1, 0], [1, 2]], num_items=3)
        tensor([[0., 0., 0.],
                [1., 0., 1.],
                [0., 0., 0.]], dtype=torch.float64)
    """
    lists = _padded(lists)
    if isinstance(num_items, bool) or not isinstance(num_items, Integral) or not 2 <= num_items <= MOST_ITEMS:
        raise ValueError(f"num_items={num_items!r}: pass the number of items, at least 2 and at most {MOST_ITEMS:,}")
    batched = lists.dim() == 3
    if not batched:
        lists = lists[None]
    _check_lists(lists, num_items)
    batch, _, k = lists.shape
    num_items = int(num_items)
    counts = torch.zeros(batch, num_items**2, dtype=torch.float64, device=lists.device)
    # all pairs of places at once would be k / 2 times the memory
    for apart in range(1, k):
        upper, lower = lists[..., :-apart], lists[..., apart:]
        real = lower >= 0
        cells = torch.where(real, upper * num_items + lower, 0)
        counts.scatter_add_(1, cells.flatten(1), real.to(counts).flatten(1))
    counts = counts.view(batch, num_items, num_items)
    twice = counts.diagonal(dim1=1, dim2=2) > 0
    if twice.any():
        entry, item = twice.nonzero()[0].tolist()
        raise ValueError(
            f"item {item} stands twice in one of the lists{_of(entry, batch)}: a list ranks distinct items"
        )
    return counts if batched else counts[0]


def _padded(lists: Tensor | Sequence[Sequence[int]]) -> Tensor:
    if not isinstance(lists, Tensor):
        lists = _joined(lists)
    if lists.is_floating_point() or lists.is_complex() or lists.dtype == torch.bool:
        raise TypeError(f"lists of {lists.dtype}: pass items as whole numbers, best first, not scores")
    if lists.dim() not in (2, 3) or not lists.numel():
        raise ValueError(
            f"lists of shape {tuple(lists.shape)}: pass (L, k), or (B, L, k) for a batch, with at least one list"
        )
    return lists.long()


def _joined(lists: Sequence[Sequence[int]]) -> Tensor:
    """Ragged lists as one tensor, padded with -1."""
    try:
        rows = [torch.as_tensor(row) for row in lists]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lists of {type(lists).__name__}: pass a LongTensor, or lists of whole numbers") from error
    if not rows:
        raise ValueError("lists is empty: pass at least one ranked list")
    if any(row.dim() != 1 or not len(row) for row in rows):
        raise ValueError(
            "lists: each list has to be a non-empty sequence of items; pass batches as one tensor "
            "(B, L, k) padded with -1"
        )
    if kinds := {row.dtype for row in rows if row.is_floating_point() or row.dtype == torch.bool}:
        raise TypeError(f"lists of {kinds.pop()}: pass items as whole numbers, best first, not scores")
    return torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True, padding_value=-1)


def _check_lists(lists: Tensor, num_items: int) -> None:
    """`(B, L, k)`; one look at the values where all is well."""
    pad = torch.nn.functional.pad(lists, (0, 1), value=-1)
    outside = (lists < -1) | (lists >= num_items)
    holes = (pad[..., :-1] < 0) & (pad[..., 1:] >= 0)
    alone = (pad[..., 0] >= 0) & (pad[..., 1] < 0)
    if not (outside.any() | holes.any() | alone.any()):
        return
    wrong = outside.any(-1) | holes.any(-1) | alone
    entry, row = wrong.nonzero()[0].tolist()
    which = f"list {row}{_of(entry, len(lists))}, {lists[entry, row].tolist()},"
    if outside[entry, row].any():
        raise ValueError(
            f"{which} has an item outside 0..{num_items - 1}: pass num_items larger than every item, and "
            "-1 for padding only"
        )
    if holes[entry, row].any():
        raise ValueError(f"{which} has -1 before an item: padding goes to the end of a list")
    raise ValueError(
        f"{which} has one item: it compares nothing; leave it out, or make the last list of a partition longer"
    )


def _check_connected(compared: Tensor) -> None:
    """`(..., K, K)`: spreads from item 0 over comparisons until nothing is added."""
    links = (compared if compared.dim() == 3 else compared[None]).gt(0).float()
    reached = torch.zeros_like(links[..., :1])
    reached[:, 0] = 1
    while True:
        wider = ((links @ reached + reached) > 0).float()
        if torch.equal(wider, reached):
            break
        reached = wider
    if reached.all():
        return
    entry = int((reached == 0).any(1).flatten().nonzero()[0])
    beyond = reached[entry, :, 0] == 0
    apart = (beyond if 2 * beyond.sum() <= len(beyond) else ~beyond).nonzero().flatten()
    never = (links[entry].sum(1) == 0).nonzero().flatten()
    if len(never):
        raise ValueError(
            f"{_some(never)} in none of the lists{_of(entry, len(links))}: rank every item at least "
            "once, or pass fewer num_items"
        )
    raise ValueError(
        f"{_some(apart)} never compared, not even through others, with the rest{_of(entry, len(links))}: "
        "their scores would say nothing about each other; rank more lists that mix them, such as those "
        "of a covering design or of more passes"
    )


def _some(items: Tensor) -> str:
    shown = items[:5].tolist() + (["..."] if len(items) > 5 else [])
    listed = ", ".join(map(str, shown))
    return f"item {listed} was" if len(items) == 1 else f"{len(items)} items ({listed}) were"


def _of(entry: int, batch: int) -> str:
    return f" of entry {entry} of the batch" if batch > 1 else ""
