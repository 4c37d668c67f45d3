# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "pillow>=11",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""All three pillars on one task, beside none of them and each alone.

600 photos of pets (Oxford-IIIT Pet, three breeds). DINOv2-small is fine-tuned to tell the breeds, at 112 x 112 pixels,
on photos of which a fifth has a wrong label; then its encoder is the frozen model of visual prompts: `FeatureMatching`
carries the mask of one example over to a new photo. A permutation of the photos gives 100 for the probes, a pool of
300, and 150 for the test, whose labels are right.

- rows: all of the pool, or 30 % of it: chosen (`UncertaintySelector` with its defaults; eight linear probes on the
  untouched encoder's features, trained on the 100 other rows, a fifth of them wrong, too), or drawn by chance;
- model: whole (AdamW), or 30 % of the multiply-accumulates: trained by `SplitLBITrainer` (AdamW base, dense start),
  slimmed by activation with the layers behind refitted on the 400 photos of pool and probes, which takes no labels;
  not trained further;
- prompts: the example by chance, or by matching parts (`dense`), of 100 photos of the pool; 60 test photos ask.

Every run sees its rows for the same number of epochs, from a head that was fitted to the untouched encoder's features
of these rows. Training MACs are three forward passes for each row and epoch, and one for each row that an encoder was
asked about: to fit the head, to choose rows, to refit layers. Learning rates are chosen on another seed, on rows drawn
by chance, by the accuracy on that seed's test photos.

    python examples/benchmarks/whole.py --encoder facebook/dinov2-small --tune
    python examples/benchmarks/whole.py --encoder facebook/dinov2-small
    python examples/benchmarks/whole.py --table

Photos are looked for in `pets` under HF_EFFDL_DATA; `--encoder` (or HF_EFFDL_DINOV2) is a model id or a folder. Rows
go to `--out` as one JSON line per (rows, model, rate, seed); rows already there are skipped.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from PIL import Image
from pretrained_arms import cell
from pretrained_dinov2 import DATA, ENCODER
from rows import RowFile, machine, parser_of
from torch import Tensor
from transformers import AutoModelForImageClassification, TrainingArguments

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
from hf_effdl.structure.slim.latency import measure_latency
from hf_effdl.structure.slim.report import get_report


SIZES, SIDE = {"probes": 100, "pool": 300, "test": 150}, 112
EXAMPLES, QUERIES = 100, 60  # photos of pool and test that prompts are made of
CALIBRATION = ("probes", "pool")  # parts whose photos layers are refitted on
WRONG, SHARE, MACS = 0.2, 0.3, 0.3
EPOCHS, BATCH, HEAD_STEPS = 3, 8, 100
TUNED_ON = 100  # a seed that no result is of
RATES = {"whole": (1e-5, 3e-5), "smaller": (1e-5, 3e-5)}
CHOSEN_RATES = {"whole": 3e-5, "smaller": 1e-5}
ROWS = ("all", "chosen", "by chance")
ARMS = (("all", "whole"), ("by chance", "whole"), ("chosen", "whole"), ("all", "smaller"), ("chosen", "smaller"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the encoder was trained on
STRATEGIES = {"random": "IoU, example by chance", "dense": "IoU, example chosen"}
SHARES = ("params", "macs", "latency 1", "latency 32")  # of the whole model's
MEASURES = {"accuracy": 1, "training": 2, "seconds": 0, "params": 2, "macs": 2, "latency 1": 2, "latency 32": 2}
MEASURES |= dict.fromkeys(STRATEGIES.values(), 3)
HEADINGS = {"accuracy": "accuracy, %", "training": "training MACs", "seconds": "processor s", "params": "parameters"}
HEADINGS |= {"macs": "MACs", "latency 1": "latency of 1", "latency 32": "latency of 32"}


# ---- data


@dataclass(frozen=True)
class Photos:
    """One split of the photos.

    Args:
        files: of all photos, in the order of a permutation.
        pixels: as the encoder takes them.
        labels: breeds, right.
        given: breeds, some wrong.
    """

    files: list[Path]
    pixels: Tensor
    labels: Tensor
    given: Tensor

    def part(self, name: str) -> range:
        """Places of the photos of a part."""
        start = sum(size for other, size in SIZES.items() if list(SIZES).index(other) < list(SIZES).index(name))
        return range(start, start + SIZES[name])

    def rows(self, name: str) -> Dataset:
        """Places and the labels that are given; `feed` makes rows of a model of them."""
        places = self.part(name)
        labels = (self.labels if name == "test" else self.given)[list(places)]
        return Dataset.from_dict({"place": list(places), "labels": labels.tolist()})

    def feed(self, data: Dataset) -> Dataset:
        def read(rows: dict[str, list]) -> dict[str, Any]:
            found = {"pixel_values": self.pixels[rows["place"]], "labels": torch.tensor(rows["labels"])}
            return found | ({"weight": torch.tensor(rows["weight"])} if "weight" in rows else {})

        return data.with_transform(read)


def read(seed: int) -> Photos:
    """Photos of a permutation, with a share of the labels of probes and pool wrong."""
    folder = DATA / "pets" / "images"
    files = sorted(folder.glob("*.jpg"))
    if len(files) < sum(SIZES.values()):
        raise SystemExit(f"{len(files)} photos in {folder}, and {sum(SIZES.values())} are needed: set HF_EFFDL_DATA")
    rng = np.random.default_rng(seed)
    chosen = [files[i] for i in rng.permutation(len(files))[: sum(SIZES.values())]]
    breeds = [file.stem.rpartition("_")[0] for file in chosen]
    names = sorted(set(breeds))
    labels = np.array([names.index(breed) for breed in breeds])
    wrong = rng.random(len(labels)) < WRONG
    given = np.where(wrong, (labels + rng.integers(1, len(names), len(labels))) % len(names), labels)
    squashed = [Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for file in chosen]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in squashed])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return Photos(chosen, (pixels - mean) / std, torch.from_numpy(labels), torch.from_numpy(given))


# ---- the three pillars


@torch.no_grad()
def choose(photos: Photos, encoder: Any, seed: int) -> Dataset:
    """30 % of the pool, with weights."""

    def features(name: str) -> Dataset:
        places = torch.tensor(photos.part(name))
        said = torch.cat([encoder(photos.pixels[part]).pooler_output for part in places.split(50)])
        return photos.rows(name).add_column("features", said.tolist())

    probes = LinearProbes.train(None, features("probes"), "labels", input_column="features", seed=seed)
    pool = features("pool")
    chosen = UncertaintySelector(probes, "labels", seed=seed).select(pool, round(SHARE * len(pool)))
    return chosen.remove_columns("features")


def begin(options: Any, photos: Photos, rows: Dataset, seed: int) -> Any:
    """The model with a head that knows the rows."""
    model = fresh(options.encoder, seed)
    fit_head(model, photos, rows)
    transformers.set_seed(seed)
    return model


def train(photos: Photos, rows: Dataset, model: Any, rate: float, seed: int, out: str) -> Any:
    """The whole model, trained in place."""
    rows = rows if "weight" in rows.column_names else rows.add_column("weight", [1.0] * len(rows))
    trainer = WeightedTrainer(model, TrainingArguments(out, **settings(rate, seed)), train_dataset=photos.feed(rows))
    trainer.train()
    return model


def train_smaller(photos: Photos, rows: Dataset, model: Any, rate: float, seed: int, out: str) -> Any:
    """A smaller one: the path says how many units stay, their activation which, and the layers behind are refitted."""
    args = SplitLBIArguments(out, base="adamw", start="dense", **settings(rate, seed))
    trainer = SplitLBITrainer(model, args, train_dataset=photos.feed(rows))
    trainer.train()
    places = torch.tensor([place for part in CALIBRATION for place in photos.part(part)])
    seen = [{"pixel_values": photos.pixels[part]} for part in places.split(16)]
    return trainer.slim(macs=MACS, widths="free", latency_batch=0, score="activation", calibration=seen)


TRAIN = {"whole": train, "smaller": train_smaller}


def settings(rate: float, seed: int) -> dict[str, Any]:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    return quiet | {
        "learning_rate": rate,
        "warmup_steps": 0.1,  # as a share of them
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "seed": seed,
        "use_cpu": True,
    }


def prompts(photos: Photos, backbone: Any) -> dict[str, float]:
    """Mean IoU of test photos' masks, by how the one example was chosen from the pool."""
    encoder = VisionEncoder(backbone, image_size=SIDE, mean=MEAN, std=STD)
    model = VisualInContextModel.from_parts(FeatureMatching(encoder), embed=True)
    places = {"pool": photos.part("pool")[:EXAMPLES], "test": photos.part("test")[:QUERIES]}
    images = {name: [str(photos.files[place]) for place in some] for name, some in places.items()}
    masks = {name: [trimap(file) for file in some] for name, some in images.items()}
    truth = [np.asarray(Image.open(file)) == 1 for file in masks["test"]]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.from_dict({"image": images["pool"], "mask": masks["pool"]})
        options = {"foreground": 1, "cache_dir": folder, "progress": False}
        pool = ExamplePool.from_dataset(data, label_column="mask", encoder=encoder, **options)
        pipe = VisualInContextPipeline(model, "dense", pool)
        for strategy, name in STRATEGIES.items():
            said = [answer["prediction"] > 0 for answer in pipe(images["test"], strategy=strategy)]
            found[name] = float(np.mean([(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(said, truth)]))
    return found


def trimap(image: str) -> str:
    return str(DATA / "pets" / "trimaps" / f"{Path(image).stem}.png")


# ---- a row


@torch.no_grad()
def accuracy(model: Any, photos: Photos) -> float:
    places = torch.tensor(photos.part("test"))
    said = torch.cat([model.eval()(photos.pixels[part]).logits.argmax(1) for part in places.split(50)])
    return 100 * (said == photos.labels[places]).double().mean().item()


def fresh(encoder: str, seed: int) -> Any:
    transformers.set_seed(seed)
    return AutoModelForImageClassification.from_pretrained(encoder, num_labels=3, dtype=torch.float32)


def fit_head(model: Any, photos: Photos, rows: Dataset) -> None:
    """Fit the new head to the untouched encoder's features, so that training does not begin by destroying these."""
    heads, found = model.classifier, []
    watch = heads.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    with torch.no_grad():
        for part in torch.tensor(rows["place"]).split(50):
            model.eval()(photos.pixels[part])
    watch.remove()
    x, y = torch.cat(found), torch.tensor(rows["labels"])
    weight = torch.tensor(rows["weight"] if "weight" in rows.column_names else [1.0] * len(rows))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(HEAD_STEPS):
        optimizer.zero_grad()
        (weight * F.cross_entropy(heads(x), y, reduction="none")).mean().backward()
        optimizer.step()


def rows_of(photos: Photos, kind: str, encoder: str, seed: int) -> Dataset:
    pool = photos.rows("pool")
    if kind == "all":
        return pool
    if kind == "chosen":
        return choose(photos, fresh(encoder, seed).base_model.eval(), seed)
    return pool.select(np.random.default_rng([seed, 1]).permutation(len(pool))[: round(SHARE * len(pool))].tolist())


def cost(rows: int, kind: str, model: str) -> float:
    """MACs of training, in those of the whole model on the whole pool."""
    passes = rows + 3 * rows * EPOCHS + (SIZES["probes"] + SIZES["pool"] if kind == "chosen" else 0)
    if model == "smaller":
        passes += sum(SIZES[part] for part in CALIBRATION)
    return passes / (SIZES["pool"] * (1 + 3 * EPOCHS))


def one_row(options: Any, photos: Photos, kind: str, model: str, rate: float, seed: int) -> dict[str, Any]:
    if model == "untouched":
        return dict.fromkeys(SHARES, 1.0) | prompts(photos, fresh(options.encoder, seed).base_model)
    start = time.process_time()
    rows = rows_of(photos, kind, options.encoder, seed)
    with tempfile.TemporaryDirectory() as out:
        trained = TRAIN[model](photos, rows, begin(options, photos, rows, seed), rate, seed, out)
    seconds, said, report = time.process_time() - start, accuracy(trained, photos), get_report(trained)
    wrong = np.mean(photos.labels[rows["place"]].numpy() != np.array(rows["labels"]))
    facts = {"rows used": len(rows), "wrong": round(float(wrong), 3), "accuracy": said, "seconds": round(seconds, 1)}
    facts |= {"training": cost(len(rows), kind, model)} | sizes(fresh(options.encoder, seed), trained, report)
    return facts | ({} if seed == TUNED_ON else prompts(photos, trained.base_model))


def sizes(whole: Any, trained: Any, report: Mapping[str, Any] | None) -> dict[str, float]:
    """Shares of the whole model's; latencies side by side."""
    if report is None:
        return dict.fromkeys(SHARES, 1.0)
    found = {name: report[name]["ratio"] for name in ("params", "macs")}
    for rows in (1, 32):
        before, after = measure_latency([whole, trained], {"pixel_values": torch.randn(rows, 3, SIDE, SIDE)})
        found[f"latency {rows}"] = after / before
    return found


def run(options: Any, seed: int, file: RowFile) -> None:
    """All rows of one seed that are missing."""
    photos = None
    for kind, model, rate in wanted(options):
        key = {"rows": kind, "model": model, "rate": rate, "seed": seed}
        if file.key_of(key) not in file:
            photos = photos or read(seed)
            file.add(key | one_row(options, photos, kind, model, rate, seed) | machine(), hide=("platform",))


def wanted(options: Any) -> list[tuple[str | None, str, float | None]]:
    if options.tune:
        return [("by chance", model, rate) for model, rates in RATES.items() for rate in rates]
    trained = [(kind, model, CHOSEN_RATES[model]) for kind, model in ARMS if kind in options.rows]
    return [(None, "untouched", None), *trained]


# ---- the table


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Means over seeds; latencies, MACs and parameters as shares of the whole model's."""
    reported = [row for row in rows if row["seed"] != TUNED_ON]
    print(f"| rows | wrong labels, % | model | {' | '.join(HEADINGS.get(name, name) for name in MEASURES)} | seeds |")
    print("|---" * (4 + len(MEASURES)) + "|")
    for kind, model in [(None, "untouched"), *ARMS]:
        mine = [row for row in reported if (row["rows"], row["model"]) == (kind, model)]
        if not mine:
            continue
        texts = [cell([row[name] for row in mine if name in row], digits) for name, digits in MEASURES.items()]
        wrong = cell([100 * row["wrong"] for row in mine if "wrong" in row], 0)
        said = "-" if kind is None else f"{kind}, {mine[0]['rows used']}"
        print(f"| {said} | {wrong} | {model} | {' | '.join(texts)} | {len(mine)} |")
    tuned = [row for row in rows if row["seed"] == TUNED_ON]
    told = [f"{row['model']} {row['rate']:g}: {row['accuracy']:.1f}" for row in tuned]
    if told:
        print(f"\nlearning rates, accuracy on the photos of seed {TUNED_ON}: {', '.join(told)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "whole")
    parser.add_argument("--encoder", default=ENCODER, help="model id or folder; default: HF_EFFDL_DINOV2")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--tune", action="store_true", help=f"learning rates on seed {TUNED_ON}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    file = RowFile(options.out, ("rows", "model", "rate", "seed"))
    if options.table:
        return table(file.rows)
    for seed in [TUNED_ON] if options.tune else options.seeds:
        run(options, seed, file)
    table(file.rows)


if __name__ == "__main__":
    main()
