"""Feature matching against loops in numpy."""

import numpy as np
import pytest
import torch
from scenes import SIZE, tiny_encoder

from hf_effdl import FeatureMatching


GREY = np.array([0.299, 0.587, 0.114])


def prompts(b=2, m=3, seed=0, size=(SIZE, SIZE), black_and_white=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, 3, SIZE, SIZE), (b, m, 3, SIZE, SIZE), (b, m, 3, *size)
    queries, images, labels = (torch.rand(shape, generator=generator) for shape in shapes)
    if black_and_white:
        labels = (labels[:, :, :1] > 0.5).float().expand(labels.shape).contiguous()
    return queries, images, labels


def matching(form="soft", **options):
    return FeatureMatching(tiny_encoder(), form, **options)


def averaged(label, gh, gw):
    """`(3, h, w)` to `(gh * gw, 3)`: the mean of what a cell of the grid covers, also in part."""
    h, w = label.shape[1:]
    cells = []
    for i in range(gh):
        for j in range(gw):
            top, bottom = i * h // gh, -(-(i + 1) * h // gh)
            left, right = j * w // gw, -(-(j + 1) * w // gw)
            cells.append(label[:, top:bottom, left:right].mean((1, 2)))
    return np.array(cells)


def enlarged(grid, h, w):
    """`(gh, gw, 3)` to `(3, h, w)`, bilinear between the centres of cells."""
    gh, gw = grid.shape[:2]
    found = np.zeros((3, h, w))
    for y in range(h):
        for x in range(w):
            v, u = (np.clip((p + 0.5) * g / n - 0.5, 0, g - 1) for p, g, n in ((y, gh, h), (x, gw, w)))
            # sets, since at the border both neighbours are one cell
            for i in {int(v), min(int(v) + 1, gh - 1)}:
                for j in {int(u), min(int(u) + 1, gw - 1)}:
                    found[:, y, x] += grid[i, j] * (1 - abs(v - i)) * (1 - abs(u - j))
    return found


def by_hand(model, query, images, labels):
    """The answer to one query, place by place."""
    features = model.encoder(torch.cat([query[None], images]))["grid"].double().numpy()
    gh, gw = features.shape[1:3]
    features = features.reshape(len(features), gh * gw, -1)
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    asked, known = features[0], features[1:].reshape(-1, features.shape[2])
    drawn = labels.double().numpy()
    if model.carry == "difference":
        drawn = drawn - np.einsum("c,mchw->mhw", GREY, images.double().numpy())[:, None]
    values = np.concatenate([averaged(label, gh, gw) for label in drawn])
    answers = []
    for q in asked:
        cosines = np.array([q @ e for e in known])
        if model.matching == "nearest":
            answers.append(values[cosines.argmax()])
        elif model.matching == "soft":
            weights = np.exp((cosines - cosines.max()) / model.temperature)
            answers.append(sum(weight * value for weight, value in zip(weights / weights.sum(), values)))
        else:
            white, black = (sum(s * e for s, e in zip(share, known)) for share in (values[:, 0], 1 - values[:, 0]))
            white, black = (side / max(np.linalg.norm(side), 1e-12) for side in (white, black))
            answers.append(np.full(3, 1 / (1 + np.exp(-(q @ white - q @ black) / model.temperature))))
    found = enlarged(np.array(answers).reshape(gh, gw, 3), *labels.shape[2:])
    if model.carry == "difference":
        found = found + np.einsum("c,chw->hw", GREY, query.double().numpy())
    return found.clip(0, 1)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "nearest"},
        {"form": "prototype"},
        {"temperature": 0.2},
        {"carry": "difference"},
        {"form": "nearest", "carry": "difference"},
    ],
    ids=str,
)
def test_the_answer_is_the_formula(options, m):
    model = matching(**options)
    queries, images, labels = prompts(m=m, black_and_white=model.matching == "prototype")
    answers = model(queries, images, labels)
    assert answers.shape == queries.shape and answers.std() > 0.005
    for answer, *example in zip(answers, queries, images, labels):
        np.testing.assert_allclose(answer, by_hand(model, *example), atol=2e-5)


