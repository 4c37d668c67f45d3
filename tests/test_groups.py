"""Groups: which slices go with a unit, what a unit costs, what the penalty sees, and what is refused."""

import copy
import itertools
import logging
import random

import numpy as np
import pytest
import torch
from models import NETS, build, lenet, logits, randomise_norms, recount, renamed, resnet, vgg
from torch import nn

from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.group import Slice
from hf_effdl.structure.groups.param_groups import param_groups
from hf_effdl.structure.groups.surgery import cut, mask
from hf_effdl.structure.optim.split_lbi import SplitLBI


def conv(inputs, outputs, kernel=3, **kwargs):
    return nn.Conv2d(inputs, outputs, kernel, **kwargs)


class Residual(nn.Module):
    """x + body(x)"""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def image(channels=3, size=12):
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


# ---- which slices belong to a unit


def tuples(group):
    return [(part.tensor, part.axis, part.block, part.role) for part in group.slices]


def norm_slices(name):
    parts = [("weight", "scale"), ("bias", "shift"), ("running_mean", "mean"), ("running_var", "var")]
    return [(f"{name}.{leaf}", 0, 1, role) for leaf, role in parts]


def test_the_groups_of_lenet_are_those_written_by_hand():
    groups = find_groups(lenet(), torch.zeros(1, 1, 28, 28))
    assert [(group.name, group.units, tuples(group)) for group in groups] == [
        ("0", 6, [("0.weight", 0, 1, "row"), ("0.bias", 0, 1, "bias"), ("3.weight", 1, 1, "input")]),
        ("3", 16, [("3.weight", 0, 1, "row"), ("3.bias", 0, 1, "bias"), ("7.weight", 1, 25, "input")]),
        ("7", 84, [("7.weight", 0, 1, "row"), ("7.bias", 0, 1, "bias"), ("9.weight", 1, 1, "input")]),
    ]


def test_the_groups_of_a_vgg_with_batch_norm_are_those_written_by_hand():
    groups = find_groups(vgg(), torch.zeros(1, 3, 16, 16))
    assert [(group.name, group.units, tuples(group)) for group in groups] == [
        ("0", 6, [("0.weight", 0, 1, "row"), *norm_slices("1"), ("4.weight", 1, 1, "input")]),
        ("4", 8, [("4.weight", 0, 1, "row"), *norm_slices("5"), ("8.weight", 1, 1, "input")]),
        ("8", 10, [("8.weight", 0, 1, "row"), *norm_slices("9"), ("13.weight", 1, 4, "input")]),
        ("13", 12, [("13.weight", 0, 1, "row"), ("13.bias", 0, 1, "bias"), ("15.weight", 1, 1, "input")]),
    ]


def roles_of(group, *roles):
    return {part.tensor for part in group.slices if part.role in roles}


def test_a_residual_stream_is_one_group_across_its_layers():
    groups = find_groups(resnet(), torch.zeros(1, 3, 32, 32))
    stage = "resnet.encoder.stages"
    stem, *others = groups
    assert stem.units == 8
    # the first stage has the stem's width, so the stem and both of its layers write to one stream
    assert roles_of(stem, "row") == {
        "resnet.embedder.embedder.convolution.weight",
        f"{stage}.0.layers.0.layer.1.convolution.weight",
        f"{stage}.0.layers.1.layer.1.convolution.weight",
    }
    assert roles_of(stem, "input") == {
        f"{stage}.0.layers.0.layer.0.convolution.weight",
        f"{stage}.0.layers.1.layer.0.convolution.weight",
        f"{stage}.1.layers.0.layer.0.convolution.weight",
        f"{stage}.1.layers.0.shortcut.convolution.weight",
    }
    assert [group.units for group in others] == [8, 8, 16, 16]
    assert roles_of(groups[3], "input") == {"classifier.1.weight"}


INPUT = {"lenet": "0.weight", "vgg": "0.weight"}
OUTPUT = {"lenet": "9", "vgg": "15"}


