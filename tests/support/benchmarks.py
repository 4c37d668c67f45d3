"""The benchmark scripts as modules, and the settings of a full run of those on CIFAR-10."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
FULL = {"net": "resnet18", "width": 64, "classes": 10, "rows": 50_000, "epochs": 30, "batch": 128}
FULL |= {"device": "a GPU", "precision": "bfloat16", "torch": "2"}


@contextmanager
def importable(*names: str) -> Iterator[dict]:
    """Scripts by name, as `python examples/benchmarks/...` imports what they share, and forgotten afterwards."""
    path, modules, threads = list(sys.path), set(sys.modules), torch.get_num_threads()
    cudnn = torch.backends.cudnn.benchmark
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn
