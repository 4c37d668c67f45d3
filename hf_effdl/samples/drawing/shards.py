"""Sampling rows whose scores lie in Parquet shards, too many to hold in memory.

`plan_shards` reads the shards four times, batch by batch, a thread a shard:

    1. a histogram of the priority keys          finds the bin that holds tau, the largest key left out
    2. the keys in that bin                      find tau; about budget / 32 of them
    3. the raw weights of rows with key > tau    are summed, so that weights can have mean 1
    4. rows with key > tau                       are written, one output shard for each input shard

Holding the keys of a whole budget would save a reading, but memory would grow with the budget; so it hardly does.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_effdl.files import damaged, digest, locked, read_json, sweep, write_json, write_whole
from hf_effdl.samples.drawing.checks import check_choice, check_rows, check_seed
from hf_effdl.samples.drawing.draws import priority_chances, priority_keys
from hf_effdl.samples.drawing.hashing import hash_ids, hashed_uniform
from hf_effdl.samples.drawing.probabilities import ROOM
from hf_effdl.samples.drawing.shard_files import Shards
from hf_effdl.samples.drawing.weights import WEIGHTS, check_bias, loss_weights


# Readers of Parquet folders pass over names that begin with _ or a dot.
MANIFEST, PROGRESS = "_plan.json", "_plan.progress.json"
# Floats are ordered as their bits are, negative ones the other way round. The sign, the exponent's 11 bits and the
# mantissa's first 5 make bins that span a factor of 33 / 32 at most, whatever the scores: a 32nd of a budget is
# expected in each.
BINS, BIN_SHIFT = 2**17, 47
# Of this many rows, taken by a hash of their ids, the ids are compared: all of a small table, and of a large one
# enough to see ids that are counted anew in each file, or a file that comes twice.
COMPARED_IDS = 2**20
ROW_GROUP = 2**20


def plan_shards(
    files: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    budget: int,
    *,
    score: str = "u_x",
    id_column: str | None = "row_id",
    clip: float | None = None,
    weights: str = "exact",
    beta: float = 0.1,
    seed: int = 0,
    batch_rows: int = 2**16,
    workers: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Choose exactly `budget` rows of a score table in Parquet shards: `priority_sample` without the memory.

    The rows with the largest keys `s_i / U_i`, `U_i = hash(seed, id_i)`; with tau the next key, their probabilities
    are `min(1, s_i / tau)`. Neither the cut into shards nor their order matters. Input shard k gives the output shard
    `plan-k-of-n.parquet` with the columns

        row_id                  of the chosen rows, in the order of the input
        inclusion_probability   float64 in (0, 1]
        weight                  float64, mean 1 over all shards

    Every file comes into being whole, by a rename, and `_plan.json` comes last. After a kill, the same call goes on
    from the finished shards; if settings or input files (size, time of change) are others, it starts over. Of two
    calls for one folder the second waits for the first; a finished shard that was damaged since is written again.

    Args:
        files: Parquet files with the same columns; their order is that of the output.
        output_dir: folder for the output; made if need be.
        budget: number of rows, 1 to all there are.
        score: column to draw in proportion to, non-negative.
        id_column: column of integers or texts that name the rows, each row another. None, or no column `"row_id"`:
            the row's number, counted through all files in the order given.
        clip: cap of the score, see `clip_scores`.
        weights: see `loss_weights`; `"damped"` reads column `u_x` (`u_y` if there is one and `score` is not `u_x`),
            `"p_label"` column `p_label`.
        beta: see `loss_weights`.
        seed: of the hash that draws.
        batch_rows: rows that a thread handles at once; few enough to stay in its cache.
        workers: shards read at a time; default: as many as torch has threads.
        force: allow a label-dependent score without weights.

    Returns:
        what `_plan.json` holds: `settings`, `inputs` (file, size, mtime_ns, rows), `outputs` (file, selected, sha256),
        `rows`, `selected`, `tau` (0 if all rows are in), `least_key` (how it is compared), `weight_scale` (weight over
        raw weight), `max_weight` and `kish`.

    Raises:
        ValueError: for no files, missing columns, scores that are NaN, infinite, negative or missing (with file and
            row), a budget out of range, or row ids that occur twice: in up to 2^20 rows wherever they are, in more
            where it is no rare exception, or at the edge of the sample.
        TypeError: for scores that are no numbers, or ids that are not all integers or all texts.
        RuntimeError: if the input files change while they are read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pyarrow as pa, pyarrow.parquet as pq
        >>> with TemporaryDirectory() as folder:
        ...     pq.write_table(pa.table({"row_id": range(100), "u_x": [1.0] * 100}), f"{folder}/scores.parquet")
        ...     summary = plan_shards([f"{folder}/scores.parquet"], f"{folder}/plan", budget=10)
        ...     rows = pq.read_table(f"{folder}/plan/plan-00000-of-00001.parquet")
        >>> rows.num_rows, rows.column_names, summary["selected"]
        (10, ['row_id', 'inclusion_probability', 'weight'], 10)

    Source: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums", JACM 2007.
    """
    check_choice("weights", weights, WEIGHTS)
    check_bias(score, weights, force)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: a cap must be positive")
    if batch_rows < 1 or (workers is not None and workers < 1):
        raise ValueError(f"batch_rows={batch_rows} and workers={workers} must be 1 or more")
    shards = Shards.open(files, score, id_column, weights, batch_rows, workers)
    budget = check_rows(budget, shards.rows)
    sample = _Sample(shards, budget, weights, check_seed(seed), None if clip is None else float(clip), float(beta))
    with locked(output_dir):
        return _planned(sample, _Folder(Path(output_dir), shards))


