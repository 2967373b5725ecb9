"""Masks as PNG pictures: which object, or which label, each pixel belongs to."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image

Kind = Literal["objects", "labels"]


def mask_picture(found: Any, kind: Kind = "objects") -> Image.Image:
    """Return a picture of numbers; see `Detections.mask_picture`.

    Raises:
        ValueError: There are too many objects or labels, or the kind is unknown.
    """
    if kind not in ("objects", "labels"):
        raise ValueError(f"kind is {kind!r}; choose objects or labels.")
    numbers = np.arange(len(found)) if kind == "objects" else found.labels
    largest = len(found) if kind == "objects" else len(found.names)
    if largest >= 2**16:
        raise ValueError(f"There are {largest} {kind}, but a PNG has numbers below {2**16}; leave some out.")
    width, height = found.size
    picture = np.zeros((height, width), dtype=np.uint8 if largest < 2**8 else np.uint16)
    # The best object comes last, on top.
    for place in np.argsort(found.scores, kind="stable"):
        if found.masks is not None:
            picture[found.masks[place]] = numbers[place] + 1
        else:
            (left, top), (right, bottom) = np.rint(found.boxes[place]).astype(int).reshape(2, 2).tolist()
            picture[top : max(bottom, top + 1), left : max(right, left + 1)] = numbers[place] + 1
    return Image.fromarray(picture)
