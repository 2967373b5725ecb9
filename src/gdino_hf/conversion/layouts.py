"""The layouts there are: how each is recognized, wrapped and counted, and whose it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conversion_error import ConversionError

WRAPPING_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What data-parallel, compiled and Lightning-style wrappers write before every key."""


@dataclass(frozen=True)
class Layout:
    """One project's way of naming a Grounding DINO's tensors.

    Attributes:
        name: Name of its key table.
        title: As people call it.
        signs: Beginnings of keys that no other layout has.
        wrapper: Entry of its .pth files that holds the tensors.
        presets: Configurations published in it; inference starts from the first.
        decoder_layer: Expression whose group is a decoder layer's number.
        backbone_level: The same for projections of the backbone's own feature maps.
        box_head: The same for box heads of decoder layers; the rest of the key is a second group.
        class_bias: The same for biases of class heads; a layout without them has the "dot" head.
        source_url: Where its checkpoints come from.
        licence: What its published weights are under.
    """

    name: str
    title: str
    signs: tuple[str, ...]
    wrapper: str
    presets: tuple[str, ...]
    decoder_layer: str
    backbone_level: str
    box_head: str
    class_bias: str
    source_url: str
    licence: str = "apache-2.0"


ORIGINAL = Layout(
    name="original",
    title="Grounding DINO",
    signs=("transformer.encoder.fusion_layers.", "transformer.encoder.text_layers.", "transformer.tgt_embed."),
    wrapper="model",
    presets=("tiny", "base"),
    decoder_layer=r"transformer\.decoder\.layers\.(\d+)\..+",
    backbone_level=r"backbone\.0\.norm(\d+)\..+",
    box_head=r"bbox_embed\.(\d+)\.(.+)",
    class_bias=r"class_embed\.(\d+)\.bias",
    source_url="https://github.com/IDEA-Research/GroundingDINO",
)
MMDET = Layout(
    name="mmdet",
    title="MM-Grounding-DINO",
    signs=("language_model.language_backbone.", "encoder.fusion_layers.", "decoder.layers.0.cross_attn_text."),
    wrapper="state_dict",
    presets=("mm-tiny", "mm-base", "mm-large"),
    decoder_layer=r"decoder\.layers\.(\d+)\..+",
    backbone_level=r"neck\.convs\.(\d+)\..+",
    box_head=r"bbox_head\.reg_branches\.(\d+)\.(.+)",
    class_bias=r"bbox_head\.cls_branches\.(\d+)\.bias",
    source_url="https://github.com/open-mmlab/mmdetection/tree/main/configs/mm_grounding_dino",
)
TRANSFORMERS = Layout(
    name="transformers",
    title="transformers",
    signs=("model.text_backbone.", "model.input_proj_vision.", "model.backbone.conv_encoder."),
    wrapper="model",
    presets=("tiny", "base", "mm-tiny", "mm-base", "mm-large", "nano"),
    decoder_layer=r"model\.decoder\.layers\.(\d+)\..+",
    backbone_level=r"model\.backbone\.conv_encoder\.model\.hidden_states_norms\.stage(\d+)\..+",
    box_head=r"bbox_embed\.(\d+)\.(.+)",
    class_bias=r"class_embed\.(\d+)\.bias",
    source_url="https://huggingface.co/models?other=grounding-dino",
)
LAYOUTS = {layout.name: layout for layout in (ORIGINAL, MMDET, TRANSFORMERS)}


def find_layout(keys: Iterable[str], where: Any) -> tuple[Layout, str]:
    """Recognize a layout by its keys.

    Args:
        keys: The keys as stored.
        where: The file, for messages.

    Returns:
        The layout, and the prefix that a wrapper put before the keys.

    Raises:
        ConversionError: It is no Grounding DINO.
    """
    names, prefix = list(keys), ""
    while True:
        stripped = [name.removeprefix(prefix) for name in names]
        for layout in LAYOUTS.values():
            if any(name.startswith(layout.signs) for name in stripped):
                return layout, prefix
        more = (p for p in WRAPPING_PREFIXES if sum(name.startswith(p) for name in stripped) > len(stripped) / 2)
        wrapping = next(more, None)
        if wrapping is None:
            raise ConversionError(_no_detector(stripped, where))
        prefix += wrapping


def _no_detector(keys: list[str], where: Any) -> str:
    remedy = "give the checkpoint of a whole Grounding DINO, MM-Grounding-DINO or LLMDet"
    swin = [key for key in keys if re.search(r"patch_embed|relative_position_bias_table", key)]
    head = next((key for key in keys if re.match(r"(head|classifier|fc)\.", key)), None)
    if swin and head:
        return f"{where} is a Swin image classifier ({head!r}) without text encoder and decoder; {remedy}."
    if swin:
        return f"{where} is a Swin backbone ({swin[0]!r}) without text encoder and decoder; {remedy}."
    return f"{where} is no Grounding DINO (its keys are like {keys[0]!r}); {remedy}."


def facts_of_source(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> dict[str, int]:
    """What a layout's table asks of the configuration, from a checkpoint's keys.

    Args:
        layout: The layout.
        shapes: Shapes by key, prefixes taken off.
        read: Reads a tensor by such a key.

    Returns:
        decoder_layers, backbone_levels, and as 0 or 1 which heads are shared.
    """
    layers = _numbers(layout.decoder_layer, shapes)
    biased = bool(_numbers(layout.class_bias, shapes))
    return {
        "decoder_layers": max(layers, default=-1) + 1,
        "backbone_levels": len(_numbers(layout.backbone_level, shapes)),
        # Heads with a bias come from configurations that share nothing, whatever their values; others are one head if
        # they hold the same numbers, which changes no output.
        "decoder_bbox_embed_share": int(not biased and _equal_heads(layout, shapes, read, max(layers, default=-1) + 1)),
        "decoder_cls_embed_share": int(not biased),
        "two_stage_bbox_embed_share": 0,
    }


def facts_of_config(config: Any) -> dict[str, int]:
    """The same from a configuration."""
    backbone = config.backbone_config
    maps = len(getattr(backbone, "out_indices", None) or getattr(backbone, "out_features", None) or ())
    return {
        "decoder_layers": config.decoder_layers,
        "backbone_levels": min(maps, config.num_feature_levels),
        "decoder_bbox_embed_share": int(config.decoder_bbox_embed_share),
        "decoder_cls_embed_share": int(config.decoder_cls_embed_share),
        "two_stage_bbox_embed_share": int(config.two_stage_bbox_embed_share),
    }


def _numbers(expression: str, keys: Iterable[str]) -> set[int]:
    return {int(found[1]) for key in keys if (found := re.fullmatch(expression, key))}


def _equal_heads(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], num_layers: int
) -> bool:
    heads: dict[str, dict[int, str]] = {}
    for key in shapes:
        if (found := re.fullmatch(layout.box_head, key)) and int(found[1]) < num_layers:
            heads.setdefault(found[2], {})[int(found[1])] = key
    for layers in heads.values():
        first, *others = (layers[number] for number in sorted(layers))
        if any(shapes[first] != shapes[key] or not torch.equal(read(first), read(key)) for key in others):
            return False
    return True
