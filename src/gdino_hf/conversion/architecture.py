"""Names and shapes of the tensors that a model of a given configuration stores on disk.

`revert_weight_conversion` and `_tied_weights_keys` are internals of transformers (tried with 5.20 and 5.23). If they
change, this file fails to import or the conversion tests find unexpected keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection


def stored_shapes(config: GDinoConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that `save_pretrained` writes, from a model on the meta device.

    Args:
        config: Configuration of the model.

    Returns:
        Shapes by stored key. transformers 5 renames Swin's tensors in memory; these are the names on disk.
    """
    with torch.device("meta"):
        model = GDinoForObjectDetection(config)
    tensors = revert_weight_conversion(model, model.state_dict())
    tied = tuple(f"{name}." for name in getattr(model, "_tied_weights_keys", None) or {})
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if not (tied and key.startswith(tied))}


def stored_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the name on disk of every tensor whose name in memory is another.

    Args:
        fields: Content of config.json.

    Returns:
        Names on disk by names in memory, for tensors that are stored unchanged.
    """
    with torch.device("meta"):
        model = GDinoForObjectDetection(GDinoConfig.from_dict(dict(fields)))
    names: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        stored = list(revert_weight_conversion(model, {name: tensor}))
        if len(stored) == 1 and stored[0] != name:
            names[name] = stored[0]
    return names
