"""Training dynamics: how a model's prediction of each training row moves from epoch to epoch, and scores made of it.

`row_dynamics` is what one epoch leaves of a row; `mean_el2n`, `aum`, `forgetting`, `dyn_unc` and `dual` turn such
records into scores, as their papers define them. All functions are pure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_effdl.samples.scores.numbers import as_numbers


def row_dynamics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What is kept of one prediction per row: three numbers, whatever the number of classes.

    With `p = softmax(z)` and y the given label

        p_label = p_y        margin = z_y - max_{c != y} z_c        el2n = ||p - onehot(y)||_2

    The prediction is right where `margin > 0`, so that needs no number of its own.

    Args:
        logits: `(N, C)`, of two classes or more.
        labels: `(N,)` integers in `0 .. C-1`, right or wrong as they come with the data.

    Returns:
        `"p_label"`, `"margin"` and `"el2n"`, each `(N,)` float32.

    Raises:
        ValueError: if these are not logits and labels of a single-label classification.

    Example:
        >>> row_dynamics(torch.tensor([[0.0, 0.0], [2.0, 5.0]]), torch.tensor([0, 0]))["margin"]
        tensor([ 0., -3.])

    Source: margin: Pleiss et al. 2020 (arXiv 2001.10528), section 3; el2n: Paul et al. 2021 (arXiv 2107.07075),
    section 2.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"the model's logits have shape {tuple(logits.shape)}; training dynamics are defined for one label per "
            "row, so they must have shape (rows, classes) with two classes or more"
        )
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; "
            "training dynamics need one class index per row"
        )
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        raise ValueError(
            f"label {int(labels[outside][0])} is none of the {logits.shape[1]} classes that the model predicts, "
            f"0 .. {logits.shape[1] - 1}; leave unlabelled rows out of the training set"
        )
    logits, index = logits.float(), labels.long()[:, None]
    p, given = logits.softmax(1), logits.gather(1, index)
    others = logits.scatter(1, index, float("-inf")).amax(1, keepdim=True)
    return {
        "p_label": p.gather(1, index)[:, 0],
        "margin": (given - others)[:, 0],
        # subtracting the one-hot vector first keeps the digits of a small error, 1 - 2 p_y + sum p^2 would not
        "el2n": p.scatter_add(1, index, torch.full_like(given, -1)).norm(dim=1),
    }


def mean_el2n(el2n: Tensor, epochs: Sequence[int] | None = None) -> Tensor:
    """Mean error norm of a row: `1/|T| sum_{t in T} ||p_t - onehot(y)||_2`. High: hard, or wrongly labelled.

    Args:
        el2n: `(E, N)`, error norm per epoch and row.
        epochs: T, positions along the first axis; default: all. The paper takes one early epoch (10 or 20 of 200) of
            some ten runs and averages over the runs.

    Returns:
        `(N,)` in [0, sqrt 2].

    Example:
        >>> mean_el2n(torch.tensor([[1.0, 0.5], [0.5, 0.5], [0.0, 0.0]]), epochs=[0, 1])
        tensor([0.7500, 0.5000])

    Source: Paul, Ganguli and Dziugaite, "Deep learning on a data diet", arXiv 2107.07075, section 2.
    """
    el2n = _checked("el2n", el2n)
    if epochs is None:
        return el2n.mean(0)
    chosen = list(epochs)
    if not chosen or not all(-len(el2n) <= epoch < len(el2n) for epoch in chosen):
        raise ValueError(f"epochs={chosen} must be one or more positions in the {len(el2n)} epochs recorded")
    return el2n[chosen].mean(0)


def aum(margins: Tensor) -> Tensor:
    """Area under the margin: `1/E sum_t (z_{t,y} - max_{c != y} z_{t,c})`. Low: hard; negative: perhaps mislabelled.

    Args:
        margins: `(E, N)`, margin per epoch and row.

    Returns:
        `(N,)`, of any sign.

    Example:
        >>> aum(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        tensor([ 2., -1.])

    Source: Pleiss, Zhang, Elenberg and Weinberger, "Identifying mislabeled data using the area under the margin
    ranking", arXiv 2001.10528, section 3.
    """
    return _checked("margins", margins).mean(0)


def forgetting(correct: Tensor) -> Tensor:
    """How often a row was right at one record and wrong at the next. High: hard.

    `sum_t [correct_{t-1} and not correct_t]`. A row that was never right was never forgotten either; it counts E, more
    than any other can reach, so that it ranks as the hardest, as in the authors' code.

    Args:
        correct: `(E, N)` bool, or 0 and 1.

    Returns:
        `(N,)` int64: `0 .. E // 2`, or E where never right.

    Example:
        >>> forgetting(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]))
        tensor([1, 2, 4])

    Source: Toneva et al., "An empirical study of example forgetting during deep neural network learning", arXiv
    1812.05159, section 3.
    """
    correct = _checked("correct", correct).bool()
    flips = (correct[:-1] & ~correct[1:]).sum(0)
    return torch.where(correct.any(0), flips, len(correct))


def dyn_unc(p_label: Tensor, window: int = 10) -> Tensor:
    """Dynamic uncertainty: how much the probability of the given label moves. Low: settled, be it right or wrong.

    The unbiased standard deviation within each window of J successive epochs, averaged over all `E - J + 1` windows:

        1/(E-J+1) sum_k sqrt( 1/(J-1) sum_{j<J} (p_{k+j} - mean_k)^2 )

    Args:
        p_label: `(E, N)`, probability of the given label per epoch and row.
        window: J; where there are fewer epochs, all of them are one window.

    Returns:
        `(N,)`, non-negative.

    Raises:
        ValueError: for fewer than two epochs.

    Example:
        >>> dyn_unc(torch.tensor([[0.0, 0.9], [1.0, 0.9], [1.0, 0.9]]), window=2)
        tensor([0.3536, 0.0000])

    Source: He, Yang, Huang and Zhao, "Large-scale dataset pruning with dynamic uncertainty", arXiv 2306.05175, section
    3. Their released code leaves out the last window and multiplies by ten.
    """
    return _windows(p_label, window).std(-1).mean(0)


def dual(p_label: Tensor, window: int = 10) -> Tensor:
    """Difficulty and uncertainty at once: how much the probability of the given label moves, times how small it is.

        1/(E-J+1) sum_k (1 - mean_k) sqrt( 1/(J-1) sum_{j<J} (p_{k+j} - mean_k)^2 )

    Meant for the first epochs of a run, 30 of 200 in the paper: hard rows already stand out there.

    Args:
        p_label: `(E, N)`, probability of the given label per epoch and row.
        window: J; where there are fewer epochs, all of them are one window.

    Returns:
        `(N,)`, non-negative.

    Raises:
        ValueError: for fewer than two epochs.

    Example:
        >>> dual(torch.tensor([[0.0, 0.9], [1.0, 0.9], [1.0, 0.9]]), window=2)
        tensor([0.1768, 0.0000])

    Source: Cho, Shin et al., "Lightweight dataset pruning without full training via example difficulty and prediction
    uncertainty", arXiv 2502.06905. Their released code multiplies by ten.
    """
    windows = _windows(p_label, window)
    return ((1 - windows.mean(-1)) * windows.std(-1)).mean(0)


def _windows(p_label: Tensor, window: int) -> Tensor:
    """All windows of successive epochs, `(E - J + 1, N, J)`."""
    p_label = _checked("p_label", p_label, least=2)
    if window < 2:
        raise ValueError(f"window={window}: a standard deviation needs two epochs or more")
    return p_label.unfold(0, min(window, len(p_label)), 1)


def _checked(name: str, records: Tensor, least: int = 1) -> Tensor:
    records = as_numbers(records, name)
    if records.ndim != 2 or len(records) < least:
        raise ValueError(
            f"{name} of shape {tuple(records.shape)} must have shape (epochs, rows) with {least} epochs or more"
        )
    if records.is_floating_point() and not records.isfinite().all():
        epoch, row = (~records.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{epoch}, {row}] is {records[epoch, row]}: the recorded run had broken down by then, or the row "
            "had no label"
        )
    return records
