"""What can be said of an example before the frozen model has seen it: how well its places and label suit a query."""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F


MATCHES = (
    "forward",
    "backward",
    "to object",
    "to background",
    "from object",
    "from background",
    "mutual",
    "worst places",
)
NOWHERE = -1e4  # added to a cosine that is not to count
CELLS = 2**19  # similarities held at once
STATISTICS = ("area", "x", "y", "x spread", "y spread", "border", "compactness", "outline", "chroma", "contrast")


def dense_matches(asked: Tensor, grids: Tensor, shares: Tensor) -> Tensor:
    """How well the cells of a query and of its candidates match, also inside and outside the labelled object.

    With unit features q_i of a query's cells and e_j of a candidate's, S_ij = <q_i, e_j>:

        forward             mean_i max_j S_ij                   backward            mean_j max_i S_ij
        to object           mean_i max_{j in object} S_ij       from object         mean_{j in object} max_i S_ij
        to background       the same outside the object         from background     the same outside the object
        mutual              share of cells i that are the best match of their own best match
        worst places        mean of the smallest tenth of max_j S_ij

    Args:
        asked: `(B, G, d)` unit features of the queries.
        grids: `(B, K, H, d)` unit features of the candidates.
        shares: `(B, K, H)` how white the label is in each cell, in [0, 1]; the object is where it is above one half.

    Returns:
        `(B, K, 8)` in the order of `MATCHES`; 0 where a candidate has no cell of that kind.

    Example:
        >>> grids = torch.eye(4)[None, None]
        >>> dense_matches(grids[:, 0], grids, torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]))[0, 0, :3]
        tensor([1.0000, 1.0000, 0.5000])

    Source: dense matching as in the strategy "dense"; its two sides by the label of the pool are ours.
    """
    return torch.stack([matches_of(*one) for one in zip(asked, grids, shares, strict=True)])


