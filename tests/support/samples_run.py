"""All that several processes are asked of the samples, in one launch, as starting takes longer than working.

torchrun samples_run.py OUT    # OUT/selection.pt, and the runs with and without recorded dynamics
"""

import sys

import dynamics_run
import selection_run
import torch
from accelerate import PartialState
from leave import leave


if __name__ == "__main__":
    torch.set_num_threads(1)
    selection_run.write(f"{sys.argv[1]}/selection.pt")
    torch.save(selection_run.linear_probes(), f"{sys.argv[1]}/probes-{PartialState().process_index}.pt")
    dynamics_run.with_and_without(sys.argv[1])
    leave()
