"""Pools and frozen models: what pool, fit and prompt share, and the examples with them."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from PIL import Image

from hf_effdl.cli.work.data import load_any, split_of, tenth_aside
from hf_effdl.vicl.pool.pool import ExamplePool
from hf_effdl.vicl.remote_code.images import to_rgb
from hf_effdl.vicl.remote_code.modeling_visual_in_context import VisualInContextModel
from hf_effdl.vicl.remote_code.pipeline_visual_in_context import VisualInContextPipeline
from hf_effdl.vicl.remote_code.vision_encoder import VisionEncoder
from hf_effdl.vicl.remote_code.visual_tasks import find_task


def load_pool_splits(options: Any) -> tuple[Dataset, Dataset]:
    """The rows to choose from and the rows to predict."""
    if options.dataset_name is None:
        raise ValueError("there are no rows: set --dataset_name")
    data = load_any(options.dataset_name, options.dataset_config)
    data = data if isinstance(data, DatasetDict) else DatasetDict({options.pool_split: data})
    rows = split_of(data, options.dataset_name, options.pool_split, "pool_split")
    split = options.query_split or next((name for name in ("test", "validation") if name in data), None)
    if split is None:
        parts = tenth_aside(rows, 0, "query_split")
        pool, queries = parts["train"], parts["test"]
    else:
        pool, queries = rows, split_of(data, options.dataset_name, split, "query_split")
    return (
        pool.select(range(min(len(pool), options.max_pool or len(pool)))),
        queries.select(range(min(len(queries), options.max_queries or len(queries)))),
    )


def load_frozen(options: Any) -> VisualInContextModel:
    """The frozen model, and the encoder of the pool where it is another one."""
    encoder = VisionEncoder.from_pretrained(options.encoder) if options.encoder else None
    model = VisualInContextModel.from_backbone(options.model, task=options.task, encoder=encoder)
    model.config.candidates = options.candidates
    return model


def make_pool(
    options: Any, rows: Dataset, model: VisualInContextModel, folder: str | Path, **more: Any
) -> ExamplePool:
    """A pool of the rows, which a second call finds in the folder."""
    return ExamplePool.from_dataset(
        rows,
        options.image_column,
        options.label_column,
        encoder=model.encoder,
        task=options.task,
        foreground=options.foreground,
        cache_dir=folder,
        **more,
    )


def drawn(task: Any, label: Any, image: Image.Image) -> Any:
    """A label in the form that any task takes: masks in black and white, boxes and colours as they are."""
    if task.name == "segmentation":
        return task.label(label, image).convert("L")
    return image if task.name == "colourisation" else label


def score_of(task: Any, prediction: Any, label: Any, image: Image.Image) -> float:
    """The task's metric at the query's own size, of a label as `drawn` gives it."""
    size, task = image.size[::-1], find_task(task.name)  # white is the object here, whatever it was in the data
    if task.name == "segmentation":
        prediction = Image.fromarray(prediction * 255)
    found, true = (task.labels([one], [image], size) for one in (prediction, label))
    return float(task.score(found, true)[0])


def score_strategy(
    pipe: VisualInContextPipeline, rows: Dataset, options: Any, strategy: Any, labels: bool = False
) -> list[float]:
    """The task's metric on every row, each process with its share of them."""
    task, found = find_task(options.task, options.foreground), []
    with PartialState().split_between_processes(list(range(len(rows)))) as mine:
        for start in range(0, len(mine), 8):
            part = rows.select(mine[start : start + 8])
            images = [to_rgb(image) for image in part[options.image_column]]
            given = images if options.task == "colourisation" else part[options.label_column][:]
            truth = [drawn(task, label, image) for label, image in zip(given, images, strict=True)]
            outputs = pipe(images, labels=given if labels else None, strategy=strategy, candidates=options.candidates)
            for place, output, label, image in zip(mine[start:], outputs, truth, images):
                found.append((place, score_of(task, output["prediction"], label, image)))
    return [score for _, score in sorted(gather_object(found))]
