"""Which short lists of candidates to have ranked: at random, in partitions, in covering designs, by knock-out."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .counts import counted
from .ranker_covering_tables import ALPHABET, DESIGNS


# larger designs of the table that a smaller one is tried to be cut out of
LARGER = 8
MOST_POINTS = 10_000
MOST_PLACES = 2**28  # in the lists of one call


def schoenheim_bound(v: int, k: int) -> int:
    """The number of blocks that no covering design can do with fewer of.

    ceil(v / k * ceil((v - 1) / (k - 1)))

    Args:
        v: points.
        k: points of a block, 2 to v.

    Returns:
        the bound.

    Raises:
        ValueError: for fewer than two points, or a k outside 2..v.

    Example:
        >>> schoenheim_bound(50, 5), schoenheim_bound(50, 10)
        (130, 30)

    Source: J. Schoenheim, On coverings (Pacific J. Math. 14, 1964).
    """
    _check(v, k)
    return -(-v * -(-(v - 1) // (k - 1)) // k)


def covering_design(v: int, k: int) -> Tensor:
    """Blocks of k of the v points, such that every two points are together in at least one of them.

    Unfolded from a table of designs with a cyclic symmetry, or made from one of its designs by leaving out points or
    by putting several points in the place of one, or greedily; whichever has the fewest blocks. At most a quarter and
    one block above `schoenheim_bound` for k in (3, 5, 10) and up to 50 points. The same at every call, and kept.

    Args:
        v: points, at least 2.
        k: points of a block, 2 to v.

    Returns:
        LongTensor `(b, k)` of distinct points 0..v-1 a row.

    Raises:
        ValueError: for fewer than two points, or a k outside 2..v.

    Example:
        >>> covering_design(25, 5).shape  # an affine plane: every two points exactly once
        torch.Size([30, 5])

    Source: RH-Partial2Global (arXiv 2509.25989), sampling by covering designs; the designs are our own.
    """
    _check(v, k)
    return torch.from_numpy(_design(v, k).copy())


def random_lists(
    v: int, k: int, count: int, generator: torch.Generator | None = None, batch: int | None = None
) -> Tensor:
    """`count` independent random lists of k distinct positions.

    Args:
        v: candidates.
        k: length of a list, 2 to v.
        count: lists.
        generator: of the draw, whose device is that of the lists; None: torch's default on the CPU.
        batch: B, for independent lists for B queries.

    Returns:
        LongTensor `(count, k)`, or `(batch, count, k)`, of positions 0..v-1.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> random_lists(50, 5, 20, torch.Generator().manual_seed(0)).shape
        torch.Size([20, 5])

    Source: the released code of Partial2Global, which ranks 20 or 30 of them.
    """
    _check(v, k, "candidates", "a list")
    _positive(count=count, batch=batch)
    lists = _shuffled(v, (batch or 1, count), generator)[..., :k]
    return lists if batch else lists[0]


def partitions(
    v: int, k: int, passes: int = 1, generator: torch.Generator | None = None, batch: int | None = None
) -> Tensor:
    """Shuffled copies of all candidates, cut into lists of k: every candidate is in at least one list of each pass.

    Where k does not divide v, the last list of a pass is filled up with the first candidates of the pass, so that no
    list is shorter (a list of one would compare nothing) and two candidates are at most twice together in a pass.

    Args:
        v: candidates.
        k: length of a list, 2 to v.
        passes: N_p, shuffled copies. One copy compares nothing between its lists, so that rankings from it can not be
            aggregated unless k = v or it is combined with other lists.
        generator: of the draw, whose device is that of the lists; None: torch's default on the CPU.
        batch: B, for independent partitions for B queries.

    Returns:
        LongTensor `(passes * ceil(v / k), k)`, or with the batch in front, of positions 0..v-1.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> partitions(50, 10, passes=10).shape
        torch.Size([50, 10])

    Source: Partial2Global (arXiv 2405.15279), the observation pool.
    """
    _check(v, k, "candidates", "a list")
    _positive(passes=passes, batch=batch)
    shuffled = _shuffled(v, (batch or 1, passes), generator)
    places = torch.arange(-(-v // k) * k, device=shuffled.device) % v
    lists = shuffled[..., places].reshape(batch or 1, -1, k)
    return lists if batch else lists[0]


def covering_lists(
    v: int, k: int, passes: int = 1, generator: torch.Generator | None = None, batch: int | None = None
) -> Tensor:
    """The blocks of `covering_design(v, k)`, with the candidates shuffled anew over its points for each pass.

    Every two candidates are compared at least once in every pass.

    Args:
        v: candidates.
        k: length of a list, 2 to v.
        passes: over the design.
        generator: of the shuffles, whose device is that of the lists; None: torch's default on the CPU.
        batch: B, for independent shuffles for B queries.

    Returns:
        LongTensor `(passes * b, k)` for a design of b blocks, or with the batch in front, of positions 0..v-1.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> covering_lists(25, 5).shape, covering_lists(50, 10, batch=4).shape
        (torch.Size([30, 5]), torch.Size([4, 30, 10]))

    Source: RH-Partial2Global (arXiv 2509.25989), which makes floor(50 / b) + 1 passes.
    """
    _check(v, k, "candidates", "a list")
    _positive(passes=passes, batch=batch)
    shuffled = _shuffled(v, (batch or 1, passes), generator)
    blocks = covering_design(v, k).to(shuffled.device)
    lists = shuffled[..., blocks].flatten(1, 2)
    return lists if batch else lists[0]


def knock_out(rank: Callable[[Tensor], Tensor], v: int, k: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """The naive tournament: lists of k in the given order, of each list only the best goes on, until one is left.

    50 candidates take 13 lists of 5 (10 + 2 + 1) or 6 lists of 10 (5 + 1). A last list of one candidate is not ranked:
    it goes on by itself.

    Args:
        rank: called once a level with all its lists, `(B, L, w)` positions with -1 at the end of a shorter last list
            and w <= k; returns the same positions best first, -1 at the end again.
        v: candidates, in the order in which they are cut into lists: by similarity, as the paper has them.
        k: length of a list, 2 to v.
        batch: B queries, whose tournaments are played side by side.

    Returns:
        winners `(B,)`, and all ranked lists `(B, L, k)`, best first and padded with -1, as `aggregate_rankings` takes
        them beside others.

    Raises:
        ValueError: for sizes that do not fit, or where `rank` returns something else than its lists in another order.

    Example:
        >>> larger_first = lambda lists: lists.sort(dim=2, descending=True).values
        >>> winner, lists = knock_out(larger_first, 50, 5)
        >>> winner, lists.shape
        (tensor([49]), torch.Size([1, 13, 5]))

    Source: Partial2Global (arXiv 2405.15279), the naive aggregation.
    """
    _check(v, k, "candidates", "a list")
    if not callable(rank) or batch is None:
        raise TypeError(f"rank={rank!r}, batch={batch!r}: pass a function of lists (batch, lists, k), and how many")
    _positive(batch=batch)
    if batch * v > MOST_PLACES:
        raise ValueError(f"batch={batch} queries of v={v} candidates do not fit into memory: pass a smaller batch")
    left = torch.arange(v).expand(batch, v)
    ranked = []
    while left.shape[1] > 1:
        n = left.shape[1]
        width = min(k, n)
        alone = left[:, n - 1 :] if n % width == 1 else left[:, :0]
        n -= alone.shape[1]
        lists = left.new_full((batch, -(-n // width) * width), -1)
        lists[:, :n] = left[:, :n]
        lists = lists.view(batch, -1, width)
        orders = rank(lists)
        if orders.shape != lists.shape or not torch.equal(orders.sort(2).values, lists.to(orders).sort(2).values):
            raise ValueError(
                f"rank returned {tuple(orders.shape)} for lists {tuple(lists.shape)}: return the "
                "positions of each list themselves, best first, and -1 at the end"
            )
        if ((orders[..., :-1] < 0) & (orders[..., 1:] >= 0)).any():
            raise ValueError("rank returned -1 before the end of a list: the padding of a list goes last")
        ranked.append(torch.nn.functional.pad(orders, (0, k - width), value=-1))
        left = torch.cat([orders[..., 0], alone.to(orders)], 1)
    return left[:, 0], torch.cat(ranked, 1)


# ---- designs


@lru_cache(maxsize=1024)
def _design(v: int, k: int) -> np.ndarray:
    if v == k:
        return np.arange(k)[None]
    if k == 2:
        return np.stack(np.triu_indices(v, 1), 1)
    best = None
    for blocks in _attempts(v, k):
        blocks = _without_needless(_filled_up(blocks, v, k), v)
        if best is None or len(blocks) < len(best):
            best = blocks
        if len(best) == schoenheim_bound(v, k):
            break
    return np.sort(np.array(best, dtype=np.int64), 1)


def _attempts(v: int, k: int) -> Iterator[list[list[int]]]:
    """Coverings by blocks of at most k points."""
    table = _table(k)
    if v in table:  # a line is only kept where it has fewer blocks than all that follows
        yield _unfolded(table[v])
        return
    for u in sorted(u for u in table if u > v)[:LARGER]:
        yield _fewer_points(_unfolded(table[u]), u, v)
    for short in (2, *(other for other in DESIGNS if other < k)):
        points = -(-v // (k // short))
        if short < points < v:
            yield _more_points(_design(points, short), points, v)
    yield _greedy(v, k)


def _table(k: int) -> dict[int, str]:
    return {int(line.split()[0]): line for line in DESIGNS.get(k, "").splitlines() if line}


def _unfolded(line: str) -> list[list[int]]:
    first, second, *words = line.split()
    v, m = int(first), int(second)
    blocks = np.array([[ALPHABET.index(letter) for letter in word] for word in words])[:, None]
    turned = blocks // m * m + (blocks % m + np.arange(m)[:, None]) % m
    turned = np.where(blocks < v // m * m, turned, blocks).reshape(-1, blocks.shape[2])
    return np.unique(np.sort(turned, 1), axis=0).tolist()  # a block with a symmetry comes several times


def _fewer_points(blocks: list[list[int]], u: int, v: int) -> list[list[int]]:
    # those of one block first, which is left out then
    leaving = list(dict.fromkeys(point for block in blocks for point in block))[: u - v]
    number = {point: i for i, point in enumerate(point for point in range(u) if point not in leaving)}
    shorter = [[number[point] for point in block if point in number] for block in blocks]
    return [block for block in shorter if len(block) > 1]


def _more_points(blocks: np.ndarray, u: int, v: int) -> list[list[int]]:
    # in the place of each point, so that blocks become that much longer
    members = np.array_split(np.arange(v), u)
    return [[int(point) for place in block for point in members[place]] for block in blocks]


def _greedy(v: int, k: int) -> list[list[int]]:
    open_pairs = ~np.eye(v, dtype=bool)
    blocks = []
    while (degree := open_pairs.sum(1)).any():
        block = [int(degree.argmax())]
        gain = degree / v**2  # decides between equal gains only
        for _ in range(k - 1):
            gain = gain + open_pairs[block[-1]]
            gain[block[-1]] = -1 - k  # never twice, whatever it gains later
            block.append(int(gain.argmax()))
        open_pairs[np.ix_(block, block)] = False
        blocks.append(block)
    return blocks


def _filled_up(blocks: list[list[int]], v: int, k: int) -> list[list[int]]:
    """Blocks of exactly k points: those are added that the block's points have met least."""
    met = _meetings(blocks, v)
    filled = []
    for block in blocks:
        block = list(block)
        while len(block) < k:
            often = met[block].sum(0).astype(float)
            often[block] = np.inf
            point = int(often.argmin())
            met[block, point] += 1
            met[point, block] += 1
            block.append(point)
        filled.append(block)
    return filled


