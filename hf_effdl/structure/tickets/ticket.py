"""A ticket: the units that a run had settled on early, and the smaller networks that start again from them."""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_effdl.structure.groups.group import Group, regroup
from hf_effdl.structure.slim.slim import set_report, slim
from hf_effdl.structure.tickets.files import digest, load_ticket, push_ticket, save_ticket


State = dict[str, Tensor]


@dataclass(eq=False)
class Ticket:
    """Which units of a network to keep, found early in a run, and the weights to start them from. Of `find_ticket`.

    Args:
        groups: the groups of the dense model.
        kept: ascending indices of the kept units by group name; groups not named keep all.
        step: optimizer steps after which it was found.
        settled: whether the selection had stopped changing by then.
        distances: one row per look: `{"step", "path", "change", "distance"}`: path time, share of the units in which
            the selection differs from the one before, and the largest such share among the last `window` selections.
        init: where the initial weights are from: `{"sha256", "class", "source", "seed"}`: their `digest`, the model's
            class and name, and the seed of the run.
        weights: state dicts by step: 0 (the initial ones), the step found, and those asked for.

    Raises:
        ValueError: for `kept` that names other groups, or units that a group does not have.

    Example:
        >>> ticket = find_ticket(trainer, macs=0.25)       # doctest: +SKIP
        >>> small = rewind(model_init, ticket)             # doctest: +SKIP
    """

    groups: Sequence[Group]
    kept: dict[str, Tensor]
    step: int
    settled: bool = True
    distances: list[dict[str, float | None]] = field(default_factory=list)
    init: dict[str, Any] = field(default_factory=dict)
    weights: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        units = {group.name: group.units for group in self.groups}
        for name, index in self.kept.items():
            if name not in units:
                raise ValueError(f"kept names group {name!r}, which is not among the ticket's groups {list(units)}")
            inside = index.ndim == 1 and len(index) > 0 and index.dtype == torch.int64
            if not (inside and 0 <= index.min() and index.max() < units[name] and bool((index.diff() > 0).all())):
                raise ValueError(
                    f"kept[{name!r}] must hold ascending indices (int64) of the group's {units[name]} "
                    f"units, at least one; got {index}"
                )

    def report(self) -> dict[str, Any]:
        """What the ticket leaves of the model: `{"macs": {"before", "after", "ratio"}, "params", "units", ...}`.

        MACs are of one input row, counted from the shapes.
        """
        return {**count(self.groups, self.kept), "step": self.step, "settled": self.settled}

    # ---- files

    def save_pretrained(self, folder: str | os.PathLike[str], weights: bool = True) -> Path:
        """Write the ticket into a folder: JSON, safetensors and a card, each file at once or not at all.

        Args:
            folder: made where it does not exist.
            weights: False leaves the weights out; `rewind` then needs the initial ones, and knows them by their
                digest.

        Returns:
            The folder.
        """
        return save_ticket(self, folder, weights)

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
    ) -> "Ticket":
        """Read a ticket from a folder or from a repository on the Hub.

        Args:
            folder_or_repo: what `save_pretrained` wrote, or the repository id that `push_to_hub` was given.
            revision: branch, tag or commit of the repository.
            token: for a private repository.

        Raises:
            FileNotFoundError: where there is no ticket.
            ValueError: for files that are damaged or do not belong together.
        """
        return cls(**load_ticket(folder_or_repo, revision, token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        weights: bool = True,
        commit_message: str = "Ticket",
    ) -> str:
        """Push the ticket to a model repository in one commit; a card of something else that is there stays.

        Returns:
            The commit's URL.
        """
        return push_ticket(self, repo_id, private, token, weights, commit_message)


def count(groups: Sequence[Group], kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters, MACs of one input row, and units of every group, before and after."""
    network = groups[0].network
    sizes = {group.name: len(kept[group.name]) if group.name in kept else group.units for group in groups}
    before, after = network.count(), network.count(groups, sizes)
    result: dict[str, Any] = {
        key: {"before": before[key], "after": after[key], "ratio": round(after[key] / before[key], 6)}
        for key in ("params", "macs")
    }
    return result | {"units": {g.name: {"before": g.units, "after": sizes[g.name]} for g in groups}}


# ---- networks from a ticket


def rewind(
    model_init: Callable[..., nn.Module] | nn.Module | str | os.PathLike[str],
    ticket: Ticket,
    to: str | int = "init",
    *,
    masked: bool = False,
) -> nn.Module:
    """The network of a ticket, with the weights it had at an earlier step: smaller dense tensors, ready to train.

    Args:
        model_init: a function that makes the dense model (as `Trainer`'s), such a model, which is left as it is, or a
            folder or repository id that `from_pretrained` of the ticket's class loads.
        ticket: from `find_ticket`.
        to: `"init"`, or a step whose weights the ticket has, or for which `model_init` has a folder
            `checkpoint-<step>`. Statistics of batch norms are rewound with the weights.
        masked: the dense network instead, in which the other units are silent and stay so: their entries are zero and
            hooks keep their gradients at zero. It trains as the small one does. The hooks live in this object, not in
            its files or copies.

    Returns:
        A new module; `config.effdl_report` (`effdl_report` for a module without a config) says what the ticket saves.

    Raises:
        ValueError: for a ticket of another architecture, initial weights that are not the ticket's, or a step whose
            weights are nowhere.

    Example:
        >>> small = rewind(lambda: AutoModelForImageClassification.from_config(config), ticket)  # doctest: +SKIP
        >>> Trainer(small, args, train_dataset=rows).train()                                     # doctest: +SKIP

    Source: Frankle and Carbin (https://arxiv.org/abs/1803.03635); to a later step: Frankle et al.
    (https://arxiv.org/abs/1912.05671).
    """
    if to != "init" and (isinstance(to, bool) or not isinstance(to, int) or to < 0):
        raise ValueError(f"to={to!r}: it must be 'init' or a step")
    step = 0 if to == "init" else to
    folder = None if callable(model_init) else Path(model_init)
    checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}" if folder else None
    here = checkpoint is not None and checkpoint.is_dir()
    if here:
        model_init = str(checkpoint)
    elif folder and not (folder / "config.json").is_file() and (steps := _checkpoints(folder)):
        model_init = str(folder / f"{PREFIX_CHECKPOINT_DIR}-{steps[0]}")  # for its architecture
    model = _dense_model(model_init, ticket)
    _check_architecture(ticket, model)
    if step in ticket.weights:
        model.load_state_dict(ticket.weights[step])
    elif step == 0 and not here:
        if digest(model.state_dict()) != ticket.init.get("sha256"):
            raise ValueError(
                f"the weights of this {type(model).__name__} are not those that the ticket's run began with "
                f"({_origin(ticket)}), and the ticket holds no initial weights; build the model with the seed and "
                "code of that run, or save the ticket with its weights"
            )
    elif not here:
        raise ValueError(
            f"to={to}: the weights of that step are neither in the ticket, which has {sorted(ticket.weights)}, nor in "
            f"checkpoints, which are there for {_checkpoints(folder)}; take one of those, or find the ticket with "
            f"weights_at=[{step}]"
        )
    if masked:
        return silence(model, ticket.groups, ticket.kept)
    return _small(model, ticket.groups, ticket, step)


def transfer(
    ticket: Ticket, other_model: nn.Module, *, to: str | int | None = None, head: str | None = None
) -> nn.Module:
    """The network of a ticket for another task: its body, under the head of another model of the same architecture.

    The first layer follows the other model's input: from grey to colour every channel gets the weights divided by
    their number, from colour to grey they are summed, so that a grey image gives the same response.

    Args:
        ticket: from `find_ticket`.
        other_model: the dense model for the other task, with its number of classes; left as it is.
        to: step of the weights; default: the step at which the ticket was found. `"init"`: the initial weights.
        head: name of the module that is kept as `other_model` has it; default: the last linear layer or convolution.

    Returns:
        A new module, smaller as the ticket says.

    Raises:
        ValueError: for weights that the ticket does not have, and tensors whose shapes cannot meet.

    Example:
        >>> other = AutoModelForImageClassification.from_config(config_with_100_labels)  # doctest: +SKIP
        >>> small = transfer(ticket, other)                                              # doctest: +SKIP
    """
    step = {None: ticket.step, "init": 0}.get(to, to)
    if step not in ticket.weights or isinstance(step, bool):
        raise ValueError(f"to={to!r}: the ticket has the weights of steps {sorted(ticket.weights)}; take one of those")
    model = deepcopy(other_model)
    if head is None:
        head = [name for name, m in model.named_modules() if isinstance(m, _LAYERS)][-1]
    elif head not in dict(model.named_modules()):
        raise ValueError(f"head={head!r}: {type(model).__name__} has no module of that name")
    sized = {(part.tensor, part.axis) for group in ticket.groups for part in group.slices}
    theirs, mine = model.state_dict(), ticket.weights[step]
    for name in dict.fromkeys((*theirs, *mine)):
        inside = f"{name}.".startswith(f"{head}.") or not head
        new, old = theirs.get(name), mine.get(name)
        if new is None or old is None:
            if inside:
                continue
            where = f"{'' if old is None else 'not '}in this {type(model).__name__}"
            raise ValueError(
                f"{name} is {where} but {'not ' if old is None else ''}in the ticket's "
                f"{ticket.init.get('class')}; a ticket goes to the same architecture"
            )
        if not inside:
            theirs[name] = _fit(name, old, new, (name, 1) in sized)
        elif new.shape[1:] != old.shape[1:]:
            raise _mismatch(name, old, new)
    model.load_state_dict(theirs)
    return _small(model, regroup(ticket.groups, model), ticket, step)


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _fit(name: str, old: Tensor, new: Tensor, sized: bool) -> Tensor:
    """The ticket's tensor in the shape that the other model has it."""
    if old.shape == new.shape:
        return old
    first = old.ndim == new.ndim > 2 and not sized and old.shape[0] == new.shape[0] and old.shape[2:] == new.shape[2:]
    if first and old.shape[1] == 1:
        return (old / new.shape[1]).expand(new.shape).clone()
    if first and new.shape[1] == 1:
        return old.sum(1, keepdim=True)
    raise _mismatch(name, old, new)


def _mismatch(name: str, old: Tensor, new: Tensor) -> ValueError:
    return ValueError(
        f"{name} has shape {tuple(old.shape)} in the ticket and {tuple(new.shape)} in the other model; only the class "
        "count of the head may differ, and the input's channels between one (grey) and several"
    )


def _small(model: nn.Module, groups: Sequence[Group], ticket: Ticket, step: int) -> nn.Module:
    small = slim(model, groups, ticket.kept)
    set_report(small, ticket.report() | count(groups, ticket.kept) | {"weights of step": step})
    return small


@torch.no_grad()
def silence(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """Zero, in place, every entry of the units that are not kept, and keep their gradients at zero by hooks."""
    gone: dict[str, Tensor] = {}
    for group in groups:
        outside = torch.ones(group.units, dtype=torch.bool)
        outside[kept.get(group.name, slice(None))] = False
        for part in group.slices:
            if part.role not in ("mean", "var"):
                shape = model.get_parameter(part.tensor).shape
                mask = gone.setdefault(part.tensor, torch.zeros(shape, dtype=torch.bool))
                mask.index_fill_(part.axis, outside.repeat_interleave(part.block).nonzero().flatten(), True)
    for name, mask in gone.items():
        p = model.get_parameter(name)
        p.masked_fill_(mask.to(p.device), 0)
        if p.requires_grad:
            p.register_hook(lambda grad, mask=mask: grad.masked_fill(mask.to(grad.device), 0))
    return model


def _dense_model(model_init: Any, ticket: Ticket) -> nn.Module:
    if isinstance(model_init, nn.Module):
        return deepcopy(model_init)
    if callable(model_init):
        named = [p for p in inspect.signature(model_init).parameters.values() if p.kind < p.VAR_POSITIONAL]
        trial = any(p.default is p.empty for p in named)  # a Trainer's model_init may take the trial
        model = model_init(None) if trial else model_init()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model_init must return a torch.nn.Module, not {type(model).__name__}")
        return model
    kind = getattr(transformers, str(ticket.init.get("class")), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(
            f"the ticket is of a {ticket.init.get('class')}, which is no model class of transformers; "
            "pass the model, or a function that makes it, instead of a folder"
        )
    return kind.from_pretrained(model_init)


def _check_architecture(ticket: Ticket, model: nn.Module) -> None:
    there = ticket.groups[0].network.shapes
    here = {name: tuple(p.shape) for name, p in model.named_parameters()}
    differ = [name for name in (*there, *here) if there.get(name) != here.get(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"this ticket is of another architecture ({_origin(ticket)}): {name} has shape {there.get(name)} there "
            f"and {here.get(name)} in this {type(model).__name__}; pass the model it was found in, or "
            "transfer(ticket, model) for another number of classes or channels"
        )


def _origin(ticket: Ticket) -> str:
    known = {name: ticket.init.get(name) for name in ("class", "source", "seed")}
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def _checkpoints(folder: Path | None) -> list[int]:
    names = [path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")] if folder else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name)))
