"""`SelectedRows`: which rows of a data set were chosen, and the scores behind the choice."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.files import digest
from hf_effdl.samples.drawing.plan import Plan
from hf_effdl.samples.probes.inputs import NOT_INPUTS, check_dataset, label_names, label_values
from hf_effdl.samples.probes.row_marks import row_marks
from hf_effdl.samples.probes.scoring import SCORES


@dataclass
class SelectedRows:
    """A plan for one data set, with the scores it was made from: what reports, pictures and files are made of.

    Attributes:
        plan: positions, probabilities and weights of the chosen rows.
        table: the score columns of the whole pool, `(N,)` each.
        names: class names, if known.
        row_ids: `(N,)` values of the id column; None if rows are known by their places.
        info: everything needed to redo it: source, probes, settings, noise; plain values.
        pool: the scored data set, where it is at hand; only pictures of examples need it.
        marks: `(N,)` the `row_marks` of the pool over `info["marked_columns"]`, of a selection that was loaded.
        drawn_by: `(N,)` the ids that rows were drawn by, where they have no `row_ids`; None: their places.
    """

    plan: Plan
    table: Mapping[str, Tensor]
    names: Sequence[str] | None = None
    row_ids: list[int] | list[str] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    pool: Dataset | None = None
    marks: Tensor | None = None
    drawn_by: Tensor | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def apply(self, data: Dataset) -> Dataset:
        """The chosen rows of the data set, with the columns `weight` and `inclusion_probability`.

        Rows are found by the id column, else by their places, where their content must be what it was. Keeps the data
        set's format; a transform sees the new columns and has to pass `weight` on.

        Raises:
            ValueError: if this is not the data set that was selected from.
        """
        check_dataset(data)
        return self.taken_from(data, self.positions_in(data, self.plan.positions))

    def taken_from(self, data: Dataset, positions: Tensor) -> Dataset:
        """`apply` where it is known at which positions of the data set the chosen rows stand."""
        check_no_weights(data)
        columns = {"weight": self.plan.weights, "inclusion_probability": self.plan.probabilities}
        for name, values in columns.items():
            # put beside all rows and then selected, no row is copied
            column = torch.full((len(data),), float("nan"), dtype=torch.float64)
            column[positions] = values
            data = data.add_column(name, column.numpy())
        return data.select(positions.tolist())

    def positions_in(self, data: Dataset, rows: Tensor) -> Tensor:
        """Where rows of the pool stand in a data set: found by the id column, else by their places.

        Raises:
            ValueError: if this is not the data set that was selected from.
        """
        check_dataset(data)
        self._check_names(data)
        if self.info.get("id_column") is not None:
            return self._found_by_id(data, rows)
        if (marked := self.row_marks()) is not None:
            return self._found_by_content(data, rows, *marked)
        if "source" in self.info:
            warnings.warn(
                "the selection has no marks of its rows' content, as earlier versions wrote none, so they are taken "
                "by their places; whether the data set's rows stand where they stood cannot be seen",
                stacklevel=3,
            )
        return self._found_by_place(data, rows)

    def _check_names(self, data: Dataset) -> None:
        names = label_names(data, self.info.get("label_column"))
        if names and self.names and list(names) != list(self.names) and sorted(names) == sorted(self.names):
            raise ValueError(
                f"the classes of column {self.info['label_column']!r} are in another order, {names[:4]} ..., than "
                f"those that the selection was made from, {list(self.names)[:4]} ..., so its labels mean others; "
                "align_labels_with_mapping them"
            )

    def row_marks(self) -> tuple[Tensor, list[str]] | None:
        """The marks of all rows of the pool and the columns that they are made of; None where they are not known."""
        if self.marks is not None:
            return self.marks, self.info["marked_columns"]
        if self.pool is None:
            return None
        aside = {*SCORES, *NOT_INPUTS, self.info.get("label_column"), *self.table}
        columns = [name for name in self.pool.column_names if name not in aside]
        self.marks, self.info = row_marks(self.pool, columns), self.info | {"marked_columns": columns}
        return self.marks, columns

    def _found_by_content(self, data: Dataset, rows: Tensor, marks: Tensor, columns: list[str]) -> Tensor:
        if not columns:  # nothing but labels
            return self._found_by_place(data, rows)
        if missing := [name for name in columns if name not in data.column_names]:
            raise ValueError(
                f"the data set lacks the columns {missing} that the selection's rows are known by; keep them, or "
                "rename them back, or select with id_column="
            )
        if len(data) == len(marks):
            there = row_marks(data, columns)
            if others := (there != marks).nonzero().flatten().tolist():
                raise ValueError(
                    f"{len(others)} of {len(marks)} rows have other content in {columns} than those that the "
                    f"selection was made from, the first is row {others[0]}, so rows have moved or changed; apply it "
                    "to the same split and revision, or select with id_column="
                )
        return self._found_by_place(data, rows)

    def _found_by_place(self, data: Dataset, rows: Tensor) -> Tensor:
        if len(data) != self.plan.rows:
            raise ValueError(
                f"the data set has {len(data)} rows and the selection was made from {self.plan.rows}; "
                "apply it to the same split and revision, or select with id_column="
            )
        column, hash_then = self.info.get("label_column"), self.info.get("labels_hash")
        if hash_then is None or column not in data.column_names:
            return rows
        if labels_hash(label_values(data, column)) != hash_then:
            raise ValueError(
                f"column {column!r} differs from the one the selection was made from, so rows have moved "
                "or changed; apply it to the same split and revision, or select with id_column="
            )
        return rows

    def _found_by_id(self, data: Dataset, rows: Tensor) -> Tensor:
        id_column = self.info["id_column"]
        check_dataset(data, [id_column])
        place = {value: i for i, value in enumerate(data.with_format(None)[id_column][:])}
        wanted = [self.row_ids[i] for i in rows.tolist()]
        missing = [value for value in wanted if value not in place]
        if missing:
            raise ValueError(
                f"{len(missing)} selected rows are not in the data set, the first has {id_column}="
                f"{missing[0]!r}; apply the selection to the data it was made from"
            )
        read_ids(data, id_column)
        return torch.tensor([place[value] for value in wanted])

    def to_dataset(self) -> Dataset:
        """One row for each chosen row: `row_id`, `weight`, `inclusion_probability` and its scores."""
        positions = self.plan.positions
        ids = positions.tolist() if self.row_ids is None else [self.row_ids[i] for i in positions.tolist()]
        columns = {
            "row_id": ids,
            "weight": self.plan.weights.numpy(),
            "inclusion_probability": self.plan.probabilities.numpy(),
        }
        return Dataset.from_dict(columns | {name: column[positions].numpy() for name, column in self.scores().items()})

    def scores_dataset(self) -> Dataset:
        """One row for each row of the pool: `row_id` and its scores."""
        ids = list(range(self.plan.rows)) if self.row_ids is None else list(self.row_ids)
        return Dataset.from_dict({"row_id": ids} | {name: column.numpy() for name, column in self.scores().items()})

    def scores(self) -> dict[str, Tensor]:
        """The score columns without the labels, which belong to the source."""
        return {name: column for name, column in self.table.items() if name != "label"}


def check_no_weights(data: Dataset) -> None:
    """Raise a `ValueError` where a data set has columns of the names that a selection adds."""
    clash = [name for name in ("weight", "inclusion_probability") if name in data.column_names]
    if clash:
        raise ValueError(f"the data set has the columns {clash} already; remove_columns({clash}) or rename them")


def read_ids(data: Dataset, id_column: str) -> list[int] | list[str]:
    """The values of an id column.

    Raises:
        ValueError: if two rows have the same, or one has none.
        TypeError: for ids that are neither integers nor texts.
    """
    ids = data.with_format(None)[id_column][:]
    if (missing := next((i for i, value in enumerate(ids) if value is None), None)) is not None:
        raise ValueError(
            f"column {id_column!r} is missing at row {missing}; give every row an id, or set id_column=None"
        )
    if not all(isinstance(value, str) for value in ids) and not all(
        isinstance(value, int) and not isinstance(value, bool) for value in ids
    ):
        raise TypeError(f"column {id_column!r} holds {ids[0]!r}; row ids are integers, or texts, and all alike")
    if len(set(ids)) < len(ids):
        raise ValueError(f"column {id_column!r} names some rows alike; row ids must differ")
    return ids


def labels_hash(values: Sequence[Any]) -> str:
    """A hash of the label column: tells whether places still mean the same rows."""
    return digest(json.dumps(values, default=str))[:16]
