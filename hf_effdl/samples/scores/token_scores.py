"""Scores of answers from what several language models say of their tokens. Pure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_effdl.samples.scores.uncertainty import batch_uncertainty, entropy_of


# below this a probability is none in float32; it keeps a class that nothing is left for out of the spread
LEAST_LOG = -60.0


def kept_tokens(logits: Tensor, given: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The `top` likeliest tokens of a model and the given one among them, and where that is.

    Args:
        logits: `(T, V)`.
        given: `(T,)` tokens.
        top: K, at most V.

    Returns:
        `(T, K)` token numbers, each once a row, and `(T,)` the column of the given one.
    """
    kept = logits.topk(min(top, logits.shape[1]), 1).indices
    there = kept == given[:, None]
    kept[:, -1] = torch.where(there.any(1), kept[:, -1], given)
    return kept, (kept == given[:, None]).int().argmax(1)


def coarse_log_probs(logits: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others taken together as one more.

    A softmax over classes that were merged is again one, so that what holds for logits of K + 1 classes holds here.

    Args:
        logits: `(T, V)`.
        kept: `(T, K)` token numbers, each once a row.

    Returns:
        `(T, K + 1)`, float32; the last is of the others.

    Example:
        >>> coarse_log_probs(torch.zeros(1, 4), torch.tensor([[2]])).exp()
        tensor([[0.2500, 0.7500]])
    """
    log_probs = logits.float().log_softmax(1)
    others = log_probs.scatter(1, kept, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.gather(1, kept), others], 1).clamp(min=LEAST_LOG)


def answer_scores(z: Tensor, given: Tensor, answer: Tensor, end: Tensor) -> dict[str, Tensor]:
    """Scores of answers, each a mean over its own tokens, so that long ones are not above short ones.

    With `Z_m` the log-probabilities of probe m and `p = mean_m exp Z_m`:

        loss        mean over probes and tokens of -Z_m[y]
        perplexity  exp(loss)
        p_answer    exp(mean over tokens of log p[y]): the geometric mean of the given tokens' probabilities
        hits        share of tokens that are the likeliest of the kept ones under p
        entropy     mean over tokens of the entropy of p
        el2n        mean over tokens and probes of ||exp Z_m - onehot(y)||
        loss_end    -log p[y] of the end token: where an answer was cut off, its end comes as a surprise
        u_y, u_x    root of the mean over tokens of `uncertainty` squared, with and without the given token
        spread      standard deviation over probes of the answer's mean log-likelihood

    The last three need two probes.

    Args:
        z: `(T, M, K)` log-probabilities of K classes, the last being all tokens that are not kept.
        given: `(T,)` column of each given token.
        answer: `(T,)` number of the answer that a token belongs to, in order.
        end: `(answers,)` which of the T tokens ends each answer.

    Returns:
        `{name: (answers,)}`, float64.

    Source: the uncertainty of COPS, arXiv 2309.02476, token by token: with errors of tokens that are independent, the
    variance of an answer's gradient is the sum of theirs.
    """
    z = z.double()
    each, probes = z.exp(), z.shape[1]
    p = each.mean(1)
    log_given = z.gather(2, given[:, None, None].expand(-1, probes, 1))[..., 0]
    hot = torch.nn.functional.one_hot(given, z.shape[2])
    log_p = p.gather(1, given[:, None])[:, 0].log()
    answers = len(end)
    counts = torch.zeros(answers, dtype=torch.float64, device=z.device)
    counts.index_add_(0, answer, torch.ones_like(log_p))

    def mean(values: Tensor) -> Tensor:
        """Over the tokens of each answer; values of shape (T,) or (T, n)."""
        total = values.new_zeros(answers, *values.shape[1:]).index_add_(0, answer, values)
        return total / counts.view(-1, *[1] * (values.ndim - 1))

    likelihood = mean(log_given)
    scores = {
        "loss": -likelihood.mean(1),
        "perplexity": (-likelihood.mean(1)).exp(),
        "p_answer": mean(log_p).exp(),
        "hits": mean((p[:, :-1].argmax(1) == given).double()),
        "entropy": mean(entropy_of(p)),
        "el2n": mean((each - hot[:, None]).norm(dim=2).mean(1)),
        "loss_end": -log_p[end],
    }
    if probes > 1:
        scores |= {
            "u_y": mean(batch_uncertainty(z, given).square()).sqrt(),
            "u_x": mean(batch_uncertainty(z, None).square()).sqrt(),
            "spread": likelihood.std(1),
        }
    return scores


def means_by_place(hidden: Tensor, mask: Tensor, prompts: Sequence[int]) -> dict[str, Tensor]:
    """Of left-padded hidden states, means over the row by place, and over the prompt alone."""
    place = mask.cumsum(1).to(hidden.device)
    there = torch.tensor(prompts, device=hidden.device)[:, None]
    by_place = place.float() * mask.to(hidden.device)
    prompt = ((place >= 1) & (place <= there) & mask.to(hidden.device).bool()).float()
    hidden = hidden.float()
    return {
        name: (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        for name, weights in (("embedding", by_place), ("prompts", prompt))
    }


def mean_by_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """The mean of the values of each row, `(rows,)`; `row` says which row each is of."""
    total = values.new_zeros(rows).index_add_(0, row, values)
    return total / row.bincount(minlength=rows)
