"""IoU of single boxes as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np


_CITATION = """\
@inproceedings{bar2022visual,
  title={Visual Prompting via Image Inpainting},
  author={Bar, Amir and Gandelsman, Yossi and Darrell, Trevor and Globerson, Amir and Efros, Alexei A.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}, eprint={2209.00647}, archivePrefix={arXiv}
}
@inproceedings{xu2024towards,
  title={Towards Global Optimal Visual In-Context Learning Prompt Selection},
  author={Xu, Chengming and Liu, Chen and Wang, Yikai and Yao, Yuan and Fu, Yanwei},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}, eprint={2405.15279}, archivePrefix={arXiv}
}
"""

_DESCRIPTION = """\
Intersection over union of one predicted and one true box an item, in pixels, averaged over items, as the field of
visual in-context learning reports single-object detection. No box on both sides is 1, on one side 0.

Two means are given. `mean_iou` counts each item once. `mean_iou_1000` is the historic convention of the evaluators of
visual in-context learning: a loop over the positions 0..999 takes item `position mod n`, so that the first items may
count once more than the others (of 346 items the first 308 count three times, the rest twice), and of more than 1000
only the first 1000 count. Say which one a number is.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of boxes [x0, y0, x1, y1] with x0 < x1 and y0 < y1, of the area (x1 - x0) (y1 - y0); None or []
        where there is none.
    references: list of boxes or None, as many as predictions.
    per_item: True adds the values of the single items as "iou". Default False.

Returns:
    {"mean_iou": float, "mean_iou_1000": float}, and "iou", a list of floats, with per_item=True.

Example:
    >>> import evaluate
    >>> from importlib.resources import files
    >>> metric = evaluate.load(str(files("hf_effdl.metrics") / "box_iou"))
    >>> metric.compute(predictions=[[0, 0, 2, 2], None], references=[[1, 0, 3, 2], None], per_item=True)
    {'mean_iou': 0.6666666666666666, 'mean_iou_1000': 0.6666666666666666, 'iou': [0.3333333333333333, 1.0]}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BoxIou(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("float64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2209.00647", "https://arxiv.org/abs/2405.15279"],
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add predictions and references."""
        if predictions is None or references is None or len(predictions) != len(references):
            sizes = [None if given is None else len(given) for given in (predictions, references)]
            raise ValueError(f"predictions= and references= are lists of one length; got {sizes}: pass a pair each")
        pairs = [_pair(*pair) for pair in zip(predictions, references)]
        super().add_batch(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])

    def add(self, *, prediction=None, reference=None):
        """Add one prediction and its reference."""
        prediction, reference = _pair(prediction, reference)
        super().add(prediction=prediction, reference=reference)

    def _compute(self, predictions, references, per_item=False):
        values = [_iou(*pair) for pair in zip(predictions, references)]
        if not values:
            raise ValueError("there are no items to average over: add some first")
        return _means(values, "iou") | ({"iou": values} if per_item else {})


def _pair(prediction, reference):
    return _box(prediction), _box(reference)


def _box(box):
    if box is None or len(box) == 0:
        return []
    values = np.asarray(box, dtype=np.float64)
    if values.shape != (4,) or not np.isfinite(values).all() or not (values[:2] < values[2:]).all():
        raise ValueError(f"a box is [x0, y0, x1, y1] with x0 < x1 and y0 < y1, or None for no box; got {box}")
    return values.tolist()


def _iou(a, b):
    if not a or not b:
        return float(not a and not b)
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def _means(values, name):
    weights = np.bincount(np.arange(1000) % len(values), minlength=len(values))
    return {f"mean_{name}": float(np.mean(values)), f"mean_{name}_1000": float(weights @ values / 1000)}
