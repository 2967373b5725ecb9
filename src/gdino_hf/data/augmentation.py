"""The augmentation that fine-tuning starts from."""

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
    """Mirror, cut and resize as DETR and its successors are trained, with colour and mosaic for small data sets.

    Args:
        size: The image processor's `size`, the largest that training sees.
        smallest: The least of the sizes as a part of the largest, 0..1; 1 keeps to one size.
        flip, crop, colour, mosaic: How often each, 0..1.
        rows: The data set that a mosaic takes other pictures from.
        step: Sizes are that many pixels apart.

    Returns:
        The transform. Images leave it at the size the model sees.

    Raises:
        ValueError: smallest is not within 0..1, or there is to be a mosaic and there are no rows.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must be within 0..1, got {smallest}.")
    if mosaic and rows is None:
        raise ValueError("A mosaic needs the data set; pass rows=.")
    transforms: list[Transform] = [Mosaic(rows, mosaic)] if mosaic else []
    transforms += [RandomHorizontalFlip(flip), RandomCrop(probability=crop), RandomColour(probability=colour)]
    return Compose([*transforms, RandomChoiceResize(training_sizes(size, smallest, step))])


def training_sizes(size: Mapping[str, int], smallest: float, step: int = 32) -> list[dict[str, int]]:
    """Sizes from a part of one up to it.

    Args:
        size: As the image processor's `size`.
        smallest: The least as a part of it, 0..1.
        step: Pixels from one to the next, along the shortest edge or the height.

    Returns:
        The sizes, the whole one last; a longest edge is the same for all.
    """
    side = next(name for name in ("shortest_edge", "height", "max_height") if name in size)
    whole = size[side]
    shorter = [whole - less for less in range(step, round(whole * (1 - smallest)) + 1, step)]
    fixed = {"longest_edge": size["longest_edge"]} if "longest_edge" in size else {}
    scaled = [
        {name: max(1, round(value * part / whole)) for name, value in size.items()} | fixed for part in [*shorter[::-1]]
    ]
    return [*scaled, dict(size)]
