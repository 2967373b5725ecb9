"""The configuration of every Grounding DINO variant: the published models, MM, LLMDet and gdino-nano."""

import copy
import math
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, PreTrainedConfig, SwinConfig
from transformers.activations import ACT2FN

from .csp_pan import CspPanConfig
from .legacy_backbone import LEGACY_FIELDS, legacy_backbone
from .size_limits import SHORTEST_PROMPT, check_sizes

# Model types of transformers whose config.json loads here, with the fields that reproduce their behaviour.
_FOREIGN_MODEL_TYPES: dict[str, dict[str, Any]] = {
    "grounding-dino": {"class_head": "dot"},
    "mm-grounding-dino": {"class_head": "scaled_bias"},
}

_SWIN_TINY = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
_SWIN_BASE = {
    "embed_dim": 128,
    "depths": [2, 2, 18, 2],
    "num_heads": [4, 8, 16, 32],
    "window_size": 12,
    "image_size": 384,
}
_SWIN_LARGE = {
    "embed_dim": 192,
    "depths": [2, 2, 18, 2],
    "num_heads": [6, 12, 24, 48],
    "window_size": 12,
    "image_size": 384,
}
# The original code clamps every inverse sigmoid at 1e-3; MM-Grounding-DINO only inside the decoder.
_ORIGINAL = {"inverse_sigmoid_eps": 1e-3, "decoder_inverse_sigmoid_eps": 1e-3}
_MM = {
    "class_head": "scaled_bias",
    "decoder_bbox_embed_share": False,
    "decoder_cls_embed_share": False,
    "decoder_inverse_sigmoid_eps": 1e-3,
    "class_cost": 2.0,
}


def _swin(shape: dict[str, Any], out_indices: list[int]) -> SwinConfig:
    """Build a Swin configuration from copies of the lists, so no two configurations share one."""
    return SwinConfig(**copy.deepcopy(shape), out_indices=out_indices)


def _preset_fields(name: str) -> dict[str, Any]:
    """Return the constructor arguments of a preset, with new sub-config objects on every call."""
    if name == "tiny":
        return {"backbone_config": _swin(_SWIN_TINY, [2, 3, 4]), **_ORIGINAL}
    if name == "base":
        return {"backbone_config": _swin(_SWIN_BASE, [2, 3, 4]), **_ORIGINAL}
    if name == "mm-tiny":
        return {"backbone_config": _swin(_SWIN_TINY, [2, 3, 4]), **_MM}
    if name == "mm-base":
        return {"backbone_config": _swin(_SWIN_BASE, [2, 3, 4]), **_MM}
    if name == "mm-large":
        backbone_config = _swin(_SWIN_LARGE, [1, 2, 3, 4])
        return {"backbone_config": backbone_config, "num_feature_levels": 5, **_MM}
    if name == "nano":
        text_config = BertConfig(
            hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
        )
        return {
            "backbone_config": CspPanConfig(head_features=True),
            "text_config": text_config,
            "d_model": 128,
            "encoder_layers": 2,
            "encoder_ffn_dim": 512,
            "decoder_layers": 3,
            "decoder_ffn_dim": 512,
            "num_queries": 100,
            "class_head": "scaled_bias",
            "decoder_bbox_embed_share": False,
            "decoder_cls_embed_share": False,
            "class_cost": 2.0,
            "embedding_init_target": False,
            "fusion_init_value": 0.1,
            "fusion_droppath": 0.0,
            "num_denoising_queries": 30,
        }
    known = "tiny, base, mm-tiny, mm-base, mm-large, nano"
    raise ValueError(f"There is no preset {name!r}; choose one of {known}.")


