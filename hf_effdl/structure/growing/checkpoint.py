"""Growth as a function from checkpoint to checkpoint: from `checkpoint-N` to `checkpoint-N/grown`.

What grows is decided from the saved optimizer state alone: the share of a group's units in the support. The folder
appears by one rename, so that there is either a whole grown checkpoint or none; the checkpoint it came from stays.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState

from hf_effdl.structure.groups.find import _shared_names
from hf_effdl.structure.groups.group import Group, regroup
from hf_effdl.structure.groups.ties import _meta_shapes, config_ties
from hf_effdl.structure.growing.history import Row, metrics_at, rounds_without_growth, training_macs
from hf_effdl.structure.growing.widen import widen_groups
from hf_effdl.structure.optim.split_lbi import SplitLBI
from hf_effdl.structure.path.path import FILE_NAME, SparsePath, Tie, complete_ties


GROWN = "grown"
STATE, OPTIMIZER, WEIGHTS, ORIGIN = "trainer_state.json", "optimizer.pt", "model.safetensors", "grown_from.json"
CALLBACK = "GrowthCallback"  # under this name the history stands in the trainer's state
# What new units have in the optimizer's state, per unit; the threshold is the mean of the old ones'.
NEW_UNIT = {"norm": 0, "entered": -1, "left": -1}
RELEASE = 1e6  # nu times this is no ridge; path_scale times this leaves the speed of V as it was


# ---- what may grow, and by how much


def growth_ties(model: nn.Module, groups: Sequence[Group], widths: str) -> list[Tie]:
    """What grows together: with `widths="stock"` the groups that one number of the config sizes, else every group.

    Ties in which no group is lifted are left out: there is no support to go by.
    """
    ties = complete_ties(config_ties(model, groups) if widths == "stock" else (), {g.name: g.units for g in groups})
    lifted = {group.name for group in groups if group.lifted}
    return [tie for tie in ties if lifted.intersection(tie.shares)]


def fits(groups: Sequence[Group], sizes: Mapping[str, int], args: Any) -> bool:
    """Whether sizes hold the bounds `max_macs`, `max_params` and `max_width` of the arguments."""
    if args.max_width is not None and any(size > args.max_width for size in sizes.values()):
        return False
    if args.max_macs is None and args.max_params is None:
        return True
    counts = groups[0].network.count(groups, sizes)
    bounds = {"macs": args.max_macs, "params": args.max_params}
    return all(bound is None or counts[name] <= bound for name, bound in bounds.items())


def plan_growth(
    groups: Sequence[Group],
    ties: Sequence[Tie],
    support: Mapping[str, tuple[int, int]],
    args: Any,
    model: nn.Module | None = None,
) -> dict[str, int]:
    """New units by group for one round.

    A tie is saturated when the share of its units in the support is at least `growth_threshold`. Its largest group
    grows from n to `max(n + growth_add, int(growth_ratio n))` units and the others in proportion. What would pass a
    bound is cut down to what fits: alike for all saturated ties, and what is left goes to the most saturated first.

    Args:
        groups: the groups of the model.
        ties: from `growth_ties`.
        support: per lifted group, units in the support and units in all.
        args: `GrowingArguments`.
        model: where its config sizes the ties, sizes are cut down also to what the stock class builds: rarely two
            widths become equal where it would leave out a projection.
    """
    sizes = {group.name: group.units for group in groups}
    saturated = []
    for tie in ties:
        inside, units = (sum(support[name][i] for name in tie.shares if name in support) for i in (0, 1))
        if units and inside / units >= args.growth_threshold:
            saturated.append((inside / units, tie))
    saturated.sort(key=lambda item: -item[0])
    wishes = [(tie, _steps_wished(tie, args)) for _, tie in saturated]

    def at(share: float) -> dict[str, int]:
        steps = ((tie, tie.steps + int(share * (wish - tie.steps))) for tie, wish in wishes)
        return sizes | {name: step * a for tie, step in steps for name, a in tie.shares.items()}

    def holds(wanted: Mapping[str, int]) -> bool:
        stock = model is None or not any(tie.fields for tie in ties) or _is_stock(model, groups, ties, wanted)
        return fits(groups, wanted, args) and stock

    # what does not fit is cut down alike for all; then, from the most saturated on, what one more step fits into
    low, high = 0.0, 1.0
    if fits(groups, at(high), args):
        low = high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(groups, at(middle), args) else (low, middle)
    sizes = at(low) if holds(at(low)) else sizes
    for tie, wish in wishes:
        name, a = next(iter(tie.shares.items()))
        for steps in range(wish, sizes[name] // a, -1):
            wanted = sizes | {name: steps * a for name, a in tie.shares.items()}
            if holds(wanted):
                sizes = wanted
                break
    return {group.name: sizes[group.name] - group.units for group in groups if sizes[group.name] > group.units}


def _steps_wished(tie: Tie, args: Any) -> int:
    share = max(tie.shares.values())
    largest = share * tie.steps
    return -(-max(largest + args.growth_add, int(args.growth_ratio * largest)) // share)


def _is_stock(model: nn.Module, groups: Sequence[Group], ties: Iterable[Tie], sizes: Mapping[str, int]) -> bool:
    """Whether the stock class builds these sizes from its config."""
    changes = {
        entry: sizes[name] // share * value
        for tie in ties
        for name, share in list(tie.shares.items())[:1]
        for entry, value in tie.fields.items()
    }
    return _meta_shapes(type(model), model.config, changes) == groups[0].network.sizes(groups, sizes)


def growth_is_over(
    model: nn.Module,
    groups: Sequence[Group],
    args: Any,
    history: Sequence[Row],
    sizes: Mapping[str, int] | None = None,
) -> bool:
    """Whether no further round can bring anything: too many went by without growth, or no tie has room for a step.

    `sizes`: units by group, where they are not those of `model`.
    """
    if rounds_without_growth(history) >= args.growth_patience:
        return True
    if args.max_macs is None and args.max_params is None and args.max_width is None:
        return False
    sizes = sizes or {group.name: group.units for group in groups}
    ties = growth_ties(model, groups, args.widths)
    one_more = (sizes | {name: sizes[name] + a for name, a in tie.shares.items()} for tie in ties)
    return not any(fits(groups, wanted, args) for wanted in one_more)


# ---- what a checkpoint says


def saved_history(folder: str | os.PathLike[str]) -> list[Row]:
    """The growth history in a checkpoint of a `GrowingTrainer`."""
    state = TrainerState.load_from_json(str(Path(folder) / STATE))
    if CALLBACK not in state.stateful_callbacks:
        raise ValueError(
            f"{folder} has no growth history: it is a checkpoint of another trainer. Resume it with that one, or "
            "start from its weights without resume_from_checkpoint"
        )
    return list(state.stateful_callbacks[CALLBACK]["attributes"]["history"])


def grown_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The grown checkpoint inside a checkpoint, if there is one and it was made from this very checkpoint."""
    grown = Path(folder) / GROWN
    if not (grown / STATE).is_file():
        return None
    return grown if json.loads((grown / ORIGIN).read_text()) == _origin(Path(folder)) else None


