"""A COCO file in, detections and average precision in COCO's own form out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rows import parse_box, read_json, reason
from ..model.text_prompt import shorten
from .box_map import evaluate_boxes
from .ground_truth import GroundTruth, coco_ground_truth
from .predict import predict
from .prediction_file import Predictions

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def average_precision(annotations: str | Path, detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COCO's box metrics.

    Args:
        annotations: COCO json with the truth.
        detections: {"image_id", "category_id", "bbox" (xywh in pixels), "score"} each.

    Returns:
        The METRICS in 0..1; -1 where the file has nothing of that size.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: The file is not COCO's, or a detection is of an image that it does not have.
    """
    truth = coco_ground_truth(annotations)
    return evaluate_boxes(*truth.paired_with(coco_predictions(detections, truth).images)).summary()


def is_coco_results_file(path: str | Path) -> bool:
    """Whether a file of predictions begins as a json list does."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return file.read(1024).lstrip().startswith("[")
    except (OSError, ValueError):
        # Whoever reads the file says what is wrong with it.
        return False


def read_coco_results(path: str | Path, truth: GroundTruth) -> Predictions:
    """Read the results file that COCO's and LVIS' servers take, a json list of detections.

    Args:
        path: The file.
        truth: From `coco_ground_truth`.

    Returns:
        As `coco_predictions`.

    Raises:
        ValueError: The file is no json list, or as there.
    """
    content = read_json(path, "COCO results")
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a {type(content).__name__}, not COCO's list of detections.")
    try:
        return coco_predictions(content, truth)
    except ValueError as error:
        raise ValueError(f"{path} cannot be judged: {reason(error)}.") from None


def coco_predictions(detections: Sequence[Any], truth: GroundTruth) -> Predictions:
    """Detections in COCO's form as predictions of every image of a data set.

    Args:
        detections: {"image_id", "category_id", "bbox" (xywh in pixels), "score"} each. As with COCO's tools, those of
            categories that the data set does not have count nowhere, and an image without any is one where nothing
            was found.
        truth: From `coco_ground_truth`.

    Returns:
        The predictions, labels numbered as in the truth.

    Raises:
        ValueError: The truth is none of a COCO file, or a detection is malformed or of an image it does not have.
    """
    if len(truth.category_ids) != len(truth.labels) or truth.has_captions:
        raise ValueError("Detections in COCO's form have category ids, so they need a COCO file with the truth.")
    number: dict[float, int] = {category: label for label, category in enumerate(truth.category_ids)}
    by_image: dict[Any, list[tuple[float, int, tuple[float, ...]]]] = {image: [] for image in truth.references}
    for place, detection in enumerate(detections):
        try:
            image, category, box, score = _detection(detection)
            if image not in by_image:
                raise ValueError(f"it is of image {shorten(image)}, which the data set does not have")
        except ValueError as error:
            raise ValueError(f"Detection {place} cannot be used: {error}.") from None
        if category in number:
            by_image[image].append((score, number[category], box))
    images = []
    for image, items in by_image.items():
        items.sort(key=lambda item: -item[0])
        boxes = np.array([box for _, _, box in items], dtype=np.float64).reshape(-1, 4)
        scores = np.array([score for score, _, _ in items], dtype=np.float64)
        labels = np.array([label for _, label, _ in items], dtype=np.int64)
        images.append({"image_id": image, "boxes": boxes, "scores": scores, "labels": labels})
    return Predictions({"kind": "boxes", "labels": truth.labels}, images)


def detect_coco(
    model: Any,
    processor: Any,
    annotations: str | Path,
    images: str | Path | None = None,
    batch_size: int = 8,
    max_detections: int = 100,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Run the model over a COCO file with all its names as the prompt; see `predict`.

    Args:
        model: A GDinoForObjectDetection.
        processor: Its processor.
        annotations: COCO json.
        images: Folder of the photographs; `images` beside the json by default.
        batch_size: Images per forward.
        max_detections: Detections kept per image.
        limit: Only the first so many images.

    Returns:
        Detections as `average_precision` takes them.
    """
    truth = coco_ground_truth(annotations, images)
    found = predict(
        model,
        processor,
        truth.rows,
        truth.labels,
        batch_size=batch_size,
        max_detections=max_detections,
        limit=limit,
        progress="evaluate",
    )
    return [
        {
            "image_id": image["image_id"],
            "category_id": truth.category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image in found.images
        for (x1, y1, x2, y2), label, score in zip(
            image["boxes"].tolist(), image["labels"].tolist(), image["scores"].tolist(), strict=True
        )
    ]


def _detection(detection: Any) -> tuple[Any, float, tuple[float, float, float, float], float]:
    """Image id, category id, xyxy and score of a detection."""
    if not isinstance(detection, Mapping):
        raise ValueError(f"it is {shorten(detection)}, not a dict with image_id, category_id, bbox and score")
    # Scalars of numpy become Python's own.
    names = ("image_id", "category_id", "bbox", "score")
    image, category, bbox, score = (np.asarray(detection.get(name)).tolist() for name in names)
    if not isinstance(image, (int, float, str)) or not isinstance(category, (int, float)):
        raise ValueError(f"its image_id is {shorten(image)} and its category_id {shorten(category)}")
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"its score is {shorten(score)}, not a finite number")
    box = parse_box(bbox, "xywh")
    if box[2] < box[0] or box[3] < box[1]:
        raise ValueError(f"its bbox {shorten(bbox)} has a negative side; give x, y, width, height")
    return image, category, box, score
