"""The cascade as a strategy: what fitting may look at, what it gains, what it costs, and that it survives saving."""

import warnings

import cascade_run
import numpy as np
import pytest
import torch
from answers import Mirror, all_same, check_contract, photos, tiny_seggpt
from answers import plain as plain_answer
from cascade_run import COUNT, PASSES, K, Painter, asked, painter
from forked import Script
from safetensors.torch import load_file
from scenes import SIZE, TASKS, make_model, make_pool, rows, scene, tiny_encoder

from hf_effdl import CascadeSelector, SegGptInContext, VisualInContextModel, VisualInContextPipeline, measure_examples
from hf_effdl.vicl.auto import ListwiseRanker, ListwiseRankerConfig
from hf_effdl.vicl.remote_code import cascade_head, cascade_stages
from hf_effdl.vicl.remote_code.cascade_consensus import Consensus
from hf_effdl.vicl.remote_code.cascade_fit import columns_of, fit, warn_of
from hf_effdl.vicl.remote_code.cascade_lists import MeasuredLists, folds_of
from hf_effdl.vicl.remote_code.cascade_precedents import Precedents
from hf_effdl.vicl.remote_code.cascade_stages import FUSIONS, TURNS, FirstStage, best_temperature
from hf_effdl.vicl.remote_code.examples import Examples, Queries
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.pool_rows import group_numbers
from hf_effdl.vicl.remote_code.ranker_selector import RankerSelector
from hf_effdl.vicl.remote_code.visual_tasks import find_task


