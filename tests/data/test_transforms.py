"""Claims about augmentation: boxes follow the pixels they enclose."""

import random

import numpy as np
import pytest
from PIL import Image

from gdino_hf.data.transforms import Compose, RandomColour, RandomHorizontalFlip, RandomScaleCrop, crop


def marked(width=60, height=40, box=(10, 5, 25, 20), names=("cat",)):
    """A black image whose one white rectangle is its one box."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return {"image": Image.fromarray(pixels), "boxes": [list(box)], "names": list(names), "crowd": [False]}


def white_extent(image):
    rows, columns = np.nonzero(np.asarray(image).min(-1) == 255)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_flip_moves_the_box_with_the_pixels():
    flipped = RandomHorizontalFlip(1.0)(marked(), random.Random(0))
    assert flipped["boxes"].tolist() == [[35, 5, 50, 20]]
    assert white_extent(flipped["image"]) == [35, 5, 50, 20]


def test_crop_inside_the_image():
    cut = crop(marked(), (5, 0, 40, 30))
    assert cut["image"].size == (35, 30)
    assert cut["boxes"].tolist() == [[5, 5, 20, 20]]
    assert white_extent(cut["image"]) == [5, 5, 20, 20]


def test_crop_over_the_edge_pads_and_moves_the_box():
    cut = crop(marked(), (-10, -5, 70, 45))
    assert cut["image"].size == (80, 50)
    assert cut["boxes"].tolist() == [[20, 10, 35, 25]]
    assert white_extent(cut["image"]) == [20, 10, 35, 25]
    assert np.asarray(cut["image"])[0, 0].tolist() == [124, 116, 104]


def test_crop_drops_a_box_of_which_too_little_is_left():
    # The window keeps 3 of the box's 15 columns: a fifth.
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


def test_an_image_without_boxes_stays_one():
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


def test_colour_changes_pixels_and_leaves_boxes():
    example = marked()
    example["image"] = Image.new("RGB", (60, 40), (200, 100, 50))
    changed = RandomColour(strength=0.3, probability=1.0)(example, random.Random(0))
    assert changed["boxes"] == example["boxes"]
    assert np.asarray(changed["image"])[0, 0].tolist() != [200, 100, 50]


@pytest.mark.parametrize(("arguments", "what"), [({"scale": (2, 1)}, "scale"), ({"aspect": 0.5}, "aspect")])
def test_scale_crop_refuses(arguments, what):
    with pytest.raises(ValueError, match=what):
        RandomScaleCrop(**arguments)
