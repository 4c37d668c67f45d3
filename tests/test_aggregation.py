"""Aggregated rankings against other solvers and closed forms, and how schedules fare with and without noise."""

import time

import numpy as np
import pytest
import torch

from hf_effdl.vicl.remote_code.ranker_aggregation import aggregate_rankings, comparison_counts
from hf_effdl.vicl.remote_code.ranker_designs import (
    covering_design,
    covering_lists,
    knock_out,
    partitions,
    random_lists,
)


TRIALS = 400


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_lists(n=9, seed=0, count=25):
    """Lists of 2 to 5 items in random order."""
    rng = np.random.default_rng(seed)
    return [rng.choice(n, size=rng.integers(2, 6), replace=False).tolist() for _ in range(count)]


def observations(lists):
    """Every (i above j) that is seen, one by one."""
    return [(row[a], row[b]) for row in lists for a in range(len(row)) for b in range(a + 1, len(row))]


def stacked(lists, n):
    """D with one row for each observation, whose target is 1."""
    pairs = observations(lists)
    d = np.zeros((len(pairs), n))
    for row, (i, j) in enumerate(pairs):
        d[row, i], d[row, j] = 1, -1
    return d


def padded(lists):
    width = max(map(len, lists))
    return torch.tensor([row + [-1] * (width - len(row)) for row in lists])


# ---- the solution


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_over_all_observations(seed):
    lists = some_lists(seed=seed)
    d = stacked(lists, 9)
    theta = aggregate_rankings(lists, 9).numpy()
    np.testing.assert_allclose(theta, np.linalg.lstsq(d, np.ones(len(d)), rcond=None)[0], atol=1e-10)
    least = ((d @ theta - 1) ** 2).sum()
    rng = np.random.default_rng(seed)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            assert ((d @ (theta + size * rng.standard_normal(9)) - 1) ** 2).sum() >= least


def test_agrees_with_an_iterative_solver_of_scipy():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    lists = some_lists(n=12, seed=5, count=40)
    d = stacked(lists, 12)
    found = linalg.lsqr(d, np.ones(len(d)), atol=1e-12, btol=1e-12)[0]
    np.testing.assert_allclose(aggregate_rankings(lists, 12).numpy(), found, atol=1e-8)


def test_agrees_with_weighted_mean_outcomes_of_directed_edges():
    lists = some_lists(seed=7)
    above = comparison_counts(lists, 9).numpy()
    i, j = above.nonzero()
    d = np.zeros((len(i), 9))
    d[np.arange(len(i)), i], d[np.arange(len(i)), j] = 1, -1
    w = above[i, j]
    y = (above[i, j] - above[j, i]) / (above[i, j] + above[j, i])
    assert (y < 1).any(), "no two lists disagree"
    found = np.linalg.lstsq((d.T * w) @ d, (d.T * w) @ y, rcond=1e-12)[0]
    np.testing.assert_allclose(aggregate_rankings(lists, 9).numpy(), found, atol=1e-10)


def test_normal_equations_hold_to_rounding():
    lists = covering_lists(50, 5, generator=seeded(1))
    above = comparison_counts(lists, 50)
    compared = above + above.T
    wins = (above - above.T).sum(1)
    theta = aggregate_rankings(lists, 50)
    assert theta.dtype == torch.float64
    residual = torch.diag(compared.sum(1)) @ theta - compared @ theta - wins
    assert residual.norm() <= 1e-8 * wins.norm()
    assert abs(theta.sum()) < 1e-10


