"""Train once on scikit-learn's handwritten digits, watch which channels the data asks for, take a smaller model; then
choose the rows worth training on from a pool with wrong labels, and the examples worth showing to a frozen model; then
grow the same net from a few channels.

    python examples/quickstart.py            # about a minute on two CPU cores; results under runs/quickstart/

The data ship with scikit-learn (1,797 scans of 8x8 pixels); nothing is downloaded.
"""

import argparse
import time
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from digit_scenes import make_scenes
from PIL import Image as Picture
from sklearn.datasets import load_digits
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SegGptForImageSegmentation,
    Trainer,
    TrainingArguments,
    set_seed,
)

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
from hf_effdl.hub.cards import markdown_table


TINY = Path(__file__).parents[1] / "model_cards" / "tiny-seggpt-digits"


SHARED = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 512,
    "learning_rate": 0.1,
    "report_to": "none",
    "max_grad_norm": 0.0,
    "dataloader_pin_memory": False,
    "logging_strategy": "epoch",
    "eval_strategy": "epoch",
}


def digits(seed: int = 0) -> tuple[Dataset, list[dict[str, torch.Tensor]]]:
    """1,437 training and 360 test rows of 32x32 pixels, `pixel_values` and `labels`."""
    data = load_digits()
    images = torch.nn.functional.interpolate(
        torch.tensor(data.images / 16, dtype=torch.float32)[:, None], size=(32, 32), mode="bilinear"
    )
    images = (images - images.mean()) / images.std()
    order = np.random.default_rng(seed).permutation(len(images))

    def rows(index: np.ndarray) -> Dataset:
        columns = {"pixel_values": images[index].numpy(), "labels": data.target[index]}
        return Dataset.from_dict(columns).with_format("torch")

    return rows(order[360:]).with_transform(augment), list(rows(order[:360]))  # read out once, evaluated many times


def augment(rows: dict[str, list]) -> dict[str, torch.Tensor]:
    """Shift images by up to three pixels and add noise; without it the net knows all digits after two epochs."""
    images = torch.tensor(np.array(rows["pixel_values"]), dtype=torch.float32)
    shifts = torch.randint(-3, 4, (len(images), 2)).tolist()
    images = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])
    kept = {name: torch.tensor(rows[name]) for name in ("labels", "weight") if name in rows}
    return {"pixel_values": images + 0.3 * torch.randn_like(images), **kept}