def matches_of(asked: Tensor, cells: Tensor | Sequence[Tensor], shares: Tensor) -> Tensor:
    """`dense_matches` of one query `(G, d)` with candidates `(K, H, d)`, which may lie apart: `(K, 8)`."""
    # on a processor some at a time, those of which its cache holds features and cosines
    here = max(1, CELLS // (len(asked) * shares.shape[1])) if asked.device.type == "cpu" else len(cells)
    found = []
    for start in range(0, len(cells), here):
        some = cells[start : start + here]
        together = some if isinstance(some, Tensor) else torch.stack(list(some))
        found.append(_maxima(products(asked, together), shares[start : start + here]))
    return _described(*(torch.cat(one) for one in zip(*found, strict=True)), shares)


def products(asked: Tensor, grids: Tensor) -> Tensor:
    """`(K, H, G)` inner products of the cells of feature maps `(K, H, d)` with those of a query `(G, d)`."""
    (count, cells, width), side = grids.shape, isqrt(grids.shape[1])
    if asked.device.type != "cpu":  # where a convolution may round to TF32
        return (grids.flatten(0, 1) @ asked.T).unflatten(0, (count, cells))
    # a convolution whose filters are cells of the query: on an AMD EPYC oneDNN, which does convolutions, takes half
    # as long as MKL, which does products (Intel's were not timed). It is not asked for batches under 16 where there
    # is one thread, so that every row of a map is an image
    row = next((size for size in range(side, 3, -1) if cells % size == 0), cells)
    images = grids.reshape(-1, 1, row, width).permute(0, 3, 1, 2)
    return F.conv2d(images, asked[:, :, None, None]).permute(0, 2, 3, 1).reshape(count, cells, len(asked))


def _maxima(similarity: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of cosines `(k, H, G)`, which are spoilt, and labels `(k, H)`.

    The largest of every query cell inside and outside the object, and of every candidate cell; and whether a query
    cell is the best match of its own best match.
    """
    # neither indices nor masks: places of maxima and comparisons take several times as long as maxima
    inside = (shares > 0.5)[:, :, None]
    to_object = (similarity + torch.where(inside, 0.0, NOWHERE)).amax(1)
    to_ground = (similarity + torch.where(inside, NOWHERE, 0.0)).amax(1)
    backward = similarity.amax(2)
    # backward - 2 S is never below -S, nor -S below -forward, and is both for a pair that is the best match both ways
    least = torch.sub(backward[:, :, None], similarity, alpha=2, out=similarity).amin(1)
    return to_object, to_ground, backward, least == -torch.maximum(to_object, to_ground)


def _described(to_object: Tensor, to_ground: Tensor, backward: Tensor, mutual: Tensor, shares: Tensor) -> Tensor:
    forward, inside = torch.maximum(to_object, to_ground), (shares > 0.5).float()
    worst = max(1, forward.shape[1] // 10)
    return torch.stack(
        [
            forward.mean(1),
            backward.mean(1),
            _there(to_object).mean(1),
            _there(to_ground).mean(1),
            _mean(backward, inside),
            _mean(backward, 1 - inside),
            mutual.float().mean(1),
            forward.topk(worst, 1, largest=False).values.mean(1),
        ],
        1,
    )


def _there(values: Tensor) -> Tensor:
    return torch.where(values > NOWHERE / 2, values, 0.0)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)


def label_statistics(labels: Tensor) -> Tensor:
    """Where an example's label is white, how large and round that is, and how coloured.

    `(..., 3, h, w)` in [0, 1] to `(..., 10)`, in the order of `STATISTICS`: mean; centre and squared spread in units
    of half a side; mean along the border; area over four times the spread; length of the outline over the root of the
    area; mean distance from grey; standard deviation.

    Example:
        >>> label_statistics(torch.ones(3, 8, 8))[:3].round(decimals=3)
        tensor([1., 0., 0.])
    """
    white = labels.float().mean(-3)
    mass = white.sum((-2, -1)).clamp(min=1e-6)
    y, x = (torch.linspace(-1, 1, size, device=white.device) for size in white.shape[-2:])
    rows, columns = white.sum(-1), white.sum(-2)
    at_y, at_x = (rows * y).sum(-1) / mass, (columns * x).sum(-1) / mass
    spread_y, spread_x = (rows * y**2).sum(-1) / mass - at_y**2, (columns * x**2).sum(-1) / mass - at_x**2
    area = white.mean((-2, -1))
    border = torch.cat([white[..., 0, :], white[..., -1, :], white[..., 0], white[..., -1]], -1).mean(-1)
    outline = white.diff(dim=-2).abs().sum((-2, -1)) + white.diff(dim=-1).abs().sum((-2, -1))
    compact = area / (4 * (spread_x * spread_y).clamp(min=1e-6).sqrt())
    chroma = (labels.float() - white[..., None, :, :]).abs().mean((-3, -2, -1))
    # the same as std, in a tenth of the time
    contrast = (
        (white - area[..., None, None]).square().sum((-2, -1)) / (white.shape[-2] * white.shape[-1] - 1)
    ).sqrt()
    return torch.stack(
        [area, at_x, at_y, spread_x, spread_y, border, compact, outline / mass.sqrt(), chroma, contrast], -1
    )


def standardised(features: Tensor, known: Tensor, spread: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features as a linear model inside a list wants them: relative to the list, in two units.

    x is centred in its list and divided by the list's own standard deviation; and, beside that, by the one over all
    lists (`spread`, cut to [-6, 6]), so that lists that differ much stay apart from lists that do not.

    Args:
        features: `(B, K, f)`.
        known: `(B, K)` bool: which entries of the lists exist.
        spread: `(f,)` of the lists a model was fitted on; None: of these.

    Returns:
        `(B, K, 2 f)`, zeros where not known, and the spread.
    """
    weight = known[..., None].float()
    count = weight.sum(1, keepdim=True).clamp(min=1)
    features = torch.where(known[..., None], features.float(), 0.0)
    centred = (features - features.sum(1, keepdim=True) / count) * weight
    own = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    if spread is None:
        spread = (centred.square().sum((0, 1)) / weight.sum().clamp(min=1)).sqrt()
    # what does not differ says nothing: rounding must not be blown up
    least = 1e-6 + 1e-5 * features.abs().amax((0, 1))
    by_list = torch.where(own > least, centred / own.clamp(min=1e-12), 0.0)
    by_all = torch.where(spread > 1e-12, centred / spread.clamp(min=1e-12), 0.0).clamp(-6, 6)
    return torch.cat([by_list, by_all], 2), spread


def ridge(features: Tensor, target: Tensor, known: Tensor, penalty: float) -> Tensor:
    """`argmin_w sum (target - features w)^2 + penalty |w|^2` over known entries: `(B, K, f)`, `(B, K)` to `(f,)`."""
    rows, values = features[known].double(), target[known].double()
    gram = rows.T @ rows + penalty * torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    return torch.linalg.solve(gram, rows.T @ values).float()


def ridge_by_class(
    features: Tensor, target: Tensor, known: Tensor, classes: Tensor, count: int, penalty: float, own: float
) -> tuple[Tensor, Tensor]:
    """Weights that all classes share, and of each class how it departs from them; a small class hardly does.

        argmin_(w, d) sum_c sum_(i in c) (target_i - (w + d_c) features_i)^2 + penalty |w|^2 + own sum_c |d_c|^2

    over known entries. With G_c and b_c the sums of squares and products of a class, A_c = own (G_c + own)^-1,

        w = (sum_c A_c G_c + penalty)^-1 sum_c A_c b_c,    d_c = (G_c + own)^-1 (b_c - G_c w):

    the more entries a class has of its own, the less of them counts for w.

    Args:
        features, target, known: as for `ridge`.
        classes: `(B, K)` of the entries, 0 to `count` - 1; -1 for none, which departs from nothing.
        penalty: on what is shared; large `own` is `ridge`.

    Returns:
        w `(f,)` and d `(count, f)`.

    Source: Evgeniou and Pontil, "Regularized multi-task learning", KDD 2004, section 3, with squares for hinges.
    """
    eye = torch.eye(features.shape[2], dtype=torch.float64, device=features.device)

    def sums(one: int) -> tuple[Tensor, Tensor]:
        rows, values = features[known & (classes == one)].double(), target[known & (classes == one)].double()
        return rows.T @ rows, rows.T @ values

    each = [sums(one) for one in range(count)]
    gram, slope = sums(-1)
    for own_gram, own_slope in each:
        gram = gram + own * torch.linalg.solve(own_gram + own * eye, own_gram)
        slope = slope + own * torch.linalg.solve(own_gram + own * eye, own_slope)
    shared = torch.linalg.solve(gram + penalty * eye, slope)
    apart = [torch.linalg.solve(own_gram + own * eye, own_slope - own_gram @ shared) for own_gram, own_slope in each]
    return shared.float(), torch.stack(apart).float()
