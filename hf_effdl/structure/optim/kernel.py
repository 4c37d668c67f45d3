"""What one step of `SplitLBI` asks of whatever carries it out: tensor operations, a C++ loop, or a compiled graph."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl.structure.optim.checks import dual_dtype, gradients_are_finite, initial_size
from hf_effdl.structure.optim.prox import unit_norm


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
        state[p]["dual"] = initial_dual(group, p)
        if group["penalty"] == "l1":
            state[p] |= _thresholds(group, [p])
    if group["penalty"] == "group":
        first |= _thresholds(group, group["params"])
        duals = [state[p]["dual"] for p in group["params"]]
        norm = unit_norm(duals, group["axis"], group["block"], group["scale"])
        never = torch.full_like(norm, -1, dtype=torch.int64)
        # at step 0, before any training, only a dense start has units inside
        first |= {"norm": norm, "entered": torch.where(norm > 0, 0, never), "left": never}
    first["step"] = torch.zeros((), dtype=torch.int64)


def initial_dual(group: Mapping[str, Any], p: Tensor) -> Tensor:
    """V of a lifted parameter before the first step: 0, or where the path starts dense, W / kappa, so Gamma is W."""
    if group["start"] == "empty":
        return torch.zeros_like(p, dtype=dual_dtype(p))
    return p.detach().to(dual_dtype(p), copy=True).div_(group["kappa"])


def _thresholds(group: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Tensor]:
    """The threshold at the start, and where it will rise, what it rises in units of."""
    size = initial_size(group, params).contiguous()
    return {"threshold": size} if group["start"] == "empty" else {"threshold": torch.zeros_like(size), "rises": size}


def raise_thresholds(groups: Sequence[Mapping[str, Any]], state: State) -> None:
    """The thresholds of paths that started dense rise by `rise lr`, in place; the units that they pass leave.

    It comes first in a step. The pass over memory that follows works with the new thresholds and records who came
    back.
    """
    for group in groups:
        if not group["params"] or group["penalty"] is None or group["start"] != "dense":
            continue
        share = group["rise"] * float(group["lr"])
        for p in group["params"] if group["penalty"] == "l1" else group["params"][:1]:
            state[p]["threshold"].add_(state[p]["rises"], alpha=share)
        unit = state[group["params"][0]]
        if group["penalty"] == "group":
            falls = (unit["norm"] <= unit["threshold"]) & (unit["left"] < 0) & (unit["entered"] >= 0)
            unit["left"].masked_fill_(falls, int(unit["step"]) + 1)
