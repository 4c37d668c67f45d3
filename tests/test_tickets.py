"""Tickets: when a selection has settled, what a run leaves behind, and the networks that start again from it."""

import logging
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ticket_run
import tiny_run
import torch
from forked import Script
from hub import LoopbackHub
from models import NETS, build, convnext, lenet, logits, mobilenet, randomise_norms, recount, resnet, vgg
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_effdl import (
    EarlyTicketCallback,
    SparsePath,
    SplitLBI,
    SplitLBIArguments,
    SplitLBICallback,
    SplitLBITrainer,
    Ticket,
    find_groups,
    find_ticket,
    param_groups,
    rewind,
    slim,
    transfer,
)
from hf_effdl.structure.groups.ties import config_ties
from hf_effdl.structure.optim.split_lbi import unwrap
from hf_effdl.structure.path.settling import Settling, pack, unpack
from hf_effdl.structure.tickets.files import state_digest


TESTS = Path(__file__).parent / "support"
SCRIPT = TESTS / "ticket_run.py"
QUIET = {"eval_strategy": "no", "save_strategy": "no"}
FILES = {"README.md", "ticket.json", "ticket.safetensors"}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_same_ticket(a: Ticket, b: Ticket) -> None:
    """Equal bit for bit."""
    assert (a.step, a.settled, a.distances, a.init) == (b.step, b.settled, b.distances, b.init)
    assert [group.to_dict() for group in a.groups] == [group.to_dict() for group in b.groups]
    assert_same_state(a.kept, b.kept)
    assert a.weights.keys() == b.weights.keys()
    for step in a.weights:
        assert_same_state(a.weights[step], b.weights[step])


