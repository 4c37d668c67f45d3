# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "evaluate>=0.4.6",
#     "pillow>=11",
#     "scikit-learn>=1.6",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Train once on scikit-learn's handwritten digits, watch which channels the data asks for, take a smaller model; then
choose the rows worth training on from a pool with wrong labels, and the examples worth showing to a frozen model; then
grow the same net from a few channels; at the end fewer rows, a smaller net and a chosen example on one task.

    python examples/quickstart.py     # a minute or two on one core; then open runs/quickstart/index.html

The data ship with scikit-learn (1,797 scans of 8x8 pixels); nothing is downloaded. Every step says how long it takes
on one core, and its results stand on the page as soon as they are there.
"""

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


if __name__ == "__main__" and not {"-h", "--help"} & set(sys.argv):
    print("loading torch, transformers and datasets, up to half a minute the first time", flush=True)

import datasets
import evaluate
import numpy as np
import torch
import transformers
from datasets import Dataset
from digit_scenes import make_scenes
from digits_task import SHARED, accuracy, digits, new_model, pool_with_wrong_labels, show, to_train, train_with_bar
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from quickstart_page import Page
from three_pillars import COLUMNS, SHARE, Net, Task, compare
from transformers import ResNetForImageClassification, SegGptForImageSegmentation, Trainer, TrainingArguments

from hf_effdl import (
    ExamplePool,
    GrowingArguments,
    GrowingTrainer,
    LinearProbes,
    SegGptInContext,
    SplitLBIArguments,
    SplitLBITrainer,
    UncertaintySelector,
    VisualInContextModel,
    VisualInContextPipeline,
    WeightedTrainer,
    metrics,
)
from hf_effdl.cli.arguments import refuse_several_processes


TINY = Path(__file__).parents[1] / "model_cards" / "tiny-seggpt-digits"


TEXTS = {"accuracy": "test accuracy", "params": "parameters", "macs": "MACs", "latency_ms": "ms a batch of 32"}
SHOWN = ("nearest", "dense", "oracle")  # side by side in the picture


@contextmanager
def step(number: int, text: str, seconds: int) -> Iterator[None]:
    """A heading that says how long it takes, and how long it took."""
    print(f"\n[{number}/8] {text}: about {seconds} s on a free core", flush=True)
    start = time.monotonic()
    yield
    print(f"[{number}/8] took {time.monotonic() - start:.0f} s", flush=True)


def choose_rows(budget: float, epochs: float, out: Path, test: list) -> tuple[dict[str, Dataset], dict[str, Net]]:
    """The same net trained on chosen rows, on as many random rows, and on the whole of a pool with wrong labels."""
    probe_rows, pool = pool_with_wrong_labels()
    probes = LinearProbes.train(None, probe_rows, "labels", input_column="pixels")
    selector = UncertaintySelector(probes, "labels")
    subset = selector.select(pool, budget)
    report = selector.report()
    report.save(out)
    print("\n\n".join(str(report).split("\n\n")[:3]), flush=True)  # all of it is in the file
    everything = pool.add_column("weight", [1.0] * len(pool))
    sets = {
        "chosen": subset,
        "random": everything.shuffle(seed=0).select(range(len(subset))),
        "the whole pool": everything,
    }
    nets = {}
    for name, rows in sets.items():
        args = TrainingArguments(
            str(out / "run"),
            optim="sgd",
            optim_args="momentum=0.9",
            save_strategy="no",
            num_train_epochs=epochs * len(pool) / len(rows),
            **{**SHARED, "learning_rate": 0.05, "eval_strategy": "no"},
        )
        trainer = WeightedTrainer(
            new_model(), args, train_dataset=to_train(rows), eval_dataset=test, compute_metrics=accuracy
        )
        train_with_bar(trainer, name)
        nets[name] = Net(trainer.model, len(rows), trainer.evaluate()["eval_accuracy"])
    return sets, nets


def choose_examples(queries: int, pool_rows: int, out: Path) -> list[dict[str, Any]]:
    """Mean IoU of a frozen tiny SegGPT on scenes of unseen digits, by how the one example it is shown was chosen."""
    frozen = SegGptInContext(SegGptForImageSegmentation.from_pretrained(TINY, dtype=torch.float32))
    model = VisualInContextModel.from_parts(frozen, embed=True)
    examples = Dataset.from_list(make_scenes(pool_rows, split="train", task="segmentation", seed=1))
    scenes = make_scenes(queries, split="test", task="segmentation", seed=2)
    images, masks = [scene["image"] for scene in scenes], [np.asarray(scene["mask"]) for scene in scenes]
    iou = evaluate.load(str(Path(metrics.__path__[0]) / "foreground_iou"))
    outputs, table = {}, []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # a whole copy goes with the pipeline
        pool = ExamplePool.from_dataset(examples, label_column="mask", encoder=model.encoder, cache_dir=folder)
        pipe = VisualInContextPipeline(model, "dense", pool)
        for strategy in ("random", "nearest", "dense", "oracle"):
            labels = [scene["mask"] for scene in scenes] if strategy == "oracle" else None
            outputs[strategy] = pipe(images, strategy=strategy, labels=labels)
            answers = [output["prediction"] for output in outputs[strategy]]
            scores = [iou.compute(predictions=[a], references=[m])["mean_iou"] for a, m in zip(answers, masks)]
            table.append({"strategy": strategy, "iou": float(np.mean(scores)), "scores": scores})
            print(f"  example chosen by {strategy}: mean IoU {table[-1]['iou']:.3f}", flush=True)
        scores = {row["strategy"]: row.pop("scores") for row in table}
        draw_answers(pool, images[:4], masks[:4], outputs, scores).save(out / "prompts.png")
        pipe.save_pretrained(out / "model")
    return table


def draw_answers(
    pool: ExamplePool,
    images: Sequence[Picture.Image],
    masks: Sequence[np.ndarray],
    outputs: Mapping[str, list[dict]],
    scores: Mapping[str, list[float]],
    side: int = 120,
) -> Picture.Image:
    """A line for each query: with its true mask, and for three ways to choose, the example shown and the answer."""

    def painted(image: Picture.Image, mask: Any) -> Picture.Image:
        """What is not marked in grey and pale, what is marked in its colours with a white edge."""
        big = image.convert("RGB").resize((side, side), Picture.Resampling.NEAREST)
        marked = Picture.fromarray(np.uint8(np.asarray(mask) > 0) * 255).resize(big.size, Picture.Resampling.NEAREST)
        pale = Picture.blend(big.convert("L").convert("RGB"), Picture.new("RGB", big.size, "white"), 0.6)
        red = Picture.blend(big, Picture.new("RGB", big.size, (214, 39, 40)), 0.65)
        return Picture.composite(red, pale, marked)

    gap, wide, top, foot, font = 6, 22, 30, 22, ImageFont.load_default(13)
    columns = ["query", "true mask", *(text for name in SHOWN for text in (f"example: {name}", f"answer: {name}"))]
    lefts = [gap + (side + gap) * i + wide * (i // 2) for i in range(len(columns))]
    sheet = Picture.new("RGB", (lefts[-1] + side + gap, top + len(images) * (side + foot) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for left, text in zip(lefts, columns, strict=True):
        pen.text((left, 10), text, fill="black", font=font)
    for line, (image, mask) in enumerate(zip(images, masks, strict=True)):
        tiles = [(image.resize((side, side), Picture.Resampling.NEAREST), ""), (painted(image, mask), "")]
        for name in SHOWN:
            output = outputs[name][line]
            row = pool.ids.index(output["example_ids"][0])
            tiles.append((painted(pool.image(row), pool.label(row)), f"scene {output['example_ids'][0]}"))
            tiles.append((painted(image, output["prediction"]), f"IoU {scores[name][line]:.2f}"))
        for left, (tile, text) in zip(lefts, tiles, strict=True):
            sheet.paste(tile, (left, top + line * (side + foot)))
            pen.text((left, top + line * (side + foot) + side + 2), text, fill="#57606a", font=font)
    return sheet


def grow(epochs: float, max_macs: int, out: Path, train: Dataset, test: list) -> GrowingTrainer:
    """A run of the same net that begins with a quarter of its channels and may grow to `max_macs`."""
    args = GrowingArguments(
        str(out),
        num_train_epochs=epochs,
        max_macs=max_macs,
        save_strategy="no",
        save_total_limit=1,
        # with shorter rounds the support would say little in a run of this length
        growth_rounds=2,
        growth_until=0.3,
        growth_ratio=2.0,
        **SHARED,
    )
    trainer = GrowingTrainer(new_model(4), args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    train_with_bar(trainer, "growing")
    return trainer


def plain_sgd(name: str, model, epochs: float, out: Path, train: Dataset, test: list, **options) -> list[dict]:
    """Train, and return every evaluation."""
    args = TrainingArguments(
        str(out),
        optim="sgd",
        optim_args="momentum=0.9",
        num_train_epochs=epochs,
        save_strategy="no",
        **{**SHARED, **options},
    )
    trainer = Trainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    train_with_bar(trainer, name)
    trainer.evaluate()
    return [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--tune-epochs", type=float, default=5)
    parser.add_argument("--macs", type=float, default=0.25, help="share of the multiply-accumulates to keep")
    parser.add_argument("--budget", type=float, default=SHARE, help="share of the pool to select")
    parser.add_argument("--select-epochs", type=float, default=3, help="length of each run, in epochs of the pool")
    parser.add_argument("--queries", type=int, default=40, help="scenes to segment by example")
    parser.add_argument("--scenes", type=int, default=200, help="scenes to choose the example from")
    options = parser.parse_args(argv)
    refuse_several_processes("the demo")
    run(options)


def run(options: argparse.Namespace) -> None:
    """All eight steps; each adds its part to the page."""
    start, out = time.monotonic(), options.out
    torch.set_num_threads(1)  # in nets this small, threads wait for each other for longer than they work
    gc.freeze()  # every training ends with a search for garbage, which need not look through what was imported
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    page = Page(
        out,
        "hf_effdl quickstart",
        "A small ResNet on scikit-learn's handwritten digits: 1,437 scans to train on, 360 to test, one run each, no "
        "seeds repeated. What these numbers show is how the parts work, not how good they are in general.",
    )
    train, test = digits()

    with step(1, "the same net with plain SGD, for comparison", 8):
        dense = plain_sgd("plain SGD", new_model(), options.epochs, out / "sgd", train, test)
    with step(2, "one run with split LBI", 12):
        args = SplitLBIArguments(str(out / "dense"), num_train_epochs=options.epochs, save_strategy="no", **SHARED)
        trainer = SplitLBITrainer(new_model(), args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
        train_with_bar(trainer, "split LBI")
    with step(3, "the accuracy of smaller models taken from it, without training again", 4):
        curve = trainer.evaluate_path(shares=(0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1))
        columns = {"macs": "MACs", "params": "parameters", "accuracy": "accuracy"}
        show(curve, columns)
    with step(4, f"the model with {options.macs:.0%} of the MACs, fine-tuned", 5):
        small = take_smaller(trainer, dense, options, train, test)
        smaller_part(page, trainer, small, curve)
    with step(5, f"{options.budget:.0%} of a pool with a fifth of its labels wrong", 6):
        sets, nets = choose_rows(options.budget, options.select_epochs, out / "selection", test)
        selection_part(page, nets)
    with step(6, "which example to show a frozen model: a tiny SegGPT on scenes of digits", 8):
        prompts_part(page, choose_examples(options.queries, options.scenes, out / "prompts"))
    with step(7, "growing the same net from a seed of 4 channels", 15):
        growth_part(page, trainer, dense, options, train, test)
    with step(8, "all of it on one task: fewer rows, a smaller net, a chosen example", 10):
        task = Task(sets["the whole pool"], sets["chosen"], test, options.select_epochs, 1, out / "whole")
        known = {"nothing": nets["the whole pool"], "rows chosen": nets["chosen"]}
        whole_part(page, compare(task, options.queries, options.scenes, known))
    print(f"\nall tables and pictures: {page.save()}\n{time.monotonic() - start:.0f} s in all")


def take_smaller(
    trainer: SplitLBITrainer, dense: list[dict], options: argparse.Namespace, train: Dataset, test: list
) -> ResNetForImageClassification:
    """The smaller model, fine-tuned and saved; the trainer's results are those of all models so far."""
    small = trainer.slim(macs=options.macs, bn_batches=8)
    cut = trainer.evaluate_model(small)["accuracy"]
    tuned = plain_sgd("fine-tuning", small, options.tune_epochs, options.out / "tune", train, test, learning_rate=0.05)
    report = small.config.effdl_report
    sizes = ("params", "macs", "latency_ms")
    before, after = ({key: report[key][side] for key in sizes} for side in ("before", "after"))
    trainer.results = {
        "dense, plain SGD": {"accuracy": dense[-1]["eval_accuracy"], **before},
        "dense, split LBI": {"accuracy": trainer.evaluate_model(trainer.model)["accuracy"], **before},
        "masked on the support": {"accuracy": trainer.evaluate_masked()["accuracy"], **before},
        "slim": {"accuracy": cut, **after},
        "slim, fine-tuned": {"accuracy": tuned[-1]["eval_accuracy"], **after},
    }
    card = {"dataset": "scikit-learn digits", "tasks": "image-classification"}
    trainer.save_model()
    trainer.create_model_card(model_name="digits-resnet", **card)
    trainer.save_slim(small, options.out / "slim", model_name="digits-resnet-slim", **card)
    return small


