"""Taking units out for good: the same class with smaller dense tensors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_effdl.checks import one_of, whole_number
from hf_effdl.structure.calibration.compensate import SCORES, Wish, compensate, free_wishes
from hf_effdl.structure.groups.group import Group, check_groups, check_module, check_same_network
from hf_effdl.structure.groups.inputs import copy_of
from hf_effdl.structure.groups.surgery import cut, share_config
from hf_effdl.structure.groups.ties import Tie, complete_ties, config_ties, sizes_for_share, stock_config
from hf_effdl.structure.path.budget import one_budget
from hf_effdl.structure.path.path import WIDTHS
from hf_effdl.structure.slim.report import effdl_report, forget_report, set_report


def slim(
    model: nn.Module,
    groups: Sequence[Group],
    keep: float | Mapping[str, Any],
    round_to: int = 1,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    score: str | None = None,
    ridge: float | None = None,
    intercept: bool = False,
    widths: str = "stock",
) -> nn.Module:
    """A physically smaller copy of a model: same class, smaller dense tensors, the removed units gone.

    In eval mode it computes what the model computes with the removed units' rows, biases, norm weights and norm biases
    set to zero (to 1e-5). A transformers model keeps a stock config where its config can say the new sizes; otherwise
    the sizes go to `config.quantization_config` and `from_pretrained` needs `import hf_effdl`.

    With `calibration` the layers that read the removed units are refitted, so that they do without: by least squares
    on their inputs, `W G[:, S] G[S, S]^-1` with `G` the Gram of the inputs and `S` those that stay, with a ridge
    towards the weights as they were, each position weighted by one over the squared size of what the layer says there,
    or, where that joins a residual stream, over its size times the stream's. Group after group, on the model as it is
    by then; behind groups that stay whole, what was lost before is made up for. A fifth of the rows is held out:
    refits are taken, and their ridge is chosen, by how near what the layer says there comes to what it should say, and
    all together by the model's outputs. No labels and no training; the report says what was taken.

    Args:
        model: left as it is.
        groups: from `find_groups(model)`.
        keep: share of every group's units, in (0, 1]: the units of highest `score` stay; or by group name a share (a
            float) or the indices of the kept units, where groups not named keep all.
        round_to: sizes round up to a multiple of this, by norm; never above what the group has.
        example_inputs: a tensor, tuple or dict that the model accepts; with it, what slimming changed is measured and
            stands in `small.config.effdl_report` (`small.effdl_report` for a module without a config).
        calibration: batches that the model accepts (tensors, tuples or dicts; a list, a DataLoader), some hundred rows
            in all; on several processes each passes its share. Its `"calibration"` report stands beside the others.
        score: which units stay, where `keep` is a share. `"magnitude"`: of the largest norm (`Group.norm`), the
            default without calibration. With it also `"activation"`: by how much of what the next layers say comes
            through them, the default; `"obs"`: by what their leaving costs once the others have taken over;
            `"fisher"`: by the first-order change of the loss (batches with `labels`).
        ridge: in units of the mean diagonal of `G[S, S]`; default: for each layer the best of some on held-out rows.
        intercept: refit the biases too.
        widths: `"stock"`: every group keeps the share it is told, so that a stock config can say the sizes. `"free"`:
            groups whose share is told save together what they would have saved (in multiply-accumulates), each as much
            as the model's outputs can best do without; needs `calibration`, and about twice the time. No group loses
            more than twice its share, or nine tenths of its units.

    Returns:
        The smaller model, in the mode of `model`, an ordinary module that trains, saves, exports and slims again.

    Raises:
        ValueError: for groups of another model, an unknown group name, a share outside (0, 1], indices that are
            empty, repeated or out of range, a score that needs `calibration` or labels, or batches that the model does
            not take.

    Example:
        >>> from hf_effdl import find_groups
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> slim(net, find_groups(net, torch.zeros(1, 1, 8, 8)), keep=0.5)[0]
        Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    check_module(model, "slim")
    check_groups(groups, "slim")
    if not groups:
        raise ValueError("slim got no groups; find_groups(model) returns them")
    round_to = whole_number("round_to", round_to, 1)
    if score is not None:
        one_of("score", score, (*SCORES, "path"))  # of a path it is said later what to do
    check_same_network(groups, model)
    ties = config_ties(model, groups)
    units = {group.name: group.units for group in groups}
    if isinstance(keep, Mapping):
        chosen, sizes = _wanted(keep, units, round_to)
    else:
        _, share = one_budget(keep=keep)
        chosen = {}
        sizes = sizes_for_share(complete_ties(ties, units), units, share, round_to)
    wishes = {name: Wish(size, chosen.get(name)) for name, size in sizes.items()}
    settings = {"score": score, "ridge": ridge, "intercept": intercept}
    if one_of("widths", widths, WIDTHS) == "free":
        calibration = _rows_for_free_widths(calibration)
        score = settings["score"] = score or "activation"
        wishes = free_wishes(model, groups, wishes, calibration, round_to=round_to, **settings)
    small, report = take_out(model, groups, wishes, ties, calibration, **settings)
    if example_inputs is not None:
        budget = sizes if isinstance(keep, Mapping) else {"keep": share}
        report = effdl_report(model, small, example_inputs, groups, budget) | report
    if report:
        set_report(small, report)
    return small


