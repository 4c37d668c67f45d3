# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.15",
#     "torch>=2.10",
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

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_effdl import VisualInContextPipeline, measure_examples
from hf_effdl.cli.arguments import leave, parse_arguments
from hf_effdl.cli.options import PoolOptions
from hf_effdl.cli.work.prompts import drawn, load_frozen, load_pool_splits, make_pool, score_of
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.images import to_rgb
from hf_effdl.vicl.remote_code.visual_tasks import find_task


STRATEGIES = ("random", "nearest", "static", "dense", "transfer", "oracle")
MEASURED = ("static", "transfer")


@dataclass(kw_only=True)
class Arguments(PoolOptions):
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


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    out = Path(args.output_dir)
    pool_rows, query_rows = load_pool_splits(args)
    model = load_frozen(args).to(accelerator.device)
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
                given = images if args.task == "colourisation" else part[args.label_column][:] if labelled else []
                labels = [drawn(task, label, image) for label, image in zip(given, images)]
                outputs = pipe(
                    images,
                    labels=given if strategy == "oracle" else None,
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


if __name__ == "__main__":
    main()
    leave()