def smaller_part(page: Page, trainer: SplitLBITrainer, small: torch.nn.Module, curve: list[dict]) -> None:
    report = small.config.effdl_report
    widths = f"{trainer.model.config.hidden_sizes} -> {small.config.hidden_sizes}"
    text = (
        f"stage widths {widths}: a stock config, which transformers loads alone; latency x "
        f"{report['latency_ms']['ratio']:.2f}, MACs x {report['macs']['ratio']:.2f}, parameters x "
        f"{report['params']['ratio']:.2f}"
    )
    rows = [{"model": name, **values} for name, values in trainer.results.items()]
    show(rows, {"model": "model"} | TEXTS)
    print(text, flush=True)
    page.add(
        "A smaller model",
        f"One run with split LBI says in which order the data ask for the channels; {text}.",
        rows,
        {"model": "model"} | TEXTS,
        {"When each channel entered, and the accuracy of smaller models, not trained again:": "slim/sparse_path.png"},
        {"the smaller model and its card": "slim/README.md", "the dense model and its card": "dense/README.md"},
    )
    page.add(
        "Smaller models along the path",
        "Taken from the same run at several budgets, none trained again; sizes beside the dense net's.",
        curve,
        {"macs": "MACs", "params": "parameters", "accuracy": "test accuracy"},
    )


