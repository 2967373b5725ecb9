"""Names and shapes of published checkpoints, written by hand from the module trees of their projects.

Nothing here uses the key tables, which are tested against these lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Sizes that names and shapes depend on; the defaults are those of Grounding DINO with Swin-T."""

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    stages: tuple[int, ...] = (1, 2, 3)  # stages whose feature maps are used, counted from 0
    levels: int = 4
    d_model: int = 256
    ffn: int = 2048
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 900
    vocabulary: int = 30522
    text_width: int = 768
    text_layers: int = 12
    text_ffn: int = 3072
    text_positions: int = 512
    points: int = 4
    extra: Shapes = field(default_factory=dict)

    @property
    def channels(self) -> list[int]:
        """Number of channels of every stage."""
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]


TINY = Sizes()
BASE = replace(TINY, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window=12)
LARGE = replace(BASE, embed_dim=192, num_heads=(6, 12, 24, 48), stages=(0, 1, 2, 3), levels=5)

# Tensors of the language model that an LLMDet file holds from training: some names of each kind, as its other layers
# have similar names.
LLMDET_EXTRAS: Shapes = {
    "lmm.model.embed_tokens.weight": (8, 896),
    "lmm.model.layers.0.self_attn.q_proj.weight": (896, 896),
    "lmm.model.layers.0.mlp.gate_proj.weight": (4, 896),
    "lmm.model.norm.weight": (896,),
    "lmm.lm_head.weight": (8, 896),
    "connector.projector.0.0.weight": (896, 256),
    "connector.projector.0.0.bias": (896,),
    "connector.pos_proj.weight": (896, 4),
    "region_connector.projector.0.0.weight": (896, 256),
    "region_connector.pos_proj.bias": (896,),
    "image_seperate.weight": (1, 896),
    "ref_point_head.layers.0.weight": (256, 512),
    "ref_point_head.layers.1.bias": (256,),
}

# A tiny model of every part, unlike the published ones in depth, width and number of levels.
SMALL = Sizes(
    embed_dim=8,
    depths=(1, 2, 1, 1),
    num_heads=(1, 1, 2, 2),
    window=4,
    d_model=64,
    ffn=64,
    heads=4,
    encoder_layers=2,
    decoder_layers=3,
    queries=12,
    vocabulary=1100,
    text_width=64,
    text_layers=2,
    text_ffn=48,
    text_positions=40,
)


def _affine(shapes: Shapes, key: str, out: int, *inner: int) -> None:
    shapes[f"{key}.weight"] = (out, *inner)
    shapes[f"{key}.bias"] = (out,)


def _bert(shapes: Shapes, prefix: str, s: Sizes) -> None:
    width = s.text_width
    shapes[f"{prefix}.embeddings.word_embeddings.weight"] = (s.vocabulary, width)
    shapes[f"{prefix}.embeddings.position_embeddings.weight"] = (s.text_positions, width)
    shapes[f"{prefix}.embeddings.token_type_embeddings.weight"] = (2, width)
    _affine(shapes, f"{prefix}.embeddings.LayerNorm", width)
    for i in range(s.text_layers):
        layer = f"{prefix}.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            _affine(shapes, f"{layer}.attention.self.{part}", width, width)
        _affine(shapes, f"{layer}.attention.output.dense", width, width)
        _affine(shapes, f"{layer}.attention.output.LayerNorm", width)
        _affine(shapes, f"{layer}.intermediate.dense", s.text_ffn, width)
        _affine(shapes, f"{layer}.output.dense", width, s.text_ffn)
        _affine(shapes, f"{layer}.output.LayerNorm", width)


def _deformable(shapes: Shapes, key: str, s: Sizes) -> None:
    samples = s.heads * s.levels * s.points
    _affine(shapes, f"{key}.sampling_offsets", 2 * samples, s.d_model)
    _affine(shapes, f"{key}.attention_weights", samples, s.d_model)
    _affine(shapes, f"{key}.value_proj", s.d_model, s.d_model)
    _affine(shapes, f"{key}.output_proj", s.d_model, s.d_model)


