"""Limits of pixels, bytes and time for pictures, and the error for those beyond them."""

import io
import math
import os
import re
import struct
import time
from dataclasses import dataclass
from typing import Any

from .printable import printable

MEGAPIXEL = 1_000_000
MEGABYTE = 2**20
PEAK_BYTES_PER_PIXEL = 12
"""Most memory that reading a picture takes per pixel that `PictureLimits.pixels` allows, beside the file itself."""

MOST_SCANS = 100
"""Most scans of a JPEG: progressive files have about ten, and decoding passes over all pixels once per scan."""

_NARROWEST = 8
"""Pillow keeps a pointer for each row, so a narrower picture counts as one of this width."""

_MOST_MARKERS = 10_000
# In a scan's data, FF is followed by 0 or is a restart marker; FF may be repeated before a marker.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START_OF_SCAN, _END_OF_IMAGE, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)


class PictureError(ValueError):
    """A picture that cannot be read or exceeds a limit.

    Args:
        name: Name of the picture.
        what: What is wrong with it, with the limit, as the end of a sentence that begins with its name.
        remedy: What to do about it.
        kind: "missing", "address", "bytes", "pixels", "time", "format" or "damaged".

    Attributes:
        without_name: The message for places that name the picture themselves.
    """

    def __init__(self, name: str, what: str, remedy: str, kind: str) -> None:
        shown = printable(name) or "of an empty name"
        begin = f"There is no file {shown}" if kind == "missing" else f"{shown} {what}"
        super().__init__(f"{begin}; {remedy}.")
        self.name, self.what, self.remedy, self.kind = name, what, remedy, kind
        self.without_name = f"it {what}; {remedy}"

    def __reduce__(self) -> tuple:
        return type(self), (self.name, self.what, self.remedy, self.kind)


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


def damaged(name: str, error: Exception) -> PictureError:
    """Return the error for a picture that cannot be opened, or whose decoder failed."""
    if isinstance(error, FileNotFoundError):
        return PictureError(name, "is missing", "check the path", "missing")
    if isinstance(error, IsADirectoryError):
        return PictureError(name, "is a folder", "name a picture in it", "format")
    if isinstance(error, PermissionError):
        return PictureError(name, "may not be read", "check its permissions", "damaged")
    why = printable(" ".join(str(error).split()), limit=200) or type(error).__name__
    return PictureError(name, f"cannot be decoded ({why.rstrip('.')})", "save it again or leave it out", "damaged")


def check_pixels(size: tuple[int, int], share: float, limits: PictureLimits, name: str) -> None:
    width, height = size
    most, pixels = int(limits.pixels * share), max(width, _NARROWEST) * height
    if pixels > most:
        # Rounded up, and more for a format that may use only a part of the limit.
        needed = -int(-pixels // (share * MEGAPIXEL))
        of_its_kind = "" if share == 1 else " of its format"
        narrow = f", counted as {_NARROWEST} wide" if width < _NARROWEST else ""
        raise PictureError(
            name,
            f"has {width} x {height} pixels{narrow}; a picture{of_its_kind} may have {most / MEGAPIXEL:g} million",
            f"make it smaller, or allow it with --max-megapixels {needed}, GDINO_MAX_MEGAPIXELS={needed} or "
            f"PictureLimits(pixels={needed}_000_000)",
            "pixels",
        )


def check_speed(length: int, title: str, speed: float, limits: PictureLimits, name: str) -> None:
    """Check the size of a file whose decoder cannot be stopped and whose time grows with it."""
    most = limits.seconds * speed
    if length > most:
        needed = math.ceil(length / speed)
        raise PictureError(
            name,
            f"is a {title} picture of {length / 1e6:.0f} MB, which may take {needed} seconds to decode, and "
            f"{limits.seconds:g} are the limit",
            f"compress it more, or allow it with --max-seconds {needed}, GDINO_MAX_SECONDS={needed} or "
            f"PictureLimits(seconds={needed})",
            "time",
        )


def check_icon(data: bytes, limits: PictureLimits, name: str) -> None:
    """Check the sizes of the pictures in an icon, which Pillow decodes when it opens the file."""
    for entry in range(int.from_bytes(data[4:6], "little")):
        at = 6 + 16 * entry
        if len(data) < at + 16:
            break
        (start,) = struct.unpack_from("<I", data, at + 12)
        if data[start : start + 8] == b"\x89PNG\r\n\x1a\n":
            size = struct.unpack(">II", data[start + 16 : start + 24].ljust(8, b"\0"))
        elif data[start : start + 4] == b"\x0c\0\0\0":
            # The header of OS/2 has sides of 16 bits.
            size = struct.unpack("<HH", data[start + 4 : start + 8].ljust(4, b"\0"))
        else:
            size = struct.unpack("<ii", data[start + 4 : start + 12].ljust(8, b"\0"))
        check_pixels((abs(size[0]), abs(size[1])), 1.0, limits, name)


def has_many_scans(data: bytes) -> bool:
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


def too_many_scans(name: str) -> PictureError:
    return PictureError(
        name, f"is a JPEG of more than {MOST_SCANS} scans, which takes too long", "save it again", "time"
    )


def too_slow(name: str, limits: PictureLimits) -> PictureError:
    return PictureError(
        name,
        f"takes more than {limits.seconds:g} seconds to decode, the limit of a picture",
        "save it again, or allow it with --max-seconds, GDINO_MAX_SECONDS or PictureLimits(seconds=...)",
        "time",
    )


class _Timed:
    """A file that stops its reader after a time, because decoders cannot be stopped from outside.

    The time is this thread's processor time, so that a busy machine does not make pictures fail.
    """

    is_late = False

    def __init__(self, content: Any, seconds: float) -> None:
        super().__init__(content)  # type: ignore[call-arg]
        self._end = time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        self.check_time()
        return super().read(size)  # type: ignore[misc]

    def readline(self, size: int | None = -1, /) -> bytes:
        self.check_time()
        return super().readline(size)  # type: ignore[misc]

    def check_time(self) -> None:
        """Raise a TimeoutError if the time is over."""
        if time.thread_time() > self._end:
            self.is_late = True
            raise TimeoutError("it takes too long")


class TimedBytes(_Timed, io.BytesIO):
    """Content in memory."""


class TimedFile(_Timed, io.BufferedReader):
    """A file on disk, of which decoders read what they need."""


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
