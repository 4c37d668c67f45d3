"""Widths that differ from layer to layer: the same budget, and more goes where the outputs miss it least."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

from hf_effdl import find_groups, slim
from hf_effdl.structure.calibration.compensate import Wish, compensate, free_wishes
from hf_effdl.structure.calibration.judge import LIKELIEST, Divergence
from hf_effdl.structure.calibration.replay import Replay
from hf_effdl.structure.calibration.widths import STEPS, Loss, divide


class Block(nn.Module):
    def __init__(self, gain: float, width: int = 8, hidden: int = 16):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU()
        self.down, self.gain = nn.Linear(hidden, width), gain

    def forward(self, x):
        return x + self.gain * self.down(self.act(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, gains: tuple[float, ...]):
        super().__init__()
        self.blocks, self.end, self.head = nn.ModuleList(map(Block, gains)), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.end(x))


def stack(gains=(1.0, 0.02, 1.0), seed=0):
    """A residual net whose second block says next to nothing, its hidden groups, and batches."""
    torch.manual_seed(seed)
    model = Stack(gains).eval()
    batches = list(torch.randn(60, 5, 8).split(12))
    return model, [g for g in find_groups(model, batches[0][:1]) if g.units == 16], batches


def total(losses, sizes):
    return sum(loss.at(loss.units - sizes[name]) for name, loss in losses.items())


# ---- dividing a budget


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_of_errors_is_the_least_that_any_division_of_the_budget_has(seed):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda low, high: float(low + (high - low) * torch.rand((), generator=rng))  # noqa: E731
    losses = {name: Loss(12, 0.25, 0.75, draw(0.1, 3), draw(1.05, 3)) for name in "abc"}
    sizes = divide(losses, budget=11)
    every = [
        dict(zip("abc", kept, strict=True))
        for kept in itertools.product(range(3, 13), repeat=3)
        if sum(12 - count for count in kept) == 11
    ]
    assert sum(12 - size for size in sizes.values()) == 11
    assert total(losses, sizes) == pytest.approx(min(total(losses, other) for other in every), rel=1e-12)


def test_groups_that_cost_the_same_stay_equal_and_units_that_save_more_go_first():
    alike = {name: Loss(64, 0.25, 0.5, 1.0, 2.0) for name in "abcd"}
    assert divide(alike, budget=4 * 16) == dict.fromkeys("abcd", 48)
    sizes = divide({"dear": Loss(64, 0.25, 0.5, 1.0, 2.0, cost=3.0), "cheap": Loss(64, 0.25, 0.5, 1.0, 2.0)}, 64)
    assert sizes["dear"] < sizes["cheap"]
    assert 64 <= 3 * (64 - sizes["dear"]) + 64 - sizes["cheap"] < 64 + 3  # held, by less than one unit too much


def test_no_group_loses_more_than_was_measured_and_sizes_are_multiples():
    losses = {"free": Loss(1536, 0.25, 0.5, 1e-9, 1.0), "dear": Loss(1536, 0.25, 0.5, 1.0, 1.2)}
    sizes = divide(losses, budget=2 * 384, round_to=16)
    assert sizes == {"free": 768, "dear": 1536}
    assert divide(losses, budget=1e9) == {"free": 768, "dear": 768}
    assert all(size % 32 == 0 for size in divide(losses, budget=700, round_to=32).values())
    assert 1536 // STEPS == 24  # a step without a multiple


def test_an_error_that_does_not_grow_counts_as_growing_in_step():
    loss = Loss.of(100, 0.2, 0.4, (0.5, 0.5))
    assert loss.power == 1.0 and loss.at(20) == pytest.approx(0.5)
    measured = Loss.of(100, 0.2, 0.4, (0.5, 2.0))
    assert [measured.at(count) for count in (20, 40)] == pytest.approx([0.5, 2.0])


# ---- what is measured


def said_by(model, batches):
    return torch.cat([model(**batch).logits[batch["attention_mask"].bool()].log_softmax(-1) for batch in batches])


@pytest.mark.parametrize("classes", [7, 300])
def test_the_divergence_is_that_of_the_probabilities_at_places_that_are_no_padding(classes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_labels=classes, initializer_range=1.0, **sizes)
    model, other = (BertForTokenClassification(config).eval() for _ in range(2))
    other.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()})
    batches = [{"input_ids": ids, "attention_mask": (ids > 4).long()} for ids in torch.randint(0, 50, (6, 8)).split(2)]
    divergence = Divergence.of(Replay(model), dict(enumerate(batches)))
    with torch.no_grad():
        before, now = said_by(model, batches), said_by(other, batches)
    full = float((before.exp() * (before - now)).sum(1).mean())
    found = divergence.error(Replay(other))
    assert divergence.error(Replay(model)) == pytest.approx(0, abs=1e-6)
    if classes <= LIKELIEST:
        assert found == pytest.approx(full, rel=1e-3)
    else:  # classes taken together tell less apart
        assert 0.5 * full < found < full


def test_answers_that_are_no_probabilities_have_no_divergence():
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(0, 50, (2, 8))}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_labels=3, problem_type="regression", **sizes)
    for model in (BertForSequenceClassification(config), BertModel(config)):
        assert Divergence.of(Replay(model.eval()), {0: batch}) is None
    config.problem_type = None
    assert Divergence.of(Replay(BertForSequenceClassification(config).eval()), {0: batch}) is not None


# ---- on a model


@pytest.mark.parametrize("score", ["activation", "obs"])
def test_the_block_that_says_little_loses_most_and_the_outputs_are_nearer(score):
    model, groups, batches = stack()
    equal = slim(model, groups, 0.75, calibration=batches, score=score)
    free = slim(model, groups, 0.75, calibration=batches, score=score, widths="free")
    sizes = [block.up.out_features for block in free.blocks]
    assert sum(sizes) == 3 * 12 and sizes[1] == 8  # twice the share of the others, and no more
    rows = torch.randn(50, 5, 8)
    errors = [(small(rows) - model(rows)).square().mean().item() for small in (equal, free)]
    assert errors[1] < 0.75 * errors[0]


def test_a_group_is_measured_alone_whichever_others_there_are(monkeypatch):
    seen = {}
    module = "hf_effdl.structure.calibration.compensate"
    monkeypatch.setattr(f"{module}.divide", lambda losses, *_: seen.update(losses) or dict.fromkeys(losses, 12))
    model, groups, batches = stack(gains=(1.0, 0.5, 2.0))
    before = copy.deepcopy(model.state_dict())
    free_wishes(model, groups, {group.name: Wish(12) for group in groups}, batches)
    together = dict(seen)
    for group in groups:
        seen.clear()
        free_wishes(model, [group], {group.name: Wish(12)}, batches)
        assert seen[group.name].error == pytest.approx(together[group.name].error, rel=1e-4)
        done = compensate(model, [group], {group.name: Wish(12)}, batches)
        assert done.report["error"] == pytest.approx(together[group.name].error, rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_groups_whose_units_were_named_keep_these():
    model, groups, batches = stack()
    first, *others = [group.name for group in groups]
    keep = {first: torch.arange(4, 14)} | dict.fromkeys(others, 0.75)
    small = slim(model, groups, keep, calibration=batches, widths="free")
    widths = [block.up.out_features for block in small.blocks]
    assert widths[0] == 10 and sum(widths[1:]) == 24 and widths[1] < widths[2]


def test_a_transformer_of_free_widths_saves_loads_and_costs_no_more(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        num_labels=3,
        initializer_range=0.5,  # else the classes hardly say anything
    )
    model = BertForSequenceClassification(config).eval()
    batches = [{"input_ids": ids} for ids in torch.randint(0, 50, (40, 8)).split(8)]
    groups = [group for group in find_groups(model, batches[0]) if group.units == 32]
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight *= 0.01
    small, equal = (
        slim(model, groups, 0.75, 4, calibration=iter(batches), widths=widths) for widths in ("free", "stock")
    )
    sizes = [layer.intermediate.dense.out_features for layer in small.bert.encoder.layer]
    assert sizes[1] == 16 and all(size % 4 == 0 for size in sizes)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in equal.parameters())
    small.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batches[0]).logits, small(**batches[0]).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": "free"}, "pass calibration=batches"),
        ({"widths": "wide"}, "widths='wide': it must be one of"),
        ({"widths": "free", "score": "magnitude"}, "pass calibration=batches"),
    ],
)
def test_free_widths_without_calibration_are_refused(options, words):
    model, groups, _ = stack()
    with pytest.raises(ValueError, match=words):
        slim(model, groups, 0.5, **options)


def test_a_single_batch_is_refused_as_without_free_widths():
    model, groups, batches = stack()
    with pytest.raises(TypeError, match="wrap a single batch in a list"):
        slim(model, groups, 0.5, calibration=batches[0], widths="free")
