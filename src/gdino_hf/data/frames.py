"""Sizes and EXIF orientations of image files, and boxes brought into pixels of the upright image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..model import picture_files
from .annotation_options import AnnotationOptions
from .faults import Report
from .rows import LARGEST_SIDE, parse_integer
from .stored_pictures import Picture, content_or_path

# EXIF orientations that swap width and height.
_SWAPS_SIDES = (5, 6, 7, 8)

# Bytes at the end of a file in which its end mark is looked for.
_TAIL = 4096

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

    @property
    def annotated(self) -> tuple[float, float]:
        """Width and height that annotated boxes are pixels of."""
        width, height = self.turned_from if self.orientation != 1 else (self.width, self.height)
        return width / self.scale[0], height / self.scale[1]

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


def read_header(path: Picture) -> Header:
    """Return the stored size of an image file and its EXIF orientation, reading only its header.

    Args:
        path: The image file.

    Returns:
        Width and height in pixels as stored, and the orientation, 1..8.

    Raises:
        PictureError: A ValueError: the file is missing, not a picture that is read here, damaged or beyond a limit.
    """
    known = _headers.get()
    if known is None:
        return picture_files.read_header(content_or_path(path), name=path.name)
    key = str(path)
    if key not in known:
        try:
            known[key] = picture_files.read_header(content_or_path(path), name=path.name)
        # Kept to be raised again, since the same file is asked for several times.
        except Exception as error:
            known[key] = error.with_traceback(None)
    header = known[key]
    if isinstance(header, Exception):
        raise header
    return header


def may_be_cut_off(path: Picture) -> bool:
    """Whether an image file lacks the end mark of its format, as a broken download or a full disk leaves it.

    Args:
        path: The image file, which has a readable header.

    Returns:
        False for a JPEG, PNG or WebP file with its end in place. True for others, which only decoding can tell.
    """
    with path.open("rb") as file:
        start = file.read(12)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL, 0))
        # Some cameras pad their files with zeros.
        tail = file.read().rstrip(b"\0")
    if start.startswith(b"RIFF"):
        return size < int.from_bytes(start[4:8], "little") + 8
    return not tail.endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))


def annotated_size(entry: Mapping[str, Any], where: str, report: Report) -> Size | None:
    """Return the width and height of an image's entry.

    Args:
        entry: Entry of an annotation file with "width" and "height" in pixels.
        where: Name of the image, for faults.
        report: Function that faults are passed to.

    Returns:
        The size; None if there is none that can be used, as some tools write it.
    """
    if entry.get("width") is None or entry.get("height") is None:
        return None
    try:
        width = parse_integer(entry["width"], "its width", 1, LARGEST_SIDE)
        return width, parse_integer(entry["height"], "its height", 1, LARGEST_SIDE)
    except ValueError as error:
        report("broken sizes", f"{where}: {error}")
        return None


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