# Field names with their smallest and largest values. None as the smallest value means "above 0".
_LIMITS: tuple[tuple[tuple[str, ...], float | None, float], ...] = (
    (("num_queries", "encoder_layers", "decoder_layers", "num_feature_levels", "d_model"), 1, math.inf),
    (("max_text_len",), SHORTEST_PROMPT, math.inf),
    (("encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads"), 1, math.inf),
    (("encoder_n_points", "decoder_n_points"), 1, math.inf),
    (("num_denoising_queries", "denoising_box_noise", "denoising_label_embeddings"), 0, math.inf),
    (("dropout", "attention_dropout", "activation_dropout", "fusion_dropout", "fusion_droppath"), 0, 1),
    (("text_enhancer_dropout", "denoising_label_noise", "focal_alpha"), 0, 1),
    (("focal_gamma", "class_cost", "bbox_cost", "giou_cost"), 0, math.inf),
    (("class_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"), 0, math.inf),
    (("contrastive_loss_coefficient",), 0, math.inf),
    (("class_head_temperature", "contrastive_temperature"), None, math.inf),
    # Larger ones would make every feature 0 and every box the same.
    (("layer_norm_eps",), None, 1.0),
    (("inverse_sigmoid_eps", "decoder_inverse_sigmoid_eps"), None, 0.4),
    (("positional_embedding_temperature", "query_position_temperature", "text_position_temperature"), None, math.inf),
)


def _check_range(name: str, value: float, low: float | None, high: float) -> None:
    """Raise an error if a number is NaN or outside its limits."""
    if (value > 0 if low is None else value >= low) and value <= high:
        return
    if low is None:
        raise ValueError(f"{name} must be positive, got {value}.")
    limit = f"within {low}..{high}" if high < math.inf else f"at least {low}"
    raise ValueError(f"{name} must be {limit}, got {value}.")


