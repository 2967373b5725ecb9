"""Thresholds per label, fitted on annotated pictures for the best F1 or for a wanted precision."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..model.box_ops import box_iou
from ..model.text_prompt import name_key
from .detection_options import THRESHOLD
from .detections import Detections
from .detector import DetectionError, Detector
from .vocabulary import Labels, Vocabulary

logger = logging.getLogger(__name__)

_IOU = 0.5
# Detections below this are not looked at: no threshold will be as low.
_LOWEST = 0.02
# Keeps no detection: the threshold of a label whose detections are all wrong or never reach the wanted precision.
_NEVER = 1.0
# Number of boxes that a label's threshold needs to count as much as the single threshold.
_PRIOR_BOXES = 40


@dataclass(frozen=True)
class LabelFigures:
    """What the threshold of one label does on annotated pictures.

    Attributes:
        threshold: Score that the label's detections must exceed.
        precision: Share of its detections that are right, 0..1; 1 if there are none.
        recall: Share of its boxes that are found, 0..1.
        f1: Harmonic mean of the two.
        num_boxes: Number of its boxes.
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    num_boxes: int


@dataclass(frozen=True)
class LabelFit(LabelFigures):
    """The fitted threshold of one label, and what it does on the pictures of the fit.

    Attributes:
        is_fitted: Whether the label had enough boxes for a threshold of its own.
    """

    is_fitted: bool


@dataclass(frozen=True)
class ThresholdFit:
    """Fitted thresholds.

    Attributes:
        vocabulary: The vocabulary with the thresholds, ready to be used and saved.
        single: The best single threshold for all labels.
        f1_single: Mean F1 of the labels that have boxes, with the single threshold.
        f1: Mean F1 of these labels, each with its own threshold.
        labels: The fit of each label that has boxes.
        failed: Inputs that could not be used, with the reason.
    """

    vocabulary: Vocabulary
    single: float
    f1_single: float
    f1: float
    labels: Mapping[str, LabelFit]
    failed: tuple[tuple[Any, str], ...] = ()


