"""The processor's output goes through the tools that cut, join, collate and move batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate.utils import concatenate, send_to_device, slice_tensors
from PIL import Image
from torch.utils.data import default_collate
from transformers import BatchFeature

from gdino_hf import GDinoProcessor
from random_models import make_random_model

ALL = {"threshold": 0.0, "text_threshold": 0.0}
# A batch of two and single images are different matrix products.
ROUNDING = 1e-4


def picture(width=80, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model(tiny_config):
    return make_random_model(tiny_config)


@pytest.fixture
def inputs(tiny_processor):
    return tiny_processor(images=[picture(seed=1), picture(seed=2)], text=[["cat", "dog"], ["hat", "remote control"]])


def texts(model, processor, inputs, prompts=None):
    with torch.no_grad():
        outputs = model(**inputs)
    return processor.post_process_grounded_object_detection(outputs, inputs if prompts is None else prompts, **ALL)


def test_every_value_is_a_tensor_that_the_processor_names(inputs, tiny_processor):
    assert set(inputs) == set(tiny_processor.model_input_names)
    assert all(isinstance(value, torch.Tensor) and len(value) == 2 for value in inputs.values())
    assert inputs["image_sizes"].dtype == torch.int64
    assert inputs["image_sizes"].tolist() == [[64, 80], [64, 80]]
    features = tiny_processor.image_processor([picture(), picture(50, 70)])
    assert set(features) == set(tiny_processor.image_processor.model_input_names)
    assert features["image_sizes"].tolist() == [[64, 80], [89, 64]]


def test_a_tensor_of_image_sizes_equals_a_list(model, tiny_processor):
    inputs = tiny_processor(images=[picture(80, 64, 1), picture(50, 70, 2)], text=["cat"])
    listed = {**inputs, "image_sizes": [tuple(size) for size in inputs["image_sizes"].tolist()]}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**listed).logits)


def test_a_slice_of_a_batch_gives_the_results_of_its_images(inputs, model, tiny_processor):
    whole = texts(model, tiny_processor, inputs)
    for place in range(2):
        part = slice_tensors(inputs, slice(place, place + 1))
        assert all(len(value) == 1 for value in part.values())
        (result,) = texts(model, tiny_processor, part)
        torch.testing.assert_close(result["scores"], whole[place]["scores"], rtol=0, atol=ROUNDING)
        assert set(result["text_labels"]) == set(whole[place]["text_labels"])


def test_single_items_concatenate_to_the_batch(inputs, tiny_processor):
    singles = [
        tiny_processor(images=picture(seed=1), text=["cat", "dog"]),
        tiny_processor(images=picture(seed=2), text=["hat", "cup"]),
    ]
    joined = concatenate(singles)
    expected = tiny_processor(images=[picture(seed=1), picture(seed=2)], text=[["cat", "dog"], ["hat", "cup"]])
    assert joined.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(joined[name], value), name


def test_single_items_collate_and_keep_their_own_labels(model, tiny_processor):
    items = [
        tiny_processor(images=picture(seed=1), text=["cat", "dog"]),
        tiny_processor(images=picture(seed=2), text=["hat", "cup"]),
    ]
    collated = default_collate(items)
    for name, value in collated.items():
        assert torch.equal(value, torch.stack([item[name] for item in items])), name
    # The copy that default_collate makes has the prompts of its first item only, which must not name the others.
    for name in list(collated):
        collated[name] = collated[name].flatten(0, 1)
    first, second = texts(model, tiny_processor, collated)
    assert set(first["text_labels"]) <= {"cat", "dog"}
    assert set(second["text_labels"]) <= {"hat", "cup"}
    rows = default_collate([{name: value[0] for name, value in item.items()} for item in items])
    assert torch.equal(rows["input_ids"], collated["input_ids"])


def test_a_loop_that_moves_and_measures_every_value(inputs, model, tiny_processor):
    moved = {name: value.to("cpu") for name, value in inputs.items()}
    assert all(value.shape[0] == 2 for value in moved.values())
    expected = texts(model, tiny_processor, inputs)
    for given in (moved, send_to_device(inputs, "cpu"), BatchFeature(moved)):
        for result, known in zip(texts(model, tiny_processor, given), expected, strict=True):
            assert torch.equal(result["scores"], known["scores"])
            assert result["text_labels"] == known["text_labels"]


def test_prompts_of_another_batch_are_not_used(inputs, tiny_processor):
    stale = copy.copy(inputs)
    stale["input_ids"] = inputs["input_ids"].flip(0)
    outputs = BatchFeature({"logits": torch.zeros(2, 3, 16), "pred_boxes": torch.full((2, 3, 4), 0.5)})
    outputs["logits"][:, :, 1] = 3
    first, second = tiny_processor.post_process_grounded_object_detection(outputs, stale)
    assert set(first["text_labels"]) == {"hat"}
    assert set(second["text_labels"]) == {"cat"}


def test_moving_labels_keeps_their_precision(tiny_processor):
    inputs = tiny_processor(
        images=picture(),
        text=["cat"],
        annotations={"annotations": [{"bbox": [8, 16, 40, 32], "category_id": 0}]},
    ).to("meta", torch.bfloat16)
    (label,) = inputs["labels"]
    assert {value.device.type for value in (*label.values(), inputs["pixel_values"])} == {"meta"}
    assert (label["boxes"].dtype, inputs["pixel_values"].dtype) == (torch.float32, torch.bfloat16)


def test_chunks_cut_from_their_image_are_refused(tiny_processor, tiny_tokenizer, model):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=6)
    inputs = processor(images=[picture(seed=1), picture(seed=2)], text=[["cat", "dog", "hat"], ["cup"]])
    with torch.no_grad(), pytest.raises(ValueError, match="names the images"):
        model(**slice_tensors(inputs, slice(0, 2)))