@pytest.mark.parametrize("name", NETS)
def test_every_axis_is_in_exactly_one_group_except_inputs_and_class_outputs(name):
    model, x = build(name)
    seen = [(part.tensor, part.axis) for group in find_groups(model, x) for part in group.slices]
    axes = {(tensor, axis) for tensor, p in model.named_parameters() for axis in range(min(p.ndim, 2))}
    axes |= {(tensor, 0) for tensor, b in model.named_buffers() if b.ndim}
    head = OUTPUT.get(name, "classifier.1")
    first = INPUT.get(name, "resnet.embedder.embedder.convolution.weight")
    ends = {(first, 1), (f"{head}.weight", 0), (f"{head}.bias", 0)}
    assert ends <= axes
    assert len(seen) == len(set(seen))
    assert set(seen) == axes - ends


def test_a_layer_that_adds_to_the_stream_it_reads_has_the_units_on_both_axes():
    net = nn.Sequential(conv(3, 6), Residual(conv(6, 6, padding=1)), nn.ReLU(), nn.Flatten(), nn.Linear(600, 4))
    [group] = find_groups(net, image())
    assert ("1.body.weight", 0, 1, "row") in tuples(group) and ("1.body.weight", 1, 1, "input") in tuples(group)
    # the penalty sees it once, as what it is with the other producers
    assert group.lifted_slices == [Slice("0.weight", 0, 1, "row"), Slice("1.body.weight", 0, 1, "row")]
    small = cut(copy.deepcopy(net), [group], {group.name: torch.arange(5)})
    full, less = recount(net, image()), recount(small, image())
    assert (group.params, group.macs) == tuple(full[key] - less[key] for key in ("params", "macs"))


def test_such_a_layer_with_batch_norm_is_lifted_by_its_input_side():
    body = nn.Sequential(conv(6, 6, padding=1, bias=False), nn.BatchNorm2d(6))
    net = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), Residual(body), nn.ReLU(), nn.Flatten(), nn.Linear(600, 4))
    [group] = find_groups(net, image())
    lifted = {(part.tensor, part.axis, part.role) for part in group.lifted_slices}
    assert ("2.body.0.weight", 1, "input") in lifted and len(lifted) == 4
    SplitLBI(param_groups(net, [group]), lr=0.1)


# ---- what a unit costs


@pytest.mark.parametrize("name", NETS)
def test_costs_per_unit_equal_a_recount_after_taking_one_unit_out(name):
    model, x = build(name)
    groups = find_groups(model, x)
    full = recount(model, x)
    assert groups[0].network.count() == full
    for group in groups:
        smaller = recount(cut(copy.deepcopy(model), [group], {group.name: torch.arange(1, group.units)}), x)
        assert group.params == full["params"] - smaller["params"] > 0
        assert group.macs == full["macs"] - smaller["macs"] > 0


@pytest.mark.parametrize("name", NETS)
def test_predicted_counts_equal_a_recount_for_any_sizes(name):
    model, x = build(name)
    groups = find_groups(model, x)
    for seed in range(3):
        draw = random.Random(seed)
        sizes = {group.name: draw.randint(1, group.units) for group in groups if draw.random() < 0.8}
        smaller = cut(copy.deepcopy(model), groups, {key: torch.arange(size) for key, size in sizes.items()})
        assert groups[0].network.count(groups, sizes) == recount(smaller, x)


def test_lenet_costs_what_pencil_and_paper_say():
    groups = find_groups(lenet(), torch.zeros(1, 1, 28, 28))
    convolutions = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25
    assert convolutions + 400 * 84 + 84 * 10 == 392_040
    assert groups[0].network.count() == {"macs": 392_040, "params": 156 + 2416 + 33_684 + 850}
    # a filter of the second layer: 25 taps on each of 6 maps at 100 places, and 25 columns of 84 neurons
    assert groups[1].macs == 25 * 6 * 100 + 25 * 84
    assert groups[1].params == 25 * 6 + 1 + 25 * 84


def test_a_full_size_resnet_50_has_its_units_and_parameters():
    sizes = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}
    model = resnet("bottleneck", **sizes, num_labels=1000)
    groups = find_groups(model, torch.zeros(1, 3, 32, 32))
    assert groups[0].network.count()["params"] == sum(p.numel() for p in model.parameters()) == 25_557_032
    # the stem, four streams, and two inner widths in each of the 16 layers
    assert len(groups) == 1 + 4 + 2 * 16
    assert sorted(group.units for group in groups)[-4:] == [512, 512, 1024, 2048]


def test_macs_are_per_row_whatever_the_batch_of_the_example():
    model, _ = build("vgg")
    one, seven = (find_groups(model, torch.randn(rows, 3, 16, 16))[0].network.count() for rows in (1, 7))
    assert one == seven


