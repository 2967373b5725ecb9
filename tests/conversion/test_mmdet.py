"""Conversion of MM-Grounding-DINO's and LLMDet's .pth files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertConfig, MMGroundingDinoConfig, MMGroundingDinoForObjectDetection, SwinConfig

sys.path.insert(0, str(Path(__file__).parent))
from published import LLMDET_EXTRAS, SMALL, mmdet, original
from synthetic import assert_same, state_dict

from gdino_hf import GDinoConfig, GDinoForObjectDetection
from gdino_hf.conversion.engine import convert
from gdino_hf.conversion.rules import RULES

FIVE_LEVELS = replace(SMALL, stages=(0, 1, 2, 3), levels=5)
VARIANTS = {
    "three stages, four levels": SMALL,
    "four stages, five levels": FIVE_LEVELS,
    "two computed levels": replace(SMALL, levels=5),
    "no computed level": replace(SMALL, levels=3),
    "other depths": replace(SMALL, depths=(2, 1, 3, 1), encoder_layers=1, decoder_layers=2),
    "other widths": replace(SMALL, embed_dim=12, num_heads=(1, 2, 3, 4), window=3, d_model=32, heads=2, ffn=96),
}
# Both sides compute in float32, but sum in a different order.
LOGIT_TOLERANCE = 1e-4
BOX_TOLERANCE = 1e-5


def there_and_back(tmp_path, content, wrapper="state_dict"):
    torch.save(content, tmp_path / "theirs.pth")
    report = convert(tmp_path / "theirs.pth", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back.pth", to="mmdet")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == [wrapper]
    return report, back[wrapper]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_configuration_is_inferred_and_the_way_back_is_exact(name, tmp_path):
    sizes = VARIANTS[name]
    source = state_dict(mmdet(sizes))
    _, back = there_and_back(tmp_path, {"state_dict": source, "meta": {"epoch": 30}})
    assert_same(back, source)
    config = GDinoConfig.from_pretrained(tmp_path / "ours")
    assert list(config.backbone_config.out_indices) == [stage + 1 for stage in sizes.stages]
    assert (config.num_feature_levels, config.decoder_layers) == (sizes.levels, sizes.decoder_layers)
    assert (config.class_head, config.decoder_bbox_embed_share) == ("scaled_bias", False)
    assert (config.inverse_sigmoid_eps, config.decoder_inverse_sigmoid_eps) == (1e-5, 1e-3)
    model, info = GDinoForObjectDetection.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(
        model.model.denoising_label_embedding.weight, source["dn_query_generator.label_embedding.weight"]
    )
    assert model.class_embed[1].bias.shape == ()


def test_the_language_model_of_llmdet_is_dropped_with_a_reason(tmp_path):
    shapes = mmdet(replace(FIVE_LEVELS, extra=LLMDET_EXTRAS))
    source = state_dict(shapes, torch.float16)
    report, back = there_and_back(tmp_path, {"state_dict": source})
    assert report.plan.dropped.keys() == LLMDET_EXTRAS.keys()
    assert all("LLMDet" in reason for reason in report.plan.dropped.values())
    assert_same(back, {key: tensor for key, tensor in source.items() if key not in LLMDET_EXTRAS})


def test_averaged_weights_of_a_training_run_are_converted(tmp_path):
    source = state_dict(mmdet(SMALL), prefix="module.")
    content = {"ema_state_dict": {"steps": torch.tensor(7), **source}}
    report, back = there_and_back(tmp_path, content, "ema_state_dict")
    assert_same(back, source)
    assert report.plan.dropped.keys() == {"steps"}


def test_averaged_weights_beside_others_are_dropped(tmp_path):
    source = state_dict(mmdet(SMALL))
    averaged = {"ema_" + key.replace(".", "_"): tensor for key, tensor in source.items()}
    report, back = there_and_back(tmp_path, {"state_dict": {**source, **averaged}})
    assert_same(back, source)
    assert report.plan.dropped.keys() == averaged.keys()


def test_weights_without_class_biases_have_the_dot_head(tmp_path):
    source = state_dict(mmdet(SMALL, class_bias=False, label_embeddings=0))
    _, back = there_and_back(tmp_path, {"state_dict": source})
    assert_same(back, source)
    assert GDinoConfig.from_pretrained(tmp_path / "ours").class_head == "dot"


def test_original_weights_go_to_mmdet_and_back(tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "mmdet.pth", to="mmdet")
    convert(tmp_path / "mmdet.pth", tmp_path / "again")
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again")))


def test_patch_merging_is_the_same_function_in_both_orders():
    """Compare mmdetection's patch merging (unfold, norm, reduce) with ours, which slices the four pixels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 8, 6, generator=generator)  # (B, C, h, w)
    norm, reduction = torch.randn(24, generator=generator), torch.randn(12, 24, generator=generator)
    unfolded = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
    theirs = (F.layer_norm(unfolded, (24,)) * norm) @ reduction.T
    pixels = x.permute(0, 2, 3, 1)
    merged = torch.cat([pixels[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1).flatten(1, 2)
    (ours_norm,), (ours_reduction,) = (RULES["unfold"].to_ours(tensor) for tensor in (norm, reduction))
    ours = (F.layer_norm(merged, (24,)) * ours_norm) @ ours_reduction.T
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch.equal(RULES["unfold"].to_theirs([ours_reduction]), reduction)
    assert torch.equal(RULES["unfold"].to_theirs([ours_norm]), norm)


def as_mmdet(peer: MMGroundingDinoForObjectDetection, sizes) -> dict[str, torch.Tensor]:
    """Return what mmdetection would store for the weights of transformers' model, without using the key table."""
    detector, state = peer.model, {}

    def put(key, module):
        for name, tensor in module.named_parameters():
            state[f"{key}.{name}"] = tensor.detach().clone()

    def put_attention(key, module):
        for name in ("weight", "bias"):
            parts = [getattr(getattr(module, part), name) for part in ("query", "key", "value")]
            state[f"{key}.in_proj_{name}"] = torch.cat(parts).detach()
        put(f"{key}.out_proj", module.out_proj)

    def put_all(key, modules):
        for place, module in modules.items():
            put(f"{key}.{place}", module)

    swin = detector.backbone.conv_encoder.model
    swin = getattr(swin, "swin", swin)
    put("backbone.patch_embed.projection", swin.embeddings.patch_embeddings.projection)
    put("backbone.patch_embed.norm", swin.embeddings.norm)
    for s, stage in enumerate(swin.encoder.layers):
        for b, block in enumerate(stage.blocks):
            key, attention = f"backbone.stages.{s}.blocks.{b}", block.attention
            put(f"{key}.norm1", block.layernorm_before)
            put(f"{key}.norm2", block.layernorm_after)
            for name in ("weight", "bias"):
                parts = [getattr(getattr(attention, part), name) for part in ("q_proj", "k_proj", "v_proj")]
                state[f"{key}.attn.w_msa.qkv.{name}"] = torch.cat(parts).detach()
            put(f"{key}.attn.w_msa.proj", attention.o_proj)
            table = attention.relative_position_bias.relative_position_bias_table
            state[f"{key}.attn.w_msa.relative_position_bias_table"] = table.detach().clone()
            put_all(key, {"ffn.layers.0.0": block.mlp.fc1, "ffn.layers.1": block.mlp.fc2})
        if stage.downsample is not None:
            key, merging = f"backbone.stages.{s}.downsample", stage.downsample
            # Theirs is ordered by channel, then by pixel along the rows; ours by pixel down the columns first.
            width = merging.norm.weight.shape[0] // 4
            ours_of_theirs = torch.tensor([p * width + c for c in range(width) for p in (0, 2, 1, 3)])
            state[f"{key}.reduction.weight"] = merging.reduction.weight.detach()[:, ours_of_theirs]
            state[f"{key}.norm.weight"] = merging.norm.weight.detach()[ours_of_theirs]
            state[f"{key}.norm.bias"] = merging.norm.bias.detach()[ours_of_theirs]
    norms = detector.backbone.conv_encoder.model.hidden_states_norms
    for stage in sizes.stages:
        put(f"backbone.norm{stage}", norms[f"stage{stage + 1}"])
    for level, projection in enumerate(detector.input_proj_vision):
        made = level - len(sizes.stages)
        key = f"neck.convs.{level}" if made < 0 else f"neck.extra_convs.{made}"
        put_all(key, {"conv": projection[0], "gn": projection[1]})
    put("language_model.language_backbone.body.model", detector.text_backbone)
    put("text_feat_map", detector.text_projection)
    state["level_embed"] = detector.level_embed.detach().clone()
    put("query_embedding", detector.query_position_embeddings)
    put("memory_trans_fc", detector.enc_output)
    put("memory_trans_norm", detector.enc_output_norm)
    for i, layer in enumerate(detector.encoder.layers):
        deformable, text, fusion = layer.deformable_layer, layer.text_enhancer_layer, layer.fusion_layer
        put(f"encoder.layers.{i}.self_attn", deformable.self_attn)
        put_all(
            f"encoder.layers.{i}",
            {
                "norms.0": deformable.self_attn_layer_norm,
                "norms.1": deformable.final_layer_norm,
                "ffn.layers.0.0": deformable.fc1,
                "ffn.layers.1": deformable.fc2,
            },
        )
        put_attention(f"encoder.text_layers.{i}.self_attn.attn", text.self_attn)
        put_all(
            f"encoder.text_layers.{i}",
            {
                "norms.0": text.layer_norm_before,
                "norms.1": text.layer_norm_after,
                "ffn.layers.0.0": text.fc1,
                "ffn.layers.1": text.fc2,
            },
        )
        state[f"encoder.fusion_layers.{i}.gamma_v"] = fusion.vision_param.detach().clone()
        state[f"encoder.fusion_layers.{i}.gamma_l"] = fusion.text_param.detach().clone()
        put_all(
            f"encoder.fusion_layers.{i}",
            {
                "layer_norm_v": fusion.layer_norm_vision,
                "layer_norm_l": fusion.layer_norm_text,
                "attn.v_proj": fusion.attn.vision_proj,
                "attn.l_proj": fusion.attn.text_proj,
                "attn.values_v_proj": fusion.attn.values_vision_proj,
                "attn.values_l_proj": fusion.attn.values_text_proj,
                "attn.out_v_proj": fusion.attn.out_vision_proj,
                "attn.out_l_proj": fusion.attn.out_text_proj,
            },
        )
    for i, layer in enumerate(detector.decoder.layers):
        key = f"decoder.layers.{i}"
        put_attention(f"{key}.self_attn.attn", layer.self_attn)
        put_attention(f"{key}.cross_attn_text.attn", layer.encoder_attn_text)
        put(f"{key}.cross_attn", layer.encoder_attn)
        put_all(
            key,
            {
                "norms.0": layer.self_attn_layer_norm,
                "norms.1": layer.encoder_attn_text_layer_norm,
                "norms.2": layer.encoder_attn_layer_norm,
                "norms.3": layer.final_layer_norm,
                "ffn.layers.0.0": layer.fc1,
                "ffn.layers.1": layer.fc2,
            },
        )
    put("decoder.norm", detector.decoder.layer_norm)
    put("decoder.ref_point_head", detector.decoder.reference_points_head)
    boxes = [*peer.bbox_embed, detector.encoder_output_bbox_embed]
    classes = [*peer.class_embed, detector.encoder_output_class_embed]
    for n, (box, head) in enumerate(zip(boxes, classes, strict=True)):
        put_all(f"bbox_head.reg_branches.{n}", {"0": box.layers[0], "2": box.layers[1], "4": box.layers[2]})
        state[f"bbox_head.cls_branches.{n}.bias"] = head.bias.detach().reshape(1).clone()
    return state


@pytest.mark.parametrize("sizes", [SMALL, FIVE_LEVELS], ids=["four levels", "five levels"])
def test_forward_through_mmdetections_layout_equals_transformers(sizes, tmp_path):
    config = MMGroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=sizes.embed_dim,
            depths=list(sizes.depths),
            num_heads=list(sizes.num_heads),
            window_size=sizes.window,
            image_size=64,
            out_features=[f"stage{stage + 1}" for stage in sizes.stages],
        ),
        text_config=BertConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=1,
            intermediate_size=sizes.text_ffn,
            max_position_embeddings=sizes.text_positions,
        ),
        d_model=sizes.d_model,
        encoder_layers=sizes.encoder_layers,
        encoder_ffn_dim=sizes.ffn,
        encoder_attention_heads=sizes.heads,
        decoder_layers=sizes.decoder_layers,
        decoder_ffn_dim=sizes.ffn,
        decoder_attention_heads=sizes.heads,
        num_queries=sizes.queries,
        num_feature_levels=sizes.levels,
        decoder_bbox_embed_share=False,
        decoder_cls_embed_share=False,
    )
    torch.manual_seed(0)
    peer = MMGroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
        for layer in peer.model.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.5)
            layer.fusion_layer.text_param.fill_(0.5)
    state = as_mmdet(peer, sizes)
    wanted = mmdet(sizes, position_ids=False, label_embeddings=0)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        key: shape for key, shape in wanted.items() if not key.endswith("relative_position_index")
    }
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours")
    # transformers clamps the decoder's inverse sigmoid where the head's is clamped, mmdetection earlier.
    model = GDinoForObjectDetection.from_pretrained(tmp_path / "ours", decoder_inverse_sigmoid_eps=1e-5).eval()
    prompt = torch.tensor([[101, 5, 6, 1012, 7, 1012, 8, 9, 10, 1012, 102]])
    inputs = {
        "pixel_values": torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1)),
        "pixel_mask": torch.ones(1, 96, 128, dtype=torch.int64),
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "token_type_ids": torch.zeros_like(prompt),
    }
    with torch.no_grad():
        theirs, ours = peer(**inputs), model(**inputs)
    finite = torch.isfinite(theirs.logits)
    assert finite.any()
    assert theirs.pred_boxes.std(dim=1).min() > 1e-3
    assert torch.equal(finite, torch.isfinite(ours.logits))
    torch.testing.assert_close(ours.logits[finite], theirs.logits[finite], rtol=0, atol=LOGIT_TOLERANCE)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=BOX_TOLERANCE)
