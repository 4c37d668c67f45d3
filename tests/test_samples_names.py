"""The public names of the samples under anything that a user may pass: a right answer or a sentence, nothing else."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_effdl import (
    Plan,
    PrioritySampler,
    active_plan,
    default_plan,
    draw,
    fit_label_noise,
    inclusion_probabilities,
    make_plan,
    noise_rate,
    paper_plan,
    priority_sample,
    uncertainty,
)
from hf_effdl.samples.drawing.draws import sequential_draw, top_k
from hf_effdl.samples.drawing.probabilities import clip_scores
from hf_effdl.samples.drawing.quotas import class_quotas, strata, without_hardest
from hf_effdl.samples.drawing.weights import kish_size, loss_weights
from hf_effdl.samples.scores.dynamics import aum, dyn_unc, forgetting, mean_el2n


FAST = settings(max_examples=60, deadline=None, derandomize=True)
SAID = (ValueError, TypeError)


def arrays(value: list) -> st.SearchStrategy:
    """One list as all that people keep numbers in."""
    kinds = [list, tuple, np.array, torch.tensor, lambda v: np.array(v, dtype=np.float32), lambda v: torch.tensor([v])]
    kinds += [lambda v: torch.tensor(v)[:, None] if len(v) else torch.tensor(v), lambda v: np.array(v, dtype=object)]
    kinds += [lambda v: torch.tensor(v, dtype=torch.float16), lambda v: torch.tensor(v, dtype=torch.float64)]

    def made(kind):
        try:
            return kind(value)
        except (OverflowError, RuntimeError, ValueError):
            return value

    return st.sampled_from(kinds).map(made)


NUMBERS = st.floats(0, 1e300) | st.sampled_from([0.0, 1e-300, 5e-324, 1.0, 1e300, math.nan, math.inf, -1.0])
LISTS = st.lists(NUMBERS, max_size=8) | st.lists(st.floats(0.01, 100), min_size=2, max_size=8)
ANYTHING = LISTS.flatmap(arrays) | st.sampled_from(
    [None, "scores", 3, 1.5, [[1.0], [2.0]], ["a", "b"], [None, 1.0], {}, [True]]
)
BUDGETS = st.integers(-1, 9) | st.sampled_from(
    [0.5, 2.0, math.nan, math.inf, None, "2", True, np.int64(2), np.float32(1)]
)
SEEDS = st.integers(-(2**70), 2**70) | st.sampled_from([0, np.int64(3), 1.5, None, "a", True])
IDS = st.none() | st.lists(st.integers(-(2**63), 2**63 - 1) | st.text(max_size=3), max_size=8) | st.just(np.arange(5))


def answer(call):
    """What a call gives; None where it says in a sentence of ours why not."""
    try:
        return call()
    except SAID as error:
        assert len(str(error)) > 20 and "\n" not in str(error)[:20]
        return None


@FAST
@given(ANYTHING, BUDGETS, SEEDS, IDS)
def test_draws_are_right_or_refused(scores, budget, seed, ids):
    for sampler in (priority_sample, sequential_draw, top_k):
        drawn = answer(lambda sampler=sampler: sampler(scores, budget, seed=seed, row_ids=ids))
        if drawn is not None:
            positions = drawn[0] if sampler is priority_sample else drawn
            assert len(positions) == budget == len(positions.unique()) and positions.equal(positions.sort().values)
            assert ids is None or sampler is top_k or len(ids) == len({*np.asarray(ids).tolist()})
            if sampler is priority_sample:
                assert (drawn[1] >= 1).all() and drawn[1].isfinite().all()
    chances = answer(lambda: inclusion_probabilities(scores, budget))
    if chances is not None:
        assert ((chances > 0) & (chances <= 1)).all() and abs(chances.sum() - budget) < 1e-9 * max(1, budget)
        answer(lambda: draw(chances, seed=seed, row_ids=ids))
    answer(lambda: draw(scores, seed=seed, row_ids=ids))


@FAST
@given(ANYTHING, ANYTHING, BUDGETS, SEEDS)
def test_plans_are_whole_or_refused(scores, other, budget, seed):
    rows = len(scores) if hasattr(scores, "__len__") else 3
    label = torch.arange(rows) % 2
    table = {"u_x": scores, "u_y": scores, "label": label, "predicted": label, "p_label": other}
    table |= {"confidence": torch.ones(rows), "p_clean": torch.ones(rows)}
    for make in (make_plan, default_plan, active_plan, paper_plan):
        plan = answer(lambda make=make: make(table, budget, seed=seed))
        if plan is not None:
            assert isinstance(plan, Plan) and len(plan) == budget and plan.weights.shape == plan.positions.shape
            assert plan.weights.isfinite().all() and abs(plan.weights.mean() - 1) < 1e-9


@FAST
@given(ANYTHING)
def test_formulas_are_right_or_refused(values):
    for formula in (
        uncertainty,
        aum,
        dyn_unc,
        forgetting,
        mean_el2n,
        kish_size,
        lambda v: clip_scores(v, quantile=0.5),
        lambda v: strata(v),
        lambda v: without_hardest(v, 0.3),
        lambda v: loss_weights("exact", probabilities=v),
        lambda v: loss_weights("p_label", p_label=v),
        lambda v: loss_weights("damped", uncertainty=v),
        lambda v: class_quotas(v, 2),
        lambda v: fit_label_noise(v, torch.zeros(2, dtype=torch.long)),
        lambda v: noise_rate(v, torch.zeros(2, dtype=torch.long)),
        lambda v: PrioritySampler(1).add(v, torch.arange(2)),
    ):
        got = answer(lambda formula=formula: formula(values))
        assert not isinstance(got, torch.Tensor) or not got.is_floating_point() or got.isfinite().all()


# ---- ratios


@FAST
@given(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=30), st.integers(-290, 290), st.integers(0, 99))
def test_only_ratios_of_scores_count(scores, power, seed):
    scores = torch.tensor(scores, dtype=torch.float64)
    times = scores * 2.0 ** (power * 3)  # a power of two changes no digit
    budget = len(scores) // 2
    assert inclusion_probabilities(times, budget).equal(inclusion_probabilities(scores, budget))
    for given_, log in ((times, False), (scores.log() + power * 100, True)):
        positions, weights = priority_sample(given_, budget, seed=seed, log_scores=log)
        right = priority_sample(scores, budget, seed=seed)
        assert positions.equal(right[0]) and torch.allclose(weights, right[1], rtol=1e-9)


def test_scores_of_600_decades_are_told_apart():
    scores = torch.tensor([1e300, 1e-300, 1e-290, 1e-291, 0.0, 0.0], dtype=torch.float64)
    chances = inclusion_probabilities(scores, 2)
    assert chances[0] == 1 and torch.allclose(chances[1:4], torch.tensor([9e-11, 0.909, 0.0909]).double(), rtol=1e-2)
    second = [int(priority_sample(scores, 2, seed=seed)[0][1]) for seed in range(300)]
    assert 230 < second.count(2) < 300 and second.count(2) + second.count(3) == 300
    last = [int(priority_sample(scores, 5, seed=seed)[0][-1]) for seed in range(200)]
    assert 60 < last.count(4) < 140 and last.count(4) + last.count(5) == 200  # those without a score, alike
    sampler = PrioritySampler(2, seed=1)
    for part in torch.arange(6).split(2):
        sampler.add(scores[part], part)
    assert sampler.result()[0].equal(priority_sample(scores, 2, seed=1)[0])


def test_plans_take_logarithms_of_scores():
    logs = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    plan = make_plan({"u_x": logs.exp()}, 60, quotas="none", weights="exact")
    far = make_plan({"u_x": logs - 4000}, 60, quotas="none", weights="exact", log_scores=True)
    assert plan.positions.equal(far.positions) and torch.allclose(plan.weights, far.weights)
    with pytest.raises(ValueError, match="use clip_quantile="):
        make_plan({"u_x": logs}, 60, quotas="none", clip=0.1, log_scores=True)


# ---- ids, columns, classes


@pytest.mark.parametrize(
    "ids", [[1, 1, 2, 3], ["a", "b", "c", "a"], torch.zeros(4, dtype=torch.long), np.ones(4, int)]
)
def test_ids_that_repeat_are_refused_wherever_they_enter(ids):
    scores = torch.tensor([1.0, 2, 3, 4])
    sampler = PrioritySampler(2)
    sampler.add(scores[:2], torch.tensor([5, 6]))
    sampler.add(scores[:2], torch.tensor([5, 7]))
    for call in (
        lambda: priority_sample(scores, 2, row_ids=ids),
        lambda: draw(scores / 4, row_ids=ids),
        lambda: sequential_draw(scores, 2, row_ids=ids),
        lambda: top_k(scores, 2, row_ids=ids),
        lambda: make_plan({"u_x": scores}, 2, quotas="none", weights="none", row_ids=ids),
        lambda: PrioritySampler(2).add(scores, ids),
        sampler.result,
    ):
        with pytest.raises(ValueError, match="share their id.*give each row an id of its own"):
            call()


@pytest.mark.parametrize("name", ["u_x", "label", "p_label"])
def test_columns_of_another_shape_are_refused_by_name(name):
    table = {"label": torch.arange(60) % 3, "u_x": torch.rand(60), "p_label": torch.rand(60)}
    table[name] = table[name][:, None]
    with pytest.raises(ValueError, match=rf"column '{name}' has shape \(60, 1\); pass one number a row"):
        make_plan(table, 10)


def test_probabilities_above_one_are_refused():
    table = {"label": torch.arange(60) % 3, "u_x": torch.rand(60), "p_label": torch.full((60,), 1.5)}
    with pytest.raises(ValueError, match=r"'p_label' holds 1\.5 at row 0, which is no probability \(60 rows"):
        make_plan(table, 10)
    with pytest.raises(ValueError, match="inclusion probabilities are at most 1"):
        loss_weights("exact", probabilities=torch.tensor([0.5, 1.5]))


def test_classes_may_have_any_numbers():
    codes = torch.tensor([7, 20_210, 987_654_321])[torch.arange(90) % 3]
    plan = make_plan({"u_x": torch.rand(90), "label": codes}, 30, weights="none")
    assert codes[plan.positions].unique(return_counts=True)[1].tolist() == [10, 10, 10]


def test_rounds_may_be_smaller_than_the_classes():
    table = {"u_x": torch.rand(100), "predicted": torch.arange(100) % 10}
    plan = active_plan(table, 4)
    assert len(plan) == 4 and len(table["predicted"][plan.positions].unique()) == 4


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(TypeError, match=r"seed=.*: it must be a whole number"):
        priority_sample(torch.rand(5), 2, seed=seed)


def test_equal_scores_do_not_depend_on_the_order_of_rows():
    scores, ids = torch.tensor([1.0, 2, 2, 2, 2, 0]), torch.arange(6) * 7
    right = set(ids[top_k(scores, 2, row_ids=ids)].tolist())
    stays = set(ids[without_hardest(scores, 0.4, row_ids=ids)].tolist())
    for seed in range(10):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        assert set(ids[order][top_k(scores[order], 2, row_ids=ids[order])].tolist()) == right
        assert set(ids[order][without_hardest(scores[order], 0.4, row_ids=ids[order])].tolist()) == stays