def test_hundreds_of_times_as_many_comparisons_of_some_pairs_do_no_harm():
    lists = torch.cat([torch.tensor([[0, 1, 2, 3]]).expand(10_000, 4), torch.tensor([[3, 4, -1, -1]])])
    theta = aggregate_rankings(lists, 5)
    torch.testing.assert_close(theta[3] - theta[4], torch.tensor(1.0, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(theta[:3] - theta[1:4], torch.full((3,), 0.5, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["hodge", "borda"])
def test_repeating_reversing_and_renaming(method):
    lists = some_lists(seed=2)
    theta = aggregate_rankings(lists, 9, method)
    torch.testing.assert_close(aggregate_rankings(lists * 3, 9, method), theta)
    torch.testing.assert_close(aggregate_rankings([row[::-1] for row in lists], 9, method), -theta)
    new = torch.randperm(9, generator=seeded())
    renamed = [[int(new[item]) for item in row] for row in lists]
    torch.testing.assert_close(aggregate_rankings(renamed, 9, method)[new], theta)
    assert theta.std() > 0.1


@pytest.mark.parametrize("method", ["hodge", "borda"])
def test_all_forms_of_the_lists_are_the_same(method):
    lists = some_lists(seed=3)
    theta = aggregate_rankings(lists, 9, method)
    rows = padded(lists)
    wider = torch.nn.functional.pad(rows, (0, 2, 0, 3), value=-1)
    arrays, tensors = [np.array(row) for row in lists], [torch.tensor(row) for row in lists]
    for same in (rows, rows.int(), wider, tuple(map(tuple, lists)), arrays, tensors):
        assert torch.equal(aggregate_rankings(same, 9, method), theta)
    others = [padded(some_lists(seed=seed)) for seed in (4, 5)]
    batch = torch.stack([rows[:, :5], *(other[:, :5] for other in others)])
    found = aggregate_rankings(batch, 9, method)
    assert found.shape == (3, 9)
    for one, alone in zip(found, (theta, *(aggregate_rankings(other, 9, method) for other in others))):
        torch.testing.assert_close(one, alone)
    assert aggregate_rankings(batch[:1], 9, method).shape == (1, 9)
    assert rows.tolist() == padded(lists).tolist()


def test_counts_are_those_of_a_loop():
    lists = some_lists(seed=6)
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for i, j in observations(lists):
        expected[i, j] += 1
    assert torch.equal(comparison_counts(lists, 9), expected)
    batch = torch.stack([padded(lists), padded(lists).flip(0)])
    assert torch.equal(comparison_counts(batch, 9), expected.expand(2, 9, 9))
    assert comparison_counts(lists, 11).shape == (11, 11)


# ---- closed forms


@pytest.mark.parametrize(("v", "k"), [(25, 5), (21, 5), (13, 3), (8, 8), (6, 2)])
def test_where_all_pairs_meet_once_scores_are_the_net_wins_and_equal_steps_without_noise(v, k):
    blocks = covering_design(v, k)
    lists = blocks.sort(1).values
    expected = (v - 1 - 2 * torch.arange(v, dtype=torch.float64)) / v
    torch.testing.assert_close(aggregate_rankings(lists, v), expected)
    torch.testing.assert_close(aggregate_rankings(lists, v, "borda"), expected * v / (v - 1))
    noisy = blocks.gather(1, torch.rand(blocks.shape, generator=seeded()).argsort(1))
    above = comparison_counts(noisy, v)
    torch.testing.assert_close(aggregate_rankings(noisy, v), (above - above.T).sum(1) / v)


def test_a_pair_seen_once_each_way_says_that_both_are_equal():
    torch.testing.assert_close(
        aggregate_rankings([[0, 1], [1, 0], [1, 2]], 3), torch.tensor([1.0, 1, -2], dtype=torch.float64) / 3
    )
    # and weighs two: against one path of 0 above 2 above 1, the difference is (0 * 2 + 2 / 2) / 2.5
    theta = aggregate_rankings([[0, 1], [1, 0], [0, 2], [2, 1]], 3)
    torch.testing.assert_close(theta[0] - theta[1], torch.tensor(0.4, dtype=torch.float64))


def test_consistent_lists_alone_do_not_give_the_true_order():
    def repeated(w):
        return [[0, 3]] * w + [[1, 2]] * w + [[2, 3]] * w + [[0, 1]]

    theta = aggregate_rankings(repeated(4), 4)
    torch.testing.assert_close(theta, torch.tensor([3, 4, -1, -6], dtype=torch.float64) / 7)
    for w in range(1, 8):
        theta = aggregate_rankings(repeated(w), 4)
        assert bool(theta[1] - theta[0] > 1e-9) == (w > 3)
        assert aggregate_rankings(repeated(w), 4, "borda").argmax() == 0
    assert abs(aggregate_rankings(repeated(3), 4).diff()[0]) < 1e-12


def test_win_rates_of_a_small_example():
    found = aggregate_rankings([[0, 1, 2], [2, 3], [0, 3]], 4, "borda")
    torch.testing.assert_close(found, torch.tensor([1, 0, -1 / 3, -1], dtype=torch.float64))


# ---- what is refused


@pytest.mark.parametrize("method", ["hodge", "borda"])
def test_items_that_were_never_compared_with_the_rest_are_named(method):
    with pytest.raises(ValueError, match=r"3 items \(3, 4, 5\) were never compared.* with the rest:"):
        aggregate_rankings([[0, 1, 2], [3, 4, 5]], 6, method)
    with pytest.raises(ValueError, match="item 2 was in none of the lists: rank every item"):
        aggregate_rankings([[0, 1, 3]], 4, method)
    good, bad = [[0, 1, 2, 3], [3, 4, 5, -1]], [[0, 1, -1, -1], [2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"2 items \(0, 1\).*with the rest of entry 1 of the batch"):
        aggregate_rankings(torch.tensor([good, bad]), 6, method)
    with pytest.raises(ValueError, match=r"2 items \(1, 4\) were never"):
        aggregate_rankings([[0, 2, 3], [4, 1], [5, 0]], 6, method)
    with pytest.raises(ValueError, match=r"10 items \(10, 11, 12, 13, 14, ...\) were in none"):
        aggregate_rankings([list(range(10))], 20, method)


def test_a_chain_of_comparisons_is_connected_however_long():
    chain = [[i, i + 1] for i in range(99)]
    expected = (99 - 2 * torch.arange(100, dtype=torch.float64)) / 2
    torch.testing.assert_close(aggregate_rankings(chain[::-1], 100), expected)
    with pytest.raises(ValueError, match=r"50 items \(50, 51"):
        aggregate_rankings(chain[:49] + chain[50:], 100)


@pytest.mark.parametrize(
    ("lists", "error", "words"),
    [
        ([[0, 1, 4]], ValueError, r"list 0, \[0, 1, 4\], has an item outside 0..3: pass num_items"),
        ([[0, 1], [2, -2]], ValueError, "list 1.* outside 0..3"),
        ([[0, 1, 0]], ValueError, "item 0 stands twice"),
        ([[0, 1], [2]], ValueError, r"list 1, \[2, -1\], has one item"),
        (torch.tensor([[1], [2]]), ValueError, "list 0.*one item"),
        ([[0, -1, 1]], ValueError, "-1 before an item"),
        ([[-1, 1]], ValueError, "-1 before an item"),
        ([], ValueError, "empty"),
        ([[], [1, 2]], ValueError, "non-empty"),
        ([1, 2], ValueError, "non-empty"),
        (torch.zeros(0, 3, dtype=torch.long), ValueError, r"shape \(0, 3\)"),
        (torch.arange(4), ValueError, r"shape \(4,\): pass \(L, k\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.long), ValueError, "shape"),
        (torch.rand(2, 3), TypeError, "torch.float32.*not scores"),
        ([[0.5, 1]], TypeError, "not scores"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "torch.bool"),
        ([[True, False]], TypeError, "torch.bool"),
        ([["a", "b"]], TypeError, "whole numbers"),
        (3, TypeError, "lists of int"),
    ],
)
def test_malformed_lists_are_named(lists, error, words):
    with pytest.raises(error, match=words):
        aggregate_rankings(lists, 4)


def test_of_a_batch_the_entry_with_the_malformed_list_is_named():
    good = [[0, 1, 2], [2, 3, -1]]
    for bad, words in (
        ([[0, 1, 2], [3, 3, -1]], "item 3 stands twice"),
        ([[0, 1, 2], [2, 9, -1]], "list 1"),
        ([[0, 1, 2], [3, -1, -1]], "list 1.*one item"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            aggregate_rankings(torch.tensor([good, bad, good]), 4)
        assert " of entry 1 of the batch" in str(raised.value)


def test_other_methods_and_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match=r"method='elo': choose one of \('hodge', 'borda'\)"):
        aggregate_rankings([[0, 1]], 2, "elo")
    for wrong in (1, 0, -3, 2.0, None, True):
        with pytest.raises(ValueError, match="num_items=.*at least 2"):
            comparison_counts([[0, 1]], wrong)


# ---- schedules of fifty candidates


def ranked(lists, scores, sigma, generator):
    """Each list best first by scores (B, 50) with noise of its own; -1 stays last."""
    values = scores.gather(1, lists.clamp(min=0).flatten(1)).view(lists.shape)
    values = values + sigma * torch.randn(values.shape, generator=generator)
    values = values.masked_fill(lists < 0, -torch.inf)
    return lists.gather(2, values.argsort(dim=2, descending=True))


def joined(*parts):
    return torch.cat([torch.nn.functional.pad(part, (0, 10 - part.shape[2]), value=-1) for part in parts], 1)


def play(sigma, seed, trials=TRIALS):
    """{schedule: (trials, 50) scores by least squares, by win rate}, {k: winners of the knock-out}, true scores."""
    g = seeded(seed)
    truth = torch.randn(trials, 50, generator=g)

    def rank(lists):
        return ranked(lists, truth, sigma, g)

    naive = {k: knock_out(rank, 50, k, batch=trials) for k in (5, 10)}
    schedules = {
        "released": joined(
            naive[5][1], rank(random_lists(50, 5, 20, g, trials)), rank(random_lists(50, 10, 30, g, trials))
        ),
        "partitions": joined(*(rank(partitions(50, k, 10, g, trials)) for k in (5, 10))),
        "covering": joined(*(rank(covering_lists(50, k, 1, g, trials)) for k in (5, 10))),
        "all": joined(
            naive[5][1],
            naive[10][1],
            rank(covering_lists(50, 5, 1, g, trials)),
            rank(covering_lists(50, 10, 2, g, trials)),
        ),
    }
    found = {
        name: tuple(aggregate_rankings(lists, 50, method) for method in ("hodge", "borda"))
        for name, lists in schedules.items()
    }
    return found, {k: winner for k, (winner, _) in naive.items()}, truth


def first(picks, truth):
    return (picks == truth.argmax(1)).float().mean().item()


def place(picks, truth):
    return (1 + (truth > truth.gather(1, picks[:, None])).sum(1)).float().mean().item()


def test_without_noise_the_best_is_found_as_often_as_theory_says_and_not_always():
    found, naive, truth = play(0.0, seed=0)
    tops = {name: [first(scores.argmax(1), truth) for scores in both] for name, both in found.items()}
    hodge = {"released": 0.76, "partitions": 0.64, "covering": 0.86, "all": 0.96}
    # three standard errors of a share of 400, twice as the numbers are from 400 too
    assert {name: top[0] for name, top in tops.items()} == pytest.approx(hodge, abs=0.1)
    assert all(top[1] >= 0.94 for top in tops.values())
    assert all(first(winner, truth) == 1 for winner in naive.values())
    # Kendall's tau of what is found and the truth
    for hodge, _ in found.values():
        order = (hodge[:, :, None] - hodge[:, None]).sign() * (truth[:, :, None] - truth[:, None]).sign()
        assert order.sum((1, 2)).mean() / (50 * 49) > 0.94


@pytest.mark.parametrize(
    ("sigma", "knocked", "tops", "places"),
    [
        (0.5, (0.50, 0.51), (0.63, 0.65, 0.73, 0.80), (1.7, 1.5, 1.4, 1.3)),
        (1.0, (0.33, 0.31), (0.51, 0.61, 0.61, 0.69), (2.5, 1.7, 1.8, 1.5)),
        (2.0, (0.16, 0.15), (0.29, 0.44, 0.45, 0.49), (5.0, 2.8, 3.1, 2.4)),
    ],
)
def test_under_noise_aggregation_beats_the_knock_out_by_what_was_measured(sigma, knocked, tops, places):
    found, naive, truth = play(sigma, seed=int(10 * sigma))
    won = [first(naive[k], truth) for k in (5, 10)]
    assert won == pytest.approx(knocked, abs=0.1)
    picks = [hodge.argmax(1) for hodge, _ in found.values()]
    assert [first(pick, truth) for pick in picks] == pytest.approx(tops, abs=0.1)
    assert [place(pick, truth) for pick in picks] == pytest.approx(places, rel=0.25)
    for (hodge, borda), pick in zip(found.values(), picks):
        assert first(pick, truth) > max(won)
        assert place(pick, truth) < min(place(naive[k], truth) for k in (5, 10))
        assert abs(first(borda.argmax(1), truth) - first(pick, truth)) < 0.1


@pytest.mark.alone
def test_a_thousand_aggregations_take_little_time():
    lists = joined(*(covering_lists(50, k, 1, seeded(), 1000) for k in (5, 10)))
    times = []
    for _ in range(3):
        started = time.process_time()
        aggregate_rankings(lists, 50)
        times.append(time.process_time() - started)
    assert min(times) < 1
