"""What a configuration's weights are called and how large they are on disk."""

from __future__ import annotations

import torch
from transformers.core_model_loading import revert_weight_conversion

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection


def stored_shapes(config: GDinoConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that `save_pretrained` writes, from a model without storage.

    Args:
        config: The configuration.

    Returns:
        Shapes by key. In memory transformers 5 gives Swin's tensors new names; files keep the old ones.
    """
    with torch.device("meta"):
        model = GDinoForObjectDetection(config)
    tensors = revert_weight_conversion(model, model.state_dict())
    tied = tuple(f"{name}." for name in getattr(model, "_tied_weights_keys", None) or {})
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if not (tied and key.startswith(tied))}
