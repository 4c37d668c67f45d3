"""A sparse path as one safetensors file: its tensors, and the rest as JSON among the metadata, under one digest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from hf_effdl.files import damaged, digest, read_whole
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.record import groups_of, listed, named, number, require, ties_of, whole
from hf_effdl.structure.optim.checks import STARTS


FORMAT = 2  # from which on there is a digest
REMEDY = "save it again from its run, or take that of another checkpoint"
KINDS = {
    "entered": torch.int32,
    "left": torch.int32,
    "threshold": torch.float32,
    "dual": torch.float32,
    "weight": torch.float32,
    "gradient": torch.float32,
}
OPTIONAL = ("gradient",)


def pack_path(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file."""
    text = json.dumps({**meta, "format": FORMAT})
    return save(dict(tensors), metadata={"sparse_path": text, "sha256": _digest(text, tensors)})


def unpack_path(file: Path) -> dict[str, Any]:
    """The arguments of the `SparsePath` in a file; those of 0.1.0 have no digest and are taken.

    Raises:
        ValueError: it is not what was written, or says what no path can be.
    """
    content = read_whole(file)
    try:
        tensors, header = load(content), _header(content)
        text = header["sparse_path"]
        meta = json.loads(text)
    except Exception as error:  # safetensors' own errors have no common class; JSON may be nested without end
        raise damaged(file, f"{type(error).__name__}: {error}"[:200], REMEDY) from error
    try:
        if "format" in named(meta, "sparse_path"):
            known = header.get("sha256") == _digest(text, tensors)
            require(known and meta["format"] == FORMAT, "sha256", "is not the digest of the others")
        return _checked(meta, tensors)
    except (KeyError, ValueError) as error:
        why = str(error) if isinstance(error, ValueError) else f"it has no entry {error}"
        raise damaged(file, why, REMEDY) from error


def _header(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    pieces = [text.encode()]
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        pieces.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest(pieces)


def _checked(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    groups = groups_of(meta)
    step = whole(meta["step"], "step", 0)
    units = {group.name: _units_of(group, tensors, step) for group in groups if group.lifted}
    curve = [
        {name: number(value, "curve") for name, value in named(point, "curve").items()}
        for point in listed(meta["curve"], "curve")
    ]
    start = meta.get("start", "empty")  # those of 0.1.0 have none
    require(start in STARTS, "start", f"is not one of {STARTS}")
    ties = ties_of(meta["ties"], groups)
    return {"groups": groups, "units": units, "step": step, "ties": ties, "curve": curve, "start": start}


def _units_of(group: Group, tensors: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    units = {}
    for key, kind in KINDS.items():
        name = f"{group.name}|{key}"
        if key in OPTIONAL and name not in tensors:
            continue
        require(name in tensors, name, "is missing")
        tensor = tensors[name]
        require(
            tensor.dtype == kind and tensor.shape == (group.units,),
            name,
            f"is {tensor.dtype} of shape {tuple(tensor.shape)}, not {kind} of {(group.units,)}",
        )
        require(bool(tensor.isfinite().all()), name, "holds NaN or infinities")
        units[key] = tensor.long() if kind == torch.int32 else tensor
    for key in ("entered", "left"):
        inside = bool(((units[key] >= -1) & (units[key] <= step)).all())
        require(inside, f"{group.name}|{key}", f"names steps outside the {step} of the run")
    return units
