"""What scores rows wherever they come from."""

import json
from types import NoneType
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.checks import instance, one_of, whole_number
from hf_effdl.files import digest
from hf_effdl.samples.probes.decisions import decision_labels
from hf_effdl.samples.probes.inputs import check_dataset, label_tensor, label_values
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.scoring import decided_scores, score_batch
from hf_effdl.samples.scores.uncertainty import GAUGES, check_labels


class RowScorer(Protocol):
    """Scores rows, on this process alone, whichever others come with them.

    `SFTScorer` is one, and so is `ProbeScorer`.
    """

    @property
    def key(self) -> str:
        """What the scores follow from, beside the rows."""

    def score_rows(self, rows: Dataset, where: str = "the data", first: int = 0) -> dict[str, Tensor]:
        """`{score: (rows,) or (rows, d)}`; errors name rows by `where` and their number from `first` on."""


class ProbeScorer:
    """Classifiers as a `RowScorer`: the scores of `UncertaintySelector.score` but `p_clean`, which needs all rows.

    Args:
        probes: `Probes`, such as `LinearProbes.train` makes.
        label_column: classes of the rows, as whole numbers or as names that the probes know; None: scores without.
        gauge: see `uncertainty`.
        batch_size: rows that are fed at once.

    Example:
        >>> import torch
        >>> from hf_effdl import LinearProbes
        >>> rows = Dataset.from_dict({"features": torch.randn(60, 4).tolist(), "label": [0, 1, 2] * 20})
        >>> scorer = ProbeScorer(LinearProbes.train(None, rows, input_column="features"), None)
        >>> sorted(scorer.score_rows(rows))[:3]
        ['bald', 'confidence', 'entropy']
    """

    def __init__(
        self, probes: Probes, label_column: str | None = "label", gauge: str = "invariant", batch_size: int = 64
    ) -> None:
        instance("probes", probes, Probes, "LinearProbes or what train_probes returns")
        instance("label_column", label_column, (str, NoneType), "the name of a column, or None")
        self.probes, self.label_column = probes, label_column
        self.gauge, self.batch_size = one_of("gauge", gauge, GAUGES), whole_number("batch_size", batch_size, 1)
        if label_column is not None:
            probes.inputs.aside |= {label_column}

    @property
    def key(self) -> str:
        settings = [self.probes.fingerprint, self.probes.inputs.describe(), self.label_column, self.gauge]
        settings += [] if self.probes.task == "classes" else [self.probes.task]
        return digest(json.dumps([*settings, self.batch_size]))

    def score_rows(self, rows: Dataset, where: str = "the data", first: int = 0) -> dict[str, Tensor]:
        labels, parts, start = self._labels(rows, where), [], 0
        for fed, logits in self.probes.asked(rows, self.batch_size):
            bad = (~logits.isfinite()).flatten(1).any(1).nonzero()
            if len(bad):
                raise ValueError(
                    f"row {first + start + int(bad[0])} of {where} has logits that are NaN or infinite; leave out "
                    "rows that hold such values, or train the probes again"
                )
            given = None if labels is None else labels[start : start + len(logits)]
            parts.append(self._scores(fed, logits, given, torch.arange(len(logits)) + first + start))
            start += len(logits)
        inner = ("likelihoods", "between", "total")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name not in inner}

    def _labels(self, rows: Dataset, where: str) -> Tensor | list[list[int]] | None:
        if self.label_column is None:
            return None
        check_dataset(rows, [self.label_column], where, "ProbeScorer(label_column=), None for scores without labels")
        if self.probes.task == "classes":
            return label_tensor(rows, self.label_column, self.probes.names)
        return decision_labels(label_values(rows, self.label_column), self.label_column, self.probes.task)

    def _scores(self, fed: Any, logits: Tensor, labels: Any, places: Tensor) -> dict[str, Tensor]:
        if self.probes.task != "classes":
            return decided_scores(self.probes.task, logits, fed, labels, places, self.gauge)
        if labels is not None:
            labels = check_labels(labels, max(2, logits.shape[2]), len(labels))
        return score_batch(logits, labels, self.gauge)


def as_scorer(scorer: Any) -> RowScorer:
    """The scorer itself; raises where it is none."""
    if not hasattr(scorer, "score_rows") or not isinstance(getattr(scorer, "key", None), str):
        raise TypeError(
            f"scorer is a {type(scorer).__name__}; pass an SFTScorer, a ProbeScorer(probes), or any object with `key` "
            "and `score_rows(rows, where, first)`"
        )
    return scorer
