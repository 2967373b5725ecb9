"""`model.optimize_for_inference()`: the same function, computed several times faster.

What it does to a model on a CPU, in this order:

1. Choose the arithmetic by a short measurement: the dtype, oneDNN or C layers, and 8-bit products (arithmetic.py).
2. Replace linear layers, deformable attention and feed-forward blocks by packed ones with the same parameters.
3. Give the image backbone a faster forward.
4. Cache the text features of recent prompts.

On a CUDA GPU the layers stay as they are. The forward pass is replayed from CUDA graphs (graphed_stages.py), and text
features are cached as well.

The published parameters stay in place, so `state_dict` and `save_pretrained` return what they returned before.
"""

import logging
import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..model import token_blocks
from ..model.decoder import DecoderLayer
from ..model.encoder import DeformableLayer, TextEnhancerLayer
from ..model.fusion import BiAttention, FusionLayer
from ..model.heads import BoxHead
from ..model.ms_deform_attn import MSDeformAttn
from ..model.option_flags import checked_flag
from ..model.pretrained_gdino import GDinoPreTrainedModel
from .arithmetic import LinearKinds, choose_arithmetic
from .float_convolution import pack_float_convolutions
from .float_linear import FloatLinear
from .graphed_stages import use_graphs
from .onednn import can_pack
from .packed_attention import PackedMSDeformAttn
from .packed_convolution import pack_convolutions
from .packed_decoder import PackedDecoderLayer
from .packed_encoder import PackedDeformableLayer
from .packed_fusion import PackedFusionLayer
from .packed_linear import PackedLinear
from .packed_swin import PackedSwin
from .prompt_cache import PromptCache
from .workers import only_blocks, run_blocks

logger = logging.getLogger(__name__)


def optimize_for_inference(model: Any, int8: bool | None = None) -> Any:
    """Prepare a model for fast inference on the device that holds it: this machine's CPU or a CUDA GPU.

    On a CPU, linear layers run in C or through oneDNN, whichever a short measurement finds faster here, with weights in
    a layout of their own, and a Swin backbone is computed window by window. A log line says what was chosen. Results
    differ by rounding only. The packed weights are copies: they add about 240 MB for Grounding DINO-T
    in float32.

    On a CUDA GPU, the forward pass is recorded as CUDA graphs, one for each size of images and length of prompts that
    comes a third time, up to 16. Other sizes run one operation at a time, and so does everything if recording fails;
    either is logged once. The dtype stays what it is: load the model with `dtype=torch.float16` or `torch.bfloat16`
    for the speed of half precision. Boxes and sampling locations are float32 in any case.

    On both, the text features of recent prompts are cached. Under torch.compile, on other devices and after a move to
    another device the usual operations run.

    With `int8`, the layers of image tokens and queries multiply 8-bit integers, with one scale per row. The layers of
    the text and those that produce boxes and scores stay in float32.

    Args:
        model: A `GDinoModel` or `GDinoForObjectDetection` on the device where it will run. It is changed in place.
        int8: True requires 8-bit products and False forbids them. None uses them for a bfloat16 model if this CPU has
            AVX-512 VNNI and multiplies 8-bit numbers at least 1.3 times as fast as bfloat16 ones. A bfloat16 model
            that uses 8-bit products, or whose CPU multiplies float32 faster than bfloat16, is converted to float32,
            and is saved as float32; a warning says so.

    Returns:
        The model, in evaluation mode and without gradients. It cannot be trained any more. A second call changes
        nothing.

    Raises:
        TypeError: The model is not one of this package's classes, for example because it was loaded as remote code.
        ValueError: accelerate moves the model's weights (`device_map`, offloading); `int8` is neither True, False nor
            None; or it is True, but the model is not on a CPU or not float32 or bfloat16, this CPU has no AVX-512 VNNI,
            or the C library was not compiled.
    """
    _check_class(model)
    _check_hooks(model)
    int8 = None if int8 is None else checked_flag(int8, "int8")
    if model._optimized:
        return model
    model.eval()
    kinds = choose_arithmetic(model, int8)
    model.requires_grad_(False)
    core = model.base_model
    model._optimized = core._optimized = True
    if model.device.type == "cuda":
        _prepare_for_gpu(model)
    else:
        pack_model(model, kinds)
    for module in {model, core}:
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    core.text_feature_cache = PromptCache()
    return model


def install() -> None:
    """Give the model classes `optimize_for_inference`, and their row blocks several workers.

    The folder model/ does not import this package.
    """
    token_blocks.run = run_blocks
    setattr(GDinoPreTrainedModel, "optimize_for_inference", optimize_for_inference)  # noqa: B010 - mypy refuses to assign methods


_contexts = threading.local()


def _enter(module: nn.Module, inputs: Any) -> None:
    """Let only row blocks use several threads while a model runs on a CPU."""
    if torch.compiler.is_compiling():
        return
    stack = _contexts.__dict__.setdefault("stack", [])
    packed = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    context = only_blocks() if packed and next(module.parameters()).device.type == "cpu" else nullcontext()
    context.__enter__()
    stack.append(context)


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _contexts.stack.pop().__exit__(None, None, None)


