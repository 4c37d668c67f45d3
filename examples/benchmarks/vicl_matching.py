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

"""What feature matching gains from several layers, matching both ways, and features without directions of position.

Masks are carried over from one example: the nearest of the pool, and the best of the 50 nearest. Photos of pets and
scenes of digits (`examples/digit_scenes.py`) at 224 x 224, answers scored by IoU at 56 x 56. Encoders: an ImageNet
MobileNetV2 (data folder: HF_EFFDL_DATA; 60 photos and a pool of 240, 40 scenes and a pool of 120) and a DINOv2-small
in a folder of your own (`--dinov2`; 40 and 110, 30 and 90). Layers and the number of directions were chosen on another
split of the photos and on scenes of another seed.

    python examples/benchmarks/vicl_matching.py --dinov2 FOLDER      # 25 minutes on one thread
    python examples/benchmarks/vicl_matching.py --table

Rows go to `--out` as one JSON line per (data, encoder, seed, arm); rows already there are skipped. Feature maps are
kept in `--cache`.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import RowFile, machine, parser_of
from torch import Tensor
from vicl_pets import DATA, read_photos

from hf_effdl import FeatureMatching, VisionEncoder
from hf_effdl.vicl.remote_code.images import pixels, to_rgb
from hf_effdl.vicl.remote_code.visual_tasks import Segmentation


sys.path.insert(0, str(Path(__file__).parents[1]))
from digit_scenes import make_scenes  # noqa: E402


SIZE, SMALL, CANDIDATES, SEEDS = 224, 56, 50, 3
# queries and pool, and which share of the photos they are; fewer for the larger encoder
PETS = {"MobileNetV2": (60, 240, 2), "DINOv2-small": (40, 110, 4)}
DIGITS = {"MobileNetV2": (40, 120), "DINOv2-small": (30, 90)}
# the layer of the plain arm, several, and how many directions of position are taken out
ENCODERS = {"MobileNetV2": (11, (8, 11), 8), "DINOv2-small": (None, (6, 9, None), 16)}
ARMS = {
    "soft": {},
    "soft, positions out": {"positions": True},
    "soft, several layers": {"layers": True},
    "mutual": {"matching": "mutual"},
    "mutual, several layers": {"matching": "mutual", "layers": True},
    "mutual, several layers, positions out": {"matching": "mutual", "layers": True, "positions": True},
}


class Data:
    """Images as an encoder sees them: vectors, maps of some layers in half precision, and small labels."""

    def __init__(self, name: str, of: str, encoder: VisionEncoder, seed: int, file: Path) -> None:
        if not file.is_file():
            images, masks = read(name, of, seed)
            torch.save(encoded(images, masks, encoder, kept_layers(of)), file)
        self.vectors, self.labels, self.maps = torch.load(file, weights_only=True)


def read(name: str, of: str, seed: int) -> tuple[list[Image.Image], list]:
    """All photos that are used, or the scenes of a seed: the pool's first."""
    if name == "pets":
        photos = read_photos("segmentation", 600)[:: PETS[of][2]]
        return [to_rgb(image) for image in photos["image"]], list(photos["label"])
    queries, pool = DIGITS[of]
    scenes = make_scenes(pool, "train", "segmentation", seed) + make_scenes(queries, "test", "segmentation", seed)
    return [to_rgb(scene["image"]) for scene in scenes], [scene["mask"] for scene in scenes]


def encoded(images: list, masks: list, encoder: VisionEncoder, layers: Sequence[int | None]) -> tuple:
    task, vectors, labels, maps = Segmentation(1), [], [], []
    for start in range(0, len(images), 20):
        part = images[start : start + 20]
        seen = pixels(part, encoder.image_size, encoder.resample)
        vectors.append(encoder(seen)["vector"])
        maps.append([one.half() for one in encoder.maps(seen, layers)])
        drawn = [task.label(*pair) for pair in zip(masks[start : start + 20], part)]
        labels.append(pixels(drawn, (SMALL, SMALL), Image.Resampling.BOX))
    return torch.cat(vectors), torch.cat(labels), [torch.cat(parts) for parts in zip(*maps)]


