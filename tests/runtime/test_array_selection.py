"""The runtime's numpy rule gives the results of the package's rule on tensors."""

import numpy as np
import pytest
import torch

from gdino_hf.detection.suppression import suppressed
from gdino_hf.model.box_ops import batched_nms, nms
from gdino_hf.model.grounded_results import LabelledRow, Selection
from gdino_hf.model.text_prompt import PromptChunk
from gdino_hf.runtime.array_selection import ArraySelection

# Of float32 logits through exp and a division, in two libraries.
SCORE_TOLERANCE = 1e-6

# Five labels, the last of which is negative, in two prompts; label 0 has two phrases.
CHUNKS = [
    PromptChunk(tuple(range(9)), (0, 0, 2, 4), ((1, 2), (3, 5), (5, 6), (7, 8))),
    PromptChunk(tuple(range(7)), (1, 3, 4), ((1, 2), (2, 4), (5, 6))),
]
OPTIONS = [
    {},
    {"score": "mean", "phrases": "mean"},
    {"multi_label": True, "text_threshold": 0.55},
    {"nms_threshold": 0.3},
    {"nms_threshold": 0.3, "class_agnostic_nms": True, "top_k": 4},
    {"text_threshold": 0.6, "score": "mean"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threshold", [0.3, [0.2, 0.5, 0.4, 0.0]], ids=["one", "per label"])
def test_the_rule_equals_that_on_tensors(options, threshold):
    rng = np.random.default_rng(0)
    queries, size = 60, (640, 480)
    parts, expected = [], []
    ours = ArraySelection(np.broadcast_to(np.array(threshold, dtype=np.float32), (4,)), **options)
    theirs = Selection(torch.tensor(threshold) if isinstance(threshold, list) else threshold, **options)
    for chunk in CHUNKS:
        logits = rng.normal(0, 2, (queries, 12)).astype(np.float32)
        logits[:, len(chunk.input_ids) :] = -np.inf
        boxes = rng.uniform(0.2, 0.6, (queries, 4)).astype(np.float32)
        scores = ours.scored(logits, chunk)
        reference = theirs.scored(torch.from_numpy(logits), LabelledRow(0, chunk.label_indices, chunk.spans))
        assert scores.labels.tolist() == reference.labels.tolist()
        np.testing.assert_allclose(scores.scores, reference.scores, atol=SCORE_TOLERANCE)
        parts.append(ours.select(scores, boxes, 4))
        expected.append(theirs.select(reference, torch.from_numpy(boxes), 4))
    found = ours.merged(parts, size)
    reference = theirs.merged(expected, "abcd", torch.tensor([*size, *size], dtype=torch.float32), torch.empty(0))
    assert len(found.labels) > 3
    assert found.labels.tolist() == reference["labels"].tolist()
    np.testing.assert_allclose(found.scores, reference["scores"], atol=SCORE_TOLERANCE)
    np.testing.assert_allclose(found.boxes, reference["boxes"], atol=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_suppression_equals_that_on_tensors(threshold):
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 60, (300, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 40, (300, 2))], axis=1).astype(np.float32)
    boxes[:5] = boxes[5]
    scores = rng.integers(0, 50, 300).astype(np.float32) / 50  # with ties
    labels = rng.integers(0, 3, 300)
    tensors = [torch.from_numpy(x) for x in (boxes, scores, labels)]
    assert suppressed(boxes, scores, labels, threshold).tolist() == batched_nms(*tensors, threshold).tolist()
    assert suppressed(boxes, scores, None, threshold).tolist() == nms(*tensors[:2], threshold).tolist()
    assert suppressed(boxes[:0], scores[:0], None, threshold).tolist() == []
