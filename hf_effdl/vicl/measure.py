"""Measure the examples of a pool on each other: the performance that strategies, cascades and rankers learn from."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_effdl.files import digest, read_tensors, write_whole
from hf_effdl.vicl.pool.writer import processes
from hf_effdl.vicl.remote_code.examples import CHUNK, Examples, Queries
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.modeling_visual_in_context import VisualInContextModel
from hf_effdl.vicl.remote_code.pool_reader import PoolReader
from hf_effdl.vicl.remote_code.vision_encoder import digest_weights
from hf_effdl.vicl.remote_code.visual_tasks import find_task


logger = get_logger(__name__)
# pool images between two writes of the cache
PART = 16


def measure_examples(
    model: VisualInContextModel,
    pool: PoolReader,
    *,
    candidates: int | None = None,
    queries: int | Iterable[int | str] | None = None,
    exclude: Iterable[int | str] | None = None,
    seed: int = 0,
    metric: Any = None,
    greater_is_better: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Show each pool image its nearest neighbours as examples, and keep how well the frozen model did with them.

    performance[j, k] = metric(F(x_j; x_c, y_c), y_j) for c the k-th nearest other example of pool image j: `queries` x
    `candidates` runs of the frozen model. The table is set on the model (`set_performance`), where the strategies
    "static" and "transfer" find it. Processes of `accelerate launch` or `torchrun` share the images, each on its
    device; all of them return the whole table.

    Before it starts, the first process says on stderr how many runs that is, how many of them were done before, and
    about how long the others take, from a few that are run and timed.

    Args:
        model: a `VisualInContextModel`.
        pool: made with the model's encoder.
        candidates: K examples each (default: the config's, 50); a smaller pool gives all others.
        queries: the pool images to measure on: how many, drawn at random with `seed`; or which, as rows (numbers) or
            ids (texts), each once; None: all.
        exclude: rows or ids of the pool that are neither measured on nor shown as an example, such as the `queries`
            and `dropped` of a `Split`: rankers that are judged on them must not have seen them.
        metric, greater_is_better: see `Examples`; default: the task's own.
        cache_dir: keeps finished parts of 16 images, so that a run that was cut off, or one on more images (a larger
            number, or a list that begins with the same ones), goes on; those of another model, pool, metric (by its
            name), `exclude` or K are not mistaken for them.
        progress: tell the cost and show a bar on the first process.

    Returns:
        candidates `(n, K)` rows of the pool, -1 where not measured, and performance `(n, K)`, larger is better.

    Raises:
        ValueError: for a pool of another task or encoder or of fewer than two examples that are not excluded, queries
            that are excluded, occur twice or are not in the pool, values that are not finite, and for a metric
            without a name where parts are kept.
        TypeError: for queries or excluded rows that are neither numbers nor texts.

    Example:
        ```python
        split = split_pool(pool.ids, queries=100, vectors=pool.vectors)
        measure_examples(pipe.model, pool, exclude=split.queries + split.dropped, cache_dir="measured")
        pipe(image, strategy="transfer")
        ```

    Source: as SupPR (arXiv 2301.13670) and Partial2Global (arXiv 2405.15279) do with 50 neighbours.
    """
    excluded = torch.zeros(len(pool), dtype=torch.bool)
    if exclude is not None:
        excluded[_rows(pool, exclude, "exclude")] = True
    count = _examples_each(model, excluded, candidates)
    _check_pool(pool, model)
    query_rows = _query_rows(pool, queries, excluded, seed)
    folder = None
    if cache_dir is not None:
        name = None if metric is None else _name(metric)
        folder = Path(cache_dir) / f"performance-{_key(model, pool, count, name, greater_is_better, excluded)}"
        folder.mkdir(parents=True, exist_ok=True)
    parts, state, home = query_rows.split(PART), processes(), model.device
    mine = parts[state.process_index :: state.num_processes]
    task = find_task(model.config.task)
    work = Work(Examples(pool, model.to(state.device), task, metric, greater_is_better), count, excluded, folder)
    measured, shown = [], progress and state.is_main_process
    try:
        if shown:
            work.tell_cost(parts, state.num_processes)
        with tqdm(total=sum(map(len, mine)), desc="measuring", unit=" images", disable=not shown) as bar:
            for rows in mine:
                measured.append((rows, *work.part(rows)))
                bar.update(len(rows))
    finally:
        model.to(home)  # where a pipeline expects it
    table = torch.full((len(pool), count), -1), torch.zeros(len(pool), count)
    for rows, examples, performance in gather_object(measured):
        table[0][rows], table[1][rows] = examples.long(), performance
    model.set_performance(*table, pool.fingerprint)
    return table


