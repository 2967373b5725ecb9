"""A COCO file in, detections and average precision in COCO's own form out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .box_map import evaluate_boxes
from .predict import predict
from .truth import coco_truth

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
    truth, ids = coco_truth(annotations), _category_ids(annotations)
    number = {category: label for label, category in enumerate(ids)}
    # An image without any detection counts: what is in it was missed.
    by_image: dict[Any, dict[str, list[Any]]] = {image: defaultdict(list) for image in truth.references}
    for detection in detections:
        if detection["image_id"] not in by_image:
            raise ValueError(f"A detection is of image {detection['image_id']}, which {annotations} does not have.")
        if detection["category_id"] in number:
            x, y, width, height = detection["bbox"]
            found = by_image[detection["image_id"]]
            found["boxes"].append([x, y, x + width, y + height])
            found["scores"].append(detection["score"])
            found["labels"].append(number[detection["category_id"]])
    predictions = [
        {"image_id": image, **{name: found[name] for name in ("boxes", "scores", "labels")}}
        for image, found in by_image.items()
    ]
    return evaluate_boxes(*truth.of(predictions)).summary()


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
    truth, ids = coco_truth(annotations, images), _category_ids(annotations)
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
            "category_id": ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image in found.images
        for (x1, y1, x2, y2), label, score in zip(
            image["boxes"].tolist(), image["labels"].tolist(), image["scores"].tolist(), strict=True
        )
    ]


def _category_ids(annotations: str | Path) -> list[int]:
    """In the order in which `Truth.labels` has their names."""
    content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    return sorted(category["id"] for category in content["categories"])
