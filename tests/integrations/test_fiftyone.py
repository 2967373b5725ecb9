"""FiftyOne's loop for zero-shot detection models of transformers runs on our models. FiftyOne itself needs a database.

The functions below make the same calls in the same order as its wrapper: the processor with one list of classes per
picture, an entry of its own among the inputs, batches joined by shape, `.to` on every input, no prompt for
post-processing, and labels as indices into its classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, BatchFeature

import gdino_hf
from trained_checkpoint import BOXES, LABELS


@pytest.fixture(scope="module")
def gdino_folder(their_checkpoint, tmp_path_factory):
    """The checkpoint as users save it for FiftyOne: of the type gdino."""
    folder = tmp_path_factory.mktemp("gdino")
    gdino_hf.GDinoForObjectDetection.from_pretrained(their_checkpoint).save_pretrained(folder)
    gdino_hf.GDinoProcessor.from_pretrained(their_checkpoint).save_pretrained(folder)
    return folder


def prepared(processor: Any, images: list[Image.Image] | Image.Image) -> BatchFeature:
    pictures = images if isinstance(images, list) else [images]
    inputs = processor(images=images, text=[LABELS for _ in pictures], padding=True, return_tensors="pt")
    inputs.update({"fo_image_size": torch.tensor([(image.height, image.width) for image in pictures])})
    return inputs


def joined(batch: list[BatchFeature]) -> dict[str, torch.Tensor]:
    """Pad the tensors of several pictures to one shape and join them."""
    result = {}
    for name in batch[0].keys():  # noqa: SIM118
        sides = [max(sizes) for sizes in zip(*(inputs[name].shape for inputs in batch), strict=True)]
        padded = []
        for inputs in batch:
            missing = [side - own for side, own in zip(sides, inputs[name].shape, strict=True)]
            amounts = [amount for gap in reversed(missing) for amount in (0, gap)]
            padded.append(torch.nn.functional.pad(inputs[name], amounts))
        result[name] = torch.cat(padded)
    return result


def predicted(model: Any, processor: Any, inputs: Any, threshold: float) -> list[list[tuple[str, list[float]]]]:
    sizes = inputs.pop("fo_image_size")
    for name, value in inputs.items():
        inputs[name] = value.to("cpu")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=False)
    # It takes the other method where a processor has it, which knows no labels.
    assert not hasattr(processor, "post_process_object_detection")
    found = processor.post_process_grounded_object_detection(output, target_sizes=sizes, threshold=threshold)
    pictures = []
    for result, (height, width) in zip(found, sizes.tolist(), strict=True):
        boxes, labels, scores = (result[name].detach().cpu().numpy() for name in ("boxes", "labels", "scores"))
        assert (scores > threshold).all()
        relative = boxes / [width, height, width, height]
        pictures.append(sorted((LABELS[label], box.tolist()) for label, box in zip(labels, relative, strict=True)))
    return pictures


@pytest.mark.parametrize("way", ["list of pictures", "one at a time, then joined"])
def test_loop_finds_the_objects(way, gdino_folder, learned_picture):
    processor = AutoProcessor.from_pretrained(gdino_folder, use_fast=True, cache_dir=None)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(gdino_folder).eval()
    image = Image.open(learned_picture)
    images = [image, image.resize((192, 128))]
    if way == "list of pictures":
        inputs = prepared(processor, images)
    else:
        inputs = joined([prepared(processor, each) for each in images])
    assert all(isinstance(value, torch.Tensor) for value in inputs.values())
    for found in predicted(model, processor, inputs, 0.5):
        assert [label for label, _ in found] == LABELS
        for label, box in found:
            x, y, w, h = BOXES[label]
            assert box == pytest.approx([x / 96, y / 64, (x + w) / 96, (y + h) / 64], abs=0.02)


def test_prompts_can_be_embedded(gdino_folder):
    """What FiftyOne calls for text embeddings: the processor with text alone, and the base model's text features."""
    processor = AutoProcessor.from_pretrained(gdino_folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(gdino_folder)
    inputs = processor(text=["a cat"], padding=True, return_tensors="pt")
    features = model.base_model.get_text_features(**inputs.to("cpu"))
    assert features.last_hidden_state.shape[:2] == inputs["input_ids"].shape