def test_groups_print_as_a_table():
    groups = find_groups(vgg(), torch.zeros(1, 3, 16, 16))
    header, line, *rows = str(groups).splitlines()
    assert header.split() == ["group", "units", "params/unit", "MACs/unit", "lifted"]
    assert set(line) == {"-"} and len(rows) == len(groups)
    for row, group in zip(rows, groups, strict=True):
        assert row.split()[:4] == [group.name, str(group.units), f"{group.params:,}", f"{group.macs:,}"]
    assert rows[0].endswith("1 scale + 1 input") and rows[3].endswith("1 input")


# ---- finding changes nothing, and reads no names


def test_finding_leaves_model_gradients_modes_hooks_and_random_states_alone():
    model, x = build("resnet")
    randomise_norms(model)
    logits(model.train()(torch.cat([x, x]))).sum().backward()
    list(model.modules())[5].eval()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    model.register_forward_hook(lambda module, received, output: None)
    plain = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))
    grads = {name: p.grad for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = {name: grad.clone() for name, grad in grads.items()}
    pointers = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    keys = [set(vars(module)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    example = x.clone()
    found = find_groups(model, x)
    find_groups(model)
    find_groups(plain)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    assert torch.equal(x, example)
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == keys
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1
    assert {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()} == pointers
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p.grad is grads[name] and torch.equal(p.grad, values[name])
    assert all(p is model.get_parameter(name) for group in found for name, p in group.tensors.items())


@pytest.mark.parametrize("name", NETS)
def test_renaming_every_submodule_gives_the_same_groups(name):
    model, x = build(name)
    other = renamed(copy.deepcopy(model))
    old, new = ([*dict(m.named_parameters()), *dict(m.named_buffers())] for m in (model, other))
    assert not {part for tensor in old for part in tensor.split(".")[:-1]} & {
        part for tensor in new for part in tensor.split(".")[:-1]
    }
    back = dict(zip(new, old, strict=True))
    expected, found = find_groups(model, x), find_groups(other, x)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a.name + ".weight" == back[b.name + ".weight"]
        assert (a.units, a.params, a.macs) == (b.units, b.params, b.macs)
        assert tuples(a) == [(back[part.tensor], part.axis, part.block, part.role) for part in b.slices]
        assert a.lifted == tuple(back[tensor] for tensor in b.lifted)


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = conv(3, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList([self.first, self.head])

    def forward(self, x):
        return self.head(self.layers[0](x).relu().mean((2, 3)))


def test_a_layer_that_is_registered_twice_is_one_layer():
    net = Aliased()
    [group] = find_groups(net, image())
    assert group.name == "first" and group.network.count() == recount(net, image())
    small = cut(net, [group], {"first": torch.arange(2)})
    assert small.layers[0].weight is small.first.weight and len(small.first.weight) == 2


# ---- example inputs


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 6), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x, y=None):
        return self.head((self.left(x) + (0 if y is None else self.right(y))).relu())


def test_example_inputs_may_be_a_tensor_a_tuple_or_keywords():
    net, x, y = TwoInputs(), torch.randn(4, 3), torch.randn(4, 5)
    [alone] = find_groups(net, x)
    assert roles_of(alone, "row") == {"left.weight"}
    for inputs in ((x, y), [x, y], {"x": x, "y": y}):
        [both] = find_groups(net, inputs)
        assert roles_of(both, "row") == {"left.weight", "right.weight"} and both.units == 6


def test_labels_among_keyword_inputs_are_no_input_of_the_network():
    model, x = build("resnet")
    with_labels = find_groups(model, {"pixel_values": x, "labels": torch.tensor([1])})
    assert [tuples(group) for group in with_labels] == [tuples(group) for group in find_groups(model, x)]


def test_without_example_inputs_they_are_guessed_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        guessed = find_groups(lenet())
    assert "no example_inputs" in caplog.text and "(1, 1, 28, 28)" in caplog.text
    assert guessed[0].network.count()["macs"] == 392_040
    [linear] = find_groups(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert (linear.units, linear.macs) == (4, 5)
    with pytest.raises(ValueError, match="13 \\(Linear\\).*pass example_inputs="):
        find_groups(vgg())  # no usual image size fits its linear layer


def test_a_transformers_vision_model_brings_its_own_example():
    model = resnet(image_size=32)
    found = find_groups(model)
    assert found[0].network.count() == recount(model, image(3, 32))


def test_a_half_precision_model_is_traced_too():
    model, x = build("lenet")
    expected = [tuples(group) for group in find_groups(model, x)]
    assert [tuples(group) for group in find_groups(model.bfloat16(), x.bfloat16())] == expected
    assert model[0].weight.dtype == torch.bfloat16


# ---- what is refused, and what is left out


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match="not dict"):
        find_groups({})
    with pytest.raises(ValueError, match="unit='column'.*default.*row.*paper"):
        find_groups(lenet(), image(1, 28), unit="column")


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 4), conv(4, 2)

    def forward(self, x):
        raise KeyError("missing")


class LeavesTorch(Raises):
    def forward(self, x):
        return self.second(torch.from_numpy(self.first(x).numpy()))


class HidesFromTorch(Raises):
    def forward(self, x):
        return self.second(torch.from_numpy(self.first(x).detach().numpy()))


@pytest.mark.parametrize(
    "net, message",
    [
        (Raises(), "KeyError: 'missing'.*pass example_inputs="),
        (LeavesTorch(), "cannot trace LeavesTorch.*numpy"),
        (HidesFromTorch(), "no group found in HidesFromTorch"),
        (nn.Linear(12, 3), "no group found in Linear with modules  \\(Linear\\)"),
        (nn.ReLU(), "no group found in ReLU"),
        (lenet(), "Sequential does not run on.*pass example_inputs=.*0 \\(Conv2d\\).*9 \\(Linear\\)"),
    ],
)
def test_a_model_without_traceable_groups_is_refused_with_the_modules_seen(net, message):
    with pytest.raises(ValueError, match=message) as caught:
        find_groups(net, image())
    if isinstance(net, Raises):
        assert "first (Conv2d), second (Conv2d)" in str(caught.value)


def test_a_long_list_of_modules_is_cut_short():
    with pytest.raises(ValueError, match="29 \\(ReLU\\) and 11 more"):
        find_groups(nn.Sequential(*[nn.ReLU() for _ in range(40)], nn.Linear(3, 2)), torch.zeros(1, 3))


class FixedSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = conv(3, 4), conv(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = self.first(x)
        assert h.shape[1] == 4
        return self.head(self.second(h).relu().mean((2, 3)))


class Pools(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def tied():
    head = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)]
    net = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 6, 1), Pools(), *head)
    net[6].weight = net[4].weight
    return net


