"""Augmentations that keep boxes true: each takes and returns {"image", "boxes", "names", ...}.

An example's `boxes` are (N, 4) xyxy in pixels of its image; `names`, `crowd` and `spans` have one entry per box, and
`spans` are [start, end) characters of its `caption`. `resized` marks an image that has the size the model shall see.
Randomness comes from the `random.Random` handed in, so an example and a seed give one result.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from ..model.image_processing_gdino import target_size, to_rgb
from .captions import swap_sides

Example = dict[str, Any]
Transform = Callable[[Example, random.Random], Example]

# Padding becomes about zero after normalization with the ImageNet mean.
PADDING_COLOUR = (124, 116, 104)

BILINEAR = Image.Resampling.BILINEAR

_ONE_PER_BOX = ("names", "crowd", "spans")


class Compose:
    """Several transforms, one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, example: Example, rng: random.Random) -> Example:
        for transform in self.transforms:
            example = transform(example, rng)
        return example


class RandomHorizontalFlip:
    """Mirror the image left to right, and "left" and "right" in its names and its caption with it.

    Args:
        probability: How often, 0..1.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, example: Example, rng: random.Random) -> Example:
        return mirror(example) if rng.random() < self.probability else example


class RandomHalfTurn:
    """Turn the image by 180 degrees, which puts right what was left; with mirroring, all four ways a rectangle can lie.

    Args:
        probability: How often, 0..1.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, example: Example, rng: random.Random) -> Example:
        if rng.random() >= self.probability:
            return example
        mirrored = mirror(example)
        image, boxes = mirrored["image"].transpose(Image.Transpose.FLIP_TOP_BOTTOM), mirrored["boxes"].copy()
        boxes[:, [1, 3]] = image.height - boxes[:, [3, 1]]
        return {**mirrored, "image": image, "boxes": boxes}


