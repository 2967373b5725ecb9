"""Claims about ExecuTorch: models lowered to XNNPACK agree with PyTorch on pictures of their size, with any prompt."""

from __future__ import annotations

import pytest
import torch
from export_cases import assert_agree, make_inputs, small_config
from torch.nn.functional import pad

from gdino_hf import NANO, GDinoForObjectDetection, GDinoProcessor
from gdino_hf.detection.exported_folder import ExportedFolder
from gdino_hf.detection.exported_graphs import load_graphs
from gdino_hf.export import export
from random_models import make_random_model

pytest.importorskip("executorch")
pytestmark = pytest.mark.soak

PROMPTS = ("cat.", "dog. tree. hat. cup.", "person. bird. a small blue ball. left chair. traffic light.")


def compare(model, processor, folder, prompts=PROMPTS):
    """Export the model, check that XNNPACK computes it, and compare it with PyTorch on each prompt."""
    export(model, folder, format="executorch", processor=processor)
    assert b"XnnpackBackend" in (folder / "model.pte").read_bytes()
    graph = load_graphs(ExportedFolder.read(folder))["model"]
    *_, height, width = graph.inputs["pixel_values"].shape
    length = graph.inputs["input_ids"].shape[1]
    for seed, prompt in enumerate(prompts):
        inputs = make_inputs(processor.tokenizer, [prompt], height, width, seed=seed)
        missing = length - inputs["input_ids"].shape[1]
        inputs |= {name: pad(inputs[name], (0, missing)) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = model(**inputs)
        found = graph(inputs)
        assert_agree(found["logits"], found["pred_boxes"], expected, length)


def test_a_small_model_agrees(tiny_config, tiny_processor, tmp_path):
    compare(make_random_model(small_config(tiny_config)), tiny_processor, tmp_path / "small")


def test_gdino_nano_agrees(tmp_path):
    model = GDinoForObjectDetection.from_pretrained(NANO).eval()
    compare(model, GDinoProcessor.from_pretrained(NANO), tmp_path / "nano")
