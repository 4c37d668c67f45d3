import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from compare import assert_same
from datasets import Dataset
from forked import Script
from torch.utils.data import TensorDataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_effdl import SparsePath, SplitLBI, SplitLBIArguments, SplitLBICallback, SplitLBITrainer, find_groups, slim
from hf_effdl.structure.groups.surgery import mask
from hf_effdl.structure.optim.schedule import derive_path
from hf_effdl.structure.training.arguments import scheduled_rates
from hf_effdl.structure.training.evaluation import projected
from hf_effdl.structure.training.trainer import last_complete_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tiny_run.trainer(str(tmp_path_factory.mktemp("run")))
    run.train()
    return run


@pytest.fixture(scope="module")
def finished(trained):
    return tiny_run.outcome(trained)


# ---- one run, two routes


def test_a_plain_trainer_with_the_optimizer_and_the_callback_gives_the_same_run(finished, tmp_path):
    plain = tiny_run.plain_trainer(str(tmp_path))
    next(c for c in plain.callback_handler.callbacks if isinstance(c, SplitLBICallback)).groups = None  # it finds them
    plain.train()
    assert_same(tiny_run.outcome(plain), finished)


def test_nu_and_path_scale_follow_from_the_scheduled_learning_rates(trained):
    total = sum(0.1 * (1 - k / 48) for k in range(48))
    for group in trained.optimizer.param_groups:
        # a run this short gets the weakest nu that still lets the net train
        assert group["nu"] == pytest.approx(max(total / 3.7, 5))
        assert group["path_scale"] == pytest.approx(2.5 * group["nu"] / total)
    assert sum(scheduled_rates(trained.args, 48)) == pytest.approx(total)


def test_a_longer_run_weakens_the_ridge_in_proportion(tmp_path):
    args = SplitLBIArguments(str(tmp_path), lr_scheduler_type="constant", use_cpu=True)
    assert args.split_lbi_kwargs(3700)["nu"] == pytest.approx(100)
    assert args.split_lbi_kwargs(37000)["nu"] == pytest.approx(1000)
    assert args.split_lbi_kwargs(3700)["path_scale"] == pytest.approx(2.5 / 3.7)


def test_the_paper_preset_is_the_released_recipe(tmp_path):
    args = SplitLBIArguments(str(tmp_path), preset="paper", use_cpu=True)
    kwargs = args.split_lbi_kwargs(1000)
    assert (kwargs["nu"], kwargs["lam"], kwargs["lam_scale"], kwargs["path_scale"]) == (20.0, 1.0, "none", 1.0)
    run = tiny_run.trainer(str(tmp_path), preset="paper", num_train_epochs=1)
    run.train()
    kinds = {group["name"]: group["penalty"] for group in run.optimizer.param_groups}
    assert kinds["classifier.1.weight"] == "l1"
    lifted = [group for group in run.optimizer.param_groups if group["penalty"] == "group"]
    assert all(p.ndim == 4 for group in lifted for p in group["params"]) and len(lifted) == len(run.groups)
    assert all(group["scale"] == [1.0] * len(group["params"]) for group in lifted)
    assert run.slim(macs=0.5).config.effdl_report["macs"]["ratio"] <= 0.5


# ---- what is reported


def test_clipping_is_off_unless_asked_for_and_then_spoken_of(tmp_path, capsys):
    assert SplitLBIArguments(str(tmp_path), use_cpu=True).max_grad_norm == 0.0
    tiny_run.trainer(str(tmp_path), max_steps=1).train()
    assert "max_grad_norm" not in capsys.readouterr().out
    tiny_run.trainer(str(tmp_path), max_steps=1, max_grad_norm=1.0).train()
    assert "max_grad_norm=1.0 holds back the loss gradient" in capsys.readouterr().out


