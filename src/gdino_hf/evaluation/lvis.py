"""LVIS average precision, for data sets in which each image is annotated for only some labels (Gupta et al. 2019).

Fixed AP (Dave et al. 2021, arXiv:2102.01066) counts the best 10,000 detections of each label over the whole data set,
with no limit per image, so labels do not compete for places in an image's list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .box_map import BoxMap, accumulate, detection_annotations, truth_annotations

LVIS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR")
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_RARE, _COMMON = 10, 100


def lvis_fixed_ap(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    frequencies: Sequence[str] = (),
    max_per_label: int = 10_000,
) -> tuple[dict[str, float], BoxMap]:
    """Compute LVIS fixed AP.

    A label is evaluated in the images that contain it or list it as a negative label. In images where not every object
    of a label is annotated, unmatched detections of that label are ignored.

    Args:
        predictions: Predictions by image, as for `evaluate_boxes`.
        references: Ground truth by image, as for `evaluate_boxes`, also with "negative_labels" and
            "not_exhaustive_labels" (lists of label numbers).
        frequencies: "r" (rare), "c" (common) or "f" (frequent) for each label. If empty, a label is rare in up to 10
            images, common in up to 100, and frequent in more.
        max_per_label: Maximum number of detections counted per label, over all images.

    Returns:
        AP, AP50, AP75, APs, APm, APl, APr, APc, APf (rare, common, frequent) and AR in 0..1, -1 where there is no
        ground truth; and the precision and recall they come from.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: Predictions or references are malformed, or a frequency is unknown.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"There are predictions of {len(predictions)} images but references of {len(references)}; give one each."
        )
    wrong = sorted(set(frequencies) - FREQUENCIES.keys())
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no frequency; give r (rare), c (common) or f (frequent).")
    truths = [item for image, reference in enumerate(references) for item in truth_annotations(reference, image)]
    labels = sorted({truth["category_id"] for truth in truths})
    group = _frequency_groups(truths) if not frequencies else {label: frequencies[label] for label in labels}
    detections = _best_of_each_label(predictions, references, max_per_label)
    per_image = Counter((item["image_id"], item["category_id"]) for item in detections)
    result = accumulate(
        [
            {
                "id": image,
                "neg_category_ids": list(reference.get("negative_labels", ())),
                "not_exhaustive_category_ids": list(reference.get("not_exhaustive_labels", ())),
            }
            for image, reference in enumerate(references)
        ],
        [{"id": label, "frequency": group[label]} for label in labels],
        truths,
        detections,
        max_detections=max(per_image.values(), default=1),
        lvis=True,
    )
    summary = result.summary()
    figures = {name: summary[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    for frequency in FREQUENCIES:
        figures[f"AP{frequency}"] = result.mean_over([label for label in labels if group[label] == frequency])
    recall = result.recall[:, :, 0, -1]
    figures["AR"] = float(recall[recall > -1].mean()) if (recall > -1).any() else -1.0
    return figures, result


def _frequency_groups(truths: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return each label's frequency group by the number of images it occurs in."""
    images = Counter(label for _, label in {(truth["image_id"], truth["category_id"]) for truth in truths})
    return {label: "r" if number <= _RARE else "c" if number <= _COMMON else "f" for label, number in images.items()}


def _best_of_each_label(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], max_per_label: int
) -> list[dict[str, Any]]:
    """Keep the highest-scoring detections of each label, then drop those in images where the label is not annotated.

    The limit counts all detections, but most are of labels not annotated in their image and affect no metric; as
    annotations those would take gigabytes.
    """
    if not predictions:
        return []
    scores = np.concatenate([np.asarray(item["scores"], dtype=np.float64).reshape(-1) for item in predictions])
    numbers = np.concatenate([np.asarray(item["labels"], dtype=np.int64).reshape(-1) for item in predictions])
    keep = np.zeros(len(scores), dtype=bool)
    # After sorting by label and falling score, the best detections of a label come first among its entries.
    order = np.lexsort((-scores, numbers))
    starts = np.searchsorted(numbers[order], numbers[order], side="left")
    keep[order] = np.arange(len(order)) - starts < max_per_label
    found, end = [], 0
    for image, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        start, end = end, end + len(np.asarray(prediction["scores"]).reshape(-1))
        evaluated = [*np.asarray(reference["labels"]).tolist(), *reference.get("negative_labels", ())]
        chosen = keep[start:end] & np.isin(numbers[start:end], evaluated)
        best = {
            "boxes": np.asarray(prediction["boxes"], dtype=np.float64).reshape(-1, 4)[chosen],
            "scores": scores[start:end][chosen],
            "labels": numbers[start:end][chosen],
        }
        found += detection_annotations(best, image)
    return found
