"""What a pool's files must be like: they may come from anybody, so every value is looked at when they are opened."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


FORMAT = 1
NAME = r"pool-[0-9]{5,}-[0-9a-f]{12}"
TASKS = ("segmentation", "detection", "colourisation", "image-to-image")
# readers of Pillow for the files that pools hold; that of JPEG takes the MPO of many phones too
IMAGES, MASKS = ("JPEG", "PNG", "WEBP"), ("PNG",)
MANIFEST_BYTES, WIDEST, LARGEST_SIDE = 2**28, 2**16, 2**14
# how far a vector's norm may be from 1, which it was within in float32
OFF = 2e-3
ROWS = 2**14
HEX = r"[0-9a-f]{64}"


def _whole(value: Any, least: int = 0, most: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _text(value: Any, pattern: str = r"(?s).*") -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _named(value: Any) -> bool:
    return value is None or _text(value)


def _places(value: Any, rows: int) -> bool:
    """Whether it lists some of so many rows, each once."""
    if not isinstance(value, list) or not all(_whole(one, 0, rows - 1) for one in value):
        return False
    return len(set(value)) == len(value)


def _side(value: Any) -> bool:
    return _whole(value, 1, LARGEST_SIDE)


def _sides(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_side, value))


def _values(value: Any) -> bool:
    several = isinstance(value, list) and len(value) > 0 and all(map(_whole, value))
    return value is None or value == "any" or several


Fields = dict[str, Callable[[Any], bool]]
MANIFEST_FIELDS: Fields = {
    "format": lambda value: _whole(value, 1),
    "task": lambda value: value in TASKS,
    "fingerprint": _text,
    "encoder": lambda value: isinstance(value, dict),
    "shards": lambda value: isinstance(value, list),
    "settings": lambda value: isinstance(value, dict),
    "seen": _whole,
    "dim": lambda value: _whole(value, 1, WIDEST),
}
ENCODER_FIELDS: Fields = {"fingerprint": _text}
# where they are given
ENCODER_OPTIONS: Fields = {
    "id": _named,
    "revision": _named,
    "layer": lambda value: value is None or (type(value) is int and abs(value) < 1000),
    "image_size": lambda value: value is None or _sides(value),
}
SETTINGS: Fields = {
    "foreground": _values,
    "void": lambda value: value is None or _whole(value),
    "boxes": lambda value: value in ("xyxy", "xywh"),
}
SHARD_FIELDS: Fields = {
    "name": lambda value: _text(value, NAME),  # it becomes a path
    "rows": lambda value: _whole(value, 1, 2**31),
    "tar_bytes": _whole,
    "index_bytes": _whole,
    "tar_sha256": lambda value: _text(value, HEX),
    "index_sha256": lambda value: _text(value, HEX),
    "dropped": lambda value: isinstance(value, list),
    "blank": lambda value: isinstance(value, list),
    "skipped": lambda value: isinstance(value, list),
    "formats": lambda value: isinstance(value, list) and all(map(_text, value)),
}


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value)) and all(map(_whole, value.values()))


MASK_FIELDS: Fields = {
    "kinds": _counts,
    "values": lambda value: _counts(value) and all(key.isdigit() for key in value),
    "soft": lambda value: isinstance(value, int | float) and 0 <= value < 2**62,
    "thresholds": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "masks": _whole,
    "full": _whole,
}
MASK_OPTIONS: Fields = {"grey": _whole}


def _check(what: str, values: Any, fields: Fields, optional: bool = False) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is a {type(values).__name__}")
    for name, fits in fields.items():
        if name not in values and optional:
            continue
        if name not in values:
            raise ValueError(f"{what} has no {name!r}")
        if not fits(values[name]):
            raise ValueError(f"{what} has {name}={str(values[name])[:80]!r}")


def check_manifest(manifest: Any) -> None:
    """Refuse a manifest that no pool has.

    Raises:
        ValueError: saying which value it is.
    """
    if isinstance(manifest, dict) and _whole(manifest.get("format"), FORMAT + 1):
        raise ValueError(
            f"its format is {manifest['format']} and this version of hf_effdl reads {FORMAT}; install a newer one"
        )
    _check("it", manifest, MANIFEST_FIELDS)
    if not manifest["shards"]:
        raise ValueError("it names no shards")
    _check("its encoder", manifest["encoder"], ENCODER_FIELDS)
    _check("its encoder", manifest["encoder"], ENCODER_OPTIONS, optional=True)
    _check("its settings", manifest["settings"], SETTINGS, optional=True)
    for entry in manifest["shards"]:
        check_entry(entry)
    names = [entry["name"] for entry in manifest["shards"]]
    if len(set(names)) < len(names):
        raise ValueError("it names a shard twice")


def check_entry(entry: Any) -> None:
    """Refuse what a manifest cannot say of a shard.

    Raises:
        ValueError: saying which value it is.
    """
    _check("a shard", entry, SHARD_FIELDS)
    if "masks" in entry:
        what = f"the shard {entry['name']}, of its masks,"
        _check(what, entry["masks"], MASK_FIELDS)
        _check(what, entry["masks"], MASK_OPTIONS, optional=True)
    for name in ("dropped", "blank"):
        if not _places(entry[name], entry["rows"]):
            raise ValueError(f"the shard {entry['name']} has {name}={str(entry[name])[:80]}")


def check_index(tensors: dict[str, Tensor], ids: Any, rows: int, width: int, tar_bytes: int) -> None:
    """Refuse an index of other tables than those of so many rows; their values are looked at by `check_values`.

    Raises:
        ValueError: saying which table it is.
    """
    shapes: dict[str, tuple[torch.dtype, Sequence[int | None]]] = {
        "vectors": (torch.float32, (rows, width)),
        "tokens": (torch.float16, (rows, 5, width)),
        "spans": (torch.int64, (rows, 2, 2)),
        "digests": (torch.uint8, (rows, 32)),
        "grids": (torch.float16, (rows, None, None, None)),
    }
    for name, (dtype, shape) in shapes.items():
        if name == "grids" and name not in tensors:
            continue
        table = tensors[name]
        fits = table.dim() == len(shape) and all(want in (None, size) for want, size in zip(shape, table.shape))
        if table.dtype != dtype or not fits:
            raise ValueError(f"{name} is {table.dtype} of shape {tuple(table.shape)}")
    if not isinstance(ids, list) or len(ids) != rows or not all(isinstance(id, str) for id in ids):
        raise ValueError(f"its ids are not {rows} texts")
    start, size = tensors["spans"].unbind(2)
    # not their sum, which may be more than an integer holds
    if (start < 0).any() or (size < 0).any() or (start > tar_bytes).any() or (size > tar_bytes - start).any():
        raise ValueError(f"its spans reach out of the {tar_bytes:,} bytes of the tar")


def check_values(tables: dict[str, Tensor | None]) -> None:
    """Refuse features that no encoder gives.

    Raises:
        ValueError: for vectors without norm 1, and values that are NaN or infinite.
    """
    for name, table in tables.items():
        for part in () if table is None else table.split(ROWS):
            if not part.isfinite().all():
                raise ValueError(f"{name} hold NaN or infinite values")
            if name == "vectors" and ((norms := part.norm(dim=1)) - 1).abs().max() > OFF:
                raise ValueError(f"vectors have norms {norms.min():.4g}..{norms.max():.4g} and not 1")


def check_box(box: Any) -> list[float] | None:
    """A stored box.

    Raises:
        ValueError: for what is neither four finite numbers nor None.
    """
    if box is None:
        return None
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(isinstance(one, int | float) and abs(one) < 1e9 for one in box):  # NaN is not below
        raise ValueError(f"its box is {str(box)[:80]}")
    return box


def read_columns(stored: Tensor | None, rows: int) -> dict[str, list[str | None]]:
    """What else an index says of its rows.

    Raises:
        ValueError: for what is not a text or None for each row.
    """
    columns = {} if stored is None else json.loads(stored.numpy().tobytes())
    if not isinstance(columns, dict) or not columns.keys() <= {"group", "class"}:
        raise ValueError("its columns are none of a pool")
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != rows or not all(map(_named, values)):
            raise ValueError(f"its column {name!r} is not {rows} texts")
    return columns
