"""Write the tables of docs/benchmarks from the committed rows: python docs/make_benchmarks.py [NAME ...]

Each script of examples/benchmarks that has `--table` is run on its rows; what it prints becomes
docs/benchmarks/tables/NAME.md, below a line with the hash of the rows, by which `tests/test_docs.py` sees a table that
is older than its rows. Two scripts measure nothing but times and have no `--table`; their figures stand in
model_cards/structure_cost.md.
"""

import hashlib
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev


ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "benchmarks"
RESULTS = SCRIPTS / "results"
TABLES = ROOT / "docs" / "benchmarks" / "tables"
PRINTED = (
    "structure_mnist",
    "recipe_mnist",
    "recipe_cifar10",
    "structure_cifar10",
    "tickets_mnist",
    "tickets_settling",
    "growth_mnist",
    "slim_latency",
    "pretrained_minilm",
    "pretrained_dinov2",
    "pretrained_smollm2",
    "lora_ranks_banking77",
    "lora_ranks_smollm2",
    "pretrained_resnet20",
    "selection_digits",
    "selection_banking77",
    "selection_cifar10n",
    "selection_sft",
    "active_rounds",
    "scoring_overhead",
    "sampling_scale",
    "vicl_pets",
    "vicl_digits",
    "vicl_cutouts",
    "vicl_matching",
    "vicl_classes",
    "vicl_throughput",
    "pool_scale",
    "selection_speed",
    "scaling",
    "whole",
)
# what selects as late, and as early, as the path does; the same with layers refitted at the cut
LIKE = {
    "late": (
        "random",
        "global L2",
        "BN weight",
        "group lasso, same unit",
        "Torch-Pruning GroupNorm",
        "ridge only",
        "paper preset",
    ),
    "early": (
        "random, early",
        "global L2, early",
        "BN weight, early",
        "group lasso, same unit, early",
        "Torch-Pruning GroupNorm, early",
    ),
}
REFITTED = ", refitted"
NETS = {"bn": "Conv-BN net", "bn14": "Conv-BN net, 14x14", "lenet": "LeNet"}


def printed(name: str) -> str:
    """What a script prints of its committed rows."""
    command = [sys.executable, f"{name}.py", "--table", "--out", str(RESULTS / f"{name}.jsonl")]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        command, cwd=SCRIPTS, env=os.environ | offline, check=True, capture_output=True, text=True
    ).stdout


def markdown(text: str) -> str:
    """Printed text as Markdown: tables stand apart, every other line is a paragraph of its own."""
    blocks = groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    parts = ["\n".join(lines) if table else "\n\n".join(filter(None, lines)) for table, lines in blocks]
    return "\n\n".join(part for part in parts if part)


def like_with_like(schedule: str) -> str:
    """How far the path is ahead of arms that select as late, or as early, as it does, paired over seeds."""
    lines = (RESULTS / "structure_mnist.jsonl").read_text(encoding="utf-8").splitlines()
    after = {
        (row["net"], row["arm"], row["seed"], budget): cell["after"]
        for row in map(json.loads, lines)
        for budget, cell in row.get("budgets", {}).items()
    }
    tables = [
        paired_table(net, f"path, {schedule}{refitted}", [arm + refitted for arm in LIKE[schedule]], after)
        for net in NETS
        for refitted in ("", REFITTED)
    ]
    return "\n\n".join(filter(None, tables))


def paired_table(net: str, ours: str, arms: list[str], after: dict[tuple[str, str, int, str], float]) -> str:
    seeds = sorted({seed for name, arm, seed, _ in after if (name, arm) == (net, ours)})
    if len(seeds) < 2:
        return ""
    title = f"{NETS[net]}, seeds {seeds[0]} to {seeds[-1]}: *{ours}* ahead of"
    rows = [f"| {title} | 50% MACs | 25% MACs | 10% MACs |", "|---|---|---|---|"]
    for arm in arms:
        cells = [difference(net, ours, arm, budget, after) for budget in ("0.5", "0.25", "0.1")]
        rows += [f"| {' | '.join((arm, *cells))} |"] if set(cells) != {"-"} else []
    return "\n".join(rows) if len(rows) > 2 else ""


def difference(net: str, ours: str, arm: str, budget: str, after: dict[tuple[str, str, int, str], float]) -> str:
    """Mean difference in points and its standard error over the seeds that both have."""
    pairs = [
        (value, after[net, arm, seed, budget])
        for (one, name, seed, share), value in after.items()
        if (one, name, share) == (net, ours, budget) and (net, arm, seed, budget) in after
    ]
    if len(pairs) < 2:
        return "-"
    ahead = [mine - theirs for mine, theirs in pairs]
    return f"{mean(ahead):+.2f} ({stdev(ahead) / len(ahead) ** 0.5:.2f})"


def stamp(name: str) -> str:
    """The first line of a table's file."""
    digest = hashlib.sha256((RESULTS / f"{name}.jsonl").read_bytes()).hexdigest()
    return f"<!-- made by docs/make_benchmarks.py from examples/benchmarks/results/{name}.jsonl, SHA-256 {digest} -->"


def main() -> None:
    TABLES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PRINTED:
        (TABLES / f"{name}.md").write_text(f"{stamp(name)}\n\n{markdown(printed(name))}\n", encoding="utf-8")
        print(name, flush=True)
    for schedule in LIKE:
        text = f"{stamp('structure_mnist')}\n\n{like_with_like(schedule)}\n"
        (TABLES / f"{schedule}_arms.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
