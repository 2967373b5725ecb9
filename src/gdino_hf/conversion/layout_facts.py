"""Facts about a model, such as its number of decoder layers, that decide which lines of a key table apply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .layouts import Layout

Shapes = Mapping[str, tuple[int, ...]]


def facts_of_source(layout: Layout, shapes: Shapes, read: Callable[[str], Tensor]) -> dict[str, int]:
    """Infer the facts from the tensors of a checkpoint.

    Args:
        layout: The checkpoint's layout.
        shapes: Shapes by key, without wrapper prefix.
        read: Returns the tensor of such a key.

    Returns:
        decoder_layers: Number of decoder layers.
        backbone_levels: Number of feature maps that come from the backbone itself; further ones are computed from them.
        decoder_bbox_embed_share, decoder_cls_embed_share: 1 if all decoder layers share one box or class head, else 0.
        two_stage_bbox_embed_share: 1 if the encoder's proposals use that box head too, else 0.
    """
    layers = _numbers(layout.decoder_layer, shapes)
    biased = bool(_numbers(layout.class_bias, shapes))
    return {
        "decoder_layers": max(layers, default=-1) + 1,
        "backbone_levels": len(_numbers(layout.backbone_level, shapes)),
        # Checkpoints whose class heads have a bias share no heads between layers, even if two heads hold equal values.
        # Without a bias, heads with equal values are stored once; outputs stay the same.
        "decoder_bbox_embed_share": int(not biased and _equal_heads(layout, shapes, read, max(layers, default=-1) + 1)),
        "decoder_cls_embed_share": int(not biased),
        "two_stage_bbox_embed_share": 0,
    }


def facts_of_config(config: Any) -> dict[str, int]:
    """Read the facts that `facts_of_source` lists from a configuration."""
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
    """Return group 1 of the expression for every key that matches it."""
    return {int(found[1]) for key in keys if (found := re.fullmatch(expression, key))}


def _equal_heads(layout: Layout, shapes: Shapes, read: Callable[[str], Tensor], num_layers: int) -> bool:
    """Return whether the box heads of all decoder layers hold equal values."""
    heads: dict[str, dict[int, str]] = {}
    for key in shapes:
        if (found := re.fullmatch(layout.box_head, key)) and int(found[1]) < num_layers:
            heads.setdefault(found[2], {})[int(found[1])] = key
    for layers in heads.values():
        first, *others = (layers[number] for number in sorted(layers))
        if any(shapes[first] != shapes[key] or not torch.equal(read(first), read(key)) for key in others):
            return False
    return True
