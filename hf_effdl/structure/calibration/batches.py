"""Calibration rows: most of them to fit on, a fifth held out to judge by."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.groups.inputs import call, each_input, each_tensor, moved


logger = logging.getLogger(__name__)

HELD_OUT = 5  # every fifth row is held out
LABELS = "labels"


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs, as the model takes them.

    Args:
        fit: what Grams and scores are computed on.
        held_out: what the refits are judged by; other rows, unless there is only one.
        rows: how many rows there are to fit and to judge, on this process.
    """

    fit: list[Any]
    held_out: list[Any]
    rows: tuple[int, int]


def split_rows(batches: Any, model: nn.Module) -> Calibration:
    """Every fifth row of some batches held out, on the model's device.

    Args:
        batches: an iterable of what `model` accepts: tensors, tuples or dicts, all with the rows along their first
            axis. A dict's `labels` serve scores that need a loss, and nothing else.
        model: that they are for.

    Raises:
        TypeError: for what is no iterable of batches.
        ValueError: for no batches, or rows that cannot be counted.
    """
    batches = _listed(batches)
    device = next(model.parameters()).device
    fit, held_out, seen = [], [], 0
    for batch in batches:
        batch = each_tensor(lambda tensor: moved(tensor, device), batch)
        rows = count_rows(batch)
        is_held = (torch.arange(seen, seen + rows) % HELD_OUT) == HELD_OUT - 1
        seen += rows
        fit += _some(batch, ~is_held)
        held_out += _some(batch, is_held)
    fit, held_out = _joined(fit), _joined(held_out)
    if not held_out:
        logger.warning("%d calibration rows are too few to hold some out: refits are judged by the same rows", seen)
        held_out = fit
    return Calibration(fit, held_out, (sum(map(count_rows, fit)), sum(map(count_rows, held_out))))


def _joined(parts: list[Any]) -> list[Any]:
    """Parts of one shape put together, up to so many rows as the largest of them has times `HELD_OUT`."""
    limit = HELD_OUT * max(map(count_rows, parts), default=0)
    result: list[Any] = []
    for part in parts:
        if result and count_rows(result[-1]) + count_rows(part) <= limit and _fit_together(result[-1], part):
            part = {name: torch.cat([result[-1][name], value]) for name, value in part.items()}
            result.pop()
        result.append(part)
    return result


def _fit_together(one: Any, other: Any) -> bool:
    """Whether two batches are dicts of tensors with the same entries, all with the rows along their first axis."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping) or one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one]
    if not all(isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim and b.ndim for a, b in pairs):
        return False
    alike = all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in pairs)
    return alike and all(len(a) == count_rows(one) and len(b) == count_rows(other) for a, b in pairs)


def _listed(batches: Any) -> list[Any]:
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"calibration must be a list, DataLoader or other iterable of batches, not {type(batches).__name__}; "
            "wrap a single batch in a list"
        )
    batches = list(batches)
    if not batches:
        raise ValueError("calibration holds no batches; pass at least one")
    for batch in batches:
        if not isinstance(batch, (Tensor, Mapping, tuple, list)):
            raise TypeError(f"a calibration batch must be a tensor, tuple or dict, not {type(batch).__name__}")
    return batches


def count_rows(batch: Any) -> int:
    """Rows of a batch: the length of its first tensor."""
    values = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    rows = next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)
    if not rows:
        raise ValueError("a calibration batch holds no rows: its first tensor must have the rows along its first axis")
    return rows


def _some(batch: Any, chosen: Tensor) -> list[Any]:
    """The chosen rows of a batch, as a list of one batch or none."""
    if not chosen.any():
        return []
    index, rows = chosen.nonzero().flatten(), len(chosen)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index.to(value.device)] if value.ndim and len(value) == rows else value
        return [value[i] for i in index.tolist()] if isinstance(value, list) and len(value) == rows else value

    return [each_input(take, batch)]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is too little to sum up or to compare in; double precision stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_labels(batch: Any) -> Any:
    """What the model sees of a batch: a loss is none of its answers."""
    return {name: value for name, value in batch.items() if name != LABELS} if isinstance(batch, Mapping) else batch


def mask_of(batch: Any) -> Tensor | None:
    """The attention mask of a batch of texts, `(rows, tokens)`: what stands at padding decides nothing."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def answer(model: nn.Module, batch: Any, number: int = 0) -> Any:
    """What a model says to a batch.

    Raises:
        ValueError: where it does not take the batch, with the batch's number and shapes.
    """
    try:
        return call(model, batch)
    except (TypeError, RuntimeError, ValueError, IndexError, KeyError) as error:
        shapes = each_input(lambda v: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__, batch)
        which = f"batch {number}" if number >= 0 else "rows that are held out"  # those are numbered from behind
        raise ValueError(
            f"{type(model).__name__} does not take calibration {which}, {shapes} ({type(error).__name__}: "
            f"{error}); every batch must be what model(batch), model(*batch) or model(**batch) accepts"
        ) from error


def first_rows(rows: Calibration) -> Any:
    """At most two rows without labels, to try things out on."""
    batch = without_labels((rows.fit or rows.held_out)[0])
    chosen = torch.arange(count_rows(batch)) < 2
    return _some(batch, chosen)[0]
