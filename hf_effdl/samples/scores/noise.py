"""Which given labels the probes doubt, and how many are wrong.

Pure functions of the probes' mean prediction `p` `(N, C)` and the given labels `(N,)`, for rows that no probe was
trained on (or out-of-bag predictions).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_effdl.checks import tensor
from hf_effdl.samples.scores.numbers import as_numbers
from hf_effdl.samples.scores.uncertainty import check_labels


# How many wrong labels make a pool noisy. Clean pools read up to 0.045, the least noisy ones with 9 % from 0.055.
NOISY = 0.05
TEMPERATURES = torch.logspace(-2, 1.585, 25, base=2.0, dtype=torch.float64)  # 0.25 to 3
_FIT_ROWS = 20_000


def agreement(p: Tensor, labels: Tensor) -> Tensor:
    """Mask of the rows whose label is the probes' vote, `argmax_k p_k = y`.

    The filter that needs no model of the noise; it also drops honest rows of classes that the probes are bad at, so
    look at the share kept by class.

    Example:
        >>> agreement(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        tensor([ True, False])
    """
    p, labels = _check(p, labels)
    return p.argmax(1) == labels


def confident_disagreement(p: Tensor, labels: Tensor, share: float = 0.1, least: int = 100) -> float:
    """Share of wrong labels, read off where the probes are surest.

    Among the `share` of rows (at least `least`) with the largest `max_k p_k`: how many have another label. Standard
    error `sqrt(f (1 - f) / rows)`. Reads high when the probes are weak.

    Example:
        >>> confident_disagreement(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]), least=1)
        0.0
    """
    p, labels = _check(p, labels)
    rows = min(len(p), max(least, round(share * len(p))))
    confidence = p.amax(1)
    surest = confidence >= confidence.topk(rows).values[-1]  # with its equals, so that no order of rows matters
    return 1 - agreement(p[surest], labels[surest]).double().mean().item()


@dataclass(frozen=True)
class LabelNoise:
    """A fit of `y ~ (1 - contamination) p^(T) + contamination / C`, with `p^(T)` in proportion to `p^(1/T)`.

    Attributes:
        contamination: share of labels drawn at random.
        temperature: T; takes up over- and underconfident probes.
        classes: C.
    """

    contamination: float
    temperature: float
    classes: int

    @property
    def rate(self) -> float:
        """Share of wrong labels, `contamination (C - 1) / C`."""
        return self.contamination * (self.classes - 1) / self.classes

    @property
    def place(self) -> int:
        """Where the temperature stands in the grid of `label_likelihoods`."""
        return int((TEMPERATURES - self.temperature).abs().argmin())

    def p_clean(self, p: Tensor, labels: Tensor) -> Tensor:
        """Posterior that the label was not drawn at random, `(N,)` float32."""
        temperature = torch.tensor([self.temperature], dtype=torch.float64)
        return self.posterior(_tempered(*_check(p, labels), temperature)[0])

    def posterior(self, likely: Tensor) -> Tensor:
        """`p_clean` from `p^(T)` at the label."""
        good = (1 - self.contamination) * likely.double().clamp(min=1e-300)
        return (good / (good + self.contamination / self.classes)).float()


def fit_label_noise(p: Tensor, labels: Tensor) -> LabelNoise:
    """The maximum-likelihood `LabelNoise` over T in [0.25, 3] and contamination in [0, 0.6].

    Knows random flips best; human confusions look like honest uncertainty to it and are read low. Pools above 20,000
    rows are fitted on 20,000 rows that are spread over all likelihoods.

    Example:
        >>> p = torch.eye(10)[torch.arange(1000) % 10] * 0.89 + 0.01
        >>> labels = torch.arange(1000) % 10
        >>> labels[:200] = (labels[:200] + torch.arange(200) % 9 + 1) % 10
        >>> 0.19 < fit_label_noise(p, labels).rate < 0.21
        True
    """
    p, labels = _check(p, labels)
    rows = _fit_rows(_tempered(p, labels, TEMPERATURES[-1:])[0])
    return fit_likelihoods(label_likelihoods(p[rows], labels[rows]), p.shape[1])


def label_likelihoods(p: Tensor, labels: Tensor) -> Tensor:
    """`p^(T)` at the label for every temperature of the grid, `(N, T)`: all that a fit needs to keep of a row."""
    return _tempered(p, labels, TEMPERATURES).T.float()


def fit_likelihoods(likelihoods: Tensor, classes: int) -> LabelNoise:
    """`fit_label_noise` from `label_likelihoods`."""
    likely = likelihoods[_fit_rows(likelihoods[:, -1])].double().T
    lowest = torch.zeros(len(likely), dtype=torch.float64)
    highest = torch.full_like(lowest, 0.6)
    # the likelihood is concave in the contamination: bisect its slope, for all temperatures at once
    for _ in range(40):
        middle = ((lowest + highest) / 2)[:, None]
        slope = ((1 / classes - likely) / ((1 - middle) * likely + middle / classes)).sum(1)
        lowest, highest = (torch.where(slope > 0, middle[:, 0], lowest), torch.where(slope > 0, highest, middle[:, 0]))
    share = ((lowest + highest) / 2)[:, None]
    best = int(((1 - share) * likely + share / classes).log().sum(1).argmax())
    contamination = share[best, 0].item()
    return LabelNoise(contamination if contamination > 1e-9 else 0.0, TEMPERATURES[best].item(), classes)


def noise_rate(p: Tensor, labels: Tensor) -> float:
    """The larger of `confident_disagreement` and the fitted rate: what the default preset calls noisy above 0.05."""
    return max(confident_disagreement(p, labels), fit_label_noise(p, labels).rate)


def _fit_rows(likely: Tensor) -> Tensor:
    """Which rows are fitted: of many, evenly spread ones in the order of a likelihood, whatever their own order is."""
    order = likely.float().argsort(stable=True)
    if len(order) <= _FIT_ROWS:
        return order
    return order[((torch.arange(_FIT_ROWS) + 0.5) * (len(order) / _FIT_ROWS)).long()]


def _check(p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    p = tensor("p", p) if isinstance(p, Tensor) else as_numbers(p, "p")
    if p.ndim != 2 or len(p) == 0 or not ((p >= 0) & (p <= 1.01)).all():  # 1.01: half precision
        raise ValueError(
            f"p has shape {tuple(p.shape)} or values outside [0, 1]; pass the probes' mean probabilities "
            "(rows, classes), not logits"
        )
    return p, check_labels(labels, p.shape[1], len(p))


def _tempered(p: Tensor, labels: Tensor, temperatures: Tensor) -> Tensor:
    """`p^(T)` at the label, `(T, N)`."""
    logs = p.double().clamp(min=1e-12).log()
    given = logs.gather(1, labels[:, None].long())[:, 0]
    return torch.stack([(given / t - (logs / t).logsumexp(1)).exp() for t in temperatures])
