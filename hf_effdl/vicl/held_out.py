"""Images of a pool that nothing learns from: drawn once, without near duplicates in the rest, kept in a file."""

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_effdl.checks import path, real_number, tensor, whole_number
from hf_effdl.files import digest, parsed, write_whole


FORMAT = 1
PARTS = ("queries", "pool", "dropped")
# similarities held at once: ROWS x OTHERS
ROWS, OTHERS = 2**13, 2**10
# a copy's cosine with the original, in float32
ROUNDING = 1e-6


def near_duplicates(vectors: Tensor, of: Tensor | Sequence[int], threshold: float = 0.98) -> Tensor:
    """Rows whose vector is almost that of one of some others: copies, crops, the next photo of a series.

    Row i is one if max_j cos(vectors_i, of_j) >= threshold. From how high a cosine images are copies depends on the
    encoder: look at the most similar pairs as pictures.

    Args:
        vectors: `(n, d)`, of any norm.
        of: rows of `vectors`, which are not found themselves; or `(m, d)` vectors of other images.
        threshold: in (0, 1].

    Returns:
        Rows in ascending order, int64.

    Raises:
        ValueError: for shapes that do not match, rows that do not exist, values that are not finite, and a threshold
            out of range.

    Example:
        >>> near_duplicates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.0, 3.0]]), of=[0])
        tensor([2])

    Source: held-out queries whose copies are in the pool are no test of what was learnt on it.
    """
    tensor("vectors", vectors)
    if vectors.dim() != 2 or not vectors.is_floating_point():
        raise ValueError(f"vectors is {vectors.dtype} of shape {tuple(vectors.shape)}: pass (n, d) floating point")
    _check_threshold(threshold)
    try:
        of = torch.as_tensor(of, device=vectors.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"of={of!r}: pass rows of `vectors`, as whole numbers, or vectors; {error}") from error
    rows = _rows_in(of, vectors)
    duplicate = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    for marks, block in zip(duplicate.split(ROWS), vectors.split(ROWS)):
        block = _unit(block, "vectors")
        for part in (of if rows is None else rows).split(OTHERS) if len(of) else ():
            part = _unit(part if rows is None else vectors[part], "of")
            marks |= (block @ part.T).amax(1) >= threshold - ROUNDING
    if rows is not None:
        duplicate[rows] = False
    return duplicate.nonzero()[:, 0]


def _check_threshold(threshold: float) -> None:
    if not 0 < real_number("threshold", threshold) <= 1:
        raise ValueError(f"threshold={threshold}: it is a cosine, in (0, 1]")


def _rows_in(of: Tensor, vectors: Tensor) -> Tensor | None:
    """Rows of `vectors` that `of` names; None where it holds vectors itself."""
    names_rows = not of.is_floating_point() and of.dtype != torch.bool
    if of.dim() == 1 and (names_rows or not len(of)):
        if len(of) and not 0 <= int(of.min()) <= int(of.max()) < len(vectors):
            raise ValueError(f"of holds rows {int(of.min())} to {int(of.max())}: there are {len(vectors)} vectors")
        return of.long()
    if of.dim() != 2 or not of.is_floating_point() or of.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"of is {of.dtype} of shape {tuple(of.shape)}: pass rows of `vectors`, as whole numbers, or "
            f"vectors (m, {vectors.shape[1]})"
        )
    return None


def _unit(vectors: Tensor, name: str) -> Tensor:
    if not vectors.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values: encode the images in float32 or bfloat16")
    return F.normalize(vectors.float(), dim=1)


@dataclass(frozen=True)
class Split:
    """Ids of held-out queries, of the pool that may be learnt from, and of near duplicates that are in neither.

    Args:
        queries: one or more, in any order, which is kept.
        pool: one or more; kept in alphabetical order.
        dropped: near duplicates of the queries; kept in alphabetical order.

    Raises:
        ValueError: for an id that occurs twice, and for no queries or pool.
        TypeError: for ids that are not texts.

    Example:
        >>> Split(queries=["a"], pool=["b", "c"])
        Split(queries=('a',), pool=('b', 'c'), dropped=())
    """

    queries: tuple[str, ...]
    pool: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for part in PARTS:
            ids = tuple(getattr(self, part))
            if not ids and part != "dropped":
                raise ValueError(f"{part} is empty: a split needs queries and a pool")
            for id in ids:
                if not isinstance(id, str):
                    raise TypeError(f"{part} holds {id!r}, a {type(id).__name__}: ids are texts, as in `pool.ids`")
                if id in seen:
                    both = f"twice in {part}" if seen[id] == part else f"in {seen[id]} and in {part}"
                    raise ValueError(f"id {id!r} is {both}: an image may have one place only")
                seen[id] = part
            object.__setattr__(self, part, ids if part == "queries" else tuple(sorted(ids)))


