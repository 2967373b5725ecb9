"""Images, labels and annotations in, boxes with the caller's labels out."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from gdino_hf import GDinoImageProcessor, GDinoProcessor
from random_models import make_random_model

# Batched and single matrix products, and prompts in another order, sum in another order.
ROUNDING = 1e-4
ALL = {"threshold": 0.0, "text_threshold": 0.0}


def picture(width=80, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model(tiny_config):
    """A random model whose scores and boxes depend on image and text."""
    return make_random_model(tiny_config)


def outputs_of(*rows, num_tokens=16):
    """Model outputs from, per row, queries as ({token: probability}, cxcywh box); other tokens score about 0."""
    logits = torch.full((len(rows), max(len(row) for row in rows), num_tokens), -20.0)
    boxes = torch.full((*logits.shape[:2], 4), 0.5)
    for r, row in enumerate(rows):
        for q, (tokens, box) in enumerate(row):
            for token, probability in tokens.items():
                logits[r, q, token] = torch.tensor(probability).logit()
            boxes[r, q] = torch.tensor(box)
    return SimpleNamespace(logits=logits, pred_boxes=boxes)


BOX = (0.5, 0.5, 0.2, 0.4)


def test_labels_in_every_form_give_one_prompt(tiny_processor):
    image = picture()
    expected = tiny_processor(images=image, text=["cat", "remote control"])
    for text in (
        ("cat", "remote control"),
        "cat. remote control.",
        "cat. remote control",
        [["cat", "remote control"]],
        ["cat. remote control."],
    ):
        inputs = tiny_processor(images=image, text=text)
        assert torch.equal(inputs["input_ids"], expected["input_ids"]), text
        assert inputs.prompts == expected.prompts, text


def test_inputs_have_the_shapes_the_model_takes(tiny_processor, tiny_tokenizer):
    inputs = tiny_processor(images=[picture(80, 64), picture(50, 70)], text=[["cat"], ["dog", "remote control"]])
    assert inputs["pixel_values"].shape == (2, 3, 89, 80)
    assert inputs["pixel_mask"].shape == (2, 89, 80)
    assert inputs["image_sizes"].tolist() == [[64, 80], [89, 64]]
    assert inputs.original_sizes == [(64, 80), (70, 50)]
    assert tiny_tokenizer.batch_decode(inputs["input_ids"]) == (
        ["[CLS] cat. [SEP] [PAD] [PAD] [PAD]", "[CLS] dog. remote control. [SEP]"]
    )
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert inputs["token_type_ids"].eq(0).all()
    assert "image_indices" not in inputs
    assert "prompts" not in inputs


def test_one_prompt_serves_every_image(tiny_processor):
    inputs = tiny_processor(images=[picture(seed=1), picture(seed=2)], text=["cat", "dog"])
    assert inputs["input_ids"].shape == (2, 6)
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
    assert [prompt.labels for prompt in inputs.prompts] == [("cat", "dog")] * 2


def test_closed_strings_are_captions_one_per_image(tiny_processor):
    inputs = tiny_processor(images=[picture(seed=1), picture(seed=2)], text=["cat. dog.", "hat."])
    assert [prompt.labels for prompt in inputs.prompts] == [("cat", "dog"), ("hat",)]
    # Three labels that end in a period, but two images.
    inputs = tiny_processor(images=[picture(seed=1), picture(seed=2)], text=["cat.", "dog.", "hat."])
    assert [prompt.labels for prompt in inputs.prompts] == [("cat.", "dog.", "hat.")] * 2


def test_images_and_text_can_be_prepared_apart(tiny_processor):
    both = tiny_processor(images=picture(), text=["cat"])
    images, text = tiny_processor(images=picture()), tiny_processor(text=["cat"])
    assert set(images) == {"pixel_values", "pixel_mask", "image_sizes"}
    assert set(text) == {"input_ids", "attention_mask", "token_type_ids"}
    assert torch.equal(images["pixel_values"], both["pixel_values"])
    assert torch.equal(text["input_ids"], both["input_ids"])


def test_text_prepared_once_names_the_boxes_of_many_images(tiny_processor):
    text = tiny_processor(text=["cat", "dog"])
    results = tiny_processor.post_process_grounded_object_detection(
        outputs_of([({1: 0.9}, BOX)], [({3: 0.8}, BOX)]), text
    )
    assert [result["text_labels"] for result in results] == [["cat"], ["dog"]]


def test_prompts_survive_moving_copying_and_pickling(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["Cat"])
    for other in (
        inputs.to("cpu"),
        inputs.to(torch.bfloat16),
        copy.deepcopy(inputs),
        pickle.loads(pickle.dumps(inputs)),
    ):
        assert other.prompts[0].labels == ("Cat",)
        assert other.original_sizes == [(64, 80)]
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


def test_labels_beyond_one_prompt_become_chunks(tiny_tokenizer, tiny_processor):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=9)
    inputs = processor(images=[picture(seed=1), picture(seed=2)], text=[["cat", "dog", "hat", "cup"], ["person"]])
    assert inputs["image_indices"].tolist() == [0, 0, 1]
    assert tiny_tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True) == (
        ["cat. dog. hat.", "cup.", "person."]
    )


def test_results_carry_label_index_and_score_best_first(tiny_processor):
    # [CLS] cat . remote control . dog . [SEP]: tokens 1, 3-4 and 6.
    inputs = tiny_processor(images=picture(), text=["Cat", "Remote Control", "dog"])
    outputs = outputs_of(
        [
            ({1: 0.6}, (0.25, 0.5, 0.5, 1.0)),
            ({3: 0.4, 4: 0.9, 1: 0.5}, (0.5, 0.5, 1.0, 1.0)),
            ({6: 0.2}, BOX),
            ({2: 0.99, 5: 0.99, 0: 0.99, 8: 0.99}, BOX),
        ]
    )
    (result,) = tiny_processor.post_process_grounded_object_detection(outputs, inputs, target_sizes=[(64, 80)])
    assert result["text_labels"] == ["Remote Control", "Cat"]
    assert result["labels"].tolist() == [1, 0]
    assert result["labels"].dtype == torch.int64
    torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.6]))
    torch.testing.assert_close(result["boxes"], torch.tensor([[0.0, 0.0, 80.0, 64.0], [0.0, 0.0, 40.0, 64.0]]))


def test_boxes_are_relative_without_target_sizes(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat"])
    (result,) = tiny_processor.post_process_grounded_object_detection(outputs_of([({1: 0.9}, BOX)]), inputs)
    torch.testing.assert_close(result["boxes"], torch.tensor([[0.4, 0.3, 0.6, 0.7]]))


@pytest.mark.parametrize("sizes", [[(10, 20)], torch.tensor([[10, 20]]), [[10, 20]], (10, 20)])
def test_target_sizes_in_every_form(sizes, tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat"])
    (result,) = tiny_processor.post_process_grounded_object_detection(
        outputs_of([({1: 0.9}, BOX)]), inputs, target_sizes=sizes
    )
    torch.testing.assert_close(result["boxes"], torch.tensor([[8.0, 3.0, 12.0, 7.0]]))


def test_thresholds_score_above_and_token_at_least(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["remote control"])
    outputs = outputs_of([({1: 0.5, 2: 0.25}, BOX)])

    def kept(**options):
        return len(tiny_processor.post_process_grounded_object_detection(outputs, inputs, **options)[0]["scores"])

    assert kept(threshold=0.49, text_threshold=0.25) == 1
    assert kept(threshold=0.51, text_threshold=0.25) == 0
    assert kept(threshold=0.3, text_threshold=0.51) == 0
    # The mean of the two tokens is 0.375.
    assert kept(threshold=0.37, text_threshold=0.49, score="mean") == 1
    assert kept(threshold=0.38, text_threshold=0.49, score="mean") == 0


def test_mean_score_is_the_mean_of_the_labels_tokens(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["remote control", "cat"])
    outputs = outputs_of([({1: 0.9, 2: 0.1, 4: 0.6}, BOX)])
    by_max = tiny_processor.post_process_grounded_object_detection(outputs, inputs)[0]
    by_mean = tiny_processor.post_process_grounded_object_detection(outputs, inputs, score="mean")[0]
    assert (by_max["text_labels"], by_mean["text_labels"]) == (["remote control"], ["cat"])
    torch.testing.assert_close(by_mean["scores"], torch.tensor([0.6]))


def test_negative_labels_compete_and_are_left_out(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat", "hat"], negative_labels=["dog"])
    outputs = outputs_of([({1: 0.6, 5: 0.7}, BOX), ({3: 0.6, 5: 0.5}, BOX)])
    (result,) = tiny_processor.post_process_grounded_object_detection(outputs, inputs)
    assert result["text_labels"] == ["hat"]
    (result,) = tiny_processor.post_process_grounded_object_detection(outputs, inputs, multi_label=True)
    assert sorted(result["text_labels"]) == ["cat", "hat"]


def test_multi_label_lets_a_query_name_several(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat", "dog"])
    outputs = outputs_of([({1: 0.8, 3: 0.7}, BOX)])
    assert tiny_processor.post_process_grounded_object_detection(outputs, inputs)[0]["text_labels"] == ["cat"]
    (result,) = tiny_processor.post_process_grounded_object_detection(outputs, inputs, multi_label=True)
    assert result["text_labels"] == ["cat", "dog"]


def test_nms_inside_labels_or_across_them(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat", "dog"])
    near = (0.51, 0.5, 0.2, 0.4)
    outputs = outputs_of([({1: 0.7}, near), ({1: 0.9}, BOX), ({3: 0.8}, near), ({1: 0.6}, (0.1, 0.1, 0.1, 0.1))])

    def scores(**options):
        result = tiny_processor.post_process_grounded_object_detection(outputs, inputs, **options)[0]
        return [round(score, 3) for score in result["scores"].tolist()]

    assert scores() == [0.9, 0.8, 0.7, 0.6]
    assert scores(nms_threshold=0.5) == [0.9, 0.8, 0.6]
    assert scores(nms_threshold=0.5, class_agnostic_nms=True) == [0.9, 0.6]
    assert scores(nms_threshold=0.99) == [0.9, 0.8, 0.7, 0.6]
    assert scores(nms_threshold=0.5, top_k=2, target_sizes=[(100, 100)]) == [0.9, 0.8]
    # A processor's own value holds where a call gives none.
    tiny_processor = GDinoProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, nms_threshold=0.5)
    assert scores() == [0.9, 0.8, 0.6]
    assert scores(class_agnostic_nms=True) == [0.9, 0.6]
    assert scores(nms_threshold=0.99) == scores(nms_threshold=1) == [0.9, 0.8, 0.7, 0.6]


def test_equal_boxes_are_kept_at_an_iou_of_one(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat"])
    outputs = outputs_of([({1: 0.7}, BOX), ({1: 0.9}, BOX)])
    for limit, number in ((1, 2), (1.0, 2), (0.999, 1), (None, 2)):
        (found,) = tiny_processor.post_process_grounded_object_detection(outputs, inputs, nms_threshold=limit)
        assert len(found["scores"]) == number


@pytest.mark.parametrize("value", [1.2, -0.1, "half", True])
def test_a_processors_own_iou_is_checked(value, tiny_processor):
    with pytest.raises(ValueError, match="nms_threshold must be"):
        GDinoProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, nms_threshold=value)


def test_chunks_of_an_image_are_one_result(tiny_tokenizer, tiny_processor):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=6)
    inputs = processor(images=[picture(seed=1), picture(seed=2)], text=[["cat", "dog", "Hat"], ["person"]])
    outputs = outputs_of([({1: 0.5, 3: 0.6}, BOX)], [({1: 0.9, 3: 0.99}, BOX)], [({1: 0.4}, BOX)])
    expected = [["Hat", "dog"], ["person"]]
    results = processor.post_process_grounded_object_detection(outputs, inputs, target_sizes=[(10, 10), (20, 20)])
    assert [result["text_labels"] for result in results] == expected
    assert [result["labels"].tolist() for result in results] == [[2, 1], [0]]
    torch.testing.assert_close(results[1]["boxes"], torch.tensor([[8.0, 6.0, 12.0, 14.0]]))
    # Without the prompts, the rows still say which image they are of.
    bare = processor.post_process_grounded_object_detection(outputs, dict(inputs))
    assert [result["text_labels"] for result in bare] == [["hat", "dog"], ["person"]]
    named = processor.post_process_grounded_object_detection(
        outputs, dict(inputs), text_labels=[["cat", "dog", "Hat"], ["person"]]
    )
    assert [result["text_labels"] for result in named] == expected


def test_phrases_are_read_from_the_tokens_of_other_processors(tiny_processor, tiny_tokenizer):
    encoded = tiny_tokenizer(["a cat. remote control.", "dog"], padding=True, return_tensors="pt")
    outputs = outputs_of([({5: 0.9}, BOX)], [({1: 0.8}, BOX)])
    outputs.input_ids = encoded["input_ids"]
    for inputs in (None, encoded, encoded["input_ids"]):
        results = tiny_processor.post_process_grounded_object_detection(outputs, inputs)
        assert [result["text_labels"] for result in results] == [["remote control"], ["dog"]]
    results = tiny_processor.post_process_grounded_object_detection(
        outputs, input_ids=encoded["input_ids"], text_labels=[["A cat", "Remote"], ["Dog!"]]
    )
    assert [result["text_labels"] for result in results] == [["Remote"], ["Dog!"]]
    with pytest.raises(ValueError, match=r"\[1, 1\] labels per image but the prompts have \[2, 1\]"):
        tiny_processor.post_process_grounded_object_detection(outputs, encoded, text_labels=["cat"])


def test_nothing_found_is_an_empty_result(tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat"])
    (result,) = tiny_processor.post_process_grounded_object_detection(
        outputs_of([({}, BOX)]), inputs, target_sizes=[(5, 5)], nms_threshold=0.5
    )
    assert result["scores"].shape == (0,)
    assert result["labels"].shape == (0,)
    assert result["boxes"].shape == (0, 4)
    assert result["text_labels"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must be within 0..1"),
        ({"text_threshold": -0.1}, "text_threshold must be within 0..1"),
        ({"nms_threshold": 2}, "nms_threshold must be within 0..1"),
        ({"score": "median"}, "score must be 'max' or 'mean'"),
        ({"target_sizes": [(1, 1), (2, 2)]}, "2 target_sizes for 1 images"),
    ],
)
def test_options_out_of_range_are_refused(options, message, tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat"])
    with pytest.raises(ValueError, match=message):
        tiny_processor.post_process_grounded_object_detection(outputs_of([({1: 0.9}, BOX)]), inputs, **options)


def test_outputs_of_another_batch_are_refused(tiny_processor):
    inputs = tiny_processor(images=[picture(), picture()], text=[["cat"], ["dog"]])
    with pytest.raises(ValueError, match="2 prompts but the outputs 1"):
        tiny_processor.post_process_grounded_object_detection(outputs_of([({1: 0.9}, BOX)]), inputs)


BBOX = [8, 16, 40, 32]
RELATIVE = [0.35, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("item", "categories"),
    [
        ({"category_id": 1}, None),
        ({"category_id": 17}, [{"id": 17, "name": "dog"}, {"id": 3, "name": "zebra"}]),
        ({"category_id": 17}, {17: "Dog", 3: "zebra"}),
        ({"label": "dog"}, None),
        ({"category": " DOG "}, None),
        ({"label": "dog", "category_id": 99}, {17: "cat"}),
    ],
    ids=["index", "coco-categories", "mapping", "label", "category", "name-first"],
)
def test_annotations_name_a_label_of_the_image(item, categories, tiny_processor):
    inputs = tiny_processor(
        images=picture(),
        text=["cat", "Dog"],
        annotations={"image_id": 1, "annotations": [{"bbox": BBOX, **item}]},
        categories=categories,
    )
    (label,) = inputs["labels"]
    assert label["class_labels"].tolist() == [1]
    torch.testing.assert_close(label["boxes"], torch.tensor([RELATIVE]))


def test_class_labels_index_each_images_own_labels(tiny_processor):
    inputs = tiny_processor(
        images=[picture(seed=1), picture(seed=2), picture(seed=3)],
        text=[["cat", "dog"], ["hat", "dog", "cat"], ["cup"]],
        annotations=[
            {"annotations": [{"bbox": BBOX, "label": "dog"}, {"bbox": BBOX, "label": "cat"}]},
            {"annotations": [{"bbox": BBOX, "label": "cat"}]},
            {"annotations": []},
        ],
    )
    assert [label["class_labels"].tolist() for label in inputs["labels"]] == [[1, 0], [2], []]
    assert inputs["labels"][2]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("item", "categories", "message"),
    [
        ({"category_id": 2}, None, "not an index of the image's 2 labels; pass categories="),
        ({"category_id": -1}, None, "not an index of the image's 2 labels"),
        ({"category_id": 5}, {4: "cat"}, "not among the categories"),
        ({"category_id": 4}, {4: "zebra"}, "'zebra' is not among the image's labels; add it"),
        ({"label": "zebra"}, None, "'zebra' is not among the image's labels"),
        ({}, None, "neither category_id nor label"),
        ({"category_id": 0, "bbox": [1, 2, -3, 4]}, None, "negative width or height"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused(item, categories, message, tiny_processor):
    with pytest.raises(ValueError, match=message):
        tiny_processor(
            images=picture(),
            text=["cat", "dog"],
            annotations=[{"annotations": [{"bbox": BBOX, **item}]}],
            categories=categories,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to prepare"),
        ({"images": [picture()], "text": []}, "list of labels is empty"),
        ({"images": [picture()], "text": ""}, "names nothing"),
        ({"images": [picture()], "text": [""]}, "Label 0 is empty"),
        ({"images": [picture()], "text": [[]]}, "list of labels is empty"),
        ({"images": [picture()], "text": ["cat", "x" * 10_000]}, "has 10000 characters"),
        ({"images": [picture()] * 3, "text": [["cat"], ["dog"]]}, "labels for 2 images but 3 images"),
        ({"images": [], "text": ["cat"]}, "list of images is empty"),
        ({"images": [np.full((4, 4, 3), np.nan)], "text": ["cat"]}, "not finite"),
        ({"images": [picture()], "annotations": [{"annotations": []}]}, "annotations need images and text"),
        ({"images": [picture()], "text": ["cat"], "annotations": [{}, {}]}, "2 annotations for 1 images"),
        ({"images": [picture()], "text": ["cat"], "annotations": [{}]}, "the list 'annotations'"),
        ({"images": [picture()], "text": ["cat"], "negative_labels": ["..."]}, "nothing to look for"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message, tiny_processor):
    with pytest.raises(ValueError, match=message):
        tiny_processor(**arguments)


@pytest.mark.parametrize("text", [3, [3], [["cat", None]], [["cat"], 3]])
def test_text_of_another_type_is_refused(text, tiny_processor):
    with pytest.raises(TypeError, match="a string or a list of strings"):
        tiny_processor(images=[picture(), picture()], text=text)


def test_saving_and_loading_keeps_everything(tmp_path, tiny_processor, tiny_tokenizer):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=48, nms_threshold=0.4)
    processor.save_pretrained(tmp_path)
    for loaded in (GDinoProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is GDinoProcessor
        assert type(loaded.image_processor) is GDinoImageProcessor
        assert (loaded.max_text_len, loaded.nms_threshold) == (48, 0.4)
        ours, theirs = (p(images=picture(), text=["Cat", "hat"]) for p in (processor, loaded))
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_folder_of_a_grounding_dino_checkpoint_is_read(tmp_path, tiny_tokenizer):
    size = {"shortest_edge": 64, "longest_edge": 96}
    GroundingDinoImageProcessorPil(size=size).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    processor = GDinoProcessor.from_pretrained(tmp_path)
    assert type(processor.image_processor) is GDinoImageProcessor
    assert processor.image_processor.size == size
    assert processor(images=picture(), text=["cat"])["pixel_values"].shape == (1, 3, 64, 80)


def test_custom_code_loads_where_the_package_is_absent(tmp_path, tiny_processor, monkeypatch, fresh_python):
    monkeypatch.setattr(GDinoProcessor, "_auto_class", "AutoProcessor")
    monkeypatch.setattr(GDinoImageProcessor, "_auto_class", "AutoImageProcessor")
    tiny_processor.save_pretrained(tmp_path / "model")
    program = """
