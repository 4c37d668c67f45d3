# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "pillow>=11",
#     "scikit-learn>=1.6",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which example to show a SegGPT: how much of the gap from the nearest to the best of the 50 each strategy closes.

The frozen in-context model is the tiny SegGPT of `model_cards/tiny-seggpt-digits`, which segments, detects and
colourises 48 x 48 scenes of digits as one example shows. 100 queries of test digits, a pool of 300 scenes of training
digits (`examples/digit_scenes.py`), drawn anew with every seed; nearest is by the model's own features. All of it is
the package's: pool, strategies, `measure_examples` (50 nearest of every pool image, which is what static and transfer
know) and the pipeline.

    python examples/benchmarks/vicl_digits.py           # three seeds: 15 to 25 minutes on one thread
    python examples/benchmarks/vicl_digits.py --table

Random is the mean of 10 random examples. Rows go to `--out` as one JSON line per (task, frozen, seed, arm); rows
already there are skipped.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from rows import RowFile, machine, parser_of
from torch import Tensor
from transformers import SegGptForImageSegmentation
from vicl_arms import ARMS, CANDIDATES, FEW, FROM, TEN, TO, arms_of_query, cascade_arms, places_of, print_tables

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    SegGptInContext,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
)
from hf_effdl.vicl.remote_code.examples import Examples, Queries
from hf_effdl.vicl.remote_code.strategies import STRATEGIES
from hf_effdl.vicl.remote_code.visual_tasks import find_task


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from digit_scenes import TASKS, make_scenes  # noqa: E402


WEIGHTS = ROOT / "model_cards" / "tiny-seggpt-digits"
FROZEN = "tiny SegGPT"
LABELS = {"segmentation": "mask", "detection": "box", "colourisation": None}
RANDOM = 10  # examples, whose mean is the random arm
BATCH = 50  # canvases of one call
BUDGET = 100  # pool images that the small label budget measures 50 examples on each
TASK_METRICS = {name: find_task(name).metric for name in TASKS}
GOAL = 0.08  # from nearest to oracle, in IoU


