"""A latency budget: where it lands although measuring is noisy, and what makes a slim model as fast as a stock one."""

import copy
import math
import random

import pytest
import tiny_run
import torch
from models import NETS, build, resnet
from paths import ties_of
from torch import nn

from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.ties import config_ties, levels_of
from hf_effdl.structure.path.path import SparsePath
from hf_effdl.structure.slim.latency import measure_latency
from hf_effdl.structure.slim.report import effdl_report
from hf_effdl.structure.slim.slim import cut_copy, slim


def random_path(model, x, seed=0):
    groups = find_groups(model, x)
    draw = torch.Generator().manual_seed(seed)
    units = {
        group.name: {
            "entered": torch.full((group.units,), -1),
            "left": torch.full((group.units,), -1),
            "threshold": torch.ones(group.units),
            "dual": torch.rand(group.units, generator=draw) + 0.3,
            "weight": torch.rand(group.units, generator=draw),
        }
        for group in groups
    }
    return SparsePath(groups, units, 1, config_ties(model, groups))


def wide_resnet():
    return resnet(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 1])


@pytest.fixture(scope="module")
def paths():
    result = {name: random_path(*build(name)) for name in NETS}
    wide = wide_resnet()
    result["wide"] = random_path(wide, torch.zeros(1, 3, 32, 32))
    return result


def smooth(path):
    """A machine whose time is a fixed part and one that grows with the multiply-accumulates."""
    network = path.groups[0].network
    whole = network.count()["macs"]

    def cost(kept):
        share = network.count(path.groups, {name: len(index) for name, index in kept.items()})["macs"] / whole
        return 0.1 + 0.9 * share**0.8

    return cost


def stairs(path, block=16):
    """A machine that computes channels in blocks."""
    smooth_cost = smooth(path)
    units = {group.name: group.units for group in path.groups}

    def cost(kept):
        return smooth_cost(
            {name: range(min(units[name], math.ceil(len(i) / block) * block)) for name, i in kept.items()}
        )

    return cost


def noisy(cost, seed, spread=0.03, spikes=0.1):
    """Another program only ever makes a measurement longer: mostly a little, now and then three times."""
    draw = random.Random(seed)

    def measure(kept):
        return cost(kept) * (1 + draw.expovariate(1 / spread)) * (3 if draw.random() < spikes else 1)

    return measure


def grows(path, kept, cost, share, widths):
    """Whether some tie could have one step more."""
    sizes = {name: len(index) for name, index in kept.items()}
    for tie in ties_of(path, widths):
        larger = sizes | {name: sizes[name] + a for name, a in tie.shares.items()}
        inside = all(larger[name] <= len(path.units[name]["dual"]) for name in tie.shares)
        if inside and cost({name: range(n) for name, n in larger.items()}) <= share:
            return True
    return False


ASKED = [0.95, 0.9, 0.83, 0.75, 0.66, 0.6, 0.5, 0.45, 0.37, 0.3]


@pytest.mark.parametrize("widths", ["stock", "free"])
@pytest.mark.parametrize("name", [*NETS, "wide"])
def test_a_budget_is_met_within_a_tenth_although_measuring_is_noisy(paths, name, widths):
    path, met = paths[name], 0
    for seed, asked in enumerate(ASKED):
        for machine in (smooth, stairs) if name == "wide" else (smooth,):
            cost = machine(path)
            if cost(path.select(keep=1e-9, widths=widths)) > 0.95 * asked:
                continue  # hardly or not to be had
            met += 1
            kept = path.select(latency=asked, measure=noisy(cost, seed), widths=widths)
            assert cost(kept) <= 1.02 * asked, (asked, machine)
            if name == "wide":
                assert cost(kept) >= 0.9 * asked, (asked, machine, cost(kept) / asked)
            else:  # a unit of a small net may cost more than a tenth
                assert cost(kept) >= 0.9 * asked or not grows(path, kept, cost, 0.93 * asked, widths), asked
    assert met >= 6


def test_what_a_quiet_machine_measures_is_never_exceeded_and_repeats(paths):
    path = paths["wide"]
    for asked in ASKED:
        for machine in (smooth, stairs):
            calls = []
            cost = machine(path)

            def measure(kept, cost=cost, calls=calls):
                calls.append(kept)
                return cost(kept)

            kept = path.select(latency=asked, measure=measure)
            assert 0.9 * asked <= cost(kept) <= asked
            assert len(calls) < 60
            again = path.select(latency=asked, measure=cost)
            assert all(torch.equal(again[name], index) for name, index in kept.items())


