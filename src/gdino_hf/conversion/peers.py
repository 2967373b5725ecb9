"""Translate our configuration into one that transformers' own classes read."""

from __future__ import annotations

from typing import Any

from transformers import GroundingDinoConfig, MMGroundingDinoConfig, PreTrainedConfig

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.csp_pan import CspPanConfig

from .conversion_error import ConversionError

_PEERS: dict[str, tuple[type[PreTrainedConfig], str]] = {
    "dot": (GroundingDinoConfig, "GroundingDinoForObjectDetection"),
    "scaled_bias": (MMGroundingDinoConfig, "MMGroundingDinoForObjectDetection"),
}
_NOT_THEIRS = ("model_type", "architectures", "auto_map", "auxiliary_loss", "transformers_version")


def peer_config(config: GDinoConfig) -> dict[str, Any]:
    """Return the config.json of the equivalent grounding-dino or mm-grounding-dino model.

    Args:
        config: Our configuration.

    Returns:
        The configuration of transformers' class as a dictionary.

    Raises:
        ConversionError: transformers has no model that computes the same.
    """
    backbone = getattr(config.backbone_config, "model_type", None)
    for name, value, exists in (
        ("class_head", config.class_head, config.class_head in _PEERS),
        ("fusion_type", config.fusion_type, config.fusion_type == "bi_attention"),
        ("backbone_config.model_type", backbone, backbone != CspPanConfig.model_type),
    ):
        if not exists:
            raise ConversionError(
                f"transformers' own classes have no {name} {value!r}; share it in our layout, with its custom code."
            )
    peer, architecture = _PEERS[config.class_head]
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_THEIRS}
    known_fields = peer().to_dict()
    theirs = peer(**{key: value for key, value in fields.items() if key in known_fields})
    theirs.architectures = [architecture]
    return theirs.to_dict()
