# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "scikit-learn>=1.6",
#     "torch>=2.9",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Labelling in rounds: strategies side by side, the same first rows, probes and rounds for all.

Digits (64 grey values a row, a pool of 1,000, ten rounds of 20), 8 bootstrapped linear heads. What counts is the area
under the learning curve: the mean over rounds of the accuracy on 797 test rows.

    python examples/benchmarks/active_rounds.py                        # ten seeds of digits: some minutes
    python examples/benchmarks/active_rounds.py --table

Rows go to `--out` as one JSON line per (seed, strategy); rows that are there are skipped.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from rows import RowFile, machine, mean_and_error, parser_of

from hf_effdl import ActiveLearner, ColumnAnswers, LinearProbes
from hf_effdl.samples.rounds.strategies import STRATEGIES


TEST, BATCH = 797, 20


def digits(seed: int) -> tuple[Dataset, Dataset]:
    """Pool and test rows."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = Dataset.from_dict({"features": (x / 16).tolist(), "label": y.tolist()}).train_test_split(TEST, seed=seed)
    return data["train"], data["test"]


def curve(strategy: str, pool: Dataset, test: Dataset, seed: int, rounds: int) -> list[float]:
    """Accuracy after each round."""
    labels, names = torch.tensor(test["label"][:]), [str(i) for i in range(10)]

    def train(rows: Dataset, number: int) -> LinearProbes:
        return LinearProbes.train(None, rows, input_column="features", names=names, steps=100, seed=number)

    def accuracy(probes: LinearProbes) -> float:
        logits = torch.cat(list(probes.batches(test, 1024)))
        return (logits.softmax(2).mean(1).argmax(1) == labels).double().mean().item()

    options = {"batch": BATCH, "strategy": strategy, "seed": seed, "evaluate": accuracy, "batch_size": 1024}
    options["embed"] = lambda rows: torch.tensor(rows["features"][:])
    with tempfile.TemporaryDirectory() as folder:
        learner = ActiveLearner(pool, train, ColumnAnswers(), folder, **options)
        learner.run(rounds)
        return [score for _, score in learner.curve]


def print_table(rows: RowFile) -> None:
    areas = {(row["strategy"], row["seed"]): sum(row["curve"]) / len(row["curve"]) for row in rows.rows}
    seeds = sorted({seed for _, seed in areas})
    whole = {name: [areas[name, seed] for seed in seeds if (name, seed) in areas] for name in STRATEGIES}
    whole = {name: values for name, values in whole.items() if len(values) == len(seeds)}
    if not whole:
        return
    best = max(whole, key=lambda name: sum(whole[name]))
    first, last = ({n: [r["curve"][i] for r in rows.rows if r["strategy"] == n] for n in whole} for i in (0, -1))
    print(f"\ndigits, {len(seeds)} seeds; in brackets the paired difference to the best and its standard error\n")
    print("| strategy | area under the curve | first round | last round |\n|---|---|---|---|")
    for name, values in sorted(whole.items(), key=lambda one: -sum(one[1])):
        behind = mean_and_error([a - b for a, b in zip(values, whole[best], strict=True)])
        gap = "" if name == best else " ({:+.4f}, {:.4f})".format(*behind)
        ends = [mean_and_error(one[name])[0] for one in (first, last)]
        print(f"| {name} | {mean_and_error(values)[0]:.4f}{gap} | {ends[0]:.3f} | {ends[1]:.3f} |")


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "active_rounds")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    options = parser.parse_args(argv)
    rows = RowFile(options.out, ("seed", "strategy"), {"rounds": options.rounds})
    if not options.table:
        torch.set_num_threads(options.threads)
        for seed in options.seeds:
            pool, test = digits(seed)
            for strategy in options.strategies:
                if (seed, strategy) not in rows:
                    found = {"curve": curve(strategy, pool, test, seed, options.rounds), "rounds": options.rounds}
                    rows.add({"seed": seed, "strategy": strategy} | found | machine(), hide=())
    print_table(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
