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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_effdl.samples.drawing.draws import LEAST_SCORE, WEIGHTS, check_rows, loss_weights, priority_keys
from hf_effdl.samples.drawing.plan import LABEL_DEPENDENT


# Readers of Parquet folders pass over names that begin with _ or a dot.
MANIFEST, PROGRESS = "_plan.json", "_plan.progress.json"
# Positive floats are ordered as their bits are. The first 16 below the sign, 11 of the exponent and 5 of the mantissa,
# make bins that span a factor of 33 / 32 at most, whatever the scores: a 32nd of a budget is expected in each.
BINS, BIN_SHIFT = 2**16, 47
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
    from the finished shards; if settings or input files (size, time of change) are others, it starts over.

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
        what `_plan.json` holds: `settings`, `inputs` (file, size, mtime_ns, rows), `outputs` (file, selected), `rows`,
        `selected`, `tau` (0 if all rows are in), `weight_scale` (weight over raw weight), `max_weight` and `kish`.

    Raises:
        ValueError: for no files, missing columns, scores that are NaN, infinite, negative or missing (with file and
            row), a budget out of range, or row ids that occur twice at the edge of the sample.
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
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: it must be one of {WEIGHTS}")
    if score in LABEL_DEPENDENT and weights == "none" and not force:
        raise ValueError(
            f"score={score!r} depends on the label, and weights='none' would train on rows chosen for "
            "their odd labels; set weights='damped', 'p_label' or 'exact', or force=True"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: a cap must be positive")
    if batch_rows < 1 or (workers is not None and workers < 1):
        raise ValueError(f"batch_rows={batch_rows} and workers={workers} must be 1 or more")
    files = [os.fspath(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    inputs, id_column, extra = _inspect(files, score, id_column, weights)
    rows = sum(shard["rows"] for shard in inputs)
    budget = check_rows(budget, rows)
    settings = {
        "budget": budget,
        "score": score,
        "id_column": id_column,
        "weights": weights,
        "seed": int(seed),
        "clip": None if clip is None else float(clip),
        "beta": float(beta),
    }
    shards = _Shards(inputs, score, id_column, extra, clip, weights, beta, seed, batch_rows, workers)

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"plan-{k:05d}-of-{len(files):05d}.parquet" for k in range(len(files))]
    if clash := {path.resolve() for path in outputs} & {Path(file).resolve() for file in files}:
        raise ValueError(f"output_dir={str(folder)!r} holds the input {min(clash)}; choose another folder")
    job = {"settings": settings, "inputs": inputs, "rows": rows}
    plan = _earlier(folder)
    if plan is None or any(plan.get(key) != value for key, value in job.items()):
        earlier = [folder / Path(output["file"]).name for output in (plan or {}).get("outputs", ())]
        for path in outputs + earlier:
            path.unlink(missing_ok=True)
            _temporary(path).unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        tau = shards.threshold(budget, rows)
        plan = job | {"tau": tau} | shards.scale(budget, tau) | {"outputs": [{"file": path.name} for path in outputs]}
        _write_json(folder / PROGRESS, plan)

    selected = shards.write(plan["tau"], plan["weight_scale"], outputs)
    if sum(selected) != budget or any(shard != shard | _stamp(shard["file"]) for shard in inputs):
        raise RuntimeError(
            f"{sum(selected)} rows were written for a budget of {budget}, or input files changed "
            f"meanwhile; remove {str(folder)!r} and start again"
        )
    counts = [{"file": path.name, "selected": count} for path, count in zip(outputs, selected, strict=True)]
    plan |= {"outputs": counts, "selected": budget}
    _write_json(folder / MANIFEST, plan)
    (folder / PROGRESS).unlink(missing_ok=True)
    return plan


@dataclass(frozen=True)
class _Shards:
    """The input, and the four readings of it."""

    inputs: list[dict[str, Any]]
    score: str
    id_column: str | None
    extra: str | None  # the column that weights are made of
    clip: float | None
    weights: str
    beta: float
    seed: int
    batch_rows: int
    workers: int | None

    def threshold(self, budget: int, rows: int) -> float:
        """tau, the key that `budget` keys are above."""
        if budget == rows:
            return 0.0
        counts = sum(self._each(self._histogram))
        or_above = counts.flip(0).cumsum(0).flip(0)
        # the last bin that is reached from above with more than the budget
        tau_bin = int((or_above > budget).sum()) - 1
        keys = torch.cat(self._each(lambda k: self._keys_in(k, tau_bin)))
        tau = keys.kthvalue(int(or_above[tau_bin]) - budget).values.item()
        above = int(or_above[tau_bin] - counts[tau_bin]) + int((keys > tau).sum())
        if above != budget:
            raise ValueError(
                f"{int((keys == tau).sum())} rows have the same key at the edge of the sample, so no "
                f"{budget} rows come first: rows share their id; give each row another one in column "
                f"{self.id_column!r}, or set id_column=None"
            )
        return tau

    def scale(self, budget: int, tau: float) -> dict[str, float]:
        """The factor that gives the selected rows weights of mean 1, and what the weights are then like."""
        if self.weights == "none":
            return {"weight_scale": 1.0, "max_weight": 1.0, "kish": float(budget)}
        sums, squares, largest = zip(*self._each(lambda k: self._weight_sums(k, tau)), strict=True)
        # fsum, as it does not depend on the order of the shards
        total = math.fsum(sums)
        scale = budget / total
        return {"weight_scale": scale, "max_weight": max(largest) * scale, "kish": total**2 / math.fsum(squares)}

    def write(self, tau: float, scale: float, outputs: list[Path]) -> list[int]:
        """Writes the outputs that are not there yet; numbers of rows in all of them."""
        return self._each(lambda k: self._write(k, tau, scale, outputs[k]))

    def _histogram(self, k: int) -> Tensor:
        counts = torch.zeros(BINS, dtype=torch.long)
        for _, _, keys, _ in self._batches(k):
            counts += torch.bincount(_bin(keys), minlength=BINS)
        return counts

    def _keys_in(self, k: int, tau_bin: int) -> Tensor:
        found = [keys[_bin(keys) == tau_bin] for _, _, keys, _ in self._batches(k)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

    def _weight_sums(self, k: int, tau: float) -> tuple[float, float, float]:
        total = squares = largest = 0.0
        for _, _, _, raw in self._selected(k, tau):
            total, squares = total + raw.sum().item(), squares + raw.square().sum().item()
            largest = max(largest, raw.max().item())
        return total, squares, largest

    def _write(self, k: int, tau: float, scale: float, path: Path) -> int:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if path.is_file():
            return pq.read_metadata(path).num_rows
        id_type = pa.int64()
        if self.id_column is not None:
            id_type = pq.read_schema(self.inputs[k]["file"]).field(self.id_column).type
        schema = pa.schema({"row_id": id_type, "inclusion_probability": pa.float64(), "weight": pa.float64()})
        waiting: list[pa.RecordBatch] = []
        rows = 0
        # numbers that hardly repeat gain nothing from a dictionary
        with pq.ParquetWriter(_temporary(path), schema, use_dictionary=False) as writer:
            for ids, inside, chances, raw in self._selected(k, tau):
                columns = [ids.filter(pa.array(inside.numpy())), chances.numpy(), (raw * scale).numpy()]
                waiting.append(pa.record_batch(columns, schema=schema))
                rows += len(chances)
                if rows >= ROW_GROUP:
                    writer.write_table(pa.Table.from_batches(waiting))
                    waiting, rows = [], 0
            writer.write_table(pa.Table.from_batches(waiting, schema))
        os.replace(_temporary(path), path)
        return pq.read_metadata(path).num_rows

    def _selected(self, k: int, tau: float) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
        """Of every batch with rows above tau: ids of all rows, mask, and the probabilities and raw weights inside."""
        for ids, scores, keys, extra in self._batches(k, weighing=True):
            inside = keys > tau
            if inside.any():
                chances = (scores[inside].double().clamp(min=LEAST_SCORE) / tau).clamp(max=1)
                given = extra if extra is None else extra[inside]
                yield (
                    ids,
                    inside,
                    chances,
                    loss_weights(
                        self.weights,
                        probabilities=chances,
                        uncertainty=given,
                        p_label=given,
                        beta=self.beta,
                        normalise=False,
                    ),
                )

    def _batches(self, k: int, weighing: bool = False) -> Iterator[tuple[Any, Tensor, Tensor, Tensor | None]]:
        """Row ids (an Arrow array), scores, keys and, for weighing, what weights are made of."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file, row = self.inputs[k]["file"], 0
        first = sum(shard["rows"] for shard in self.inputs[:k])
        extra = self.extra if weighing else None
        columns = list(dict.fromkeys(name for name in (self.score, self.id_column, extra) if name is not None))
        with pq.ParquetFile(file, pre_buffer=False) as reader:
            for batch in reader.iter_batches(self.batch_rows, columns=columns, use_threads=False):
                scores = _numbers(batch, self.score, file, row)
                if self.clip is not None:
                    scores = scores.clamp(max=self.clip)
                if self.id_column is None:
                    ids = pa.array(torch.arange(first + row, first + row + len(batch)).numpy())
                else:
                    ids = batch.column(self.id_column)
                keys = priority_keys(scores, self.seed, _names(ids, self.id_column, file, row))
                yield ids, scores, keys, None if extra is None else _numbers(batch, extra, file, row)
                row += len(batch)

    def _each(self, reading: Callable[[int], Any]) -> list[Any]:
        """A reading of all shards, in threads, as Arrow and torch release the interpreter's lock."""
        threads = torch.get_num_threads()
        workers = self.workers or min(len(self.inputs), threads)
        # a shard is a thread's work; torch would divide each of its small steps once more and wait for the parts
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(workers) as pool:
                futures = [pool.submit(reading, k) for k in range(len(self.inputs))]
                try:
                    return [future.result() for future in futures]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(threads)


def _bin(keys: Tensor) -> Tensor:
    return keys.view(torch.int64) >> BIN_SHIFT


def _numbers(batch: Any, name: str, file: str, row: int) -> Tensor:
    """A column as a tensor of non-negative numbers."""
    values = torch.tensor(batch.column(name).to_numpy(zero_copy_only=False))  # nothing becomes NaN
    values = values if values.is_floating_point() else values.double()
    low, high = values.aminmax()
    if not (low >= 0 and high < math.inf):
        bad = int((~(values.isfinite() & (values >= 0))).nonzero()[0])
        raise ValueError(
            f"{file}: column {name!r} is {values[bad].item()} at row {row + bad} (missing counts as "
            "NaN); score such rows again so that they are finite and not negative, or leave them out"
        )
    return values


def _names(ids: Any, name: str | None, file: str, row: int) -> Tensor | list[str]:
    """Row ids as the hash takes them."""
    import pyarrow as pa

    if ids.null_count:
        bad = ids.is_null().index(True).as_py()
        raise ValueError(
            f"{file}: column {name!r} is missing at row {row + bad}; give every row an id, or set id_column=None"
        )
    return torch.tensor(ids.to_numpy()) if pa.types.is_integer(ids.type) else ids.to_pylist()


# ---- the files


def _inspect(
    files: list[str], score: str, id_column: str | None, weights: str
) -> tuple[list[dict[str, Any]], str | None, str | None]:
    """What the shards are, the id column that they have, and the column that weights are made of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not files or len({os.path.realpath(file) for file in files}) < len(files):
        raise ValueError(f"files={files}: pass one file or more, and each of them once")
    inputs, schemas = [], []
    for file in files:
        try:
            stamp = _stamp(file)
            with pq.ParquetFile(file) as reader:
                schemas.append(reader.schema_arrow)
                inputs.append({"file": file, "rows": reader.metadata.num_rows} | stamp)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not a Parquet file: {error}") from error
    if id_column == "row_id" and not any("row_id" in schema.names for schema in schemas):
        id_column = None
    extra = {"damped": "u_x", "p_label": "p_label"}.get(weights)
    if weights == "damped" and score != "u_x" and "u_y" in schemas[0].names:
        extra = "u_y"
    for argument, name in (("score", score), ("id_column", id_column), ("weights", extra)):
        for file, schema in zip(files, schemas, strict=True) if name else ():
            if name not in schema.names:
                near = get_close_matches(name, schema.names, 3, 0.4)
                raise ValueError(
                    f"{file} has no column {name!r}; its columns are {schema.names}"
                    + (f", near ones {near}" if near else "")
                    + f"; change {argument}="
                )
            kind, first = schema.field(name).type, schemas[0].field(name).type
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            naming = argument == "id_column"
            if not (pa.types.is_integer(kind) or (text if naming else pa.types.is_floating(kind))):
                raise TypeError(
                    f"{file}: column {name!r} is of type {kind}; cast it to "
                    f"{'integers or texts' if naming else 'numbers'}, or change {argument}="
                )
            if naming and kind != first:
                raise TypeError(
                    f"{file}: column {name!r} is of type {kind}, in {files[0]} of {first}; make them alike"
                )
    return inputs, id_column, extra


def _stamp(file: str) -> dict[str, int]:
    stat = os.stat(file)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The plan that the folder holds, finished or not."""
    for name in (MANIFEST, PROGRESS):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _temporary(path).write_text(json.dumps(value, indent=2) + "\n")
    os.replace(_temporary(path), path)