def test_the_printed_entry_epoch_is_when_a_unit_of_unchanged_norm_enters(tmp_path, capsys):
    run = tiny_run.trainer(str(tmp_path), num_train_epochs=4)
    run.train()
    out = capsys.readouterr().out
    printed = float(out.split("a median unit, of unchanged norm, enters at epoch ")[1].split()[0])
    assert all(group.name in out for group in run.groups) and "support after 32 steps" in out
    group = run.optimizer.param_groups[0]
    seen, step = 0.0, 0
    for step, rate in enumerate(scheduled_rates(run.args, 32), 1):  # V grows by path_scale lr / nu of the norm
        seen += group["path_scale"] * rate / group["nu"]
        if seen >= group["lam"] * (1 - 1e-9):
            break
    assert printed == pytest.approx(step / 8, abs=0.006)


def test_support_and_coupling_in_the_log_are_those_of_the_optimizer(trained):
    last = [entry for entry in trained.state.log_history if "support" in entry][-1]
    optimizer = trained.optimizer.optimizer
    inside, units, coupling = 0, 0, 0.0
    for group in optimizer.param_groups:
        if group["penalty"] is None:
            continue
        gamma = optimizer.gamma(group["params"][0])
        nonzero = (gamma.movedim(group["axis"][0], 0).flatten(1) != 0).any(1) if gamma.ndim > 1 else gamma != 0
        assert last[f"support/{group['name']}"] == pytest.approx(nonzero.float().mean().item())
        inside, units = inside + int(nonzero.sum()), units + group["units"]
        coupling += sum(((p - optimizer.gamma(p)) ** 2).sum().item() for p in group["params"]) / (2 * group["nu"])
    assert last["support"] == pytest.approx(inside / units)
    assert last["coupling"] == pytest.approx(coupling, rel=1e-4)


def test_projecting_puts_everything_back(trained):
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    with pytest.raises(RuntimeError), projected(trained.model, trained.optimizer.optimizer, trained.groups):
        raise RuntimeError
    assert_same({name: tensor.clone() for name, tensor in trained.model.state_dict().items()}, before)


def test_evaluating_leaves_the_random_state_alone(trained):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    trained.evaluate_masked()
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_the_path_stands_beside_every_checkpoint(trained):
    checkpoints = sorted(Path(trained.args.output_dir).glob("checkpoint-*"))
    assert len(checkpoints) == 3
    for checkpoint in checkpoints:
        path = SparsePath.load(checkpoint)
        assert path.step == int(checkpoint.name.rpartition("-")[2])
        assert (checkpoint / "sparse_path.safetensors").stat().st_size < 20_000
    assert_same(SparsePath.load(trained.args.output_dir).support, trained.path.support)


# ---- resume


@pytest.mark.parametrize("attempt", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_a_random_moment_and_resumed_equals_an_uninterrupted_one(finished, tmp_path, attempt):
    run = Script("tiny_run.py", tmp_path)
    run.wait_for(lambda: list(tmp_path.glob("checkpoint-*/trainer_state.json")))
    delay = random.SystemRandom().uniform(0, 0.6)
    time.sleep(delay)
    killed = run.kill()
    print(f"killed {delay:.3f} s after the first checkpoint, {sorted(path.name for path in tmp_path.iterdir())}")
    assert killed or (tmp_path / "final.pt").exists()
    Script("tiny_run.py", tmp_path, "--resume").finish()
    assert_same(torch.load(tmp_path / "final.pt", weights_only=True), finished, f"after {delay:.3f} s")


def test_resuming_skips_a_checkpoint_whose_saving_was_cut_off(tmp_path):
    for step in (4, 8, 12, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text('{"global_')
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-8")
    with pytest.raises(ValueError, match="no complete checkpoint .* without resume_from_checkpoint"):
        last_complete_checkpoint(str(tmp_path / "checkpoint-8"))


def test_a_checkpoint_is_complete_once_the_random_states_of_all_processes_are_whole(tmp_path):
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        for rank in range(2):
            torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    states = folder / "rng_state_1.pth"
    whole = states.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 30):  # killed while it was written
        states.write_bytes(whole[:length])
        assert last_complete_checkpoint(str(tmp_path), 2).endswith("checkpoint-4")
    states.write_bytes(whole)
    assert last_complete_checkpoint(str(tmp_path), 2).endswith("checkpoint-8")


def test_the_best_model_and_its_path_are_loaded_at_the_end(tmp_path):
    run = tiny_run.trainer(
        str(tmp_path), load_best_model_at_end=True, metric_for_best_model="eval_sparse_loss", greater_is_better=False
    )
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=20))
    run.train()
    values = {e["step"]: e["eval_sparse_loss"] for e in run.state.log_history if "eval_sparse_loss" in e}
    best = int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert values[best] == min(values.values())
    assert run.path.step == best
    from safetensors.torch import load_file

    saved = load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert_same(
        {name: p.detach() for name, p in run.model.named_parameters()},
        {n: saved[n] for n, _ in run.model.named_parameters()},
    )


