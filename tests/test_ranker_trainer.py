"""Lists that a ranker trains on, and its trainer: what it learns and refuses, resumed and on two processes."""

import pickle

import numpy as np
import pytest
import torch
from forked import Script
from ranker_run import COUNT, K, make_ranker, ranking_lists, table, trainer, weights
from safetensors.torch import load_file
from scenes import make_model, make_pool, tiny_encoder
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalPrediction

from hf_effdl.vicl.ranking import ranking_lists as ranking_lists_module
from hf_effdl.vicl.ranking.ranker_trainer import RankerTrainer, ranking_metrics
from hf_effdl.vicl.ranking.ranking_lists import RankingLists
from hf_effdl.vicl.remote_code.ranker_selector import pool_label_tokens
from hf_effdl.vicl.remote_code.visual_tasks import Segmentation


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    return tmp_path_factory.mktemp("pools")


@pytest.fixture(scope="module")
def pool(pools):
    return make_pool(pools, count=COUNT)


@pytest.fixture(scope="module")
def measured(pool):
    return table(pool)


# ---- lists


def test_lists_are_subsets_of_what_was_measured(pool, measured):
    candidates, performance = measured
    lists = RankingLists(pool, candidates, performance, 4)
    assert len(lists) == 20 * COUNT and lists.skipped == 0 and lists.k == 4
    assert torch.equal(lists.queries, torch.arange(COUNT).repeat_interleave(20))
    for query, rows, metric in zip(lists.queries, lists.lists, lists.metric):
        assert len(set(rows.tolist())) == 4
        places = [candidates[query].tolist().index(row) for row in rows.tolist()]
        assert torch.equal(performance[query, places], metric)
    # every candidate is in about as many lists: 20 of 4 from 10 are 8 each
    times = torch.zeros(COUNT, COUNT).index_put_((lists.queries[:, None], lists.lists), torch.ones(1), accumulate=True)
    times = times.gather(1, candidates)
    assert times.mean() == 8 and 1.2 < times.std() < 3.2  # 2.2 of independent draws
    again, other = (
        RankingLists(pool, candidates, performance, 4),
        RankingLists(pool, candidates, performance, 4, seed=1),
    )
    assert torch.equal(again.lists, lists.lists) and not torch.equal(other.lists, lists.lists)
    assert repr(lists) == f"RankingLists(480 lists of 4, {COUNT} queries, 0 skipped)"


def test_a_draw_in_parts_is_a_draw_too(pool, measured, monkeypatch):
    monkeypatch.setattr(ranking_lists_module, "CELLS", 100)
    lists = RankingLists(pool, *measured, 3, lists_per_query=5)
    assert len(lists) == 5 * COUNT and all(len(set(row)) == 3 for row in lists.lists.tolist())
    inside = (lists.lists[:, :, None] == measured[0][lists.queries][:, None]).any(2)
    assert inside.all() and len({tuple(sorted(row)) for row in lists.lists[:40].tolist()}) > 20


def test_an_item_is_what_the_ranker_takes(pool, measured):
    lists = ranking_lists(pool)
    item = lists[7]
    assert torch.equal(item["query_tokens"], pool.tokens(lists.queries[7:8])[0])
    assert torch.equal(item["candidate_tokens"], pool.tokens(lists.lists[7]))
    assert torch.equal(item["metric"], lists.metric[7])
    expected = pool_label_tokens(pool, lists.lists[7].tolist(), Segmentation())
    torch.testing.assert_close(item["candidate_labels"], expected)
    several = lists.__getitems__([7, 3])
    assert all(torch.equal(several[0][name], value) for name, value in item.items())
    assert all(torch.equal(several[1][name], value) for name, value in lists[3].items())
    batch = next(iter(DataLoader(lists, batch_size=6)))
    output = make_ranker()(**batch)
    assert output.scores.shape == (6, 4) and output.loss.isfinite()
    assert "candidate_labels" not in ranking_lists(pool, labels=False)[0]
    copied = pickle.loads(pickle.dumps(lists))  # as a worker of a data loader gets them
    assert all(torch.equal(copied[7][name], value) for name, value in item.items())


def test_rows_that_are_held_out_are_nowhere(pool, measured):
    out = [2, 3, 11]
    lists = ranking_lists(pool, exclude_rows=out, lists_per_query=30)
    for rows in (lists.queries, lists.lists):
        assert not set(rows.flatten().tolist()) & set(out)
    assert len(lists.queries.unique()) == COUNT - 3
    # and who looks like them neither; random features are all alike, so the threshold is set between
    near = pool.vectors @ pool.vectors[2]
    order = near.argsort(descending=True)
    assert order[0] == 2
    cut = float(near[order[2:4]].mean())
    lists = ranking_lists(pool, exclude_rows=[2], duplicates=cut, lists_per_query=30)
    there = set(lists.queries.tolist()) | set(lists.lists.flatten().tolist())
    assert there == set(range(COUNT)) - set(order[:3].tolist())


