"""Feature matching against loops in numpy."""

import json

import numpy as np
import pytest
import torch
from answers import tiny_seggpt
from scenes import SIZE, make_model, tiny_encoder
from transformers import ResNetConfig, ResNetModel

from hf_effdl import FeatureMatching, VisionEncoder
from hf_effdl.vicl.remote_code.frozen_matching import position_directions


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
        elif model.matching == "mutual":
            there = np.exp(cosines / model.temperature)
            back = np.array([sum(np.exp(other @ e / model.temperature) for other in asked) for e in known])
            weights = there / there.sum() * there / back
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
        {"form": "mutual"},
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


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "nearest"}, {"form": "prototype"}, {"form": "mutual", "layers": [0, None]}, {"carry": "difference"}],
    ids=str,
)
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


def test_a_cosine_of_several_layers_is_the_mean_of_theirs():
    images = prompts()[0]
    joint = FeatureMatching(tiny_encoder(), layers=[0, 1, None]).encode(images).unflatten(1, (16, -1))
    single = [
        FeatureMatching(tiny_encoder(), layers=[layer]).encode(images).unflatten(1, (16, -1)) for layer in (0, 1, None)
    ]
    torch.testing.assert_close(joint[0] @ joint[1].T, sum(one[0] @ one[1].T for one in single) / 3)
    torch.testing.assert_close(single[2], FeatureMatching(tiny_encoder()).encode(images).unflatten(1, (16, -1)))
    with pytest.raises(ValueError, match="layer=7: ViTModel has 2"):
        FeatureMatching(tiny_encoder(), layers=[7]).encode(images)


def test_a_model_that_has_one_map_matches_that():
    encoder, images = VisionEncoder(tiny_seggpt()), prompts()[0]
    plainly = FeatureMatching(encoder).encode(images)
    torch.testing.assert_close(FeatureMatching(encoder, layers=[None]).encode(images), plainly)
    with pytest.raises(ValueError, match="SegGptForImageSegmentation has one map of features"):
        FeatureMatching(encoder, layers=[1, None]).encode(images)


def test_maps_of_a_convolutional_net_are_brought_to_the_largest():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    encoder = VisionEncoder(ResNetModel(config), image_size=64)
    images = torch.rand(2, 3, 64, 64)
    sizes = [tuple(one.shape[1:]) for one in encoder.maps(images, [1, 2])]
    assert sizes == [(16, 16, 8), (8, 8, 12)]
    model = FeatureMatching(encoder, layers=[1, 2])
    assert model.encode(images).shape == (2, 16 * 16 * 20)
    assert model(images, images[:, None], images[:, None]).shape == images.shape


class Placed(torch.nn.Module):
    """What is in a cell, and, a good deal louder, where it is."""

    image_size, resample = (SIZE, SIZE), 3

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 12, generator=generator))
        self.where = torch.randn(16, 2, generator=generator) @ torch.randn(2, 12, generator=generator)

    def forward(self, images):
        cells = torch.nn.functional.avg_pool2d(images - 0.5, SIZE // 4).permute(0, 2, 3, 1)
        return {"grid": cells @ self.weight + 3 * self.where.view(4, 4, 12)}


def test_where_a_cell_is_can_be_taken_out():
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    moved = image.roll(SIZE // 4, 3)
    found = {}
    for positions in (0, 2):
        model = FeatureMatching(Placed(), "nearest", positions=positions)
        one, other = (model.encode(part).view(4, 4, 12) for part in (image, moved))
        best = (one.flatten(0, 1) @ other.flatten(0, 1).T).argmax(1).view(4, 4)
        found[positions] = best, (one - other.roll(-1, 1)).abs().max()
    expected = torch.arange(16).view(4, 4).roll(-1, 1)  # of a cell of the image, where it went
    assert (found[2][0] == expected).sum() >= 15 and found[2][1] < 0.2
    assert (found[0][0] == expected).sum() <= 2 and found[0][1] > 1


def test_directions_are_of_unit_length_and_the_largest_first():
    maps = torch.randn(5, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    directions = position_directions(maps, 3)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3))
    spread = (maps.mean(0).flatten(0, 1) @ directions).std(0)
    assert (spread.diff() < 0).all()
    for count in (8, 12):
        with pytest.raises(ValueError, match=f"positions={count}: 8 numbers at 12 places have fewer"):
            position_directions(maps, count)


def test_made_again_from_its_settings_it_answers_the_same():
    queries, images, labels = prompts()
    for options in ({}, {"layers": [np.int64(0), None], "positions": np.int32(2), "matching": "mutual"}):
        model = FeatureMatching(tiny_encoder(), **options)
        settings = json.loads(json.dumps(model.settings()))
        assert {"layers", "positions"} & settings.keys() == options.keys() - {"matching"}
        config = {"config": json.loads(model.backbone.config.to_json_string(use_diff=False))}
        again = FeatureMatching.from_settings(settings | {"backbone": config})
        again.encoder.backbone.load_state_dict(model.backbone.state_dict())
        torch.testing.assert_close(again(queries, images, labels), model(queries, images, labels))


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
        (lambda: matching(layers=5), "layers=5: pass a list"),
        (lambda: matching(layers=["last"]), r"layers=\['last'\]: pass a list"),
        (lambda: matching(positions=True), "positions=True"),
        (lambda: matching(temperature="warm"), "temperature='warm': must be a positive number"),
        (
            lambda: make_model("colourisation", matching="prototype", carry="label"),
            "task='colourisation': a prototype",
        ),
        (lambda: matching(layers=[]), r"layers=\[\]: pass a list"),
        (lambda: matching(positions=-1), "positions=-1"),
        (lambda: matching(temperature=0), "temperature=0: must be a positive number"),
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
