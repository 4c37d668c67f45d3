"""How unsure a few probe models are of each row: COPS' uncertainty and the scores it is compared with.

All functions are pure, take raw logits `(N, M, C)` of N rows, M probes and C classes (or `(N, M)` and `(N, M, 1)` for
heads with one sigmoid logit) and return one number a row. The probes' mean prediction is `p = mean_m softmax(Z_m)`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_effdl.samples.scores.numbers import as_numbers


GAUGES = ("invariant", "drop-first")
# Probes whose logits differ by less than this share of the logits' own spread differ by rounding and by where their
# training stopped, not by sampling. Bootstrapped heads on a few hundred rows are near 0.3.
LEAST_SPREAD = 1e-3
_CHUNK = 2**22


def uncertainty(logits: Tensor, labels: Tensor | None = None, gauge: str = "invariant") -> Tensor:
    """COPS' uncertainty: how far the probes' logits spread in the direction that matters for the loss.

    With `Sigma` the unbiased covariance of the M logit vectors of a row, `s = p - onehot(y)`:

        with labels     u(x, y) = sqrt(s^T Sigma s)                  = std over probes of Z_m . s
        without         u(x)    = sqrt(tr((diag p - p p^T) Sigma))   = rms over probes of the sd of Z_m under p

    The right-hand sides are what is computed: O(N M C), `Sigma` is never built. `sum_y p_y u(x, y)^2 = u(x)^2`.
    Drawing rows in proportion to u and weighting them by one over the probability minimises, to first order, the
    expected excess loss of the model trained on the draw.

    Args:
        logits: `(N, M, C)` raw logits of M >= 2 probes trained on different samples; `(N, M)` or `(N, M, 1)` for a
            single sigmoid logit, which counts as the two classes `[0, z]`. So logits of one model for C classes,
            `(N, C)`, would be read as C probes: stack those of several, `torch.stack([z1, z2, ...], 1)`.
        labels: `(N,)` integer class of each row; None for the form that needs none (active learning).
        gauge: logits mean the same after adding a constant to all classes of a probe. `"invariant"` gives the same
            u then. `"drop-first"` is what the released code computes: it leaves out class 0 as if its logit were
            zero for every probe (and divides by M instead of M - 1 for a single sigmoid logit).

    Returns:
        `(N,)`, in the logits' units, float32 at least. Falls like one over the root of the probes' training rows.

    Raises:
        ValueError: for M = 1, NaN or infinite logits, labels outside the classes, or probes that all agree.

    Example:
        >>> logits = torch.tensor([[[2.0, 0, -1], [1, 0.5, -0.5], [3, -1, 0], [1.5, 0.25, -0.75]]])
        >>> uncertainty(logits, torch.tensor([0])), uncertainty(logits)
        (tensor([0.2954]), tensor([0.5730]))

    Source: Lin et al., "Optimal Sample Selection Through Uncertainty Estimation", arXiv 2309.02476.
    """
    if gauge not in GAUGES:
        raise ValueError(f"gauge={gauge!r}: it must be one of {GAUGES}")
    logits, labels = check_logits(logits, labels)
    if logits.shape[1] < 2:
        raise ValueError(
            "logits are of one probe (M = 1), whose spread is unknown; pass the logits of 2 or more, "
            "better 8, probes trained on different bootstrap samples"
        )
    check_spread(logits)
    found = torch.cat([batch_uncertainty(part, given, gauge) for part, given in _chunks(logits, labels)])
    check_found(found)
    return found


def check_found(found: Tensor, places: Tensor | None = None) -> None:
    """Raise a `ValueError` for uncertainties beyond the largest float, naming the rows by their places, if given."""
    bad = (~found.isfinite()).nonzero().flatten()
    if len(bad):
        first = int(bad[0] if places is None else places[bad[0]])
        raise ValueError(
            f"the uncertainties of {len(bad)} rows are NaN or infinite, the first at row {first}, as their logits are "
            "too large to be squared; divide all logits by one number, as only ratios count"
        )


def batch_uncertainty(logits: Tensor, labels: Tensor | None, gauge: str = "invariant") -> Tensor:
    """`uncertainty` of a batch, in the logits' own precision; not finite where its square is beyond float64."""
    single, dtype = logits.shape[2] == 1, torch.promote_types(logits.dtype, torch.float32)
    logits = two_classes(logits)
    p = mean_probability(logits).double()
    # squares of float32 numbers overflow from 1e19 and vanish below 1e-23
    logits = logits.double()
    if gauge == "invariant":
        logits = logits - logits.mean(2, keepdim=True)
    spread = logits - logits.mean(1, keepdim=True)
    if gauge == "drop-first":
        spread[..., 0] = 0
    degrees = logits.shape[1] - (0 if single and gauge == "drop-first" else 1)
    if labels is None:
        # the variance under p, about the likeliest class first: no cancellation when p is nearly one-hot
        best = p.argmax(1)[:, None, None].expand(-1, logits.shape[1], 1)
        spread = spread - spread.gather(2, best)
        spread = spread - (spread * p[:, None]).sum(2, keepdim=True)
        return ((spread.square() * p[:, None]).sum((1, 2)) / degrees).sqrt().to(dtype)
    residual = p.scatter(1, labels[:, None], 0.0)
    residual.scatter_(1, labels[:, None], -residual.sum(1, keepdim=True))  # p_y - 1 without cancellation
    direction = (spread * residual[:, None]).sum(2)
    return (direction.square().sum(1) / degrees).sqrt().to(dtype)


