"""Trained rankers among the strategies of `vicl_pets.py`: images alone tell them which example to show.

A `ListwiseRanker` for lists of 5 and one for lists of 10 learn from the performance that examples of a pool have on
each other. At selection they see features of the query and of its candidates: no label, no mask, and the frozen model
runs once, with the example that was chosen. `ranker_orders` has four arms:

- list-wise ranker, aggregated: the tokens of each image, reduced to 64 numbers by the principal axes of the pool's
  tokens; the lists of a covering design of either length, made into one ranking (`covering_lists`, `score_lists`,
  `aggregate_rankings`: what `RankerSelector` does with tokens of a pool that are not reduced);
- list-wise ranker, knock-out: the ranker for lists of 10 alone, in a tournament;
- released ranker, aggregated: the released network of Partial2Global (`legacy=True`, three blocks) on the same tokens,
  trained with our steps, since its own take many times as long;
- list-wise ranker + similarities, aggregated: with each candidate's first token come the similarities of its image to
  the query's, see `similarities`, as they are and less their mean over the query's candidates.

Everything that is fitted is fitted on the pool. A training query is not among its own candidates.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PrinterCallback, TrainingArguments

from hf_effdl.vicl.ranking.ranker_trainer import RankerTrainer
from hf_effdl.vicl.ranking.ranking_lists import RankingLists
from hf_effdl.vicl.remote_code.configuration_listwise_ranker import ListwiseRankerConfig
from hf_effdl.vicl.remote_code.modeling_listwise_ranker import ListwiseRanker
from hf_effdl.vicl.remote_code.ranker_aggregation import aggregate_rankings
from hf_effdl.vicl.remote_code.ranker_designs import covering_lists, knock_out


RANKER_ARMS = (
    "list-wise ranker, aggregated",
    "list-wise ranker, knock-out",
    "released ranker, aggregated",
    "list-wise ranker + similarities, aggregated",
)
LENGTHS = (5, 10)
WIDTH, HEADS, LAYERS = 64, 4, 2
STEPS, ITEMS, RATE, DECAY = 300, 320, 1e-3, 0.1  # items: candidates of all lists of a step
SIDES = 2, 4  # to which grids are pooled before they are compared
FAR = 5.0  # standard deviations at which a similarity ends


class TokenPool:
    """The part of a pool that `RankingLists` and `RankerTrainer` read.

    Args:
        tokens: `(n, T, d)`.
        extra: what lists put behind each token.
    """

    fingerprint = groups = None

    def __init__(self, tokens: Tensor, extra: int = 0) -> None:
        self.held, self.dim, self.ids = tokens, tokens.shape[2] + extra, range(len(tokens))
        self.encoder = {"fingerprint": None, "id": None}

    def __len__(self) -> int:
        return len(self.held)

    def tokens(self, rows: Tensor) -> Tensor:
        return self.held[rows]


class ListsWithSimilarities(RankingLists):
    """`RankingLists` whose candidates' first tokens end in what is known of the pair of query and candidate.

    Args:
        pool, candidates, performance, options: of `RankingLists`.
        pairs: `(n, K, s)` for the candidates.
    """

    def __init__(
        self, pool: TokenPool, candidates: Tensor, performance: Tensor, pairs: Tensor, **options: int | bool
    ) -> None:
        super().__init__(pool, candidates, performance, **options)
        places = torch.zeros(len(pool), len(pool), dtype=torch.long)
        places.scatter_(1, candidates, torch.arange(candidates.shape[1]).expand_as(candidates))
        self.pairs = pairs[self.queries[:, None], places[self.queries[:, None], self.lists]]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        rows = super().__getitems__(indices)
        for index, row in zip(indices, rows, strict=True):
            row["query_tokens"], row["candidate_tokens"] = _joined(
                row["query_tokens"], row["candidate_tokens"], self.pairs[index]
            )
        return rows


@dataclass
class Rankers:
    """Rankers by list length, with the view of images that they were trained on; made by `train_rankers`."""

    nets: dict[int, ListwiseRanker]
    mean: Tensor  # (d,)
    axes: Tensor  # (d, WIDTH)
    spread: Tensor | None = None  # (3, s): mean and standard deviation of similarities, and the latter inside lists

    def see(self, tokens: Tensor) -> Tensor:
        """`(..., d)` to `(..., WIDTH)`."""
        return (tokens - self.mean) @ self.axes

    def compare(self, similarities: Tensor) -> Tensor:
        """`(Q, K, s)` to `(Q, K, 2 s)`: each standardised, then less its list's mean and standardised."""
        mean, std, inside = self.spread
        centred = similarities - similarities.mean(1, keepdim=True)
        return torch.cat([(similarities - mean) / std, centred / inside], 2).clamp(-FAR, FAR)


