"""What the scripts that train on texts share: how small, and how the smaller model learns from the larger one."""

from dataclasses import dataclass, field
from pathlib import Path

from command_line import ConfigArguments
from torch import nn
from transformers import TrainingArguments

from hf_effdl import Distillation, DistillationTrainer, SplitLBITrainer


@dataclass(kw_only=True)
class SmallerArguments(ConfigArguments):
    """How small the result is, and how it is fine-tuned."""

    macs: float = field(default=0.5, metadata={"help": "Share of the multiply-accumulates to keep, in (0, 1]."})
    widths: str = field(
        default="stock",
        metadata={"choices": ["stock", "free"], "help": "Sizes of the stock config, or any (loading needs hf_effdl)."},
    )
    score: str = field(
        default="path",
        metadata={"choices": ["path", "magnitude", "activation", "obs", "fisher"], "help": "Which units stay."},
    )
    finetune_epochs: float = field(default=1.0, metadata={"help": "Of the smaller model, with AdamW; 0: none."})
    teacher_share: float = field(default=0.5, metadata={"help": "Of the loss while fine-tuning, in [0, 1]."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a row."})

    def __post_init__(self) -> None:
        if not 0 < self.macs <= 1:
            raise ValueError(f"--macs {self.macs}: it must be a share of the whole model, in (0, 1]")


def finetune(small: nn.Module, trainer: SplitLBITrainer, script: SmallerArguments) -> nn.Module:
    """The smaller model after some epochs of AdamW, with the larger one as its teacher, in the same setting else."""
    alike = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "dataloader_num_workers",
        "disable_tqdm",
        "max_steps",
        "report_to",
        "use_cpu",
        "bf16",
        "fp16",
        "seed",
    )
    args = TrainingArguments(
        str(Path(trainer.args.output_dir, "finetune")),
        num_train_epochs=script.finetune_epochs,
        learning_rate=5e-5,
        save_strategy="no",
        **{name: getattr(trainer.args, name) for name in alike},
    )
    tuner = DistillationTrainer(
        small,
        args,
        distillation=Distillation(trainer.plain_model(), weight=script.teacher_share),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
    )
    tuner.train()
    return tuner.accelerator.unwrap_model(tuner.model)


def run(trainer: SplitLBITrainer, script: SmallerArguments, metric: str, **card: str) -> dict[str, dict[str, float]]:
    """Train along the path, take the smaller model, fine-tune it, save or push both; what is measured of each."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    results = {"dense, split LBI": trainer.evaluate_model(trainer.plain_model())}
    small = trainer.slim(macs=script.macs, widths=script.widths, score=script.score)
    results["slim, not fine-tuned"] = trainer.evaluate_model(small)
    if script.finetune_epochs:
        small = finetune(small, trainer, script)
        results["slim, fine-tuned"] = trainer.evaluate_model(small)
    report = small.config.effdl_report
    sides = {name: "before" if name.startswith("dense") else "after" for name in results}
    trainer.results = {
        name: {metric: found[metric], **{key: report[key][sides[name]] for key in ("params", "macs", "latency_ms")}}
        for name, found in results.items()
    }
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.create_model_card(**card)
        folder = trainer.save_slim(small, f"{args.output_dir}/slim", **card)
        for name, found in trainer.results.items():
            print(f"{metric} of the model, {name}: {found[metric]:.4f}")
        macs, latency = (report[key]["ratio"] for key in ("macs", "latency_ms"))
        print(f"slim model in {folder}: MACs x {macs:.3f}, latency x {latency:.3f}")
    if args.push_to_hub:
        trainer.push_to_hub(**card)
        if trainer.is_world_process_zero():
            trainer.push_slim(small, f"{trainer.hub_model_id}-slim", **card)
    return trainer.results
