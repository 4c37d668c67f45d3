"""Removed units are made up for by the layers behind them, and are chosen by what those layers are given."""

import copy
import logging

import numpy as np
import pytest
import torch
from distributed import calibration_run
from forked import Script
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from hf_effdl import find_groups, slim
from hf_effdl.structure.calibration.batches import split_rows
from hf_effdl.structure.calibration.compensate import RIDGES, SAFE_RIDGE, SCORES, Wish, compensate, unit_scores
from hf_effdl.structure.calibration.consumer import Consumer, consumer_of
from hf_effdl.structure.calibration.grams import Gram
from hf_effdl.structure.calibration.joints import joints_of
from hf_effdl.structure.calibration.refit import refit
from hf_effdl.structure.calibration.replay import replay_of
from hf_effdl.structure.calibration.scores import activation, fisher, obs
from hf_effdl.structure.groups.group import Slice
from hf_effdl.structure.groups.surgery import mask


class Block(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 16, post: bool = False, gain: float = 1.0):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU()
        self.down, self.post, self.gain = nn.Linear(hidden, width), post, gain

    def forward(self, x):
        if self.post:
            return self.norm(x + self.down(self.act(self.up(x))))
        return x + self.gain * self.down(self.act(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, blocks: int = 3, **options):
        super().__init__()
        self.blocks, self.end, self.head = (
            nn.ModuleList(Block(**options) for _ in range(blocks)),
            nn.ReLU(),
            nn.Linear(8, 4),
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.end(x))


def stack(seed: int = 0, **options) -> tuple[nn.Module, list, list[torch.Tensor]]:
    """A residual net, its groups, and forty rows of five positions in four batches."""
    torch.manual_seed(seed)
    model = Stack(**options).eval()
    batches = list(torch.randn(40, 5, 8).split(10))
    return model, find_groups(model, batches[0][:1]), batches


def weighted(rows, wanted, size):
    """The least squares problem of a Gram, written out: rows and targets times the roots of their weights."""
    weights = 1 / size.clamp_min(0.01 * size.log().mean().exp())
    return rows * weights.sqrt()[:, None], wanted * weights.sqrt()[:, None]


# ---- the closed form


@pytest.mark.parametrize("intercept", [False, True])
def test_a_refit_is_the_least_squares_solution_on_the_rows_that_are_not_held_out(intercept):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double().eval()
    batches, kept = list(torch.randn(100, 6).double().split(7)), torch.tensor([0, 2, 3, 7])
    small = slim(
        model, find_groups(model, batches[0][:1]), {"0": kept}, calibration=batches, ridge=0.0, intercept=intercept
    )
    rows = torch.cat(batches)[[i for i in range(100) if i % 5 != 4]]
    given = torch.relu(model[0](rows)).detach()
    wanted = given @ model[2].weight.detach().T
    if intercept:
        given = torch.cat([given, torch.ones(len(given), 1)], 1)
        kept = torch.cat([kept, torch.tensor([10])])
    a, b = weighted(given[:, kept], wanted, wanted.square().sum(1))
    solution = np.linalg.lstsq(a.numpy(), b.numpy(), rcond=None)[0].T
    assert np.allclose(small[2].weight.detach(), solution[:, :4], atol=1e-4)
    shift = solution[:, 4] if intercept else 0
    assert np.allclose(small[2].bias.detach() - model[2].bias.detach(), shift, atol=1e-4)


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_positions_count_by_the_size_of_the_answer_and_of_the_stream_that_it_joins(gain):
    model, groups, batches = stack(blocks=1, gain=gain)
    model, rows = model.double(), torch.cat(batches).double()
    rows[:, 0] *= 100  # as the first token of many language models: no more of the sums than any other
    kept = torch.tensor([0, 3, 4, 7, 9, 12])
    small = slim(model, groups, {groups[0].name: kept}, calibration=rows.split(10), ridge=0.0)
    block, fit = model.blocks[0], rows[[i for i in range(40) if i % 5 != 4]]
    given = block.act(block.up(block.norm(fit))).detach().flatten(0, 1)
    wanted, stream = given @ block.down.weight.detach().T, block(fit).detach().flatten(0, 1).square().sum(1)
    assert stream.view(-1, 5)[:, 0].mean() > 1000 * stream.view(-1, 5)[:, 1:].mean()
    answer = wanted.square().sum(1)
    root = (answer * stream).pow(-0.25)[:, None]
    assert answer.min() > 0.02 * answer.log().mean().exp()  # none is so quiet that it counts as more
    solution = np.linalg.lstsq((given[:, kept] * root).numpy(), (wanted * root).numpy(), rcond=None)[0].T
    assert np.allclose(small.blocks[0].down.weight.detach(), solution, atol=1e-4)


def test_units_that_the_others_can_say_are_not_missed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3)).eval()
    with torch.no_grad():  # every second channel is twice the one before
        for layer in (model[0], model[2]):
            layer.weight[1::2], layer.bias[1::2] = 2 * layer.weight[::2], 2 * layer.bias[::2]
    rows, kept = torch.randn(200, 1, 8, 8), torch.arange(0, 8, 2)
    groups = find_groups(model, rows[:1])
    small = slim(model, groups, {"0": kept, "2": kept}, calibration=rows.split(50), ridge=1e-9)
    assert torch.allclose(small(rows), model(rows), atol=1e-4)
    assert not torch.allclose(slim(model, groups, {"0": kept, "2": kept})(rows), model(rows), atol=0.01)