def selection_part(page: Page, nets: Mapping[str, Net]) -> None:
    table = [{"rows": f"{name}, {net.rows} rows", "accuracy": net.accuracy} for name, net in nets.items()]
    columns = {"rows": "trained on (same number of steps)", "accuracy": "test accuracy"}
    show(table, columns)
    page.add(
        "The rows worth training on",
        "Eight linear probes, trained on 300 other rows, score a pool of 1,137 of which a fifth has a wrong label.",
        table,
        columns,
        {
            "What was chosen:": "selection/selection.png",
            "Rows that were chosen, left out, and suspected of a wrong label:": "selection/examples.png",
        },
        {"the report": "selection/report.md"},
    )


def prompts_part(page: Page, table: list[dict]) -> None:
    columns = {"strategy": "the example was chosen by", "iou": "mean IoU"}
    show(table, columns)
    page.add(
        "The examples worth showing",
        "A frozen tiny SegGPT segments a new scene as one example shows it. Nearest: the most similar scene by one "
        "vector; dense: by matching the scenes' parts; oracle: the best there is, found with the answer.",
        table,
        columns,
        {"Examples and answers; marked is what is painted red:": "prompts/prompts.png"},
        {"the pipeline and its card": "prompts/model/README.md"},
    )


def growth_part(
    page: Page, trainer: SplitLBITrainer, dense: list[dict], options: argparse.Namespace, train: Dataset, test: list
) -> None:
    """Grow, draw, and compare with the dense nets."""
    whole = trainer.results["dense, plain SGD"]["macs"]
    grown = grow(options.epochs, whole // 2, options.out / "grown", train, test)
    cost = 3 * whole * len(train)  # of one epoch of the dense net
    grown.dense_curve = [
        {"training_macs": cost * entry["epoch"], "accuracy": entry["eval_accuracy"]} for entry in dense
    ]
    grown.save_model()
    grown.create_model_card(model_name="digits-grown", dataset="scikit-learn digits", tasks="image-classification")
    for checkpoint in (options.out / "grown").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    last, counts = grown.growth_curve[-1], grown.groups[0].network.count()
    rows = [{"model": name, **trainer.results[name], "training": 1.0} for name in list(trainer.results)[:2]]
    training = last["training_macs"] / (cost * options.epochs)
    rows.append({"model": "grown", **counts, "accuracy": last["accuracy"], "training": training})
    columns = {"model": "model", "accuracy": "test accuracy", "params": "parameters", "macs": "MACs"}
    columns |= {"training": "training MACs (dense = 1)"}
    show(rows, columns)
    sizes = (new_model(4).config, grown.model.config)
    text = f"stage widths {sizes[0].hidden_sizes} -> {sizes[1].hidden_sizes}, of at most half the dense net's MACs"
    print(text, flush=True)
    page.add(
        "Growing instead",
        f"The same net from 4 channels, wider where its support is full: {text}.",
        rows,
        columns,
        {"Widths over the steps, and accuracy against the cost of training:": "grown/growth.png"},
        {"the grown model and its card": "grown/README.md"},
    )


def whole_part(page: Page, table: list[dict]) -> None:
    show(table, COLUMNS)
    page.add(
        "All three on one task",
        f"Chosen rows of a pool with a fifth of its labels wrong; a net with {SHARE:.0%} of the MACs, refitted and "
        "tuned; its encoder shown one example of scenes of digits. Beside it none of this, and each alone. Training "
        "MACs, MACs and latency are shares of those of the whole net on the whole pool.",
        table,
        COLUMNS,
    )


if __name__ == "__main__":
    main()
