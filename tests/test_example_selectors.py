"""Six strategies on a small pool, against loops and against trying everything by hand."""

from importlib.resources import files

import evaluate
import numpy as np
import pytest
import torch
from scenes import SIZE, TASKS, label_of, make_model, make_pool, rows, scene, tiny_encoder

from hf_effdl.vicl.remote_code import examples as examples_module
from hf_effdl.vicl.remote_code import strategies
from hf_effdl.vicl.remote_code.examples import Examples, Queries
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.strategies import STRATEGIES
from hf_effdl.vicl.remote_code.visual_tasks import find_task


COUNT, K = 15, 6
METRICS = {"segmentation": "foreground_iou", "detection": "box_iou", "colourisation": "colour_mse"}


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    return {task: make_pool(folder, task, COUNT) for task in TASKS}


@pytest.fixture(scope="module")
def with_grids(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("grids"), "segmentation", COUNT, keep_grids=True)


@pytest.fixture
def examples(pools):
    return Examples(pools["segmentation"], make_model(), find_task("segmentation"))


def ask(examples, numbers, truth=True, **options) -> Queries:
    task, model = examples.task, examples.model
    images = [scene(number)[0] for number in numbers]
    seen = [task.query(image) for image in images]
    labels = task.labels([label_of(task.name, number) for number in numbers], images, model.image_size)
    views = model.encoder(pixels(seen, model.encoder.image_size))
    return Queries(pixels(seen, model.image_size), views, labels if truth else None, **options)


def set_table(examples, missing=0.0, seed=0, width=K) -> tuple[np.ndarray, np.ndarray]:
    """Random performance of nearest others, of which some were not measured."""
    pool, generator = examples.pool, torch.Generator().manual_seed(seed)
    _, found = pool.search(pool.vectors, width, exclude=torch.arange(len(pool)))
    found[torch.rand(found.shape, generator=generator) < missing] = -1
    values = torch.rand(found.shape, generator=generator)
    examples.model.set_performance(found, values, pool.fingerprint)
    return found.numpy(), values.double().numpy()


def residuals(found, values):
    """`{(image, example): performance less the image's mean}` and the mean of that for each example."""
    table, each = {}, {}
    for j in range(len(found)):
        known = [k for k in range(found.shape[1]) if found[j, k] >= 0]
        for k in known:
            table[j, found[j, k]] = values[j, k] - np.mean([values[j, i] for i in known])
            each.setdefault(found[j, k], []).append(table[j, found[j, k]])
    return table, {c: np.mean(seen) for c, seen in each.items()}


def best_first(scores, count):
    """Of `[(row, score)]`, the first of equals first."""
    return sorted(scores, key=lambda pair: -pair[1])[:count]


def agree(found, expected, atol=1e-5):
    scores, chosen = found
    assert scores.shape == chosen.shape and not chosen.is_floating_point()
    assert [rows.tolist() for rows in chosen] == [[row for row, _ in one] for one in expected]
    np.testing.assert_allclose(scores, [[score for _, score in one] for one in expected], atol=atol)


def nearest_by_hand(queries, pool, exclude=None):
    vectors = pool.vectors.double().numpy()
    lists = []
    for i, query in enumerate(queries.views["vector"].double().numpy()):
        pairs = [(row, vectors[row] @ query) for row in range(len(pool)) if exclude is None or row != exclude[i]]
        lists.append(best_first(pairs, len(pairs)))
    return lists


@pytest.mark.parametrize("count", [1, 4, COUNT, COUNT + 5])
def test_nearest_is_the_order_of_cosines(examples, count):
    queries = ask(examples, range(100, 105))
    agree(
        STRATEGIES["nearest"](queries, examples, count, K),
        [one[:count] for one in nearest_by_hand(queries, examples.pool)],
    )


def test_a_random_choice_depends_on_the_image_and_the_seed_alone(examples):
    together = STRATEGIES["random"](ask(examples, range(100, 110)), examples, 3, K)
    for i in range(10):
        alone = STRATEGIES["random"](ask(examples, [100 + i]), examples, 3, K)
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])
    other = STRATEGIES["random"](ask(examples, range(100, 110), seed=1), examples, 3, K)[1]
    assert not torch.equal(other, together[1])
    assert (together[0][:, :-1] >= together[0][:, 1:]).all()
    assert all(len(set(row)) == 3 for row in together[1].tolist())


