"""Rounds of labelling on three clouds of points, as a script: `python active_run.py OUT STRATEGY`."""

import sys

import torch
from accelerate import PartialState
from datasets import Dataset
from leave import leave

from hf_effdl import ActiveLearner, ColumnAnswers, LinearProbes


CLASSES = 3


def cloud(count: int = 120, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = torch.randn(count, 5, generator=generator) + 3 * torch.eye(5)[labels]
    return Dataset.from_dict(
        {"features": x.tolist(), "name": [f"row {i}" for i in range(count)], "label": labels.tolist()}
    )


def train(rows: Dataset, seed: int) -> LinearProbes:
    names = [str(i) for i in range(CLASSES)]
    return LinearProbes.train(None, rows, input_column="features", steps=20, num_probes=4, seed=seed, names=names)


def features(rows: Dataset) -> torch.Tensor:
    return torch.tensor(rows["features"][:])


def accuracy(probes: LinearProbes) -> float:
    test = cloud(200, seed=1)
    z = torch.cat(list(probes.batches(test, 64)))
    return (z.softmax(2).mean(1).argmax(1) == torch.tensor(test["label"][:])).double().mean().item()


def learner(out: str, strategy: str = "default", answers=None, **changes: object) -> ActiveLearner:
    options = {"batch": 12, "strategy": strategy, "embed": features, "evaluate": accuracy} | changes
    return ActiveLearner(cloud(), train, answers or ColumnAnswers(), out, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    made = learner(*sys.argv[1:3])
    made.run(3)
    leave()
