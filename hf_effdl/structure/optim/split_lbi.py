"""Split linearised Bregman iteration: the update as one pure function, and the optimizer that loops over it.

Source: Fu et al., "DessiLBI: Exploring Structural Sparsity of Deep Networks via Differential Inclusion Paths"
(https://arxiv.org/abs/2007.02010) and its journal version (https://arxiv.org/abs/1905.09449).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl.structure.optim.checks import (
    check_dense_gradients,
    check_finite_gradients,
    check_group,
    check_same_groups,
    check_unchanged,
    dual_dtype,
    initial_size,
    snapshot,
)
from hf_effdl.structure.optim.prox import per_entry, rows_in_cache, shrinkage, soft_threshold, unit_norm
from hf_effdl.structure.optim.sharding import local, sharded_like


# Names of the base's buffers in the state, in the order of `_direction`.
BUFFERS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
# Counters that live on the CPU, so that reading them never waits for a GPU.
COUNTERS = ("step", "updates")


def split_lbi_update(
    weight: Tensor,
    dual: Tensor,
    gamma: Tensor,
    direction: Tensor,
    *,
    lr: float,
    kappa: float,
    nu: float,
    path_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step of the iteration for one lifted tensor, from the old weight and the old Gamma:

        W <- W - kappa lr (d + (W - Gamma) / nu)
        V <- V + path_scale lr (W - Gamma) / nu        and afterwards  Gamma = kappa Prox(V)

    Args:
        weight: W, any shape.
        dual: V, the same shape; V starts at zero.
        gamma: Gamma = kappa Prox(V) of the old V.
        direction: d, the base optimizer's direction (the loss gradient, or its momentum average).
        lr: step size, the paper's alpha.
        kappa: damping; the path gets closer to a step function as it grows.
        nu: coupling between W and Gamma; `nu / kappa` is the time constant, in summed lr, of the ridge on units
            outside the support.
        path_scale: factor on the step of V alone; 1 is the paper.

    Returns:
        The new W (dtype of `weight`) and the new V (dtype of `dual`). Nothing is written in place.

    Relations: with `path_scale=1` the four lines of the paper (arXiv 2007.02010, eq. 3); the prox is left to the
    caller because a unit may span several tensors.

    Example:
        >>> w, v = torch.ones(2), torch.zeros(2)
        >>> split_lbi_update(w, v, torch.zeros(2), torch.zeros(2), lr=0.1, kappa=1.0, nu=1.0)
        (tensor([0.9000, 0.9000]), tensor([0.1000, 0.1000]))
    """
    new_weight, new_dual = weight.to(dual.dtype, copy=True), dual.clone()
    _update_in_place(new_weight, new_dual, new_weight - gamma, direction, lr, kappa, nu, path_scale)
    return new_weight.to(weight.dtype), new_dual


def _update_in_place(
    weight: Tensor, dual: Tensor, gap: Tensor, direction: Tensor, lr: float, kappa: float, nu: float, path_scale: float
) -> None:
    """`split_lbi_update` from `gap = W - Gamma`: three passes over memory instead of copies."""
    weight.add_(direction, alpha=-kappa * lr)
    weight.add_(gap, alpha=-kappa * lr / nu)
    dual.add_(gap, alpha=path_scale * lr / nu)


