"""A stream of rows in, the chosen ones out, in one pass."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from hf_effdl.checks import instance, real_number, whole_number
from hf_effdl.processes import same_fate
from hf_effdl.samples.drawing.checks import check_rows, check_seed
from hf_effdl.samples.drawing.draws import priority_chances, priority_keys
from hf_effdl.samples.drawing.hashing import check_once, hash_ids
from hf_effdl.samples.drawing.weights import WEIGHTS, check_bias, loss_weights, weight_column
from hf_effdl.samples.scale.score_shards import checked_scores
from hf_effdl.samples.scale.scorers import RowScorer, as_scorer


def select_stream(
    stream: Iterable[Mapping[str, Any]],
    budget: int,
    scorer: RowScorer | None = None,
    *,
    score: str = "u_x",
    id_column: str | None = None,
    weights: str = "exact",
    seed: int = 0,
    batch_rows: int = 256,
    force: bool = False,
) -> Dataset:
    """Choose exactly `budget` rows of a stream in proportion to a score, in one pass: `priority_sample` on the way.

    Memory for about three budgets of rows, whatever comes. Several processes each pass a part of the stream (as
    `datasets.distributed.split_dataset_by_node` makes), and all return the same rows, those of the whole stream.

    Args:
        stream: an `IterableDataset`, or any iterable of rows as mappings.
        budget: rows to choose, 1 to all there are.
        scorer: `SFTScorer`, `ProbeScorer` or the like; None: rows have the column `score` already.
        score: what to draw in proportion to, not negative; `"uniform"` for none.
        id_column: integers or texts that name the rows; None: their number in the stream, in a single process only.
        weights: `"exact"` (one over the probability), `"damped"`, `"p_label"` or `"none"`, see `loss_weights`.
        seed: of the hash that draws: the same rows for the same ids, in any order.
        batch_rows: rows that are scored together.
        force: allow a label-dependent score without weights.

    Returns:
        The chosen rows, in the order of their hashes' ids, with `weight` (mean 1) and `inclusion_probability`.

    Raises:
        ValueError: for unknown names, fewer rows than the budget, scores that are missing, negative, NaN or infinite,
            rows with columns of the names that come in or without those that weights are made of, an id that comes
            twice among the candidates, or no ids on several processes.
        TypeError: for rows that are no mappings, ids that are neither integers nor texts, or a scorer that is none.
        RuntimeError: on the other processes, where one raises.

    Example:
        >>> rows = ({"text": str(i), "u_x": 1.0} for i in range(100))
        >>> chosen = select_stream(rows, 10)
        >>> len(chosen), chosen.column_names
        (10, ['text', 'u_x', 'weight', 'inclusion_probability'])

    Source: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums", JACM 2007.
    """
    state = PartialState()
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: it must be one of {tuple(WEIGHTS)}")
    check_bias(score, weights, force)
    if id_column is None and state.num_processes > 1:
        raise ValueError("id_column=None: the parts of several processes need ids that name rows across them")
    budget, best = check_rows(budget), _Best(check_rows(budget), check_seed(seed))
    scorer, size = None if scorer is None else as_scorer(scorer), whole_number("batch_rows", batch_rows, 1)
    with same_fate():
        for rows, first in _batches(stream, size):
            table = {} if scorer is None else _scored(scorer, rows, first)
            _check_names(rows, table, weights, score, first)
            best.add(rows, _column(score, rows, table, first), _ids(rows, id_column, first), table)
    best = best.of_all()
    rows, ids, scores, tau = best.result()
    chances = priority_chances(scores, tau)
    name = weight_column(weights, score, rows[0])
    given = None if name is None else torch.tensor([_number(row[name], name) for row in rows], dtype=torch.float64)
    shares = loss_weights(weights, probabilities=chances, uncertainty=given, p_label=given)
    extra = zip(shares.tolist(), chances.tolist(), strict=True)
    return _dataset([row | {"weight": w, "inclusion_probability": p} for row, (w, p) in zip(rows, extra, strict=True)])


def _batches(stream: Iterable[Mapping[str, Any]], size: int) -> Iterator[tuple[list[dict], int]]:
    rows, first = iter(instance("stream", stream, Iterable, "a streamed data set, or rows as dicts")), 0
    while batch := list(islice(rows, size)):
        for i, row in enumerate(batch):
            instance(f"row {first + i} of the stream", row, Mapping, "rows as dicts")
        yield [dict(row) for row in batch], first
        first += len(batch)


def _scored(scorer: RowScorer, rows: list[dict], first: int) -> dict[str, Tensor]:
    where = f"rows {first} to {first + len(rows) - 1} of the stream"
    return checked_scores(scorer.score_rows(_dataset(rows), "the stream", first), len(rows), where)


def _dataset(rows: list[dict]) -> Dataset:
    """Rows as a data set with the columns of all of them; `Dataset.from_list` takes those of the first."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def _check_names(rows: list[dict], table: Mapping[str, Tensor], weights: str, score: str, first: int) -> None:
    """Refuse rows that have columns of the names that come in, or lack what weights are made of."""
    new = {"weight", "inclusion_probability", *table}
    if clash := sorted(new & {name for row in rows for name in row}):
        raise ValueError(f"the rows of the stream have the columns {clash} already; remove or rename them")
    name = weight_column(weights, score, {**rows[0], **table})
    if name is None or name in table:
        return
    if (bad := next((i for i, row in enumerate(rows) if row.get(name) is None), None)) is not None:
        raise ValueError(f"weights={weights!r} needs {name!r}, which row {first + bad} of the stream does not have")


