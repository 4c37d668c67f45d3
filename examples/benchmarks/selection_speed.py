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

"""What choosing examples costs beside the frozen model: the ranker, the cascade, the aggregation of rankings.

    python examples/benchmarks/selection_speed.py --threads 2
    python examples/benchmarks/selection_speed.py --parts ranker --device cuda --precision float32 tf32 bfloat16
    python examples/benchmarks/selection_speed.py --table

ranker       Choices of a `RankerSelector` among K candidates, one pass over covering designs for k = 5 and k = 10,
             beside bare forwards of the same rankers over exactly these lists, gathered before, one batch for each k.
             They take turns; the ratio is the median over rounds. The encoder's views of the queries are there, and
             so are the pool's tokens and labels. scores_apart: largest difference between the two in a score, in
             standard deviations; more than rounding ends the run.
cascade      A `CascadeSelector` with a frozen model that answers at once: milliseconds a query, of the fastest round,
             cut into stages. Handing the chosen examples to the frozen model, which comes with its runs, is a column
             beside the sum. Images, labels and grids of the pool are in the memory of `Examples`; first_ms is a query
             of the first batch, for which they are read and drawn.
aggregation  Seconds for the rankings of `--queries` queries, of the fastest of three runs; beside them least squares
             on a Python list of directed edges, as in released code (arXiv 2405.15279), timed on `--edge_list`
             queries and multiplied.

Images are synthetic and weights random, which takes as long. One JSON line per row goes to `--out`; rows that are
there are not measured again. On a machine with other work take `--threads 1`: threads wait for each other; and, for
the cascade, `--clock processor`, which counts what this process was given.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from rows import append_rows, machine, parser_of, read_rows
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MobileNetV2Config, MobileNetV2Model, ViTConfig, ViTModel

from hf_effdl import ExamplePool, VisionEncoder, VisualInContextModel, aggregate_rankings
from hf_effdl.vicl.remote_code import cascade as cascade_module
from hf_effdl.vicl.remote_code.cascade import HEADS, CascadeSelector
from hf_effdl.vicl.remote_code.cascade_precedents import Precedents
from hf_effdl.vicl.remote_code.configuration_listwise_ranker import ListwiseRankerConfig
from hf_effdl.vicl.remote_code.examples import Examples, Queries
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.modeling_listwise_ranker import ListwiseRanker
from hf_effdl.vicl.remote_code.ranker_designs import covering_lists
from hf_effdl.vicl.remote_code.ranker_selector import RankerSelector
from hf_effdl.vicl.remote_code.visual_tasks import find_task


PARTS = ("ranker", "cascade", "aggregation")
NETS = {"released": {"legacy": True}, "default": {}}
ROUNDING = {"float32": 1e-3, "tf32": 0.1, "bfloat16": 1.0, "float16": 0.1}  # by precision, in standard deviations
LENGTHS = (5, 10)
GOALS = {"ranker": 1.3, "cascade": 20.0, "aggregation": 1.0}  # times a bare forward; milliseconds; seconds
BATCHES, PASSES, LABELLED = (1, 8), 10, 100
MEASURED = 16  # queries that a cascade is timed on
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


# ---- a pool and queries


def picture(number: int, side: int) -> tuple[Image.Image, Image.Image]:
    """A smooth photo of one ellipse, and its mask."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (2, 7, 7, 3), dtype=np.uint8)
    ground, inside = (Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in small)
    corner, size = rng.uniform(0.05, 0.4, 2) * side, rng.uniform(0.2, 0.5, 2) * side
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse([*corner, *(corner + size)], fill=1)
    ground.paste(inside, mask=mask.point(lambda value: 255 * value))
    return ground, mask


def make_encoder(grid: tuple[int, int]) -> VisionEncoder:
    """Random weights; the grid of a MobileNetV2 (14 x 14 x 96) or of a ViT (a side of 16 d)."""
    side, width = grid
    torch.manual_seed(0)
    if width == 96:
        backbone = MobileNetV2Model(MobileNetV2Config())
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):  # by default its features vanish
                nn.init.kaiming_normal_(module.weight)
        return VisionEncoder(backbone, image_size=16 * side, layer=11)
    sizes = {
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": max(1, width // 64),
    }
    return VisionEncoder(ViTModel(ViTConfig(**sizes, image_size=16 * side)))


