"""List-wise heads for the stages of a cascade: small rankers over features, trained in a minute."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configuration_listwise_ranker import ListwiseRankerConfig
from .modeling_listwise_ranker import ListwiseRanker


HEADS, STEPS, LISTS, RATE, DECAY = 10, 300, 32, 1e-3, 0.1


class ListHeads(nn.Module):
    """Ten rankers whose mean score counts, in units of performance.

    Args:
        size: features of a candidate.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rankers = nn.ModuleList(_ranker(size) for _ in range(HEADS))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def forward(self, features: Tensor, known: Tensor) -> Tensor:
        """`(B, K, f)` standardised features to `(B, K)` scores less the mean of the list."""
        return torch.stack([self.scores(ranker, features, known) for ranker in self.rankers]).mean(0)

    @torch.no_grad()
    def scores(self, ranker: ListwiseRanker, features: Tensor, known: Tensor) -> Tensor:
        """Of one ranker."""
        features, there = features.to(self.scale.device), known.to(self.scale.device)
        found = _run(ranker, features, there).scores.float().masked_fill(~there, 0)
        found = found - found.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        return (found * self.scale.float() * there).cpu()


def train_heads(
    features: Sequence[Tensor], target: Tensor, known: Tensor, fold: Tensor, seed: int
) -> tuple[ListHeads, Tensor]:
    """Rankers that are each trained without one fold, and the scores of every list by the two that have not seen it.

    300 steps of 32 lists each, AdamW with weight decay 0.1, learning rate 1e-3 in one cycle; every other step sees
    half of each list, so that lists of other lengths are nothing new. The scale is that of a regression of performance
    on the scores of lists that were not seen.

    Args:
        features: `(L, m, f)` standardised, for each fold: made without what that fold measured.
        target, known: `(L, m)`: performance less the mean of the list, and where there is one.
        fold: `(L,)`, 0 to 4.
        seed: of weights and batches.
    """
    with torch.random.fork_rng(devices=[]):
        heads, held = ListHeads(features[0].shape[2]), torch.zeros(target.shape)
    for number, ranker in enumerate(heads.rankers):
        one = number % len(features)
        train, test, part = fold != one, fold == one, features[one]
        _train(ranker, part[train], target[train], known[train], seed + number)
        if test.any():  # of few groups there are fewer folds
            held[test] += heads.scores(ranker, part[test], known[test]) * len(features) / HEADS
    slope = ((held * target).sum() / held.square().sum().clamp(min=1e-12)).clamp(min=1e-6)
    heads.scale.fill_(slope)
    return heads.eval().requires_grad_(False), held * slope


def _ranker(size: int) -> ListwiseRanker:
    return ListwiseRanker(
        ListwiseRankerConfig(
            input_size=size,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            label_channels=None,
            bind=False,
        )
    )


def _run(ranker: ListwiseRanker, features: Tensor, known: Tensor, **options: Tensor) -> object:
    # every candidate is one token, and the query an empty one
    asked = torch.zeros_like(features[:, :1])
    return ranker(query_tokens=asked, candidate_tokens=features[:, :, None], mask=known, **options)


@torch.enable_grad()
def _train(ranker: ListwiseRanker, features: Tensor, target: Tensor, known: Tensor, seed: int) -> None:
    scale = target[known].std().clamp(min=1e-6)  # the ranker's margin is 1, and differences are small
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker.load_state_dict(_ranker(features.shape[2]).state_dict())
        ranker.train()
        optimizer = torch.optim.AdamW(ranker.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for step in range(STEPS):
            lists = torch.randint(len(features), (LISTS,))
            kept = known[lists]
            if step % 2 and features.shape[1] > 3:
                kept = kept & (torch.rand(kept.shape).argsort(1).argsort(1) < (features.shape[1] + 1) // 2)
                enough = kept.sum(1) >= 2
                lists, kept = lists[enough], kept[enough]
            loss = _run(ranker, features[lists], kept, metric=target[lists] / scale).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
