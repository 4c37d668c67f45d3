"""Trying groups out: a model without some units must compute what the model with those units silent does."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.inputs import call, each_input, output_tensors
from hf_effdl.structure.groups.surgery import cut, mask


@torch.no_grad()
def in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """A model and its inputs in double precision, where it runs in that: what a few units change shows up better."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        double, doubled = deepcopy(model).double(), each_input(wide, inputs)
        if all(tensor.dtype == torch.float64 for tensor in output_tensors(call(double, doubled))):
            return double, doubled
    except Exception:  # noqa: BLE001 - a dtype written into the forward pass, a device without double precision
        pass
    return model, inputs


def keep_removable(model: nn.Module, inputs: Any, groups: Sequence[Group], skipped: dict[str, str]) -> list[Group]:
    """Only the groups whose units can be taken out; the rest goes to `skipped`."""
    if not groups or _is_removable(model, inputs, groups):  # the common case costs two forward passes in all
        return list(groups)
    if len(groups) == 1:
        skipped[groups[0].name] = "a model without some of them is not the model in which those are silent"
        return []
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:])
    return [group for half in halves for group in keep_removable(model, inputs, half, skipped)]


@torch.no_grad()
def _is_removable(model: nn.Module, inputs: Any, groups: Sequence[Group]) -> bool:
    # several at once, so that means and norms over the units change visibly; few, so that the signal stays
    kept = {group.name: torch.arange(group.units) for group in groups if group.units > 1}
    kept = {name: index[index % 8 > 0] for name, index in kept.items()}
    silent = output_tensors(call(mask(deepcopy(model), groups, kept), inputs))
    try:
        small = output_tensors(call(cut(deepcopy(model), groups, kept), inputs))
    except Exception:  # noqa: BLE001 - a size written into the forward pass may break it in any way
        return False
    return len(silent) == len(small) and all(map(_equal, silent, small))


def _equal(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-6 if a.dtype == torch.float64 else 1e-4
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + a.abs().max()))
