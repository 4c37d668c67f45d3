# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "pillow>=11",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which example to show: how much of the gap from the nearest to the best of the 50 nearest each strategy closes.

600 photos of pets (Oxford-IIIT Pet, three breeds; data folder: HF_EFFDL_DATA), squashed to 224 x 224. The frozen
in-context model carries an example's label over by matching 14 x 14 features of an ImageNet MobileNetV2 (layer 11);
three ways of matching fail in three ways. Labels are averaged to 56 x 56, where answers are scored.

- segmentation: the animal without its border. A permutation of the photos is rotated six times: 100 queries and a pool
  of 500, each photo a query once.
- detection: the 296 photos with a head box; 100 queries and a pool of 190 of every permutation.
- Near duplicates of a query are not in its pool (`splits/`, written by `make_splits.py`).
- colourisation: the difference between colours and grey is carried over; as in segmentation, lower is better.

    python examples/benchmarks/vicl_pets.py                        # all of it: about two hours on one thread
    python examples/benchmarks/vicl_pets.py --tasks segmentation --frozen soft --seeds 1
    python examples/benchmarks/vicl_pets.py --table

Examples are chosen by the package's strategies, cascades and rankers on pools of its own. What the frozen model does
with every pair of photos is computed once (`--cache`, which is to be deleted when the frozen model changes), set as
the measured performance of each pool, and looked up; the first queries of every task are run through the pipeline,
too, which must give the same. Rows go to `--out` as one JSON line per (task, frozen, seed, arm); rows already there
are skipped.
"""

import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from ranker_arms import ranker_orders
from rows import RowFile, machine, parser_of
from torch import Tensor
from torch.nn import functional as F
from vicl_arms import ARMS, CANDIDATES, FEW, TEN, arms_of_query, cascade_arms, places_of, print_tables

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    FeatureMatching,
    VisionEncoder,
    VisualInContextModel,
    VisualInContextPipeline,
    read_splits,
)
from hf_effdl.vicl.remote_code.examples import Examples, Queries
from hf_effdl.vicl.remote_code.frozen_matching import GREY
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.strategies import STRATEGIES
from hf_effdl.vicl.remote_code.strategy_check import check_strategies
from hf_effdl.vicl.remote_code.visual_tasks import Colourisation, Detection, Segmentation


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
PHOTOS, FOLDS, LAYER = 600, 6, 11
SHRINK = 4  # label cells and answers: 224 / 4
BLOCK = 50  # pairs of one call of the frozen model
CHECKED = 3  # queries that the pipeline answers, too
BUDGET = 100  # pool images that the small label budget measures 50 examples on each
BATCH = 10  # queries of one call of a selector
SPLITS = Path(__file__).parent / "splits"  # see make_splits.py
MATCHINGS = {
    "segmentation": ("soft", "nearest", "prototype"),
    "detection": ("soft", "nearest", "prototype"),
    "colourisation": ("soft", "nearest"),
}
SEEDS = {"segmentation": 3, "detection": 10, "colourisation": 3}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- tasks and frozen model at 56 x 56


class SmallMasks:
    """Masks are drawn at the photo's size, and every cell is the mean of what it covers: no ties at one half."""

    def labels(self, labels: Sequence, images: Sequence, size: tuple[int, int]) -> Tensor:
        drawn = [self.label(*pair) for pair in zip(labels, images, strict=True)]
        return pixels(drawn, tuple(side // SHRINK for side in size), Image.Resampling.BOX)


class SmallSegmentation(SmallMasks, Segmentation):
    pass


class SmallDetection(SmallMasks, Detection):
    pass


class SmallColourisation(Colourisation):
    """Colours are those of the photo as the encoder sees it, averaged like the grey image."""

    def labels(self, labels: Sequence, images: Sequence, size: tuple[int, int]) -> Tensor:
        return F.avg_pool2d(super().labels(labels, images, size), SHRINK)


TASKS = {task.name: task for task in (SmallSegmentation(), SmallDetection(), SmallColourisation())}


class SmallMatching(FeatureMatching):
    """Answers at the size of the small labels; with `colours` as `carry="difference"` does, which needs full size.

    A label less the grey image is carried over as a label in [0, 1], and added to the grey query.
    """

    def __init__(self, encoder: VisionEncoder, matching: str, colours: bool) -> None:
        super().__init__(encoder, matching)
        self.colours = colours

    def encode(self, images: Tensor) -> Tensor:
        if images.dim() == 2:  # encoded already
            return images
        encoded = super().encode(images)
        if not self.colours:
            return encoded
        weights = torch.tensor(GREY).view(1, 3, 1, 1)
        return torch.cat([encoded, F.avg_pool2d((images * weights).sum(1), SHRINK).flatten(1)], 1)

    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        if not self.colours:
            return super().predict(queries, images, labels, arrangement)
        size = labels.shape[3:]
        features = queries.shape[1] - size.numel()
        shown = images[..., features:].unflatten(2, (1, *size))
        half = super().predict(queries[:, :features], images[..., :features], (labels - shown) / 2 + 0.5, arrangement)
        return (2 * half - 1 + queries[:, features:].unflatten(1, (1, *size))).clamp(0, 1)


# ---- photos


def head_box(file: Path, width: int) -> list[int]:
    """`[x0, y0, x1, y1]` in an image of this width, from an annotation of the original."""
    root = ElementTree.parse(file).getroot()
    scale = width / int(root.findtext("size/width"))
    return [round(scale * int(root.findtext(f"object/bndbox/{side}"))) for side in ("xmin", "ymin", "xmax", "ymax")]


def read_photos(task: str, count: int) -> Dataset:
    """Paths of images and trimaps, of which 1 is the animal, or boxes."""
    folder = DATA / "pets"
    images = sorted((folder / "images").iterdir())
    if task == "detection":
        images = [file for file in images if (folder / "xmls" / f"{file.stem}.xml").is_file()]
    images = images[:count]
    columns: dict[str, list] = {"image": [str(file) for file in images]}
    if task == "segmentation":
        columns["label"] = [str(folder / "trimaps" / f"{file.stem}.png") for file in images]
    elif task == "detection":
        columns["label"] = [head_box(folder / "xmls" / f"{file.stem}.xml", Image.open(file).width) for file in images]
    return Dataset.from_dict(columns)


@dataclass
class Photos:
    """All photos of a task with a frozen model: what it sees of each, and its answers' scores for each pair."""

    pool: ExamplePool
    model: VisualInContextModel
    encoded: Tensor  # (n, ...)
    labels: Tensor  # (n, 3, 56, 56), also the truth
    scores: Tensor  # (n, n): of the query in the row with the example in the column, as the task counts
    names: list[str]
    near: Tensor | None = None  # (n, n, 8) dense matches

    @property
    def task(self):
        return TASKS[self.pool.task]

    def good(self) -> Tensor:
        return self.scores if self.task.greater_is_better else -self.scores

    def views(self, photos: Tensor) -> dict[str, Tensor]:
        gh, gw = self.grid
        grids = self.encoded[photos][:, : gh * gw * self.depth].unflatten(1, (gh, gw, self.depth))
        return {"vector": self.pool.vectors[photos], "tokens": self.pool.tokens(photos), "grid": grids}

    @property
    def grid(self) -> tuple[int, int]:
        side = self.pool.encoder["image_size"][0] // 16
        return side, side

    @property
    def depth(self) -> int:
        size = self.labels.shape[2:].numel() * self.model.frozen.colours
        return (self.encoded.shape[1] - size) // (self.grid[0] * self.grid[1])

    def predict(self, query: int, examples: Tensor) -> Tensor:
        """Answers to a query: `examples (K, m)` photos to `(K, 3, 56, 56)`, each shown m."""
        asked = self.encoded[query]
        parts = [
            self.model.frozen.predict(asked.expand(len(part), -1), self.encoded[part], self.labels[part])
            for part in examples.split(BLOCK)
        ]
        return torch.cat(parts)


def prepare(task: str, matching: str, data: Dataset, encoder: VisionEncoder, cache: Path) -> Photos:
    """Encode all photos and score all pairs; kept in `cache`."""
    pool = ExamplePool.from_dataset(
        data,
        encoder=encoder,
        task=task,
        foreground=1 if task == "segmentation" else None,
        cache_dir=cache / "pools",
        progress=False,
    )
    frozen = SmallMatching(encoder, matching, task == "colourisation")
    model = VisualInContextModel.from_parts(frozen, task=task)
    small = TASKS[task]
    images = [pool.image(row) for row in range(len(pool))]
    labels = torch.cat(
        [small.labels([pool.label(row)], [images[row]], encoder.image_size) for row in range(len(pool))]
    )
    key = f"{task}-{pool.fingerprint[:12]}"
    file = cache / f"{key}.pt"
    if file.is_file():
        encoded = torch.load(file, weights_only=True)
    else:
        seen = pixels([small.query(image) for image in images], encoder.image_size, encoder.resample)
        encoded = torch.cat([frozen.encode(part) for part in seen.split(32)])
        torch.save(encoded, file)
    names = [Path(name).name for name in data["image"]]
    photos = Photos(pool, model, encoded, labels, torch.zeros(len(pool), len(pool)), names)
    photos.near = match_all(photos, cache / f"{key}-matches.pt")
    file = cache / f"{key}-{matching}.pt"
    if file.is_file():
        photos.scores = torch.load(file, weights_only=True)
        return photos
    start, everyone = time.perf_counter(), torch.arange(len(pool))[:, None]
    for query in range(len(pool)):
        painted = photos.predict(query, everyone)
        photos.scores[query] = small.score(painted, labels[query].expand_as(painted))
        if query % 100 == 99:
            say(
                f"{task}, {matching}: {query + 1} of {len(pool)} photos with all others, "
                f"{time.perf_counter() - start:.0f} s"
            )
    torch.save(photos.scores, file)
    return photos


def match_all(photos: Photos, file: Path) -> Tensor:
    """Dense matches of all photos with all others: the same for every frozen model and pool."""
    if file.is_file():
        return torch.load(file, weights_only=True)
    examples, everyone = Known(photos.pool, photos, torch.arange(0)), torch.arange(len(photos.pool))
    start, parts = time.perf_counter(), []
    for photo in everyone:
        views = photos.views(photo[None])
        parts.append(torch.cat([Examples.matches(examples, views, part[None])[0] for part in everyone.split(BLOCK)]))
    near = torch.stack(parts)
    torch.save(near, file)
    say(f"{photos.task.name}: dense matches of {near.shape[0]} photos, {time.perf_counter() - start:.0f} s")
    return near


# ---- a pool and its queries


class Known(Examples):
    """Examples whose encodings, and scores on a batch of queries, are known beforehand."""

    def __init__(self, pool: ExamplePool, photos: Photos, queries: Tensor) -> None:
        super().__init__(pool, photos.model, photos.task)
        self.photos, self.queries = photos, queries
        self.members = torch.tensor([int(id) for id in pool.ids], dtype=torch.long)

    def encoded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.members[rows]
        return self.photos.encoded[chosen], self.photos.labels[chosen]

    def small_labels(self, rows: Tensor) -> Tensor:
        return self.photos.labels[self.members[rows]]

    def grids(self, rows: Tensor) -> Tensor:
        return self.photos.views(self.members[rows.flatten()])["grid"].flatten(1, 2).unflatten(0, rows.shape)

    def matches(self, views: dict[str, Tensor], rows: Tensor) -> Tensor:
        # a photo is known by its vector, whether it is a query or one of the pool that is learnt from
        asked = (views["vector"] @ self.photos.pool.vectors.T).argmax(1)
        return self.photos.near[asked[:, None], self.members[rows]]

    def measure(self, queries: Queries, rows: Tensor) -> Tensor:
        return self.photos.good()[self.queries[:, None], self.members[rows]]

    def set_performance(self, labels_each: int | None, images: int | None = None) -> None:
        """As `measure_examples` would: `labels_each` nearest others (None: all) of every image, or of so many."""
        n = len(self.pool)
        _, candidates = self.pool.search(self.pool.vectors, labels_each or n - 1, exclude=torch.arange(n))
        table = self.photos.good()[self.members[:, None], self.members[candidates]]
        if images is not None:
            left_out = torch.randperm(n, generator=torch.Generator().manual_seed(0))[images:]
            candidates[left_out], table[left_out] = -1, 0
        self.model.set_performance(candidates, table, self.pool.fingerprint)


def splits(task: str, count: int, seed: int, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries and pools."""
    order = np.random.RandomState(seed).permutation(count)
    if task == "detection":
        queries = min(100, count // 3)
        return [(order[:queries], order[queries : queries + 190])]
    size = count // FOLDS
    return [
        (order[k * size : (k + 1) * size], np.delete(order, slice(k * size, (k + 1) * size))) for k in range(folds)
    ]


def without_copies(photos: Photos, queries: np.ndarray, members: np.ndarray, seed: int, fold: int) -> np.ndarray:
    """The pool without near duplicates of the queries, by the committed split, which must be this one."""
    task = "-detection" if photos.task.name == "detection" else ""
    if len(photos.names) != {"": PHOTOS, "-detection": 296}[task]:
        return members
    split = read_splits(SPLITS / f"pets{task}.json").get(f"seed {seed}" + ("" if task else f", fold {fold}"))
    if split is None:  # more seeds than are committed
        return members
    if {photos.names[query] for query in queries} != set(split.queries):
        raise AssertionError(f"the queries of seed {seed}, fold {fold} are not those of the split file")
    return np.array([member for member in members if photos.names[member] in set(split.pool)])


def learned_arms(known: Known, batch: Queries, heads: Sequence[str]) -> tuple[dict, dict, dict[str, str]]:
    """What cascades of both label budgets choose: arm -> rows, best first; arm of a mean -> rows and weights.

    Also the strategy that the pool's own images speak for, with the cascade and where none was fitted.
    """
    rows: dict[str, Tensor] = {}
    weighted: dict[str, tuple] = {}
    auto: dict[str, str] = {}
    for labels, budget in (("", (None, None)), (", 100 x 50 labels", (CANDIDATES, BUDGET))):
        known.set_performance(*budget)
        for head in heads if not labels else ("ridge",):
            cascade = CascadeSelector(known.model, passes=TEN, head=head)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # plain consensus fails with a biased model: a row of the table
                cascade.fit(known.pool, examples=known, progress=False)
            kind = labels + (", list-wise heads" if head == "listwise" else "")
            if not kind:
                for arm, selector in (("auto", cascade), ("auto, without a cascade", None)):
                    auto[arm] = check_strategies(known, CANDIDATES, selector)["strategy"]
            chosen, means = cascade_arms(cascade, batch, known, kind, BATCH)
            rows, weighted = rows | chosen, weighted | means
    return rows, weighted, auto


def run_fold(
    photos: Photos, queries: Tensor, members: Tensor, folder: Path, check: bool, rankers: bool = False
) -> dict[str, float]:
    """Means over the queries of every arm; with `rankers`, also of those that take minutes to train."""
    shutil.copytree(photos.pool.folder, folder)
    pool = ExamplePool(folder)
    keep = set(members.tolist())
    pool.remove([row for row in range(len(pool)) if row not in keep])
    known = Known(pool, photos, queries)
    batch = Queries(photos.encoded[queries], photos.views(queries), photos.labels[queries])
    task = photos.task

    def choose(strategy: str, count: int) -> Tensor:
        return STRATEGIES[strategy](batch, known, count, CANDIDATES)[1]

    candidates = choose("nearest", CANDIDATES)
    rows = {"nearest": candidates[:, :TEN], "dense": choose("dense", TEN), "oracle": choose("oracle", FEW)}
    known.set_performance(CANDIDATES)
    rows["transfer, 50 labels each"] = choose("transfer", FEW)
    known.set_performance(None)
    rows["transfer"] = choose("transfer", FEW)
    quality, order = STRATEGIES["static"](batch, known, len(pool), CANDIDATES)
    quality = torch.empty_like(quality).scatter_(1, order, quality).gather(1, candidates)
    rows["quality inside the 50"] = candidates.gather(1, quality.argmax(1)[:, None])
    learned, weighted, auto = learned_arms(known, batch, ("ridge", "listwise") if rankers else ("ridge",))
    rows |= learned
    rows |= {arm: rows[strategy] for arm, strategy in auto.items()}
    if rankers:
        known.set_performance(CANDIDATES - 1)
        table = known.model.measured_candidates.long(), known.model.measured_performance
        grids = photos.views(known.members)["grid"]
        orders = ranker_orders(
            batch.views["tokens"], batch.views["grid"], pool.tokens(torch.arange(len(pool))), grids, candidates, *table
        )
        rows |= {name: candidates.gather(1, order[:, :1]) for name, order in orders.items()}
    if check:
        compare_with_pipeline(photos, pool, queries, known, rows)
    means = {name: (places_of(chosen, candidates), weights) for name, (chosen, weights) in weighted.items()}
    places = {name: places_of(chosen, candidates) for name, chosen in rows.items()}
    scores = photos.scores[queries[:, None], known.members]
    found: dict[str, list[float]] = {}
    for i, query in enumerate(queries.tolist()):
        painted = photos.predict(query, known.members[candidates[i]][:, None])
        truth = photos.labels[query]
        fused = {name: (chosen[i], weights[i]) for name, (chosen, weights) in means.items()}
        one = arms_of_query(task, painted, truth, {name: chosen[i] for name, chosen in places.items()}, fused)
        if abs(one["oracle"] - one["oracle of the 50"]) > 1e-5:
            raise AssertionError("the best in the table of scores is not the best of the answers")
        one |= {"random": scores[i].mean().item(), "static": scores[i, order[i, 0]].item()}
        for name in ("nearest", "dense"):
            joint = photos.predict(query, known.members[rows[name][i, :FEW]][None])[0]
            one[f"{name} 5, in one call"] = float(task.score(joint, truth))
        if task.name == "colourisation":
            grey = photos.encoded[query, -truth[0].numel() :].view(1, *truth.shape[1:]).expand_as(truth)
            one["grey copy"] = float(task.score(grey, truth))
        for name in ARMS:
            if name in one:
                found.setdefault(name, []).append(one[name])
    shutil.rmtree(folder)
    return {name: float(np.mean(values)) for name, values in found.items()}


def compare_with_pipeline(
    photos: Photos, pool: ExamplePool, queries: Tensor, known: Known, rows: dict[str, Tensor]
) -> None:
    """The pipeline on the photos themselves chooses the same examples, and its answers score what was looked up."""
    pipe = VisualInContextPipeline(model=photos.model, pool=pool)
    pipe.visual_task = pipe.label_task = photos.task
    pipe.examples = Examples(pool, photos.model, photos.task)
    some = queries[:CHECKED].tolist()
    images = [photos.pool.image(query) for query in some]
    labels = [photos.pool.label(query) for query in some]
    known.set_performance(None)
    for strategy in ("nearest", "dense", "transfer", "oracle", "cascade"):
        chosen = rows[strategy][:CHECKED]
        if strategy == "cascade":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cascade = CascadeSelector(photos.model, passes=TEN).fit(pool, examples=known, progress=False)
            photos.model.set_selector(cascade)
        for m, fusion in ((1, "mean"), (FEW, "mean"), (FEW, "model")):
            options = {"strategy": strategy, "num_examples": m, "fusion": fusion}
            answers = pipe(images, labels=labels, **options)
            ids = [[pool.ids[row] for row in some_rows[:m]] for some_rows in chosen.tolist()]
            if [answer["example_ids"] for answer in answers] != ids:
                raise AssertionError(f"{options}: the pipeline chose {[a['example_ids'] for a in answers]}, not {ids}")
            painted = pipe.forward(pipe.preprocess({"images": images, "labels": labels}), **options)["painted"]
            here = photos.task.score(painted, photos.labels[some])
            members = known.members[chosen[:, :m]]
            there = photos.scores[some, members[:, 0]]
            if m > 1:
                shown = [member[None] if fusion == "model" else member[:, None] for member in members]
                fused = torch.stack([photos.predict(*pair).mean(0) for pair in zip(some, shown, strict=True)])
                there = photos.task.score(fused, photos.labels[some])
            if not torch.allclose(here, there, atol=2e-3):
                raise AssertionError(f"{options}: the pipeline scores {here.tolist()}, the table {there.tolist()}")
    photos.model.set_selector(None)
    if photos.model.frozen.colours:  # and is the package's own form, where labels have full size
        frozen = photos.model.frozen
        model = FeatureMatching(frozen.encoder, frozen.matching, carry="difference")
        encoded = model.encode(
            pixels([photos.task.query(image) for image in images], model.image_size, model.resample)
        )
        shown = encoded.flip(0)[:, None], pixels(images, model.image_size).flip(0)[:, None]
        if not torch.allclose(model.predict(encoded, *shown), frozen.predict(encoded, *shown), atol=1e-5):
            raise AssertionError("SmallMatching carries another difference than FeatureMatching")
    say(f"{photos.task.name}, {photos.model.frozen.matching}: the pipeline agrees on {len(some)} queries")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "vicl_pets")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--frozen", nargs="+", choices=MATCHINGS["segmentation"], default=MATCHINGS["segmentation"])
    parser.add_argument("--seeds", type=int, help="permutations; default: 3, in detection 10")
    parser.add_argument("--folds", type=int, default=FOLDS, help="rotations of a permutation")
    parser.add_argument("--photos", type=int, default=PHOTOS, help="only the first so many")
    parser.add_argument(
        "--rankers",
        type=int,
        default=1,
        metavar="SEEDS",
        help="seeds of which list-wise rankers are trained, for segmentation, soft",
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/vicl_pets"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, ("task", "frozen", "photos", "seed"))
    if options.table:
        return print_tables([r for r in file.rows if r["task"] in options.tasks and r["frozen"] in options.frozen])
    options.cache.mkdir(parents=True, exist_ok=True)
    encoder = VisionEncoder.from_pretrained(str(DATA / "weights" / "mobilenet_v2_1.0_224"), layer=LAYER)
    for task in options.tasks:
        for matching in (name for name in MATCHINGS[task] if name in options.frozen):
            photos = None
            for seed in range(options.seeds or SEEDS[task]):
                if (task, matching, options.photos, seed) in file:
                    continue
                start = time.perf_counter()
                photos = photos or prepare(task, matching, read_photos(task, options.photos), encoder, options.cache)
                folds = []
                with tempfile.TemporaryDirectory(dir=options.cache) as folder:
                    for queries, members in splits(task, len(photos.pool), seed, options.folds):
                        inside = Path(folder) / f"fold-{len(folds)}"
                        kept = without_copies(photos, queries, members, seed, len(folds))
                        parts = torch.from_numpy(queries), torch.from_numpy(kept)
                        # minutes a fold
                        rankers = (task, matching) == ("segmentation", "soft") and seed < options.rankers
                        folds.append(run_fold(photos, *parts, inside, check=not seed and not folds, rankers=rankers))
                of = {"task": task, "frozen": matching, "photos": options.photos, "seed": seed}
                found = [
                    of
                    | {
                        "arm": arm,
                        "passes": ARMS[arm],
                        "metric": photos.task.metric,
                        "folds": [round(fold[arm], 5) for fold in folds],
                    }
                    | machine()
                    for arm in folds[0]
                ]
                file.add(*found)
                say(f"{task}, {matching}, seed {seed}: {len(found)} arms, {time.perf_counter() - start:.0f} s")
    print_tables(file.rows)


if __name__ == "__main__":
    main()
