"""`select_lora_ranks`: from a trained LoRA adapter and its path to a smaller plain one."""

import os
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.checks import one_of
from hf_effdl.processes import forget_accelerate
from hf_effdl.structure.groups.finders.lora import active_adapter, lora_groups
from hf_effdl.structure.groups.group import Group, check_module, rows_of
from hf_effdl.structure.groups.inputs import copy_of
from hf_effdl.structure.groups.surgery import cut
from hf_effdl.structure.lora.budget import check_limit, limit_of, ranks_within
from hf_effdl.structure.lora.initial import as_change, initial_tensors
from hf_effdl.structure.path.path import ORDERS, SparsePath


PREFIX = "base_model.model."
SIZE, EFFECT = "size", "effect"


@torch.no_grad()
def select_lora_ranks(
    model: nn.Module,
    path: SparsePath,
    budget: float = 0.5,
    *,
    unit: str = "params",
    order: str = "size",
    inplace: bool = False,
    initial: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A smaller plain LoRA adapter: the ranks that a budget keeps along the path, over all modules.

    Ranks are taken from one list, the best first, as long as they fit; what comes out computes what the adapter with
    the other ranks silent does. `rank_pattern` says each module's rank, `alpha_pattern` keeps its scaling, and a
    module that is left without a rank is no longer adapted. PEFT alone loads, merges and serves it.

    By default the ranks are first turned to the singular directions of each module's product, which changes no output:
    as they were trained, the columns of B are much alike, and leaving one out loses a part of what all of them say.
    A direction counts by its size, singular value times scaling, or by its effect, its share of the Fisher information
    but for a factor, singular value times `g / |a|`, with g the root mean square of the gradient's entries in the
    lifted tensor (`path.units[name]["gradient"]`) and |a| that of the norms of the other tensor's ranks.

    An adapter that began with a part of the base weights (PiSSA, OLoRA) is first said as what training has changed,
    `s (B A - B0 A0)`, on the base weights as they were, which takes `initial`. So what comes out loads on the model
    that everybody has; a module may then keep up to twice the ranks that it had.

    Args:
        model: a `PeftModel` with one active LoRA adapter (rsLoRA and DoRA too), as it was trained; stays as it is.
        path: of that run, `trainer.path`.
        budget: a share in (0, 1] of the adapter's ranks, or a whole number from 2 on.
        unit: what the budget counts: `"params"` of the adapter's A and B, or `"ranks"`.
        order: `"size"` or `"effect"`, as above; or `"dual"` or `"entry"`, ranks as they were trained, see
            `SparsePath.scores`: scores of different modules are compared as they are.
        inplace: make `model` itself smaller instead of a copy, which takes as much memory as the whole model.
        initial: the adapter as it was before training: the folder of its `save_pretrained`, or its tensors by name
            (`peft.get_peft_model_state_dict`). Needed for PiSSA and OLoRA, with `order` `"size"` or `"effect"`.

    Returns:
        A `PeftModel` with that adapter alone, ready to be saved, merged or trained on. What was kept stands in
        `small.effdl_report`: ranks and parameters before and after, by module and in all.

    Raises:
        TypeError: `model` is no `PeftModel`, or `path` no `SparsePath`.
        ValueError: a budget out of range or too small for one rank, a path of another adapter or without gradients, or
            an adapter whose ranks cannot go one at a time (see `find_groups`); `initial` of another adapter.
        FileNotFoundError: there is no adapter in `initial`.

    Example:
        >>> trainer.train()                                                   # doctest: +SKIP
        >>> small = select_lora_ranks(trainer.model, trainer.path, budget=0.5)  # doctest: +SKIP
        >>> small.save_pretrained("adapter")                                  # doctest: +SKIP
    """
    _check_types(model, path)
    one_of("order", order, (SIZE, EFFECT, *ORDERS))
    adapter, groups = active_adapter(model), lora_groups(model)
    _check_path(path, groups, order)
    _check_finite(model, path, groups)
    before = initial_tensors(model, adapter, groups, initial)
    if before and order in ORDERS:
        raise ValueError(f"order={order!r} is of ranks as they were trained, initial= of what changed: take 'size'")
    costs = {group.name: group.params for group in groups}
    limit = limit_of(budget, unit, costs, {group.name: group.units for group in groups})
    least = {group.name: _least(model, group.name, adapter) for group in groups}
    paid = costs if unit == "params" else dict.fromkeys(costs, 1)
    check_limit(paid, limit, least)  # before anything is turned
    small = model if inplace else copy_of(model)
    forget_accelerate(small)
    now = as_change(small, adapter, groups, before)
    scores = path.scores(order, relative=False) if order in ORDERS else _worths(small, now, path, order)
    kept = ranks_within(scores, paid, limit, least)
    _shrink(small, adapter, now, kept)
    small.effdl_report = _report(groups, kept, costs) | {"budget": {unit: budget}, "order": order}
    return small


def _check_types(model: Any, path: Any) -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"select_lora_ranks needs a PeftModel, not {type(model).__name__}; make it with get_peft_model(model, "
            "LoraConfig(...)) before training, and unwrap it from DDP or torch.compile (trainer.model is unwrapped)"
        )
    check_module(model, "select_lora_ranks")
    if not isinstance(path, SparsePath):
        raise TypeError(f"select_lora_ranks needs the SparsePath of the run (trainer.path), not {type(path).__name__}")


def _check_path(path: SparsePath, groups: list[Group], order: str) -> None:
    there, here = {name: len(unit["dual"]) for name, unit in path.units.items()}, {g.name: g.units for g in groups}
    if there != here:
        name = next(name for name in [*here, *there] if here.get(name) != there.get(name))
        raise ValueError(
            f"the path is of another adapter: {name} has {there.get(name, 'no')} ranks there and "
            f"{here.get(name, 'no')} here; pass the path of the run that trained this adapter"
        )
    if order == EFFECT and not all("gradient" in unit for unit in path.units.values()):
        raise ValueError(
            "order='effect' needs the gradients that a run with base='adamw' leaves in its path; pass another order"
        )


def _check_finite(model: nn.Module, path: SparsePath, groups: list[Group]) -> None:
    for group in groups:
        of_path = [path.units[group.name][key] for key in ("dual", "gradient") if key in path.units[group.name]]
        tensors = [model.get_parameter(part.tensor) for part in group.slices] + of_path
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError(
                f"{group.name} has entries that are nan or infinite, in the adapter or the path: the run "
                "diverged; train again with a lower learning_rate"
            )


def _least(model: nn.Module, name: str, adapter: str) -> int:
    """Ranks that a module cannot do without: what DoRA and biases learn besides would go with the last one."""
    layer, own_bias = model.get_submodule(name), model.peft_config[adapter].bias == "lora_only"
    return int(bool(layer.use_dora.get(adapter) or layer.lora_bias.get(adapter) or own_bias))


# ---- making it smaller


def _shrink(model: Any, adapter: str, groups: list[Group], kept: Mapping[str, Tensor]) -> None:
    """Take ranks out, in place: of the layers, and of what the config says."""
    for other in [name for name in model.peft_config if name != adapter]:
        model.delete_adapter(other)
    cut(model, groups, {name: ranks for name, ranks in kept.items() if len(ranks)})
    config = model.peft_config[adapter]
    config.rank_pattern, config.alpha_pattern = {}, {}
    stay = [group.name for group in groups if len(kept[group.name])]
    # PEFT takes the first pattern that a module's name ends with
    for name in sorted(stay, key=lambda name: (-len(name), name)):
        layer, rank = model.get_submodule(name), len(kept[name])
        rank_before, layer.r[adapter] = layer.r[adapter], rank
        # scaling is alpha / r, or alpha / sqrt(r) with rsLoRA
        share = rank / rank_before
        layer.lora_alpha[adapter] = _tidy(layer.lora_alpha[adapter] * (share**0.5 if config.use_rslora else share))
        config.rank_pattern[name.removeprefix(PREFIX)] = rank
        config.alpha_pattern[name.removeprefix(PREFIX)] = layer.lora_alpha[adapter]
    gone = [group.name for group in groups if not len(kept[group.name])]
    for name in gone:
        _take_off(model, name)
    if gone:
        _name_targets(model, config, stay)
    config.init_lora_weights = True  # others may need data, or a rank of their own kind


def _tidy(alpha: float) -> float:
    """A whole number as one, as configs have it."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def _take_off(model: nn.Module, name: str) -> None:
    """Put the module that a layer adapts back in its place."""
    parent, _, leaf = name.rpartition(".")
    layer = model.get_submodule(name)
    whole = getattr(layer, "unload_and_optionally_merge_module", None)  # of attention that keeps its weights apart
    plain = layer.get_base_layer() if whole is None else whole(merge=False, safe_merge=False, adapter_names=None)
    setattr(model.get_submodule(parent), leaf, plain)


def _name_targets(model: nn.Module, config: Any, stay: list[str]) -> None:
    """Say in a config which modules are adapted, one by one."""
    names = {name.removeprefix(PREFIX) for name in stay}
    config.target_modules = names
    config.layers_to_transform = config.layers_pattern = None
    # PEFT adapts what ends with a name too: modules left without a rank, and those that were never adapted
    others = {name.removeprefix(PREFIX) for name, _ in model.named_modules() if name.startswith(PREFIX)} - names
    config.exclude_modules = {name for name in others if name.endswith(tuple(f".{name}" for name in names))} or None


# ---- singular directions


def _worths(model: nn.Module, groups: list[Group], path: SparsePath, order: str) -> dict[str, Tensor]:
    """Turn all ranks to singular directions, in place, and say what each is worth, by module."""
    worths, adapter = {}, active_adapter(model)
    for group in groups:
        factor = torch.tensor(float(model.get_submodule(group.name).scaling[adapter]))
        if order == EFFECT:
            other = group.slices[1]
            size = rows_of(model.get_parameter(other.tensor), other, group.units).float().square().sum(1).mean().sqrt()
            factor = path.units[group.name]["gradient"].square().mean().sqrt() / size.clamp_min(1e-12).cpu()
        worths[group.name] = (_turn(model, group) * factor).float()
    return worths


def _turn(model: nn.Module, group: Group) -> Tensor:
    """B A by its singular values, the largest first, in place: `B <- U S, A <- V`; the values of all ranks."""
    first, second = (model.get_parameter(part.tensor) for part in group.slices)
    # B is (outputs, ranks), A is (ranks, inputs), each with the axes of a convolution's kernel behind
    b, a = (first, second) if group.slices[0].axis else (second, first)
    # in double: of a difference little may be left
    wide = torch.float32 if b.device.type == "mps" else torch.float64
    rank, outputs, inputs = a.shape[0], b.shape[0], prod(a.shape[1:])
    q_b, r_b = torch.linalg.qr(b.detach().to(wide).reshape(outputs, rank))
    q_a, r_a = torch.linalg.qr(a.detach().to(wide).reshape(rank, inputs).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    found = len(s)  # fewer than ranks in a module that is narrower than its adapter
    b.zero_(), a.zero_()
    b.reshape(outputs, rank)[:, :found] = (q_b @ u * s).to(b.dtype)
    a.reshape(rank, inputs)[:found] = (v @ q_a.T).to(a.dtype)
    return torch.nn.functional.pad(s, (0, rank - found)).cpu()


def _report(groups: list[Group], kept: Mapping[str, Tensor], costs: Mapping[str, int]) -> dict[str, Any]:
    ranks = {group.name: {"before": group.units, "after": len(kept[group.name])} for group in groups}
    totals = {}
    for name, cost in (("ranks", dict.fromkeys(costs, 1)), ("params", costs)):
        before, after = (
            sum(cost[module] * pair[when] for module, pair in ranks.items()) for when in ("before", "after")
        )
        totals[name] = {"before": before, "after": after, "ratio": after / before}
    return {"units": ranks, **totals}
