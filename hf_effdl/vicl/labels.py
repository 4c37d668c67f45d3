"""Measure the examples of a pool on each other: the labels that strategies and rankers learn from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_effdl.vicl.example_selectors import Examples, Queries
from hf_effdl.vicl.modeling_visual_in_context import VisualInContextModel
from hf_effdl.vicl.pool_reader import PoolReader
from hf_effdl.vicl.pool_writer import processes
from hf_effdl.vicl.vision_encoders import digest_weights
from hf_effdl.vicl.visual_tasks import find_task, pixels


logger = get_logger(__name__)
# pool images between two writes of the cache
PART = 16


def measure_examples(
    model: VisualInContextModel,
    pool: PoolReader,
    *,
    candidates: int | None = None,
    queries: int | None = None,
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

    Args:
        model: a `VisualInContextModel`.
        pool: made with the model's encoder.
        candidates: K examples each (default: the config's, 50); a smaller pool gives all others.
        queries: how many pool images to measure on, drawn at random with `seed`; None: all.
        metric, greater_is_better: see `Examples`; default: the task's own.
        cache_dir: keeps finished parts of 16 images, so that a run that was cut off, or one on more images, goes on;
            those of another model, pool, metric (by its name) or K are not mistaken for them.
        progress: show a bar on the first process.

    Returns:
        candidates `(n, K)` rows of the pool, -1 where not measured, and performance `(n, K)`, larger is better.

    Raises:
        ValueError: for a pool of fewer than two examples or of another task or encoder, values that are not finite,
            and for a metric without a name where parts are kept.

    Example:
        ```python
        measure_examples(pipe.model, pool, cache_dir="labels")
        pipe(image, strategy="transfer")
        ```

    Source: the labels of SupPR (arXiv 2301.13670) and Partial2Global (arXiv 2405.15279), which use 50 neighbours.
    """
    if candidates is not None and candidates < 1:
        raise ValueError(f"candidates={candidates}: pass a whole number of at least 1")
    count = min(candidates or model.config.candidates, len(pool) - 1)
    if count < 1:
        raise ValueError(f"the pool has {len(pool)} examples: at least two are needed to measure one on another")
    if pool.task != model.config.task:
        raise ValueError(f"the pool is for task={pool.task!r}, the model for task={model.config.task!r}")
    if pool.encoder["fingerprint"] != model.encoder.fingerprint:
        raise ValueError(
            "the pool was made with another encoder than the model's: make it again with encoder=model.encoder"
        )
    if queries is not None and not 0 < queries <= len(pool):
        raise ValueError(f"queries={queries}: the pool has {len(pool)} images to measure on")
    task = find_task(model.config.task)
    folder = None
    if cache_dir is not None:
        name = None if metric is None else _name(metric)
        folder = Path(cache_dir) / f"performance-{_key(model, pool, count, name, greater_is_better)}"
        folder.mkdir(parents=True, exist_ok=True)
    # in the order of the draw, so that more queries begin with the same parts
    parts = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:queries].split(PART)
    state, home = processes(), model.device
    logger.info(f"{sum(map(len, parts)) * count:,} runs of the frozen model, {count} examples on each image")
    mine = parts[state.process_index :: state.num_processes]
    bar = tqdm(total=sum(map(len, mine)), desc="measuring", unit=" images",
               disable=not (progress and state.is_main_process))  # fmt: skip
    examples = Examples(pool, model.to(state.device), task, metric, greater_is_better)
    measured = []
    try:
        for rows in mine:
            measured.append((rows, *_part(examples, rows, count, folder)))
            bar.update(len(rows))
    finally:
        bar.close()
        model.to(home)  # where a pipeline expects it
    table = torch.full((len(pool), count), -1), torch.zeros(len(pool), count)
    for rows, found, performance in gather_object(measured):
        table[0][rows], table[1][rows] = found.long(), performance
    model.set_performance(*table, pool.fingerprint)
    return table


def _part(examples: Examples, rows: Tensor, count: int, folder: Path | None) -> tuple[Tensor, Tensor]:
    # by the rows themselves, so that another seed or number of queries shares what it has in common
    digest = hashlib.sha256(str(rows.tolist()).encode()).hexdigest()[:16]
    file = None if folder is None else folder / f"rows-{digest}.safetensors"
    if file is not None and file.is_file():
        try:
            part = load_file(file)
            return part["candidates"], part["performance"]
        except (SafetensorError, KeyError):
            logger.warning(f"{file} is damaged and is measured again")
    pool, model, task = examples.pool, examples.model, examples.task
    images = [pool.image(row) for row in rows.tolist()]
    seen = [task.query(image) for image in images]
    cells = pixels(seen, model.image_size, model.resample).to(model.device)
    truth = task.labels([pool.label(row) for row in rows.tolist()], images, model.image_size).to(model.device)
    _, found = pool.search(F.normalize(pool.vectors[rows].float(), dim=1), count, exclude=rows)
    performance = examples.measure(Queries(cells, {}, truth), found)
    if not performance.isfinite().all():
        row = int(rows[(~performance.isfinite()).any(1)][0])
        raise ValueError(f"the metric is not finite on pool image {pool.ids[row]!r}: a metric has to be defined for "
                         "every prediction, also for an empty one")  # fmt: skip
    if file is not None:
        part_file = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"candidates": found.int(), "performance": performance}, str(part_file))
        os.replace(part_file, file)
    return found, performance


def _name(metric: Any) -> str:
    name = getattr(metric, "name", None) or getattr(metric, "__qualname__", "<unknown>")
    if "<lambda>" in name or name == "<unknown>":
        raise ValueError(f"metric={metric!r} has no name that parts in cache_dir could be told apart by: pass a "
                         "function made with def, an evaluate module, or an object with a `name`")  # fmt: skip
    return name


def _key(model: VisualInContextModel, pool: PoolReader, count: int, metric: str | None, greater: bool) -> str:
    parts = [type(model.frozen).__qualname__, model.config.frozen_model, model.config.task, pool.fingerprint, count,
             metric, greater]  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest_weights(digest, model.frozen)
    return digest.hexdigest()[:16]
