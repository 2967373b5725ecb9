"""Options that are on or off take True and False alone, wherever they are read: "no" would count as on."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import Detections, Detector, GDinoDataCollator, GDinoImageProcessor, GDinoProcessor
from gdino_hf.cli import main
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.formats import open_dataset
from gdino_hf.data.reproducible_sampling import ReproducibleSampler
from gdino_hf.model.grounded_results import Selection
from gdino_hf.model.option_flags import checked_flag
from gdino_hf.training.arguments import DataArguments
from gdino_hf.visualize import draw_detections

CONSTRUCTOR = ("do_resize", "do_rescale", "do_normalize", "do_pad", "pad_and_return_pixel_mask")
CALL = (*CONSTRUCTOR, "do_convert_annotations", "do_convert_rgb", "default_to_square", "disable_grouping")
WRONG = ["no", "False", "", b"no", 0, 1, 1.0, [True], {}, torch.tensor(True), 10**5000]


def picture():
    return Image.new("RGB", (40, 30), "red")


def refused(name):
    return pytest.raises(ValueError, match=rf"^{name} must be True or False, got .{{2,60}}\.$")


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_what_is_neither_on_nor_off_is_refused(value):
    with refused("it"):
        checked_flag(value, "it")


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_on_and_off_are_taken(value):
    assert checked_flag(value, "it") is bool(value)


@pytest.mark.parametrize("value", ["no", "true", 0])
@pytest.mark.parametrize("name", CALL)
def test_the_image_processor_refuses_them(name, value, tiny_processor):
    if name in CONSTRUCTOR:
        with refused(name):
            GDinoImageProcessor(**{name: value})
    for call in (tiny_processor.image_processor, lambda *a, **o: tiny_processor(images=picture(), images_kwargs=o)):
        with refused(name):
            call(picture(), **{name: value})


def test_null_stands_for_the_default_of_an_option_in_a_file():
    processor = GDinoImageProcessor(**dict.fromkeys(CONSTRUCTOR[:4]), do_convert_rgb=None)
    assert all(getattr(processor, name) is True for name in CONSTRUCTOR[:4])


def test_numpys_false_turns_options_off(tiny_processor):
    annotation = {"annotations": [{"bbox": [4, 3, 20, 15], "category_id": 0}]}
    given = {"do_convert_annotations": np.False_, "do_resize": np.False_}
    labels = tiny_processor(picture(), ["cat"], annotation, **given)["labels"]
    assert labels[0]["boxes"].tolist() == [[4, 3, 24, 18]]


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_a_saved_option_that_is_text_is_named(file, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    content = json.loads((folder / "processor_config.json").read_text())
    content["image_processor"]["do_normalize"] = "no"
    (folder / "processor_config.json").unlink()
    (folder / file).write_text(json.dumps(content if file.startswith("proc") else content["image_processor"]))
    with pytest.raises(ValueError, match=r"do_normalize must be True or False, got 'no'\.$"):
        GDinoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["multi_label", "class_agnostic_nms"])
def test_post_processing_and_the_detector_refuse_them(name, tiny_processor, tiny_model):
    with refused(name):
        Selection(0.3, **{name: "no"})
    inputs = tiny_processor(images=picture(), text=["cat"])
    outputs = SimpleNamespace(logits=torch.zeros(1, 2, 64), pred_boxes=torch.full((1, 2, 4), 0.5))
    with refused(name):
        tiny_processor.post_process_grounded_object_detection(outputs, inputs, **{name: 1})
    with refused(name):
        Detector(tiny_model, processor=tiny_processor, optimize=False)(picture(), ["cat"], **{name: "no"})


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states", "return_dict"])
def test_the_model_refuses_them(name, tiny_model, tiny_processor):
    inputs = tiny_processor(images=picture(), text=["cat"])
    with refused(name):
        tiny_model(**inputs, **{name: "no"})


@pytest.mark.parametrize(
    "given",
    [
        {"return_attention_mask": 0},
        {"return_attention_mask": "no"},
        {"return_token_type_ids": 1.0},
        {"padding": 0},
        {"padding": ["longest"]},
        {"padding": "no"},
        {"truncation": "no"},
        {"truncation": 1},
        {"truncation": ["longest_first"]},
        {"add_special_tokens": 1},
    ],
    ids=str,
)
def test_options_of_text_are_refused_in_a_sentence(given, tiny_processor):
    (name,) = given
    with pytest.raises(ValueError, match=rf"\b{name}\b.{{20,}}\.$"):
        tiny_processor(text=["cat"], **given)


def test_other_functions_refuse_them(tiny_model, tiny_processor, tmp_path):
    found = Detections.none(["cat"], (40, 30))
    (tmp_path / "train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    result = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "text_labels": []}
    calls = {
        "optimize": lambda: Detector(tiny_model, processor=tiny_processor, optimize="no"),
        "streaming": lambda: open_dataset(tmp_path, streaming="no"),
        "decode": lambda: check_dataset(tmp_path / "train.json", decode="no"),
        "return_text": lambda: GDinoDataCollator(tiny_processor, return_text="no"),
        "shuffle": lambda: ReproducibleSampler(3, shuffle="no"),
        "show_scores": lambda: draw_detections(picture(), result, show_scores="no"),
        "scores": lambda: found.to_yolo(scores="no"),
        "class_agnostic": lambda: found.nms(class_agnostic="no"),
    }
    for name, call in calls.items():
        with refused(name):
            call()
    with refused("streaming"):
        DataArguments(data="x", streaming="no")


@pytest.mark.parametrize("value", ["'no'", "0", "[true]", "'true'"])
def test_a_switch_of_a_yaml_file_is_true_or_false(value, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text(f"no_skip_memory_metrics: {value}\n")
    assert main(["train", "nowhere", "--config", str(path)]) == 2
    assert capsys.readouterr().err.rstrip().endswith("; give true or false")


@pytest.mark.parametrize("value", ["0.1", True, [0.1], float("nan"), -1, 2])
@pytest.mark.parametrize("name", ["threshold", "text_threshold", "nms_threshold"])
def test_thresholds_are_numbers(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be (a number )?within 0\.\.1, got .+\.$"):
        Selection(**{"threshold": 0.3, name: value})


@pytest.mark.parametrize("value", ["3", True, 1.5, -1])
def test_top_k_is_a_whole_number(value):
    with pytest.raises(ValueError, match=r"^top_k is .+; give a whole number from 0, or None for all\.$"):
        Selection(0.3, top_k=value)
    Selection(np.float32(0.3), top_k=np.int64(3))


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_means_and_deviations_are_no_flags(name):
    with pytest.raises(ValueError, match=rf"^{name} is \[True"):
        GDinoImageProcessor(**{name: [True, True, True]})
