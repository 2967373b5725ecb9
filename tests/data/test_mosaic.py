"""Tests of mosaics: every box of the four images still encloses its own pixels."""

import random

import numpy as np
import pytest
from PIL import Image

from gdino_hf.data.mosaic import Mosaic

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Rows:
    """One black image per colour with a rectangle of that colour; `read` counts the reads."""

    def __init__(self, size=(120, 80), box=(30, 20, 90, 60)):
        self.size, self.box, self.read = size, box, 0

    def __len__(self):
        return len(COLOURS)

    def __getitem__(self, index):
        self.read += 1
        name, colour = list(COLOURS.items())[index]
        image = Image.new("RGB", self.size)
        image.paste(colour, self.box)
        return {"image": image, "boxes": [list(self.box)], "names": [name], "crowd": [False], "width": self.size[0]}


def test_boxes_enclose_the_pixels_of_their_colour():
    rows = Rows()
    rng = random.Random(0)
    mosaic = Mosaic(rows, probability=1.0, min_visibility=0.0)
    checked = 0
    for _ in range(40):
        made = mosaic(rows[0], rng)
        assert made["image"].size == (120, 80)
        pixels = np.asarray(made["image"]).astype(int)
        # An image that was drawn twice has two boxes, which together enclose its colour.
        for name in set(made["names"]):
            boxes = np.array([box for box, other in zip(made["boxes"], made["names"], strict=True) if other == name])
            near = np.abs(pixels - COLOURS[name]).max(-1) < 128
            ys, xs = np.nonzero(near)
            extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            union = [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]
            # Magnification blurs an edge over a pixel or two.
            assert np.abs(np.array(extent) - union).max() <= 1.0
            checked += 1
    assert checked > 80


def test_the_four_images_fill_the_canvas():
    rows = Rows(box=(0, 0, 120, 80))
    made = Mosaic(rows, probability=1.0)(rows[0], random.Random(1))
    assert len(made["names"]) == len(made["boxes"]) == len(made["crowd"]) == 4
    areas = (made["boxes"][:, 2:] - made["boxes"][:, :2]).prod(-1)
    assert areas.sum() == 120 * 80


def test_only_the_rows_drawn_are_read():
    rows = Rows()
    mosaic = Mosaic(rows, probability=0.5)
    example = rows[0]
    rows.read = 0
    rng = random.Random(0)
    made = [mosaic(example, rng) is not example for _ in range(50)]
    assert rows.read == 3 * sum(made)
    assert 10 < sum(made) < 40


def test_rows_with_captions_are_unchanged():
    rows = Rows()
    example = {**rows[0], "caption": "a red thing", "spans": [[[2, 5]]]}
    assert Mosaic(rows, probability=1.0)(example, random.Random(0)) is example


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
def test_very_thin_images_keep_their_size_and_boxes(size):
    rows = Rows(size=size, box=(0, 0, *size))
    made = Mosaic(rows, probability=1.0)(rows[0], random.Random(0))
    assert made["image"].size == size
    assert (made["boxes"][:, 2:] <= np.array(size)).all()


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="rows"):
        Mosaic([])
    with pytest.raises(ValueError, match="zoom"):
        Mosaic(Rows(), zoom=0.5)