def test_queries_can_be_chosen_and_too_short_ones_are_skipped(pool, measured):
    candidates, performance = (part.clone() for part in measured)
    lists = ranking_lists(pool, rows=[5, 1])
    assert lists.queries.unique().tolist() == [1, 5]
    candidates[1, 2:] = candidates[4] = -1  # two left; not measured at all
    candidates[6, ::2] = -1  # five left
    performance[candidates < 0] = torch.nan  # not looked at
    lists = RankingLists(pool, candidates, performance, 5, duplicates=None)
    assert lists.skipped == 1 and set(range(COUNT)) - set(lists.queries.tolist()) == {1, 4}
    rows = lists.lists[lists.queries == 6]
    assert {tuple(sorted(row)) for row in rows.tolist()} == {tuple(sorted(candidates[6, 1::2].tolist()))}
    assert (lists.lists >= 0).all() and lists.metric.isfinite().all()


def test_lists_from_a_model_that_measured(pool, measured):
    model = make_model()
    with pytest.raises(ValueError, match="nothing was measured"):
        RankingLists.from_model(model, pool)
    model.set_performance(*measured, pool.fingerprint)
    lists = RankingLists.from_model(model, pool, 3, lists_per_query=2, duplicates=None)
    assert torch.equal(lists.lists, RankingLists(pool, *measured, 3, lists_per_query=2).lists)
    model.set_performance(*measured, "0123")
    with pytest.raises(ValueError, match=f"measured on the pool 0123, but this is {pool.fingerprint}"):
        RankingLists.from_model(model, pool)


def test_what_nothing_can_be_learnt_from_is_named(pool, measured):
    candidates, performance = measured
    broken = performance.clone()
    broken[3, 1] = torch.nan
    for given, options, said in (
        ((candidates, broken), {}, "'scene 3' is NaN or infinite"),
        ((candidates, 0 * performance + 0.25), {}, "performance is 0.25 for every example"),
        ((candidates, performance), {"k": K + 1}, f"k={K + 1}, but .* K={K} candidates, which is not above k"),
        ((candidates, performance), {"k": 1}, "k=1: a list has two"),
        ((candidates, performance), {"lists_per_query": 0}, "lists_per_query=0"),
        ((candidates[:-1], performance[:-1]), {}, rf"\({COUNT - 1}, {K}\).*pool's {COUNT}"),
        ((candidates, performance[:, 1:]), {}, "both must be"),
        ((candidates + 5, performance), {}, "name row 28 of a pool of 24"),
        ((candidates, performance), {"exclude_rows": [1, 24]}, "exclude_rows holds row 24: the pool has rows 0 to 23"),
        ((candidates, performance), {"rows": [-1]}, "rows holds row -1"),
        ((candidates, performance), {"rows": [4], "exclude_rows": [4]}, "no list of k=5 is left: of 0 queries"),
        ((candidates, performance), {"exclude_rows": range(2, 24)}, "no list of k=5 is left: of 2 queries"),
    ):
        with pytest.raises(ValueError, match=said):
            RankingLists(pool, *given, **{"duplicates": None, **options})


# ---- what is measured


def test_metrics_count_lists_pairs_and_what_the_pick_is_worth():
    scores = np.array([[3.0, 2.0, 1.0], [0.0, 5.0, 4.0], [1.0, 1.0, 0.0]])
    metric = np.array([[0.9, 0.5, 0.1], [0.8, 0.2, 0.8], [0.5, 0.5, 0.5]])
    found = ranking_metrics(EvalPrediction(scores, metric))
    # pairs: 3 right of 3; of (0, 1) and (1, 2) none; no pair of different performance
    assert found == pytest.approx(
        {
            "list_accuracy": 2 / 3,
            "pair_accuracy": 3 / 5,
            "pick": (0.9 + 0.2 + 0.5) / 3,
            "random": metric.mean(),
            "best": (0.9 + 0.8 + 0.5) / 3,
        }
    )
    assert ranking_metrics(EvalPrediction(0 * scores, metric))["pair_accuracy"] == 0.5
    assert ranking_metrics(EvalPrediction(scores, 0 * metric))["pair_accuracy"] == 1


# ---- training


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    whole = trainer(out, pool)
    before = whole.evaluate()
    whole.train()
    return whole, before, out


