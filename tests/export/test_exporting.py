"""Claims about exported folders: they are whole, agree with PyTorch on other sizes, and wrong arguments are refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from export_cases import assert_agree, make_inputs, small_config

from gdino_hf import NANO, Detector, GDinoForObjectDetection, GDinoProcessor
from gdino_hf.cli import main
from gdino_hf.export import export
from random_models import make_random_model

LABELS = ["cat", "person", "cup"]


@pytest.fixture(scope="module")
def small(tiny_config):
    return make_random_model(small_config(tiny_config))


@pytest.fixture(scope="module")
def nano():
    return GDinoForObjectDetection.from_pretrained(NANO).eval(), GDinoProcessor.from_pretrained(NANO)


def run_onnx(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {port.name for port in session.get_inputs()}
    return session.run(["logits", "pred_boxes"], {k: np.asarray(v) for k, v in inputs.items() if k in names})


@pytest.mark.slow
def test_a_whole_graph_agrees_on_other_sizes_batches_and_prompts(nano, nano_export):
    """test_runtime_parity.py has more of each, and models of other kinds, with -m soak."""
    model, processor = nano
    for prompts, height, width in (
        (["cat. dog.", "person."], 96, 128),
        (["a big red dog. remote control. tree."], 161, 95),
        (["cat.", "dog. tree. hat. cup.", "remote control."], 64, 200),
        (["cat."], 33, 65),
    ):
        inputs = make_inputs(processor.tokenizer, prompts, height, width)
        with torch.no_grad():
            expected = model(**inputs)
        assert_agree(*run_onnx(nano_export / "model.onnx", inputs), expected, inputs["input_ids"].shape[1])


@pytest.mark.slow
def test_the_folder_describes_its_files(nano, nano_export):
    model, processor = nano
    content = json.loads((nano_export / "gdino_export.json").read_text())
    entry = content["files"]["model"]
    data = (nano_export / entry["name"]).read_bytes()
    assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (content["format"], content["variant"], content["labels"]) == ("onnx", "whole", None)
    assert content["image"]["size"] == processor.image_processor.size
    assert content["post"]["num_queries"] == model.config.num_queries
    assert content["graphs"]["model"]["inputs"]["pixel_values"]["shape"] == ["batch", 3, "height", "width"]
    assert {path.name for path in nano_export.iterdir()} >= {"tokenizer.json", "README.md", "processor_config.json"}
    assert f"| {entry['name']} | {entry['bytes']:,} |" in (nano_export / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "no format 'tflite'"),
        ({"variant": "half"}, "no variant 'half'"),
        ({"variant": "baked"}, "needs the labels"),
        ({"format": "executorch", "variant": "split"}, "made whole or baked, not split"),
        ({"variant": "whole", "labels": "cat"}, "Labels are for the variant baked"),
        ({"labels": [f"cat {number} dog" for number in range(30)]}, "30 labels take .* prompts of 64 tokens"),
    ],
)
def test_wrong_arguments_are_refused(options, message, small, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(small, tmp_path / "out", processor=tiny_processor, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_labels_of_a_whole_model(tiny_folder, tmp_path, capsys):
    assert (
        main(["export", str(tiny_folder), "--out", str(tmp_path / "x"), "--variant", "split", "--labels", "cat"]) == 2
    )
    assert "Labels are for the variant baked, not for split" in capsys.readouterr().err


@pytest.mark.slow
def test_the_detector_runs_the_folder_and_finds_what_the_model_finds(nano, nano_export, example_folder):
    pictures = [example_folder / name for name in ("cat.jpg", "person.jpg")]
    model, processor = nano
    options = {"threshold": 0.2, "nms_threshold": 0.5}
    ours = Detector(model, processor=processor, optimize=False)(pictures, LABELS, **options)
    theirs = Detector(nano_export)(pictures, LABELS, **options)
    for mine, found in zip(ours, theirs, strict=True):
        assert len(mine) > 0
        assert found.text_labels == mine.text_labels
        np.testing.assert_allclose(found.scores, mine.scores, atol=1e-3)
        np.testing.assert_allclose(found.boxes, mine.boxes, atol=0.1)


@pytest.mark.slow
def test_an_exported_folder_is_not_exported_again(nano_export, tmp_path):
    with pytest.raises(ValueError, match="is an exported model already"):
        export(str(nano_export), tmp_path / "out")
