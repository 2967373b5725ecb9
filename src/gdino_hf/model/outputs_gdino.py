"""Precomputed features that forward accepts, and the outputs of forward."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

# ModelOutput requires a default for every field. Fields whose type does not include None are always present.


@dataclass
class GDinoImageFeatures(ModelOutput):
    """Image features from `get_image_features`, which forward accepts instead of pixel_values.

    Attributes:
        feature_maps: (B, D, h_l, w_l) feature map of each level, projected to the model's width.
        masks: (B, h_l, w_l) bool mask of each level, True on real cells. None if all cells are real, which saves the
            model the masking.
        padding_seen: Whether padding took part in computing the features, as in published models. The position
            embedding of queries then counts padding as part of the image, too.
        hidden_states: States of the image backbone's stages in its own layout, if output_hidden_states.
        attentions: Attention weights of the image backbone in its own layout, if output_attentions.
        pooler_output: None. transformers' models return a pooled vector here, which detection does not have.
    """

    feature_maps: tuple[Tensor, ...] = None  # type: ignore[assignment]
    masks: tuple[Tensor, ...] | None = None
    padding_seen: bool | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    pooler_output: Tensor | None = None

    @property
    def last_hidden_state(self) -> Tensor:
        """(B, S, D) tokens that the encoder reads: the cells of all feature maps, level by level."""
        return torch.cat([x.flatten(2).transpose(1, 2) for x in self.feature_maps], dim=1)


@dataclass
class GDinoTextFeatures(ModelOutput):
    """Text features from `get_text_features`, which forward accepts instead of input_ids.

    Attributes:
        last_hidden_state: (R, T, D) features, projected to the model's width.
        input_ids: (R, T) tokens of the prompts.
        attention_mask: (R, T) bool, True on real tokens.
        phrase_ids: (R, T) number of the label that each token belongs to, -1 on special tokens and padding.
        phrase_mask: (R, T, T) bool, True = may attend.
        position_ids: (R, T) position of each token, starting at 0 in every phrase.
        hidden_states: (R, T, text width) states of the text backbone before and after each layer, if
            output_hidden_states. The last one is what `last_hidden_state` projects.
        attentions: Attention weights of the text backbone's layers, if output_attentions.
        pooler_output: None. transformers' models return a pooled vector here, which detection does not have.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]
    input_ids: Tensor = None  # type: ignore[assignment]
    attention_mask: Tensor = None  # type: ignore[assignment]
    phrase_ids: Tensor = None  # type: ignore[assignment]
    phrase_mask: Tensor = None  # type: ignore[assignment]
    position_ids: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    pooler_output: Tensor | None = None


