"""`Selection`: the rows that were chosen, why, and how to choose them again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.samples.inputs import check_dataset, label_names
from hf_effdl.samples.planning import Plan


@dataclass
class Selection:
    """A plan for one data set, with the scores it was made from.

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
        positions = self._positions(data)
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

    def _positions(self, data: Dataset) -> Tensor:
        id_column = self.info.get("id_column")
        if id_column is not None:
            check_dataset(data, [id_column])
            place = {value: i for i, value in enumerate(data.with_format(None)[id_column][:])}
            wanted = [self.row_ids[i] for i in self.plan.positions.tolist()]
            missing = [value for value in wanted if value not in place]
            if missing:
                raise ValueError(f"{len(missing)} selected rows are not in the data set, the first has {id_column}="
                                 f"{missing[0]!r}; apply the selection to the data it was made from")  # fmt: skip
            return torch.tensor([place[value] for value in wanted])
        if len(data) != self.plan.rows:
            raise ValueError(f"the data set has {len(data)} rows and the selection was made from {self.plan.rows}; "
                             "apply it to the same split and revision, or select with id_column=")  # fmt: skip
        column, known = self.info.get("label_column"), self.info.get("labels_hash")
        if known is not None and column in data.column_names and labels_hash(data, column) != known:
            raise ValueError(f"column {column!r} differs from the one the selection was made from, so rows have moved "
                             "or changed; apply it to the same split and revision, or select with id_column="
                             )  # fmt: skip
        return self.plan.positions

    def to_dataset(self) -> Dataset:
        """One row for each chosen row: `row_id`, `weight`, `inclusion_probability` and its scores."""
        positions = self.plan.positions
        ids = positions.tolist() if self.row_ids is None else [self.row_ids[i] for i in positions.tolist()]
        columns = {"row_id": ids, "weight": self.plan.weights.numpy(),
                   "inclusion_probability": self.plan.probabilities.numpy()}  # fmt: skip
        return Dataset.from_dict(columns | {name: column[positions].numpy() for name, column in self.scores().items()})

    def scores_dataset(self) -> Dataset:
        """One row for each row of the pool: `row_id` and its scores."""
        ids = list(range(self.plan.rows)) if self.row_ids is None else list(self.row_ids)
        return Dataset.from_dict({"row_id": ids} | {name: column.numpy() for name, column in self.scores().items()})

    def scores(self) -> dict[str, Tensor]:
        """The score columns without the labels, which belong to the source."""
        return {name: column for name, column in self.table.items() if name != "label"}

    def report(self) -> "SelectionReport":
        """Class counts, effective size, suspected label errors."""
        from hf_effdl.samples.report import SelectionReport

        return SelectionReport.of(self)


def labels_hash(data: Dataset, column: str) -> str:
    """A hash of the label column: tells whether places still mean the same rows."""
    return hashlib.sha256(json.dumps(data.with_format(None)[column][:], default=str).encode()).hexdigest()[:16]


def source_of(data: Dataset) -> dict[str, Any]:
    """Where a data set was loaded from, as far as it knows: id and revision on the Hub, configuration, split."""
    found: dict[str, Any] = {"id": None, "revision": None}
    for url in data.info.download_checksums or {}:
        if url.startswith("hf://datasets/") and "@" in url:
            found["id"], _, rest = url.removeprefix("hf://datasets/").partition("@")
            found["revision"] = rest.partition("/")[0]
            break
    config = data.info.config_name
    return found | {
        "config": config, "split": None if data.split is None else str(data.split), "rows": len(data),
        "fingerprint": data._fingerprint,
    }  # fmt: skip


def names_for(data: Dataset, column: str | None, known: Sequence[str] | None) -> list[str] | None:
    """Class names of the pool and the probes.

    Raises:
        ValueError: if both are known and differ.
    """
    names = label_names(data, column)
    if names and known and list(names) != list(known):
        if sorted(names) == sorted(known):
            how = f"in another order: {names[:4]} ... and {list(known)[:4]} ..."
        else:
            how = f"{sorted(set(names) ^ set(known))[:6]} are known to one of them only"
        raise ValueError(f"the data set's classes and the probes' differ: {how}; train the probes on labels of the "
                         f"same order, or align_labels_with_mapping the column {column!r}")  # fmt: skip
    return list(names or known) if names or known else None
