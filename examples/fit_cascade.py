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
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from command_line import is_given, leave, parse_arguments
from train_ranker import DIGITS, DataArguments, find_copies, load_rows, score_strategy
from vicl_seggpt import load_model, make_pool

from hf_effdl import CascadeSelector, VisualInContextPipeline, measure_examples
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.cascade import HEADS
from hf_effdl.vicl.remote_code.images import to_rgb


# of digit scenes; a cascade has no width
SMALL = {name: value for name, value in DIGITS.items() if name != "hidden_size"} | {"max_queries": 48}


@dataclass(kw_only=True)
class Arguments(DataArguments):
    """What the cascade may cost, and where it goes."""

    label_budget: int = field(default=100, metadata={"help": "Pool images to measure on; 0: all."})
    passes: int = field(default=10, metadata={"help": "Runs of the frozen model for a prediction."})
    head: str = field(default="ridge", metadata={"choices": list(HEADS), "help": "Of both stages."})
    fused: int = field(default=10, metadata={"help": "Examples of a weighted fusion."})
    output_dir: str = field(default="runs/cascade", metadata={"help": "Gets pool, labels, model, report, a picture."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push model and pool to this repository."})


def parse(argv: list[str]) -> Arguments:
    digits = {} if is_given(argv, "dataset_name") else SMALL
    return parse_arguments(argv, Arguments, description=__doc__, defaults=digits)[0]


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
    model = load_model(args).to(accelerator.device)
    pool = make_pool(args, pool_rows, model, out / "pool", keep_grids=True)
    pipe = VisualInContextPipeline(model, pool=pool)
    exclude = find_copies(pipe, query_rows, args)
    budget = min(args.label_budget or len(pool), len(pool) - len(exclude))
    measure_examples(model, pool, queries=budget, exclude_rows=exclude, cache_dir=out / "performance")
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
    leave()
