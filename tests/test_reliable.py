"""Conformity against loops and scipy, the reliable set's counts and edge cases, refined lists against loops."""

import math

import numpy as np
import pytest
import torch

from hf_effdl.vicl.remote_code.ranker_reliable import conformity, refine, reliable_rows


def drawn(n=6, m=9, seed=0):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.random((n, m))), torch.tensor(rng.random((n, m)))


def by_hand(performance, similarity):
    """-KL of one example, value by value."""
    shares = []
    for values in (performance, similarity):
        low, high = min(values), max(values)
        raised = [((value - low) / (high - low) if high > low else 0) + 1e-6 for value in values]
        shares.append([value / sum(raised) for value in raised])
    return -sum(q * math.log(q / s) for q, s in zip(*shares))


def table(n=20, k=None, seed=0, bad=()):
    """Random candidates as they are measured; performance follows similarity except for `bad` examples."""
    rng = np.random.default_rng(seed)
    k = k or n - 1
    rows = [rng.permutation([i for i in range(n) if i != j])[:k] for j in range(n)]
    candidates = torch.tensor(np.array(rows))
    similarity = torch.tensor(rng.random((n, k)))
    performance = similarity + 0.05 * torch.tensor(rng.random((n, k)))
    flipped = torch.isin(candidates, torch.tensor(list(bad), dtype=torch.long))
    return candidates, torch.where(flipped, 1 - performance, performance), similarity


# ---- conformity


def test_negative_kl_of_scaled_values_is_that_of_a_loop():
    performance, similarity = drawn()
    found = conformity(performance, similarity)
    expected = [by_hand(q, s) for q, s in zip(performance.tolist(), similarity.tolist())]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert (found < 0).all()
    # of two distributions, that of the performance comes first
    assert not torch.allclose(found, conformity(similarity, performance))


def test_rank_correlation_is_that_of_scipy_also_with_ties():
    stats = pytest.importorskip("scipy.stats")
    performance, similarity = drawn(5, 12, seed=1)
    performance, similarity = (performance * 4).round(), (similarity * 6).round()
    found = conformity(performance, similarity, method="spearman")
    expected = [stats.spearmanr(q, s).statistic for q, s in zip(performance.numpy(), similarity.numpy())]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("method", ["kl", "spearman"])
def test_only_known_pairs_count(method):
    performance, similarity = drawn(8, 9)
    known = torch.rand(8, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    known[0], known[1] = False, torch.arange(9) == 4
    performance[~known], similarity[~known] = torch.nan, torch.inf
    found = conformity(performance, similarity, known, method)
    assert found[:2].isnan().all() and found[2:].isfinite().all()
    for i in range(2, 8):
        alone = conformity(performance[i : i + 1, known[i]], similarity[i : i + 1, known[i]], method=method)
        torch.testing.assert_close(found[i : i + 1], alone)


@pytest.mark.parametrize("method", ["kl", "spearman"])
def test_scale_shift_and_order_of_pairs_do_not_matter(method):
    performance, similarity = drawn()
    found = conformity(performance, similarity, method=method)
    torch.testing.assert_close(conformity(3 * performance - 7, 1e-5 * similarity + 0.01, method=method), found)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conformity(performance[:, order], similarity[:, order], method=method), found)
    torch.testing.assert_close(conformity(performance.flip(0), similarity.flip(0), method=method), found.flip(0))


def test_equal_values_have_no_divergence():
    performance, _ = drawn()
    assert conformity(performance, performance).abs().max() < 1e-12
    constant = torch.full((1, 5), 0.3)
    assert conformity(constant, constant * 2).item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(
        conformity(performance, performance, method="spearman"), torch.ones(6, dtype=torch.float64)
    )
    one_constant = conformity(constant, torch.rand(1, 5), method="spearman"), conformity(constant, torch.rand(1, 5))
    assert one_constant[0].item() == 0 and by_hand([0.3] * 3, [0, 0.5, 1]) < -0.1 and one_constant[1].item() < -0.1


# ---- the reliable set


