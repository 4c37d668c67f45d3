"""Several processes: DDP and FSDP2 with two gloo ranks equal one process, and go on where they were stopped."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from compare import assert_close
from distributed import optimizer_run, trainer_run
from forked import Script
from safetensors.torch import load_file
from test_examples import check, config  # noqa: F401 - a fixture: pictures and a model on disk


HERE, BIN = Path(__file__).parent / "support", Path(sys.executable).parent
CONFIGS = HERE.parents[1] / "examples" / "accelerate_configs"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


# ---- the optimizer


@pytest.fixture(scope="module")
def optimizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer")
    Script("distributed/optimizer_run.py", folder, processes=2, fresh=True).finish()
    return torch.load(folder / "result.pt", weights_only=True)


FORMS = [(case, form) for case, (*_, forms) in optimizer_run.CASES.items() for form in forms]


@pytest.mark.parametrize("case", [case for case in optimizer_run.CASES if case != "bfloat16"])
def test_two_processes_equal_one(optimizers, case):
    assert_close(optimizers[case], optimizer_run.run(case))


@pytest.mark.parametrize("case,form", FORMS)
def test_a_checkpoint_of_sharded_tensors_resumes_bit_for_bit(optimizers, case, form):
    assert_close(optimizers[f"{case}, {form}"], optimizers[case], tolerance=0)


def test_sharded_bfloat16_weights_have_a_float32_path(optimizers):
    run, alone = optimizers["bfloat16"], optimizer_run.run("bfloat16")
    assert all(weight.dtype == torch.bfloat16 for weight in run["weight"].values())
    assert all(dual.dtype == torch.float32 for dual in run["dual"].values())
    for name, dual in run["dual"].items():
        assert (dual - alone["dual"][name]).norm() < 0.05 * alone["dual"][name].norm(), name


def test_a_gradient_that_is_not_finite_on_one_process_stops_all_before_anything_moves(optimizers):
    others, own = optimizers["nan"]["errors"]
    assert "a gradient on another process has NaN" in others and "the gradient of weights, tensor 0" in own
    assert_close(optimizers["nan"]["after"], optimizers["nan"]["before"], tolerance=0)


# ---- Trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = trainer_run.trainer(tmp_path_factory.mktemp("alone"))
    run.train()
    return trainer_run.outcome(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """DDP and FSDP2 runs to their end, the last one killed at a random moment; then all three resumed."""
    folder = tmp_path_factory.mktemp("runs")
    script = Script("distributed/trainer_run.py", folder, "ddp", "sharded", "full", processes=2)
    script.wait_for(lambda: list(folder.glob("full/checkpoint-*/trainer_state.json")))
    time.sleep(delay := random.SystemRandom().uniform(0, 0.5))
    script.kill()
    print(f"killed {delay:.3f} s after the first checkpoint: {sorted(path.name for path in folder.glob('full/*'))}")
    for name in ("ddp", "sharded"):
        (folder / f"{name}.pt").rename(folder / f"{name}-uninterrupted.pt")
        shutil.rmtree(folder / name / "checkpoint-48")
    Script("distributed/trainer_run.py", folder, "ddp", "sharded", "full", "--resume", processes=2).finish()
    return folder


@pytest.mark.parametrize("name", ["ddp-uninterrupted", "sharded-uninterrupted", "ddp", "sharded", "full"])
def test_training_on_two_processes_equals_one_also_when_resumed(runs, alone, name):
    # weights, path, support and coupling in the log, evaluations of the projected model, the slim model
    assert_close(torch.load(runs / f"{name}.pt", weights_only=True), alone)


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_a_resumed_run_of_two_processes_equals_its_uninterrupted_one(runs, name):
    again, first = (torch.load(runs / f"{name}{end}.pt", weights_only=True) for end in ("", "-uninterrupted"))
    assert_close(again, first, tolerance=0)


@pytest.mark.parametrize("name", ["ddp", "full"])
def test_a_model_trained_on_two_processes_is_saved_whole(runs, alone, name):
    assert_close(load_file(runs / f"{name}-saved" / "model.safetensors"), alone["weights"])
    saved = json.loads((runs / f"{name}-saved" / "config.json").read_text())
    assert saved["architectures"] == ["PlainNet"]


def test_what_sharding_cannot_do_is_refused_by_name(runs):
    said = json.loads((runs / "refused.json").read_text())
    for version in ("version 1", "version 1 by environment"):
        assert "cannot run under FSDP1" in said[version] and "fsdp_version: 2" in said[version]
    assert "fsdp_cpu_ram_efficient_loading: false" in said["weights on one process"]
    assert "FSDPPlainNet is sharded" in said["groups of a sharded model"]


# ---- accelerate launch


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_configs_for_accelerate_are_what_accelerate_reads(name):
    settings = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert settings.num_processes == 2 and not settings.use_cpu
    assert settings.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    if name == "fsdp2":
        assert settings.fsdp_config["fsdp_version"] == 2
        assert settings.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.slow
def test_the_classifier_example_runs_sharded_under_accelerate_launch(config, tmp_path):  # noqa: F811
    command = [BIN / "accelerate", "launch", "--config_file", CONFIGS / "fsdp2.yaml", "-m", "distributed.fsdp_on_cpu"]
    command += [HERE.parents[1] / "examples" / "sparsify_image_classifier.py", "--config", config]
    command += ["--max_steps", "2", "--output_dir", tmp_path / "out"]
    done = subprocess.run([*map(str, command)], cwd=HERE, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("so the path starts dense") == 1 and done.stdout.count("slim model in") == 1
    check(tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()  # it was sharded indeed
    assert "FSDP" not in (tmp_path / "out" / "README.md").read_text()
