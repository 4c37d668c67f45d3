"""FSDP2 through accelerate on CPU processes: `accelerate launch ... -m distributed.fsdp_on_cpu SCRIPT ARGUMENTS`.

torch shards on CPU as it does elsewhere, but accelerate turns FSDP on for accelerators only and would wrap the model
in DDP without a word. Here CPU processes call themselves what accelerate looks for; nothing else changes.
"""

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    original = PartialState.__init__

    def init(self: PartialState, cpu: bool = False, **kwargs: object) -> None:
        original(self, cpu, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    try:
        yield
    finally:
        PartialState.__init__ = original


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as for a script that is called by its name
    with fsdp_on_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
