"""Split linearised Bregman iteration: the update as one pure function, and the optimizer that loops over it.

Source: Fu et al., "DessiLBI: Exploring Structural Sparsity of Deep Networks via Differential Inclusion Paths"
(https://arxiv.org/abs/2007.02010) and its journal version (https://arxiv.org/abs/1905.09449).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


PENALTIES = (None, "l1", "group")
LAM_SCALES = ("init", "none")


def unit_norm(
    tensors: Sequence[Tensor], axes: Sequence[int], blocks: Sequence[int], scales: Sequence[float]
) -> Tensor:
    """Norm of every unit over all the slices that belong to it: `n_c = sqrt(sum_t scale_t^2 ||T_t[c]||^2)`.

    Args:
        tensors: one tensor per slice; along `axes[t]` it has `units * blocks[t]` entries.
        axes: the axis of each tensor that the units run along.
        blocks: consecutive entries along that axis that belong to one unit (more than 1 where a convolution's output
            is flattened into a linear layer).
        scales: the factor each slice is multiplied with inside the norm.

    Returns:
        Tensor of shape `(units,)`.
    """
    total = None
    for tensor, axis, block, scale in zip(tensors, axes, blocks, scales, strict=True):
        others = [dim for dim in range(tensor.ndim) if dim != axis]
        norm = torch.linalg.vector_norm(tensor, dim=others) if others else tensor.abs()
        if block > 1:
            norm = torch.linalg.vector_norm(norm.unflatten(0, (-1, block)), dim=1)
        squared = (norm * scale).square()
        total = squared if total is None else total + squared
    return total.sqrt()


def per_entry(values: Tensor, tensor: Tensor, axis: int, block: int) -> Tensor:
    """Give every unit's value to all entries of its slice: `(units,)` to a shape that broadcasts with `tensor`."""
    if block > 1:
        values = values.repeat_interleave(block)
    return values.view([-1 if dim == axis else 1 for dim in range(tensor.ndim)])


def shrinkage(norm: Tensor, threshold: Tensor) -> Tensor:
    """Factor of the group prox, `max(0, 1 - threshold / norm)`, which is 0 for a unit whose norm is 0."""
    return torch.where(norm > threshold, 1 - threshold / norm, torch.zeros_like(norm))


def soft_threshold(dual: Tensor, threshold: Tensor) -> Tensor:
    """Prox of `threshold * ||.||_1`: `sign(V) max(|V| - threshold, 0)`."""
    return dual.sign() * (dual.abs() - threshold).clamp_min(0)