def make_pool(encoder: VisionEncoder, count: int, folder: Path) -> ExamplePool:
    images, masks = zip(*(picture(number, encoder.image_size[0]) for number in range(count)))
    table = Dataset.from_dict({"image": list(images), "label": list(masks)})
    for name in table.column_names:
        table = table.cast_column(name, datasets.Image())
    return ExamplePool.from_dataset(table, encoder=encoder, keep_grids=True, cache_dir=folder, progress=False)


def make_queries(encoder: VisionEncoder, count: int, first: int, device: str = "cpu") -> Queries:
    images = [picture(first + number, encoder.image_size[0])[0] for number in range(count)]
    cells = pixels(images, encoder.image_size, encoder.resample)
    return Queries(cells, {name: view.to(device) for name, view in encoder(cells).items()})


def some_of(queries: Queries, part: slice) -> Queries:
    return Queries(queries.cells[part], {name: view[part] for name, view in queries.views.items()})


class Ready(nn.Module):
    """A frozen model whose answers are there before it is asked."""

    arrangements = 1

    def __init__(self, side: int) -> None:
        super().__init__()
        self.image_size = (side, side)
        masks = [picture(number, side)[1].point(lambda value: 255 * value) for number in range(64)]
        self.answers = pixels(masks, self.image_size) * 0.9 + 0.05

    def encode(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 1)

    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        return self.answers[: len(queries)]


# ---- time


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call, in changing order, after a round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            calls[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def stopwatches(
    *places: tuple[str, Any, str], clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, float]]:
    """Adds up the seconds that each `(name, object, attribute)` is running."""
    seconds = {name: 0.0 for name, _, _ in places}

    def timed(name: str, call: Callable) -> Callable:
        def wrapper(*given: Any, **named: Any) -> Any:
            start = clock()
            try:
                return call(*given, **named)
            finally:
                seconds[name] += clock() - start

        return wrapper

    with ExitStack() as stack:
        for name, place, attribute in places:
            stack.enter_context(patch.object(place, attribute, timed(name, getattr(place, attribute))))
        yield seconds


# ---- the three parts


def rank(options: argparse.Namespace, wanted: Callable[[dict], bool]) -> Iterator[dict]:
    cases = [
        {
            "part": "ranker",
            "net": net,
            "width": options.width,
            "batch": batch,
            "candidates": options.candidates,
            "device": options.device,
            "precision": precision,
        }
        for net, batch, precision in product(NETS, BATCHES, options.precision)
    ]
    if not (cases := [case for case in cases if wanted(case)]):
        return
    encoder = make_encoder((options.side, options.width))
    pool = make_pool(encoder, options.pool, options.cache)
    examples = Examples(
        pool, VisualInContextModel.from_parts(Ready(encoder.image_size[0]), encoder), find_task(pool.task)
    )
    for case in cases:
        torch.backends.cuda.matmul.allow_tf32 = case["precision"] == "tf32"
        torch.manual_seed(0)
        rankers = [
            ListwiseRanker(ListwiseRankerConfig(hidden_size=options.width, list_length=k, **NETS[case["net"]]))
            for k in LENGTHS
        ]
        selector = RankerSelector(rankers, "covering").eval().to(options.device)
        queries = make_queries(encoder, case["batch"], options.pool, options.device)
        yield case | measure_ranker(selector, queries, examples, options, case["precision"])


