"""The sparse path: what it reads from the optimizer, which units a budget keeps, ties of a config, and its file."""

import copy
import math
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, resnet
from paths import ties_of
from torch import nn

from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.param_groups import param_groups
from hf_effdl.structure.groups.ties import Tie, config_ties, stock_config
from hf_effdl.structure.optim.split_lbi import SplitLBI
from hf_effdl.structure.path.budget import cut_list
from hf_effdl.structure.path.path import FILE_NAME, SparsePath


quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


def _bare(name):
    model, x = build(name)
    groups = find_groups(model, x)
    return model, groups, config_ties(model, groups)


NETS = {name: _bare(name) for name in ("lenet", "vgg", "resnet", "bottleneck")}


def random_path(name, seed, ties=True):
    """A path such as a run could have left it, with scores drawn from `seed`."""
    _, groups, found = NETS[name]
    draw = torch.Generator().manual_seed(seed)
    units = {}
    for group in groups:
        threshold = torch.rand(group.units, generator=draw) + 0.5
        # some groups end far above their thresholds and some far below, as different layers do
        scale = 3 * torch.rand((), generator=draw)
        dual = scale * torch.rand(group.units, generator=draw)
        entered = torch.randint(1, 9, (group.units,), generator=draw)  # many units enter at the same step
        never = torch.rand(group.units, generator=draw) < 0.3
        units[group.name] = {
            "entered": torch.where(never, -1, entered),
            "left": torch.full((group.units,), -1),
            "threshold": threshold,
            "dual": dual,
            "weight": torch.rand(group.units, generator=draw),
        }
    return SparsePath(groups, units, 10, found if ties else ())


def sizes_of(kept):
    return {name: len(index) for name, index in kept.items()}


def share_of(path, kept, budget):
    network = path.groups[0].network
    return network.count(path.groups, sizes_of(kept))[budget] / network.count()[budget]


# ---- what is read from the optimizer


def norms(tensors, entry):
    """Of every unit over its slices, one by one."""
    slices = list(zip(tensors, entry["axis"], entry["block"], entry["scale"], strict=True))
    total = [sum(s**2 * (t.narrow(a, u * b, b) ** 2).sum() for t, a, b, s in slices) for u in range(entry["units"])]
    return torch.stack(total).sqrt().detach()


def test_a_path_is_what_the_optimizer_had_when_it_was_read():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    groups = find_groups(model, torch.zeros(1, 2, 2, 2))
    opt = SplitLBI(param_groups(model, groups), lr=0.1, kappa=1.5, nu=2.0, path_scale=0.7, momentum=0.0)
    alive = {p: (torch.arange(len(p)) > 0).view(-1, *[1] * (p.ndim - 1)) for p in model.parameters()}
    pushes = {p: torch.randn(p.shape) * mask for p, mask in alive.items()}
    early = SparsePath.from_optimizer(opt, groups)
    for step in range(1, 151):  # there and back again, so that units also leave
        for p in model.parameters():
            p.grad = 3 * pushes[p] * math.sin(step / 12)
        opt.step()
    path = SparsePath.from_optimizer(SimpleNamespace(optimizer=opt), groups)  # as Accelerate wraps it
    assert (early.step, path.step) == (0, 150) and list(path.units) == ["0", "4"]
    assert not any(unit["dual"].any() for unit in early.units.values()), "it does not follow the optimizer"
    fates = []
    for entry in opt.param_groups[:2]:
        unit, state = path.units[entry["name"]], opt.state[entry["params"][0]]
        assert torch.equal(unit["entered"], state["entered"]) and torch.equal(unit["left"], state["left"])
        torch.testing.assert_close(unit["threshold"], state["threshold"])
        torch.testing.assert_close(unit["weight"], norms(entry["params"], entry))
        torch.testing.assert_close(unit["dual"], norms([opt.dual(p) for p in entry["params"]], entry))
        inside = norms([opt.gamma(p) for p in entry["params"]], entry) > 0
        assert torch.equal(path.support[entry["name"]], inside)
        assert path.support_share()[entry["name"]] == pytest.approx(inside.float().mean().item())
        fates += zip((unit["entered"] > 0).tolist(), inside.tolist())
    assert set(fates) == {(False, False), (True, False), (True, True)}, "the run must show all three fates"


