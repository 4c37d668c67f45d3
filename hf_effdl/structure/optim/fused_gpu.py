"""The compiled step of `SplitLBI(fused=True)` on a GPU: the update of a param group, compiled by `torch.compile`.

Inductor makes one kernel per tensor of it, which also sums the squares of the new V by unit.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from hf_effdl.structure.optim.kernel import Kernel, State
from hf_effdl.structure.optim.plain import BUFFERS
from hf_effdl.structure.optim.prox import unit_norm


# Order of `numbers`: a tensor, because compiled code is made anew for every new value of a Python number.
NUMBERS = ("step", "coupling", "path", "kappa", "momentum", "decay", "shrink", "rest1", "beta2", "rest2", "eps")


def update_group(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[list[Tensor]],
    duals: list[Tensor],
    thresholds: list[Tensor],
    unit: dict[str, Tensor],
    numbers: Tensor,
    corrections: Tensor,
    count: Tensor,
    base: str,
    penalty: str | None,
    momentum: bool,
    nesterov: bool,
    layout: list[tuple[int, int, float]],
) -> None:
    """One step of a param group in place: the update of `SplitLBI` on lists of tensors, ready to be compiled."""
    n = dict(zip(NUMBERS, numbers.unbind(), strict=True))
    if penalty == "group":
        norm, threshold = unit["norm"], unit["threshold"]
        factor = n["kappa"] * torch.where(norm > threshold, 1 - threshold / norm, 0)
        total = unit["rest"]
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        old = weight.to(numbers.dtype)
        g = grad.to(numbers.dtype) + n["decay"] * old
        new = old * n["shrink"]
        if base == "adamw":
            mean, square = buffers[i]
            mean.copy_(mean + n["rest1"] * (g - mean))
            square.copy_(n["beta2"] * square + n["rest2"] * g * g)
            root = square.to(numbers.dtype).sqrt() * corrections[i, 1] + n["eps"]
            g = mean.to(numbers.dtype) * corrections[i, 0] / root
        elif momentum:
            [buffer] = buffers[i]
            buffer.copy_(n["momentum"] * buffer + g)
            g = g + n["momentum"] * buffer if nesterov else buffer.to(numbers.dtype)
        new = new - n["step"] * g
        if penalty is not None:
            dual = duals[i]
            if penalty == "l1":
                inside = torch.minimum(torch.maximum(dual, -thresholds[i]), thresholds[i])
                gap = old - n["kappa"] * (dual - inside)
            else:
                axis, block, scale = layout[i]
                shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
                gap = old - factor.repeat_interleave(block).view(shape) * dual
            changed = dual + n["path"] * gap
            dual.copy_(changed)
            new = new - n["coupling"] * gap
            if penalty == "group":
                others = [dim for dim in range(weight.ndim) if dim != axis]
                squared = changed.square()
                squared = squared.sum(others) if others else squared
                total = total + squared.view(-1, block).sum(1) * scale**2
        weight.copy_(new)
    if penalty == "group":
        was_in, norm = norm > threshold, total.sqrt()
        is_in = norm > threshold
        unit["norm"].copy_(norm)
        unit["entered"].copy_(torch.where(is_in & (unit["entered"] < 0), count, unit["entered"]))
        unit["left"].copy_(torch.where(was_in & ~is_in, count, torch.where(is_in, -1, unit["left"])))


@cache
def _compiled(key: Any, backend: str) -> Callable[..., None]:
    """`update_group` compiled for groups of one kind.

    Each kind gets code of its own: torch.compile gives up on code that it has compiled for eight kinds of input.
    """
    own = FunctionType(update_group.__code__.replace(), update_group.__globals__, "update_group")
    return torch.compile(own, dynamic=False, fullgraph=True, backend=backend)


def _layout(group: Mapping[str, Any], places: Sequence[int]) -> list[tuple[int, int, float]]:
    """Axis, block and scale of the tensors that have a gradient."""
    if group["penalty"] != "group":
        return []
    return [(group["axis"][i], group["block"][i], float(group["scale"][i])) for i in places]


def _entries(state: State, params: Sequence[Tensor], name: str) -> list[Tensor]:
    return [state[p][name] for p in params]


class CompiledGroups(Kernel):
    """Param groups whose steps are compiled; the counterpart of `fused_cpu.Tables`."""

    def __init__(self, groups: Sequence[dict[str, Any]], backend: str = "inductor") -> None:
        super().__init__(groups)
        self.backend = backend
        self.numbers: dict[Any, Tensor] = {}

    def step(self, state: State) -> None:
        for group in self.groups:
            try:
                self._step(group, state)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                raise ValueError(
                    f"fused=True: torch.compile failed on group {group['name']!r} ({type(error).__name__}: "
                    f"{str(error)[:400]}); pass fused=False"
                ) from error

    def _step(self, group: dict[str, Any], state: State) -> None:
        penalty, base, momentum = group["penalty"], group["base"], bool(group["momentum"])
        places = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        params = [group["params"][i] for i in places]
        first = state[group["params"][0]] if penalty else {"step": torch.zeros((), dtype=torch.int64)}
        if not params and penalty != "group":
            first["step"] += 1
            return
        like = group["params"][0]
        wide = torch.promote_types(like.dtype, torch.float32)
        names = BUFFERS[base] if base == "adamw" or momentum else ()
        layout = _layout(group, places)
        forms = tuple((p.shape, p.stride(), p.dtype) for p in params)
        kind = (base, penalty, momentum, group["nesterov"], tuple(layout), wide, like.device, forms)
        _compiled(kind, self.backend)(
            [p.detach() for p in params],
            [p.grad for p in params],
            [[state[p][name] for name in names] for p in params],
            _entries(state, params, "dual") if penalty else [],
            _entries(state, params, "threshold") if penalty == "l1" else [],
            self._units(group, state) if penalty == "group" else {},
            self._numbers(group, wide, like.device),
            self._corrections(group, params, state, wide, like.device),
            (first["step"] + 1).to(like.device),
            base,
            penalty,
            momentum,
            group["nesterov"],
            layout,
        )
        first["step"] += 1
        for updates in _entries(state, params, "updates") if base == "adamw" else ():
            updates += 1

    def _units(self, group: Mapping[str, Any], state: State) -> dict[str, Tensor]:
        """The record of the units, and the squared part of their norms that stays as it is in this step."""
        first = state[group["params"][0]]
        unit = {name: first[name] for name in ("norm", "threshold", "entered", "left")}
        return unit | {"rest": self._norm_without_gradient(group, state).square()}

    @staticmethod
    def _norm_without_gradient(group: Mapping[str, Any], state: State) -> Tensor:
        """Norm of every unit over the tensors that stay as they are in this step."""
        still = [i for i, p in enumerate(group["params"]) if p.grad is None]
        if not still:
            return torch.zeros_like(state[group["params"][0]]["norm"])
        duals = [state[group["params"][i]]["dual"] for i in still]
        return unit_norm(duals, *([group[key][i] for i in still] for key in ("axis", "block", "scale")))

    @staticmethod
    def _corrections(
        group: Mapping[str, Any], params: Sequence[Tensor], state: State, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """AdamW's corrections of the mean and of the root of the second moment, one row per tensor."""
        if group["base"] != "adamw":
            return torch.ones(len(params), 2, dtype=dtype, device=device)
        done = [int(state[p]["updates"]) + 1 for p in params]
        rows = [(1 / (1 - group["betas"][0] ** n), (1 - group["betas"][1] ** n) ** -0.5) for n in done]
        return torch.tensor(rows, dtype=dtype, device=device)

    def _numbers(self, group: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        step, decay, decoupled = (
            group["kappa"] * float(group["lr"]),
            group["weight_decay"],
            group["decoupled_weight_decay"],
        )
        values = (
            step,
            step / group["nu"],
            group["path_scale"] * float(group["lr"]) / group["nu"],
            group["kappa"],
            group["momentum"],
            0.0 if decoupled else decay,
            1 - step * decay if decoupled else 1.0,
            1 - group["betas"][0],
            group["betas"][1],
            1 - group["betas"][1],
            group["eps"],
        )
        key = (values, dtype, device)
        if key not in self.numbers:
            self.numbers.clear()  # a schedule changes them at every step
            self.numbers[key] = torch.tensor(values, dtype=dtype, device=device)
        return self.numbers[key]
