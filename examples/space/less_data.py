"""The tab on less data, without its looks: digits of which a fifth is labelled wrong, as probes see them."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset
from pictures import drawing, tiles
from PIL import Image
from sklearn.datasets import load_digits

from hf_effdl import LinearProbes, Selection, UncertaintySelector
from hf_effdl.samples.selection.pictures import plot_overview


WRONG, PROBED, POOL, SHOWN = 0.2, 300, 500, 24
ORDERS = ("suspected label errors", "least certain", "most certain")


class Rows(NamedTuple):
    """A sentence; rows with captions, and how the scores are spread, as HTML."""

    text: str
    rows: str
    picture: str


class Scored(NamedTuple):
    """A selection of the pool, and what only the experiment knows: the true classes."""

    selection: Selection
    images: np.ndarray
    truth: np.ndarray


@cache
def scored() -> Scored:
    """Eight linear probes on 300 rows, and what they say of 500 others; a fifth of all labels is wrong."""
    data, rng = load_digits(), np.random.default_rng(0)
    rows = rng.permutation(len(data.target))[: PROBED + POOL]
    truth = data.target[rows]
    wrong = rng.permutation(len(rows)) < WRONG * len(rows)
    labels = np.where(wrong, (truth + rng.integers(1, 10, len(rows))) % 10, truth)
    table = Dataset.from_dict({"pixels": data.data[rows] / 16, "label": labels})
    table = table.cast_column("label", ClassLabel(names=[str(number) for number in range(10)]))
    probes = LinearProbes.train(None, table.select(range(PROBED)), input_column="pixels")
    selector = UncertaintySelector(probes)
    selector.select(table.select(range(PROBED, len(table))), 0.2)
    return Scored(selector.selection, data.images[rows[PROBED:]], truth[PROBED:])


def ordered(selection: Selection, order: str) -> list[int]:
    """Positions of the pool's rows, the first to look at first."""
    if order == ORDERS[0]:
        return [int(row["row_id"]) for row in selection.report().all_suspects()]
    return selection.table["u_x"].argsort(descending=order == ORDERS[1], stable=True).tolist()


def look(order: str, percent: int) -> Rows:
    """The first rows by some order, and what a budget of so many per cent of the pool chooses."""
    selection, images, truth = scored()
    selection = selection.redraw(max(10, len(truth) * percent // 100))
    chosen, labels = set(selection.plan.positions.tolist()), selection.table["label"].numpy()
    places = ordered(selection, order)
    shown = [(tile(images[i]), caption(selection, i, truth[i], i in chosen)) for i in places[:SHOWN]]
    wrong = labels != truth
    text = (
        f"**Of the {len(truth)} rows, {wrong.mean():.0%} have a wrong label; of the {len(chosen)} chosen ones, "
        f"{wrong[list(chosen)].mean():.0%}.** Of the {len(shown)} rows below, {wrong[places[:SHOWN]].sum()} are "
        "labelled wrong. The truth is known to this page alone; the probes never see it."
    )
    shows = "How unsure the probes are of all rows and of the chosen ones, and the classes of both"
    return Rows(text, tiles(shown), drawing(plot_overview(selection), shows))


def caption(selection: Selection, place: int, truth: Any, chosen: bool) -> str:
    label, vote = (int(selection.table[name][place]) for name in ("label", "predicted"))
    said = f"labelled {label}, probes say {vote}"
    said += ", is right" if label == truth else f", is a\u00a0{truth}"
    return said + (" · chosen" if chosen else "")


def tile(image: np.ndarray) -> Image.Image:
    return Image.fromarray((16 - image).astype(np.uint8) * 15).resize((96, 96), Image.Resampling.BICUBIC)
