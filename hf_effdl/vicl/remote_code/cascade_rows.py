"""How a query's row of the table of performance would look: learned from the rows of pool images like it."""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from .cascade_lists import own_images, rows_of_table, table_of


WIDTHS = (1.0, 0.3)
NEIGHBOURS, TEMPERATURE = (5, 15, 40), 0.05
# how a query's cells match those of the candidates, and how soft the weights are that follow from it
MATCHED, SOFTNESS = ("forward", "mutual"), (0.25, 0.5, 1.0)
# images' worth of zero that transfer is drawn to where an example was not measured on all of them
PRIOR = 0.1
# pool rows whose distances give the unit of the kernels' widths
SAMPLE = 1000


class RowModel:
    """Predicts how each example will do on a query, relative to the others, from what was measured on pool images.

    R[j, c] is the performance of example c on pool image j less the mean of what was measured on j; images are alike
    by two views, the retrieval vector and the four quarters of the feature map, k(a, b) = exp(-d^2 / (gamma median
    d^2)), gamma 1 and 0.3. Where every other example was measured on each labelled image, by kernel ridge:

        r(q, c) = sum_j w_j R[j, c] + (1 - sum_j w_j) mu_c,    w = k(q, P) A,    A = (k(P, P) + I)^-1,

    sums over the j that c was measured on, mu_c the mean over them; and where only some were measured,
    sum_j k(q, j) R[j, c] / (sum_j k(q, j) + 1). Beside these four, transfer from the 5, 15 and 40 nearest labelled
    images, weights softmax(cos / 0.05), and mu ("quality"). What was measured on a labelled image itself, and on the
    others S of its group, is left out of its own predictions, of mu too: for kernel ridge w = u - u_S A_SS^-1 A_S,
    u = k A with k = 0 in S, is what the other images alone would give.

    `among` transfers from the candidates themselves, which have been matched cell by cell with the query.

    Args:
        vectors: `(n, d)` unit vectors of the pool.
        quarters: `(n, 4 d)` unit vectors of the pool's quarters.
        measured: `(n, K)` rows of the pool, -1 where not measured.
        performance: `(n, K)` of those, larger is better.
        groups: `(n,)` of the pool's rows, see `group_numbers`; default: every row is one of its own.
    """

    names = (
        "vector 1",
        "vector 0.3",
        "quarters 1",
        "quarters 0.3",
        "5 nearest",
        "15 nearest",
        "40 nearest",
        "quality",
    )
    among_names = tuple(f"{name} {softness}" for name in MATCHED for softness in SOFTNESS)

    def __init__(
        self, vectors: Tensor, quarters: Tensor, measured: Tensor, performance: Tensor, groups: Tensor | None = None
    ) -> None:
        n = len(vectors)
        self.groups = torch.arange(n) if groups is None else groups
        self.labelled = (measured >= 0).any(1).nonzero()[:, 0]
        examples, performance = measured[self.labelled].long(), performance[self.labelled].float()
        measured_mask = examples >= 0
        mean = (performance * measured_mask).sum(1) / measured_mask.sum(1)
        residual = torch.where(measured_mask, performance - mean[:, None], 0.0)
        self.position = torch.full((n,), -1)
        self.position[self.labelled] = torch.arange(len(self.labelled))
        self.views = vectors[self.labelled], quarters[self.labelled]
        self.units = [_unit(view) for view in (vectors, quarters)]
        self.complete = bool((measured_mask.sum(1) == n - 1).all())
        if self.complete:
            # 0 where an image is not measured on itself
            column = torch.where(measured_mask, examples, n)
            table = torch.zeros(len(examples), n + 1).scatter_(1, column, residual)
            self.table, self.total = table[:, :n], table[:, :n].sum(0)
            self.inverses = self._inverses()
        else:
            # sums of R and counts over the images that an example was measured on
            image = torch.arange(len(examples))[:, None].expand_as(examples)
            place = torch.stack([examples[measured_mask], image[measured_mask]])
            self.residual, self.count = (
                table_of(place, values, (n, len(examples)))
                for values in (residual[measured_mask], measured_mask[measured_mask].float())
            )

    def without(self, rows: Tensor) -> "RowModel":
        """The same as if nothing had been measured on these rows of the pool."""
        kept = (~torch.isin(self.labelled, rows)).nonzero()[:, 0]
        other = copy.copy(self)
        other.labelled = self.labelled[kept]
        other.position = torch.full_like(self.position, -1)
        other.position[other.labelled] = torch.arange(len(kept))
        other.views = tuple(view[kept] for view in self.views)
        if self.complete:
            other.table, other.total = self.table[kept], self.table[kept].sum(0)
            other.inverses = other._inverses()
        else:
            other.residual, other.count = (part.index_select(1, kept) for part in (self.residual, self.count))
        return other

    def _inverses(self) -> list[Tensor]:
        return [
            torch.linalg.inv(_kernel(view @ view.T, width * unit).double() + torch.eye(len(view)).double()).float()
            for view, unit in zip(self.views, self.units, strict=True)
            for width in WIDTHS
        ]

    def predict(self, vectors: Tensor, quarters: Tensor, rows: Tensor, own: Tensor | None = None) -> Tensor:
        """Predictions for the candidates of each query.

        Args:
            vectors, quarters: `(B, d)` and `(B, 4 d)` of the queries.
            rows: `(B, K)` candidates; -1 gives 0.
            own: `(B,)` rows of the pool that the queries themselves are, -1 for none.

        Returns:
            `(B, K, 8)` in the order of `names`.
        """
        own = torch.full((len(vectors),), -1) if own is None else own
        out = own_images(self.groups, own, self.labelled)
        cosines = [queries @ view.T for queries, view in zip((vectors, quarters), self.views, strict=True)]
        kernels = [
            _kernel(cosine, width * unit) for cosine, unit in zip(cosines, self.units, strict=True) for width in WIDTHS
        ]
        neighbours = _nearest(cosines[0].masked_fill(out, -torch.inf))
        predict = self._of_complete if self.complete else self._of_sparse
        every = predict(kernels, neighbours, out)
        predictions = every.gather(2, rows.clamp(min=0).expand(len(self.names), -1, -1))
        return torch.stack(list(predictions), 2) * (rows >= 0)[..., None]

    def _of_complete(self, kernels: list[Tensor], neighbours: list[Tensor], out: Tensor) -> Tensor:
        """`(8, B, n)` for every example of the pool, where each was measured on all labelled images.

        Args:
            kernels, neighbours: `(B, L)` how alike queries and labelled images are; the latter as weights.
            out: `(B, L)` bool, images that do not count.
        """
        weights = [_without_block(kernel, A, out) for kernel, A in zip(kernels, self.inverses, strict=True)]
        weights = torch.stack([*weights, *neighbours]).masked_fill(out, 0)
        mean = self._mean(out)
        # the weight of an image that an example was not measured on, its own, goes to the mean
        missing = weights[:, :, self.position.clamp(min=0)] * (self.position >= 0)
        transferred = weights @ self.table + (1 - weights.sum(2, keepdim=True) + missing) * mean
        return torch.cat([transferred, mean[None]])

    def _of_sparse(self, kernels: list[Tensor], neighbours: list[Tensor], out: Tensor) -> Tensor:
        """The same where each was measured on some."""
        weights = [*kernels, *neighbours, torch.ones_like(kernels[0])]
        weights = torch.cat([part.masked_fill(out, 0) for part in weights])
        shape = (len(self.names), len(out))
        sums, counts = ((part @ weights.T).T.unflatten(0, shape) for part in (self.residual, self.count))
        # how many images' worth of zero everything is drawn to; softmax weights sum to one
        prior = torch.tensor([1.0] * 4 + [PRIOR] * 3 + [1.0])[:, None, None]
        return sums / (counts + prior)

    def among(self, alike: Tensor, rows: Tensor, own: Tensor | None = None) -> Tensor:
        """What the candidates of each query did on those other candidates that the query is most like.

            r(q, c) = sum_j v_j R[j, c] / (sum_j v_j + 0.1),    v = softmax(a(q, j) / T),

        over the candidates j that were labelled, sums over those of them that c was measured on.

        Args:
            alike: `(B, K, 2)` how well each candidate's cells match the query's, in the order of `MATCHED`,
                relative to the list (see `standardised`).
            rows, own: as for `predict`.

        Returns:
            `(B, K, 6)` in the order of `among_names`: both of `alike`, each with T = 0.25, 0.5 and 1.
        """
        place = torch.where(rows >= 0, self.position[rows.clamp(min=0)], -1)
        labelled = place >= 0
        if own is not None:
            own = torch.as_tensor(own).cpu()[:, None]
            labelled &= (own < 0) | (self.groups[rows.clamp(min=0)] != self.groups[own.clamp(min=0)])
        place, candidates = place.clamp(min=0)[:, None], rows.clamp(min=0)
        if self.complete:
            performance = self.table[place, candidates[:, :, None]]
            measured_mask = candidates[:, :, None] != candidates[:, None]
        else:
            performance, measured_mask = (
                rows_of_table(part, candidates).gather(2, place.expand(-1, candidates.shape[1], -1))
                for part in (self.residual, self.count)
            )
        weights = torch.stack([part / softness for part in alike.unbind(2) for softness in SOFTNESS], 2)
        weights = weights.masked_fill(~labelled[..., None], -torch.inf).softmax(1).nan_to_num(0)
        measured_mask = measured_mask.float()
        transferred = (performance * measured_mask) @ weights / (measured_mask @ weights + PRIOR)
        return transferred * (rows >= 0)[..., None]

    def _mean(self, out: Tensor) -> Tensor:
        """`(B, n)` mean of every example over the images that it was measured on, all but those that are `out`."""
        kept = (~out).float()
        itself = kept[:, self.position.clamp(min=0)] * (self.position >= 0)  # an example is not measured on itself
        return (self.total - out.float() @ self.table) / (kept.sum(1, keepdim=True) - itself).clamp(min=1)


