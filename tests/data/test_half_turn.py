"""Claims about what is trained on: pictures that are turned."""

import random

import numpy as np
from PIL import Image

from gdino_hf.data.transforms import RandomHalfTurn


def test_a_half_turn_moves_box_and_pixels_together_and_swaps_the_sides():
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
