"""Who of several processes writes, and how a text file comes into being: whole, on the disk, or not at all."""

import os
import tempfile
from pathlib import Path

import torch


def is_first() -> bool:
    """Whether this is the only process or the first of several."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def write_text(target: Path, text: str) -> Path:
    """Write a file of UTF-8; a file that was there before stays as it was where that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder) / target.name
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    return target
