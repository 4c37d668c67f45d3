"""How the tests' scripts for several processes end."""

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Wait for the other processes, then end this one without the interpreter's teardown.

    A thread of gloo's that has just finished a collective lets go of its tensors, for which it takes the interpreter's
    lock; if the interpreter is being torn down by then, the process aborts (pytorch/pytorch#190489). Destroying the
    process group ends those threads only where nothing else holds the group, and every model in DDP does.
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