def made_up(net: nn.Module, x: torch.Tensor, seed: int = 1, **values) -> Ticket:
    """A ticket of about half of the units, drawn at random, that has the net's weights as those of step 0 and 7."""
    groups, generator = find_groups(net, x), torch.Generator().manual_seed(seed)
    kept = {
        group.name: torch.randperm(group.units, generator=generator)[: max(1, group.units // 2)].sort().values
        for group in groups
    }
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    shifted = {name: tensor + 1 for name, tensor in state.items()}
    init = {"sha256": state_digest(state), "class": type(net).__name__, "source": None, "seed": 0}
    return Ticket(groups, kept, 7, init=init, **{"weights": {0: state, 7: shifted}, **values})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The ticket of an uninterrupted search."""
    return ticket_run.search(tmp_path_factory.mktemp("search"))


# ---- when it has settled


def brute_force(masks, paths, threshold, window, patience, min_path):
    """The first look at which the selections have settled, from the definition."""

    def may_change(look):
        since = min([k for k in range(look + 1) if paths[k] >= paths[look] / 2] + [look - window + 1])
        if since < 0 or not all(mask.any() for mask in masks[since : look + 1]):
            return 2.0
        furthest = max((masks[look] != masks[k]).float().mean().item() for k in range(since, look))
        return 2 * furthest * max(0, 1 - paths[look]) / (paths[look] - paths[since])

    for look in range(patience - 1, len(masks)):
        if paths[look] >= min_path and all(may_change(k) < threshold for k in range(look - patience + 1, look + 1)):
            return look
    return None


def test_settled_is_what_the_definition_says_on_random_sequences_of_selections():
    draw = random.Random(0)
    found = []
    for trial in range(300):
        torch.manual_seed(trial)
        rate = draw.choice([0.0, 0.02, 0.1])
        masks = [torch.rand(40) < draw.choice([0.0, 0.5])]
        for _ in range(14):
            flips = torch.rand(40) < rate * draw.choice([0, 1])
            masks.append(masks[-1] ^ flips)
        paths = [0.07 * (k + 1) for k in range(15)]
        options = {
            "threshold": draw.choice([0.03, 0.2]),
            "window": draw.choice([2, 3, 5]),
            "patience": draw.choice([1, 2, 4]),
            "min_path": draw.choice([0.0, 0.45]),
        }
        settling = Settling(**options)
        said = [settling.note(k, paths[k], pack(mask)) for k, mask in enumerate(masks)]
        expected = brute_force(masks, paths, **options)
        assert (said.index(True) if True in said else None) == expected, options
        assert torch.equal(settling.selection, masks[-1])
        found.append(expected)
    assert None in found and len(set(found)) > 6


@pytest.mark.parametrize("looks", [20, 80, 1000])
def test_a_steady_drift_settles_near_the_end_of_the_path_however_often_one_looks(looks):
    """Units enter at an even pace: 1 - t of them are ahead at path time t, and twice as many are reckoned with."""
    settling, enters = Settling(0.1, 3, 1, 0.4), torch.arange(1000) / 1000
    times = [(k + 1) / looks for k in range(looks)]
    said = [settling.note(k, time, pack(enters < time)) for k, time in enumerate(times)]
    assert said.index(True) == next(k for k, time in enumerate(times) if 2 * (1 - time) < 0.1 - 1e-9)


def test_a_selection_survives_packing_whatever_its_length():
    for units in range(1, 30):
        mask = torch.rand(units, generator=torch.Generator().manual_seed(units)) < 0.5
        assert unpack(pack(mask)).tolist() == mask.tolist()


class Watch(TrainerCallback):
    """What a run selects at every step, and its path time, by other means than the callback's."""

    def __init__(self, groups, budget):
        self.groups, self.budget, self.masks, self.rates, self.weights = groups, budget, [], [], []

    def on_optimizer_step(self, args, state, control, **kwargs):
        group = kwargs["optimizer"].param_groups[0]
        self.rates.append(group["lr"])
        self.hyper = group
        self.weights.append({name: tensor.clone() for name, tensor in kwargs["model"].state_dict().items()})

    def on_step_end(self, args, state, control, **kwargs):
        ties = config_ties(kwargs["model"], self.groups) if self.budget else ()
        path = SparsePath.from_optimizer(kwargs["optimizer"], self.groups, ties)
        if self.budget:
            kept = path.select(**self.budget)
            inside = {g.name: torch.zeros(g.units).index_fill(0, kept[g.name], 1).bool() for g in self.groups}
        else:
            inside = {name: support.clone() for name, support in path.support.items()}
            for name, support in inside.items():  # a group that no unit has entered keeps its best one
                if not support.any() and any(other.any() for other in path.support.values()):
                    support[path.scores()[name].argmax()] = True
        self.masks.append(torch.cat([inside[group.name] for group in self.groups]))


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"keep": 0.5}, {}])
def test_the_run_stops_by_itself_where_the_definition_says_with_the_units_selected_there(tmp_path, budget):
    run = tiny_run.trainer(str(tmp_path), **QUIET)
    watch = Watch(run.groups, budget)
    run.add_callback(watch)
    ticket = find_ticket(run, within=0.8, every=1, threshold=0.06, patience=3, **budget)
    total = 2.5 * watch.hyper["lam"] * watch.hyper["nu"] / watch.hyper["path_scale"]
    paths = [sum(watch.rates[: k + 1]) / total for k in range(len(watch.rates))]
    expected = brute_force(watch.masks, paths, 0.06, 3, 3, 0.4)
    assert ticket.step == run.state.global_step == expected + 1 and ticket.settled
    kept = torch.cat([torch.zeros(g.units).index_fill(0, ticket.kept[g.name], 1).bool() for g in ticket.groups])
    assert torch.equal(kept, watch.masks[expected])
    assert [row["step"] for row in ticket.distances] == list(range(1, ticket.step + 1))
    assert [row["path"] for row in ticket.distances] == pytest.approx(paths)
    changes = [(a != b).float().mean().item() for a, b in zip(watch.masks, watch.masks[1:], strict=False)]
    assert [row["change"] for row in ticket.distances][1:] == pytest.approx(changes)
    assert_same_state(ticket.weights[0], tiny_run.model().state_dict())
    assert_same_state(ticket.weights[ticket.step], watch.weights[-1])
    assert not any(isinstance(c, EarlyTicketCallback) for c in run.callback_handler.callbacks)


def test_the_whole_path_lies_in_the_first_share_of_the_run_and_the_learning_rates_stay(tmp_path):
    run = tiny_run.trainer(str(tmp_path), **QUIET, num_train_epochs=20)
    watch = Watch(run.groups, {})
    run.add_callback(watch)
    ticket = find_ticket(run, macs=0.5, within=0.25)
    rates = [0.1 * (1 - k / 160) for k in range(160)]
    assert run.args.path_share == 0.25 and watch.rates == pytest.approx(rates[: ticket.step])
    assert watch.hyper["path_scale"] == pytest.approx(2.5 * watch.hyper["nu"] / sum(rates[:40]))
    assert ticket.step % 3 == 0 and ticket.step <= 40  # a look every fiftieth of the run
    path = ticket.distances[-1]["path"]
    assert path == pytest.approx(sum(rates[: ticket.step]) / sum(rates[:40])) and 0.4 <= path <= 1
    own = tiny_run.trainer(str(tmp_path), **QUIET, path_share=0.5)
    find_ticket(own, macs=0.5, at_step=2)
    assert own.args.path_share == 0.5