def test_before_the_first_step_no_unit_is_in():
    model, groups, _ = NETS["vgg"]
    path = SparsePath.from_optimizer(SplitLBI(param_groups(model, groups), lr=0.1), groups)
    assert path.step == 0 and not any(inside.any() for inside in path.support.values())
    assert all((entered == -1).all() for entered in path.entered.values())
    assert sizes_of(path.select(keep=0.5)) == {"0": 3, "4": 4, "8": 5, "13": 6}


def test_an_optimizer_without_these_groups_is_refused():
    model, groups, _ = NETS["lenet"]
    opt = SplitLBI(param_groups(model, groups[:1]), lr=0.1)
    with pytest.raises(
        ValueError, match="does not lift group '3' \\(2 in all are missing\\).*\\['0'\\].*param_groups"
    ):
        SparsePath.from_optimizer(opt, groups)


# ---- who goes first


@pytest.mark.parametrize("seed", range(3))
def test_the_default_score_is_dual_over_threshold_over_its_mean_in_the_layer(seed):
    path = random_path("vgg", seed)
    for name, score in path.scores().items():
        unit = path.units[name]
        ratios = [d / t for d, t in zip(unit["dual"].tolist(), unit["threshold"].tolist(), strict=True)]
        mean = sum(ratios) / len(ratios)
        torch.testing.assert_close(score, torch.tensor([ratio / mean for ratio in ratios]))


@pytest.mark.parametrize("seed", range(3))
def test_entry_order_is_by_entry_step_then_by_larger_norm_with_never_last(seed):
    path = random_path("resnet", seed)
    for name, score in path.scores("entry").items():
        unit = path.units[name]
        keys = [
            (e if e > 0 else math.inf, -w)
            for e, w in zip(unit["entered"].tolist(), unit["weight"].tolist(), strict=True)
        ]
        best_first = sorted(range(len(keys)), key=keys.__getitem__)
        assert score.argsort(descending=True).tolist() == best_first
        n = len(keys)
        assert score.sort().values.tolist() == pytest.approx([(i + 1) / n for i in range(n)])


def greedy(path, widths, budget, share, order, round_to):
    """Narrow the tie of the lowest mean score, one level at a time, until the budget holds, then put back what fits,
    last out first; None if the budget cannot be held."""
    network, ties = path.groups[0].network, ties_of(path, widths)
    ranked = {name: sorted(score.tolist(), reverse=True) for name, score in path.scores(order).items()}
    steps = [tie.steps for tie in ties]

    def sizes(steps):
        return {name: n * a for n, tie in zip(steps, ties, strict=True) for name, a in tie.shares.items()}

    def holds(steps):
        return network.count(path.groups, sizes(steps))[budget] <= share * network.count()[budget]

    out = []
    while not holds(steps):
        candidates = []
        for i, (n, tie) in enumerate(zip(steps, ties, strict=True)):
            below = (n - 1) // round_to * round_to
            parts = [ranked[name][below * a : n * a] for name, a in tie.shares.items()]
            if below >= 1:
                candidates.append((sum(sum(part) / len(part) for part in parts) / len(parts), i, below))
        if not candidates:
            return None
        _, i, below = min(candidates)
        out.append((i, below, steps[i]))
        steps[i] = below
    for i, below, before in reversed(out):
        if steps[i] == below and holds(steps[:i] + [before] + steps[i + 1 :]):
            steps[i] = before
    return sizes(steps)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("widths, round_to", [("stock", 1), ("free", 1), ("free", 2), ("free", 3)])
