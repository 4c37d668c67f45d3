"""`ScoredPool`: the rows to choose from, with what a selection needs of them, read once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.samples.probes.inputs import check_dataset, class_tensor, label_names, label_values
from hf_effdl.samples.probes.scoring import SCORES
from hf_effdl.samples.selection.rows import labels_hash


@dataclass(frozen=True)
class ScoredPool:
    """A data set whose labels, class names and scores stand beside it, as tensors and plain values.

    Attributes:
        data: the rows.
        names: class names of the data set or of the probes, if one of them has some.
        labels: `(N,)` classes; None where labels are not to be looked at.
        labels_hash: of the label column as it is stored.
        table: the score columns, `(N,)` each, in the order of `SCORES`; empty until they are read or made.
    """

    data: Dataset
    names: list[str] | None
    labels: Tensor | None = None
    labels_hash: str | None = None
    table: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, data: Dataset, label_column: str | None, of_probes: Sequence[str] | None, labelled: bool) -> Self:
        """Read the class names and the labels.

        Args:
            data: checked by `check_dataset`.
            label_column: of the data set.
            of_probes: class names that the probes know.
            labelled: whether the labels are to be read.

        Raises:
            ValueError, TypeError: for class names that differ, and as `label_tensor` does.
        """
        names = names_for(data, label_column, of_probes)
        if not labelled:
            return cls(data, names)
        values = label_values(data, label_column)
        return cls(data, names, class_tensor(values, label_column, names), labels_hash(values))

    @property
    def score_columns(self) -> list[str]:
        """The columns of the data set that are named as scores are."""
        return [name for name in SCORES if name in self.data.column_names]

    def with_columns_read(self) -> Self:
        """The pool with the scores that stand in the data set."""
        return replace(self, table={name: _numbers(self.data, name) for name in self.score_columns})

    def scored(self, table: Mapping[str, Tensor]) -> Self:
        """The pool with the score columns added."""
        data = self.data
        for name, column in table.items():
            data = data.add_column(name, column.numpy())
        single = {name: table[name].float() if table[name].is_floating_point() else table[name] for name in table}
        return replace(self, data=data, table={name: single[name] for name in SCORES if name in single})

    def score_table(self, score: str) -> dict[str, Tensor]:
        """The scores, the labels, and the column to draw by where it is another one of the data set."""
        table = dict(self.table)
        if score not in (*table, "uniform"):
            check_dataset(self.data, [score], "the scored data set")
            table[score] = _numbers(self.data, score)
        return table if self.labels is None else table | {"label": self.labels}

    def row_ids(self, id_column: str | None) -> list[int] | list[str] | None:
        """The id column's values; None if there is none.

        Raises:
            ValueError: if two rows have the same.
        """
        if id_column is None:
            return None
        ids = self.data.with_format(None)[id_column][:]
        if len(set(ids)) < len(ids):
            raise ValueError(f"column {id_column!r} names some rows alike; row ids must differ")
        return ids


def _numbers(data: Dataset, name: str) -> Tensor:
    return torch.from_numpy(data.with_format("numpy")[name][:].copy())


def names_for(data: Dataset, column: str | None, of_probes: Sequence[str] | None) -> list[str] | None:
    """Class names of the pool and the probes.

    Raises:
        ValueError: if both have some and they differ.
    """
    names = label_names(data, column)
    if names and of_probes and list(names) != list(of_probes):
        if sorted(names) == sorted(of_probes):
            how = f"in another order: {names[:4]} ... and {list(of_probes)[:4]} ..."
        else:
            how = f"{sorted(set(names) ^ set(of_probes))[:6]} are known to one of them only"
        raise ValueError(
            f"the data set's classes and the probes' differ: {how}; train the probes on labels of the "
            f"same order, or align_labels_with_mapping the column {column!r}"
        )
    return list(names or of_probes or []) or None
