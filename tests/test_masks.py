"""What the values of a mask mean: encodings that people have, pixel by pixel, or the sentence that refuses them."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageFilter
from pool_run import Encoder, encoded

from hf_effdl.vicl.pool.pool import ExamplePool
from hf_effdl.vicl.remote_code.masks import added, check_one_meaning, coco_mask, tally, told
from hf_effdl.vicl.remote_code.visual_tasks import Detection, Segmentation


H, W = 60, 80
PHOTO = Image.new("RGB", (W, H))
OBJECT = np.zeros((H, W), bool)
OBJECT[12:50, 20:66] = True
INNER = np.zeros((H, W), bool)  # without a border of five pixels, as void is drawn
INNER[17:45, 25:61] = True
WHITE = OBJECT.astype(np.uint8) * 255


def soft():
    large = Image.fromarray(WHITE).resize((2 * W, 2 * H), Image.Resampling.BILINEAR)
    return np.asarray(large.resize((W, H), Image.Resampling.BILINEAR))


def palette(indices, colours):
    image = Image.fromarray(indices.astype(np.uint8)).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours)
    return image


def with_(values, **places):
    out = values.copy()
    for (y, x), value in places.get("at", {}).items():
        out[y, x] = value
    return out


def classes(*values):
    """Object, its border and the ground in these values."""
    inner, border, ground = values
    return np.where(INNER, inner, np.where(OBJECT, border, ground)).astype(np.uint8)


def jpeg(mask, quality):
    return encoded(Image.fromarray(mask), "JPEG", quality=quality)


SAME = {
    "0/1": OBJECT.astype(np.uint8),
    "0/255": WHITE,
    "bool": OBJECT,
    "one bit": Image.fromarray(OBJECT),
    "whole floats": OBJECT.astype(float),
    "16 bit": OBJECT.astype(np.uint16) * 65535,
    "16 bit PNG": encoded(Image.fromarray(OBJECT.astype(np.uint16) * 65535)),
    "any value": OBJECT.astype(np.uint8) * 7,
    "soft edges": soft(),
    "soft edges, 16 bit": soft().astype(np.uint16) * 257,
    "one grey pixel inside": with_(WHITE, at={(30, 30): 128}),
    "one grey pixel outside": with_(WHITE, at={(3, 3): 7}),
    "JPEG 95": jpeg(WHITE, 95),
    "JPEG 75": jpeg(WHITE, 75),
    "of a JPEG": np.asarray(Image.open(io.BytesIO(jpeg(WHITE, 80)))),
    "RGB": np.dstack([WHITE] * 3),
    "RGBA": np.dstack([WHITE] * 3 + [np.full_like(WHITE, 255)]),
    "grey and alpha": Image.merge("LA", [Image.fromarray(WHITE), Image.new("L", (W, H), 255)]),
    "channel last": WHITE[:, :, None],
    "channel first": WHITE[None],
    "channels first": np.stack([WHITE] * 3),
    "palette": palette(OBJECT, [9, 9, 9, 200, 30, 30]),
    "palette of white and black": palette(~OBJECT, [255, 255, 255, 0, 0, 0]),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_black_and_white_is_read_so_however_it_is_encoded(name):
    assert np.array_equal(Segmentation().read(SAME[name], PHOTO).white, OBJECT)


@pytest.mark.parametrize("quality", range(10, 100, 10))
def test_a_jpeg_is_read_right_or_refused(quality):
    for mask in (jpeg(WHITE, quality), np.asarray(Image.open(io.BytesIO(jpeg(WHITE, quality))))):
        try:
            white = Segmentation().read(mask, PHOTO).white
        except ValueError as error:
            assert quality < 75 and ("JPEG changes values" in str(error) or "may be classes" in str(error))
        else:
            assert np.array_equal(white, OBJECT)


def test_a_blurred_mask_is_cut_at_the_middle():
    blurred = np.asarray(Image.fromarray(WHITE).filter(ImageFilter.GaussianBlur(2)))
    reading = Segmentation().read(blurred, PHOTO)
    assert np.array_equal(reading.white, blurred >= 128) and reading.threshold == 128


@pytest.mark.parametrize(
    "mask, foreground, white",
    [
        (classes(15, 255, 0), None, INNER),  # a class with a border of void
        (classes(1, 1, 255), None, OBJECT),  # void around it
        (classes(1, 3, 2), 1, INNER),  # a trimap
        (classes(1, 3, 2), [1, 3], OBJECT),
        (classes(255, 128, 0), [128, 255], OBJECT),  # a matte
        (classes(3, 255, 0), 255, OBJECT & ~INNER),
        (classes(1, 2, 0), "any", OBJECT),
        (classes(1, 255, 2), "any", ~(OBJECT & ~INNER)),
        (soft(), 255, OBJECT),  # soft edges belong to what is named
        (jpeg(WHITE, 80), 255, OBJECT),
        (OBJECT, 3, OBJECT),  # what is bool is no class number
    ],
)
def test_classes_are_what_was_named(mask, foreground, white):
    assert np.array_equal(Segmentation(foreground).read(mask, PHOTO).white, white)


@pytest.mark.parametrize(
    "mask, text",
    [
        (classes(1, 3, 2), r"3 values, 1, 2, 3, which may be classes: name the object by foreground="),
        (classes(255, 128, 0), "3 values, 0, 128, 255, which may be classes"),
        (classes(1, 2, 0), "which may be classes"),
        (classes(1, 1, 2), "2 values, 1, 2, which may be classes"),
        (np.tile(np.arange(W, dtype=np.uint8) * 3, (H, 1)), "80 values, 0, 3, 6.*which may be classes"),
        (jpeg(classes(15, 255, 0), 90), "JPEG changes values: save masks as PNG"),
        (np.dstack([WHITE] * 4), "transparent in places"),
        (np.dstack([WHITE, WHITE, 255 - WHITE]), "one class number a pixel"),
        (soft() / 255, "whole class numbers"),
    ],
)
def test_what_may_mean_several_things_is_refused(mask, text):
    with pytest.raises(ValueError, match=text):
        Segmentation().read(mask, PHOTO)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_objects_with_void_are_never_taken_for_soft_edges(seed):
    check_random(seed)


@pytest.mark.parametrize("seed", range(12))
def test_some_random_objects_with_void(seed):
    check_random(seed)


def check_random(seed):
    random = np.random.default_rng(seed)
    mask = np.zeros((H, W), np.uint8)
    y, x, side = random.integers(6, 20), random.integers(6, 40), int(random.integers(3, 30))
    ring, kinds = int(random.integers(1, 6)), int(random.integers(1, 12))
    mask[y - ring : y + side + ring, x - ring : x + side + ring] = 255
    inside = mask[y : y + side, x : x + side]
    inside[:] = 1 + np.arange(inside.shape[1]) * kinds // inside.shape[1]
    try:
        white = Segmentation().read(mask, Image.new("RGB", (W, H))).white
    except ValueError as error:
        assert kinds > 1 and "classes" in str(error)
    else:
        assert len(np.unique(inside)) == 1 and np.array_equal(white, mask == inside[0, 0])


# ---- COCO


def test_polygons_are_what_their_outline_holds():
    drawn = np.zeros((6, 8), int)
    drawn[1:4, 2:6] = 1
    assert np.array_equal(coco_mask([[2, 1, 6, 1, 6, 4, 2, 4]], (6, 8)), drawn)
    drawn[4:6, 0:2] = 1  # two parts, one of which reaches out of the image
    assert np.array_equal(coco_mask([[2, 1, 6, 1, 6, 4, 2, 4], [-3, 4, 2, 4, 2, 9, -3, 9]], (6, 8)), drawn)
    triangle = coco_mask([[0, 0, 6, 0, 0, 6]], (6, 8)).astype(int)
    assert triangle.tolist() == [[1] * (5 - y) + [0] * (3 + y) for y in range(6)]
    image = Image.new("RGB", (8, 6))
    assert np.asarray(Segmentation(5).label([[2, 1, 6, 1, 6, 4, 2, 4]], image))[2, 3, 0] == 255


@pytest.mark.parametrize("value", [1, 7, 255, True, 1.0])
def test_lists_of_the_size_of_the_image_are_its_pixels_and_no_polygons(value):
    white = np.zeros((6, 8), bool)
    white[1:4, 2:6] = True
    rows = [[value * bool(one) for one in row] for row in white.tolist()]
    image = Image.new("RGB", (8, 6))
    assert np.array_equal(Segmentation().read(rows, image).white, white)
    other = np.array([[0, 0, 8, 0, 8, 6, 0, 6]])  # of arrays and NumPy's numbers as well as of lists
    for whole in (list(other), [list(other[0])], other.tolist()):
        assert Segmentation().read(whole, image).white.all()


@pytest.mark.parametrize(
    ("polygons", "says"),
    [
        ([[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]], "hold nothing above 1.*multiply shares"),
        ([[0, 0, 1, 1, 1, 0]] * 4, "lists must be of its image's size"),  # a mask of 4 x 6
        ([[0, 0, 1e308, 0, 1e308, 1e308]], "huge"),
        ([[0, 0, 10**400, 0, 5, 5]], "huge"),
        ([[0, 0, float("nan"), 0, 5, 5]], "NaN"),
    ],
)
def test_polygons_that_are_not_in_pixels_are_refused(polygons, says):
    with pytest.raises(ValueError, match=says):
        Segmentation().read(polygons, Image.new("RGB", (8, 6)))
    assert coco_mask([[0, 0, 1, 0, 1, 1, 0, 1]], (6, 8)).sum() == 1  # one pixel in its corner is a polygon


@pytest.mark.parametrize("value", [float("inf"), 1e30, 2.0**60, float("nan"), 0.5])
def test_floats_that_are_no_class_numbers_are_refused(value):
    with pytest.raises(ValueError, match="whole class numbers"):
        Segmentation().read(np.where(np.eye(6, 8), value, 0), Image.new("RGB", (8, 6)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32])
def test_a_tensor_is_a_mask(dtype):
    mask = torch.eye(6, 8)
    of_training = mask.clone().requires_grad_()
    for label in (mask.to(dtype), of_training):
        assert np.array_equal(Segmentation().read(label, Image.new("RGB", (8, 6))).white, mask.bool().numpy())


def test_runs_go_down_the_columns_packed_or_not():
    mask = np.zeros((3, 4), int)
    mask[1:3, 0] = mask[0, 2] = 1
    for counts in ([1, 2, 3, 1, 5], "12313", b"12313"):
        if isinstance(counts, list):
            assert np.array_equal(coco_mask({"size": [3, 4], "counts": counts}, (3, 4)), mask)
    large = np.zeros((50, 40), int)
    large[10:40, 5:30] = 1
    counts = runs_of(large)
    for form in (counts, packed(counts), packed(counts).encode()):
        assert np.array_equal(coco_mask({"size": [50, 40], "counts": form}, (50, 40)), large)
    for wrong, text in (
        ({"size": [4, 3], "counts": [12]}, "of a mask of size"),
        ({"size": [3, 4], "counts": [5]}, "do not add up to the 12 pixels"),
        ({"size": [3, 4], "counts": [-5, 17]}, "do not add up"),
        ({"size": [3, 4], "counts": "~~~~~~~~"}, "no compressed counts"),
        ({"size": [3, 4], "counts": [10**12]}, "do not add up"),
        ({"size": 12, "counts": [12]}, "of a mask of size 12"),
    ):
        with pytest.raises(ValueError, match=text):
            coco_mask(wrong, (3, 4))


def runs_of(mask):
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return counts if flat[0] == 0 else [0, *counts]


def packed(counts):
    """COCO's text, by its definition."""
    letters = []
    for i, count in enumerate(counts):
        value = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            letters.append(chr(48 + bits + 32 * more))
    return "".join(letters)


