"""Short `SplitLBITrainer` runs: `torchrun --nproc_per_node 2 -m distributed.trainer_run OUT NAME... [--resume]`.

NAME is ddp, full or sharded (FSDP2, by the form of its checkpoints).
"""

import argparse
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from leave import leave
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed

from distributed.fsdp_on_cpu import fsdp_on_cpu
from hf_effdl import SplitLBI, SplitLBIArguments, SplitLBICallback, SplitLBITrainer, find_groups, param_groups


class PlainConfig(PreTrainedConfig):
    model_type = "plain-net"


class PlainNet(PreTrainedModel):
    """A convolutional classifier without batch statistics; 5 filters and 3 classes split unevenly."""

    config: PlainConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.blocks = nn.Sequential(Block(1, 5), Block(5, 6))
        self.hidden = nn.Linear(6 * 4, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("shift", torch.full((1,), 0.25), persistent=False)
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initial weights stay."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.seen.copy_(pixel_values.mean())  # as batch statistics are, another one on every process
        logits = self.head(self.hidden(self.blocks(pixel_values - self.shift).flatten(1)).relu())
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return loss | {"logits": logits}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(self.conv(x).relu(), 2)


ROWS = 48
SHARED: dict[str, Any] = {"learning_rate": 0.2, "nu": 8.0, "path_length": 1.2, "weight_decay": 0.01, "seed": 3}
SHARED |= {"per_device_eval_batch_size": 4, "num_train_epochs": 6, "logging_steps": 8}
SHARED |= {"eval_strategy": "steps", "eval_steps": 16}
SHARED |= {"save_strategy": "steps", "save_steps": 16, "save_total_limit": 3}
SHARED |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True}


def images(count: int, seed: int) -> Dataset:
    """Three classes that differ in where the bright patch lies."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = 0.7 * torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, 2 * label : 2 * label + 3, 2:5] += 2
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels.numpy()}).with_format(
        "torch", dtype=torch.float64
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]).long(),
    }


def model() -> PlainNet:
    set_seed(0)
    return PlainNet(PlainConfig()).double()


def trainer(out: str | Path, processes: int = 1, net: nn.Module | None = None, **changes: Any) -> SplitLBITrainer:
    """The same run with one process, or with several and the same rows a step."""
    batch = {"per_device_train_batch_size": 6 // processes}
    args = SplitLBIArguments(str(out), **{**SHARED, **batch, **changes})
    return SplitLBITrainer(
        net or model(), args, train_dataset=images(ROWS, 1), eval_dataset=images(16, 2), data_collator=collate
    )


CLOCKS = ("runtime", "per_second", "preparation_time")


def outcome(run: SplitLBITrainer) -> dict[str, Any]:
    """Weights, path, log without clock times, and a slim model with what it predicts, in plain values."""
    net, small = run.plain_model(), run.slim(macs=0.5, latency_batch=0)
    rows = collate(list(images(8, 4)))["pixel_values"]
    log = [
        {key: value for key, value in entry.items() if not any(clock in key for clock in CLOCKS)}
        for entry in run.state.log_history
        if "train_loss" not in entry
    ]
    with torch.no_grad():
        logits = {name: model.eval()(rows)["logits"] for name, model in (("dense", net), ("slim", small))}
    return {
        "weights": {name: tensor.clone() for name, tensor in net.state_dict().items()},
        "slim": {name: tensor.clone() for name, tensor in small.state_dict().items()},
        "logits": logits,
        "path": run.path.units,
        "log": log,
        "masked": run.evaluate_masked(),
        "class": type(net).__name__,
        "buffer": net.shift.clone(),
    }


# ---- on two processes

SHARDING = {
    "full": {"state_dict_type": "FULL_STATE_DICT"},
    "sharded": {"state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": True},
}


def go(out: Path, name: str, resume: bool) -> None:
    """One run; process 0 leaves what it ends with in OUT/NAME.pt, and OUT/NAME has the checkpoints."""
    changes = {"fsdp": True, "fsdp_config": {"version": 2, **SHARDING[name]}} if name in SHARDING else {}
    with fsdp_on_cpu() if name in SHARDING else nullcontext():
        run = trainer(out / name, 2, **changes)
        run.train(resume_from_checkpoint=resume)
        assert all(hasattr(p, "to_local") for p in run.model.parameters()) == (name in SHARDING)
        result = outcome(run)
        if name in SHARDING:
            check_buffers(run)
        run.save_model(str(out / f"{name}-saved"))
        if run.is_world_process_zero():  # alone, as a script would
            torch.save(result, out / f"{name}.pt")


def check_buffers(run: SplitLBITrainer) -> None:
    """Every process has the first one's buffers in the model that was gathered."""
    values: list[Any] = [None, None]
    dist.all_gather_object(
        values, (run.accelerator.unwrap_model(run.model).seen.item(), run.plain_model().seen.item())
    )
    (first, plain), (second, other) = values
    assert plain == other == first != second, values


def refusals(out: Path) -> dict[str, str]:
    """What is said to settings that cannot work."""

    def plain() -> None:
        net = model()
        net.get_input_embeddings = lambda: None  # accelerate asks for them
        groups = find_groups(net, {"pixel_values": torch.zeros(1, 1, 8, 8, dtype=torch.float64)})
        args = TrainingArguments(str(out), fsdp=True, use_cpu=True, report_to="none", disable_tqdm=True)
        kwargs = {"params": param_groups(net, groups), "lr": 0.1}
        own = {"optimizer_cls_and_kwargs": (SplitLBI, kwargs), "callbacks": [SplitLBICallback()]}
        Trainer(net, args, train_dataset=images(8, 1), data_collator=collate, **own).train()

    def by_environment() -> None:  # as accelerate launch sets it
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false"}
        try:
            trainer(out)
        finally:
            for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_SYNC_MODULE_STATES"):
                del os.environ[name]

    tried: dict[str, Callable[[], Any]] = {
        "version 1": lambda: trainer(out, fsdp=True, fsdp_config={"version": 1}),
        "version 1 by environment": by_environment,
        "weights on one process": lambda: trainer(out, fsdp=True, fsdp_config={"cpu_ram_efficient_loading": True}),
        "groups of a sharded model": plain,
    }
    said = {}
    with fsdp_on_cpu():
        for name, attempt in tried.items():
            try:
                attempt()
                said[name] = "nothing"
            except ValueError as error:
                said[name] = str(error)
    return said


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        go(options.out, name, options.resume)
    if options.resume:
        said = refusals(options.out / "refused")
        if dist.get_rank() == 0:
            (options.out / "refused.json").write_text(json.dumps(said))
    leave()