def test_the_error_of_a_gram_is_that_of_its_positions_with_any_weights():
    torch.manual_seed(0)
    rows, wanted, matrix, shift = (torch.randn(size).double() for size in ((50, 4), (50, 2), (2, 4), (2,)))
    gram = Gram.empty(Consumer("", nn.Linear(4, 2).double(), Slice("weight", 1, 1, "input"), 4))
    gram.add(rows, wanted, wanted.square().sum(1))
    relative = (wanted - rows @ matrix.T - shift).square().sum(1) / wanted.square().sum(1)
    assert gram.error(matrix, shift) == pytest.approx(float(relative.mean()))


@pytest.mark.parametrize("ridge", [0.01, 1e9])
def test_a_ridge_pulls_towards_the_weights_as_they_were(ridge):
    torch.manual_seed(0)
    rows, wanted, old = (torch.randn(size).double() for size in ((30, 4), (30, 2), (2, 4)))
    gram, kept = Gram.empty(Consumer("", nn.Linear(4, 2).double(), Slice("weight", 1, 1, "input"), 4)), [0, 2, 3]
    gram.add(rows, wanted, torch.ones(30).double())
    found = refit(gram, torch.tensor(kept), ridge, toward=old)[0][:, kept]
    pull = ridge * rows[:, kept].square().sum(0).mean()  # gradient of the sum of both terms is zero
    gradient = (found @ rows[:, kept].T - wanted.T) @ rows[:, kept] + pull * (found - old[:, kept])
    assert float(gradient.abs().max()) < 1e-6 * max(1.0, float(pull))
    assert ridge < 1 or torch.allclose(found, old[:, kept], atol=1e-6)


