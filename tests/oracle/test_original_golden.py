"""Outputs of the original implementation, reproduced from its own checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, SwinConfig

from gdino_hf import GDinoConfig, GDinoForObjectDetection

sys.path.insert(0, str(Path(__file__).parent))
from original_layout import from_original

LOGIT_TOLERANCE = 1e-3
BOX_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden(shared, tmp_path_factory):
    """The converted model, loaded as any checkpoint is, and the stored cases."""
    folder = shared / "golden" / "official_swin_w7"
    meta = json.loads((folder / "meta.json").read_text())
    settings, swin = meta["config"], meta["swin"]
    config = GDinoConfig.preset(
        "tiny",
        backbone_config=SwinConfig(
            embed_dim=swin["embed_dim"],
            depths=swin["depths"],
            num_heads=swin["num_heads"],
            window_size=swin["window_size"],
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(**meta["bert"]),
        d_model=settings["hidden_dim"],
        encoder_layers=settings["enc_layers"],
        decoder_layers=settings["dec_layers"],
        encoder_ffn_dim=settings["dim_feedforward"],
        decoder_ffn_dim=settings["dim_feedforward"],
        encoder_attention_heads=settings["nheads"],
        decoder_attention_heads=settings["nheads"],
        num_queries=settings["num_queries"],
    )
    target = tmp_path_factory.mktemp("golden")
    state = from_original(torch.load(folder / "checkpoint.pth", weights_only=True)["model"])
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    model, info = GDinoForObjectDetection.from_pretrained(target, output_loading_info=True)
    assert not info["unexpected_keys"], info
    assert not [key for key in info["missing_keys"] if "swin.layernorm" not in key], info
    return model.eval(), load_file(folder / "cases.safetensors"), len(meta["cases"])


@pytest.mark.parametrize("case", [0, 1, 2])
def test_original_outputs_are_reproduced(golden, case):
    model, tensors, num_cases = golden
    assert num_cases == 3
    with torch.no_grad():
        outputs = model(
            pixel_values=tensors[f"{case}.pixel_values"].float(),
            pixel_mask=tensors[f"{case}.pixel_mask"],
            input_ids=tensors[f"{case}.input_ids"],
            attention_mask=tensors[f"{case}.attention_mask"],
        )
    expected = tensors[f"{case}.pred_logits"]
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(outputs.logits), finite)
    torch.testing.assert_close(outputs.logits[finite], expected[finite], rtol=0, atol=LOGIT_TOLERANCE)
    torch.testing.assert_close(outputs.pred_boxes, tensors[f"{case}.pred_boxes"], rtol=0, atol=BOX_TOLERANCE)
