"""What one step of `SplitLBI` asks of whatever carries it out: tensor operations, a C++ loop, or a compiled graph."""

from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl.structure.optim.checks import dual_dtype, gradients_are_finite, initial_size


State = MutableMapping[Tensor, dict[str, Any]]  # of an optimizer


class Kernel(ABC):
    """Carries out steps of some param groups.

    Args:
        groups: the param groups; those without parameters are passed over.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups = [group for group in groups if group["params"]]

    def fits(self) -> bool:
        """Whether the parameters still are as they were when it was made."""
        return True

    def finite(self) -> bool:
        """Whether all gradients are finite, in one fast pass. It may say no where only their norm overflows."""
        return gradients_are_finite([p.grad for group in self.groups for p in group["params"] if p.grad is not None])

    def prepare(self, state: State) -> None:
        """Create what is not there yet: the base's buffers of the parameters with gradients, V and thresholds."""
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    _create_buffers(group, p, state[p])
            if group["penalty"] and "step" not in state[group["params"][0]]:
                _create_path(group, state)

    @abstractmethod
    def step(self, state: State) -> None:
        """Move parameters and state, both in place."""


def _create_buffers(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
    if group["base"] == "adamw" and "exp_avg" not in state:
        state["updates"] = torch.zeros((), dtype=torch.int64)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    elif group["base"] == "sgd" and group["momentum"] and "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p)


def _create_path(group: dict[str, Any], state: State) -> None:
    """V, thresholds and the record of a lifted group, as they are before the first step."""
    first = state[group["params"][0]]
    for p in group["params"]:
        state[p]["dual"] = torch.zeros_like(p, dtype=dual_dtype(p))
        if group["penalty"] == "l1":
            state[p]["threshold"] = initial_size(group, [p])
    if group["penalty"] == "group":
        threshold = initial_size(group, group["params"])
        never = torch.full_like(threshold, -1, dtype=torch.int64)
        first |= {"threshold": threshold, "norm": torch.zeros_like(threshold), "entered": never, "left": never.clone()}
    first["step"] = torch.zeros((), dtype=torch.int64)
