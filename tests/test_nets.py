"""Nets beyond plain convolutions: MobileNetV2, ConvNeXt, concatenation, and layers as timm writes them."""

import copy
import itertools
import logging
import random

import pytest
import torch
from models import convnext, logits, mobilenet, randomise_norms, recount, resnet
from torch import nn
from torch.nn import functional as F
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, ResNetForImageClassification

import hf_effdl  # noqa: F401 - lets from_pretrained load slim sizes
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.surgery import cut, mask
from hf_effdl.structure.groups.ties import config_ties
from hf_effdl.structure.slim.slim import slim


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def conv(inputs, outputs, kernel=3, **kwargs):
    return nn.Conv2d(inputs, outputs, kernel, **kwargs)


def image(size=32, rows=2, channels=3):
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def lively(model, seed=0):
    """Weights under which every layer matters to the output, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        values = torch.randn(p.shape, generator=generator)
        p.copy_(values * (2 / p[0].numel()) ** 0.5 if p.ndim > 1 and p[0].numel() > 1 else 1 + 0.3 * values)
    return randomise_norms(model, seed).eval()


def some_units(groups, seed=0):
    draw = random.Random(seed)
    sizes = {group.name: draw.randint(1, group.units) for group in groups}
    return {group.name: torch.tensor(sorted(draw.sample(range(group.units), sizes[group.name]))) for group in groups}


@torch.no_grad()
def run(model, x):
    return logits(model(x))


def check_slim(model, groups, x, seed=0):
    """The slim model equals the masked one, in which every group counts, and has the sizes that were foretold."""
    lively(model)
    kept = some_units(groups, seed)
    small = slim(model, groups, kept)
    expected = run(mask(copy.deepcopy(model), groups, kept), x)
    size = expected.abs().max()
    assert (run(small, x) - expected).abs().max() <= 1e-5 * size
    for group in groups:
        if group.units > 1:
            alone = run(mask(copy.deepcopy(model), [group], {group.name: torch.arange(1)}), x)
            assert (alone - run(model, x)).abs().max() > 1e-4 * size, group.name
    counts = groups[0].network.count(groups, {name: len(index) for name, index in kept.items()})
    assert counts == recount(small, x)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
    return small


def check_loads(small, x, folder):
    """`from_pretrained` brings back the same model (to the last bit of a sum, which hangs on where weights lie)."""
    small.save_pretrained(folder)
    back = type(small).from_pretrained(folder).eval()
    expected = small.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    torch.testing.assert_close(run(back, x), run(small, x), rtol=1e-5, atol=1e-6)
    return back


def roles(group):
    return {(part.tensor, part.axis, part.block, part.role) for part in group.slices}


def produced(name, block=1, bias=True):
    """A layer whose outputs the units are."""
    return {(f"{name}.{leaf}", 0, block, role) for leaf, role in (("weight", "row"), ("bias", "bias"))[: 1 + bias]}


def batch_norm(name, block=1):
    parts = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var"}
    return {(f"{name}.{leaf}", 0, block, role) for leaf, role in parts.items()}


def reasons(caplog):
    return {
        record.args[0]: record.args[1] for record in caplog.records if record.msg.startswith("hf_effdl leaves out")
    }


# ---- MobileNetV2


def expected_groups(model):
    """Widths of a MobileNetV2 from its blocks: one per expansion, one per residual stream, the stem and the last."""

    def produced(layer):
        name = names[layer]
        return {(f"{name}.convolution.weight", 0, 1, "row"), *batch_norm(f"{name}.normalization")}

    def consumed(layer):
        return {(f"{names[layer]}.convolution.weight", 1, 1, "input")}

    names = {module: name for name, module in model.named_modules()}
    body = model.mobilenet_v2
    stem = body.conv_stem
    widths = [produced(stem.first_conv) | produced(stem.conv_3x3) | consumed(stem.reduce_1x1)]
    stream = produced(stem.reduce_1x1)
    for block in body.layer:
        stream |= consumed(block.expand_1x1)
        widths.append(produced(block.expand_1x1) | produced(block.conv_3x3) | consumed(block.reduce_1x1))
        if block.use_residual:
            stream |= produced(block.reduce_1x1)
        else:
            widths.append(stream)
            stream = produced(block.reduce_1x1)
    widths.append(stream | consumed(body.conv_1x1))
    return [*widths, produced(body.conv_1x1) | {("classifier.weight", 1, 1, "input")}]


@pytest.mark.parametrize("tf_padding", [True, False])
def test_the_groups_of_a_mobilenet_are_its_expansions_and_streams(tf_padding, caplog):
    model = mobilenet(tf_padding=tf_padding)
    with caplog.at_level(logging.WARNING):
        groups = find_groups(model, image())
    found, expected = [roles(group) for group in groups], expected_groups(model)
    assert len(found) == len(expected) == 25
    assert all(group in expected for group in found)
    assert not reasons(caplog)
    check_slim(model, groups, image())


def test_what_the_penalty_sees_of_an_expansion_are_its_batch_norms_and_the_projection():
    model = mobilenet()
    group = next(g for g in find_groups(model, image()) if g.name.endswith("layer.1.expand_1x1.convolution"))
    layer = "mobilenet_v2.layer.1"
    assert group.lifted == (
        f"{layer}.expand_1x1.normalization.weight",
        f"{layer}.conv_3x3.normalization.weight",
        f"{layer}.reduce_1x1.convolution.weight",
    )
    rows = next(g for g in find_groups(model, image(), unit="row") if g.name == group.name)
    assert rows.lifted == (f"{layer}.expand_1x1.convolution.weight", f"{layer}.conv_3x3.convolution.weight")


def test_a_slim_mobilenet_loads_trains_and_slims_again(tmp_path):
    model, x = mobilenet(), image(rows=4)
    small = check_slim(model, find_groups(model, x), x)
    back = check_loads(small, x, tmp_path / "one")
    groups = find_groups(back, x)
    back.train()(x, labels=torch.arange(4)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in back.parameters())
    # down to a single channel, where a depthwise convolution is an ordinary one
    kept = {group.name: torch.arange(1 if i % 3 else -(-group.units // 2)) for i, group in enumerate(groups)}
    smaller = slim(back.eval(), groups, kept)
    torch.testing.assert_close(run(smaller, x), run(mask(copy.deepcopy(back), groups, kept), x), rtol=1e-4, atol=1e-5)
    check_loads(smaller, x, tmp_path / "two")


@pytest.mark.parametrize("make", [mobilenet, lambda: mobilenet(expand_ratio=6), convnext])
def test_widths_that_a_config_cannot_say_one_by_one_are_free(make):
    # one multiplier, rounded to multiples of 8, makes every width of a MobileNetV2; that of a ConvNeXt's stream also
    # makes the hidden widths
    model = make()
    groups = find_groups(model, image())
    # the hidden widths of a MobileNetV2 have a number of their own, where it is a whole one
    assert [[*tie.fields] for tie in config_ties(model, groups)] in ([], [["expand_ratio"]])
    small = slim(model, groups, keep=0.5)
    sizes = small.config.quantization_config.layers
    assert sizes and all(part.block == 1 for group in groups for part in group.slices)
    assert {group.name: -(-group.units // 2) for group in groups} == {
        group.name: small.get_parameter(group.slices[0].tensor).shape[0] for group in groups
    }


class OwnHead(ResNetForImageClassification):
    """A ResNet with a hidden layer in front of the classes, whose width stands in the class and not in the config."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(config.hidden_sizes[-1], 10), nn.ReLU(), nn.Linear(10, 4)
        )


