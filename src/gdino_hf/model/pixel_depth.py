"""Pixels of more than 8 bits scaled to bytes: by a stated bit depth, or by the depth that their values need.

Scientific and industrial cameras store 10, 12 or 14 bits in 16-bit files. Divided by 65535, such a picture is nearly
black. So the smallest usual depth that holds the largest value is assumed, which is logged once for each depth.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

USUAL_DEPTHS = (8, 10, 12, 14, 16)
DEEPEST = 32
# Resampling filters overshoot a little.
_OVERSHOOT = 1e-3
# Values that are converted at a time, because float64 takes eight bytes each.
_BAND = 2**18
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def check_depth(bit_depth: int | None) -> int | None:
    """Return a stated bit depth; None stands for that of the environment variable GDINO_BIT_DEPTH, if it is set.

    Args:
        bit_depth: Number of bits that pixels use, 1 to 32, or None.

    Returns:
        The number, or None if none is stated.

    Raises:
        ValueError: It is not a whole number from 1 to 32.
    """
    stated: Any = bit_depth if bit_depth is not None else os.environ.get("GDINO_BIT_DEPTH") or None
    if stated is None:
        return None
    if isinstance(stated, str) and stated.isdecimal():
        stated = int(stated)
    if isinstance(stated, bool) or not isinstance(stated, int) or not 1 <= stated <= DEEPEST:
        raise ValueError(f"The bit depth {stated!r} is not a whole number from 1 to {DEEPEST}; give the bits in use.")
    return stated


def to_bytes(values: np.ndarray, bit_depth: int | None = None) -> np.ndarray:
    """Scale pixels of any numeric type to bytes.

    Args:
        values: Array of any shape: booleans, integers from 0 to 65535, or floats in 0..1, 0..255 or 0..65535. With a
            bit depth, integers and floats from 0 to 2 ** bit_depth - 1.
        bit_depth: Number of bits that the values use; None for the smallest of `USUAL_DEPTHS` that holds the largest.
            Bytes and booleans are not scaled by it.

    Returns:
        uint8 array of the same shape.

    Raises:
        ValueError: Values are no real numbers, not finite, negative, or larger than the bit depth allows.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise ValueError(f"Pixels must be integers, floats or booleans, got {values.dtype}; convert them.")
    lowest, highest = float(values.min()), float(values.max())
    is_float = np.issubdtype(values.dtype, np.floating)
    if is_float and not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError("The picture has pixels that are not finite; replace NaN and infinity.")
    if lowest < (-_OVERSHOOT if is_float else 0):
        raise ValueError(
            f"Pixels must not be negative, got {lowest:.6g} to {highest:.6g}; undo the normalization first."
        )
    if bit_depth is not None and highest > 2**bit_depth - 1:
        raise ValueError(
            f"The picture has pixels up to {highest:.6g}, but {bit_depth} bits hold at most {2**bit_depth - 1}; state "
            "the right bit depth."
        )
    if bit_depth is None and is_float and highest <= 1 + _OVERSHOOT:
        return _scaled(values, 255.0)
    return _scaled(values, 255 / (2 ** (bit_depth or held_depth(highest, _has_16_bits(values.dtype))) - 1))


def held_depth(highest: float, has_16_bits: bool = True) -> int:
    """Return the smallest usual bit depth that holds a value, and log it once if it is none of 8 and 16.

    Args:
        highest: Largest value of a picture.
        has_16_bits: Whether the values are stored as integers of 16 bits; then a depth of 8 is logged, too.

    Raises:
        ValueError: 16 bits do not hold it.
    """
    for depth in USUAL_DEPTHS:
        if highest <= 2**depth - 1:
            if 8 < depth < 16 or (depth == 8 and has_16_bits):
                _say_once(depth)
            return depth
    raise ValueError(
        f"Pixels must lie in 0..1, 0..255 or 0..65535, got up to {highest:.6g}; scale them, or state their bit depth."
    )


def stated_depth(kind: str, data: bytes, picture: Any) -> int | None:
    """Return the bit depth that a file itself states for its greyscale values; None if only the values show it.

    Args:
        kind: Name of the format.
        data: Content of the file.
        picture: The open file.
    """
    if kind == "PPM":
        # Pillow scales by the largest value that the file's header gives, unless that is 65535.
        return None if any(_raw_mode(tile) == "I;16B" for tile in picture.tile) else 16
    if kind == "TIFF" and any(_raw_mode(tile) == "I;12" for tile in picture.tile):
        return 12
    marker = data.find(b"\xff\x51") if kind == "JPEG2000" else -1
    # Pillow scales fewer bits to 16.
    return 16 if 0 <= marker < len(data) - 40 and (data[marker + 40] & 0x7F) + 1 < 16 else None


def is_unit(values: np.ndarray) -> bool:
    """Whether all values lie in 0..1, up to the overshoot of resampling filters."""
    return bool(values.min() >= -_OVERSHOOT and values.max() <= 1 + _OVERSHOOT)


