"""Which strategy a pool's own images speak for."""

from threading import Thread

import pytest
import torch
from answers import photos
from cascade_run import COUNT, K, painter
from scenes import make_model, make_pool, rows, scene, tiny_encoder

from hf_effdl import CascadeSelector, VisualInContextPipeline, measure_examples
from hf_effdl.vicl.remote_code import pipeline_choice, strategy_check
from hf_effdl.vicl.remote_code.examples import Examples
from hf_effdl.vicl.remote_code.strategies import STRATEGIES
from hf_effdl.vicl.remote_code.strategy_check import check_strategies
from hf_effdl.vicl.remote_code.visual_tasks import find_task


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool"), count=COUNT, encoder=tiny_encoder())


def examples_of(pool, model):
    return Examples(pool, model, find_task("segmentation"))


def test_what_is_looked_up_is_what_would_be_run(pool):
    model = make_model(encoder=pool.encoder_module)
    run = check_strategies(examples_of(pool, model), K)
    measure_examples(model, pool, candidates=K, progress=False)
    found = check_strategies(examples_of(pool, model), K)
    assert run["images"] == found["images"] == COUNT and set(found["performance"]) == {"nearest", "dense", "transfer"}
    for name in ("nearest", "dense"):
        assert run["performance"][name] == pytest.approx(found["performance"][name], abs=1e-5)
        rows = STRATEGIES[name](asked_of(pool, range(COUNT)), examples_of(pool, model), 1, K)[1][:, 0].tolist()
        table = model.measured_candidates, model.measured_performance
        values = [float(table[1][i][table[0][i] == row]) for i, row in enumerate(rows)]
        assert found["performance"][name] == pytest.approx(sum(values) / COUNT, abs=1e-5)
    assert found["ahead"]["dense"][0] == pytest.approx(
        found["performance"]["dense"] - found["performance"]["nearest"], abs=1e-6
    )


@pytest.mark.parametrize(
    ("count", "kept"), [(1, {}), (3, {"classes": ["cat", "dog", "emu"]}), (3, {"groups": ["film"] * 3}), (2, {})]
)
def test_a_pool_of_few_rows_is_answered_by_the_nearest(count, kept, tmp_path):
    pool = make_pool(tmp_path, count=count, **kept)
    pipe = VisualInContextPipeline(make_model(), "auto", pool)
    assert len(pipe(photos()[0])["example_ids"]) == 1
    assert pipe.self_check["strategy"] == "nearest" and pipe.self_check["images"] == (2 if count == 2 else 0)


def test_it_is_the_default_and_says_what_it_costs(pool, monkeypatch, caplog):
    pipe = VisualInContextPipeline(make_model(encoder=pool.encoder_module), pool=pool)
    monkeypatch.setattr(strategy_check, "SLOW", 0.0)
    monkeypatch.setattr(strategy_check.logger, "propagate", True)
    shown = [one["example_ids"] for one in pipe(photos())]
    assert len(caplog.messages) == 2 and f"is tried on {COUNT} images of the pool" in caplog.messages[0]
    again = pipe(photos(), strategy=pipe.self_check["strategy"])
    assert shown == [one["example_ids"] for one in again] and len(caplog.messages) == 2


def asked_of(pool, rows):
    return strategy_check._queries(examples_of(pool, make_model()), torch.tensor(list(rows)), None, labelled=False)


@pytest.mark.parametrize(("good", "expected"), [(True, "dense"), (False, "nearest")])
def test_the_one_that_does_best_on_the_pool_is_taken(pool, monkeypatch, good, expected):
    model = painter(pool, pool.encoder_module)

    def planted(queries, examples, count, candidates):
        rows, worth = (part[queries.exclude] for part in (model.measured_candidates, model.measured_performance))
        scores = worth if good else -worth
        return scores.gather(1, (at := scores.argsort(1, descending=True)[:, :count])), rows.gather(1, at).long()

    monkeypatch.setitem(STRATEGIES, "dense", planted)
    monkeypatch.setitem(STRATEGIES, "transfer", STRATEGIES["nearest"])
    pipe = VisualInContextPipeline(model, "auto", pool)
    assert pipe.self_check["strategy"] == expected and (pipe.self_check["ahead"]["dense"][0] > 0) == good
    del pipe.model.frozen.shown[:]
    assert len(pipe.self_check) == 4 and not pipe.model.frozen.shown  # it was looked up, and is kept


def test_a_lead_that_may_be_luck_is_none(pool, monkeypatch):
    model = make_model(encoder=pool.encoder_module)
    rows, _ = measure_examples(model, pool, candidates=K, progress=False)
    leads = []
    for seed in range(12):
        noise = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed))
        model.set_performance(rows, noise, pool.fingerprint)
        leads.append(check_strategies(examples_of(pool, model), K)["ahead"]["transfer"])
    means, errors = torch.tensor(leads).T
    # an image's own measurements say nothing of what is taken for it: no lead on average
    assert abs(means.mean()) < 3 * means.std() / 12**0.5 and abs(errors.mean() / means.std() - 1) < 0.6


def test_transfer_leaves_out_what_was_measured_on_the_query_itself(pool):
    model = make_model(encoder=pool.encoder_module)
    rows, values = measure_examples(model, pool, candidates=K, queries=20, progress=False)
    for row in range(0, COUNT, 7):
        model.set_performance(rows, values, pool.fingerprint)
        scores, shown = STRATEGIES["transfer"](asked_of(pool, [row]), examples_of(pool, model), K, K)
        fewer = rows.clone(), values.clone()
        fewer[0][row], fewer[1][row] = -1, 0
        model.set_performance(*fewer, pool.fingerprint)
        others, same = STRATEGIES["transfer"](asked_of(pool, [row]), examples_of(pool, model), K, K)
        torch.testing.assert_close(scores, others)
        assert torch.equal(shown, same)