def split(name: str, of: str, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and pool."""
    if name == "digits":
        queries, pool = DIGITS[of]
        return torch.arange(pool, pool + queries), torch.arange(pool)
    queries, pool, _ = PETS[of]
    order = torch.from_numpy(np.random.RandomState(seed).permutation(queries + pool))
    return order[:queries], order[-pool:]


def scores(data: Data, model: FeatureMatching, at: Sequence[int], queries: Tensor, pool: Tensor) -> Tensor:
    """`(queries, 50)` IoU with each of the nearest examples."""
    features = model.features([data.maps[place].float() for place in at])
    near = (data.vectors[queries] @ data.vectors[pool].T).topk(CANDIDATES, 1).indices
    found = []
    for query, rows in zip(queries, pool[near]):
        asked = features[query].expand(CANDIDATES, -1)
        painted = model.predict(asked, features[rows][:, None], data.labels[rows][:, None])
        found.append(Segmentation().score(painted, data.labels[query].expand_as(painted)))
    return torch.stack(found)


def arm_of(encoder: VisionEncoder, name: str, arm: str) -> tuple[FeatureMatching, list[int]]:
    """The frozen model, and places of its layers among those that are kept."""
    plain, several, directions = ENCODERS[name]
    options = dict(ARMS[arm])
    layers = several if options.pop("layers", False) else (plain,)
    positions = directions if options.pop("positions", False) else 0
    kept = kept_layers(name)
    return FeatureMatching(encoder, layers=layers, positions=positions, **options), [kept.index(one) for one in layers]


def kept_layers(name: str) -> list[int | None]:
    plain, several, _ = ENCODERS[name]
    return list(dict.fromkeys((plain, *several)))


def rows_of(data: Data, encoder: VisionEncoder, of: dict) -> list[dict]:
    """A row for each arm, with its lead over the first one, paired by query."""
    queries, pool = split(of["data"], of["encoder"], of["seed"])
    found, first = [], None
    for arm in ARMS:
        start = time.perf_counter()
        each = scores(data, *arm_of(encoder, of["encoder"], arm), queries, pool)
        values = {"nearest": each[:, 0], "oracle": each.amax(1), "random": each.mean(1)}
        first = first or values
        row = {**of, "arm": arm, "queries": len(queries), "pool": len(pool)}
        for name, value in values.items():
            lead = value - first[name]
            row[name] = round(float(value.mean()), 5)
            row[f"{name} ahead"] = [round(float(lead.mean()), 5), round(float(lead.std() / len(lead) ** 0.5), 5)]
        found.append(row | {"seconds": round(time.perf_counter() - start, 1)} | machine())
    return found


def print_table(rows: list[dict]) -> None:
    """Means over seeds, and in brackets the lead over plain soft matching with its standard error."""
    for said in sorted({(row["date"], row["torch"], row["platform"], row["cpus"]) for row in rows}):
        print(f"measured on {said[0]}, torch {said[1]}, {said[2]}, {said[3]} CPUs")
    seeds = sorted({row["seed"] for row in rows})
    print(f"mean IoU over seeds {', '.join(map(str, seeds))} (ahead of soft, in points, +- paired standard error)\n")
    print("| data | encoder | matching | nearest | best of 50 |\n|---|---|---|---|---|")
    for key in dict.fromkeys((row["data"], row["encoder"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["data"], row["encoder"], row["arm"]) == key]
        cells = [cell(mine, name) for name in ("nearest", "oracle")]
        print(f"| {' | '.join((*key, *cells))} |")


def cell(rows: list[dict], name: str) -> str:
    mean = sum(row[name] for row in rows) / len(rows)
    if rows[0]["arm"] == next(iter(ARMS)):
        return f"{mean:.3f}"
    lead = sum(row[f"{name} ahead"][0] for row in rows) / len(rows)
    error = sum(row[f"{name} ahead"][1] ** 2 for row in rows) ** 0.5 / len(rows)
    return f"{mean:.3f} ({100 * lead:+.1f} ± {100 * error:.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "vicl_matching")
    parser.add_argument("--dinov2", type=Path, help="folder of a DINOv2-small; default: only MobileNetV2")
    parser.add_argument("--data", nargs="+", choices=("pets", "digits"), default=["pets", "digits"])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/vicl_matching"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("data", "encoder", "seed"))
    folders = {"MobileNetV2": DATA / "weights" / "mobilenet_v2_1.0_224", "DINOv2-small": options.dinov2}
    if options.table:
        return print_table(file.rows)
    options.cache.mkdir(parents=True, exist_ok=True)
    for name, folder in folders.items():
        if folder is None:
            continue
        encoder = VisionEncoder.from_pretrained(str(folder), image_size=SIZE)
        for data in options.data:
            for seed in range(options.seeds):
                if (data, name, seed) in file:
                    continue
                kept = options.cache / f"{name}-{data}{'' if data == 'pets' else f'-{seed}'}.pt"
                photos = Data(data, name, encoder, seed, kept)
                file.add(*rows_of(photos, encoder, {"data": data, "encoder": name, "seed": seed}), hide=("platform",))
    print_table(file.rows)


if __name__ == "__main__":
    main()
