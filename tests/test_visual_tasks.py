"""Any image to RGB, labels to images and back, and the scores against brute force."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from hf_effdl.vicl.remote_code.images import pixels, to_rgb
from hf_effdl.vicl.remote_code.pipeline_inputs import soft_map
from hf_effdl.vicl.remote_code.visual_tasks import (
    TASKS,
    Colourisation,
    Detection,
    ImageToImage,
    Segmentation,
    find_task,
    largest_boxes,
)


def photo(width=7, height=5, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image, orientation, kind="JPEG"):
    """The file of an image whose EXIF orientation says that a viewer turns it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def white_on_black(mask):
    return torch.as_tensor(np.asarray(mask), dtype=torch.float32).unsqueeze(-3).expand(*np.shape(mask)[:-2], 3, -1, -1)


# ---- any image to RGB


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_becomes_rgb_with_its_colours(mode):
    image = Image.new("RGB", (3, 2), "white")
    for step in {"La": ["LA"], "PA": ["P"], "RGBa": ["RGBA"]}.get(mode, []) + [mode]:
        image = image.convert(step)
    got = to_rgb(image)
    assert got.mode == "RGB" and got.size == (3, 2) and got.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_what_is_transparent_is_white_and_half_is_half(mode):
    straight = {"RGBa": "RGBA", "La": "LA"}.get(mode, mode)
    for alpha, value in ((0, 255), (255, 0), (128, 127)):
        image = Image.new(straight, (2, 2), (0,) * (len(straight) - 1) + (alpha,)).convert(mode)
        assert to_rgb(image).getpixel((0, 0)) == (value,) * 3


def test_transparency_of_palettes_and_of_single_colours_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    shown = to_rgb(encoded(palette, transparency=1))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert to_rgb(encoded(Image.new("L", (1, 1), 9), transparency=9)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 256, 257, 32768, 65535]], dtype=np.uint16)
    expected = [0, 1, 1, 128, 255]
    for image in (
        values,
        values.astype(">u2"),
        Image.fromarray(values),
        Image.fromarray(values.astype(np.int32)),
        encoded(Image.fromarray(values)),
        encoded(Image.fromarray(values), "TIFF"),
    ):
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


