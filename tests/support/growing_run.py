"""Short growing runs, as scripts:

`python growing_run.py OUT [--resume] [--pause POINT]` on made-up images, one process;
`python growing_run.py --fork` does that in a process of its own for every line of arguments that it reads, and writes
the id of the process and, after its end, the exit status;
`torchrun --nproc_per_node 2 -m growing_run OUT --ddp NAME... [--resume] [--pause POINT]` with a net without batch
statistics, two processes.

Each leaves everything that a resumed run must have in common with an uninterrupted one in a file. At POINT of its
first growth step (in the last NAME) a run touches OUT/paused and waits for its end.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import tiny_run
import torch
import torch.distributed as dist
from distributed import trainer_run
from leave import leave

from hf_effdl import GrowingArguments, GrowingTrainer
from hf_effdl.structure.growing import checkpoint as grow_checkpoint


GROWTH = {"growth_rounds": 3, "growth_until": 0.6, "growth_add": 4, "growth_ratio": 1.5, "growth_init": "zero-out"}
GROWTH |= {"growth_release": False, "save_total_limit": None}
SHARED = {**tiny_run.SHARED, **GROWTH, "num_train_epochs": 4}
USUAL = {"growth_init": "fresh-rows", "growth_release": True}  # the defaults; without them old units go on bit for bit
POINTS = ("before", "inside", "renaming", "renamed")


def trainer(out: Any, net: Any = None, **changes: Any) -> GrowingTrainer:
    """Boundaries are at steps 6, 13 and 19 of 32, eight steps an epoch."""
    args = GrowingArguments(str(out), **{**SHARED, **changes})
    return GrowingTrainer(
        net or tiny_run.model(), args, train_dataset=tiny_run.images(64, 1), eval_dataset=tiny_run.images(32, 2)
    )


def plain_trainer(out: Any, processes: int = 1, **changes: Any) -> GrowingTrainer:
    """A net without batch statistics, with one process, or with several and the same rows a step."""
    batch = {"per_device_train_batch_size": 6 // processes}
    settings = {**trainer_run.SHARED, **GROWTH, "nu": None, **batch, **changes}
    return GrowingTrainer(
        trainer_run.model(),
        GrowingArguments(str(out), **settings),
        train_dataset=trainer_run.images(48, 1),
        eval_dataset=trainer_run.images(16, 2),
        data_collator=trainer_run.collate,
    )


def outcome(run: GrowingTrainer) -> dict[str, Any]:
    return tiny_run.outcome(run) | {"history": run.history}


def pause_at(point: str, mark: Path) -> None:
    """Wait for the end at a point of the next growth step."""

    def stop_before(module: Any, name: str) -> None:
        going_on = getattr(module, name)

        def wait(*args: Any, **kwargs: Any) -> Any:
            if name == "replace" and Path(args[1]).name != grow_checkpoint.GROWN:
                return going_on(*args, **kwargs)
            if point == "renamed":
                going_on(*args, **kwargs)
            mark.touch()
            time.sleep(600)

        setattr(module, name, wait)

    where = {"before": (grow_checkpoint, "widen_groups"), "inside": (grow_checkpoint, "save_path")}
    stop_before(*where.get(point, (os, "replace")))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--ddp", nargs="+")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--pause", choices=POINTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.ddp or [""]:
        if options.pause and name == (options.ddp or [""])[-1]:
            pause_at(options.pause, options.out / "paused")
        run = plain_trainer(options.out / name, 2, **USUAL) if name else trainer(options.out, **USUAL)
        run.train(resume_from_checkpoint=options.resume)
        torch.save(outcome(run), options.out / (f"{name}-{dist.get_rank()}.pt" if name else "final.pt"))
    if options.ddp:
        leave()


if __name__ == "__main__":
    main(sys.argv[1:])
