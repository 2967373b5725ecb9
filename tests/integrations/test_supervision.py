"""supervision reads our results with their names, and its annotators draw them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import gdino_hf
from trained_checkpoint import BOXES, LABELS

sv = pytest.importorskip("supervision", reason="supervision is in the extra dev")


@pytest.fixture(scope="module")
def found(their_checkpoint, learned_picture):
    """The picture, and what our model and processor find in it."""
    model = gdino_hf.GDinoForObjectDetection.from_pretrained(their_checkpoint).eval()
    processor = gdino_hf.GDinoProcessor.from_pretrained(their_checkpoint)
    image = Image.open(learned_picture)
    inputs = processor(image, LABELS)
    with torch.no_grad():
        outputs = model(**inputs)
    (result,) = processor.post_process_grounded_object_detection(
        outputs, inputs, threshold=0.5, target_sizes=inputs.original_sizes
    )
    return image, result


def test_from_transformers_gives_names(found):
    _, result = found
    detections = sv.Detections.from_transformers(result, id2label=dict(enumerate(LABELS)))
    assert len(detections) == 2
    assert detections["class_name"].tolist() == result["text_labels"]
    assert [LABELS[index] for index in detections.class_id] == result["text_labels"]
    for name, box, score in zip(detections["class_name"], detections.xyxy, detections.confidence, strict=True):
        x, y, w, h = BOXES[name]
        assert box == pytest.approx([x, y, x + w, y + h], abs=1.5)
        assert 0.5 < score <= 1


def test_nothing_found_is_read_as_nothing(found):
    _, result = found
    nothing = {"scores": result["scores"][:0], "boxes": result["boxes"][:0], "labels": result["labels"][:0]}
    assert len(sv.Detections.from_transformers(nothing, id2label=dict(enumerate(LABELS)))) == 0


def test_annotators_draw_boxes_and_names(found):
    image, result = found
    detections = sv.Detections.from_transformers(result, id2label=dict(enumerate(LABELS)))
    before = np.asarray(image).copy()
    boxed = np.asarray(sv.BoxAnnotator(thickness=1).annotate(image.copy(), detections))
    labelled = np.asarray(sv.LabelAnnotator(text_scale=0.3).annotate(image.copy(), detections))
    assert np.array_equal(np.asarray(image), before)
    for x, y, w, h in BOXES.values():
        # The outline differs from the picture, the inside does not.
        assert (boxed[y - 1 : y + 3, x + w // 2] != before[y - 1 : y + 3, x + w // 2]).any()
        assert np.array_equal(boxed[y + h // 2, x + w // 2], before[y + h // 2, x + w // 2])
    assert (labelled != before).any()
    many = sv.Detections.merge([detections, detections])
    assert len(many.with_nms(0.5)) == 2
