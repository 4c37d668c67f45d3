# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which channels to keep on MNIST: the path beside the baselines, at equal epochs and equal MACs.

Nets: LeNet (no batch norm, lr 0.05, tenfold down at one and two thirds, no weight decay; at the 0.1 of the released
recipe plain SGD diverges for some seeds) and a four-layer conv-BN net (lr 0.1, constant for 60 %, then linear to 0,
weight decay 5e-4 in every arm); `bn14` is the latter on half as many images, shrunk to 14x14 by means of 2x2 pixels.
Each arm trains once, removes channels physically down to 50, 25 and 10 % of the MACs, re-estimates batch norm on
training images and fine-tunes. `scratch` trains the widths that the path chose from a new init for as many epochs in
all. In arms called "refitted" the layers behind the cut are first refitted by least squares on 512 training images.
Early arms are to be compared with early ones, late with late.

    python examples/benchmarks/structure_mnist.py --net bn --seeds 5
    python examples/benchmarks/structure_mnist.py --net bn --first 6 --seeds 5 --budgets 0.25 0.1  # new seeds
    python examples/benchmarks/structure_mnist.py --net lenet --seeds 5
    python examples/benchmarks/structure_mnist.py --net lenet --recipe paper --seeds 5  # 60 epochs, nothing removed
    python examples/benchmarks/structure_mnist.py --table

