"""What scores rows wherever they come from."""

import json
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.checks import instance
from hf_effdl.files import digest
from hf_effdl.samples.probes.inputs import label_tensor
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.scoring import score_batch
from hf_effdl.samples.scores.uncertainty import check_labels


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
        self.probes, self.label_column, self.gauge, self.batch_size = probes, label_column, gauge, batch_size
        if label_column is not None:
            probes.inputs.aside |= {label_column}

    @property
    def key(self) -> str:
        settings = [self.probes.fingerprint, self.probes.inputs.describe(), self.label_column, self.gauge]
        return digest(json.dumps([*settings, self.batch_size]))

    def score_rows(self, rows: Dataset, where: str = "the data", first: int = 0) -> dict[str, Tensor]:
        labels = None if self.label_column is None else label_tensor(rows, self.label_column, self.probes.names)
        parts, start = [], 0
        for logits in self.probes.batches(rows, self.batch_size):
            if not logits.isfinite().all():
                bad = int((~logits.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ValueError(f"row {first + start + bad} of {where} has logits that are NaN or infinite")
            given = None if labels is None else labels[start : start + len(logits)]
            if given is not None:
                given = check_labels(given, max(2, logits.shape[2]), len(given))
            parts.append(score_batch(logits, given, self.gauge))
            start += len(logits)
        inner = ("likelihoods", "between", "total")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name not in inner}


def as_scorer(scorer: Any) -> RowScorer:
    """The scorer itself; raises where it is none."""
    if not hasattr(scorer, "score_rows") or not isinstance(getattr(scorer, "key", None), str):
        raise TypeError(
            f"scorer is a {type(scorer).__name__}; pass an SFTScorer, a ProbeScorer(probes), or any object with `key` "
            "and `score_rows(rows, where, first)`"
        )
    return scorer
