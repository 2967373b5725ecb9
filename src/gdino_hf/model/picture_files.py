"""Opening picture files: limits of pixels, bytes and time, checked before and while a picture is decoded.

Every picture that the package reads from a file passes through `open_picture`, so that one list of formats and the same
limits hold in Python, in the commands, in training, in evaluation and on the web page.
"""

import io
import os
import re
import struct
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile

from .picture_formats import (
    FORMAT_NAMES,
    PICTURE_FORMATS,
    PLAIN_PPM_SHARE,
    READABLE,
    decoder,
    foreign_format,
    picture_format,
)
from .pixel_depth import join_bytes, low_bytes_mode, stated_depth, use_raw_mode
from .printable import printable

DEPTH_KEY = "gdino_bit_depth"
"""Key of a picture's `info` with the bit depth that its file states."""

# Of 16 bits, 14 leave the high byte below this.
_HIGH_BYTE_IN_USE = 64

MEGAPIXEL = 1_000_000
MEGABYTE = 2**20
PEAK_BYTES_PER_PIXEL = 12
"""Most memory that reading a picture takes per pixel that `PictureLimits.pixels` allows, beside the file itself."""

MOST_SCANS = 100
"""Most scans of a JPEG: progressive files have about ten, and decoding passes over all pixels once per scan."""

_MOST_MARKERS = 10_000
# In a scan's data, FF is followed by 0 or is a restart marker; FF may be repeated before a marker.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START_OF_SCAN, _END_OF_IMAGE, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)