Rows go to `--out` as one JSON line per finished (net, arm, seed); rows already there are skipped.
"""

import gzip
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rows import RowFile, mean_and_error, parser_of
from torch import nn

from hf_effdl import SparsePath, SplitLBI, derive_path, find_groups, param_groups, recalibrate_batch_norm, slim
from hf_effdl.structure.optim.prox import per_entry, unit_norm
from hf_effdl.structure.slim.latency import measure_latency
from hf_effdl.structure.training.arguments import LEARNING_RATES


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
BUDGETS = (0.5, 0.25, 0.1)
BATCH = 128
SETTINGS = {
    "bn": {"epochs": 8, "tune": 3, "weight_decay": 5e-4, "lr": 0.1, "lasso": 0.03, "group_norm": 1e-4},
    "bn14": {"epochs": 8, "tune": 3, "weight_decay": 5e-4, "lr": 0.1, "lasso": 0.03, "group_norm": 1e-4},
    "lenet": {"epochs": 10, "tune": 4, "weight_decay": 0.0, "lr": 0.05, "lasso": 0.03, "group_norm": 1e-4},
}
ROWS = {"bn14": 10_000}  # training images, else 20,000
# Arms called early stop the training that selects after 60 % of its epochs, where the learning rate would start to
# fall, and give the rest to the slim net.
EARLY = 0.6
# arm -> (how the net is trained, how its channels are scored)
ARMS = {
    "path, early": ("path early", "dual"),
    "path, late": ("path", "dual"),
    "path, late, entry step": ("path", "entry"),
    "path, late, distilled": ("path", "dual"),
    "path, late, AdamW": ("path adamw", "dual"),
    "same unit, magnitude, AdamW": ("adamw", "norm"),
    "paper preset": ("paper", "entry"),
    "ridge only": ("ridge", "dual"),
    "group lasso, same unit": ("lasso", "norm"),
    "group lasso, same unit, early": ("lasso early", "norm"),
    "Torch-Pruning GroupNorm": ("group norm", "group norm"),
    "global L2": ("sgd", "l2"),
    "global L2, early": ("sgd early", "l2"),
    "BN weight": ("sgd", "bn"),
    "same unit, magnitude": ("sgd", "norm"),
    "random": ("sgd", "random"),
    "Torch-Pruning GroupNorm, early": ("group norm early", "group norm"),
    "BN weight, early": ("sgd early", "bn"),
    "random, early": ("sgd early", "random"),
    "scratch, widths of path": ("path early", "dual"),
}
# the same with the layers behind refitted at the cut
REFITTED = ", refitted"
ARMS |= {f"{arm}{REFITTED}": way for arm, way in ARMS.items() if not arm.startswith(("scratch", "paper", "ridge"))}
CALIBRATION = 512  # training images that a refit is made of
OURS = "path, early"


def mnist(split: str, net: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    stem = {"train": "train", "test": "t10k"}[split]
    if not (DATA / "mnist").is_dir():
        raise SystemExit(f"no MNIST under {DATA}: put its four idx files into a folder mnist/ and set HF_EFFDL_DATA")

    def read(file: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.open(DATA / "mnist" / file).read(), np.uint8, offset=header)

    images = torch.tensor(read(f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28) / np.float32(255))
    labels = torch.tensor(read(f"{stem}-labels-idx1-ubyte.gz", 8).astype(np.int64))
    return F.avg_pool2d(images, 2) if net == "bn14" else images, labels


def build(net: str) -> nn.Sequential:
    if net == "lenet":
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 120, 5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )
    layers: list[nn.Module] = []
    for i, o, stride in ((1, 16, 2), (16, 24, 1), (24, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@dataclass
class Task:
    """What another data set changes in the loop that all arms share."""

    build: Callable[[str], nn.Module]
    batch: int = BATCH
    place: Callable[[nn.Module], nn.Module] = lambda model: model  # puts a net where the images are, in place
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] = lambda images, generator: images
    precision: Callable[[], AbstractContextManager] = nullcontext  # around every forward pass
    trained: Callable[[int, float], None] = lambda steps, start: None  # called after every training


MNIST = Task(build)


def rates(net: str, steps: int, peak: float) -> list[float]:
    if net == "lenet":
        return [peak * 0.1 ** (3 * k // steps) for k in range(steps)]
    return [peak * min(1.0, (steps - k) / (0.4 * steps)) for k in range(steps)]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, task: Task = MNIST) -> float:
    model.eval()
    with torch.no_grad(), task.precision():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(2000)])
    return 100 * (predicted == labels).double().mean().item()


def train(model, optimizer, lrs, data, seed, after_step=None, teacher=None, until=None, task=MNIST):
    """The one training loop of every arm: batches from a seeded permutation per epoch."""
    images, labels = data
    generator = torch.Generator(images.device).manual_seed(seed)
    order: torch.Tensor = torch.empty(0, dtype=torch.long)
    start = time.perf_counter()
    model.train()
    for lr in lrs[:until]:
        if len(order) < task.batch:
            order = torch.randperm(len(images), generator=generator, device=images.device)
        rows, order = order[: task.batch], order[task.batch :]
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = task.augment(images[rows], generator)
        with task.precision():
            logits = model(batch)
            loss = F.cross_entropy(logits, labels[rows])
            if teacher is not None:  # Hinton et al., arXiv 1503.02531, at temperature 4
                with torch.no_grad():
                    target = F.softmax(teacher(batch) / 4, dim=1)
                loss = 0.5 * loss + 0.5 * 16 * F.kl_div(F.log_softmax(logits / 4, 1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step(lr)
    task.trained(len(lrs[:until]), start)
    return model


def sgd(model: nn.Module, weight_decay: float) -> torch.optim.SGD:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.SGD([{"params": decayed, "weight_decay": weight_decay}, {"params": rest}], lr=0.1, momentum=0.9)


def lasso_prox(params: list[dict], strength: float):
    """Proximal step of `strength * sum_c ||z_c||` on the scaled slices of every unit."""

    @torch.no_grad()
    def prox(lr: float) -> None:
        for group in params:
            norm = unit_norm(group["params"], group["axis"], group["block"], group["scale"])
            factor = (1 - lr * strength / norm.clamp_min(1e-12)).clamp_min(0)
            for p, axis, block in zip(group["params"], group["axis"], group["block"], strict=True):
                p.mul_(per_entry(factor, p, axis, block))

    return prox


def run(how: str, net: str, seed: int, data, settings: dict, epochs: int, cache: Path, task: Task = MNIST) -> dict:
    """Train one net; returns what its arms are scored by. Nets that several arms share are kept in `cache`."""
    steps = epochs * (len(data[0]) // task.batch)
    file = cache / f"{net}-{how.replace(' ', '_')}-{settings['lr']}-{epochs}-{len(data[0])}-{seed}.pt"
    lrs, early = rates(net, steps, settings["lr"]), how.endswith(" early")
    how = how.removesuffix(" early")
    base = "adamw" if "adamw" in how else "sgd"
    if base == "adamw":
        lrs = [LEARNING_RATES["adamw"] / LEARNING_RATES["sgd"] * lr for lr in lrs]
    torch.manual_seed(seed)
    model = task.build(net)
    unit = "paper" if how == "paper" else "default"
    groups = find_groups(model, data[0][:1], unit=unit)
    model = task.place(model)
    decay = settings["weight_decay"]
    lifted = [{**group.param_group(), "weight_decay": decay} for group in groups if group.lifted]
    until = int(EARLY * steps) if early else None
    after, optimizer, pruner = None, None, None
    if how in ("path", "path adamw", "ridge", "paper"):
        if how == "paper":
            l1 = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
            params = param_groups(model, groups, weight_decay=decay, l1=l1)
            hyper = {"lam_scale": "none", "nu": 20.0}
        else:
            owned = {name for group in groups for name in group.lifted}
            rest = [(p, p.ndim > 1) for name, p in model.named_parameters() if name not in owned]
            params = lifted + [
                {"params": [p for p, d in rest if d == flag], "weight_decay": decay * flag} for flag in (True, False)
            ]
            hyper = derive_path(sum(lrs[:until]), base=base) | ({"lam": 1e9} if how == "ridge" else {})
            hyper["base"] = base
        optimizer = SplitLBI([group for group in params if group["params"]], lr=0.1, **hyper)
    else:
        optimizer = sgd(model, decay) if base == "sgd" else torch.optim.AdamW(model.parameters(), lr=lrs[0])
        if how == "lasso":
            after = lasso_prox(lifted, settings["lasso"])
        if how == "group norm":
            import torch_pruning as tp

            head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
            pruner = tp.pruner.GroupNormPruner(
                model,
                data[0][:1],
                tp.importance.GroupMagnitudeImportance(),
                ignored_layers=head,
                global_pruning=True,
                reg=settings["group_norm"],
            )
    if file.is_file():
        saved = torch.load(file, map_location=data[0].device, weights_only=True)
        model.load_state_dict(saved["model"])
        if "optimizer" in saved:
            optimizer.load_state_dict(saved["optimizer"])
        seconds = saved["seconds"]
    else:
        start = time.perf_counter()
        if pruner is not None:
            train_with_group_norm(model, optimizer, lrs, data, seed, pruner, task, until)
        else:
            train(model, optimizer, lrs, data, seed, after, until=until, task=task)
        seconds = time.perf_counter() - start
        saved = {"model": model.state_dict(), "seconds": seconds}
        if isinstance(optimizer, SplitLBI):
            saved["optimizer"] = optimizer.state_dict()
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(saved, str(file) + ".tmp")
        os.replace(str(file) + ".tmp", file)
    return {
        "model": model,
        "groups": groups,
        "optimizer": optimizer,
        "pruner": pruner,
        "seconds": seconds,
        "lifted": lifted,
        "steps_left": steps - until if early else 0,
    }


def train_with_group_norm(model, optimizer, lrs, data, seed, pruner, task, until) -> None:
    # the regulariser adds to the gradients, so it goes between backward and step
    pruner.update_regularizer()
    step = optimizer.step

    def regularised_step():
        pruner.regularize(model)
        step()

    optimizer.step = regularised_step
    train(model, optimizer, lrs, data, seed, until=until, task=task)
    optimizer.step = step


def path_of(scoring: str, trained: dict, seed: int) -> tuple[SparsePath, str]:
    """Every arm's scores as a path, so that one budget cut serves all: layer-normalised, global, weakest first."""
    model, groups, optimizer = trained["model"], trained["groups"], trained["optimizer"]
    if isinstance(optimizer, SplitLBI):
        return SparsePath.from_optimizer(optimizer, groups), scoring
    generator = torch.Generator().manual_seed(seed)
    units = {}
    with torch.no_grad():
        for group in groups:
            rows = [part for part in group.slices if part.role == "row"]  # several where layers add to one stream
            if scoring == "random":
                score = torch.rand(group.units, generator=generator)
            elif scoring == "bn":
                scales = [part for part in group.slices if part.role == "scale"]
                score = sum(model.get_parameter(part.tensor).abs() for part in scales)
            elif scoring == "norm":
                score = group.norm(model)
            elif scoring == "group norm":
                score = group_norm_score(trained["pruner"], model, group)
            else:
                score = sum(model.get_parameter(part.tensor).detach().flatten(1).norm(dim=1) for part in rows)
            score = score.detach().cpu()
            never = torch.full((group.units,), -1)
            units[group.name] = {
                "dual": score.clone(),
                "threshold": torch.ones(group.units),
                "entered": never,
                "left": never,
                "weight": score.clone(),
            }
    return SparsePath(groups, units, 0), "entry" if scoring == "random" else "dual"


