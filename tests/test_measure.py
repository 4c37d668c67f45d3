"""Measured performance of examples: as single calls give it, in one process or two, in one go or after a kill."""

from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Script
from measure_run import COUNT, TIMED, K
from safetensors.torch import load_file
from scenes import TASKS, make_model, make_pool, tiny_encoder

from hf_effdl import VisualInContextPipeline, measure_examples
from hf_effdl.vicl import measure


SCRIPT = Path(__file__).parent / "support" / "measure_run.py"


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    make_pool(folder, count=COUNT)  # which the processes then find
    return folder


@pytest.fixture
def pool(pools):
    return make_pool(pools, count=COUNT)


def work_of(pool, count, folder=None):
    """Measuring so many examples on every image."""
    examples = measure.Examples(pool, make_model(), measure.find_task(pool.task))
    return measure.Work(examples, count, torch.zeros(COUNT, dtype=torch.bool), None, None, folder)


@pytest.fixture
def runs(monkeypatch):
    """Numbers of pairs that are measured, call by call."""
    seen, measure_pairs = [], measure.Examples.measure

    def counted(self, queries, rows):
        seen.append(int((rows >= 0).sum()))
        return measure_pairs(self, queries, rows)

    monkeypatch.setattr(measure.Examples, "measure", counted)
    return seen


def start(*arguments: object, processes: int = 1) -> Script:
    return Script("measure_run.py", *arguments, processes=processes, env={"ACCELERATE_USE_CPU": "true"})


@pytest.fixture(scope="module")
def expected(pools):
    return measure_examples(make_model(), make_pool(pools, count=COUNT), candidates=K, progress=False)


@pytest.mark.parametrize("task", TASKS)
def test_every_pair_is_measured_as_the_pipeline_would(tmp_path, task):
    pool, model = make_pool(tmp_path, task, 7), make_model(task)
    candidates, performance = measure_examples(model, pool, candidates=3, progress=False)
    assert candidates.shape == performance.shape == (7, 3) and candidates.dtype == torch.int64
    cosines = pool.vectors @ pool.vectors.T
    pipe = VisualInContextPipeline(model, pool=pool)
    task = pipe.visual_task
    for j in range(7):
        others = [c for c in cosines[j].argsort(descending=True, stable=True).tolist() if c != j]
        assert candidates[j].tolist() == others[:3]
        for k in range(3):
            row = int(candidates[j, k])
            choose = lambda queries, examples, count, limit: (torch.zeros(1, 1), torch.tensor([[row]]))  # noqa: B023, E731
            batch = pipe.preprocess({"images": [pool.image(j)], "labels": [pool.label(j)]})
            painted = pipe.forward(batch, strategy=choose)["painted"]
            truth = task.labels([pool.label(j)], [pool.image(j)], model.image_size)
            value = float(task.score(painted, truth)[0])
            assert performance[j, k] == pytest.approx(value if task.greater_is_better else -value, abs=1e-5)
    assert torch.equal(model.measured_candidates.long(), candidates)
    assert torch.equal(model.measured_performance, performance)
    assert model.config.performance == [7, 3] and model.config.pool_fingerprint == pool.fingerprint
    # and the strategies that need it now run
    for strategy in ("static", "transfer"):
        assert len(pipe(pool.image(0), strategy=strategy, num_examples=2)["example_ids"]) == 2


def test_a_budget_measures_on_that_many_images(pool, expected, runs, tmp_path, capsys):
    model = make_model()
    candidates, performance = measure_examples(model, pool, candidates=K, queries=9, seed=3, cache_dir=tmp_path)
    assert "9/9" in capsys.readouterr().err
    rows = (candidates >= 0).all(1)
    assert rows.sum() == 9 and sum(runs) == 9 * K + TIMED and (candidates[~rows] == -1).all()
    assert torch.equal(candidates[rows], expected[0][rows])
    torch.testing.assert_close(performance[rows], expected[1][rows])
    assert (performance[~rows] == 0).all()
    other, _ = measure_examples(make_model(), pool, candidates=K, queries=9, seed=4, progress=False)
    assert not torch.equal(other, candidates)
    assert VisualInContextPipeline(model, "transfer", pool)(pool.image(0))["example_ids"]


def test_a_larger_budget_goes_on_from_a_smaller_one(pool, expected, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "PART", 4)
    options = {"candidates": K, "cache_dir": tmp_path, "progress": False}
    measure_examples(make_model(), pool, queries=8, **options)
    assert runs == [4 * K] * 2
    found = measure_examples(make_model(), pool, **options)
    assert sum(runs) == COUNT * K and torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("form", [list, torch.tensor, np.array, iter, "ids"])
