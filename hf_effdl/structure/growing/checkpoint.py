"""Growth as a function from checkpoint to checkpoint: from `checkpoint-N` to `checkpoint-N/grown`.

What grows is decided from the saved optimizer state alone: the share of a group's units in the support. The folder
appears by one rename, so that there is either a whole grown checkpoint or none; the checkpoint it came from stays.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState

from hf_effdl.files import damaged, digest, read_json, read_tensors, write_json, write_whole
from hf_effdl.structure.groups.group import Group, regroup, shared_names
from hf_effdl.structure.groups.record import named
from hf_effdl.structure.groups.ties import config_ties
from hf_effdl.structure.growing.arguments import GrowingArguments
from hf_effdl.structure.growing.history import Row, checked_history, metrics_at, restarted_at, training_macs
from hf_effdl.structure.growing.new_units import built_anew
from hf_effdl.structure.growing.optimizer_state import grow_optimizer, optimizer_names, release, restart, saved_support
from hf_effdl.structure.growing.plan import growth_is_over, growth_ties, plan_growth
from hf_effdl.structure.growing.widen import widen_groups
from hf_effdl.structure.optim.split_lbi import SplitLBI
from hf_effdl.structure.path.path import FILE_NAME, SparsePath
from hf_effdl.structure.training.arguments import scheduled_rates


GROWN = "grown"
STATE, OPTIMIZER, WEIGHTS, ORIGIN = "trainer_state.json", "optimizer.pt", "model.safetensors", "grown_from.json"
SCHEDULE = "scheduler.pt"
CALLBACK = "GrowthCallback"  # under this name the history stands in the trainer's state


# ---- what a checkpoint says


def saved_history(folder: str | os.PathLike[str]) -> list[Row]:
    """The growth history in a checkpoint of a `GrowingTrainer`."""
    stored = named(read_json(Path(folder) / STATE, remedy="go on from an earlier checkpoint"), STATE)
    callbacks = named(stored.get("stateful_callbacks", {}), "stateful_callbacks")
    if CALLBACK not in callbacks:
        raise ValueError(
            f"{folder} has no growth history: it is a checkpoint of another trainer. Resume it with that one, or "
            "start from its weights without resume_from_checkpoint"
        )
    attributes = named(named(callbacks[CALLBACK], CALLBACK).get("attributes"), "attributes")
    return checked_history(attributes.get("history"), folder)


def grown_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The grown checkpoint inside a checkpoint, if there is one and it was made from this very checkpoint."""
    grown = Path(folder) / GROWN
    if not (grown / STATE).is_file():
        return None
    return grown if read_json(grown / ORIGIN) == _origin(Path(folder)) else None


def _origin(folder: Path) -> dict[str, str]:
    return {name: digest(folder / name) for name in (STATE, OPTIMIZER)}


# ---- the grown checkpoint


def grow_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    groups: Sequence[Group],
    args: GrowingArguments,
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
    its rows in the history of the folder's own state. After the last round the ridge is released (`growth_release`),
    and where `growth_restart` says so weights, optimizer and schedule are new.

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
    optimizer = _load_optimizer(folder)
    support = saved_support(optimizer)
    _check_support(support, groups, folder)
    add = plan_growth(groups, growth_ties(model, groups, args.widths), support, args, model)
    rows = _rows(rounds.index(state.global_step) + 1, state, groups, support, add, history, rows_seen)
    after = {group.name: group.units + add.get(group.name, 0) for group in groups}
    is_last = state.global_step == rounds[-1] or growth_is_over(model, groups, args, history + rows, after)
    changes = is_last and (args.growth_release or args.growth_restart)
    rows = _marked(rows, is_last and args.growth_restart)
    state.stateful_callbacks[CALLBACK]["attributes"]["history"] = history + rows
    if not add and not changes:
        write_whole(folder / STATE, lambda part: state.save_to_json(str(part)))
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
    if is_last:
        _end_growth(big, optimizer, args, state.max_steps - state.global_step)
    return _write_grown(folder, state, big, regroup(groups, big), optimizer, args, decay)


def _end_growth(big: nn.Module, optimizer: Mapping[str, Any], args: GrowingArguments, steps_left: int) -> None:
    """What the arguments say of the time after the last round, in place."""
    if args.growth_release:
        release(optimizer, args.weight_decay)
    if args.growth_restart:
        big.load_state_dict(built_anew(big, args.seed).state_dict())
        restart(optimizer, scheduled_rates(args, steps_left)[0])


def _load_optimizer(folder: Path) -> dict[str, Any]:
    for name in (WEIGHTS, OPTIMIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, so it cannot be grown; go on from an earlier checkpoint")
    try:
        return torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip files and torch, with no common class
        raise damaged(
            folder / OPTIMIZER, f"{type(error).__name__}: {error}"[:200], "go on from an earlier one"
        ) from error


def _write_grown(
    folder: Path,
    state: TrainerState,
    big: nn.Module,
    groups: Sequence[Group],
    optimizer: Mapping[str, Any],
    args: GrowingArguments,
    decay: Sequence[str] | None,
) -> Path:
    """The grown checkpoint, written beside its place and then put there by one rename."""
    part, target = folder / f".{GROWN}", folder / GROWN
    shutil.rmtree(part, ignore_errors=True)  # what a killed attempt left
    part.mkdir()
    for file in folder.iterdir():  # schedule, random states, scaler, processor
        if file.is_file() and file.name not in (STATE, OPTIMIZER, WEIGHTS, FILE_NAME):
            shutil.copy2(file, part)
    save_weights(big, part)
    torch.save(optimizer, part / OPTIMIZER)
    if restarted_at(state.stateful_callbacks[CALLBACK]["attributes"]["history"]) == state.global_step:
        _restart_schedule(part / SCHEDULE, [group["lr"] for group in optimizer["param_groups"]])
    save_path(part, big, groups, optimizer, args, decay)
    write_json(part / ORIGIN, _origin(folder))
    state.save_to_json(str(part / STATE))
    if target.exists():  # of a run that passed here before
        stale = folder / f".stale-{GROWN}"
        shutil.rmtree(stale, ignore_errors=True)
        os.replace(target, stale)
        shutil.rmtree(stale, ignore_errors=True)
    os.replace(part, target)
    return target


def _restart_schedule(file: Path, rates: Sequence[float]) -> None:
    """The state of a schedule before its first step."""
    schedule = torch.load(file, map_location="cpu", weights_only=True)
    torch.save(schedule | {"last_epoch": 0, "_step_count": 1, "_last_lr": list(rates)}, file)


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


def _marked(rows: list[Row], restarted: bool) -> list[Row]:
    return [row | {"restarted": True} for row in rows] if restarted else rows


def load_weights(model: nn.Module, folder: Path) -> None:
    """The weights and buffers in a checkpoint, into a model of its sizes."""
    try:
        tensors = read_tensors(folder / WEIGHTS, remedy="go on from an earlier checkpoint")
        result = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} are not those of this model: {error}") from error
    shared = shared_names(model)  # saved under one of their names
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


def save_path(
    folder: Path,
    big: nn.Module,
    groups: Sequence[Group],
    optimizer: Mapping[str, Any],
    args: GrowingArguments,
    decay: Sequence[str] | None,
) -> None:
    """The path beside the grown checkpoint; an optimizer that loads its state also proves that it fits the model."""
    loaded = SplitLBI(args.split_lbi_params(big, groups, decay), **args.split_lbi_kwargs(1) | {"lam_scale": "none"})
    loaded.load_state_dict(dict(optimizer))
    SparsePath.from_optimizer(loaded, groups, config_ties(big, groups)).save(folder)
