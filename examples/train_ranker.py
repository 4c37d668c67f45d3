# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.12",
#     "datasets>=5.1",
#     "pillow>=11",
#     "scikit-learn>=1.6",
#     "torch>=2.9",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Train list-wise rankers that choose examples for an in-context model, on any image data set and encoder.

    python examples/train_ranker.py                     # scenes of digits and a tiny SegGPT: some minutes, offline
    python examples/train_ranker.py --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --lengths 5 10 --hidden_size 768 --output_dir runs/ranker
    torchrun --nproc_per_node 2 examples/train_ranker.py --config cells.yaml --num_train_epochs 80

Builds a pool from the training split, measures how its examples do on each other (what is done stays in
`output_dir`/performance: a run that was cut off goes on), trains one ranker for each list length on random lists, and
compares them with the nearest example on images of the query split. What looks like one of those is left out of the
training. All fields of `TrainingArguments` are arguments too. Several processes on a machine without a GPU need
`--use_cpu`. The rankers are in `output_dir`/ranker-5 and so on:

    rankers = [ListwiseRanker.from_pretrained(f"runs/ranker/ranker-{k}") for k in (5, 10)]
    VisualInContextPipeline(model, selector=RankerSelector(rankers), pool=pool)
"""

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from command_line import is_given, leave, parse_arguments
from datasets import Dataset
from digit_scenes import make_scenes
from transformers import EarlyStoppingCallback, TrainingArguments
from vicl_seggpt import PoolArguments, drawn, load_model, load_splits, make_pool, score_of

from hf_effdl import (
    ExamplePool,
    ListwiseRanker,
    ListwiseRankerConfig,
    RankerSelector,
    RankerTrainer,
    RankingLists,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
    near_duplicates,
)
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.images import pixels, to_rgb
from hf_effdl.vicl.remote_code.ranker_selector import SCHEDULES
from hf_effdl.vicl.remote_code.visual_tasks import find_task


TINY = str(Path(__file__).parents[1] / "model_cards" / "tiny-seggpt-digits")
# of digit scenes: the features of the tiny model are all alike, and no two scenes are copies
DIGITS = {
    "label_column": "mask",
    "model": TINY,
    "max_pool": 120,
    "max_queries": 24,
    "candidates": 16,
    "label_budget": 60,
    "hidden_size": 96,
    "duplicates": 1.0,
}


PAPER = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 30,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "list_accuracy",
    "save_total_limit": 1,
}


@dataclass(kw_only=True)
class DataArguments(PoolArguments):
    """What is shown to which model; without a data set, digit scenes to a tiny SegGPT."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set id, or a folder; default: digit scenes."}
    )
    duplicates: float = field(default=0.98, metadata={"help": "Cosine from which an image is a copy of another."})


