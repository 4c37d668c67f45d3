"""Weights of the selected rows in the loss."""

from collections.abc import Container

import torch
from torch import Tensor

from hf_effdl.samples.drawing.checks import ROUNDED_ONE, check_choice
from hf_effdl.samples.scores.numbers import as_numbers


WEIGHTS = ("p_label", "damped", "exact", "none")
# Scores that see the label: drawing by them without weights moves the model towards rows whose label is odd.
LABEL_DEPENDENT = ("u_y", "el2n", "aum", "forgetting", "dyn_unc", "dual", "p_label", "p_clean")


def loss_weights(
    kind: str,
    *,
    probabilities: Tensor | None = None,
    uncertainty: Tensor | None = None,
    p_label: Tensor | None = None,
    beta: float = 0.1,
    floor: float = 1e-3,
    normalise: bool = True,
) -> Tensor:
    """Weights of the selected rows in the loss, with mean 1.

    Args:
        kind: `"exact"`: `1 / pi`, unbiased and wild. `"damped"`: `1 / max(beta, u)`, the released code's.
            `"p_label"`: `p_y + floor`, the mean probability of the given label: wrong labels fall silent.
            `"none"`: 1.
        probabilities, uncertainty, p_label: `(r,)`, what the kind needs.
        beta: uncertainty, in logits, below which damped weights are equal.
        floor: keeps a set of doubted rows from losing its weight altogether.
        normalise: divide by the mean; False for one part of a selection that comes in parts.

    Returns:
        `(r,)` float64, with mean 1 unless `normalise=False`.

    Example:
        >>> loss_weights("damped", uncertainty=torch.tensor([0.01, 0.3]))
        tensor([1.5000, 0.5000], dtype=torch.float64)
    """
    check_choice("weights", kind, WEIGHTS)
    needed = {"exact": "probabilities", "damped": "uncertainty", "p_label": "p_label", "none": None}[kind]
    given = {"probabilities": probabilities, "uncertainty": uncertainty, "p_label": p_label}
    if needed is None:
        values = next((value for value in given.values() if value is not None), None)
        if values is None:
            raise ValueError("weights='none' needs one of probabilities=, uncertainty= or p_label= for the row count")
        return torch.ones(len(values), dtype=torch.float64)
    if (values := given[needed]) is None:
        raise ValueError(f"weights={kind!r} needs {needed}=; score the rows with labels, or choose other weights")
    values = as_numbers(values, needed).double()
    if values.ndim != 1:
        raise ValueError(f"{needed} has shape {tuple(values.shape)}; pass one number a row")
    if kind == "exact" and (values > ROUNDED_ONE).any():
        raise ValueError(f"{needed} holds {values.max().item()}; inclusion probabilities are at most 1")
    raw = {"exact": lambda v: 1 / v, "damped": lambda v: 1 / v.clamp(min=beta), "p_label": lambda v: v + floor}
    weights = raw[kind](values)
    if not (weights.isfinite() & (weights >= 0)).all() or not weights.sum() > 0:
        raise ValueError(
            f"weights={kind!r} come out infinite, NaN, negative or all zero; check {needed}=, and that "
            f"beta={beta} and floor={floor} are above zero"
        )
    if not normalise:
        return weights
    mean = weights.mean()
    # a sum of weights may be larger than the largest float
    return weights / mean if mean.isfinite() else (weights / weights.max()) / (weights / weights.max()).mean()


def kish_size(weights: Tensor) -> float:
    """Kish's effective sample size, `(sum w)^2 / sum w^2`: rows of equal weight that would vary as little.

    Example:
        >>> kish_size(torch.tensor([1.0, 1.0, 0.0]))
        2.0
    """
    weights = as_numbers(weights, "weights").double()
    if weights.ndim != 1 or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} must be one number a row, finite, not negative and not all zero"
        )
    largest = weights.max()
    if largest > 1e150:  # its square is infinite
        weights = weights / largest
    return (weights.sum().square() / weights.square().sum()).item()


def weight_column(weights: str, score: str, columns: Container[str]) -> str | None:
    """The score column that a kind of weights is made of; None for those that need none.

    Args:
        weights: kind, see `loss_weights`.
        score: column that was drawn by; damped weights take the uncertainty of its kind.
        columns: those that there are.
    """
    if weights == "damped":
        return "u_y" if score != "u_x" and "u_y" in columns else "u_x"
    return "p_label" if weights == "p_label" else None


def check_bias(score: str, weights: str, force: bool = False) -> None:
    """Raise a `ValueError` for an unweighted draw by a score that depends on the label, unless forced."""
    if score in LABEL_DEPENDENT and weights == "none" and not force:
        raise ValueError(
            f"score={score!r} depends on the label, and weights='none' would train on rows chosen for their odd "
            "labels: the model then does not converge to the pool's, however large the budget. Set weights='damped', "
            "'p_label' or 'exact', or force=True"
        )
