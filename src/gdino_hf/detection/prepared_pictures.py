"""Pictures that are ready for a model, and which of them share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

# A picture joins a batch if its number of pixels is at least this part of the padded one.
_SMALLEST_SHARE = 0.8
_SMALL_PIXELS = 800_000
SMALL_PICTURES = 4
"""Small pictures of equal size in one forward on a CPU; with more, the layers' results leave the cache."""


@dataclass(frozen=True)
class PreparedPicture:
    """A picture that is ready for a model.

    Attributes:
        image: The picture, upright and RGB.
        source: Where it came from.
        inputs: What `prepare_image` returned for it.
    """

    image: Image.Image
    source: Any
    inputs: Any


def are_small_and_equal(batch: Sequence[PreparedPicture], picture: PreparedPicture) -> bool:
    """Return whether a picture has the size of those of a batch, and all are small.

    On a CPU a batch of small pictures takes less time per picture, because its threads wait less for each other; large
    ones gain nothing and need memory. Pictures of one size are not padded, so a batch changes results by rounding only.
    """
    together = (*batch, picture)
    return len(set(_sizes(together))) == 1 and are_small(together)


def are_small(pictures: Sequence[PreparedPicture]) -> bool:
    """Return whether pictures have so few pixels together that a CPU's threads would wait for each other."""
    return sum(height * width for height, width in _sizes(pictures)) <= _SMALL_PIXELS


def are_alike(batch: Sequence[PreparedPicture], picture: PreparedPicture) -> bool:
    """Return whether a picture can join a batch without much padding."""
    shapes = _sizes((*batch, picture))
    padded = max(height for height, _ in shapes) * max(width for _, width in shapes)
    return all(height * width >= _SMALLEST_SHARE * padded for height, width in shapes)


def _sizes(pictures: Sequence[PreparedPicture]) -> list[tuple[int, int]]:
    """Return each picture's (height, width) in the model."""
    return [tuple(picture.inputs["pixel_values"].shape[2:]) for picture in pictures]
