"""Boxes of tracked objects in frames that the model did not look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..detection.detections import Detections

Moment = dict[str, Any]
"""What was tracked at one time: "seconds", arrays "ids" (N,), "boxes" (N, 4) xyxy and "scores" (N,), and the texts
"labels"; arrays and texts alone, so that it can be saved."""


def moment(found: Detections, seconds: float) -> Moment:
    """Return what frames between detections need of tracked detections."""
    assert found.track_ids is not None
    return {
        "seconds": seconds,
        "ids": found.track_ids,
        "boxes": found.boxes,
        "scores": found.scores,
        "labels": found.text_labels,
    }


def between(
    earlier: Moment | None,
    later: Moment | None,
    seconds: float,
    names: tuple[str, ...],
    size: tuple[int, int],
    colors: Mapping[str, str],
    before: Moment | None = None,
) -> Detections:
    """Fill a frame between two detections, or after the last.

    Between them, the boxes of objects that both have move evenly from one to the other. After the last, they go on as
    from the one before it.

    Args:
        earlier: The detection before the frame; None leaves the frame empty.
        later: The detection after the frame; None if there is none yet.
        seconds: Time of the frame.
        names: All labels; objects of other labels are left out.
        size: (width, height) of the frame in pixels.
        colors: Colours of labels.
        before: The detection before `earlier`; only for frames after the last.

    Returns:
        The boxes with their track ids.
    """
    nothing = Detections.none(names, size, track_ids=np.zeros(0, dtype=np.int64), colors=colors)
    if earlier is None:
        return nothing
    other = later if later is not None else before
    places = {label: place for place, label in enumerate(names)}
    rows = [row for row, label in enumerate(earlier["labels"]) if label in places]
    partners = {} if other is None else {number: row for row, number in enumerate(other["ids"].tolist())}
    if later is not None:
        rows = [row for row in rows if int(earlier["ids"][row]) in partners]
    if not rows:
        return nothing
    boxes, scores = earlier["boxes"][rows].astype(np.float64), earlier["scores"][rows].astype(np.float64)
    if other is not None and other["seconds"] != earlier["seconds"]:
        # Also beyond 1 or below 0, where the motion between the two is continued.
        share = (seconds - earlier["seconds"]) / (other["seconds"] - earlier["seconds"])
        for place, row in enumerate(rows):
            partner = partners.get(int(earlier["ids"][row]))
            if partner is None:
                continue
            boxes[place] += share * (other["boxes"][partner] - boxes[place])
            if later is not None:
                scores[place] += share * (other["scores"][partner] - scores[place])
    # What moves on may shrink to nothing or leave the picture.
    limits = np.array([*size, *size])
    boxes = np.clip(boxes, 0, limits)
    kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    return Detections(
        boxes[kept],
        scores[kept],
        np.array([places[earlier["labels"][rows[place]]] for place in kept], dtype=np.int64),
        names,
        size,
        track_ids=earlier["ids"][rows][kept],
        colors=colors,
    )
