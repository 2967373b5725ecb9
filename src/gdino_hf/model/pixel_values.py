"""From a picture to the pixels that a model takes: resized, rescaled and normalized, with PIL and numpy alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from .resize_sizes import target_size


def height_and_width(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return (height, width) of a picture or of an array (H, W, C)."""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)


def prepared(picture: Image.Image | np.ndarray, options: Mapping[str, Any], unit: bool) -> np.ndarray:
    """Turn one picture into the pixels that a model takes.

    Args:
        picture: Upright picture in RGB, or bytes (H, W, C).
        options: do_resize, size, resample, do_rescale, rescale_factor, do_normalize, image_mean and image_std, as in
            `GDinoImageProcessor`.
        unit: Whether its pixels were given in 0..1.

    Returns:
        (C, H, W) float32 at the size that `size` gives.

    Raises:
        ValueError: The picture would be too large, or the numbers of channels and means differ.
    """
    if options["do_resize"]:
        picture = _resized(picture, target_size(height_and_width(picture), options["size"]), options["resample"])
    pixels = np.asarray(picture)
    table = _table(options, pixels.shape[2], unit)
    result = np.empty((pixels.shape[2], *pixels.shape[:2]), dtype=np.float32)
    for channel, values in enumerate(table):
        # With mode "clip", which changes nothing for bytes, numpy writes to `out` without a copy.
        np.take(values, pixels[..., channel], out=result[channel], mode="clip")
    return result


def _table(options: Mapping[str, Any], channels: int, unit: bool) -> np.ndarray:
    """Return the value of each byte in each channel as (C, 256) float32: looking it up is faster than computing it."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    if options["do_rescale"]:
        levels = levels * np.float32(options["rescale_factor"])
    elif unit:
        levels = levels / np.float32(255)
    if options["do_normalize"]:
        mean = np.asarray(options["image_mean"], dtype=np.float32)
        std = np.asarray(options["image_std"], dtype=np.float32)
        for name, values in (("image_mean", mean), ("image_std", std)):
            if values.size not in (1, channels):
                raise ValueError(f"{name} has {values.size} numbers for pictures of {channels} channels.")
        levels = (levels - mean) / std
    return np.ascontiguousarray(np.broadcast_to(levels, (256, channels)).T)


def _resized(picture: Image.Image | np.ndarray, size: tuple[int, int], resample: int) -> Image.Image | np.ndarray:
    """Resize a picture to (height, width), each channel by itself if it is an array."""
    if size == height_and_width(picture):
        return picture
    if isinstance(picture, Image.Image):
        return picture.resize(size[::-1], resample=resample)
    channels = (Image.fromarray(np.ascontiguousarray(picture[..., index])) for index in range(picture.shape[2]))
    return np.stack([np.asarray(channel.resize(size[::-1], resample=resample)) for channel in channels], axis=-1)