def test_the_config_stays_stock_until_a_free_width_changes():
    model = OwnHead(resnet().config)
    groups = find_groups(model, image())
    assert groups[-1].name == "classifier.1"
    assert config_ties(model, groups) == config_ties(model, groups[:-1]) and len(config_ties(model, groups)) == 2
    half = {group.name: range(group.units // 2) for group in groups}
    whole = {groups[-1].name: range(groups[-1].units)}
    configs = [slim(model, groups, keep).config for keep in (half | whole, half)]
    assert [hasattr(config, "quantization_config") for config in configs] == [False, True]


def test_full_size_nets_have_their_parameters_and_units():
    groups = find_groups(mobilenet(depth_multiplier=1.0, num_labels=1000), image())
    assert groups[0].network.count()["params"] == 3_504_872
    inputs = [16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160]
    streams = [16, 24, 32, 64, 96, 160, 320]
    assert sorted(group.units for group in groups) == sorted([32, *(6 * n for n in inputs), *streams, 1280])

    model = convnext(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], num_labels=1000)
    groups = find_groups(model, image())
    assert groups[0].network.count()["params"] == 28_589_128
    assert [group.units for group in groups] == [*[384] * 3, *[768] * 3, *[1536] * 9, *[3072] * 3]


# ---- ConvNeXt


def test_the_groups_of_a_convnext_are_its_hidden_layers_and_layer_norm_keeps_its_streams(caplog):
    model = convnext()
    with caplog.at_level(logging.WARNING):
        groups = find_groups(model, image())
    blocks = [name for name, module in model.named_modules() if hasattr(module, "pwconv1")]
    assert [group.name for group in groups] == [f"{name}.pwconv1" for name in blocks]
    assert [group.units for group in groups] == [32, 64, 96, 96, 128]
    for group, block in zip(groups, blocks, strict=True):
        assert roles(group) == {
            (f"{block}.pwconv1.weight", 0, 1, "row"),
            (f"{block}.pwconv1.bias", 0, 1, "bias"),
            (f"{block}.pwconv2.weight", 1, 1, "input"),
        }
    left_out = reasons(caplog)
    stage = "convnext.encoder.stages"
    assert list(left_out) and left_out.keys() == {
        "convnext.embeddings.patch_embeddings",
        *(f"{stage}.{i}.downsampling_layer.1" for i in (1, 2, 3)),
    }
    for name, reason in left_out.items():
        assert "layernorm is a LayerNorm, whose statistics run over them" in reason, (name, reason)


def test_a_slim_convnext_equals_the_masked_one_and_loads(tmp_path):
    model, x = convnext(), image()
    small = check_slim(model, find_groups(model, x), x)
    check_loads(small, x, tmp_path)


@pytest.mark.parametrize("scale", [1e-6, 0.0])
def test_a_layer_scale_neither_stops_nor_hides_anything(scale):
    assert len(find_groups(convnext(layer_scale_init_value=scale), image())) == 5
    # sigmoid(0) is not 0, so silent units still send; a layer scale of a millionth must not hide it
    with pytest.raises(ValueError, match="pwconv1: a model without some"):
        find_groups(convnext(layer_scale_init_value=scale, hidden_act="sigmoid"), image())


def test_response_norm_keeps_the_hidden_layers_of_a_convnext_v2():
    config = ConvNextV2Config(image_size=32, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    with pytest.raises(ValueError) as caught:
        find_groups(ConvNextV2ForImageClassification(config), image())
    assert "stages.0.layers.0.pwconv1: convnextv2.encoder.stages.0.layers.0.grn is a ConvNextV2GRN" in str(
        caught.value
    )
    assert "patch_embeddings: convnextv2.embeddings.layernorm is a LayerNorm" in str(caught.value)


# ---- depthwise convolutions by hand


class Pools(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Sum(nn.Module):
    """The sum of several branches of one input."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


def depthwise(inputs, times=1, **kwargs):
    return conv(inputs, inputs * times, groups=inputs, padding=1, **kwargs)


def test_a_depthwise_convolution_with_several_outputs_per_channel_is_part_of_the_unit():
    body = [conv(3, 4), depthwise(4, 2), nn.BatchNorm2d(8), nn.ReLU(), depthwise(8, 3, bias=False), nn.ReLU()]
    net = nn.Sequential(*body, conv(24, 5, 1), nn.ReLU(), Pools(), nn.Linear(5, 2))
    groups = find_groups(net, image(8))
    assert [(group.name, group.units) for group in groups] == [("0", 4), ("6", 5)]
    assert roles(groups[0]) == {
        *produced("0"),
        *produced("1", block=2),
        *batch_norm("2", 2),
        *produced("4", block=6, bias=False),
        ("6.weight", 1, 6, "input"),
    }
    small = check_slim(net, groups, image(8), seed=1)
    kept = small[0].out_channels
    assert kept < 4 and (small[1].in_channels, small[1].groups, small[1].out_channels) == (kept, kept, 2 * kept)
    assert (small[4].in_channels, small[4].groups, small[4].out_channels) == (2 * kept, 2 * kept, 6 * kept)
    full, less = recount(net, image(8)), recount(cut(net, groups[:1], {"0": torch.arange(3)}), image(8))
    assert (groups[0].params, groups[0].macs) == tuple(full[key] - less[key] for key in ("params", "macs"))


def test_a_depthwise_convolution_that_is_flattened_has_columns_per_output():
    net = nn.Sequential(conv(3, 6), depthwise(6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
    [group] = find_groups(net, image(8))
    assert ("4.weight", 1, 72, "input") in roles(group)
    check_slim(net, [group], image(8))


@pytest.mark.parametrize("order", [1, -1])
def test_branches_whose_units_have_several_channels_share_the_larger_unit(order):
    wide, narrow = nn.Sequential(conv(3, 12, 1), depthwise(12, 2)), nn.Sequential(conv(3, 6, 1), depthwise(6, 4))
    net = nn.Sequential(Sum(*[wide, narrow][::order], conv(3, 24, 1)), nn.ReLU(), Pools(), nn.Linear(24, 2))
    [group] = find_groups(net, image(8))
    assert group.units == 6
    found = sorted((part.block, part.role) for part in group.slices if part.role in ("row", "input"))
    assert found == [(1, "row"), (2, "row"), (4, "input"), (4, "row"), (4, "row"), (4, "row")]
    check_slim(net, [group], image(8))


def test_branches_whose_units_do_not_nest_are_left_out(caplog):
    wide, narrow = nn.Sequential(conv(3, 6, 1), depthwise(6, 2)), nn.Sequential(conv(3, 4, 1), depthwise(4, 3))
    net = nn.Sequential(Sum(wide, narrow), nn.ReLU(), conv(12, 5), nn.ReLU(), Pools(), nn.Linear(5, 2))
    with caplog.at_level(logging.WARNING):
        assert [group.name for group in find_groups(net, image(8))] == ["2"]
    [reason] = reasons(caplog).values()
    assert "has another number of outputs per unit" in reason


def test_depthwise_convolutions_of_one_and_three_axes():
    one = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv1d(8, 2, 3))
    three = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Conv3d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv3d(4, 2, 3))
    for net, x in ((one, torch.randn(1, 3, 12)), (three, torch.randn(1, 3, 8, 8, 8))):
        [group] = find_groups(net, x)
        lively(net)
        kept = {"0": torch.tensor([1, 3])}
        torch.testing.assert_close(run(slim(net, [group], kept), x), run(mask(net, [group], kept), x))


# ---- concatenation


class DenseLayer(nn.Module):
    """Batch norm over the concatenation, a bottleneck, and its few channels set behind the input."""

    def __init__(self, inputs, growth=4):
        super().__init__()
        first = [nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, 10, 1, bias=False)]
        self.body = nn.Sequential(*first, nn.BatchNorm2d(10), nn.ReLU(), conv(10, growth, padding=1, bias=False))

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


def test_of_a_densenet_the_bottlenecks_are_found_and_what_is_concatenated_is_left_out_by_name(caplog):
    body = [conv(3, 6, padding=1), DenseLayer(6), DenseLayer(10), nn.BatchNorm2d(14), nn.ReLU(), conv(14, 8, 1)]
    net = nn.Sequential(*body, DenseLayer(8), nn.BatchNorm2d(12), nn.ReLU(), Pools(), nn.Linear(12, 3))
    with caplog.at_level(logging.WARNING):
        groups = find_groups(net, image(12))
    assert [(group.name, group.units) for group in groups] == [(f"{i}.body.2", 10) for i in (1, 2, 6)]
    assert roles(groups[0]) == {
        ("1.body.2.weight", 0, 1, "row"),
        *batch_norm("1.body.3"),
        ("1.body.5.weight", 1, 1, "input"),
    }
    check_slim(net, groups, image(12))
    layers = {"0": "2.body.0", "1.body.5": "2.body.0", "2.body.5": "3", "5": "7", "6.body.5": "7"}
    assert reasons(caplog) == {
        name: f"a concatenation sets them beside other channels in {layer}" for name, layer in layers.items()
    }


class Concatenated(nn.Module):
    """Several branches of one input side by side."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def inner(units):
    return nn.Sequential(conv(3, units, 1), nn.ReLU(), conv(units, 4, padding=1))


@pytest.mark.parametrize(
    "net, found",
    [
        (Concatenated(inner(5), inner(6), conv(3, 4, 1)), ["0.branches.0.0", "0.branches.1.0"]),
        (Concatenated(nn.Identity(), inner(5), conv(3, 5, 1)), ["0.branches.1.0"]),  # beside the image itself
        (nn.Sequential(conv(3, 6, 1), Concatenated(nn.Identity(), nn.Identity())), []),  # twice the same
    ],
)
def test_side_by_side_branches_are_left_out_and_what_is_inside_them_is_found(net, found, caplog):
    net = nn.Sequential(net, nn.ReLU(), conv(12, 5), nn.ReLU(), Pools(), nn.Linear(5, 2))
    with caplog.at_level(logging.WARNING):
        groups = find_groups(net, image(8))
    assert [group.name for group in groups] == [*found, "2"]
    assert reasons(caplog) and all("concatenation sets them beside" in reason for reason in reasons(caplog).values())
    check_slim(net, groups, image(8))


class Shuffle(nn.Module):
    def forward(self, x):
        rows, channels, *size = x.shape
        return x.view(rows, 2, channels // 2, *size).transpose(1, 2).reshape(rows, channels, *size)


class Halves(nn.Module):
    def forward(self, x):
        left, right = x.chunk(2, 1)
        return left * right


class MeanOver(nn.Module):
    """Takes the mean over the channels away: no parameter tells that every unit touches all the others."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Normalised(nn.Module):
    def forward(self, x):
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


@pytest.mark.parametrize("mix, outputs", [(Shuffle(), 64), (Halves(), 32), (MeanOver(), 64), (Normalised(), 64)])
@pytest.mark.parametrize("deep", [False, True])
def test_units_that_are_shuffled_multiplied_or_normalised_together_are_never_found(mix, outputs, deep):
    rest = itertools.chain.from_iterable((conv(outputs, outputs, 1), nn.ReLU()) for _ in range(8 * deep))
    net = nn.Sequential(conv(3, 64, padding=1), mix, *rest, conv(outputs, 5, 1), nn.ReLU(), Pools(), nn.Linear(5, 2))
    names = [group.name for group in find_groups(net, image(8))]
    assert "0" not in names and str(2 + 16 * deep) in names


@pytest.mark.parametrize("mix", [MeanOver(), Normalised()])
def test_one_unit_among_many_is_not_lost_in_the_noise(mix):
    net = nn.Sequential(conv(3, 3000, 1), mix, conv(3000, 5, 1), nn.ReLU(), Pools(), nn.Linear(5, 2))
    assert [group.name for group in find_groups(net, image(8))] == ["2"]


@pytest.mark.parametrize("depth, variance", [(1, 1.0), (25, 1.0), (25, 1e4)])
def test_what_silent_units_send_is_heard_through_a_deep_net(depth, variance):
    # small fresh weights, or statistics of other inputs, make the signal fade to nothing on its way
    layers = [nn.Sequential(conv(8, 8, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(depth)]
    net = nn.Sequential(conv(3, 6), nn.Sigmoid(), conv(6, 8), *layers, Pools(), nn.Linear(8, 2))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(variance)
    names = [group.name for group in find_groups(net, image(8))]
    assert "0" not in names and names[0] == "2"


# ---- layers as timm writes them


class BatchNormAct(nn.BatchNorm2d):
    """Batch norm and activation in one layer."""

    def __init__(self, units, act=nn.ReLU):
        super().__init__(units)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SamePadded(nn.Conv2d):
    def forward(self, x):
        spread = self.kernel_size[0] - 1
        x = F.pad(x, [spread // 2, spread - spread // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Standardised(nn.Conv2d):
    """Weights are standardised over a row and scaled by a gain of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return F.conv2d(x, self.gain * (self.weight - mean) / (var + 1e-6).sqrt(), self.bias)


class SqueezeExcite(nn.Module):
    def __init__(self, units, squeezed):
        super().__init__()
        self.reduce, self.act, self.expand = conv(units, squeezed, 1), nn.SiLU(), conv(squeezed, units, 1)

    def forward(self, x):
        return x * self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class InvertedResidual(nn.Module):
    def __init__(self, units, hidden):
        super().__init__()
        self.widen, self.norm1 = SamePadded(units, hidden, 1, bias=False), BatchNormAct(hidden, nn.SiLU)
        self.filter, self.norm2 = (
            SamePadded(hidden, hidden, 3, groups=hidden, bias=False),
            BatchNormAct(hidden, nn.SiLU),
        )
        self.gate = SqueezeExcite(hidden, 3)
        self.project, self.norm3 = SamePadded(hidden, units, 1, bias=False), BatchNormAct(units, nn.Identity)

    def forward(self, x):
        hidden = self.gate(self.norm2(self.filter(self.norm1(self.widen(x)))))
        return x + self.norm3(self.project(hidden))


def test_subclasses_of_batch_norm_and_convolution_with_a_gate_are_found_by_what_they_are(caplog):
    blocks = [InvertedResidual(6, 10), InvertedResidual(6, 12)]
    net = nn.Sequential(SamePadded(3, 6, 4), BatchNormAct(6), *blocks, Pools(), nn.Linear(6, 2))
    with caplog.at_level(logging.WARNING):
        groups = find_groups(net, image(8))
    assert [group.name for group in groups] == ["0", "2.widen", "2.gate.reduce", "3.widen", "3.gate.reduce"]
    assert [group.units for group in groups] == [6, 10, 3, 12, 3]
    # the gate's outputs go with the channels that they multiply
    assert roles(groups[1]) == {
        *produced("2.widen", bias=False),
        *batch_norm("2.norm1"),
        *produced("2.filter", bias=False),
        *batch_norm("2.norm2"),
        *produced("2.gate.expand"),
        *((f"2.{reader}.weight", 1, 1, "input") for reader in ("gate.reduce", "project")),
    }
    assert not reasons(caplog)
    small = check_slim(net, groups, image(8))
    assert small[2].filter.groups == small[2].filter.in_channels == small[2].norm2.num_features


@pytest.mark.parametrize(
    "net, found, reason",
    [
        ([conv(3, 6), ChannelsFirstNorm(6), nn.ReLU()], ["3"], "0: 1 is a LayerNorm"),
        ([conv(3, 3), depthwise(3, 2), nn.GroupNorm(2, 6)], ["3"], "0: 2 is a GroupNorm"),
        ([Standardised(3, 6, 3), nn.ReLU()], ["2"], "0: 0 is a Standardised, which has parameters of its own"),
        ([conv(3, 6), BatchNormAct(6, nn.Sigmoid)], ["2"], "0: a model without some"),
        ([conv(3, 6), BatchNormAct(6, lambda: nn.PReLU(6))], ["2"], "0: a model without some"),
    ],
)
def test_subclasses_that_couple_units_or_add_parameters_are_left_out_by_name(net, found, reason, caplog):
    net = nn.Sequential(*net, conv(6, 7), nn.ReLU(), Pools(), nn.Linear(7, 2))
    with caplog.at_level(logging.WARNING):
        groups = find_groups(net, image(8))
    assert [group.name for group in groups] == found and reason in caplog.text
    check_slim(net, groups, image(8))


class Scaled(nn.Module):
    def __init__(self, body, units):
        super().__init__()
        self.body, self.gamma = body, nn.Parameter(torch.full((units,), 1e-6))

    def forward(self, x):
        return x + self.body(x) * self.gamma.view(1, -1, 1, 1)


def test_a_layer_scale_is_named_where_nothing_else_keeps_a_stream(caplog):
    net = nn.Sequential(conv(3, 6), Scaled(conv(6, 6, 1), 6), conv(6, 5), nn.ReLU(), Pools(), nn.Linear(5, 2))
    with caplog.at_level(logging.WARNING):
        assert [group.name for group in find_groups(net, image(8))] == ["2"]
    assert reasons(caplog) == {"0": "the bare parameter 1.gamma goes with them"}
