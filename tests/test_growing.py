import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import growing_run
import pytest
import tiny_run
import torch
from compare import assert_close, assert_same
from distributed import trainer_run
from forked import Script
from models import recount, resnet
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_effdl import (
    GrowingArguments,
    GrowingTrainer,
    GrowthCallback,
    SparsePath,
    SplitLBIArguments,
    SplitLBITrainer,
    find_groups,
    param_groups,
    slim,
)
from hf_effdl.structure.groups.group import regroup
from hf_effdl.structure.growing import checkpoint as grow_checkpoint
from hf_effdl.structure.growing.checkpoint import grown_folder
from hf_effdl.structure.growing.history import (
    by_round,
    grew,
    growth_curve,
    growth_table,
    rounds_without_growth,
    training_macs,
)
from hf_effdl.structure.growing.optimizer_state import RELEASE, grow_optimizer, optimizer_names
from hf_effdl.structure.growing.picture import plot_growth
from hf_effdl.structure.growing.plan import fits, growth_is_over, growth_ties, plan_growth
from hf_effdl.structure.growing.widen import widen_groups
from hf_effdl.structure.optim.split_lbi import SplitLBI


SCRIPT = Path(growing_run.__file__)
ROUNDS = (6, 13, 19)
# a path too short for any unit, seen at every step
QUIET = {"path_length": 1.05, "path_share": 1.0, "eval_strategy": "no", "save_steps": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    run = growing_run.trainer(tmp_path_factory.mktemp("grown"))
    run.summary = run.train()
    return run


@pytest.fixture(scope="module")
def finished(grown):
    return growing_run.outcome(grown)


def with_loss(logits, labels):
    loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
    return loss | {"logits": logits}


def widths(run):
    return {group.name.split("encoder.")[-1]: group.units for group in run.groups}


# ---- what grows


def settings(**changes):
    values = {"growth_threshold": 0.8, "growth_add": 8, "growth_ratio": 1.5, "growth_patience": 2, "widths": "stock"}
    return SimpleNamespace(**dict.fromkeys(["max_macs", "max_params", "max_width"]) | values | changes)


def mlp(*sizes):
    layers = [layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    return net, find_groups(net, torch.zeros(1, sizes[0]))


def test_a_saturated_group_grows_by_the_larger_of_step_and_factor_and_others_stay():
    net, groups = mlp(3, 10, 40, 20, 2)
    ties = growth_ties(net, groups, "stock")
    support = {"0": (8, 10), "2": (40, 40), "4": (15, 20)}
    assert plan_growth(groups, ties, support, settings()) == {"0": 8, "2": 20}
    assert plan_growth(groups, ties, support, settings(growth_threshold=0.81)) == {"2": 20}
    assert plan_growth(groups, ties, support, settings(growth_ratio=1.25, growth_add=3)) == {"0": 3, "2": 10}
    assert plan_growth(groups, ties, {name: (0, n) for name, (_, n) in support.items()}, settings()) == {}


@pytest.mark.parametrize("bound", ["macs", "params"])
def test_what_would_pass_a_bound_is_cut_down_alike_and_what_is_left_goes_to_the_most_saturated(bound):
    net, groups = mlp(3, 10, 40, 2)
    ties = growth_ties(net, groups, "stock")
    network, support = groups[0].network, {"0": (10, 10), "2": (38, 40)}

    def cost(first, second):
        return network.count(groups, {"0": first, "2": second})[bound]

    whole = cost(18, 60)
    for limit in (cost(10, 40), cost(13, 40), cost(18, 40) + 1, cost(18, 53), whole - 1, whole):
        plan = plan_growth(groups, ties, support, settings(**{f"max_{bound}": limit}))
        shares = [k / 160 for k in range(161)]  # every share at which one of them gets a unit more
        alike = max(
            (10 + int(s * 8), 40 + int(s * 20)) for s in shares if cost(10 + int(s * 8), 40 + int(s * 20)) <= limit
        )
        first = max(n for n in range(alike[0], 19) if cost(n, alike[1]) <= limit)
        second = max(n for n in range(alike[1], 61) if cost(first, n) <= limit)
        assert plan == {k: v for k, v in {"0": first - 10, "2": second - 40}.items() if v}, limit
    support = {"0": (9, 10), "2": (40, 40)}  # now the other one comes first
    alike = plan_growth(groups, ties, support, settings(**{f"max_{bound}": cost(10, 60)}))
    assert 0 < alike["0"] < 8 and 0 < alike["2"] < 20 and cost(10 + alike["0"], 41 + alike["2"]) > cost(10, 60)
    assert plan_growth(groups, ties, support, settings(max_width=45)) == {"0": 8, "2": 5}


def test_groups_that_one_number_of_the_config_sizes_grow_in_proportion_by_the_share_of_all_their_units():
    net = resnet("bottleneck")
    groups = find_groups(net, torch.zeros(1, 3, 32, 32))
    ties = growth_ties(net, groups, "stock")
    support = {group.name: (0, group.units) for group in groups}
    stage = next(tie for tie in ties if len(tie.shares) > 2 and max(tie.shares.values()) * tie.steps == 16)
    units = {name: share * stage.steps for name, share in stage.shares.items()}
    largest = max(units, key=units.get)
    total = sum(units.values())
    support |= {name: (n, n) for name, n in units.items()}
    support[largest] = (units[largest] - int(0.2 * total), units[largest])  # the tie is just saturated
    args = settings()
    plan = plan_growth(groups, ties, support, args, net)
    assert {name: units[name] + more for name, more in plan.items()} == {n: 24 * u // 16 for n, u in units.items()}
    big = widen_groups(net, groups, plan)
    assert getattr(big.config, "quantization_config", None) is None and 24 in big.config.hidden_sizes
    support[largest] = (support[largest][0] - 1, units[largest])
    assert plan_growth(groups, ties, support, args, net) == {}
    free = plan_growth(groups, growth_ties(net, groups, "free"), support, settings(growth_add=2, growth_ratio=1.0))
    assert free == {name: 2 for name in units if name != largest}


def test_a_width_for_which_the_stock_class_would_leave_out_a_projection_is_passed_over():
    net = resnet("bottleneck")  # stem 8, first stage 16: a stem of 16 needs no projection any more
    groups = find_groups(net, torch.zeros(1, 3, 32, 32))
    ties = growth_ties(net, groups, "stock")
    stem = next(tie for tie in ties if "embedding_size" in tie.fields and len(tie.fields) == 1)
    support = {g.name: (g.units if g.name in stem.shares else 0, g.units) for g in groups}
    plan = plan_growth(groups, ties, support, settings(growth_add=8), net)
    assert set(plan.values()) == {7}
    assert getattr(widen_groups(net, groups, plan).config, "quantization_config", None) is None
    by_eight = widen_groups(net, groups, {name: 8 for name in stem.shares})
    assert getattr(by_eight.config, "quantization_config", None) is not None


def test_groups_that_are_not_lifted_grow_only_with_those_that_are():
    net = resnet()
    groups = find_groups(net, torch.zeros(1, 3, 32, 32))
    whole = growth_ties(net, groups, "stock")
    together = next(tie for tie in whole if len(tie.shares) > 1)
    first, *others = together.shares
    bare = [replace(g, lifted=(), tensors={}) if g.name in others else g for g in groups]
    support = {g.name: (g.units, g.units) for g in bare if g.lifted}
    assert (
        together.shares.keys() <= plan_growth(bare, growth_ties(net, bare, "stock"), support, settings(), net).keys()
    )
    alone = plan_growth(bare, growth_ties(net, bare, "free"), support, settings())
    assert first in alone and not set(others) & alone.keys()


def test_growth_is_over_after_patience_or_when_not_one_unit_more_fits():
    net, groups = mlp(3, 10, 4, 2)

    def history(*grown):
        return [{"round": i, "group": "0", "from": 1, "to": 1 + g} for i, g in enumerate(grown, 1)]

    assert rounds_without_growth(history(1, 0, 0)) == 2 and rounds_without_growth(history(0, 0, 1)) == 0
    assert growth_is_over(net, groups, settings(), history(1, 0, 0))
    assert not growth_is_over(net, groups, settings(), history(0, 1, 0))
    assert not growth_is_over(net, groups, settings(growth_patience=3), history(1, 0, 0))
    now = groups[0].network.count()["params"]
    one = groups[0].network.count(groups, {"2": 5})["params"]
    other = groups[0].network.count(groups, {"0": 11})["params"]
    assert growth_is_over(net, groups, settings(max_params=min(one, other) - 1), [])
    assert not growth_is_over(net, groups, settings(max_params=min(one, other)), [])
    assert fits(groups, {"0": 10, "2": 4}, settings(max_params=now, max_width=10))
    net, groups = mlp(3, 10, 10, 2)
    assert growth_is_over(net, groups, settings(max_width=10), [])
    assert not growth_is_over(net, groups, settings(max_width=11), [])


# ---- the optimizer's state


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_state_of_old_units_is_carried_bit_for_bit_and_that_of_new_ones_is_blank(base):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()]
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(96, 5), nn.ReLU(), nn.Linear(5, 2))
    groups = find_groups(net, torch.zeros(1, 1, 6, 6))
    params = param_groups(net, groups)
    optimizer = SplitLBI(params, lr=0.02, nu=5.0, path_scale=60.0, base=base)
    for _ in range(6):
        optimizer.zero_grad()
        net(torch.randn(8, 1, 6, 6)).square().sum().backward()
        optimizer.step()
    before = optimizer.state_dict()
    add = {groups[0].name: 3, groups[1].name: 2}
    big = widen_groups(net, groups, add)
    names = optimizer_names(net, params)
    shapes = {name: p.shape for name, p in big.named_parameters()}
    after = grow_optimizer(before, names, shapes, add)
    more = {group["name"]: add.get(group["name"], 0) for group in before["param_groups"]}
    per_unit = 0
    for old, new in zip(before["param_groups"], after["param_groups"], strict=True):
        changed = {key for key in old if old[key] != new[key]}
        assert changed == ({"units"} if more[old["name"]] else set())
        for key in old["params"]:
            assert before["state"][key].keys() == after["state"][key].keys()
            for entry, value in before["state"][key].items():
                result = after["state"][key][entry]
                assert result.dtype == value.dtype
                if value.ndim == 0:
                    assert torch.equal(result, value)
                    continue
                kept = tuple(slice(n) for n in value.shape)
                assert torch.equal(result[kept], value), (names[key], entry)
                rest = result.clone()
                if entry in ("norm", "entered", "left", "threshold"):
                    per_unit += 1
                    blank = {"norm": 0.0, "threshold": value.double().mean().item()}.get(entry, -1)
                    assert rest[len(value) :].tolist() == pytest.approx([blank] * more[old["name"]])
                else:
                    assert result.shape == shapes[names[key]]
                    rest[kept] = 0
                    assert not rest.any()
    assert per_unit == 4 * len(groups)
    loaded = SplitLBI(param_groups(big, regroup(groups, big)), lr=0.05, base=base, lam_scale="none")
    loaded.load_state_dict(after)
    paths = [SparsePath.from_optimizer(*pair) for pair in ((optimizer, groups), (loaded, regroup(groups, big)))]
    for name, inside in paths[0].support.items():
        assert inside.any() and paths[1].support[name].tolist() == inside.tolist() + [False] * more[name]


def test_the_first_step_after_growth_moves_old_units_as_if_nothing_had_happened(tmp_path):
    """Nobody listens to the new units yet, so no gradient of an old entry knows of them."""
    log = {"logging_steps": 1, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 1}
    run = growing_run.plain_trainer(tmp_path / "grow", max_steps=20, path_share=0.2, **log)
    run.train()
    first = grew(by_round(run.history)[0])
    assert first
    full = sum(p.numel() for p in trainer_run.model().parameters())
    same = growing_run.plain_trainer(tmp_path / "same", max_steps=20, path_share=0.2, max_params=full, **log)
    same.train()
    assert same.history == []
    step = run.history[0]["step"] + 1
    a, b = (load_file(tmp_path / name / f"checkpoint-{step}" / "model.safetensors") for name in ("grow", "same"))
    for name, tensor in b.items():
        assert torch.allclose(a[name][tuple(slice(n) for n in tensor.shape)], tensor, atol=1e-12), name
    before = load_file(tmp_path / "grow" / f"checkpoint-{step - 1}" / "grown" / "model.safetensors")
    assert all(not torch.equal(a[name], before[name]) for name in a if a[name].shape != b[name].shape)
    logs = [{e["step"]: e["loss"] for e in r.state.log_history if "loss" in e} for r in (run, same)]
    assert all(logs[0][k] == pytest.approx(logs[1][k], abs=1e-9) for k in range(1, step + 1))


# ---- a run


def test_a_run_grows_and_says_so_in_its_history(grown):
    history = grown.history
    names = [group.name for group in grown.groups]
    assert [rows[0]["step"] for rows in by_round(history)] == list(ROUNDS)
    assert all([row["group"] for row in rows] == names for rows in by_round(history))
    sizes = {row["group"]: row["from"] for row in history if row["round"] == 1}
    seed = tiny_run.model()
    assert sizes == {group.name: group.units for group in find_groups(seed, torch.zeros(1, 1, 16, 16))}
    for row in history:
        assert row["from"] == sizes[row["group"]] <= row["to"]
        sizes[row["group"]] = row["to"]
    assert sizes == {group.name: group.units for group in grown.groups}
    assert all(row["to"] in (row["from"], max(row["from"] + 4, int(1.5 * row["from"]))) for row in history)
    x = torch.zeros(1, 1, 16, 16)
    assert recount(grown.model, x) == {key: history[-1][key] for key in ("macs", "params")}
    # the training cost by brute force: 8 rows a step through the net there was
    cost, macs = 0, recount(seed, x)["macs"]
    rounds = {rows[0]["step"]: rows[0] for rows in by_round(history)}
    for step in range(1, 33):
        cost += 3 * 8 * macs
        if step in rounds:
            assert rounds[step]["training_macs"] == cost
            macs = rounds[step]["macs"]
    assert grown.growth_curve[-1]["training_macs"] == cost and grown.growth_curve[-1]["step"] == 32
    assert [point["step"] for point in grown.growth_curve] == [4, 6, 8, 12, 13, 16, 19, 20, 24, 28, 32]


def test_support_and_metrics_in_the_history_are_those_of_the_log_at_that_step(grown):
    for row in grown.history:
        loss = next(e for e in grown.state.log_history if e["step"] == row["step"] and "loss" in e)
        found = next(e for e in grown.state.log_history if e["step"] == row["step"] and "eval_loss" in e)
        assert row["support"] == loss[f"support/{row['group']}"]
        assert row["loss"] == found["eval_loss"] and row["sparse_accuracy"] == found["eval_sparse_accuracy"]


def test_schedule_epochs_and_log_go_on_as_if_nothing_had_happened(grown):
    logged = [entry for entry in grown.state.log_history if "learning_rate" in entry]
    assert [entry["step"] for entry in logged] == [4, 6, 8, 12, 13, 16, 19, 20, 24, 28, 32]
    for entry in logged:
        assert entry["learning_rate"] == pytest.approx(0.1 * (1 - (entry["step"] - 1) / 32))
        assert entry["epoch"] == pytest.approx(entry["step"] / 8)
    for group in grown.optimizer.param_groups:
        assert group["nu"] == 5.0
        assert group["path_scale"] == pytest.approx(2.5 * 5 / sum(0.1 * (1 - k / 32) for k in range(6)), rel=1e-6)
    assert grown.args.path_share == pytest.approx(0.2)
    summaries = [entry for entry in grown.state.log_history if "train_loss" in entry]
    assert len(summaries) == 1 and summaries[0]["step"] == 32
    weights = {6: 2, 4: 4, 8: 2, 12: 4, 13: 1, 16: 3, 19: 3, 20: 1, 24: 4, 28: 4, 32: 4}
    mean = sum(weights[e["step"]] * e["loss"] for e in logged) / 32
    assert grown.summary.training_loss == pytest.approx(mean) == summaries[0]["train_loss"]
    assert grown.summary.global_step == 32 and grown.summary.metrics["train_loss"] == grown.summary.training_loss
    rate = grown.summary.metrics["train_steps_per_second"] * grown.summary.metrics["train_runtime"]
    assert rate == pytest.approx(32, rel=0.05)


def test_a_run_in_which_nothing_grows_is_the_ordinary_run_bit_for_bit(tmp_path, monkeypatch):
    """Also its rows come in the same order."""
    seen = []

    def watch(self, pixel_values, labels=None):
        if self.training and labels is not None and torch.is_grad_enabled():  # trials of groups take none
            seen.append(pixel_values.sum().item())
        return forward(self, pixel_values, labels)

    forward = trainer_run.PlainNet.forward
    monkeypatch.setattr(trainer_run.PlainNet, "forward", watch)
    shared = trainer_run.SHARED | {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, "nu": None}
    shared |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    shared |= {"path_length": 1.05, "path_share": 1.0}
    growing = {"growth_rounds": 3, "growth_until": 0.7, "growth_patience": 9, "growth_release": False}
    data = {"train_dataset": trainer_run.images(48, 1), "data_collator": trainer_run.collate}
    runs, batches = [], []
    for trainer, args in (
        (SplitLBITrainer, SplitLBIArguments(str(tmp_path / "plain"), **shared)),
        (GrowingTrainer, GrowingArguments(str(tmp_path / "growing"), **shared, **growing)),
    ):
        run = trainer(trainer_run.model(), args, **data)
        run.train()
        runs.append(run)
        batches.append([*seen])
        seen.clear()
    history = runs[1].history
    assert [rows[0]["step"] for rows in by_round(history)] == [6, 11, 17] and not any(map(grew, by_round(history)))
    assert_same(*map(tiny_run.outcome, runs))
    assert len(batches[0]) == 48 and batches[0] == batches[1]


def test_with_evaluations_by_epoch_each_epoch_has_one_and_every_round_too(tmp_path):
    by_epoch = {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "epoch"}
    rounds = {"growth_rounds": 3, "growth_until": 0.75}  # steps 8, 16, 24: ends of epochs
    run = growing_run.trainer(tmp_path / "ends", **by_epoch, **rounds)
    run.train()
    for key in ("loss", "eval_loss"):
        assert [e["step"] for e in run.state.log_history if key in e] == [8, 16, 24, 32]
    assert [rows[0]["step"] for rows in by_round(run.history)] == [8, 16, 24]
    assert all("loss" in row for row in run.history)
    run = growing_run.trainer(tmp_path / "between", **by_epoch)
    run.train()
    for key in ("loss", "eval_loss"):
        assert [e["step"] for e in run.state.log_history if key in e] == [6, 8, 13, 16, 19, 24, 32]
    assert sorted(int(p.name[11:]) for p in (tmp_path / "between").glob("checkpoint-*")) == [6, 8, 13, 16, 19, 24, 32]


def test_without_evaluations_or_saves_the_history_has_none_and_only_rounds_are_saved(tmp_path):
    run = growing_run.trainer(tmp_path, eval_strategy="no", save_strategy="no")
    run.train()
    assert run.history and not any("loss" in row for row in run.history)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (13, 19, 6)]
    assert plot_growth(run.history, run.growth_curve) is not None


