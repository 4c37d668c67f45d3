"""Which checkpoint a run goes on from."""

from pathlib import Path
from zipfile import is_zipfile

from safetensors.torch import load_model
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

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


def load_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Load the model that a finished run left, where a checkpoint is its last; else do nothing and return False.

    Trainer would go on from there with one step too many, where the run ends within an epoch.
    """
    state, args = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json"), trainer.args
    *_, last_step = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    weights = Path(best or checkpoint) / SAFE_WEIGHTS_NAME
    if state.global_step < last_step or not weights.is_file():
        return False
    load_model(trainer.model, weights)
    trainer.state = state
    return True
