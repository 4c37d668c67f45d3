"""Putting units in: the same class with larger tensors, computing what it computed before."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_effdl.checks import whole_number
from hf_effdl.structure.groups.group import Group, check_module, check_same_network, shared_names
from hf_effdl.structure.groups.inputs import copy_of
from hf_effdl.structure.groups.ties import config_ties
from hf_effdl.structure.growing import new_units
from hf_effdl.structure.growing.new_units import INITS
from hf_effdl.structure.optim.sharding import is_sharded
from hf_effdl.structure.slim.report import forget_report
from hf_effdl.structure.slim.slim import set_config


MOST_UNITS = 2**20


def widen(
    model: nn.Module,
    group: Group,
    add: int = 8,
    init: str = "zero-out",
    *,
    seed: int = 0,
    batch: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> nn.Module:
    """A wider copy of a model: same class, `add` more units in one group, computing what the model computes.

    The new units come last, in every tensor of the group. Except with `init="fresh"` the outputs equal the model's, in
    eval and in train mode, to rounding (dropout of the units themselves draws other numbers for more of them). `slim`
    is the inverse: except with `"split"`, keeping the old units of the wider model gives the model back bit by bit.

    Args:
        model: left as it is.
        group: one of `find_groups(model)`.
        add: new units.
        init: what the new units start with.
            `"zero-out"`: rows drawn at random without their part in the span of the old rows (as long as there are
            more inputs than rows), as long as the old rows are on average; bias 0; batch norm with the mean absolute
            weight and otherwise the mean entries of the old units. The outgoing slices are 0.
            `"fresh-rows"`: as `"zero-out"`, with rows as long as those of a new layer on average, and the entries of
            its batch norm. A new layer is one as the config builds it or, for other modules and for sizes that the
            config does not say, as its `reset_parameters` draws it.
            `"split"`: copies of the units of largest norm (`Group.norm`), of one after the other, again from the first
            where `add` is more than there are. Copies and original share the original's outgoing slices, by unequal
            shares that sum to one.
            `"gradmax"`: as `"zero-out"`, with orthonormal rows, times the same length, for which the loss gradient of
            the outgoing slices is largest on `batch`. Where a group has rows in several tensors, orthonormal in each.
            `"fresh"`: rows and outgoing slices drawn as for a new layer of the grown size (Kaiming-normal by fan-in),
            batch norm 1 and 0, running mean 0 and variance 1: this changes what the model computes.
        seed: of what is drawn; torch's random state stays.
        batch: for `"gradmax"`: a tensor, tuple or dict that the model accepts, with labels, on the model's device.
        loss: for `"gradmax"`: a function of the model's output; default: its `"loss"`.

    Returns:
        The wider model, in the mode, dtype, memory format and on the device of `model`. A transformers model keeps a
        stock config where its config can say the sizes, else they go to `config.quantization_config`, as in `slim`.

    Raises:
        TypeError: for anything but a module, a group and whole numbers.
        ValueError: for `add` below 1, an unknown `init`, a group of another model, one that nothing reads (the outputs
            of the model), one with a tensor that another layer shares or that processes share, or a batch that
            `"gradmax"` cannot use. Nothing is changed.

    Example:
        >>> from hf_effdl import find_groups
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> [group] = find_groups(net, torch.zeros(1, 1, 8, 8))
        >>> big = widen(net, group, add=2)
        >>> big[0], big[3]
        (Conv2d(1, 6, kernel_size=(3, 3), stride=(1, 1)), Linear(in_features=216, out_features=2, bias=True))
        >>> x = torch.ones(1, 1, 8, 8)
        >>> torch.allclose(net(x), big(x), atol=1e-6)
        True

    Source:
        Rows at right angles to the old ones and outgoing zeros: released code of Fu et al., "Exploring structural
        sparsity of deep networks via inverse scale spaces" (arXiv 1905.09449), as it was meant. Splitting: Chen et
        al., "Net2Net" (arXiv 1511.05641). Rows of largest gradient: Evci et al., "GradMax" (arXiv 2201.05125), with
        the zeros on the outgoing side.
    """
    if not isinstance(group, Group):
        raise TypeError(f"widen needs a Group, one of find_groups(model), not {type(group).__name__}: {group!r}")
    return widen_groups(model, [group], {group.name: add}, init, seed=seed, batch=batch, loss=loss)


@torch.no_grad()
def widen_groups(
    model: nn.Module,
    groups: Sequence[Group],
    add: Mapping[str, int],
    init: str = "zero-out",
    *,
    seed: int = 0,
    batch: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> nn.Module:
    """`widen` for several groups at once.

    Args:
        model: left as it is.
        groups: all groups of the model: which of them one number of its config sizes is found by trying, and where
            `add` keeps them in step the wider model has a stock config.
        add: new units by group name; groups not named stay.
        init: as in `widen`.
        seed: as in `widen`. What is drawn for a group does not depend on which others are widened.
        batch: as in `widen`.
        loss: as in `widen`.

    Raises:
        TypeError, ValueError: as `widen` does, and for names in `add` that no group has.

    Example:
        >>> from hf_effdl import find_groups
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> big = widen_groups(net, find_groups(net, torch.zeros(1, 3)), {"0": 2, "2": 1})
        >>> [tuple(layer.weight.shape) for layer in big[::2]]
        [(6, 3), (6, 6), (2, 6)]
    """
    growth = _check(model, groups, add, init, seed, batch)
    names = {part.tensor for group, _ in growth for part in group.slices}
    tensors = {name: t.detach() for name, t in _tensors(model).items() if name in names}
    if init in ("split", "fresh-rows"):
        new = {"split": new_units.split, "fresh-rows": new_units.fresh_rows}[init](tensors, growth, seed, model)
    elif init == "gradmax":
        new = new_units.gradmax(tensors, growth, seed, model, batch, loss)
    else:
        new = {"zero-out": new_units.zero_out, "fresh": new_units.fresh}[init](tensors, growth, seed)
    big = new_units.place(copy_of(model), new)
    forget_report(big)
    if isinstance(model, PreTrainedModel):
        ties = config_ties(model, groups)
        _forget_sizes(big.config)
        more = {group.name: units for group, units in growth}
        set_config(big, ties, {group.name: group.units + more.get(group.name, 0) for group in groups})
    return big


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _forget_sizes(config: Any) -> None:
    """Take out the sizes of the model before, so that a config that says the new ones is stock."""
    from hf_effdl.structure.groups.slim_config import SlimConfig

    if isinstance(getattr(config, "quantization_config", None), SlimConfig):
        del config.quantization_config


def _check(
    model: nn.Module, groups: Sequence[Group], add: Mapping[str, int], init: str, seed: int, batch: Any
) -> list[tuple[Group, int]]:
    """The groups that grow and by how many units; refuses what cannot be done."""
    _check_types(model, groups, add, seed)
    if init not in INITS:
        raise ValueError(f"init={init!r}: it must be one of {INITS}")
    if not add:
        raise ValueError("add names no group, so there is nothing to widen")
    if init == "gradmax" and batch is None:
        raise ValueError('init="gradmax" needs batch=: what the model accepts, with labels; the rows depend on it')
    if unknown := [name for name in add if name not in _names(groups)]:
        raise ValueError(f"add names group {unknown[0]!r}, which is not among {_names(groups)}")
    check_same_network(groups, model)
    growth = [(group, operator.index(add[group.name])) for group in groups if group.name in add]
    shared, tensors = shared_names(model), _tensors(model)
    for group, more in growth:
        _check_group(group, more, shared, tensors)
    return growth


def _names(groups: Sequence[Group]) -> list[str]:
    return [group.name for group in groups]


def _check_types(model: Any, groups: Any, add: Any, seed: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"cannot widen a {type(model).__name__}; pass a torch.nn.Module")
    check_module(model, "widen")
    if not isinstance(groups, Sequence) or not all(isinstance(group, Group) for group in groups):
        raise TypeError(f"groups must be a list of Group, all that find_groups(model) returned; got {groups!r}")
    if not isinstance(add, Mapping):
        raise TypeError(f"add={add!r}: it must give new units by group name, as {{group.name: 8}}")
    for name, value in {"seed": seed, **{f"add[{name!r}]": value for name, value in add.items()}}.items():
        try:
            whole_number(name, value, -(2**63))
        except ValueError:
            raise TypeError(f"{name}={value!r}: it must be a whole number") from None


def _check_group(group: Group, add: int, shared: set[str], tensors: Mapping[str, Tensor]) -> None:
    if add > MOST_UNITS:
        raise ValueError(f"add={add} for group {group.name!r}: no layer is as wide")
    if add < 1:
        raise ValueError(f"add={add} for group {group.name!r}: it must be at least 1; slim takes units out")
    if not any(part.role == "input" for part in group.slices):
        raise ValueError(
            f"no layer reads the units of group {group.name!r}: they are outputs of the model, whose number is not "
            "for widen to change; a transformers model takes num_labels= at from_pretrained"
        )
    if group.counts or not all(group.fills(part) and part.role != "table" for part in group.slices):
        raise ValueError(
            f"group {group.name!r} cannot be widened: its units share a tensor with others, or modules count them; "
            "widen the other groups"
        )
    for part in group.slices:
        if part.tensor in shared:
            raise ValueError(
                f"group {group.name!r} cannot be widened: another layer shares {part.tensor}, and would be widened "
                "with it; untie them first, or widen another group"
            )
        if is_sharded(tensors[part.tensor]):
            raise ValueError(
                f"group {group.name!r} cannot be widened: {part.tensor} is sharded over processes; widen the model "
                "before FSDP wraps it, or load the checkpoint in one process"
            )
