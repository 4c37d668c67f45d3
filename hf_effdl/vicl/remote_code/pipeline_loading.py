"""What a pipeline is put together from: a model made from whatever the user has, and the pool that goes with it."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .configuration_visual_in_context import VisualInContextConfig
from .modeling_visual_in_context import FROZEN, VisualInContextModel, as_dtype, frozen_class
from .pool_reader import MANIFEST, NAME, PoolReader
from .vision_encoder import VisionEncoder
from .writing import check_folder, copy_file, locked


def load_parts(
    model: Any, pool: Any, token: str | bool | None, dtype: Any = None, revision: str | None = None
) -> tuple[VisualInContextModel, PoolReader]:
    """A model and its pool, from whatever the user has of them; the model's config names the pool where that can be.

    Args:
        model, pool, token, dtype, revision: see `VisualInContextPipeline`.
    """
    name = str(pool) if isinstance(pool, (str, os.PathLike)) else None
    dtype = as_dtype(dtype)
    if not isinstance(model, (str, os.PathLike)):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is of a repository, and model= is a {type(model).__name__}")
        if not hasattr(model, "frozen"):
            pool = _opened(pool, token)
            model = from_module(model, pool, token)
    elif (config := _config(str(model), token, revision)).model_type == VisualInContextConfig.model_type:
        pinned = {} if revision is None else {"revision": revision}
        model = VisualInContextModel.from_pretrained(str(model), token=token, **pinned)
    else:  # a backbone's name says nothing of the pool's task and encoder
        pool = _opened(pool, token)
        model = from_backbone(str(model), config, pool, token, revision)
    if dtype is not None:
        model.cast(dtype)
    if pool is None:
        name = named_pool(model)
    if pool is None or isinstance(pool, (str, os.PathLike)):
        pool = PoolReader.from_pretrained(name, token=token, **revision_of(model, name))
    check_pool(pool, model)
    _name_pool(model.config, pool, name)
    return model, pool


def _config(name: str, token: str | bool | None, revision: str | None) -> SimpleNamespace:
    """As it is written: also of a model whose class only its repository knows."""
    check_folder(name, revision)
    return SimpleNamespace(
        **{"model_type": None} | PreTrainedConfig.get_config_dict(name, token=token, revision=revision)[0]
    )


def _opened(pool: Any, token: str | bool | None) -> Any:
    return PoolReader.from_pretrained(str(pool), token=token) if isinstance(pool, (str, os.PathLike)) else pool


def _name_pool(config: VisualInContextConfig, pool: PoolReader, name: str | None) -> None:
    if name is not None and pool.commit is not None:  # a repository, which is what the model will name
        config.pool, config.pool_revision = name, pool.commit
    elif config.pool == "pool" or config.pool_revision not in (None, pool.commit):
        config.pool, config.pool_revision = None, None  # that was another pool


def is_repository(name: str) -> bool:
    return not os.path.isdir(name) and name != "pool"


def revision_of(model: VisualInContextModel, pool: str) -> dict[str, Any]:
    return {"revision": model.config.pool_revision} if pool == model.config.pool else {}


def named_pool(model: VisualInContextModel) -> str:
    name = model.config.pool
    if name is None:
        raise ValueError("there is no pool: pass pool=ExamplePool.from_dataset(...), or a repository or folder of one")
    inside = os.path.join(model.config.name_or_path or "", name)
    if name == "pool" and not os.path.isdir(inside):
        raise ValueError(f"the pool was saved beside the model, but there is no folder {inside!r}: pass pool=")
    return inside if os.path.isdir(inside) else name


def fingerprint_in(folder: Path) -> Any:
    """Of the pool in a folder; None where there is none that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def save_pool(pool: PoolReader, folder: Path) -> None:
    if hasattr(pool, "save_pretrained"):
        pool.save_pretrained(folder)
    elif folder.resolve() != Path(pool.folder).resolve():
        with locked(folder):
            _copy_files(pool, folder)


