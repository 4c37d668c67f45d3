# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""The recipe of `trainer.train_small` on MNIST beside other orders by the same recipe, and beside no order at all.

The recipe: the dense net trains until the units that the budget would keep no longer change, at most a fifth of the
run; the others are cut out, batch norm is re-estimated, and the small net has the rest of the epochs on a whole
schedule of its own. Nets, rows and schedules are those of
`structure_mnist.py`, by default the conv-BN net on 10,000 images shrunk to 14x14; 11 epochs in all for every arm but
those "at equal MACs".

- path, group lasso (same unit), global L2, random: the order that cuts; all search for as many steps as the path does;
- even order: by the same scores, with widths halfway to one share of every layer (`order="even"`, which
  `train_small` takes);
- uniform widths, widths between: one share of every layer, and the geometric mean of that and the path's widths;
- refitted: the layers behind the cut are refitted by least squares on 512 training images (`calibration=`);
- new weights, path's widths: the small net starts from new weights; the search is paid for its widths alone;
- Fisher, OBS: as many units of every layer as the path keeps, chosen by what the net that the path trained does on 512
  training images (`score=`);
- random order, path's widths: as many, drawn at random;
- paths averaged: three searches from the same weights, on the rows in three orders, and the mean of their V; what is
  cut is the net of the first. The search costs three times as much;
- Gram's ridge: what pulls on a unit, and feeds its V, is weighted by the mean square of what the layers behind are
  given by it, relative to that of its layer's units, measured at every look;
- scratch: new weights for all of the epochs, with the path's widths or with one share of every layer (uniform);
- scratch, equal MACs: the same with as many training MACs as the path's recipe takes, search included.

    python examples/benchmarks/recipe_mnist.py --seeds 6 7 8 9 10
    python examples/benchmarks/recipe_mnist.py --table

Rows go to `--out` as one JSON line per finished (net, budget, arm, seed); rows already there are skipped. Training
MACs are counted in those of the dense net's 11 epochs; what calibration and batch norm take is left out.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from rows import RowFile, machine, mean_and_error, parser_of
from structure_mnist import MNIST, ROWS, SETTINGS, Task, accuracy, lasso_prox, mnist, path_of, rates, sgd, train
from torch import Tensor
from trainer_rows import Classifier
from transformers.utils import logging

from hf_effdl import SparsePath, SplitLBI, derive_path, find_groups, recalibrate_batch_norm, slim
from hf_effdl.structure.calibration.compensate import Wish, compensate
from hf_effdl.structure.path.settling import Settling, pack


WITHIN, LOOKS = 0.2, 50  # the bound of a search, and how often a run is looked at
SETTLED = {"threshold": 0.05, "window": 3, "patience": 1, "min_path": 0.4}
BUDGETS = (0.25, 0.1)
CALIBRATION = 512
OURS = "path"
DEFAULT = "path, even order"  # what `train_small` does
# arm -> (what trains the dense net, what orders the units); scratch arms have neither
REFITTED, EVEN = ", refitted", ", even order"
PATHS = ("path", "gram")
SEARCHES = 3  # that are averaged
RECIPE = {
    "path": ("path", "dual"),
    "group lasso": ("lasso", "norm"),
    "global L2": ("sgd", "l2"),
    "random": ("sgd", "random"),
    "new weights, path's widths": ("path", "dual"),
    "path, even order": ("path", "dual"),
    "group lasso, even order": ("lasso", "norm"),
    "global L2, even order": ("sgd", "l2"),
    "path, uniform widths": ("path", "uniform"),
    "path, widths between": ("path", "between"),
    "random order, path's widths": ("path", "drawn"),
    "random order, uniform widths": ("path", "drawn uniform"),
    "Fisher, path's widths": ("path", "fisher"),
    "OBS, path's widths": ("path", "obs"),
    "paths averaged": ("path", "averaged"),
    "paths averaged, even order": ("path", "averaged"),
    "path, Gram's ridge": ("gram", "dual"),
    "path, Gram's ridge, even order": ("gram", "dual"),
}
RECIPE |= {arm + REFITTED: RECIPE[arm] for arm in ("path", "group lasso", "global L2", "random")}
SCRATCH = (
    "scratch, path's widths",
    "scratch, uniform widths",
    "scratch, path's widths, equal MACs",
    "scratch, uniform widths, equal MACs",
)
ARMS = (*RECIPE, *SCRATCH)
KEYS = ("net", "budget", "arm", "seed", "within", "stretch")


