"""What this machine is and has."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE

from hf_effdl.version import __version__


PACKAGES = "torch transformers datasets accelerate peft huggingface-hub evaluate safetensors torch-pruning numpy"
EXTRAS = "trl faiss-cpu matplotlib scikit-learn torchvision"
VARIABLES = "HF_HUB_OFFLINE HF_ENDPOINT OMP_NUM_THREADS CUDA_VISIBLE_DEVICES ACCELERATE_USE_CPU WORLD_SIZE"


def described() -> str:
    """A line for each fact, without anything secret."""
    facts = {"hf_effdl": f"{__version__}, {Path(__file__).parents[2]}", "Python": sys.version.split()[0]}
    facts["system"] = f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    facts |= {name: _version(name) for name in PACKAGES.split()}
    facts["extras"] = ", ".join(f"{name} {_version(name)}" for name in EXTRAS.split())
    facts["devices"] = _devices()
    facts["C++ compiler"] = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or "none"
    facts |= {"Hub cache": _folder(HF_HUB_CACHE), "data set cache": _folder(HF_DATASETS_CACHE)}
    facts |= {name: os.environ[name] for name in VARIABLES.split() if name in os.environ}
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _devices() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; CUDA {torch.version.cuda or torch.version.hip}"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(found or "CPU only")


def _folder(path: str | os.PathLike[str]) -> str:
    folder = Path(path)
    if not folder.is_dir():
        return f"{folder}, not there"
    return f"{folder}, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"