def test_widths_equal_taking_out_the_lowest_score_one_by_one(name, budget, widths, round_to):
    for seed, share in enumerate((0.9, 0.6, 0.35, 0.2)):
        path = random_path(name, seed)
        for order in ("dual", "entry", "even"):
            expected = greedy(path, widths, budget, share, order, round_to)
            given = {budget: share, "widths": widths, "order": order, "round_to": round_to, "least": 1}
            if expected is None:
                with pytest.raises(ValueError, match="is below what the smallest sizes cost"):
                    path.select(**given)
                continue
            kept, scores = path.select(**given), path.scores(order)
            assert sizes_of(kept) == expected
            for group, index in kept.items():
                assert index.tolist() == scores[group].topk(len(index)).indices.sort().values.tolist()


@pytest.mark.parametrize("name", NETS)
def test_an_even_order_is_the_mean_of_a_units_places_among_all_and_in_its_group(name):
    for seed in range(3):
        path = random_path(name, seed)
        dual, even = path.scores("dual"), path.scores("even")
        every = [value for score in dual.values() for value in score.tolist()]
        for group, score in dual.items():
            for unit, value in enumerate(score.tolist()):
                places = [sum(v <= value for v in of) / len(of) for of in (every, score.tolist())]
                assert even[group][unit].item() == pytest.approx(sum(places) / 2, abs=1e-6)
            assert torch.equal(even[group].argsort(), score.argsort())


# ---- budgets


@quick
@given(
    seeds,
    st.sampled_from(list(NETS)),
    st.sampled_from(["macs", "params"]),
    st.floats(0.05, 1),
    st.integers(1, 5),
    st.sampled_from(["stock", "free"]),
    st.sampled_from(["dual", "entry", "even"]),
)
def test_a_budget_is_never_exceeded_and_the_best_units_stay(seed, name, budget, share, round_to, widths, order):
    path = random_path(name, seed)
    try:
        kept = path.select(**{budget: share}, round_to=round_to, widths=widths, order=order)
    except ValueError as error:
        assert "is below what the smallest sizes cost" in str(error)
        return
    assert share_of(path, kept, budget) <= share * (1 + 1e-8)
    for group in path.groups:
        index = kept[group.name]
        assert 1 <= len(index) <= group.units and index.dtype == torch.int64
        assert index.tolist() == sorted(set(index.tolist()))
        # inside a group the best stay
        score = path.scores(order)[group.name]
        gone = sorted(set(range(group.units)) - set(index.tolist()))
        assert not gone or score[index].min() >= score[gone].max()
        if widths == "free":
            assert len(index) % round_to == 0 or len(index) == group.units


@pytest.mark.parametrize("seed", range(8))
def test_units_of_equal_score_leave_one_step_at_a_time(seed):
    path = random_path("resnet", seed)
    for unit in path.units.values():  # the mean of three equal numbers is not always that number
        unit["dual"] = torch.full_like(unit["dual"], unit["dual"][0].item())
        unit["dual"][1] *= 2.7
        unit["threshold"] = torch.full_like(unit["dual"], 0.3)
    cuts = cut_list(ties_of(path, "free"), path.scores(), 3, 1)
    for tie in range(len(path.groups)):
        levels = [cut[tie] for cut in cuts if tie in cut]
        assert levels == sorted(levels, reverse=True)


def test_units_below_the_least_leave_after_all_others():
    path = random_path("lenet", 0)
    for unit in path.units.values():
        unit["dual"] = torch.ones_like(unit["dual"])
        unit["threshold"] = torch.ones_like(unit["dual"])
    path.units["7"]["dual"][1:] = 0.01  # one neuron alone would go first down to a single unit
    network = path.groups[0].network
    two = network.count(path.groups, {group.name: 2 for group in path.groups})["macs"] / network.count()["macs"]
    above, below = (path.select(macs=share) for share in (1.001 * two, 0.999 * two))
    assert all(set(below[name].tolist()) <= set(above[name].tolist()) for name in above)