def test_the_bound_comes_first_where_nothing_settles_and_a_warning_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ticket = find_ticket(tiny_run.trainer(str(tmp_path), **QUIET), macs=0.5, patience=40)
    assert (ticket.step, ticket.settled) == (9, False)  # a fifth of 48
    assert "had not settled by step 9 of 48, the bound of within=0.2" in caplog.text
    caplog.clear()
    assert find_ticket(tiny_run.trainer(str(tmp_path), **QUIET, max_steps=4), keep=0.5, within=0.1).step == 1


def test_a_run_that_something_else_ends_leaves_an_unsettled_ticket(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run = tiny_run.trainer(str(tmp_path), **QUIET)
    run.add_callback(Stop())
    with caplog.at_level(logging.WARNING):
        ticket = find_ticket(run, macs=0.5)
    assert (ticket.step, ticket.settled) == (3, False) and "ended at step 3 before" in caplog.text


@pytest.mark.parametrize("where,step", [({"at_step": 5}, 5), ({"at_epoch": 1.5}, 12), ({"at_epoch": 0.3}, 3)])
def test_the_ticket_is_taken_where_it_is_asked_for(tmp_path, where, step, caplog):
    soon = {"every": 1, "threshold": 1, "patience": 1, "min_path": 0.0}  # settled long before
    ticket = find_ticket(tiny_run.trainer(str(tmp_path), **QUIET), macs=0.5, within=0.5, **soon, **where)
    assert ticket.step == step and sorted(ticket.weights) == [0, step]
    assert "settled" not in caplog.text


def test_an_empty_support_is_no_ticket_and_the_error_names_the_budgets(tmp_path):
    with pytest.raises(ValueError, match=r"no unit is in the support at step 1.*macs=, params= or"):
        find_ticket(tiny_run.trainer(str(tmp_path), **QUIET), at_step=1)
    with_budget = find_ticket(tiny_run.trainer(str(tmp_path), **QUIET), at_step=1, params=0.5)
    assert with_budget.report()["params"]["ratio"] <= 0.5


# ---- any Trainer


def test_a_plain_trainer_with_the_optimizer_finds_the_same_ticket(tmp_path):
    options = {"keep": 0.5, "within": 0.5}
    ours = find_ticket(tiny_run.trainer(str(tmp_path), **QUIET), **options)
    settings = SplitLBIArguments(str(tmp_path), **{**tiny_run.SHARED, **QUIET, "path_share": 0.5})
    plain = tiny_run.plain_trainer(str(tmp_path), **QUIET)
    plain.optimizer_cls_and_kwargs[1].update(
        {name: settings.split_lbi_kwargs(48)[name] for name in ("nu", "path_scale")}
    )
    assert_same_ticket(find_ticket(plain, **options), ours)
    net = tiny_run.model()
    params = param_groups(net, find_groups(net, torch.zeros(1, 1, 16, 16)))
    args = TrainingArguments(str(tmp_path), **{**tiny_run.SHARED, **QUIET})
    optimizer = (SplitLBI, settings.split_lbi_kwargs(48) | {"params": params})
    alone = Trainer(net, args, train_dataset=tiny_run.images(64, 1), optimizer_cls_and_kwargs=optimizer)
    alone.add_callback(callback := EarlyTicketCallback(**options))  # which finds the groups itself
    alone.train()
    assert_same_ticket(callback.ticket, ours)
    alone.train()  # begins anew, from the weights as they are
    assert callback.ticket.init["sha256"] != ours.init["sha256"] and callback.ticket.distances[0]["step"] == 1


def test_a_trainer_with_model_init_begins_with_the_weights_that_it_makes(tmp_path):
    args = SplitLBIArguments(str(tmp_path), **{**tiny_run.SHARED, **QUIET})
    run = SplitLBITrainer(args=args, train_dataset=tiny_run.images(64, 1), model_init=tiny_run.model)
    ticket = find_ticket(run, keep=0.5)
    assert_same_state(ticket.weights[0], tiny_run.model().state_dict())
    bare = rewind(tiny_run.model, replace(ticket, weights={})).state_dict()
    assert_same_state(bare, rewind(tiny_run.model, ticket).state_dict())


def test_thresholds_that_are_not_relative_measure_the_path_by_the_schedule(tmp_path):
    run = tiny_run.trainer(str(tmp_path), **QUIET, preset="paper")
    ticket = find_ticket(run, keep=0.5, within=0.5, at_step=6)
    rates = [0.1 * (1 - k / 48) for k in range(24)]
    assert ticket.distances[-1]["path"] == pytest.approx(sum(rates[:6]) / sum(rates))


# ---- resume


def test_every_checkpoint_of_a_search_leads_to_the_same_ticket(found, tmp_path):
    out = tmp_path / "run"
    assert_same_ticket(ticket_run.search(out), found)
    steps = sorted(int(folder.name[11:]) for folder in out.glob("checkpoint-*"))
    for step in (steps[0], steps[-1]):
        for restore in (False, True):
            resumed = ticket_run.search(out, str(out / f"checkpoint-{step}"), restore)
            assert_same_ticket(resumed, found)


def test_a_resumed_search_keeps_the_groups_it_began_with(tmp_path):
    def search(checkpoint=None):
        args = SplitLBIArguments(
            str(tmp_path),
            **{**tiny_run.SHARED, "eval_strategy": "no", "restore_callback_states_from_checkpoint": True},
        )
        net = tiny_run.model()
        groups = find_groups(net, torch.zeros(1, 1, 16, 16), unit="row")[1:]
        run = SplitLBITrainer(net, args, train_dataset=tiny_run.images(64, 1), groups=groups)
        return find_ticket(run, keep=0.5, at_step=7, resume_from_checkpoint=checkpoint)

    first = search()
    assert len(first.groups) == 3 and all(part.role == "row" for g in first.groups for part in g.lifted_slices)
    assert_same_ticket(search(str(tmp_path / "checkpoint-4")), first)


def test_a_search_whose_last_checkpoint_is_the_one_of_its_ticket_is_over_when_resumed(tmp_path):
    first = ticket_run.search(tmp_path, at_step=8)
    assert (tmp_path / "checkpoint-8").is_dir()
    assert_same_ticket(ticket_run.search(tmp_path, str(tmp_path / "checkpoint-8"), at_step=8), first)


def test_weights_that_are_gone_cost_a_warning_and_others_in_their_place_an_error(found, tmp_path, caplog):
    ticket_run.search(tmp_path)
    checkpoint, file = str(tmp_path / "checkpoint-4"), tmp_path / "ticket" / "weights-0.safetensors"
    (tmp_path / "ticket" / "weights-3.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        ticket = ticket_run.search(tmp_path, checkpoint)
    assert "weights-3.safetensors is gone" in caplog.text and sorted(ticket.weights) == [0, found.step]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="does not hold the initial weights of this run"):
        ticket_run.search(tmp_path, checkpoint)
    file.unlink()
    ticket = ticket_run.search(tmp_path, checkpoint)
    assert sorted(ticket.weights) == [found.step] and ticket.init == found.init
    assert_same_state(rewind(tiny_run.model, ticket).state_dict(), rewind(tiny_run.model, found).state_dict())


def test_a_checkpoint_without_the_callback_cannot_be_searched_from(tmp_path):
    tiny_run.trainer(str(tmp_path), eval_strategy="no", max_steps=4).train()
    with pytest.raises(ValueError, match="checkpoint of step 4 is of a run without EarlyTicketCallback"):
        ticket_run.search(tmp_path, str(tmp_path / "checkpoint-4"))


def test_without_checkpoints_nothing_is_left_on_the_disk(tmp_path):
    run = tiny_run.trainer(str(tmp_path), **QUIET)
    run.model.config.name_or_path = "org/net"
    assert find_ticket(run, keep=0.5, at_step=2, weights_at=[1]).init["source"] == "org/net"
    assert not (tmp_path / "ticket").exists()


def test_two_processes_find_the_same_ticket_as_one(tmp_path):
    Script("ticket_run.py", tmp_path, processes=2).finish()
    first, second = (Ticket.from_pretrained(tmp_path / f"found-{rank}") for rank in range(2))
    assert_same_ticket(first, second)
    alone = ticket_run.distributed_search(tmp_path / "alone", 1)
    assert (alone.step, alone.init) == (first.step, first.init)
    assert_same_state(alone.kept, first.kept)


# ---- rewinding


@pytest.mark.parametrize("name", NETS)
def test_the_masked_network_has_the_same_loss_curve_as_the_small_one(name):
    net, x = build(name, seed=0, rows=8)
    net, x = randomise_norms(net.double()), x.double()
    ticket = made_up(net, x.float())
    labels = torch.randint(4, (8,), generator=torch.Generator().manual_seed(2))
    curves = []
    for masked in (False, True):
        model = rewind(net, ticket, masked=masked).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        curve = []
        for _ in range(30):
            loss = nn.functional.cross_entropy(logits(model(x)), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # which sees every gradient there is
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    small, masked = curves
    assert small == pytest.approx(masked, rel=1e-10) and small[-1] < 0.8 * small[0]
    dense = {key: p.shape for key, p in net.named_parameters()}
    assert {key: p.shape for key, p in model.named_parameters()} == dense
    for group in ticket.groups:  # what was silent is so still, to the last bit
        gone = [unit for unit in range(group.units) if unit not in ticket.kept[group.name].tolist()]
        for part in group.slices:
            if part.role not in ("mean", "var"):
                tensor = model.get_parameter(part.tensor).movedim(part.axis, 0).unflatten(0, (group.units, -1))
                assert gone and not tensor[gone].any()


@pytest.mark.parametrize("make,size", [(lenet, 28), (vgg, 16), (resnet, 32), (convnext, 32), (mobilenet, 32)])
def test_the_rewound_network_is_the_slim_one_of_the_initial_weights(make, size):
    set_seed(0)
    net, x = make(), torch.randn(1, 1 if make is lenet else 3, size, size)
    ticket = made_up(net, x)
    expected = slim(net, ticket.groups, ticket.kept)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.5)  # whatever the model has by now
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = rewind(net, ticket)
    assert_same_state(small.state_dict(), expected.state_dict())
    assert_same_state(net.state_dict(), before)
    report = ticket.report()
    assert {key: report[key]["after"] for key in ("params", "macs")} == recount(small, x)
    assert {key: report[key]["before"] for key in ("params", "macs")} == recount(net, x)
    units = {group.name: group.units for group in find_groups(small, x)}
    assert units == {key: len(index) for key, index in ticket.kept.items()}


def test_statistics_of_batch_norms_are_those_of_the_step(found):
    for to, step in (("init", 0), (0, 0), (3, 3), (found.step, found.step)):
        small = rewind(tiny_run.model, found, to)
        net = tiny_run.model()
        net.load_state_dict(found.weights[step])
        assert_same_state(small.state_dict(), slim(net, found.groups, found.kept).state_dict())
    norm = next(m for m in small.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == found.step and norm.running_mean.any()


def test_the_model_can_come_in_many_forms(found, tmp_path):
    net = tiny_run.model()
    net.save_pretrained(tmp_path / "net")
    expected = rewind(net, found).state_dict()
    forms = (tiny_run.model, lambda trial: tiny_run.model(), tmp_path / "net", str(tmp_path / "net"))
    bare = replace(found, weights={})
    for form in forms:
        assert_same_state(rewind(form, found).state_dict(), expected)
        assert_same_state(rewind(form, bare).state_dict(), expected)


def test_a_checkpoint_folder_has_the_weights_of_its_step(found, tmp_path):
    ticket_run.search(tmp_path)
    small = rewind(tmp_path, found, to=8)
    net = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert_same_state(small.state_dict(), slim(net, found.groups, found.kept).state_dict())
    assert small.config.effdl_report["weights of step"] == 8
    assert_same_state(rewind(tmp_path, found).state_dict(), rewind(tiny_run.model, found).state_dict())
    with pytest.raises(ValueError, match=rf"to=5.*the ticket, which has \[0, 3, {found.step}\].*\[4, 8, 12"):
        rewind(tmp_path, found, to=5)
    with pytest.raises(ValueError, match="not those that the ticket's run began with"):
        rewind(tmp_path, replace(found, weights={}))  # an architecture, but no initial weights


def test_other_initial_weights_are_refused(found):
    def other():
        model = tiny_run.model()
        model.classifier[1].bias.data += 1e-3
        return model

    with pytest.raises(ValueError, match="class ResNetForImageClassification, seed 3.*no initial weights"):
        rewind(other, replace(found, weights={}))
    assert rewind(other, found) is not None  # the ticket has its own


@pytest.mark.parametrize("to", [-1, True, "begin", 1.5, None])
def test_a_step_that_is_none_is_refused(found, to):
    with pytest.raises(ValueError, match="it must be 'init' or a step"):
        rewind(tiny_run.model, found, to)


def test_a_ticket_of_another_architecture_is_refused(found):
    with pytest.raises(ValueError, match=r"another architecture .*has shape \(\d+, 1, .*transfer\(ticket, model\)"):
        rewind(resnet, found)
    with pytest.raises(ValueError, match="another architecture .* None in this Sequential"):
        rewind(lenet(), found)
    with pytest.raises(ValueError, match="is of a Sequential, which is no model class of transformers"):
        rewind("folder", made_up(lenet(), torch.zeros(1, 1, 28, 28)))
    with pytest.raises(TypeError, match="must return a torch.nn.Module, not dict"):
        rewind(lambda: {}, found)


# ---- transfer


def tiny(labels: int, channels: int, seed: int = 5):
    set_seed(seed)
    config = tiny_run.model().config
    config.num_labels, config.num_channels = labels, channels
    return type(tiny_run.model())(config)


@pytest.mark.parametrize("labels,channels", [(2, 1), (7, 1), (5, 3)])
def test_the_body_goes_over_and_the_head_stays(found, tmp_path, labels, channels):
    other = tiny(labels, channels)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    small = transfer(found, other)
    assert_same_state(other.state_dict(), before)
    expected = dict(rewind(tiny_run.model, found, found.step).state_dict())
    got = small.state_dict()
    first = "resnet.embedder.embedder.convolution.weight"
    heads = [name for name in got if name.startswith("classifier")]
    assert len(heads) == 2 and expected.keys() == got.keys()
    kept = found.kept[[group for group in found.groups if "classifier.1.weight" in str(group.slices)][0].name]
    assert torch.equal(got["classifier.1.weight"], before["classifier.1.weight"][:, kept])
    assert torch.equal(got["classifier.1.bias"], before["classifier.1.bias"])
    for name in got.keys() - {first, *heads}:
        assert torch.equal(got[name], expected[name]), name
    assert torch.allclose(got[first].sum(1), expected[first].sum(1), atol=1e-6)
    assert small.config.num_labels == labels and small.config.num_channels == channels
    assert recount(small, torch.zeros(1, channels, 16, 16))["params"] == small.config.effdl_report["params"]["after"]
    small.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_state(loaded.state_dict(), got)


@pytest.mark.parametrize("to", ["init", 0, 3])
def test_other_weights_can_be_transferred(found, to):
    small, expected = transfer(found, tiny(4, 1), to=to), rewind(tiny_run.model, found, to)
    for name, tensor in small.state_dict().items():
        assert name.startswith("classifier") or torch.equal(tensor, expected.state_dict()[name])


def test_a_grey_image_has_the_same_response_in_grey_and_in_colour():
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def net(channels):
        set_seed(channels)
        return randomise_norms(resnet(num_channels=channels)).eval()

    for channels, other in ((1, 3), (3, 1)):
        ticket = made_up(net(channels), torch.zeros(1, channels, 16, 16))
        source, target = rewind(net(channels), ticket), transfer(ticket, net(other), to="init")
        body = [
            model.resnet(x.expand(-1, c, -1, -1)).last_hidden_state
            for model, c in ((source, channels), (target, other))
        ]
        assert torch.allclose(*body, atol=1e-5)


def test_a_plain_module_and_a_named_head():
    net = lenet()
    ticket = made_up(net, torch.zeros(1, 1, 28, 28))
    set_seed(3)
    other = lenet()
    other[9] = nn.Linear(84, 3)
    small = transfer(ticket, other, to="init")
    assert small[9].weight.shape == (3, len(ticket.kept["7"])) and small[7].in_features == 25 * len(ticket.kept["3"])
    assert torch.equal(small[9].weight, other[9].weight[:, ticket.kept["7"]])
    assert torch.equal(transfer(ticket, other, to="init", head="9")[0].weight, small[0].weight)
    two = nn.Sequential(*lenet()[:9], nn.Sequential(nn.Linear(84, 3)))
    with pytest.raises(ValueError, match="9.weight is not in this Sequential but in the ticket's"):
        transfer(ticket, two)
    with pytest.raises(ValueError, match="head='10': Sequential has no module"):
        transfer(ticket, other, head="10")


def test_shapes_that_cannot_meet_are_named(found):
    with pytest.raises(ValueError, match=r"convolution.weight has shape \(3, 2, .* and \(3, 4, .*only the class") as e:
        ticket = made_up(tiny_with_stem(2), torch.zeros(1, 2, 16, 16))
        transfer(ticket, tiny_with_stem(4))
    assert "in the ticket" in str(e.value)
    wide = resnet(num_channels=1, embedding_size=4, hidden_sizes=[4, 16], depths=[1, 1])
    with pytest.raises(ValueError, match=r"stages.1.*has shape \(8, .* in the ticket and \(16, "):
        transfer(found, wide)
    deep = resnet(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2])
    with pytest.raises(ValueError, match="stages.1.layers.1.* is in this ResNet.* but not in the ticket's"):
        transfer(found, deep)
    with pytest.raises(ValueError, match="is in this Sequential but not in the ticket's ResNetFor"):
        transfer(found, lenet())
    with pytest.raises(ValueError, match=rf"to=9: the ticket has the weights of steps \[0, 3, {found.step}\]"):
        transfer(found, tiny(2, 1), to=9)
    set_seed(0)
    other = lenet()
    other[9] = nn.Linear(85, 10)
    with pytest.raises(ValueError, match=r"9.weight has shape \(10, 84\) .* and \(10, 85\)"):
        transfer(made_up(lenet(), torch.zeros(1, 1, 28, 28)), other)


def tiny_with_stem(channels):
    return resnet(num_channels=channels, embedding_size=3, hidden_sizes=[3, 6], depths=[1, 1])


# ---- files


def test_a_ticket_comes_back_from_its_folder_as_it_was(found, tmp_path):
    folder = found.save_pretrained(tmp_path / "a" / "b")
    weights = {f"weights-{step}.safetensors" for step in (0, 3, found.step)}
    assert {file.name for file in folder.iterdir()} == FILES | weights
    loaded = Ticket.from_pretrained(folder)
    assert_same_ticket(loaded, found)
    assert loaded.report() == found.report()
    for masked in (False, True):
        a, b = (rewind(tiny_run.model, ticket, 3, masked=masked).state_dict() for ticket in (loaded, found))
        assert_same_state(a, b)
    found.save_pretrained(folder, weights=False)  # those of before are gone
    assert {file.name for file in folder.iterdir()} == FILES
    bare = Ticket.from_pretrained(folder)
    assert bare.weights == {}
    assert_same_state(rewind(tiny_run.model, bare).state_dict(), rewind(tiny_run.model, found).state_dict())
    for name in ("ticket.safetensors", "ticket.json"):
        (folder / name).unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=name.replace("ticket.json", "holds no ticket")):
            Ticket.from_pretrained(folder)


