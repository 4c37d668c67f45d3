"""Rows with several decisions each: a class for every token, or yes or no for every label.

Each decision is scored as a row with one class is, and a row gets the mean over its decisions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.checks import one_of


TASKS = ("classes", "labels", "tokens")
IGNORED = -100  # the label of tokens that have none
WHAT = {
    "labels": "a list of 0 and 1 a row, one for each label that the probes tell",
    "tokens": f"a list of classes a row, one for each token, with {IGNORED} where a token has none",
}


def task_of(models: Sequence[nn.Module], task: str | None = None) -> str:
    """What the models decide about a row: what `task` says, else what their configs and names say.

    Raises:
        ValueError: for another task, or models that say different things.
    """
    if task is not None:
        return one_of("task", task, TASKS)
    found = sorted({_task(model) for model in models})
    if len(found) > 1:
        raise ValueError(f"the models decide about different things, {found}; pass models of one kind, or task=")
    return found[0]


def _task(model: nn.Module) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(base, "config", None), "problem_type", None) == "multi_label_classification":
        return "labels"
    return "tokens" if "ForTokenClassification" in type(base).__name__ else "classes"


def decision_labels(values: Sequence[Any], column: str, task: str) -> list[list[int]]:
    """The label column of rows with several decisions, as lists of whole numbers.

    Raises:
        ValueError, TypeError: for rows without labels, with numbers that are no labels, or with other things.
    """
    found = []
    for i, value in enumerate(values):
        if not isinstance(value, list | tuple):
            raise TypeError(
                f"column {column!r} holds {value!r} in row {i}, and the probes decide about {task}: it must hold "
                f"{WHAT[task]}. For one class a row pass Probes(models, task='classes')"
            )
        numbers = [int(one) if isinstance(one, int | float) and one == int(one) else None for one in value]
        bad = [one for one, number in zip(value, numbers, strict=True) if not _is_label(number, task)]
        if bad or all(number == IGNORED for number in numbers):
            what = f"{bad[0]!r} among" if bad else "none of"
            raise ValueError(f"column {column!r} has {what} its labels in row {i}; it must hold {WHAT[task]}")
        found.append(numbers)
    return found


def _is_label(number: int | None, task: str) -> bool:
    if number is None:
        return False
    return number in (0, 1) if task == "labels" else number >= 0 or number == IGNORED


def decisions_of(
    logits: Tensor, task: str, inputs: Any, labels: Sequence[Sequence[int]] | None, places: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A batch's decisions one under the other.

    Args:
        logits: `(B, M, L)` of L labels, or `(B, M, T, C)` of T tokens.
        task: `"labels"` or `"tokens"`.
        inputs: what the models were given; of tokens those that `attention_mask` hides do not count.
        labels: of the rows; None: all decisions count, else those of tokens with a label.
        places: `(B,)` numbers of the rows, for errors.

    Returns:
        logits `(D, M, C)` (of labels `(D, M, 1)`), labels `(D,)` or None, and the row of the batch, `(D,)`.

    Raises:
        ValueError: for logits of another shape, or labels that are not as many as decisions.
    """
    rank = {"labels": 3, "tokens": 4}[task]
    if logits.ndim != rank:
        shape = "a logit for each label" if task == "labels" else "logits for each token"
        raise ValueError(
            f"the probes give logits of shape {tuple(logits.shape)} (rows, probes, ...), where {shape} of a row are "
            "expected; set Probes(models, task=)"
        )
    logits = logits[..., None].transpose(1, 2) if task == "labels" else logits.transpose(1, 2)
    there = _shown(inputs if task == "tokens" else None, logits)
    given = None
    if labels is not None:
        given = torch.stack([_placed(row, there[i], int(places[i]), task) for i, row in enumerate(labels)])
        there = given != IGNORED
        _check_classes(given, max(2, logits.shape[3]), places)
    row = torch.arange(len(logits), device=logits.device)[:, None].expand(there.shape)[there]
    return logits[there], None if given is None else given[there], row


def _shown(inputs: Any, logits: Tensor) -> Tensor:
    """`(B, D)` which decisions there are."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or mask.shape != logits.shape[:2]:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return mask.bool().to(logits.device)


def _placed(labels: Sequence[int], there: Tensor, place: int, task: str) -> Tensor:
    """A row's labels where its decisions are; padding of a batch is on either side."""
    given = torch.full(there.shape, IGNORED, dtype=torch.long, device=there.device)
    row = torch.tensor(labels, device=there.device)
    if len(row) == len(given):
        return row
    if len(row) != int(there.sum()):
        more = "; align labels and tokens first, as for training" if task == "tokens" else ""
        raise ValueError(
            f"row {place} has {len(row)} labels, and the probes tell {int(there.sum())} {task} of it{more}"
        )
    given[there] = row
    return given


def _check_classes(given: Tensor, classes: int, places: Tensor) -> None:
    if (given >= classes).any():
        row = int((given >= classes).any(1).nonzero()[0])
        raise ValueError(
            f"row {int(places[row])} has a label {int(given[row].max())}, and the probes tell {classes} classes "
            "apart; check the label column"
        )


def means_by_row(table: Mapping[str, Tensor], row: Tensor, rows: int) -> dict[str, Tensor]:
    """The mean of each column over a row's decisions, `(rows,)` in float64 sums; `predicted` and the like have none.

    Example:
        >>> means_by_row({"u_x": torch.tensor([1.0, 3.0, 5.0])}, torch.tensor([0, 0, 1]), 2)
        {'u_x': tensor([2., 5.])}
    """
    count = row.bincount(minlength=rows)
    return {
        name: (values.new_zeros(rows, dtype=torch.float64).index_add_(0, row, values.double()) / count).to(
            values.dtype
        )
        for name, values in table.items()
        if values.ndim == 1 and values.is_floating_point()
    }