def train_rankers(
    tokens: Tensor,
    candidates: Tensor,
    performance: Tensor,
    similarities: Tensor | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    legacy: bool = False,
    steps: int = STEPS,
    seed: int = 0,
) -> Rankers:
    """One ranker for each list length, trained on lists drawn from a pool's measured performance.

    Args:
        tokens: `(n, T, d)` of the pool's images.
        candidates: `(n, K)` rows of the pool that were measured on each of its images, not the image itself.
        performance: `(n, K)`, larger is better.
        similarities: `(n, K, s)` of each image to its candidates; default: tokens alone.
        lengths: of lists.
        legacy: the released network.
        steps: of training.
        seed: of weights, lists and their order.
    """
    mean, axes = _principal_axes(tokens.flatten(0, 1), WIDTH)
    spread = None
    if similarities is not None:
        centred = similarities - similarities.mean(1, keepdim=True)
        spread = torch.stack([similarities.mean((0, 1)), similarities.std((0, 1)), centred.std((0, 1))])
    rankers = Rankers({}, mean, axes, spread)
    pairs = None if similarities is None else rankers.compare(similarities)
    pool = TokenPool(rankers.see(tokens), 0 if pairs is None else pairs.shape[2])
    for k in lengths:
        of_list = {"k": k, "lists_per_query": -(-steps * ITEMS // (k * len(tokens))), "labels": False, "seed": seed}
        if pairs is None:
            lists = RankingLists(pool, candidates, performance, **of_list)
        else:
            lists = ListsWithSimilarities(pool, candidates, performance, pairs, **of_list)
        torch.manual_seed(seed)
        net = ListwiseRanker(
            ListwiseRankerConfig(
                input_size=pool.dim,
                hidden_size=pool.dim if legacy else WIDTH,
                num_attention_heads=HEADS,
                num_hidden_layers=LAYERS + legacy,
                predictor_size=WIDTH,
                label_channels=None,
                legacy=legacy,
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                per_device_train_batch_size=ITEMS // k,
                max_steps=steps,
                learning_rate=RATE,
                weight_decay=DECAY,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 7,
                seed=seed,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = RankerTrainer(net, args, train_dataset=lists)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        rankers.nets[k] = net.eval()
    return rankers


@torch.no_grad()
def choose(
    rankers: Rankers,
    query_tokens: Tensor,
    candidate_tokens: Tensor,
    similarities: Tensor | None = None,
    *,
    schedule: str = "covering",
    seed: int = 0,
) -> Tensor:
    """The candidates of each query, best first.

    Args:
        rankers: trained on a pool that holds the candidates.
        query_tokens: `(Q, T, d)`.
        candidate_tokens: `(Q, K, T, d)`, the nearest first.
        similarities: `(Q, K, s)`, where the rankers know them.
        schedule: "covering": lists of a covering design for every ranker, aggregated; "knock-out": a tournament with
            the ranker for the longest lists; "one list": mean of the rankers' scores of all K at once.
        seed: of the designs' points.

    Returns:
        `(Q, K)` places among the candidates.
    """
    query, shown = rankers.see(query_tokens), rankers.see(candidate_tokens)
    if similarities is not None:
        query, shown = _joined(query, shown, rankers.compare(similarities))
    count, v = shown.shape[:2]

    def rank(net: ListwiseRanker, lists: Tensor) -> Tensor:
        scores = net.score_lists(query, shown, lists)
        return lists.gather(2, scores.sort(dim=2, descending=True, stable=True).indices)

    if schedule == "one list":
        everyone = torch.arange(v).expand(count, 1, v)
        scores = sum(net.score_lists(query, shown, everyone)[:, 0] for net in rankers.nets.values())
    elif schedule == "knock-out":
        k = max(rankers.nets)
        winners, ranked = knock_out(lambda lists: rank(rankers.nets[k], lists), v, k, batch=count)
        scores = aggregate_rankings(ranked, v)
        scores.scatter_(1, winners[:, None], scores.amax(1, keepdim=True) + 1)
    elif schedule == "covering":
        generator, widest = torch.Generator().manual_seed(seed), max(rankers.nets)
        ranked = [
            # in the order of similarity, so that of equal scores the nearer one is the better
            F.pad(rank(net, covering_lists(v, k, 1, generator, count).sort(2).values), (0, widest - k), value=-1)
            for k, net in rankers.nets.items()
        ]
        scores = aggregate_rankings(torch.cat(ranked, 1), v)
    else:
        raise ValueError(f"schedule={schedule!r}: choose covering, knock-out or one list")
    return scores.sort(dim=1, descending=True, stable=True).indices


def ranker_orders(
    query_tokens: Tensor,
    query_grids: Tensor,
    tokens: Tensor,
    grids: Tensor,
    candidates: Tensor,
    measured: Tensor,
    performance: Tensor,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """All arms of one pool and its queries: `(Q, K)` places among the candidates, best first.

    Args:
        query_tokens: `(Q, T, d)`.
        query_grids: `(Q, h, w, c)`.
        tokens: `(n, T, d)` of the pool.
        grids: `(n, h, w, c)` of the pool.
        candidates: `(Q, K)` rows of the pool, nearest first.
        measured: `(n, K')` rows that were measured on each of the pool's images, nearest first.
        performance: `(n, K')`, larger is better.
        steps: of training each ranker.
        seed: of everything drawn.
    """
    shown = tokens[candidates]
    options = {"steps": steps, "seed": seed}
    orders = {}
    plain = train_rankers(tokens, measured, performance, **options)
    for name, schedule in zip(RANKER_ARMS, ("covering", "knock-out")):
        orders[name] = choose(plain, query_tokens, shown, schedule=schedule, seed=seed)
    released = train_rankers(tokens, measured, performance, legacy=True, **options)
    orders[RANKER_ARMS[2]] = choose(released, query_tokens, shown, seed=seed)
    of_pool = similarities(tokens, grids, tokens, grids, measured)
    compared = train_rankers(tokens, measured, performance, of_pool, **options)
    of_queries = similarities(query_tokens, query_grids, tokens, grids, candidates)
    orders[RANKER_ARMS[3]] = choose(compared, query_tokens, shown, of_queries, seed=seed)
    return orders


def similarities(
    query_tokens: Tensor, query_grids: Tensor, tokens: Tensor, grids: Tensor, candidates: Tensor
) -> Tensor:
    """How much like a query's image each candidate's is, six times, from features of images alone.

    Cosine of the first tokens; of all other tokens, side by side; of feature maps pooled to 2 x 2 and to 4 x 4; mean
    over the query's cells of the largest cosine with a cell of the candidate; and the same from the candidate's cells.

    Args:
        query_tokens: `(Q, T, d)`.
        query_grids: `(Q, h, w, c)` feature maps.
        tokens: `(n, T, d)` of the pool.
        grids: `(n, h, w, c)` of the pool.
        candidates: `(Q, K)` rows of the pool.

    Returns:
        `(Q, K, 6)`.
    """
    views = [(query_tokens[:, 0], tokens[:, 0]), (query_tokens[:, 1:].flatten(1), tokens[:, 1:].flatten(1))]
    cells = F.normalize(query_grids, dim=3), F.normalize(grids, dim=3)
    views += [tuple(_pooled(part, side) for part in cells) for side in SIDES]
    whole = [F.normalize(asked, dim=1) @ F.normalize(shown, dim=1).T for asked, shown in views]
    asked, shown = (part.flatten(1, 2) for part in cells)
    matched = []
    for one, row in zip(asked, candidates, strict=True):  # 14 x 14 cells each with as many of each candidate
        match = shown[row] @ one.T
        matched.append(torch.stack([match.amax(1).mean(1), match.amax(2).mean(1)], 1))
    return torch.cat(
        [torch.stack(whole, 2).gather(1, candidates[:, :, None].expand(-1, -1, 4)), torch.stack(matched)], 2
    )


def _pooled(cells: Tensor, side: int) -> Tensor:
    return F.adaptive_avg_pool2d(cells.permute(0, 3, 1, 2), side).flatten(1)


def _principal_axes(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean, and axes on which every variance is the square root of what it was, and all are 1 on average."""
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T.double().cov())
    values, vectors = values[-width:].flip(0).clamp(min=1e-12), vectors[:, -width:].flip(1)
    return mean, (vectors / values**0.25 / values.sqrt().mean().sqrt()).to(rows)


def _joined(query: Tensor, shown: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """`pairs (..., k, 2 s)` behind the candidates' first tokens `(..., k, T, d)`, zeros behind all others."""
    extra = pairs.shape[-1]
    first = torch.cat([shown[..., 0, :], pairs], -1)[..., None, :]
    return F.pad(query, (0, extra)), torch.cat([first, F.pad(shown[..., 1:, :], (0, extra))], -2)
