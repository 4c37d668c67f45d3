"""What slimming changed, in plain values that are saved with the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_effdl.structure.groups.counting import trace_network
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.record import named, number, whole
from hf_effdl.structure.slim.latency import measure_latency


SIZE = ("before", "after", "ratio")
NUMBERS = {"params": SIZE, "macs": SIZE, "latency_ms": SIZE, "search": ("step", "of")}
NUMBERS |= {"calibration": ("rows", "held_out", "error", "error_without")}


def set_report(small: nn.Module, report: dict[str, Any]) -> None:
    """Put the report where it is saved with the model: into its config, where it has one."""
    target = small.config if isinstance(small, PreTrainedModel) else small
    target.effdl_report = report


def get_report(small: nn.Module) -> dict[str, Any] | None:
    """The report of a slim model, if it has one; raises as `checked_report` does."""
    return checked_report(getattr(small.config if isinstance(small, PreTrainedModel) else small, "effdl_report", None))


def checked_report(report: Any) -> dict[str, Any] | None:
    """A report of a config that may come from anybody, as it is; None stays None.

    Raises:
        ValueError: it is none of `slim`: names the entry.
    """
    if report is None:
        return None
    try:
        for part in named(report, "effdl_report").keys() & NUMBERS.keys():
            for name in NUMBERS[part]:
                number(named(report[part], part).get(name), f"{part}, {name}")
        for name, pair in named(report.get("units", {}), "units").items():
            whole(named(pair, name).get("before"), name, 0), whole(pair.get("after"), name, 0)
    except ValueError as error:
        raise ValueError(f"the effdl_report of a model's config is none of slim: {error}; take it off") from error
    return report


def forget_report(model: nn.Module) -> None:
    """Take a report off a model that has been changed since: it speaks of the model before."""
    for holder in (model, getattr(model, "config", None)):
        if hasattr(holder, "effdl_report"):
            del holder.effdl_report


def count(groups: Sequence[Group], kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters, MACs of one input row, and units of every group, before and after, counted from the shapes."""
    network = groups[0].network
    sizes = {group.name: len(kept[group.name]) if group.name in kept else group.units for group in groups}
    before, after = network.count(), network.count(groups, sizes)
    result = {key: _change(before[key], after[key]) for key in ("params", "macs")}
    return result | {"units": {g.name: {"before": g.units, "after": sizes[g.name]} for g in groups}}


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
    before, after = (trace_network(m, inputs).count() for m in (model, small))
    report: dict[str, Any] = {key: _change(before[key], after[key]) for key in ("params", "macs")}
    if latency:
        report["latency_ms"] = _change(*(round(ms, 4) for ms in measure_latency([model, small], inputs)))
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    report["units"] = {
        group.name: {"before": group.units, "after": group.units_in(shapes)} for group in groups if group.slices
    }
    timed = {"latency_batch": _rows_in(inputs)} if latency else {}
    return report | {"budget": dict(budget), **timed, "device": next(model.parameters()).device.type}


def _change(before: float, after: float) -> dict[str, float]:
    return {"before": before, "after": after, "ratio": round(after / before, 6)}


def _rows_in(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    values = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    return next(len(value) for value in values if isinstance(value, Tensor))
