"""Fit a cascade that chooses examples for an in-context model, on any image data set and encoder.

    python examples/fit_cascade.py                      # scenes of digits and a tiny SegGPT: about a minute, offline
    python examples/fit_cascade.py --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --output_dir runs/food --push_to_hub me/segment-food
    torchrun --nproc_per_node 2 examples/fit_cascade.py --config cells.yaml --label_budget 200

Builds a pool from the training split, measures how its examples do on `label_budget` of its images (what is done stays
in `output_dir`/performance: a run that was cut off goes on), fits a `CascadeSelector`, and compares it on images of
the query split with the nearest example, two other strategies and the best of all candidates. What looks like one of
these images is neither measured on nor shown while measuring. `output_dir`/model is a whole pipeline:

    VisualInContextPipeline("runs/cascade/model")("photo.jpg")

`--config file.yaml` holds any of the arguments as `name: value`, and the command line wins.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from train_ranker import DIGITS, DataArguments, find_copies, load_rows, score_strategy
from transformers import HfArgumentParser

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    VisionEncoder,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
)
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.cascade import HEADS
from hf_effdl.vicl.remote_code.images import to_rgb


SMALL = {**DIGITS, "max_queries": 48}


@dataclass
class Arguments(DataArguments):
    """What the cascade may cost, and where it goes."""

    label_budget: int = field(default=100, metadata={"help": "Pool images to measure on; 0: all."})
    passes: int = field(default=10, metadata={"help": "Runs of the frozen model for a prediction."})
    head: str = field(default="ridge", metadata={"help": f"Of both stages: {' or '.join(HEADS)}."})
    fused: int = field(default=10, metadata={"help": "Examples of a weighted fusion."})
    output_dir: str = field(default="runs/cascade", metadata={"help": "Gets pool, labels, model, report, a picture."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push model and pool to this repository."})


def parse(argv: list[str]) -> Arguments:
    """Arguments from the command line, with defaults from `--config file.yaml` and for the digits."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    first.add_argument("--dataset_name")
    known, _ = first.parse_known_args(argv)
    parser = HfArgumentParser(Arguments)
    values = yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) or {} if known.config else {}
    if unknown := sorted(set(values) - {action.dest for action in parser._actions}):
        raise ValueError(f"{known.config} sets {unknown}, which this script does not know; see --help")
    names = {action.dest for action in parser._actions}
    digits = {name: value for name, value in SMALL.items() if name in names}
    here = known.dataset_name is None and values.get("dataset_name") is None
    parser.set_defaults(**(digits if here else {}), **values)
    rest = [value for i, value in enumerate(argv) if "--config" not in (value, argv[i - 1] if i else "")]
    return parser.parse_args_into_dataclasses(rest)[0]


def gap_closed(scores: dict[str, list[float]], name: str, better: int) -> tuple[float, float]:
    """Per cent of the way from the nearest example to the best candidate, and the standard error over queries.

    Args:
        scores: of every query, by strategy; with "nearest" and "oracle".
        name: of a strategy.
        better: 1, or -1 where smaller scores are better.
    """
    nearest, best, found = (better * np.array(scores[key]) for key in ("nearest", "oracle", name))
    gap = (best - nearest).mean()
    if gap <= 0:
        return float("nan"), float("nan")
    closed = (found - nearest).mean() / gap
    # of a ratio of means: what is left of each query when the ratio is taken away
    left = (found - nearest) - closed * (best - nearest)
    return 100 * float(closed), 100 * float(left.std(ddof=1) / gap / len(left) ** 0.5)


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    out = Path(args.output_dir)
    pool_rows, query_rows = load_rows(args)
    encoder = VisionEncoder.from_pretrained(args.encoder) if args.encoder else None
    model = VisualInContextModel.from_backbone(args.model, task=args.task, encoder=encoder).to(accelerator.device)
    model.config.candidates = args.candidates
    pool = ExamplePool.from_dataset(
        pool_rows,
        args.image_column,
        args.label_column,
        encoder=model.encoder,
        task=args.task,
        foreground=args.foreground,
        cache_dir=out / "pool",
        keep_grids=True,
    )
    pipe = VisualInContextPipeline(model, pool=pool)
    exclude = find_copies(pipe, query_rows, args)
    budget = min(args.label_budget or len(pool), len(pool) - len(exclude))
    measure_examples(model, pool, queries=budget, exclude=exclude, cache_dir=out / "performance")
    cascade = CascadeSelector(model, passes=args.passes, head=args.head).fit(pool)
    model.set_selector(cascade)

    fusion = VisualInContextPipeline(model, pool=pool, num_examples=args.fused, fusion="weighted")
    plan = {"nearest": pipe, "dense": pipe, "transfer": pipe, "cascade": pipe, "weighted": fusion, "oracle": pipe}
    scores = {
        name: score_strategy(
            runs, query_rows, args, "cascade" if name == "weighted" else name, labels=name == "oracle"
        )
        for name, runs in plan.items()
    }
    if accelerator.is_main_process:
        better = 1 if pipe.visual_task.greater_is_better else -1
        runs = {"cascade": args.passes, "weighted": max(args.passes, args.fused), "oracle": args.candidates}
        table = []
        for name, each in scores.items():
            closed, error = gap_closed(scores, name, better)
            spread = float(np.std(each, ddof=1) / len(each) ** 0.5)
            table.append(
                {
                    "strategy": f"cascade, {args.fused} weighted" if name == "weighted" else name,
                    "runs": runs.get(name, 1),
                    "score": f"{np.mean(each):.4f} ± {spread:.4f}",
                    "closed": f"{closed:.0f} ± {error:.0f}",
                }
            )
        headings = {
            "strategy": "strategy",
            "runs": "runs of the model",
            "score": pipe.visual_task.metric,
            "closed": "gap closed, %",
        }
        print(markdown_table(table, headings))
        report = {"excluded": len(exclude), "labelled": budget, "fit": cascade.report, "scores": scores}
        (out / "report.json").write_text(json.dumps(report, indent=1))
        shown = [to_rgb(image) for image in query_rows.select(range(min(4, len(query_rows))))[args.image_column]]
        pipe.plot(shown, num_examples=min(3, args.passes), path=out / "examples.png")
    pipe.save_pretrained(out / "model")
    if args.push_to_hub and accelerator.is_main_process:
        print(pipe.push_to_hub(args.push_to_hub))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads can abort the interpreter's exit
