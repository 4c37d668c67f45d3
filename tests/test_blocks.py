"""FFN neurons and heads are found wherever a layer has them, and what is said of them holds after a cut."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_effdl import find_groups, slim
from hf_effdl.structure.groups.group import regroup
from hf_effdl.structure.groups.record import groups_of, groups_record
from hf_effdl.structure.groups.slim_config import SlimConfig


HEADS, SIZE, READERS = 6, 4, 2  # heads, their size, query heads per key/value head
X = torch.linspace(0, 9, 2 * 5 * 8).sin().view(2, 5, 8)


class Net(nn.Module):
    """A block with a norm before it, whose first layer has its units in some order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.order, self.heads = order, HEADS
            width = {"halves": 10, "pairs": 10, "plain": 5}.get(order, (HEADS + 2 * self.keys) * SIZE)
            self.norm, self.many = nn.LayerNorm(8), nn.Linear(8, width)
            self.last = nn.Linear(width // 2 if width == 10 else min(width, HEADS * SIZE), 8)
            self.decoy = self.units  # equals the number of units, and must not change with it

    @property
    def keys(self) -> int:
        return 1 if "shared" in self.order else HEADS // READERS if "grouped" in self.order else HEADS

    @property
    def units(self) -> int:
        return 5 if self.order in ("halves", "pairs", "plain") else HEADS if "shared" in self.order else self.keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.many(self.norm(x))
        if self.order == "plain":
            y = F.relu(y)
        elif self.order == "halves":
            y = F.silu(y[..., : y.shape[-1] // 2]) * y[..., y.shape[-1] // 2 :]
        elif self.order == "pairs":
            y = F.gelu(y[..., ::2]) * y[..., 1::2]
        else:
            y = self.attend(y)
        return x + self.last(y) * (1 + (self.decoy != self.units))

    def attend(self, y: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = y.shape
        heads = self.heads  # without it the cut model does not run
        keys = 1 if "shared" in self.order else heads // READERS if "grouped" in self.order else heads
        if self.order.startswith("by head"):
            y = y.view(rows, tokens, keys, -1, SIZE)
            q, k, v = y[:, :, :, :-2].flatten(2, 3), y[:, :, :, -2], y[:, :, :, -1]
        else:
            parts = y.split([heads * SIZE, keys * SIZE, keys * SIZE], dim=-1)
            q, k, v = (part.unflatten(-1, (-1, SIZE)) for part in parts)
        q, k, v = q.transpose(1, 2), *(t.repeat_interleave(heads // keys, 2).transpose(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def expected(order: str) -> list[list[int]]:
    """Rows of the first layer by unit, in order."""
    if order in ("plain", "halves", "pairs"):
        return [{"plain": [i], "halves": [i, 5 + i], "pairs": [2 * i, 2 * i + 1]}[order] for i in range(5)]
    if "shared" in order:  # the key and the value are of no unit
        return torch.arange(HEADS * SIZE).view(HEADS, SIZE).tolist()
    keys = HEADS // READERS if "grouped" in order else HEADS
    per, run = HEADS // keys * SIZE, torch.arange
    if order.startswith("by head"):
        return run(keys * (per + 2 * SIZE)).view(keys, -1).tolist()
    starts = (0, per), (HEADS * SIZE, SIZE), ((HEADS + keys) * SIZE, SIZE)
    return [[start + u * n + i for start, n in starts for i in range(n)] for u in range(keys)]


@pytest.mark.parametrize(
    "order", ["plain", "halves", "pairs", "all q, k, v", "by head", "all grouped", "by head grouped", "all shared"]
)
def test_units_are_found_in_any_order_and_said_rightly_after_a_cut(order):
    model = Net(order)
    groups = find_groups(model, X)
    [group] = groups
    rows = [part for part in group.slices if part.role == ("table" if "shared" in order else "row")]
    rows = [part for part in rows if part.tensor == "many.weight"]
    found = [[i for part in rows for i in part.entries(torch.tensor([u])).tolist()] for u in range(group.units)]
    assert found == expected(order)
    assert [(name, n) for _, name, n in group.counts] == [("heads", HEADS // group.units)] * (
        order[:3] in ("all", "by ")
    )
    back = groups_of(groups_record(groups))
    assert [(g.slices, g.counts, g.network) for g in back] == [(group.slices, group.counts, group.network)]
    small = slim(model, groups, {group.name: [0, 2]})
    assert small.decoy == model.decoy
    [moved], [anew] = regroup(groups, small), find_groups(reset(small), X)
    assert (moved.units, moved.slices, moved.counts, moved.network.count()) == (
        2,
        anew.slices,
        anew.counts,
        anew.network.count(),
    )


def reset(model: nn.Module) -> nn.Module:
    """The decoy as the number of units is now: a network of its own."""
    model = copy.deepcopy(model)
    model.__class__ = type("Small", (Net,), {"units": model.decoy})
    return model


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("groups", 0, "slices", 1, 4), 0, "two slices of the same part of many.weight"),
        (("groups", 0, "slices", 1, 4), 70, "says 6 times 4 along axis 0 of many.weight"),
        (("groups", 0, "slices", 1, 4), -1, "no number it can be"),
        (("groups", 0, "counts", 0, 1), "__class__", "names the attribute '__class__'"),
        (("groups", 0, "counts", 0), ["", "heads"], "has 2 values where there are 3"),
        (("groups", 0, "counts", 0, 2), 0, "no number it can be"),
        (("products", "last.weight"), [2, 5], "names axis 2"),
        (("products", "absent"), [0, 5], "which has no shape"),
    ],
)
def test_a_forged_entry_of_a_block_is_refused_by_its_name(where, value, words):
    record = copy.deepcopy(groups_record(find_groups(Net("all q, k, v"), X)))
    *path, last = where
    entry = record
    for key in path:
        entry = entry[key]
    entry[last] = value
    with pytest.raises(ValueError, match=words):
        groups_of(record)


def test_a_count_that_is_no_longer_true_is_not_overwritten():
    model = Net("all q, k, v")
    groups = find_groups(model, X)
    model.heads = 3
    with pytest.raises(ValueError, match="heads is 3, but the 6 units of group 'many' make it 6; call find_groups"):
        slim(model, groups, 0.5)


def test_quantised_weights_are_refused_with_what_to_do():
    model = Net("plain")
    model.last.weight = nn.Parameter(torch.ones(8, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="last.weight is quantised .torch.int8.*without quantization_config"):
        find_groups(model, X)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"tables": {"x": [1]}}, "has the number 'x'"),
        ({"tables": {"0": [0]}}, "no number it can be"),
        ({"counts": {"_parameters": {"0": 1}}}, "names the attribute '_parameters'"),
        ({"counts": {"heads": {"0": "8"}}}, "no number it can be"),
        ({"counts": {"config.__class__": {"0": 1}}}, "names the attribute 'config.__class__'"),
    ],
)
def test_forged_sizes_of_a_slim_model_are_refused_by_their_entry(given, words):
    with pytest.raises(ValueError, match=words):
        SlimConfig({}, 3, **given)
