"""`train_small` on made-up images, as a script: `python small_run.py OUT [--resume]`, in one process or in several.

Leaves everything that a resumed run must have in common with an uninterrupted one in OUT/final.pt.
"""

import sys
from pathlib import Path
from typing import Any

import tiny_run
import torch
import torch.distributed as dist
from distributed import trainer_run
from leave import leave
from torch import nn

from hf_effdl import SplitLBITrainer


SEARCH = {"macs": 0.5, "within": 0.5, "every": 3, "threshold": 0.3}
SETTINGS = {**SEARCH, "distill": 0.3, "calibration": True}
CLOCK = "latency_ms"


def trainer(out: str | Path, **changes: Any) -> SplitLBITrainer:
    return tiny_run.trainer(str(out), **{"eval_strategy": "no", "logging_steps": 100, **changes})


def shared(out: str | Path, processes: int) -> SplitLBITrainer:
    """A net in double precision without batch statistics: as many rows a step, whatever the number of processes."""
    return trainer_run.trainer(out, processes, num_train_epochs=3, eval_strategy="no", save_steps=4)


def outcome(run: SplitLBITrainer, small: nn.Module) -> dict[str, Any]:
    without_clock = [{k: v for k, v in row.items() if k != CLOCK} for row in run.measured.values()]
    report = {name: value for name, value in small.config.effdl_report.items() if name != CLOCK}
    own = ("rows", "held_out")  # of this process
    report["calibration"] = {name: value for name, value in report["calibration"].items() if name not in own}
    return {
        "small": {name: tensor.clone() for name, tensor in small.state_dict().items()},
        "dense": {name: tensor.clone() for name, tensor in run.model.state_dict().items()},
        "path": run.path.units,
        "report": report,
        "measured": dict(zip(run.measured, without_clock, strict=True)),
    }


def main(out: str, *options: str) -> None:
    torch.set_num_threads(1)
    several = "--shared" in options
    run = shared(out, 2) if several else trainer(out)
    small = run.train_small(**SETTINGS, resume_from_checkpoint="--resume" in options)
    result = outcome(run, small)
    if not several or dist.get_rank() == 0:
        torch.save(result, f"{out}/final.pt")
    if several:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
