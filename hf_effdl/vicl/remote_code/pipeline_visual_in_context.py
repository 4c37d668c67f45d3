"""The pipeline: for each image, choose examples from a pool, show them to a frozen vision model, read its answer."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Pipeline

from .absence import Presence, calibrate, check_calibrated, presence_features
from .confidence import confidence_of
from .counts import counted
from .examples import Examples, Queries
from .frozen_canvas import vote as count_votes
from .images import pixels
from .label_maps import label_maps
from .modeling_visual_in_context import VisualInContextModel
from .pipeline_choice import Choice
from .pipeline_inputs import (
    ONE_OF,
    alike,
    check_each,
    fused,
    is_image,
    opened_query,
    plain_instances,
    soft_map,
    walkable,
)
from .pipeline_loading import load_parts
from .pipeline_options import EXTRA, FORWARD, Options, check_chosen, check_options
from .pipeline_panels import rows_shown
from .pipeline_picture import draw_panels
from .pipeline_saving import pushed, saved
from .pool_reader import PoolReader
from .pool_rows import allowed_rows
from .visual_tasks import PICTURES, find_task, task_of


TASK = "visual-in-context-learning"
RESTRICTIONS = ("exclude", "groups", "classes", "candidates_where")  # arguments that say what may be shown


class VisualInContextPipeline(Pipeline):
    """Predict for new images by showing a frozen vision model the right labelled examples.

        query -> the K nearest of the pool -> a strategy ranks them -> the frozen model sees the best m -> prediction

    Args:
        model: a `VisualInContextModel`, or a repository or folder of one; a frozen model (`SegGptInContext`,
            `FeatureMatching`, a `SegGptForImageSegmentation`), which is joined with the pool's encoder; or the name of
            a backbone (SegGPT, or any vision encoder for feature matching), see `VisualInContextModel.from_backbone`;
            where the pool was made with another encoder than the backbone, that one is loaded too.
        selector: how examples are chosen: "random", "nearest", "static", "dense", "transfer", "oracle"; a fitted
            `CascadeSelector` or a `RankerSelector`, or "cascade" or "ranker" for one that the model keeps; "auto" for
            the best of those that need no label of the query, as tried on images of the pool (`self_check` says what
            was found); or a callable `(queries, examples, count, candidates) -> (scores, rows)`, and, where it knows
            them, the answers `(B, count, 3, h, w)` to each. Default: the model's `config.strategy`: "auto" where the
            model was made from parts or a backbone, "cascade" where it keeps one, what was saved else.
        pool: an `ExamplePool` or `PoolReader`, or a repository or folder of one; default: the one that the config
            names.
        metric, greater_is_better: what the oracle goes by, see `Examples`; default: the task's own metric.
        token: for private repositories; default: the saved login.
        revision: branch, tag or commit of the model's repository; the pool's is the one that the model names.

    Call it with an image (PIL, array, tensor, path, URL, bytes) or any number of them: a list, a data set (its column
    `image`, or the only one of images) or a column of one; a generator or a streamed data set, which has no length, is
    answered by a generator, as it comes. Options of a call, or of the constructor as defaults:

        num_examples    m, how many examples are shown (default 1); a smaller pool gives all it has
        fusion          for m > 1: "mean" of the answers to each (default); "weighted" mean by the scores, for a
                        cascade; or "model": all in one call of the frozen model (SegGPT's feature ensemble; joint
                        matching)
        vote            also run every arrangement of the canvas and vote (prompt-SelF, arXiv 2304.04748); for frozen
                        models that have more than one
        strategy        instead of `selector`
        candidates      K (default: the config's, 50), at least m; a smaller pool gives shorter lists
        seed            of the random strategy
        soft_map        also give how white the answer is, before it is cut in two (not for colourisation)
        presence        also give whether the examples' object is there at all, after `calibrate_absence`
        instances       also give every object that was found, for a frozen model that tells them apart (SAM 3)
        labels          labels of the queries, as many, read as those of the pool's data set; for the oracle
        exclude         for each image the ids of examples that it must not be shown: a text, a list of them, or None
        groups          what each image belongs to (a video, a patient, a photo): no example of the same group of the
                        pool (`ExamplePool.from_dataset(group_column=)`) is shown
        classes         the class of each image's object: only examples of it (`class_column=`) are shown
        candidates_where  `{"class": "cat"}`, or `{"group": [...]}`: only such examples, for all images of the call
        batch_size      queries at a time (default 8)

    Returns:
        For one image a dict, for several a list of them:
        `{"prediction", "example_ids", "scores", "confidence"}`; ids and scores of the m examples shown, best first;
        with `soft_map=True` also `"soft_map"`, float32 `(H, W)` in [0, 1]; with `instances=True` also `"instances"`,
        best first, dicts of a `score`, a `box` `[x0, y0, x1, y1]` and, for segmentation, a `mask`; with
        `presence=True` also `"present"`, True or False, and `"presence"`, the chance of it. The confidence is,
        where a fitted `CascadeSelector` chooses, the performance that was seen on pool images for answers as sure as
        this one; else how far from grey the answer is, in [0, 1], which is not calibrated (None for colourisation).
        The prediction is, for segmentation, a uint8 array `(H, W)` of the query's size, 1 for the object; for
        detection `[x0, y0, x1, y1]` in the query's pixels, or None where nothing was found; for colourisation an RGB
        PIL image of the query's size.

    Raises:
        ValueError: for a pool of another task or made with another encoder, unknown options, labels that are missing
            or of another size.

    Example:
        ```python
        pool = ExamplePool.from_dataset(dataset, label_column="mask", encoder="facebook/dinov2-base")
        pipe = VisualInContextPipeline(model="BAAI/seggpt-vit-large", selector="dense", pool=pool)
        pipe("photo.jpg")["prediction"]
        pipe.plot("photo.jpg").show()
        pipe.push_to_hub("me/segment-like-these")    # then, with nothing but transformers:
        pipeline(model="me/segment-like-these", trust_remote_code=True)("photo.jpg")
        ```

    Source: Xu et al., "Towards Global Optimal Visual In-Context Learning Prompt Selection", arXiv 2405.15279 (setting,
    K = 50, top-m fusion).
    """

    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_processor = False

    def __init__(
        self,
        model: VisualInContextModel | nn.Module | str,
        selector: Any = None,
        pool: PoolReader | str | None = None,
        *,
        metric: Any = None,
        greater_is_better: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        model, pool = load_parts(model, pool, token, dtype, revision)
        kwargs.setdefault("task", TASK)
        self.pool, self.selector = pool, selector
        self.visual_task = find_task(model.config.task)
        # labels of the user are as in the pool's data set, those in the pool are white on black
        self.label_task = task_of(model.config.task, getattr(pool, "manifest", {}).get("settings", {}))
        super().__init__(model=model, **kwargs)
        self.examples = Examples(pool, model, self.visual_task, metric, greater_is_better)
        self._choice = Choice(self)

    def __call__(
        self,
        images: Any,
        *,
        labels: Any = None,
        exclude: Any = None,
        groups: Any = None,
        classes: Any = None,
        candidates_where: dict[str, Any] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """See the class. One image gives a dict, a list gives a list; what has no length is answered as it comes."""
        if batch_size is None:
            batch_size = self._batch_size or 8
        batch_size = counted("batch_size", batch_size)
        if kwargs.get("presence", self._forward_params.get("presence")):
            check_calibrated(self.model.config, self.pool)
        given = {"labels": labels, "exclude": exclude, "groups": groups, "classes": classes}
        given = {name: values for name, values in given.items() if values is not None}
        if is_image(images):
            images, alone = [images], True
            given = {name: [value] for name, value in given.items()}
        else:
            images, alone = walkable(images), False
        for name, values in given.items():
            check_each(name, values, images)
        answers = self._stream(images, given, candidates_where, batch_size, kwargs)
        if alone:
            return next(iter(list(answers)))
        return list(answers) if hasattr(images, "__len__") else answers

    def _stream(
        self,
        images: Any,
        given: dict[str, Any],
        where: dict[str, Any] | None,
        batch_size: int,
        options: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        # a chunk travels through the base class as one input, since strategies and the frozen model take batches
        images, walks = iter(images), {name: iter(values) for name, values in given.items()}
        while chunk := list(islice(images, batch_size)):
            parts = {name: list(islice(walk, len(chunk))) for name, walk in walks.items()}
            for name, part in parts.items():
                if len(part) != len(chunk):
                    raise ValueError(f"there are fewer {name} than images: pass one each")
            yield from super().__call__({"images": chunk, "where": where, **parts}, **options)
        for name, walk in walks.items():
            if list(islice(walk, 1)):
                raise ValueError(f"there are more {name} than images: pass one each")

    def plot(
        self,
        images: Any,
        outputs: Any = None,
        *,
        labels: Any = None,
        beside: Sequence[str] = (),
        height: int = 160,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Image.Image:
        """Chosen examples with their labels, query and prediction, side by side; a row for each image.

        Args:
            images: one or a list.
            outputs: what the pipeline gave for them; default: it is run with `options`.
            labels: labels of the images, as many; then the truth is shown too, and what each prediction is worth.
            beside: strategies that each choose one example too, such as `("nearest", "oracle")`, of which the oracle
                needs `labels`.
            height: of every image in pixels.
            path: also write the picture here.
        """
        if is_image(images):
            images, outputs = [images], None if outputs is None else [outputs]
            labels = None if labels is None else [labels]
            options |= {name: [options[name]] for name in RESTRICTIONS[:3] if options.get(name) is not None}
        images, labels = list(images), None if labels is None else list(labels)
        if outputs is None:
            outputs = self(images, labels=labels, **options)
        own = self._choice.strategy(options.get("strategy", self._forward_params.get("strategy")))
        answers = [(own if isinstance(own, str) else getattr(own, "kind", ""), outputs)]
        left = {name: options[name] for name in RESTRICTIONS if name in options}
        answers += [(name, self(images, labels=labels, strategy=name, **left)) for name in beside]
        picture = draw_panels(rows_shown(self, images, answers, labels), self.visual_task.name, height)
        if path is not None:
            picture.save(path)
        return picture

    def label_map(
        self, images: Any, classes: Sequence[str] | None = None, *, batch_size: int = 8, **options: Any
    ) -> Any:
        """Several classes at once: each pixel has the class whose answer is whitest there, times how sure it is.

        One call of the pipeline for each class, with `classes=` of it; after `calibrate_absence`, classes that are
        absent from an image are left out.

        Args:
            images: one or any number of them.
            classes: default: all that the pool keeps.
            batch_size, options: of a call.

        Returns:
            for one image a dict, for several a list: `{"label_map", "classes", "confidence", "example_ids"}`; the map
            is uint8 `(H, W)` (int32 above 255 classes), 0 where no class is, else 1 and up in the order of `classes`.
        """
        return label_maps(self, images, classes, batch_size, options)

    def calibrate_absence(
        self,
        queries: int = 100,
        false_alarms: float = 0.05,
        *,
        absent: Sequence[Any] | None = None,
        seed: int = 0,
        progress: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        """Learn on pool images when the examples' object is not there; then `presence=True` and `label_map` say so.

        Each of some pool images is asked about its own class, and about another one, which is taken to be absent. How
        well the example's object finds its like in the query, how sure and how white the answer is, and how alike the
        images are, go into a logistic regression, and a threshold is set.

        Args:
            queries: pool images, at most.
            false_alarms: share of absent objects that may be taken for present, in (0, 1).
            absent: images without the object, for a pool of one class; default: pool images of other classes.
            seed: of the draws.
            progress: show a bar.
            options: of a call, such as `strategy`.

        Returns:
            `{"false_alarm_rate", "found_rate", "images", ...}`, by folds without the image; it is kept in the model's
            config, and saved with it.

        Raises:
            ValueError: for a pool of one class or none without `absent=`, and fewer than 10 images.
        """
        return calibrate(self, queries, false_alarms, absent, seed, progress, options)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Save the model and the code that runs it anywhere; a pool without a repository goes into `pool/`.

        What stands in the config is kept, with the strategy and the number of candidates that this pipeline was made
        with; the other options of the constructor are not. Of several processes all call it, and the first one writes.
        """
        strategy = self._choice.strategy(self._forward_params.get("strategy"))
        candidates = self._forward_params.get("candidates", self.model.config.candidates)
        with saved(self, Path(save_directory), strategy, candidates, __file__, repo_id) as first:
            if first:
                super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        pool_repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str | None:
        """Push the model, its code and card; first the pool, where it is not on the Hub yet.

        Args:
            repo_id: of the model.
            pool_repo_id: of the pool, a data set repository; default: the one it is in, else `repo_id` + "-pool".
            private: for repositories that are made now.

        Returns:
            URL of the commit; None on other processes than the first.
        """
        return pushed(self, repo_id, pool_repo_id, private, token, commit_message)

    # ---- the steps of a pipeline

    def options_of(self, options: dict[str, Any]) -> dict[str, Any]:
        """What a call goes by: its own options, and beside them those that this pipeline was made with."""
        return {**self._forward_params, **self._sanitize_parameters(**options)[1]}

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = {name for name in kwargs if name not in FORWARD}
        if unknown:
            raise TypeError(
                f"unknown options {sorted(unknown)}; there are {[*FORWARD, *ONE_OF, 'candidates_where', 'batch_size']}"
            )
        return {}, {name: kwargs[name] for name in FORWARD if kwargs.get(name) is not None}, {}

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        images = [opened_query(image) for image in inputs["images"]]
        seen = [self.visual_task.query(image) for image in images]
        model, encoder = self.model, self.model.encoder
        batch = {
            "sizes": [image.size[::-1] for image in images],
            "cells": pixels(seen, model.image_size, model.resample),
            "views": pixels(seen, encoder.image_size, encoder.resample),
        }
        if inputs.get("labels") is not None:
            batch["truth"] = self.label_task.labels(inputs["labels"], images, self.model.image_size)
        of_query = {name: inputs[name] for name in ("exclude", "groups", "classes") if name in inputs}
        if of_query or inputs.get("where") is not None:
            batch["allowed"] = allowed_rows(self.pool, len(images), inputs.get("where"), **of_query)
        return batch

    def _forward(self, batch: dict[str, Any], **given: Any) -> dict[str, Any]:
        options = Options(**{"candidates": self.model.config.candidates} | given)
        choose = self._choice.selector(options.strategy)
        check_options(options, self, choose, self._choice.said(options.strategy))
        self._choice.tell_unused(options.strategy, self._forward_params.get("strategy"))
        queries = Queries(
            batch["cells"],
            self.model.encoder(batch["views"]),
            batch.get("truth"),
            seed=options.seed,
            allowed=None if batch.get("allowed") is None else batch["allowed"].cpu(),
        )
        longest = max(options.candidates, options.num_examples)
        answers = [(places, self._answers(part, choose, options, longest)) for places, part in alike(queries, longest)]
        order = [place for places, _ in answers for place in places.tolist()]
        painted = torch.cat([part["painted"] for _, part in answers])
        back = torch.tensor(order).argsort()
        names = ("rows", "scores", "confidence", *(name for name in EXTRA if getattr(options, name)))
        lists = {name: sum((part[name] for _, part in answers), []) for name in names}
        return {
            "painted": painted[back.to(painted.device)],
            "sizes": batch["sizes"],
            "soft_map": options.soft_map,
            **{name: [values[i] for i in back.tolist()] for name, values in lists.items()},
        }

    def _answers(self, queries: Queries, choose: Any, options: Options, longest: int) -> dict[str, Any]:
        """Of queries that may be shown the same number of examples."""
        chosen = choose(queries, self.examples, options.num_examples, longest)
        scores, rows, *answers = check_chosen(chosen, queries, len(self.pool))
        weights = torch.full_like(scores, 1 / scores.shape[1])
        if options.fusion == "weighted":
            weights = (scores / choose.temperature).softmax(1)
        found: dict[str, Any] = {}
        if options.instances:
            frozen = self.model.frozen
            found["instances"] = frozen.instances(frozen.encode(queries.cells), *self.examples.encoded(rows))
            painted = frozen.painted(found["instances"])
        elif answers and options.fusion != "model" and not options.vote:  # the frozen model has answered already
            painted = fused(answers[0], weights)
        else:
            painted = self._painted(queries.cells, rows, weights, options)
        if options.presence:
            found["presence"] = presence_features(self.examples, queries, rows[:, :1], painted).tolist()
        confidence = confidence_of(self.visual_task.name, painted, scores, getattr(choose, "confidence", None))
        return found | {"painted": painted, "rows": rows.tolist(), "scores": scores.tolist(), "confidence": confidence}

    def _painted(self, cells: Tensor, rows: Tensor, weights: Tensor, options: Options) -> Tensor:
        """The frozen model's answers to the queries `cells`, shown the examples `rows`, as one `(B, 3, h, w)`."""
        images, labels = self.examples.encoded(rows)
        encoded = self.model.frozen.encode(cells)
        if not options.vote:  # one answer stays soft until it is resized
            return self._answer(encoded, images, labels, weights, options, 0)
        layouts = range(self.model.frozen.arrangements)
        answers = [self._answer(encoded, images, labels, weights, options, layout) for layout in layouts]
        return count_votes(torch.stack(answers), self.visual_task.name not in PICTURES)

    def postprocess(self, outputs: dict[str, Any]) -> list[dict[str, Any]]:
        predictions = self.visual_task.decode(outputs["painted"].float(), outputs["sizes"])
        ids, names = self.pool.ids, ("rows", "scores", "confidence")
        answers = [
            {
                "prediction": prediction,
                "example_ids": [ids[row] for row in rows],
                "scores": scores,
                "confidence": confidence,
            }
            for prediction, rows, scores, confidence in zip(predictions, *(outputs[name] for name in names))
        ]
        if outputs["soft_map"]:
            for answer, painted, size in zip(answers, outputs["painted"], outputs["sizes"]):
                answer["soft_map"] = soft_map(painted, size)
        for answer, features in zip(answers, outputs.get("presence", ())):
            answer |= Presence(**self.model.config.absence).of(features)
        for answer, found, size in zip(answers, outputs.get("instances", ()), outputs["sizes"]):
            answer["instances"] = plain_instances(found, size, masks=self.visual_task.name == "segmentation")
        return answers

    def _answer(
        self, encoded: Tensor, images: Tensor, labels: Tensor, weights: Tensor, options: Options, layout: int
    ) -> Tensor:
        frozen, m = self.model.frozen, labels.shape[1]
        if options.fusion == "model" or m == 1:
            return frozen.predict(encoded, images, labels, layout)
        each = [frozen.predict(encoded, images[:, j : j + 1], labels[:, j : j + 1], layout) for j in range(m)]
        return fused(torch.stack(each, 1), weights)

    @property
    def self_check(self) -> dict[str, Any]:
        """What was found on images of the pool, which "auto" goes by, see `check_strategies`."""
        return self._choice.self_check
