"""Half precision, compiled models and gradient checkpointing: the path is that of an ordinary run."""

import shutil

import pytest
import tiny_run
import torch
from transformers import ViTConfig, ViTForImageClassification, set_seed

from hf_effdl import SplitLBIArguments, SplitLBITrainer


def lifted(run: SplitLBITrainer):
    optimizer = run.optimizer.optimizer
    return [(optimizer, p) for group in optimizer.param_groups if group["penalty"] for p in group["params"]]


def weights(run: SplitLBITrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()}


def assert_same_run(a: SplitLBITrainer, b: SplitLBITrainer, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(weights(a), weights(b), rtol=tolerance, atol=tolerance)
    for name, unit in a.path.units.items():
        torch.testing.assert_close(unit, b.path.units[name], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    run = tiny_run.trainer(str(tmp_path_factory.mktemp("ordinary")))
    run.train()
    assert len({step for steps in run.path.entered.values() for step in steps.tolist()}) > 3
    return run


# ---- half precision


@pytest.fixture(scope="module")
def autocast(tmp_path_factory):
    run = tiny_run.trainer(str(tmp_path_factory.mktemp("autocast")), bf16=True)
    run.train()
    return run


def test_under_bf16_autocast_weights_gradients_and_path_stay_float32(autocast, ordinary):
    assert autocast.accelerator.native_amp
    assert all(p.dtype == torch.float32 for p in autocast.model.parameters())
    assert all(optimizer.dual(p).dtype == torch.float32 for optimizer, p in lifted(autocast))
    assert any(not torch.equal(a, b) for a, b in zip(weights(autocast).values(), weights(ordinary).values()))
    for name, unit in ordinary.path.units.items():
        ratio = autocast.path.units[name]["dual"] / unit["dual"]
        assert ((0.8 < ratio) & (ratio < 1.25)).all(), name
        both = (unit["entered"] > 0) & (autocast.path.units[name]["entered"] > 0)
        assert ((unit["entered"] - autocast.path.units[name]["entered"])[both].abs() <= 6).all()


def test_a_run_under_bf16_autocast_resumes_bit_for_bit(autocast, tmp_path):
    shutil.copytree(f"{autocast.args.output_dir}/checkpoint-44", tmp_path / "checkpoint-44")
    run = tiny_run.trainer(str(tmp_path), bf16=True)
    run.train(resume_from_checkpoint=True)
    assert_same_run(run, autocast, tolerance=0)


def halves(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")}
    return batch | {"pixel_values": batch["pixel_values"].bfloat16()}


def test_a_bfloat16_model_on_float_inputs_is_told_what_to_load(tmp_path):
    args = SplitLBIArguments(str(tmp_path), **tiny_run.SHARED)
    data = tiny_run.images(16, 1)
    trainer = SplitLBITrainer(tiny_run.model().bfloat16(), args, train_dataset=data, eval_dataset=data)
    with pytest.raises(
        ValueError, match=r"bfloat16 .*\['pixel_values'\].*load it with dtype=torch.float32, and set bf16"
    ):
        trainer.train()


def test_a_bfloat16_model_keeps_a_float32_path_also_when_resumed(tmp_path):
    def trainer(folder: str) -> SplitLBITrainer:
        args = SplitLBIArguments(f"{tmp_path}/{folder}", **tiny_run.SHARED)
        data = {"train_dataset": tiny_run.images(64, 1), "eval_dataset": tiny_run.images(32, 2)}
        return SplitLBITrainer(tiny_run.model().bfloat16(), args, data_collator=halves, **data)

    first = trainer("first")
    first.train()
    for optimizer, p in lifted(first):
        dual = optimizer.dual(p)
        assert p.dtype == torch.bfloat16 and dual.dtype == torch.float32
        assert not torch.equal(dual, dual.bfloat16().float())  # it has bits that bfloat16 would have lost
    assert any((entered > 0).any() for entered in first.path.entered.values())
    shutil.copytree(tmp_path / "first" / "checkpoint-44", tmp_path / "again" / "checkpoint-44")
    again = trainer("again")
    again.train(resume_from_checkpoint=True)
    assert_same_run(again, first, tolerance=0)
    assert all(p.dtype == torch.bfloat16 for p in first.slim(macs=0.6, latency_batch=0).parameters())


# ---- torch.compile


def test_a_compiled_run_is_the_ordinary_one_and_leaves_plain_models(ordinary, tmp_path):
    run = tiny_run.trainer(str(tmp_path), torch_compile=True, torch_compile_backend="aot_eager")
    run.train()
    assert hasattr(run.model_wrapped, "_orig_mod")  # it was compiled
    assert [group.name for group in run.groups] == [group.name for group in ordinary.groups]
    assert_same_run(run, ordinary)
    small = run.slim(macs=0.6)
    assert type(small) is type(run.plain_model()) is type(ordinary.model)
    saved = run.save_slim(small, tmp_path / "slim")
    for folder in (saved, tmp_path / "checkpoint-48"):
        loaded = type(small).from_pretrained(folder)
        assert not any("_orig_mod" in name for name in loaded.state_dict())
    torch.testing.assert_close(type(small).from_pretrained(saved).state_dict(), small.state_dict())


# ---- gradient checkpointing


def vit_run(folder: str, **changes: object) -> tuple[SplitLBITrainer, int]:
    """A short run of a transformers ViT, and how often its first layer was computed."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    sizes |= {"image_size": 16, "patch_size": 8, "num_channels": 1, "num_labels": 2}
    net = ViTForImageClassification(ViTConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    args = SplitLBIArguments(folder, **{**tiny_run.SHARED, "save_strategy": "no", "eval_strategy": "no", **changes})
    run = SplitLBITrainer(net, args, train_dataset=tiny_run.images(64, 1))
    parts = ("attention.q_proj", "mlp.fc1")
    assert [group.name for group in run.groups] == [f"vit.layers.{i}.{part}" for i in range(2) for part in parts]
    calls = []
    net.vit.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(0))
    run.train()
    return run, len(calls)


def test_gradient_checkpointing_gives_the_same_path(tmp_path):
    plain, once = vit_run(f"{tmp_path}/plain")
    checkpointed, twice = vit_run(f"{tmp_path}/checkpointed", activation_checkpointing=True)
    assert once == plain.state.global_step and twice == 2 * once  # every layer is computed again in backward
    assert any((entered > 0).any() for entered in plain.path.entered.values())
    assert_same_run(checkpointed, plain)
    small = checkpointed.slim(keep=0.5, latency_batch=0)
    assert type(small) is ViTForImageClassification