def split_pool(
    ids: Sequence[str],
    queries: int | Iterable[str] = 100,
    seed: int = 0,
    vectors: Tensor | None = None,
    threshold: float = 0.98,
) -> Split:
    """Hold images of a pool out, and drop their near duplicates from the rest.

    Args:
        ids: of all images, `pool.ids`.
        queries: how many to draw, or the ids of those to hold out.
        seed: of the draw.
        vectors: `(n, d)` of all images, `pool.vectors`; None: near duplicates are not looked for.
        threshold: see `near_duplicates`.

    Returns:
        A `Split`; its queries in the order of the draw, or as given.

    Raises:
        ValueError: for ids that occur twice, queries that are not among them or leave no pool, and vectors of another
            number.

    Example:
        >>> split_pool(["a", "b", "c", "d"], queries=["b"], vectors=torch.eye(4)[[0, 1, 1, 2]])
        Split(queries=('b',), pool=('a', 'd'), dropped=('c',))
    """
    _check_threshold(threshold)
    ids = _listed("ids", ids)
    if len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} of the ids occur twice: name every image once")
    rows = _query_rows(ids, queries, seed)
    dropped: set[int] = set()
    if vectors is not None:
        if len(tensor("vectors", vectors)) != len(ids):
            raise ValueError(f"{len(vectors)} vectors for {len(ids)} ids: pass one row for each")
        dropped = set(near_duplicates(vectors, rows, threshold).tolist())
    taken = dropped.union(rows)
    rest = [id for row, id in enumerate(ids) if row not in taken]
    if not rest:
        raise ValueError(
            f"{len(rows)} queries and {len(dropped)} near duplicates are all of the {len(ids)} images: "
            "pass fewer queries or a higher threshold"
        )
    return Split([ids[row] for row in rows], rest, [ids[row] for row in dropped])


def _query_rows(ids: Sequence[str], queries: int | Iterable[str], seed: int) -> list[int]:
    """Places of the queries among ids: drawn, or named."""
    if isinstance(queries, Integral) and not isinstance(queries, bool):
        if not 0 < queries < len(ids):
            raise ValueError(f"queries={queries} of {len(ids)} images: pass at least 1, and fewer than there are")
        return torch.randperm(len(ids), generator=torch.Generator().manual_seed(whole_number("seed", seed, -(2**63))))[
            :queries
        ].tolist()
    places = {id: row for row, id in enumerate(ids)}
    queries = [queries] if isinstance(queries, str) else _listed("queries", queries)
    if unknown := [id for id in queries if id not in places]:
        raise ValueError(
            f"queries holds {unknown[0]!r}, which is not in ids ({len(unknown)} such): pass some of these"
        )
    return [places[id] for id in queries]


def _listed(name: str, values: Any) -> list[str]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r}: pass a list of ids")
    values = list(values)
    if wrong := [value for value in values if not isinstance(value, Hashable)]:
        raise TypeError(f"{name} holds {wrong[0]!r}: ids are texts")
    return values


def write_splits(file: str | os.PathLike[str], splits: Mapping[str, Split]) -> None:
    """Write splits under their names into one JSON file, atomically.

    Ids stand in it once; of every split the places of its queries, its near duplicates, and of ids of the file that
    are in none of its parts. A SHA-256 of all of it says when the file was edited.

    Args:
        file: is replaced.
        splits: such as the folds of a cross-validation; one or more.

    Raises:
        ValueError: for no splits.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_splits(f"{folder}/splits.json", {"seed 0": Split(["b"], ["a", "d"], ["c"])})
        ...     read_splits(f"{folder}/splits.json")
        {'seed 0': Split(queries=('b',), pool=('a', 'd'), dropped=('c',))}
    """
    path("file", file)
    if not isinstance(splits, Mapping) or not all(isinstance(split, Split) for split in splits.values()):
        raise TypeError(f"splits is a {type(splits).__name__}: pass {{name: Split, ...}}")
    if not splits:
        raise ValueError("splits is empty: pass {name: Split, ...}")
    ids = sorted({id for split in splits.values() for part in PARTS for id in getattr(split, part)})
    places = {id: place for place, id in enumerate(ids)}
    table: dict[str, Any] = {}
    for name, split in splits.items():
        part_places = {part: [places[id] for id in getattr(split, part)] for part in PARTS}
        absent = set(places.values()).difference(*part_places.values())
        table[name] = {"queries": part_places["queries"], "dropped": part_places["dropped"], "absent": sorted(absent)}
    content = {"format": FORMAT, "ids": ids, "splits": table}
    content["sha256"] = _digest(content)
    # a split a line: short, and a change can be seen
    lines = ",\n".join(f"{json.dumps(name)}: {_compact(split)}" for name, split in table.items())
    head = f'{{"format": {FORMAT}, "sha256": "{content["sha256"]}",\n"ids": {_compact(ids)},\n'
    text = f'{head}"splits": {{\n{lines}\n}}}}\n'
    write_whole(file, text)


def read_splits(file: str | os.PathLike[str]) -> dict[str, Split]:
    """The splits in a file of `write_splits`, by name.

    Raises:
        ValueError: for a file that is not one of these, was changed since, or is of a later format.
    """
    try:
        content = parsed(path("file", file).read_text(encoding="utf-8"))
        version, stored, ids, table = (content[key] for key in ("format", "sha256", "ids", "splits"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a file of splits ({type(error).__name__}: {error}); write one with write_splits"
        ) from error
    if version != FORMAT:
        raise ValueError(f"{file} has format {version} and this version of hf_effdl reads {FORMAT}: upgrade hf_effdl")
    if _digest({"format": version, "ids": ids, "splits": table}) != stored:
        raise ValueError(f"{file} was changed after it was written: its SHA-256 is another; write it again")
    try:
        return {name: _split_of(ids, places) for name, places in table.items()}
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # its digest was made anew
        raise ValueError(f"{file} holds no splits ({type(error).__name__}: {error}); write it again") from error


def _split_of(ids: Sequence[str], places: Mapping[str, Sequence[int]]) -> Split:
    elsewhere = {place for part in places.values() for place in part}
    if not all(type(place) is int and 0 <= place < len(ids) for place in elsewhere):
        raise ValueError(f"a place is none of its {len(ids)} ids")
    rest = [id for place, id in enumerate(ids) if place not in elsewhere]
    return Split([ids[i] for i in places["queries"]], rest, [ids[i] for i in places["dropped"]])


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _digest(content: Any) -> str:
    return digest(json.dumps(content, sort_keys=True))
