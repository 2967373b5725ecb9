"""`prepare_for_training(model)`: the same losses and gradients, computed faster on a CPU.

It replaces the two parts with the most tokens: the deformable layers of the encoder (encoder_step.py) and a Swin
backbone (swin_step.py). The feed-forward blocks of encoder and decoder leave out products with zero (relu_block.py).
Other matrix products go to the BLAS that PyTorch was built with, which is about as fast in training as the C layers of
`optimize_for_inference`.
"""

from __future__ import annotations

from typing import Any

from ..model.decoder import DecoderLayer
from ..model.encoder import DeformableLayer
from ..model.pretrained_gdino import GDinoPreTrainedModel
from .encoder_step import layer_step
from .relu_block import relu_step
from .swin_step import SwinStep


def prepare_for_training(model: Any) -> Any:
    """Let a model train through hand-written forward and backward steps on a CPU.

    Losses and gradients differ by rounding only, and the same seed drops the same values. Weights and their names stay
    as they are. Layers with adapters or hooks, other dtypes than float32, autocast, gradient checkpointing of the
    backbone, torch.compile and other devices run the ordinary layers. A gradient of a gradient, which deformable
    attention does not have either, is refused by PyTorch.

    `GDinoTrainer` calls this on a CPU. A loop of your own calls it once before the first step.

    Args:
        model: A `GDinoModel` or `GDinoForObjectDetection`, changed in place.

    Returns:
        The model.

    Raises:
        TypeError: The model is not one of this package's classes.
    """
    if not isinstance(model, GDinoPreTrainedModel):
        name = f"{type(model).__module__}.{type(model).__name__}"
        raise TypeError(f"prepare_for_training takes a GDinoModel or GDinoForObjectDetection, not {name}.")
    core = model.base_model
    for module in core.modules():
        if isinstance(module, DeformableLayer):
            module.fast_step = layer_step
        elif isinstance(module, DecoderLayer):
            module.fast_step = relu_step
    backbone = core.backbone.conv_encoder.model
    if core.backbone.fast_forward is None and SwinStep.knows(backbone):
        core.backbone.fast_forward = SwinStep(backbone)
    return model
