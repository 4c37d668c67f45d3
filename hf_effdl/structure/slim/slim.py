"""Taking units out for good: the same class with smaller dense tensors, and what that bought."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_effdl.structure.groups.find import call, trace_network
from hf_effdl.structure.groups.group import Group, check_same_network, cut
from hf_effdl.structure.groups.ties import config_ties, stock_config
from hf_effdl.structure.path.path import complete_ties, one_budget, sizes_for_share


def slim(
    model: nn.Module,
    groups: Sequence[Group],
    keep: float | Mapping[str, Any],
    round_to: int = 1,
    example_inputs: Any = None,
) -> nn.Module:
    """A physically smaller copy of a model: same class, smaller dense tensors, the removed units gone.

    In eval mode it computes what the model computes with the removed units' rows, biases, norm weights and norm biases
    set to zero (to 1e-5). A transformers model keeps a stock config where its config can say the new sizes; otherwise
    the sizes go to `config.quantization_config` and `from_pretrained` needs `import hf_effdl`.

    Args:
        model: left as it is.
        groups: from `find_groups(model)`.
        keep: share of every group's units, in (0, 1]: the units of largest norm stay (`Group.norm`); or the indices of
            the kept units by group name, where groups not named keep all.
        round_to: sizes round up to a multiple of this, by norm; never above what the group has.
        example_inputs: a tensor, tuple or dict that the model accepts; with it, what slimming changed is measured and
            stands in `small.config.effdl_report` (`small.effdl_report` for a module without a config).

    Returns:
        The smaller model, in the mode of `model`, an ordinary module that trains, saves, exports and slims again.

    Raises:
        ValueError: for groups of another model, an unknown group name, a share outside (0, 1], or indices that are
            empty, repeated or out of range.

    Example:
        >>> from hf_effdl import find_groups
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> slim(net, find_groups(net, torch.zeros(1, 1, 8, 8)), keep=0.5)[0]
        Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    if not groups:
        raise ValueError("slim got no groups; find_groups(model) returns them")
    if round_to < 1:
        raise ValueError(f"round_to={round_to}: it must be at least 1")
    check_same_network(groups, model)
    ties = config_ties(model, groups)
    units = {group.name: group.units for group in groups}
    if isinstance(keep, Mapping):
        chosen = {name: _indices(name, value, units) for name, value in keep.items()}
        sizes = {name: min(units[name], -(-len(index) // round_to) * round_to) for name, index in chosen.items()}
    else:
        _, share = one_budget(keep=keep)
        chosen = {}
        sizes = sizes_for_share(complete_ties(ties, units), units, share, round_to)
    kept = {
        group.name: _fill(group, model, chosen.get(group.name), sizes[group.name])
        for group in groups
        if group.name in sizes
    }
    small = cut_copy(model, groups, kept)
    if isinstance(model, PreTrainedModel):  # only those are built from their config
        set_config(small, ties, {name: len(kept.get(name, range(size))) for name, size in units.items()})
    if example_inputs is not None:
        asked = {name: len(index) for name, index in kept.items()} if isinstance(keep, Mapping) else {"keep": keep}
        set_report(small, effdl_report(model, small, example_inputs, groups, asked))
    return small


@torch.no_grad()
def cut_copy(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model without the units that are not kept, its tensors in the memory format that the model's have.

    Args:
        model: left as it is; also its config is as it was in the copy.
        groups: the groups that `kept` speaks of.
        kept: ascending indices of the kept units by group name.
    """
    small = cut(deepcopy(model), groups, kept)
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for name, old in model.named_parameters():
        if old.ndim in layouts and old.stride() != torch.empty(old.shape, device="meta").stride():
            new = small.get_parameter(name)
            new.data = torch.empty_like(new, memory_format=layouts[old.ndim]).copy_(new)
    return small


def _indices(name: str, value: Any, units: Mapping[str, int]) -> Tensor:
    if name not in units:
        raise ValueError(f"keep names group {name!r}, which is not among {list(units)}")
    index = torch.as_tensor(value).detach().cpu()
    if index.dtype == torch.bool and index.shape == (units[name],):
        index = index.nonzero().flatten()
    integer = not (index.is_floating_point() or index.dtype == torch.bool)
    if index.ndim != 1 or not integer or len(index) == 0 or len(index.unique()) != len(index):
        raise ValueError(
            f"keep[{name!r}] must hold distinct unit indices, at least one, or a mask of {units[name]} units; "
            f"got {value}"
        )
    if index.min() < 0 or index.max() >= units[name]:
        raise ValueError(f"keep[{name!r}] has index {int(index.max())} or below 0; the group has {units[name]} units")
    return index.long().sort().values


def _fill(group: Group, model: nn.Module, chosen: Tensor | None, size: int) -> Tensor:
    """The chosen units and, up to `size`, the largest of the others."""
    norm = group.norm(model)
    if chosen is not None:
        norm[chosen] = float("inf")
    return norm.topk(size).indices.sort().values


def set_config(small: nn.Module, ties: Sequence[Any], sizes: Mapping[str, int]) -> None:
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
    if hasattr(config, "effdl_report"):  # it speaks of the model before
        del config.effdl_report
    for module in small.modules():  # a transformers model hands one config object to its parts
        if getattr(module, "config", None) is not None and type(module.config) is type(config):
            module.config = config


# ---- batch norm


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Re-estimate the running statistics of every batch norm as plain averages over some batches, in place.

    The statistics of a dense model do not fit the model that is left when units go. Nothing else changes: weights,
    mode and the norms' momentum stay.

    Args:
        model: returned.
        batches: inputs, each a tensor, tuple or dict that the model accepts.

    Raises:
        ValueError: for no batches; the statistics are then as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError(
            "recalibrate_batch_norm got no batches, so there are no statistics to take; pass at least one"
        )
    modes, momenta = [m.training for m in model.modules()], [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain average
        norm.train()
    try:
        for batch in chain([first], batches):
            call(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return model


# ---- what it bought


@torch.no_grad()
def measure_latency(
    models: Sequence[nn.Module], inputs: Any, *, repeats: int = 21, seconds: float = 0.01
) -> list[float]:
    """Milliseconds of one forward pass in eval mode, for models timed in turns so that what disturbs hits all alike.

    The first model's time is its median over the rounds. Every other one's is that, times the median of its ratio to
    the first within a round. On a CPU with one thread the clock is the thread's own, which does not count the time
    that other programs have.

    Args:
        models: compared side by side.
        inputs: a tensor, tuple or dict that every model accepts.
        repeats: rounds; each model runs once a round.
        seconds: passes are repeated within a round until about this long.
    """
    device = next(models[0].parameters()).device
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    # some systems count a thread's time in ticks of many milliseconds
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    clock = time.thread_time if alone and fine else time.perf_counter
    times: list[list[float]] = [[] for _ in models]
    modes = [[m.training for m in model.modules()] for model in models]

    def run(model: nn.Module, passes: int) -> float:
        start = clock()
        for _ in range(passes):
            call(model, inputs)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return max(clock() - start, 1e-9) / passes

    try:
        passes = []
        for model in models:
            model.eval()
            run(model, 1)  # what happens once: memory, kernels, and on an accelerator the work that still waits
            passes.append(max(1, int(seconds / max(min(run(model, 1) for _ in range(2)), 1e-6))))
        for _ in range(repeats):
            for model, count, record in zip(models, passes, times, strict=True):
                record.append(1000 * run(model, count))
    except Exception as error:
        error.add_note("while measuring latency: every model must accept these inputs, on its device")
        raise
    finally:
        for model, mode in zip(models, modes, strict=True):
            for module, training in zip(model.modules(), mode, strict=True):
                module.training = training
    first = statistics.median(times[0])
    ratios = (statistics.median(b / a for a, b in zip(times[0], record, strict=True)) for record in times[1:])
    return [first, *(first * ratio for ratio in ratios)]


def set_report(small: nn.Module, report: dict[str, Any]) -> None:
    """Put the report where it is saved with the model: into its config, where it has one."""
    target = small.config if isinstance(small, PreTrainedModel) else small
    target.effdl_report = report


def get_report(small: nn.Module) -> dict[str, Any] | None:
    """The report of a slim model, if it has one."""
    return getattr(small.config if isinstance(small, PreTrainedModel) else small, "effdl_report", None)


def effdl_report(
    model: nn.Module,
    small: nn.Module,
    inputs: Any,
    groups: Sequence[Group],
    budget: Mapping[str, Any],
    latency: bool = True,
) -> dict[str, Any]:
    """What slimming changed, in plain values: `{"params": {"before", "after", "ratio"}, "macs", "latency_ms", ...}`.

    MACs are counted on a forward pass of each model, not predicted. With `latency=False` nothing is timed, and the
    report has no `"latency_ms"`.
    """
    counts = [trace_network(m, inputs).count() for m in (model, small)]
    pairs = {key: (counts[0][key], counts[1][key]) for key in ("params", "macs")}
    if latency:
        pairs["latency_ms"] = tuple(round(time, 4) for time in measure_latency([model, small], inputs))
    report: dict[str, Any] = {
        key: {"before": before, "after": after, "ratio": round(after / before, 6)}
        for key, (before, after) in pairs.items()
    }
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    report["units"] = {
        group.name: {"before": group.units, "after": shapes[part.tensor][part.axis] // part.block}
        for group in groups
        for part in group.slices[:1]
    }
    device = next(model.parameters()).device
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    )
    rows = next(len(value) for value in values if isinstance(value, Tensor))
    timed = {"latency_batch": rows} if latency else {}
    return report | {"budget": dict(budget), **timed, "device": device.type}
