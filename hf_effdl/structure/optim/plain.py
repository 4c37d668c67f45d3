"""The step of `SplitLBI` by tensor operations: for any device and dtype, and for tensors that FSDP2 shards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from hf_effdl.structure.optim.kernel import Kernel, State
from hf_effdl.structure.optim.prox import (
    joint_norm,
    joint_squares,
    per_entry,
    rows_in_cache,
    shrinkage,
    soft_threshold,
    squares,
    squares_of_rows,
)
from hf_effdl.structure.optim.sharding import is_sharded, local
from hf_effdl.structure.optim.update import update_in_place


# Names of the base's buffers in the state, in the order of `_direction`.
BUFFERS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class PlainStep(Kernel):
    """See the file."""

    def step(self, state: State) -> None:
        alike: dict[Any, list[dict[str, Any]]] = {}
        for group in self.groups:
            if group["penalty"] == "group":
                norm = state[group["params"][0]]["norm"]
                alike.setdefault((norm.device, norm.dtype), []).append(group)
            elif group["penalty"] is None and _is_sgd_of_torch(group):
                _step_as_torch(group, state)
            else:
                _step_entries(group, state)
        for groups in alike.values():
            _step_units(groups, state)


def _is_sgd_of_torch(group: Mapping[str, Any]) -> bool:
    """Whether torch's SGD for lists of tensors does the same; with Nesterov momentum it writes to the gradients."""
    own = group["nesterov"] or (group["decoupled_weight_decay"] and group["weight_decay"])
    return (
        group["base"] == "sgd" and not own and all(p.grad is None or p.grad.dtype is p.dtype for p in group["params"])
    )


def _step_as_torch(group: Mapping[str, Any], state: State) -> None:
    """The step of a group that is not lifted: many small tensors in few calls."""
    params = [p for p in group["params"] if p.grad is not None]
    sgd(
        params,
        [p.grad for p in params],
        [state[p].get("momentum_buffer") for p in params],
        lr=group["kappa"] * float(group["lr"]),
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _step_entries(group: Mapping[str, Any], state: State) -> None:
    """The step of a group without units."""
    for i, p in enumerate(group["params"]):
        if p.grad is not None:
            _step_tensor(group, i, state[p])
    if group["penalty"]:
        state[group["params"][0]]["step"] += 1


def _step_units(groups: Sequence[Mapping[str, Any]], state: State) -> None:
    """The step of groups with units on one device: a few operations on the units of all instead of some for each."""
    units = [state[group["params"][0]] for group in groups]
    sizes = [group["units"] for group in groups]
    norm, threshold, entered, left = (
        torch.cat([unit[name] for unit in units]) for name in ("norm", "threshold", "entered", "left")
    )
    factors = shrinkage(norm, threshold).split(sizes)
    new = torch.cat([_step_slices(*one, state) for one in zip(groups, factors, strict=True)])
    for unit in units:
        unit["step"] += 1
    now = torch.stack([unit["step"] for unit in units]).repeat_interleave(torch.tensor(sizes)).to(norm.device)
    was_in, is_in = norm > threshold, new > threshold
    entered = torch.where(is_in & (entered < 0), now, entered)
    left = torch.where(was_in & ~is_in, now, torch.where(is_in, -1, left))
    for name, values in (("norm", new), ("entered", entered), ("left", left)):
        for unit, part in zip(units, values.split(sizes), strict=True):
            unit[name].copy_(part)


def _step_slices(group: Mapping[str, Any], factor: Tensor, state: State) -> Tensor:
    """The step of the tensors of one group, whose units shrink by `factor`; the norms of the new V."""
    squared = []
    for i, p in enumerate(group["params"]):
        known = None if p.grad is None else _step_tensor(group, i, state[p], factor)
        squared.append(squares(state[p]["dual"], group["axis"][i]) if known is None else known)
    return joint_norm(squared, group["block"], group["scale"])


def _step_tensor(
    group: Mapping[str, Any], i: int, state: dict[str, Any], factor: Tensor | None = None
) -> Tensor | None:
    """The step of one tensor of a group, some rows at a time.

    Returns the squared norms of the new V, taken while it is in cache; None without units, or where it is sharded.
    """
    p = group["params"][i]
    if "updates" in state:
        state["updates"] += 1
    tensors = [p, p.grad, *(state[name] for name in BUFFERS[group["base"]] if name in state)]
    tensors += [state["dual"]] if group["penalty"] else []
    entries = None if factor is None else per_entry(factor, state["dual"], group["axis"][i], group["block"][i])
    # in sharded tensors the local parts alone: only the norms of the units need the others
    tensors = [local(tensor) for tensor in tensors]
    rows = rows_in_cache(tensors[0])
    parts = [tensors] if not p.ndim or rows == len(tensors[0]) else zip(*(t.split(rows) for t in tensors), strict=True)
    by_row = entries is not None and len(entries) > 1
    squared = []
    for k, part in enumerate(parts):
        _update(group, state, entries[k * rows : (k + 1) * rows] if by_row else entries, *part)
        if entries is not None and not is_sharded(p):
            squared.append(squares_of_rows(part[-1], group["axis"][i]))
    return joint_squares(squared, group["axis"][i]) if squared else None


def _update(
    group: dict[str, Any], state: dict[str, Any], entries: Tensor | None, weight: Tensor, grad: Tensor, *others: Tensor
) -> None:
    """The step of some rows of one tensor, in place; `others` are the base's buffers and V."""
    lr, kappa, decay = float(group["lr"]), group["kappa"], group["weight_decay"]
    buffers, dual = (others[:-1], others[-1]) if group["penalty"] else (others, weight)
    wide = weight.to(dual.dtype)  # a copy only in half precision
    if entries is not None:
        gap = torch.addcmul(wide, dual, entries, value=-kappa)  # W - Gamma
    elif group["penalty"]:
        gap = wide.sub(soft_threshold(dual, state["threshold"]), alpha=kappa)
    if decay and not group["decoupled_weight_decay"]:
        grad = grad.add(weight, alpha=decay)
    direction = _direction(grad, buffers, state, group)
    if decay and group["decoupled_weight_decay"]:
        wide.mul_(1 - kappa * lr * decay)
    if not group["penalty"]:
        weight.add_(direction, alpha=-kappa * lr)
        return
    update_in_place(wide, dual, gap, direction, lr, kappa, group["nu"], group["path_scale"])
    if wide is not weight:
        weight.copy_(wide)


def _direction(grad: Tensor, buffers: Sequence[Tensor], state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """The base optimizer's direction; its buffers move on."""
    if group["base"] == "adamw":
        (beta1, beta2), count = group["betas"], int(state["updates"])
        mean, square = buffers
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        return (mean / root).div_(1 - beta1**count)
    if not group["momentum"]:
        return grad
    [buffer] = buffers
    if group["penalty"]:  # one pass less over memory, with other bits than torch, which rounds in between
        torch.add(grad, buffer, alpha=group["momentum"], out=buffer)
    else:
        buffer.mul_(group["momentum"]).add_(grad)
    return grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
