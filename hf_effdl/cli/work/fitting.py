"""What chooses examples: a cascade or rankers, fitted on a pool and compared on other images."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainingArguments

from hf_effdl.cli.work.cost import Cost, rehearsal, size_of, tell
from hf_effdl.cli.work.prompts import load_frozen, load_pool_splits, make_pool, score_strategy
from hf_effdl.files import locked, sweep, write_json
from hf_effdl.hub.cards import markdown_table
from hf_effdl.processes import is_first
from hf_effdl.vicl.auto import ListwiseRanker, ListwiseRankerConfig
from hf_effdl.vicl.held_out import near_duplicates
from hf_effdl.vicl.measure import measure_examples
from hf_effdl.vicl.pool.pool import ExamplePool
from hf_effdl.vicl.ranking.ranker_trainer import RankerTrainer
from hf_effdl.vicl.ranking.ranking_lists import RankingLists
from hf_effdl.vicl.remote_code.cascade import CascadeSelector
from hf_effdl.vicl.remote_code.images import pixels, to_rgb
from hf_effdl.vicl.remote_code.modeling_visual_in_context import VisualInContextModel
from hf_effdl.vicl.remote_code.pipeline_visual_in_context import VisualInContextPipeline
from hf_effdl.vicl.remote_code.ranker_selector import RankerSelector


Rows = Callable[[Any], tuple[Dataset, Dataset]]
REPORT = "report.json"
TRIED = 4  # images and examples of each, when runs are timed


def find_copies(pipe: VisualInContextPipeline, query_rows: Dataset, options: Any) -> list[int]:
    """Rows of the pool that look like one of the images to test on."""
    encoder = pipe.model.encoder
    seen = [pipe.visual_task.query(to_rgb(image)) for image in query_rows[options.image_column]]
    vectors = [
        encoder(pixels(seen[at : at + 32], encoder.image_size, encoder.resample))["vector"].cpu()
        for at in range(0, len(seen), 32)
    ]
    return near_duplicates(pipe.pool.vectors, torch.cat(vectors), options.duplicates).tolist()


def _measured(
    options: Any, rows: Rows, device: Any, out: Path, keep_grids: bool
) -> tuple[VisualInContextPipeline, Dataset, list[int], int]:
    """A pipeline whose pool was measured; the images to test on, what looks like them, and the images measured on."""
    pool_rows, query_rows = rows(options)
    model = load_frozen(options).to(device)
    pool = make_pool(options, pool_rows, model, out / "pool", keep_grids=keep_grids)
    pipe = VisualInContextPipeline(model, pool=pool)
    exclude = find_copies(pipe, query_rows, options)
    budget = min(options.label_budget or len(pool), len(pool) - len(exclude))
    how = {"candidates": options.candidates, "exclude_rows": exclude, "cache_dir": out / "performance"}
    measure_examples(model, pool, queries=budget, **how)
    return pipe, query_rows, exclude, budget


def _runs_cost(options: Any, rows: Rows, each_query: int, each_label: int, keep_grids: bool) -> Cost:
    """Of encoding the pool, and of the frozen model's runs, some of which are timed."""
    device = Accelerator(cpu=not torch.accelerator.is_available()).device
    with rehearsal() as folder:
        pool_rows, query_rows = rows(options)
        count, model = len(pool_rows), load_frozen(options)
        few = pool_rows.select(range(min(count, 4 * TRIED)))
        make_pool(options, few.select(range(2)), model.to(device), Path(folder, "first"), progress=False)
        start = time.perf_counter()
        pool = make_pool(options, few, model, folder, keep_grids=keep_grids, progress=False)
        row = (time.perf_counter() - start) / len(few)
        shown = {"candidates": min(TRIED, len(pool) - 1), "progress": False}
        measure_examples(model, pool, queries=1, **shown)
        start = time.perf_counter()
        queries = min(TRIED, len(pool))
        measure_examples(model, pool, queries=queries, **shown)
        run = (time.perf_counter() - start) / (queries * shown["candidates"])
        disk = sum(file.stat().st_size for file in pool.folder.rglob("*") if file.is_file()) / len(few) * count
    candidates, labels = min(options.candidates, count - 1), min(options.label_budget or count, count)
    runs = labels * (candidates + each_label) + len(query_rows) * (each_query + candidates)
    told = [f"{count} rows to encode, one took {row:.3g} s", f"{runs} runs of the frozen model, one took {run:.3g} s"]
    return Cost(row * count + run * runs, disk + size_of(model), told)


