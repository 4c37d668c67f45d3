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

"""One pool of ten small classes: what is learnt over all of them, against each class by itself; and absence.

Scenes of digits (`examples/digit_scenes.py`), 14 to 23 examples of each digit, and 60 queries of test digits, each
asked with its class. The frozen model is the tiny SegGPT of `model_cards/tiny-seggpt-digits`. Every example is
measured on the others of its class. Then each query is asked for a digit that it does not show.

    python examples/benchmarks/vicl_classes.py           # three seeds: some minutes on one thread
    python examples/benchmarks/vicl_classes.py --table

Rows go to `--out` as one JSON line per (seed, arm); rows already there are skipped.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from rows import RowFile, machine, mean_and_error, parser_of
from transformers import SegGptForImageSegmentation

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    SegGptInContext,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
)


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from digit_scenes import Scene, draw_scenes, to_image  # noqa: E402


WEIGHTS = ROOT / "model_cards" / "tiny-seggpt-digits"
LEAST, SEEDS, QUERIES, FALSE_ALARMS = 14, 3, 60, 0.05
ARMS = (
    "nearest of all classes",
    "random",
    "nearest",
    "dense",
    "transfer",
    "auto",
    "cascade of each class",
    "cascade of all classes",
    "oracle",
)
EACH, SHARED = "cascade of each class", "cascade of all classes"
BY_CLASS, ONE, TEN = "cascade of all classes, weights by class", ", one pass", 10
BESIDE = (BY_CLASS, EACH + ONE, SHARED + ONE, BY_CLASS + ONE)  # what was measured after the others


def pool_scenes(seed: int) -> list[Scene]:
    """14 of the digit 0, 15 of 1 and so on."""
    scenes = draw_scenes(10 * (LEAST + 9), "train", "segmentation", seed)
    return [scene for i, scene in enumerate(scenes) if i // 10 < LEAST + scene.label]


def make_pool(scenes: Sequence[Scene], model: VisualInContextModel, folder: str) -> ExamplePool:
    rows = [
        {"image": to_image(scene.colour), "mask": Image.fromarray(np.uint8(scene.mask)), "digit": str(scene.label)}
        for scene in scenes
    ]
    return ExamplePool.from_dataset(
        Dataset.from_list(rows),
        label_column="mask",
        class_column="digit",
        encoder=model.encoder,
        keep_grids=True,
        cache_dir=folder,
        progress=False,
    )


def fitted(model: VisualInContextModel, pool: ExamplePool, by_class: bool = False) -> CascadeSelector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CascadeSelector(model, passes=TEN, by_class=by_class).fit(pool, progress=False)


def learnt(scenes: Sequence[Scene], frozen: SegGptInContext, folder: str) -> VisualInContextPipeline:
    """A pipeline whose cascade was fitted on these scenes."""
    model = VisualInContextModel.from_parts(frozen)
    pool = make_pool(scenes, model, folder)
    measure_examples(model, pool, progress=False)
    return VisualInContextPipeline(model.set_selector(fitted(model, pool)), pool=pool)


def ious(outputs: Sequence[dict], scenes: Sequence[Scene]) -> list[float]:
    pairs = [(output["prediction"] == 1, scene.mask) for output, scene in zip(outputs, scenes, strict=True)]
    return [float((found & true).sum() / max(1, (found | true).sum())) for found, true in pairs]


def run(seed: int, frozen: SegGptInContext, folder: str) -> tuple[dict[str, list[float]], dict]:
    """IoU of every arm on every query, and what came of absence."""
    examples, queries = pool_scenes(seed), draw_scenes(QUERIES, "test", "segmentation", seed)
    images, asked = [to_image(scene.colour) for scene in queries], [str(scene.label) for scene in queries]
    masks = [np.uint8(scene.mask) for scene in queries]
    pipe = learnt(examples, frozen, folder)
    found = {"nearest of all classes": ious(pipe(images, strategy="nearest"), queries)}
    for name in ("random", "nearest", "dense", "transfer", "auto", "oracle"):
        labels = masks if name == "oracle" else None
        found[name] = ious(pipe(images, strategy=name, classes=asked, labels=labels), queries)
    found["cascade of all classes"] = ious(pipe(images, classes=asked), queries)
    found["cascade of each class"] = [0.0] * len(queries)
    for digit in range(10):
        mine = [i for i, scene in enumerate(queries) if scene.label == digit]
        own = learnt([scene for scene in examples if scene.label == digit], frozen, folder)
        for i, value in zip(mine, ious(own([images[i] for i in mine]), [queries[i] for i in mine]), strict=True):
            found["cascade of each class"][i] = value
    absence = pipe.calibrate_absence(100, FALSE_ALARMS, progress=False, strategy="nearest")
    others = [str(next(c for c in range(10) if c not in (scene.label, *scene.others))) for scene in queries]
    for name, classes in (("found", asked), ("false alarms", others)):
        answers = pipe(images, classes=classes, presence=True, strategy="nearest")
        absence[name] = float(np.mean([answer["present"] for answer in answers]))
    return found, {"auto took": pipe.self_check["strategy"], **absence}


def run_by_class(seed: int, frozen: SegGptInContext, folder: str) -> dict[str, list[float]]:
    """IoU on every query where each class may depart from the weights that all share, and of one pass beside."""
    examples, queries = pool_scenes(seed), draw_scenes(QUERIES, "test", "segmentation", seed)
    images, asked = [to_image(scene.colour) for scene in queries], [str(scene.label) for scene in queries]
    model = VisualInContextModel.from_parts(frozen)
    pool = make_pool(examples, model, folder)
    measure_examples(model, pool, progress=False)
    found = {}
    for arm, by_class in ((SHARED, False), (BY_CLASS, True)):
        cascade = fitted(model, pool, by_class)
        for name, passes in ((arm, TEN), (arm + ONE, 1)):
            cascade.passes = passes
            found[name] = ious(VisualInContextPipeline(model, cascade, pool)(images, classes=asked), queries)
    found[EACH + ONE] = [0.0] * len(queries)
    for digit in range(10):
        mine = [i for i, scene in enumerate(queries) if scene.label == digit]
        own = learnt([scene for scene in examples if scene.label == digit], frozen, folder)
        own.model.selector.passes = 1
        for i, value in zip(mine, ious(own([images[i] for i in mine]), [queries[i] for i in mine]), strict=True):
            found[EACH + ONE][i] = value
    return {arm: found[arm] for arm in BESIDE}


def print_table(rows: list[dict]) -> None:
    for said in sorted({(row["date"], row["torch"], row["platform"], row["cpus"]) for row in rows}):
        print(f"measured on {said[0]}, torch {said[1]}, {said[2]}, {said[3]} CPUs")
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    print(f"mean IoU of {QUERIES} queries for each of seeds {seeds}\n")
    print("| examples | F passes | mean IoU | ahead of nearest, +- paired standard error |\n|---|---|---|---|")
    by = {arm: {row["seed"]: row["iou"] for row in rows if row["arm"] == arm} for arm in (*ARMS, *BESIDE)}
    for arm, of in by.items():
        each = [value for values in of.values() for value in values]
        lead = [a - b for seed, values in of.items() for a, b in zip(values, by["nearest"][seed], strict=True)]
        mean, error = mean_and_error(lead)
        passes = {"oracle": "all", "auto": "1 or 10"}.get(arm, "1")
        passes = "10" if arm.startswith("cascade") and not arm.endswith(ONE) else passes
        ahead = "" if arm == "nearest" else f"{100 * mean:+.1f} ± {100 * error:.1f}"
        print(f"| {arm} | {passes} | {np.mean(each):.3f} | {ahead} |")
    print()
    for arm, other in ((SHARED, EACH), (BY_CLASS, SHARED), (SHARED + ONE, EACH + ONE), (BY_CLASS + ONE, SHARED + ONE)):
        pair = [a - b for seed, of in by[arm].items() for a, b in zip(of, by[other][seed], strict=True)]
        mean, error = mean_and_error(pair)
        than = "one for each class" if other == EACH else other
        print(f"{arm}, ahead of {than}: {100 * mean:+.1f} ± {100 * error:.1f} points of IoU")
    kept = [row["absence"] for row in rows if row["arm"] == "nearest"]
    print(f"auto took {', '.join(one['auto took'] for one in kept)}")
    means = {
        name: 100 * np.mean([one[name] for one in kept])
        for name in ("false_alarm_rate", "false alarms", "found_rate", "found")
    }
    pool, queries = (
        f"{means[alarms]:.1f} % false alarms and {means[found]:.1f} % found on {where}"
        for alarms, found, where in (
            ("false_alarm_rate", "found_rate", "pool images"),
            ("false alarms", "found", "queries"),
        )
    )
    print(f"absence, asked for {100 * FALSE_ALARMS:.0f} % false alarms: {pool}, {queries}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "vicl_classes")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("seed", "arm"))
    if not options.table:
        frozen = SegGptInContext(SegGptForImageSegmentation.from_pretrained(WEIGHTS))
        for seed in range(options.seeds):
            if (seed, ARMS[-1]) in file:
                continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found, absence = run(seed, frozen, folder)
            more = {"absence": {name: value for name, value in absence.items() if not isinstance(value, list)}}
            file.add(
                *(
                    {"seed": seed, "arm": arm, "iou": [round(value, 4) for value in found[arm]], **more, **machine()}
                    for arm in ARMS
                )
            )
            print(f"seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        for seed in range(options.seeds):
            if (seed, BESIDE[-1]) not in file:
                with tempfile.TemporaryDirectory() as folder:
                    found = run_by_class(seed, frozen, folder)
                file.add(
                    *(
                        {"seed": seed, "arm": arm, "iou": [round(value, 4) for value in found[arm]], **machine()}
                        for arm in BESIDE
                    )
                )
    print_table(file.rows)


if __name__ == "__main__":
    main()
