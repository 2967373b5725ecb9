"""supervision.Detections: boxes, scores, class names, masks and track ids for its annotators, trackers and zones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .exchange_values import kept_library, say_left_out, values_of, whole_numbers

# The key under which supervision's annotators and filters look for names.
_CLASS_NAME = "class_name"


def supervision_detections(found: Any) -> Any:
    """Return `Detections` as supervision's class of the same name; see `Detections.to_supervision`."""
    supervision = kept_library("supervision", "supervision.Detections needs")
    say_left_out(found, "supervision.Detections", "spans")
    return supervision.Detections(
        xyxy=found.boxes.copy(),
        confidence=found.scores.copy(),
        class_id=found.labels.copy(),
        mask=None if found.masks is None else found.masks.copy(),
        tracker_id=None if found.track_ids is None else found.track_ids.copy(),
        data={_CLASS_NAME: np.array(found.text_labels, dtype=str)},
    )


def read_supervision(
    found: Any, size: tuple[int, int] | None, names: Sequence[str] | None, source: str | None
) -> dict[str, Any]:
    """Return the arguments of `Detections` for supervision's class of the same name.

    Raises:
        ValueError: There is neither a size nor a mask, or boxes have neither class names nor names for their classes.
    """
    masks = None if found.mask is None else np.asarray(found.mask, dtype=bool)
    if size is None and masks is not None:
        size = (masks.shape[2], masks.shape[1])
    texts = found.data.get(_CLASS_NAME) if found.data else None
    if texts is None:
        numbers = [] if found.class_id is None else found.class_id.tolist()
        if len(numbers) != len(found) or (
            numbers and (names is None or not 0 <= min(numbers) <= max(numbers) < len(names))
        ):
            raise ValueError("The boxes have no class names; give names, one for each class_id.")
        texts = [names[number] for number in numbers] if names is not None else []
    ids = None if found.tracker_id is None else found.tracker_id.tolist()
    tracks = whole_numbers(ids) if ids else ids
    return values_of(found.xyxy, texts, size, names, found.confidence, source=source, masks=masks, track_ids=tracks)
