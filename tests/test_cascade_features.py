"""What the cascade knows of candidates and of answers: row model, matches, labels, consensus, against plain loops."""

import math

import pytest
import torch
from tables import CASES, drawn, table
from torch import Tensor
from torch.nn import functional as F

from hf_effdl.vicl.remote_code import cascade_head
from hf_effdl.vicl.remote_code import cascade_rows as row_model
from hf_effdl.vicl.remote_code.cascade_consensus import ANSWERS, MAPS, Answers, Consensus, _overlap, small
from hf_effdl.vicl.remote_code.cascade_features import (
    MATCHES,
    STATISTICS,
    dense_matches,
    label_statistics,
    products,
    ridge,
    ridge_by_class,
    standardised,
)
from hf_effdl.vicl.remote_code.cascade_head import ListHeads, train_heads
from hf_effdl.vicl.remote_code.cascade_lists import MeasuredLists
from hf_effdl.vicl.remote_code.cascade_precedents import CLASS
from hf_effdl.vicl.remote_code.cascade_rows import RowModel, quarters_of
from hf_effdl.vicl.remote_code.cascade_stages import Scorer
from hf_effdl.vicl.remote_code.visual_tasks import find_task


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=drawn(seed)), dim=-1)


# ---- the row model


def by_hand(
    views: list[Tensor], measured: Tensor, performance: Tensor, asked: list[Tensor], row: int, own: set[int]
) -> list[float]:
    """The eight predictions for one candidate of one query, from a table that never had rows of the query's group."""
    n = len(measured)
    labelled = [j for j in range(n) if (measured[j] >= 0).any() and j not in own]
    complete = all((measured[j] >= 0).sum() == n - 1 for j in labelled)
    residual = []  # of the candidate, on each labelled image; None where it was not measured
    for j in labelled:
        known = [k for k in range(measured.shape[1]) if measured[j, k] >= 0]
        mean = sum(float(performance[j, k]) for k in known) / len(known)
        at = [k for k in known if measured[j, k] == row]
        residual.append(float(performance[j, at[0]]) - mean if at else None)
    seen = [value for value in residual if value is not None]
    quality = sum(seen) / len(seen) if seen else 0.0
    found = []
    for view, one in zip(views, asked):
        apart = [float((a - b).square().sum()) for i, a in enumerate(view) for j, b in enumerate(view) if i != j]
        middle = sorted(apart)[(len(apart) - 1) // 2]
        for gamma in (1.0, 0.3):

            def kernel(a: Tensor, b: Tensor) -> Tensor:
                return (-(a[:, None] - b[None]).double().square().sum(2) / (gamma * middle)).exp()  # noqa: B023

            k = kernel(one[None], view[labelled])[0]
            if complete:
                filled = torch.tensor([quality if value is None else value for value in residual]).double()
                gram = kernel(view[labelled], view[labelled]) + torch.eye(len(labelled)).double()
                found.append(quality + float(k @ torch.linalg.solve(gram, filled - quality)))
            else:
                pairs = [(float(w), value) for w, value in zip(k, residual) if value is not None]
                found.append(sum(w * v for w, v in pairs) / (sum(w for w, _ in pairs) + 1))
    cosine = views[0][labelled] @ asked[0]
    for count in (5, 15, 40):
        near = sorted(range(len(labelled)), key=lambda j: -float(cosine[j]))[:count]
        total = sum(math.exp(float(cosine[j]) / 0.05) for j in near)
        pairs = [(math.exp(float(cosine[j]) / 0.05) / total, residual[j]) for j in near]
        if complete:
            found.append(sum(w * (quality if v is None else v) for w, v in pairs))
        else:
            pairs = [(w, v) for w, v in pairs if v is not None]
            found.append(sum(w * v for w, v in pairs) / (sum(w for w, _ in pairs) + 0.1))
    return [*found, quality if complete else sum(seen) / (len(seen) + 1)]


GROUPS = [torch.arange(14), torch.arange(14) // 3, torch.tensor([0] * 9 + [1] * 5)]


def of_group(groups: Tensor, own: int) -> set[int]:
    return {row for row in range(len(groups)) if own >= 0 and groups[row] == groups[own]}


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("groups", GROUPS, ids=["alone", "in threes", "in two"])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_predicted_as_by_hand_also_where_those_of_the_own_group_were_never_there(case, groups):
    n, (labelled, count) = 14, CASES[case]
    views = [unit(n, 6), unit(n, 12, seed=1)]
    measured, performance = table(n, labelled, count)
    model = RowModel(*views, measured, performance, groups)
    own = torch.tensor([labelled[2], -1, next(iter({*range(n)} - {*labelled}), labelled[0]), labelled[-1]])
    asked = [torch.where(own[:, None] >= 0, view[own], unit(4, view.shape[1], seed=5)) for view in views]
    rows = torch.tensor([[c for c in range(n) if c != one][:13] for one in own.tolist()])
    found = model.predict(*asked, rows, own)
    out = [of_group(groups, one) for one in own.tolist()]
    expected = [
        [by_hand(views, measured, performance, [a[b] for a in asked], c, out[b]) for c in rows[b].tolist()]
        for b in range(4)
    ]
    assert found.shape == (4, 13, len(RowModel.names))
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=1e-4)
    # without `own`, a query is one like any other
    torch.testing.assert_close(model.predict(*asked, rows)[1], found[1])
    assert (model.predict(*asked, rows)[0] - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_rows_can_be_taken_out_again(case):
    n, (labelled, count) = 14, CASES[case]
    views, gone = [unit(n, 6), unit(n, 12, seed=1)], torch.tensor([labelled[0], labelled[3]])
    measured, performance = table(n, labelled, count)
    whole = RowModel(*views, measured, performance)
    rows = torch.tensor([[c for c in range(n) if c != one][:13] for one in range(n)])
    before, own = whole.predict(*views, rows, torch.arange(n)), torch.arange(n)
    found = whole.without(gone).predict(*views, rows, own)
    measured[gone] = -1
    torch.testing.assert_close(found, RowModel(*views, measured, performance).predict(*views, rows, own))
    assert (found - before).abs().max() > 1e-3
    assert torch.equal(whole.predict(*views, rows, own), before)  # the first is as it was


def among_by_hand(
    measured: Tensor, performance: Tensor, alike: Tensor, rows: list[int], row: int, own: set[int]
) -> list[float]:
    """What one candidate did on the others of a list, by weights that follow from how alike those are to the query."""
    found = []
    for column in alike.T.tolist():
        for softness in (0.25, 0.5, 1.0):
            labelled = [k for k, j in enumerate(rows) if j >= 0 and j not in own and (measured[j] >= 0).any()]
            total = sum(math.exp(column[k] / softness) for k in labelled)
            above, below = 0.0, 0.1
            for k in labelled:
                known = measured[rows[k]] >= 0
                at = (measured[rows[k]] == row).nonzero()[:, 0].tolist()
                if row >= 0 and at:
                    weight = math.exp(column[k] / softness) / total
                    mean = performance[rows[k]][known].mean()
                    above, below = above + weight * float(performance[rows[k], at[0]] - mean), below + weight
            found.append(above / below)
    return found


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("groups", GROUPS[:2], ids=["alone", "in threes"])
@pytest.mark.parametrize("case", CASES)
def test_candidates_transfer_to_each_other_as_by_hand(case, groups):
    n, (labelled, count) = 14, CASES[case]
    views, (measured, performance) = [unit(n, 6), unit(n, 12, seed=1)], table(n, labelled, count)
    model = RowModel(*views, measured, performance, groups)
    rows = torch.stack([torch.randperm(n, generator=drawn(b))[:9] for b in range(4)])
    rows[1, 4], rows[2, :] = -1, -1
    alike = torch.randn(4, 9, 2, generator=drawn(7))
    # a query of its own pool, not of it, in no list, and among its own candidates
    own = torch.tensor([labelled[2], -1, labelled[0], int(next(row for row in rows[3] if row in labelled))])
    found, out = model.among(alike, rows, own), [of_group(groups, one) for one in own.tolist()]
    expected = [
        [among_by_hand(measured, performance, alike[b], rows[b].tolist(), c, out[b]) for c in rows[b].tolist()]
        for b in range(4)
    ]
    assert found.shape == (4, 9, len(RowModel.among_names)) and not found[2].any() and found[0].abs().max() > 0.01
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    # and images can be taken out
    gone = torch.tensor(labelled[:3])
    fewer = model.without(gone).among(alike, rows, own)
    measured[gone] = -1
    torch.testing.assert_close(fewer, RowModel(*views, measured, performance, groups).among(alike, rows, own))


def test_entries_that_are_not_there_are_zero_and_neighbours_may_be_fewer_than_asked_for():
    views, (measured, performance) = [unit(9, 6), unit(9, 12)], table(9, [2, 3], 4)
    found = RowModel(*views, measured, performance).predict(
        *(view[:2] for view in views), torch.tensor([[4, -1, int(measured[2, 0])], [-1, -1, int(measured[3, 1])]])
    )
    assert found.isfinite().all() and not found[0, 1].any() and not found[1, :2].any() and found[1, 2].any()


def test_widths_are_measured_on_a_sample_of_a_large_pool(monkeypatch):
    monkeypatch.setattr(row_model, "SAMPLE", 4)
    views, (measured, performance) = [unit(13, 6), unit(13, 12)], table(13, [0, 1])
    model = RowModel(*views, measured, performance)
    some = views[0][[0, 3, 6, 9, 12]]
    apart = torch.cdist(some, some).square()
    assert model.units[0] == pytest.approx(float(apart[~torch.eye(5, dtype=torch.bool)].median()), abs=1e-5)


def test_quarters_are_unit_vectors_of_all_tokens_but_the_first():
    tokens = torch.randn(3, 5, 4, generator=drawn())
    expected = tokens[:, 1:].reshape(3, 16)
    torch.testing.assert_close(quarters_of(tokens), expected / expected.norm(dim=1, keepdim=True))
    assert quarters_of(tokens.half()).dtype == torch.float32


# ---- matches, labels, a linear model inside lists


def matches_by_hand(asked: Tensor, example: Tensor, share: Tensor) -> dict[str, float]:
    s = asked @ example.T
    inside = [j for j in range(len(example)) if share[j] > 0.5]
    outside = [j for j in range(len(example)) if share[j] <= 0.5]
    best, back = [float(s[i].max()) for i in range(len(asked))], [float(s[:, j].max()) for j in range(len(example))]
    found = {"forward": sum(best) / len(best), "backward": sum(back) / len(back)}
    for name, cells in (("object", inside), ("background", outside)):
        found[f"to {name}"] = (
            sum(max(float(s[i, j]) for j in cells) for i in range(len(asked))) / len(asked) if (cells) else 0.0
        )
        found[f"from {name}"] = sum(back[j] for j in cells) / len(cells) if cells else 0.0
    mutual = [
        any(s[i, j] == s[i].max() and s[i, j] == s[:, j].max() for j in range(len(example))) for i in range(len(s))
    ]
    worst = sorted(best)[: max(1, len(best) // 10)]
    return found | {"mutual": sum(mutual) / len(mutual), "worst places": sum(worst) / len(worst)}


@pytest.mark.parametrize(("cells", "others"), [(6, 6), (25, 9)])
def test_matches_are_those_of_loops(cells, others):
    asked, grids = unit(3, cells, 5), unit(3, 4, others, 5, seed=1)
    shares = torch.rand(3, 4, others, generator=drawn(2))
    shares[0, 0], shares[0, 1], shares[1, 2, :2] = 0.0, 1.0, 0.5  # no object, no background, and the edge between
    found = dense_matches(asked, grids, shares)
    for b in range(3):
        for k in range(4):
            expected = matches_by_hand(asked[b], grids[b, k], shares[b, k])
            assert found[b, k].tolist() == pytest.approx([expected[name] for name in MATCHES], abs=1e-5), (b, k)


@pytest.mark.parametrize(("asked", "cells", "count"), [(9, 256, 1), (3, 53, 2), (5, 34, 1), (49, 49, 3)])
def test_products_are_those_of_matrices_and_left_to_onednn_however_few_the_maps(asked, cells, count):
    query, maps = unit(asked, 16), unit(count, cells, 16, seed=1)
    with torch.profiler.profile() as seen:
        found = products(query, maps)
    torch.testing.assert_close(found, maps @ query.T)
    if torch.backends.mkldnn.is_available() and cells == 256:
        assert "aten::mkldnn_convolution" in {event.key for event in seen.key_averages()}


def test_statistics_of_a_rectangle():
    label = torch.zeros(3, 20, 40)
    label[:, 4:12, 10:40] = 1  # 8 x 30 pixels, which touch the right side
    found = dict(zip(STATISTICS, label_statistics(label).tolist()))
    x, y = torch.linspace(-1, 1, 40)[10:], torch.linspace(-1, 1, 20)[4:12]
    assert found["area"] == pytest.approx(240 / 800)
    assert (found["x"], found["y"]) == (pytest.approx(float(x.mean()), abs=1e-5), pytest.approx(float(y.mean())))
    spread = float(x.var(correction=0)), float(y.var(correction=0))
    assert (found["x spread"], found["y spread"]) == (pytest.approx(spread[0], 1e-3), pytest.approx(spread[1], 1e-3))
    assert found["border"] == pytest.approx(8 / 120)
    assert found["compactness"] == pytest.approx(0.3 / (4 * math.sqrt(spread[0] * spread[1])), 1e-3)
    assert found["outline"] == pytest.approx((2 * 30 + 8) / math.sqrt(240))  # where the picture ends is no outline
    assert found["chroma"] == 0 and found["contrast"] == pytest.approx(math.sqrt(0.3 * 0.7 * 800 / 799))


def test_statistics_of_colours_of_nothing_and_of_batches():
    labels = torch.rand(2, 4, 3, 7, 9, generator=drawn())
    labels[0, 1] = 0
    found = label_statistics(labels)
    assert found.shape == (2, 4, len(STATISTICS)) and found.isfinite().all()
    for b in range(2):
        for k in range(4):
            torch.testing.assert_close(label_statistics(labels[b, k]), found[b, k])
    grey = labels[1, 2].mean(0, keepdim=True)
    assert float(found[1, 2, STATISTICS.index("chroma")]) == pytest.approx(float((labels[1, 2] - grey).abs().mean()))
    assert not found[0, 1].any()


def test_features_are_relative_to_the_list_in_two_units():
    generator = drawn()
    features = torch.randn(5, 6, 4, generator=generator) * torch.tensor([1.0, 50.0, 1e-3, 3.0])
    features[..., 3] = torch.arange(5.0)[:, None] * 1e4 / 3  # the same all over a list
    features[0, :, 1] *= 100  # one wild list
    known = torch.rand(5, 6, generator=generator) > 0.3
    known[:, 0], known[4] = True, torch.tensor([True] + [False] * 5)
    features[~known] = torch.nan  # what is not there may be anything
    found, spread = standardised(features, known)
    every = torch.cat([features[b][known[b]] - features[b][known[b]].mean(0) for b in range(5)])
    torch.testing.assert_close(spread, every.square().mean(0).sqrt(), rtol=1e-4, atol=1e-3)
    for b in range(5):
        rows = features[b][known[b]]
        for f in range(3):
            centred = rows[:, f] - rows[:, f].mean()
            own = found[b, known[b], f]
            assert own.tolist() == pytest.approx(
                (centred / rows[:, f].std()).tolist() if len(rows) > 1 else [0.0], abs=1e-3
            )
            both = (centred / spread[f]).clamp(-6, 6)
            assert found[b, known[b], 4 + f].tolist() == pytest.approx(both.tolist(), abs=1e-3)
    assert not found[~known].any() and not found[..., 3].any()
    assert found[..., 4:].abs().max() <= 6
    again, same = standardised(features[:1], known[:1], spread)
    torch.testing.assert_close(again, found[:1])
    assert same is spread


def test_classes_depart_from_shared_weights_as_columns_of_their_own_would():
    features, target = torch.randn(9, 7, 3, generator=drawn()), torch.randn(9, 7, generator=drawn(1))
    known, classes = torch.rand(9, 7, generator=drawn(2)) > 0.2, torch.randint(-1, 2, (9, 7), generator=drawn(3))
    shared, apart = ridge_by_class(features, target, known, classes, 3, 5.0, 2.0)
    rows, values, of = features[known].double(), target[known].double(), classes[known]
    wide = torch.cat([rows, *(rows * (of == one)[:, None] for one in range(3))], 1)
    penalty = torch.tensor([5.0] * 3 + [2.0] * 9).double().diag()
    by_hand = torch.linalg.solve(wide.T @ wide + penalty, wide.T @ values).float()
    torch.testing.assert_close(torch.cat([shared, apart.flatten()]), by_hand)
    assert apart[2].abs().max() == 0 < apart[:2].abs().min()  # of which there is nothing
    held = ridge_by_class(features, target, known, classes, 3, 5.0, 1e9)
    torch.testing.assert_close(held[0], ridge(features, target, known, 5.0))
    assert held[1].abs().max() < 1e-6


@pytest.mark.parametrize("opposite", [True, False])
def test_weights_are_learnt_by_class_where_classes_differ(opposite):
    lists, size = 60, 8
    features, classes = torch.randn(lists, size, 2, generator=drawn()), torch.arange(lists)[:, None] % 3
    sign = torch.where(classes == 2, -1.0, 1.0) if opposite else torch.ones(lists, 1)
    target = sign * features[..., 0] + 0.1 * torch.randn(lists, size, generator=drawn(1))
    rows, alike, folds = torch.arange(size).expand(lists, -1), torch.zeros(lists, size), torch.arange(lists) % 5
    measured = MeasuredLists(torch.arange(lists), rows, target, alike, folds)
    columns = {"some": features, CLASS: classes[..., None].expand(-1, size, -1)}
    scorer, held = Scorer.fit(columns, measured)
    without, held_without = Scorer.fit({"some": features}, measured)
    errors = [float((scores - measured.target).square().mean()) for scores in (held, held_without)]
    if not opposite:
        assert errors[0] <= errors[1]
        return
    assert errors[0] < 0.5 * errors[1] and scorer.apart.shape == (3, 4)
    known = torch.ones(lists, size, dtype=torch.bool)
    scores, other = scorer.scores(columns, known), scorer.scores(columns | {CLASS: columns[CLASS] * 0}, known)
    assert torch.equal(scores[::3], other[::3])
    agree = [float((part[2::3] * measured.target[2::3]).sum().sign()) for part in (scores, other)]
    assert agree == [1.0, -1.0]
    nobody = scorer.scores(columns | {CLASS: columns[CLASS] * 0 - 1}, known)  # has the shared ones
    features = standardised(columns["some"], known, scorer.spread)[0]
    torch.testing.assert_close(nobody, features @ scorer.weights)


def test_ridge_is_least_squares_with_rows_that_hold_the_weights_down():
    generator = drawn()
    features, target = torch.randn(7, 5, 3, generator=generator), torch.randn(7, 5, generator=generator)
    known = torch.rand(7, 5, generator=generator) > 0.4
    target[~known] = 1e6
    rows = torch.cat([features[known], math.sqrt(2.5) * torch.eye(3)]).double()
    values = torch.cat([target[known], torch.zeros(3)]).double()
    expected = torch.linalg.lstsq(rows, values[:, None]).solution[:, 0].float()
    torch.testing.assert_close(ridge(features, target, known, 2.5), expected)


# ---- what answers say of each other


def answers(b: int, m: int, side: int = 16, wrong: float = 0.25, seed: int = 0, colours: bool = False) -> tuple:
    """Blobs as truth `(b, 3, side, side)`, and answers to them: pale, and wrong where noise is, some more often."""
    generator = drawn(seed)
    soft = F.interpolate(torch.randn(b, 3 if colours else 1, 4, 4, generator=generator), side, mode="bilinear")
    truth = soft.sigmoid() if colours else (soft > 0).float().expand(-1, 3, -1, -1)
    rate = wrong * 2 * torch.linspace(0, 1, m)[None, :, None, None, None]
    coarse = torch.randn(b, m, 1, 8, 8, generator=generator).flatten(0, 1)
    noise = F.interpolate(coarse, side, mode="nearest").unflatten(0, (b, m))
    if colours:
        return truth, (0.5 * truth[:, None] + 0.1 + rate * noise * 0.3).clamp(0, 1)
    flip = (noise < 2 * rate - 1.5).float()
    painted = truth[:, None] * (1 - flip) + (1 - truth[:, None]) * flip
    return truth, 0.3 * painted + 0.25 + 0.02 * noise.clamp(-1, 1)


def consensus(
    painted: Tensor, task: str = "segmentation", known: Tensor | None = None, **changes: object
) -> Consensus:
    b, m = painted.shape[:2]
    values = {
        "scores": torch.linspace(0.3, 0, m).expand(b, m),
        "temperature": 0.1,
        "grid": unit(b, 4, 4, 6),
        "known": torch.ones(b, m, dtype=torch.bool) if known is None else known,
        **changes,
    }
    answers = Answers(find_task(task), painted, values["grid"], values["known"])
    return Consensus(answers, values["scores"], values["temperature"])


def test_means_weigh_answers_by_what_was_expected_of_them():
    painted, scores = torch.rand(2, 3, 3, 8, 8, generator=drawn()), torch.tensor([[0.2, 0.0, -1.0], [0.1, 0.3, 0.1]])
    known = torch.tensor([[True, True, True], [True, True, False]])
    made = consensus(painted, known=known, scores=scores, temperature=0.2)
    for b in range(2):
        here = [k for k in range(3) if known[b, k]]
        weights = [math.exp(float(scores[b, k]) / 0.2) for k in here]
        grey = painted[b].mean(1, keepdim=True)
        expected = sum(w * grey[k] for w, k in zip(weights, here)) / sum(weights)
        torch.testing.assert_close(made.means["weighted"][b], expected)
        votes = sum(w * (grey[k] >= 0.5).float() for w, k in zip(weights, here)) / sum(weights)
        torch.testing.assert_close(made.means["votes"][b], votes)
        torch.testing.assert_close(made.means["plain"][b], grey[here].mean(0))
        sharp = [w**3 for w in weights]
        estimate = (sum(w * grey[k] for w, k in zip(sharp, here)) / sum(sharp)).clamp(0.01, 0.99)
        torch.testing.assert_close(made.maps()[b, ..., 4], estimate.logit())
    assert made.maps().shape == (2, 1, 8, 8, MAPS) and made.maps().isfinite().all()


@pytest.mark.parametrize("task", ["segmentation", "detection", "colourisation"])
def test_features_of_answers_are_those_of_loops(task):
    colours, m = task == "colourisation", 4
    truth, painted = answers(3, m, colours=colours)
    painted = painted if colours else (2 * painted.expand(-1, -1, 3, -1, -1) - 0.4).clamp(0, 1)
    made, areas = consensus(painted, task), torch.rand(3, m, generator=drawn(4))
    calibrated = made.calibrate(made.maps(), 0.3 * torch.randn(MAPS, generator=drawn(5)) / MAPS)
    found, score = made.features(calibrated, areas), find_task(task).score
    sign = -1 if colours else 1
    assert found.shape == (3, m, ANSWERS[colours]) and found.isfinite().all()
    weights = (torch.linspace(0.3, 0, m) / 0.1).softmax(0)
    for b in range(3):
        each = painted[b] if colours else painted[b].mean(1, keepdim=True)
        hard = each if colours else (each >= 0.5).float()
        for k in range(m):
            expected = []
            for mean in (*(value[b] for value in made.means.values()), calibrated[b]):
                expected.append(sign * float(score(each[k].expand(3, -1, -1), mean.expand(3, -1, -1))))
                expected.append(-float((each[k] - mean).abs().mean()))
                if not colours:
                    both = sum(float(x * y) for x, y in zip(hard[k].flatten(), mean.flatten()))
                    expected.append(both / (float(hard[k].sum()) + float(mean.sum()) - both))
                    least, most = (op(each[k], mean).sum() for op in (torch.minimum, torch.maximum))
                    expected.append(float(least / most))
                apart = float(each[k].mean() - mean.mean())
                expected += [apart, abs(apart)]
            if colours:
                alike = [-float((each[k] - other).square().mean()) for other in each]
            else:
                alike = [float((hard[k] * other).sum() / (hard[k] + other).clamp(max=1).sum()) for other in hard]
            expected += [sum(alike) / m, sum(float(w) * a for w, a in zip(weights, alike))]
            area = float(each[k].mean())
            expected += [
                area,
                float(each[k].std()),
                float((2 * each[k] - 1).abs().mean()),
                abs(area - float(areas[b, k])),
            ]
            if not colours:
                chance = each[k].clamp(1e-4, 1 - 1e-4)
                expected.append(float(-(chance * chance.log() + (1 - chance) * (1 - chance).log()).mean()))
            assert found[b, k].tolist() == pytest.approx(expected, abs=1e-5), (b, k)


def test_an_answer_that_does_not_exist_changes_nothing():
    truth, painted = answers(2, 5)
    whole, known = consensus(painted[:, :3], scores=torch.zeros(2, 3)), torch.tensor([[True] * 3 + [False] * 2] * 2)
    part = consensus(painted, known=known, scores=torch.zeros(2, 5).masked_fill(~known, -torch.inf))
    torch.testing.assert_close(part.maps(), whole.maps())
    calibrated = torch.rand(2, 1, 16, 16, generator=drawn())
    torch.testing.assert_close(
        part.features(calibrated, torch.zeros(2, 5))[:, :3], whole.features(calibrated, torch.zeros(2, 3))
    )
    assert torch.equal(part.medoid(), whole.medoid())


def test_no_object_anywhere_is_agreement():
    made = consensus(torch.zeros(1, 3, 3, 8, 8))
    found = made.features(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3))
    assert found.isfinite().all() and (found[..., [0, 2]] == 1).all() and (found[..., 24:26] == 1).all()


def test_expected_overlap():
    rounded, chance = torch.zeros(1, 1, 1, 1, 4), torch.tensor([0.5, 1.0, 0.25, 0.0]).view(1, 1, 1, 1, 4)
    rounded[..., :2] = 1
    assert float(_overlap(rounded, chance)) == pytest.approx(1.5 / (2 + 1.75 - 1.5))
    assert float(_overlap(rounded * 0, chance * 0)) == 1 and float(_overlap(rounded, rounded)) == 1


def test_calibration_is_where_the_likelihood_is_largest():
    truth, painted = answers(6, 5)
    made = consensus(painted)
    maps, target = made.maps().double(), made.target(truth).double()
    weights = made.fit_calibration(maps, target).double()
    rows = maps.flatten(0, -2)
    slope = rows.T @ ((rows @ weights).sigmoid() - target.flatten()) + weights
    assert slope.abs().max() < 1e-3 * len(rows)
    # an estimate that is right everywhere does not run away
    perfect = torch.randn(200, MAPS, generator=drawn())
    assert made.fit_calibration(perfect, (perfect[:, 0] > 0).float()).isfinite().all()


def test_colours_are_drawn_to_the_weighted_mean_which_needs_no_labels():
    made = consensus(torch.rand(1, 3, 3, 8, 8, generator=drawn()), "colourisation")
    maps = made.maps()
    weights = made.fit_calibration(maps, made.means["weighted"])
    torch.testing.assert_close(weights, F.one_hot(torch.tensor(0), MAPS).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.calibrate(maps, weights), made.means["weighted"], atol=1e-4, rtol=0)


def test_estimates_are_smoothed_along_the_query():
    grid = torch.zeros(1, 4, 4, 2)
    grid[:, :, :2, 0], grid[:, :, 2:, 1] = 1, 1  # two sides that look alike inside
    painted = torch.zeros(1, 1, 3, 8, 8)
    painted[..., :4] = torch.rand(8, 4, generator=drawn())
    made = consensus(painted, "colourisation", grid=grid)
    smooth = made.maps()[0, 0, ..., 5]
    torch.testing.assert_close(smooth[:, 0], painted[..., :4].mean().expand(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(smooth[:, 7], torch.zeros(8), atol=1e-3, rtol=0)


def test_the_medoid_is_the_answer_most_like_the_mean():
    painted = torch.zeros(1, 3, 3, 8, 8)
    for k, width in enumerate((2, 4, 8)):
        painted[0, k, :, :, :width] = 1
    for task in ("segmentation", "detection", "colourisation"):
        assert consensus(painted, task).medoid().tolist() == [1]
    assert consensus(painted, known=torch.tensor([[True, False, False]])).medoid().tolist() == [0]


def test_answers_are_compared_small():
    painted = torch.rand(2, 3, 3, 112, 60, generator=drawn()).half()
    found = small(painted)
    assert found.shape == (2, 3, 3, 56, 56) and found.dtype == torch.float32
    torch.testing.assert_close(found[1, 2], F.adaptive_avg_pool2d(painted[1, 2].float(), (56, 56)))
    assert torch.equal(small(painted[..., :30, :30]), painted[..., :30, :30].float())
    assert small(painted[..., :30]).shape == (2, 3, 3, 56, 30)


# ---- a list-wise head


def test_list_heads_learn_what_is_there_and_leave_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(cascade_head, "STEPS", 25)
    monkeypatch.setattr(cascade_head, "RATE", 5e-3)
    features = torch.randn(40, 5, 3, generator=drawn())
    performance = 0.1 * features[..., 0].tanh()
    known = torch.ones(40, 5, dtype=torch.bool)
    known[::4, 3:] = False
    target = (performance - (performance * known).sum(1, keepdim=True) / known.sum(1, keepdim=True)) * known
    fold, state = torch.arange(40) % 5, torch.get_rng_state()
    heads, held = train_heads([features] * 5, target, known, fold, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not heads.training and not any(weight.requires_grad for weight in heads.parameters())
    found = heads(features, known)
    each = torch.stack([heads.scores(ranker, features, known) for ranker in heads.rankers])
    torch.testing.assert_close(found, each.mean(0))
    for scores in (held, found):
        # in units of performance, relative to the list
        assert not scores[~known].any() and scores.sum(1).abs().max() < 1e-4
        assert (scores - target)[known].square().mean() < 0.6 * target[known].square().mean()
        best = [one.masked_fill(~known, -torch.inf).argmax(1) for one in (scores, performance)]
        assert (best[0] == best[1]).float().mean() > 0.6
    assert float((held * target).sum() / held.square().sum()) == pytest.approx(1, abs=1e-4)
    # lists of a fold get scores of the two heads that never saw them
    for one in range(5):
        torch.testing.assert_close(held[fold == one], (each[one] + each[one + 5])[fold == one] / 2)
        assert (each[one] - each[one + 5]).abs().max() > 1e-4
    again = ListHeads(3)
    again.load_state_dict(heads.state_dict())
    torch.testing.assert_close(again.eval()(features, known), found)


def test_list_heads_are_the_same_for_the_same_seed_and_do_not_see_their_fold(monkeypatch):
    monkeypatch.setattr(cascade_head, "STEPS", 4)
    features, fold = torch.randn(20, 4, 3, generator=drawn()), torch.arange(20) % 5
    target, known = torch.randn(20, 4, generator=drawn(1)), torch.ones(20, 4, dtype=torch.bool)
    weights = [train_heads([features] * 5, target, known, fold, seed)[0].rankers for seed in (0, 0, 9)]
    assert all(torch.equal(*pair) for pair in zip(*(part.state_dict().values() for part in weights[:2])))
    assert not torch.equal(*(next(part.parameters()) for part in weights[1:]))
    target = torch.where(fold[:, None] == 2, -target, target)
    other = train_heads([features] * 5, target, known, fold, 0)[0].rankers
    for number, (one, two) in enumerate(zip(weights[0], other)):
        same = all(torch.equal(*pair) for pair in zip(one.state_dict().values(), two.state_dict().values()))
        assert same == (number % 5 == 2)
