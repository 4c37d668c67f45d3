# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.12",
#     "datasets>=5.1",
#     "pillow>=11",
#     "torch>=2.9",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Predict for new images by example, with any in-context model, encoder and image data set of the Hub.

    python examples/vicl_seggpt.py --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --strategy dense --output_dir runs/food
    torchrun --nproc_per_node 2 examples/vicl_seggpt.py --config cells.yaml --push_to_hub me/segment-cells

Builds a pool from the training split (once: a second call finds it), chooses examples for each image of the query
split, and compares strategies where the queries have labels. `--model` is SegGPT by default, or any vision encoder,
which then matches features.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from command_line import ConfigArguments, leave, parse_arguments
from datasets import Dataset, DatasetDict
from image_script import load_any
from PIL import Image

from hf_effdl import ExamplePool, VisionEncoder, VisualInContextModel, VisualInContextPipeline, measure_examples
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.images import to_rgb
from hf_effdl.vicl.remote_code.visual_tasks import TASKS, find_task


STRATEGIES = ("random", "nearest", "static", "dense", "transfer", "oracle")
MEASURED = ("static", "transfer")


@dataclass(kw_only=True)
class PoolArguments(ConfigArguments):
    """What is shown to which model."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set id on the Hub, a folder, or one from save_to_disk."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    pool_split: str = field(default="train", metadata={"help": "Split that examples are chosen from."})
    query_split: str | None = field(
        default=None, metadata={"help": "Split of the queries; default: test, validation, or 10%% of the pool's."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with masks or boxes."})
    foreground: list[int] | None = field(default=None, metadata={"help": "Mask values of the object; default: not 0."})
    task: str = field(default="segmentation", metadata={"choices": list(TASKS), "help": "What the labels are."})
    model: str = field(default="BAAI/seggpt-vit-large", metadata={"help": "SegGPT, or an encoder for matching."})
    encoder: str | None = field(default=None, metadata={"help": "Of the pool; default: the model's own features."})
    candidates: int = field(default=50, metadata={"help": "Nearest examples that a strategy ranks."})
    label_budget: int | None = field(default=None, metadata={"help": "Pool images to measure on; default: all."})
    max_pool: int | None = field(default=None, metadata={"help": "Use at most so many examples."})
    max_queries: int | None = field(default=None, metadata={"help": "Predict at most so many images."})


@dataclass(kw_only=True)
class Arguments(PoolArguments):
    """How examples are chosen, and where the answers go."""

    dataset_name: str = field(metadata={"help": "Data set id on the Hub, a folder, or one from save_to_disk."})
    strategy: str = field(
        default="dense", metadata={"choices": list(STRATEGIES), "help": "How examples are chosen; see README."}
    )
    compare: list[str] = field(
        default_factory=list, metadata={"choices": list(STRATEGIES), "help": "Strategies to measure beside it."}
    )
    num_examples: int = field(default=1, metadata={"help": "Examples shown for each image."})
    batch_size: int = field(default=8, metadata={"help": "Queries at a time, in each process."})
    output_dir: str = field(default="runs/vicl", metadata={"help": "Gets the pool, the numbers and a picture."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push model and pool to this repository."})


def parse(argv: list[str]) -> Arguments:
    return parse_arguments(argv, Arguments, description=__doc__)[0]


def load_splits(args: PoolArguments) -> tuple[Dataset, Dataset]:
    """The rows to choose from and the rows to predict."""
    data = load_any(args.dataset_name, args.dataset_config)
    data = data if isinstance(data, DatasetDict) else DatasetDict({args.pool_split: data})
    if args.pool_split not in data:
        raise ValueError(f"{args.dataset_name} has splits {list(data)}, not {args.pool_split!r}")
    split = args.query_split or next((name for name in ("test", "validation") if name in data), None)
    if split is None:
        parts = data[args.pool_split].train_test_split(test_size=0.1, seed=0)
        pool, queries = parts["train"], parts["test"]
    else:
        pool, queries = data[args.pool_split], data[split]
    return (
        pool.select(range(min(len(pool), args.max_pool or len(pool)))),
        queries.select(range(min(len(queries), args.max_queries or len(queries)))),
    )


def load_model(args: PoolArguments) -> VisualInContextModel:
    encoder = VisionEncoder.from_pretrained(args.encoder) if args.encoder else None
    model = VisualInContextModel.from_backbone(args.model, task=args.task, encoder=encoder)
    model.config.candidates = args.candidates
    return model


def make_pool(
    args: PoolArguments, rows: Dataset, model: VisualInContextModel, folder: Path, **options: Any
) -> ExamplePool:
    """A pool of the rows, which a second call finds in the folder."""
    return ExamplePool.from_dataset(
        rows,
        args.image_column,
        args.label_column,
        encoder=model.encoder,
        task=args.task,
        foreground=args.foreground,
        cache_dir=folder,
        **options,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    out = Path(args.output_dir)
    pool_rows, query_rows = load_splits(args)
    model = load_model(args).to(accelerator.device)
    model.config.strategy = args.strategy
    grids = "dense" in (args.strategy, *args.compare)
    pool = make_pool(args, pool_rows, model, out / "pool", batch_size=args.batch_size, keep_grids=grids)
    strategies = list(dict.fromkeys([args.strategy, *args.compare]))
    if set(strategies) & set(MEASURED):
        measure_examples(model, pool, queries=args.label_budget, cache_dir=out / "performance")
    pipe = VisualInContextPipeline(model, pool=pool)

    task = find_task(args.task, args.foreground)
    labelled = args.task == "colourisation" or args.label_column in query_rows.column_names
    places = list(range(len(query_rows)))
    table = []
    for strategy in strategies:
        rows = []
        with accelerator.split_between_processes(places) as mine:
            for start in range(0, len(mine), args.batch_size):
                part = query_rows.select(mine[start : start + args.batch_size])
                images = [to_rgb(image) for image in part[args.image_column]]
                labels = None
                if labelled:
                    given = [None] * len(part) if args.task == "colourisation" else part[args.label_column][:]
                    # drawn once, so that the pipeline's labels and the score's are the same
                    labels = [drawn(task, label, image) for label, image in zip(given, images, strict=True)]
                outputs = pipe(
                    images,
                    labels=labels if strategy == "oracle" else None,
                    strategy=strategy,
                    num_examples=args.num_examples,
                    batch_size=args.batch_size,
                )
                for place, image, label, output in zip(mine[start:], images, labels or images, outputs):
                    score = score_of(task, output["prediction"], label, image) if labelled else None
                    rows.append((place, score, output["example_ids"], output["scores"]))
        rows = sorted(gather_object(rows), key=lambda row: row[0])
        if labelled:
            table.append(
                {"strategy": strategy, "queries": len(rows), "score": float(np.mean([row[1] for row in rows]))}
            )
        if accelerator.is_main_process and strategy == args.strategy:
            out.mkdir(parents=True, exist_ok=True)
            (out / "examples.json").write_text(
                json.dumps(
                    [
                        {"query": place, "score": score, "example_ids": ids, "scores": scores}
                        for place, score, ids, scores in rows
                    ],
                    indent=1,
                )
            )
    if accelerator.is_main_process:
        if table:
            print(markdown_table(table, {"strategy": "strategy", "queries": "queries", "score": task.metric}))
        shown = [to_rgb(image) for image in query_rows.select(range(min(4, len(query_rows))))[args.image_column]]
        if args.strategy != "oracle":
            pipe.plot(shown, num_examples=args.num_examples, path=out / "examples.png")
        if args.push_to_hub:
            print(pipe.push_to_hub(args.push_to_hub))
    accelerator.wait_for_everyone()


def drawn(task, label, image: Image.Image):
    """A label in the form that any task takes: masks in black and white, boxes and colours as they are."""
    if task.name == "segmentation":
        return task.label(label, image).convert("L")
    return image if task.name == "colourisation" else label


def score_of(task, prediction, label, image: Image.Image) -> float:
    """The task's metric at the query's own size."""
    size = image.size[::-1]
    if task.name == "segmentation":
        prediction = Image.fromarray(prediction * 255)
    found, true = (task.labels([one], [image], size) for one in (prediction, label))
    return float(task.score(found, true)[0])


if __name__ == "__main__":
    main()
    leave()
