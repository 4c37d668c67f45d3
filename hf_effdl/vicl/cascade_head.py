"""A list-wise head for the cascade's second stage: a small ranker over features, trained in seconds."""

import torch
from torch import Tensor

from .configuration_listwise_ranker import ListwiseRankerConfig
from .modeling_listwise_ranker import ListwiseRanker


STEPS, LISTS, RATE, DECAY = 300, 32, 1e-3, 0.1


def train_head(
    features: Tensor, performance: Tensor, known: Tensor, fold: Tensor, seed: int
) -> tuple[ListwiseRanker, Tensor]:
    """A ranker trained on all lists, and the scores of rankers that were each trained without one fold.

    300 steps of 32 lists, AdamW with weight decay 0.1, learning rate 1e-3 in one cycle; every other step sees half of
    each list, so that lists of other lengths are nothing new.

    Args:
        features: `(L, m, f)` standardised.
        performance, known: `(L, m)`.
        fold: `(L,)` from 0.
        seed: of weights and batches.
    """
    held = torch.zeros(performance.shape)
    for one in fold.unique().tolist():
        train, test = fold != one, fold == one
        head = _trained(features[train], performance[train], known[train], seed)
        held[test] = head_scores(head, features[test], known[test])
    return _trained(features, performance, known, seed), held


@torch.no_grad()
def head_scores(head: ListwiseRanker, features: Tensor, known: Tensor) -> Tensor:
    """`(B, m, f)` to `(B, m)`: every candidate is one token, and the query an empty one."""
    device = next(head.parameters()).device
    features = features.to(device)
    asked = torch.zeros_like(features[:, :1])
    return head(query_tokens=asked, candidate_tokens=features[:, :, None], mask=known.to(device)).scores.float().cpu()


@torch.enable_grad()
def _trained(features: Tensor, performance: Tensor, known: Tensor, seed: int) -> ListwiseRanker:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ListwiseRanker(ListwiseRankerConfig(
            input_size=features.shape[2], hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, label_channels=None, bind=False, list_length=features.shape[1],
        )).train()  # fmt: skip
        # differences inside a list are small, and the ranker's margin is 1
        scale = performance[known].std().clamp(min=1e-6)
        optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for step in range(STEPS):
            some = torch.randint(len(features), (LISTS,))
            kept = known[some]
            if step % 2 and features.shape[1] > 3:
                kept = kept & (torch.rand(kept.shape).argsort(1).argsort(1) < (features.shape[1] + 1) // 2)
                enough = kept.sum(1) >= 2
                some, kept = some[enough], kept[enough]
            shown = features[some]
            loss = head(query_tokens=torch.zeros_like(shown[:, :1]), candidate_tokens=shown[:, :, None], mask=kept,
                        metric=performance[some] / scale).loss  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval().requires_grad_(False)
