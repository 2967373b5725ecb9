"""Pictures of every kind as upright RGB: files, PIL images of any mode, arrays and tensors of any depth."""

import os
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .picture_files import PictureLimits, check_opened, damaged, open_picture, upright
from .printable import printable

# Resampling filters overshoot a little.
_OVERSHOOT = 1e-3
# Values that are converted at a time.
_BAND = 2**20


def load_image(image: Any, *, limits: PictureLimits | None = None) -> Image.Image:
    """Read any picture as an upright RGB PIL image.

    Args:
        image: PIL image, numpy array or torch tensor, path, bytes or open file.
        limits: Limits of a file's pixels, bytes and decoding time; None for those of the environment variables, see
            `PictureLimits`. Pictures in memory have no limits.

    Returns:
        The picture in RGB, turned as its EXIF orientation says; never the object given.

    Raises:
        ValueError: It cannot be read, is not a picture, exceeds a limit, or has values that are not finite.
        TypeError: The value has none of these types.
    """
    if isinstance(image, (str, os.PathLike, bytes, bytearray)) or hasattr(image, "read"):
        return to_rgb(open_picture(image, limits))
    if isinstance(image, Image.Image):
        check_opened(image, limits)
        try:
            image.load()
        except Exception as error:  # decoders raise exceptions of any type on damaged files
            raise damaged(printable(getattr(image, "filename", "") or "The picture"), error) from error
        return to_rgb(upright(image))
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise TypeError(f"An image must be a PIL image, array, tensor, path, bytes or file, got {type(image).__name__}.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert palette, greyscale, 16-bit, CMYK and transparent pictures to RGB; transparent pixels become opaque."""
    if image.width == 0 or image.height == 0:
        raise ValueError(f"The picture is {image.width}x{image.height} pixels; it must have at least one.")
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        return Image.fromarray(_grey_bytes(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Via RGBA, because PIL's direct conversion warns about palettes with several transparent colours.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale (H, W) greyscale values of 16 or 32 bits to bytes, a band of rows at a time to save memory."""
    lowest, highest = values.min(), values.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError("The picture has pixels that are not finite; replace NaN and infinity.")
    factor = 1.0
    if mode == "F" and lowest >= -_OVERSHOOT and highest <= 1 + _OVERSHOOT:
        factor = 255.0
    elif mode.startswith("I;16") or highest > 255:
        # A 32-bit picture counts as 16-bit only if it has values above 255.
        factor = 1 / 257
    bytes_ = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BAND // values.shape[1])
    for top in range(0, len(values), rows):
        band = values[top : top + rows].astype(np.float64) * factor
        bytes_[top : top + rows] = band.round().clip(0, 255)
    return bytes_


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"An image array must be (H, W), (H, W, C) or (C, H, W), got {array.shape}.")
    if array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"An image array must have 1, 3 or 4 channels, got {array.shape}.")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError("The image has pixels that are not finite; replace NaN and infinity.")
        if array.min() < -1e-3 or array.max() > 255:
            raise ValueError(
                f"Float pixels must lie in 0..1 or 0..255, got {array.min():.3g} to {array.max():.3g}; undo the "
                "normalization first."
            )
        array = array * 255 if _is_unit(array) else array
        array = np.rint(array).clip(0, 255)
    elif array.dtype == np.bool_:
        array = array * 255
    elif array.dtype == np.uint16:
        array = np.rint(array / 257)
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(f"Integer pixels must lie in 0..255, got {array.min()} to {array.max()}; scale them.")
    array = array.astype(np.uint8)
    return to_rgb(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


def in_unit_range(image: Any) -> bool:
    """Return whether pixels were given as floats in 0..1, which `load_image` turns into bytes."""
    if isinstance(image, Image.Image):
        return image.mode == "F" and _is_unit(np.asarray(image))
    if isinstance(image, Tensor):
        return image.is_floating_point() and _is_unit(image.detach().float().cpu().numpy())
    return isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating) and _is_unit(image)


def _is_unit(values: np.ndarray) -> bool:
    return bool(values.min() >= -_OVERSHOOT and values.max() <= 1 + _OVERSHOOT)