def test_wide_groups_keep_blocks_of_sixteen_which_cost_no_more(paths):
    path = paths["wide"]
    cost, network = stairs(path), path.groups[0].network
    units = {group.name: group.units for group in path.groups}

    def macs(kept):
        return network.count(path.groups, {name: len(index) for name, index in kept.items()})["macs"]

    more = 0
    for asked in (0.8, 0.6, 0.5, 0.4):
        blocks, single = (path.select(latency=asked, measure=cost, round_to=r) for r in (None, 1))
        assert all(len(index) % 16 == 0 or len(index) == units[name] for name, index in blocks.items())
        assert any(len(index) % 16 for index in single.values())
        more += macs(blocks) > macs(single)
    assert more >= 3, "multiples should hold more channels in the same time"
    # a budget that is counted keeps the single unit
    counted = [path.select(macs=0.5, round_to=r) for r in (None, 1)]
    assert all(torch.equal(counted[0][name], index) for name, index in counted[1].items())


def test_small_groups_keep_four_sizes_at_least(paths):
    for name in ("lenet", "resnet", "wide"):
        for tie in ties_of(paths[name], "stock"):
            levels = levels_of(tie, None)
            chunk = min(tie.shares.values()) * levels[0]
            assert levels[-1] == tie.steps and (len(levels) >= 4 or tie.steps < 4)
            assert chunk in (1, 2, 4, 8, 16)
    assert levels_of(ties_of(paths["wide"], "stock")[-1], None)[:3] == [16, 32, 48]
    assert [levels_of(tie, None)[0] for tie in ties_of(paths["lenet"], "stock")] == [1, 4, 16]


def test_a_few_disturbed_measurements_refuse_no_budget(paths):
    path = paths["vgg"]
    cost, first = smooth(path), []

    def measure(kept):
        first.append(kept)
        return 10.0 if len(first) <= 4 else cost(kept)

    assert cost(path.select(latency=0.5, measure=measure)) <= 0.5
    least = f"{cost({group.name: range(1) for group in path.groups}):.4f}"
    with pytest.raises(ValueError, match=f"latency=0.2 is below what the smallest sizes cost .* which is {least}"):
        path.select(latency=0.2, measure=cost)
    # groups smaller than the multiple stay whole, so nothing can go
    with pytest.raises(ValueError, match="which is 1.0000 of the model; .* a smaller round_to than 64"):
        path.select(latency=0.5, measure=cost, round_to=64)
    with pytest.raises(ValueError, match="macs=0.5 is below .* a smaller round_to than 64"):
        path.select(macs=0.5, round_to=64)


# ---- as fast as a stock model of the same widths


def stock_like(small):
    return type(small)(small.config).eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["resnet", "bottleneck"])
def test_a_slim_model_has_all_that_makes_a_stock_model_of_its_widths_fast(name, layout, dtype):
    model, x = build(name)
    groups = find_groups(model, x)
    model.to(dtype=dtype, memory_format=layout)
    small = slim(model, groups, 0.5)
    stock = stock_like(small).to(dtype=dtype, memory_format=layout)
    assert [type(m) for m in small.modules()] == [type(m) for m in stock.modules()]
    mine, theirs = small.state_dict(), stock.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (mine[key].shape, mine[key].dtype) == (tensor.shape, tensor.dtype), key
        assert mine[key].stride() == tensor.stride(), key
        assert mine[key].untyped_storage().nbytes() == tensor.untyped_storage().nbytes(), key
    for module in small.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
        assert not getattr(module, "parametrizations", None)
    x = torch.randn(2, *x.shape[1:]).to(dtype=dtype, memory_format=layout)
    small.eval()
    stock.load_state_dict(mine)
    with torch.no_grad():
        torch.testing.assert_close(small(x).logits, stock(x).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.alone
def test_a_latency_asked_of_the_real_clock_is_met():
    model = resnet(embedding_size=64, hidden_sizes=[64, 128], depths=[1, 1]).eval()
    x = torch.randn(16, 3, 32, 32)
    path = random_path(model, x[:1])

    def measure(kept, **rounds):
        whole, part = measure_latency([model, cut_copy(model, path.groups, kept)], x, **rounds)
        return part / whole

    landed = []
    while len(landed) < 3 and not any(0.75 <= ratio <= 1.25 for ratio in landed):
        kept = path.select(latency=0.6, measure=lambda kept: measure(kept, repeats=9, seconds=0.002))
        landed.append(measure(kept) / 0.6)
    assert any(0.75 <= ratio <= 1.25 for ratio in landed), landed


# ---- the clock


def test_the_ratio_is_taken_within_a_round(monkeypatch):
    """A machine that gets slower and slower leaves the ratio of two models alone."""
    now, speed = [0.0], [1.0]

    def tick():
        return now[0]

    class Takes(nn.Linear):
        def __init__(self, seconds):
            super().__init__(2, 2)
            self.seconds = seconds

        def forward(self, x):
            now[0] += self.seconds * speed[0]
            speed[0] *= 1.05
            return super().forward(x)

    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(f"hf_effdl.structure.slim.latency.time.{name}", tick)
    slow, fast = measure_latency([Takes(0.4), Takes(0.1)], torch.zeros(1, 2), repeats=9, seconds=0.0)
    assert fast / slow == pytest.approx(0.25 * 1.05)
    speed[0] = 1.0
    [alone] = measure_latency([Takes(0.4)], torch.zeros(1, 2), repeats=9, seconds=0.0)
    assert alone == pytest.approx(400 * 1.05 ** (3 + 4))  # the median of nine rounds after three passes of warming up


def test_what_fails_while_it_is_timed_says_so():
    models = [nn.Linear(3, 3), nn.Linear(3, 3)]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        measure_latency(models, torch.zeros(2, 4))
    assert all(model.training for model in models)
    assert "while measuring latency" in caught.value.__notes__[0]


def test_a_report_without_latency_times_nothing(monkeypatch):
    model, x = build("vgg")
    groups = find_groups(model, x)
    small = slim(model, groups, 0.5)
    timed = effdl_report(model, small, x, groups, {"keep": 0.5})
    monkeypatch.setattr("hf_effdl.structure.slim.report.measure_latency", None)
    report = effdl_report(model, small, x, groups, {"keep": 0.5}, latency=False)
    assert report == {key: value for key, value in timed.items() if key not in ("latency_ms", "latency_batch")}


# ---- the trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tiny_run.trainer(
        str(tmp_path_factory.mktemp("run")), bf16=True, max_steps=4, eval_strategy="no", save_strategy="no"
    )
    run.train()
    return run


