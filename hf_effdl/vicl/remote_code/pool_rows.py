"""Which rows of a pool are meant: by ids, by what they belong to, by what they show."""

import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pool_reader import PoolReader


# a column of the pool, and the argument of `ExamplePool.from_dataset` that it comes from
COLUMNS = {"group": "group_column", "class": "class_column"}


def rows_of_ids(pool: PoolReader, ids: Any, name: str) -> Tensor:
    """Rows that ids name, in their order. Numbers are ids as well: that of a row is another thing.

    Args:
        pool: that has them.
        ids: texts or whole numbers.
        name: of the argument, for errors.

    Raises:
        ValueError: for ids that the pool does not have.
        TypeError: for what are no ids.
    """
    rows = []
    for id in _listed(ids, name, "ids"):
        if isinstance(id, bool) or not isinstance(id, Integral | str):
            raise TypeError(
                f"{name} holds {id!r}: pass ids, texts or whole numbers; rows go into an argument that is called rows"
            )
        try:
            rows.append(pool.position(id if isinstance(id, str) else int(id)))
        except KeyError as error:
            raise ValueError(
                f"{name}: {error.args[0]}; numbers are ids, too: rows go into an argument that is called rows"
            ) from None
    return torch.tensor(rows, dtype=torch.long)


def rows_checked(pool: PoolReader, rows: Any, name: str) -> Tensor:
    """Rows, in their order, after a look at whether the pool has them.

    Raises:
        ValueError: for rows that the pool does not have.
        TypeError: for what are no whole numbers.
    """
    values = []
    for row in _listed(rows, name, "rows"):
        if isinstance(row, bool) or not isinstance(row, Integral):
            raise TypeError(f"{name} holds {row!r}: pass rows (numbers); mask.nonzero()[:, 0] are the rows of a mask")
        if not 0 <= row < len(pool):
            raise ValueError(f"{name} holds row {row}: the pool has rows 0 to {len(pool) - 1}")
        values.append(int(row))
    return torch.tensor(values, dtype=torch.long)


def as_list(values: Any) -> list[Any]:
    """Several ids or names as they are, and one alone as a list."""
    values = values.tolist() if hasattr(values, "tolist") else values  # also NumPy's numbers and texts
    alone = isinstance(values, str | bytes) or not isinstance(values, Iterable)
    return [values] if alone else list(values)


def _listed(values: Any, name: str, what: str) -> Iterable[Any]:
    several = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(several, str | bytes) or not isinstance(several, Iterable):
        raise TypeError(f"{name}={values!r}: pass a list of {what}")
    return several


def column_of(pool: PoolReader, name: str, why: str) -> np.ndarray:
    """The groups or classes of a pool.

    Raises:
        ValueError: where it keeps none.
    """
    values = pool.groups if name == "group" else pool.classes
    if values is None:
        raise ValueError(
            f"{why}, but this pool keeps no {name} of its rows: make it with "
            f"ExamplePool.from_dataset(..., {COLUMNS[name]}=...)"
        )
    return np.array(values, dtype=object)


def groups_of(pool: PoolReader, groups: Sequence[Any] | None) -> list[str | None] | None:
    """What each row belongs to, as texts: `groups`, or what the pool keeps; None where nothing is known.

    Raises:
        ValueError: for another number of groups than rows.
    """
    return pool.groups if groups is None else _one_each(pool, groups, "group")


def classes_of(pool: PoolReader, classes: Sequence[Any] | None) -> list[str | None] | None:
    """The same for what each row shows."""
    classes = pool.classes if classes is None else _one_each(pool, classes, "class")
    return None if classes is None or set(classes) == {None} else classes


def name_of(value: Any, argument: str) -> str | None:
    """What a row belongs to or shows, as the text that a pool keeps of it; None for nothing, as for a table's NaN.

    A number that came as a float or a tensor would be another text, and so another group, than the same whole number.

    Args:
        value: a text, or a whole number of Python, NumPy or torch.
        argument: that holds it, for errors.

    Raises:
        TypeError: for anything else.
    """
    one = value.item() if getattr(value, "shape", None) == () else value
    if one is None or (isinstance(one, float) and one != one):
        return None
    if not isinstance(one, str | Integral):
        raise TypeError(f"{argument} holds {value!r}: pass texts, whole numbers or None")
    return str(one)


def _one_each(pool: PoolReader, values: Sequence[Any], name: str) -> list[str | None]:
    several = "classes" if name == "class" else f"{name}s"
    if isinstance(values, str):
        raise TypeError(f"{several}={values!r}: pass one for each row; a pool keeps a column by {name}_column=")
    if len(values := list(values)) != len(pool):
        raise ValueError(
            f"{len(values)} {several} for a pool of {len(pool)}: pass one for each row, None for no {name}"
        )
    return [name_of(one, several) for one in values]


