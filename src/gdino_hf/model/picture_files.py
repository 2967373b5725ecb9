"""Opening picture files: limits of pixels, bytes and time, checked before and while a picture is decoded.

Every picture that the package reads from a file passes through `open_picture`, so that one list of formats and the same
limits hold in Python, in the commands, in training, in evaluation and on the web page.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageFile

from .picture_formats import (
    END_BYTES,
    FORMAT_NAMES,
    PICTURE_FORMATS,
    PLAIN_PPM_SHARE,
    READABLE,
    decoder,
    foreign_format,
    picture_format,
)
from .picture_limits import (
    MEGABYTE,
    PictureError,
    PictureLimits,
    TimedBytes,
    TimedFile,
    check_icon,
    check_pixels,
    check_speed,
    damaged,
    has_many_scans,
    too_many_scans,
    too_slow,
)
from .picture_metadata import ORIENTATION, check_directories, check_metadata, upright
from .pixel_depth import join_bytes, low_bytes_mode, read_binary_ppm, stated_depth, use_raw_mode
from .printable import printable
from .tiff_messages import quiet_libtiff

DEPTH_KEY = "gdino_bit_depth"
"""Key of a picture's `info` with the bit depth that its file states."""

# A picture that uses only 14 of its 16 bits has no high byte of this or more.
_HIGH_BYTE_IN_USE = 64

# Tags of EXIF and TIFF.
_WIDTH, _HEIGHT = 0x0100, 0x0101
# In the first picture of a raw file of most cameras.
_SUBFILE_TYPE, _PREVIEW = 0x00FE, 1


def open_picture(
    source: Any, limits: PictureLimits | None = None, *, name: str | None = None, bit_depth: int | None = None
) -> Image.Image:
    """Decode a picture of one of the formats of `PICTURE_FORMATS`, recognized by its content.

    Args:
        source: Path, content as bytes, or open binary file.
        limits: Limits to keep; None for those of the environment variables (see `PictureLimits`).
        name: Name of the picture for messages; None for the path.
        bit_depth: Number of bits that colours of 16 bits use; None for the smallest usual depth that holds them.

    Returns:
        The first picture of the file in its own mode, turned upright by its EXIF orientation. Colours have 8 bits;
        `info[DEPTH_KEY]` has the bit depth of greyscale values if the file states one.

    Raises:
        PictureError: A ValueError with one sentence: the file is missing, not a picture that is read here, damaged, or
            beyond a limit.
    """
    limits = limits or PictureLimits.current()
    name = _name(source, name)
    data = _read(source, limits, name)
    timed = TimedBytes(data, limits.seconds)
    with quiet_libtiff(), _one_sentence(name, timed, limits):
        kind, picture = _opened(timed, limits, name)
        if kind == "JPEG" and has_many_scans(data):
            raise too_many_scans(name)
        ppm = read_binary_ppm(picture, data, bit_depth) if kind == "PPM" else None
        if ppm is not None:
            return ppm
        picture.info[DEPTH_KEY] = stated_depth(kind, data, picture)
        low, low_modes = None, low_bytes_mode(picture)
        picture.load()
        highest = _highest(picture) if low_modes is not None else 0
        if low_modes is not None and (bit_depth or highest < _HIGH_BYTE_IN_USE):
            # The same file, so that the limit of time is that of both decodings together.
            timed.seek(0)
            low = decoder(kind)(timed, "")
            use_raw_mode(low, *low_modes)
            low.load()
        del data
    if low is not None and low_modes is not None:
        grey = low_modes[1] == "RGBA"
        try:
            picture = join_bytes(picture, low, grey, highest, bit_depth, timed.check_time)
        except TimeoutError as error:
            raise too_slow(name, limits) from error
        del low
    # Turning and copying both leave the open file behind.
    return upright(picture, name)


def read_header(
    source: Any, limits: PictureLimits | None = None, *, name: str | None = None
) -> tuple[tuple[int, int], int]:
    """Read the size of a picture and its orientation without decoding its pixels, where its format allows that.

    Args:
        source: Path, content as bytes, or open binary file.
        limits: Limits to keep; None for those of the environment variables.
        name: Name of the picture for messages; None for the path.

    Returns:
        Width and height in pixels as stored, and the EXIF orientation, 1 to 8.

    Raises:
        PictureError: As for `open_picture`.
    """
    limits = limits or PictureLimits.current()
    name = _name(source, name)
    if not isinstance(source, (str, os.PathLike)):
        source = io.BytesIO(_read(source, limits, name))
    try:
        raw = io.FileIO(source) if isinstance(source, (str, os.PathLike)) else source
        timed = TimedFile(raw, limits.seconds)
    except Exception as error:  # as in `_read`
        raise damaged(name, error) from error
    with timed, _one_sentence(name, timed, limits):
        kind, picture = _opened(timed, limits, name)
        # Pillow's size of a TIFF is that after turning.
        size = (picture.tag_v2[_WIDTH], picture.tag_v2[_HEIGHT]) if kind == "TIFF" else picture.size
        check_metadata(picture, name)
        # A PNG may tell its orientation behind the pixels, for which Pillow decodes all of them.
        is_told_early = kind == "PNG" and not _has_late_text(timed)
        exif = Image.Image.getexif(picture) if is_told_early else picture.getexif()
        orientation = exif.get(ORIENTATION, 1)
    return size, orientation if orientation in range(1, 9) else 1


def content_of_deep(picture: Image.Image) -> bytes | None:
    """Return the content of a colour file of 16 bits that the caller opened, of which Pillow would keep 8 bits.

    Args:
        picture: A picture.

    Returns:
        The content, or None if it is another kind of picture, or decoded already.
    """
    file = getattr(picture, "fp", None)
    return None if file is None or _is_decoded(picture) or low_bytes_mode(picture) is None else _content(file)


