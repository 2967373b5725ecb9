"""Mosaic augmentation: four images joined into one, for more varied contexts, scales and positions of objects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..model.picture_pixels import load_image
from ..model.text_prompt import name_key
from .transforms import PADDING_COLOUR, Example, crop, resize


class Mosaic:
    """Combine the image with three others of its data set around a random point.

    Each image is scaled to cover its quarter and cropped to it. The four must share one set of names, so rows with
    captions, which describe a single image, are returned unchanged.

    Args:
        rows: The data set to draw from; a `ReproducibleDataset` also handles images that cannot be read.
        probability: Probability of a mosaic, 0..1.
        zoom: Largest magnification beyond covering the quarter, at least 1.
        min_visibility: Smallest fraction of a box's area that must stay visible to keep the box, 0..1.

    Raises:
        ValueError: There are no rows, or `zoom` is below 1.
    """

    def __init__(self, rows: Any, probability: float = 0.5, zoom: float = 1.5, min_visibility: float = 0.35) -> None:
        if len(rows) == 0:
            raise ValueError("A mosaic draws images from the data set, which has no rows; pass one that has.")
        if zoom < 1:
            raise ValueError(f"zoom must be at least 1, got {zoom}.")
        self.rows = rows
        self.probability = probability
        self.zoom = zoom
        self.min_visibility = min_visibility

    def __call__(self, example: Example, rng: random.Random) -> Example:
        if rng.random() >= self.probability or example.get("caption") is not None:
            return example
        others = [self.rows[rng.randrange(len(self.rows))] for _ in range(3)]
        if any(other.get("caption") is not None for other in others):
            return example
        width, height = example["image"].size
        # The corner shared by all four is kept away from the edges so that every quarter shows something.
        x, y = (max(1, round(side * rng.uniform(0.3, 0.7))) for side in (width, height))
        quarters = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
        rng.shuffle(quarters)
        canvas = Image.new("RGB", (width, height), PADDING_COLOUR)
        boxes: list[np.ndarray] = []
        names: list[str] = []
        crowd: list[bool] = []
        for part, (left, top, right, bottom) in zip([example, *others], quarters, strict=True):
            if right <= left or bottom <= top:
                continue
            tile = self._fill({**part, "image": load_image(part["image"])}, right - left, bottom - top, rng)
            canvas.paste(tile["image"], (left, top))
            boxes.append(tile["boxes"] + np.array([left, top] * 2, dtype=np.float32))
            names += tile["names"]
            crowd += tile.get("crowd") or [False] * len(tile["names"])
        result = {**example, "image": canvas, "boxes": np.concatenate(boxes), "names": names, "crowd": crowd}
        result.pop("resized", None)
        if any(part.get("neg_names") is not None for part in (example, *others)):
            result["neg_names"] = _absent_from_all([example, *others])
        return result

    def _fill(self, part: Example, width: int, height: int, rng: random.Random) -> Example:
        """Scale an image to cover a quarter and crop it to the quarter's size."""
        image = part["image"]
        scale = max(width / image.width, height / image.height) * rng.uniform(1.0, self.zoom)
        # Long thin images would become enormous before they are cropped.
        scale = min(scale, 4 * max(width, height) / min(image.size))
        part = resize(part, max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        left = rng.randint(0, part["image"].width - width)
        top = rng.randint(0, part["image"].height - height)
        return crop(part, (left, top, left + width, top + height), self.min_visibility)


def _absent_from_all(parts: Sequence[Example]) -> list[str]:
    """Return the names that are known to be in none of the images; those without a list lack all that they can."""
    lists = [part["neg_names"] for part in parts if part.get("neg_names") is not None]
    common = set.intersection(*({name_key(name) for name in names} for names in lists))
    return [name for name in lists[0] if name_key(name) in common]