def test_a_checkpoint_of_other_groups_is_refused(trained, tmp_path):
    checkpoint = sorted(Path(trained.args.output_dir).glob("checkpoint-*"))[0]
    run = tiny_run.trainer(str(tmp_path), preset="paper")
    with pytest.raises(ValueError, match="checkpoint is of other groups"):
        run.train(resume_from_checkpoint=str(checkpoint))


# ---- the smaller model


@pytest.mark.parametrize("budget", ["macs", "params", "keep"])
def test_slim_holds_the_budget_and_reports_it(trained, budget):
    small = trained.slim(**{budget: 0.5})
    report = small.config.effdl_report
    assert type(small) is type(trained.model) and report["budget"] == {budget: 0.5}
    assert report["params"]["after"] == sum(p.numel() for p in small.parameters())
    assert report["params"]["before"] == sum(p.numel() for p in trained.model.parameters())
    assert report["latency_ms"]["before"] > 0 and report["latency_ms"]["after"] > 0
    if budget != "keep":
        assert report[budget]["ratio"] <= 0.5
    assert getattr(small.config, "quantization_config", None) is None
    assert small.config.hidden_sizes[0] == small.config.embedding_size < 4
    json.dumps(small.config.to_dict())


def test_slim_equals_the_masked_model_and_leaves_the_trained_one(trained):
    from copy import deepcopy

    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    small = trained.slim(macs=0.5, widths="free", calibration=False).eval()
    kept = trained.path.select(macs=0.5, widths="free")
    silent = mask(deepcopy(trained.model), trained.groups, kept).eval()
    x = torch.randn(4, 1, 16, 16)
    assert torch.allclose(small(x).logits, silent(x).logits, atol=1e-5)
    assert_same({name: tensor.clone() for name, tensor in trained.model.state_dict().items()}, before)


def test_slim_refits_on_training_rows_unless_told_otherwise(trained):
    small, own = trained.slim(macs=0.5), trained.slim(macs=0.5, calibration=[torch.randn(20, 1, 16, 16)], score="obs")
    report = small.config.effdl_report["calibration"]
    assert report["score"] == "path" and report["rows"] + report["held_out"] == len(trained.train_dataset)
    assert report["error"] < report["error_without"]
    other = own.config.effdl_report
    assert other["calibration"]["score"] == "obs" and other["calibration"]["rows"] == 16
    assert other["units"] == small.config.effdl_report["units"]
    assert "calibration" not in trained.slim(macs=0.5, calibration=False).config.effdl_report


def test_the_path_sizes_free_groups_and_the_function_goes_by_the_outputs(trained):
    by_path = trained.slim(keep=0.5, widths="free", latency_batch=0).config.effdl_report["units"]
    kept = trained.path.select(keep=0.5, widths="free")
    assert {name: of["after"] for name, of in by_path.items()} == {name: len(index) for name, index in kept.items()}
    rows = {"pixel_values": torch.randn(20, 1, 16, 16)}
    by_outputs = slim(trained.model, trained.groups, 0.5, example_inputs=rows, calibration=[rows] * 2, widths="free")
    assert by_outputs.config.effdl_report["units"] != by_path