_ORIENTATION = 0x0112
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be read or exceeds a limit.

    Args:
        what: Name of the picture and what is wrong with it, with the limit.
        remedy: What to do about it.
        kind: "missing", "bytes", "pixels", "time", "format" or "damaged".
    """

    def __init__(self, what: str, remedy: str, kind: str) -> None:
        super().__init__(f"{what}; {remedy}.")
        self.what, self.remedy, self.kind = what, remedy, kind

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.remedy, self.kind)


@dataclass(frozen=True)
class PictureLimits:
    """Limits of what is decoded.

    The environment variables GDINO_MAX_MEGAPIXELS, GDINO_MAX_MEGABYTES and GDINO_MAX_SECONDS replace the defaults in a
    process and in the workers it starts.

    Attributes:
        pixels: Most pixels of a picture. Reading takes at most `PEAK_BYTES_PER_PIXEL` bytes of memory for each, so the
            default takes at most 960 MB. Formats whose decoders take more memory or time may have a part of these
            pixels (`PictureFormat.share`): WebP, AVIF and HEIC more than half, JPEG 2000 a quarter, QOI and plain PPM a
            fiftieth.
        bytes: Most bytes of a file.
        seconds: Most seconds of the processor's time that decoding may take.
    """

    pixels: int = 80 * MEGAPIXEL
    bytes: int = 200 * MEGABYTE
    seconds: float = 10.0

    @classmethod
    def current(cls) -> "PictureLimits":
        """Return the limits that the environment variables set.

        Raises:
            ValueError: A variable is not a positive number.
        """
        return cls(
            pixels=int(_environment("GDINO_MAX_MEGAPIXELS", cls.pixels / MEGAPIXEL) * MEGAPIXEL),
            bytes=int(_environment("GDINO_MAX_MEGABYTES", cls.bytes / MEGABYTE) * MEGABYTE),
            seconds=_environment("GDINO_MAX_SECONDS", cls.seconds),
        )


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
    is_path = isinstance(source, (str, os.PathLike))
    name = printable(name if name is not None else source if is_path else "The file given", limit=200)
    data = _read(source, limits, name)
    kind = picture_format(data[:100], data[-100:])
    if kind is None:
        raise _not_a_picture(data, name)
    timed = _TimedBytes(data, limits.seconds)
    try:
        opener = decoder(kind)
    except ImportError as error:
        title = next(each.title for each in PICTURE_FORMATS if each.name == kind)
        raise PictureError(f"{name} is a {title} picture", str(error), "format") from error
    try:
        if kind in ("ICO", "CUR"):
            _check_icon(data, limits, name)
        picture = opener(timed, "")
        _check_pixels(picture.size, _share(kind, data), limits, name)
        if kind == "JPEG" and _has_many_scans(data):
            raise _too_many_scans(name)
        picture.info[DEPTH_KEY] = stated_depth(kind, data, picture)
        low, low_modes = None, low_bytes_mode(picture)
        picture.load()
        if low_modes is not None and (bit_depth or not _uses_16_bits(picture)):
            low = opener(_TimedBytes(data, limits.seconds), "")
            use_raw_mode(low, *low_modes)
            low.load()
        del data
    except PictureError:
        raise
    except Exception as error:  # decoders raise exceptions of any type on damaged files
        if timed.is_late:
            raise _too_slow(name, limits) from error
        raise damaged(name, error) from error
    if timed.is_late:
        raise _too_slow(name, limits)
    if low is not None and low_modes is not None:
        picture = join_bytes(picture, low, grey=low_modes[1] == "RGBA", bit_depth=bit_depth)
        del low
    # Turning and copying both leave the open file behind.
    return upright(picture)


def upright(picture: Image.Image) -> Image.Image:
    """Return a copy turned by its EXIF orientation, or an unturned copy if its metadata cannot be read."""
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # metadata may be damaged in any way
        turn = None
    if turn is None:
        return picture.copy()
    turned = picture.transpose(turn)
    # Pillow copies the metadata, which would turn the picture once more when it is read again.
    for name in _METADATA:
        turned.info.pop(name, None)
    return turned


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
        raise PictureError(f"{name} is of the format {kind}, which is not read here", _GIVE, "format")
    is_plain = any(tile[0] == "ppm_plain" for tile in picture.tile)
    _check_pixels(picture.size, _share(kind, b"P3" if is_plain else b""), limits or PictureLimits.current(), name)
    file = getattr(picture, "fp", None)
    if kind == "JPEG" and file is not None and _has_many_scans(_content(file)):
        raise _too_many_scans(name)


def damaged(name: str, error: Exception) -> PictureError:
    """Return the error for a picture whose decoder failed."""
    why = printable(" ".join(str(error).split()), limit=200) or type(error).__name__
    return PictureError(f"{name} cannot be decoded ({why.rstrip('.')})", "save it again or leave it out", "damaged")


_GIVE = f"give {READABLE}"
# Formats of Pillow that are kinds of others.
_PARENTS = {"MPO": "JPEG", "DIB": "BMP"}


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
    except FileNotFoundError as error:
        raise PictureError(f"There is no file {name}", "check the path", "missing") from error
    except Exception as error:  # paths with a null character, files of any class
        raise damaged(name, error) from error
    if not isinstance(data, bytes):
        raise PictureError(f"{name} was opened as text", "open it with mode 'rb'", "format")
    if len(data) > limits.bytes:
        raise PictureError(
            f"{name} has more than {limits.bytes / MEGABYTE:g} MB, the limit of a picture",
            "make it smaller, or raise the limit with GDINO_MAX_MEGABYTES or PictureLimits(bytes=...)",
            "bytes",
        )
    return data


def _content(file: Any) -> bytes:
    """Return the content of an open file, and leave its position as it is."""
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return data


def _is_decoded(picture: Image.Image) -> bool:
    return vars(picture).get("_im", vars(picture).get("im")) is not None


def _uses_16_bits(picture: Image.Image) -> bool:
    extrema: Any = picture.getextrema()
    return max(high for _, high in extrema[:3]) >= _HIGH_BYTE_IN_USE


def _not_a_picture(data: bytes, name: str) -> PictureError:
    if not data:
        return PictureError(f"{name} is empty (0 bytes)", "get the picture again", "format")
    foreign = foreign_format(data[:1000])
    if foreign:
        return PictureError(f"{name} is {foreign}, which is not read here", f"save it as {READABLE}", "format")
    return PictureError(f"{name} is not a picture that can be read here", _GIVE, "format")


def _share(kind: str, data: bytes) -> float:
    """Return the part of the pixel limit that a picture may have."""
    if kind == "PPM" and data[:2] in (b"P1", b"P2", b"P3"):
        return PLAIN_PPM_SHARE
    return next(each.share for each in PICTURE_FORMATS if each.name == kind)


def _check_pixels(size: tuple[int, int], share: float, limits: PictureLimits, name: str) -> None:
    width, height = size
    most = int(limits.pixels * share)
    if width * height > most:
        of_its_kind = "" if share == 1 else " of its format"
        raise PictureError(
            f"{name} has {width} x {height} pixels; a picture{of_its_kind} may have {most / MEGAPIXEL:g} million",
            "make it smaller, or raise the limit with GDINO_MAX_MEGAPIXELS or PictureLimits(pixels=...)",
            "pixels",
        )


def _check_icon(data: bytes, limits: PictureLimits, name: str) -> None:
    """Check the sizes of the pictures in an icon, which Pillow decodes when it opens the file."""
    for entry in range(int.from_bytes(data[4:6], "little")):
        at = 6 + 16 * entry
        if len(data) < at + 16:
            break
        (start,) = struct.unpack_from("<I", data, at + 12)
        if data[start : start + 8] == b"\x89PNG\r\n\x1a\n":
            size = struct.unpack(">II", data[start + 16 : start + 24].ljust(8, b"\0"))
        else:
            size = struct.unpack("<ii", data[start + 4 : start + 12].ljust(8, b"\0"))
        _check_pixels((abs(size[0]), abs(size[1])), 1.0, limits, name)


def _has_many_scans(data: bytes) -> bool:
    """Whether a JPEG's first picture has more scans than `MOST_SCANS`, or more segments than any real one."""
    at, scans = 2, 0
    for _ in range(_MOST_MARKERS):
        found = _MARKER.search(data, at)
        if found is None or data[found.end() - 1] == _END_OF_IMAGE:
            return False
        marker, at = data[found.end() - 1], found.end()
        if marker == _START_OF_SCAN:
            scans += 1
            if scans > MOST_SCANS:
                return True
        if marker not in _WITHOUT_LENGTH:
            at += max(int.from_bytes(data[at : at + 2], "big"), 2)
    return True


def _too_many_scans(name: str) -> PictureError:
    return PictureError(
        f"{name} is a JPEG of more than {MOST_SCANS} scans, which takes too long", "save it again", "time"
    )


def _too_slow(name: str, limits: PictureLimits) -> PictureError:
    return PictureError(
        f"{name} takes more than {limits.seconds:g} seconds to decode, the limit of a picture",
        "save it again, or raise the limit with GDINO_MAX_SECONDS or PictureLimits(seconds=...)",
        "time",
    )


class _TimedBytes(io.BytesIO):
    """A file in memory that stops its reader after a time, for decoders cannot be stopped from outside.

    The time is this thread's processor time, so that a busy machine does not make pictures fail.
    """

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self._end = time.thread_time() + seconds
        self.is_late = False

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().readline(size)

    def _check(self) -> None:
        if time.thread_time() > self._end:
            self.is_late = True
            raise TimeoutError("it takes too long")


def _environment(variable: str, default: float) -> float:
    """Return a positive number from an environment variable."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{variable} is {text!r}; it must be a positive number, or unset for {default:g}.")
    return number
