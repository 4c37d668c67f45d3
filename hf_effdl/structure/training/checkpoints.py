"""Which checkpoint a run goes on from."""

from pathlib import Path
from zipfile import is_zipfile

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_effdl.files import read_json


def last_complete_checkpoint(folder: str, processes: int = 1) -> str:
    """The newest checkpoint whose saving was not cut off.

    Trainer writes its state after everything else, so a checkpoint is complete once that file reads.

    Raises:
        ValueError: if there is none.
    """
    checkpoints = sorted(
        Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    for checkpoint in checkpoints:
        try:
            read_json(checkpoint / "trainer_state.json")
        except (FileNotFoundError, ValueError):
            continue
        # each process writes its random states itself, maybe later than that: whole once the archive has its end
        if processes == 1 or all(is_zipfile(checkpoint / f"rng_state_{rank}.pth") for rank in range(processes)):
            return str(checkpoint)
    raise ValueError(
        f"no complete checkpoint in {folder} ({len(checkpoints)} begun); train without resume_from_checkpoint"
    )


def has_checkpoints(folder: str | Path) -> bool:
    """Whether a folder has checkpoints, complete or not."""
    return any(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def newest(folder: str | Path, processes: int = 1) -> str | None:
    """The newest complete checkpoint of a folder; None where there is none."""
    try:
        return last_complete_checkpoint(str(folder), processes)
    except ValueError:
        return None
