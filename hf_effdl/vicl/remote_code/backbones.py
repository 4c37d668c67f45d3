"""Where the weights of a backbone are, and how they are loaded from there.

A source is plain values: `{"id": ..., "revision": ...}` of a repository, or `{"config": {...}}`, whose weights stand
in the file of the model that uses them.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel


# layers, and any other size, of a backbone
DEEPEST, LARGEST = 1000, 2**31


def source_of(
    backbone: PreTrainedModel | None, id: str | None, revision: str | None, embed: bool | None = None
) -> dict[str, Any]:
    """The source of a backbone.

    Args:
        backbone: None: there is none, and all weights stand in the model's file.
        id, revision: where it was loaded from, as far as that is known.
        embed: see `VisualInContextModel.from_parts`.
    """
    if backbone is None:
        return {"config": None}
    if embed is None:
        embed = id is None or os.path.isdir(id)
    if embed:
        # where a backbone was loaded from is nobody's business once its weights are here
        return {"config": {key: value for key, value in backbone.config.to_dict().items() if key != "_name_or_path"}}
    if id is None:
        raise ValueError(
            f"embed=False, but it is not known where {type(backbone).__name__} was loaded from: load it "
            "by its repository's name, or embed its weights"
        )
    return {"id": id, "revision": revision or commit_of(id)}


def check_sizes(values: dict[str, Any]) -> None:
    """Refuse sizes that no backbone has and that would fill the memory, or take for ever."""
    for name, value in values.items():
        most = DEEPEST if "layers" in name or "depth" in name else LARGEST
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                check_sizes(one)
            elif isinstance(one, int | float) and not abs(one) <= most:  # NaN is not
                raise ValueError(f"the config of the backbone has {name}={one}: no model is as large")


def is_named(source: dict[str, Any]) -> bool:
    """Whether the weights are in a repository of their own."""
    return "id" in source


def config_of(source: dict[str, Any], token: str | bool | None = None, trust: bool = False) -> PreTrainedConfig:
    """The config of the backbone at a source."""
    if is_named(source):
        return AutoConfig.from_pretrained(
            source["id"], revision=source["revision"], token=token, trust_remote_code=trust
        )
    values = dict(source["config"])
    check_sizes(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def load_backbone(
    source: dict[str, Any], kind: Any, token: str | bool | None = None, trust: bool = False
) -> PreTrainedModel:
    """The backbone at a source; an embedded one comes without its weights, which the caller's file holds.

    Args:
        kind: `AutoModel`, or the class of transformers whose weights they are.
        trust: whether code in the source's repository may run.
    """
    if is_named(source):
        # single precision also where a file holds half: the CPU is slow in half, and a GPU user casts with .half()
        options = {"dtype": torch.float32} | ({"trust_remote_code": trust} if kind is AutoModel else {})
        return kind.from_pretrained(source["id"], revision=source["revision"], token=token, **options)
    config = config_of(source)
    return kind.from_config(config) if hasattr(kind, "from_config") else kind._from_config(config)


@contextmanager
def plain_errors(where: Any) -> Iterator[None]:
    """Have what goes wrong deep inside, where a config holds what no model has, told as an error of the files.

    Args:
        where: they come from.

    Raises:
        ValueError: instead of errors other than those of files, values, types and missing packages.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            f"{where}: no model can be made as its config.json says ({type(error).__name__}: {str(error)[:200]}): "
            "download it again, or save the model again"
        ) from error


def check_whole(missing: Iterable[str], where: Any, unexpected: Iterable[str] = ()) -> None:
    """Refuse a file that lacks tensors, since what stands in their place was never learnt, or holds some for nothing.

    Raises:
        ValueError: naming some.
    """
    if names := sorted(missing):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"{where}: the model's file lacks {len(names)} tensors that its config names ({shown}): download it "
            "again, or save the model again"
        )
    if names := sorted(unexpected):
        raise ValueError(
            f"{where}: the model's file holds {len(names)} tensors that its config has no place for "
            f"({', '.join(names[:3])}): config.json is not the one that was saved with them; download both again"
        )


def commit_of(id: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """The commit that a repository's config was taken from; None for a folder, or where it is not known."""
    if os.path.isdir(id):
        return None
    try:
        return Path(hf_hub_download(id, "config.json", revision=revision, token=token)).parent.name
    except (OSError, HfHubHTTPError, HFValidationError):
        return None