class SplitLBI(torch.optim.Optimizer):
    """SGD or AdamW that also traces the regularisation path of its lifted parameters (split linearised Bregman
    iteration).

    Every step, from the old W and the old Gamma, with d the base optimizer's direction of the loss gradient:

        every parameter:   W <- W - kappa lr d
        lifted also:       W <- W - kappa lr (W - Gamma) / nu
                           V <- V + path_scale lr (W - Gamma) / nu,     Gamma = kappa Prox(V)

    V starts at 0, so the structure starts empty; a unit is in the support from the step at which its `||V||` passes
    its threshold. `lr=0` moves neither W nor V.

    A parameter that is not lifted takes the step of `torch.optim.SGD(lr=kappa * lr)` or of
    `torch.optim.AdamW(lr=kappa * lr)`.

    What the base does to the path. The coupling is a step of its own, as AdamW's weight decay is: it never enters a
    momentum buffer nor a second moment, so V always integrates `W - Gamma` over the summed lr and a unit of unchanged
    norm enters at the same time with every base. What differs is the loss it is weighed against:

    - momentum m multiplies the loss gradient by `1 / (1 - m)` in the long run and leaves the coupling as it is, so
      units are held against the ridge by a tenfold gradient at 0.9. `nesterov=True` changes the direction by one
      step's look-ahead and the path hardly at all.
    - AdamW's direction has entries of about one whatever the size of the gradient. A weight that any consistent
      gradient pulls on withstands the ridge as long as `|W| / nu < 1`, and learning rates are a hundred times smaller:
      so is the nu that fits (`derive_path`). All weights move alike, needed or not, so the order of the units says
      less: on MNIST the selected nets are one to three points behind those of the SGD base
      (`examples/benchmarks/structure_mnist.py`, arm "path, late, AdamW").
    - weight decay shrinks lifted weights on both sides of the threshold, which delays all entries; decoupled decay
      `W <- W - kappa lr weight_decay W` acts like a ridge that does not end when a unit enters. `param_groups` sets
      it to 0 for lifted tensors.

    Args:
        params: parameters or param groups. A group may carry `penalty`: `None` (not lifted, the default), `"l1"`
            (every weight alone) or `"group"`: all tensors of the param group share its units, which run along `axis`
            (an int or one per tensor, default 0), `block` consecutive entries each (default 1), every tensor
            multiplied by `scale` inside the norm (default 1). `Group.param_group()` makes such groups.
        lr: step size, > 0. A schedule may bring it to 0.
        kappa: damping, > 0. It multiplies the step of every parameter, lifted or not.
        nu: coupling, > 0; see `split_lbi_update`.
        momentum: of the SGD base, in `[0, 1)`: `b <- momentum b + g`, `d = b`. The coupling is added outside the
            buffer, as in the authors' code.
        weight_decay: coupled to the gradient (`g <- g + weight_decay W`, as in `torch.optim.SGD`) or decoupled, see
            below.
        lam: strength of the penalty, > 0.
        lam_scale: `"init"`: the threshold of a unit is `lam` times its initial norm over the lifted slices (`"l1"`:
            times the root mean square of the initial tensor), so that a unit enters for what it learns and not for how
            it was initialised. `"none"`: the threshold is `lam`, as in the paper.
        path_scale: factor on the step of V alone, > 0.
        fused: `True`: one compiled pass over W, gradient, momentum and V that carries each unit's norm over to the
            next step, for float32, float64 and bfloat16: a C++ loop on CPU, built once per machine (some seconds); on
            a GPU what `torch.compile` makes of it, at the first step of every process. `False` or `None`: plain tensor
            operations, which never wait for a compiler.
        base: `"sgd"` or `"adamw"`.
        nesterov: of the SGD base: `d = g + momentum b`.
        betas: of the AdamW base.
        eps: of the AdamW base.
        decoupled_weight_decay: `W <- W - kappa lr weight_decay W` instead of the coupled form. `None`: as the base's
            name says, `False` for SGD and `True` for AdamW.

    State: one tensor more than the base (V, at least float32) and four numbers per unit. Gamma is never stored.

    Raises:
        ValueError: for a number out of range, an unknown penalty or base, units that differ between the tensors of a
            group, a tensor lifted twice, a zero initial norm under `lam_scale="init"`, a group whose tensors lie on
            different devices; for `fused=True` without a working compiler; at `step()` for a gradient that is not
            finite or a param group that was edited in what V rests on (nothing has moved by then); at
            `load_state_dict` for the state of other groups.
        TypeError: for complex or integer parameters, and at `step()` for a sparse gradient.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> opt = SplitLBI([{"params": [model[0].weight], "penalty": "group"}, {"params": [model[2].weight]}], lr=0.1)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> opt.step()
        >>> opt.gamma(model[0].weight).shape
        torch.Size([8, 4])

    Source: arXiv 2007.02010, algorithm 1, and the order of operations of the released code; AdamW as base is ours.
    """

    # on the class, because copying or unpickling an optimizer keeps its state and groups only
    fused: bool | None = None
    _before: list[dict[str, Any]] | None = None  # the groups as they were at the last step
    _compiled: Any = None  # the compiled step, made at the first one

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        kappa: float = 1.0,
        nu: float = 100.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lam: float = 1.0,
        lam_scale: str = "init",
        path_scale: float = 1.0,
        fused: bool | None = None,
        *,
        base: str = "sgd",
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decoupled_weight_decay: bool | None = None,
    ) -> None:
        self.fused = fused
        defaults = {
            "lr": lr,
            "kappa": kappa,
            "nu": nu,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "lam": lam,
            "lam_scale": lam_scale,
            "path_scale": path_scale,
            "base": base,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "decoupled_weight_decay": decoupled_weight_decay,
            "penalty": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        if not isinstance(params, set):  # torch refuses a set, which has no order
            params = [params] if isinstance(params, Tensor) else list(params)
        param_group = {**param_group, "params": params}
        self._check_lifted_once(param_group)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            if self.fused:
                from hf_effdl.structure.optim import fused_cpu as fused

                fused.check(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._before = self._compiled = None

    def _check_lifted_once(self, new: dict[str, Any]) -> None:
        # torch refuses a tensor that is in two param groups without saying in which
        names = {id(p): group["name"] for group in self.param_groups if group["penalty"] for p in group["params"]}
        params = [p[1] if isinstance(p, tuple) else p for p in new["params"]]  # torch also takes named parameters
        for p in params:
            if id(p) in names:
                raise ValueError(
                    f"a tensor of shape {tuple(p.shape)} is lifted by group {names[id(p)]!r} and given again in group "
                    f"{new.get('name', 'unnamed')!r}; a tensor is lifted by one group only: remove it from one of them"
                )
        if new.get("penalty") and len({id(p) for p in params}) < len(params):
            raise ValueError(f"group {new.get('name', 'unnamed')!r} lifts a tensor twice; remove one of the two")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure` re-evaluates the model and returns the loss, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_unchanged(self.param_groups, self._before)
        check_dense_gradients(self.param_groups)
        self._check_finite()
        for group in self.param_groups:
            self._prepare(group)
        if self.fused:
            self._compiled.step(self.state)
        else:
            for group in self.param_groups:
                self._step(group)
        self._before = [snapshot(group) for group in self.param_groups]
        return loss

    def _check_finite(self) -> None:
        if self.fused:
            from hf_effdl.structure.optim import fused_cpu as fused

            if self._compiled is None or not self._compiled.fit():
                self._compiled = fused.prepare(self.param_groups)
            self._compiled.point_at_gradients()
            if self._compiled.gradients_are_finite():
                return
        check_finite_gradients(self.param_groups)

    def _step(self, group: dict[str, Any]) -> None:
        factor = self._factor(group)
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            state = self.state[p]
            if "updates" in state:
                state["updates"] += 1
            # in sharded tensors the local parts alone: only the norms of the units need the others
            tensors = [p, p.grad, *(state[name] for name in BUFFERS[group["base"]] if name in state)]
            entries = None
            if group["penalty"] == "group":
                tensors.append(state["dual"])
                entries = per_entry(factor, state["dual"], group["axis"][i], group["block"][i])
            elif group["penalty"] == "l1":
                tensors.append(state["dual"])
            tensors = [local(tensor) for tensor in tensors]
            rows = rows_in_cache(tensors[0])
            if p.ndim == 0 or rows == len(tensors[0]):
                self._update(group, state, entries, *tensors)
                continue
            split_entries = entries is not None and len(entries) > 1
            parts = [tensor.split(rows) for tensor in tensors]
            for k, part in enumerate(zip(*parts, strict=True)):
                own = entries[k * rows : (k + 1) * rows] if split_entries else entries
                self._update(group, state, own, *part)
        if group["penalty"]:
            self._record(group)

    @staticmethod
    def _update(
        group: dict[str, Any],
        state: dict[str, Any],
        entries: Tensor | None,
        weight: Tensor,
        grad: Tensor,
        *others: Tensor,
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
        _update_in_place(wide, dual, gap, direction, lr, kappa, group["nu"], group["path_scale"])
        if wide is not weight:
            weight.copy_(wide)

    def _prepare(self, group: dict[str, Any]) -> None:
        """Create what is not there yet: the base's buffers of the parameters with gradients, V and thresholds."""
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if group["base"] == "adamw" and "exp_avg" not in state:
                state["updates"] = torch.zeros((), dtype=torch.int64)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            elif group["base"] == "sgd" and group["momentum"] and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
        first = group["params"][0] if group["penalty"] else None
        if first is None or "step" in self.state[first]:
            return
        for p in group["params"]:
            self.state[p]["dual"] = torch.zeros_like(p, dtype=dual_dtype(p))
        if group["penalty"] == "l1":
            for p in group["params"]:
                self.state[p]["threshold"] = initial_size(group, [p])
        else:
            threshold = initial_size(group, group["params"])
            never = torch.full_like(threshold, -1, dtype=torch.int64)
            self.state[first] |= {
                "threshold": threshold,
                "norm": torch.zeros_like(threshold),
                "entered": never,
                "left": never.clone(),
            }
        self.state[first]["step"] = torch.zeros((), dtype=torch.int64)

    def _factor(self, group: dict[str, Any]) -> Tensor | None:
        if group["penalty"] != "group":
            return None
        unit = self.state[group["params"][0]]
        return group["kappa"] * shrinkage(unit["norm"], unit["threshold"])

    def _record(self, group: dict[str, Any]) -> None:
        """Carry the norms of the new V over to the next step and note who entered and who left the support."""
        unit = self.state[group["params"][0]]
        unit["step"] += 1
        if group["penalty"] != "group":
            return
        norm = unit_norm(
            [self.state[p]["dual"] for p in group["params"]], group["axis"], group["block"], group["scale"]
        )
        was_in, is_in = unit["norm"] > unit["threshold"], norm > unit["threshold"]
        now = unit["step"].to(norm.device)
        unit["norm"].copy_(norm)
        unit["entered"].copy_(torch.where(is_in & (unit["entered"] < 0), now, unit["entered"]))
        unit["left"].copy_(torch.where(was_in & ~is_in, now, torch.where(is_in, -1, unit["left"])))

    def _find(self, p: Tensor) -> tuple[dict[str, Any], int]:
        for group in self.param_groups:
            for i, candidate in enumerate(group["params"]):
                if candidate is p:
                    if group["penalty"] is None:
                        raise ValueError(
                            "this parameter is not lifted (its param group has penalty=None): it has no V"
                        )
                    return group, i
        raise ValueError("this tensor is not a parameter of this optimizer; pass the parameter object itself")

    @torch.no_grad()
    def dual(self, p: Tensor) -> Tensor:
        """V of a lifted parameter, with its shape (and sharding), at least float32; zeros before the first step."""
        self._find(p)
        dual = self.state.get(p, {}).get("dual")
        return torch.zeros_like(p, dtype=dual_dtype(p)) if dual is None else dual.clone()

    @torch.no_grad()
    def gamma(self, p: Tensor) -> Tensor:
        """Gamma = kappa Prox(V) of a lifted parameter: exact zeros outside the support."""
        group, index = self._find(p)
        dual = self.dual(p)
        if "dual" not in self.state.get(p, {}):
            return dual
        if group["penalty"] == "l1":
            part = group["kappa"] * soft_threshold(local(dual), self.state[p]["threshold"])
        else:
            part = local(dual) * per_entry(self._factor(group), dual, group["axis"][index], group["block"][index])
        return sharded_like(part, dual)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps the dtype it was saved with and groups must be the saved ones."""
        saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
        check_same_groups(self.param_groups, saved_groups)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                dual = saved_state.get(key, {}).get("dual")
                if dual is not None and dual.shape != p.shape:
                    raise ValueError(
                        f"this checkpoint is of other groups: a tensor of group {group['name']!r} has shape "
                        f"{tuple(p.shape)} here and {tuple(dual.shape)} there. Resume with the model that was trained"
                    )
        super().load_state_dict(state_dict)
        self._before = self._compiled = None
        # torch casts float state to the parameter's dtype, which would round V of a bfloat16 model and turn step
        # numbers into floats.
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                for name, value in saved_state.get(key, {}).items():
                    if torch.is_tensor(value):
                        device = "cpu" if name in COUNTERS else p.device
                        self.state[p][name] = value.detach().clone().to(device)


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