def _copy_files(pool: PoolReader, folder: Path) -> None:
    """A reader's files, as they are."""
    names = {f"{entry['name']}.{kind}" for entry in pool.manifest["shards"] for kind in ("tar", "safetensors")}
    for name in sorted(names):
        copy_file(Path(pool.folder, "data", name), folder / "data" / name)
    copy_file(Path(pool.folder, MANIFEST), folder / MANIFEST)
    for file in (folder / "data").iterdir():  # of a pool that was there before, and nothing else
        if re.fullmatch(rf"{NAME}\.(tar|safetensors)", file.name) and file.name not in names:
            file.unlink()


def from_backbone(
    name: str, config: SimpleNamespace, pool: Any, token: str | bool | None, revision: str | None
) -> VisualInContextModel:
    if not hasattr(pool, "encoder"):
        raise ValueError(f"{name} is a backbone and not a VisualInContextModel, which would name its pool: pass pool=")
    made = pool.encoder
    shape = {"image_size": tuple(made["image_size"]), "layer": made["layer"]}
    if made["id"] is None and getattr(pool, "encoder_module", None) is None:
        encoder = VisionEncoder.from_pretrained(name, revision, token=token, **shape)
        if encoder.fingerprint == made["fingerprint"]:  # a pool that was saved does not name a folder
            made = made | {"id": name}
    if made["id"] == name and set(shape) <= set(frozen_class(config).encoder_options):  # one encoder for both
        return VisualInContextModel.from_backbone(
            name, task=pool.task, revision=revision or made["revision"], token=token, **shape
        )
    encoder = _encoder_of(pool, token)
    return VisualInContextModel.from_backbone(name, task=pool.task, encoder=encoder, revision=revision, token=token)


def from_module(frozen: Any, pool: Any, token: str | bool | None) -> VisualInContextModel:
    inside = next((kind for kind in FROZEN.values() if kind.takes(getattr(frozen, "config", None))), None)
    if inside is not None:  # what is no frozen model yet, but the inside of one
        frozen = inside(frozen)
    if not isinstance(frozen, nn.Module) or not hasattr(frozen, "predict"):
        raise TypeError(
            f"model is a {type(frozen).__name__}: pass a VisualInContextModel (from_backbone, from_parts, "
            "from_pretrained), a frozen model such as SegGptInContext, or the name of a repository"
        )
    if not hasattr(pool, "encoder"):
        raise ValueError(f"a {type(frozen).__name__} does not name its pool: pass pool=")
    encoder = getattr(frozen, "encoder", None)
    if encoder is None or encoder.fingerprint != pool.encoder["fingerprint"]:
        encoder = _encoder_of(pool, token)
    return VisualInContextModel.from_parts(frozen, encoder, task=pool.task)


def _encoder_of(pool: Any, token: str | bool | None) -> Any:
    encoder, made = getattr(pool, "encoder_module", None), pool.encoder
    if encoder is not None:  # a pool that was built here still has it
        return encoder
    if made["id"] is None:
        raise ValueError(
            f"the pool was made with an encoder that has no name ({made['fingerprint']}): make the model with "
            "VisualInContextModel.from_parts(frozen, encoder=...)"
        )
    form = {"image_size": tuple(made["image_size"]), "layer": made["layer"]}
    return VisionEncoder.from_pretrained(made["id"], made["revision"], token=token, **form)


def check_pool(pool: PoolReader, model: VisualInContextModel) -> None:
    if not hasattr(pool, "fingerprint"):  # by what it can do: code from the Hub has a PoolReader of its own
        raise TypeError(
            f"pool is a {type(pool).__name__}: pass ExamplePool.from_dataset(dataset, encoder=...), or a "
            "repository or folder of a pool"
        )
    if pool.task != model.config.task:
        raise ValueError(
            f"the pool is for task={pool.task!r}, the model for task={model.config.task!r}: make one of "
            "them again for the task of the other"
        )
    made, here = pool.encoder, model.encoder.describe()
    if made["fingerprint"] != here["fingerprint"]:
        dtype = next((weight.dtype for weight in model.encoder.parameters()), torch.float32)
        half = f". Weights saved or loaded in {dtype} may be others by rounding: load in float32, and cast then"
        half = half if dtype.itemsize < 4 else ""
        raise ValueError(
            f"the pool was made with the encoder {made}, but the model's is {here}: vectors of two "
            "encoders cannot be compared. Pass encoder= of the pool to VisualInContextModel.from_parts, "
            "or make the pool again with encoder=model.encoder" + half
        )