@pytest.mark.filterwarnings("ignore:on the pool")
def test_a_pipeline_that_looks_for_itself(pool, tmp_path):
    model = make_model(encoder=pool.encoder_module)
    pipe = VisualInContextPipeline(model, "auto", pool)
    strategy = pipe.self_check["strategy"]
    assert strategy in ("nearest", "dense")
    for options in ({}, {"strategy": "auto"}, {"strategy": strategy}):
        outputs = VisualInContextPipeline(model, "nearest", pool)(photos(), **options) if options else pipe(photos())
        assert [one["example_ids"] for one in outputs] == [one["example_ids"] for one in pipe(photos())]
    pipe.save_pretrained(tmp_path)
    assert VisualInContextPipeline(tmp_path).model.config.strategy == strategy
    measure_examples(model, pool, candidates=K, progress=False)
    assert "transfer" in pipe.self_check["performance"]  # a look at what is known now
    cascade = CascadeSelector(model, passes=4).fit(pool, progress=False)
    cascade.report |= {"nearest": 0.1, "stage 2": 0.9}
    model.set_selector(cascade)
    assert pipe.self_check["strategy"] == "cascade" and pipe.self_check["ahead"]["cascade"] == [pytest.approx(0.8), 0]
    assert [one["example_ids"] for one in pipe(photos())] == [
        one["example_ids"] for one in pipe(photos(), strategy="cascade")
    ]
    cascade.report = cascade.report | {"stage 2": 0.05}  # as a new fit gives it
    assert pipe.self_check["strategy"] != "cascade"


def test_groups_and_classes_are_kept_to(tmp_path, monkeypatch):
    groups, classes = [str(i // 3) for i in range(24)], [*["cat", "dog"] * 11, "cow", "cow"]
    pool = make_pool(tmp_path, count=24, groups=groups, classes=classes, encoder=tiny_encoder())
    seen = []

    def spy(queries, examples, count, candidates):
        scores, rows = examples.nearest(queries, count)
        seen.extend(zip(queries.exclude.tolist(), rows[:, 0].tolist()))
        return scores, rows

    monkeypatch.setitem(STRATEGIES, "dense", spy)
    found = check_strategies(examples_of(pool, make_model(encoder=pool.encoder_module)), K)
    assert found["images"] == len(seen) == 22  # both cows are of one group
    assert all(groups[i] != groups[j] and classes[i] == classes[j] for i, j in seen)
    assert found["strategy"] in ("nearest", "dense")


@pytest.mark.parametrize("undefined", [3, COUNT])
def test_images_without_a_metric_are_left_out_and_said(pool, undefined):
    model, task = make_model(encoder=pool.encoder_module), find_task("segmentation")
    masks = [task.decode(task.labels([pool.label(i)], [pool.image(i)], (32, 32)), (32, 32))[0] for i in range(COUNT)]
    bad = [float("nan"), float("inf")] * COUNT

    def metric(predictions, references):
        row = next(i for i, mask in enumerate(masks) if (mask == references[0]).all())
        return bad[row] if row < undefined else float((predictions[0] == references[0]).mean())

    with pytest.warns(UserWarning, match=f"no finite number on {undefined} of the {COUNT} images"):
        found = check_strategies(Examples(pool, model, task, metric), K)
    assert found["images"] == COUNT - undefined
    assert all(0 < value < 1 for value in found["performance"].values())
    assert bool(found["performance"]) == (undefined < COUNT) and found["strategy"] in ("nearest", "dense")


def test_one_look_for_all_threads_made_anew_where_what_it_goes_by_changes(tmp_path, monkeypatch):
    pool = make_pool(tmp_path / "pool", count=8, encoder=tiny_encoder())
    pipe = VisualInContextPipeline(make_model(encoder=pool.encoder_module), pool=pool, candidates=3)
    looks = []
    monkeypatch.setattr(
        pipeline_choice, "check_strategies", lambda *given: looks.append(given[1]) or check_strategies(*given)
    )
    threads = [Thread(target=pipe, args=(photos()[:1],)) for _ in range(3)]
    for step in ("start", "join"):
        for thread in threads:
            getattr(thread, step)()
    assert looks == [3]  # K is the pipeline's own
    pipe.save_pretrained(tmp_path / "saved")
    pool.add(rows(2, first=50))
    pipe(photos()[0])
    assert looks == [3, 3] and pipe.self_check["images"] == 10  # saving has not settled what chooses here
    with pytest.raises(ValueError, match="here '(nearest|dense)', which 'auto' found best on the pool, chooses"):
        pipe(photos()[0], fusion="weighted")


def test_a_metric_that_raises_is_named_and_keeps_no_prediction_back(pool, tmp_path):
    def overlap(predictions, references):
        raise KeyError("iou")

    pipe = VisualInContextPipeline(make_model(), "auto", pool, metric=overlap)
    with pytest.warns(UserWarning, match="'nearest': the metric 'overlap' raised KeyError: 'iou'; pass one that"):
        shown = pipe(photos()[0])["example_ids"]
    assert shown == pipe(photos()[0], strategy="nearest")["example_ids"] and pipe.self_check["images"] == 0
    with pytest.raises(ValueError, match="the metric 'overlap' raised KeyError: 'iou'"):
        pipe(photos()[0], strategy="oracle", labels=scene(100)[1])