@pytest.mark.parametrize("excluding", [False, True])
def test_random_choices_are_uniform_over_the_pool(examples, excluding):
    from scipy.stats import chisquare

    count = 3000
    cells = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    exclude = torch.full((count,), 4) if excluding else None
    _, chosen = STRATEGIES["random"](Queries(cells, {}, exclude=exclude), examples, 2, K)
    for place in range(2):
        seen = np.bincount(chosen[:, place], minlength=COUNT)
        if excluding:
            assert seen[4] == 0
            seen = np.delete(seen, 4)
        assert chisquare(seen).pvalue > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_query_itself_is_never_its_example(pools, strategy):
    examples = Examples(pools["segmentation"], make_model(), find_task("segmentation"))
    set_table(examples, missing=0.7, width=3)
    # the last two are not in the pool
    queries = ask(examples, [*range(COUNT), 100, 101], exclude=torch.tensor([*range(COUNT), -1, -1]))
    for count in (1, COUNT - 1, COUNT):
        _, chosen = STRATEGIES[strategy](queries, examples, count, COUNT)
        assert chosen.shape == (COUNT + 2, min(count, COUNT - 1))
        for row, some in enumerate(chosen.tolist()):
            assert row not in some[:COUNT] or row >= COUNT
            assert len(set(some)) == len(some) and 0 <= min(some) <= max(some) < COUNT
    unknown = ask(examples, [100], exclude=torch.tensor([-1]))
    free = STRATEGIES[strategy](ask(examples, [100]), examples, 5, COUNT - 1)
    assert torch.equal(STRATEGIES[strategy](unknown, examples, 5, COUNT - 1)[1], free[1])


@pytest.mark.parametrize("missing", [0, 0.8])
def test_static_is_the_best_mean_residual_and_takes_what_was_never_measured_last(examples, missing):
    _, mean = residuals(*set_table(examples, missing=missing))
    assert (len(mean) < COUNT) == (missing > 0)
    quality = [(row, mean.get(row, -np.inf)) for row in range(COUNT)]
    for count in (1, 4, len(mean), COUNT):
        agree(STRATEGIES["static"](ask(examples, [100, 101]), examples, count, K), [best_first(quality, count)] * 2)


def dense_by_hand(queries, examples):
    scores = []
    grids = examples.grids(torch.arange(len(examples.pool))).double().numpy()
    asked = queries.views["grid"].flatten(1, 2).double().numpy()
    for i, near in enumerate(nearest_by_hand(queries, examples.pool)):
        one = []
        for row, _ in near[:K]:
            cells = [max(q @ e for e in grids[row]) / np.linalg.norm(q) for q in asked[i]]
            one.append((row, np.mean(cells)))
        scores.append(one)
    return scores


@pytest.mark.parametrize("kept", [False, True])
def test_dense_is_the_mean_of_the_best_cosines_of_cells(pools, with_grids, kept):
    pool = with_grids if kept else pools["segmentation"]
    examples = Examples(pool, make_model(), find_task("segmentation"))
    assert pool.has_grids == kept
    queries = ask(examples, range(100, 104))
    expected = dense_by_hand(queries, examples)
    for count in (1, 3, K):
        agree(STRATEGIES["dense"](queries, examples, count, K), [best_first(one, count) for one in expected])


@pytest.mark.parametrize("task", TASKS)
def test_kept_feature_maps_are_those_that_would_be_computed(tmp_path, pools, task):
    kept = make_pool(tmp_path, task, 5, keep_grids=True)
    one, other = (Examples(pool, make_model(task), find_task(task)) for pool in (pools[task], kept))
    some = torch.tensor([[0, 4], [2, 2]])
    assert one.grids(some).shape == (2, 2, 16, 16)
    torch.testing.assert_close(one.grids(some), other.grids(some), atol=2e-3, rtol=0)
    torch.testing.assert_close(one.grids(some).norm(dim=-1), torch.ones(2, 2, 16))


@pytest.mark.parametrize("missing", [0, 0.5])
@pytest.mark.parametrize("neighbours", [3, 40])
def test_transfer_is_the_formula(examples, monkeypatch, neighbours, missing):
    monkeypatch.setattr(strategies, "NEIGHBOURS", neighbours)
    table, mean = residuals(*set_table(examples, missing))
    queries = ask(examples, range(100, 104))
    expected = []
    for near in nearest_by_hand(queries, examples.pool):
        weights = np.exp(np.array([cosine for _, cosine in near[:neighbours]]) / strategies.TEMPERATURE)
        weights /= weights.sum()
        expected.append(
            [(c, sum(w * table.get((j, c), mean.get(c, 0)) for w, (j, _) in zip(weights, near))) for c, _ in near[:K]]
        )
    for count in (1, 4, K):
        agree(STRATEGIES["transfer"](queries, examples, count, K), [best_first(one, count) for one in expected])