def test_named_images_are_measured_on_in_their_order(pool, expected, runs, form):
    named = [17, 0, 5]
    which = {"queries": [pool.ids[row] for row in named]} if form == "ids" else {"rows": form(named)}
    candidates, performance = measure_examples(make_model(), pool, candidates=K, progress=False, **which)
    assert (candidates >= 0).all(1).nonzero()[:, 0].tolist() == sorted(named) and runs == [3 * K]
    assert torch.equal(candidates[named], expected[0][named])
    torch.testing.assert_close(performance[named], expected[1][named])


def test_a_longer_list_goes_on_from_the_one_it_begins_with(pool, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "PART", 2)
    options = {"candidates": K, "cache_dir": tmp_path, "progress": False}
    measure_examples(make_model(), pool, rows=[17, 0], **options)
    measure_examples(make_model(), pool, rows=[17, 0, 5, 3], **options)
    assert runs == [2 * K] * 2


@pytest.mark.parametrize("queries,count", [(None, COUNT - 4), (7, 7), ([0, 8, 20], 3)])
def test_excluded_images_are_neither_measured_on_nor_shown(pool, queries, count):
    excluded = [19, 2, 5, 11, 2]
    which = {"rows": queries} if isinstance(queries, list) else {"queries": queries}
    options = {"candidates": K, "seed": 1, "progress": False} | which
    candidates, performance = measure_examples(make_model(), pool, exclude_rows=excluded, **options)
    rows = (candidates >= 0).all(1).nonzero()[:, 0].tolist()
    assert len(rows) == count and not set(rows) & set(excluded) and not np.isin(candidates, excluded).any()
    assert (candidates >= 0).sum() == len(rows) * K and not performance[candidates < 0].any()
    every, known = measure_examples(make_model(), pool, progress=False)
    for row in rows:  # the nearest of those that are left, with what they do among all
        left = [place for place, other in enumerate(every[row].tolist()) if other not in excluded][:K]
        assert torch.equal(candidates[row], every[row][left])
        torch.testing.assert_close(performance[row], known[row][left])
    by_id = measure_examples(make_model(), pool, exclude=[pool.ids[row] for row in excluded], **options)
    assert torch.equal(by_id[0], candidates) and torch.equal(by_id[1], performance)
    few = measure_examples(make_model(), pool, exclude_rows=range(3, COUNT), progress=False)[0]
    assert [sorted(row) for row in few[:3].tolist()] == [[1, 2], [0, 2], [0, 1]] and (few[3:] == -1).all()


