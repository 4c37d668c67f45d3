"""Plans against draws composed by hand, frequencies over seeds, and the documented switches of the presets."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch

from hf_effdl.samples.drawing.draws import draw, priority_sample, sequential_draw, top_k
from hf_effdl.samples.drawing.hashing import hashed_uniform
from hf_effdl.samples.drawing.plan import PlanSettings, make_plan
from hf_effdl.samples.drawing.presets import (
    ENOUGH_ROWS,
    FEW_ROWS,
    HARD_ROWS_HELP,
    NEARLY_SOLVED,
    active_plan,
    default_plan,
    paper_plan,
    table_noise,
)
from hf_effdl.samples.drawing.probabilities import clip_scores, inclusion_probabilities
from hf_effdl.samples.drawing.quotas import class_quotas, strata, without_hardest
from hf_effdl.samples.drawing.weights import LABEL_DEPENDENT, loss_weights
from hf_effdl.samples.scores.noise import agreement, fit_label_noise, noise_rate


NAN, INF = float("nan"), float("inf")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def close(got, expected, rtol=1e-6, atol=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=rtol, atol=atol)


def score_table(rows=600, classes=5, agreed=0.8, seed=0):
    """Columns without label noise as the presets read it: the surest rows agree, all posteriors are high."""
    g = generator(seed)
    label = torch.randint(0, classes, (rows,), generator=g)
    agree = torch.rand(rows, generator=g) < agreed
    p_label = torch.where(agree, 0.5 + 0.5 * torch.rand(rows, generator=g), 0.4 * torch.rand(rows, generator=g))
    return {
        "label": label,
        "predicted": torch.where(agree, label, (label + 1) % classes),
        "u_x": torch.exp(torch.randn(rows, generator=g)),
        "u_y": torch.exp(torch.randn(rows, generator=g)),
        "p_label": p_label,
        "confidence": torch.where(agree, p_label, 0.5),
        "p_clean": torch.where(torch.rand(rows, generator=g) < 0.95, 0.999, 0.3),
        "margin": torch.rand(rows, generator=g) - 0.5,
    }


def chosen(plan):
    return set(plan.positions.tolist())


def same(one, other):
    return (
        torch.equal(one.positions, other.positions)
        and torch.equal(one.weights, other.weights)
        and torch.equal(one.probabilities.nan_to_num(-1), other.probabilities.nan_to_num(-1))
    )


def by_group(values, groups, quotas, pick):
    """Positions and probabilities of `pick(scores, quota, rows)` in every group."""
    found = {}
    for group, quota in enumerate(quotas.tolist()):
        rows = (groups == group).nonzero().flatten()
        if quota:
            positions, chances = pick(values[rows], quota, rows)
            found |= dict(zip(rows[positions].tolist(), chances.tolist()))
    return sorted(found), [found[row] for row in sorted(found)]


def priority(scores, quota, rows):
    positions, weights = priority_sample(scores, quota, seed=3, row_ids=rows)
    return positions, 1 / weights


def poisson(scores, quota, rows):
    probabilities = inclusion_probabilities(scores, quota)
    positions, _ = draw(probabilities, seed=3, row_ids=rows)
    return positions, probabilities[positions]


def sequential(scores, quota, rows):
    positions = sequential_draw(scores, quota, seed=3, row_ids=rows)
    return positions, torch.full((quota,), 1.0 if quota == len(rows) else NAN)


def largest(scores, quota, rows):
    return top_k(scores, quota), torch.ones(quota)


PICKS = {"priority": priority, "poisson": poisson, "sequential": sequential, "top-k": largest}


# ---- draws


@pytest.mark.parametrize("sampler", PICKS)
@pytest.mark.parametrize("quotas", ["label", "predicted", "none"])
def test_a_plan_is_a_draw_in_every_class_by_its_quota(sampler, quotas):
    table = score_table()
    table["label"][:30] = 5  # a class that its quota takes whole
    table["predicted"][:4] = 6
    groups = torch.zeros(600, dtype=torch.long) if quotas == "none" else table[quotas]
    counts = torch.bincount(groups)
    plan = make_plan(table, 240, sampler=sampler, quotas=quotas, clip=2.0, seed=3)
    expected = by_group(table["u_x"].clamp(max=2), groups, class_quotas(counts, 240, seed=3), PICKS[sampler])
    assert plan.positions.tolist() == expected[0]
    close(plan.probabilities.nan_to_num(-1), torch.tensor(expected[1]).nan_to_num(-1))
    assert plan.probabilities.dtype == plan.weights.dtype == torch.float64
    if sampler != "poisson":
        assert len(plan) == 240
        assert torch.bincount(groups[plan.positions]).tolist() == class_quotas(counts, 240, seed=3).tolist()
        assert quotas == "none" or (plan.probabilities == 1).any()
    close(plan.weights, loss_weights("p_label", p_label=table["p_label"][plan.positions]))
    assert plan.rows == 600
    assert plan.kish == pytest.approx(float(plan.weights.sum() ** 2 / plan.weights.square().sum()))


def test_strata_draw_alike_from_every_range_of_the_score():
    table = score_table()
    table["u_x"][0] = 40
    bins = strata(table["u_x"], 10)
    counts = torch.bincount(bins)
    assert (counts == 0).any() and (counts[counts > 0] < 12).any()  # sparse far out
    for budget in range(113, 121):  # whatever does not divide
        plan = make_plan(table, budget, quotas="strata", bins=10, seed=3)
        expected = by_group(torch.ones(600), bins, class_quotas(counts, budget, seed=3), priority)
        assert plan.positions.tolist() == expected[0]
        close(plan.probabilities, expected[1])
    # scores that may be negative, as margins are, and fewer rows than the 50 strata
    few = make_plan(table, 7, score="margin", quotas="strata")
    assert len(few) == len(strata(table["margin"])[few.positions].unique()) == 7


def test_the_stratum_s_width_is_of_the_rows_that_are_kept():
    table = score_table()
    table["u_x"][5] = 1e6  # a far row that is cut must not squeeze the others into one stratum
    plan = make_plan(table, 100, quotas="strata", bins=5, cut_hardest=0.1)
    kept = without_hardest(table["u_x"], 0.1)
    bins = strata(table["u_x"][kept], 5)
    assert (torch.bincount(bins) > 0).all()
    spread = strata(table["u_x"].clamp(max=table["u_x"][kept].max()), 5)[plan.positions]
    assert torch.bincount(spread).tolist() == class_quotas(torch.bincount(bins), 100).tolist()
    assert kept[plan.positions].all()


@pytest.mark.parametrize("options", [{"clip_quantile": 0.5}, {"clip": 0.8}, {}, {"score": "uniform"}])
def test_caps_are_of_the_whole_pool_and_uniform_draws_use_no_score(options):
    table = score_table()
    cap = options.get("clip"), options.get("clip_quantile")
    scores = clip_scores(table["u_x"], *cap) if any(cap) else table["u_x"]
    if "score" in options:
        scores, table = torch.ones(600), {"p_label": table["p_label"]}
    plan = make_plan(table, 100, quotas="none", seed=3, **options)
    positions, weights = priority_sample(scores, 100, seed=3)
    assert torch.equal(plan.positions, positions)
    close(plan.probabilities, 1 / weights)


@pytest.mark.parametrize("sampler", ["priority", "poisson"])
def test_a_uniform_share_bounds_the_inverse_probabilities(sampler):
    table = score_table()
    table["u_x"] = table["u_x"] ** 4
    plan = make_plan(table, 60, sampler=sampler, quotas="none", uniform_share=0.3)
    mixture = 0.7 * inclusion_probabilities(table["u_x"], 60) + 0.3 * 0.1
    positions, weights = draw(mixture) if sampler == "poisson" else priority_sample(mixture, 60)
    assert torch.equal(plan.positions, positions)
    close(plan.probabilities, 1 / weights)
    # the threshold of priority sampling is random
    assert weights.max() <= (1 if sampler == "poisson" else 1.5) * 600 / (0.3 * 60)


# ---- what may be drawn


def test_rows_outside_the_filter_are_not_drawn_while_the_kept_ones_suffice():
    table, keep = score_table(), torch.rand(600, generator=generator(1)) < 0.5
    before, rows = keep.clone(), keep.nonzero().flatten()
    alone = {name: column[keep] for name, column in table.items()}
    for budget in (50, int(keep.sum())):  # a row's draw is that of a pool of the kept rows alone
        plan = make_plan(table, budget, keep=keep, cut_hardest=0.0, seed=2)
        assert torch.equal(plan.positions, rows[make_plan(alone, budget, row_ids=rows, seed=2).positions])
    make_plan(table, 50, keep=keep, cut_hardest=0.2)
    assert torch.equal(keep, before)
    # where nothing is kept all rows are
    assert same(make_plan(table, 50, keep=torch.zeros(600, dtype=torch.bool)), make_plan(table, 50))


@pytest.mark.parametrize("quotas", ["label", "none", "strata"])
@pytest.mark.parametrize("sampler", ["priority", "poisson", "sequential"])
def test_what_the_kept_rows_cannot_fill_comes_from_the_others(sampler, quotas):
    table, keep = score_table(), torch.arange(600) % 4 == 0
    for extra in (1, 3, 90):  # also fewer than there are classes
        plan = make_plan(table, 150 + extra, keep=keep, sampler=sampler, quotas=quotas)
        assert set(keep.nonzero().flatten().tolist()) <= chosen(plan)
        assert (plan.probabilities[keep[plan.positions]] == 1).all()
        if sampler == "poisson":
            assert extra < 90 or len(plan) == pytest.approx(240, abs=35)
            continue
        assert len(plan) == 150 + extra
        others = table["label"][plan.positions][~keep[plan.positions]]
        if quotas == "label":
            shares = torch.bincount(others, minlength=5)
            assert shares.max() - shares.min() <= 1
    kept = table["label"] == 0  # the other classes have no kept row
    if (sampler, quotas) == ("priority", "label"):
        plan = make_plan(table, int(kept.sum()) + 4, keep=kept)
        assert torch.bincount(table["label"][plan.positions]).tolist() == [int(kept.sum()), 1, 1, 1, 1]


def test_the_hardest_share_counts_as_not_kept():
    table, keep = score_table(), torch.rand(600, generator=generator(1)) < 0.7
    soft = without_hardest(table["u_y"], 0.3)
    plan = make_plan(table, 100, score="u_y", cut_hardest=0.3, keep=keep)
    assert same(plan, make_plan(table, 100, score="u_y", keep=keep & soft))
    assert (keep & soft)[plan.positions].all()
    # by the score itself, not by its cap
    capped = make_plan(table, 100, score="u_y", cut_hardest=0.3, clip=1e-3)
    assert soft[capped.positions].all()
    assert len(make_plan(table, 590, score="u_y", cut_hardest=0.3)) == 590


# ---- weights


def test_damped_weights_are_of_the_uncertainty_that_was_drawn_by():
    table = score_table()
    for score, column in {"u_x": "u_x", "u_y": "u_y", "uniform": "u_y", "margin": "u_y", None: "u_x"}.items():
        if score is None:
            del table["u_y"]
        plan = make_plan(table, 60, score=score or "uniform", quotas="strata", weights="damped", beta=0.7)
        close(plan.weights, loss_weights("damped", uncertainty=table[column][plan.positions], beta=0.7))


@pytest.mark.parametrize("sampler", ["priority", "poisson"])
def test_exact_weights_are_the_inverse_probabilities(sampler):
    plan = make_plan(score_table(), 60, score="u_y", weights="exact", sampler=sampler)
    close(plan.weights, (1 / plan.probabilities) / (1 / plan.probabilities).mean())
    assert plan.kish < 0.9 * len(plan)
    assert make_plan(score_table(), 60, weights="none").weights.tolist() == [1] * 60


def test_the_largest_scores_warn_below_three_tenths():
    table = score_table()
    for score in ("u_x", "uniform"):
        with pytest.warns(UserWarning, match=r"'top-k' keeps 30% of the rows: below 30 %") as caught:
            make_plan(table, 179, score=score, sampler="top-k")
        assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        make_plan(table, 180, sampler="top-k")
        make_plan(table, 60)


# ---- what a plan depends on


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "poisson", "uniform_share": 0.2},
        {"sampler": "sequential", "quotas": "none"},
        {"quotas": "strata", "bins": 7},
        {"quotas": "predicted", "clip_quantile": 0.5, "cut_hardest": 0.1},
        {"sampler": "top-k"},
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_plan_depends_on_seed_and_row_ids_and_not_on_the_order(options, named):
    table, order = score_table(), torch.randperm(600, generator=generator(2))
    rows = 13 * torch.arange(600)
    names = [f"img/{row}.png" for row in rows.tolist()] if named else rows
    shuffled_names = [names[i] for i in order.tolist()] if named else rows[order]
    keep = torch.rand(600, generator=generator(3)) < 0.6
    plan = make_plan(table, 200, row_ids=names, keep=keep, seed=4, **options)
    shuffled = {name: column[order] for name, column in table.items()}
    other = make_plan(shuffled, 200, row_ids=shuffled_names, keep=keep[order], seed=4, **options)
    back = order[other.positions].argsort()
    assert torch.equal(order[other.positions][back], plan.positions)
    close(other.weights[back], plan.weights)
    close(other.probabilities[back].nan_to_num(-1), plan.probabilities.nan_to_num(-1))
    if options.get("sampler") != "top-k":
        assert chosen(plan) != chosen(make_plan(table, 200, row_ids=names, keep=keep, seed=5, **options))
        assert chosen(plan) != chosen(make_plan(table, 200, keep=keep, seed=4, **options))


@pytest.mark.parametrize("sampler", PICKS)
@pytest.mark.parametrize("quotas", ["label", "none"])
@pytest.mark.filterwarnings("ignore:sampler='top-k'")
def test_a_larger_budget_is_a_superset(sampler, quotas):
    table, before = score_table(), set()
    keep = torch.rand(600, generator=generator(3)) < 0.6
    for budget in range(5, 600, 17):  # past the kept rows too
        rows = chosen(make_plan(table, budget, sampler=sampler, quotas=quotas, keep=keep))
        assert before <= rows
        before = rows


def test_settings_are_plain_and_draw_the_same_rows_again():
    table = score_table()
    plans = [
        make_plan(table, 60, score="u_y", sampler="poisson", clip=0.3, uniform_share=0.1, weights="damped", seed=8),
        make_plan(table, 60, quotas="strata", bins=4, cut_hardest=0.1, clip_quantile=0.4, beta=0.2),
        paper_plan(table, 60, seed=2),
        active_plan(table, 60, accuracy=0.9),
    ]
    for plan in plans:
        settings = PlanSettings.of(json.loads(json.dumps(plan.settings)))
        assert same(make_plan(table, **dataclasses.asdict(settings)), plan)
    # but for the filter, which is as long as the pool
    plan = default_plan(table, 60, seed=5)
    settings = json.loads(json.dumps(plan.settings))
    readings = ("preset", "regime", "noise_rate", "trial_accuracy", "classes", "kept_rows")
    found = {name: settings.pop(name) for name in readings}
    agreed = table["label"] == table["predicted"]
    assert same(make_plan(table, keep=agreed, **settings), plan)
    assert found == {
        "preset": "default",
        "regime": "agreement",
        "noise_rate": table_noise(table),
        "trial_accuracy": None,
        "classes": 5,
        "kept_rows": int(agreed.sum()),
    }


# ---- the default


def noisy_table(wrong):
    """1,000 rows; of the 100 surest, so many disagree."""
    table = score_table(1000)
    table["confidence"] = torch.linspace(0.99, 0.3, 1000)
    table["predicted"][:100] = table["label"][:100]
    table["predicted"][:wrong] = (table["label"][:wrong] + 1) % 5
    table["p_clean"] = torch.where(torch.rand(1000, generator=generator(6)) < 0.97, 0.999, 0.49)
    table["p_clean"][7] = 0.5
    return table


class Trials:
    """A trial that remembers what it was given and reports these accuracies in turn."""

    def __init__(self, *accuracies):
        self.accuracies, self.given = list(accuracies), []

    def __call__(self, positions, weights):
        self.given.append((positions, weights))
        return self.accuracies[len(self.given) - 1]


# of 5 classes: the last budget with few rows a class, the first and last with some, the first with enough
BUDGETS = (39, 40, 99, 100)
ALWAYS, MIDDLE = ("agreement",) * 4, ("agreement", "clipped", "clipped", "clipped")
SOLVED = ("agreement", "clipped", "clipped", "unclipped")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "wrong,accuracies,regimes",
    [
        (0, None, ALWAYS),
        (6, (0.99,) * 3, ALWAYS),
        (5, (0.8, 0.8599, 0.92), ALWAYS),
        (5, (0.8599,) * 3, ALWAYS),
        (5, (0.86,) * 3, MIDDLE),
        (0, (0.9449,) * 3, MIDDLE),
        (0, (0.945,) * 3, SOLVED),
        (0, (0.9, 0.99, 0.99), SOLVED),
    ],
)
def test_the_default_switches_where_it_says(budget, wrong, accuracies, regimes):
    assert (HARD_ROWS_HELP, NEARLY_SOLVED, FEW_ROWS, ENOUGH_ROWS) == (0.86, 0.945, 8, 20)
    table, trial, enough = noisy_table(wrong), accuracies and Trials(*accuracies), budget >= 100
    regime = regimes[BUDGETS.index(budget)]
    plan = default_plan(table, budget, trial=trial, seed=9)
    likely = table["p_clean"] >= 0.5
    assert likely[7] and not likely.all()
    agreed = table["label"] == table["predicted"]
    keep, options = {
        "agreement": (agreed, {"clip_quantile": 0.5} if enough else {"score": "uniform"}),
        "clipped": (likely, {"clip_quantile": 0.5}),
        "unclipped": (likely, {"quotas": "none"}),
    }[regime]
    assert same(plan, make_plan(table, budget, keep=keep, weights="p_label", seed=9, **options))
    assert len(plan) == budget and keep[plan.positions].all()
    assert plan.settings["regime"] == regime
    assert plan.settings["noise_rate"] == pytest.approx(wrong / 100, abs=0.02)
    assert plan.settings["kept_rows"] == int(keep.sum())
    if wrong > 5:
        assert trial.given == [] and plan.settings["trial_accuracy"] is None  # no training is wasted
    elif trial:
        assert plan.settings["trial_accuracy"] == pytest.approx(np.mean(accuracies))


def test_the_trial_trains_on_balanced_uniform_rows_that_are_likely_clean():
    table = noisy_table(0)
    names = [f"row {i}" for i in range(1000)]
    trial = Trials(*[0.9] * 5)
    default_plan(table, 60, trial=trial, trials=5, seed=9, row_ids=names)
    assert len(trial.given) == 5
    drawn = [set(positions.tolist()) for positions, _ in trial.given]
    assert all(len(a & b) < 20 for i, a in enumerate(drawn) for b in drawn[:i])  # draws of their own
    for k, (positions, weights) in enumerate(trial.given):
        assert torch.bincount(table["label"][positions]).tolist() == [12] * 5
        assert (table["p_clean"][positions] >= 0.5).all()
        close(weights, loss_weights("p_label", p_label=table["p_label"][positions]))
        expected = make_plan(table, 60, score="uniform", keep=table["p_clean"] >= 0.5, seed=10 + k, row_ids=names)
        assert torch.equal(positions, expected.positions)


def test_overrides_win_over_the_preset():
    table = noisy_table(0)
    agreed = table["label"] == table["predicted"]
    plan = default_plan(table, 200, weights="none", sampler="poisson", seed=1)
    assert same(plan, make_plan(table, 200, keep=agreed, clip_quantile=0.5, weights="none", sampler="poisson", seed=1))
    # a cap of one form takes the place of the preset's of the other form
    assert same(default_plan(table, 200, clip=0.3), make_plan(table, 200, keep=agreed, clip=0.3))
    assert same(default_plan(table, 200, clip_quantile=None), make_plan(table, 200, keep=agreed))
    assert same(
        paper_plan(table, 200, clip_quantile=0.5),
        make_plan(table, 200, score="u_y", sampler="sequential", weights="damped", clip_quantile=0.5),
    )
    assert same(active_plan(table, 200, clip=0.3), make_plan(table, 200, quotas="predicted", weights="none", clip=0.3))
    # the cap is one of the preset's score
    assert same(default_plan(table, 200, score="u_y"), make_plan(table, 200, keep=agreed, score="u_y"))
    with pytest.raises(ValueError, match="by one of them only"):
        default_plan(table, 200, clip=0.3, clip_quantile=0.2)
    # quotas are the trials' too: three rows for five classes
    trial = Trials(0.9, 0.9, 0.9)
    assert len(default_plan(table, 3, trial=trial, quotas="none")) == 3
    keep = torch.arange(1000) < 700
    plan = default_plan(table, 200, keep=keep)
    assert same(plan, make_plan(table, 200, keep=keep, clip_quantile=0.5)) and plan.settings["kept_rows"] == 700
    assert default_plan(table, 200, keep=None).settings["kept_rows"] == 1000


def filled(table, keep, budget, groups, seed):
    """The kept rows and, for classes short of their quota, their likeliest others; written naively."""
    likely = (table["p_clean"] >= 0.5) | keep
    fits = likely if int(likely.sum()) >= budget else torch.ones_like(keep)
    count = int(groups.max()) + 1
    quotas = class_quotas(torch.bincount(groups[fits], minlength=count), budget, seed=seed)
    keep = keep.clone()
    for group in range(count):
        rows = [i for i in range(len(keep)) if groups[i] == group]
        rows.sort(key=lambda i: (not keep[i], not fits[i], -float(table["p_label"][i])))
        keep[rows[: int(quotas[group])]] = True
    return keep


@pytest.mark.parametrize("quotas", ["label", "predicted", "none"])
@pytest.mark.parametrize("budget,seed", [(60, 0), (200, 1), (200, 2), (200, 3), (331, 4), (331, 5), (420, 6)])
def test_classes_short_of_kept_rows_are_filled_with_their_likeliest_others(quotas, budget, seed):
    table = score_table(450, classes=3, agreed=0.5)
    table["p_label"] = table["p_label"].mul(20).round() / 20  # with ties, of which the first rows come first
    # class 0 is one that the probes are bad at, and many of its labels look wrong
    hard = table["label"] == 0
    table["predicted"][hard & (torch.arange(450) % 9 > 0)] = 1
    table["p_clean"][hard & (torch.arange(450) % 5 < 3)] = 0.3
    agreed = table["label"] == table["predicted"]
    plan = default_plan(table, budget, quotas=quotas, seed=seed)
    assert plan.settings["regime"] == "agreement"
    groups = torch.zeros(450, dtype=torch.long) if quotas == "none" else table[quotas]
    keep = filled(table, agreed, budget, groups, seed)
    options = {"score": "uniform"} if budget / 3 < ENOUGH_ROWS else {"clip_quantile": 0.5}
    assert same(plan, make_plan(table, budget, keep=keep, quotas=quotas, seed=seed, **options))
    assert keep[plan.positions].all() and len(plan) == budget
    assert plan.settings["kept_rows"] == int(keep.sum())
    doubted = (table["p_clean"] < 0.5) & ~agreed
    if budget < 400:  # there are other rows enough
        assert not doubted[plan.positions].any()
    if (quotas, budget) == ("label", 60):
        assert int((agreed & hard).sum()) < 20  # or there is nothing to fill
        assert torch.bincount(table["label"][plan.positions]).tolist() == [20, 20, 20]


def test_a_class_of_which_no_label_is_believed_is_left_out_while_the_others_suffice():
    table = score_table(450, classes=3, agreed=0.5)
    lost = table["label"] == 2
    table["predicted"][lost] = 1
    table["p_clean"][lost] = 0.1
    counts = torch.bincount(table["label"][default_plan(table, 90).positions], minlength=3)
    assert counts.tolist() == [45, 45, 0]
    assert (torch.bincount(table["label"][default_plan(table, 400).positions], minlength=3) > 80).all()


# ---- pools without labels, and the released recipe


@pytest.mark.parametrize(
    "accuracy,regime,options",
    [
        (None, "clipped", {"clip_quantile": 0.5}),
        (0.5, "uniform", {"score": "uniform"}),
        (0.8599, "uniform", {"score": "uniform"}),
        (0.86, "clipped", {"clip_quantile": 0.5}),
        (0.9449, "clipped", {"clip_quantile": 0.5}),
        (0.945, "unclipped", {}),
        (1.0, "unclipped", {}),
        (0.0, "uniform", {"score": "uniform"}),
    ],
)
def test_what_to_label_follows_the_accuracy(accuracy, regime, options):
    table = {name: column for name, column in score_table().items() if name in ("u_x", "predicted")}
    plan = active_plan(table, 100, accuracy=accuracy, seed=3)
    assert same(plan, make_plan(table, 100, quotas="predicted", weights="none", seed=3, **options))
    assert plan.settings["regime"] == regime and plan.settings["trial_accuracy"] == accuracy
    assert torch.bincount(table["predicted"][plan.positions]).tolist() == [20] * 5
    named = active_plan(table, 100, accuracy=accuracy, row_ids=[str(i) for i in range(600)])
    assert chosen(named) != chosen(active_plan(table, 100, accuracy=accuracy))


@pytest.mark.parametrize(
    ("accuracy", "budget", "regime"),
    [(1.0, 39, "uniform"), (None, 39, "uniform"), (1.0, 40, "clipped"), (1.0, 99, "clipped"), (1.0, 100, "unclipped")],
)
def test_what_to_label_is_as_careful_with_few_rows_a_class_as_what_to_train_on(accuracy, budget, regime):
    table = score_table()  # of five classes
    assert active_plan(table, budget, accuracy=accuracy).settings["regime"] == regime
    if accuracy is not None:
        labelled = table | {"label": table["predicted"], "p_clean": torch.ones(600), "confidence": torch.ones(600)}
        found = default_plan(labelled, budget, trial=lambda *_: accuracy).settings["regime"]
        assert found == {"uniform": "agreement"}.get(regime, regime)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_released_recipe_draws_by_class_where_there_are_labels_and_weights_by_u(labelled):
    table, score = score_table(), "u_y" if labelled else "u_x"
    table[score] = 0.05 * table[score] ** 3  # on either side of both constants
    plan, capped = paper_plan(table, 100, labelled=labelled, seed=3), table[score].clamp(max=0.005)
    quotas = class_quotas(torch.bincount(table["label"]), 100, seed=3)
    by_class, _ = by_group(capped, table["label"], quotas, sequential)
    assert plan.positions.tolist() == (by_class if labelled else sequential_draw(capped, 100, seed=3).tolist())
    u = table[score][plan.positions].double()
    assert (u < 0.005).any() and (u > 0.1).any()
    raw = (1 / u).clamp(max=10)
    close(plan.weights, raw / raw.mean())
    assert plan.probabilities.isnan().all()
    assert plan.settings["preset"] == "paper"
    named = paper_plan(table, 100, labelled=labelled, seed=3, row_ids=[f"{i}" for i in range(600)])
    assert chosen(named) != chosen(plan)


# ---- the noise rate of a table


@pytest.mark.parametrize("contamination", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("rows", [60, 3000])
def test_the_noise_rate_of_a_table_is_that_of_its_predictions(contamination, rows):
    g = np.random.default_rng(0)
    truth = g.integers(0, 6, rows)
    logits = torch.from_numpy(1.5 * g.normal(size=(rows, 6)) + 4 * np.eye(6)[truth])
    labels = torch.from_numpy(np.where(g.random(rows) < contamination, g.integers(0, 6, rows), truth))
    p = logits.softmax(1)
    table = {
        "label": labels,
        "predicted": p.argmax(1),
        "confidence": p.amax(1),
        "p_clean": fit_label_noise(p, labels).p_clean(p, labels),
    }
    assert table_noise(table) == pytest.approx(noise_rate(p, labels), abs=1e-4)
    # either reading may be the larger one
    assert table_noise(table | {"predicted": labels}) == pytest.approx(fit_label_noise(p, labels).rate, abs=1e-4)
    sure = table_noise(table | {"p_clean": torch.ones(rows)})
    surest = p.amax(1).topk(min(rows, max(100, rows // 10))).indices
    assert sure == pytest.approx(1 - float(agreement(p[surest], labels[surest]).double().mean()), abs=1e-9)


def test_the_noise_rate_counts_the_classes_voted_for_too():
    table = {
        "label": torch.tensor([0, 1]),
        "predicted": torch.tensor([0, 3]),
        "confidence": torch.tensor([0.9, 0.2]),
        "p_clean": torch.tensor([0.2, 0.2]),
    }
    swapped = table | {"label": table["predicted"], "predicted": table["label"]}
    last = swapped | {"label": torch.tensor([3, 0])}  # the last class is not in the last row
    for changed, options, expected in (
        (table, {"share": 0.5}, 0.8 * 3 / 4),
        (table, {"share": 1.0}, 0.6),
        (swapped, {"share": 0.5}, 0.8 * 3 / 4),
        (last, {"share": 0.5}, 1),
        (last | {"predicted": last["label"]}, {}, 0.6),
        (table | {"p_clean": torch.ones(2)}, {"share": 1.0}, 0.5),
        (table | {"p_clean": torch.ones(2)}, {"share": 0.5}, 0),
        (table | {"p_clean": torch.ones(2)}, {"share": 0.5, "least": 100}, 0.5),
    ):
        assert table_noise(changed, **({"least": 1} | options)) == pytest.approx(expected)
    # a tenth of the rows, and a hundred at least
    for rows, expected in ((1000, 1), (900, 1), (2000, 0.5)):
        table = {"label": torch.zeros(rows), "predicted": (torch.arange(rows) < 100).long()}
        table |= {"confidence": torch.linspace(1, 0.5, rows), "p_clean": torch.ones(rows)}
        assert table_noise(table) == pytest.approx(expected)


# ---- bad input


@pytest.mark.parametrize("make", [make_plan, default_plan, active_plan, paper_plan])
def test_budgets_that_are_no_number_of_rows_and_empty_tables_are_refused(make):
    for budget in (0, -1, 601, 2.5, True, None, NAN, "60"):
        with pytest.raises(ValueError) as error:
            make(score_table(), budget)
        assert f"budget={budget!r}: it must be a whole number of rows from 1 up to the 600" in str(error.value)
    with pytest.raises(ValueError, match=r"columns of \{\} rows"):
        make({}, 60)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sampler": "greedy"}, r"sampler='greedy'.*'priority', 'poisson', 'sequential', 'top-k'"),
        ({"quotas": "class"}, r"quotas='class'.*'label', 'predicted', 'strata', 'none'"),
        ({"weights": "inverse"}, r"weights='inverse'.*'p_label', 'damped', 'exact', 'none'"),
        ({"score": "grand"}, r"no column 'grand', only \['confidence', .*score=, quotas= or weights="),
        ({"clip": 0.1, "clip_quantile": 0.5}, "by one of them only"),
        ({"clip": -1.0}, "value=-1.0: a cap must be positive"),
        ({"clip_quantile": 2.0}, "quantile=2.0"),
        ({"uniform_share": -0.1}, "share=-0.1"),
        ({"uniform_share": 0.1, "sampler": "sequential"}, "uniform_share=0.1 has no effect on sampler='sequential'"),
        ({"uniform_share": 0.1, "sampler": "top-k"}, "uniform_share=0.1 has no effect on sampler='top-k'"),
        ({"quotas": "strata", "sampler": "top-k"}, "quotas='strata' draws uniformly.*use sampler='priority'"),
        ({"quotas": "strata", "bins": 0}, "bins=0"),
        ({"cut_hardest": 1.0}, "share=1.0"),
        ({"cut_hardest": -0.5}, "share=-0.5"),
        ({"cut_hardest": 0.2, "score": "uniform"}, "cut_hardest=0.2 needs a score.*keep=without_hardest"),
        ({"weights": "damped", "beta": 0.0, "score": "zero"}, "weights='damped' come out infinite.*beta=0.0"),
        ({"score": "margin"}, "scores are NaN, infinite or negative"),
        ({"row_ids": torch.arange(599)}, "599 row_ids for 600 rows"),
        ({"row_ids": ["a"] * 601}, "601 row_ids for 600 rows"),
        ({"row_ids": torch.arange(600.0)}, "pass one integer or text a row"),
        ({"force": "no"}, "force='no': it must be True or False"),
        ({"log_scores": "no"}, "log_scores='no': it must be True or False"),
        ({"uniform_share": "0.1"}, "uniform_share='0.1': it must be a number"),
        ({"quotas": "strata", "bins": 2.5}, "bins=2.5: it must be a whole number"),
        ({"weights": "damped", "beta": "0.1"}, "beta='0.1': it must be a number"),
        ({"clip": "0.1"}, "clip='0.1': it must be a number"),
        ({"row_ids": (i for i in range(600))}, "row_ids is a generator; pass a tensor, an array or a list"),
        ({"keep": torch.ones(600)}, r"keep is torch.float32 of shape \(600,\); pass a boolean mask of 600 rows"),
        ({"keep": torch.arange(600)}, r"keep is torch.int64"),
        ({"keep": torch.ones(599, dtype=torch.bool)}, r"keep is torch.bool of shape \(599,\)"),
        ({"budget": 4}, r"budget=4 is below the 5 classes.*to 5 or more, or set quotas='none'"),
        (
            {"budget": 300, "sampler": "sequential", "weights": "exact"},
            "sampler='sequential'.*'priority' or 'poisson'",
        ),
        ({"budget": 300, "sampler": "top-k", "weights": "exact"}, "weights='exact'.*sampler='top-k'"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(options, message):
    table = score_table() | {"zero": torch.zeros(600)}
    table |= {"u_y": torch.zeros(600), "el2n": torch.ones(600)}
    options = {"budget": 60} | options
    with pytest.raises((ValueError, TypeError), match=message):
        make_plan(table, **options)


@pytest.mark.parametrize("score", LABEL_DEPENDENT)
def test_what_a_refusal_names_as_the_way_out_is_one(score):
    assert set(LABEL_DEPENDENT) >= {"u_y", "el2n"} and "u_x" not in LABEL_DEPENDENT
    table = score_table()
    table[score] = table["u_y"]
    with pytest.raises(ValueError, match=rf"score='{score}' depends on the label.*weights='none'.*'p_label'.*force"):
        make_plan(table, 60, score=score, weights="none")
    for options in ({"weights": "none", "force": True}, {"weights": "damped"}):
        assert len(make_plan(table, 60, score=score, **options)) == 60
    for budget, options in ((4, {"quotas": "none"}), (4, {"quotas": "strata"}), (5, {}), (60, {"weights": "none"})):
        assert len(make_plan(score_table(), budget, **options)) == budget


@pytest.mark.parametrize("name", ["label", "predicted", "u_x", "p_label", "confidence", "p_clean"])
def test_columns_that_are_missing_or_not_finite_are_named(name):
    table = score_table()
    given = {key: column for key, column in table.items() if key != name}
    with pytest.raises(ValueError, match=f"no column '{name}'"):
        default_plan(given, 200)
    broken = table[name].double()
    broken[[33, 44]] = NAN
    with pytest.raises(ValueError, match=f"column '{name}' has 2 NaN or infinite values, the first at row 33"):
        default_plan(table | {name: broken}, 200)
    with pytest.raises(ValueError, match=rf"columns of \{{.*'{name}': 599.*one length"):
        default_plan(table | {name: table[name][1:]}, 200)


def test_classes_below_zero_are_refused():
    table = score_table()
    table["label"] = table["label"] - 1
    missing = int((table["label"] < 0).sum())
    with pytest.raises(ValueError, match=rf"column 'label' holds {missing} negative classes.*quotas='predicted' or"):
        make_plan(table, 60)
    assert len(make_plan(table, 60, quotas="predicted")) == 60


def test_an_empty_poisson_draw_is_refused():
    table = score_table()
    seed = next(s for s in range(99) if (hashed_uniform(s, torch.arange(600)) >= 1 / 600).all())
    with pytest.raises(ValueError, match="Poisson draw with budget=1 came out empty.*sampler='priority'"):
        make_plan(table, 1, score="uniform", quotas="none", sampler="poisson", seed=seed)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_settings_of_numpy_and_torch_are_kept_as_pythons_own(kind):
    whole = {np.float32: np.int32, np.float64: np.int64}.get(kind, torch.tensor)
    numbers = {"clip_quantile": 0.5, "uniform_share": 0.25, "beta": 0.125}
    given = {name: kind(value) for name, value in numbers.items()} | {"seed": whole(3)}
    plan = make_plan(score_table(), whole(60), weights="damped", **given)
    assert same(plan, make_plan(score_table(), 60, weights="damped", seed=3, **numbers))
    assert {name: plan.settings[name] for name in numbers} == numbers and json.loads(json.dumps(plan.settings))
    assert json.dumps(make_plan(score_table(), 60, quotas="strata", bins=whole(5)).settings)


def test_columns_of_tables_come_in_their_order_whatever_their_index():
    pandas = pytest.importorskip("pandas")
    table, keep, ids = score_table(), np.arange(600) % 2 == 0, [f"row {i}" for i in range(600)]
    plan = make_plan(table, 60, keep=torch.from_numpy(keep), row_ids=ids)
    turned = np.arange(600)[::-1]

    def column(values):
        return pandas.Series(np.asarray(values), index=turned + 7)

    columns = {name: column(values) for name, values in table.items()}
    assert same(make_plan(columns, 60, keep=column(keep), row_ids=column(np.array(ids, dtype=object))), plan)
    numbers = 3 * torch.arange(600)
    of_tensor = make_plan(table, 60, row_ids=numbers)
    assert same(make_plan(table, 60, row_ids=column(numbers)), of_tensor)
    assert same(make_plan(table | {"u_x": table["u_x"].numpy().astype(">f8")}, 60), make_plan(table, 60))
    assert same(make_plan(table | {"u_x": table["u_x"].flip(0).numpy()[::-1]}, 60), make_plan(table, 60))
    holes = np.ma.masked_array(table["u_x"].numpy(), np.arange(600) == 3)
    with pytest.raises(TypeError, match="column 'u_x' are no numbers .some are masked.; pass"):
        make_plan(table | {"u_x": holes}, 60)


def test_scores_of_any_real_type_and_masks_from_numpy_are_taken():
    table, keep = score_table(), np.arange(600) % 2 == 0
    plan = make_plan(table, 60, keep=keep)
    assert same(plan, make_plan(table, 60, keep=torch.from_numpy(keep)))
    table["u_x"] = (10 * table["u_x"]).ceil().long()
    whole = make_plan(table, 60)
    table["u_x"] = table["u_x"].double()
    assert same(make_plan(table, 60), whole)
