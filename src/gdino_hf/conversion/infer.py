"""Infer the configuration from the shapes of a checkpoint's tensors, and compare it with a preset."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import BertConfig, SwinConfig

from gdino_hf.model.configuration_gdino import GDinoConfig

from ..error_text import CONFIG_ERRORS, reason
from .attention_sizes import attention_sizes
from .conversion_error import ConversionError
from .key_map import Facts
from .layouts import MMDET, ORIGINAL, Layout

Shapes = Mapping[str, tuple[int, ...]]

_SWIN = "model.backbone.conv_encoder.model."
_BERT = "model.text_backbone."
_ATTENTION = ".attention.self."
_BERT_HEAD_WIDTH = 64
_SMALL_BERT_HEADS = 4
# Numbers of heads that every width allows.
_FITTING_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 1}

_ARCHITECTURE = (
    "d_model",
    "num_queries",
    "num_feature_levels",
    "encoder_layers",
    "encoder_ffn_dim",
    "encoder_attention_heads",
    "encoder_n_points",
    "decoder_layers",
    "decoder_ffn_dim",
    "decoder_attention_heads",
    "decoder_n_points",
    "class_head",
    "fusion_type",
    "decoder_bbox_embed_share",
    "decoder_cls_embed_share",
)
_SWIN_ARCHITECTURE = ("model_type", "embed_dim", "depths", "num_heads", "window_size", "patch_size", "out_indices")
_BERT_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def infer_config(
    shapes: Shapes,
    layout: Layout,
    facts: Facts,
    where: Any,
    *,
    read: Callable[[str], Tensor],
    given: Mapping[str, Any] | None = None,
) -> tuple[GDinoConfig, list[str]]:
    """Infer the configuration from the shapes of the tensors.

    A size that several tensors show is decided by the majority, so that a single tensor of a wrong shape is reported
    as such instead of changing the configuration.

    Args:
        shapes: Shapes by our key, for the tensors that the checkpoint has.
        layout: The checkpoint's layout; what no tensor shows is taken from its first preset.
        facts: The result of `facts_of_source`.
        where: File or folder of the checkpoint, for messages.
        read: Returns the tensor of one of our keys.
        given: Configuration fields that the user set; those of sub-configurations are not used here.

    Returns:
        The configuration, and one sentence for each assumption that was necessary.

    Raises:
        ConversionError: No configuration fits the tensors.
    """
    find = _Finder(shapes)
    assumed: list[str] = []
    levels = find.count(r"model\.input_proj_vision\.(\d+)\..+") or find.size(r"model\.level_embed", 0) or 4
    fields: dict[str, Any] = {
        "backbone_config": _swin(find),
        "text_config": _bert(find, assumed),
        "num_feature_levels": levels,
        "decoder_layers": facts["decoder_layers"] or None,
        "encoder_layers": find.count(r"model\.encoder\.layers\.(\d+)\..+"),
        "decoder_bbox_embed_share": bool(facts["decoder_bbox_embed_share"]),
        "decoder_cls_embed_share": bool(facts["decoder_cls_embed_share"]),
        "two_stage_bbox_embed_share": bool(facts["two_stage_bbox_embed_share"]),
        "d_model": find.size(r"model\.(enc_output_norm|decoder\.layer_norm|text_projection|enc_output)\..+", 0),
        "num_queries": find.size(r"model\.query_position_embeddings\.weight", 0),
        "encoder_ffn_dim": find.size(r"model\.encoder\.layers\.\d+\.deformable_layer\.fc1\..+", 0),
        "decoder_ffn_dim": find.size(r"model\.decoder\.layers\.\d+\.fc1\..+", 0),
        "denoising_label_embeddings": find.size(r"model\.denoising_label_embedding\.weight", 0) or 0,
    }
    biased = any(re.fullmatch(r".*class_embed.*\.bias", key) for key in shapes)
    fields["class_head"] = "scaled_bias" if biased else "dot"
    if biased and "scaled_bias" not in layout.class_heads:
        assumed.append(
            "scores are divided by the square root of the width before their bias is added, as in MM-Grounding-DINO "
            '(no tensor shows it; --config changes it with {"class_head": ...})'
        )
    preset = _preset_like(layout, fields["class_head"])
    fields.update({key: value for key, value in (given or {}).items() if key not in ("backbone_config", "text_config")})
    fields = {key: value for key, value in fields.items() if value is not None}

    try:
        GDinoConfig.preset(preset, **{**fields, **_FITTING_HEADS})

        def fits(part: str, heads: int) -> bool:
            try:
                GDinoConfig.preset(preset, **{**fields, **_FITTING_HEADS, f"{part}_attention_heads": heads})
            except CONFIG_ERRORS:
                return False
            return True

        sizes, split = attention_sizes(
            shapes, read, levels=fields["num_feature_levels"], fits=fits, given=given or {}, where=where
        )
        return GDinoConfig.preset(preset, **{**fields, **sizes}), [*assumed, *split]
    except CONFIG_ERRORS as error:
        raise ConversionError(
            f"No configuration fits the tensors of {where} ({reason(error)}); give --config the sizes that tensors do "
            "not show, or the checkpoint of a whole Grounding DINO."
        ) from error


def _preset_like(layout: Layout, class_head: str) -> str:
    """Return the preset to take from what no tensor shows: the layout's first, or one with the same class head.

    Weights of Grounding DINO are in use in the layout of mmdetection, too.
    """
    presets = [*layout.presets[:1], *ORIGINAL.presets[:1], *MMDET.presets[:1]]
    return next((name for name in presets if GDinoConfig.preset(name).class_head == class_head), presets[0])


def _swin(find: _Finder) -> SwinConfig:
    """Infer the configuration of the image backbone."""
    blocks = rf"{re.escape(_SWIN)}encoder\.layers\.(\d+)\.blocks\."
    stages = sorted(find.numbers(blocks + r".+"))
    norms = sorted(find.numbers(rf"{re.escape(_SWIN)}hidden_states_norms\.stage(\d+)\..+"))
    table = re.escape(f"{_ATTENTION}relative_position_bias_table")
    rows = find.size(blocks + rf"\d+{table}", 0)
    embed_dim = find.size(rf"{re.escape(_SWIN)}embeddings\.(norm|patch_embeddings\.projection)\..+", 0)
    stage = rf"{re.escape(_SWIN)}encoder\.layers\.{{}}\.blocks\."
    fields: dict[str, Any] = {
        "embed_dim": embed_dim,
        "depths": [find.count(stage.format(s) + r"(\d+)\..+") for s in stages] or None,
        "num_heads": [find.size(stage.format(s) + rf"\d+{table}", 1) or 1 for s in stages] or None,
        "window_size": (math.isqrt(rows) + 1) // 2 if rows else None,
        "patch_size": find.size(rf"{re.escape(_SWIN)}embeddings\.patch_embeddings\.projection\.weight", 2),
        "out_indices": norms or None,
    }
    widened = find.size(stage.format(0) + r"\d+\.intermediate\.dense\..+", 0)
    if embed_dim and widened:
        fields["mlp_ratio"] = widened / embed_dim
    if fields["window_size"] == 12:
        # As in the published checkpoints with 12-pixel windows; the value does not affect the computation.
        fields["image_size"] = 384
    return SwinConfig(**{"out_indices": [2, 3, 4], **{k: v for k, v in fields.items() if v is not None}})


def _bert(find: _Finder, assumed: list[str]) -> BertConfig:
    """Infer the configuration of the text encoder."""
    embeddings = rf"{re.escape(_BERT)}embeddings\."
    width = find.size(rf"{embeddings}(LayerNorm\.weight|LayerNorm\.bias)", 0)
    layer = rf"{re.escape(_BERT)}encoder\.layer\."
    fields: dict[str, Any] = {
        "vocab_size": find.size(rf"{embeddings}word_embeddings\.weight", 0),
        "hidden_size": width,
        "num_hidden_layers": find.count(layer + r"(\d+)\..+"),
        "intermediate_size": find.size(layer + r"\d+\.intermediate\.dense\..+", 0),
        "max_position_embeddings": find.size(rf"{embeddings}position_embeddings\.weight", 0),
        "type_vocab_size": find.size(rf"{embeddings}token_type_embeddings\.weight", 0),
    }
    if width:
        heads = width // _BERT_HEAD_WIDTH if width % _BERT_HEAD_WIDTH == 0 else _SMALL_BERT_HEADS
        fields["num_attention_heads"] = heads
        assumed.append(
            f"text_config.num_attention_heads is {heads} for a width of {width} (no tensor shows it; --config "
            "changes it)"
        )
    return BertConfig(**{key: value for key, value in fields.items() if value is not None})


def check_preset(config: GDinoConfig, preset: str, layout: Layout, where: Any) -> None:
    """Refuse a checkpoint that does not have the sizes of the preset the user named.

    Args:
        config: Configuration that was inferred or read.
        preset: Name of the preset.
        layout: The checkpoint's layout, whose presets the message suggests.
        where: File or folder of the checkpoint, for messages.

    Raises:
        ConversionError: There is no such preset, or the sizes differ; the message names the first difference.
    """
    try:
        wanted = GDinoConfig.preset(preset)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    difference = _difference(config, wanted)
    if difference is None:
        return
    name, found, expected = difference
    fitting = [other for other in layout.presets if _difference(config, GDinoConfig.preset(other)) is None]
    remedy = f"give --preset {fitting[0]}" if fitting else "leave --preset out to take the sizes from the tensors"
    raise ConversionError(f"{where} is not {preset!r}: its {name} is {found}, but {preset!r} has {expected}; {remedy}.")


def _difference(config: GDinoConfig, wanted: GDinoConfig) -> tuple[str, Any, Any] | None:
    """Return the first field in which two configurations differ and its two values, or None."""
    pairs = [
        *(("backbone_config." + name, config.backbone_config, wanted.backbone_config) for name in _SWIN_ARCHITECTURE),
        *(("text_config." + name, config.text_config, wanted.text_config) for name in _BERT_ARCHITECTURE),
        *((name, config, wanted) for name in _ARCHITECTURE),
    ]
    for name, ours, theirs in pairs:
        found, expected = (_plain(getattr(side, name.rpartition(".")[2], None)) for side in (ours, theirs))
        if found != expected:
            return name, found, expected
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


class _Finder:
    """Look-ups over the shapes of all keys that match a regular expression."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def numbers(self, expression: str) -> set[int]:
        """Return group 1 of the expression for every key that matches it."""
        pattern = re.compile(expression)
        return {int(found[1]) for key in self.shapes if (found := pattern.fullmatch(key))}

    def count(self, expression: str) -> int | None:
        """Return the largest index plus one, or None if no key matches."""
        return max(self.numbers(expression), default=-1) + 1 or None

    def size(self, expression: str, axis: int) -> int | None:
        """Return the most frequent size along an axis, or None if no key matches."""
        pattern = re.compile(expression)
        return _most_common(
            shape[axis] for key, shape in self.shapes.items() if len(shape) > axis and pattern.fullmatch(key)
        )


def _most_common(values: Iterable[int]) -> int | None:
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else None
