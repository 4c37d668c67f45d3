"""A search for a ticket on made-up images, as a script: `python ticket_run.py OUT`.

Leaves the ticket in OUT/found. With torchrun: two processes of the run of distributed/trainer_run.py, each of which
leaves its ticket in OUT/found-<rank>.
"""

import argparse
import os
import sys
from pathlib import Path

import tiny_run
import torch
from leave import leave

from hf_effdl import Ticket, find_ticket
from hf_effdl.structure.training.start import read_weights


# looks at every step, and takes a while to be content
SEARCH = {"macs": 0.5, "within": 0.6, "every": 1, "threshold": 0.001, "patience": 5, "min_path": 0.5}
SEARCH |= {"weights_at": [3]}
DISTRIBUTED = {"keep": 0.5, "within": 0.5, "every": 2, "patience": 1}


def search(out: str | Path, resume: str | bool = False, restore: bool = False, **options) -> Ticket:
    run = tiny_run.trainer(
        str(out), save_total_limit=None, eval_strategy="no", restore_callback_states_from_checkpoint=restore
    )
    return find_ticket(run, resume_from_checkpoint=resume, **{**SEARCH, **options})


def distributed_search(out: Path, processes: int) -> Ticket:
    from distributed import trainer_run

    run = trainer_run.trainer(out / "run", processes, eval_strategy="no", save_strategy="no")
    return find_ticket(run, **DISTRIBUTED)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        found = distributed_search(options.out, int(os.environ["WORLD_SIZE"]))
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean.fill_(torch.distributed.get_rank())
        assert not read_weights(norm)["running_mean"].any(), "batch statistics are to be those of the first process"
        found.save_pretrained(options.out / f"found-{os.environ['RANK']}")
        leave()
    search(options.out).save_pretrained(options.out / "found")


if __name__ == "__main__":
    main(sys.argv[1:])