# ---- resume


def test_going_on_from_any_checkpoint_ends_the_same(grown, finished, tmp_path):
    source = Path(grown.args.output_dir)
    for step in (4, 13, 28):
        run = growing_run.trainer(tmp_path / str(step))
        run.train(resume_from_checkpoint=str(source / f"checkpoint-{step}"))
        assert_same(growing_run.outcome(run), finished, f"from {step}")
    run = growing_run.trainer(tmp_path / "again", restore_callback_states_from_checkpoint=True, eval_on_start=True)
    run.train(resume_from_checkpoint=str(source / "checkpoint-6" / "grown"))
    assert_same(growing_run.outcome(run), finished)


def test_a_grown_checkpoint_of_another_run_that_passed_here_is_not_taken(grown, finished, tmp_path):
    source = Path(grown.args.output_dir) / "checkpoint-6"
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "grown")
    shutil.copytree(Path(grown.args.output_dir) / "checkpoint-13" / "grown", folder / "grown")
    assert grown_folder(folder) is None and grown_folder(source) == source / "grown"
    run = growing_run.trainer(tmp_path)
    run.train(resume_from_checkpoint=str(folder))
    assert_same(growing_run.outcome(run), finished)
    assert grown_folder(folder) == folder / "grown"


def test_resuming_the_grown_model_itself_or_the_last_checkpoint_works_and_another_seed_is_refused(grown, tmp_path):
    source = Path(grown.args.output_dir)
    net = AutoModelForImageClassification.from_pretrained(source / "checkpoint-28")
    run = growing_run.trainer(tmp_path, net)
    run.train(resume_from_checkpoint=str(source / "checkpoint-28"))
    assert widths(run) == widths(grown)
    config = tiny_run.model().config
    config.hidden_sizes = [4, 12]
    run = growing_run.trainer(tmp_path, type(tiny_run.model())(config))
    with pytest.raises(ValueError, match="grew from another seed: its groups began with .* Resume with the model"):
        run.train(resume_from_checkpoint=str(source / "checkpoint-28"))
    run = growing_run.trainer(tmp_path, type(tiny_run.model())(config))
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(source / "checkpoint-6", folder, ignore=shutil.ignore_patterns("grown"))
    with pytest.raises(ValueError, match="is of another model: group .* has 8 units there and 12 here"):
        run.train(resume_from_checkpoint=str(folder))
    assert not (folder / "grown").exists()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    run = tiny_run.trainer(str(tmp_path), max_steps=4)
    run.train()
    with pytest.raises(ValueError, match="no growth history: it is a checkpoint of another trainer"):
        growing_run.trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("where", ["save_path", "save_weights", "widen_groups"])
