"""Rating of a gdino-nano on several sets."""

import json

import pytest
import torch

from gdino_hf.recipes import nano
from gdino_hf.recipes.nano_rating import detect_by_set, main, model_parser, rate, told_model


@pytest.fixture(scope="module")
def detector(parts):
    torch.manual_seed(0)
    model, processor = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    return model.eval(), processor


def test_photographs_are_asked_for_the_names_of_their_own_set(parts, detector, tmp_path):
    content = json.loads((parts / "wild" / "val.json").read_text())
    content["images"][1]["source"] = "ink"
    content["info"]["set_names"] = {"paint": ["green", "blue"], "ink": ["blue"]}
    (tmp_path / "images").symlink_to(parts / "wild" / "images")
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    found = detect_by_set(*detector, path)
    categories = {
        image["id"]: {x["category_id"] for x in found if x["image_id"] == image["id"]} for image in content["images"]
    }
    assert categories == {0: {0, 1}, 1: {1}}

    content["info"]["set_names"].pop("ink")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no names for the set 'ink'"):
        detect_by_set(*detector, path)


def test_files_without_sets_are_asked_for_all_names(parts, detector):
    from gdino_hf.evaluation.coco_results import average_precision, detect_coco

    path = parts / "data" / "val.json"
    expected = average_precision(path, detect_coco(*detector, path))
    figures = rate(*detector, {"everyday": path})["everyday"]
    assert figures == {name: pytest.approx(expected[name], abs=5e-5) for name in figures}


def test_the_command_wants_a_set():
    with pytest.raises(SystemExit):
        main(["nano"])


def test_a_folder_without_a_processor_gets_the_embedded_models_and_says_so(detector, tmp_path, caplog):
    model, processor = detector
    model.save_pretrained(tmp_path / "model")
    _, found = told_model(model_parser("").parse_args([str(tmp_path / "model")]))
    assert found.image_processor.size != processor.image_processor.size
    assert f"{tmp_path / 'model'} has no processor; the embedded model's is used." in caplog.messages
    caplog.clear()
    processor.save_pretrained(tmp_path / "processor")
    given = [str(tmp_path / "model"), "--processor", str(tmp_path / "processor")]
    assert told_model(model_parser("").parse_args(given))[1].image_processor.size == processor.image_processor.size
    told_model(model_parser("").parse_args(["nano"]))
    assert not caplog.messages
