"""Tiles: they cover the picture, parts of one object become one, and neighbours stay two."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import Detections, Detector
from gdino_hf.detection.tiles import merge_tiles, tile_areas
from random_models import make_random_model

NAMES = ("cat", "dog")
SIZE = (1000, 600)


def detections(rows, size, presence=None):
    return Detections(
        [row[:4] for row in rows], [row[4] for row in rows], [row[5] for row in rows], NAMES, size, presence=presence
    )


def seen_by(areas, objects):
    """Return what a perfect detector finds in each tile: the part of each object inside it."""
    parts = []
    for left, top, right, bottom in areas:
        rows = []
        for x1, y1, x2, y2, score, label in objects:
            box = [max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top]
            if box[2] - box[0] > 2 and box[3] - box[1] > 2:
                rows.append([*box, score, label])
        parts.append(((left, top, right, bottom), detections(rows, (right - left, bottom - top))))
    return parts


@pytest.mark.parametrize("size", [(1000, 600), (400, 400), (401, 399), (4000, 3000), (50, 5000)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_tiles_cover_every_pixel_and_overlap_enough(size, overlap):
    areas = tile_areas(size, 400, overlap)
    covered = np.zeros(size[::-1], dtype=bool)
    for left, top, right, bottom in areas:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        covered[top:bottom, left:right] = True
    assert covered.all()
    starts = sorted({area[0] for area in areas})
    assert all(second - first <= 400 * (1 - overlap) + 1 for first, second in itertools.pairwise(starts))


def test_a_small_picture_is_one_tile():
    assert tile_areas((300, 200), 400) == [(0, 0, 300, 200)]


@pytest.mark.parametrize(("tile", "overlap", "message"), [(10, 0.2, "tile is 10"), (400, 1.0, "overlap is 1.0")])
def test_tiles_that_cannot_be_cut_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tile_areas(SIZE, tile, overlap)


def test_random_objects_come_out_once_and_whole():
    rng = np.random.default_rng(0)
    areas = tile_areas(SIZE, 400, 0.25)
    for _ in range(30):
        objects = []
        # On a grid, so that no two objects overlap.
        for column in range(5):
            for row in range(3):
                x1, y1 = 200 * column + rng.uniform(2, 30), 200 * row + rng.uniform(2, 30)
                side = rng.uniform(60, 165, 2)
                objects.append([x1, y1, x1 + side[0], y1 + side[1], rng.uniform(0.3, 0.9), int(rng.integers(2))])
        merged = merge_tiles(seen_by(areas, objects), detections([], SIZE))
        assert len(merged) == len(objects)
        wanted = sorted(objects, key=lambda each: -each[4])
        np.testing.assert_allclose(merged.boxes, [each[:4] for each in wanted], atol=0.01)
        assert merged.labels.tolist() == [each[5] for each in wanted]


def test_an_object_larger_than_a_tile_is_joined_from_its_parts():
    areas = tile_areas((1000, 300), 400, 0.25)
    merged = merge_tiles(seen_by(areas, [[50, 100, 950, 200, 0.8, 0]]), detections([], (1000, 300)))
    assert merged.boxes.round().tolist() == [[50, 100, 950, 200]]


def test_the_whole_picture_replaces_parts():
    areas = tile_areas(SIZE, 400, 0.25)
    whole = detections([[50, 50, 950, 550, 0.4, 0]], SIZE)
    merged = merge_tiles(seen_by(areas, [[50, 50, 950, 550, 0.9, 0]]), whole)
    assert merged.boxes.round().tolist() == [[50, 50, 950, 550]]


def test_labels_stay_apart_unless_told_otherwise():
    both = [[10, 10, 100, 100, 0.9, 0], [10, 10, 100, 100, 0.8, 1]]
    areas = tile_areas(SIZE, 400, 0.25)
    assert len(merge_tiles(seen_by(areas, both), detections([], SIZE))) == 2
    assert merge_tiles(seen_by(areas, both), detections([], SIZE), class_agnostic=True).text_labels == ["cat"]


def test_presence_is_the_highest_of_all_tiles():
    area = (0, 0, 400, 400)
    part = detections([], (400, 400), presence={"cat": 0.7, "dog": 0.1})
    merged = merge_tiles([(area, part)], detections([], SIZE, presence={"cat": 0.2, "dog": 0.3}))
    assert merged.presence == {"cat": 0.7, "dog": 0.3}


def test_the_detector_looks_at_tiles_and_the_whole(tiny_config, tiny_processor):
    detector = Detector(make_random_model(tiny_config).double(), processor=tiny_processor, device=None, optimize=False)
    pixels = torch.randint(0, 256, (100, 160, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pixels.to(torch.uint8).numpy())
    options = {"threshold": 0.0}
    found = detector(picture, "cat, dog", tiles=64, overlap=0.25, batch_size=4, **options)
    areas = tile_areas((160, 100), 64, 0.25)
    parts = [detector(picture.crop(area), "cat, dog", **options) for area in areas]
    wanted = merge_tiles(list(zip(areas, parts, strict=True)), detector(picture, "cat, dog", **options))
    assert len(found) == len(wanted)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    assert found.presence == pytest.approx(wanted.presence, abs=1e-5)
    ((_, streamed),) = detector.stream([picture], "cat, dog", tiles=64, overlap=0.25, **options)
    assert len(streamed) == len(found)


def test_phrases_of_a_caption_keep_their_characters_and_token_scores_in_tiles(tiny_config, tiny_processor):
    detector = Detector(make_random_model(tiny_config).double(), processor=tiny_processor, device=None, optimize=False)
    pixels = torch.randint(0, 256, (100, 160, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pixels.to(torch.uint8).numpy())
    caption = "big cats left of the red cup"
    found = detector.ground(picture, caption, tiles=64, batch_size=3, threshold=0.0)
    assert len(found) > len(detector.ground(picture, caption, threshold=0.0))
    assert set(found.text_labels) == {"big cats left", "red cup"}
    for name, spans, tokens, score in zip(
        found.text_labels, found.spans, found.token_scores, found.scores, strict=True
    ):
        assert [caption[slice(*span)] for span in spans] == [name]
        assert [text for text, _ in tokens] == name.split()
        assert max(value for _, value in tokens) == pytest.approx(score, abs=1e-6)