# ---- cascade


@contextmanager
def _to_itself(out: Path) -> Iterator[None]:
    """Have the outputs to oneself, without the report of before: it comes last, and says what is there."""
    with locked(out, ".lock-fit") if is_first() else nullcontext():
        if is_first():
            (out / REPORT).unlink(missing_ok=True)
        yield


def _report(out: Path, report: dict[str, Any]) -> None:
    with locked(out):
        sweep(out, REPORT)
        write_json(out / REPORT, report)


def gap_closed(scores: dict[str, list[float]], name: str, better: int) -> tuple[float, float]:
    """Per cent of the way from the nearest example to the best candidate, and the standard error over queries.

    Args:
        scores: of every query, by strategy; with "nearest" and "oracle".
        name: of a strategy.
        better: 1, or -1 where smaller scores are better.
    """
    nearest, best, found = (better * np.array(scores[key]) for key in ("nearest", "oracle", name))
    gap = (best - nearest).mean()
    if gap <= 0:
        return float("nan"), float("nan")
    closed = (found - nearest).mean() / gap
    # of a ratio of means: what is left of each query when the ratio is taken away
    left = (found - nearest) - closed * (best - nearest)
    return 100 * float(closed), 100 * float(left.std(ddof=1) / gap / len(left) ** 0.5)


def fit_cascade(options: Any, rows: Rows = load_pool_splits) -> None:
    """See the verb.

    Args:
        rows: from options to the rows to choose from and those to test on.
    """
    if options.dry_run:
        each_query = 3 + options.passes + max(options.passes, options.fused)
        tell("fit cascade", _runs_cost(options, rows, each_query, options.passes, True))
        return
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    out = Path(options.output_dir)
    pipe, query_rows, exclude, budget = _measured(options, rows, accelerator.device, out, True)
    cascade = CascadeSelector(pipe.model, passes=options.passes, head=options.head).fit(pipe.pool)
    pipe.model.set_selector(cascade)
    scores = _cascade_scores(pipe, query_rows, options)
    if accelerator.is_main_process:
        print(_cascade_table(scores, options, pipe.visual_task))
    with _to_itself(out):
        pipe.save_pretrained(out / "model")
        if accelerator.is_main_process:
            report = {"excluded": len(exclude), "labelled": budget, "fit": cascade.report, "scores": scores}
            first = query_rows.select(range(min(4, len(query_rows))))
            shown = [to_rgb(image) for image in first[options.image_column]]
            pipe.plot(shown, num_examples=min(3, options.passes), path=out / "examples.png")
            _report(out, report)
    if options.push_to_hub and accelerator.is_main_process:
        print(pipe.push_to_hub(options.push_to_hub))
    accelerator.wait_for_everyone()


def _cascade_scores(pipe: VisualInContextPipeline, query_rows: Dataset, options: Any) -> dict[str, list[float]]:
    fusion = VisualInContextPipeline(pipe.model, pool=pipe.pool, num_examples=options.fused, fusion="weighted")
    plan = {"nearest": pipe, "dense": pipe, "transfer": pipe, "cascade": pipe, "weighted": fusion, "oracle": pipe}
    return {
        name: score_strategy(
            runs, query_rows, options, "cascade" if name == "weighted" else name, labels=name == "oracle"
        )
        for name, runs in plan.items()
    }


