"""A small selection from files in the working folder, for tests that start it in processes of its own.

python selection_run.py OUT [CACHE] [SLEEP]    # scores go to OUT; SLEEP seconds pass after every batch
"""

import sys
import time

import torch
from accelerate import PartialState
from datasets import Dataset
from leave import leave
from torch import nn

from hf_effdl import LinearProbes, Probes, UncertaintySelector
from hf_effdl.samples.probes import scoring


PART = 40  # rows between two writes of the cache


def rows(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    x = torch.randn(count, 6, generator=generator) + 1.5 * nn.functional.one_hot(labels, 6)
    return Dataset.from_dict({"x": x.tolist(), "label": labels.tolist(), "name": [f"row {i}" for i in range(count)]})


class Slow(nn.Module):
    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.model, self._seconds = model, seconds  # private: no part of what is computed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self._seconds)
        return self.model(x)


def scored_and_chosen(cache: str | None = None, seconds: float = 0.0) -> dict[str, torch.Tensor]:
    """The score columns, and the places and weights of the chosen rows."""
    trained = LinearProbes.train(None, rows(90, 1), input_column="x", steps=50)
    models = []
    for head in trained.heads:
        layer = nn.Linear(6, 3)
        layer.weight.data, layer.bias.data = head[:-1].T.contiguous(), head[-1].clone()
        models.append(Slow(layer, seconds))
    selector = UncertaintySelector(Probes(models, input_column="x"), batch_size=16, cache_dir=cache)
    scored = selector.score(rows(203, 2))
    plan = selector.plan(scored, 30).plan
    columns = {name: torch.tensor(scored[name][:]) for name in scoring.SCORES}
    return columns | {"chosen": plan.positions, "weights": plan.weights}


class Counting(nn.Module):
    """A backbone that knows how many rows it was shown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.rows = nn.Linear(6, 5), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return self.layer(x).tanh()


def linear_probes() -> dict[str, torch.Tensor]:
    """Heads trained on 90 rows in batches of 16, of which each process encodes some."""
    backbone = Counting()
    probes = LinearProbes.train(backbone, rows(90, 1), input_column="x", batch_size=16)
    return {"heads": probes.heads, "mean": probes.mean, "scale": probes.scale, "rows": torch.tensor(backbone.rows)}


def write(out: str, cache: str | None = None, seconds: float = 0.0) -> None:
    """The same in parts of 40 rows, into a file."""
    scoring.PART = PART
    result = scored_and_chosen(cache, seconds)
    if PartialState().is_main_process:
        torch.save(result, out)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name].double(), second[name].double(), rtol=1e-5, atol=1e-6) for name in first
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(sys.argv[1], *sys.argv[2:3], *map(float, sys.argv[3:]))
    leave()
