"""Which label is taken for which: a confusion matrix of boxes."""

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
    """The score from which on detections have the highest F1 over all true boxes.

    Args:
        predictions: As in `evaluate_boxes`.
        references: As in `evaluate_boxes`.
        iou_threshold: Least overlap, 0..1.

    Returns:
        The score of the last detection to count, 0 where none is right.
    """
    scores, right, num_true = [], [], 0
    for prediction, reference in zip(predictions, references, strict=True):
        image = _match(prediction, reference, 0.0, iou_threshold, of_any_label=False)
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
    """Intersection over union of every pair of boxes.

    Args:
        boxes: (N, 4) xyxy.
        others: (M, 4) xyxy.
        over_first_area: Divide by the area of `boxes` instead, as COCO does for crowds.

    Returns:
        (N, M) in 0..1, 0 where both boxes are without area.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(axis=-1)
    area, other_area = ((x[:, 2:] - x[:, :2]).prod(axis=-1) for x in (boxes, others))
    whole = (
        np.broadcast_to(area[:, None], inside.shape) if over_first_area else area[:, None] + other_area[None] - inside
    )
    return np.divide(inside, whole, out=np.zeros_like(inside), where=whole > 0)


@dataclass(frozen=True)
class _Matched:
    """One image: detections, highest score first, and the true boxes they took."""

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
    of_any_label: bool = True,
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
    for allowed in (same, ~same) if of_any_label else (same,):
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