import sys, torch
sys.modules["gdino_hf"] = None
from PIL import Image
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(images=Image.open(sys.argv[2]), text=["Cat", "remote control"])
torch.save({name: inputs[name] for name in ("pixel_values", "input_ids")}, sys.argv[3])
"""
    picture().save(tmp_path / "picture.png")
    files = [str(tmp_path / name) for name in ("model", "picture.png", "inputs.pt")]
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = fresh_python.run(program, *files, environment=modules, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(files[2])
    ours = tiny_processor(images=picture(), text=["Cat", "remote control"])
    for name, value in theirs.items():
        assert torch.equal(value, ours[name])


def detect(model, processor, images, text):
    inputs = processor(images=images, text=text)
    with torch.no_grad():
        outputs = model(**inputs)
    return processor.post_process_grounded_object_detection(
        outputs, inputs, target_sizes=inputs.original_sizes, multi_label=True, **ALL
    )


def assert_same_boxes(first, second):
    """The same boxes and scores for every label, whatever the label's place."""
    assert set(first["text_labels"]) == set(second["text_labels"])
    for name in set(first["text_labels"]):
        sides = []
        for result in (first, second):
            mine = [index for index, label in enumerate(result["text_labels"]) if label == name]
            rows = torch.cat((result["scores"][mine, None], result["boxes"][mine] / 100), dim=1)
            # Equal up to rounding may sort differently by score; the first corner tells the boxes apart.
            sides.append(rows[rows[:, 1].argsort()])
        torch.testing.assert_close(*sides, rtol=0, atol=ROUNDING)


