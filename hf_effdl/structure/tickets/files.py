"""Tickets as files, in a folder or in a repository on the Hub: JSON and safetensors, nothing else.

`ticket.json`: the groups, where it was found, and digests of the other files; `ticket.safetensors`: the kept units of
every group; `weights-<step>.safetensors`: state dicts; `README.md`: the card.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from safetensors.torch import save
from torch import Tensor

from hf_effdl.files import (
    check_folder,
    damaged,
    digest,
    locked,
    read_json,
    read_tensors,
    sweep,
    write_json,
    write_whole,
)
from hf_effdl.structure.groups.record import groups_of, groups_record, listed, named, plain_values, require, whole
from hf_effdl.structure.tickets.card import CARD, write_ticket_card


State = dict[str, Tensor]  # of a model
FORMAT = 1
RECORD, KEPT, WEIGHTS = "ticket.json", "ticket.safetensors", "weights-{}.safetensors"
REMEDY = "save or push the ticket again"


def save_ticket(ticket: Any, folder: str | os.PathLike[str], weights: bool = True, repo_id: str | None = None) -> Path:
    """Write a ticket into a folder, and its card where there is none of something else."""
    steps = sorted(ticket.weights) if weights else []
    files = {KEPT: packed(ticket.kept)} | {WEIGHTS.format(step): packed(ticket.weights[step]) for step in steps}
    with locked(folder):
        return _write(ticket, Path(folder), files, steps, repo_id)


def _write(ticket: Any, target: Path, files: Mapping[str, bytes], steps: list[int], repo_id: str | None) -> Path:
    """The files of a ticket into a folder of one's own."""
    sweep(target, "ticket.*"), sweep(target, WEIGHTS.format("*"))
    foreign = (target / CARD).is_file() and not (target / RECORD).is_file()
    for name, content in files.items():
        write_whole(target / name, content)
    # last, and with the digests of the others: a write that was cut off is noticed
    write_json(target / RECORD, _record(ticket, steps, {name: digest(content) for name, content in files.items()}))
    for old in target.glob(WEIGHTS.format("*")):
        if old.name not in files:
            old.unlink()
    if not foreign:
        write_ticket_card(ticket, target, repo_id or target.name, steps)
    return target


def _record(ticket: Any, steps: list[int], digests: Mapping[str, str]) -> dict[str, Any]:
    record = {
        "format": FORMAT,
        "step": ticket.step,
        "settled": ticket.settled,
        "distances": ticket.distances,
        "init": ticket.init,
        **groups_record(ticket.groups),
        "weights": steps,
        "sha256": dict(digests),
    }
    return record | {"sha256_of_this": _record_digest(record)}


def _record_digest(record: Mapping[str, Any]) -> str:
    """Of all entries but the digest itself."""
    return digest(json.dumps({k: v for k, v in record.items() if k != "sha256_of_this"}, sort_keys=True))


def load_ticket(
    where: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """The arguments of the `Ticket` in a folder or a repository."""
    folder = Path(where)
    if not folder.is_dir():
        check_folder(where, revision)
        folder = _downloaded(str(where), revision, token)
    if not (folder / RECORD).is_file():
        raise _no_ticket(where)
    try:
        return _read(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the ticket in {where} cannot be read: {what}") from error


def _no_ticket(where: Any) -> FileNotFoundError:
    return FileNotFoundError(
        f"{where} holds no ticket: there is no {RECORD}; write one with Ticket.save_pretrained or push_to_hub"
    )


def _downloaded(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """A folder with a ticket's files, got by their names: for a list of all files the client waits without end."""
    try:
        folder = Path(hf_hub_download(repo_id, RECORD, revision=revision, token=token)).parent
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is neither a folder nor a repository id; pass owner/name") from error
    except RemoteEntryNotFoundError as error:
        raise _no_ticket(repo_id) from error
    with suppress(ValueError, KeyError, TypeError):  # a damaged record; whoever reads it says so
        for name in _files(read_json(folder / RECORD)).values():
            with suppress(RemoteEntryNotFoundError):
                hf_hub_download(repo_id, name, revision=folder.name, token=token)  # of the same commit
    return folder


def _files(record: Mapping[str, Any]) -> dict[Any, str]:
    """The names of a ticket's other files, by step; the kept units' by itself."""
    steps = [whole(step, "weights", 0) for step in listed(record["weights"], "weights")]
    return {KEPT: KEPT} | {step: WEIGHTS.format(step) for step in steps}


def _read(folder: Path) -> dict[str, Any]:
    record = read_json(folder / RECORD, remedy=REMEDY)
    named(record, RECORD)
    if whole(record["format"], "format", 1) > FORMAT:
        raise ValueError(
            f"it has format {record['format']}, and this version of hf_effdl reads {FORMAT}; install a newer one"
        )
    if record.get("sha256_of_this", _record_digest(record)) != _record_digest(record):  # 0.1.0 wrote none
        raise damaged(folder / RECORD, "its content is not what was written", REMEDY)
    groups = groups_of(record)
    files = _files(record)
    for name in files.values():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing; {REMEDY}")
    digests = named(record["sha256"], "sha256")
    tensors = {key: read_tensors(folder / name, digests[name], REMEDY) for key, name in files.items()}
    kept = tensors.pop(KEPT)
    for step, state in tensors.items():
        _check_weights(state, groups[0].network.shapes, WEIGHTS.format(step))
    require(isinstance(record["settled"], bool), "settled", "is neither true nor false")
    return {
        "groups": groups,
        "kept": kept,
        "weights": tensors,
        "step": whole(record["step"], "step", 0),
        "settled": record["settled"],
        "distances": [plain_values(named(row, "distances"), "distances") for row in listed(record["distances"], "it")],
        "init": plain_values(named(record["init"], "init"), "init"),
    }


def _check_weights(state: State, shapes: Mapping[str, tuple[int, ...]], file: str) -> None:
    for name, shape in shapes.items():
        there = tuple(state[name].shape) if name in state else None
        if there != shape:
            raise ValueError(f"{file} has {name} {'of shape ' + str(there) if there else 'not at all'}, not {shape}")
    bad = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"{bad} in {file} holds NaN or infinities; find the ticket again")


def push_ticket(
    ticket: Any, repo_id: str, private: bool | None, token: str | bool | None, weights: bool, commit_message: str
) -> str:
    """Push a ticket to a model repository in one commit; returns its URL."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    there = set(api.list_repo_files(repo_id))
    with tempfile.TemporaryDirectory() as folder:
        save_ticket(ticket, folder, weights, repo_id)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                ignore_patterns=CARD if CARD in there and RECORD not in there else None,
                delete_patterns=WEIGHTS.format("*"),
            )
        )


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the content of a safetensors file."""
    # safetensors takes neither other memory formats nor tensors that share memory
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of the names."""
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