def _without_needless(blocks: list[list[int]], v: int) -> list[list[int]]:
    """Leaves out blocks all of whose pairs are in others, those with the most pairs to spare first."""
    met = _meetings(blocks, v)
    np.fill_diagonal(met, 2 * len(blocks))  # no pairs
    kept = []
    for block in sorted(blocks, key=lambda block: -met[np.ix_(block, block)].sum()):
        here = np.ix_(block, block)
        if met[here].min() > 1:
            met[here] -= 1
        else:
            kept.append(block)
    return kept


def _meetings(blocks: list[list[int]], v: int) -> np.ndarray:
    met = np.zeros((v, v), dtype=int)
    for block in blocks:
        met[np.ix_(block, block)] += 1
    np.fill_diagonal(met, 0)
    return met


# ---- what the schedules share


def _shuffled(v: int, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    # in double precision, where equal keys, which would make some orders likelier, do not happen
    return torch.rand(*shape, v, generator=generator, device=device, dtype=torch.float64).argsort(-1)


def _check(v: int, k: int, points: str = "points", block: str = "a block") -> None:
    for name, value in (("v", v), ("k", k)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name}={value!r}: pass a whole number")
    if v > MOST_POINTS:
        raise ValueError(f"v={v} {points}: more than {MOST_POINTS:,} would take days; pass fewer")
    if v < 2:
        raise ValueError(f"v={v} {points}: there is nothing to compare; pass at least 2")
    if k < 2:
        raise ValueError(f"k={k}: {block} of fewer than two compares nothing; pass a k of 2 to {v}")
    if k > v:
        raise ValueError(f"k={k} is more than the v={v} {points} there are: pass a smaller k or more {points}")


def _positive(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None:
            counted(name, value)