pytestmark = pytest.mark.filterwarnings("ignore:on the pool's own images")
ENCODER = tiny_encoder()
VIDEOS = [None if row == 7 else str(row // 3) for row in range(COUNT)]


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    return {task: make_pool(folder, task, COUNT, ENCODER) for task in TASKS}


@pytest.fixture(scope="module")
def tables(pools):
    """Measured performance by task and settings, each measured once."""
    known = {}

    def of(task: str, **options):
        key = task, *options.items()
        if key not in known:
            settings = {"candidates": K, "progress": False, **options}
            known[key] = measure_examples(make_model(task, ENCODER), pools[task], **settings)
        return known[key]

    return of


@pytest.fixture
def measured(pools, tables):
    """A model of feature matching that was measured on the pool of a task."""

    def make(task: str = "segmentation", **options):
        model = make_model(task, ENCODER)
        model.set_performance(*tables(task, **options), pools[task].fingerprint)
        return model

    return make


@pytest.fixture
def fitted(measured, pools):
    def make(task: str = "segmentation", model=None, pool=None, **options):
        model = model or measured(task)
        return CascadeSelector(model, **{"passes": PASSES, **options}).fit(pool or pools[task], progress=False)

    return make


def plain(outputs) -> list:
    return [plain_answer(one) for one in outputs]


def examples_of(model, pool) -> Examples:
    return Examples(pool, model, find_task(model.config.task))


def other_performance(model, pool, change) -> None:
    """The table again with other performance."""
    candidates, performance = model.measured_candidates.long().clone(), model.measured_performance.clone()
    change(performance)
    model.set_performance(candidates, performance, pool.fingerprint)


# ---- what fitting looks at


def lists_of(model, pool, groups=None) -> tuple[Examples, MeasuredLists, Precedents]:
    measured, numbers = (model.measured_candidates, model.measured_performance), group_numbers(groups, len(pool))
    lists = MeasuredLists.read(pool, measured, model.config.candidates, numbers)
    return examples_of(model, pool), lists, Precedents.of(pool, measured, lists, numbers)


@pytest.mark.parametrize("groups", [None, VIDEOS], ids=["alone", "grouped"])
@pytest.mark.parametrize("count", [K, COUNT - 1])
def test_what_an_image_and_its_group_measured_does_not_enter_its_own_features(measured, pools, count, groups):
    model, pool = measured(candidates=count), pools["segmentation"]
    examples, lists, precedents = lists_of(model, pool, groups)
    before = torch.cat(list(columns_of(examples, lists, precedents).values()), 2)
    image = int(lists.images[5])
    changed = [row for row in range(COUNT) if row == image or (groups and groups[row] == groups[image] is not None)]
    assert len(changed) == (3 if groups else 1)

    def change(performance):
        drawn = torch.rand(len(changed), count, generator=torch.Generator().manual_seed(0))
        performance[changed] = drawn * 5

    other_performance(model, pool, change)
    after = torch.cat(list(columns_of(*lists_of(model, pool, groups)).values()), 2)
    own = torch.isin(lists.images, torch.tensor(changed))
    torch.testing.assert_close(after[own], before[own], atol=2e-4, rtol=1e-4)
    assert (after[~own] - before[~own]).abs().amax() > 0.1


def test_folds_are_as_large_as_each_other_and_never_part_a_group(pools, measured):
    assert torch.equal(folds_of(torch.randperm(23)), torch.arange(23) % 5)
    groups = torch.randint(9, (40,), generator=torch.Generator().manual_seed(0)).square() // 8
    folds = folds_of(groups)
    assert all(len(folds[groups == group].unique()) == 1 for group in groups)
    assert folds.bincount(minlength=5).max() <= max(groups.bincount().max(), 40 / 5 + groups.bincount().max())
    lists = lists_of(measured(queries=23), pools["segmentation"], VIDEOS)[1]
    videos = [VIDEOS[row] for row in lists.images.tolist()]
    assert len({(video, fold) for video, fold in zip(videos, lists.fold.tolist()) if video}) == len({*videos} - {None})


def test_a_cascade_is_fitted_by_groups_of_the_pool_or_others(measured, pools, tmp_path):
    model, pool, of = measured(), pools["segmentation"], {}
    for name, groups in (
        ("none", None),
        ("same", [None] * COUNT),
        ("videos", VIDEOS),
        ("two", ["a", "b"] * (COUNT // 2)),
    ):
        of[name] = CascadeSelector(model, passes=1).fit(pool, groups=groups, progress=False).report
    assert of["none"] == of["same"] and len({of[name]["stage 1"] for name in of}) == 3
    kept = make_pool(tmp_path, count=COUNT, encoder=ENCODER, groups=VIDEOS)
    model.set_performance(model.measured_candidates, model.measured_performance, kept.fingerprint)
    assert CascadeSelector(model, passes=1).fit(kept, progress=False).report == of["videos"]
    for groups, message in (
        (["a"] * COUNT, "are all of one group.*groups=.None. . len.pool"),
        (["a"], "1 groups for a pool"),
    ):
        with pytest.raises(ValueError, match=message):
            CascadeSelector(model, passes=1).fit(kept, groups=groups, progress=False)


def test_the_report_is_what_the_table_says(fitted, measured, pools):
    model, pool = measured(queries=23), pools["segmentation"]
    report = fitted(model=model).report
    table = model.measured_candidates.long(), model.measured_performance
    every = [row for row in range(COUNT) if table[0][row, 0] >= 0]
    assert report["images"] == len(every) == 23
    nearest = [
        float(table[1][row, int((pool.vectors[table[0][row]].float() @ pool.vectors[row].float()).argmax())])
        for row in every
    ]
    assert report["nearest"] == pytest.approx(sum(nearest) / 23)
    assert report["best"] == pytest.approx(float(table[1][every].amax(1).mean()))


@pytest.mark.parametrize("count", [K, COUNT - 1])
def test_what_a_fold_measured_hardly_matters_to_its_own_scores(measured, pools, count):
    """Only by the spread of features over all lists: not by what others' features or weights were learnt from."""
    model, pool = measured(candidates=count), pools["segmentation"]

    def held_out():
        examples, lists, precedents = lists_of(model, pool)
        columns = columns_of(examples, lists, precedents)
        return lists, FirstStage.fit(columns, precedents, lists, None, tries=False)[1]

    lists, before = held_out()
    own = lists.fold == 2

    def change(performance):
        drawn = torch.rand(int(own.sum()), count, generator=torch.Generator().manual_seed(0))
        performance[lists.images[own]] = drawn

    other_performance(model, pool, change)
    apart = (held_out()[1] - before).abs()
    assert apart[own].mean() < 0.1 * apart[~own].mean()


@pytest.mark.parametrize("head", ["ridge", pytest.param("listwise", marks=pytest.mark.slow)])
def test_what_cannot_be_learnt_is_not_reported(measured, pools, monkeypatch, head):
    """Performance that has nothing to do with anything: whoever saw an image's own would still find its best."""
    monkeypatch.setattr(cascade_stages, "PENALTY", 1e-2)
    monkeypatch.setattr(cascade_head, "STEPS", 15)
    monkeypatch.setattr(cascade_head, "RATE", 1e-2)
    model, pool, reports = measured(), pools["segmentation"], []
    for seed in range(1 if head == "listwise" else 4):
        drawn = torch.rand(COUNT, K, generator=torch.Generator().manual_seed(seed))
        other_performance(model, pool, lambda performance: performance.copy_(drawn))  # noqa: B023
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reports.append(CascadeSelector(model, passes=PASSES, head=head).fit(pool, progress=False).report)
    mean = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
    assert mean["best"] > 0.85 and mean["stage 1"] < 0.59 and mean["stage 2"] < 0.65


def test_an_estimate_is_calibrated_on_images_of_the_other_folds(measured, pools, monkeypatch):
    learnt_from, used = [], []

    def fit_calibration(self, maps, target):
        learnt_from.append(maps)
        return torch.full((maps.shape[-1],), float(len(learnt_from) - 1))

    def calibrate(self, maps, weights):
        used.append((maps, learnt_from[int(weights[0])]))
        return maps[..., 0].sigmoid()

    monkeypatch.setattr(Consensus, "fit_calibration", fit_calibration)
    monkeypatch.setattr(Consensus, "calibrate", calibrate)
    cascade = CascadeSelector(measured(queries=23), passes=PASSES).fit(pools["segmentation"], progress=False)
    assert len(used) == 23 * TURNS
    for maps, others in used:  # an image's pixels are not among those of the images that were learnt from
        own, pixel = maps.flatten(2, 3)[0, 0], others[:, 0, 0]
        assert len(others) in (18, 19) and not (own[:, None] == pixel[None]).all(2).any()
    # what is kept was learnt from all
    assert [len(learnt_from[int(kept[0])]) for kept in cascade.calibration] == [23] * TURNS


def test_only_so_many_of_the_measured_examples_count_as_the_pipeline_looks_at(measured, pools):
    model, pool = measured(candidates=COUNT - 1), pools["segmentation"]
    model.config.candidates = 6
    report = CascadeSelector(model, passes=1).fit(pool, progress=False).report
    best = []
    for row in range(COUNT):
        table = dict(zip(model.measured_candidates[row].tolist(), model.measured_performance[row].tolist()))
        near = (pool.vectors.float() @ pool.vectors[row].float()).argsort(descending=True).tolist()
        best.append(max(table[other] for other in [other for other in near if other != row][:6]))
    assert report["best"] == pytest.approx(sum(best) / COUNT)


# ---- what it gains


@pytest.fixture(scope="module")
def noisy(pools):
    model = painter(pools["segmentation"], ENCODER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return CascadeSelector(model, passes=PASSES).fit(pools["segmentation"], progress=False), model


def test_of_a_noisy_model_it_finds_the_good_answers_and_the_fusion_is_better_still(noisy, pools):
    cascade, model = noisy
    report = cascade.report
    assert report["nearest"] + 0.1 < report["stage 1"] <= report["stage 2"] + 0.02 <= report["best"] + 0.02
    assert report["plain consensus"] > report["nearest, of the same"]
    pipe = VisualInContextPipeline(model, pool=pools["segmentation"])
    images, task, scores = photos(range(100, 116)), find_task("segmentation"), {}
    truth = Painter.truth(asked(model, range(100, 116)).cells.flatten(1)).expand(-1, 3, -1, -1)
    for name, options in {
        "nearest": {"strategy": "nearest"},
        "cascade": {"strategy": cascade},
        "weighted": {"strategy": cascade, "num_examples": 8, "fusion": "weighted"},
    }.items():
        outputs = pipe(images, candidates=K, **options)
        painted = [task.labels([out["prediction"]], [image], (SIZE, SIZE)) for out, image in zip(outputs, images)]
        scores[name] = float(task.score(torch.cat(painted), truth).mean())
    assert scores["cascade"] > scores["nearest"] + 0.1
    assert scores["weighted"] > scores["cascade"] + 0.01


def test_of_a_biased_model_it_says_that_agreement_is_no_good_sign_and_still_learns(pools):
    model = painter(pools["segmentation"], ENCODER, biased=True)
    with pytest.warns(UserWarning, match="errs the same way") as seen:
        report = CascadeSelector(model, passes=PASSES).fit(pools["segmentation"], progress=False).report
    assert len(seen) == 1 and seen[0].filename == __file__
    assert report["plain consensus"] < report["nearest, of the same"] - 0.05
    assert report["stage 2"] > report["nearest"] + 0.2


@pytest.mark.parametrize(("last", "gains"), [(0.5, False), (0.49, False), (0.51, True)])
def test_a_cascade_that_gains_nothing_says_so(last, gains):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of({"nearest": 0.5, "stage 1": last})
    assert gains == (not seen)
    if not gains:
        assert f"{last:g}, no better than the nearest (0.5): measure on more images" in str(seen[0].message)


class Kinds(Painter):
    """Paints the object where query and example are of one of four kinds that nothing shows, and else all but it."""

    def predict(self, queries, images, labels, arrangement=0):
        truth = self.truth(queries)
        kinds = [(batch.double().sum(1) * 1e4).long() % 4 for batch in (queries, images[:, 0])]
        right = (kinds[0] == kinds[1]).float()[:, None, None, None]
        return (right * truth + (1 - right) * (1 - truth)).expand(-1, 3, -1, -1)


def test_of_examples_that_stand_and_fall_together_it_tries_one_of_each_kind(tmp_path):
    """What no feature tells, the table does: who does well on the same images."""
    pool, model = make_pool(tmp_path, count=60, encoder=ENCODER), VisualInContextModel.from_parts(Kinds(ENCODER))
    measure_examples(model, pool, candidates=16, progress=False)
    cascade = CascadeSelector(model, passes=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = cascade.fit(pool, progress=False).report
    spread, shared = cascade.doubt.tolist()
    assert shared == 1 and spread > 0.2
    examples, lists, precedents = lists_of(model, pool)
    first, scores = FirstStage.fit(columns_of(examples, lists, precedents), precedents, lists, None, tries=True)
    assert torch.equal(first.doubt, cascade.doubt)
    best = lists.pick(scores.argsort(dim=1, descending=True)[:, :4]).mean_best()
    assert report["best tried"] > best + 0.15
    # nothing that an image measured itself says what is tried on it
    tried, leaking = (
        lists.pick(first.shortlist(precedents.relations, scores, lists.rows, own, 4)).mean_best()
        for own in (lists.images, None)
    )
    assert report["best tried"] == pytest.approx(tried) and abs(leaking - tried) > 1e-3


def test_what_is_unsure_and_shared_is_learnt_from_what_stage_1_leaves(measured, pools):
    examples, lists, precedents = lists_of(measured(queries=21), pools["segmentation"])
    first, scores = FirstStage.fit(columns_of(examples, lists, precedents), precedents, lists, None, tries=True)
    spread, shared = first.doubt.tolist()
    residual = lists.target - scores
    residual = residual - residual.mean(1, keepdim=True)
    assert spread == pytest.approx(float(residual.square().mean().sqrt()), rel=1e-5)
    x, y = [], []
    for row, image, one in zip(lists.rows, lists.images, residual, strict=True):
        related = precedents.relations.between(row[None], image[None])[0]
        for i in range(K):
            for j in range(K):
                if i != j:
                    x.append(float(related[i, j]))
                    y.append(float(one[i] * one[j]) / spread**2)
    slope = np.polyfit(x, y, 1)[0]
    assert shared == pytest.approx(min(1, max(0, slope)), abs=1e-4)


@pytest.mark.parametrize("task", ["segmentation", "colourisation"])
def test_a_fusion_is_as_soft_as_was_best_on_the_pool(task):
    generator, task, unit = torch.Generator().manual_seed(0), find_task(task), torch.tensor(0.3)
    truth = torch.rand(6, 3, 8, 8, generator=generator).round()
    scores = torch.randn(6, 5, generator=generator) / 3
    # the better an answer scores, the less noise
    noise = torch.randn(6, 5, 1, 8, 8, generator=generator) * (0.7 - scores)[..., None, None, None].clamp(min=0.1)
    painted = (truth.mean(1)[:, None, None] + noise).clamp(0, 1)
    known = torch.ones(6, 5, dtype=torch.bool)
    known[0, 3:] = False
    worth = {}
    for softness in FUSIONS:
        total = 0.0
        for answers, label, one, there in zip(painted, truth, scores, known, strict=True):
            weights = (one[there] / (softness * unit)).softmax(0)
            mean = sum(w * answer for w, answer in zip(weights, answers[there])).expand(3, -1, -1)
            total += float(task.score(mean[None], label[None])[0])
        worth[softness] = total if task.greater_is_better else -total
    best = max(worth, key=worth.get)
    assert worth[best] > min(worth.values()) + 1e-6
    assert best_temperature(task, painted, truth, scores, known, unit) == pytest.approx(best * 0.3)


@pytest.mark.parametrize("task", ["segmentation", "colourisation"])
def test_temperatures_are_in_units_of_the_spread_inside_lists(pools, measured, task):
    model = measured(task)
    cascade = fit(*lists_of(model, pools[task]), passes=PASSES, seed=None, progress=False)
    # every turn is fitted at the temperature that was best after the one before
    assert [turn.temperature for turn in cascade.turns] == cascade.temperatures[:TURNS].tolist()
    assert task != "segmentation" or cascade.temperatures[0] != cascade.temperatures[1]
    apart = model.measured_performance - model.measured_performance.mean(1, keepdim=True)
    unit = float(apart.square().mean().sqrt())
    assert float(cascade.temperatures[0]) == pytest.approx(0.4 * unit, rel=1e-4)
    for temperature in cascade.temperatures[1:].tolist():
        assert min(abs(temperature - softness * unit) for softness in FUSIONS) < 1e-4 * unit


# ---- with whatever there is


SETTINGS = {
    "few labels": ({"queries": 14}, {}),
    "all pairs": ({"candidates": COUNT - 1}, {}),
    "detection": ({}, {}),
    "colourisation": ({}, {}),
    "one pass": ({}, {"passes": 1}),
    "list-wise": ({"queries": 14}, {"head": "listwise"}),
    "two passes": ({"candidates": 3}, {"passes": 2}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_is_fitted_from_what_there_is_and_chooses(measured, fitted, pools, monkeypatch, tmp_path, setting):
    monkeypatch.setattr(cascade_head, "STEPS", 3)
    monkeypatch.setattr(cascade_head, "HEADS", 5)
    measuring, options = SETTINGS[setting]
    task = setting if setting in TASKS else "segmentation"
    model, pool = measured(task, **measuring), pools[task]
    cascade = fitted(task, model, **options)
    again = fitted(task, measured(task, **measuring), **options)
    assert cascade.report == again.report and cascade.state_dict().keys() == again.state_dict().keys()
    for name, value in cascade.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert cascade.report["best"] >= max(cascade.report[name] for name in ("nearest", "stage 1"))
    assert ("stage 2" in cascade.report) == (cascade.passes > 1)
    # networks score in stage 1 and in the last turn
    first, second = cascade.stages()
    heads = [stage.scorer.heads is not None for stage in (first, *second.turns)]
    assert heads == ([True, False, True] if cascade.head == "listwise" else [False] * len(heads))
    # one image is as in a batch
    pipe = VisualInContextPipeline(model.set_selector(cascade), pool=pool)
    outputs = pipe(photos(), num_examples=2)
    for image, output in zip(photos(), outputs, strict=True):
        check_contract(task, output, image, 2, pool.ids)
    all_same([pipe(image, num_examples=2) for image in photos()], outputs)
    # and as after saving
    pipe.save_pretrained(tmp_path / "saved")
    loaded = VisualInContextPipeline(str(tmp_path / "saved"))
    assert loaded.model.config.strategy == "cascade" and loaded.model.selector.report == cascade.report
    assert loaded.model.selector.temperature == cascade.temperature and loaded.model.selector.passes == cascade.passes
    all_same(loaded(photos(), num_examples=2), outputs)


def test_lists_may_be_of_different_lengths(measured, fitted, pools):
    model, pool = measured(), pools["segmentation"]
    candidates, performance = model.measured_candidates.long().clone(), model.measured_performance.clone()
    for row in range(COUNT):  # some not at all, some shorter than what is tried
        gone = torch.randperm(K, generator=torch.Generator().manual_seed(row))[: row % (K + 1)]
        candidates[row, gone], performance[row, gone] = -1, 0
    cascade = CascadeSelector(model, passes=PASSES).fit(pool, (candidates, performance), progress=False)
    assert torch.equal(model.measured_candidates.long(), candidates)
    assert all(value.isfinite().all() for value in cascade.state_dict().values())
    assert cascade.report["images"] == int((candidates >= 0).any(1).sum())
    best = performance.masked_fill(candidates < 0, -9).amax(1)
    assert cascade.report["best"] == pytest.approx(float(best[best > -9].mean()), rel=1e-5)
    # what fills a table up does not matter
    performance[candidates < 0] = 77
    again = CascadeSelector(model, passes=PASSES).fit(pool, (candidates, performance), progress=False)
    assert again.report == cascade.report
    # nor in which order it is
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    again = CascadeSelector(passes=PASSES).fit(
        pool, (candidates[:, order], performance[:, order]), model=model, progress=False
    )
    assert again.report == pytest.approx(cascade.report)


def test_a_query_of_the_pool_is_not_shown_itself_nor_what_it_measured(fitted, measured, pools):
    model, pool = measured(), pools["segmentation"]
    own = torch.tensor([3, 7, -1, 20])
    images = [pool.image(max(row, 0)) for row in own.tolist()]
    batch = pixels(images, model.image_size, model.resample)
    queries = Queries(batch, model.encoder(batch), exclude=own)
    cascade = fitted(model=model)
    _, chosen, _ = cascade(queries, examples_of(model, pool), COUNT, COUNT)
    assert chosen.shape == (4, COUNT - 1) and not (chosen == own[:, None]).any()
    before = cascade(queries, examples_of(model, pool), 5, K)

    def change(performance):
        performance[3] = 5 * torch.rand(K, generator=torch.Generator().manual_seed(0))

    other_performance(model, pool, change)
    after = cascade(queries, examples_of(model, pool), 5, K)
    torch.testing.assert_close(after[0][0], before[0][0], atol=1e-4, rtol=1e-3)
    # but a new table counts at once
    drawn = torch.rand(COUNT, K, generator=torch.Generator().manual_seed(0))
    other_performance(model, pool, lambda performance: performance.copy_(drawn))
    assert (cascade(queries, examples_of(model, pool), 5, K)[0] - before[0]).abs().amax(1).min() > 1e-3


def test_two_processes_fit_as_one_and_share_the_runs(tmp_path):
    Script("cascade_run.py", tmp_path / "pools", tmp_path / "two", processes=2).finish()
    expected = cascade_run.fit_and_choose(tmp_path / "pools")
    runs = [load_file(tmp_path / f"two.{rank}")["runs"] for rank in (0, 1)]
    assert sum(runs) == expected.pop("runs") and runs[0] > runs[1] > runs[0] / 4
    for rank in (0, 1):
        found = load_file(tmp_path / f"two.{rank}")
        found.pop("runs")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


# ---- in the pipeline


@pytest.mark.parametrize("passes", [1, 3, PASSES])
def test_so_many_runs_of_the_frozen_model_and_not_one_more(pools, passes):
    model, pool = painter(pools["segmentation"], ENCODER), pools["segmentation"]
    cascade = CascadeSelector(model, passes=passes).fit(pool, progress=False)
    shown = model.frozen.shown
    pipe = VisualInContextPipeline(model, pool=pool)
    for options, each in (
        ({}, passes),
        ({"num_examples": 2}, max(passes, 2)),
        ({"num_examples": 6}, 6),
        ({"num_examples": 6, "fusion": "weighted"}, 6),
    ):
        shown.clear()
        pipe(photos(), strategy=cascade, **options)
        assert sum(shown) == 5 * each, options
    shown.clear()
    pipe(photos(), strategy="nearest")
    assert sum(shown) == 5


@pytest.mark.parametrize("task", TASKS)
def test_a_fusion_is_the_mean_by_weights(measured, fitted, pools, task):
    model, pool = measured(task), pools[task]
    cascade = fitted(task, model)
    pipe = VisualInContextPipeline(model.set_selector(cascade), pool=pool)
    queries, examples = asked(model), examples_of(model, pool)
    sizes = [scene(number)[0].size[::-1] for number in cascade_run.ASKED]
    scores, chosen, answers = cascade(queries, examples, 6, K)
    assert (scores.diff(dim=1) <= 0).all()
    images, labels = examples.encoded(chosen)
    encoded = model.frozen.encode(queries.cells)
    for k in range(6):  # the answers are those of the examples one by one
        expected = model.frozen.predict(encoded, images[:, k : k + 1], labels[:, k : k + 1])
        torch.testing.assert_close(answers[:, k], expected, atol=1e-5, rtol=0)
    weights = {"mean": torch.full((6, 6), 1 / 6), "weighted": (scores / cascade.temperature).softmax(1)}
    assert (weights["weighted"] - 1 / 6).abs().max() > 0.01
    for fusion, weight in weights.items():
        painted = sum(weight[:, k, None, None, None] * answers[:, k] for k in range(6))
        expected = pipe.visual_task.decode(painted, sizes)
        outputs = pipe(photos(cascade_run.ASKED), num_examples=6, fusion=fusion, candidates=K)
        for b, (output, one) in enumerate(zip(outputs, expected, strict=True)):
            assert output["example_ids"] == [pool.ids[row] for row in chosen[b].tolist()]
            assert output["scores"] == pytest.approx(scores[b].tolist(), abs=1e-5)
            if task == "detection":
                assert output["prediction"] == one
            else:
                apart = np.abs(np.asarray(output["prediction"], dtype=int) - np.asarray(one, dtype=int))
                assert apart.max() <= (task == "colourisation") and (apart > 0).mean() < 0.01


@pytest.mark.parametrize("kind", ["seggpt", "mirror"])
def test_votes_and_fusion_inside_the_model_ask_it_anew(tmp_path, kind):
    pool = make_pool(tmp_path, count=14, encoder=ENCODER)
    model = VisualInContextModel.from_parts(SegGptInContext(tiny_seggpt()) if kind == "seggpt" else Mirror(), ENCODER)
    measure_examples(model, pool, candidates=6, progress=False)
    model.set_selector(CascadeSelector(model, passes=3).fit(pool, progress=False))
    pipe, image = VisualInContextPipeline(model, pool=pool), scene(100)[0]
    weighted = pipe(image, vote=True, num_examples=3, fusion="weighted")
    check_contract("segmentation", weighted, image, 3, pool.ids)
    for options in [{"vote": True}] + [{"num_examples": 3, "fusion": "model"}] * (kind == "seggpt"):
        output = pipe(image, **options)

        def same(queries, examples, count, candidates, ids=output["example_ids"]):
            return torch.zeros(1, count), torch.tensor([[pool.position(id) for id in ids]])

        expected = pipe(image, strategy=same, **options)
        assert np.array_equal(expected["prediction"], output["prediction"])


def test_a_kept_cascade_is_the_default_until_it_is_forgotten(fitted, measured, pools):
    model, pool = measured(), pools["segmentation"]
    cascade = fitted(model=model)
    before = {name: value.clone() for name, value in cascade.state_dict().items()}
    pipe = VisualInContextPipeline(model, pool=pool)
    nearest, first = plain(pipe(photos(), strategy="nearest")), plain(pipe(photos()))
    assert model.set_selector(cascade) is model and model.config.strategy == "cascade"
    assert {name for name in model.state_dict() if name.startswith("selector.")} == {f"selector.{n}" for n in before}
    found = plain(pipe(photos()))
    assert found == plain(pipe(photos(), strategy="cascade")) == plain(pipe(photos(), strategy=cascade)) != nearest
    assert plain(pipe(photos(), strategy="nearest")) == nearest
    model.set_selector(None)
    assert model.config.strategy == "auto" and model.config.selector is None and plain(pipe(photos())) == first
    model.config.strategy = "dense"
    assert model.set_selector(None).config.strategy == "dense"


def test_a_pipeline_saves_the_cascade_that_it_was_given(fitted, measured, pools, tmp_path):
    model, pool = measured(queries=20), pools["segmentation"]
    pipe = VisualInContextPipeline(model, fitted(model=model), pool, candidates=8)
    expected = plain(pipe(photos()))
    pipe.save_pretrained(tmp_path / "saved")
    assert model.config.strategy == "cascade" and model.selector is pipe.selector
    loaded = VisualInContextModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.candidates == 8 and isinstance(loaded.selector, CascadeSelector)
    for got, one in zip(plain(VisualInContextPipeline(loaded, pool=pool)(photos())), expected, strict=True):
        rounding = 0 if torch.__version__ >= "2.13" else 1e-6  # 2.10 rounds by where weights lie
        assert got[:2] == one[:2] and got[2] == pytest.approx(one[2], rel=rounding, abs=0)
    # what was loaded can be fitted anew: the number of candidates is the pipeline's now
    model.config.candidates = 8
    expected = CascadeSelector(model, passes=PASSES).fit(pool, progress=False).report
    again = loaded.selector.fit(pool, model=loaded, progress=False)
    assert again is loaded.selector and again.report == pytest.approx(expected)


def ranker(length: int, **changes) -> ListwiseRanker:
    torch.manual_seed(length)
    return ListwiseRanker(ListwiseRankerConfig(hidden_size=16, num_attention_heads=2, list_length=length, **changes))


@pytest.mark.parametrize("reliable", [None, torch.arange(0, COUNT, 2)])
def test_a_model_keeps_rankers_too(pools, tmp_path, reliable):
    model, pool = make_model(encoder=ENCODER), pools["segmentation"]
    rankers = [ranker(3).eval(), ranker(4, label_channels=None).eval()]
    selector = RankerSelector(rankers, reliable=reliable, passes=2, seed=5, fill=reliable is not None)
    pipe = VisualInContextPipeline(model.set_selector(selector), pool=pool)
    assert model.config.strategy == "ranker"
    expected = pipe(photos(), num_examples=3, candidates=12)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = VisualInContextPipeline(str(tmp_path / "saved"))
    assert isinstance(loaded.model.selector, RankerSelector) and loaded.model.selector.seed == 5
    assert plain(loaded(photos(), num_examples=3, candidates=12)) == plain(expected)


@pytest.mark.parametrize("kind", ["ridge", "listwise", "ranker"])
def test_half_precision_chooses_nearly_the_same(fitted, measured, pools, monkeypatch, kind):
    monkeypatch.setattr(cascade_head, "STEPS", 3)
    monkeypatch.setattr(cascade_head, "HEADS", 5)
    model, pool = measured(), pools["segmentation"]
    model.set_selector(RankerSelector(ranker(3).eval()) if kind == "ranker" else fitted(model=model, head=kind))
    pipe = VisualInContextPipeline(model, pool=pool)
    images = photos(range(100, 112))
    before = pipe(images)
    model.to(torch.bfloat16)
    pipe.examples = Examples(pool, model, pipe.visual_task)  # what was encoded before is forgotten
    half = pipe(images)
    same = [one["example_ids"] == other["example_ids"] for one, other in zip(before, half)]
    assert sum(same) >= 8
    for image, output in zip(images, half):
        check_contract("segmentation", output, image, 1, pool.ids)


# ---- what cannot work


def test_a_cascade_that_was_not_fitted_or_is_not_there(measured, pools):
    model, pool = measured(), pools["segmentation"]
    pipe, image = VisualInContextPipeline(model, CascadeSelector(model), pool), scene(100)[0]
    asked = VisualInContextPipeline(model, pool=pool)
    weighted, none = (
        {"num_examples": 3, "fusion": "weighted"},
        "strategy='cascade', but the model keeps none: model.se",
    )
    for call, error, message in (
        (lambda: CascadeSelector(passes=0), ValueError, r"passes=0: pass a whole number of runs"),
        (lambda: CascadeSelector(passes=True), ValueError, r"passes=True"),
        (lambda: CascadeSelector(passes=2.0), ValueError, r"passes=2.0"),
        (lambda: CascadeSelector(head="forest"), ValueError, r"head='forest': choose one of \('ridge', 'listwise'\)"),
        (lambda: CascadeSelector().fit(pool), ValueError, "pass model=, here or to the constructor"),
        (lambda: pipe(image), ValueError, "not fitted: measure_examples"),
        (lambda: pipe(image, **weighted), ValueError, "not fitted: measure_examples"),
        (lambda: model.set_selector(CascadeSelector(model)), ValueError, "not fitted: measure_examples"),
        (lambda: model.set_selector("cascade"), TypeError, "a model keeps a CascadeSelector or a RankerSelector"),
        (
            lambda: model.set_selector(CascadeSelector),
            TypeError,
            "a model keeps a CascadeSelector or a RankerSelector",
        ),
        (lambda: VisualInContextPipeline(model, "cascade", pool), ValueError, none),
        (lambda: asked(image, strategy="cascade"), ValueError, none),
        (lambda: asked(image, **weighted), ValueError, r"fusion='weighted'.*CascadeSelector.*choose 'mean'"),
        (lambda: asked(image, strategy=RankerSelector(ranker(3)), **weighted), ValueError, "fusion='weighted'"),
    ):
        with pytest.raises(error, match=message):
            call()
    model.set_selector(RankerSelector(ranker(3)))
    with pytest.raises(ValueError, match="but the model keeps ranker"):
        VisualInContextPipeline(model, "cascade", pool)


def test_another_pool_and_one_that_was_changed_since(fitted, measured, pools, tmp_path):
    pool, model = make_pool(tmp_path / "a", count=14, encoder=ENCODER), make_model(encoder=ENCODER)
    measure_examples(model, pool, candidates=8, progress=False)
    cascade = fitted(model=model, pool=pool)
    pipe, image = VisualInContextPipeline(model.set_selector(cascade), pool=pool), scene(100)[0]
    pipe(image)
    again, measure = ("Run measure_examples and cascade.fit again", "was measured on the pool .* run measure_examples")
    with pytest.raises(ValueError, match=rf"fitted on the pool .* {again}"):
        VisualInContextPipeline(model, pool=pools["segmentation"])(image)
    for change in (lambda: pool.remove(["scene 4"]), lambda: pool.add(rows(2, 50), progress=False)):
        change()
        with pytest.raises(ValueError, match=rf"or it was changed since. {again}"):
            pipe(image)
        with pytest.raises(ValueError, match=measure):
            cascade.fit(pool)
    measure_examples(model, pool, candidates=8, progress=False)
    with pytest.raises(ValueError, match="a model keeps a cascade with the performance that it was fitted on"):
        model.set_selector(cascade)
    model.set_selector(cascade.fit(pool, progress=False))
    assert pipe(image)["example_ids"][0] in pool.ids
    # the cascade fits the pool, but the model has no labels of it, or those of another
    other = make_model(encoder=ENCODER)
    for _ in range(2):
        with pytest.raises(ValueError, match="needs the measured performance that it was fitted on"):
            VisualInContextPipeline(other, cascade, pool)(image)
        other.set_performance(torch.zeros(15, 2).long(), torch.rand(15, 2), "another")


def changed(table, place, value):
    table = table.clone()
    table[place] = value
    return table


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda c, p: (c, changed(p, (3, 1), torch.nan)), ValueError, "NaN or infinite: measure these pairs again"),
        (lambda c, p: (c, changed(p, (3, 1), torch.inf)), ValueError, "NaN or infinite: measure these pairs again"),
        (lambda c, p: (c, 0 * p + 0.25), ValueError, "0.25 everywhere: .* look at the metric"),
        (lambda c, p: (changed(c, slice(9, None), -1), p), ValueError, r"9 pool images .* needs 10 .* more queries="),
        (
            lambda c, p: (changed(c, (0, 0), COUNT), p),
            ValueError,
            f"up to {COUNT}, for a pool of {COUNT}: .* another p",
        ),
        (lambda c, p: (c[:-1], p[:-1]), ValueError, f"measured on {COUNT - 1} images, .* another pool"),
        (lambda c, p: (c[:0], p[:0]), ValueError, "measured on 0 images, .* another pool"),
        (lambda c, p: (changed(c, (4, 2), 4), p), ValueError, "row 4 of the pool as an example for itself.* to -1"),
        (lambda c, p: (c, p[:, :-1]), ValueError, r"must both be \(n, K\), as measure_examples returns them"),
        (
            lambda c, p: (changed(c, (slice(None), slice(PASSES, None)), -1), p),
            ValueError,
            f"passes={PASSES}, but at most",
        ),
        (lambda c, p: p, TypeError, r"measured= must be \(candidates, performance\)"),
        (lambda c, p: ([1, 2], [3, 4]), TypeError, r"measured= must be \(candidates, performance\)"),
    ],
)
def test_performance_that_nothing_can_be_learnt_from(measured, pools, spoil, error, message):
    model, pool = measured(), pools["segmentation"]
    spoilt = spoil(model.measured_candidates.long(), model.measured_performance)
    before = model.measured_performance.clone()
    with pytest.raises(error, match=message):
        CascadeSelector(model, passes=PASSES).fit(pool, spoilt, progress=False)
    assert torch.equal(model.measured_performance, before)


def test_a_model_that_measured_nothing_or_ranks_too_few(measured, pools):
    with pytest.raises(ValueError, match=r"nothing was measured: pass measured=measure_examples"):
        CascadeSelector(make_model(encoder=ENCODER)).fit(pools["segmentation"])
    model = measured()
    model.config.candidates = PASSES
    with pytest.raises(ValueError, match=f"passes={PASSES}, but at most {PASSES} candidates .* lower passes="):
        CascadeSelector(model, passes=PASSES).fit(pools["segmentation"], progress=False)


def test_the_old_name_of_measured_is_still_taken(measured, pools):
    model, pool = measured(queries=12), pools["segmentation"]
    table = model.measured_candidates.long(), model.measured_performance.clone()
    expected = CascadeSelector(model, passes=1).fit(pool, measured=table, progress=False)
    other = make_model(encoder=ENCODER)
    with pytest.warns(FutureWarning, match="labels= is called measured= now") as seen:
        cascade = CascadeSelector(other, passes=1).fit(pool, labels=table, progress=False)
    assert seen[0].filename == __file__ and cascade.report == expected.report
    assert torch.equal(other.measured_performance, table[1])