def test_order_of_labels_does_not_matter(model, tiny_processor):
    labels = ["cat", "remote control", "dog", "red hat", "person"]
    first = detect(model, tiny_processor, picture(), labels)[0]
    for order in ([4, 3, 2, 1, 0], [2, 0, 3, 1, 4]):
        assert_same_boxes(first, detect(model, tiny_processor, picture(), [labels[i] for i in order])[0])


def test_last_period_does_not_matter(model, tiny_processor):
    first = detect(model, tiny_processor, picture(), "cat. remote control.")[0]
    second = detect(model, tiny_processor, picture(), "cat. remote control")[0]
    assert torch.equal(first["scores"], second["scores"])
    assert torch.equal(first["boxes"], second["boxes"])


def test_batch_of_mixed_labels_and_sizes_equals_singles(model, tiny_processor):
    images, texts = [picture(80, 64, 1), picture(50, 70, 2)], [["cat"], ["remote control", "dog", "hat"]]
    together = detect(model, tiny_processor, images, texts)
    for image, text, result in zip(images, texts, together, strict=True):
        assert_same_boxes(result, detect(model, tiny_processor, image, text)[0])


@pytest.mark.parametrize("size", [(1, 1), (10_000, 8), (8, 10_000), (3, 2)])
def test_tiny_and_extreme_pictures_go_through_the_model(size, model, tiny_processor):
    (result,) = detect(model, tiny_processor, Image.new("RGB", size, (200, 30, 30)), ["cat"])
    assert len(result["scores"]) == model.config.num_queries
    assert result["boxes"].isfinite().all()


