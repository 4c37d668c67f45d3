"""Which few to try: the expected best of them, against closed forms and brute force; and who is related to whom."""

import itertools
import math

import pytest
import torch
from tables import CASES, drawn, table
from torch import Tensor

from hf_effdl.vicl.remote_code.cascade_shortlist import Relations, best_together


def covariances(batch: int, size: int, seed: int) -> Tensor:
    """Of few common causes, so that many are strongly related, and a little of each one's own."""
    causes = torch.randn(batch, size, 3, generator=drawn(seed))
    return causes @ causes.transpose(1, 2) + 0.1 * torch.eye(size)


def all_known(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def clark(mean: Tensor, covariance: Tensor, i: int, j: int) -> float:
    """E max(f_i, f_j) of two normal variables (Clark 1961)."""
    apart = math.sqrt(float(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]))
    a = float(mean[i] - mean[j]) / apart
    below = 0.5 * (1 + math.erf(a / math.sqrt(2)))
    return (
        float(mean[i]) * below + float(mean[j]) * (1 - below) + apart * math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    )


def draws_of(mean: Tensor, covariance: Tensor) -> Tensor:
    """Many, of its own."""
    root = torch.linalg.cholesky(covariance.double())
    return mean.double() + torch.randn(20_000, len(mean), generator=drawn(99), dtype=torch.float64) @ root.T


def test_the_second_is_the_one_with_which_the_expected_maximum_is_largest():
    """In closed form. 256 draws may miss it by little."""
    batch, size = 40, 12
    scores, covariance = torch.randn(batch, size, generator=drawn(0)), covariances(batch, size, 1)
    found = best_together(scores, covariance, all_known(scores), 2)
    assert torch.equal(found[:, 0], scores.argmax(1))
    missed, shares = [], []
    for one, mean, spread in zip(found.tolist(), scores, covariance, strict=True):
        gains = [clark(mean, spread, one[0], j) - float(mean[one[0]]) if j != one[0] else 0.0 for j in range(size)]
        missed.append(max(gains) - gains[one[1]])
        shares.append(gains[one[1]] / max(gains))
    assert max(missed) < 0.1 and sum(shares) / batch > 0.98
    # which the next by score is not
    plain = scores.argsort(dim=1, descending=True)[:, 1]
    assert (plain != found[:, 1]).float().mean() > 0.5


def test_few_that_were_chosen_greedily_are_nearly_the_best_few():
    scores, covariance = torch.randn(6, 8, generator=drawn(2)), covariances(6, 8, 3)
    found = best_together(scores, covariance, all_known(scores), 3)
    for one, mean, spread in zip(found.tolist(), scores, covariance, strict=True):
        draws = draws_of(mean, spread)
        worth = {few: float(draws[:, few].amax(1).mean()) for few in itertools.combinations(range(8), 3)}
        alone, best = float(mean.max()), max(worth.values())
        assert worth[tuple(sorted(one))] - alone > 0.93 * (best - alone)
        top = tuple(sorted(mean.argsort(descending=True)[:3].tolist()))
        assert worth[tuple(sorted(one))] >= worth[top] - 0.01


def test_where_nothing_is_uncertain_scores_decide():
    scores = torch.randn(5, 20, generator=drawn(4))
    order = scores.argsort(dim=1, descending=True)
    found = best_together(scores, torch.zeros(5, 20, 20), all_known(scores), 20)
    assert torch.equal(found, order)
    # also where scores are far apart beside the uncertainty
    sure = 1e-3 * torch.eye(20).expand(5, -1, -1)
    assert torch.equal(best_together(100 * scores, sure, all_known(scores), 4), order[:, :4])


def test_of_kinds_that_stand_and_fall_together_each_is_tried():
    kinds = torch.arange(30) % 5
    together = 0.99 * (kinds[:, None] == kinds).float() + 0.01 * torch.eye(30)
    scores = 0.1 * (kinds == 2).float()[None] + 1e-3 * torch.arange(30)[None]
    found = best_together(scores, together[None], all_known(scores), 5)[0]
    assert sorted(kinds[found].tolist()) == [0, 1, 2, 3, 4] and found[0] == 27
    # as many as there are, in one call or in a longer list, are the same ones
    assert torch.equal(best_together(scores, together[None], all_known(scores), 12)[0, :5], found)


