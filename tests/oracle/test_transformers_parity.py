"""Checkpoints written by transformers give equal outputs here, and checkpoints saved here load into transformers."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    ResNetConfig,
    SwinConfig,
)

from gdino_hf import GDinoForObjectDetection, GDinoModel
from tiny_peers import tiny_bert, tiny_peer_config

LOGIT_TOLERANCE = 1e-4
BOX_TOLERANCE = 1e-5
VOCABULARY = 1100  # includes the ids 1012 and 1029 of "." and "?", which are constants in transformers
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
    """Make a random model of transformers in which every weight affects the output, unlike in a new one."""
    config_class, model_class = PEERS[kind]
    text = tiny_bert(VOCABULARY, num_hidden_layers=2, intermediate_size=48)
    config = tiny_peer_config(config_class, backbone, text, encoder_layers=2, decoder_layers=3, **overrides)
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
        # Much larger than the published 1e-4, so a fault in the fusion shows.
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
    # The comparison proves something only if the boxes differ from each other.
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


@pytest.mark.parametrize("case", ["gd swin shared", "mm swin shared", "mm swin separate"])
def test_loading_a_peer_checkpoint_says_nothing(case, tmp_path, caplog, monkeypatch):
    kind, backbone, overrides = CASES[case]
    make_peer(kind, backbone(), **overrides).save_pretrained(tmp_path)
    # transformers' logger does not propagate by default, so caplog would not see its records.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    with caplog.at_level("WARNING"):
        logging.getLogger("transformers.modeling_utils").warning("heard")
        GDinoForObjectDetection.from_pretrained(tmp_path)
        GDinoModel.from_pretrained(tmp_path)
    assert {record.getMessage() for record in caplog.records} == {"heard"}


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


UNTIED = {
    "gd shared": ("grounding-dino", {}),
    "gd separate": ("grounding-dino", SEPARATE),
    "mm shared": ("mm-grounding-dino", {}),
    "mm separate": ("mm-grounding-dino", SEPARATE),
}


def save_untied(kind: str, folder: Any, copies_differ: bool, **overrides: Any) -> torch.nn.Module:
    """Save a model of transformers with tie_word_embeddings=False, whose file holds a copy of a head for each place."""
    tied = make_peer(kind, swin(), **overrides)
    config_class, model_class = PEERS[kind]
    peer = model_class(config_class.from_dict({**tied.config.to_dict(), "tie_word_embeddings": False})).eval()
    peer.load_state_dict(tied.state_dict())
    if copies_differ:
        with torch.no_grad():
            peer.model.decoder.bbox_embed[1].layers[0].bias.add_(1.0)
    peer.save_pretrained(folder)
    return peer


@pytest.mark.parametrize("case", UNTIED)
def test_untied_copies_that_agree_are_saved_back_whole(case, tmp_path, caplog):
    kind, overrides = UNTIED[case]
    peer = save_untied(kind, tmp_path / "theirs", copies_differ=False, **overrides)
    model, info = GDinoForObjectDetection.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert "copies of heads" not in caplog.text
    model.eval().save_pretrained(tmp_path / "ours")
    back, info = PEERS[kind][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = make_inputs()
    with torch.no_grad():
        theirs, ours, returned = peer(**inputs), model(**inputs), back.eval()(**inputs)
    assert_equal_outputs(ours, theirs)
    assert_equal_outputs(returned, theirs)


def test_untied_copies_that_differ_are_named_once(tmp_path, caplog):
    save_untied("grounding-dino", tmp_path, copies_differ=True)
    GDinoForObjectDetection.from_pretrained(tmp_path)
    (message,) = [record.getMessage() for record in caplog.records if "copies of heads" in record.getMessage()]
    assert "model.decoder.bbox_embed.1." in message
    assert "bbox_embed.0" not in message
