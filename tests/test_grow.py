"""Wider and deeper models: what they compute, what new units start with, configs, the way back, and refusals."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from models import NETS, build, convnext, logits, mobilenet, randomise_norms, resnet
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, ResNetBackbone, ResNetConfig, ResNetForImageClassification

from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.group import Slice, regroup
from hf_effdl.structure.groups.slim_config import SlimConfig
from hf_effdl.structure.growing.deepen import deepen
from hf_effdl.structure.growing.new_units import INITS
from hf_effdl.structure.growing.widen import widen, widen_groups
from hf_effdl.structure.slim.slim import slim


BIG = {
    "convnext": lambda: convnext(layer_scale_init_value=0.5),
    # dropout in front of the head would draw other numbers for more features
    "mobilenet": lambda: mobilenet(classifier_dropout_prob=0.0),
}
ALL = [*NETS, *BIG]


def multiplied():
    """Depthwise convolutions with one and with two outputs per channel, two and one."""
    layers = [nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()]
    layers += [nn.Conv2d(5, 10, 3, padding=1, groups=5), nn.BatchNorm2d(10), nn.ReLU()]
    layers += [nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.ReLU(), nn.Conv2d(10, 6, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 64, 3))


def net(name, seed=0, rows=4):
    """A net with the batch norms of a trained one, its groups, and a batch with labels; each caller has its own."""
    model, groups, *batch = known_net(name, seed, rows)
    return copy.deepcopy(model), groups, *batch


@cache
def known_net(name, seed, rows):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in NETS:
            model, x = build(name, seed, rows)
        elif name == "multiplied":
            model, x = multiplied(), torch.randn(rows, 1, 8, 8)
        else:
            model, x = BIG[name](), torch.randn(rows, 3, 32, 32)
    randomise_norms(model, seed)
    y = torch.arange(rows) % 3
    return model, find_groups(model, x), x, y


def gradmax_on(model, x, y):
    """Arguments of init="gradmax": transformers models make their own loss."""
    if hasattr(model, "config"):
        return {"batch": {"pixel_values": x, "labels": y}}
    return {"batch": x, "loss": lambda output: cross_entropy(output, y)}


def additions(groups):
    """Another number for every group; some get more new units than they have."""
    return {
        group.name: (1, 3, 2 * group.units + 1)[i % 3] if group.units < 20 else 2 for i, group in enumerate(groups)
    }


@torch.no_grad()
def outputs(model, x, training):
    return logits(copy.deepcopy(model).train(training)(x))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def parts(group, role):
    return [part for part in group.slices if part.role == role]


def tensor(model, part):
    path, _, leaf = part.tensor.rpartition(".")
    return getattr(model.get_submodule(path), leaf).detach()


def new(model, group, part):
    """The entries of the new units, unit by unit, where `group` is of the model before."""
    whole = tensor(model, part).movedim(part.axis, 0)
    return whole[group.units * part.block :].unflatten(0, (-1, part.block)).flatten(1)


def old(model, group, part):
    whole = tensor(model, part).movedim(part.axis, 0)
    return whole[: group.units * part.block].unflatten(0, (-1, part.block)).flatten(1)


# ---- what it computes


@pytest.mark.parametrize("init", ["zero-out", "split", "gradmax"])
@pytest.mark.parametrize("name", [*ALL, "multiplied"])
def test_a_wider_model_computes_the_same(name, init):
    if (name, init) == ("mobilenet", "gradmax"):
        pytest.skip("takes three seconds, and the test of the way back has it")
    model, groups, x, y = net(name)
    more = gradmax_on(model, x, y) if init == "gradmax" else {}
    big = widen_groups(model, groups, additions(groups), init, **more)
    wide = regroup(groups, big)
    assert {g.name: g.units for g in wide} == {g.name: g.units + additions(groups)[g.name] for g in groups}
    double, x2 = copy.deepcopy(model).double(), x.double()
    more = gradmax_on(double, x2, y) if init == "gradmax" else {}
    exact = widen_groups(double, groups, additions(groups), init, **more)
    for training in (False, True):
        reference, expected = outputs(double, x2, training), outputs(model, x, training)
        torch.testing.assert_close(outputs(exact, x2, training), reference, rtol=1e-11, atol=1e-12)
        # fifty layers on the statistics of four rows are themselves not exact to 1e-6 in single precision
        rounding = (expected - reference).abs().max().item()
        assert rounding < 2e-6 or name == "mobilenet"
        torch.testing.assert_close(outputs(big, x, training), expected, rtol=1e-6, atol=max(1e-6, 3 * rounding))
    # the groups found in the wider model are those it was told to have
    assert [(g.name, g.units, g.slices) for g in find_groups(big, x)] == [(g.name, g.units, g.slices) for g in wide]


@pytest.mark.parametrize("init", ["zero-out", "fresh-rows", "split"])
@pytest.mark.parametrize("name", ["lenet", "vgg", "resnet"])
def test_each_group_on_its_own_and_again(name, init):
    model, groups, x, _ = net(name, seed=1)
    for i, group in enumerate(groups):
        once = widen(model, group, 2, init)
        big = widen(once, regroup(groups, once)[i], 3, init)
        assert [g.units for g in regroup(groups, big)] == [g.units + 5 * (g is group) for g in groups]
        for training in (False, True):
            torch.testing.assert_close(outputs(big, x, training), outputs(model, x, training), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", ["zero-out", "gradmax", "fresh"])
@pytest.mark.parametrize("name", [*ALL, "multiplied"])
def test_slim_is_the_inverse_bit_by_bit(name, init):
    model, groups, x, y = net(name)
    before, grad_modes = state(model), [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    more = gradmax_on(model, x, y) if init == "gradmax" else {}
    big = widen_groups(model, groups, additions(groups), init, **more)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(state(model), before) and [p.requires_grad for p in model.parameters()] == grad_modes
    assert not {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in big.state_dict().values()}
    back = slim(big, regroup(groups, big), {group.name: torch.arange(group.units) for group in groups})
    assert same(state(back), before)
    torch.testing.assert_close(outputs(back, x, True), outputs(model, x, True), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_one_training_step_moves_the_new_outgoing_slices(name):
    model, groups, x, y = net(name, rows=8)
    big = widen_groups(model, groups, dict.fromkeys([group.name for group in groups], 8)).train()
    for group in groups:
        for part in parts(group, "input"):
            assert not new(big, group, part).any()
    cross_entropy(logits(big(x)), y).backward()
    torch.optim.SGD(big.parameters(), lr=0.1).step()
    for group in groups:
        moved = torch.cat([new(big, group, part) for part in parts(group, "input")], 1).any(1)
        assert moved.float().mean() > 0.2, f"{group.name}: a unit is only silent where a ReLU is"


def test_mode_dtype_memory_format_and_frozen_tensors_stay():
    model, groups, x, _ = net("resnet")
    model = model.to(torch.bfloat16, memory_format=torch.channels_last).eval()
    model.resnet.encoder.stages[0].train()
    model.resnet.embedder.requires_grad_(False)
    more = gradmax_on(model, x.bfloat16(), torch.tensor([0, 1, 2, 3]))
    for init in INITS:
        big = widen_groups(model, groups, {g.name: 8 if g.units == 8 else 16 for g in groups}, init, **more)
        assert [m.training for m in big.modules()] == [m.training for m in model.modules()]
        for (name, p), q in zip(model.named_parameters(), big.parameters(), strict=True):
            assert (p.dtype, p.requires_grad) == (q.dtype, q.requires_grad), name
            if p.ndim == 4 and p.shape[1] > 1:
                assert q.stride()[1] == 1, f"{name} lost its memory format"
        assert all(b.dtype == a.dtype for a, b in zip(model.buffers(), big.buffers(), strict=True))


def test_draws_depend_on_the_seed_and_on_nothing_else():
    model, groups, x, y = net("vgg")
    for init in INITS:
        more = gradmax_on(model, x, y) if init == "gradmax" else {}
        first, again = (widen(model, groups[1], 4, init, seed=5, **more) for _ in range(2))
        assert same(state(first), state(again))
        assert not same(state(first), state(widen(model, groups[1], 4, init, seed=6, **more)))
    alone = widen(model, groups[0], 4, seed=5)
    both = widen_groups(model, groups[::-1], {groups[2].name: 2, groups[0].name: 4}, seed=5)
    for part in groups[0].slices:
        assert torch.equal(tensor(alone, part), tensor(both, part))


def test_new_units_may_be_a_number_of_numpy_and_the_config_is_saved(tmp_path):
    model = resnet("basic")
    group = find_groups(model, {"pixel_values": torch.zeros(1, 3, 32, 32)})[0]
    big = widen(model, group, add=np.int64(2))
    big.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert same(state(saved), state(big)) and same(state(big), state(widen(model, group, add=2)))


def test_a_group_that_is_widened_again_draws_anew():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))  # no room outside the old rows
    [group] = find_groups(model, torch.zeros(1, 3))
    for init in ("zero-out", "fresh"):
        once = widen(model, group, 4, init)
        twice = widen(once, regroup([group], once)[0], 4, init)
        rows = nn.functional.normalize(twice[0].weight.detach()[6:])
        assert (rows @ rows.T - torch.eye(8)).abs().max() < 0.9999


# ---- what new units start with


@pytest.mark.parametrize("name", ["lenet", "vgg", "bottleneck", "multiplied"])
def test_zero_out_entries(name):
    model, groups, _, _ = net(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[0] *= -1  # a mean with signs would be too small
    big = widen_groups(model, groups, dict.fromkeys([group.name for group in groups], 7))
    for group in groups:
        for part in group.slices:
            before, after = old(model, group, part), new(big, group, part)
            mean = before.abs().mean() if part.role == "scale" else before.mean()
            if part.role in ("bias", "input"):
                assert not after.any()
            elif part.role != "row":
                torch.testing.assert_close(after, mean.expand_as(after))
            else:
                after = after[:, : before.shape[1]] if name != "bottleneck" else after
                torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1).mean().expand(7))


@pytest.mark.parametrize("name", ["lenet", "vgg", "resnet"])
def test_fresh_rows_are_as_long_as_those_of_a_new_layer_whatever_the_old_ones_are(name):
    model, groups, *_ = net(name)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    big, another = (
        widen_groups(model, groups, dict.fromkeys([g.name for g in groups], 7), "fresh-rows"),
        net(name, 9)[0],
    )
    for group in groups:
        for part in group.slices:
            if part.role == "row":
                length = old(another, group, part).norm(dim=1).mean().expand(7)
                torch.testing.assert_close(new(big, group, part).norm(dim=1), length, rtol=0.25, atol=0)
            else:
                assert (new(big, group, part) == float(part.role in ("scale", "var"))).all()


def test_new_rows_lie_outside_the_span_of_the_old_ones():
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():  # dependent rows take no room
        model[0].weight[3] = 2 * model[0].weight[1]
    [group] = find_groups(model, torch.zeros(1, 12))
    big = widen(model, group, 10)
    weight = big[0].weight.detach().double()
    length = model[0].weight.norm(dim=1).mean().double()
    gram = weight @ weight[5:].T
    expected = torch.cat([torch.zeros(5, 7), torch.eye(7)]).double() * length**2
    torch.testing.assert_close(gram[:12, :7], expected, atol=1e-6, rtol=0)
    # no room for the last three: drawn, as long as the others
    torch.testing.assert_close(weight[5:].norm(dim=1), length.expand(10), rtol=1e-6, atol=0)
    assert torch.linalg.matrix_rank(weight[12:]) == 3


def test_units_that_were_all_zero_do_not_stay_alone():
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    [group] = find_groups(model, torch.zeros(1, 6))
    torch.testing.assert_close(widen(model, group, 2)[0].weight[3:].norm(dim=1), torch.full((2,), 2**0.5))


@pytest.mark.parametrize("name", [*NETS, "multiplied"])
def test_split_units_are_copies_that_share_what_reads_them(name):
    model, groups, _, _ = net(name, seed=2)
    for group in groups:
        add = group.units + 2
        big = widen(model, group, add, "split")
        order = group.norm(model).argsort(descending=True).tolist()
        parents = torch.tensor((order * 2)[:add])
        shares = None
        for part in group.slices:
            before, kept, copies = old(model, group, part), old(big, group, part), new(big, group, part)
            if part.role != "input":
                if part.axis == 0 and any(p.tensor == part.tensor and p.role == "input" for p in group.slices):
                    continue  # the columns of a row that is also a reader are shared
                assert torch.equal(kept, before) and torch.equal(copies, before[parents])
                continue
            if any(p.tensor == part.tensor and p.role == "row" for p in group.slices):
                continue
            total = kept.clone().index_add_(0, parents, copies)
            torch.testing.assert_close(total, before, rtol=1e-6, atol=1e-7)
            ratio = torch.cat([kept, copies]).norm(dim=1) / torch.cat([before, before[parents]]).norm(dim=1)
            torch.testing.assert_close(ratio, ratio if shares is None else shares, rtol=1e-5, atol=0)
            shares = ratio
        thrice = order[:2]
        originals = torch.tensor([ratio for i, ratio in enumerate(shares[: group.units].tolist()) if i not in thrice])
        assert originals.min() > 0.5499 and originals.max() < 0.6001 and originals.std() > 0
        assert all(0.25 < shares[unit] < 0.45 for unit in thrice)


def test_units_without_copies_keep_their_entries_in_a_split():
    model, groups, _, _ = net("vgg")
    big = widen(model, groups[2], 3, "split")
    rest = groups[2].norm(model).argsort(descending=True)[3:]
    for part in groups[2].slices:
        assert torch.equal(old(big, groups[2], part)[rest], old(model, groups[2], part)[rest])


def outgoing_gradient(big, group, output_loss):
    """Norm of the loss gradient of the new outgoing slices, by plain autograd on the finished model."""
    big = copy.deepcopy(big)
    gradients = torch.autograd.grad(output_loss(big), [big.get_parameter(p.tensor) for p in parts(group, "input")])
    new_ones = [
        g.movedim(p.axis, 0)[group.units * p.block :].flatten()
        for g, p in zip(gradients, parts(group, "input"), strict=True)
    ]
    return torch.cat(new_ones).norm()


@pytest.mark.parametrize("add", [1, 3, 6])
def test_gradmax_reaches_the_closed_form_of_a_linear_net(add):
    def error(output):
        return (output - y).square().mean()

    shares = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 7))
        x, y = torch.randn(32, 10), torch.randn(32, 7)
        [group] = find_groups(model, x)
        big = widen(model, group, add, "gradmax", batch=x, loss=error)
        rows, length = big[0].weight[4:].detach(), model[0].weight.detach().norm(dim=1).mean()
        torch.testing.assert_close(rows @ rows.T, torch.eye(add) * length**2, rtol=0, atol=1e-5)
        # dL/dW_out = (sum of dL/dz x^T) R^T: largest for the first right singular vectors
        output = model(x)
        [slope] = torch.autograd.grad(error(output), output)
        optimum = length * torch.linalg.svdvals(slope.T @ x)[:add].square().sum().sqrt()
        shares.append((outgoing_gradient(big, group, lambda net: error(net(x))) / optimum).item())
        drawn = outgoing_gradient(widen(model, group, add), group, lambda net: error(net(x)))
        assert drawn < 0.95 * optimum or add == 6
    # singular values of noise may lie close together, and power iteration is slow then
    assert sorted(shares)[1] >= 0.99 and min(shares) >= 0.95 and max(shares) <= 1.0001, shares


@pytest.mark.parametrize("name", [*NETS, "multiplied"])
def test_gradmax_beats_the_draw_where_units_are_not_linear(name):
    model, groups, x, y = net(name, rows=8)
    model.eval()  # the norms take the statistics of the batch in any case, and the result keeps its own
    some = groups[:6]
    more, add = gradmax_on(model, x, y), {group.name: 3 for group in some}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    chosen, drawn = (widen_groups(model, groups, add, init, **more) for init in ("gradmax", "zero-out"))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(chosen.buffers(), drawn.buffers(), strict=True))

    def loss(big):
        return cross_entropy(logits(big.train()(x)), y)

    for group in some:
        ratio = outgoing_gradient(chosen, group, loss) / outgoing_gradient(drawn, group, loss)
        assert ratio > 1.05, group.name
        for part in parts(group, "row"):
            rows, before = new(chosen, group, part), old(model, group, part)
            torch.testing.assert_close(rows.norm(dim=1), before.norm(dim=1).mean().expand(3), rtol=1e-4, atol=0)
            inner = rows[:, : before.shape[1]]
            if inner.shape[1] >= 3 and rows.shape == inner.shape:
                gram = inner @ inner.T / inner.norm(dim=1).square().mean()
                torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=1e-4)


def test_gradmax_leaves_the_random_state_where_the_loss_draws():
    model, groups, x, y = net("lenet")
    random = torch.get_rng_state()
    widen(model, groups[2], 2, "gradmax", batch=x, loss=lambda out: cross_entropy(out * torch.rand(len(y), 1), y))
    assert torch.equal(torch.get_rng_state(), random)


def test_fresh_entries_are_those_of_a_new_layer():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU()]
    model = nn.Sequential(*first, nn.Conv2d(20, 30, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30 * 4, 9))
    randomise_norms(model)
    groups = find_groups(model, torch.zeros(1, 3, 4, 4))
    big = widen_groups(model, groups, {"0": 20, "3": 30}, "fresh")
    inner, last = big[3].weight, big[6].weight
    entries = [(big[0].weight[20:], 27), (inner[:30, 20:], 360), (inner[30:], 360), (last[:, 120:], 240)]
    for drawn, fan_in in entries:
        assert abs(drawn.std() * (fan_in / 2) ** 0.5 - 1) < 0.1
        assert abs(drawn.mean()) < 0.1 * drawn.std()
    for name, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
        assert torch.equal(getattr(big[1], name)[20:], torch.full((20,), float(value)))
        assert torch.equal(getattr(big[1], name)[:20], getattr(model[1], name))
    assert not big[3].bias[30:].any()
    x = torch.randn(2, 3, 4, 4)
    assert (outputs(big, x, False) - outputs(model, x, False)).abs().max() > 0.01


# ---- configs


@pytest.mark.parametrize("name", ["resnet", "bottleneck"])
def test_a_whole_tie_keeps_the_config_stock(name, tmp_path):
    model, groups, x, _ = net(name)
    model.config.effdl_report = {"of": "the model before"}
    stage = [group for group in groups if "stages.1" in group.name]
    big = widen_groups(model, groups, {group.name: group.units // 2 for group in stage})
    assert getattr(big.config, "quantization_config", None) is None and not hasattr(big.config, "effdl_report")
    assert big.config.hidden_sizes == [model.config.hidden_sizes[0], model.config.hidden_sizes[1] * 3 // 2]
    assert big.resnet.config is big.config and model.config.hidden_sizes != big.config.hidden_sizes
    del model.config.effdl_report
    back = slim(big, regroup(groups, big), {group.name: torch.arange(group.units) for group in groups})
    assert back.config.to_dict() == model.config.to_dict()
    big.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert same(state(loaded), state(big))


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "convnext"])
def test_a_single_group_goes_to_the_slim_config(name, tmp_path):
    model, groups, x, _ = net(name)
    big = widen(model, groups[1], 3)
    assert isinstance(big.config.quantization_config, SlimConfig)
    assert getattr(model.config, "quantization_config", None) is None
    big.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert same(state(loaded), state(big))
    torch.testing.assert_close(outputs(loaded, x, False), outputs(model, x, False), rtol=1e-6, atol=1e-6)
    # what was loaded can be widened again
    wider = widen(loaded, regroup(groups, loaded)[2], 2)
    assert len(wider.config.quantization_config.layers) > len(big.config.quantization_config.layers)


def test_a_group_that_a_number_of_its_own_sizes_stays_stock_alone():
    model, groups, _, _ = net("bottleneck")
    big = widen(model, groups[0], 4)
    assert big.config.embedding_size == 12 and getattr(big.config, "quantization_config", None) is None
    # as wide as the first stage, the stock class would build no shortcut there
    assert isinstance(widen(model, groups[0], 8).config.quantization_config, SlimConfig)


def test_growing_back_what_was_cut_and_cutting_what_was_grown_make_the_config_stock_again():
    model, groups, _, _ = net("resnet")
    big = widen(model, groups[1], 5)
    back = slim(big, regroup(groups, big), {groups[1].name: range(groups[1].units)})
    assert back.config.to_dict() == model.config.to_dict()
    small = slim(model, groups, {groups[1].name: [0, 1, 2]})
    again = widen(small, regroup(groups, small)[1], 5)
    assert again.config.to_dict() == model.config.to_dict()


def test_a_report_of_a_plain_module_is_not_handed_on():
    model, groups, x, _ = net("lenet")
    small = slim(model, groups, 0.5, example_inputs=x)
    assert hasattr(small, "effdl_report")
    assert not hasattr(widen(small, regroup(groups, small)[0]), "effdl_report")


# ---- refusals


def test_bad_arguments_are_refused_and_change_nothing():
    model, groups, x, y = net("vgg")
    other = net("lenet")[1]
    before, unrelated = state(model), torch.ones((), requires_grad=True).exp()
    slices = (Slice("15.weight", 0, 1, "row"), Slice("15.bias", 0, 1, "bias"))
    outputs_group = replace(groups[3], slices=slices, units=5)

    def gradmax(loss=None, batch=x):
        return lambda: widen(model, groups[0], init="gradmax", batch=batch, loss=loss)

    cases = [
        (TypeError, "find_groups", lambda: widen(model, "0")),
        (TypeError, "torch.nn.Module", lambda: widen({}, groups[0])),
        (TypeError, "list of Group", lambda: widen_groups(model, groups[0], {"0": 1})),
        (TypeError, "list of Group", lambda: widen_groups(model, ["0"], {"0": 1})),
        (TypeError, "by group name", lambda: widen_groups(model, groups, 8)),
        (TypeError, "whole number", lambda: widen(model, groups[0], 1.5)),
        (TypeError, "whole number", lambda: widen(model, groups[0], True)),
        (TypeError, "seed='a'", lambda: widen(model, groups[0], seed="a")),
        (ValueError, "add=0 for group '0'", lambda: widen(model, groups[0], 0)),
        (ValueError, "add=-3", lambda: widen(model, groups[0], -3)),
        (ValueError, "init='best'.*zero-out", lambda: widen(model, groups[0], init="best")),
        (ValueError, "'99', which is not among", lambda: widen_groups(model, groups, {"0": 1, "99": 1})),
        (ValueError, "nothing to widen", lambda: widen_groups(model, groups, {})),
        (ValueError, "another model.*find_groups", lambda: widen(model, other[0])),
        (ValueError, "outputs of the model", lambda: widen(model, outputs_group)),
        (ValueError, "needs batch=", lambda: widen(model, groups[0], init="gradmax")),
        (ValueError, 'no "loss".*labels', gradmax()),
        (ValueError, "one number.*shape \\(4, 5\\)", gradmax(lambda output: output)),
        (ValueError, "one number.*float", gradmax(lambda output: 1.0)),
        (ValueError, "no gradient", gradmax(lambda output: 0 * output.sum())),
        (ValueError, "no gradient", gradmax(lambda output: unrelated)),
        (ValueError, "not finite", gradmax(lambda output: cross_entropy(output, y), x / 0)),
    ]
    for kind, message, act in cases:
        with pytest.raises(kind, match=message):
            act()
    assert same(state(model), before)
    big = widen(model, groups[0])
    with pytest.raises(ValueError, match="another model"):
        widen(big, groups[0])  # groups of the model before


def test_shared_and_sharded_tensors_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = find_groups(model, torch.zeros(1, 4))
    model[2].weight = model[0].weight
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = replace(groups[0], network=replace(groups[0].network, shapes=shapes))
    with pytest.raises(ValueError, match="another layer shares 0.weight"):
        widen(model, tied)
    model, groups, _, _ = net("lenet")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="0.weight is sharded over processes"):
            widen(model, groups[0])
    finally:
        torch.distributed.destroy_process_group()


# ---- deeper


@pytest.mark.parametrize("stage", [0, 1, -1])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_deeper_model_computes_the_same(kind, stage, tmp_path):
    torch.manual_seed(0)
    model = randomise_norms(resnet(kind)).eval()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    before, random = state(model), torch.get_rng_state()
    model.config.effdl_report = {"of": "the model before"}
    big = deepen(model, stage)
    assert torch.equal(torch.get_rng_state(), random) and same(state(model), before) and not big.training
    depths = [2, 1]
    depths[stage] += 1
    assert big.config.depths == depths and model.config.depths == [2, 1] and big.resnet.config is big.config
    assert not hasattr(big.config, "effdl_report") and hasattr(model.config, "effdl_report")
    for training in (False, True):
        torch.testing.assert_close(outputs(big, x, training), outputs(model, x, training), rtol=1e-6, atol=1e-6)
    assert same({name: big.state_dict()[name] for name in before}, before)
    big.save_pretrained(tmp_path)
    loaded, report = ResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and same(state(loaded), state(big))
    assert getattr(loaded.config, "quantization_config", None) is None

    # it trains: first the weight that was zero, then the whole block
    fresh = [name for name, _ in big.named_parameters() if name not in before]
    assert len(fresh) == (6 if kind == "basic" else 9)
    optimizer, old_block = torch.optim.SGD(big.train().parameters(), lr=0.1), state(big)
    for moved in ([fresh[-2], fresh[-1]], fresh):
        optimizer.zero_grad()
        big(pixel_values=x, labels=y).loss.backward()
        optimizer.step()
        now = state(big)
        assert [name for name in fresh if not torch.equal(now[name], old_block[name])] == moved
    groups = find_groups(big, x)
    assert len(groups) == len(find_groups(model, x)) + (1 if kind == "basic" else 2)
    assert widen(big, groups[-1], 2).config.depths == depths


def test_deepening_keeps_dtype_format_and_frozen_stages_and_takes_a_seed():
    model = resnet("basic").to(torch.bfloat16, memory_format=torch.channels_last).eval()
    model.resnet.encoder.stages[1].train().requires_grad_(False)
    big = deepen(model, seed=3)
    block = big.resnet.encoder.stages[1].layers[-1]
    assert block.training and not any(p.requires_grad for p in block.parameters())
    assert {p.dtype for p in big.parameters()} == {torch.bfloat16}
    assert all(p.stride()[1] == 1 for p in block.parameters() if p.ndim == 4)
    assert same(state(big), state(deepen(model, seed=3))) and not same(state(big), state(deepen(model, seed=4)))
    again = deepen(deepen(big), 0)
    assert again.config.depths == [3, 3]
    x = torch.randn(2, 3, 32, 32).bfloat16()
    torch.testing.assert_close(outputs(again, x, False), outputs(model, x, False))


def test_a_backbone_can_be_deepened():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = randomise_norms(ResNetBackbone(config))
    x = torch.randn(2, 3, 32, 32)
    one, other = (net.eval()(x).feature_maps for net in (model, deepen(model, 0)))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_models_that_cannot_be_deepened_are_refused():
    model, groups, _, _ = net("resnet")
    cut = copy.deepcopy(model)
    cut.resnet.embedder.embedder.convolution.weight = nn.Parameter(torch.zeros(8, 3, 3, 3))
    cases = [
        (TypeError, "ResNet only, not Sequential", lambda: deepen(net("vgg")[0])),
        (TypeError, "ResNet only, not ConvNext", lambda: deepen(convnext())),
        (TypeError, "stage='last'", lambda: deepen(model, "last")),
        (ValueError, "stage=2: the model has 2 stages", lambda: deepen(model, 2)),
        (ValueError, "stage=-3", lambda: deepen(model, -3)),
        (ValueError, "SlimConfig", lambda: deepen(widen(model, groups[1], 1))),
        (ValueError, "hidden_act='gelu'", lambda: deepen(resnet(hidden_act="gelu"))),
        (ValueError, "convolution.weight has shape \\(8, 3, 3, 3\\)", lambda: deepen(cut)),
    ]
    for kind, message, act in cases:
        with pytest.raises(kind, match=message):
            act()