def mean_probability(logits: Tensor) -> Tensor:
    """`p = mean_m softmax(Z_m)`, `(N, C)`: the mean of the probes' probabilities, not of their logits."""
    return two_classes(_at_least_float32(logits)).softmax(2).mean(1)


def entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Entropy of the mean prediction, `-sum_k p_k log p_k`, in nats, `(N,)`."""
    logits, _ = check_logits(logits)
    return _rowwise(lambda z, _: entropy_of(mean_probability(z)), logits)


def margin(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Largest minus second largest mean probability, `(N,)`; small is uncertain."""
    logits, _ = check_logits(logits)

    def gap(z: Tensor, _: None) -> Tensor:
        top = mean_probability(z).topk(2, 1).values
        return top[:, 0] - top[:, 1]

    return _rowwise(gap, logits)


def least_confidence(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """One minus the largest mean probability, `(N,)`."""
    logits, _ = check_logits(logits)
    return _rowwise(lambda z, _: 1 - mean_probability(z).amax(1), logits)


def bald(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mutual information of label and probe: entropy of the mean minus mean of the entropies, in nats, `(N,)`.

    Source: Houlsby et al., arXiv 1112.5745; Gal et al., arXiv 1703.02910.
    """
    logits, _ = check_logits(logits)

    def information(z: Tensor, _: None) -> Tensor:
        each = two_classes(_at_least_float32(z)).softmax(2)
        return (entropy_of(each.mean(1)) - entropy_of(each).mean(1)).clamp(min=0)

    return _rowwise(information, logits)


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over probes of the error's length, `mean_m ||softmax(Z_m) - onehot(y)||_2`, `(N,)`.

    Source: Paul et al., "Deep Learning on a Data Diet", arXiv 2107.07075, where the mean is over early checkpoints.
    """
    logits, labels = check_logits(logits, _labelled(labels, "el2n"))

    def length(z: Tensor, y: Tensor) -> Tensor:
        each = two_classes(_at_least_float32(z)).softmax(2)
        hot = torch.nn.functional.one_hot(y, each.shape[2]).to(each.dtype)
        return (each - hot[:, None]).norm(dim=2).mean(1)

    return _rowwise(length, logits, labels)


def p_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean probability of the given label, `p_y`, `(N,)`: low where probes disagree with the label."""
    logits, labels = check_logits(logits, _labelled(labels, "p_label"))
    return _rowwise(lambda z, y: mean_probability(z).gather(1, y[:, None])[:, 0], logits, labels)


def check_logits(logits: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Logits as `(N, M, C)` in float32 or wider, and labels as int64 beside them.

    Raises:
        ValueError, TypeError: for other shapes, no rows, NaN or infinite values, or labels outside the classes.
    """
    if not isinstance(logits, Tensor) or logits.is_meta:  # others stay on the device they are on
        logits = as_numbers(logits, "logits")
    if not logits.is_floating_point():
        raise TypeError(f"logits are of type {logits.dtype}; pass raw floating-point logits")
    if logits.ndim not in (2, 3):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; pass (rows, probes, classes), or (rows, probes) "
            "for a single sigmoid logit"
        )
    logits = logits[..., None] if logits.ndim == 2 else logits
    if 0 in logits.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)} (rows, probes, classes): there is nothing to score")
    finite = torch.cat([part.isfinite().all(2).all(1) for part in logits.split(_rows(logits))])
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(
            f"logits of {len(bad)} rows are NaN or infinite, the first at row {bad[0]}; probes that "
            "diverged must be trained again (a lower learning rate, float32)"
        )
    if labels is not None:
        labels = check_labels(labels, max(logits.shape[2], 2), len(logits)).to(logits.device)
    return _at_least_float32(logits), labels