def _check_class(model: Any) -> None:
    if isinstance(model, GDinoPreTrainedModel):
        return
    name = f"{type(model).__module__}.{type(model).__name__}"
    if type(model).__name__ in ("GDinoModel", "GDinoForObjectDetection"):
        raise TypeError(
            f"{name} was loaded as remote code, whose layers this package cannot replace: import gdino_hf, then load "
            "the model again without trust_remote_code."
        )
    raise TypeError(f"optimize_for_inference takes a GDinoModel or GDinoForObjectDetection, not {name}.")


def _check_hooks(model: Any) -> None:
    """Refuse a model with hooks of accelerate, which would be lost with the layers that they belong to."""
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        raise ValueError(
            f"optimize_for_inference() cannot replace layers whose weights accelerate moves, and {len(hooked)} modules "
            "have its hooks, from device_map or offloading: load the model on one device, without device_map."
        )


def _prepare_for_gpu(model: Any) -> None:
    core = model.base_model
    backbone = core.backbone.conv_encoder.model
    if not PackedSwin.knows(backbone):
        core.backbone.fast_forward = ChannelsLast(backbone)
    use_graphs(model)


def pack_model(model: Any, kinds: LinearKinds) -> None:
    """Replace the layers of a model by packed ones, or log one line if this build of torch cannot pack its dtype.

    Args:
        model: A `GDinoModel` or `GDinoForObjectDetection` in evaluation mode. It is changed in place.
        kinds: Classes of the linear layers.
    """
    core = model.base_model
    dtype = core.level_embed.dtype
    if not can_pack(dtype):
        logger.warning("Packed linear layers for %s are not part of this build of torch: the usual ones run.", dtype)
        return
    for name in ("encoder", "decoder", "encoder_output_bbox_embed"):
        if hasattr(core, name):
            pack_layers(getattr(core, name), kinds)
    if type(getattr(core, "enc_output", None)) is nn.Linear:
        core.enc_output = kinds.others(core.enc_output)
    if core is not model:
        pack_layers(model.bbox_embed, LinearKinds(kinds.others, kinds.others))
    backbone = core.backbone.conv_encoder.model
    if kinds.others is FloatLinear:
        pack_float_convolutions(core)
    pack_convolutions(core)
    swin = PackedSwin.knows(backbone)
    core.backbone.fast_forward = PackedSwin(backbone, kinds.tokens) if swin else ChannelsLast(backbone)


def pack_layers(module: nn.Module, kinds: LinearKinds) -> None:
    """Replace every linear layer below a module by a packed one with the same parameters.

    The activation of a feed-forward block moves into its first layer. Fusion layers stay as they are because they read
    their weights themselves, and so does the last layer of a box head, which computes in float32 whatever the dtype.

    Args:
        module: Encoder, decoder or heads. It is changed in place.
        kinds: Classes of the linear layers.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (DeformableLayer, DecoderLayer)) and (replacement := _pack_block(child, kinds.tokens)):
                setattr(parent, name, replacement)
            elif type(child) is FusionLayer:
                setattr(parent, name, PackedFusionLayer(child, kinds.others))
    kept = {head.layers[-1] for head in module.modules() if isinstance(head, BoxHead)}
    _pack_below(module, kinds, kinds.others, kept)


def _pack_block(layer: DeformableLayer | DecoderLayer, kind: type[PackedLinear]) -> nn.Module | None:
    """Return a packed layer that computes whole blocks of rows; None if a part of the layer is not as published."""
    parts = [module for module in layer.modules() if next(module.parameters(recurse=False), None) is not None]
    attention: nn.Module = layer.self_attn if isinstance(layer, DeformableLayer) else layer.encoder_attn
    if not {type(part) for part in parts} <= {nn.Linear, nn.LayerNorm} or type(layer.activation) is not nn.ReLU:
        return None
    if type(attention) is not MSDeformAttn or not _fits(attention):
        return None
    if type(layer) is DeformableLayer:
        return PackedDeformableLayer(layer, kind)
    return PackedDecoderLayer(layer, kind) if type(layer) is DecoderLayer else None


def _pack_below(module: nn.Module, kinds: LinearKinds, kind: type[PackedLinear], kept: set[nn.Module]) -> None:
    is_block = isinstance(module, (DecoderLayer, DeformableLayer, TextEnhancerLayer))
    if is_block and type(module.activation) is nn.ReLU and type(module.fc1) is nn.Linear:
        module.fc1, module.activation = kind(module.fc1, "relu"), nn.Identity()
    for name, child in list(module.named_children()):
        if isinstance(child, (BiAttention, PackedDeformableLayer, PackedDecoderLayer)) or child in kept:
            continue
        if type(child) is nn.Linear:
            setattr(module, name, kind(child))
        elif type(child) is MSDeformAttn and _fits(child):
            setattr(module, name, PackedMSDeformAttn(child, kinds.tokens))
        else:
            _pack_below(child, kinds, kinds.tokens if isinstance(child, DecoderLayer) else kind, kept)


def _fits(attention: MSDeformAttn) -> bool:
    """Return whether the C kernels accept heads of this width."""
    return attention.value_proj.out_features // attention.num_heads <= 256


class ChannelsLast:
    """Forward of a convolutional backbone with channels last in memory, which avoids reordering around each layer.

    Args:
        backbone: The backbone, whose parameters stay as they are.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) pixels to feature maps (B, C_l, h_l, w_l), fine to coarse."""
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return list(self.backbone(pixel_values).feature_maps)
