"""The state of a `SplitLBI` in a checkpoint: what it says of the support, and how it grows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


# What new units have in the optimizer's state, per unit; the threshold is the mean of the old ones'.
NEW_UNIT = {"norm": 0, "entered": -1, "left": -1}
BASE = ("momentum_buffer", "updates", "exp_avg", "exp_avg_sq")  # what the base optimizer remembers
RELEASE = 1e6  # nu times this is no ridge; path_scale times this leaves the speed of V as it was


def saved_support(optimizer: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Units in the support and units in all, per lifted group, from the state dict of a `SplitLBI`."""
    found = {}
    for group in optimizer["param_groups"]:
        if group["penalty"] == "group":
            unit = optimizer["state"].get(group["params"][0], {})
            inside = int((unit["norm"] > unit["threshold"]).sum()) if "norm" in unit else 0
            found[group["name"]] = (inside, group["units"])
    return found


def optimizer_names(model: nn.Module, params: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the parameters in the order in which an optimizer over these param groups numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in params for p in group["params"]]


def grow_optimizer(
    optimizer: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, Sequence[int]], add: Mapping[str, int]
) -> dict[str, Any]:
    """The state dict of a `SplitLBI` for the grown model: old entries as they are, zeros for the new.

    Args:
        optimizer: the state dict before.
        names: parameters in its order (`optimizer_names`).
        shapes: of the grown model's parameters.
        add: new units by group.
    """
    if len(names) != sum(len(group["params"]) for group in optimizer["param_groups"]):
        raise ValueError(
            "this checkpoint is of other groups: its optimizer has another number of parameters. Resume "
            "with the model, preset and groups that it was trained with"
        )
    groups, states = [], {}
    for group in optimizer["param_groups"]:
        more = add.get(group["name"], 0) if group["penalty"] == "group" else 0
        groups.append({**group, "units": group["units"] + more} if more else dict(group))
        for key in group["params"]:
            state = optimizer["state"].get(key)
            if state is not None:
                states[key] = {
                    name: _grown_entry(name, value, shapes[names[key]], more) for name, value in state.items()
                }
    return {**optimizer, "state": states, "param_groups": groups}


def _grown_entry(name: str, value: Any, shape: Sequence[int], more: int) -> Any:
    if not torch.is_tensor(value) or value.ndim == 0:  # counters, and thresholds of whole tensors
        return value
    if name in NEW_UNIT:
        return torch.cat([value, value.new_full((more,), NEW_UNIT[name])])
    if name == "threshold":
        return torch.cat([value, value.mean().expand(more)])
    if value.shape == torch.Size(shape):
        return value
    grown = value.new_zeros(tuple(shape))  # new units come last along every axis
    grown[tuple(slice(size) for size in value.shape)] = value
    return grown


def release(optimizer: Mapping[str, Any], weight_decay: float) -> None:
    """Let go of the ridge, in place; lifted tensors get the weight decay that had the ridge in its place."""
    for group in optimizer["param_groups"]:
        group |= {name: RELEASE * group[name] for name in ("nu", "path_scale")}
        if group["penalty"]:
            group["weight_decay"] = weight_decay


def restart(optimizer: Mapping[str, Any], rate: float) -> None:
    """For new weights, in place: no momentum or moments, V 0, no unit ever entered, and a first learning rate."""
    for state in optimizer["state"].values():
        for name in BASE:
            state.pop(name, None)
        for name, value in state.items():
            if name == "dual" or name in NEW_UNIT:
                state[name] = torch.full_like(value, NEW_UNIT.get(name, 0))
    for group in optimizer["param_groups"]:
        group["lr"] = rate
