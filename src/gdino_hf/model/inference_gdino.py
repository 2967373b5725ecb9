"""`model.optimize_for_inference()`: the same function, laid out for the machine it runs on."""

import logging
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import DecoderLayer
from .encoder import DeformableLayer, TextEnhancerLayer
from .fusion import BiAttention
from .int8_encoder import Int8DeformableLayer
from .int8_linear import Int8Linear
from .ms_deform_attn import MSDeformAttn
from .outputs_gdino import GDinoTextFeatures
from .packed_attention import PackedMSDeformAttn
from .packed_linear import PackedLinear, can_pack, state_of
from .swin_inference import PackedSwin

logger = logging.getLogger(__name__)


def pack_layers(module: nn.Module, int8: bool = False) -> None:
    """Replace every linear layer below a module by a packed one with the same parameters.

    A feed-forward block's activation moves into its first layer. Fusion stays as it is: it reads its weights.

    Args:
        module: Encoder, decoder or head.
        int8: Whether the layers of image tokens and queries multiply 8-bit numbers. The text's few tokens would not
            gain, and what makes boxes and scores of states is not rounded.
    """
    if int8:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is DeformableLayer and type(child.activation) is nn.ReLU and _fits(child.self_attn):
                    setattr(parent, name, Int8DeformableLayer(child))
    _pack_below(module, int8, PackedLinear)


def _pack_below(module: nn.Module, int8: bool, kind: type[PackedLinear]) -> None:
    is_block = isinstance(module, (DecoderLayer, DeformableLayer, TextEnhancerLayer))
    if is_block and type(module.activation) is nn.ReLU and type(module.fc1) is nn.Linear:
        module.fc1, module.activation = kind(module.fc1, "relu"), nn.Identity()
    for name, child in list(module.named_children()):
        if isinstance(child, (BiAttention, Int8DeformableLayer)):
            continue
        if type(child) is nn.Linear:
            setattr(module, name, kind(child))
        elif type(child) is MSDeformAttn and _fits(child):
            setattr(module, name, PackedMSDeformAttn(child, int8))
        else:
            _pack_below(child, int8, Int8Linear if int8 and isinstance(child, DecoderLayer) else kind)


def _fits(attention: MSDeformAttn) -> bool:
    """Whether the C kernels take heads this wide."""
    return attention.value_proj.out_features // attention.num_heads <= 256


def pack_model(model: Any, int8: bool = False) -> None:
    """Pack a `GDinoModel` in place; where this build of torch cannot, leave it and say so in one log line.

    Args:
        model: The GDinoModel, in eval mode.
        int8: Whether layers of image tokens and queries multiply 8-bit numbers.
    """
    model.requires_grad_(False)
    dtype = model.level_embed.dtype
    if not can_pack(dtype):
        logger.warning("Packed linear layers for %s are not part of this build of torch: the usual ones run.", dtype)
        return
    for name in ("encoder", "decoder", "encoder_output_bbox_embed"):
        if hasattr(model, name):
            pack_layers(getattr(model, name), int8)
    if type(getattr(model, "enc_output", None)) is nn.Linear:
        model.enc_output = PackedLinear(model.enc_output)
    backbone = model.backbone.conv_encoder.model
    model.backbone.fast_forward = PackedSwin(backbone, int8) if PackedSwin.knows(backbone) else ChannelsLast(backbone)


class ChannelsLast:
    """A convolutional backbone's forward with channels last in memory, which saves reordering around every layer.

    Args:
        backbone: The backbone, whose weights stay as they are.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to a list of (B, C_l, h_l, w_l), fine to coarse."""
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return list(self.backbone(pixel_values).feature_maps)


class PromptCache:
    """Text features of the last prompts: a detector sees many images and few prompts.

    Args:
        size: Prompts kept.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._kept: OrderedDict[tuple, GDinoTextFeatures] = OrderedDict()
        self._lock = threading.Lock()  # a server runs one model in several threads

    def get(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> GDinoTextFeatures:
        """Features of a prompt, computed if the model's text weights have changed or it is new.

        Args:
            model: The GDinoModel.
            input_ids, attention_mask, token_type_ids: As in `GDinoModel.get_text_features`.

        Returns:
            The features; do not write to them.
        """
        texts = (input_ids, attention_mask, token_type_ids)
        prompt = tuple(None if x is None else (x.shape, tuple(x.flatten().tolist())) for x in texts)
        weights = (*model.text_backbone.parameters(), *model.text_projection.parameters())
        key = (prompt, input_ids.device, torch.is_inference_mode_enabled(), state_of(*weights))
        with self._lock:
            features = self._kept.pop(key, None)
        if features is None:
            features = model._text_features(*texts)
        with self._lock:
            self._kept[key] = features
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return features

    def __deepcopy__(self, memo: dict) -> "PromptCache":
        return PromptCache(self.size)

    def __reduce__(self) -> tuple:
        return PromptCache, (self.size,)
