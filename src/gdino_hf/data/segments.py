"""Boxes of COCO segments: polygons and run-length encoded masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .rows import parse_number

# Largest side of a mask and the largest number of its runs; beyond them a file is damaged or hostile.
_LARGEST_SIDE = 2**20
_MOST_RUNS = 2**24


def segment_box(segment: Any) -> tuple[float, float, float, float] | None:
    """Return the bounds of a COCO segment.

    Args:
        segment: A list of polygons ([x1, y1, x2, y2, ...] each), or a mask {"size": [height, width], "counts"} with
            counts as numbers or in COCO's compressed text.

    Returns:
        The box as xyxy in pixels, for masks up to the far edge of their last pixels; None if there is no segment or it
        is empty.

    Raises:
        ValueError: The segment has another form.
    """
    if isinstance(segment, Mapping):
        return _mask_box(segment)
    if not isinstance(segment, Sequence) or isinstance(segment, str) or not segment:
        return None
    polygons = segment if isinstance(segment[0], Sequence) else [segment]
    xs: list[float] = []
    ys: list[float] = []
    for polygon in polygons:
        if isinstance(polygon, Sequence) and not isinstance(polygon, str):
            polygon = [parse_number(number) for number in polygon]
        numbers = isinstance(polygon, Sequence) and all(
            isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e30
            for number in polygon
        )
        if not numbers or len(polygon) % 2:
            raise ValueError("its segmentation is not a list of polygons [x1, y1, x2, y2, ...]")
        xs += polygon[::2]
        ys += polygon[1::2]
    return (float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))) if xs else None


def mask_size(annotations: Iterable[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the width and height of the first mask among some annotations; None if there is no mask.

    Args:
        annotations: Entries of a COCO file's "annotations".
    """
    for annotation in annotations:
        mask = annotation.get("segmentation")
        size = mask.get("size") if isinstance(mask, Mapping) else None
        if isinstance(size, Sequence) and len(size) == 2:
            height, width = map(parse_number, size)
            if isinstance(width, int) and isinstance(height, int):
                return width, height
    return None


def _mask_box(mask: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    size, counts = mask.get("size"), mask.get("counts")
    size = [parse_number(side) for side in size] if isinstance(size, Sequence) else size
    sides = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size)
    if not sides or not all(0 < side <= _LARGEST_SIDE for side in size or ()):
        raise ValueError("its segmentation is a mask without a size [height, width]")
    height, width = size or (0, 0)
    if isinstance(counts, (str, bytes)):
        counts = decode_counts(counts)
    if not isinstance(counts, Sequence) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise ValueError("its segmentation is a mask whose counts are no runs of pixels")
    if sum(counts) > height * width:
        raise ValueError(f"its segmentation has more pixels than its size of {height}x{width}")
    ends = np.cumsum(np.asarray(counts, dtype=np.int64))
    # Runs alternate between background and object, beginning with background, down the columns.
    runs = [(begin, end) for begin, end in zip(ends[::2].tolist(), ends[1::2].tolist(), strict=False) if end > begin]
    if not runs:
        return None
    left, right = runs[0][0] // height, (runs[-1][1] - 1) // height + 1
    if any(begin // height != (end - 1) // height for begin, end in runs):
        top, bottom = 0, height
    else:
        top = min(begin % height for begin, _ in runs)
        bottom = max((end - 1) % height for _, end in runs) + 1
    return float(left), float(top), float(right), float(bottom)


def decode_counts(text: str | bytes) -> list[int]:
    """Decode the compressed run lengths of a COCO mask.

    Each number is written in groups of five bits from the lowest on, one printable character (48 added) per group with
    a sixth bit that says whether more follow; from the fourth number on, the difference to the number two before is
    written.

    Args:
        text: The compressed counts.

    Returns:
        The run lengths.

    Raises:
        ValueError: The text is not in this format.
    """
    data = text.encode("latin-1", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for byte in data:
        group = byte - 48
        if not 0 <= group < 64 or shift > 60 or len(counts) >= _MOST_RUNS:
            raise ValueError("its segmentation has counts that are not COCO's compressed text")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its segmentation has counts that end in the middle of a number")
    return counts
