"""Pictures of every kind as upright RGB: files, PIL images of any mode, arrays and tensors of any depth."""

import os
from typing import Any

import numpy as np
from PIL import Image

from .picture_files import DEPTH_KEY, check_opened, content_of_deep, open_picture
from .picture_limits import PictureLimits, damaged
from .picture_metadata import upright
from .pixel_depth import check_depth, is_unit, to_bytes
from .printable import printable
from .tensor_values import as_array, is_tensor
from .tiff_messages import quiet_libtiff


def load_image(image: Any, *, limits: PictureLimits | None = None, bit_depth: int | None = None) -> Image.Image:
    """Read any picture as an upright RGB PIL image.

    Args:
        image: PIL image, numpy array or torch tensor, path, bytes or open file.
        limits: Limits of a file's pixels, bytes and decoding time; None for those of the environment variables, see
            `PictureLimits`. Pictures in memory have no limits.
        bit_depth: Number of bits that pixels of more than 8 bits use, such as 12 for values from 0 to 4095; None for
            that of the environment variable GDINO_BIT_DEPTH, or else the smallest of 8, 10, 12, 14 and 16 that holds
            the largest value. Floats in 0..1 are scaled by 255 if none is stated.

    Returns:
        The picture in RGB, turned as its EXIF orientation says; never the object given.

    Raises:
        ValueError: It cannot be read, is not a picture, exceeds a limit, or has values that are negative, not finite or
            beyond the bit depth.
        TypeError: The value has none of these types.
    """
    bit_depth = check_depth(bit_depth)
    if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(image, "read"):
        return to_rgb(open_picture(image, limits, bit_depth=bit_depth), bit_depth)
    if isinstance(image, Image.Image):
        check_opened(image, limits)
        deep = content_of_deep(image)
        if deep is not None:
            return to_rgb(open_picture(deep, limits, bit_depth=bit_depth))
        try:
            with quiet_libtiff():
                image.load()
        except Exception as error:  # decoders raise exceptions of any type on damaged files
            raise damaged(printable(getattr(image, "filename", "") or "The picture"), error) from error
        return to_rgb(upright(image), bit_depth)
    if is_tensor(image):
        image = as_array(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, bit_depth)
    raise TypeError(f"An image must be a PIL image, array, tensor, path, bytes or file, got {type(image).__name__}.")


def to_rgb(image: Image.Image, bit_depth: int | None = None) -> Image.Image:
    """Convert a picture of any mode to RGB; transparent pixels become opaque.

    Args:
        image: Palette, greyscale, 16-bit, 32-bit, CMYK, transparent or RGB picture.
        bit_depth: Number of bits that greyscale values of more than 8 bits use, as in `load_image`.

    Returns:
        The picture in RGB; an RGB picture itself.

    Raises:
        ValueError: It has no pixels, or values that are negative, not finite or beyond the bit depth.
    """
    if image.width == 0 or image.height == 0:
        raise ValueError(f"The picture is {image.width}x{image.height} pixels; it must have at least one.")
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        grey = to_bytes(np.asarray(image), bit_depth or image.info.get(DEPTH_KEY))
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Via RGBA, because PIL's direct conversion warns about palettes with several transparent colours.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_array(array: np.ndarray, bit_depth: int | None) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"An image array must be (H, W), (H, W, C) or (C, H, W), got {array.shape}.")
    if array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"An image array must have 1, 3 or 4 channels, got {array.shape}.")
    # Without alpha, which would be scaled with the colours.
    array = to_bytes(array[..., 0] if array.shape[-1] == 1 else array[..., :3], bit_depth)
    return to_rgb(Image.fromarray(array))


def in_unit_range(image: Any) -> bool:
    """Return whether pixels were given as floats in 0..1, which `load_image` turns into bytes."""
    if isinstance(image, Image.Image):
        return image.mode == "F" and is_unit(np.asarray(image))
    if is_tensor(image):
        return bool(image.is_floating_point()) and is_unit(as_array(image))
    return isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating) and is_unit(image)