class HighestScores(CascadeSelector):
    """Tries the examples of the highest scores, also where these are of one kind."""

    def shortlist(self, examples: Examples, scores: Tensor, rows: Tensor, own: Tensor | None, count: int) -> Tensor:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(model: VisualInContextModel, seed: int, count: int, pooled: int, folder: str) -> dict[str, list[float]]:
    """The score of every arm on every query."""
    task, column = model.config.task, LABELS[model.config.task]
    pool = ExamplePool.from_dataset(
        Dataset.from_list(make_scenes(pooled, "train", task, seed)),
        label_column=column,
        encoder=model.encoder,
        task=task,
        cache_dir=folder,
        progress=False,
    )
    start = time.perf_counter()
    passes = measure_examples(model, pool, candidates=CANDIDATES, progress=False)[0].numel()
    seconds = time.perf_counter() - start
    each = 1e3 * seconds / passes
    say(f"{task}, seed {seed}: labels of the pool: {passes:,} passes, {seconds:.0f} s, {each:.2f} ms each")
    pipe = VisualInContextPipeline(model=model, pool=pool)
    drawn, examples, frozen = pipe.visual_task, pipe.examples, model.frozen
    scenes = make_scenes(count, "test", task, seed)
    batch = pipe.preprocess(
        {"images": [scene["image"] for scene in scenes], "labels": [scene.get(column) for scene in scenes]}
    )
    truth = batch["truth"]
    queries = Queries(batch["cells"], model.encoder(batch["views"]), truth, seed=seed)

    def choose(strategy: str, many: int) -> Tensor:
        return STRATEGIES[strategy](queries, examples, many, CANDIDATES)[1]

    def score(rows: Tensor) -> Tensor:
        return examples.measure(queries, rows) * (1 if drawn.greater_is_better else -1)

    def answer(strategy: str, **options) -> tuple[Tensor, Tensor]:
        """Rows that the pipeline shows, and the scores of what it paints."""
        parts = [
            pipe.forward({name: value[at : at + BATCH] for name, value in batch.items()}, strategy=strategy, **options)
            for at in range(0, count, BATCH)
        ]
        rows = torch.tensor([shown for part in parts for shown in part["rows"]])
        return rows, drawn.score(torch.cat([part["painted"] for part in parts]), truth)

    candidates = choose("nearest", CANDIDATES)
    rows = {"nearest": candidates[:, :TEN], "dense": choose("dense", TEN)}
    rows["transfer, 50 labels each"] = choose("transfer", FEW)
    quality, order = STRATEGIES["static"](queries, examples, len(pool), CANDIDATES)
    quality = torch.empty_like(quality).scatter_(1, order, quality).gather(1, candidates)
    rows["quality inside the 50"] = candidates.gather(1, quality.argmax(1)[:, None])
    weighted = {}
    for labels in ("", ", 100 x 50 labels"):
        if labels:  # as measure_examples(queries=100) would leave them
            table = model.measured_candidates.clone(), model.measured_performance.clone()
            left_out = torch.randperm(pooled, generator=torch.Generator().manual_seed(seed))[BUDGET:]
            table[0][left_out], table[1][left_out] = -1, 0
            model.set_performance(*table, pool.fingerprint)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # plain consensus fails here: a row of the table
            cascade = CascadeSelector(model, passes=TEN).fit(pool, examples=examples, progress=False)
        say(f"{task}, seed {seed}: cascade{labels} fitted in {time.perf_counter() - start:.0f} s: {cascade.report}")
        chosen, means = cascade_arms(cascade, queries, examples, labels, BATCH)
        rows |= chosen
        weighted |= {name: (places_of(shown, candidates), weights) for name, (shown, weights) in means.items()}
        if not labels:
            full = cascade, model.measured_candidates.clone(), model.measured_performance.clone()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = HighestScores(model, passes=TEN).fit(pool, examples=examples, progress=False)
            rows["cascade, ten highest scores"] = cascade_arms(plain, queries, examples, "", BATCH)[0]["cascade"]
    model.set_performance(*full[1:], pool.fingerprint)
    model.set_selector(full[0])
    places = {name: places_of(chosen, candidates) for name, chosen in rows.items()}
    found: dict[str, list[float]] = {}
    asked = frozen.encode(queries.cells)
    for i in range(count):
        images, labels = examples.encoded(candidates[i])
        painted = frozen.predict(asked[i].expand_as(images), images[:, None], labels[:, None])
        fused = {name: (chosen[i], weights[i]) for name, (chosen, weights) in weighted.items()}
        one = arms_of_query(drawn, painted, truth[i], {name: chosen[i] for name, chosen in places.items()}, fused)
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    found["random"] = score(choose("random", RANDOM)).mean(1).tolist()
    found["static"] = score(order[:, :1])[:, 0].tolist()
    for strategy in ("nearest", "dense"):
        found[f"{strategy} 5, in one call"] = answer(strategy, num_examples=FEW, fusion="model")[1].tolist()
        found[f"{strategy}, two arrangements"] = answer(strategy, vote=True)[1].tolist()
    voted = answer("nearest", num_examples=FEW, fusion="model", vote=True)[1]
    found["nearest 5 in one call, two arrangements"] = voted.tolist()
    if drawn.name == "colourisation":
        found["grey copy"] = drawn.score(queries.cells, truth).tolist()
    # what was looked up is what the pipeline does
    for strategy, arm in (
        ("nearest", "nearest"),
        ("dense", "dense"),
        ("transfer", "transfer, 50 labels each"),
        ("cascade", "cascade"),
    ):
        shown, there = answer(strategy)
        if not torch.equal(shown, rows[arm][:, :1]):
            raise AssertionError(f"{strategy}: the pipeline shows other examples")
        if not torch.allclose(there, torch.tensor(found[arm]), atol=5e-3):
            raise AssertionError(f"{strategy}: the pipeline scores something else")
    return {arm: found[arm] for arm in ARMS if arm in found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "vicl_digits")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3, help="of the scenes")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--pool", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("task", "queries", "pool", "seed"))
    if not options.table:
        size = {"queries": options.queries, "pool": options.pool}
        frozen = SegGptInContext(SegGptForImageSegmentation.from_pretrained(WEIGHTS))
        for seed in range(options.seeds):
            for task in options.tasks:
                if (task, *size.values(), seed) in file:
                    continue
                start = time.perf_counter()
                model = VisualInContextModel.from_parts(frozen, task=task)
                with tempfile.TemporaryDirectory() as folder:
                    arms = run(model, seed, options.queries, options.pool, folder)
                of = {"task": task, "frozen": FROZEN, **size, "seed": seed}
                added = [
                    of
                    | {
                        "arm": arm,
                        "passes": ARMS[arm],
                        "metric": TASK_METRICS[task],
                        "folds": [round(float(np.mean(values)), 5)],
                    }
                    | machine()
                    for arm, values in arms.items()
                ]
                file.add(*added)
                say(f"{task}, seed {seed}: {len(added)} arms, {time.perf_counter() - start:.0f} s")
    rows = [row for row in file.rows if row["task"] in options.tasks]
    print_tables(rows)
    gaps = [
        statistics.mean(row["folds"][0] for row in rows if row["task"] == "segmentation" and row["arm"] == arm)
        for arm in (FROM, TO)
        if any(row["task"] == "segmentation" for row in rows)
    ]
    if gaps:
        print(f"\nsegmentation, oracle less nearest: {gaps[1] - gaps[0]:.3f} (goal: at least {GOAL})")


if __name__ == "__main__":
    main()
