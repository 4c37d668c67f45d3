# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.15",
#     "datasets>=5.1",
#     "pillow>=11",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Ways to choose an example on the benchmarks of the papers, beside the numbers that those publish.

    python examples/evaluate_vicl.py --benchmark pascal5i --folder VOCdevkit/VOC2012 --lists splits/pascal \\
        --model BAAI/seggpt-vit-large --encoder facebook/dinov2-base --strategies nearest dense cascade --dry_run
    accelerate launch examples/evaluate_vicl.py --config pascal.yaml --convention fss

Two conventions, whose numbers must not be compared:

    vicl    every line of the list is a query, any example of the fold's classes may be shown; IoU of each query at
            111 x 111, and their mean; beside it the mean over 1,000 queries that go round the list, as some evaluators
            count
    fss     few-shot segmentation: examples show the query's class, at random as in episodes or as a strategy chooses;
            intersections and unions at the query's size are summed by class, without void pixels, and the mean over
            classes is given, and that of foreground and background

Every answer is a JSON line in `--output_dir`, by which a run that was cut off goes on. `--dry_run` says what a run
would cost. Benchmarks and folders: `voc_folds.py`.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from voc_folds import BENCHMARKS, FOLDS, VOID, Item, as_dataset, read

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    VisionEncoder,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
)
from hf_effdl.cli.arguments import Options, leave, parse_arguments
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.visual_tasks import find_task


STRATEGIES = ("random", "nearest", "dense", "transfer", "cascade", "oracle")
MEASURED = ("transfer", "cascade")
CONVENTIONS = ("vicl", "fss")
TASKS = {
    "pascal5i": "segmentation",
    "coco20i": "segmentation",
    "fss1000": "segmentation",
    "detection": "detection",
    "colourisation": "colourisation",
}
CELL, ROUND = 111, 1000  # pixels of a side where IoU is counted, and queries of the evaluators that go round
# an answer is of these arguments
SETTINGS = ("benchmark", "convention", "model", "encoder", "num_examples", "candidates", "label_budget", "seed")
PASSES = {"cascade": 10}  # runs of the frozen model for a query, where it is not one
# mean over the folds, in %; colours: squared error
PUBLISHED = {
    ("pascal5i", "vicl"): (
        ("Partial2Global, MAE-VQGAN, arXiv 2405.15279", 38.40),
        ("RH-Partial2Global, MAE-VQGAN, arXiv 2509.25989", 39.02),
        ("LaPR, MAE-VQGAN (another checkpoint), arXiv 2604.03657", 41.36),
        ("PromptHub, trained fusion, arXiv 2603.18891", 45.17),
    ),
    ("pascal5i", "fss"): (
        ("FSS-SAM3, one example, arXiv 2604.05433", 79.6),
        ("FSS-SAM3, one example and the class's name", 81.2),
    ),
    ("coco20i", "fss"): (
        ("FSS-SAM3, one example, arXiv 2604.05433", 66.6),
        ("FSS-SAM3, one example and the class's name", 75.8),
    ),
    ("detection", "vicl"): (("Partial2Global, MAE-VQGAN", 30.66), ("RH-Partial2Global, MAE-VQGAN", 30.94)),
    ("colourisation", "vicl"): (("Partial2Global, MAE-VQGAN", 0.58), ("RH-Partial2Global, MAE-VQGAN", 0.56)),
}


