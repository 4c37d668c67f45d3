# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.12",
#     "datasets>=5.1",
#     "torch>=2.9",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Train an image classifier with split LBI on any image data set of the Hub, take a smaller one, save or push both.

    python examples/sparsify_image_classifier.py --model_name_or_path microsoft/resnet-18 --from_scratch \\
        --dataset_name beans --output_dir runs/beans --num_train_epochs 20 --macs 0.5
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/sparsify_image_classifier.py \\
        --config beans.yaml --push_to_hub

The smaller model is fine-tuned for `--finetune_epochs` with plain SGD, and its accuracy printed before and after. With
`--from_scratch` the learning rate is 0.1 by default, and all measurements of this project were made so; without it the
path starts dense, from the pretrained weights, at a rate of 0.01, as so large a one destroys them. All fields of
`SplitLBIArguments` (a `TrainingArguments`) are arguments too. Several processes
on a machine without a GPU need `--use_cpu`.
"""

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import leave, parse_arguments
from image_script import ImageArguments, accuracy, as_pixels, labels_of, load_splits
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_effdl import SplitLBIArguments, SplitLBITrainer


@dataclass(kw_only=True)
class ScriptArguments(ImageArguments):
    """What to train on what, and how small the result should be."""

    from_scratch: bool = field(default=False, metadata={"help": "Use the model's config with new weights."})
    macs: float = field(default=0.5, metadata={"help": "Share of the multiply-accumulates to keep, in (0, 1]."})
    widths: str = field(
        default="stock",
        metadata={"choices": ["stock", "free"], "help": "Sizes of the stock config, or any (loading needs hf_effdl)."},
    )
    finetune_epochs: float = field(default=3.0, metadata={"help": "Of the smaller model, with plain SGD; 0: none."})


def parse(argv: list[str]) -> tuple[ScriptArguments, SplitLBIArguments]:
    script, args = parse_arguments(argv, ScriptArguments, SplitLBIArguments, description=__doc__)
    if not 0 < script.macs <= 1:
        raise ValueError(f"--macs {script.macs}: it must be a share of the whole model, in (0, 1]")
    return script, args


def load_model(script: ScriptArguments, labels: dict[str, dict]) -> torch.nn.Module:
    """In single precision whatever the checkpoint has: images come in it, and convolutions want both alike."""
    if script.from_scratch:
        config = AutoConfig.from_pretrained(script.model_name_or_path, dtype=torch.float32, **labels)
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    return AutoModelForImageClassification.from_pretrained(
        script.model_name_or_path, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
    )


def finetune(small: torch.nn.Module, epochs: float, trainer: SplitLBITrainer) -> torch.nn.Module:
    """The smaller model after some epochs of SGD at half the learning rate, in the same setting otherwise."""
    alike = (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "weight_decay",
        "lr_scheduler_type",
        "dataloader_num_workers",
        "remove_unused_columns",
        "disable_tqdm",
        "report_to",
        "use_cpu",
        "bf16",
        "fp16",
        "seed",
    )
    args = TrainingArguments(
        str(Path(trainer.args.output_dir, "finetune")),
        num_train_epochs=epochs,
        optim="sgd",
        optim_args="momentum=0.9",
        learning_rate=trainer.args.learning_rate / 2,
        save_strategy="no",
        **{name: getattr(trainer.args, name) for name in alike},
    )
    tuner = Trainer(small, args, train_dataset=trainer.train_dataset)
    tuner.train()
    return tuner.accelerator.unwrap_model(tuner.model)


def main(argv: list[str] | None = None) -> None:
    script, args = parse(sys.argv[1:] if argv is None else argv)
    if not script.from_scratch and args.learning_rate >= 0.1 and not args.takes_default_rate:
        warnings.warn(
            f"learning rate {args.learning_rate} for pretrained weights: it destroys most of what they know; pass "
            "--learning_rate 0.01 or less, or --from_scratch",
            stacklevel=1,
        )
    set_seed(args.seed)
    data = load_splits(script, args.seed)
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    model = load_model(script, labels_of(data, script))
    data = data.with_transform(as_pixels(script, processor, model.config.num_channels))
    args.remove_unused_columns = False  # the transform reads columns that the model does not know
    trainer = SplitLBITrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    dense = trainer.evaluate()["eval_accuracy"]
    curve = trainer.evaluate_path()
    small = trainer.slim(macs=script.macs, widths=script.widths, bn_batches=8)
    report = small.config.effdl_report
    before, after = (
        {key: report[key][side] for key in ("params", "macs", "latency_ms")} for side in ("before", "after")
    )
    trainer.results = {
        "dense, split LBI": {"accuracy": dense, **before},
        "slim, not fine-tuned": {"accuracy": trainer.evaluate_model(small)["accuracy"], **after},
    }
    if script.finetune_epochs and trainer.is_fsdp_enabled:
        trainer.accelerator.print(
            "under FSDP the slim model is not fine-tuned: train it from its folder, in a run of its own"
        )
    elif script.finetune_epochs:
        small = finetune(small, script.finetune_epochs, trainer)
        trainer.results["slim, fine-tuned"] = {"accuracy": trainer.evaluate_model(small)["accuracy"], **after}
    trainer.save_model()
    card = {"dataset": script.dataset_name, "tasks": "image-classification"}
    if trainer.is_world_process_zero():
        trainer.create_model_card(**card)
        folder = trainer.save_slim(small, f"{args.output_dir}/slim", **card)
        print("accuracy of smaller models along the path, before any fine-tuning:")
        print("".join(f"  {point['macs']:.3f} of the MACs: {point['accuracy']:.4f}\n" for point in curve), end="")
        for name, result in trainer.results.items():
            print(f"accuracy of the model, {name}: {result['accuracy']:.4f}")
        macs, latency = (report[key]["ratio"] for key in ("macs", "latency_ms"))
        print(f"slim model in {folder}: MACs x {macs:.3f}, latency x {latency:.3f}")
    if args.push_to_hub:
        trainer.push_to_hub(**card)
        if trainer.is_world_process_zero():
            trainer.push_slim(small, f"{trainer.hub_model_id}-slim", **card)


if __name__ == "__main__":
    main()
    leave()
