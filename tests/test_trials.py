"""Groups are tried out: what the tracer cannot see must not let units through that other units need."""

import copy
import logging
import random
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_effdl import slim, widen
from hf_effdl.structure.groups.counting import network_of
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.inputs import all_values
from hf_effdl.structure.groups.reading import Reading
from hf_effdl.structure.groups.surgery import cut, mask


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Hidden(nn.Module):
    """Two branches of equal width, a body on one of them, and somewhere a coupling that no gradient shows."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        width, inner = draw.choice([4, 6, 8] if kind == "pixels" else [2, 4, 6, 8]), draw.choice([3, 5, 8])
        self.kind = kind
        self.a, self.b = block(3, width), block(3, width)
        self.body = nn.Sequential(block(width, inner), *([block(inner, inner)] if draw.random() < 0.5 else []))
        self.head_a, self.head_b = nn.Linear(inner, 4), nn.Linear(width, 4)
        self.early = nn.Linear(width, 4)

    def forward(self, x, labels=None):
        a, b = self.a(x), self.b(x)
        out = None
        if self.kind == "detach":
            a = a * b.detach()
        elif self.kind == "no_grad":
            with torch.no_grad():
                gate = (b - a).sigmoid()
            a = a * gate
        elif self.kind == "numpy":
            a = a * torch.from_numpy(b.detach().cpu().numpy().copy()).to(a)
        elif self.kind == "norm":
            a = a / a.detach().square().mean(1, keepdim=True).add(1e-4).sqrt()
        elif self.kind == "pixels":
            a = F.local_response_norm(a, 3, alpha=1e-4, beta=0.75, k=1.0)
        elif self.kind == "float" and float(a.detach().mean()) > 30:
            a = a * 2
        elif self.kind == "compared" and a.detach().mean() > 1e4:
            a = a * 2
        elif self.kind == "rare" and torch.rand(()) < 1e-6:
            a = a * b.detach()
        elif self.kind == "strongest":
            out = a.detach().argmax(1).float().mean((1, 2))
        elif self.kind == "side":
            out = (a.detach() * b.detach()).mean((1, 2, 3)).cpu().numpy()
        elif self.kind == "training" and self.training:
            out = self.early(a.detach().mean((2, 3)))
        elif self.kind == "training product" and self.training:
            out = {"inner": [(a.detach() * b.detach()).mean()]}
        elif self.kind == "labels" and labels is not None:
            out = F.cross_entropy(self.early(a.detach().mean((2, 3))), labels)
        return self.head_a(self.body(a).mean((2, 3))) + self.head_b(b.mean((2, 3))), out


KINDS = "detach no_grad numpy norm pixels strongest side training labels".split() + ["training product"]
KINDS += ["float", "compared", "rare"]
FAINT = {"pixels": (45, 117)}  # the norm hardly shows at any scale that is tried, since most of the signals are silent


def answers(net, x, training, labels):
    net = net.train(training)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        return [value.double() for value in all_values(net(x, labels))]


def assert_removable(net, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        count = int(torch.randint(1, group.units + 1, (), generator=generator))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    silent, small = mask(copy.deepcopy(net), groups, kept), cut(copy.deepcopy(net), groups, kept)
    for scale in (1, 255):
        x = scale * torch.rand(2, 3, 8, 8, generator=generator)
        for training in (False, True):
            for labels in (None, torch.tensor([0, 1])):
                pairs = zip(*(answers(m, x, training, labels) for m in (silent, small)), strict=True)
                for a, b in pairs:
                    assert a.shape == b.shape and (a - b).abs().max() <= 2e-4 * (1 + a.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_forty_random_nets_with_hidden_couplings_lose_only_units_that_nothing_else_needs(kind):
    first = 10 * KINDS.index(kind)
    for number in (*range(first, first + 4), *FAINT.get(kind, ())):
        net = Hidden(kind, number).eval()
        for name, p in net.named_parameters():
            if p.ndim == 1:
                nn.init.uniform_(p, 0.2, 1.0)
        try:
            groups = find_groups(net, torch.rand(2, 3, 8, 8))
        except ValueError as error:
            assert "left out: " in str(error)
            continue
        assert "a.0" not in [group.name for group in groups]
        for seed in range(5):
            assert_removable(net, groups, seed)


@pytest.mark.parametrize("condition", [lambda x: x.isnan().any(), lambda x: x.shape[0] > 4, lambda x: x.max() > 1e9])
def test_conditions_that_no_unit_decides_cost_no_group(condition):
    class Careful(Hidden):
        def forward(self, x, labels=None):
            if condition(x):
                raise ValueError("not these")
            return super().forward(x, labels)

    assert {"a.0", "b.0", "body.0.0"} <= {
        group.name for group in find_groups(Careful("none", 0), torch.rand(1, 3, 8, 8))
    }


@pytest.mark.parametrize("asked", [2, 5])
def test_units_that_a_forward_pass_asks_for_by_number_are_left_out(asked, caplog):
    class Winners(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.first(x).relu()
            x = x * (x >= x.topk(asked, 1).values[:, -1:])  # of half of the units there are as many
            return self.head(self.second(x).relu())

    torch.manual_seed(0)
    assert [group.name for group in find_groups(Winners(), torch.randn(1, 6))] == ["second"]
    assert "the units of first" in caplog.text and "where one unit of each is left" in caplog.text


def test_a_net_without_couplings_keeps_all_its_groups():
    net = Hidden("none", 0)
    assert {"a.0", "b.0", "body.0.0"} <= {group.name for group in find_groups(net, torch.rand(1, 3, 8, 8))}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_groups_are_found_where_gradients_are_off(mode):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with mode():
        assert [group.name for group in find_groups(net, torch.rand(1, 3, 8, 8))] == ["0"]


def test_the_warning_says_in_which_setting_units_are_needed(caplog):
    torch.manual_seed(0)  # of such faint norms two in 24 nets hide theirs
    with caplog.at_level(logging.WARNING):
        norm = nn.LocalResponseNorm(3, alpha=1e-13)
        net = nn.Sequential(block(3, 8), norm, block(8, 8), nn.Flatten(), nn.Linear(512, 2))
        find_groups(net, torch.rand(1, 3, 8, 8))
        find_groups(Hidden("labels", 1), torch.rand(1, 3, 8, 8))
    for words in ("at the scale of pixels", "in train mode with labels"):
        assert f"is not the model in which those are silent {words}" in caplog.text


def test_a_dropout_in_train_mode_hides_no_group():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = block(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(F.dropout(self.body(x).mean((2, 3)), 0.5, self.training))

    assert [group.name for group in find_groups(Noisy(), torch.rand(1, 3, 8, 8))] == ["body.0"]


def test_an_output_without_entries_and_one_of_another_kind_are_compared():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(block(3, 8), block(8, 8)), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            out = self.head(self.body(x)).flatten(2)[0].T
            found = out[:, 0].sigmoid() > 2
            return {"raw": out, "boxes": out[found, 1:], "count": int(found.sum()), "name": "detector"}

    assert [group.name for group in find_groups(Detector(), torch.randn(1, 3, 16, 16))] == ["body.0.0", "body.1.0"]


def test_batch_norms_that_are_synchronised_are_batch_norms():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    x = torch.randn(1, 3, 8, 8)
    plain, synchronised = (find_groups(m, x) for m in (net, nn.SyncBatchNorm.convert_sync_batchnorm(net)))
    assert [(g.name, g.slices) for g in plain] == [(g.name, g.slices) for g in synchronised]


def test_a_network_of_unknown_layers_is_refused_by_their_kind():
    class Leaves(nn.Module):
        def forward(self, x):
            return torch.from_numpy(x.numpy())

    net = nn.Sequential(nn.Linear(3, 4), Conv1D(2, 4), Leaves())
    with pytest.raises(ValueError, match=r"weights that cannot be followed: Conv1D \(1\)") as caught:
        find_groups(net, torch.randn(1, 3))
    assert "numpy" not in str(caught.value)


# ---- what is frozen


def test_frozen_units_are_not_lifted_and_it_is_said(caplog):
    net = nn.Sequential(block(3, 4), block(4, 6), nn.Flatten(), nn.Linear(384, 2))
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        first, second = find_groups(net, torch.rand(1, 3, 8, 8))
    assert first.lifted == () and second.lifted == ("3.weight",)
    assert "the units of 0.0 are not lifted and stay as many as they are" in caplog.text


def test_what_is_frozen_after_groups_were_found_is_refused():
    from hf_effdl import param_groups

    net = nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(256, 2))
    groups = find_groups(net, torch.rand(1, 3, 8, 8))
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen .* by now.*Freeze first, then call find_groups"):
        param_groups(net, groups)


# ---- counting


def products(net, x):
    with torch.no_grad():
        return network_of(net.eval(), x).count()["macs"]


def test_transposed_convolutions_count_every_product():
    # every input entry meets every weight of its channel: 8 x 8 places, 4 x 6 channels, 4 x 4 taps
    assert products(nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2, 1)), torch.rand(1, 4, 8, 8)) == 64 * 24 * 16


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_weights_count_as_plain_ones(wrap):
    x = torch.rand(1, 3, 8, 8)
    plain, wrapped = nn.Conv2d(3, 5, 3), wrap(nn.Conv2d(3, 5, 3))
    assert products(nn.Sequential(wrapped), x) == products(nn.Sequential(plain), x) == 36 * 5 * 27


def test_attention_and_recurrent_layers_count_their_weights():
    class Attends(nn.Module):
        def __init__(self, **kwargs):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    assert products(Attends(), torch.rand(1, 5, 8)) == 5 * 4 * 64  # query, key, value and output
    lstm = nn.LSTM(3, 4, batch_first=True)
    assert products(lstm, torch.rand(1, 5, 3)) == 5 * (16 * 3 + 16 * 4)


def test_products_that_no_layer_makes_are_counted():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.filters = nn.Parameter(torch.rand(6, 3)), nn.Parameter(torch.rand(5, 3, 3, 3))
            self.layer = nn.Linear(5, 2)

        def forward(self, x):
            maps = F.conv2d(x, self.filters)
            rows = x.flatten(2).transpose(1, 2)
            sides = rows @ self.matrix.t(), self.matrix @ x.flatten(2)
            return maps, sides, F.linear(maps.mean((2, 3)), self.layer.weight)

    assert products(Own(), torch.rand(1, 3, 8, 8)) == 36 * 5 * 27 + 2 * 64 * 18 + 10


def test_products_that_may_be_rounded_elsewhere_are_not_while_groups_are_tried_out():
    seen = set()

    class Own(nn.Linear):
        def forward(self, x):
            seen.add(torch.get_float32_matmul_precision())
            return super().forward(x)

    torch.set_float32_matmul_precision("medium")
    try:
        find_groups(nn.Sequential(Own(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.rand(1, 4))
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_layers_that_are_not_counted_are_named(caplog):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.rand(4, 4))

        def forward(self, x):
            return x @ (2 * self.matrix)

    with caplog.at_level(logging.WARNING):
        products(nn.Sequential(nn.Linear(4, 4), Own()), torch.rand(1, 4))
    assert "multiply-accumulates of 1 (Own) are not known and not counted" in caplog.text


# ---- what shows at some sizes, states and batches alone


class Gated(nn.Module):
    """Features that depend on the mean over all channels, in a way that `kind` hides."""

    def __init__(self, kind: str, threshold: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.kind, self.threshold = kind, threshold
        self.register_buffer("gate", torch.zeros(1))

    def forward(self, x):
        f = F.relu(self.a(x))
        mean = f.mean(1, keepdim=True)
        if self.kind == "size":
            f = f * (1 + (mean > self.threshold).float())
        elif self.kind == "buffer":
            f = f + self.gate * mean
        elif self.kind == "of the last pass":
            f = f * (1 + self.gate)
            self.gate = 0.9 * self.gate + f.detach().mean()
        elif self.kind == "left in a dict":
            self.aux = {"losses": [f.square().mean()]}
        out = self.head(F.relu(self.b(f)).mean((2, 3)))
        return out + f.std(1).mean() if self.kind == "batch" and len(x) > 4 else out


@pytest.mark.parametrize(
    "kind, threshold",
    [("size", t) for t in (0.5, 2.0, 3.0, 10.0, 50.0)]
    + [(kind, 0) for kind in ("buffer", "batch", "left in a dict", "of the last pass")],
)
def test_units_whose_mean_is_used_where_it_hardly_shows_are_left_out(kind, threshold):
    net = Gated(kind, threshold)
    names = [group.name for group in find_groups(net, torch.randn(1, 3, 8, 8))]
    assert names == ["b"]
    assert not net.gate.any()


def test_a_model_that_holds_its_last_features_is_cut_as_one_that_does_not_and_what_cannot_be_copied_is_said():
    class Holds(Gated):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    net, x = Holds("none"), torch.randn(1, 3, 8, 8)
    net(x)
    groups = find_groups(net, x)
    small = slim(net, groups, 0.5)
    assert small.a.out_channels == 4 and net.last.grad_fn is not None
    net.lock = threading.Lock()
    for call in (lambda: find_groups(net, x), lambda: slim(net, groups, 0.5), lambda: widen(net, groups[0], 1)):
        with pytest.raises(ValueError, match="Holds cannot be copied .*cannot pickle"):
            call()


def test_a_net_of_the_same_shape_without_a_gate_keeps_its_units():
    assert [group.name for group in find_groups(Gated("none"), torch.randn(1, 3, 8, 8))] == ["a", "b"]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_attention_without_heads_is_refused_before_it_divides_by_their_number(empty):
    shapes = [(1, 0 if place == empty else heads, 7, 8) for place, heads in enumerate((4, 2, 2))]
    with (
        Reading(),
        pytest.raises(ValueError, match=r"attention of queries, keys and values of shapes .*\(1, 0, 7, 8\)"),
    ):
        torch.nn.functional.scaled_dot_product_attention(*map(torch.zeros, shapes), enable_gqa=True)


GATES = {
    "negative": lambda x: x.mean() < -1,
    "positive": lambda x: x.mean() > 5,
    "about zero": lambda x: (x.mean().abs() < 0.05) & (x.std() > 1),
    "one sign": lambda x: x.min() > 0,
    "other sign": lambda x: x.max() < 0,
    "a corner": lambda x: x[0, 0, 0, 0] < 0,
    "another corner": lambda x: x[0, 0, -1, -1] > 0,
    "faint": lambda x: x.std() < 0.1,
    "by degrees": lambda x: F.relu(-x.mean()),
}


@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("gate", GATES)
def test_a_coupling_on_inputs_of_another_sign_mean_or_size_is_found(gate, shift):
    class Opens(Gated):
        def forward(self, x):
            f = F.relu(self.a(x))
            f = f * (1 + GATES[gate](x) * f.mean(1, keepdim=True).detach())
            return self.head(F.relu(self.b(f)).mean((2, 3)))

    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + shift - 0.5
    assert [group.name for group in find_groups(Opens("none"), x)] == ["b"]


@pytest.mark.parametrize("low, high", [(-0.01, 1.5), (-4.5, 4.5), (0.0, 1.0)])
def test_a_model_that_refuses_other_inputs_is_tried_out_on_those_it_takes(low, high):
    class Strict(Gated):
        def forward(self, x):
            if x.min() < low or x.max() > high:
                raise ValueError(f"not in [{low}, {high}]")
            return super().forward(x)

    assert [group.name for group in find_groups(Strict("none"), torch.rand(1, 3, 8, 8))] == ["a", "b"]