def test_batch_norm_is_re_estimated_on_request_only(trained):
    kept, estimated = (trained.slim(macs=0.6, calibration=False, bn_batches=n) for n in (0, 4))
    stats = [{n: b for n, b in net.named_buffers() if n.endswith("running_mean")} for net in (kept, estimated)]
    dense = dict(trained.model.named_buffers())
    assert all(set(b.tolist()) <= set(dense[n].tolist()) for n, b in stats[0].items())
    assert any(not torch.equal(stats[0][n], stats[1][n]) for n in stats[0])
    for refused in (trained.slim, trained.evaluate_path, trained.evaluate_masked):
        with pytest.raises(ValueError, match="bn_batches='8': it must be a whole number, at least 0"):
            refused(bn_batches="8")
    assert_same(
        {n: p.detach() for n, p in kept.named_parameters()}, {n: p.detach() for n, p in estimated.named_parameters()}
    )


def test_the_curve_is_measured_and_stays_with_the_path(trained, tmp_path):
    curve = trained.evaluate_path(shares=(0.9, 0.5, 0.001), bn_batches=2)
    assert [point["macs"] <= share for point, share in zip(curve, (0.9, 0.5), strict=True)] == [True, True]
    trained.path.save(tmp_path)
    loaded = SparsePath.load(tmp_path)
    assert loaded.curve == curve
    figure = loaded.plot(selected=loaded.select(macs=0.5))
    figure.savefig(tmp_path / "path.png")
    assert len(figure.axes) == 2 and (tmp_path / "path.png").stat().st_size > 10_000


def test_a_slim_model_trains_in_a_trainer_and_slims_again(trained, tmp_path):
    small = trained.slim(macs=0.6, widths="free")
    args = SplitLBIArguments(str(tmp_path), **{**tiny_run.SHARED, "max_steps": 4})
    again = SplitLBITrainer(small, args, train_dataset=tiny_run.images(32, 1), eval_dataset=tiny_run.images(8, 2))
    again.train()
    smaller = again.slim(macs=0.7)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())


# ---- bad input


RANGES = ("nu", "kappa", "learning_rate", "lam", "path_scale", "path_length", "ridge_length")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed"),
        ({"preset": "papers"}, "preset='papers': it must be one of"),
        ({"lam_scale": "first"}, "lam_scale='first'"),
        ({"base": "adam"}, "base='adam': .*'sgd', 'adamw'"),
        ({"nesterov": True, "base": "adamw"}, "nesterov=True needs base='sgd' and momentum > 0"),
        ({"momentum": 1.0}, "momentum=1.0: it must be in"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=True needs base='sgd'"),
        *(({"path_share": share}, f"path_share={share}: it is a share of the run") for share in (0, 1.5, -1)),
        *(({name: value}, f"{name}=") for name in RANGES for value in (0.0, -1.0, float("inf"))),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        SplitLBIArguments(str(tmp_path), use_cpu=True, **change)


def test_a_path_may_fill_the_first_part_of_a_run(tmp_path):
    """It is as long as that of a run that ends there, with the learning rates of the whole run."""
    args = SplitLBIArguments(str(tmp_path), path_share=0.25, lr_scheduler_type="linear", use_cpu=True)
    rates = scheduled_rates(args, 4000)[:1000]
    assert args.split_lbi_kwargs(4000)["nu"] == pytest.approx(sum(rates) / 3.7)
    expected = derive_path(sum(rates))
    assert {name: args.split_lbi_kwargs(4000)[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"train_dataset": Dataset.from_dict({"pixel_values": [], "labels": []})}, ValueError, "dataset is empty"),
        ({"args": TrainingArguments("unused", use_cpu=True)}, TypeError, "must be SplitLBIArguments, not Training"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)], 0.1), None)}, ValueError, "optimizers= holds SGD"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, ValueError, "makes its own optimizer"),
    ],
)
def test_trainers_that_cannot_work_are_refused_by_name(tmp_path, change, error, message):
    args = SplitLBIArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(error, match=message):
        SplitLBITrainer(tiny_run.model(), **{"args": args, "train_dataset": tiny_run.images(8, 1), **change})