def group_norm_score(pruner, model: nn.Module, group) -> torch.Tensor:
    module = model.get_submodule(group.name)
    found = pruner.DG.get_pruning_group(
        module, pruner.DG.get_pruner_of_module(module).prune_out_channels, list(range(group.units))
    )
    return pruner.importance(found).detach()


def one_row(
    net: str,
    arm: str,
    seed: int,
    data,
    test,
    settings: dict,
    cache: Path,
    task: Task = MNIST,
    budgets: Sequence[float] = BUDGETS,
) -> dict:
    how, scoring = ARMS[arm]
    trained = run(how, net, seed, data, settings, settings["epochs"], cache, task)
    model, groups, steps = trained["model"], trained["groups"], len(data[0]) // task.batch
    dense = accuracy(model, *test, task)
    row: dict = {"net": net, "arm": arm, "seed": seed, "dense": dense, "seconds": trained["seconds"]}
    path, order = path_of(scoring, trained, seed)
    if isinstance(trained["optimizer"], SplitLBI):
        inside = torch.cat(list(path.support.values())).float().mean().item()
        row["support"] = inside
    row["budgets"] = {}
    batches = data[0][:CALIBRATION].split(task.batch) if arm.endswith(REFITTED) else None
    for budget in budgets:
        kept = path.select(macs=budget, order=order)
        small = task.place(slim(model, groups, kept, calibration=batches))
        with task.precision():
            recalibrate_batch_norm(small, data[0][:4000].split(1000))
        before = accuracy(small, *test, task)
        tune = settings["tune"] * steps + trained["steps_left"]
        peak, lrs = settings["lr"] / 2, None
        if arm.startswith("scratch"):
            torch.manual_seed(1000 + seed)
            for module in small.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            tune = (settings["epochs"] + settings["tune"]) * steps
            lrs = rates(net, tune, settings["lr"])
        elif trained["steps_left"]:
            lrs = rates("bn", tune, settings["lr"])
        lrs = lrs or [peak * (1 - k / tune) for k in range(tune)]
        teacher = deepcopy(model).eval() if "distilled" in arm else None
        train(small, sgd(small, settings["weight_decay"]), lrs, data, 2000 + seed, teacher=teacher, task=task)
        counts = groups[0].network.count(groups, {name: len(index) for name, index in kept.items()})
        whole = groups[0].network.count()
        with task.precision():
            times = measure_latency([model, small], test[0][:32], repeats=9)
        row["budgets"][str(budget)] = {
            "before": before,
            "after": accuracy(small, *test, task),
            "macs": counts["macs"] / whole["macs"],
            "params": counts["params"] / whole["params"],
            "latency": times[1] / times[0],
            "units": {name: len(index) for name, index in kept.items()},
        }
    return row