def test_images_that_cannot_be_named_are_refused(pool):
    model = make_model()
    for wrong, message in (
        ({"queries": ["scene 1", "scene 77"]}, "queries: id 'scene 77' is not in this pool.*called rows"),
        ({"queries": ["1"]}, "id '1' is not in this pool"),
        ({"queries": [1]}, "queries: id 1 is not in this pool.*numbers are ids, too.*called rows"),
        ({"exclude": torch.tensor([1])}, "exclude: id 1 is not in this pool"),
        ({"rows": [1, COUNT]}, f"rows holds row {COUNT}: the pool has rows 0 to {COUNT - 1}"),
        ({"exclude_rows": [-1]}, "exclude_rows holds row -1"),
        ({"exclude": ["scene 77"]}, "exclude: id 'scene 77'"),
        ({"rows": [4, 1, 4]}, "rows holds row 4, 'scene 4', 2 times"),
        ({"queries": []}, "queries is empty"),
        ({"rows": [4, 1], "exclude": ["scene 1"]}, "row 1, 'scene 1', is in rows and in exclude"),
        ({"rows": [4], "queries": ["scene 1"]}, "queries= and rows= both say"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_examples(model, pool, candidates=K, progress=False, **wrong)
    for wrong, message in (
        ({"queries": "scene 1"}, "queries='scene 1': pass a list of ids"),
        ({"exclude_rows": 3}, "exclude_rows=3: pass a list of rows"),
        ({"queries": True}, "queries=True: pass a list"),
        ({"exclude_rows": torch.ones(COUNT).bool()}, "exclude_rows holds True.*rows of a mask"),
        ({"queries": [1.0]}, "queries holds 1.0"),
    ):
        with pytest.raises(TypeError, match=message):
            measure_examples(model, pool, candidates=K, progress=False, **wrong)
    assert model.config.performance is None


def test_the_cost_is_told_before_it_is_paid(pool, monkeypatch, tmp_path, capsys):
    model, clock, sizes = make_model(), [0.0], []
    said = []
    measure_pairs = measure.Examples.measure

    def seven_minutes_each(self, queries, rows):
        said.append(capsys.readouterr().err)
        sizes.append(rows.numel())
        clock[0] += 400 * rows.numel() if len(sizes) > 1 else 1e6  # the first one warms up
        return measure_pairs(self, queries, rows)

    monkeypatch.setattr(measure.Examples, "measure", seven_minutes_each)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure, "PART", 16)
    options = {"candidates": 10, "cache_dir": tmp_path}
    measure_examples(model, pool, **options)
    assert sizes == [1, 1, 160, 60]  # a slow model is tried with one pair only
    assert "measuring: 220 runs of the frozen model, 10 examples on each of 22 images\n" in said[0]
    assert "measuring: about 24.4 h at 4e+02 s a run on cpu\n" in said[2] and "done before" not in "".join(said)
    measure_examples(model, pool, **options)
    assert len(sizes) == 4
    last = capsys.readouterr().err
    assert "22 images, 220 of them done before\n" in last and "about" not in last
    max((tmp_path.glob("*/*.safetensors")), key=lambda file: file.stat().st_size).unlink()
    measure_examples(model, pool, **options)
    assert sizes[4:] == [1, 1, 160] and "measuring: about 17.8 h" in said[6] and "60 of them done before" in said[4]
    measure_examples(model, pool, candidates=3, progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("seconds,sizes", [(0.01, [1, 1, 5, 5, 60, 60]), (0.1, [1, 1, 5, 5]), (1.0, [1, 1])])
def test_a_fast_model_is_timed_in_batches(pool, monkeypatch, seconds, sizes):
    clock, tried = [0.0], []

    def timed(self, queries, rows):
        tried.append(rows.numel())
        clock[0] += seconds * rows.numel()

    monkeypatch.setattr(measure.Examples, "measure", timed)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    work = work_of(pool, 5)
    assert work.seconds_each(torch.arange(16), 10**6) == pytest.approx(seconds) and tried == sizes
    tried.clear()
    work.seconds_each(torch.arange(16), 99)
    assert tried == [1, 1]  # a twentieth of 99 runs is less than 5


def test_a_run_of_two_processes_is_that_of_one(pools, expected, tmp_path):
    said = start(pools, "none", tmp_path / "two", processes=2).finish()
    assert said.count(f"measuring: {COUNT * K} runs") == said.count("shared by 2 processes") == 1
    two = [load_file(tmp_path / name) for name in ("two.0", "two.1")]
    for found in two:
        assert torch.equal(found["candidates"], expected[0])
        torch.testing.assert_close(found["performance"], expected[1], atol=1e-6, rtol=0)
        assert torch.equal(found["set candidates"].long(), found["candidates"])
        assert torch.equal(found["set performance"], found["performance"])
    assert torch.equal(two[0]["performance"], two[1]["performance"])
    assert [int(found["runs"]) for found in two] == [12 * K + TIMED, 10 * K]


def test_a_process_without_a_part_gets_the_whole_table(monkeypatch, tmp_path):
    pool = make_pool(tmp_path, count=3)
    expected = measure_examples(make_model(), pool, progress=False)

    def gather(lists):  # what two processes gather, of which this is the second, without a part
        assert lists == []
        every = torch.tensor([2, 0, 1])  # any order
        return [(every, expected[0][every], expected[1][every])]

    state = measure.processes()
    monkeypatch.setattr(measure, "processes", lambda: Second(state))
    monkeypatch.setattr(measure, "gather_object", gather)
    found = measure_examples(make_model(), pool, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


class Second:
    process_index, num_processes, is_main_process = 1, 2, False

    def __init__(self, state):
        self.device = state.device


ONE_FAILS = """
import sys
from pathlib import Path
from accelerate import PartialState
from scenes import make_model, make_pool
from hf_effdl import measure_examples
from hf_effdl.vicl import measure
measure.PART = 4  # a part for each process
state = PartialState(cpu=True)
pool, model = make_pool(Path(sys.argv[1]), count=8), make_model()
def metric(predictions, references):
    if state.process_index == 1:
        raise OSError("no metric here")
    return 0.5
try:
    measure_examples(model, pool, candidates=2, metric=metric, progress=False)
except Exception as error:
    print(state.process_index, type(error).__name__, error, flush=True)
"""


def test_an_error_of_one_process_ends_all(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(ONE_FAILS)
    make_pool(tmp_path, count=8)
    said = Script(script, tmp_path, processes=2, env={"ACCELERATE_USE_CPU": "true"}).finish()
    first, second = sorted(line for line in said.splitlines() if "Error" in line)
    told = "MetricError: the metric 'metric' raised OSError: no metric here; "
    assert first.startswith(f"0 RuntimeError process 1 failed: {told}")
    assert second.startswith("1 " + told.replace(":", "", 1))


def test_parts_of_something_else_are_not_taken(pool, runs, tmp_path):
    others = make_pool(tmp_path, count=COUNT, first=30)

    def share(predictions, references):
        return float(np.mean(predictions[0] == references[0]))

    def agreement(predictions, references):
        return -float(np.mean(predictions[0] != references[0]))

    def foreground_iou(predictions, references):  # the name of the task's own
        return 0.5

    def another_share(of):
        def share(predictions, references):
            return float(np.mean(predictions[0] == references[0])) / 2

        share.__qualname__ = of.__qualname__
        return share

    first = {"model": make_model(), "pool": pool, "candidates": K}
    separate = make_model(encoder=tiny_encoder(1))
    separate = type(separate).from_parts(separate.frozen, tiny_encoder())
    changes = [
        {},
        {"pool": others},
        {"candidates": K - 1},
        {"exclude_rows": [1]},
        {"exclude_rows": [2]},
        {"metric": share},
        {"metric": agreement},
        {"metric": share, "greater_is_better": False},
        {"model": make_model(matching="nearest")},
        {"model": make_model(temperature=0.1)},
        {"model": separate},
        {"metric": foreground_iou},
        {"metric": another_share(share)},
        {"groups": [None] * COUNT},
        {"groups": [0, 0, *[None] * (COUNT - 2)]},
        {"model": make_model().cast(torch.bfloat16)},
    ]
    tables = []
    for change in changes:
        options = first | change
        model, pool = options.pop("model"), options.pop("pool")
        runs.clear()
        tables.append(measure_examples(model, pool, cache_dir=tmp_path / "cache", progress=False, **options)[1])
        assert sum(runs) == (COUNT - len(options.get("exclude_rows", []))) * options["candidates"], change
        runs.clear()
        again = measure_examples(model, pool, cache_dir=tmp_path / "cache", progress=False, **options)[1]
        assert torch.equal(again, tables[-1]) and not runs
    torch.testing.assert_close(tables[5], tables[6] + 1)
    torch.testing.assert_close(tables[5], -tables[7])


def test_a_metric_has_to_be_a_number_and_to_have_a_name(pool, tmp_path):
    model = make_model()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite on pool image 'scene .*' *: a metric has to be defined"):
            measure_examples(model, pool, metric=lambda value=value, **_: value, candidates=2, progress=False)
    assert model.config.performance is None
    with pytest.raises(ValueError, match="has no name that parts in cache_dir could be told apart by"):
        measure_examples(model, pool, metric=lambda **_: 1, cache_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_model_stays_where_it_was(pool, monkeypatch):
    model, moves = make_model(), []
    to = model.to
    monkeypatch.setattr(model, "to", lambda device: (moves.append(str(device)), to(device))[1])
    with pytest.raises(ValueError, match="not finite"):
        measure_examples(model, pool, metric=lambda **_: float("nan"), progress=False)
    assert moves == [str(measure.processes().device), "cpu"]


def test_what_cannot_be_measured_is_refused(pool, tmp_path):
    model, alone = make_model(), make_pool(tmp_path, count=1)
    for given, options, message in (
        ((model, alone), {}, "the pool has 1 examples: at least two"),
        ((make_model(encoder=tiny_encoder(1)), pool), {}, "made with another encoder.*encoder=model.encoder"),
        ((make_model("detection"), pool), {}, "the pool is for task='segmentation', the model for task='detection'"),
        ((model, pool), {"queries": 0}, f"queries=0: the pool has {COUNT} images"),
        ((model, pool), {"queries": COUNT + 1}, f"queries={COUNT + 1}: the pool has {COUNT} images"),
        ((model, pool), {"queries": COUNT - 1, "exclude_rows": [3, 4]}, f"the pool has {COUNT - 2} images"),
        ((model, pool), {"exclude_rows": range(1, COUNT)}, "1 examples that are not excluded: at least two"),
        ((model, pool), {"candidates": 0}, "candidates=0: pass a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_examples(*given, progress=False, **options)