@dataclass
class Run:
    """What all arms of one net share."""

    net: str
    data: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    within: float = WITHIN
    stretch: float = 1.0
    task: Task = field(default_factory=lambda: MNIST)
    given: dict[str, float] | None = None  # settings of a net that is not of `structure_mnist.py`

    @property
    def named(self) -> dict[str, float]:
        """What tells this run's rows from others, where it is not the default."""
        named = {"within": self.within, "stretch": self.stretch}
        return {name: value for name, value in named.items() if value != getattr(Run, name)}

    @property
    def epoch(self) -> int:
        return len(self.data[0]) // self.task.batch

    @property
    def settings(self) -> dict[str, float]:
        return self.given or SETTINGS[self.net]

    @property
    def steps(self) -> int:
        return (self.settings["epochs"] + self.settings["tune"]) * self.epoch

    def accuracy(self, model: Classifier) -> float:
        return accuracy(model.net, *self.test, self.task)

    def rows(self, count: int, size: int) -> list[dict[str, Tensor]]:
        parts = zip(*(part[:count].split(size) for part in self.data), strict=True)
        return [{"pixel_values": images, "labels": labels} for images, labels in parts]

    def fit(self, model: Classifier, lrs: list[float], seed: int, **options: Any) -> None:
        optimizer = options.pop("optimizer", None) or sgd(model, self.settings["weight_decay"])
        train(model.net, optimizer, lrs, self.data, seed, task=self.task, **options)


@dataclass
class Found:
    """A dense net where its search stopped."""

    model: Classifier
    groups: Sequence[Any]
    optimizer: Any
    step: int
    settled: bool
    lifted: list[dict]
    distances: list[float | None] = field(default_factory=list)  # between the selections of the last looks


class Stop(Exception):
    """The selection has settled, or the search is as long as it may be."""


class GramRidge:
    """Makes the ridge of a path, and what feeds V, that of the weighted penalty `sum_j h_j |W_j - Gamma_j|^2 / 2 nu`.

    `h_j` is the mean square of what unit j gives to the layers behind it, over the mean of its group.
    """

    def __init__(self, model: Classifier, groups: Sequence[Any], images: Tensor, optimizer: SplitLBI) -> None:
        self.model, self.images, self.optimizer = model, images, optimizer
        self.groups = {group.name: group for group in groups}
        self.lifted = [group for group in optimizer.param_groups if group["penalty"]]
        self.weights: dict[str, Tensor] = {}
        self.gaps = [self.gap(group) for group in self.lifted]

    def gap(self, group: dict) -> list[Tensor]:
        """W - Gamma."""
        return [(p - self.optimizer.gamma(p)).detach() for p in group["params"]]

    @torch.no_grad()
    def after_step(self, measure: bool) -> None:
        """Add to the step that was made, from the gap before it, what a weight of one leaves out."""
        for group, gaps in zip(self.lifted, self.gaps, strict=True):
            more = self.weights.get(group["name"])
            for p, gap, axis in zip(group["params"], gaps, group["axis"], strict=True):
                if more is not None:
                    shape = [-1 if dim == axis else 1 for dim in range(p.ndim)]
                    part = gap * more.view(shape) * group["lr"] / group["nu"]
                    p.sub_(part, alpha=group["kappa"])
                    self.optimizer.state[p]["dual"].add_(part, alpha=group["path_scale"])
        self.renew_norms()
        if measure:
            self.weights = {name: self.energy(group) - 1 for name, group in self.groups.items()}
        self.gaps = [self.gap(group) for group in self.lifted]

    def renew_norms(self) -> None:
        for group in self.lifted:
            parts = zip(group["params"], group["axis"], group["scale"], strict=True)
            rows = [
                scale * self.optimizer.dual(p).movedim(axis, 0).reshape(p.shape[axis], -1) for p, axis, scale in parts
            ]
            self.optimizer.state[group["params"][0]]["norm"].copy_(torch.cat(rows, 1).norm(dim=1))

    @torch.no_grad()
    def energy(self, group: Any) -> Tensor:
        """By unit, with a mean of one."""
        given: list[Tensor] = []
        layers = {part.tensor.rpartition(".")[0] for part in group.slices if part.role == "input"}
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda _, args: given.append(args[0]))
            for name in layers
        ]
        self.model.eval()(self.images)
        self.model.train()
        for hook in hooks:
            hook.remove()
        squares = sum(x.reshape(len(x), group.units, -1).square().mean((0, 2)) for x in given)
        return squares / squares.mean()


