"""A confusion matrix of boxes: which label is mistaken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def confusion_matrix(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    num_labels: int,
    threshold: float,
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """Count true boxes by the label they were detected as.

    Each detection is matched with at most one true box, in order of falling score. Matches with the right label come
    first and those with a wrong one second, so that the diagonal agrees with COCO's matching. Crowd boxes need not be
    found; detections of their label inside them are ignored.

    Args:
        predictions: Predictions by image, as for `evaluate_boxes`.
        references: Ground truth by image, as for `evaluate_boxes`.
        num_labels: Number of labels, N.
        threshold: Smallest score of a detection to count, 0..1.
        iou_threshold: Smallest IoU of a match, 0..1.

    Returns:
        (N + 1, N + 1) int64. Rows are true labels and columns predicted ones. Index N is the background: the last
        column counts missed boxes and the last row false detections.
    """
    matrix = np.zeros((num_labels + 1, num_labels + 1), dtype=np.int64)
    background = num_labels
    for prediction, reference in zip(predictions, references, strict=True):
        image = _match(prediction, reference, threshold, iou_threshold)
        for place, true in enumerate(image.taken):
            if true >= 0:
                matrix[image.true_labels[true], image.labels[place]] += 1
            elif not image.excused[place]:
                matrix[background, image.labels[place]] += 1
        np.add.at(matrix, (image.true_labels[image.free], background), 1)
    return matrix


def best_threshold(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], iou_threshold: float = 0.5
) -> float:
    """Find the score threshold with the highest F1 over all true boxes.

    Args:
        predictions: Predictions by image, as for `evaluate_boxes`.
        references: Ground truth by image, as for `evaluate_boxes`.
        iou_threshold: Smallest IoU of a match, 0..1.

    Returns:
        The smallest score that should count; 0 if no detection is right.
    """
    scores, right, num_true = [], [], 0
    for prediction, reference in zip(predictions, references, strict=True):
        image = _match(prediction, reference, 0.0, iou_threshold, match_wrong_labels=False)
        counts = ~image.excused | (image.taken >= 0)
        scores.append(image.scores[counts])
        right.append(image.taken[counts] >= 0)
        num_true += int((~image.crowd).sum())
    score, hit = np.concatenate([*scores, []]), np.concatenate([*right, []])
    if not hit.any():
        return 0.0
    order = np.argsort(-score, kind="stable")
    f1 = 2 * np.cumsum(hit[order]) / (np.arange(1, len(order) + 1) + num_true)
    return float(score[order][f1.argmax()])


def pairwise_iou(boxes: np.ndarray, others: np.ndarray, over_first_area: bool = False) -> np.ndarray:
    """Compute the intersection over union of every pair of boxes.

    Args:
        boxes: (N, 4) xyxy.
        others: (M, 4) xyxy.
        over_first_area: Whether to divide by the area of `boxes` instead of the union, as COCO does for crowds.

    Returns:
        (N, M) in 0..1; 0 for pairs without area.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(axis=-1)
    area, other_area = ((x[:, 2:] - x[:, :2]).prod(axis=-1) for x in (boxes, others))
    if over_first_area:
        whole = np.broadcast_to(area[:, None], inside.shape)
    else:
        whole = area[:, None] + other_area[None] - inside
    return np.divide(inside, whole, out=np.zeros_like(inside), where=whole > 0)


@dataclass(frozen=True)
class _Matched:
    """Detections of one image in order of falling score, and the true boxes they were matched with.

    Attributes:
        scores, labels: (N,) score and label of each detection.
        taken: (N,) index of the true box each detection was matched with, or -1.
        excused: (N,) whether a detection lies in a crowd of its label.
        true_labels, crowd: (M,) label of each true box, and whether it is a crowd.
        free: (M,) whether a true box was missed.
    """

    scores: np.ndarray
    labels: np.ndarray
    taken: np.ndarray
    excused: np.ndarray
    true_labels: np.ndarray
    crowd: np.ndarray
    free: np.ndarray


def _match(
    prediction: Mapping[str, Any],
    reference: Mapping[str, Any],
    threshold: float,
    iou_threshold: float,
    match_wrong_labels: bool = True,
) -> _Matched:
    scores = np.asarray(prediction["scores"], dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= threshold]
    boxes = np.asarray(prediction["boxes"], dtype=np.float64).reshape(-1, 4)[order]
    labels = np.asarray(prediction["labels"], dtype=np.int64)[order]
    true_boxes = np.asarray(reference["boxes"], dtype=np.float64).reshape(-1, 4)
    true_labels = np.asarray(reference["labels"], dtype=np.int64)
    crowd = np.asarray(reference.get("crowd", np.zeros(len(true_boxes))), dtype=bool)
    iou, same = pairwise_iou(boxes, true_boxes), labels[:, None] == true_labels[None]
    free, taken = ~crowd, np.full(len(boxes), -1)
    for allowed in (same, ~same) if match_wrong_labels else (same,):
        possible = allowed & (iou >= iou_threshold)
        for place in np.flatnonzero((taken < 0) & possible.any(axis=1)):
            candidates = np.flatnonzero(possible[place] & free)
            if len(candidates):
                best = candidates[iou[place, candidates].argmax()]
                taken[place], free[best] = best, False
    in_crowd = pairwise_iou(boxes, true_boxes, over_first_area=True) >= iou_threshold
    return _Matched(
        scores=scores[order],
        labels=labels,
        taken=taken,
        excused=(same & crowd & in_crowd).any(axis=1),
        true_labels=true_labels,
        crowd=crowd,
        free=free & ~crowd,
    )