def _examples_each(model: VisualInContextModel, excluded: Tensor, candidates: int | None) -> int:
    """Examples that every image is shown."""
    if candidates is not None and candidates < 1:
        raise ValueError(f"candidates={candidates}: pass a whole number of at least 1")
    left = len(excluded) - int(excluded.sum())
    count = min(candidates or model.config.candidates, left - 1)
    if count < 1:
        among = " that are not excluded" if excluded.any() else ""
        raise ValueError(f"the pool has {left} examples{among}: at least two are needed to measure one on another")
    return count


def _check_pool(pool: PoolReader, model: VisualInContextModel) -> None:
    if pool.task != model.config.task:
        raise ValueError(f"the pool is for task={pool.task!r}, the model for task={model.config.task!r}")
    if pool.encoder["fingerprint"] != model.encoder.fingerprint:
        raise ValueError(
            "the pool was made with another encoder than the model's: make it again with encoder=model.encoder"
        )


def _rows(pool: PoolReader, wanted: Any, name: str) -> Tensor:
    """Rows of the pool, in the order given."""
    values = wanted.tolist() if hasattr(wanted, "tolist") else wanted
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={wanted!r}: pass a list of rows (numbers) or of ids (texts)")
    rows = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral | str):
            raise TypeError(
                f"{name} holds {value!r}: pass rows (numbers) or ids (texts); mask.nonzero()[:, 0] are "
                "the rows of a mask"
            )
        try:
            rows.append(pool.position(value) if isinstance(value, str) else int(value))
        except KeyError as error:
            raise ValueError(f"{name}: {error.args[0]}; numbers are rows, texts are ids") from None
        if not 0 <= rows[-1] < len(pool):
            raise ValueError(f"{name} holds row {value}: the pool has rows 0 to {len(pool) - 1}")
    return torch.tensor(rows, dtype=torch.long)


def _query_rows(pool: PoolReader, queries: Any, excluded: Tensor, seed: int) -> Tensor:
    """Rows to measure on. In the order of the draw or the list, so that more queries begin with the same parts."""
    if queries is None or (isinstance(queries, Integral) and not isinstance(queries, bool)):
        drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        drawn = drawn[~excluded[drawn]]
        if queries is not None and not 0 < queries <= len(drawn):
            raise ValueError(f"queries={queries}: the pool has {len(drawn)} images to measure on")
        return drawn[:queries]
    rows = _rows(pool, queries, "queries")
    if not len(rows):
        raise ValueError("queries is empty: name one image or more, or pass None for all")
    values, times = rows.unique(return_counts=True)
    if times.max() > 1:
        row = int(values[times.argmax()])
        raise ValueError(f"queries holds row {row}, {pool.ids[row]!r}, {times.max()} times: name every image once")
    if excluded[rows].any():
        row = int(rows[excluded[rows]][0])
        raise ValueError(f"row {row}, {pool.ids[row]!r}, is in queries and in exclude: take it out of one of them")
    return rows


