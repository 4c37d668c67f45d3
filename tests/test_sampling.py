"""Drawing rows: hashed numbers, water-filling, four samplers, quotas and weights against oracles and frequencies."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_effdl.samples.drawing.checks import check_budget, check_rows, check_scores
from hf_effdl.samples.drawing.draws import PrioritySampler, draw, priority_sample, sequential_draw, top_k
from hf_effdl.samples.drawing.hashing import hashed_uniform
from hf_effdl.samples.drawing.probabilities import clip_scores, inclusion_probabilities, mix_uniform
from hf_effdl.samples.drawing.quotas import class_quotas, strata, without_hardest
from hf_effdl.samples.drawing.weights import kish_size, loss_weights


NAN, INF = float("nan"), float("inf")
few = settings(max_examples=80, deadline=None, derandomize=True)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=rtol, atol=atol)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def skewed(rows, seed=0):
    """Scores over three powers of ten."""
    return torch.exp(1.5 * torch.randn(rows, dtype=torch.float64, generator=generator(seed)))


# ---- the hash

MASK = 2**64 - 1


def splitmix64(state):
    """The first number of the generator with this state, in plain integers."""
    x = (state + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def unsplitmix64(number):
    """The state whose first number is this."""

    def unshift(x, by):
        found = x
        for _ in range(64 // by):
            found = x ^ (found >> by)
        return found

    x = unshift(number, 31)
    x = unshift((x * pow(0x94D049BB133111EB, -1, 2**64)) & MASK, 27)
    x = unshift((x * pow(0xBF58476D1CE4E5B9, -1, 2**64)) & MASK, 30)
    return (x - 0x9E3779B97F4A7C15) & MASK


def keys(seed, salt):
    return splitmix64((2 * seed + 1) & MASK), splitmix64((salt + 0x9E3779B97F4A7C15) & MASK)


def naive_uniform(seed, row, salt=0):
    first, second = keys(seed, salt)
    number = splitmix64(splitmix64((row + first) & MASK) ^ second)
    return ((number >> 12) + 0.5) / 2**52


def test_the_reference_generator_has_the_published_numbers():
    states = [(1234567 + k * 0x9E3779B97F4A7C15) & MASK for k in range(3)]
    assert [splitmix64(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


ids_ = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-5, 1000))


@few
@given(st.lists(ids_, min_size=1, max_size=8), st.integers(-3, 2**40), st.integers(0, 9))
@example([2**63 - 1, -(2**63), 0, -1], 0, 0)
def test_hashed_numbers_are_those_of_the_reference(rows, seed, salt):
    # pinned, as the same seed must give the same rows in every version
    got = hashed_uniform(seed, rows, salt)
    assert got.dtype == torch.float64
    assert got.tolist() == [naive_uniform(seed, row, salt) for row in rows]
    assert torch.equal(got, hashed_uniform(seed, torch.tensor(rows), salt))
    names = [f"Zürich/{row}.png" for row in rows]
    numbers = [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little") for n in names]
    assert hashed_uniform(seed, names, salt).tolist() == [naive_uniform(seed, number, salt) for number in numbers]
    assert torch.equal(hashed_uniform(seed, np.array(names), salt), hashed_uniform(seed, names, salt))


def test_hashed_numbers_are_never_zero_or_one():
    # the ids whose mixed 64 bits are all zeros and all ones
    first, second = keys(0, 0)
    rows = [(unsplitmix64(unsplitmix64(number) ^ second) - first) & MASK for number in (0, MASK)]
    rows = [row - 2**64 if row >= 2**63 else row for row in rows]
    low, high = hashed_uniform(0, rows).tolist()
    assert 0 < low < 1e-15
    assert 1 - 1e-15 < high < 1
    # so a certain row is in whatever its hash
    assert draw(tensor(1.0, 1.0), row_ids=rows)[0].tolist() == [0, 1]


# ---- scores into probabilities


def by_bisection(scores, budget):
    """`min(1, s t)` with the t for which it sums to the budget."""
    low, high = 0.0, 1.0
    while sum(min(1.0, s * high) for s in scores) < budget * (1 - 1e-15):
        high *= 2
        if high > 1e300:
            break
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, s * middle) for s in scores) < budget else (low, middle)
    return [min(1.0, s * high) for s in scores]


@few
@given(
    st.lists(st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1.0, 2.0, 50.0])), min_size=1, max_size=12),
    st.floats(0.01, 0.999),
)
@example([1.0, 1.0, 1.0, 1.0], 0.5)
@example([4.0, 1.0, 1.0, 1.0, 1.0], 0.4)
@example([1000.0, 10.0, 1.0, 1.0], 0.75)
def test_probabilities_are_the_water_filling_of_a_bisection(scores, share):
    budget = share * len(scores)
    got = inclusion_probabilities(torch.tensor(scores, dtype=torch.float64), budget)
    close(got, by_bisection(scores, budget), rtol=1e-8)
    assert float(got.sum()) == pytest.approx(budget, rel=1e-12)
    assert ((0 < got) & (got <= 1)).all()


def test_probabilities_are_in_proportion_where_no_row_is_capped():
    close(inclusion_probabilities(tensor(1, 2, 3, 4), 2), [0.2, 0.4, 0.6, 0.8])
    close(inclusion_probabilities(tensor(1, 2, 3, 4), 2.5), [0.25, 0.5, 0.75, 1.0])
    close(inclusion_probabilities([1e-50, 2e-50, 5e-50], 1), [0.125, 0.25, 0.625])
    # the surplus of the capped row goes to the others in proportion
    close(inclusion_probabilities(tensor(90, 1, 2, 3), 2.5), [1, 0.25, 0.5, 0.75])
    assert inclusion_probabilities(torch.tensor([1.0, 2]), 1).dtype == torch.float64


def test_a_budget_of_all_rows_takes_every_row():
    scores = torch.cat([skewed(50), torch.zeros(5)])
    assert inclusion_probabilities(scores, 55).tolist() == [1.0] * 55
    assert draw(inclusion_probabilities(scores, 55))[0].tolist() == list(range(55))
    positions, weights = priority_sample(scores, 55)
    assert positions.tolist() == list(range(55)) and weights.tolist() == [1.0] * 55
    assert weights.dtype == priority_sample(scores, 54)[1].dtype == torch.float64
    assert sequential_draw(scores, 55).tolist() == top_k(scores, 55).tolist() == list(range(55))


def test_rows_of_score_zero_are_drawn_when_nothing_else_is_left_and_then_alike():
    close(inclusion_probabilities(tensor(5, 0, 1, 0, 0), 3), [1, 1 / 3, 1, 1 / 3, 1 / 3])
    few_left = inclusion_probabilities(tensor(5, 0, 1, 0), 2)
    assert few_left[[1, 3]].max() < 1e-30 and few_left.min() > 0
    close(inclusion_probabilities(torch.zeros(4), 1), torch.full((4,), 0.25))
    scores = torch.tensor([0.0] * 6 + [2.0, 1.0])
    counts = torch.zeros(8)
    for seed in range(600):
        assert set(priority_sample(scores, 2, seed=seed)[0].tolist()) == {6, 7}
        assert set(sequential_draw(scores, 2, seed=seed).tolist()) == {6, 7}
        rows, weights = priority_sample(scores, 4, seed=seed)
        assert weights[-2:].tolist() == [1, 1]
        counts[rows] += 1
    assert scipy.stats.chisquare(counts[:6].numpy()).pvalue > 1e-3


@few
@given(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.floats(0, 1), st.floats(1e-3, 100))
def test_clipping_takes_the_smaller_of_score_and_cap(scores, quantile, value):
    given_ = torch.tensor(scores, dtype=torch.float64)
    close(clip_scores(given_, quantile=quantile), np.minimum(scores, np.quantile(scores, quantile)))
    close(clip_scores(given_, value=value), np.minimum(scores, value))


def test_mixing_keeps_the_sum_and_bounds_the_weights():
    probabilities = inclusion_probabilities(skewed(400), 50)
    mixed = mix_uniform(probabilities, 0.2)
    assert float(mixed.sum()) == pytest.approx(50)
    assert float(1 / mixed.min()) <= 400 / (0.2 * 50)
    close(mixed, 0.8 * probabilities + 0.2 * 50 / 400)
    assert torch.equal(mix_uniform(probabilities, 0), probabilities)
    close(mix_uniform(probabilities, 1), [50 / 400] * 400)
    assert mix_uniform(torch.tensor([0.5, 0.25]), 0.1).dtype == torch.float64


# ---- the samplers


def poisson(scores, budget, seed=0, row_ids=None):
    return draw(inclusion_probabilities(scores, budget), seed=seed, row_ids=row_ids)


def sequential(scores, budget, seed=0, row_ids=None):
    return sequential_draw(scores, budget, seed=seed, row_ids=row_ids), None


SAMPLERS = [poisson, priority_sample, sequential]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_depends_on_seed_and_row_ids_and_not_on_the_order(sampler, named):
    scores, order = skewed(300), torch.randperm(300, generator=generator(1))
    rows = torch.arange(300) * 7 - 1000
    ids = [f"row {i}" for i in rows.tolist()] if named else rows
    positions, weights = sampler(scores, 60, seed=3, row_ids=ids)
    assert torch.equal(positions, positions.sort().values)
    moved = [ids[i] for i in order] if named else rows[order]
    shuffled, its_weights = sampler(scores[order], 60, seed=3, row_ids=moved)
    assert torch.equal(shuffled, shuffled.sort().values)
    assert torch.equal(order[shuffled].sort().values, positions)
    if weights is not None:
        close(its_weights[order[shuffled].argsort()], weights)
    for seed, other in ((4, ids), (3, rows + 1), (3, None)):
        assert not torch.equal(sampler(scores, 60, seed=seed, row_ids=other)[0], positions)
    # positions name the rows if nothing else is said
    assert torch.equal(sampler(scores, 60)[0], sampler(scores, 60, row_ids=torch.arange(300))[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_larger_budget_draws_a_superset(sampler):
    scores, before = skewed(200), set()
    for budget in range(1, 201):
        rows = sampler(scores, budget, seed=1)[0].tolist()
        assert before <= set(rows) and len(set(rows)) == len(rows)
        assert sampler is poisson or len(rows) == budget
        before = set(rows)
    assert len(before) == 200


def test_a_poisson_draw_takes_each_row_whose_number_is_below_its_chance():
    probabilities = inclusion_probabilities(skewed(2000), 400)
    for seed in range(5):
        u = hashed_uniform(seed, torch.arange(2000))
        positions, weights = draw(probabilities, seed=seed)
        assert positions.tolist() == (u < probabilities).nonzero().flatten().tolist()
        close(weights, 1 / probabilities[positions])
        # the numbers are uniform, and neighbours know nothing of each other
        assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(2000)
    assert draw(torch.ones(3))[1].dtype == torch.float64
    assert [len(part) for part in draw(torch.ones(0))] == [0, 0]


@pytest.mark.parametrize("sampler", [poisson, priority_sample])
def test_weighted_sums_are_unbiased(sampler):
    # no score is far below the values, or the variance would hide a bias
    scores = skewed(80).sqrt() + 0.5
    values = torch.stack([torch.ones(80).double(), scores + skewed(80, 1).sqrt(), skewed(80, 2).sqrt()], 1)
    totals = []
    for seed in range(2000):
        positions, weights = sampler(scores, 20, seed=seed)
        assert (weights >= 1).all()
        totals.append((weights[:, None] * values[positions]).sum(0))
    totals = torch.stack(totals)
    error = totals.std(0) / math.sqrt(len(totals))
    assert ((totals.mean(0) - values.sum(0)).abs() < 3.5 * error).all()
    assert (error < 0.02 * values.sum(0)).all()  # or the line above says nothing


def test_priority_weights_are_those_of_the_next_key():
    scores, u = skewed(50), hashed_uniform(4, torch.arange(50))
    by_key = sorted(range(50), key=lambda i: -float(scores[i] / u[i]))
    positions, weights = priority_sample(scores, 9, seed=4)
    assert positions.tolist() == sorted(by_key[:9])
    tau = scores[by_key[9]] / u[by_key[9]]
    close(weights, 1 / (scores[positions] / tau).clamp(max=1))
    assert (weights == 1).any() and (weights > 1).any()


def test_sequential_draws_have_the_chances_of_drawing_row_after_row():
    scores = [5.0, 2.0, 1.0, 1.0, 0.5]
    expected = np.zeros(5)
    for order in itertools.permutations(range(5), 3):
        chance, left = 1.0, sum(scores)
        for i in order:
            chance, left = chance * scores[i] / left, left - scores[i]
        expected[list(order)] += chance
    counts = np.zeros(5)
    for seed in range(2000):
        counts[sequential_draw(torch.tensor(scores), 3, seed=seed).numpy()] += 1
    error = np.sqrt(expected * (1 - expected) / 2000)
    assert (np.abs(counts / 2000 - expected) < 4 * error).all()


def test_sequential_draws_are_those_of_the_smallest_waiting_times():
    scores, u = skewed(50), hashed_uniform(4, torch.arange(50))
    by_time = sorted(range(50), key=lambda i: -math.log(u[i]) / float(scores[i]))
    assert sequential_draw(scores, 9, seed=4).tolist() == sorted(by_time[:9])


def test_the_largest_scores_come_first_rows_first():
    scores = tensor(3, 1, 3, 2, 3, 0)
    assert [top_k(scores, budget).tolist() for budget in (1, 2, 3, 4)] == [[0], [0, 2], [0, 2, 4], [0, 2, 3, 4]]
    assert top_k((torch.arange(50_000) % 2).float(), 9).tolist() == list(range(1, 19, 2))


# ---- priority sampling over parts


def shards(rows, count):
    return torch.randperm(rows, generator=generator(9)).tensor_split(count)


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("peek", [False, True])
@pytest.mark.parametrize("budget", [250, 3004])
def test_one_sampler_fed_by_parts_draws_what_one_call_draws(count, peek, budget):
    scores = torch.cat([skewed(3000), torch.zeros(7)])
    rows = 11 * torch.arange(3007) - 4000
    positions, weights = priority_sample(scores, budget, seed=2, row_ids=rows)
    sampler = PrioritySampler(budget, seed=2)
    for part in shards(3007, count):
        sampler.add(scores[part], rows[part])
        if peek:  # drops all rows but the best so far
            sampler.threshold()
    ids, probabilities = sampler.result()
    assert torch.equal(ids, rows[positions])
    close(probabilities, 1 / weights)
    assert sampler.rows == 3007


@pytest.mark.parametrize("peek", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_samplers_merge_in_any_order(seed, peek):
    scores, budget = skewed(2000), 100
    positions, weights = priority_sample(scores, budget, seed=5)
    samplers = []
    for part in shards(2000, 16):
        samplers.append(PrioritySampler(budget, seed=5))
        samplers[-1].add(scores[part], part)
        if peek:
            samplers[-1].threshold()
    g = generator(seed)
    while len(samplers) > 1:
        i, j = torch.randperm(len(samplers), generator=g)[:2].tolist()
        merged = samplers[i].merge(samplers[j])
        assert merged is samplers[i]
        samplers.pop(j)
        if peek:
            merged.threshold()
    ids, probabilities = samplers[0].result()
    assert torch.equal(ids, positions)
    close(probabilities, 1 / weights)
    assert samplers[0].rows == 2000


def test_a_sampler_keeps_a_few_budgets_of_rows_only():
    # over a million offered at once are cut down at once
    sampler, scores = PrioritySampler(10, seed=1), torch.rand(600_000, generator=generator(0))
    sampler.add(scores, torch.arange(600_000))
    sampler.add(scores, torch.arange(600_000, 1_200_000))
    assert sum(len(part[0]) for part in sampler._parts) == 11
    expected, _ = priority_sample(scores.repeat(2), 10, seed=1)
    # what cannot be in is not kept at all
    sampler.add(torch.full((1000,), 1e-9), torch.arange(2_000_000, 2_001_000))
    assert sum(len(part[0]) for part in sampler._parts) == 11
    assert torch.equal(sampler.result()[0], expected)
    assert sampler.rows == 1_201_000


def test_a_sampler_with_as_many_rows_as_its_budget_has_them_all():
    sampler = PrioritySampler(4)
    assert sampler.threshold() == 0
    sampler.add([], [])
    sampler.add(torch.ones(0), torch.arange(0))
    with pytest.raises(ValueError, match="budget=4.*up to the 0 there are"):
        sampler.result()
    sampler.add(torch.rand(3), [9, 2, 7])
    with pytest.raises(ValueError, match="budget=4.*up to the 3 there are"):
        sampler.result()
    sampler.add(torch.rand(1), [4])
    ids, probabilities = sampler.result()
    assert ids.tolist() == [2, 4, 7, 9] and probabilities.tolist() == [1.0] * 4
    assert sampler.threshold() == 0
    sampler.add(torch.rand(1), [1])
    assert sampler.threshold() > 0 and len(sampler.result()[0]) == 4 and sampler.rows == 5
    for other in (PrioritySampler(3), PrioritySampler(4, seed=2)):
        with pytest.raises(ValueError, match=rf"\(4, 0\) and \({other.budget}, {other.seed}\).*make them alike"):
            sampler.merge(other)


# ---- shares of the budget

counts_ = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


@few
@given(counts_, st.floats(0, 1), st.integers(0, 5))
def test_quotas_are_the_evenest_that_fit(counts, share, seed):
    present, total = sum(c > 0 for c in counts), sum(counts)
    budget = present + round(share * (total - present))
    quotas = class_quotas(torch.tensor(counts), budget, seed=seed).tolist()
    assert sum(quotas) == budget
    assert all(0 <= q <= c for q, c in zip(quotas, counts))
    assert all(q > 0 for q, c in zip(quotas, counts) if c)
    # a class that could take one more is at most one row behind any other
    assert all(q == c or q >= max(quotas) - 1 for q, c in zip(quotas, counts))
    # one more row of budget is one more row for one class
    if budget < total:
        more = class_quotas(torch.tensor(counts), budget + 1, seed=seed).tolist()
        assert sorted(m - q for m, q in zip(more, quotas)) == [0] * (len(counts) - 1) + [1]


def test_quotas_by_hand():
    assert class_quotas(torch.tensor([100, 3, 0, 100]), 31).tolist() == [14, 3, 0, 14]
    assert class_quotas(torch.tensor([10, 1, 2, 50]), 33).tolist() == [10, 1, 2, 20]
    assert class_quotas(torch.tensor([5, 5, 0, 5]), 3).tolist() == [1, 1, 0, 1]
    for counts in ([5, 9], torch.tensor([5.0, 9.0]), torch.tensor([5, 9], dtype=torch.uint8), np.array([5, 9])):
        quotas = class_quotas(counts, 12)
        assert quotas.tolist() == [5, 7] and quotas.dtype == torch.int64


def test_rows_that_do_not_divide_go_to_random_classes():
    counts = torch.zeros(5)
    for seed in range(1000):
        quotas = class_quotas(torch.full((5,), 50), 52, seed=seed)
        assert sorted(quotas.tolist()) == [10, 10, 10, 11, 11]
        # by the numbers that no row's draw uses
        expected = hashed_uniform(seed, torch.arange(5), salt=1).argsort()[:2]
        assert set((quotas == 11).nonzero().flatten().tolist()) == set(expected.tolist())
        counts += quotas - 10
    assert ((counts - 400).abs() < 4 * math.sqrt(1000 * 0.4 * 0.6)).all()
    for budget in range(51, 55):
        counts = torch.full((5,), 50)
        assert torch.equal(class_quotas(counts, budget), class_quotas(counts, budget, seed=0))


def test_strata_count_as_numpy_does():
    scores = torch.randn(5000, dtype=torch.float64, generator=generator(0))
    for bins in (1, 7, 50):
        assert torch.bincount(strata(scores, bins), minlength=bins).tolist() == np.histogram(scores, bins)[0].tolist()
    assert torch.equal(strata(scores), strata(scores, 50))
    assert strata(tensor(-1, 0, 1, 2, 3), 2).tolist() == [0, 0, 1, 1, 1]
    assert strata(tensor(4, 4, 4), 2).tolist() == [0, 0, 0]
    assert torch.equal(strata(scores.half()), strata(scores.half().double()))


def test_leaving_out_the_hardest_leaves_out_that_share_of_the_largest():
    scores = skewed(200)
    stays = without_hardest(scores, 0.1)
    assert int((~stays).sum()) == 20 and scores[~stays].min() > scores[stays].max()
    assert without_hardest(scores, 0).all()
    assert int((~without_hardest(torch.rand(100), 0.29)).sum()) == 29  # 0.29 * 100 is less in binary
    assert int((~without_hardest(torch.rand(10), 0.99)).sum()) == 9  # never a row more than the share
    assert without_hardest(tensor(-3, -1, -2), 0.4).tolist() == [True, False, True]
    assert without_hardest(tensor(1, 1, 1), 0.4).tolist() == [False, True, True]
    assert not without_hardest((torch.arange(50_000) % 2).float(), 0.1)[1:10_000:2].any()


# ---- weights in the loss


def test_loss_weights_are_their_formulas_with_mean_one():
    p, u, q = tensor(0.1, 0.5, 1.0), tensor(0.0, 0.1, 0.4), tensor(0.0, 0.499, 0.999)
    close(loss_weights("exact", probabilities=p), 3 * tensor(10, 2, 1) / 13)
    close(loss_weights("damped", uncertainty=u), 3 * tensor(10, 10, 2.5) / 22.5)
    close(loss_weights("damped", uncertainty=u, beta=0.2), 3 * tensor(5, 5, 2.5) / 12.5)
    close(loss_weights("p_label", p_label=q), 3 * tensor(0.001, 0.5, 1.0) / 1.501)
    close(loss_weights("p_label", p_label=q, floor=0.5), 3 * tensor(0.5, 0.999, 1.499) / 2.998)
    assert loss_weights("p_label", p_label=tensor(0.2)).tolist() == [1]
    assert loss_weights("none", uncertainty=u.float()).tolist() == [1, 1, 1]
    assert loss_weights("none", p_label=q[:2]).dtype == torch.float64
    for weights in (loss_weights("exact", probabilities=p.float()), loss_weights("none", probabilities=p)):
        assert weights.dtype == torch.float64 and float(weights.mean()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("kind", ["exact", "damped", "p_label", "none"])
def test_weights_take_their_own_column_and_parts_those_of_the_whole_before_division(kind):
    columns = {
        "probabilities": skewed(30).clamp(max=1),
        "uncertainty": skewed(30, 1),
        "p_label": skewed(30, 2).clamp(max=1),
    }
    whole, parts = loss_weights(kind, **columns), []
    for rows in torch.arange(30).split(7):
        given_ = {name: column[rows] for name, column in columns.items()}
        parts.append(loss_weights(kind, **given_, normalise=False))
    close(torch.cat(parts) / torch.cat(parts).mean(), whole)
    if kind != "none":
        name = {"exact": "probabilities", "damped": "uncertainty"}.get(kind, kind)
        raw = {
            "exact": 1 / columns[name],
            "damped": 1 / columns[name].clamp(min=0.1),
            "p_label": columns[name] + 0.001,
        }
        close(torch.cat(parts), raw[kind])
        assert torch.equal(whole, loss_weights(kind, **{name: columns.pop(name)}))
        with pytest.raises(ValueError, match=f"weights='{kind}' needs {name}="):
            loss_weights(kind, **columns)


def test_kish_size_counts_the_rows_that_carry_weight():
    assert kish_size(torch.full((7,), 0.3)) == pytest.approx(7)
    assert kish_size(torch.tensor([2.0, 0, 2, 0])) == 2
    assert kish_size(tensor(1, 2, 3)) == pytest.approx(36 / 14)
    assert kish_size(torch.tensor([1, 1, 2])) == pytest.approx(16 / 6)
    assert kish_size(torch.ones(100_000).half()) == 100_000


# ---- bad input

USES_OF_SCORES = {
    "inclusion_probabilities": lambda s: inclusion_probabilities(s, 2),
    "priority_sample": lambda s: priority_sample(s, 2),
    "sequential_draw": lambda s: sequential_draw(s, 2),
    "top_k": lambda s: top_k(s, 2),
    "clip_scores": lambda s: clip_scores(s, value=1.0),
    "PrioritySampler": lambda s: PrioritySampler(2).add(s, torch.arange(len(s))),
    "strata": lambda s: strata(s, 2),
    "without_hardest": lambda s: without_hardest(s, 0.1),
}


@pytest.mark.parametrize("use", USES_OF_SCORES)
def test_scores_that_are_no_scores_are_refused_with_the_first_row(use):
    def refused(scores, message):
        with pytest.raises(ValueError, match=message):
            USES_OF_SCORES[use](scores)

    for bad in (NAN, INF, -INF):
        refused(torch.tensor([1.0, bad, 2, bad]), f"2 scores are NaN.*first is {bad} at row 1")
    if use in ("strata", "without_hardest"):  # no chances: they may be negative
        USES_OF_SCORES[use](torch.tensor([1.0, 2.0, -0.5]))
        refused(torch.tensor([NAN, -0.5]), "1 scores are NaN or infinite, the first is nan at row 0")
    else:
        refused(torch.tensor([1.0, 2.0, -0.5]), "1 scores are NaN, infinite or negative, the first is -0.5 at row 2")
    for shape in [(4, 1)] if use == "PrioritySampler" else [(4, 1), (0,)]:  # it takes an empty part
        refused(torch.ones(shape), r"scores have shape \(.*one number a row")


def test_scores_of_any_real_type_are_taken():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool):
        scores = torch.tensor([1, 0, 1, 1]).to(dtype)
        close(inclusion_probabilities(scores, 1.5), [0.5, 0, 0.5, 0.5])
        # zeros are drawn too when they must be, and not twice
        scores = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0]).to(dtype)
        for sampler in SAMPLERS:
            for seed in range(5):
                assert torch.equal(sampler(scores, 4, seed=seed)[0], sampler(scores.double(), 4, seed=seed)[0])
    assert check_scores([1, 2]).dtype == torch.float64
    assert not check_scores(torch.ones(2, requires_grad=True)).requires_grad


ROW_BUDGETS = {
    "priority_sample": lambda b: priority_sample(torch.ones(10), b),
    "sequential_draw": lambda b: sequential_draw(torch.ones(10), b),
    "top_k": lambda b: top_k(torch.ones(10), b),
    "class_quotas": lambda b: class_quotas(torch.tensor([10]), b),
}


@pytest.mark.parametrize("budget", [0, -3, 11, NAN, INF, True, None, "5", [5], 2.5])
def test_budgets_that_are_no_number_of_rows_are_refused(budget):
    for use in ROW_BUDGETS.values():
        with pytest.raises(ValueError) as error:
            use(budget)
        assert f"budget={budget!r}: it must be a whole number of rows from 1 up to the 10" in str(error.value)
    if budget != 2.5:
        with pytest.raises(ValueError) as error:
            inclusion_probabilities(torch.ones(10), budget)
        assert f"budget={budget!r}" in str(error.value) and "the 10 rows there are" in str(error.value)


def test_budgets_of_any_number_type_are_taken():
    for budget in (3, 3.0, np.int64(3), np.float32(3), torch.tensor(3), torch.tensor(3.0), np.array(3)):
        assert type(check_rows(budget, 3)) is int and check_rows(budget) == 3
        assert type(check_budget(budget, 3)) is float
    assert check_rows(10**12) == 10**12
    with pytest.raises(ValueError, match="from 1$"):
        PrioritySampler(0)


ONES = torch.ones(4)
UNUSABLE = "come out infinite, NaN.*check {}="
REFUSED = {
    class_quotas: [
        (
            (torch.tensor([5, 5, 0, 5]), 2),
            {},
            r"budget=2 is below the 3 classes.*raise the budget to 3.*quotas='none'",
        ),
        ((torch.tensor([5, 1]), 1), {}, "budget=1 is below the 2 classes"),
        ((torch.tensor([5, 5, 0, 5]), 16), {}, "budget=16.*15 there are"),
    ],
    loss_weights: [
        (("none",), {}, "weights='none' needs one of"),
        (("both",), {"p_label": ONES}, r"weights='both'.*'p_label', 'damped', 'exact', 'none'"),
        (("exact",), {"probabilities": tensor(0, 1)}, UNUSABLE.format("probabilities")),
        (("damped",), {"uncertainty": tensor(0, 0), "beta": 0.0}, UNUSABLE.format("uncertainty")),
        (("damped",), {"uncertainty": tensor(NAN, 0)}, UNUSABLE.format("uncertainty")),
        (("p_label",), {"p_label": tensor(0, 0), "floor": 0.0}, UNUSABLE.format("p_label")),
        (("p_label",), {"p_label": tensor(0.5, 0), "floor": -0.1}, UNUSABLE.format("p_label")),
        (("p_label",), {"p_label": tensor(NAN, 0)}, UNUSABLE.format("p_label")),
    ],
    draw: [
        *(
            ((torch.tensor(bad),), {}, r"probabilities of shape .*inclusion_probabilities\(scores, budget\)")
            for bad in ([0.5, 1.2], [-0.1, 0.5], [NAN, 0.5], [[0.5, 0.5]], 0.5)
        ),
        (([0.5, NAN],), {}, "1 are NaN, the first at row 1"),
    ],
    priority_sample: [
        *(
            ((torch.ones(3), 2), {"row_ids": ids}, "pass one integer or text a row")
            for ids in (torch.zeros(3), [0.5, 1, 2], torch.zeros(3, 1, dtype=torch.long))
        ),
        ((torch.ones(2), 1), {"row_ids": [True, 5]}, "row_ids hold True at row 0"),
    ],
    **{
        sampler: [((torch.ones(10), 5), {"row_ids": torch.arange(n)}, f"{n} row_ids for 10 rows") for n in (9, 11)]
        for sampler in (poisson, sequential)
    },
    PrioritySampler(2).add: [((torch.ones(k), torch.arange(9)), {}, f"9 row_ids for {k} rows") for k in (8, 10)],
    mix_uniform: [((ONES / 2, share), {}, rf"share={share}.*in \[0, 1\]") for share in (-0.1, 1.1, NAN)],
    without_hardest: [((ONES, share), {}, rf"share={share}.*in \[0, 1\)") for share in (-0.1, 1, 1.1, NAN)],
    clip_scores: [
        *(((ONES,), {"quantile": share}, rf"quantile={share}.*in \[0, 1\]") for share in (-0.1, 1.1, NAN)),
        *(((ONES,), {"value": cap}, f"value={cap}.*positive") for cap in (0, -1.0, NAN)),
        ((ONES,), {}, "value= or by quantile=, and by one of them only"),
        ((ONES,), {"value": 1.0, "quantile": 0.5}, "value= or by quantile=, and by one of them only"),
    ],
    strata: [((ONES, 0), {}, "bins=0")],
}


@pytest.mark.parametrize("use", REFUSED)
def test_arguments_that_cannot_be_followed_are_refused(use):
    for arguments, options, message in REFUSED[use]:
        with pytest.raises((ValueError, TypeError), match=message):
            use(*arguments, **options)