def check_labels(labels: Tensor, classes: int, rows: int) -> Tensor:
    """Labels as an int64 tensor of `rows` entries in `[0, classes)`."""
    labels = labels if isinstance(labels, Tensor) else as_numbers(labels, "labels")
    if labels.is_floating_point() and not (labels == labels.round()).all():
        raise TypeError(f"labels are of type {labels.dtype}; pass one integer class a row")
    if labels.shape != (rows,):
        raise ValueError(f"labels have shape {tuple(labels.shape)} for {rows} rows; pass one integer class a row")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = outside.nonzero().flatten()
        raise ValueError(
            f"{len(row)} labels are outside the {classes} classes 0..{classes - 1} of the logits, the first is "
            f"{labels[row[0]].item()} at row {row[0]}; check the label column, or leave rows without a label out"
        )
    return labels.long()


def check_spread(logits: Tensor) -> None:
    """Raise a `ValueError` if the probes differ by no more than rounding.

    Example:
        >>> check_spread(torch.randn(5, 1, 3).expand(5, 4, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the 4 probes agree on all 5 rows (relative spread 0.0e+00), ...
    """
    parts = [spread_sums(part) for part in logits.split(_rows(logits))]
    between, total = (torch.cat(sums).sum() for sums in zip(*parts, strict=True))
    spread = (between / total.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().item()
    if spread < LEAST_SPREAD:
        raise ValueError(
            f"the {logits.shape[1]} probes agree on all {len(logits)} rows (relative spread {spread:.1e}), so there "
            "is no uncertainty to read off. A convex probe, such as a linear head, ends at the same weights from any "
            "seed: train each probe on a bootstrap sample of the probe set (bootstrap=True)"
        )


def spread_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Squared deviations of each row's logits from the probes' mean, and in all, `(N,)` each, float64."""
    z = two_classes(logits).double()
    z = z - z.mean(2, keepdim=True)
    return (z - z.mean(1, keepdim=True)).square().sum((1, 2)), z.square().sum((1, 2))


def _labelled(labels: Tensor | None, score: str) -> Tensor:
    if labels is None:
        raise ValueError(
            f"{score} needs the label of each row; pass labels=, or use a score that does without, such "
            "as uncertainty(logits) or entropy(logits)"
        )
    return labels


def entropy_of(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def two_classes(logits: Tensor) -> Tensor:
    """A single sigmoid logit z as the logits [0, z] of two classes."""
    logits = logits[..., None] if logits.ndim == 2 else logits
    return logits if logits.shape[2] > 1 else torch.cat([torch.zeros_like(logits), logits], 2)


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK // (logits.shape[1] * logits.shape[2]))


def _chunks(logits: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    rows = _rows(logits)
    parts = logits.split(rows)
    return zip(parts, [None] * len(parts) if labels is None else labels.split(rows), strict=True)


def _rowwise(score, logits: Tensor, labels: Tensor | None = None) -> Tensor:
    return torch.cat([score(part, given) for part, given in _chunks(logits, labels)])