def paper_row(net: str, seed: int, data, test, how: str, cache: Path) -> dict:
    """Dense and projected read-outs of the released LeNet recipe: 60 epochs, nu 20, nothing removed for good."""
    trained = run(how, net, seed, data, SETTINGS[net] | {"lr": 0.1}, 60, cache)
    model, row = (
        trained["model"],
        {"net": net, "arm": f"{how}, 60 epochs", "seed": seed, "seconds": trained["seconds"]},
    )
    row["dense"] = accuracy(model, *test)
    if how == "paper":
        optimizer, kept, total = trained["optimizer"], 0, 0
        path = SparsePath.from_optimizer(optimizer, trained["groups"])
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"] if group["penalty"] else ():
                    inside = optimizer.gamma(p) != 0
                    p.mul_(inside)
                    kept, total = kept + inside.sum().item(), total + inside.numel()
        row |= {
            "projected": accuracy(model, *test),
            "kept": kept / total,
            "support": {name: int(inside.sum()) for name, inside in path.support.items()},
        }
    return row


def paired(of: dict, arm: str, seeds: list[int], budget: str) -> tuple[float, float]:
    """How much our arm is ahead of another after fine-tuning: mean over the seeds that both have, standard error."""
    pairs = [(cell_of(of, OURS, seed, budget), cell_of(of, arm, seed, budget)) for seed in seeds]
    return mean_and_error([ours["after"] - theirs["after"] for ours, theirs in pairs if ours and theirs])


def cell_of(of: dict, arm: str, seed: int, budget: str) -> dict | None:
    return of.get((arm, seed), {}).get("budgets", {}).get(budget)


def training_macs(arm: str, schedule: tuple[int, int], macs: float) -> float:
    """Training MACs of an arm, search and small net, in those of the dense net for as many epochs in all."""
    epochs, tune = schedule
    share = 0.0 if arm.startswith("scratch") else EARLY if ", early" in arm else 1.0
    small = tune + (1 - share) * epochs
    asked = small / 3 if "distilled" in arm else 0.0  # a teacher's forward passes
    return (share * epochs + small * macs + asked) / (epochs + tune)


