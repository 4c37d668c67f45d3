"""The public names under anything that a user may pass: an answer, or a sentence of ours before anything is done."""

import inspect
import math
import traceback

import numpy as np
import pytest
import torch
from torch import nn

import hf_effdl
from hf_effdl import find_groups, split_pool
from hf_effdl.structure.lora.budget import limit_of
from hf_effdl.vicl.remote_code.pipeline_options import Options


torch.manual_seed(0)
NET, X = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
GROUPS = find_groups(NET, X)
W, LISTS = torch.randn(6, 4), torch.rand(3, 5)
JUNK = [
    *(None, "text", b"x", -1, 0, 2.5, math.nan, math.inf, True, [], {}, object(), 10**12, 1e300, "0.5", [None]),
    *([1, 1], (0.5,), {"a": 1}, np.array(["a"]), torch.tensor([math.nan]), torch.ones(3, 1), nn.Linear(1, 1)),
    *(torch.randn(2, 2, dtype=torch.complex64), torch.ones(3, 5, device="meta"), nn.Linear(4, 3, device="meta")),
]
# a call of each that works; where None stands for what the test makes, any answer to it is refused first
CALLS = {
    "Distillation": {"teacher": nn.Linear(1, 1), "weight": 0.5, "temperature": 2.0, "hidden": 0.0},
    "DynamicsCallback": {"every": 1, "batch_size": 4, "data_collator": None},
    "EarlyTicketCallback": {
        **{"groups": GROUPS, "macs": 0.5, "order": "dual", "widths": "stock", "every": 1, "threshold": 0.05},
        **{"window": 3, "patience": 2, "min_path": 0.4, "within": 1.0, "at_epoch": 1.0, "weights_at": ()},
    },
    "ExamplePool": {"folder": "no pool"},
    "GrowingArguments": {
        **{"growth_rounds": 2, "growth_until": 0.1, "growth_threshold": 0.8, "growth_add": 8, "growth_ratio": 3.0},
        **{"growth_init": "split", "growth_release": True, "growth_restart": False, "growth_batch": 64},
        **{"growth_patience": 2, "max_macs": 10, "max_params": 10, "max_width": 10, "widths": "stock"},
    },
    "Probes": {"models": [NET, NET]},
    "RankerSelector": {"rankers": None},
    "SplitLBI": {
        **{"params": [{"params": [nn.Parameter(W)], "penalty": "group"}], "lr": 0.1, "kappa": 1.0, "nu": 100.0},
        **{"momentum": 0.9, "weight_decay": 0.0, "lam": 1.0, "lam_scale": "init", "path_scale": 1.0, "fused": False},
        **{"base": "sgd", "nesterov": False, "betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": None},
    },
    "SplitLBIArguments": {
        **{"preset": "default", "kappa": 1.0, "nu": 10.0, "path_scale": 1.0, "lam": 1.0, "lam_scale": "init"},
        **{"base": "sgd", "nesterov": False, "fused": False, "start": "empty", "path_length": 2.0, "distill": 0.0},
        **{"ridge_length": 2.0, "path_share": 1.0, "distill_temperature": 2.0, "distill_hidden": 0.0, "bn_batches": 8},
    },
    "aggregate_rankings": {"lists": torch.tensor([[0, 1, 2], [2, 1, 0]]), "num_items": 3, "method": "hodge"},
    "covering_design": {"v": 7, "k": 3},
    "derive_path": {
        **{"total_lr": 10.0, "lam": 1.0, "kappa": 1.0, "path_length": 2.0, "ridge_length": 2.0, "base": "sgd"},
        **{"start": "empty", "nu": 3.0},
    },
    "dynamics_scores": {"folder": "no records", "window": 10},
    "find_groups": {"model": NET, "example_inputs": X, "unit": "default"},
    "knock_out": {"rank": lambda lists: lists.sort(dim=2, descending=True).values, "v": 7, "k": 3, "batch": 1},
    "load_dynamics": {"folder": "no records"},
    "load_selection": {"repo_id": "./no/selection"},
    "near_duplicates": {"vectors": torch.randn(6, 3), "of": [0, 1], "threshold": 0.98},
    "neural_ndcg_loss": {"scores": LISTS, "relevance": LISTS, "temperature": 1.0, "mask": None},
    "pairwise_margin_loss": {"scores": LISTS, "metric": LISTS, "margin": 1.0, "mask": None},
    "param_groups": {"model": NET, "groups": GROUPS, "weight_decay": 0.0, "decay": (), "l1": ()},
    "plan_shards": {"files": None, "output_dir": "plan", "budget": 3},
    "read_splits": {"file": "no file"},
    "recalibrate_batch_norm": {"model": nn.Sequential(NET, nn.BatchNorm1d(3)), "batches": [X]},
    "reliable_rows": {
        **{"candidates": torch.tensor([[1, 2], [0, 2], [0, 1]]), "performance": torch.rand(3, 2)},
        **{"similarity": torch.rand(3, 2), "drop": 0.15, "method": "kl"},
    },
    "scheduled_rates": {"args": None, "steps": 3},
    "slim": {
        **{"model": NET, "groups": GROUPS, "keep": 0.5, "round_to": 1, "example_inputs": X, "calibration": [X]},
        **{"score": "obs", "ridge": 0.1, "intercept": False},
    },
    "split_lbi_update": {
        **{"weight": W, "dual": W, "gamma": W, "direction": W, "lr": 0.1, "kappa": 1.0, "nu": 9.0, "path_scale": 1.0}
    },
    "split_pool": {"ids": list("abcdef"), "queries": 2, "seed": 0, "vectors": torch.randn(6, 3), "threshold": 0.98},
    "widen": {"model": NET, "group": GROUPS[0], "add": 2, "init": "zero-out", "seed": 0},
    "write_splits": {"file": "splits.json", "splits": {"a": split_pool(list("abcdef"), 2)}},
}
# a model or function of the user's refuses tensors in words of its own; so does torch what an optimizer cannot hold
OTHERS = {("recalibrate_batch_norm", "batches"), ("knock_out", "rank")}


