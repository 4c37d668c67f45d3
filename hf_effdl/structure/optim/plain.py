"""The step of `SplitLBI` by tensor operations: for any device and dtype, and for tensors that FSDP2 shards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl.structure.optim.kernel import Kernel, State
from hf_effdl.structure.optim.prox import per_entry, rows_in_cache, shrinkage, soft_threshold, unit_norm
from hf_effdl.structure.optim.sharding import local
from hf_effdl.structure.optim.update import update_in_place


# Names of the base's buffers in the state, in the order of `_direction`.
BUFFERS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class PlainStep(Kernel):
    """See the file."""

    def step(self, state: State) -> None:
        for group in self.groups:
            factor = unit_factor(group, state)
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    _step_tensor(group, i, state[p], factor)
            if group["penalty"]:
                _record(group, state)


def unit_factor(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> Tensor | None:
    """What V is multiplied with to give Gamma, per unit; None for a group without units."""
    if group["penalty"] != "group":
        return None
    unit = state[group["params"][0]]
    return group["kappa"] * shrinkage(unit["norm"], unit["threshold"])


def _step_tensor(group: Mapping[str, Any], i: int, state: dict[str, Any], factor: Tensor | None) -> None:
    """The step of one tensor of a group, some rows at a time."""
    p = group["params"][i]
    if "updates" in state:
        state["updates"] += 1
    tensors = [p, p.grad, *(state[name] for name in BUFFERS[group["base"]] if name in state)]
    tensors += [state["dual"]] if group["penalty"] else []
    entries = None if factor is None else per_entry(factor, state["dual"], group["axis"][i], group["block"][i])
    # in sharded tensors the local parts alone: only the norms of the units need the others
    tensors = [local(tensor) for tensor in tensors]
    rows = rows_in_cache(tensors[0])
    if p.ndim == 0 or rows == len(tensors[0]):
        _update(group, state, entries, *tensors)
        return
    by_row = entries is not None and len(entries) > 1
    for k, part in enumerate(zip(*(tensor.split(rows) for tensor in tensors), strict=True)):
        _update(group, state, entries[k * rows : (k + 1) * rows] if by_row else entries, *part)


def _update(
    group: dict[str, Any], state: dict[str, Any], entries: Tensor | None, weight: Tensor, grad: Tensor, *others: Tensor
) -> None:
    """The step of some rows of one tensor, in place; `others` are the base's buffers and V."""
    lr, kappa, decay = float(group["lr"]), group["kappa"], group["weight_decay"]
    buffers, dual = (others[:-1], others[-1]) if group["penalty"] else (others, weight)
    wide = weight.to(dual.dtype)  # a copy only in half precision
    if entries is not None:
        gap = torch.addcmul(wide, dual, entries, value=-1)  # W - Gamma
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


def _record(group: Mapping[str, Any], state: State) -> None:
    """Carry the norms of the new V over to the next step and note who entered and who left the support."""
    unit = state[group["params"][0]]
    unit["step"] += 1
    if group["penalty"] != "group":
        return
    norm = unit_norm([state[p]["dual"] for p in group["params"]], group["axis"], group["block"], group["scale"])
    was_in, is_in = unit["norm"] > unit["threshold"], norm > unit["threshold"]
    now = unit["step"].to(norm.device)
    unit["norm"].copy_(norm)
    unit["entered"].copy_(torch.where(is_in & (unit["entered"] < 0), now, unit["entered"]))
    unit["left"].copy_(torch.where(was_in & ~is_in, now, torch.where(is_in, -1, unit["left"])))


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
    buffer.mul_(group["momentum"]).add_(grad)
    return grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
