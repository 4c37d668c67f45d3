"""Several processes: who comes first, waiting for all, errors of one, and what Accelerate leaves on a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hf_effdl.launched import count_started, refuse_unstarted


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


def of_all(value: Any) -> list[Any]:
    """The values of all processes, in their order, on every process; plain values and tensors on the CPU."""
    values = [value]
    if _several():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def place_and_count() -> tuple[int, int]:
    """Which of how many processes this is, from 0 on."""
    return (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)


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


def summed(tensor: Tensor) -> Tensor:
    """A tensor added up over all processes, in place; the same numbers on each of them."""
    if _several():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def same_fate() -> Iterator[None]:
    """All processes leave the block in order, or all by an error: its own, or one that names the process that failed.

    Inside it no process may wait for others, as in a gather, since one of them may have left.

    Raises:
        RuntimeError: on the processes that did not fail themselves.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if _several():
        told = of_all(failure and f"{type(failure).__name__}: {failure}")
        if failure is None:
            for rank, text in enumerate(told):
                if text is not None:
                    raise RuntimeError(f"process {rank} failed: {text}")
    if failure is not None:
        raise failure


def refuse_lone_processes() -> None:
    """Refuse to run where a launcher started several processes and none of them sees the others, or fewer than asked.

    They would all do the whole work, into one folder. Call it once the process group may be there: after `Accelerator`
    or `TrainingArguments.device`.

    Raises:
        ValueError: as under `torchrun` on a machine without accelerators, where Accelerate must be told.
    """
    refuse_unstarted()
    count = count_started()
    if count == 1:
        return
    from accelerate import PartialState

    # not torch's process group, which can be there without Accelerate making use of it
    if PartialState().num_processes < count:
        raise ValueError(
            f"{count} processes were started, but each sees only itself and would do the whole work, into one folder: "
            "on a machine without a GPU pass --use_cpu (TrainingArguments(use_cpu=True), accelerate launch --cpu, or "
            "ACCELERATE_USE_CPU=true), or start one process"
        )


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
