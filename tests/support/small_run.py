"""`train_small` on the made-up images of `tiny_run.py`, as a script: `python small_run.py OUT [--resume]`.

Leaves everything that a resumed run must have in common with an uninterrupted one in OUT/final.pt.
"""

import sys
from pathlib import Path
from typing import Any

import tiny_run
import torch
from torch import nn
from transformers import TrainerCallback

from hf_effdl import SplitLBITrainer


class Pace(TrainerCallback):
    """Says where a run is, so that a test can kill it there."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.write_text(f"{Path(args.output_dir).name} {state.global_step}")


SETTINGS = {"macs": 0.5, "within": 0.5, "every": 3, "threshold": 0.3, "distill": 0.3}


def trainer(out: str | Path, **changes: Any) -> SplitLBITrainer:
    return tiny_run.trainer(str(out), **{"eval_strategy": "no", "logging_steps": 100, **changes})


def outcome(run: SplitLBITrainer, small: nn.Module) -> dict[str, Any]:
    report = {name: value for name, value in small.config.effdl_report.items() if name != "latency_ms"}
    measured = {name: {k: v for k, v in row.items() if k != "latency_ms"} for name, row in run.measured.items()}
    return {
        "small": {name: tensor.clone() for name, tensor in small.state_dict().items()},
        "dense": {name: tensor.clone() for name, tensor in run.model.state_dict().items()},
        "path": run.path.units,
        "report": report,
        "measured": measured,
    }


def main(out: str, *options: str) -> None:
    torch.set_num_threads(1)
    run = trainer(out)
    small = run.train_small(**SETTINGS, resume_from_checkpoint="--resume" in options)
    torch.save(outcome(run, small), f"{out}/final.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
