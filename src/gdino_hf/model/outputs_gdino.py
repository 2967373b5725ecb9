"""What the model's parts hand over, and what its forward returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .denoising import DenoisingQueries

# ModelOutput wants a default for every field; the ones without "| None" are always there.


@dataclass
class GDinoImageFeatures(ModelOutput):
    """What the model needs of images; `forward(image_features=...)` takes it in place of pixel_values.

    Attributes:
        feature_maps: Per level (B, D, h_l, w_l), projected to the model's width.
        masks: Per level (B, h_l, w_l) bool, True on real cells; None if all are, which saves the model masking.
        padding_seen: Whether padding took part in the features, as published; then it does in query positions too.
    """

    feature_maps: tuple[Tensor, ...] = None  # type: ignore[assignment]
    masks: tuple[Tensor, ...] | None = None
    padding_seen: bool | None = None


@dataclass
class GDinoTextFeatures(ModelOutput):
    """What the model needs of prompts; `forward(text_features=...)` takes it in place of input_ids.

    Attributes:
        last_hidden_state: (R, T, D), projected to the model's width.
        input_ids: (R, T).
        attention_mask: (R, T) bool, True on real tokens.
        phrase_ids: (R, T) ordinal of the label each token belongs to, -1 on special tokens and padding.
        phrase_mask: (R, T, T) bool, True = may attend.
        position_ids: (R, T), restarting in every phrase.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]
    input_ids: Tensor = None  # type: ignore[assignment]
    attention_mask: Tensor = None  # type: ignore[assignment]
    phrase_ids: Tensor = None  # type: ignore[assignment]
    phrase_mask: Tensor = None  # type: ignore[assignment]
    position_ids: Tensor = None  # type: ignore[assignment]


@dataclass
class GDinoModelOutput(ModelOutput):
    """Output of `GDinoModel`; R rows of Q queries (in training with labels, P denoising queries stand before them).

    Attributes:
        last_hidden_state: (R, Q, D) normalized output of the last decoder layer.
        init_reference_points: (R, Q, 4) cxcywh in [0, 1], where the queries started.
        intermediate_hidden_states: (R, layers, Q, D), normalized.
        intermediate_reference_points: (R, layers, Q, 4) boxes after each layer's refinement, without gradient.
        input_reference_points: (R, layers, Q, 4) boxes each layer's prediction starts from, with gradient.
        encoder_last_hidden_state_vision: (R, S, D).
        encoder_last_hidden_state_text: (R, T, D).
        encoder_vision_hidden_states: Per layer and at the end (R, S, D), if output_hidden_states.
        encoder_text_hidden_states: Per layer and at the end (R, T, D), if output_hidden_states.
        encoder_logits: (R, Q, max_text_len) token logits of the selected proposals; two-stage models only.
        encoder_pred_boxes: (R, Q, 4) cxcywh of the selected proposals; two-stage models only.
        enc_outputs_class: (R, S', max_text_len) token logits of all image tokens, S' the larger of S and Q, if
            output_hidden_states.
        enc_outputs_coord_logits: (R, S', 4) their boxes before the sigmoid, if output_hidden_states.
        text_features: The prompts as the model saw them, one row per output row.
        denoising: What the denoising queries stand for, in training with labels.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]
    init_reference_points: Tensor = None  # type: ignore[assignment]
    intermediate_hidden_states: Tensor = None  # type: ignore[assignment]
    intermediate_reference_points: Tensor = None  # type: ignore[assignment]
    input_reference_points: Tensor = None  # type: ignore[assignment]
    encoder_last_hidden_state_vision: Tensor = None  # type: ignore[assignment]
    encoder_last_hidden_state_text: Tensor = None  # type: ignore[assignment]
    encoder_vision_hidden_states: tuple[Tensor, ...] | None = None
    encoder_text_hidden_states: tuple[Tensor, ...] | None = None
    encoder_logits: Tensor | None = None
    encoder_pred_boxes: Tensor | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord_logits: Tensor | None = None
    text_features: GDinoTextFeatures = None  # type: ignore[assignment]
    denoising: DenoisingQueries | None = None


@dataclass
class GDinoObjectDetectionOutput(ModelOutput):
    """Output of `GDinoForObjectDetection`.

    Attributes:
        loss: Weighted sum of all terms, if labels were given.
        loss_dict: The unweighted terms by name, if labels were given; see losses.py.
        logits: (R, Q, max_text_len) token logits, -inf outside the prompt.
        pred_boxes: (R, Q, 4) float32 cxcywh in [0, 1] of the image without padding.
        auxiliary_outputs: Per decoder layer but the last {"logits", "pred_boxes"}, if labels were given and
            config.auxiliary_loss.
        last_hidden_state: (R, Q, D).
        init_reference_points: (R, Q, 4) cxcywh in [0, 1].
        intermediate_hidden_states: (R, layers, Q, D).
        intermediate_reference_points: (R, layers, Q, 4).
        encoder_last_hidden_state_vision: (R, S, D).
        encoder_last_hidden_state_text: (R, T, D).
        encoder_vision_hidden_states: As in `GDinoModelOutput`.
        encoder_text_hidden_states: As in `GDinoModelOutput`.
        encoder_logits: (R, Q, max_text_len), two-stage models only.
        encoder_pred_boxes: (R, Q, 4), two-stage models only.
        enc_outputs_class: As in `GDinoModelOutput`.
        enc_outputs_coord_logits: As in `GDinoModelOutput`.
        input_ids: (R, T) the prompts' tokens.
        attention_mask: (R, T) bool, True on real tokens.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor = None  # type: ignore[assignment]
    pred_boxes: Tensor = None  # type: ignore[assignment]
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor = None  # type: ignore[assignment]
    init_reference_points: Tensor = None  # type: ignore[assignment]
    intermediate_hidden_states: Tensor = None  # type: ignore[assignment]
    intermediate_reference_points: Tensor = None  # type: ignore[assignment]
    encoder_last_hidden_state_vision: Tensor = None  # type: ignore[assignment]
    encoder_last_hidden_state_text: Tensor = None  # type: ignore[assignment]
    encoder_vision_hidden_states: tuple[Tensor, ...] | None = None
    encoder_text_hidden_states: tuple[Tensor, ...] | None = None
    encoder_logits: Tensor | None = None
    encoder_pred_boxes: Tensor | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord_logits: Tensor | None = None
    input_ids: Tensor = None  # type: ignore[assignment]
    attention_mask: Tensor = None  # type: ignore[assignment]