def test_loss_from_annotations(model, tiny_processor):
    inputs = tiny_processor(
        images=[picture(seed=1), picture(50, 70, 2)],
        text=[["cat", "dog"], ["hat"]],
        annotations=[{"annotations": [{"bbox": BBOX, "label": "dog"}]}, {"annotations": []}],
    )
    assert model(**inputs).loss.isfinite()


def test_a_negative_label_competes_in_every_chunk(tiny_tokenizer, tiny_processor):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=6)
    inputs = processor(images=picture(), text=["cat", "cup"], negative_labels=["dog"])
    assert inputs["image_indices"].tolist() == [0, 0]
    # [CLS] cat . dog . [SEP] and [CLS] cup . dog . [SEP]: the negative label wins the first box of both.
    row = [({1: 0.6, 3: 0.9}, BOX), ({1: 0.5, 3: 0.2}, BOX)]
    (result,) = processor.post_process_grounded_object_detection(outputs_of(row, row), inputs)
    assert result["text_labels"] == ["cat", "cup"]
    torch.testing.assert_close(result["scores"], torch.tensor([0.5, 0.5]))
    (result,) = processor.post_process_grounded_object_detection(
        outputs_of(row, row), inputs, nms_threshold=0.5, class_agnostic_nms=True
    )
    assert result["text_labels"] == ["cat"]


