"""Tests of the default augmentation."""

import random

import numpy as np
import pytest
from PIL import Image

from gdino_hf.data.augmentation import default_transform, training_sizes


def example():
    image = Image.new("RGB", (120, 80))
    image.paste((255, 255, 255), (30, 20, 90, 60))
    return {"image": image, "boxes": [[30, 20, 90, 60]], "names": ["cat"], "crowd": [False]}


def test_training_sizes_go_down_in_steps():
    sizes = training_sizes({"shortest_edge": 800, "longest_edge": 1333}, 0.6)
    assert [size["shortest_edge"] for size in sizes] == list(range(480, 801, 32))
    assert {size["longest_edge"] for size in sizes} == {1333}
    assert training_sizes({"height": 320, "width": 320}, 0.8) == [{"height": s, "width": s} for s in (256, 288, 320)]
    assert training_sizes({"height": 320, "width": 320}, 1.0) == [{"height": 320, "width": 320}]


def test_boxes_match_the_pixels_after_all_transforms():
    rows = [example()]
    transform = default_transform({"height": 96, "width": 128}, step=16, crop=1.0, mosaic=0.3, rows=rows)
    rng = random.Random(0)
    sizes = set()
    for _ in range(60):
        made = transform(example(), rng)
        assert made["resized"]
        sizes.add(made["image"].size)
        if len(made["boxes"]) == 0:
            continue
        ys, xs = np.nonzero(np.asarray(made["image"])[..., 0] > 127)
        extent = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        union = np.array([*made["boxes"][:, :2].min(0), *made["boxes"][:, 2:].max(0)])
        # A box may be dropped while a rest of its object is visible, but no box extends beyond the white pixels.
        assert (union[:2] >= extent[:2] - 1.5).all()
        assert (union[2:] <= extent[2:] + 1.5).all()
    assert sizes == {(size["width"], size["height"]) for size in training_sizes({"height": 96, "width": 128}, 0.6, 16)}


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="rows"):
        default_transform({"height": 9, "width": 9}, mosaic=0.5)
    with pytest.raises(ValueError, match="smallest"):
        default_transform({"height": 9, "width": 9}, smallest=0)