@dataclass(kw_only=True)
class Arguments(Options):
    """What is evaluated on what."""

    benchmark: str = field(default="pascal5i", metadata={"choices": list(BENCHMARKS), "help": "See voc_folds.py."})
    folder: str = field(metadata={"help": "Of the images, as they are published."})
    lists: str | None = field(default=None, metadata={"help": "Folder of the folds' lists, or file of the classes."})
    folds: list[int] = field(
        default_factory=list, metadata={"help": "Of pascal5i, coco20i and colourisation; default: all."}
    )
    convention: str = field(default="vicl", metadata={"choices": list(CONVENTIONS), "help": "How is counted."})
    model: str = field(
        default="BAAI/seggpt-vit-large", metadata={"help": "SegGPT, SAM 2 or 3, what was converted, or an encoder."}
    )
    encoder: str | None = field(default=None, metadata={"help": "Of the pool; default: the model's own features."})
    strategies: list[str] = field(
        default_factory=lambda: ["nearest"], metadata={"choices": list(STRATEGIES), "help": "How examples are chosen."}
    )
    num_examples: int = field(default=1, metadata={"help": "Examples shown for each image."})
    candidates: int = field(default=50, metadata={"help": "Nearest examples that a strategy ranks."})
    label_budget: int = field(default=100, metadata={"help": "Pool images that transfer and cascade learn from."})
    episodes: int | None = field(default=None, metadata={"help": "Queries of fss, drawn with --seed; default: all."})
    seed: int = field(default=0, metadata={"help": "Of episodes, and of random examples."})
    batch_size: int = field(default=8, metadata={"help": "Queries at a time, in each process."})
    dry_run: bool = field(default=False, metadata={"help": "Say what it would cost, and end."})
    output_dir: str = field(default="runs/evaluate_vicl", metadata={"help": "Gets pools, answers and the table."})

    def __post_init__(self) -> None:
        if self.convention == "fss" and TASKS[self.benchmark] != "segmentation":
            raise ValueError(f"convention='fss' is of masks by class, and {self.benchmark} has none: leave it out")
        if self.benchmark == "fss1000" and self.convention == "vicl":
            raise ValueError("fss1000 is a benchmark of few-shot segmentation: pass --convention fss")
        wrong = [fold for fold in self.folds if fold not in range(FOLDS.get(self.benchmark, 1))]
        if wrong:
            raise ValueError(f"folds holds {wrong[0]}: {self.benchmark} has {FOLDS.get(self.benchmark, 1)}, from 0")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(sys.argv[1:] if argv is None else argv, Arguments, description=__doc__)
    folds = args.folds or list(range(FOLDS.get(args.benchmark, 1)))
    lists = None if args.lists is None else Path(args.lists)
    data = {fold: read(args.benchmark, Path(args.folder), lists, fold) for fold in folds}  # all, before any long work
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    encoder = VisionEncoder.from_pretrained(args.encoder) if args.encoder else None
    model = VisualInContextModel.from_backbone(args.model, task=TASKS[args.benchmark], encoder=encoder)
    model.config.candidates = args.candidates
    model.to(accelerator.device)
    if args.dry_run:
        if accelerator.is_main_process:
            print(cost(args, model, data))
        return
    rows = Rows(Path(args.output_dir), accelerator.process_index)
    for fold, (pool_items, queries) in data.items():
        evaluate(args, model, fold, pool_items, asked(args, queries), rows, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(table(args, rows.read()))


def asked(args: Arguments, queries: list[Item]) -> list[Item]:
    """The queries of a run."""
    if args.episodes is None or args.episodes >= len(queries):
        return queries
    drawn = np.random.default_rng(args.seed).permutation(len(queries))[: args.episodes]
    return [queries[i] for i in sorted(drawn.tolist())]


class Rows:
    """Answers as JSON lines, a file for each process; what any of them wrote counts as done."""

    keys = (*SETTINGS, "strategy", "fold", "query")

    def __init__(self, folder: Path, process: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / f"answers-{process}.jsonl"

    def read(self) -> list[dict]:
        rows = {}
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # cut when its run was
                    continue
                rows[self.key(row)] = row
        return list(rows.values())

    def key(self, row: dict) -> tuple:
        return tuple(row.get(name) for name in self.keys)

    def add(self, rows: Iterable[dict]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with self.file.open("a+b") as out:
            if out.tell():
                out.seek(-1, os.SEEK_END)
                text = text if out.read() == b"\n" else "\n" + text
            out.write(text.encode())


def evaluate(
    args: Arguments,
    model: VisualInContextModel,
    fold: int,
    pool_items: list[Item],
    queries: list[Item],
    rows: Rows,
    accelerator: Accelerator,
) -> None:
    """Answer all queries of a fold that have no row yet."""
    out = Path(args.output_dir)
    task = TASKS[args.benchmark]
    pool = ExamplePool.from_dataset(
        as_dataset(pool_items, task),
        label_column="label",
        encoder=model.encoder,
        task=task,
        id_column="id",
        class_column="class",
        group_column="photo",  # which is no example for itself, under another class either
        keep_grids={"dense", "cascade"} & set(args.strategies) != set(),
        cache_dir=out / "pools",
        batch_size=args.batch_size,
    )
    model.set_selector(None)
    if set(args.strategies) & set(MEASURED):
        classes = None if args.convention == "fss" else [None] * len(pool)
        budget = min(args.label_budget, len(pool))
        measure_examples(model, pool, queries=budget, classes=classes, cache_dir=out / "performance")
    if "cascade" in args.strategies:
        model.set_selector(CascadeSelector(model).fit(pool))
    pipe = VisualInContextPipeline(model, "nearest", pool)
    of = {name: getattr(args, name) for name in SETTINGS}
    done, places = {rows.key(row) for row in rows.read()}, {item.id: place for place, item in enumerate(queries)}
    accelerator.wait_for_everyone()  # before any of them writes
    for strategy in args.strategies:
        keys = of | {"strategy": strategy, "fold": fold}
        waiting = [item for item in queries if rows.key({**keys, "query": item.id}) not in done]
        with accelerator.split_between_processes(waiting) as mine:
            for start in range(0, len(mine), args.batch_size):
                part = mine[start : start + args.batch_size]
                rows.add({**keys, "place": places[row["query"]], **row} for row in answers(args, pipe, strategy, part))


def answers(args: Arguments, pipe: VisualInContextPipeline, strategy: str, items: Sequence[Item]) -> list[dict]:
    images = [Image.open(item.image).convert("RGB") for item in items]
    options: dict[str, Any] = {"strategy": strategy, "num_examples": args.num_examples, "seed": args.seed}
    if args.convention == "fss":
        options["classes"] = [item.kind for item in items]
    if strategy == "oracle":
        options["labels"] = [item.label() for item in items]
    options["groups"] = [item.photo for item in items]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes of few examples show fewer
        outputs = pipe(images, batch_size=args.batch_size, **options)
    return [
        {
            "query": item.id,
            "class": item.kind,
            "example_ids": output["example_ids"],
            **counted(args, item, image, output),
        }
        for item, image, output in zip(items, images, outputs, strict=True)
    ]


def counted(args: Arguments, item: Item, image: Image.Image, output: dict[str, Any]) -> dict[str, Any]:
    """The score of an answer, or what is summed up by class."""
    prediction = output["prediction"]
    if args.convention == "fss":
        truth = item.classes()
        counts, found, there = truth != VOID, prediction == 1, truth == 1
        sides = {"": (found, there), "ground ": (~found, ~there)}
        return {
            f"{side}{name}": int((combined(a, b) & counts).sum())
            for side, (a, b) in sides.items()
            for name, combined in (("intersection", np.logical_and), ("union", np.logical_or))
        }
    task = find_task(TASKS[args.benchmark])
    if task.name == "segmentation":
        prediction = Image.fromarray(prediction * 255)
    drawn = [task.labels([one], [image], (CELL, CELL)) for one in (prediction, item.label())]
    return {"score": round(float(task.score(*drawn)[0]), 5)}


# ---- what came of it


def table(args: Arguments, rows: list[dict]) -> str:
    """Means of every strategy by fold, and what is published in the same convention."""
    mine = [row for row in rows if all(row.get(name) == getattr(args, name) for name in SETTINGS)]
    lines = []
    for strategy in dict.fromkeys(row["strategy"] for row in mine):
        of = [row for row in mine if row["strategy"] == strategy]
        folds = {fold: [row for row in of if row["fold"] == fold] for fold in sorted({row["fold"] for row in of})}
        means = [summary(args, part) for part in folds.values()]
        line = {"what": strategy, "queries": len(of), "by fold": " ".join(f"{mean[0]:.2f}" for mean in means)}
        lines.append(line | {"mean": f"{np.mean([mean[0] for mean in means]):.2f}", "beside": beside(args, means)})
    for name, value in PUBLISHED.get((args.benchmark, args.convention), ()):
        lines.append(
            {"what": f"published: {name}", "queries": "", "by fold": "", "mean": f"{value:.2f}", "beside": ""}
        )
    other = "mean IoU of foreground and background" if args.convention == "fss" else f"over {ROUND} queries, round"
    return markdown_table(lines, {name: name for name in ("what", "queries", "by fold", "mean")} | {"beside": other})


def beside(args: Arguments, means: Sequence[tuple[float, float]]) -> str:
    return f"{np.mean([mean[1] for mean in means]):.2f}"


def summary(args: Arguments, rows: list[dict]) -> tuple[float, float]:
    """The mean of a fold in the convention's way, and its other number."""
    if args.convention == "vicl":
        rows = sorted(rows, key=lambda row: row["place"])  # going round the list, its first ones count more
        scores = np.array([row["score"] for row in rows]) * (1 if args.benchmark == "colourisation" else 100)
        return float(scores.mean()), float(scores[np.arange(ROUND) % len(scores)].mean())
    ratio = {
        side: [
            sum(row[f"{side}intersection"] for row in part) / max(1, sum(row[f"{side}union"] for row in part))
            for part in parts
        ]
        for side, parts in (("", _by_class(rows)), ("ground ", [rows]))
    }
    front = sum(row["intersection"] for row in rows) / max(1, sum(row["union"] for row in rows))
    return 100 * float(np.mean(ratio[""])), 50 * (front + ratio["ground "][0])


def _by_class(rows: list[dict]) -> list[list[dict]]:
    return [[row for row in rows if row["class"] == kind] for kind in sorted({row["class"] for row in rows})]


def cost(args: Arguments, model: VisualInContextModel, data: dict[int, tuple[list[Item], list[Item]]]) -> str:
    """Runs of the frozen model, the time that they take here, and what a pool takes on the disk."""
    each, lines, total = seconds_each(args, model), [], 0
    for fold, (pool, queries) in data.items():
        queries = asked(args, queries)
        runs = {name: len(queries) * passes(args, name) for name in args.strategies}
        if set(args.strategies) & set(MEASURED):
            runs["measuring"] = min(args.label_budget, len(pool)) * min(args.candidates, len(pool) - 1)
        disk = sum(os.path.getsize(item.image) for item in pool) + len(pool) * 4 * 6 * model.encoder.dim
        if {"dense", "cascade"} & set(args.strategies):
            disk += 2 * len(pool) * model.encoder.dim * model.encoder.grid_size[0] * model.encoder.grid_size[1]
        total += sum(runs.values())
        shown = ", ".join(f"{name} {count:,}" for name, count in runs.items())
        lines.append(
            f"fold {fold}: {len(pool):,} examples ({disk / 2**20:,.0f} MiB), {len(queries):,} queries: {shown}"
        )
    return "\n".join(
        [*lines, f"{total:,} runs of the frozen model, about {total * each / 3600:.2f} h at {each:.3f} s each"]
    )


def passes(args: Arguments, strategy: str) -> int:
    return args.candidates if strategy == "oracle" else max(PASSES.get(strategy, 1), args.num_examples)


def seconds_each(args: Arguments, model: VisualInContextModel) -> float:
    cells = torch.rand(1, 3, *model.image_size, device=model.device)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        encoded = model.frozen.encode(cells)
        model.frozen.predict(encoded, encoded[:, None], (cells > 0.5).float()[:, None])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
    leave()
