# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""A vision encoder made smaller without a training step: how near its features stay to those of the whole one.

DINOv2-small on photos of pets (Oxford-IIIT Pet, three breeds, at 224 x 224). Every layer keeps the same number of its
1536 FFN neurons. A permutation of the photos gives calibration and test photos, other ones. Units stay by chance,
norm, activation or OBS (Fisher's score needs a loss, and there is none); the same units stand once with the next
layers as they are and once with them refitted by least squares (`slim(..., calibration=)`). With `--widths free` all
layers together keep that number, more where the outputs miss them most. Measured on the test
photos: the cosine of the class token's and of the patches' features to the whole encoder's, their relative error
`|f - f'| / |f|`, the breed of the nearest other test photo by the class token, and masks by example: the encoder as
the frozen model of visual prompts (`FeatureMatching`), shown the nearest other test photo by its mean patch, or the
best of the ten nearest.

    python examples/benchmarks/pretrained_dinov2.py --encoder facebook/dinov2-small
    python examples/benchmarks/pretrained_dinov2.py --encoder FOLDER --rows 64 --seeds 0
    python examples/benchmarks/pretrained_dinov2.py --table

Photos are looked for in `pets/images` under HF_EFFDL_DATA; `--encoder` (or HF_EFFDL_DINOV2) is a model id or a folder.
Rows go to `--out` as one JSON line per (kept, arm, refit, rows, seed, widths); rows already there are
skipped.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pretrained_arms import REFITS, SCORES, cell, cosines, sized, smaller
from rows import RowFile, machine, parser_of
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

from hf_effdl import FeatureMatching, VisionEncoder, find_groups


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
ENCODER = os.environ.get("HF_EFFDL_DINOV2", "facebook/dinov2-small")
ARMS = tuple(score for score in SCORES if score != "fisher")
KEPT = (0.5,)
TEST, BATCH = 150, 16
MEASURES = {"cosine CLS": 3, "cosine patch": 3, "error": 3, "breed": 1, "IoU nearest": 3, "IoU best": 3, "seconds": 0}
CHOICE, SIDE, FOREGROUND = 10, 56, 1  # examples to choose from; of masks; its value in a trimap


@dataclass(frozen=True)
class Photos:
    """Pixels as the encoder takes them, and breeds.

    Args:
        calibration: batches of pixels.
        test: batches of pixels.
        breeds: of the test photos.
        masks: of the test photos, `(photos, 3, SIDE, SIDE)`, 0 and 1.
    """

    calibration: list[Tensor]
    test: list[Tensor]
    breeds: Tensor
    masks: Tensor


def read(encoder: str, rows: int, test: int, seed: int) -> Photos:
    """Photos of a permutation: the first calibrate, the last are the test."""
    folder = DATA / "pets" / "images"
    files = sorted(folder.glob("*.jpg"))
    if len(files) < rows + test:
        raise SystemExit(f"{len(files)} photos in {folder}, and {rows + test} are needed: set HF_EFFDL_DATA")
    processor = AutoImageProcessor.from_pretrained(encoder)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [files[i] for i in order[:rows] + order[-test:]]
    names = sorted({_breed(file) for file in files})
    pixels = processor([Image.open(file).convert("RGB") for file in chosen], return_tensors="pt")["pixel_values"]
    breeds = torch.tensor([names.index(_breed(file)) for file in chosen[rows:]])
    masks = torch.stack([_mask(DATA / "pets" / "trimaps" / f"{file.stem}.png") for file in chosen[rows:]])
    return Photos(list(pixels[:rows].split(BATCH)), list(pixels[rows:].split(BATCH)), breeds, masks)


def _mask(file: Path) -> Tensor:
    trimap = np.asarray(Image.open(file).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    return torch.from_numpy(trimap == FOREGROUND).float().expand(3, SIDE, SIDE)


def _breed(file: Path) -> str:
    return file.stem.rpartition("_")[0]


@torch.no_grad()
def features(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Of all tokens, the class token first: `(photos, tokens, channels)`."""
    return torch.cat([model(pixel_values=batch).last_hidden_state for batch in batches])


def measures(found: Tensor, whole: Tensor, breeds: Tensor) -> dict[str, float]:
    """How far features moved, and percent of photos whose nearest other photo is of their breed."""
    cls = nn.functional.normalize(found[:, 0], dim=1)
    near = (cls @ cls.T).fill_diagonal_(-1).argmax(1)
    return {
        "cosine CLS": cosines(found[:, :1], whole[:, :1]),
        "cosine patch": cosines(found[:, 1:], whole[:, 1:]),
        "error": ((found - whole).norm() / whole.norm()).item(),
        "breed": 100 * (breeds[near] == breeds).double().mean().item(),
    }


@torch.no_grad()
def by_example(model: nn.Module, found: Tensor, masks: Tensor, side: int) -> dict[str, float]:
    """Mean IoU of masks that another photo's mask gives: the nearest one's, and the best of the nearest few."""
    matching = FeatureMatching(VisionEncoder(model, image_size=side))
    cells = nn.functional.normalize(found[:, 1:], dim=2)
    mean = nn.functional.normalize(cells.mean(1), dim=1)
    nearest = (mean @ mean.T).fill_diagonal_(-1).topk(CHOICE).indices.T
    rows, truth, found_iou = cells.flatten(1), masks[:, 0] > 0.5, []
    for chosen in nearest:
        said = matching.predict(rows, rows[chosen][:, None], masks[chosen][:, None])[:, 0] > 0.5
        found_iou.append((said & truth).sum((1, 2)) / (said | truth).sum((1, 2)).clamp_min(1))
    iou = torch.stack(found_iou)
    return {"IoU nearest": iou[0].mean().item(), "IoU best": iou.max(0).values.mean().item()}


def run(options, seed: int, file: RowFile) -> None:
    """All rows of one seed that are missing."""
    free = "free" if options.widths == "free" else None  # rows of equal widths do not say so
    missing = [
        (share, score)
        for share in options.kept
        for score in options.arms
        if any((share, score, refit, options.rows, seed, free) not in file for refit in REFITS)
    ]
    if not missing:
        return
    model = AutoModel.from_pretrained(options.encoder).eval()
    photos = read(options.encoder, options.rows, options.test, seed)
    start = time.process_time()
    found = find_groups(model, {"pixel_values": photos.test[0][:1]})
    groups = sized(found, _neurons(model))
    others = [group for group in found if group not in groups]
    looking = time.process_time() - start
    whole, side = features(model, photos.test), photos.test[0].shape[-1]
    key = {"kept": 1.0, "arm": "dense", "refit": None, "rows": options.rows, "seed": seed}
    if file.key_of(key) not in file:
        said = measures(whole, whole, photos.breeds) | by_example(model, whole, photos.masks, side)
        file.add(key | said | {"seconds": looking} | machine(), hide=("platform",))
    for share, score in missing:
        start = time.process_time()
        pair = list(
            smaller(model, groups, share, score, photos.calibration, seed, others=others, widths=options.widths)
        )
        seconds = round(looking + time.process_time() - start, 1)  # finding the groups belongs to it
        for small in pair:
            row = {"kept": share, "arm": score, "refit": small.refit, "rows": options.rows, "seed": seed}
            row |= {"widths": free} if free else {}
            if file.key_of(row) not in file:
                small_features = features(small.model, photos.test)
                said = measures(small_features, whole, photos.breeds)
                said |= by_example(small.model, small_features, photos.masks, side) | {"seconds": seconds}
                file.add(row | said | small.facts, hide=())


def _neurons(model: nn.Module) -> int:
    return model.config.hidden_size * model.config.mlp_ratio


def table(rows: list[dict]) -> None:
    """Means over seeds; seconds are the processor's, of looking for groups, choosing and refitting."""
    dense = [row for row in rows if row["arm"] == "dense"]
    texts = [cell(_values(dense, name), MEASURES[name]) for name in ("breed", "IoU nearest", "IoU best")]
    print("whole encoder: breed of the nearest {} %, IoU by the nearest {}, by the best of ten {}\n".format(*texts))
    print(f"| FFN kept | calibration photos | units by | refitted | {' | '.join(MEASURES)} | seeds |")
    print("|---" * (5 + len(MEASURES)) + "|")
    keys = [key_of(row) for row in rows if row["arm"] != "dense"]
    for key in sorted(dict.fromkeys(keys), key=lambda key: (-key[0], key[1], ARMS.index(key[2]), key[3], key[4])):
        mine = [row for row in rows if key_of(row) == key]
        texts = [cell(_values(mine, name), digits) for name, digits in MEASURES.items()]
        told = f"{key[0]:.0%} | {key[1]} | {key[2]}{key[4]} | {'yes' if key[3] else 'no'}"
        print(f"| {told} | {' | '.join(texts)} | {len(mine)} |")


def key_of(row: dict) -> tuple:
    """What the lines of the table are of; the last is how widths are chosen, where they are not equal."""
    return row["kept"], row["rows"], row["arm"], row["refit"], ", free widths" if row.get("widths") == "free" else ""


def _values(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "pretrained_dinov2")
    parser.add_argument("--encoder", default=ENCODER, help="model id or folder; default: HF_EFFDL_DINOV2")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rows", type=int, default=64, help="calibration photos")
    parser.add_argument("--test", type=int, default=TEST, help="test photos")
    parser.add_argument("--widths", choices=("stock", "free"), default="stock", help="equal in all layers, or not")
    options = parser.parse_args(arguments)
    if options.widths == "free" and "random" in options.arms:
        parser.error("--widths free goes by a score: leave random out of --arms")
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("kept", "arm", "refit", "rows", "seed", "widths"))
    if options.table:
        return table(file.rows)
    for seed in options.seeds:
        run(options, seed, file)
    table(file.rows)


if __name__ == "__main__":
    main()
