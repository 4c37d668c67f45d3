"""Adapters that began with a part of the base weights, PiSSA's and OLoRA's, as what training has changed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.files import read_tensors
from hf_effdl.structure.groups.finders.lora import lora_groups, takes_base_weights
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.surgery import set_sizes


HOW = (
    "adapter.peft_config[name].init_lora_weights = True; adapter.save_pretrained(folder) before training, and "
    "initial=folder here"
)


def initial_tensors(model: Any, adapter: str, groups: Sequence[Group], initial: Any) -> dict[str, Tensor]:
    """What the ranks of an adapter were before training, by the names that they have in the model; none: empty.

    Args:
        model: a `PeftModel`.
        adapter: its name.
        groups: its ranks.
        initial: see `select_lora_ranks`.
    """
    config = model.peft_config[adapter]
    if initial is None:
        if takes_base_weights(config):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} moved a part of the base weights into the adapter, "
                f"so a smaller one is to hold what training has changed, and it takes what the adapter was: {HOW}"
            )
        return {}
    stored, wanted = _stored(initial), {}
    for name in [part.tensor for group in groups for part in group.slices]:
        key, shape = name.replace(f".{adapter}", ""), model.get_parameter(name).shape
        tensor = stored.get(key, stored.get(name))
        if not isinstance(tensor, Tensor) or tensor.shape != shape or not tensor.isfinite().all():
            found = "no such tensor" if not isinstance(tensor, Tensor) else f"one of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"initial holds {found} for {key}, where the adapter has finite numbers of shape {tuple(shape)}: it "
                f"is of another adapter; {HOW}"
            )
        wanted[name] = tensor
    if dora := [group.name for group in groups if model.get_submodule(group.name).use_dora.get(adapter)]:
        raise ValueError(
            f"{dora[0]} has DoRA, whose norms are of the base weights that initial= brings back: leave it"
        )
    weights = {group.name: model.get_submodule(group.name).get_base_layer().weight for group in groups}
    if packed := [
        name for name, weight in weights.items() if not weight.is_floating_point() or weight.dtype.itemsize == 1
    ]:
        raise ValueError(
            f"{packed[0]} has base weights in {weights[packed[0]].dtype}, to which what the adapter took from them "
            "cannot be given back: train on weights that are not quantised"
        )
    return wanted


def _stored(initial: Any) -> Mapping[str, Any]:
    if isinstance(initial, Mapping):
        return initial
    if not isinstance(initial, str | os.PathLike):
        raise TypeError(
            f"initial is a {type(initial).__name__}: pass the folder of the adapter as it was before training, or its "
            "tensors by name"
        )
    file = Path(initial) / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; save the adapter before training: {HOW}")
    return read_tensors(file, remedy="save the adapter before training, and pass its folder")


@torch.no_grad()
def as_change(model: Any, adapter: str, groups: Sequence[Group], before: Mapping[str, Tensor]) -> list[Group]:
    """Let an adapter hold what training has changed and the base weights be what they were, in place.

    With `W0 = W + s B0 A0` the weights as they were, `W + s B A = W0 + s [B, -B0] [A; A0]`, an adapter of twice as
    many ranks. Where `before` is empty nothing changes.

    Args:
        model: a `PeftModel`.
        adapter: its name.
        groups: its ranks.
        before: of `initial_tensors`.

    Returns:
        the groups of the adapter as it is now.
    """
    for group in groups if before else ():
        layer = model.get_submodule(group.name)
        first, second = (model.get_parameter(part.tensor) for part in group.slices)
        trained = [first.clone(), second.clone()]
        for p, part in zip((first, second), group.slices, strict=True):
            p.copy_(before[part.tensor])
        weight = layer.get_base_layer().weight
        weight.add_(layer.get_delta_weight(adapter).to(weight))
        for part, now, sign in zip(group.slices, trained, (-1, 1), strict=True):
            both = torch.cat([now, sign * model.get_parameter(part.tensor)], dim=part.axis)
            _put(model, part.tensor, both)
        rank = layer.r[adapter]
        layer.r[adapter] = 2 * rank
        layer.lora_alpha[adapter] *= 2**0.5 if model.peft_config[adapter].use_rslora else 2
    return lora_groups(model) if before else list(groups)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, leaf, nn.Parameter(tensor, model.get_parameter(name).requires_grad))
    set_sizes(module)
