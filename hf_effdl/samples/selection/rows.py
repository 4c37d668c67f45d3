"""`SelectedRows`: which rows of a data set were chosen, and the scores behind the choice."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.files import digest
from hf_effdl.samples.drawing.plan import Plan
from hf_effdl.samples.probes.inputs import check_dataset, label_values


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
    """

    plan: Plan
    table: Mapping[str, Tensor]
    names: Sequence[str] | None = None
    row_ids: list[int] | list[str] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    pool: Dataset | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def apply(self, data: Dataset) -> Dataset:
        """The chosen rows of the data set, with the columns `weight` and `inclusion_probability`.

        Rows are found by the id column, else by their places. Keeps the data set's format; a transform sees the new
        columns and has to pass `weight` on.

        Raises:
            ValueError: if this is not the data set that was selected from.
        """
        check_dataset(data)
        return self.taken_from(data, self.positions_in(data, self.plan.positions))

    def taken_from(self, data: Dataset, positions: Tensor) -> Dataset:
        """`apply` where it is known at which positions of the data set the chosen rows stand."""
        clash = [name for name in ("weight", "inclusion_probability") if name in data.column_names]
        if clash:
            raise ValueError(f"the data set has the columns {clash} already; remove_columns({clash}) or rename them")
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
        if self.info.get("id_column") is not None:
            return self._found_by_id(data, rows)
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
        if len(place) < len(data):
            raise ValueError(f"column {id_column!r} names some rows alike; row ids must differ")
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


def labels_hash(values: Sequence[Any]) -> str:
    """A hash of the label column: tells whether places still mean the same rows."""
    return digest(json.dumps(values, default=str))[:16]
