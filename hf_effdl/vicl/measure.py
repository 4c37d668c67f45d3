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
from types import CodeType
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_effdl.checks import instance
from hf_effdl.files import damaged, digest, read_tensors, write_whole
from hf_effdl.processes import refuse_lone_processes, same_fate
from hf_effdl.vicl.pool.writer import processes
from hf_effdl.vicl.remote_code.examples import CHUNK, Examples, Queries
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.modeling_visual_in_context import VisualInContextModel
from hf_effdl.vicl.remote_code.pool_reader import PoolReader
from hf_effdl.vicl.remote_code.pool_rows import classes_of, fellows, groups_of, rows_checked, rows_of_ids
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
    rows: Iterable[int] | None = None,
    exclude_rows: Iterable[int] | None = None,
    groups: Sequence[int | str | None] | None = None,
    classes: Sequence[int | str | None] | None = None,
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
        queries: the pool images to measure on: how many, drawn at random with `seed`; or which, as ids (texts, or
            numbers where ids are numbers), each once; None: all.
        exclude: ids of the pool that are neither measured on nor shown as an example, such as the `queries` and
            `dropped` of a `Split`: rankers that are judged on them must not have seen them.
        rows: instead of `queries`, which images by their place in the pool.
        exclude_rows: the same beside, or instead of, `exclude`.
        groups: what each row of the pool belongs to (a video, a patient), None for nothing: no example is shown on an
            image of its own group. Default: the groups that the pool keeps.
        classes: what each row of the pool shows, None for no class: an image is shown examples of its own class, as
            one that is asked for with `classes=` is. Default: the classes that the pool keeps; `[None] * len(pool)`
            measures across them.
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
    instance("model", model, VisualInContextModel, "a VisualInContextModel, such as pipe.model")
    instance("pool", pool, PoolReader, "an ExamplePool")
    if not torch.distributed.is_initialized():  # a group of torch shares the work too
        refuse_lone_processes()
    excluded = torch.zeros(len(pool), dtype=torch.bool)
    if exclude is not None:
        excluded[rows_of_ids(pool, exclude, "exclude")] = True
    if exclude_rows is not None:
        excluded[rows_checked(pool, exclude_rows, "exclude_rows")] = True
    count = _examples_each(model, excluded, candidates)
    _check_pool(pool, model)
    query_rows = _query_rows(pool, queries, rows, excluded, seed)
    groups, classes = groups_of(pool, groups), classes_of(pool, classes)
    folder = old = None
    if cache_dir is not None:
        name = None if metric is None else _name(metric)
        decided = {"metric": name, "greater_is_better": greater_is_better, "excluded": excluded, "groups": groups}
        decided["classes"] = classes
        folder = Path(cache_dir) / f"performance-{measured_key(model, pool, count, **decided)}"
        folder.mkdir(parents=True, exist_ok=True)
        old = _old_folder(Path(cache_dir), model, pool, count, **decided)
    parts, state, home = query_rows.split(PART), processes(), model.device
    mine = parts[state.process_index :: state.num_processes]
    task = find_task(model.config.task)
    examples = Examples(pool, model.to(state.device), task, metric, greater_is_better)
    work = Work(examples, count, excluded, groups, classes, folder, old)
    measured, shown = [], progress and state.is_main_process
    try:
        if shown:
            work.tell_cost(parts, state.num_processes)
        bar = tqdm(total=sum(map(len, mine)), desc="measuring", unit=" images", disable=not shown)
        with same_fate(), bar:  # the others would wait for what a process that failed has measured
            for part in mine:
                measured.append((part, *work.part(part)))
                bar.update(len(part))
    finally:
        model.to(home)  # where a pipeline expects it
    table = torch.full((len(pool), count), -1), torch.zeros(len(pool), count)
    for part, shown_rows, performance in gather_object(measured):
        table[0][part, : shown_rows.shape[1]], table[1][part, : shown_rows.shape[1]] = shown_rows.long(), performance
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
        raise ValueError(
            f"the pool is for task={pool.task!r}, the model for task={model.config.task!r}: make one as the other"
        )
    if pool.encoder["fingerprint"] != model.encoder.fingerprint:
        raise ValueError(
            "the pool was made with another encoder than the model's: make it again with encoder=model.encoder"
        )