def zero_head(net):
    nn.init.zeros_(net[-1].weight)
    return net


def tail(units):
    return [nn.ReLU(), conv(units, 7, 1), nn.ReLU(), Pools(), nn.Linear(7, 2)]


@pytest.mark.parametrize(
    "net, found, reason",
    [
        # the removable rest is found; with nothing left (None) it is an error that names the reason
        (nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 6, groups=3), *tail(6)), ["4"], "0: 2 is a grouped convolution"),
        (nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 3, groups=3), *tail(3)), ["4"], "0: 2 is a grouped convolution"),
        (
            nn.Sequential(conv(3, 3, groups=3), *tail(3)),
            ["2"],
            "0 is a depthwise convolution of channels that no layer",
        ),
        (nn.Sequential(conv(3, 6, groups=3), *tail(6)), ["2"], "0 is a depthwise convolution of channels"),
        (nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 8, groups=2), *tail(8)), ["4"], "2 is a grouped convolution"),
        (nn.Sequential(conv(3, 6), nn.LayerNorm([6, 10, 10]), *tail(6)), ["3"], "1 is a LayerNorm"),
        (nn.Sequential(conv(3, 6), nn.GroupNorm(2, 6), *tail(6)), ["3"], "1 is a GroupNorm"),
        (nn.Sequential(conv(3, 6), nn.PReLU(6), *tail(6)), ["3"], "1 is a PReLU"),
        (nn.Sequential(conv(3, 6), nn.BatchNorm2d(6, affine=False), *tail(6)), ["3"], "1 is a BatchNorm2d without"),
        (nn.Sequential(Residual(conv(3, 3, padding=1)), *tail(3)), ["2"], "0.body: a model without some"),
        (FixedSize(), ["second"], "first: a model without"),
        (tied(), ["0"], "6: 6.weight is shared with another layer"),
        (nn.Sequential(conv(3, 6), nn.Sigmoid(), Pools(), nn.Linear(6, 2)), None, "0: a model without some"),
        (nn.Sequential(conv(3, 6), nn.Softmax(1), Pools(), nn.Linear(6, 2)), None, "0: a model without some"),
        # a head that starts at zero hides what silent units send, yet it will not stay zero
        (zero_head(nn.Sequential(conv(3, 6), nn.Sigmoid(), Pools(), nn.Linear(6, 2))), None, "0: a model without"),
    ],
)
def test_units_that_cannot_be_taken_out_are_left_out_with_the_reason(caplog, net, found, reason):
    with caplog.at_level(logging.WARNING):
        if found is None:
            with pytest.raises(ValueError, match=reason):
                find_groups(net, image())
        else:
            assert [group.name for group in find_groups(net, image())] == found
    assert "leaves out the units of" in caplog.text and reason in caplog.text