@pytest.mark.parametrize("budget", ["macs", "params", "keep"])
@pytest.mark.parametrize("seed", range(4))
def test_among_sizes_that_are_allowed_the_next_smaller_ones_are_taken(budget, seed):
    path = random_path("lenet", seed)
    free = path.select(**{budget: 0.5})
    first = path.groups[0].name

    def same(kept, other):
        return all(torch.equal(kept[name], index) for name, index in other.items())

    assert same(path.select(**{budget: 0.5}, allowed=lambda sizes: True), free)
    assert same(path.select(**{budget: 0.5}, allowed=lambda sizes: False), free), "nothing better is to be had"
    size = len(free[first])
    less = path.select(**{budget: 0.5}, allowed=lambda sizes: sizes[first] != size)
    network, sizes = path.groups[0].network, sizes_of(less)
    assert sizes[first] != size
    if budget == "keep":
        assert all(sizes[name] <= len(index) for name, index in free.items())
    else:
        assert network.count(path.groups, sizes)[budget] <= 0.5 * network.count()[budget]
        assert network.count(path.groups, sizes)[budget] > 0.3 * network.count()[budget]


def test_a_budget_of_one_keeps_everything():
    for name in NETS:
        path = random_path(name, 1)
        whole = {group.name: group.units for group in path.groups}
        for budget in ("macs", "params", "keep"):
            assert sizes_of(path.select(**{budget: 1.0})) == sizes_of(path.select(**{budget: 1})) == whole


def test_every_group_keeps_two_units_unless_the_budget_needs_one():
    path = random_path("lenet", 0)
    two, one = ({group.name: size for group in path.groups} for size in (2, 1))
    network = path.groups[0].network
    costs = [network.count(path.groups, sizes)["params"] / network.count()["params"] for sizes in (two, one)]
    assert sizes_of(path.select(params=costs[0] * 1.0001)) == two
    assert min(sizes_of(path.select(params=costs[0] * 0.9999)).values()) == 1
    assert sizes_of(path.select(params=costs[1] * 1.0001)) == one
    with pytest.raises(ValueError, match="params=.* is below what the smallest sizes cost .*ask for at least that"):
        path.select(params=costs[1] * 0.9999)
    assert min(sizes_of(path.select(params=0.3, least=4)).values()) >= 4


def test_keep_rounds_up():
    path = random_path("vgg", 0)  # 6, 8, 10 and 12 units
    for keep, sizes in ((0.5, [3, 4, 5, 6]), (0.3, [2, 3, 3, 4]), (0.01, [1, 1, 1, 1]), (0.99, [6, 8, 10, 12])):
        assert list(sizes_of(path.select(keep=keep)).values()) == sizes
    assert list(sizes_of(path.select(keep=0.5, round_to=4)).values()) == [4, 4, 8, 8]
    assert list(sizes_of(path.select(keep=0.9, round_to=4)).values()) == [6, 8, 10, 12]
    scores = path.scores()
    for name, index in path.select(keep=0.5).items():
        assert index.tolist() == scores[name].topk(len(index)).indices.sort().values.tolist()


def test_keep_rounds_up_to_what_the_config_can_say():
    path = random_path("bottleneck", 0)
    sizes = list(sizes_of(path.select(keep=0.3)).values())
    assert sizes == [3, 8, 2, 2, 2, 2, 12, 3, 3]
    assert list(sizes_of(path.select(keep=0.3, widths="free")).values()) == [3, 5, 2, 2, 2, 2, 10, 3, 3]


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "exactly one of keep, params, macs, latency; got none"),
        ({"latency": 0.5}, "latency= needs measure="),
        ({"macs": 0.5, "keep": 0.5}, "exactly one of .*'keep': 0.5, 'macs': 0.5"),
        *(({"macs": value}, f"macs={value!r}: a budget is a share") for value in (0.0, float("nan"), True, "0.5")),
        ({"params": -0.5}, "params=-0.5: a budget is a share"),
        ({"keep": 1.5}, "keep=1.5: a budget is a share"),
        ({"macs": 1e-4}, "macs=0.0001 is below what the smallest sizes cost"),
        ({"macs": 0.5, "order": "norm"}, "order='norm': it must be one of"),
        ({"keep": 0.5, "order": "norm"}, "order='norm': it must be one of"),
        ({"macs": 0.5, "widths": "narrow"}, "widths='narrow': it must be 'stock' or 'free'"),
        ({"macs": 0.5, "round_to": 0}, "round_to=0 and least=2 must be at least 1"),
        ({"macs": 0.5, "least": 0}, "round_to=None and least=0 must be at least 1"),
    ],
)
def test_bad_budgets_are_refused_with_the_argument_to_change(given, message):
    with pytest.raises(ValueError, match=message):
        random_path("lenet", 0).select(**given)