def more(run: Run, seed: int, budget: float, until: int, number: int) -> SparsePath:
    """The path of another search, from the same weights."""
    found = search(run, "path", seed, budget, until=until, order=3000 + 10 * seed + number)
    return SparsePath.from_optimizer(found.optimizer, found.groups)


def averaged(paths: Sequence[SparsePath]) -> SparsePath:
    """The first, with the mean of all V's norms."""
    first = paths[0]
    units = {name: dict(unit) for name, unit in first.units.items()}
    for name, unit in units.items():
        unit["dual"] = torch.stack([path.units[name]["dual"] for path in paths]).mean(0)
    return SparsePath(first.groups, units, first.step)


def search(run: Run, how: str, seed: int, budget: float, until: int | None = None, order: int | None = None) -> Found:
    """Train a dense net until the path's selection has settled, or up to a step; `order` is that of the rows."""
    lrs = rates(run.net, run.steps, run.settings["lr"])[: int(run.within * run.steps)]
    torch.manual_seed(seed)
    model = Classifier(run.task.place(run.task.build(run.net)))
    groups = find_groups(model, {"pixel_values": run.data[0][:1]})
    decay = run.settings["weight_decay"]
    lifted = [{**group.param_group(), "weight_decay": decay} for group in groups if group.lifted]
    if how not in PATHS:
        after = lasso_prox(lifted, run.settings["lasso"]) if how == "lasso" else None
        run.fit(model, lrs, seed, after_step=after, until=until)
        return Found(model, groups, None, until, False, lifted)
    owned = {name for group in groups for name in group.lifted}
    rest = [(p, p.ndim > 1) for name, p in model.named_parameters() if name not in owned]
    params = [{"params": [p for p, d in rest if d == flag], "weight_decay": decay * flag} for flag in (True, False)]
    optimizer = SplitLBI(lifted + [group for group in params if group["params"]], lr=0.1, **derive_path(sum(lrs)))
    settling, every, seen = Settling(**SETTLED), max(1, round(run.steps / LOOKS)), []

    weighted = GramRidge(model, groups, run.data[0][:CALIBRATION], optimizer) if how == "gram" else None

    def look(lr: float) -> None:
        seen.append(lr)
        if weighted:
            weighted.after_step(measure=len(seen) % every == 0)
        if len(seen) == until:
            raise Stop
        if len(seen) % every or until:
            return
        kept = SparsePath.from_optimizer(optimizer, groups).select(macs=budget)
        masks = [torch.zeros(group.units, dtype=torch.bool) for group in groups if group.name in kept]
        for mask, index in zip(masks, kept.values(), strict=True):
            mask[index] = True
        if settling.note(len(seen), sum(seen) / sum(lrs), pack(torch.cat(masks))):
            raise Stop

    settled = False
    try:
        run.fit(model, lrs, seed if order is None else order, optimizer=optimizer, after_step=look)
    except Stop:
        settled = True
    return Found(model, groups, optimizer, len(seen), settled, lifted, [look["distance"] for look in settling.looks])


def macs_of(groups: Sequence[Any], kept: dict[str, Tensor]) -> float:
    network = groups[0].network
    return network.count(groups, {name: len(index) for name, index in kept.items()})["macs"] / network.count()["macs"]


