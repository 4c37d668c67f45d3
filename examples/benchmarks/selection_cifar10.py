# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which rows of CIFAR-10 to train on, in the setting of COPS' released code: its choice, and what costs less.

The first 1,000 images of each class train probes, the other 40,000 are the pool. All nets are ResNet-20. The one that
is judged trains from scratch on the chosen rows: 150 epochs of AdamW (rate 1e-3, weight decay 5e-4, 256 a step), the
rate along a cosine that falls, rises and falls in 50 epochs each; crops and mirror images; losses weighted within a
step. Arms, by what has to be trained before:

    uniform            nothing; as many rows of each class
    COPS, y            ten nets of 100 epochs that differ by their seed; the released recipe, with labels by class
    COPS, x            the same without labels, from the whole pool
    COPS, y, 1/10      the recipe with labels by eight nets of 12 epochs on bootstrap samples: a tenth of the passes
    default            this package's preset by those eight nets
    CCS, DUAL, D2      one net of `--pool-epochs` epochs on the pool: strata of the AUM without the hardest fifth;
                       the highest DUAL scores; the AUM spread over five neighbours in the net's features

The README of the released code has 57.97 % (uniform), 61.82 % (y) and 61.22 % (x) for 3,000 rows and one seed, of
images with width and height exchanged, which are not exchanged here.

    python examples/benchmarks/selection_cifar10.py --device cuda             # 3,000 rows, 10 and 30 % of the pool
    python examples/benchmarks/selection_cifar10.py --labels aggregate        # labels that people gave, 9 % wrong
    python examples/benchmarks/selection_cifar10.py --check --work runs/check --out runs/check.jsonl   # tiny, a minute
    python examples/benchmarks/selection_cifar10.py --table

A training on 3,000 rows is 450,000 passes of one image, about ten minutes on one CPU core with bfloat16; the ten
probes are 10 million passes. Images and labels are looked for in `cifar10-travel` under HF_EFFDL_DATA. Nets' answers
are kept in `--work`; rows go to `--out` as one JSON line per (labels, rows, arm, seed); rows there are skipped.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretrained_resnet20 import ResNet20
from rows import RowFile, machine, mean_and_error, parser_of
from selection_arms import CCS, FREE, plan
from structure_cifar10 import DATA, augment, cifar10, on_device, people
from torch import Tensor, nn

from hf_effdl import default_plan, paper_plan
from hf_effdl.samples.probes.scoring import score_batch
from hf_effdl.samples.scores.dynamics import aum, dual, row_dynamics
from hf_effdl.samples.scores.noise import fit_likelihoods


CLASSES, EACH = 10, 1000  # rows of a class that train probes
BUDGETS = (3000, 4000, 12_000)
AUTHORS, OURS = (10, 100, False), (8, 12, True)  # nets, epochs, on bootstrap samples
NEIGHBOURS = 5
KEYS = ("labels", "rows", "arm", "seed")
CHECK = {
    "each": 12,
    "pool": 300,
    "budgets": (60,),
    "seeds": (0,),
    "epochs": 1,
    "pool_epochs": 2,
    "probe_epochs": 0.02,
    "test": 100,
}

Rows = tuple[Tensor, Tensor]  # images and labels
Start = Callable[[nn.Module, int], tuple[torch.optim.Optimizer, Any]]


# ---- training