class RandomScaleCrop:
    """Cut a random window and let it stand for the image: objects get larger, or smaller beside padding.

    The window has the image's size divided by a random scale and a jittered aspect. Where it is larger than the
    image, the image stands somewhere inside it on grey. A box is cut at the window; when less than `min_visibility`
    of its area is left, the box goes, since what remains no longer shows the object.

    Args:
        scale: Smallest and largest magnification.
        aspect: Largest stretch of the window's aspect, as a factor of at least 1.
        min_visibility: Least visible part of a box's area for it to stay, 0..1.
        probability: How often, 0..1.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.7, 1.8),
        aspect: float = 1.25,
        min_visibility: float = 0.35,
        probability: float = 0.8,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be two positive numbers in rising order, got {scale}.")
        if aspect < 1:
            raise ValueError(f"aspect must be at least 1, got {aspect}.")
        self.scale = scale
        self.aspect = aspect
        self.min_visibility = min_visibility
        self.probability = probability

    def __call__(self, example: Example, rng: random.Random) -> Example:
        if rng.random() >= self.probability:
            return example
        image = example["image"]
        magnification = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        stretch = math.exp(rng.uniform(-1, 1) * math.log(self.aspect) / 2)
        width = max(1, round(image.width / magnification * stretch))
        height = max(1, round(image.height / magnification / stretch))
        left, top = _offset(image.width, width, rng), _offset(image.height, height, rng)
        return crop(example, (left, top, left + width, top + height), self.min_visibility)


class RandomCrop:
    """Cut out a window of random sides, so that objects are seen at other scales once the image is resized.

    Args:
        least, most: Bounds of each side as a part of the image's, 0..1.
        min_visibility: Least visible part of a box's area for it to stay, 0..1.
        probability: How often, 0..1.

    Raises:
        ValueError: The bounds are not 0 < least <= most <= 1.
    """

    def __init__(
        self, least: float = 0.5, most: float = 1.0, min_visibility: float = 0.35, probability: float = 0.5
    ) -> None:
        if not 0 < least <= most <= 1:
            raise ValueError(f"least and most must be in rising order within 0..1, got {least} and {most}.")
        self.least = least
        self.most = most
        self.min_visibility = min_visibility
        self.probability = probability

    def __call__(self, example: Example, rng: random.Random) -> Example:
        if rng.random() >= self.probability:
            return example
        image = example["image"]
        width = max(1, round(image.width * rng.uniform(self.least, self.most)))
        height = max(1, round(image.height * rng.uniform(self.least, self.most)))
        left, top = _offset(image.width, width, rng), _offset(image.height, height, rng)
        return crop(example, (left, top, left + width, top + height), self.min_visibility)


class RandomChoiceResize:
    """Bring the image to one of several sizes; the processor then takes it as it is. Stands last.

    Args:
        sizes: Each as the image processor's `size`: {"shortest_edge", "longest_edge"} or {"height", "width"}.

    Raises:
        ValueError: There is no size.
    """

    def __init__(self, sizes: Sequence[Mapping[str, int]]) -> None:
        if not sizes:
            raise ValueError("There is no size to choose from; give one at least.")
        self.sizes = [dict(size) for size in sizes]

    def __call__(self, example: Example, rng: random.Random) -> Example:
        image = example["image"]
        height, width = target_size((image.height, image.width), rng.choice(self.sizes))
        return {**resize(example, width, height), "resized": True}


class RandomColour:
    """Change brightness, contrast and saturation a little; hues stay, since captions and names tell colours.

    Args:
        strength: Largest relative change of each, 0..1.
        probability: How often, 0..1.
    """

    def __init__(self, strength: float = 0.3, probability: float = 0.5) -> None:
        self.strength = strength
        self.probability = probability

    def __call__(self, example: Example, rng: random.Random) -> Example:
        if rng.random() >= self.probability:
            return example
        image = to_rgb(example["image"])
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(1 + rng.uniform(-self.strength, self.strength))
        return {**example, "image": image}


def mirror(example: Example) -> Example:
    """Mirror an example left to right.

    Args:
        example: {"image", "boxes", ...}.

    Returns:
        The example, "left" and "right" having changed places in its names, its caption and its spans.
    """
    image = example["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    boxes = _boxes(example).copy()
    boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    mirrored = {**example, "image": image, "boxes": boxes}
    if "names" in example:
        mirrored["names"] = [swap_sides(name)[0] for name in example["names"]]
    if example.get("caption") is not None:
        mirrored["caption"], move = swap_sides(example["caption"])
        mirrored["spans"] = [[move(*pair) for pair in pairs] for pairs in example["spans"]]
    return mirrored


def crop(example: Example, window: tuple[int, int, int, int], min_visibility: float = 0.0) -> Example:
    """Cut a window, which may reach over the image's edge, out of an example.

    Args:
        example: {"image", "boxes", "names", ...}; what else has one entry per box is cut along.
        window: xyxy in pixels.
        min_visibility: Boxes that keep less than this part of their area are dropped, 0..1.

    Returns:
        The example with the window as its image and its boxes cut and moved into it.
    """
    image = example["image"]
    left, top, right, bottom = window
    inside = left >= 0 and top >= 0 and right <= image.width and bottom <= image.height
    if inside:
        cut = image.crop(window)
    else:
        cut = Image.new("RGB", (right - left, bottom - top), PADDING_COLOUR)
        cut.paste(to_rgb(image), (-left, -top))

    boxes = _boxes(example)
    # Only the part of the window that shows the photograph can hold an object.
    low = np.array([max(left, 0), max(top, 0)] * 2, dtype=np.float32)
    high = np.array([min(right, image.width), min(bottom, image.height)] * 2, dtype=np.float32)
    clipped = boxes.clip(low, high)
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    visible = (clipped[:, 2:] - clipped[:, :2]).prod(-1)
    keep = (visible > 0) & (visible >= min_visibility * size) & (clipped[:, 2:] - clipped[:, :2] >= 1).all(-1)
    clipped = clipped - np.array([left, top] * 2, dtype=np.float32)

    result = {**example, "image": cut, "boxes": clipped[keep]}
    # A window has no longer the size that was chosen for the model.
    result.pop("resized", None)
    for name in _ONE_PER_BOX:
        if example.get(name) is not None:
            result[name] = [value for value, kept in zip(example[name], keep, strict=True) if kept]
    return result


def resize(example: Example, width: int, height: int) -> Example:
    """Bring an example's image to a size, and its boxes along.

    Args:
        example: {"image", "boxes", ...}.
        width, height: New size in pixels.

    Returns:
        The example.
    """
    image = example["image"]
    # What was rounded in the size is not rounded in the boxes: both sides have a factor of their own.
    factors = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
    if image.size != (width, height):
        # A palette's numbers have no mean.
        image = to_rgb(image).resize((width, height), BILINEAR)
    return {**example, "image": image, "boxes": _boxes(example) * factors}


def _boxes(example: Example) -> np.ndarray:
    return np.asarray(example["boxes"], dtype=np.float32).reshape(-1, 4)


def _offset(image: int, window: int, rng: random.Random) -> int:
    """Where the window begins: inside the image when smaller, so that the image lies inside it when larger."""
    return rng.randint(min(0, image - window), max(0, image - window))