def test_two_who_save_a_ticket_do_so_one_after_the_other(found, tmp_path, monkeypatch):
    tickets = [replace(found, step=step, weights={step: found.weights[0]}) for step in range(6)]
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (time.sleep(0.002), rename(*names)))
    (tmp_path / ".weights-9.safetensors.x").mkdir()  # what a killed run leaves
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda ticket: ticket.save_pretrained(tmp_path), tickets))
    assert {file.name for file in tmp_path.iterdir()} == FILES | {
        f"weights-{Ticket.from_pretrained(tmp_path).step}.safetensors"
    }


def test_a_card_of_something_else_stays(found, tmp_path):
    (tmp_path / "README.md").write_text("the dense model")
    found.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "the dense model"


@pytest.mark.parametrize("half", [True, False])
def test_types_and_memory_formats_survive(tmp_path, half):
    net = vgg().to(torch.bfloat16 if half else torch.float64).to(memory_format=torch.channels_last)
    groups = find_groups(vgg(), torch.zeros(1, 3, 16, 16))
    kept = {groups[0].name: torch.tensor([1, 3])}
    Ticket(groups, kept, 4, weights={0: dict(net.state_dict())}).save_pretrained(tmp_path)
    assert_same_state(Ticket.from_pretrained(tmp_path).weights[0], net.state_dict())


