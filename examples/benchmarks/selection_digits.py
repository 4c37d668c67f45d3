# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "scikit-learn>=1.6",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which rows to train on: the default preset beside everything it must beat, on 8 x 8 digits.

Probe set 300, pool 1,000, test 497 rows of scikit-learn's digits; MLP 64-64-10, 200 full-batch steps of AdamW; scores
from 8 bootstrapped probes of the same kind. Flips replace 20 % of the labels by another class, in probe set and pool;
test labels are always right. A pair is a split with its own flips, probes and initialisation, which all arms of it
share. All arms train on `r` rows for equally many steps and see the same labels, those of the probe set and the pool;
those apart also train on the probe set or on the whole pool. Arms with "(pool)" need a model trained on the pool, too.

    python examples/benchmarks/selection_digits.py                      # clean and flips, r = 100 and 400: minutes
    python examples/benchmarks/selection_digits.py --cells digits-200   # r = 200
    python examples/benchmarks/selection_digits.py --few --cells large  # r = 500, 700 and 900 of 1,000
    python examples/benchmarks/selection_digits.py --few --cells tail   # class counts that fall tenfold
    python examples/benchmarks/selection_digits.py --few --cells mnist mnist-tail  # MNIST at 8 x 8: HF_EFFDL_DATA
    python examples/benchmarks/selection_digits.py --table

Long-tailed cells have a probe set of 160 and a pool of 480 (digits; what 1,797 rows allow) or of 300 and 1,000
(MNIST), and are tested twice: all classes alike, and in the pool's shares. Rows go to `--out` as one JSON line per
(cell, arm, pair); rows already there are skipped.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import RowFile, parser_of
from selection_arms import APART, ARMS, DEFAULT, ENSEMBLE, Rows, facts, print_arms, print_default, whole_pool
from torch import Tensor

from hf_effdl.samples.scores.dynamics import aum, dyn_unc, forgetting, mean_el2n, row_dynamics
from hf_effdl.samples.scores.noise import LabelNoise, confident_disagreement, fit_label_noise
from hf_effdl.samples.scores.uncertainty import (
    el2n,
    entropy,
    least_confidence,
    margin,
    mean_probability,
    p_label,
    uncertainty,
)


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
PIXELS, HIDDEN, CLASSES = 64, 64, 10
STEPS, LR = 200, 5e-3
PROBES = 8
SIDE_BY_SIDE = 16  # nets per batch; their activations then fit the cache
FALL = 10  # how many times the largest class is the smallest, in long-tailed cells


@dataclass(frozen=True)
class Cell:
    data: str  # digits or mnist
    tail: bool
    flips: float
    budget: int

    def __str__(self) -> str:
        return (
            f"{self.data}, {'long tail, ' * self.tail}{f'{self.flips:.0%} flips' if self.flips else 'clean'}, "
            f"r={self.budget}"
        )


def _cells(data: str, tail: bool, *budgets: int) -> list[Cell]:
    return [Cell(data, tail, flips, budget) for flips in (0.0, 0.2) for budget in budgets]


CELLS = {
    "digits": _cells("digits", False, 100, 400),
    "digits-200": _cells("digits", False, 200),
    "large": _cells("digits", False, 500, 700, 900),
    "tail": _cells("digits", True, 100, 200),
    "mnist": _cells("mnist", False, 100, 400),
    "mnist-large": _cells("mnist", False, 700, 900),
    "mnist-tail": _cells("mnist", True, 100, 400),
}


# ---- data


@cache
def load(data: str) -> Rows:
    if data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return torch.tensor(images / 16).float(), torch.tensor(labels).long()
    sys.path.insert(0, str(Path(__file__).parent))
    from structure_mnist import mnist

    images, labels = mnist("train")
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2)), 4).flatten(1), labels