@dataclass(frozen=True)
class _Seen:
    """What a detector found above the lowest threshold, and what there is, picture by picture.

    Attributes:
        found: Detections of each picture, several labels for a box.
        truths: The boxes of each picture.
        counts: (N,) number of boxes of each label, crowds not counted.
        failed: Inputs that could not be used, with the reason.
    """

    found: list[Detections]
    truths: list[_Truth]
    counts: np.ndarray
    failed: list[tuple[Any, str]]

    def judged(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the scores of each label's detections, best first, and which of them are right."""
        return _judged([_strongest(each) for each in self.found], self.truths, len(self.counts))

    def figures(self, thresholds: np.ndarray) -> list[tuple[float, float, float]]:
        """Return precision, recall and F1 of each label under the rule that the detector follows."""
        _, right = _judged([_strongest(each, thresholds) for each in self.found], self.truths, len(self.counts))
        figures = []
        for hits, count in zip(right, self.counts, strict=True):
            hit, kept = int(hits.sum()), len(hits)
            figures.append((hit / kept if kept else 1.0, hit / max(1, int(count)), 2 * hit / max(1, kept + int(count))))
        return figures


@dataclass(frozen=True)
class _Truth:
    """The annotations of one picture.

    Attributes:
        boxes: (M, 4) xyxy in pixels of the boxes whose label is in the vocabulary.
        labels: (M,) index of each box's label.
        crowd: (M,) whether the box holds many objects.
        unknown: Indices of labels of which the picture tells neither presence nor absence.
    """

    boxes: torch.Tensor
    labels: np.ndarray
    crowd: np.ndarray
    unknown: frozenset[int]


def fit_thresholds(
    detector: Detector,
    data: str | Path | Iterable[Mapping[str, Any]],
    labels: Labels | Vocabulary | None = None,
    *,
    precision: float | None = None,
    min_boxes: int = 5,
    batch_size: int = 1,
) -> ThresholdFit:
    """Choose a threshold for each label on annotated pictures.

    A detection is right if its IoU with a box of its label is at least 0.5 and no better detection has taken the box.
    A picture that lists the labels that are absent from it counts for those and for the labels of its boxes, for no
    others. Crowd boxes need not be found, and detections in them are ignored.

    Args:
        detector: The detector.
        data: A data set on disk, as for `open_dataset`, or rows with "image", "boxes" ((N, 4) xyxy in pixels) and
            "names" (N); optionally "crowd" (N) and "neg_names".
        labels: What to look for; None for the names of the data set.
        precision: Wanted precision of each label, 0..1: the lowest threshold that reaches it is chosen. None chooses
            the threshold with the best F1.
        min_boxes: Labels with fewer boxes get the best single threshold, because so few boxes show too little. For the
            best F1, labels with few boxes get one between their own best and the single threshold.
        batch_size: Number of pictures in one forward pass.

    Returns:
        The vocabulary with its thresholds, and figures. Figures on the pictures of the fit are optimistic; see
        `judge_thresholds` for other pictures.

    Raises:
        ValueError: No picture can be used, none has a box of any label, or a number is out of its range.
    """
    if precision is not None and not 0 < precision <= 1:
        raise ValueError(f"precision is {precision}; give a number above 0, at most 1.")
    rows, names = _rows(data)
    # Encoded, so that the text features are saved with the thresholds.
    vocabulary = detector.vocabulary(names if labels is None else labels)
    seen = _look(detector, rows, vocabulary, batch_size)
    counts, failed = seen.counts, seen.failed
    if not counts.any():
        why = f" ({len(failed)} pictures cannot be used, the first because {failed[0][1]})" if failed else ""
        raise ValueError(f"No picture has a box of {', '.join(vocabulary.labels[:5])}; check the names{why}.")
    count = len(vocabulary)
    scores, right = seen.judged()
    single = _best_single(scores, right, counts)
    fitted = counts >= min_boxes
    chosen = np.full(count, single)
    for label in np.flatnonzero(fitted):
        own = _choose(scores[label], right[label], int(counts[label]), precision)
        chosen[label] = _toward(own, single, int(counts[label])) if precision is None else own
    single_figures, figures = seen.figures(np.full(count, single)), seen.figures(chosen)
    report = {
        name: LabelFit(float(chosen[label]), *figures[label], int(counts[label]), bool(fitted[label]))
        for label, name in enumerate(vocabulary.labels)
        if counts[label]
    }
    f1_single, f1 = (float(np.mean([each[i][2] for i in np.flatnonzero(counts)])) for each in (single_figures, figures))
    thresholds = {name: round(float(chosen[label]), 4) for label, name in enumerate(vocabulary.labels)}
    return ThresholdFit(vocabulary.with_thresholds(thresholds), single, f1_single, f1, report, tuple(failed))


def judge_thresholds(
    detector: Detector,
    data: str | Path | Iterable[Mapping[str, Any]],
    vocabulary: Vocabulary,
    *,
    threshold: float = THRESHOLD,
    batch_size: int = 1,
) -> dict[str, LabelFigures]:
    """Tell what the thresholds of a vocabulary do on annotated pictures, best on others than those of the fit.

    Args:
        detector: The detector.
        data: Annotated pictures, as for `fit_thresholds`.
        vocabulary: The labels with their thresholds.
        threshold: Threshold of labels without one of their own, 0..1.
        batch_size: Number of pictures in one forward pass.

    Returns:
        The figures of each label that has boxes. Pictures that cannot be read are left out, which a log line says.

    Raises:
        ValueError: The threshold is out of its range.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; give a number within 0..1.")
    rows, _ = _rows(data)
    limits = vocabulary.thresholds(threshold).numpy()
    seen = _look(detector, rows, vocabulary, batch_size)
    if seen.failed:
        logger.warning("%d pictures are left out, the first because %s", len(seen.failed), seen.failed[0][1])
    return {
        name: LabelFigures(float(limits[label]), *figures, int(seen.counts[label]))
        for label, (name, figures) in enumerate(zip(vocabulary.labels, seen.figures(limits), strict=True))
        if seen.counts[label]
    }


def _rows(data: Any) -> tuple[Iterable[Mapping[str, Any]], list[str]]:
    """Return the rows and the names of a data set."""
    if isinstance(data, (str, Path)):
        from ..data.formats import open_dataset

        rows, names = open_dataset(data)
        if names is None:
            raise ValueError(f"{data} has captions instead of names; thresholds are fitted to names.")
        return rows, names
    rows = list(data)
    return rows, sorted({name for row in rows for name in row["names"]})


def _look(detector: Detector, rows: Iterable[Mapping[str, Any]], vocabulary: Vocabulary, batch_size: int) -> _Seen:
    """Run the detector over the rows; pictures that cannot be used are listed."""
    vocabulary = detector.vocabulary(vocabulary.with_thresholds(dict.fromkeys(vocabulary.labels, _LOWEST)))
    number = {name_key(name): index for index, name in enumerate(vocabulary.labels)}
    waiting: list[_Truth] = []

    def pictures() -> Iterable[Any]:
        for row in rows:
            waiting.append(_truth(row, number))
            yield row["image"]

    found, truths, failed = [], [], []
    stream = detector.stream(pictures(), vocabulary, batch_size=batch_size, multi_label=True)
    for place, (source, result) in enumerate(stream):
        if isinstance(result, DetectionError):
            failed.append((source, str(result)))
        else:
            found.append(result)
            truths.append(waiting[place])
    counts = np.zeros(len(vocabulary), dtype=np.int64)
    for truth in truths:
        np.add.at(counts, truth.labels[~truth.crowd], 1)
    return _Seen(found, truths, counts, failed)


def _truth(row: Mapping[str, Any], number: Mapping[str, int]) -> _Truth:
    keys = [name_key(name) for name in row["names"]]
    known = np.array([key in number for key in keys], dtype=bool)
    absent = row.get("neg_names")
    told = set(keys) if absent is None else {*keys, *map(name_key, absent)}
    unknown = frozenset() if absent is None else frozenset(index for key, index in number.items() if key not in told)
    boxes = torch.as_tensor(np.asarray(row["boxes"], dtype=np.float32).reshape(-1, 4))
    crowd = np.zeros(len(keys), dtype=bool) if row.get("crowd") is None else np.asarray(row["crowd"], dtype=bool)
    labels = np.array([number[key] for key in keys if key in number], dtype=np.int64)
    return _Truth(boxes[torch.from_numpy(known)], labels, crowd[known], unknown)


def _strongest(found: Detections, thresholds: np.ndarray | None = None) -> Detections:
    """Keep the best label of each box among those that pass, as the detector does without `multi_label`."""
    if thresholds is not None:
        found = found[found.scores > thresholds[found.labels]]
    # Detections are sorted, so the first of equal boxes has the best label.
    _, first = np.unique(found.boxes, axis=0, return_index=True)
    return found[np.sort(first)]


def _judged(
    found: list[Detections], truths: list[_Truth], num_labels: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the scores of each label's detections, best first, and which of them are right."""
    scores: list[list[float]] = [[] for _ in range(num_labels)]
    right: list[list[bool]] = [[] for _ in range(num_labels)]
    for detections, truth in zip(found, truths, strict=True):
        overlaps = box_iou(torch.from_numpy(detections.boxes), truth.boxes).numpy()
        taken = np.zeros(len(truth.labels), dtype=bool)
        for place in np.argsort(-detections.scores, kind="stable"):
            label = int(detections.labels[place])
            if label in truth.unknown:
                continue
            same = (truth.labels == label) & (overlaps[place] >= _IOU)
            free = same & ~taken & ~truth.crowd
            if not free.any() and (same & truth.crowd).any():
                continue
            scores[label].append(float(detections.scores[place]))
            right[label].append(bool(free.any()))
            if free.any():
                taken[np.argmax(np.where(free, overlaps[place], -1.0))] = True
    orders = [np.argsort(-np.array(each), kind="stable") for each in scores]
    return (
        [np.array(each)[order] for each, order in zip(scores, orders, strict=True)],
        [np.array(each, dtype=bool)[order] for each, order in zip(right, orders, strict=True)],
    )


def _choose(scores: np.ndarray, right: np.ndarray, num_boxes: int, precision: float | None) -> float:
    """Return the threshold of one label, halfway between the last detection it keeps and the first it drops."""
    if not len(scores):
        return _NEVER
    hits = right.cumsum()
    kept = np.arange(1, len(scores) + 1)
    # A threshold cannot separate equal scores.
    possible = np.append(scores[1:] < scores[:-1], True)
    if precision is None:
        value = np.where(possible, 2 * hits / (kept + num_boxes), -1.0)
        last = int(value.argmax())
        if value[last] == 0:
            return _NEVER
    else:
        reached = np.flatnonzero(possible & (hits / kept >= precision))
        if not len(reached):
            return _NEVER
        last = int(reached[-1])
    lower = scores[last + 1] if last + 1 < len(scores) else min(_LOWEST, scores[last])
    return float((scores[last] + lower) / 2)


def _toward(own: float, single: float, num_boxes: int) -> float:
    """Move a label's threshold toward the single one, the more the fewer boxes it was fitted on."""
    weight = num_boxes / (num_boxes + _PRIOR_BOXES)
    return weight * own + (1 - weight) * single


def _best_single(scores: list[np.ndarray], right: list[np.ndarray], counts: np.ndarray) -> float:
    """Return the single threshold with the best mean F1 over the labels that have boxes."""
    best = (-1.0, 0.0)
    for threshold in np.linspace(_LOWEST, 0.98, 97):
        f1 = [
            2 * hit[score > threshold].sum() / ((score > threshold).sum() + count)
            for score, hit, count in zip(scores, right, counts, strict=True)
            if count
        ]
        best = max(best, (float(np.mean(f1)), float(threshold)))
    return round(best[1], 4)
