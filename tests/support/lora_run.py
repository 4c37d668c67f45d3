"""A short run on a LoRA adapter, as a script: `python lora_run.py OUT [--processes 2] [--init pissa] [--resume]`.

Leaves everything that runs must have in common in OUT/final.pt.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from leave import leave
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, set_seed

from hf_effdl import SplitLBIArguments, SplitLBITrainer, select_lora_ranks


SHARED: dict[str, Any] = {"base": "adamw", "learning_rate": 0.01, "max_steps": 60, "seed": 3, "save_strategy": "no"}
SHARED |= {"logging_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": True}
# else Trainer multiplies the loss of a classifier, a mean over rows, by the number of processes
SHARED |= {"average_tokens_across_devices": False}


def bert(**config: Any) -> BertForSequenceClassification:
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**{"vocab_size": 40, "num_labels": 2, **sizes, **calm, **config}))


def adapted(net: nn.Module, adapter_name: str = "default", **config: Any) -> PeftModel:
    """A fresh adapter of rank 4."""
    set_seed(1)
    settings = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"], **config})
    return get_peft_model(net, settings, adapter_name)


def texts(rows: int, seed: int) -> Dataset:
    """Two classes that differ in three of six tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=generator)
    tokens = torch.randint(4, 40, (rows, 6), generator=generator)
    tokens[:, 1:4] = 2 + labels[:, None]
    return Dataset.from_dict({"input_ids": tokens.numpy(), "labels": labels.numpy()}).with_format("torch")


def redrawn(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch whose labels are drawn anew."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": torch.randint(2, (len(rows),))}


def trainer(out: str | Path, net: nn.Module | None = None, collate: Any = None, **changes: Any) -> SplitLBITrainer:
    settings = {"per_device_train_batch_size": 16, **SHARED, **changes}
    if net is None:
        net = adapted(bert().double().eval(), modules_to_save=["classifier"], task_type="SEQ_CLS")
    args = SplitLBIArguments(str(out), **settings)
    return SplitLBITrainer(net, args, train_dataset=texts(128, 1), eval_dataset=texts(32, 2), data_collator=collate)


def from_base_weights(init: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A fresh adapter that takes a part of the base weights, and its tensors."""
    net = adapted(bert().eval(), init_lora_weights=init, modules_to_save=["classifier"], task_type="SEQ_CLS")
    return net, {name: tensor.clone() for name, tensor in get_peft_model_state_dict(net).items()}


def outcome(run: SplitLBITrainer, initial: Any = None) -> dict[str, Any]:
    small = select_lora_ranks(run.model, run.path, 0.4, initial=initial)
    return {
        "weights": {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad},
        "small": {name: p.detach().clone() for name, p in small.named_parameters() if p.requires_grad},
        "report": small.effdl_report,
        "path": run.path.units,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--init")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    net, initial = from_base_weights(options.init) if options.init else (None, None)
    saving = {"save_strategy": "steps", "save_steps": 10}
    run = trainer(options.out, net, per_device_train_batch_size=16 // options.processes, **saving)
    run.train(resume_from_checkpoint=options.resume or None)
    found = outcome(run, initial)
    if run.is_world_process_zero():
        torch.save(found, options.out / "final.pt")
    leave()
