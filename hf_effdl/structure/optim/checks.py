"""What the param groups of `SplitLBI` may hold, checked when they are given and again at every step."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl.checks import flag, real_number
from hf_effdl.structure.optim.prox import unit_norm
from hf_effdl.structure.optim.sharding import local, on_any_process, whole


PENALTIES = (None, "l1", "group")
LAM_SCALES = ("init", "none")
BASES = ("sgd", "adamw")
STARTS = ("empty", "dense")
POSITIVE = ("lr", "kappa", "nu", "lam", "path_scale")
# What V, the thresholds and the record of a lifted group rest on.
FIXED = ("penalty", "name", "axis", "block", "scale", "units", "lam", "lam_scale", "base", "start", "penalty_factor")


def dual_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def initial_size(group: Mapping[str, Any], params: Sequence[Tensor]) -> Tensor:
    """Thresholds of a group, by unit (`"group"`) or for its one tensor (`"l1"`), from the weights now.

    With `start="dense"` what they rise in units of: all of a group alike, from the mean norm of V at the start.
    """
    tensors = [p.detach().to(dual_dtype(p)) for p in params]
    if group["penalty"] == "l1":
        # not the mean: older versions of torch take that of uneven shards for the mean of their means
        size = (whole(tensors[0].square().sum()) / tensors[0].numel()).sqrt()
    else:
        size = unit_norm(tensors, group["axis"], group["block"], group["scale"])
    if group["lam_scale"] != "init":
        size = torch.ones_like(size)
    elif group["start"] == "dense":
        size = (size.mean() / group["kappa"]).expand_as(size)
    factor = group["penalty_factor"]
    return group["lam"] * (size if factor is None else size * size.new_tensor(factor))


def check_group(group: dict[str, Any]) -> None:
    """Refuse a param group that cannot be worked on; fills in `name`, `units` and one value per tensor."""
    name = group.setdefault("name", "unnamed")
    for key, choices in (("base", BASES), ("penalty", PENALTIES), ("lam_scale", LAM_SCALES), ("start", STARTS)):
        if group[key] not in choices:
            raise ValueError(f"{key}={group[key]!r} in group {name!r}: it must be one of {choices}")
    check_numbers(group, POSITIVE)
    # of Python, which alone is read back from a checkpoint; NumPy's float64 is a float as well
    for key in (*POSITIVE, "weight_decay", "eps", "momentum", "rise"):
        is_tensor = key == "lr" and isinstance(group[key], Tensor)  # torch's schedulers know one
        if type(group[key]) not in (int, float, type(None)) and not is_tensor:
            group[key] = real_number(key, group[key])
    group["betas"] = tuple(real_number("betas", beta) for beta in group["betas"])
    if group["decoupled_weight_decay"] is None:
        group["decoupled_weight_decay"] = group["base"] == "adamw"
    _check_types(group, name)
    if group["penalty"] is None:
        return
    if not group["params"]:
        raise ValueError(f"group {name!r} has penalty={group['penalty']!r} but no parameters; remove it")
    if group["penalty"] == "group":
        _check_units(group, name)
    _check_thresholds(group, name)
    check_devices(group)
    if group["lam_scale"] == "init" and all(p.device.type != "meta" for p in group["params"]):
        _check_initial_sizes(group, name)


def _check_thresholds(group: dict[str, Any], name: str) -> None:
    """Refuse thresholds that would not rise, or whose factors are not one positive number per unit."""
    if group["start"] == "dense":
        if group["rise"] is None:
            raise ValueError(
                f"start='dense' in group {name!r} needs rise=, how fast the threshold rises; derive_path(total_lr, "
                "start='dense') gives it"
            )
        check_numbers(group, ("rise",))
    if group["penalty_factor"] is None:
        return
    try:
        factors = torch.as_tensor(group["penalty_factor"], dtype=torch.float64).tolist()
    except (TypeError, ValueError, RuntimeError):
        factors = None
    if group["penalty"] != "group" or not isinstance(factors, list) or len(factors) != group["units"]:
        raise ValueError(
            f"penalty_factor of group {name!r} must hold one number for each of its {group.get('units', 'no')} units"
        )
    if not all(0 < factor < float("inf") for factor in factors):
        raise ValueError(f"penalty_factor of group {name!r} must hold positive finite numbers")
    group["penalty_factor"] = factors


def _check_types(group: Mapping[str, Any], name: str) -> None:
    for p in group["params"]:
        if group["penalty"] and not p.is_floating_point():
            raise TypeError(f"group {name!r} lifts a {p.dtype} tensor; only real floating point tensors can be lifted")
        if p.is_complex():
            raise TypeError(
                f"group {name!r} holds a {p.dtype} tensor; give SplitLBI its real view, torch.view_as_real(p)"
            )


def _check_initial_sizes(group: Mapping[str, Any], name: str) -> None:
    lifts = [[p] for p in group["params"]] if group["penalty"] == "l1" else [group["params"]]
    for params in lifts:
        zeros = int((initial_size(group, params) == 0).sum())
        if zeros:
            raise ValueError(
                f"{zeros} units of group {name!r} have an initial norm of zero, so lam_scale='init' gives them no "
                "threshold; initialise them, lift other tensors, or pass lam_scale='none'"
            )


def check_numbers(group: Mapping[str, Any], positive: Sequence[str]) -> None:
    """Refuse numbers of a param group that are out of range."""
    name = group["name"]
    for key in (*positive, "lr", "weight_decay", "eps", "momentum"):
        real_number(key, group[key])
    for key in positive:
        if not 0 < float(group[key]) < float("inf"):
            raise ValueError(
                f"{key}={group[key]} in group {name!r}: it must be a positive finite number; pass {key}=..."
            )
    if not 0 <= float(group["lr"]) < float("inf"):  # a schedule may reach zero
        raise ValueError(f"lr={group['lr']} in group {name!r}: it must be a finite number, not below zero")
    for key in ("weight_decay", "eps"):
        if not 0 <= group[key] < float("inf"):
            raise ValueError(f"{key}={group[key]} in group {name!r}: it must not be negative, and finite")
    _check_momentum(group, name)


def _check_momentum(group: Mapping[str, Any], name: str) -> None:
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']} in group {name!r}: it must be in [0, 1)")
    if not isinstance(group["betas"], (tuple, list)):
        raise ValueError(f"betas={group['betas']!r} in group {name!r}: they must be two numbers in [0, 1)")
    for beta in group["betas"]:
        real_number("betas", beta)
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']} in group {name!r}: they must be two numbers in [0, 1)")
    flag("nesterov", group["nesterov"])
    if group["decoupled_weight_decay"] is not None:
        flag("decoupled_weight_decay", group["decoupled_weight_decay"])
    if group["nesterov"] and (group["base"] != "sgd" or not group["momentum"]):
        raise ValueError(
            f"nesterov=True in group {name!r} needs base='sgd' with a momentum above 0; it has base={group['base']!r} "
            f"and momentum={group['momentum']}"
        )


def check_devices(group: Mapping[str, Any]) -> None:
    devices = sorted({str(p.device) for p in group["params"]})
    if group["penalty"] == "group" and len(devices) > 1:
        raise ValueError(
            f"the tensors of group {group['name']!r} are on {' and '.join(devices)}: the slices of a unit share one "
            "norm, so they must be on one device; move them, or lift them in param groups of their own"
        )


def _check_units(group: dict[str, Any], name: str) -> None:
    """Bring `axis`, `block` and `scale` to one value per tensor, and check that the units agree."""
    count = len(group["params"])
    for key, default in (("axis", 0), ("block", 1), ("scale", 1.0)):
        value = group.get(key, default)
        group[key] = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(group[key]) != count:
            raise ValueError(
                f"group {name!r} has {count} tensors but {len(group[key])} values in {key}={group[key]}; give one each"
            )
    for scale in group["scale"]:
        if not 0 < float(scale) < float("inf"):
            raise ValueError(f"scale={scale} of group {name!r} must be a positive finite number")
    group["scale"] = [float(scale) for scale in group["scale"]]
    for key in ("axis", "block"):
        group[key] = [operator.index(value) for value in group[key]]
    parts = list(zip(group["params"], group["axis"], group["block"], strict=True))
    units = {_units_along(p, axis, block, name) for p, axis, block in parts}
    group["axis"] = [axis % p.ndim for p, axis, _ in parts]
    if len(units) > 1 or group.get("units", *units) not in units:
        raise ValueError(
            f"the tensors of group {name!r} have {sorted(units)} units along axis={group['axis']} (units="
            f"{group.get('units')}): one param group is one group of units, so give each its own param group"
        )
    group["units"] = units.pop()


def _units_along(p: Tensor, axis: int, block: int, name: str) -> int:
    if not -p.ndim <= axis < p.ndim:
        raise ValueError(f"axis={axis} of group {name!r} is outside its tensor of shape {tuple(p.shape)}; change it")
    if block < 1 or p.shape[axis] % block:
        raise ValueError(
            f"block={block} of group {name!r} does not divide axis {axis} of shape {tuple(p.shape)}; change it"
        )
    return p.shape[axis] // block


def snapshot(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group as it is now, to compare with at the next step."""
    copied = dict(group)
    for key, value in group.items():
        if isinstance(value, list):
            copied[key] = list(value)
        elif isinstance(value, Tensor):  # a learning rate, which its schedule may write to
            copied[key] = value.item()
    return copied


