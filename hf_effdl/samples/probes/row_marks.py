"""Row marks: a number of 64 bits for the content of every row, by which a row is known wherever it stands.

Rows of equal content have equal marks, in whatever order, format or file they are; a changed value changes the mark.
Numbers count as numbers (an int32 3 is an int64 3), images and other files by their bytes, in the data set or beside
it; files that are not on this machine, or inside an archive, by their whole path.
"""

import hashlib
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor


BATCH = 4096
_NULL, _EMPTY = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)


def row_marks(data: Dataset, columns: Iterable[str]) -> Tensor:
    """The mark of every row, over some columns and their names, `(N,)` int64.

    Args:
        data: whose rows.
        columns: of the data set, in any order.

    Example:
        >>> data = Dataset.from_dict({"text": ["a", "b", "a"], "note": [1, 2, 3]})
        >>> marks = row_marks(data, ["text"])
        >>> marks[0] == marks[2], marks[0] == marks[1]
        (tensor(True), tensor(False))
    """
    columns = sorted(columns)
    total = np.zeros(len(data), dtype=np.uint64)
    if not columns:
        return torch.from_numpy(total.view(np.int64))
    plain = data.select_columns(columns).with_format("arrow")
    for start in range(0, len(data), BATCH):
        table = plain[start : start + BATCH]
        for name in columns:
            column = table.column(name).combine_chunks()
            parts = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
            values = np.concatenate([_values(part) for part in parts])
            total[start : start + len(values)] += _mixed(values ^ _text(name.encode()))
    return torch.from_numpy(_mixed(total).view(np.int64))


def content_ids(data: Dataset, columns: Iterable[str], others: Iterable[str] = ()) -> Tensor:
    """An id for every row that goes with its content, whatever place it stands at, `(N,)` int64, each another.

    The mark over `columns`. Rows that are alike in them are numbered, in the order of their marks over `others`; which
    of several that are alike in all has which number, makes no difference.

    Args:
        data: whose rows.
        columns: that a row is known by.
        others: that tell rows apart which are alike in `columns`; they change the ids of no other row.

    Example:
        >>> data = Dataset.from_dict({"text": ["a", "b", "a"], "note": [1, 2, 3]})
        >>> turned = data.select([2, 1, 0])
        >>> content_ids(data, ["text"], ["note"]).equal(content_ids(turned, ["text"], ["note"]).flip(0))
        True
    """
    marks = row_marks(data, columns).numpy().view(np.uint64)
    values, counts = np.unique(marks, return_counts=True)
    rows = np.isin(marks, values[counts > 1]).nonzero()[0]
    if len(rows):
        order = np.lexsort((row_marks(data.select(rows), others).numpy(), marks[rows]))
        ordered = marks[rows][order]
        number = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
        later = number > 0
        marks[rows[order[later]]] = _mixed(ordered[later] + number[later].astype(np.uint64) * _EMPTY)
    return torch.from_numpy(marks.view(np.int64))


def _mixed(x: np.ndarray) -> np.ndarray:
    # the finaliser of splitmix64, see drawing/hashing.py
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _text(content: bytes) -> np.uint64:
    return _number(_hash(content))


_hash = partial(hashlib.blake2b, digest_size=8)


def _number(found: Any) -> np.uint64:
    return np.uint64(int.from_bytes(found.digest(), "little"))


def _values(array: pa.Array) -> np.ndarray:
    """A number of 64 bits for each value of an Arrow array."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is(array, "list", "large_list", "fixed_size_list"):
        marks = _lists(array)
    elif _is(array, "struct"):
        marks = _structs(array)
    elif _is(array, "boolean", "integer", "floating"):
        marks = _numbers(array)
    else:
        marks = np.fromiter((_text(_bytes(value)) for value in array.to_pylist()), np.uint64, len(array))
    if array.null_count:
        marks = np.where(array.is_null().to_numpy(zero_copy_only=False), _NULL, marks)
    return marks


def _is(array: pa.Array, *kinds: str) -> bool:
    return any(getattr(pa.types, f"is_{kind}")(array.type) for kind in kinds)


def _bytes(value: Any) -> bytes:
    """Of texts and binary values; of dates, decimals and the like what they print as."""
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else repr(value)).encode(errors="surrogatepass")


def _numbers(array: pa.Array) -> np.ndarray:
    """The bits of the numbers, the same for every width."""
    if array.null_count:
        array = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        values = values.astype(np.float64) + 0.0  # -0 is 0
        values[np.isnan(values)] = np.nan
        bits = values.view(np.uint64)
    else:
        bits = values.astype(np.uint64 if values.dtype.kind == "u" else np.int64).view(np.uint64)
    return bits ^ (bits >> np.uint64(32))  # the low bits of short floats are all zero


def _lists(array: pa.Array) -> np.ndarray:
    """Of every list its values, each times an odd number for its place, and the length."""
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(len(array), array.type.list_size, dtype=np.int64)
        inside = array.values.slice(array.offset * array.type.list_size, len(array) * array.type.list_size)
    else:
        offsets = array.offsets.to_numpy().astype(np.int64)
        lengths, inside = np.diff(offsets), array.values.slice(offsets[0], offsets[-1] - offsets[0])
    values = _values(inside)
    starts = np.cumsum(lengths) - lengths
    if len(lengths) and (lengths == lengths[0]).all():
        sums = (values.reshape(len(lengths), lengths[0]) * _odd(lengths[0])).sum(1, dtype=np.uint64)
    else:
        places = np.arange(len(values)) - np.repeat(starts, lengths)
        running = np.concatenate([[np.uint64(0)], np.cumsum(values * _odd(lengths.max(initial=0))[places])])
        sums = running[starts + lengths] - running[starts]  # all modulo 2^64
    return _mixed(sums.astype(np.uint64) + lengths.astype(np.uint64) * _EMPTY + _EMPTY)


def _odd(count: int) -> np.ndarray:
    """Random odd numbers, one for each place in a list."""
    return _mixed((np.arange(count, dtype=np.uint64) + np.uint64(1)) * _NULL) | np.uint64(1)


def _structs(array: pa.Array) -> np.ndarray:
    names = [field.name for field in array.type]
    if set(names) == {"bytes", "path"}:
        pairs = zip(array.field("bytes").to_pylist(), array.field("path").to_pylist(), strict=True)
        return np.fromiter((_file(*pair) for pair in pairs), np.uint64, len(array))
    total = np.zeros(len(array), dtype=np.uint64)
    for name in names:
        total += _mixed(_values(array.field(name)) ^ _text(name.encode()))
    return _mixed(total)


def _file(content: bytes | None, path: str | None) -> np.uint64:
    """Of a file's bytes, wherever they are; of its path where they are not at hand."""
    if content is None and path and os.path.isfile(path):
        with open(path, "rb") as file:
            return _number(hashlib.file_digest(file, _hash))  # in pieces
    if content is None:
        return _NULL if path is None else _text(_bytes(path))
    return _text(content)
