"""How the package writes and reads its files: whole or not at all, on the disk when it says so, damaged ones named."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor


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
    return write_whole(target, json.dumps(value, indent=2) + "\n")


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
        with file.open("ab") as ours, FileLock(file):
            # a file that was removed while we waited for it keeps no one out: it must still be the one we opened first
            if not file.is_file() or not os.path.samestat(os.fstat(ours.fileno()), file.stat()):
                continue
            try:
                yield
            finally:
                if os.name != "nt":  # Windows removes no open file
                    file.unlink(missing_ok=True)
            return


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


def read_json(file: str | os.PathLike[str], sha256: str | None = None, remedy: str = "make it anew") -> Any:
    """The value of a JSON file; raises as `read_whole` does, also where it is no JSON."""
    content = read_whole(file, sha256, remedy)
    try:
        return json.loads(content)
    except ValueError as error:
        raise damaged(file, str(error), remedy) from error


def damaged(file: str | os.PathLike[str], why: str, remedy: str = "make it anew") -> ValueError:
    """The error for a file that cannot be used."""
    return ValueError(f"{os.fspath(file)} is damaged ({why}); {remedy}")
