"""How the package writes and reads its files: whole or not at all, on the disk when it says so, damaged ones named."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor


SEALED = "sealed"
# what no model is loaded without (without a config upstream takes default values), and what would be read instead
WHOLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
WEIGHTS = {WHOLE: (WHOLE, INDEX), INDEX: (WHOLE, INDEX), ADAPTER: (ADAPTER,)}


def write_whole(target: str | os.PathLike[str], content: bytes | str | Callable[[Path], Any]) -> Path:
    """Write a file at once or not at all, and flush it to the disk before it takes its name.

    Args:
        target: the file; its folder is made.
        content: bytes, text (UTF-8), or a function that writes to the path it is given (same suffix as the target's).

    Returns:
        The target. When writing fails, a file that was there before is as it was, and nothing is left beside it.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a folder of its own: two writers never share a temporary name, and what a writer leaves beside its file goes too
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder) / target.name
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(part)
        os.replace(part, target)
    flush(target.parent)  # the name itself
    return target


def write_json(target: str | os.PathLike[str], value: Any) -> Path:
    """Write plain values as JSON, whole; floats come back as they were."""
    return write_whole(target, json.dumps(value, indent=2, default=plain) + "\n")


def plain(value: Any) -> Any:
    """Numbers of NumPy and torch as Python's own, for `json.dumps(..., default=plain)`."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is no plain value that a file could hold")
    return value.tolist()


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


def sweep(folder: Path, pattern: str) -> None:
    """Remove what writers that were killed left beside their files; none may be writing such files now.

    Args:
        folder: where the files are.
        pattern: of their names, as `Path.glob` takes it.
    """
    for left in folder.glob(f".{pattern}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike[str], name: str = ".lock") -> Iterator[None]:
    """Have a folder to oneself: others, threads and processes, that ask for it wait until the block is left.

    The system gives the lock back when a process dies. Asking twice in one thread would wait for ever.

    Args:
        folder: made if need be; the lock is an empty file in it, which goes with the last who waits.
        name: of the file.
    """
    from filelock import FileLock

    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / name
    while True:
        with file.open("ab") as ours, ExitStack() as stack:
            with suppress(NotImplementedError):  # of file systems without locks, where no one is kept out
                stack.enter_context(FileLock(file))
            # a file that was removed while we waited for it keeps no one out: it must still be the one we opened first
            if not file.is_file() or not os.path.samestat(os.fstat(ours.fileno()), file.stat()):
                continue
            try:
                yield
            finally:
                if os.name != "nt":  # Windows removes no open file
                    file.unlink(missing_ok=True)
            return


@contextmanager
def filled_beside(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder, whose files take their names in `folder` once all are written; an error leaves that as it was.

    Lock the folder around it. Files of these names go before the first of them comes, and weights come last: a run
    that is killed meanwhile leaves a folder without weights, which nothing loads, never old ones and a new config.

    Args:
        folder: made if need be; other files in it stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, "saving")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as scratch:
        yield Path(scratch)
        files = [file for file in Path(scratch).rglob("*") if file.is_file()]
        for file in files:
            flush(file)
        targets = {file: folder / file.relative_to(scratch) for file in sorted(files, key=_weights_last)}
        for target in reversed(targets.values()):
            target.parent.mkdir(parents=True, exist_ok=True)
            for name in WEIGHTS.get(target.name, (target.name,)):
                target.with_name(name).unlink(missing_ok=True)
        for file, target in targets.items():
            os.replace(file, target)
    flush(folder)


def remove_weights(folder: str | os.PathLike[str]) -> None:
    """Leave a folder that no model is loaded from, until it has weights again."""
    for name in WEIGHTS:
        Path(folder, name).unlink(missing_ok=True)


def _weights_last(file: Path) -> tuple[bool, Path]:
    return file.name in WEIGHTS, file


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(content: bytes | str | Path | Iterable[bytes]) -> str:
    """SHA-256, in hex, of bytes, a text, a file, or several pieces (each with its length, so that none can merge)."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(content, bytes | str):
        return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
    whole = hashlib.sha256()
    for piece in content:
        whole.update(len(piece).to_bytes(8, "big") + piece)
    return whole.hexdigest()


def read_whole(file: str | os.PathLike[str], sha256: str | None = None, remedy: str = "make it anew") -> bytes:
    """A file's bytes.

    Args:
        file: where.
        sha256: its `digest` when it was written; None: not checked.
        remedy: what the user can do about a damaged file, ends the message.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what was written, by name.
    """
    content = Path(file).read_bytes()
    if sha256 is not None and digest(content) != sha256:
        raise damaged(file, "its content is not what was written", remedy)
    return content


def read_tensors(
    file: str | os.PathLike[str], sha256: str | None = None, remedy: str = "make it anew"
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises as `read_whole` does, also where it is no such file."""
    content = read_whole(file, sha256, remedy)
    try:
        tensors = load(content)
    except Exception as error:  # safetensors' own errors have no common class
        raise damaged(file, str(error), remedy) from error
    return {name: tensors[name] for name in sorted(tensors)}  # safetensors hands them out in any order


def sealed(tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file that holds the digest of its tensors and notes, which `read_sealed` checks."""
    notes, tensors = dict(notes or {}), {name: value.contiguous().cpu() for name, value in tensors.items()}
    # one entry: safetensors writes several in any order
    return save(tensors, {SEALED: json.dumps(notes | {"sha256": _seal(tensors, notes)}, sort_keys=True)})


def read_sealed(
    file: str | os.PathLike[str], remedy: str = "make it anew"
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors and notes of a file that `sealed` made; notes are None in files of earlier versions, without seal.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what was written, by name.
    """
    tensors = read_tensors(file, remedy=remedy)
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    if notes is None:
        return tensors, None
    try:
        notes = parsed(notes[SEALED])
        whole = notes.pop("sha256") == _seal(tensors, notes)
    except (KeyError, ValueError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise damaged(file, "its content is not what was written", remedy)
    return tensors, notes


def _seal(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    pieces = [json.dumps(sorted(notes.items())).encode()]
    for name, value in sorted(tensors.items()):
        pieces += [f"{name} {value.dtype} {tuple(value.shape)}".encode()]
        pieces += [value.flatten().view(torch.uint8).numpy().tobytes()]
    return digest(pieces)


def read_json(file: str | os.PathLike[str], sha256: str | None = None, remedy: str = "make it anew") -> Any:
    """The value of a JSON file; raises as `read_whole` does, also where it is no JSON."""
    content = read_whole(file, sha256, remedy)
    try:
        return parsed(content)
    except ValueError as error:
        raise damaged(file, str(error), remedy) from error


def parsed(text: bytes | str) -> Any:
    """The value of a JSON text; raises ValueError, also where it is nested without end."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def damaged(file: str | os.PathLike[str], why: str, remedy: str = "make it anew") -> ValueError:
    """The error for a file that cannot be used."""
    return ValueError(f"{os.fspath(file)} is damaged ({why}); {remedy}")
