"""Pools: build, add, remove, info."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from hf_effdl.cli.work.cost import Cost, rehearsal, tell
from hf_effdl.cli.work.data import load_any, split_of
from hf_effdl.files import locked, sweep
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.pool.pool import ExamplePool
from hf_effdl.vicl.pool.writer import processes
from hf_effdl.vicl.remote_code.pool_reader import PoolReader
from hf_effdl.vicl.remote_code.vision_encoder import VisionEncoder


OF_POOLS = ("image_column", "label_column", "id_column", "group_column", "class_column", "task", "foreground", "boxes")
OF_POOLS += ("keep_grids", "batch_size", "on_bad_row")


def _rows(options: Any) -> Dataset:
    data = load_any(options.dataset_name, options.dataset_config)
    return split_of(data, options.dataset_name, options.split, "split")


def processes_on_this_machine() -> PartialState:
    """This process and its siblings, which without an accelerator find each other on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def build(options: Any) -> None:
    """A pool in `output_dir`; what is half done waits beside it."""
    state = processes_on_this_machine()
    names = {name: getattr(options, name) for name in OF_POOLS}
    if options.dry_run:
        with rehearsal() as folder:
            tell("pool build", _cost(options, Path(folder), names))
        return
    out = Path(options.output_dir)
    half = out / "half"
    with locked(out, ".lock-build") if state.is_main_process else nullcontext():  # another run removes its half
        pool = ExamplePool.from_dataset(_rows(options), encoder=options.encoder, cache_dir=half, **names)
        pool.save_pretrained(out)
        if state.is_main_process:
            shutil.rmtree(half)
            sweep(out, "pool.json"), sweep(out / "data", "pool-*")  # of runs that were killed
            print(described(ExamplePool.from_pretrained(out)))
    if state.is_main_process:
        if options.push_to_hub:
            print(ExamplePool.from_pretrained(out).push_to_hub(options.push_to_hub))
    state.wait_for_everyone()


def _cost(options: Any, folder: Path, names: dict[str, Any]) -> Cost:
    """Of encoding all rows, by a batch of them; what the first ones take beside is not counted."""
    rows, encoder = _rows(options), VisionEncoder.from_pretrained(options.encoder)
    few = rows.select(range(min(len(rows), options.batch_size)))
    given = names | {"encoder": encoder, "progress": False}
    ExamplePool.from_dataset(few.select(range(min(len(few), 2))), cache_dir=folder / "first", **given)
    start = time.perf_counter()
    pool = ExamplePool.from_dataset(few, cache_dir=folder / "few", **given)
    each = (time.perf_counter() - start) / len(few)
    size = sum(file.stat().st_size for file in Path(pool.folder, "data").iterdir()) / len(few)
    told = [f"{len(rows)} rows to encode, one took {each:.3g} s"]
    return Cost(each * len(rows), 2 * size * len(rows), [*told, "on the disk twice until it is whole"])


def add(options: Any) -> None:
    """More rows of the same columns."""
    processes_on_this_machine()
    pool = ExamplePool.from_pretrained(options.pool)
    encoder = options.encoder or pool.encoder.get("id")
    if encoder is None:
        raise ValueError(f"{options.pool} names no encoder, as one of a folder: set --encoder to its own")
    before = len(pool)
    pool.add(_rows(options), encoder=encoder, batch_size=options.batch_size, on_bad_row=options.on_bad_row)
    if processes().is_main_process:
        print(f"{len(pool) - before} rows added: {len(pool)}")


def remove(options: Any) -> None:
    """Fewer rows; their files go too."""
    processes_on_this_machine()
    pool = ExamplePool.from_pretrained(options.pool)
    before = len(pool)
    pool.remove(options.ids)
    pool.save_pretrained(options.pool)
    if processes().is_main_process:
        print(f"{before - len(pool)} rows removed: {len(pool)}")


def info(options: Any) -> None:
    """What is in a pool."""
    print(described(PoolReader.from_pretrained(options.pool)))


def described(pool: PoolReader) -> str:
    """A table of what a pool holds."""
    size = sum(file.stat().st_size for file in Path(pool.folder, "data").iterdir()) / 1e6
    facts = {
        "rows": len(pool),
        "task": pool.task,
        "encoder": pool.encoder.get("id") or "a model of a folder, without a name",
        "vector": f"{pool.dim} numbers",
        "groups": pool.groups and len(set(pool.groups)),
        "classes": pool.classes and len(set(pool.classes)),
        "fingerprint": pool.fingerprint,
        "folder": str(pool.folder),
        "size": f"{size:.1f} MB",
    }
    rows = [{"what": name, "value": value} for name, value in facts.items() if value is not None]
    return markdown_table(rows, {"what": "pool", "value": ""})
