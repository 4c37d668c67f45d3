"""Aggregated rankings against other solvers and closed forms, and how schedules fare with and without noise."""

import numpy as np
import pytest
import torch

from hf_effdl.vicl.remote_code.ranker_aggregation import aggregate_rankings, comparison_counts
from hf_effdl.vicl.remote_code.ranker_designs import covering_design, covering_lists, knock_out, partitions


METHODS = ("hodge", "borda")


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
    theta = aggregate_rankings(lists, 9)
    expected = np.linalg.lstsq(d, np.ones(len(d)), rcond=None)[0]  # the one of mean 0
    assert theta.dtype == torch.float64
    np.testing.assert_allclose(theta.numpy(), expected, atol=1e-10)


def test_hundreds_of_times_as_many_comparisons_of_some_pairs_do_no_harm():
    lists = torch.cat([torch.tensor([[0, 1, 2, 3]]).expand(10_000, 4), torch.tensor([[3, 4, -1, -1]])])
    theta = aggregate_rankings(lists, 5)
    torch.testing.assert_close(theta[3] - theta[4], torch.tensor(1.0, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(theta[:3] - theta[1:4], torch.full((3,), 0.5, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_repeating_reversing_and_renaming(method):
    lists = some_lists(seed=2)
    theta = aggregate_rankings(lists, 9, method)
    torch.testing.assert_close(aggregate_rankings(lists * 3, 9, method), theta)
    torch.testing.assert_close(aggregate_rankings([row[::-1] for row in lists], 9, method), -theta)
    new = torch.randperm(9, generator=seeded())
    renamed = [[int(new[item]) for item in row] for row in lists]
    torch.testing.assert_close(aggregate_rankings(renamed, 9, method)[new], theta)
    assert theta.std() > 0.1


@pytest.mark.parametrize("method", METHODS)
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


def test_win_rates_of_a_small_example():
    found = aggregate_rankings([[0, 1, 2], [2, 3], [0, 3]], 4, "borda")
    torch.testing.assert_close(found, torch.tensor([1, 0, -1 / 3, -1], dtype=torch.float64))


# ---- what is refused


GOOD, APART = [[0, 1, 2, 3], [3, 4, 5, -1]], [[0, 1, -1, -1], [2, 3, 4, 5]]
SOUND = [[0, 1, 2], [2, 3, -1]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("lists", "n", "words"),
    [
        ([[0, 1, 2], [3, 4, 5]], 6, r"3 items \(3, 4, 5\) were never compared.* with the rest:"),
        ([[0, 1, 3]], 4, "item 2 was in none of the lists: rank every item"),
        (torch.tensor([GOOD, APART]), 6, r"2 items \(0, 1\).*with the rest of entry 1 of the batch"),
        ([[0, 2, 3], [4, 1], [5, 0]], 6, r"2 items \(1, 4\) were never"),
        ([list(range(10))], 20, r"10 items \(10, 11, 12, 13, 14, ...\) were in none"),
    ],
)
def test_items_that_were_never_compared_with_the_rest_are_named(method, lists, n, words):
    with pytest.raises(ValueError, match=words):
        aggregate_rankings(lists, n, method)


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
        (torch.tensor([SOUND, [[0, 1, 2], [3, 3, -1]], SOUND]), ValueError, "(?=.*item 3 stands twice).*entry 1 of"),
        (torch.tensor([SOUND, [[0, 1, 2], [2, 9, -1]]]), ValueError, "(?=.*list 1).*entry 1 of the batch"),
        (torch.tensor([SOUND, [[0, 1, 2], [3, -1, -1]]]), ValueError, "(?=.*list 1.*one item).*entry 1 of the batch"),
    ],
)
def test_malformed_lists_are_named(lists, error, words):
    with pytest.raises(error, match=words):
        aggregate_rankings(lists, 4)
    with pytest.raises(ValueError, match=r"method='elo': choose one of \('hodge', 'borda'\)"):
        aggregate_rankings([[0, 1]], 2, "elo")


def test_a_number_of_items_of_numpy_is_a_number():
    assert aggregate_rankings([[0, 1], [1, 2]], np.int64(3)).tolist() == [1, 0, -1]


@pytest.mark.parametrize("wrong", [1, 0, -3, 2.0, None, True])
def test_numbers_of_items_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="num_items=.*at least 2"):
        comparison_counts([[0, 1]], wrong)


# ---- schedules of fifty candidates


def test_under_noise_aggregated_lists_pick_better_than_a_knock_out():
    g, trials = seeded(1), 400
    truth = torch.randn(trials, 50, generator=g)

    def rank(lists):  # best first, with noise of its own for each list; -1 stays last
        values = truth.gather(1, lists.clamp(min=0).flatten(1)).view(lists.shape)
        values = (values + torch.randn(values.shape, generator=g)).masked_fill(lists < 0, -torch.inf)
        return lists.gather(2, values.argsort(dim=2, descending=True))

    def place(picks):
        return (1 + (truth > truth.gather(1, picks[:, None])).sum(1)).float().mean().item()

    knocked = place(knock_out(rank, 50, 10, batch=trials)[0])
    for lists in (covering_lists(50, 5, 1, g, trials), partitions(50, 10, 10, g, trials)):
        ranked = rank(lists)
        assert all(place(aggregate_rankings(ranked, 50, method).argmax(1)) < 0.8 * knocked for method in METHODS)
