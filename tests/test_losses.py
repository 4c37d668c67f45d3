"""The ranker's losses: closed forms, loops that say the same, limits, padding, and the labels they start from."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_effdl.vicl.remote_code import ranker_losses as losses
from hf_effdl.vicl.remote_code.ranker_losses import neural_ndcg_loss, pairwise_margin_loss, ranks, soft_permutation


LOSSES = (neural_ndcg_loss, pairwise_margin_loss)


def lists(b: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, k, generator=generator, dtype=torch.float64) for _ in range(2))


def exact_ndcg(scores: Tensor, relevance: Tensor) -> float:
    def gain(order: list[int]) -> float:
        return sum((2.0 ** float(relevance[i]) - 1) / math.log2(p + 2) for p, i in enumerate(order))

    by = [sorted(range(len(scores)), key=lambda i: -float(v[i])) for v in (scores, relevance)]
    return gain(by[0]) / gain(by[1])


def padded(values: Tensor, width: int, filler: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=filler)


# ---- ranks


def test_ranks_count_the_worse_and_of_equals_the_earlier():
    metric, _ = lists(20, 9)
    metric = (2 * metric).round()  # many ties
    for row, found in zip(metric.tolist(), ranks(metric).tolist()):
        for i in range(9):
            assert found[i] == sum(row[j] < row[i] or (row[j] == row[i] and j < i) for j in range(9))


def test_padding_has_no_rank_whatever_it_holds():
    metric, _ = lists(4, 5)
    metric[0, 0] = torch.inf
    for filler in (-torch.inf, torch.inf, torch.nan, 0.0):
        mask = padded(torch.ones(4, 5), 8, 0).bool()
        found = ranks(padded(metric, 8, filler), mask=mask)
        assert torch.equal(found[:, :5], ranks(metric)) and (found[:, 5:] == -1).all()
    mask = torch.tensor([[True, False, True, True]])
    assert ranks(torch.tensor([[3.0, 9.0, 1.0, 2.0]]), mask=mask).tolist() == [[2, -1, 0, 1]]


# ---- the soft permutation


def test_the_soft_permutation_is_the_formula_in_loops():
    scores, _ = lists(3, 5)
    found = soft_permutation(scores, temperature=0.7)
    for b in range(3):
        s, k = scores[b].numpy(), 5
        apart = [sum(abs(s[i] - s[j]) for j in range(k)) for i in range(k)]
        soft = np.array([[((k + 1 - 2 * p) * s[j] - apart[j]) / 0.7 for j in range(k)] for p in range(1, k + 1)])
        soft = np.exp(soft - soft.max(1, keepdims=True))
        soft /= soft.sum(1, keepdims=True)
        for _ in range(50):
            soft /= soft.sum(0, keepdims=True)
            soft /= soft.sum(1, keepdims=True)
        np.testing.assert_allclose(found[b].numpy(), soft, atol=3e-6)


@pytest.mark.parametrize("k", [2, 5, 10, 50])
def test_its_rows_and_columns_sum_to_one(k):
    ones = torch.ones(8, k)
    # 50 rounds are enough for soft lists; hard ones are left at some thousandths
    for scale, left in ((0.2 / k, 2e-6), (1.0, 5e-3)):
        soft = soft_permutation(scale * lists(8, k)[0].float())
        torch.testing.assert_close(soft.sum(2), ones, atol=2e-6, rtol=0)
        torch.testing.assert_close(soft.sum(1), ones, atol=left, rtol=0)
        assert (soft >= 0).all()


def test_it_stops_when_the_sums_are_right_and_after_fifty_rounds(monkeypatch):
    scores = lists(4, 50)[0]
    easy, hard = soft_permutation(0.01 * scores), soft_permutation(scores)
    monkeypatch.setattr(losses, "ROUNDS", 1000)
    assert torch.equal(soft_permutation(0.01 * scores), easy)
    assert not torch.equal(soft_permutation(scores), hard)


# ---- NeuralNDCG


def test_ndcg_of_two_items_has_a_closed_form():
    scores = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    for temperature in (0.5, 1.0, 3.0):
        first = 1 / (1 + math.exp(-0.7 / temperature))
        expected = first + (1 - first) / math.log2(3)
        found = neural_ndcg_loss(scores, torch.tensor([[1, 0]]), temperature)
        assert float(found) == pytest.approx(-expected, abs=1e-9)
        # gains 2^r - 1 = 7 and 1 of the relevance as it is given
        expected = (first * 7 + (1 - first) + ((1 - first) * 7 + first) / math.log2(3)) / (7 + 1 / math.log2(3))
        found = neural_ndcg_loss(scores, torch.tensor([[3.0, 1.0]]), temperature)
        assert float(found) == pytest.approx(-expected, abs=1e-9)


def test_ndcg_tends_to_the_exact_one():
    scores, metric = lists(5, 8)
    relevance = ranks(metric)
    expected = sum(exact_ndcg(*pair) for pair in zip(scores, relevance)) / 5
    assert float(neural_ndcg_loss(scores, relevance, 1e-4)) == pytest.approx(-expected, abs=1e-6)
    assert float(neural_ndcg_loss(10.0 * relevance, relevance)) == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("k", [2, 3, 10, 50])
def test_ndcg_is_above_zero_and_at_most_one(k):
    scores, metric = (part.float() for part in lists(30, k))
    for scale in (0.0, 0.01, 1, 100):
        for one, other in zip(scores, metric):
            loss = neural_ndcg_loss(scale * one[None], ranks(other[None]))
            assert -1 <= float(loss) < 0
    assert float(neural_ndcg_loss(metric, ranks(metric))) < float(neural_ndcg_loss(-metric, ranks(metric)))


def test_losses_do_not_depend_on_the_order_of_a_list_and_average_over_lists():
    scores, metric = lists(6, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    for loss in LOSSES:
        given = ranks(metric) if loss is neural_ndcg_loss else metric
        whole = loss(scores, given)
        torch.testing.assert_close(loss(scores[:, order], given[:, order]), whole, atol=1e-6, rtol=0)
        each = torch.stack([loss(scores[i : i + 1], given[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(each.mean(), whole, atol=1e-6, rtol=0)
        assert each.std() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("filler", [0.0, -torch.inf, torch.nan])
def test_padding_changes_nothing(loss, filler):
    short, long = lists(2, 4), lists(2, 7, seed=1)
    for part in (short, long):
        part[0].requires_grad_()
    mask = torch.cat([padded(torch.ones(2, 4), 7, 0), torch.ones(2, 7)]).bool()
    scores, metric = (torch.cat([padded(a, 7, filler), b]).detach() for a, b in zip(short, long))
    scores.requires_grad_()
    values = [ranks(part[1]) if loss is neural_ndcg_loss else part[1] for part in (short, long)]
    target = ranks(metric, mask=mask) if loss is neural_ndcg_loss else metric
    expected = (loss(short[0], values[0]) + loss(long[0], values[1])) / 2
    found = loss(scores, target, mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    slopes = torch.autograd.grad(expected, [short[0], long[0]])
    found.backward()
    assert (scores.grad[~mask] == 0).all()
    torch.testing.assert_close(scores.grad[mask], torch.cat([part.flatten() for part in slopes]), atol=1e-5, rtol=0)


def test_relevance_without_gain_counts_as_sorted_and_pulls_nowhere():
    scores = lists(2, 5)[0].requires_grad_()
    relevance = torch.zeros(2, 5)
    loss = neural_ndcg_loss(scores, relevance)
    loss.backward()
    assert float(loss.detach()) == -1 and (scores.grad == 0).all()
    assert float(neural_ndcg_loss(scores.detach(), torch.full((2, 5), 3.0))) == pytest.approx(-1, abs=1e-5)
    relevance[1, 2] = 1  # the other list goes on
    scores.grad = None
    neural_ndcg_loss(scores, relevance).backward()
    assert (scores.grad[0] == 0).all() and scores.grad[1, 2] < 0


def test_large_relevance_does_not_overflow():
    scores, metric = (part.float() for part in lists(2, 50))
    for relevance in (ranks(metric) + 200, ranks(metric)):
        assert -1 <= float(neural_ndcg_loss(scores, relevance)) < 0
    # far above 0 the gains are 2^r alone, so that a shift does not matter
    one, other = (neural_ndcg_loss(scores, ranks(metric) + shift) for shift in (30, 400))
    torch.testing.assert_close(one, other)


# ---- the margin


def test_margin_is_the_mean_over_pairs_in_loops():
    scores, metric = lists(4, 6)
    metric = metric.round()
    for margin in (0.0, 0.5, 1.0):
        total = []
        for s, m in zip(scores.tolist(), metric.tolist()):
            for i in range(6):
                for j in range(i + 1, 6):
                    sign = 1 if m[i] > m[j] else -1
                    total.append(max(0.0, margin - sign * (s[i] - s[j])))
        assert float(pairwise_margin_loss(scores, metric, margin)) == pytest.approx(sum(total) / 60, abs=1e-12)


# ---- both


@pytest.mark.parametrize("loss", LOSSES)
def test_slopes_are_those_of_the_values(loss):
    scores, metric = lists(3, 5)
    target = ranks(metric) if loss is neural_ndcg_loss else metric
    assert torch.autograd.gradcheck(lambda s: loss(s, target), scores.requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_single(loss):
    scores, metric = lists(4, 10)
    target = ranks(metric)
    found = loss(scores.bfloat16(), target.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(scores.bfloat16().float(), target.float()))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_cannot_be_right_is_named(loss):
    scores, metric = (part.float() for part in lists(2, 4))
    metric, bad = ranks(metric).float(), scores.clone()
    bad[1, 2] = torch.nan
    alone = torch.tensor([[True] * 4, [True, False, False, False]])
    for given, mask, text in (
        ((bad, metric), None, "scores is NaN at item 2 of list 1"),
        ((scores, torch.where(bad.isnan(), torch.nan, metric)), None, "is NaN at item 2 of list 1"),
        ((scores, metric[:, :3]), None, r"scores \(2, 4\) and .* \(2, 3\)"),
        ((scores[:, :1], metric[:, :1]), None, "k >= 2"),
        ((scores[0], metric[0]), None, "k >= 2"),
        ((scores, metric), torch.ones(2, 4), "mask is torch.float32"),
        ((scores, metric), alone, "list 1 fewer than two items"),
    ):
        with pytest.raises(ValueError, match=text):
            loss(*given, mask=mask)


def test_ndcg_takes_grades_and_a_positive_temperature():
    scores, metric = lists(2, 4)
    with pytest.raises(ValueError, match=r"goes down to -\d.*ranks\(metric\)"):
        neural_ndcg_loss(scores, metric)
    with pytest.raises(ValueError, match="temperature=0"):
        neural_ndcg_loss(scores, ranks(metric), 0)
