"""Claims about runtimes: models of every kind agree with PyTorch on many sizes, batches and prompts.

test_exporting.py compares gdino-nano on a few in every run.
"""

from __future__ import annotations

import copy

import pytest
import torch
from export_cases import assert_agree, make_inputs, run_graphs, small_config
from transformers import ResNetConfig, SwinConfig

from gdino_hf import NANO, GDinoForObjectDetection, GDinoProcessor
from gdino_hf.detection.exported_folder import ExportedFolder
from gdino_hf.detection.exported_graphs import load_graphs
from gdino_hf.export import export
from random_models import make_random_model

SIZES = ((96, 128), (161, 95), (64, 200), (33, 65), (224, 224))
PROMPTS = (
    ["cat."],
    ["dog. tree. hat. cup."],
    ["remote control. a big red dog."],
    ["person. bird. a small blue ball. left chair. traffic light."],
)
LABELS = ["cat", "remote control", "person"]
RESNET = ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)
MM = {"class_head": "scaled_bias", "decoder_bbox_embed_share": False}
SWIN = SwinConfig(
    embed_dim=8,
    # The second block of a stage has shifted windows.
    depths=[2, 1],
    num_heads=[1, 2],
    window_size=4,
    out_features=["stage1", "stage2"],
)
CHANGES = {
    "CSP-PAN": {},
    "Swin": {"backbone_config": SWIN, "num_feature_levels": 2},
    "MM, shared head": {**MM, "decoder_cls_embed_share": True, "decoder_layers": 2},
    "MM, separate heads": {**MM, "decoder_cls_embed_share": False, "decoder_layers": 2},
    "5 levels": {"num_feature_levels": 5},
    "ResNet": {"backbone_config": RESNET},
}


@pytest.fixture
def pair(request, tiny_config, tiny_processor):
    """A model and its processor."""
    if request.param == "nano":
        return GDinoForObjectDetection.from_pretrained(NANO).eval(), GDinoProcessor.from_pretrained(NANO)
    config = small_config(tiny_config)
    for name, value in CHANGES[request.param].items():
        setattr(config, name, copy.deepcopy(value))
    return make_random_model(config), tiny_processor


def compare(model, processor, folder):
    """Compare an exported folder with the model on each size, in each batch, with each prompt."""
    exported = ExportedFolder.read(folder)
    graphs = load_graphs(exported)
    baked = exported.labels and torch.tensor([exported.labels.input_ids])
    for seed, (height, width) in enumerate(SIZES):
        for batch in (1, 2, 3):
            for prompt in PROMPTS if baked is None else PROMPTS[:1]:
                inputs = make_inputs(processor.tokenizer, prompt * batch, height, width, seed=seed)
                if baked is not None:
                    inputs["input_ids"] = baked.repeat(batch, 1)
                    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                with torch.no_grad():
                    expected = model(**inputs)
                found = run_graphs(graphs, inputs)
                assert_agree(found["logits"], found["pred_boxes"], expected, inputs["input_ids"].shape[1])


@pytest.mark.soak
@pytest.mark.parametrize("model_format", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("pair", "variant"),
    [(kind, "whole") for kind in [*CHANGES, "nano"]]
    + [(kind, variant) for kind in ("Swin", "nano") for variant in ("split", "baked")],
    indirect=["pair"],
)
def test_every_size_batch_and_prompt_agrees(pair, variant, model_format, tmp_path):
    model, processor = pair
    labels = LABELS if variant == "baked" else None
    folder = export(model, tmp_path / "out", format=model_format, variant=variant, labels=labels, processor=processor)
    compare(model, processor, folder)
