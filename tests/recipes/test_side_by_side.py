"""Photographs side by side as one training image."""

import random

import numpy as np
from PIL import Image

from gdino_hf.recipes.side_by_side import GRIDS, SideBySide

NAMES = ["cat", "cup", "dog"]
COLOURS = {"cat": (250, 0, 0), "cup": (0, 250, 0), "dog": (0, 0, 250)}


def row(*names, size=(80, 60), absent=None):
    """A white picture with an annotated bar of each name's colour, a quarter of the width and half of the height."""
    image = Image.new("RGB", size, "white")
    width, height = size[0] // 4, size[1] // 2
    boxes = [[place * width, 0, (place + 1) * width, height] for place in range(len(names))]
    for name, (left, top, right, bottom) in zip(names, boxes, strict=True):
        image.paste(COLOURS[name], (left, top, right, bottom))
    absent = [name for name in NAMES if name not in names] if absent is None else absent
    facts = {"boxes": boxes, "names": list(names), "crowd": [name == "dog" for name in names], "neg_names": absent}
    return {"image": image, "width": size[0], "height": size[1], **facts}


ROWS = [row("cat", "dog"), row("cup", size=(40, 120)), row("dog", size=(160, 120)), row()]


def test_every_box_frames_its_object_and_names_are_those_of_all_parts():
    layouts = set()
    for seed in range(30):
        made = SideBySide(ROWS, [1, 2, 3], NAMES, 1.0)(ROWS[0], random.Random(seed))
        layouts.add(len(made["names"]))
        assert made["image"].size == (made["width"], made["height"]) == (80, 60)
        pixels = np.asarray(made["image"]).astype(int)
        for (left, top, right, bottom), name, crowd in zip(made["boxes"], made["names"], made["crowd"], strict=True):
            inside = pixels[round(top) + 1 : round(bottom) - 1, round(left) + 1 : round(right) - 1]
            assert np.abs(inside - COLOURS[name]).max() < 12
            assert crowd == (name == "dog")
        # Nothing that is coloured is outside the boxes.
        for left, top, right, bottom in made["boxes"].round().astype(int):
            pixels[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = 255
        assert (pixels > 240).all()
        assert {"cat", "dog"} <= set(made["names"])
        assert sorted({*made["names"], *made["neg_names"]}) == NAMES
        assert not {*made["names"]} & {*made["neg_names"]}
    assert len(layouts) > 1


def test_one_seed_gives_one_image_and_rows_that_may_not_be_drawn_are_not():
    joined = SideBySide(ROWS, [3], NAMES, 1.0)
    for seed in range(10):
        one, other = (joined(ROWS[0], random.Random(seed)) for _ in range(2))
        assert one["image"].tobytes() == other["image"].tobytes()
        assert one["names"] == ["cat", "dog"]


def test_a_photograph_about_which_less_is_known_stays_alone():
    unsure = row("cat", absent=["dog"])
    assert SideBySide(ROWS, [1, 2], NAMES, 1.0)(unsure, random.Random(0)) is unsure


def test_the_share_of_joined_photographs_is_the_probability():
    rng, joined = random.Random(0), SideBySide(ROWS, [1, 2, 3], NAMES, 0.3)
    made = sum(joined(ROWS[0], rng) is not ROWS[0] for _ in range(1000))
    assert 250 < made < 350


def test_a_picture_of_one_pixel_can_be_beside_others():
    small = row(size=(1, 1))
    sides = {SideBySide([small], [0], NAMES, 1.0)(small, random.Random(seed))["image"].size for seed in range(20)}
    assert sides == {(columns, lines) for lines, columns in GRIDS}