def test_growth_that_fails_leaves_the_checkpoint_as_it_was_and_loadable(grown, finished, tmp_path, monkeypatch, where):
    folder = tmp_path / "checkpoint-13"
    shutil.copytree(Path(grown.args.output_dir) / folder.name, folder, ignore=shutil.ignore_patterns("grown"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(grow_checkpoint, where, fail)
    with pytest.raises(OSError, match="no space left"):
        net = AutoModelForImageClassification.from_pretrained(folder)  # already as wide as the checkpoint
        growing_run.trainer(tmp_path, net).train(resume_from_checkpoint=str(folder))
    assert not (folder / "grown").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    if where == "save_path":
        monkeypatch.undo()
        run = growing_run.trainer(tmp_path)
        run.train(resume_from_checkpoint=True)
        assert_same(growing_run.outcome(run), finished)


def test_a_checkpoint_without_optimizer_or_weights_cannot_grow(grown, tmp_path):
    for name in ("optimizer.pt", "model.safetensors"):
        folder = tmp_path / name / "checkpoint-6"
        ignore = shutil.ignore_patterns("grown", name)
        shutil.copytree(Path(grown.args.output_dir) / "checkpoint-6", folder, ignore=ignore)
        with pytest.raises(FileNotFoundError, match=f"has no {name}, so it cannot be grown"):
            growing_run.trainer(tmp_path / name).train(resume_from_checkpoint=str(folder))


def test_a_run_killed_at_every_point_of_a_growth_step_and_resumed_equals_an_uninterrupted_one(tmp_path):
    whole = growing_run.trainer(tmp_path / "whole", **growing_run.USUAL)
    whole.train()
    flags = []
    for point in growing_run.POINTS:
        run = Script("growing_run.py", tmp_path, *flags, "--pause", point)
        run.wait_for((tmp_path / "paused").exists)
        assert run.kill()
        (tmp_path / "paused").unlink()
        folder = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        there = {path.name for path in folder.iterdir() if path.is_dir()}
        # killed right after a rename at step 6, the next run has gone on from there to step 13
        assert there == {"before": set(), "renamed": {"grown"}}.get(point, {".grown"}), point
        flags = ["--resume"]
    os.mkfifo(tmp_path / "final.pt")  # which nobody reads, so no run ends before it is killed
    for step in (13, 20):
        run = Script("growing_run.py", tmp_path, "--resume")
        run.wait_for((tmp_path / f"checkpoint-{step}" / "model.safetensors").exists)
        time.sleep(delay := random.SystemRandom().uniform(0, 0.1))
        print(f"killed {delay:.3f} s after checkpoint-{step} was begun")
        assert run.kill()
        assert step == 20 or not (tmp_path / "checkpoint-32").exists()
    (tmp_path / "final.pt").unlink()
    Script("growing_run.py", tmp_path, "--resume").finish()
    assert_same(torch.load(tmp_path / "final.pt", weights_only=True), growing_run.outcome(whole))


# ---- bounds


def test_bounds_are_kept_and_a_full_net_trains_on_without_stopping(tmp_path):
    stages = []

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            stages.append(state.global_step)

    network = find_groups(tiny_run.model(), torch.zeros(1, 1, 16, 16))[0].network
    for name, bound in (("max_macs", 2 * network.count()["macs"]), ("max_params", 2 * network.count()["params"])):
        stages.clear()
        run = growing_run.trainer(tmp_path / name, eval_strategy="no", save_strategy="no", **{name: bound})
        run.add_callback(Count())
        run.train()
        assert 0.6 * bound < run.history[-1][name.removeprefix("max_")] <= bound
    run = growing_run.trainer(tmp_path / "width", eval_strategy="no", save_strategy="no", max_width=8)
    stages.clear()
    run.add_callback(Count())
    run.train()
    assert set(widths(run).values()) == {8} and stages == [0, 6] and len(by_round(run.history)) == 1
    quiet = {"save_strategy": "no", "eval_strategy": "no", "growth_threshold": 1.0}
    full = growing_run.trainer(tmp_path / "full", **quiet, max_params=network.count()["params"])
    full.train()
    assert full.history == [] and not list((tmp_path / "full").glob("checkpoint-*"))


@pytest.mark.parametrize("patience", [1, 9])
def test_the_ridge_is_released_after_the_last_round_and_the_path_goes_on_at_its_speed(tmp_path, patience):
    """The last round is the last of the schedule, or the one after which none can bring anything."""
    run = growing_run.plain_trainer(
        tmp_path, growth_release=True, growth_patience=patience, growth_threshold=1.0, **QUIET
    )
    run.train()
    rounds = [rows[0]["step"] for rows in by_round(run.history)]
    assert len(rounds) == (1 if patience == 1 else 3) and not any(map(grew, by_round(run.history)))

    def hyper(folder):
        saved = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"][0]
        return saved["nu"], saved["path_scale"], saved["weight_decay"]

    nu, path_scale, decay = hyper(tmp_path / f"checkpoint-{rounds[-1]}")
    assert decay == 0 and run.args.weight_decay == 0.01
    assert nu == pytest.approx(run.args.split_lbi_kwargs(run.state.max_steps)["nu"])
    for folder in (f"checkpoint-{rounds[-1]}/grown", f"checkpoint-{run.state.max_steps}"):
        assert hyper(tmp_path / folder) == pytest.approx((RELEASE * nu, RELEASE * path_scale, 0.01))
    # ||W - Gamma||^2 / (2 nu) is what the ridge weighs
    coupling = {entry["step"]: entry["coupling"] for entry in run.state.log_history if "coupling" in entry}
    assert coupling[rounds[-1] + 1] < 1e-4 * coupling[rounds[-1]]
    parts = [load_file(tmp_path / f"checkpoint-{rounds[-1] + i}" / "sparse_path.safetensors") for i in (0, 1, 2)]
    [name] = [key for key in parts[0] if key == "hidden|dual"]
    slow, fast = parts[1][name] - parts[0][name], parts[2][name] - parts[1][name]
    assert (fast / slow).median() == pytest.approx(1, abs=0.2)


def test_a_net_that_begins_anew_has_new_weights_a_blank_optimizer_and_the_whole_schedule(tmp_path):
    changes = {"save_strategy": "no", "eval_strategy": "no", "logging_steps": 1}
    run = growing_run.trainer(tmp_path, **growing_run.USUAL, **changes, growth_restart=True)
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.1 * (1 - k / 32) for k in range(19)] + [0.1 * (1 - k / 13) for k in range(13)])
    assert {row["step"] for row in run.history if row.get("restarted")} == {19}
    entered = torch.cat([units["entered"] for units in run.path.units.values()])
    assert ((entered < 0) | (entered > 19)).all() and (entered > 0).any()
    before, after = (tmp_path / "checkpoint-19" / name for name in ("", "grown"))
    trained, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    for name, tensor in trained.items():
        assert tensor.ndim < 2 or (new[name][tuple(slice(n) for n in tensor.shape)] != tensor).all(), name
    state = torch.load(after / "optimizer.pt", weights_only=True)["state"].values()
    assert not any("momentum_buffer" in entry for entry in state)
    assert not any(entry["dual"].any() for entry in state if "dual" in entry)


