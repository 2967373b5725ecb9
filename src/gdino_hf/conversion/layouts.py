"""The known layouts: how a checkpoint of each is recognized, wrapped and described.

`gdino_hf.conversion` describes how to add a layout. Nothing here imports torch, so `gdino convert --help` is fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conversion_error import ConversionError

WRAPPING_PREFIXES = ("base_model.model.", "module.", "_orig_mod.", "model.")
"""Prefixes that peft's, data-parallel, compiled and Lightning-style wrappers put before every key."""

_TABLES = Path(__file__).with_name("keys")


@dataclass(frozen=True)
class Layout:
    """One project's naming of the tensors of a Grounding DINO.

    Attributes:
        name: Short name, which is also the name of the key table.
        title: Name of the project, for the model card.
        signs: Prefixes of keys that occur in no other layout.
        wrapper: Key of the dictionary in a .pth file under which the tensors are stored.
        presets: Names of the configurations published in this layout; what tensors cannot show is taken from the first.
        decoder_layer: Regular expression whose group 1 is the number of a decoder layer.
        backbone_level: Regular expression whose group 1 numbers the feature maps that come from the backbone itself.
        box_head: Regular expression for the box heads of the decoder layers: group 1 is the layer, group 2 the rest.
        class_bias: Regular expression whose group 1 numbers the biases of the class heads. A checkpoint without such
            biases has the "dot" class head.
        source_url: Where checkpoints of this layout are published.
        licence: Licence of the weights published in this layout.
        respelled: Pairs of prefixes: keys that begin with the first, as some programs write them, are read as if they
            began with the second.
        class_heads: Class heads that the project's own code can compute.
        is_file: Whether a checkpoint of this layout is written as one .pth file; False writes a model folder.
        table_folder: Folder of the key table NAME.txt.
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
    is_file: bool = True
    respelled: tuple[tuple[str, str], ...] = ()
    class_heads: tuple[str, ...] = ("dot", "scaled_bias")
    table_folder: Path = _TABLES

    @property
    def table(self) -> str:
        """Text of the key table."""
        return (self.table_folder / f"{self.name}.txt").read_text(encoding="utf-8")

    def spelled(self, key: str) -> str:
        """Return a key as the key table spells it."""
        for theirs, usual in self.respelled:
            if key.startswith(theirs):
                return usual + key.removeprefix(theirs)
        return key


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
    respelled=(("backbone.0.body.", "backbone.0."),),  # NVIDIA TAO
    class_heads=("dot",),
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
    is_file=False,
)
LAYOUTS = {layout.name: layout for layout in (ORIGINAL, MMDET, TRANSFORMERS)}
"""The layouts by name. Our own models have the names of `TRANSFORMERS`."""


def find_layout(keys: Iterable[str], where: Any) -> tuple[Layout, str]:
    """Recognize the layout of a checkpoint by its keys.

    Args:
        keys: The keys as stored.
        where: File or folder of the checkpoint, for messages.

    Returns:
        The layout, and the prefix that wrappers put before every key ("" for none).

    Raises:
        ConversionError: The checkpoint is not a Grounding DINO.
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
            layout, wrapping = _under_other_prefix(stripped, where)
            return layout, prefix + wrapping
        prefix += wrapping


def _under_other_prefix(keys: list[str], where: Any) -> tuple[Layout, str]:
    """Recognize a layout under a prefix of any name, such as the attribute of a training program's own module."""
    for layout in LAYOUTS.values():
        found = [key[: key.index(f".{sign}") + 1] for sign in layout.signs for key in keys if f".{sign}" in key]
        prefixes = list(dict.fromkeys(found))
        for prefix in prefixes:
            if sum(key.startswith(prefix) for key in keys) > len(keys) / 2:
                return layout, prefix
        if prefixes:
            raise ConversionError(
                f"{where} holds a {layout.title} under the prefix {' and '.join(map(repr, prefixes[:4]))}, and most "
                "of its tensors are elsewhere; save the tensors of one prefix alone, and give that file."
            )
    raise ConversionError(_no_detector(keys, where))


def _no_detector(keys: list[str], where: Any) -> str:
    """Return the message for a checkpoint of another kind of model."""
    remedy = "give the checkpoint of a whole Grounding DINO, MM-Grounding-DINO or LLMDet"
    swin = [key for key in keys if re.search(r"patch_embed|relative_position_bias_table", key)]
    head = next((key for key in keys if re.match(r"(head|classifier|fc)\.", key)), None)
    if swin and head:
        return f"{where} is a Swin image classifier ({head!r}) without text encoder and decoder; {remedy}."
    if swin:
        return f"{where} is a Swin backbone ({swin[0]!r}) without text encoder and decoder; {remedy}."
    return f"{where} is not a Grounding DINO (it has keys like {keys[0]!r}); {remedy}."