def check_opened(picture: Image.Image, limits: PictureLimits | None = None) -> None:
    """Check a picture that the caller opened with Pillow and that is decoded on first use.

    Args:
        picture: A picture; one in memory passes.
        limits: Limits to keep; None for those of the environment variables.

    Raises:
        PictureError: It is not decoded yet, and of a format outside the list, or beyond the limit of pixels or scans.
    """
    if not isinstance(picture, ImageFile.ImageFile) or _is_decoded(picture):
        return
    name = printable(getattr(picture, "filename", "") or "The picture", limit=200)
    kind = _PARENTS.get(picture.format or "", picture.format or "of no name")
    if kind not in FORMAT_NAMES:
        raise PictureError(name, f"is of the format {kind}, which is not read here", _GIVE, "format")
    is_plain = any(tile[0] == "ppm_plain" for tile in picture.tile)
    check_pixels(picture.size, _share(kind, b"P3" if is_plain else b""), limits or PictureLimits.current(), name)
    file = getattr(picture, "fp", None)
    if kind == "JPEG" and file is not None and has_many_scans(_content(file)):
        raise too_many_scans(name)


_GIVE = f"give {READABLE}"
# Formats of Pillow that are kinds of others.
_PARENTS = {"MPO": "JPEG", "DIB": "BMP"}


def _name(source: Any, name: str | None) -> str:
    is_path = isinstance(source, (str, os.PathLike))
    return printable(name if name is not None else source if is_path else "The file given", limit=200)


def _opened(file: Any, limits: PictureLimits, name: str) -> tuple[str, Any]:
    """Return the format of an open file, and the picture with its header read; its pixels are within the limits."""
    start = file.read(1000)
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - END_BYTES))
    kind = picture_format(start, file.read(END_BYTES))
    if kind is None:
        raise _not_a_picture(start, name)
    file.seek(0)
    if kind in ("ICO", "CUR"):
        check_icon(file.read(), limits, name)
        file.seek(0)
    found = next(each for each in PICTURE_FORMATS if each.name == kind)
    check_speed(length, found.title, found.speed, limits, name)
    if kind in ("TIFF", "AVIF", "HEIF"):
        check_directories(file, name, everywhere=kind != "TIFF")
        file.seek(0)
    try:
        opener = decoder(kind)
    except ImportError as error:
        raise PictureError(name, f"is a {found.title} picture", str(error), "format") from error
    picture: Any = opener(file, "")
    check_pixels(picture.size, _share(kind, start), limits, name)
    if kind == "TIFF" and (start[8:10] == b"CR" or picture.tag_v2.get(_SUBFILE_TYPE, 0) == _PREVIEW):
        raise PictureError(
            name,
            "is a camera's raw picture, of which only a small preview could be read",
            f"develop it and save it as {READABLE}",
            "format",
        )
    return kind, picture


@contextmanager
def _one_sentence(name: str, file: Any, limits: PictureLimits) -> Iterator[None]:
    """Turn what decoders raise on damaged files, exceptions of any type, into a PictureError."""
    try:
        yield
    except PictureError:
        raise
    except Exception as error:
        if file.is_late:
            raise too_slow(name, limits) from error
        raise damaged(name, error) from error
    if file.is_late:
        raise too_slow(name, limits)


def _read(source: Any, limits: PictureLimits, name: str) -> bytes:
    """Return the content of a source, of at most `limits.bytes`."""
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
        elif isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                data = file.read(limits.bytes + 1)
        else:
            if source.seekable():
                source.seek(0)
            data = source.read(limits.bytes + 1)
    except Exception as error:  # paths with a null character, files of any class
        raise damaged(name, error) from error
    if not isinstance(data, bytes):
        raise PictureError(name, "was opened as text", "open it with mode 'rb'", "format")
    if len(data) > limits.bytes:
        raise PictureError(
            name,
            f"has more than {limits.bytes / MEGABYTE:g} MB, the limit of a picture",
            "make it smaller, or allow it with --max-megabytes, GDINO_MAX_MEGABYTES or PictureLimits(bytes=...)",
            "bytes",
        )
    return data


def _has_late_text(file: Any) -> bool:
    """Whether a PNG has metadata behind its pixels; the place in the file stays the same."""
    place = file.tell()
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    pixels = late = False
    while not late and len(head := file.read(8)) == 8:
        pixels = pixels or head[4:] == b"IDAT"
        late = pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        # The chunk's content and its checksum.
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)
    return late


def _content(file: Any) -> bytes:
    """Return the content of an open file, and leave its position as it is."""
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return data


def _is_decoded(picture: Image.Image) -> bool:
    return vars(picture).get("_im", vars(picture).get("im")) is not None


def _highest(picture: Image.Image) -> int:
    """Return the largest byte of the colours."""
    extrema: Any = picture.getextrema()
    return max(high for _, high in extrema[:3])


def _not_a_picture(data: bytes, name: str) -> PictureError:
    if not data:
        return PictureError(name, "is empty (0 bytes)", "get the picture again", "format")
    foreign = foreign_format(data[:1000])
    if foreign:
        return PictureError(name, f"is {foreign}, which is not read here", f"save it as {READABLE}", "format")
    return PictureError(name, "is not a picture that can be read here", _GIVE, "format")


def _share(kind: str, data: bytes) -> float:
    """Return the part of the pixel limit that a picture may have."""
    if kind == "PPM" and data[:2] in (b"P1", b"P2", b"P3"):
        return PLAIN_PPM_SHARE
    return next(each.share for each in PICTURE_FORMATS if each.name == kind)
