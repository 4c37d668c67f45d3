"""Work on the side of a run: random numbers are drawn, and models asked, that are left as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random states as they were."""
    import random

    import numpy

    states = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices; for use within `random_state_kept`."""
    import random

    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, but that one writes the stack down for a device that might come, which takes 30 times as long
        torch.default_generator.manual_seed(seed)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode for the length of a `with` block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
