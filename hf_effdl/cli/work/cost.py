"""What a run would take: some steps or rows are measured, and the rest is arithmetic."""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets
import torch
from torch import nn

from hf_effdl.processes import is_first


STEPS = 4  # measured, after one that warms up
PATIENCE = 20  # seconds after which fewer do


@dataclass
class Cost:
    """Time in seconds, memory and disk in bytes; `how` says what was measured, `most` how long it may take."""

    seconds: float
    disk: float
    how: list[str] = field(default_factory=list)
    most: float | None = None

    def __add__(self, other: "Cost") -> "Cost":
        known = self.most is not None or other.most is not None
        most = (self.most or self.seconds) + (other.most or other.seconds) if known else None
        return Cost(self.seconds + other.seconds, self.disk + other.disk, self.how + other.how, most)

    def __str__(self) -> str:
        memory = peak_memory()
        span = [self.seconds] if self.most is None else [self.seconds, self.most]
        told = [*self.how, "on this machine, as busy as it is now"]
        lines = [f"time    {' to '.join(map(in_words, span))} ({'; '.join(told)})"]
        lines.append(f"memory  {in_bytes(memory) if memory else 'not known here'}, the largest so far")
        lines.append(f"disk    {in_bytes(self.disk)}")
        return "\n".join([*lines, "nothing was written"])


def in_words(seconds: float) -> str:
    """About how long.

    Example:
        >>> in_words(0.4), in_words(75), in_words(7300)
        ('under a second', '1 min 15 s', '2 h 1 min')
    """
    seconds = round(seconds)
    if seconds < 1:
        return "under a second"
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def in_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def peak_memory() -> float:
    """The most that this process has held: of a GPU where there is one, else of the machine; 0 where nobody says."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size_of(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))


@contextmanager
def rehearsal(args: Any = None) -> Iterator[str]:
    """A folder that is gone afterwards, for all that would be written; `args` of a Trainer write there."""
    cached = datasets.is_caching_enabled()
    with tempfile.TemporaryDirectory() as folder:
        if args is not None:
            args.output_dir, args.push_to_hub, args.report_to = folder, False, []
        datasets.disable_caching()
        try:
            yield folder
        finally:
            if cached:
                datasets.enable_caching()


def seconds_each(items: Iterable[Any], call: Callable[[Any], Any], most: int = STEPS) -> float:
    """Mean time to get an item and call with it; the first one, which warms up, counts only where it is alone."""
    times = [time.perf_counter()]
    for item in islice(items, most + 1):
        call(item)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if times[-1] - times[0] > PATIENCE and len(times) > 2:
            break
    if len(times) == 1:
        raise ValueError("there is nothing to measure: the data set has no rows for a batch")
    start = min(1, len(times) - 2)
    return (times[-1] - times[start]) / (len(times) - 1 - start)


def training_cost(trainer: Any, share: float = 1.0, what: str = "a training step") -> Cost:
    """Of `trainer.train()`: some real steps, on weights that are thrown away.

    Args:
        trainer: with its rows and arguments.
        share: of the run that is trained at most.
        what: the name of a step.
    """
    args, loader, model = trainer.args, trainer.get_train_dataloader(), trainer.model
    steps = steps_of(args, len(loader))
    trainer.create_optimizer_and_scheduler(steps)
    model.train()

    def step(batch: Any) -> None:
        trainer.compute_loss(model, batch).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    each = seconds_each(loader, step) * args.gradient_accumulation_steps
    total = max(1, math.ceil(steps * share))
    state = sum(
        value.numel() * value.element_size()
        for values in trainer.optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    disk = size_of(model) + checkpoints_of(args, total, steps) * (size_of(model) + state)
    return Cost(each * total, disk, [f"{total} steps, {what} took {each:.3g} s"])


def evaluation_cost(trainer: Any, times: int) -> Cost:
    """Of those during the run and so many after it, by some batches."""
    times += evaluations_of(trainer.args, len(trainer.get_train_dataloader()))
    if trainer.eval_dataset is None or not times:
        return Cost(0, 0)
    loader, model = trainer.get_eval_dataloader(), trainer.model.eval()
    with torch.no_grad():
        each = seconds_each(loader, lambda batch: trainer.compute_loss(model, batch), 2)
    told = f"{times} evaluations of {len(loader)} batches, one took {each:.3g} s"
    return Cost(each * len(loader) * times, 0, [told])


def evaluations_of(args: Any, batches: int) -> int:
    """Evaluations during a run with so many batches an epoch."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    steps = steps_of(args, batches)
    every = args.eval_steps or args.logging_steps
    every = every if every >= 1 else max(1, every * steps)
    return {"epoch": math.ceil(args.num_train_epochs), "steps": int(steps // every)}.get(strategy, 0)


def steps_of(args: Any, batches: int) -> int:
    """Optimizer steps of a run with so many batches an epoch."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(max(1, batches // args.gradient_accumulation_steps) * args.num_train_epochs)


def checkpoints_of(args: Any, steps: int, whole: int) -> int:
    """Checkpoints that lie in the folder at the end of `steps` of a run of `whole` steps."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * whole))
    epochs = math.ceil(args.num_train_epochs * steps / whole)
    count = {"no": 0, "epoch": epochs, "steps": max(1, steps // int(every))}.get(strategy, 1)
    return min(count, args.save_total_limit or count)


def tell(verb: str, cost: Cost) -> None:
    """Print a cost, on the first process."""
    if is_first():
        print(f"hf-effdl {verb}, as planned:\n{cost}")
