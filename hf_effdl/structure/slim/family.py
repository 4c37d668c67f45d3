"""Models of several sizes in one repository, a revision each: their record, and choosing one of them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import Tensor, nn

from hf_effdl.checks import flag, real_number
from hf_effdl.files import check_folder, damaged, digest, read_json, write_json
from hf_effdl.structure.groups.record import LARGEST, listed, named, require, text, whole
from hf_effdl.structure.slim.latency import measure_latency


FILE_NAME = "family.json"
FORMAT = 1
BOUNDS = ("macs", "params", "latency_ms")
REMEDY = "push the family again with push_family"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = {str(dtype): dtype for dtype in (*FLOATS, *COUNTS)}
CONFIGS = ("config.json", "adapter_config.json")  # the one that a member has holds its sizes and results
TIMED = 2**30  # numbers in an input that is made up to time a model


def family_record(
    members: Sequence[Mapping[str, Any]],
    metric: str | None,
    inputs: Mapping[str, Tensor],
    greater_is_better: bool = True,
) -> dict:
    """What `family.json` holds.

    Args:
        members: of each `{"revision", "class", "macs", "params", "latency_ms", "metrics", "config"}`, the largest
            first; the last is `config_digest` of what was saved.
        metric: by which one is better than another; None where nothing was evaluated.
        inputs: of the forward passes that were timed: their shapes are kept.
        greater_is_better: whether a higher metric is.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    shapes = {name: [str(one.dtype), *one.shape] for name, one in tensors.items() if one.dtype in DTYPES.values()}
    record = {"format": FORMAT, "metric": metric, "inputs": shapes, "members": [dict(member) for member in members]}
    return record if greater_is_better else record | {"greater_is_better": False}


def config_digest(folder: str | os.PathLike[str]) -> str | None:
    """The digest of a saved model's config; None where there is none."""
    file = next((file for name in CONFIGS if (file := Path(folder) / name).is_file()), None)
    return None if file is None else digest(file)


