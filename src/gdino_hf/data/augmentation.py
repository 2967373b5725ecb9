"""The default augmentation for fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .mosaic import Mosaic
from .transforms import Compose, RandomChoiceResize, RandomColour, RandomCrop, RandomHorizontalFlip, Transform


def default_transform(
    size: Mapping[str, int],
    *,
    smallest: float = 0.6,
    flip: float = 0.5,
    crop: float = 0.5,
    colour: float = 0.0,
    mosaic: float = 0.0,
    rows: Any = None,
    step: int = 32,
) -> Compose:
    """Build the augmentation of DETR and its successors: flip, crop and multi-scale resize.

    Colour jitter and mosaic are off by default; they help on small data sets.

    Args:
        size: Largest training size, in the form of the image processor's `size`.
        smallest: Smallest training size as a fraction of the largest, in (0, 1]; 1 trains at a single size.
        flip, crop, colour, mosaic: Probability of each augmentation, 0..1.
        rows: Data set that a mosaic draws its other images from; required when `mosaic` is above 0.
        step: Distance between two training sizes in pixels.

    Returns:
        The transform. It resizes last, so images leave it at the model's input size.

    Raises:
        ValueError: `smallest` is outside (0, 1], or `mosaic` is above 0 and `rows` is missing.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must be above 0 and at most 1, got {smallest}.")
    if mosaic and rows is None:
        raise ValueError("A mosaic draws images from the data set; pass rows=.")
    transforms: list[Transform] = [Mosaic(rows, mosaic)] if mosaic else []
    transforms += [RandomHorizontalFlip(flip), RandomCrop(probability=crop), RandomColour(probability=colour)]
    return Compose([*transforms, RandomChoiceResize(training_sizes(size, smallest, step))])


def training_sizes(size: Mapping[str, int], smallest: float, step: int = 32) -> list[dict[str, int]]:
    """Return the training sizes, from `smallest * size` up to `size`.

    Args:
        size: Largest size, in the form of the image processor's `size`.
        smallest: Smallest size as a fraction of the largest, in (0, 1].
        step: Distance between two sizes in pixels, along the shortest edge or the height.

    Returns:
        The sizes in ascending order. A longest edge is kept unchanged in all of them.
    """
    side = next(name for name in ("shortest_edge", "height", "max_height") if name in size)
    whole = size[side]
    shorter = [whole - less for less in range(step, round(whole * (1 - smallest)) + 1, step)]
    fixed = {"longest_edge": size["longest_edge"]} if "longest_edge" in size else {}
    scaled = [
        {name: max(1, round(value * part / whole)) for name, value in size.items()} | fixed for part in [*shorter[::-1]]
    ]
    return [*scaled, dict(size)]
