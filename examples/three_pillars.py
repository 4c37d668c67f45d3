# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "pillow>=11",
#     "scikit-learn>=1.6",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""All three pillars on one task, scikit-learn's digits: fewer rows, a smaller net, and its encoder shown examples.

    python examples/three_pillars.py     # half a minute on one free core

Of a pool with a fifth of the labels wrong, 30 % of the rows are chosen; a small ResNet is trained on them with split
LBI and made smaller, to 30 % of the multiply-accumulates, with the next layers refitted; then its encoder finds the
largest digit of scenes by one example, chosen by matching parts. Beside it stand a net and an example for which none
of this was done, and each of the three alone. All nets are trained for the same number of steps.
"""

import argparse
import io
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from digit_scenes import make_scenes
from digits_task import SHARED, accuracy, digits, new_model, pool_with_wrong_labels, show, to_train, train_with_bar
from transformers import ResNetForImageClassification, TrainingArguments

from hf_effdl import (
    ExamplePool,
    FeatureMatching,
    LinearProbes,
    SplitLBIArguments,
    SplitLBITrainer,
    UncertaintySelector,
    VisionEncoder,
    VisualInContextModel,
    VisualInContextPipeline,
    WeightedTrainer,
)
from hf_effdl.cli.arguments import refuse_several_processes


SHARE = 0.3  # of the rows, and of the MACs
SIDE, LAYER = 96, 2  # of scenes as the encoder sees them; stage whose map is matched
# what was done -> the net, and how its example is chosen
ARMS = {name: (name, "random") for name in ("nothing", "rows chosen", "net made smaller")}
ARMS |= {"example chosen": ("nothing", "dense"), "all three": ("all three", "dense")}
COLUMNS = {
    "what": "done",
    "rows": "rows",
    "accuracy": "test accuracy",
    "training": "training MACs",
    "macs": "MACs",
    "latency": "latency",
    "iou": "mean IoU by example",
}


@dataclass(frozen=True)
class Task:
    """What all nets have in common.

    Args:
        pool: all rows, with weights of one.
        chosen: some of them, with theirs.
        test: rows with right labels.
        steps: of the training, as epochs of the whole pool.
        tune: of a smaller net's own training, as epochs of the whole pool.
        out: folder.
    """

    pool: Dataset
    chosen: Dataset
    test: list
    steps: float
    tune: float
    out: Path

    def settings(self, rows: Dataset) -> dict[str, Any]:
        epochs = self.steps * len(self.pool) / len(rows)
        same = {"num_train_epochs": epochs, "save_strategy": "no"}
        return {**SHARED, "learning_rate": 0.05, "eval_strategy": "no", **same}


@dataclass
class Net:
    """A trained net, with shares of what the whole one on the whole pool costs."""

    model: ResNetForImageClassification
    rows: int
    accuracy: float
    training: float = 1.0
    macs: float = 1.0
    latency: float = 1.0


def choose(share: float = SHARE) -> tuple[Dataset, Dataset]:
    """The pool with weights of one, and the chosen rows with theirs."""
    probe_rows, pool = pool_with_wrong_labels()
    probes = LinearProbes.train(None, probe_rows, "labels", input_column="pixels")
    chosen = UncertaintySelector(probes, "labels").select(pool, share)
    return pool.add_column("weight", [1.0] * len(pool)), chosen


def train_whole(task: Task, rows: Dataset, name: str) -> Net:
    """A net of its usual size."""
    args = TrainingArguments(str(task.out / "whole"), optim="sgd", optim_args="momentum=0.9", **task.settings(rows))
    data = {"train_dataset": to_train(rows), "eval_dataset": task.test}
    trainer = WeightedTrainer(new_model(), args, **data, compute_metrics=accuracy)
    train_with_bar(trainer, name)
    return Net(trainer.model, len(rows), trainer.evaluate()["eval_accuracy"])


def train_smaller(task: Task, rows: Dataset, name: str) -> Net:
    """Trained with its path, slimmed with refits, and trained a little more."""
    args = SplitLBIArguments(str(task.out / "smaller"), **task.settings(rows))
    data = {"train_dataset": to_train(rows), "eval_dataset": task.test}
    trainer = SplitLBITrainer(new_model(), args, **data, compute_metrics=accuracy)
    train_with_bar(trainer, name)
    small = trainer.slim(macs=SHARE, bn_batches=8)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer.finetune(small, epochs=task.tune * len(task.pool) / len(rows), output_dir=folder)
    report = small.config.effdl_report
    macs, latency = report["macs"]["ratio"], report["latency_ms"]["ratio"]
    training = 1 + macs * task.tune / task.steps
    return Net(small, len(rows), trainer.evaluate_model(small)["accuracy"], training, macs, latency)


# ---- its encoder, shown examples


def in_colour(model: ResNetForImageClassification) -> torch.nn.Module:
    """The encoder of a net for grey images, which takes colours and sees their mean."""
    backbone = deepcopy(model.base_model)
    conv = backbone.embedder.embedder.convolution
    conv.weight = torch.nn.Parameter(conv.weight.detach().repeat(1, 3, 1, 1) / 3)
    conv.in_channels = backbone.embedder.num_channels = backbone.config.num_channels = 3
    return backbone


def mean_iou(
    model: ResNetForImageClassification, pool_rows: Dataset, scenes: Sequence[Mapping], strategies: Sequence[str]
) -> dict[str, float]:
    """Of scenes of unseen digits, by how the one example was chosen."""
    encoder = VisionEncoder(in_colour(model), image_size=SIDE, layer=LAYER)
    frozen = VisualInContextModel.from_parts(FeatureMatching(encoder, "prototype"), embed=True)
    images, masks = [scene["image"] for scene in scenes], [np.asarray(scene["mask"]) > 0 for scene in scenes]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"label_column": "mask", "cache_dir": folder, "progress": False, "foreground": 1}
        pool = ExamplePool.from_dataset(pool_rows, encoder=encoder, **options)
        pipe = VisualInContextPipeline(frozen, "dense", pool)
        for strategy in strategies:
            said = [answer["prediction"] > 0 for answer in pipe(images, strategy=strategy)]
            found[strategy] = float(np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(said, masks, strict=True)]))
    return found


# ---- beside each other


def compare(task: Task, queries: int, scenes: int, known: Mapping[str, Net] | None = None) -> list[dict[str, Any]]:
    """The table; `known` are the whole nets, "nothing" and "rows chosen", where they are trained already."""
    nets = dict(known or {})
    if not nets:
        nets["nothing"] = train_whole(task, task.pool, "whole net, all rows")
        nets["rows chosen"] = train_whole(task, task.chosen, "whole net, chosen rows")
    nets["net made smaller"] = train_smaller(task, task.pool, "smaller net, all rows")
    nets["all three"] = train_smaller(task, task.chosen, "smaller net, chosen rows")
    examples = Dataset.from_list(make_scenes(scenes, split="train", task="segmentation", seed=1))
    asked = make_scenes(queries, split="test", task="segmentation", seed=2)
    chosen = {name: [how for net, how in ARMS.values() if net == name] for name in nets}
    iou = {name: mean_iou(net.model, examples, asked, chosen[name]) for name, net in nets.items()}
    return [{"what": what, **facts(nets[name]), "iou": iou[name][how]} for what, (name, how) in ARMS.items()]


def facts(net: Net) -> dict[str, Any]:
    return {name: value for name, value in vars(net).items() if name != "model"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/three_pillars"))
    parser.add_argument("--epochs", type=float, default=3, help="length of each run, in epochs of the pool")
    parser.add_argument("--tune-epochs", type=float, default=1, help="of a smaller net, more, in epochs of the pool")
    parser.add_argument("--queries", type=int, default=40, help="scenes to segment by example")
    parser.add_argument("--scenes", type=int, default=200, help="scenes to choose the example from")
    options = parser.parse_args(argv)
    refuse_several_processes("this comparison")
    torch.set_num_threads(1)  # in nets this small, threads wait for each other for longer than they work
    transformers.logging.set_verbosity_error()
    task = Task(*choose(), digits()[1], options.epochs, options.tune_epochs, options.out)
    show(compare(task, options.queries, options.scenes), COLUMNS)


if __name__ == "__main__":
    main()