def test_the_trainer_reports_the_asked_and_the_measured_latency(run, monkeypatch):
    timed = []

    def clock(models, inputs, **options):  # a machine whose time is the number of parameters
        assert inputs["pixel_values"].shape == (64, 1, 16, 16)
        timed.append([copy.copy(model) for model in models])
        return [float(sum(p.numel() for p in net.parameters())) for net in models]

    monkeypatch.setattr("hf_effdl.structure.training.slimming.measure_latency", clock)
    monkeypatch.setattr("hf_effdl.structure.slim.report.measure_latency", clock)
    small = run.slim(latency=0.6, latency_batch=64)
    report = small.config.effdl_report
    assert report["budget"] == {"latency": 0.6} and 0.3 < report["latency_ms"]["ratio"] <= 0.6
    assert report["latency_ms"]["ratio"] == report["params"]["ratio"]
    # the report is a measurement of its own, of the model that is handed out
    assert sum(p.numel() for p in timed[-1][1].parameters()) == sum(p.numel() for p in small.parameters())


def test_without_latency_the_trainer_times_nothing(run, monkeypatch):
    for module in ("training.slimming", "slim.report"):
        monkeypatch.setattr(f"hf_effdl.structure.{module}.measure_latency", None)
    report = run.slim(macs=0.6, latency_batch=0).config.effdl_report
    assert "latency_ms" not in report and report["macs"]["ratio"] <= 0.6
    for asked in ({"latency": 0.5, "latency_batch": 0}, {"macs": 0.5, "latency_batch": -1}):
        with pytest.raises(ValueError, match=f"latency_batch={asked['latency_batch']}: it must be at least 1"):
            run.slim(**asked)


def test_a_slim_model_leaves_the_mixed_precision_of_its_training(run):
    assert hasattr(run.model, "_original_forward"), "nothing wrapped the trained model, so nothing is tested"
    small = run.slim(macs=0.6, latency_batch=0)
    assert "forward" not in vars(small) and not hasattr(small, "_original_forward")
    assert hasattr(run.model, "_original_forward")
    x = torch.randn(2, 1, 16, 16)
    stock = stock_like(small)
    stock.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(small.eval()(x).logits, stock(x).logits)


def test_an_error_of_the_deciding_process_is_raised_by_all(run, monkeypatch):
    heard = []
    monkeypatch.setattr("hf_effdl.processes.agreed", lambda value: heard.append(value) or value)
    with pytest.raises(ValueError, match="macs=0.0001 is below"):
        run.slim(macs=0.0001, latency_batch=0)
    assert [type(value) for value in heard] == [ValueError]

    def others(value):
        assert value is None, "only one process measures"
        return ValueError("said by the first")

    monkeypatch.setattr("hf_effdl.processes.agreed", others)
    monkeypatch.setattr("hf_effdl.processes.is_first", lambda: False)
    with pytest.raises(ValueError, match="said by the first"):
        run.slim(macs=0.5, latency_batch=0)