@dataclass
class GDinoModelOutput(ModelOutput):
    """Output of `GDinoModel` for R pairs of image and prompt with Q queries each.

    In training with labels, P denoising queries come before the Q matching queries.

    Attributes:
        last_hidden_state: (R, Q, D) normalized output of the last decoder layer.
        init_reference_points: (R, Q, 4) cxcywh in [0, 1], the boxes that the queries start from.
        intermediate_hidden_states: (R, layers, Q, D) normalized output of each decoder layer.
        intermediate_reference_points: (R, layers, Q, 4) boxes that each layer refined, without gradient.
        decoder_hidden_states: (R, Q, D) normalized query features before each decoder layer and after the last, if
            output_hidden_states.
        decoder_attentions: Attention weights of the queries, if output_attentions: three tuples with an entry per
            decoder layer, over each other (R, M, Q, Q), over the text (R, M, Q, T), and over their sampled points
            (R, Q, M, L, K).
        encoder_last_hidden_state_vision: (R, S, D) image features from the encoder.
        encoder_last_hidden_state_text: (R, T, D) text features from the encoder.
        encoder_vision_hidden_states: (R, S, D) image features before each encoder layer and after the last, if
            output_hidden_states.
        encoder_text_hidden_states: (R, T, D) text features before each encoder layer and after the last, if
            output_hidden_states.
        encoder_attentions: Attention weights of the encoder, if output_attentions: four tuples with an entry per
            encoder layer, image tokens over the text (R, M, S, T), text tokens over the image (R, M, T, S), text tokens
            over their phrase (R, M, T, T), and image tokens over their sampled points (R, S, M, L, K).
        enc_outputs_class: (R, S', max_text_len) token logits of all image tokens, where S' is the larger of S and Q,
            if output_hidden_states; two-stage models only.
        enc_outputs_coord_logits: (R, S', 4) boxes of all image tokens before the sigmoid, if output_hidden_states;
            two-stage models only.
        encoder_logits: (R, Q, max_text_len) token logits of the selected proposals; two-stage models only.
        encoder_pred_boxes: (R, Q, 4) cxcywh of the selected proposals; two-stage models only.
        input_reference_points: (R, layers, Q, 4) boxes that each layer's prediction starts from, with gradient.
        text_features: Text features of the prompts, one row per pair.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]
    init_reference_points: Tensor = None  # type: ignore[assignment]
    intermediate_hidden_states: Tensor = None  # type: ignore[assignment]
    intermediate_reference_points: Tensor = None  # type: ignore[assignment]
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    encoder_last_hidden_state_vision: Tensor = None  # type: ignore[assignment]
    encoder_last_hidden_state_text: Tensor = None  # type: ignore[assignment]
    encoder_vision_hidden_states: tuple[Tensor, ...] | None = None
    encoder_text_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord_logits: Tensor | None = None
    encoder_logits: Tensor | None = None
    encoder_pred_boxes: Tensor | None = None
    input_reference_points: Tensor = None  # type: ignore[assignment]
    text_features: GDinoTextFeatures = None  # type: ignore[assignment]


@dataclass
class GDinoObjectDetectionOutput(ModelOutput):
    """Output of `GDinoForObjectDetection` for R pairs of image and prompt with Q queries each.

    The order of the fields is that of transformers' Grounding DINO. `loss` is the first value, and in the predictions
    that Trainer collects, which leave it out, the logits and boxes are at positions 1 and 2, after `loss_dict`.

    Attributes:
        loss: Weighted sum of all loss terms, if labels were given.
        loss_dict: The unweighted loss terms by name, if labels were given; see losses.py.
        logits: (R, Q, max_text_len) token logits, -inf outside the prompt.
        pred_boxes: (R, Q, 4) float32 cxcywh in [0, 1] of the image without padding.
        auxiliary_outputs: {"logits", "pred_boxes"} of each decoder layer but the last, if labels were given and
            config.auxiliary_loss is True.
        last_hidden_state: (R, Q, D) normalized output of the last decoder layer.
        init_reference_points: (R, Q, 4) cxcywh in [0, 1], the boxes that the queries start from.
        intermediate_hidden_states: (R, layers, Q, D) normalized output of each decoder layer.
        intermediate_reference_points: (R, layers, Q, 4) boxes that each layer refined, without gradient.
        decoder_hidden_states: See `GDinoModelOutput`.
        decoder_attentions: See `GDinoModelOutput`.
        encoder_last_hidden_state_vision: (R, S, D) image features from the encoder.
        encoder_last_hidden_state_text: (R, T, D) text features from the encoder.
        encoder_vision_hidden_states: See `GDinoModelOutput`.
        encoder_text_hidden_states: See `GDinoModelOutput`.
        encoder_attentions: See `GDinoModelOutput`.
        enc_outputs_class: See `GDinoModelOutput`.
        enc_outputs_coord_logits: See `GDinoModelOutput`.
        encoder_logits: (R, Q, max_text_len) token logits of the selected proposals; two-stage models only.
        encoder_pred_boxes: (R, Q, 4) cxcywh of the selected proposals; two-stage models only.
        input_ids: (R, T) tokens of the prompts.
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
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    encoder_last_hidden_state_vision: Tensor = None  # type: ignore[assignment]
    encoder_last_hidden_state_text: Tensor = None  # type: ignore[assignment]
    encoder_vision_hidden_states: tuple[Tensor, ...] | None = None
    encoder_text_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord_logits: Tensor | None = None
    encoder_logits: Tensor | None = None
    encoder_pred_boxes: Tensor | None = None
    input_ids: Tensor = None  # type: ignore[assignment]
    attention_mask: Tensor = None  # type: ignore[assignment]