def split(cell: Cell, pair: int) -> tuple[Rows, Rows, Rows, Tensor]:
    """Probe set, pool and test set of a pair, and the classes' shares of the pool."""
    images, labels = load(cell.data)
    rng = torch.Generator().manual_seed(1000 + pair)
    order = torch.randperm(len(labels), generator=rng)
    shares = torch.full((CLASSES,), 1 / CLASSES)
    tests = 497 if cell.data == "digits" else 2000
    probes, pools = (160, 480) if cell.tail and cell.data == "digits" else (300, 1000)
    if cell.tail:
        shares = FALL ** (-torch.arange(CLASSES) / (CLASSES - 1))
        shares = (shares / shares.sum())[torch.randperm(CLASSES, generator=rng)]
        parts: list[list[Tensor]] = [[], [], []]
        for k in range(CLASSES):
            rows = order[labels[order] == k]
            sizes = [round(probes * shares[k].item()), round(pools * shares[k].item())]
            for part, found in zip(
                parts,
                rows[: sum(sizes) + tests // CLASSES].split([*sizes, min(tests // CLASSES, len(rows) - sum(sizes))]),
                strict=True,
            ):
                part.append(found)
        probe, pool, test = (torch.cat(part) for part in parts)
    else:
        probe, pool, test = order[: probes + pools + tests].split([probes, pools, tests])

    def flipped(rows: Tensor) -> Rows:
        y = labels[rows].clone()
        wrong = torch.rand(len(y), generator=rng) < cell.flips
        other = (y + torch.randint(1, CLASSES, y.shape, generator=rng)) % CLASSES
        return images[rows], torch.where(wrong, other, y)

    return flipped(probe), flipped(pool), (images[test], labels[test]), shares


# ---- the model: many nets of one size at once


def new_nets(seed: int, count: int) -> list[Tensor]:
    """Weights of `count` MLPs, as `nn.Linear` draws them."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(fan_in: int, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=rng) * 2 - 1) / fan_in**0.5

    return [
        uniform(PIXELS, PIXELS, HIDDEN),
        uniform(PIXELS, 1, HIDDEN),
        uniform(HIDDEN, HIDDEN, CLASSES),
        uniform(HIDDEN, 1, CLASSES),
    ]


def hidden(nets: Sequence[Tensor], images: Tensor) -> Tensor:
    return torch.baddbmm(nets[1], images.expand(len(nets[0]), -1, -1), nets[0]).relu()


def logits_of(nets: Sequence[Tensor], images: Tensor) -> Tensor:
    """`(nets, rows, classes)`."""
    return torch.baddbmm(nets[3], hidden(nets, images), nets[2])


def train(
    nets: Sequence[Tensor],
    data: Rows,
    rows: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    after_step: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:
    """Net k on `data[rows[k]]` with the mean of `weights[k] * loss`, all nets side by side."""
    longest = max(map(len, rows))
    index = torch.stack([F.pad(r, (0, longest - len(r))) for r in rows])
    # padding weighs nothing
    scale = torch.stack(
        [
            F.pad((torch.ones(len(r)) if weights is None else weights[k].float()) / len(r), (0, longest - len(r)))
            for k, r in enumerate(rows)
        ]
    )
    images, labels = data[0][index], data[1][index].flatten()
    params = [p.clone().requires_grad_() for p in nets]
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    for _ in range(STEPS):
        logits = logits_of(params, images)
        if after_step is not None:
            after_step(logits.detach())
        losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(scale.shape)
        optimizer.zero_grad()
        (losses * scale).sum().backward()
        optimizer.step()
    return [p.detach() for p in params]


# ---- one pair: probes, scores, selections


@dataclass
class Pair:
    """What all arms of a pair and a noise level share; budgets too."""

    cell: Cell
    pair: int
    _trials: dict[bytes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.probe, self.pool, self.test, self.shares = split(self.cell, self.pair)

    @cached_property
    def _probes(self) -> tuple[list[Tensor], list[Tensor]]:
        rng = torch.Generator().manual_seed(2000 + self.pair)
        rows = len(self.probe[1])
        bags = [torch.randint(rows, (rows,), generator=rng) for _ in range(PROBES)]
        return train(new_nets(3000 + self.pair, PROBES), self.probe, bags), bags

    @cached_property
    def logits(self) -> Tensor:
        """Of the pool, `(rows, probes, classes)`."""
        return logits_of(self._probes[0], self.pool[0]).transpose(0, 1).contiguous()

    @cached_property
    def fit(self) -> LabelNoise:
        return fit_label_noise(mean_probability(self.logits), self.pool[1])

    @cached_property
    def table(self) -> dict[str, Tensor]:
        z, y = self.logits, self.pool[1]
        p = mean_probability(z)
        return {
            "label": y,
            "predicted": p.argmax(1),
            "u_y": uncertainty(z, y),
            "u_x": uncertainty(z),
            "p_label": p_label(z, y),
            "confidence": p.amax(1),
            "p_clean": self.fit.p_clean(p, y),
            "entropy": entropy(z),
            "one_minus_margin": 1 - margin(z),
            "least_confidence": least_confidence(z),
            "el2n": el2n(z, y),
            "u_y_drop_first": uncertainty(z, y, gauge="drop-first"),
        }

    @cached_property
    def out_of_bag(self) -> Tensor:
        """Mean prediction for the probe set by the probes that did not train on the row, `(rows, classes)`."""
        nets, bags = self._probes
        p = logits_of(nets, self.probe[0]).softmax(2)
        out = torch.ones(p.shape[:2])
        for k, bag in enumerate(bags):
            out[k, bag] = 0
        # rows that are in all bags (1 in 40) have no such prediction: flat
        return (p * out[..., None]).sum(0) / out.sum(0)[:, None].clamp(min=1) + (out.sum(0) == 0)[:, None] / CLASSES

    def trial(self, positions: Tensor, weights: Tensor) -> float:
        """Accuracy of a net trained on these rows, on the probe rows whose label is likely."""
        key = positions.numpy().tobytes()
        if key not in self._trials:
            net = train(new_nets(4000 + self.pair, 1), self.pool, [positions], [weights])
            likely = self.fit.p_clean(self.out_of_bag, self.probe[1]) >= 0.5
            right = logits_of(net, self.probe[0])[0].argmax(1) == self.probe[1]
            self._trials[key] = right[likely].double().mean().item()
        return self._trials[key]

    @property
    def own_p_label(self) -> Tensor:
        """Of the probe rows' labels, by the probes that did not train on the row."""
        return self.out_of_bag.gather(1, self.probe[1][:, None])[:, 0]

    @cached_property
    def near_median(self) -> Tensor:
        """How near a row's distance to its class centre, in the probes' hidden layers, is to the median distance.

        Source: Xia et al., "Moderate coreset", ICLR 2023.
        """
        h = hidden(self._probes[0], self.pool[0]).transpose(0, 1).flatten(1)
        y = self.pool[1]
        centres = torch.stack([h[y == k].mean(0) for k in range(CLASSES)])
        far = (h - centres[y]).norm(dim=1)
        near = -(far - far.median()).abs()
        return near - near.min()

    @cached_property
    def dynamics(self) -> dict[str, Tensor]:
        """Scores, large for hard rows, from the training of one net on the whole pool."""
        y, steps = self.pool[1], []
        train(
            new_nets(5000 + self.pair, 1),
            self.pool,
            [torch.arange(len(y))],
            after_step=lambda logits: steps.append(row_dynamics(logits[0], y)),
        )
        of = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        return {
            "EL2N": mean_el2n(of["el2n"], range(STEPS // 10)),  # early, as its authors do
            "AUM": -aum(of["margin"]),
            "forgetting": forgetting(of["margin"] > 0).float(),
            "Dyn-Unc": dyn_unc(of["p_label"]),
        }

    @property
    def columns(self) -> dict[str, Tensor]:
        """The table with the columns that come from elsewhere; scores must not be negative."""
        return self.table | {f"{name} (pool)": score - score.min() for name, score in self.dynamics.items()}

    def noise(self) -> dict[str, float]:
        confident = confident_disagreement(mean_probability(self.logits), self.pool[1])
        return {"conf10": round(confident, 4), "mix": round(self.fit.rate, 4)}


# two arms are of the other script alone
ARMS = {name: arm for name, arm in ARMS.items() if not name.startswith("likely, draw by")}
# the ones that are near the best somewhere, and the plainest
FEW = (
    DEFAULT,
    "default, no trial",
    "default, no quotas",
    "AG50: agree, min(u_x, median), p_label",
    "AG: agree, uniform, p_label",
    "likely, min(u_x, median), p_label",
    "likely, uniform, p_label",
    "uniform by class, p_label",
    "u_x, p_label, no quotas",
    "A uniform by class",
    "B uniform by class, damped",
    "D authors' recipe",
    "1 - margin, sampled",
    "EL2N of probes, CCS",
    "AUM, top (pool)",
    "AUM, CCS (pool)",
)


APART = {
    **APART,
    "whole pool": lambda pair, r, seed: whole_pool(pair, "none"),
    "whole pool, p_label": lambda pair, r, seed: whole_pool(pair, "p_label"),
}


def run(pair: Pair, cell: Cell, arms: Sequence[str]) -> list[dict]:
    """The rows of these arms in a cell; `pair` may be of another budget."""
    chosen: dict[str, tuple[Tensor, Tensor]] = {}
    rows: dict[str, dict] = {arm: {"cell": str(cell), "arm": arm, "pair": pair.pair} for arm in arms}
    seed = pair.pair
    for arm in arms:
        if arm in APART:
            chosen[arm] = APART[arm](pair, cell.budget, seed)
        elif arm in ARMS:
            found = ARMS[arm](pair, cell.budget, seed)
            chosen[arm] = found.positions, found.weights
            if arm == DEFAULT:
                rows[arm] |= facts(found, pair.noise())
    data = tuple(torch.cat(both) for both in zip(pair.pool, pair.probe, strict=True))
    # arms with the same plan share a net; nets with about equally many rows train side by side
    same: dict[tuple[bytes, bytes], list[str]] = {}
    for arm, (positions, weights) in chosen.items():
        same.setdefault((positions.numpy().tobytes(), weights.double().numpy().tobytes()), []).append(arm)
    by_size = sorted(same.values(), key=lambda alike: len(chosen[alike[0]][0]))
    for first in range(0, len(by_size), SIDE_BY_SIDE):
        batch = by_size[first : first + SIDE_BY_SIDE]
        start = [p.expand(len(batch), -1, -1) for p in new_nets(6000 + pair.pair, 1)]
        nets = train(start, data, *([chosen[alike[0]][k] for alike in batch] for k in (0, 1)))
        for alike, logits in zip(batch, logits_of(nets, pair.test[0]), strict=True):
            for arm in alike:
                rows[arm] |= measure(pair, logits)
    if ENSEMBLE in arms:
        rows[ENSEMBLE] |= measure(pair, logits_of(pair._probes[0], pair.test[0]).softmax(2).mean(0))
    return list(rows.values())


def measure(pair: Pair, scores: Tensor) -> dict[str, float]:
    right = (scores.argmax(1) == pair.test[1]).double()
    if not pair.cell.tail:
        return {"accuracy": round(right.mean().item(), 4)}
    by_class = torch.stack([right[pair.test[1] == k].mean() for k in range(CLASSES)])
    return {
        "accuracy": round(by_class.mean().item(), 4),
        "accuracy, pool's shares": round((by_class * pair.shares).sum().item(), 4),
    }


# ---- the table


def table(rows: list[dict]) -> None:
    """Mean accuracy (paired difference to the column's best arm +- standard error)."""
    columns: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for name in row:
            if name.startswith("accuracy"):
                column = columns.setdefault(row["cell"] + name.removeprefix("accuracy"), {})
                column.setdefault(row["arm"], {})[row["pair"]] = row[name]
    order = {f"{cell}": None for cells in CELLS.values() for cell in cells}
    names = sorted(columns, key=lambda name: [str(cell) in name for cell in order].index(True))
    columns = {name: columns[name] for name in names}
    print("Mean accuracy (paired difference to the best arm of the column +- standard error)\n")
    print_arms(columns, list(ARMS), [*APART, ENSEMBLE])
    shares = ("", ", pool's shares")
    print_default(
        columns, {name: [row for row in rows if name in {row["cell"] + share for share in shares}] for name in names}
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "selection_digits")
    parser.add_argument("--cells", nargs="+", choices=sorted(CELLS), help="default: digits; of --table: all there are")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--arms", nargs="*", default=None, help="only these arms")
    parser.add_argument("--few", action="store_true", help="only the arms that are near the best somewhere")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="sampler='top-k' keeps")
    file = RowFile(options.out, ("cell", "arm", "pair"))
    cells = [cell for name in options.cells or ["digits"] for cell in CELLS[name]]
    if options.table:
        return table([row for row in file.rows if not options.cells or row["cell"] in map(str, cells)])
    names = options.arms or ([*FEW, ENSEMBLE] if options.few else [*ARMS, *APART, ENSEMBLE])
    if unknown := set(names) - {*ARMS, *APART, ENSEMBLE}:
        parser.error(f"no arms {sorted(unknown)}; there are {[*ARMS, *APART, ENSEMBLE]}")
    for number in range(options.pairs):
        pairs: dict[tuple, Pair] = {}  # budgets share the probes
        for cell in cells:
            if not (arms := [arm for arm in names if (str(cell), arm, number) not in file]):
                continue
            start = time.perf_counter()
            pair = pairs.setdefault((cell.data, cell.tail, cell.flips), Pair(cell, number))
            file.add(*run(pair, cell, arms))
            print(f"{cell}, pair {number}: {len(arms)} arms, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    table(file.rows)


if __name__ == "__main__":
    main()
