"""Configurations of tiny models of transformers, for tests that compare or convert."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, SwinConfig


def tiny_swin(embed_dim: int = 8) -> SwinConfig:
    """Return the configuration of a Swin backbone with one block a stage, for images of 64 pixels."""
    return SwinConfig(
        embed_dim=embed_dim,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage2", "stage3", "stage4"],
    )


def tiny_bert(vocab_size: int, **overrides: Any) -> BertConfig:
    """Return the configuration of a text encoder of width 32 with one layer, unless the overrides say otherwise."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    return BertConfig(vocab_size=vocab_size, **{**sizes, **overrides})


def tiny_peer_config(config_class: type, backbone: Any, text: BertConfig, **overrides: Any) -> Any:
    """Return a configuration of transformers' Grounding DINO or MM Grounding DINO with one encoder layer.

    Args:
        config_class: GroundingDinoConfig or MMGroundingDinoConfig.
        backbone: Configuration of the image backbone.
        text: Configuration of the text encoder.
        **overrides: Fields with other values.
    """
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}
    parts = {"encoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
    return config_class(backbone_config=backbone, text_config=text, **{**sizes, **parts, **overrides})