def _attention(shapes: Shapes, key: str, width: int) -> None:
    shapes[f"{key}.in_proj_weight"] = (3 * width, width)
    shapes[f"{key}.in_proj_bias"] = (3 * width,)
    _affine(shapes, f"{key}.out_proj", width, width)


def _fusion(shapes: Shapes, key: str, s: Sizes) -> None:
    d, width = s.d_model, s.ffn // 2
    shapes[f"{key}.gamma_v"] = shapes[f"{key}.gamma_l"] = (d,)
    for side in ("v", "l"):
        _affine(shapes, f"{key}.layer_norm_{side}", d)
        _affine(shapes, f"{key}.attn.{side}_proj", width, d)
        _affine(shapes, f"{key}.attn.values_{side}_proj", width, d)
        _affine(shapes, f"{key}.attn.out_{side}_proj", d, width)


def original(s: Sizes, position_ids: bool = True) -> Shapes:
    """A file of IDEA-Research/GroundingDINO, its "model" entry."""
    shapes: Shapes = {"transformer.level_embed": (s.levels, s.d_model)}
    d = s.d_model
    for i in range(s.encoder_layers):
        layer = f"transformer.encoder.layers.{i}"
        _deformable(shapes, f"{layer}.self_attn", s)
        _affine(shapes, f"{layer}.norm1", d)
        _affine(shapes, f"{layer}.linear1", s.ffn, d)
        _affine(shapes, f"{layer}.linear2", d, s.ffn)
        _affine(shapes, f"{layer}.norm2", d)
    for i in range(s.encoder_layers):
        layer = f"transformer.encoder.text_layers.{i}"
        _attention(shapes, f"{layer}.self_attn", d)
        _affine(shapes, f"{layer}.linear1", s.ffn // 2, d)
        _affine(shapes, f"{layer}.linear2", d, s.ffn // 2)
        _affine(shapes, f"{layer}.norm1", d)
        _affine(shapes, f"{layer}.norm2", d)
    for i in range(s.encoder_layers):
        _fusion(shapes, f"transformer.encoder.fusion_layers.{i}", s)
    for i in range(s.decoder_layers):
        layer = f"transformer.decoder.layers.{i}"
        _deformable(shapes, f"{layer}.cross_attn", s)
        _affine(shapes, f"{layer}.norm1", d)
        _attention(shapes, f"{layer}.ca_text", d)
        _affine(shapes, f"{layer}.catext_norm", d)
        _attention(shapes, f"{layer}.self_attn", d)
        _affine(shapes, f"{layer}.norm2", d)
        _affine(shapes, f"{layer}.linear1", s.ffn, d)
        _affine(shapes, f"{layer}.linear2", d, s.ffn)
        _affine(shapes, f"{layer}.norm3", d)
    _affine(shapes, "transformer.decoder.norm", d)
    _affine(shapes, "transformer.decoder.ref_point_head.layers.0", d, 2 * d)
    _affine(shapes, "transformer.decoder.ref_point_head.layers.1", d, d)
    for i in range(s.decoder_layers):
        _box_head(shapes, f"transformer.decoder.bbox_embed.{i}.layers", (0, 1, 2), d)
    shapes["transformer.tgt_embed.weight"] = (s.queries, d)
    _affine(shapes, "transformer.enc_output", d, d)
    _affine(shapes, "transformer.enc_output_norm", d)
    _box_head(shapes, "transformer.enc_out_bbox_embed.layers", (0, 1, 2), d)
    if position_ids:
        shapes["bert.embeddings.position_ids"] = (1, s.text_positions)
    _bert(shapes, "bert", s)
    _affine(shapes, "bert.pooler.dense", s.text_width, s.text_width)
    _affine(shapes, "feat_map", d, s.text_width)
    used = [s.channels[stage] for stage in s.stages]
    for level in range(s.levels):
        inner = used[level] if level < len(used) else used[-1] if level == len(used) else d
        size = 1 if level < len(used) else 3
        _affine(shapes, f"input_proj.{level}.0", d, inner, size, size)
        _affine(shapes, f"input_proj.{level}.1", d)
    _affine(shapes, "backbone.0.patch_embed.proj", s.embed_dim, 3, 4, 4)
    _affine(shapes, "backbone.0.patch_embed.norm", s.embed_dim)
    for stage, (depth, heads, width) in enumerate(zip(s.depths, s.num_heads, s.channels, strict=True)):
        for i in range(depth):
            block = f"backbone.0.layers.{stage}.blocks.{i}"
            _affine(shapes, f"{block}.norm1", width)
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * s.window - 1) ** 2, heads)
            shapes[f"{block}.attn.relative_position_index"] = (s.window**2, s.window**2)
            _affine(shapes, f"{block}.attn.qkv", 3 * width, width)
            _affine(shapes, f"{block}.attn.proj", width, width)
            _affine(shapes, f"{block}.norm2", width)
            _affine(shapes, f"{block}.mlp.fc1", 4 * width, width)
            _affine(shapes, f"{block}.mlp.fc2", width, 4 * width)
        if stage + 1 < len(s.depths):
            shapes[f"backbone.0.layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            _affine(shapes, f"backbone.0.layers.{stage}.downsample.norm", 4 * width)
    for stage in s.stages:
        _affine(shapes, f"backbone.0.norm{stage}", s.channels[stage])
    for i in range(s.decoder_layers):
        _box_head(shapes, f"bbox_embed.{i}.layers", (0, 1, 2), d)
    return {**shapes, **s.extra}


def mmdet(s: Sizes, position_ids: bool = True, class_bias: bool = True, label_embeddings: int = 256) -> Shapes:
    """A file of MM-Grounding-DINO or LLMDet, its "state_dict" entry."""
    shapes: Shapes = {"level_embed": (s.levels, s.d_model)}
    d, bert = s.d_model, "language_model.language_backbone.body.model"
    _affine(shapes, "backbone.patch_embed.projection", s.embed_dim, 3, 4, 4)
    _affine(shapes, "backbone.patch_embed.norm", s.embed_dim)
    for stage, (depth, heads, width) in enumerate(zip(s.depths, s.num_heads, s.channels, strict=True)):
        for i in range(depth):
            block = f"backbone.stages.{stage}.blocks.{i}"
            _affine(shapes, f"{block}.norm1", width)
            shapes[f"{block}.attn.w_msa.relative_position_bias_table"] = ((2 * s.window - 1) ** 2, heads)
            shapes[f"{block}.attn.w_msa.relative_position_index"] = (s.window**2, s.window**2)
            _affine(shapes, f"{block}.attn.w_msa.qkv", 3 * width, width)
            _affine(shapes, f"{block}.attn.w_msa.proj", width, width)
            _affine(shapes, f"{block}.norm2", width)
            _affine(shapes, f"{block}.ffn.layers.0.0", 4 * width, width)
            _affine(shapes, f"{block}.ffn.layers.1", width, 4 * width)
        if stage + 1 < len(s.depths):
            _affine(shapes, f"backbone.stages.{stage}.downsample.norm", 4 * width)
            shapes[f"backbone.stages.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
    for stage in s.stages:
        _affine(shapes, f"backbone.norm{stage}", s.channels[stage])
    for level, stage in enumerate(s.stages):
        _affine(shapes, f"neck.convs.{level}.conv", d, s.channels[stage], 1, 1)
        _affine(shapes, f"neck.convs.{level}.gn", d)
    for level in range(s.levels - len(s.stages)):
        _affine(shapes, f"neck.extra_convs.{level}.conv", d, s.channels[s.stages[-1]] if level == 0 else d, 3, 3)
        _affine(shapes, f"neck.extra_convs.{level}.gn", d)
    for i in range(s.decoder_layers + 1):
        if class_bias:
            shapes[f"bbox_head.cls_branches.{i}.bias"] = (1,)
        _box_head(shapes, f"bbox_head.reg_branches.{i}", (0, 2, 4), d)
    for i in range(s.encoder_layers):
        layer = f"encoder.layers.{i}"
        _deformable(shapes, f"{layer}.self_attn", s)
        _feed_forward(shapes, layer, d, s.ffn, norms=2)
    for i in range(s.encoder_layers):
        _attention(shapes, f"encoder.text_layers.{i}.self_attn.attn", d)
        _feed_forward(shapes, f"encoder.text_layers.{i}", d, s.ffn // 2, norms=2)
    for i in range(s.encoder_layers):
        _fusion(shapes, f"encoder.fusion_layers.{i}", s)
    for i in range(s.decoder_layers):
        layer = f"decoder.layers.{i}"
        _attention(shapes, f"{layer}.self_attn.attn", d)
        _attention(shapes, f"{layer}.cross_attn_text.attn", d)
        _deformable(shapes, f"{layer}.cross_attn", s)
        _feed_forward(shapes, layer, d, s.ffn, norms=4)
    _affine(shapes, "decoder.ref_point_head.layers.0", d, 2 * d)
    _affine(shapes, "decoder.ref_point_head.layers.1", d, d)
    _affine(shapes, "decoder.norm", d)
    shapes["query_embedding.weight"] = (s.queries, d)
    _affine(shapes, "memory_trans_fc", d, d)
    _affine(shapes, "memory_trans_norm", d)
    if position_ids:
        shapes[f"{bert}.embeddings.position_ids"] = (1, s.text_positions)
    _bert(shapes, bert, s)
    _affine(shapes, "text_feat_map", d, s.text_width)
    if label_embeddings:
        shapes["dn_query_generator.label_embedding.weight"] = (label_embeddings, d)
    return {**shapes, **s.extra}


def _box_head(shapes: Shapes, key: str, places: tuple[int, int, int], d: int) -> None:
    for place, out in zip(places, (d, d, 4), strict=True):
        _affine(shapes, f"{key}.{place}", out, d)


def _feed_forward(shapes: Shapes, layer: str, d: int, ffn: int, norms: int) -> None:
    _affine(shapes, f"{layer}.ffn.layers.0.0", ffn, d)
    _affine(shapes, f"{layer}.ffn.layers.1", d, ffn)
    for i in range(norms):
        _affine(shapes, f"{layer}.norms.{i}", d)


PUBLISHED: dict[str, tuple[str, str, Shapes]] = {
    "Grounding DINO, Swin-T": ("original", "tiny", original(replace(TINY, extra={"label_enc.weight": (91, 256)}))),
    "Grounding DINO, Swin-B": ("original", "base", original(BASE)),
    "MM-Grounding-DINO, Swin-T": ("mmdet", "mm-tiny", mmdet(TINY)),
    "MM-Grounding-DINO, Swin-B": ("mmdet", "mm-base", mmdet(BASE, position_ids=False)),
    "MM-Grounding-DINO, Swin-L": ("mmdet", "mm-large", mmdet(LARGE)),
    "LLMDet, Swin-T": ("mmdet", "mm-tiny", mmdet(replace(TINY, extra=LLMDET_EXTRAS))),
    "LLMDet, Swin-B": ("mmdet", "mm-base", mmdet(replace(BASE, extra=LLMDET_EXTRAS))),
    "LLMDet, Swin-L": ("mmdet", "mm-large", mmdet(replace(LARGE, extra=LLMDET_EXTRAS))),
}
"""Published checkpoint -> layout, preset, shapes."""
