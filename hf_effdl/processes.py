"""Several processes: who comes first, waiting for all, and what Accelerate leaves on a model."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn


def refuse_lone_processes() -> None:
    """Refuse one of several processes that does not see the others.

    Raises:
        ValueError: the launcher started several processes, and this one would do all the work alone, as would they.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdecimal() and int(started) > 1 and not _several():
        raise ValueError(
            f"{started} processes were started, but each sees only itself and would do the whole work, into one "
            "folder: on a machine without a GPU pass --use_cpu (use_cpu=True in the arguments), or start one process"
        )


def is_first() -> bool:
    """Whether this is the only process or the first of several."""
    return not _several() or dist.get_rank() == 0


def together() -> None:
    """Wait until all processes are here; returns at once in a single one."""
    if _several():
        dist.barrier()


def agreed(value: Any) -> Any:
    """The first process's value, on every process; plain values only."""
    values = [value]
    if _several():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def decided(decide: Callable[[], Any]) -> Any:
    """What a function finds or raises on the first process alone, on every process; plain values only.

    For what differs between processes (a measured time, say), or is for one of them to do.
    """
    answer: Any = None
    if is_first():
        try:
            answer = decide()
        except Exception as error:  # noqa: BLE001 - the other processes wait for an answer, whatever it is
            answer = error
    answer = agreed(answer)
    if isinstance(answer, Exception):
        raise answer
    return answer


def forget_accelerate(model: nn.Module) -> bool:
    """Take Accelerate's marks off a model that it has prepared, in place; whether it had wrapped the forward.

    A model made from a prepared one carries them along: the next Trainer would then leave mixed precision out.
    """
    marks = vars(model)
    marks.pop("_is_accelerate_prepared", None)
    wrapped = marks.pop("_original_forward", None) is not None
    if wrapped:
        marks.pop("forward", None)
    return wrapped


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
