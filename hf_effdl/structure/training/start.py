"""A small net at its start, in a file: what a run that was killed since then goes on from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast
from torch import Tensor, nn

from hf_effdl.files import damaged, parsed, read_sealed, sealed, write_whole
from hf_effdl.structure.training.evaluation import WRAPPERS


FILE_NAME = "start.safetensors"
REMEDY = "remove the folder and train from the start"


@dataclass(frozen=True)
class Start:
    """What `train_small` has in hand once the units are cut.

    Args:
        dense: weights and buffers of the dense net where its search stopped.
        small: those of the small net.
        facts: plain values: the settings that decided them, units by group, report, accuracies.
    """

    dense: Mapping[str, Tensor]
    small: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write it, whole or not at all."""
        tensors = {f"{part}|{name}": t for part in ("dense", "small") for name, t in getattr(self, part).items()}
        write_whole(Path(folder) / FILE_NAME, sealed(tensors, {"facts": json.dumps(self.facts)}))

    @classmethod
    def load(cls, folder: str | Path) -> "Start":
        """What was saved; raises ValueError for a file that is not what was written."""
        file = Path(folder) / FILE_NAME
        tensors, notes = read_sealed(file, REMEDY)
        if not notes or "facts" not in notes:
            raise damaged(file, "it does not say what it is of", REMEDY)
        parts: dict[str, dict[str, Tensor]] = {"dense": {}, "small": {}}
        try:
            for name, tensor in tensors.items():
                part, _, inner = name.partition("|")
                parts[part][inner] = tensor
            return cls(**parts, facts=parsed(notes["facts"]))
        except (KeyError, ValueError) as error:
            raise damaged(file, f"{type(error).__name__}: {error}", REMEDY) from error


def read_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict on the CPU, under plain names, the same on every process."""
    copies = {WRAPPERS.sub("", name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    buffers = {WRAPPERS.sub("", name) for name, _ in model.named_buffers()}
    # every process has its own batch statistics; the first one's are those that checkpoints hold
    copies |= broadcast({name: tensor for name, tensor in copies.items() if name in buffers})
    return {name: tensor.cpu().contiguous() for name, tensor in copies.items()}