def check_unchanged(groups: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None) -> None:
    """Check the numbers of groups that were edited since the last step, and refuse edits in what the state rests on.

    Args:
        groups: the param groups.
        before: their snapshots from the last step; None where there was none.
    """
    if before is not None and len(groups) != len(before):
        raise ValueError(
            f"there were {len(before)} param groups at the last step and now there are {len(groups)}; add groups with "
            "add_param_group, and make a new SplitLBI to take some away"
        )
    for group, old in zip(groups, before or [None] * len(groups), strict=True):
        if old is None or _was_edited(group, old):
            check_numbers(group, POSITIVE[1:] if group["start"] == "empty" else (*POSITIVE[1:], "rise"))
            check_devices(group)


def _was_edited(group: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether numbers were edited; refuses edits in what the state rests on."""
    moved = len(group["params"]) != len(old["params"]) or any(map(operator.is_not, group["params"], old["params"]))
    if not moved and group == old:
        return False
    fixed = FIXED if group["penalty"] or old["penalty"] else ("penalty", "base")
    changed = [key for key in fixed if group.get(key) != old.get(key)] + ["params"] * moved
    if changed:
        raise ValueError(
            f"{changed[0]!r} of param group {group['name']!r} was changed between two steps; V, thresholds "
            "and the path rest on what it was. Make a new SplitLBI (lr, nu and the like may be changed)"
        )
    return True


def named_tensors(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    return [
        (f"{group['name'] if group['name'] != 'unnamed' else f'param group {k}'}, tensor {i}", p)
        for k, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    ]


def check_dense_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    grads = [p.grad for group in groups for p in group["params"]]
    if all(grad is None or grad.layout is torch.strided for grad in grads):
        return
    name, layout = next(
        (name, p.grad.layout)
        for name, p in named_tensors(groups)
        if p.grad is not None and p.grad.layout is not torch.strided
    )
    raise TypeError(
        f"the gradient of {name} is sparse ({layout}), which SplitLBI cannot follow; use dense gradients "
        "(nn.Embedding(sparse=False)), or give that parameter to another optimizer"
    )


def gradients_are_finite(grads: Sequence[Tensor]) -> bool:
    """One fast pass over the gradients; what it takes of them can overflow although every entry is finite."""
    if not grads:
        return True
    parts = [local(grad) for grad in grads]
    if all(part.device.type == "cpu" for part in parts):  # where sums are faster; elsewhere norms take fewer calls
        total = torch.stack([part.sum() for part in parts]).sum()
    else:
        total = torch.nn.utils.get_total_norm(parts)
    return not on_any_process(not torch.isfinite(total), grads)


def check_finite_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse gradients of which an entry is not finite, by name; the pass for when `gradients_are_finite` says no."""
    named = [(name, p.grad) for name, p in named_tensors(groups) if p.grad is not None]
    bad = [name for name, grad in named if not torch.isfinite(local(grad)).all()]
    if on_any_process(bool(bad), [grad for _, grad in named]):
        where = f"the gradient of {bad[0]} ({len(bad)} tensors in all)" if bad else "a gradient on another process"
        raise ValueError(
            f"{where} has NaN or infinite entries; no parameter was changed by this step. Lower the learning rate, "
            "clip gradients, or look at the last batch"
        )


def check_same_groups(mine: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the state of an optimizer with other groups."""

    if list(map(_identity, mine)) == list(map(_identity, saved)):
        return
    here, there = _lifted_names(mine), _lifted_names(saved)
    missing = sorted(set(there) ^ set(here), key=[*there, *here].index)
    raise ValueError(
        f"this checkpoint is of other groups: it lifts {len(there)}, this optimizer {len(here)}; first difference: "
        f"{missing[0] if missing else 'tensors, axes, units or base of one group'}. Resume with the model, preset and "
        "groups that the checkpoint was trained with"
    )


def _lifted_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(group.get("name")) for group in groups if group.get("penalty")]


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ("penalty", "name", "axis", "block", "units", "base")
    return (*(group.get(key) for key in keys), len(group["params"]))
