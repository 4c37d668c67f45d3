"""The eight arrangements of the 2x2 canvas, models that paint them, and prompt-SelF's vote."""

import pytest
import torch
from torch import nn

from hf_effdl.vicl.remote_code.frozen_canvas import ARRANGEMENTS, CanvasModel, arrange, unarrange, vote


# the four cells in reading order, written out
CELLS = (
    (slice(0, 111), slice(0, 111)),
    (slice(0, 111), slice(113, 224)),
    (slice(113, 224), slice(0, 111)),
    (slice(113, 224), slice(113, 224)),
)
every = pytest.mark.parametrize("arrangement", range(8))


def cells(*leading, seed=0):
    return torch.rand(*leading, 3, 111, 111, generator=torch.Generator().manual_seed(seed))


def hidden_cell(mask):
    """Index in reading order of the hidden quarter."""
    return [bool(mask[0, row, column]) for row in (0, 13) for column in (0, 13)].index(True)


class Analogy(CanvasModel):
    """Fills the hidden cell by its two neighbours less the diagonal one: Q + SM - S, wherever they stand."""

    def paint(self, canvas, mask):
        at = hidden_cell(mask)
        painted = torch.zeros_like(canvas)
        painted[..., CELLS[at][0], CELLS[at][1]] = sum(
            (-1 if i == 3 - at else 1) * canvas[..., rows, columns]
            for i, (rows, columns) in enumerate(CELLS)
            if i != at
        )
        return painted


class Flat(CanvasModel):
    """Paints one level everywhere."""

    def __init__(self, level):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level, dtype=torch.float64))

    def paint(self, canvas, mask):
        return self.level.expand(canvas.shape)


def test_the_arrangements_are_all_that_keep_the_example_opposite_the_answer():
    assert len(set(ARRANGEMENTS)) == 8 and ARRANGEMENTS[0] == ("S", "SM", "Q", "QM")
    for layout in ARRANGEMENTS:
        assert sorted(layout) == ["Q", "QM", "S", "SM"]
        assert layout.index("S") + layout.index("QM") == 3 and layout.index("SM") + layout.index("Q") == 3


@every
def test_cells_stand_where_the_table_says_on_white(arrangement):
    parts = {name: cells(2, seed=seed) for seed, name in enumerate(("S", "SM", "Q"))}
    canvas, _ = arrange(parts["S"], parts["SM"], parts["Q"], arrangement)
    expected = torch.ones(2, 3, 224, 224)
    for name, (rows, columns) in zip(ARRANGEMENTS[arrangement], CELLS):
        if name != "QM":
            expected[..., rows, columns] = parts[name]
    assert torch.equal(canvas, expected)


@every
def test_the_mask_hides_the_answer_and_nothing_else(arrangement):
    _, mask = arrange(cells(2), cells(2), cells(2), arrangement)
    assert mask.shape == (2, 14, 14) and mask.dtype == torch.bool and torch.equal(mask[0], mask[1])
    assert mask[0].sum() == 49 and (~mask[0]).sum() == 147
    hidden = mask[0].repeat_interleave(16, 0).repeat_interleave(16, 1)
    for name, (rows, columns) in zip(ARRANGEMENTS[arrangement], CELLS):
        assert hidden[rows, columns].all() if name == "QM" else not hidden[rows, columns].any()


@every
def test_unarranging_gives_the_answer_back(arrangement):
    truth = cells(2, seed=5)
    canvas, mask = arrange(cells(2), cells(2), cells(2), arrangement)
    rows, columns = CELLS[hidden_cell(mask)]
    canvas[..., rows, columns] = truth
    assert torch.equal(unarrange(canvas, arrangement), truth)


@every
def test_a_painter_answers_alike_in_every_arrangement(arrangement):
    queries, images, labels = cells(2, seed=1) / 4, cells(2, 3, seed=2) / 4, 0.5 + cells(2, 3, seed=3) / 4
    answers = Analogy()(queries, images, labels, arrangement)
    assert torch.allclose(answers, queries + (labels - images).mean(1), atol=1e-6)
    one = Analogy()(queries, images[:, :1], labels[:, :1], arrangement)
    assert torch.allclose(one, queries + labels[:, 0] - images[:, 0], atol=1e-6)