@pytest.mark.parametrize("method", ["kl", "spearman"])
def test_examples_that_do_badly_where_they_are_similar_are_left_out(method):
    assert reliable_rows(*table(bad=(3, 11, 12)), drop=0.15, method=method).tolist() == [
        i for i in range(20) if i not in (3, 11, 12)
    ]
    # also from a sample of the pairs
    found = reliable_rows(*table(n=60, k=15, bad=(7, 30), seed=2), drop=2 / 60, method=method)
    assert not {7, 30} & set(found.tolist()) and len(found) == 58


@pytest.mark.parametrize("method", ["kl", "spearman"])
def test_rows_of_the_table_are_queries_and_its_entries_examples(method):
    candidates, performance, similarity = table(n=12, seed=4)
    performance = torch.rand(performance.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [[], []]
    for example in range(12):
        for values, rows in ((performance, pairs[0]), (similarity, pairs[1])):
            rows.append([values[j, k] for j in range(12) for k in range(11) if candidates[j, k] == example])
    order = conformity(*map(torch.tensor, pairs), method=method).argsort().tolist()
    for drop in (0.1, 0.25, 0.5, 0.99):
        found = reliable_rows(candidates, performance, similarity, drop, method)
        assert found.tolist() == sorted(order[math.floor(12 * drop) :])


@pytest.mark.parametrize("n", [7, 20, 100])
def test_n_less_floor_of_the_share_are_kept(n):
    measured = table(n=n, k=min(n - 1, 12))
    for percent in (0, 1, 7, 15, 29, 50, 57, 99):
        assert len(reliable_rows(*measured, drop=percent / 100)) == n - percent * n // 100
    assert torch.equal(reliable_rows(*measured, drop=0), torch.arange(n))
    assert len(reliable_rows(*measured)) == n - 15 * n // 100


def test_examples_of_which_little_is_known_are_kept():
    candidates, performance, similarity = table(n=10, bad=(0, 1))
    # 0 is never measured, 1 once, 2 on itself and once
    candidates[candidates == 0] = -1
    candidates[3:][candidates[3:] == 1] = -1
    candidates[:1][candidates[:1] == 1] = -1
    candidates[4:][candidates[4:] == 2] = -1
    candidates[:3][candidates[:3] == 2] = -1
    candidates[2, 0] = 2
    performance[candidates < 0] = torch.nan
    assert ((candidates == 1).sum(), (candidates == 2).sum()) == (1, 2)
    found = reliable_rows(candidates, performance, similarity, drop=0.5)
    assert len(found) == 5 and {0, 1, 2} <= set(found.tolist())
    assert reliable_rows(candidates, performance, similarity, drop=0.95).tolist() == [0, 1, 2]


def test_an_example_with_constant_performance_and_similarity_is_never_left_out_first():
    candidates, performance, similarity = table(n=10)
    performance = torch.rand(performance.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    here = candidates == 4
    performance[here], similarity[here] = 0.2, 0.7
    assert reliable_rows(candidates, performance, similarity, drop=0.9).tolist() == [4]


def test_neither_number_types_nor_the_order_of_pairs_change_the_result():
    candidates, performance, similarity = table(n=20, seed=3, bad=(1, 2))
    kept = reliable_rows(candidates, performance, similarity, 0.4)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    for other in (
        (candidates[:, order], performance[:, order], similarity[:, order]),
        (candidates.int(), performance.float(), similarity.float()),
    ):
        assert torch.equal(reliable_rows(*other, 0.4), kept)
    new = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    old = new.argsort()
    renamed = reliable_rows(new[candidates][old], performance[old], similarity[old], 0.4)
    assert torch.equal(renamed, new[kept].sort().values)


def changed(which, place, value):
    measured = list(table(n=6))
    measured[which][place] = value
    return measured


# ---- refined lists


def refined_by_hand(rows, reliable, fill=None):
    found = []
    for b, row in enumerate(rows.tolist()):
        wide = row + [item for item in (fill[b].tolist() if fill is not None else []) if item not in row]
        kept = [item for item in wide if item >= 0 and item in reliable.tolist()][: len(row)]
        found.append(kept + [-1] * (len(row) - len(kept)) if kept else row)
    return torch.tensor(found)


def test_refined_lists_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    wide = torch.rand(40, 30, generator=g).argsort(1)[:, :20]
    rows = wide[:, :8].clone()
    rows[:5, 6:] = -1
    for share in (0.05, 0.3, 0.85):
        reliable = torch.randperm(30, generator=g)[: int(30 * share)]
        assert torch.equal(refine(rows, reliable), refined_by_hand(rows, reliable))
        assert torch.equal(refine(rows, reliable, wide), refined_by_hand(rows, reliable, wide))
        rest = refine(rows[5:], reliable, wide[5:, 8:])
        assert torch.equal(rest, refine(rows[5:], reliable, wide[5:]))
    assert torch.equal(refine(rows, torch.arange(30)), rows)
    assert (refine(rows, torch.arange(30), wide) >= 0).all()


def test_a_query_without_a_reliable_candidate_keeps_its_list():
    rows = torch.tensor([[3, 1, -1], [5, 2, 0]])
    assert refine(rows, torch.tensor([0, 2])).tolist() == [[3, 1, -1], [2, 0, -1]]
    assert torch.equal(refine(rows, torch.tensor([], dtype=torch.long)), rows)
    # unless the longer list has one
    fill = torch.tensor([[3, 1, 9, 2], [5, 2, 0, 4]])
    assert refine(rows, torch.tensor([0, 2]), fill).tolist() == [[2, -1, -1], [2, 0, -1]]
    # a padded place is no candidate, even if a set holds -1
    assert refine(rows, torch.tensor([-1, 1, 9]), fill).tolist() == [[1, 9, -1], [5, 2, 0]]
    assert refine(rows, torch.tensor([-1, 8])).tolist() == rows.tolist()


# ---- what does not fit


TWO, IDS = torch.rand(2, 3), torch.zeros(2, 2).long()
ALL = (slice(None), slice(None))


@pytest.mark.parametrize(
    ("call", "given", "words"),
    [
        (conformity, (TWO, torch.rand(3, 2)), r"performance \(2, 3\) and similarity \(3, 2\)"),
        (conformity, (torch.rand(3), torch.rand(3)), r"\(n, M\)"),
        (conformity, (TWO, TWO, torch.ones(2, 3)), "known.*torch.float32.*bool"),
        (conformity, (TWO, TWO, torch.ones(3, dtype=torch.bool)), r"known \(3,\)"),
        (conformity, (torch.tensor([[1, math.nan]]), torch.rand(1, 2)), "performance is not finite in 1 of 2"),
        (conformity, (torch.rand(1, 2), torch.tensor([[1, -math.inf]])), "similarity is not finite in 1 of 2"),
        (conformity, (TWO, TWO, None, "cosine"), r"method='cosine': choose one of \('kl', 'spearman'\)"),
        (reliable_rows, (*table(n=6), 1.0), "drop=1.0.*below 1"),
        (reliable_rows, (*table(n=6), -0.1), "drop=-0.1"),
        (reliable_rows, (*table(n=6), math.nan), "drop=nan"),
        (reliable_rows, changed(1, (2, 3), math.nan), "performance is not finite in 1 of 30"),
        (reliable_rows, changed(2, (2, 3), math.inf), "similarity is not finite in 1 of 30"),
        (reliable_rows, changed(0, (0, 0), 6), "to 6: the table has 6 rows.*0..5"),
        (reliable_rows, changed(0, (0, 0), -2), "candidates from -2"),
        (reliable_rows, changed(1, ALL, 0.5), "30 measured performances are all equal"),
        (reliable_rows, changed(0, ALL, -1), "0 measured performances"),
        (reliable_rows, (table(n=6)[0], table(n=5)[1], table(n=6)[2]), r"performance \(5, 4\)"),
        (reliable_rows, (table(n=6)[0], table(n=6)[1], table(n=5)[2]), r"similarity \(5, 4\)"),
        (reliable_rows, (torch.arange(3), torch.rand(3), torch.rand(3)), r"\(n, K\)"),
        (refine, (torch.arange(3), torch.arange(3)), r"rows \(3,\)"),
        (refine, (IDS, IDS[:1]), r"reliable \(1, 2\)"),
        (refine, (IDS, torch.arange(3), torch.zeros(3, 4).long()), r"fill \(3, 4\).*same 2 queries"),
        (refine, (IDS, torch.arange(3), torch.arange(4)), r"fill \(4,\)"),
    ],
)
def test_what_does_not_fit_is_named(call, given, words):
    with pytest.raises(ValueError, match=words):
        call(*given)
