"""LabelMe: a JSON file for each picture, with polygons for masks and rectangles for boxes without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.labelme_folder import labelme_marks
from ..data.picture_sets import Mark
from ..model.printable import printable
from .coco_exchange import decode_masks
from .exchange_values import decimal, encodable, entry, logger, picture_name, say_left_out, values_of

# Version of the file format, which LabelMe compares with its own.
_VERSION = "5.5.0"


def labelme_document(found: Any, file_name: str | None) -> dict[str, Any]:
    """Return `Detections` as the content of a LabelMe file; see `Detections.to_labelme`."""
    say_left_out(found, "LabelMe", "track_ids", "spans")
    shapes = []
    rows = zip(decimal(found.boxes).tolist(), found.text_labels, decimal(found.scores).tolist(), strict=True)
    outlines = None if found.masks is None else found.polygons()
    for place, (box, label, score) in enumerate(rows):
        polygons = [] if outlines is None else outlines[place]
        kind = "polygon" if polygons else "rectangle"
        # Shapes of one group are one object.
        group = place if len(polygons) > 1 else None
        for points in [polygon.tolist() for polygon in polygons] or [[box[:2], box[2:]]]:
            shape = {"label": label, "points": points, "group_id": group, "description": "", "shape_type": kind}
            shapes.append({**shape, "flags": {}, "mask": None, "score": score})
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": encodable(picture_name(found, file_name)),
        "imageData": None,
        "imageHeight": found.size[1],
        "imageWidth": found.size[0],
    }


def read_labelme(
    content: Mapping[str, Any],
    names: Sequence[str] | None,
    size: tuple[int, int] | None,
    source: str | None,
) -> dict[str, Any]:
    """Return the arguments of `Detections` for the content of a LabelMe file.

    Raises:
        ValueError: It is not such a file, or there is no size.
    """
    shapes = entry(content, "shapes", "The LabelMe file")
    if size is None and content.get("imageWidth") and content.get("imageHeight"):
        size = (int(content["imageWidth"]), int(content["imageHeight"]))
    marks = labelme_marks(content, "LabelMe", _say_fault)
    objects = [mark.polygons or [_corners(mark)] for mark in marks]
    points = [np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons]) for polygons in objects]
    boxes = [[*each.min(0), *each.max(0)] for each in points]
    masks = None
    if size is not None and any(mark.polygons is not None for mark in marks):
        masks = decode_masks(objects, size)
    # Marks name the number of their first shape.
    scores = [shapes[int(mark.where.rpartition(" ")[2]) - 1].get("score") for mark in marks]
    source = content.get("imagePath") if source is None else source
    return values_of(boxes, [mark.label for mark in marks], size, names, scores, source=source, masks=masks)


def _corners(mark: Mark) -> list[float]:
    """Return the corners of a rectangle as x1, y1, x2, y2, ..."""
    left, top, right, bottom = mark.box
    return [left, top, right, top, right, bottom, left, bottom]


def _say_fault(kind: str, where: str) -> None:
    logger.warning("A shape of a LabelMe file is left out (%s: %s).", kind, printable(where))