@torch.no_grad()
def measure_ranker(
    selector: RankerSelector, queries: Queries, examples: Examples, options: argparse.Namespace, precision: str
) -> dict:
    half = precision in ("bfloat16", "float16")

    def mixed() -> Any:
        return torch.autocast(options.device, getattr(torch, precision)) if half else nullcontext()

    def choose() -> Any:
        with mixed():
            return selector(queries, examples, 1, options.candidates)

    seen = []
    with ExitStack() as stack:
        for ranker in selector.rankers.values():

            def score_lists(*given: Any, ranker: Any = ranker, call: Any = ranker.score_lists) -> Tensor:
                seen.append((ranker, given, call(*given)))
                return seen[-1][2]

            stack.enter_context(patch.object(ranker, "score_lists", score_lists))
        choose()
    ready = [(ranker, *gathered(*given, options.device), scores) for ranker, given, scores in seen]

    def bare() -> list[Tensor]:
        with mixed():
            return [ranker(query, tokens, labels).scores for ranker, query, tokens, labels, _ in ready]

    with FlopCounterMode(display=False) as counter:
        found = bare()
    apart = [
        (one.float().cpu() - scores.flatten(0, 1)).abs().max() / scores.std()
        for one, (*_, scores) in zip(found, ready, strict=True)
    ]
    if max(apart) > ROUNDING[precision]:
        raise AssertionError(f"the lists' scores differ by {max(apart):.2g} standard deviations from a bare forward's")
    rounds = options.rounds if options.device == "cpu" else 10 * options.rounds
    seconds = take_turns({"choice": choose, "bare": bare}, rounds, options.device)
    ratios = [one / other for one, other in zip(seconds["choice"], seconds["bare"], strict=True)]
    batch = len(queries)
    return {
        "lists": {given[2].shape[2]: given[2].shape[1] for _, given, _ in seen},
        "parameters": ready[0][0].num_parameters(),
        "gflop_a_query": counter.get_total_flops() / 1e9 / batch,
        "ratio": statistics.median(ratios),
        "ratio_middle_half": statistics.quantiles(ratios, n=4)[::2],
        "ratio_of_minima": min(seconds["choice"]) / min(seconds["bare"]),
        "choice_ms": 1000 * min(seconds["choice"]) / batch,
        "bare_ms": 1000 * min(seconds["bare"]) / batch,
        "choice_median_ms": 1000 * statistics.median(seconds["choice"]) / batch,
        "rounds": rounds,
        "scores_apart": float(max(apart)),
    }


