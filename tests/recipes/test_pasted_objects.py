"""Objects pasted into training images, with plain rectangles for objects."""

import random

import numpy as np
import pytest
from PIL import Image

from gdino_hf.recipes import pasted_objects
from gdino_hf.recipes.pasted_objects import HIDDEN, SIZES, PastedObjects

COLOURS = {"cat": (250, 0, 0), "dog": (0, 250, 0), "cup": (0, 0, 250)}
NAMES = sorted(COLOURS)


def row(*objects, size=(400, 300), absent=None):
    """A white photograph of rectangles, given as (name, left, top, right, bottom)."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    for name, left, top, right, bottom in objects:
        pixels[top:bottom, left:right] = COLOURS[name]
    names = [name for name, *_ in objects]
    absent = [name for name in NAMES if name not in names] if absent is None else absent
    boxes = np.array([box for _, *box in objects], dtype=np.float32).reshape(-1, 4)
    facts = {"boxes": boxes, "names": names, "crowd": [False] * len(names), "neg_names": absent, "regions": [1]}
    return {"image": Image.fromarray(pixels), "width": size[0], "height": size[1], **facts}


CAT = row(("cat", 50, 60, 150, 120))
DOG = row(("dog", 10, 10, 60, 110))
NOTHING = row()


def pasted(rows, places=None, probability=1.0):
    places = range(len(rows)) if places is None else places
    return PastedObjects(rows, places, [each["names"] for each in rows], NAMES, probability)


def test_a_pasted_object_lies_in_its_box_and_fades_at_its_edges():
    seen = set()
    for seed in range(40):
        made = pasted([CAT, DOG, NOTHING], [0, 1])(NOTHING, random.Random(seed))
        pixels = np.asarray(made["image"]).astype(int)
        for (left, top, right, bottom), name in zip(made["boxes"], made["names"], strict=True):
            seen.add(name)
            width, height = right - left, bottom - top
            assert SIZES[0] * 300 - 1 <= max(width, height) <= SIZES[1] * 300 + 1
            # The proportions are those of the object.
            assert width / height == pytest.approx({"cat": 100 / 60, "dog": 50 / 100}[name], rel=0.05)
        # Nothing was pasted over the last one.
        left, top, right, bottom = made["boxes"][-1].round().astype(int)
        inside = pixels[top:bottom, left:right]
        colour = COLOURS[made["names"][-1]]
        assert np.abs(inside[len(inside) // 2, inside.shape[1] // 2] - colour).max() <= 2
        edge = np.abs(inside[0, inside.shape[1] // 2] - colour).max()
        assert edge > 100
        assert not {*made["names"]} & {*made["neg_names"]}
        assert sorted({*made["names"], *made["neg_names"]}) == NAMES
        assert made["regions"] is None
        assert 1 <= len(made["names"]) <= 3
    assert seen == {"cat", "dog"}
    # The photographs themselves stay as they were.
    assert np.asarray(NOTHING["image"]).min() == 255


def test_what_else_is_in_the_rectangle_is_pasted_as_a_box_too():
    # A cup wholly on the cat, and a dog of which a third reaches into the cat's rectangle.
    source = row(("cat", 100, 100, 200, 200), ("cup", 120, 130, 160, 180), ("dog", 180, 100, 240, 200))
    for seed in range(20):
        rows = [source, NOTHING]
        paster = PastedObjects(rows, [0], [["cat"], []], NAMES, 1.0)
        made = paster(NOTHING, random.Random(seed))
        cats = [box for box, name in zip(made["boxes"], made["names"], strict=True) if name == "cat"]
        cups = [box for box, name in zip(made["boxes"], made["names"], strict=True) if name == "cup"]
        assert set(made["names"]) == {"cat", "cup"}
        for cat, cup in zip(cats, cups, strict=True):
            scale = (cat[2] - cat[0]) / 100
            plain, mirrored = np.array([20, 30, 60, 80]) * scale, np.array([40, 30, 80, 80]) * scale
            inside = cup - np.tile(cat[:2], 2)
            assert min(np.abs(inside - plain).max(), np.abs(inside - mirrored).max()) < 1


def test_little_of_what_was_there_is_hidden():
    crowded = row(*(("cup", x, y, x + 80, y + 80) for x in range(0, 400, 100) for y in range(0, 300, 100)))
    made_some = False
    for seed in range(30):
        made = pasted([CAT, DOG, crowded], [0, 1])(crowded, random.Random(seed))
        made_some |= made is not crowded
        new = np.asarray(made["boxes"])[len(crowded["boxes"]) :]
        for place, (left, top, right, bottom) in enumerate(new):
            earlier = np.asarray(made["boxes"])[: len(crowded["boxes"]) + place]
            covered = earlier.clip((left, top, left, top), (right, bottom, right, bottom))
            area = (covered[:, 2:] - covered[:, :2]).prod(axis=1)
            assert (area <= HIDDEN * (earlier[:, 2:] - earlier[:, :2]).prod(axis=1) + 1e-3).all()
    assert made_some


def test_an_image_without_a_free_place_stays_as_it_is():
    full = row(*(("cup", x, y, x + 20, y + 20) for x in range(0, 400, 20) for y in range(0, 300, 20)))
    for seed in range(5):
        assert pasted([CAT, full], [0])(full, random.Random(seed)) is full


def test_small_objects_crowds_and_other_places_are_not_cut_out():
    small = row(("cat", 10, 10, 41, 100))
    crowd = {**CAT, "crowd": [True]}
    for rows, places in (([small], [0]), ([crowd], [0]), ([CAT], [])):
        for seed in range(5):
            assert pasted([*rows, NOTHING], places)(NOTHING, random.Random(seed)) is NOTHING


def test_names_are_pasted_evenly_however_rare_they_are():
    rows = [CAT, *[DOG] * 19, NOTHING]
    paster, counts = pasted(rows, range(20)), {"cat": 0, "dog": 0}
    for seed in range(300):
        for name in paster(NOTHING, random.Random(seed))["names"]:
            counts[name] += 1
    assert 0.4 < counts["cat"] / sum(counts.values()) < 0.6


def test_one_seed_gives_one_image_and_the_share_is_the_probability():
    one, other = (pasted([CAT, DOG, NOTHING], [0, 1])(NOTHING, random.Random(3)) for _ in range(2))
    assert one["image"].tobytes() == other["image"].tobytes()
    np.testing.assert_array_equal(one["boxes"], other["boxes"])
    rng, sometimes = random.Random(0), pasted([CAT, DOG, NOTHING], [0, 1], 0.3)
    assert 250 < sum(sometimes(NOTHING, rng) is not NOTHING for _ in range(1000)) < 350


def test_a_photograph_about_which_less_is_known_stays_as_it_is():
    unsure = row(("cat", 50, 60, 150, 120), absent=["dog"])
    assert pasted([CAT, unsure], [0])(unsure, random.Random(0)) is unsure


def test_tiny_images_take_tiny_objects():
    tiny = row(size=(3, 2))
    for seed in range(20):
        made = pasted([CAT, tiny], [0])(tiny, random.Random(seed))
        assert made["image"].size == (3, 2)
        assert (np.asarray(made["boxes"]).reshape(-1, 4)[:, 2:] <= (3.001, 2.001)).all()


def test_the_mask_is_whole_inside_and_never_zero():
    mask = np.asarray(pasted_objects._fading((100, 50)))
    assert mask.shape == (50, 100)
    assert mask[25, 50] == 255
    assert 0 < mask[0, 0] < mask[0, 50] < 255
