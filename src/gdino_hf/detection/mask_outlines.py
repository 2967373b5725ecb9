"""Outlines of masks as polygons along the edges of pixels: with holes, of several parts, down to single pixels.

A polygon's corners are corners of pixels: the pixel in column x and row y reaches from (x, y) to (x + 1, y + 1), as
pycocotools reads polygons. Outlines through the centres of pixels, as OpenCV and supervision make them, lose half a
pixel all around, and parts that are one pixel wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .exchange_values import kept_library

# Corners are left out where the outline then deviates by at most this many pixels; the first that covers a part serves.
_TOLERANCES = (1.0, 0.5)
# A part whose shorter outline covers less than this (1 minus the area between the outlines, relative to its own) keeps
# more corners.
_LEAST_COVER = 0.98


def mask_polygons(mask: np.ndarray, exact: bool = False) -> list[np.ndarray]:
    """Return the outline of each part of a mask; parts touch each other at corners at most.

    Args:
        mask: (height, width) bool.
        exact: Whether to follow the edge of every pixel. Otherwise corners are left out where the outline stays within
            a pixel and the area of each part within 2 %.

    Returns:
        (M, 2) float64 x and y in pixels for each part, with whole numbers, not closed. A hole is part of the polygon:
        a line of no width leads to it and back. An empty mask has none.

    Raises:
        ImportError: shapely is not installed.
    """
    shapely = kept_library("shapely", "Outlines of masks need", "masks")
    parts = shapely.get_parts(_region(shapely, mask))
    # This leaves out corners on straight lines alone.
    best = shapely.simplify(parts, 0)
    waiting = np.arange(0 if exact else len(parts))
    for tolerance in _TOLERANCES:
        shorter = shapely.simplify(parts[waiting], tolerance)
        between = shapely.area(shapely.symmetric_difference(parts[waiting], shorter))
        good = between <= (1 - _LEAST_COVER) * shapely.area(parts[waiting])
        best[waiting[good]] = shorter[good]
        waiting = waiting[~good]
    return [_with_holes(shapely.geometry.polygon.orient(part)) for part in best]


def one_outline(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """Join the polygons of a mask, for formats with one for each object: lines of no width lead from part to part.

    Args:
        polygons: What `mask_polygons` returned.

    Returns:
        (M, 2) float64 x and y in pixels, not closed; (0, 2) without polygons.
    """
    rings = sorted(polygons, key=lambda ring: float(ring[:, 0].min()))
    return _joined(rings[0], rings[1:]) if rings else np.zeros((0, 2))


def mask_boxes(masks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the bounds of masks, from the first edge of their first pixels to the far edge of their last ones.

    Args:
        masks: (N, height, width) bool.
        boxes: (N, 4) xyxy that empty masks keep.

    Returns:
        (N, 4) float32 xyxy in pixels.
    """
    tight = np.array(boxes, dtype=np.float32)
    for place, mask in enumerate(masks):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if len(columns):
            tight[place] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return tight


def _region(shapely: Any, mask: np.ndarray) -> Any:
    """Return a mask as a region of the plane: the union of its rows' runs."""
    edges = np.diff(np.pad(np.asarray(mask, dtype=np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    return shapely.union_all(shapely.box(starts, rows, ends, rows + 1))


def _with_holes(polygon: Any) -> np.ndarray:
    """Return a polygon of shapely as one ring."""
    outer, *holes = (np.asarray(ring.coords)[:-1] for ring in (polygon.exterior, *polygon.interiors))
    return _joined(outer, sorted(holes, key=lambda hole: float(hole[:, 0].min())))


def _joined(ring: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Join rings, from left to right, by lines of no width from each one's leftmost corner to the nearest one."""
    for other in others:
        entry = int(other[:, 0].argmin())
        exit_ = int(((ring - other[entry]) ** 2).sum(1).argmin())
        ring = np.concatenate([ring[: exit_ + 1], other[entry:], other[: entry + 1], ring[exit_:]])
    return ring
