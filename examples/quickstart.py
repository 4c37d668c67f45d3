"""Train once on scikit-learn's handwritten digits, watch which channels the data asks for, take a smaller model.

    python examples/quickstart.py            # about two minutes on two CPU cores; results under runs/quickstart/

The data ship with scikit-learn (1,797 scans of 8x8 pixels); nothing is downloaded.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from hf_effdl import SplitLBIArguments, SplitLBITrainer
from hf_effdl.hub.cards import markdown_table


SHARED = {
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 512, "learning_rate": 0.1, "report_to": "none",
    "max_grad_norm": 0.0, "dataloader_pin_memory": False, "logging_strategy": "epoch", "eval_strategy": "epoch",
}  # fmt: skip


def digits(seed: int = 0) -> tuple[Dataset, Dataset]:
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

    return rows(order[360:]).with_transform(augment), rows(order[:360])


def augment(rows: dict[str, list]) -> dict[str, torch.Tensor]:
    """Shift images by up to three pixels and add noise; without it the net knows all digits after two epochs."""
    images = torch.tensor(np.array(rows["pixel_values"]), dtype=torch.float32)
    shifts = torch.randint(-3, 4, (len(images), 2)).tolist()
    images = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])
    return {"pixel_values": images + 0.3 * torch.randn_like(images), "labels": torch.tensor(rows["labels"])}


def new_model() -> ResNetForImageClassification:
    set_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
            id2label={i: str(i) for i in range(10)}, label2id={str(i): i for i in range(10)},
        )
    )  # fmt: skip


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def plain_sgd(model, epochs: float, out: Path, train: Dataset, test: Dataset, **options) -> float:
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
    return trainer.evaluate()["eval_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--tune-epochs", type=float, default=5)
    parser.add_argument("--macs", type=float, default=0.25, help="share of the multiply-accumulates to keep")
    options = parser.parse_args()
    start = time.time()
    train, test = digits()

    print("\n[1/4] the same net with plain SGD, for comparison", flush=True)
    baseline = plain_sgd(new_model(), options.epochs, options.out / "sgd", train, test)

    print("\n[2/4] one run with split LBI", flush=True)
    args = SplitLBIArguments(str(options.out), num_train_epochs=options.epochs, save_strategy="no", **SHARED)
    trainer = SplitLBITrainer(new_model(), args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    trainer.train()

    print("\n[3/4] the accuracy of smaller models taken from it, without training again", flush=True)
    curve = trainer.evaluate_path(shares=(0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1))
    print(markdown_table(curve, {"macs": "MACs", "params": "parameters", "accuracy": "accuracy"}))

    print(f"\n[4/4] the model with {options.macs:.0%} of the MACs, fine-tuned", flush=True)
    small = trainer.slim(macs=options.macs, bn_batches=8)
    cut = trainer.evaluate_model(small)["accuracy"]
    tuned = plain_sgd(small, options.tune_epochs, options.out / "tune", train, test, learning_rate=0.05)

    report = small.config.effdl_report
    before, after = (
        {key: report[key][side] for key in ("params", "macs", "latency_ms")} for side in ("before", "after")
    )
    trainer.results = {
        "dense, plain SGD": {"accuracy": baseline, **before},
        "dense, split LBI": {"accuracy": trainer.evaluate_model(trainer.model)["accuracy"], **before},
        "masked on the support": {"accuracy": trainer.evaluate_masked()["accuracy"], **before},
        "slim": {"accuracy": cut, **after},
        "slim, fine-tuned": {"accuracy": tuned, **after},
    }
    trainer.save_model()
    trainer.create_model_card(model_name="digits-resnet", dataset="scikit-learn digits", tasks="image-classification")
    folder = trainer.save_slim(
        small, options.out / "slim", model_name="digits-resnet-slim", dataset="scikit-learn digits",
        tasks="image-classification",
    )  # fmt: skip
    rows = [{"model": name, **values} for name, values in trainer.results.items()]
    print(f"\n{markdown_table(rows, {k: k for k in ('model', 'accuracy', 'params', 'macs', 'latency_ms')})}")
    print(
        f"\nstage widths {trainer.model.config.hidden_sizes} -> {small.config.hidden_sizes}: a stock config, which "
        f"transformers loads alone\nlatency x {report['latency_ms']['ratio']:.2f}, "
        f"MACs x {report['macs']['ratio']:.2f}, parameters x {report['params']['ratio']:.2f}\n"
        f"picture {folder / 'sparse_path.png'}, card {folder / 'README.md'}, "
        f"{time.time() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
