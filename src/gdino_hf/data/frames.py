"""Sizes and EXIF orientations of image files, and boxes brought into pixels of the upright image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..model.picture_formats import END_BYTES, START_BYTES, decoder, picture_format
from .annotation_options import AnnotationOptions
from .faults import Report

# EXIF tag of the camera's orientation, and its values that swap width and height.
_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)

Size = tuple[int, int]
Header = tuple[Size, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """The upright image that boxes are brought into.

    Attributes:
        width, height: Size of the upright image in pixels; as annotated if there is no file.
        orientation: EXIF orientation, 1..8, by which boxes are turned; 1 leaves them as they are.
        scale: Factors of x and y from annotated pixels to those of the stored or upright image, before turning.
        turned_from: Size of the stored image in pixels, which boxes are turned in.
    """

    width: int
    height: int
    orientation: int = 1
    scale: tuple[float, float] = (1.0, 1.0)
    turned_from: Size = (0, 0)

    @property
    def is_identity(self) -> bool:
        """Whether boxes stay as they are."""
        return self.orientation == 1 and self.scale == (1.0, 1.0)

    def box(self, box: Box) -> Box:
        """Return an annotated xyxy box in pixels of the upright image."""
        if self.is_identity:
            return box
        x, y = self.scale
        return turn_box((box[0] * x, box[1] * y, box[2] * x, box[3] * y), self.turned_from, self.orientation)


def turn_box(box: Sequence[float], size: Size, orientation: int) -> Box:
    """Turn a box together with its image, as EXIF's orientation asks for.

    Args:
        box: The box as xyxy in pixels of the stored image.
        size: Width and height of the stored image in pixels.
        orientation: EXIF orientation, 1..8.

    Returns:
        The box as xyxy in pixels of the upright image.
    """
    width, height = size
    x1, y1, x2, y2 = box
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    return (y1, x1, y2, x2) if orientation in _SWAPS_SIDES else (x1, y1, x2, y2)


_headers: ContextVar[dict[str, Header | Exception] | None] = ContextVar("headers", default=None)


@contextmanager
def remembered_headers() -> Iterator[None]:
    """Inside the `with` block, read the header of each image file only once; checks and readers ask for it in turn."""
    token = _headers.set({} if _headers.get() is None else _headers.get())
    try:
        yield
    finally:
        _headers.reset(token)


def read_header(path: Path) -> Header:
    """Return the stored size of an image file and its EXIF orientation, reading only its header.

    Args:
        path: The image file.

    Returns:
        Width and height in pixels as stored, and the orientation, 1..8.

    Raises:
        Exception: The file is not an image or damaged; decoders raise exceptions of almost any type.
    """
    known = _headers.get()
    if known is None:
        return _read_header(path)
    key = str(path)
    if key not in known:
        try:
            known[key] = _read_header(path)
        # Kept to be raised again, since the same file is asked for several times.
        except Exception as error:
            known[key] = error.with_traceback(None)
    header = known[key]
    if isinstance(header, Exception):
        raise header
    return header


def _read_header(path: Path) -> Header:
    with path.open("rb") as file:
        start = file.read(START_BYTES)
        file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
        kind = picture_format(start, file.read())
        file.seek(0)
        if kind is None:
            raise ValueError("it is not a picture that can be read here")
        picture = decoder(kind)(file, "")
        # A PNG may tell its orientation behind the pixels, for which Pillow decodes all of them.
        is_told_early = kind == "PNG" and not _has_late_text(file)
        exif = Image.Image.getexif(picture) if is_told_early else picture.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        return picture.size, orientation if orientation in range(1, 9) else 1


def _has_late_text(file: BinaryIO) -> bool:
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


def find_frame(
    annotated: Size | None, stored: Size, orientation: int, options: AnnotationOptions, where: str, report: Report
) -> Frame:
    """Find out what the boxes of an image are pixels of.

    Args:
        annotated: Width and height in the annotation file; None if it gives none.
        stored: Width and height of the image as stored.
        orientation: EXIF orientation, 1..8.
        options: The conventions to assume.
        where: Name of the image, for faults.
        report: Function that faults are passed to.

    Returns:
        The frame. If the sizes contradict each other, the fault is reported and boxes stay as they are.
    """
    upright = stored[::-1] if orientation in _SWAPS_SIDES else stored
    follow = options.boxes_follow
    given = annotated or (stored if follow == "stored" else upright)
    fits = {name: fit for name, fit in (("upright", upright), ("stored", stored)) if given == fit}
    # Another size in the same proportion, within one pixel of rounding.
    near = {name: fit for name, fit in (("upright", upright), ("stored", stored)) if _same_shape(given, fit)}
    chosen = fits or (near if options.sizes == "scale" else {})
    if follow != "auto":
        chosen = {name: fit for name, fit in chosen.items() if name == follow}
    if not chosen:
        how = ", turned by its EXIF orientation" if orientation in _SWAPS_SIDES else ""
        report("wrong sizes", f"{where}: {upright[0]}x{upright[1]}{how}, not {given[0]}x{given[1]}")
        return Frame(*upright)
    name = "upright" if "upright" in chosen else "stored"
    if orientation != 1 and len(chosen) > 1:
        report("unclear orientations", where)
    size = chosen[name]
    scale = (size[0] / given[0], size[1] / given[1])
    if size != given:
        report("boxes scaled", f"{where}: {size[0]}x{size[1]}, not {given[0]}x{given[1]}")
    if name == "upright" or orientation == 1:
        return Frame(*upright, scale=scale)
    report("boxes turned", f"{where}: orientation {orientation}")
    return Frame(*upright, orientation=orientation, scale=scale, turned_from=stored)


def _same_shape(first: Size, second: Size) -> bool:
    """Whether one size is the other scaled, up to the rounding of its sides to whole pixels."""
    small, large = sorted((first, second), key=max)
    if min(small) < 1:
        return False
    factor = max(large) / max(small)
    return abs(small[0] * factor - large[0]) <= factor and abs(small[1] * factor - large[1]) <= factor
