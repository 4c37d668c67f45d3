"""All parameters of a model as torch param groups: the lifted ones by group, the rest by weight decay."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_effdl.checks import real_number
from hf_effdl.structure.groups.group import Group, check_groups, check_module


def param_groups(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    weight_decay: float = 0.0,
    decay: Iterable[str] | None = None,
    l1: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """All trainable parameters of a model as torch param groups: one per lifted group, the rest by weight decay.

    Lifted tensors get no weight decay: the coupling is their ridge.

    Args:
        model: the model that `groups` were found in.
        groups: groups to lift; those that lift nothing are left out.
        weight_decay: for the parameters named in `decay`.
        decay: names of the parameters with weight decay; default: all with two or more axes.
        l1: names of parameters to lift one weight at a time.

    Raises:
        TypeError: `decay` or `l1` is no list of texts.
        ValueError: for a name that no parameter has, a frozen lifted tensor, or a weight decay that is negative.
    """
    check_module(model, "param_groups")
    check_groups(groups, "param_groups")
    if not 0 <= real_number("weight_decay", weight_decay) < float("inf"):
        raise ValueError(f"weight_decay={weight_decay}: it must not be negative, and finite")
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    l1 = _names("l1", l1, known)
    decay = None if decay is None else _names("decay", decay, known)
    lifted = [group for group in groups if group.lifted]
    _check_not_frozen(lifted, model)
    result = [{**group.param_group(model), "weight_decay": 0.0} for group in lifted]
    result += [
        {"params": [model.get_parameter(name)], "penalty": "l1", "name": name, "weight_decay": 0.0} for name in l1
    ]
    taken = {name for group in lifted for name in group.lifted}.union(l1)
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in taken}
    if decay is None:
        decay = [name for name, p in rest.items() if p.ndim > 1]
    return [*result, *_by_decay(rest, set(decay), weight_decay)]


def _names(argument: str, names: Any, known: Collection[str]) -> list[str]:
    """Names of parameters, as a list."""
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise TypeError(f"{argument}={names!r}: pass a list of names of parameters")
    names = list(names)
    unknown = [name for name in names if not isinstance(name, str) or name not in known]
    if unknown:
        raise ValueError(
            f"{argument} names {unknown[0]!r}, which is no parameter of the model; see named_parameters()"
        )
    return names


def _check_not_frozen(groups: Iterable[Group], model: nn.Module) -> None:
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for group in groups:
        name = next((name for name in group.lifted if name in frozen), None)
        if name is not None:
            raise ValueError(
                f"group {group.name!r} lifts {name}, which is frozen (requires_grad=False) by now: it shows no "
                "signal, and its units would be taken for unneeded. Freeze first, then call find_groups"
            )


def _by_decay(rest: Mapping[str, nn.Parameter], decay: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """Up to two param groups, of parameters that are not lifted: with and without weight decay."""
    decayed = [p for name, p in rest.items() if name in decay]
    others = [p for name, p in rest.items() if name not in decay]
    groups = [
        {"params": decayed, "name": "decay", "weight_decay": weight_decay},
        {"params": others, "name": "no decay", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