def test_arrays_of_each_type_mean_the_same_picture():
    image = photo()
    array = np.asarray(image)
    for same in (array, array / 255, (array / 255).astype(np.float32), array.astype(np.uint16) * 257):
        assert np.array_equal(np.asarray(to_rgb(same)), array)
    assert np.asarray(to_rgb(array[:, :, :1])).shape == (5, 7, 3)
    assert to_rgb(np.array([[True, False]])).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(np.zeros((2, 2, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.fromarray(np.full((1, 1), 0.5, np.float32))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says_and_the_mask_belongs_to_the_turned_one(orientation):
    shown = photo(6, 4)
    # what a camera stores is turned the other way round; orientations 6 and 8 undo each other
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = shown.transpose(Image.Transpose(undone[orientation])) if orientation > 1 else shown
    file = turned(stored, orientation, "PNG")
    assert np.array_equal(np.asarray(to_rgb(file)), np.asarray(shown))
    mask = np.eye(4, 6, dtype=np.uint8)
    assert np.array_equal(np.asarray(Segmentation().label(mask, file))[:, :, 0] == 255, mask == 1)
    if stored.size != shown.size:
        with pytest.raises(ValueError, match="the mask is 4 x 6 pixels and its image 6 x 4 .* EXIF"):
            Segmentation().label(mask.T, file)
        with pytest.raises(ValueError, match="width and height"):
            Detection().label([0, 0, 4, 6], file)


@pytest.mark.parametrize(
    "image, error, says",
    [
        (None, TypeError, "got NoneType; pass a PIL image"),
        (torch.zeros(3, 4, 4), TypeError, "got Tensor"),
        (np.zeros((2, 2), np.int64), TypeError, "int64 .* pass uint8"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"channels last; got \(3, 8, 8\)"),
        (np.zeros((2, 2, 2), np.uint8), ValueError, "channels last"),
        (np.zeros((1, 2, 2, 3), np.uint8), ValueError, "channels last"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty"),
        (Image.new("RGB", (0, 4)), ValueError, "empty"),
        (np.array([[0.0, np.nan]]), ValueError, r"in \[0, 1\]; got nan"),
        (np.array([[0.0, 255.0]]), ValueError, r"in \[0, 1\]; got 0.0..255"),
        (np.array([[-0.1, 1.0]]), ValueError, r"in \[0, 1\]"),
        (Image.fromarray(np.array([[70000]], np.int32)), TypeError, "int32 .*70000"),
        (b"not an image", ValueError, "cannot be read"),
        (encoded(photo(64, 64))[:-2000], ValueError, "cannot be read"),
        ({}, TypeError, "got NoneType"),
        ("/no/such/file.png", FileNotFoundError, "no/such"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, error, says):
    with pytest.raises(error, match=says):
        to_rgb(image)


def test_pixels_are_squashed_channels_first_in_zero_to_one():
    image = photo()
    got = pixels([image, image.convert("L")], (5, 7))
    assert got.shape == (2, 3, 5, 7) and got.dtype == torch.float32 and got.is_contiguous()
    assert np.array_equal((got[0] * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(image))
    got = pixels([photo(64, 48)], (16, 12))
    assert got.shape == (1, 3, 16, 12) and got.min() >= 0 and got.max() <= 1
    assert pixels([], (4, 6)).shape == (0, 3, 4, 6)
    for one in (image, np.asarray(image), "photo.png", torch.zeros(3, 4, 4)):
        with pytest.raises(TypeError, match="pass a list"):
            pixels(one, (4, 4))


# ---- the largest component


def reference_boxes(mask):
    """By scipy, one mask: bounding box of the largest component, ties to the first in reading order."""
    components, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return [0, 0, 0, 0]
    sizes = np.bincount(components.ravel())[1:]
    firsts = [np.flatnonzero(components.ravel() == 1 + i)[0] for i in range(count)]
    best = min(range(count), key=lambda i: (-sizes[i], firsts[i]))
    rows, columns = np.nonzero(components == best + 1)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (16, 16), (31, 12)])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.41, 0.6, 0.95])
def test_boxes_of_random_masks_are_scipys(size, density):
    masks = torch.rand(40, *size, generator=torch.Generator().manual_seed(1)) < density
    boxes, found = largest_boxes(masks)
    assert boxes.tolist() == [reference_boxes(mask.numpy()) for mask in masks]
    assert torch.equal(found, masks.flatten(1).any(1))


def test_a_maze_an_empty_batch_and_an_empty_mask():
    maze = torch.zeros(61, 61, dtype=torch.bool)
    maze[::2] = True
    maze[1::4, -1] = maze[3::4, 0] = True  # one long corridor
    boxes, found = largest_boxes(torch.stack([maze, torch.zeros_like(maze), torch.ones_like(maze)]))
    assert boxes.tolist() == [[0, 0, 61, 61], [0, 0, 0, 0], [0, 0, 61, 61]] and found.tolist() == [True, False, True]
    boxes, found = largest_boxes(torch.zeros(0, 4, 4, dtype=torch.bool))
    assert boxes.shape == (0, 4) and found.shape == (0,)


# ---- segmentation


def test_masks_by_class_black_and_white_void_and_named_values():
    image = photo(5, 1)

    def drawn(mask, **options):
        return (np.asarray(Segmentation(**options).label(mask, image))[0, :, 0] // 255).tolist()

    classes = np.array([[0, 1, 2, 255, 1]], dtype=np.uint8)
    assert drawn(classes, foreground="any") == [0, 1, 1, 0, 1]
    for one in ([1], 1, {1}):
        assert drawn(classes, foreground=one) == [0, 1, 0, 0, 1]
    assert drawn(classes, foreground=[9]) == [0, 0, 0, 0, 0]  # no foreground is allowed
    assert drawn(classes, foreground=[255]) == [0, 0, 0, 1, 0]
    assert drawn(classes, foreground="any", void=None) == [0, 1, 1, 1, 1]
    assert drawn(classes, foreground="any", void=2) == [0, 1, 0, 1, 1]
    assert drawn(np.zeros((1, 5))) == [0] * 5
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    palette.putpalette([7, 8, 9] * 256)
    assert drawn(palette, foreground="any") == [0, 1, 1, 0, 1]  # the indices count, not the colours


@pytest.mark.parametrize(
    "mask, says",
    [
        (np.zeros((5, 6), np.uint8), "the mask is 6 x 5 pixels and its image 7 x 5"),
        (np.zeros((7, 5), np.uint8), "the mask is 5 x 7 pixels"),
        (np.full((5, 7), 0.4), "whole class numbers; threshold"),
        (np.full((5, 7), np.nan), "whole class numbers"),
        (np.full((5, 7), -1), "no negative values; got -1"),
        (photo(), "one class number a pixel; got PIL mode RGB"),
        (photo().convert("RGBA"), "got PIL mode RGBA"),
        (np.zeros((2, 5, 7)), "one class number a pixel"),
        (None, "one class number a pixel"),
        ("/dev/null", "cannot be read"),
    ],
)
def test_masks_that_are_none_are_refused(mask, says):
    with pytest.raises(ValueError, match=says):
        Segmentation().label(mask, photo())
    with pytest.raises(ValueError, match="names no value"):
        Segmentation(foreground=[])


@pytest.mark.parametrize("seed", range(20))
def test_masks_and_boxes_survive_encoding_and_decoding(seed):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 40, 2).tolist()
    image, mask = photo(w, h), rng.integers(0, 2, (h, w))
    task = Segmentation()
    soft = task.labels([mask, 1 - mask], [image, image], (h, w))
    assert set(soft.unique().tolist()) <= {0.0, 1.0}
    for decoded, truth in zip(task.decode(soft, (h, w)), (mask, 1 - mask)):
        assert decoded.dtype == np.uint8 and np.array_equal(decoded, truth)
    assert np.array_equal(task.decode(soft[0], (h, w)), mask)
    assert torch.equal(soft, pixels([task.label(mask, image), task.label(1 - mask, image)], (h, w)))

    x0, y0 = rng.integers(0, w), rng.integers(0, h)
    box = [int(x0), int(y0), int(rng.integers(x0, w)) + 1, int(rng.integers(y0, h)) + 1]
    task = Detection()
    soft = task.labels([box, None], [image, image], (h, w))
    assert task.decode(soft, (h, w)) == task.decode(soft, [(h, w)] * 2) == [box, None]
    assert torch.equal(soft, pixels([task.label(box, image), task.label(None, image)], (h, w)))
    # a canvas of whole multiples keeps the box exactly
    assert task.decode(task.labels([box], [image], (3 * h, 2 * w)), (h, w)) == [box]


def test_a_grey_answer_is_white_from_the_middle_on():
    soft = torch.tensor([0.0, 0.49, 0.5, 1.0]).expand(3, 1, 4)
    assert Segmentation().decode(soft, (1, 4)).tolist() == [[0, 0, 1, 1]]
    coloured = torch.tensor([[1.0, 1, 0], [1, 0, 0]]).T[:, None]  # two of three channels are nearer to white
    assert Segmentation().decode(coloured, (1, 2)).tolist() == [[1, 0]]
    # as the squared distances to white and black say
    soft = torch.rand(3, 20, 20, dtype=torch.float64)
    nearer = (soft - 1).square().sum(0) < soft.square().sum(0)
    assert np.array_equal(Segmentation().decode(soft, (20, 20)), nearer.numpy())


def test_decoding_scales_to_each_querys_size():
    soft = torch.zeros(2, 3, 4, 4)
    soft[:, :, :2] = 1
    first, second = Segmentation().decode(soft, [(8, 4), (6, 10)])
    assert first.shape == (8, 4) and second.shape == (6, 10) and first[:4].all() and not first[4:].any()
    assert Detection().decode(soft, [(8, 4), (6, 10)]) == [[0, 0, 4, 4], [0, 0, 10, 3]]
    assert [image.size for image in Colourisation().decode(soft, [(8, 4), (6, 10)])] == [(4, 8), (10, 6)]
    with pytest.raises(ValueError):
        Detection().decode(soft, [(8, 4)])


def test_masks_go_to_cells_by_nearest_and_colours_by_bicubic():
    image = photo(40, 30)
    mask = np.asarray(image)[:, :, 0] > 100
    assert set(Segmentation().labels([mask], [image], (7, 9)).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(
        Colourisation().labels([None], [image], (7, 9)), pixels([image], (7, 9), Image.Resampling.BICUBIC)
    )


def test_half_precision_answers_are_read_as_float32():
    soft = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(4)).half()
    for task in TASKS.values():
        got, expected = task.decode(soft, (31, 40)), task.decode(soft.float(), (31, 40))
        assert np.array_equal(np.asarray(got), np.asarray(expected))


def test_nan_in_a_painted_image_is_no_answer():
    soft = torch.full((3, 4, 4), float("nan"))
    for task in TASKS.values():
        with pytest.raises(ValueError, match="NaN or infinite"):
            task.decode(soft, (4, 4))
        with pytest.raises(ValueError, match="NaN or infinite"):
            task.score(soft, torch.zeros(3, 4, 4))
        with pytest.raises(ValueError, match=r"\(..., 3, h, w\)"):
            task.score(soft[0], soft[0])


# ---- detection


@pytest.mark.parametrize(
    "box, says",
    [
        ([3, 0, 3, 4], "x0 < x1 <= 7"),
        ([4, 0, 3, 4], "x0 < x1 <= 7"),
        ([0, 4, 3, 2], "y0 < y1 <= 5"),
        ([-1, 0, 3, 4], "0 <= x0"),
        ([0, 0, 8, 4], "x1 <= 7"),
        ([0, 0, 5, 7], "y1 <= 5"),
        ([0, 0, float("nan"), 4], "nan"),
        ([0, 0, 4], "four numbers"),
        (["a", 0, 4, 4], "four numbers"),
        ([0, 0, None, 4], "four numbers"),
        ([0, 0, 10**400, 4], "four numbers"),
        ([0.1, 0.1, 0.5, 0.5], "nothing above 1.*multiply shares"),
        ([[0, 0, 4, 4]], "four numbers"),
        ([], "four numbers"),
    ],
)
def test_boxes_that_are_none_are_refused(box, says):
    with pytest.raises(ValueError, match=says):
        Detection().label(box, photo())
    with pytest.raises(ValueError, match=says):
        Detection().labels([box], [photo()], (16, 16))


def test_corner_and_size_in_bytes_add_up_beyond_256():
    box = np.array([200, 10, 100, 50], dtype=np.uint8)
    assert Detection("xywh").corners(box) == [200, 10, 300, 60]


def test_a_small_box_keeps_a_pixel_and_fractions_are_rounded():
    image = photo(1000, 1000)
    cell = Detection().labels([[990.2, 995.0, 990.4, 996.0]], [image], (8, 8))[0, 0]
    assert cell.sum() == 1 and cell[7, 7] == 1
    assert Detection().labels([[490.2, 495.0, 490.4, 496.0]], [image], (8, 8))[0, 0].nonzero().tolist() == [[4, 4]]
    assert np.argwhere(np.asarray(Detection().label([1.4, 0.6, 3.6, 5.4], photo()))[:, :, 0]).min(0).tolist() == [1, 1]
    assert Detection().decode(Detection().labels([np.array([0, 0, 7, 5])], [photo()], (64, 64)), (5, 7)) == [
        [0, 0, 7, 5]
    ]


# ---- scores


def brute_iou(a, b):
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_segmentation_scores_are_brute_force(density):
    a, b = np.random.default_rng(0).random((2, 30, 9, 6)) < density
    a[0] = b[0] = b[1] = False
    got = Segmentation().score(white_on_black(a), white_on_black(b))
    assert got.shape == (30,) and np.allclose(got, [brute_iou(x, y) for x, y in zip(a, b)])
    assert got[0] == 1 and torch.equal(Segmentation().score(white_on_black(a), white_on_black(a)), torch.ones(30))


@pytest.mark.parametrize("density", [0.02, 0.3])
def test_detection_scores_are_brute_force(density):
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 30, 9, 6)) < density
    a[0] = b[0] = b[1] = False

    def filled(mask):
        x0, y0, x1, y1 = reference_boxes(mask)
        canvas = np.zeros_like(mask)
        canvas[y0:y1, x0:x1] = True
        return canvas

    got = Detection().score(white_on_black(a), white_on_black(b))
    assert np.allclose(got, [brute_iou(filled(x), filled(y)) for x, y in zip(a, b)]) and got[0] == 1


def test_colour_scores_are_the_error_of_normalised_images():
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    a, b = np.random.default_rng(2).random((2, 4, 3, 5, 6))
    expected = (((a - mean) / std - (b - mean) / std) ** 2).mean((1, 2, 3))
    assert np.allclose(Colourisation().score(torch.tensor(a), torch.tensor(b)), expected, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_scores_take_leading_dimensions_and_broadcast(task):
    predicted = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(3)).round()
    target = predicted[:, :1].flip(-1)
    scores = task.score(predicted, target)
    assert scores.shape == (2, 4) and scores.dtype == torch.float32
    one = [[task.score(predicted[i, j], target[i, 0]) for j in range(4)] for i in range(2)]
    assert torch.allclose(scores, torch.tensor(one)) and one[0][0].shape == ()
    best = task.score(target, target)
    assert torch.equal(best, torch.full((2, 1), 1.0 if task.greater_is_better else 0.0))
    assert torch.isfinite(task.score(predicted.bfloat16(), target.bfloat16())).all()


# ---- colourisation, and finding a task


def test_colourisation_shows_grey_and_wants_colour():
    task, image = Colourisation(), photo()
    grey = np.asarray(task.query(image))
    assert (grey == grey[:, :, :1]).all() and not (np.asarray(image) == grey).all()
    assert np.array_equal(np.asarray(task.label(None, image)), np.asarray(image))
    soft = task.labels([None, image], [image, image], (5, 7))
    assert torch.equal(soft, pixels([image, image], (5, 7)))
    assert np.array_equal(np.asarray(task.decode(soft[0], (5, 7))), np.asarray(image))
    with pytest.raises(ValueError, match="colour label is 6 x 5 pixels and its image 7 x 5"):
        task.label(photo(6, 5), image)
    assert np.array_equal(np.asarray(Segmentation().query(image)), np.asarray(image))


def test_a_picture_becomes_another_and_depth_comes_back_from_grey():
    task, image, clean = ImageToImage(), photo(), photo(seed=1)
    assert np.array_equal(np.asarray(task.query(image)), np.asarray(image))
    soft = task.labels([clean], [image], (5, 7))
    assert torch.equal(soft, pixels([clean], (5, 7)))
    assert np.array_equal(np.asarray(task.decode(soft[0], (5, 7))), np.asarray(clean))
    noise, colours = task.score(pixels([image], (5, 7)), soft), Colourisation().score(pixels([image], (5, 7)), soft)
    assert noise == colours > 0 == task.score(soft, soft) and not task.greater_is_better
    depth = np.random.default_rng(0).uniform(0, 10, (5, 7)).astype(np.float32)
    white = soft_map(task.labels([depth / 10], [image], (5, 7))[0], (5, 7))
    assert np.abs(10 * white - depth).max() <= 10 / 255 / 2 + 1e-6
    for label, text in ((None, "no picture as its label"), (photo(6, 5), "label is 6 x 5 pixels and its image 7 x 5")):
        with pytest.raises(ValueError, match=text):
            task.label(label, image)


def test_labels_and_images_come_in_pairs():
    for task in TASKS.values():
        with pytest.raises(ValueError):
            task.labels([], [photo()], (4, 4))
        assert task.labels([], [], (4, 6)).shape == (0, 3, 4, 6)


def test_tasks_are_found_by_name_or_given():
    assert {name: task.metric for name, task in TASKS.items()} == {
        "segmentation": "foreground_iou",
        "detection": "box_iou",
        "colourisation": "colour_mse",
        "image-to-image": "colour_mse",
    }
    assert find_task("detection") is TASKS["detection"] and not find_task("colourisation").greater_is_better
    mine = Segmentation(foreground=[3])
    assert find_task(mine) is mine and find_task("segmentation", foreground=[1, 2]).foreground == (1, 2)
    with pytest.raises(ValueError, match=r"task='segment': it must be one of \['segmentation', 'detection'"):
        find_task("segment")
    for task in ("detection", mine):
        with pytest.raises(ValueError, match="foreground= goes with task='segmentation'"):
            find_task(task, foreground=[1])