def arms_table(title: str, rows: list[dict], schedule: tuple[int, int]) -> None:
    """One line per arm, over the seeds that our arm has; the rows share net and settings, which are the epochs."""
    of = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({seed for arm, seed in of if arm == OURS})
    print(
        f"\n{title}: accuracy % before -> after fine-tuning, mean over {len(seeds)} seeds, "
        f"{', '.join(map(str, seeds))} (paired difference of {OURS}, SE); training MACs at 50, 25, 10 % beside the "
        "dense net's"
    )
    print(
        f"| arm | dense | {' | '.join(f'{b:.0%} MACs' for b in BUDGETS)} | training MACs | params, latency at 25 % |"
    )
    print("|---|---|" + "---|" * (len(BUDGETS) + 2))
    for arm in ARMS:
        mine = [of[arm, seed] for seed in seeds if (arm, seed) in of]
        if not mine:
            continue
        cells, costs = [f"{statistics.mean(row['dense'] for row in mine):.2f}"], []
        for budget in map(str, BUDGETS):
            there = [row["budgets"][budget] for row in mine if budget in row["budgets"]]
            if not there:
                cells.append("-"), costs.append("-")
                continue
            before, after, macs = (statistics.mean(cell[k] for cell in there) for k in ("before", "after", "macs"))
            difference, error = paired(of, arm, seeds, budget)
            fewer = "" if len(there) == len(mine) else f", {len(there)} seeds"
            cells.append(f"{before:.1f} -> {after:.2f} ({difference:+.2f}, {error:.2f}{fewer})")
            costs.append(f"{training_macs(arm, schedule, macs):.2f}")
        size = [statistics.mean(row["budgets"]["0.25"][k] for row in mine) for k in ("params", "latency")]
        name = arm if len(mine) == len(seeds) else f"{arm} ({len(mine)} seeds)"
        print(f"| {name} | {' | '.join(cells)} | {', '.join(costs)} | {size[0]:.2f}, {size[1]:.2f} |")


def table(rows: list[dict]) -> None:
    for net in sorted({row["net"] for row in rows}):
        mine = [row for row in rows if row["net"] == net]
        arms_table(net, mine, (SETTINGS[net]["epochs"], SETTINGS[net]["tune"]))
        long = {(row["arm"], row["seed"]): row for row in mine if "60 epochs" in row["arm"]}
        for _, row in sorted(long.items()):
            read = ", ".join(f"{key} {row[key]:.2f}" for key in ("dense", "projected", "kept") if key in row)
            print(f"{row['arm']}, seed {row['seed']}: {read}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "structure_mnist")
    parser.add_argument("--net", choices=sorted(SETTINGS), default="bn")
    parser.add_argument("--recipe", choices=("ours", "paper"), default="ours")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--arms", nargs="*", default=None, help="only these arms")
    parser.add_argument(
        "--budgets", nargs="*", type=float, default=BUDGETS, help="shares of the MACs, 0.25 among them"
    )
    parser.add_argument("--rows", type=int, help="training rows (the paper recipe takes all)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change a setting, for tuning")
    parser.add_argument("--validate", action="store_true", help="hold out 5000 training rows instead of the test set")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("net", "arm", "seed"))
    if options.table:
        return table(file.rows)
    settings = SETTINGS[options.net] | {name: float(value) for name, value in (s.split("=") for s in options.set)}
    settings["epochs"], settings["tune"] = int(settings["epochs"]), int(settings["tune"])
    images, labels = mnist("train", options.net)
    options.rows = options.rows or ROWS.get(options.net, 20_000)
    if options.recipe == "paper":
        options.rows = len(images)
    data, test = (images[: options.rows], labels[: options.rows]), mnist("test", options.net)
    if options.validate:
        data, test = (images[: options.rows][:-5000], labels[: options.rows][:-5000]), (images[-5000:], labels[-5000:])
    cache = options.out.parent / "cache" / ("-".join(options.set).replace(" ", "") or "default")
    arms = options.arms or [arm for arm in ARMS if not (arm.startswith("BN weight") and options.net == "lenet")]
    if options.recipe == "paper":
        arms = options.arms or ["paper, 60 epochs", "sgd, 60 epochs"]
    for seed in range(options.first, options.first + options.seeds):
        for arm in arms:
            if (options.net, arm, seed) in file:
                continue
            if options.recipe == "paper":
                row = paper_row(options.net, seed, data, test, arm.partition(",")[0], cache)
            else:
                row = one_row(options.net, arm, seed, data, test, settings, cache, MNIST, options.budgets)
            file.add(row, hide=("budgets",))
    table(file.rows)


if __name__ == "__main__":
    main()
