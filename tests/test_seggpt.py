"""SegGPT with one or several examples, against transformers' own output and the ensemble written out by hand."""

import pytest
import torch
from transformers import SegGptConfig, SegGptForImageSegmentation, SegGptModel

from hf_effdl.vicl.remote_code.frozen_seggpt import ENSEMBLE, SegGptInContext


MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
SIZE = 16


def tiny(seed=0, **changes):
    """Random weights large enough that every block matters; dropped paths, so that training mode would show."""
    torch.manual_seed(seed)
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "decoder_hidden_size": 8,
        "image_size": (2 * SIZE, SIZE),
        "patch_size": 4,
        "pretrain_image_size": 16,
        "merge_index": 2,
        "intermediate_hidden_state_indices": (2, 4),
        "initializer_range": 0.2,
        "drop_path_rate": 0.3,
    }
    model = SegGptForImageSegmentation(SegGptConfig(**values | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "layernorm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def prompts(b=2, m=3, seed=1, size=(SIZE, SIZE)):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, 3, *size), (b, m, 3, *size), (b, m, 3, *size)
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


def apart(a, b):
    return (a - b).abs().max().item()


def normal(pixels):
    return (pixels - MEAN) / STD


def pixels(normalised):
    return (normalised * STD + MEAN).clamp(0, 1)


@torch.no_grad()
def by_hand(model, query, images, labels, kind="instance", arrangement=0, mixed=False):
    """The answer to one query, canvas by canvas and stream by stream.

    `mixed` averages over both streams in the block after which they merge, as transformers does.
    """
    encoder, merge_index = model.model.encoder, model.config.merge_index
    gh, gw = 2 * SIZE // 4, SIZE // 4
    hidden = (torch.arange(gh) < gh // 2) == (arrangement == 1)  # rows of patches
    streams = ([], [])
    for image, label in zip(images, labels):
        canvas = torch.cat((image, query) if arrangement == 0 else (query, image), dim=1)
        both = model.model.embeddings(
            normal(canvas)[None],
            normal(torch.cat((label, label), dim=1))[None],
            embedding_type=kind,
            bool_masked_pos=hidden.repeat_interleave(gw)[None],
        )
        for stream, tokens in zip(streams, both):
            stream.append(tokens[None])
    kept = []
    for index, layer in enumerate(encoder.layers):
        seen = [[layer.attention(layer.layernorm_before(x))[0] for x in stream] for stream in streams]
        means = [sum(x[:, hidden] for x in stream) / len(stream) for stream in seen]
        if mixed and index == merge_index:
            means = [(means[0] + means[1]) / 2] * 2
        for stream, attended, mean in zip(streams, seen, means):
            for i, x in enumerate(attended):
                x[:, hidden] = mean
                x = stream[i] + x
                stream[i] = x + layer.mlp(layer.layernorm_after(x))
        if index == merge_index:
            streams = ([(x + y) / 2 for x, y in zip(*streams)],)
        if index in model.config.intermediate_hidden_state_indices:
            kept.append([encoder.layernorm(x) for x in streams[0]])
    half = slice(SIZE) if arrangement == 1 else slice(SIZE, None)
    painted = [model.decoder(torch.cat(states, dim=-1))[0, :, half] for states in zip(*kept)]
    return pixels(sum(painted) / len(painted))


@torch.no_grad()
def own(model, query, images, labels, feature_ensemble, **options):
    """The lower halves that transformers paints for one query, `(m, 3, h, w)`."""
    painted = model(
        pixel_values=normal(query).expand_as(images),
        prompt_pixel_values=normal(images),
        prompt_masks=normal(labels),
        feature_ensemble=feature_ensemble,
        **options,
    ).pred_masks
    return painted[:, :, SIZE:] * STD + MEAN


@pytest.mark.parametrize("arrangement", [0, 1])
@pytest.mark.parametrize("kind", ["instance", "semantic"])
def test_the_ensemble_is_the_formula(kind, arrangement):
    model, (queries, images, labels) = tiny(), prompts()
    answers = SegGptInContext(model, kind)(queries, images, labels, arrangement)
    assert answers.shape == queries.shape and 0 <= answers.min() and answers.max() <= 1 and answers.std() > 0.05
    for answer, *example in zip(answers, queries, images, labels):
        assert apart(answer, by_hand(model, *example, kind, arrangement)) < 1e-5


@pytest.mark.parametrize("merge_index", [0, 1])
def test_the_streams_stay_apart_wherever_they_merge(merge_index):
    model, (queries, images, labels) = tiny(merge_index=merge_index), prompts(1)
    answer = SegGptInContext(model)(queries, images, labels)[0]
    assert apart(answer, by_hand(model, queries[0], images[0], labels[0])) < 1e-5


def test_the_upstream_ensemble_is_upstreams_and_differs_in_one_block():
    model, (queries, images, labels) = tiny(), prompts()
    original, upstream = (
        SegGptInContext(model, ensemble=name)(queries, images, labels) for name in ("original", "upstream")
    )
    for answer, *example in zip(upstream, queries, images, labels):
        painted = own(model, *example, feature_ensemble=True)
        assert apart(answer, painted.mean(0).clamp(0, 1)) < 1e-6
        assert apart(painted[:, :, 1:], painted[:1, :, 1:]) < 1e-6  # only the row next to the example differs
        assert apart(answer, by_hand(model, *example, mixed=True)) < 1e-5
    assert apart(original, upstream) > 1e-3


@pytest.mark.parametrize("ensemble", ["original", "upstream"])
def test_one_example_is_the_plain_model(ensemble):
    model, (queries, images, labels) = tiny(), prompts(2, 1)
    answers = SegGptInContext(model, ensemble=ensemble)(queries, images, labels)
    for answer, *example in zip(answers, queries, images, labels):
        assert apart(answer, own(model, *example, feature_ensemble=False)[0].clamp(0, 1)) < 1e-6
        # upstream's ensemble of one is not
        assert apart(answer, own(model, *example, feature_ensemble=True)[0].clamp(0, 1)) > 1e-3


@pytest.mark.parametrize("ensemble", ["original", "upstream"])
def test_a_batch_is_its_queries_one_by_one(ensemble):
    f, (queries, images, labels) = SegGptInContext(tiny(), ensemble=ensemble), prompts(4, 3)
    together = f(queries, images, labels)
    for i in range(4):
        assert apart(together[i : i + 1], f(queries[i : i + 1], images[i : i + 1], labels[i : i + 1])) < 1e-5
    assert apart(together[0], together[1]) > 1e-3


@pytest.mark.parametrize("arrangement", [0, 1])
def test_copies_of_an_example_count_once_and_order_does_not_count(arrangement):
    f, (queries, images, labels) = SegGptInContext(tiny()), prompts()
    one = f(queries, images[:, :1], labels[:, :1], arrangement)
    copies = f(queries, images[:, :1].expand_as(images), labels[:, :1].expand_as(labels), arrangement)
    assert apart(one, copies) < 1e-5
    several = f(queries, images, labels, arrangement)
    assert apart(several, f(queries, images[:, [2, 0, 1]], labels[:, [2, 0, 1]], arrangement)) < 1e-5
    assert apart(several, one) > 1e-3


@pytest.mark.parametrize("ensemble", ["original", "upstream"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_run(dtype, ensemble):
    queries, images, labels = prompts()
    exact = SegGptInContext(tiny(), ensemble=ensemble)(queries, images, labels)
    f = SegGptInContext(tiny().to(dtype), ensemble=ensemble)
    answers = f(queries, images, labels)
    assert answers.dtype == torch.float32 and apart(answers, exact) < 0.1
    assert (answers - exact).abs().mean() < 0.01
    assert f(queries.to(dtype), images, labels).dtype == dtype
    assert f.features(queries).dtype == torch.float32


def test_upstream_does_not_cast_the_labels():
    # when this runs, the cast in SegGptInContext is no longer needed
    query, images, labels = (x[0] for x in prompts(1))
    with pytest.raises(RuntimeError, match="same"):
        own(tiny().half(), query, images, labels, feature_ensemble=False)


def test_an_error_leaves_nothing_behind(monkeypatch):
    model, arguments = tiny(), prompts()
    f = SegGptInContext(SegGptInContext(model).model)
    before = f(*arguments)
    assert all(len(layer.attention._forward_hooks) == 1 for layer in model.model.encoder.layers)

    def fail(*_):
        assert ENSEMBLE.get() is not None
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "forward", fail)
        with pytest.raises(MemoryError):
            f(*arguments)
    assert ENSEMBLE.get() is None
    assert apart(f(*arguments), before) == 0


def test_the_model_is_frozen():
    f, (queries, images, labels) = SegGptInContext(tiny().train()), prompts()
    assert f.train() is f and not any(module.training for module in f.model.modules())
    assert not any(parameter.requires_grad for parameter in f.parameters())
    answers = f(queries.requires_grad_(), images, labels)
    assert not answers.requires_grad and not f.features(queries).requires_grad
    assert apart(answers, f(queries, images, labels)) == 0


@pytest.mark.parametrize("bias, answer", [(50.0, 1.0), (-50.0, 0.0)])
def test_answers_are_clamped(bias, answer):
    f, (queries, images, labels) = SegGptInContext(tiny()), prompts()
    f.model.decoder.decoder_pred.head.bias.data += bias
    assert torch.equal(f(queries, images, labels), torch.full_like(queries, answer))


def test_encode_keeps_images_as_they_are():
    f, (queries, images, labels) = SegGptInContext(tiny()), prompts()
    assert f.encode(queries) is queries and f.encode(images) is images
    assert apart(f.predict(queries, images, labels), f(queries, images, labels)) == 0


def test_features_are_the_last_hidden_states_of_the_lower_half():
    model, images = tiny(), prompts(3)[0]
    features = SegGptInContext(model, "semantic").features(images)
    assert features.shape == (3, 4, 4, 16)
    same, black = normal(images), normal(torch.zeros_like(images))
    with torch.no_grad():
        base = model.model(same, same, black, embedding_type="semantic")
    assert isinstance(model.model, SegGptModel) and apart(features, base.last_hidden_state[:, 4:]) == 0
    assert apart(features[1:2], SegGptInContext(model, "semantic").features(images[1:2])) < 1e-5


@pytest.mark.parametrize(
    "changes, size",
    [({"image_size": 32}, (16, 32)), ({"image_size": [64, 16]}, (32, 16)), ({"return_dict": False}, (16, 16))],
)
def test_other_configurations(changes, size):
    f, (queries, images, labels) = SegGptInContext(tiny(**changes)), prompts(size=size)
    assert f.image_size == size
    for arrangement in (0, 1):
        assert f(queries, images, labels, arrangement).shape == queries.shape
    assert f.features(queries).shape == (2, size[0] // 4, size[1] // 4, 16)


def test_another_model_or_name_is_refused():
    model = tiny()
    with pytest.raises(TypeError, match="SegGptModel: pass a SegGptForImageSegmentation"):
        SegGptInContext(model.model)
    with pytest.raises(ValueError, match="embedding_type='both': it must be one of"):
        SegGptInContext(model, "both")
    with pytest.raises(ValueError, match="ensemble='mean': it must be one of"):
        SegGptInContext(model, ensemble="mean")
    with pytest.raises(ValueError, match=r"image_size=\(36, 16\)"):
        SegGptInContext(tiny(image_size=(36, 16)))


def test_wrong_inputs_are_refused():
    f, (queries, images, labels) = SegGptInContext(tiny()), prompts()
    nan = labels.clone()
    nan[1, 2, 0, 3, 4] = float("nan")
    cases = [
        ((queries[..., :-1], images, labels), ValueError, r"queries is \(2, 3, 16, 15\): it must be \(B, 3, 16, 16\)"),
        ((queries[0], images, labels), ValueError, "queries is"),
        ((queries[:0], images[:0], labels[:0]), ValueError, "at least one"),
        ((queries, images[:, 0], labels[:, 0]), ValueError, r"images is .* must be \(2, m, 3, 16, 16\)"),
        ((queries[:1], images, labels), ValueError, r"images is \(2, .* must be \(1, m"),
        ((queries, images[:, :0], labels[:, :0]), ValueError, "images is .* at least one"),
        ((queries, images, labels[:, :2]), ValueError, r"labels is \(2, 2, .* must be \(2, 3"),
        ((queries, images, labels[:, :, :1]), ValueError, "labels is"),
        (((255 * queries).byte(), images, labels), TypeError, r"queries is of torch.uint8.*\[0, 1\]"),
        ((queries, images.numpy(), labels), TypeError, "images is of float32"),
        ((queries, None, labels), TypeError, "images is of NoneType"),
        ((queries * 255, images, labels), ValueError, "queries has values outside .* 255"),
        ((queries, images - 0.5, labels), ValueError, "images has values outside"),
        ((queries, images, nan), ValueError, "labels has values .* NaN"),
        ((queries, images, labels, 2), ValueError, r"arrangement=2: ensemble='original' has \[0, 1\]"),
        ((queries, images, labels, -1), ValueError, "arrangement=-1"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            f(*arguments)
    with pytest.raises(ValueError, match=r"arrangement=1: ensemble='upstream' has \[0\]"):
        SegGptInContext(tiny(), ensemble="upstream")(queries, images, labels, 1)
    with pytest.raises(ValueError, match="images is"):
        f.features(images)