def test_unknown_ones_come_last_and_nothing_is_chosen_twice():
    scores, known = torch.randn(7, 9, generator=drawn(5)), torch.rand(7, 9, generator=drawn(6)) < 0.5
    known[0], known[1] = True, False
    covariance = covariances(7, 9, 7)
    # what stands there does not matter
    scores = scores.masked_fill(~known, -torch.inf)
    for count in (4, 9, 50):
        found = best_together(scores, covariance, known, count)
        assert found.shape == (7, min(count, 9))
        assert all(len(set(one)) == len(one) for one in found.tolist())
        for one, there in zip(found, known, strict=True):
            shown = there[one].long()
            assert (shown.diff() <= 0).all() and shown.sum() == min(count, int(there.sum()))
    assert torch.equal(found, best_together(scores, covariance, known, 9))


def test_a_list_is_answered_as_alone_and_the_random_state_is_left_alone():
    scores, covariance = torch.randn(4, 10, generator=drawn(8)), covariances(4, 10, 9)
    before = torch.get_rng_state()
    together = best_together(scores, covariance, all_known(scores), 6)
    assert torch.equal(torch.get_rng_state(), before)
    alone = [best_together(s[None], c[None], all_known(s[None]), 6)[0] for s, c in zip(scores, covariance)]
    assert torch.equal(together, torch.stack(alone))


# ---- who is related to whom


def relations(groups: Tensor, measured: Tensor, performance: Tensor) -> Relations:
    images = (measured >= 0).any(1).nonzero()[:, 0]
    known = measured[images] >= 0
    mean = (performance[images] * known).sum(1, keepdim=True) / known.sum(1, keepdim=True)
    return Relations(images, measured[images], performance[images] - mean, groups)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("groups", [torch.arange(14), torch.arange(14) // 3], ids=["alone", "in threes"])
@pytest.mark.parametrize("case", CASES)
def test_examples_are_related_by_the_images_they_did_well_and_badly_on(case, groups):
    n, (labelled, count) = 14, CASES[case]
    measured, performance = table(n, labelled, count)
    measured[labelled[1], 0] = -1
    own = torch.tensor([labelled[2], -1, next(iter({*range(n)} - {*labelled}), -1)])
    rows = torch.randint(n, (3, 7), generator=drawn(0))
    residual = torch.zeros(n, n, dtype=torch.float64)
    entries = []
    for j in labelled:
        known = measured[j] >= 0
        residual[j, measured[j][known]] = (performance[j][known] - performance[j][known].mean()).double()
        entries += residual[j, measured[j][known]].tolist()
    one_more = sum(entry**2 for entry in entries) / len(entries)
    made = relations(groups, measured, performance)
    found = made.between(rows, own)
    for b in range(3):
        others = [j for j in labelled if own[b] < 0 or groups[j] != groups[own[b]]]
        for x, c in enumerate(rows[b].tolist()):
            for y, e in enumerate(rows[b].tolist()):
                product = sum(float(residual[j, c] * residual[j, e]) for j in others)
                size = math.prod(sum(float(residual[j, at]) ** 2 for j in others) + one_more for at in (c, e))
                assert float(found[b, x, y]) == pytest.approx(product / math.sqrt(size), abs=1e-5)
    assert torch.linalg.eigvalsh(found.double()).min() > -1e-5
    torch.testing.assert_close(made.between(rows)[1], found[1])


def test_an_example_that_was_never_measured_is_related_to_none():
    measured, performance = table(10, [1, 4, 6], 3)
    seen = measured[measured >= 0].unique()
    never = next(row for row in range(10) if row not in seen)
    found = relations(torch.arange(10), measured, performance).between(
        torch.tensor([[never, int(seen[0]), int(seen[1])]])
    )
    assert not found[0, 0].any() and found[0, 1, 1] > 0.1


def test_a_hundred_examples_that_one_image_tells_of_can_be_drawn_together():
    """Almost one direction, so that rounding could make it indefinite."""
    performance = torch.cat([1e3 * torch.randn(1, 100, generator=drawn(0)), torch.zeros(300, 100)])
    made = Relations(torch.arange(301), torch.arange(100).expand(301, -1), performance, torch.arange(400))
    related = made.between(torch.arange(100)[None])
    assert related.abs().median() > 0.9
    related.diagonal(dim1=1, dim2=2).fill_(1.0)
    found = best_together(torch.zeros(1, 100), related, torch.ones(1, 100, dtype=torch.bool), 3)[0]
    assert related[0, found[0], found[1]] < -0.9  # of two kinds, one of each