def split_lbi_update(
    weight: Tensor, dual: Tensor, gamma: Tensor, direction: Tensor, *, lr: float, kappa: float, nu: float,
    path_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    coupling = (weight.to(dual.dtype) - gamma) / nu
    new_weight = (weight.to(dual.dtype) - (kappa * lr) * (direction.to(dual.dtype) + coupling)).to(weight.dtype)
    return new_weight, dual + (path_scale * lr) * coupling


class SplitLBI(torch.optim.Optimizer):
    """SGD that also traces the regularisation path of its lifted parameters (split linearised Bregman iteration).

    Every step, from the old W and the old Gamma, with d the momentum direction of the loss gradient:

        every parameter:   W <- W - kappa lr d
        lifted also:       W <- W - kappa lr (W - Gamma) / nu
                           V <- V + path_scale lr (W - Gamma) / nu,     Gamma = kappa Prox(V)

    V starts at 0, so the structure starts empty; a unit is in the support from the step at which its `||V||` passes
    its threshold. `lr=0` moves neither W nor V.

    A parameter that is not lifted takes the step of `torch.optim.SGD(lr=kappa * lr)`.

    Args:
        params: parameters or param groups. A group may carry `penalty`: `None` (not lifted, the default), `"l1"`
            (every weight alone) or `"group"`: all tensors of the param group share its units, which run along `axis`
            (an int or one per tensor, default 0), `block` consecutive entries each (default 1), every tensor
            multiplied by `scale` inside the norm (default 1). `Group.param_group()` makes such groups.
        lr: step size, > 0.
        kappa: damping, > 0. It multiplies the step of every parameter, lifted or not.
        nu: coupling, > 0; see `split_lbi_update`.
        momentum: in `[0, 1)`, `b <- momentum b + g`. The coupling is added outside the buffer, as in the authors'
            code.
        weight_decay: coupled L2 as in `torch.optim.SGD`, added to the gradient before momentum.
        lam: strength of the penalty, > 0.
        lam_scale: `"init"`: the threshold of a unit is `lam` times its initial norm over the lifted slices (`"l1"`:
            times the root mean square of the initial tensor), so that a unit enters for what it learns and not for how
            it was initialised. `"none"`: the threshold is `lam`, as in the paper.
        path_scale: factor on the step of V alone, > 0.
        fused: `None` or `False`: plain tensor operations. `True` is refused: there is no compiled step yet.

    State: one tensor more than SGD with momentum (V, at least float32) and four numbers per unit. Gamma is never
    stored.

    Raises:
        ValueError: for a number out of range, an unknown penalty, units that differ between the tensors of a group, a
            tensor lifted twice, a zero initial norm under `lam_scale="init"`; at `step()` for a gradient that is not
            finite (nothing has moved by then); at `load_state_dict` for the state of other groups.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> opt = SplitLBI([{"params": [model[0].weight], "penalty": "group"}, {"params": [model[2].weight]}], lr=0.1)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> opt.step()
        >>> opt.gamma(model[0].weight).shape
        torch.Size([8, 4])

    Source: arXiv 2007.02010, algorithm 1, and the order of operations of the released code.
    """

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
    ) -> None:
        if fused:
            raise ValueError(
                "fused=True asks for a compiled step, which SplitLBI does not have; pass fused=False or None"
            )
        defaults = {
            "lr": lr, "kappa": kappa, "nu": nu, "momentum": momentum, "weight_decay": weight_decay, "lam": lam,
            "lam_scale": lam_scale, "path_scale": path_scale, "penalty": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        if not isinstance(params, set):  # torch refuses a set, which has no order
            params = [params] if isinstance(params, Tensor) else list(params)
        param_group = {**param_group, "params": params}
        self._check_lifted_once(param_group)
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

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
        self._check_gradients()
        for group in self.param_groups:
            hyper = {name: group[name] for name in ("kappa", "nu", "path_scale")} | {"lr": float(group["lr"])}
            if group["penalty"] is not None:
                self._lift(group)
            factor = self._factor(group)
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                direction = self._direction(p, group)
                if group["penalty"] is None:
                    p.add_(direction, alpha=-hyper["kappa"] * hyper["lr"])
                    continue
                dual = self.state[p]["dual"]
                weight, new_dual = split_lbi_update(p, dual, self._gamma(p, group, i, factor), direction, **hyper)
                p.copy_(weight)
                dual.copy_(new_dual)
            if group["penalty"] is not None:
                self._record(group)
        return loss

    def _check_gradients(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads or torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            return
        bad = [
            f"{group.get('name') or f'param group {k}'}, tensor {i}"
            for k, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        if not bad:  # every entry is finite and only their norm overflowed
            return
        raise ValueError(
            f"the gradient of {bad[0]} ({len(bad)} tensors in all) has NaN or infinite entries; no parameter was "
            "changed by this step. Lower the learning rate, clip gradients, or look at the last batch"
        )

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        grad = p.grad
        if group["weight_decay"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        if not group["momentum"]:
            return grad
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = grad.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        return state["momentum_buffer"]

    def _lift(self, group: dict[str, Any]) -> None:
        """Create V, and the numbers of every unit, from the weights as they are before the first step."""
        first = group["params"][0]
        if "threshold" in self.state[first]:
            return
        for p in group["params"]:
            self.state[p]["dual"] = torch.zeros_like(p, dtype=_dual_dtype(p))
        if group["penalty"] == "l1":
            for p in group["params"]:
                self.state[p]["threshold"] = _initial_size(group, [p])
        else:
            threshold = _initial_size(group, group["params"])
            never = torch.full_like(threshold, -1, dtype=torch.int64)
            self.state[first] |= {
                "threshold": threshold, "norm": torch.zeros_like(threshold), "entered": never, "left": never.clone(),
            }  # fmt: skip
        self.state[first]["step"] = torch.zeros((), dtype=torch.int64)

    def _factor(self, group: dict[str, Any]) -> Tensor | None:
        if group["penalty"] != "group":
            return None
        unit = self.state[group["params"][0]]
        return group["kappa"] * shrinkage(unit["norm"], unit["threshold"])

    def _gamma(self, p: Tensor, group: dict[str, Any], index: int, factor: Tensor | None) -> Tensor:
        dual = self.state[p]["dual"]
        if factor is None:
            return group["kappa"] * soft_threshold(dual, self.state[p]["threshold"])
        return dual * per_entry(factor, dual, group["axis"][index], group["block"][index])

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
        """V of a lifted parameter, with its shape, at least float32; zeros before the first step."""
        self._find(p)
        dual = self.state.get(p, {}).get("dual")
        return torch.zeros_like(p, dtype=_dual_dtype(p)) if dual is None else dual.clone()

    @torch.no_grad()
    def gamma(self, p: Tensor) -> Tensor:
        """Gamma = kappa Prox(V) of a lifted parameter: exact zeros outside the support."""
        group, index = self._find(p)
        if "dual" not in self.state.get(p, {}):
            return torch.zeros_like(p, dtype=_dual_dtype(p))
        return self._gamma(p, group, index, self._factor(group))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps the dtype it was saved with and groups must be the saved ones."""
        saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
        _check_same_groups(self.param_groups, saved_groups)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                dual = saved_state.get(key, {}).get("dual")
                if dual is not None and dual.shape != p.shape:
                    raise ValueError(
                        f"this checkpoint is of other groups: a tensor of group {group['name']!r} has shape "
                        f"{tuple(p.shape)} here and {tuple(dual.shape)} there. Resume with the model that was trained"
                    )
        super().load_state_dict(state_dict)
        # torch casts float state to the parameter's dtype, which would round V of a bfloat16 model and turn step
        # numbers into floats.
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                for name, value in saved_state.get(key, {}).items():
                    if torch.is_tensor(value):
                        device = value.device if name == "step" else p.device
                        self.state[p][name] = value.detach().clone().to(device)


def _dual_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _initial_size(group: dict[str, Any], params: Sequence[Tensor]) -> Tensor:
    """Thresholds of a group, by unit (`"group"`) or for its one tensor (`"l1"`), from the weights now."""
    tensors = [p.detach().to(_dual_dtype(p)) for p in params]
    if group["penalty"] == "l1":
        size = tensors[0].square().mean().sqrt()
    else:
        size = unit_norm(tensors, group["axis"], group["block"], group["scale"])
    return group["lam"] * (size if group["lam_scale"] == "init" else torch.ones_like(size))


def _check_group(group: dict[str, Any]) -> None:
    name = group.setdefault("name", "unnamed")
    for key in ("lr", "kappa", "nu", "lam", "path_scale"):
        value = float(group[key])
        if not 0 < value < float("inf"):
            raise ValueError(
                f"{key}={group[key]} in group {name!r}: it must be a positive finite number; pass {key}=..."
            )
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']} in group {name!r}: it must be in [0, 1)")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']} in group {name!r}: it must not be negative")
    if group["penalty"] not in PENALTIES:
        raise ValueError(f"penalty={group['penalty']!r} in group {name!r}: it must be one of {PENALTIES}")
    if group["lam_scale"] not in LAM_SCALES:
        raise ValueError(f"lam_scale={group['lam_scale']!r} in group {name!r}: it must be one of {LAM_SCALES}")
    if group["penalty"] is None:
        return
    if not group["params"]:
        raise ValueError(f"group {name!r} has penalty={group['penalty']!r} but no parameters; remove it")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"group {name!r} lifts a {p.dtype} tensor; only real floating point tensors can be lifted")
    if group["penalty"] == "group":
        _check_units(group, name)
    if group["lam_scale"] == "init" and all(p.device.type != "meta" for p in group["params"]):
        lifts = [[p] for p in group["params"]] if group["penalty"] == "l1" else [group["params"]]
        for params in lifts:
            zeros = int((_initial_size(group, params) == 0).sum())
            if zeros:
                raise ValueError(
                    f"{zeros} units of group {name!r} have an initial norm of zero, so lam_scale='init' gives them no "
                    "threshold; initialise them, lift other tensors, or pass lam_scale='none'"
                )


def _check_units(group: dict[str, Any], name: str) -> None:
    """Bring `axis`, `block` and `scale` to one value per tensor, and check that the units agree."""
    count = len(group["params"])
    for key, default in (("axis", 0), ("block", 1), ("scale", 1.0)):
        value = group.get(key, default)
        group[key] = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(group[key]) != count:
            raise ValueError(f"group {name!r} has {count} tensors but {len(group[key])} values in {key}={group[key]}")
    for scale in group["scale"]:
        if not 0 < float(scale) < float("inf"):
            raise ValueError(f"scale={scale} of group {name!r} must be a positive finite number")
    units = set()
    for i, (p, axis, block) in enumerate(zip(group["params"], group["axis"], group["block"], strict=True)):
        if not -p.ndim <= axis < p.ndim:
            raise ValueError(f"axis={axis} of group {name!r} is outside its tensor of shape {tuple(p.shape)}")
        group["axis"][i] = axis % p.ndim
        if block < 1 or p.shape[axis] % block:
            raise ValueError(f"block={block} of group {name!r} does not divide axis {axis} of shape {tuple(p.shape)}")
        units.add(p.shape[axis] // block)
    if len(units) > 1 or group.get("units", *units) not in units:
        raise ValueError(
            f"the tensors of group {name!r} have {sorted(units)} units along axis={group['axis']} (units="
            f"{group.get('units')}): one param group is one group of units, so give each its own param group"
        )
    group["units"] = units.pop()


def _check_same_groups(mine: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    def identity(group: dict[str, Any]) -> tuple[Any, ...]:
        keys = ("penalty", "name", "axis", "block", "units")
        return (*(group.get(key) for key in keys), len(group["params"]))

    if [identity(group) for group in mine] == [identity(group) for group in saved]:
        return
    here, there = ([str(g.get("name")) for g in groups if g.get("penalty")] for groups in (mine, saved))
    missing = [name for name in there if name not in here] or [name for name in here if name not in there]
    raise ValueError(
        f"this checkpoint is of other groups: it lifts {len(there)}, this optimizer {len(here)}; first difference: "
        f"{missing[0] if missing else 'tensors, axes or units of one group'}. Resume with the model, preset and "
        "groups that the checkpoint was trained with"
    )
