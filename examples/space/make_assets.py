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
# hf_effdl = { path = "../.." }
# ///

"""Makes what the Space shows, on one core in about a minute, and a folder to push.

    python examples/space/make_assets.py                        # assets/: a small net and its path, a pool of scenes
    python examples/space/make_assets.py --out runs/space       # and a folder that holds all a Space needs

The net is trained on scikit-learn's digits by split LBI; the scenes are those of `digit_scenes.py`, the model that
segments them is the tiny SegGPT of `model_cards/`. Nothing is downloaded.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, set_seed


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # digit_scenes

from digit_scenes import make_scenes  # noqa: E402
from prompts import PLACES, POOL, QUERIES, frozen  # noqa: E402
from smaller import NET, digits  # noqa: E402

from hf_effdl import ExamplePool, SplitLBIArguments, SplitLBITrainer  # noqa: E402


def shifted(rows: dict[str, list]) -> dict[str, torch.Tensor]:
    """Images moved by up to three pixels, with noise; without it the net knows all digits after two epochs."""
    images = torch.stack([torch.as_tensor(image) for image in rows["pixel_values"]])
    moves = torch.randint(-3, 4, (len(images), 2)).tolist()
    images = torch.stack([image.roll(move, (1, 2)) for image, move in zip(images, moves, strict=True)])
    return {"pixel_values": images + 0.3 * torch.randn_like(images), "labels": torch.as_tensor(rows["labels"])}


def train_net(epochs: float) -> None:
    """The dense net, its path, and the accuracy of smaller ones along it."""
    set_seed(0)
    sizes = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=10))
    train, test = (
        Dataset.from_dict({"pixel_values": images.numpy(), "labels": labels.numpy()}).with_format("torch")
        for images, labels in digits()
    )
    with tempfile.TemporaryDirectory() as folder:
        args = SplitLBIArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=0.1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = SplitLBITrainer(model, args, train_dataset=train.with_transform(shifted), eval_dataset=test)
        trainer.train()
        trainer.evaluate_path(shares=(0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1))
        model.save_pretrained(NET)
        trainer.path.save(NET)


def make_pool(scenes: int) -> None:
    """A pool of encoded scenes, and scenes of other digits with their masks to ask about."""
    rows = [{key: row[key] for key in ("image", "mask")} for row in make_scenes(scenes, "train", seed=1)]
    with tempfile.TemporaryDirectory() as folder:
        data, encoder = Dataset.from_list(rows), frozen().encoder
        pool = ExamplePool.from_dataset(
            data, label_column="mask", encoder=encoder, keep_grids=True, cache_dir=folder, progress=False
        )
        shutil.rmtree(POOL, ignore_errors=True)
        pool.copied_to(POOL)
    shutil.rmtree(QUERIES, ignore_errors=True)
    QUERIES.mkdir(parents=True)
    for number, row in enumerate(make_scenes(8, "test", seed=2)):
        row["image"].save(QUERIES / f"scene-{number}.png")
        row["mask"].save(QUERIES / f"scene-{number}.mask", format="png")


def assemble(folder: Path) -> None:
    """The folder to push: this one, and the model beside the other assets."""
    shutil.copytree(HERE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "make_assets.py"))
    shutil.copytree(PLACES[1], folder / "assets" / PLACES[0].name, dirs_exist_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also fill this folder with all that a Space needs")
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--scenes", type=int, default=60, help="in the pool")
    parser.add_argument("--keep", action="store_true", help="keep the assets as they are, only fill the folder")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.keep:
        train_net(options.epochs)
        make_pool(options.scenes)
    if options.out is not None:
        assemble(options.out)
        print(f"hf upload your-name/hf-effdl {options.out} --repo-type space")


if __name__ == "__main__":
    main()