@strict
class GDinoConfig(PreTrainedConfig):
    """Architecture, loss and denoising settings of a Grounding DINO model (Liu et al. 2023, arXiv:2303.05499).

    Fields of transformers' GroundingDinoConfig and MMGroundingDinoConfig keep their names and meaning, so the
    config.json of a Hub checkpoint of either type can be read. The fields below are new or differ.

    Args:
        backbone_config: Configuration of any AutoBackbone that gives a feature pyramid. Default: Swin-T.
        text_config: Configuration of any AutoModel text encoder. Default: BERT base.
        class_head: Similarity of queries q and text tokens t, also used to select queries: "dot" (q.t), "scaled_bias"
            (q.t / sqrt(D) + b, as in MM-Grounding-DINO) or "cosine" (cos(q, t) / temperature + b, both learned).
        class_head_temperature: Initial temperature of the cosine head, positive.
        fusion_type: Image-text fusion: "bi_attention" as published, or "gated", a learned weighted mean per token.
        fusion_init_value: Initial value of the scale of each fusion layer's residual branch (bi_attention only).
        inverse_sigmoid_eps: Smallest distance from 0 and 1 in the inverse sigmoid of predicted boxes, positive.
        decoder_inverse_sigmoid_eps: The same limit where the decoder refines boxes. None means inverse_sigmoid_eps.
        query_position_temperature: Temperature of the sine embedding of query boxes, positive.
        text_position_temperature: Temperature of the sine embedding of text positions, positive.
        special_token_ids: Token ids of [CLS] and [SEP], followed by those that separate labels, "." and "?".
        focal_gamma: Focusing parameter of the focal loss and of the matching cost, at least 0.
        class_loss_coefficient: Weight of the focal loss.
        contrastive_loss_coefficient: Weight of the contrastive loss of regions and phrases. 0 leaves it out.
        contrastive_temperature: Temperature of the contrastive loss, positive.
        num_denoising_queries: Number of positive denoising queries to aim for per image; there are as many negatives.
            0 turns denoising off.
        denoising_label_noise: Twice the probability that a denoising query gets a random label of its prompt, in
            [0, 1].
        denoising_box_noise: Scale of the noise on denoising boxes, relative to half of the box's side.
        denoising_label_embeddings: Number of rows of a learned table of label features for denoising queries (256 in
            MM-Grounding-DINO). 0 takes the label's text features, which need no table and work for any vocabulary.
        disable_custom_kernels: Whether to compute deformable attention with PyTorch's own operations only.
        use_hub_kernels: Whether the CUDA kernel of deformable attention may be downloaded from the Hub.

    Raises:
        ValueError: A field is out of range or two fields exclude each other.
    """

    model_type = "gdino"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig, "text_config": AutoConfig}
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}
    # What Trainer leaves out of the predictions it collects, which would fill the memory: it keeps logits and boxes, at
    # the positions 1 and 2 where programs for transformers' detectors look for them, after the loss terms.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "auxiliary_outputs",
        "last_hidden_state",
        "init_reference_points",
        "intermediate_hidden_states",
        "intermediate_reference_points",
        "decoder_hidden_states",
        "decoder_attentions",
        "encoder_last_hidden_state_vision",
        "encoder_last_hidden_state_text",
        "encoder_vision_hidden_states",
        "encoder_text_hidden_states",
        "encoder_attentions",
        "enc_outputs_class",
        "enc_outputs_coord_logits",
        "encoder_logits",
        "encoder_pred_boxes",
        "input_ids",
        "attention_mask",
        "past_key_values",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_queries: int = 900
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    encoder_n_points: int = 4
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    decoder_n_points: int = 4
    d_model: int = 256
    activation_function: str = "relu"
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    fusion_dropout: float | int = 0.0
    fusion_droppath: float | int = 0.1
    fusion_init_value: float = 1e-4
    fusion_type: Literal["bi_attention", "gated"] = "bi_attention"
    text_enhancer_dropout: float | int = 0.0
    num_feature_levels: int = 4
    max_text_len: int = 256
    special_token_ids: list[int] | tuple[int, ...] = (101, 102, 1012, 1029)
    position_embedding_type: str = "sine"
    positional_embedding_temperature: float | int = 20
    query_position_temperature: float | int = 10000
    text_position_temperature: float | int = 10000
    query_dim: int = 4
    two_stage: bool = True
    embedding_init_target: bool = True
    decoder_bbox_embed_share: bool = True
    decoder_cls_embed_share: bool = True
    two_stage_bbox_embed_share: bool = False
    class_head: Literal["dot", "scaled_bias", "cosine"] = "dot"
    class_head_temperature: float = 0.1
    inverse_sigmoid_eps: float = 1e-5
    decoder_inverse_sigmoid_eps: float | None = None
    layer_norm_eps: float = 1e-5
    init_std: float = 0.02
    auxiliary_loss: bool = True
    class_cost: float | int = 1.0
    bbox_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    class_loss_coefficient: float | int = 1.0
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0
    contrastive_loss_coefficient: float | int = 0.0
    contrastive_temperature: float = 0.07
    focal_alpha: float = 0.25
    focal_gamma: float | int = 2.0
    num_denoising_queries: int = 100
    denoising_label_noise: float | int = 0.5
    denoising_box_noise: float | int = 1.0
    denoising_label_embeddings: int = 0
    disable_custom_kernels: bool = False
    use_hub_kernels: bool = False
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        legacy = {name: kwargs.pop(name) for name in LEGACY_FIELDS if name in kwargs}
        self.settle_backbone(legacy)
        self.text_config = _as_config(self.text_config, BertConfig())
        self.special_token_ids = [int(i) for i in self.special_token_ids]
        if self.decoder_inverse_sigmoid_eps is None:
            self.decoder_inverse_sigmoid_eps = self.inverse_sigmoid_eps
        # A head used in two places is a single module here. Files that say False hold a copy for each place. Saving
        # them with False again, but without the copies, would make transformers report missing weights.
        self.tie_word_embeddings = True
        super().__post_init__(**kwargs)

    def settle_backbone(self, legacy: dict[str, Any] | None = None) -> None:
        """Make backbone_config a configuration object, whatever fields name the backbone.

        Args:
            legacy: Values of the legacy fields `backbone`, `use_timm_backbone`, `use_pretrained_backbone` and
                `backbone_kwargs`. None takes, and removes, those that were set as attributes.

        Raises:
            ValueError: The fields contradict each other or ask for something that a configuration cannot do.
        """
        if legacy is None:
            legacy = {name: self.__dict__.pop(name) for name in LEGACY_FIELDS if name in self.__dict__}
        backbone = legacy_backbone(legacy, self.backbone_config)
        self.backbone_config = _as_config(backbone, _swin(_SWIN_TINY, [2, 3, 4]))

    def validate_architecture(self) -> None:
        """Raise a ValueError that names the field and its limit if the model cannot be built."""
        for names, low, high in _LIMITS:
            for name in names:
                _check_range(name, getattr(self, name), low, high)
            check_sizes({name: getattr(self, name) for name in names})
        if self.fusion_droppath == 1:
            raise ValueError("fusion_droppath must be below 1, got 1: at 1 every fusion branch would be dropped.")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function must be a name that transformers knows, such as 'relu' or 'gelu', got "
                f"{self.activation_function!r}."
            )
        if len(self.special_token_ids) < 2:
            raise ValueError(
                "special_token_ids must hold at least the ids of [CLS] and [SEP], before those that separate labels, "
                f"got {self.special_token_ids}."
            )
        if min(self.special_token_ids) < 0:
            raise ValueError(f"special_token_ids must be numbers of tokens, got {min(self.special_token_ids)}.")
        if self.query_dim != 4:
            raise ValueError(f"query_dim must be 4 (cx, cy, w, h), got {self.query_dim}.")
        if self.d_model % 4 != 0:
            raise ValueError(f"d_model must be a multiple of 4 for the sine embeddings, got {self.d_model}.")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name) != 0:
                raise ValueError(f"d_model ({self.d_model}) must be a multiple of {name} ({getattr(self, name)}).")
        if self.encoder_attention_heads % 2 != 0:
            raise ValueError(
                "encoder_attention_heads must be even, since fusion uses half of them; got "
                f"{self.encoder_attention_heads}."
            )
        if (self.encoder_ffn_dim // 2) % (self.encoder_attention_heads // 2) != 0:
            raise ValueError(
                f"encoder_ffn_dim / 2 ({self.encoder_ffn_dim // 2}) must be a multiple of encoder_attention_heads / 2 "
                f"({self.encoder_attention_heads // 2}), the fusion heads."
            )
        if self.position_embedding_type != "sine":
            raise ValueError(f"position_embedding_type must be 'sine', got {self.position_embedding_type!r}.")
        if self.two_stage_bbox_embed_share and not self.decoder_bbox_embed_share:
            raise ValueError("two_stage_bbox_embed_share needs decoder_bbox_embed_share; set both or neither.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GDinoConfig":
        """Return the configuration of a published model.

        Args:
            name: "tiny" or "base" (Grounding DINO, arXiv:2303.05499), "mm-tiny", "mm-base" or "mm-large"
                (MM-Grounding-DINO, arXiv:2401.02361; LLMDet has the same shapes), or "nano" (gdino-nano).
            **overrides: Fields that replace the preset's values.

        Returns:
            A new configuration.

        Raises:
            ValueError: There is no preset of this name, or an override is out of range.
        """
        return cls(**{**_preset_fields(name), **overrides})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read a config.json and adapt it if its model type is grounding-dino or mm-grounding-dino."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _adopt(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary of model type gdino, grounding-dino or mm-grounding-dino."""
        check_sizes(config_dict)
        try:
            return super().from_dict(_adopt(config_dict), **kwargs)
        except StrictDataclassError as error:
            # The last line has the cause; the lines above announce it.
            cause = str(error).splitlines()[-1].strip().removeprefix("TypeError: ").removeprefix("ValueError: ")
            raise ValueError(
                f"The configuration cannot be used: {cause.partition('. Errors:')[0].rstrip('.')}."
            ) from error


def _adopt(config_dict: dict[str, Any]) -> dict[str, Any]:
    extra = _FOREIGN_MODEL_TYPES.get(config_dict.get("model_type", ""))
    if extra is None:
        return config_dict
    adopted = {**copy.deepcopy(config_dict), **extra, "model_type": GDinoConfig.model_type}
    # Those files turn auxiliary losses off, which transformers computes wrongly; here they are part of the recipe.
    adopted.pop("auxiliary_loss", None)
    adopted.pop("architectures", None)
    # The file's weights replace whatever this flag of theirs would load.
    adopted.pop("use_pretrained_backbone", None)
    return adopted


def _as_config(value: Any, default: PreTrainedConfig) -> PreTrainedConfig:
    """Turn None, a dictionary with a model_type, or a configuration object into a sub-configuration."""
    if value is None:
        return default
    if isinstance(value, PreTrainedConfig):
        check_sizes(value.to_dict())
        return value
    check_sizes(value)
    fields = {key: item for key, item in value.items() if key != "model_type"}
    model_type = value.get("model_type")
    if model_type is None:
        return type(default)(**fields)
    if model_type == CspPanConfig.model_type:
        return CspPanConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)
