"""The stand-in processor reads text and returns results as transformers' processor does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from PIL import Image
from transformers import GroundingDinoProcessor as TheirProcessor
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

import gdino_hf
from gdino_hf import GDinoProcessor
from gdino_hf.integrations.stand_ins import GroundingDinoForObjectDetection, GroundingDinoProcessor
from trained_checkpoint import LABELS, tokenizer

SIZE = {"shortest_edge": 64, "longest_edge": 96}


@pytest.fixture(scope="module")
def theirs():
    return TheirProcessor(GroundingDinoImageProcessorPil(size=SIZE), tokenizer())


@pytest.fixture(scope="module")
def ours(theirs):
    return GroundingDinoProcessor(theirs.image_processor, theirs.tokenizer)


@pytest.fixture(scope="module")
def found(their_checkpoint, learned_picture, ours):
    """Inputs and outputs of our model for the picture it has learned."""
    model = GroundingDinoForObjectDetection.from_pretrained(their_checkpoint).eval()
    inputs = ours(Image.open(learned_picture), "a cat. a remote control.")
    with torch.no_grad():
        return inputs, model(**inputs)


@pytest.mark.parametrize(
    "text",
    [
        "a cat.",
        "a cat. a remote control.",
        "A cat . a dog .",
        "a cat, a dog, the tree.",
        ["a cat", "A remote control"],
        [["a cat", "a remote control"]],
        ["a cat. a remote control."],
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(text, ours, theirs):
    image = Image.new("RGB", (64, 64))
    expected = theirs(images=image, text=text, return_tensors="pt")
    inputs = ours(images=image, text=text, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_mask"):
        assert torch.equal(inputs[name].reshape(expected[name].shape), expected[name]), name
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)


def test_texts_of_two_images_are_padded_to_one_length(ours, theirs):
    images, texts = [Image.new("RGB", (64, 64))] * 2, ["a cat.", "a remote control. the tree."]
    expected = theirs(images=images, text=texts, return_tensors="pt", padding=True)
    inputs = ours(images=images, text=texts, return_tensors="pt", padding=True)
    assert torch.equal(inputs.input_ids, expected["input_ids"])
    # Also where the last period is missing, on which transformers' outputs depend.
    assert torch.equal(ours(images=images, text=["a cat. a dog", "a hat"]).input_ids[0, -2:], torch.tensor([1012, 102]))


def test_results_are_strings_for_every_way_to_call(ours, found):
    inputs, outputs = found
    calls = [
        ours.post_process_grounded_object_detection(outputs, inputs.input_ids, 0.4, 0.3, [(64, 96)]),
        ours.post_process_grounded_object_detection(outputs, input_ids=inputs.input_ids, target_sizes=[(64, 96)]),
        ours.post_process_grounded_object_detection(outputs, target_sizes=torch.tensor([[64, 96]])),
        ours.post_process_grounded_object_detection(outputs, target_sizes=[(64, 96)], text_labels=[["cat"]]),
        ours.post_process_grounded_object_detection(outputs, inputs, target_sizes=[(64, 96)]),
    ]
    with pytest.warns(FutureWarning, match="now called threshold"):
        calls.append(
            ours.post_process_grounded_object_detection(
                outputs, inputs.input_ids, box_threshold=0.4, text_threshold=0.3, target_sizes=[(64, 96)]
            )
        )
    for (result,) in calls:
        assert sorted(result["labels"]) == sorted(result["text_labels"]) == LABELS
        assert torch.equal(result["boxes"], calls[0][0]["boxes"])
        assert result["scores"].shape == (2,)


def test_text_threshold_drops_no_box_as_in_transformers(ours, theirs, found):
    """There, a box whose words all stay below text_threshold has an empty label; here it has its label."""
    inputs, outputs = found
    low = {"threshold": 0.5, "text_threshold": 0.9999, "target_sizes": [(64, 96)]}
    expected = theirs.post_process_grounded_object_detection(outputs, inputs.input_ids, **low)[0]
    result = ours.post_process_grounded_object_detection(outputs, inputs.input_ids, **low)[0]
    assert "" in expected["text_labels"]
    assert len(result["boxes"]) == len(expected["boxes"]) == 2
    assert sorted(result["labels"]) == LABELS


def test_labels_are_written_as_they_were_given(ours, theirs, their_checkpoint, learned_picture):
    """Tools compare them with the labels they asked for: SAHI drops a box whose label is "t - shirt" for "t-shirt"."""
    model = GroundingDinoForObjectDetection.from_pretrained(their_checkpoint).eval()
    image, labels = Image.open(learned_picture), ["A cat", "star-hat", "the sword, a dog", "the dog. hat", "a cat, on"]
    inputs = ours(images=[image, image], text=[labels, ["a remote control"]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    low = {"threshold": 0.0, "target_sizes": [(64, 96)] * 2}
    first, second = ours.post_process_grounded_object_detection(outputs, inputs.input_ids, **low)
    assert set(first["labels"]) <= {label.lower() for label in labels}
    assert set(second["labels"]) == {"a remote control"}
    # Prompts that it did not make are read from the tokens.
    fresh = GroundingDinoProcessor(ours.image_processor, ours.tokenizer)
    first, second = fresh.post_process_grounded_object_detection(outputs, inputs.input_ids, **low)
    assert set(first["labels"]) <= {
        "a cat",
        "star - hat",
        "the sword, a dog",
        "a cat, on",
        "the dog hat",
        "the dog",
        "hat",
    }
    assert set(second["labels"]) == {"a remote control"}


def test_few_prompts_are_kept(ours):
    processor = GroundingDinoProcessor(ours.image_processor, ours.tokenizer)
    for number in range(300):
        processor._keep((number,), ["a cat"])
    assert list(processor._words_of_tokens) == [(number,) for number in range(44, 300)]


def test_two_names_of_the_threshold_must_agree(ours, found):
    inputs, outputs = found
    with pytest.raises(ValueError, match="give one"):
        ours.post_process_grounded_object_detection(outputs, inputs.input_ids, threshold=0.2, box_threshold=0.3)


def test_processor_and_model_can_be_copied_pickled_and_saved(ours, found, tmp_path):
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is GroundingDinoProcessor
    assert type(copy.deepcopy(ours)) is GroundingDinoProcessor
    ours.save_pretrained(tmp_path)
    assert type(gdino_hf.GDinoProcessor.from_pretrained(tmp_path)) is GDinoProcessor
    assert ours.to_dict()["processor_class"] == "GDinoProcessor"