CONVOLUTIONS = [
    nn.Linear(5, 4),
    nn.Conv1d(3, 4, 3, stride=2, padding=1),
    nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect", bias=False),
    nn.Conv2d(3, 4, (2, 4), padding="same"),
    nn.Conv3d(3, 4, 2, dilation=2),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_a_layer_is_its_matrix_on_rows(layer):
    axes = layer.weight.ndim - 2
    given = torch.randn(2, 3, *[7, 6, 5][:axes]) if axes else torch.randn(2, 3, 5)
    consumer = Consumer("", layer, Slice("weight", 1, 1, "input"), layer.weight.shape[1])
    said = consumer.rows(given) @ consumer.matrix.T
    assert torch.allclose(said, consumer.outputs(layer(given)), atol=1e-5)
    columns = consumer.columns(torch.arange(consumer.units))
    assert columns.flatten().tolist() == list(range(consumer.inputs))
    entry = consumer.matrix[:, columns[1]].reshape(layer.weight[:, 1].shape)
    assert torch.equal(entry, layer.weight[:, 1].detach())


def test_a_singular_gram_gets_a_larger_ridge_and_inputs_that_are_zero_get_weight_zero():
    rows = torch.randn(50, 1).repeat(1, 4)
    gram = Gram.empty(Consumer("", nn.Linear(4, 2), Slice("weight", 1, 1, "input"), 4))
    gram.add(rows, rows[:, :2], torch.ones(50))
    matrix = refit(gram, torch.tensor([0, 3]), 0.0)[0].float()
    assert torch.allclose(rows @ matrix.T, rows[:, :2], atol=1e-3) and not matrix[:, 1:3].any()
    gram.products.zero_(), gram.targets.zero_()
    assert not refit(gram, torch.tensor([0, 3]), 0.0)[0].any()


# ---- judged on rows that it did not see


def held_out_error(model, small, batches):
    rows = torch.cat(batches)[4::5]
    with torch.no_grad():
        whole, part = model(rows).flatten(0, 1), small(rows).flatten(0, 1)
    size = whole.square().sum(1)
    return float(((whole - part).square().sum(1) / size.clamp_min(0.01 * size.log().mean().exp())).mean())


@pytest.mark.parametrize("score", [*SCORES, "random"])
@pytest.mark.parametrize("count", [20, 40])
def test_outputs_on_held_out_rows_are_never_further_off_than_without_refitting(score, count):
    for seed in range(3):
        model, groups, batches = stack(seed)
        batches = [torch.cat(batches)[:count]]
        keep = {g.name: torch.randperm(g.units)[:1] for g in groups} if score == "random" else 0.06
        options = {"score": score} if score in SCORES[:-2] else {}
        small = slim(model, groups, keep, calibration=batches, **options)
        report = small.effdl_report["calibration"]
        plain = slim(model, groups, _kept(model, groups, batches, keep, options))
        without = held_out_error(model, plain, batches)
        assert held_out_error(model, small, batches) == pytest.approx(report["error"], rel=1e-3)
        assert report["error_without"] == pytest.approx(without, rel=1e-3) and report["error"] <= without * (1 + 1e-6)
        assert [report["rows"], report["held_out"]] == [count - count // 5, count // 5]


def _kept(model, groups, batches, keep, options):
    """The units that were kept, found again by their rows."""
    small = slim(model, groups, keep, calibration=batches, **options)
    kept = {}
    for group in groups:
        rows = [model.get_submodule(group.name).weight, small.get_submodule(group.name).weight]
        kept[group.name] = torch.cdist(rows[1].detach(), rows[0].detach()).argmin(1)
    return kept


def test_the_ridge_is_the_best_of_those_tried_and_none_where_none_is_better():
    model, groups, batches = stack()
    report = slim(model, groups, 0.5, calibration=batches).effdl_report["calibration"]
    for group in report["groups"].values():
        assert group["ridge"] in (None, *RIDGES) and group["error"] <= group["error_without"]
    assert report["error"] < report["error_without"] and report["refitted"]
    whole = slim(model, groups, 1.0, calibration=batches).effdl_report["calibration"]
    assert whole["error"] == 0 and not whole["groups"]  # nothing was lost that could be made up for


def test_every_fifth_row_is_held_out_however_they_are_batched():
    rows = torch.arange(23.0)[:, None]
    for sizes in (1, 4, 23):
        split = split_rows([{"x": batch, "k": 3} for batch in rows.split(sizes)], nn.Linear(1, 1))
        assert torch.cat([batch["x"] for batch in split.held_out]).flatten().tolist() == [4, 9, 14, 19]
        assert torch.cat([batch["x"] for batch in split.fit]).numel() == 19 and split.fit[0]["k"] == 3


# ---- what is remembered and where answers go


@pytest.mark.parametrize(("options", "scale"), [({}, 1.0), ({"post": True}, 1.0), ({"gain": 0.25}, 0.25)])
def test_the_stream_that_a_layer_adds_to_is_found_by_what_a_push_does(options, scale):
    model, groups, batches = stack(**options)
    consumers = {group.name: [consumer_of(model, group.slices[-1], group.units)] for group in groups}
    found = [joint for [joint] in joints_of(model, consumers, batches[0]).values()]
    names = [f"blocks.{i}.norm" for i in range(3)] if "post" in options else ["blocks.1", "blocks.2", "end"]
    assert [joint.module for joint in found] == names
    assert all(torch.allclose(joint.scale, torch.tensor(scale), atol=1e-3) for joint in found)


def test_an_answer_that_joins_no_stream_has_no_joint():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    groups = find_groups(model, torch.randn(1, 3))
    consumers = {group.name: [consumer_of(model, group.slices[-1], group.units)] for group in groups}
    assert list(joints_of(model, consumers, torch.randn(4, 3)).values()) == [[None], [None]]


def test_layers_behind_groups_that_stay_whole_make_up_for_what_is_lost_before_them():
    model, groups, batches = stack(blocks=6)
    keep = {group.name: range(6) for group in groups[:3]}
    alone, all_of_them = (slim(model, part, keep, calibration=batches) for part in (groups[:3], groups))
    assert [p.shape for p in alone.parameters()] == [p.shape for p in all_of_them.parameters()]
    rows = torch.randn(40, 5, 8)
    part = slim(model, groups, {group.name: 6 / 16 for group in groups[:3]}, calibration=batches, score="obs")
    assert [p.shape for p in part.parameters()] == [p.shape for p in alone.parameters()]
    errors = [float((small(rows) - model(rows)).square().mean()) for small in (alone, all_of_them)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_later_layer_makes_up_for_what_earlier_ones_lost(monkeypatch, seed):
    model, groups, batches = stack(seed, blocks=8)
    with_joints = slim(model, groups, 0.6, calibration=batches, ridge=0.001).effdl_report["calibration"]
    none = lambda model, consumers, batch: {name: [None] * len(layers) for name, layers in consumers.items()}  # noqa: E731
    monkeypatch.setattr("hf_effdl.structure.calibration.compensate.joints_of", none)
    without = slim(model, groups, 0.6, calibration=batches, ridge=0.001).effdl_report["calibration"]
    assert with_joints["error"] < 0.95 * without["error"]


def test_passing_blocks_over_changes_no_answer_and_is_not_done_where_it_would():
    model, _, batches = stack()
    names = [f"blocks.{i}.down" for i in range(3)]
    replay = replay_of(model, names, batches[0][:2])
    for start in (0, 1, 2):
        replay.advance(start, dict(enumerate(batches)))
        assert all(torch.equal(replay.run(batch, i), model(batch)) for i, batch in enumerate(batches))
    assert replay.start == 2 and not any("forward" in vars(block) for block in model.blocks)

    class Both(Stack):  # says what all its blocks said
        def forward(self, x):
            said = [x := block(x) for block in self.blocks]
            return self.head(sum(said))

    assert not replay_of(Both().eval(), names, batches[0][:2]).blocks
    assert not replay_of(model, [*names, "head"], batches[0][:2]).blocks


# ---- scores


def consumed(seed: int = 0, block: int = 1):
    """A consumer of six units with its Gram, its rows, targets and weights."""
    generator = torch.Generator().manual_seed(seed)
    layer, rows = nn.Linear(6 * block, 4, bias=False), torch.randn(300, 6 * block, generator=generator)
    rows = rows @ torch.randn(6 * block, 6 * block, generator=generator)
    consumer = Consumer("", layer, Slice("weight", 1, block, "input"), 6)
    gram, wanted = Gram.empty(consumer), layer(rows).detach()
    size = wanted.square().sum(1)
    gram.add(rows, wanted, size, float(0.01 * size.log().mean().exp()))
    return consumer, gram, *weighted(rows, wanted, wanted.square().sum(1))


@pytest.mark.parametrize("block", [1, 3])
def test_the_obs_cost_is_what_the_best_refit_without_the_unit_leaves_over(block, monkeypatch):
    monkeypatch.setattr("hf_effdl.structure.calibration.scores.OBS_RIDGE", 1e-9)
    consumer, gram, rows, wanted = consumed(block=block)

    def left_over(units):
        entries = rows[:, [i for i in range(6 * block) if i // block in units]].double()
        return float((wanted - entries @ torch.linalg.lstsq(entries, wanted.double()).solution).square().sum())

    cost = [left_over(set(range(6)) - {unit}) for unit in range(6)]
    assert obs([consumer], [gram], 5, rounds=1).argsort().tolist()[0] == int(np.argmin(cost))
    assert obs([consumer], [gram], 6, rounds=1).argsort().tolist() == np.argsort(cost).tolist()
    greedy, left = [], list(range(6))  # brute force: always the unit whose leaving leaves least over
    while len(left) > 1:
        greedy.append(min(left, key=lambda unit: left_over(set(left) - {unit})))  # noqa: B023 - called at once
        left.remove(greedy[-1])
    assert obs([consumer], [gram], 1, rounds=5).argsort().tolist()[:5] == greedy


def test_the_activation_score_is_the_size_of_what_comes_through_a_unit():
    consumer, gram, rows, _ = consumed(block=2)
    through = rows[:, :, None] * consumer.matrix.T[None]  # (positions, inputs, outputs)
    expected = through.square().sum(2).mean(0).view(6, 2).sum(1).sqrt()
    assert torch.allclose(activation([consumer], [gram]), expected, rtol=1e-4)


def bert(**config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(intermediate_size=24, num_labels=3, **sizes, **config)).eval()


def texts(rows: int = 40, tokens: int = 6):
    ids = torch.randint(5, 60, (rows, tokens), generator=torch.Generator().manual_seed(0))
    there = torch.arange(tokens)[None] < 2 + torch.arange(rows)[:, None] % (tokens - 1)
    return {"input_ids": ids, "attention_mask": there.long(), "labels": torch.arange(rows) % 3}


def test_the_fisher_score_is_the_squared_change_of_each_rows_loss():
    model, batch = bert(), texts(6)
    group = next(g for g in find_groups(model, {**texts(1), "labels": None}) if g.units == 24)
    consumer = consumer_of(model, next(part for part in group.slices if part.role == "input"), 24)
    scores = fisher(model, {group.name: [consumer]}, [batch])[group.name]
    expected = torch.zeros(24)
    for row in range(6):
        given = []
        handle = consumer.layer.register_forward_pre_hook(
            lambda _, args: given.append(args[0].retain_grad() or args[0])
        )
        model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
        handle.remove()
        expected += (given[0] * given[0].grad).sum((0, 1)).detach().square()
    assert torch.allclose(scores, expected.sqrt(), rtol=1e-3)


# ---- people's models


@pytest.mark.parametrize(("score", "dtype"), [*((score, torch.float32) for score in SCORES), ("obs", torch.bfloat16)])
def test_padding_has_no_say(score, dtype):
    model, batch = bert().to(dtype), texts()
    groups = [g for g in find_groups(model, {**texts(1), "labels": None}) if g.units == 24]
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    first, second = (slim(model, groups, 0.5, calibration=[b], score=score) for b in (batch, other))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.dtype == dtype and torch.allclose(a, b, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert first.config.effdl_report["calibration"]["error"] < 0.5


@pytest.mark.parametrize("score", SCORES)
def test_the_units_that_stay_first_are_those_worth_most(score):
    model, batch = bert(), texts(20)
    groups = [g for g in find_groups(model, {**texts(1), "labels": None}) if g.units == 24]
    worth = unit_scores(model, groups, [batch], score, share=0.5)
    kept = compensate(model, groups, {g.name: Wish(12) for g in groups}, [batch], score=score).kept
    first = groups[0].name  # by the later ones the slim copy is another model
    assert kept[first].tolist() == worth[first].topk(12).indices.sort().values.tolist()
    assert list(worth) == [g.name for g in groups] and all(values.shape == (24,) for values in worth.values())


def test_the_model_and_its_mode_stay_and_frozen_layers_stay_frozen():
    model, groups, batches = stack()
    model.train()
    model.blocks[0].down.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = slim(model, groups, 0.5, calibration=batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and small.training and not any(module._forward_hooks for module in model.modules())
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(small(batches[0]), copy.deepcopy(small)(batches[0]))


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    calibration_run.main(tmp_path / "one")
    Script("distributed/calibration_run.py", tmp_path / "two", processes=2).finish()
    one, *two = (torch.load(tmp_path / name) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))
    for name in one:
        assert torch.equal(two[0][name], two[1][name]) and torch.allclose(one[name], two[0][name], atol=1e-5), name


def test_masking_the_units_in_the_refitted_model_is_what_slimming_gives():
    model, groups, batches = stack()
    kept = {group.name: torch.arange(3, 11) for group in groups}
    small = slim(model, groups, kept, calibration=batches)
    grown = copy.deepcopy(model)
    for group in groups:
        behind = group.slices[-1].tensor.removesuffix(".weight")
        wide, narrow = grown.get_submodule(behind), small.get_submodule(behind)
        with torch.no_grad():
            wide.weight[:, kept[group.name]] = narrow.weight
    assert torch.allclose(mask(grown, groups, kept)(batches[0]), small(batches[0]), atol=1e-5)


# ---- what is refused and said


MODEL, GROUPS, BATCHES = stack()
REFUSED = {
    "no batches": ({"calibration": []}, ValueError, "holds no batches"),
    "one tensor": ({"calibration": BATCHES[0]}, TypeError, "wrap a single batch in a list"),
    "texts": ({"calibration": ["a text"]}, TypeError, "must be a tensor, tuple or dict, not str"),
    "other shapes": ({"calibration": [torch.randn(9, 5, 7)]}, ValueError, "does not take calibration batch"),
    "a scalar": ({"calibration": [torch.tensor(1.0)]}, ValueError, "holds no rows"),
    "an unknown score": ({"calibration": BATCHES, "score": "taylor"}, ValueError, "score='taylor'"),
    "the path": ({"calibration": BATCHES, "score": "path"}, ValueError, "path.select"),
    "a negative ridge": ({"calibration": BATCHES, "ridge": -1}, ValueError, "ridge=-1"),
    "a score alone": ({"score": "obs"}, ValueError, "pass calibration=batches"),
    "a ridge alone": ({"ridge": 0.1}, ValueError, "pass calibration=batches"),
    "fisher without labels": ({"calibration": BATCHES, "score": "fisher"}, ValueError, "needs a loss"),
    "numbers that are none": ({"calibration": [BATCHES[0] * float("nan")]}, ValueError, "not finite"),
}


@pytest.mark.parametrize(("options", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_calibrated_on_is_refused(options, kind, words):
    with pytest.raises(kind, match=words):
        slim(MODEL, GROUPS, 0.5, **options)


def test_too_few_positions_are_said_and_the_ridge_is_raised(caplog):
    model, groups, batches = stack()
    with caplog.at_level(logging.WARNING):
        report = slim(model, groups, 0.9, calibration=[batches[0][:2]]).effdl_report["calibration"]
    assert "fewer than the 15 inputs" in caplog.text and "too few to hold some out" in caplog.text
    assert all(group["ridge"] is None or group["ridge"] >= SAFE_RIDGE for group in report["groups"].values())


def test_a_layer_that_no_row_reaches_is_cut_without_a_refit(caplog):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return F.linear(torch.relu(self.up(x)), self.down.weight)  # a layer that is never called

    model = Functional().eval()
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = find_groups(other, torch.randn(1, 4))
    from dataclasses import replace

    parts = tuple(replace(p, tensor={"0": "up", "2": "down"}[p.tensor[0]] + p.tensor[1:]) for p in groups[0].slices)
    network = replace(groups[0].network, shapes={n: tuple(p.shape) for n, p in model.named_parameters()}, uses={})
    group = replace(groups[0], name="up", slices=parts, network=network, lifted=())
    rows = torch.randn(20, 4)
    small = slim(model, [group], {"up": [0, 1, 2]}, calibration=[rows])
    assert "are not refitted" in caplog.text
    assert torch.allclose(small(rows), slim(model, [group], {"up": [0, 1, 2]})(rows), atol=1e-6)


def test_a_smaller_stock_model_loads_exports_and_is_quantised_as_any(tmp_path):
    model, batch = bert(), texts()
    groups = [group for group in find_groups(model, {**texts(1), "labels": None}) if group.units == 24]
    slim(model, groups, 0.5, calibration=[batch]).save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.intermediate_size == 12 and not hasattr(loaded.config, "quantization_config")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = loaded(**inputs).logits.detach()
    exported = torch.export.export(loaded, (), inputs).module()
    assert torch.allclose(exported(**inputs)["logits"], expected, atol=1e-5)
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(loaded), {nn.Linear}, dtype=torch.qint8)
    assert torch.nn.functional.cosine_similarity(small(**inputs).logits, expected).min() > 0.9


@pytest.mark.slow
def test_a_smaller_stock_model_runs_in_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, batch = bert(), texts(4)
    groups = [group for group in find_groups(model, {**texts(1), "labels": None}) if group.units == 24]
    small = slim(model, groups, 0.5, calibration=[batch])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.onnx.export(small, (), tmp_path / "small.onnx", kwargs=inputs, dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    [logits] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert np.allclose(logits, small(**inputs).logits.detach(), atol=1e-5)


def test_a_long_calibration_is_announced(monkeypatch, caplog):
    model, groups, batches = stack()
    monkeypatch.setattr("hf_effdl.structure.calibration.compensate.SLOW", 0.0)
    slim(model, groups, 0.5, calibration=batches)
    assert "calibration on 40 rows will take about 1 minutes; fewer rows" in caplog.text
