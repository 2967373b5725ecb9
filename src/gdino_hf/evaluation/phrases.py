"""Phrase grounding over a data set: the best boxes for each phrase of each image's caption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..detection.prompt_passes import outputs_of_own_prompts
from ..detection.text_features import TextFeatureStore
from ..model.box_ops import cxcywh_to_xyxy
from ..model.caption_prompt import build_caption, phrase_tokens
from ..model.text_prompt import Prompt
from .predict import BatchReader, Picture, record, record_failure, start_results
from .prediction_file import Predictions, PredictionStore

Span = tuple[int, int]
Score = Literal["max", "mean"]


@torch.no_grad()
def predict_phrases(
    model: Any,
    processor: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    top_k: int = 10,
    score: Score = "mean",
    limit: int | None = None,
    store: PredictionStore | None = None,
    progress: str | None = "ground",
) -> Predictions:
    """Ground the phrases of each image's caption, with the whole caption as the prompt.

    Args:
        model: A GDinoForObjectDetection; it is run in eval mode and then put back into its own mode.
        processor: The model's processor.
        rows: Rows with "image", "caption", "spans" (a list of [start, end) characters of the caption per box) and
            optionally "image_id" (default: the row's index).
        batch_size: Number of images per forward pass.
        top_k: Number of boxes kept per phrase.
        score: How a phrase's score follows from its tokens': "mean", as published for phrases, or "max", as published
            for referring expressions.
        limit: Number of images to run on, from the first; None for all.
        store: File that predictions are appended to at once. Images that it already holds are not run again.
        progress: Title of the progress bar; None shows and reports nothing.

    Returns:
        The predictions. Each image has "phrases", a list of {"phrase", "spans", "boxes" (K, 4) xyxy in pixels, "scores"
        (K,)} in the order of `row_phrases`. An image that cannot be read, or whose caption cannot be used, is reported
        on the terminal, skipped and listed in `failed`.
    """
    was_training = model.training
    model.eval()
    try:
        results = start_results(store)
        max_text_len = min(processor.max_text_len, model.config.max_text_len)
        reader = BatchReader(processor, model.device, batch_size, results, store)
        with closing(reader.batches(rows, limit, progress)) as batches:
            for batch in batches:
                captions = _prepare_captions(processor, max_text_len, batch, results, store, progress is not None)
                if not batch:
                    continue
                prompts = [captions[id(item)] for item in batch]
                chunks, inputs = [prompt.chunks[0] for prompt in prompts], [item.inputs for item in batch]
                # Captions are encoded batch by batch: what was kept of earlier ones would change the last digits.
                outputs = outputs_of_own_prompts(model, TextFeatureStore(model), chunks, inputs)
                for item, prompt, logits, boxes in zip(batch, prompts, *outputs, strict=True):
                    phrases = _phrases(item, prompt, logits.float().sigmoid(), boxes.float(), score, top_k)
                    if not item.is_stored:
                        record(item.entry({"phrases": phrases}), results, store)
    finally:
        model.train(was_training)
    return results


def row_phrases(row: Mapping[str, Any]) -> list[tuple[str, tuple[Span, ...]]]:
    """Return the distinct phrases of a row with their spans, in the order of its boxes; without any, the whole caption.

    Args:
        row: Row with "caption" and "spans".
    """
    caption = row["caption"]
    whole = [((0, len(caption)),)]
    spans = [tuple((int(start), int(end)) for start, end in box) for box in row.get("spans") or ()]
    return [
        (" ".join(caption[start:end] for start, end in phrase), phrase)
        for phrase in dict.fromkeys([phrase for phrase in spans if phrase] or whole)
    ]


def phrase_reference(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the true boxes of a row's phrases in the format of `phrase_recall` and the order of `row_phrases`.

    Args:
        row: Row with "caption", "boxes" ((N, 4) xyxy in pixels) and "spans" (N).
    """
    boxes = np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)
    spans = [tuple((int(start), int(end)) for start, end in box) for box in row.get("spans") or ()]
    if not any(spans):
        return {"phrases": [{"boxes": boxes}]}
    return {"phrases": [{"boxes": boxes[[other == phrase for other in spans]]} for _, phrase in row_phrases(row)]}


def _prepare_captions(
    processor: Any,
    max_text_len: int,
    batch: list[Picture],
    results: Predictions,
    store: PredictionStore | None,
    say: bool,
) -> dict[int, Prompt]:
    """Build the prompts, keyed by the pictures' id(), and remove pictures without a usable caption from the batch."""
    prompts = {}
    for item in list(batch):
        try:
            if not isinstance(item.row.get("caption"), str):
                raise ValueError("it has no caption")
            prompts[id(item)] = build_caption(item.row["caption"], processor.tokenizer, max_text_len)
            for _, spans in row_phrases(item.row):
                phrase_tokens(prompts[id(item)], spans)
        except ValueError as error:
            batch.remove(item)
            record_failure(item.image_id, error, results, store, say)
    return prompts


def _phrases(
    item: Picture, prompt: Prompt, probabilities: Tensor, boxes: Tensor, score: Score, top_k: int
) -> list[dict[str, Any]]:
    """Return the best boxes of each phrase of a picture, from (Q, T) probabilities and (Q, 4) boxes, cxcywh in 0..1."""
    corners = cxcywh_to_xyxy(boxes)
    corners = corners * corners.new_tensor([*item.size, *item.size])
    return [
        {"phrase": phrase, "spans": [list(span) for span in spans]}
        | _best(probabilities, corners, phrase_tokens(prompt, spans)[1], score, top_k)
        for phrase, spans in row_phrases(item.row)
    ]


def _best(
    probabilities: Tensor, boxes: Tensor, tokens: Sequence[int], score: Score, top_k: int
) -> dict[str, np.ndarray]:
    """Return a phrase's best boxes and their scores, from (Q, T) probabilities and (Q, 4) boxes."""
    span = probabilities[:, list(tokens)]
    scores = span.mean(-1) if score == "mean" else span.amax(-1)
    order = scores.argsort(descending=True, stable=True)[:top_k]
    return {"boxes": boxes[order].double().cpu().numpy(), "scores": scores[order].double().cpu().numpy()}
