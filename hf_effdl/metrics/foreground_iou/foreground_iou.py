"""Foreground IoU as an `evaluate` metric."""

import io

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
Intersection over union of the foreground of two masks, `|P & R| / |P | R|`, averaged over items (not over classes), as
the field of visual in-context learning reports segmentation. Two empty masks agree: 1 (the original code gives NaN).

Two means are given. `mean_iou` counts each item once. `mean_iou_1000` is the historic convention of the evaluators of
visual in-context learning: a loop over the positions 0..999 takes item `position mod n`, so that the first items may
count once more than the others (of 346 items the first 308 count three times, the rest twice), and of more than 1000
only the first 1000 count. Say which one a number is.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of masks (H, W): arrays, tensors, lists or PIL images of modes 1, L, P, I. Every value but 0 is
        foreground, so that 0/1 and 0/255 masks can be mixed. Sizes may differ between items.
    references: list of masks, each of its prediction's size.
    ignore_index: pixels of this value in the reference count nowhere (255 for the void of Pascal VOC class maps; not
        for 0/255 masks). Default None: every pixel counts.
    per_item: True adds the values of the single items as "iou". Default False.

Returns:
    {"mean_iou": float, "mean_iou_1000": float}, and "iou", a list of floats, with per_item=True.

Example:
    >>> import evaluate
    >>> from importlib.resources import files
    >>> metric = evaluate.load(str(files("hf_effdl.metrics") / "foreground_iou"))
    >>> masks, truth = [[[0, 1], [1, 1]], [[0, 0]]], [[[0, 0], [255, 255]], [[0, 0]]]
    >>> metric.compute(predictions=masks, references=truth, per_item=True)
    {'mean_iou': 0.8333333333333333, 'mean_iou_1000': 0.8333333333333333, 'iou': [0.6666666666666666, 1.0]}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ForegroundIou(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("binary"), "references": datasets.Value("binary")}
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

    def _compute(self, predictions, references, ignore_index=None, per_item=False):
        values = [_iou(_unpacked(p), _unpacked(r), ignore_index) for p, r in zip(predictions, references)]
        if not values:
            raise ValueError("there are no items to average over: add some first")
        return _means(values, "iou") | ({"iou": values} if per_item else {})


def _pair(prediction, reference):
    prediction, reference = _mask(prediction), _mask(reference)
    if prediction.shape != reference.shape:
        raise ValueError(
            f"a prediction is {prediction.shape} and its reference {reference.shape}; resize one (nearest)"
        )
    return _packed(prediction), _packed(reference)


def _mask(mask):
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.size or mask.dtype.kind not in "bui":
        raise ValueError(f"a mask is (H, W) whole numbers; got {mask.dtype} {mask.shape}; threshold a soft mask first")
    return mask


def _iou(prediction, reference, ignore_index):
    counted = np.ones(reference.shape, bool) if ignore_index is None else reference != ignore_index
    prediction, reference = (prediction != 0) & counted, (reference != 0) & counted
    union = int((prediction | reference).sum())
    return int((prediction & reference).sum()) / union if union else 1.0


def _means(values, name):
    weights = np.bincount(np.arange(1000) % len(values), minlength=len(values))
    return {f"mean_{name}": float(np.mean(values)), f"mean_{name}_1000": float(weights @ values / 1000)}


def _packed(array):
    # arrays of any size and type, exactly; evaluate's own array features want one size
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _unpacked(stored):
    return np.load(io.BytesIO(stored), allow_pickle=False)