def group_numbers(groups: Sequence[str | None] | None, count: int) -> Tensor:
    """`(count,)` one number for all rows of a group; a row of no group has one of its own."""
    numbers: dict[Any, int] = {}
    named = [(row,) if one is None else one for row, one in enumerate(groups or [None] * count)]
    return torch.tensor([numbers.setdefault(one, len(numbers)) for one in named])


def _known(kept: np.ndarray) -> str:
    """Some groups or classes of a pool, for errors."""
    return ", ".join(sorted({str(one) for one in kept if one is not None})[:20])


def of_other_groups(pool: PoolReader, groups: Sequence[Any], why: str = "groups= is given") -> Tensor:
    """`(B, n)` bool: rows that do not belong to the same group as each query; a query of None belongs to none.

    Warns where no query belongs to any group that the pool has, as where they are written in another way.
    """
    kept, names = column_of(pool, "group", why), [name_of(one, "groups") for one in groups]
    asked = {name for name in names if name is not None}
    if asked and asked.isdisjoint(kept):
        warnings.warn(
            f"none of groups= is a group of the pool, which has {_known(kept)}: they rule nothing out, which is right "
            "for new ones; else write them as there",
            stacklevel=2,
        )
    return torch.from_numpy(np.stack([np.ones(len(kept), bool) if name is None else kept != name for name in names]))


def fellows(rows: Tensor, groups: Sequence[Any] | None, classes: Sequence[Any] | None) -> Tensor | None:
    """`(B, n)` bool: of pool rows, those that are of another group and the same class; None: no column is known.

    Args:
        rows: `(B,)`.
        groups, classes: one for each row of the pool; None for a row of none, and for no column.
    """
    allowed = None
    for kept, same in ((groups, False), (classes, True)):
        if kept is not None:
            column = np.array(kept, dtype=object)
            mine = [((column == one) == same) | (one is None) for one in column[rows.numpy()]]
            mine = torch.from_numpy(np.stack(mine).astype(bool))
            allowed = mine if allowed is None else allowed & mine
    return allowed


def of_classes(pool: PoolReader, classes: Sequence[Any]) -> Tensor:
    """`(count, n)` bool: rows of the class that each query asks for, all where it asks for none."""
    kept = column_of(pool, "class", "classes= is given")
    allowed = torch.ones(len(classes), len(kept), dtype=torch.bool)
    for i, one in enumerate(classes):
        if (name := name_of(one, "classes")) is None:
            continue
        allowed[i] = torch.from_numpy((kept == name).astype(bool))
        if not allowed[i].any():
            raise ValueError(
                f"image {i} of the batch may be shown no example of the pool: classes= names {name!r}, and the "
                f"pool's classes are {_known(kept)}"
            )
    return allowed


def allowed_rows(
    pool: PoolReader,
    count: int,
    where: dict[str, Any] | None = None,
    exclude: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
    classes: Sequence[Any] | None = None,
) -> Tensor:
    """`(count, n)` bool: rows that each query may be shown; see `VisualInContextPipeline` for the arguments.

    Raises:
        ValueError: for ids that the pool does not have, columns that it does not keep, and a query that nothing is
            left for.
    """
    allowed = torch.ones(count, len(pool), dtype=torch.bool)
    for i, ids in enumerate(exclude or ()):
        if ids is not None:
            allowed[i, rows_of_ids(pool, as_list(ids), "exclude")] = False
    if groups is not None:
        allowed &= of_other_groups(pool, groups)
    if classes is not None:
        allowed &= of_classes(pool, classes)
    if where is not None and not (isinstance(where, dict) and where.keys() <= COLUMNS.keys()):
        raise ValueError(
            f"candidates_where={where!r}: pass a dict of {' or '.join(map(repr, COLUMNS))} and what it is to be"
        )
    for name, wanted in (where or {}).items():
        kept = column_of(pool, name, "candidates_where= is given")
        names = {name_of(one, f"candidates_where[{name!r}]") for one in as_list(wanted)} - {None}
        if missing := sorted(names - set(kept)):
            raise ValueError(
                f"candidates_where={where!r}: the pool has no example of {missing[0]!r}; its {name} is one of "
                f"{_known(kept)}"
            )
        allowed &= torch.from_numpy(np.isin(kept.astype(str), list(names)) & (kept != None))  # noqa: E711
    if len(nothing := (~allowed.any(1)).nonzero()[:, 0]):
        raise ValueError(
            f"image {int(nothing[0])} of the batch may be shown no example of the pool: exclude=, groups=, classes= "
            "and candidates_where= leave none"
        )
    return allowed
