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

"""Which photos `vicl_pets.py` asks with, and which it may learn from, as files: `splits/*.json`.

    python examples/benchmarks/make_splits.py                 # data folder: HF_EFFDL_DATA
    python examples/benchmarks/make_splits.py --pairs 40 --picture pairs.png    # look at the most similar photos

- `pets.json`: the six folds of seeds 0 to 2, of segmentation and colourisation (600 photos).
- `pets-detection.json`: seeds 0 to 9 (296 photos).

Ids are names of image files. Photos that are near duplicates of a query are taken out of its pool, where an answer
could be copied: cosine of the encoder's vectors of at least 0.9. Looked at as pictures, the ten most similar pairs,
down to 0.9015, are one photo twice, as another file or crop, or the next of a series; from 0.888 on down come other
photos of one animal in one place, among them two more such pairs (0.854 and 0.833), which stay. `vicl_pets.py`
takes its pools from these files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from vicl_pets import DATA, FOLDS, LAYER, PHOTOS, SEEDS, read_photos, say, splits

from hf_effdl import ExamplePool, VisionEncoder
from hf_effdl.vicl.held_out import Split, near_duplicates, write_splits


FOLDER = Path(__file__).parent / "splits"
FILES = {"pets": "segmentation", "pets-detection": "detection"}
THRESHOLD = 0.9


def photos_of(task: str) -> tuple[list[str], Tensor]:
    """Names of the photos of a task, and what the encoder makes of them."""
    encoder = VisionEncoder.from_pretrained(str(DATA / "weights" / "mobilenet_v2_1.0_224"), layer=LAYER)
    data = read_photos(task, PHOTOS)
    pool = ExamplePool.from_dataset(
        data,
        encoder=encoder,
        task=task,
        foreground=1 if task == "segmentation" else None,
        cache_dir=Path("runs/benchmarks/vicl_pets/pools"),
        progress=False,
    )
    return [Path(file).name for file in data["image"]], pool.vectors


def folds_of(task: str, names: Sequence[str], vectors: Tensor, threshold: float = THRESHOLD) -> dict[str, Split]:
    """Every fold of every seed by name, its pool without near duplicates of its queries."""
    found = {}
    for seed in range(SEEDS[task]):
        for fold, (queries, pool) in enumerate(splits(task, len(names), seed, FOLDS)):
            copies = set(near_duplicates(vectors, torch.from_numpy(queries), threshold).tolist())
            name = f"seed {seed}" if task == "detection" else f"seed {seed}, fold {fold}"
            found[name] = Split(
                queries=tuple(names[row] for row in queries),
                pool=tuple(names[row] for row in pool if row not in copies),
                dropped=tuple(names[row] for row in pool if row in copies),
            )
    return found


def most_similar(vectors: Tensor, count: int) -> list[tuple[float, int, int]]:
    """Cosine and rows of the most similar pairs."""
    unit = F.normalize(vectors, dim=1)
    cosines, places = (unit @ unit.T).triu(1).flatten().topk(count)
    return [(value, *divmod(place, len(vectors))) for value, place in zip(cosines.tolist(), places.tolist())]


def draw_pairs(names: Sequence[str], vectors: Tensor, count: int, file: Path, side: int = 150) -> None:
    """The most similar pairs side by side, with their cosines."""
    pairs, width, height = most_similar(vectors, count), 2 * side + 14, side + 16
    canvas = Image.new("RGB", (5 * width, -(-count // 5) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (value, *rows) in enumerate(pairs):
        x, y = number % 5 * width, number // 5 * height
        draw.text((x, y), f"{value:.4f}", fill="black")
        for place, row in enumerate(rows):
            photo = Image.open(DATA / "pets" / "images" / names[row]).convert("RGB").resize((side, side))
            canvas.paste(photo, (x + place * (side + 2), y + 12))
    canvas.save(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files")
    parser.add_argument("--pairs", type=int, default=0, help="only list this many of the most similar pairs")
    parser.add_argument("--picture", type=Path, help="and draw them into this file")
    options = parser.parse_args(arguments)
    for file, task in FILES.items():
        names, vectors = photos_of(task)
        if options.pairs:
            for value, one, other in most_similar(vectors, options.pairs):
                print(f"{value:.4f} {names[one]} {names[other]}")
            if options.picture:
                draw_pairs(names, vectors, options.pairs, options.picture)
            return
        found = folds_of(task, names, vectors)
        write_splits(options.out / f"{file}.json", found)
        dropped = [len(split.dropped) for split in found.values()]
        say(
            f"{file}: {len(found)} splits of {len(names)} photos, {min(dropped)} to {max(dropped)} near duplicates "
            f"taken out of a pool, {sum(dropped)} in all"
        )


if __name__ == "__main__":
    main()