# ---- what one number of a config sets


STEM, STAGE = "resnet.embedder.embedder.convolution", "resnet.encoder.stages"


def test_the_ties_of_a_basic_resnet_are_its_stage_widths():
    _, groups, ties = NETS["resnet"]
    first = [STEM, f"{STAGE}.0.layers.0.layer.0.convolution", f"{STAGE}.0.layers.1.layer.0.convolution"]
    last = [f"{STAGE}.1.layers.0.shortcut.convolution", f"{STAGE}.1.layers.0.layer.0.convolution"]
    assert [(tie.steps, dict(tie.shares), dict(tie.fields)) for tie in ties] == [
        # the stem writes to the stream of the first stage, so both numbers move together
        (8, dict.fromkeys(first, 1), {"embedding_size": 1, "hidden_sizes.0": 1}),
        (16, dict.fromkeys(last, 1), {"hidden_sizes.1": 1}),
    ]


def test_the_ties_of_a_bottleneck_resnet_are_its_stage_widths_in_steps_of_four():
    _, groups, ties = NETS["bottleneck"]
    inner = [f"{STAGE}.0.layers.{i}.layer.{j}.convolution" for i in (0, 1) for j in (0, 1)]
    last = [f"{STAGE}.1.layers.0.layer.{j}.convolution" for j in (0, 1)]
    assert [(tie.steps, dict(tie.shares), dict(tie.fields)) for tie in ties] == [
        (8, {STEM: 1}, {"embedding_size": 1}),
        (4, {f"{STAGE}.0.layers.0.shortcut.convolution": 4} | dict.fromkeys(inner, 1), {"hidden_sizes.0": 4}),
        (8, {f"{STAGE}.1.layers.0.shortcut.convolution": 4} | dict.fromkeys(last, 1), {"hidden_sizes.1": 4}),
    ]


def test_finding_ties_leaves_model_and_config_alone():
    model, x = build("resnet")
    groups, before, config = find_groups(model, x), copy.deepcopy(model.state_dict()), model.config.to_dict()
    state = torch.get_rng_state()
    config_ties(model, groups)
    assert torch.equal(torch.get_rng_state(), state) and model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_a_config_or_unlike_its_config_has_no_ties():
    model, groups, _ = NETS["vgg"]
    assert config_ties(model, groups) == []
    other = resnet()
    other.config.hidden_sizes = [8, 32]
    assert config_ties(other, NETS["resnet"][1]) == []


def test_a_stock_config_says_tied_sizes_and_no_others():
    model, groups, ties = NETS["resnet"]
    sizes = {group.name: group.units for group in groups}
    # the model is still whole, so its own sizes are all that its config may say of it
    assert stock_config(model, ties, sizes).hidden_sizes == [8, 16]
    names = list(sizes)
    assert stock_config(model, ties, sizes | {names[1]: 4}) is None
    assert stock_config(model, ties, sizes | dict.fromkeys(names[:3], 4)) is None


def test_groups_that_are_not_lifted_keep_their_size_and_so_does_what_they_are_tied_to():
    model, groups, ties = NETS["bottleneck"]
    path = random_path("bottleneck", 0)
    del path.units[groups[2].name]
    kept = path.select(keep=0.5)
    assert set(kept) == {group.name for group in (groups[0], *groups[6:])}
    assert share_of(path, path.select(macs=0.9), "macs") <= 0.9


# ---- the file