def quarters_of(tokens: Tensor) -> Tensor:
    """Unit vectors `(N, 4 d)` of the four quarters in `tokens (N, 5, d)`."""
    return F.normalize(tokens[:, 1:].float().flatten(1), dim=1)


def _unit(view: Tensor) -> Tensor:
    """Median squared distance between pool images."""
    view = view[:: max(1, len(view) // SAMPLE)]
    apart = 2 - 2 * view @ view.T
    return apart[~torch.eye(len(view), dtype=torch.bool)].median().clamp(min=1e-6)


def _kernel(cosine: Tensor, scale: Tensor) -> Tensor:
    return torch.exp(-(2 - 2 * cosine).clamp(min=0) / scale)


def _without_block(kernel: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Weights `(B, L)` of kernel ridge as if the images `out` were not there, from the inverse with them all."""
    weights = kernel.masked_fill(out, 0) @ inverse
    for query in out.any(1).nonzero()[:, 0].tolist():
        block = inverse[out[query]]
        weights[query] -= torch.linalg.solve(block[:, out[query]], weights[query, out[query]]) @ block
    return weights


def _nearest(cosine: Tensor) -> list[Tensor]:
    """Weights `(B, L)` of the most similar images, which sum to one, for each number of `NEIGHBOURS`."""
    top, at = cosine.topk(min(max(NEIGHBOURS), cosine.shape[1]), 1)
    heads = [(top[:, :count] / TEMPERATURE).softmax(1).nan_to_num(0) for count in NEIGHBOURS]
    return [torch.zeros_like(cosine).scatter_(1, at[:, : head.shape[1]], head) for head in heads]