def read_binary_ppm(picture: Any, data: bytes, bit_depth: int | None) -> Image.Image | None:
    """Decode a binary PPM or PGM that Pillow decodes in Python, a microsecond for each value.

    Args:
        picture: The open file.
        data: Its content.
        bit_depth: Number of bits in use where the header's largest value is 65535; None for what the values need.

    Returns:
        The picture in 8 bits, or None for other files and truncated ones.
    """
    tile = picture.tile[0] if picture.tile else None
    if tile is None or tile[0] != "ppm" or data[:2] not in (b"P5", b"P6"):
        return None
    largest = tile[3][-1]
    shape = (picture.height, picture.width, 3) if data[:2] == b"P6" else (picture.height, picture.width)
    kind, count = np.dtype(">u2" if largest > 255 else "u1"), int(np.prod(shape))
    if len(data) - tile[2] < count * kind.itemsize:
        return None
    values = np.frombuffer(data, kind, count, tile[2]).reshape(shape)
    return Image.fromarray(to_bytes(values, bit_depth) if largest == 65535 else _scaled(values, 255 / largest))


def low_bytes_mode(picture: Image.Image) -> tuple[str, str] | None:
    """Return mode and raw mode that decode the low bytes of a colour file of 16 bits, of which Pillow keeps the high.

    Args:
        picture: A file that is open and not decoded yet.

    Returns:
        The two modes, or None for other files.
    """
    raw = {_raw_mode(tile) for tile in getattr(picture, "tile", None) or ()}
    if len(raw) != 1:
        return None
    (mode,) = raw
    if mode == "LA;16B":
        # As RGBA of 8 bits: the high and the low byte of grey, then those of alpha.
        return "RGBA", "RGBA"
    kind, _, order = mode.partition(";16")
    if kind in ("RGB", "RGBA", "RGBX") and order in _OTHER_ORDER:
        return picture.mode, f"{kind};16{_OTHER_ORDER[order]}"
    return None


def use_raw_mode(picture: Any, mode: str, raw_mode: str) -> None:
    """Have a file that is open and not decoded yet decode in another raw mode of the same number of bits."""
    picture._mode = mode
    for index, tile in enumerate(picture.tile):
        arguments = raw_mode if isinstance(tile[3], str) else type(tile[3])((raw_mode, *tile[3][1:]))
        picture.tile[index] = tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def join_bytes(
    high: Image.Image,
    low: Image.Image,
    grey: bool,
    highest: int,
    bit_depth: int | None,
    check_time: Callable[[], None],
) -> Image.Image:
    """Put the two decodings of a colour file of 16 bits together and scale them to bytes.

    Args:
        high: The high bytes, RGB or RGBA; it is overwritten with the result.
        low: The low bytes; if `grey`, high and low bytes of grey in its first two channels.
        grey: Whether the file holds grey and alpha.
        highest: Largest high byte of a colour.
        bit_depth: Number of bits that the values use; None for the smallest of `USUAL_DEPTHS` that holds the largest.
        check_time: Function that is called for each band of rows and raises a TimeoutError if the time is over.

    Returns:
        `high`, in 8 bits.

    Raises:
        TimeoutError: The time is over.
        ValueError: Pixels are larger than the bit depth allows.
    """
    # Every usual depth is decided by the high byte alone.
    depth = bit_depth or held_depth(256 * highest + 255)
    table = _scaled(np.arange(2 ** min(depth, 16)), 255 / (2**depth - 1))
    rows = max(1, _BAND // (high.width * 4))
    for top in range(0, high.height, rows):
        check_time()
        box = (0, top, high.width, min(top + rows, high.height))
        first, second = np.asarray(high.crop(box)), np.asarray(low.crop(box))
        if grey:
            first, second = second[..., :1].repeat(3, -1), second[..., 1:2].repeat(3, -1)
        # With alpha, if there is one: whole pixels are several times as fast as a part of each.
        values = np.multiply(first, 256, dtype=np.uint16)
        values |= second
        if bit_depth is not None and values[..., :3].max() >= len(table):
            to_bytes(values[..., :3], depth)  # raises
        scaled = table.take(values, mode="clip")
        scaled[..., 3:] = 255
        high.paste(Image.fromarray(scaled), box)
    return high


def _raw_mode(tile: Any) -> str:
    arguments = tile[3]
    first = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
    return first if isinstance(first, str) else ""


def _has_16_bits(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.integer) and dtype.itemsize == 2


def _scaled(values: np.ndarray, factor: float) -> np.ndarray:
    """Multiply and round a band of rows at a time, to save memory."""
    scaled = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BAND // max(1, values[0].size)) if len(values) else 1
    for top in range(0, len(values), rows):
        band = values[top : top + rows].astype(np.float64) * factor
        scaled[top : top + rows] = np.rint(band).clip(0, 255)
    return scaled


@functools.cache
def _say_once(depth: int) -> None:
    logger.warning(
        "A picture with more than 8 bits per pixel holds values of %d bits, and is scaled by these; if this is not its "
        "bit depth, state that with load_image(picture, bit_depth=...) or the environment variable GDINO_BIT_DEPTH. "
        "Further pictures of this kind are not mentioned.",
        depth,
    )
