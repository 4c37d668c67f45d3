"""The ranks of a LoRA adapter (PEFT): a unit is a column of B with the row of A that feeds it.

`W x + s B A x` is a sum over ranks, `s B[:, r] (A[r] . x)`, so a rank goes without a trace in the others: silent once
its column of B is zero (in an embedding, where A starts at zero, its row of A), gone with both slices.
"""

import sys
from typing import Any

import torch
from torch import nn

from hf_effdl.structure.groups.group import CONVS, Group, Groups, Network, Slice


# They move a part of the base weights into the adapter: ranks are chosen of what training has changed.
MOVED = ("pissa", "olora")
# The same, by data or for quantised weights, or they have ranks that cancel each other.
ENTANGLED = ("corda", "lora_ga", "loftq", "orthogonal")


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put adapter layers of any method into a model."""
    if "peft" not in sys.modules:  # nobody made one
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def refuse_adapter(model: nn.Module, what: str) -> None:
    """Refuse a model with an adapter for what needs units of the model's own."""
    if has_adapter(model):
        raise ValueError(
            f"{what} has no use for the ranks of an adapter, and the weights it adapts are frozen: pass the model "
            "without one, or choose ranks with select_lora_ranks after SplitLBITrainer.train()"
        )


def lora_groups(model: nn.Module) -> Groups:
    """One group per module that the active LoRA adapter adapts, named as the module; see `find_groups`.

    MACs are those of one position (a token).

    Raises:
        ValueError: the adapter is of another method or variant, several are active, they are merged into the weights,
            or their ranks cannot go one at a time; names the module and the setting.
    """
    layers = _layers(model)
    adapter = active_adapter(model)
    _check_config(getattr(model, "peft_config", {}).get(adapter))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parts = {name: _slices(name, layer, adapter) for name, layer in layers.items() if holds(layer, adapter)}
    tensors = {part.tensor for pair in parts.values() for part in pair}
    network = Network(shapes, {name: 1 for name in shapes if name in tensors})
    return Groups(_group(name, pair, network, model) for name, pair in parts.items())


def holds(layer: Any, adapter: str) -> bool:
    """Whether a LoRA layer has ranks of an adapter."""
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def active_adapter(model: nn.Module) -> str:
    """The name of the one active adapter of a model with LoRA layers."""
    names = dict.fromkeys(name for layer in _layers(model).values() for name in layer.active_adapters)
    if not names:
        raise ValueError("the model has no LoRA layer, so there are no ranks to choose; adapt it by a LoraConfig")
    if len(names) != 1:
        raise ValueError(
            f"the adapters {list(names)} are active, and ranks are chosen of one at a time; "
            "call model.set_adapter(name) first"
        )
    return next(iter(names))


def _layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of a model by name; layers of other methods are refused."""
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        if not isinstance(layer, LoraLayer) or isinstance(layer, AdaLoraLayer):
            raise ValueError(
                f"{name} is a {type(layer).__module__}.{type(layer).__name__}: only adapters of LoRA have ranks that "
                "can be chosen here; make the model with LoraConfig"
            )
    return layers


def takes_base_weights(config: Any) -> bool:
    """Whether an adapter began with a part of the base weights, by its config."""
    init = config.init_lora_weights
    return isinstance(init, str) and init.lower().startswith(MOVED)


def _check_config(config: Any) -> None:
    """Refuse settings under which a rank cannot go alone."""
    if config is None:
        return
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(ENTANGLED):
        raise ValueError(
            f"init_lora_weights={init!r} puts a part of the base weights into the adapter, or ranks that cancel each "
            "other, so that no rank can go alone; begin with init_lora_weights=True, 'gaussian', 'eva', 'pissa' or "
            "'olora'"
        )
    if config.target_parameters:
        raise ValueError(f"target_parameters={config.target_parameters}: ranks are chosen of target_modules only")
    if tied := getattr(config, "target_modules_to_tie", None):
        raise ValueError(
            f"{sorted(tied)} share their adapter with the embedding (ensure_weight_tying): one rank cannot go from "
            "both; leave them out of target_modules"
        )


def _slices(name: str, layer: Any, adapter: str) -> tuple[Slice, Slice]:
    """The slice that falls silent, and the one that goes with it."""
    _check_layer(name, layer, adapter)
    if adapter in layer.lora_embedding_A:
        pair = [Slice(f"{name}.lora_embedding_{kind}.{adapter}", axis, 1, "") for kind, axis in (("A", 0), ("B", 1))]
    else:
        pair = [Slice(f"{name}.lora_{kind}.{adapter}.weight", axis, 1, "") for kind, axis in (("B", 1), ("A", 0))]
    return tuple(Slice(part.tensor, part.axis, 1, role) for part, role in zip(pair, ("row", "input"), strict=True))


def _check_layer(name: str, layer: Any, adapter: str) -> None:
    """Refuse layers whose ranks cannot be sliced."""
    why = None
    variant = layer.lora_variant.get(adapter)
    weights = [part[adapter] for part in (layer.lora_A, layer.lora_B) if adapter in part]
    if layer.merged:
        why = "is merged into the base weights; call unmerge_adapter() first"
    elif variant is not None and not layer.use_dora.get(adapter):
        why = f"is of the variant {type(variant).__name__}; plain LoRA, rsLoRA and DoRA can be chosen from"
    elif isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        why = "adapts an nn.MultiheadAttention, whose projections have one rank in PEFT's files; leave it out"
    elif any(type(part) not in (nn.Linear, *CONVS) for part in weights):
        why = f"keeps its ranks in a {type(weights[0]).__name__}, which cannot be sliced"
    elif any(getattr(part, "groups", 1) > 1 for part in weights):
        why = "adapts a convolution with groups, whose ranks belong to one group each; leave it out of target_modules"
    elif any(not p.is_floating_point() or p.dtype.itemsize == 1 for part in weights for p in part.parameters()):
        why = "has quantised adapter weights, which cannot be sliced; the base weights alone may be quantised"
    if why:
        raise ValueError(f"the LoRA adapter {adapter!r} of {name} {why}")


def _group(name: str, pair: tuple[Slice, Slice], network: Network, model: nn.Module) -> Group:
    first, _ = pair
    weight = model.get_parameter(first.tensor)
    lifted = {first.tensor: weight} if weight.requires_grad else {}
    from_zero = not bool(torch.count_nonzero(weight.detach()))
    units = weight.shape[first.axis]
    return Group(name, units, pair, tuple(lifted), network, lifted, from_zero=from_zero)
