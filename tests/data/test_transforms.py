"""Tests of augmentation: boxes follow the pixels they enclose."""

import random

import numpy as np
import pytest
from PIL import Image

from gdino_hf.data.augmentation import default_transform
from gdino_hf.data.transforms import (
    Compose,
    RandomChoiceResize,
    RandomColour,
    RandomCrop,
    RandomHalfTurn,
    RandomHorizontalFlip,
    RandomScaleCrop,
    crop,
)
from gdino_hf.model.picture_pixels import to_rgb


def marked(width=60, height=40, box=(10, 5, 25, 20), names=("cat",)):
    """Return an example with a black image whose only box is a white rectangle."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return {"image": Image.fromarray(pixels), "boxes": [list(box)], "names": list(names), "crowd": [False]}


def white_extent(image):
    """Return the bounding box of the white pixels as [x1, y1, x2, y2]."""
    rows, columns = np.nonzero(np.asarray(image).min(-1) == 255)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_flip_moves_the_box_with_the_pixels():
    flipped = RandomHorizontalFlip(1.0)(marked(), random.Random(0))
    assert flipped["boxes"].tolist() == [[35, 5, 50, 20]]
    assert white_extent(flipped["image"]) == [35, 5, 50, 20]


def test_a_crop_inside_the_image_moves_the_box():
    cut = crop(marked(), (5, 0, 40, 30))
    assert cut["image"].size == (35, 30)
    assert cut["boxes"].tolist() == [[5, 5, 20, 20]]
    assert white_extent(cut["image"]) == [5, 5, 20, 20]


def test_a_crop_beyond_the_image_pads_and_moves_the_box():
    cut = crop(marked(), (-10, -5, 70, 45))
    assert cut["image"].size == (80, 50)
    assert cut["boxes"].tolist() == [[20, 10, 35, 25]]
    assert white_extent(cut["image"]) == [20, 10, 35, 25]
    assert np.asarray(cut["image"])[0, 0].tolist() == [124, 116, 104]


def test_crop_drops_a_box_that_is_hardly_visible():
    # The window keeps 3 of the box's 15 columns, a fifth.
    assert crop(marked(), (0, 0, 13, 40), min_visibility=0.21)["names"] == []
    kept = crop(marked(), (0, 0, 13, 40), min_visibility=0.19)
    assert kept["boxes"].tolist() == [[10, 5, 13, 20]]
    assert (kept["names"], kept["crowd"]) == (["cat"], [False])


def test_crop_drops_names_and_crowd_marks_with_their_boxes():
    example = {
        "image": Image.new("RGB", (40, 40)),
        "boxes": [[0, 0, 10, 10], [30, 30, 40, 40], [2, 2, 8, 8]],
        "names": ["cat", "dog", "cup"],
        "crowd": [False, False, True],
    }
    cut = crop(example, (0, 0, 20, 20))
    assert cut["names"] == ["cat", "cup"]
    assert cut["crowd"] == [False, True]


def test_scale_crop_keeps_box_and_pixels_together():
    rng = random.Random(0)
    transform = RandomScaleCrop(scale=(0.5, 2.0), probability=1.0, min_visibility=0.0)
    sizes = set()
    for _ in range(50):
        cut = transform(marked(), rng)
        sizes.add(cut["image"].size)
        if len(cut["boxes"]):
            assert white_extent(cut["image"]) == cut["boxes"][0].tolist()
    assert len(sizes) > 20
    assert min(width for width, _ in sizes) < 60 < max(width for width, _ in sizes)


def test_an_image_without_boxes_keeps_none():
    example = {"image": Image.new("RGB", (40, 30)), "boxes": [], "names": []}
    transform = Compose([RandomHorizontalFlip(1.0), RandomScaleCrop(probability=1.0), RandomColour(probability=1.0)])
    assert transform(example, random.Random(0))["boxes"].shape == (0, 4)


def test_probability_zero_changes_nothing():
    example = marked()
    transform = Compose([RandomHorizontalFlip(0.0), RandomScaleCrop(probability=0.0), RandomColour(probability=0.0)])
    assert transform(example, random.Random(0)) == example


def test_one_seed_gives_one_result():
    transform = Compose([RandomHorizontalFlip(), RandomScaleCrop(), RandomColour(probability=1.0)])
    once, again, other = (transform(marked(), random.Random(seed)) for seed in (3, 3, 4))
    assert np.array_equal(once["image"], again["image"])
    assert np.array_equal(once["boxes"], again["boxes"])
    assert not np.array_equal(once["image"], other["image"])


def test_colour_jitter_changes_pixels_but_not_boxes():
    example = marked()
    example["image"] = Image.new("RGB", (60, 40), (200, 100, 50))
    changed = RandomColour(strength=0.3, probability=1.0)(example, random.Random(0))
    assert changed["boxes"] == example["boxes"]
    assert np.asarray(changed["image"])[0, 0].tolist() != [200, 100, 50]


@pytest.mark.parametrize(("arguments", "what"), [({"scale": (2, 1)}, "scale"), ({"aspect": 0.5}, "aspect")])
def test_scale_crop_rejects_invalid_arguments(arguments, what):
    with pytest.raises(ValueError, match=what):
        RandomScaleCrop(**arguments)


def test_flip_swaps_left_and_right_in_names_and_captions():
    caption = "a left shoe, the leftover"
    example = {**marked(names=("left shoe",)), "caption": caption, "spans": [[[2, 11], [17, 25]]]}
    flipped = RandomHorizontalFlip(1.0)(example, random.Random(0))
    assert flipped["names"] == ["right shoe"]
    assert flipped["caption"] == "a right shoe, the leftover"
    assert [flipped["caption"][start:end] for start, end in flipped["spans"][0]] == ["right shoe", "leftover"]
    again = RandomHorizontalFlip(1.0)(flipped, random.Random(0))
    assert (again["names"], again["caption"], again["spans"]) == (["left shoe"], caption, [[[2, 11], [17, 25]]])


def test_crop_drops_phrases_with_their_boxes():
    example = {
        "image": Image.new("RGB", (40, 40)),
        "boxes": [[0, 0, 10, 10], [30, 30, 40, 40]],
        "names": ["cat", "dog"],
        "caption": "a cat and a dog",
        "spans": [[[2, 5]], [[12, 15]]],
    }
    cut = crop(example, (20, 20, 40, 40))
    assert (cut["names"], cut["spans"], cut["caption"]) == (["dog"], [[[12, 15]]], "a cat and a dog")


def test_half_turn_moves_box_and_pixels_together_and_swaps_left_and_right():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[5:20, 10:25] = 255
    example = {
        "image": Image.fromarray(pixels),
        "boxes": [[10, 5, 25, 20]],
        "names": ["left cat"],
        "caption": "a left cat",
        "spans": [[[2, 6]]],
    }
    turned = RandomHalfTurn(1.0)(example, random.Random(0))
    assert turned["boxes"].tolist() == [[35, 20, 50, 35]]
    rows, columns = np.nonzero(np.asarray(turned["image"])[..., 0])
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [35, 20, 50, 35]
    assert (turned["names"], turned["caption"], turned["spans"]) == (["right cat"], "a right cat", [[[2, 7]]])
    again = RandomHalfTurn(1.0)(turned, random.Random(0))
    assert again["boxes"].tolist() == example["boxes"]
    assert np.array_equal(again["image"], pixels)
    assert again["caption"] == example["caption"]
    assert RandomHalfTurn(0.0)(example, random.Random(0)) is example


def test_random_crop_keeps_box_and_pixels_together():
    rng = random.Random(0)
    sizes = set()
    for _ in range(50):
        cut = RandomCrop(0.4, 1.0, min_visibility=0.0, probability=1.0)(marked(), rng)
        sizes.add(cut["image"].size)
        if len(cut["boxes"]):
            assert white_extent(cut["image"]) == cut["boxes"][0].tolist()
    assert len(sizes) > 20
    assert all(24 <= width <= 60 and 16 <= height <= 40 for width, height in sizes)


@pytest.mark.parametrize("size", [{"shortest_edge": 80, "longest_edge": 100}, {"height": 50, "width": 90}])
def test_resize_keeps_box_and_pixels_together(size):
    example = marked(width=120, height=80, box=(20, 10, 50, 40))
    resized = RandomChoiceResize([size])(example, random.Random(0))
    image = resized["image"]
    assert resized["resized"]
    assert image.size == ((90, 50) if "width" in size else (100, 67))
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(resized["boxes"][0] - extent).max() <= 0.5


def test_resize_chooses_among_its_sizes():
    rng = random.Random(0)
    resize = RandomChoiceResize([{"height": side, "width": side} for side in (20, 30, 40)])
    assert {resize(marked(), rng)["image"].size for _ in range(30)} == {(20, 20), (30, 30), (40, 40)}
    cut = crop(resize(marked(), rng), (0, 0, 10, 10))
    assert "resized" not in cut


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "I;16", "CMYK"])
@pytest.mark.parametrize(
    "transform",
    [
        RandomChoiceResize([{"height": 40, "width": 60}, {"height": 80, "width": 120}]),
        RandomColour(strength=0.0, probability=1.0),
        RandomHorizontalFlip(1.0),
        RandomScaleCrop(scale=(0.5, 0.9), min_visibility=0.0, probability=1.0),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_images_of_any_mode_keep_box_and_pixels_together(transform, mode):
    example = marked()
    grey = np.asarray(example["image"])[..., 0]
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else example["image"].convert(mode)
    for seed in range(3):
        changed = transform({**example, "image": picture}, random.Random(seed))
        # Magnification by 2 blurs edges by less than one original pixel, which is two new ones.
        assert white_extent(to_rgb(changed["image"])) == pytest.approx(list(changed["boxes"][0]), abs=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 1), (2, 3)])
def test_tiny_images_pass_through_all_transforms(size):
    example = {"image": Image.new("RGB", size), "boxes": [[0, 0, *size]], "names": ["cat"], "crowd": [False]}
    everything = default_transform(
        {"shortest_edge": 32, "longest_edge": 48}, flip=1, crop=1, colour=1, mosaic=1, rows=[example]
    )
    for seed in range(20):
        changed = everything(example, random.Random(seed))
        assert max(changed["image"].size) <= 48
        boxes = changed["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] <= np.array(changed["image"].size) + 1e-3).all()


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="size"):
        RandomChoiceResize([])
    with pytest.raises(ValueError, match="ascending"):
        RandomCrop(0.9, 0.2)