@pytest.mark.parametrize("level, answer", [(2.0, 1.0), (-1.0, 0.0), (0.5, 0.5)])
def test_models_are_frozen_and_their_answers_clamped(level, answer):
    queries, images = cells(2).requires_grad_(), cells(2, 1, seed=1)
    model = Flat(level).train()
    assert not model.training and not model(queries, images, images).requires_grad
    assert torch.equal(model(queries, images, images), torch.full_like(queries, answer))  # in the queries' dtype
    assert model.image_size == (111, 111) and model.arrangements == 8 and model.encode(images) is images


@pytest.mark.parametrize(
    "levels, white",
    [
        ([127] * 8, False),
        ([128] * 8, True),
        ([255] * 4 + [0] * 4, True),  # 127.5
        ([255] * 3 + [0] * 5, False),
        ([254] * 4 + [0] * 4, False),  # 127
        ([128] + [127] * 7, True),
        ([127.9] * 8, False),  # whole levels are averaged
        ([200], True),
        ([0, 255, 128], True),
    ],
)
def test_votes(levels, white):
    predictions = torch.tensor(levels).div(255).reshape(-1, 1, 1, 1, 1).repeat(1, 2, 3, 4, 5)
    assert torch.equal(vote(predictions), torch.full((2, 3, 4, 5), float(white)))
    mean = vote(predictions, threshold=False)
    assert mean.shape == (2, 3, 4, 5) and torch.allclose(mean, torch.tensor(sum(levels) / len(levels) / 255.0))


def test_one_dark_channel_is_black():
    predictions = torch.ones(8, 1, 3, 2, 2)
    predictions[:5, :, 1, 0, 1] = 0
    expected = torch.ones(1, 3, 2, 2)
    expected[:, :, 0, 1] = 0
    assert torch.equal(vote(predictions), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_level_is_counted_whole_in_every_dtype(dtype):
    levels = (torch.arange(256).to(dtype) / 255).reshape(1, 1, 1, 1, 256).expand(1, 1, 3, 1, 256)
    voted = vote(levels)
    assert voted.dtype == dtype and torch.equal(voted[0, 0, 0], (torch.arange(256) > 127).to(dtype))


class Small(CanvasModel):
    def paint(self, canvas, mask):
        return canvas[..., ::2, ::2]


def test_wrong_inputs_are_refused():
    model, queries, images = Analogy(), cells(2), cells(2, 3)
    for call, error, message in [
        (lambda: CanvasModel(), TypeError, "abstract"),
        (lambda: model(queries, images, images, 8), ValueError, "arrangement=8: it must be from 0 to 7"),
        (lambda: model(queries, images, images, -1), ValueError, "arrangement=-1"),
        (lambda: model(queries[..., 1:], images, images), ValueError, "queries is .* it must be"),
        (lambda: model(queries, images[:, :0], images[:, :0]), ValueError, "at least one"),
        (lambda: model(queries, images, images[:, :2]), ValueError, "labels is"),
        (lambda: model(queries * 2, images, images), ValueError, "queries has values outside"),
        (lambda: model(queries.long(), images, images), TypeError, "torch.int64"),
        (
            lambda: arrange(queries, queries[:1], queries),
            ValueError,
            r"labels is \(1, 3, 111, 111\): it must be \(2, ",
        ),
        (lambda: unarrange(queries), ValueError, "canvas is"),
        (lambda: vote(queries), ValueError, "predictions is"),
        (lambda: vote(queries[:0, None]), ValueError, "predictions is .* at least one"),
        (lambda: Small()(queries, images, images), ValueError, r"canvas is \(6, 3, 112, 112\)"),
    ]:
        with pytest.raises(error, match=message):
            call()
