"""`Selection`: the rows that were chosen, why, and how to choose them again."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.samples.drawing.plan import Plan, _filled, _override, make_plan
from hf_effdl.samples.probes.inputs import check_dataset, label_names, label_tensor
from hf_effdl.samples.selection import files as storage
from hf_effdl.samples.selection.findings import kept_by_filter
from hf_effdl.samples.selection.report import SelectionReport
from hf_effdl.samples.selection.source import load_source, source_of  # noqa: F401  (source_of: the selector takes it from here)


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
        positions = self._positions(data, self.plan.positions)
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

    def _positions(self, data: Dataset, rows: Tensor) -> Tensor:
        """Where rows of the pool stand in a data set."""
        id_column = self.info.get("id_column")
        if id_column is not None:
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
        if len(data) != self.plan.rows:
            raise ValueError(
                f"the data set has {len(data)} rows and the selection was made from {self.plan.rows}; "
                "apply it to the same split and revision, or select with id_column="
            )
        column, known = self.info.get("label_column"), self.info.get("labels_hash")
        if known is not None and column in data.column_names and labels_hash(data, column) != known:
            raise ValueError(
                f"column {column!r} differs from the one the selection was made from, so rows have moved "
                "or changed; apply it to the same split and revision, or select with id_column="
            )
        return rows

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

    def redraw(self, budget: int, data: Dataset | None = None, **overrides: Any) -> "Selection":
        """Another budget by the same settings from the same scores: no probes, no scoring.

        The settings are those that were found for this budget; the default preset may find others for a much larger
        or smaller one.

        Args:
            budget: rows.
            data: the pool; needed where classes count and the selection was loaded, as labels are not stored.
            overrides: arguments of `make_plan` that are to differ.

        Raises:
            ValueError: if labels are needed and missing, or if a `keep` mask was used, which is not stored.
        """
        table, settings = dict(self.table), self.plan.settings
        by_label = settings.get("quotas") == "label" or settings.get("regime") == "agreement"
        if "label" not in table and data is not None and self.info.get("mode") == "coreset":
            labels = label_tensor(data, self.info["label_column"], self.names)
            table["label"] = labels[self._positions(data, torch.arange(self.plan.rows))]
        elif "label" not in table and by_label:
            raise ValueError(
                "the selection was drawn by class and holds no labels; pass data=, the data set it was made from"
            )
        options = {name: settings[name] for name in inspect.signature(make_plan).parameters if name in settings}
        options["row_ids"] = self.row_ids
        kept = kept_by_filter(replace(self, table=table))

        def draw(**options: Any) -> Plan:
            if kept is None or "keep" in options:
                return make_plan(table, **options)
            keep = _filled(table, kept, table["p_clean"] >= 0.5, *(options[k] for k in ("budget", "quotas", "seed")))
            plan = make_plan(table, **options, keep=keep)
            return replace(plan, settings=plan.settings | {"kept_rows": int(keep.sum())})

        if not draw(**options, force=True).positions.equal(self.plan.positions):
            raise ValueError(
                "the settings do not lead to the rows that were selected, as with a keep= mask, which is "
                "not stored; plan anew with make_plan"
            )
        plan = draw(**_override(options | {"budget": budget, "force": not overrides}, overrides))
        plan = replace(plan, settings=settings | plan.settings)
        return replace(self, plan=plan, table=table, info=self.info | {"settings": plan.settings})

    def save(self, folder: str | os.PathLike[str], config_name: str = "default") -> Path:
        """Write the selection into a folder, beside those of other names; `load` tells a write that was cut off.

        Args:
            folder: made if need be.
            config_name: a folder inside; the scores of all rows stand beside it and are shared.

        Returns:
            The folder of this config.
        """
        return storage.save(self, folder, config_name)

    @classmethod
    def load(
        cls,
        where: str | os.PathLike[str],
        config_name: str = "default",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Selection":
        """Read a selection from a folder or from the Hub. Nothing is unpickled: Parquet and JSON.

        The labels are not stored, so its `table` has no column `label`.

        Args:
            where: what `save` was given, or a repository id.
            config_name: as it was saved or pushed.
            revision: of the repository.
            token: for the Hub; default: the one that is logged in.

        Raises:
            FileNotFoundError: if there is no selection there.
            ValueError: for an unknown config, a newer format, or files that do not belong together.
        """
        return cls(**storage.load(where, config_name, revision, token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config_name: str = "default",
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        license: str | None = None,
    ) -> str | None:
        """Push the plan, the scores of all rows and a card to a data set repository, in one commit.

        The rows themselves stay where they are, and `load_selection` puts both together. The scores are made with the
        labels, though, and give many of them away: where labels are secret, push with `private=True`.

        Args:
            repo_id: made if need be. Selections of other names in it are kept; anything else in it is an error.
            config_name: such as `"r100"`; the same name again replaces.
            private: of a repository that is made.
            token: for the Hub; default: the one that is logged in.
            commit_message: default: the name and the number of rows.
            license: of the plan and the scores, for the card; the source's own holds for its rows.

        Returns:
            The commit's URL; None on all processes but the first.

        Raises:
            ValueError: for `private=True` and a public repository, a repository of something else, or a bad name.

        Example:
            >>> selector.selection.push_to_hub("me/pool-selection", config_name="r100")  # doctest: +SKIP
            >>> subset = load_selection("me/pool-selection", config_name="r100")         # doctest: +SKIP
        """
        return storage.push(self, repo_id, config_name, private, token, commit_message, license=license)

    def report(self) -> SelectionReport:
        """Class counts, effective size, suspected label errors."""
        return SelectionReport.of(self)

    def plot(self, count: int = 8, column: str | None = None) -> Any:
        """One picture: the drawing score, the class balance, and examples of the pool, where it is at hand.

        Args:
            count: rows shown of each kind: least certain, most certain, suspected label errors.
            column: what to show of a row; default: an image, else the longest text, else its numbers.

        Returns:
            A matplotlib Figure; needs `pip install "hf_effdl[plot]"`. Its panels alone: `selection.pictures`.
        """
        from hf_effdl.samples.selection.pictures import plot_selection

        return plot_selection(self, count, column)


def load_selection(
    repo_id: str | os.PathLike[str],
    source: Dataset | None = None,
    *,
    config_name: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
) -> Dataset:
    """The rows of a pushed or saved selection, as `UncertaintySelector.select` returned them.

    Args:
        repo_id: of the selection on the Hub, or a folder that `Selection.save` wrote.
        source: the data set that was selected from; default: it is loaded from the Hub at the recorded revision.
        config_name: as it was pushed.
        revision: of the selection.
        token: for the Hub, and for the source.

    Returns:
        The chosen rows of the source, with the columns `weight` and `inclusion_probability`.

    Raises:
        ValueError: if the source has to be passed: it came from elsewhere, or its rows were moved before selecting
            and are known by their places; and as `Selection.load` and `Selection.apply`.

    Example:
        >>> subset = load_selection("me/pool-selection", config_name="r100")                  # doctest: +SKIP
        >>> WeightedTrainer(model, args, train_dataset=subset.with_format("torch")).train()   # doctest: +SKIP
    """
    selection = Selection.load(repo_id, config_name, revision=revision, token=token)
    return selection.apply(load_source(selection.info, token) if source is None else source)


def labels_hash(data: Dataset, column: str) -> str:
    """A hash of the label column: tells whether places still mean the same rows."""
    return hashlib.sha256(json.dumps(data.with_format(None)[column][:], default=str).encode()).hexdigest()[:16]


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
        raise ValueError(
            f"the data set's classes and the probes' differ: {how}; train the probes on labels of the "
            f"same order, or align_labels_with_mapping the column {column!r}"
        )
    return list(names or known) if names or known else None
