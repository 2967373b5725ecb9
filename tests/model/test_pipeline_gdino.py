"""The zero-shot pipeline: one forward for all labels, stock results, and other models left alone."""

from __future__ import annotations

import base64
import copy
import io

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForZeroShotObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    ZeroShotObjectDetectionPipeline,
    pipeline,
)

from gdino_hf import (
    GDinoForObjectDetection,
    GDinoProcessor,
    GDinoZeroShotObjectDetectionPipeline,
    register_auto_classes,
)
from random_models import make_random_model

TASK = "zero-shot-object-detection"
# The random model's scores lie near one half; this keeps every box.
ALL = {"threshold": 0.0}
# Batched and single matrix products sum in another order.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def model(tiny_config):
    """A random model whose scores and boxes depend on image and text."""
    return make_random_model(tiny_config)


@pytest.fixture(scope="module")
def detector(model, tiny_processor):
    return pipeline(TASK, model=model, processor=tiny_processor, device="cpu")


@pytest.fixture(scope="module")
def precise_detector(model, tiny_processor):
    """The detector in float64; in float32, rounding decides which of two nearly equal proposals is selected."""
    return pipeline(TASK, model=copy.deepcopy(model).double(), processor=tiny_processor, device="cpu")


def picture(width=80, height=64, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def assert_same_results(first, second):
    assert [(x["label"], x["box"]) for x in first] == [(x["label"], x["box"]) for x in second]
    torch.testing.assert_close(
        torch.tensor([x["score"] for x in first]), torch.tensor([x["score"] for x in second]), rtol=0, atol=ROUNDING
    )


def count_forwards(model):
    calls = []
    return calls, model.register_forward_pre_hook(lambda *_: calls.append(1))


def test_eighty_labels_are_one_forward(detector):
    things = ["cat", "dog", "cup", "hat", "car", "bed", "cow", "pig", "bus", "fox"]
    labels = [f"{letter} {thing}" for letter in "abcdefgh" for thing in things]
    assert len(labels) == 80
    calls, handle = count_forwards(detector.model)
    try:
        results = detector(picture(), candidate_labels=labels, **ALL)
    finally:
        handle.remove()
    assert calls == [1]
    assert results
    assert {result["label"] for result in results} <= set(labels)


def test_results_have_the_stock_format_best_first(detector):
    results = detector(picture(), candidate_labels=["Cat", "remote control"], **ALL)
    assert len(results) == detector.model.config.num_queries
    for result in results:
        assert set(result) == {"score", "label", "box"}
        assert isinstance(result["score"], float)
        assert result["label"] in ("Cat", "remote control")
        assert set(result["box"]) == {"xmin", "ymin", "xmax", "ymax"}
        assert all(isinstance(value, int) for value in result["box"].values())
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)


def test_pipeline_equals_processor_and_model_by_hand(detector, model, tiny_processor):
    image, labels = picture(), ["cat", "remote control"]
    inputs = tiny_processor(images=image, text=labels)
    with torch.no_grad():
        outputs = model(**inputs)
    expected = tiny_processor.post_process_grounded_object_detection(
        outputs, inputs, threshold=0.0, text_threshold=0.0, target_sizes=[(image.height, image.width)]
    )[0]
    results = detector(image, candidate_labels=labels, **ALL)
    assert [result["label"] for result in results] == expected["text_labels"]
    assert [list(result["box"].values()) for result in results] == expected["boxes"].int().tolist()


def test_threshold_and_top_k_cut_the_results(detector):
    everything = detector(picture(), candidate_labels=["cat", "dog"], **ALL)
    middle = everything[10]["score"]
    assert len(detector(picture(), candidate_labels=["cat", "dog"], threshold=middle)) == 10
    assert detector(picture(), candidate_labels=["cat", "dog"], top_k=3, **ALL) == everything[:3]
    assert detector(picture(), candidate_labels=["cat", "dog"], threshold=1.0) == []


def test_labels_may_be_a_string(detector):
    expected = detector(picture(), candidate_labels=["cat", "remote control"], **ALL)
    assert detector(picture(), candidate_labels="cat, remote control", **ALL) == expected
    assert detector(picture(), candidate_labels="cat. remote control.", **ALL) == expected


