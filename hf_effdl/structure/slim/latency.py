"""How long a forward pass takes, for models side by side."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_effdl.random_state import evaluating
from hf_effdl.structure.groups.inputs import call


@torch.no_grad()
def measure_latency(
    models: Sequence[nn.Module], inputs: Any, *, repeats: int = 21, seconds: float = 0.01
) -> list[float]:
    """Milliseconds of one forward pass in eval mode, for models timed in turns so that what disturbs hits all alike.

    The first model's time is its median over the rounds. Every other one's is that, times the median of its ratio to
    the first within a round. On a CPU with one thread the clock is the thread's own, which does not count the time
    that other programs have.

    Args:
        models: compared side by side.
        inputs: a tensor, tuple or dict that every model accepts.
        repeats: rounds; each model runs once a round.
        seconds: passes are repeated within a round until about this long.
    """
    clock = _Clock(next(models[0].parameters()).device, inputs)
    times: list[list[float]] = [[] for _ in models]
    with evaluating(*models):
        try:
            passes = [clock.passes(model, seconds) for model in models]
            for _ in range(repeats):
                for model, count, record in zip(models, passes, times, strict=True):
                    record.append(1000 * clock.run(model, count))
        except Exception as error:
            error.add_note("while measuring latency: every model must accept these inputs, on its device")
            raise
    first = statistics.median(times[0])
    ratios = (statistics.median(b / a for a, b in zip(times[0], record, strict=True)) for record in times[1:])
    return [first, *(first * ratio for ratio in ratios)]


class _Clock:
    """Times forward passes on a device, by the clock that others disturb least."""

    def __init__(self, device: torch.device, inputs: Any) -> None:
        self.device, self.inputs = device, inputs
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        # some systems count a thread's time in ticks of many milliseconds
        fine = time.get_clock_info("thread_time").resolution <= 1e-6
        self.now = time.thread_time if alone and fine else time.perf_counter

    def run(self, model: nn.Module, passes: int) -> float:
        """Seconds of one of so many passes."""
        start = self.now()
        for _ in range(passes):
            call(model, self.inputs)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return max(self.now() - start, 1e-9) / passes

    def passes(self, model: nn.Module, seconds: float) -> int:
        """How many passes take about so long; at least one."""
        self.run(model, 1)  # what happens once: memory, kernels, and on an accelerator the work that still waits
        return max(1, int(seconds / max(min(self.run(model, 1) for _ in range(2)), 1e-6)))
