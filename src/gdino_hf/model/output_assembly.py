"""From what the stages computed to the outputs of forward: names, order, and no denoising queries."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .decoder import DecoderStates
from .encoder import Memory
from .heads import pad_logits
from .outputs_gdino import GDinoModelOutput, GDinoObjectDetectionOutput, GDinoTextFeatures
from .query_selection import SelectedQueries

_DETECTION_FIELDS = {field.name for field in fields(GDinoObjectDetectionOutput)}
_SHARED = tuple(field.name for field in fields(GDinoModelOutput) if field.name in _DETECTION_FIELDS)
_PER_QUERY = (
    "last_hidden_state",
    "init_reference_points",
    "intermediate_hidden_states",
    "intermediate_reference_points",
)


def model_output(
    memory: Memory,
    selected: SelectedQueries | None,
    states: DecoderStates,
    prompts: GDinoTextFeatures,
    max_text_len: int,
    detailed: bool,
) -> GDinoModelOutput:
    """Make the core model's output from what its stages computed.

    Args:
        memory: Output of the encoder.
        selected: The selected proposals, or None in a one-stage model.
        states: Output of the decoder.
        prompts: Text features, one row per pair.
        max_text_len: Number of tokens to pad token logits to.
        detailed: Whether to output the states of every layer and all proposals, too.

    Returns:
        The output, whose tuple has the order of the fields.
    """
    first = states.first_hidden_state
    # A field assigned later would come last in the tuple.
    return GDinoModelOutput(
        last_hidden_state=states.last_hidden_state,
        init_reference_points=states.input_references[0],
        intermediate_hidden_states=torch.stack(states.hidden_states, dim=1),
        intermediate_reference_points=torch.stack(states.output_references, dim=1),
        decoder_hidden_states=None if first is None else (first, *states.hidden_states),
        decoder_attentions=states.attentions,
        encoder_last_hidden_state_vision=memory.vision,
        encoder_last_hidden_state_text=memory.text,
        encoder_vision_hidden_states=memory.vision_states if detailed else None,
        encoder_text_hidden_states=memory.text_states if detailed else None,
        encoder_attentions=memory.attentions,
        enc_outputs_class=pad_logits(selected.all_logits, max_text_len) if detailed and selected else None,
        enc_outputs_coord_logits=selected.all_box_logits if detailed and selected else None,
        encoder_logits=pad_logits(selected.logits, max_text_len) if selected else None,
        encoder_pred_boxes=selected.box_logits.sigmoid() if selected else None,
        input_reference_points=torch.stack(states.input_references, dim=1),
        text_features=prompts,
    )


def detection_output(
    outputs: GDinoModelOutput,
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    loss: Tensor | None,
    loss_dict: dict[str, Tensor] | None,
    auxiliary: bool,
    num_denoising: int = 0,
) -> GDinoObjectDetectionOutput:
    """Make the detector's output from the core model's output and the heads' predictions, without denoising queries.

    Args:
        outputs: Output of the core model.
        logits: (R, P + Q, max_text_len) token logits of one or more decoder layers, the last of which is the result.
        boxes: (R, P + Q, 4) boxes of the same layers.
        loss: The loss, or None without labels.
        loss_dict: The terms of the loss by name, or None without labels.
        auxiliary: Whether to output the other layers' predictions, too.
        num_denoising: Number of denoising queries P.

    Returns:
        The output, whose tuple has the order of the fields: a loss comes first.
    """
    first = num_denoising
    carried: dict[str, Any] = {name: getattr(outputs, name) for name in _SHARED}
    # Without denoising queries nothing is sliced: gradients are asked of the very tensors that the decoder used.
    if first > 0:
        carried |= {name: carried[name][..., first:, :] for name in _PER_QUERY}
    if first > 0 and outputs.decoder_hidden_states is not None:
        carried["decoder_hidden_states"] = tuple(x[:, first:] for x in outputs.decoder_hidden_states)
    if first > 0 and outputs.decoder_attentions is not None:
        own, over_text, over_points = outputs.decoder_attentions
        carried["decoder_attentions"] = (
            tuple(x[:, :, first:, first:] for x in own),
            tuple(x[:, :, first:] for x in over_text),
            tuple(x[:, first:] for x in over_points),
        )
    predictions = [{"logits": x[:, first:], "pred_boxes": y[:, first:]} for x, y in zip(logits, boxes, strict=True)]
    # A field assigned later would come last in the tuple, where Trainer does not look for the loss.
    return GDinoObjectDetectionOutput(
        **carried,
        loss=loss,
        loss_dict=loss_dict,
        logits=predictions[-1]["logits"],
        pred_boxes=predictions[-1]["pred_boxes"],
        auxiliary_outputs=predictions[:-1] if auxiliary else None,
        input_ids=outputs.text_features.input_ids,
        attention_mask=outputs.text_features.attention_mask,
    )
