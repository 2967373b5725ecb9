"""COCO's average precision and recall of boxes (Lin et al. 2014), computed by faster-coco-eval.

This file imports nothing of the package, because `evaluate.load` copies it together with detection_map.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
SIZES = ("all", "small", "medium", "large")
SIZE_BORDERS = {"small": [0, 32**2], "medium": [32**2, 96**2], "large": [96**2, 1e5**2]}

# x2 - x1 has rounding errors in its last bits, but a side of 32 pixels must stay exactly 32, the border between small
# and medium. Rounding to this many decimals restores it; no annotation is more precise.
_SIDE_DECIMALS = 9

UNDEFINED = -1.0
"""Value of a metric without ground truth, as in COCO's own tools."""


@dataclass(frozen=True)
class BoxMap:
    """Precision and recall by threshold, label and size; -1 where there is no ground truth.

    Attributes:
        labels: (K,) labels that occur in the ground truth.
        precision: (T, R, K, A) interpolated precision over IOU_THRESHOLDS, RECALL_POINTS, `labels` and SIZES.
        recall: (T, K, A, M) maximum recall over IOU_THRESHOLDS, `labels`, SIZES and `limits`.
        limits: (M) maximum numbers of detections per image and label: 1, 10 and the highest.
    """

    labels: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    limits: tuple[int, ...]

    def summary(self) -> dict[str, float]:
        """Return COCO's twelve metrics: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100 (the limit), ARs, ARm, ARl."""
        figures = {
            "AP": _mean(self.precision[..., 0]),
            "AP50": _mean(self.precision[0, ..., 0]),
            "AP75": _mean(self.precision[5, ..., 0]),
        }
        figures |= {f"AP{SIZES[a][0]}": _mean(self.precision[..., a]) for a in (1, 2, 3)}
        figures |= {f"AR{limit}": _mean(self.recall[:, :, 0, m]) for m, limit in enumerate(self.limits)}
        return figures | {f"AR{SIZES[a][0]}": _mean(self.recall[:, :, a, -1]) for a in (1, 2, 3)}

    def per_label(self) -> dict[int, dict[str, float]]:
        """Return AP, AP50, AP75 and AR of every label that occurs in the ground truth."""
        return {
            int(label): {
                "AP": _mean(self.precision[:, :, k, 0]),
                "AP50": _mean(self.precision[0, :, k, 0]),
                "AP75": _mean(self.precision[5, :, k, 0]),
                "AR": _mean(self.recall[:, k, 0, -1]),
            }
            for k, label in enumerate(self.labels)
        }

    def mean_over(self, labels: Collection[int]) -> float:
        """Return AP over some of the labels; -1 if none of them occurs in the ground truth."""
        return _mean(self.precision[:, :, np.isin(self.labels, list(labels)), 0])

    def curves(self) -> dict[int, np.ndarray]:
        """Return the precision (R,) at IoU 0.5 over RECALL_POINTS of each label that has ground truth."""
        found = {int(label): self.precision[0, :, k, 0] for k, label in enumerate(self.labels)}
        return {label: curve for label, curve in found.items() if (curve > UNDEFINED).all()}


