"""Average precision and recall of boxes as COCO defines them (Lin et al. 2014), over faster-coco-eval.

Stands by itself, without the package around it: `detection_map.py` takes it along where `evaluate.load` copies it.
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

# Sides recovered from corners, x2 - x1, are off by the last bits of a double: a side of 32 pixels, on which the border
# between small and medium lies, must be 32 again. No annotation is finer than this.
_DECIMALS_OF_A_SIDE = 9

ANSWER_WITHOUT_TRUTH = -1.0
"""What COCO's tools say where there is nothing to find."""


@dataclass(frozen=True)
class BoxMap:
    """Precision and recall over thresholds, labels and sizes; -1 where there is nothing to find.

    Attributes:
        labels: (K,) the labels that have a truth.
        precision: (T, R, K, A) interpolated, at IOU_THRESHOLDS, RECALL_POINTS, the labels and SIZES.
        recall: (T, K, A, M) the highest reached, with the M limits of detections.
        limits: Most detections per image of a label: 1, 10 and the highest.
    """

    labels: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    limits: tuple[int, ...]

    def summary(self) -> dict[str, float]:
        """COCO's twelve figures: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100 (the limit), ARs, ARm and ARl."""
        figures = {
            "AP": _mean(self.precision[..., 0]),
            "AP50": _mean(self.precision[0, ..., 0]),
            "AP75": _mean(self.precision[5, ..., 0]),
        }
        figures |= {f"AP{SIZES[a][0]}": _mean(self.precision[..., a]) for a in (1, 2, 3)}
        figures |= {f"AR{limit}": _mean(self.recall[:, :, 0, m]) for m, limit in enumerate(self.limits)}
        return figures | {f"AR{SIZES[a][0]}": _mean(self.recall[:, :, a, -1]) for a in (1, 2, 3)}

    def per_label(self) -> dict[int, dict[str, float]]:
        """AP, AP50, AP75 and AR of every label that has a truth."""
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
        """AP over some of the labels; -1 if none of them has a truth."""
        return _mean(self.precision[:, :, np.isin(self.labels, list(labels)), 0])

    def curves(self) -> dict[int, np.ndarray]:
        """Precision (R,) at IoU 0.5 over RECALL_POINTS, of every label that has something to find."""
        found = {int(label): self.precision[0, :, k, 0] for k, label in enumerate(self.labels)}
        return {label: curve for label, curve in found.items() if (curve > ANSWER_WITHOUT_TRUTH).all()}


def evaluate_boxes(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], max_detections: int = 100
) -> BoxMap:
    """Compare predictions with the truth, image by image, as pycocotools does.

    Args:
        predictions: Per image "boxes" (N, 4) xyxy in pixels, "scores" (N,) and "labels" (N,) int.
        references: Per image, in the same order, "boxes" (M, 4) xyxy in pixels, "labels" (M,) int and, optionally,
            "crowd" (M,) bool (False) and "area" (M,) in square pixels (that of the box). Where scores are equal, the
            order of images decides, which in COCO's tools is that of their ids.
        max_detections: Detections per image and label that count, at least 1.

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
        # What is predicted of a label without truth counts nowhere.
        if annotation["category_id"] in known
    ]
    images = [{"id": image} for image in range(len(references))]
    return accumulate(images, [{"id": label} for label in sorted(known)], truths, detections, max_detections)


def truth_annotations(reference: Mapping[str, Any], image: int) -> list[dict[str, Any]]:
    """One image's truth as COCO annotations.

    Args:
        reference: As `evaluate_boxes` takes it.
        image: Its place.

    Raises:
        ValueError: It is malformed.
    """
    boxes, labels = _boxes_and_labels(reference, f"The reference of image {image}")
    sides = np.round(boxes[:, 2:] - boxes[:, :2], _DECIMALS_OF_A_SIDE)
    crowd, area = reference.get("crowd"), reference.get("area")
    crowd = np.zeros(len(boxes), dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool).reshape(-1)
    area = sides.prod(axis=1) if area is None else np.asarray(area, dtype=np.float64).reshape(-1)
    if len(crowd) != len(boxes) or len(area) != len(boxes):
        raise ValueError(
            f"The reference of image {image} has {len(boxes)} boxes, {len(crowd)} crowd flags and {len(area)} areas; "
            "give one each."
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
    """One image's predictions as COCO annotations.

    Args:
        prediction: As `evaluate_boxes` takes it.
        image: Its place.

    Raises:
        ValueError: It is malformed.
    """
    boxes, labels = _boxes_and_labels(prediction, f"The prediction of image {image}")
    scores = np.asarray(prediction["scores"], dtype=np.float64).reshape(-1)
    if len(scores) != len(boxes):
        raise ValueError(
            f"The prediction of image {image} has {len(boxes)} boxes but {len(scores)} scores; give one each."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"The prediction of image {image} has a score that is not finite; leave it out.")
    sides = np.round(boxes[:, 2:] - boxes[:, :2], _DECIMALS_OF_A_SIDE)
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
    """Match and accumulate annotations in COCO's form.

    Args:
        images: With "id", and for LVIS "neg_category_ids" and "not_exhaustive_category_ids".
        categories: With "id", and for LVIS "frequency"; in ascending order.
        truths: The true annotations, without ids.
        detections: The predicted ones, without ids.
        max_detections: Per image and category.
        lvis: Judge an image by the categories that were looked for in it only.

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
            # Ids from 1: a match with the id 0 would read as no match.
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
    known = values[values > ANSWER_WITHOUT_TRUTH]
    return float(known.mean()) if known.size else ANSWER_WITHOUT_TRUTH