def gathered(
    query: Tensor, candidates: Tensor, lists: Tensor, labels: Tensor | None, device: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `forward` takes to score all lists `(B, L, k)` in one batch."""
    b, count = torch.arange(len(lists))[:, None, None], lists.shape[1]
    tokens, known = (
        None if part is None else part[b, lists].flatten(0, 1).to(device) for part in (candidates, labels)
    )
    return query.repeat_interleave(count, 0).to(device), tokens, known


def cascade(options: argparse.Namespace, wanted: Callable[[dict], bool]) -> Iterator[dict]:
    for side, width in options.grids:
        labelled = ("all", f"{LABELLED} x {options.candidates}")
        cases = [
            {
                "part": "cascade",
                "grid": [side, side, width],
                "head": head,
                "labels": labels,
                "answers": answers,
                "batch": batch,
                "candidates": options.candidates,
                "passes": PASSES,
                "pool": options.pool,
                "device": "cpu",
                "clock": options.clock,
            }
            for head, labels, answers, batch in product(options.heads, labelled, options.answers, BATCHES)
        ]
        if not (cases := [case for case in cases if wanted(case)]):
            continue
        encoder = make_encoder((side, width))
        pool = make_pool(encoder, options.pool, options.cache)
        queries = make_queries(encoder, MEASURED, options.pool)
        tables = made_up_labels(pool, options.candidates)
        fitted = None
        for case in cases:
            model = VisualInContextModel.from_parts(Ready(case["answers"]), encoder, candidates=options.candidates)
            examples = Examples(pool, model, find_task(pool.task))
            if fitted is None:  # where the weights are from makes no difference
                fitted = CascadeSelector(passes=PASSES).fit(
                    pool, tables["some"], model=model, examples=examples, progress=False
                )
                settings = fitted.settings(model.config)
            model.set_performance(*tables["all" if case["labels"] == "all" else "some"], pool.fingerprint)
            selector = CascadeSelector.from_settings(settings | {"head": case["head"]})
            selector.load_state_dict(fitted.state_dict(), strict=False)  # the weights of other heads stay as drawn
            yield case | measure_cascade(selector, queries, examples, case["batch"], options)


def made_up_labels(pool: ExamplePool, candidates: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random performance of every image on all others, and of some images on their nearest."""
    n, generator = len(pool), torch.Generator().manual_seed(0)
    others = torch.arange(n).expand(n, n)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    near = torch.full((n, candidates), -1)
    near[:LABELLED] = pool.search(pool.vectors[:LABELLED], candidates, exclude=torch.arange(n)[:LABELLED])[1]
    return {
        name: (rows, torch.rand(rows.shape, generator=generator)) for name, rows in (("all", others), ("some", near))
    }


def measure_cascade(
    selector: CascadeSelector, queries: Queries, examples: Examples, batch: int, options: argparse.Namespace
) -> dict:
    parts = [some_of(queries, slice(start, start + batch)) for start in range(0, len(queries), batch)]

    clock = CLOCKS[options.clock]

    def run(some: Iterable[Queries]) -> float:
        start = clock()
        for part in some:
            selector(part, examples, 1, options.candidates)
        return clock() - start

    selector.precedents(examples)  # made once
    first = run(parts[:1]) / batch
    run(parts)
    rounds = []
    for _ in range(options.rounds):
        with stopwatches(
            ("search", examples.pool, "search"),
            ("first", cascade_module, "first_columns"),
            ("matches", examples, "matches"),
            ("row model", Precedents, "columns"),
            ("grids", examples, "grids"),
            ("handing", examples, "answers"),
            clock=clock,
        ) as seconds:
            whole = run(parts)
        rounds.append((whole - seconds["handing"], seconds))
    total, best = min(rounds, key=lambda one: one[0])
    each = {name: 1000 * value / len(queries) for name, value in best.items()}
    total *= 1000 / len(queries)
    stage1 = each["search"] + each["first"]
    return {
        "total_ms": total,
        "matching_ms": each["matches"] - each["grids"],
        "row_model_ms": each["row model"],
        "grids_ms": each["grids"],
        "stage1_rest_ms": stage1 - each["matches"] - each["row model"],
        "stage2_ms": total - stage1,
        "handing_ms": each["handing"],
        "median_ms": 1000 * statistics.median(one for one, _ in rounds) / len(queries),
        "first_ms": 1000 * first,
        "rounds": len(rounds),
    }


def aggregation(options: argparse.Namespace, wanted: Callable[[dict], bool]) -> Iterator[dict]:
    k, generator = options.candidates, torch.Generator().manual_seed(0)
    ways = [(method, way) for method in ("hodge", "borda") for way in ("batched", "one by one")]
    cases = [
        {
            "part": "aggregation",
            "method": method,
            "way": way,
            "queries": options.queries,
            "candidates": k,
            "device": "cpu",
        }
        for method, way in (*ways, ("hodge", "edge list"))
    ]
    if not (cases := [case for case in cases if wanted(case)]):
        return
    lists = [covering_lists(k, length, batch=options.queries, generator=generator) for length in LENGTHS]
    noisy = torch.arange(k).flip(0) + 3 * torch.randn(
        options.queries, sum(part.shape[1] for part in lists), k, generator=generator
    )
    ranked = []
    for part, value in zip(lists, noisy.split([part.shape[1] for part in lists], 1), strict=True):
        best_first = part.gather(2, value.gather(2, part).argsort(2, descending=True))
        ranked.append(nn.functional.pad(best_first, (0, max(LENGTHS) - part.shape[2]), value=-1))
    every = torch.cat(ranked, 1)
    for case in cases:
        method, timed = case["method"], every[: options.edge_list] if case["way"] == "edge list" else every
        call = {
            "batched": lambda: aggregate_rankings(timed, k, method),
            "one by one": lambda: torch.stack([aggregate_rankings(one, k, method) for one in timed]),
            "edge list": lambda: torch.stack([edge_list(one, k) for one in timed]),
        }[case["way"]]
        apart = float((call() - aggregate_rankings(timed, k, method)).abs().max())
        if apart > 1e-9:
            raise AssertionError(f"scores of {method}, {case['way']}, differ by {apart:.2g} from the batched ones")
        seconds = min(take_turns({"all": call}, 3, "cpu")["all"])
        yield case | {
            "seconds": seconds * options.queries / len(timed),
            "timed": len(timed),
            "apart": apart,
            "lists": every.shape[1],
        }


def edge_list(lists: Tensor, num_items: int) -> Tensor:
    """Least squares of (c_ij - c_ji) / (c_ij + c_ji) on every directed edge, weighted by c_ij."""
    edges, counts = [], []
    for row in lists.tolist():
        row = [item for item in row if item >= 0]
        for upper, lower in ((row[i], row[j]) for i in range(len(row)) for j in range(i + 1, len(row))):
            if (upper, lower) in edges:
                counts[edges.index((upper, lower))] += 1
            else:
                edges.append((upper, lower))
                counts.append(1)
    differences, target = np.zeros((len(edges), num_items)), np.zeros(len(edges))
    for number, (upper, lower) in enumerate(edges):
        differences[number, upper], differences[number, lower] = 1, -1
        other = counts[edges.index((lower, upper))] if (lower, upper) in edges else 0
        target[number] = (counts[number] - other) / (counts[number] + other)
    weighted = differences.T * np.array(counts)
    return torch.from_numpy(np.linalg.lstsq(weighted @ differences, weighted @ target, rcond=1e-5)[0])


# ---- rows


MEASURE = {"ranker": rank, "cascade": cascade, "aggregation": aggregation}
KEYS = (
    "part",
    "net",
    "width",
    "grid",
    "head",
    "labels",
    "answers",
    "method",
    "way",
    "batch",
    "queries",
    "candidates",
    "passes",
    "pool",
    "precision",
    "device",
    "threads",
    "platform",
    "clock",
)


def key(row: dict) -> str:
    return str({name: row.get(name, USUAL.get(name)) for name in KEYS})


COLUMNS = {
    "ranker": (
        "net",
        "batch",
        "precision",
        "gflop_a_query",
        "ratio",
        "ratio_middle_half",
        "ratio_of_minima",
        "choice_ms",
        "bare_ms",
        "load",
    ),
    "cascade": (
        "clock",
        "grid",
        "head",
        "labels",
        "answers",
        "batch",
        "total_ms",
        "matching_ms",
        "row_model_ms",
        "grids_ms",
        "stage1_rest_ms",
        "stage2_ms",
        "handing_ms",
        "median_ms",
        "first_ms",
        "load",
    ),
    "aggregation": ("method", "way", "queries", "seconds", "timed", "load"),
}


USUAL = {"clock": "wall"}  # of rows that do not say so


def print_tables(rows: list[dict]) -> None:
    for part, columns in COLUMNS.items():
        mine = [row for row in rows if row["part"] == part]
        for said in dict.fromkeys((row["device_name"], row["threads"], row["torch"], row["date"]) for row in mine):
            device, threads, version, date = said
            print(f"\n{part}: {device}, {threads} threads, torch {version}, {date}\n")
            print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
            for row in mine:
                if (row["device_name"], row["threads"], row["torch"], row["date"]) == said:
                    print("| " + " | ".join(shown(row.get(name, USUAL.get(name))) for name in columns) + " |")


def shown(value: Any) -> str:
    if isinstance(value, list):
        whole = all(isinstance(one, int) for one in value)
        return " x ".join(map(str, value)) if whole else " to ".join(map(shown, value))
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def goal_reached(row: dict) -> bool | None:
    if row["part"] == "ranker":
        return row["ratio"] <= GOALS["ranker"] if row["device"] == "cpu" else row["choice_ms"] <= 3
    if row["part"] == "cascade":
        timed = row["grid"][2] == 96 and row.get("clock", "wall") == "wall"
        return row["total_ms"] <= GOALS["cascade"] if timed else None
    return row["seconds"] <= GOALS["aggregation"] if row["way"] != "edge list" else None


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "selection_speed")
    parser.set_defaults(threads=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cpu", help="of the ranker; the rest is measured on the CPU")
    parser.add_argument("--precision", nargs="+", choices=ROUNDING, default=["float32"], help="of the ranker")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--width", type=int, default=768, help="of the ranker, and of its pool's encoder")
    parser.add_argument("--side", type=int, default=16, help="of that encoder's grid")
    parser.add_argument(
        "--grids",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        default=[(14, 96), (16, 768)],
        help="side x width, for the cascade",
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS, help="of the cascade")
    parser.add_argument("--answers", nargs="+", type=int, default=[56, 448], help="pixels a side of F's answers")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of the cascade")
    parser.add_argument("--pool", type=int, default=500)
    parser.add_argument("--queries", type=int, default=1000, help="of the aggregation")
    parser.add_argument("--edge_list", type=int, default=5, help="queries that the edge list is timed on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/selection_speed"), help="for the pools")
    options = parser.parse_args(arguments)
    rows = read_rows(options.out)
    if not options.table:
        torch.set_num_threads(options.threads)
        done, about = {key(row) for row in rows}, machine()
        name = torch.cuda.get_device_name(options.device) if options.device != "cpu" else f"{about['cpus']} CPUs"
        for part in options.parts:
            load = os.getloadavg()[0]
            for row in MEASURE[part](options, lambda case: key(case | about) not in done):
                row |= {"goal_reached": goal_reached(row), "load": load, "device_name": name} | about
                append_rows(options.out, [row])
                rows.append(row)
                print(f"{part}: {', '.join(f'{name}={row[name]}' for name in COLUMNS[part])}", flush=True)
                load = os.getloadavg()[0]
    print_tables(rows)


if __name__ == "__main__":
    main()
