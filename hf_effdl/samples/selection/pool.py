"""`ScoredPool`: the rows to choose from, with what a selection needs of them, read once."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.samples.probes.decisions import decision_labels
from hf_effdl.samples.probes.inputs import check_dataset, class_tensor, label_values, names_for
from hf_effdl.samples.probes.scoring import SCORE_KEY, SCORES
from hf_effdl.samples.selection.rows import labels_hash, read_ids


@dataclass(frozen=True)
class ScoredPool:
    """A data set whose labels, class names and scores stand beside it, as tensors and plain values.

    Attributes:
        data: the rows.
        names: class names of the data set or of the probes, if one of them has some.
        labels: `(N,)` classes; None where labels are not to be looked at.
        decisions: the labels of rows that have several each.
        labels_hash: of the label column as it is stored.
        table: the score columns, `(N,)` each, in the order of `SCORES`; empty until they are read or made.
    """

    data: Dataset
    names: list[str] | None
    labels: Tensor | None = None
    labels_hash: str | None = None
    table: Mapping[str, Tensor] = field(default_factory=dict)
    decisions: list[list[int]] | None = None

    @classmethod
    def open(
        cls,
        data: Dataset,
        label_column: str | None,
        of_probes: Sequence[str] | None,
        labelled: bool,
        task: str = "classes",
    ) -> Self:
        """Read the class names and the labels.

        Args:
            data: checked by `check_dataset`.
            label_column: of the data set.
            of_probes: class names that the probes know.
            labelled: whether the labels are to be read.
            task: of the probes, see `Probes`.

        Raises:
            ValueError, TypeError: for class names that differ, and as `label_tensor` and `decision_labels` do.
        """
        names = names_for(data, label_column, of_probes) if task == "classes" else None
        if not labelled:
            return cls(data, names)
        values = label_values(data, label_column)
        if task != "classes":
            decisions = decision_labels(values, label_column, task)
            return cls(data, None, None, labels_hash(values), decisions=decisions)
        return cls(data, names, class_tensor(values, label_column, names), labels_hash(values))

    @property
    def score_columns(self) -> list[str]:
        """The columns of the data set that are named as scores are."""
        return [name for name in SCORES if name in self.data.column_names]

    def with_columns_read(self) -> Self:
        """The pool with the scores that stand in the data set."""
        names = [name for name in self.score_columns if name != SCORE_KEY]
        return replace(self, table={name: _numbers(self.data, name) for name in names})

    def check_scored_by(self, *keys: Tensor) -> None:
        """Refuse score columns of other probes, settings or rows.

        Args:
            keys: `score_keys` as they must be; one of them is enough.

        Raises:
            ValueError: if they are others.
        """
        columns = self.score_columns
        if SCORE_KEY not in columns:
            warnings.warn(
                f"the score columns do not say which probes made them, as there is no column {SCORE_KEY!r}; they are "
                f"taken for the scores of these probes. If they are not, remove_columns({columns})",
                stacklevel=4,
            )
            return
        stored = _numbers(self.data, SCORE_KEY)
        if any(stored.equal(key) for key in keys):
            return
        again = f"remove_columns({columns}) to score anew"
        difference = stored ^ keys[0]
        if (difference == difference[0]).all():
            raise ValueError(
                "the score columns were made by other probes, or with other settings, than those of this selector; "
                + again
            )
        others = int((difference != difference.mode().values).sum())
        raise ValueError(
            f"{others} of {len(stored)} rows are not what they were when they were scored: columns that the probes "
            f"read, or labels, have changed, or columns came in; {again}"
        )

    def scored(self, table: Mapping[str, Tensor], keys: Tensor) -> Self:
        """The pool with the score columns added, and `keys` that say what made them."""
        data = self.data
        for name, column in (dict(table) | {SCORE_KEY: keys}).items():
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
            ValueError: if two rows have the same, or one has none.
            TypeError: for ids that are neither integers nor texts.
        """
        return None if id_column is None else read_ids(self.data, id_column)

    def without_unseen(self, seen: Tensor) -> tuple[Self, dict[str, int]]:
        """The pool whose rows of classes that no probe was trained on do not count as doubted.

        What the probes say of such a label is no evidence: they never give it a probability. So these rows get the
        median `p_label` of the others and `p_clean` 1, and they are not among the surest that noise is read off.

        Args:
            seen: the classes that the probes were trained on.

        Returns:
            The pool, and the rows of each unseen class by its name.
        """
        if self.labels is None or "p_label" not in self.table:
            return self, {}
        unseen = ~torch.isin(self.labels, seen)
        if not unseen.any() or unseen.all():
            return self, {}
        table = dict(self.table)
        for name, value in (("p_label", "median"), ("p_clean", None), ("confidence", "min")):
            if name in table:
                given = table[name][~unseen]
                table[name] = table[name].masked_fill(unseen, 1.0 if value is None else getattr(given, value)().item())
        classes, counts = self.labels[unseen].unique(return_counts=True)
        pairs = zip(classes.tolist(), counts.tolist(), strict=True)
        return replace(self, table=table), {self.names[c] if self.names else str(c): count for c, count in pairs}


def _numbers(data: Dataset, name: str) -> Tensor:
    column = data.with_format("arrow")[:][name]
    try:  # with_format("numpy") would round float64 to float32
        values = torch.from_numpy(column.to_numpy().copy())
    except TypeError as error:
        raise TypeError(f"column {name!r} holds {column.type}; selection draws by one number a row") from error
    return values.float() if values.is_floating_point() and name in SCORES else values