@pytest.mark.parametrize("size", [(20, 13), (64, 40), (3, 5)])
@pytest.mark.parametrize("form", ["soft", "nearest", "prototype"])
def test_the_answer_has_the_size_of_the_labels(form, size):
    model = matching(form)
    queries, images, labels = prompts(1, 2, size=size, black_and_white=form == "prototype")
    np.testing.assert_allclose(
        model(queries, images, labels)[0], by_hand(model, queries[0], images[0], labels[0]), atol=2e-5
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("form", ["soft", "nearest", "prototype"])
def test_labels_of_one_colour_are_no_special_case(form, value):
    queries, images, labels = prompts()
    answers = matching(form)(queries, images, torch.full_like(labels, value))
    if form == "prototype":  # one of the two prototypes is of nothing
        model, label = matching(form), torch.full_like(labels[0], value)
        np.testing.assert_allclose(answers[0], by_hand(model, queries[0], images[0], label), atol=2e-5)
    else:
        torch.testing.assert_close(answers, torch.full_like(answers, value))


@pytest.mark.parametrize("options", [{}, {"form": "nearest"}, {"form": "prototype"}, {"carry": "difference"}], ids=str)
def test_neither_the_rest_of_a_batch_nor_the_order_of_examples_matters(options):
    model = matching(**options)
    queries, images, labels = prompts(3, 4, black_and_white=True)
    answers = model(queries, images, labels)
    for i in range(3):
        torch.testing.assert_close(answers[i], model(queries[i : i + 1], images[i : i + 1], labels[i : i + 1])[0])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(answers, model(queries, images[:, order], labels[:, order]))
    twice = model(queries, images.repeat(1, 2, 1, 1, 1), labels.repeat(1, 2, 1, 1, 1))
    torch.testing.assert_close(answers, twice, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("carry", ["label", "difference"])
def test_kept_encodings_serve_another_object(carry):
    queries, images, labels = prompts()
    model = matching(carry=carry)
    answers = model(queries, images, labels)
    encoded = model.encode(images.flatten(0, 1)).unflatten(0, (2, 3))
    assert encoded.dim() == 3
    torch.testing.assert_close(model.predict(model.encode(queries), encoded, labels), answers)
    fresh = matching(carry=carry)  # which has encoded nothing yet
    torch.testing.assert_close(fresh.predict(model.encode(queries), encoded, labels), answers)


def test_the_model_is_frozen():
    model = matching().train()
    assert not any(module.training for module in model.encoder.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    queries, images, labels = prompts()
    assert not model(queries.requires_grad_(), images, labels).requires_grad


def test_what_does_not_fit_is_refused():
    model, (queries, images, labels) = matching(), prompts()

    def predict(queries, images, labels):
        return model.predict(model.encode(queries), torch.zeros(*images.shape[:2], 256), labels)

    shapes = r"pass \(B, ...\), \(B, m, ...\)|takes \(N, 3"
    for call, text in (
        (lambda: matching("hard"), "matching='hard': choose one of"),
        (lambda: matching(temperature=0), "temperature=0: must be positive"),
        (lambda: matching(temperature=float("nan")), "temperature=nan"),
        (lambda: matching(carry="colour"), "carry='colour': choose"),
        (lambda: matching("prototype", carry="difference"), "use matching='soft'"),
        (lambda: predict(queries[:1], images, labels), shapes),
        (lambda: predict(queries, images[:, :2], labels), shapes),
        (lambda: predict(queries, images, labels[:, 0]), shapes),
        (lambda: predict(queries, images[:, :0], labels[:, :0]), shapes),
        (lambda: model(queries, images, labels, 1), "arrangement=1: feature matching has no canvas"),
        (lambda: model(queries[..., :20], images, labels), r"takes \(N, 3, 32, 32\)"),
        (lambda: matching(carry="difference")(queries, images, labels[..., :20, :20]), "labels of .20, 20. pixels"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
