"""Checkpoints in transformers' format that have learned one picture, that picture, and a tiny SAM model."""

from __future__ import annotations

from pathlib import Path

import pytest

from made_once import made_once


def trained(tmp_path_factory, kind: str) -> Path:
    """Return the folder of a checkpoint that the first test process which needs it has trained."""
    from trained_checkpoint import save_trained_checkpoint

    return made_once(tmp_path_factory, kind, lambda folder: save_trained_checkpoint(folder, kind)) / "theirs"


@pytest.fixture(scope="session")
def their_checkpoint(tmp_path_factory):
    """Folder of a grounding-dino checkpoint. Do not write to it."""
    return trained(tmp_path_factory, "grounding-dino")


@pytest.fixture(scope="session")
def their_mm_checkpoint(tmp_path_factory):
    """Folder of an mm-grounding-dino checkpoint. Do not write to it."""
    return trained(tmp_path_factory, "mm-grounding-dino")


@pytest.fixture(scope="session")
def learned_picture(tmp_path_factory):
    """File of the picture that the checkpoints have learned."""
    from trained_checkpoint import picture

    path = tmp_path_factory.mktemp("picture") / "picture.png"
    picture().save(path)
    return path


@pytest.fixture(scope="session")
def tiny_sam(tmp_path_factory):
    """Folder of a random SAM model for images of 64 pixels."""
    import torch
    from transformers import (
        SamConfig,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        mlp_dim=16,
        global_attn_indexes=[0],
        window_size=4,
        num_pos_feats=8,
    )
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    folder = tmp_path_factory.mktemp("sam")
    SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    ).save_pretrained(folder)
    SamProcessor(SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})).save_pretrained(
        folder
    )
    return folder