def test_boxes_of_coco_are_corner_and_size():
    image = Image.new("RGB", (8, 6))
    assert np.array_equal(
        np.asarray(Detection("xywh").label([1, 2, 3, 4], image)), np.asarray(Detection().label([1, 2, 4, 6], image))
    )
    with pytest.raises(ValueError, match="boxes='yxyx': choose one of"):
        Detection("yxyx")


# ---- a pool


def test_a_pool_says_once_what_it_took_its_masks_for(tmp_path, capsys):
    masks = [
        encoded(Image.fromarray(mask)) for mask in (WHITE, soft(), np.zeros_like(WHITE), np.full_like(WHITE, 255))
    ]
    data = Dataset.from_dict({"image": [encoded(PHOTO)] * 4, "label": masks})
    with pytest.warns(UserWarning) as said:
        pool = ExamplePool.from_dataset(data, encoder=Encoder(), cache_dir=tmp_path, progress=False)
    texts = " ".join(str(one.message) for one in said)
    assert "1 of 4 labels mark nothing" in texts and "1 of 4 labels mark every pixel" in texts
    printed = capsys.readouterr().err
    assert printed.count("masks:") == 1 and "masks: binary 0/255, " in printed and "threshold 128" in printed
    card = (pool.save_pretrained(tmp_path / "saved") / "README.md").read_text()
    assert "what the masks were taken for" in card and "binary 0/255, " in card