def test_a_seed_without_room_is_released_at_the_first_round(tmp_path):
    full = find_groups(tiny_run.model(), torch.zeros(1, 1, 16, 16))[0].network.count()["params"]
    run = growing_run.trainer(tmp_path, growth_release=True, growth_threshold=1.0, max_params=full, eval_strategy="no")
    run.train()
    assert len(by_round(run.history)) == 1 and not grew(run.history) and run.optimizer.param_groups[0]["nu"] > 1e6


@pytest.mark.parametrize("name,size", [("max_macs", 20752), ("max_params", 1470), ("max_width", 8)])
def test_a_bound_below_the_size_of_the_seed_is_refused(tmp_path, name, size):
    counts = recount(tiny_run.model(), torch.zeros(1, 1, 16, 16)) | {"width": 8}
    assert size in counts.values()
    with pytest.raises(ValueError, match=f"{name}={size - 1} is below the size of the seed, which has {size}"):
        growing_run.trainer(tmp_path, **{name: size - 1}).train()


def test_after_rounds_without_growth_there_are_no_more(tmp_path):
    run = growing_run.plain_trainer(tmp_path / "a", growth_rounds=5, **QUIET)
    run.train()
    steps = run.args.growth_steps(48)
    assert [rows[0]["step"] for rows in by_round(run.history)] == steps[:2]
    assert not any(grew(rows) for rows in by_round(run.history))
    # a checkpoint at what would have been a later round: nothing is made up for
    again = growing_run.plain_trainer(tmp_path / "b", growth_rounds=5, **QUIET)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{steps[2]}"))
    assert_same(growing_run.outcome(again), growing_run.outcome(run))