def by_hand(examples, numbers, metric=None):
    """Performance of every example on every query, one call of the model each; larger is better for the task."""
    task, model, pool = examples.task, examples.model, examples.pool
    found = np.zeros((len(numbers), len(pool)))
    for i, number in enumerate(numbers):
        query, truth = scene(number)[0], task.labels([label_of(task.name, number)], [scene(number)[0]], (SIZE, SIZE))
        for row in range(len(pool)):
            shown = pixels([task.query(pool.image(row))], (SIZE, SIZE))
            label = task.labels([pool.label(row)], [pool.image(row)], (SIZE, SIZE))
            painted = model(pixels([task.query(query)], (SIZE, SIZE)), shown[None], label[None])
            if metric is None:
                found[i, row] = task.score(painted, truth)[0] * (1 if task.greater_is_better else -1)
            else:
                found[i, row] = metric(task.decode(painted[0], (SIZE, SIZE)), task.decode(truth[0], (SIZE, SIZE)))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_is_trying_all_candidates(pools, task):
    examples = Examples(pools[task], make_model(task), find_task(task))
    numbers = list(range(100, 104))
    performance, queries = by_hand(examples, numbers), ask(examples, numbers)
    near = nearest_by_hand(queries, examples.pool)
    for count in (1, 4, K):
        expected = [best_first([(row, performance[i, row]) for row, _ in near[i][:K]], count) for i in range(4)]
        agree(STRATEGIES["oracle"](queries, examples, count, K), expected)


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_goes_by_an_evaluate_metric(pools, task):
    metric = evaluate.load(str(files("hf_effdl.metrics") / METRICS[task]))
    greater = find_task(task).greater_is_better
    own = Examples(pools[task], make_model(task), find_task(task))
    other = Examples(pools[task], make_model(task), find_task(task), metric, greater)
    queries = ask(own, [100, 101])
    one, two = (STRATEGIES["oracle"](queries, examples, K, K) for examples in (own, other))
    torch.testing.assert_close(one[0], two[0], atol=0.02 if task == "colourisation" else 1e-6, rtol=0)
    if task != "colourisation":  # of which the decoded image has whole levels
        assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("greater", [True, False])
def test_the_oracle_goes_by_any_function(pools, greater):
    def area(predictions, references):
        assert len(predictions) == len(references) == 1
        assert predictions[0].shape == references[0].shape == (SIZE, SIZE) and predictions[0].dtype == np.uint8
        return {"share": abs(predictions[0].mean() - references[0].mean()), "rest": 7}

    examples = Examples(pools["segmentation"], make_model(), find_task("segmentation"), area, greater)
    performance = by_hand(examples, [100, 101], lambda a, b: abs(a.mean() - b.mean())) * (1 if greater else -1)
    queries = ask(examples, [100, 101])
    near = nearest_by_hand(queries, examples.pool)
    expected = [best_first([(row, performance[i, row]) for row, _ in near[i][:K]], K) for i in range(2)]
    scores, chosen = STRATEGIES["oracle"](queries, examples, K, K)
    np.testing.assert_allclose(scores, [[score for _, score in one] for one in expected], atol=1e-6)
    assert [row[0] for row in chosen.tolist()] == [one[0][0] for one in expected]


def test_a_metric_that_is_not_a_number_is_refused(pools):
    examples = Examples(pools["segmentation"], make_model(), find_task("segmentation"), lambda **_: float("nan"))
    with pytest.raises(ValueError, match="not a number where example 'scene .*' was shown"):
        STRATEGIES["oracle"](ask(examples, [100]), examples, 1, K)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lists_are_as_long_as_the_pool_and_the_candidates_allow(examples, strategy):
    set_table(examples)
    queries = ask(examples, [100, 101])
    for count, candidates in ((1, 1), (3, 2), (3, 100), (100, 100), (COUNT, 4)):
        scores, chosen = STRATEGIES[strategy](queries, examples, count, candidates)
        inside = candidates if strategy in ("dense", "transfer", "oracle") else COUNT
        assert scores.shape == chosen.shape == (2, min(count, inside, COUNT))
        assert (scores[:, :-1] >= scores[:, 1:]).all()