def evaluate_boxes(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], max_detections: int = 100
) -> BoxMap:
    """Compare predictions with the ground truth as pycocotools does.

    Args:
        predictions: One dict per image: "boxes" (N, 4) xyxy in pixels, "scores" (N,) and "labels" (N,) int.
        references: One dict per image, in the same order: "boxes" (M, 4) xyxy in pixels, "labels" (M,) int and,
            optionally, "crowd" (M,) bool (default False) and "area" (M,) in square pixels (default: the box's area).
            Ties between scores are broken by the order of images; COCO's tools order them by image id.
        max_detections: Maximum number of detections counted per image and label, at least 1.

    Returns:
        Precision and recall.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: Numbers of images, boxes, scores or labels differ, a box has its corners in the wrong order, or a
            number is not finite.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"There are predictions of {len(predictions)} images but references of {len(references)}; give one each."
        )
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}.")
    truths = [
        annotation for image, reference in enumerate(references) for annotation in truth_annotations(reference, image)
    ]
    known = {annotation["category_id"] for annotation in truths}
    detections = [
        annotation
        for image, prediction in enumerate(predictions)
        for annotation in detection_annotations(prediction, image)
        # Detections of labels without ground truth affect no metric.
        if annotation["category_id"] in known
    ]
    images = [{"id": image} for image in range(len(references))]
    return accumulate(images, [{"id": label} for label in sorted(known)], truths, detections, max_detections)


def truth_annotations(reference: Mapping[str, Any], image: int) -> list[dict[str, Any]]:
    """Return the ground truth of one image as COCO annotations.

    Args:
        reference: Ground truth of the image, as for `evaluate_boxes`.
        image: Index of the image.

    Raises:
        ValueError: The ground truth is malformed.
    """
    boxes, labels = _boxes_and_labels(reference, f"The reference of image {image}")
    sides = np.round(boxes[:, 2:] - boxes[:, :2], _SIDE_DECIMALS)
    crowd, area = reference.get("crowd"), reference.get("area")
    crowd = np.zeros(len(boxes), dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool).reshape(-1)
    area = sides.prod(axis=1) if area is None else np.asarray(area, dtype=np.float64).reshape(-1)
    if len(crowd) != len(boxes) or len(area) != len(boxes):
        raise ValueError(
            f"The reference of image {image!r:.80} has {len(boxes)} boxes, {len(crowd)} crowd flags and {len(area)} "
            "areas; give one each."
        )
    return [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": [*box[:2].tolist(), *side.tolist()],
            "area": float(size),
            "iscrowd": int(flag),
        }
        for label, box, side, size, flag in zip(labels, boxes, sides, area, crowd, strict=True)
    ]


def detection_annotations(prediction: Mapping[str, Any], image: int) -> list[dict[str, Any]]:
    """Return the predictions of one image as COCO annotations.

    Args:
        prediction: Predictions of the image, as for `evaluate_boxes`.
        image: Index of the image.

    Raises:
        ValueError: The predictions are malformed.
    """
    boxes, labels = _boxes_and_labels(prediction, f"The prediction of image {image}")
    scores = np.asarray(prediction["scores"], dtype=np.float64).reshape(-1)
    if len(scores) != len(boxes):
        raise ValueError(
            f"The prediction of image {image!r:.80} has {len(boxes)} boxes but {len(scores)} scores; give one each."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"The prediction of image {image!r:.80} has a score that is not finite; leave it out.")
    sides = np.round(boxes[:, 2:] - boxes[:, :2], _SIDE_DECIMALS)
    return [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": [*box[:2].tolist(), *side.tolist()],
            "area": float(side[0] * side[1]),
            "score": float(score),
            "iscrowd": 0,
        }
        for label, box, side, score in zip(labels, boxes, sides, scores, strict=True)
    ]


def accumulate(
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    truths: Sequence[dict[str, Any]],
    detections: Sequence[dict[str, Any]],
    max_detections: int,
    lvis: bool = False,
) -> BoxMap:
    """Match detections with the ground truth, both in COCO's format, and accumulate precision and recall.

    Args:
        images: Dicts with "id"; for LVIS also "neg_category_ids" and "not_exhaustive_category_ids".
        categories: Dicts with "id", in ascending order; for LVIS also "frequency".
        truths: Ground-truth annotations, without ids.
        detections: Detections, without ids.
        max_detections: Maximum number of detections counted per image and category.
        lvis: Whether to evaluate each image only on the categories that were annotated in it.

    Returns:
        Precision and recall.

    Raises:
        ImportError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError('Average precision needs faster-coco-eval; pip install "gdino-hf[train]".') from error
    limits = (1, 10, max_detections) if max_detections > 10 else (max_detections,)
    labels = np.array([category["id"] for category in categories], dtype=np.int64)
    if not len(labels):
        shape = (len(IOU_THRESHOLDS), len(RECALL_POINTS), 0, len(SIZES))
        return BoxMap(labels, np.empty(shape), np.empty((shape[0], 0, shape[3], len(limits))), limits)

    def index(annotations: Sequence[dict[str, Any]]) -> Any:
        collection = COCO()
        collection.dataset = {
            "images": list(images),
            "categories": list(categories),
            # Ids start at 1, because the evaluator takes a match with id 0 for no match.
            "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
        }
        collection.createIndex()
        return collection

    evaluation = COCOeval_faster(
        index(truths),
        index(detections),
        "bbox",
        ranges=SIZE_BORDERS,
        lvis_style=lvis,
        print_function=logging.getLogger(__name__).debug,
    )
    evaluation.params.iouThrs, evaluation.params.recThrs = IOU_THRESHOLDS, RECALL_POINTS
    evaluation.params.maxDets = list(limits)
    evaluation.evaluate()
    evaluation.accumulate()
    result = evaluation.eval
    return BoxMap(
        labels=labels,
        precision=np.asarray(result["precision"])[..., -1],
        recall=np.asarray(result["recall"]),
        limits=limits,
    )


def _boxes_and_labels(item: Mapping[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.asarray(item["boxes"], dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(item["labels"], dtype=np.int64).reshape(-1)
    if len(labels) != len(boxes):
        raise ValueError(f"{name} has {len(boxes)} boxes but {len(labels)} labels; give one each.")
    if not np.isfinite(boxes).all():
        raise ValueError(f"{name} has a box that is not finite; leave it out.")
    wrong = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if wrong.any():
        raise ValueError(f"{name} has the box {boxes[wrong][0].tolist()}; give xyxy with x1 <= x2 and y1 <= y2.")
    return boxes, labels


def _mean(values: np.ndarray) -> float:
    known = values[values > UNDEFINED]
    return float(known.mean()) if known.size else UNDEFINED