def take_out(
    model: nn.Module,
    groups: Sequence[Group],
    wishes: Mapping[str, Wish],
    ties: Sequence[Tie],
    calibration: Iterable[Any] | None,
    score: str | None = None,
    ridge: float | None = None,
    intercept: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a model without the units that a wish leaves out, and the report of its calibration; see `slim`.

    Args:
        model: left as it is.
        groups: of the model.
        wishes: what stays, by group; other groups stay whole.
        ties: of the model.
        calibration, score, ridge, intercept: see `slim`.
    """
    members = [group for group in groups if group.name in wishes]
    if calibration is None:
        _check_no_calibration(score, ridge, intercept)
        kept = {group.name: wishes[group.name].kept(group.norm(model)) for group in members}
        small, report = cut_copy(model, groups, kept), {}
    else:
        done = compensate(
            model, groups, wishes, calibration, score=score or "activation", ridge=ridge, intercept=intercept
        )
        kept = done.kept
        small, report = cut_copy(done.model, groups, kept), {"calibration": done.report}
    forget_report(small)
    if isinstance(model, PreTrainedModel):  # only those are built from their config
        units = {group.name: group.units for group in groups}
        set_config(small, ties, units | {name: len(index) for name, index in kept.items()})
    return small, report


def _rows_for_free_widths(calibration: Iterable[Any] | None) -> Any:
    """Calibration that can be gone through twice; what is no iterable is refused later."""
    if calibration is None:
        raise ValueError(
            'widths="free" asks the model what it can do without, and there is no calibration: pass '
            'calibration=batches, some hundred rows as the model accepts them, or widths="stock"'
        )
    is_many = isinstance(calibration, Iterable) and not isinstance(calibration, (Tensor, Mapping, str, bytes))
    return list(calibration) if is_many else calibration


def _check_no_calibration(score: str | None, ridge: float | None, intercept: bool) -> None:
    if score not in (None, "magnitude") or ridge is not None or intercept:
        raise ValueError(
            f"score={score!r}, ridge={ridge} and intercept={intercept} speak of a calibration, and there is "
            "none: pass calibration=batches, some hundred rows as the model accepts them"
        )


@torch.no_grad()
def cut_copy(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model without the units that are not kept, its tensors in the memory format that the model's have.

    Args:
        model: left as it is; also its config is as it was in the copy.
        groups: the groups that `kept` speaks of.
        kept: ascending indices of the kept units by group name.
    """
    small = cut(copy_of(model), groups, kept)
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for name, old in model.named_parameters():
        if old.ndim in layouts and old.stride() != torch.empty(old.shape, device="meta").stride():
            new = small.get_parameter(name)
            new.data = torch.empty_like(new, memory_format=layouts[old.ndim]).copy_(new)
    return small


def _wanted(
    keep: Mapping[str, Any], units: Mapping[str, int], round_to: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """By group, the units that are certain to stay, where `keep` names any, and how many stay."""
    if unknown := [name for name in keep if name not in units]:
        raise ValueError(f"keep names group {unknown[0]!r}, which is not among {list(units)}")
    chosen, sizes = {}, {}
    for name, value in keep.items():
        if isinstance(value, float | np.floating):
            _, share = one_budget(**{f"keep[{name!r}]": value})
            count = math.ceil(share * units[name] - 1e-9)
        else:
            chosen[name] = _indices(name, value, units)
            count = len(chosen[name])
        sizes[name] = min(units[name], -(-count // round_to) * round_to)
    return chosen, sizes


def _indices(name: str, value: Any, units: Mapping[str, int]) -> Tensor:
    """Kept units of a group as ascending indices; they may come as a mask."""
    if isinstance(value, np.ndarray) and value.dtype in (np.uint16, np.uint32, np.uint64):  # torch can do little there
        value = value.astype(np.int64)
    try:
        index = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"keep[{name!r}]={value!r}: it must be unit indices or a mask; {error}") from error
    if index.dtype == torch.bool and index.shape == (units[name],):
        index = index.nonzero().flatten()
    whole = not (index.is_floating_point() or index.dtype == torch.bool)
    if not (whole and index.ndim == 1 and 0 < len(index) == len(index.unique())):
        raise ValueError(
            f"keep[{name!r}] must hold distinct unit indices, at least one, or a mask of {units[name]} units; "
            f"got {value}" + _hint_at_mask(index, units[name])
        )
    outside = index[(index < 0) | (index >= units[name])]
    if len(outside):
        raise ValueError(
            f"keep[{name!r}] holds unit {int(outside[0])}; the group has {units[name]} units, 0 to {units[name] - 1}"
        )
    return index.long().sort().values


def _hint_at_mask(index: Tensor, units: int) -> str:
    looks_like_one = index.shape == (units,) and bool(((index == 0) | (index == 1)).all())
    return f": 0s and 1s of {index.dtype} are no mask, make them bool" if looks_like_one else ""


def set_config(small: nn.Module, ties: Sequence[Tie], sizes: Mapping[str, int]) -> None:
    """Say the new sizes in the config of a transformers model: in its own numbers, or else as `SlimConfig`.

    Args:
        small: a model whose units were cut or grown, its config still the one it had before.
        ties: of the model before.
        sizes: units that each group has now.
    """
    config = stock_config(small, ties, sizes)
    if config is None:
        from hf_effdl.structure.groups.slim_config import SlimConfig

        config = deepcopy(small.config)
        config.quantization_config = SlimConfig.of(small)
    share_config(small, config)
