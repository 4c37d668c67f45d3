"""Mean squared error of ImageNet-normalised colours as an `evaluate` metric."""

import io

import datasets
import evaluate
import numpy as np
from PIL import Image


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
Mean squared error of two RGB images after ImageNet normalisation, `mean(((p - r) / std)^2)` of values in [0, 1] with
std (0.229, 0.224, 0.225), averaged over items, as the field of visual in-context learning reports colourisation.
Lower is better.

Two means are given. `mean_mse` counts each item once. `mean_mse_1000` is the historic convention of the evaluators of
visual in-context learning: a loop over the positions 0..999 takes item `position mod n`, so that the first items may
count once more than the others (of 346 items the first 308 count three times, the rest twice), and of more than 1000
only the first 1000 count. Say which one a number is.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of RGB images: PIL, or arrays, tensors or lists (H, W, 3) of uint8 or of floats in [0, 1]. Sizes
        may differ between items.
    references: list of RGB images, each of its prediction's size.
    per_item: True adds the values of the single items as "mse". Default False.

Returns:
    {"mean_mse": float, "mean_mse_1000": float}, and "mse", a list of floats, with per_item=True.

Example:
    >>> import evaluate
    >>> from importlib.resources import files
    >>> metric = evaluate.load(str(files("hf_effdl.metrics") / "colour_mse"))
    >>> from PIL import Image
    >>> grey, white = Image.new("RGB", (2, 2), (51, 51, 51)), Image.new("RGB", (2, 2), "white")
    >>> {name: round(value, 3) for name, value in metric.compute(predictions=[grey], references=[white]).items()}
    {'mean_mse': 12.534, 'mean_mse_1000': 12.534}
"""

_STD = np.array([0.229, 0.224, 0.225])


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ColourMse(evaluate.Metric):
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

    def _compute(self, predictions, references, per_item=False):
        values = [_mse(_unpacked(p), _unpacked(r)) for p, r in zip(predictions, references)]
        if not values:
            raise ValueError("there are no items to average over: add some first")
        return _means(values, "mse") | ({"mse": values} if per_item else {})


def _pair(prediction, reference):
    prediction, reference = _image(prediction), _image(reference)
    if prediction.shape != reference.shape:
        raise ValueError(f"a prediction is {prediction.shape} and its reference {reference.shape}; resize one")
    return _packed(prediction), _packed(reference)


def _image(image):
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise ValueError(f"an image is RGB; got PIL mode {image.mode}; convert it first")
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image is (H, W, 3), channels last; got {image.shape}")
    if image.dtype.kind in "iu" and image.min() >= 0 and image.max() <= 255:
        return image.astype(np.uint8)
    if image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1:  # NaN fails
        return image
    raise ValueError(
        f"an image is 0..255 integers or floats in [0, 1]; got {image.dtype} {image.min()}..{image.max()}"
    )


def _mse(prediction, reference):
    prediction, reference = (x / 255 if x.dtype == np.uint8 else x.astype(np.float64) for x in (prediction, reference))
    return float((((prediction - reference) / _STD) ** 2).mean())


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
