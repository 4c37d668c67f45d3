"""Train list-wise rankers that choose examples for an in-context model, on any image data set and encoder.

    python examples/train_ranker.py                     # scenes of digits and a tiny SegGPT: some minutes, offline
    python examples/train_ranker.py --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --lengths 5 10 --hidden_size 768 --output_dir runs/ranker
    torchrun --nproc_per_node 2 examples/train_ranker.py --config cells.yaml --num_train_epochs 80

Builds a pool from the training split, measures how its examples do on each other (what is done stays in
`output_dir`/performance: a run that was cut off goes on), trains one ranker for each list length on random lists, and
compares them with the nearest example on images of the query split. What looks like one of those is left out of the
training. Besides its own arguments it takes those of `TrainingArguments`; `--config file.yaml` holds any of them as
`name: value`, and the command line wins. The rankers are in `output_dir`/ranker-5 and so on:

    rankers = [ListwiseRanker.from_pretrained(f"runs/ranker/ranker-{k}") for k in (5, 10)]
    VisualInContextPipeline(model, selector=RankerSelector(rankers), pool=pool)
"""

import argparse
import copy
import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from digit_scenes import make_scenes
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainingArguments
from vicl_seggpt import drawn, load_splits, score_of

from hf_effdl import ExamplePool, VisionEncoder, VisualInContextModel, VisualInContextPipeline, measure_examples
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.auto import ListwiseRanker, ListwiseRankerConfig
from hf_effdl.vicl.held_out import near_duplicates
from hf_effdl.vicl.ranking.ranker_trainer import RankerTrainer
from hf_effdl.vicl.ranking.ranking_lists import RankingLists
from hf_effdl.vicl.remote_code.images import pixels, to_rgb
from hf_effdl.vicl.remote_code.ranker_selector import SCHEDULES, RankerSelector
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


@dataclass
class DataArguments:
    """What is shown to which model."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set id, or a folder; default: digit scenes."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    pool_split: str = field(default="train", metadata={"help": "Split that examples are chosen from."})
    query_split: str | None = field(
        default=None, metadata={"help": "Split to test on; default: as in vicl_seggpt.py."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with masks or boxes."})
    foreground: list[int] | None = field(default=None, metadata={"help": "Mask values of the object; default: not 0."})
    task: str = field(default="segmentation", metadata={"help": "segmentation, detection or colourisation."})
    model: str = field(default="BAAI/seggpt-vit-large", metadata={"help": "SegGPT, or an encoder for matching."})
    encoder: str | None = field(default=None, metadata={"help": "Of the pool; default: the model's own features."})
    candidates: int = field(default=50, metadata={"help": "K nearest examples that are measured, and chosen from."})
    max_pool: int | None = field(default=None, metadata={"help": "Use at most so many examples."})
    max_queries: int | None = field(default=None, metadata={"help": "Test on at most so many images."})
    duplicates: float = field(default=0.98, metadata={"help": "Cosine from which an image is a copy of another."})


@dataclass
class Arguments(DataArguments):
    """What is learned from, and what the rankers are."""

    label_budget: int | None = field(default=None, metadata={"help": "Pool images to measure on; default: all."})
    lengths: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "One ranker for each list length."})
    lists_per_query: int = field(default=20, metadata={"help": "Random lists of each pool image."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the rankers."})
    legacy: bool = field(default=False, metadata={"help": "The released network of Partial2Global."})
    schedule: str = field(default="covering", metadata={"help": f"Lists of a query: {', '.join(SCHEDULES)}."})
    patience: int = field(default=5, metadata={"help": "Epochs without a better list accuracy before training ends."})


def parse(argv: list[str]) -> tuple[Arguments, TrainingArguments]:
    """Arguments from the command line, with defaults from `--config file.yaml`, the paper, and for the digits."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    first.add_argument("--dataset_name")
    known, _ = first.parse_known_args(argv)
    parser = HfArgumentParser((Arguments, TrainingArguments))
    values = yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) or {} if known.config else {}
    if unknown := sorted(set(values) - {action.dest for action in parser._actions}):
        raise ValueError(f"{known.config} sets {unknown}, which this script does not know; see --help")
    digits = DIGITS if (known.dataset_name or values.get("dataset_name")) is None else {}
    parser.set_defaults(
        **{
            "output_dir": "runs/ranker",
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 64,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 30,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "list_accuracy",
            "save_total_limit": 1,
            "report_to": "none",
            **digits,
            **values,
        }
    )
    rest = [value for i, value in enumerate(argv) if "--config" not in (value, argv[i - 1] if i else "")]
    return parser.parse_args_into_dataclasses(rest)


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
    lists = RankingLists.from_model(model, pool, k, queries=train, exclude=exclude, seed=training.seed, **common)
    held_out = RankingLists.from_model(model, pool, k, queries=other, exclude=exclude, seed=training.seed, **common)
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
    encoder = VisionEncoder.from_pretrained(args.encoder) if args.encoder else None
    model = VisualInContextModel.from_backbone(args.model, task=args.task, encoder=encoder).to(device)
    pool = ExamplePool.from_dataset(
        pool_rows,
        args.image_column,
        args.label_column,
        encoder=model.encoder,
        task=args.task,
        foreground=args.foreground,
        cache_dir=out / "pool",
    )
    pipe = VisualInContextPipeline(model, pool=pool)
    exclude = find_copies(pipe, query_rows, args)
    budget = min(args.label_budget or len(pool), len(pool) - len(exclude))
    measure_examples(
        model, pool, candidates=args.candidates, queries=budget, exclude=exclude, cache_dir=out / "performance"
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
    gc.collect()  # a model in DDP holds the process group, whose threads can abort the interpreter's exit
    PartialState().destroy_process_group()
