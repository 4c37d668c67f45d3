"""Split LBI on a small net by DDP and FSDP2: `torchrun --nproc_per_node 2 -m distributed.optimizer_run OUT`.

Process 0 leaves in OUT/result.pt what every case ends with, which `run(case)` in one process must reach too, and what
it ends with after a checkpoint and a resume.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from leave import leave
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_effdl.structure.optim.split_lbi import SplitLBI


STEPS, SAVED, ROWS = 40, 28, 8
SGD = {"lr": 0.3, "nu": 6.0, "path_scale": 2.0, "momentum": 0.9, "weight_decay": 0.02}
PLAIN = {"lr": 0.05, "nu": 4.0, "path_scale": 8.0, "momentum": 0.0, "lam_scale": "none", "lam": 0.4}
ADAMW = {"lr": 0.05, "nu": 0.4, "path_scale": 1.5, "base": "adamw", "weight_decay": 1.0}
# name: wrapper, hyperparameters, dtype, forms of checkpoint to resume from
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, tuple[str, ...]]] = {
    "ddp": ("ddp", SGD, torch.float64, ()),
    "sgd": ("fsdp", SGD, torch.float64, ("full",)),
    "nesterov": ("fsdp", SGD | {"nesterov": True, "decoupled_weight_decay": True}, torch.float32, ()),
    "plain": ("fsdp", PLAIN, torch.float64, ("sharded",)),
    "adamw": ("fsdp", ADAMW, torch.float64, ("full", "sharded")),
    "dense": ("fsdp", SGD | {"start": "dense", "rise": 0.5}, torch.float64, ("full", "sharded")),
    "bfloat16": ("fsdp", ADAMW, torch.bfloat16, ("full", "sharded")),
}


class Net(nn.Module):
    """No batch statistics. Two processes get unequal parts of most tensors, and one of them nothing of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(3, 6)
        self.middle = nn.Linear(6 * 4, 5)
        self.rows = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.single = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        return self.single(self.last(self.rows(self.middle(x).relu()).relu()).relu())

    def groups(self) -> list[dict[str, Any]]:
        # units along the sharded axis of one tensor and along the other axis of the next, four columns each
        first = {
            "params": [self.norm.weight, self.middle.weight],
            "axis": [0, 1],
            "block": [1, 4],
            "scale": [1.0, 0.7],
        }
        return [
            {**first, "penalty": "group", "name": "norm"},
            {"params": [self.rows.weight, self.rows.bias], "penalty": "group", "name": "rows"},
            {"params": [self.last.weight], "penalty": "group", "name": "columns", "axis": 1},
            {"params": [self.single.weight], "penalty": "group", "name": "single"},
            {"params": [self.conv.weight, self.last.bias], "penalty": "l1", "name": "weights"},
            {"params": [self.norm.bias, self.middle.bias, self.single.bias], "name": "rest"},
        ]


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, ROWS, 1, 4, 4, generator=generator)
    return [(rows.to(dtype), (rows[:, 0, 0, :1] - rows[:, 0, 1, 1:2]).to(dtype)) for rows in x]


def build(case: str) -> tuple[nn.Module, SplitLBI]:
    wrapper, hyper, dtype, _ = CASES[case]
    torch.manual_seed(0)
    net = Net().to(dtype)
    if dist.is_initialized() and wrapper == "fsdp":
        fully_shard(net.middle)
        fully_shard(net)
    return net, SplitLBI(net.groups(), **hyper)


def train(case: str, net: nn.Module, optimizer: SplitLBI, first: int = 0, last: int = STEPS) -> None:
    """Steps `first` to `last`; every process takes its share of the rows."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = DistributedDataParallel(net) if world > 1 and CASES[case][0] == "ddp" else net
    for x, y in batches(CASES[case][2])[first:last]:
        (model(x[rank::world]) - y[rank::world]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def outcome(net: nn.Module, optimizer: SplitLBI) -> dict[str, Any]:
    """Weights, V and Gamma by name and the optimizer's state by tensor, all of them whole."""
    result: dict[str, Any] = {"weight": {}, "dual": {}, "gamma": {}, "state": {}}
    lifted = {p for group in optimizer.param_groups if group["penalty"] for p in group["params"]}
    for name, p in net.named_parameters():
        result["weight"][name] = whole(p)
        result["state"][name] = {key: whole(value) for key, value in optimizer.state[p].items()}
        if p in lifted:
            dual, gamma = optimizer.dual(p), optimizer.gamma(p)
            assert type(dual) is type(gamma) is type(p.data)  # sharded as the parameter is
            result["dual"][name], result["gamma"][name] = whole(dual), whole(gamma)
    return result


def run(case: str) -> dict[str, Any]:
    net, optimizer = build(case)
    train(case, net, optimizer)
    return outcome(net, optimizer)


# ---- checkpoints, in the two forms that Trainer and Accelerate write


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)


def save_and_finish(case: str, folder: Path) -> dict[str, Any]:
    """An uninterrupted run that leaves its checkpoints on the way."""
    net, optimizer = build(case)
    train(case, net, optimizer, last=SAVED)
    full = [get_model_state_dict(net, options=FULL), get_optimizer_state_dict(net, optimizer, options=FULL)]
    if dist.get_rank() == 0:
        torch.save(full, folder / f"{case}.pt")
    sharded = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.save(sharded, checkpoint_id=folder / case)
    dist.barrier()
    train(case, net, optimizer, first=SAVED)
    return outcome(net, optimizer)


def resume(case: str, folder: Path, form: str) -> dict[str, Any]:
    net, optimizer = build(case)
    if form == "full":
        file = folder / f"{case}.pt"
        model, state = torch.load(file, weights_only=True) if dist.get_rank() == 0 else ({}, {})
        set_model_state_dict(net, model, options=FULL)
        set_optimizer_state_dict(net, optimizer, state, options=FULL)
    else:
        values = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.load(values, checkpoint_id=folder / case)
        set_model_state_dict(net, values["model"])
        set_optimizer_state_dict(net, optimizer, values["optimizer"])
    train(case, net, optimizer, first=SAVED)
    return outcome(net, optimizer)


# ---- a gradient that is not finite on one process


def spoil(case: str) -> dict[str, Any]:
    """Process 1 alone has a NaN, in its part of one tensor."""
    net, optimizer = build(case)
    train(case, net, optimizer, last=2)
    x, y = batches(CASES[case][2])[2]
    (net(x) - y).square().mean().backward()
    if dist.get_rank() == 1:
        net.conv.weight.grad.to_local().view(-1)[0] = float("nan")
    before = outcome(net, optimizer)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, message(optimizer.step))
    return {"errors": errors, "before": before, "after": outcome(net, optimizer)}


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result: dict[str, Any] = {"nan": spoil("sgd")}
    for case, (_, _, _, forms) in CASES.items():
        result[case] = save_and_finish(case, out) if forms else run(case)
        for form in forms:
            result[f"{case}, {form}"] = resume(case, out, form)
    if dist.get_rank() == 0:
        torch.save(result, out / "result.pt")
    leave()
