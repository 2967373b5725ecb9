"""1,203 labels on gdino-nano: equal to each prompt by hand, one pass of the image backbone, memory as for 20 labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdino_hf import NANO, Detector, GDinoProcessor, Vocabulary
from gdino_hf.model.box_ops import cxcywh_to_xyxy

SCORE, PIXEL = 1e-5, 1e-3
FIRST = ("red", "old", "wooden", "small", "plastic", "broken", "striped", "shiny", "dirty", "metal", "glass", "round")
SECOND = ("cat", "cup", "spoon", "hot dog", "dog", "remote control", "traffic light", "person", "chair", "café table")
LABELS = [f"{first} {second} {number}" for number in range(11) for first in FIRST for second in SECOND][:1203]

PROGRAM = """
import resource, sys
from PIL import Image
from gdino_hf import Detector
labels = [f"thing {number}" for number in range(int(sys.argv[1]))]
detector = Detector("nano", device="cpu")
detector(Image.new("RGB", (900, 700), (90, 120, 30)), labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_1203_labels_equal_each_prompt_by_hand_with_one_backbone_pass(example_folder):
    processor = GDinoProcessor.from_pretrained(NANO)
    # Small pictures leave most of the time to the labels.
    processor.image_processor.size = {"height": 128, "width": 128}
    detector = Detector("nano", processor=processor, device="cpu")
    passes = []
    core = detector.model.model
    handle = core.backbone.register_forward_hook(lambda part, *_: passes.append(part))
    path = example_folder / "cat.jpg"
    found = detector(path, LABELS, threshold=0.0, multi_label=True, nms_threshold=1)
    assert passes == [core.backbone]
    encoded = detector.texts.encoded
    prompt = Vocabulary(LABELS).prompt(detector.processor.tokenizer, detector.processor.max_text_len)
    assert encoded == len(prompt.chunks) > 10
    detector(example_folder / "cup.jpg", LABELS)
    assert detector.texts.encoded == encoded
    assert passes == [core.backbone] * 2
    handle.remove()

    inputs = detector.processor(images=str(path))
    sides = torch.tensor([*found.size, *found.size])
    for chunk in prompt.chunks:
        with torch.no_grad():
            outputs = detector.model(**inputs, input_ids=torch.tensor([chunk.input_ids]))
        probabilities = outputs.logits[0].sigmoid()
        boxes = (cxcywh_to_xyxy(outputs.pred_boxes[0]).clamp(0, 1) * sides).numpy()
        for index, (start, end) in zip(chunk.label_indices, chunk.spans, strict=True):
            scores, order = probabilities[:, start:end].amax(-1).sort(descending=True)
            of_label = found.filter(labels=LABELS[index])
            np.testing.assert_allclose(of_label.scores, scores, atol=SCORE)
            np.testing.assert_allclose(of_label.boxes[0], boxes[order[0]], atol=PIXEL)
            assert found.presence[LABELS[index]] == pytest.approx(scores[0].item(), abs=SCORE)


@pytest.mark.slow
@pytest.mark.parametrize("count", [401, pytest.param(1203, marks=pytest.mark.soak)])
def test_memory_of_a_long_list_is_that_of_a_short_one(count, fresh_python):
    few, many = (int(fresh_python.run(PROGRAM, number).stdout) for number in (20, count))
    print(f"{few // 1024} MB with 20 labels, {many // 1024} MB with {count}")
    assert many <= 1.2 * few