@dataclass(kw_only=True)
class Arguments(DataArguments):
    """What is learned from, and what the rankers are."""

    lengths: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "One ranker for each list length."})
    lists_per_query: int = field(default=20, metadata={"help": "Random lists of each pool image."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the rankers."})
    legacy: bool = field(default=False, metadata={"help": "The released network of Partial2Global."})
    schedule: str = field(default="covering", metadata={"choices": list(SCHEDULES), "help": "Lists of a query."})
    patience: int = field(default=5, metadata={"help": "Epochs without a better list accuracy before training ends."})


def parse(argv: list[str]) -> tuple[Arguments, TrainingArguments]:
    digits = {} if is_given(argv, "dataset_name") else DIGITS
    defaults = PAPER | {"output_dir": "runs/ranker", "report_to": "none"} | digits
    return parse_arguments(argv, Arguments, TrainingArguments, description=__doc__, defaults=defaults)


def load_rows(args: Arguments) -> tuple[Dataset, Dataset]:
    """The rows to choose from and the rows to test on."""
    if args.dataset_name is not None:
        return load_splits(args)
    scenes = (make_scenes(args.max_pool, "train", args.task), make_scenes(args.max_queries, "test", args.task))
    return tuple(Dataset.from_list(rows) for rows in scenes)


def find_copies(pipe: VisualInContextPipeline, query_rows: Dataset, args: DataArguments) -> list[int]:
    """Rows of the pool that look like one of the images to test on."""
    encoder = pipe.model.encoder
    seen = [pipe.visual_task.query(to_rgb(image)) for image in query_rows[args.image_column]]
    vectors = [
        encoder(pixels(seen[at : at + 32], encoder.image_size, encoder.resample))["vector"].cpu()
        for at in range(0, len(seen), 32)
    ]
    return near_duplicates(pipe.pool.vectors, torch.cat(vectors), args.duplicates).tolist()


def split_queries(model: VisualInContextModel, seed: int) -> tuple[list[int], list[int]]:
    """Of the pool images that were measured on, nine tenths to train and one to evaluate."""
    rows = (model.measured_candidates >= 0).any(1).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].tolist()
    some = max(1, len(rows) // 10)
    return rows[some:], rows[:some]


def train_ranker(
    k: int,
    args: Arguments,
    training: TrainingArguments,
    model: VisualInContextModel,
    pool: ExamplePool,
    exclude: list[int],
) -> tuple[ListwiseRanker, dict[str, float]]:
    """A ranker for lists of k, with how it did on lists of queries that it did not learn from."""
    train, other = split_queries(model, training.seed)
    common = {"lists_per_query": args.lists_per_query, "duplicates": None, "labels": not args.legacy}
    lists = RankingLists.from_model(model, pool, k, rows=train, exclude_rows=exclude, seed=training.seed, **common)
    held_out = RankingLists.from_model(model, pool, k, rows=other, exclude_rows=exclude, seed=training.seed, **common)
    torch.manual_seed(training.seed)
    config = ListwiseRankerConfig(input_size=pool.dim, hidden_size=args.hidden_size, legacy=args.legacy, list_length=k)
    own = copy.copy(training)
    own.output_dir = str(Path(training.output_dir, f"ranker-{k}"))
    stopping = [EarlyStoppingCallback(args.patience)] if training.load_best_model_at_end else []
    trainer = RankerTrainer(
        ListwiseRanker(config), own, train_dataset=lists, eval_dataset=held_out, callbacks=stopping
    )
    trainer.train()
    trainer.save_model()
    return trainer.model.eval(), trainer.evaluate()


def score_strategy(
    pipe: VisualInContextPipeline, rows: Dataset, args: Arguments, strategy: object, labels: bool = False
) -> list[float]:
    """The task's metric on every row, each process with its share of them."""
    task, found = find_task(args.task, args.foreground), []
    with PartialState().split_between_processes(list(range(len(rows)))) as mine:
        for start in range(0, len(mine), 8):
            part = rows.select(mine[start : start + 8])
            images = [to_rgb(image) for image in part[args.image_column]]
            given = [None] * len(part) if args.task == "colourisation" else part[args.label_column][:]
            truth = [drawn(task, label, image) for label, image in zip(given, images, strict=True)]
            outputs = pipe(images, labels=truth if labels else None, strategy=strategy, candidates=args.candidates)
            for place, output, label, image in zip(mine[start:], outputs, truth, images):
                found.append((place, score_of(task, output["prediction"], label, image)))
    return [score for _, score in sorted(gather_object(found))]


def main(argv: list[str] | None = None) -> None:
    args, training = parse(sys.argv[1:] if argv is None else argv)
    out, device = Path(training.output_dir), training.device
    pool_rows, query_rows = load_rows(args)
    model = load_model(args).to(device)
    pool = make_pool(args, pool_rows, model, out / "pool")
    pipe = VisualInContextPipeline(model, pool=pool)
    exclude = find_copies(pipe, query_rows, args)
    budget = min(args.label_budget or len(pool), len(pool) - len(exclude))
    measure_examples(
        model, pool, candidates=args.candidates, queries=budget, exclude_rows=exclude, cache_dir=out / "performance"
    )
    rankers, report = [], {"excluded": len(exclude)}
    for k in args.lengths:
        ranker, metrics = train_ranker(k, args, training, model, pool, exclude)
        rankers.append(ranker.to(device))
        report[f"ranker-{k}"] = {name: value for name, value in metrics.items() if isinstance(value, float)}
    selector = RankerSelector(rankers, args.schedule)
    scores = {
        "nearest": score_strategy(pipe, query_rows, args, "nearest"),
        "ranker": score_strategy(pipe, query_rows, args, selector),
        "oracle": score_strategy(pipe, query_rows, args, "oracle", labels=True),
    }
    if PartialState().is_main_process:
        table = [
            {"strategy": name, "queries": len(each), "score": float(np.mean(each))} for name, each in scores.items()
        ]
        print(markdown_table(table, {"strategy": "strategy", "queries": "queries", "score": pipe.visual_task.metric}))
        (out / "report.json").write_text(json.dumps(report | {"scores": scores}, indent=1))
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
    leave()