def test_negative_labels_compete_and_are_left_out(detector):
    results = detector(picture(), candidate_labels=["cat"], negative_labels=["dog", "cup"], **ALL)
    rivals = detector(picture(), candidate_labels=["cat", "dog", "cup"], **ALL)
    assert results == [result for result in rivals if result["label"] == "cat"]
    assert len(results) < len(rivals)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_of_mixed_sizes_and_labels_equal_singles(precise_detector, batch_size):
    detector = precise_detector
    items = [
        {"image": picture(80, 64, 1), "candidate_labels": ["cat", "dog"]},
        {"image": picture(64, 96, 2), "candidate_labels": ["remote control", "hat", "cup"]},
        {"image": picture(50, 50, 3), "candidate_labels": ["person"]},
    ]
    calls, handle = count_forwards(detector.model)
    try:
        together = detector(items, batch_size=batch_size, **ALL)
    finally:
        handle.remove()
    assert len(calls) == -(-len(items) // batch_size)
    assert len(together) == 3
    for item, result in zip(items, together, strict=True):
        assert_same_results(result, detector(item, **ALL))


def test_list_of_images_shares_its_labels(precise_detector):
    detector = precise_detector
    images = [picture(80, 64, 1), picture(64, 96, 2)]
    together = detector(images, candidate_labels=["cat", "dog"], batch_size=2, **ALL)
    for image, result in zip(images, together, strict=True):
        assert_same_results(result, detector(image, candidate_labels=["cat", "dog"], **ALL))


def test_labels_beyond_one_prompt_still_take_one_forward(model, tiny_processor):
    detector = pipeline(TASK, model=model, processor=tiny_processor, device="cpu")
    assert detector.processor.max_text_len == model.config.max_text_len == 64
    assert tiny_processor.max_text_len == 256
    labels = [f"{x} {y}" for x in "abcde" for y in "uvwxyz"]
    images = [picture(80, 64, 1), picture(64, 96, 2)]
    calls, handle = count_forwards(model)
    try:
        together = detector(images, candidate_labels=labels, batch_size=2, **ALL)
    finally:
        handle.remove()
    assert calls == [1]
    assert {x["label"] for x in together[0]} & set(labels[:10])
    assert {x["label"] for x in together[0]} & set(labels[-10:])
    assert_same_results(together[1], detector(images[1], candidate_labels=labels, **ALL))


def test_a_folder_is_enough(tiny_folder):
    detector = pipeline(TASK, model=str(tiny_folder), device="cpu")
    assert type(detector) is GDinoZeroShotObjectDetectionPipeline
    assert isinstance(detector.model, GDinoForObjectDetection)
    assert detector(picture(), candidate_labels=["cat"], **ALL)


def test_a_model_in_memory_finds_the_processor_of_its_folder(tiny_folder):
    model = AutoModelForZeroShotObjectDetection.from_pretrained(tiny_folder)
    detector = pipeline(TASK, model=model, device="cpu")
    assert detector(picture(), candidate_labels=["cat"], **ALL)


def test_a_model_without_any_processor_is_a_clear_error(model):
    with pytest.raises(ValueError, match="pass processor="):
        pipeline(TASK, model=model, device="cpu")


def test_registering_twice_changes_nothing(model, tiny_processor):
    register_auto_classes()
    register_auto_classes()
    assert type(pipeline(TASK, model=model, processor=tiny_processor, device="cpu")) is (
        GDinoZeroShotObjectDetectionPipeline
    )


@pytest.fixture(scope="module")
def owlvit_folder(tmp_path_factory):
    from transformers import CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("owlvit")
    config = OwlViTConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    OwlViTForObjectDetection(config).save_pretrained(folder)
    OwlViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    # Id 0 first in a query would mean that the query is padding.
    tokens = ["!", "<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{x}</w>" for x in "abcdegot")]
    tokenizer = CLIPTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    return folder


def test_owlvit_still_gets_the_stock_pipeline(owlvit_folder):
    detector = pipeline(TASK, model=str(owlvit_folder), device="cpu")
    assert type(detector) is ZeroShotObjectDetectionPipeline
    calls, handle = count_forwards(detector.model)
    try:
        results = detector(picture(), candidate_labels=["cat", "dog"], threshold=0.0)
    finally:
        handle.remove()
    assert calls == [1, 1]
    assert {result["label"] for result in results} == {"cat", "dog"}