def equal(a, b):
    assert [group.to_dict() for group in a.groups] == [group.to_dict() for group in b.groups]
    assert a.groups[0].network == b.groups[0].network
    assert (a.step, list(a.ties), a.curve, a.start) == (b.step, list(b.ties), b.curve, b.start)
    assert a.units.keys() == b.units.keys() and list(a.units) == list(b.units)
    for name, unit in a.units.items():
        assert unit.keys() == b.units[name].keys()
        for key, value in unit.items():
            assert value.dtype == b.units[name][key].dtype and torch.equal(value, b.units[name][key])


@pytest.mark.parametrize("name", NETS)
def test_a_saved_path_comes_back_equal_without_the_model(tmp_path, name):
    path = random_path(name, 5)
    path.curve.append({"macs": 0.5, "accuracy": 0.1 + 0.2})
    target = path.save(tmp_path / "new" / "folder")
    assert target == tmp_path / "new" / "folder" / FILE_NAME and os.listdir(target.parent) == [FILE_NAME]
    assert target.stat().st_size < 40_000
    back = SparsePath.load(target.parent)
    equal(path, back)
    assert not any(group.tensors for group in back.groups)
    assert [(g.params, g.macs) for g in back.groups] == [(g.params, g.macs) for g in path.groups]
    for widths in ("stock", "free"):
        one, other = (p.select(macs=0.4, widths=widths) for p in (path, back))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_names_with_separators_survive(tmp_path):
    net = nn.Sequential()
    net.add_module("a|b", nn.Linear(3, 4))
    net.add_module("act", nn.ReLU())
    net.add_module("c d", nn.Linear(4, 2))
    groups = find_groups(net, torch.zeros(1, 3))
    path = SparsePath.from_optimizer(SplitLBI(param_groups(net, groups), lr=0.1), groups)
    path.save(tmp_path)
    equal(path, SparsePath.load(tmp_path))
    assert list(path.units) == ["a|b"]


def test_a_folder_without_a_path_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {FILE_NAME} in"):
        SparsePath.load(tmp_path)


def test_a_tie_among_any_groups_moves_them_together():
    path = random_path("lenet", 0)
    path.ties = [Tie(2, {"0": 3, "3": 8})]
    for share in (0.9, 0.7, 0.5):
        sizes = sizes_of(path.select(macs=share, least=1))
        assert (sizes["0"], sizes["3"]) in ((6, 16), (3, 8))


def test_where_a_config_says_many_units_they_go_in_blocks_and_groups_that_it_does_not_say_stay_whole(
    monkeypatch, caplog
):
    path = random_path("lenet", 0)
    path.ties = [Tie(16, {"3": 1}, {"channels": 1})]
    for wide, block in ((17, 1), (16, 4)):
        monkeypatch.setattr("hf_effdl.structure.groups.ties.WIDE", wide)
        monkeypatch.setattr("hf_effdl.structure.groups.ties.BLOCK", 4)
        sizes = [sizes_of(path.select(macs=share)) for share in (0.95, 0.9, 0.85)]
        assert all(set(size) == {"3"} for size in sizes) and "0, 7" in caplog.text
        assert all(size["3"] % block == 0 for size in sizes)
        assert any(size["3"] % 4 for size in sizes) == (block == 1)
    assert set(sizes_of(path.select(macs=0.9, widths="free"))) == {"0", "3", "7"}


@pytest.mark.parametrize("round_to, possible", [(1, {4, 8, 12, 16}), (4, {4, 8, 12, 16}), (6, {12, 16}), (8, {8, 16})])
def test_rounding_counts_units_not_steps_of_a_tie(round_to, possible):
    path = random_path("lenet", 0)
    path.ties = [Tie(4, {"3": 4})]
    for select in ({"macs": share} for share in (0.95, 0.85, 0.78)):
        assert sizes_of(path.select(**select, round_to=round_to))["3"] in possible
    assert {sizes_of(path.select(keep=k / 20, round_to=round_to))["3"] for k in range(1, 21)} == possible
