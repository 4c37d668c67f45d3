"""Random numbers that belong to a row: a hash of (seed, row id).

So a draw does not depend on the order of the rows, on how they are split over files or processes, or on how many of
them there are.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def hashed_uniform(seed: int, row_ids: Tensor | Sequence[int | str], salt: int = 0) -> Tensor:
    """A uniform number in (0, 1) for each row, a pure function of (seed, row id), float64.

    Two rounds of the splitmix64 finaliser over the id mixed with the seed; text ids are hashed to 64 bits (blake2b)
    first. `salt` gives an independent number for another use.

    Example:
        >>> hashed_uniform(0, [3, 1, 2])[1] == hashed_uniform(0, [1])[0]
        tensor(True)
    """
    ids = _int64(row_ids)
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


def _int64(row_ids: Tensor | Sequence[int | str]) -> Tensor:
    if len(row_ids) and isinstance(row_ids[0], str):
        digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in row_ids)
        return torch.frombuffer(bytearray(digests), dtype=torch.int64)
    ids = torch.as_tensor(row_ids)
    if ids.is_floating_point() or ids.ndim != 1:
        raise TypeError(f"row_ids are {ids.dtype} of shape {tuple(ids.shape)}; pass one integer or text a row")
    return ids.long()


def integer_ids(row_ids: Tensor | Sequence[int | str] | None, rows: int) -> Tensor:
    """The rows' ids as the hash takes them, `(rows,)` int64; their positions where they have none."""
    if row_ids is None:
        return torch.arange(rows)
    if len(row_ids) != rows:
        raise ValueError(f"{len(row_ids)} row_ids for {rows} rows; pass one a row")
    return _int64(row_ids)