@dataclass(frozen=True)
class Work:
    """What is measured, and where finished parts are kept."""

    examples: Examples
    count: int  # examples on every image
    excluded: Tensor
    folder: Path | None

    def file(self, rows: Tensor) -> Path | None:
        """Of a part; named by the rows, so that another seed or number of queries shares what it has in common."""
        name = f"rows-{digest(str(rows.tolist()))[:16]}.safetensors"
        return None if self.folder is None else self.folder / name

    def is_done(self, rows: Tensor) -> bool:
        file = self.file(rows)
        return file is not None and file.is_file()

    def part(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and performance of some images; from their file where there is one."""
        file = self.file(rows)
        if self.is_done(rows):
            try:
                part = read_tensors(file)
                return part["candidates"], part["performance"]
            except (ValueError, KeyError):
                logger.warning(f"{file} is damaged and is measured again")
        queries, candidates = self.questions(rows)
        performance = self.examples.measure(queries, candidates)
        if not performance.isfinite().all():
            row = int(rows[(~performance.isfinite()).any(1)][0])
            raise ValueError(
                f"the metric is not finite on pool image {self.examples.pool.ids[row]!r}: a metric has to be defined "
                "for every prediction, also for an empty one"
            )
        if file is not None:
            tensors = {"candidates": candidates.int(), "performance": performance}
            write_whole(file, lambda path: save_file(tensors, str(path)))
        return candidates, performance

    def questions(self, rows: Tensor) -> tuple[Queries, Tensor]:
        """Images of the pool as queries, and the nearest others of each that are not excluded."""
        pool, model, task = self.examples.pool, self.examples.model, self.examples.task
        images = [pool.image(row) for row in rows.tolist()]
        seen = [task.query(image) for image in images]
        cells = pixels(seen, model.image_size, model.resample).to(model.device)
        truth = task.labels([pool.label(row) for row in rows.tolist()], images, model.image_size).to(model.device)
        vectors = F.normalize(pool.vectors[rows].float(), dim=1)
        _, nearest = pool.search(vectors, self.count + int(self.excluded.sum()), exclude=rows)
        order = self.excluded[nearest].int().sort(dim=1, stable=True).indices[:, : self.count]
        return Queries(cells, {}, truth), nearest.gather(1, order)

    def tell_cost(self, parts: Sequence[Tensor], processes: int) -> None:
        """Say on stderr how many runs some parts are, how many were done before, and how long the others take."""
        waiting = [[] if self.is_done(rows) else rows for rows in parts]
        images, left, count = sum(map(len, parts)), sum(map(len, waiting)), self.count
        done = f", {(images - left) * count:,} of them done before" if left < images else ""
        _tell(f"{images * count:,} runs of the frozen model, {count} examples on each of {images:,} images{done}")
        if not left:
            return
        each = self.seconds_each(parts[0], left * count)
        longest = max(sum(map(len, waiting[i::processes])) for i in range(processes)) * count * each
        among = f", shared by {processes} processes" if processes > 1 else ""
        _tell(f"about {_spelt(longest)} at {each:.2g} s a run on {self.examples.model.device}{among}")

    def seconds_each(self, rows: Tensor, runs: int) -> float:
        """Of one of so many runs to come, in batches as large as they allow: of a slow model one or two are tried."""
        queries, candidates = self.questions(rows)
        each = 0.0
        for size in (1, 8, CHUNK):
            b, k = max(1, size // self.count), min(size, self.count)
            some = Queries(queries.cells[:b], {}, queries.truth[:b]), candidates[:b, :k]
            # the estimate itself is to cost little
            if size > 1 and (20 * some[1].numel() > runs or each * some[1].numel() > 2):
                break
            self.examples.measure(*some)  # encodes the examples, which are kept, and warms up the device
            start = time.perf_counter()
            self.examples.measure(*some)
            each = (time.perf_counter() - start) / some[1].numel()
        return each


def _tell(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr, flush=True)


def _spelt(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds > 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _name(metric: Any) -> str:
    name = getattr(metric, "name", None) or getattr(metric, "__qualname__", "<unknown>")
    if "<lambda>" in name or name == "<unknown>":
        raise ValueError(
            f"metric={metric!r} has no name that parts in cache_dir could be told apart by: pass a "
            "function made with def, an evaluate module, or an object with a `name`"
        )
    return name


def _key(
    model: VisualInContextModel, pool: PoolReader, count: int, metric: str | None, greater: bool, excluded: Tensor
) -> str:
    parts = [
        type(model.frozen).__qualname__,
        model.config.frozen_model,
        model.config.task,
        pool.fingerprint,
        count,
        metric,
        greater,
    ]
    if excluded.any():
        parts.append(excluded.nonzero()[:, 0].tolist())
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest_weights(key, model.frozen)
    return key.hexdigest()[:16]
