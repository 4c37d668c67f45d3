"""Tickets as files, in a folder or in a repository on the Hub: JSON and safetensors, nothing else.

`ticket.json`: the groups, where it was found, and digests of the other files; `ticket.safetensors`: the kept units of
every group; `weights-<step>.safetensors`: state dicts; `README.md`: the card.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_effdl.structure.groups.group import Group, Groups, Network


FORMAT = 1
RECORD, KEPT, WEIGHTS, CARD = "ticket.json", "ticket.safetensors", "weights-{}.safetensors", "README.md"


def save_ticket(ticket: Any, folder: str | os.PathLike[str], weights: bool = True, repo_id: str | None = None) -> Path:
    """Write a ticket into a folder, and its card where there is none of something else."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    foreign = (target / CARD).is_file() and not (target / RECORD).is_file()
    steps = sorted(ticket.weights) if weights else []
    files = {KEPT: _bytes(ticket.kept)} | {WEIGHTS.format(step): _bytes(ticket.weights[step]) for step in steps}
    network = ticket.groups[0].network
    record = {
        "format": FORMAT,
        "step": ticket.step,
        "settled": ticket.settled,
        "distances": ticket.distances,
        "init": ticket.init,
        "groups": [group.to_dict() for group in ticket.groups],
        "shapes": network.shapes,
        "uses": network.uses,
        "weights": steps,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    for name, content in files.items():
        write(target / name, content)
    # last, and with the digests of the others: a write that was cut off is noticed
    write(target / RECORD, json.dumps(record, indent=1).encode())
    for old in target.glob(WEIGHTS.format("*")):
        if old.name not in files:
            old.unlink()
    if not foreign:
        _write_card(ticket, target, repo_id or target.name, steps)
    return target


def load_ticket(
    where: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """The arguments of the `Ticket` in a folder or a repository."""
    folder = Path(where)
    if not folder.is_dir():
        patterns = [RECORD, KEPT, WEIGHTS.format("*")]
        try:
            folder = Path(snapshot_download(str(where), revision=revision, token=token, allow_patterns=patterns))
        except HFValidationError as error:
            raise FileNotFoundError(f"{where!r} is neither a folder nor a repository id") from error
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(
            f"{where} holds no ticket: there is no {RECORD}; write one with Ticket.save_pretrained or push_to_hub"
        )
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] > FORMAT:
            raise ValueError(
                f"it has format {record['format']}, and this version of hf_effdl reads {FORMAT}; install a newer one"
            )
        network = Network({name: tuple(shape) for name, shape in record["shapes"].items()}, record["uses"])
        groups = Groups(Group.from_dict(values, network) for values in record["groups"])
        files = {int(step): WEIGHTS.format(int(step)) for step in record["weights"]}
        weights = {step: _read(folder / name, record["sha256"][name]) for step, name in files.items()}
        kept = _read(folder / KEPT, record["sha256"][KEPT])
        return {"groups": groups, "kept": kept, "weights": weights} | {
            name: record[name] for name in ("step", "settled", "distances", "init")
        }
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the ticket in {where} cannot be read: {what}") from error


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


def _write_card(ticket: Any, folder: Path, repo_id: str, steps: Sequence[int]) -> None:
    from hf_effdl.hub.cards import CITATION, markdown_table, write_card
    from hf_effdl.version import __version__

    report = ticket.report()
    units = [{"group": f"`{name}`", **sizes} for name, sizes in report["units"].items()]
    write_card(
        folder,
        "ticket_card.md",
        ModelCardData(library_name="hf_effdl", tags=["hf_effdl", "split-lbi", "ticket"]),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        ticket=ticket,
        steps=list(steps),
        report=report,
        units=markdown_table(units, {"group": "group", "before": "units", "after": "kept"}),
        citation=CITATION,
        last=next((row for row in reversed(ticket.distances) if row["distance"] is not None), None),
        version=__version__,
    )


def write(target: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    part = target.with_name(target.name + ".tmp")
    try:
        part.write_bytes(content)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # safetensors takes neither other memory formats nor tensors that share memory
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def _read(file: Path, sha256: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file.name} is missing; save or push the ticket again")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"{file.name} is damaged or of another ticket, as after a write that was cut off; save or "
            "push the ticket again"
        )
    return load(content)


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
