"""`SplitLBI`: the optimizer that loops over the split linearised Bregman update (`update.py`)."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_effdl.checks import flag
from hf_effdl.structure.optim.checks import (
    check_dense_gradients,
    check_finite_gradients,
    check_group,
    check_same_groups,
    check_unchanged,
    snapshot,
)
from hf_effdl.structure.optim.kernel import Kernel, initial_dual, raise_thresholds
from hf_effdl.structure.optim.plain import PlainStep
from hf_effdl.structure.optim.prox import per_entry, shrinkage, soft_threshold
from hf_effdl.structure.optim.sharding import local, sharded_like


logger = logging.getLogger(__name__)

# Counters that live on the CPU, so that reading them never waits for a GPU.
COUNTERS = ("step", "updates")


class SplitLBI(torch.optim.Optimizer):
    """SGD or AdamW that also traces the regularisation path of its lifted parameters (split linearised Bregman
    iteration).

    Every step, from the old W and the old Gamma, with d the base optimizer's direction of the loss gradient:

        every parameter:   W <- W - kappa lr d
        lifted also:       W <- W - kappa lr (W - Gamma) / nu
                           V <- V + path_scale lr (W - Gamma) / nu,     Gamma = kappa Prox(V)

    V starts at 0, so the structure starts empty; a unit is in the support from the step at which its `||V||` passes
    its threshold. `lr=0` moves neither W nor V.

    Trained weights start the other way round, `start="dense"`, a proximal pruning path: V starts at W / kappa and the
    threshold at 0, so Gamma starts at W and the structure is whole. Every step begins with

        lifted:            threshold <- threshold + rise lr (lam times the mean initial `||V||` of the group)

    A unit leaves when its `||V||` falls under its threshold, and may come back. What the loss holds against the ridge
    goes on feeding V; what nothing holds gives way and leaves. The reverse order of the exits is the path.

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
            it was initialised; with a dense start see above. `"none"`: the threshold is `lam`, as in the paper.
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
        start: `"empty"`, or `"dense"` for trained weights, see above.
        rise: of a dense start, > 0: how fast its threshold rises, per learning rate; `derive_path` gives it.

    A param group may also carry `penalty_factor`, a positive number per unit (what a unit costs, say) that its
    threshold is multiplied with.

    State: one tensor more than the base (V, at least float32) and four numbers per unit, five with a dense start.
    Gamma is never stored.

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
    kernel: Kernel | None = None  # the compiled step, made at the first one
    _before: list[dict[str, Any]] | None = None  # the groups as they were at the last step

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
        start: str = "empty",
        rise: float | None = None,
    ) -> None:
        self.fused = fused if fused is None else flag("fused", fused)
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
            "start": start,
            "rise": rise,
            "penalty": None,
            "penalty_factor": None,
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
                from hf_effdl.structure.optim import fused_cpu

                fused_cpu.check(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._before = self.kernel = None

    def _check_lifted_once(self, new: dict[str, Any]) -> None:
        # torch refuses a tensor that is in two param groups without saying in which
        names = {id(p): group["name"] for group in self.param_groups if group["penalty"] for p in group["params"]}
        params = _unnamed(new["params"])
        name = new.get("name", "unnamed")
        twice = next((p for p in params if id(p) in names), None)
        if twice is not None:
            raise ValueError(
                f"a tensor of shape {tuple(twice.shape)} is lifted by group {names[id(twice)]!r} and given again in "
                f"group {name!r}; a tensor is lifted by one group only: remove it from one of them"
            )
        if new.get("penalty") and len(set(map(id, params))) < len(params):
            raise ValueError(f"group {name!r} lifts a tensor twice; remove one of the two")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure` re-evaluates the model and returns the loss, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_unchanged(self.param_groups, self._before)
        check_dense_gradients(self.param_groups)
        if self._before is None and not any(group["penalty"] for group in self.param_groups):
            logger.warning(
                "no param group of SplitLBI has a penalty, so this is plain %s and there is no path; pass "
                "params=param_groups(model, find_groups(model))",
                self.param_groups[0]["base"],
            )
        kernel = self._kernel_for_now()
        if not kernel.finite():
            check_finite_gradients(self.param_groups)
        kernel.prepare(self.state)
        raise_thresholds(self.param_groups, self.state)
        kernel.step(self.state)
        self._before = [snapshot(group) for group in self.param_groups]
        return loss

    def _kernel_for_now(self) -> Kernel:
        if not self.fused:
            return PlainStep(self.param_groups)
        if self.kernel is None or not self.kernel.fits():
            from hf_effdl.structure.optim import fused_cpu

            self.kernel = fused_cpu.compiled_step(self.param_groups)
        return self.kernel

    def _find(self, p: Tensor) -> tuple[dict[str, Any], int]:
        """The group of a lifted parameter, and its place there."""
        places = ((group, i) for group in self.param_groups for i, other in enumerate(group["params"]) if other is p)
        group, i = next(places, (None, 0))
        if group is None:
            raise ValueError("this tensor is not a parameter of this optimizer; pass the parameter object itself")
        if group["penalty"] is None:
            raise ValueError("this parameter is not lifted (its param group has penalty=None): it has no V")
        return group, i

    @torch.no_grad()
    def dual(self, p: Tensor) -> Tensor:
        """V of a lifted parameter, with its shape (and sharding), at least float32; its start before the first."""
        group, _ = self._find(p)
        dual = self.state.get(p, {}).get("dual")
        return initial_dual(group, p) if dual is None else dual.clone()

    @torch.no_grad()
    def gamma(self, p: Tensor) -> Tensor:
        """Gamma = kappa Prox(V) of a lifted parameter: exact zeros outside the support."""
        group, index = self._find(p)
        dual = self.dual(p)
        if "dual" not in self.state.get(p, {}):
            return dual * group["kappa"]  # 0, or all of W
        if group["penalty"] == "l1":
            part = group["kappa"] * soft_threshold(local(dual), self.state[p]["threshold"])
        else:
            unit = self.state[group["params"][0]]
            factor = group["kappa"] * shrinkage(unit["norm"], unit["threshold"])
            part = local(dual) * per_entry(factor, dual, group["axis"][index], group["block"][index])
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
        for group in self.param_groups:  # a saved path goes on as it started; those of 0.1.0 all started empty
            for name, before in (("start", "empty"), ("rise", None), ("penalty_factor", None)):
                group.setdefault(name, before)
        self._before = self.kernel = None
        # torch casts float state to the parameter's dtype, which would round V of a bfloat16 model and turn step
        # numbers into floats.
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                for name, value in saved_state.get(key, {}).items():
                    if torch.is_tensor(value):
                        device = "cpu" if name in COUNTERS else p.device
                        self.state[p][name] = value.detach().clone().to(device)


def _unnamed(params: Iterable[Any]) -> list[Tensor]:
    """Parameters, of which torch also takes `(name, parameter)`."""
    return [p[1] if isinstance(p, tuple) else p for p in params]


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