# ---- other trainings


def noisy(rows):
    batch = default_data_collator(rows)
    return batch | {"pixel_values": batch["pixel_values"] + torch.randn(batch["pixel_values"].shape)}


OTHERS = [{"base": "adamw"}, {"preset": "paper"}, {"bf16": True}, {"widths": "free"}]
OTHERS += [{"growth_init": "gradmax", "growth_batch": 16}, {"growth_init": "split"}, {"growth_init": "fresh"}]
OTHERS += [{"gradient_accumulation_steps": 2}, {"growth_restart": True}]
OTHERS += [{"growth_restart": True, "growth_init": "fresh-rows", "base": "adamw", "widths": "free"}]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_other_settings_grow_and_go_on_from_the_middle_bit_for_bit(tmp_path, changes):
    shared = {"max_steps": 10, "eval_strategy": "no", "growth_rounds": 1, "growth_threshold": 0.5, **changes}
    if "preset" in changes:
        shared["lam"] = 0.01
    if "base" in changes:
        shared |= {"path_length": 8.0, "learning_rate": 0.003}
    run = growing_run.trainer(tmp_path / "a", **shared)
    if "growth_batch" in changes:
        run.data_collator = noisy  # rows augmented at random
    run.train()
    assert any(grew(rows) for rows in by_round(run.history))
    middle = run.history[0]["step"]
    folder = tmp_path / "b" / f"checkpoint-{middle}"
    shutil.copytree(tmp_path / "a" / folder.name, folder, ignore=shutil.ignore_patterns("grown"))
    again = growing_run.trainer(tmp_path / "b", **shared)
    again.data_collator = run.data_collator
    again.train(resume_from_checkpoint=True)
    assert_same(growing_run.outcome(again), growing_run.outcome(run))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    run.save_model(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    x = torch.randn(3, 1, 16, 16)
    net = run.slim(keep=1.0, latency_batch=0).eval()
    assert torch.equal(loaded(x).logits, net(x).logits)


def test_a_model_from_model_init_begins_as_the_seed_at_every_training(tmp_path):
    args = GrowingArguments(str(tmp_path), **{**growing_run.SHARED, "eval_strategy": "no", "num_train_epochs": 2})
    run = GrowingTrainer(model_init=tiny_run.model, args=args, train_dataset=tiny_run.images(64, 1))
    ends = []
    for _ in range(2):
        run.train()
        assert run.history[0]["from"] == 4 and grew(run.history)
        ends.append(growing_run.outcome(run))
    assert_same(*ends)


def test_a_plain_module_grows_too(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))

        def forward(self, x, labels=None):
            return with_loss(self.body(x), labels)

    torch.manual_seed(0)
    rows = [{"x": x, "labels": int(x[:3].argmax())} for x in torch.randn(64, 6)]
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 24, "learning_rate": 0.2}
    args = GrowingArguments(str(tmp_path), growth_rounds=2, growth_threshold=0.5, **quiet)
    run = GrowingTrainer(Net(), args, train_dataset=rows)
    run.train()
    assert run.model.body[0].out_features == run.groups[0].units > 4
    # a group of which only the outgoing weights are lifted: those of its new units begin at zero
    net = Net()
    [group] = find_groups(net, {"x": torch.zeros(1, 6)})
    outgoing = replace(group, lifted=("body.2.weight",), tensors={"body.2.weight": net.body[2].weight})
    run = GrowingTrainer(net, args, train_dataset=rows, groups=[outgoing])
    run.train()
    assert run.groups[0].units > 4 and run.path.units[group.name]["threshold"].min() > 0


