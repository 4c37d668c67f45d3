"""What every draw asks of its scores, its budget and its table."""

import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from hf_effdl.checks import instance
from hf_effdl.samples.scores.numbers import as_numbers


def check_scores(scores: Tensor, signed: bool = False) -> Tensor:
    """Scores as a one-dimensional float tensor on the CPU; raises for NaN, infinite or (if not signed) negative."""
    scores = as_numbers(scores)
    scores = scores if scores.is_floating_point() else scores.double()
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; pass one number a row, for one row or more")
    bad = ~scores.isfinite() if signed else ~(scores.isfinite() & (scores >= 0))
    if bad.any():
        rows = bad.nonzero().flatten()
        kinds = "NaN or infinite" if signed else "NaN, infinite or negative"
        raise ValueError(
            f"{len(rows)} scores are {kinds}, the first is {scores[rows[0]].item()} at row {rows[0]}; leave those out"
        )
    return scores


def plain_number(value: Any) -> Any:
    """A NumPy number, or a tensor that holds a single one, as Python's own; anything else as it is."""
    single = isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0
    return value.item() if single else value


def check_budget(budget: float, rows: int) -> float:
    """A budget as a float in (0, rows]."""
    number = plain_number(budget)
    if isinstance(number, bool) or not isinstance(number, Real) or not 0 < number <= rows:
        raise ValueError(f"budget={budget!r}: it must be a number above 0 and at most the {rows} rows there are")
    return float(number)


def check_rows(budget: int, rows: int | None = None) -> int:
    """A budget as a number of rows, from 1 to `rows`."""
    number = plain_number(budget)
    # the remainder of infinity and NaN is NaN
    whole = isinstance(number, Real) and not isinstance(number, bool) and number % 1 == 0
    if not whole or number < 1 or (rows is not None and number > rows):
        there = "" if rows is None else f" up to the {rows} there are"
        raise ValueError(f"budget={budget!r}: it must be a whole number of rows from 1{there}")
    return int(number)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a `ValueError` for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: it must be one of {tuple(choices)}")


def check_seed(seed: Any) -> int:
    """A seed as an int; raises a `TypeError` for what is no whole number, rather than round it."""
    try:
        if isinstance(seed, bool):
            raise TypeError("a truth value")
        return operator.index(seed)
    except TypeError as error:
        raise TypeError(f"seed={seed!r}: it must be a whole number") from error


ROUNDED_ONE = 1.01  # in half precision


def read_column(table: Mapping[str, Tensor], name: str) -> Tensor:
    """A column of a score table, `(N,)`; raises a `ValueError` where there is none, or NaN in it."""
    if name not in table:
        raise ValueError(
            f"the score table has no column {name!r}, only {sorted(table)}; score the rows first, or "
            "choose another score=, quotas= or weights="
        )
    column = as_numbers(table[name], f"the values of column {name!r}")
    if column.ndim != 1:
        raise ValueError(f"column {name!r} has shape {tuple(column.shape)}; pass one number a row")
    if not column.isfinite().all():
        bad = (~column.isfinite()).nonzero().flatten()
        raise ValueError(
            f"column {name!r} has {len(bad)} NaN or infinite values, the first at row {bad[0]}; score "
            "these rows again, or leave them out"
        )
    return column


def read_probabilities(table: Mapping[str, Tensor], name: str) -> Tensor:
    """`read_column` of one that holds probabilities; raises a `ValueError` for other numbers."""
    column = read_column(table, name)
    outside = ((column < 0) | (column > ROUNDED_ONE)).nonzero().flatten()
    if len(outside):
        raise ValueError(
            f"column {name!r} holds {column[outside[0]].item()} at row {outside[0]}, which is no probability "
            f"({len(outside)} rows are outside [0, 1]); score these rows again"
        )
    return column


def row_count(table: Mapping[str, Tensor]) -> int:
    """Rows of a score table; raises a `ValueError` for columns of several lengths."""
    instance("table", table, Mapping, "the score columns, {name: tensor of one number a row}")
    lengths = {name: len(as_rows(column, name)) for name, column in table.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the score table has columns of {lengths} rows; pass columns of one length")
    return next(iter(lengths.values()))


def as_rows(column: Any, name: str) -> Any:
    """A column, if it has rows."""
    try:
        len(column)
    except TypeError as error:
        raise ValueError(f"column {name!r} is {type(column).__name__} without rows; pass one number a row") from error
    return column