def uniform(groups: Sequence[Any], budget: float) -> dict[str, Tensor]:
    """The largest one share of every layer's units that holds the budget."""
    for share in range(1000, 0, -1):
        kept = {group.name: torch.arange(max(1, group.units * share // 1000)) for group in groups}
        if macs_of(groups, kept) <= budget:
            return kept
    raise ValueError(f"no share of every layer is {budget:.0%} of the MACs")


def between(groups: Sequence[Any], some: dict[str, int], others: dict[str, int], budget: float) -> dict[str, int]:
    """The geometric means of two widths of every layer, times what holds the budget best."""
    most = {group.name: group.units for group in groups}
    for scale in range(2000, 0, -1):
        wanted = {name: round((size * others[name]) ** 0.5 * scale / 1000) for name, size in some.items()}
        sizes = {name: min(max(size, 1), most[name]) for name, size in wanted.items()}
        if macs_of(groups, {name: torch.arange(size) for name, size in sizes.items()}) <= budget:
            return sizes
    raise ValueError(f"no widths are {budget:.0%} of the MACs")


def drawn(kept: dict[str, Tensor], groups: Sequence[Any], seed: int) -> dict[str, Tensor]:
    """As many units of every layer, at random."""
    generator = torch.Generator().manual_seed(seed)
    units = {group.name: group.units for group in groups}
    return {
        name: torch.randperm(units[name], generator=generator)[: len(index)].sort().values
        for name, index in kept.items()
    }


def by_recipe(run: Run, arm: str, seed: int, budget: float, ours: Found) -> tuple[Classifier, dict]:
    """The small net as it is cut, and the row's facts."""
    how, scoring = RECIPE[arm]
    found = ours if how == "path" else search(run, how, seed, budget, until=ours.step)
    facts = {"dense": run.accuracy(found.model)}
    trained = {"model": found.model, "groups": found.groups, "optimizer": found.optimizer}
    path, order = path_of("dual" if how in PATHS else scoring, trained, seed)
    if scoring == "averaged":
        path = averaged([path, *(more(run, seed, budget, ours.step, order) for order in range(1, SEARCHES))])
        facts["searches"] = SEARCHES
    kept = path.select(macs=budget, order="even" if arm.endswith(EVEN) else order)
    images = run.rows(CALIBRATION, 128)
    if scoring in ("uniform", "between", "drawn uniform"):
        sizes = {name: len(index) for name, index in uniform(found.groups, budget).items()}
        if scoring == "between":
            sizes = between(found.groups, {name: len(index) for name, index in kept.items()}, sizes, budget)
        scores = path.scores(order)
        kept = {name: scores[name].topk(size).indices.sort().values for name, size in sizes.items()}
    if scoring.startswith("drawn"):
        kept = drawn(kept, found.groups, seed)
    if scoring in ("fisher", "obs"):
        wishes = {name: Wish(len(index)) for name, index in kept.items()}
        kept = compensate(found.model, found.groups, wishes, images, score=scoring).kept
    small = slim(found.model, found.groups, kept, calibration=images if arm.endswith(REFITTED) else None)
    if arm.startswith("new weights"):
        renew(small, seed)
    recalibrate_batch_norm(small.net, run.data[0][:4000].split(1000))
    return small, facts | {"before": run.accuracy(small), "kept": kept}


def from_scratch(arm: str, seed: int, budget: float, ours: Found, kept: dict[str, Tensor]) -> tuple[Classifier, dict]:
    if "uniform" in arm:
        kept = uniform(ours.groups, budget)
    return renew(slim(ours.model, ours.groups, kept), seed), {"kept": kept}


def renew(model: Classifier, seed: int) -> Classifier:
    torch.manual_seed(1000 + seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def one_row(run: Run, arm: str, seed: int, budget: float, searched: Callable[..., Found]) -> dict:
    start = time.perf_counter()
    ours = searched(seed, budget)
    chosen = SparsePath.from_optimizer(ours.optimizer, ours.groups).select(macs=budget)
    left = run.steps - ours.step
    if arm in RECIPE:
        small, facts = by_recipe(run, arm, seed, budget, ours)
        steps, spent = round(run.stretch * left), ours.step * facts.pop("searches", 1)
    else:
        small, facts = from_scratch(arm, seed, budget, ours, chosen)
        steps, spent = run.steps, 0
    kept = facts.pop("kept")
    macs = macs_of(ours.groups, kept)
    if arm.endswith("equal MACs"):
        steps = round((ours.step + run.stretch * left * macs_of(ours.groups, chosen)) / macs)
    run.fit(small, rates(run.net, steps, run.settings["lr"]), 2000 + seed)
    facts |= {"after": run.accuracy(small), "macs": macs, "cost": (spent + steps * macs) / run.steps}
    facts |= {"found": ours.step / run.steps, "settled": ours.settled, "steps": steps}
    facts["distances"] = ours.distances if arm == OURS else None
    facts["units"] = {name: len(index) for name, index in kept.items()}
    row = {"net": run.net, "budget": budget, "arm": arm, "seed": seed} | run.named
    return row | facts | {"seconds": time.perf_counter() - start}


def add_rows(run: Run, seeds: Sequence[int], budgets: Sequence[float], arms: Sequence[str], file: RowFile) -> None:
    """Those that are missing."""
    searched = lru_cache(1)(lambda seed, budget: search(run, "path", seed, budget))
    for seed, budget, arm in product(seeds, budgets, arms):
        key = {"net": run.net, "budget": budget, "arm": arm, "seed": seed} | run.named
        if file.key_of(key) not in file:
            row = one_row(run, arm, seed, budget, searched) | machine()
            file.add(row, hide=("platform", "units", "distances"))


# ---- table


def table(rows: list[dict]) -> None:
    for cell in sorted({cell_of(row) for row in rows}, reverse=True):
        of = {(row["arm"], row["seed"]): row for row in rows if cell_of(row) == cell}
        ours = DEFAULT if any(arm == DEFAULT for arm, _ in of) else OURS
        seeds = sorted({seed for arm, seed in of if arm == ours})
        net, budget, within, stretch = cell
        more = "" if within == WITHIN else f", search within {within:.0%} of the steps"
        more += "" if stretch == 1 else f", the small net for {stretch:g} times the steps left"
        print(f"\n{net}, {budget:.0%} of the MACs{more}: {len(seeds)} seeds ({', '.join(map(str, seeds))})")
        print(f"| arm | accuracy % at the cut | after | {ours} ahead by (SE) | training MACs | search |")
        print("|---|---|---|---|---|---|")
        for arm in ARMS:
            mine = [of[arm, seed] for seed in seeds if (arm, seed) in of]
            if mine:
                print(line(arm, mine, [of[ours, row["seed"]] for row in mine], len(seeds)))


def cell_of(row: dict) -> tuple:
    return row["net"], row["budget"], row.get("within", WITHIN), row.get("stretch", 1.0)


def line(arm: str, mine: list[dict], ours: list[dict], seeds: int) -> str:
    def mean(key: str, digits: int = 2) -> str:
        return f"{statistics.mean(row[key] for row in mine):.{digits}f}" if key in mine[0] else "-"

    ahead, error = mean_and_error([one["after"] - row["after"] for one, row in zip(ours, mine, strict=True)])
    name = arm if len(mine) == seeds else f"{arm} ({len(mine)} of {seeds} seeds)"
    search = mean("found") if arm in RECIPE else "-"
    apart = f"{ahead:+.2f} ({error:.2f})" if len(mine) > 1 else f"{ahead:+.2f}"
    return f"| {name} | {mean('before', 1)} | {mean('after')} | {apart} | {mean('cost')} | {search} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "recipe_mnist")
    parser.add_argument("--net", choices=sorted(SETTINGS), default="bn14")
    parser.add_argument("--seeds", type=int, nargs="*", default=[6, 7, 8, 9, 10])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS, metavar="ARM", help="only these arms")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--within", type=float, default=WITHIN, help="share of the steps that a search may take")
    parser.add_argument("--stretch", type=float, default=1.0, help="times the steps left that the small net trains")
    parser.add_argument("--rows", type=int, help="training rows")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    file = RowFile(options.out, KEYS)
    if options.table:
        return table(file.rows)
    images, labels = mnist("train", options.net)
    options.rows = options.rows or ROWS.get(options.net, 20_000)
    run = Run(options.net, (images[: options.rows], labels[: options.rows]), mnist("test", options.net))
    run.within, run.stretch = options.within, options.stretch
    add_rows(run, options.seeds, options.budgets, options.arms, file)
    table(file.rows)


if __name__ == "__main__":
    main()
