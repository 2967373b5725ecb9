"""Phrase grounding and referring expressions: is the box that a phrase of a caption means among the best few?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

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
    """Recall of phrases, the Flickr30k Entities convention (Plummer et al. 2015; both protocols: Kamath et al. 2021).

    A phrase is found at rank k if one of its k best boxes overlaps what it means. Under "any", one true box of the
    phrase is enough ("two men"); under "merged", the smallest box around all of them is what has to be found.

    Args:
        predictions: Per image "phrases": a list of {"boxes" (N, 4) xyxy in pixels, best first}.
        references: Per image "phrases", the same ones in the same order: {"boxes" (M, 4) xyxy in pixels}. A phrase
            without a box is left out.
        protocol: "any" or "merged".
        ranks: The k of recall@k.
        iou_threshold: Least overlap, 0..1.

    Returns:
        "recall@1" and so on in 0..1, -1 where there is no phrase, and "phrases", their number.

    Raises:
        ValueError: The protocol is neither, or numbers of images or phrases differ.
    """
    if protocol not in ("any", "merged"):
        raise ValueError(f"protocol must be 'any' or 'merged', got {protocol!r}.")
    first_hits = []
    for prediction, reference in _pairs(predictions, references):
        found = np.asarray(prediction["boxes"], dtype=np.float64).reshape(-1, 4)
        meant = np.asarray(reference["boxes"], dtype=np.float64).reshape(-1, 4)
        if not len(meant):
            continue
        if protocol == "merged":
            meant = np.concatenate([meant[:, :2].min(axis=0), meant[:, 2:].max(axis=0)])[None]
        hits = np.flatnonzero((pairwise_iou(found, meant) >= iou_threshold).any(axis=1))
        first_hits.append(hits[0] if len(hits) else np.inf)
    ranked = np.array(first_hits)
    recall = {f"recall@{k}": float((ranked < k).mean()) if len(ranked) else -1.0 for k in ranks}
    return {**recall, "phrases": len(ranked)}


def referring_accuracy(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], iou_threshold: float = 0.5
) -> dict[str, float]:
    """Accuracy of referring expressions as RefCOCO has it: the single best box overlaps the one that is meant.

    Args:
        predictions: As in `phrase_recall`.
        references: As in `phrase_recall`.
        iou_threshold: Least overlap, 0..1.

    Returns:
        "accuracy" in 0..1, -1 where there is no expression, and "expressions", their number.
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
                f"Image {image} has predictions of {len(found)} phrases but references of {len(meant)}; give one each."
            )
        pairs += zip(found, meant, strict=True)
    return pairs
