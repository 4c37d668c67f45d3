"""Which rows to ask about next. Pure."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_effdl.checks import one_of
from hf_effdl.samples.drawing.checks import check_seed
from hf_effdl.samples.drawing.clusters import clusters
from hf_effdl.samples.drawing.hashing import hashed_uniform


STRATEGIES = ("default", "random", "entropy", "margin", "diverse", "badge", "typical")
# the accuracy from which uncertain rows are worth more than typical ones
GOOD = 0.7
NEIGHBOURS, MOST_CLUSTERS, WIDER = 20, 500, 4


def next_rows(
    strategy: str,
    count: int,
    labelled: Tensor,
    features: Tensor | None = None,
    table: Mapping[str, Tensor] | None = None,
    probabilities: Tensor | None = None,
    accuracy: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Positions of `count` rows that have no label yet, ascending.

    ==============  =========================================================================================
    strategy        rows
    ==============  =========================================================================================
    `default`       `typical` until the probes are right on 70 % of rows they did not see, then `diverse`
    `random`        uniform
    `entropy`       the largest entropy of the mean prediction
    `margin`        the smallest margin between the two likeliest classes
    `diverse`       small margins in different places: of the rows with the smallest, clustered, one from each
    `badge`         k-means++ over gradients of the last layer, `(p - onehot(argmax)) x features`
    `typical`       TypiClust: of the largest clusters without a label, the row in the densest place
    ==============  =========================================================================================

    Args:
        strategy: a line of the table.
        count: 1 to all rows without a label.
        labelled: `(N,)` mask of rows with one.
        features: `(N, d)`, for the last three and the default.
        table: score columns of all rows; None: there are no probes yet, and all but `random` are `typical`.
        probabilities: `(N, C)` mean predictions, for `badge`.
        accuracy: of the probes on rows that they did not see, for the default.
        seed: of draws.

    Raises:
        ValueError: for unknown names, a count out of range, or features that are not there.

    Source: BADGE, arXiv 1906.03671; TypiClust, arXiv 2202.02794.
    """
    one_of("strategy", strategy, STRATEGIES)
    left = (~labelled).nonzero().flatten()
    if not 0 < count <= len(left):
        raise ValueError(f"count={count}: {len(left)} rows have no label yet; ask about 1 to that many")
    if strategy == "default":
        strategy = "diverse" if accuracy is not None and accuracy >= GOOD else "typical"
    if table is None and strategy != "random":
        strategy = "typical"
    if strategy in ("diverse", "badge", "typical") and features is None:
        raise ValueError(f"strategy={strategy!r} needs features of the rows; pass embed=, or strategy='margin'")
    chosen = {
        "random": lambda: hashed_uniform(seed, left).topk(count).indices,
        "entropy": lambda: table["entropy"][left].topk(count).indices,
        "margin": lambda: table["margin"][left].topk(count, largest=False).indices,
        "diverse": lambda: diverse(table["margin"][left], features[left], count, seed),
        "badge": lambda: gradients_apart(probabilities[left], features[left], count, seed),
        "typical": lambda: typical(features, labelled, count, seed),
    }[strategy]()
    return left[chosen].sort().values


def diverse(margins: Tensor, features: Tensor, count: int, seed: int) -> Tensor:
    """Of the rows with the smallest margins, `WIDER` times as many as asked for, the smallest of each of `count`
    clusters; the rest where clusters are fewer by margin alone."""
    narrow = margins.topk(min(len(margins), WIDER * count), largest=False).indices
    groups = clusters(features[narrow], min(count, MOST_CLUSTERS), seed)
    first = torch.zeros(len(narrow), dtype=torch.bool)
    for group in groups.unique():
        first[(groups == group).nonzero()[0]] = True  # `narrow` begins with the smallest
    order = torch.cat([narrow[first], narrow[~first]])
    return order[:count]


def gradients_apart(p: Tensor, features: Tensor, count: int, seed: int) -> Tensor:
    """k-means++ over `(p - onehot(argmax p)) x features`, whose distances are made without the product itself."""
    error = p.double() - torch.nn.functional.one_hot(p.argmax(1), p.shape[1])
    x = features.double()
    own = error.square().sum(1) * x.square().sum(1)
    generator = torch.Generator().manual_seed(check_seed(seed) % 2**63)
    chosen = [int(own.argmax())]
    far = torch.full_like(own, torch.inf)
    while True:
        last = chosen[-1]
        apart = own + own[last] - 2 * (error @ error[last]) * (x @ x[last])
        far = torch.minimum(far, apart.clamp(min=0))
        far[chosen] = 0
        if len(chosen) == count:
            return torch.tensor(chosen)
        weights = far if far.sum() > 0 else torch.ones_like(far).index_fill_(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))


def typical(features: Tensor, labelled: Tensor, count: int, seed: int) -> Tensor:
    """Of the largest clusters with the fewest labels, the row whose nearest neighbours are nearest; places among the
    rows without a label."""
    groups = clusters(features, min(int(labelled.sum()) + count, MOST_CLUSTERS, len(features)), seed)
    x, left = normalize(features.double(), dim=1), ~labelled
    numbers = groups.unique().tolist()
    labels = {group: int((labelled & (groups == group)).sum()) for group in numbers}
    order = {group: typical_first(x, (left & (groups == group)).nonzero().flatten()) for group in numbers}
    chosen: list[int] = []
    while len(chosen) < count:
        group = min((g for g in numbers if order[g]), key=lambda g: (labels[g], -len(order[g]), g))
        chosen.append(order[group].pop(0))
        labels[group] += 1
    place = left.long().cumsum(0) - 1
    return place[torch.tensor(chosen)]


def typical_first(x: Tensor, rows: Tensor) -> list[int]:
    """Rows of a cluster, those with the nearest neighbours in it first."""
    if len(rows) < 2:
        return rows.tolist()
    near = x[rows] @ x[rows].T
    near.fill_diagonal_(-torch.inf)
    mean = near.topk(min(NEIGHBOURS, len(rows) - 1), 1).values.mean(1)
    return rows[mean.sort(descending=True, stable=True).indices].tolist()
