"""Greedy non-maximum suppression of arrays, with the results of `gdino_hf.model.box_ops` to the last bit."""

from __future__ import annotations

import numpy as np

# Smallest area to divide by, as in box_ops.
_MIN_AREA = np.float32(1e-12)


def suppressed(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray | None, threshold: float) -> np.ndarray:
    """Return the boxes that stay.

    Args:
        boxes: (N, 4) float32 xyxy in any unit.
        scores: (N,) scores, higher is better. If two are equal, the earlier box stays.
        classes: (N,) class of each box, within which boxes suppress each other; None for all together.
        threshold: A box is dropped if its IoU with a better kept box is above this, in [0, 1].

    Returns:
        (K,) int64 indices of the boxes that stay, best first.
    """
    left = np.argsort(-scores, kind="stable")
    kept = []
    while left.size:
        best, others = left[0], left[1:]
        kept.append(best)
        overlaps = _iou(boxes[best], boxes[others]) > np.float32(threshold)
        if classes is not None:
            overlaps &= classes[others] == classes[best]
        left = others[~overlaps]
    return np.array(kept, dtype=np.int64)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    sides = (np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])).clip(min=0)
    common = sides[:, 0] * sides[:, 1]
    union = np.maximum(_area(box[None]) + _area(others) - common, _MIN_AREA)
    ratio: np.ndarray = common / union
    return ratio


def _area(boxes: np.ndarray) -> np.ndarray:
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(min=0)
    area: np.ndarray = sides[:, 0] * sides[:, 1]
    return area