def _column(name: str, rows: list[dict], table: Mapping[str, Tensor], first: int) -> Tensor:
    """A score of each row, finite and not negative."""
    if name == "uniform":
        return torch.ones(len(rows), dtype=torch.float64)
    if name not in table and name not in rows[0]:
        raise ValueError(f"the rows have {sorted(rows[0])} and the scorer gives {sorted(table)}, but no {name!r}")
    values = table[name] if name in table else torch.tensor([_number(row.get(name), name) for row in rows])
    values = values.double().cpu()
    bad = (~(values.isfinite() & (values >= 0))).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{name!r} is {values[bad[0]].item()} in row {first + int(bad[0])} of the stream; scores must be finite "
            "and not negative"
        )
    return values


def _number(value: Any, name: str) -> float:
    return float("nan") if value is None else real_number(f"{name!r} in a row of the stream", value)


def _ids(rows: list[dict], name: str | None, first: int) -> Tensor:
    if name is None:
        return torch.arange(first, first + len(rows))
    if missing := [i for i, row in enumerate(rows) if row.get(name) is None]:
        raise ValueError(f"row {first + missing[0]} of the stream has no {name!r}; give every row an id")
    return hash_ids([row[name] for row in rows])


class _Best:
    """The rows with the largest keys so far, one more than the budget."""

    def __init__(self, budget: int, seed: int) -> None:
        self.budget, self.seed, self.seen = budget, seed, 0
        self.keys = torch.empty(0, dtype=torch.float64)
        self.ids, self.scores, self.rows = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.float64), []

    def add(self, rows: list[dict], scores: Tensor, ids: Tensor, table: Mapping[str, Tensor]) -> None:
        keys, self.seen = priority_keys(scores, self.seed, ids), self.seen + len(rows)
        least = self.keys.min() if len(self.keys) > self.budget else -torch.inf
        for i in (keys > least).nonzero().flatten().tolist():
            self.rows.append(rows[i] | {name: x[i].item() for name, x in table.items() if x.ndim == 1})
        inside = keys > least
        self._extend(keys[inside], ids[inside], scores[inside])

    def _extend(self, keys: Tensor, ids: Tensor, scores: Tensor) -> None:
        self.keys, self.ids = torch.cat([self.keys, keys]), torch.cat([self.ids, ids])
        self.scores = torch.cat([self.scores, scores])
        if len(self.keys) > 2 * self.budget + 256:
            self._cut()

    def _cut(self) -> None:
        if len(self.keys) > self.budget + 1:
            kept = self.keys.topk(self.budget + 1).indices.sort().values
            self.keys, self.ids, self.scores = self.keys[kept], self.ids[kept], self.scores[kept]
            self.rows = [self.rows[i] for i in kept.tolist()]

    def of_all(self) -> "_Best":
        """Those of all processes together."""
        if PartialState().num_processes == 1:
            return self
        self._cut()
        whole = _Best(self.budget, self.seed)
        for keys, ids, scores, rows, seen in gather_object([(self.keys, self.ids, self.scores, self.rows, self.seen)]):
            whole.rows += rows
            whole.seen += seen
            whole._extend(keys, ids, scores)
        return whole

    def result(self) -> tuple[list[dict], Tensor, Tensor, float]:
        """Rows, ids and scores, by ids, and the threshold that `priority_chances` takes."""
        check_rows(self.budget, self.seen)
        self._cut()
        check_once(self.ids.sort().values, "ids of the stream")
        tau = self.keys.min().item() if len(self.keys) > self.budget else -torch.inf
        order = [i for i in self.ids.argsort().tolist() if self.keys[i] > tau]
        return [self.rows[i] for i in order], self.ids[order], self.scores[order], tau
