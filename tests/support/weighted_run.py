"""A short weighted run in float64, as a script: `torchrun --nproc_per_node 2 weighted_run.py OUT ROWS BATCH MICRO`.

MICRO micro batches of BATCH rows make a step. Process 0 leaves the trained parameters in OUT/final.pt.
"""

import argparse

import torch
from datasets import Dataset
from leave import leave
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_effdl import WeightedTrainer


WORDS, LENGTH = 30, 6
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def rows(count: int, seed: int = 1) -> Dataset:
    """Random tokens of three classes, with weights of mean 1."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(count, generator=generator, dtype=torch.float64) ** 3
    return Dataset.from_dict(
        {
            "input_ids": torch.randint(1, WORDS, (count, LENGTH), generator=generator).tolist(),
            "labels": torch.randint(3, (count,), generator=generator).tolist(),
            "weight": (weight / weight.mean()).tolist(),
        }
    )


def classifier(**config: object) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=3, **SIZES, **config)).double()


def arguments(out: str, **changes: object) -> TrainingArguments:
    """Plain SGD without clipping or decay, so that parameters move by the gradient and nothing else."""
    settings = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3}
    settings |= {"per_device_train_batch_size": 16, "num_train_epochs": 1, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(out, use_cpu=True, report_to="none", disable_tqdm=True, **settings | changes)


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """The parameters after training."""
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run(out: str, count: int, batch: int, accumulate: int) -> dict[str, Tensor]:
    args = arguments(
        out,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        accelerator_config={"even_batches": False},  # no row twice, so the last batches of the processes may differ
    )
    return trained(WeightedTrainer(classifier(), args, train_dataset=rows(count)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    for name in ("rows", "batch", "micro"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parameters = run(options.out, options.rows, options.batch, options.micro)
    if torch.distributed.get_rank() == 0:
        torch.save(parameters, f"{options.out}/final.pt")
    leave()
