"""Generated scenes: exact boxes, right colours, held-out pairs, reproducibility."""

import json

import numpy as np
import pytest

from gdino_hf.data.coco import read_coco
from gdino_hf.recipes.scene_images import COLOURS, OUTLINES, PAIRS, SEEN, UNSEEN, Scenes, write_coco

# Chroma is the largest channel minus the smallest: at most 0.12 * 255 = 31 in a background, and at least
# 0.75 * 0.64 * 255 = 122 in a shape.
CHROMA = 60


def chroma(image):
    pixels = np.asarray(image).astype(int)
    return pixels.max(-1) - pixels.min(-1)


def test_unseen_pairs_are_a_quarter_and_made_of_seen_words():
    assert len(PAIRS) == len(COLOURS) * len(OUTLINES) == 48
    assert len(UNSEEN) == 12
    assert set(SEEN) | set(UNSEEN) == set(PAIRS)
    assert not set(SEEN) & set(UNSEEN)
    for word in (*COLOURS, *OUTLINES):
        assert sum(word in pair.split() for pair in SEEN) >= 4
        assert sum(word in pair.split() for pair in UNSEEN) >= 1


def test_boxes_bound_the_drawn_pixels_exactly():
    number = 0
    for row in Scenes(60, noise=0):
        drawn = chroma(row["image"]) > CHROMA
        for x1, y1, x2, y2 in np.array(row["boxes"], dtype=int):
            inside = drawn[y1:y2, x1:x2]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            drawn[y1:y2, x1:x2] = False
            number += 1
        assert not drawn.any(), "pixels of a shape outside all boxes"
    assert number > 120


def test_every_shape_has_the_colour_of_its_name():
    # Median hue from Pillow's conversion. Hues are jittered by 6 degrees, and rounding to bytes adds 2.
    for row in Scenes(40, noise=0):
        hues = np.asarray(row["image"].convert("HSV"))[..., 0] * (360 / 255)
        drawn = chroma(row["image"]) > CHROMA
        for (x1, y1, x2, y2), name in zip(np.array(row["boxes"], dtype=int), row["names"], strict=True):
            hue = np.median(hues[y1:y2, x1:x2][drawn[y1:y2, x1:x2]])
            distance = (hue - COLOURS[name.split()[0]][0] + 180) % 360 - 180
            assert abs(distance) < 9


def test_every_shape_covers_its_share_of_the_box():
    # Areas of the upright shapes as shares of their boxes, from geometry; a star is ten triangles of radii 1 and 0.4.
    star = 10 * 0.5 * 0.4 * np.sin(np.pi / 5) / (2 * np.sin(2 * np.pi / 5) * (1 + np.cos(np.pi / 5)))
    expected = {"circle": np.pi / 4, "ring": np.pi / 4 * (1 - 0.55**2), "star": star}
    expected |= {"square": 1.0, "triangle": 0.5, "cross": 2 * 0.3 - 0.3**2}
    for shape, area in expected.items():
        scenes = Scenes(40, [f"blue {shape}"], noise=0, num_shapes=(1, 1), sizes=(0.5, 0.6))
        shares = []
        for row in scenes:
            x1, y1, x2, y2 = np.array(row["boxes"][0], dtype=int)
            shares.append((chroma(row["image"])[y1:y2, x1:x2] > CHROMA).mean())
        # Rotation enlarges a shape's box by up to a half, except that of a circle or a ring.
        least = 0.94 * area if shape in ("circle", "ring") else 0.55 * area
        assert least < np.mean(shares) < 1.08 * area


def test_training_scenes_show_no_unseen_pair():
    shown = {name for row in Scenes(300, SEEN, seed=3) for name in row["names"]}
    assert shown == set(SEEN)


def test_sizes_vary_and_boxes_stay_apart_and_inside():
    sides = []
    for row in Scenes(100, image_size=96):
        boxes = np.array(row["boxes"])
        assert 1 <= len(boxes) <= 7
        assert boxes.min() >= 0
        assert boxes.max() <= 96
        sides += list((boxes[:, 2:] - boxes[:, :2]).max(1))
        for index, one in enumerate(boxes):
            for other in boxes[index + 1 :]:
                overlap = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
                assert overlap.min() <= 0
    assert min(sides) < 0.13 * 96
    assert max(sides) > 0.38 * 96


def test_seed_and_index_determine_the_scene():
    scenes = Scenes(9, seed=5)
    assert scenes[4]["names"] == Scenes(100, seed=5)[4]["names"]
    assert np.array_equal(np.asarray(scenes[4]["image"]), np.asarray(Scenes(100, seed=5)[4]["image"]))
    assert not np.array_equal(np.asarray(scenes[4]["image"]), np.asarray(scenes[5]["image"]))
    assert not np.array_equal(np.asarray(scenes[4]["image"]), np.asarray(Scenes(9, seed=6)[4]["image"]))
    assert scenes[-1]["image_id"] == 8
    with pytest.raises(IndexError):
        scenes[9]


def test_written_scenes_are_read_back_unchanged(tmp_path):
    scenes = Scenes(3, ["red circle", "blue star"], image_size=64)
    write_coco(scenes, tmp_path / "some.json")
    content = json.loads((tmp_path / "some.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["red circle", "blue star"]
    for row, read in zip(scenes, read_coco(tmp_path / "some.json"), strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(read["image"]))
        assert {key: read[key] for key in row if key != "image"} == {key: row[key] for key in row if key != "image"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"num_shapes": (3, 2)}, r"num_shapes must be .* got \(3, 2\)"),
        ({"sizes": (0.1, 1.5)}, r"sizes must be .* got \(0.1, 1.5\)"),
        ({"pairs": ["red circle", "red hexagon"]}, "got 'red hexagon'"),
        ({"pairs": []}, "pairs must be names such as 'red circle'"),
    ],
)
def test_impossible_scenes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**{"count": 1, **arguments})