def _cascade_table(scores: dict[str, list[float]], options: Any, task: Any) -> str:
    better = 1 if task.greater_is_better else -1
    runs = {"cascade": options.passes, "weighted": max(options.passes, options.fused), "oracle": options.candidates}
    table = []
    for name, each in scores.items():
        closed, error = gap_closed(scores, name, better)
        spread = float(np.std(each, ddof=1) / len(each) ** 0.5)
        table.append(
            {
                "strategy": f"cascade, {options.fused} weighted" if name == "weighted" else name,
                "runs": runs.get(name, 1),
                "score": f"{np.mean(each):.4f} ± {spread:.4f}",
                "closed": f"{closed:.0f} ± {error:.0f}",
            }
        )
    columns = {"strategy": "strategy", "runs": "runs of the model", "score": task.metric, "closed": "gap closed, %"}
    return markdown_table(table, columns)


# ---- rankers


def split_queries(model: VisualInContextModel, seed: int) -> tuple[list[int], list[int]]:
    """Of the pool images that were measured on, nine tenths to train and one to evaluate."""
    rows = (model.measured_candidates >= 0).any(1).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].tolist()
    some = max(1, len(rows) // 10)
    return rows[some:], rows[:some]


def train_ranker(
    k: int,
    options: Any,
    training: TrainingArguments,
    model: VisualInContextModel,
    pool: ExamplePool,
    exclude: list[int],
) -> tuple[ListwiseRanker, dict[str, float]]:
    """A ranker for lists of k, with how it did on lists of queries that it did not learn from."""
    train, other = split_queries(model, training.seed)
    common = {"lists_per_query": options.lists_per_query, "duplicates": None, "labels": not options.legacy}
    common |= {"exclude_rows": exclude, "seed": training.seed}
    lists = RankingLists.from_model(model, pool, k, rows=train, **common)
    held_out = RankingLists.from_model(model, pool, k, rows=other, **common)
    torch.manual_seed(training.seed)
    sizes = {"input_size": pool.dim, "hidden_size": options.hidden_size, "list_length": k}
    config = ListwiseRankerConfig(**sizes, legacy=options.legacy)
    own = copy.copy(training)
    own.output_dir = str(Path(training.output_dir, f"ranker-{k}"))
    stopping = [EarlyStoppingCallback(options.patience)] if training.load_best_model_at_end else []
    trainer = RankerTrainer(
        ListwiseRanker(config), own, train_dataset=lists, eval_dataset=held_out, callbacks=stopping
    )
    trainer.train()
    trainer.save_model()
    return trainer.model.eval(), trainer.evaluate()


def fit_ranker(options: Any, training: TrainingArguments, rows: Rows = load_pool_splits) -> None:
    """See the verb.

    Args:
        rows: from options to the rows to choose from and those to test on.
    """
    if options.dry_run:
        cost = _runs_cost(options, rows, 2, 0, False)
        cost.how.append("without the rankers' own training")
        tell("fit ranker", cost)
        return
    out = Path(training.output_dir)
    pipe, query_rows, exclude, _ = _measured(options, rows, training.device, out, False)
    with _to_itself(out):
        rankers, report = [], {"excluded": len(exclude)}
        for k in options.lengths:
            ranker, metrics = train_ranker(k, options, training, pipe.model, pipe.pool, exclude)
            rankers.append(ranker.to(training.device))
            report[f"ranker-{k}"] = {name: value for name, value in metrics.items() if isinstance(value, float)}
        selector = RankerSelector(rankers, options.schedule)
        scores = {
            "nearest": score_strategy(pipe, query_rows, options, "nearest"),
            "ranker": score_strategy(pipe, query_rows, options, selector),
            "oracle": score_strategy(pipe, query_rows, options, "oracle", labels=True),
        }
        if is_first():
            _report(out, report | {"scores": scores})
    if is_first():
        table = [
            {"strategy": name, "queries": len(each), "score": float(np.mean(each))} for name, each in scores.items()
        ]
        print(markdown_table(table, {"strategy": "strategy", "queries": "queries", "score": pipe.visual_task.metric}))
    PartialState().wait_for_everyone()
