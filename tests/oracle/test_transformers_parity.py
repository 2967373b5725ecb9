"""Checkpoints that transformers wrote give the same answers here, and what is saved here loads back there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    ResNetConfig,
    SwinConfig,
)

from gdino_hf import GDinoForObjectDetection, GDinoModel

LOGIT_TOLERANCE = 1e-4
BOX_TOLERANCE = 1e-5
VOCABULARY = 1100  # covers the ids 1012 and 1029 of "." and "?" that the peer has built in
PERIOD = 1012

SEPARATE = {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
PEERS = {
    "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
    "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
}


def swin(stages: int = 3) -> SwinConfig:
    return SwinConfig(
        embed_dim=8,
        depths=[1, 1, 2, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=[f"stage{i}" for i in range(5 - stages, 5)],
    )


def resnet() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )


def make_peer(kind: str, backbone: Any, **overrides: Any) -> torch.nn.Module:
    """A random peer whose every weight matters: freshly made ones have boxes and offsets that ignore the input."""
    config_class, model_class = PEERS[kind]
    text = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    config = config_class(
        backbone_config=backbone,
        text_config=text,
        d_model=64,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_layers=3,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        num_queries=12,
        **overrides,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.08 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
            if name.endswith("running_var"):
                buffer.mul_(1 + torch.rand_like(buffer))
        # Stronger than the published 1e-4, so that a fault in the fusion cannot hide.
        for layer in model.model.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.5)
            layer.fusion_layer.text_param.fill_(0.5)
    return model


def make_inputs(height: int = 96, width: int = 128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    prompt = [101, 5, 6, PERIOD, 7, PERIOD, 8, 9, 10, PERIOD, 102]
    return {
        "pixel_values": torch.randn(1, 3, height, width, generator=generator),
        "pixel_mask": torch.ones(1, height, width, dtype=torch.int64),
        "input_ids": torch.tensor([prompt]),
        "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64),
        "token_type_ids": torch.zeros(1, len(prompt), dtype=torch.int64),
    }


CASES = {
    "gd swin shared": ("grounding-dino", swin, {}),
    "gd swin separate": ("grounding-dino", swin, SEPARATE),
    "gd swin 5 levels": ("grounding-dino", lambda: swin(4), {"num_feature_levels": 5}),
    "gd resnet shared": ("grounding-dino", resnet, {}),
    "gd resnet 5 levels": ("grounding-dino", resnet, {"num_feature_levels": 5}),
    "mm swin shared": ("mm-grounding-dino", swin, {}),
    "mm swin separate": ("mm-grounding-dino", swin, SEPARATE),
    "mm swin 5 levels": ("mm-grounding-dino", lambda: swin(4), {"num_feature_levels": 5, **SEPARATE}),
    "mm resnet separate": ("mm-grounding-dino", resnet, SEPARATE),
}


def assert_equal_outputs(ours: Any, theirs: Any) -> None:
    finite = torch.isfinite(theirs.logits)
    assert torch.equal(finite, torch.isfinite(ours.logits))
    assert finite.any()
    torch.testing.assert_close(ours.logits[finite], theirs.logits[finite], rtol=0, atol=LOGIT_TOLERANCE)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=BOX_TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_peer_checkpoint_gives_the_peer_outputs(case, tmp_path, caplog):
    kind, backbone, overrides = CASES[case]
    peer = make_peer(kind, backbone(), **overrides)
    peer.save_pretrained(tmp_path)
    model, info = GDinoForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = make_inputs()
    with torch.no_grad():
        theirs, ours = peer(**inputs), model.eval()(**inputs)
    # Boxes that all agree because they are all alike would prove nothing.
    assert theirs.pred_boxes.std(dim=1).min() > 1e-3
    assert_equal_outputs(ours, theirs)
    torch.testing.assert_close(
        ours.encoder_last_hidden_state_vision, theirs.encoder_last_hidden_state_vision, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        ours.intermediate_reference_points, theirs.intermediate_reference_points, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("case", ["gd swin shared", "gd resnet shared", "mm swin separate", "mm swin shared"])
def test_saved_back_loads_into_the_peer(case, tmp_path):
    kind, backbone, overrides = CASES[case]
    peer = make_peer(kind, backbone(), **overrides)
    peer.save_pretrained(tmp_path / "theirs")
    model = GDinoForObjectDetection.from_pretrained(tmp_path / "theirs").eval()
    model.save_pretrained(tmp_path / "ours")

    def tensors(folder: str) -> dict[str, torch.Tensor]:
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    before, after = tensors("theirs"), tensors("ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    back, info = PEERS[kind][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = make_inputs()
    with torch.no_grad():
        theirs, ours = back.eval()(**inputs), model(**inputs)
    assert_equal_outputs(ours, theirs)


def test_loading_a_peer_checkpoint_says_nothing(tmp_path, caplog):
    peer = make_peer("grounding-dino", swin())
    peer.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level("WARNING"):
        GDinoForObjectDetection.from_pretrained(tmp_path)
        GDinoModel.from_pretrained(tmp_path)
    assert not [record.getMessage() for record in caplog.records]


def test_saved_config_is_ours(tmp_path):
    peer = make_peer("mm-grounding-dino", swin(), **SEPARATE)
    peer.save_pretrained(tmp_path)
    GDinoForObjectDetection.from_pretrained(tmp_path).save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "gdino"
    assert saved["class_head"] == "scaled_bias"
    assert saved["architectures"] == ["GDinoForObjectDetection"]


def test_sdpa_and_eager_agree(tmp_path):
    make_peer("mm-grounding-dino", swin(), **SEPARATE).save_pretrained(tmp_path)
    inputs = make_inputs()
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = GDinoForObjectDetection.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs.append(model(**inputs))
    assert_equal_outputs(outputs[0], outputs[1])
