"""Tiled inference: pictures larger than the model sees, as overlapping tiles beside the whole picture.

supervision's InferenceSlicer and SAHI run tiles, too, but one by one and without the whole picture, and suppress boxes
by overlap alone, which keeps both halves of an object that no tile shows whole. Here halves are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ..model.option_flags import checked_count
from ..model.selection_options import SelectionOptions
from .detections import Detections

Area = tuple[int, int, int, int]

OVERLAP = 0.25
"""Part of a tile's side that it shares with its neighbour, by default."""

_NEAR = 3.0
# Parts from two tiles are of one object if their IoU where the tiles overlap is above this.
_SAME_PART = 0.5
# A box shows an object that a better box shows if they overlap more than this: IoU, or the share of a cut box. Views of
# several scales differ more than neighbouring queries do: on mosaics of photographs, 0.5 leaves 2 to 4 % of the objects
# doubled, and 0.4 less than 1 %.
_SAME_OBJECT = 0.4


def tile_areas(size: tuple[int, int], tile: int, overlap: float = OVERLAP) -> list[Area]:
    """Cover a picture with tiles of one size.

    Args:
        size: (width, height) of the picture in pixels.
        tile: Side of a tile in pixels.
        overlap: Smallest part of a tile's side that neighbours share, in [0, 1).

    Returns:
        (left, top, right, bottom) of each tile in pixels, row by row; the whole picture if it is no larger than a tile.

    Raises:
        ValueError: tile is no whole number of at least 32 pixels, or overlap is outside of its range.
    """
    tile = checked_count(tile, "tile", 32, "pixels")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; give a part of the tile's side, at least 0 and less than 1.")
    columns, rows = (_starts(side, tile, overlap) for side in size)
    width, height = (min(side, tile) for side in size)
    return [(left, top, left + width, top + height) for top in rows for left in columns]


def with_tiles(
    picture: Image.Image,
    whole: Detections,
    detect: Callable[[list[Image.Image]], list[Detections]],
    select: SelectionOptions,
    *,
    tiles: int,
    overlap: float,
    batch_size: int,
) -> Detections:
    """Look at a picture in tiles beside the whole.

    Args:
        picture: The picture, upright and RGB.
        whole: What was found in the whole picture.
        detect: Returns the detections of tiles, in their own pixels.
        select: Rule by which scores became detections.
        tiles: Side of a tile in pixels.
        overlap: Smallest part of a tile's side that neighbours share, in [0, 1).
        batch_size: Largest number of tiles for one call of `detect`.

    Returns:
        The detections of all of them, each object once and best first; the whole's if the picture is one tile.
    """
    areas = tile_areas(picture.size, tiles, overlap)
    if len(areas) == 1:
        return whole
    parts: list[Detections] = []
    for start in range(0, len(areas), batch_size):
        # Only the tiles of one forward pass are in memory.
        parts += detect([picture.crop(area) for area in areas[start : start + batch_size]])
    merged = merge_tiles(list(zip(areas, parts, strict=True)), whole, select.class_agnostic_nms)
    return merged if select.top_k is None else merged[: select.top_k]


