"""Detections in COCO's results format: writing them with a model, reading them, and their average precision."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco_content import id_key
from ..data.rows import parse_box, read_json
from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten
from .box_map import evaluate_boxes
from .ground_truth import GroundTruth, coco_ground_truth
from .predict import predict
from .prediction_file import Predictions

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def average_precision(annotations: str | Path, detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute COCO's box metrics.

    Args:
        annotations: COCO json file with the ground truth.
        detections: Dicts with "image_id", "category_id", "bbox" (xywh in pixels) and "score".

    Returns:
        The METRICS in 0..1; -1 where there is no ground truth of that size.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: The file is not a COCO detection file, or a detection is of an image that it does not list.
    """
    truth = coco_ground_truth(annotations)
    return evaluate_boxes(*truth.paired_with(coco_predictions(detections, truth).images)).summary()


def is_coco_results_file(path: str | Path) -> bool:
    """Return whether a file begins like a json list, the format of COCO results."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return file.read(1024).lstrip().startswith("[")
    except (OSError, ValueError):
        # Reading the file later reports what is wrong with it.
        return False


def read_coco_results(path: str | Path, truth: GroundTruth) -> Predictions:
    """Read a results file in the format of the COCO and LVIS servers, a json list of detections.

    Args:
        path: The file.
        truth: Ground truth from `coco_ground_truth`.

    Returns:
        Predictions for every image, as from `coco_predictions`.

    Raises:
        ValueError: The file is not a json list, or its detections do not match the ground truth.
    """
    content = read_json(path, "COCO results")
    if not isinstance(content, list):
        raise ValueError(f"{printable(path)} holds a {type(content).__name__}, not COCO's list of detections.")
    try:
        return coco_predictions(content, truth)
    except ValueError as error:
        raise ValueError(f"{printable(path)} cannot be evaluated: {reason(error)}.") from None


def coco_predictions(detections: Sequence[Any], truth: GroundTruth) -> Predictions:
    """Group detections in COCO's format into predictions for every image of a data set.

    Args:
        detections: Dicts with "image_id", "category_id", "bbox" (xywh in pixels) and "score". As in COCO's tools,
            an image without detections counts as empty; detections of unknown categories are left out with a warning.
        truth: Ground truth from `coco_ground_truth`.

    Returns:
        The predictions, with the ground truth's label numbers.

    Raises:
        ValueError: The ground truth is not from a COCO file, a detection is malformed or of an unknown image, or every
            detection is of an unknown category.
    """
    if (truth.labels and not truth.label_of) or truth.has_captions:
        raise ValueError("Detections in COCO's format have category ids, so they need a COCO file as ground truth.")
    unknown: Counter[Any] = Counter()
    by_image: dict[Any, list[tuple[float, int, tuple[float, ...]]]] = {image: [] for image in truth.references}
    for place, detection in enumerate(detections):
        try:
            image, category, box, score = _detection(detection)
            image = truth.find_image(image)
            if image not in by_image:
                raise ValueError(f"it is of image {shorten(image)}, which the data set does not have")
        except ValueError as error:
            raise ValueError(f"Detection {place} cannot be used: {error}.") from None
        label = truth.label_of.get(id_key(category))
        if label is None:
            unknown[category] += 1
        else:
            by_image[image].append((score, label, box))
    _name_unknown(unknown, len(detections), truth)
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
    """Run a model over a COCO file with all of its names as the prompt; see `predict`.

    Args:
        model: A GDinoForObjectDetection.
        processor: The model's processor.
        annotations: COCO json file.
        images: Folder of the images; by default found as in `read_coco`.
        batch_size: Number of images per forward pass.
        max_detections: Maximum number of detections kept per image.
        limit: Number of images to run on, from the first; None for all.

    Returns:
        Detections in COCO's results format, as `average_precision` takes them.
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


def _name_unknown(unknown: Mapping[Any, int], there: int, truth: GroundTruth) -> None:
    """Warn about detections of categories that the data set does not have; if all are, raise a ValueError."""
    if not unknown:
        return
    few = ", ".join(shorten(category) for category in list(unknown)[:5]) + ", ..." * (len(unknown) > 5)
    known = ", ".join(shorten(category) for category in truth.category_ids[:5]) + ", ..." * (len(truth.labels) > 5)
    number = sum(unknown.values())
    text = f"{number} of {there} detections have a category_id that the data set does not have ({few}; it has {known})"
    if number == there:
        raise ValueError(f"{text}, so nothing can be scored; write the data set's category ids")
    logger.warning("%s and are left out.", text)


def _detection(detection: Any) -> tuple[Any, float | str, tuple[float, float, float, float], float]:
    """Return the image id, category id, box as xyxy, and score of a detection."""
    if not isinstance(detection, Mapping):
        raise ValueError(f"it is {shorten(detection)}, not a dict with image_id, category_id, bbox and score")
    # numpy scalars become Python scalars.
    names = ("image_id", "category_id", "bbox", "score")
    image, category, bbox, score = (np.asarray(detection.get(name)).tolist() for name in names)
    if not isinstance(image, (int, float, str)) or not isinstance(category, (int, float, str)):
        raise ValueError(f"its image_id is {shorten(image)} and its category_id {shorten(category)}")
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"its score is {shorten(score)}, not a finite number")
    box = parse_box(bbox, "xywh")
    if box[2] < box[0] or box[3] < box[1]:
        raise ValueError(f"its bbox {shorten(bbox)} has a negative side; give x, y, width, height")
    return image, category, box, score