def _query_rows(pool: PoolReader, queries: Any, rows: Any, excluded: Tensor, seed: int) -> Tensor:
    """Rows to measure on. In the order of the draw or the list, so that more queries begin with the same parts."""
    if queries is not None and rows is not None:
        raise ValueError("queries= and rows= both say which images to measure on: pass one of them")
    name = "queries" if rows is None else "rows"
    if rows is None and (queries is None or (isinstance(queries, Integral) and not isinstance(queries, bool))):
        drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        drawn = drawn[~excluded[drawn]]
        if queries is not None and not 0 < queries <= len(drawn):
            raise ValueError(f"queries={queries}: the pool has {len(drawn)} images to measure on")
        return drawn[:queries]
    found = rows_of_ids(pool, queries, name) if rows is None else rows_checked(pool, rows, name)
    if not len(found):
        raise ValueError(f"{name} is empty: name one image or more, or pass None for all")
    values, times = found.unique(return_counts=True)
    if times.max() > 1:
        row = int(values[times.argmax()])
        raise ValueError(f"{name} holds row {row}, {pool.ids[row]!r}, {times.max()} times: name every image once")
    if excluded[found].any():
        row = int(found[excluded[found]][0])
        raise ValueError(f"row {row}, {pool.ids[row]!r}, is in {name} and in exclude: take it out of one of them")
    return found


