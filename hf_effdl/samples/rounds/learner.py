"""`ActiveLearner`: choose rows, have them labelled, train, and again."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_effdl.checks import one_of, path, real_number, whole_number
from hf_effdl.files import damaged, digest, locked, read_json, sweep, write_json
from hf_effdl.processes import agreed, decided, is_first, same_fate
from hf_effdl.samples.drawing.checks import check_seed
from hf_effdl.samples.probes.linear_probes import LinearProbes
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.row_marks import row_marks
from hf_effdl.samples.probes.scoring import score_rows
from hf_effdl.samples.rounds.answers import checked_labels
from hf_effdl.samples.rounds.strategies import STRATEGIES, next_rows
from hf_effdl.samples.scores.numbers import as_numbers


REMEDY = "remove it and the rounds after it"
Answers = Callable[[Dataset, Sequence[int], int], list[Any] | None]


class ActiveLearner:
    """Rounds of choosing rows of a pool, asking for their labels, and training on all labels so far.

    Each round is a file in `output_dir`: which rows were asked about, written before anyone is asked; then the labels;
    then what `evaluate` said. A run that was cut off, or that waits for a person, goes on where it was.

    Args:
        pool: rows without labels; a label column that they have is not looked at, unless `answers` does.
        train: `(labelled rows, seed) -> Probes`, from rows of the pool with the column `label`.
        answers: `(rows, their places, number of the round) -> labels`, or None while they are not there:
            `ColumnAnswers("label")`, `CsvAnswers(folder)`, or a function.
        output_dir: for the rounds.
        batch: rows a round.
        first: rows of the first round, before there are probes; default: `batch`.
        strategy: see `next_rows`.
        embed: `rows -> (N, d)` features, for strategies that look for variety; default: those of `LinearProbes`, from
            the second round on.
        evaluate: `probes -> number`, such as an accuracy on rows of its own, noted each round.
        label_column: name of the labels among the rows that `train` gets.
        batch_size: rows that are scored at once.
        seed: of draws and of training.

    Raises:
        ValueError: for unknown strategies, an empty pool, or an `output_dir` with rounds over another pool or with
            other settings.

    Example:
        >>> import tempfile
        >>> from hf_effdl import ColumnAnswers
        >>> rows = {"features": torch.randn(90, 4).tolist(), "label": [0, 1, 2] * 30}
        >>> def train(rows, seed):
        ...     return LinearProbes.train(None, rows, input_column="features", steps=5, seed=seed)
        >>> pool, folder = Dataset.from_dict(rows), tempfile.mkdtemp()
        >>> learner = ActiveLearner(pool, train, ColumnAnswers(), folder, batch=15, strategy="random")
        >>> learner.run(rounds=2), len(learner.labelled)
        (True, 30)
    """

    def __init__(
        self,
        pool: Dataset,
        train: Callable[[Dataset, int], Probes],
        answers: Answers,
        output_dir: str | os.PathLike,
        *,
        batch: int = 50,
        first: int | None = None,
        strategy: str = "default",
        embed: Callable[[Dataset], Tensor] | None = None,
        evaluate: Callable[[Probes], float] | None = None,
        label_column: str = "label",
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if not isinstance(pool, Dataset) or not len(pool):
            raise ValueError("pool must be a datasets.Dataset with rows")
        for name, given in (("train", train), ("answers", answers), ("embed", embed), ("evaluate", evaluate)):
            if not callable(given) and (given is not None or name in ("train", "answers")):
                raise TypeError(f"{name} is a {type(given).__name__}: pass a function, see ActiveLearner")
        self.pool, self.train, self.answers, self.folder = pool, train, answers, path("output_dir", output_dir)
        self.batch = whole_number("batch", batch, 1)
        self.first = self.batch if first is None else whole_number("first", first, 1)
        self.strategy, self.seed = one_of("strategy", strategy, STRATEGIES), check_seed(seed)
        self.embed, self.evaluate = embed, evaluate
        self.label_column, self.batch_size = label_column, batch_size
        self.probes: Probes | None = None
        self._features: Tensor | None = None
        settings = {"batch": self.batch, "first": self.first, "strategy": strategy, "seed": self.seed}
        shown = [name for name in pool.column_names if name != label_column]
        self._job = {"pool": digest(row_marks(pool, shown).numpy().tobytes()), "rows": len(pool)} | settings
        self.history = agreed(self._read() if is_first() else None)

    def run(self, rounds: int) -> bool:
        """Go on until so many rounds are done, or the pool is used up; False where labels are being waited for."""
        for number in range(whole_number("rounds", rounds, 1)):
            if number == len(self.history):
                places = self._chosen(number)
                if not places:
                    return True
                self._keep({"number": number, "asked": places})
            if "labels" not in self.history[number] and not self._label(self.history[number]):
                return False
            if "score" not in self.history[number]:
                self._train(number + 1)
                score = None if self.evaluate is None else real_number("evaluate", self.evaluate(self.probes))
                self._keep(self.history[number] | {"score": score})
        return True

    @property
    def places(self) -> list[int]:
        """Of labelled rows in the pool, in the order in which they were asked about."""
        return [place for step in self.history if "labels" in step for place in step["asked"]]

    @property
    def labelled(self) -> Dataset:
        """The rows that have labels, with the column `label`."""
        return self._rows(len(self.history))

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Rows with labels, and what `evaluate` said, of every finished round."""
        sizes = torch.tensor([len(step["asked"]) for step in self.history]).cumsum(0).tolist()
        return [
            (size, step["score"])
            for size, step in zip(sizes, self.history, strict=True)
            if step.get("score") is not None
        ]

    # ---- a round

    def _chosen(self, number: int) -> list[int]:
        """The next rows, the same on all processes."""
        labelled = torch.zeros(len(self.pool), dtype=torch.bool)
        labelled[self.places] = True
        count = min(self.batch if number else self.first, int((~labelled).sum()))
        if not count:
            return []
        options: dict[str, Any] = {"seed": self.seed + number}
        if number:
            if self.probes is None:
                self._train(number)
            options |= self._seen()
        if self.embed is not None and self._features is None:
            self._features = self._embedded()
        strategy = "random" if not number and self._features is None else self.strategy
        return agreed(next_rows(strategy, count, labelled, self._features, **options).tolist())

    def _embedded(self) -> Tensor:
        """What `embed` gives of the pool."""
        features = as_numbers(self.embed(self.pool), "what embed returned").float()
        if features.ndim != 2 or len(features) != len(self.pool) or not features.isfinite().all():
            raise ValueError(
                f"embed returned features of shape {tuple(features.shape)}, or with NaN or infinite ones; it must "
                f"return a finite vector for each of the {len(self.pool)} rows of the pool"
            )
        return features

    def _seen(self) -> dict[str, Any]:
        """What the probes say of the pool."""
        options: dict[str, Any] = {}
        shown = [name for name in self.pool.column_names if name != self.label_column]
        rows = self.pool.select_columns(shown)
        options["table"], _ = score_rows(self.probes, rows, None, batch_size=self.batch_size, progress=False)
        if self.strategy == "badge":
            if self.probes.task != "classes":
                raise ValueError(
                    f"strategy='badge' needs one class a row, and the probes decide about {self.probes.task}; choose "
                    "another strategy"
                )
            parts = [z.softmax(2).mean(1) for z in self.probes.batches(rows, self.batch_size)]
            options["probabilities"] = torch.cat(parts)
        if self.embed is None and self._features is None and isinstance(self.probes, LinearProbes):
            self._features = self.probes.encode(rows, self.batch_size).cpu()
        if self.strategy == "default" and self.probes.probe_set is not None:
            seen = self.probes.out_of_bag(self.batch_size)
            known = ~seen.isnan().any(1)
            right = seen[known].argmax(1) == self.probes.probe_set.labels[known]
            options["accuracy"] = right.double().mean().item() if len(right) else None
        return options

    def _label(self, step: dict[str, Any]) -> bool:
        """Ask for a round's labels; whether they are there."""
        places = step["asked"]
        labels = decided(lambda: self.answers(self.pool.select(places), places, step["number"]))
        if labels is None:
            return False
        before = [label for earlier in self.history for label in earlier.get("labels", [])]
        self._keep(step | {"labels": checked_labels(labels, len(places), before[:1])})
        return True

    def _train(self, rounds: int) -> None:
        try:
            self.probes = self.train(self._rows(rounds), self.seed + rounds)
        except Exception as error:
            if rounds:
                error.add_note(
                    f"It was trained on the labels in {self._file(rounds - 1)} and of the rounds before. Where one is "
                    "mistaken, mend it where it was answered, remove the files of that round and later, and run again"
                )
            raise
        if not isinstance(self.probes, Probes):
            raise TypeError(f"train returned a {type(self.probes).__name__}; it must return Probes")

    def _rows(self, rounds: int) -> Dataset:
        """The rows of the first rounds, with their labels."""
        steps = [step for step in self.history[:rounds] if "labels" in step]
        rows = self.pool.select([place for step in steps for place in step["asked"]])
        if not steps:
            return rows.remove_columns([name for name in (self.label_column,) if name in rows.column_names])
        rows = rows.remove_columns(self.label_column) if self.label_column in rows.column_names else rows
        return rows.add_column(self.label_column, [label for step in steps for label in step["labels"]])

    # ---- files

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.json"

    def _keep(self, step: dict[str, Any]) -> None:
        with same_fate():
            if is_first():
                with locked(self.folder):
                    sweep(self.folder, "round-*.json")
                    self._check_kept(step)
                    write_json(self._file(step["number"]), self._job | step)
        self.history[step["number"] :] = [step]

    def _check_kept(self, step: dict[str, Any]) -> None:
        """Refuse to write over a round of another run, which began while this one was under way."""
        file = self._file(step["number"])
        if not file.is_file():
            return
        kept = self._read_round(file)
        if other := [name for name, value in kept.items() if name not in step or step[name] != value]:
            raise ValueError(
                f"{file} has another {' and '.join(other)} by now: two runs write into one folder; wait for the other "
                "and make the learner again, or choose another output_dir"
            )

    def _read(self) -> list[dict[str, Any]]:
        """The rounds so far."""
        history: list[dict[str, Any]] = []
        while (file := self._file(len(history))).is_file():
            step = self._read_round(file)
            known = {place for earlier in history for place in earlier["asked"]}
            unfinished = history and not {"labels", "score"} <= history[-1].keys()
            if known & set(step["asked"]) or step.get("number") != len(history) or unfinished:
                raise damaged(file, "it is no round after those before it", REMEDY)
            history.append(step)
        return history

    def _read_round(self, file: Path) -> dict[str, Any]:
        step = read_json(file, remedy=REMEDY)
        if not isinstance(step, dict):
            raise damaged(file, "it holds no round", REMEDY)
        other = [name for name, value in self._job.items() if step.get(name) != value]
        if other:
            raise ValueError(
                f"{file} is of a run with another {' and '.join(other)}; choose another output_dir, or set what it had"
            )
        asked, labels = step.get("asked"), step.get("labels")
        if not _are_places(asked, len(self.pool)) or (labels is not None and not _one_each(labels, asked)):
            raise damaged(file, "its rows are none of the pool, or have not a label each", REMEDY)
        return {name: value for name, value in step.items() if name not in self._job}


def _are_places(asked: Any, rows: int) -> bool:
    """Whether they are places of rows, each once."""
    if not isinstance(asked, list) or not all(type(place) is int and 0 <= place < rows for place in asked):
        return False
    return 0 < len(asked) == len(set(asked))


def _one_each(labels: Any, asked: list[int]) -> bool:
    return isinstance(labels, list) and len(labels) == len(asked)