def test_several_devices_in_one_process_are_refused_by_name(tmp_path, monkeypatch):
    args = SplitLBIArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(SplitLBIArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="DataParallel.*torchrun"):
        SplitLBITrainer(tiny_run.model(), args, train_dataset=tiny_run.images(8, 1))


def test_a_path_too_short_for_any_unit_is_refused_before_the_first_step(tmp_path):
    run = tiny_run.trainer(str(tmp_path), nu=100.0, path_scale=1.0)
    with pytest.raises(ValueError, match="path is too short"):
        run.train()
    assert run.state.global_step == 0


def test_a_callback_without_its_optimizer_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    run = Trainer(tiny_run.model(), args, train_dataset=tiny_run.images(8, 1), callbacks=[SplitLBICallback()])
    with pytest.raises(ValueError, match="SplitLBICallback needs the SplitLBI optimizer, this Trainer has AdamW"):
        run.train()
    net = tiny_run.model()
    optimizer = (SplitLBI, {"params": net.parameters(), "lr": 0.1})
    run = Trainer(net, args, train_dataset=tiny_run.images(8, 1), optimizer_cls_and_kwargs=optimizer)
    run.add_callback(SplitLBICallback())
    with pytest.raises(ValueError, match="nothing would be selected"):
        run.train()


def test_a_plain_trainer_under_fsdp1_is_refused_by_name(tmp_path):
    class FullyShardedDataParallel(torch.nn.Module):  # what accelerate wraps the model in
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    plain = tiny_run.plain_trainer(str(tmp_path))
    callback = next(c for c in plain.callback_handler.callbacks if isinstance(c, SplitLBICallback))
    parts = {"model": FullyShardedDataParallel(plain.model), "optimizer": plain.create_optimizer()}
    with pytest.raises(ValueError, match="cannot run under FSDP1.*fsdp_version: 2"):
        callback.on_train_begin(plain.args, plain.state, plain.control, **parts)


def test_the_path_is_asked_for_too_early(tmp_path):
    with pytest.raises(ValueError, match="call train"):
        tiny_run.trainer(str(tmp_path)).path  # noqa: B018


def test_nan_in_the_data_stops_the_run_and_keeps_the_weights(tmp_path):
    rows = tiny_run.images(16, 1)
    pixels = torch.stack([row["pixel_values"] for row in rows])
    pixels[8:] = float("nan")
    bad = Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": [int(r["labels"]) for r in rows]}).with_format(
        "torch"
    )
    args = SplitLBIArguments(str(tmp_path), **{**tiny_run.SHARED, "max_grad_norm": 0.0, "eval_strategy": "no"})
    run = SplitLBITrainer(tiny_run.model(), args, train_dataset=bad)
    with pytest.raises(ValueError, match="gradient .* NaN"):
        run.train()
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_group_of_another_model_is_refused(tmp_path):
    from torch import nn

    other = find_groups(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.zeros(1, 1, 8, 8))
    args = SplitLBIArguments(str(tmp_path), **{**tiny_run.SHARED, "eval_strategy": "no"})
    run = SplitLBITrainer(tiny_run.model(), args, train_dataset=tiny_run.images(8, 1), groups=other)
    with pytest.raises(ValueError, match="is of another model"):
        run.train()


