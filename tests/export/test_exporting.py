"""Claims about exported folders: they are whole, agree with PyTorch on other sizes, and wrong arguments are refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from export_cases import assert_agree, make_inputs, small_config
from PIL import Image

from gdino_hf import Detector
from gdino_hf.cli import main
from gdino_hf.export import export
from made_once import made_once
from random_models import make_random_model

LABELS = ["cat", "remote control", "person"]


@pytest.fixture(scope="module")
def model(tiny_config):
    return make_random_model(small_config(tiny_config))


@pytest.fixture(scope="module")
def whole(model, tiny_processor, tmp_path_factory):
    """The model as an ONNX folder, traced once for all test processes; do not write to it."""
    return made_once(tmp_path_factory, "small-onnx", lambda folder: export(model, folder, processor=tiny_processor))


def run_onnx(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {port.name for port in session.get_inputs()}
    return session.run(["logits", "pred_boxes"], {k: np.asarray(v) for k, v in inputs.items() if k in names})


@pytest.mark.slow
def test_a_whole_graph_agrees_on_other_sizes_batches_and_prompts(model, whole, tiny_tokenizer):
    for prompts, height, width in (
        (["cat. dog.", "person."], 96, 128),
        (["a big red dog. remote control. tree."], 161, 95),
        (["cat.", "dog. tree. hat. cup.", "remote control."], 64, 200),
        (["cat."], 33, 40),
    ):
        inputs = make_inputs(tiny_tokenizer, prompts, height, width)
        with torch.no_grad():
            expected = model(**inputs)
        assert_agree(*run_onnx(whole / "model.onnx", inputs), expected, inputs["input_ids"].shape[1])


@pytest.mark.slow
def test_the_folder_describes_its_files(whole, model, tiny_processor):
    content = json.loads((whole / "gdino_export.json").read_text())
    entry = content["files"]["model"]
    data = (whole / entry["name"]).read_bytes()
    assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (content["format"], content["variant"], content["labels"]) == ("onnx", "whole", None)
    assert content["image"]["size"] == tiny_processor.image_processor.size
    assert content["post"]["num_queries"] == model.config.num_queries
    assert content["graphs"]["model"]["inputs"]["pixel_values"]["shape"] == ["batch", 3, "height", "width"]
    assert {path.name for path in whole.iterdir()} >= {"tokenizer.json", "README.md", "processor_config.json"}
    assert f"| {entry['name']} | {entry['bytes']:,} |" in (whole / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "no format 'tflite'"),
        ({"variant": "half"}, "no variant 'half'"),
        ({"variant": "baked"}, "needs the labels"),
        ({"variant": "whole", "labels": "cat"}, "Labels are for the variant baked"),
        ({"labels": [f"cat {number} dog" for number in range(30)]}, "30 labels take .* prompts of 64 tokens"),
    ],
)
def test_wrong_arguments_are_refused(options, message, model, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", processor=tiny_processor, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_labels_of_a_whole_model(tiny_folder, tmp_path, capsys):
    assert (
        main(["export", str(tiny_folder), "--out", str(tmp_path / "x"), "--variant", "split", "--labels", "cat"]) == 2
    )
    assert "Labels are for the variant baked, not for split" in capsys.readouterr().err


@pytest.mark.slow
def test_the_detector_runs_the_folder_and_finds_what_the_model_finds(model, whole, tiny_processor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8))
    pictures = [picture, picture.crop((0, 0, 70, 80))]
    ours = Detector(model, processor=tiny_processor, optimize=False)(pictures, LABELS, threshold=0.01)
    theirs = Detector(whole)(pictures, LABELS, threshold=0.01)
    for mine, found in zip(ours, theirs, strict=True):
        assert len(mine) > 0
        assert found.text_labels == mine.text_labels
        np.testing.assert_allclose(found.scores, mine.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, mine.boxes, atol=0.02)


@pytest.mark.slow
def test_an_exported_folder_is_not_exported_again(whole, tmp_path):
    with pytest.raises(ValueError, match="is an exported model already"):
        export(str(whole), tmp_path / "out")