def test_kept_units_are_checked(found):
    name = found.groups[0].name
    for bad in ([], [0, 0], [2, 1], [0, 99], [-1, 2], [0.0, 1.0], [[0, 1]]):
        with pytest.raises(ValueError, match=r"must hold ascending indices \(int64\) of the group's 4 units"):
            replace(found, kept={name: torch.tensor(bad)})
    with pytest.raises(ValueError, match="kept names group 'other', which is not among"):
        replace(found, kept={"other": torch.tensor([0])})


def test_a_ticket_is_pushed_and_loaded_over_http(found, tmp_path):
    found.save_pretrained(tmp_path / "ticket")
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import tiny_run, torch
from huggingface_hub import upload_file
from hf_effdl import Ticket, rewind
ticket = Ticket.from_pretrained({str(tmp_path / "ticket")!r})
first = ticket.push_to_hub("tester/ticket", private=True)
again = Ticket.from_pretrained("tester/ticket")
assert all(torch.equal(again.kept[name], index) for name, index in ticket.kept.items())
assert sorted(again.weights) == sorted(ticket.weights)
ticket.push_to_hub("tester/ticket", weights=False)
assert Ticket.from_pretrained("tester/ticket").weights == {{}}
old = Ticket.from_pretrained("tester/ticket", revision=first.rpartition("/")[2])
assert sorted(old.weights) == sorted(ticket.weights)
net = tiny_run.model()
net.save_pretrained("net")
net.push_to_hub("tester/net")
a, b = rewind("tester/net", old).state_dict(), rewind(net, ticket).state_dict()
assert all(torch.equal(a[name], b[name]) for name in b)
upload_file(path_or_fileobj=b"the net", path_in_repo="README.md", repo_id="tester/net")
ticket.push_to_hub("tester/net")
for wrong in ("tester/nothing", "a/b/c"):
    try:
        Ticket.from_pretrained(wrong)
    except OSError as error:  # FileNotFoundError and the client's own
        print(type(error).__name__)
