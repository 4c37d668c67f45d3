"""The tab on smaller models, without its looks: a dense net, the path of its run, and what a budget makes of them."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from pictures import drawing
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ResNetForImageClassification

from hf_effdl import SparsePath, recalibrate_batch_norm, slim
from hf_effdl.structure.slim.latency import measure_latency


NET = Path(__file__).parent / "assets" / "net"


def digits(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images `(n, 1, 32, 32)` and classes of 1,437 training and 360 test digits."""
    data = load_digits()
    small = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    images = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor(data.target)
    return (images[order[360:]], labels[order[360:]]), (images[order[:360]], labels[order[:360]])


class Smaller(NamedTuple):
    """What a budget gives: a sentence with a table, and the path with what is kept, as HTML."""

    text: str
    picture: str


@cache
def opened() -> tuple[ResNetForImageClassification, SparsePath]:
    return ResNetForImageClassification.from_pretrained(NET).eval(), SparsePath.load(NET)


@torch.no_grad()
def accuracy(model: ResNetForImageClassification) -> float:
    images, labels = digits()[1]
    return (model(images).logits.argmax(-1) == labels).float().mean().item()


@cache
def cut(macs: float) -> tuple[ResNetForImageClassification, dict[str, Tensor]]:
    """The net at a share of its MACs, refitted on training digits but not trained; and the units it keeps."""
    dense, path = opened()
    kept, batches = path.select(macs=macs), digits()[0][0][:512].split(128)
    return recalibrate_batch_norm(slim(dense, path.groups, kept, calibration=batches), batches), kept


@cache
def smaller(percent: int) -> Smaller:
    """The net at so many per cent of its multiply-accumulates, beside the whole one; measured once.

    Raises:
        ValueError: for a share that is none, or below one unit a group.
    """
    (dense, path), (small, kept) = opened(), cut(percent / 100)
    network, models = path.groups[0].network, (dense, small)
    counts = [network.count(), network.count(path.groups, {name: len(units) for name, units in kept.items()})]
    times = measure_latency(models, digits()[1][0][:32])
    rows = {
        "accuracy, 360 test digits": [f"{accuracy(model):.3f}" for model in models],
        "MACs": [f"{count['macs']:,}" for count in counts],
        "parameters": [f"{count['params']:,}" for count in counts],
        "ms for 32 digits, measured here": [f"{time:.2f}" for time in times],
        "channels of the stages": [", ".join(map(str, model.config.hidden_sizes)) for model in models],
    }
    macs, params = (counts[1][key] / counts[0][key] for key in ("macs", "params"))
    text = (
        f"**{macs:.0%} of the MACs, {params:.0%} of the parameters, {times[1] / times[0]:.2f} of the time.** "
        "Nothing is trained again: the path says which units stay, and the layers behind them are refitted by least "
        "squares on 512 digits.\n\n| | whole | smaller |\n|---|---|---|\n"
    )
    text += "\n".join(f"| {name} | {' | '.join(pair)} |" for name, pair in rows.items())
    shows = f"When each channel entered, those kept at {percent} % of the MACs in red; accuracy against size"
    return Smaller(text, drawing(path.plot(kept), shows))