@dataclass(frozen=True)
class Work:
    """What is measured, and where finished parts are kept."""

    examples: Examples
    count: int  # examples on every image
    excluded: Tensor
    groups: list[str | None] | None
    classes: list[str | None] | None
    folder: Path | None
    old: Path | None = None  # of version 0.1

    def file(self, rows: Tensor) -> Path | None:
        """Of a part; named by the rows, so that another seed or number of queries shares what it has in common."""
        if self.folder is None:
            return None
        name = f"rows-{digest(str(rows.tolist()))[:16]}.safetensors"
        return self.old / name if self.old is not None and (self.old / name).is_file() else self.folder / name

    def is_done(self, rows: Tensor) -> bool:
        file = self.file(rows)
        return file is not None and file.is_file()

    def part(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and performance of some images; from their file where there is one."""
        file = self.file(rows)
        if self.is_done(rows):
            try:
                return self.read(file, rows)
            except (ValueError, KeyError):
                logger.warning(f"{file} is damaged and is measured again")
        queries, candidates = self.questions(rows)
        performance = self.examples.measure(queries, candidates).masked_fill(candidates < 0, 0)
        if not performance.isfinite().all():
            row = int(rows[(~performance.isfinite()).any(1)][0])
            raise ValueError(
                f"the metric is not finite on pool image {self.examples.pool.ids[row]!r}: a metric has to be defined "
                "for every prediction, also for an empty one"
            )
        if file is not None:
            tensors = {"candidates": candidates.int(), "performance": performance}
            tensors["sha256"] = _sum_of(tensors)
            write_whole(file, lambda path: save_file(tensors, str(path)))
        return candidates, performance

    def read(self, file: Path, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A finished part, as it was written.

        Raises:
            ValueError, KeyError: for one that was not, or was changed since.
        """
        part = read_tensors(file)
        candidates, performance = part["candidates"], part["performance"]
        if file.parent == self.old:  # parts had no digest then
            part["sha256"] = _sum_of({"candidates": candidates, "performance": performance})
        if not torch.equal(_sum_of({"candidates": candidates, "performance": performance}), part["sha256"]):
            raise damaged(file, "its content is not what was written")
        if candidates.shape != performance.shape or len(candidates) != len(rows):
            raise damaged(file, f"it is of {tuple(candidates.shape)} runs")
        outside = (candidates < -1).any() or (candidates >= len(self.examples.pool)).any()
        if outside or not performance.isfinite().all():
            raise damaged(file, "it holds what was never measured")
        return candidates, performance

    def questions(self, rows: Tensor) -> tuple[Queries, Tensor]:
        """Images of the pool as queries, and the nearest others of each that are not excluded."""
        pool, model, task = self.examples.pool, self.examples.model, self.examples.task
        images = [pool.image(row) for row in rows.tolist()]
        seen = [task.query(image) for image in images]
        cells = pixels(seen, model.image_size, model.resample).to(model.device)
        truth = task.labels([pool.label(row) for row in rows.tolist()], images, model.image_size).to(model.device)
        vectors = F.normalize(pool.vectors[rows].float(), dim=1)
        found = Queries(cells, {"vector": vectors}, truth, exclude=rows, allowed=self.allowed(rows))
        nearest = self.examples.nearest(found, self.count)[1]
        if (alone := (nearest < 0).all(1)).any():
            row = int(rows[alone][0])
            raise ValueError(
                f"pool image {pool.ids[row]!r} has no example of its class outside its group: leave it out of queries="
            )
        return Queries(cells, {}, truth), nearest

    def allowed(self, rows: Tensor) -> Tensor | None:
        """`(B, n)` bool: examples that each of some images may be shown; None: all."""
        allowed = fellows(rows, self.groups, self.classes)
        if self.excluded.any():
            there = (~self.excluded).expand(len(rows), -1)
            allowed = there.clone() if allowed is None else allowed & there
        return allowed

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
    return f"{name} {_code_of(metric)}"


def _code_of(metric: Any) -> str:
    """What a metric does, as far as it can be seen: two functions of one name may be others."""
    function = getattr(metric, "__func__", metric)
    seen: list[Any] = [type(metric).__qualname__]
    if (code := getattr(function, "__code__", None)) is not None:
        seen += [_plain(code), _plain(function.__defaults__), _plain(function.__kwdefaults__)]
        seen += [_plain(cell.cell_contents) for cell in function.__closure__ or ()]
    else:
        seen += [[name, _plain(value)] for name, value in sorted(getattr(metric, "__dict__", {}).items())]
    return digest(json.dumps(seen))[:16]


def _plain(value: Any) -> Any:
    """A value in a form that is the same in every process; of what has none, its type."""
    if isinstance(value, CodeType):
        return [value.co_code.hex(), list(value.co_names), [_plain(one) for one in value.co_consts]]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return sorted([str(key), _plain(one)] for key, one in value.items())
    return repr(value) if isinstance(value, bool | int | float | str | bytes | None) else type(value).__qualname__


def measured_key(
    model: VisualInContextModel,
    pool: PoolReader,
    count: int,
    *,
    metric: str | None,
    greater_is_better: bool,
    excluded: Tensor,
    groups: Sequence[str | None] | None,
    classes: Sequence[str | None] | None = None,
) -> str:
    """Of all that decides what is measured of a pair of images, and which pairs are: one key for a cache of it."""
    frozen = model.frozen
    settings = frozen.settings() if hasattr(frozen, "settings") else model.config.frozen_model
    parts = {
        "frozen": [type(frozen).__qualname__, settings, list(model.image_size), model.resample],
        "precision": sorted({str(weight.dtype) for weight in frozen.parameters()}),
        "task": model.config.task,
        "pool": pool.fingerprint,
        "count": count,
        "metric": metric,
        "greater_is_better": greater_is_better,
        "excluded": excluded.nonzero()[:, 0].tolist(),
        "groups": None if groups is None else list(groups),
    }
    parts |= {} if classes is None else {"classes": list(classes)}  # a key of before is one without
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest_weights(key, frozen)
    return key.hexdigest()[:16]


def _old_folder(
    cache_dir: Path,
    model: VisualInContextModel,
    pool: PoolReader,
    count: int,
    *,
    metric: str | None,
    greater_is_better: bool,
    excluded: Tensor,
    groups: Any,
    classes: Any,
) -> Path | None:
    """Where version 0.1 kept the same parts; None where its key left out what decides them now."""
    single = all(weight.dtype == torch.float32 for weight in model.frozen.parameters())
    if metric is not None or groups is not None or classes is not None or not single:
        return None
    parts = [type(model.frozen).__qualname__, model.config.frozen_model, model.config.task, pool.fingerprint, count]
    parts += [None, greater_is_better] + ([excluded.nonzero()[:, 0].tolist()] if excluded.any() else [])
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest_weights(key, model.frozen)
    folder = cache_dir / f"performance-{key.hexdigest()[:16]}"
    return folder if folder.is_dir() else None


def _sum_of(tensors: dict[str, Tensor]) -> Tensor:
    """SHA-256 of tensors, as one."""
    pieces = [piece for name in sorted(tensors) for piece in (name.encode(), tensors[name].numpy().tobytes())]
    return torch.frombuffer(bytearray(digest(pieces), "ascii"), dtype=torch.uint8)
