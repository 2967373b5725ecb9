"""`model.optimize_for_inference()`: the same function, laid out for the machine it runs on."""

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model.decoder import DecoderLayer
from ..model.encoder import DeformableLayer, TextEnhancerLayer
from ..model.fusion import BiAttention
from ..model.heads import BoxHead
from ..model.ms_deform_attn import MSDeformAttn
from ..model.pretrained_gdino import GDinoPreTrainedModel
from .int8_encoder import Int8DeformableLayer
from .int8_linear import Int8Linear, check_int8, has_int8
from .packed_attention import PackedMSDeformAttn
from .packed_linear import PackedLinear, bfloat16_is_slower, can_pack
from .packed_swin import PackedSwin
from .prompt_cache import PromptCache

logger = logging.getLogger(__name__)


def pack_layers(module: nn.Module, int8: bool = False) -> None:
    """Replace every linear layer below a module by a packed one with the same parameters.

    The activation of a feed-forward block moves into its first layer. Fusion stays as it is because it reads its own
    weights, and so does the last layer of a box head, which computes in float32 whatever the model's dtype.

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
        if isinstance(child, BoxHead):
            for index, layer in enumerate(list(child.layers)[:-1]):
                child.layers[index] = kind(cast(nn.Linear, layer))
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


def optimize_for_inference(model: Any, int8: bool | None = None) -> Any:
    """Lay the weights out for this machine's CPU, which runs several times faster, and keep what repeats.

    Linear layers run through oneDNN in its own layout, a Swin backbone window by window, and text features of the
    last prompts are kept. Results differ in rounding only. The published weights stay beside their copies (about
    240 MB more for Grounding DINO-T in float32), so `state_dict` and `save_pretrained` give what they gave before.
    Under torch.compile and on other devices the usual operations run.

    With `int8` the layers of image tokens and queries multiply 8-bit numbers, each row scaled by its own largest
    value, and compute everything else in float32, as do the text's layers and those that make boxes and scores.

    Args:
        model: A `GDinoModel` or `GDinoForObjectDetection`, on any device.
        int8: True asks for it, False forbids it. None uses it for a bfloat16 model on a CPU that multiplies
            float32 faster than bfloat16 and has AVX-512 VNNI. Such a model becomes float32, and is then saved so;
            without VNNI or with False it computes in float32. A log line says which.

    Returns:
        The model itself, in eval mode and without gradients; it does not train any more, and a second call leaves
        it as it is.

    Raises:
        ValueError: `int8` is True and cannot be had: the model is not on a CPU, or not float32 or bfloat16, the CPU
            has no AVX-512 VNNI, or the C library was not compiled.
    """
    if model._optimized:
        return model
    model.eval()
    on_cpu = model.device.type == "cpu"
    if int8:
        check_int8(model.device, model.dtype)
    if on_cpu and model.dtype == torch.bfloat16 and (int8 or bfloat16_is_slower()):
        reason = "As int8 was asked for" if int8 else "This CPU is slow at bfloat16"
        int8 = has_int8() if int8 is None else int8
        now = "multiplies 8-bit numbers for image tokens and queries, everything else" if int8 else "computes"
        logger.warning("%s: the model now %s in float32.", reason, now)
        model.float()
    core = model.base_model
    for module in (model, core):
        module._optimized = True
        module.requires_grad_(False)
    pack_model(core, bool(int8))
    if core is not model:
        pack_layers(model.bbox_embed)
    core._prompts = PromptCache()
    return model


def install() -> None:
    """Give the model classes their `optimize_for_inference`; model/ itself knows no optimizer."""
    setattr(GDinoPreTrainedModel, "optimize_for_inference", optimize_for_inference)  # noqa: B010 - mypy refuses to assign methods