def pool_with_wrong_labels(share: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """300 rows for the probes and a pool of 1,137, with a share of the labels wrong in both; none of the test rows."""
    data, rng = load_digits(), np.random.default_rng(seed)
    rows = rng.permutation(len(data.images))[360:]
    wrong = rng.random(len(rows)) < share
    labels = np.where(wrong, (data.target[rows] + rng.integers(1, 10, len(rows))) % 10, data.target[rows])
    train = digits(seed)[0].with_format(None)["pixel_values"][:]
    columns = {
        "image": [Picture.fromarray((16 - data.images[i]).astype(np.uint8) * 15).resize((64, 64)) for i in rows],
        "pixels": (data.images[rows] / 16).reshape(len(rows), -1),
        "pixel_values": train,
        "labels": labels,
    }
    features = Features(
        {
            "image": Image(),
            "pixels": List(Value("float32")),
            "pixel_values": List(List(List(Value("float32")))),
            "labels": ClassLabel(names=[str(i) for i in range(10)]),
        }
    )
    pool = Dataset.from_dict(columns, features=features)
    return pool.select(range(300)), pool.select(range(300, len(pool)))


def choose_rows(budget: float, epochs: float, out: Path, test: list) -> dict[str, float]:
    """Accuracy of the same net trained on as many chosen and random rows of a pool with wrong labels."""
    probe_rows, pool = pool_with_wrong_labels()
    probes = LinearProbes.train(None, probe_rows, "labels", input_column="pixels")
    selector = UncertaintySelector(probes, "labels")
    subset = selector.select(pool, budget)
    report = selector.report()
    report.save(out / "selection")
    print(report)
    everything = pool.add_column("weight", [1.0] * len(pool))
    sets = {
        "chosen": subset,
        "random": everything.shuffle(seed=0).select(range(len(subset))),
        "the whole pool": everything,
    }
    accuracies = {}
    for name, rows in sets.items():
        args = TrainingArguments(
            str(out / "selection" / "run"),
            optim="sgd",
            optim_args="momentum=0.9",
            save_strategy="no",
            num_train_epochs=epochs * len(pool) / len(rows) if rows is not everything else epochs,
            **{**SHARED, "learning_rate": 0.05, "eval_strategy": "no", "remove_unused_columns": False},
        )
        trainer = WeightedTrainer(
            new_model(), args, train_dataset=rows.with_transform(augment), eval_dataset=test, compute_metrics=accuracy
        )
        trainer.train()
        accuracies[f"{name}, {len(rows)} rows"] = trainer.evaluate()["eval_accuracy"]
    return accuracies


def choose_examples(queries: int, pool_rows: int, out: Path) -> dict[str, float]:
    """Mean IoU of a frozen tiny SegGPT on scenes of unseen digits, by how the one example it is shown was chosen."""
    frozen = SegGptInContext(SegGptForImageSegmentation.from_pretrained(TINY, dtype=torch.float32))
    model = VisualInContextModel.from_parts(frozen, embed=True)
    examples = Dataset.from_list(make_scenes(pool_rows, split="train", task="segmentation", seed=1))
    pool = ExamplePool.from_dataset(examples, label_column="mask", encoder=model.encoder, cache_dir=out / "prompts")
    pipe = VisualInContextPipeline(model, "dense", pool)
    scenes = make_scenes(queries, split="test", task="segmentation", seed=2)
    images, masks = [scene["image"] for scene in scenes], [scene["mask"] for scene in scenes]
    iou = evaluate.load(str(Path(metrics.__path__[0]) / "foreground_iou"))
    scores = {}
    for strategy in ("random", "nearest", "dense", "oracle"):
        outputs = pipe(images, strategy=strategy, labels=masks if strategy == "oracle" else None)
        found = [output["prediction"] for output in outputs]
        scores[strategy] = iou.compute(predictions=found, references=[np.asarray(mask) for mask in masks])["mean_iou"]
    pipe.plot(images[:4], num_examples=1, path=out / "prompts" / "prompts.png")
    pipe.save_pretrained(out / "prompts" / "model")
    return scores


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
    trainer.train()
    return trainer


def new_model(width: int = 16) -> ResNetForImageClassification:
    set_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=width,
            hidden_sizes=[width, 2 * width, 4 * width],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label={i: str(i) for i in range(10)},
            label2id={str(i): i for i in range(10)},
        )
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def plain_sgd(model, epochs: float, out: Path, train: Dataset, test: list, **options) -> list[dict[str, float]]:
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
    trainer.train()
    trainer.evaluate()
    return [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--tune-epochs", type=float, default=5)
    parser.add_argument("--macs", type=float, default=0.25, help="share of the multiply-accumulates to keep")
    parser.add_argument("--budget", type=float, default=0.2, help="share of the pool to select")
    parser.add_argument("--select-epochs", type=float, default=3, help="length of each run, in epochs of the pool")
    parser.add_argument("--queries", type=int, default=40, help="scenes to segment by example")
    parser.add_argument("--scenes", type=int, default=200, help="scenes to choose the example from")
    options = parser.parse_args()
    start = time.time()
    train, test = digits()

    print("\n[1/7] the same net with plain SGD, for comparison", flush=True)
    dense = plain_sgd(new_model(), options.epochs, options.out / "sgd", train, test)

    print("\n[2/7] one run with split LBI", flush=True)
    args = SplitLBIArguments(str(options.out), num_train_epochs=options.epochs, save_strategy="no", **SHARED)
    trainer = SplitLBITrainer(new_model(), args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    trainer.train()

    print("\n[3/7] the accuracy of smaller models taken from it, without training again", flush=True)
    curve = trainer.evaluate_path(shares=(0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1))
    print(markdown_table(curve, {"macs": "MACs", "params": "parameters", "accuracy": "accuracy"}))

    print(f"\n[4/7] the model with {options.macs:.0%} of the MACs, fine-tuned", flush=True)
    small = trainer.slim(macs=options.macs, bn_batches=8)
    cut = trainer.evaluate_model(small)["accuracy"]
    tuned = plain_sgd(small, options.tune_epochs, options.out / "tune", train, test, learning_rate=0.05)

    print(f"\n[5/7] {options.budget:.0%} of a pool with a fifth of its labels wrong", flush=True)
    chosen = choose_rows(options.budget, options.select_epochs, options.out, test)

    print("\n[6/7] which example to show a frozen model: a tiny SegGPT on scenes of digits", flush=True)
    shown = choose_examples(options.queries, options.scenes, options.out)

    report = small.config.effdl_report
    before, after = (
        {key: report[key][side] for key in ("params", "macs", "latency_ms")} for side in ("before", "after")
    )
    trainer.results = {
        "dense, plain SGD": {"accuracy": dense[-1]["eval_accuracy"], **before},
        "dense, split LBI": {"accuracy": trainer.evaluate_model(trainer.model)["accuracy"], **before},
        "masked on the support": {"accuracy": trainer.evaluate_masked()["accuracy"], **before},
        "slim": {"accuracy": cut, **after},
        "slim, fine-tuned": {"accuracy": tuned[-1]["eval_accuracy"], **after},
    }

    print("\n[7/7] growing the same net from a seed of 4 channels", flush=True)
    grown = grow(options.epochs, before["macs"] // 2, options.out / "grown", train, test)
    cost = 3 * before["macs"] * len(train)  # of one epoch of the dense net
    grown.dense_curve = [
        {"training_macs": cost * entry["epoch"], "accuracy": entry["eval_accuracy"]} for entry in dense
    ]
    grown.plot_growth().savefig(options.out / "growth.png", dpi=110)

    trainer.save_model()
    trainer.create_model_card(model_name="digits-resnet", dataset="scikit-learn digits", tasks="image-classification")
    folder = trainer.save_slim(
        small,
        options.out / "slim",
        model_name="digits-resnet-slim",
        dataset="scikit-learn digits",
        tasks="image-classification",
    )
    rows = [{"model": name, **values} for name, values in trainer.results.items()]
    print(f"\n{markdown_table(rows, {k: k for k in ('model', 'accuracy', 'params', 'macs', 'latency_ms')})}")
    print(
        f"\nstage widths {trainer.model.config.hidden_sizes} -> {small.config.hidden_sizes}: a stock config, which "
        f"transformers loads alone\nlatency x {report['latency_ms']['ratio']:.2f}, "
        f"MACs x {report['macs']['ratio']:.2f}, parameters x {report['params']['ratio']:.2f}\n"
        f"picture {folder / 'sparse_path.png'}, card {folder / 'README.md'}, "
        f"{time.time() - start:.0f} s in all"
    )
    columns = {"rows": "trained on (same number of steps)", "accuracy": "test accuracy"}
    print(f"\n{markdown_table([{'rows': name, 'accuracy': value} for name, value in chosen.items()], columns)}")
    print(f"\nthe selection's report and pictures are in {options.out / 'selection'}")
    columns = {"strategy": "the example was chosen by", "iou": "mean IoU"}
    print(f"\n{markdown_table([{'strategy': name, 'iou': value} for name, value in shown.items()], columns)}")
    print(f"\nqueries, examples and predictions: {options.out / 'prompts' / 'prompts.png'}")
    last, counts = grown.growth_curve[-1], grown.groups[0].network.count()
    rows = [{"model": name, **trainer.results[name], "training": 1.0} for name in list(trainer.results)[:2]]
    rows += [
        {
            "model": "grown",
            **counts,
            "accuracy": last["accuracy"],
            "training": last["training_macs"] / (cost * options.epochs),
        }
    ]
    columns = {k: k for k in ("model", "accuracy", "params", "macs")} | {"training": "training MACs (dense = 1)"}
    print(f"\n{markdown_table(rows, columns)}")
    sizes = (new_model(4).config, grown.model.config)
    print(
        f"\nstage widths {sizes[0].hidden_sizes} -> {sizes[1].hidden_sizes}, of at most half the dense net's MACs\n"
        f"widths over the steps and accuracy against training cost: {options.out / 'growth.png'}"
    )


if __name__ == "__main__":
    main()
