"""Networks from a ticket: the same task from an earlier step, another task, or the dense network kept sparse."""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_effdl.structure.groups.group import Group, check_module, regroup
from hf_effdl.structure.slim.report import count, set_report
from hf_effdl.structure.slim.slim import slim
from hf_effdl.structure.tickets.files import state_digest
from hf_effdl.structure.tickets.ticket import Ticket


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
    _check_ticket(ticket)
    if to != "init" and (isinstance(to, bool) or not isinstance(to, Integral) or to < 0):
        raise ValueError(f"to={to!r}: it must be 'init' or a step")
    step = 0 if to == "init" else int(to)
    folder = None if callable(model_init) else Path(model_init)
    checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}" if folder else None
    is_saved = checkpoint is not None and checkpoint.is_dir()
    model = _dense_model(str(checkpoint) if is_saved else _for_architecture(model_init, folder), ticket)
    _check_architecture(ticket, model)
    if step in ticket.weights:
        model.load_state_dict(ticket.weights[step])
    elif not is_saved:
        _check_initial_weights(model, ticket) if step == 0 else _refuse_step(step, ticket, folder)
    if masked:
        return silence(model, ticket.groups, ticket.kept)
    return _small(model, ticket.groups, ticket, step)


def _for_architecture(model_init: Any, folder: Path | None) -> Any:
    """What the dense model is made of; a folder of checkpoints alone stands for the first of them."""
    if folder and not (folder / "config.json").is_file() and (steps := _checkpoints(folder)):
        return str(folder / f"{PREFIX_CHECKPOINT_DIR}-{steps[0]}")
    return model_init


def _check_initial_weights(model: nn.Module, ticket: Ticket) -> None:
    if state_digest(model.state_dict()) != ticket.init.get("sha256"):
        raise ValueError(
            f"the weights of this {type(model).__name__} are not those that the ticket's run began with "
            f"({_origin(ticket)}), and the ticket holds no initial weights; build the model with the seed and "
            "code of that run, or save the ticket with its weights"
        )


def _refuse_step(step: int, ticket: Ticket, folder: Path | None) -> None:
    raise ValueError(
        f"to={step}: the weights of that step are neither in the ticket, which has {sorted(ticket.weights)}, nor in "
        f"checkpoints, which are there for {_checkpoints(folder)}; take one of those, or find the ticket with "
        f"weights_at=[{step}]"
    )


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
    _check_ticket(ticket)
    check_module(other_model, "transfer")
    if to is not None and to != "init" and not isinstance(to, Integral):
        raise ValueError(f"to={to!r}: it must be 'init' or a step")
    step = {None: ticket.step, "init": 0}.get(to, to)
    if step not in ticket.weights or isinstance(step, bool):
        raise ValueError(f"to={to!r}: the ticket has the weights of steps {sorted(ticket.weights)}; take one of those")
    model = deepcopy(other_model)
    head = _head(model, head)
    sized = {(part.tensor, part.axis) for group in ticket.groups for part in group.slices}
    state, weights = model.state_dict(), ticket.weights[step]
    for name in dict.fromkeys((*state, *weights)):
        in_head = f"{name}.".startswith(f"{head}.") or not head
        new, old = state.get(name), weights.get(name)
        if new is None or old is None:
            if not in_head:
                _refuse_tensor(name, "ticket" if new is None else "model", model, ticket)
        elif not in_head:
            state[name] = _fit(name, old, new, (name, 1) in sized)
        elif new.shape[1:] != old.shape[1:]:
            raise _mismatch(name, old, new)
    model.load_state_dict(state)
    return _small(model, regroup(ticket.groups, model), ticket, step)


def _check_ticket(ticket: Any) -> None:
    if not isinstance(ticket, Ticket):
        raise TypeError(f"this needs a Ticket, of find_ticket or Ticket.from_pretrained, not {type(ticket).__name__}")


def _head(model: nn.Module, name: str | None) -> str:
    """The module that a model of another task keeps, by name."""
    names = dict(model.named_modules())
    if name is None:
        return [name for name, module in names.items() if isinstance(module, _LAYERS)][-1]
    if name not in names:
        raise ValueError(f"head={name!r}: {type(model).__name__} has no module of that name")
    return name


def _refuse_tensor(name: str, owner: str, model: nn.Module, ticket: Ticket) -> None:
    here, there = ("not ", "") if owner == "ticket" else ("", "not ")
    raise ValueError(
        f"{name} is {here}in this {type(model).__name__} but {there}in the ticket's {ticket.init.get('class')}; "
        "a ticket goes to the same architecture"
    )


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _fit(name: str, old: Tensor, new: Tensor, sized: bool) -> Tensor:
    """The ticket's tensor in the shape that the other model has it."""
    if old.shape == new.shape:
        return old
    same_but_channels = old.ndim == new.ndim > 2 and (old.shape[0], old.shape[2:]) == (new.shape[0], new.shape[2:])
    if same_but_channels and not sized:
        if old.shape[1] == 1:
            return (old / new.shape[1]).expand(new.shape).clone()
        if new.shape[1] == 1:
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
        outside = outside.nonzero().flatten()
        for part in group.slices:
            if part.role not in ("mean", "var"):
                shape = model.get_parameter(part.tensor).shape
                mask = gone.setdefault(part.tensor, torch.zeros(shape, dtype=torch.bool))
                mask.index_fill_(part.axis, part.entries(outside), True)
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
