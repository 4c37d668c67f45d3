"""A short weighted fine-tuning, as a script: `torchrun --nproc_per_node 2 weighted_sft_run.py OUT BATCH MICRO`.

MICRO micro batches of BATCH rows make a step. Process 0 leaves the trained parameters in OUT/final.pt.
"""

import argparse
import random

import torch
from chat import conversations, llama, pairs, tokenizer
from datasets import Dataset
from leave import leave
from torch import Tensor
from transformers import Trainer
from trl import SFTConfig

from hf_effdl import WeightedSFTTrainer


def rows(kind: str = "pairs", count: int = 12) -> Dataset:
    """Rows with weights of mean 1, and for conversations weights of turns."""
    draw = random.Random(2)
    weight = [draw.random() ** 2 for _ in range(count)]
    columns = {"weight": [one * count / sum(weight) for one in weight]}
    if kind == "pairs":
        return Dataset.from_dict(pairs(count) | columns)
    turns = [[draw.random() for _ in range(4)] for _ in range(count)]
    return Dataset.from_dict(conversations(count) | columns | {"turn_weights": turns})


def settings(out: str, **changes: object) -> SFTConfig:
    """Plain SGD without clipping or decay, so that parameters move by the gradient and nothing else."""
    given = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3}
    given |= {"per_device_train_batch_size": 12, "num_train_epochs": 1, "save_strategy": "no", "bf16": False}
    given |= {"activation_checkpointing": False, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return SFTConfig(out, **given | changes)


def trained(trainer: Trainer) -> dict[str, Tensor]:
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run(out: str, batch: int, accumulate: int, **changes: object) -> dict[str, Tensor]:
    changes |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    args = settings(out, accelerator_config={"even_batches": False}, **changes)
    return trained(WeightedSFTTrainer(llama(), args, train_dataset=rows(), processing_class=tokenizer()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    for name in ("batch", "micro"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parameters = run(options.out, options.batch, options.micro)
    if torch.distributed.get_rank() == 0:
        torch.save(parameters, f"{options.out}/final.pt")
    leave()