print("done")
"""
    with LoopbackHub() as hub:
        assert hub.run(code, tmp_path / "home").split()[-1] == "done"
        repo = hub.repos["model", "tester/ticket"]
        assert repo.private and set(repo.head.tree) - {".gitattributes"} == FILES
        card = repo.head.tree["README.md"].decode()
        shared = hub.repos["model", "tester/net"].head.tree
        assert shared["README.md"] == b"the net" and {"model.safetensors", "ticket.json"} <= shared.keys()
    report = found.report()
    shown = [f"| found at step | {found.step} |", f"{report['macs']['after']} of {report['macs']['before']}"]
    for text in ('Ticket.from_pretrained("tester/ticket")', "split-lbi", found.init["sha256"], "| none |", *shown):
        assert text in card, text


# ---- bad input


def test_numbers_out_of_range_are_named():
    wrong = {"macs": (0, 1.5, True), "params": (-1,), "keep": (0.0,), "order": ("norm",), "widths": ("wide",)}
    wrong |= {"threshold": (0, 1.1, float("nan")), "within": (0.0, 2), "window": (1, 2.5), "patience": (0,)}
    wrong |= {"every": (0, 1.0), "min_path": (-0.1, float("nan")), "at_step": (0, 2.5), "at_epoch": (0, -1)}
    for name, bad in (wrong | {"weights_at": ([-1], [1.5], [True])}).items():
        for value in bad:
            with pytest.raises(ValueError, match=f"{name}="):
                EarlyTicketCallback(**{name: value})
    with pytest.raises(ValueError, match="exactly one of macs, params, keep"):
        EarlyTicketCallback(macs=0.5, keep=0.5)
    with pytest.raises(ValueError, match="at_step or at_epoch, not both"):
        EarlyTicketCallback(at_step=1, at_epoch=1)
    with pytest.raises(ValueError, match="no ticket yet"):
        EarlyTicketCallback().ticket  # noqa: B018


@pytest.mark.parametrize(
    "options,message",
    [
        ({"macs": 1e-4}, "macs=0.0001 is below what the smallest sizes cost"),
        ({"at_step": 10}, "at_step=10 lies after within=0.2 of this run, which is step 9 of 48"),
        ({"at_epoch": 1.3}, "at_epoch=1.3 lies after within=0.2 of this run of 6 epochs"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_step(tmp_path, options, message):
    run = tiny_run.trainer(str(tmp_path), **QUIET)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        find_ticket(run, **options)
    assert run.state.global_step == 0
    assert_same_state(run.model.state_dict(), before)
    assert not any(isinstance(c, EarlyTicketCallback) for c in run.callback_handler.callbacks)


def test_trainers_that_cannot_search_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none")
    rows = tiny_run.images(8, 1)
    with pytest.raises(ValueError, match="read from the SplitLBI optimizer, this Trainer has AdamW"):
        find_ticket(Trainer(tiny_run.model(), args, train_dataset=rows))
    net = tiny_run.model()
    run = Trainer(
        net, args, train_dataset=rows, optimizer_cls_and_kwargs=(SplitLBI, {"params": net.parameters(), "lr": 0.1})
    )
    with pytest.raises(ValueError, match="no units to select"):
        find_ticket(run)
    with pytest.raises(TypeError, match="needs a Trainer of transformers, not ResNet"):
        find_ticket(net)
    run = tiny_run.trainer(str(tmp_path), **QUIET, max_steps=1)
    run.train()
    with pytest.raises(ValueError, match="SplitLBITrainer has trained for 1 steps"):
        find_ticket(run)
    run = tiny_run.trainer(str(tmp_path), **QUIET)
    run.add_callback(EarlyTicketCallback(run.groups))
    with pytest.raises(ValueError, match="has an EarlyTicketCallback already"):
        find_ticket(run)
    run.add_callback(EarlyTicketCallback(run.groups))
    with pytest.raises(ValueError, match="2 callbacks of class EarlyTicketCallback"):
        run.train()


def test_sharded_weights_are_refused_by_name(tmp_path):
    from types import SimpleNamespace

    callback, plain = EarlyTicketCallback(), tiny_run.plain_trainer(str(tmp_path))
    optimizer = plain.create_optimizer()
    for model, message in (
        (SimpleNamespace(modules=lambda: [], parameters=lambda: [SimpleNamespace(to_local=None)]), "FSDP2.*with DDP"),
        (type("FullyShardedDataParallel", (nn.Module,), {})(), "FSDP1"),
    ):
        with pytest.raises(ValueError, match=message):
            callback.on_train_begin(plain.args, plain.state, plain.control, model=model, optimizer=optimizer)
    assert unwrap(optimizer) is optimizer and any(
        isinstance(c, SplitLBICallback) for c in plain.callback_handler.callbacks
    )
