"""Orientation of a picture by its metadata, and a limit of how many numbers its metadata may hold.

Pillow decodes numbers of EXIF and TIFF in Python, four microseconds for each, and no limit of time can stop it there. A
file of 200 MB may hold millions of them in one tag.
"""

import os
import re
import struct
from typing import Any

from PIL import Image

from .picture_limits import PictureError

MOST_NUMBERS = 500_000
"""Most numbers in the tags of one directory of metadata; those of real pictures are thousands of offsets at most."""

ORIENTATION = 0x0112
# Text and bytes are not decoded one by one.
_TEXTS = frozenset((1, 2, 6, 7))
_BIG_TIFF = 43
_START = re.compile(rb"II[*+]\0|MM\0[*+]")
_RAW_PROFILE = "Raw profile type exif"
_METADATA = ("exif", _RAW_PROFILE, "xmp", "XML:com.adobe.xmp")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_metadata(picture: Image.Image, name: str) -> None:
    """Refuse a picture whose EXIF metadata take too long to decode.

    Args:
        picture: An open picture, whose metadata are not decoded yet.
        name: Name of the picture for the message.

    Raises:
        PictureError: They hold more than `MOST_NUMBERS` numbers.
    """
    exif = picture.info.get("exif")
    # In a raw profile, two digits stand for a byte, and four bytes at least for a number.
    profile = picture.info.get(_RAW_PROFILE)
    long_profile = isinstance(profile, (str, bytes)) and len(profile) > 2 * 4 * MOST_NUMBERS
    if long_profile or (isinstance(exif, bytes) and has_many_numbers(exif)):
        raise _too_many_numbers(name)


def check_directories(file: Any, name: str, everywhere: bool) -> None:
    """Refuse a file whose metadata take too long to decode, before a decoder opens it.

    Args:
        file: An open TIFF file, or one of a format whose decoder reads EXIF when it opens the file.
        name: Name of the picture for the message.
        everywhere: Whether metadata may begin anywhere in the file, not at its start alone.

    Raises:
        PictureError: They hold more than `MOST_NUMBERS` numbers.
    """
    file.seek(0)
    if _many_in_file(file) or (everywhere and has_many_numbers(_all(file))):
        raise _too_many_numbers(name)


def has_many_numbers(data: bytes) -> bool:
    """Whether one of the directories of metadata in some bytes holds more numbers than `MOST_NUMBERS`."""
    return any(_are_many(_reader(data, found.start()), len(data)) for found in _START.finditer(data))


def _many_in_file(file: Any) -> bool:
    """Whether the first directory of an open TIFF file holds more numbers than `MOST_NUMBERS`."""

    def read(at: int, length: int) -> bytes:
        file.seek(at)
        content: bytes = file.read(length)
        return content

    return _are_many(read, file.seek(0, os.SEEK_END))


def upright(picture: Image.Image, name: str = "The picture") -> Image.Image:
    """Return a copy turned by its EXIF orientation, or an unturned copy if its metadata cannot be read.

    Args:
        picture: A picture.
        name: Name of the picture for messages.

    Returns:
        The copy, without the metadata that would turn it once more.

    Raises:
        PictureError: Its metadata take too long to decode.
    """
    check_metadata(picture, name)
    try:
        turn = _TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # metadata may be damaged in any way
        turn = None
    if turn is None:
        return picture.copy()
    turned = picture.transpose(turn)
    # Pillow copies the metadata, which would turn the picture once more when it is read again.
    for key in _METADATA:
        turned.info.pop(key, None)
    return turned


def _reader(data: bytes, start: int) -> Any:
    return lambda at, length: data[start + at : start + at + length]


def _are_many(read: Any, length: int) -> bool:
    """Whether the first directory after a TIFF header holds more numbers than `MOST_NUMBERS`, as far as they fit."""
    header = read(0, 16)
    if len(header) < 16 or not _START.match(header):
        return False
    order = "<" if header[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", header, 2)[0] == _BIG_TIFF
    (at,) = struct.unpack_from(f"{order}Q", header, 8) if big else struct.unpack_from(f"{order}I", header, 4)
    if at >= 2**62:
        return False
    width, entry = (8, f"{order}HHQQ") if big else (2, f"{order}HHII")
    count = int.from_bytes(read(at, width), "little" if order == "<" else "big")
    size = struct.calcsize(entry)
    directory = read(at + width, min(count, 2**16) * size)
    entries = struct.iter_unpack(entry, directory[: len(directory) // size * size])
    numbers = [number for _, kind, number, _ in entries if kind not in _TEXTS]
    # A number has two bytes or more; larger counts are damage, which decoders pass over.
    return sum(number for number in numbers if 2 * number <= length) > MOST_NUMBERS


def _all(file: Any) -> bytes:
    file.seek(0, os.SEEK_SET)
    content: bytes = file.read()
    return content


def _too_many_numbers(name: str) -> PictureError:
    return PictureError(
        name,
        f"has more than {MOST_NUMBERS:,} numbers in its metadata, which take too long to read",
        "save it again without them",
        "time",
    )
