"""Tests of phrase grounding: tokens of phrases, scores, batches, and rows with several phrases."""

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.evaluation.phrases import phrase_reference, predict_phrases, row_phrases
from gdino_hf.evaluation.prediction_file import PredictionFile, read_predictions
from gdino_hf.model.caption_prompt import build_caption, phrase_tokens

CAPTION = "the cat of cats left the table"


def row(image_id=0, caption=CAPTION, spans=((4, 7),), size=(120, 80)):
    pixels = np.random.default_rng(image_id).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    boxes = [[0, 0, 10, 10 + place] for place in range(len(spans))]
    return {
        "image": Image.fromarray(pixels).resize(size),
        "image_id": image_id,
        "caption": caption,
        "boxes": boxes,
        "spans": [[list(span)] for span in spans],
    }


def test_phrases_of_a_row_are_its_distinct_spans(tiny_tokenizer):
    example = row(spans=((4, 7), (11, 15), (4, 7)))
    assert [phrase for phrase, _ in row_phrases(example)] == ["cat", "cats"]
    boxes = [phrase["boxes"].tolist() for phrase in phrase_reference(example)["phrases"]]
    assert boxes == [[[0, 0, 10, 10], [0, 0, 10, 12]], [[0, 0, 10, 11]]]
    whole = {**example, "spans": [[], [], []]}
    assert row_phrases(whole) == [(CAPTION, ((0, len(CAPTION)),))]
    assert len(phrase_reference(whole)["phrases"][0]["boxes"]) == 3


@pytest.mark.parametrize("score", ["mean", "max"])
def test_a_phrase_gets_the_boxes_with_its_highest_token_scores(tiny_model, tiny_processor, score):
    example = row(spans=((4, 15),))
    (found,) = predict_phrases(tiny_model, tiny_processor, [example], score=score, top_k=5).images
    prompt = build_caption(CAPTION, tiny_processor.tokenizer, 64)
    inputs = tiny_processor(images=[example["image"]])
    with torch.no_grad():
        outputs = tiny_model(
            pixel_values=inputs["pixel_values"],
            image_sizes=inputs["image_sizes"],
            input_ids=torch.tensor([prompt.chunks[0].input_ids]),
        )
    span = outputs.logits[0].sigmoid()[:, phrase_tokens(prompt, [(4, 15)])[1]]
    scores = span.mean(-1) if score == "mean" else span.amax(-1)
    best = scores.argsort(descending=True)[:5]
    cx, cy, w, h = (outputs.pred_boxes[0, best] * torch.tensor([120, 80, 120, 80])).unbind(-1)
    expected = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
    (phrase,) = found["phrases"]
    assert phrase["phrase"] == CAPTION[4:15]
    np.testing.assert_allclose(phrase["scores"], scores[best], atol=1e-6)
    # Tolerance in pixels of a 120-pixel image, for float32.
    np.testing.assert_allclose(phrase["boxes"], expected, atol=1e-3)


def test_batch_of_different_captions_equals_single_images(tiny_model, tiny_processor):
    rows = [row(0), row(1, "a dog", ((2, 5),), (80, 120)), row(2, "the red car left. a cup.", ((4, 11), (20, 23)))]
    together = predict_phrases(tiny_model, tiny_processor, rows, batch_size=3).images
    apart = predict_phrases(tiny_model, tiny_processor, rows, batch_size=1).images
    for one, other in zip(together, apart, strict=True):
        for mine, theirs in zip(one["phrases"], other["phrases"], strict=True):
            np.testing.assert_allclose(mine["scores"], theirs["scores"], atol=1e-5)
            np.testing.assert_allclose(mine["boxes"], theirs["boxes"], atol=0.01)


def test_unusable_captions_are_reported_and_skipped(tiny_model, tiny_processor, capsys):
    rows = [row(0), row(1, "cat " * 80), row(2, " . "), row(3, CAPTION, ((3, 4),)), {**row(4), "caption": None}]
    found = predict_phrases(tiny_model, tiny_processor, rows, batch_size=5)
    assert [item["image_id"] for item in found.images] == [0]
    reasons = {item["image_id"]: item["error"] for item in found.failed}
    assert "a prompt of 64 takes at most 62" in reasons[1]
    assert "nothing to look for" in reasons[2]
    assert "hold no word" in reasons[3]
    assert "no caption" in reasons[4]
    assert "image 1 is left out" in capsys.readouterr().err


def test_stored_phrases_are_read_back_unchanged(tiny_model, tiny_processor, tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PredictionFile(path, {"kind": "phrases"}) as store:
        found = predict_phrases(tiny_model, tiny_processor, [row(0), row(1)], store=store)
    for one, other in zip(found.images, read_predictions(path).images, strict=True):
        for mine, theirs in zip(one["phrases"], other["phrases"], strict=True):
            assert (mine["phrase"], mine["spans"]) == (theirs["phrase"], theirs["spans"])
            np.testing.assert_array_equal(mine["boxes"], theirs["boxes"])
            np.testing.assert_array_equal(mine["scores"], theirs["scores"])
