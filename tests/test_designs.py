"""Covering designs against their definition and bound; schedules against what each of them promises."""

import importlib.util
import itertools
import time
from pathlib import Path

import pytest
import torch

from hf_effdl.vicl.remote_code import ranker_covering_tables as covering_tables
from hf_effdl.vicl.remote_code import ranker_designs as designs
from hf_effdl.vicl.remote_code.ranker_aggregation import aggregate_rankings, comparison_counts
from hf_effdl.vicl.remote_code.ranker_designs import (
    covering_design,
    covering_lists,
    knock_out,
    partitions,
    random_lists,
    schoenheim_bound,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def meetings(blocks, v):
    """How often every two distinct points are together, from the incidence of points and blocks."""
    within = (blocks[:, :, None] == torch.arange(v)).any(1).double()
    return (within.T @ within).long() * (1 - torch.eye(v, dtype=torch.long))


def is_covering(blocks, v, k):
    distinct = (blocks.sort(1).values.diff(dim=1) > 0).all()
    inside = blocks.min() >= 0 and blocks.max() < v
    return blocks.shape[1] == k and distinct and inside and (meetings(blocks, v) + torch.eye(v) >= 1).all()


# ---- designs


@pytest.mark.parametrize("k", [3, 5, 10])
def test_designs_of_the_sizes_in_use_cover_every_pair_in_few_blocks(k):
    above = []
    for v in range(k, 51):
        blocks = covering_design(v, k)
        assert blocks.dtype == torch.long and is_covering(blocks, v, k), (v, k)
        bound = schoenheim_bound(v, k)
        assert bound <= len(blocks) <= 1.25 * bound + 1, (v, k, len(blocks))
        above.append(len(blocks) / bound)
    assert sum(above) / len(above) < {3: 1.02, 5: 1.1, 10: 1.15}[k]


def test_designs_of_any_size_up_to_60_cover_every_pair_and_are_made_at_once():
    for v in range(2, 61, 3):
        for k in {2, 4, 7, 8, 13, v // 2, v - 1, v} & set(range(2, v + 1)):
            started = time.process_time()
            blocks = covering_design(v, k)
            assert time.process_time() - started < 1, (v, k)
            assert is_covering(blocks, v, k), (v, k)
            assert len(blocks) <= 2 * schoenheim_bound(v, k) + 1, (v, k, len(blocks))


@pytest.mark.parametrize(("v", "k", "blocks"), [(7, 3, 7), (9, 3, 12), (21, 5, 21), (25, 5, 30), (6, 6, 1), (4, 2, 6)])
def test_where_every_pair_can_be_together_exactly_once_it_is(v, k, blocks):
    design = covering_design(v, k)
    assert len(design) == blocks == schoenheim_bound(v, k)
    assert torch.equal(meetings(design, v), 1 - torch.eye(v, dtype=torch.long))


def test_bounds_known_from_the_literature():
    assert [schoenheim_bound(v, 5) for v in (10, 20, 25, 40, 43, 45, 50)] == [6, 20, 30, 80, 95, 99, 130]
    assert [schoenheim_bound(v, 10) for v in (11, 20, 25, 40, 43, 50)] == [3, 6, 8, 20, 22, 30]
    assert schoenheim_bound(8, 8) == 1 and schoenheim_bound(8, 2) == 28
    assert len(covering_design(50, 10)) == 30 and len(covering_design(50, 5)) <= 135  # as few as can be, or nearly
    assert is_covering(covering_design(90, 6), 90, 6)  # no table is as large
    assert len(covering_design(90, 6)) < 1.5 * schoenheim_bound(90, 6)


def test_a_design_is_the_same_at_every_call_and_its_own_at_each():
    first = covering_design(17, 5)
    kept = first.clone()
    first[:] = 0
    assert torch.equal(covering_design(17, 5), kept)
    designs._design.cache_clear()
    assert torch.equal(covering_design(17, 5), kept)


def test_a_needless_block_is_left_out_and_a_short_one_filled_with_whom_it_met_least():
    blocks = [[0, 1, 2], [0, 1, 3], [2, 3], [0, 1]]
    filled = designs._filled_up(blocks, 5, 3)
    assert filled[:2] == blocks[:2] and filled[2] == [2, 3, 4] and filled[3][2] == 4
    kept = designs._without_needless([[0, 1, 2], [0, 1], [1, 2], [0, 3], [1, 3], [2, 3]], 4)
    assert sorted(kept) == [[0, 1, 2], [0, 3], [1, 3], [2, 3]]


MAKERS = (covering_design, schoenheim_bound, covering_lists, partitions)
MAKERS += (lambda v, k: random_lists(v, k, 3), lambda v, k: knock_out(lambda x: x, v, k))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((1, 1), ValueError, "v=1.*nothing to compare"),
        ((5, 1), ValueError, "k=1.*2 to 5"),
        ((5, 6), ValueError, "k=6 is more than the v=5"),
        ((5.0, 2), TypeError, "v=5.0"),
        ((5, True), TypeError, "k=True"),
        ((0, 2), ValueError, "v=0"),
        ((5, -2), ValueError, "k=-2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(given, error, words):
    for make in MAKERS:
        with pytest.raises(error, match=words):
            make(*given)


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (random_lists, (5, 2, 0), "count=0"),
        (partitions, (5, 2, 0), "passes=0"),
        (covering_lists, (5, 2, 1.5), "passes=1.5"),
        (covering_lists, (5, 2, 1, None, 0), "batch=0"),
        (knock_out, (lambda x: x, 5, 2, 0), "batch=0"),
        (knock_out, (lambda lists: lists.argsort(2) + 1, 8, 4), "positions of each list themselves"),
        (knock_out, (lambda lists: lists[..., 0], 8, 4), "positions of each list themselves"),
        (knock_out, (lambda lists: lists.flip(2), 6, 4), "the padding of a list goes last"),
    ],
)
def test_counts_below_one_and_rankers_that_return_something_else_are_refused(make, given, words):
    with pytest.raises(ValueError, match=words):
        make(*given)


# ---- the table and how it is found


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[1] / "examples" / "benchmarks" / "covering_designs.py"
    spec = importlib.util.spec_from_file_location("covering_designs", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_line_of_the_table_is_a_covering_design():
    for k, text in covering_tables.DESIGNS.items():
        lines = text.split("\n")[1:-1]
        assert len({line.split()[0] for line in lines}) == len(lines)
        for line in lines:
            v = int(line.split()[0])
            assert is_covering(torch.tensor(designs._unfolded(line)), v, k), line


@pytest.mark.parametrize(("v", "k", "blocks"), [(7, 3, 7), (10, 5, 6), (13, 4, 13), (15, 3, 35)])
def test_the_search_finds_small_designs_that_can_not_be_smaller(script, v, k, blocks):
    m, base = script.search(v, k, known=blocks + 1, seconds=30, seed=0)
    unfolded = torch.tensor(designs._unfolded(script.line(v, m, base)))
    assert is_covering(unfolded, v, k) and len(unfolded) == blocks == schoenheim_bound(v, k)
    assert script.search(v, k, known=blocks, seconds=30, seed=0) is None


# ---- schedules


@pytest.mark.parametrize(
    "make",
    [
        lambda *a: random_lists(12, 5, 7, *a),
        lambda *a: partitions(12, 5, 4, *a),
        lambda *a: covering_lists(12, 5, 2, *a),
    ],
)
def test_schedules_follow_their_generator_and_differ_between_queries_of_a_batch(make):
    one, batch = make(seeded()), make(seeded(), 3)
    assert batch.shape == (3, *one.shape) and one.shape[1] == 5 and one.dtype == torch.long
    assert torch.equal(make(seeded()), one) and not torch.equal(make(seeded(1)), one)
    assert not torch.equal(batch[0], batch[1]) and not torch.equal(batch[1], batch[2])
    assert (batch.sort(2).values.diff(dim=2) > 0).all() and batch.min() == 0 and batch.max() == 11
    assert torch.equal(make(seeded(), 1)[0], one)
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(0)
    assert torch.equal(make(), first)


def test_random_lists_are_uniform():
    lists = random_lists(6, 3, 6000, seeded())
    shares = torch.zeros(6, 3).index_put_((lists, torch.arange(3).expand_as(lists)), torch.tensor(1.0), True) / 6000
    assert (shares - 1 / 6).abs().max() < 0.025
    together = meetings(lists, 6)[~torch.eye(6, dtype=torch.bool)] / 6000
    assert (together - 0.2).abs().max() < 0.03


@pytest.mark.parametrize(("v", "k"), [(50, 10), (12, 3), (13, 6), (7, 3), (5, 5), (11, 10)])
def test_every_pass_of_a_partition_has_every_candidate_and_no_short_list(v, k):
    lists = partitions(v, k, passes=3, generator=seeded())
    length = -(-v // k)
    assert lists.shape == (3 * length, k)
    for one in lists.split(length):
        flat = one.flatten()
        assert sorted(flat[:v].tolist()) == list(range(v))
        # the last list goes on from the start of the pass
        assert torch.equal(flat[v:], flat[: len(flat) - v])
        assert all(len(set(row)) == k for row in one.tolist())
    assert not torch.equal(lists[:length], lists[length : 2 * length])


def test_each_pass_over_a_design_is_shuffled_by_itself():
    lists = covering_lists(20, 5, passes=3, generator=seeded(), batch=2)
    design = covering_design(20, 5)
    size = len(design)
    assert lists.shape == (2, 3 * size, 5)
    multiplicities = meetings(design, 20).flatten().sort().values
    seen = []
    for one in lists.flatten(0, 1).split(size):
        assert is_covering(one, 20, 5)
        assert torch.equal(meetings(one, 20).flatten().sort().values, multiplicities)
        seen.append(one)
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(seen, 2))
    # every point is anybody
    first = torch.stack([covering_lists(6, 3, 1, seeded(s))[0, 0] for s in range(200)])
    assert len(first.unique()) == 6


# ---- knock-out


def ranker(scores, calls=None):
    """Ranks by `(B, v)` scores."""

    def rank(lists):
        if calls is not None:
            calls.append(lists.clone())
        values = scores.gather(1, lists.clamp(min=0).flatten(1)).view(lists.shape).masked_fill(lists < 0, -torch.inf)
        return lists.gather(2, values.argsort(dim=2, descending=True, stable=True))

    return rank


@pytest.mark.parametrize(("k", "levels"), [(10, [5, 1]), (5, [10, 2, 1])])
def test_a_knock_out_of_fifty_takes_6_lists_of_10_or_13_of_5_and_finds_the_best(k, levels):
    scores, calls = torch.rand(8, 50, generator=seeded()), []
    winner, lists = knock_out(ranker(scores, calls), 50, k, batch=8)
    assert torch.equal(winner, scores.argmax(1))
    assert lists.shape == (8, sum(levels), k) and [call.shape[1] for call in calls] == levels
    # the given order is cut, not a shuffled one
    assert torch.equal(calls[0][3].flatten(), torch.arange(50))
    assert torch.equal(calls[1][0].flatten()[: levels[0]], scores[0].view(-1, k).argmax(1) + torch.arange(0, 50, k))


@pytest.mark.parametrize(("v", "k"), [(11, 10), (2, 2), (7, 2), (12, 5), (26, 5), (5, 5), (9, 4)])
def test_a_knock_out_ranks_no_list_of_one_and_all_its_lists_connect_the_candidates(v, k):
    scores, calls = torch.rand(3, v, generator=seeded(v)), []
    winner, lists = knock_out(ranker(scores, calls), v, k, batch=3)
    assert torch.equal(winner, scores.argmax(1))
    assert ((lists >= 0).sum(2) >= 2).all() and lists.shape[2] == k
    assert all(call.shape[2] <= k for call in calls)
    theta = aggregate_rankings(lists, v)  # raises where they do not
    above = comparison_counts(lists, v)
    right = scores[:, :, None] > scores[:, None]
    assert (above[~right] == 0).all() and above.sum() > 0
    assert (theta.gather(1, winner[:, None])[:, 0] > theta.gather(1, scores.argmin(1)[:, None])[:, 0]).all()