def test_it_learns_and_says_how_well(trained, pool, tmp_path):
    run, before, _ = trained
    after = run.evaluate()
    assert {f"eval_{name}" for name in ("loss", "list_accuracy", "pair_accuracy", "pick", "random", "best")} <= set(
        after
    )
    assert after["eval_loss"] < before["eval_loss"]
    longer = trainer(tmp_path, pool, num_train_epochs=12, learning_rate=3e-3, save_strategy="no")
    longer.train()
    found = longer.evaluate()
    fresh, chance = trainer(tmp_path / "fresh", pool), []
    for seed in range(8):  # one untrained ranker may be right by chance
        torch.manual_seed(seed)
        fresh.model = fresh.model_wrapped = type(fresh.model)(fresh.model.config)
        chance.append(fresh.evaluate()["eval_pair_accuracy"])
    assert found["eval_pair_accuracy"] > 0.85 > 0.65 > sum(chance) / 8 > 0.35
    assert found["eval_random"] < found["eval_pick"] <= found["eval_best"]
    assert found["eval_best"] - found["eval_pick"] < 0.2 * (found["eval_best"] - found["eval_random"])


def test_the_config_remembers_what_it_was_trained_on(trained, pool):
    config = trained[0].model.config
    assert config.list_length == 4 and config.pool_fingerprint == pool.fingerprint
    assert config.encoder_fingerprint == pool.encoder["fingerprint"] and config.encoder == pool.encoder
    saved = type(trained[0].model).from_pretrained(trained[2] / "checkpoint-18")
    assert saved.config.list_length == 4 and all(
        torch.equal(value, weights(trained[0])[name]) for name, value in saved.state_dict().items()
    )


def test_a_resumed_run_is_the_uninterrupted_one(trained, pool, tmp_path):
    rest = trainer(tmp_path, pool)
    rest.train(resume_from_checkpoint=str(trained[2] / "checkpoint-9"))
    assert rest.state.global_step == 18
    expected = weights(trained[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(rest).items())
    start = weights(trainer(tmp_path, pool))
    assert not torch.equal(start["predictor.0.weight"], expected["predictor.0.weight"])


def test_two_processes_train_as_one_and_resume(trained, pools, pool, tmp_path):
    Script("ranker_run.py", pools, tmp_path, processes=2).finish()
    whole, rest = ([load_file(tmp_path / f"{name}.{rank}") for rank in range(2)] for name in ("whole", "rest"))
    expected = weights(trained[0])
    for name, value in expected.items():
        found = whole[0][f"whole.{name}"]
        assert torch.equal(found, whole[1][f"whole.{name}"]) and torch.equal(found, rest[0][f"whole.{name}"])
        # the biases of keys, and of all scores, change no loss: Adam makes steps of rounding errors
        if name == "predictor.2.bias":
            continue
        if name.endswith("key_value.bias"):
            found, value = found[len(found) // 2 :], value[len(value) // 2 :]
        assert (found - value).abs().mean() < 1e-4, name
    metrics = trained[0].evaluate()
    for name in ("eval_list_accuracy", "eval_pair_accuracy", "eval_pick"):
        assert float(whole[0][name]) == pytest.approx(metrics[name], abs=0.02)


def test_it_takes_any_trainer_argument_and_the_papers_by_default(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = RankerTrainer(make_ranker(), train_dataset=ranking_lists(pool)).args
    assert args.learning_rate == 5e-5 and args.weight_decay == 0 and args.per_device_train_batch_size == 64
    assert args.lr_scheduler_type == "constant" and args.optim.startswith("adamw")
    made = RankerTrainer(
        model_init=lambda: make_ranker(), args=trainer(tmp_path, pool).args, train_dataset=ranking_lists(pool)
    )
    assert made.model.config.list_length == 4


def test_what_does_not_fit_the_ranker_is_refused(pool, tmp_path):
    args, lists = trainer(tmp_path, pool).args, ranking_lists(pool)
    with pytest.raises(TypeError, match="model is a Linear: RankerTrainer trains a ListwiseRanker"):
        RankerTrainer(torch.nn.Linear(2, 2), args, train_dataset=lists)
    with pytest.raises(ValueError, match="width 16, but this ranker takes width 24"):
        RankerTrainer(make_ranker(hidden_size=24), args, train_dataset=lists)
    other = make_ranker().attach(tiny_encoder(1))
    with pytest.raises(ValueError, match=f"trained on those of the encoder {tiny_encoder(1).fingerprint}"):
        RankerTrainer(other, args, eval_dataset=lists)
    with pytest.raises(ValueError, match="labels=False"):
        RankerTrainer(make_ranker(legacy=True), args, train_dataset=lists)
    with pytest.raises(ValueError, match="labels=False"):
        RankerTrainer(make_ranker(legacy=True), args, eval_dataset={"one": lists})
    legacy = RankerTrainer(make_ranker(legacy=True), args, train_dataset=ranking_lists(pool, labels=False))
    legacy.args.max_steps = 1
    legacy.args.save_strategy = "no"
    legacy.train()