def test_a_blank_example_finds_the_same_groups_as_any_other():
    # the grey image is broadcast over the units that are added to it, so a blank one would hide that it goes through
    net = nn.Sequential(Residual(conv(1, 3, padding=1)), *tail(3))
    for x in (image(1), torch.zeros(1, 1, 12, 12)):
        assert [group.name for group in find_groups(net, x)] == ["2"]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.LeakyReLU, nn.Identity])
def test_activations_that_map_zero_to_zero_are_taken(activation):
    net = nn.Sequential(conv(3, 6), activation(), Pools(), nn.Linear(6, 2))
    assert [group.name for group in find_groups(net, image())] == ["0"]


# ---- what the penalty sees


def mixed():
    """Batch norm after the first and the third convolution only."""
    body = [conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.ReLU(), conv(5, 6), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*body, Pools(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2))


def test_with_batch_norm_its_weight_and_the_next_input_are_lifted_else_the_row_or_what_is_free():
    assert {group.name: group.lifted for group in find_groups(mixed(), image())} == {
        "0": ("1.weight", "3.weight"),
        "3": ("5.weight",),  # its row belongs to group 0 already
        "5": ("6.weight", "9.weight"),
        "9": ("11.weight",),
    }
    found = find_groups(lenet(), image(1, 28))
    assert [group.lifted for group in found] == [("0.weight",), ("3.weight",), ("7.weight",)]


@pytest.mark.parametrize("unit", ["default", "row", "paper"])
@pytest.mark.parametrize("make, x", [(mixed, image()), (vgg, image(3, 16)), (resnet, image(3, 32))])
def test_no_tensor_is_lifted_twice_and_the_optimizer_takes_every_group(make, x, unit):
    model = make()
    groups = find_groups(model, x, unit=unit)
    lifted = [name for group in groups for name in group.lifted]
    assert lifted and len(lifted) == len(set(lifted))
    opt = SplitLBI(param_groups(model, groups), lr=0.1)
    for group, entry in zip([g for g in groups if g.lifted], opt.param_groups, strict=False):
        assert entry["units"] == group.units and entry["params"][0] is model.get_parameter(group.lifted[0])


def test_other_presets_lift_rows():
    model = vgg()
    rows, paper = (find_groups(model, image(3, 16), unit=unit) for unit in ("row", "paper"))
    assert [group.lifted for group in rows] == [("0.weight",), ("4.weight",), ("8.weight",), ("13.weight",)]
    assert [group.lifted for group in paper] == [("0.weight",), ("4.weight",), ("8.weight",), ()]
    assert [group.param_group()["scale"] for group in paper[:3]] == [[1.0]] * 3
    assert all(group.param_group()["scale"] != [1.0] for group in rows)
    with pytest.raises(ValueError, match="group '13' lifts no tensor"):
        paper[3].param_group()


def test_a_param_group_holds_plain_values_and_scales_every_tensor_to_a_mean_norm_of_one():
    model = randomise_norms(vgg())
    group = find_groups(model, image(3, 16))[2]
    entry = group.param_group()
    params, scale = entry.pop("params"), entry.pop("scale")
    assert entry == {"penalty": "group", "name": "8", "units": 10, "axis": [0, 1], "block": [1, 4]}
    assert params[0] is model[9].weight and params[1] is model[13].weight
    norms = [
        model[9].weight.detach().abs(),
        model[13].weight.detach().view(12, 10, 4).permute(1, 0, 2).flatten(1).norm(dim=1),
    ]
    assert all(type(value) is float for value in scale)
    for value, norm in zip(scale, norms, strict=True):
        assert value == pytest.approx(1 / norm.mean().item(), rel=1e-6)
    expected = sum((norm / norm.mean()).square() for norm in norms).sqrt()
    torch.testing.assert_close(group.norm(model), expected)