def test_whoever_ends_the_training_at_a_round_ends_it(tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 13
            return control

    run = growing_run.trainer(tmp_path)
    run.add_callback(Stop())
    run.train()
    assert run.state.global_step == 13 and [rows[0]["step"] for rows in by_round(run.history)] == [6]


def test_the_model_passed_in_stays_the_seed(tmp_path):
    net = tiny_run.model()
    before = {name: tuple(p.shape) for name, p in net.named_parameters()}
    run = growing_run.trainer(tmp_path, net, max_steps=10, growth_rounds=1, growth_until=0.6)
    run.train()
    assert grew(run.history) and {name: tuple(p.shape) for name, p in net.named_parameters()} == before


# ---- refusals


def test_the_callback_raises_in_any_other_trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    run = Trainer(tiny_run.model(), args, train_dataset=tiny_run.images(8, 1), callbacks=[GrowthCallback()])
    with pytest.raises(ValueError, match="GrowingTrainer carries out.* Use GrowingTrainer with GrowingArguments"):
        run.train()
    other = tiny_run.trainer(str(tmp_path), max_steps=1)
    used = growing_run.trainer(tmp_path / "used", max_steps=4, growth_rounds=1)
    used.train()
    other.add_callback(used.growth)  # also one that a growing run has had
    with pytest.raises(ValueError, match="GrowingTrainer carries out"):
        other.train()


RANGES = {"growth_add": (1.5,), "growth_patience": (True,), "growth_batch": (-1,), "growth_until": (0.0,)}
RANGES |= {"growth_threshold": (1.1,), "growth_ratio": (0.9, float("nan")), "path_share": (1.5,)}
RANGES |= {"max_macs": (0,), "max_params": (-5,), "max_width": (-1,)}


@pytest.mark.parametrize(
    "changes,message",
    [
        *(({name: value}, f"{name}={value}") for name, values in RANGES.items() for value in values),
        ({"growth_rounds": 0}, "growth_rounds=0: it must be a whole number, at least 1"),
        ({"growth_until": 1.0}, "growth_until=1.0: .* not trained any more"),
        ({"growth_threshold": 0.0}, "growth_threshold=0.0: .* in \\(0, 1\\]"),
        ({"growth_init": "zeros"}, "growth_init='zeros': it must be one of"),
        ({"widths": "any"}, "widths='any'"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed flattens"),
        ({"fsdp": True}, "growing cannot work with fsdp=True: .* use DDP"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True: the best checkpoint may be of a smaller net"),
        ({"save_only_model": True}, "save_only_model=True: growth reads the optimizer state"),
        ({"save_on_each_node": True}, "save_on_each_node=True: .* shared"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True: .* begin it anew"),
        ({"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "epoch"}, "save_strategy='best'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        GrowingArguments(str(tmp_path), **{"use_cpu": True, **changes})


def test_other_arguments_searches_and_short_runs_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be GrowingArguments, not SplitLBIArguments"):
        GrowingTrainer(tiny_run.model(), SplitLBIArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="hyperparameter search cannot go through the stages"):
        growing_run.trainer(tmp_path).train(trial={})
    with pytest.raises(ValueError, match="growth_rounds=3 do not fit into growth_until=0.6 of a run of 3 steps"):
        growing_run.trainer(tmp_path, max_steps=3).train()

    class Stream(IterableDataset):
        def __iter__(self):
            yield from tiny_run.images(64, 1)

    args = GrowingArguments(str(tmp_path), **{**growing_run.SHARED, "growth_init": "gradmax", "max_steps": 8})
    run = GrowingTrainer(tiny_run.model(), args, train_dataset=Stream(), eval_dataset=tiny_run.images(8, 1))
    with pytest.raises(ValueError, match="growth_init='gradmax' looks at some training rows, and a stream has none"):
        run.train()


# ---- cost, table, picture, card


def test_rows_seen_count_the_smaller_last_batch_of_an_epoch(tmp_path):
    args = {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2, "growth_rounds": 1}
    run = growing_run.trainer(tmp_path / "a", **args)  # 64 rows: 9 batches of 7 and one of 1, so 5 steps
    assert [run._rows_seen(step) for step in (0, 1, 4, 5, 6, 10)] == [0, 14, 56, 64, 78, 128]
    dropped = growing_run.trainer(tmp_path / "b", **args, dataloader_drop_last=True)  # 9 batches, so 5 steps
    assert [dropped._rows_seen(step) for step in (1, 4, 5, 6)] == [14, 56, 63, 77]


def test_training_macs_add_up_over_the_nets_that_there_were():
    history = [
        {"round": 1, "step": 10, "macs": 200, "training_macs": 3 * 100 * 40},
        {"round": 2, "step": 20, "macs": 300, "training_macs": 3 * (100 * 40 + 200 * 40)},
    ]
    for step, macs in ((0, 0), (5, 2000), (10, 4000), (15, 4000 + 4000), (25, 4000 + 8000 + 6000)):
        assert training_macs(history, step, 100, lambda steps: 4 * steps) == 3 * macs
    log = [{"step": 5, "loss": 1.0}, {"step": 5, "eval_loss": 0.5, "eval_runtime": 3.0}]
    log += [{"step": 25, "eval_accuracy": 1}]
    assert growth_curve(history, log, 100, lambda steps: 4 * steps) == [
        {"step": 5, "training_macs": 6000, "loss": 0.5},
        {"step": 25, "training_macs": 54000, "accuracy": 1},
    ]


def test_the_picture_shows_widths_and_accuracy_against_cost_beside_the_dense_net(grown):
    dense = [{"training_macs": 1e6, "sparse_accuracy": 0.5}, {"training_macs": 1e8, "sparse_accuracy": 0.9}]
    figure = plot_growth(grown.history, grown.growth_curve, dense)
    left, right = figure.axes
    drawn, marks = ([line for line in left.lines if (line.get_ls() == ":") == dotted] for dotted in (False, True))
    assert {tuple(line.get_ydata()) for line in drawn} == {(4, 8, 12, 12, 12), (8, 12, 18, 27, 27)}
    assert {line.get_xdata()[0] for line in marks} == {6, 13, 19}  # something grew in every round
    ours, theirs = (line for line in right.lines if line.get_ls() != ":")
    assert list(ours.get_xdata()) == [point["training_macs"] / 1e6 for point in grown.growth_curve]
    assert list(ours.get_ydata()) == [point["sparse_accuracy"] for point in grown.growth_curve]
    assert list(theirs.get_xdata()) == [1, 100] and " MMACs " in right.get_xlabel()
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in (left, right))
    assert len(plot_growth(grown.history).axes[1].lines[0].get_xdata()) == 3
    with pytest.raises(ValueError, match="history is empty"):
        plot_growth([])


def test_the_grown_model_has_a_card_a_path_slim_models_and_a_stock_config(grown, tmp_path):
    grown.dense_curve = [{"training_macs": 1e8, "sparse_accuracy": 0.9}]
    grown.create_model_card()
    out = Path(grown.args.output_dir)
    card = (out / "README.md").read_text()
    lines, _ = growth_table(grown.history)
    assert len(lines) == 3
    for text in ("## Growth", "(growth.png)", "4 → 8 (100%)", "18 → 27 (100%)", "| growth_threshold | 0.8 |"):
        assert text in card, text
    assert (out / "growth.png").read_bytes().startswith(b"\x89PNG")
    plain = tiny_run.trainer(str(tmp_path / "plain"), max_steps=2)
    plain.train()
    plain.create_model_card()
    assert "growing" not in (tmp_path / "plain" / "README.md").read_text().lower()
    small = grown.slim(macs=0.5, latency_batch=0)
    assert small.config.effdl_report["macs"]["ratio"] <= 0.5
    assert "## Growth" in (grown.save_slim(small, tmp_path / "small") / "README.md").read_text()
    path = grown.path
    assert path.step == 32 and {n: len(u["entered"]) for n, u in path.units.items()} == {
        group.name: group.units for group in grown.groups
    }
    entered = path.units[grown.groups[0].name]["entered"]
    assert ((entered[:4] <= 6) & (entered[:4] > 0)).all() and (entered[4:] > 6).all()
    grown.save_model(tmp_path / "grown")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "grown")
    assert loaded.config.hidden_sizes == [12, 27] and getattr(loaded.config, "quantization_config", None) is None
    whole = slim(grown.model, grown.groups, 1.0)
    assert_same(dict(whole.state_dict()), dict(grown.model.state_dict()))


# ---- two processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What an uninterrupted run of two processes left."""
    folder = tmp_path_factory.mktemp("pair")
    Script("growing_run.py", folder, "--ddp", "whole", processes=2).finish()
    return [torch.load(folder / f"whole-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_grow_alike_and_as_one(pair, tmp_path):
    run = growing_run.plain_trainer(tmp_path, **growing_run.USUAL)
    run.train()
    assert sum(map(bool, map(grew, by_round(run.history)))) >= 2
    alone = growing_run.outcome(run)
    for key in ("model", "optimizer", "path", "history"):
        assert_same(pair[0][key], pair[1][key], key)
    assert_close(pair[0], alone)
