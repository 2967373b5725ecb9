"""Claims about runtimes: models of every kind agree with PyTorch on many sizes, batches and prompts. Minutes each."""

from __future__ import annotations

import copy

import pytest
import torch
from export_cases import assert_agree, make_inputs
from transformers import ResNetConfig

from gdino_hf import NANO, GDinoForObjectDetection, GDinoProcessor
from gdino_hf.detection.exported_folder import ExportedFolder
from gdino_hf.detection.exported_graphs import load_graphs
from gdino_hf.export import export
from random_models import make_random_model

pytestmark = pytest.mark.soak

SIZES = ((96, 128), (161, 95), (64, 200), (33, 65), (224, 224))
PROMPTS = (
    ["cat."],
    ["dog. tree. hat. cup."],
    ["remote control. a big red dog."],
    ["person. bird. a small blue ball. left chair. traffic light."],
)
RESNET = ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)
MM = {"class_head": "scaled_bias", "decoder_bbox_embed_share": False}
CHANGES = {
    "T": {},
    "MM, shared head": {**MM, "decoder_cls_embed_share": True},
    "MM, separate heads": {**MM, "decoder_cls_embed_share": False},
    "5 levels": {"num_feature_levels": 5},
    "ResNet": {"backbone_config": RESNET},
}


@pytest.fixture(params=[*CHANGES, "nano"])
def pair(request, tiny_config, tiny_processor):
    """A model and its processor."""
    if request.param == "nano":
        return GDinoForObjectDetection.from_pretrained(NANO).eval(), GDinoProcessor.from_pretrained(NANO)
    config = copy.deepcopy(tiny_config)
    for name, value in CHANGES[request.param].items():
        setattr(config, name, copy.deepcopy(value))
    return make_random_model(config), tiny_processor


@pytest.mark.parametrize("model_format", ["onnx", "openvino"])
def test_every_size_batch_and_prompt_agrees(pair, model_format, tmp_path):
    model, processor = pair
    folder = export(model, tmp_path / "out", format=model_format, processor=processor)
    graph = load_graphs(ExportedFolder.read(folder))["model"]
    for seed, (height, width) in enumerate(SIZES):
        for batch in (1, 2, 3):
            for prompt in PROMPTS:
                inputs = make_inputs(processor.tokenizer, prompt * batch, height, width, seed=seed)
                with torch.no_grad():
                    expected = model(**inputs)
                found = graph(inputs)
                assert_agree(found["logits"], found["pred_boxes"], expected, inputs["input_ids"].shape[1])
