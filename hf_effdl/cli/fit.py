"""Fit what chooses examples for an in-context model, on any image data set and encoder.

    hf-effdl fit cascade --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --output_dir runs/food --push_to_hub me/segment-food
    hf-effdl fit ranker --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --lengths 5 10 --output_dir runs/ranker
    torchrun --nproc_per_node 2 -m hf_effdl.cli fit cascade --config cells.yaml --label_budget 200

Builds a pool from the training split, measures how its examples do on `--label_budget` of its images (what is done
stays in `output_dir`/performance: a run that was cut off goes on), fits, and compares on images of the query split.
What looks like one of these is neither measured on nor shown while measuring. Of a cascade `output_dir`/model is a
whole pipeline for `hf-effdl prompt`; rankers are in `output_dir`/ranker-5 and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_effdl.cli.arguments import TRAINING, LongOptions, parse_arguments, which
from hf_effdl.cli.options import PoolOptions


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
    "output_dir": "runs/ranker",
    "report_to": "none",
}


@dataclass(kw_only=True)
class FitOptions(PoolOptions, LongOptions):
    """What is shown to which model."""

    duplicates: float = field(default=0.98, metadata={"help": "Cosine from which an image is a copy of another."})


@dataclass(kw_only=True)
class CascadeOptions(FitOptions):
    """What the cascade may cost, and where it goes."""

    label_budget: int = field(default=100, metadata={"help": "Pool images to measure on; 0: all."})
    passes: int = field(default=10, metadata={"help": "Runs of the frozen model for a prediction."})
    head: str = field(default="ridge", metadata={"choices": ["ridge", "listwise"], "help": "Of both stages."})
    fused: int = field(default=10, metadata={"help": "Examples of a weighted fusion."})
    output_dir: str = field(default="runs/cascade", metadata={"help": "Gets pool, labels, model, report, a picture."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push model and pool to this repository."})


@dataclass(kw_only=True)
class RankerOptions(FitOptions):
    """What is learned from, and what the rankers are."""

    lengths: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "One ranker for each list length."})
    lists_per_query: int = field(default=20, metadata={"help": "Random lists of each pool image."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the rankers."})
    legacy: bool = field(default=False, metadata={"help": "The released network of Partial2Global."})
    schedule: str = field(
        default="covering",
        metadata={"choices": ["covering", "partitions", "random", "knock-out"], "help": "Lists of a query."},
    )
    patience: int = field(default=5, metadata={"help": "Epochs without a better list accuracy before training ends."})


KINDS = {"cascade": (CascadeOptions,), "ranker": (RankerOptions, TRAINING)}


def parse(
    argv: Sequence[str] | None = None,
    kind: str | None = None,
    description: str | None = __doc__,
    prog: str | None = "hf-effdl fit",
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """The options of a cascade, or of rankers with `TrainingArguments`; first the kind, unless it is known."""
    if kind is None:
        kind, argv = which(argv, KINDS, __doc__, prog)
        prog = f"{prog} {kind}"
    more = (PAPER if kind == "ranker" else {}) | dict(defaults or {})
    return parse_arguments(argv, *KINDS[kind], description=description, prog=prog, defaults=more)


def main(argv: Sequence[str] | None = None, rows: Callable[[Any], Any] | None = None, **script: Any) -> None:
    """Fit; `rows` are a script's own, from options to the rows to choose from and those to test on."""
    found = parse(argv, **script)
    from hf_effdl.cli.work.fitting import fit_cascade, fit_ranker

    fit = fit_cascade if isinstance(found[0], CascadeOptions) else fit_ranker
    fit(*found, **({} if rows is None else {"rows": rows}))
