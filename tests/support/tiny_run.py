"""A short split LBI run on made-up images, as a script: `python tiny_run.py OUT [--resume] [--plain]`.

Leaves everything that a resumed run must have in common with an uninterrupted one in OUT/final.pt.
"""

import argparse
import sys

import torch
from datasets import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from hf_effdl import (
    SparsePath,
    SplitLBI,
    SplitLBIArguments,
    SplitLBICallback,
    SplitLBITrainer,
    find_groups,
    param_groups,
)


CLOCKS = ("runtime", "per_second")
SHARED = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "num_train_epochs": 6, "seed": 3}
SHARED |= {"learning_rate": 0.1, "max_grad_norm": 0.0, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
SHARED |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 3}
SHARED |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True}


def images(rows: int, seed: int) -> Dataset:
    """Two classes that differ in where the bright patch lies."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=generator)
    pixels = torch.randn(rows, 1, 16, 16, generator=generator)
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, 4 * label : 4 * label + 4, 4:8] += 2
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels.numpy()}).with_format("torch")


def model() -> ResNetForImageClassification:
    set_seed(0)
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 2}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))


def trainer(out: str, **changes) -> SplitLBITrainer:
    args = SplitLBIArguments(out, **{**SHARED, **changes})
    return SplitLBITrainer(model(), args, train_dataset=images(64, 1), eval_dataset=images(32, 2))


def plain_trainer(out: str, **changes) -> Trainer:
    """The same run in a plain Trainer, with the optimizer and the callback given to it."""
    settings = SplitLBIArguments(out, **{**SHARED, **changes})
    steps = 8 * int(settings.num_train_epochs)
    net = model()
    groups = find_groups(net, {"pixel_values": torch.zeros(1, 1, 16, 16)})
    kwargs = settings.split_lbi_kwargs(steps) | {"params": param_groups(net, groups)}
    args = TrainingArguments(out, **{**SHARED, **changes})
    own = {"optimizer_cls_and_kwargs": (SplitLBI, kwargs), "callbacks": [SplitLBICallback(groups)]}
    return Trainer(net, args, train_dataset=images(64, 1), eval_dataset=images(32, 2), **own)


def outcome(run: Trainer) -> dict:
    """Weights, optimizer state, path and log without clock times, in plain values."""
    optimizer = run.optimizer.optimizer
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, SplitLBICallback))
    path: SparsePath = callback.path(optimizer)
    log = [
        {key: value for key, value in entry.items() if not any(clock in key for clock in CLOCKS)}
        for entry in run.state.log_history
        if "train_loss" not in entry  # the mean over this process's steps, by design of Trainer
    ]
    return {
        "model": {name: tensor.clone() for name, tensor in run.model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "path": path.units,
        "log": log,
        "step": run.state.global_step,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = trainer(options.out)
    run.train(resume_from_checkpoint=options.resume)
    torch.save(outcome(run), f"{options.out}/final.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
