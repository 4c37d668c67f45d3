"""The smaller model: what it computes, its sizes and config, how it loads in a fresh process, and what is reported."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from models import NETS, build, lenet, logits, randomise_norms, recount, vgg
from torch import nn
from transformers import AutoModelForImageClassification, ResNetForImageClassification

from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.slim_config import SlimConfig
from hf_effdl.structure.groups.surgery import mask
from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
from hf_effdl.structure.slim.latency import measure_latency
from hf_effdl.structure.slim.report import effdl_report
from hf_effdl.structure.slim.slim import slim


def trained(name, seed=0, rows=4):
    """A net with the batch norms of a trained one, its groups, and some inputs."""
    model, x = build(name, seed, rows)
    randomise_norms(model, seed).eval()
    return model, find_groups(model, x), x


def some_units(groups, seed, share=1.0):
    """Random kept units for a random part of the groups."""
    draw = random.Random(seed)
    return {
        group.name: torch.tensor(sorted(draw.sample(range(group.units), draw.randint(1, group.units))))
        for group in groups
        if draw.random() <= share
    }


@torch.no_grad()
def run(model, x):
    return logits(model(x))


# ---- what it computes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETS)
def test_a_slim_model_equals_the_masked_one(name, seed):
    model, groups, x = trained(name, seed)
    kept = some_units(groups, seed, share=1.0 if seed % 2 else 0.6)
    before = copy.deepcopy(model.state_dict())
    small = slim(model, groups, kept)
    expected = run(mask(copy.deepcopy(model), groups, kept), x)
    torch.testing.assert_close(run(small, x), expected, rtol=1e-5, atol=1e-5)
    assert (expected - run(model, x)).abs().max() > 1e-3, "nothing was cut, so nothing was tested"
    # the whole model has not moved, and shares nothing with the smaller one
    after = model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    pointers = {tensor.data_ptr() for tensor in after.values()}
    assert not pointers & {tensor.data_ptr() for tensor in small.state_dict().values()}


@pytest.mark.parametrize("name", NETS)
def test_a_slim_model_is_an_ordinary_smaller_model_of_the_same_class(name):
    model, groups, x = trained(name)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    kept = some_units(groups, 1)
    small = slim(model, groups, kept)
    assert type(small) is type(model) and small is not model and not small.training
    assert slim(model.train(), groups, kept).training
    assert [key for key, _ in small.named_parameters()] == [key for key, _ in model.named_parameters()]
    assert not next(iter(small.parameters())).requires_grad
    for key, tensor in small.state_dict().items():
        assert tensor.is_contiguous() and tensor.layout == torch.strided
        assert tensor.dtype == model.state_dict()[key].dtype
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert len(module.weight) == len(module.running_mean) == module.num_features
    assert f"Conv2d({x.shape[1]}, {len(kept[groups[0].name])}" in repr(small)
    assert recount(small, x) == groups[0].network.count(groups, {key: len(index) for key, index in kept.items()})


@pytest.mark.parametrize("name", ["lenet", "vgg"])
def test_a_slim_plain_module_exports(name):
    model, groups, x = trained(name)
    small = slim(model, groups, some_units(groups, 2))
    exported = torch.export.export(small, (x,))
    torch.testing.assert_close(exported.module()(x), small(x))
    assert {tuple(p.shape) for p in exported.parameters()} == {tuple(p.shape) for p in small.parameters()}


@pytest.mark.parametrize("name", NETS)
def test_a_slim_model_slims_again(name):
    model, groups, x = trained(name)
    kept = {group.name: torch.arange(group.units)[group.units % 2 :] for group in groups}
    once = slim(model, groups, kept)
    again = find_groups(once, x)
    assert [(g.name, g.units) for g in again] == [(g.name, len(kept[g.name])) for g in groups]
    # taking the same units out in one go or in two is the same
    second = {group.name: torch.arange(0, group.units, 2) for group in again}
    direct = {key: kept[key][index] for key, index in second.items()}
    two, one = slim(once, again, second).state_dict(), slim(model, groups, direct).state_dict()
    assert two.keys() == one.keys() and all(torch.equal(tensor, one[key]) for key, tensor in two.items())


def test_a_wrapper_that_borrows_a_config_slims_as_a_plain_module():
    class Wrapper(nn.Module):
        def __init__(self, inner, more):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, x):
            return self.inner(x).logits

    model = Wrapper(build("resnet")[0], None).eval()
    x = torch.randn(2, 3, 32, 32)
    groups = find_groups(model, x)
    kept = some_units(groups, 0)
    small = slim(model, groups, kept)
    torch.testing.assert_close(run(small, x), run(mask(model, groups, kept), x), rtol=1e-5, atol=1e-5)


# ---- which units, and how many


def test_a_share_keeps_the_units_of_largest_norm():
    model, groups, _ = trained("lenet")
    small = slim(model, groups, 0.5)
    for conv, old in ((small[0], model[0]), (small[7], model[7])):
        rows = old.weight.detach().flatten(1).norm(dim=1)
        best = rows.topk(len(rows) // 2).indices.sort().values
        assert torch.equal(conv.bias, old.bias[best])


def sizes(small, groups):
    tensors = dict(small.named_parameters())
    return [tensors[g.slices[0].tensor].shape[g.slices[0].axis] // g.slices[0].block for g in groups]


def test_sizes_round_up():
    model, groups, _ = trained("vgg")  # 6, 8, 10 and 12 units
    assert sizes(slim(model, groups, 0.5), groups) == [3, 4, 5, 6]
    assert sizes(slim(model, groups, 0.3), groups) == [2, 3, 3, 4]
    assert sizes(slim(model, groups, 0.001), groups) == [1, 1, 1, 1]
    assert sizes(slim(model, groups, 0.5, round_to=4), groups) == [4, 4, 8, 8]
    assert sizes(slim(model, groups, 0.9, round_to=8), groups) == [6, 8, 10, 12]
    assert sizes(slim(model, groups, 1.0), groups) == [6, 8, 10, 12]


def test_named_units_stay_and_rounding_adds_the_largest_of_the_others():
    model, groups, _ = trained("vgg")
    smallest = groups[2].norm(model).argsort()[:3]
    small = slim(model, groups, {"8": smallest}, round_to=4)
    assert sizes(small, groups) == [6, 8, 4, 12]
    norm = groups[2].norm(model)
    norm[smallest] = 0
    expected = torch.cat([smallest, norm.argmax()[None]]).sort().values
    assert torch.equal(small[8].weight, model[8].weight[expected])


def test_kept_units_may_be_any_list_of_indices_or_a_mask():
    model, groups, _ = trained("vgg")
    inside = [True, False, False, True, False, False]
    tensors = [torch.tensor(inside), torch.tensor([3, 0]), torch.tensor([0, 3], dtype=torch.int32), np.array([0, 3])]
    for index in ([0, 3], (3, 0), range(0, 4, 3), inside, *tensors):
        small = slim(model, groups, {"0": index})
        assert torch.equal(small[0].weight, model[0].weight[[0, 3]])
        assert sizes(small, groups) == [2, 8, 10, 12]


@pytest.mark.parametrize(
    "keep, message",
    [
        (0.0, "keep=0.0: a budget is a share"),
        (1.2, "keep=1.2: a budget is a share"),
        (-0.5, "keep=-0.5: a budget is a share"),
        (True, "keep=True: a budget is a share"),
        (None, "give exactly one of keep"),
        ({"stem": [0]}, "keep names group 'stem', which is not among \\['0', '4', '8', '13'\\]"),
        ({"0": []}, "keep\\['0'\\] must hold distinct unit indices, at least one"),
        ({"0": torch.zeros(6, dtype=torch.bool)}, "keep\\['0'\\] must hold distinct unit indices, at least one"),
        ({"0": [1, 1]}, "keep\\['0'\\] must hold distinct unit indices, at least one.* 6 units; got \\[1, 1\\]"),
        ({"0": [0.5]}, "keep\\['0'\\] must hold distinct unit indices"),
        ({"0": [[0, 1]]}, "keep\\['0'\\] must hold distinct unit indices"),
        ({"0": [True, False]}, "keep\\['0'\\] must hold distinct unit indices, at least one, or a mask of 6 units"),
        ({"0": [6]}, "keep\\['0'\\] holds unit 6; the group has 6 units, 0 to 5"),
        ({"0": [2, -1]}, "keep\\['0'\\] holds unit -1; the group has 6 units"),
        ({"0": "half"}, "keep\\['0'\\]='half': it must be unit indices or a mask"),
    ],
)
def test_bad_kept_units_are_refused_before_anything_is_cut(keep, message):
    model, groups, _ = trained("vgg")
    with pytest.raises((ValueError, TypeError), match=message):
        slim(model, groups, keep)


def test_groups_of_another_model_are_refused():
    model, groups, x = trained("vgg")
    small = slim(model, groups, 0.5)
    with pytest.raises(
        ValueError, match="group '0' is of another model: 0.weight .*call find_groups on this Sequential"
    ):
        slim(small, groups, 0.5)
    with pytest.raises(ValueError, match="slim got no groups"):
        slim(model, [], 0.5)


def test_numbers_of_numpy_and_torch_are_numbers():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    groups = find_groups(model, np.zeros((1, 1, 8, 8)))
    for keep in (np.float32(0.5), torch.tensor(0.5), {"0": np.float32(0.5)}):
        assert slim(model, groups, keep)[0].out_channels == 4
    assert slim(model, groups, {"0": np.array([0, 2, 5], dtype=np.uint16)}, round_to=np.int64(2))[0].out_channels == 4
    for keep in (np.bool_(True), torch.tensor(True), np.array([0.5, 0.5])):
        with pytest.raises(ValueError, match="a budget is a share of the whole model"):
            slim(model, groups, keep)
    with pytest.raises(ValueError, match="0s and 1s of torch.uint8 are no mask, make them bool"):
        slim(model, groups, {"0": np.array([0, 1] * 4, dtype=np.uint8)})
    for round_to in (np.bool_(True), True, np.float64(2), 0):
        with pytest.raises(ValueError, match="round_to=.* must be a whole number, at least 1"):
            slim(model, groups, 0.5, round_to=round_to)


# ---- configs, and loading in a fresh process


def test_a_uniform_share_gives_a_stock_config():
    model, groups, _ = trained("resnet")
    small = slim(model, groups, 0.5)
    assert (small.config.embedding_size, small.config.hidden_sizes) == (4, [4, 8])
    assert getattr(small.config, "quantization_config", None) is None
    assert small.resnet.config is small.config
    assert (model.config.embedding_size, model.config.hidden_sizes) == (8, [8, 16])
    model, groups, _ = trained("bottleneck")
    small = slim(model, groups, 0.75)
    assert (small.config.embedding_size, small.config.hidden_sizes) == (6, [12, 24])
    assert getattr(small.config, "quantization_config", None) is None


def test_tied_indices_give_a_stock_config_and_others_the_sizes_of_the_layers():
    model, groups, _ = trained("resnet")
    names = [group.name for group in groups]
    tied = slim(model, groups, {name: range(5) for name in names[:3]} | {name: range(9) for name in names[3:]})
    assert (tied.config.embedding_size, tied.config.hidden_sizes) == (5, [5, 9])
    assert getattr(tied.config, "quantization_config", None) is None
    free = slim(model, groups, {names[1]: range(5)})
    values = free.config.quantization_config.to_dict()
    # the inner width of the first layer: its first convolution and norm, and what its second convolution reads
    assert values["quant_method"] == "hf_effdl" and values["layers"] == {"2": [5, None], "3": [5], "4": [None, 5]}
    assert getattr(model.config, "quantization_config", None) is None


def test_sizes_that_would_lose_a_shortcut_are_not_called_stock():
    # a stem as wide as the first stage would be built without the shortcut that this model has
    model, groups, x = trained("bottleneck")
    keep = {groups[1].name: range(8)} | {group.name: range(2) for group in groups[2:6]}
    small = slim(model, groups, keep)
    assert small.config.quantization_config.quant_method == "hf_effdl"


@pytest.mark.parametrize("name", ["resnet", "bottleneck"])
def test_free_widths_load_exactly_and_go_on_as_any_model(name, tmp_path):
    """Fresh processes, with the package and without, are in test_hub_structure."""
    model, groups, x = trained(name)
    small = slim(model, groups, {group.name: range(1, group.units, 1 + i % 3) for i, group in enumerate(groups)})
    small.save_pretrained(tmp_path / "free")
    assert small.config.quantization_config.quant_method == "hf_effdl"
    load = AutoModelForImageClassification.from_pretrained
    half = load(tmp_path / "free", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16, torch.int64}
    loaded = load(tmp_path / "free").eval()
    assert type(loaded) is type(model) and torch.equal(run(loaded, x), run(small, x))
    loaded.train()(pixel_values=x, labels=torch.zeros(len(x), dtype=torch.long)).loss.backward()
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in loaded.parameters())
    twice = slim(loaded.eval(), find_groups(loaded, x), 0.5)
    twice.save_pretrained(tmp_path / "twice")
    assert torch.equal(run(load(tmp_path / "twice").eval(), x), run(twice, x))
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in loaded.parameters())


def test_a_config_keeps_the_sizes_when_written_and_read():
    model, groups, _ = trained("resnet")
    small = slim(model, groups, some_units(groups, 3))
    values = json.loads(small.config.to_json_string())["quantization_config"]
    back = SlimConfig.from_dict(values)
    assert back.layers == small.config.quantization_config.layers and back.count == 17
    assert SlimConfig.of(small).to_dict() == values


def test_slim_sizes_of_another_architecture_are_refused(tmp_path):
    model, groups, _ = trained("resnet")
    slim(model, groups, {groups[1].name: range(3)}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"depths": [1, 1]}, "for a model with 17 sized layers, but ResNetForImageClassification has 13"),
        (
            {"quantization_config": {**config["quantization_config"], "layers": {"0": [8]}}},
            "layer 0 of this checkpoint has sizes \\[8\\], which do not fit a Conv2d",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            ResNetForImageClassification.from_pretrained(tmp_path)


# ---- batch norm


def batches(count, rows=6, shape=(3, 16, 16)):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows + i, *shape, generator=draw) * (1 + i) for i in range(count)]


def test_recalibrated_statistics_are_plain_averages_over_batches():
    model = randomise_norms(vgg())
    recalibrate_batch_norm(model, batches(3))
    means, variances = {}, {}
    for batch in batches(3):
        h = batch.double()
        for i, module in enumerate(model):
            module = copy.deepcopy(module).double()
            if isinstance(module, nn.BatchNorm2d):
                # unbiased, as torch records it; the batch itself is normalised by the biased one
                means.setdefault(i, []).append(h.mean((0, 2, 3)))
                variances.setdefault(i, []).append(h.var((0, 2, 3), unbiased=True))
                spread = (h.var((0, 2, 3), unbiased=False) + module.eps).sqrt()
                h = (h - means[i][-1][:, None, None]) / spread[:, None, None]
                h = h * module.weight[:, None, None] + module.bias[:, None, None]
            elif i < 12:
                h = module(h)
    for i in (1, 5, 9):
        for recorded, values in ((model[i].running_mean, means[i]), (model[i].running_var, variances[i])):
            expected = sum(values) / len(values)
            torch.testing.assert_close(recorded.double(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_recalibration_touches_nothing_but_the_statistics():
    model = nn.Sequential(nn.Dropout(0.5), *vgg())
    model[2].momentum = 0.3
    model.train()
    model[6].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    assert recalibrate_batch_norm(model, batches(2)) is model
    assert torch.equal(torch.get_rng_state(), state), "dropout must sleep meanwhile"
    assert [m.training for m in model.modules()] == modes
    assert [model[i].momentum for i in (2, 6, 10)] == [0.3, 0.1, 0.1]
    changed = {
        key.rpartition(".")[2] for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])
    }
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert not any(p.grad is not None for p in model.parameters())


def test_recalibration_that_fails_restores_modes_and_momenta():
    model = randomise_norms(vgg()).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no batches"):
        recalibrate_batch_norm(model, iter([]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(model, [torch.zeros(2, 3, 16, 16), torch.zeros(2, 5, 16, 16)])
    assert all(m.training for m in model.modules()) and model[1].momentum == 0.1
    assert recalibrate_batch_norm(plain := lenet(), []) is plain


def test_recalibration_takes_keyword_batches():
    model, _, x = trained("resnet")
    twin = copy.deepcopy(model)
    recalibrate_batch_norm(model, [{"pixel_values": x}])
    recalibrate_batch_norm(twin, [x])
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_random_states_are_kept():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    with pytest.raises(KeyError), random_state_kept():
        torch.rand(3), random.random(), np.random.rand(3)
        assert not any(a == b for a, b in zip(states(), before, strict=True))
        raise KeyError
    assert states() == before


# ---- what it bought


def test_latencies_are_taken_in_turns_and_modes_come_back():
    order = []
    models = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)]
    for i, model in enumerate(models):
        model.register_forward_hook(lambda module, received, output, i=i: order.append((i, module.training)))
    models[0].train()
    models[1].train()[0].eval()
    modes = [[m.training for m in model.modules()] for model in models]
    times = measure_latency(models, torch.zeros(2, 4), repeats=3, seconds=0)
    assert len(times) == 2 and all(time > 0 for time in times)
    assert [[m.training for m in model.modules()] for model in models] == modes
    assert not any(training for _, training in order)
    assert [i for i, _ in order][-6:] == [0, 1] * 3


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_the_report_says_what_was_counted(name):
    model, groups, x = trained(name)
    kept = some_units(groups, 5)
    small = slim(model, groups, kept)
    model.train()
    inputs = {"pixel_values": x} if name == "resnet" else x
    state = torch.get_rng_state()
    report = effdl_report(model, small, inputs, groups, {"keep": 0.5})
    assert torch.equal(torch.get_rng_state(), state) and model.training and not small.training
    assert json.loads(json.dumps(report)) == report
    before, after = recount(model, x), recount(small, x)
    for key in ("params", "macs"):
        ratio = round(after[key] / before[key], 6)
        assert report[key] == {"before": before[key], "after": after[key], "ratio": ratio}
    assert report["units"] == {
        group.name: {"before": group.units, "after": len(kept.get(group.name, range(group.units)))} for group in groups
    }
    assert report["budget"] == {"keep": 0.5} and report["latency_batch"] == 4 and report["device"] == "cpu"
    assert report["latency_ms"]["before"] > 0 and report["latency_ms"]["after"] > 0


def test_slim_reports_what_it_bought_where_it_has_inputs_to_measure_with(tmp_path):
    model, inputs = build("lenet")
    small = slim(model, find_groups(model, inputs), 0.5, example_inputs=inputs)
    assert small.effdl_report["params"]["after"] == sum(p.numel() for p in small.parameters())
    assert small.effdl_report["budget"] == {"keep": 0.5} and small.effdl_report["latency_ms"]["ratio"] > 0
    model, inputs = build("resnet")
    groups = find_groups(model, inputs)
    small = slim(model, groups, {groups[0].name: [0, 1, 2]}, example_inputs=(inputs,))
    assert small.config.effdl_report["units"][groups[0].name]["after"] == 3
    assert small.config.effdl_report["budget"][groups[0].name] == 3
    small.save_pretrained(tmp_path)
    loaded = ResNetForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.effdl_report == small.config.effdl_report
    again = slim(loaded, find_groups(loaded, inputs), 0.5)
    assert not hasattr(again.config, "effdl_report"), "it would say of this model what holds for the one before"
