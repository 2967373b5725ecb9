"""A model over captions: the boxes each phrase of a caption means, best first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..model.box_ops import cxcywh_to_xyxy
from ..model.text_prompt import special_token_ids
from .predict import Picture, begin, fail, keep, prepare_images, read_batches
from .prediction_file import PredictionFile, Predictions

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
    store: PredictionFile | None = None,
    progress: str = "ground",
) -> Predictions:
    """Ask for the phrases of each image's caption, with the whole caption as the prompt.

    Args:
        model: A GDinoForObjectDetection, left in the mode it was in.
        processor: Its processor.
        rows: Each with "image", "caption", and "spans" (per box a list of [start, end) characters of the caption);
            optionally "image_id", by default its place.
        batch_size: Images per forward.
        top_k: Boxes kept per phrase.
        score: A phrase's score from those of its tokens: the mean, as published for phrases, or the highest, as
            published for referring expressions.
        limit: Only the first so many images.
        store: Where predictions go as they are made; what it has already is not made again.
        progress: What the progress bar is called.

    Returns:
        The predictions: per image "phrases", a list of {"phrase", "spans", "boxes" (K, 4) xyxy in pixels, "scores"
        (K,)} in the order of `row_phrases`. An image that cannot be read, or whose caption the model cannot take, is
        named on the terminal, skipped and listed in `failed`.
    """
    was_training = model.training
    model.eval()
    try:
        results = begin(store)
        for batch in read_batches(rows, results, batch_size, limit=limit, store=store, progress=progress):
            captions = _prepare_captions(processor, model.config.max_text_len, batch, results, store)
            inputs = prepare_images(processor, batch, results, store)
            if not batch:
                continue
            tokens = [captions[id(item)] for item in batch]
            inputs = inputs.to(model.device)
            outputs = model(
                **{name: inputs[name] for name in ("pixel_values", "pixel_mask", "image_sizes")},
                **_text_inputs(tokens, processor.tokenizer.pad_token_id or 0, model.device),
            )
            probabilities = outputs.logits.float().sigmoid()
            for place, item in enumerate(batch):
                width, height = item.image.size
                boxes = cxcywh_to_xyxy(outputs.pred_boxes[place].float())
                boxes = boxes * boxes.new_tensor([width, height, width, height])
                phrases = [
                    {"phrase": phrase, "spans": [list(span) for span in spans]}
                    | _best(probabilities[place], boxes, tokens[place].of(spans), score, top_k)
                    for phrase, spans in row_phrases(item.row)
                ]
                keep(item.entry({"phrases": phrases}), results, store)
    finally:
        model.train(was_training)
    return results


def row_phrases(row: Mapping[str, Any]) -> list[tuple[str, tuple[Span, ...]]]:
    """The distinct phrases of a row with their spans, in the order of its boxes; the whole caption where it has none.

    Args:
        row: With "caption" and "spans".
    """
    caption = row["caption"]
    whole = [((0, len(caption)),)]
    spans = [tuple((int(start), int(end)) for start, end in box) for box in row.get("spans") or ()]
    return [
        (" ".join(caption[start:end] for start, end in phrase), phrase)
        for phrase in dict.fromkeys([phrase for phrase in spans if phrase] or whole)
    ]


def phrase_reference(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the phrases of a row mean: "phrases" as `phrase_recall` takes them, in the order of `row_phrases`.

    Args:
        row: With "caption", "boxes" (N, 4) xyxy in pixels and "spans" (N).
    """
    boxes = np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)
    spans = [tuple((int(start), int(end)) for start, end in box) for box in row.get("spans") or ()]
    if not any(spans):
        return {"phrases": [{"boxes": boxes}]}
    return {"phrases": [{"boxes": boxes[[other == phrase for other in spans]]} for _, phrase in row_phrases(row)]}


class CaptionTokens:
    """A caption's tokens and the characters each stands for.

    Args:
        caption: The text.
        tokenizer: The model's, a fast one.
        max_text_len: Most tokens.

    Raises:
        ValueError: The caption has more tokens or none, or the tokenizer does not know where a token stands.
    """

    def __init__(self, caption: str, tokenizer: Any, max_text_len: int) -> None:
        text = caption.rstrip()
        # Every prompt is closed: an open last phrase is none that the model was trained on.
        closed = text if text.endswith((".", "?")) else text + " ."
        encoded = tokenizer(closed, return_offsets_mapping=True, add_special_tokens=True)
        self.input_ids: list[int] = list(encoded["input_ids"])
        self._offsets: list[Span] = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        special = special_token_ids(tokenizer)
        self._words = [token not in special for token in self.input_ids]
        if not any(self._words):
            raise ValueError(f"the caption {caption[:40]!r} names nothing")
        if len(self.input_ids) > max_text_len:
            raise ValueError(
                f"the caption has {len(self.input_ids)} tokens, the model takes {max_text_len}; shorten it"
            )

    def of(self, spans: Sequence[Span]) -> list[int]:
        """Places of the tokens that stand for characters of the spans.

        Args:
            spans: [start, end) characters.
        """
        return [
            place
            for place, (start, end) in enumerate(self._offsets)
            if self._words[place] and any(start < last and first < end for first, last in spans)
        ]


def _prepare_captions(
    processor: Any, max_text_len: int, batch: list[Picture], results: Predictions, store: PredictionFile | None
) -> dict[int, CaptionTokens]:
    """Tokens of a batch's captions by the identity of the picture; what cannot be used is taken out of the batch."""
    tokens = {}
    for item in list(batch):
        try:
            if not isinstance(item.row.get("caption"), str):
                raise ValueError("it has no caption")
            tokens[id(item)] = CaptionTokens(item.row["caption"], processor.tokenizer, max_text_len)
            for phrase, spans in row_phrases(item.row):
                if not tokens[id(item)].of(spans):
                    raise ValueError(f"the phrase {phrase!r} has no word of the caption in it")
        except ValueError as error:
            batch.remove(item)
            fail(item.image_id, error, results, store)
    return tokens


def _text_inputs(captions: Sequence[CaptionTokens], pad: int, device: Any) -> dict[str, Tensor]:
    longest = max(len(caption.input_ids) for caption in captions)
    ids = [caption.input_ids + [pad] * (longest - len(caption.input_ids)) for caption in captions]
    real = [[1] * len(caption.input_ids) + [0] * (longest - len(caption.input_ids)) for caption in captions]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(real, device=device)}


def _best(
    probabilities: Tensor, boxes: Tensor, tokens: Sequence[int], score: Score, top_k: int
) -> dict[str, np.ndarray]:
    """Boxes of a phrase, from (Q, T) probabilities and (Q, 4) boxes."""
    span = probabilities[:, list(tokens)]
    scores = span.mean(-1) if score == "mean" else span.amax(-1)
    order = scores.argsort(descending=True, stable=True)[:top_k]
    return {"boxes": boxes[order].double().cpu().numpy(), "scores": scores[order].double().cpu().numpy()}
