"""The original implementation's checkpoint in this project's layout: what the golden test needs of it."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_SWIN = "model.backbone.conv_encoder.model."
_RULES = [
    (r"^backbone\.0\.patch_embed\.proj", f"{_SWIN}embeddings.patch_embeddings.projection"),
    (r"^backbone\.0\.patch_embed\.norm", f"{_SWIN}embeddings.norm"),
    (r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.norm1", rf"{_SWIN}encoder.layers.\1.blocks.\2.layernorm_before"),
    (r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.norm2", rf"{_SWIN}encoder.layers.\1.blocks.\2.layernorm_after"),
    (
        r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative",
        rf"{_SWIN}encoder.layers.\1.blocks.\2.attention.self.relative",
    ),
    (r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv", rf"{_SWIN}encoder.layers.\1.blocks.\2.attention.self.*"),
    (
        r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.attn\.proj",
        rf"{_SWIN}encoder.layers.\1.blocks.\2.attention.output.dense",
    ),
    (
        r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1",
        rf"{_SWIN}encoder.layers.\1.blocks.\2.intermediate.dense",
    ),
    (r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2", rf"{_SWIN}encoder.layers.\1.blocks.\2.output.dense"),
    (r"^backbone\.0\.layers\.(\d+)\.downsample", rf"{_SWIN}encoder.layers.\1.downsample"),
    (r"^backbone\.0\.norm1", f"{_SWIN}hidden_states_norms.stage2"),
    (r"^backbone\.0\.norm2", f"{_SWIN}hidden_states_norms.stage3"),
    (r"^backbone\.0\.norm3", f"{_SWIN}hidden_states_norms.stage4"),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map", "model.text_projection"),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^transformer\.level_embed", "model.level_embed"),
    (r"^transformer\.tgt_embed", "model.query_position_embeddings"),
    (r"^transformer\.enc_output", "model.enc_output"),
    (r"^transformer\.enc_out_bbox_embed", "model.encoder_output_bbox_embed"),
    (r"^transformer\.encoder\.layers\.(\d+)\.norm1", r"model.encoder.layers.\1.deformable_layer.self_attn_layer_norm"),
    (r"^transformer\.encoder\.layers\.(\d+)\.norm2", r"model.encoder.layers.\1.deformable_layer.final_layer_norm"),
    (r"^transformer\.encoder\.layers\.(\d+)\.linear", r"model.encoder.layers.\1.deformable_layer.fc"),
    (r"^transformer\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
    (
        r"^transformer\.encoder\.text_layers\.(\d+)\.norm1",
        r"model.encoder.layers.\1.text_enhancer_layer.layer_norm_before",
    ),
    (
        r"^transformer\.encoder\.text_layers\.(\d+)\.norm2",
        r"model.encoder.layers.\1.text_enhancer_layer.layer_norm_after",
    ),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.linear", r"model.encoder.layers.\1.text_enhancer_layer.fc"),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)\.gamma_v", r"model.encoder.layers.\1.fusion_layer.vision_param"),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)\.gamma_l", r"model.encoder.layers.\1.fusion_layer.text_param"),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
    (r"\.layer_norm_v\.", ".layer_norm_vision."),
    (r"\.layer_norm_l\.", ".layer_norm_text."),
    (r"fusion_layer\.attn\.(values_|out_|)v_proj", r"fusion_layer.attn.\1vision_proj"),
    (r"fusion_layer\.attn\.(values_|out_|)l_proj", r"fusion_layer.attn.\1text_proj"),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
    (r"^transformer\.decoder\.ref_point_head", "model.decoder.reference_points_head"),
    (r"^transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"model.decoder.layers.\1.encoder_attn."),
    (r"^transformer\.decoder\.layers\.(\d+)\.ca_text\.", r"model.decoder.layers.\1.encoder_attn_text."),
    (r"^transformer\.decoder\.layers\.(\d+)\.catext_norm", r"model.decoder.layers.\1.encoder_attn_text_layer_norm"),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm1", r"model.decoder.layers.\1.encoder_attn_layer_norm"),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm2", r"model.decoder.layers.\1.self_attn_layer_norm"),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm3", r"model.decoder.layers.\1.final_layer_norm"),
    (r"^transformer\.decoder\.layers\.(\d+)\.linear", r"model.decoder.layers.\1.fc"),
    (r"^transformer\.decoder\.layers\.", "model.decoder.layers."),
    (r"\.in_proj_(weight|bias)$", r".*.\1"),
]
_DROPPED = (
    r"\.relative_position_index$",
    r"^bert\.pooler",
    r"^transformer\.decoder\.bbox_embed",
    r"^bbox_embed\.[1-9]",
)


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an original checkpoint and split what is stored fused, in float32.

    Args:
        state: The checkpoint's "model" entry, with or without `module.` before every name.

    Returns:
        Tensors under the names `GDinoForObjectDetection` loads.
    """
    converted = {}
    for key, tensor in state.items():
        key = key.removeprefix("module.")
        if any(re.search(pattern, key) for pattern in _DROPPED):
            continue
        for pattern, replacement in _RULES:
            key = re.sub(pattern, replacement, key)
        tensor = tensor.to(torch.float32)
        if "*" not in key:
            converted[key] = tensor.contiguous()
            continue
        for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            converted[key.replace("*", name)] = part.contiguous()
    return converted
