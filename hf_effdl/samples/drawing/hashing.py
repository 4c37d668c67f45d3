"""Random numbers that belong to a row: a hash of (seed, row id).

So a draw does not depend on the order of the rows, on how they are split over files or processes, or on how many of
them there are.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_effdl.samples.drawing.checks import check_seed


def hashed_uniform(seed: int, row_ids: Tensor | Sequence[int | str], salt: int = 0) -> Tensor:
    """A uniform number in (0, 1) for each row, a pure function of (seed, row id), float64.

    Two rounds of the splitmix64 finaliser over the id mixed with the seed; text ids are hashed to 64 bits (blake2b)
    first. `salt` gives an independent number for another use.

    Example:
        >>> hashed_uniform(0, [3, 1, 2])[1] == hashed_uniform(0, [1])[0]
        tensor(True)
    """
    ids = hash_ids(row_ids)
    key = _splitmix64(torch.tensor([_signed(check_seed(seed) * 2 + 1), _signed(int(salt) + 0x9E3779B97F4A7C15)]))
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


def hash_ids(row_ids: Tensor | Sequence[int | str]) -> Tensor:
    """Ids as int64: integers as they are, texts hashed."""
    if hasattr(row_ids, "__array__") and not isinstance(row_ids, Tensor):
        row_ids = _column(row_ids)
    if len(row_ids) and isinstance(row_ids[0], str):
        return _hash_texts(row_ids)
    _refuse_truth_values(row_ids)
    try:
        ids = torch.as_tensor(row_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"row_ids are no integers or texts ({error}); pass one a row, of 64 bits at most") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 1:
        raise TypeError(f"row_ids are {ids.dtype} of shape {tuple(ids.shape)}; pass one integer or text a row")
    return ids.detach().cpu().long()


def _column(row_ids: Any) -> np.ndarray | list:
    """What NumPy makes of a column: in its order whatever its index is; whole numbers as int64, of the same bits."""
    column = np.require(row_ids, requirements=["C", "W"])
    if column.dtype == object and column.ndim == 1:
        return column.tolist()
    return column.view("int64") if column.dtype == "uint64" else column


def _refuse_truth_values(row_ids: Tensor | Sequence[int | str]) -> None:
    """Raise a `TypeError` for one among the integers of a list, which would be taken for 0 or 1."""
    if hasattr(row_ids, "dtype"):
        return
    for place, value in enumerate(row_ids):
        if isinstance(value, bool | np.bool_):
            raise TypeError(f"row_ids hold {value!r} at row {place}; pass one integer or text a row")


def _hash_texts(names: Sequence[str]) -> Tensor:
    if any(not isinstance(name, str) for name in names):
        other = next(name for name in names if not isinstance(name, str))
        raise TypeError(f"row_ids are texts but for {other!r}; pass one integer or text a row, all alike")
    # surrogates: texts that were read from broken files have some
    digests = (hashlib.blake2b(str(name).encode(errors="surrogatepass"), digest_size=8).digest() for name in names)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


def ranked(scores: Tensor, seed: int, row_ids: Tensor | Sequence[int | str] | None) -> Tensor:
    """Positions, the largest score first; equal scores by the hash of their ids, or as they come where rows have none.

    Example:
        >>> ranked(torch.tensor([1.0, 2.0, 2.0]), 0, None)
        tensor([1, 2, 0])
    """
    if row_ids is None:
        return scores.sort(descending=True, stable=True).indices
    turns = hashed_uniform(seed, integer_ids(row_ids, len(scores)), salt=2).argsort(stable=True)
    return turns[scores[turns].sort(descending=True, stable=True).indices]


def check_once(ids: Tensor, where: str = "row_ids") -> Tensor:
    """The ids themselves; raises a `ValueError` if one occurs twice.

    Rows of one id have one random number, so they come or stay away together: none has its probability then.
    """
    if len(ids) < 2 or (ids[1:] > ids[:-1]).all():
        return ids
    ordered = ids.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        first = (ids == twice[0]).nonzero().flatten()[:2].tolist()
        raise ValueError(
            f"{where}: rows {first[0]} and {first[1]} share their id, and {len(twice)} ids repeat; give each row an "
            "id of its own, or its chance to be drawn is not what it should be"
        )
    return ids


def integer_ids(row_ids: Tensor | Sequence[int | str] | None, rows: int) -> Tensor:
    """The rows' ids as the hash takes them, `(rows,)` int64, each another; their positions where they have none."""
    if row_ids is None:
        return torch.arange(rows)
    if not hasattr(row_ids, "__len__"):
        raise TypeError(f"row_ids is a {type(row_ids).__name__}; pass a tensor, an array or a list")
    if len(row_ids) != rows:
        raise ValueError(f"{len(row_ids)} row_ids for {rows} rows; pass one a row")
    return check_once(hash_ids(row_ids))
