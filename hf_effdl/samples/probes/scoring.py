"""Score every row of a data set with the probes: one pass, on any number of processes, resumable."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_effdl.files import digest, locked, read_sealed, sealed, sweep, write_whole
from hf_effdl.processes import agreed, is_first, refuse_lone_processes, same_fate, together
from hf_effdl.samples.probes.decisions import decisions_of, means_by_row
from hf_effdl.samples.probes.inputs import NOT_INPUTS, Inputs, identity, is_decoded
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.row_marks import content_ids, row_marks
from hf_effdl.samples.scores.noise import LabelNoise, fit_likelihoods, label_likelihoods
from hf_effdl.samples.scores.uncertainty import (
    LEAST_SPREAD,
    batch_uncertainty,
    check_found,
    check_labels,
    check_logits,
    entropy_of,
    spread_sums,
    two_classes,
)


UNLABELLED = ("u_x", "entropy", "margin", "least_confidence", "bald", "confidence", "predicted")
LABELLED = ("u_y", "p_label", "el2n", "p_clean")
# beside the scores of a row: its mark, XOR a number for the probes and settings that scored it
SCORE_KEY = "score_key"
SCORES = (*UNLABELLED, *LABELLED, SCORE_KEY)
# those that rows with several decisions have none of
OF_ONE_CLASS = ("predicted", "p_clean")
# rows between two writes of the cache
PART = 16_384
# bytes of features that may be kept for the trials of a plan
KEPT = 2**30


def score_batch(logits: Tensor, labels: Tensor | None, gauge: str = "invariant") -> dict[str, Tensor]:
    """All score columns of a batch but `p_clean`, which needs the whole pool; formulas in `uncertainty.py`."""
    each = two_classes(logits).softmax(2)
    p = each.mean(1)
    top = p.topk(2, 1)
    table = {
        "u_x": batch_uncertainty(logits, None, gauge),
        "entropy": entropy_of(p),
        "margin": top.values[:, 0] - top.values[:, 1],
        "least_confidence": 1 - top.values[:, 0],
        "bald": (entropy_of(p) - entropy_of(each).mean(1)).clamp(min=0),
        "confidence": top.values[:, 0],
        "predicted": top.indices[:, 0],
    }
    if labels is not None:
        hot = torch.nn.functional.one_hot(labels, p.shape[1]).to(p.dtype)
        table |= {
            "u_y": batch_uncertainty(logits, labels, gauge),
            "p_label": p.gather(1, labels[:, None])[:, 0],
            "el2n": (each - hot[:, None]).norm(dim=2).mean(1),
            "likelihoods": label_likelihoods(p, labels),
        }
    between, total = spread_sums(logits)
    return table | {"between": between, "total": total}


def score_rows(
    probes: Probes,
    data: Dataset,
    labels: Tensor | list[list[int]] | None = None,
    *,
    gauge: str = "invariant",
    batch_size: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[dict[str, Tensor], LabelNoise | None]:
    """The score table of a pool, and the label noise fitted to it.

    Every process of `accelerate launch` or `torchrun` scores its share of each batch; all of them return the table.

    Args:
        probes: what to ask.
        data: the pool; only scalars are kept of a row.
        labels: `(N,)` classes, or None; of probes that decide about labels or tokens, see `decision_labels`.
        gauge: see `uncertainty`.
        batch_size: rows a process and step.
        cache_dir: keeps finished parts of 16,384 rows, so that a run that was cut off goes on; parts of other probes,
            data or settings are not mistaken for them, and damaged ones are scored again.
        progress: show a bar on the first process.

    Returns:
        `{score: (N,)}` and the noise (None without labels, and for rows with several decisions, whose scores are
        means and lack `predicted` and `p_clean`).

    Raises:
        ValueError: for NaN or infinite logits, labels outside the classes, or probes that all agree.
        RuntimeError: on the other processes, where one raises; or where processes do not see each other.
    """
    accelerator = Accelerator()
    refuse_lone_processes()
    probes.to(accelerator.device)
    hide = not (progress and accelerator.is_main_process)
    with tqdm(total=len(data), desc="scoring", unit=" rows", disable=hide) as bar:
        with same_fate():
            scoring = _Scoring(probes, probes.bind(data), data, labels, gauge, batch_size, accelerator, bar)
            key = None if cache_dir is None else scoring.key()
        # the first process's, as an object that no text can be made of has another key on each
        folder = None if cache_dir is None else Path(cache_dir) / f"scores-{agreed(key)}"
        if folder is not None and is_first() and folder.is_dir():
            with locked(folder):
                sweep(folder, "rows-*.safetensors")
        parts = []
        for start in range(0, len(data), PART):
            places = range(start, min(start + PART, len(data)))
            parts.append(scoring.part(places) if folder is None else scoring.kept_part(places, folder))
            bar.update(places.stop - bar.n)
    together()  # no process reads a cache that another one still writes
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    _check_spread(table.pop("between"), table.pop("total"), len(probes))
    if "features" in table:
        probes.remember(scoring.marks, {"features": table.pop("features")})
    classes, noise = table.pop("classes", None), None
    if labels is not None and classes is not None:
        likelihoods = table.pop("likelihoods")
        noise = fit_likelihoods(likelihoods, int(classes[0]))
        table["p_clean"] = noise.posterior(likelihoods[:, noise.place])
    return {name: table[name] for name in SCORES if name in table}, noise


@dataclass(frozen=True)
class _Scoring:
    """One pass over a pool."""

    probes: Probes
    inputs: Inputs
    data: Dataset
    labels: Tensor | list[list[int]] | None
    gauge: str
    batch_size: int
    accelerator: Accelerator
    bar: tqdm

    @cached_property
    def marks(self) -> Tensor:
        """Of the rows, over all that is fed of them."""
        return fed_marks(self.inputs, self.data)

    def key(self) -> str:
        """What the scores follow from."""
        causes = score_causes(self.probes, self.inputs, self.data, self.gauge) | {
            "rows": digest(self.marks.numpy().tobytes()),
            "labels": self._labels_digest(),
            "batch_size": self.batch_size,  # neighbours in a batch change last digits, and padding
            "part": PART,
        }
        return digest(json.dumps(causes, sort_keys=True))[:16]

    def _labels_digest(self) -> str | None:
        if isinstance(self.labels, Tensor):
            return digest(self.labels.long().numpy().tobytes())
        return None if self.labels is None else digest(json.dumps(self.labels))

    def kept_part(self, places: range, folder: Path) -> dict[str, Tensor]:
        """Some rows' scores, from the folder if they are there, else into it."""
        file = folder / f"rows-{places.start:012d}.safetensors"
        table = agreed(_read_part(file, len(places)) if is_first() else None)
        if table is None:
            table = self.part(places)
            if is_first():
                with locked(folder):
                    write_whole(file, sealed(table))
        return table

    def part(self, places: range) -> dict[str, Tensor]:
        """The scores of some rows, each process asking the probes about its share of every batch."""
        rows = _Numbered(self.data, places, self.inputs)
        own = {"generator": torch.Generator()}  # else every pass takes one of the run's random numbers
        loader = DataLoader(rows, self.batch_size, collate_fn=_Collate(self.inputs), **own)
        loader = self.accelerator.prepare(loader)
        table: dict[str, Tensor] = {}
        for numbers, scores in self._batches(loader):
            scores = {name: value.to(self.accelerator.device) for name, value in scores.items()}
            gathered = self.accelerator.gather_for_metrics({"numbers": numbers} | scores)
            where = gathered.pop("numbers").cpu() - places.start
            for name, value in gathered.items():
                if name not in table:
                    table[name] = torch.empty(len(places), *value.shape[1:], dtype=value.dtype)
                table[name][where] = value.cpu()  # by number: it does not matter in which order processes deliver
            self.bar.update(len(where))
        return table

    def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """This process's rows and their scores, batch by batch; a batch that fails, fails on all processes."""
        batches, first = iter(loader), True
        while True:
            batch = scores = None
            with same_fate():
                batch = next(batches, None)
                if batch is not None:
                    scores = self._batch(batch[0].cpu(), batch[1], first)
            if batch is None:
                return
            first = False
            yield batch[0], scores

    def _batch(self, numbers: Tensor, batch: Any, first: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            answer = self.probes.answer(send_to_device(batch, self.accelerator.device))
        logits, given = answer.pop("logits"), None
        if self.probes.task != "classes":
            return self._decided(numbers, batch, logits)
        if self.labels is not None:
            if first:  # once a part: the whole column, so that the error counts all rows
                check_labels(self.labels, max(2, logits.shape[2]), len(self.labels))
            given = self.labels[numbers].to(logits.device)
        if not logits.isfinite().all():
            _check_fed(batch, numbers, self.inputs)
        kept = {name: x for name, x in answer.items() if 4 * len(self.data) * x.shape[1] <= KEPT}
        if self.inputs.fed_columns(self.data) is None:  # augmented rows are others the next time
            kept = {}
        return _checked(logits, given, numbers, self.gauge) | kept

    def _decided(self, numbers: Tensor, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        """Means over the decisions of each row."""
        if not logits.isfinite().all():
            _check_fed(batch, numbers, self.inputs)
        given = None if self.labels is None else [self.labels[i] for i in numbers.tolist()]
        return decided_scores(self.probes.task, logits, batch, given, numbers, self.gauge)


def decided_scores(
    task: str, logits: Tensor, inputs: Any, labels: Sequence[Sequence[int]] | None, places: Tensor, gauge: str
) -> dict[str, Tensor]:
    """The scores of a batch whose rows have several decisions, means over these; see `decisions_of`."""
    flat, given, row = decisions_of(logits, task, inputs, labels, places)
    return means_by_row(_checked(flat, given, places[row.cpu()], gauge), row, len(logits))


def fed_marks(inputs: Inputs, data: Dataset) -> Tensor:
    """`row_marks` over the columns that decide what is fed."""
    return row_marks(data, _fed_columns(inputs, data))


def _fed_columns(inputs: Inputs, data: Dataset) -> list[str]:
    """The columns that decide what is fed; all but labels and scores where that is not known."""
    columns = inputs.fed_columns(data)
    if columns is None:
        columns = [name for name in data.column_names if name not in {*NOT_INPUTS, *SCORES, *inputs.aside}]
    return columns


def drawing_ids(probes: Probes, data: Dataset, aside: Collection[str] = ()) -> Tensor:
    """Ids to draw by for rows that have none, `(N,)` int64: of what probes are fed, so that no order of rows counts.

    Args:
        probes: what is fed to them is what a row is known by.
        data: the rows, scored or not.
        aside: columns that are not to be looked at, such as labels where they are not known.
    """
    others = [name for name in data.column_names if name not in {*SCORES, "weight", "inclusion_probability", *aside}]
    return content_ids(data, _fed_columns(probes.bind(data), data), others)


def score_keys(probes: Probes, data: Dataset, gauge: str, label_column: str | None) -> Tensor:
    """The column `score_key`, `(N,)` int64: another one for other probes, settings, rows or labels."""
    inputs = probes.bind(data)
    columns = {*_fed_columns(inputs, data), *([] if label_column is None else [label_column])}
    causes = score_causes(probes, inputs, data, gauge) | {"labelled": label_column is not None}
    number = int(digest(json.dumps(causes, sort_keys=True))[:15], 16)
    return row_marks(data, columns) ^ number


def score_causes(probes: Probes, inputs: Inputs, data: Dataset, gauge: str) -> dict[str, Any]:
    """All beside the rows that scores follow from, plain values: of the cache's key, and of `SCORE_KEY`."""
    return {
        "probes": probes.fingerprint,
        "number": len(probes),
        "inputs": inputs.describe(),
        "gauge": gauge,
        **({} if probes.task == "classes" else {"task": probes.task}),  # keys of earlier versions stay what they were
    } | reading_causes(inputs, data)


def reading_causes(inputs: Inputs, data: Dataset) -> dict[str, Any]:
    """What decides, beside what is stored of a row, how it is read: plain values."""
    options = dict(data.format["format_kwargs"])
    transform = options.pop("transform", None) if data.format["type"] == "custom" else None
    return {
        "transform": identity(transform),
        "format": {name: repr(value) for name, value in options.items()},
        "decoded": {name: repr(data.features[name]) for name in _fed_columns(inputs, data) if is_decoded(data, name)},
    }


def _read_part(file: Path, rows: int) -> dict[str, Tensor] | None:
    """A kept part; None where there is none, or it is damaged."""
    if not file.is_file():
        return None
    try:
        table, notes = read_sealed(file)
    except ValueError:
        return None
    fits = notes is not None and {column.shape[:1] for column in table.values()} == {(rows,)}
    return table if fits else None


def _check_fed(batch: Any, places: Tensor, inputs: Inputs) -> None:
    """Raise a `ValueError` for rows that are NaN or infinite themselves, before probes are blamed."""
    for name, value in batch.items() if hasattr(batch, "items") else [(inputs.column, batch)]:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            bad = (~value.flatten(1).isfinite()).any(1).nonzero().flatten()
            raise ValueError(
                f"column {name!r} is NaN or infinite in row {places[bad[0]].item()} ({len(bad)} rows of its batch); "
                "fill missing values in, or leave such rows out"
            )


def _checked(logits: Tensor, labels: Tensor | None, places: Tensor, gauge: str) -> dict[str, Tensor]:
    """The scores of a batch; errors name rows of the pool, not of the batch."""
    if not logits.isfinite().all():
        bad = (~logits.isfinite()).any(2)
        row, probe = bad.nonzero()[0].tolist()
        raise ValueError(
            f"probe {probe} gives NaN or infinite logits for row {places[row].item()} ({int(bad.any(1).sum())} rows "
            "of its batch have some); train the probe again (a lower learning rate, float32), or leave the rows out"
        )
    logits, labels = check_logits(logits, labels)
    table = score_batch(logits, labels, gauge)
    for name in table.keys() & {"u_x", "u_y"}:
        check_found(table[name], places)
    return table | {"classes": torch.full((len(logits),), max(2, logits.shape[2]))}


def _check_spread(between: Tensor, total: Tensor, probes: int) -> None:
    spread = (between.sum() / total.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt().item()
    if spread < LEAST_SPREAD:
        raise ValueError(
            f"the {probes} probes agree on all {len(total)} rows (relative spread {spread:.1e}), so there is no "
            "uncertainty to read off. A convex probe, such as a linear head, ends at the same weights from any seed: "
            "train each probe on a bootstrap sample (bootstrap=True, the default of train_probes and LinearProbes)"
        )


class _Numbered(torch.utils.data.Dataset):
    """Rows with their place in the pool, read batch by batch."""

    def __init__(self, data: Dataset, places: range, inputs: Inputs) -> None:
        self.data, self.places, self.inputs = data, places, inputs

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        places = [self.places[i] for i in numbers]
        return list(zip(places, self.inputs.read(self.data, places), strict=True))


class _Collate:
    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __call__(self, rows: list[tuple[int, dict[str, Any]]]) -> tuple[Tensor, Any]:
        return torch.tensor([number for number, _ in rows]), self.inputs([row for _, row in rows])