def as_student(net: nn.Module, epochs: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs // 3))


def as_probe(net: nn.Module, epochs: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = [round(share * epochs) for share in (0.3, 0.6, 0.9)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, steps)


def fit(
    rows: Rows,
    weights: Tensor,
    start: Start,
    epochs: int,
    seed: int,
    size: int,
    after_epoch: Callable[[nn.Module], None] = lambda net: None,
) -> nn.Module:
    """A net trained on some rows, on their device."""
    x, y = rows
    torch.manual_seed(seed)
    net = ResNet20().to(x.device, memory_format=torch.channels_last)
    rng, (optimizer, schedule) = torch.Generator(x.device).manual_seed(seed), start(net, epochs)
    for _ in range(epochs):
        net.train()
        for part in torch.randperm(len(y), generator=rng, device=x.device).split(size):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16):
                logits = net(augment(x[part], rng)).logits
            losses = F.cross_entropy(logits.float(), y[part], reduction="none")
            ((losses * weights[part]).sum() / weights[part].sum()).backward()
            optimizer.step()
        schedule.step()
        after_epoch(net.eval())
    return net.eval()


@torch.no_grad()
def answers(net: nn.Module, x: Tensor) -> Tensor:
    """Logits, on the CPU."""
    return torch.cat([net(part).logits.float().cpu() for part in x.split(1000)])


@torch.no_grad()
def features(net: ResNet20, x: Tensor) -> Tensor:
    """What the last layer is given."""
    found: list[Tensor] = []
    handle = net.head.register_forward_pre_hook(lambda layer, args: found.append(args[0].float().cpu()))
    answers(net, x)
    handle.remove()
    return torch.cat(found)


# ---- scores


@dataclass
class Task:
    """Images, and what nets say to those of the pool; each kind of net is trained once and its answers are kept.

    Args:
        options: of the command line.
        labels: whose.
    """

    options: Any
    labels: str

    def __post_init__(self) -> None:
        images, right = cifar10("train", self.options.data)
        x, y = on_device(images, right, torch.device(self.options.device))
        each = self.options.each
        probe = torch.cat([(y == k).nonzero().flatten()[:each] for k in range(CLASSES)]).cpu()
        others = torch.ones(len(y), dtype=torch.bool)
        others[probe] = False
        pool = others.nonzero().flatten()[: self.options.pool]
        if self.labels != "clean":
            y = people(self.options.data, len(y))[self.labels].to(y)
        self.probe, self.pool = ((x[rows], y[rows]) for rows in (probe, pool))
        self.test = on_device(*(part[: self.options.test] for part in cifar10("test", self.options.data)), x.device)

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        file = self.options.work / f"{self.labels}-{len(self.probe[1])}-{len(self.pool[1])}-{name}.pt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(), f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        return torch.load(file, weights_only=True)

    def _probe(self, number: int, epochs: int, bootstrap: bool) -> Tensor:
        """What one probe says to the pool."""
        x, y = self.probe
        rng = torch.Generator().manual_seed(number)
        drawn = torch.randint(len(y), (len(y),), generator=rng) if bootstrap else torch.arange(len(y))
        net = fit((x[drawn], y[drawn]), torch.ones_like(y[drawn], dtype=torch.float32), as_probe, epochs, number, 128)
        return answers(net, self.pool[0])

    def _table(self, kind: tuple[int, int, bool], gauge: str) -> dict[str, Tensor]:
        count, epochs, bootstrap = kind
        epochs = max(1, round(epochs * self.options.probe_epochs))
        said = [
            self._kept(f"{count}x{epochs}-{i}", lambda i=i: {"z": self._probe(i, epochs, bootstrap)})["z"]
            for i in range(count)
        ]
        labels = self.pool[1].cpu()
        table = score_batch(torch.stack(said, 1), labels, gauge)
        likely = table.pop("likelihoods")
        noise = fit_likelihoods(likely, CLASSES)
        return table | {"label": labels, "p_clean": noise.posterior(likely[:, noise.place])}

    @cached_property
    def authors(self) -> dict[str, Tensor]:
        """Scores by the released code's probes, and as it computes them."""
        return self._table(AUTHORS, "drop-first")

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """Scores by a tenth of the passes."""
        return self._table(OURS, "invariant")

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """Scores of a net that trained on the pool, large where a row is hard, and its features."""
        epochs = self.options.pool_epochs
        found = self._kept(f"pool-{epochs}", lambda: self._dynamics(epochs))
        hard = -aum(found["margin"])
        scores = {"AUM (pool)": hard - hard.min(), "DUAL (pool)": dual(found["p_label"])}
        return {"label": self.pool[1].cpu(), "features": found["features"]} | scores

    def _dynamics(self, epochs: int) -> dict[str, Tensor]:
        records: list[dict[str, Tensor]] = []
        labels, ones = self.pool[1].cpu(), torch.ones_like(self.pool[1], dtype=torch.float32)

        def note(net: nn.Module) -> None:
            records.append(row_dynamics(answers(net, self.pool[0]), labels))

        net = fit(self.pool, ones, as_probe, epochs, 0, 128, note)
        found = {name: torch.stack([record[name] for record in records]) for name in ("margin", "p_label")}
        return found | {"features": features(net, self.pool[0])}

    def accuracy(self, positions: Tensor, weights: Tensor, seed: int) -> float:
        """Percent of the test images that a net is right about which trained on these rows."""
        x, y = (part[positions.to(part.device)] for part in self.pool)
        net = fit((x, y), weights.float().to(x.device), as_student, self.options.epochs, seed, 256)
        return round(100 * (answers(net, self.test[0]).argmax(1) == self.test[1].cpu()).double().mean().item(), 3)


def spread_out(scores: Tensor, points: Tensor, budget: int, neighbours: int = NEIGHBOURS) -> Tensor:
    """The rows of the highest scores, each of which lowers those of its neighbours.

    Scores first gather those of the neighbours, `s_i + sum_j w_ij s_j` with `w_ij = exp(-d_ij^2 / d^2)`, d the mean
    distance of neighbours; then the highest goes, and `s_j -= w_ij s_i`. Source: D2 pruning, arXiv 2310.07931.
    """
    near = [torch.cdist(part, points).topk(neighbours + 1, largest=False) for part in points.split(1000)]
    far, who = (torch.cat([getattr(part, name)[:, 1:] for part in near]) for name in ("values", "indices"))
    weights = (-(far / far.mean().clamp_min(1e-12)).square()).exp()
    left = scores + (weights * scores[who]).sum(1)
    chosen = []
    for _ in range(budget):
        best = int(left.argmax())
        chosen.append(best)
        left[who[best]] -= weights[best] * left[best]
        left[best] = -torch.inf
    return torch.tensor(chosen)


# ---- arms: a task, rows and a seed to positions and weights


Arm = Callable[[Task, int, int], tuple[Tensor, Tensor]]


def planned(make: Callable[[Task, int, int], Any]) -> Arm:
    def arm(task: Task, budget: int, seed: int) -> tuple[Tensor, Tensor]:
        found = make(task, budget, seed)
        return found.positions, found.weights

    return arm


def d2(task: Task, budget: int, seed: int) -> tuple[Tensor, Tensor]:
    return spread_out(task.columns["AUM (pool)"], task.columns["features"], budget), torch.ones(budget)


def by_chance(task: Task, budget: int, seed: int) -> tuple[Tensor, Tensor]:
    """As many of each class."""
    labels, rng = task.pool[1].cpu(), torch.Generator().manual_seed(seed)
    drawn = [(labels == k).nonzero().flatten() for k in range(CLASSES)]
    drawn = [rows[torch.randperm(len(rows), generator=rng)[: budget // CLASSES]] for rows in drawn]
    return torch.cat(drawn), torch.ones(sum(map(len, drawn)))


ARMS: dict[str, Arm] = {
    "uniform": by_chance,
    "default": planned(lambda task, budget, seed: default_plan(task.table, budget, seed=seed)),
    "COPS, y, 1/10": planned(lambda task, budget, seed: paper_plan(task.table, budget, seed=seed)),
    "CCS": planned(plan(score="AUM (pool)", **CCS)),
    "DUAL": planned(plan(score="DUAL (pool)", sampler="top-k", **FREE)),
    "D2": d2,
    "COPS, y": planned(lambda task, budget, seed: paper_plan(task.authors, budget, seed=seed)),
    "COPS, x": planned(lambda task, budget, seed: paper_plan(task.authors, budget, labelled=False, seed=seed)),
}


# ---- rows and the table


def table(rows: list[dict]) -> None:
    """Mean accuracy over seeds, and how far ahead of uniform rows, paired."""
    columns = sorted({(row["labels"], row["rows"]) for row in rows})
    print("test accuracy % (ahead of uniform rows ± standard error)\n")
    heads = [f"{labels}, {count:,} rows" for labels, count in columns]
    print(f"| arm | {' | '.join(heads)} | seeds |\n|---|{'---|' * (len(columns) + 1)}")
    for arm in ARMS:
        cells = [cell(rows, (*column, arm), (*column, "uniform")) for column in columns]
        seeds = {row["seed"] for row in rows if row["arm"] == arm}
        if seeds:
            print(f"| {arm} | {' | '.join(cells)} | {len(seeds)} |")


def cell(rows: list[dict], mine: tuple, other: tuple) -> str:
    found = [
        {row["seed"]: row["accuracy"] for row in rows if (row["labels"], row["rows"], row["arm"]) == key}
        for key in (mine, other)
    ]
    if not found[0]:
        return "-"
    ahead = [value - found[1][seed] for seed, value in found[0].items() if seed in found[1]]
    gap = "" if mine == other or not ahead else " ({:+.2f} ± {:.2f})".format(*mean_and_error(ahead))
    return f"{mean_and_error(list(found[0].values()))[0]:.2f}{gap}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "selection_cifar10")
    parser.add_argument("--data", type=Path, default=DATA / "cifar10-travel")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="where nets' answers are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--labels", choices=("clean", "aggregate", "worse"), default="clean")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="rows")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=tuple(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--epochs", type=int, default=150, help="of the net that is judged")
    parser.add_argument("--pool-epochs", type=int, default=30, help="of the net that CCS, DUAL and D2 look at")
    parser.add_argument("--probe-epochs", type=float, default=1.0, help="factor on the epochs of probes")
    parser.add_argument("--each", type=int, default=EACH, help="rows of a class that train probes")
    parser.add_argument("--pool", type=int, default=40_000, help="rows of the pool")
    parser.add_argument("--test", type=int, default=10_000, help="test images, the first ones")
    parser.add_argument("--check", action="store_true", help="all arms on a few rows: says whether they run")
    options = parser.parse_args(arguments)
    if options.check:
        vars(options).update(CHECK)
    torch.set_num_threads(options.threads)
    fixed = {"epochs": options.epochs, "each": options.each, "pool": options.pool, "pool epochs": options.pool_epochs}
    fixed |= {"probe epochs": options.probe_epochs, "test": options.test}
    file = RowFile(options.out, KEYS, fixed)
    if options.table:
        return table(file.rows)
    task = None
    for seed in options.seeds:
        for arm in options.arms:
            for budget in options.budgets:
                row = {"labels": options.labels, "rows": budget, "arm": arm, "seed": seed}
                if file.key_of(row) in file:
                    continue
                task, start = task or Task(options, options.labels), time.perf_counter()
                found = {"accuracy": task.accuracy(*ARMS[arm](task, budget, seed), seed)}
                found["seconds"] = round(time.perf_counter() - start, 1)
                file.add(row | fixed | found | machine(), hide=("platform",))
    table(file.rows)


if __name__ == "__main__":
    main()