def test_a_param_group_can_take_its_tensors_from_a_copy_of_the_model():
    model = vgg()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.mul_(2)
    groups = find_groups(model, image(3, 16))
    mine, its = groups[0].param_group(), groups[0].param_group(twin)
    assert its["params"][0] is twin[1].weight and mine["params"][0] is model[1].weight
    assert its["scale"] == [pytest.approx(mine["scale"][0] / 2), mine["scale"][1]]


def test_a_zero_batch_norm_weight_is_not_lifted_and_one_that_became_zero_is_refused():
    model = vgg()
    nn.init.zeros_(model[5].weight)
    groups = find_groups(model, image(3, 16))
    assert groups[1].lifted == ("8.weight",) and groups[0].lifted == ("1.weight", "4.weight")
    nn.init.zeros_(model[1].weight)
    with pytest.raises(ValueError, match="1.weight of group '0' is all zeros"):
        groups[0].param_group()


@pytest.mark.parametrize("name, unit", list(itertools.product(NETS, ["default", "row", "paper"])))
def test_param_groups_hold_every_trainable_parameter_once(name, unit):
    model, x = build(name)
    groups = find_groups(model, x, unit=unit)
    frozen = next(tensor for tensor in reversed(list(model.parameters())))
    frozen.requires_grad_(False)
    result = param_groups(model, groups, weight_decay=0.01)
    ids = [id(p) for entry in result for p in entry["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for entry in result:
        assert entry["weight_decay"] == (0.01 if entry["name"] == "decay" else 0.0)
        if entry["name"] == "decay":
            assert all(p.ndim > 1 for p in entry["params"])
        elif entry["name"] == "no decay":
            assert all(p.ndim == 1 for p in entry["params"])
        else:
            assert entry["penalty"] == "group"
    assert sum(entry.get("penalty") == "group" for entry in result) == sum(bool(group.lifted) for group in groups)


def test_param_groups_take_single_weights_and_names_with_decay():
    model = lenet()
    groups = find_groups(model, image(1, 28), unit="paper")
    result = param_groups(model, groups, weight_decay=0.1, decay=["0.bias"], l1=["7.weight", "9.weight"])
    shown = [(entry["name"], entry.get("penalty"), entry["weight_decay"]) for entry in result]
    assert shown == [
        ("0", "group", 0.0),
        ("3", "group", 0.0),
        ("7.weight", "l1", 0.0),
        ("9.weight", "l1", 0.0),
        ("decay", None, 0.1),
        ("no decay", None, 0.0),
    ]
    assert [p is model[0].bias for p in result[4]["params"]] == [True]


def test_groups_of_another_model_are_refused():
    groups = find_groups(lenet(), image(1, 28))
    wider, longer = lenet(), nn.Sequential(lenet(), nn.Linear(10, 2))
    wider[0] = conv(1, 7, 5, padding=2)
    for other, name in ((wider, "0.weight"), (longer, "0.weight")):
        with pytest.raises(ValueError, match=f"group '0' is of another model: {name}.*call find_groups"):
            param_groups(other, groups)
    extended = lenet()
    extended.append(nn.Linear(10, 2))
    with pytest.raises(ValueError, match="10.weight has shape None there"):
        groups[0].param_group(extended)


def test_masking_zeroes_the_producers_of_the_units_that_go_and_nothing_else():
    model = randomise_norms(vgg())
    groups = find_groups(model, image(3, 16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask(model, groups, {"8": torch.tensor([0, 2, 9])})
    gone = [1, 3, 4, 5, 6, 7, 8]
    for name in ("8.weight", "9.weight", "9.bias"):
        before[name][gone] = 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_parametrised_weight_is_left_out_by_name(caplog):
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))
    net = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
    assert [group.name for group in find_groups(net, torch.randn(1, 1, 8, 8))] == ["2"]
    assert "0 has a parametrised weight" in caplog.text
