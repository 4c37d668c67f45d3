"""Clusters of embeddings, for shares of a draw that keep it varied. Pure."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_effdl.checks import whole_number
from hf_effdl.samples.drawing.checks import check_seed


def clusters(
    embeddings: Tensor, count: int | None = None, seed: int = 0, rounds: int = 25, row_ids: Tensor | None = None
) -> Tensor:
    """k-means of embeddings of unit length, `(N,)` int64.

    Args:
        embeddings: `(N, d)`.
        count: of clusters; default: the root of half the rows, 100 at most.
        seed: of the start, by k-means++.
        rounds: of Lloyd's algorithm, at most.
        row_ids: `(N,)` integers in whose order rows are taken, so that the order they come in makes no difference.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    if row_ids is not None:
        order = row_ids.argsort()
        return clusters(embeddings[order], count, seed, rounds)[order.argsort()]
    rows = len(embeddings)
    count = max(1, min(100, round((rows / 2) ** 0.5))) if count is None else whole_number("clusters", count, 1)
    if count > rows:
        raise ValueError(f"clusters={count} of {rows} rows; set fewer")
    x = normalize(embeddings.double(), dim=1)
    generator = torch.Generator().manual_seed(check_seed(seed) % 2**63)
    centres = x[spread_out(x, count, generator)]
    nearest = (x @ centres.T).argmax(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        full = sums.norm(dim=1) > 0
        centres[full] = normalize(sums[full], dim=1)
        moved = (x @ centres.T).argmax(1)
        if moved.equal(nearest):
            break
        nearest = moved
    return nearest


def spread_out(x: Tensor, count: int, generator: torch.Generator, chosen: Tensor | None = None) -> Tensor:
    """Positions of `count` rows, `(count,)`, each drawn in proportion to the squared distance to those before it.

    Args:
        x: `(N, d)`.
        count: at most N; where all that is left has distance 0, any of it.
        generator: of the draw.
        chosen: positions that count as drawn before; None: the first is drawn uniformly.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    taken = [] if chosen is None else chosen.tolist()
    new: list[int] = []
    if not taken:
        new.append(int(torch.randint(len(x), (1,), generator=generator)))
    far = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for i in (*taken, *new):
        far = torch.minimum(far, (x - x[i]).square().sum(1))
    left = torch.ones(len(x), dtype=x.dtype)
    left[[*taken, *new]] = 0
    while len(new) < count:
        weights = far * left
        if weights.sum() <= 0:
            weights = left
        i = int(torch.multinomial(weights, 1, generator=generator))
        new.append(i)
        left[i] = 0
        far = torch.minimum(far, (x - x[i]).square().sum(1))
    return torch.tensor(new[:count])
