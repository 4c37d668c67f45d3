"""A small pool, for tests that start its making in processes of its own.

python pool_run.py CACHE OUT [SLEEP]    # SLEEP seconds pass with every batch; OUT gets what came of it
"""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Image
from leave import leave
from PIL import Image as PILImage
from torch import nn


class Encoder(nn.Module):
    """Features by a fixed projection of the pixels; what a `VisionEncoder` offers, in a millisecond."""

    def __init__(self, seed: int = 0, dim: int = 12, seconds: float = 0) -> None:
        super().__init__()
        self.image_size, self.dim, self.seed, self.seconds, self.rows = (8, 8), dim, seed, seconds, 0
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(3, dim, generator=generator))

    def describe(self) -> dict:
        return {
            "id": f"tests/encoder-{self.seed}",
            "revision": None,
            "layer": None,
            "image_size": list(self.image_size),
            "fingerprint": f"{self.seed:016d}",
        }

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        assert pixels.shape[1:] == (3, *self.image_size) and 0 <= pixels.min() <= pixels.max() <= 1
        time.sleep(self.seconds)
        self.rows += len(pixels)
        cells = nn.functional.adaptive_avg_pool2d(pixels - 0.5, 4).permute(0, 2, 3, 1)
        grid = torch.tanh(3 * cells @ self.weight)
        quarters = nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), 2).flatten(2).mT
        pooled = grid.mean((1, 2))
        vector = nn.functional.normalize(pooled, dim=1)
        return {"vector": vector, "tokens": torch.cat([pooled[:, None], quarters], 1), "grid": grid}


def encoded(image: PILImage.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(generator: np.random.Generator, size: tuple[int, int] = (20, 14)) -> PILImage.Image:
    coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return PILImage.fromarray(coarse).resize(size, PILImage.Resampling.BICUBIC)


def rows(count: int, seed: int = 0, kind: str = "JPEG") -> Dataset:
    """Images of one size, masks with the classes 0 to 3 and void, boxes, and two kinds of names."""
    generator = np.random.default_rng(seed)
    images = [encoded(picture(generator), kind) for _ in range(count)]
    masks = [generator.choice(np.array([0, 1, 2, 3, 255], dtype=np.uint8), (14, 20)) for _ in range(count)]
    corners = generator.integers(0, 7, (count, 4))
    return (
        Dataset.from_dict(
            {
                "image": [{"bytes": image, "path": None} for image in images],
                "label": [{"bytes": encoded(PILImage.fromarray(mask)), "path": None} for mask in masks],
                "box": (corners + [0, 0, 10, 7]).tolist(),
                "name": [f"{seed}/image {i}.jpg" for i in range(count)],
                "number": [1000 * seed + i for i in range(count)],
            }
        )
        .cast_column("image", Image())
        .cast_column("label", Image())
    )


def main() -> None:
    from hf_effdl.vicl.pool.pool import ExamplePool

    cache, out, seconds = [*sys.argv[1:], *["0"][len(sys.argv) - 3 :]]
    torch.set_num_threads(1)
    encoder = Encoder(seconds=float(seconds))
    pool = ExamplePool.from_dataset(
        rows(37), encoder=encoder, foreground="any", cache_dir=cache, rows_per_shard=5, batch_size=2, progress=False
    )
    said = {"manifest": pool.manifest, "folder": str(pool.folder), "encoded": encoder.rows, "length": len(pool)}
    Path(f"{out}.{PartialState().process_index}").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
    leave()
