"""The text backbone: any AutoModel text encoder whose attention mask can keep the phrases of a prompt apart."""

import inspect
from typing import Any

from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .configuration_gdino import GDinoConfig
from .transformers_internals import build_part

# Encoders whose attention mask cannot keep phrases apart, with the reason that the error message gives.
_REFUSED = {
    "deberta": "it takes no mask per pair of tokens",
    "deberta-v2": "it takes no mask per pair of tokens",
    "convbert": "its convolutions mix neighbouring phrases",
    "mobilebert": "its embeddings mix neighbouring phrases",
}


def build_text_backbone(config: GDinoConfig) -> PreTrainedModel:
    """Build the text encoder that config.text_config describes, without the pooler, which detection does not use.

    Args:
        config: The model's configuration.

    Returns:
        The encoder. A pooler that cannot be left out is frozen.

    Raises:
        ValueError: The model type is no text encoder or cannot keep phrases apart.
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
    arguments = {"add_pooling_layer": False} if takes_pooler else {}
    model = build_part(lambda: AutoModel.from_config(text_config, **arguments), text_config)
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    return model


def first_position(text_backbone: PreTrainedModel) -> int:
    """Return the position id of a phrase's first token.

    RoBERTa and its relatives reserve the first rows of their position table, up to the padding index.

    Args:
        text_backbone: The text encoder.

    Returns:
        0, or one more than the padding index of the position table.
    """
    table = getattr(getattr(text_backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def check_tokens(input_ids: Tensor, attention_mask: Tensor, max_text_len: int) -> None:
    """Raise a clear error if a batch of prompts has the wrong shape.

    Args:
        input_ids: Tokens, which should be (R, T).
        attention_mask: Mask, which should have the same shape.
        max_text_len: Largest number of tokens of a prompt.

    Raises:
        ValueError: A shape is wrong, there is no prompt, or T is larger than max_text_len.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be (R, T) with at least one prompt, got {tuple(input_ids.shape)}.")
    if input_ids.shape[1] > max_text_len:
        raise ValueError(
            f"The prompt has {input_ids.shape[1]} tokens but max_text_len is {max_text_len}; let the processor split "
            "the labels into chunks, or give fewer labels."
        )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} but input_ids is {tuple(input_ids.shape)}; give one "
            "number per token."
        )
