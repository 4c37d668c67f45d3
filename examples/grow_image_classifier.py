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

"""Grow an image classifier from a narrow ResNet on any image data set of the Hub, save or push it with its history.

    python examples/grow_image_classifier.py --model_name_or_path microsoft/resnet-18 --dataset_name beans \\
        --output_dir runs/beans --num_train_epochs 30 --max-macs-share 0.5
    torchrun --nproc_per_node 2 examples/grow_image_classifier.py --config beans.yaml --push_to_hub

The net begins with new weights, the depths and a quarter of the widths of the dense net named, and grows where its
support saturates, to at most that share of the dense net's multiply-accumulates (`--max_macs`: an absolute bound).
All fields of `GrowingArguments` (a `TrainingArguments`) are arguments too. Several processes on a machine without a
GPU need `--use_cpu`.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from command_line import leave, parse_arguments
from image_script import ImageArguments, accuracy, as_pixels, labels_of, load_splits
from transformers import AutoConfig, AutoImageProcessor, ResNetForImageClassification, set_seed

from hf_effdl import GrowingArguments, GrowingTrainer, find_groups
from hf_effdl.hub.cards import markdown_table


@dataclass(kw_only=True)
class ScriptArguments(ImageArguments):
    """What to grow on what, from which size to which."""

    model_name_or_path: str = field(
        metadata={"help": "The dense net, a ResNet on the Hub or a folder: its config and image processor are read."}
    )
    seed_widths: list[int] | None = field(
        default=None, metadata={"help": "Widths of the embedding and of every stage; default: a quarter of dense."}
    )
    seed_depths: list[int] | None = field(default=None, metadata={"help": "Blocks of every stage; default: as dense."})
    max_macs_share: float = field(default=0.5, metadata={"help": "Share of the dense net's MACs, in (0, 1]."})


def parse(argv: list[str]) -> tuple[ScriptArguments, GrowingArguments]:
    script, args = parse_arguments(argv, ScriptArguments, GrowingArguments, description=__doc__)
    if not 0 < script.max_macs_share <= 1:
        raise ValueError(f"--max_macs_share {script.max_macs_share}: it is a share of the dense net's MACs, in (0, 1]")
    return script, args


def seed_config(dense, widths: list[int] | None, depths: list[int] | None):
    """The dense net's config with the widths and depths of the seed."""
    if dense.model_type != "resnet":
        raise ValueError(f"--model_name_or_path is a {dense.model_type!r}; this script grows a 'resnet'")
    config, stages = deepcopy(dense), len(dense.hidden_sizes)
    widths = widths or [max(1, width // 4) for width in (dense.embedding_size, *dense.hidden_sizes)]
    depths = depths or dense.depths
    if len(widths) != stages + 1 or len(depths) != stages:
        raise ValueError(
            f"the dense net has an embedding and {stages} stages, so --seed_widths takes {stages + 1} numbers and "
            f"--seed_depths {stages}; these are {widths} and {depths}"
        )
    config.embedding_size, config.hidden_sizes, config.depths = widths[0], widths[1:], depths
    return config


def main(argv: list[str] | None = None) -> None:
    script, args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    data = load_splits(script, args.seed)
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    dense = AutoConfig.from_pretrained(script.model_name_or_path, dtype=torch.float32, **labels_of(data, script))
    model = ResNetForImageClassification(seed_config(dense, script.seed_widths, script.seed_depths))
    data = data.with_transform(as_pixels(script, processor, dense.num_channels))
    inputs = {"pixel_values": data["train"][0]["pixel_values"][None]}
    whole, seed = (find_groups(net, inputs)[0].network.count() for net in (ResNetForImageClassification(dense), model))
    args.max_macs = args.max_macs or int(script.max_macs_share * whole["macs"])
    args.remove_unused_columns = False  # the transform reads columns that the model does not know
    trainer = GrowingTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    found = trainer.evaluate()["eval_accuracy"]
    grown = trainer.groups[0].network.count()
    trainer.results = {"grown": {"accuracy": found, **{name: grown[name] for name in ("params", "macs")}}}
    trainer.save_model()
    card = {"dataset": script.dataset_name, "tasks": "image-classification"}
    if trainer.is_world_process_zero():
        trainer.create_model_card(**card)
        print(f"\n{markdown_table(*trainer.growth_table())}\n")
        sizes = [f"{name} {size['macs'] / whole['macs']:.3f}" for name, size in (("seed", seed), ("grown", grown))]
        print(f"accuracy {found:.4f}; MACs beside the dense net's: {', '.join(sizes)}")
        print(f"grown model in {args.output_dir}, with its card README.md and the picture growth.png")
    if args.push_to_hub:
        trainer.push_to_hub(**card)


if __name__ == "__main__":
    main()
    leave()
