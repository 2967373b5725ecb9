"""Detections that are hard for exchange formats: hostile labels, tiny boxes, none at all, wide and high pictures."""

import numpy as np

from gdino_hf import Detections

HOSTILE = (
    'a "quoted" <b>&amp; cat',
    "line\nbreak\ttab",
    "../../etc/passwd",
    "C:\\evil",
    "=1+1",
    "null",
    "on: [x] # y",
    "猫 🐈 é",
    "-",
)
LANDSCAPE, PORTRAIT = (1333, 800), (481, 1067)


def make(size=LANDSCAPE, names=("cat", "remote control", "dog"), number=7, source="sub/a photo.jpg", **values):
    """Random boxes with fractions of pixels, the first a single pixel in a corner and the second the whole picture."""
    chance = np.random.default_rng(number)
    corners = chance.random((number, 2, 2)) * size
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    boxes[:1] = [size[0] - 1, 0, size[0], 1]
    boxes[1:2] = [0, 0, *size]
    labels = np.arange(number)[::-1] % len(names)
    return Detections(boxes, chance.random(number), labels, names, size, source=source, **values)


def with_masks(found):
    """Add a mask that fills each box, and leaves out its first row where it has several."""
    width, height = found.size
    masks = np.zeros((len(found), height, width), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, np.rint(found.boxes).astype(int), strict=True):
        mask[y1 + (y2 - y1 > 1) : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = True
    return Detections(
        found.boxes, found.scores, found.labels, found.names, found.size, source=found.source, masks=masks
    )


CASES = {
    "landscape": make(),
    "portrait": make(PORTRAIT),
    "one box": make(number=1),
    "nothing": make(number=0),
    "one pixel": Detections([[0, 0, 1, 1]], [1.0], [0], ("dot",), (1, 1), source="dot.png"),
    "hostile": make(names=HOSTILE, number=18),
    "no size": Detections([[3.3, 4.4, 3.3, 4.4]], [0.0], [0], ("point",), (10, 10), source="p.png"),
    "decimals": Detections([[12.35, 7.1, 90.02, 33.33]], [0.1234], [1], ("a", "b"), (640, 480), source="d.jpg"),
}