def test_tensor_data_sets_work_without_the_datasets_library(tmp_path):
    class Pairs(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return {"pixel_values": x, "labels": y}

    args = SplitLBIArguments(str(tmp_path), **{**tiny_run.SHARED, "max_steps": 2, "eval_strategy": "no"})
    run = SplitLBITrainer(
        tiny_run.model(), args, train_dataset=Pairs(torch.randn(16, 1, 16, 16), torch.randint(2, (16,)))
    )
    run.train()
    assert run.path.step == 2


def test_the_card_of_a_slim_model_marks_the_units_that_were_kept(tmp_path, monkeypatch):
    run = tiny_run.trainer(str(tmp_path), preset="paper", num_train_epochs=1)
    run.train()
    small = run.slim(macs=0.5)
    marked = {}

    def plot(path, selected=None, order="dual"):
        marked.update(selected, order=order)
        raise ImportError  # as without matplotlib

    monkeypatch.setattr(SparsePath, "plot", plot)
    run.save_slim(small, tmp_path / "slim")
    assert marked.pop("order") == "entry"
    kept = run.path.select(macs=0.5, order="entry")
    assert_same({name: index.sort().values for name, index in marked.items()}, kept)


def test_a_net_without_a_config_is_not_saved_as_a_hub_model(trained, tmp_path):
    with pytest.raises(TypeError, match="Linear is no transformers model.*state_dict"):
        trained.save_slim(torch.nn.Linear(2, 2), tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


# ---- other bases, and the compiled step


def test_the_base_sets_the_learning_rate_and_the_least_nu(tmp_path):
    sgd, adamw = (SplitLBIArguments(str(tmp_path), base=base, use_cpu=True) for base in ("sgd", "adamw"))
    assert (sgd.learning_rate, adamw.learning_rate) == (0.1, 0.003)
    assert SplitLBIArguments(str(tmp_path), base="adamw", learning_rate=0.01, use_cpu=True).learning_rate == 0.01
    total = sum(scheduled_rates(adamw, 1000))
    kwargs = adamw.split_lbi_kwargs(1000)
    assert kwargs["nu"] == pytest.approx(total / 3.7) and kwargs["nu"] < 1
    assert kwargs["path_scale"] == pytest.approx(2.5 / 3.7)
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "decoupled_weight_decay": False}
    named = SplitLBIArguments(str(tmp_path), base="adamw", **adam, fused=True, use_cpu=True).split_lbi_kwargs(10)
    assert (named["betas"], named["eps"], named["fused"]) == ((0.8, 0.9), 1e-6, True)
    assert named["decoupled_weight_decay"] is False
    assert SplitLBIArguments(str(tmp_path), nesterov=True, use_cpu=True).split_lbi_kwargs(10)["nesterov"]


OTHERS = ({"base": "adamw", "learning_rate": 0.01, "start": "dense"}, {"nesterov": True})


@pytest.mark.parametrize("changes", OTHERS)
def test_a_run_with_another_base_resumes_bit_for_bit_and_slims(tmp_path, changes):
    whole = tiny_run.trainer(str(tmp_path / "whole"), **changes)
    whole.train()
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    again = tiny_run.trainer(str(tmp_path / "again"), **changes)
    again.train(resume_from_checkpoint=str(first))
    ends = [tiny_run.outcome(run) for run in (again, whole)]
    assert_same(*[{key: end[key] for key in ("model", "optimizer", "path")} for end in ends])
    again.create_model_card()
    card = (tmp_path / "again" / "README.md").read_text()
    shown = "| betas | (0.9, 0.999) |" if "base" in changes else "| nesterov | True |"
    assert f"| base | {changes.get('base', 'sgd')} |" in card and shown in card
    assert again.slim(macs=0.5).config.effdl_report["macs"]["ratio"] <= 0.5


def test_a_run_with_the_compiled_step_has_the_same_path(finished, tmp_path, compiler):
    run = tiny_run.trainer(str(tmp_path), fused=True)
    run.train()
    got = tiny_run.outcome(run)
    for name, units in finished["path"].items():
        assert torch.equal(units["entered"], got["path"][name]["entered"])
        assert torch.equal(units["left"], got["path"][name]["left"])
    for name, tensor in finished["model"].items():
        torch.testing.assert_close(got["model"][name], tensor, rtol=1e-3, atol=1e-4)
