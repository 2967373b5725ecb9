"""Augmentations that change an image together with its boxes, names and caption.

A transform maps one example {"image", "boxes", "names", ...} to another. `boxes` are (N, 4) xyxy in pixels; `names`,
`crowd` and `spans` have one entry per box; `spans` are [start, end) characters of `caption`. `resized` marks an image
that already has the model's input size. All randomness comes from the `random.Random` passed in, so an example and a
seed determine the result.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from ..model.picture_pixels import to_rgb
from ..model.resize_sizes import target_size
from .captions import swap_sides

Example = dict[str, Any]
Transform = Callable[[Example, random.Random], Example]

# The ImageNet mean, so that padding is about zero after normalization.
PADDING_COLOUR = (124, 116, 104)

BILINEAR = Image.Resampling.BILINEAR

_ONE_PER_BOX = ("names", "crowd", "spans")


class Compose:
    """Apply several transforms in order."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, example: Example, rng: random.Random) -> Example:
        for transform in self.transforms:
            example = transform(example, rng)
        return example


class RandomHorizontalFlip:
    """Mirror the image left to right and swap "left" and "right" in its names and its caption.

    Args:
        probability: Probability of mirroring, 0..1.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, example: Example, rng: random.Random) -> Example:
        return mirror(example) if rng.random() < self.probability else example


class RandomHalfTurn:
    """Rotate the image by 180 degrees and swap "left" and "right"; with mirroring this covers all four orientations.

    Args:
        probability: Probability of rotating, 0..1.
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
    """Replace the image by a random window of it, so that objects get larger, or smaller within padding.

    The window has the image's size divided by a random scale, with a jittered aspect ratio. If it is larger than the
    image, the image lies at a random place inside it on grey padding. Boxes are clipped to the window; a box that keeps
    less than `min_visibility` of its area is dropped, since the rest no longer shows the object.

    Args:
        scale: Smallest and largest magnification.
        aspect: Largest factor by which the aspect ratio changes, at least 1.
        min_visibility: Smallest fraction of a box's area that must stay visible to keep the box, 0..1.
        probability: Probability of cropping, 0..1.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.7, 1.8),
        aspect: float = 1.25,
        min_visibility: float = 0.35,
        probability: float = 0.8,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be two positive numbers in ascending order, got {scale}.")
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
    """Crop a window of random size, so that objects are seen at other scales once the image is resized.

    Args:
        least, most: Smallest and largest side of the window as a fraction of the image's side, 0..1.
        min_visibility: Smallest fraction of a box's area that must stay visible to keep the box, 0..1.
        probability: Probability of cropping, 0..1.

    Raises:
        ValueError: The bounds are not 0 < least <= most <= 1.
    """

    def __init__(
        self, least: float = 0.5, most: float = 1.0, min_visibility: float = 0.35, probability: float = 0.5
    ) -> None:
        if not 0 < least <= most <= 1:
            raise ValueError(f"least and most must be in ascending order within 0..1, got {least} and {most}.")
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
    """Resize the image to one of several sizes, which the processor then leaves alone; use it as the last transform.

    Args:
        sizes: Sizes to choose from, each in the form of the image processor's `size`: {"shortest_edge", "longest_edge"}
            or {"height", "width"}.

    Raises:
        ValueError: `sizes` is empty.
    """

    def __init__(self, sizes: Sequence[Mapping[str, int]]) -> None:
        if not sizes:
            raise ValueError("There is no size to choose from; pass at least one.")
        self.sizes = [dict(size) for size in sizes]

    def __call__(self, example: Example, rng: random.Random) -> Example:
        image = example["image"]
        height, width = target_size((image.height, image.width), rng.choice(self.sizes))
        return {**resize(example, width, height), "resized": True}


class RandomColour:
    """Jitter brightness, contrast and saturation; hue stays the same, since names and captions mention colours.

    Args:
        strength: Largest relative change of each, 0..1.
        probability: Probability of a change, 0..1.
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
        The mirrored example, with "left" and "right" swapped in its names and its caption.
    """
    image = example["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    boxes = _boxes(example).copy()
    boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    mirrored = {**example, "image": image, "boxes": boxes}
    if "names" in example:
        mirrored["names"] = [swap_sides(name)[0] for name in example["names"]]
    if example.get("neg_names") is not None:
        mirrored["neg_names"] = [swap_sides(name)[0] for name in example["neg_names"]]
    if example.get("caption") is not None:
        mirrored["caption"], move = swap_sides(example["caption"])
        mirrored["spans"] = [[move(*pair) for pair in pairs] for pairs in example["spans"]]
    return mirrored


def crop(example: Example, window: tuple[int, int, int, int], min_visibility: float = 0.0) -> Example:
    """Crop an example to a window, which may extend beyond the image.

    Args:
        example: {"image", "boxes", "names", ...}.
        window: Window as xyxy in pixels of the image.
        min_visibility: Smallest fraction of a box's area that must stay visible to keep the box, 0..1.

    Returns:
        The example with the window as its image. Boxes are clipped and moved; a dropped box loses its names, crowd
        mark and spans too.
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
    # Objects are visible only where the window overlaps the image.
    low = np.array([max(left, 0), max(top, 0)] * 2, dtype=np.float32)
    high = np.array([min(right, image.width), min(bottom, image.height)] * 2, dtype=np.float32)
    clipped = boxes.clip(low, high)
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    visible = (clipped[:, 2:] - clipped[:, :2]).prod(-1)
    keep = (visible > 0) & (visible >= min_visibility * size) & (clipped[:, 2:] - clipped[:, :2] >= 1).all(-1)
    clipped = clipped - np.array([left, top] * 2, dtype=np.float32)

    result = {**example, "image": cut, "boxes": clipped[keep]}
    # A cropped image no longer has the model's input size.
    result.pop("resized", None)
    for name in _ONE_PER_BOX:
        if example.get(name) is not None:
            result[name] = [value for value, kept in zip(example[name], keep, strict=True) if kept]
    return result


def resize(example: Example, width: int, height: int) -> Example:
    """Resize an example's image and its boxes.

    Args:
        example: {"image", "boxes", ...}.
        width, height: New size in pixels.

    Returns:
        The resized example.
    """
    image = example["image"]
    # Width and height have separate factors, because the size was rounded and the boxes are not.
    factors = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
    if image.size != (width, height):
        # Palette indices cannot be interpolated, so the image is converted to RGB first.
        image = to_rgb(image).resize((width, height), BILINEAR)
    return {**example, "image": image, "boxes": _boxes(example) * factors}


def _boxes(example: Example) -> np.ndarray:
    return np.asarray(example["boxes"], dtype=np.float32).reshape(-1, 4)


def _offset(image: int, window: int, rng: random.Random) -> int:
    """Draw where the window begins: a smaller one lies inside the image, a larger one contains the image."""
    return rng.randint(min(0, image - window), max(0, image - window))