def _planned(sample: "_Sample", folder: "_Folder") -> dict[str, Any]:
    """The plan in the folder, gone on with where it was begun; no one else may be writing there."""
    shards = sample.shards
    job = {"settings": sample.settings(), "inputs": shards.inputs, "rows": shards.rows}
    plan = folder.begun()
    names = [{"file": path.name} for path in folder.outputs]
    there = [{"file": one["file"]} for one in plan.get("outputs", ())]
    if "least_key" not in plan or there != names or any(plan.get(key) != value for key, value in job.items()):
        folder.clear(plan)
        tau = sample.threshold()
        keys = {"tau": max(0.0, tau) / ROOM, "least_key": None if tau == -math.inf else tau}
        plan = job | keys | sample.scale(tau) | {"outputs": names}
        folder.keep(PROGRESS, plan)

    folder.drop_damaged(plan)
    tau = -math.inf if plan["least_key"] is None else plan["least_key"]
    selected = shards.each(lambda k: sample.write(k, tau, plan["weight_scale"], folder.outputs[k]))
    if sum(selected) != sample.budget or shards.changed():
        raise RuntimeError(
            f"{sum(selected)} rows were written for a budget of {sample.budget}, or input files changed "
            f"meanwhile; remove {str(folder.path)!r} and start again"
        )
    outputs = [
        {"file": path.name, "selected": count, "sha256": digest(path)}
        for path, count in zip(folder.outputs, selected, strict=True)
    ]
    plan |= {"outputs": outputs, "selected": sample.budget}
    folder.keep(MANIFEST, plan)
    (folder.path / PROGRESS).unlink(missing_ok=True)
    return plan


# ---- the sample


