"""LVIS' average precision: thousands of labels, of which each image was searched for some (Gupta et al. 2019).

Fixed AP (Dave et al. 2021, arXiv:2102.01066): the best 10,000 detections of each label over the whole data set count,
with no limit per image, so that labels do not compete for places in an image's list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .box_map import BoxMap, accumulate, detection_annotations, truth_annotations

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_RARE, _COMMON = 10, 100


def lvis_fixed_ap(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    frequencies: Sequence[str] = (),
    max_per_label: int = 10_000,
) -> tuple[dict[str, float], BoxMap]:
    """Fixed AP.

    In an image, a label counts if it is in its truth or among its negative labels. Where not every object of a label
    is annotated, detections beyond the annotated ones are neither right nor wrong.

    Args:
        predictions: As in `evaluate_boxes`.
        references: As in `evaluate_boxes`, with "negative_labels" and "not_exhaustive_labels" (lists of numbers).
        frequencies: "r", "c" or "f" per label; by the number of images with it where none is given: at most 10, at
            most 100, more.
        max_per_label: Detections of a label that count, over all images.

    Returns:
        AP, AP50, AP75, APs, APm, APl, APr, APc, APf (rare, common, frequent) and AR in 0..1, -1 where there is nothing
        to find; and the precision and recall behind them.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: Predictions or references are malformed, or a frequency is of another name.
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
    group = _by_images(truths) if not frequencies else {label: frequencies[label] for label in labels}
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


def _by_images(truths: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    images = Counter(label for _, label in {(truth["image_id"], truth["category_id"]) for truth in truths})
    return {label: "r" if number <= _RARE else "c" if number <= _COMMON else "f" for label, number in images.items()}


def _best_of_each_label(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], max_per_label: int
) -> list[dict[str, Any]]:
    """The highest scored detections of each label, without those of labels that were not looked for in their image.

    Those, nearly all of them, count nowhere but in the limit; as annotations they would take gigabytes.
    """
    if not predictions:
        return []
    scores = np.concatenate([np.asarray(item["scores"], dtype=np.float64).reshape(-1) for item in predictions])
    numbers = np.concatenate([np.asarray(item["labels"], dtype=np.int64).reshape(-1) for item in predictions])
    keep = np.zeros(len(scores), dtype=bool)
    # Sorted by label and then by falling score, a label's best are the first of its run.
    order = np.lexsort((-scores, numbers))
    starts = np.searchsorted(numbers[order], numbers[order], side="left")
    keep[order] = np.arange(len(order)) - starts < max_per_label
    found, end = [], 0
    for image, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        start, end = end, end + len(np.asarray(prediction["scores"]).reshape(-1))
        looked_for = [*np.asarray(reference["labels"]).tolist(), *reference.get("negative_labels", ())]
        chosen = keep[start:end] & np.isin(numbers[start:end], looked_for)
        best = {
            "boxes": np.asarray(prediction["boxes"], dtype=np.float64).reshape(-1, 4)[chosen],
            "scores": scores[start:end][chosen],
            "labels": numbers[start:end][chosen],
        }
        found += detection_annotations(best, image)
    return found