def test_masks_that_each_have_a_class_of_their_own_are_classes(tmp_path):
    masks = [encoded(Image.fromarray(OBJECT.astype(np.uint8) * value)) for value in (1, 2)]
    data = Dataset.from_dict({"image": [encoded(PHOTO)] * 2, "label": masks})
    options = {"encoder": Encoder(), "cache_dir": tmp_path, "progress": False}
    for size in (1, 2):  # in one shard, and in two
        with pytest.raises(ValueError, match=r"mark their object by other values than others \(1, 2\)"):
            ExamplePool.from_dataset(data, rows_per_shard=size, **options)
    assert len(ExamplePool.from_dataset(data, foreground=[1, 2], **options)) == 2


@pytest.mark.parametrize("foreground", ["any", [200, 201]])
def test_a_column_of_grey_pictures_is_no_column_of_masks(tmp_path, foreground):
    pictures = [
        encoded(Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W))),
        encoded(Image.fromarray(WHITE)),
    ]
    data = Dataset.from_dict({"image": [encoded(PHOTO)] * 2, "label": pictures})
    with pytest.warns(
        UserWarning, match="1 of 2 labels have as many values as pictures have.*does label_column= name"
    ):
        ExamplePool.from_dataset(data, encoder=Encoder(), cache_dir=tmp_path, progress=False, foreground=foreground)


def test_tallies_add_up():
    readings = [Segmentation().read(mask, PHOTO) for mask in (WHITE, soft(), np.zeros_like(WHITE))]
    total = tally(readings)
    assert added(tally(readings[:1]), tally(readings[1:])) == total
    assert told(tally(readings[2:])) == "nothing marked" and told(total).startswith("binary 0/255, ")
    assert (
        added({name: value for name, value in total.items() if name != "grey"}, tally(()))["grey"] == 0
    )  # before 0.2
    check_one_meaning(total)