def merge_tiles(
    parts: Sequence[tuple[Area, Detections]], whole: Detections, class_agnostic: bool = False
) -> Detections:
    """Merge the detections of tiles with those of the whole picture, each object once.

    A box that ends at an edge inside the picture shows a part of an object. Parts of one object from tiles that
    overlap are joined; a part that lies in a better box is dropped.

    Args:
        parts: Each tile's area in the picture, and its detections in the tile's own pixels.
        whole: Detections of the whole picture.
        class_agnostic: Whether boxes of different labels are of one object, too.

    Returns:
        Detections of the picture, best first. The presence of a label is its highest in any tile or the whole, and an
        object that was joined has the token scores of its best part.
    """
    presence = dict(whole.presence or {})
    boxes, areas, cut = (
        [whole.boxes],
        [_repeat((0, 0, *whole.size), len(whole))],
        [np.zeros((len(whole), 4), dtype=bool)],
    )
    for tile, found in parts:
        for name, highest in (found.presence or {}).items():
            presence[name] = max(highest, presence.get(name, 0.0))
        boxes.append(found.boxes + np.array([tile[0], tile[1]] * 2, dtype=np.float32))
        areas.append(_repeat(tile, len(found)))
        inner = np.array([tile[0] > 0, tile[1] > 0, tile[2] < whole.size[0], tile[3] < whole.size[1]])
        cut.append((np.abs(boxes[-1] - areas[-1]) < _NEAR) & inner)
    every = [whole, *(found for _, found in parts)]
    labels = np.concatenate([found.labels for found in every])
    box, score, ends = _join_parts(
        np.concatenate(boxes),
        np.concatenate([found.scores for found in every]),
        labels,
        np.concatenate(areas),
        np.concatenate(cut),
    )
    kept = _suppress(box, score, labels, np.asarray(ends.any(1)), class_agnostic)
    kept = kept[np.argsort(-score[kept], kind="stable")]
    words: dict[str, Any] = {}
    for name in ("spans", "token_scores"):
        if getattr(whole, name) is not None:
            values = [value for found in every for value in getattr(found, name)]
            words[name] = tuple(values[place] for place in kept)
    return replace(whole, boxes=box[kept], scores=score[kept], labels=labels[kept], presence=presence, **words)


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles begin along one side, evenly spaced."""
    if side <= tile:
        return [0]
    count = 1 + int(np.ceil((side - tile) / max(1.0, tile * (1 - overlap))))
    return [round(place) for place in np.linspace(0, side - tile, count)]


def _repeat(area: Area, count: int) -> np.ndarray:
    return np.tile(np.array(area, dtype=np.float32), (count, 1))


def _join_parts(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, areas: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join the parts of objects that tiles cut: boxes of one label that agree where their tiles overlap."""
    boxes, scores, ends = boxes.copy(), scores.copy(), ends.copy()
    alive = np.ones(len(boxes), dtype=bool)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if ends[i].any()]
    for place, first in enumerate(order):
        if not alive[first]:
            continue
        for second in order[place + 1 :]:
            if not alive[second] or labels[first] != labels[second] or (areas[first] == areas[second]).all():
                continue
            shared = _shared(areas[first], areas[second])
            # Parts of one object look alike where their tiles overlap.
            if shared is None or not _agree(_clip(boxes[first], shared), _clip(boxes[second], shared)):
                continue
            inside = _covers(boxes[first], boxes[second]) or _covers(boxes[second], boxes[first])
            if inside:
                continue
            united = _union(boxes[first], boxes[second])
            # A side stays cut only if the united box ends where a cut one ended.
            ends[first] = (ends[first] & (united == boxes[first])) | (ends[second] & (united == boxes[second]))
            boxes[first], areas[first] = united, _union(areas[first], areas[second])
            alive[second] = False
    scores[~alive] = -1.0
    return boxes, scores, ends


def _suppress(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, is_cut: np.ndarray, class_agnostic: bool
) -> np.ndarray:
    """Return the boxes to keep. Whole boxes come before cut ones, and better ones before others."""
    order = sorted(np.flatnonzero(scores >= 0).tolist(), key=lambda i: (is_cut[i], -scores[i]))
    kept: list[int] = []
    for i in order:
        others = np.array([j for j in kept if class_agnostic or labels[j] == labels[i]], dtype=np.int64)
        if len(others):
            common = _common(boxes[i], boxes[others])
            own = _size(boxes[i][None])[0]
            union = own + _size(boxes[others]) - common
            ratio = common / np.maximum(own, 1e-6) if is_cut[i] else common / np.maximum(union, 1e-6)
            if (ratio > _SAME_OBJECT).any():
                continue
        kept.append(i)
    return np.array(kept, dtype=np.int64)


def _common(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    area: np.ndarray = sides.clip(min=0).prod(1)
    return area


def _size(boxes: np.ndarray) -> np.ndarray:
    area: np.ndarray = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)
    return area


def _union(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([np.minimum(one[:2], other[:2]), np.maximum(one[2:], other[2:])])


def _shared(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """Return the area that two tiles share, or None."""
    area = np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])])
    return area if (area[2:] > area[:2]).all() else None


def _clip(box: np.ndarray, area: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(box[:2], area[:2]), np.minimum(box[2:], area[2:])])


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    common = _common(one, other[None])[0]
    union = _size(one[None])[0] + _size(other[None])[0] - common
    return bool(common > _SAME_PART * union)


def _covers(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether most of the other box lies in the first."""
    return bool(_common(one, other[None])[0] > 0.9 * _size(other[None])[0])