def write_family(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write a record, with its digest, into a folder."""
    return write_json(Path(folder) / FILE_NAME, {**record, "sha256": _digest(record)})


def read_family(
    where: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """The record in a folder or in a repository; see `choose` for what is raised."""
    check_folder(where, revision)
    file = Path(where) / FILE_NAME
    if not Path(where).is_dir():
        try:
            file = Path(hf_hub_download(str(where), FILE_NAME, revision=revision, token=token))
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(_no_family(where)) from error
    if not file.is_file():
        raise FileNotFoundError(_no_family(where))
    record = read_json(file, remedy=REMEDY)
    try:
        return _checked(record)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}", REMEDY) from error


def choose(
    repo_id: str | os.PathLike[str],
    *,
    macs: float | None = None,
    params: int | None = None,
    latency_ms: float | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """The revision of the best model of a family that is within some bounds.

    The best is the one of the best metric, where the family was evaluated, else the one of the most MACs.

    Args:
        repo_id: of `SplitLBITrainer.push_family`, or a folder with its `family.json`.
        macs, params: at most so many, of one row.
        latency_ms: at most so many milliseconds for a forward pass of the rows that the family was timed with: by its
            reports, which speak of the machine that it was made on, or with `device` measured here.
        device: measure here, on this device: the models are downloaded, the best first, until one is fast enough.
        revision: of the repository whose `family.json` is read; default: its main branch.
        token: for a private repository; default: the saved login.

    Returns:
        the revision.

    Raises:
        FileNotFoundError: there is no family.
        ValueError: no bound is given, none is within them (the nearest is named), or the best of a folder was saved
            anew since, by itself.

    Example:
        >>> name = choose("your-name/family", latency_ms=5.0)                          # doctest: +SKIP
        >>> AutoModelForImageClassification.from_pretrained("your-name/family", revision=name)  # doctest: +SKIP
    """
    given = {"macs": macs, "params": params, "latency_ms": latency_ms}
    bounds = {name: real_number(name, bound) for name, bound in given.items() if bound is not None}
    if not bounds or not all(bound > 0 for bound in bounds.values()):
        raise ValueError(f"{given}: give one bound or more, each above 0")
    if device is not None and latency_ms is None:
        raise ValueError(f"device={device!r} measures how long a pass takes: give latency_ms=, or leave it out")
    record = read_family(repo_id, revision, token)
    members = sorted(record["members"], key=partial(_merit, record), reverse=True)
    here = None if device is None else partial(_milliseconds, repo_id, record["inputs"], _device(device), token)
    for member in members:
        if _is_within(member, bounds, here):
            _check_saved(repo_id, member)
            return member["revision"]
    sizes = [{name: member.get(name) for name in ("revision", *bounds)} for member in members]
    raise ValueError(f"no model of {os.fspath(repo_id)} is within {bounds}: {sizes}; allow more")


def _merit(record: Mapping[str, Any], member: Mapping[str, Any]) -> tuple[float, int]:
    """Larger for a better member; one whose metric is no number comes last."""
    value = member["metrics"].get(record["metric"], math.nan)
    value = value if record["greater_is_better"] else -value
    return -math.inf if math.isnan(value) else value, member["macs"]


def _check_saved(where: str | os.PathLike[str], member: Mapping[str, Any]) -> None:
    """Refuse a member in a folder that is another model than its record speaks of; pushing changes configs."""
    found = config_digest(Path(where) / member["revision"]) if Path(where).is_dir() else None
    if found is not None and member["config"] is not None and found != member["config"]:
        raise ValueError(
            f"{member['revision']} of {os.fspath(where)} was saved anew since {FILE_NAME}, which speaks of another "
            "model: save or push the family again, with this one in budgets={share: model}"
        )


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is none of torch, as 'cpu': {str(error).splitlines()[0]}") from None


def _is_within(member: dict[str, Any], bounds: Mapping[str, float], here: Any) -> bool:
    """Whether a model is within the bounds; what needs a download comes last."""
    sizes = {name: bound for name, bound in bounds.items() if name != "latency_ms"}
    if not all(member[name] <= bound for name, bound in sizes.items()):
        return False
    if "latency_ms" not in bounds:
        return True
    if here is not None:
        member["latency_ms"] = here(member)
    if member.get("latency_ms") is None:
        raise ValueError(f"{member['revision']} was not timed: pass device= to measure here, or another bound")
    return member["latency_ms"] <= bounds["latency_ms"]


def _milliseconds(
    where: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[Any]],
    device: torch.device,
    token: str | bool | None,
    member: Mapping[str, Any],
) -> float:
    """How long a pass of a member takes on a device, on inputs of the shapes that the family was timed with."""
    import transformers

    folder = Path(where) / member["revision"]
    place = {"pretrained_model_name_or_path": folder} if folder.is_dir() else {}
    place = place or {"pretrained_model_name_or_path": str(where), "revision": member["revision"], "token": token}
    cls = getattr(transformers, member["class"], None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(f"{member['revision']} is a {member['class']}, no model of transformers: time it yourself")
    model: nn.Module = cls.from_pretrained(**place).to(device)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, (dtype, *shape) in shapes.items():
        if math.prod(shape) > TIMED:
            raise ValueError(
                f"the family was timed with {name} of {shape}, too large to be made up here: time it yourself"
            )
        kind = DTYPES[dtype]
        value = torch.rand(shape, generator=generator) if kind.is_floating_point else torch.ones(shape)
        inputs[name] = value.to(device, kind)
    return measure_latency([model], inputs)[0]


# ---- the record


def _no_family(where: str | os.PathLike[str]) -> str:
    return f"{os.fspath(where)} holds no family: there is no {FILE_NAME}; push one with SplitLBITrainer.push_family"


def _digest(record: Mapping[str, Any]) -> str:
    return digest(json.dumps({name: value for name, value in record.items() if name != "sha256"}, sort_keys=True))


def _checked(record: Any) -> dict[str, Any]:
    """The record of a file that may come from anybody."""
    named(record, FILE_NAME)
    if whole(record["format"], "format", 1) > FORMAT:
        raise ValueError(f"{FILE_NAME} has format {record['format']}, and this version reads {FORMAT}: upgrade")
    require(record.get("sha256") == _digest(record), FILE_NAME, "is not what was written")
    metric = None if record["metric"] is None else text(record["metric"], "metric")
    members = [_member(member) for member in listed(record["members"], "members")]
    require(0 < len(members) <= 1000, "members", f"are {len(members)}")
    inputs = {name: _shape(shape) for name, shape in named(record["inputs"], "inputs").items()}
    greater = flag("greater_is_better", record.get("greater_is_better", True))
    return {"metric": metric, "greater_is_better": greater, "members": members, "inputs": inputs}


def _member(values: Any) -> dict[str, Any]:
    named(values, "a member")
    member: dict[str, Any] = {name: text(values[name], name) for name in ("revision", "class")}
    require(member["class"].isidentifier() and member["revision"].strip("./") != "", "a member", "has no name")
    require(".." not in member["revision"] and not os.path.isabs(member["revision"]), "revision", "is a path")
    member |= {name: whole(values[name], name, 0, 2**62) for name in ("macs", "params")}
    latency, config = values.get("latency_ms"), values.get("config")
    member["config"] = None if config is None else text(config, "config")
    member["latency_ms"] = None if latency is None else real_number("latency_ms", latency)
    metrics = named(values["metrics"], "metrics").items()
    return member | {"metrics": {name: real_number(name, value) for name, value in metrics}}


def _shape(values: Any) -> list[Any]:
    dtype, *sizes = listed(values, "inputs")
    require(dtype in DTYPES and len(sizes) <= 8, "inputs", f"have {dtype!r} of {len(sizes)} axes")
    return [dtype, *(whole(size, "inputs", 1, LARGEST) for size in sizes)]
