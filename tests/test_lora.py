"""Ranks of LoRA adapters: found as groups, selected by signal alone, and left as a plain adapter."""

import json
import random
import time
import warnings
from copy import deepcopy

import lora_run
import pytest
import torch
from benchmarks import importable
from compare import assert_close, assert_same
from conftest import ROOT
from datasets import Dataset, DatasetDict
from forked import Script
from hub import LoopbackHub
from lora_run import adapted, bert
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn
from transformers import BertTokenizerFast, GPT2Config, GPT2LMHeadModel

from hf_effdl import (
    GrowingArguments,
    GrowingTrainer,
    SparsePath,
    SplitLBI,
    SplitLBIArguments,
    find_groups,
    find_ticket,
    param_groups,
    plot_lora_ranks,
    select_lora_ranks,
    walk_path,
)
from hf_effdl.structure.groups.surgery import mask
from hf_effdl.structure.lora.budget import ranks_within
from hf_effdl.structure.lora.picture import inside_at


# peft asks transformers for a name that is deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TOKENS = torch.arange(3, 19).view(2, 8)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(input_ids[:, None, None].to(self.first.weight.dtype).expand(-1, 1, 8, -1)))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


ADAPTERS = {
    "plain": (bert, {}),
    "rsLoRA": (bert, {"use_rslora": True}),
    "DoRA": (bert, {"use_dora": True}),
    "bias": (bert, {"lora_bias": True}),
    "embedding": (bert, {"target_modules": ["query", "word_embeddings"]}),
    "head trained too": (
        bert,
        {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "target_modules": ["query"]},
    ),
    "by a pattern": (bert, {"target_modules": r".*layer\.\d\.attention\.self\.(query|key)"}),
    "one layer": (bert, {"layers_to_transform": [1], "target_modules": ["query", "value", "key"]}),
    "ranks of its own": (bert, {"rank_pattern": {"query": 3}, "alpha_pattern": {"query": 5}}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolutions": (convolutions, {"target_modules": ["first", "last"]}),
    "convolutions, DoRA": (convolutions, {"target_modules": ["first", "last"], "use_dora": True}),
    "half precision": (lambda: bert().bfloat16(), {}),
    "named": (bert, {"adapter_name": "mine"}),
    "another beside it": (bert, {}),
}


def said(net, tokens=TOKENS):
    with torch.no_grad():
        output = net.eval()(input_ids=tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def fresh(name: str) -> nn.Module:
    """The model without an adapter, in double precision unless it is about another."""
    net = ADAPTERS[name][0]().eval()
    return net if name == "half precision" else net.double()


def trained(name: str) -> tuple[PeftModel, SparsePath]:
    """An adapter with random weights, and a path that leaves every third module without strong ranks."""
    config = ADAPTERS[name][1]
    net = adapted(fresh(name), **config)
    if name == "another beside it":
        net.add_adapter("other", LoraConfig(r=2, target_modules=["query", "key"]))
    generator = torch.Generator().manual_seed(2)
    for p in net.parameters():
        if p.requires_grad:
            p.data = (0.3 * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return net, path_of(net, generator)


def path_of(net, generator) -> SparsePath:
    groups, units = find_groups(net), {}
    for i, group in enumerate(groups):
        never = torch.full((group.units,), -1)
        score = torch.rand(group.units, generator=generator) * (0.01 if i % 3 == 0 else 1)
        units[group.name] = {"dual": score, "threshold": torch.ones(group.units), "weight": score}
        units[group.name] |= {"entered": never, "left": never, "gradient": score}
    return SparsePath(groups, units, 5)


# ---- groups


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapted_module_is_a_group_and_a_silent_rank_is_a_missing_term(name):
    """Reference: the sum over the other ranks, which PEFT computes from slices as a difference of weights."""
    net, _ = trained(name)
    groups, adapter = find_groups(net), net.active_adapter
    assert [(g.name, g.units) for g in groups] == [
        (path, layer.r[adapter]) for path, layer in net.named_modules() if adapter in getattr(layer, "r", {})
    ]
    group = groups[-1]
    layer, (b, a) = net.get_submodule(group.name), group.slices
    whole, term = layer.get_delta_weight(adapter), deepcopy(net)
    mask(term, groups, {group.name: torch.tensor([1])})
    rest = mask(deepcopy(net), groups, {group.name: torch.tensor([i for i in range(group.units) if i != 1])})
    parts = [other.get_submodule(group.name).get_delta_weight(adapter) for other in (term, rest)]
    tolerance = 1e-2 if name == "half precision" else 1e-5
    torch.testing.assert_close(sum(parts), whole, atol=tolerance, rtol=tolerance)
    assert group.params * group.units == sum(net.get_parameter(part.tensor).numel() for part in (a, b))


def test_frozen_adapters_are_not_lifted_and_it_is_said(caplog):
    net = adapted(bert())
    net.requires_grad_(False)
    assert not any(group.lifted for group in find_groups(net)) and "show no signal" in caplog.text


def entangled(init):
    return lambda: adapted(bert(), init_lora_weights=init)


def two_active():
    net = adapted(bert())
    net.add_adapter("other", net.peft_config["default"])
    net.base_model.set_adapter(["default", "other"])
    return net


def merged():
    net = adapted(bert())
    net.merge_adapter()
    return net


def other_method(config):
    return lambda: get_peft_model(bert(), config)


def quantised():
    net = adapted(bert())
    layer = next(module for name, module in net.named_modules() if name.endswith("lora_A.default"))
    layer.weight = nn.Parameter(torch.zeros(4, 32, dtype=torch.int8), requires_grad=False)
    return net


REFUSED = {
    "orthogonal": (entangled("orthogonal"), "ranks that cancel each"),
    "AdaLoRA": (other_method(AdaLoraConfig(total_step=9, target_modules=["query"])), "adalora"),
    "IA3": (other_method(IA3Config(target_modules=["query"], feedforward_modules=[])), "query is a peft.tuners.ia3"),
    "two active": (two_active, r"\['default', 'other'\] are active"),
    "merged": (merged, "call unmerge_adapter"),
    "quantised": (quantised, "quantised adapter weights"),
    "variant": (lambda: adapted(bert(), init_lora_weights="mica"), "variant MiCALinearVariant"),
    "groups": (
        lambda: adapted(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules=["0"]),
        "a convolution with groups",
    ),
    "attention in one": (
        lambda: adapted(nn.Sequential(nn.MultiheadAttention(8, 2)), target_modules=["0"]),
        "whose projections have one rank",
    ),
    "parameters": (
        lambda: adapted(bert(), target_modules=["query"], target_parameters=["classifier.weight"]),
        "target_parameters=",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_whose_ranks_cannot_go_alone_are_refused_by_name(name):
    make, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = make()
    with pytest.raises(ValueError, match=message):
        find_groups(net)


def test_tied_adapters_are_refused():
    net = adapted(gpt2(), target_modules=["wte", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="share their adapter with the embedding"):
        find_groups(net)


# ---- selecting


@pytest.mark.parametrize("order", ["size", "dual"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_selected_computes_what_the_masked_adapter_does_also_loaded_by_peft_and_merged(name, order, tmp_path):
    net, path = trained(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = select_lora_ranks(net, path, 0.4, order=order)
    assert_same(dict(net.state_dict()), before)
    report = small.effdl_report
    whole = select_lora_ranks(net, path, 1.0) if order == "size" else net  # in singular directions, the largest first
    tolerance = {"atol": 3e-2, "rtol": 1e-1} if name == "half precision" else {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(said(whole), said(net), **tolerance)
    scores = path.scores(relative=False)
    kept = {}
    for module, pair in report["units"].items():
        best = scores[module].topk(pair["after"]).indices
        kept[module] = torch.arange(pair["after"]) if order == "size" else best
    assert 0.2 < report["params"]["ratio"] <= 0.4 and len(set(map(len, kept.values()))) > 1
    expected = said(mask(deepcopy(whole), find_groups(whole), kept))
    assert not torch.allclose(said(net), expected, **tolerance)
    small.save_pretrained(tmp_path)
    folder = tmp_path / "mine" if name == "named" else tmp_path
    loaded = PeftModel.from_pretrained(fresh(name), folder)
    stored = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(stored.values()) == report["ranks"]["after"]
    for other in (small, loaded, small.merge_and_unload()):
        torch.testing.assert_close(said(other), expected, **tolerance)


@pytest.mark.parametrize("order", ["size", "effect"])
@pytest.mark.parametrize("name", ["plain", "embedding", "Conv1D", "convolutions", "rsLoRA", "ranks of its own"])
def test_the_largest_singular_directions_are_kept_and_each_module_has_its_best(name, order):
    """Reference: torch's singular value decomposition of what the whole adapter adds to a module."""
    net, path = trained(name)
    small, effects, gone = select_lora_ranks(net, path, 0.4, order=order), [], []
    for group in find_groups(net):
        layers = [one.get_submodule(group.name) for one in (net, small)]
        whole, part = (layer.get_delta_weight("default").flatten(1) if hasattr(layer, "r") else 0 for layer in layers)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        kept = small.effdl_report["units"][group.name]["after"]
        torch.testing.assert_close(part + 0 * whole, u[:, :kept] * s[:kept] @ v[:kept])
        size = net.get_parameter(group.slices[1].tensor)
        size = size.norm() / group.units**0.5
        effect = s[: group.units]
        if order == "effect":
            effect = effect / layers[0].scaling["default"] / size
            effect = effect * path.units[group.name]["gradient"].norm() / group.units**0.5
        effects += [(value.item(), group.params) for value in effect[:kept]]
        gone += [(value.item(), group.params) for value in effect[kept:]]
    left = small.effdl_report["params"]["before"] * 0.4 - small.effdl_report["params"]["after"]
    assert max((value for value, cost in gone if cost <= left), default=0) <= min(value for value, _ in effects)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (bert, {"init_lora_weights": "pissa"}),
        (bert, {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "rank_pattern": {"query": 3}}),
        (bert, {"init_lora_weights": "olora"}),
        (bert, {}),
        (gpt2, {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["PiSSA", "PiSSA, rsLoRA", "OLoRA", "plain", "Conv1D"],
)
def test_what_began_with_a_part_of_the_base_weights_is_selected_by_what_has_changed(base, config, tmp_path):
    """Reference: torch's singular value decomposition of the weights after training less those of the base."""
    net, before = adapted(base().eval(), **config), base().eval()
    torch.testing.assert_close(said(net), said(before), atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: the folder says nothing of the base weights
        net.save_pretrained(tmp_path / "initial")
    initial = get_peft_model_state_dict(net)
    initial = {name: tensor.clone() for name, tensor in initial.items()}
    generator = torch.Generator().manual_seed(3)
    for i, p in enumerate(p for p in net.parameters() if p.requires_grad):
        p.data += 0.02 * (1 + i % 5) * torch.randn(p.shape, generator=generator)
    path = path_of(net, generator)
    small = select_lora_ranks(net, path, 0.4, initial=tmp_path / "initial")
    assert_same(ranks_of(small), ranks_of(select_lora_ranks(net, path, 0.4, initial=initial)))
    assert small.effdl_report["params"]["ratio"] <= 0.4
    expected, full = base().eval(), base().eval()
    for name, pair in small.effdl_report["units"].items():
        layer, weight = net.get_submodule(name), before.get_submodule(name.removeprefix("base_model.model.")).weight
        change = layer.get_base_layer().weight + layer.get_delta_weight("default") - weight
        u, s, v = torch.linalg.svd(change.detach().double(), full_matrices=False)
        kept = (u[:, : pair["after"]] * s[: pair["after"]] @ v[: pair["after"]]).float()
        for copied, added in ((expected, kept), (full, change.detach())):
            copied.get_submodule(name.removeprefix("base_model.model.")).weight.data += added
    small.save_pretrained(tmp_path / "small")
    loaded = PeftModel.from_pretrained(base().eval(), tmp_path / "small")
    for one in (small, loaded, loaded.merge_and_unload()):
        torch.testing.assert_close(said(one), said(expected), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(said(net), said(full), atol=2e-6, rtol=2e-6)
    assert not torch.allclose(said(expected), said(full), atol=1e-4)


def ranks_of(net):
    return {name: p for name, p in net.named_parameters() if "lora" in name}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "init_lora_weights='pissa' moved a part of the base weights.*initial=folder"),
        ({"initial": 3}, TypeError, "initial is a int"),
        ({"initial": "nowhere"}, FileNotFoundError, "adapter_model.safetensors does not exist"),
        ({"initial": {}}, ValueError, "initial holds no such tensor for base_model"),
        ({"initial": None, "spoil": torch.ones(2, 2)}, ValueError, r"initial holds one of shape \(2, 2\)"),
        ({"initial": None, "spoil": float("nan")}, ValueError, "where the adapter has finite numbers"),
        ({"initial": None, "order": "dual"}, ValueError, "order='dual' is of ranks as they were trained"),
        ({"initial": None, "packed": torch.int8}, ValueError, "base weights in torch.int8, to which what the adapter"),
        ({"initial": None, "packed": torch.float8_e4m3fn}, ValueError, "base weights in torch.float8"),
    ],
)
def test_what_an_adapter_was_before_training_is_asked_for_and_checked(change, error, message):
    net = adapted(bert(), init_lora_weights="pissa")
    path = path_of(net, torch.Generator())
    if "initial" in change and change["initial"] is None:
        change = change | {"initial": {name: t.clone() for name, t in get_peft_model_state_dict(net).items()}}
        spoil = change.pop("spoil", None)
        first = next(iter(change["initial"]))
        if spoil is not None:
            change["initial"][first] = spoil if isinstance(spoil, torch.Tensor) else change["initial"][first] * spoil
        layer = net.get_submodule(next(iter(path.units))).get_base_layer()
        packed = layer.weight.detach().to(change.pop("packed", layer.weight.dtype))
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(error, match=message):
        select_lora_ranks(net, path, 0.5, **change)


def test_a_selected_adapter_is_trained_selected_and_saved_again(tmp_path):
    net, path = trained("plain")
    small = select_lora_ranks(net, path, 0.6)
    run = lora_run.trainer(tmp_path, small, max_steps=6, learning_rate=None)
    run.train()
    assert (run.args.start, run.args.learning_rate, run.path.start) == ("dense", 1e-4, "dense")
    again = select_lora_ranks(run.model, run.path, 0.5)
    again.save_pretrained(tmp_path)
    torch.testing.assert_close(said(PeftModel.from_pretrained(fresh("plain"), tmp_path)), said(again))
    assert again.effdl_report["params"]["before"] == small.effdl_report["params"]["after"]


def test_ranks_fill_a_budget_from_the_best_down():
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        counts = torch.randint(1, 6, (4,), generator=generator).tolist()
        scores = {f"m{i}": torch.rand(n, generator=generator) for i, n in enumerate(counts)}
        costs = {name: int(torch.randint(1, 9, (1,), generator=generator)) for name in scores}
        least = {"m1": 1} if trial % 2 else {}
        limit = 9 + trial % 20
        kept = ranks_within(scores, costs, limit, least)
        spent = sum(costs[name] * len(ranks) for name, ranks in kept.items())
        assert spent <= limit and len(kept["m1"]) >= len(least)
        for name, ranks in kept.items():
            assert sorted(scores[name].topk(len(ranks)).indices.tolist()) == ranks.tolist()
            assert len(ranks) == len(scores[name]) or spent + costs[name] > limit
    equal = ranks_within({"a": torch.ones(3), "b": torch.ones(3)}, {"a": 1, "b": 1}, 4, {})
    assert [len(ranks) for ranks in equal.values()] == [3, 1]


@pytest.mark.parametrize(
    ("budget", "unit", "left"), [(1.0, "params", 36), (0.5, "ranks", 18), (7, "ranks", 7), (128, "params", 2)]
)
def test_budgets_are_shares_or_numbers(budget, unit, left):
    net, path = trained("plain")
    assert select_lora_ranks(net, path, budget, unit=unit, order="dual").effdl_report["ranks"]["after"] == left


PROMPT = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)


def spoiled(net):
    next(p for p in net.parameters() if p.requires_grad).data[0, 0] = float("nan")
    return net


def spoiled_path(key):
    path = trained("plain")[1]
    unit = next(iter(path.units.values()))
    unit[key] = unit[key] * float("inf")
    return path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 1.5}, ValueError, "budget=1.5: it must be a share"),
        ({"budget": 0}, ValueError, "budget=0"),
        ({"budget": 37, "unit": "ranks"}, ValueError, "from 2 to the adapter's 36"),
        ({"budget": 2}, ValueError, "the smallest adapter of these modules costs 64"),
        ({"unit": "macs"}, ValueError, "unit='macs'"),
        ({"order": "norm"}, ValueError, "order='norm'"),
        ({"model": lambda: get_peft_model(bert(), PROMPT)}, ValueError, "no LoRA layer"),
        ({"model": lambda: spoiled(trained("plain")[0])}, ValueError, "query has entries that are nan"),
        ({"path": lambda: spoiled_path("dual")}, ValueError, "query has entries that are nan"),
        ({"path": lambda: spoiled_path("gradient")}, ValueError, "query has entries that are nan"),
        ({"path": "runs"}, TypeError, "needs the SparsePath"),
        ({"model": bert}, TypeError, "needs a PeftModel, not BertForSequenceClassification"),
        ({"model": lambda: adapted(bert(), r=3)}, ValueError, "has 4 ranks there and 3 here"),
        ({"model": lambda: adapted(bert(), target_modules=["query"])}, ValueError, "ranks there and no here"),
    ],
)
def test_what_cannot_be_selected_is_refused(change, error, message):
    net, path = trained("plain")
    change = {name: value() if callable(value) else value for name, value in change.items()}
    with pytest.raises(error, match=message):
        select_lora_ranks(**{"model": net, "path": path, "budget": 0.5, **change})


def test_a_budget_that_is_refused_leaves_the_model_as_it_was():
    net, path = trained("plain")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="the smallest adapter"):
        select_lora_ranks(net, path, 1e-9, inplace=True)
    assert_same(dict(net.state_dict()), before)


class Nested(nn.Module):
    """Modules whose names end alike; the last one is worth most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner, self.deep = nn.ModuleDict({"fc": nn.Linear(8, 8)}), nn.ModuleDict({"fc": nn.Linear(8, 8)})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.deep["fc"](self.inner["fc"](self.fc(input_ids.to(self.fc.weight.dtype)))))


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (Nested, {"target_modules": ["fc", "out"], "exclude_modules": ["inner.fc"]}),
        (Nested, {"target_modules": "fc|out|deep.fc"}),
        (bert, {"bias": "lora_only"}),
        (bert, {"bias": "all"}),
    ],
)
def test_a_saved_selection_adapts_its_own_modules_alone_and_keeps_what_else_was_learned(base, config, tmp_path):
    net = adapted(base().double(), **config)
    generator = torch.Generator().manual_seed(2)
    for name, p in net.named_parameters():
        if p.requires_grad:
            small = 1e-3 if "out.lora" in name or "deep.fc.lora" in name else 0.3
            p.data = small * torch.randn(p.shape, generator=generator).to(p.dtype)
    small = select_lora_ranks(net, path_of(net, generator), 0.3)
    small.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base().double(), tmp_path)
    assert_close(said(again), said(small), 1e-9)
    assert [group.name for group in find_groups(again)] == [group.name for group in find_groups(small)]


# ---- the scale: what chance does


@pytest.mark.parametrize("rates", [[0.002] * 80, [0.001 * (1 + i % 7) for i in range(120)]])
@pytest.mark.parametrize("more", [{}, {"kappa": 2.0, "path_scale": 0.5, "ridge_length": 3.0}, {"nu": 0.3, "lam": 1.5}])
def test_steps_of_random_signs_bring_v_to_half_of_the_threshold(rates, more):
    p = nn.Parameter(torch.zeros(3000, 2))
    path = walk_path(rates, **more)
    group = {"params": [p], "penalty": "group", "axis": 1, "scale": 3000**-0.5, "lam_scale": "none"}
    # without memory AdamW's direction is the sign of the gradient
    settings = {"base": "adamw", "betas": (0.0, 0.0), "kappa": more.get("kappa", 1.0), **path}
    optimizer = SplitLBI([group], lr=1.0, weight_decay=0.0, **settings)
    generator = torch.Generator().manual_seed(0)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    unit = optimizer.state[p]
    assert (unit["norm"] / unit["threshold"] * more.get("lam", 1.0)).tolist() == pytest.approx([0.5, 0.5], rel=0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_drawn_anew_select_no_rank_and_true_labels_most_and_all_that_a_budget_keeps(seed, tmp_path):
    shares = {}
    for collate in (lora_run.redrawn, None):
        net = adapted(bert(), modules_to_save=["classifier"], task_type="SEQ_CLS")
        run = lora_run.trainer(tmp_path, net, collate, seed=seed)
        run.train()
        shares[collate] = torch.cat(list(run.path.support.values())).float().mean().item()
    assert shares[lora_run.redrawn] == 0 and shares[None] > 0.5
    small = select_lora_ranks(run.model, run.path, 0.3, order="dual")
    inside = {name: int(support.sum()) for name, support in run.path.support.items()}
    assert all(pair["after"] <= inside[name] for name, pair in small.effdl_report["units"].items())
    for unit in (worst := deepcopy(run.path)).units.values():
        unit["dual"] = 1 / unit["dual"]
    chosen = [
        small,
        select_lora_ranks(run.model, worst, 0.3, order="dual"),
        select_lora_ranks(run.model, run.path, 0.3),
    ]
    by_path, against_it, by_effect = (run.evaluate_model(one)["loss"] for one in chosen)
    assert by_effect < by_path < against_it - 0.05


def test_a_path_without_gradients_is_refused_for_effects_only():
    net, path = trained("plain")
    for unit in path.units.values():
        del unit["gradient"]
    with pytest.raises(ValueError, match="leaves in its path; pass another order"):
        select_lora_ranks(net, path, 0.5, order="effect")
    assert select_lora_ranks(net, path, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "sgd"}, "base='sgd' with a fresh LoRA adapter.*pass base='adamw'"),
        ({"preset": "paper"}, "preset='paper'"),
        ({"start": "dense"}, "start='dense' and lam_scale=None"),
        ({"lam_scale": "init"}, "lam_scale='init'"),
    ],
)
def test_settings_that_need_an_initial_norm_are_refused_for_a_fresh_adapter(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lora_run.trainer(tmp_path, **change)


def test_a_walk_needs_adamw_and_a_mixed_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lam_scale='walk' with base='sgd'"):
        SplitLBIArguments(str(tmp_path), lam_scale="walk").split_lbi_kwargs(10)
    net = adapted(bert())
    nn.init.ones_(next(p for name, p in net.named_parameters() if "lora_B" in name))
    with pytest.raises(ValueError, match="some modules of the LoRA adapter start at zero"):
        lora_run.trainer(tmp_path, net)


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = lora_run.trainer(tmp_path_factory.mktemp("run"), save_strategy="steps", save_steps=20)
    run.train()
    return run


def test_a_resumed_run_equals_its_uninterrupted_one_bit_for_bit(run, tmp_path):
    again = lora_run.trainer(tmp_path)
    again.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-40")
    assert again.state.global_step == 60
    assert_same(lora_run.outcome(again), lora_run.outcome(run))


@pytest.mark.parametrize(
    "mode",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_what_a_run_in_another_mode_leaves_is_selected_from(mode, tmp_path):
    run = lora_run.trainer(tmp_path, adapted(bert()), max_steps=8, eval_steps=4, **mode)
    run.train()
    small = select_lora_ranks(run.model, run.path, 0.4)
    whole = select_lora_ranks(run.model, run.path, 1.0)
    kept = {name: torch.arange(pair["after"]) for name, pair in small.effdl_report["units"].items()}
    expected = run.evaluate_model(mask(whole, find_groups(whole), kept))["loss"]
    assert run.evaluate_model(small)["loss"] == pytest.approx(expected, abs=1e-4 if "bf16" in mode else 1e-6)


def test_two_processes_equal_one(run, tmp_path):
    Script("lora_run.py", tmp_path, "--processes", 2, processes=2).finish()
    assert_close(torch.load(tmp_path / "final.pt", weights_only=True), lora_run.outcome(run))


@pytest.fixture(scope="module")
def run_from_base_weights(tmp_path_factory):
    net, initial = lora_run.from_base_weights("pissa")
    run = lora_run.trainer(tmp_path_factory.mktemp("pissa"), net, save_strategy="steps", save_steps=10)
    run.train()
    return run, initial


def test_a_run_that_began_with_base_weights_is_dense_and_resumed_and_selected_bit_for_bit(
    run_from_base_weights, tmp_path
):
    (run, initial), (net, again) = run_from_base_weights, lora_run.from_base_weights("pissa")
    assert run.args.start == "dense"
    resumed = lora_run.trainer(tmp_path, net)
    resumed.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-40")
    assert_same(lora_run.outcome(resumed, again), lora_run.outcome(run, initial))
    small = select_lora_ranks(run.model, run.path, 0.4, initial=initial)
    losses = [run.evaluate_model(one)["loss"] for one in (run.model, small, bert())]
    assert losses[1] == pytest.approx(losses[0], abs=0.05) and losses[0] < losses[2] - 0.3


def test_selecting_from_a_saved_adapter_and_its_saved_path_is_the_same_bit_for_bit(run):
    checkpoint = f"{run.args.output_dir}/checkpoint-60"
    loaded = PeftModel.from_pretrained(bert().double().eval(), checkpoint, is_trainable=True)
    for order in ("size", "dual", "effect"):
        ours, theirs = (
            select_lora_ranks(net, path, 0.4, order=order)
            for net, path in ((run.model, run.path), (loaded, SparsePath.load(checkpoint)))
        )
        assert ours.effdl_report == theirs.effdl_report
        assert_same(ranks_of(theirs), ranks_of(ours))


@pytest.mark.slow
@pytest.mark.parametrize("init", [None, "pissa"])
def test_a_run_killed_at_a_random_moment_and_resumed_selects_bit_for_bit_what_an_uninterrupted_one_does(
    init, run, run_from_base_weights, tmp_path
):
    more = ("--init", init) if init else ()
    script = Script("lora_run.py", tmp_path, *more)
    script.wait_for(lambda: list(tmp_path.glob("checkpoint-*/trainer_state.json")))
    delay = random.SystemRandom().uniform(0, 0.4)
    time.sleep(delay)
    assert script.kill() or (tmp_path / "final.pt").exists()
    Script("lora_run.py", tmp_path, *more, "--resume").finish()
    whole = lora_run.outcome(*run_from_base_weights) if init else lora_run.outcome(run)
    assert_same(torch.load(tmp_path / "final.pt", weights_only=True), whole, f"killed after {delay:.3f} s")


@pytest.mark.slow
def test_two_processes_equal_one_from_base_weights_on(run_from_base_weights, tmp_path):
    Script("lora_run.py", tmp_path, "--processes", 2, "--init", "pissa", processes=2).finish()
    both, one = torch.load(tmp_path / "final.pt", weights_only=True), lora_run.outcome(*run_from_base_weights)
    assert both["report"] == one["report"]
    assert_close(both["weights"], one["weights"], 1e-5)


def test_the_masked_evaluation_is_that_of_the_selected_adapter(run):
    support = sum(int(inside.sum()) for inside in run.path.support.values())
    small = select_lora_ranks(run.model, run.path, support, unit="ranks", order="dual")
    masked = run.evaluate_masked()
    assert masked["loss"] == pytest.approx(run.evaluate_model(small)["loss"], abs=1e-9)
    assert 0 < support < 36 and masked["loss"] != run.evaluate_model(run.model)["loss"]


def test_a_path_of_a_bare_loop_is_read_and_loads_again(tmp_path):
    net = adapted(bert())
    groups = find_groups(net)
    optimizer = SplitLBI(param_groups(net, groups), lr=0.01, base="adamw", **walk_path([0.01] * 8))
    for _ in range(8):
        optimizer.zero_grad()
        net(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    path = SparsePath.from_optimizer(optimizer, groups)
    path.save(tmp_path)
    small = [select_lora_ranks(net, path, 0.5) for path in (path, SparsePath.load(tmp_path))]
    assert_same(*(dict(one.state_dict()) for one in small))


def test_what_needs_units_of_the_model_itself_refuses_an_adapter(run, tmp_path):
    with pytest.raises(ValueError, match="call select_lora_ranks"):
        run.slim(keep=0.5)
    with pytest.raises(ValueError, match="growing has no use for the ranks"):
        GrowingTrainer(run.model, GrowingArguments(str(tmp_path), base="adamw", use_cpu=True))
    with pytest.raises(ValueError, match="a ticket has no use for the ranks"):
        find_ticket(lora_run.trainer(tmp_path), params=0.5)


def test_the_picture_counts_ranks_inside(run):
    unit = {"entered": torch.tensor([0, 3, 5, -1]), "left": torch.tensor([4, -1, 7, -1])}
    assert inside_at(unit, torch.arange(9)).tolist() == [1, 1, 1, 2, 1, 2, 2, 1, 1]
    left, right = plot_lora_ranks(run.path).axes
    for ranks, error in (({}, ValueError), ({"nope": 3}, ValueError), ([3], TypeError)):
        with pytest.raises(error, match="ranks"):
            plot_lora_ranks(run.path, ranks)
    with pytest.raises(ValueError, match="whole number"):
        plot_lora_ranks(run.path, dict.fromkeys(run.path.units, {"before": 4, "after": 3}))
    assert len(left.lines) == 5 and right.texts[0].get_text() == str(int(next(iter(run.path.support.values())).sum()))


@pytest.mark.slow
def test_an_adapter_is_pushed_with_its_card_and_loads_where_the_package_is_not(tmp_path):
    code = """
    import sys; sys.path.insert(0, {support!r})
    import lora_run, torch
    from hf_effdl import select_lora_ranks
    torch.set_num_threads(1)
    run = lora_run.trainer("run", max_steps=20)
    run.train()
    lora_run.bert().double().save_pretrained("base")
    small = select_lora_ranks(run.model, run.path, 0.4)
    run.push_slim(small, "tester/adapter", dataset="made-up tokens", finetuned_from="tester/base")
    sys.modules["hf_effdl"] = None
    from peft import PeftModel
    from transformers import BertForSequenceClassification
    base = BertForSequenceClassification.from_pretrained("base", dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, "tester/adapter").eval()
    tokens = torch.arange(3, 19).view(2, 8)
    print(torch.equal(loaded(tokens).logits, small.eval()(tokens).logits))
    """
    with LoopbackHub() as hub:
        assert hub.run(code.format(support=str(lora_run.Path(lora_run.__file__).parent)), tmp_path).endswith("True\n")
        [(_, repo)] = hub.repos.items()
        tree = repo.resolve("main").tree
    card = tree["README.md"].decode()
    assert {"adapter_model.safetensors", "adapter_config.json", "sparse_path.safetensors", "lora_ranks.png"} <= set(
        tree
    )
    assert "base_model: tester/base" in card and "| 0 | " in card and "slim" not in card


def test_the_example_adapts_selects_trains_on_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import lora_ranks

    words = [f"w{i}" for i in range(35)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(tmp_path / "bert")
    bert().save_pretrained(tmp_path / "bert")
    texts = [" ".join(words[i % 2 * 10 + j] for j in range(5)) for i in range(32)]
    rows = Dataset.from_dict({"text": texts, "label": [f"kind {i % 2}" for i in range(32)]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "rows")
    named = {
        "model_name_or_path": tmp_path / "bert",
        "dataset_name": tmp_path / "rows",
        "output_dir": tmp_path / "out",
    }
    named |= {"rank": 4, "finetune_epochs": 1, "use_cpu": True, "target_modules": "query", "max_steps": 8}
    lora_ranks.main([part for name, value in named.items() for part in (f"--{name}", str(value))])
    assert "| all ranks |" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "out")
    assert sum(loaded.peft_config["default"].rank_pattern.values()) == 2
    assert "fine-tuned for 1 epochs" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_arms_of_the_benchmarks_keep_their_budgets_and_rows_that_are_there(tmp_path):
    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}

    with importable("lora_arms", "rows") as found:
        arms, rows = found["lora_arms"], found["rows"]
        config = {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"]}
        steps, rates, batch = 6, (0.01, 0.01), 8
        settings = (bert, config, 4, lora_run.texts(24, 1), collate, steps, rates, batch)
        task = arms.Task(*settings, lambda model: {"accuracy": float(said(model).sum())})
        file = rows.RowFile(tmp_path / "rows.jsonl", arms.KEYS)
        arms.add_rows(task, arms.ARMS, (0.5,), 0, file)
        lines = {(row["arm"], row["budget"]): row["params"] for row in file.rows}
        whole = lines["path", 1.0]
        assert {arm for arm, budget in lines if budget == 0.5} == set(arms.ARMS)
        assert lines["uniform", 1.0] == whole and lines["uniform", 0.5] == whole / 2
        assert all(lines[arm, 0.5] <= whole / 2 for arm in set(arms.ARMS) - {"AdaLoRA"})
        arms.add_rows(task, arms.ARMS, (0.5,), 0, file)
        assert len(file.rows) == len(lines)
        printed = arms.table(file.rows, "accuracy").splitlines()
    assert len(printed) == len(lines) + 2 and "| 0.5 | SVD |" in printed[6]