@dataclass(frozen=True)
class _Sample:
    """The draw from the shards, in four readings of them."""

    shards: Shards
    budget: int
    weights: str
    seed: int
    clip: float | None
    beta: float

    def settings(self) -> dict[str, Any]:
        """All that the rows and their weights follow from, beside the input."""
        return {
            "budget": self.budget,
            "score": self.shards.score,
            "id_column": self.shards.id_column,
            "weights": self.weights,
            "seed": self.seed,
            "clip": self.clip,
            "beta": self.beta,
        }

    def threshold(self) -> float:
        """tau, the key that `budget` keys are above."""
        budget = self.budget
        counts, compared = zip(*self.shards.each(self._histogram), strict=True)
        if budget == self.shards.rows:
            self._check_once(compared)
            return -math.inf
        counts = sum(counts)
        or_above = counts.flip(0).cumsum(0).flip(0)
        # the last bin that is reached from above with more than the budget
        tau_bin = int((or_above > budget).sum()) - 1
        keys = torch.cat(self.shards.each(lambda k: self._keys_in(k, tau_bin)))
        tau = keys.kthvalue(int(or_above[tau_bin]) - budget).values.item()
        above = int(or_above[tau_bin] - counts[tau_bin]) + int((keys > tau).sum())
        if above != budget:
            raise ValueError(
                f"{int((keys == tau).sum())} rows have the same key at the edge of the sample, so no "
                f"{budget} rows come first: rows share their id; give each row another one in column "
                f"{self.shards.id_column!r}, or set id_column=None"
            )
        self._check_once(compared)
        return tau

    def _check_once(self, compared: Sequence[Tensor]) -> None:
        """Raise where an id occurs twice among those of all shards that are compared."""
        if self.shards.id_column is None:
            return
        ids = torch.cat(list(compared)).sort().values
        if twice := int((ids[1:] == ids[:-1]).sum()):
            raise ValueError(
                f"{twice} of {len(ids)} rows share their id with another row, in a file or across files; give each "
                f"row another one in column {self.shards.id_column!r}, or set id_column=None"
            )

    def scale(self, tau: float) -> dict[str, float]:
        """The factor that gives the selected rows weights of mean 1, and what the weights are then like."""
        if self.weights == "none":
            return {"weight_scale": 1.0, "max_weight": 1.0, "kish": float(self.budget)}
        sums, squares, largest = zip(*self.shards.each(lambda k: self._weight_sums(k, tau)), strict=True)
        # fsum, as it does not depend on the order of the shards
        total = math.fsum(sums)
        scale = self.budget / total
        return {"weight_scale": scale, "max_weight": max(largest) * scale, "kish": total**2 / math.fsum(squares)}

    def _histogram(self, k: int) -> tuple[Tensor, Tensor]:
        """How many keys fall into each bin, and the ids that are compared with those of the other shards."""
        counts, compared = torch.zeros(BINS, dtype=torch.long), [torch.empty(0, dtype=torch.long)]
        share = min(1.0, COMPARED_IDS / self.shards.rows)
        for _, names, scores, _ in self.shards.batches(k):
            keys = priority_keys(self._clipped(scores), self.seed, names)
            counts += torch.bincount(_bin(keys), minlength=BINS)
            if self.shards.id_column is not None:
                ids = hash_ids(names)
                compared.append(ids if share == 1 else ids[hashed_uniform(0, ids, salt=4) < share])
        return counts, torch.cat(compared)

    def _keys_in(self, k: int, tau_bin: int) -> Tensor:
        inside = [keys[_bin(keys) == tau_bin] for keys in self._keys(k)]
        return torch.cat(inside) if inside else torch.empty(0, dtype=torch.float64)

    def _weight_sums(self, k: int, tau: float) -> tuple[float, float, float]:
        total = squares = largest = 0.0
        for _, _, _, raw in self._selected(k, tau):
            total, squares = total + raw.sum().item(), squares + raw.square().sum().item()
            largest = max(largest, raw.max().item())
        return total, squares, largest

    def write(self, k: int, tau: float, scale: float, path: Path) -> int:
        """Write the output of shard k unless it is there; its number of rows."""
        import pyarrow.parquet as pq

        if not path.is_file():
            write_whole(path, lambda part: self._write_rows(k, tau, scale, part))
        return pq.read_metadata(path).num_rows

    def _write_rows(self, k: int, tau: float, scale: float, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {"row_id": self.shards.id_type(k), "inclusion_probability": pa.float64(), "weight": pa.float64()}
        schema = pa.schema(types, self.shards.notes(k))
        waiting: list[pa.RecordBatch] = []
        rows = 0
        # numbers that hardly repeat gain nothing from a dictionary
        with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
            for ids, inside, chances, raw in self._selected(k, tau):
                columns = [ids.filter(pa.array(inside.numpy())), chances.numpy(), (raw * scale).numpy()]
                waiting.append(pa.record_batch(columns, schema=schema))
                rows += len(chances)
                if rows >= ROW_GROUP:
                    writer.write_table(pa.Table.from_batches(waiting))
                    waiting, rows = [], 0
            writer.write_table(pa.Table.from_batches(waiting, schema))

    def _selected(self, k: int, tau: float) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
        """Of every batch with rows above tau: ids of all rows, mask, and the probabilities and raw weights inside."""
        for ids, names, scores, weighed_by in self.shards.batches(k, weighing=True):
            scores = self._clipped(scores)
            inside = priority_keys(scores, self.seed, names) > tau
            if inside.any():
                chances = priority_chances(scores[inside], tau)
                given = None if weighed_by is None else weighed_by[inside]
                sources = {"probabilities": chances, "uncertainty": given, "p_label": given}
                yield ids, inside, chances, loss_weights(self.weights, **sources, beta=self.beta, normalise=False)

    def _keys(self, k: int) -> Iterator[Tensor]:
        for _, names, scores, _ in self.shards.batches(k):
            yield priority_keys(self._clipped(scores), self.seed, names)

    def _clipped(self, scores: Tensor) -> Tensor:
        return scores if self.clip is None else scores.clamp(max=self.clip)


def _bin(keys: Tensor) -> Tensor:
    bits = keys.view(torch.int64)
    return (torch.where(bits < 0, bits ^ (2**63 - 1), bits) >> BIN_SHIFT) + BINS // 2


# ---- the output


FIELDS = (
    "settings",
    "inputs",
    "rows",
    "tau",
    "least_key",
    "weight_scale",
    "max_weight",
    "kish",
    "outputs",
    "selected",
)
SEAL = "sha256"
OUTPUT = re.compile(r"plan-\d{5}-of-\d{5}\.parquet")


def _seal(plan: Any) -> str:
    return digest(json.dumps(plan, sort_keys=True))


def _is_plan(plan: dict[str, Any]) -> bool:
    """Whether files of a plan, which may be removed, are all that is named, and numbers are numbers."""
    outputs = plan.get("outputs", [])
    if not isinstance(outputs, list):
        return False
    names = [one.get("file") if isinstance(one, dict) else None for one in outputs]
    numbers = [plan.get(name, 0) or 0 for name in ("tau", "least_key", "weight_scale")]
    return all(isinstance(name, str) and OUTPUT.fullmatch(name) for name in names) and all(map(_is_number, numbers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf


class _Folder:
    """Where the output goes: a file for each shard, and the plan, finished or not."""

    def __init__(self, path: Path, shards: Shards) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, count = path, len(shards.inputs)
        self.outputs = [path / f"plan-{k:05d}-of-{count:05d}.parquet" for k in range(count)]
        clash = {output.resolve() for output in self.outputs} & {Path(one["file"]).resolve() for one in shards.inputs}
        if clash:
            raise ValueError(f"output_dir={str(path)!r} holds the input {min(clash)}; choose another folder")
        sweep(path, "plan-*.parquet")
        sweep(path, "_plan*.json")

    def begun(self) -> dict[str, Any]:
        """The plan that the folder holds, finished or not; empty if there is none."""
        file = next((file for name in (MANIFEST, PROGRESS) if (file := self.path / name).is_file()), None)
        if file is None:
            return {}
        remedy = f"remove {str(self.path)!r} and start again"
        plan = read_json(file, remedy=remedy)
        seal = plan.pop(SEAL, None) if isinstance(plan, dict) else None
        # earlier versions wrote none; a name that was changed may be that of the seal
        if seal != _seal(plan) if seal is not None else not (isinstance(plan, dict) and plan.keys() <= set(FIELDS)):
            raise damaged(file, "its content is not what was written", remedy)
        if not _is_plan(plan):
            raise damaged(file, "it names files that are none of a plan, or holds no numbers", remedy)
        return plan

    def keep(self, name: str, plan: dict[str, Any]) -> None:
        """Write the plan with a digest of it."""
        write_json(self.path / name, plan | {SEAL: _seal(plan)})

    def drop_damaged(self, plan: dict[str, Any]) -> None:
        """Remove finished outputs that are not what was written, so that they are written again."""
        for output, path in zip(plan["outputs"], self.outputs, strict=True):
            if "sha256" in output and path.is_file() and digest(path) != output["sha256"]:
                path.unlink()

    def clear(self, plan: dict[str, Any]) -> None:
        """Remove the outputs of this plan and of the one to come."""
        earlier = [self.path / output["file"] for output in plan.get("outputs", ())]
        for file in (*self.outputs, *earlier, self.path / MANIFEST):
            file.unlink(missing_ok=True)
