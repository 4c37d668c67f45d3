"""Exact search for the nearest rows of a pool, wherever its vectors lie."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor


# similarities held at once: queries x rows
QUERIES, ROWS = 256, 2**14
LAST = 2**32 - 1


def exact_search(
    blocks: Iterable[Tensor | tuple[Tensor, Tensor | None]], queries: Tensor, k: int, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `k` largest inner products with rows that lie in blocks, without copying them together.

    Similarity and row are packed into one integer, so that the order is total: of equal similarities the lower row
    comes first, wherever blocks begin.

    Args:
        blocks: `(n_i, d)` float32 each; or a pair of it and of the positions in it that count (None: all).
            They are walked through once per 256 queries.
        queries: `(B, d)`.
        k: at most the number of rows, less one with `exclude`.
        exclude: `(B,)` a row that each query must not find, -1 for none.

    Returns:
        similarities `(B, k)` float32 and rows `(B, k)` int64, best first.

    Example:
        >>> exact_search([torch.eye(2), torch.ones(1, 2)], torch.tensor([[1.0, 0.0]]), 3)
        (tensor([[1., 1., 0.]]), tensor([[0, 2, 1]]))
    """
    blocks = list(blocks)
    exclude = torch.full((len(queries),), -1) if exclude is None else exclude
    found = [_nearest(blocks, *some, k) for some in zip(queries.split(QUERIES), exclude.split(QUERIES), strict=True)]
    keys = torch.cat(found) if found else torch.empty(0, k, dtype=torch.long)
    return _flip((keys >> 32).int()).view(torch.float32), LAST - (keys & LAST)


def _nearest(blocks: list[Any], queries: Tensor, exclude: Tensor, k: int) -> Tensor:
    best, waiting, start, stop = torch.empty(len(queries), 0, dtype=torch.long), [], 0, 0
    for similarities in chain(_similarities(blocks, queries), [None]):
        if similarities is not None:
            waiting.append(similarities)
            stop += similarities.shape[1]
        if waiting and (similarities is None or stop - start >= ROWS):
            keys = _flip((torch.cat(waiting, 1) + 0.0).view(torch.int32)).long() << 32  # + 0.0: -0.0 is not below 0.0
            keys |= LAST - torch.arange(start, stop)
            excluded_queries = ((exclude >= start) & (exclude < stop)).nonzero()[:, 0]
            keys[excluded_queries, exclude[excluded_queries] - start] = torch.iinfo(torch.long).min
            keys = torch.cat([best, keys], 1)
            best, waiting, start = keys.topk(min(k, keys.shape[1])).values, [], stop
    return best


def _similarities(blocks: list[Any], queries: Tensor) -> Iterator[Tensor]:
    for block in blocks:
        vectors, kept = block if isinstance(block, tuple) else (block, None)
        if kept is not None and len(vectors) > ROWS:
            vectors, kept = vectors[kept], None
        for part in vectors.split(ROWS):
            yield queries @ part.T if kept is None else (queries @ part.T)[:, kept]


def _flip(bits: Tensor) -> Tensor:
    """Integers in the order of the floats whose bits they are; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