def refused(name: str, values: dict) -> Exception | None:
    """How a call is refused; None if it is not."""
    with torch.random.fork_rng(devices=[]):
        try:
            getattr(hf_effdl, name)(**values)
        except (ValueError, TypeError, OSError) as error:
            return error
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,argument", [(name, argument) for name, values in CALLS.items() for argument in values])
def test_every_argument_is_taken_or_refused_in_words_of_ours(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"output_dir": "run", "use_cpu": True, "report_to": "none"} if name.endswith("Arguments") else {}
    for junk in JUNK:
        if (name, argument) in OTHERS and isinstance(junk, nn.Module | torch.Tensor):
            continue
        error = refused(name, {**CALLS[name], argument: junk, **more})
        if error is None or isinstance(error, FileNotFoundError) or name == "SplitLBI" and argument == "params":
            continue
        frame = traceback.extract_tb(error.__traceback__)[-1]
        assert "hf_effdl" in frame.filename and frame.line.startswith("raise"), f"{junk!r}: {error!r} in {frame}"
        assert len(str(error)) > 20, f"{junk!r}: {error}"


def test_the_calls_of_this_table_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unready = {"ExamplePool", "RankerSelector", "plan_shards", "scheduled_rates"}  # and those that read files
    for name, values in CALLS.items():
        reads = any(value in values for value in ("folder", "repo_id", "file")) and name != "write_splits"
        if name not in unready and not reads and not name.endswith("Arguments"):
            inspect.signature(getattr(hf_effdl, name)).bind(**values)
            assert refused(name, values) is None, (name, refused(name, values))


# upstream refuses what is no model, arguments or config of its kind in words of its own
UPSTREAM = {name for name in hf_effdl.__all__ if name.endswith("Trainer")}
UPSTREAM |= {"ListwiseRanker", "MaeVqganForImageInpainting", "VisualInContextModel", "__version__"}
LEFT = [name for name in hf_effdl.__all__ if name not in {*CALLS, *UPSTREAM}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEFT)
def test_what_every_other_name_cannot_do_without_is_taken_or_refused_in_words_of_ours(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(getattr(hf_effdl, name)).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for junk in JUNK:
        error = refused(name, dict.fromkeys(needed, junk))
        if error is None or isinstance(error, OSError):  # the client's own, of a place that is not there
            continue
        frame = traceback.extract_tb(error.__traceback__)[-1]
        assert "hf_effdl" in frame.filename and frame.line.startswith("raise"), f"{junk!r}: {error!r} in {frame}"


@pytest.mark.parametrize(
    "kept",
    [
        lambda n: Options(candidates=n).candidates,
        lambda n: hf_effdl.VisualInContextConfig(candidates=n).candidates,
        lambda n: hf_effdl.ListwiseRankerConfig(list_length=n).list_length,
        lambda n: hf_effdl.CascadeSelector(passes=n).passes,
        lambda n: hf_effdl.DynamicsCallback(n).every,
        lambda n: limit_of(n, "ranks", {"a": 1}, {"a": 9}),
    ],
)
def test_a_whole_number_is_pythons_or_numpys_and_never_true(kept):
    assert type(kept(np.int64(3))) is int
    with pytest.raises(ValueError, match="True: "):
        kept(True)
