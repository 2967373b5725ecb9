"""Objects of other photographs pasted into a training image, so that rare names are seen often and anywhere.

Ghiasi et al. 2021, "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation"
(arXiv:2012.07177), cut objects out along their outlines. Here only boxes are known: what is pasted is a rectangle whose
edges fade, and names are drawn evenly. Another object of which less than half lies in the rectangle is pasted without a
box, and boxes that are partly hidden stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..model.picture_pixels import to_rgb

MOST = 3
"""Most objects that are pasted into an image; one to this many are, each number as likely as the others."""
SMALLEST = 32
"""Pixels of the shorter side of an object, below which it is not cut out."""
SIZES = (0.15, 0.6)
"""Longer side of a pasted object as a share of the image's shorter side, from and to."""
HIDDEN = 0.3
"""Largest share of another box that a pasted object may hide."""
SEEN = 0.5
"""Smallest share of another object's box inside the rectangle that is cut out, from which it is pasted as a box too."""
FADING = 0.08
"""Share of a pasted rectangle's side over which each of its edges fades."""
ATTEMPTS = 10
"""Places that are tried for an object before it is left out."""


class PastedObjects:
    """Transform that pastes objects of other photographs into an example's image.

    As in `gdino_hf.recipes.side_by_side.SideBySide`, photographs must be annotated for all names: an example for which
    this does not hold is returned as it is.

    Args:
        rows: Rows with "image" (PIL), "boxes" ((N, 4) xyxy in pixels), "names" and "crowd", annotated for all of
            `names`.
        places: Indices of the rows that objects may be taken from.
        names_of: Names in each row.
        names: All names, each pasted as often as the others if it is large enough in some row.
        probability: Probability of pasted objects, 0..1.
    """

    def __init__(
        self,
        rows: Any,
        places: Sequence[int],
        names_of: Sequence[Sequence[str]],
        names: Sequence[str],
        probability: float,
    ) -> None:
        self.rows, self.names, self.probability = rows, list(names), probability
        self.places = {name: [place for place in places if name in names_of[place]] for name in self.names}
        self.drawn = [name for name in self.names if self.places[name]]

    def __call__(self, example: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Return the example, or a copy with objects in places where they hide little."""
        known = {*example["names"], *(example.get("neg_names") or ())}
        if not self.drawn or not known.issuperset(self.names) or rng.random() >= self.probability:
            return example
        image = to_rgb(example["image"]).copy()
        boxes = np.asarray(example["boxes"], dtype=np.float32).reshape(-1, 4)
        names, crowd = list(example["names"]), list(example["crowd"])
        for _ in range(rng.randint(1, MOST)):
            part = self._cut(rng.choice(self.drawn), rng)
            if part is None:
                continue
            part = _resized(part, image, rng)
            corner = _free_corner(image.size, part["image"].size, boxes, rng)
            if corner is None:
                continue
            image.paste(part["image"], corner, _fading(part["image"].size))
            boxes = np.concatenate((boxes, part["boxes"] + np.array(corner * 2, dtype=np.float32)))
            names += part["names"]
            crowd += part["crowd"]
        if len(names) == len(example["names"]):
            return example
        present = set(names)
        return {
            **example,
            "image": image,
            "boxes": boxes,
            "names": names,
            "crowd": crowd,
            "neg_names": [name for name in example["neg_names"] if name not in present],
            # They do not know what was pasted over them.
            "regions": None,
        }

    def _cut(self, name: str, rng: random.Random) -> dict[str, Any] | None:
        """Cut an object out of a photograph, with the boxes in its rectangle; None if the photograph has none."""
        row = self.rows[rng.choice(self.places[name])]
        boxes = np.asarray(row["boxes"], dtype=np.float32).reshape(-1, 4)
        large = [
            place
            for place, (own, crowd) in enumerate(zip(row["names"], row["crowd"], strict=True))
            if own == name and not crowd and (boxes[place, 2:] - boxes[place, :2]).min() >= SMALLEST
        ]
        if not large:
            return None
        left, top, right, bottom = (int(value) for value in boxes[rng.choice(large)].round())
        inside = boxes.clip((left, top, left, top), (right, bottom, right, bottom))
        kept = np.flatnonzero(_area(inside) >= SEEN * _area(boxes).clip(1e-6))
        return {
            "image": to_rgb(row["image"]).crop((left, top, right, bottom)),
            "boxes": inside[kept] - np.array([left, top] * 2, dtype=np.float32),
            "names": [row["names"][place] for place in kept],
            "crowd": [row["crowd"][place] for place in kept],
        }


def _resized(part: dict[str, Any], image: Image.Image, rng: random.Random) -> dict[str, Any]:
    """Return what was cut out in a random size, mirrored or not."""
    picture = part["image"]
    factor = rng.uniform(*SIZES) * min(image.size) / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    boxes = part["boxes"] * np.array([size[0] / picture.width, size[1] / picture.height] * 2, dtype=np.float32)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = np.stack((size[0] - boxes[:, 2], boxes[:, 1], size[0] - boxes[:, 0], boxes[:, 3]), axis=1)
    return {**part, "image": picture, "boxes": boxes}


def _free_corner(
    image: tuple[int, int], part: tuple[int, int], boxes: np.ndarray, rng: random.Random
) -> tuple[int, int] | None:
    """Return left and top of a place where a part hides no more than HIDDEN of any box, or None if none was found."""
    for _ in range(ATTEMPTS):
        left, top = rng.randint(0, max(0, image[0] - part[0])), rng.randint(0, max(0, image[1] - part[1]))
        right, bottom = left + part[0], top + part[1]
        if (_area(boxes.clip((left, top, left, top), (right, bottom, right, bottom))) <= HIDDEN * _area(boxes)).all():
            return left, top
    return None


def _fading(size: tuple[int, int]) -> Image.Image:
    """Return a mask that is 255 inside and falls towards the edges."""
    ramps = []
    for side in size:
        steps = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1.0
        ramps.append((steps / max(1.0, FADING * side)).clip(0, 1))
    return Image.fromarray((255 * np.outer(ramps[1], ramps[0])).astype(np.uint8))


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
