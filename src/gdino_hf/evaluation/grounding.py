"""Metrics of phrase grounding and referring expressions: whether a phrase's best boxes include the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..model.text_prompt import shorten
from .confusion import pairwise_iou

RANKS = (1, 5, 10)
Protocol = Literal["any", "merged"]


def phrase_recall(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    protocol: Protocol = "any",
    ranks: Sequence[int] = RANKS,
    iou_threshold: float = 0.5,
) -> dict[str, float]:
    """Compute the recall of phrases as for Flickr30k Entities (Plummer et al. 2015; protocols: Kamath et al. 2021).

    A phrase is found at rank k if one of its k best boxes overlaps the ground truth. If a phrase has several true boxes
    ("two men"), "any" accepts an overlap with one of them, and "merged" demands it with the box around all of them.

    Args:
        predictions: One dict per image with "phrases", a list of {"boxes" (N, 4) xyxy in pixels, best first}.
        references: One dict per image with "phrases" in the same order, {"boxes" (M, 4) xyxy in pixels}. Phrases
            without a box are ignored.
        protocol: "any" or "merged".
        ranks: Ranks k to compute recall@k for.
        iou_threshold: Smallest IoU of a hit, 0..1.

    Returns:
        "recall@k" for each rank in 0..1, -1 if there are no phrases, and "phrases", their number.

    Raises:
        ValueError: The protocol is unknown, or numbers of images or phrases differ.
    """
    if protocol not in ("any", "merged"):
        raise ValueError(f"protocol must be 'any' or 'merged', got {protocol!r}.")
    first_hits = []
    for prediction, reference in _pairs(predictions, references):
        found = np.asarray(prediction["boxes"], dtype=np.float64).reshape(-1, 4)
        true_boxes = np.asarray(reference["boxes"], dtype=np.float64).reshape(-1, 4)
        if not len(true_boxes):
            continue
        if protocol == "merged":
            true_boxes = np.concatenate([true_boxes[:, :2].min(axis=0), true_boxes[:, 2:].max(axis=0)])[None]
        hits = np.flatnonzero((pairwise_iou(found, true_boxes) >= iou_threshold).any(axis=1))
        first_hits.append(hits[0] if len(hits) else np.inf)
    ranked = np.array(first_hits)
    recall = {f"recall@{k}": float((ranked < k).mean()) if len(ranked) else -1.0 for k in ranks}
    return {**recall, "phrases": len(ranked)}


def referring_accuracy(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], iou_threshold: float = 0.5
) -> dict[str, float]:
    """Compute the accuracy of referring expressions as for RefCOCO: whether the best box overlaps the true one.

    Args:
        predictions: Predictions by image, as for `phrase_recall`.
        references: Ground truth by image, as for `phrase_recall`.
        iou_threshold: Smallest IoU of a hit, 0..1.

    Returns:
        "accuracy" in 0..1, -1 if there are no expressions, and "expressions", their number.
    """
    result = phrase_recall(predictions, references, "any", (1,), iou_threshold)
    return {"accuracy": result["recall@1"], "expressions": result["phrases"]}


def _pairs(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    if len(predictions) != len(references):
        raise ValueError(
            f"There are predictions of {len(predictions)} images but references of {len(references)}; give one each."
        )
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for image, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        found, meant = prediction["phrases"], reference["phrases"]
        if len(found) != len(meant):
            raise ValueError(
                f"Image {shorten(image)} has predictions of {len(found)} phrases but references of {len(meant)}; give "
                "one each."
            )
        pairs += zip(found, meant, strict=True)
    return pairs
