"""Claims about `attn_implementation`: every backbone can be combined with any implementation the model has."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import ConvNextConfig, Dinov2Config, ResNetConfig, SwinConfig
from transformers.utils import logging

from gdino_hf import GDinoForObjectDetection
from gdino_hf.model.csp_pan import CspPanConfig

# Fused and eager attention sum in a different order.
ROUNDING = 1e-4
STAGES = ["stage2", "stage3", "stage4"]
BACKBONES = {
    "csp_pan": lambda: CspPanConfig(stem_width=8, stage_widths=[8] * 4, stage_depths=[1] * 4, pan_width=8),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES),
    "swin": lambda: SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=STAGES),
    "dinov2": lambda: Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=16, out_features=["stage1"]
    ),
}
# Those whose class in transformers accepts nothing but eager attention.
EAGER_ONLY = ("resnet", "convnext")


@pytest.fixture(params=list(BACKBONES))
def backbone(request):
    return request.param


@pytest.fixture
def folder(backbone, tiny_config, tmp_path):
    config = copy.deepcopy(tiny_config)
    config.backbone_config = BACKBONES[backbone]()
    torch.manual_seed(0)
    GDinoForObjectDetection(config).save_pretrained(tmp_path)
    return tmp_path


def parts(model):
    core = model.base_model
    return [part.config._attn_implementation for part in (model, core.backbone.conv_encoder.model, core.text_backbone)]


def expected(backbone, implementation):
    return [implementation, "eager" if backbone in EAGER_ONLY else implementation, implementation]


def detect(model):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(pixel_values=pixels, input_ids=torch.tensor([[2, 60, 5, 3]])).pred_boxes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_from_pretrained_and_set_attn_implementation_work_with_every_backbone(folder, backbone, implementation):
    model = GDinoForObjectDetection.from_pretrained(folder, attn_implementation=implementation)
    assert parts(model) == expected(backbone, implementation)
    boxes = detect(model)
    other = {"sdpa": "eager", "eager": "sdpa"}[implementation]
    model.set_attn_implementation(other)
    assert parts(model) == expected(backbone, other)
    torch.testing.assert_close(detect(model), boxes, rtol=0, atol=ROUNDING)
    model.set_attn_implementation(implementation)
    assert parts(model) == expected(backbone, implementation)


def test_config_may_ask_for_an_implementation(tiny_config, backbone):
    config = copy.deepcopy(tiny_config)
    config.backbone_config = BACKBONES[backbone]()
    config._attn_implementation = "sdpa"
    assert parts(GDinoForObjectDetection(config)) == expected(backbone, "sdpa")


def test_parts_may_be_named_one_by_one(folder, backbone):
    model = GDinoForObjectDetection.from_pretrained(
        folder, attn_implementation={"": "sdpa", "text_config": "eager", "backbone_config": "eager"}
    )
    assert parts(model) == ["sdpa", "eager", "eager"]
    model.set_attn_implementation({"text_config": "sdpa", "": "eager"})
    assert parts(model) == ["eager", "eager", "sdpa"]
    if backbone in EAGER_ONLY:
        with pytest.raises(ValueError, match="does not support"):
            model.set_attn_implementation({"backbone_config": "sdpa"})


def test_unknown_implementations_are_refused(folder):
    with pytest.raises(ValueError, match="linear_attention"):
        GDinoForObjectDetection.from_pretrained(folder, attn_implementation="linear_attention")
    with pytest.raises(ValueError, match="linear_attention"):
        GDinoForObjectDetection.from_pretrained(folder).set_attn_implementation("linear_attention")


def test_a_backbone_with_attention_that_keeps_its_own_is_named(tiny_config, caplog, monkeypatch):
    config = copy.deepcopy(tiny_config)
    model = GDinoForObjectDetection(config)
    part = model.model.backbone.conv_encoder.model
    monkeypatch.setattr(type(part), "_supports_sdpa", False)
    model.set_attn_implementation("eager")
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model.set_attn_implementation("sdpa")
    finally:
        logger.removeHandler(caplog.handler)
    assert parts(model) == ["sdpa", "eager", "sdpa"]
    assert "SwinBackbone has no attention implementation 'sdpa' and keeps 'eager'" in caplog.text
