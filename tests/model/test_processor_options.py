"""Options of the processor's call: followed, refused with a sentence, or given twice."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import TensorType

from gdino_hf import GDinoProcessor
from random_models import make_random_model


def picture(width=80, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("given", [{"max_length": 12}, {"text_kwargs": {"max_length": 12, "padding": "max_length"}}])
def test_padding_to_a_length_changes_no_token(given, tiny_processor, tiny_config):
    given = given if "text_kwargs" in given else {"padding": "max_length", **given}
    plain = tiny_processor(images=picture(), text=["cat", "dog"])
    padded = tiny_processor(images=picture(), text=["cat", "dog"], **given)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == padded["token_type_ids"].shape == (1, 12)
    assert padded["attention_mask"].sum() == plain["attention_mask"].sum() == 6
    assert torch.equal(padded["input_ids"][:, :6], plain["input_ids"])
    assert (padded["input_ids"][:, 6:] == tiny_processor.tokenizer.pad_token_id).all()
    model = make_random_model(tiny_config)
    with torch.no_grad():
        first, second = (model(**inputs).logits[..., :6] for inputs in (plain, padded))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


def test_padding_without_a_length_is_that_of_the_processor(tiny_processor, tiny_tokenizer):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=40)
    assert processor(text=["cat"], padding="max_length")["input_ids"].shape == (1, 40)
    assert processor(text=["cat"], pad_to_multiple_of=8)["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match="padded to 64 tokens but the model takes 40"):
        processor(text=["cat"], padding="max_length", max_length=64)


def test_a_tokenizer_made_with_padding_sets_the_default(tiny_processor, tiny_folder):
    processor = GDinoProcessor.from_pretrained(tiny_folder, padding="max_length", max_length=17)
    assert processor(text=["cat"])["input_ids"].shape == (1, 17)
    assert processor(text=["cat"], padding=True)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("truncation", [True, "longest_first"])
def test_truncation_never_cuts_a_label(truncation, tiny_processor):
    plain = tiny_processor(text=["cat", "dog"])
    kept = tiny_processor(text=["cat", "dog"], truncation=truncation, max_length=6)
    assert torch.equal(kept["input_ids"], plain["input_ids"])
    assert torch.equal(
        tiny_processor(text=["cat"], truncation=truncation)["input_ids"][:, :2], plain["input_ids"][:, :2]
    )
    with pytest.raises(ValueError, match="has 6 tokens but max_length is 5; labels are never cut"):
        tiny_processor(text=["cat", "dog"], truncation=truncation, max_length=5)
    with pytest.raises(ValueError, match="has 6 tokens but max_length is 3; labels are never cut"):
        tiny_processor(text=["cat", "dog"], padding="max_length", max_length=3)
    assert tiny_processor(text=["cat", "dog"], truncation=False, max_length=3)["input_ids"].shape == (1, 6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("add_special_tokens", False),
        ("padding_side", "left"),
        ("return_offsets_mapping", True),
        ("is_split_into_words", True),
        ("stride", 2),
        ("padding", "longest_first"),
        ("max_length", 0),
        ("pad_to_multiple_of", 2.5),
    ],
)
def test_options_that_a_prompt_cannot_follow_are_refused(option, value, tiny_processor):
    with pytest.raises(ValueError, match=option):
        tiny_processor(text=["cat"], **{option: value})


def test_columns_that_are_not_wanted_are_left_out(tiny_processor):
    assert set(tiny_processor(text=["cat"], return_token_type_ids=False, verbose=True)) == {
        *("input_ids", "attention_mask")
    }
    assert set(tiny_processor(text=["cat"], return_attention_mask=False)) == {"input_ids", "token_type_ids"}
    with pytest.raises(ValueError, match="would read padding as words"):
        tiny_processor(text=[["cat"], ["cat", "dog"]], return_attention_mask=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_normalize": True, "images_kwargs": {"do_normalize": False}}, "'do_normalize' is given twice"),
        ({"size": 64, "images_kwargs": {"size": 64}}, "'size' is given twice, by itself and in images_kwargs"),
        ({"padding": "max_length", "text_kwargs": {"padding": False}}, "'padding' is given twice"),
        ({"return_tensors": "pt", "text_kwargs": {"return_tensors": "np"}}, "'return_tensors' is given twice"),
        ({"return_tensors": "pt", "common_kwargs": {"return_tensors": "np"}}, "'np' in common_kwargs but 'pt'"),
        ({"images_kwargs": {"return_tensors": "np"}, "text_kwargs": {"return_tensors": "pt"}}, "'np' in one place"),
        ({"do_pad": True, "common_kwargs": {"do_pad": False}}, "'do_pad' is False in common_kwargs but True"),
    ],
)
def test_an_option_given_twice_is_refused(given, message, tiny_processor):
    with pytest.raises(ValueError, match=message):
        tiny_processor(images=picture(), text=["cat"], **given)


def test_common_options_that_agree_are_accepted(tiny_processor):
    plain = tiny_processor(images=picture(), text=["cat"])
    given = {"common_kwargs": {"return_tensors": "pt"}, "return_tensors": "pt", "text_kwargs": {}}
    inputs = tiny_processor(images=picture(), text=["cat"], **given)
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])
    halved = tiny_processor(images=picture(), text=["cat"], common_kwargs={"do_rescale": False})
    assert not torch.equal(halved["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("given", [{"text_kwargs": {"size": 3}}, {"images_kwargs": {"padding": True}}, {"paddin": 1}])
def test_options_of_the_wrong_kind_are_unknown(given, tiny_processor):
    with pytest.raises(TypeError, match="There is no option"):
        tiny_processor(images=picture(), text=["cat"], **given)
    with pytest.raises(TypeError, match="text_kwargs must be a dict"):
        tiny_processor(text=["cat"], text_kwargs=[1])


@pytest.mark.parametrize("kind", ["np", TensorType.NUMPY])
def test_numpy_arrays_equal_the_tensors(kind, tiny_processor):
    given = {
        "images": [picture(80, 64, 1), picture(50, 70, 2)],
        "text": ["cat", "dog"],
        "annotations": [{"image_id": 7, "annotations": [{"bbox": [8, 16, 40, 32], "category_id": 0}]}] * 2,
    }
    arrays, tensors = tiny_processor(**given, return_tensors=kind), tiny_processor(**given)
    assert arrays.keys() == tensors.keys()
    for name in set(arrays) - {"labels"}:
        assert isinstance(arrays[name], np.ndarray)
        assert np.array_equal(arrays[name], tensors[name].numpy()), name
    for first, second in zip(arrays["labels"], tensors["labels"], strict=True):
        assert all(np.array_equal(first[name], value.numpy()) for name, value in second.items())


def test_plain_lists_need_no_common_size(tiny_processor):
    given = {"images": [picture(80, 64, 1), picture(50, 70, 2)], "text": [["cat"], ["cat", "dog"]]}
    tensors = tiny_processor(**given)
    lists = tiny_processor(**given, return_tensors=None)
    assert lists["input_ids"] == tensors["input_ids"].tolist()
    assert lists["image_sizes"] == tensors["image_sizes"].tolist()
    assert [x.shape for x in lists["pixel_values"]] == [(3, 89, 80)] * 2
    ragged = tiny_processor(**given, return_tensors=None, do_pad=False, padding=False)
    assert [x.shape for x in ragged["pixel_values"]] == [(3, 64, 80), (3, 89, 64)]
    assert [len(row) for row in ragged["input_ids"]] == [len(row) for row in ragged["attention_mask"]] == [4, 6]
    with pytest.raises(ValueError, match=r"Prompts of \[4, 6\] tokens do not stack; set padding=True"):
        tiny_processor(**given, padding=False)


def test_labels_carry_sizes_and_areas(tiny_processor):
    items = [
        {"bbox": [8, 16, 40, 32], "label": "dog", "area": 640},
        {"bbox": [0, 0, 80, 64], "label": "cat", "iscrowd": 1},
    ]
    given = {"images": picture(160, 128), "text": ["cat", "dog"], "annotations": {"image_id": 5, "annotations": items}}
    (label,) = tiny_processor(**given)["labels"]
    assert {name: value.tolist() for name, value in label.items() if name != "boxes"} == {
        "class_labels": [1],
        "area": [160.0],
        "iscrowd": [0],
        "orig_size": [128, 160],
        "size": [64, 80],
        "image_id": [5],
    }
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.175, 0.25, 0.25, 0.25]]))
    (label,) = tiny_processor(**given, do_convert_annotations=False)["labels"]
    assert label["boxes"].tolist() == [[4.0, 8.0, 24.0, 24.0]]


def test_nested_pictures_are_one_batch(tiny_processor):
    images = [picture(seed=1), picture(seed=2)]
    nested = tiny_processor(images=[[images[0]], [images[1]]], text=[["cat"], ["dog"]])
    flat = tiny_processor(images=images, text=[["cat"], ["dog"]])
    assert all(torch.equal(nested[name], value) for name, value in flat.items())


def test_box_threshold_is_a_deprecated_name(tiny_processor):
    inputs = tiny_processor(text=["cat"])
    outputs = SimpleNamespace(logits=torch.full((1, 2, 4), -9.0), pred_boxes=torch.full((1, 2, 4), 0.5))
    outputs.logits[0, 0, 1] = torch.tensor(0.9).logit()
    outputs.logits[0, 1, 1] = torch.tensor(0.4).logit()

    def kept(**options):
        return len(tiny_processor.post_process_grounded_object_detection(outputs, inputs, **options)[0]["scores"])

    with pytest.warns(FutureWarning, match="box_threshold is now called threshold"):
        assert kept(box_threshold=0.5) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (kept(), kept(threshold=0.5)) == (2, 1)
    with pytest.raises(ValueError, match=r"threshold 0\.3 and box_threshold 0\.5 differ"):
        kept(threshold=0.3, box_threshold=0.5)