def test_owlvit_without_tokenizer_says_so(owlvit_folder, tmp_path):
    OwlViTForObjectDetection.from_pretrained(owlvit_folder).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        pipeline(TASK, model=str(tmp_path), device="cpu")


def test_broken_image_is_named(detector, tmp_path):
    path = tmp_path / "note.jpg"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"note\.jpg"):
        detector(str(path), candidate_labels=["cat"])


@pytest.mark.parametrize("labels", [[], [""], ["cat", " "], "", ["..."]])
def test_empty_labels_are_refused(detector, labels):
    with pytest.raises(ValueError):
        detector(picture(), candidate_labels=labels)


def test_sideways_photograph_gives_boxes_of_the_upright_one(detector, tmp_path):
    upright = picture(80, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "sideways.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert detector(str(path), candidate_labels=["cat"], **ALL) == detector(upright, candidate_labels=["cat"], **ALL)


@pytest.mark.parametrize("saved", [32, 64, 256])
def test_a_folders_own_prompt_length_is_kept(saved, model, tiny_processor, tmp_path):
    model.save_pretrained(tmp_path)
    GDinoProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, max_text_len=saved).save_pretrained(
        tmp_path
    )
    expected = min(saved, model.config.max_text_len)
    loaded = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path)
    for given in (str(tmp_path), loaded):
        assert pipeline(TASK, model=given, device="cpu").processor.max_text_len == expected
    parts = {"tokenizer": tiny_processor.tokenizer, "image_processor": tiny_processor.image_processor}
    assert pipeline(TASK, model=loaded, **parts, device="cpu").processor.max_text_len == expected


def test_a_folders_own_suppression_is_kept(model, tiny_processor, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer, image_processor = tiny_processor.tokenizer, tiny_processor.image_processor
    GDinoProcessor(image_processor, tokenizer, nms_threshold=0.0).save_pretrained(tmp_path)
    loaded = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path)
    plain = pipeline(TASK, model=model, processor=tiny_processor, device="cpu")
    options = {"candidate_labels": ["cat", "dog"], **ALL}
    fewer = plain(picture(80, 64), nms_threshold=0.0, **options)
    assert len(fewer) < len(plain(picture(80, 64), **options))
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}
    for given, more in ((str(tmp_path), {}), (loaded, {}), (loaded, parts)):
        suppressing = pipeline(TASK, model=given, **more, device="cpu")
        assert suppressing(picture(80, 64), **options) == fewer
        assert suppressing(picture(80, 64), nms_threshold=1, **options) == plain(picture(80, 64), **options)


def test_the_processor_may_be_a_folder(model, tiny_folder, detector):
    other = pipeline(TASK, model=model, processor=str(tiny_folder), device="cpu")
    assert other(picture(), candidate_labels=["cat"], **ALL) == detector(picture(), candidate_labels=["cat"], **ALL)


def test_a_picture_may_be_base64(detector):
    file = io.BytesIO()
    picture().save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    expected = detector(picture(), candidate_labels=["cat"], **ALL)
    for given in (text, f"data:image/png;base64,{text}"):
        assert detector(given, candidate_labels=["cat"], **ALL) == expected


@pytest.mark.parametrize("text", ["QUJD" * 2000, "no picture, " * 800])
def test_a_long_text_that_is_no_picture_is_not_echoed_whole(text, detector):
    with pytest.raises(ValueError) as caught:
        detector(text, candidate_labels=["cat"])
    assert len(str(caught.value)) < 600


def test_transformers_own_grounding_dino_keeps_the_stock_pipeline(tiny_config, tiny_processor, tmp_path):
    shared = ("d_model", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "decoder_layers")
    shared += ("decoder_ffn_dim", "decoder_attention_heads", "num_queries", "max_text_len")
    config = GroundingDinoConfig(
        backbone_config=copy.deepcopy(tiny_config.backbone_config),
        text_config=copy.deepcopy(tiny_config.text_config),
        **{name: getattr(tiny_config, name) for name in shared},
    )
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    tiny_processor.tokenizer.save_pretrained(tmp_path)
    detector = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert type(detector) is ZeroShotObjectDetectionPipeline
    assert type(detector.model) is GroundingDinoForObjectDetection
    calls, handle = count_forwards(detector.model)
    try:
        detector(picture(), candidate_labels=["cat", "dog"], threshold=0.0)
    finally:
        handle.remove()
    assert calls == [1, 1]
