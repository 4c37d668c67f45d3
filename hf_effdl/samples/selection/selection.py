"""`Selection`: the rows that were chosen, why, and how to choose them again."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset

from hf_effdl.samples.drawing.plan import Plan, PlanSettings, make_plan
from hf_effdl.samples.drawing.presets import filled_up, overridden
from hf_effdl.samples.probes.inputs import label_tensor
from hf_effdl.samples.selection import files
from hf_effdl.samples.selection.findings import kept_by_filter
from hf_effdl.samples.selection.pictures import plot_selection
from hf_effdl.samples.selection.report import SelectionReport
from hf_effdl.samples.selection.rows import SelectedRows
from hf_effdl.samples.selection.source import load_source


class Selection(SelectedRows):
    """A plan for one data set, with the scores it was made from.

    Attributes:
        plan: positions, probabilities and weights of the chosen rows.
        table: the score columns of the whole pool, `(N,)` each.
        names: class names, if known.
        row_ids: `(N,)` values of the id column; None if rows are known by their places.
        info: everything needed to redo it: source, probes, settings, noise; plain values.
        pool: the scored data set, where it is at hand; only pictures of examples need it.
    """

    def redraw(self, budget: int, data: Dataset | None = None, **overrides: Any) -> Self:
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
        labelled = replace(self, table=self._table_with_labels(data))
        ids = self.drawn_by if self.row_ids is None else self.row_ids  # neither, in earlier versions: places
        settings = asdict(PlanSettings.of(self.plan.settings)) | {"row_ids": ids}
        if not labelled._drawn(settings | {"force": True}).positions.equal(self.plan.positions):
            raise ValueError(
                "the settings do not lead to the rows that were selected, as with a keep= mask, which is "
                "not stored; plan anew with make_plan"
            )
        plan = labelled._drawn(overridden(settings | {"budget": budget, "force": not overrides}, overrides))
        plan = replace(plan, settings=self.plan.settings | plan.settings)
        return replace(labelled, plan=plan, info=self.info | {"settings": plan.settings})

    def _table_with_labels(self, data: Dataset | None) -> dict[str, torch.Tensor]:
        """The score table with the labels where they count, read from the data set where they are not at hand."""
        table, settings = dict(self.table), self.plan.settings
        if "label" in table:
            return table
        if data is not None and self.info.get("mode") == "coreset" and "task" not in self.info:
            labels = label_tensor(data, self.info["label_column"], self.names)
            table["label"] = labels[self.positions_in(data, torch.arange(self.plan.rows))]
        elif settings.get("quotas") == "label" or settings.get("regime") == "agreement":
            raise ValueError(
                "the selection was drawn by class and holds no labels; pass data=, the data set it was made from"
            )
        return table

    def _drawn(self, arguments: dict[str, Any]) -> Plan:
        """`make_plan` of the scores, on the rows that the regime's filter keeps, filled up as the preset does."""
        kept = kept_by_filter(self)
        if kept is None or "keep" in arguments:
            return make_plan(self.table, **arguments)
        likely, by = self.table["p_clean"] >= 0.5, [arguments[name] for name in ("budget", "quotas", "seed")]
        # earlier versions, which do not say what they drew by, filled up in the order of the rows
        ids = arguments["row_ids"] if "drawn_by" in self.info else None
        keep = filled_up(self.table, kept, likely, *by, ids)
        plan = make_plan(self.table, **arguments, keep=keep)
        return replace(plan, settings=plan.settings | {"kept_rows": int(keep.sum())})

    def save(self, folder: str | os.PathLike[str], config_name: str = "default", *, card: bool = False) -> Path:
        """Write the selection into a folder, beside those of other names; `load` tells a write that was cut off.

        Args:
            folder: made if need be.
            config_name: a folder inside; the scores of all rows stand beside it and are shared.
            card: write the card of all selections in the folder as well, `README.md`, as a push would, with a picture.

        Returns:
            The folder of this config.
        """
        return files.save(self, folder, config_name, card)

    @classmethod
    def load(
        cls,
        where: str | os.PathLike[str],
        config_name: str = "default",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
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
        return cls(**files.load(where, config_name, revision, token))

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
        return files.push(self, repo_id, config_name, private, token, commit_message, license=license)

    def report(self) -> SelectionReport:
        """Class counts, effective size, suspected label errors."""
        return SelectionReport.of(self)

    def plot(self, count: int = 8, column: str | None = None) -> Any:
        """One picture: the drawing score, the class balance, and examples of the pool, where it is at hand.

        Args:
            count: rows shown of each kind: least certain, most certain, suspected label errors.
            column: what to show of a row; default: an image, else the longest text, else its numbers.

        Returns:
            A matplotlib Figure; needs matplotlib (the extra `plot`). Its panels alone: `selection.pictures`.
        """
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
