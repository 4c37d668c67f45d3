"""Who of several processes writes, how files come into being (whole, on the disk, or not at all), which are meant."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


# what no model is loaded without; the first would be read in the place of the second
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def is_first() -> bool:
    """Whether this is the only process or the first of several."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def check_folder(where: Any, revision: str | None = None) -> None:
    """Refuse what looks like the path of a folder and is none, before a repository of that name is asked for.

    A path is what is no text, starts with `./`, `../`, `/` or `~`, has more than one slash, or lies in a folder that
    is there. Names of one word and `owner/name` are repositories where no such folder is.

    Args:
        where: as it was given.
        revision: only repositories have one.

    Raises:
        TypeError: it is neither text nor path.
        FileNotFoundError: naming it.
    """
    if not isinstance(where, str | os.PathLike):
        raise TypeError(f"{type(where).__name__} is no place to load from: pass the path of a folder, or a repository")
    if revision is not None or os.path.isdir(where):
        return
    name = os.fspath(where)
    inside = os.path.dirname(name)
    path = name.startswith(("./", "../", "~")) or os.path.isabs(name) or name.count("/") > 1
    if path or not isinstance(where, str) or os.path.isdir(inside):
        near = f", and {inside!r} is one" if os.path.isdir(inside) else ""
        raise FileNotFoundError(f"there is no folder {name!r}{near}: it is taken for a path, not for a repository")


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


def copy_file(source: Path, target: Path) -> Path:
    """Copy a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(shutil.copyfile(source, Path(folder) / target.name))
        _flush(part)
        os.replace(part, target)
    return target


def save_whole(save: Callable[..., Any], folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Save a model by upstream's own function; killed at any moment, its folder is of before, of now, or refused.

    Args:
        save: upstream's `save_pretrained`.
        folder: where to.
        *args, **kwargs: of that function.
    """
    if kwargs.get("push_to_hub") or os.path.isfile(folder):  # upstream's own way, or its own error
        save(folder, *args, **kwargs)
        return
    with locked(Path(folder)), _filled_beside(Path(folder)) as scratch:
        save(scratch, *args, **kwargs)


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Have a folder to oneself: others that ask for it wait, as in `hf_effdl.files`, which cannot travel along."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    while True:
        with file.open("ab") as ours:
            _wait_for(ours)
            # a file that was removed while we waited for it keeps no one out
            if not file.is_file() or not os.path.samestat(os.fstat(ours.fileno()), file.stat()):
                continue
            try:
                yield
            finally:
                if os.name != "nt":  # Windows removes no open file
                    file.unlink(missing_ok=True)
            return


def _wait_for(file: Any) -> None:
    """Take the system's lock on a file, where system and file system have some."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


@contextmanager
def _filled_beside(folder: Path) -> Iterator[Path]:
    """A scratch folder, whose files take their names in `folder` once all are written; an error leaves that as it was.

    Weights go before the first file and come after the others, so that none are read by a config of others.
    """
    for left in folder.glob(".saving.*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as scratch:
        yield Path(scratch)
        files = sorted(Path(scratch).iterdir(), key=lambda file: (file.name in WEIGHTS, file.name))
        for file in files:
            _flush(file)
        if files:
            remove_weights(folder)
        for file in files:
            os.replace(file, folder / file.name)


def remove_weights(folder: Path) -> None:
    """Leave a folder that no model is loaded from, until it has weights again."""
    for name in WEIGHTS:
        (folder / name).unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with open(file, "rb+") as stored:
        os.fsync(stored.fileno())
