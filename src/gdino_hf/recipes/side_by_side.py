"""Several whole photographs side by side as one training image, so that a name does not hang on one background.

Where `gdino_hf.data.mosaic` crops four images to quarters, here two or four are shown whole, and only photographs that
are annotated for all names share an image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..data.transforms import resize
from ..model.picture_pixels import to_rgb

GRIDS = ((1, 2), (2, 1), (2, 2))
"""Rows and columns, each pair as likely as the others."""


class SideBySide:
    """Transform that puts further photographs beside an example's, all of the same size.

    Only photographs that are annotated for all names can share an image: a name that is annotated in one of them must
    not be passed over in another. An example for which this does not hold is returned as it is.

    Args:
        rows: Rows with "image" (PIL), "boxes" ((N, 4) xyxy in pixels), "names" and "crowd", annotated for all of
            `names`.
        places: Indices of the rows that may be drawn.
        names: All names.
        probability: Probability of further photographs, 0..1.
    """

    def __init__(self, rows: Any, places: Sequence[int], names: Sequence[str], probability: float) -> None:
        self.rows, self.places, self.names, self.probability = rows, list(places), list(names), probability

    def __call__(self, example: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Return the example, or an image of about its size that shows it in one of its cells."""
        known = {*example["names"], *(example.get("neg_names") or ())}
        if not known.issuperset(self.names) or rng.random() >= self.probability:
            return example
        lines, columns = rng.choice(GRIDS)
        others = rng.choices(self.places, k=lines * columns - 1)
        parts = [example, *(dict(self.rows[place]) for place in others)]
        rng.shuffle(parts)
        size = example["image"].size
        width, height = max(1, size[0] // columns), max(1, size[1] // lines)
        canvas = Image.new("RGB", (columns * width, lines * height))
        boxes, names, crowd = [], [], []
        for place, part in enumerate(parts):
            left, top = place % columns * width, place // columns * height
            small = resize({"image": to_rgb(part["image"]), "boxes": part["boxes"]}, width, height)
            canvas.paste(small["image"], (left, top))
            boxes.append(small["boxes"] + np.array([left, top] * 2, dtype=np.float32))
            names += part["names"]
            crowd += part["crowd"]
        present = set(names)
        return {
            **example,
            "image": canvas,
            "width": canvas.width,
            "height": canvas.height,
            "boxes": np.concatenate(boxes),
            "names": names,
            "crowd": crowd,
            "neg_names": [name for name in example["neg_names"] if name not in present],
            # The regions belong to one photograph, not to the whole image.
            "regions": None,
        }
