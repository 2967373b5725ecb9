"""Which label is taken for which: a confusion matrix of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def confusion_matrix(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    num_labels: int,
    threshold: float,
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """Count true boxes by what they were taken for.

    Detections take a true box each, the highest score first: those of the right label before those of a wrong one, so
    that the diagonal counts what COCO counts as found. Crowds are no boxes to find, and excuse what lies in them.

    Args:
        predictions: As in `evaluate_boxes`.
        references: As in `evaluate_boxes`.
        num_labels: N, how many labels there are.
        threshold: Lowest score of a detection that counts, 0..1.
        iou_threshold: Least overlap, 0..1.

    Returns:
        (N + 1, N + 1) int64: rows are what is true, columns what is predicted, the last of both is the background, so
        the last column counts what was missed and the last row what was made up.
    """
    matrix = np.zeros((num_labels + 1, num_labels + 1), dtype=np.int64)
    for prediction, reference in zip(predictions, references, strict=True):
        scores = np.asarray(prediction["scores"], dtype=np.float64)
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= threshold]
        boxes = np.asarray(prediction["boxes"], dtype=np.float64).reshape(-1, 4)[order]
        labels = np.asarray(prediction["labels"], dtype=np.int64)[order]
        true_boxes = np.asarray(reference["boxes"], dtype=np.float64).reshape(-1, 4)
        true_labels = np.asarray(reference["labels"], dtype=np.int64)
        crowd = np.asarray(reference.get("crowd", np.zeros(len(true_boxes))), dtype=bool)
        _count(matrix, boxes, labels, true_boxes, true_labels, crowd, iou_threshold)
    return matrix


def overlaps(boxes: np.ndarray, others: np.ndarray, of_first: bool = False) -> np.ndarray:
    """Intersection over union of every pair of boxes.

    Args:
        boxes: (N, 4) xyxy.
        others: (M, 4) xyxy.
        of_first: Divide by the area of `boxes` instead, as COCO does for crowds.

    Returns:
        (N, M) in 0..1, 0 where both boxes are without area.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(axis=-1)
    area, other_area = ((x[:, 2:] - x[:, :2]).prod(axis=-1) for x in (boxes, others))
    whole = np.broadcast_to(area[:, None], inside.shape) if of_first else area[:, None] + other_area[None] - inside
    return np.divide(inside, whole, out=np.zeros_like(inside), where=whole > 0)


def _count(
    matrix: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    true_boxes: np.ndarray,
    true_labels: np.ndarray,
    crowd: np.ndarray,
    iou_threshold: float,
) -> None:
    """Add one image; detections come with the highest score first."""
    background = len(matrix) - 1
    iou = overlaps(boxes, true_boxes)
    same = labels[:, None] == true_labels[None]
    free = ~crowd
    taken = np.full(len(boxes), -1)
    for allowed in (same, ~same):
        for place in np.flatnonzero(taken < 0):
            candidates = np.where(allowed[place] & free, iou[place], -1.0)
            if len(candidates) and candidates.max() >= iou_threshold:
                taken[place] = candidates.argmax()
                free[taken[place]] = False
    excused = (same & crowd & (overlaps(boxes, true_boxes, of_first=True) >= iou_threshold)).any(axis=1)
    for place, true in enumerate(taken):
        if true >= 0:
            matrix[true_labels[true], labels[place]] += 1
        elif not excused[place]:
            matrix[background, labels[place]] += 1
    np.add.at(matrix, (true_labels[free], background), 1)
