"""Fields by which older configurations of transformers name the image backbone, turned into a `backbone_config`.

`backbone="resnet50"` with `use_timm_backbone`, `use_pretrained_backbone` and `backbone_kwargs` came before
`backbone_config`. transformers 5 passes over most of them; here they build what they say, or are refused.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, TimmBackboneConfig

LEGACY_FIELDS = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs")
# The stages with strides 8, 16 and 32 of a timm model.
_TIMM_STAGES = (2, 3, 4)
_REMEDY = "give backbone_config, for instance {'model_type': 'timm_backbone', 'backbone': 'resnet50'}"


def legacy_backbone(fields: Mapping[str, Any], backbone_config: Any) -> Any:
    """Turn legacy fields into the configuration of a backbone.

    Args:
        fields: Values of some of `LEGACY_FIELDS`. None and False mean that a field says nothing, as in published files.
        backbone_config: The backbone's configuration as an object or dictionary, or None if only the fields name one.

    Returns:
        `backbone_config` if the fields say nothing, else a new configuration. A name with a slash or of a local folder
        is read like any model of transformers; other names, and all names with use_timm_backbone=True, are timm's.
        Without `out_indices` or `out_features` in backbone_kwargs, the last three stages are used.

    Raises:
        ValueError: The fields ask for pretrained weights, contradict each other or backbone_config, or name a backbone
            that cannot be read.
    """
    name, options = fields.get("backbone"), dict(fields.get("backbone_kwargs") or {})
    with_timm = fields.get("use_timm_backbone")
    if fields.get("use_pretrained_backbone"):
        raise ValueError(
            "use_pretrained_backbone=True is not supported, since a configuration holds no weights; leave it out and "
            "load the weights with model.model.backbone.conv_encoder.model.load_state_dict(...)."
        )
    if name is None:
        _check_without_name(with_timm, options, backbone_config)
        return backbone_config
    if not isinstance(name, str):
        raise ValueError(f"backbone must be the name of a model, got {name!r}; {_REMEDY}.")
    if backbone_config is not None:
        raise ValueError(f"backbone={name!r} and backbone_config are both given; give one of them.")
    if with_timm or (with_timm is None and "/" not in name):
        if not {"out_indices", "out_features"} & set(options):
            options["out_indices"] = _TIMM_STAGES
        return TimmBackboneConfig(**{**options, "backbone": name})
    return _read(name, options)


def _check_without_name(with_timm: Any, options: Mapping[str, Any], backbone_config: Any) -> None:
    """Raise an error if fields ask for a backbone that none of them names."""
    if options:
        raise ValueError(f"backbone_kwargs={dict(options)} are given without a backbone; {_REMEDY}.")
    found = backbone_config if isinstance(backbone_config, Mapping) else getattr(backbone_config, "__dict__", {})
    model_type = found.get("model_type") or getattr(backbone_config, "model_type", None)
    if with_timm and model_type != TimmBackboneConfig.model_type:
        raise ValueError(f"use_timm_backbone=True is given without the name of a timm model; {_REMEDY}.")


def _read(name: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Read the configuration of a backbone of transformers from the Hub or a folder."""
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        cause = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"backbone={name!r} cannot be read ({cause}); {_REMEDY}.") from error
    stages = getattr(config, "stage_names", None)
    if stages is None:
        raise ValueError(f"backbone={name!r} is a {config.model_type!r}, which is no image backbone; {_REMEDY}.")
    if not {"out_indices", "out_features"} & set(options):
        config.out_features = stages[-3:]
    return config