def _origin(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (STATE, OPTIMIZER)}


def saved_support(optimizer: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Units in the support and units in all, per lifted group, from the state dict of a `SplitLBI`."""
    found = {}
    for group in optimizer["param_groups"]:
        if group["penalty"] == "group":
            unit = optimizer["state"].get(group["params"][0], {})
            inside = int((unit["norm"] > unit["threshold"]).sum()) if "norm" in unit else 0
            found[group["name"]] = (inside, group["units"])
    return found


# ---- the grown checkpoint


def grow_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    groups: Sequence[Group],
    args: Any,
    *,
    decay: Sequence[str] | None = None,
    rows_seen: Callable[[int], int],
    batch: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Path:
    """The checkpoint to go on from: `folder/grown`, made now where its step is a growth round's, or `folder` itself.

    Every saturated group gets new units (`plan_growth`). W, V, momentum or moments, norms, thresholds, entry and exit
    steps and batch statistics of the old units are carried bit by bit (with `growth_init="split"` but for the
    outgoing weights, which parents share with their copies); the new units have V 0, never entered, and the mean
    threshold of their group. Schedule, random states and log are copied. A round in which nothing grows only leaves
    its rows in the history of the folder's own state. After the last round the ridge is released (`growth_release`).

    Args:
        folder: a complete checkpoint of a `GrowingTrainer`, left as it is but for its history.
        model: of the sizes in the checkpoint; its weights are not used.
        groups: all groups of `model`.
        args: the `GrowingArguments` of the run.
        decay: names of the parameters with weight decay, as the optimizer was given them.
        rows_seen: rows that training went through in so many steps.
        batch: training rows with labels, for `growth_init="gradmax"`.
        loss: as in `widen`.

    Raises:
        FileNotFoundError: for a checkpoint without weights in one file or without optimizer state.
        ValueError: for a checkpoint of other groups or sizes; nothing is written then.
    """
    folder = Path(folder)
    if (done := grown_folder(folder)) is not None:
        return done
    state, history = TrainerState.load_from_json(str(folder / STATE)), saved_history(folder)
    rounds = args.growth_steps(state.max_steps)
    if state.global_step not in rounds or any(row["step"] == state.global_step for row in history):
        return folder
    if (history or not args.growth_release) and growth_is_over(model, groups, args, history):
        return folder
    for name in (WEIGHTS, OPTIMIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, so it cannot be grown; go on from an earlier checkpoint")
    optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    support = saved_support(optimizer)
    _check_support(support, groups, folder)
    add = plan_growth(groups, growth_ties(model, groups, args.widths), support, args, model)
    rows = _rows(rounds.index(state.global_step) + 1, state, groups, support, add, history, rows_seen)
    state.stateful_callbacks[CALLBACK]["attributes"]["history"] = history + rows
    after = {group.name: group.units + add.get(group.name, 0) for group in groups}
    last = state.global_step == rounds[-1] or growth_is_over(model, groups, args, history + rows, after)
    if not add and not (last and args.growth_release):
        state.save_to_json(str(folder / (STATE + ".tmp")))
        os.replace(folder / (STATE + ".tmp"), folder / STATE)
        return folder

    old = deepcopy(model)
    load_weights(old, folder)
    groups = regroup(groups, old)
    big = old
    if add:
        seed = args.seed + state.global_step
        big = widen_groups(old, groups, add, args.growth_init, seed=seed, batch=batch, loss=loss)
    names = optimizer_names(old, args.split_lbi_params(old, groups, decay))
    optimizer = grow_optimizer(optimizer, names, {name: p.shape for name, p in big.named_parameters()}, add)
    for group in optimizer["param_groups"] if last and args.growth_release else ():
        group |= {name: RELEASE * group[name] for name in ("nu", "path_scale")}
        if group["penalty"]:  # had the ridge in its place
            group["weight_decay"] = args.weight_decay

    part, target = folder / f".{GROWN}", folder / GROWN
    shutil.rmtree(part, ignore_errors=True)  # what a killed attempt left
    part.mkdir()
    for file in folder.iterdir():  # schedule, random states, scaler, processor
        if file.is_file() and file.name not in (STATE, OPTIMIZER, WEIGHTS, FILE_NAME):
            shutil.copy2(file, part)
    save_weights(big, part)
    torch.save(optimizer, part / OPTIMIZER)
    _save_path(part, big, regroup(groups, big), optimizer, args, decay)
    (part / ORIGIN).write_text(json.dumps(_origin(folder)))
    state.save_to_json(str(part / STATE))
    if target.exists():  # of a run that passed here before
        stale = folder / f".stale-{GROWN}"
        shutil.rmtree(stale, ignore_errors=True)
        os.replace(target, stale)
        shutil.rmtree(stale, ignore_errors=True)
    os.replace(part, target)
    return target


def _check_support(support: Mapping[str, tuple[int, int]], groups: Sequence[Group], folder: Path) -> None:
    here = {group.name: group.units for group in groups if group.lifted}
    there = {name: units for name, (_, units) in support.items()}
    if here != there:
        name = next(name for name in {**here, **there} if here.get(name) != there.get(name))
        raise ValueError(
            f"{folder} is of another model: group {name!r} has {there.get(name)} units there and {here.get(name)} "
            "here; resume with the seed that the run began with"
        )


def _rows(
    number: int,
    state: TrainerState,
    groups: Sequence[Group],
    support: Mapping[str, tuple[int, int]],
    add: Mapping[str, int],
    history: Sequence[Row],
    rows_seen: Callable[[int], int],
) -> list[Row]:
    network = groups[0].network
    seed = {row["group"]: row["from"] for row in history if row["round"] == history[0]["round"]}
    counts = network.count(groups, {group.name: group.units + add.get(group.name, 0) for group in groups})
    cost = training_macs(history, state.global_step, network.count(groups, seed)["macs"], rows_seen)
    metrics = metrics_at(state.log_history, state.global_step)
    return [
        {
            "round": number,
            "step": state.global_step,
            "group": group.name,
            "from": group.units,
            "to": group.units + add.get(group.name, 0),
            "support": support[group.name][0] / support[group.name][1] if group.name in support else None,
            **counts,
            "training_macs": cost,
            **metrics,
        }
        for group in groups
    ]


def optimizer_names(model: nn.Module, params: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the parameters in the order in which an optimizer over these param groups numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in params for p in group["params"]]


def grow_optimizer(
    optimizer: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, Sequence[int]], add: Mapping[str, int]
) -> dict[str, Any]:
    """The state dict of a `SplitLBI` for the grown model: old entries as they are, zeros for the new.

    Args:
        optimizer: the state dict before.
        names: parameters in its order (`optimizer_names`).
        shapes: of the grown model's parameters.
        add: new units by group.
    """
    if len(names) != sum(len(group["params"]) for group in optimizer["param_groups"]):
        raise ValueError(
            "this checkpoint is of other groups: its optimizer has another number of parameters. Resume "
            "with the model, preset and groups that it was trained with"
        )
    groups, states = [], {}
    for group in optimizer["param_groups"]:
        more = add.get(group["name"], 0) if group["penalty"] == "group" else 0
        groups.append({**group, "units": group["units"] + more} if more else dict(group))
        for key in group["params"]:
            state = optimizer["state"].get(key)
            if state is not None:
                states[key] = {
                    name: _grown_entry(name, value, shapes[names[key]], more) for name, value in state.items()
                }
    return {**optimizer, "state": states, "param_groups": groups}


def _grown_entry(name: str, value: Any, shape: Sequence[int], more: int) -> Any:
    if not torch.is_tensor(value) or value.ndim == 0:  # counters, and thresholds of whole tensors
        return value
    if name in NEW_UNIT:
        return torch.cat([value, value.new_full((more,), NEW_UNIT[name])])
    if name == "threshold":
        return torch.cat([value, value.mean().expand(more)])
    if value.shape == torch.Size(shape):
        return value
    grown = value.new_zeros(tuple(shape))  # new units come last along every axis
    grown[tuple(slice(size) for size in value.shape)] = value
    return grown


def load_weights(model: nn.Module, folder: Path) -> None:
    """The weights and buffers in a checkpoint, into a model of its sizes."""
    try:
        result = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} are not those of this model: {error}") from error
    shared = _shared_names(model)  # saved under one of their names
    missing = [name for name in result.missing_keys if name not in shared]
    if missing or result.unexpected_keys:
        name, what = (missing[0], "missing there") if missing else (result.unexpected_keys[0], "not in the model")
        raise ValueError(f"the weights in {folder} are not those of this model: {name} is {what}")


def save_weights(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _save_path(
    folder: Path,
    big: nn.Module,
    groups: Sequence[Group],
    optimizer: Mapping[str, Any],
    args: Any,
    decay: Sequence[str] | None,
) -> None:
    """The path beside the grown checkpoint; an optimizer that loads its state also proves that it fits the model."""
    loaded = SplitLBI(args.split_lbi_params(big, groups, decay), **args.split_lbi_kwargs(1) | {"lam_scale": "none"})
    loaded.load_state_dict(dict(optimizer))
    SparsePath.from_optimizer(loaded, groups, config_ties(big, groups)).save(folder)