def test_chunks_prepared_without_the_images_lose_none_in_silence(tiny_tokenizer, tiny_processor, model):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_tokenizer, max_text_len=6)
    text = processor(text=["cat", "dog", "hat"])
    one, two = processor(images=picture()), processor(images=[picture(seed=1), picture(seed=2)])
    with torch.no_grad():
        assert model(**one, **text).logits.shape[0] == 2
        with pytest.raises(ValueError, match=r"names the images \[0\] but there are 2.*in one call"):
            model(**two, **text)


@pytest.mark.parametrize("options", [{"size": {"height": 32, "width": 48}}, {"do_normalize": False}])
def test_options_of_images_may_come_in_a_group(options, tiny_processor):
    flat = tiny_processor(images=picture(), text=["cat"], **options)
    grouped = tiny_processor(images=picture(), text=["cat"], images_kwargs=options)
    plain = tiny_processor(images=picture(), text=["cat"])
    assert torch.equal(flat["pixel_values"], grouped["pixel_values"])
    assert not torch.equal(plain["pixel_values"].mean(), grouped["pixel_values"].mean())


@pytest.mark.parametrize("options", [{"sise": 1}, {"resize": 1}, {"images_kwargs": {"sise": 1}}, {"do_center_crop": 1}])
@pytest.mark.parametrize("images", [None, picture()], ids=["text", "images"])
def test_unknown_options_are_refused(images, options, tiny_processor):
    with pytest.raises(
        TypeError, match=r"no option '(sise|resize|do_center_crop)'; the options of images are do_normalize"
    ):
        tiny_processor(images=images, text=["cat"], **options)


