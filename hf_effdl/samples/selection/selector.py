"""`UncertaintySelector`: from a data set and a budget to the rows worth having."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import signature
from typing import Any, overload

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

from hf_effdl.processes import agreed, same_fate
from hf_effdl.samples.drawing.checks import check_seed, plain_number
from hf_effdl.samples.drawing.hashing import hashed_uniform
from hf_effdl.samples.drawing.plan import Plan, PlanSettings, make_plan
from hf_effdl.samples.drawing.presets import Trial, active_plan, decisions_plan, default_plan, paper_plan
from hf_effdl.samples.drawing.weights import check_bias
from hf_effdl.samples.probes.inputs import NOT_INPUTS, check_dataset
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.scoring import (
    LABELLED,
    OF_ONE_CLASS,
    SCORES,
    UNLABELLED,
    drawing_ids,
    score_keys,
    score_rows,
)
from hf_effdl.samples.selection.pool import ScoredPool
from hf_effdl.samples.selection.report import SelectionReport
from hf_effdl.samples.selection.rows import check_no_weights
from hf_effdl.samples.selection.selection import Selection
from hf_effdl.samples.selection.source import source_of
from hf_effdl.version import __version__


MODES = ("coreset", "active")
PRESETS = ("default", "paper")


class UncertaintySelector:
    """Chooses rows of a `datasets.Dataset` by how unsure a few probe models are of them.

    `select` is `score`, then `plan`, then `Selection.apply`. Scoring costs one pass; any number of budgets can then be
    planned from the same scores.

    Args:
        probes: `Probes` (from `train_probes` or `LinearProbes.train`), or a list of models.
        label_column: labels of the pool; used in coreset mode only. One class a row; of probes for several labels a
            list of 0 and 1, of probes for tokens a list of classes, with -100 for tokens that do not count.
        mode: `"coreset"` (labels are there, choose what to train on) or `"active"` (choose what to have labelled).
        preset: `"default"` (see `default_plan` and `active_plan`) or `"paper"` (the released code, see `paper_plan`).
        seed: of the draw; the same seed and row ids give the same rows.
        id_column: integers or texts that name the rows; default: their places. The draw goes by the names, or else by
            the content that the probes are fed: no order of the rows changes which are drawn.
        processing_class, input_column, data_collator: how rows are fed to a list of models, see `Probes`.
        batch_size: rows a step when scoring.
        trial: `(positions, weights) -> accuracy` of a small model trained on these rows of the pool; default: one
            trained like the probes, where that is known. False: none, the default preset then filters always.
        cache_dir: where finished parts of the scoring are kept, to go on after a cut-off.
        source, revision: id and revision of the pool on the Hub, for the card; default: what the data set knows.

    Raises:
        ValueError: for unknown modes or presets, fewer than two probes or probes of different classes.

    Example:
        >>> import torch
        >>> from hf_effdl import LinearProbes
        >>> rows = {"features": torch.randn(240, 4).tolist(), "label": [0, 1, 2] * 80}
        >>> data = Dataset.from_dict(rows).train_test_split(60, seed=0)
        >>> probes = LinearProbes.train(None, data["test"], input_column="features")
        >>> subset = UncertaintySelector(probes).select(data["train"], 30)
        >>> len(subset), {"weight", "inclusion_probability"} <= set(subset.column_names)
        (30, True)

    Source: Lin et al., "Optimal Sample Selection Through Uncertainty Estimation and Its Application in Deep
    Learning", arXiv 2309.02476.
    """

    def __init__(
        self,
        probes: Probes | Sequence[nn.Module],
        label_column: str | None = "label",
        mode: str = "coreset",
        preset: str = "default",
        seed: int = 0,
        *,
        id_column: str | None = None,
        processing_class: Any = None,
        input_column: str | Sequence[str] | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        batch_size: int = 64,
        trial: Trial | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        source: str | None = None,
        revision: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: it must be one of {MODES}")
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}: it must be one of {PRESETS}")
        if mode == "coreset" and label_column is None:
            raise ValueError("mode='coreset' chooses by labels; set label_column, or mode='active'")
        if not isinstance(probes, Probes):
            probes = Probes(probes, processing_class, input_column, data_collator)
        probes.inputs.aside |= {name for name in (label_column, id_column) if name is not None}
        self.probes, self.label_column, self.mode, self.preset, self.seed = probes, label_column, mode, preset, seed
        self.id_column, self.batch_size, self.trial, self.cache_dir = id_column, batch_size, trial, cache_dir
        self.source, self.revision = source, revision
        self.selection: Selection | None = None

    @property
    def gauge(self) -> str:
        """Of the uncertainties, see `uncertainty`."""
        return "drop-first" if self.preset == "paper" else "invariant"

    def score(self, data: Dataset) -> Dataset:
        """The data set with the score columns added.

        `u_x`, `entropy`, `margin`, `least_confidence`, `bald`, `confidence`, `predicted`, in coreset mode `u_y`,
        `p_label`, `el2n`, `p_clean`, and `score_key`, by which `plan` and `select` know the scores of other probes,
        settings, rows or labels, and refuse them. Where probes decide about several labels or about tokens, each score
        is the mean over a row's labels or tokens, and there are no `predicted` and `p_clean`.

        Raises:
            ValueError, TypeError: for a data set that is empty, streamed, a `DatasetDict` or without the columns, and
                what `score_rows` raises.
        """
        return self._scored(self._open(data)).data

    def plan(self, scored: Dataset, budget: int | float, **overrides: Any) -> Selection:
        """Choose rows of a scored data set.

        Args:
            scored: what `score` returned.
            budget: rows (an int), or a share of them (a float up to 1).
            overrides: arguments of `make_plan` that are to differ from the preset, e.g. `weights="none"`; `score` may
                name any column of numbers, such as one from `dynamics_scores`.

        Raises:
            ValueError: for missing score columns or a budget out of range.
        """
        pool = self._open(scored)
        self._check_plan(pool, budget, overrides)
        return self._planned(self._read(pool), budget, overrides)

    @overload
    def select(self, data: Dataset, budget: int | float, split: str | None = None, **overrides: Any) -> Dataset: ...

    @overload
    def select(self, data: DatasetDict, budget: int | float, split: str, **overrides: Any) -> DatasetDict: ...

    def select(
        self, data: Dataset | DatasetDict, budget: int | float, split: str | None = None, **overrides: Any
    ) -> Dataset | DatasetDict:
        """Score (unless it is done), plan and apply.

        Args:
            data: the pool; a `DatasetDict` with `split=` naming the pool in it.
            budget: rows (an int), or a share of them (a float up to 1).
            split: of a `DatasetDict`, which then comes back with that split replaced.
            overrides: see `plan`.

        Returns:
            The chosen rows in the pool's order, with the columns `weight` (mean 1) and `inclusion_probability`; the
            score columns are left out. `self.selection` holds the plan, scores and report.
        """
        if isinstance(data, DatasetDict) and split is not None:
            if split not in data:
                raise ValueError(f"split={split!r}: the DatasetDict has {list(data)}")
            return DatasetDict({**data, split: self.select(data[split], budget, **overrides)})
        pool = self._open(data)
        self._check_plan(pool, budget, overrides)  # before the long work
        check_no_weights(pool.data)
        known = set(self._columns(UNLABELLED)) <= set(pool.score_columns)
        scored = self._read(pool) if known else self._scored(pool)
        selection = self._planned(scored, budget, overrides)
        subset = selection.taken_from(scored.data, selection.plan.positions)
        return subset.remove_columns([name for name in SCORES if name in subset.column_names])

    def report(self) -> SelectionReport:
        """Of the last selection: class counts, effective size, regime, suspected label errors, pictures."""
        if self.selection is None:
            raise ValueError("there is nothing to report yet; call select(data, budget) or plan(scored, budget) first")
        return self.selection.report()

    def _open(self, data: Dataset) -> ScoredPool:
        labelled = self.mode == "coreset"
        columns = [self.label_column if labelled else None, self.id_column]
        check_dataset(
            data,
            [name for name in columns if name is not None],
            named_by="UncertaintySelector(label_column=, id_column=)",
        )
        return ScoredPool.open(data, self.label_column, self.probes.names, labelled, self.probes.task)

    def _columns(self, names: Sequence[str]) -> list[str]:
        """Those score columns that the probes give."""
        return [name for name in names if self.probes.task == "classes" or name not in OF_ONE_CLASS]

    def _scored(self, pool: ScoredPool) -> ScoredPool:
        """The pool with all scores, by one pass of the probes."""
        if clash := pool.score_columns:
            raise ValueError(f"the data set has the columns {clash} already; remove_columns({clash}) to score it anew")
        options = {"gauge": self.gauge, "batch_size": self.batch_size, "cache_dir": self.cache_dir}
        keys = score_keys(self.probes, pool.data, self.gauge, self.label_column if self.mode == "coreset" else None)
        labels = pool.labels if pool.decisions is None else pool.decisions
        return pool.scored(score_rows(self.probes, pool.data, labels, **options)[0], keys)

    def _read(self, pool: ScoredPool) -> ScoredPool:
        """The pool with the scores in its columns, if these are what the probes would say of it now."""
        by_label = [self.label_column] if self.label_column in pool.data.column_names else []
        if not pool.score_columns:
            return pool  # which planning refuses
        columns = by_label if self.mode == "coreset" else [None, *by_label]  # scores with labels serve without, too
        try:
            keys = [score_keys(self.probes, pool.data, self.gauge, column) for column in columns]
        except ValueError as error:
            warnings.warn(
                f"whether these are the scores of this data set's rows cannot be seen: {error}", stacklevel=3
            )
        else:
            pool.check_scored_by(*keys)
        return pool.with_columns_read()

    def _planned(self, pool: ScoredPool, budget: int | float, overrides: dict[str, Any]) -> Selection:
        """Choose rows of a scored pool, and keep the choice as `self.selection`."""
        rows = rows_of(budget, len(pool.data))
        wanted = self._columns(UNLABELLED + (LABELLED if self.mode == "coreset" else ()))
        if missing := [name for name in wanted if name not in pool.table]:
            raise ValueError(f"the data set has no score columns {missing}; pass what score() returned")
        pool, unseen = self._without_unseen(pool)
        table, names = pool.score_table(overrides.get("score", "uniform")), pool.row_ids(self.id_column)
        ids = self._drawing_ids(pool) if names is None else names
        PartialState()  # joins the other processes, if there are any
        # one process decides: a trial's accuracy may differ in its last digit between processes, the rows must not
        with same_fate():
            plan = self._by_preset(pool, table, rows, {"seed": self.seed, "row_ids": ids} | overrides)
        plan = agreed(plan)
        info = self._info(pool, plan) | ({"unseen_classes": unseen} if unseen else {})
        by_content = ids if names is None else None
        self.selection = Selection(plan, table, pool.names, names, info, pool.data, drawn_by=by_content)
        return self.selection

    def _drawing_ids(self, pool: ScoredPool) -> Tensor:
        unknown = [] if self.mode == "coreset" else [*NOT_INPUTS, self.label_column]
        return drawing_ids(self.probes, pool.data, unknown)

    def _without_unseen(self, pool: ScoredPool) -> tuple[ScoredPool, dict[str, int]]:
        if self.probes.probe_set is None or pool.labels is None:
            return pool, {}
        pool, unseen = pool.without_unseen(self.probes.probe_set.labels)
        if unseen:
            warnings.warn(
                f"no probe was trained on a row of {len(unseen)} classes of the pool: {list(unseen)[:8]} "
                f"({sum(unseen.values())} rows). What probes say of such labels is no evidence, so these rows are "
                "weighted as the median row and none counts as mislabelled; train probes on rows of all classes",
                stacklevel=4,
            )
        return pool, unseen

    def _by_preset(self, pool: ScoredPool, table: dict[str, Tensor], rows: int, options: dict[str, Any]) -> Plan:
        if self.preset == "paper":
            return paper_plan(table, rows, labelled=pool.labels is not None, **options)
        if self.probes.task != "classes":
            return decisions_plan(table, rows, **options)
        if self.mode == "active":
            return active_plan(table, rows, accuracy=self._probe_accuracy(), **options)
        return default_plan(table, rows, trial=self._trial(pool, options["row_ids"]), **options)

    def _info(self, pool: ScoredPool, plan: Plan) -> dict[str, Any]:
        """All that a selection says of how it was made."""
        given = {"id": self.source, "revision": self.revision}
        named = {name: value for name, value in given.items() if value is not None}
        return {
            "mode": self.mode,
            "preset": self.preset,
            "gauge": self.gauge,
            "label_column": self.label_column,
            "id_column": self.id_column,
            "drawn_by": "content" if self.id_column is None else "ids",
            "settings": plan.settings,
            "probes": self.probes.describe(),
            **({} if self.probes.task == "classes" else {"task": self.probes.task}),
            "source": source_of(pool.data) | named,
            "labels_hash": pool.labels_hash,
            "hf_effdl": __version__,
        }

    def _check_plan(self, pool: ScoredPool, budget: int | float, overrides: dict[str, Any]) -> None:
        """Refuse what cannot be planned, whatever the scores are."""
        rows = rows_of(budget, len(pool.data))
        known = {*signature(make_plan).parameters, *signature(default_plan).parameters} - {
            "table",
            "budget",
            "overrides",
        }
        if unknown := sorted(set(overrides) - known):
            near = get_close_matches(unknown[0], known, 3, 0.5)
            raise TypeError(f"{unknown} are no arguments of make_plan" + (f"; did you mean {near}?" if near else ""))
        weights = "damped" if self.preset == "paper" else "p_label" if self.mode == "coreset" else "none"
        names = {one.name for one in fields(PlanSettings)}
        options = {"weights": weights} | ({"sampler": "sequential"} if self.preset == "paper" else {})
        settings = PlanSettings(rows, **(options | {name: overrides[name] for name in names & set(overrides)}))
        check_bias(settings.score, settings.weights, overrides.get("force", False))
        check_seed(self.seed)
        if settings.score not in (*SCORES, "uniform", "label", "predicted"):
            check_dataset(pool.data, [settings.score], "the data set")
        pool.row_ids(self.id_column)
        if self.probes.task != "classes" and overrides.get("quotas") in ("label", "predicted"):
            raise ValueError(
                f"quotas={overrides['quotas']!r}: rows whose {self.probes.task} are decided have no class to share "
                "the budget by; use quotas='none' or 'strata'"
            )
        self._check_budget(rows, pool.labels, overrides)

    def _check_budget(self, budget: int, labels: Tensor | None, overrides: dict[str, Any]) -> None:
        if labels is None or overrides.get("quotas", "label") != "label":
            return
        if budget < (classes := len(labels.unique())):
            raise ValueError(
                f"budget={budget} is below the {classes} classes in {self.label_column!r}, so quotas "
                f"would leave classes out; raise it to {classes} or more, or set quotas='none'"
            )

    def _trial(self, pool: ScoredPool, ids: Tensor | list[int] | list[str] | None) -> Trial | None:
        trial = self.trial
        if trial is None or trial is True:
            trial = self.probes.trial(pool.data, pool.labels, self.batch_size)
        if not callable(trial) or ids is None:
            return trial or None

        def by_id(positions: Tensor, weights: Tensor) -> float:
            # training may depend on the order of its rows, which no order of the pool is to change
            given = ids[positions] if isinstance(ids, Tensor) else [ids[place] for place in positions.tolist()]
            turns = hashed_uniform(0, given, salt=3).argsort()
            return trial(positions[turns], weights[turns])

        return by_id

    def _probe_accuracy(self) -> float | None:
        """How often the out-of-bag vote is right on the probe set."""
        if self.probes.probe_set is None:
            return None
        p, truth = self.probes.out_of_bag(self.batch_size), self.probes.probe_set.labels
        judged = ~p[:, 0].isnan()
        return (p[judged].argmax(1) == truth[judged]).double().mean().item() if judged.any() else None


def rows_of(budget: int | float, rows: int) -> int:
    """A budget as a number of rows.

    Example:
        >>> rows_of(0.1, 200), rows_of(20, 200)
        (20, 20)
    """
    budget = plain_number(budget)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget={budget!r}: pass a number of rows (int) or a share of them (float)")
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget}: a share must be above 0 and at most 1; for rows pass an int")
        budget = max(1, round(budget * rows))
    if not 1 <= budget <= rows:
        raise ValueError(f"budget={budget}: it must be from 1 to the {rows} rows there are")
    return budget