@pytest.mark.parametrize("strategy", ["dense", "transfer", "oracle"])
def test_of_equals_the_nearer_stands_first(pools, strategy):
    pool = pools["segmentation"]
    examples = Examples(pool, make_model(), find_task("segmentation"), lambda **_: 0.5)
    queries = ask(examples, [100, 101, 102])
    found, values = set_table(examples)
    examples.model.set_performance(torch.tensor(found), torch.full(values.shape, 0.25), pool.fingerprint)
    if strategy == "dense":
        queries.views["grid"] = torch.zeros_like(queries.views["grid"])
    expected = [[row for row, _ in one[:K]] for one in nearest_by_hand(queries, pool)]
    assert STRATEGIES[strategy](queries, examples, K, K)[1].tolist() == expected


# ---- what is kept


def test_the_cache_keeps_to_its_limit_and_changes_nothing(pools, monkeypatch):
    pool, model, task = pools["segmentation"], make_model(), find_task("segmentation")
    queries = ask(Examples(pool, model, task), range(100, 104))
    plain = Examples(pool, model, task)
    rounds = [(name, count) for name in ("dense", "oracle", "dense") for count in (1, K)]
    expected = [STRATEGIES[name](queries, plain, count, K) for name, count in rounds]
    each = 4 * max(3 * SIZE * SIZE, 16 * 16)  # bytes of the largest thing that is kept
    for limit in (0, each, 5 * each):
        monkeypatch.setattr(examples_module, "CACHE_BYTES", limit)
        small = Examples(pool, model, task)
        for (name, count), (scores, chosen) in zip(rounds, expected):
            found = STRATEGIES[name](queries, small, count, K)
            assert torch.equal(found[0], scores) and torch.equal(found[1], chosen)
            values = [value for kept in small._kept.values() for value in kept.values()]
            assert sum(value.numel() * 4 for value in values) == small._bytes <= limit
            # nothing holds on to a larger tensor that it was cut from
            assert sum(value.untyped_storage().nbytes() for value in values) == small._bytes


def test_an_image_is_read_and_encoded_once(pools, monkeypatch):
    pool, model = pools["segmentation"], make_model()
    examples = Examples(pool, model, find_task("segmentation"))
    encoded = []
    encode = model.frozen.encode
    monkeypatch.setattr(model.frozen, "encode", lambda images: (encoded.append(len(images)), encode(images))[1])
    for wanted in ([[0, 3], [3, 3]], [[3, 0, 5]], [[5]]):
        images, labels = examples.encoded(torch.tensor(wanted))
        assert images.shape[:2] == labels.shape[:2] == torch.tensor(wanted).shape
    assert encoded == [2, 1]
    expected = encode(pixels([pool.image(5)], (SIZE, SIZE)))[0]
    torch.testing.assert_close(images[0, 0], expected)


def test_a_pool_that_changes_in_place_is_read_anew(tmp_path):
    pool = make_pool(tmp_path, count=8)
    pool.save_pretrained(tmp_path / "mine")
    pool = type(pool).from_pretrained(tmp_path / "mine")
    examples = Examples(pool, make_model(), find_task("segmentation"))
    queries, everything = ask(examples, [100]), torch.arange(7)[None]
    examples.encoded(everything), examples.grids(everything)
    pool.remove(["scene 0", "scene 3"])
    pool.add(rows(2, 50), encoder=tiny_encoder(), progress=False)
    fresh = Examples(pool, make_model(), find_task("segmentation"))
    for mine, theirs in zip(
        (*examples.encoded(everything), examples.grids(everything)),
        (*fresh.encoded(everything), fresh.grids(everything)),
    ):
        assert torch.equal(mine, theirs)
    assert torch.equal(examples.measure(queries, everything), fresh.measure(queries, everything))


def test_rows_that_are_not_there_are_not_measured(examples):
    queries = ask(examples, [100, 101])
    found = examples.measure(queries, torch.tensor([[3, -1], [-1, 2]]))
    assert found.isfinite().tolist() == [[True, False], [False, True]] and (found[0, 1] == -torch.inf)
    assert (examples.measure(queries, torch.full((2, 3), -1)) == -torch.inf).all()


# ---- refusals


@pytest.mark.parametrize("strategy", ["static", "transfer"])
def test_what_needs_measured_performance_says_how_to_get_it(pools, strategy):
    examples = Examples(pools["segmentation"], make_model(), find_task("segmentation"))
    with pytest.raises(ValueError, match=r"measure_examples\(model, pool\) first, or choose 'nearest'"):
        STRATEGIES[strategy](ask(examples, [100]), examples, 1, K)
    examples.model.set_performance(torch.zeros(COUNT, 1).int(), torch.zeros(COUNT, 1), "of another pool")
    with pytest.raises(ValueError, match=r"on the pool of another pool, but.*measure_examples\(model, pool\) again"):
        STRATEGIES[strategy](ask(examples, [100]), examples, 1, K)