@pytest.mark.parametrize("text", [["cat", None], b"cat", ["cat", b"dog"], [["cat"], None], 3])
def test_text_of_another_type_is_named(text, tiny_processor):
    with pytest.raises(TypeError, match=r"Labels must be a string or a list of strings, got (None|b'|3)"):
        tiny_processor(images=picture(), text=text)


def test_target_sizes_may_be_a_list_of_tensors(tiny_processor):
    inputs = tiny_processor(images=[picture(seed=1), picture(seed=2)], text=["cat"])
    outputs = outputs_of([({1: 0.9}, BOX)], [({1: 0.9}, BOX)])
    sizes = [torch.tensor([10, 20]), torch.tensor([100, 200])]
    results = tiny_processor.post_process_grounded_object_detection(outputs, inputs, target_sizes=sizes)
    for result, boxes in zip(results, ([8.0, 3.0, 12.0, 7.0], [80.0, 30.0, 120.0, 70.0]), strict=True):
        torch.testing.assert_close(result["boxes"], torch.tensor([boxes]))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"category_id": 0}, "has no bbox"),
        ({"category_id": None, "bbox": BBOX}, "category_id None is not a whole number"),
        ({"category_id": 0.5, "bbox": BBOX}, "category_id 0.5 is not a whole number"),
        ({"label": "Dog", "bbox": BBOX}, "'Dog' is a negative label"),
    ],
)
def test_annotations_that_cannot_be_used_say_why(item, message, tiny_processor):
    with pytest.raises(ValueError, match=message):
        tiny_processor(images=picture(), text=["cat"], negative_labels=["dog"], annotations={"annotations": [item]})
