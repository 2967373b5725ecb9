"""Any AutoModel text encoder that can keep the phrases of a prompt apart."""

import inspect
from typing import Any

from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .configuration_gdino import GDinoConfig

# Encoders to which a mask of attention cannot say which phrase a token belongs to, and why.
_REFUSED = {
    "deberta": "it takes no mask per pair of tokens",
    "deberta-v2": "it takes no mask per pair of tokens",
    "convbert": "its convolutions mix neighbouring phrases",
    "mobilebert": "its embeddings mix neighbouring phrases",
}


def build_text_backbone(config: GDinoConfig) -> PreTrainedModel:
    """The text encoder of config.text_config, without the pooler it may have: nothing would train it.

    Args:
        config: The model's configuration.

    Returns:
        The encoder; a pooler that cannot be left out is frozen.

    Raises:
        ValueError: The encoder cannot keep phrases apart, or is none.
    """
    text_config: Any = config.text_config
    reason = _REFUSED.get(text_config.model_type)
    if getattr(text_config, "is_encoder_decoder", False):
        reason = "it has a decoder"
    elif type(text_config) not in MODEL_MAPPING:
        reason = "AutoModel does not know it"
    if reason is not None:
        raise ValueError(
            f"text_config of model_type {text_config.model_type!r} cannot serve as a text encoder, since {reason}; "
            "use for instance 'bert', 'roberta', 'mpnet' or 'modernbert'."
        )
    text_class = MODEL_MAPPING[type(text_config)]
    takes_pooler = "add_pooling_layer" in inspect.signature(text_class.__init__).parameters
    model = AutoModel.from_config(text_config, **({"add_pooling_layer": False} if takes_pooler else {}))
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    return model


def first_position(text_backbone: PreTrainedModel) -> int:
    """Position of a phrase's first token: RoBERTa and its kin keep the rows up to the padding's for no token.

    Args:
        text_backbone: The encoder.

    Returns:
        0, or one more than the padding index of the table of positions.
    """
    table = getattr(getattr(text_backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1
